//! What every [`Net`] must do, as tests that take one. Each implementation runs all of them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringline_core::event::ConnId;

use super::{Admission, Flow, Net, NetEvent, Sending};

const PATIENCE: Duration = Duration::from_secs(30);

/// One core's sockets under test, and where to reach them.
pub struct Bench {
    pub net: Box<dyn Net>,
    pub address: SocketAddr,
    pub admission: Arc<Admission>,
}

/// Makes a fresh one with room for this many connections, and this refusal.
pub type Make = fn(connections_max: usize, refusal: &[u8]) -> Bench;

/// A listening, non-blocking socket on a free port.
pub fn listener() -> (std::os::fd::OwnedFd, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    (listener.into(), address)
}

/// Runs the whole suite.
pub fn run_all(make: Make) {
    accepts_receives_and_tells_the_end(make);
    sends_small_at_once_and_large_in_parts(make);
    moves_a_socket_and_ignores_its_old_name(make);
    stops_reading_when_told(make);
    reads_on_after_a_stop(make);
    lends_ids_without_sockets(make);
    refuses_above_its_limit_and_gives_places_back(make);
    finishes_the_stream_and_still_reads(make);
    closes_its_listener(make);
    more_bytes_than_buffers_arrive_without_another_wake(make);
}

/// What was seen, owned.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Accepted(ConnId),
    Received(ConnId, Vec<u8>),
    Sent(ConnId, usize, bool),
    Closed(ConnId),
}

impl Bench {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn poll(&mut self, flow: Flow) -> Vec<Seen> {
        self.poll_after(Duration::from_millis(5), flow)
    }

    /// Sleeps for at most `sleep`, then polls.
    fn poll_after(&mut self, sleep: Duration, flow: Flow) -> Vec<Seen> {
        let mut seen = Vec::new();
        self.net.flush();
        self.net.wait(sleep);
        self.net.poll(0, &mut |event| {
            seen.push(match event {
                NetEvent::Accepted { conn } => Seen::Accepted(conn),
                NetEvent::Received { conn, bytes } => {
                    seen.push(Seen::Received(conn, bytes.to_vec()));
                    return flow;
                }
                NetEvent::Sent { conn, bytes, buffer } => Seen::Sent(conn, bytes, buffer.is_some()),
                NetEvent::Closed { conn, .. } => Seen::Closed(conn),
                NetEvent::Detached { .. } | NetEvent::FileWritten { .. } => panic!("nobody asked for it"),
            });
            Flow::Continue
        });
        seen
    }

    /// Polls until `wanted` gives something.
    fn until<T>(&mut self, flow: Flow, mut wanted: impl FnMut(&Seen) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            for seen in self.poll(flow) {
                if let Some(found) = wanted(&seen) {
                    return found;
                }
            }
            assert!(started.elapsed() < PATIENCE, "it does not come");
        }
    }

    fn accept(&mut self) -> (TcpStream, ConnId) {
        let stream = self.connect();
        let conn = self.until(Flow::Continue, |seen| match seen {
            Seen::Accepted(conn) => Some(*conn),
            _ => None,
        });
        (stream, conn)
    }

    /// Takes a socket out, at once or by its event.
    fn detach(&mut self, leaving: ConnId) -> std::os::fd::OwnedFd {
        let mut taken = self.net.detach(leaving);
        let started = Instant::now();
        while taken.is_none() {
            assert!(started.elapsed() < PATIENCE, "it does not come out");
            self.net.flush();
            self.net.wait(Duration::from_millis(5));
            self.net.poll(0, &mut |event| {
                match event {
                    NetEvent::Detached { conn, socket } if conn == leaving => taken = Some(socket),
                    other => panic!("unexpected {other:?}"),
                }
                Flow::Continue
            });
        }
        taken.expect("the loop ends with it")
    }

    fn receive(&mut self, from: ConnId, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.until(Flow::Continue, |seen| match seen {
            Seen::Received(conn, part) if *conn == from => {
                bytes.extend_from_slice(part);
                (bytes.len() >= count).then(|| std::mem::take(&mut bytes))
            }
            _ => None,
        })
    }
}

fn accepts_receives_and_tells_the_end(make: Make) {
    let mut bench = make(8, b"");
    let (mut client, conn) = bench.accept();
    assert_eq!((bench.net.connections(), bench.net.counters().accepted), (1, 1));
    client.write_all(b"hello").unwrap();
    assert_eq!(bench.receive(conn, 5), b"hello");
    drop(client);
    assert_eq!(bench.until(Flow::Continue, |seen| matches!(seen, Seen::Closed(_)).then_some(())), ());
    assert_eq!((bench.net.connections(), bench.admission.count()), (0, 0));
    // The slot is used again under another name.
    let (_client, next) = bench.accept();
    assert_ne!(next, conn);
}

fn sends_small_at_once_and_large_in_parts(make: Make) {
    let mut bench = make(8, b"");
    let (mut client, conn) = bench.accept();
    match bench.net.send(conn, b"small".to_vec()) {
        Sending::Done(buffer) => assert_eq!(buffer, b"small"),
        Sending::InFlight { bytes } => {
            assert_eq!(bytes, 0, "a ring takes it at the flush");
            bench.until(Flow::Continue, |seen| matches!(seen, Seen::Sent(_, 5, true)).then_some(()));
        }
    }
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"small");

    let large: Vec<u8> = (0..32 * 1024 * 1024u32).map(|at| at as u8).collect();
    let expected = large.clone();
    let Sending::InFlight { bytes } = bench.net.send(conn, large) else { panic!("no kernel buffers so much") };
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        client.read_exact(&mut got).unwrap();
        assert!(got == expected, "the bytes arrive as they were");
        client
    });
    let mut sum = bytes;
    bench.until(Flow::Continue, |seen| match seen {
        Seen::Sent(_, bytes, done) => {
            sum += bytes;
            done.then_some(())
        }
        _ => None,
    });
    assert_eq!(sum, 32 * 1024 * 1024, "progress is told once");
    reader.join().unwrap();
}

