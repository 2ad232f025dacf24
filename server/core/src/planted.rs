//! Planted bugs: faults that the feature `planted-bugs` can switch on, to prove that the checker of the simulator sees
//! them. For tests only; without the feature [`Planted`] has no size and every question to it is `false` at compile time.

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
