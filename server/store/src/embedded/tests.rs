//! The embedded store against crashes, damage and a model: the memory store.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use ringline_schema::disk::BURST_BYTES_MAX;
use ringline_schema::ids::{DeviceId, DeviceKey, Seq};
use ringline_schema::record::{Answer, Query, Range, Record, StoredMessage, User};

use super::ring::Fault;
use super::*;
use crate::conformance::{self, ALL, Node as Shards, Pair, answers, check, committed, name};
use crate::{LoadToken, Lsn, Store, StoreError, StoreEvent, memory};

/// Small segments and frequent flushes, so that short tests cross every boundary.
pub(super) fn small() -> EmbeddedOptions {
    EmbeddedOptions {
        segment_bytes: 16 * 1024,
        flush_records_max: 100,
        flush_interval_ms: 5,
        index_cache_bytes: 1 << 20,
        index_memtable_bytes: 1 << 20,
        ..EmbeddedOptions::default()
    }
}

/// Large segments and no flush but at close, so that everything unclean has to be replayed.
pub(super) fn lazy() -> EmbeddedOptions {
    EmbeddedOptions { segment_bytes: 1 << 20, flush_records_max: usize::MAX, flush_interval_ms: 1 << 30, ..small() }
}

pub(super) fn open(dir: &Path, shards: u16, options: &EmbeddedOptions) -> (Shards, OpenReport) {
    let (handles, report) = EmbeddedStore::open(dir, shards, options.clone()).unwrap();
    (Shards::new(handles.into_iter().map(|handle| Box::new(handle) as Box<dyn Store>).collect()), report)
}

fn open_error(dir: &Path) -> OpenError {
    match EmbeddedStore::open(dir, 1, lazy()) {
        Ok(_) => panic!("it opened"),
        Err(error) => error,
    }
}

/// A running store may rename a file between the listing and the copy: what is gone is left out.
pub(super) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else if let Err(error) = fs::copy(entry.path(), target) {
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        }
    }
}

pub(super) fn segment(dir: &Path, log: u16, number: u32) -> PathBuf {
    Segments::new(dir.join("log")).path(log, number)
}

/// Where each record of a segment begins, and where the last ends.
pub(super) fn record_offsets(path: &Path) -> Vec<u32> {
    let dir = path.parent().unwrap().parent().unwrap();
    let number = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    let segment = Segments::new(dir.to_owned()).get(0, number).unwrap();
    let mut scanner = scan::Scanner::to_end(segment, format::SEGMENT_HEADER_BYTES).unwrap();
    let mut offsets = vec![scanner.offset()];
    while let scan::Found::Record { .. } = scanner.next().unwrap() {
        offsets.push(scanner.offset());
    }
    offsets
}

