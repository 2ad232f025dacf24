//! Retention against its limits, crashes between any two of its steps, lost indexes, damaged checkpoints and bad disks.

use std::fs;
use std::sync::atomic::Ordering;

use ringline_schema::ids::{DeviceId, DeviceKey, Partition, Seq};
use ringline_schema::message::MessageState;
use ringline_schema::record::{Answer, Change, Query, Range, Record, User};
use ringline_schema::rows::{AmendedRow, MarkRow, Row, RowKey, RowList, RowValue};

use super::backup::backup;
use super::checkpoint::Checkpoints;
use super::indexer::{Job, Reply};
use super::offline::{IndexState, check, repair};
use super::retain::{Passed, RetainError, Step};
use super::tests::{copy, flip, lazy, open, segment, small};
use super::*;
use crate::conformance::{ALL, Node as Shards, Pair, answers, committed, name};
use crate::{LoadToken, Lsn, Store, StoreError, StoreEvent};

const MESSAGES: u64 = 400;
/// The time of message `seq` is this and `seq`; see `Pair::message`.
const FIRST_MS: u64 = 2_000;
/// How often an index thread is watched choosing what to look at next, where the wrong choice is as likely as the right.
const TURNS_AFTER_FAILURE: u64 = 100;

fn pairs() -> [Pair; 3] {
    [Pair::new("ann", "bob"), Pair::new("ann", "cleo"), Pair::new("dan", "eve")]
}

/// Three conversations in two logs, a user who is stored anew by every run, a cursor and a row, in many segments.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for run in 0..2 {
        let (mut node, _) = open(dir.path(), 2, &small());
        let user = User { name: name("ann"), password_hash: Some(format!("hash {run}")), created_ms: 1 };
        let mark = RowValue::Mark(MarkRow { pinned: true, muted_until_ms: run });
        let row = Row { key: RowKey::Mark(name("ann"), pairs()[0].id), stamp: run + 1, value: Some(mark) };
        let cursor = Record::Cursor {
            user: name("bob"),
            device: DeviceId(7),
            conversation: pairs()[0].id,
            seq: Seq(run * 10 + 5),
        };
        node.commit(&[Record::User(user), Record::Change(Box::new(Change { message: None, rows: vec![row] })), cursor]);
        let half = MESSAGES / 2;
        let mut records: Vec<_> = pairs().iter().map(Pair::record).filter(|_| run == 0).collect();
        for seq in run * half + 1..=(run + 1) * half {
            records.extend(pairs().iter().map(|pair| Record::Message(pair.message(seq).into())));
        }
        for records in records.chunks(10) {
            node.commit(records);
            settle(&mut node);
        }
        node.close();
    }
    dir
}

/// Waits until both index threads have done what they were told, so that segments end where they should on any machine.
pub(super) fn settle(node: &mut Shards) {
    for number in 0..2 {
        node.ask(Partition::new(number).unwrap(), Query::User { name: name("nobody") });
    }
}

/// A store and what carries out retention for it.
struct Kept {
    store: Vec<EmbeddedShard>,
    retainer: Option<Retainer>,
}

impl Kept {
    fn open(dir: &Path, policy: Retention) -> Self {
        let (store, _) = EmbeddedStore::open(dir, 2, small()).unwrap();
        let node = Arc::clone(&store[0].node);
        let checkpoint = Checkpoints::new(dir).numbers().unwrap().last().copied().unwrap_or(0);
        let kept = node.index.kept().unwrap();
        Self { store, retainer: Some(Retainer::new(node, policy, (kept, checkpoint))) }
    }

    fn pass(&mut self, now_ms: u64) -> Passed {
        self.retainer.as_mut().unwrap().pass(now_ms, &mut |_| Ok(())).unwrap()
    }

    fn shards(self) -> Shards {
        drop(self.retainer);
        Shards::new(self.store.into_iter().map(|store| Box::new(store) as Box<dyn Store>).collect())
    }
}

/// A whole conversation: its first, and that all from there to the head are what was sent.
fn first_of(node: &mut Shards, pair: &Pair, head: u64) -> u64 {
    let (first, there, _) = node.messages(pair.id, Range { limit: 1, ..ALL });
    assert_eq!(there, Seq(head));
    let mut after = Seq(first.0 - 1);
    while after.0 < head {
        let (_, _, page) = node.messages(pair.id, Range { after, ..ALL });
        assert!(!page.is_empty(), "message {} is lost", after.0 + 1);
        for message in page {
            assert_eq!(message, pair.message(after.0 + 1));
            after = message.seq;
        }
    }
    let below = node.messages(pair.id, Range { before: Some(first), ..ALL });
    assert!(below.2.is_empty(), "nothing below the first is shown");
    first.0
}

