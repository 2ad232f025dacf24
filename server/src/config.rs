//! The one table of configuration keys. Parser, bounds, `ringline config`, its comments and its checks derive from it.
//! Read once at the start, by the main thread; immutable after.
//!
//! Sources in rising precedence: default, file (TOML), environment (`RINGLINE_NET_LISTEN`), flags. A later source
//! replaces the whole value. Every error is one line that names key, value, bounds and source.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ringline_cluster::balance::Strategy;
use ringline_cluster::rendezvous::WEIGHT_MAX;
use ringline_core::config::DevicePolicy;
use ringline_schema::ids::UserName;
use ringline_schema::limits;

use crate::net::NetKind;
use crate::park::ParkKind;

mod cluster;
mod etcd;
mod postgres;

pub use self::cluster::{ClusterError, ClusterMode, ClusterNode, NODE_NAME_BYTES_MAX, PeerTls, is_node_name};
pub use self::etcd::EtcdKeyError;
pub use self::postgres::DatabaseUrl;

/// The prefix of environment variables.
pub const ENV_PREFIX: &str = "RINGLINE_";

/// Where a value came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Source {
    #[default]
    Default,
    File(PathBuf),
    /// The variable's name.
    Environment(String),
    /// The flag's name.
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// One line each: what is wrong and where it stands.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("unknown key \"{key}\" ({source_}){}", nearest.map_or(String::new(), |near| format!(": did you mean \"{near}\"?")))]
    UnknownKey { key: String, nearest: Option<&'static str>, source_: Source },
    #[error("{key} = {value}: must be {bounds} ({source_})")]
    BadValue { key: &'static str, value: String, bounds: String, source_: Source },
    #[error("cannot read the config file {path}: {error}")]
    Unreadable { path: PathBuf, error: String },
    #[error("{path} is not TOML: {error}")]
    NotToml { path: PathBuf, error: String },
    #[error("\"--set {0}\" must be KEY=VALUE")]
    NotAPair(String),
    #[error("{0}")]
    Conflict(String),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Etcd(#[from] EtcdKeyError),
}

/// What a value may be: its type, and for numbers its range (inclusive).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    Number(u64, u64),
    Truth,
    /// Not empty, unless it says so.
    Text {
        may_be_empty: bool,
    },
    Choice(&'static [&'static str]),
    Address,
    AddressOrNone,
    Cores,
    List,
    /// Names of users.
    Users,
    /// Nodes of the cluster.
    Nodes,
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(low, high) => write!(f, "a number from {low} to {high}"),
            Self::Truth => f.write_str("true or false"),
            Self::Text { may_be_empty: true } => f.write_str("a text"),
            Self::Text { may_be_empty: false } => f.write_str("a text that is not empty"),
            Self::Choice(names) => write!(f, "one of {}", names.join(", ")),
            Self::Address => f.write_str("an IP address and port, like 127.0.0.1:9700 or [::]:9700"),
            Self::AddressOrNone => f.write_str("an IP address and port, like 127.0.0.1:9701, or empty"),
            Self::Cores => f.write_str("all, a count like 2, or a list of cores like 0-3,8"),
            Self::List => f.write_str("a list of texts, [\"a\", \"b\"] in TOML and a,b elsewhere"),
            Self::Users => f.write_str(
                "a list of user names (1 to 64 bytes each, without control characters or # at the beginning), [\"a\", \"b\"] in \
                 TOML and a,b elsewhere",
            ),
            Self::Nodes => f.write_str(
                "a list of nodes: [{ name, peer_address = \"IP:PORT\", client_address = \"HOST:PORT\", weight = 1, \
                 client_weight = 1 }, …] in TOML and NAME@PEER_ADDRESS/CLIENT_ADDRESS*WEIGHT*CLIENT_WEIGHT,… elsewhere",
            ),
        }
    }
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    /// Empty when the value has none.
    pub unit: &'static str,
    pub bounds: Bounds,
    pub text: &'static str,
}

impl Key {
    /// `net.listen` → `RINGLINE_NET_LISTEN`.
    pub fn env_name(&self) -> String {
        format!("{ENV_PREFIX}{}", self.name.replace('.', "_").to_uppercase())
    }
}

/// A type of value: from text (environment, flags) and TOML, and back to TOML.
trait Setting: Sized {
    /// `None`: not a value of this type within the bounds.
    fn parse(text: &str, bounds: Bounds) -> Option<Self>;
    fn to_toml(&self) -> String;
    /// The text of a TOML value of the right type.
    fn text_of(value: &toml::Value) -> Option<String> {
        value.as_str().map(str::to_owned)
    }
}

