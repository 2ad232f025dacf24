//! What Ringline keeps, floor 2: the [`Store`] trait, its backends, and the suite that all of them pass.
//!
//! A store is opened once a node and gives one handle a shard. A handle belongs to its core's thread: it never blocks
//! but in [`Store::close`], and says by [`Store::wake_fd`] when [`Store::poll`] has something.
//!
//! - [`memory`]: forgets everything with its last handle; for tests and the simulator.
//! - [`embedded`]: logs and an index derived from them in one folder; the default.
//! - [`postgres`]: tables in a PostgreSQL database.

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod embedded;
pub mod memory;
pub mod postgres;
mod shown;
mod write;

use std::os::fd::BorrowedFd;

use hdrhistogram::Histogram;
use ringline_schema::ids::{DeviceKey, Seq};
use ringline_schema::limits;
use ringline_schema::record::{Accepted, Answer, Query, Range, Record};
use ringline_schema::rows::{MemberRow, Row, RowKey};

pub use write::FileWrite;

/// The largest record that a store takes, as bytes of its body or password hash: twice the largest frame.
pub const RECORD_BYTES_MAX: usize = 2 * limits::FRAME_BYTES_CEILING as usize;

/// Longest latency of a commit that statistics tell apart, in microseconds.
pub const COMMIT_US_MAX: u64 = 60_000_000;

/// A keyed row in a record, about: two names, numbers, a text.
const ROW_BYTES_MAX: usize = 512;

/// Numbers the records a shard has appended since it was opened: 1, 2, 3 …
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lsn(pub u64);

/// Chosen by the caller of [`Store::load`], comes back with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoadToken(pub u64);

/// What a store has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// Every record up to this one is durable, in the order of their appends.
    Committed(Lsn),
    /// A write or a sync failed. Nothing after the last `Committed` is promised, and nothing more will be accepted.
    Failed,
    Loaded(LoadToken, Answer),
}

/// What a shard's store has done since it was opened.
#[derive(Clone, Debug)]
pub struct StoreStats {
    /// Batches made durable.
    pub commits: u64,
    pub records: u64,
    /// Bytes of the log.
    pub bytes: u64,
    /// From `submit` to the poll that saw it durable, in microseconds; two significant digits, at most
    /// [`COMMIT_US_MAX`].
    pub commit_us: Histogram<u64>,
    /// The sum of all of them.
    pub commit_sum_us: u64,
    /// The last of them.
    pub commit_last_us: u64,
    /// Durable bytes of the log that the index thread has not taken in yet.
    pub index_lag_bytes: u64,
    pub retention: RetentionStats,
    /// Times that the connection to the database was lost, and attempts that did not bring it back.
    pub reconnects: u64,
}

/// How large the logs of a node are, and what retention has done since the start. One handle of a node has them; the
/// others have zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionStats {
    /// Files of all logs, and their bytes with what is reserved; looked at once in `retention_interval_ms`.
    pub segments: u64,
    pub log_bytes: u64,
    /// Times that the first message of a conversation advanced.
    pub floors: u64,
    /// Segments and bytes that were let go.
    pub segments_released: u64,
    /// Of a store that lets go of messages and not of files.
    pub messages_released: u64,
    pub bytes_released: u64,
    pub checkpoints: u64,
    /// Of the last checkpoint.
    pub checkpoint_bytes: u64,
    pub checkpoint_ms: u64,
}

impl StoreStats {
    /// Of a store that has done nothing.
    pub fn new() -> Self {
        // What the library refuses is more than five digits, and bounds that are 0 or out of order.
        let commit_us =
            Histogram::new_with_bounds(1, COMMIT_US_MAX, 2).unwrap_or_else(|_| unreachable!("fixed bounds"));
        let retention = RetentionStats::default();
        let (commit_sum_us, commit_last_us) = (0, 0);
        Self {
            commits: 0,
            records: 0,
            bytes: 0,
            commit_us,
            commit_sum_us,
            commit_last_us,
            index_lag_bytes: 0,
            retention,
            reconnects: 0,
        }
    }

    /// Counts a commit of so many records and bytes.
    fn committed(&mut self, records: u64, bytes: u64, took_us: u64) {
        self.commits += 1;
        self.records += records;
        self.bytes += bytes;
        self.commit_us.saturating_record(took_us);
        self.commit_sum_us = self.commit_sum_us.saturating_add(took_us);
        self.commit_last_us = took_us;
    }
}

impl Default for StoreStats {
    fn default() -> Self {
        Self::new()
    }
}

/// One shard's handle.
pub trait Store {
    /// Queues a record for the next commit and numbers it.
    ///
    /// Errors, all without having queued anything: `Full` when the queue holds as many bytes as it may or the index is
    /// too far behind (try after the next `Committed`, or a little later), `Poisoned` after a failure or `close`,
    /// `TooLarge` for a record above [`RECORD_BYTES_MAX`].
    fn append(&mut self, record: &Record) -> Result<Lsn, StoreError>;

    /// Starts the commit of what is queued, unless one is under way: called once a turn, so batches form at load.
    fn submit(&mut self);

    /// Asks for something. Answers see every record of this shard that was committed before the call, and committed
    /// records of other shards at most a moment late.
    ///
    /// Errors, with the question: `Full` when as many are open as may be or the index thread is behind (ask it again a
    /// little later), `Poisoned` after `close`.
    fn load(&mut self, token: LoadToken, query: Query) -> Result<(), Refused>;

    /// Moves what has happened into `events`. Cheap when nothing has: no system call.
    fn poll(&mut self, events: &mut Vec<StoreEvent>);

    /// Whether the disk has too little room for more: what was appended still becomes durable, new work should be
    /// refused until this is false again. Changes wake like events do; cheap to ask.
    fn is_disk_full(&self) -> bool {
        false
    }