/// Everything that is no message is as it was, and every conversation reads from its first on. Gives the firsts.
fn firsts(node: &mut Shards, head: u64) -> [u64; 3] {
    let Answer::User(Some(user)) = node.ask(name("ann").partition(), Query::User { name: name("ann") }) else {
        panic!()
    };
    assert_eq!(user.password_hash.as_deref(), Some("hash 1"));
    let key = RowKey::Mark(name("ann"), pairs()[0].id);
    let Answer::Row(Some(row)) = node.ask(name("ann").partition(), Query::Row { key }) else { panic!() };
    assert_eq!((row.stamp, row.value), (2, Some(RowValue::Mark(MarkRow { pinned: true, muted_until_ms: 1 }))));
    let list = node.conversations(&name("bob"), DeviceId(7), 9);
    assert_eq!((list.len(), list[0].acked, list[0].with.as_str()), (1, Seq(15), "ann"));
    assert_eq!(node.conversations(&name("ann"), DeviceId(1), 9).len(), 2);
    pairs().map(|pair| {
        let found = node.head(pair.id, DeviceKey::new(&pair.one, DeviceId(1)));
        assert_eq!((found.head, found.filter.len()), (Seq(head), 64));
        assert_eq!(found.filter[63].client_seq, head);
        let first = first_of(node, &pair, head);
        assert_eq!(found.first.0, first);
        first
    })
}

fn segments_of(dir: &Path) -> Vec<(u16, Vec<u32>)> {
    let segments = Segments::read_only(dir.join("log"));
    segments.logs().unwrap().into_iter().map(|log| (log, segments.numbers(log).unwrap())).collect()
}

fn lose_index(dir: &Path) {
    fs::remove_dir_all(dir.join("index")).unwrap();
}

fn quiet(_: super::offline::Progress) {}

#[test]
fn a_message_goes_when_it_is_older_than_the_age_and_not_a_moment_before() {
    let dir = folder();
    let policy = Retention { age_ms: 1_000, ..Retention::default() };
    let mut kept = Kept::open(dir.path(), policy);
    // The first segment of a log ends where the second begins.
    let begins = |log| {
        let segment = Segments::new(dir.path().join("log")).get(log, 2).unwrap();
        let mut scanner = scan::Scanner::to_end(Arc::clone(&segment), format::SEGMENT_HEADER_BYTES).unwrap();
        loop {
            let (_, indexed, _) = indexer::next_record(&mut scanner, &segment).unwrap();
            if let Some(ringline_schema::disk::Indexed::Message(message)) = indexed {
                return message.accepted.time_ms;
            }
        }
    };
    let oldest = begins(0).min(begins(1));
    assert!(oldest > FIRST_MS);
    assert_eq!(kept.pass(oldest + 1_000), Passed::default(), "exactly as old stays");
    let passed = kept.pass(oldest + 1_001);
    // Both logs may begin their second at the same moment.
    assert!([1, 2].contains(&passed.segments) && passed.floors > 0 && passed.checkpoint_bytes > 0, "{passed:?}");
    let mut node = kept.shards();
    let after = firsts(&mut node, MESSAGES);
    assert!(after.iter().any(|first| *first > 1), "{after:?}");
    assert!(after.iter().all(|first| FIRST_MS + first >= oldest || *first == 1), "{after:?}: younger ones stay");
    node.close();
    // Everything is too old: only what the logs are still writing is left.
    let mut kept = Kept::open(dir.path(), policy);
    kept.pass(u64::MAX);
    let left = segments_of(dir.path());
    assert!(left.iter().all(|(_, numbers)| numbers.len() <= 2 && numbers[0] > 1), "{left:?}");
    firsts(&mut kept.shards(), MESSAGES);
}

#[test]
fn the_oldest_segments_go_while_as_many_bytes_are_left() {
    let dir = folder();
    let open = |bytes| Kept::open(dir.path(), Retention { size_bytes: bytes, ..Retention::default() });
    // Reserved room does not count: whole segments, and the others up to their ends.
    let (sealed, total) = {
        let kept = open(0);
        let watermarks = kept.store[0].node.index.watermarks().unwrap();
        let mut sealed = Vec::new();
        let mut total = 0;
        for (log, watermark) in watermarks {
            total += u64::from(watermark.at.offset);
            for number in 1..watermark.at.segment {
                sealed.push((log, number, fs::metadata(segment(dir.path(), log, number)).unwrap().len()));
            }
        }
        (sealed.clone(), total + sealed.iter().map(|(.., bytes)| bytes).sum::<u64>())
    };
    assert!(sealed.len() > 4, "{sealed:?}");
    assert_eq!(open(total).pass(0), Passed::default());
    let smallest = sealed.iter().map(|(.., bytes)| *bytes).min().unwrap();
    assert_eq!(open(total - smallest + 1).pass(0), Passed::default(), "what is left would be less than was asked");
    let largest = sealed.iter().map(|(.., bytes)| *bytes).max().unwrap();
    let first = open(total - largest).pass(0);
    assert!(first.segments >= 1 && first.bytes <= largest, "{first:?}: as much is left as was asked");
    let passed = open(1).pass(0);
    assert_eq!((first.segments + passed.segments) as usize, sealed.len(), "{passed:?}");
    firsts(&mut open(0).shards(), MESSAGES);
}

