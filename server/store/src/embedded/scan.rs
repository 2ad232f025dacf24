//! Reading a segment from a place onwards: by the index thread behind its log, and at recovery.
//!
//! Any thread. Reads with `pread` in bounded steps; one record is in memory at a time.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::format::{Framed, Parsed, RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, parse, parse_own, said_bytes};
use super::segments::Segment;

/// Bytes read at a time; the buffer grows beyond it only for one larger record.
pub(super) const SCAN_BYTES: usize = 256 * 1024;

/// What [`Scanner::next`] found, and where.
#[derive(Debug)]
pub(super) enum Found<'a> {
    Record {
        offset: u32,
        framed: Framed<'a>,
    },
    /// Zeros or the end of what may be read.
    End {
        offset: u32,
    },
    /// Bytes that are no record, or only a part of one.
    Bad {
        offset: u32,
        what: &'static str,
    },
    /// A whole record that a newer program wrote.
    Foreign {
        offset: u32,
    },
}

/// Walks the records of one segment.
pub(super) struct Scanner {
    segment: Arc<Segment>,
    /// Where the next record begins.
    offset: u32,
    /// Nothing at or above this is read.
    limit: u64,
    /// Its first `filled` bytes were read; what lies behind them is left over.
    buffer: Vec<u8>,
    filled: usize,
    /// Where `buffer` begins in the segment.
    buffer_offset: u64,
    /// See [`Scanner::of_own`].
    own: bool,
}

impl Scanner {
    /// `limit` is a place between records, or the end of the file.
    pub fn new(segment: Arc<Segment>, offset: u32, limit: u64) -> Self {
        Self { segment, offset, limit, buffer: Vec::new(), filled: 0, buffer_offset: u64::from(offset), own: false }
    }

    /// For what this process has just written and synced up to `limit`: checksums are not compared. Whoever reads a
    /// message later compares its own.
    pub fn of_own(segment: Arc<Segment>, offset: u32, limit: u64) -> Self {
        Self { own: true, ..Self::new(segment, offset, limit) }
    }

    /// Reads the whole file.
    pub fn to_end(segment: Arc<Segment>, offset: u32) -> io::Result<Self> {
        let limit = segment.file.metadata()?.len().min(u64::from(u32::MAX));
        Ok(Self::new(segment, offset, limit))
    }

    /// Gives it a buffer that was used before, until [`Scanner::take_back`]. Before the first record.
    pub fn lend(&mut self, buffer: &mut Vec<u8>) {
        self.buffer = std::mem::take(buffer);
    }

    pub fn take_back(self, buffer: &mut Vec<u8>) {
        *buffer = self.buffer;
        // What one huge record needed is not kept.
        buffer.truncate(SCAN_BYTES);
        buffer.shrink_to(SCAN_BYTES);
    }

    /// Where the next record begins.
    pub fn offset(&self) -> u32 {
        self.offset
    }

