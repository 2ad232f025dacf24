//! A start of a node, registered under a lease: as long as the key is there nobody takes what it owns, and as long as the
//! lease is certain it may serve. Owned by one task of the side thread.
//!
//! - A key that is there is never overwritten by another start: whoever wrote it may still serve what it owned until its
//!   lease ends. A node that was killed is therefore registered anew when that has ended.
//! - What is certain is told in the node's own time: from the moment *before* a renewal was sent, less a margin. etcd counts
//!   from the moment it got it, which is later; so a node stops to serve before its key goes.
//! - A lease that has ended is not replaced by a new one: others may have taken what this start owned, and it ends.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use ringline_cluster::reconcile::Start;
use ringline_core::config::Lease;

use super::entry::Entry;
use super::gateway::{EtcdError, Gateway};
use super::wire::{self, Done, Granted, LeaseId, Range, Streamed, Txn, path};

/// How long a node that says nothing counts as alive.
pub const LEASE_S: u64 = 10;
/// Between two renewals that succeed.
pub const RENEW_EVERY: Duration = Duration::from_secs(3);
/// Before the next one after a failure.
pub const RENEW_AGAIN: Duration = Duration::from_millis(500);
/// How much earlier a node stops to serve than etcd may forget it: for clocks that do not run alike, and for what is being
/// written when it ends.
pub const MARGIN: Duration = Duration::from_secs(1);
const _: () = assert!(RENEW_EVERY.as_millis() * 2 < (LEASE_S as u128) * 1_000 - MARGIN.as_millis());

/// Until when this node may serve, as the cores read it: milliseconds since `epoch`.
#[derive(Clone, Debug)]
pub struct LeaseClock {
    epoch: Instant,
    lease: Lease,
}

impl LeaseClock {
    /// `lease` is what the cores read; this clock alone sets it. Nothing may be served until the first renewal.
    pub fn new(epoch: Instant, lease: Lease) -> Self {
        lease.set(0);
        Self { epoch, lease }
    }

    pub fn until_ms(&self) -> u64 {
        self.lease.until_ms()
    }

    /// A lease of `ttl` was granted or renewed by what was sent at `asked_at`. Never takes anything back.
    pub fn extend(&self, asked_at: Instant, ttl: Duration) {
        let until = asked_at.saturating_duration_since(self.epoch) + ttl.saturating_sub(MARGIN);
        let until_ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        // One task registers, renews and ends: nobody sets it in between.
        self.lease.set(until_ms.max(self.lease.until_ms()));
    }

    /// The lease has ended, or this start is to serve nothing any more.
    pub fn end(&self) {
        self.lease.set(0);
    }

    pub fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.epoch).as_millis() >= u128::from(self.lease.until_ms())
    }
}

/// Why a node can't be registered now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// Asked again when that start has ended, or its lease.
    #[error("another start of this node (number {}) is registered: waiting until it, or its lease, has ended", start.0)]
    Occupied { start: Start },
    /// This process is the older one, and ends.
    #[error("a later start of this node is registered (number {}, this one is {})", theirs.0, ours.0)]
    Replaced { ours: Start, theirs: Start },
    #[error("the entry at {key} can't be read: another version runs as this node, or another program writes there")]
    Unreadable { key: String },
}

/// What a renewal has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Renewed {
        asked_at: Instant,
        ttl: Duration,
    },
    /// The lease, or the key under it, is gone.
    Gone,
}

/// A node that is registered.
#[derive(Debug)]
pub struct Registration {
    key: String,
    lease: LeaseId,
    gateway: Gateway,
}

impl Registration {
    /// Tries once. On success `clock` says until when the node may serve. Errors: [`RegisterError`].
    pub async fn open(mut gateway: Gateway, key: &str, entry: &Entry, clock: &LeaseClock) -> Result<Self, Refused> {
        match register(&mut gateway, key, entry, clock).await {
            Ok(lease) => Ok(Self { key: key.to_owned(), lease, gateway }),
            Err(error) => Err(Refused { error, gateway }),
        }
    }

    /// Renews the lease. Errors: nobody answered; the lease goes on as long as it was certain.
    pub async fn renew(&mut self) -> Result<Kept, EtcdError> {
        renew(&mut self.gateway, self.lease).await
    }

