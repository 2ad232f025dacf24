//! Who owns what at one moment, where partitions change hands while nodes run. Pure values; made by the one thread that
//! watches the cluster, read by every shard.
//!
//! What it says is what the database says: owner and epoch of each partition, the epoch rising whenever one changes hands.
//! Beside it stand the wishes of this node: which of its partitions it is asked to give up. Level-triggered: each is whole, one
//! that was missed does no harm, and one that comes twice changes nothing.

use ringline_schema::ids::{PARTITIONS, Partition};

use crate::placement::{NODES_MAX, NodeIndex};

const WORDS: usize = PARTITIONS as usize / u64::BITS as usize;

/// Some of the partitions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartitionSet([u64; WORDS]);

impl PartitionSet {
    pub const ALL: Self = Self([u64::MAX; WORDS]);

    fn place(partition: Partition) -> (usize, u64) {
        let number = usize::from(partition.number());
        (number / u64::BITS as usize, 1 << (number % u64::BITS as usize))
    }

    pub fn insert(&mut self, partition: Partition) {
        let (word, bit) = Self::place(partition);
        if let Some(word) = self.0.get_mut(word) {
            *word |= bit;
        }
    }

    pub fn remove(&mut self, partition: Partition) {
        let (word, bit) = Self::place(partition);
        if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
    }

    pub fn contains(&self, partition: Partition) -> bool {
        let (word, bit) = Self::place(partition);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Puts those of another set in.
    pub fn join(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(word, more)| *word |= more);
    }

    /// Takes those of another set out.
    pub fn part_from(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(word, gone)| *word &= !gone);
    }

    /// In order of number.
    pub fn iter(&self) -> impl Iterator<Item = Partition> + '_ {
        all().filter(|partition| self.contains(*partition))
    }
}

impl FromIterator<Partition> for PartitionSet {
    fn from_iter<I: IntoIterator<Item = Partition>>(partitions: I) -> Self {
        let mut set = Self::default();
        partitions.into_iter().for_each(|partition| set.insert(partition));
        set
    }
}

/// Every partition, in order of number.
pub fn all() -> impl Iterator<Item = Partition> {
    (0..PARTITIONS).filter_map(Partition::new)
}

/// One partition at that moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// `None`: nobody; who needs it is told UNAVAILABLE.
    pub owner: Option<NodeIndex>,
    /// Rises whenever it changes hands. The same owner with another epoch lost it in between.
    pub epoch: u64,
    /// This node, its owner, is asked to give it up: its shard serves it no more, and says when nothing of it is in flight.
    pub giving: bool,
}

/// How a node is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub name: String,
    /// Where clients connect to.
    pub address: String,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Rises with each; what a shard has released is said with it.
    pub version: u64,
    parts: Vec<Part>,
    nodes: Vec<Option<Known>>,
}

impl Ownership {
    /// Nobody owns anything, no node is known.
    pub fn new(version: u64) -> Self {
        Self { version, parts: vec![Part::default(); usize::from(PARTITIONS)], nodes: vec![None; NODES_MAX] }
    }

    pub fn part(&self, partition: Partition) -> Part {
        self.parts.get(usize::from(partition.number())).copied().unwrap_or_default()
    }

    /// A node whose number is not below [`NODES_MAX`] owns nothing.
    pub fn set(&mut self, partition: Partition, part: Part) {
        let owner = part.owner.filter(|owner| usize::from(owner.0) < NODES_MAX);
        debug_assert_eq!(owner, part.owner, "nodes have numbers below {NODES_MAX}");
        if let Some(place) = self.parts.get_mut(usize::from(partition.number())) {
            *place = Part { owner, ..part };
        }
    }

    /// `None`: no such node, or it is not there any more.
    pub fn node(&self, node: NodeIndex) -> Option<&Known> {
        self.nodes.get(usize::from(node.0))?.as_ref()
    }

    /// False: a number that no node has.
    pub fn name(&mut self, node: NodeIndex, known: Known) -> bool {
        let place = self.nodes.get_mut(usize::from(node.0));
        place.map(|place| *place = Some(known)).is_some()
    }

    /// The nodes that are known.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeIndex, &Known)> {
        (0..).map(NodeIndex).zip(&self.nodes).filter_map(|(node, known)| Some((node, known.as_ref()?)))
    }

    /// What a node owns.
    pub fn owned(&self, node: NodeIndex) -> PartitionSet {
        all().filter(|partition| self.part(*partition).owner == Some(node)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(number: u16) -> Partition {
        Partition::new(number).unwrap()
    }

    #[test]
    fn a_set_has_what_was_put_in() {
        let mut set: PartitionSet = [0, 63, 64, 1_023].into_iter().map(partition).collect();
        assert_eq!(set.iter().map(Partition::number).collect::<Vec<_>>(), [0, 63, 64, 1_023]);
        set.remove(partition(63));
        set.remove(partition(7));
        assert_eq!((set.len(), set.contains(partition(63)), set.contains(partition(64))), (3, false, true));
        let mut other = PartitionSet::default();
        assert!(other.is_empty());
        other.insert(partition(5));
        set.join(&other);
        assert!(set.contains(partition(5)));
        set.part_from(&other);
        assert!(!set.contains(partition(5)));
        set.join(&other);
        assert_eq!((set.len(), PartitionSet::ALL.len(), all().count()), (4, 1_024, 1_024));
    }

    #[test]
    fn what_was_not_said_belongs_to_nobody() {
        let mut ownership = Ownership::new(1);
        let here = Part { owner: Some(NodeIndex(3)), epoch: 7, giving: false };
        ownership.set(partition(9), here);
        assert_eq!((ownership.part(partition(9)), ownership.part(partition(8))), (here, Part::default()));
        assert_eq!(ownership.owned(NodeIndex(3)).iter().collect::<Vec<_>>(), [partition(9)]);
        let known = Known { name: "n3".into(), address: "n3:1".into() };
        assert!(ownership.name(NodeIndex(3), known.clone()) && !ownership.name(NodeIndex(64), known.clone()));
        assert_eq!(ownership.nodes().collect::<Vec<_>>(), [(NodeIndex(3), &known)]);
        assert_eq!(ownership.node(NodeIndex(2)), None);
    }
}
