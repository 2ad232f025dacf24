//! One shard's handle on the embedded store: its log, and its line to its index thread.
//!
//! Owned by the shard's thread once moved there. Never blocks but in `close` and drop. Dropped without `close` it is an
//! unclean stop: what was committed is in the log, and the next start replays what the index lacks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use ringline_schema::record::{Query, Record};

use super::indexer::{Job, Reply};
use super::keeper::Keeper;
use super::log::{Committed, Log};
use super::{EmbeddedOptions, Node};
use crate::write::FileWrite;
use crate::{LoadToken, Lsn, Refused, RetentionStats, Store, StoreError, StoreEvent, StoreStats};

/// The embedded store's handle of one shard; see [`Store`].
pub struct EmbeddedShard {
    pub(super) log: Log,
    pub(super) jobs: Option<Sender<Job>>,
    pub(super) replies: Receiver<Reply>,
    pub(super) thread: Option<JoinHandle<()>>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) applied_bytes: Arc<AtomicU64>,
    pub(super) stop: Arc<AtomicBool>,
    /// Set and cleared by the index thread: the disk has no room.
    pub(super) full: Arc<AtomicBool>,
    pub(super) options: EmbeddedOptions,
    pub(super) stats: StoreStats,
    /// A commit that the index thread has not been told of, because its queue was full.
    pub(super) untold: Option<Job>,
    /// The segment that the index thread was asked for.
    pub(super) asked: Option<u32>,
    pub(super) loads_open: usize,
    pub(super) events: Vec<StoreEvent>,
    pub(super) failure: Failure,
    /// Before the node: the last one ends the retention thread, which holds the node too.
    pub(super) keeper: Arc<Keeper>,
    /// One handle of a node gives the figures of retention, so that a sum over all is right.
    pub(super) tells_of_keeper: bool,
    /// Last, so that database and lock go when the rest is gone.
    pub(super) node: Arc<Node>,
}

/// Whether the shard has failed and said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    None,
    /// The index thread can't go on; the log has.
    Index,
    Reported,
}

impl EmbeddedShard {
    /// The data folder that this handle shares with the others of its node.
    pub fn folder(&self) -> &std::path::Path {
        &self.node.folder
    }

    fn reap_log(&mut self) {
        match self.log.finished() {
            None => {}
            Some(Ok(committed)) => self.committed(committed),
            Some(Err(error)) => {
                tracing::error!(%error, "the store of this shard stops: its log can't be written");
                self.report_failure();
            }
        }
    }

    fn committed(&mut self, committed: Committed) {
        let took_us = u64::try_from(committed.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.stats.committed(committed.records, committed.bytes, took_us);
        // The index thread hears of it before the caller does: a question asked after the event finds the records.
        self.untold = Some(Job::Committed { to: committed.to, bytes: self.stats.bytes });
        self.tell();
        if committed.records > 0 {
            self.events.push(StoreEvent::Committed(committed.lsn));
        }
    }

    /// Tells the index thread how far the log is. When its queue is full, this waits for the next turn; a newer commit
    /// replaces it, and no question overtakes it.
    fn tell(&mut self) {
        if let (Some(jobs), Some(job)) = (&self.jobs, self.untold.take())
            && let Err(TrySendError::Full(job)) = jobs.try_send(job)
        {
            self.untold = Some(job);
        }
        if let (Some(jobs), Some(number)) = (&self.jobs, self.log.wants_segment())
            && self.asked != Some(number)
            && jobs.try_send(Job::Prepare(number)).is_ok()
        {
            self.asked = Some(number);
        }
    }

    fn reap_replies(&mut self) {
        // At most what was there at the start: a busy index thread must not hold the reactor here.
        for reply in self.replies.try_iter().take(self.replies.len()) {
            match reply {
                Reply::Loaded(token, answer) => {
                    self.loads_open = self.loads_open.saturating_sub(1);
                    self.events.push(StoreEvent::Loaded(token, answer));
                }
                Reply::Prepared(segment) => self.log.set_next(segment),
                Reply::Failed if self.failure == Failure::None => self.failure = Failure::Index,
                Reply::Failed => {}
            }
        }
        if self.failure == Failure::Index {
            self.log.poison();
            self.report_failure();
        }
    }

    fn report_failure(&mut self) {
        if self.failure != Failure::Reported {
            self.failure = Failure::Reported;
            self.events.push(StoreEvent::Failed);
        }
    }

    /// Everything queued becomes durable, or the log fails.
    fn drain(&mut self) {
        loop {
            self.log.submit(Instant::now());
            if !self.log.is_writing() {
                return;
            }
            if let Err(error) = self.log.wait() {
                tracing::error!(%error, "the store of this shard stops: its ring can't be waited for");
                self.log.poison();
                self.report_failure();
                return;
            }
            self.reap_log();
        }
    }
}

impl Store for EmbeddedShard {
    fn append(&mut self, record: &Record) -> Result<Lsn, StoreError> {
        let lag = self.stats.bytes.saturating_sub(self.applied_bytes.load(Ordering::Relaxed));
        if lag > self.options.index_lag_bytes_max && !self.log.is_poisoned() {
            return Err(StoreError::Full);
        }
        let lsn = self.log.append(record);
        if matches!(lsn, Err(StoreError::Poisoned)) && self.jobs.is_some() {
            self.report_failure();
        }
        lsn
    }

