//! Retention: which messages may go, and the sequence in which they do.
//!
//! One pass, on the retention thread (see [`super::keeper`]) or a test's. A segment of a log goes when every message in
//! it is below the floor of its conversation and every other row of it is in a checkpoint. The sequence is
//! *floors durable → checkpoint durable → segments removed*; a crash between any two steps leaves either the old state
//! or one from which the next start or the next pass goes on. Invariants: a floor never falls; only sealed segments that
//! the index has wholly taken in go, the oldest of a log first; what a limit asks to keep is kept.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use foldhash::{HashMap, HashMapExt};
use ringline_schema::disk::{Indexed, IndexedMessage};
use ringline_schema::ids::{ConversationId, Seq};

use super::Node;
use super::checkpoint::{Checkpoints, Header};
use super::format::{Framed, Kind, Position};
use super::index::IndexError;
use super::indexer::next_framed;
use super::orphans::Orphans;
use super::rows::{self, ConversationPart, HeadRow, Kept, Watermark};
use super::scan::Scanner;
use super::segments::ReadError;

/// Conversations whose floors are gathered before they are written, or looked up and remembered.
const CONVERSATIONS_MAX: usize = 65_536;
/// What a pass holds at most: floors of conversations, and the buffers of a scan and of a checkpoint.
pub(super) const MEMORY_BYTES: u64 = CONVERSATIONS_MAX as u64 * 64 + 4 * 1024 * 1024;
/// Rows of conversations that one pass reads to count messages; the next goes on behind them.
pub(super) const COUNT_ROWS_MAX: u64 = 262_144;
/// Records read between two looks at whether the thread should end.
const STEP_RECORDS: u64 = 4096;

/// What is kept at least. 0: no limit. More may be kept, because messages go by whole segments of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// A message goes when it is older than this.
    pub age_ms: u64,
    /// The oldest messages go while at least this many bytes of logs are left.
    pub size_bytes: u64,
    /// Of each conversation, the newest so many stay. Older ones are not shown any more; their bytes go with the segment.
    pub messages: u64,
}

impl Retention {
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

/// A step of a pass that is about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Some records of a log were read.
    Scan,
    /// Floors are written.
    Floors,
    /// The file of a checkpoint is made.
    Begin,
    /// Rows are written to it.
    Rows,
    Sync,
    /// It gets its name.
    Name,
    /// The index is told where logs begin now.
    Note,
    /// Older checkpoints are removed.
    Older,
    /// A segment is removed.
    Unlink,
}

/// Hears of every step before it is made; an error ends the pass there.
pub(super) type EachStep<'a> = &'a mut dyn FnMut(Step) -> Result<(), RetainError>;

/// Why a pass ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum RetainError {
    #[error("the store is being closed")]
    Stopped,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl From<ReadError> for RetainError {
    fn from(error: ReadError) -> Self {
        Self::Index(error.into())
    }
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// Conversations that lost messages.
    pub floors: u64,
    /// 0: there was nothing to remove.
    pub checkpoint_bytes: u64,
    pub checkpoint_ms: u64,
    pub segments: u64,
    pub bytes: u64,
}

/// How far the oldest sealed segment of a log is known.
#[derive(Clone, Copy, Debug, Default)]
struct Front {
    segment: u32,
    /// Every message before this is below its floor.
    offset: u32,
    /// The run that was writing there.
    run: u64,
    /// The message that lies there and is kept.
    blocker: Option<(ConversationId, Seq)>,
    /// The time of its newest message, once somebody has looked; 0: it has none.
    newest_ms: Option<u64>,
}

/// A sealed segment.
#[derive(Clone, Copy, Debug)]
struct Sealed {
    number: u32,
    bytes: u64,
}

/// Carries out retention for a node.
pub(super) struct Retainer {
    node: Arc<Node>,
    policy: Retention,
    checkpoints: Checkpoints,
    /// The number of the newest checkpoint.
    number: u64,
    kept: BTreeMap<u16, Kept>,
    fronts: BTreeMap<u16, Front>,
    /// When the first message of a segment was sent.
    begins_ms: BTreeMap<(u16, u32), u64>,
    /// Where the walk through the conversations is, to count their messages.
    counted: Option<Vec<u8>>,
    /// Rows that it reads in one pass, and has read in all.
    pub count_rows_max: u64,
    pub count_rows: u64,
    /// Rows about messages that went.
    pub orphans: Orphans,
}

