//! What a core says of itself, and how it is asked. A [`SnapshotPort`] belongs to its core's thread, the [`Desk`] to the
//! admin thread.
//!
//! Asking costs a core nothing until somebody asks: one number of its own to look at once a turn. Invariants: a core
//! answers each round at most once, within a turn, and never waits; an answer to an older round is thrown away, so a
//! slow core can't be taken for a quick one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ringline_cluster::placement::ShardIndex;
use ringline_core::counters::{Counters, Levels};
use ringline_store::StoreStats;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{Instant, timeout_at};

use crate::allocations::Allocations;
use crate::net::NetCounters;
use crate::peers::PeerSnapshot;
use crate::tunnels::TunnelCounters;
use crate::wake::Waker;

/// How long a core may take to answer before its figures are left out.
pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// Answers that wait for the desk: the one it asked for, and a late one of the round before.
const ANSWERS_MAX: usize = 2;

/// Counters of the shell around a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShellCounters {
    /// Connections taken in from other cores.
    pub handed_in: u64,
    pub lane_batches_sent: u64,
    pub lane_batches_received: u64,
    pub turns: u64,
    pub sleeps: u64,
    pub tunnels: TunnelCounters,
}

/// One core at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub shard: ShardIndex,
    pub levels: Levels,
    pub counters: Counters,
    pub net: NetCounters,
    pub shell: ShellCounters,
    pub store: StoreStats,
    /// Links to other nodes; `None`: a node alone.
    pub peers: Option<Box<PeerSnapshot>>,
    /// What the core's thread has taken from the allocator, in a build that counts.
    pub allocations: Option<Allocations>,
    pub store_failed: bool,
    /// Its disk has no room: durable messages are refused.
    pub disk_full: bool,
    /// Its database cannot be written for now: durable messages are refused.
    pub store_away: bool,
    /// The node is stopping.
    pub draining: bool,
}

impl Snapshot {
    /// Name and value of everything that can be added up over cores, for the log.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let names = Counters::TEXTS.iter().map(|(name, _)| *name);
        let mut list: Vec<_> = names.zip(self.counters.values()).chain(self.counters.failures()).collect();
        list.extend([
            ("accepted_sockets", self.net.accepted),
            ("refused_sockets", self.net.refused),
            ("accept_pauses", self.net.accept_pauses),
            ("handed_in", self.shell.handed_in),
            ("bytes_in", self.net.bytes_received),
            ("bytes_out", self.net.bytes_sent),
            ("store_commits", self.store.commits),
            ("store_records", self.store.records),
            ("store_bytes", self.store.bytes),
            ("store_index_lag_bytes", self.store.index_lag_bytes),
        ]);
        list
    }
}

/// One core's side.
#[derive(Debug)]
pub struct SnapshotPort {
    wanted: Arc<AtomicU64>,
    /// The round that was answered last.
    answered: u64,
    answers: Sender<(u64, Box<Snapshot>)>,
}

impl SnapshotPort {
    /// Whether somebody waits for [`SnapshotPort::answer`]. Look at it once a turn, and once more before a sleep.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) != self.answered
    }

    pub fn answer(&mut self, snapshot: Snapshot) {
        self.answered = self.wanted.load(Ordering::Relaxed);
        // Nobody listens, or a late answer is still there: whoever asked gives up and asks again.
        let _ = self.answers.try_send((self.answered, Box::new(snapshot)));
    }
}

/// One core, seen from the desk.
#[derive(Debug)]
struct Line {
    shard: ShardIndex,
    wanted: Arc<AtomicU64>,
    waker: Arc<Waker>,
    answers: Receiver<(u64, Box<Snapshot>)>,
}

/// Asks all cores.
#[derive(Debug)]
pub struct Desk {
    lines: Vec<Line>,
    round: u64,
}

/// What came of asking one core. `None`: it did not answer in time.
pub type Answer = (ShardIndex, Option<Box<Snapshot>>);

