//! Who is alive, by etcd: each start of a node keeps one key under a lease of [`lease::LEASE_S`] seconds, and all look at
//! all keys. Beside them only marks are kept there, of nodes that are to be drained ([`drains`]); who owns what stands in the
//! database. Lives on the side thread.
//!
//! - [`gateway`] asks (with what is in [`access`]), [`wire`] is the form of questions and answers, [`entry`] what a node says of itself, [`lease`] the
//!   registration, [`watch`] the bell that rings when something changes.
//! - Level-triggered: [`Directory::list`] gives the whole list as it is after everything that was written before; the bell
//!   only makes it be asked for sooner. A watch that broke, that missed something or whose revision was compacted costs
//!   nothing but time until the next look.
//! - While etcd can't be asked, nothing changes: the last list stays, nobody is thought dead for it, and who can't renew its
//!   lease stops to serve when that ends. A lease that etcd still has when it is back goes on.

pub mod access;
pub mod drains;
pub mod entry;
pub mod gateway;
pub mod lease;
pub mod watch;
pub mod wire;

use std::time::{Duration, Instant};

use ringline_cluster::membership::ListError;
use ringline_cluster::placement::NODES_MAX;
use tokio::sync::watch as changing;
use tokio::time::sleep;

use self::access::Access;
use self::entry::{Entry, Listing};
use self::gateway::{EtcdError, Gateway};
use self::lease::{Kept, LeaseClock, RENEW_AGAIN, RENEW_EVERY, RegisterError, Registration};
use self::wire::{Ranges, path};

pub use self::gateway::Endpoint;

/// Keys of one listing: more than nodes can be, so that one too many is seen.
const LISTED_MAX: usize = 4 * NODES_MAX;
/// Between two attempts to be registered.
const REGISTER_AGAIN: Duration = Duration::from_millis(250);
/// Between two lines of the log that say the same.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// Where etcd is, and what belongs to this cluster there.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Not empty.
    pub endpoints: Vec<Endpoint>,
    /// Begins with / and does not end with one. Two clusters of one etcd differ in it.
    pub prefix: String,
    /// Of one question to one endpoint.
    pub timeout: Duration,
    pub access: Access,
}

impl EtcdOptions {
    /// What the keys of nodes begin with.
    pub fn nodes(&self) -> String {
        format!("{}/nodes/", self.prefix)
    }

    /// What the marks of nodes to be drained begin with.
    pub fn drains(&self) -> String {
        format!("{}/drains/", self.prefix)
    }

    pub fn key_of(&self, node: &str) -> String {
        format!("{}{node}", self.nodes())
    }

    pub fn gateway(&self) -> Gateway {
        Gateway::new(&self.endpoints, self.timeout, &self.access)
    }

    /// An endpoint to which a password is sent so that it can be read on the way.
    pub fn open_login(&self) -> Option<&Endpoint> {
        self.access.login.as_ref()?;
        self.endpoints.iter().find(|endpoint| endpoint.is_open())
    }
}

/// Looks who is alive.
#[derive(Debug)]
pub struct Directory {
    gateway: Gateway,
    nodes: String,
    drains: String,
}

impl Directory {
    pub fn new(options: &EtcdOptions) -> Self {
        Self { gateway: options.gateway(), nodes: options.nodes(), drains: options.drains() }
    }

    /// Everybody who is registered or marked, at one moment after this was called. Errors: [`EtcdError`].
    pub async fn list(&mut self) -> Result<Listing, EtcdError> {
        let question = wire::ranges_of(&[&self.nodes, &self.drains], LISTED_MAX);
        let ranges = self.gateway.ask::<Ranges>(path::TXN, &question).await?.body;
        Ok(Listing::read((&self.nodes, &self.drains), &ranges))
    }
}

