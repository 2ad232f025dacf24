//! A copy of a data folder that a server can start from, taken while a server uses it or while none does.
//!
//! Runs on one plain thread of a command, in a process of its own; reads only, takes no lock and asks nobody. It rests on
//! one property of a log: what is readable never changes. So the end of every log is looked up first, and exactly what
//! lies before it is copied: every record that was acknowledged before the backup began is there, and no half-written
//! one. The index is not copied; a start makes it from the checkpoint and the logs. Segments are opened a few at a time,
//! however many there are; when retention has removed one meanwhile, the newer checkpoint that let it go is taken instead,
//! and what was copied and is still wanted stays.
//!
//! Invariant: until the copy is whole and synced, the folder is not one that a server starts from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringline_schema::disk;

use super::checkpoint::Checkpoints;
use super::format::{Kind, Position};
use super::offline::{Progress, Watch};
use super::scan::{Found, Scanner, tail};
use super::segments::{FOREIGN, ReadError, Segment, Segments, sync_folder};
use super::{FORMAT_FILE, OpenError};

/// While it is there, the folder is no data folder.
pub(super) const UNFINISHED_FILE: &str = "backup-unfinished";
/// Bytes copied at a time.
const COPY_BYTES: usize = 1024 * 1024;
/// How often an end that is being written is looked at before it counts as damage.
const LOOKS_MAX: u32 = 100;

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupReport {
    pub logs: u64,
    pub segments: u64,
    pub bytes: u64,
    pub records: u64,
}

/// Times that it is begun anew because retention was at work.
const ATTEMPTS_MAX: u32 = 100;
/// Segments that are open at a time.
const OPEN_SEGMENTS_MAX: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// A segment: its log and its number.
type Name = (u16, u32);

/// One segment to copy, up to `end`.
#[derive(Clone, Copy, Debug)]
struct Part {
    name: Name,
    end: u32,
    /// It never becomes more.
    sealed: bool,
}

/// What belongs to the backup.
struct Files {
    segments: Segments,
    checkpoint: Option<(PathBuf, File)>,
    /// By log, in rising order.
    numbers: BTreeMap<u16, Vec<u32>>,
}

/// What is in the target so far.
#[derive(Default)]
struct Copied {
    /// Whatever was begun.
    made: BTreeSet<Name>,
    /// Of them, those that are whole and stay as they are.
    whole: BTreeSet<Name>,
}

/// Copies the data folder `dir` into `to`, which must be empty or not there yet.
///
/// Errors: `to` holds something, `dir` is no data folder, damage in a log, what the operating system refuses. What was
/// copied until then stays in `to`, marked as unfinished: no server starts from it.
pub fn backup(dir: &Path, to: &Path, watch: Watch<'_>) -> Result<BackupReport, OpenError> {
    if !dir.join(FORMAT_FILE).exists() {
        return Err(OpenError::NoDataFolder { dir: dir.to_owned() });
    }
    let io_error = |source| OpenError::Io { path: to.to_owned(), source };
    fs::create_dir_all(to).map_err(io_error)?;
    if fs::read_dir(to).map_err(io_error)?.next().is_some() {
        return Err(io_error(io::Error::new(
            io::ErrorKind::DirectoryNotEmpty,
            "a backup goes into an empty or new folder",
        )));
    }
    File::create(to.join(UNFINISHED_FILE)).and_then(|file| file.sync_all()).map_err(io_error)?;
    sync_folder(to).map_err(io_error)?;
    let identity = super::read_identity(dir)?;
    let checkpoints = Checkpoints::new(dir);
    let numbers = || checkpoints.numbers().map_err(|source| OpenError::Io { path: dir.to_owned(), source });
    let mut copied = Copied::default();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let newest = numbers()?;
        let attempt = list(dir, identity, &checkpoints).and_then(|files| copy(files, to, (&mut copied, &mut *watch)));
        match attempt {
            Ok(report) => {
                finish(dir, to).map_err(io_error)?;
                return Ok(report);
            }
            // Whatever was met while retention was at work is met again if it is more than that.
            Err(_) if attempts < ATTEMPTS_MAX && numbers()? != newest => {}
            Err(error) => return Err(error),
        }
    }
}

