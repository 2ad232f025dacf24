//! What the program leaves behind when it is ended in the middle: no server, no folder.
//!
//! Real processes: the program itself starts its own echo as the server, which is always there. Those that it started
//! are found by their working directory, which lies in a folder that only this test uses. Waits end when what is waited
//! for is there; a deadline only ends a test that has failed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Processes that work inside this folder.
fn processes_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let inside = |path: &PathBuf| std::fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
    entries.filter(inside).collect()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// A comparison that would take minutes, its server's folder there and its server up.
fn long_run() -> (Child, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_ringline-bench"))
        .args(["compare", "--with", "floor", "--ringline", "/nowhere/ringline", "--points", "2x1", "--duration", "300"])
        .args(["--server-cores", "0", "--cores", "0", "--data-dir"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("its server runs", || !processes_in(folder.path()).is_empty());
    (child, folder)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_signal_ends_the_servers_and_removes_their_folders() {
    for (number, of) in [(15, Signal::TERM), (2, Signal::INT)] {
        let (mut child, folder) = long_run();
        signal(&child, of);
        assert_eq!(child.wait().unwrap().code(), Some(128 + number));
        assert_eq!(processes_in(folder.path()), Vec::<PathBuf>::new());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "its folder is removed");
    }
}

#[test]
fn a_kill_that_cannot_be_caught_ends_the_servers_too() {
    let (mut child, folder) = long_run();
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    wait_until("its server has ended", || processes_in(folder.path()).is_empty());
}
