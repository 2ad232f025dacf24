//! One shard's handle on a PostgreSQL store: what is queued for the next commit, and the line to its task.
//!
//! Owned by the shard's thread once moved there. Never blocks but in `close`. Dropped without `close` it is an unclean
//! stop: what was acknowledged is in the database.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::Receiver;
use ringline_schema::record::{Query, Record};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use super::PostgresOptions;
use super::retainer::Figures;
use super::worker::{Job, Reply, Shown};
use crate::{LoadToken, Lsn, RECORD_BYTES_MAX, Refused, Store, StoreError, StoreEvent, StoreStats, large_bytes};

/// The PostgreSQL store's handle of one shard; see [`Store`].
pub struct PostgresShard {
    pub(super) options: Arc<PostgresOptions>,
    /// `None`: closed, or nothing more can be written.
    pub(super) jobs: Option<Sender<Job>>,
    pub(super) replies: Receiver<Reply>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) shown: Arc<Shown>,
    pub(super) queue: Queue,
    pub(super) figures: Option<Arc<Figures>>,
    pub(super) loads_open: usize,
    pub(super) events: Vec<StoreEvent>,
    pub(super) stats: StoreStats,
}

/// What waits for a commit, and the one that is under way.
#[derive(Default)]
pub(super) struct Queue {
    records: Vec<Record>,
    bytes: usize,
    last: Lsn,
    writing: Option<Writing>,
}

#[derive(Clone, Copy)]
struct Writing {
    upto: Lsn,
    records: u64,
    bytes: u64,
    started: Instant,
}

impl PostgresShard {
    fn reap(&mut self) {
        // At most what was there at the start: a busy task must not hold the reactor here.
        for reply in self.replies.try_iter().take(self.replies.len()) {
            take(&mut self.queue, (&mut self.stats, &mut self.events), reply)
                .apply(&mut self.loads_open, &mut self.jobs);
        }
    }

    /// Everything that is queued or asked is settled, or the time for it is over.
    fn drain(&mut self) {
        let deadline = Instant::now() + self.options.timeout;
        loop {
            self.submit();
            let is_busy = self.queue.writing.is_some() || !self.queue.records.is_empty() || self.loads_open > 0;
            if !is_busy || self.jobs.is_none() {
                return;
            }
            let Ok(reply) = self.replies.recv_deadline(deadline) else { return };
            take(&mut self.queue, (&mut self.stats, &mut self.events), reply)
                .apply(&mut self.loads_open, &mut self.jobs);
        }
    }
}

/// What a reply changes beside the queue.
enum Taken {
    Nothing,
    Answer,
    Failure,
}

impl Taken {
    fn apply(self, loads_open: &mut usize, jobs: &mut Option<Sender<Job>>) {
        match self {
            Self::Nothing => {}
            Self::Answer => *loads_open = loads_open.saturating_sub(1),
            Self::Failure => *jobs = None,
        }
    }
}

fn take(queue: &mut Queue, (stats, events): (&mut StoreStats, &mut Vec<StoreEvent>), reply: Reply) -> Taken {
    match reply {
        Reply::Committed => {
            if let Some(Writing { upto, records, bytes, started }) = queue.writing.take() {
                let took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                stats.committed(records, bytes, took_us);
                events.push(StoreEvent::Committed(upto));
            }
            Taken::Nothing
        }
        Reply::Loaded(token, answer) => {
            events.push(StoreEvent::Loaded(token, answer));
            Taken::Answer
        }
        Reply::Failed => {
            events.push(StoreEvent::Failed);
            Taken::Failure
        }
    }
}

impl Store for PostgresShard {
    fn append(&mut self, record: &Record) -> Result<Lsn, StoreError> {
        if self.jobs.is_none() {
            return Err(StoreError::Poisoned);
        }
        if large_bytes(record) > RECORD_BYTES_MAX {
            return Err(StoreError::TooLarge);
        }
        let bytes = self.queue.bytes + record.weight();
        if bytes > self.options.batch_bytes_max {
            return Err(StoreError::Full);
        }
        self.queue.bytes = bytes;
        self.queue.records.push(record.clone());
        self.queue.last = Lsn(self.queue.last.0 + 1);
        Ok(self.queue.last)
    }

    fn submit(&mut self) {
        let queue = &mut self.queue;
        let Some(jobs) = self.jobs.as_ref().filter(|_| queue.writing.is_none() && !queue.records.is_empty()) else {
            return;
        };
        let records = std::mem::take(&mut queue.records);
        let (count, bytes) = (records.len() as u64, std::mem::take(&mut queue.bytes) as u64);
        queue.writing = Some(Writing { upto: queue.last, records: count, bytes, started: Instant::now() });
        // There is a place for one commit beside all questions. A task that has ended has said why.
        let _ = jobs.try_send(Job::Commit(records));
    }

    fn load(&mut self, token: LoadToken, query: Query) -> Result<(), Refused> {
        let refused = |error, query| Err(Refused { error, query: Box::new(query) });
        let Some(jobs) = &self.jobs else { return refused(StoreError::Poisoned, query) };
        if self.loads_open >= self.options.loads_max {
            return refused(StoreError::Full, query);
        }
        let (error, job) = match jobs.try_send(Job::Load(token, query)) {
            Ok(()) => {
                self.loads_open += 1;
                return Ok(());
            }
            Err(TrySendError::Full(job)) => (StoreError::Full, job),
            Err(TrySendError::Closed(job)) => (StoreError::Poisoned, job),
        };
        match job {
            Job::Load(_, query) => refused(error, query),
            // What comes back is what was sent.
            Job::Commit(_) | Job::Close => Ok(()),
        }
    }

    fn poll(&mut self, events: &mut Vec<StoreEvent>) {
        if !self.replies.is_empty() {
            self.reap();
        }
        events.append(&mut self.events);
    }

    fn is_away(&self) -> bool {
        self.shown.away.load(Ordering::Relaxed)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }

    fn close(&mut self) -> Result<(), StoreError> {
        self.drain();
        let Some(jobs) = self.jobs.take() else { return Err(StoreError::Poisoned) };
        // It ends without being told when this handle is dropped.
        let _ = jobs.try_send(Job::Close);
        let is_settled = self.queue.writing.is_none() && self.queue.records.is_empty();
        if is_settled { Ok(()) } else { Err(StoreError::Poisoned) }
    }

    fn stats(&self) -> StoreStats {
        let retention = self.figures.as_ref().map(|figures| figures.stats()).unwrap_or_default();
        StoreStats { reconnects: self.shown.reconnects.load(Ordering::Relaxed), retention, ..self.stats.clone() }
    }
}
