//! The embedded store, the default: **the log is the truth, the index is derived.**
//!
//! - [`format`], [`segments`], [`scan`]: the log on disk: its bytes, its files, reading it. [`log`], [`ring`]: writing it,
//!   by the shard's own thread, one synced write a batch. [`shard`]: the handle.
//! - [`rows`], [`index`], [`overlay`], [`places`], [`generations`]: what is derived: rows in a key-value library, and the newest ones in
//!   memory. [`indexer`]: the plain thread of each shard that derives them, behind the acknowledgement; [`flusher`]: the one
//!   that writes them; [`query`]: what is answered.
//! - [`retain`]: what may go, and how; [`checkpoint`]: what is written before; [`keeper`]: the thread that does it.
//! - [`recovery`]: what a start does with what it finds. [`offline`]: what a person does while nobody runs: check, repair,
//!   export; [`survey`], [`salvage`], [`sweep`]: its parts. [`backup`]: a copy, also of a folder in use. [`space`]: a full disk.
//!
//! ```text
//! DIR/ringline-data     what this folder is: format version and identity
//! DIR/lock              held while a process uses the folder; names it
//! DIR/log/NN/*.log      segments of log NN; the truth
//! DIR/checkpoint/       every row that is no message, written before segments go
//! DIR/index/            may be removed while nobody runs: it is rebuilt from checkpoint and logs
//! DIR/index-damaged     there: the next start rebuilds it
//! ```
//!
//! Logs belong to the node, one for each shard that it ever had: whatever the number of shards now, all are read.

pub mod backup;
mod checkpoint;
mod flusher;
mod format;
mod generations;
mod index;
mod indexer;
mod keeper;
mod log;
pub mod offline;
mod orphans;
mod overlay;
mod places;
mod query;
mod recovery;
mod retain;
mod ring;
mod rows;
mod salvage;
mod scan;
mod segments;
mod shard;
mod shown;
mod space;
mod survey;
mod sweep;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FlockOperation, flock};

use self::flusher::Flusher;
use self::format::Position;
use self::generations::Generations;
use self::index::{Index, IndexError};
use self::indexer::Indexer;
use self::keeper::{Alarm, Keeper};
use self::log::{BATCH_BYTES_MIN, Log, LogEnd};
use self::recovery::{Recovered, RecoveryError, recover_with};
use self::retain::Retainer;
pub use self::retain::Retention;
use self::rows::Watermark;
use self::scan::SCAN_BYTES;
use self::segments::{Preparation, ReadError, Segments, reserve_again, sync_folder};
pub use self::shard::EmbeddedShard;
use self::shard::Failure;
use self::space::Space;
pub use self::survey::{Damage, Torn};
use crate::StoreStats;

/// Jobs that an index thread may have waiting beside the open questions.
const JOBS_SPARE: usize = 64;
/// Replies beside answers: a prepared segment, failures.
const REPLIES_SPARE: usize = 8;
/// Largest segment: two of them and a batch stay within 32-bit offsets.
const SEGMENT_BYTES_CEILING: u64 = 1 << 30;
/// Smallest segment, for tests.
const SEGMENT_BYTES_MIN: u64 = 4096;

/// Its presence says that the index was found damaged: the next start makes it anew.
const INDEX_DAMAGED_FILE: &str = "index-damaged";
const FORMAT_FILE: &str = "ringline-data";
const FORMAT_LINE: &str = "ringline data folder, format 1, identity ";

