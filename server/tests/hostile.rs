//! Hostile and broken clients over real sockets: each gets a typed error or a close with a reason, each is counted, and
//! a neighbour on the same core notices nothing.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::{Server, Wire};
use ringline_schema::codec::Codec;
use ringline_schema::commands::Command;
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, Header};
use ringline_schema::ids::DeviceId;
use ringline_schema::message::{
    BodyKind, Class, Credential, DeviceKind, Fetch, Login, Mentions, Reply, Request, Secret, Send,
};

/// A client that goes on chatting with itself while others misbehave.
struct Neighbour {
    wire: Wire,
    sent: u64,
}

impl Neighbour {
    fn new(server: &Server) -> Self {
        Self { wire: server.login("neighbour", 1), sent: 0 }
    }

    /// One durable message there and back.
    fn chats(&mut self) {
        self.sent += 1;
        let (kind, client_seq) = (BodyKind::Text, self.sent);
        let (to, class, ack_timeout_ms, body) = ("neighbour", Class::Durable, None, &b"still here"[..]);
        let answer = self.wire.request(&Request::Send(Send {
            to,
            class,
            kind,
            client_seq,
            ack_timeout_ms,
            body,
            mentions: Mentions::default(),
        }));
        assert!(matches!(answer.reply(), Reply::SendAck(ack) if ack.seq.0 == self.sent), "{:?}", answer.reply());
        let push = self.wire.push();
        assert!(matches!(push.reply(), Reply::Deliver(message) if message.body == b"still here"));
    }
}

fn code(reply: &Reply<'_>) -> Option<ErrorCode> {
    match reply {
        Reply::Failure { code, .. } => Some(*code),
        _ => None,
    }
}

/// A header by its parts, right or wrong.
fn header(command: u16, body_bytes: u32) -> [u8; 16] {
    let (codec, flags) = (Codec::FlatBuffers, Flags::default());
    Header { codec, command, flags, request_id: 5, body_bytes }.encode()
}

/// The server's counters, as its stop logs them.
fn counted(server: &mut Server, name: &str) -> bool {
    server.log.iter().any(|line| line.contains(name))
}

/// Sends bytes on a fresh connection and gives the failure they are answered with, and whether the stream then ends.
fn answer_to(server: &Server, bytes: &[u8]) -> (Option<ErrorCode>, bool) {
    let mut wire = server.connect();
    wire.send_raw(bytes);
    wire.finish();
    let first = wire.next();
    (first.and_then(|frame| code(&frame.reply())), wire.next().is_none())
}

#[test]
fn unreadable_streams_are_told_why_and_ended() {
    let mut server = Server::start(&["--cores", "2"]);
    let mut neighbour = Neighbour::new(&server);
    let ping = header(Command::Ping as u16, 0);
    let broken = |at: usize, value: u8| {
        let mut bytes = ping;
        bytes[at] = value;
        bytes
    };
    let cases = [
        (broken(0, b'G'), ErrorCode::BadMagic),
        (broken(2, 9), ErrorCode::BadVersion),
        (broken(3, 1), ErrorCode::BadCodec),
        (broken(6, 2), ErrorCode::BadFlags),
        (broken(15, 0xff), ErrorCode::FrameTooLarge),
        (header(Command::Send as u16, 5_000), ErrorCode::FrameTooLarge),
    ];
    for (bytes, expected) in cases {
        assert_eq!(answer_to(&server, &bytes), (Some(expected), true));
        neighbour.chats();
    }
    assert_eq!(answer_to(&server, b"GET / HTTP/1.1\r\nHost: chat\r\n\r\n"), (Some(ErrorCode::BadMagic), true));
    assert_eq!(server.stop(), Some(0));
    for (_, expected) in cases {
        assert!(counted(&mut server, expected.name()), "{} is counted: {:?}", expected.name(), server.log);
    }
}

#[test]
fn broken_bodies_and_early_commands_are_told_why_and_ended() {
    let server = Server::start(&["--cores", "1"]);
    let mut neighbour = Neighbour::new(&server);
    let mut wire = server.connect();
    let login = |user| {
        let credential = Credential::Password(Secret("a password"));
        Request::Login(Login { user, credential, device: DeviceId(1), device_kind: DeviceKind::Web, agent: "x" })
    };
    let (_, whole) = wire.encode(&login("somebody"));
    for cut in [17, 20, whole.len() / 2, whole.len() - 16] {
        let mut bytes = header(Command::Login as u16, (cut - 16) as u32).to_vec();
        bytes.extend_from_slice(&whole[16..cut]);
        let (told, ended) = answer_to(&server, &bytes);
        assert!(ended && matches!(told, Some(ErrorCode::BadBody | ErrorCode::BadRequest)), "{cut}: {told:?}");
    }
    let mut garbage = header(Command::Login as u16, 200).to_vec();
    garbage.extend((0..200u32).map(|at| (at * 7 + 3) as u8));
    assert_eq!(answer_to(&server, &garbage), (Some(ErrorCode::BadBody), true));
    let at = whole.windows(8).position(|window| window == b"somebody").unwrap();
    let mut not_utf8 = whole.clone();
    not_utf8[at] = 0xff;
    assert_eq!(answer_to(&server, &not_utf8), (Some(ErrorCode::BadBody), true));
    let (_, online) = wire.encode(&Request::Online { cursor: "", limit: 1 });
    assert_eq!(answer_to(&server, &online), (Some(ErrorCode::NotLoggedIn), true));
    neighbour.chats();
    // These leave the connection open.
    let long = "x".repeat(65);
    for (request, expected) in [(login(&long), ErrorCode::BadName), (login("a\tb"), ErrorCode::BadName)] {
        assert_eq!(code(&wire.request(&request).reply()), Some(expected));
    }
    wire.send_raw(&header(0x7777, 0));
    assert_eq!(code(&wire.answer(5).reply()), Some(ErrorCode::UnknownCommand));
    let pong = wire.request(&Request::Ping { stamp: 3 });
    assert!(matches!(pong.reply(), Reply::Pong { stamp: 3, .. }));
    neighbour.chats();
}