pub(super) fn flip(path: &Path, offset: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn passes_the_conformance_suite() {
    for options in [EmbeddedOptions { segment_bytes: 1 << 20, ..EmbeddedOptions::default() }, small()] {
        for case in conformance::CASES {
            let dir = tempfile::tempdir().unwrap();
            (case.check)(&mut |shards| {
                let (handles, report) = EmbeddedStore::open(dir.path(), shards, options.clone()).unwrap();
                assert!(report.clean_stop && report.cuts.is_empty(), "{}: {report:?}", case.name);
                assert_eq!(report.replayed_records, 0, "{}", case.name);
                handles.into_iter().map(|handle| Box::new(handle) as Box<dyn Store>).collect()
            });
        }
    }
}

/// A node of each kind, fed and asked the same.
pub(super) struct Twins {
    rng: SmallRng,
    model: memory::MemoryStore,
    pairs: Vec<Pair>,
    heads: Vec<u64>,
}

impl Twins {
    pub(super) fn new(seed: u64) -> Self {
        let pairs: Vec<_> = (0..12)
            .map(|number| Pair::new(&format!("user {}", number % 4), &format!("user {}", number * 5 % 7)))
            .collect();
        let mut unique: Vec<Pair> = Vec::new();
        for pair in pairs {
            if unique.iter().all(|kept| kept.id != pair.id) {
                unique.push(pair);
            }
        }
        let heads = vec![0; unique.len()];
        Self { rng: SmallRng::seed_from_u64(seed), model: memory::open(1).remove(0), pairs: unique, heads }
    }

    fn records(&mut self) -> Vec<Record> {
        let mut records = Vec::new();
        for _ in 0..self.rng.random_range(1..60) {
            let at = self.rng.random_range(0..self.pairs.len());
            let pair = &self.pairs[at];
            let record = match self.rng.random_range(0..20) {
                0 => Record::User(User {
                    name: pair.one.clone(),
                    password_hash: Some(format!("hash {}", self.heads[at])),
                    created_ms: 1,
                }),
                1 => Record::Cursor {
                    user: pair.one.clone(),
                    device: DeviceId(self.rng.random_range(1..3)),
                    conversation: pair.id,
                    seq: Seq(self.rng.random_range(0..=self.heads[at])),
                },
                _ if self.heads[at] == 0 => {
                    records.push(pair.record());
                    self.heads[at] = 1;
                    Record::Message(pair.message(1).into())
                }
                _ => {
                    self.heads[at] += 1;
                    let mut message = pair.message(self.heads[at]);
                    if self.rng.random_range(0..3) == 0 {
                        (message.from, message.to) = (pair.other.clone(), pair.one.clone());
                    }
                    message.device = DeviceId(self.rng.random_range(1..3));
                    Record::Message(message.into())
                }
            };
            records.push(record);
        }
        records
    }

    pub(super) fn feed(&mut self, node: &mut Shards) {
        let records = self.records();
        for record in &records {
            self.model.append(record).unwrap();
        }
        self.model.submit();
        self.model.poll(&mut Vec::new());
        node.commit(&records);
    }

    fn query(&mut self) -> (ringline_schema::ids::Partition, Query) {
        let pair = self.pairs[self.rng.random_range(0..self.pairs.len())].clone();
        let device = DeviceKey::new(&pair.one, DeviceId(self.rng.random_range(1..3)));
        match self.rng.random_range(0..3) {
            0 => (pair.one.partition(), Query::User { name: pair.one }),
            1 => (pair.id.partition(), Query::Head { conversation: pair.id, device }),
            _ => {
                let range = Range {
                    after: Seq(self.rng.random_range(0..200)),
                    before: Some(Seq(self.rng.random_range(0..400))).filter(|seq| seq.0 > 50),
                    limit: self.rng.random_range(0..100),
                    bytes_max: self.rng.random_range(0..5000),
                    newest: self.rng.random(),
                };
                (pair.id.partition(), Query::Messages { conversation: pair.id, range, reader: None })
            }
        }
    }

    fn model_answer(&mut self, query: Query) -> Answer {
        self.model.load(LoadToken(0), query).unwrap();
        answers(&mut self.model, 1).remove(0).1
    }

    pub(super) fn compare(&mut self, node: &mut Shards, lists: bool) {
        for _ in 0..40 {
            let (partition, query) = self.query();
            let wanted = self.model_answer(query.clone());
            assert_eq!(node.ask(partition, query.clone()), wanted, "{query:?}");
        }
        for number in 0..if lists { 7 } else { 0 } {
            let user = name(&format!("user {number}"));
            let device = DeviceKey::new(&user, DeviceId(1));
            let query = Query::Conversations { user: user.clone(), device, cursor: conformance::FIRST, limit: 9 };
            let wanted = self.model_answer(query.clone());
            assert_eq!(node.ask(user.partition(), query), wanted);
        }
    }
}

#[test]
fn random_histories_with_crashes_restarts_and_lost_indexes_equal_the_model() {
    for seed in 0..5 {
        println!("seed {seed}");
        let dir = tempfile::tempdir().unwrap();
        let mut twins = Twins::new(seed);
        for _ in 0..8 {
            let shards = twins.rng.random_range(1..4);
            let options = if twins.rng.random() { small() } else { lazy() };
            let (mut node, report) = open(dir.path(), shards, &options);
            assert_eq!(report.cuts, []);
            twins.compare(&mut node, true);
            for _ in 0..twins.rng.random_range(1..12) {
                twins.feed(&mut node);
                twins.compare(&mut node, false);
            }
            match twins.rng.random_range(0..3) {
                0 => node.close(),
                1 => drop(node),
                _ => {
                    drop(node);
                    fs::remove_dir_all(dir.path().join("index")).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_torn_tail_is_cut_at_every_byte_of_the_last_record() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &EmbeddedOptions { segment_bytes: 8192, ..lazy() });
    node.commit(&pair.history(4));
    node.commit(&[Record::Message(pair.message(5).into())]);
    drop(node);
    let path = segment(dir.path(), 0, 1);
    let offsets = record_offsets(&path);
    let (start, end) = (offsets[offsets.len() - 2], offsets[offsets.len() - 1]);
    let whole = fs::read(&path).unwrap();
    let length = u32::from_le_bytes(*whole[start as usize..].first_chunk().unwrap());
    let unpadded = start as usize + 8 + length as usize;
    for keep in start..end {
        let torn = tempfile::tempdir().unwrap();
        copy(dir.path(), torn.path());
        let mut bytes = whole.clone();
        // By turns, what a crash can leave: zeros behind the torn place, or the end of the file.
        bytes[keep as usize..].fill(0);
        bytes.truncate(if keep % 2 == 0 { bytes.len() } else { keep as usize });
        let damaged = bytes[start as usize..].iter().any(|&byte| byte != 0);
        // The padding behind the last payload byte is not part of the record.
        let complete = bytes.get(start as usize..unpadded) == whole.get(start as usize..unpadded);
        fs::write(segment(torn.path(), 0, 1), bytes).unwrap();
        let (mut node, report) = open(torn.path(), 1, &lazy());
        assert!(!report.clean_stop);
        let head = if complete { 5 } else { 4 };
        assert_eq!(report.replayed_records, head + 1, "kept {keep}");
        assert_eq!(report.cuts.len(), usize::from(damaged && !complete), "kept {keep}: {report:?}");
        check(&mut node, std::slice::from_ref(&pair), head);
        node.commit(&[Record::Message(pair.message(head + 1).into())]);
        drop(node);
        let (mut node, report) = open(torn.path(), 1, &lazy());
        assert_eq!(report.cuts, []);
        check(&mut node, std::slice::from_ref(&pair), head + 1);
    }
}

#[test]
fn messages_of_one_record_come_and_go_together() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &lazy());
    node.commit(&pair.history(3));
    for seq in 4..=80 {
        node.shards[0].append(&Record::Message(pair.message(seq).into())).unwrap();
    }
    committed(node.shards[0].as_mut(), Lsn(81));
    check(&mut node, std::slice::from_ref(&pair), 80);
    drop(node);
    let path = segment(dir.path(), 0, 1);
    let offsets = record_offsets(&path);
    assert!((5..8).contains(&offsets.len()), "the run, the conversation and few records of messages: {offsets:?}");
    let last = offsets[offsets.len() - 2];
    assert!(offsets.windows(2).all(|pair| pair[1] - pair[0] <= BURST_BYTES_MAX as u32 + 20), "{offsets:?}");
    flip(&path, u64::from(last) + 20);
    let (mut node, report) = open(dir.path(), 1, &lazy());
    assert_eq!(report.cuts.iter().map(|cut| cut.offset).collect::<Vec<_>>(), [last]);
    let head = report.replayed_records - 1;
    assert!((3..80).contains(&head), "{report:?}");
    check(&mut node, std::slice::from_ref(&pair), head);
    let (_, _, inner) = node.messages(pair.id, Range { after: Seq(head - 2), limit: 1, ..ALL });
    assert_eq!(inner, [pair.message(head - 1)], "one out of the middle of a record");
}

#[test]
fn the_remains_of_a_torn_batch_never_come_back() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &lazy());
    node.commit(&pair.history(3));
    // One batch of six, a cursor behind each; the second message is lost, what is after it reached the disk.
    for seq in 4..=9 {
        node.shards[0].append(&Record::Message(pair.message(seq).into())).unwrap();
        let (user, device, seq) = (pair.other.clone(), DeviceId(1), Seq(seq));
        node.shards[0].append(&Record::Cursor { user, device, conversation: pair.id, seq }).unwrap();
    }
    committed(node.shards[0].as_mut(), Lsn(16));
    drop(node);
    let path = segment(dir.path(), 0, 1);
    let offsets = record_offsets(&path);
    // Before it: the run, the conversation, three messages that are one record, a message, a cursor.
    flip(&path, u64::from(offsets[5]) + 20);
    let (mut node, report) = open(dir.path(), 1, &lazy());
    assert_eq!(report.cuts.len(), 1);
    assert_eq!(report.cuts[0].offset, offsets[5]);
    check(&mut node, std::slice::from_ref(&pair), 4);
    node.commit(&[Record::Message(pair.message(5).into())]);
    drop(node);
    let (mut node, _) = open(dir.path(), 1, &lazy());
    check(&mut node, std::slice::from_ref(&pair), 5);
}