/// Opens the newest checkpoint, and looks up every segment that a start from it needs.
fn list(dir: &Path, identity: u64, checkpoints: &Checkpoints) -> Result<Files, OpenError> {
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let segments = Segments::few(dir.join("log"), OPEN_SEGMENTS_MAX);
    let (mut checkpoint, mut kept, mut numbers) = (None, BTreeMap::new(), BTreeMap::new());
    if let Some(opened) = checkpoints.newest(identity).map_err(io_error)? {
        let opened = opened?;
        checkpoint = Some((opened.path.clone(), File::open(&opened.path).map_err(io_error)?));
        kept = opened.header.kept.clone();
        // A checkpoint that does not read is found here and not when it is needed.
        opened.read(&mut |_| Ok::<_, ReadError>(()))?;
    }
    for log in segments.logs().map_err(io_error)? {
        let begin = kept.get(&log).copied().unwrap_or_default().segment;
        let mut wanted = segments.listed(log).map_err(io_error)?;
        wanted.retain(|number| *number >= begin);
        if wanted.first().is_some_and(|first| *first != begin) {
            let what = "this segment is missing".to_owned();
            return Err(OpenError::Damaged { file: segments.path(log, begin), offset: 0, what });
        }
        numbers.insert(log, wanted);
    }
    Ok(Files { segments, checkpoint, numbers })
}

/// Copies all of it but what is in the target already, and removes from there what does not belong to it any more.
fn copy(files: Files, to: &Path, (copied, watch): (&mut Copied, Watch<'_>)) -> Result<BackupReport, OpenError> {
    let io_error = |source| OpenError::Io { path: to.to_owned(), source };
    let mut report = BackupReport::default();
    let parts = find_parts(&files, &mut report, watch)?;
    let total = parts.iter().map(|part| u64::from(part.end)).sum();
    let target = Segments::new(to.join("log"));
    for part in &parts {
        if !copied.whole.contains(&part.name) {
            let segment = files.segments.get(part.name.0, part.name.1)?;
            copied.made.insert(part.name);
            copy_part(&segment, part.end, &target).map_err(io_error)?;
            copied.whole.extend(part.sealed.then_some(part.name));
        }
        report.bytes += u64::from(part.end);
        watch(Progress { what: "copying", done: report.bytes, total });
    }
    let wanted: BTreeSet<Name> = parts.iter().map(|part| part.name).collect();
    for name in copied.made.difference(&wanted) {
        fs::remove_file(target.path(name.0, name.1)).map_err(io_error)?;
    }
    copied.made = wanted;
    if let Some((path, file)) = files.checkpoint {
        let folder = to.join("checkpoint");
        fs::create_dir_all(&folder).map_err(io_error)?;
        let bytes = copy_checkpoint(file, &folder.join(path.file_name().unwrap_or_default()));
        report.bytes += bytes.and_then(|bytes| sync_folder(&folder).map(|()| bytes)).map_err(io_error)?;
    }
    Ok(report)
}

/// Which part of which segment belongs to the backup.
fn find_parts(files: &Files, report: &mut BackupReport, watch: Watch<'_>) -> Result<Vec<Part>, OpenError> {
    let mut parts = Vec::new();
    for (&log, numbers) in &files.numbers {
        report.logs += 1;
        for (at, &number) in numbers.iter().enumerate() {
            let has_next = numbers.get(at + 1).is_some();
            let (end, sealed, records) = find_end(&files.segments.get(log, number)?, has_next)?;
            report.segments += 1;
            report.records += records;
            parts.push(Part { name: (log, number), end, sealed });
            watch(Progress { what: "reading the logs", done: report.segments, total: 0 });
            if !sealed {
                break;
            }
        }
    }
    Ok(parts)
}

/// Where the readable records of a segment end, whether with a seal, and how many there are. A seal that leads to a
/// segment outside the backup is left out: the log ends before it.
fn find_end(segment: &Arc<Segment>, has_next: bool) -> Result<(u32, bool, u64), ReadError> {
    let io_error = |source| ReadError::Io { path: segment.path.clone(), source };
    let bad = |offset, what: &str| ReadError::Bad { path: segment.path.clone(), offset, what: what.to_owned() };
    let mut at = Position::start_of(segment.header.number).offset;
    let (mut records, mut looks) = (0, 0);
    loop {
        let mut scanner = Scanner::to_end(Arc::clone(segment), at).map_err(io_error)?;
        let before = at;
        loop {
            match scanner.next().map_err(io_error)? {
                Found::Record { framed, .. } if framed.kind == Kind::Seal => {
                    return Ok(if has_next { (scanner.offset(), true, records) } else { (at, false, records) });
                }
                Found::Record { framed, .. } => {
                    if let Kind::Record(record_type) = framed.kind {
                        records += disk::records(record_type, framed.payload);
                    }
                }
                Found::Foreign { offset } => return Err(bad(offset, FOREIGN)),
                Found::End { .. } | Found::Bad { .. } => break,
            }
            at = scanner.offset();
        }
        // What has become readable since was not durable when the backup began, and it was no damage.
        if looks > 0 && at > before {
            return Ok((at, false, records));
        }
        // Unreadable with a later batch behind it: damage, or bytes that the server has just written meanwhile.
        let Some(later) = tail(segment, at).map_err(io_error)?.later_batch else { return Ok((at, false, records)) };
        looks += 1;
        if looks >= LOOKS_MAX {
            return Err(bad(at, &format!("not a readable record, but a later batch, at byte {later}, is readable")));
        }
    }
}

fn copy_part(segment: &Segment, end: u32, to: &Segments) -> io::Result<()> {
    let target = to.path(segment.header.log, segment.header.number);
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder)?;
    }
    // There already, if retention interrupted the attempt before.
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(target)?;
    let mut chunk = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < end {
        let wanted = (end - at).min(COPY_BYTES as u32) as usize;
        let chunk = chunk.get_mut(..wanted).unwrap_or_default();
        segment.file.read_exact_at(chunk, u64::from(at))?;
        #[cfg(test)]
        fault()?;
        file.write_all_at(chunk, u64::from(at))?;
        at += wanted as u32;
    }
    file.sync_all()
}

