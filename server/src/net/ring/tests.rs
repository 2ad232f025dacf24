//! The ring passes what every net has to pass, makes a store's writes, and meets every kind of completion: the tests at
//! the end look at what the kernel said, to be sure that the case occurred.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use ringline_schema::ids::UserName;
use ringline_schema::record::{Record, User};
use ringline_store::embedded::{EmbeddedOptions, EmbeddedShard, EmbeddedStore};
use ringline_store::{Lsn, Store, StoreEvent};

use super::*;
use crate::net::conformance::{Bench, listener, run_all};

#[test]
fn conforms() {
    run_all(|connections_max, refusal| {
        let (listener, address) = listener();
        let admission = Arc::new(Admission::new(connections_max));
        let options = NetOptions { listener, admission: admission.clone(), refusal: refusal.to_vec() };
        Bench { net: Box::new(RingNet::new(options).unwrap()), address, admission }
    });
}

fn net() -> RingNet {
    let (listener, _) = listener();
    RingNet::new(NetOptions { listener, admission: Arc::new(Admission::new(8)), refusal: Vec::new() }).unwrap()
}

fn store(folder: &std::path::Path) -> EmbeddedShard {
    let (mut shards, _) = EmbeddedStore::open(folder, 1, EmbeddedOptions::default()).unwrap();
    shards.pop().unwrap()
}

fn user(number: u64) -> Record {
    let name = UserName::new(&format!("user{number}")).unwrap();
    Record::User(User { name, password_hash: None, created_ms: number })
}

/// Gives the net what the store wants written.
fn hand_over(net: &mut RingNet, store: &mut EmbeddedShard) {
    store.submit();
    if let Some(write) = store.take_write() {
        net.write_file(write).unwrap();
        assert!(net.is_writing_file() && store.take_write().is_none());
    }
}

/// Polls the net until its file write is back with the store.
fn bring_back(net: &mut RingNet, store: &mut EmbeddedShard) {
    let started = Instant::now();
    while net.is_writing_file() {
        net.wait(Duration::from_millis(5));
        net.poll(0, &mut |event| {
            if let NetEvent::FileWritten { write, result } = event {
                store.written(write, result);
            }
            Flow::Continue
        });
        assert!(started.elapsed() < Duration::from_secs(30), "the write does not come back");
    }
}

#[test]
fn a_store_writes_its_log_on_the_ring() {
    let folder = tempfile::tempdir().unwrap();
    let (mut net, mut store) = (net(), store(folder.path()));
    store.lend_writes();
    let mut events = Vec::new();
    for number in 1..=100 {
        assert_eq!(store.append(&user(number)).unwrap(), Lsn(number));
        hand_over(&mut net, &mut store);
        store.poll(&mut events);
        assert!(!events.contains(&StoreEvent::Committed(Lsn(number))), "nothing is durable before its completion");
        bring_back(&mut net, &mut store);
        store.poll(&mut events);
        assert_eq!(events.last(), Some(&StoreEvent::Committed(Lsn(number))));
    }
    // What is queued, but in nobody's hands yet, is made durable by the end.
    store.append(&user(101)).unwrap();
    store.submit();
    store.close().unwrap();
    store.poll(&mut events);
    assert_eq!(events.last(), Some(&StoreEvent::Committed(Lsn(101))));
}

#[test]
fn a_ring_that_goes_waits_for_its_file_write() {
    let folder = tempfile::tempdir().unwrap();
    let (mut net, mut store) = (net(), store(folder.path()));
    store.lend_writes();
    store.append(&user(1)).unwrap();
    hand_over(&mut net, &mut store);
    drop(net);
    // The write is lost to the store, which must not say that it is durable.
    assert!(store.close().is_err());
    let mut events = Vec::new();
    store.poll(&mut events);
    assert_eq!(events, [StoreEvent::Failed]);
}

const PATIENCE: Duration = Duration::from_secs(30);

