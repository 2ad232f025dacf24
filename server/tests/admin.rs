//! The admin endpoint over a real socket: what it answers, that its counts are exact, and when it is not there.

mod common;

use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Server, http, run, sum};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::Seq;
use ringline_schema::message::{BodyKind, ChatReply, Class, Fetch, Mentions, Reply, Request, Send};

/// A server with its endpoint on a free port, and that address.
fn start(arguments: &[&str]) -> (Server, String) {
    let mut all = vec!["--set", "admin.listen=127.0.0.1:0"];
    all.extend(arguments);
    let server = Server::start(&all);
    let line = server.log.iter().find(|line| line.contains("metrics on http://")).expect("it says where");
    let address = line.split("http://").nth(1).unwrap().trim_end_matches("/metrics").to_owned();
    (server, address)
}

fn page(address: &str) -> String {
    let (status, head, body) = http(address, "GET", "/metrics");
    assert_eq!(status, 200, "{body}");
    assert!(head.contains("content-type: application/openmetrics-text"), "{head}");
    body
}

fn send<'a>(to: &'a str, client_seq: u64, class: Class) -> Request<'a> {
    Request::Send(Send {
        to,
        class,
        kind: BodyKind::Text,
        client_seq,
        ack_timeout_ms: None,
        body: b"hello",
        mentions: Mentions::default(),
    })
}

#[test]
fn a_message_is_counted_once_where_it_belongs() {
    let (server, address) = start(&[]);
    let mut ann = server.login("ann", 1);
    let mut bob = server.login("bob", 1);
    let before = page(&address);
    assert_eq!(sum(&before, "ringline_sessions"), Some(2));
    assert_eq!(sum(&before, "ringline_connections"), Some(2));
    assert_eq!(sum(&before, "ringline_users_online"), Some(2));
    assert_eq!(sum(&before, "ringline_logins_total"), Some(2));
    assert!(
        sum(&before, "process_open_fds") > Some(3) && sum(&before, "process_resident_memory_bytes") > Some(1 << 20)
    );
    let answer = ann.request(&send("bob", 1, Class::Durable));
    assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
    assert!(matches!(bob.push().reply(), Reply::Deliver(_)));
    let answer = ann.request(&send("bob", 2, Class::Transient));
    assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
    assert!(matches!(bob.push().reply(), Reply::Deliver(_)));
    let answer = ann.request(&send("nobody", 3, Class::Transient));
    assert!(matches!(answer.reply(), Reply::Failure { .. }), "{:?}", answer.reply());
    let after = page(&address);
    let rose = |name: &str| sum(&after, name).unwrap_or(0) - sum(&before, name).unwrap_or(0);
    let expected = [
        ("ringline_requests_total", 3),
        ("ringline_sends_durable_total", 1),
        ("ringline_sends_transient_total", 2),
        ("ringline_accepted_total", 1),
        ("ringline_delivered_total", 2),
        ("ringline_failures_total", 1),
    ];
    for (name, count) in expected {
        assert_eq!(rose(name), count, "{name}\n{after}");
    }
    // The message, and the conversation it begins; rows of the devices that have just logged in may come beside them.
    assert!(rose("ringline_store_records_total") >= 2, "{after}");
    assert!(after.contains("code=\"NOT_ONLINE\""), "{after}");
    assert_eq!(sum(&after, "ringline_store_commit_seconds_count"), sum(&after, "ringline_store_commits_total"));
    assert!(rose("ringline_store_log_bytes_total") > 0 && rose("ringline_sent_bytes_total") > 0);
    ann.finish();
    assert!(ann.is_ended());
    assert_eq!(sum(&page(&address), "ringline_sessions"), Some(1), "a session that ends is not counted any more");
}

