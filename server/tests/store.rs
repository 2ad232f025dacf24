//! `ringline store` as a person uses it: what it prints, what it changes, and its exit codes.

mod common;

use common::{Server, run};
use ringline_schema::ids::Seq;
use ringline_schema::message::{BodyKind, ChatReply, ChatRequest, Class, Fetch, Mentions, Reply, Request, Send};

const MESSAGES: u64 = 50;

/// A stopped server with messages from ann to bob.
fn stopped() -> Server {
    let mut server = Server::start(&["--cores", "1"]);
    drop(server.login("bob", 2));
    let mut wire = server.login("ann", 1);
    for client_seq in 1..=MESSAGES {
        let body = format!("message {client_seq}");
        let send = Send {
            to: "bob",
            class: Class::Durable,
            kind: BodyKind::Text,
            client_seq,
            ack_timeout_ms: None,
            body: body.as_bytes(),
            mentions: Mentions::default(),
        };
        let answer = wire.request(&Request::Send(send));
        assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
    }
    assert_eq!(server.stop(), Some(0));
    server
}

/// Runs a command of `ringline store` on the server's folder: exit code and output.
fn store(server: &Server, arguments: &[&str]) -> (Option<i32>, String) {
    let data_dir = server.data_dir();
    let arguments = [&["store"], arguments, &["--data-dir", data_dir.to_str().unwrap()]].concat();
    let output = run(&arguments);
    (
        output.status.code(),
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
    )
}

#[test]
fn check_repair_and_export_of_a_stopped_server() {
    let mut server = stopped();
    let (code, text) = store(&server, &["check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &report["whole"], &report["messages"]), (Some(0), &true.into(), &MESSAGES.into()), "{text}");

    let (code, text) = store(&server, &["export"]);
    assert_eq!(code, Some(0), "{text}");
    let lines: Vec<serde_json::Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |kind: &str| lines.iter().filter(|line| line["type"] == kind).collect::<Vec<_>>();
    assert_eq!((of("user").len(), of("conversation").len(), of("message").len()), (2, 1, MESSAGES as usize), "{text}");
    assert_eq!((&of("message")[6]["body"], &of("message")[6]["seq"]), (&"message 7".into(), &7.into()));
    assert!(!text.contains("argon2"), "no password leaves the folder");

    let (code, text) = store(&server, &["export", "--user", "bob"]);
    let lines: Vec<serde_json::Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let types: Vec<_> = lines.iter().map(|line| line["type"].as_str().unwrap()).collect();
    assert_eq!((code, types[0], &lines[0]["name"]), (Some(0), "user", &"bob".into()), "{text}");
    assert_eq!(types.iter().filter(|kind| **kind == "message").count(), MESSAGES as usize);
    assert!(types.contains(&"row") && types.contains(&"conversation") && !text.contains("argon2"));
    let (code, text) = store(&server, &["export", "--user", "nobody"]);
    assert!(code == Some(1) && text.contains("NO_SUCH_USER"), "{text}");

    // One byte in the middle of the log.
    let log = server.data_dir().join("log/00/0000000001.log");
    let mut bytes = std::fs::read(&log).unwrap();
    let place = bytes.windows(10).position(|bytes| bytes == b"message 25").unwrap();
    bytes[place] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let (code, text) = store(&server, &["check"]);
    assert!(code == Some(2) && text.contains("0000000001.log at byte") && text.contains("--skip-damaged"), "{text}");
    let (code, text) = store(&server, &["repair"]);
    assert!(code == Some(2) && text.contains("nothing was changed"), "{text}");
    let (code, text) = store(&server, &["repair", "--skip-damaged"]);
    assert!(code == Some(0) && text.contains("messages 25 to 25 of conversation"), "{text}");
    let (code, text) = store(&server, &["check"]);
    assert!(code == Some(0) && text.contains("nothing is damaged"), "{text}");

    server.restart(None);
    let mut wire = server.login("bob", 2);
    let told = wire.request(&Request::Chat(ChatRequest::Export { cursor: "" }));
    let Reply::Chat(ChatReply::ExportOk { body, next: "" }) = told.reply() else { panic!("{:?}", told.reply()) };
    assert_eq!(body.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"{")).count(), lines.len());
    let (code, text) = store(&server, &["check"]);
    assert!(code == Some(1) && text.contains("is in use by"), "{text}");
}

#[test]
fn a_backup_of_a_running_server_starts() {
    let mut server = stopped();
    server.restart(None);
    let to = tempfile::tempdir().unwrap();
    let (code, text) = store(&server, &["backup", to.path().to_str().unwrap()]);
    assert!(code == Some(0) && text.contains("records"), "{text}");
    assert_eq!(server.stop(), Some(0));
    std::fs::remove_dir_all(server.data_dir()).unwrap();
    std::fs::rename(to.path(), server.data_dir()).unwrap();
    server.restart(None);
    let mut wire = server.login("ann", 3);
    let fetch = Fetch { with: "bob", after: Seq(0), before: None, limit: 1, newest: true };
    let page = wire.request(&Request::Fetch(fetch));
    let Reply::FetchOk { head, .. } = page.reply() else { panic!("{:?}", page.reply()) };
    assert_eq!(head.0, MESSAGES);
}
