//! What can be done with a data folder that no server uses: look through it, mend it, write out what is in it.
//!
//! Runs on one plain thread of a command; it blocks. Holds the folder's lock, so no server can start meanwhile.
//! Invariants: a check changes no log; a repair that is not allowed to lose anything loses nothing, and one that is
//! keeps the damaged files beside the new ones.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use ringline_schema::ids::{ConversationId, ConversationKind, DeviceId, Seq};
use ringline_schema::message::{BodyKind, MessageState};
use ringline_schema::record::{Record, StoredExtra, StoredMessage, User};
use ringline_schema::rows::{Row, RowKey};

use super::checkpoint::Checkpoints;
use super::format::Position;
use super::index::{Index, IndexError};
use super::rows::{self, Block, ConversationPart, HeadRow};
use super::segments::{ReadError, Reading, Segments};
use super::survey::{Damage, SegmentSurvey, Torn, survey};
use super::sweep::{Sweep, Sweeper};
use super::{
    EmbeddedOptions, EmbeddedShard, EmbeddedStore, FORMAT_FILE, Node, OpenError, OpenReport, enter, index_error,
    recover, salvage,
};
use crate::{Store, StoreError};

pub use super::sweep::Hole;

/// Rows between two words about the progress of a sweep.
const STEP_ROWS: u64 = 4096;
/// How long a repair waits when the store's queue is full.
const FULL_PAUSE_MS: u64 = 1;

/// How far a command is, for a progress bar.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    pub what: &'static str,
    pub done: u64,
    /// 0: not known beforehand.
    pub total: u64,
}

/// Hears of progress.
pub type Watch<'a> = &'a mut dyn FnMut(Progress);

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    pub logs: u64,
    pub segments: u64,
    pub bytes: u64,
    pub records: u64,
    pub messages: u64,
    pub damage: Vec<Damage>,
    /// Ends of interrupted commits: no damage.
    pub torn: Vec<Torn>,
    /// A newer version wrote here: repair refuses.
    pub foreign: bool,
    /// Rows of the newest checkpoint; `None`: there is none that reads, and if there was one, that is among the damage.
    pub checkpoint_rows: Option<u64>,
    /// Conversations of which retention has let something go.
    pub floors: u64,
    pub index: IndexState,
}

/// What a check says of the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IndexState {
    /// The next start makes it from the logs.
    #[default]
    Missing,
    /// `behind`: the next start reads the rest from the logs.
    Whole { rows: u64, messages: u64, behind: bool },
    /// What is wrong with it, and how many more such defects there are. Repair makes it anew.
    Damaged { defects: Vec<String>, more: u64 },
}

impl CheckReport {
    /// Nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.damage.is_empty() && !matches!(self.index, IndexState::Damaged { .. })
    }
}

/// What a repair did.
#[derive(Clone, Debug, Default)]
pub struct RepairReport {
    /// What can't be read. With `skipped` it is lost; without, nothing was changed.
    pub damage: Vec<Damage>,
    pub torn: Vec<Torn>,
    /// Damaged records were left out, as allowed.
    pub skipped: bool,
    /// The damaged files, as they were.
    pub kept: Vec<PathBuf>,
    /// Lost messages between others of their conversation: they are shown as deleted from now on.
    pub holes: Vec<Hole>,
    /// The rebuild of the index; `None` when the repair was refused.
    pub rebuilt: Option<OpenReport>,
}

/// One thing that an export writes.
#[derive(Clone, Debug)]
pub enum Exported {
    User(User),
    /// `members`: of a direct conversation.
    Conversation {
        id: ConversationId,
        members: Option<[ringline_schema::ids::UserName; 2]>,
        created_ms: Option<u64>,
        first: Seq,
        head: Seq,
    },
    Message(StoredMessage),
    Row(Row),
}

/// Reads every segment of every log and every row of the index.
///
/// Errors: the folder is none of ours or in use, or the operating system refuses. What is damaged stands in the report.
pub fn check(dir: &Path, watch: Watch<'_>) -> Result<CheckReport, OpenError> {
    let (_lock, identity) = enter_existing(dir)?;
    let segments = Segments::new(dir.join("log"));
    let begins = begins(dir, identity, &segments)?;
    let (mut report, ends) = check_logs(dir, (&segments, &begins), watch)?;
    match begins.whole {
        Some(Ok(rows)) => report.checkpoint_rows = Some(rows),
        Some(Err(damage)) => report.damage.push(damage),
        None => {}
    }
    let folder = dir.join("index");
    if folder.exists() {
        (report.index, report.floors) = check_index(&folder, (&segments, &ends), identity, (&report, watch));
    }
    Ok(report)
}

