//! Partition → node → core. Within a node: partition number modulo the number of cores.
//!
//! The core is fixed by the partition and the core count alone, so every core computes the owner of anything without
//! asking. A restart with another count only changes who owns what, never where a record is read from. The node
//! ([`ClusterPlacement`]) is fixed by the names and weights of the configuration, whoever of them is alive; or, where
//! partitions change hands, it is who the database says ([`Ownership`]), and of some partitions perhaps nobody.
//!
//! A [`ShardIndex`] names a shard of any node, in the 16 bits that it takes within one: the node in the upper 6, the core
//! in the lower 10, as many as there are partitions to own. So the shards of a node that is alone (or the first of its
//! cluster) are 0, 1, 2 …, nothing that carries an index grows, and a node alone pays nothing. The price is
//! [`NODES_MAX`].

use ringline_schema::ids::{PARTITIONS, Partition};

use crate::ownership::{Ownership, PartitionSet, all};
use crate::rendezvous::{self, Candidate};

/// Nodes whose shards can be named.
pub const NODES_MAX: usize = 64;
const WITHIN_BITS: u32 = 10;
const _: () = assert!(1 << WITHIN_BITS == PARTITIONS as usize && NODES_MAX << WITHIN_BITS == 1 << u16::BITS);

/// A shard of the cluster: its node, and 0 to cores − 1 within that. One shard a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardIndex(pub u16);

impl ShardIndex {
    /// What does not fit ([`NODES_MAX`] nodes, 1,024 cores) is cut off: callers have checked both.
    pub fn new(node: NodeIndex, within: u16) -> Self {
        debug_assert!(usize::from(node.0) < NODES_MAX && within < PARTITIONS);
        Self(node.0 << WITHIN_BITS | (within & (PARTITIONS - 1)))
    }

    pub fn node(self) -> NodeIndex {
        NodeIndex(self.0 >> WITHIN_BITS)
    }

    /// Its number in its node.
    pub fn within(self) -> u16 {
        self.0 & (PARTITIONS - 1)
    }
}

/// Stands for the shard of a partition that nobody owns now: the last core of the last node, which no node has as long as
/// [`ClusterPlacement::learn`] does not take 1,024 cores of that one.
pub const NOBODY: ShardIndex = ShardIndex(u16::MAX);

/// Number of a node: its place in the sorted list of the cluster's names, or, where nodes come and go, what it was given by
/// its name once for ever. The same on all nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeIndex(pub u16);

/// How the 1,024 partitions spread over the shards of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorePlacement {
    shards: u16,
}

impl CorePlacement {
    /// `None` unless there are 1 to 1,024 shards.
    pub fn new(shards: u16) -> Option<Self> {
        (1..=PARTITIONS).contains(&shards).then_some(Self { shards })
    }

    pub fn shards(self) -> u16 {
        self.shards
    }

    pub fn shard_of(self, partition: Partition) -> ShardIndex {
        ShardIndex(partition.number() % self.shards)
    }

    /// How many partitions a shard owns: equal to within one.
    pub fn partitions_of(self, shard: ShardIndex) -> u16 {
        (PARTITIONS - shard.within()).div_ceil(self.shards)
    }
}

/// Names and weights that make no cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error("{0} nodes in the cluster, where {NODES_MAX} are the most")]
    TooMany(usize),
    #[error("node {0:?} is not in the cluster's own list")]
    NotListed(String),
    #[error("two nodes are called {0:?}")]
    Twice(String),
    #[error("no node has a weight above 0: nobody would own anything")]
    NoOwner,
}

/// Who owns what in a cluster, as one shard knows it. Of configured nodes those that are away keep what they own; where
/// partitions change hands it follows what [`ClusterPlacement::follow`] is told. One look into a table says the shard.
#[derive(Clone, Debug)]
pub struct ClusterPlacement {
    own: NodeIndex,
    moves: bool,
    /// By number of node. `None`: never seen, so nobody knows how many cores it has.
    cores: Vec<Option<CorePlacement>>,
    /// By number of partition. `None`: nobody, or it is not served now.
    owners: Vec<Option<NodeIndex>>,
    /// The same with cores; [`NOBODY`] for `None`.
    shards: Vec<ShardIndex>,
    /// Bit n: there is a node of number n.
    present: u64,
    /// Bit n: it owns something.
    owning: u64,
    fingerprint: u64,
}

