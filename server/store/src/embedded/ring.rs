//! The log's way to the disk: one synced write at a time. Made on a small ring of its own, or lent: then whoever has
//! asked for the writes takes each one, makes it on their ring, and brings back the result.
//!
//! Owned by a shard's thread. Invariant: from `start` until `finished` has returned them, the buffer and the file belong
//! to the kernel; nothing reads, moves or frees them.
//!
//! The write carries `RWF_DSYNC`: the kernel writes and then runs the file's `fdatasync`, and completes once. That is one
//! queue entry, one completion and one wake instead of the two of a linked write and fsync, and no broken link to
//! handle. The entry is marked asynchronous: some file systems would sync inside the submission, on the reactor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use rkyv::util::AlignedVec;

use super::segments::Segment;
use crate::write::FileWrite;

/// One operation is under way at a time.
const RING_ENTRIES: u32 = 4;

/// What a finished write gives back.
pub(super) struct Finished {
    pub buffer: AlignedVec,
    /// `Ok`: every byte is durable. An error is final: what is on disk is unknown, and a sync that failed may succeed
    /// the next time without having written anything.
    pub result: io::Result<()>,
}

/// At most one write under way.
pub(super) struct WriteRing {
    ring: IoUring,
    state: State,
    /// Writes are made by somebody else.
    lent: bool,
    /// The kernel refused the queued entry for the moment (memory, interruption); it stays in the queue.
    refused: bool,
    /// Faults to meet, in order of submission.
    #[cfg(test)]
    pub faults: std::collections::VecDeque<Fault>,
}

/// Where the write is.
enum State {
    None,
    /// The kernel may be using buffer and file.
    WithKernel(FileWrite),
    /// To be taken.
    Offered(FileWrite),
    /// Taken.
    Away,
    Finished(Finished),
}

/// What a test lets happen to the next submission.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// At most this many bytes are written.
    Short(usize),
    /// The write is made and then reported with this error number.
    Error(i32),
}

impl WriteRing {
    /// `wake` becomes readable at every completion on the own ring.
    pub fn new(wake: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::new(RING_ENTRIES)?;
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        Ok(Self {
            ring,
            state: State::None,
            lent: false,
            refused: false,
            #[cfg(test)]
            faults: std::collections::VecDeque::new(),
        })
    }

    /// From here on writes are lent, or made here again. A write that was offered and not taken is made here.
    pub fn set_lent(&mut self, lent: bool) {
        self.lent = lent;
        if !lent && let Some(write) = self.take() {
            self.make(write);
        }
    }

    /// Writes `buffer` at `offset` and syncs it. Must not be called while a write is under way.
    ///
    /// An error of the submission itself is reported by `finished` like any other.
    pub fn start(&mut self, segment: Arc<Segment>, offset: u32, buffer: AlignedVec) {
        assert!(matches!(self.state, State::None), "one write at a time");
        let write = FileWrite::new(segment, u64::from(offset), buffer);
        if self.lent {
            self.state = State::Offered(write);
        } else {
            self.make(write);
        }
    }

    /// The write that somebody else is to make, once.
    pub fn take(&mut self) -> Option<FileWrite> {
        if !matches!(self.state, State::Offered(_)) {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Away) {
            State::Offered(write) => Some(write),
            State::None | State::WithKernel(_) | State::Away | State::Finished(_) => None,
        }
    }

    /// A write that was taken comes back, with what the kernel answered to its rest.
    pub fn give_back(&mut self, write: FileWrite, result: i32) {
        assert!(matches!(self.state, State::Away), "no write was taken");
        self.advance(write, result);
    }

    pub fn is_busy(&self) -> bool {
        !matches!(self.state, State::None)
    }

    /// The write that has ended, if one has. Reads memory only, unless a cut-short write has to go on.
    pub fn finished(&mut self) -> Option<Finished> {
        if matches!(self.state, State::WithKernel(_)) {
            self.reap();
        }
        if !matches!(self.state, State::Finished(_)) {
            return None;
        }
        match std::mem::replace(&mut self.state, State::None) {
            State::Finished(finished) => Some(finished),
            State::None | State::WithKernel(_) | State::Offered(_) | State::Away => None,
        }
    }