#[test]
fn the_newest_messages_of_each_conversation_stay_to_the_last() {
    for keep in [1, 63, 64, 65, MESSAGES - 1, MESSAGES, MESSAGES + 1] {
        let dir = folder();
        let mut kept = Kept::open(dir.path(), Retention { messages: keep, ..Retention::default() });
        let passed = kept.pass(0);
        let first = MESSAGES.saturating_sub(keep) + 1;
        assert_eq!(passed.floors, if keep < MESSAGES { 3 } else { 0 }, "{keep}");
        assert_eq!(passed.segments > 0, keep < MESSAGES / 2, "{keep}: {passed:?}");
        assert_eq!(kept.pass(0), Passed::default(), "it is done");
        let mut node = kept.shards();
        assert_eq!(firsts(&mut node, MESSAGES), [first; 3], "{keep}");
        // It goes on behind the head, also when hardly anything is left.
        node.commit(&pairs().map(|pair| Record::Message(pair.message(MESSAGES + 1).into())));
        assert_eq!(firsts(&mut node, MESSAGES + 1), [first; 3]);
        node.close();
        assert!(check(dir.path(), &mut quiet).unwrap().is_whole());
    }
}

#[test]
fn a_conversation_of_which_nothing_is_left_keeps_its_place_and_its_filter() {
    let dir = folder();
    // Other traffic seals the segments with the last messages.
    let other = Pair::new("zoe", "yan");
    let (mut node, _) = open(dir.path(), 1, &small());
    let segments = |dir: &Path| segments_of(dir)[0].1.len();
    node.commit(&[other.record()]);
    // Files are made by the index thread: to count them while it is at work would be to count some of them.
    settle(&mut node);
    let before = segments(dir.path());
    for seq in 1.. {
        node.commit(&[Record::Message(other.message(seq).into())]);
        settle(&mut node);
        // The next one is made ready before this one is full.
        if segments(dir.path()) >= before + 3 {
            break;
        }
    }
    node.close();
    let mut kept = Kept::open(dir.path(), Retention { age_ms: 1, ..Retention::default() });
    assert!(kept.pass(u64::MAX).segments > 0);
    let policy_time = FIRST_MS + MESSAGES + 1;
    for lost in [false, true] {
        let mut node = kept.shards();
        for pair in pairs() {
            let found = node.head(pair.id, DeviceKey::new(&pair.one, DeviceId(1)));
            assert_eq!((found.head, found.filter.len()), (Seq(MESSAGES), 64));
            let (first, head, page) = node.messages(pair.id, ALL);
            assert!(head == Seq(MESSAGES) && page.len() as u64 == head.0 + 1 - first.0);
        }
        let gone = pairs().into_iter().find(|pair| node.messages(pair.id, ALL).0 == Seq(MESSAGES + 1));
        let gone = gone.expect("one is wholly gone");
        let row = node.conversations(&gone.one, DeviceId(1), 9).into_iter().find(|row| row.conversation == gone.id);
        let row = row.unwrap();
        assert_eq!((row.first, row.head, row.last_time_ms), (Seq(MESSAGES + 1), Seq(MESSAGES), FIRST_MS + MESSAGES));
        if lost {
            node.commit(&[Record::Message(gone.message(MESSAGES + 1).into())]);
            assert_eq!(node.messages(gone.id, ALL).2, [gone.message(MESSAGES + 1)]);
        }
        node.close();
        lose_index(dir.path());
        kept = Kept::open(dir.path(), Retention::default());
        assert_eq!(kept.pass(policy_time), Passed::default());
    }
}

/// Stops a pass before step `stop_at`; true: it was stopped.
fn stopped_pass(kept: &mut Kept, stop_at: usize) -> (bool, Vec<Step>) {
    let mut steps = Vec::new();
    let passed = kept.retainer.as_mut().unwrap().pass(0, &mut |step| {
        if step != Step::Scan {
            steps.push(step);
        }
        if steps.len() > stop_at { Err(RetainError::Stopped) } else { Ok(()) }
    });
    match passed {
        Ok(_) => (false, steps),
        Err(RetainError::Stopped) => (true, steps),
        Err(error) => panic!("{error}"),
    }
}

