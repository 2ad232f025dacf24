//! The `ringline` binary: an allocator and the command line.

use std::process::ExitCode;

#[cfg(not(feature = "count-allocations"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[cfg(feature = "count-allocations")]
#[global_allocator]
static ALLOCATOR: ringline::allocations::Counting = ringline::allocations::Counting;

fn main() -> ExitCode {
    ringline::cli::run()
}