macro_rules! numbers {
    ($($kind:ty),*) => {$(
        impl Setting for $kind {
            fn parse(text: &str, bounds: Bounds) -> Option<Self> {
                let Bounds::Number(low, high) = bounds else { return None };
                let number: u64 = text.replace('_', "").parse().ok()?;
                if (low..=high).contains(&number) { Self::try_from(number).ok() } else { None }
            }

            fn to_toml(&self) -> String {
                self.to_string()
            }

            fn text_of(value: &toml::Value) -> Option<String> {
                value.as_integer().map(|number| number.to_string())
            }
        }
    )*};
}

numbers!(u16, u32, u64, usize);

impl Setting for bool {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        text.parse().ok()
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }

    fn text_of(value: &toml::Value) -> Option<String> {
        value.as_bool().map(|truth| truth.to_string())
    }
}

impl Setting for String {
    fn parse(text: &str, bounds: Bounds) -> Option<Self> {
        (bounds == Bounds::Text { may_be_empty: true } || !text.is_empty()).then(|| text.to_owned())
    }

    fn to_toml(&self) -> String {
        quoted(self)
    }
}

impl Setting for PathBuf {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        (!text.is_empty()).then(|| Self::from(text))
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl Setting for SocketAddr {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        text.parse().ok()
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string())
    }
}

/// Empty is `None`.
impl Setting for Option<SocketAddr> {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        if text.is_empty() { Some(None) } else { text.parse().ok().map(Some) }
    }

    fn to_toml(&self) -> String {
        quoted(&self.map_or(String::new(), |address| address.to_string()))
    }
}

impl Setting for Vec<String> {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        Some(text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect())
    }

    fn to_toml(&self) -> String {
        let parts: Vec<String> = self.iter().map(|part| quoted(part)).collect();
        format!("[{}]", parts.join(", "))
    }

    fn text_of(value: &toml::Value) -> Option<String> {
        let parts: Option<Vec<&str>> = value.as_array()?.iter().map(toml::Value::as_str).collect();
        parts.map(|parts| parts.join(","))
    }
}

impl Setting for Vec<UserName> {
    /// One that is no name of a user spoils the list: who is meant would have no rights, without a word.
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        if text.is_empty() {
            return Some(Vec::new());
        }
        text.split(',').map(|name| UserName::of_user(name.trim()).ok()).collect()
    }

    fn to_toml(&self) -> String {
        let parts: Vec<String> = self.iter().map(|name| quoted(name.as_str())).collect();
        format!("[{}]", parts.join(", "))
    }

    fn text_of(value: &toml::Value) -> Option<String> {
        Vec::<String>::text_of(value)
    }
}

/// Which cores get a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cores {
    All,
    /// The first so many.
    Count(u16),
    /// These, in rising order without repeats.
    List(Vec<usize>),
}

impl Setting for Cores {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        const CORE_MAX: usize = 4_095;
        if text == "all" {
            return Some(Self::All);
        }
        if let Ok(count) = text.parse::<u16>() {
            return (1..=1_024).contains(&count).then_some(Self::Count(count));
        }
        let mut list = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            if first > last || last > CORE_MAX {
                return None;
            }
            list.extend(first..=last);
        }
        list.sort_unstable();
        list.dedup();
        (list.len() <= 1_024).then_some(Self::List(list))
    }

    fn to_toml(&self) -> String {
        match self {
            Self::All => quoted("all"),
            Self::Count(count) => quoted(&count.to_string()),
            // A single core needs the range form, or it would read as a count.
            Self::List(list) => match list.as_slice() {
                [one] => quoted(&format!("{one}-{one}")),
                many => quoted(&many.iter().map(usize::to_string).collect::<Vec<_>>().join(",")),
            },
        }
    }

    fn text_of(value: &toml::Value) -> Option<String> {
        value.as_str().map(str::to_owned).or_else(|| value.as_integer().map(|count| count.to_string()))
    }
}

macro_rules! choices {
    ($kind:ty: $names:ident = $($name:literal => $variant:path),*) => {
        const $names: &[&str] = &[$($name),*];

        impl Setting for $kind {
            fn parse(text: &str, _: Bounds) -> Option<Self> {
                match text {
                    $($name => Some($variant),)*
                    _ => None,
                }
            }

            fn to_toml(&self) -> String {
                quoted(match self { $($variant => $name,)* })
            }
        }
    };
}

/// Which store keeps messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    Embedded,
    Memory,
    Postgres,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