/// Rebuilds the index from the logs. With `skip_damaged`, first writes damaged segments anew without what can't be read.
///
/// Errors as [`check`]. Damage without `skip_damaged` is no error but a report without `rebuilt`.
pub fn repair(dir: &Path, skip_damaged: bool, watch: Watch<'_>) -> Result<RepairReport, OpenError> {
    let (lock, identity) = enter_existing(dir)?;
    let segments = Segments::new(dir.join("log"));
    let mut report = RepairReport { skipped: skip_damaged, ..RepairReport::default() };
    if let Some(lost) = salvage::mend_checkpoint(dir, identity, &segments, skip_damaged)? {
        report.kept.extend(lost.kept);
        report.damage.push(lost.damage);
    }
    let begins = begins(dir, identity, &segments)?;
    let mut damaged = Vec::new();
    for (log, found) in surveys(dir, (&segments, &begins), watch)? {
        let last = found.iter().rposition(|one| !one.is_empty()).unwrap_or_default();
        for (at, one) in found.into_iter().enumerate() {
            if one.foreign {
                let SegmentSurvey { damage, .. } = one;
                return Err(damage.first().map_or(OpenError::NoDataFolder { dir: dir.to_owned() }, damaged_error));
            }
            if !one.damage.is_empty() {
                damaged.push((log, one.number, at < last));
            }
            report.torn.extend(one.torn);
            report.damage.extend(one.damage);
        }
    }
    if !report.damage.is_empty() && !skip_damaged {
        return Ok(report);
    }
    for (log, number, sealed) in damaged {
        report.kept.extend(salvage::rewrite(&segments, (log, number), sealed)?);
    }
    let folder = dir.join("index");
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|source| OpenError::Io { path: folder.clone(), source })?;
    }
    // The store takes the lock itself.
    drop(lock);
    watch(Progress { what: "rebuilding the index", done: 0, total: 0 });
    let (handles, opened) = EmbeddedStore::open(dir, 1, EmbeddedOptions::default())?;
    report.rebuilt = Some(opened);
    let Some(mut store) = handles.into_iter().next() else { return Ok(report) };
    if !report.damage.is_empty() {
        report.holes = fill_holes(dir, &mut store, watch)?;
    }
    store.close().map_err(|error| failed(dir, &error))?;
    Ok(report)
}

/// Gives every user, conversation, message and keyed row to `each`, in this order; messages by conversation and seq.
/// Not among them: cursors and duplicate filters, which mean nothing elsewhere.
///
/// Errors as [`check`], damage, and what `each` refuses.
pub fn export(
    dir: &Path,
    each: &mut dyn FnMut(Exported) -> std::io::Result<()>,
    watch: Watch<'_>,
) -> Result<(), OpenError> {
    let (_lock, identity) = enter_existing(dir)?;
    let segments = Segments::new(dir.join("log"));
    let mut report = OpenReport::default();
    watch(Progress { what: "bringing the index up to date", done: 0, total: 0 });
    let index = recover(dir, identity, &segments, &EmbeddedOptions::default(), &mut report)?.index;
    let mut export = Export {
        index: &index,
        segments: &segments,
        reading: Reading::default(),
        first: Seq::ZERO,
        each,
        watch,
        done: 0,
        refused: None,
    };
    let walked = export.run();
    match (walked, export.refused) {
        (_, Some(source)) => Err(OpenError::Io { path: PathBuf::from("the export"), source }),
        (Err(IndexError::Log(error)), None) => Err(error.into()),
        (Err(error), None) => Err(index_error(dir, &error)),
        (Ok(()), None) => Ok(()),
    }
}

/// Errors: it is none. Makes nothing, unlike an opening.
pub fn is_data_folder(dir: &Path) -> Result<(), OpenError> {
    if dir.join(super::backup::UNFINISHED_FILE).exists() {
        return Err(OpenError::UnfinishedBackup { dir: dir.to_owned() });
    }
    if dir.join(FORMAT_FILE).exists() { Ok(()) } else { Err(OpenError::NoDataFolder { dir: dir.to_owned() }) }
}