fn moves_a_socket_and_ignores_its_old_name(make: Make) {
    let (mut one, mut two) = (make(8, b""), make(8, b""));
    let (mut client, old) = one.accept();
    let socket = one.detach(old);
    assert_eq!(one.net.connections(), 0);
    assert!(one.net.detach(old).is_none());
    one.net.close(old);
    one.net.finish(old);
    assert!(matches!(one.net.send(old, b"lost".to_vec()), Sending::InFlight { bytes: 0 }));
    let new = two.net.adopt(socket).unwrap();
    client.write_all(b"moved").unwrap();
    assert_eq!(two.receive(new, 5), b"moved");
    let _ = two.net.send(new, b"welcome".to_vec());
    two.poll(Flow::Continue);
    let mut got = [0; 7];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"welcome");
    assert!(one.poll(Flow::Continue).is_empty());
}

fn stops_reading_when_told(make: Make) {
    let mut bench = make(8, b"");
    let (mut client, conn) = bench.accept();
    client.write_all(b"first").unwrap();
    bench.until(Flow::Stop, |seen| matches!(seen, Seen::Received(..)).then_some(()));
    client.write_all(b"second").unwrap();
    for _ in 0..20 {
        assert_eq!(bench.poll(Flow::Stop), [], "nothing more is read");
    }
    bench.net.close(conn);
    assert_eq!((bench.net.connections(), bench.admission.count()), (0, 0));
}

fn reads_on_after_a_stop(make: Make) {
    let mut bench = make(8, b"");
    let (mut client, conn) = bench.accept();
    // Once before the kernel has let go of the receive, and once after.
    for polls in [0, 20] {
        client.write_all(b"x").unwrap();
        bench.until(Flow::Stop, |seen| matches!(seen, Seen::Received(..)).then_some(()));
        for _ in 0..polls {
            assert_eq!(bench.poll(Flow::Stop), []);
        }
        bench.net.resume(conn);
        client.write_all(b"more").unwrap();
        assert_eq!(bench.receive(conn, 4), b"more");
    }
    drop(client);
    bench.until(Flow::Continue, |seen| matches!(seen, Seen::Closed(_)).then_some(()));
    bench.net.resume(conn);
}

fn lends_ids_without_sockets(make: Make) {
    let mut bench = make(8, b"");
    let lent = bench.net.reserve();
    let (_first, conn) = bench.accept();
    assert_ne!(lent.slot, conn.slot);
    assert_eq!((bench.net.connections(), bench.admission.count()), (1, 1), "it is no connection");
    bench.net.release(lent);
    let (_second, next) = bench.accept();
    assert!(next.slot == lent.slot && next != lent, "its place is used again under another name");
    bench.net.release(lent);
    let (_third, third) = bench.accept();
    assert_ne!(third.slot, next.slot, "who has the place now keeps it");
}

fn refuses_above_its_limit_and_gives_places_back(make: Make) {
    let mut bench = make(1, b"full");
    let (first, _) = bench.accept();
    let mut second = bench.connect();
    while bench.net.counters().refused == 0 {
        assert_eq!(bench.poll(Flow::Continue), []);
    }
    let mut got = Vec::new();
    second.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"full");
    drop(first);
    bench.until(Flow::Continue, |seen| matches!(seen, Seen::Closed(_)).then_some(()));
    bench.accept();
}

fn finishes_the_stream_and_still_reads(make: Make) {
    let mut bench = make(8, b"");
    let (mut client, conn) = bench.accept();
    let _ = bench.net.send(conn, b"bye".to_vec());
    bench.poll(Flow::Continue);
    bench.net.finish(conn);
    bench.poll(Flow::Continue);
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye");
    client.write_all(b"late").unwrap();
    assert_eq!(bench.receive(conn, 4), b"late");
    drop(client);
    bench.until(Flow::Continue, |seen| matches!(seen, Seen::Closed(_)).then_some(()));
}

fn closes_its_listener(make: Make) {
    let mut bench = make(8, b"");
    let (mut client, conn) = bench.accept();
    bench.net.stop_accepting();
    bench.poll(Flow::Continue);
    assert!(TcpStream::connect(bench.address).is_err());
    client.write_all(b"still").unwrap();
    assert_eq!(bench.receive(conn, 5), b"still");
}

/// More bytes wait than a ring has buffers for, and nothing else happens: what found no buffer must not wait for
/// somebody else's bytes to wake the core.
fn more_bytes_than_buffers_arrive_without_another_wake(make: Make) {
    const CLIENTS: usize = 256;
    // In all twice what the receive buffers of a ring hold, and each share fits into its socket.
    const BYTES: usize = 64 * 1024;
    let mut bench = make(CLIENTS, b"");
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| bench.accept().0).collect();
    for client in &mut clients {
        client.write_all(&[7; BYTES]).unwrap();
    }
    let (started, mut received) = (Instant::now(), 0);
    while received < CLIENTS * BYTES {
        // A sleep that nothing ends is as long as the patience.
        let seen = bench.poll_after(PATIENCE, Flow::Continue);
        assert!(started.elapsed() < PATIENCE, "{received} bytes came, the rest slept in its sockets");
        for event in seen {
            match event {
                Seen::Received(_, bytes) => received += bytes.len(),
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}
