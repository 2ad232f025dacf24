//! How a core sleeps: one function with two ways, so that they can be compared. Owned by the core's thread.
//!
//! - `glommio`: the task waits for the net's descriptor and a timer, and the executor sleeps in its own ring.
//! - `direct`: the thread sleeps in the net itself, one system call a sleep; the executor sleeps with it.
//!
//! Invariant: no sleep is longer than [`SLEEP_US_MAX`], so a lost wake costs at most that.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use glommio::io::{PollState, PollableFd};
use glommio::timer::Timer;

use crate::net::Net;

/// The slow tick.
pub const SLEEP_US_MAX: u64 = 1_000_000;

/// The choice of `net.park`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParkKind {
    Glommio,
    Direct,
}

/// See the module.
pub enum Parker {
    Glommio {
        fd: PollableFd<OwnedFd>,
        /// A registration that outlives a timeout is used again by the next sleep.
        armed: PollState,
    },
    Direct,
}

impl Parker {
    /// Must be called on an executor. Errors: "too many open files".
    pub fn new(kind: ParkKind, net: &dyn Net) -> io::Result<Self> {
        Ok(match kind {
            ParkKind::Glommio => Self::Glommio {
                fd: PollableFd::new(net.sleep_fd()?).map_err(io::Error::other)?,
                armed: PollState::new(),
            },
            ParkKind::Direct => Self::Direct,
        })
    }

    pub fn is_direct(&self) -> bool {
        matches!(self, Self::Direct)
    }

    /// Sleeps until the net has something, or for `sleep_us` at most.
    pub async fn park(&mut self, net: &mut dyn Net, sleep_us: u64) {
        let sleep = Duration::from_micros(sleep_us.min(SLEEP_US_MAX));
        match self {
            Self::Direct => net.wait(sleep),
            Self::Glommio { fd, armed } => {
                if !net.prepare_sleep() {
                    return;
                }
                let mut timer = Timer::new(sleep);
                let outcome = poll_fn(|context| match fd.poll_readable(context, armed) {
                    Poll::Ready(outcome) => Poll::Ready(outcome),
                    Poll::Pending => Pin::new(&mut timer).poll(context).map(|_| Ok(())),
                })
                .await;
                if let Err(error) = outcome {
                    tracing::error!(%error, "waiting by the executor failed; this core now waits by itself");
                    *self = Self::Direct;
                }
            }
        }
    }
}
