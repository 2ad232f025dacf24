//! Nodes, etcd and PostgreSQL as processes: on loopback, or each in a network namespace of its own. The test's thread owns it.
//!
//! Each process has an address of its own and fixed ports below those that the kernel gives to connections, so a node comes
//! back where it was. On loopback the address follows from the number of the test's process, so tests do not meet.
//!
//! Nodes are supervised as systemd would with `Restart=on-failure`: one that ends with exit code 1, because its lease was lost
//! or another has what it owned, is started anew at once ([`World::tend`]); that is told in [`World::restarts`]. Whatever else ends
//! one fails the test. Invariant: nodes start and end only in calls of the test's thread.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
use ringline_schema::ids::{PARTITIONS, Partition};
use ringline_store::postgres::rig::Cluster as Postgres;

use super::common;
use super::common::net::{self, Net};
use super::ensemble::Ensemble;

/// How long anything may take before a test gives up. Clients that were cut off for long wait up to 30 s between attempts.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(50);
const CLIENT_PORT: u16 = 9_700;
const PEER_PORT: u16 = 9_800;
/// Lines of each log that a failure shows.
const LOG_LINES: usize = 80;
/// Addresses that a world on loopback may take.
const PLACES_MAX: usize = 16;

/// Where processes run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// With an etcd of three.
    Loopback,
    /// With an etcd of one, and cables that can be cut. Needs root.
    Namespaces,
}

/// Where one process runs.
#[derive(Clone)]
pub struct Place {
    pub host: String,
    space: Option<String>,
}

impl Place {
    /// Runs this where the process is to be.
    pub fn within<T>(&self, act: impl FnOnce() -> T) -> T {
        match &self.space {
            Some(space) => net::within(space, act),
            None => act(),
        }
    }
}

struct Node {
    place: Place,
    child: Option<Child>,
    /// Starts by the supervisor.
    restarts: usize,
}

/// See the module.
pub struct World {
    nodes: Vec<Node>,
    pub etcd: Ensemble,
    pub postgres: Postgres,
    postgres_place: Place,
    database: String,
    has_tables: bool,
    folder: tempfile::TempDir,
    /// Gone last.
    pub net: Option<Net>,
}

impl World {
    /// Starts etcd and PostgreSQL, and no node yet. `None`: not here, which was printed.
    pub fn new(test: &str, nodes: usize, ground: Ground) -> Option<Self> {
        let net = match ground {
            Ground::Loopback => None,
            Ground::Namespaces => match Net::new(test, nodes + 2).and_then(|net| net.enter().map(|()| net)) {
                Ok(net) => Some(net),
                Err(why) => {
                    eprintln!("{test}: skipped, as namespaces can't be used here: {why}");
                    return None;
                }
            },
        };
        let mut places = places(nodes + 4, net.as_ref()).into_iter();
        let nodes: Vec<_> = places.by_ref().take(nodes).map(|place| Node { place, child: None, restarts: 0 }).collect();
        let members = if net.is_some() { 1 } else { 3 };
        let etcd = Ensemble::start(places.by_ref().take(members).collect());
        let postgres_place = places.next().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let settings = postgres_settings(&postgres_place, &folder);
        let settings: Vec<_> = settings.iter().map(String::as_str).collect();
        let postgres = postgres_place.within(|| Postgres::start(&settings));
        let mut database = postgres.database();
        if net.is_some() {
            let name = database.rsplit("dbname=").next().unwrap();
            database = format!("host={} port=5432 user=ringline dbname={name}", postgres_place.host);
        }
        let world = Self { nodes, etcd, postgres, postgres_place, database, has_tables: false, folder, net };
        let names: Vec<_> = (0..world.nodes.len()).map(name).collect();
        let certs = world.folder.path().join("certs");
        let made = common::run(&["certs", "init", certs.to_str().unwrap(), "--nodes", &names.join(",")]);
        assert!(made.status.success(), "{made:?}");
        Some(world)
    }

    /// The number of the space that etcd is in, for [`Net`].
    pub fn etcd_space(&self) -> usize {
        self.nodes.len()
    }

    /// That of PostgreSQL.
    pub fn postgres_space(&self) -> usize {
        self.nodes.len() + 1
    }

    /// How many nodes there are.
    pub fn size(&self) -> usize {
        self.nodes.len()
    }