#[test]
fn damage_before_a_readable_batch_is_refused_with_file_and_offset() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &lazy());
    for record in pair.history(20) {
        node.commit(&[record]);
    }
    drop(node);
    let path = segment(dir.path(), 0, 1);
    let offsets = record_offsets(&path);
    for at in 0..20 {
        let copied = tempfile::tempdir().unwrap();
        copy(dir.path(), copied.path());
        let path = segment(copied.path(), 0, 1);
        flip(&path, u64::from(offsets[at]) + at as u64);
        match open_error(copied.path()) {
            OpenError::Damaged { file, offset, what } => assert_eq!((file, offset), (path, offsets[at]), "{what}"),
            other => panic!("{other}"),
        }
        // A whole page of zeros is damage as well.
        let file = fs::OpenOptions::new().write(true).open(segment(copied.path(), 0, 1)).unwrap();
        file.write_all_at(&vec![0; (offsets[at + 1] - offsets[at]) as usize], u64::from(offsets[at])).unwrap();
        assert!(matches!(open_error(copied.path()), OpenError::Damaged { offset, .. } if offset == offsets[at]));
    }
}

#[test]
fn damage_that_the_index_has_passed_is_answered_failed_and_found_at_a_rebuild() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &lazy());
    for record in pair.history(20) {
        node.commit(&[record]);
    }
    node.close();
    let path = segment(dir.path(), 0, 1);
    let offset = record_offsets(&path)[11];
    flip(&path, u64::from(offset) + 40);
    let (mut node, _) = open(dir.path(), 1, &lazy());
    let query = |range| Query::Messages { conversation: pair.id, range, reader: None };
    assert_eq!(node.ask(pair.id.partition(), query(ALL)), Answer::Failed);
    assert_eq!(node.messages(pair.id, Range { limit: 9, ..ALL }).2.len(), 9, "the rest stays readable");
    node.close();
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    assert!(matches!(open_error(dir.path()), OpenError::Damaged { offset: at, .. } if at == offset));
}

