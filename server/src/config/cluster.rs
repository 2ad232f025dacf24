//! The `cluster` keys: the types of their values, and what they must be together. Read once at the start.
//!
//! All nodes carry the same list of nodes, themselves included, so one text serves the whole cluster; which of them a
//! process is, `node.name` says. Checked here is what the text alone can tell; files are looked at when the links are set
//! up.

use std::net::SocketAddr;

use ringline_cluster::placement::NODES_MAX;
use ringline_cluster::rendezvous::WEIGHT_MAX;

use super::{Bounds, Config, Setting, quoted};

/// The longest name of a node: one label of a DNS name, because its certificate carries it as one.
pub const NODE_NAME_BYTES_MAX: usize = 63;

/// How nodes find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterMode {
    /// One node alone.
    None,
    /// The nodes of the configuration, each with its own store.
    Static,
    Etcd,
}

/// Whether links between nodes are encrypted and both sides show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerTls {
    On,
    Off,
}

/// One node of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNode {
    pub name: String,
    /// Where other nodes connect to.
    pub peer_address: SocketAddr,
    /// Where clients connect to, HOST:PORT.
    pub client_address: String,
    /// Its part of the partitions; 0: a gateway, which owns nothing.
    pub weight: u32,
    /// Its part of the clients, where `cluster.route` goes by weights; 0: none, unless all have it.
    pub client_weight: u32,
}

/// Why the keys do not make a cluster. Each is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    #[error("cluster.nodes is empty: a static cluster lists all its nodes, this one included")]
    NoNodes,
    #[error("cluster.nodes lists {0} nodes, where {NODES_MAX} are the most")]
    TooMany(usize),
    #[error(
        "cluster.nodes: {0:?} is no name for a node: lower-case letters, digits and -, at most {NODE_NAME_BYTES_MAX}, a letter \
         first and no - last"
    )]
    BadName(String),
    #[error("cluster.nodes lists {0:?} twice")]
    Twice(String),
    #[error("cluster.nodes: {one:?} and {other:?} have the same address {address}")]
    SameAddress { one: String, other: String, address: String },
    #[error("cluster.nodes: {address:?} of {name:?} is no client address, HOST:PORT")]
    ClientAddress { name: String, address: String },
    #[error("cluster.nodes: {name:?} has weight or client_weight {weight}, where {WEIGHT_MAX} is the most")]
    Weight { name: String, weight: u32 },
    #[error("cluster.nodes does not list this node, node.name = {0:?}")]
    OwnNameMissing(String),
    #[error("cluster.nodes: every weight is 0, so nobody would own anything")]
    NoWeight,
    #[error("{key} is empty: with cluster.tls = \"on\" it names a PEM file; `ringline certs init` makes them")]
    NoFile { key: &'static str },
    #[error("cluster.tls = \"off\" with {address}, which is not on loopback: everybody there could pose as a node")]
    NotLoopback { address: SocketAddr },
}

/// In TOML a list of tables; elsewhere `NAME@PEER_ADDRESS/CLIENT_ADDRESS*WEIGHT*CLIENT_WEIGHT,…`, a weight 1 when left out.
impl Setting for Vec<ClusterNode> {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(parse_node).collect()
    }

    fn to_toml(&self) -> String {
        let table = |node: &ClusterNode| {
            let ClusterNode { name, peer_address, client_address, weight, client_weight } = node;
            let (name, peer, client) = (quoted(name), quoted(&peer_address.to_string()), quoted(client_address));
            let weights = format!("weight = {weight}, client_weight = {client_weight}");
            format!("{{ name = {name}, peer_address = {peer}, client_address = {client}, {weights} }}")
        };
        format!("[{}]", self.iter().map(table).collect::<Vec<_>>().join(", "))
    }

    fn text_of(value: &toml::Value) -> Option<String> {
        let nodes = value.as_array()?.iter().map(|value| node_text(value.as_table()?));
        nodes.collect::<Option<Vec<_>>>().map(|nodes| nodes.join(","))
    }
}

fn parse_node(text: &str) -> Option<ClusterNode> {
    let (name, rest) = text.split_once('@')?;
    let (peer, rest) = rest.split_once('/')?;
    let (client, weights) = rest.split_once('*').unwrap_or((rest, "1"));
    let (weight, client_weight) = weights.split_once('*').unwrap_or((weights, "1"));
    let (peer_address, weight, client_weight) = (peer.parse().ok()?, weight.parse().ok()?, client_weight.parse().ok()?);
    let (name, client_address) = (name.to_owned(), client.to_owned());
    Some(ClusterNode { name, peer_address, client_address, weight, client_weight })
}

