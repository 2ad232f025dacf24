//! The receive buffers of one core's ring: a provided-buffer ring that the kernel takes from and we give back to.
//!
//! Owned by the ring's thread. Invariant: a buffer is either the kernel's (its id stands between our tail and the
//! kernel's head) or ours (between its completion and `give_back`); it is read only while it is ours. An idle
//! connection holds none.

#![allow(unsafe_code, reason = "the one place for it: each block has its proof")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::Submitter;
use io_uring::types::BufRingEntry;

/// Bytes of one buffer. A larger burst of one connection takes several.
pub const BUFFER_BYTES: usize = 2_048;
/// Buffers of one ring; a power of two.
pub const BUFFERS: u16 = 4_096;
/// The one group that all receives of a ring take from.
pub const GROUP: u16 = 0;

const PAGE_BYTES: usize = 4_096;

const _: () = assert!(BUFFERS.is_power_of_two());
const _: () = assert!(size_of::<BufRingEntry>() == 16);

/// See the module.
pub struct Buffers {
    entries: NonNull<BufRingEntry>,
    data: NonNull<u8>,
    /// Our copy of the shared tail.
    tail: u16,
    /// Buffers that are ours.
    lent: u16,
}

impl Buffers {
    fn entries_layout() -> Layout {
        Layout::from_size_align(usize::from(BUFFERS) * size_of::<BufRingEntry>(), PAGE_BYTES).expect("constant layout")
    }

    fn data_layout() -> Layout {
        Layout::from_size_align(usize::from(BUFFERS) * BUFFER_BYTES, PAGE_BYTES).expect("constant layout")
    }

    /// Registers the ring of buffers and fills it.
    ///
    /// Errors: the kernel's; `EINVAL` where it does not know provided-buffer rings (before 5.19).
    pub fn register(submitter: &Submitter<'_>) -> io::Result<Self> {
        // SAFETY: both layouts have a size above zero.
        let (entries, data) = unsafe { (alloc_zeroed(Self::entries_layout()), alloc_zeroed(Self::data_layout())) };
        let Some(entries) = NonNull::new(entries.cast::<BufRingEntry>()) else {
            handle_alloc_error(Self::entries_layout())
        };
        let Some(data) = NonNull::new(data) else { handle_alloc_error(Self::data_layout()) };
        let mut buffers = Self { entries, data, tail: 0, lent: BUFFERS };
        // SAFETY: the entries are page-aligned, zeroed, hold `BUFFERS` places, and live until `Drop`, which the owner
        // of the ring lets happen only after the ring is gone.
        unsafe { submitter.register_buf_ring_with_flags(buffers.entries.as_ptr() as u64, BUFFERS, GROUP, 0)? };
        for id in 0..BUFFERS {
            buffers.give_back(id);
        }
        buffers.publish();
        Ok(buffers)
    }

    /// The first `length` bytes of a buffer that a completion has just given us.
    ///
    /// `None` for an id or length that the kernel can't have given.
    pub fn received(&self, id: u16, length: usize) -> Option<&[u8]> {
        if id >= BUFFERS || length > BUFFER_BYTES {
            return None;
        }
        // SAFETY: id and length lie inside the allocation, which is initialised (zeroed). The buffer is ours: its
        // completion was reaped and `give_back` was not called, so the kernel does not write to it while the slice,
        // which borrows self, lives: `give_back` needs `&mut self`.
        unsafe {
            let start = self.data.as_ptr().add(usize::from(id) * BUFFER_BYTES);
            Some(std::slice::from_raw_parts(start, length))
        }
    }

    /// Queues a buffer of ours for the kernel; visible to it after [`Buffers::publish`].
    pub fn give_back(&mut self, id: u16) {
        if id >= BUFFERS || self.lent == 0 {
            debug_assert!(false, "buffer {id} is not ours");
            return;
        }
        let place = usize::from(self.tail & (BUFFERS - 1));
        // SAFETY: the place lies inside the entries; the kernel does not read it before the tail passes it. Field by
        // field, because the tail itself lies in the reserved field of place 0.
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(place);
            entry.set_addr(self.data.as_ptr().add(usize::from(id) * BUFFER_BYTES) as u64);
            entry.set_len(BUFFER_BYTES as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
        self.lent -= 1;
    }

    /// Counts a buffer that a completion has given us.
    pub fn taken(&mut self) {
        self.lent += 1;
        debug_assert!(self.lent <= BUFFERS, "more buffers than there are");
    }

    /// Lets the kernel see what was given back.
    pub fn publish(&mut self) {
        // SAFETY: the pointer is the first entry of the registered ring, whose tail is a 16-bit word that only this
        // thread writes and the kernel reads; an aligned atomic store with release order is what it expects.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr()).cast_mut().cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }

    /// Buffers that are ours at this moment.
    pub fn lent(&self) -> u16 {
        self.lent
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `register` with these layouts. The ring is gone (see `register`), so the kernel uses
        // neither any more.
        unsafe {
            dealloc(self.entries.as_ptr().cast(), Self::entries_layout());
            dealloc(self.data.as_ptr(), Self::data_layout());
        }
    }
}
