//! A copy of a data folder that a server can start from, taken while a server uses it or while none does.
//!
//! Runs on one plain thread of a command, in a process of its own; reads only, takes no lock and asks nobody. It rests on
//! one property of a log: what is readable never changes. So the end of every log is looked up first, and exactly what
//! lies before it is copied: every record that was acknowledged before the backup began is there, and no half-written
//! one. The index is not copied; a start makes it from the checkpoint and the logs. Retention may remove files meanwhile:
//! everything is opened before anything is read, and what is open stays readable.
//!
//! Invariant: until the copy is whole and synced, the folder is not one that a server starts from.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checkpoint::Checkpoints;
use super::format::{Kind, Position};
use super::offline::{Progress, Watch};
use super::scan::{Found, Scanner, tail};
use super::segments::{FOREIGN, ReadError, Segment, Segments, sync_folder};
use super::{FORMAT_FILE, OpenError};

/// While it is there, the folder is no data folder.
const UNFINISHED_FILE: &str = "backup-unfinished";
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

/// Times that everything is opened anew because retention was at work.
const OPENS_MAX: u32 = 100;

/// One segment to copy, up to `end`.
struct Part {
    segment: Arc<Segment>,
    end: u32,
}

/// Every file that belongs to the backup, open.
#[derive(Default)]
struct Files {
    checkpoint: Option<(PathBuf, File)>,
    /// By log, in rising order.
    segments: BTreeMap<u16, Vec<Arc<Segment>>>,
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
    let mut report = BackupReport::default();
    let files = open_all(dir)?;
    let parts = find_parts(&files, &mut report, watch)?;
    let total = parts.iter().map(|part| u64::from(part.end)).sum();
    for part in &parts {
        copy_part(&part.segment, part.end, to).map_err(io_error)?;
        report.bytes += u64::from(part.end);
        watch(Progress { what: "copying", done: report.bytes, total });
    }
    if let Some((path, file)) = files.checkpoint {
        let folder = to.join("checkpoint");
        fs::create_dir_all(&folder).map_err(io_error)?;
        let bytes = copy_checkpoint(file, &folder.join(path.file_name().unwrap_or_default()));
        report.bytes += bytes.and_then(|bytes| sync_folder(&folder).map(|()| bytes)).map_err(io_error)?;
    }
    finish(dir, to).map_err(io_error)?;
    Ok(report)
}

/// Opens the newest checkpoint and every segment that a start from it needs.
fn open_all(dir: &Path) -> Result<Files, OpenError> {
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let identity = super::read_identity(dir)?;
    let checkpoints = Checkpoints::new(dir);
    let mut opens = 0;
    loop {
        opens += 1;
        let newest = checkpoints.numbers().map_err(io_error)?;
        let opened = open_once(dir, identity, &checkpoints);
        // Whatever was met while retention was at work is met again if it is more than that.
        if opens >= OPENS_MAX || checkpoints.numbers().map_err(io_error)? == newest {
            return opened;
        }
    }
}

fn open_once(dir: &Path, identity: u64, checkpoints: &Checkpoints) -> Result<Files, OpenError> {
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let segments = Segments::read_only(dir.join("log"));
    let mut files = Files::default();
    let mut kept = BTreeMap::new();
    if let Some(opened) = checkpoints.newest(identity).map_err(io_error)? {
        let opened = opened?;
        files.checkpoint = Some((opened.path.clone(), File::open(&opened.path).map_err(io_error)?));
        kept = opened.header.kept.clone();
        // A checkpoint that does not read is found here and not when it is needed.
        opened.read(&mut |_| Ok::<_, ReadError>(()))?;
    }
    for log in segments.logs().map_err(io_error)? {
        let begin = kept.get(&log).copied().unwrap_or_default().segment;
        let numbers = segments.listed(log).map_err(io_error)?;
        let numbers = numbers.into_iter().filter(|number| *number >= begin);
        let opened = numbers.map(|number| segments.get(log, number)).collect::<Result<Vec<_>, _>>()?;
        if opened.first().is_some_and(|first| first.header.number != begin) {
            let what = "this segment is missing".to_owned();
            return Err(OpenError::Damaged { file: segments.path(log, begin), offset: 0, what });
        }
        files.segments.insert(log, opened);
    }
    Ok(files)
}

/// Which part of which segment belongs to the backup.
fn find_parts(files: &Files, report: &mut BackupReport, watch: Watch<'_>) -> Result<Vec<Part>, OpenError> {
    let mut parts = Vec::new();
    for segments in files.segments.values() {
        report.logs += 1;
        for (at, segment) in segments.iter().enumerate() {
            let has_next = segments.get(at + 1).is_some();
            let (end, sealed, records) = find_end(segment, has_next)?;
            report.segments += 1;
            report.records += records;
            parts.push(Part { segment: Arc::clone(segment), end });
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
                Found::Record { framed, .. } => records += u64::from(matches!(framed.kind, Kind::Record(_))),
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

fn copy_part(segment: &Segment, end: u32, to: &Path) -> io::Result<()> {
    let target = Segments::new(to.join("log")).path(segment.header.log, segment.header.number);
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = OpenOptions::new().write(true).create_new(true).open(target)?;
    let mut chunk = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < end {
        let wanted = (end - at).min(COPY_BYTES as u32) as usize;
        let chunk = chunk.get_mut(..wanted).unwrap_or_default();
        segment.file.read_exact_at(chunk, u64::from(at))?;
        file.write_all_at(chunk, u64::from(at))?;
        at += wanted as u32;
    }
    file.sync_all()
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