/// Where to stop: before the first, the second and the last of each kind of step, and not at all.
fn stops(trace: &[Step]) -> Vec<usize> {
    let is_wanted = |at: &usize| {
        let same = |steps: &[Step]| steps.iter().filter(|step| **step == trace[*at]).count();
        same(&trace[..*at]) < 2 || same(&trace[*at + 1..]) == 0
    };
    (0..trace.len()).filter(is_wanted).chain([trace.len()]).collect()
}

/// Stops a pass over `whole` everywhere, with and without the index lost in the same moment. Before it the conversations
/// begin at `before`, afterwards at `after`.
fn crash_everywhere(whole: &Path, head: u64, (before, after): (u64, u64)) -> Vec<Step> {
    let policy = Retention { messages: 100, ..Retention::default() };
    let begin = || {
        let dir = tempfile::tempdir().unwrap();
        copy(whole, dir.path());
        let kept = Kept::open(dir.path(), policy);
        (dir, kept)
    };
    let trace = stopped_pass(&mut begin().1, usize::MAX).1;
    for stop_at in stops(&trace) {
        for index_lost in [false, true] {
            let (dir, mut kept) = begin();
            let (_, seen) = stopped_pass(&mut kept, stop_at);
            drop(kept);
            if index_lost {
                lose_index(dir.path());
            }
            let mut node = Kept::open(dir.path(), policy).shards();
            let found = firsts(&mut node, head);
            assert!(found.iter().all(|first| [before, after].contains(first)), "stopped before {seen:?}: {found:?}");
            node.close();
            let report = check(dir.path(), &mut quiet).unwrap();
            assert!(report.is_whole(), "stopped before {seen:?}: {report:?}");

            let mut kept = Kept::open(dir.path(), policy);
            kept.pass(0);
            kept.shards().close();
            lose_index(dir.path());
            let mut node = Kept::open(dir.path(), policy).shards();
            assert_eq!(firsts(&mut node, head), [after; 3], "stopped before {seen:?}, then the index lost");
            node.close();
            assert_eq!(Checkpoints::new(dir.path()).numbers().unwrap().len(), 1);
            assert!(segments_of(dir.path()).iter().any(|(_, numbers)| numbers[0] > 1));
        }
    }
    trace
}

#[test]
fn a_crash_before_any_step_loses_nothing_that_was_not_let_go() {
    let dir = folder();
    let first = crash_everywhere(dir.path(), MESSAGES, (1, 301));
    for step in [Step::Floors, Step::Begin, Step::Rows, Step::Sync, Step::Name, Step::Note, Step::Older, Step::Unlink] {
        assert!(first.contains(&step), "{step:?} is not among {first:?}");
    }
    let places = [Step::Floors, Step::Sync, Step::Name, Step::Unlink]
        .map(|step| first.iter().position(|seen| *seen == step).unwrap());
    assert!(places.is_sorted(), "floors, then the checkpoint, then the segments: {first:?}");

    // Again over what the first pass has left, with its checkpoint there.
    let mut kept = Kept::open(dir.path(), Retention { messages: 100, ..Retention::default() });
    kept.pass(0);
    let mut node = kept.shards();
    for seq in MESSAGES + 1..=MESSAGES + 200 {
        node.commit(&pairs().map(|pair| Record::Message(pair.message(seq).into())));
        settle(&mut node);
    }
    node.close();
    crash_everywhere(dir.path(), MESSAGES + 200, (301, 501));
}

#[test]
fn many_runs_and_other_shard_numbers_rebuild_to_the_same() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let mut head = 0;
    for run in 1..=9u64 {
        let (mut node, _) = open(dir.path(), (run % 3 + 1) as u16, &small());
        let user = User { name: name("ann"), password_hash: Some(format!("hash {run}")), created_ms: run };
        let mut records = vec![Record::User(user)];
        if run == 1 {
            records.push(pair.record());
        }
        records.extend((head + 1..=head + 150).map(|seq| Record::Message(pair.message(seq).into())));
        head += 150;
        records.chunks(20).for_each(|records| node.commit(records));
        node.close();
        let mut kept = Kept::open(dir.path(), Retention { messages: 200, ..Retention::default() });
        kept.pass(0);
        kept.shards().close();
        if run % 2 == 0 {
            lose_index(dir.path());
        }
        let (mut node, _) = open(dir.path(), 1, &small());
        let (first, wanted) = (first_of(&mut node, &pair, head), head.saturating_sub(200) + 1);
        // Floors since the last checkpoint go with the index: then more is kept, never less.
        assert!(first == wanted || (run % 2 == 0 && first < wanted), "run {run}: {first}, {wanted}");
        let Answer::User(Some(user)) = node.ask(name("ann").partition(), Query::User { name: name("ann") }) else {
            panic!()
        };
        assert_eq!(user.password_hash, Some(format!("hash {run}")), "run {run}");
        node.close();
    }
    assert!(segments_of(dir.path()).iter().any(|(_, numbers)| numbers[0] > 1));
}

