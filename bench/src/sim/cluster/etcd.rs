//! The simulated etcd of a run: one key a node, under a lease. Pure; owned by the cluster.
//!
//! A key is gone when its lease has ended; while etcd has no leader nothing ends and nobody is answered, and a new leader gives
//! every lease its whole time once more. Who watches may miss changes (a watch that broke, a revision that was
//! compacted): the list alone counts.

use std::collections::BTreeMap;

use ringline_cluster::membership::Standing;
use ringline_cluster::reconcile::Start;

/// How long a node that says nothing counts as alive.
pub const LEASE_US: u64 = 10_000_000;

/// What a node says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub start: Start,
    pub standing: Standing,
    /// When its lease ends.
    pub until_us: u64,
}

/// What a node asks of etcd.
#[derive(Clone, Copy, Debug)]
pub enum ToEtcd {
    Register {
        start: Start,
        asked_us: u64,
    },
    /// `asked_us`: on the clock of who asks.
    Renew {
        start: Start,
        asked_us: u64,
        standing: Standing,
    },
    List,
    Leave {
        start: Start,
    },
}

/// What comes back.
#[derive(Clone, Debug)]
pub enum FromEtcd {
    /// The lease is this start's, and has its whole time from then on.
    Renewed {
        asked_us: u64,
    },
    /// Another start of the node has the key.
    Occupied,
    /// The lease, or the key, is gone.
    Gone,
    Listing(BTreeMap<usize, Entry>),
    /// Nobody answered that.
    Silent(ToEtcd),
}

/// See the module.
pub struct Etcd {
    up: bool,
    entries: BTreeMap<usize, Entry>,
}

impl Default for Etcd {
    fn default() -> Self {
        Self { up: true, entries: BTreeMap::new() }
    }
}

impl Etcd {
    /// Answers a node. True: something has changed that others may hear of.
    pub fn ask(&mut self, node: usize, ask: ToEtcd, now_us: u64) -> (FromEtcd, bool) {
        if !self.up {
            return (FromEtcd::Silent(ask), false);
        }
        let before = self.entries.len();
        self.entries.retain(|_, entry| entry.until_us > now_us);
        let ended = before != self.entries.len();
        let until_us = now_us + LEASE_US;
        let own = self.entries.get_mut(&node);
        match (ask, own) {
            (ToEtcd::List, _) => (FromEtcd::Listing(self.entries.clone()), ended),
            (ToEtcd::Register { start, asked_us }, None) => {
                self.entries.insert(node, Entry { start, standing: Standing::Up, until_us });
                (FromEtcd::Renewed { asked_us }, true)
            }
            (ToEtcd::Register { start, asked_us }, Some(own)) if own.start == start => {
                own.until_us = until_us;
                (FromEtcd::Renewed { asked_us }, ended)
            }
            (ToEtcd::Register { .. }, Some(_)) => (FromEtcd::Occupied, ended),
            (ToEtcd::Renew { start, asked_us, standing }, Some(own)) if own.start == start => {
                own.until_us = until_us;
                let changed = std::mem::replace(&mut own.standing, standing) != standing;
                (FromEtcd::Renewed { asked_us }, changed || ended)
            }
            (ToEtcd::Renew { .. }, _) => (FromEtcd::Gone, ended),
            (ToEtcd::Leave { start }, Some(own)) if own.start == start => {
                self.entries.remove(&node);
                (FromEtcd::Gone, true)
            }
            (ToEtcd::Leave { .. }, _) => (FromEtcd::Gone, ended),
        }
    }

    /// It has no leader; what has ended by now has ended.
    pub fn goes(&mut self, now_us: u64) {
        self.entries.retain(|_, entry| entry.until_us > now_us);
        self.up = false;
    }

    /// It has a leader again.
    pub fn returns(&mut self, now_us: u64) {
        if std::mem::replace(&mut self.up, true) {
            return;
        }
        self.entries.values_mut().for_each(|entry| entry.until_us = now_us + LEASE_US);
    }
}
