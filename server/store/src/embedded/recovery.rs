//! What a start does with the logs it finds: read on from the index's watermarks, cut torn tails, refuse damage.
//!
//! Runs once, on the thread that opens the store, before any shard does. Invariant: afterwards the index holds every
//! record of every log, and each log ends in zeros after its last readable record.
//!
//! The rule (see [`super::format`]): unreadable bytes with no readable batch after them were never acknowledged, because
//! a batch is written only when the one before is durable; they are cut and reported. Unreadable bytes before a readable
//! batch were durable once: that is damage, and the start is refused.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ringline_schema::disk;

use super::format::{Kind, Place, Position};
use super::index::{Index, IndexError};
use super::log::LogEnd;
use super::overlay::Overlay;
use super::rows::Watermark;
use super::scan::{Found, Scanner, Tail, tail};
use super::segments::{FOREIGN, ReadError, Segment, Segments, reserve};
use super::{Cut, EmbeddedOptions, OpenError};

/// Why recovery ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecoveryError {
    /// Final.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The index can't be used: throw it away and begin again without one.
    #[error(transparent)]
    Index(IndexError),
}

impl From<IndexError> for RecoveryError {
    fn from(error: IndexError) -> Self {
        match error {
            IndexError::Log(error) => Self::Open(error.into()),
            IndexError::Library(_)
            | IndexError::Row(_)
            | IndexError::Foreign
            | IndexError::Missing(..)
            | IndexError::Wrong(..) => Self::Index(error),
        }
    }
}

impl From<ReadError> for RecoveryError {
    fn from(error: ReadError) -> Self {
        Self::Open(error.into())
    }
}

/// Brings logs and index together.
pub(super) struct Recovery<'a> {
    pub segments: &'a Segments,
    pub index: &'a Index,
    pub options: &'a EmbeddedOptions,
    pub replayed_records: u64,
    pub cuts: Vec<Cut>,
}

