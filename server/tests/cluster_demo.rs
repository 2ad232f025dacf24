//! `ringline cluster demo` as a person uses it: the lines that it prints are run, and nothing is left behind.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{PATIENCE, ringline};

/// A demo that has said how to connect. Ended when dropped.
struct Demo {
    child: Child,
    /// What it printed, by lines.
    said: Vec<String>,
}

impl Demo {
    fn start(arguments: &[&str], temporary: &Path) -> Self {
        let mut command = ringline();
        command.args(["cluster", "demo"]).args(arguments).env("TMPDIR", temporary);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut said: Vec<String> = Vec::new();
        while !said.last().is_some_and(|line| line.starts_with("Ctrl-C")) {
            let Some(line) = lines.next() else {
                let mut error = String::new();
                child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
                panic!("the demo ended: {error}\n{}", said.join("\n"));
            };
            said.push(line);
        }
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, said }
    }

    /// The arguments of the command for a user, as printed.
    fn chat_line(&self, user: &str) -> Vec<String> {
        let wanted = format!("--user {user} ");
        let line = self.said.iter().find(|line| line.contains(&wanted)).expect("a line for the user");
        let command = line.split('#').next().unwrap();
        command.split_whitespace().skip(1).map(str::to_owned).collect()
    }

    /// Addresses of the clients' ports.
    fn addresses(&self) -> Vec<String> {
        let rows = self.said.iter().skip_while(|line| !line.starts_with("NODE")).skip(1);
        let rows = rows.take_while(|line| !line.is_empty());
        rows.map(|row| row.split_whitespace().nth(1).unwrap().to_owned()).collect()
    }

    /// Its exit code and what it complained of.
    fn wait(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the demo does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut error = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        (self.child.wait().unwrap().code(), error)
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal("TERM");
            let _ = self.child.wait();
        }
    }
}

/// Runs a chat to the end of its input; what it printed.
fn chat(arguments: &[String], input: &str) -> String {
    let mut command = ringline();
    let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The process that was started with this configuration.
fn process_of(config: &Path) -> u32 {
    let config = config.to_str().unwrap();
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == config.as_bytes())
    };
    pids.find(serves).expect("a node runs")
}

/// Ends it by a signal: in order, its folder goes and nobody answers at these addresses any more.
fn leaves_nothing(mut demo: Demo, signal: &str, temporary: &Path, addresses: &[String]) {
    demo.signal(signal);
    let (code, error) = demo.wait();
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert_eq!(std::fs::read_dir(temporary).unwrap().count(), 0, "the folder is removed");
    for address in addresses {
        assert!(TcpStream::connect(address).is_err(), "{address} is still served");
    }
}

#[test]
fn what_it_prints_works_and_nothing_is_left_behind() {
    let temporary = tempfile::tempdir().unwrap();
    let demo = Demo::start(&["--nodes", "3"], temporary.path());
    let (ann, bob, addresses) = (demo.chat_line("ann"), demo.chat_line("bob"), demo.addresses());
    assert_eq!(addresses.len(), 3, "{}", demo.said.join("\n"));
    // A token makes its user at the first login.
    chat(&bob, "");
    chat(&ann, "/msg bob hello from ann\n");
    let read = chat(&bob, "/history ann\n");
    assert!(read.contains("hello from ann"), "{read}");
    leaves_nothing(demo, "INT", temporary.path(), &addresses);
}

#[test]
fn when_a_node_ends_all_are_stopped_and_a_given_folder_serves_again() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("kept");
    let arguments = ["--nodes", "2", "--dir", folder.to_str().unwrap()];
    let mut demo = Demo::start(&arguments, temporary.path());
    let addresses = demo.addresses();
    let ann = demo.chat_line("ann");
    chat(&ann, "/msg ann kept\n");
    let killed = process_of(&folder.join("b.toml")).to_string();
    assert!(Command::new("kill").args(["-9", &killed]).status().unwrap().success());
    let (code, error) = demo.wait();
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("node b has ended (signal: 9") && error.contains("ready on"), "{error}");
    for address in addresses {
        assert!(TcpStream::connect(&address).is_err(), "{address} is still served");
    }
    let mut again = Demo::start(&arguments, temporary.path());
    let read = chat(&again.chat_line("ann"), "/history ann\n");
    assert!(read.contains("kept"), "{read}");
    again.signal("TERM");
    assert_eq!(again.wait().0, Some(0));
    assert!(folder.join("certs/ca.pem").exists());
}

/// The arguments of a printed command that begins like this.
fn printed(demo: &Demo, command: &str) -> Vec<String> {
    let line = demo.said.iter().find(|line| line.contains(command)).expect("the command is printed");
    line.split('#').next().unwrap().split_whitespace().skip(1).map(str::to_owned).collect()
}

#[test]
fn slow_a_demo_of_etcd_starts_and_stops_what_it_needs() {
    let temporary = tempfile::tempdir().unwrap();
    // The user that runs PostgreSQL has to get through.
    std::fs::set_permissions(temporary.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let demo = Demo::start(&["--nodes", "2", "--mode", "etcd"], temporary.path());
    let (ann, bob) = (demo.chat_line("ann"), demo.chat_line("bob"));
    chat(&bob, "");
    chat(&ann, "/msg bob hello from ann\n");
    let run = |arguments: &[String]| ringline().args(arguments).output().unwrap();
    let told = run(&printed(&demo, "cluster partitions"));
    assert_eq!(told.status.code(), Some(0), "{told:?}");
    let told = run(&printed(&demo, "cluster drain b"));
    assert!(told.status.success() && String::from_utf8_lossy(&told.stdout).contains("b owns nothing"), "{told:?}");
    let read = chat(&bob, "/history ann\n");
    assert!(read.contains("hello from ann"), "{read}");
    let mut addresses = demo.addresses();
    let services = demo.said.iter().find(|line| line.starts_with("etcd is at")).unwrap();
    let ports = services.split("127.0.0.1:").skip(1).map(|rest| rest.split([',', ' ']).next().unwrap());
    addresses.extend(ports.map(|port| format!("127.0.0.1:{port}")));
    assert_eq!(addresses.len(), 4, "{services}");
    leaves_nothing(demo, "TERM", temporary.path(), &addresses);
}

#[test]
fn a_demo_of_etcd_without_etcd_says_how_it_is_installed() {
    let empty = tempfile::tempdir().unwrap();
    let mut command = ringline();
    let output = command.args(["cluster", "demo", "--mode", "etcd"]).env("PATH", empty.path()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.contains("apt install etcd-server"), "{error}");
}

#[test]
fn a_cluster_is_refused_that_would_not_fit_or_has_no_room() {
    let (code, text) = common::complaint(&["cluster", "demo", "--nodes", "8"]);
    assert!(code == 2 && text.contains("1..=7"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, text) = common::complaint(&["cluster", "demo", "--dir", file.to_str().unwrap()]);
    assert!(code == 1 && text.contains("file"), "{text}");
}