#[test]
fn a_lost_segment_is_told_from_one_that_was_let_go() {
    let whole = folder();
    Kept::open(whole.path(), Retention { messages: 100, ..Retention::default() }).pass(0);
    let (log, numbers) = segments_of(whole.path()).into_iter().find(|(_, numbers)| numbers[0] > 1).unwrap();
    for index_lost in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        copy(whole.path(), dir.path());
        if index_lost {
            lose_index(dir.path());
        }
        fs::remove_file(segment(dir.path(), log, numbers[0])).unwrap();
        assert!(!check(dir.path(), &mut quiet).unwrap().is_whole());
        assert!(matches!(EmbeddedStore::open(dir.path(), 2, small()), Err(OpenError::Damaged { .. })));
    }
    // A log that ends before the checkpoint has lost its end.
    let dir = tempfile::tempdir().unwrap();
    copy(whole.path(), dir.path());
    lose_index(dir.path());
    let wanted = Checkpoints::new(dir.path()).newest_whole(super::read_identity(dir.path()).unwrap());
    let watermarks = wanted.unwrap().unwrap().unwrap().2.watermarks;
    // One whose last segment has records.
    let (log, at) =
        watermarks.into_iter().map(|(log, watermark)| (log, watermark.at)).max_by_key(|(_, at)| at.offset).unwrap();
    assert!(at.offset > format::SEGMENT_HEADER_BYTES);
    // Zeros from a record on look like the end of a log that was never longer.
    let path = segment(dir.path(), log, at.segment);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..format::SEGMENT_HEADER_BYTES as usize]).unwrap();
    match EmbeddedStore::open(dir.path(), 2, small()) {
        Err(OpenError::Damaged { what, .. }) => assert!(what.contains("checkpoint"), "{what}"),
        other => panic!("{:?}", other.map(|(_, report)| report)),
    }
}

#[test]
fn a_damaged_checkpoint_is_never_taken_for_a_whole_one() {
    let whole = folder();
    Kept::open(whole.path(), Retention { messages: 100, ..Retention::default() }).pass(0);
    let path = Checkpoints::new(whole.path()).path(1);
    let bytes = fs::metadata(&path).unwrap().len();
    for part in [0, 9, 40, bytes / 2, bytes - 1] {
        let dir = tempfile::tempdir().unwrap();
        copy(whole.path(), dir.path());
        let path = Checkpoints::new(dir.path()).path(1);
        flip(&path, part);
        let report = check(dir.path(), &mut quiet).unwrap();
        assert!(report.damage.iter().any(|damage| damage.file == path), "byte {part}");
        assert!(matches!(report.index, IndexState::Whole { .. }), "{:?}", report.index);
        // With its index the folder is whole, and a repair makes a new checkpoint of it.
        let mut node = Kept::open(dir.path(), Retention::default()).shards();
        assert_eq!(firsts(&mut node, MESSAGES), [301; 3]);
        node.close();
        let mended = repair(dir.path(), false, &mut quiet).unwrap();
        assert!(mended.damage.is_empty() && mended.rebuilt.is_some(), "byte {part}: {mended:?}");
        assert!(check(dir.path(), &mut quiet).unwrap().is_whole());
        assert_eq!(firsts(&mut Kept::open(dir.path(), Retention::default()).shards(), MESSAGES), [301; 3]);

        // Without it, what only the checkpoint had is lost, and that has to be allowed.
        let dir = tempfile::tempdir().unwrap();
        copy(whole.path(), dir.path());
        lose_index(dir.path());
        let path = Checkpoints::new(dir.path()).path(1);
        flip(&path, part);
        let opened = EmbeddedStore::open(dir.path(), 2, small());
        assert!(matches!(&opened, Err(OpenError::Damaged { file, .. }) if *file == path), "byte {part}");
        let refused = repair(dir.path(), false, &mut quiet).unwrap();
        assert!(refused.rebuilt.is_none() && refused.damage[0].file == path);
        let mended = repair(dir.path(), true, &mut quiet).unwrap();
        assert!(mended.rebuilt.is_some() && mended.kept.len() == 1, "{mended:?}");
        let report = check(dir.path(), &mut quiet).unwrap();
        assert!(report.is_whole(), "byte {part}");
        let (mut node, _) = open(dir.path(), 2, &small());
        for pair in pairs() {
            assert!(first_of(&mut node, &pair, MESSAGES) <= 301, "no message that was there is lost");
        }
    }
}

