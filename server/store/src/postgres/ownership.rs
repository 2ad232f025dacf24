//! Who owns which partition in a cluster: what a node may ask and do, from any thread and any runtime. The work is done
//! by the [`super::registrar`] on the side thread of the store, one request after the other.
//!
//! Invariants: a partition has one owner, a start of a node, or none. It changes hands in one transaction that waits for
//! commits of the owner of before that are under way, and none of them comes after it. What [`Ownership::take`] gives is
//! committed before it is told, so what is read of it afterwards is all that was ever acknowledged.

use ringline_schema::ids::Partition;
use tokio::sync::{mpsc, oneshot};

/// Nodes that a cluster may have had names of.
pub const NODES_MAX: u8 = 64;
/// Requests that may wait; whoever asks more waits for a place.
pub(super) const REQUESTS_MAX: usize = 16;

/// One start of a node on a database: 1, 2, 3 … in the order in which nodes started, never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Start(pub i64);

/// How often a partition has changed hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub i64);

/// A partition at an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claim {
    pub partition: Partition,
    pub epoch: Epoch,
}

/// Who has a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    pub claim: Claim,
    /// `None`: nobody.
    pub owner: Option<Start>,
}

/// A start of a node that owns a partition or may still write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRow {
    pub start: Start,
    pub node: String,
    /// The number of the node; `None` for one that was never part of a cluster.
    pub number: Option<u8>,
    /// No later start of the same node has taken its place. Whether it runs is not known here.
    pub may_write: bool,
}

/// Who owns what, as it was committed at one moment or a little later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnershipTable {
    /// What [`Ownership::version`] said before the rest was read.
    pub version: u64,
    /// All partitions, by number.
    pub partitions: Vec<Owned>,
    /// Rising.
    pub starts: Vec<StartRow>,
}

impl OwnershipTable {
    /// The start that owns a partition.
    pub fn owner(&self, partition: Partition) -> Option<&StartRow> {
        let start = self.partitions.get(usize::from(partition.number()))?.owner?;
        self.starts.iter().find(|row| row.start == start)
    }
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    /// This start may do nothing more: the node has to stop.
    #[error("another start has taken the place of this one: {0}")]
    Replaced(String),
    /// Nothing was heard in time. Whether it was done is seen in the next table; to ask again does no harm.
    #[error("PostgreSQL does not answer for who owns what: {0}")]
    Away(String),
    /// The database refuses, and will the next time.
    #[error("PostgreSQL refuses to say or change who owns what: {0}")]
    Refused(String),
    /// The side thread of the store has ended.
    #[error("the store was closed")]
    Closed,
}

/// What can be asked.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Version,
    Table,
    Take(Vec<Claim>),
    Release(Vec<Partition>),
}

/// What comes back.
#[derive(Debug)]
pub(super) enum Done {
    Version(u64),
    Table(OwnershipTable),
    Taken(Vec<Claim>),
    Released,
}

/// A request and the way back.
pub(super) type Asked = (Request, oneshot::Sender<Result<Done, OwnershipError>>);

/// This start's part in who owns what. Cheap to clone. A request that nobody waits for any more is carried out all the
/// same. Each is answered within the store's `timeout`.
#[derive(Clone, Debug)]
pub struct Ownership {
    pub(super) start: Start,
    pub(super) number: u8,
    pub(super) requests: mpsc::Sender<Asked>,
}

impl Ownership {
    /// This start.
    pub fn start(&self) -> Start {
        self.start
    }

    /// The number of this node in its cluster, below [`NODES_MAX`]: the same at every start.
    pub fn number(&self) -> u8 {
        self.number
    }

    async fn ask(&self, request: Request) -> Result<Done, OwnershipError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send((request, reply)).await.map_err(|_| OwnershipError::Closed)?;
        answer.await.map_err(|_| OwnershipError::Closed)?
    }

    /// Rises with every change of who owns what, and with every start of a node. One row is read.
    pub async fn version(&self) -> Result<u64, OwnershipError> {
        match self.ask(Request::Version).await? {
            Done::Version(version) => Ok(version),
            Done::Table(_) | Done::Taken(_) | Done::Released => Err(OwnershipError::Closed),
        }
    }

    /// Who owns what. What is not this start's any more is fenced at once, and what it turns out to have is its own: the
    /// answer to a take may have been lost. `Replaced` when another start has taken this one's place.
    pub async fn table(&self) -> Result<OwnershipTable, OwnershipError> {
        match self.ask(Request::Table).await? {
            Done::Table(table) => Ok(table),
            Done::Version(_) | Done::Taken(_) | Done::Released => Err(OwnershipError::Closed),
        }
    }

    /// Takes those of these partitions that still are at the epoch that was seen, whoever owns them. Returns those of them
    /// that are this start's now, with their epochs, rising; another may have been faster with the others.
    ///
    /// Waits for commits of the owners of before that are under way. When it is told, all of them that will ever be there
    /// are seen by the questions of all shards of this store.
    pub async fn take(&self, wanted: &[Claim]) -> Result<Vec<Claim>, OwnershipError> {
        match self.ask(Request::Take(wanted.to_vec())).await? {
            Done::Taken(taken) => Ok(taken),
            Done::Version(_) | Done::Table(_) | Done::Released => Err(OwnershipError::Closed),
        }
    }

    /// Gives back those of these partitions that are this start's: nobody owns them then. Commits of them that begin from
    /// now on are fenced, so nothing of them may be under way.
    pub async fn release(&self, partitions: &[Partition]) -> Result<(), OwnershipError> {
        match self.ask(Request::Release(partitions.to_vec())).await? {
            Done::Released => Ok(()),
            Done::Version(_) | Done::Table(_) | Done::Taken(_) => Err(OwnershipError::Closed),
        }
    }
}