/// How an embedded store uses disk and memory. All bounds are per shard but those of the index library.
#[derive(Clone, Debug)]
pub struct EmbeddedOptions {
    /// A log goes on in a new file after this many bytes; 4 KiB to 1 GiB. Room for one is reserved at once, for the next
    /// when it is half full.
    pub segment_bytes: u64,
    /// Write zeros into a segment ahead of its use instead of only reserving room. On ext4 a commit is then one write
    /// instead of three (about a third less time each), but everything is written twice and starting takes longer.
    pub zero_segments: bool,
    /// Bytes that may wait for a commit; more is `Full`. At least room for one largest record (2 MiB).
    pub batch_bytes_max: usize,
    /// Committed bytes of the log that the index thread may be behind; more is `Full`.
    pub index_lag_bytes_max: u64,
    /// Open questions; more is `Full`.
    pub loads_max: usize,
    /// Records and time after which recent rows are moved into the index. Rarely is cheaper: the rows of a conversation
    /// that is busy all the time are written once a flush. What a crash replays is at most this much.
    pub flush_records_max: usize,
    /// Memory of recent rows, about, at which they are moved too: what bounds it where each message is of another
    /// conversation, 78,643 of them by default. While they are moved, as much again is taken in.
    pub flush_bytes_max: usize,
    pub flush_interval_ms: u64,
    /// With less room on the disk than this, [`crate::Store::is_disk_full`] says so and rows stay in memory: what is left
    /// is for the index and for whoever makes room.
    pub free_bytes_min: u64,
    /// What is kept at least, for the node.
    pub retention: Retention,
    /// Time between two looks at what may go, and at how large the logs are.
    pub retention_interval_ms: u64,
    /// Block cache of the index, for the node.
    pub index_cache_bytes: u64,
    /// Rows that the index holds in memory before it writes a table, for the node.
    pub index_memtable_bytes: u64,
    /// Set by whoever wants an opening to end: what was read so far is kept, and the next one goes on behind it.
    pub stop: Arc<AtomicBool>,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        const MIB: u64 = 1024 * 1024;
        Self {
            segment_bytes: 256 * MIB,
            zero_segments: false,
            batch_bytes_max: 4 * MIB as usize,
            index_lag_bytes_max: 64 * MIB,
            loads_max: 4096,
            flush_records_max: 1_048_576,
            flush_bytes_max: 48 * MIB as usize,
            flush_interval_ms: 5_000,
            free_bytes_min: 64 * MIB,
            retention: Retention::default(),
            retention_interval_ms: 60_000,
            index_cache_bytes: 32 * MIB,
            index_memtable_bytes: 16 * MIB,
            stop: Arc::default(),
        }
    }
}

impl EmbeddedOptions {
    fn preparation(&self) -> Preparation {
        let slack_bytes = self.batch_bytes_max.max(BATCH_BYTES_MIN) as u64;
        Preparation { segment_bytes: self.segment_bytes, slack_bytes, zero: self.zero_segments }
    }
}

/// What memory a store may take, by part, in bytes. Upper bounds of what is held, not of what an allocator makes of it;
/// answers under way come on top, bounded by what the questions asked for.
pub fn memory_budget(options: &EmbeddedOptions, shards: u16) -> Vec<(&'static str, u64)> {
    /// The library seals a full memtable and goes on in the next while it writes the first.
    const MEMTABLES: u64 = 4;
    const QUESTION_BYTES: u64 = 256;
    let shards = u64::from(shards);
    let scan_bytes = (SCAN_BYTES + BATCH_BYTES_MIN) as u64;
    vec![
        ("store log buffers", shards * 2 * options.batch_bytes_max.max(BATCH_BYTES_MIN) as u64),
        ("store index readers", shards * scan_bytes),
        ("store recent rows", shards * 2 * options.flush_bytes_max as u64),
        ("store questions", shards * options.loads_max as u64 * QUESTION_BYTES),
        ("store retention", retain::MEMORY_BYTES),
        ("store index cache", options.index_cache_bytes),
        ("store index memtables", options.index_memtable_bytes * MEMTABLES),
    ]
}

/// What a start found and did.
#[derive(Clone, Debug, Default)]
pub struct OpenReport {
    /// Every shard had been closed (or the folder is new).
    pub clean_stop: bool,
    /// Why the index was made anew from the logs, if it was.
    pub index_rebuilt: Option<String>,
    /// Records read from the logs into the index.
    pub replayed_records: u64,
    /// Torn tails: the remains of commits that a crash interrupted and nobody was told of.
    pub cuts: Vec<Cut>,
    pub took_ms: u64,
}

/// A torn tail that was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub file: PathBuf,
    /// The file ends here now.
    pub offset: u32,
    pub bytes: u64,
}

