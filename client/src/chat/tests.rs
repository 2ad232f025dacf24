//! The chat on a pipe against the fake server.

mod commands;

use std::io::{PipeWriter, pipe};
use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{FakeServer, Trick};

const PASSWORD: &str = "secret word";

/// What the chat has printed, and a place to type.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    async fn wait_for(&self, wanted: &str) {
        let found = async {
            while !self.text().contains(wanted) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(20), found).await;
        assert!(found.is_ok(), "no {wanted:?} in:\n{}", self.text());
    }
}

struct Seat {
    keyboard: PipeWriter,
    output: Output,
    chat: tokio::task::JoinHandle<Result<(), ChatError>>,
}

impl Seat {
    fn types(&mut self, text: &str) {
        writeln!(self.keyboard, "{text}").unwrap();
    }

    /// Closes the input and gives what was printed.
    async fn leave(self) -> String {
        drop(self.keyboard);
        self.chat.await.unwrap().unwrap();
        self.output.text()
    }
}

async fn sit_down(server: &FakeServer, name: &str, device: u64) -> Seat {
    server.add_user(name, PASSWORD);
    let builder = Client::builder(server.address()).user(name).password(PASSWORD).device(DeviceId(device));
    let (client, events) = log_in(builder, false, |_| false).await.unwrap();
    let (reader, keyboard) = pipe().unwrap();
    let output = Output::default();
    let (screen, lines) = (output.clone(), read_lines(io::BufReader::new(reader)));
    let local = tokio::task::spawn_local(async move {
        Chat::new(client, stream_screen(screen), false).converse(events, lines).await
    });
    output.wait_for("logged in as").await;
    Seat { keyboard, output, chat: local }
}

fn in_one_thread(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

#[test]
fn two_people_talk() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let (mut ann, mut bob) = (sit_down(&server, "ann", 1).await, sit_down(&server, "bob", 2).await);
        ann.types("hello?");
        ann.output.wait_for("to whom?").await;
        ann.types("/msg bob hello");
        bob.output.wait_for(" ann: hello\n").await;
        ann.output.wait_for("✓ 1\n").await;
        bob.types("/to ann");
        bob.types("hello yourself");
        ann.output.wait_for(" bob: hello yourself\n").await;
        ann.types("/who");
        ann.output.wait_for("  ann\n  bob\n").await;
        ann.types("/history bob 1");
        ann.output.wait_for("  2023-11-14").await;
        ann.types("/nonsense");
        ann.output.wait_for("no command /nonsense").await;
        ann.types("/conversations");
        ann.output.wait_for("  bob: 2 messages").await;
        ann.types("/msg carl hi");
        ann.output.wait_for("✗ to carl: there is no such user").await;
        ann.types("/quit");
        ann.chat.await.unwrap().unwrap();
        let bob = bob.leave().await;
        assert_eq!(bob.matches("hello\n").count(), 1, "{bob}");
    });
}

#[test]
fn what_came_while_away_is_shown_once_and_talking_to_oneself_works() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        for name in ["ann", "bob"] {
            server.add_user(name, PASSWORD);
        }
        for text in ["one", "two", "three"] {
            server.store("bob", "ann", text);
        }
        let mut ann = sit_down(&server, "ann", 1).await;
        ann.output.wait_for("3 messages while you were away\n").await;
        ann.output.wait_for("bob: three\n").await;
        ann.types("/msg ann note to myself");
        ann.output.wait_for(" ann: note to myself\n").await;
        ann.leave().await;
        let again = sit_down(&server, "ann", 1).await.leave().await;
        assert!(!again.contains("away") && !again.contains("three"), "{again}");
    });
}

#[test]
fn a_lost_connection_is_told_and_what_was_typed_meanwhile_is_sent() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        server.add_user("bob", PASSWORD);
        let mut ann = sit_down(&server, "ann", 1).await;
        server.trick(Trick::BreakBeforeStore);
        ann.types("/msg bob hello");
        ann.output.wait_for("reconnecting … (attempt 1, next try in 0.").await;
        ann.types("are you there?");
        ann.output.wait_for("connected again\n").await;
        ann.output.wait_for("✓ 2\n").await;
        assert_eq!(server.stored("ann", "bob"), ["hello", "are you there?"]);
        server.kick("ann");
        ann.output.wait_for("another login").await;
        assert!(matches!(ann.chat.await.unwrap(), Err(ChatError::Closed(CloseReason::Kicked { .. }))));
    });
}

#[test]
fn an_unknown_user_is_offered_to_register() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let builder = || Client::builder(server.address()).user("ann").password(PASSWORD);
        assert!(matches!(log_in(builder(), false, |_| false).await, Err(ChatError::NoLogin)));
        let question = |text: &str| text.contains("Register 'ann' as a new user? [y/N]");
        assert!(log_in(builder(), false, question).await.is_ok());
        assert!(log_in(builder(), true, |_| false).await.is_ok(), "--register works twice");
        let wrong = builder().password("another word");
        assert!(matches!(log_in(wrong, false, |_| true).await, Err(ChatError::WrongPassword)));
    });
}

#[test]
fn text_of_others_cannot_command_the_terminal() {
    assert_eq!(clean("a\u{1b}[2Jb\u{9b}31mc\rd\u{7f}\0"), "a\u{fffd}[2Jb\u{fffd}31mc\u{fffd}d\u{fffd}\u{fffd}");
    assert_eq!(clean("one\ntwo\tthree"), "one ⏎ two three");
    assert_eq!(clean("abc\u{202e}cba\u{2066}"), "abc\u{fffd}cba\u{fffd}");
    assert_eq!(clean("Jürgen 老师 👩‍👩‍👧"), "Jürgen 老师 👩‍👩‍👧");
}