#[cfg(test)]
thread_local! {
    /// After so many further writes one fails with EIO.
    pub(super) static WRITES_LEFT: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
fn fault() -> io::Result<()> {
    match WRITES_LEFT.get() {
        Some(0) => Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())),
        left => {
            WRITES_LEFT.set(left.map(|left| left - 1));
            Ok(())
        }
    }
}

/// Copies from the open file; its bytes.
fn copy_checkpoint(mut from: File, to: &Path) -> io::Result<u64> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(to)?;
    let bytes = io::copy(&mut from, &mut file)?;
    file.sync_all()?;
    Ok(bytes)
}

/// What else is needed, the names made durable, and the mark taken away.
fn finish(dir: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        // The issuer's key, with its mode: tokens stay valid. Index, lock and what is being made are not copied.
        if path.extension().is_some_and(|extension| extension == "pem") {
            copy_file(&path, &to.join(name))?;
        }
    }
    copy_file(&dir.join(FORMAT_FILE), &to.join(FORMAT_FILE))?;
    #[cfg(test)]
    fault()?;
    let logs = to.join("log");
    fs::create_dir_all(&logs)?;
    let folders: Vec<PathBuf> =
        fs::read_dir(&logs)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    for folder in folders.iter().chain([&logs]) {
        sync_folder(folder)?;
    }
    sync_folder(to)?;
    fs::remove_file(to.join(UNFINISHED_FILE))?;
    sync_folder(to)
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let bytes = fs::read(from)?;
    let mode = fs::metadata(from)?.permissions().mode();
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(to)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()
}