/// Why a store did not open. Nothing was changed but torn tails already cut.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is in use by {}: stop it, or choose another data folder", dir.display(), pid.map_or("another process".to_owned(), |pid| format!("process {pid}")))]
    InUse { dir: PathBuf, pid: Option<u32> },
    #[error("{} is not writable: give the server's user the right to write there ({source})", dir.display())]
    NotWritable { dir: PathBuf, source: io::Error },
    #[error("{}: a backup that did not come to its end, and no data folder; make it anew", dir.display())]
    UnfinishedBackup { dir: PathBuf },
    #[error("{} holds other files and is no ringline data folder: choose an empty or new folder", dir.display())]
    NotADataFolder { dir: PathBuf },
    #[error("{} is no ringline data folder: give the one that the server uses (--data-dir)", dir.display())]
    NoDataFolder { dir: PathBuf },
    #[error("{} has another format ({found}): open it with the version that wrote it", dir.display())]
    OtherFormat { dir: PathBuf, found: String },
    #[error(
        "{} is damaged at byte {offset}: {what}; `ringline store check` tells all that is damaged, `ringline store repair` what can be done",
        file.display()
    )]
    Damaged { file: PathBuf, offset: u32, what: String },
    #[error("the index in {} can't be made: {reason}", dir.display())]
    Index { dir: PathBuf, reason: String },
    #[error("no checkpoint can be written in {}: {reason}", dir.display())]
    Checkpoint { dir: PathBuf, reason: String },
    #[error("this system can't run the store: {what} ({source})")]
    System { what: &'static str, source: io::Error },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("told to stop before the store was open; the next start goes on from here")]
    Stopped,
}

impl From<ReadError> for OpenError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io { path, source } => Self::Io { path, source },
            ReadError::Bad { path, offset, what } => Self::Damaged { file: path, offset, what },
        }
    }
}

/// What all shards of a node share. Fields go in this order: the lock last.
pub(crate) struct Node {
    index: Index,
    /// One a shard, by number.
    overlays: Vec<Generations>,
    segments: Segments,
    folder: PathBuf,
    /// Of the data folder.
    identity: u64,
    _lock: File,
}

impl Node {
    /// Says why the index can't answer or be written, and has the next start make it anew if it is to blame.
    fn note_damage(&self, error: &IndexError) {
        match error {
            // The log's own damage is told with file and offset; a new index would not mend it.
            IndexError::Log(_) => tracing::error!(%error, "the store cannot read a record"),
            IndexError::Library(_)
            | IndexError::Row(_)
            | IndexError::Foreign
            | IndexError::FlushEnded
            | IndexError::Missing(..)
            | IndexError::Wrong(..) => {
                tracing::error!(%error, "the index is damaged: the next start makes it anew from the logs");
                if let Err(error) = File::create(self.folder.join(INDEX_DAMAGED_FILE)) {
                    tracing::error!(%error, "that can't be noted: stop, remove the index folder and start");
                }
            }
        }
    }
}

/// The embedded store.
pub struct EmbeddedStore;

impl EmbeddedStore {
    /// Opens or makes the data folder `dir` and gives one handle a shard, at least one. Blocks, for as long as replay takes.
    ///
    /// Each handle is moved to its shard's thread. Errors say what to do in one line.
    pub fn open(
        dir: &Path,
        shards: u16,
        options: EmbeddedOptions,
    ) -> Result<(Vec<EmbeddedShard>, OpenReport), OpenError> {
        let started = Instant::now();
        let mut options = options;
        options.segment_bytes = options.segment_bytes.clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_CEILING);
        let shards = shards.max(1);
        let (lock, identity) = enter(dir)?;
        let segments = Segments::new(dir.join("log"));
        let mut report = OpenReport::default();
        let Recovered { index, mut ends, kept, checkpoint, mend } =
            recover(dir, identity, &segments, &options, &mut report)?;

        for log in 0..shards {
            if ends.iter().all(|(found, _)| *found != log) {
                let segment = segments
                    .prepare(log, 1, options.preparation())
                    .map_err(|source| OpenError::Io { path: segments.path(log, 1), source })?;
                ends.push((log, LogEnd { segment, offset: Position::start_of(1).offset, next: None, run: 0 }));
            }
        }
        for (_, end) in ends.iter().filter(|(log, _)| *log < shards) {
            for segment in std::iter::once(&end.segment).chain(&end.next) {
                reserve_again(&segment.file, options.preparation())
                    .map_err(|source| OpenError::Io { path: segment.path.clone(), source })?;
            }
        }
        let run = ends.iter().map(|(_, end)| end.run).max().unwrap_or(0).saturating_add(1);
        let watermarks: Vec<_> = ends.iter().map(|(log, end)| (*log, end.watermark(*log >= shards))).collect();
        index.set_watermarks(&watermarks).map_err(|error| index_error(dir, &error))?;
        let overlays = (0..shards).map(|_| Generations::new(run)).collect();
        let node = Arc::new(Node { index, overlays, segments, folder: dir.to_owned(), identity, _lock: lock });
        let mut retainer = Retainer::new(Arc::clone(&node), options.retention, (kept, checkpoint));
        if mend {
            tracing::warn!("the checkpoint of this folder does not read: it is written anew");
            retainer
                .mend()
                .map_err(|error| OpenError::Checkpoint { dir: dir.to_owned(), reason: error.to_string() })?;
        }
        let keeper = Arc::new(Keeper::new(dir, &options));
        let (mut handles, mut alarms) = (Vec::new(), Vec::new());
        ends.sort_by_key(|(log, _)| *log);
        for (log, end) in ends.into_iter().take_while(|(log, _)| *log < shards) {
            let (handle, alarm) = start_shard((&node, &keeper), log, (end, run), &options)?;
            handles.push(handle);
            alarms.push(alarm);
        }
        keeper
            .start(retainer, alarms)
            .map_err(|source| OpenError::System { what: "no thread for retention", source })?;
        report.took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok((handles, report))
    }
}

