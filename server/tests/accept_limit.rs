//! Accepting when the process has no descriptor left: it pauses, and goes on when there are some again. Alone in this
//! binary, because the limit is the process's.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringline::net::epoll::EpollNet;
use ringline::net::ring::RingNet;
use ringline::net::{Admission, Flow, Net, NetEvent, NetOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const CLIENTS: usize = 5;
const DESCRIPTORS: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(30);

/// Polls at this time of the net's own clock until it is so.
fn until(net: &mut dyn Net, now_us: u64, so: fn(&dyn Net, usize) -> bool) {
    let (started, mut accepted) = (Instant::now(), 0);
    loop {
        net.poll(now_us, &mut |event| {
            accepted += usize::from(matches!(event, NetEvent::Accepted { .. }));
            Flow::Continue
        });
        if so(net, accepted) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "it does not come to it: {:?}", net.counters());
        net.wait(Duration::from_millis(5));
    }
}

fn pauses_and_goes_on(make: fn(NetOptions) -> Box<dyn Net>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let admission = Arc::new(Admission::new(100));
    let mut net = make(NetOptions { listener: OwnedFd::from(listener), admission, refusal: Vec::new() });
    // They are connected when they wait in the backlog.
    let _clients: Vec<_> = (0..CLIENTS).map(|_| TcpStream::connect(address).unwrap()).collect();
    let taken: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    until(net.as_mut(), 0, |net, _| net.counters().accept_pauses > 0);
    let pauses = net.counters().accept_pauses;
    for _ in 0..20 {
        net.wait(Duration::from_millis(1));
        net.poll(1_000, &mut |event| panic!("{event:?} during the pause"));
    }
    assert_eq!(net.counters().accept_pauses, pauses, "it does not try again before its time");
    drop(taken);
    until(net.as_mut(), 1_000_000, |_, accepted| accepted == CLIENTS);
}

#[test]
fn accepting_pauses_without_descriptors_and_goes_on() {
    // First, because an armed accept keeps the limit of the moment when it was armed.
    let usual = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(DESCRIPTORS), maximum: usual.maximum }).unwrap();
    pauses_and_goes_on(|options| Box::new(RingNet::new(options).unwrap()));
    pauses_and_goes_on(|options| Box::new(EpollNet::new(options).unwrap()));
}