choices!(StoreKind: STORE_KINDS = "embedded" => StoreKind::Embedded, "memory" => StoreKind::Memory,
    "postgres" => StoreKind::Postgres);
choices!(LogFormat: LOG_FORMATS = "text" => LogFormat::Text, "json" => LogFormat::Json);
choices!(LogLevel: LOG_LEVELS = "error" => LogLevel::Error, "warn" => LogLevel::Warn, "info" => LogLevel::Info,
    "debug" => LogLevel::Debug, "trace" => LogLevel::Trace);
choices!(NetKind: NET_KINDS = "auto" => NetKind::Auto, "ring" => NetKind::Ring, "epoll" => NetKind::Epoll);
choices!(ParkKind: PARK_KINDS = "glommio" => ParkKind::Glommio, "direct" => ParkKind::Direct);
choices!(ClusterMode: CLUSTER_MODES = "none" => ClusterMode::None, "static" => ClusterMode::Static, "etcd" => ClusterMode::Etcd);
choices!(Strategy: STRATEGIES = "consistent_hash" => Strategy::ConsistentHash, "round_robin" => Strategy::RoundRobin,
    "least_connections" => Strategy::LeastConnections, "weighted_random" => Strategy::WeightedRandom);
choices!(PeerTls: PEER_TLS = "on" => PeerTls::On, "off" => PeerTls::Off);
choices!(DevicePolicy: DEVICE_POLICIES = "many" => DevicePolicy::Many,
    "one_per_kind" => DevicePolicy::OnePerKind, "one" => DevicePolicy::One);

macro_rules! settings {
    ($($field:ident: $kind:ty = $name:literal [$unit:literal] $default:expr, $bounds:expr, $text:literal;)*) => {
        /// The effective values.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Config {
            $(#[doc = $text] pub $field: $kind,)*
            sources: BTreeMap<&'static str, Source>,
        }

        /// Every key, in the order of the table.
        pub const KEYS: &[Key] = &[$(Key { name: $name, unit: $unit, bounds: $bounds, text: $text },)*];

        impl Default for Config {
            fn default() -> Self {
                Self { $($field: $default,)* sources: BTreeMap::new() }
            }
        }

        impl Config {
            /// Sets one key from text. Errors: unknown key, bad value.
            pub fn set(&mut self, name: &str, text: &str, source: Source) -> Result<(), ConfigError> {
                match name {
                    $($name => match <$kind>::parse(text, $bounds) {
                        Some(value) => self.$field = value,
                        None => return Err(bad_value($name, text.to_owned(), $bounds, source)),
                    },)*
                    _ => return Err(unknown(name, source)),
                }
                self.note(name, source);
                Ok(())
            }

            fn set_toml(&mut self, name: &str, value: &toml::Value, source: Source) -> Result<(), ConfigError> {
                match name {
                    $($name => match <$kind>::text_of(value) {
                        Some(text) => self.set(name, &text, source),
                        None => Err(bad_value($name, value.to_string(), $bounds, source)),
                    },)*
                    _ => Err(unknown(name, source)),
                }
            }

            /// The value of a key as TOML. `None`: no such key.
            pub fn get(&self, name: &str) -> Option<String> {
                match name {
                    $($name => Some(self.$field.to_toml()),)*
                    _ => None,
                }
            }
        }
    };
}

const MIB: u64 = 1024 * 1024;
const ANY: Bounds = Bounds::Text { may_be_empty: false };
/// Reaches from a second to a day.
const TIMEOUT: Bounds = Bounds::Number(100, 86_400_000);

