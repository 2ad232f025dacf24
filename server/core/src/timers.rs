//! One table of deadlines. Timers are never cancelled: whoever is woken checks whether its deadline still stands, so a
//! stale entry costs one look and there is never a scan over all sessions.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::event::ConnId;

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// Login, silence or stalled output of a connection; `ConnId::generation` makes a stale one harmless.
    Session(ConnId),
    /// Delivery acknowledgements that did not come: one timer for the first that gives up.
    Deliveries,
    /// The oldest request whose parts other shards have not done: one timer for all of them, which wait equally long.
    Gathers,
    /// The next slice of a broadcast.
    Notice,
    /// The next slice of the fan-outs.
    FanOut,
    /// Changes of presence are told, and who is watched is asked for again.
    Presence,
    /// Write the cursors that moved.
    Cursors,
    /// Tell what receipts have moved.
    Receipts,
    /// Deletions of users that wait are looked at.
    Deletions,
    /// What waits for other nodes.
    Nodes,
}

/// Deadlines in monotonic microseconds, earliest first; equal ones in order of [`Timer`], so that replays agree.
#[derive(Debug, Default)]
pub struct Timers {
    heap: BinaryHeap<Reverse<(u64, Timer)>>,
}

impl Timers {
    pub fn arm(&mut self, at_us: u64, timer: Timer) {
        self.heap.push(Reverse((at_us, timer)));
    }

    pub fn len(&self) -> usize {
        self.heap.len()
    }

    pub fn next_us(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at_us, _))| *at_us)
    }

    /// Takes one timer that is due.
    pub fn pop_due(&mut self, now_us: u64) -> Option<Timer> {
        if self.next_us()? > now_us {
            return None;
        }
        self.heap.pop().map(|Reverse((_, timer))| timer)
    }
}