impl ClusterPlacement {
    /// `nodes`: names and weights in any order, the own one among them. Errors: [`PlacementError`].
    pub fn new(own: &str, cores: CorePlacement, nodes: &[(String, u32)]) -> Result<Self, PlacementError> {
        if nodes.len() > NODES_MAX {
            return Err(PlacementError::TooMany(nodes.len()));
        }
        let mut sorted: Vec<_> = nodes.iter().map(|(name, weight)| Candidate { name, weight: *weight }).collect();
        sorted.sort_by(|one, other| one.name.cmp(other.name));
        if let Some([one, _]) = sorted.array_windows().find(|[one, other]| one.name == other.name) {
            return Err(PlacementError::Twice(one.name.to_owned()));
        }
        let place = sorted.iter().position(|node| node.name == own);
        let place = place.ok_or_else(|| PlacementError::NotListed(own.to_owned()))?;
        let owners = rendezvous::owners(&sorted).into_iter().map(|owner| Some(NodeIndex(owner? as u16)));
        let owners = owners.collect::<Vec<_>>();
        if owners.contains(&None) {
            return Err(PlacementError::NoOwner);
        }
        let mut text = Vec::new();
        for node in &sorted {
            text.extend_from_slice(node.name.as_bytes());
            text.push(b'\n');
        }
        owners.iter().flatten().for_each(|owner| text.extend_from_slice(&owner.0.to_le_bytes()));
        let fingerprint = xxhash_rust::xxh3::xxh3_64(&text);
        let mut all = vec![None; sorted.len()];
        if let Some(known) = all.get_mut(place) {
            *known = Some(cores);
        }
        let present = (0..sorted.len()).fold(0, |present, node| present | 1 << node);
        let (own, moves, shards) = (NodeIndex(place as u16), false, vec![NOBODY; owners.len()]);
        let mut placement = Self { own, moves, cores: all, owners, shards, present, owning: 0, fingerprint };
        placement.count_cores();
        Ok(placement)
    }

    /// Of a cluster whose partitions change hands: nobody owns anything until [`ClusterPlacement::follow`] says so. `None`: no
    /// node has that number.
    pub fn moving(own: NodeIndex, cores: CorePlacement) -> Option<Self> {
        let mut all = vec![None; NODES_MAX];
        *all.get_mut(usize::from(own.0))? = Some(cores);
        let (owners, shards) = (vec![None; usize::from(PARTITIONS)], vec![NOBODY; usize::from(PARTITIONS)]);
        // Nodes agree by the database, not by a list.
        let fingerprint = xxhash_rust::xxh3::xxh3_64(b"moving");
        Some(Self { own, moves: true, cores: all, owners, shards, present: 1 << own.0, owning: 0, fingerprint })
    }

    /// Whether partitions change hands.
    pub fn is_moving(&self) -> bool {
        self.moves
    }

    /// Takes in who owns what now. `withheld`: what this shard does not serve all the same; nor is served what this node is
    /// asked to give up.
    pub fn follow(&mut self, ownership: &Ownership, withheld: &PartitionSet) {
        debug_assert!(self.moves, "of configured nodes nothing changes hands");
        for (partition, place) in all().zip(&mut self.owners) {
            let part = ownership.part(partition);
            let served = part.owner != Some(self.own) || !(part.giving || withheld.contains(partition));
            *place = part.owner.filter(|_| served);
        }
        let named = ownership.nodes().map(|(node, _)| node);
        let nodes = named.chain(self.owners.iter().flatten().copied()).chain([self.own]);
        self.present = nodes.fold(0, |present, node| present | 1 << node.0);
        self.count_cores();
    }

    /// Brings the table of shards up to date.
    fn count_cores(&mut self) {
        for (partition, place) in all().zip(&mut self.shards) {
            let owner = self.owners.get(usize::from(partition.number())).copied().flatten();
            *place = owner.map_or(NOBODY, |owner| shard_on(&self.cores, owner, partition));
        }
        self.owning = self.owners.iter().flatten().fold(0, |owning, node| owning | 1 << node.0);
    }

    /// Whether a node owns something that it serves; a gateway does not.
    pub fn owns(&self, node: NodeIndex) -> bool {
        usize::from(node.0) < NODES_MAX && self.owning & 1 << node.0 != 0
    }