    /// Writes what has changed. Errors: nobody answered, and it may be written or not.
    pub async fn write(&mut self, entry: &Entry) -> Result<bool, EtcdError> {
        let question = wire::replace(&self.key, &entry.encode(), self.lease);
        Ok(self.gateway.ask::<Txn>(path::TXN, &question).await?.body.succeeded)
    }

    /// Takes the key away at once. Errors: nobody answered; it goes when the lease ends.
    pub async fn leave(mut self) -> Result<(), EtcdError> {
        revoke(&mut self.gateway, self.lease).await
    }
}

/// A registration that was not made, and what it was tried with.
#[derive(Debug)]
pub struct Refused {
    pub error: RegisterError,
    pub gateway: Gateway,
}

async fn register(
    gateway: &mut Gateway,
    key: &str,
    entry: &Entry,
    clock: &LeaseClock,
) -> Result<LeaseId, RegisterError> {
    let there = gateway.ask::<Range>(path::RANGE, &wire::get(key)).await?.body;
    if let Some(kv) = there.kvs.first() {
        let other = Entry::decode(&kv.value).ok_or_else(|| RegisterError::Unreadable { key: key.to_owned() })?;
        let (ours, theirs) = (entry.start, other.start);
        return match theirs.cmp(&ours) {
            // An answer was lost: it is this one's own.
            Ordering::Equal => adopt(gateway, LeaseId(kv.lease), clock).await,
            Ordering::Greater => Err(RegisterError::Replaced { ours, theirs }),
            Ordering::Less => Err(RegisterError::Occupied { start: theirs }),
        };
    }
    let granted = gateway.ask::<Granted>(path::GRANT, &wire::grant(LEASE_S)).await?;
    let (lease, ttl) = (LeaseId(granted.body.id), ttl(&granted.body));
    let question = wire::create(key, &entry.encode(), lease);
    if gateway.ask::<Txn>(path::TXN, &question).await?.body.succeeded {
        clock.extend(granted.asked_at, ttl);
        return Ok(lease);
    }
    // Somebody was faster. What is not revoked ends by itself.
    let _ = revoke(gateway, lease).await;
    Err(RegisterError::Occupied { start: Start::NOBODY })
}

async fn adopt(gateway: &mut Gateway, lease: LeaseId, clock: &LeaseClock) -> Result<LeaseId, RegisterError> {
    match renew(gateway, lease).await? {
        Kept::Renewed { asked_at, ttl } => {
            clock.extend(asked_at, ttl);
            Ok(lease)
        }
        Kept::Gone => Err(RegisterError::Occupied { start: Start::NOBODY }),
    }
}

async fn renew(gateway: &mut Gateway, lease: LeaseId) -> Result<Kept, EtcdError> {
    let answer = gateway.ask::<Streamed<Granted>>(path::KEEP, &wire::of_lease(lease)).await?;
    let lease = answer.body.result;
    if lease.ttl_s <= 0 {
        return Ok(Kept::Gone);
    }
    Ok(Kept::Renewed { asked_at: answer.asked_at, ttl: ttl(&lease) })
}

async fn revoke(gateway: &mut Gateway, lease: LeaseId) -> Result<(), EtcdError> {
    match gateway.ask::<Done>(path::REVOKE, &wire::of_lease(lease)).await {
        // It is gone already.
        Ok(_) | Err(EtcdError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn ttl(lease: &Granted) -> Duration {
    Duration::from_secs(u64::try_from(lease.ttl_s).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_certain_from_before_it_was_asked_for_and_less_than_its_whole_time() {
        let epoch = Instant::now();
        let at = |ms: u64| epoch + Duration::from_millis(ms);
        let clock = LeaseClock::new(epoch, Lease::new(u64::MAX));
        assert!(clock.is_over(at(0)), "nothing is served before the first");
        clock.extend(at(5_000), Duration::from_secs(10));
        assert_eq!(clock.until_ms(), 14_000);
        assert!(!clock.is_over(at(13_999)) && clock.is_over(at(14_000)));
        clock.extend(at(4_000), Duration::from_secs(10));
        assert_eq!(clock.until_ms(), 14_000, "an older answer takes nothing back");
        clock.extend(at(20_000), Duration::from_millis(300));
        assert_eq!(clock.until_ms(), 20_000, "a lease shorter than the margin is none");
        clock.end();
        assert!(clock.is_over(at(0)));
    }
}
