//! How long an item takes from one core to another over a lane, one way, and what waking costs the sender: the target
//! asleep or busy, woken by eventfd (as the server does) or by `IORING_OP_MSG_RING` from the sender's ring (a prototype).
//!
//! Two threads, pinned to the first two cores that there are. The target sleeps in its own io_uring, as a core of the
//! server does. Prints microseconds; `cargo bench -p ringline --bench lane_hop`.

#![allow(unsafe_code, reason = "pushing ring entries is unsafe; each block has its proof")]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering, fence};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use ringline::lanes::{LaneEnd, LaneItem, mesh};
use ringline::wake::Waker;
use ringline_cluster::placement::ShardIndex;
use ringline_core::event::ShardMessage;
use ringline_schema::ids::{ConversationId, UserName};

const SAMPLES: usize = 20_000;
/// Between two items: long enough for an idle target to fall asleep.
const PAUSE: Duration = Duration::from_micros(100);
/// One turn of a busy target.
const TURN: Duration = Duration::from_micros(20);
/// Carried by every item; its copy allocates nothing.
static USER: LazyLock<UserName> = LazyLock::new(|| UserName::new("ann").expect("a name"));
/// Tells the target to end.
const LAST: u128 = u128::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Eventfd,
    MsgRing,
}

/// What both sides share beside the lane.
struct Shared {
    epoch: Instant,
    waker: Arc<Waker>,
    /// The sleep flag of the MSG_RING variant, by the protocol of `Waker`.
    sleeping: AtomicBool,
    /// The target's ring; 0 until it exists.
    ring: AtomicI32,
}

impl Shared {
    fn now_ns(&self) -> u128 {
        self.epoch.elapsed().as_nanos()
    }
}

fn make_ring() -> IoUring {
    IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(64).expect("Linux 6.1 or newer")
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) {
    // SAFETY: only polls and ring messages are pushed here: they carry no pointer, and the descriptors they name (the
    // bell of a waker that `Shared` holds, the target's ring) stay open until both threads have ended.
    unsafe { ring.submission().push(entry).expect("room for one entry") };
}

/// As they are before any thread is pinned: afterwards a thread sees its own alone.
static CORES: LazyLock<Vec<CoreId>> = LazyLock::new(|| core_affinity::get_core_ids().expect("cores"));

fn pin(core: usize) {
    assert!(CORES.len() > core, "two cores are needed");
    core_affinity::set_for_current(CORES[core]);
}

fn spin(length: Duration) {
    let started = Instant::now();
    while started.elapsed() < length {
        std::hint::spin_loop();
    }
}

/// The target: notes how old each item is.
fn target(mut end: LaneEnd, shared: &Shared, (wake, busy): (Wake, bool)) -> Vec<u64> {
    pin(1);
    let mut ring = make_ring();
    if wake == Wake::Eventfd {
        let bell = Fd(shared.waker.bell().as_raw_fd());
        push(&mut ring, &opcode::PollAdd::new(bell, libc::POLLIN as u32).multi(true).build());
        ring.submit().expect("armed");
    }
    shared.ring.store(ring.as_raw_fd(), Ordering::Release);
    let mut ages = Vec::with_capacity(SAMPLES);
    let mut ended = false;
    while !ended {
        let before = ages.len();
        end.receive(|_, item| match item {
            LaneItem::Core(ShardMessage::UserKnown { conversation: ConversationId(LAST), .. }) => ended = true,
            LaneItem::Core(ShardMessage::UserKnown { conversation, .. }) => {
                ages.push((shared.now_ns() - conversation.0) as u64);
            }
            other => panic!("not ours: {other:?}"),
        });
        if busy {
            spin(TURN);
        } else if ages.len() == before && !ended {
            sleep(&mut ring, &end, shared, wake);
        }
    }
    ages
}

fn sleep(ring: &mut IoUring, end: &LaneEnd, shared: &Shared, wake: Wake) {
    match wake {
        Wake::Eventfd => shared.waker.about_to_sleep(),
        Wake::MsgRing => {
            shared.sleeping.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
    }
    if end.is_empty() {
        ring.submit_and_wait(1).expect("a wake");
        ring.completion().for_each(drop);
    }
    shared.waker.awake();
    shared.sleeping.store(false, Ordering::Relaxed);
}

/// Rings the target from ring to ring if it sleeps.
fn ring_by_message(ring: &mut IoUring, target: RawFd, shared: &Shared) {
    fence(Ordering::SeqCst);
    if shared.sleeping.load(Ordering::Relaxed) && shared.sleeping.swap(false, Ordering::AcqRel) {
        push(ring, &opcode::MsgRingData::new(Fd(target), 0, 1, None).build());
        ring.submit().expect("sent");
        ring.completion().for_each(drop);
    }
}

fn item(number: u128) -> LaneItem {
    let user = USER.clone();
    LaneItem::Core(ShardMessage::UserKnown { conversation: ConversationId(number), user, known: Ok(()) })
}

/// The ages of the items on arrival, and what each flush took, in nanoseconds.
fn measure(wake: Wake, busy: bool) -> (Vec<u64>, Vec<u64>) {
    let (wakers, mut ends) = mesh(2).expect("a mesh");
    let (far, mut near) = (ends.remove(1), ends.remove(0));
    let shared = Shared {
        epoch: Instant::now(),
        waker: wakers[1].clone(),
        sleeping: AtomicBool::new(false),
        ring: AtomicI32::new(0),
    };
    pin(0);
    let mut ring = make_ring();
    std::thread::scope(|scope| {
        let target = scope.spawn(|| target(far, &shared, (wake, busy)));
        while shared.ring.load(Ordering::Acquire) == 0 {
            std::hint::spin_loop();
        }
        let fd = shared.ring.load(Ordering::Relaxed);
        let mut costs = Vec::with_capacity(SAMPLES);
        let mut send = |number: Option<u128>| {
            let sent_ns = shared.now_ns();
            near.push(ShardIndex(1), item(number.unwrap_or(sent_ns)));
            near.flush(|_, _| ());
            if wake == Wake::MsgRing {
                ring_by_message(&mut ring, fd, &shared);
            }
            costs.push((shared.now_ns() - sent_ns) as u64);
        };
        for at in 0..SAMPLES {
            send(None);
            // Not in step with the target's turns.
            spin(PAUSE + Duration::from_nanos((at as u64 * 7_919) % 20_000));
        }
        send(Some(LAST));
        (target.join().expect("the target"), costs)
    })
}

fn percentile(sorted: &[u64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize] as f64 / 1_000.0
}

fn main() {
    // `cargo test --benches` only wants to know that it builds.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!(
        "{:10} {:10} {:>9} {:>9} {:>12} {:>12}",
        "wake", "target", "hop p50", "hop p99", "sender p50", "sender p99"
    );
    for busy in [false, true] {
        for wake in [Wake::Eventfd, Wake::MsgRing, Wake::Eventfd, Wake::MsgRing] {
            let (mut ages, mut costs) = measure(wake, busy);
            assert_eq!(ages.len(), SAMPLES, "every item arrived");
            ages.sort_unstable();
            costs.sort_unstable();
            let target = if busy { "busy" } else { "asleep" };
            let [hop, cost] = [&ages, &costs].map(|all| (percentile(all, 0.5), percentile(all, 0.99)));
            println!(
                "{:10} {target:10} {:9.2} {:9.2} {:12.2} {:12.2}",
                format!("{wake:?}"),
                hop.0,
                hop.1,
                cost.0,
                cost.1
            );
        }
    }
}