settings! {
    node_name: String = "node.name" [""] "ringline".to_owned(), ANY,
        "Name of this node, as clients and other nodes are told.";
    net_listen: SocketAddr = "net.listen" [""] SocketAddr::from(([127, 0, 0, 1], 9700)), Bounds::Address,
        "Where clients connect.";
    net_advertise: String = "net.advertise" [""] String::new(), Bounds::Text { may_be_empty: true },
        "Address that clients are told to use, HOST:PORT; empty: the one of net.listen.";
    net_backlog: u32 = "net.backlog" ["connections"] 4_096, Bounds::Number(16, 1_048_576),
        "Connections that wait to be accepted, per core; the kernel caps it at net.core.somaxconn.";
    net_kind: NetKind = "net.kind" [""] NetKind::Auto, Bounds::Choice(NET_KINDS),
        "How sockets are served: an io_uring per core (kernel 6.1 or newer), epoll, or the first where the kernel has it.";
    net_park: ParkKind = "net.park" [""] ParkKind::Direct, Bounds::Choice(PARK_KINDS),
        "How an idle core sleeps: by the executor's ring, or directly in the call that serves the sockets.";
    cores: Cores = "cores" [""] Cores::All, Bounds::Cores,
        "Cores that run a shard each: all, a count, or a list.";
    data_dir: PathBuf = "data_dir" [""] PathBuf::from("ringline-data"), ANY,
        "Folder of everything that is kept: messages, index, issuer key.";
    store_kind: StoreKind = "store.kind" [""] StoreKind::Embedded, Bounds::Choice(STORE_KINDS),
        "Where messages are kept: embedded (on disk), postgres (in a database), or memory (forgotten at the end; for tests).";
    store_segment_bytes: u64 = "store.segment_bytes" ["bytes"] 256 * MIB, Bounds::Number(4_096, 1_024 * MIB),
        "A log goes on in a new file after this.";
    store_cache_bytes: u64 = "store.cache_bytes" ["bytes"] 32 * MIB, Bounds::Number(MIB, 1_048_576 * MIB),
        "Block cache of the index, for the node.";
    store_free_bytes_min: u64 = "store.free_bytes_min" ["bytes"] 64 * MIB, Bounds::Number(0, 1_048_576 * MIB),
        "With less room than this on the disk durable messages are refused with DISK_FULL.";
    postgres_url: DatabaseUrl = "postgres.url" [""] DatabaseUrl::default(), Bounds::Text { may_be_empty: true },
        "The database of store.kind = postgres: postgres://USER@HOST:PORT/DATABASE. Its password is not printed.";
    postgres_password_file: String = "postgres.password_file" [""] String::new(), Bounds::Text { may_be_empty: true },
        "File with the password alone; empty: the one in the URL, else what PGPASSFILE or ~/.pgpass say.";
    postgres_ca: String = "postgres.ca" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of who signed the database's certificate: the way there is encrypted, and it proves who it is.";
    postgres_timeout_ms: u64 = "postgres.timeout_ms" ["ms"] 10_000, Bounds::Number(100, 600_000),
        "A commit or a connection that takes longer is given up: the store connects anew and looks what became of it.";
    retention_age_hours: u64 = "retention.age_hours" ["hours"] 0, Bounds::Number(0, 876_000),
        "Messages older than this are let go, in the embedded store by whole files of a log; 0: however old.";
    retention_size_bytes: u64 = "retention.size_bytes" ["bytes"] 0, Bounds::Number(0, 1_048_576 * 1_048_576 * MIB),
        "The oldest messages are let go while the logs, or the messages in the database, still hold this much; 0: all stay.";
    retention_messages: u64 = "retention.messages" ["messages"] 0, Bounds::Number(0, 1 << 40),
        "Of each conversation at least the newest so many are kept; older ones are not shown; 0: all.";
    retention_interval_ms: u64 = "retention.interval_ms" ["ms"] 60_000, Bounds::Number(1_000, 86_400_000),
        "Time between two looks at what may be let go.";
    cache_conversations: usize = "cache.conversations" ["conversations"] 65_536, Bounds::Number(1_024, 16_777_216),
        "Conversation heads kept in memory, per core.";
    cache_users: usize = "cache.users" ["users"] 65_536, Bounds::Number(1_024, 16_777_216),
        "Users kept in memory, per core.";
    frame_bytes_max: u32 = "limits.frame_bytes_max" ["bytes"] limits::FRAME_BYTES_MAX,
        Bounds::Number(limits::FRAME_BYTES_MAX_BEFORE_LOGIN as u64, limits::FRAME_BYTES_CEILING as u64),
        "Largest frame a logged-in client may send, header included.";
    outbox_bytes_max: usize = "limits.outbox_bytes_max" ["bytes"] 256 * 1024, Bounds::Number(16_384, 64 * MIB),
        "Bytes that may wait for one client; over it durable messages become LAGGED, transient ones are dropped.";
    connections_max: usize = "limits.connections_max" ["connections"] 100_000, Bounds::Number(64, 10_000_000),
        "Connections of this node; more are refused with TOO_MANY_CONNECTIONS. Lowered to what the open-file limit allows.";
    login_timeout_ms: u64 = "limits.login_timeout_ms" ["ms"] 10_000, TIMEOUT,
        "A connection that has not logged in by then is closed.";
    idle_timeout_ms: u64 = "limits.idle_timeout_ms" ["ms"] 60_000, TIMEOUT,
        "A client that is silent for so long is closed.";
    ping_interval_ms: u64 = "limits.ping_interval_ms" ["ms"] 20_000, TIMEOUT,
        "Clients are told to ping after so long a silence; less than the idle timeout.";
    write_stall_ms: u64 = "limits.write_stall_ms" ["ms"] 30_000, TIMEOUT,
        "A client that accepts nothing of its output for so long is closed.";
    requests_per_s: u32 = "limits.requests_per_s" ["requests/s"] 50_000, Bounds::Number(1, 100_000_000),
        "Requests a second that one connection may make; more are refused with RATE_LIMITED.";
    requests_burst: u32 = "limits.requests_burst" ["requests"] 50_000, Bounds::Number(1, 100_000_000),
        "Requests that one connection may make at once after a pause.";
    amend_window_ms: u64 = "limits.amend_window_ms" ["ms"] limits::AMEND_WINDOW_MS, Bounds::Number(0, 31_536_000_000),
        "How long after it was sent a message can be edited or taken back by its sender; later is AMEND_TOO_LATE.";
    devices_policy: DevicePolicy = "devices.policy" [""] DevicePolicy::Many, Bounds::Choice(DEVICE_POLICIES),
        "Devices of one user that may be logged in at once; the oldest is told KICKED.";
    devices_max: u16 = "devices.max" ["devices"] 16, Bounds::Number(1, 1_024),
        "Devices of one user under the policy \"many\".";
    auth_public_keys: Vec<String> = "auth.public_keys" [""] Vec::new(), Bounds::List,
        "PEM files with Ed25519 public keys of outside token issuers.";
    auth_issuer: String = "auth.issuer" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of the Ed25519 key that signs tokens here, which must exist; empty: issuer.pem in the data directory.";
    auth_admins: Vec<UserName> = "auth.admins" [""] Vec::new(), Bounds::Users,
        "Users who may send a notice to everyone online, and delete others.";
    auth_audience: String = "auth.audience" [""] "ringline".to_owned(), ANY,
        "The audience that tokens must name.";
    auth_token_creates_user: bool = "auth.token_creates_user" [""] true, Bounds::Truth,
        "A valid token of an unknown user registers it.";
    workers_threads: usize = "workers.threads" ["threads"] 0, Bounds::Number(0, 256),
        "Threads that check passwords and tokens; 0: one for each core without a shard, at least two.";
    workers_queue: usize = "workers.queue" ["jobs"] 4_096, Bounds::Number(16, 65_536),
        "Checks that may wait, of passwords and of tokens each; more are answered BUSY.";
    admin_listen: Option<SocketAddr> = "admin.listen" [""] None, Bounds::AddressOrNone,
        "Where metrics, health and version are served over HTTP; empty: nowhere. Without a password: keep it on loopback.";
    cluster_mode: ClusterMode = "cluster.mode" [""] ClusterMode::None, Bounds::Choice(CLUSTER_MODES),
        "How nodes find each other: none (one node alone), static (those of cluster.nodes), etcd.";
    cluster_name: String = "cluster.name" [""] "ringline".to_owned(), ANY,
        "Name of the cluster, the same on all its nodes; a node of another cluster is refused.";
    cluster_listen: Option<SocketAddr> = "cluster.listen" [""] None, Bounds::AddressOrNone,
        "Where other nodes connect; empty: this node's peer_address in cluster.nodes.";
    cluster_nodes: Vec<ClusterNode> = "cluster.nodes" [""] Vec::new(), Bounds::Nodes,
        "All nodes of a static cluster, the same list on each; this one is the one called node.name.";
    cluster_advertise: Option<SocketAddr> = "cluster.advertise" [""] None, Bounds::AddressOrNone,
        "With etcd, where other nodes are told to connect; empty: cluster.listen.";
    cluster_weight: u32 = "cluster.weight" [""] 1, Bounds::Number(0, WEIGHT_MAX as u64),
        "With etcd, this node's part of the partitions, against the weights of the others; 0: a gateway, which owns nothing.";
    cluster_client_weight: u32 = "cluster.client_weight" [""] 1, Bounds::Number(0, WEIGHT_MAX as u64),
        "With etcd, this node's part of the clients that are told where to connect.";
    cluster_route: Strategy = "cluster.route" [""] Strategy::ConsistentHash, Bounds::Choice(STRATEGIES),
        "Which node ROUTE names to a client: the one that owns its user, or by another strategy any, which sends it on at LOGIN.";
    cluster_route_listen: Option<SocketAddr> = "cluster.route_listen" [""] None, Bounds::AddressOrNone,
        "Where GET /route?user=NAME is answered over HTTP, for clients; empty: nowhere. It tells names and addresses of nodes.";
    cluster_tls: PeerTls = "cluster.tls" [""] PeerTls::On, Bounds::Choice(PEER_TLS),
        "Whether links between nodes are mutual TLS 1.3; off is allowed on loopback only.";
    cluster_ca: String = "cluster.ca" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of the certificates that sign those of nodes.";
    cluster_cert: String = "cluster.cert" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of this node's certificate and what leads to the CA; its DNS name is the node's name.";
    cluster_key: String = "cluster.key" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of the key of this node's certificate.";
    etcd_endpoints: Vec<String> = "etcd.endpoints" [""] vec!["http://127.0.0.1:2379".to_owned()], Bounds::List,
        "The servers of etcd, http://HOST:PORT or https://HOST:PORT each.";
    etcd_ca: String = "etcd.ca" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of who signed the certificates of etcd, for https:// endpoints.";
    etcd_cert: String = "etcd.cert" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of the certificate that etcd is shown, where it asks for one; with etcd.key.";
    etcd_key: String = "etcd.key" [""] String::new(), Bounds::Text { may_be_empty: true },
        "PEM file of the key of etcd.cert.";
    etcd_username: String = "etcd.username" [""] String::new(), Bounds::Text { may_be_empty: true },
        "User of etcd, where it has such; it needs to read and write what begins with etcd.prefix.";
    etcd_password_file: String = "etcd.password_file" [""] String::new(), Bounds::Text { may_be_empty: true },
        "File whose first line is the password of etcd.username; read anew for each token.";
    etcd_prefix: String = "etcd.prefix" [""] "/ringline".to_owned(), ANY,
        "What all keys of this cluster in etcd begin with: a / first and none last.";
    etcd_timeout_ms: u64 = "etcd.timeout_ms" ["ms"] 2_000, Bounds::Number(100, 3_000),
        "An endpoint of etcd that takes longer is passed over.";
    log_level: LogLevel = "log.level" [""] LogLevel::Info, Bounds::Choice(LOG_LEVELS),
        "Least important messages that are logged, to the standard error.";
    log_format: LogFormat = "log.format" [""] LogFormat::Text, Bounds::Choice(LOG_FORMATS),
        "Lines for people or for programs.";
    server_stop_timeout_ms: u64 = "server.stop_timeout_ms" ["ms"] 10_000, Bounds::Number(0, 600_000),
        "How long an orderly stop waits for what is in flight.";
}

