//! The net seam: sockets as completions and borrowed bytes, so that a readiness poller and an own io_uring look the
//! same to the reactor. One [`Net`] per core, owned by that core's thread.
//!
//! Invariants: a [`ConnId`] is never given out twice; events and calls that name a connection which is gone are
//! without effect; after `Closed` or `Detached` nothing more is said about a connection. What was received is lent for
//! the length of the call only, so an idle connection owns no buffer here.

pub mod buffers;
pub mod epoll;
pub mod ring;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ringline_core::event::ConnId;
use ringline_store::FileWrite;

/// The choice of `net.kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetKind {
    /// The ring where the kernel has what it needs, else epoll.
    Auto,
    Ring,
    Epoll,
}

/// What a core's sockets start with.
pub struct NetOptions {
    /// Non-blocking and listening.
    pub listener: OwnedFd,
    pub admission: Arc<Admission>,
    /// A whole frame for who finds no place.
    pub refusal: Vec<u8>,
}

/// What the kernel has done.
#[derive(Debug)]
pub enum NetEvent<'a> {
    /// A client connected.
    Accepted {
        conn: ConnId,
    },
    Received {
        conn: ConnId,
        bytes: &'a [u8],
    },
    /// `bytes` more of a buffer in flight are in the kernel. With the last of them the buffer comes back.
    Sent {
        conn: ConnId,
        bytes: usize,
        buffer: Option<Vec<u8>>,
    },
    /// The answer to a [`Net::detach`] that could not be given at once.
    Detached {
        conn: ConnId,
        socket: OwnedFd,
    },
    /// A write given to [`Net::write_file`] is done: `result` as in [`ringline_store::Store::written`].
    FileWritten {
        write: FileWrite,
        result: i32,
    },
    /// The connection is gone, and its buffers with it.
    Closed {
        conn: ConnId,
        cause: CloseCause,
    },
}

/// Who or what ended a connection, seen from the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCause {
    /// The client ended its stream.
    Peer,
    /// The kernel reported an error.
    Error(io::ErrorKind),
}

/// Whether to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flow {
    Continue,
    /// Read nothing more of this connection. What the kernel has handed out already is still delivered.
    Stop,
}

/// What became of a buffer given to [`Net::send`].
#[derive(Debug)]
#[must_use]
pub enum Sending {
    /// All of it is in the kernel; here is the buffer.
    Done(Vec<u8>),
    /// `bytes` of it are; [`NetEvent::Sent`] tells the rest.
    InFlight { bytes: usize },
}

/// Counters of one core's sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    pub accepted: u64,
    /// Refused because the process holds as many connections as it may.
    pub refused: u64,
    /// Times that accepting paused because the system had no descriptor or memory.
    pub accept_pauses: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

/// One core's sockets.
pub trait Net {
    /// Tells `sink` what has happened since the last call, a bounded part of it, without waiting. `now_us` is the
    /// monotonic time. True if there was anything.
    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) -> bool;

    /// Sends a buffer. At most one a connection is in flight: the caller waits for it to come back.
    fn send(&mut self, conn: ConnId, buffer: Vec<u8>) -> Sending;

    /// Reads on after [`Flow::Stop`].
    fn resume(&mut self, conn: ConnId);

    /// An id without a socket, for a connection that another node holds: no event names it, and no call but
    /// [`Net::release`] may.
    fn reserve(&mut self) -> ConnId;

    /// Gives back a reserved id, once.
    fn release(&mut self, conn: ConnId);

    /// Ends the stream to the client after what was sent; its bytes are still received.
    fn finish(&mut self, conn: ConnId);

    /// Closes at once. No `Closed` follows.
    fn close(&mut self, conn: ConnId);

    /// Takes the socket out of this core. `None`: `Detached` follows, after the bytes that were received meanwhile.
    /// Nothing may be in flight.
    fn detach(&mut self, conn: ConnId) -> Option<OwnedFd>;

    /// Takes in a socket that another core detached.
    ///
    /// Errors: the kernel's; the socket is closed.
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<ConnId>;

    /// Whether [`Net::write_file`] is served here.
    fn writes_files(&self) -> bool {
        false
    }

    /// Writes and syncs a part of a file, one at a time; [`NetEvent::FileWritten`] follows.
    ///
    /// Errors: gives the write back where it is not served, or while another is under way.
    fn write_file(&mut self, write: FileWrite) -> Result<(), FileWrite> {
        Err(write)
    }

    fn is_writing_file(&self) -> bool {
        false
    }

    /// Wakes the core's sleep whenever this descriptor becomes readable (edge-triggered).
    fn watch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()>;

    fn stop_accepting(&mut self);

    /// Submits what the calls of this turn have queued. Once a turn.
    fn flush(&mut self);

    /// Becomes readable when `poll` has something; to sleep on. A duplicate, owned by the caller.
    fn sleep_fd(&self) -> io::Result<OwnedFd>;

    /// Said before a sleep on `sleep_fd`. False: something has come meanwhile, do not sleep.
    fn prepare_sleep(&mut self) -> bool;

    /// Sleeps on this thread until `poll` has something, or for `timeout`.
    fn wait(&mut self, timeout: Duration);

    /// When `poll` has something to do by itself, in monotonic microseconds: sockets are accepted again after a pause.
    fn next_deadline_us(&self) -> Option<u64>;

    fn connections(&self) -> usize;

    fn counters(&self) -> NetCounters;
}

/// The process-wide count of connections, looked at only when one is accepted or ends.
#[derive(Debug)]
pub struct Admission {
    count: AtomicUsize,
    max: usize,
}

impl Admission {
    pub fn new(max: usize) -> Self {
        Self { count: AtomicUsize::new(0), max }
    }

    /// Takes a place. False when all are taken.
    pub fn enter(&self) -> bool {
        let entered = self.count.fetch_add(1, Ordering::Relaxed) < self.max;
        if !entered {
            self.leave();
        }
        entered
    }

    /// Takes a place even when there is none: for what must not be refused.
    pub fn enter_always(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    pub fn leave(&self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
pub(crate) mod conformance;