    /// Every node, but those.
    pub fn all_but(&self, away: &[usize]) -> Vec<usize> {
        (0..self.nodes.len()).filter(|at| !away.contains(at)).collect()
    }

    /// Where clients connect to, all of them.
    pub fn addresses(&self) -> String {
        let all: Vec<_> = self.nodes.iter().map(|node| format!("{}:{CLIENT_PORT}", node.place.host)).collect();
        all.join(",")
    }

    pub fn token(&self, user: &str) -> String {
        let issuer = format!("auth.issuer={}", self.folder.path().join("certs/issuer.pem").display());
        let made = common::run(&["token", "--user", user, "--ttl", "24h", "--set", &issuer]);
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    }

    fn log(&self, at: usize) -> PathBuf {
        self.folder.path().join(format!("{}.log", name(at)))
    }

    /// Starts a node's process, without waiting for anything.
    pub fn start(&mut self, at: usize) {
        let (name, host) = (name(at), self.nodes[at].place.host.clone());
        let file = |name: String| self.folder.path().join("certs").join(name).display().to_string();
        let keys = [
            ("cores", "1".to_owned()),
            ("data_dir", self.folder.path().join(format!("data{at}")).display().to_string()),
            ("node.name", name.clone()),
            ("net.listen", format!("{host}:{CLIENT_PORT}")),
            // Both nets, whichever `auto` picks here.
            ("net.kind", if at == 1 { "epoll" } else { "auto" }.to_owned()),
            ("cluster.mode", "etcd".to_owned()),
            ("cluster.listen", format!("{host}:{PEER_PORT}")),
            ("cluster.ca", file("ca.pem".into())),
            ("cluster.cert", file(format!("{name}.pem"))),
            ("cluster.key", file(format!("{name}.key"))),
            ("etcd.endpoints", self.etcd.endpoints()),
            ("store.kind", "postgres".to_owned()),
            ("postgres.url", self.database.clone()),
            ("auth.issuer", file("issuer.pem".into())),
            ("server.stop_timeout_ms", "60000".to_owned()),
        ];
        let (mut command, ringline) = (Command::new("setpriv"), common::ringline());
        command.args(["--pdeathsig", "KILL", "--"]).arg(ringline.get_program()).arg("serve");
        for (name, _) in ringline.get_envs() {
            command.env_remove(name);
        }
        for (key, value) in keys {
            command.args(["--set", &format!("{key}={value}")]);
        }
        let log = File::options().create(true).append(true).open(self.log(at)).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = self.nodes[at].place.within(|| command.spawn().unwrap());
        self.nodes[at].child = Some(child);
    }

    /// Starts all at the same moment, and waits until each owns its part. How long that took.
    pub fn start_all(&mut self) -> Duration {
        let began = Instant::now();
        (0..self.nodes.len()).for_each(|at| self.start(at));
        self.settle(&self.all_but(&[]));
        began.elapsed()
    }

    pub fn signal(&self, at: usize, name: &str) {
        let pid = self.nodes[at].child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// `kill -9`.
    pub fn kill(&mut self, at: usize) {
        let mut child = self.nodes[at].child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// These are told to stop, all at once, and end in order.
    pub fn stop(&mut self, nodes: &[usize]) {
        let mut ending: Vec<_> = nodes.iter().map(|at| (*at, self.nodes[*at].child.take().unwrap())).collect();
        for (_, child) in &ending {
            assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
        }
        for (at, child) in &mut ending {
            let mut ended = None;
            self.until(&format!("the end of {}", name(*at)), |_| {
                ended = child.try_wait().unwrap();
                ended.is_some()
            });
            // On a machine that stalled it may have lost its lease before it was done.
            let code = ended.and_then(|status| status.code());
            assert!(code == Some(0) || (code == Some(1) && self.has_lost(*at)), "{code:?}\n{}", self.logs());
        }
    }

    /// Whether the end of a node's log says why it could not go on.
    fn has_lost(&self, at: usize) -> bool {
        let log = std::fs::read_to_string(self.log(at)).unwrap_or_default();
        log.lines().rev().take(20).any(|line| line.contains("is to be started anew"))
    }

    /// Starts those anew that ended because they had to.
    pub fn tend(&mut self) {
        for at in 0..self.nodes.len() {
            let Some(child) = &mut self.nodes[at].child else { continue };
            let Some(status) = child.try_wait().unwrap() else { continue };
            assert!(status.code() == Some(1) && self.has_lost(at), "{} ended: {status}\n{}", name(at), self.logs());
            self.nodes[at].restarts += 1;
            self.start(at);
        }
    }

    /// How often nodes ended by themselves, and were started anew.
    pub fn restarts(&self) -> usize {
        self.nodes.iter().map(|node| node.restarts).sum()
    }

    /// Waits until this is so; how long that took.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            self.tend();
            if is_so(self) {
                return began.elapsed();
            }
            assert!(began.elapsed() < PATIENCE, "waiting for {what}:\n{}", self.logs());
            std::thread::sleep(LOOK);
        }
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        let began = Instant::now();
        self.until("time to pass", |_| began.elapsed() >= time);
    }