#[test]
fn a_lost_checkpoint_is_made_anew_at_the_start() {
    let dir = folder();
    Kept::open(dir.path(), Retention { messages: 100, ..Retention::default() }).pass(0);
    fs::remove_dir_all(dir.path().join("checkpoint")).unwrap();
    Kept::open(dir.path(), Retention::default()).shards().close();
    lose_index(dir.path());
    assert_eq!(firsts(&mut Kept::open(dir.path(), Retention::default()).shards(), MESSAGES), [301; 3]);
}

#[test]
fn a_backup_begins_where_the_checkpoint_does_and_starts() {
    let dir = folder();
    let mut kept = Kept::open(dir.path(), Retention { messages: 100, ..Retention::default() });
    kept.pass(0);
    let to = tempfile::tempdir().unwrap();
    let report = backup(dir.path(), to.path(), &mut quiet).unwrap();
    assert_eq!(report.logs, 2);
    // What comes later is not in it and does not disturb it.
    let mut node = kept.shards();
    node.commit(&pairs().map(|pair| Record::Message(pair.message(MESSAGES + 1).into())));
    drop(node);
    assert!(check(to.path(), &mut quiet).unwrap().is_whole());
    assert_eq!(firsts(&mut Kept::open(to.path(), Retention::default()).shards(), MESSAGES), [301; 3]);

    let to = tempfile::tempdir().unwrap();
    flip(&Checkpoints::new(dir.path()).path(1), 100);
    assert!(matches!(backup(dir.path(), to.path(), &mut quiet), Err(OpenError::Damaged { .. })));
    assert!(matches!(EmbeddedStore::open(to.path(), 1, small()), Err(OpenError::UnfinishedBackup { .. })));
}

/// A handle whose retention thread works all the time.
fn busy(dir: &Path, retention: Retention) -> EmbeddedShard {
    let options = EmbeddedOptions { retention, retention_interval_ms: 2, ..small() };
    EmbeddedStore::open(dir, 1, options).unwrap().0.remove(0)
}

/// Writes messages `from`.. until `done` says so; each is durable before the next.
fn write_until(store: &mut EmbeddedShard, pair: &Pair, from: u64, mut done: impl FnMut(&EmbeddedShard) -> bool) -> u64 {
    let mut seq = from;
    while !done(store) {
        assert!(seq < 1_000_000, "nothing happens");
        if let Ok(lsn) = store.append(&Record::Message(pair.message(seq).into())) {
            committed(store, lsn);
            seq += 1;
        }
    }
    seq - 1
}

#[test]
fn a_store_in_use_lets_go_reads_on_and_is_backed_up_meanwhile() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let mut store = busy(dir.path(), Retention { messages: 200, ..Retention::default() });
    store.append(&pair.record()).unwrap();
    let mut next = 1;
    for round in 1..=5 {
        let head = write_until(&mut store, &pair, next, |store| store.stats().retention.segments_released >= round);
        next = head + 1;
        let query = Query::Messages { conversation: pair.id, range: Range { newest: true, ..ALL }, reader: None };
        store.load(LoadToken(round), query).unwrap();
        let Answer::Messages { head: there, messages, .. } = answers(&mut store, 1).remove(0).1 else { panic!() };
        assert_eq!(there, Seq(head));
        assert!(messages.len() >= 100 && messages.iter().all(|found| *found == pair.message(found.seq.0)));
        let to = tempfile::tempdir().unwrap();
        backup(dir.path(), to.path(), &mut quiet).unwrap();
        let (mut copied, _) = open(to.path(), 1, &small());
        assert!(head - first_of(&mut copied, &pair, head) >= 199);
    }
    let stats = store.stats().retention;
    assert!(stats.checkpoints > 0 && stats.checkpoint_bytes > 0 && stats.floors > 0, "{stats:?}");
    assert!(stats.segments > 0 && stats.log_bytes > 0 && stats.bytes_released > 0, "{stats:?}");
    store.close().unwrap();
    drop(store);
    let (_, report) = open(dir.path(), 1, &small());
    assert!(report.clean_stop && report.replayed_records == 0, "{report:?}");
}