#[test]
fn missing_files_and_records_of_a_newer_version_are_refused() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 2, &small());
    for record in pair.history(1000) {
        node.commit(&[record]);
    }
    node.close();
    let log = pair.id.partition().number() % 2;
    assert!(segment(dir.path(), log, 3).exists(), "the log has rolled");
    for lost in [
        segment(dir.path(), log, 1),
        segment(dir.path(), log, 2),
        segment(dir.path(), log, 1).parent().unwrap().to_owned(),
    ] {
        let copied = tempfile::tempdir().unwrap();
        copy(dir.path(), copied.path());
        let lost = copied.path().join(lost.strip_prefix(dir.path()).unwrap());
        if lost.is_dir() {
            fs::remove_dir_all(&lost).unwrap()
        } else {
            fs::remove_file(&lost).unwrap()
        }
        assert!(matches!(open_error(copied.path()), OpenError::Damaged { .. }));
    }

    let (dir, options) = (tempfile::tempdir().unwrap(), lazy());
    let (mut node, _) = open(dir.path(), 1, &options);
    node.commit(&pair.history(3));
    drop(node);
    let path = segment(dir.path(), 0, 1);
    let end = *record_offsets(&path).last().unwrap();
    let opened = Segments::new(dir.path().join("log")).get(0, 1).unwrap();
    let mut bytes = rkyv::util::AlignedVec::new();
    let start = format::begin(&mut bytes);
    let kind = format::Kind::Record(ringline_schema::disk::RecordType::User);
    let stamp = format::Stamp { kind, first_of_batch: true, partition: 5000, salt: opened.header.salt, offset: end };
    format::finish(&mut bytes, start, stamp);
    opened.file.write_all_at(&bytes, u64::from(end)).unwrap();
    let error = open_error(dir.path());
    assert!(matches!(&error, OpenError::Damaged { offset, .. } if *offset == end), "{error}");
}

