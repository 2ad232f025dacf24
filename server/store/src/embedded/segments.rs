//! Segment files of the logs: names, preparation ahead of use, a bounded cache of open ones, reading records from them.
//!
//! Any thread; a file is written only by the shard that owns its log, through the ring, and read by everybody.
//! Invariant: a file named `*.log` has a whole, synced header and its name is durable before a record in it is
//! acknowledged. A crash while preparing leaves at most a `*.new`, which the next start removes.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use ringline_schema::disk::{self, RecordType};
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::record::StoredMessage;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::format::{Kind, Parsed, Place, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, parse};

/// Open segment files kept by a node; the one used longest ago is closed.
const OPEN_SEGMENTS_MAX: NonZeroUsize = NonZeroUsize::new(64).unwrap();
const ZERO_BYTES: usize = 1024 * 1024;

/// What is said of a record that a newer program wrote.
pub(super) const FOREIGN: &str = "a record of a type or version that this program does not know: use the newer one";

/// One open segment file.
#[derive(Debug)]
pub(super) struct Segment {
    pub header: SegmentHeader,
    pub path: PathBuf,
    pub file: File,
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Segment {
    #[cfg(test)]
    pub fn for_test(file: File) -> Self {
        Self { header: SegmentHeader { log: 0, number: 1, salt: 1 }, path: PathBuf::new(), file }
    }

    /// Reads and checks the record at `place`; gives its type, the payload is left in `bytes`.
    fn read(&self, place: Place, bytes: &mut Vec<u8>) -> Result<RecordType, ReadError> {
        bytes.clear();
        bytes.resize(place.bytes as usize, 0);
        self.file.read_exact_at(bytes, u64::from(place.offset)).map_err(|error| self.bad(place, &error))?;
        let kind = match parse(bytes, self.header.salt, place.offset) {
            Parsed::Record(framed) => framed.kind,
            Parsed::Bad(what) => return Err(self.bad(place, &what)),
            Parsed::Nothing | Parsed::NeedMore(_) => return Err(self.bad(place, &"no whole record")),
            Parsed::Foreign => return Err(self.bad(place, &FOREIGN)),
        };
        match kind {
            Kind::Record(record_type) => Ok(record_type),
            Kind::Seal | Kind::Run => Err(self.bad(place, &"a mark of the log instead of a record")),
        }
    }

    fn bad(&self, place: Place, what: &dyn Display) -> ReadError {
        ReadError::Bad { path: self.path.clone(), offset: place.offset, what: what.to_string() }
    }
}

/// Reads messages by their places. A record of several messages is read once for those that follow one another.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// What was read last, whole and checked, and where it lies.
    last: Option<(Place, RecordType)>,
    bytes: Vec<u8>,
}

impl Reading {
    /// The message that should lie at a place; `None`: another record does.
    pub fn message(
        &mut self,
        segments: &Segments,
        place: Place,
        wanted: (ConversationId, Seq),
    ) -> Result<Option<StoredMessage>, ReadError> {
        let segment = segments.get(place.log, place.segment)?;
        let record_type = match self.last.filter(|(last, _)| *last == place) {
            Some((_, record_type)) => record_type,
            None => {
                self.last = None;
                let record_type = segment.read(place, &mut self.bytes)?;
                self.last = Some((place, record_type));
                record_type
            }
        };
        let payload = self.bytes.get(RECORD_HEADER_BYTES..).unwrap_or(&[]);
        disk::decode_message(record_type, payload, wanted).map_err(|error| segment.bad(place, &error))
    }
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} at byte {offset}: {what}", path.display())]
    Bad { path: PathBuf, offset: u32, what: String },
}

/// How a segment is made ready.
#[derive(Clone, Copy, Debug)]
pub(super) struct Preparation {
    pub segment_bytes: u64,
    /// Room that is reserved behind them, for a batch that crosses the end: no commit ever needs room that is not there.
    pub slack_bytes: u64,
    /// Write zeros instead of only reserving room.
    pub zero: bool,
}

/// The folder of all logs.
#[derive(Debug)]
pub(super) struct Segments {
    /// `dir/log`
    folder: PathBuf,
    /// Belongs to another process: nothing is removed or opened for writing.
    read_only: bool,
    open: Mutex<LruCache<(u16, u32), Arc<Segment>>>,
}

