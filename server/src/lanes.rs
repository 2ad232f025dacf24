//! Lanes: the only way from one core to another. One bounded channel per (from, to), carrying batches.
//!
//! Each [`LaneEnd`] belongs to its core's thread. Invariants: order is kept per (from, to); nothing is ever dropped; a
//! core is rung at most once a flush and only if it sleeps. When a lane is full its batch stays with the sender, who
//! takes no new work for that core until it drains: memory is bounded by what is already in flight.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use ringline_cluster::placement::ShardIndex;
use ringline_core::event::ShardMessage;

use crate::peers::PeerLane;
use crate::wake::Waker;

/// Batches that wait in one lane; one more stays with the sender and blocks the lane.
pub const LANE_BATCHES_MAX: usize = 64;
/// Batches taken from one lane in one turn.
const BATCHES_PER_TURN_MAX: usize = 8;
/// Emptied batches a core keeps for reuse.
const SPARE_BATCHES_MAX: usize = 64;
/// A batch with room for more items than this is not kept.
const SPARE_BATCH_ITEMS_MAX: usize = 1_024;

/// What travels between cores.
#[derive(Debug)]
pub enum LaneItem {
    Core(ShardMessage),
    HandOver(HandOver),
    /// What concerns the links to other nodes.
    Peer(PeerLane),
}

/// A connection on its way to the core that owns its user.
#[derive(Debug)]
pub struct HandOver {
    pub socket: OwnedFd,
    /// The frame that caused it and everything that was read behind it.
    pub bytes: Vec<u8>,
}

type Batch = Vec<LaneItem>;

/// The sending side of one lane.
#[derive(Debug)]
struct Out {
    sender: Sender<Batch>,
    /// What the next flush sends.
    pending: Batch,
    blocked: bool,
    waker: Arc<Waker>,
}

/// One core's end of all its lanes.
#[derive(Debug)]
pub struct LaneEnd {
    out: Vec<Option<Out>>,
    inbound: Vec<Option<Receiver<Batch>>>,
    /// Lanes with something pending.
    touched: Vec<ShardIndex>,
    spare: Vec<Batch>,
    sent: u64,
    received: u64,
}

/// The wakers of all cores, and their lane ends, in order of shard.
///
/// Errors: those of [`Waker::new`].
pub fn mesh(shards: u16) -> io::Result<(Vec<Arc<Waker>>, Vec<LaneEnd>)> {
    let wakers = (0..shards).map(|_| Waker::new().map(Arc::new)).collect::<io::Result<Vec<_>>>()?;
    let mut ends: Vec<LaneEnd> = (0..shards).map(|_| LaneEnd::empty(usize::from(shards))).collect();
    for from in 0..usize::from(shards) {
        for (to, waker) in wakers.iter().enumerate().filter(|(to, _)| *to != from) {
            let (sender, receiver) = bounded(LANE_BATCHES_MAX);
            ends[from].out[to] = Some(Out { sender, pending: Vec::new(), blocked: false, waker: waker.clone() });
            ends[to].inbound[from] = Some(receiver);
        }
    }
    Ok((wakers, ends))
}

impl LaneEnd {
    fn empty(shards: usize) -> Self {
        Self {
            out: (0..shards).map(|_| None).collect(),
            inbound: (0..shards).map(|_| None).collect(),
            touched: Vec::new(),
            spare: Vec::new(),
            sent: 0,
            received: 0,
        }
    }

    /// Queues an item for the next flush.
    pub fn push(&mut self, to: ShardIndex, item: LaneItem) {
        let Some(out) = self.out.get_mut(usize::from(to.0)).and_then(Option::as_mut) else {
            debug_assert!(false, "no lane to shard {}", to.0);
            return;
        };
        if out.pending.is_empty() {
            self.touched.push(to);
            if out.pending.capacity() == 0 {
                out.pending = self.spare.pop().unwrap_or_default();
            }
        }
        out.pending.push(item);
    }

    /// Sends one batch on every lane that has something, ringing who sleeps. `changed` hears of every lane that
    /// became blocked (true) or free (false).
    pub fn flush(&mut self, mut changed: impl FnMut(ShardIndex, bool)) {
        let Self { touched, out, sent, .. } = self;
        touched.retain(|&to| {
            let Some(out) = out.get_mut(usize::from(to.0)).and_then(Option::as_mut) else { return false };
            let full = match out.sender.try_send(std::mem::take(&mut out.pending)) {
                Ok(()) => {
                    *sent += 1;
                    out.waker.wake();
                    false
                }
                Err(TrySendError::Full(batch)) => {
                    out.pending = batch;
                    true
                }
                // The other core has ended; so will this one. What was for it can't be said any more.
                Err(TrySendError::Disconnected(_)) => false,
            };
            if full != out.blocked {
                out.blocked = full;
                changed(to, full);
            }
            full
        });
    }

    /// Hands over what other cores sent, a bounded part of it. True if there was any.
    pub fn receive(&mut self, mut take: impl FnMut(ShardIndex, LaneItem)) -> bool {
        let received_before = self.received;
        for (from, receiver) in self.inbound.iter().enumerate() {
            let Some(receiver) = receiver else { continue };
            for _ in 0..BATCHES_PER_TURN_MAX {
                let mut batch = match receiver.try_recv() {
                    Ok(batch) => batch,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                };
                self.received += 1;
                for item in batch.drain(..) {
                    take(ShardIndex(from as u16), item);
                }
                if self.spare.len() < SPARE_BATCHES_MAX && batch.capacity() <= SPARE_BATCH_ITEMS_MAX {
                    self.spare.push(batch);
                }
            }
        }
        self.received != received_before
    }