#[test]
fn a_disk_error_of_a_checkpoint_poisons_and_a_full_disk_only_puts_it_off() {
    // Reading the log, writing rows, the sync, the name, removing: each with an error of the disk.
    for step in [Step::Scan, Step::Floors, Step::Begin, Step::Rows, Step::Sync, Step::Name, Step::Older, Step::Unlink] {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
        let mut store = busy(dir.path(), Retention { messages: 100, ..Retention::default() });
        store.keeper.set_fault(step, libc::EIO);
        store.append(&pair.record()).unwrap();
        let mut events = Vec::new();
        let mut seq = 0;
        loop {
            match store.append(&Record::Message(pair.message(seq + 1).into())) {
                Ok(_) => seq += 1,
                Err(StoreError::Full) => {}
                Err(_) => break,
            }
            assert!(seq < 1_000_000, "{step:?} was not met");
            store.submit();
            store.poll(&mut events);
        }
        store.poll(&mut events);
        let failed = events.iter().position(|event| *event == StoreEvent::Failed).expect("it is said");
        assert!(events[failed + 1..].is_empty(), "{step:?}: nothing is acknowledged after it");
        assert!(matches!(store.close(), Err(StoreError::Poisoned)));
        let told = events.iter().rev().find_map(|event| match event {
            StoreEvent::Committed(Lsn(lsn)) => Some(lsn - 1),
            _ => None,
        });
        drop(store);
        let (mut node, _) = open(dir.path(), 1, &small());
        let (first, head, _) = node.messages(pair.id, Range { limit: 1, ..ALL });
        assert!(head.0 >= told.unwrap_or(0), "{step:?}");
        first_of(&mut node, &pair, head.0);
        assert!(head.0 + 1 - first.0 >= 100.min(head.0), "{step:?}");
    }
    for step in [Step::Begin, Step::Rows, Step::Sync] {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
        let mut store = busy(dir.path(), Retention { messages: 100, ..Retention::default() });
        store.keeper.set_fault(step, libc::ENOSPC);
        store.append(&pair.record()).unwrap();
        let head = write_until(&mut store, &pair, 1, |store| store.stats().retention.segments_released > 0);
        store.close().unwrap();
        drop(store);
        first_of(&mut open(dir.path(), 1, &small()).0, &pair, head);
    }
}

#[test]
fn a_disk_error_of_an_index_flush_poisons() {
    a_fault_of_a_flush_poisons(libc::EIO);
}

#[test]
fn a_flush_thread_that_ends_poisons_and_is_told_once() {
    a_fault_of_a_flush_poisons(-1);
}

fn a_fault_of_a_flush_poisons(fault: i32) {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let mut store = EmbeddedStore::open(dir.path(), 1, small()).unwrap().0.remove(0);
    store.append(&pair.record()).unwrap();
    store.node.index.fault.store(fault, Ordering::Relaxed);
    let (mut events, mut seq) = (Vec::new(), 0);
    while !events.contains(&StoreEvent::Failed) {
        match store.append(&Record::Message(pair.message(seq + 1).into())) {
            Ok(_) => seq += 1,
            Err(_) => assert!(seq > 0),
        }
        assert!(seq < 1_000_000);
        store.submit();
        store.poll(&mut events);
    }
    assert_eq!(events.last(), Some(&StoreEvent::Failed), "nothing is acknowledged after it");
    assert!(matches!(store.append(&pair.record()), Err(StoreError::Poisoned)));
    let told = events.iter().filter(|event| matches!(event, StoreEvent::Committed(_))).count();
    // It is told once, however often the index thread looks up after that. A segment that was asked for may still come.
    let (mut told_again, mut answered) = (0, 0);
    for asked in 0..TURNS_AFTER_FAILURE {
        let question = Job::Load(LoadToken(asked), Query::User { name: name("ann") });
        store.jobs.as_ref().unwrap().send(question).unwrap();
        while answered <= asked {
            match store.replies.recv_timeout(std::time::Duration::from_secs(30)).expect("questions are answered") {
                Reply::Loaded(_, answer) => {
                    assert_eq!(answer, Answer::Failed);
                    answered += 1;
                }
                Reply::Failed => told_again += 1,
                Reply::Prepared(_) => {}
            }
        }
    }
    assert_eq!(told_again, 0);
    drop(store);
    let (mut node, report) = open(dir.path(), 1, &small());
    assert!(told > 0 && report.index_rebuilt.is_some(), "an index that failed is not trusted");
    let head = node.messages(pair.id, Range { limit: 1, ..ALL }).1;
    first_of(&mut node, &pair, head.0);
}

#[test]
fn what_a_crash_replays_is_bounded_by_the_flush_distance() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let options = EmbeddedOptions { flush_interval_ms: 1 << 30, ..small() };
    let (mut node, _) = open(dir.path(), 1, &options);
    let mut head = 0;
    node.commit(&[pair.record()]);
    for messages in [1, 99, 100, 101, 3_000] {
        let records: Vec<_> =
            (head + 1..=head + messages).map(|seq| Record::Message(pair.message(seq).into())).collect();
        head += messages;
        node.commit(&records);
        // The answer comes when the index thread has all of it.
        assert_eq!(node.messages(pair.id, Range { limit: 1, ..ALL }).1, Seq(head));
        drop(node);
        let (reopened, report) = open(dir.path(), 1, &options);
        let bound = (options.flush_records_max + indexer::APPLY_RECORDS_MAX) as u64;
        assert!(!report.clean_stop && report.replayed_records <= bound, "{report:?}");
        if messages < options.flush_records_max as u64 {
            assert_eq!(report.replayed_records, messages + u64::from(head == 1), "nothing was flushed");
        }
        node = reopened;
    }
    node.close();
    let (mut node, report) = open(dir.path(), 1, &options);
    assert!(report.clean_stop && report.replayed_records == 0, "{report:?}");
    first_of(&mut node, &pair, head);
    drop((node, lazy()));
}

