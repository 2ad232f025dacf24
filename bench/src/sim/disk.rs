//! The simulated disk of a node: what is queued, what is being written, what is durable, and what a crash leaves.
//!
//! Owned by the world. Durable records live in the memory backend of the store; this file decides when a record gets
//! there. Invariants: a shard's records become durable in the order of their appends; a crash keeps of a write under way
//! only a beginning of it (a torn write, cut by recovery); after a failed write nothing more is taken, and what part of
//! it reached the disk shows only after the restart.

use std::collections::VecDeque;

use rand::RngExt;
use rand::rngs::SmallRng;
use ringline_schema::ids::{ConversationId, DeviceKey, Seq};
use ringline_schema::record::{Answer, Query, Range, Record};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

use super::Bug;

/// What a write ended in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All up to this number are durable.
    Upto(u64),
    Failed,
}

/// One shard's log.
#[derive(Default)]
struct Log {
    queued: Vec<Record>,
    writing: Option<Vec<Record>>,
    /// Reported as durable without having been synced; only with a planted bug.
    unsynced: Vec<Record>,
    /// Of a failed write: may or may not be on the disk.
    limbo: Vec<Record>,
    appended: u64,
    written: u64,
    failing: bool,
    poisoned: bool,
}

/// See the module.
pub struct Disk {
    durable: Vec<MemoryStore>,
    logs: Vec<Log>,
    /// Messages that retention let go, which come back with the next life; only with a planted bug.
    zombies: Vec<Record>,
    bug: Option<Bug>,
}

impl Disk {
    pub fn new(shards: u16, bug: Option<Bug>) -> Self {
        Self { durable: memory::open(shards), logs: logs(shards), zombies: Vec::new(), bug }
    }

    /// Queues a record. False: the log has failed.
    pub fn append(&mut self, shard: usize, record: Record) -> bool {
        let log = &mut self.logs[shard];
        log.appended += 1;
        log.queued.push(record);
        !log.poisoned
    }

    /// Begins to write what is queued; true if a write began.
    pub fn submit(&mut self, shard: usize) -> bool {
        let log = &mut self.logs[shard];
        if log.queued.is_empty() || log.writing.is_some() || log.poisoned {
            return false;
        }
        log.writing = Some(std::mem::take(&mut log.queued));
        true
    }

    /// The write under way ends.
    pub fn finish(&mut self, shard: usize) -> Option<Written> {
        let log = &mut self.logs[shard];
        let records = log.writing.take()?;
        if log.failing {
            (log.poisoned, log.limbo) = (true, records);
            return Some(Written::Failed);
        }
        log.written += records.len() as u64;
        let upto = log.written;
        if self.bug == Some(Bug::SkippedSync) {
            self.flush(shard);
            self.logs[shard].unsynced = records;
        } else {
            self.keep(shard, records);
        }
        Some(Written::Upto(upto))
    }

    /// The next write of this shard fails.
    pub fn break_next(&mut self, shard: usize) {
        self.logs[shard].failing = true;
    }

    pub fn any_failed(&self) -> bool {
        self.logs.iter().any(|log| log.poisoned || log.failing)
    }

    /// Answers from what is durable. `readable`: false fails, as an index would that can't read its file.
    pub fn answer(&mut self, shard: usize, query: Query, readable: bool) -> Answer {
        if !readable {
            return Answer::Failed;
        }
        (0..self.logs.len()).for_each(|at| self.flush(at));
        let store = &mut self.durable[shard];
        let mut events = Vec::new();
        if store.load(LoadToken(0), query).is_err() {
            return Answer::Failed;
        }
        store.poll(&mut events);
        let answer = events.into_iter().find_map(|event| match event {
            StoreEvent::Loaded(_, answer) => Some(answer),
            StoreEvent::Committed(_) | StoreEvent::Failed => None,
        });
        answer.unwrap_or(Answer::Failed)
    }

    /// First and last of a conversation, as they are durable.
    pub fn bounds(&mut self, conversation: ConversationId) -> Option<(Seq, Seq)> {
        match self.answer(0, Query::Head { conversation, device: DeviceKey(0) }, true) {
            Answer::Head(head) if head.head > Seq::ZERO => Some((head.first, head.head)),
            _ => None,
        }
    }

    /// The checkpoint that lets go of a conversation's messages below `floor` is durable.
    pub fn let_go(&mut self, conversation: ConversationId, floor: Seq) {
        if self.bug == Some(Bug::FloorForgotten) {
            let range =
                Range { after: Seq::ZERO, before: Some(floor), limit: u16::MAX, bytes_max: u32::MAX, newest: false };
            if let Answer::Messages { messages, .. } =
                self.answer(0, Query::Messages { conversation, range, reader: None }, true)
            {
                self.zombies.extend(messages.into_iter().map(Record::from));
            }
        }
        if let Some(store) = self.durable.first() {
            store.let_go(conversation, floor);
        }
    }

    /// The node dies and comes back with `shards`. `orderly`: everything that was queued is written before.
    pub fn restart(&mut self, (shards, orderly): (u16, bool), rng: &mut SmallRng) {
        for shard in 0..self.logs.len() {
            let log = std::mem::take(&mut self.logs[shard]);
            let mut writing: VecDeque<Record> =
                log.limbo.into_iter().chain(log.writing.into_iter().flatten()).collect();
            if orderly && !log.poisoned {
                self.keep(shard, log.unsynced);
                writing.extend(log.queued);
            } else if self.bug == Some(Bug::TornMiddle) {
                writing.retain(|_| rng.random_range(0..3) > 0);
            } else {
                writing.truncate(rng.random_range(0..=writing.len()));
            }
            if self.bug == Some(Bug::TornChange) {
                for record in &mut writing {
                    if let Record::Change(change) = record {
                        change.rows.clear();
                    }
                }
            }
            self.keep(shard, writing);
        }
        let zombies = std::mem::take(&mut self.zombies);
        self.keep(0, zombies);
        self.durable = self.durable.first().map_or_else(Vec::new, |store| store.reopen(shards));
        self.logs = logs(shards);
    }

    fn flush(&mut self, shard: usize) {
        let records = std::mem::take(&mut self.logs[shard].unsynced);
        self.keep(shard, records);
    }

    fn keep(&mut self, shard: usize, records: impl IntoIterator<Item = Record>) {
        let store = &mut self.durable[shard];
        for record in records {
            store.append(&record).expect("the simulation's records fit the memory backend");
        }
        store.submit();
        store.poll(&mut Vec::new());
    }
}

fn logs(shards: u16) -> Vec<Log> {
    (0..shards).map(|_| Log::default()).collect()
}
