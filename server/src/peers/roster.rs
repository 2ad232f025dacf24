//! What all cores know of the cluster: names, addresses, certificates, which process this is. Shared, and never changed: where
//! nodes come and go, each core is given the next one ([`Roster::with_nodes`]).
//!
//! What changes is the newest incarnation heard of each node, the same for all rosters of a process, looked at when a
//! connection says hello. A node that is not listed any more keeps its number and its name.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use ringline_cluster::link::hello::{Hello, Incarnation, PROTOCOL};
use ringline_cluster::placement::{NODES_MAX, NodeIndex};

use super::secure::{Identity, SecureError};
use crate::config::{Config, PeerTls};

/// Where the incarnation of the last start is kept, in the data directory.
const INCARNATION_FILE: &str = "incarnation";

/// Why the links can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum RosterError {
    #[error(transparent)]
    Secure(#[from] SecureError),
    #[error("{path}: {error}", path = path.display())]
    Incarnation { path: PathBuf, error: io::Error },
    #[error("cluster.nodes does not list this node, {0:?}")]
    NotListed(String),
    #[error("node {0:?} has the number {1}, where {NODES_MAX} are the most")]
    TooMany(String, u16),
}

/// One node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterNode {
    pub name: String,
    pub address: SocketAddr,
    /// Whether it belongs to the cluster now.
    pub is_listed: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Roster {
    cluster: String,
    /// A place in it is a [`NodeIndex`]; at most [`NODES_MAX`].
    nodes: Vec<Option<RosterNode>>,
    /// By number of node.
    newest: Arc<[AtomicU64; NODES_MAX]>,
    own: NodeIndex,
    incarnation: Incarnation,
    shards: u16,
    /// What all nodes must have alike: who is on the list, and who owns what.
    list: u64,
    identity: Option<Arc<Identity>>,
}

impl Roster {
    /// Of a checked configuration. Reads the certificates, and takes an incarnation above that of the last start.
    ///
    /// Errors: [`RosterError`].
    pub fn from_config(config: &Config, shards: u16) -> Result<Self, RosterError> {
        let nodes = config.cluster_nodes.iter().map(|node| (node.name.clone(), node.peer_address)).collect();
        let identity = identity_of(config)?;
        let incarnation = next_incarnation(&config.data_dir)?;
        Self::new((&config.cluster_name, &config.node_name), nodes, (incarnation, shards), identity)
    }

    /// `nodes`: names and peer addresses of all, in any order; their numbers follow from their names. Errors: the own name
    /// is not among them, or there are too many.
    pub fn new(
        names: (&str, &str),
        mut nodes: Vec<(String, SocketAddr)>,
        process: (Incarnation, u16),
        identity: Option<Identity>,
    ) -> Result<Self, RosterError> {
        nodes.sort();
        let numbered = (0..).map(NodeIndex).zip(nodes).map(|(number, (name, address))| (number, name, address));
        Self::numbered(names, numbered.collect(), process, identity)
    }

    /// The same of nodes that have numbers already. `names`: of the cluster and of this node.
    pub fn numbered(
        (cluster, own): (&str, &str),
        nodes: Vec<(NodeIndex, String, SocketAddr)>,
        (incarnation, shards): (Incarnation, u16),
        identity: Option<Identity>,
    ) -> Result<Self, RosterError> {
        let at = nodes.iter().find(|(_, name, _)| name == own).map(|(number, ..)| *number);
        let empty = Self {
            cluster: cluster.to_owned(),
            nodes: Vec::new(),
            newest: Arc::new([const { AtomicU64::new(0) }; NODES_MAX]),
            own: at.ok_or_else(|| RosterError::NotListed(own.to_owned()))?,
            incarnation,
            shards,
            list: 0,
            identity: identity.map(Arc::new),
        };
        empty.with_nodes(&nodes)
    }

