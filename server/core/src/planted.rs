//! Planted bugs: faults that the feature `planted-bugs` can switch on, to prove that the checker of the simulator sees
//! them. For tests only; without the feature [`Planted`] has no size and every question to it is `false` at compile time.

#[cfg(feature = "planted-bugs")]
use ringline_schema::message::MessageState;
use ringline_schema::record::Record;
#[cfg(feature = "planted-bugs")]
use ringline_schema::rows::{AmendedRow, RowKey, RowValue};

/// A fault of the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A send is acknowledged when its record is queued.
    AckBeforeCommit,
    /// A repeat is taken for a new message.
    NoDuplicateFilter,
    /// A conversation that is loaded begins one below its head.
    HeadOneLow,
    /// A page of history leaves out its first message.
    PageSkipsOne,
    /// Cursors are not written.
    ForgottenCursor,
    /// A message goes to somebody else.
    WrongUser,
    /// A delivery that did not happen in time is reported as one that did.
    FalseReceipt,
    /// A READ of an earlier place is taken for the newest.
    ReadGoesBack,
    /// A READ is answered and not written.
    ReadForgotten,
    /// A message of a group is given to everyone online.
    EveryoneIsMember,
    /// The history of a group is given to whoever was a member once, all of it.
    MembershipUnread,
    /// Who is no member writes to a group.
    StrangersWrite,
    /// A message of a group is not given to the members on other shards, who are not told either.
    LostGroupPush,
    /// The page after a page of SYNC begins one too late.
    SyncSkipsOne,
    /// Whoever asks amends a message.
    AnyoneAmends,
    /// An amendment is written without the row that says what its original is now.
    AmendForgotten,
    /// What was taken back is edited.
    GoneIsAmended,
    /// What a user deletes for himself is answered and not written.
    HideForgotten,
    /// What a user deletes for himself is deleted for the other one.
    HiddenForOthers,
    /// A page that begins below what is kept leaves out what is not there and does not say so.
    BelowTheFloor,
    /// A transient message of a group is given twice.
    TransientTwice,
    /// A transient message or signal of a group is given to everyone online.
    StrangersHear,
    /// A signal goes to somebody else.
    SignalAstray,
    /// Who watches is not told that somebody goes.
    LeaveNotTold,
    /// A status is answered and not written.
    StatusForgotten,
    /// A sender's own device acknowledges a message of a group.
    OwnAckCounts,
    /// A list of receipts counts the sender.
    SenderIsCounted,
    /// Who writes is told that the other one has one message more than he has.
    HasOneMore,
    /// A page that does not begin at the beginning is said to be gone.
    AllIsTruncated,
    /// A page says that it begins one later than it does.
    FirstOneHigh,
    /// Who was deleted logs in.
    DeletedLogIn,
    /// Who was deleted is written to.
    DeletedGetMail,
    /// Who was deleted stays in its groups.
    DeletedStay,
    /// What a deleted user wrote is not taken back with it.
    RecallForgotten,
    /// Who does not watch any more is told all the same.
    UnwatchForgotten,
    /// A device that is dropped keeps its connections.
    DroppedStay,
    /// A block is answered and not written.
    BlockForgotten,
    /// The owner of a conversation does not hear of a block.
    BlockUnheard,
    /// Nobody hears of a change of who may write.
    PrivacyUnheard,
    /// Who is not blocked any more stays kept out.
    UnblockUnheard,
    /// Whoever asks changes a group as its owner.
    AnyoneRanks,
    /// Whoever asks joins a group.
    AnyoneJoins,
    /// Who is muted writes.
    MutedWrite,
    /// A group that was dissolved gets messages.
    DissolvedStaysOpen,
    /// Every member mentions all.
    MentionAllByAnyone,
    /// What a message mentions is lost.
    MentionsLost,
    /// Whoever asks tells everyone online.
    StrangersTell,
    /// A notice is given twice.
    ToldTwice,
    /// A notice is not given to every second connection, and counted all the same.
    SomeNotTold,
    /// A mark is answered and not written.
    MarkForgotten,
    /// An export gives all of every conversation, whoever may read it.
    ExportUnread,
}