    /// Whether the database cannot be reached or written for now: what was appended waits and becomes durable later, new
    /// work should be refused until this is false again. Changes wake like events do; cheap to ask.
    fn is_away(&self) -> bool {
        false
    }

    /// Becomes readable (edge-triggered use: never read it) when `poll` has something new; `None`: poll finds
    /// everything at once, there is nothing to wait for.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// From here until `close` the caller makes this store's log writes on a ring of its own: [`Store::take_write`]
    /// gives them. Without effect on a store that writes no files.
    fn lend_writes(&mut self) {}

    /// The write to be made now, if there is one: after `submit`, and again after [`Store::written`].
    fn take_write(&mut self) -> Option<FileWrite> {
        None
    }

    /// Brings back a write that was taken, with the kernel's answer: bytes written, or a negative error number. What
    /// follows from it is told by `poll`.
    fn written(&mut self, _write: FileWrite, _result: i32) {}

    /// Commits what is queued, brings the index up to date and marks the stop as clean. Blocks. What it commits, and
    /// answers to earlier questions, are given by the next `poll`. A write that was taken must be back before.
    fn close(&mut self) -> Result<(), StoreError>;

    /// What it has done so far; all zero for a backend that has no commits.
    fn stats(&self) -> StoreStats;
}

/// Why a store refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the store's queue is full")]
    Full,
    #[error("the store failed or was closed, and takes nothing more")]
    Poisoned,
    #[error("the record is larger than a store can hold")]
    TooLarge,
}

/// A question that a store did not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Refused {
    pub error: StoreError,
    pub query: Box<Query>,
}

/// The part of a record that can be large, in bytes.
fn large_bytes(record: &Record) -> usize {
    match record {
        Record::Message(message) => message.body.len(),
        Record::User(user) => user.password_hash.as_ref().map_or(0, String::len),
        Record::Conversation { .. } | Record::Cursor { .. } => 0,
        Record::Change(change) => {
            let body = change.message.as_ref().map_or(0, |message| message.body.len());
            body + ROW_BYTES_MAX * change.rows.len()
        }
    }
}

/// What of a group a reader is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Readable {
    /// Where the membership begins that the page is from, or, if nothing is in the range, the next one above it: whoever
    /// reads on goes on there. The lowest readable seq when the newest were asked for.
    first: Seq,
    /// The highest readable seq; 0: nothing is.
    head: Seq,
    range: Range,
}

/// The first and the last message of first..=head that a member may read. When retention has let go of all of them:
/// the last that there was, and the one behind it. (0, 0): there never was one.
fn span(member: &MemberRow, (first, head): (Seq, Seq)) -> (Seq, Seq) {
    let mut parts = member.readable(first, head);
    match parts.next() {
        Some((start, end)) => (start, parts.last().map_or(end, |(_, end)| end)),
        None => {
            let last = member.readable(Seq(1), head).last().map_or(Seq::ZERO, |(_, end)| end);
            (if last == Seq::ZERO { last } else { last.next() }, last)
        }
    }
}

/// Narrows a range to what a member may read of `first`..=`head`: to one membership, the first that has something in
/// the range from the end that is asked for. So a page never spans messages that are not for the reader, and the next
/// page begins behind them.
fn readable(member: &MemberRow, (first, head): (Seq, Seq), range: &Range) -> Readable {
    let inside = |&(start, end): &(Seq, Seq)| end > range.after && range.before.is_none_or(|before| start < before);
    let parts: Vec<_> = member.readable(first, head).collect();
    let mut matching = parts.iter().copied().filter(inside);
    let part = if range.newest { matching.next_back() } else { matching.next() };
    let (lowest, head) = span(member, (first, head));
    let Some((start, end)) = part else {
        let above = parts.iter().map(|(start, _)| *start).find(|start| *start > range.after && !range.newest);
        return Readable { first: above.unwrap_or(lowest), head, range: Range { limit: 0, ..*range } };
    };
    let end = Seq(end.0.saturating_add(1));
    let after = range.after.max(Seq(start.0.saturating_sub(1)));
    let before = Some(range.before.map_or(end, |before| before.min(end)));
    let first = if range.newest { lowest } else { start };
    Readable { first, head, range: Range { after, before, ..*range } }
}

/// The device that this row says is gone, and its cursors with it.
fn dropped_device(row: &Row) -> Option<DeviceKey> {
    let RowKey::Device(user, device) = &row.key else { return None };
    row.value.is_none().then(|| DeviceKey::new(user, *device))
}

/// Adds an accepted send to a duplicate filter: rising by client_seq, no number twice.
///
/// May hold up to twice `DUPLICATE_WINDOW` entries, so that trimming costs little a message; [`newest`] gives the window.
fn remember(filter: &mut Vec<Accepted>, accepted: Accepted) {
    // What no client numbered, nobody repeats.
    if accepted.client_seq == 0 {
        return;
    }
    match filter.last() {
        Some(last) if accepted.client_seq <= last.client_seq => {
            match filter.binary_search_by_key(&accepted.client_seq, |entry| entry.client_seq) {
                Ok(_) => {}
                Err(at) => filter.insert(at, accepted),
            }
        }
        Some(_) | None => filter.push(accepted),
    }
    if filter.len() >= 2 * limits::DUPLICATE_WINDOW {
        filter.drain(..filter.len() - limits::DUPLICATE_WINDOW);
    }
}

/// The entries of a duplicate filter that count: those with the highest client_seqs.
fn newest(filter: &[Accepted]) -> &[Accepted] {
    filter.get(filter.len().saturating_sub(limits::DUPLICATE_WINDOW)..).unwrap_or(filter)
}
