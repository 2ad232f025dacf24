//! Looking through logs without changing them: every segment, every record, and what is unreadable between them.
//!
//! Offline commands only, on a folder that no server uses. Invariant: what [`survey`] calls torn is what a start would
//! cut, and what it calls damage is what a start would refuse; the rule is the one of [`super::recovery`].

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use ringline_schema::disk;

use super::format::{Framed, Kind, Parsed, Position, RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, parse};
use super::scan::{Found, SCAN_BYTES, Scanner, tail};
use super::segments::{FOREIGN, ReadError, Segment, Segments};

/// Unreadable bytes that were durable once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub file: PathBuf,
    /// Where they begin.
    pub offset: u32,
    /// How many there are, up to the next readable record; 0: not known.
    pub bytes: u64,
    pub what: String,
}

/// The remains of a commit that was interrupted: nobody was told it was stored, and the next start cuts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Torn {
    pub file: PathBuf,
    pub offset: u32,
    pub bytes: u64,
}

/// What one segment holds.
#[derive(Debug, Default)]
pub(super) struct SegmentSurvey {
    pub number: u32,
    pub records: u64,
    pub messages: u64,
    pub sealed: bool,
    /// Behind the last readable record.
    pub end: u32,
    pub damage: Vec<Damage>,
    pub torn: Option<Torn>,
    /// A newer program wrote in it; nothing here may be rewritten.
    pub foreign: bool,
}

impl SegmentSurvey {
    pub fn is_empty(&self) -> bool {
        self.records == 0 && !self.sealed && self.damage.is_empty() && self.torn.is_none()
    }
}

/// Looks through a whole log from segment `begin` on. `step` hears of every segment that is done, with its size in bytes.
///
/// Errors: what the operating system refuses. Damage is no error here.
pub(super) fn survey(
    segments: &Segments,
    (log, begin): (u16, u32),
    step: &mut dyn FnMut(u64),
) -> Result<Vec<SegmentSurvey>, ReadError> {
    let io_error = |source| ReadError::Io { path: segments.path(log, 1), source };
    let numbers = segments.numbers(log).map_err(io_error)?;
    let mut found: Vec<SegmentSurvey> = Vec::new();
    for &number in numbers.iter().filter(|number| **number >= begin) {
        let expected = found.last().map_or(begin, |last| last.number.saturating_add(1));
        for missing in expected..number {
            let damage = damage(segments.path(log, missing), 0, 0, "this segment is missing");
            found.push(SegmentSurvey { number: missing, damage: vec![damage], ..SegmentSurvey::default() });
        }
        let one = match segments.get(log, number) {
            Ok(segment) => {
                let bytes = segment.file.metadata().map_err(io_error)?.len();
                let one = survey_segment(&segment, &mut |_, _| Ok(())).map_err(io_error)?;
                step(bytes);
                one
            }
            Err(ReadError::Bad { path, offset, what }) => SegmentSurvey {
                number,
                damage: vec![damage(path, offset, 0, &format!("{what}: nothing in this file can be read"))],
                ..SegmentSurvey::default()
            },
            Err(error @ ReadError::Io { .. }) => return Err(error),
        };
        found.push(one);
    }
    settle_ends(segments, log, &mut found);
    Ok(found)
}

/// A log ends in its last segment that is not empty; whatever ends before it without a seal has lost something.
fn settle_ends(segments: &Segments, log: u16, found: &mut [SegmentSurvey]) {
    let Some(last) = found.iter().rposition(|one| !one.is_empty()) else { return };
    for one in found.iter_mut().take(last).filter(|one| !one.sealed) {
        match one.torn.take() {
            Some(torn) => {
                one.damage.push(damage(torn.file, torn.offset, torn.bytes, "unreadable, and the log goes on"))
            }
            None if one.damage.is_empty() => {
                let what = "records or a seal are missing here, but the log goes on";
                one.damage.push(damage(segments.path(log, one.number), one.end, 0, what));
            }
            None => {}
        }
    }
}