    /// The same process with these nodes; itself stays as it was if it is not among them. Those that are not any more keep
    /// their names and are not listed. Errors: a number above the highest; nothing is made.
    pub fn with_nodes(&self, list: &[(NodeIndex, String, SocketAddr)]) -> Result<Self, RosterError> {
        let mut nodes = self.nodes.clone();
        for (at, known) in nodes.iter_mut().enumerate() {
            if let Some(known) = known {
                known.is_listed = at == usize::from(self.own.0);
            }
        }
        for (number, name, address) in list {
            let at = usize::from(number.0);
            if at >= NODES_MAX {
                return Err(RosterError::TooMany(name.clone(), number.0));
            }
            if nodes.len() <= at {
                nodes.resize(at + 1, None);
            }
            if let Some(place) = nodes.get_mut(at) {
                *place = Some(RosterNode { name: name.clone(), address: *address, is_listed: true });
            }
        }
        let Self { cluster, newest, own, incarnation, shards, list, identity, nodes: _ } = self;
        Ok(Self {
            cluster: cluster.clone(),
            nodes,
            newest: Arc::clone(newest),
            own: *own,
            incarnation: *incarnation,
            shards: *shards,
            list: *list,
            identity: identity.clone(),
        })
    }

    /// Whether the same nodes are listed, at the same addresses.
    pub fn lists_as(&self, other: &Self) -> bool {
        self.nodes == other.nodes
    }

    /// With the fingerprint of the placement that follows from the list.
    pub fn with_list(self, list: u64) -> Self {
        Self { list, ..self }
    }

    pub fn own(&self) -> NodeIndex {
        self.own
    }

    pub fn own_name(&self) -> &str {
        self.name(self.own)
    }

    /// Shards of this node.
    pub fn shards(&self) -> u16 {
        self.shards
    }

    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    pub(super) fn identity(&self) -> Option<&Identity> {
        self.identity.as_deref()
    }

    /// All nodes that are listed but this one.
    pub fn others(&self) -> impl Iterator<Item = (NodeIndex, &RosterNode)> {
        let all = (0..).map(NodeIndex).zip(&self.nodes).filter_map(|(number, node)| Some((number, node.as_ref()?)));
        all.filter(|(number, node)| *number != self.own && node.is_listed)
    }

    /// One that is listed.
    pub fn find(&self, name: &str) -> Option<NodeIndex> {
        let found = |node: &Option<RosterNode>| node.as_ref().is_some_and(|node| node.is_listed && node.name == name);
        Some(NodeIndex(self.nodes.iter().position(found)? as u16))
    }

    /// Listed, or once so.
    pub fn node(&self, node: NodeIndex) -> Option<&RosterNode> {
        self.nodes.get(usize::from(node.0))?.as_ref()
    }

    /// Empty for a node that is not there.
    pub fn name(&self, node: NodeIndex) -> &str {
        self.node(node).map_or("", |node| node.name.as_str())
    }

    /// The hello of one core of this process.
    pub(super) fn hello(&self, core: u16, knows: Option<(Incarnation, u64)>) -> Hello {
        Hello {
            cluster: self.cluster.clone(),
            node: self.own_name().to_owned(),
            incarnation: self.incarnation,
            list: self.list,
            protocol: (*PROTOCOL.start(), *PROTOCOL.end()),
            cores: self.shards,
            core,
            knows,
        }
    }

    /// The newest incarnation heard of by any core.
    pub(super) fn newest(&self, node: NodeIndex) -> Option<Incarnation> {
        let newest = self.newest.get(usize::from(node.0))?.load(Ordering::Relaxed);
        (newest != 0).then_some(Incarnation(newest))
    }

    pub(super) fn saw(&self, node: NodeIndex, incarnation: Incarnation) {
        if let Some(newest) = self.newest.get(usize::from(node.0)) {
            newest.fetch_max(incarnation.0, Ordering::Relaxed);
        }
    }
}

/// The certificates that a configuration names; `None`: links without TLS.
pub fn identity_of(config: &Config) -> Result<Option<Identity>, SecureError> {
    match config.cluster_tls {
        PeerTls::On => {
            let files =
                (Path::new(&config.cluster_ca), Path::new(&config.cluster_cert), Path::new(&config.cluster_key));
            Identity::load(files, &config.node_name).map(Some)
        }
        PeerTls::Off => Ok(None),
    }
}