    /// The same on nodes that agree on who is who and who owns what.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    pub fn own(&self) -> NodeIndex {
        self.own
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeIndex> + use<> {
        let present = self.present;
        (0..NODES_MAX as u16).filter(move |node| present & 1 << node != 0).map(NodeIndex)
    }

    /// How many shards a node has, as it said last; 0: it was never seen.
    pub fn shards(&self, node: NodeIndex) -> u16 {
        self.cores.get(usize::from(node.0)).copied().flatten().map_or(0, CorePlacement::shards)
    }

    /// A node has said how many cores it has. True when that is news, so that its shards have other partitions now.
    pub fn learn(&mut self, node: NodeIndex, cores: CorePlacement) -> bool {
        let named = ShardIndex::new(node, cores.shards() - 1) != NOBODY;
        let known = self.cores.get_mut(usize::from(node.0)).filter(|_| node != self.own && named);
        let news = known.is_some_and(|known| known.replace(cores) != Some(cores));
        if news {
            self.count_cores();
        }
        news
    }

    /// Who owns a partition and serves it, as far as is known here.
    pub fn owner_of(&self, partition: Partition) -> Option<NodeIndex> {
        self.owners.get(usize::from(partition.number())).copied().flatten()
    }

    /// The same; of what nobody owns the node of [`NOBODY`]. For configured nodes, where there is none such.
    pub fn node_of(&self, partition: Partition) -> NodeIndex {
        self.shard_of(partition).node()
    }

    /// The shard that owns a partition, or [`NOBODY`]. Of a node that was never seen the first stands for all.
    #[inline]
    pub fn shard_of(&self, partition: Partition) -> ShardIndex {
        self.shards.get(usize::from(partition.number())).copied().unwrap_or(NOBODY)
    }

    /// The shard of that node which has this partition, or would have it.
    pub fn shard_on(&self, node: NodeIndex, partition: Partition) -> ShardIndex {
        shard_on(&self.cores, node, partition)
    }
}