#[test]
fn a_copy_taken_while_it_runs_has_everything_committed() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &small());
    let history = pair.history(900);
    for (number, records) in history.chunks(50).enumerate() {
        node.commit(records);
        if number % 3 == 0 {
            // Only the logs: an index is not copied in one instant, and is rebuilt.
            let copied = tempfile::tempdir().unwrap();
            copy(&dir.path().join("log"), &copied.path().join("log"));
            fs::copy(dir.path().join(FORMAT_FILE), copied.path().join(FORMAT_FILE)).unwrap();
            let (mut other, report) = open(copied.path(), 1, &small());
            assert!(report.index_rebuilt.is_some() && !report.clean_stop);
            check(&mut other, std::slice::from_ref(&pair), ((number as u64 + 1) * 50 - 1).min(900));
        }
    }
}

#[test]
fn a_damaged_or_foreign_index_is_rebuilt() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &small());
    node.commit(&pair.history(300));
    node.close();
    let other = tempfile::tempdir().unwrap();
    open(other.path(), 1, &small()).0.close();

    let index = dir.path().join("index");
    fs::remove_dir_all(&index).unwrap();
    copy(&other.path().join("index"), &index);
    let (mut node, report) = open(dir.path(), 1, &small());
    assert_eq!(report.index_rebuilt.as_deref(), Some("the index belongs to another data folder or version"));
    assert_eq!(report.replayed_records, 301);
    check(&mut node, std::slice::from_ref(&pair), 300);
    node.close();

    for entry in fs::read_dir(&index).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::write(path, b"no longer what it was").unwrap();
        }
    }
    let (mut node, report) = open(dir.path(), 1, &small());
    assert!(report.index_rebuilt.is_some(), "{report:?}");
    check(&mut node, std::slice::from_ref(&pair), 300);
    node.close();
}

#[test]
fn an_unclean_stop_replays_only_what_the_index_lacks() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, report) = open(dir.path(), 1, &lazy());
    assert!(report.clean_stop && report.index_rebuilt.is_none());
    node.commit(&pair.history(99));
    node.close();
    let (mut node, report) = open(dir.path(), 1, &lazy());
    assert!(report.clean_stop);
    assert_eq!(report.replayed_records, 0);
    node.commit(&[Record::Message(pair.message(100).into()), Record::Message(pair.message(101).into())]);
    drop(node);
    let (mut node, report) = open(dir.path(), 1, &lazy());
    assert!(!report.clean_stop);
    assert_eq!((report.replayed_records, report.cuts.len()), (2, 0));
    check(&mut node, std::slice::from_ref(&pair), 101);
}

#[test]
fn logs_roll_and_old_segments_stay_readable() {
    for zero_segments in [false, true] {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
        let options = EmbeddedOptions { segment_bytes: 4096, zero_segments, ..small() };
        let (mut node, _) = open(dir.path(), 1, &options);
        for records in pair.history(1500).chunks(10) {
            node.commit(records);
        }
        check(&mut node, std::slice::from_ref(&pair), 1500);
        drop(node);
        let (mut node, report) = open(dir.path(), 1, &options);
        assert_eq!(report.cuts, []);
        check(&mut node, std::slice::from_ref(&pair), 1500);
        assert!(segment(dir.path(), 0, 2).exists());
    }
}

