//! A node as one of several: what the configuration says of the cluster, the port for other nodes, and what each core makes
//! its links of. Owned by the main thread until the cores have taken their parts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::membership::{Member, Standing};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, PlacementError};
use ringline_cluster::reconcile::Start;
use ringline_core::config::{ClusterConfig, Lease};
use ringline_schema::ids::{PARTITIONS, Partition};
use ringline_store::postgres::Ownership;
use tokio::sync::{Notify, watch as changing};

use crate::boot::BootError;
use crate::config::{ClusterMode, Config, ConfigError, EtcdKeyError};
use crate::etcd::entry::Entry;
use crate::etcd::lease::LeaseClock;
use crate::net::Admission;
use crate::peers::PeerLinks;
use crate::peers::door::{self, Arrivals, Door};
use crate::peers::roster::{Roster, RosterError, identity_of};
use crate::steward::desk::{self, OrdersPort};
use crate::steward::view::Watching;
use crate::steward::{Own, StewardParts};
use crate::wake::Waker;

/// See the module.
pub struct Joined {
    pub config: ClusterConfig,
    /// One a core.
    pub seeds: Vec<LinkSeed>,
    /// Accepts as long as it is there.
    pub door: Door,
    /// `None`: the nodes of the configuration stay those that they are.
    pub moving: Option<Moving>,
}

/// What a node of etcd has beside its links.
pub struct Moving {
    pub parts: StewardParts<Ownership>,
    /// The desk's.
    pub bell: Arc<Notify>,
    pub lease: Lease,
    /// One a core.
    pub ports: Vec<OrdersPort>,
    /// For who only wants to know.
    pub watching: Watching,
}

/// What a core makes its links of.
pub struct LinkSeed {
    roster: Arc<Roster>,
    arrivals: Arrivals,
}

impl LinkSeed {
    /// The links of core `shard`.
    pub fn links(self, shard: u16, admission: Arc<Admission>, now_ms: u64) -> PeerLinks {
        PeerLinks::new(self.roster, shard, (admission, self.arrivals), now_ms)
    }
}

/// Joins by etcd, with the place that this start has in the database; `listening`: where clients connect; `epoch`: of the
/// cores' clock. Errors: those of keys and certificates, and of the port for other nodes.
pub fn join_moving(
    (config, ownership): (&Config, Ownership),
    wakers: &[Arc<Waker>],
    (listening, epoch): (SocketAddr, Instant),
) -> Result<Joined, BootError> {
    let shards = wakers.len() as u16;
    let cores = CorePlacement::new(shards).or(CorePlacement::new(1));
    let cores = cores.unwrap_or_else(|| unreachable!("one shard is always a placement"));
    let (number, start) = (NodeIndex(u16::from(ownership.number())), Start(ownership.start().0));
    let name = config.node_name.clone();
    let placement = ClusterPlacement::moving(number, cores);
    let placement = placement.ok_or_else(|| RosterError::TooMany(name.clone(), number.0))?;
    let etcd = config.etcd().map_err(ConfigError::from)?;
    if let Some(endpoint) = etcd.open_login() {
        tracing::warn!(
            "the password of etcd.username is sent to {endpoint} so that it can be read on the way: use https://"
        );
    }
    let listen = config.cluster_listen.ok_or(ConfigError::from(EtcdKeyError::NoListen))?;
    let bound = door::bind(listen).map_err(|error| BootError::PeerListen(listen, error))?;
    let (door, arrivals) = door::open(bound, wakers).map_err(|error| BootError::PeerListen(listen, error))?;
    let address = config.peer_address().unwrap_or(door.address());
    let incarnation = Incarnation(start.0.unsigned_abs());
    let nodes = vec![(number, name.clone(), address)];
    let identity = identity_of(config).map_err(RosterError::from)?;
    let roster = Roster::numbered((&config.cluster_name, &name), nodes, (incarnation, shards), identity)?;
    let roster = Arc::new(roster.with_list(placement.fingerprint()));
    tracing::info!(
        "node {name} is number {} of cluster {}, this is its start {}; other nodes on {}",
        number.0,
        config.cluster_name,
        start.0,
        door.address()
    );
    let member = Member {
        incarnation,
        peer_address: address,
        client_address: advertised(config, listening),
        weight: config.cluster_weight,
        client_weight: config.cluster_client_weight,
        connections: 0,
        standing: Standing::Up,
    };
    let bell = Arc::new(Notify::new());
    let (desk, ports) = desk::desk(wakers, &bell);
    let lease = Lease::new(0);
    let clock = LeaseClock::new(epoch, lease.clone());
    let (entry, _) = changing::channel(Entry { member, start, number, owned: Some(0) });
    let seeds = arrivals.into_iter().map(|arrivals| LinkSeed { roster: roster.clone(), arrivals }).collect();
    let own = Own { name, number, start };
    let (view, watching) = changing::channel(Arc::default());
    let watching = Watching { view: watching, clock: clock.clone(), own: number };
    let board = Arc::default();
    let parts = StewardParts { own, etcd, registry: ownership, clock, desk, roster, entry, board, view };
    let config = ClusterConfig { placement, nodes: Vec::new() };
    Ok(Joined { config, seeds, door, moving: Some(Moving { parts, bell, lease, ports, watching }) })
}

