//! `ringline cluster demo`: a cluster on loopback, to try: a static one, or one of etcd with an etcd and a PostgreSQL of its own
//! ([`services`]). Makes certificates, tokens and configurations in one folder, starts its nodes as processes of this binary, and
//! stops them together. Runs on the main thread of a command.
//!
//! Invariants: every process that was started is in [`Processes`], which stops them all, what serves the nodes after them, and
//! waits for their ends whichever way the command ends; the folder goes after them, unless it was given. A kill that can't be caught ends the nodes too, where
//! `setpriv` is there to tell the kernel so; only the folder stays then.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
use ringline_schema::ids::{PARTITIONS, Partition, UserName};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::services::{Services, Tools};
use super::say;
use crate::auth::{ISSUER_FILE, Issuer};
use crate::certs;
use crate::config::ENV_PREFIX;

mod services;

/// More would only fight for the cores of one machine.
const NODES_MAX: u16 = 7;
/// Of each node: clients, other nodes, metrics.
const PORTS_PER_NODE: usize = 3;
/// Of what serves the nodes: PostgreSQL, etcd for them, etcd for other etcds.
const PORTS_OF_SERVICES: usize = 3;
/// Who has a token of the demo.
const USERS: [&str; 2] = ["ann", "bob"];
const TOKEN_TTL: Duration = Duration::from_secs(7 * 86_400);
const CERT_DAYS: u64 = 365;
/// How long all nodes may take to find each other.
const START_TIME: Duration = Duration::from_secs(60);
/// How long one may take to stop in order; then it is killed.
const STOP_TIME: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(50);
/// The end of a log that is shown when its node ends.
const LOG_LINES_SHOWN: usize = 10;
const EXIT_NODE_ENDED: u8 = 1;

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=i64::from(NODES_MAX)))]
    nodes: u16,
    /// Nodes of a list with a store each, or nodes that come and go, on etcd and PostgreSQL (which have to be installed).
    #[arg(long, value_enum, default_value_t = Mode::Static)]
    mode: Mode,
    /// Folder of everything, kept at the end and used again by the next demo of as many nodes in the same mode; without it a temporary one,
    /// which is removed.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The first of three ports a node, for clients, other nodes and metrics, and with etcd three more; without it free ones.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1_024..=65_000))]
    port: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Static,
    Etcd,
}

/// One node of the demo, before it is started.
struct Site {
    name: String,
    clients: SocketAddr,
    peers: SocketAddr,
    admin: SocketAddr,
    config: PathBuf,
    log: PathBuf,
}

/// What a process is for, and so when it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Node,
    /// Serves the nodes, and is stopped after them.
    Service,
}

/// A process.
struct Running {
    /// As people are told of it, like "node a".
    title: String,
    role: Role,
    /// What asks it to stop in order.
    stop: Signal,
    log: PathBuf,
    child: Child,
}

/// See the module. Stops all when dropped.
#[derive(Default)]
struct Processes(Vec<Running>);

/// Why a demo ended.
enum Ended {
    Asked,
    /// One ended by itself.
    Died(String),
}

/// Runs the command. The result is the exit code; errors are one line.
pub fn run(args: &DemoArgs) -> Result<u8, String> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(|error| format!("cannot watch for signals: {error}"))?;
    let temporary = match &args.dir {
        Some(dir) => {
            fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
            None
        }
        None => {
            let folder = tempfile::Builder::new().prefix("ringline-demo-").tempdir();
            Some(folder.map_err(|error| format!("no temporary folder: {error}; give one with --dir"))?)
        }
    };
    let dir = temporary.as_ref().map_or_else(|| args.dir.clone().unwrap_or_default(), |dir| dir.path().to_owned());
    let dir = std::path::absolute(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let tools = match args.mode {
        Mode::Static => None,
        Mode::Etcd => Some(Tools::find()?),
    };
    let (sites, services) = prepare(&dir, args)?;
    let mut processes = Processes::default();
    let mut ended = None;
    if let Some((tools, services)) = tools.as_ref().zip(services.as_ref()) {
        services.prepare(tools, temporary.is_some())?;
        let pid = services.start(tools, &mut processes)?;
        ended = processes.wait_until(&mut signals, "PostgreSQL is not ready", || services.are_ready(pid))?;
    }
    if ended.is_none() {
        sites.iter().try_for_each(|site| processes.start_node(site))?;
        ended = processes.wait_until(&mut signals, "not all nodes see all others", || all_whole(&sites, args.mode))?;
    }
    let ended = match ended {
        Some(ended) => ended,
        None => {
            let kept = if temporary.is_some() { "removed at the end" } else { "kept" };
            say(&welcome(&sites, (&dir, kept), services.as_ref())?);
            processes.wait(&mut signals, None)?.unwrap_or(Ended::Asked)
        }
    };
    drop(processes);
    match ended {
        Ended::Asked => {
            say("all nodes have stopped\n");
            Ok(0)
        }
        Ended::Died(text) => {
            eprint!("{text}");
            Ok(EXIT_NODE_ENDED)
        }
    }
}