#[test]
fn slow_ten_thousand_silent_connections_cost_the_others_nothing() {
    const SILENT: usize = 10_000;
    let mut server = Server::start(&["--cores", "1", "--set", "limits.login_timeout_ms=8000"]);
    let mut neighbour = Neighbour::new(&server);
    rlimit_to_hard();
    let mut silent = Vec::with_capacity(SILENT);
    for at in 0..SILENT {
        silent.push(TcpStream::connect(&server.address).unwrap());
        if at % 1_000 == 0 {
            neighbour.chats();
        }
    }
    neighbour.chats();
    let mut told = 0;
    for mut stream in silent {
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let mut bytes = Vec::new();
        // The end may come as a reset; what was said before it counts.
        let _ = stream.read_to_end(&mut bytes);
        told += usize::from(bytes.windows(13).any(|window| window == b"no login with"));
    }
    assert!(told > SILENT * 99 / 100, "{told} of {SILENT} were told LOGIN_TIMEOUT");
    neighbour.chats();
    assert_eq!(server.stop(), Some(0));
    assert!(counted(&mut server, "LOGIN_TIMEOUT"));
}

/// 10,000 sockets of this process.
fn rlimit_to_hard() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

#[test]
fn slow_bytes_that_trickle_do_not_keep_a_connection_alive() {
    let server = Server::start(&[
        "--cores",
        "1",
        "--set",
        "limits.login_timeout_ms=2000",
        "--set",
        "limits.idle_timeout_ms=3000",
        "--set",
        "limits.ping_interval_ms=1000",
    ]);
    let mut fresh = server.connect();
    // A frame that says it is long and never ends, a byte at a time.
    fresh.send_raw(&header(Command::Login as u16, 4_000));
    let mut known = server.login("trickler", 1);
    known.send_raw(&header(Command::Send as u16, 60_000));
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(500));
        // Fails once the server has closed, which is what is waited for.
        let _ = fresh.stream().write_all(b"x");
        let _ = known.stream().write_all(b"x");
    }
    assert_eq!(fresh.next().and_then(|frame| code(&frame.reply())), Some(ErrorCode::LoginTimeout));
    assert_eq!(known.next().and_then(|frame| code(&frame.reply())), Some(ErrorCode::IdleTimeout));
}

#[test]
fn slow_a_client_that_never_reads_lags_is_closed_and_loses_nothing() {
    let mut server = Server::start(&[
        "--cores",
        "1",
        "--set",
        "limits.write_stall_ms=2000",
        "--set",
        "limits.outbox_bytes_max=65536",
    ]);
    let mut neighbour = Neighbour::new(&server);
    let mut sleeper = server.login("sleeper", 1);
    let mut sender = server.login("sender", 1);
    let body = vec![b'z'; 32 * 1024];
    let mut client_seq = 0;
    // More than the kernel's buffers and the outbox together hold.
    for _ in 0..400 {
        client_seq += 1;
        let (kind, class, ack_timeout_ms) = (BodyKind::File, Class::Durable, None);
        let send =
            Send { to: "sleeper", class, kind, client_seq, ack_timeout_ms, body: &body, mentions: Mentions::default() };
        let answer = sender.request(&Request::Send(send));
        assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
    }
    neighbour.chats();
    std::thread::sleep(Duration::from_millis(2_500));
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(250));
        neighbour.chats();
    }
    let mut delivered = 0;
    while let Some(frame) = sleeper.next() {
        delivered += u64::from(matches!(frame.reply(), Reply::Deliver(_)));
    }
    assert!(delivered < client_seq, "the stream ended before all was pushed: {delivered}");
    // What was dropped on the way is in the log.
    let mut sleeper = server.login("sleeper", 1);
    let mut after = ringline_schema::ids::Seq(0);
    while after.0 < client_seq {
        let fetch = Fetch { with: "sender", after, before: None, limit: 100, newest: false };
        let page = sleeper.request(&Request::Fetch(fetch));
        let Reply::FetchOk { messages, .. } = page.reply() else { panic!("{:?}", page.reply()) };
        assert!(!messages.is_empty());
        for message in messages {
            assert_eq!(message.seq, after.next());
            assert_eq!(message.body, body);
            after = message.seq;
        }
    }
    assert_eq!(server.stop(), Some(0));
    assert!(counted(&mut server, "dropped_durable"), "{:?}", server.log);
    assert!(counted(&mut server, "SLOW_READER"), "{:?}", server.log);
}
