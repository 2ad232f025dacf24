//! What all cores know of the cluster: names, addresses, certificates, which process this is. Made at the start, shared.
//!
//! The only thing that changes is the newest incarnation heard of each node, looked at when a connection says hello.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use ringline_cluster::link::hello::{Hello, Incarnation, PROTOCOL};
use ringline_cluster::placement::NodeIndex;

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
}

/// One node of the cluster.
#[derive(Debug)]
pub struct RosterNode {
    pub name: String,
    pub address: SocketAddr,
    newest: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Roster {
    cluster: String,
    /// Sorted by name: a place in it is a [`NodeIndex`].
    nodes: Vec<RosterNode>,
    own: NodeIndex,
    incarnation: Incarnation,
    shards: u16,
    /// What all nodes must have alike: who is on the list, and who owns what.
    list: u64,
    identity: Option<Identity>,
}

impl Roster {
    /// Of a checked configuration. Reads the certificates, and takes an incarnation above that of the last start.
    ///
    /// Errors: [`RosterError`].
    pub fn from_config(config: &Config, shards: u16) -> Result<Self, RosterError> {
        let nodes = config.cluster_nodes.iter().map(|node| (node.name.clone(), node.peer_address)).collect();
        let identity = match config.cluster_tls {
            PeerTls::On => {
                let files =
                    (Path::new(&config.cluster_ca), Path::new(&config.cluster_cert), Path::new(&config.cluster_key));
                Some(Identity::load(files, &config.node_name)?)
            }
            PeerTls::Off => None,
        };
        let incarnation = next_incarnation(&config.data_dir)?;
        Self::new((&config.cluster_name, &config.node_name), nodes, (incarnation, shards), identity)
    }

    /// `nodes`: names and peer addresses of all, in any order. Errors: the own name is not among them.
    pub fn new(
        (cluster, own): (&str, &str),
        mut nodes: Vec<(String, SocketAddr)>,
        (incarnation, shards): (Incarnation, u16),
        identity: Option<Identity>,
    ) -> Result<Self, RosterError> {
        nodes.sort();
        let at = nodes.iter().position(|(name, _)| name == own);
        let at = at.ok_or_else(|| RosterError::NotListed(own.to_owned()))?;
        let node = |(name, address)| RosterNode { name, address, newest: AtomicU64::new(0) };
        Ok(Self {
            cluster: cluster.to_owned(),
            nodes: nodes.into_iter().map(node).collect(),
            own: NodeIndex(at as u16),
            incarnation,
            shards,
            list: 0,
            identity,
        })
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
        self.identity.as_ref()
    }

    /// All nodes but this one.
    pub fn others(&self) -> impl Iterator<Item = (NodeIndex, &RosterNode)> {
        let all = self.nodes.iter().enumerate().map(|(at, node)| (NodeIndex(at as u16), node));
        all.filter(|(node, _)| *node != self.own)
    }

    pub fn find(&self, name: &str) -> Option<NodeIndex> {
        let at = self.nodes.binary_search_by(|node| node.name.as_str().cmp(name)).ok()?;
        Some(NodeIndex(at as u16))
    }

    pub fn node(&self, node: NodeIndex) -> Option<&RosterNode> {
        self.nodes.get(usize::from(node.0))
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
        let newest = self.node(node)?.newest.load(Ordering::Relaxed);
        (newest != 0).then_some(Incarnation(newest))
    }

    pub(super) fn saw(&self, node: NodeIndex, incarnation: Incarnation) {
        if let Some(node) = self.node(node) {
            node.newest.fetch_max(incarnation.0, Ordering::Relaxed);
        }
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
}
