//! What an entry of the ring and its completion carry, and what is expected to go wrong. Pure, but for making a ring.

use std::io;

use io_uring::IoUring;
use ringline_core::event::ConnId;
use rustix::io::Errno;

pub(super) const GENERATION_MAX: u32 = (1 << 24) - 1;

/// What a completion is about, in the top byte of its user data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    Accept = 1,
    Receive = 2,
    Send = 3,
    /// The low half is an index into `watched`.
    Watch = 4,
    Cancel = 5,
    FileWrite = 6,
}

impl Op {
    pub(super) fn of(user_data: u64) -> Option<Self> {
        match user_data >> 56 {
            1 => Some(Self::Accept),
            2 => Some(Self::Receive),
            3 => Some(Self::Send),
            4 => Some(Self::Watch),
            5 => Some(Self::Cancel),
            6 => Some(Self::FileWrite),
            _ => None,
        }
    }
}

pub(super) fn user_data(op: Op, conn: ConnId) -> u64 {
    (op as u64) << 56 | u64::from(conn.generation) << 32 | u64::from(conn.slot)
}

pub(super) fn conn_of(user_data: u64) -> ConnId {
    ConnId { slot: user_data as u32, generation: (user_data >> 32) as u32 & GENERATION_MAX }
}

/// A copied completion: user data, result, flags.
pub(super) type Completion = (u64, i32, u32);

pub(super) fn make_ring(submissions: u32, completions: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_cqsize(completions)
        .build(submissions)
}

pub(super) fn errno(result: i32) -> Option<Errno> {
    (result < 0).then(|| Errno::from_raw_os_error(-result))
}

/// A time-out, an interruption and a full completion queue are part of the trade; anything else is not.
pub(super) fn report_enter(error: &io::Error) {
    let expected = [libc::ETIME, libc::EINTR, libc::EBUSY, libc::EAGAIN];
    if !error.raw_os_error().is_some_and(|number| expected.contains(&number)) {
        tracing::error!(%error, "io_uring_enter failed");
    }
}
