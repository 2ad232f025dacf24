//! The etcd and the PostgreSQL of a demo of `--mode etcd`: one server each on loopback, in the folder of the demo. Runs on the main
//! thread of a command.
//!
//! PostgreSQL asks for a password, which is made at the first start and lies in a file that its owner alone can read; it refuses
//! to run as root, so root runs it as the user `postgres`. etcd asks nobody for anything: whoever is on this machine can reach it,
//! as long as the demo runs.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::process::Signal;

use super::{Processes, Role, ended_with_demo, on_path, quoted};
use crate::certs;

/// Where Debian puts the programs of each version, in folders by its number.
const POSTGRES_FOLDER: &str = "/usr/lib/postgresql";
/// The oldest version that the store takes.
const POSTGRES_VERSION_MIN: u32 = 15;
/// Who owns the database.
const USER: &str = "ringline";
/// Who runs PostgreSQL when root starts the demo.
const SYSTEM_USER: &str = "postgres";

/// The programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tools {
    etcd: PathBuf,
    /// Folder of `postgres` and `initdb`.
    postgres: PathBuf,
}

impl Tools {
    /// Errors: what is missing, and how it is installed.
    pub fn find() -> Result<Self, String> {
        let etcd = on_path("etcd").ok_or("there is no etcd on this machine: apt install etcd-server")?;
        let postgres = newest(Path::new(POSTGRES_FOLDER)).or_else(|| {
            let folder = on_path("postgres")?.parent()?.to_owned();
            folder.join("initdb").is_file().then_some(folder)
        });
        let missing = "there is no PostgreSQL 15 or newer on this machine: apt install postgresql";
        Ok(Self { etcd, postgres: postgres.ok_or(missing)? })
    }
}

/// The folder of the programs of the newest version below `folder`.
fn newest(folder: &Path) -> Option<PathBuf> {
    let versions = fs::read_dir(folder).ok()?.flatten().filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let programs = entry.path().join("bin");
        let whole = ["postgres", "initdb"].iter().all(|program| programs.join(program).is_file());
        (whole && version >= POSTGRES_VERSION_MIN).then_some((version, programs))
    });
    versions.max().map(|(_, programs)| programs)
}

/// Where both are.
#[derive(Clone, Debug)]
pub(super) struct Services {
    /// Of the demo.
    dir: PathBuf,
    postgres: SocketAddr,
    etcd: SocketAddr,
    /// Where other servers of etcd would connect.
    etcd_peers: SocketAddr,
}

impl Services {
    /// `None`: too few ports.
    pub fn new(dir: &Path, ports: &[SocketAddr]) -> Option<Self> {
        let [postgres, etcd, etcd_peers] = *ports else { return None };
        Some(Self { dir: dir.to_owned(), postgres, etcd, etcd_peers })
    }

    fn folder(&self) -> PathBuf {
        self.dir.join("postgres")
    }

    fn data(&self) -> PathBuf {
        self.folder().join("data")
    }

    fn password(&self) -> PathBuf {
        self.folder().join("password")
    }

    /// For the configuration of a node.
    pub fn toml(&self) -> String {
        let (postgres, etcd) = (self.postgres, self.etcd);
        format!(
            "[store]\nkind = \"postgres\"\n\n\
             [postgres]\nurl = \"postgres://{USER}@{postgres}/postgres\"\npassword_file = {password}\n\n\
             [etcd]\nendpoints = [\"http://{etcd}\"]\n\n",
            password = quoted(&self.password()),
        )
    }

    /// For people.
    pub fn welcome(&self) -> String {
        let Self { postgres, etcd, .. } = self;
        let password = self.password();
        format!(
            "etcd is at http://{etcd}, PostgreSQL at {postgres} (user {USER}, its password in {})\n\n",
            password.display()
        )
    }

