//! What a start does with the logs it finds: read on from the index's watermarks, cut torn tails, refuse damage.
//!
//! Runs once, on the thread that opens the store, before any shard does. Invariant: afterwards the index holds every
//! record of every log, and each log ends in zeros after its last readable record. An index that is made anew takes the
//! rows of the newest whole checkpoint first; a log begins where that says, and what lies before is removed.
//!
//! The rule (see [`super::format`]): unreadable bytes with no readable batch after them were never acknowledged, because
//! a batch is written only when the one before is durable; they are cut and reported. Unreadable bytes before a readable
//! batch were durable once: that is damage, and the start is refused.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringline_schema::disk::{self, DiskError};

use super::checkpoint::{Checkpoints, Footer, Opened};
use super::format::{Kind, Place, Position};
use super::index::{Index, IndexError};
use super::log::LogEnd;
use super::overlay::Overlay;
use super::rows::{Kept, Watermark};
use super::scan::{Found, Scanner, Tail, tail};
use super::segments::{FOREIGN, ReadError, Segment, Segments, reserve};
use super::{Cut, EmbeddedOptions, OpenError, OpenReport};

/// A long replay says how far it is once in this time.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

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
            | IndexError::FlushEnded
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

/// Index and logs, agreeing.
pub(super) struct Recovered {
    pub index: Index,
    pub ends: Vec<(u16, LogEnd)>,
    /// Where logs begin that don't begin with their first segment any more.
    pub kept: BTreeMap<u16, Kept>,
    /// The highest number that a checkpoint ever had.
    pub checkpoint: u64,
    /// Logs have lost segments, and there is no checkpoint that reads: one has to be made of this index.
    pub mend: bool,
}

/// Brings the index in `dir` up to date, or, if there is none yet (`fresh`), makes it.
pub(super) fn recover_with(
    dir: &Path,
    (identity, fresh): (u64, bool),
    segments: &Segments,
    (options, report): (&EmbeddedOptions, &mut OpenReport),
) -> Result<Recovered, RecoveryError> {
    let index = Index::open(&dir.join("index"), options)?;
    let checkpoints = Checkpoints::new(dir);
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let begun = if fresh {
        let begun = restore(&checkpoints, identity, &index, (segments, options))?;
        // Last: an index that was not filled to the end is nobody's.
        index.set_identity(identity)?;
        index.set_kept(&begun.kept)?;
        begun
    } else if index.belongs_to(identity)? {
        Begun::of_index(&checkpoints, identity, &index)?
    } else {
        return Err(RecoveryError::Index(IndexError::Foreign));
    };
    let watermarks = index.watermarks()?;
    let progress = Progress::of(segments, &watermarks, &begun.kept).map_err(io_error)?;
    let mut recovery =
        Recovery { segments, index: &index, options, begun, progress, replayed_records: 0, cuts: Vec::new() };
    let recovered = recovery.run(&watermarks);
    report.replayed_records = recovery.replayed_records;
    report.cuts.append(&mut recovery.cuts);
    let Begun { kept, mend, .. } = recovery.begun;
    let ends = recovered?;
    report.clean_stop = watermarks.len() == ends.len() && watermarks.iter().all(|(_, watermark)| watermark.closed);
    checkpoints.remove_unfinished().map_err(io_error)?;
    let checkpoint = checkpoints.numbers().map_err(io_error)?.last().copied().unwrap_or(0);
    Ok(Recovered { index, ends, kept, checkpoint, mend })
}

/// From where logs are read.
#[derive(Default)]
struct Begun {
    kept: BTreeMap<u16, Kept>,
    /// How far the checkpoint knew each log: none ends before.
    wanted: BTreeMap<u16, Watermark>,
    mend: bool,
}

impl Begun {
    /// What index and newest checkpoint say; of a log, whichever says more. The index hears of it last.
    fn of_index(checkpoints: &Checkpoints, identity: u64, index: &Index) -> Result<Self, RecoveryError> {
        let mut kept = index.kept()?;
        let known = kept.clone();
        let newest = checkpoints.newest(identity).map_err(|source| checkpoint_error(checkpoints, source))?;
        let mend = !matches!(&newest, Some(Ok(_))) && !kept.is_empty();
        if let Some(Ok(opened)) = newest {
            for (log, begin) in opened.header.kept {
                let known = kept.entry(log).or_default();
                *known = if known.segment < begin.segment { begin } else { *known };
            }
        }
        if kept != known {
            index.set_kept(&kept)?;
        }
        Ok(Self { kept, wanted: BTreeMap::new(), mend })
    }
}

