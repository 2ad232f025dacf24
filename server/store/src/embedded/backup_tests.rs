//! Backups of a folder that is being written: what was acknowledged before one began is in it, and a server starts from it.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ringline_schema::ids::Seq;
use ringline_schema::record::{Query, Range, Record};

use super::backup::backup;
use super::offline::{Progress, check};
use super::retain_tests::settle;
use super::tests::{flip, lazy, open, record_offsets, segment, small};
use super::*;
use crate::conformance::{ALL, Pair, check as holds, committed};
use crate::{Lsn, Store};

fn quiet(_: Progress) {}

/// Writes one conversation until told to stop; `acked` is what was acknowledged.
fn write(mut store: EmbeddedShard, pair: &Pair, acked: &AtomicU64, stop: &AtomicBool) {
    store.append(&pair.record()).unwrap();
    committed(&mut store, Lsn(1));
    let (mut seq, mut events, mut last) = (0, Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        if store.append(&Record::Message(pair.message(seq + 1).into())).is_ok() {
            seq += 1;
        }
        store.submit();
        events.clear();
        store.poll(&mut events);
        for event in &events {
            if let crate::StoreEvent::Committed(Lsn(lsn)) = event {
                last = lsn - 1;
            }
        }
        acked.store(last, Ordering::Release);
        // So that the folder stays small however slow the rest is.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    store.close().unwrap();
}

#[test]
fn a_backup_under_load_holds_everything_acknowledged_before_it_began() {
    const BACKUPS: usize = 3;
    let dir = tempfile::tempdir().unwrap();
    let (handles, _) = EmbeddedStore::open(dir.path(), 2, small()).unwrap();
    let pairs = [Pair::new("ann", "bob"), Pair::new("cleo", "dan")];
    let acked = [AtomicU64::new(0), AtomicU64::new(0)];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for ((store, pair), acked) in handles.into_iter().zip(&pairs).zip(&acked) {
            let stop = &stop;
            scope.spawn(move || write(store, pair, acked, stop));
        }
        for _ in 0..BACKUPS {
            let before = acked.each_ref().map(|acked| acked.load(Ordering::Acquire));
            let to = tempfile::tempdir().unwrap();
            let report = backup(dir.path(), to.path(), &mut quiet).unwrap();
            assert_eq!(report.logs, 2);
            assert!(check(to.path(), &mut quiet).unwrap().is_whole());
            let (mut node, opened) = open(to.path(), 1, &small());
            assert!(opened.cuts.is_empty(), "{opened:?}");
            for (pair, before) in pairs.iter().zip(before) {
                let (_, head, _) = node.messages(pair.id, Range { limit: 1, ..ALL });
                assert!(head >= Seq(before), "{head} of {before}");
                // The copy goes on from where it is.
                node.commit(&[Record::Message(pair.message(head.0 + 1).into())]);
                if head.0 > 0 {
                    holds(&mut node, std::slice::from_ref(pair), head.0 + 1);
                }
            }
            node.close();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_backup_of_a_stopped_folder_is_the_same_and_goes_only_into_an_empty_folder() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &small());
    for records in pair.history(500).chunks(9) {
        node.commit(records);
        settle(&mut node);
    }
    node.close();
    fs::write(dir.path().join("issuer.pem"), "key").unwrap();
    let parent = tempfile::tempdir().unwrap();
    let to = parent.path().join("new");
    let report = backup(dir.path(), &to, &mut quiet).unwrap();
    assert!(report.records == 501 && report.segments > 1, "{report:?}");
    assert_eq!(fs::read_to_string(to.join("issuer.pem")).unwrap(), "key");
    let (mut node, _) = open(&to, 3, &small());
    holds(&mut node, &[pair], 500);
    drop(node);
    assert!(matches!(backup(dir.path(), &to, &mut quiet), Err(OpenError::Io { .. })), "not into a folder in use");
    assert!(matches!(backup(parent.path(), &parent.path().join("x"), &mut quiet), Err(OpenError::NoDataFolder { .. })));
}

#[test]
fn a_backup_that_meets_an_error_of_the_disk_says_so_and_is_not_started_from() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &small());
    for records in pair.history(500).chunks(9) {
        node.commit(records);
        settle(&mut node);
    }
    node.close();
    // What can be opened and not be read.
    let path = segment(dir.path(), 0, 2);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let to = tempfile::tempdir().unwrap();
    assert!(matches!(backup(dir.path(), to.path(), &mut quiet), Err(OpenError::Io { path: at, .. }) if at == path));
    assert!(matches!(EmbeddedStore::open(to.path(), 1, small()), Err(OpenError::UnfinishedBackup { .. })));
}

#[test]
fn a_backup_refuses_damage_and_an_unfinished_one_is_not_started_from() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &lazy());
    for record in pair.history(20) {
        node.commit(&[record]);
    }
    node.close();
    let path = segment(dir.path(), 0, 1);
    let offset = record_offsets(&path)[7];
    flip(&path, u64::from(offset) + 20);
    let to = tempfile::tempdir().unwrap();
    match backup(dir.path(), to.path(), &mut quiet) {
        Err(OpenError::Damaged { offset: at, .. }) => assert_eq!(at, offset),
        other => panic!("{other:?}"),
    }
    assert!(matches!(EmbeddedStore::open(to.path(), 1, small()), Err(OpenError::UnfinishedBackup { .. })));
}

/// Files below a folder that this process has open.
fn open_below(folder: &Path) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.starts_with(folder)).count()
}

#[test]
fn however_many_segments_there_are_few_are_open() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &small());
    for records in pair.history(6_000).chunks(10) {
        node.commit(records);
        // The index thread makes the next file ready: a segment is as long as it should be once it has.
        node.ask(pair.one.partition(), Query::User { name: pair.one.clone() });
    }
    node.close();
    let folder = fs::canonicalize(dir.path()).unwrap();
    let (to, mut most) = (tempfile::tempdir().unwrap(), 0);
    let report = backup(dir.path(), to.path(), &mut |_| most = most.max(open_below(&folder))).unwrap();
    assert!(report.segments > 20, "{report:?}");
    assert!((1..=10).contains(&most), "{most} files were open at once");
    let (mut node, _) = open(to.path(), 1, &small());
    holds(&mut node, &[pair], 6_000);
}

#[test]
fn a_disk_that_fails_under_a_backup_is_told_and_the_copy_is_not_started_from() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &small());
    for records in pair.history(1_000).chunks(9) {
        node.commit(records);
        settle(&mut node);
    }
    node.close();
    for writes in 0.. {
        let to = tempfile::tempdir().unwrap();
        super::backup::WRITES_LEFT.set(Some(writes));
        let made = backup(dir.path(), to.path(), &mut quiet);
        super::backup::WRITES_LEFT.set(None);
        let opened = EmbeddedStore::open(to.path(), 1, small());
        match made {
            Ok(_) => {
                assert!(writes > 4 && opened.is_ok(), "{writes} writes");
                break;
            }
            Err(OpenError::Io { path, source }) => {
                assert_eq!(
                    (path.as_path(), source.raw_os_error()),
                    (to.path(), Some(rustix::io::Errno::IO.raw_os_error()))
                );
            }
            Err(other) => panic!("{other:?}"),
        }
        assert!(matches!(opened, Err(OpenError::UnfinishedBackup { .. })), "{writes} writes");
        let told = opened.err().unwrap().to_string();
        assert!(told.contains("a backup that did not come to its end"), "{told}");
        assert!(matches!(check(to.path(), &mut quiet), Err(OpenError::UnfinishedBackup { .. })));
    }
}