#[test]
fn a_failed_write_poisons_and_nothing_is_acknowledged_after_it() {
    for error in [libc::EIO, libc::ENOSPC, libc::ECANCELED] {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
        let (mut handles, _) = EmbeddedStore::open(dir.path(), 1, lazy()).unwrap();
        let mut store = handles.remove(0);
        for record in pair.history(3) {
            store.append(&record).unwrap();
        }
        committed(&mut store, Lsn(4));
        store.log.ring().faults.extend([Fault::Short(5), Fault::Error(error)]);
        store.append(&Record::Message(pair.message(4).into())).unwrap();
        store.submit();
        store.append(&Record::Message(pair.message(5).into())).unwrap();
        let mut events = Vec::new();
        while events.is_empty() {
            store.log.wait().unwrap();
            store.poll(&mut events);
        }
        assert_eq!(events, [StoreEvent::Failed]);
        assert!(matches!(store.append(&pair.record()), Err(StoreError::Poisoned)));
        store.submit();
        let query = Query::Messages { conversation: pair.id, range: ALL, reader: None };
        store.load(LoadToken(1), query).unwrap();
        let Answer::Messages { messages, .. } = answers(&mut store, 1).remove(0).1 else { panic!() };
        assert_eq!(messages.len(), 3, "what was committed is still answered, and nothing else");
        assert!(matches!(store.close(), Err(StoreError::Poisoned)));
        store.poll(&mut events);
        assert_eq!(events, [StoreEvent::Failed], "said once, and nothing committed after it");
        drop(store);
        // The write that failed may have been made; what was never acknowledged may be there, what was must be.
        let (mut node, report) = open(dir.path(), 1, &lazy());
        assert!(!report.clean_stop);
        assert!(node.messages(pair.id, ALL).1 >= Seq(3));
    }
}

#[test]
fn a_segment_that_cannot_be_prepared_stops_the_shard() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut handles, _) = EmbeddedStore::open(dir.path(), 1, small()).unwrap();
    let mut store = handles.remove(0);
    // A folder where the next segment should be.
    fs::create_dir(segment(dir.path(), 0, 2).with_extension("new")).unwrap();
    let (mut events, mut seq) = (Vec::new(), 0);
    while !events.contains(&StoreEvent::Failed) {
        seq += 1;
        assert!(seq < 1_000_000);
        let appended = store.append(&Record::Message(pair.message(seq).into()));
        if matches!(appended, Err(StoreError::Poisoned | StoreError::Full)) {
            seq -= 1;
        }
        store.submit();
        store.log.wait().unwrap();
        store.poll(&mut events);
    }
    assert!(matches!(store.append(&pair.record()), Err(StoreError::Poisoned)));
}

#[test]
fn an_index_that_lags_pushes_back_and_recovers() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let options = EmbeddedOptions { index_lag_bytes_max: 0, ..small() };
    let (mut handles, _) = EmbeddedStore::open(dir.path(), 1, options).unwrap();
    let mut store = handles.remove(0);
    // Hold the overlay, as a slow flush would hold the index thread.
    let node = Arc::clone(&store.node);
    let held = node.overlays[0].young();
    let lsn = store.append(&Record::Message(pair.message(1).into())).unwrap();
    committed(&mut store, lsn);
    assert!(store.stats().index_lag_bytes > 0);
    assert!(matches!(store.append(&Record::Message(pair.message(2).into())), Err(StoreError::Full)));
    drop(held);
    while store.append(&Record::Message(pair.message(2).into())).is_err() {
        std::thread::yield_now();
    }
    assert_eq!((store.stats().commits, store.stats().records), (1, 1));
    store.close().unwrap();
    drop((store, node));
    let (mut node, _) = open(dir.path(), 1, &small());
    check(&mut node, &[pair], 2);
}

#[test]
fn a_segment_that_comes_late_is_taken_into_use() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let options = EmbeddedOptions { segment_bytes: 4096, ..small() };
    let (mut handles, _) = EmbeddedStore::open(dir.path(), 1, options).unwrap();
    let mut store = handles.remove(0);
    let node = Arc::clone(&store.node);
    let held = node.overlays[0].young();
    let message = |seq| {
        let mut message = pair.message(seq);
        message.body = vec![b'x'; 100_000].into();
        Record::Message(message.into())
    };
    let mut seq = 0;
    while let Ok(lsn) = store.append(&message(seq + 1)) {
        seq += 1;
        committed(&mut store, lsn);
    }
    assert!(seq > 1, "a segment may grow beyond its size while there is no other");
    drop(held);
    let mut waits = 0;
    while store.append(&message(seq + 1)).is_err() {
        waits += 1;
        assert!(waits < 100_000, "it stays full");
        store.submit();
        store.poll(&mut Vec::new());
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    store.close().unwrap();
    drop((store, node));
    let (mut node, report) = open(dir.path(), 1, &small());
    assert!(report.clean_stop);
    assert_eq!(node.messages(pair.id, ALL).2.len() as u64, seq + 1);
}

