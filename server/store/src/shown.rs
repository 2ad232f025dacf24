//! What a reader is shown of a message that has changed since it was written: one rule for all backends. Pure.
//!
//! The log keeps the original and every amendment. The original is shown with the body of its last edit, or with none
//! when it was taken back or deleted. Of the amendments only the last is shown as it is; an earlier one is `AsSent` and
//! has no body: there is nothing to do any more. A message that its reader has deleted for himself has no body either,
//! and none of its amendments has one for him. Who left a group before an edit is told of it and not shown it.

use ringline_schema::ids::{Seq, UserName};
use ringline_schema::message::MessageState;
use ringline_schema::record::StoredMessage;
use ringline_schema::rows::{AmendedRow, MemberRow};

/// Who reads; nobody in particular by default.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reader<'a> {
    pub user: Option<&'a UserName>,
    /// In a group: what this user may read.
    pub member: Option<&'a MemberRow>,
}

impl Reader<'_> {
    /// The amendment whose body stands in the place of the original's, as far as this reader may see it.
    pub fn edit(&self, row: &AmendedRow) -> Option<Seq> {
        let readable = self.member.is_none_or(|member| member.may_read(row.by));
        (row.state == MessageState::Edited && readable).then_some(row.by)
    }
}

/// An amendment as it is shown; `row` is what its original is now, `None` when the reader does not see that.
pub(crate) fn amendment(message: StoredMessage, row: Option<&AmendedRow>) -> StoredMessage {
    if row.is_none_or(|row| row.by != message.seq) { message.without_news() } else { message }
}

/// An original as it is shown; `edit` is the amendment that [`Reader::edit`] names.
pub(crate) fn original(message: StoredMessage, row: &AmendedRow, edit: Option<StoredMessage>) -> StoredMessage {
    match row.state {
        MessageState::Edited => {
            let mut extra = message.extra.unwrap_or_default();
            (extra.state, extra.amended_ms) = (row.state, row.at_ms);
            let body = edit.map(|edit| edit.body).unwrap_or_default();
            StoredMessage { body, extra: Some(extra), ..message }
        }
        MessageState::Recalled | MessageState::Deleted | MessageState::Hidden => message.gone((row.state, row.at_ms)),
        MessageState::AsSent => message,
    }
}
