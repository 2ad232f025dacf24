//! The retention thread of a node: a pass of [`super::retain`] once in a while, and the figures of it.
//!
//! One plain thread a node, started after the shards and ended by the last handle that goes. A full disk puts a pass off;
//! any other error of reading or writing stops the shards of the node: a disk that fails here fails there next.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{io, thread};

use crossbeam_channel::{RecvTimeoutError, Sender, TrySendError, bounded};

use super::EmbeddedOptions;
use super::index::IndexError;
use super::indexer::Reply;
use super::retain::{Passed, RetainError, Retainer, Step};
use super::segments::{ReadError, is_full};
use super::space::has_free;
use crate::RetentionStats;

/// Added to the nice value: nothing here is urgent.
const NICENESS: i32 = 10;
/// How long an alarm waits when a shard has not taken its answers.
const ALARM_PAUSE_MS: u64 = 10;

/// The line to a shard, for the worst.
pub(super) struct Alarm {
    pub replies: Sender<Reply>,
    pub wake: Arc<OwnedFd>,
}

/// The thread, seen from the handles.
pub(super) struct Keeper {
    interval: Duration,
    shared: Arc<Shared>,
    running: Mutex<Option<(Sender<()>, JoinHandle<()>)>>,
}

#[derive(Default)]
struct Shared {
    folder: PathBuf,
    /// With less room than this on the disk nothing is written: the index must not meet a full disk, and of what the shards
    /// leave free, retention takes at most half.
    free_bytes_min: u64,
    stopping: AtomicBool,
    segments: AtomicU64,
    log_bytes: AtomicU64,
    floors: AtomicU64,
    segments_released: AtomicU64,
    bytes_released: AtomicU64,
    checkpoints: AtomicU64,
    checkpoint_bytes: AtomicU64,
    checkpoint_ms: AtomicU64,
    /// The next such step fails with this error number.
    #[cfg(test)]
    fault: Mutex<Option<(Step, i32)>>,
}

impl Shared {
    /// Before every step: whether to go on.
    fn go_on(&self, step: Step) -> Result<(), RetainError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(RetainError::Stopped);
        }
        let writes = match step {
            Step::Floors | Step::Begin | Step::Rows | Step::Note => true,
            // They write nothing, or make room.
            Step::Scan | Step::Sync | Step::Name | Step::Older | Step::Unlink => false,
        };
        if writes && !has_free(&self.folder, self.free_bytes_min) {
            return Err(RetainError::Io { path: self.folder.clone(), source: io::ErrorKind::StorageFull.into() });
        }
        #[cfg(test)]
        if let Some((_, error)) = self.fault.lock().unwrap().take_if(|(at, _)| *at == step) {
            let source = io::Error::from_raw_os_error(error);
            return Err(RetainError::Io { path: PathBuf::from("fault"), source });
        }
        Ok(())
    }
}

impl Keeper {
    #[cfg(test)]
    pub fn set_fault(&self, step: Step, error: i32) {
        *self.shared.fault.lock().unwrap() = Some((step, error));
    }

    /// Not started yet.
    pub fn new(folder: &Path, options: &EmbeddedOptions) -> Self {
        let interval = Duration::from_millis(options.retention_interval_ms.max(1));
        let (folder, free_bytes_min) = (folder.to_owned(), options.free_bytes_min / 2);
        let shared = Arc::new(Shared { folder, free_bytes_min, ..Shared::default() });
        Self { interval, shared, running: Mutex::new(None) }
    }

