//! The receive buffers of one core's ring: a provided-buffer ring that the kernel takes from and we give back to.
//!
//! Owned by the ring's thread. Invariant: a buffer is either the kernel's (from `give_back` until its completion) or
//! ours (from `taken` until `give_back`); it is read only while it is ours, and given back only once. The [`Ledger`]
//! keeps that account without touching memory. An idle connection holds no buffer.
//!
//! The model tests below play the kernel's part on the memory alone; they also run under Miri:
//! `MIRIFLAGS=-Zmiri-permissive-provenance cargo +nightly miri test --package ringline --lib buffers` (permissive,
//! because a buffer's address travels as a number, as it does to the kernel).

#![allow(unsafe_code, reason = "the one place for it: each block has its proof")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::mem::offset_of;
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
/// Buffers that one word of the ledger accounts for.
const WORD_BITS: u16 = u64::BITS as u16;

const _: () = assert!(BUFFERS.is_power_of_two());
// The kernel's `struct io_uring_buf`. The library's own type gives no access to one field alone, and a reference to a
// whole entry would cover the tail, which the kernel may be reading.
const _: () = assert!(size_of::<Entry>() == size_of::<BufRingEntry>() && size_of::<Entry>() == 16);
const _: () = assert!(offset_of!(Entry, length) == 8 && offset_of!(Entry, id) == 12 && offset_of!(Entry, tail) == 14);

/// One place of the ring, as the kernel reads it.
#[repr(C)]
struct Entry {
    address: u64,
    length: u32,
    id: u16,
    /// Of the first place only: how far the kernel may take. Reserved in the others.
    tail: AtomicU16,
}

/// Who holds which buffer, and how far the ring is filled.
#[derive(Debug)]
struct Ledger {
    /// One bit a buffer, set while it is ours.
    ours: Vec<u64>,
    /// Buffers that are ours.
    lent: u16,
    count: u16,
    /// Buffers given to the kernel since the start, modulo 2^16: what the shared tail is to become.
    tail: u16,
}

impl Ledger {
    /// All of `count` buffers, a power of two, are ours.
    fn new(count: u16, tail: u16) -> Self {
        assert!(count.is_power_of_two(), "the kernel masks places with the count");
        let words = usize::from(count.div_ceil(WORD_BITS));
        let all = if count < WORD_BITS { (1 << count) - 1 } else { u64::MAX };
        Self { ours: vec![all; words], lent: count, count, tail }
    }

    fn bit(id: u16) -> (usize, u64) {
        (usize::from(id / WORD_BITS), 1 << (id % WORD_BITS))
    }

    fn is_ours(&self, id: u16) -> bool {
        let (word, bit) = Self::bit(id);
        self.ours.get(word).is_some_and(|word| word & bit != 0)
    }

    /// A buffer of the kernel's becomes ours. False, and nothing happens, if it was not the kernel's.
    fn take(&mut self, id: u16) -> bool {
        let (word, bit) = Self::bit(id);
        let Some(word) = self.ours.get_mut(word).filter(|word| id < self.count && **word & bit == 0) else {
            return false;
        };
        *word |= bit;
        self.lent += 1;
        true
    }

    /// A buffer of ours becomes the kernel's: the place to enter it at. `None`, and nothing happens, if it is not ours.
    fn give(&mut self, id: u16) -> Option<u16> {
        let (word, bit) = Self::bit(id);
        let word = self.ours.get_mut(word).filter(|word| **word & bit != 0)?;
        *word &= !bit;
        self.lent -= 1;
        let place = self.tail & (self.count - 1);
        self.tail = self.tail.wrapping_add(1);
        Some(place)
    }
}

/// See the module.
pub struct Buffers {
    entries: NonNull<Entry>,
    data: NonNull<u8>,
    ledger: Ledger,
}

fn entries_layout(count: u16) -> Layout {
    let bytes = usize::from(count) * size_of::<Entry>();
    Layout::from_size_align(bytes, PAGE_BYTES).expect("at most 1 MiB, and the page size is a power of two")
}

fn data_layout(count: u16) -> Layout {
    let bytes = usize::from(count) * BUFFER_BYTES;
    Layout::from_size_align(bytes, PAGE_BYTES).expect("at most 128 MiB, and the page size is a power of two")
}