#[test]
fn it_tells_health_version_and_what_it_does_not_have() {
    let (_server, address) = start(&["--cores", "1", "--set", "store.kind=memory"]);
    let (status, _, body) = http(&address, "GET", "/healthz");
    assert_eq!((status, body.as_str()), (200, "ok\n"));
    let (status, head, body) = http(&address, "GET", "/version");
    assert!(status == 200 && head.contains("application/json"), "{head}");
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    let version = String::from_utf8(run(&["version"]).stdout).unwrap();
    assert!(version.contains(json["version"].as_str().unwrap()), "{version} {json}");
    assert!(["io_uring", "epoll"].contains(&json["net"].as_str().unwrap()), "{json}");
    assert_eq!(json["cores"].as_array().unwrap().len(), 1);
    let (status, _, body) = http(&address, "GET", "/metric");
    assert!(status == 404 && body.contains("/metrics"), "{body}");
    assert_eq!(http(&address, "POST", "/metrics").0, 405);
}

#[test]
fn a_stopped_server_closes_it_and_one_without_it_has_none() {
    let (mut server, address) = start(&["--cores", "1", "--set", "store.kind=memory"]);
    // A client that says nothing must not hold the stop up.
    let silent = TcpStream::connect(&address).unwrap();
    assert_eq!(server.stop(), Some(0));
    assert!(TcpStream::connect(&address).is_err(), "nobody listens any more");
    drop(silent);
    let server = Server::start(&["--cores", "1", "--set", "store.kind=memory"]);
    assert!(!server.log.iter().any(|line| line.contains("/metrics")), "off is the default: {:?}", server.log);
}

#[test]
fn an_address_that_it_cannot_have_is_a_bad_start() {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("admin.listen={}", held.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("data");
    let (code, text) = common::complaint(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        data_dir.to_str().unwrap(),
        "--set",
        &listen,
    ]);
    let line = text.lines().last().unwrap_or_default();
    assert!(code == 1 && line.starts_with("ringline: ") && line.contains("choose another admin.listen"), "{text}");
    assert!(!data_dir.exists(), "nothing was made before it was found");
}

#[test]
fn scrapes_under_load_lose_no_message_and_no_figure() {
    const MESSAGES: u64 = 2_000;
    const IN_FLIGHT: u64 = 64;
    let (server, address) = start(&[]);
    let mut ann = server.login("ann", 1);
    let mut bob = server.login("bob", 1);
    let done = AtomicBool::new(false);
    let scrapes = std::thread::scope(|scope| {
        let scraper = scope.spawn(|| {
            let (mut scrapes, mut last) = (0, 0);
            while !done.load(Ordering::Relaxed) || scrapes == 0 {
                let text = page(&address);
                // A busy machine may keep a core from answering in time; then it says so and gives no figures.
                if !text.contains("ringline_core_up{core=\"0\"} 0") && !text.contains("ringline_core_up{core=\"1\"} 0")
                {
                    let now = sum(&text, "ringline_accepted_total").unwrap();
                    assert!(now >= last, "a counter only rises");
                    last = now;
                }
                scrapes += 1;
            }
            scrapes
        });
        let mut ids = std::collections::VecDeque::new();
        for seq in 1..=MESSAGES {
            ids.push_back(ann.send(&send("bob", seq, Class::Durable)));
            if seq >= IN_FLIGHT {
                let answer = ann.answer(ids.pop_front().unwrap());
                assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
            }
        }
        for id in ids {
            assert!(matches!(ann.answer(id).reply(), Reply::SendAck(_)));
        }
        for seq in 1..=MESSAGES {
            match bob.push().reply() {
                Reply::Deliver(message) => assert_eq!(message.seq.0, seq),
                other => panic!("{other:?}"),
            }
        }
        done.store(true, Ordering::Relaxed);
        scraper.join().unwrap()
    });
    assert!(scrapes > 0);
    let text = page(&address);
    assert_eq!(sum(&text, "ringline_accepted_total"), Some(MESSAGES));
    assert_eq!(sum(&text, "ringline_delivered_total"), Some(MESSAGES));
}