/// Unix milliseconds now, and above that of the last start even if the clock was set back.
fn next_incarnation(data_dir: &Path) -> Result<Incarnation, RosterError> {
    let path = data_dir.join(INCARNATION_FILE);
    let failed = |error| RosterError::Incarnation { path: path.clone(), error };
    let last: u64 = match std::fs::read_to_string(&path) {
        // Damaged: the clock alone decides.
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(failed(error)),
    };
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let next = now_ms.max(last.saturating_add(1));
    std::fs::create_dir_all(data_dir).map_err(failed)?;
    let written = data_dir.join(format!("{INCARNATION_FILE}.new"));
    std::fs::write(&written, format!("{next}\n")).map_err(failed)?;
    std::fs::rename(&written, &path).map_err(failed)?;
    Ok(Incarnation(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_has_a_higher_incarnation_even_with_a_clock_that_was_set_back() {
        let folder = tempfile::tempdir().unwrap();
        let first = next_incarnation(folder.path()).unwrap();
        assert!(next_incarnation(folder.path()).unwrap() > first);
        let far = 1 << 60;
        std::fs::write(folder.path().join(INCARNATION_FILE), format!("{far}\n")).unwrap();
        assert_eq!(next_incarnation(folder.path()).unwrap(), Incarnation(far + 1));
        std::fs::write(folder.path().join(INCARNATION_FILE), "rubbish").unwrap();
        assert!(next_incarnation(folder.path()).unwrap() >= first);
    }

    #[test]
    fn nodes_are_numbered_by_their_names() {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let nodes = ["c", "a", "b"].map(|name| (name.to_owned(), address));
        let roster = Roster::new(("x", "b"), nodes.to_vec(), (Incarnation(1), 2), None).unwrap();
        assert_eq!((roster.own(), roster.find("c"), roster.find("d")), (NodeIndex(1), Some(NodeIndex(2)), None));
        let others: Vec<_> = roster.others().map(|(node, other)| (node.0, other.name.as_str())).collect();
        assert_eq!(others, [(0, "a"), (2, "c")]);
        assert!(matches!(Roster::new(("x", "d"), vec![], (Incarnation(1), 2), None), Err(RosterError::NotListed(_))));
    }

    #[test]
    fn nodes_come_and_go_and_keep_their_numbers() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let node = |number, name: &str, port| (NodeIndex(number), name.to_owned(), address(port));
        let process = (Incarnation(1), 2);
        let first = Roster::numbered(("x", "b"), vec![node(40, "b", 1), node(3, "a", 2)], process, None).unwrap();
        assert_eq!((first.own(), first.find("a"), first.others().count()), (NodeIndex(40), Some(NodeIndex(3)), 1));
        first.saw(NodeIndex(63), Incarnation(9));
        // `a` is gone, `c` is new and has the highest number.
        let second = first.with_nodes(&[node(63, "c", 3)]).unwrap();
        assert_eq!((second.own_name(), second.find("a"), second.name(NodeIndex(3))), ("b", None, "a"));
        assert_eq!(second.find("b"), Some(NodeIndex(40)));
        assert_eq!(second.others().map(|(number, _)| number.0).collect::<Vec<_>>(), [63]);
        assert_eq!(second.newest(NodeIndex(63)), Some(Incarnation(9)), "what was heard stays known");
        // `a` is back, elsewhere.
        let third = second.with_nodes(&[node(3, "a", 7), node(63, "c", 3)]).unwrap();
        assert_eq!(third.node(NodeIndex(3)).unwrap().address, address(7));
        assert_eq!(third.others().count(), 2);
        let refused = first.with_nodes(&[node(64, "d", 4)]);
        assert!(matches!(refused, Err(RosterError::TooMany(name, 64)) if name == "d"));
    }
}
