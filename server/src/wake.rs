//! Waking a core that sleeps: a flag and an eventfd. Shared by everybody who hands a core something (lanes, workers,
//! the stop signal); owned by no thread.
//!
//! Invariant (no lost wake): who hands something over first makes it visible, then looks at the flag; who falls asleep
//! first sets the flag, then looks for work once more. One of the two sees the other. A wake costs a system call only
//! when the core sleeps, and at most one a sleep.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

/// One core's doorbell.
#[derive(Debug)]
pub struct Waker {
    sleeping: AtomicBool,
    bell: OwnedFd,
}

impl Waker {
    /// Errors: those of `eventfd`, in practice only "too many open files".
    pub fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { sleeping: AtomicBool::new(false), bell })
    }

    /// Rings if the core sleeps. Call after what it should find has been made visible to it.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            // The counter is never read, so it would overflow after 2^64 rings; a failed write has no other cause.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// The core says that it is about to sleep. It must look for work once more before it does.
    pub fn about_to_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The core is awake: nobody needs to ring.
    pub fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Readable after a ring, for edge-triggered waiting: it is never read, every ring is a new edge.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
