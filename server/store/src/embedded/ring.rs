//! The log's way to the disk: one synced write at a time through io_uring. The seam between the log and a ring, so that
//! the log can move to the reactor's own ring later: `start` gives a buffer away, `finished` gives it back.
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

/// One operation is under way at a time.
const RING_ENTRIES: u32 = 4;
/// How often one write may be interrupted or cut short before it counts as failed.
const RETRIES_MAX: u32 = 64;

/// What a finished write gives back.
pub(super) struct Finished {
    pub buffer: AlignedVec,
    /// `Ok`: every byte is durable. An error is final: what is on disk is unknown, and a sync that failed may succeed
    /// the next time without having written anything.
    pub result: io::Result<()>,
}

/// A ring with at most one write under way.
pub(super) struct WriteRing {
    ring: IoUring,
    in_flight: Option<InFlight>,
    /// The kernel refused the queued entry for the moment (memory, interruption); it stays in the queue.
    refused: bool,
    /// Faults to meet, in order of submission.
    #[cfg(test)]
    pub faults: std::collections::VecDeque<Fault>,
}

/// What a test lets happen to the next submission.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    None,
    /// At most this many bytes are written.
    Short(usize),
    /// The write is made and then reported with this error number.
    Error(i32),
}

struct InFlight {
    segment: Arc<Segment>,
    buffer: AlignedVec,
    /// Where in the segment the buffer begins.
    offset: u32,
    /// Bytes known to be written.
    written: usize,
    retries: u32,
    /// The kernel may be using buffer and file.
    with_kernel: bool,
    #[cfg(test)]
    fault: Fault,
}

impl WriteRing {
    /// `wake` becomes readable at every completion.
    pub fn new(wake: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::new(RING_ENTRIES)?;
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        Ok(Self {
            ring,
            in_flight: None,
            refused: false,
            #[cfg(test)]
            faults: std::collections::VecDeque::new(),
        })
    }

    /// Writes `buffer` at `offset` and syncs it. Must not be called while a write is under way.
    ///
    /// An error of the submission itself is reported by `finished` like any other.
    pub fn start(&mut self, segment: Arc<Segment>, offset: u32, buffer: AlignedVec) {
        assert!(self.in_flight.is_none(), "one write at a time");
        let in_flight = InFlight {
            segment,
            buffer,
            offset,
            written: 0,
            retries: 0,
            with_kernel: false,
            #[cfg(test)]
            fault: Fault::None,
        };
        self.in_flight = Some(in_flight);
        self.submit_rest();
    }

    pub fn is_busy(&self) -> bool {
        self.in_flight.is_some()
    }

    /// The write that has ended, if one has. Reads memory only, unless a cut-short write has to go on.
    pub fn finished(&mut self) -> Option<Finished> {
        let in_flight = self.in_flight.as_mut()?;
        let Some(completion) = self.ring.completion().next() else {
            if self.refused {
                self.enter();
            }
            return None;
        };
        in_flight.with_kernel = false;
        let result = completion.result();
        #[cfg(test)]
        let result = if let Fault::Error(number) = in_flight.fault { -number } else { result };
        match in_flight.advance(result) {
            Some(result) => self.take(result),
            None => {
                self.submit_rest();
                None
            }
        }
    }

    /// Blocks until the kernel has ended the write, if one is under way. For `close` and drop.
    pub fn wait(&mut self) -> io::Result<()> {
        let Some(in_flight) = &self.in_flight else { return Ok(()) };
        if !in_flight.with_kernel || !self.ring.completion().is_empty() {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn take(&mut self, result: io::Result<()>) -> Option<Finished> {
        let in_flight = self.in_flight.take()?;
        assert!(!in_flight.with_kernel, "the buffer is ours again");
        Some(Finished { buffer: in_flight.buffer, result })
    }

    fn submit_rest(&mut self) {
        let Some(in_flight) = &mut self.in_flight else { return };
        assert!(!in_flight.with_kernel, "one submission at a time");
        let rest = in_flight.buffer.get(in_flight.written..).unwrap_or(&[]);
        #[cfg(not(test))]
        let bytes = rest.len();
        #[cfg(test)]
        let bytes = {
            in_flight.fault = self.faults.pop_front().unwrap_or(Fault::None);
            if let Fault::Short(bytes) = in_flight.fault { bytes.min(rest.len()) } else { rest.len() }
        };
        let file = types::Fd(in_flight.segment.file.as_raw_fd());
        let entry = opcode::Write::new(file, rest.as_ptr(), bytes as u32)
            .offset(u64::from(in_flight.offset) + in_flight.written as u64)
            .rw_flags(libc::RWF_DSYNC)
            .build()
            .flags(squeue::Flags::ASYNC);
        in_flight.with_kernel = true;
        // SAFETY: the entry names `bytes` readable bytes from `rest.as_ptr()` and an open file. Both are owned by
        // `self.in_flight`, whose buffer lies on the heap and so stays where it is when `self` moves. `with_kernel` is
        // true from here until the entry's completion has been reaped in `finished`; meanwhile `start` and `take` panic
        // before they could replace or give out the buffer, no `&mut` to it exists, and `drop` waits for the
        // completion, or leaks buffer and file when it cannot. If the push fails, the kernel never sees the entry.
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

impl InFlight {
    /// Takes in a completion's result; `None`: there is more to write.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        self.retries += 1;
        if self.retries > RETRIES_MAX {
            return Some(Err(io::Error::other("the write was interrupted or cut short too often")));
        }
        if result < 0 {
            let error = io::Error::from_raw_os_error(-result);
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
}

impl Drop for WriteRing {
    fn drop(&mut self) {
        while self.in_flight.as_ref().is_some_and(|in_flight| in_flight.with_kernel) {
            if self.wait().is_err() {
                // The kernel may still read the buffer: give both up for ever rather than free them under it.
                std::mem::forget(self.in_flight.take());
                return;
            }
            if self.ring.completion().next().is_some() {
                self.in_flight = None;
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
}
