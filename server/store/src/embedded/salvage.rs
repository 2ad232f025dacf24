//! Writing a damaged segment anew without what can't be read, and a damaged checkpoint from the index. The damaged file
//! stays beside it under another name.
//!
//! Offline repair only, when a person has asked for it. Invariant: at every moment there is a whole file under the
//! segment's name: the old one, or the new one with everything that was readable.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rkyv::util::AlignedVec;

use super::checkpoint::{Checkpoints, Header};
use super::format::{Kind, SEGMENT_HEADER_BYTES, SegmentHeader, Stamp, begin, finish};
use super::index::{Index, IndexError};
use super::rows::Kept;
use super::segments::{ReadError, Segments, sync_folder};
use super::survey::{Damage, survey_segment};
use super::sweep::Sweeper;
use super::{EmbeddedOptions, OpenError};

/// Bytes of records that are gathered before they are written.
const WRITE_BYTES: usize = 1024 * 1024;
/// Damaged files of one name that are kept; then repair refuses, and somebody has to look.
const KEPT_MAX: usize = 1000;

/// Rewrites segment `number` of `log` with every record that reads; `sealed`: the log goes on in the next segment.
/// Returns where the damaged file is kept, if there was one. A segment that is missing or whose header is lost becomes
/// an empty one.
pub(super) fn rewrite(
    segments: &Segments,
    (log, number): (u16, u32),
    sealed: bool,
) -> Result<Option<PathBuf>, ReadError> {
    let path = segments.path(log, number);
    let io_error = |source| ReadError::Io { path: path.clone(), source };
    let new = path.with_extension("new");
    let header = SegmentHeader { log, number, salt: rand::random() };
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(&new).map_err(io_error)?;
    file.write_all_at(&header.encode(), 0).map_err(io_error)?;
    let mut out = AlignedVec::new();
    let mut written = SEGMENT_HEADER_BYTES;
    let mut put = |kind, (first_of_batch, partition): (bool, u16), payload: &[u8], last: bool| -> io::Result<()> {
        let start = begin(&mut out);
        out.extend_from_slice(payload);
        let offset = written.saturating_add(start as u32);
        finish(&mut out, start, Stamp { kind, first_of_batch, partition, salt: header.salt, offset });
        if last || out.len() >= WRITE_BYTES {
            file.write_all_at(&out, u64::from(written))?;
            written = written.saturating_add(out.len() as u32);
            out.clear();
        }
        Ok(())
    };
    match segments.get(log, number) {
        Ok(segment) => {
            let mut each = |_: u32, framed: super::format::Framed<'_>| match framed.kind {
                Kind::Seal => Ok(()),
                Kind::Record(_) | Kind::Run => {
                    put(framed.kind, (framed.first_of_batch, framed.partition), framed.payload, false)
                }
            };
            survey_segment(&segment, &mut each).map_err(io_error)?;
        }
        Err(ReadError::Bad { .. }) => {}
        Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if sealed {
        put(Kind::Seal, (true, 0), &[], true).map_err(io_error)?;
    } else if !out.is_empty() {
        file.write_all_at(&out, u64::from(written)).map_err(io_error)?;
    }
    file.sync_all().map_err(io_error)?;
    let kept = keep(&path).map_err(io_error)?;
    fs::rename(&new, &path).map_err(io_error)?;
    path.parent().map_or(Ok(()), sync_folder).map_err(io_error)?;
    Ok(kept)
}

/// Gives the damaged file a second name; `None` when there is no file.
fn keep(path: &Path) -> io::Result<Option<PathBuf>> {
    for number in 1..KEPT_MAX {
        let kept = path.with_extension(format!("damaged-{number}"));
        match fs::hard_link(path, &kept) {
            Ok(()) => return Ok(Some(kept)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("too many damaged files of this name are kept: remove them"))
}

/// A checkpoint that could not be mended without a loss.
pub(super) struct LostCheckpoint {
    pub damage: Damage,
    /// Where the damaged file is kept, if its loss was allowed.
    pub kept: Option<PathBuf>,
}

/// Makes a checkpoint that does not read anew: from the index when that is whole, without any row when that is not and
/// the loss is allowed. `None`: nothing is lost.
pub(super) fn mend_checkpoint(
    dir: &Path,
    identity: u64,
    segments: &Segments,
    loss_allowed: bool,
) -> Result<Option<LostCheckpoint>, OpenError> {
    let io_error = |source| OpenError::Io { path: dir.to_owned(), source };
    let checkpoints = Checkpoints::new(dir);
    let damage = match checkpoints.newest_whole(identity).map_err(io_error)? {
        None | Some(Ok(_)) => return Ok(None),
        Some(Err(ReadError::Io { path, source })) => return Err(OpenError::Io { path, source }),
        Some(Err(ReadError::Bad { path, offset, what })) => Damage { file: path, offset, bytes: 0, what },
    };
    let numbers = checkpoints.numbers().map_err(io_error)?;
    let number = numbers.last().copied().unwrap_or(0).saturating_add(1);
    let mut kept = BTreeMap::new();
    for log in segments.logs().map_err(io_error)? {
        let first = segments.numbers(log).map_err(io_error)?.first().copied().unwrap_or(1);
        kept.insert(log, Kept { segment: first, run: 0 });
    }
    if kept.values().all(|kept| kept.segment == 1) {
        checkpoints.remove_older(number).map_err(io_error)?;
        return Ok(None);
    }
    let write = |index: &Index, kept| {
        let header = Header { identity, number, kept };
        let written = checkpoints.write(index, &header, &mut |_| Ok(()));
        written.map_err(|error| OpenError::Checkpoint { dir: dir.to_owned(), reason: error.to_string() })
    };
    let folder = dir.join("index");
    let whole = folder.exists().then(|| catch_unwind(AssertUnwindSafe(|| whole_index(&folder, identity, segments))));
    if let Some(Ok(Ok(index))) = whole {
        let known = index.kept().map_err(|error| super::index_error(dir, &error))?;
        write(&index, known)?;
        checkpoints.remove_older(number).map_err(io_error)?;
        return Ok(None);
    }
    if !loss_allowed {
        return Ok(Some(LostCheckpoint { damage, kept: None }));
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(io_error)?;
    }
    let empty = Index::open(&folder, &EmbeddedOptions::default()).map_err(|error| super::index_error(dir, &error))?;
    let damaged = keep(&damage.file).map_err(io_error)?;
    write(&empty, kept)?;
    checkpoints.remove_older(number).map_err(io_error)?;
    Ok(Some(LostCheckpoint { damage, kept: damaged }))
}

/// The index, if every row of it reads and no message is missing.
fn whole_index(folder: &Path, identity: u64, segments: &Segments) -> Result<Index, IndexError> {
    let index = Index::open(folder, &EmbeddedOptions::default())?;
    if !index.belongs_to(identity)? {
        return Err(IndexError::Foreign);
    }
    let sweeper = Sweeper::new(segments, &[], false);
    let found = sweeper.run(&index, &mut |_| ())?;
    // Without the ends of the logs each watermark counts as one.
    let watermarks = index.watermarks()?.len();
    if found.defects.len() > watermarks || !found.holes.is_empty() {
        return Err(IndexError::Foreign);
    }
    Ok(index)
}