fn node_text(table: &toml::Table) -> Option<String> {
    const KEYS: [&str; 5] = ["name", "peer_address", "client_address", "weight", "client_weight"];
    let text = |key: &str| table.get(key)?.as_str().filter(|text| !text.contains([',', '@', '/', '*']));
    let number = |key: &str| table.get(key).map_or(Some(1), toml::Value::as_integer);
    let (weight, client_weight) = (number("weight")?, number("client_weight")?);
    let known = table.keys().all(|key| KEYS.contains(&key.as_str()));
    let (name, peer, client) = (text("name")?, text("peer_address")?, text("client_address")?);
    known.then_some(format!("{name}@{peer}/{client}*{weight}*{client_weight}"))
}

impl Config {
    /// Whether this node owns nothing and holds the connections of users of other nodes.
    pub fn is_gateway(&self) -> bool {
        match self.cluster_mode {
            ClusterMode::None => false,
            ClusterMode::Static => {
                self.cluster_nodes.iter().any(|node| node.name == self.node_name && node.weight == 0)
            }
            ClusterMode::Etcd => self.cluster_weight == 0,
        }
    }
}

/// Checks what the keys say together. Nothing is looked at without a cluster.
pub(super) fn check(config: &Config) -> Result<(), ClusterError> {
    match config.cluster_mode {
        ClusterMode::None => return Ok(()),
        ClusterMode::Etcd => return check_tls(config),
        ClusterMode::Static => {}
    }
    let nodes = &config.cluster_nodes;
    if nodes.is_empty() {
        return Err(ClusterError::NoNodes);
    }
    if nodes.len() > NODES_MAX {
        return Err(ClusterError::TooMany(nodes.len()));
    }
    for (at, node) in nodes.iter().enumerate() {
        check_node(node)?;
        for other in nodes.iter().skip(at + 1) {
            check_pair(node, other)?;
        }
    }
    if !nodes.iter().any(|node| node.name == config.node_name) {
        return Err(ClusterError::OwnNameMissing(config.node_name.clone()));
    }
    if nodes.iter().all(|node| node.weight == 0) {
        return Err(ClusterError::NoWeight);
    }
    check_tls(config)
}

fn check_node(node: &ClusterNode) -> Result<(), ClusterError> {
    if !is_node_name(&node.name) {
        return Err(ClusterError::BadName(node.name.clone()));
    }
    if let Some(weight) = [node.weight, node.client_weight].into_iter().find(|weight| *weight > WEIGHT_MAX) {
        return Err(ClusterError::Weight { name: node.name.clone(), weight });
    }
    let port = node.client_address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    match port.and_then(|(_, port)| port.parse::<u16>().ok()) {
        Some(1..) => Ok(()),
        Some(0) | None => {
            let (name, address) = (node.name.clone(), node.client_address.clone());
            Err(ClusterError::ClientAddress { name, address })
        }
    }
}

fn check_pair(node: &ClusterNode, other: &ClusterNode) -> Result<(), ClusterError> {
    if node.name == other.name {
        return Err(ClusterError::Twice(node.name.clone()));
    }
    let same = |address: String| {
        let (one, other) = (node.name.clone(), other.name.clone());
        Err(ClusterError::SameAddress { one, other, address })
    };
    if node.peer_address == other.peer_address {
        return same(node.peer_address.to_string());
    }
    if node.client_address == other.client_address {
        return same(node.client_address.clone());
    }
    Ok(())
}

fn check_tls(config: &Config) -> Result<(), ClusterError> {
    match config.cluster_tls {
        PeerTls::On => {
            let files = [
                ("cluster.ca", &config.cluster_ca),
                ("cluster.cert", &config.cluster_cert),
                ("cluster.key", &config.cluster_key),
            ];
            match files.into_iter().find(|(_, file)| file.is_empty()) {
                Some((key, _)) => Err(ClusterError::NoFile { key }),
                None => Ok(()),
            }
        }
        PeerTls::Off => {
            let nodes = config.cluster_nodes.iter().map(|node| node.peer_address);
            let own = config.cluster_listen.into_iter().chain(config.cluster_advertise);
            match nodes.chain(own).find(|address| !address.ip().is_loopback()) {
                Some(address) => Err(ClusterError::NotLoopback { address }),
                None => Ok(()),
            }
        }
    }
}

