//! Lanes: a round trip between two threads that poll, and the same while both sleep in between; items a second in
//! batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringline::lanes::{LaneEnd, LaneItem, mesh};
use ringline::wake::Waker;
use ringline_cluster::placement::ShardIndex;
use ringline_core::event::ShardMessage;
use ringline_schema::ids::{ConversationId, UserName};
use rustix::event::{PollFd, PollFlags, poll};

const NEAR: ShardIndex = ShardIndex(0);
const FAR: ShardIndex = ShardIndex(1);

fn item() -> LaneItem {
    let user = UserName::new("ann").unwrap();
    LaneItem::Core(ShardMessage::UserKnown { conversation: ConversationId(1), user, known: Ok(()) })
}

/// Takes what is there; sleeps first if asked to and nothing is. Returns the number of items.
fn take(end: &mut LaneEnd, waker: &Waker, sleeps: bool) -> usize {
    let mut count = 0;
    end.receive(|_, _| count += 1);
    if count == 0 && sleeps {
        waker.about_to_sleep();
        if end.is_empty() {
            let bell = waker.bell();
            let mut fds = [PollFd::new(&bell, PollFlags::IN)];
            let _ = poll(&mut fds, None);
            let _ = rustix::io::read(waker.bell(), &mut [0; 8]);
        }
        waker.awake();
    } else if count == 0 {
        // Two busy threads may share one core.
        std::thread::yield_now();
    }
    count
}

/// Two ends, of which the far one sends back one item for each batch, until the flag is set.
struct Echo {
    near: LaneEnd,
    wakers: Vec<Arc<Waker>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(sleeps: bool) -> Self {
        let (wakers, mut ends) = mesh(2).unwrap();
        let (mut far, near) = (ends.pop().unwrap(), ends.pop().unwrap());
        let ended = Arc::new(AtomicBool::new(false));
        let (far_waker, far_ended) = (wakers[1].clone(), ended.clone());
        let run = move || {
            while !far_ended.load(Ordering::Relaxed) {
                if take(&mut far, &far_waker, sleeps) > 0 {
                    far.push(NEAR, item());
                    far.flush(|_, _| ());
                }
            }
        };
        Self { near, wakers, ended, thread: Some(std::thread::spawn(run)) }
    }

    fn round_trip(&mut self, items: usize, sleeps: bool) {
        for _ in 0..items {
            self.near.push(FAR, item());
        }
        self.near.flush(|_, _| ());
        while take(&mut self.near, &self.wakers[0], sleeps) == 0 {}
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.near.push(FAR, item());
        self.near.flush(|_, _| ());
        self.thread.take().map(JoinHandle::join);
    }
}

fn lanes(criterion: &mut Criterion) {
    for (name, sleeps) in [("polling", false), ("sleeping", true)] {
        let mut echo = Echo::start(sleeps);
        let mut group = criterion.benchmark_group("lane round trip");
        for items in [1, 64, 1_024] {
            group.throughput(Throughput::Elements(items as u64));
            group.bench_function(format!("{name}, batches of {items}"), |bencher| {
                bencher.iter(|| echo.round_trip(items, sleeps));
            });
        }
    }
}

criterion_group!(benches, lanes);
criterion_main!(benches);
