//! A node as one of several: what the configuration says of the cluster, the port for other nodes, and what each core makes
//! its links of. Owned by the main thread until the cores have taken their parts.

use std::sync::Arc;

use ringline_cluster::placement::{ClusterPlacement, CorePlacement, PlacementError};
use ringline_core::config::ClusterConfig;

use crate::boot::BootError;
use crate::config::{ClusterMode, Config};
use crate::net::Admission;
use crate::peers::PeerLinks;
use crate::peers::door::{self, Arrivals, Door};
use crate::peers::roster::Roster;
use crate::wake::Waker;

/// See the module.
pub struct Joined {
    pub config: ClusterConfig,
    /// One a core.
    pub seeds: Vec<LinkSeed>,
    /// Accepts as long as it is there.
    pub door: Door,
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
    let roster = Arc::new(Roster::from_config(config, shards)?);
    let own = config.cluster_nodes.iter().find(|node| node.name == config.node_name);
    let listen = config.cluster_listen.or(own.map(|own| own.peer_address));
    let listen = listen.ok_or_else(|| PlacementError::NotListed(config.node_name.clone()))?;
    let bound = door::bind(listen).map_err(|error| BootError::PeerListen(listen, error))?;
    let (door, arrivals) = door::open(bound, wakers).map_err(|error| BootError::PeerListen(listen, error))?;
    tracing::info!("other nodes connect to {listen}; cluster {} of {} nodes", config.cluster_name, nodes.len());
    let seed = |arrivals| LinkSeed { roster: roster.clone(), arrivals };
    let seeds = arrivals.into_iter().map(seed).collect();
    Ok(Some(Joined { config: ClusterConfig { placement, nodes }, seeds, door }))
}
