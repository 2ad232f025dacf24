//! The orderly stop: what the cores and the main thread know of each other while the node ends. Shared by all of
//! them; looked at once a turn, written only while stopping (but the quiet flag, which falls when a lane delivers).
//!
//! A node may stop when no client waits for anything: every core is quiet and nothing is on a lane between two. See
//! [`Control::all_quiet`] for why that is stable.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ringline_cluster::placement::ShardIndex;

use crate::wake::Waker;

/// Where the node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Running,
    Stopping,
}

#[derive(Debug, Default)]
struct CoreState {
    quiet: AtomicBool,
    batches_sent: AtomicU64,
    batches_received: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Control {
    phase: AtomicU8,
    stop_timeout: Duration,
    deadline: OnceLock<Instant>,
    cores: Vec<CoreState>,
    wakers: Vec<Arc<Waker>>,
    /// Set once by the first core that sees all quiet; the others follow.
    finished: AtomicBool,
    first: First,
}

/// What a stop begins with: done at the first request; the cores stop at the second.
#[derive(Default)]
struct First {
    begin: OnceLock<Box<dyn Fn() + Send + Sync>>,
    begun: AtomicBool,
}

impl std::fmt::Debug for First {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("First").field(&self.begun).finish()
    }
}

impl Control {
    pub fn new(wakers: Vec<Arc<Waker>>, stop_timeout: Duration) -> Self {
        Self {
            phase: AtomicU8::new(0),
            stop_timeout,
            deadline: OnceLock::new(),
            cores: wakers.iter().map(|_| CoreState::default()).collect(),
            wakers,
            finished: AtomicBool::new(false),
            first: First::default(),
        }
    }

    /// The first [`Control::stop`] does only this, and whoever does the work calls that again at its end.
    pub fn before_stop(&self, begin: impl Fn() + Send + Sync + 'static) {
        let _ = self.first.begin.set(Box::new(begin));
    }

    pub fn phase(&self) -> Phase {
        if self.phase.load(Ordering::Acquire) == 0 { Phase::Running } else { Phase::Stopping }
    }

    /// Begins the stop and wakes every core. Once is enough.
    pub fn stop(&self) {
        if let Some(begin) = self.first.begin.get()
            && !self.first.begun.swap(true, Ordering::SeqCst)
        {
            return begin();
        }
        self.deadline.get_or_init(|| Instant::now() + self.stop_timeout);
        self.phase.store(1, Ordering::Release);
        for waker in &self.wakers {
            waker.wake();
        }
    }

    /// Whether the stop has taken longer than it may.
    pub fn is_overdue(&self) -> bool {
        self.deadline.get().is_some_and(|deadline| Instant::now() >= *deadline)
    }

    /// What a core says of its lanes: batches sent and received since the start.
    pub fn set_traffic(&self, core: ShardIndex, (sent, received): (u64, u64)) {
        if let Some(core) = self.cores.get(usize::from(core.0)) {
            core.batches_sent.store(sent, Ordering::SeqCst);
            core.batches_received.store(received, Ordering::SeqCst);
        }
    }

    /// What a core says of itself. It takes `true` back before it receives a batch.
    pub fn set_quiet(&self, core: ShardIndex, quiet: bool) {
        if let Some(core) = self.cores.get(usize::from(core.0)) {
            core.quiet.store(quiet, Ordering::SeqCst);
        }
    }

    /// Whether every core is quiet and no batch is on its way; once true, always true.
    ///
    /// Read in this order: received, quiet, sent. Counts only rise and are told before `quiet`. If the sums are equal,
    /// nothing was on its way when the first was read; whoever has sent since would show in the second; so every core
    /// that was quiet has nothing that could end its quiet but its clients, who are refused by now.
    pub fn all_quiet(&self) -> bool {
        if self.finished.load(Ordering::SeqCst) {
            return true;
        }
        let received: u64 = self.cores.iter().map(|core| core.batches_received.load(Ordering::SeqCst)).sum();
        let quiet = self.cores.iter().all(|core| core.quiet.load(Ordering::SeqCst));
        let sent: u64 = self.cores.iter().map(|core| core.batches_sent.load(Ordering::SeqCst)).sum();
        let finished = quiet && received == sent;
        if finished {
            self.finished.store(true, Ordering::SeqCst);
        }
        finished
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_on_its_way_keeps_the_node_from_stopping() {
        let wakers = (0..2).map(|_| Arc::new(Waker::new().unwrap())).collect();
        let control = Control::new(wakers, Duration::from_secs(60));
        assert_eq!(control.phase(), Phase::Running);
        control.stop();
        assert_eq!(control.phase(), Phase::Stopping);
        assert!(!control.is_overdue());
        let (one, two) = (ShardIndex(0), ShardIndex(1));
        control.set_quiet(one, true);
        assert!(!control.all_quiet(), "the other is not");
        control.set_traffic(one, (3, 0));
        control.set_traffic(two, (0, 2));
        control.set_quiet(two, true);
        assert!(!control.all_quiet(), "one batch is between them");
        control.set_quiet(two, false);
        control.set_traffic(two, (0, 3));
        assert!(!control.all_quiet());
        control.set_quiet(two, true);
        assert!(control.all_quiet());
        control.set_quiet(two, false);
        assert!(control.all_quiet(), "a decision once made stands for all cores");
    }

    #[test]
    fn what_comes_before_a_stop_is_done_once_and_the_cores_stop_after_it() {
        let control = Control::new(vec![Arc::new(Waker::new().unwrap())], Duration::from_secs(60));
        let begun = Arc::new(AtomicU64::new(0));
        let count = begun.clone();
        control.before_stop(move || _ = count.fetch_add(1, Ordering::SeqCst));
        control.stop();
        assert_eq!((begun.load(Ordering::SeqCst), control.phase()), (1, Phase::Running));
        control.stop();
        assert_eq!((begun.load(Ordering::SeqCst), control.phase()), (1, Phase::Stopping));
    }

    #[test]
    fn a_stop_without_time_is_overdue_at_once() {
        let control = Control::new(vec![Arc::new(Waker::new().unwrap())], Duration::ZERO);
        assert!(!control.is_overdue(), "nobody asked it to stop");
        control.stop();
        assert!(control.is_overdue());
    }
}
