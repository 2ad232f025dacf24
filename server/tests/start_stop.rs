//! Starting and stopping the real binary: exit codes, the one line of each bad start, and a first conversation.

mod common;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use common::{Server, complaint, ringline, run};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::DeviceId;
use ringline_schema::message::{
    BodyKind, Class, Credential, DeviceKind, Login, Mentions, Reply, Request, Secret, Send,
};

/// A start that must fail: exit code 1, and exactly one line that holds these parts.
fn refused(arguments: &[&str], parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("data");
    let mut all = vec!["serve", "--listen", "127.0.0.1:0", "--data-dir", data_dir.to_str().unwrap()];
    all.extend(arguments);
    let (code, text) = complaint(&all);
    let line = text.lines().last().unwrap_or_default();
    assert_eq!(code, 1, "{text}");
    assert!(line.starts_with("ringline: "), "{text}");
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in {text}");
    }
    assert_eq!(text.lines().filter(|line| line.starts_with("ringline: ")).count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

fn send<'a>(to: &'a str, client_seq: u64, body: &'a [u8]) -> Request<'a> {
    let (class, kind) = (Class::Durable, BodyKind::Text);
    Request::Send(Send { to, class, kind, client_seq, ack_timeout_ms: None, body, mentions: Mentions::default() })
}

#[test]
fn a_server_starts_serves_and_stops_with_0() {
    let mut server = Server::start(&["--cores", "1"]);
    let mut wire = server.connect();
    let pong = wire.request(&Request::Ping { stamp: 7 });
    assert!(matches!(pong.reply(), Reply::Pong { stamp: 7, .. }));
    assert_eq!(server.stop(), Some(0));
    let goaway = wire.push();
    assert!(matches!(goaway.reply(), Reply::Goaway { .. }), "{:?}", goaway.reply());
    assert!(wire.is_ended());
    assert!(server.log.iter().any(|line| line.contains("stopped")), "{:?}", server.log);
}

#[test]
fn each_signal_stops_in_order_and_json_logs_are_json() {
    for signal in ["INT", "TERM"] {
        let mut server = Server::start(&["--cores", "1", "--set", "log.format=json", "--set", "store.kind=memory"]);
        server.signal(signal);
        assert_eq!(server.wait(), Some(0));
        for line in &server.log {
            serde_json::from_str::<serde_json::Value>(line).expect(line);
        }
    }
}

#[test]
fn users_on_all_cores_talk_and_a_restart_with_fewer_cores_keeps_what_they_said() {
    let all_cores = std::thread::available_parallelism().unwrap().get().to_string();
    let mut server = Server::start(&["--cores", &all_cores]);
    let users: Vec<String> = (0..6).map(|number| format!("user{number}")).collect();
    let mut wires: Vec<_> = users.iter().map(|user| server.login(user, 1)).collect();
    for (from, wire) in wires.iter_mut().enumerate() {
        for (to, user) in users.iter().enumerate() {
            let text = format!("from {from} to {to}");
            let answer = wire.request(&send(user, 1 + to as u64, text.as_bytes()));
            assert!(matches!(answer.reply(), Reply::SendAck(_)), "{text}: {:?}", answer.reply());
        }
    }
    for (to, wire) in wires.iter_mut().enumerate() {
        let mut got = Vec::new();
        while got.len() < users.len() {
            match wire.push().reply() {
                Reply::Deliver(message) => got.push((message.from.to_owned(), message.body.to_vec())),
                other => panic!("{other:?}"),
            }
        }
        got.sort();
        let expected: Vec<_> = users
            .iter()
            .enumerate()
            .map(|(from, user)| (user.clone(), format!("from {from} to {to}").into_bytes()))
            .collect();
        assert_eq!(got, expected);
    }
    assert_eq!(server.stop(), Some(0));

    server.restart(Some(&["--cores", "1"]));
    let mut wire = server.login("user0", 1);
    let fetch = ringline_schema::message::Fetch {
        with: "user5",
        after: ringline_schema::ids::Seq::ZERO,
        before: None,
        limit: 10,
        newest: false,
    };
    let answer = wire.request(&Request::Fetch(fetch));
    match answer.reply() {
        Reply::FetchOk { messages, .. } => assert_eq!(messages.len(), 2),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let mut server = Server::start(&["--cores", "1"]);
    let mut wire = server.login("ann", 1);
    server.login("bob", 1);
    for seq in 1..=20 {
        let answer = wire.request(&send("bob", seq, b"kept"));
        assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
    }
    server.kill();
    server.restart(None);
    let mut wire = server.login("ann", 1);
    let again = wire.request(&send("bob", 20, b"kept"));
    match again.reply() {
        Reply::SendAck(ack) => assert!(ack.dup && ack.seq.0 == 20, "{ack:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_signal_before_it_serves_stops_in_order_and_the_next_start_has_everything() {
    let mut server = Server::start(&["--cores", "1"]);
    let mut wire = server.login("ann", 1);
    server.login("bob", 1);
    for seq in 1..=20 {
        wire.request(&send("bob", seq, b"kept"));
    }
    for signal in ["TERM", "INT"] {
        server.kill();
        std::fs::remove_dir_all(server.data_dir().join("index")).unwrap();
        server.begin_again();
        server.wait_for_line("kernel");
        server.signal(signal);
        assert_eq!(server.wait(), Some(0), "{:?}", server.log);
        assert!(server.log.iter().any(|line| line.contains("stopping in order")), "{:?}", server.log);
        server.restart(None);
        let again = server.login("ann", 1).request(&send("bob", 20, b"kept"));
        assert!(matches!(again.reply(), Reply::SendAck(ack) if ack.dup && ack.seq.0 == 20), "{:?}", again.reply());
    }
}

#[test]
fn passwords_and_tokens_open_and_wrong_ones_do_not() {
    let server = Server::start(&["--cores", "1", "--set", "store.kind=memory"]);
    let mut wire = server.connect();
    let registered = wire.request(&Request::Register { user: "ann", password: Secret("correct horse") });
    assert!(matches!(registered.reply(), Reply::RegisterOk { user: "ann" }), "{:?}", registered.reply());
    let mut login = |credential| {
        let (device, device_kind) = (DeviceId(1), DeviceKind::Phone);
        let request = Request::Login(Login { user: "ann", credential, device, device_kind, agent: "" });
        match wire.request(&request).reply() {
            Reply::LoginOk(_) => None,
            Reply::Failure { code, .. } => Some(code),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(login(Credential::Password(Secret("wrong horse"))), Some(ErrorCode::AuthFailed));
    assert_eq!(login(Credential::Token(Secret("garbage"))), Some(ErrorCode::AuthFailed));
    let token = server.token("bob");
    assert_eq!(login(Credential::Token(Secret(&token))), Some(ErrorCode::AuthFailed), "another's token");
    assert_eq!(login(Credential::Password(Secret("correct horse"))), None);
}

#[test]
fn a_second_signal_ends_at_once_with_1() {
    let mut server = Server::start(&["--cores", "1"]);
    // Both are pending when it goes on, so the second finds the orderly stop under way.
    for signal in ["STOP", "TERM", "INT", "CONT"] {
        server.signal(signal);
    }
    assert_eq!(server.wait(), Some(1));
    assert!(server.log.iter().any(|line| line.contains("second signal")), "{:?}", server.log);
}

#[test]
fn without_descriptors_it_waits_and_goes_on_when_there_are_some() {
    // An armed multishot accept keeps the limit of its arming, so only epoll sees one that is lowered later.
    let mut server = Server::start(&["--cores", "1", "--set", "store.kind=memory", "--set", "net.kind=epoll"]);
    let mut early = server.connect();
    early.request(&Request::Ping { stamp: 1 });
    let pid = server.pid();
    let limit = |nofile: String| {
        let arguments = [format!("--pid={pid}"), format!("--nofile={nofile}:")];
        assert!(std::process::Command::new("prlimit").args(arguments).status().unwrap().success());
    };
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    limit(open.to_string());
    let mut late: Vec<_> = (0..3).map(|_| server.connect()).collect();
    server.wait_for_line("cannot accept");
    let pong = early.request(&Request::Ping { stamp: 2 });
    assert!(matches!(pong.reply(), Reply::Pong { .. }), "who is inside is served");
    limit((open + 100).to_string());
    for wire in &mut late {
        wire.request(&Request::Ping { stamp: 3 });
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn what_is_sent_in_one_go_is_answered_in_full_whichever_core_owns_the_user() {
    let all_cores = std::thread::available_parallelism().unwrap().get().to_string();
    let server = Server::start(&["--cores", &all_cores, "--set", "store.kind=memory"]);
    for number in 0..16usize {
        let (user, token) = (format!("user{number}"), server.token(&format!("user{number}")));
        let (device, device_kind) = (DeviceId(1), DeviceKind::Bot);
        let credential = Credential::Token(Secret(&token));
        let mut wire = server.connect();
        let mut stream = Vec::new();
        let requests = [
            Request::Ping { stamp: 1 },
            Request::Login(Login { user: &user, credential, device, device_kind, agent: "" }),
            Request::Ping { stamp: 2 },
            Request::Ping { stamp: 3 },
        ];
        let ids = requests.map(|request| {
            let (id, bytes) = wire.encode(&request);
            stream.extend_from_slice(&bytes);
            id
        });
        // Cut at another place each time: in a header, in the login, behind it.
        let (head, tail) = stream.split_at(stream.len() * number / 16);
        wire.send_raw(head);
        wire.send_raw(tail);
        for (at, id) in ids.into_iter().enumerate() {
            let answer = wire.answer(id);
            let right = matches!((at, answer.reply()), (1, Reply::LoginOk(_)) | (0 | 2 | 3, Reply::Pong { .. }));
            assert!(right, "{user}, request {at}: {:?}", answer.reply());
        }
    }
}

#[test]
fn both_kinds_of_net_serve_with_both_ways_to_sleep() {
    for (kind, park) in [("epoll", "glommio"), ("epoll", "direct"), ("ring", "glommio"), ("ring", "direct")] {
        let (net, sleep) = (format!("net.kind={kind}"), format!("net.park={park}"));
        let mut server = Server::start(&["--set", &net, "--set", &sleep, "--set", "store.kind=memory"]);
        let said = format!("sockets are served by {}", if kind == "ring" { "io_uring" } else { kind });
        assert!(server.log.iter().any(|line| line.contains(&said)), "{:?}", server.log);
        let mut ann = server.login("ann", 1);
        let mut bob = server.login("bob", 1);
        for seq in 1..=50 {
            let answer = ann.request(&send("bob", seq, b"over"));
            assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
            match bob.push().reply() {
                Reply::Deliver(message) => assert_eq!(message.seq.0, seq),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(server.stop(), Some(0), "{kind} {park}");
    }
}

#[test]
fn a_start_warns_of_what_the_doctor_sees() {
    let folder = tempfile::tempdir().unwrap();
    // Enough locked memory to start with, and too little to be safe.
    let mut child = Command::new("prlimit")
        .args(["--memlock=614400:614400", env!("CARGO_BIN_EXE_ringline"), "serve", "--listen", "127.0.0.1:0"])
        .args(["--cores", "1", "--set", "store.kind=memory", "--data-dir", folder.path().to_str().unwrap()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        said.push(line.unwrap());
        if said.last().unwrap().contains("ready on") {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let warning = said.iter().find(|line| line.contains("WARN") && line.contains("memlock: ")).expect("it warns");
    assert!(warning.contains("mend it by: "), "{warning}");
    assert!(said.iter().any(|line| line.contains("ringline doctor tells all")), "{said:?}");
    assert!(said.last().unwrap().contains("ready on"), "{said:?}");
}

#[test]
fn hostile_bytes_are_answered_and_end_the_connection_only() {
    let server = Server::start(&["--cores", "1", "--set", "store.kind=memory"]);
    let mut other = server.connect();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], b"RL\x01\x63aaaaaaaaaaaaaaaaaaaaaaaa"] {
        let mut wire = server.connect();
        wire.send_raw(bytes);
        // More behind it must not turn the answer into a reset.
        wire.send_raw(&[7; 100_000]);
        let refusal = wire.next().expect("an answer comes before the end");
        assert!(matches!(refusal.reply(), Reply::Failure { .. }), "{:?}", refusal.reply());
        wire.finish();
        assert!(wire.is_ended());
    }
    let pong = other.request(&Request::Ping { stamp: 1 });
    assert!(matches!(pong.reply(), Reply::Pong { .. }));
}

#[test]
fn a_full_house_says_so() {
    let server = Server::start(&["--cores", "1", "--set", "store.kind=memory", "--set", "limits.connections_max=64"]);
    let mut inside: Vec<_> = (0..64).map(|_| server.connect()).collect();
    for wire in &mut inside {
        wire.request(&Request::Ping { stamp: 1 });
    }
    let mut late = server.connect();
    match late.push().reply() {
        Reply::Failure { code, retry_after_ms, .. } => {
            assert_eq!(code, ErrorCode::TooManyConnections);
            assert!(retry_after_ms > 0);
        }
        other => panic!("{other:?}"),
    }
    assert!(late.is_ended());
    // A place that is given back is taken again.
    let mut first = inside.remove(0);
    first.finish();
    assert!(first.is_ended());
    server.connect().request(&Request::Ping { stamp: 1 });
}

#[test]
fn bad_starts_say_what_to_do_in_one_line() {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = held.local_addr().unwrap().to_string();
    refused(&["--listen", &address], &[&address, "in use", "--listen"]);
    refused(&["--listen", "192.0.2.1:9700"], &["192.0.2.1:9700", "--listen"]);
    refused(&["--listen", "nonsense"], &["net.listen = nonsense", "flag --listen"]);
    refused(&["--cores", "0,4000"], &["core 4000", "does not exist", "--cores"]);
    refused(&["--cores", "1000"], &["1000 cores are wanted", "--cores"]);
    refused(&["--cores", "none"], &["cores = none", "flag --cores"]);
    refused(&["--set", "net.lisen=1"], &["unknown key \"net.lisen\"", "flag --set"]);
    refused(&["--set", "net.listen"], &["KEY=VALUE"]);
    refused(&["--set", "limits.frame_bytes_max=1"], &["limits.frame_bytes_max = 1", "4096 to 1048576"]);
    refused(&["--config", "/nowhere/ringline.toml"], &["/nowhere/ringline.toml"]);
    refused(&["--log", "loud"], &["log.level = loud", "error, warn, info"]);
    refused(&["--set", "auth.public_keys=/nowhere.pem"], &["/nowhere.pem"]);
}

#[test]
fn a_port_that_another_server_shares_is_in_use() {
    let server = Server::start(&["--cores", "1", "--set", "store.kind=memory"]);
    refused(&["--listen", &server.address], &[&server.address, "in use", "--listen"]);
}

#[test]
fn bad_data_folders_are_refused() {
    let server = Server::start(&["--cores", "1"]);
    let in_use = server.data_dir();
    refused(&["--data-dir", in_use.to_str().unwrap()], &["in use by process", &server.pid().to_string()]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    refused(&["--data-dir", file.to_str().unwrap()], &[file.to_str().unwrap()]);
    refused(&["--data-dir", "/proc/ringline"], &["/proc/ringline"]);
    std::fs::write(folder.path().join("diary.txt"), "").unwrap();
    refused(&["--data-dir", folder.path().to_str().unwrap()], &["other files"]);
}

#[test]
fn an_exposed_issuer_key_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let mut server = Server::start(&["--cores", "1"]);
    assert_eq!(server.stop(), Some(0));
    let key = server.data_dir().join("issuer.pem");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    refused(&["--data-dir", server.data_dir().to_str().unwrap()], &["issuer.pem", "chmod 600"]);
}

#[test]
fn the_machine_is_checked() {
    // prlimit changes the limits of the started process only.
    let folder = tempfile::tempdir().unwrap();
    let limited = |limit: &str| {
        let output = std::process::Command::new("prlimit")
            .args([limit, env!("CARGO_BIN_EXE_ringline"), "serve", "--listen", "127.0.0.1:0", "--cores", "1"])
            .args(["--data-dir", folder.path().join("data").to_str().unwrap()])
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text) = limited("--nofile=100:100");
    assert!(code == Some(1) && text.contains("open files are limited to 100") && text.contains("ulimit -n"), "{text}");
    let (code, text) = limited("--memlock=65536:65536");
    assert!(code == Some(1) && text.contains("locked memory is limited") && text.contains("ulimit -l"), "{text}");
}

/// Forbids `io_uring_setup` to this thread and everything it starts, as a container's seccomp profile does.
fn forbid_io_uring(errno: u32) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let rules = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

#[test]
fn without_io_uring_it_says_so() {
    for (errno, advice) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "kernel of")] {
        // A thread of its own: the filter can't be taken off again.
        let complaint = std::thread::spawn(move || {
            forbid_io_uring(errno as u32);
            refused(&["--cores", "1"], &["io_uring is not available", advice]);
        });
        complaint.join().unwrap();
    }
}

#[test]
fn fewer_open_files_lower_the_connections_with_a_warning() {
    let mut server = Server::start(&["--cores", "1", "--set", "limits.connections_max=10000000"]);
    assert!(server.log.iter().any(|line| line.contains("WARN") && line.contains("ulimit -n")), "{:?}", server.log);
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn the_printed_configuration_is_accepted_and_shown() {
    let defaults = run(&["config", "--defaults"]);
    assert!(defaults.status.success());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ringline.toml");
    std::fs::write(&file, &defaults.stdout).unwrap();
    let output = ringline()
        .env("RINGLINE_DEVICES_MAX", "3")
        .args(["config", "--show", "--config", file.to_str().unwrap(), "--cores", "1"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |key: &str| text.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    assert!(line("devices.max").contains("environment RINGLINE_DEVICES_MAX"), "{text}");
    assert!(line("cores").contains("flag --cores"), "{text}");
    assert!(line("net.listen").contains("ringline.toml"), "{text}");
    assert!(run(&["version"]).status.success());
    assert!(run(&["--help"]).status.success());
    assert!(!run(&[]).status.success());
}

#[test]
fn a_token_needs_a_key_and_a_good_name() {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().to_str().unwrap();
    let (code, text) = complaint(&["token", "--user", "ann", "--data-dir", data_dir]);
    assert!(code == 1 && text.contains("start the server once"), "{text}");
    let (code, text) = complaint(&["token", "--user", " ann", "--data-dir", data_dir]);
    assert!(code == 1 && text.contains("user name"), "{text}");
}