fn shard_on(cores: &[Option<CorePlacement>], node: NodeIndex, partition: Partition) -> ShardIndex {
    let cores = cores.get(usize::from(node.0)).copied().flatten();
    ShardIndex::new(node, cores.map_or(0, |cores| cores.shard_of(partition).within()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::{Known, Part};

    #[test]
    fn a_fingerprint_tells_names_and_owners_apart_and_nothing_else() {
        let of = |own: &str, cores, nodes: &[(&str, u32)]| {
            let nodes: Vec<_> = nodes.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect();
            ClusterPlacement::new(own, CorePlacement::new(cores).unwrap(), &nodes).unwrap().fingerprint()
        };
        let here = of("a", 1, &[("a", 1), ("b", 1)]);
        assert_eq!(here, of("b", 8, &[("b", 1), ("a", 1)]));
        for other in [&[("a", 1), ("b", 2)][..], &[("a", 1), ("c", 1)], &[("a", 1), ("b", 1), ("c", 0)], &[("a", 1)]] {
            assert_ne!(here, of("a", 1, other));
        }
    }

    #[test]
    fn every_partition_has_one_shard_and_shares_differ_by_at_most_one() {
        for shards in [1, 2, 3, 7, 16, 64, 1000, 1024] {
            let placement = CorePlacement::new(shards).unwrap();
            let mut counts = vec![0u16; usize::from(shards)];
            for number in 0..PARTITIONS {
                counts[usize::from(placement.shard_of(Partition::new(number).unwrap()).0)] += 1;
            }
            for (at, &count) in counts.iter().enumerate() {
                assert_eq!(count, placement.partitions_of(ShardIndex(at as u16)));
            }
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
        }
        assert_eq!(CorePlacement::new(0), None);
        assert_eq!(CorePlacement::new(1025), None);
    }

    #[test]
    fn an_index_names_a_shard_of_any_node_and_those_of_the_first_are_plain_numbers() {
        for (node, within) in [(0, 0), (0, 1_023), (1, 0), (63, 1_023), (5, 17)] {
            let shard = ShardIndex::new(NodeIndex(node), within);
            assert_eq!((shard.node(), shard.within()), (NodeIndex(node), within));
        }
        assert_eq!(ShardIndex::new(NodeIndex(0), 7), ShardIndex(7));
    }

    fn nodes(weights: &[u32]) -> Vec<(String, u32)> {
        weights.iter().enumerate().map(|(at, weight)| (format!("n{at}"), *weight)).collect()
    }

    #[test]
    fn all_nodes_agree_who_owns_what_in_whatever_order_they_list_it() {
        let cores = |count| CorePlacement::new(count).unwrap();
        let listed = nodes(&[1, 1, 2]);
        let mut turned = listed.clone();
        turned.reverse();
        let mut one = ClusterPlacement::new("n0", cores(2), &listed).unwrap();
        let mut other = ClusterPlacement::new("n2", cores(3), &turned).unwrap();
        assert_eq!((one.own(), other.own()), (NodeIndex(0), NodeIndex(2)));
        assert_eq!((one.shards(NodeIndex(0)), one.shards(NodeIndex(2))), (2, 0));
        assert!(one.learn(NodeIndex(2), cores(3)) && !one.learn(NodeIndex(2), cores(3)));
        assert!(other.learn(NodeIndex(0), cores(2)) && !other.learn(NodeIndex(2), cores(9)), "itself it knows");
        for number in 0..PARTITIONS {
            let partition = Partition::new(number).unwrap();
            assert_eq!(one.shard_of(partition), other.shard_of(partition));
            assert!(one.shard_of(partition).within() < one.shards(one.node_of(partition)).max(1));
        }
    }

    #[test]
    fn what_is_no_cluster_is_refused() {
        let cores = CorePlacement::new(1).unwrap();
        let refused = |own: &str, nodes: &[(String, u32)]| ClusterPlacement::new(own, cores, nodes).unwrap_err();
        assert_eq!(refused("n9", &nodes(&[1, 1])), PlacementError::NotListed("n9".into()));
        assert_eq!(refused("n0", &nodes(&[0, 0])), PlacementError::NoOwner);
        assert_eq!(refused("n0", &nodes(&[1; NODES_MAX + 1])), PlacementError::TooMany(NODES_MAX + 1));
        assert_eq!(refused("n0", &[nodes(&[1]), nodes(&[1])].concat()), PlacementError::Twice("n0".into()));
        let gateway = ClusterPlacement::new("n1", cores, &nodes(&[1, 0])).unwrap();
        assert!((0..PARTITIONS).all(|number| gateway.node_of(Partition::new(number).unwrap()) == NodeIndex(0)));
        assert!(gateway.owns(NodeIndex(0)) && !gateway.owns(NodeIndex(1)) && !gateway.owns(NodeIndex(64)));
    }

    #[test]
    fn what_changes_hands_is_nobodys_until_somebody_is_said_to_own_it() {
        let cores = |count| CorePlacement::new(count).unwrap();
        let (own, other, last) = (NodeIndex(5), NodeIndex(9), NodeIndex(63));
        let mut placement = ClusterPlacement::moving(own, cores(2)).unwrap();
        let [first, second, third] = [0, 1, 2].map(|number| Partition::new(number).unwrap());
        assert!(placement.is_moving() && placement.nodes().eq([own]));
        assert_eq!((placement.shard_of(first), placement.owner_of(first)), (NOBODY, None));
        let mut ownership = Ownership::new(1);
        let part = |owner| Part { owner: Some(owner), epoch: 1, giving: false };
        ownership.set(first, part(own));
        ownership.set(second, part(own));
        ownership.set(third, part(other));
        assert!(ownership.name(last, Known { name: "z".into(), address: "z:1".into() }));
        placement.follow(&ownership, &PartitionSet::default());
        assert!(placement.nodes().eq([own, other, last]));
        assert_eq!(placement.shard_of(second), ShardIndex::new(own, 1));
        assert_eq!(placement.shard_of(third), ShardIndex::new(other, 0), "of one never seen the first stands for all");
        assert!(placement.learn(other, cores(3)) && !placement.learn(other, cores(3)));
        assert_eq!(placement.shard_of(third), ShardIndex::new(other, 2));
        assert!(!placement.learn(last, cores(1_024)) && placement.learn(last, cores(1_023)), "nobody has a name too");
        // Asked to give it up, or withheld: not served, whoever the table says.
        ownership.set(second, Part { giving: true, ..part(own) });
        placement.follow(&ownership, &[first, third].into_iter().collect());
        assert_eq!([first, second].map(|partition| placement.owner_of(partition)), [None; 2]);
        assert_eq!(placement.owner_of(third), Some(other), "what others own is not withheld here");
        assert!(ClusterPlacement::moving(NodeIndex(64), cores(1)).is_none());
    }
}