/// Like [`enter`], but makes nothing.
fn enter_existing(dir: &Path) -> Result<(fs::File, u64), OpenError> {
    is_data_folder(dir)?;
    enter(dir)
}

fn damaged_error(damage: &Damage) -> OpenError {
    OpenError::Damaged { file: damage.file.clone(), offset: damage.offset, what: damage.what.clone() }
}

fn failed(dir: &Path, error: &StoreError) -> OpenError {
    OpenError::Index { dir: dir.to_owned(), reason: error.to_string() }
}

/// Where logs begin, and what is said of the checkpoint that says so.
struct Begins {
    logs: BTreeMap<u16, u32>,
    /// Its rows, or what is damaged in it; `None`: there never was one.
    whole: Option<Result<u64, Damage>>,
}

fn begins(dir: &Path, identity: u64, segments: &Segments) -> Result<Begins, OpenError> {
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let checkpoints = Checkpoints::new(dir);
    let whole = match checkpoints.newest_whole(identity).map_err(io_error)? {
        None => return Ok(Begins { logs: BTreeMap::new(), whole: None }),
        Some(Ok((_, header, footer))) => {
            let logs = header.kept.iter().map(|(log, kept)| (*log, kept.segment)).collect();
            return Ok(Begins { logs, whole: Some(Ok(footer.rows)) });
        }
        Some(Err(ReadError::Io { path, source })) => return Err(OpenError::Io { path, source }),
        Some(Err(ReadError::Bad { path, offset, what })) => Damage { file: path, offset, bytes: 0, what },
    };
    // What it said can't be known: then a log begins with what is there.
    let mut logs = BTreeMap::new();
    for log in segments.logs().map_err(io_error)? {
        logs.extend(segments.numbers(log).map_err(io_error)?.first().map(|first| (log, *first)));
    }
    Ok(Begins { logs, whole: Some(Err(whole)) })
}

type Surveys = Vec<(u16, Vec<SegmentSurvey>)>;

fn surveys(dir: &Path, (segments, begins): (&Segments, &Begins), watch: Watch<'_>) -> Result<Surveys, OpenError> {
    let io_error = |source| OpenError::Io { path: dir.join("log"), source };
    let logs = segments.logs().map_err(io_error)?;
    let mut total = 0;
    for &log in &logs {
        for number in segments.numbers(log).map_err(io_error)? {
            total += fs::metadata(segments.path(log, number)).map_err(io_error)?.len();
        }
    }
    let mut done = 0;
    let mut found = Vec::new();
    for log in logs {
        let mut step = |bytes| {
            done += bytes;
            watch(Progress { what: "reading the logs", done, total });
        };
        let begin = begins.logs.get(&log).copied().unwrap_or(1);
        found.push((log, survey(segments, (log, begin), &mut step)?));
    }
    Ok(found)
}

type Ends = Vec<(u16, Position)>;

fn check_logs(
    dir: &Path,
    (segments, begins): (&Segments, &Begins),
    watch: Watch<'_>,
) -> Result<(CheckReport, Ends), OpenError> {
    let mut report = CheckReport::default();
    let mut ends = Vec::new();
    for (log, found) in surveys(dir, (segments, begins), watch)? {
        report.logs += 1;
        let mut end = Position::start_of(begins.logs.get(&log).copied().unwrap_or(1));
        for one in found {
            report.segments += 1;
            report.bytes += u64::from(one.end);
            report.records += one.records;
            report.messages += one.messages;
            report.foreign |= one.foreign;
            if one.sealed {
                end = Position::start_of(one.number.saturating_add(1));
            } else if !one.is_empty() {
                end = Position { segment: one.number, offset: one.end };
            }
            report.damage.extend(one.damage);
            report.torn.extend(one.torn);
        }
        ends.push((log, end));
    }
    Ok((report, ends))
}