impl Retainer {
    /// `kept` and `number` as recovery found them.
    pub fn new(node: Arc<Node>, policy: Retention, (kept, number): (BTreeMap<u16, Kept>, u64)) -> Self {
        let checkpoints = Checkpoints::new(&node.folder);
        let (fronts, begins_ms) = (BTreeMap::new(), BTreeMap::new());
        Self {
            node,
            policy,
            checkpoints,
            number,
            kept,
            fronts,
            begins_ms,
            counted: None,
            count_rows_max: COUNT_ROWS_MAX,
            count_rows: 0,
            orphans: Orphans::default(),
        }
    }

    /// Lets go of what may go. Blocks. After an error the next pass goes on where this one ended.
    pub fn pass(&mut self, now_ms: u64, step: EachStep<'_>) -> Result<Passed, RetainError> {
        let mut passed = Passed::default();
        self.remove_older(step)?;
        self.unlink(&mut passed, step)?;
        if self.policy.is_off() {
            return Ok(passed);
        }
        if self.policy.messages > 0 {
            passed.floors += self.floors_by_count(step)?;
        }
        let watermarks: BTreeMap<u16, Watermark> = self.node.index.watermarks()?.into_iter().collect();
        let mut sealed = self.sealed(&watermarks)?;
        let active: u64 = watermarks.values().map(|watermark| u64::from(watermark.at.offset)).sum();
        let mut kept = self.kept.clone();
        while let Some(log) = self.next_to_go(&sealed, (active, now_ms), step)? {
            let Some(front) = sealed.get_mut(&log).filter(|sealed| !sealed.is_empty()).map(|sealed| sealed.remove(0))
            else {
                break;
            };
            let run = kept.get(&log).copied().unwrap_or_default().run;
            let run = self.raise_past((log, front.number), run, (&mut passed.floors, &mut *step))?;
            kept.insert(log, Kept { segment: front.number.saturating_add(1), run });
        }
        for (log, sealed) in &sealed {
            for front in sealed {
                let run = kept.get(log).copied().unwrap_or_default().run;
                let Some(run) = self.is_below_floors((*log, front.number), run, step)? else { break };
                kept.insert(*log, Kept { segment: front.number.saturating_add(1), run });
            }
        }
        self.orphans.drop_some(&self.node, passed.floors > 0, step)?;
        if kept != self.kept {
            self.release(kept, &mut passed, step)?;
        }
        Ok(passed)
    }

    /// A checkpoint of what there is, without letting go of anything: the one that was there does not read.
    pub fn mend(&mut self) -> Result<(), RetainError> {
        self.checkpoint(self.kept.clone(), &mut |_| Ok(()))?;
        self.checkpoints.remove_older(self.number).map_err(|source| self.io_error(source))
    }

    pub fn note_damage(&self, error: &IndexError) {
        self.node.note_damage(error);
    }

    /// Segments and bytes of all logs.
    pub fn size(&self) -> Result<(u64, u64), RetainError> {
        let (mut segments, mut bytes) = (0, 0);
        for log in self.node.segments.logs().map_err(|source| self.io_error(source))? {
            for number in self.node.segments.listed(log).map_err(|source| self.io_error(source))? {
                segments += 1;
                bytes += std::fs::metadata(self.node.segments.path(log, number)).map_or(0, |file| file.len());
            }
        }
        Ok((segments, bytes))
    }

