//! How much room the disk has, as an index thread watches it, and what it has put off for lack of room.
//!
//! Owned by an index thread; the flag is read by the shard. Asks the file system at most once in [`CHECK_MS`], and only
//! while there is work, so an idle store stays asleep. Invariant: the flag is raised before the index writes into the
//! last `free_bytes_min`, and falls when they are free again and every segment that was put off is ready.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Time between two looks at the file system.
const CHECK_MS: u64 = 1_000;

pub(super) struct Space {
    folder: PathBuf,
    free_bytes_min: u64,
    /// Raised: there is no room.
    full: Arc<AtomicBool>,
    checked: Option<Instant>,
    /// The segment that could not be prepared.
    pub put_off: Option<u32>,
}

impl Space {
    pub fn new(folder: &Path, free_bytes_min: u64, full: Arc<AtomicBool>) -> Self {
        Self { folder: folder.to_owned(), free_bytes_min, full, checked: None, put_off: None }
    }

    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// When to look again although nothing else happens: only while there is no room.
    pub fn due(&self) -> Option<Instant> {
        let next = self.checked.map(|at| at + Duration::from_millis(CHECK_MS));
        next.filter(|_| self.is_full())
    }

    /// Whether it is time to look.
    pub fn is_due(&self, now: Instant) -> bool {
        self.checked.is_none_or(|at| now.saturating_duration_since(at) >= Duration::from_millis(CHECK_MS))
    }

    /// Looks whether there is room.
    pub fn has_room(&mut self) -> bool {
        self.checked = Some(Instant::now());
        has_free(&self.folder, self.free_bytes_min)
    }

    /// Raises or lowers the flag; whether that changed it. Told loudly.
    pub fn set_full(&mut self, full: bool) -> bool {
        if self.full.swap(full, Ordering::Relaxed) == full {
            return false;
        }
        let folder = self.folder.display();
        if full {
            tracing::error!("the disk of {folder} is full: durable messages are refused until there is room again");
        } else {
            tracing::warn!("the disk of {folder} has room again: durable messages are taken");
        }
        true
    }
}

/// Whether so many bytes are free there. A file system that does not tell is taken for one with room: a segment that can't
/// be prepared says the same, later.
pub(super) fn has_free(folder: &Path, bytes: u64) -> bool {
    let Ok(found) = rustix::fs::statvfs(folder) else { return true };
    found.f_bavail.saturating_mul(found.f_frsize) >= bytes
}
