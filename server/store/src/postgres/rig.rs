//! A PostgreSQL of one's own for tests: made in a temporary folder, reached by a socket there, gone with its handle. It
//! ends with the thread that started it.
//!
//! Needs the programs of the Debian package `postgresql-15`, or `RINGLINE_TEST_PG_BIN` naming the folder of another's. The
//! server refuses to run as root: root runs it as the user `postgres`. It syncs as a real one does.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where Debian puts the programs of version 15.
const BIN: &str = "/usr/lib/postgresql/15/bin";
/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Who owns the databases.
const USER: &str = "ringline";

/// A server that runs, or was stopped and can be started again.
pub struct Cluster {
    folder: PathBuf,
    child: Option<Child>,
    databases: AtomicU32,
    settings: Vec<String>,
    port: u16,
}

impl Cluster {
    /// Makes and starts one with these settings, like `fsync=off`, beside its defaults.
    pub fn start(settings: &[&str]) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        // The path of a socket has to be short.
        let name = format!("ringline-pg-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        if is_root() {
            check(Command::new("chown").arg("postgres").arg(&folder));
        }
        let data = folder.join("data");
        let mut initdb = as_user("initdb");
        initdb.args(["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "-U", USER, "-D"]).arg(&data);
        check(initdb.stdout(Stdio::null()));
        let settings = settings.iter().map(|text| text.to_string()).collect();
        let mut cluster = Self { folder, child: None, databases: AtomicU32::new(0), settings, port: 5432 };
        cluster.begin();
        cluster
    }

    /// Starts the server anew, on a free port of 127.0.0.1 as well and with TLS. `pem`: its certificate and its key.
    /// Returns the port.
    pub fn listen(&mut self, (certificate, key): (&str, &str)) -> u16 {
        self.stop();
        let file = |name: &str, text: &str| {
            let path = self.folder.join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            if is_root() {
                check(Command::new("chown").arg("postgres").arg(&path));
            }
            path.display().to_string()
        };
        let (certificate, key) = (file("server.pem", certificate), file("server.key", key));
        self.port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let settings = ["ssl=on".into(), "listen_addresses=127.0.0.1".into(), format!("port={}", self.port)];
        self.settings.extend(settings);
        self.settings.extend([format!("ssl_cert_file={certificate}"), format!("ssl_key_file={key}")]);
        self.begin();
        self.port
    }

    /// Starts the server anew without TLS.
    pub fn forget_tls(&mut self) {
        self.stop();
        self.settings.retain(|setting| !setting.starts_with("ssl"));
        self.begin();
    }

    /// Starts the server again after [`Cluster::stop`] or [`Cluster::kill`].
    pub fn begin(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let mut child = self.spawn();
        while self.try_sql("postgres", "SELECT 1").is_none() {
            assert!(Instant::now() < deadline, "{}", fs::read_to_string(self.folder.join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            // It gives up while a process of the one that was killed still ends.
            if child.try_wait().unwrap().is_some() {
                child = self.spawn();
            }
        }
        self.child = Some(child);
    }

    fn spawn(&self) -> Child {
        let log = File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut server = as_user("postgres");
        server.arg("-D").arg(self.folder.join("data")).args(["-c", "listen_addresses=", "-c"]);
        server.arg(format!("unix_socket_directories={}", self.folder.display()));
        server.args(["-c", "max_connections=60", "-c", "shared_buffers=32MB"]);
        for setting in &self.settings {
            server.args(["-c", setting]);
        }
        server.stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    /// Stops the server as an operator would, at once for its clients.
    pub fn stop(&mut self) {
        self.end("INT");
    }

    /// `kill -9` of every process of the server.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // Its backends would notice a moment later: what they still do must not help.
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap_or_default();
        child.kill().unwrap();
        for pid in children.split_whitespace() {
            let _ = Command::new("kill").args(["-9", pid]).stderr(Stdio::null()).status();
        }
        child.wait().unwrap();
    }

    fn end(&mut self, signal: &str) {
        let Some(mut child) = self.child.take() else { return };
        check(Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]));
        child.wait().unwrap();
    }

    /// A new empty database. Returns its URL.
    pub fn database(&self) -> String {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        self.url(&name)
    }

    pub fn url(&self, database: &str) -> String {
        format!("host={} port={} user={USER} dbname={database}", self.folder.display(), self.port)
    }

    /// Runs SQL in the database of a URL or of this name, and returns what is printed.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        self.try_sql(database, sql).unwrap_or_else(|| panic!("{sql}"))
    }

    fn try_sql(&self, database: &str, sql: &str) -> Option<String> {
        let database = database.rsplit("dbname=").next().unwrap_or(database);
        let mut psql = Command::new(bin("psql"));
        psql.args([
            "-h",
            self.folder.to_str().unwrap(),
            "-p",
            &self.port.to_string(),
            "-U",
            USER,
            "-d",
            database,
            "-v",
            "ON_ERROR_STOP=1",
            "-qAtc",
            sql,
        ]);
        let output = psql.stdin(Stdio::null()).stderr(Stdio::null()).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim_end().to_owned())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("kill").args(["-QUIT", &child.id().to_string()]).status();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn bin(program: &str) -> PathBuf {
    let folder = std::env::var_os("RINGLINE_TEST_PG_BIN").map_or_else(|| PathBuf::from(BIN), PathBuf::from);
    let path = folder.join(program);
    assert!(path.exists(), "{} is not there: install postgresql-15, or set RINGLINE_TEST_PG_BIN", path.display());
    path
}

/// A program of the server, as a user that may run it, ended with the thread that starts it.
fn as_user(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "QUIT"]);
    if is_root() {
        command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]);
    }
    command.arg("--").arg(bin(program)).current_dir(Path::new("/")).stdin(Stdio::null());
    command
}

fn check(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