/// Why a start may not go on. The process ends, and its supervisor starts it anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    #[error(
        "this node's lease has ended: it was stopped or cut off from etcd for too long, and others may have what it owned"
    )]
    Lease,
    #[error(transparent)]
    Replaced(#[from] ListError),
    #[error("the database takes nothing more from this start: another may have what it owned")]
    Store,
    /// What the database, or a registration, says of it.
    #[error("{0}")]
    Start(String),
}

/// Registers a start and keeps it so.
#[derive(Debug)]
pub struct Keeper {
    registration: Registration,
    clock: LeaseClock,
    written: Entry,
}

impl Keeper {
    /// Waits until this start is registered: for etcd to answer, and for another start of this node to end.
    ///
    /// Errors: a later start of the same node is there, or what can't be read.
    pub async fn register(
        options: &EtcdOptions,
        node: &str,
        entry: Entry,
        clock: LeaseClock,
    ) -> Result<Self, RegisterError> {
        let (key, mut gateway) = (options.key_of(node), options.gateway());
        let mut said: Option<(RegisterError, Instant)> = None;
        loop {
            let refused = match Registration::open(gateway, &key, &entry, &clock).await {
                Ok(registration) => return Ok(Self { registration, clock, written: entry }),
                Err(refused) => refused,
            };
            gateway = refused.gateway;
            match refused.error {
                error @ (RegisterError::Replaced { .. } | RegisterError::Unreadable { .. }) => return Err(error),
                error @ (RegisterError::Etcd(_) | RegisterError::Occupied { .. }) => {
                    let is_old = |(before, at): &(_, Instant)| *before == error && at.elapsed() < SAY_AGAIN;
                    if !said.as_ref().is_some_and(is_old) {
                        tracing::warn!("node {node} is not registered yet: {error}");
                        said = Some((error, Instant::now()));
                    }
                }
            }
            sleep(REGISTER_AGAIN).await;
        }
    }

    /// Renews the lease and writes what changes in `entry`, until that has no sender any more: then the key goes at once.
    ///
    /// Errors: [`Lost`]; nothing may be served any more.
    pub async fn keep(mut self, mut entry: changing::Receiver<Entry>) -> Result<(), Lost> {
        let mut failing = false;
        loop {
            let now = entry.borrow_and_update().clone();
            let pause = match self.renew(&now, &mut failing).await {
                Ok(pause) => pause,
                Err(lost) => {
                    self.clock.end();
                    return Err(lost);
                }
            };
            let changed = tokio::select! {
                () = sleep(pause) => Ok(()),
                changed = entry.changed() => changed,
            };
            if changed.is_err() {
                self.clock.end();
                return self.leave().await;
            }
        }
    }

    /// Once. Returns how long to wait for the next time. Errors: the lease, or the key under it, is gone.
    async fn renew(&mut self, entry: &Entry, failing: &mut bool) -> Result<Duration, Lost> {
        match self.try_renew(entry).await {
            Ok(None) => Err(Lost::Lease),
            Ok(Some(pause)) => {
                if std::mem::take(failing) {
                    tracing::info!("etcd answers again, and this node's lease goes on");
                }
                Ok(pause)
            }
            Err(error) => {
                if !std::mem::replace(failing, true) {
                    tracing::warn!("this node's lease is not renewed: {error}; when it ends nothing is served");
                }
                Ok(RENEW_AGAIN)
            }
        }
    }

    async fn try_renew(&mut self, entry: &Entry) -> Result<Option<Duration>, EtcdError> {
        let Kept::Renewed { asked_at, ttl } = self.registration.renew().await? else { return Ok(None) };
        self.clock.extend(asked_at, ttl);
        if self.written != *entry {
            if !self.registration.write(entry).await? {
                return Ok(None);
            }
            self.written = entry.clone();
        }
        Ok(Some(RENEW_EVERY.min(ttl / 3)))
    }

    async fn leave(self) -> Result<(), Lost> {
        if let Err(error) = self.registration.leave().await {
            tracing::warn!("this node's key stays until its lease ends: {error}");
        }
        Ok(())
    }
}