    /// Makes the database, unless it is there. `is_temporary`: the folder is the demo's own. Errors: one line.
    pub fn prepare(&self, tools: &Tools, is_temporary: bool) -> Result<(), String> {
        if self.data().join("PG_VERSION").exists() {
            return Ok(());
        }
        let failed = |what: &Path, error: std::io::Error| format!("{}: {error}", what.display());
        let folder = self.folder();
        fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
        if is_temporary && is_root() {
            // The user that runs PostgreSQL has to get through.
            let mode = fs::Permissions::from_mode(0o711);
            fs::set_permissions(&self.dir, mode).map_err(|error| failed(&self.dir, error))?;
        }
        let password = self.password();
        let written = certs::private_file(&password).and_then(|mut file| {
            writeln!(file, "{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 24]>()))?;
            file.sync_all()
        });
        written.map_err(|error| failed(&password, error))?;
        if is_root() {
            checked(Command::new("chown").args(["-R", SYSTEM_USER]).arg(&folder), "chown")?;
        }
        let mut initdb = self.as_user(&tools.postgres.join("initdb"), "KILL");
        initdb.args(["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "-U", USER, "--pwfile"]).arg(&password);
        checked(initdb.arg("-D").arg(self.data()), "initdb")
    }

    /// Starts both. Returns the number of the process of PostgreSQL. Errors: one line.
    pub fn start(&self, tools: &Tools, processes: &mut Processes) -> Result<u32, String> {
        let mut postgres = self.as_user(&tools.postgres.join("postgres"), "INT");
        postgres.arg("-D").arg(self.data()).args(["-c", "unix_socket_directories=", "-c"]);
        postgres.arg(format!("listen_addresses={}", self.postgres.ip()));
        postgres.args(["-c", &format!("port={}", self.postgres.port()), "-c", "shared_buffers=32MB"]);
        let what = ("PostgreSQL".to_owned(), Role::Service, Signal::INT);
        let pid = processes.start(postgres, what, &self.dir.join("postgres.log"))?;
        let (clients, peers) = (format!("http://{}", self.etcd), format!("http://{}", self.etcd_peers));
        let mut etcd = ended_with_demo(&tools.etcd, "TERM");
        etcd.args(["--name", "demo", "--data-dir"]).arg(self.dir.join("etcd"));
        etcd.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        etcd.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        etcd.args(["--initial-cluster", &format!("demo={peers}")]);
        processes.start(etcd, ("etcd".to_owned(), Role::Service, Signal::TERM), &self.dir.join("etcd.log"))?;
        Ok(pid)
    }

    /// Whether that process of PostgreSQL can be asked. Nodes wait for etcd themselves.
    pub fn are_ready(&self, pid: u32) -> bool {
        // As pg_ctl does: what a server that was killed has left there has another number.
        let state = fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
        let mut lines = state.lines().map(str::trim);
        lines.next() == Some(pid.to_string().as_str()) && lines.any(|line| line == "ready")
    }

    /// A program of PostgreSQL, as a user that may run it.
    fn as_user(&self, program: &Path, signal: &str) -> Command {
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", signal, "--reuid", SYSTEM_USER, "--regid", SYSTEM_USER, "--clear-groups"]);
            command.arg("--").arg(program);
            command
        } else {
            ended_with_demo(program, signal)
        };
        command.current_dir("/");
        command
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Errors: the last line of what it complained of.
fn checked(command: &mut Command, name: &str) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(format!("{name} failed ({}): {last}", output.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_version_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let install = |version: &str, programs: &[&str]| {
            let bin = folder.path().join(version).join("bin");
            fs::create_dir_all(&bin).unwrap();
            programs.iter().for_each(|program| fs::write(bin.join(program), "").unwrap());
        };
        install("14", &["postgres", "initdb"]);
        assert_eq!(newest(folder.path()), None, "too old");
        install("15", &["postgres", "initdb"]);
        install("17", &["initdb"]);
        install("rubbish", &["postgres", "initdb"]);
        assert_eq!(newest(folder.path()), Some(folder.path().join("15/bin")));
        install("16", &["postgres", "initdb"]);
        assert_eq!(newest(folder.path()), Some(folder.path().join("16/bin")));
        assert_eq!(newest(&folder.path().join("none")), None);
    }

    #[test]
    fn a_node_is_told_where_both_are() {
        let ports = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        assert!(Services::new(Path::new("/x"), &ports[..2]).is_none());
        let services = Services::new(Path::new("/x"), &ports).unwrap();
        let toml: toml::Table = toml::from_str(&services.toml()).unwrap();
        assert_eq!(toml["postgres"]["url"].as_str(), Some("postgres://ringline@127.0.0.1:1/postgres"));
        assert_eq!(toml["postgres"]["password_file"].as_str(), Some("/x/postgres/password"));
        assert_eq!(toml["etcd"]["endpoints"][0].as_str(), Some("http://127.0.0.1:2"));
    }
}