/// A desk, and a port for each core, in order of their wakers.
pub fn desk(wakers: &[Arc<Waker>]) -> (Desk, Vec<SnapshotPort>) {
    let mut lines = Vec::new();
    let mut ports = Vec::new();
    for (at, waker) in wakers.iter().enumerate() {
        let wanted = Arc::new(AtomicU64::new(0));
        let (sender, answers) = channel(ANSWERS_MAX);
        ports.push(SnapshotPort { wanted: wanted.clone(), answered: 0, answers: sender });
        lines.push(Line { shard: ShardIndex(at as u16), wanted, waker: waker.clone(), answers });
    }
    (Desk { lines, round: 0 }, ports)
}

impl Desk {
    /// Asks every core at once and waits for all of them, [`ANSWER_TIMEOUT`] at most. Needs a tokio runtime with time.
    pub async fn ask(&mut self) -> Vec<Answer> {
        self.round += 1;
        for line in &self.lines {
            line.wanted.store(self.round, Ordering::Relaxed);
            // The wake orders the store before its look at the core's sleep.
            line.waker.wake();
        }
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut all = Vec::with_capacity(self.lines.len());
        for line in &mut self.lines {
            let snapshot = timeout_at(deadline, line.answer_to(self.round)).await.ok().flatten();
            all.push((line.shard, snapshot));
        }
        all
    }
}

impl Line {
    /// `None`: the core has ended.
    async fn answer_to(&mut self, round: u64) -> Option<Box<Snapshot>> {
        loop {
            let (answered, snapshot) = self.answers.recv().await?;
            if answered == round {
                return Some(snapshot);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn snapshot(shard: u16) -> Snapshot {
        Snapshot {
            shard: ShardIndex(shard),
            levels: Levels::default(),
            counters: Counters::default(),
            net: NetCounters::default(),
            shell: ShellCounters::default(),
            store: StoreStats::new(),
            peers: None,
            allocations: None,
            store_failed: false,
            disk_full: false,
            store_away: false,
            draining: false,
        }
    }

    fn wakers(count: usize) -> Vec<Arc<Waker>> {
        (0..count).map(|_| Arc::new(Waker::new().unwrap())).collect()
    }

    #[test]
    fn a_core_that_does_not_answer_is_left_out_and_its_late_answer_is_thrown_away() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (mut desk, mut ports) = desk(&wakers(2));
        assert!(ports.iter().all(|port| !port.is_wanted()), "nobody has asked");
        let mut slow = ports.pop().unwrap();
        let mut quick = ports.pop().unwrap();
        let quick = std::thread::spawn(move || {
            for turns in 1..=2 {
                while !quick.is_wanted() {
                    std::thread::yield_now();
                }
                let mut own = snapshot(0);
                own.shell.turns = turns;
                quick.answer(own);
            }
        });
        let answers = runtime.block_on(desk.ask());
        assert_eq!(answers[0].1.as_ref().map(|snapshot| snapshot.shell.turns), Some(1));
        assert!(answers[1].1.is_none());
        // Too late: it belongs to the round before.
        assert!(slow.is_wanted());
        slow.answer(snapshot(1));
        assert!(!slow.is_wanted());
        let answers = runtime.block_on(desk.ask());
        assert_eq!(answers[0].1.as_ref().map(|snapshot| snapshot.shell.turns), Some(2));
        assert!(answers[1].1.is_none(), "a late answer is not taken for a new one");
        quick.join().unwrap();
        drop(slow);
        let answers = runtime.block_on(desk.ask());
        assert!(answers.iter().all(|(_, answer)| answer.is_none()), "cores that have ended do not answer");
    }

    #[test]
    fn a_sleeping_core_is_rung() {
        let wakers = wakers(1);
        let (mut desk, ports) = desk(&wakers);
        wakers[0].about_to_sleep();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        assert!(runtime.block_on(desk.ask())[0].1.is_none());
        let mut rings = [0; 8];
        assert_eq!(rustix::io::read(wakers[0].bell(), &mut rings), Ok(8));
        assert!(ports[0].is_wanted());
    }
}