impl Buffers {
    /// Registers a ring of `count` buffers, a power of two up to 32,768, and fills it.
    ///
    /// Errors: the kernel's; `EINVAL` where it does not know provided-buffer rings (before 5.19).
    pub fn register(submitter: &Submitter<'_>, count: u16) -> io::Result<Self> {
        let mut buffers = Self::allocate(count, 0);
        // SAFETY: the entries are page-aligned, zeroed, hold `count` places, and live until `Drop`, which the owner
        // of the ring lets happen only after the ring is gone.
        unsafe { submitter.register_buf_ring_with_flags(buffers.entries.as_ptr() as u64, count, GROUP, 0)? };
        buffers.fill();
        Ok(buffers)
    }

    /// Memory for `count` buffers, a power of two, all of them ours. The shared tail is to begin at `tail`.
    fn allocate(count: u16, tail: u16) -> Self {
        let ledger = Ledger::new(count, tail);
        // SAFETY: both layouts have a size above zero, because the ledger takes no count of 0.
        let (entries, data) = unsafe { (alloc_zeroed(entries_layout(count)), alloc_zeroed(data_layout(count))) };
        let Some(entries) = NonNull::new(entries.cast::<Entry>()) else { handle_alloc_error(entries_layout(count)) };
        let Some(data) = NonNull::new(data) else { handle_alloc_error(data_layout(count)) };
        Self { entries, data, ledger }
    }

    /// Gives all buffers to the kernel.
    fn fill(&mut self) {
        for id in 0..self.ledger.count {
            self.give_back(id);
        }
        self.publish();
    }

    /// The first `length` bytes of a buffer that a completion has given us.
    ///
    /// `None` for a buffer that is not ours, or a length that the kernel can't have given.
    pub fn received(&self, id: u16, length: usize) -> Option<&[u8]> {
        if !self.ledger.is_ours(id) || length > BUFFER_BYTES {
            return None;
        }
        // SAFETY: id and length lie inside the allocation, which is initialised (zeroed). The buffer is ours, so the
        // kernel does not write to it while the slice, which borrows self, lives: `give_back` needs `&mut self`.
        unsafe {
            let start = self.data.as_ptr().add(usize::from(id) * BUFFER_BYTES);
            Some(std::slice::from_raw_parts(start, length))
        }
    }

    /// Queues a buffer of ours for the kernel; visible to it after [`Buffers::publish`]. False, and nothing happens, if
    /// it is not ours.
    pub fn give_back(&mut self, id: u16) -> bool {
        let Some(place) = self.ledger.give(id) else { return false };
        // SAFETY: the ledger gives out ids and places below the count, so both lie inside their allocations. At most
        // `count` buffers are the kernel's, so this place is one that it has taken from; it does not read it again
        // before the published tail passes it. Field by field, because the tail lies in the first entry.
        unsafe {
            let start = self.data.as_ptr().add(usize::from(id) * BUFFER_BYTES);
            let entry = self.entries.as_ptr().add(usize::from(place));
            (&raw mut (*entry).address).write(start.expose_provenance() as u64);
            (&raw mut (*entry).length).write(BUFFER_BYTES as u32);
            (&raw mut (*entry).id).write(id);
        }
        true
    }

    /// A completion has given us this buffer. False, and nothing happens, if it was not the kernel's.
    pub fn taken(&mut self, id: u16) -> bool {
        self.ledger.take(id)
    }

    /// Lets the kernel see what was given back.
    pub fn publish(&mut self) {
        // SAFETY: the first entry lies inside the allocation. Its tail is a 16-bit word that only this thread writes
        // and the kernel reads; an aligned atomic store with release order is what it expects.
        let tail = unsafe { &(*self.entries.as_ptr()).tail };
        tail.store(self.ledger.tail, Ordering::Release);
    }

