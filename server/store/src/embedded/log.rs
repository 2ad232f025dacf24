//! The log of a shard, as its thread writes it: two buffers, one filling while the other is being written.
//!
//! Owned by the shard's thread. Invariants: one write is under way at a time, and the next begins only when it is synced;
//! the place of every byte in the filling buffer is fixed when the buffer begins to fill; after an error nothing is ever
//! written again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use ringline_schema::disk::{self, BurstWriter, DiskError, RecordType};
use ringline_schema::record::Record;
use rkyv::util::AlignedVec;

use super::EmbeddedOptions;
use super::format::{
    Kind, Position, RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, RECORD_OVERHEAD_BYTES_MAX, RUN_BYTES, Stamp, begin, finish,
};
use super::ring::WriteRing;
use super::segments::Segment;
use crate::write::FileWrite;
use crate::{Lsn, RECORD_BYTES_MAX, StoreError, large_bytes};

/// What framing adds to a record at most.
const FRAME_BYTES_MAX: usize = RECORD_HEADER_BYTES + RECORD_ALIGN_BYTES;
/// A run mark, a seal, and what ends a record that is open.
const MARKS_BYTES_MAX: usize = 3 * FRAME_BYTES_MAX + RUN_BYTES;
/// The smallest `batch_bytes_max`: one largest record and the marks.
pub(super) const BATCH_BYTES_MIN: usize =
    RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES_MAX + FRAME_BYTES_MAX + MARKS_BYTES_MAX;

/// A batch that became durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Committed {
    pub lsn: Lsn,
    /// Where the log ends now.
    pub to: Position,
    /// 0: only a full segment was sealed.
    pub records: u64,
    pub bytes: u64,
    pub started: Instant,
}

/// Where a log goes on, as recovery found it.
#[derive(Clone, Debug)]
pub(super) struct LogEnd {
    pub segment: Arc<Segment>,
    pub offset: u32,
    /// The next segment, if it is ready already.
    pub next: Option<Arc<Segment>>,
    /// The run that wrote last.
    pub run: u64,
}

/// A record whose frame is not closed yet.
struct Open {
    start: usize,
    partition: u16,
    burst: BurstWriter,
}

pub(super) struct Log {
    ring: WriteRing,
    segment: Arc<Segment>,
    next: Option<Arc<Segment>>,
    /// Where the filling buffer will be written.
    offset: u32,
    filling: AlignedVec,
    filling_records: u64,
    /// The last record in it, while messages may be added to it.
    open: Option<Open>,
    /// The second buffer, when it is not with the ring.
    spare: AlignedVec,
    writing: Option<Committed>,
    last: Lsn,
    /// The number of this run, until its mark is in the log.
    unmarked_run: Option<u64>,
    poisoned: bool,
    segment_bytes: u64,
    batch_bytes_max: usize,
}

impl Log {
    /// Goes on at `end`; `run` is above every run of the data folder so far.
    pub fn new(end: LogEnd, run: u64, options: &EmbeddedOptions, wake: &OwnedFd) -> io::Result<Self> {
        Ok(Self {
            ring: WriteRing::new(wake)?,
            segment: end.segment,
            next: end.next,
            offset: end.offset,
            filling: AlignedVec::new(),
            filling_records: 0,
            open: None,
            spare: AlignedVec::new(),
            writing: None,
            last: Lsn::default(),
            unmarked_run: Some(run),
            poisoned: false,
            segment_bytes: options.segment_bytes,
            batch_bytes_max: options.batch_bytes_max.max(BATCH_BYTES_MIN),
        })
    }

    /// Frames a record into the filling buffer. Errors as [`crate::Store::append`].
    pub fn append(&mut self, record: &Record) -> Result<Lsn, StoreError> {
        if self.poisoned {
            return Err(StoreError::Poisoned);
        }
        let large = large_bytes(record);
        if large > RECORD_BYTES_MAX {
            return Err(StoreError::TooLarge);
        }
        let bytes_max = large + RECORD_OVERHEAD_BYTES_MAX + FRAME_BYTES_MAX;
        // Room for the marks stays free.
        if self.filling.len() + bytes_max + MARKS_BYTES_MAX > self.batch_bytes_max || !self.segment_has_room(bytes_max)
        {
            return Err(StoreError::Full);
        }
        if let Err(error) = self.put(record) {
            // The encoder has dropped the buffer, and records that were numbered with it.
            tracing::error!(%error, "the store of this shard stops: a record does not encode");
            self.poisoned = true;
            return Err(StoreError::Poisoned);
        }
        self.filling_records += 1;
        self.last = Lsn(self.last.0 + 1);
        Ok(self.last)
    }