impl Config {
    /// Reads all sources. `flags` come as (key, value, flag name), in order.
    ///
    /// The second part lists environment variables that look like ours and are not: platforms set such for a service of
    /// this name, so they are worth a warning and no more.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        flags: &[(String, String, &'static str)],
    ) -> Result<(Self, Vec<String>), ConfigError> {
        let mut config = Self::default();
        if let Some(path) = file {
            config.read_file(path)?;
        }
        let mut strangers = Vec::new();
        for (name, value) in environment.filter(|(name, _)| name.starts_with(ENV_PREFIX)) {
            match KEYS.iter().find(|key| key.env_name() == name) {
                Some(key) => config.set(key.name, &value, Source::Environment(name))?,
                None => strangers.push(name),
            }
        }
        for (key, value, flag) in flags {
            config.set(key, value, Source::Flag(flag))?;
        }
        config.check()?;
        Ok((config, strangers))
    }

    /// The text of a configuration file, alone.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        config.read_toml(text, Path::new("configuration"))?;
        config.check()?;
        Ok(config)
    }

    fn read_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error: error.to_string() })?;
        self.read_toml(&text, path)
    }

    fn read_toml(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let table: toml::Table = toml::from_str(text).map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| 1 + text.bytes().take(span.start).filter(|&b| b == b'\n').count());
            let error = format!("line {line}: {}", error.message().replace('\n', " "));
            ConfigError::NotToml { path: path.to_owned(), error }
        })?;
        for (name, value) in &table {
            match value {
                toml::Value::Table(inner) => {
                    for (last, value) in inner {
                        self.set_toml(&format!("{name}.{last}"), value, Source::File(path.to_owned()))?;
                    }
                }
                value => self.set_toml(name, value, Source::File(path.to_owned()))?,
            }
        }
        Ok(())
    }

    /// What no single key can say.
    fn check(&self) -> Result<(), ConfigError> {
        if self.ping_interval_ms >= self.idle_timeout_ms {
            return Err(ConfigError::Conflict(format!(
                "limits.ping_interval_ms = {} ({}) must be less than limits.idle_timeout_ms = {} ({})",
                self.ping_interval_ms,
                self.source("limits.ping_interval_ms"),
                self.idle_timeout_ms,
                self.source("limits.idle_timeout_ms"),
            )));
        }
        // Otherwise a message could be accepted that can't be delivered.
        if self.outbox_bytes_max < self.frame_bytes_max as usize {
            return Err(ConfigError::Conflict(format!(
                "limits.outbox_bytes_max = {} ({}) must be at least limits.frame_bytes_max = {} ({})",
                self.outbox_bytes_max,
                self.source("limits.outbox_bytes_max"),
                self.frame_bytes_max,
                self.source("limits.frame_bytes_max"),
            )));
        }
        postgres::check(self)?;
        etcd::check(self)?;
        Ok(cluster::check(self)?)
    }

    /// Where the value of a key came from.
    pub fn source(&self, name: &str) -> Source {
        self.sources.get(name).cloned().unwrap_or_default()
    }

    fn note(&mut self, name: &str, source: Source) {
        if let Some(key) = KEYS.iter().find(|key| key.name == name) {
            self.sources.insert(key.name, source);
        }
    }

    /// A TOML file of all keys with these values and what they mean.
    pub fn to_toml(&self) -> String {
        let mut text = String::from(
            "# Ringline configuration. Every key is optional; the values here are in effect without it.\n",
        );
        let mut section = "";
        // TOML wants keys without a section first.
        let (bare, dotted): (Vec<&Key>, Vec<&Key>) = KEYS.iter().partition(|key| !key.name.contains('.'));
        for key in bare.into_iter().chain(dotted) {
            let (own_section, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if own_section != section {
                text.push_str(&format!("\n[{own_section}]\n"));
                section = own_section;
            }
            let unit = if key.unit.is_empty() { String::new() } else { format!(" Unit: {}.", key.unit) };
            let bounds = key.bounds;
            let value = self.get(key.name).unwrap_or_default();
            text.push_str(&format!("# {}{unit} Must be {bounds}.\n{name} = {value}\n", key.text));
        }
        text
    }

    /// One line a key: name, value, source.
    pub fn show(&self) -> String {
        let width = KEYS.iter().map(|key| key.name.len()).max().unwrap_or(0);
        let values: Vec<String> = KEYS.iter().map(|key| self.get(key.name).unwrap_or_default()).collect();
        let value_width = values.iter().map(String::len).max().unwrap_or(0);
        KEYS.iter()
            .zip(values)
            .map(|(key, value)| format!("{:width$} = {value:value_width$}  # {}\n", key.name, self.source(key.name)))
            .collect()
    }
}