    /// Waits until these nodes own all partitions, each those that it should. How long that took.
    pub fn settle(&mut self, nodes: &[usize]) -> Duration {
        let names: Vec<_> = nodes.iter().map(|at| name(*at)).collect();
        let weights: Vec<_> = names.iter().map(|name| (name.clone(), 1)).collect();
        let placement = ClusterPlacement::new(&names[0], CorePlacement::new(1).unwrap(), &weights).unwrap();
        let owner = |number| usize::from(placement.node_of(Partition::new(number).unwrap()).0);
        let wanted: Vec<_> = (0..PARTITIONS).map(|number| names[owner(number)].clone()).collect();
        self.until(&format!("{} to share all", names.join(", ")), |world| {
            std::thread::sleep(3 * LOOK);
            world.owners() == wanted
        })
    }

    /// By partition, the node whose latest start owns it; empty: none, or one before.
    fn owners(&mut self) -> Vec<String> {
        const OWNERS: &str = "SELECT coalesce(o.node, '') FROM ringline.partitions p LEFT JOIN
            (SELECT node, max(owner) AS owner FROM ringline.owners GROUP BY node) o USING (owner) ORDER BY p.partition";
        const MADE: &str = "SELECT to_regclass('ringline.partitions') IS NOT NULL";
        self.has_tables = self.has_tables || self.postgres.sql(&self.database, MADE) == "t";
        if !self.has_tables {
            return Vec::new();
        }
        self.postgres.sql(&self.database, OWNERS).lines().map(str::to_owned).collect()
    }

    /// Starts PostgreSQL again.
    pub fn begin_postgres(&mut self) {
        let (place, postgres) = (self.postgres_place.clone(), &mut self.postgres);
        place.within(|| postgres.begin());
    }

    /// The ends of all logs.
    pub fn logs(&self) -> String {
        let end = |at| {
            let log = std::fs::read_to_string(self.log(at)).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            format!("--- {}\n{}\n", name(at), lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
        };
        (0..self.nodes.len()).map(end).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().filter_map(|node| node.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

/// Of a node.
pub fn name(at: usize) -> String {
    format!("n{at}")
}

/// Addresses for so many processes.
fn places(count: usize, net: Option<&Net>) -> Vec<Place> {
    static WORLDS: AtomicUsize = AtomicUsize::new(0);
    if let Some(net) = net {
        let place = |at| Place { host: net::address(at), space: Some(net.space(at)) };
        // One of etcd only: its three share one failure here.
        return (0..count - 2).map(place).collect();
    }
    let world = WORLDS.fetch_add(1, Ordering::Relaxed) % (250 / PLACES_MAX);
    assert!(count <= PLACES_MAX);
    let pid = std::process::id();
    // Not 127.0.x.y, where others are.
    let (high, low) = (128 + (pid >> 8) % 128, pid % 256);
    let place = |at| Place { host: format!("127.{high}.{low}.{}", 1 + world * PLACES_MAX + at), space: None };
    (0..count).map(place).collect()
}

/// In a network of its own it has to let the nodes in.
fn postgres_settings(place: &Place, folder: &tempfile::TempDir) -> Vec<String> {
    if place.space.is_none() {
        return Vec::new();
    }
    let file = folder.path().join("pg_hba.conf");
    // The server runs as another user than the test.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(&file, "local all all trust\nhost all all 10.77.0.0/24 trust\n").unwrap();
    vec![format!("listen_addresses={}", place.host), format!("hba_file={}", file.display())]
}
