//! Servers that this program starts: pinned, on free loopback ports, each with a folder of its own, and none left over.
//!
//! Started by the main thread; a thread of its own waits for SIGTERM and SIGINT. Invariants: every server is in
//! [`STARTED`] from its start to its end, so that a signal ends all of them and removes their folders before this program
//! ends; a signal that comes while one is being started waits until it is there. A kill that cannot be caught (SIGKILL)
//! ends them too, because the kernel tells each child (`PR_SET_PDEATHSIG`, set by `setpriv`); only folders stay then.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

use crate::metrics::Source;
use crate::token::Issuer;
use crate::{Failure, server_process};

/// How long a server may take until it listens, and until it has ended.
const START_TIME: Duration = Duration::from_secs(30);
const STOP_TIME: Duration = Duration::from_secs(10);
/// What a server prints, in its folder.
const LOG: &str = "output.log";
const BETWEEN_TRIES: Duration = Duration::from_millis(20);
/// A shell's exit code for "ended by signal n" is this plus n.
const SIGNAL_EXIT_BASE: i32 = 128;

/// What starts one server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe {
    pub arguments: Vec<String>,
    pub environment: Vec<(&'static str, String)>,
    /// Name in the server's folder, and text.
    pub file: Option<(&'static str, String)>,
}

/// Where one server runs.
pub struct Place<'a> {
    pub folder: &'a str,
    pub port: &'a str,
    /// For the metrics of a server that has them.
    pub admin_port: &'a str,
    pub cores: usize,
}

/// Who is started, on which cores, with its folder in which other.
#[derive(Clone, Copy)]
pub struct Order<'a> {
    /// For messages.
    pub name: &'a str,
    pub program: &'a Path,
    pub cores: &'a [usize],
    pub parent: &'a Path,
}

/// A process and its folder. Stopped and removed when dropped.
struct Started {
    child: Child,
    /// Removed after the process has ended.
    _folder: TempDir,
}

/// All servers that run now.
static STARTED: Mutex<Vec<Started>> = Mutex::new(Vec::new());

fn started() -> MutexGuard<'static, Vec<Started>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server that was started here. Stopped, and its folder removed, when dropped.
pub struct Running {
    child_id: u32,
    pub target: SocketAddr,
    /// The port that was kept for its metrics, as [`Place::admin_port`].
    pub admin: SocketAddr,
    /// Its metrics page, if it was told to have one. Set by whoever told it.
    pub metrics: Option<Source>,
    /// The process that listens; CPU time and memory are its.
    pub pid: u32,
    folder: PathBuf,
    again: Again,
}

/// What starts the same server once more.
struct Again {
    name: String,
    program: PathBuf,
    cores: Vec<usize>,
    recipe: Recipe,
}

/// Starts a server and waits until it listens.
///
/// Errors: with its name, and its last words if it had any.
pub fn start(order: Order<'_>, recipe: impl FnOnce(&Place<'_>) -> Recipe) -> Result<Running, Failure> {
    let failed =
        |what: &str, error: &dyn std::fmt::Display| Failure::Failed(format!("{}: {what}: {error}", order.name));
    watch_signals().map_err(|error| failed("cannot watch for signals", &error))?;
    // The server works in its own folder, where a relative path would mean something else.
    let absolute = |path: &Path| std::path::absolute(path).map_err(|error| failed("its path", &error));
    let (program, parent) = (absolute(order.program)?, absolute(order.parent)?);
    let folder = tempfile::Builder::new().prefix("ringline-bench-").tempdir_in(parent);
    let folder = folder.map_err(|error| failed("cannot make a data folder", &error))?;
    let [target, admin] = free_addresses().map_err(|error| failed("no free port", &error))?;
    let (path, port, admin_port) = (folder.path().to_owned(), target.port().to_string(), admin.port().to_string());
    let place =
        Place { folder: &path.to_string_lossy(), port: &port, admin_port: &admin_port, cores: order.cores.len() };
    let recipe = recipe(&place);
    if let Some((name, text)) = &recipe.file {
        std::fs::write(path.join(name), text).map_err(|error| failed("cannot write its settings", &error))?;
    }
    let log = File::create(path.join(LOG)).and_then(|log| Ok((log.try_clone()?, log)));
    let log = log.map_err(|error| failed("cannot write its log", &error))?;
    let mut list = started();
    let again = Again { name: order.name.to_owned(), program, cores: order.cores.to_vec(), recipe };
    let child = command(&again, (&path, log)).spawn();
    let child = child.map_err(|error| failed("cannot start setpriv (util-linux)", &error))?;
    let pid = child.id();
    let mut running = Running { child_id: pid, target, admin, pid, metrics: None, folder: path, again };
    list.push(Started { child, _folder: folder });
    drop(list);
    running.wait_until_it_listens()?;
    Ok(running)
}

/// Run by a shell between `setpriv` and the server: who asked the kernel to be told of its parent's end when that had come
/// already is never told, so it looks whose child it is.
pub const STAY_WITH_PARENT: &str = r#"[ "$PPID" = "$0" ] && exec "$@""#;