impl Recovery<'_> {
    /// Every log's end, in rising order of logs, with everything before it in the index.
    pub fn run(&mut self, watermarks: &[(u16, Watermark)]) -> Result<Vec<(u16, LogEnd)>, RecoveryError> {
        let logs = self.segments.logs().map_err(|error| self.io_error(0, error))?;
        if let Some((missing, _)) = watermarks.iter().find(|(log, _)| !logs.contains(log)) {
            return Err(self.damaged(self.segments.path(*missing, 1), 0, "this log is missing").into());
        }
        let mut ends = Vec::new();
        for log in logs {
            let watermark = watermarks.iter().find(|(of, _)| *of == log).map(|&(_, watermark)| watermark);
            if let Some(end) = self.log(log, watermark)? {
                ends.push((log, end));
            }
        }
        Ok(ends)
    }

    /// `None` for a folder in which no segment was ever finished.
    fn log(&mut self, log: u16, watermark: Option<Watermark>) -> Result<Option<LogEnd>, RecoveryError> {
        let numbers = self.segments.numbers(log).map_err(|error| self.io_error(log, error))?;
        // Numbers begin at 1 and leave none out.
        let missing = numbers.iter().zip(1..).find(|&(&number, expected)| number != expected);
        let missing = missing.map(|(_, expected)| expected);
        let wanted = watermark.map(|watermark| watermark.at.segment).filter(|at| !numbers.contains(at));
        if let Some(number) = missing.or(wanted) {
            return Err(self.damaged(self.segments.path(log, number), 0, "this segment is missing").into());
        }
        let Some(&newest) = numbers.last() else { return Ok(None) };
        let start = watermark.map_or(Position::start_of(1), |watermark| watermark.at);
        let run = watermark.map_or(0, |watermark| watermark.run);
        let mut replay = Replay { log, overlay: Overlay { run, ..Overlay::default() }, at: start };
        let found_end = self.replay(&mut replay)?;
        self.flush(&mut replay)?;

        let (at, segment) = (replay.at, self.segments.get(log, replay.at.segment)?);
        let closed_here = watermark.is_some_and(|watermark| watermark.closed && watermark.at == at);
        if !(closed_here && found_end) {
            self.cut_tail(&segment, at.offset)?;
        }
        for number in (at.segment..=newest).skip(1) {
            let later = self.segments.get(log, number)?;
            let found = tail(&later, Position::start_of(number).offset).map_err(|error| self.io_error(log, error))?;
            if found != Tail::default() {
                let what = format!("records or a seal are missing here, but {} is not empty", later.path.display());
                return Err(self.damaged(segment.path.clone(), at.offset, &what).into());
            }
        }
        let next = if newest > at.segment { Some(self.segments.get(log, at.segment + 1)?) } else { None };
        Ok(Some(LogEnd { segment, offset: at.offset, next, run: replay.overlay.run }))
    }

    /// Reads records until there are no more; whether the end was a clean one (zeros).
    fn replay(&mut self, replay: &mut Replay) -> Result<bool, RecoveryError> {
        loop {
            let segment = self.segments.get(replay.log, replay.at.segment)?;
            let io_error = |source| ReadError::Io { path: segment.path.clone(), source };
            if segment.file.metadata().map_err(io_error)?.len() < u64::from(replay.at.offset) {
                let what = "the log ends before what the index has seen of it";
                return Err(self.damaged(segment.path.clone(), replay.at.offset, what).into());
            }
            let mut scanner = Scanner::to_end(Arc::clone(&segment), replay.at.offset).map_err(io_error)?;
            loop {
                let (offset, framed) = match scanner.next().map_err(io_error)? {
                    Found::Record { offset, framed } => (offset, framed),
                    Found::End { .. } => return Ok(true),
                    Found::Bad { .. } => return Ok(false),
                    Found::Foreign { offset } => {
                        return Err(self.damaged(segment.path.clone(), offset, FOREIGN).into());
                    }
                };
                let record_type = match framed.kind {
                    Kind::Record(record_type) => record_type,
                    Kind::Run => {
                        replay.overlay.run = framed.run().unwrap_or(replay.overlay.run);
                        replay.at.offset = scanner.offset();
                        continue;
                    }
                    Kind::Seal => break,
                };
                let place = Place { log: replay.log, segment: replay.at.segment, offset, bytes: framed.bytes as u32 };
                let indexed = disk::decode_for_index(record_type, framed.payload)
                    .map_err(|error| self.damaged(segment.path.clone(), offset, &error.to_string()))?;
                replay.overlay.apply(indexed, place);
                replay.at.offset = scanner.offset();
                self.replayed_records += 1;
                if replay.overlay.records >= self.options.flush_records_max {
                    self.flush(replay)?;
                }
            }
            replay.at = Position::start_of(replay.at.segment.saturating_add(1));
        }
    }

    fn flush(&self, replay: &mut Replay) -> Result<(), RecoveryError> {
        if replay.overlay.records > 0 {
            let watermark = Watermark { at: replay.at, run: replay.overlay.run, closed: false };
            self.index.flush(&replay.overlay, replay.log, watermark)?;
            replay.overlay.clear();
        }
        Ok(())
    }

    /// Removes what lies behind the last readable record, or refuses when it was durable once. A file that ends in the
    /// padding of that record gets it back.
    fn cut_tail(&mut self, segment: &Segment, offset: u32) -> Result<(), RecoveryError> {
        let log = segment.header.log;
        let found = tail(segment, offset).map_err(|error| self.io_error(log, error))?;
        if let Some(later) = found.later_batch {
            let what = format!("not a readable record, but a later batch, at byte {later}, is readable");
            return Err(self.damaged(segment.path.clone(), offset, &what).into());
        }
        let short = segment.file.metadata().map_err(|error| self.io_error(log, error))?.len() < u64::from(offset);
        if found.written_bytes == 0 && !short {
            return Ok(());
        }
        let cut = || -> io::Result<()> {
            segment.file.set_len(u64::from(offset))?;
            reserve(&segment.file, self.options.segment_bytes)?;
            segment.file.sync_all()
        };
        cut().map_err(|error| self.io_error(log, error))?;
        if found.written_bytes > 0 {
            self.cuts.push(Cut { file: segment.path.clone(), offset, bytes: found.written_bytes });
        }
        Ok(())
    }

    fn damaged(&self, file: PathBuf, offset: u32, what: &str) -> OpenError {
        OpenError::Damaged { file, offset, what: what.to_owned() }
    }

    fn io_error(&self, log: u16, source: io::Error) -> OpenError {
        let path = self.segments.path(log, 1);
        OpenError::Io { path: path.parent().map_or(path.clone(), ToOwned::to_owned), source }
    }
}

/// One log on its way into the index.
struct Replay {
    log: u16,
    overlay: Overlay,
    /// Behind the last record that was read.
    at: Position,
}
