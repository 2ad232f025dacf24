//! Editing and taking back at the prompt. Part of the chat, on its thread.
//!
//! Invariant as in the chat: what others chose passes [`clean`] on its way to the screen.

use super::{Chat, clean, split_name};
use crate::{Message, MessageState, Seq};

const USAGE: &str = "/edit N TEXT, /recall N, /delete N [all]; N is the number behind a message of /history";

impl Chat {
    /// A command of this module. False: it is none.
    pub(super) async fn amend(&mut self, command: &str, rest: &str) -> bool {
        if !matches!(command, "/edit" | "/recall" | "/delete") {
            return false;
        }
        let (number, more) = split_name(rest);
        let (Ok(number), Some(peer)) = (number.parse(), self.peer.clone()) else {
            self.screen.line(USAGE);
            return true;
        };
        let (peer, seq) = (peer.as_str(), Seq(number));
        let sending = match (command, more) {
            ("/edit", text) if !text.is_empty() => self.client.edit(peer, seq, text.to_owned()),
            ("/recall", "") => self.client.recall(peer, seq),
            ("/delete", "all") => self.client.delete_for_all(peer, seq),
            ("/delete", "") => {
                let result = self.client.delete_for_me(peer, seq).await;
                self.settled(result, "deleted for you");
                return true;
            }
            (_, _) => {
                self.screen.line(USAGE);
                return true;
            }
        };
        self.show_result(sending, peer);
        true
    }

    /// What an amendment says, as the end of a sentence that begins with its sender; `None`: nothing to say.
    pub(super) fn what_amended(message: &Message) -> Option<String> {
        let amendment = message.amendment()?;
        let of = amendment.of;
        match amendment.state {
            MessageState::Edited => Some(format!("has changed {of}: {}", clean(&message.text()))),
            MessageState::Recalled => Some(format!("has taken back {of}")),
            MessageState::Deleted => Some(format!("has deleted {of}")),
            MessageState::AsSent | MessageState::Hidden => None,
        }
    }

    /// What stands behind or in place of the body of a message that has changed.
    pub(super) fn what_became(state: MessageState) -> &'static str {
        match state {
            MessageState::AsSent => "",
            MessageState::Edited => " (edited)",
            MessageState::Recalled => "[taken back]",
            MessageState::Deleted => "[deleted]",
            MessageState::Hidden => "[deleted for you]",
        }
    }
}