/// `setpriv` has the kernel end the server with the thread that started it; `taskset` pins it. All become the server by
/// `exec`. A process group of its own: what the server starts itself is reached through it, and Ctrl-C is for us only.
fn command(again: &Again, (folder, (out, err)): (&Path, (File, File))) -> Command {
    let cores = again.cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM", "sh", "-c", STAY_WITH_PARENT, &std::process::id().to_string()])
        .args(["taskset", "--cpu-list", &cores])
        .arg(&again.program)
        .args(&again.recipe.arguments)
        .envs(again.recipe.environment.iter().map(|(name, value)| (*name, value)))
        .current_dir(folder)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err);
    command
}

/// Two ports that nobody listens on now.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let (one, other) = (listen()?, listen()?);
    Ok([one.local_addr()?, other.local_addr()?])
}

/// From the first call on SIGTERM and SIGINT stop every server before they end this program.
fn watch_signals() -> std::io::Result<()> {
    static WATCHED: OnceLock<()> = OnceLock::new();
    if WATCHED.get().is_some() {
        return Ok(());
    }
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let body = move || {
        let Some(signal) = signals.forever().next() else { return };
        // Held to the end: no server is started any more.
        let mut list = started();
        list.clear();
        std::process::exit(SIGNAL_EXIT_BASE.saturating_add(signal));
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(body)?;
    let _ = WATCHED.set(());
    Ok(())
}

impl Running {
    /// Stops it and starts it again on the same folder and port: what it held in memory alone is gone.
    ///
    /// Errors: as from [`start`].
    pub fn restart(&mut self) -> Result<(), Failure> {
        let name = self.again.name.clone();
        let failed = |error: &dyn std::fmt::Display| Failure::Failed(format!("{name}: cannot start again: {error}"));
        let log = File::options().append(true).open(self.folder.join(LOG));
        let log = log.and_then(|log| Ok((log.try_clone()?, log))).map_err(|error| failed(&error))?;
        let mut list = started();
        let Some(own) = list.iter_mut().find(|started| started.child.id() == self.child_id) else {
            return Err(failed(&"it was stopped"));
        };
        own.stop();
        own.child = command(&self.again, (&self.folder, log)).spawn().map_err(|error| failed(&error))?;
        self.child_id = own.child.id();
        drop(list);
        self.wait_until_it_listens()
    }

    fn wait_until_it_listens(&mut self) -> Result<(), Failure> {
        if !self.listens() {
            return Err(Failure::Failed(format!("{}: did not start: {}", self.again.name, self.last_words())));
        }
        self.pid = server_process::listening_on(self.target.port()).unwrap_or(self.child_id);
        Ok(())
    }

    /// Waits until it listens; not longer than it lives.
    fn listens(&self) -> bool {
        let deadline = Instant::now() + START_TIME;
        while Instant::now() < deadline && self.lives() {
            if TcpStream::connect_timeout(&self.target, BETWEEN_TRIES).is_ok() {
                return true;
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
        false
    }

    fn lives(&self) -> bool {
        let mut list = started();
        let own = list.iter_mut().find(|started| started.child.id() == self.child_id);
        own.is_some_and(|started| matches!(started.child.try_wait(), Ok(None)))
    }

    /// The end of what the server has printed.
    pub fn last_words(&self) -> String {
        const LINES: usize = 3;
        let text = std::fs::read(self.folder.join(LOG)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join(" | ")
    }

    /// Where our server writes its key.
    pub fn issuer_key(&self) -> PathBuf {
        self.folder.join("data/issuer.pem")
    }

    /// Our server's key. It writes it at its first start, which may be a little after it listens.
    pub fn issuer(&self) -> Result<Issuer, Failure> {
        let deadline = Instant::now() + START_TIME;
        loop {
            match Issuer::load(&self.issuer_key()) {
                Err(_) if Instant::now() < deadline => std::thread::sleep(BETWEEN_TRIES),
                result => return result,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Under the lock, so that a signal finds it whole or not at all.
        started().retain(|started| started.child.id() != self.child_id);
    }
}

impl Started {
    fn stop(&mut self) {
        let group = Pid::from_child(&self.child);
        // Each fails only when there is nobody left.
        let _ = kill_process(group, Signal::TERM);
        let deadline = Instant::now() + STOP_TIME;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(BETWEEN_TRIES / 2);
        }
        // And what it has started itself, if any of that is left.
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_whose_parent_has_gone_does_not_begin() {
        let is_run = |parent: u32| {
            Command::new("sh").args(["-c", STAY_WITH_PARENT, &parent.to_string(), "true"]).status().unwrap().success()
        };
        assert!(is_run(std::process::id()) && !is_run(1));
    }

    #[test]
    fn a_program_that_does_not_listen_leaves_neither_process_nor_folder() {
        let parent = tempfile::tempdir().unwrap();
        let order = Order { name: "nobody", program: Path::new("/bin/false"), cores: &[0], parent: parent.path() };
        let Err(failure) = start(order, |_| Recipe::default()) else { panic!("it listened") };
        assert!(failure.to_string().contains("nobody: did not start"), "{failure}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn two_free_addresses_are_two() {
        let [one, other] = free_addresses().unwrap();
        assert_ne!(one, other);
    }
}