#[test]
fn counting_messages_reads_a_part_of_the_conversations_in_each_pass() {
    let dir = folder();
    let mut kept = Kept::open(dir.path(), Retention { messages: 100, ..Retention::default() });
    let retainer = kept.retainer.as_mut().unwrap();
    retainer.count_rows_max = 4;
    let (mut floors, mut passes) = (0, 0);
    while floors < 3 {
        let before = retainer.count_rows;
        floors += retainer.pass(0, &mut |_| Ok(())).unwrap().floors;
        let read = retainer.count_rows - before;
        assert!((1..=4).contains(&read), "{read} rows in one pass");
        passes += 1;
        assert!(passes < 100, "all of them come at last");
    }
    assert!(passes > 3, "{passes} passes");
    assert_eq!(firsts(&mut kept.shards(), MESSAGES), [301; 3]);
}

/// Rows of amendments and of what was hidden, by what they are about.
fn orphans_of(node: &mut Shards) -> (Vec<u64>, Vec<u64>) {
    let id = pairs()[0].id;
    let mut rows = |list: RowList, partition: Partition| -> Vec<u64> {
        let Answer::Rows(rows) = node.ask(partition, Query::Rows { list, after: None, limit: 1_000 }) else { panic!() };
        let seq = |row: Row| match row.key {
            RowKey::Amended(_, seq) | RowKey::Hidden(_, _, seq) => seq.0,
            other => panic!("{other:?}"),
        };
        rows.into_iter().map(seq).collect()
    };
    (rows(RowList::Amended(id), id.partition()), rows(RowList::AllHidden(name("bob")), name("bob").partition()))
}

#[test]
fn rows_about_messages_that_went_go_as_well_unless_something_of_them_is_shown() {
    let dir = folder();
    let id = pairs()[0].id;
    let amended = |seq: u64, by: u64| {
        let row = AmendedRow { state: MessageState::Edited, by: Seq(by), at_ms: 1 };
        Row { key: RowKey::Amended(id, Seq(seq)), stamp: by, value: Some(RowValue::Amended(row)) }
    };
    let hidden = |seq| Row { key: RowKey::Hidden(name("bob"), id, Seq(seq)), stamp: 1, value: Some(RowValue::Hidden) };
    let change = |row| Record::Change(Box::new(Change { message: None, rows: vec![row] }));
    let mut node = Kept::open(dir.path(), Retention::default()).shards();
    // 301 is the first that stays.
    for (seq, by) in [(10, 20), (11, 300), (12, 301), (300, 400), (301, 302), (350, 360)] {
        node.commit(&[change(amended(seq, by))]);
    }
    for seq in [5, 11, 12, 300, 301, 399] {
        node.commit(&[change(hidden(seq))]);
    }
    let all = (vec![10, 11, 12, 300, 301, 350], vec![5, 11, 12, 300, 301, 399]);
    assert_eq!(orphans_of(&mut node), all);
    node.close();
    let mut kept = Kept::open(dir.path(), Retention { messages: 100, ..Retention::default() });
    let retainer = kept.retainer.as_mut().unwrap();
    retainer.orphans.rows_max = 5;
    for _ in 0..8 {
        let before = retainer.orphans.seen;
        retainer.pass(0, &mut |_| Ok(())).unwrap();
        assert!(retainer.orphans.seen - before <= 5);
    }
    assert_eq!(retainer.orphans.dropped, 4);
    let seen = retainer.orphans.seen;
    retainer.pass(0, &mut |_| Ok(())).unwrap();
    assert_eq!(retainer.orphans.seen, seen, "nothing has risen, so nothing is looked at");
    let left = (vec![12, 300, 301, 350], vec![12, 300, 301, 399]);
    let mut node = kept.shards();
    assert_eq!(orphans_of(&mut node), left, "an amendment that is kept is shown as before");
    node.close();
    // What the log still has comes back with a lost index, and goes again.
    lose_index(dir.path());
    let mut kept = Kept::open(dir.path(), Retention { messages: 100, ..Retention::default() });
    for _ in 0..3 {
        kept.pass(0);
    }
    assert_eq!(orphans_of(&mut kept.shards()), left);
}