/// What was said of a connection.
#[derive(Debug, Default)]
struct Said {
    bytes: Vec<u8>,
    sent: Vec<(usize, bool)>,
    closed: Option<CloseCause>,
}

/// A small ring, its address, and what it and the kernel said.
struct Scene {
    net: RingNet,
    address: SocketAddr,
    flow: Flow,
    accepted: Vec<ConnId>,
    said: BTreeMap<(u32, u32), Said>,
    detached: Vec<OwnedFd>,
    /// Operation, result, and whether more was to follow.
    completions: Vec<(Op, i32, bool)>,
    overflowed: bool,
}

impl Scene {
    fn new(sizes: Sizes) -> Self {
        let (listener, address) = listener();
        let options = NetOptions { listener, admission: Arc::new(Admission::new(1_000)), refusal: Vec::new() };
        Self {
            net: RingNet::with_sizes(options, sizes).unwrap(),
            address,
            flow: Flow::Continue,
            accepted: Vec::new(),
            said: BTreeMap::new(),
            detached: Vec::new(),
            completions: Vec::new(),
            overflowed: false,
        }
    }

    fn usual() -> Self {
        Self::new(Sizes { submissions: 64, completions: 256, buffers: 64 })
    }

    /// Sleeps for at most `sleep`, then polls once.
    fn turn(&mut self, sleep: Duration) {
        self.net.wait(sleep);
        if let Some(ring) = &mut self.net.ring {
            self.overflowed |= ring.submission().cq_overflow();
        }
        let Self { net, flow, accepted, said, detached, .. } = self;
        net.poll(0, &mut |event| {
            match event {
                NetEvent::Accepted { conn } => accepted.push(conn),
                NetEvent::Received { conn, bytes } => {
                    said.entry((conn.slot, conn.generation)).or_default().bytes.extend_from_slice(bytes);
                    return *flow;
                }
                NetEvent::Sent { conn, bytes, buffer } => {
                    let said = said.entry((conn.slot, conn.generation)).or_default();
                    said.sent.push((bytes, buffer.is_some()));
                }
                NetEvent::Detached { socket, .. } => detached.push(socket),
                NetEvent::Closed { conn, cause } => {
                    said.entry((conn.slot, conn.generation)).or_default().closed = Some(cause);
                }
                NetEvent::FileWritten { .. } => panic!("nothing was written"),
            }
            Flow::Continue
        });
        let told = self.net.reaped.iter();
        self.completions
            .extend(told.map(|&(data, result, flags)| (Op::of(data).unwrap(), result, cqueue::more(flags))));
    }

    /// Turns until it is so. A sleep that nothing ends is as long as the patience, so a lost wake fails.
    fn until(&mut self, mut so: impl FnMut(&mut Self) -> bool) {
        let started = Instant::now();
        while !so(self) {
            self.turn(PATIENCE);
            assert!(started.elapsed() < PATIENCE, "it does not come to it: {:?}", self.completions.last());
        }
    }

    fn accept(&mut self) -> (TcpStream, ConnId) {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let before = self.accepted.len();
        self.until(|scene| scene.accepted.len() > before);
        (stream, *self.accepted.last().unwrap())
    }

    fn said(&mut self, conn: ConnId) -> &mut Said {
        self.said.entry((conn.slot, conn.generation)).or_default()
    }

    fn saw(&self, op: Op, errno: i32) -> bool {
        self.completions.iter().any(|&(seen, result, _)| seen == op && result == -errno)
    }
}

/// Ends a client's connection by a reset.
fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251 + seed) as u8).collect()
}

/// Every client writes, all at once; all of it arrives, in order.
fn all_arrives(scene: &mut Scene, clients: usize, length: usize) {
    let mut streams: Vec<_> = (0..clients).map(|_| scene.accept()).collect();
    for (at, (stream, _)) in streams.iter_mut().enumerate() {
        stream.write_all(&pattern(length, at)).unwrap();
    }
    for (at, (_, conn)) in streams.iter().enumerate() {
        scene.until(|scene| scene.said(*conn).bytes.len() >= length);
        assert!(scene.said(*conn).bytes == pattern(length, at), "in order and whole");
    }
}

