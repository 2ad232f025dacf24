//! Partition → core within a node: partition number modulo the number of cores.
//!
//! Fixed by the partition and the core count alone, so every core computes the owner of anything without asking. A
//! restart with another count only changes who owns what, never where a record is read from.

use ringline_schema::ids::{PARTITIONS, Partition};

/// Index of a shard within its node: 0 to cores − 1. One shard a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardIndex(pub u16);

/// Place of a node in the sorted list of the cluster's names: the same on all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
        (PARTITIONS - shard.0).div_ceil(self.shards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
