//! `/delete-account`, and for administrators `/delete-user`: a user goes for ever. Part of the chat, on its thread.
//!
//! Nothing is asked of the server before the name was typed once more, and for the own account the password: the one that
//! the chat logged in with is not taken for it, because whoever sits at an open chat would have it.

use super::{Chat, clean, split_name};
use crate::UserName;

/// What the next line answers.
pub(super) enum Confirming {
    /// The name of the user who is to be deleted.
    Name { user: UserName, recall: bool },
    /// The password of the own account.
    Password { recall: bool },
}

impl Chat {
    /// A command of this module. False: it is none.
    pub(super) fn deletion(&mut self, command: &str, rest: &str) -> bool {
        let (user, more) = match command {
            "/delete-account" => (self.client.user().clone(), rest),
            "/delete-user" => {
                let (name, more) = split_name(rest);
                let Ok(user) = UserName::new(name) else {
                    self.screen.line("/delete-user NAME [recall]");
                    return true;
                };
                (user, more)
            }
            _ => return false,
        };
        let recall = more.trim() == "recall";
        if !recall && !more.trim().is_empty() {
            self.screen.line("recall, or nothing: whether the messages are taken back as well");
            return true;
        }
        let name = clean(user.as_str());
        let messages =
            if recall { "the messages are taken back" } else { "the messages stay with those who have them" };
        self.screen.line(&format!("{name} is deleted for ever, and nobody gets the name again; {messages}."));
        self.screen.line("/export FILE first keeps a copy. Type the name to go on, anything else to stop:");
        self.confirming = Some(Confirming::Name { user, recall });
        true
    }

    /// A line that answers a question.
    pub(super) async fn confirm(&mut self, question: Confirming, line: &str) {
        match question {
            Confirming::Name { user, .. } if user.as_str() != line => self.screen.line("nothing was deleted"),
            Confirming::Name { user, recall } if user == *self.client.user() => {
                self.screen.line("the password (it is shown as you type):");
                self.confirming = Some(Confirming::Password { recall });
            }
            Confirming::Name { user, recall } => {
                let result = self.client.delete_user(user.as_str(), recall).await;
                self.settled(result, "deleted");
            }
            Confirming::Password { recall } => {
                let result = self.client.delete_account(line, recall).await;
                self.settled(result, "deleted");
            }
        }
    }
}