impl Bug {
    pub const ALL: &'static [Self] = &[
        Self::AckBeforeCommit,
        Self::NoDuplicateFilter,
        Self::HeadOneLow,
        Self::PageSkipsOne,
        Self::ForgottenCursor,
        Self::WrongUser,
        Self::FalseReceipt,
        Self::ReadGoesBack,
        Self::ReadForgotten,
        Self::EveryoneIsMember,
        Self::MembershipUnread,
        Self::StrangersWrite,
        Self::LostGroupPush,
        Self::SyncSkipsOne,
        Self::AnyoneAmends,
        Self::AmendForgotten,
        Self::GoneIsAmended,
        Self::HideForgotten,
        Self::HiddenForOthers,
        Self::BelowTheFloor,
        Self::TransientTwice,
        Self::StrangersHear,
        Self::SignalAstray,
        Self::LeaveNotTold,
        Self::StatusForgotten,
        Self::OwnAckCounts,
        Self::SenderIsCounted,
        Self::HasOneMore,
        Self::AllIsTruncated,
        Self::FirstOneHigh,
        Self::DeletedLogIn,
        Self::DeletedGetMail,
        Self::DeletedStay,
        Self::RecallForgotten,
        Self::UnwatchForgotten,
        Self::DroppedStay,
        Self::BlockForgotten,
        Self::BlockUnheard,
        Self::PrivacyUnheard,
        Self::UnblockUnheard,
        Self::AnyoneRanks,
        Self::AnyoneJoins,
        Self::MutedWrite,
        Self::DissolvedStaysOpen,
        Self::MentionAllByAnyone,
        Self::MentionsLost,
        Self::StrangersTell,
        Self::ToldTwice,
        Self::SomeNotTold,
        Self::MarkForgotten,
        Self::ExportUnread,
    ];
}

/// The bug that a shard has.
#[derive(Debug, Default)]
pub(crate) struct Planted {
    #[cfg(feature = "planted-bugs")]
    bug: Option<Bug>,
}

impl Planted {
    #[cfg(feature = "planted-bugs")]
    pub(crate) fn plant(&mut self, bug: Option<Bug>) {
        self.bug = bug;
    }

    #[cfg(feature = "planted-bugs")]
    pub(crate) fn is(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The record as it is written: without a row that is forgotten, or with one that says too much.
    #[cfg(feature = "planted-bugs")]
    pub(crate) fn spoiled(&self, mut record: Record) -> Record {
        let (Some(bug), Record::Change(change)) = (self.bug, &mut record) else { return record };
        change.rows.retain(|row| {
            let forgotten = match row.key {
                RowKey::Amended(..) => bug == Bug::AmendForgotten,
                RowKey::Hidden(..) => bug == Bug::HideForgotten,
                RowKey::Setting(_) => bug == Bug::StatusForgotten,
                RowKey::Block(..) => bug == Bug::BlockForgotten,
                RowKey::Mark(..) => bug == Bug::MarkForgotten,
                _ => false,
            };
            !forgotten
        });
        for row in change.rows.iter_mut().filter(|_| bug == Bug::HiddenForOthers) {
            if let RowKey::Hidden(_, conversation, seq) = row.key {
                let amended = AmendedRow { state: MessageState::Deleted, by: seq, at_ms: 0 };
                (row.key, row.value) = (RowKey::Amended(conversation, seq), Some(RowValue::Amended(amended)));
            }
        }
        record
    }

    #[cfg(not(feature = "planted-bugs"))]
    #[inline(always)]
    pub(crate) fn spoiled(&self, record: Record) -> Record {
        record
    }

    #[cfg(not(feature = "planted-bugs"))]
    #[inline(always)]
    pub(crate) const fn is(&self, _bug: Bug) -> bool {
        false
    }
}

#[cfg(all(test, not(feature = "planted-bugs")))]
mod tests {
    use super::*;

    #[test]
    fn without_the_feature_there_is_nothing() {
        assert_eq!(size_of::<Planted>(), 0);
        assert!(Bug::ALL.iter().all(|&bug| !Planted::default().is(bug)));
    }
}
