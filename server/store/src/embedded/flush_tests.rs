//! What is asked while a flush takes long: both generations and the index together are the whole truth.

use std::sync::Arc;

use ringline_schema::ids::{ConversationId, DeviceId, Seq};
use ringline_schema::message::DeviceKind;
use ringline_schema::record::{Change, Record};
use ringline_schema::rows::{DeviceRow, MarkRow, Row, RowKey, RowList, RowValue};

use super::tests::{Twins, lazy, open};
use super::*;
use crate::Store;
use crate::conformance::{Node as Shards, Pair, name};

/// A store whose flush begins at so many records and whose index the test can hold.
fn started(dir: &Path, flush_records_max: usize) -> (Shards, Arc<Node>) {
    let (handles, _) = EmbeddedStore::open(dir, 1, EmbeddedOptions { flush_records_max, ..lazy() }).unwrap();
    let node = Arc::clone(&handles[0].node);
    let handles = handles.into_iter().map(|handle| Box::new(handle) as Box<dyn Store>).collect();
    (Shards::new(handles), node)
}

#[test]
fn a_flush_that_takes_long_delays_no_answer_and_hides_nothing() {
    for seed in 20..24 {
        println!("seed {seed}");
        let dir = tempfile::tempdir().unwrap();
        let mut twins = Twins::new(seed);
        let (mut shards, node) = started(dir.path(), 300);
        for _ in 0..4 {
            let held = node.index.lock();
            while node.overlays[0].old().is_none() {
                twins.feed(&mut shards);
                twins.compare(&mut shards, true);
            }
            // At most 60 records a time: the young one does not fill up, which would have to wait.
            for _ in 0..3 {
                twins.feed(&mut shards);
                twins.compare(&mut shards, true);
            }
            drop(held);
            while node.overlays[0].old().is_some() {
                twins.compare(&mut shards, false);
            }
            twins.compare(&mut shards, true);
        }
        drop((shards, node));
        let (mut shards, _) = open(dir.path(), 2, &lazy());
        twins.compare(&mut shards, true);
    }
}

fn mark(number: u128, stamp: u64, value: Option<u64>) -> Row {
    let value = value.map(|muted_until_ms| RowValue::Mark(MarkRow { pinned: true, muted_until_ms }));
    Row { key: RowKey::Mark(name("ann"), ConversationId(number)), stamp, value }
}

fn change(rows: Vec<Row>) -> Record {
    Record::Change(Box::new(Change { message: None, rows }))
}

#[test]
fn what_is_younger_counts_while_the_older_is_being_written() {
    let (dir, pair, ann) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"), name("ann"));
    let (mut shards, node) = started(dir.path(), 12);
    let cursor = |device: u64, seq| {
        let (user, device, seq) = (ann.clone(), DeviceId(device), Seq(seq));
        Record::Cursor { user, device, conversation: pair.id, seq }
    };
    let device = |stamp, alive: bool| {
        let row = DeviceRow { kind: DeviceKind::Phone, agent: String::new(), first_ms: 1, last_ms: 1 };
        let value = alive.then_some(RowValue::Device(row));
        change(vec![Row { key: RowKey::Device(ann.clone(), DeviceId(1)), stamp, value }])
    };
    let held = node.index.lock();
    shards.commit(&[pair.record(), device(1, true), cursor(1, 9), cursor(2, 8)]);
    shards.commit(&[change((1..=8).map(|number| mark(number, 1, Some(1))).collect())]);
    while node.overlays[0].old().is_none() {
        std::thread::yield_now();
    }
    // Three of eight go, one changes, one comes again, and a device is dropped.
    shards.commit(&[change(vec![mark(1, 2, None), mark(3, 2, None), mark(4, 2, None), mark(2, 2, Some(5))])]);
    shards.commit(&[change(vec![mark(3, 3, Some(6))]), device(2, false)]);
    let wanted = [mark(2, 2, Some(5)), mark(3, 3, Some(6))].into_iter();
    let wanted: Vec<_> = wanted.chain((5..=8).map(|number| mark(number, 1, Some(1)))).collect();
    let look = |shards: &mut Shards| {
        for page in [1, 2, 3, 10] {
            assert_eq!(shards.rows(RowList::Marks(ann.clone()), page), wanted, "pages of {page}");
        }
        assert_eq!(shards.row(RowKey::Mark(ann.clone(), ConversationId(1))), None);
        let acked = [1, 2].map(|device| shards.conversations(&ann, DeviceId(device), 10)[0].acked.0);
        assert_eq!(acked, [0, 8], "the cursor of a dropped device does not come back");
    };
    look(&mut shards);
    drop(held);
    while node.overlays[0].old().is_some() {
        std::thread::yield_now();
    }
    look(&mut shards);
    drop((shards, node));
    look(&mut open(dir.path(), 1, &lazy()).0);
}

#[test]
fn a_full_generation_waits_for_the_one_before_and_loses_nothing() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut shards, node) = started(dir.path(), 10);
    let held = node.index.lock();
    let history = pair.history(100);
    let waiter = std::thread::spawn({
        let node = Arc::clone(&node);
        move || {
            while node.overlays[0].old().is_none() {
                std::thread::yield_now();
            }
        }
    });
    for batch in history.chunks(7) {
        shards.commit(batch);
    }
    waiter.join().unwrap();
    drop(held);
    crate::conformance::check(&mut shards, std::slice::from_ref(&pair), 100);
    shards.close();
    drop(node);
    crate::conformance::check(&mut open(dir.path(), 1, &lazy()).0, &[pair], 100);
}