#[test]
fn the_wake_descriptor_tells_of_commits_and_answers() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut handles, _) = EmbeddedStore::open(dir.path(), 1, small()).unwrap();
    let mut store = handles.remove(0);
    let readable = |store: &EmbeddedShard| {
        use rustix::event::{PollFd, PollFlags, poll};
        let wake = store.wake_fd().unwrap();
        let mut wanted = [PollFd::new(&wake, PollFlags::IN)];
        poll(&mut wanted, None).unwrap();
        rustix::io::read(wake, &mut [0u8; 8]).unwrap();
    };
    store.append(&pair.record()).unwrap();
    store.submit();
    readable(&store);
    let mut events = Vec::new();
    store.poll(&mut events);
    assert_eq!(events, [StoreEvent::Committed(Lsn(1))]);
    store.load(LoadToken(9), Query::User { name: pair.one }).unwrap();
    readable(&store);
    store.poll(&mut events);
    assert_eq!(events.last(), Some(&StoreEvent::Loaded(LoadToken(9), Answer::User(None))));
}

#[test]
fn other_folders_and_second_processes_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (handles, _) = EmbeddedStore::open(dir.path(), 1, small()).unwrap();
    match open_error(dir.path()) {
        OpenError::InUse { pid, .. } => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other}"),
    }
    drop(handles);
    fs::write(dir.path().join(FORMAT_FILE), "ringline data folder, format 99, identity 1\n").unwrap();
    assert!(matches!(open_error(dir.path()), OpenError::OtherFormat { .. }));

    let foreign = tempfile::tempdir().unwrap();
    fs::write(foreign.path().join("holiday.jpg"), "x").unwrap();
    assert!(matches!(open_error(foreign.path()), OpenError::NotADataFolder { .. }));
    assert!(!foreign.path().join("lock").exists(), "nothing is left in it");
    let file = foreign.path().join("holiday.jpg");
    assert!(matches!(open_error(&file), OpenError::Io { .. }));
}

#[test]
fn handles_move_to_their_threads_and_messages_keep_their_order_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let (handles, _) = EmbeddedStore::open(dir.path(), 2, small()).unwrap();
    let threads: Vec<_> = handles
        .into_iter()
        .enumerate()
        .map(|(number, mut store)| {
            std::thread::spawn(move || {
                let pair = Pair::new(&format!("ann {number}"), "bob");
                let mut last = store.append(&pair.record()).unwrap();
                for seq in 1..=2000 {
                    last = store.append(&Record::Message(pair.message(seq).into())).unwrap();
                    store.submit();
                    if seq % 10 == 0 {
                        store.poll(&mut Vec::new());
                    }
                }
                store.append(&pair.record()).unwrap();
                committed(&mut store, Lsn(last.0 + 1));
                store.close().unwrap();
                pair
            })
        })
        .collect();
    let pairs: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let (mut node, report) = open(dir.path(), 1, &small());
    assert!(report.clean_stop);
    check(&mut node, &pairs, 2000);
    let all: Vec<StoredMessage> = node.messages(pairs[0].id, ALL).2;
    assert!(all.windows(2).all(|two| two[1].seq == two[0].seq.next()));
}

#[test]
fn memory_is_a_sum_of_named_parts() {
    let parts = memory_budget(&EmbeddedOptions::default(), 2);
    let one = memory_budget(&EmbeddedOptions::default(), 1);
    assert!(parts.iter().all(|(_, bytes)| *bytes > 0));
    assert!(parts.iter().map(|(_, bytes)| bytes).sum::<u64>() > one.iter().map(|(_, bytes)| bytes).sum());
}
