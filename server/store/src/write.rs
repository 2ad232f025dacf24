//! A write that a store wants made and synced, with all it needs: file, bytes, and how much of them is on disk. Whoever
//! has a ring makes it: the store itself, or the reactor on the ring of its sockets.
//!
//! Moves with its buffer, on one thread at a time. Invariant: the bytes lie on the heap and stay where they are for as
//! long as the write exists, wherever it is moved.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rkyv::util::AlignedVec;

/// How often one write may be interrupted or cut short before it counts as failed.
const RETRIES_MAX: u32 = 64;

/// See the module. To be made as one positioned write with `RWF_DSYNC`.
pub struct FileWrite {
    file: Arc<dyn AsFd + Send + Sync>,
    buffer: AlignedVec,
    /// Where in the file the buffer begins.
    offset: u64,
    /// Bytes known to be written.
    written: usize,
    retries: u32,
}

impl FileWrite {
    pub(crate) fn new(file: Arc<dyn AsFd + Send + Sync>, offset: u64, buffer: AlignedVec) -> Self {
        Self { file, buffer, offset, written: 0, retries: 0 }
    }

    /// Open for as long as the write exists.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What is left to write.
    pub fn rest(&self) -> &[u8] {
        self.buffer.get(self.written..).unwrap_or(&[])
    }

    /// Where in the file [`FileWrite::rest`] goes.
    pub fn offset(&self) -> u64 {
        self.offset.saturating_add(self.written as u64)
    }

    /// Takes in what the kernel answered: bytes written, or a negative error number. `None`: there is more to write.
    pub(crate) fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        self.retries += 1;
        if self.retries > RETRIES_MAX {
            return Some(Err(io::Error::other("the write was interrupted or cut short too often")));
        }
        if result < 0 {
            let error = io::Error::from_raw_os_error(result.saturating_neg());
            // Never "sync again and hope": going on writes these bytes again and syncs what it has written.
            let again = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
            return if again { None } else { Some(Err(error)) };
        }
        if result == 0 {
            return Some(Err(io::ErrorKind::WriteZero.into()));
        }
        self.written += result.unsigned_abs() as usize;
        (self.written >= self.buffer.len()).then_some(Ok(()))
    }

    pub(crate) fn into_buffer(self) -> AlignedVec {
        self.buffer
    }
}

impl std::fmt::Debug for FileWrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWrite").field("offset", &self.offset()).field("bytes", &self.rest().len()).finish()
    }
}