#[test]
fn more_bytes_than_buffers_arrive_in_order() {
    let mut scene = Scene::new(Sizes { submissions: 64, completions: 256, buffers: 4 });
    all_arrives(&mut scene, 3, 100_000);
    assert!(scene.saw(Op::Receive, libc::ENOBUFS), "the buffers ran out");
}

#[test]
fn completions_that_find_no_place_are_not_lost_and_ended_receives_are_armed_again() {
    let mut scene = Scene::new(Sizes { submissions: 4, completions: 8, buffers: 256 });
    all_arrives(&mut scene, 64, 20_000);
    assert!(scene.overflowed, "the queue ran over");
    let ended = |&(op, result, more): &(Op, i32, bool)| op == Op::Receive && result > 0 && !more;
    assert!(scene.completions.iter().any(ended), "a receive with bytes was its last");
}

#[test]
fn the_rest_of_a_short_send_follows() {
    let mut scene = Scene::usual();
    let (mut client, conn) = scene.accept();
    // The kernel has said that it took five bytes.
    let buffer = pattern(5_000, 0);
    scene.net.tenant(conn).unwrap().outgoing = Some(Outgoing { buffer: buffer.clone(), done: 0 });
    let mut told = Vec::new();
    scene.net.on_sent(conn, 5, &mut |event| {
        if let NetEvent::Sent { bytes, buffer, .. } = event {
            told.push((bytes, buffer.is_some()));
        }
        Flow::Continue
    });
    assert_eq!(told, [(5, false)]);
    scene.until(|scene| scene.said(conn).sent.last().is_some_and(|last| last.1));
    assert_eq!(scene.said(conn).sent.iter().map(|sent| sent.0).sum::<usize>(), 4_995);
    let mut got = vec![0; 4_995];
    client.read_exact(&mut got).unwrap();
    assert!(got == buffer[5..], "what was taken is not sent again");
}

#[test]
fn a_slow_reader_with_a_small_buffer_gets_all_of_it() {
    let mut scene = Scene::usual();
    let (mut client, conn) = scene.accept();
    let buffer = pattern(2_000_000, 3);
    let tenant = scene.net.tenant(conn).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&tenant.socket, 4_096).unwrap();
    let _ = scene.net.send(conn, buffer.clone());
    let reader = std::thread::spawn(move || {
        let (mut got, mut part) = (Vec::new(), [0; 10_000]);
        while got.len() < 2_000_000 {
            let count = client.read(&mut part).unwrap();
            assert!(count > 0, "the stream ended early");
            got.extend_from_slice(&part[..count]);
        }
        (got, client)
    });
    scene.until(|scene| scene.said(conn).sent.last().is_some_and(|last| last.1));
    assert_eq!(scene.said(conn).sent.iter().map(|sent| sent.0).sum::<usize>(), 2_000_000);
    assert!(reader.join().unwrap().0 == buffer, "in order and whole");
}

#[test]
fn a_reset_ends_a_connection_that_is_read() {
    let mut scene = Scene::usual();
    let (client, conn) = scene.accept();
    reset(client);
    scene.until(|scene| scene.said(conn).closed.is_some());
    assert_eq!(scene.said(conn).closed, Some(CloseCause::Error(io::ErrorKind::ConnectionReset)));
    assert_eq!((scene.net.connections(), scene.net.admission.count()), (0, 0));
    assert!(scene.net.slots[conn.slot as usize].tenant.is_none(), "its place is free");
}