#[test]
fn a_device_keeps_its_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state/ringline/device-ann");
    let device = load_device(&path).unwrap();
    assert_ne!(device.0, 0);
    assert_eq!(load_device(&path).unwrap(), device);
    fs::write(&path, "soup").unwrap();
    assert_eq!(load_device(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn names_lines_and_passwords_are_read() {
    assert_eq!(split_name("bob hello  there "), ("bob", "hello  there"));
    assert_eq!(split_name("\"Jürgen 老师\" hallo"), ("Jürgen 老师", "hallo"));
    assert_eq!(split_name("bob"), ("bob", ""));
    assert_eq!(first_line(&b"secret word\r\nnext"[..]).unwrap(), "secret word");
    assert_eq!(first_line(&b""[..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    let mut long = &b"abcdef\n"[..];
    assert_eq!(read_line(&mut long, 4).unwrap().as_deref(), Some("abcd"));
    assert_eq!(read_line(&mut long, 4).unwrap().as_deref(), Some("ef"));
    assert_eq!(read_line(&mut long, 4).unwrap(), None);
}

#[test]
fn what_was_said_is_edited_taken_back_and_deleted() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let (mut ann, mut bob) = (sit_down(&server, "ann", 1).await, sit_down(&server, "bob", 2).await);
        ann.types("/edit 1 before there is anybody");
        ann.output.wait_for("/edit N TEXT, /recall N").await;
        ann.types("/msg bob helo");
        ann.types("secret");
        ann.types("silly");
        ann.output.wait_for("✓ 3\n").await;
        for wrong in ["/edit x y", "/edit 1", "/recall 1 2", "/delete 1 some"] {
            ann.types(wrong);
        }
        ann.types("/edit 1 hello");
        bob.output.wait_for("* ann has changed 1: hello\n").await;
        ann.types("/recall 2");
        bob.output.wait_for("* ann has taken back 2\n").await;
        ann.types("/delete 3 all");
        bob.output.wait_for("* ann has deleted 3\n").await;
        ann.types("/recall 77");
        ann.output.wait_for("✗ to bob: there is no such message").await;
        bob.types("/to ann");
        bob.types("/delete 1");
        bob.output.wait_for("deleted for you\n").await;
        ann.types("/history bob");
        ann.output.wait_for("→ bob: hello (edited)  [1]\n").await;
        ann.output.wait_for("→ bob: [taken back]  [2]\n").await;
        ann.output.wait_for("→ bob: [deleted]  [3]\n").await;
        bob.types("/history ann");
        bob.output.wait_for("[deleted]  [3]\n").await;
        let (ann, bob) = (ann.leave().await, bob.leave().await);
        assert_eq!(ann.matches("/edit N TEXT, /recall N").count(), 5, "{ann}");
        assert!(!bob.contains("[1]\n") && !bob.contains("Amendment"), "{bob}");
    });
}

#[test]
fn what_is_kept_about_a_user_goes_into_a_new_file() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ann.jsonl");
        let mut ann = sit_down(&server, "ann", 1).await;
        ann.types(&format!("/export {}", file.display()));
        ann.output.wait_for("2 lines in").await;
        assert_eq!(fs::read_to_string(&file).unwrap(), "{\"type\":\"user\",\"name\":\"ann\"}\n{\"type\":\"row\"}\n");
        ann.types(&format!("/export {}", file.display()));
        ann.output.wait_for("File exists").await;
        ann.types("/export");
        ann.output.wait_for("/export FILE").await;
        ann.leave().await;
    });
}

#[test]
fn who_is_there_is_shown_with_what_they_say_and_who_types_is_told() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        let (mut ann, bob) = (sit_down(&server, "ann", 1).await, sit_down(&server, "bob", 2).await);
        server.status("bob", "at lunch \u{1b}[2J");
        ann.types("/who");
        ann.output.wait_for("  ann\n  bob: at lunch \u{fffd}[2J\n").await;
        ann.types("/to bob");
        ann.types("/typing");
        bob.output.wait_for("ann is typing …\n").await;
        let said = ann.leave().await;
        assert!(!said.contains("bob is online"), "nobody is watched: {said}");
    });
}

#[test]
fn an_account_is_deleted_after_its_name_and_password_were_typed() {
    in_one_thread(async {
        let server = FakeServer::start().await.unwrap();
        for name in ["ann", "bob"] {
            server.add_user(name, PASSWORD);
        }
        let mut ann = sit_down(&server, "ann", 1).await;
        ann.types("/delete-account everything");
        ann.output.wait_for("recall, or nothing").await;
        ann.types("/delete-account");
        ann.output.wait_for("stay with those who have them").await;
        ann.types("yes");
        ann.output.wait_for("nothing was deleted").await;
        ann.types("/delete-account recall");
        ann.output.wait_for("the messages are taken back").await;
        ann.types("ann");
        ann.output.wait_for("the password").await;
        ann.types("wrong");
        ann.output.wait_for(ErrorCode::AuthFailed.text()).await;
        ann.types("/delete-user bob");
        ann.output.wait_for("bob is deleted for ever").await;
        ann.types("bob");
        ann.output.wait_for("deleted\n").await;
        ann.types("/delete-account");
        ann.types("ann");
        ann.types(PASSWORD);
        ann.output.wait_for("this user was deleted").await;
        let kicked = CloseReason::Kicked { reason: crate::KickReason::UserDeleted, detail: String::new() };
        assert!(matches!(ann.chat.await.unwrap(), Err(ChatError::Closed(reason)) if reason == kicked));
    });
}