    /// The next record. Not to be called again after `End` or `Bad`.
    pub fn next(&mut self) -> io::Result<Found<'_>> {
        let (offset, salt) = (self.offset, self.segment.header.salt);
        let bytes = said_bytes(self.read(RECORD_ALIGN_BYTES)?);
        let there = self.read(bytes)?;
        if there.len() < bytes {
            // The file ends before the record does: nothing but zeros is an end, anything else a part of a record.
            let zero = there.iter().all(|&byte| byte == 0);
            return Ok(if zero { Found::End { offset } } else { Found::Bad { offset, what: "part of a record" } });
        }
        let start = (u64::from(offset) - self.buffer_offset) as usize;
        self.offset = offset.saturating_add(bytes.next_multiple_of(RECORD_ALIGN_BYTES) as u32);
        let record = self.buffer.get(start..start + bytes).unwrap_or(&[]);
        Ok(match if self.own { parse_own(record) } else { parse(record, salt, offset) } {
            Parsed::Record(framed) => Found::Record { offset, framed },
            Parsed::Bad(what) => Found::Bad { offset, what },
            Parsed::Foreign => Found::Foreign { offset },
            Parsed::Nothing => Found::End { offset },
            Parsed::NeedMore(_) => Found::Bad { offset, what: "impossible length" },
        })
    }

    /// Reads ahead, so that the next record is in memory unless it is a large one.
    pub fn read_ahead(&mut self) -> io::Result<()> {
        self.read(RECORD_ALIGN_BYTES).map(|_| ())
    }

    /// The bytes from `self.offset`, as many as wanted or as there are below the limit.
    #[inline]
    fn read(&mut self, wanted: usize) -> io::Result<&[u8]> {
        let mut start = (u64::from(self.offset).saturating_sub(self.buffer_offset)) as usize;
        if self.filled.saturating_sub(start) < wanted {
            self.fill(wanted)?;
            start = 0;
        }
        let rest = self.buffer.get(start..self.filled).unwrap_or(&[]);
        Ok(rest.get(..wanted).unwrap_or(rest))
    }

    /// Fills the buffer from `self.offset` on, with at least as much as wanted if there is so much below the limit.
    #[cold]
    fn fill(&mut self, wanted: usize) -> io::Result<()> {
        let left = self.limit.saturating_sub(u64::from(self.offset));
        let bytes = left.min(wanted.max(SCAN_BYTES) as u64) as usize;
        if self.buffer.len() < bytes {
            self.buffer.resize(bytes, 0);
        }
        let place = self.buffer.get_mut(..bytes).unwrap_or(&mut []);
        self.filled = 0;
        self.filled = read_full(&self.segment, place, u64::from(self.offset))?;
        self.buffer_offset = u64::from(self.offset);
        Ok(())
    }
}

/// What lies behind the last readable record of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tail {
    /// Bytes from the asked place to the last one that is not zero.
    pub written_bytes: u64,
    /// A readable record that begins a batch: proof that what lies before it was durable once.
    pub later_batch: Option<u32>,
}

/// Looks through everything from `offset` to the end of the file, skipping what was never written.
pub(super) fn tail(segment: &Segment, offset: u32) -> io::Result<Tail> {
    let end = segment.file.metadata()?.len().min(u64::from(u32::MAX));
    let mut found = Tail::default();
    let mut chunk = vec![0; SCAN_BYTES];
    let mut record = Vec::new();
    let mut at = u64::from(offset);
    while at < end && found.later_batch.is_none() {
        match rustix::fs::seek(&segment.file, SeekFrom::Data(at)) {
            // Chunks stay aligned like the records.
            Ok(data) => at = at.max(data / RECORD_ALIGN_BYTES as u64 * RECORD_ALIGN_BYTES as u64),
            Err(Errno::NXIO) => break,
            // Not every file system knows holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        let filled = read_full(segment, &mut chunk, at)?;
        let bytes = chunk.get(..filled).unwrap_or(&[]);
        if filled == 0 {
            break;
        }
        if let Some(last) = bytes.iter().rposition(|&byte| byte != 0) {
            found.written_bytes = at + last as u64 + 1 - u64::from(offset);
        }
        for (step, word) in bytes.chunks(RECORD_ALIGN_BYTES).enumerate() {
            if word.iter().all(|&byte| byte == 0) {
                continue;
            }
            let place = at + (step * RECORD_ALIGN_BYTES) as u64;
            if begins_batch(segment, place as u32, &mut record)? {
                found.later_batch = Some(place as u32);
                break;
            }
        }
        at += filled as u64;
    }
    Ok(found)
}

/// Whether a readable record that begins a batch lies exactly here.
fn begins_batch(segment: &Segment, offset: u32, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut wanted = RECORD_HEADER_BYTES;
    // The first step learns the length, the second reads the record.
    for _ in 0..2 {
        buffer.resize(wanted, 0);
        let filled = read_full(segment, buffer, u64::from(offset))?;
        match parse(buffer.get(..filled).unwrap_or(&[]), segment.header.salt, offset) {
            Parsed::Record(framed) => return Ok(framed.first_of_batch),
            Parsed::Foreign => return Ok(true),
            Parsed::Nothing | Parsed::Bad(_) => return Ok(false),
            Parsed::NeedMore(bytes) => wanted = bytes,
        }
    }
    Ok(false)
}

fn read_full(segment: &Segment, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match segment.file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