    fn submit(&mut self) {
        self.log.submit(Instant::now());
    }

    fn load(&mut self, token: LoadToken, query: Query) -> Result<(), Refused> {
        self.tell();
        let refused = |error, query| Err(Refused { error, query: Box::new(query) });
        let Some(jobs) = &self.jobs else { return refused(StoreError::Poisoned, query) };
        if self.loads_open >= self.options.loads_max || self.untold.is_some() {
            return refused(StoreError::Full, query);
        }
        let (error, job) = match jobs.try_send(Job::Load(token, query)) {
            Ok(()) => {
                self.loads_open += 1;
                return Ok(());
            }
            Err(TrySendError::Full(job)) => (StoreError::Full, job),
            Err(TrySendError::Disconnected(job)) => (StoreError::Poisoned, job),
        };
        match job {
            Job::Load(_, query) => refused(error, query),
            // What comes back is what was sent.
            Job::Committed { .. } | Job::Prepare(_) | Job::Close => Ok(()),
        }
    }

    fn poll(&mut self, events: &mut Vec<StoreEvent>) {
        self.reap_log();
        if !self.replies.is_empty() {
            self.reap_replies();
        }
        if self.jobs.is_some() {
            self.tell();
        }
        events.append(&mut self.events);
    }

    fn is_disk_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }

    fn lend_writes(&mut self) {
        self.log.set_lent(true);
    }

    fn take_write(&mut self) -> Option<FileWrite> {
        self.log.take_write()
    }

    fn written(&mut self, write: FileWrite, result: i32) {
        self.log.written(write, result);
    }

    fn close(&mut self) -> Result<(), StoreError> {
        self.log.set_lent(false);
        self.drain();
        let failed = self.log.is_poisoned();
        self.log.poison();
        let Some(jobs) = self.jobs.take() else { return Err(StoreError::Poisoned) };
        let mut sent = true;
        // Here the thread may be waited for, so the queue need not have room at once. It always takes from it, and the
        // replies have room for everything that it can say.
        for job in self.untold.take().into_iter().chain((!failed).then_some(Job::Close)) {
            sent &= jobs.send(job).is_ok();
        }
        drop(jobs);
        let joined = self.thread.take().is_none_or(|thread| thread.join().is_ok());
        self.reap_replies();
        if failed || self.failure != Failure::None || !sent || !joined {
            return Err(StoreError::Poisoned);
        }
        Ok(())
    }

    fn stats(&self) -> StoreStats {
        let applied = self.applied_bytes.load(Ordering::Relaxed);
        let retention = if self.tells_of_keeper { self.keeper.stats() } else { RetentionStats::default() };
        StoreStats { index_lag_bytes: self.stats.bytes.saturating_sub(applied), retention, ..self.stats.clone() }
    }
}

impl Drop for EmbeddedShard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