    /// The newest messages of each conversation stay, as many as the policy says. Looks at some of them, and at the next
    /// ones in the next pass.
    fn floors_by_count(&mut self, step: EachStep<'_>) -> Result<u64, RetainError> {
        let (index, keep) = (&self.node.index, self.policy.messages);
        let (mut floors, mut raised, mut rows, mut ended) = (Vec::new(), 0, 0_u64, None);
        let after = self.counted.take().unwrap_or_default();
        let (rows_max, counted) = (self.count_rows_max, &mut self.counted);
        index.walk_after((rows::CONVERSATION_PREFIX, &after), &mut |key, value| {
            rows += 1;
            if rows >= rows_max {
                *counted = Some(key.to_vec());
            }
            if rows.is_multiple_of(STEP_RECORDS) {
                ended = step(Step::Scan).err();
            }
            if let (id, ConversationPart::Head) = rows::conversation_of_key(key)? {
                let head = HeadRow::decode(value)?;
                let floor = Seq(head.head.0.saturating_sub(keep).saturating_add(1));
                if head.head != Seq::ZERO && floor > head.first() {
                    floors.push((id, floor));
                }
            }
            if floors.len() >= CONVERSATIONS_MAX && ended.is_none() {
                ended = step(Step::Floors).err();
                raised += if ended.is_none() { index.raise_floors(&mut floors.drain(..))? } else { 0 };
            }
            Ok(ended.is_none() && rows < rows_max)
        })?;
        self.count_rows += rows;
        if let Some(error) = ended {
            return Err(error);
        }
        if !floors.is_empty() {
            step(Step::Floors)?;
            raised += index.raise_floors(&mut floors.into_iter())?;
        }
        Ok(raised)
    }

    /// The segments that could go: whole, and wholly taken in by the index.
    fn sealed(&self, watermarks: &BTreeMap<u16, Watermark>) -> Result<BTreeMap<u16, Vec<Sealed>>, RetainError> {
        let mut found = BTreeMap::new();
        for (&log, watermark) in watermarks {
            let numbers = self.node.segments.listed(log).map_err(|source| self.io_error(source))?;
            let mut sealed = Vec::new();
            for number in numbers.into_iter().filter(|number| *number < watermark.at.segment) {
                let file = std::fs::metadata(self.node.segments.path(log, number));
                sealed.push(Sealed { number, bytes: file.map_err(|source| self.io_error(source))?.len() });
            }
            found.insert(log, sealed);
        }
        Ok(found)
    }

    /// The log whose oldest segment goes next by age or by size; it is the one that ended first.
    fn next_to_go(
        &mut self,
        sealed: &BTreeMap<u16, Vec<Sealed>>,
        (active, now_ms): (u64, u64),
        step: EachStep<'_>,
    ) -> Result<Option<u16>, RetainError> {
        let Retention { age_ms, size_bytes, .. } = self.policy;
        if age_ms == 0 && size_bytes == 0 {
            return Ok(None);
        }
        let total: u64 = active + sealed.values().flatten().map(|segment| segment.bytes).sum::<u64>();
        let mut oldest: Option<(u64, u16, u64)> = None;
        for (&log, segments) in sealed {
            let Some(front) = segments.first() else { continue };
            let ended_ms = match self.begins(log, front.number.saturating_add(1), step)? {
                Some(next_begins_ms) => next_begins_ms,
                None => self.newest((log, front.number), step)?,
            };
            if oldest.is_none_or(|(found_ms, ..)| ended_ms < found_ms) {
                oldest = Some((ended_ms, log, front.bytes));
            }
        }
        let Some((ended_ms, log, bytes)) = oldest else { return Ok(None) };
        if size_bytes > 0 && total.saturating_sub(bytes) >= size_bytes {
            return Ok(Some(log));
        }
        let too_old = |time_ms| age_ms > 0 && now_ms.saturating_sub(time_ms) > age_ms;
        // Clocks may have been set back while the segment was written: only a look at all of it is certain.
        let Some(front) = sealed.get(&log).and_then(|segments| segments.first()).filter(|_| too_old(ended_ms)) else {
            return Ok(None);
        };
        Ok(too_old(self.newest((log, front.number), step)?).then_some(log))
    }

    /// When the first message of a segment was sent; `None`: there is none, or no such segment.
    fn begins(&mut self, log: u16, number: u32, step: EachStep<'_>) -> Result<Option<u64>, RetainError> {
        if let Some(&known) = self.begins_ms.get(&(log, number)) {
            return Ok(Some(known));
        }
        let watermarks = self.node.index.watermarks()?;
        let is_sealed = watermarks.iter().any(|(of, watermark)| *of == log && number < watermark.at.segment);
        let mut first = None;
        if is_sealed {
            let from = (Position::start_of(number).offset, 0);
            self.scan(
                (log, number),
                from,
                &mut |_, message| {
                    first = Some(message.accepted.time_ms);
                    Ok(false)
                },
                step,
            )?;
            self.begins_ms.extend(first.map(|first| ((log, number), first)));
        }
        Ok(first)
    }

