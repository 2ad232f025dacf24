//! A disk that is really full: a small file system in memory, filled by somebody else and emptied again. Without the
//! right to mount one there is nothing to test on, and the test says so.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ringline_schema::record::Record;

use super::tests::{open, small};
use super::*;
use crate::conformance::{Pair, check};
use crate::{Lsn, Store, StoreError, StoreEvent};

/// How long anything here may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);

/// A mounted file system, unmounted at the end.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(mib: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(dir)),
            Ok(output) => {
                println!("skipped: cannot mount: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(error) => {
                println!("skipped: cannot mount: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all room that is left but so many bytes.
    fn fill(&self, leave_bytes: u64) {
        let found = rustix::fs::statvfs(self.path()).unwrap();
        let free = found.f_bavail * found.f_frsize;
        let mut file = fs::File::create(self.path().join("filler")).unwrap();
        let mut left = free.saturating_sub(leave_bytes);
        let chunk = vec![1; 64 * 1024];
        while left > 0 {
            let step = left.min(chunk.len() as u64);
            if file.write_all(&chunk[..step as usize]).is_err() {
                break;
            }
            left -= step;
        }
    }

    fn empty(&self) {
        fs::remove_file(self.path().join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn wait_until(store: &mut EmbeddedShard, full: bool) -> u64 {
    let started = Instant::now();
    let mut committed = 0;
    while store.is_disk_full() != full {
        assert!(started.elapsed() < PATIENCE, "it does not become {full}");
        std::thread::sleep(Duration::from_millis(2));
        committed = committed.max(turn(store));
    }
    committed
}

/// One turn of a reactor; the highest record that is durable now.
fn turn(store: &mut EmbeddedShard) -> u64 {
    let mut events = Vec::new();
    store.submit();
    store.poll(&mut events);
    assert!(!events.contains(&StoreEvent::Failed), "a full disk is no failure");
    events.iter().map(|event| if let StoreEvent::Committed(Lsn(lsn)) = event { *lsn } else { 0 }).max().unwrap_or(0)
}

#[test]
fn a_full_disk_is_said_loses_nothing_and_is_over_when_there_is_room() {
    const MIB: u64 = 1024 * 1024;
    let Some(disk) = Disk::new(160) else { return };
    let dir = disk.path().join("data");
    let pair = Pair::new("ann", "bob");
    let options = EmbeddedOptions { free_bytes_min: 4 * MIB, segment_bytes: 4 * MIB, ..small() };
    let (mut handles, _) = EmbeddedStore::open(&dir, 1, options.clone()).unwrap();
    let mut store = handles.remove(0);
    store.append(&pair.record()).unwrap();
    let (mut seq, mut durable) = (0, 0);
    // Twice: with less room than is kept free, and with none at all.
    for leave_bytes in [2 * MIB, 0] {
        disk.fill(leave_bytes);
        let started = Instant::now();
        // Somebody who does not look goes on appending; only the log's reserved room bounds it.
        while !store.is_disk_full() || seq % 5_000 != 0 {
            assert!(started.elapsed() < PATIENCE);
            match store.append(&Record::Message(pair.message(seq + 1).into())) {
                Ok(_) => seq += 1,
                Err(StoreError::Full) if store.is_disk_full() => break,
                Err(StoreError::Full) => {}
                Err(error) => panic!("{error}"),
            }
            durable = durable.max(turn(&mut store));
        }
        assert!(store.is_disk_full());
        disk.empty();
        durable = durable.max(wait_until(&mut store, false));
    }
    let started = Instant::now();
    while durable < seq + 1 {
        assert!(started.elapsed() < PATIENCE);
        durable = durable.max(turn(&mut store));
    }
    store.close().unwrap();
    drop(store);
    let (mut node, report) = open(&dir, 1, &options);
    assert!(report.clean_stop && report.cuts.is_empty(), "{report:?}");
    check(&mut node, &[pair], seq);
}

#[test]
fn a_segment_that_does_not_fit_is_put_off_and_made_when_it_does() {
    const MIB: u64 = 1024 * 1024;
    let Some(disk) = Disk::new(160) else { return };
    let dir = disk.path().join("data");
    // By turns, so that no two messages become one record.
    let pairs = [Pair::new("ann", "bob"), Pair::new("ann", "cleo")];
    let message = |number: u64| Record::Message(pairs[(number % 2) as usize].message(number / 2 + 1).into());
    // Nothing is kept free: only the segment itself meets the full disk.
    let options = EmbeddedOptions {
        free_bytes_min: 0,
        segment_bytes: MIB,
        flush_records_max: usize::MAX,
        flush_interval_ms: 1 << 30,
        ..small()
    };
    let (mut handles, _) = EmbeddedStore::open(&dir, 1, options.clone()).unwrap();
    let mut store = handles.remove(0);
    for pair in &pairs {
        store.append(&pair.record()).unwrap();
    }
    disk.fill(0);
    let (mut number, started) = (0, Instant::now());
    loop {
        assert!(started.elapsed() < PATIENCE);
        match store.append(&message(number)) {
            Ok(_) => number += 1,
            Err(StoreError::Full) if store.is_disk_full() && !store.log.is_writing() => break,
            Err(StoreError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        turn(&mut store);
    }
    assert!(!dir.join("log/00/0000000002.new").exists(), "what it took of the disk is given back");
    disk.empty();
    wait_until(&mut store, false);
    let end = number.next_multiple_of(2) + 2;
    while number < end {
        number += u64::from(store.append(&message(number)).is_ok());
        assert!(started.elapsed() < PATIENCE);
        turn(&mut store);
    }
    store.close().unwrap();
    drop(store);
    let (mut node, _) = open(&dir, 1, &options);
    check(&mut node, &pairs, end / 2);
}