/// Reads certificates, takes an incarnation and opens the port for other nodes; `None`: the node is alone.
///
/// Errors: those of the roster, of the placement, and of the port.
pub fn join(config: &Config, wakers: &[Arc<Waker>]) -> Result<Option<Joined>, BootError> {
    if config.cluster_mode != ClusterMode::Static {
        return Ok(None);
    }
    let shards = wakers.len() as u16;
    let cores = CorePlacement::new(shards).or(CorePlacement::new(1));
    let cores = cores.unwrap_or_else(|| unreachable!("one shard is always a placement"));
    let weights: Vec<_> = config.cluster_nodes.iter().map(|node| (node.name.clone(), node.weight)).collect();
    let placement = ClusterPlacement::new(&config.node_name, cores, &weights)?;
    let mut nodes: Vec<_> =
        config.cluster_nodes.iter().map(|node| (node.name.clone(), node.client_address.clone())).collect();
    nodes.sort();
    let roster = Arc::new(Roster::from_config(config, shards)?.with_list(placement.fingerprint()));
    let own = config.cluster_nodes.iter().find(|node| node.name == config.node_name);
    let listen = config.cluster_listen.or(own.map(|own| own.peer_address));
    let listen = listen.ok_or_else(|| PlacementError::NotListed(config.node_name.clone()))?;
    let bound = door::bind(listen).map_err(|error| BootError::PeerListen(listen, error))?;
    let (door, arrivals) = door::open(bound, wakers).map_err(|error| BootError::PeerListen(listen, error))?;
    let owned = (0..PARTITIONS).filter_map(Partition::new);
    let owned = owned.filter(|partition| placement.node_of(*partition) == placement.own()).count();
    let (name, of, cluster_name) = (roster.own_name(), nodes.len(), &config.cluster_name);
    let address = door.address();
    tracing::info!("node {name} of {of} in cluster {cluster_name} owns {owned} partitions; other nodes on {address}");
    let seed = |arrivals| LinkSeed { roster: roster.clone(), arrivals };
    let seeds = arrivals.into_iter().map(seed).collect();
    Ok(Some(Joined { config: ClusterConfig { placement, nodes }, seeds, door, moving: None }))
}

/// Where clients are told to connect: `net.advertise`, or what the list of nodes says, or the address that is listened on.
pub fn advertised(config: &Config, listening: SocketAddr) -> String {
    let own = config.cluster_nodes.iter().find(|node| node.name == config.node_name);
    match (config.net_advertise.is_empty(), own.filter(|_| config.cluster_mode == ClusterMode::Static)) {
        (false, _) => config.net_advertise.clone(),
        (true, Some(own)) => own.client_address.clone(),
        (true, None) => listening.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClusterNode;

    #[test]
    fn clients_are_told_the_most_special_address() {
        let listening = SocketAddr::from(([127, 0, 0, 1], 9700));
        let mut config = Config::default();
        assert_eq!(advertised(&config, listening), "127.0.0.1:9700");
        config.node_name = "a".into();
        let client_address = "chat-a.example:9700".to_owned();
        config.cluster_nodes = vec![ClusterNode {
            name: "a".into(),
            peer_address: listening,
            client_address,
            weight: 1,
            client_weight: 1,
        }];
        assert_eq!(advertised(&config, listening), "127.0.0.1:9700", "a list without a cluster says nothing");
        config.cluster_mode = ClusterMode::Static;
        assert_eq!(advertised(&config, listening), "chat-a.example:9700");
        config.net_advertise = "here:1".into();
        assert_eq!(advertised(&config, listening), "here:1");
    }
}