    /// Whether nothing waits to be received.
    pub fn is_empty(&self) -> bool {
        self.inbound.iter().flatten().all(Receiver::is_empty)
    }

    /// Whether something waits to be sent because a lane is full.
    pub fn is_blocked(&self) -> bool {
        !self.touched.is_empty()
    }

    /// Batches sent and received since the start.
    pub fn traffic(&self) -> (u64, u64) {
        (self.sent, self.received)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use ringline_schema::ids::{ConversationId, UserName};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    /// A message that carries a number.
    fn item(number: u32) -> LaneItem {
        let conversation = ConversationId(u128::from(number));
        LaneItem::Core(ShardMessage::UserKnown { conversation, user: UserName::new("ann").unwrap(), known: Ok(()) })
    }

    fn number(item: &LaneItem) -> u32 {
        match item {
            LaneItem::Core(ShardMessage::UserKnown { conversation, .. }) => conversation.0 as u32,
            other => panic!("not ours: {other:?}"),
        }
    }

    fn drain(end: &mut LaneEnd) -> Vec<(u16, u32)> {
        let mut got = Vec::new();
        end.receive(|from, item| got.push((from.0, number(&item))));
        got
    }

    #[test]
    fn items_arrive_in_order_from_each_sender() {
        let (_, mut ends) = mesh(3).unwrap();
        for at in 0..5 {
            ends[0].push(ShardIndex(2), item(at));
            ends[1].push(ShardIndex(2), item(100 + at));
        }
        assert!(drain(&mut ends[2]).is_empty(), "nothing before the flush");
        ends[0].flush(|_, _| panic!("no lane is full"));
        ends[1].flush(|_, _| panic!("no lane is full"));
        let got = drain(&mut ends[2]);
        let of = |from| got.iter().filter(|(f, _)| *f == from).map(|(_, n)| *n).collect::<Vec<_>>();
        assert_eq!(of(0), [0, 1, 2, 3, 4]);
        assert_eq!(of(1), [100, 101, 102, 103, 104]);
        assert_eq!((ends[0].traffic(), ends[2].traffic()), ((1, 0), (0, 2)));
    }

    #[test]
    fn a_full_lane_keeps_its_batch_says_so_and_frees_itself() {
        let (_, mut ends) = mesh(2).unwrap();
        let mut changes = Vec::new();
        for at in 0..LANE_BATCHES_MAX as u32 + 3 {
            ends[0].push(ShardIndex(1), item(at));
            ends[0].flush(|to, blocked| changes.push((to.0, blocked)));
        }
        assert_eq!(changes, [(1, true)], "told once");
        assert!(ends[0].is_blocked());
        let mut got = Vec::new();
        while !ends[1].is_empty() || ends[0].is_blocked() {
            got.extend(drain(&mut ends[1]).into_iter().map(|(_, n)| n));
            ends[0].flush(|to, blocked| changes.push((to.0, blocked)));
        }
        assert_eq!(got, (0..LANE_BATCHES_MAX as u32 + 3).collect::<Vec<_>>());
        assert_eq!(changes, [(1, true), (1, false)]);
    }

    /// Sleeps until the bell rings. False when it did not within ten seconds.
    fn sleep_on(waker: &Waker) -> bool {
        let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
        let bell = waker.bell();
        let mut fds = [PollFd::new(&bell, PollFlags::IN)];
        let rang = poll(&mut fds, Some(&timeout)).unwrap() == 1;
        let mut count = [0; 8];
        // The bell is level-triggered here, so this test must read it.
        let _ = rustix::io::read(waker.bell(), &mut count);
        rang
    }

    #[test]
    fn two_threads_that_sleep_whenever_they_can_never_lose_a_wake() {
        const ROUNDS: u32 = 20_000;
        let (wakers, mut ends) = mesh(2).unwrap();
        let (mut far, mut near) = (ends.pop().unwrap(), ends.pop().unwrap());
        let far_waker = wakers[1].clone();
        let lost = Arc::new(AtomicBool::new(false));
        let lost_far = lost.clone();
        let wait = |end: &mut LaneEnd, waker: &Waker, lost: &AtomicBool| -> Option<u32> {
            let started = Instant::now();
            loop {
                if let Some((_, number)) = drain(end).first() {
                    return Some(*number);
                }
                waker.about_to_sleep();
                if end.is_empty() && !sleep_on(waker) {
                    lost.store(true, Ordering::Relaxed);
                }
                waker.awake();
                if lost.load(Ordering::Relaxed) || started.elapsed() > Duration::from_secs(60) {
                    return None;
                }
            }
        };
        let echo = std::thread::spawn(move || {
            for _ in 0..ROUNDS {
                let Some(number) = wait(&mut far, &far_waker, &lost_far) else { return };
                far.push(ShardIndex(0), item(number + 1));
                far.flush(|_, _| ());
            }
        });
        for round in 0..ROUNDS {
            near.push(ShardIndex(1), item(round));
            near.flush(|_, _| ());
            assert_eq!(wait(&mut near, &wakers[0], &lost), Some(round + 1), "a wake was lost in round {round}");
        }
        echo.join().unwrap();
    }
}
