//! `floor`: what this machine can do at all. A TCP echo on a bare ring, and a bare file that is appended to and synced.
//!
//! Main thread only; the echo runs in a process of its own. No server is closer to the machine than these two.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::compare::cli::{FloorArgs, FloorServerArgs};
use crate::{Failure, compare, floor_ring, tally};

/// A listen backlog that a burst of connects does not overrun.
const BACKLOG: i32 = 4_096;
/// Statfs type of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// What appending and syncing in batches of one size gave.
#[derive(Clone, Debug)]
struct Appended {
    records_per_s: f64,
    sync_us: Histogram<u64>,
}

/// Measures both and prints them.
pub fn floor(args: &FloorArgs) -> Result<bool, Failure> {
    let report = compare::echo(&args.load)?;
    print!("{}", report.text());
    let folder = args.data_dir.clone().unwrap_or_else(std::env::temp_dir);
    print!("{}", files(args, &folder)?);
    report.write_json(args.load.json.as_deref())?;
    Ok(report.lines().all(|line| line.is_clean()))
}

/// The table of the file.
fn files(args: &FloorArgs, folder: &Path) -> Result<String, Failure> {
    let failed =
        |error: io::Error| Failure::Failed(format!("cannot append to a file in {}: {error}", folder.display()));
    let in_memory = rustix::fs::statfs(folder).is_ok_and(|facts| facts.f_type as u64 == TMPFS_MAGIC);
    let warning = if in_memory { " (in memory: a sync costs nothing here)" } else { "" };
    let mut text = format!(
        "\n### A file in {}{warning}: {} byte records appended, then fdatasync\n\n| records a sync | records/s | \
         sync p50 µs | p99 µs | max µs |\n|--:|--:|--:|--:|--:|\n",
        folder.display(),
        args.record
    );
    for &batch in &args.batches {
        let size = (args.record as usize, batch as usize);
        let appended = append(folder, size, Duration::from_secs_f64(args.load.duration)).map_err(failed)?;
        let at = |quantile| appended.sync_us.value_at_quantile(quantile);
        let (p50, p99, max) = (at(0.5), at(0.99), appended.sync_us.max());
        let _ = writeln!(text, "| {batch} | {:.0} | {p50} | {p99} | {max} |", appended.records_per_s);
    }
    Ok(text)
}

/// Appends batches of (record bytes, records) for this long, each with one write and one sync.
fn append(folder: &Path, (record, records): (usize, usize), time: Duration) -> io::Result<Appended> {
    let file = tempfile::Builder::new().prefix("ringline-bench-").tempfile_in(folder)?;
    let mut log = OpenOptions::new().append(true).open(file.path())?;
    let batch = vec![0x5a; record.saturating_mul(records)];
    let mut sync_us = tally::histogram();
    let (begun, mut batches) = (Instant::now(), 0_u64);
    while begun.elapsed() < time {
        let started = Instant::now();
        log.write_all(&batch)?;
        log.sync_data()?;
        tally::record(&mut sync_us, 0, u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
        batches += 1;
    }
    let records_per_s = batches as f64 * records as f64 / begun.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
    Ok(Appended { records_per_s, sync_us })
}

/// Echoes until it is killed.
///
/// Errors: the address cannot be had, or the kernel cannot make such a ring.
pub fn serve(args: &FloorServerArgs) -> Result<Infallible, Failure> {
    let listen = || -> io::Result<Infallible> {
        let socket = Socket::new(Domain::for_address(args.listen), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(args.listen))?;
        socket.listen(BACKLOG)?;
        floor_ring::serve(socket.into())
    };
    listen().map_err(|error| Failure::Failed(format!("echo on {}: {error} (it needs kernel 6.1)", args.listen)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_is_counted_and_the_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let appended = append(folder.path(), (136, 16), Duration::from_millis(20)).unwrap();
        assert!(appended.records_per_s > 0.0 && !appended.sync_us.is_empty());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(append(&folder.path().join("absent"), (1, 1), Duration::ZERO).is_err());
    }
}
