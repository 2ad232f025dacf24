//! The server under torture: one data folder and port over many lives of the process.
//!
//! Used by the main thread, whose end takes the process with it (`PR_SET_PDEATHSIG`, set by `setpriv`). Invariant: at
//! most one process lives, and none is left when this is dropped.

use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::failed;
use super::traffic::{ADMIN, user_name};
use crate::Failure;
use crate::launch::STAY_WITH_PARENT;

/// How long a server may take until it listens, and until it has ended in order.
const START_TIME: Duration = Duration::from_secs(60);
const STOP_TIME: Duration = Duration::from_secs(60);
/// Below those that the kernel gives to clients: a client that dials such a port while nobody listens there may be
/// connected to itself, and then the server can't have it.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
const TRIES: usize = 100;
/// A server calls its disk full when so much less is free than when it was started …
const ROOM_BYTES: u64 = 1 << 30;
/// … and the file that brings that about is larger, whatever else is written meanwhile.
const BALLAST_BYTES: u64 = 2 * ROOM_BYTES;
/// Little is kept, so that it is let go all the time: the newest of each conversation, in small files.
const RETENTION: [&str; 6] =
    ["--set", "retention.messages=150", "--set", "retention.interval_ms=1000", "--set", "store.segment_bytes=262144"];
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// See the module.
pub struct Server {
    program: PathBuf,
    folder: PathBuf,
    target: SocketAddr,
    child: Option<Child>,
}

impl Server {
    pub fn new(program: PathBuf, folder: PathBuf) -> Result<Self, Failure> {
        let program = std::path::absolute(program).map_err(|error| failed("the server's path", &error))?;
        let ports = (0..TRIES).map(|_| rand::random_range(PORTS));
        let target =
            ports.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))).find(|at| TcpListener::bind(at).is_ok());
        let target = target.ok_or_else(|| failed("no free port", &format!("{PORTS:?}")))?;
        Ok(Self { program, folder, target, child: None })
    }

    pub fn target(&self) -> SocketAddr {
        self.target
    }

    /// Where the server writes its key at its first start.
    pub fn issuer_key(&self) -> PathBuf {
        self.folder.join("data/issuer.pem")
    }

    /// Takes so much of the disk that the server has to call it full. False: there is not that much to take.
    pub fn fill_disk(&self) -> bool {
        let file = File::create(self.ballast());
        let filled = file.is_ok_and(|file| fallocate(&file, FallocateFlags::empty(), 0, BALLAST_BYTES).is_ok());
        if !filled {
            self.free_disk();
        }
        filled
    }

    pub fn free_disk(&self) {
        // Fails only when it is not there.
        let _ = std::fs::remove_file(self.ballast());
    }

    fn ballast(&self) -> PathBuf {
        self.folder.join("ballast")
    }

    /// Below so many free bytes the server takes nothing more: needs no right and no file system of its own.
    fn free_bytes_min(&self) -> u64 {
        let free = statvfs(&self.folder).map_or(0, |there| there.f_bavail.saturating_mul(there.f_frsize));
        free.saturating_sub(ROOM_BYTES)
    }

    /// Starts it and waits until it listens. Errors: it ended, or took too long; its log says why.
    pub async fn start(&mut self, cores: u16) -> Result<(), Failure> {
        let deadline = Instant::now() + START_TIME;
        // The kernel lets go of a killed process's rings, and of the sockets in them, a moment after the process is gone.
        while TcpStream::connect(self.target).await.is_ok() && Instant::now() < deadline {
            sleep(BETWEEN_TRIES).await;
        }
        let log = OpenOptions::new().create(true).append(true).open(self.folder.join("output.log"));
        let log = log.map_err(|error| failed("cannot write the server's log", &error))?;
        let other = log.try_clone().map_err(|error| failed("cannot write the server's log", &error))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "sh", "-c", STAY_WITH_PARENT, &std::process::id().to_string()])
            .arg(&self.program)
            .args(["serve", "--listen", &self.target.to_string(), "--cores", &cores.to_string(), "--log", "error"])
            .arg("--data-dir")
            .arg(self.folder.join("data"))
            .args(["--set", &format!("store.free_bytes_min={}", self.free_bytes_min())])
            .args(RETENTION)
            .args(["--set", &format!("auth.admins={}", user_name(ADMIN))])
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(other)
            .spawn();
        self.child = Some(child.map_err(|error| failed("cannot start setpriv (util-linux)", &error))?);
        while Instant::now() < deadline {
            if TcpStream::connect(self.target).await.is_ok() && self.issuer_key().exists() {
                return Ok(());
            }
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                return Err(failed("the server did not start", &format!("{status}: {}", self.last_words())));
            }
            sleep(BETWEEN_TRIES).await;
        }
        Err(failed("the server did not start in time", &self.last_words()))
    }

    fn last_words(&self) -> String {
        const LINES: usize = 5;
        let text = std::fs::read_to_string(self.folder.join("output.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(LINES).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only when it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), Failure> {
        let Some(child) = &self.child else { return Ok(()) };
        kill_process(Pid::from_child(child), signal).map_err(|error| failed("cannot signal the server", &error))
    }

    pub fn freeze(&self) -> Result<(), Failure> {
        self.signal(Signal::STOP)
    }

    pub fn thaw(&self) -> Result<(), Failure> {
        self.signal(Signal::CONT)
    }

    /// SIGTERM, and waits. Errors: it did not end in time, or not with 0.
    pub async fn stop(&mut self) -> Result<(), Failure> {
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + STOP_TIME;
        while Instant::now() < deadline {
            match self.child.as_mut().map(Child::try_wait) {
                Some(Ok(None)) => sleep(BETWEEN_TRIES).await,
                Some(Ok(Some(status))) => {
                    self.child = None;
                    let text = || format!("{status}: {}", self.last_words());
                    // In the moment between listening and watching for signals it is a kill, which must lose nothing either.
                    let unheard = status.signal() == Some(Signal::TERM.as_raw());
                    return if status.success() || unheard {
                        Ok(())
                    } else {
                        Err(failed("an orderly stop ended with", &text()))
                    };
                }
                Some(Err(_)) | None => return Ok(()),
            }
        }
        Err(failed("the server did not stop in time", &self.last_words()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