/// Looks through one segment and gives each readable record to `each`, in order.
pub(super) fn survey_segment(
    segment: &Arc<Segment>,
    each: &mut dyn FnMut(u32, Framed<'_>) -> io::Result<()>,
) -> io::Result<SegmentSurvey> {
    let start = Position::start_of(segment.header.number).offset;
    let mut found = SegmentSurvey { number: segment.header.number, end: start, ..SegmentSurvey::default() };
    let mut scanner = Scanner::to_end(Arc::clone(segment), start)?;
    loop {
        let (at, what) = match scanner.next()? {
            Found::Record { offset, framed } => {
                match checked(&framed) {
                    Ok((records, messages)) => {
                        found.records += records;
                        found.messages += messages;
                        found.sealed = framed.kind == Kind::Seal;
                        each(offset, framed)?;
                    }
                    Err(what) => found.damage.push(damage(segment.path.clone(), offset, framed.bytes as u64, &what)),
                }
                found.end = scanner.offset();
                if found.sealed {
                    return Ok(found);
                }
                continue;
            }
            Found::Foreign { offset } => {
                found.foreign = true;
                found.damage.push(damage(segment.path.clone(), offset, 0, FOREIGN));
                found.end = scanner.offset();
                continue;
            }
            Found::End { offset } => (offset, "zeros where records were"),
            Found::Bad { offset, what } => (offset, what),
        };
        let behind = tail(segment, at)?;
        // Without a later batch this was never acknowledged, even if parts of it are readable.
        let next = if behind.later_batch.is_some() { next_readable(segment, at)? } else { None };
        let Some(next) = next else {
            if behind.written_bytes > 0 {
                found.torn = Some(Torn { file: segment.path.clone(), offset: at, bytes: behind.written_bytes });
            }
            return Ok(found);
        };
        found.damage.push(damage(segment.path.clone(), at, u64::from(next.saturating_sub(at)), what));
        scanner = Scanner::to_end(Arc::clone(segment), next)?;
    }
}

/// How many records were made this one and how many messages they hold, or why its payload does not decode.
fn checked(framed: &Framed<'_>) -> Result<(u64, u64), String> {
    match framed.kind {
        Kind::Record(record_type) => match disk::decode(record_type, framed.payload) {
            Ok(records) => {
                let messages = records.iter().filter(|record| record.message().is_some()).count();
                Ok((records.len() as u64, messages as u64))
            }
            Err(error) => Err(error.to_string()),
        },
        Kind::Seal | Kind::Run => Ok((0, 0)),
    }
}

/// The first place behind `offset` at which a whole record lies.
fn next_readable(segment: &Segment, offset: u32) -> io::Result<Option<u32>> {
    let end = segment.file.metadata()?.len().min(u64::from(u32::MAX));
    let mut chunk = vec![0; SCAN_BYTES];
    let mut record = Vec::new();
    let mut at = u64::from(offset) + RECORD_ALIGN_BYTES as u64;
    while at < end {
        let filled = segment.file.read_at(&mut chunk, at)? / RECORD_ALIGN_BYTES * RECORD_ALIGN_BYTES;
        if filled == 0 {
            break;
        }
        for (step, word) in chunk.get(..filled).unwrap_or(&[]).chunks(RECORD_ALIGN_BYTES).enumerate() {
            let place = (at + (step * RECORD_ALIGN_BYTES) as u64) as u32;
            if word.iter().any(|&byte| byte != 0) && is_record(segment, place, &mut record)? {
                return Ok(Some(place));
            }
        }
        at += filled as u64;
    }
    Ok(None)
}

fn is_record(segment: &Segment, offset: u32, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut wanted = RECORD_HEADER_BYTES;
    // The first step learns the length, the second reads the record.
    for _ in 0..2 {
        buffer.resize(wanted, 0);
        let filled = segment.file.read_at(buffer, u64::from(offset))?;
        match parse(buffer.get(..filled).unwrap_or(&[]), segment.header.salt, offset) {
            Parsed::Record(_) | Parsed::Foreign => return Ok(true),
            Parsed::Nothing | Parsed::Bad(_) => return Ok(false),
            Parsed::NeedMore(bytes) => wanted = bytes,
        }
    }
    Ok(false)
}

pub(super) fn damage(file: PathBuf, offset: u32, bytes: u64, what: &str) -> Damage {
    Damage { file, offset, bytes, what: what.to_owned() }
}