fn bad_value(key: &'static str, value: String, bounds: Bounds, source_: Source) -> ConfigError {
    ConfigError::BadValue { key, value, bounds: bounds.to_string(), source_ }
}

fn unknown(name: &str, source_: Source) -> ConfigError {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let nearest = KEYS.iter().map(|key| key.name).find(|key| {
        key.replace('_', "").eq_ignore_ascii_case(&name.replace(['_', '-'], "")) || last(key) == last(name)
    });
    ConfigError::UnknownKey { key: name.to_owned(), nearest, source_ }
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ringline.toml");
        std::fs::write(&path, file).unwrap();
        let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let flags: Vec<_> = flags.iter().map(|(key, value)| (key.to_string(), value.to_string(), "--set")).collect();
        Config::load(Some(&path), environment, &flags).map(|(config, _)| config)
    }

    fn complaint(file: &str) -> String {
        let text = load(file, &[], &[]).unwrap_err().to_string();
        assert!(!text.contains('\n'), "one line: {text}");
        text
    }

    #[test]
    fn the_printed_defaults_parse_back_to_the_defaults() {
        let mut parsed = Config::default();
        parsed.read_toml(&Config::default().to_toml(), Path::new("x")).unwrap();
        assert_eq!(parsed.sources.len(), KEYS.len(), "every key is printed");
        parsed.sources.clear();
        assert_eq!(parsed, Config::default());
    }

    #[test]
    fn every_default_is_within_its_bounds_and_survives_its_own_text() {
        for key in KEYS {
            let mut config = Config::default();
            let value: toml::Table = toml::from_str(&format!("x = {}", config.get(key.name).unwrap())).unwrap();
            config.set_toml(key.name, &value["x"], Source::Default).unwrap();
            config.sources.clear();
            assert_eq!(config, Config::default(), "{}", key.name);
        }
    }

    #[test]
    fn later_sources_win() {
        let file = "cores = 2\n[net]\nlisten = \"127.0.0.1:1\"\nbacklog = 100\n";
        let config =
            load(file, &[("RINGLINE_NET_LISTEN", "127.0.0.1:2"), ("OTHER", "x")], &[("net.listen", "127.0.0.1:3")]);
        let config = config.unwrap();
        assert_eq!((config.net_listen.port(), config.net_backlog, config.cores.clone()), (3, 100, Cores::Count(2)));
        assert_eq!(config.source("net.listen"), Source::Flag("--set"));
        assert!(matches!(config.source("net.backlog"), Source::File(_)));
        let config = load(file, &[("RINGLINE_NET_LISTEN", "127.0.0.1:2")], &[]).unwrap();
        assert_eq!(config.net_listen.port(), 2);
        assert!(config.show().contains("environment RINGLINE_NET_LISTEN"));
    }

    #[test]
    fn complaints_name_key_value_bounds_and_source() {
        let text = complaint("[net]\nbacklog = 3\n");
        for part in ["net.backlog", " 3:", "16 to 1048576", "ringline.toml"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(complaint("[net]\nlisten = 9700\n").contains("net.listen = 9700: must be an IP address"));
        assert!(complaint("[net]\nlisten = \"localhost\"\n").contains("must be an IP address"));
        assert!(complaint("[log]\nlevel = \"loud\"\n").contains("one of error, warn, info"));
        assert!(complaint("[admin]\nlisten = \"here\"\n").contains("like 127.0.0.1:9701, or empty"));
        assert!(complaint("[auth]\ntoken_creates_user = \"yes\"\n").contains("true or false"));
        assert!(complaint("[auth]\npublic_keys = [1]\n").contains("a list of texts"));
        for admins in ["\"#team\"", "\"ann\", \"\"", "\"b\\u0001b\""] {
            let text = complaint(&format!("[auth]\nadmins = [{admins}]\n"));
            assert!(text.starts_with("auth.admins = ") && text.contains("must be a list of user names"), "{text}");
        }
        let config = load("[auth]\nadmins = [\"ann\", \"bob\"]\n", &[], &[]).unwrap();
        assert_eq!(config.get("auth.admins").unwrap(), "[\"ann\", \"bob\"]");
        assert!(complaint("[net]\nlisen = 1\n").contains("unknown key \"net.lisen\""));
        assert!(complaint("listen = 1\n").contains("did you mean \"net.listen\""));
        assert!(complaint("[net.deep]\nx = 1\n").contains("unknown key"));
        assert!(complaint("[net\n").contains("line 1"));
        assert!(complaint("[limits]\nping_interval_ms = 60000\n").contains("less than limits.idle_timeout_ms"));
        assert!(complaint("[limits]\noutbox_bytes_max = 16384\n").contains("at least limits.frame_bytes_max"));
        let text = load("", &[("RINGLINE_DEVICES_MAX", "-1")], &[]).unwrap_err().to_string();
        assert!(text.contains("devices.max = -1") && text.contains("environment RINGLINE_DEVICES_MAX"), "{text}");
        let text = load("", &[], &[("devices.max", "many")]).unwrap_err().to_string();
        assert!(text.contains("(flag --set)"), "{text}");
    }

    #[test]
    fn unknown_variables_are_listed_and_an_absent_file_is_named() {
        let variables = [("RINGLINE_SERVICE_HOST".to_owned(), "x".to_owned())];
        let (_, strangers) = Config::load(None, variables.into_iter(), &[]).unwrap();
        assert_eq!(strangers, ["RINGLINE_SERVICE_HOST"]);
        let error = Config::load(Some(Path::new("/nowhere.toml")), std::iter::empty(), &[]).unwrap_err();
        assert!(error.to_string().contains("/nowhere.toml"));
    }

    #[test]
    fn core_lists() {
        let parse = |text| Cores::parse(text, Bounds::Cores);
        assert_eq!(parse("all"), Some(Cores::All));
        assert_eq!(parse("4"), Some(Cores::Count(4)));
        assert_eq!(parse("0-3,8"), Some(Cores::List(vec![0, 1, 2, 3, 8])));
        assert_eq!(parse("5-5"), Some(Cores::List(vec![5])));
        assert_eq!(parse("3,1,2-3"), Some(Cores::List(vec![1, 2, 3])));
        for bad in ["", "0", "-1", "3-1", "a", "1,", "1,,2", "0-99999", "1025"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