    /// Blocks until the kernel has ended the write that was made here, if one is under way. For `close` and drop.
    ///
    /// Errors: the kernel's; `WouldBlock` if the write is with somebody else.
    pub fn wait(&mut self) -> io::Result<()> {
        match &self.state {
            State::None | State::Finished(_) => return Ok(()),
            State::Offered(_) | State::Away => return Err(io::ErrorKind::WouldBlock.into()),
            State::WithKernel(_) => {}
        }
        if !self.ring.completion().is_empty() {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn reap(&mut self) {
        let Some(completion) = self.ring.completion().next() else {
            if self.refused {
                self.enter();
            }
            return;
        };
        let result = completion.result();
        if let State::WithKernel(write) = std::mem::replace(&mut self.state, State::None) {
            #[cfg(test)]
            let result = if let Some(Fault::Error(number)) = self.faults.pop_front() { -number } else { result };
            self.advance(write, result);
        }
    }

    /// Ends a write, or goes on with its rest. It is with nobody now.
    fn advance(&mut self, mut write: FileWrite, result: i32) {
        match write.advance(result) {
            Some(result) => self.state = State::Finished(Finished { buffer: write.into_buffer(), result }),
            None if self.lent => self.state = State::Offered(write),
            None => self.make(write),
        }
    }

    /// Makes a write on the own ring.
    fn make(&mut self, write: FileWrite) {
        let bytes = write.rest().len();
        #[cfg(test)]
        let bytes = if let Some(Fault::Short(most)) = self.faults.front() { bytes.min(*most) } else { bytes };
        let entry = opcode::Write::new(types::Fd(write.file().as_raw_fd()), write.rest().as_ptr(), bytes as u32)
            .offset(write.offset())
            .rw_flags(libc::RWF_DSYNC)
            .build()
            .flags(squeue::Flags::ASYNC);
        self.state = State::WithKernel(write);
        // SAFETY: the entry names `bytes` readable bytes of `rest` and an open file. Both are owned by the write in
        // `State::WithKernel`, whose buffer lies on the heap and so stays where it is when `self` moves. The state
        // leaves `WithKernel` only in `reap`, which has the entry's completion, and in `drop`, which waits for it or
        // leaks buffer and file when it cannot; `start`, `give_back` and `set_lent` touch other states only. No `&mut`
        // to the buffer exists meanwhile. If the push fails, the kernel never sees the entry.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // The queue has room for more entries than are ever under way; a failure would be a lost write, so say so.
        assert!(pushed.is_ok(), "the submission queue has room");
        self.enter();
    }

    /// Hands the queued entry to the kernel. When it is refused, `finished` and `wait` try again.
    fn enter(&mut self) {
        self.refused = match self.ring.submit() {
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(%error, "the kernel refused a log write for the moment");
                true
            }
        };
    }
}

impl Drop for WriteRing {
    fn drop(&mut self) {
        while matches!(self.state, State::WithKernel(_)) {
            if self.wait().is_err() {
                // The kernel may still read the buffer: give both up for ever rather than free them under it.
                std::mem::forget(std::mem::replace(&mut self.state, State::None));
                return;
            }
            if self.ring.completion().next().is_some() {
                self.state = State::None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn write(path: &std::path::Path, bytes: &[u8], faults: &[Fault]) -> io::Result<()> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let mut ring = WriteRing::new(&wake).unwrap();
        ring.faults.extend(faults);
        let mut buffer = AlignedVec::new();
        buffer.extend_from_slice(bytes);
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        ring.start(Arc::new(Segment::for_test(file)), 0, buffer);
        loop {
            ring.wait().unwrap();
            if let Some(finished) = ring.finished() {
                assert_eq!(&finished.buffer[..], bytes);
                return finished.result;
            }
        }
    }

    #[test]
    fn short_writes_go_on_where_they_stopped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
        let interrupted = Fault::Error(libc::EINTR);
        write(file.path(), &bytes, &[Fault::Short(1), interrupted, Fault::Short(4095), Fault::Short(60_000)]).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), bytes);
    }

    #[test]
    fn errors_of_disk_and_kernel_are_final() {
        assert_eq!(write("/dev/full".as_ref(), b"x", &[]).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        let file = tempfile::NamedTempFile::new().unwrap();
        let failed = write(file.path(), b"x", &[Fault::Error(libc::EIO)]);
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
        let endless = [Fault::Error(libc::EAGAIN); 100];
        assert!(write(file.path(), b"x", &endless).is_err());
    }

    #[test]
    fn a_ring_dropped_while_writing_waits_for_the_kernel() {
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut ring = WriteRing::new(&wake).unwrap();
        let mut buffer = AlignedVec::new();
        buffer.resize(1 << 20, 7);
        ring.start(Arc::new(Segment::for_test(file.reopen().unwrap())), 0, buffer);
        drop(ring);
        assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_lent_write_comes_back_until_all_of_it_is_on_disk() {
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut ring = WriteRing::new(&wake).unwrap();
        ring.set_lent(true);
        let mut buffer = AlignedVec::new();
        buffer.extend_from_slice(b"abcdef");
        ring.start(Arc::new(Segment::for_test(file.reopen().unwrap())), 3, buffer);
        assert!(ring.is_busy() && ring.finished().is_none() && ring.wait().is_err());
        let mut write_one = |bytes: usize, result: i32| {
            let write = ring.take().unwrap();
            assert!(ring.take().is_none() && ring.finished().is_none() && ring.wait().is_err(), "taken once");
            rustix::io::pwrite(write.file(), &write.rest()[..bytes], write.offset()).unwrap();
            ring.give_back(write, result);
        };
        write_one(2, 2);
        write_one(0, -libc::EINTR);
        write_one(4, 4);
        ring.finished().unwrap().result.unwrap();
        assert!(!ring.is_busy() && ring.take().is_none());
        assert_eq!(std::fs::read(file.path()).unwrap(), b"\0\0\0abcdef");
    }

    #[test]
    fn an_offered_write_is_made_here_when_the_lending_ends() {
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut ring = WriteRing::new(&wake).unwrap();
        ring.set_lent(true);
        let mut buffer = AlignedVec::new();
        buffer.extend_from_slice(b"x");
        ring.start(Arc::new(Segment::for_test(file.reopen().unwrap())), 0, buffer);
        ring.set_lent(false);
        ring.wait().unwrap();
        ring.finished().unwrap().result.unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"x");
    }
}
