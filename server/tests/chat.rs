//! `ringline chat` as people use it: processes at pipes, each with a user of its own, and a real server.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use common::{PATIENCE, Server, ringline};

const README: &str = include_str!("../../README.md");

/// A person at a prompt; gone when dropped.
struct Person {
    chat: Child,
    /// `None`: it was closed.
    keyboard: Option<ChildStdin>,
    lines: Receiver<String>,
    /// Lines that nobody has looked for yet.
    unread: Vec<String>,
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ = self.chat.kill();
        let _ = self.chat.wait();
    }
}

impl Person {
    fn sit_down(server: &Server, name: &str) -> Self {
        let device_file = server.data_dir().with_file_name(name);
        let mut chat = ringline()
            .args(["chat", "--server", &server.address, "--user", name, "--register", "--password-stdin"])
            .args(["--device-file", device_file.to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (keyboard, screen) = (chat.stdin.take(), BufReader::new(chat.stdout.take().unwrap()));
        let (sender, lines) = channel();
        std::thread::spawn(move || screen.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut person = Self { chat, keyboard, lines, unread: Vec::new() };
        person.types("a secret of theirs");
        person.reads(&format!("logged in as {name}"));
        person
    }

    fn types(&mut self, line: &str) {
        writeln!(self.keyboard.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits for a line with this text, and gives it. Lines before it may still be looked for.
    fn reads(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.unread.iter().position(|line| line.contains(text)) {
                return self.unread.remove(at);
            }
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            self.unread.push(line.unwrap_or_else(|_| panic!("no line with {text:?}:\n{}", self.unread.join("\n"))));
        }
    }

    /// The same for the answer to a command.
    fn asks(&mut self, line: &str, answer: &str) -> String {
        self.types(line);
        self.reads(answer)
    }

    /// Leaves with Ctrl-D.
    fn leaves(mut self) {
        self.keyboard = None;
        assert!(self.chat.wait().unwrap().success());
    }
}

#[test]
fn the_five_lines_of_the_readme_are_a_group_chat() {
    let typed: Vec<_> = README.lines().filter_map(|line| line.split_once("> ")).collect();
    let typed: Vec<_> = typed.into_iter().filter(|(who, _)| matches!(*who, "ann" | "bob")).collect();
    let shown: [(&str, &[&str], &[&str]); 5] = [
        ("ann", &["✓ #team"], &[]),
        ("ann", &["✓ #team"], &["ann invites you to #team (The team): /group join #team"]),
        ("bob", &["#team * bob joined"], &["✓ #team"]),
        ("bob", &["#team bob: hello everybody"], &["✓ 3"]),
        ("ann", &["✓ 4"], &["#team ann: welcome"]),
    ];
    assert_eq!(typed.len(), shown.len(), "{typed:?}");
    let server = Server::start(&["--cores", "2"]);
    let (mut ann, mut bob) = (Person::sit_down(&server, "ann"), Person::sit_down(&server, "bob"));
    for ((who, line), (whose, at_ann, at_bob)) in typed.into_iter().zip(shown) {
        assert_eq!(who, whose, "{line}");
        if who == "ann" {
            ann.types(line)
        } else {
            bob.types(line)
        }
        at_ann.iter().for_each(|text| _ = ann.reads(text));
        at_bob.iter().for_each(|text| _ = bob.reads(text));
    }
    ann.leaves();
    bob.leaves();
}

#[test]
fn a_group_by_approval_is_run_from_the_prompt() {
    let server = Server::start(&["--cores", "2"]);
    let (mut ann, mut bob) = (Person::sit_down(&server, "ann"), Person::sit_down(&server, "bob"));
    ann.asks("/group create-approval #club The club", "✓ #club");
    ann.asks("/group pending #club", "nobody is invited, and nobody asks to join");
    bob.asks("/group join #club let me in", "✓ #club: asked to join");
    let row = bob.asks("/conversations", "  #club: ");
    assert!(row.contains("you have asked to join"), "{row}");
    ann.reads("bob says \"let me in\" and asks to join #club: /group approve #club bob");
    ann.asks("/group pending #club", "  bob asks to join");
    ann.asks("/group approve #club bob", "✓ #club");
    bob.reads("#club * ann let in bob");
    ann.asks("/group members #club", "  bob");
    // A mention reaches whom it names, all may only be mentioned by who runs the group, and the sender sees who has it.
    ann.asks("/msg #club hello @bob, and others", "✓ 3");
    bob.reads("#club ann: hello @bob, and others (mentions you)");
    bob.asks("/msg #club @all hello", "✗ to #club: this user may not do that");
    ann.asks("@all look", "✓ 4");
    bob.reads("#club ann: @all look (mentions you)");
    // His client acknowledges a moment after it is on his screen.
    let deadline = Instant::now() + PATIENCE;
    let mut row = String::new();
    while row != "  bob has received it" {
        assert!(Instant::now() < deadline, "{row}");
        ann.asks("/seen #club 4", "message 4: received by ");
        row = ann.reads("  bob ");
    }
    bob.asks("/group policy #club open", "✗ #club: ");
    ann.asks("/group policy #club open", "✓ #club");
    bob.reads("#club * ann changed who may join");
    bob.asks("/group info #club", "The club: 2 members, owner ann, open");
    let mut cid = Person::sit_down(&server, "cid");
    cid.asks("/group join #club", "✓ #club");
    cid.asks("/group members #club", "  cid");
    for person in [ann, bob, cid] {
        person.leaves();
    }
}