/// Certificates, tokens and configurations. Errors: one line, of whatever could not be made.
fn prepare(dir: &Path, args: &DemoArgs) -> Result<(Vec<Site>, Option<Services>), String> {
    let names: Vec<String> = (b'a'..).take(usize::from(args.nodes)).map(|name| char::from(name).to_string()).collect();
    let certs_dir = dir.join("certs");
    let is_new = !certs_dir.join("ca.pem").exists();
    let missing: Vec<_> =
        names.iter().filter(|name| !certs_dir.join(format!("{name}.pem")).exists()).cloned().collect();
    if !missing.is_empty() {
        certs::make(&certs_dir, &missing, (CERT_DAYS, is_new)).map_err(|error| error.to_string())?;
    }
    let ports = ports(args)?;
    let services = match args.mode {
        Mode::Static => None,
        Mode::Etcd => Services::new(dir, ports.get(usize::from(args.nodes) * PORTS_PER_NODE..).unwrap_or_default()),
    };
    let sites: Vec<Site> = names
        .iter()
        .zip(ports.chunks_exact(PORTS_PER_NODE))
        .filter_map(|(name, ports)| {
            let [clients, peers, admin] = *ports else { return None };
            let (config, log) = (dir.join(format!("{name}.toml")), dir.join(format!("{name}.log")));
            Some(Site { name: name.clone(), clients, peers, admin, config, log })
        })
        .collect();
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    for (at, site) in sites.iter().enumerate() {
        let core = cores.get(at.checked_rem(cores.len()).unwrap_or(0)).map_or(0, |core| core.id);
        let text = site.toml((dir, core), &site.cluster(&sites, services.as_ref()));
        fs::write(&site.config, text).map_err(|error| format!("{}: {error}", site.config.display()))?;
    }
    let issuer = Issuer::open(&certs_dir.join(ISSUER_FILE)).map_err(|error| error.to_string())?;
    for user in USERS {
        let name = UserName::of_user(user).map_err(|code| code.text().to_owned())?;
        let token = issuer.token(&name, "ringline", TOKEN_TTL).map_err(|error| error.to_string())?;
        let path = token_file(dir, user);
        let written = certs::private_file(&path).and_then(|mut file| writeln!(file, "{token}"));
        written.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok((sites, services))
}

fn token_file(dir: &Path, user: &str) -> PathBuf {
    dir.join(format!("{user}.token"))
}

/// Three a node, and those of services. Free ones are let go before they are used: another process would have to take just these.
fn ports(args: &DemoArgs) -> Result<Vec<SocketAddr>, String> {
    let services = match args.mode {
        Mode::Static => 0,
        Mode::Etcd => PORTS_OF_SERVICES,
    };
    let count = usize::from(args.nodes) * PORTS_PER_NODE + services;
    let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    if let Some(first) = args.port {
        return Ok((first..).take(count).map(loopback).collect());
    }
    let held: io::Result<Vec<_>> = (0..count).map(|_| TcpListener::bind(loopback(0))).collect();
    let held = held.map_err(|error| format!("no free ports: {error}"))?;
    let ports: io::Result<Vec<_>> = held.iter().map(TcpListener::local_addr).collect();
    ports.map_err(|error| format!("no free ports: {error}"))
}

impl Site {
    /// What its configuration says of the others, the section of the cluster last.
    fn cluster(&self, all: &[Self], services: Option<&Services>) -> String {
        if let Some(services) = services {
            return format!("{}[cluster]\nmode = \"etcd\"\nlisten = \"{}\"\n", services.toml(), self.peers);
        }
        let mut nodes = String::new();
        for Self { name, peers, clients, .. } in all {
            // Writing to a text does not fail.
            let _ = writeln!(
                nodes,
                "  {{ name = \"{name}\", peer_address = \"{peers}\", client_address = \"{clients}\" }},"
            );
        }
        format!("[cluster]\nmode = \"static\"\nnodes = [\n{nodes}]\n")
    }

    fn toml(&self, (dir, core): (&Path, usize), cluster: &str) -> String {
        let (certs, name) = (dir.join("certs"), &self.name);
        format!(
            "# Written by `ringline cluster demo`.\n\
             data_dir = {data}\ncores = \"{core}-{core}\"\n\n\
             [node]\nname = \"{name}\"\n\n[net]\nlisten = \"{clients}\"\n\n[admin]\nlisten = \"{admin}\"\n\n\
             [auth]\nissuer = {issuer}\n\n\
             {cluster}name = \"demo\"\n\
             ca = {ca}\ncert = {cert}\nkey = {key}\n",
            data = quoted(&dir.join(format!("{name}-data"))),
            clients = self.clients,
            admin = self.admin,
            issuer = quoted(&certs.join(ISSUER_FILE)),
            ca = quoted(&certs.join("ca.pem")),
            cert = quoted(&certs.join(format!("{name}.pem"))),
            key = quoted(&certs.join(format!("{name}.key"))),
        )
    }
}

/// As TOML.
fn quoted(path: &Path) -> String {
    toml::Value::String(path.to_string_lossy().into_owned()).to_string()
}

/// A command that the kernel ends with the demo, where it can be told so.
fn ended_with_demo(program: &Path, signal: &str) -> Command {
    let Some(setpriv) = on_path("setpriv") else { return Command::new(program) };
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", signal]).arg(program);
    command
}

impl Processes {
    fn start_node(&mut self, site: &Site) -> Result<(), String> {
        let binary = std::env::current_exe().map_err(|error| format!("this program is not found: {error}"))?;
        let mut command = ended_with_demo(&binary, "TERM");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with(ENV_PREFIX)) {
            command.env_remove(name);
        }
        command.args(["serve", "--config"]).arg(&site.config);
        self.start(command, (format!("node {}", site.name), Role::Node, Signal::TERM), &site.log).map(|_| ())
    }

    /// In a process group of its own: Ctrl-C is for the demo, which stops its processes in order. Returns the process's number.
    fn start(&mut self, mut command: Command, what: (String, Role, Signal), log: &Path) -> Result<u32, String> {
        let (title, role, stop) = what;
        let failed = |error: io::Error| format!("{title} cannot be started: {error}");
        let files = File::create(log).and_then(|log| Ok((log.try_clone()?, log)));
        let (out, err) = files.map_err(failed)?;
        command.process_group(0).stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().map_err(failed)?;
        let pid = child.id();
        self.0.push(Running { title, role, stop, log: log.to_owned(), child });
        Ok(pid)
    }

    /// Until it is so. `Some`: it ended before; `not_so`: what is said when that takes too long.
    fn wait_until(
        &mut self,
        signals: &mut Signals,
        not_so: &str,
        is_so: impl Fn() -> bool,
    ) -> Result<Option<Ended>, String> {
        let deadline = Instant::now() + START_TIME;
        loop {
            if let Some(ended) = self.wait(signals, Some(LOOK))? {
                return Ok(Some(ended));
            }
            if is_so() {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                let logs: String = self.0.iter().map(|one| format!("{}:\n{}", one.title, tail(&one.log))).collect();
                let text = format!("{not_so} after {} s; the ends of all logs:\n{logs}", START_TIME.as_secs());
                return Ok(Some(Ended::Died(text)));
            }
        }
    }

    /// Waits for a signal or the end of a process, for so long at most. `None`: neither came.
    fn wait(&mut self, signals: &mut Signals, longest: Option<Duration>) -> Result<Option<Ended>, String> {
        let until = longest.map(|longest| Instant::now() + longest);
        loop {
            if signals.pending().next().is_some() {
                return Ok(Some(Ended::Asked));
            }
            for one in &mut self.0 {
                let status = one.child.try_wait().map_err(|error| format!("{}: {error}", one.title))?;
                if let Some(status) = status {
                    return Ok(Some(Ended::Died(one.last_words(status))));
                }
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for role in [Role::Node, Role::Service] {
            for one in self.0.iter().filter(|one| one.role == role) {
                // Fails only when it has ended.
                let _ = kill_process(Pid::from_child(&one.child), one.stop);
            }
            let deadline = Instant::now() + STOP_TIME;
            for one in self.0.iter_mut().filter(|one| one.role == role) {
                while matches!(one.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                    std::thread::sleep(LOOK);
                }
                let _ = one.child.kill();
                let _ = one.child.wait();
            }
        }
    }
}

impl Running {
    fn last_words(&self, status: ExitStatus) -> String {
        let (title, log) = (&self.title, tail(&self.log));
        format!("{title} has ended ({status}), so all are stopped; the end of its log:\n{log}")
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(LOG_LINES_SHOWN)..).unwrap_or_default();
    last.iter().map(|line| format!("  {line}\n")).collect()
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Whether every node sees every other, and all partitions are where they should be.
fn all_whole(sites: &[Site], mode: Mode) -> bool {
    let settled = |site: &Site| match mode {
        Mode::Static => true,
        Mode::Etcd => super::partitions::are_settled(site.admin),
    };
    sites.iter().all(|site| sees_all(site, sites.len()) && settled(site))
}

/// Whether a node answers and has its links to all others.
fn sees_all(site: &Site, nodes: usize) -> bool {
    let Ok(body) = super::fetch(site.admin, "/cluster") else { return false };
    let Ok(answer) = serde_json::from_str(&body) else { return false };
    let lines = super::lines(&answer);
    lines.len() + 1 == nodes && lines.values().all(|line| line.links > 0 && line.up == line.links)
}

/// What a person is told when all are there.
fn welcome(sites: &[Site], (dir, kept): (&Path, &str), services: Option<&Services>) -> Result<String, String> {
    let listed: Vec<_> = sites.iter().map(|site| (site.name.clone(), 1)).collect();
    let cores = CorePlacement::new(1).ok_or("one core is always a placement")?;
    let first = sites.first().ok_or("a demo has a node")?;
    let placement = ClusterPlacement::new(&first.name, cores, &listed).map_err(|error| error.to_string())?;
    let home = |user: &str| {
        let user = UserName::of_user(user).ok()?;
        sites.get(usize::from(placement.node_of(user.partition()).0))
    };
    let mut rows = vec![["NODE", "CLIENTS AT", "OWNS", "METRICS", "LOG"].map(str::to_owned)];
    for (at, site) in sites.iter().enumerate() {
        let partitions = (0..PARTITIONS).filter_map(Partition::new);
        let owned = partitions.filter(|partition| usize::from(placement.node_of(*partition).0) == at).count();
        let owned = format!("{owned}/{PARTITIONS}");
        let metrics = format!("http://{}/metrics", site.admin);
        rows.push([site.name.clone(), site.clients.to_string(), owned, metrics, site.log.display().to_string()]);
    }
    let program = std::env::args().next().unwrap_or_else(|| "ringline".to_owned());
    let (count, plural) = (sites.len(), if sites.len() == 1 { "node serves" } else { "nodes serve as one" });
    let dir_shown = dir.display();
    let mut text = format!("{count} {plural}; everything is in {dir_shown} ({kept})\n\n{}\n", super::columns(&rows));
    if let Some(services) = services {
        text.push_str(&services.welcome());
    }
    text.push_str("In two other terminals, at whichever node: a client is sent to the one that its user lives on.\n\n");
    for (user, site) in USERS.iter().zip(sites.iter().cycle()) {
        let (token, device) = (token_file(dir, user), dir.join(format!("{user}.device")));
        let lives = home(user).map_or("?", |site| site.name.as_str());
        // Writing to a text does not fail.
        let _ = writeln!(
            text,
            "  {program} chat --server {} --user {user} --token-file {} --device-file {}    # lives on {lives}",
            site.clients,
            token.display(),
            device.display()
        );
    }
    let (config, admin) = (first.config.display(), first.admin);
    let _ = writeln!(text, "\n  {program} cluster status --admin {admin}");
    if let (Some(_), Some(last)) = (services, sites.last()) {
        let _ = writeln!(text, "  {program} cluster partitions --admin {admin}");
        let _ = writeln!(text, "  {program} cluster drain {} --config {config}        # and undrain", last.name);
    }
    let _ = writeln!(text, "  {program} token --config {config} --user NAME        # for anybody else");
    text.push_str("\nCtrl-C stops all nodes.\n");
    Ok(text)
}