    /// Buffers that are ours at this moment.
    pub fn lent(&self) -> u16 {
        self.ledger.lent
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `allocate` with these layouts. The ring is gone (see `register`), so the kernel uses
        // neither any more.
        unsafe {
            dealloc(self.entries.as_ptr().cast(), entries_layout(self.ledger.count));
            dealloc(self.data.as_ptr(), data_layout(self.ledger.count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeSet, VecDeque};
    use std::sync::mpsc;

    use proptest::prelude::*;

    /// The kernel's side: takes places in order up to the published tail, writes into their buffers.
    struct Consumer {
        entries: *const Entry,
        count: u16,
        head: u16,
    }

    // SAFETY: it reads what the kernel may read, from wherever the kernel runs; the tests keep the memory alive.
    unsafe impl Send for Consumer {}

    impl Consumer {
        /// Buffers that are to be had.
        fn available(&self) -> u16 {
            // SAFETY: the entries are alive, and the tail is read as the kernel reads it.
            let tail = unsafe { &(*self.entries).tail };
            tail.load(Ordering::Acquire).wrapping_sub(self.head)
        }

        /// Takes the next buffer and writes `length` bytes of its id and `mark` into it: id, address.
        fn take(&mut self, length: usize, mark: u8) -> Option<(u16, u64)> {
            if self.available() == 0 {
                return None;
            }
            let place = usize::from(self.head & (self.count - 1));
            self.head = self.head.wrapping_add(1);
            // SAFETY: the place lies before the published tail, so it was written and is not being written. The buffer
            // is the kernel's until its id is given to `taken`.
            unsafe {
                let entry = self.entries.add(place);
                let (address, id) = ((*entry).address, (*entry).id);
                assert_eq!((*entry).length as usize, BUFFER_BYTES);
                let start = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
                start.write_bytes(pattern(id, mark), length);
                Some((id, address))
            }
        }
    }

    fn pattern(id: u16, mark: u8) -> u8 {
        (id as u8).wrapping_mul(31) ^ mark
    }

    fn pair(count: u16, tail: u16) -> (Buffers, Consumer) {
        let mut buffers = Buffers::allocate(count, tail);
        buffers.publish();
        buffers.fill();
        let consumer = Consumer { entries: buffers.entries.as_ptr(), count, head: tail };
        (buffers, consumer)
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// The kernel fills so many buffers, if it has them.
        Take(u8),
        /// One of those that we hold comes back.
        GiveBack(prop::sample::Index),
        Publish,
        /// A number that may be anything comes back, or is said to be taken.
        Foreign(u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (1..6u8).prop_map(Step::Take),
            6 => any::<prop::sample::Index>().prop_map(Step::GiveBack),
            2 => Just(Step::Publish),
            1 => prop_oneof![0..40u16, any::<u16>()].prop_map(Step::Foreign),
        ];
        prop::collection::vec(step, 1..if cfg!(miri) { 60 } else { 400 })
    }

    /// What must be true of buffers and kernel at any moment.
    #[derive(Default)]
    struct Model {
        /// Given back and not yet published, in order.
        queued: VecDeque<u16>,
        /// The kernel's, in the order in which it takes them.
        visible: VecDeque<u16>,
        /// Ours, with the mark and length that the kernel wrote.
        held: Vec<(u16, u8, usize)>,
    }

    impl Model {
        fn check(&self, buffers: &Buffers, consumer: &Consumer) {
            let ours: BTreeSet<u16> = self.held.iter().map(|held| held.0).collect();
            let theirs: BTreeSet<u16> = self.queued.iter().chain(&self.visible).copied().collect();
            assert!(ours.is_disjoint(&theirs), "a buffer in two hands");
            assert_eq!(ours.len() + theirs.len(), usize::from(consumer.count), "a buffer in no hand, or twice in one");
            assert_eq!(usize::from(buffers.lent()), ours.len());
            assert_eq!(usize::from(consumer.available()), self.visible.len());
            for &(id, mark, length) in &self.held {
                let bytes = buffers.received(id, length).expect("ours, and of this length");
                assert_eq!(bytes.len(), length);
                assert!(bytes.iter().all(|&byte| byte == pattern(id, mark)), "{id} was overwritten while it was ours");
                assert_eq!(buffers.received(id, BUFFER_BYTES + 1), None);
            }
            for &id in &theirs {
                assert_eq!(buffers.received(id, 1), None, "{id} is the kernel's");
            }
        }

        fn step(&mut self, step: &Step, (buffers, consumer): (&mut Buffers, &mut Consumer), mark: u8) {
            match step {
                Step::Take(wanted) => {
                    for at in 0..*wanted {
                        let length = 1 + usize::from(mark) % 7 + usize::from(at);
                        let taken = consumer.take(length, mark);
                        assert_eq!(taken.map(|(id, _)| id), self.visible.pop_front(), "in the order of giving back");
                        let Some((id, address)) = taken else { break };
                        let expected = buffers.data.as_ptr() as u64 + u64::from(id) * BUFFER_BYTES as u64;
                        assert_eq!(address, expected, "each id has its own memory");
                        assert!(buffers.taken(id));
                        assert!(!buffers.taken(id), "taken once");
                        self.held.push((id, mark, length));
                    }
                }
                Step::GiveBack(which) => {
                    if self.held.is_empty() {
                        return;
                    }
                    let (id, ..) = self.held.swap_remove(which.index(self.held.len()));
                    assert!(buffers.give_back(id));
                    assert!(!buffers.give_back(id), "given back once");
                    self.queued.push_back(id);
                }
                Step::Publish => {
                    buffers.publish();
                    self.visible.append(&mut self.queued);
                }
                Step::Foreign(id) => {
                    if !self.held.iter().any(|held| held.0 == *id) {
                        assert!(!buffers.give_back(*id), "{id} is not ours");
                    }
                    if *id >= consumer.count {
                        assert!(!buffers.taken(*id), "{id} is none");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 12 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn no_buffer_is_ever_in_two_hands(power in 0..if cfg!(miri) { 5 } else { 8u32 }, tail in any::<u16>(), steps in steps()) {
            let count = 1 << power;
            let (mut buffers, mut consumer) = pair(count, tail);
            let mut model = Model { visible: (0..count).collect(), ..Model::default() };
            for (at, step) in steps.iter().enumerate() {
                model.step(step, (&mut buffers, &mut consumer), at as u8);
                model.check(&buffers, &consumer);
            }
        }
    }

    #[test]
    fn the_tail_wraps_around_and_nothing_else_changes() {
        // Every place comes past the wrap; under Miri the way to it is shorter.
        let (tail, rounds) = if cfg!(miri) { (u16::MAX - 40, 100) } else { (0, 3 * 65_536 + 17) };
        let (mut buffers, mut consumer) = pair(16, tail);
        let mut held = VecDeque::new();
        for round in 0..rounds {
            let (id, _) = consumer.take(8, round as u8).expect("as many come back as are taken");
            assert!(buffers.taken(id));
            held.push_back((id, round as u8));
            if held.len() > 5 {
                let (id, mark) = held.pop_front().expect("six are held");
                assert_eq!(buffers.received(id, 8), Some(&[pattern(id, mark); 8][..]));
                assert!(buffers.give_back(id));
                buffers.publish();
            }
        }
        assert_eq!(usize::from(consumer.available()) + held.len(), 16);
    }

    #[test]
    fn a_kernel_on_another_thread_sees_whole_entries() {
        const COUNT: u16 = 8;
        let rounds = if cfg!(miri) { 200 } else { 50_000 };
        let (mut buffers, mut consumer) = pair(COUNT, u16::MAX - 50);
        let (completions, completed) = mpsc::sync_channel(usize::from(COUNT));
        let kernel = std::thread::spawn(move || {
            let mut round = 0u32;
            while round < rounds {
                match consumer.take(4, round as u8) {
                    Some((id, _)) => {
                        completions.send((id, round as u8)).expect("the other side waits for all rounds");
                        round += 1;
                    }
                    None => std::thread::yield_now(),
                }
            }
        });
        for (id, mark) in completed.iter() {
            assert!(buffers.taken(id));
            assert_eq!(buffers.received(id, 4), Some(&[pattern(id, mark); 4][..]));
            assert!(buffers.give_back(id));
            buffers.publish();
        }
        kernel.join().expect("the kernel's part has no failure of its own");
        assert_eq!(buffers.lent(), 0);
    }

    #[test]
    fn the_first_fill_is_in_order_and_complete() {
        let (buffers, mut consumer) = pair(32, 0);
        assert_eq!(consumer.available(), 32);
        let ids: Vec<u16> = std::iter::from_fn(|| consumer.take(BUFFER_BYTES, 0)).map(|(id, _)| id).collect();
        assert_eq!(ids, (0..32).collect::<Vec<_>>());
        assert_eq!(buffers.lent(), 0, "no completion was told yet");
    }
}
