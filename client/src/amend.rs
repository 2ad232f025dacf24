//! Editing, taking back and deleting messages.
//!
//! Part of the client's handle. What changes a message for everyone is sent like a message: numbered, retried, kept
//! exactly once, and it enters the stream of its conversation as a [`Message`] of kind `Amendment` that names the one it
//! changes. A history shows every message as it is by then.

use bytes::Bytes;
use ringline_schema::ids::{Seq, UserName};
use ringline_schema::message::chat::{Amend, AmendAction, ChatRequest};
use ringline_schema::message::{BodyKind, MessageState, Request};

use crate::account::AccountQuery;
use crate::client::{Client, Sending};
use crate::group::Extra;
use crate::pending::{CallError, SendOptions};
use crate::streams::Message;

/// What an amendment says of another message of its conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amendment {
    /// The message that it changes.
    pub of: Seq,
    /// What that has become. `Edited`: the body of the amendment is the new one. `AsSent`: a later amendment has taken
    /// the place of this one, so there is nothing to do.
    pub state: MessageState,
}

impl Message {
    /// What has become of this message; bodies of recalled and deleted ones are empty.
    pub fn state(&self) -> MessageState {
        self.extra.as_ref().map_or(MessageState::AsSent, |extra| extra.state)
    }

    /// What this row of the conversation says of another message, if it is no message but an amendment.
    pub fn amendment(&self) -> Option<Amendment> {
        let extra = self.extra.as_ref().filter(|_| self.kind == BodyKind::Amendment)?;
        Some(Amendment { of: extra.refers, state: extra.state })
    }
}

/// What a send amends; plain messages have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Amends {
    pub seq: Seq,
    pub action: AmendAction,
}

impl Amends {
    /// `kind` and `body` of the new text.
    pub(crate) fn as_wire<'a>(
        &self,
        (with, client_seq): (&'a UserName, u64),
        kind: BodyKind,
        body: &'a [u8],
    ) -> Request<'a> {
        let (with, seq, action) = (with.as_str(), self.seq, self.action);
        Request::Chat(ChatRequest::Amend(Amend { with, seq, action, kind, client_seq, body }))
    }

    /// What the row of the conversation carries.
    pub(crate) fn extra(&self, amended_ms: u64) -> Box<Extra> {
        let state = match self.action {
            AmendAction::Edit => MessageState::Edited,
            AmendAction::Recall => MessageState::Recalled,
            AmendAction::DeleteForAll => MessageState::Deleted,
            AmendAction::DeleteForMe => MessageState::Hidden,
        };
        Box::new(Extra { refers: self.seq, state, amended_ms, ..Extra::default() })
    }
}

impl Client {
    /// Gives an own message another text; `with` is the other user or the group. In a quarter of an hour after it was
    /// sent, unless the server is set otherwise: `AMEND_TOO_LATE`.
    pub fn edit(&self, with: &str, seq: Seq, body: impl Into<Bytes>) -> Sending {
        self.edit_with((with, seq), BodyKind::Text, body)
    }

    /// Gives an own message another body, of the kind that it has.
    pub fn edit_with(&self, (with, seq): (&str, Seq), kind: BodyKind, body: impl Into<Bytes>) -> Sending {
        let options = SendOptions { kind, ..SendOptions::default() };
        self.queue(with, body.into(), options, Some(Amends { seq, action: AmendAction::Edit }))
    }

    /// Takes an own message back, in the same time: nobody can read it any more.
    pub fn recall(&self, with: &str, seq: Seq) -> Sending {
        self.take_away(with, seq, AmendAction::Recall)
    }

    /// Deletes a message for everyone: an own one at any time, in a group also one of somebody who ranks lower.
    pub fn delete_for_all(&self, with: &str, seq: Seq) -> Sending {
        self.take_away(with, seq, AmendAction::DeleteForAll)
    }

    fn take_away(&self, with: &str, seq: Seq, action: AmendAction) -> Sending {
        self.queue(with, Bytes::new(), SendOptions::default(), Some(Amends { seq, action }))
    }

    /// Deletes a message for this user alone: no device of the user is shown its body any more. Devices that are online
    /// hear of it by [`Event::Hidden`](crate::Event::Hidden).
    pub async fn delete_for_me(&self, with: &str, seq: Seq) -> Result<(), CallError> {
        let with = UserName::new(with).map_err(|_| CallError::BadName)?;
        self.done(AccountQuery::Hide { with, seq }).await
    }
}