/// Fills a new index from the newest checkpoint that reads to its end. Without one, all logs have to be whole.
fn restore(
    checkpoints: &Checkpoints,
    identity: u64,
    index: &Index,
    (segments, options): (&Segments, &EmbeddedOptions),
) -> Result<Begun, RecoveryError> {
    let io_error = |source| checkpoint_error(checkpoints, source);
    let (path, header, Footer { rows, watermarks }) = match checkpoints.newest_whole(identity).map_err(io_error)? {
        Some(Ok(found)) => found,
        None => return Ok(Begun::default()),
        Some(Err(error)) => {
            for log in segments.logs().map_err(io_error)? {
                if segments.numbers(log).map_err(io_error)?.first().is_some_and(|first| *first > 1) {
                    return Err(error.into());
                }
            }
            tracing::warn!(%error, "the checkpoint does not read; the logs are whole without it");
            return Ok(Begun::default());
        }
    };
    tracing::info!(rows, checkpoint = header.number, "the index is filled from the checkpoint");
    Opened::open(path, identity)?.read(&mut |mut rows| -> Result<(), RecoveryError> {
        index.restore(&mut rows)?;
        if options.stop.load(Ordering::Relaxed) { Err(OpenError::Stopped.into()) } else { Ok(()) }
    })?;
    Ok(Begun { kept: header.kept, wanted: watermarks, mend: false })
}

fn checkpoint_error(checkpoints: &Checkpoints, source: io::Error) -> OpenError {
    OpenError::Io { path: checkpoints.path(0), source }
}

/// How far a replay is, for who waits for it.
struct Progress {
    done_bytes: u64,
    total_bytes: u64,
    said: Instant,
}

impl Progress {
    fn of(segments: &Segments, watermarks: &[(u16, Watermark)], kept: &BTreeMap<u16, Kept>) -> io::Result<Self> {
        let mut total_bytes = 0;
        for log in segments.logs()? {
            let watermark = watermarks.iter().find(|(of, _)| *of == log).map(|(_, watermark)| watermark.at);
            let begin = kept.get(&log).copied().unwrap_or_default().segment;
            let from = watermark.unwrap_or(Position::start_of(begin));
            for number in segments.listed(log)?.into_iter().filter(|number| *number >= from.segment) {
                let bytes = std::fs::metadata(segments.path(log, number))?.len();
                let known = if number == from.segment { u64::from(from.offset) } else { 0 };
                total_bytes += bytes.saturating_sub(known);
            }
        }
        Ok(Self { done_bytes: 0, total_bytes, said: Instant::now() })
    }

    fn add(&mut self, bytes: u64, records: u64) {
        self.done_bytes += bytes;
        if self.said.elapsed() >= PROGRESS_INTERVAL {
            self.said = Instant::now();
            let percent = self.done_bytes.saturating_mul(100) / self.total_bytes.max(1);
            tracing::info!("reading the logs: {percent} % of at most {} bytes, {records} records", self.total_bytes);
        }
    }
}

/// Brings logs and index together.
struct Recovery<'a> {
    segments: &'a Segments,
    index: &'a Index,
    options: &'a EmbeddedOptions,
    begun: Begun,
    progress: Progress,
    replayed_records: u64,
    cuts: Vec<Cut>,
}