impl LogEnd {
    fn watermark(&self, closed: bool) -> Watermark {
        Watermark { at: Position { segment: self.segment.header.number, offset: self.offset }, run: self.run, closed }
    }
}

/// Index and logs, agreeing. An index that can't be used is made anew.
fn recover(
    dir: &Path,
    identity: u64,
    segments: &Segments,
    options: &EmbeddedOptions,
    report: &mut OpenReport,
) -> Result<Recovered, OpenError> {
    let (folder, mark) = (dir.join("index"), dir.join(INDEX_DAMAGED_FILE));
    if folder.exists() {
        if mark.exists() {
            report.index_rebuilt = Some("damage was found in it while it was in use".to_owned());
        } else {
            // The library may panic over bytes that it does not expect: then the index is as good as gone.
            let recovered = catch_unwind(AssertUnwindSafe(|| {
                recover_with(dir, (identity, false), segments, (options, &mut *report))
            }));
            report.index_rebuilt = match recovered {
                Ok(Ok(recovered)) => return Ok(recovered),
                Ok(Err(RecoveryError::Open(error))) => return Err(error),
                Ok(Err(RecoveryError::Index(error))) => Some(error.to_string()),
                Err(_) => Some("the index library ended over bytes that it does not expect".to_owned()),
            };
        }
        fs::remove_dir_all(&folder).map_err(|source| OpenError::Io { path: folder.clone(), source })?;
    } else if !segments.logs().map_err(|source| OpenError::Io { path: dir.join("log"), source })?.is_empty() {
        report.index_rebuilt = Some("there was none".to_owned());
    }
    if let Some(reason) = &report.index_rebuilt {
        tracing::warn!(reason, "the index is being rebuilt from the logs");
    }
    let clean_stop = report.index_rebuilt.is_none();
    match recover_with(dir, (identity, true), segments, (options, report)) {
        Ok(recovered) => {
            report.clean_stop = clean_stop;
            match fs::remove_file(&mark) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => Err(OpenError::Io { path: mark, source }),
                Ok(()) | Err(_) => Ok(recovered),
            }
        }
        Err(RecoveryError::Open(error)) => Err(error),
        Err(RecoveryError::Index(error)) => Err(index_error(dir, &error)),
    }
}