#[test]
fn retention_lets_old_messages_go_and_the_metrics_tell() {
    let keys = ["retention.messages=20", "retention.interval_ms=1000", "store.segment_bytes=16384"];
    let set: Vec<&str> = keys.iter().flat_map(|key| ["--set", *key]).collect();
    let (mut server, address) = start(&[&["--cores", "2"][..], &set].concat());
    drop(server.login("bob", 2));
    let mut ann = server.login("ann", 1);
    let mut sent = 0;
    // Filling goes on until a look has found a file that nothing is shown of.
    while sum(&page(&address), "ringline_store_segments_released_total") == Some(0) {
        for _ in 0..200 {
            sent += 1;
            assert!(matches!(ann.request(&send("bob", sent, Class::Durable)).reply(), Reply::SendAck(_)));
        }
        assert!(sent < 1_000_000, "nothing goes");
    }
    let text = page(&address);
    for name in
        ["floors_total", "checkpoints_total", "checkpoint_bytes", "segments", "logs_bytes", "released_bytes_total"]
    {
        assert!(sum(&text, &format!("ringline_store_{name}")) > Some(0), "{name}: {text}");
    }
    let fetch = |after| Fetch { with: "bob", after: Seq(after), before: None, limit: 200, newest: false };
    let told = ann.request(&Request::Fetch(fetch(1)));
    let Reply::Chat(ChatReply::Truncated { first, .. }) = told.reply() else { panic!("{:?}", told.reply()) };
    assert!(first.0 > 1 && first.0 <= sent - 19, "{first} of {sent}");
    assert_eq!(server.stop(), Some(0));
    server.restart(None);
    let mut ann = server.login("ann", 3);
    let told = ann.request(&Request::Fetch(fetch(first.0 - 1)));
    let Reply::FetchOk { first: still, head, .. } = told.reply() else { panic!("{:?}", told.reply()) };
    assert!(still >= first && head.0 == sent);
}

#[test]
fn a_disk_that_fails_under_a_server_is_loud_and_nothing_acknowledged_is_lost() {
    let (mut server, address) = start(&["--cores", "1"]);
    let (mut ann, mut bob) = (server.login("ann", 1), server.login("bob", 1));
    let accepted =
        |wire: &mut common::Wire, client_seq| match wire.request(&send("bob", client_seq, Class::Durable)).reply() {
            Reply::SendAck(ack) => Ok(ack.seq),
            Reply::Failure { code, .. } => Err(code),
            other => panic!("{other:?}"),
        };
    assert_eq!(accepted(&mut ann, 1), Ok(Seq(1)));
    assert_eq!(http(&address, "GET", "/healthz").0, 200);
    // From here on every write to a file fails, at once and by name (EFBIG).
    let limited = Command::new("prlimit").args([&format!("--pid={}", server.pid()), "--fsize=1:"]).status().unwrap();
    assert!(limited.success());
    assert_eq!(accepted(&mut ann, 2), Err(ErrorCode::StoreFailed));
    assert_eq!(accepted(&mut ann, 3), Err(ErrorCode::StoreFailed), "for ever");
    server.wait_for_line("the store of this shard stops");
    let (status, _, body) = http(&address, "GET", "/healthz");
    assert!(status == 503 && body.contains("its store failed"), "{body}");
    assert_eq!(sum(&page(&address), "ringline_store_failed"), Some(1));
    let answer = ann.request(&send("bob", 4, Class::Transient));
    assert!(matches!(answer.reply(), Reply::SendAck(_)), "what needs no disk goes on: {:?}", answer.reply());
    let delivered = |frame: common::Received| match frame.reply() {
        Reply::Deliver(message) => message.class,
        other => panic!("{other:?}"),
    };
    assert_eq!([delivered(bob.push()), delivered(bob.push())], [Class::Durable, Class::Transient]);
    assert_ne!(server.stop(), Some(0), "a supervisor sees that it was no clean stop");
    server.restart(None);
    let mut ann = server.login("ann", 1);
    let range = Fetch { with: "bob", after: Seq(0), before: None, limit: 10, newest: false };
    let told = ann.request(&Request::Fetch(range));
    let Reply::FetchOk { messages, head, .. } = told.reply() else { panic!("{:?}", told.reply()) };
    let seqs: Vec<_> = messages.iter().map(|message| message.seq.0).collect();
    assert!(seqs[0] == 1 && seqs.len() as u64 == head.0, "{seqs:?}");
}