/// The library may panic over bytes that it does not expect; here that is one more way to be damaged.
fn check_index(
    folder: &Path,
    (segments, ends): (&Segments, &[(u16, Position)]),
    identity: u64,
    (report, watch): (&CheckReport, Watch<'_>),
) -> (IndexState, u64) {
    let looked = catch_unwind(AssertUnwindSafe(|| -> Result<(Sweep, bool), IndexError> {
        let index = Index::open(folder, &EmbeddedOptions::default())?;
        if !index.belongs_to(identity)? {
            return Err(IndexError::Foreign);
        }
        let watermarks = index.watermarks()?;
        let knows = |(log, end): &(u16, Position)| {
            *end == Position::start_of(1) || watermarks.iter().any(|(of, mark)| of == log && mark.at >= *end)
        };
        let behind = !ends.iter().all(knows);
        let sweeper = Sweeper::new(segments, ends, true);
        let sweep = sweeper.run(&index, &mut |rows| {
            if rows % STEP_ROWS == 0 {
                watch(Progress { what: "reading the index", done: rows, total: 0 });
            }
        })?;
        Ok((sweep, behind))
    }));
    let damaged = |what: String| IndexState::Damaged { defects: vec![what], more: 0 };
    match looked {
        Err(_) => (damaged("the index library ended over bytes that it does not expect".to_owned()), 0),
        Ok(Err(error)) => (damaged(error.to_string()), 0),
        Ok(Ok((mut sweep, behind))) => {
            // While it is behind, logs may have been taken in out of order, and gaps are no defect.
            if !behind {
                let holes = sweep.holes.iter().map(|hole| {
                    let Hole { conversation, first, last } = hole;
                    format!("conversation {conversation}: messages {first} to {last} have no place")
                });
                sweep.defects.extend(holes);
            }
            // Of what retention has let go, some may still lie in the logs.
            let count_differs = match sweep.floors {
                0 => sweep.messages != report.messages,
                _ => sweep.messages > report.messages,
            };
            if !behind && count_differs && sweep.defects.is_empty() && report.damage.is_empty() {
                let (there, known) = (report.messages, sweep.messages);
                sweep.defects.push(format!("the logs hold {there} messages, the index knows {known}"));
            }
            let state = match sweep.defects.is_empty() {
                true => IndexState::Whole { rows: sweep.rows, messages: sweep.messages, behind },
                false => IndexState::Damaged { defects: sweep.defects, more: sweep.more_defects },
            };
            (state, sweep.floors)
        }
    }
}

/// Puts a deleted message where one was lost between others, so that a conversation can be read across it, and gives a
/// conversation whose first record was lost its members again.
fn fill_holes(dir: &Path, store: &mut EmbeddedShard, watch: Watch<'_>) -> Result<Vec<Hole>, OpenError> {
    let node = std::sync::Arc::clone(&store.node);
    let broken = |error: IndexError| index_error(dir, &error);
    let sweeper = Sweeper::new(&node.segments, &[], false);
    let holes = sweeper.run(&node.index, &mut |_| ()).map_err(broken)?.holes;
    let total = holes.len() as u64;
    for (done, hole) in holes.iter().enumerate() {
        watch(Progress { what: "marking lost messages", done: done as u64, total });
        // The first message of a conversation is never in a hole, so there is one before it.
        let before = Seq(hole.first.0.saturating_sub(1));
        let Some(known) = message_at(&node, hole.conversation, before).map_err(broken)? else { continue };
        for seq in hole.first.0..=hole.last.0 {
            put(dir, store, &Record::Message(deleted(&known, Seq(seq)).into()))?;
        }
    }
    for known in without_members(&node).map_err(broken)? {
        let members = if known.from <= known.to { [known.from, known.to] } else { [known.to, known.from] };
        let (conversation, created_ms) = (known.conversation, known.time_ms);
        put(dir, store, &Record::Conversation { conversation, members, created_ms })?;
    }
    Ok(holes)
}

/// The first message that is left of each direct conversation that has lost its first record.
fn without_members(node: &Node) -> Result<Vec<StoredMessage>, IndexError> {
    let mut ids = Vec::new();
    node.index.walk(rows::CONVERSATION_PREFIX, &mut |key, value| {
        if let (id, ConversationPart::Head) = rows::conversation_of_key(key)? {
            let head = HeadRow::decode(value)?;
            if head.created.is_none() && id.kind() == Some(ConversationKind::Direct) {
                ids.push((id, head.first()));
            }
        }
        Ok(true)
    })?;
    let mut found = Vec::new();
    for (id, first) in ids {
        found.extend(message_at(node, id, first)?);
    }
    Ok(found)
}

fn message_at(node: &Node, id: ConversationId, seq: Seq) -> Result<Option<StoredMessage>, IndexError> {
    let (number, slot) = rows::block_of(seq);
    let block = node.index.block(id, number)?;
    let Some(place) = block.0.get(slot).copied().flatten() else { return Ok(None) };
    Ok(Reading::default().message(&node.segments, place, (id, seq))?)
}

fn deleted(known: &StoredMessage, seq: Seq) -> StoredMessage {
    StoredMessage {
        seq,
        // No device has this number, so it stands in nobody's duplicate filter.
        device: DeviceId(0),
        client_seq: 0,
        kind: BodyKind::Text,
        body: Bytes::new(),
        extra: Some(Box::new(StoredExtra { state: MessageState::Deleted, ..StoredExtra::default() })),
        ..known.clone()
    }
}

fn put(dir: &Path, store: &mut EmbeddedShard, record: &Record) -> Result<(), OpenError> {
    loop {
        match store.append(record) {
            Ok(_) => return Ok(()),
            Err(StoreError::Full) => {
                store.submit();
                store.poll(&mut Vec::new());
                std::thread::sleep(Duration::from_millis(FULL_PAUSE_MS));
            }
            Err(error @ (StoreError::Poisoned | StoreError::TooLarge)) => return Err(failed(dir, &error)),
        }
    }
}

/// One export under way.
struct Export<'a> {
    index: &'a Index,
    segments: &'a Segments,
    reading: Reading,
    /// Of the conversation whose messages are being read.
    first: Seq,
    each: &'a mut dyn FnMut(Exported) -> std::io::Result<()>,
    watch: Watch<'a>,
    done: u64,
    /// What the receiver said; the walk ends there.
    refused: Option<std::io::Error>,
}

