//! What the cores are told of the cluster while they run, and what they say back. A [`OrdersPort`] belongs to its core's
//! thread, the [`OrdersDesk`] to the side thread.
//!
//! Invariants: orders are whole and only the newest counts, so a core that misses some misses nothing; a core looks at one
//! number of its own a turn and takes a lock only when that has changed; what it has released is one number, which only
//! rises.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringline_cluster::ownership::Ownership;
use ringline_cluster::placement::{CorePlacement, ShardIndex};
use tokio::sync::Notify;

use crate::peers::roster::Roster;
use crate::wake::Waker;

/// The cluster, as a core is to see it.
#[derive(Clone, Debug)]
pub struct Orders {
    pub roster: Arc<Roster>,
    pub ownership: Arc<Ownership>,
}

/// What both sides hold of one core.
#[derive(Debug, Default)]
struct Line {
    /// Rises with every order.
    issued: AtomicU64,
    orders: Mutex<Option<Orders>>,
    /// The version of the ownership up to which it has given up what it was asked to.
    released: AtomicU64,
    /// Its store takes nothing any more.
    failed: AtomicBool,
}

/// One core's side.
#[derive(Debug)]
pub struct OrdersPort {
    line: Arc<Line>,
    seen: u64,
    bell: Arc<Notify>,
}

impl OrdersPort {
    /// Whether there is something to take. Look at it once a turn, and once more before a sleep.
    pub fn is_new(&self) -> bool {
        self.line.issued.load(Ordering::Acquire) != self.seen
    }

    /// The newest orders.
    pub fn take(&mut self) -> Option<Orders> {
        self.seen = self.line.issued.load(Ordering::Acquire);
        locked(&self.line.orders).clone()
    }

    /// Of what the ownership of that version, or an earlier one, asked to give up, nothing is in flight any more.
    pub fn release(&self, version: u64) {
        self.line.released.fetch_max(version, Ordering::AcqRel);
        self.bell.notify_one();
    }

    /// The store of this core takes nothing any more: what it owned was taken, or the database refuses. The node has to end.
    pub fn fail(&self) {
        self.line.failed.store(true, Ordering::Release);
        self.bell.notify_one();
    }
}

/// The side thread's side.
#[derive(Debug)]
pub struct OrdersDesk {
    lines: Vec<(Arc<Line>, Arc<Waker>)>,
    bell: Arc<Notify>,
}

/// A desk, and a port for each core, in order of their wakers. `bell` rings when a core has released something.
pub fn desk(wakers: &[Arc<Waker>], bell: &Arc<Notify>) -> (OrdersDesk, Vec<OrdersPort>) {
    let lines: Vec<_> = wakers.iter().map(|waker| (Arc::new(Line::default()), waker.clone())).collect();
    let port = |(line, _): &(Arc<Line>, _)| OrdersPort { line: line.clone(), seen: 0, bell: bell.clone() };
    let ports = lines.iter().map(port).collect();
    (OrdersDesk { lines, bell: bell.clone() }, ports)
}

impl OrdersDesk {
    /// Tells all cores, and wakes them.
    pub fn issue(&self, orders: &Orders) {
        for (line, waker) in &self.lines {
            *locked(&line.orders) = Some(orders.clone());
            line.issued.fetch_add(1, Ordering::Release);
            waker.wake();
        }
    }

    /// The version up to which a core of this node has given up what it was asked to.
    pub fn released(&self, core: ShardIndex) -> u64 {
        let line = self.lines.get(usize::from(core.within()));
        line.map_or(0, |(line, _)| line.released.load(Ordering::Acquire))
    }

    /// Whether the store of a core has failed.
    pub fn has_failed(&self) -> bool {
        self.lines.iter().any(|(line, _)| line.failed.load(Ordering::Acquire))
    }

    /// How the node's partitions spread over its cores.
    pub fn cores(&self) -> Option<CorePlacement> {
        CorePlacement::new(u16::try_from(self.lines.len()).ok()?)
    }

    /// Waits until a core has released something, or somebody else has rung.
    pub async fn called(&self) {
        self.bell.notified().await;
    }
}

/// Nobody panics while it holds one of these: what is in it is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_cluster::link::hello::Incarnation;
    use ringline_cluster::placement::NodeIndex;

    #[test]
    fn only_the_newest_orders_count_and_what_is_released_only_rises() {
        let bell = Arc::new(Notify::new());
        let wakers = [Arc::new(Waker::new().unwrap()), Arc::new(Waker::new().unwrap())];
        let (desk, mut ports) = desk(&wakers, &bell);
        let mut port = ports.remove(1);
        assert!(!port.is_new() && desk.cores().is_some_and(|cores| cores.shards() == 2));
        let list = vec![(NodeIndex(0), "a".to_owned(), std::net::SocketAddr::from(([127, 0, 0, 1], 1)))];
        let roster = Arc::new(Roster::numbered(("x", "a"), list, (Incarnation(1), 2), None).unwrap());
        for version in [4, 5] {
            desk.issue(&Orders { roster: roster.clone(), ownership: Arc::new(Ownership::new(version)) });
        }
        assert!(port.is_new());
        assert_eq!(port.take().map(|orders| orders.ownership.version), Some(5));
        assert!(!port.is_new());
        let core = |within| ShardIndex::new(NodeIndex(0), within);
        port.release(5);
        port.release(4);
        assert_eq!([0, 1, 2].map(|within| desk.released(core(within))), [0, 5, 0]);
        assert!(!desk.has_failed());
        port.fail();
        assert!(desk.has_failed());
    }
}
