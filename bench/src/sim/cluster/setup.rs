//! What a cluster's run is of, what can be wrong with it on purpose, and how it ended.

use super::super::Run;

/// A fault that is put in to prove that it is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A batch that a link brings again is worked off again.
    ResentTwice,
    /// What came by a connection and waits to be worked off is forgotten with it.
    ForgottenInbox,
    /// Shards are not told that a peer is a new process.
    ResetUntold,
    /// Shards serve without looking at the lease.
    ServesOn,
    /// A lease is believed to last longer than etcd says.
    LongLease,
    /// A partition is given back before its core has released it.
    GivesAtOnce,
    /// A session with the database reads before its first commit is acknowledged.
    NoBarrier,
    /// Commits do not compare who owns what they write.
    NoFence,
}

impl Bug {
    /// Of links.
    pub const LINKS: [Self; 3] = [Self::ResentTwice, Self::ForgottenInbox, Self::ResetUntold];
    /// Of partitions that change hands.
    pub const MOVES: [Self; 5] = [Self::ServesOn, Self::LongLease, Self::GivesAtOnce, Self::NoBarrier, Self::NoFence];
}

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// 2 to 8.
    pub nodes: usize,
    /// Partitions change hands, by etcd and PostgreSQL; otherwise each node has its own for ever, on a disk of its own.
    pub moving: bool,
    pub bug: Option<Bug>,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Played {
    pub run: Run,
    /// What the referee saw.
    pub breaches: Vec<String>,
    /// Batches of links that came again, and were dropped.
    pub resent: u64,
}

impl Played {
    pub fn is_clean(&self) -> bool {
        self.run.verdict.is_clean() && self.breaches.is_empty()
    }
}
