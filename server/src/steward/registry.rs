//! The table of owners as the store of PostgreSQL keeps it.

use std::collections::BTreeMap;

use ringline_cluster::placement::NodeIndex;
use ringline_cluster::reconcile::{Holding, Start};
use ringline_schema::ids::Partition;
use ringline_store::postgres::{self, Claim, Epoch, Ownership, OwnershipError, OwnershipTable};

use super::{Deeds, DeedsError, Registry};

impl From<OwnershipError> for DeedsError {
    fn from(error: OwnershipError) -> Self {
        let why = error.to_string();
        match error {
            // A database that refuses is looked at by people, and may be mended while the node runs.
            OwnershipError::Away(_) | OwnershipError::Refused(_) => Self::Away(why),
            OwnershipError::Replaced(_) | OwnershipError::Closed => Self::Replaced(why),
        }
    }
}

impl Registry for Ownership {
    async fn version(&self) -> Result<u64, DeedsError> {
        Ok(self.version().await?)
    }

    async fn read(&self) -> Result<Deeds, DeedsError> {
        Ok(deeds(&self.table().await?))
    }

    async fn take(&self, seen: &[Holding]) -> Result<usize, DeedsError> {
        let claims: Vec<Claim> = seen.iter().map(claim).collect();
        Ok(self.take(&claims).await?.len())
    }

    async fn release(&self, partitions: &[Partition]) -> Result<(), DeedsError> {
        Ok(self.release(partitions).await?)
    }
}

fn claim(seen: &Holding) -> Claim {
    Claim { partition: seen.partition, epoch: Epoch(seen.epoch) }
}

fn deeds(table: &OwnershipTable) -> Deeds {
    let start = |start: postgres::Start| Start(start.0);
    let rows = table.partitions.iter().map(|row| Holding {
        partition: row.claim.partition,
        epoch: row.claim.epoch.0,
        owner: row.owner.map_or(Start::NOBODY, start),
    });
    let starts = table.starts.iter().filter_map(|row| {
        let number = NodeIndex(u16::from(row.number?));
        Some((start(row.start), (row.node.clone(), number)))
    });
    Deeds { version: table.version, rows: rows.collect(), starts: starts.collect::<BTreeMap<_, _>>() }
}