impl Export<'_> {
    fn run(&mut self) -> Result<(), IndexError> {
        let (index, prefix) = (self.index, [rows::KEYED_PREFIX]);
        index.walk(rows::USER_PREFIX, &mut |key, value| {
            let (_, user) = rows::decode_user(&rows::name_of_user_key(key)?, value)?;
            Ok(self.give(Exported::User(user)))
        })?;
        index.walk(rows::CONVERSATION_PREFIX, &mut |key, value| self.conversation_row(key, value))?;
        index.walk(&prefix, &mut |key, value| {
            let own = RowKey::decode(key.get(1..).unwrap_or(&[])).map_err(|_| rows::BadRow("row key"))?;
            let row = rows::decode_keyed(own, value)?;
            Ok(row.value.is_none() || self.give(Exported::Row(row)))
        })
    }

    fn conversation_row(&mut self, key: &[u8], value: &[u8]) -> Result<bool, IndexError> {
        let (id, part) = rows::conversation_of_key(key)?;
        match part {
            ConversationPart::Filter => Ok(true),
            ConversationPart::Head => {
                let row = HeadRow::decode(value)?;
                let (first, head, created) = (row.first(), row.head, row.created);
                self.first = first;
                let created_ms = created.as_ref().map(|created| created.created_ms);
                let members = created.map(|created| created.members);
                Ok(self.give(Exported::Conversation { id, members, created_ms, first, head }))
            }
            ConversationPart::Block(number) => {
                let block = Block::decode(value)?;
                for (slot, place) in block.0.iter().enumerate() {
                    let Some(place) = place else { continue };
                    let seq = Seq(number.saturating_mul(rows::BLOCK_PLACES).saturating_add(slot as u64 + 1));
                    if seq < self.first {
                        continue;
                    }
                    let message = self.reading.message(self.segments, *place, (id, seq))?;
                    let message = message.ok_or(IndexError::Wrong(id, seq))?;
                    if !self.give(Exported::Message(message)) {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
        }
    }

    /// False: the receiver wants no more.
    fn give(&mut self, exported: Exported) -> bool {
        self.done += 1;
        if self.done.is_multiple_of(STEP_ROWS) {
            (self.watch)(Progress { what: "exporting", done: self.done, total: 0 });
        }
        match (self.each)(exported) {
            Ok(()) => true,
            Err(error) => {
                self.refused = Some(error);
                false
            }
        }
    }
}
