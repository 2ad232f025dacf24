//! Counts what each thread takes from the allocator; for measuring, behind the feature `count-allocations`.
//!
//! Counters are a thread's own, plain cells: counting costs a few instructions and shares nothing. Without the feature
//! nothing is wrapped and [`of_this_thread`] is `None`.

#![cfg_attr(feature = "count-allocations", allow(unsafe_code, reason = "the trait of allocators is unsafe"))]

/// What a thread has taken since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocations {
    pub allocations: u64,
    pub reallocations: u64,
    /// Asked for, by both; what was given back is not subtracted.
    pub bytes: u64,
}

/// The counts of the calling thread. `None`: this build does not count.
pub fn of_this_thread() -> Option<Allocations> {
    #[cfg(feature = "count-allocations")]
    return Some(counting::COUNTS.get());
    #[cfg(not(feature = "count-allocations"))]
    None
}

#[cfg(feature = "count-allocations")]
pub use counting::Counting;

#[cfg(feature = "count-allocations")]
mod counting {
    use std::alloc::{GlobalAlloc, Layout};
    use std::cell::Cell;

    use mimalloc::MiMalloc;

    use super::Allocations;

    thread_local! {
        // Made at compile time and without a destructor: reading it never allocates, not even at a thread's end.
        pub static COUNTS: Cell<Allocations> =
            const { Cell::new(Allocations { allocations: 0, reallocations: 0, bytes: 0 }) };
    }

    /// mimalloc, counted.
    pub struct Counting;

    fn count(allocations: u64, reallocations: u64, bytes: usize) {
        let was = COUNTS.get();
        COUNTS.set(Allocations {
            allocations: was.allocations.wrapping_add(allocations),
            reallocations: was.reallocations.wrapping_add(reallocations),
            bytes: was.bytes.wrapping_add(bytes as u64),
        });
    }

    // SAFETY: every call is passed on unchanged to mimalloc, which keeps the contract of `GlobalAlloc`; counting touches
    // only a cell of this thread, does not allocate and does not panic.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            count(1, 0, layout.size());
            // SAFETY: the caller's promise about `layout` is passed on.
            unsafe { MiMalloc.alloc(layout) }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            count(1, 0, layout.size());
            // SAFETY: as for `alloc`.
            unsafe { MiMalloc.alloc_zeroed(layout) }
        }

        unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            count(0, 1, size);
            // SAFETY: all memory given out by `self` is mimalloc's; the rest is the caller's promise, passed on.
            unsafe { MiMalloc.realloc(pointer, layout, size) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as for `realloc`.
            unsafe { MiMalloc.dealloc(pointer, layout) }
        }
    }
}

#[cfg(all(test, feature = "count-allocations"))]
mod tests {
    use super::*;

    #[test]
    fn each_thread_counts_its_own() {
        // The tests' own allocator is not wrapped: this asks the wrapper itself.
        use std::alloc::{GlobalAlloc, Layout};
        let layout = Layout::from_size_align(100, 8).unwrap();
        let before = of_this_thread().unwrap();
        // SAFETY: the layout is not empty; the block is grown and given back with the layout it has then.
        unsafe {
            let block = Counting.alloc(layout);
            let block = Counting.realloc(block, layout, 200);
            Counting.dealloc(block, Layout::from_size_align(200, 8).unwrap());
        }
        let after = of_this_thread().unwrap();
        assert_eq!((after.allocations - before.allocations, after.reallocations - before.reallocations), (1, 1));
        assert_eq!(after.bytes - before.bytes, 300);
        let elsewhere = std::thread::spawn(|| of_this_thread().unwrap()).join().unwrap();
        assert_eq!(elsewhere, Allocations::default());
    }
}