impl Recovery<'_> {
    /// Every log's end, in rising order of logs, with everything before it in the index.
    fn run(&mut self, watermarks: &[(u16, Watermark)]) -> Result<Vec<(u16, LogEnd)>, RecoveryError> {
        let logs = self.segments.logs().map_err(|error| self.io_error(0, error))?;
        let known = watermarks.iter().map(|(log, _)| log).chain(self.begun.kept.keys()).chain(self.begun.wanted.keys());
        if let Some(missing) = known.copied().find(|log| !logs.contains(log)) {
            return Err(self.damaged(self.segments.path(missing, 1), 0, "this log is missing").into());
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
        let kept = self.begun.kept.get(&log).copied().unwrap_or_default();
        let mut numbers = self.segments.numbers(log).map_err(|error| self.io_error(log, error))?;
        numbers.retain(|number| *number >= kept.segment);
        if watermark.is_some_and(|watermark| watermark.at.segment < kept.segment) {
            // It is older than the checkpoint, and what it lacks is gone.
            return Err(RecoveryError::Index(IndexError::Foreign));
        }
        // Numbers begin where retention has left the log, and leave none out.
        let missing = numbers.iter().zip(kept.segment..).find(|&(&number, expected)| number != expected);
        let missing = missing.map(|(_, expected)| expected);
        let missing = missing.or((numbers.is_empty() && kept.segment > 1).then_some(kept.segment));
        let wanted = watermark.map(|watermark| watermark.at.segment).filter(|at| !numbers.contains(at));
        if let Some(number) = missing.or(wanted) {
            return Err(self.damaged(self.segments.path(log, number), 0, "this segment is missing").into());
        }
        let Some(&newest) = numbers.last() else { return Ok(None) };
        let start = watermark.map_or(Position::start_of(kept.segment), |watermark| watermark.at);
        let run = watermark.map_or(kept.run, |watermark| watermark.run);
        let mut replay = Replay { log, overlay: Overlay::of_replay(run), at: start };
        let found_end = self.replay(&mut replay)?;
        self.flush(&mut replay)?;

        let (at, segment) = (replay.at, self.segments.get(log, replay.at.segment)?);
        if self.begun.wanted.get(&log).is_some_and(|wanted| at < wanted.at) {
            let what = "the log ends before what the checkpoint has seen of it";
            return Err(self.damaged(segment.path.clone(), at.offset, what).into());
        }
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
        self.remove_released(log, kept)?;
        Ok(Some(LogEnd { segment, offset: at.offset, next, run: replay.overlay.run }))
    }

    /// What a checkpoint has let go and a crash has left.
    fn remove_released(&self, log: u16, kept: Kept) -> Result<(), RecoveryError> {
        let numbers = self.segments.numbers(log).map_err(|error| self.io_error(log, error))?;
        for number in numbers.into_iter().filter(|number| *number < kept.segment && !self.begun.mend) {
            self.segments.remove(log, number).map_err(|error| self.io_error(log, error))?;
        }
        Ok(())
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
                let damaged = |error: DiskError| self.damaged(segment.path.clone(), offset, &error.to_string());
                let indexed = disk::decode_for_index(record_type, framed.payload).map_err(damaged)?;
                let records = indexed.records() as u64;
                replay.overlay.apply(indexed, place).map_err(damaged)?;
                replay.at.offset = scanner.offset();
                self.replayed_records += records;
                self.progress.add(u64::from(place.bytes), self.replayed_records);
                let stopped = self.options.stop.load(Ordering::Relaxed);
                if stopped || replay.overlay.is_full(self.options) {
                    self.flush(replay)?;
                }
                if stopped {
                    return Err(OpenError::Stopped.into());
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

#[cfg(test)]
mod tests {
    use super::super::EmbeddedStore;
    use super::super::tests::{lazy, open};
    use super::*;
    use crate::conformance::{Pair, check};

    #[test]
    fn an_opening_that_is_told_to_stop_keeps_what_it_has_read() {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
        let (mut node, _) = open(dir.path(), 1, &lazy());
        let records = pair.history(20);
        for record in &records {
            node.commit(std::slice::from_ref(record));
        }
        drop(node);
        let options = lazy();
        options.stop.store(true, Ordering::Relaxed);
        const STOPS: usize = 3;
        for _ in 0..STOPS {
            let opened = EmbeddedStore::open(dir.path(), 1, options.clone());
            assert!(matches!(opened, Err(OpenError::Stopped)), "it does not open");
        }
        options.stop.store(false, Ordering::Relaxed);
        let (mut node, report) = open(dir.path(), 1, &options);
        assert!(report.cuts.is_empty() && report.index_rebuilt.is_none(), "{report:?}");
        assert_eq!(report.replayed_records as usize, records.len() - STOPS, "each went on where the one before ended");
        check(&mut node, &[pair], 20);
    }
}