    /// The time of the newest message of a sealed segment; 0: it has none.
    fn newest(&mut self, (log, number): (u16, u32), step: EachStep<'_>) -> Result<u64, RetainError> {
        if let Some(known) = self.fronts.get(&log).filter(|front| front.segment == number)
            && let Some(newest_ms) = known.newest_ms
        {
            return Ok(newest_ms);
        }
        let mut newest_ms = 0;
        let from = (Position::start_of(number).offset, 0);
        self.scan(
            (log, number),
            from,
            &mut |_, message| {
                newest_ms = newest_ms.max(message.accepted.time_ms);
                Ok(true)
            },
            step,
        )?;
        self.front(log, number).newest_ms = Some(newest_ms);
        Ok(newest_ms)
    }

    fn front(&mut self, log: u16, number: u32) -> &mut Front {
        let front = self.fronts.entry(log).or_default();
        if front.segment != number {
            *front = Front { segment: number, offset: Position::start_of(number).offset, ..Front::default() };
        }
        front
    }

    /// Raises the floors of all conversations that have messages in a segment past them. Returns the run that was
    /// writing when it ended; `run` was when it began.
    fn raise_past(
        &self,
        segment: (u16, u32),
        run: u64,
        (raised, step): (&mut u64, EachStep<'_>),
    ) -> Result<u64, RetainError> {
        let index = &self.node.index;
        let mut floors: HashMap<ConversationId, Seq> = HashMap::new();
        let from = (Position::start_of(segment.1).offset, run);
        let mut count = 0;
        let (_, run) = self.scan(
            segment,
            from,
            &mut |_, message| {
                let floor = floors.entry(message.conversation).or_default();
                *floor = message.accepted.seq.next().max(*floor);
                if floors.len() >= CONVERSATIONS_MAX {
                    count += index.raise_floors(&mut floors.drain())?;
                }
                Ok(true)
            },
            step,
        )?;
        step(Step::Floors)?;
        *raised += count + index.raise_floors(&mut floors.into_iter())?;
        Ok(run)
    }

    /// Whether every message of a segment is below the floor of its conversation: then the run that was writing when it
    /// ended. Goes on where the last look ended.
    fn is_below_floors(
        &mut self,
        (log, number): (u16, u32),
        run: u64,
        step: EachStep<'_>,
    ) -> Result<Option<u64>, RetainError> {
        let node = Arc::clone(&self.node);
        let front = self.front(log, number);
        let begun = front.offset > Position::start_of(number).offset;
        let from = (front.offset, if begun { front.run } else { run });
        let mut firsts: HashMap<ConversationId, Seq> = HashMap::new();
        let mut blocker = None;
        let each: EachMessage<'_> = &mut |_, message| {
            if firsts.len() >= CONVERSATIONS_MAX {
                firsts.clear();
            }
            let (id, seq) = (message.conversation, message.accepted.seq);
            let first = match firsts.get(&id) {
                Some(&first) => first,
                None => {
                    let first = node.index.head(id)?.unwrap_or_default().first();
                    firsts.insert(id, first);
                    first
                }
            };
            blocker = (seq >= first).then_some((id, seq));
            Ok(blocker.is_none())
        };
        let (offset, run) = self.scan((log, number), from, each, step)?;
        let front = self.front(log, number);
        (front.offset, front.run, front.blocker) = (offset, run, blocker);
        Ok(blocker.is_none().then_some(run))
    }