fn start_shard(
    (node, keeper): (&Arc<Node>, &Arc<Keeper>),
    log: u16,
    (end, run): (LogEnd, u64),
    options: &EmbeddedOptions,
) -> Result<(EmbeddedShard, Alarm), OpenError> {
    let system = |what| move |source: io::Error| OpenError::System { what, source };
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let wake = Arc::new(wake.map_err(|error| system("no eventfd")(error.into()))?);
    let (job_sender, jobs) = crossbeam_channel::bounded(options.loads_max + JOBS_SPARE);
    let (reply_sender, replies) = crossbeam_channel::bounded(options.loads_max + REPLIES_SPARE);
    let alarm = Alarm { replies: reply_sender.clone(), wake: Arc::clone(&wake) };
    let applied_bytes = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let full = Arc::new(AtomicBool::new(false));
    let indexer = Indexer {
        node: Arc::clone(node),
        log,
        options: options.clone(),
        jobs,
        replies: reply_sender,
        wake: Arc::clone(&wake),
        applied_bytes: Arc::clone(&applied_bytes),
        stop: Arc::clone(&stop),
        space: Space::new(&node.folder, options.free_bytes_min, Arc::clone(&full)),
        at: end.watermark(false).at,
        scan: Vec::new(),
        flush_due: None,
        flusher: Flusher::start(node, log)?,
        failed: false,
    };
    let name = format!("index-{log}");
    let tells_of_keeper = log == 0;
    let log = Log::new(end, run, options, &wake).map_err(system("io_uring is needed and not available"))?;
    let thread = std::thread::Builder::new().name(name).spawn(move || indexer.run());
    let shard = EmbeddedShard {
        log,
        jobs: Some(job_sender),
        replies,
        thread: Some(thread.map_err(system("no thread for the index"))?),
        wake,
        applied_bytes,
        stop,
        full,
        options: options.clone(),
        stats: StoreStats::new(),
        untold: None,
        asked: None,
        loads_open: 0,
        events: Vec::new(),
        failure: Failure::None,
        keeper: Arc::clone(keeper),
        tells_of_keeper,
        node: Arc::clone(node),
    };
    Ok((shard, alarm))
}

/// Makes sure that `dir` is a data folder, and ours alone. Gives the lock and the folder's identity.
fn enter(dir: &Path) -> Result<(File, u64), OpenError> {
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let writable = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotWritable { dir: dir.to_owned(), source }
        }
        _ => OpenError::Io { path: dir.to_owned(), source },
    };
    if dir.join(backup::UNFINISHED_FILE).exists() {
        return Err(OpenError::UnfinishedBackup { dir: dir.to_owned() });
    }
    fs::create_dir_all(dir).map_err(writable)?;
    let format_file = dir.join(FORMAT_FILE);
    if !format_file.exists() {
        for entry in fs::read_dir(dir).map_err(io_error)? {
            let name = entry.map_err(io_error)?.file_name();
            // What an interrupted first start may have left.
            if name != "lock" && name != "log" && name.to_str() != Some(&format!("{FORMAT_FILE}.new")) {
                return Err(OpenError::NotADataFolder { dir: dir.to_owned() });
            }
        }
    }
    let lock = lock(dir, writable)?;
    if !format_file.exists() {
        make_format_file(dir).map_err(writable)?;
    }
    Ok((lock, read_identity(dir)?))
}

fn read_identity(dir: &Path) -> Result<u64, OpenError> {
    let text = fs::read_to_string(dir.join(FORMAT_FILE));
    let text = text.map_err(|source| OpenError::Io { path: dir.to_owned(), source })?;
    let identity = text.trim_end().strip_prefix(FORMAT_LINE).and_then(|text| u64::from_str_radix(text, 16).ok());
    let found = || text.trim_end().chars().take(80).collect();
    identity.ok_or_else(|| OpenError::OtherFormat { dir: dir.to_owned(), found: found() })
}

fn lock(dir: &Path, writable: impl Fn(io::Error) -> OpenError) -> Result<File, OpenError> {
    let path = dir.join("lock");
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let mut lock = opened.map_err(&writable)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut text = String::new();
        let pid = lock.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
        return Err(OpenError::InUse { dir: dir.to_owned(), pid });
    }
    let write = |lock: &mut File| -> io::Result<()> {
        lock.set_len(0)?;
        lock.rewind()?;
        writeln!(lock, "{}", std::process::id())
    };
    write(&mut lock).map_err(writable)?;
    Ok(lock)
}

/// Durable before anything else is in the folder: without it the folder is not taken for ours.
fn make_format_file(dir: &Path) -> io::Result<()> {
    let new = dir.join(format!("{FORMAT_FILE}.new"));
    fs::create_dir_all(dir.join("log"))?;
    let mut file = File::create(&new)?;
    writeln!(file, "{FORMAT_LINE}{:016x}", rand::random::<u64>())?;
    file.sync_all()?;
    fs::rename(&new, dir.join(FORMAT_FILE))?;
    sync_folder(dir)
}

fn index_error(dir: &Path, error: &IndexError) -> OpenError {
    OpenError::Index { dir: dir.join("index"), reason: error.to_string() }
}

#[cfg(test)]
mod backup_tests;
#[cfg(test)]
mod flush_tests;
#[cfg(test)]
mod offline_tests;
#[cfg(test)]
mod retain_tests;
#[cfg(test)]
mod space_tests;
#[cfg(test)]
mod tests;