    /// Starts the thread. Errors: there is no room for one.
    pub fn start(&self, retainer: Retainer, alarms: Vec<Alarm>) -> io::Result<()> {
        let (stop, stopped) = bounded(0);
        let (shared, interval) = (Arc::clone(&self.shared), self.interval);
        let mut work = Work { retainer, alarms, shared };
        let thread = thread::Builder::new().name("retention".to_owned()).spawn(move || {
            // On Linux the nice value is a thread's own.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
            work.measure();
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if !work.pass() {
                    return;
                }
            }
        })?;
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some((stop, thread));
        Ok(())
    }

    pub fn stats(&self) -> RetentionStats {
        let read = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let shared = &self.shared;
        RetentionStats {
            segments: read(&shared.segments),
            log_bytes: read(&shared.log_bytes),
            floors: read(&shared.floors),
            segments_released: read(&shared.segments_released),
            messages_released: 0,
            bytes_released: read(&shared.bytes_released),
            checkpoints: read(&shared.checkpoints),
            checkpoint_bytes: read(&shared.checkpoint_bytes),
            checkpoint_ms: read(&shared.checkpoint_ms),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Some((stop, thread)) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// The thread's own part.
struct Work {
    retainer: Retainer,
    alarms: Vec<Alarm>,
    shared: Arc<Shared>,
}

impl Work {
    /// False: there will be no more.
    fn pass(&mut self) -> bool {
        // A clock before 1970 makes everything young, and nothing goes.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let shared = Arc::clone(&self.shared);
        let passed = self.retainer.pass(now_ms, &mut |step| shared.go_on(step));
        let goes_on = match passed {
            Ok(passed) => {
                self.note(&passed);
                true
            }
            Err(RetainError::Stopped) => return false,
            Err(error) => self.failed(&error),
        };
        self.measure();
        goes_on
    }

    fn note(&self, passed: &Passed) {
        let Passed { floors, checkpoint_bytes, checkpoint_ms, segments, bytes } = *passed;
        let shared = &self.shared;
        shared.floors.fetch_add(floors, Ordering::Relaxed);
        shared.segments_released.fetch_add(segments, Ordering::Relaxed);
        shared.bytes_released.fetch_add(bytes, Ordering::Relaxed);
        if checkpoint_bytes > 0 {
            shared.checkpoints.fetch_add(1, Ordering::Relaxed);
            shared.checkpoint_bytes.store(checkpoint_bytes, Ordering::Relaxed);
            shared.checkpoint_ms.store(checkpoint_ms, Ordering::Relaxed);
        }
        if floors > 0 || segments > 0 {
            tracing::info!(
                conversations = floors,
                segments,
                bytes,
                checkpoint_bytes,
                checkpoint_ms,
                "retention let go of old messages"
            );
        }
    }

    fn measure(&self) {
        match self.retainer.size() {
            Ok((segments, bytes)) => {
                self.shared.segments.store(segments, Ordering::Relaxed);
                self.shared.log_bytes.store(bytes, Ordering::Relaxed);
            }
            Err(error) => tracing::warn!(%error, "the size of the logs can't be told"),
        }
    }

    fn failed(&self, error: &RetainError) -> bool {
        match error {
            RetainError::Io { source, .. } if is_full(source) => {
                tracing::warn!(%error, "the disk has no room for a checkpoint: retention waits for room");
                return true;
            }
            // Damage that was there before: it is told, and what is behind it stays.
            RetainError::Index(IndexError::Log(ReadError::Bad { .. })) => {
                tracing::error!(%error, "retention can't read a segment and keeps it");
                return true;
            }
            RetainError::Stopped | RetainError::Io { .. } | RetainError::Index(_) => {}
        }
        tracing::error!(%error, "the store stops: retention met an error of the disk");
        if let RetainError::Index(error) = error {
            self.retainer.note_damage(error);
        }
        self.alarms.iter().for_each(Alarm::ring);
        false
    }
}

impl Alarm {
    /// Tells the shard that it has to stop; waits until it is told.
    fn ring(&self) {
        while let Err(TrySendError::Full(_)) = self.replies.try_send(Reply::Failed) {
            thread::sleep(Duration::from_millis(ALARM_PAUSE_MS));
        }
        // A full counter is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_into_the_last_of_the_room() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = |free_bytes_min| {
            Keeper::new(folder.path(), &EmbeddedOptions { free_bytes_min, ..EmbeddedOptions::default() })
        };
        let full = keeper(u64::MAX);
        for step in [Step::Floors, Step::Begin, Step::Rows, Step::Note] {
            match full.shared.go_on(step) {
                Err(RetainError::Io { source, .. }) => assert!(is_full(&source), "{step:?}"),
                other => panic!("{step:?}: {other:?}"),
            }
            keeper(0).shared.go_on(step).unwrap();
        }
        for step in [Step::Scan, Step::Sync, Step::Name, Step::Older, Step::Unlink] {
            full.shared.go_on(step).unwrap();
        }
    }
}