#[test]
fn a_send_to_a_reset_socket_ends_a_connection_that_is_not_read() {
    let mut scene = Scene::usual();
    let (mut client, conn) = scene.accept();
    client.write_all(b"x").unwrap();
    scene.flow = Flow::Stop;
    scene.until(|scene| scene.net.tenant(conn).is_some_and(|tenant| !tenant.receiving));
    assert!(scene.saw(Op::Receive, libc::ECANCELED), "reading was called off");
    reset(client);
    assert!(scene.said(conn).closed.is_none(), "nobody reads, so nobody knows");
    let _ = scene.net.send(conn, pattern(10, 0));
    scene.until(|scene| scene.said(conn).closed.is_some());
    let closed = scene.said(conn).closed;
    let expected =
        [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe].map(|kind| Some(CloseCause::Error(kind)));
    assert!(expected.contains(&closed), "{closed:?}");
    assert!(scene.saw(Op::Send, libc::EPIPE) || scene.saw(Op::Send, libc::ECONNRESET));
}

#[test]
fn a_receive_called_off_by_a_detach_gives_the_socket() {
    let mut scene = Scene::usual();
    let (mut client, conn) = scene.accept();
    scene.turn(Duration::ZERO);
    assert!(scene.net.detach(conn).is_none(), "its receive is armed");
    scene.until(|scene| !scene.detached.is_empty());
    assert!(scene.saw(Op::Receive, libc::ECANCELED));
    assert!(scene.said(conn).closed.is_none());
    client.write_all(b"still there").unwrap();
    let mut got = [0; 11];
    let mut socket = TcpStream::from(scene.detached.pop().unwrap());
    socket.set_nonblocking(false).unwrap();
    socket.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still there");
}

#[test]
fn an_accept_that_is_shut_down_is_not_armed_again() {
    let mut scene = Scene::usual();
    let (_client, _) = scene.accept();
    scene.net.stop_accepting();
    for _ in 0..20 {
        scene.turn(Duration::from_millis(5));
    }
    let ended = scene.completions.iter().filter(|told| told.0 == Op::Accept && told.1 < 0).count();
    assert_eq!(ended, 1, "{:?}", scene.completions);
    assert!(TcpStream::connect(scene.address).is_err());
}

#[test]
fn what_the_kernel_has_no_room_for_is_done_later_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (listener, address) = listener();
    let options = NetOptions { listener, admission: Arc::new(Admission::new(8)), refusal: Vec::new() };
    let (mut net, mut store) = (RingNet::new(options).unwrap(), store(folder.path()));
    store.lend_writes();
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"question").unwrap();
    // Each entry is refused before and behind the call that makes room: the receive, the answer, the file write.
    net.refusals = 2;
    let (mut conn, mut heard, started) = (None, Vec::new(), Instant::now());
    while heard != b"question" {
        net.wait(Duration::from_millis(5));
        net.poll(0, &mut |event| {
            match event {
                NetEvent::Accepted { conn: accepted } => conn = Some(accepted),
                NetEvent::Received { bytes, .. } => heard.extend_from_slice(bytes),
                other => panic!("{other:?}"),
            }
            Flow::Continue
        });
        assert!(started.elapsed() < Duration::from_secs(30), "a receive was forgotten");
    }
    assert_eq!(net.refusals, 0);
    net.refusals = 2;
    assert!(matches!(net.send(conn.unwrap(), b"answer".to_vec()), Sending::Done(_) | Sending::InFlight { .. }));
    store.append(&user(1)).unwrap();
    hand_over(&mut net, &mut store);
    bring_back(&mut net, &mut store);
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    assert!(net.left_over.is_empty());
}

#[test]
fn a_pause_of_accepting_ends_by_itself() {
    let mut net = net();
    assert_eq!(net.next_deadline_us(), None);
    net.on_accept((-libc::EMFILE, 0), 7, &mut |_| Flow::Continue);
    assert_eq!(net.next_deadline_us(), Some(7 + ACCEPT_PAUSE_US));
    net.poll(7 + ACCEPT_PAUSE_US, &mut |_| Flow::Continue);
    assert!(net.next_deadline_us().is_none() && net.accepting, "the reactor wakes for it and it goes on");
}