/// Whether a node may be called so.
pub fn is_node_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NODE_NAME_BYTES_MAX).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigError;

    const TWO: &str = r#"
        { name = "a", peer_address = "127.0.0.1:9801", client_address = "127.0.0.1:9701" },
        { name = "b", peer_address = "127.0.0.1:9802", client_address = "chat-b.example:9700", weight = 3, client_weight = 0 },
    "#;

    fn parse(rest: &str, nodes: &str) -> Result<Config, ConfigError> {
        let text = format!("[node]\nname = \"a\"\n[cluster]\nmode = \"static\"\n{rest}\nnodes = [{nodes}]\n");
        Config::parse(&text)
    }

    fn refused(nodes: &str) -> ClusterError {
        match parse("tls = \"off\"", nodes) {
            Err(ConfigError::Cluster(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_list_of_nodes_reads_from_every_source_and_back() {
        let config = parse("tls = \"off\"", TWO).unwrap();
        let [a, b] = &config.cluster_nodes[..] else { panic!("{:?}", config.cluster_nodes) };
        assert_eq!((a.name.as_str(), a.weight, b.weight), ("a", 1, 3));
        assert_eq!((a.client_weight, b.client_weight), (1, 0));
        assert_eq!((b.peer_address.port(), b.client_address.as_str()), (9802, "chat-b.example:9700"));
        let printed = config.get("cluster.nodes").unwrap();
        let inner = printed.trim_start_matches('[').trim_end_matches(']');
        assert_eq!(parse("tls = \"off\"", inner).unwrap().cluster_nodes, config.cluster_nodes);
        let text = "a@127.0.0.1:9801/127.0.0.1:9701, b@127.0.0.1:9802/chat-b.example:9700*3*0";
        assert_eq!(Vec::<ClusterNode>::parse(text, Bounds::Nodes), Some(config.cluster_nodes));
        for bad in ["a", "a@x/y", "a@127.0.0.1:1", "a@127.0.0.1:1/b:2*x", "a@127.0.0.1:1/b:2*1*x"] {
            assert_eq!(Vec::<ClusterNode>::parse(bad, Bounds::Nodes), None, "{bad}");
        }
        let odd = r#"{ name = "a", peer_address = "127.0.0.1:1", client_address = "b:2", colour = "red" }"#;
        assert!(matches!(parse("", odd), Err(ConfigError::BadValue { key: "cluster.nodes", .. })));
    }

    #[test]
    fn each_mistake_has_its_error() {
        let node = |name: &str, port: u16, weight: u32| {
            format!(
                r#"{{ name = "{name}", peer_address = "127.0.0.1:{port}", client_address = "c:{port}", weight = {weight} }},"#
            )
        };
        assert_eq!(refused(""), ClusterError::NoNodes);
        assert_eq!(refused(&(node("a", 1, 1) + &node("a", 2, 1))), ClusterError::Twice("a".into()));
        assert_eq!(refused(&node("b", 1, 1)), ClusterError::OwnNameMissing("a".into()));
        assert_eq!(refused(&(node("a", 1, 0) + &node("b", 2, 0))), ClusterError::NoWeight);
        assert!(matches!(refused(&(node("a", 1, 1) + &node("b", 1, 1))), ClusterError::SameAddress { .. }));
        assert!(matches!(refused(&node("a", 1, 1_001)), ClusterError::Weight { weight: 1_001, .. }));
        let heavy = r#"{ name = "a", peer_address = "127.0.0.1:1", client_address = "c:1", client_weight = 1001 }"#;
        assert!(matches!(refused(heavy), ClusterError::Weight { weight: 1_001, .. }));
        for name in ["A", "1a", "a-", "a_b", "a.b", &"a".repeat(64)] {
            assert_eq!(refused(&node(name, 1, 1)), ClusterError::BadName(name.into()));
        }
        for address in ["c", ":1", "c:0", "c:99999"] {
            let node = format!(r#"{{ name = "a", peer_address = "127.0.0.1:1", client_address = "{address}" }}"#);
            assert!(matches!(refused(&node), ClusterError::ClientAddress { .. }), "{address}");
        }
        let far = r#"{ name = "a", peer_address = "192.0.2.1:1", client_address = "c:1" }"#;
        let address = SocketAddr::from(([192, 0, 2, 1], 1));
        assert_eq!(refused(far), ClusterError::NotLoopback { address });
        let key = "cluster.cert";
        let error = ConfigError::Cluster(ClusterError::NoFile { key });
        assert_eq!(parse("ca = \"ca.pem\"", TWO), Err(error));
        assert!(parse("ca = \"ca.pem\"\ncert = \"a.pem\"\nkey = \"a.key\"", far).is_ok());
    }
}