impl Segments {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, read_only: false, open: Mutex::new(LruCache::new(OPEN_SEGMENTS_MAX)) }
    }

    /// Of a folder that a server may be using.
    pub fn read_only(folder: PathBuf) -> Self {
        Self { read_only: true, ..Self::new(folder) }
    }

    /// The same, with so few open at a time.
    pub fn few(folder: PathBuf, open_max: NonZeroUsize) -> Self {
        Self { open: Mutex::new(LruCache::new(open_max)), ..Self::read_only(folder) }
    }

    /// The logs that exist, in rising order.
    pub fn logs(&self) -> io::Result<Vec<u16>> {
        let mut logs = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            if let Some(log) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
                logs.push(log);
            }
        }
        logs.sort_unstable();
        Ok(logs)
    }

    /// The segments of a log, in rising order. Removes what an interrupted preparation left: not for a log in use.
    pub fn numbers(&self, log: u16) -> io::Result<Vec<u32>> {
        self.list(log, !self.read_only)
    }

    /// The same of a log in use.
    pub fn listed(&self, log: u16) -> io::Result<Vec<u32>> {
        self.list(log, false)
    }

    fn list(&self, log: u16, clean: bool) -> io::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(self.log_folder(log))? {
            let path = entry?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            match (number, path.extension().and_then(|extension| extension.to_str())) {
                (Some(number), Some("log")) => numbers.push(number),
                (Some(_), Some("new")) if clean => fs::remove_file(&path)?,
                _ => {}
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A segment from the cache or from disk.
    pub fn get(&self, log: u16, number: u32) -> Result<Arc<Segment>, ReadError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(segment) = open.get(&(log, number)) {
            return Ok(Arc::clone(segment));
        }
        let path = self.path(log, number);
        let io_error = |source| ReadError::Io { path: path.clone(), source };
        let file = OpenOptions::new().read(true).write(!self.read_only).open(&path).map_err(io_error)?;
        let mut bytes = [0; SEGMENT_HEADER_BYTES as usize];
        let bad = |what: &str| ReadError::Bad { path: path.clone(), offset: 0, what: what.to_owned() };
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(bad("segment without a header")),
            Err(error) => return Err(io_error(error)),
        }
        let header = SegmentHeader::decode(&bytes).map_err(bad)?;
        if (header.log, header.number) != (log, number) {
            return Err(bad("segment of another log or number under this name"));
        }
        let segment = Arc::new(Segment { header, path, file });
        open.put((log, number), Arc::clone(&segment));
        Ok(segment)
    }

    /// Makes an empty segment, durable with its name, and opens it. Blocks; never called on a reactor after the start.
    pub fn prepare(&self, log: u16, number: u32, preparation: Preparation) -> io::Result<Arc<Segment>> {
        let folder = self.log_folder(log);
        if !folder.exists() {
            fs::create_dir_all(&folder)?;
            sync_folder(&self.folder)?;
        }
        let new = self.path(log, number).with_extension("new");
        match self.make(&new, (log, number), preparation) {
            Ok((file, header)) => self.take_in(&new, header, file),
            Err(error) => {
                // What a full disk let it have is given back at once.
                let _ = fs::remove_file(&new);
                Err(error)
            }
        }
    }

    /// Removes a segment that nothing is read from any more, and makes that durable; gives its bytes.
    pub fn remove(&self, log: u16, number: u32) -> io::Result<u64> {
        let path = self.path(log, number);
        let bytes = fs::metadata(&path)?.len();
        fs::remove_file(path)?;
        // After it has no name: nobody can open it again, and its room is given back.
        self.open.lock().unwrap_or_else(PoisonError::into_inner).pop(&(log, number));
        sync_folder(&self.log_folder(log))?;
        Ok(bytes)
    }

    fn make(
        &self,
        new: &Path,
        (log, number): (u16, u32),
        preparation: Preparation,
    ) -> io::Result<(File, SegmentHeader)> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(new)?;
        let header = SegmentHeader { log, number, salt: rand::random() };
        if preparation.zero {
            write_zeros(&file, preparation.segment_bytes)?;
        } else {
            reserve(&file, preparation.segment_bytes)?;
        }
        reserve_behind(&file, preparation)?;
        file.write_all_at(&header.encode(), 0)?;
        file.sync_all()?;
        Ok((file, header))
    }

    fn take_in(&self, new: &Path, header: SegmentHeader, file: File) -> io::Result<Arc<Segment>> {
        let (log, number) = (header.log, header.number);
        let path = self.path(log, number);
        fs::rename(new, &path)?;
        sync_folder(&self.log_folder(log))?;
        let segment = Arc::new(Segment { header, path, file });
        self.open.lock().unwrap_or_else(PoisonError::into_inner).put((log, number), Arc::clone(&segment));
        Ok(segment)
    }

    pub fn path(&self, log: u16, number: u32) -> PathBuf {
        self.log_folder(log).join(format!("{number:010}.log"))
    }

    fn log_folder(&self, log: u16) -> PathBuf {
        self.folder.join(format!("{log:02}"))
    }
}

/// Reserves room, so that a full disk is met here and not at a commit, and so that commits don't change the file's size.
pub(super) fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // Not every file system can; the log then grows with its writes.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reserves the slack behind a segment without making the file longer.
fn reserve_behind(file: &File, preparation: Preparation) -> io::Result<()> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, preparation.segment_bytes, preparation.slack_bytes) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reserves again what a segment that is being written may need, after a cut or under other options.
pub(super) fn reserve_again(file: &File, preparation: Preparation) -> io::Result<()> {
    // Never shorter, and zeros are not written a second time: the log's end is in what is there already.
    if file.metadata()?.len() < preparation.segment_bytes {
        reserve(file, preparation.segment_bytes)?;
    }
    reserve_behind(file, preparation)
}

/// Whether room is what was missing.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn write_zeros(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; ZERO_BYTES];
    let mut at = 0;
    while at < bytes {
        let step = (bytes - at).min(ZERO_BYTES as u64);
        file.write_all_at(zeros.get(..step as usize).unwrap_or(&zeros), at)?;
        at += step;
    }
    Ok(())
}

/// Makes names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