    /// Reads the messages of a sealed segment from a place and a run, until `each` wants no more. Returns the place of
    /// the record it ended at and the run there.
    fn scan(
        &self,
        (log, number): (u16, u32),
        (offset, mut run): (u32, u64),
        each: EachMessage<'_>,
        step: EachStep<'_>,
    ) -> Result<(u32, u64), RetainError> {
        step(Step::Scan)?;
        let segment = self.node.segments.get(log, number)?;
        let io_error = |source| ReadError::Io { path: segment.path.clone(), source };
        let mut scanner = Scanner::to_end(Arc::clone(&segment), offset).map_err(io_error)?;
        for records in 1.. {
            let at = scanner.offset();
            let (kind, indexed, _) = next_framed(&mut scanner, &segment, &mut |framed: &Framed<'_>| {
                run = framed.run().unwrap_or(run);
            })?;
            match kind {
                Kind::Seal => return Ok((at, run)),
                Kind::Run => {}
                Kind::Record(_) => {
                    let more = match indexed {
                        Some(Indexed::Message(message)) => each(at, &message)?,
                        Some(Indexed::Change { message: Some(message), .. }) => each(at, &message)?,
                        // All but the last message may be looked at again.
                        Some(Indexed::Burst(burst)) => {
                            let mut looks = burst.indexed().map(|message| each(at, &message));
                            looks.find(|more| !matches!(more, Ok(true))).unwrap_or(Ok(true))?
                        }
                        Some(Indexed::Change { message: None, .. } | Indexed::Other(_)) | None => true,
                    };
                    if !more {
                        return Ok((at, run));
                    }
                }
            }
            if u64::is_multiple_of(records, STEP_RECORDS) {
                step(Step::Scan)?;
            }
        }
        Ok((offset, run))
    }

    /// The checkpoint, and then the segments.
    fn release(
        &mut self,
        kept: BTreeMap<u16, Kept>,
        passed: &mut Passed,
        step: EachStep<'_>,
    ) -> Result<(), RetainError> {
        let started = Instant::now();
        passed.checkpoint_bytes = self.checkpoint(kept, step)?;
        passed.checkpoint_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        step(Step::Note)?;
        self.node.index.set_kept(&self.kept)?;
        step(Step::Older)?;
        self.checkpoints.remove_older(self.number).map_err(|source| self.io_error(source))?;
        self.unlink(passed, step)
    }

    fn checkpoint(&mut self, kept: BTreeMap<u16, Kept>, step: EachStep<'_>) -> Result<u64, RetainError> {
        let header = Header { identity: self.node.identity, number: self.number.saturating_add(1), kept };
        let bytes = self.checkpoints.write(&self.node.index, &header, step)?;
        self.number = header.number;
        self.kept = header.kept;
        Ok(bytes)
    }

    /// Removes what a crash has left beside the newest checkpoint, once that was read to its end.
    fn remove_older(&self, step: EachStep<'_>) -> Result<(), RetainError> {
        if self.checkpoints.numbers().map_err(|source| self.io_error(source))?.len() < 2 {
            return Ok(());
        }
        step(Step::Older)?;
        let whole = self.checkpoints.newest_whole(self.node.identity).map_err(|source| self.io_error(source))?;
        let Some(Ok((_, header, _))) = whole else { return Ok(()) };
        self.checkpoints.remove_older(header.number).map_err(|source| self.io_error(source))
    }

    /// Removes the segments that a durable checkpoint has let go.
    fn unlink(&mut self, passed: &mut Passed, step: EachStep<'_>) -> Result<(), RetainError> {
        for (&log, kept) in &self.kept {
            let numbers = self.node.segments.listed(log).map_err(|source| self.io_error(source))?;
            for number in numbers.into_iter().filter(|number| *number < kept.segment) {
                step(Step::Unlink)?;
                let bytes = self.node.segments.remove(log, number).map_err(|source| self.io_error(source))?;
                tracing::info!(log, segment = number, bytes, "retention let go of a segment");
                passed.segments += 1;
                passed.bytes += bytes;
            }
        }
        self.begins_ms.retain(|(log, number), _| self.kept.get(log).is_none_or(|kept| *number >= kept.segment));
        Ok(())
    }

    fn io_error(&self, source: io::Error) -> RetainError {
        RetainError::Io { path: self.node.folder.clone(), source }
    }
}

/// Takes the place and the message of a record; false: it wants no more.
type EachMessage<'a> = &'a mut dyn FnMut(u32, &IndexedMessage<'_>) -> Result<bool, RetainError>;