    #[inline]
    fn put(&mut self, record: &Record) -> Result<(), DiskError> {
        let plain = match record {
            Record::Message(message) if message.extra.is_none() => Some(message),
            Record::Message(_)
            | Record::Change(_)
            | Record::User(_)
            | Record::Conversation { .. }
            | Record::Cursor { .. } => None,
        };
        if let (Some(message), Some(open)) = (plain, &mut self.open)
            && open.burst.add(message, &mut self.filling)
        {
            return Ok(());
        }
        self.close_open();
        if let Some(run) = self.unmarked_run.take() {
            let start = begin(&mut self.filling);
            self.filling.extend_from_slice(&run.to_le_bytes());
            self.close_record(start, Kind::Run, 0);
        }
        let (start, partition) = (begin(&mut self.filling), record.partition().number());
        match plain {
            Some(message) => {
                let burst = BurstWriter::begin(message, &mut self.filling)?;
                self.open = Some(Open { start, partition, burst });
            }
            None => {
                let record_type = disk::encode(record, &mut self.filling)?;
                self.close_record(start, Kind::Record(record_type), partition);
            }
        }
        Ok(())
    }

    fn close_open(&mut self) {
        let Some(Open { start, partition, burst }) = self.open.take() else { return };
        let several = burst.end(&mut self.filling);
        let record_type = if several { RecordType::Burst } else { RecordType::Message };
        self.close_record(start, Kind::Record(record_type), partition);
    }

    /// Starts writing what is queued, unless a write is under way.
    pub fn submit(&mut self, now: Instant) {
        if self.poisoned || self.writing.is_some() {
            return;
        }
        // A full segment whose successor came late is sealed even if nothing is queued: nothing may fit in it any more.
        let seal_alone = self.next.is_some() && u64::from(self.offset) >= self.segment_bytes;
        if self.filling.is_empty() && !seal_alone {
            return;
        }
        self.close_open();
        let bytes = self.filling.len() as u64;
        let next = self.next.take_if(|_| u64::from(self.offset) + bytes >= self.segment_bytes);
        if next.is_some() {
            let start = begin(&mut self.filling);
            self.close_record(start, Kind::Seal, 0);
        }
        let buffer = std::mem::replace(&mut self.filling, std::mem::take(&mut self.spare));
        let (segment, offset) = (Arc::clone(&self.segment), self.offset);
        match next {
            Some(next) => {
                self.offset = Position::start_of(next.header.number).offset;
                self.segment = next;
            }
            // `segment_has_room` has kept the sum in range.
            None => self.offset = self.offset.saturating_add(buffer.len() as u32),
        }
        let to = Position { segment: self.segment.header.number, offset: self.offset };
        let records = std::mem::take(&mut self.filling_records);
        self.writing = Some(Committed { lsn: self.last, to, records, bytes, started: now });
        self.ring.start(segment, offset, buffer);
    }

    /// The batch that has become durable, if one has. An error is given once and is the end.
    pub fn finished(&mut self) -> Option<io::Result<Committed>> {
        let finished = self.ring.finished()?;
        let committed = self.writing.take()?;
        if let Err(error) = finished.result {
            self.poisoned = true;
            return Some(Err(error));
        }
        if self.poisoned {
            return None;
        }
        self.spare = finished.buffer;
        self.spare.clear();
        Some(Ok(committed))
    }

    /// Whether somebody else makes the writes: then [`Log::take_write`] gives them.
    pub fn set_lent(&mut self, lent: bool) {
        self.ring.set_lent(lent);
    }

    pub fn take_write(&mut self) -> Option<FileWrite> {
        self.ring.take()
    }

    pub fn written(&mut self, write: FileWrite, result: i32) {
        self.ring.give_back(write, result);
    }

    /// Blocks until the write that is under way, if any, has ended. Errors: see [`WriteRing::wait`].
    pub fn wait(&mut self) -> io::Result<()> {
        self.ring.wait()
    }

    pub fn is_writing(&self) -> bool {
        self.ring.is_busy()
    }

    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Takes no more, for a reason outside the log. What is being written may still reach the disk; it is not reported.
    pub fn poison(&mut self) {
        self.poisoned = true;
    }

    /// The number of the segment that should be prepared now: the current one is half full and none is ready.
    pub fn wants_segment(&self) -> Option<u32> {
        let half_full = u64::from(self.offset) >= self.segment_bytes / 2;
        (half_full && self.next.is_none()).then(|| self.segment.header.number.saturating_add(1))
    }

    pub fn set_next(&mut self, next: Arc<Segment>) {
        assert_eq!(next.header.number, self.segment.header.number + 1, "segments follow one another");
        self.next = Some(next);
    }

    #[cfg(test)]
    pub fn ring(&mut self) -> &mut WriteRing {
        &mut self.ring
    }

    fn close_record(&mut self, start: usize, kind: Kind, partition: u16) {
        let offset = self.offset.saturating_add(start as u32);
        let salt = self.segment.header.salt;
        finish(&mut self.filling, start, Stamp { kind, first_of_batch: start == 0, partition, salt, offset });
    }

    /// A segment that no next one relieves may grow into its slack, then appends wait. Beyond it nothing is reserved, and
    /// a commit could meet a full disk.
    fn segment_has_room(&self, bytes: usize) -> bool {
        let end = u64::from(self.offset) + (self.filling.len() + bytes + MARKS_BYTES_MAX) as u64;
        end <= self.segment_bytes + self.batch_bytes_max as u64 && end < u64::from(u32::MAX)
    }
}
