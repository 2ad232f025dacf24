//! Check, repair and export against folders that are whole, torn, damaged in a log, and damaged in the index.

use std::fs;
use std::path::Path;

use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::message::MessageState;
use ringline_schema::record::{Record, StoredMessage, User};
use ringline_schema::rows::{MarkRow, Row, RowKey, RowValue};

use super::offline::{Exported, Hole, IndexState, check, export, repair};
use super::retain_tests::settle;
use super::tests::{copy, flip, lazy, open, record_offsets, segment, small};
use super::*;
use crate::conformance::{self, ALL, Pair, name};

/// Two conversations of ann over two logs and several segments, a user and a row; closed.
fn folder(options: &EmbeddedOptions) -> (tempfile::TempDir, [Pair; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let pairs = [Pair::new("ann", "bob"), Pair::new("ann", "cleo")];
    let (mut node, _) = open(dir.path(), 2, options);
    node.commit(&[Record::User(User { name: name("ann"), password_hash: Some("hash".into()), created_ms: 4 })]);
    let mark = RowKey::Mark(name("ann"), pairs[0].id);
    let value = Some(RowValue::Mark(MarkRow { pinned: true, muted_until_ms: 9 }));
    let rows = vec![Row { key: mark, stamp: 1, value }];
    node.commit(&[Record::Change(Box::new(ringline_schema::record::Change { message: None, rows }))]);
    for pair in &pairs {
        for records in pair.history(300).chunks(7) {
            node.commit(records);
            // Or a segment may grow far beyond its size on a busy machine.
            settle(&mut node);
        }
    }
    node.close();
    (dir, pairs)
}

fn quiet(_: offline::Progress) {}

fn log_of(id: ConversationId) -> u16 {
    id.partition().number() % 2
}

#[test]
fn a_check_of_a_whole_folder_counts_everything_and_changes_nothing() {
    let (dir, _) = folder(&small());
    let report = check(dir.path(), &mut quiet).unwrap();
    assert!(report.is_whole() && !report.foreign && report.torn.is_empty(), "{report:?}");
    assert_eq!((report.logs, report.messages, report.records), (2, 600, 604));
    assert!(matches!(report.index, IndexState::Whole { messages: 600, behind: false, .. }), "{:?}", report.index);
    let (_, opened) = open(dir.path(), 2, &small());
    assert!(opened.clean_stop && opened.replayed_records == 0);
}

#[test]
fn a_check_tells_a_torn_end_from_damage_and_an_index_that_is_behind_from_a_damaged_one() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new("ann", "bob"));
    let (mut node, _) = open(dir.path(), 1, &lazy());
    for record in pair.history(20) {
        node.commit(&[record]);
    }
    drop(node);
    let path = segment(dir.path(), 0, 1);
    let offsets = record_offsets(&path);
    flip(&path, u64::from(offsets[offsets.len() - 2]) + 20);
    let report = check(dir.path(), &mut quiet).unwrap();
    assert!(report.is_whole(), "{report:?}");
    assert_eq!(report.torn.len(), 1);
    assert_eq!(report.torn[0].offset, offsets[offsets.len() - 2]);
    assert!(matches!(report.index, IndexState::Whole { behind: true, messages: 0, .. }), "{:?}", report.index);

    flip(&path, u64::from(offsets[5]) + 20);
    let report = check(dir.path(), &mut quiet).unwrap();
    assert_eq!(report.damage.len(), 1, "{report:?}");
    let damage = &report.damage[0];
    assert_eq!((&damage.file, damage.offset, damage.bytes), (&path, offsets[5], u64::from(offsets[6] - offsets[5])));
    assert!(!report.is_whole());
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    assert_eq!(check(dir.path(), &mut quiet).unwrap().index, IndexState::Missing);
}

#[test]
fn every_kind_of_damage_of_a_log_is_found_and_repaired_with_only_that_lost() {
    let (dir, pairs) = folder(&small());
    let (log, pair) = (log_of(pairs[0].id), &pairs[0]);
    let second = segment(dir.path(), log, 2);
    let offsets = record_offsets_of(dir.path(), log, 2);
    let holds = Segments::read_only(dir.path().join("log")).get(log, 2).unwrap();
    let holds = survey::survey_segment(&holds, &mut |_, _| Ok(())).unwrap().messages;
    type Harm = fn(&Path, &[u32]);
    // Each with the messages that it may cost: a record has those of a commit of 7 at most.
    let harms: [(&str, u64, Harm); 5] = [
        ("a flipped byte", 7, |path, offsets| flip(path, u64::from(offsets[3]) + 30)),
        ("a lost length", 7, |path, offsets| flip(path, u64::from(offsets[9]) + 2)),
        ("a page of zeros", holds - 1, |path, _| {
            use std::os::unix::fs::FileExt;
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[0; 4096], 4096).unwrap();
        }),
        ("a header", holds, |path, _| flip(path, 17)),
        ("a file", holds, |path, _| fs::remove_file(path).unwrap()),
    ];
    for (what, lost_max, harm) in harms {
        let copied = tempfile::tempdir().unwrap();
        copy(dir.path(), copied.path());
        let path = copied.path().join(second.strip_prefix(dir.path()).unwrap());
        harm(&path, &offsets);
        let report = check(copied.path(), &mut quiet).unwrap();
        assert!(
            !report.damage.is_empty() && report.damage.iter().all(|damage| damage.file == path),
            "{what}: {report:?}"
        );
        let before = path.exists().then(|| fs::read(&path).unwrap());

        let refused = repair(copied.path(), false, &mut quiet).unwrap();
        assert!(refused.rebuilt.is_none() && refused.damage == report.damage, "{what}");
        assert_eq!(path.exists().then(|| fs::read(&path).unwrap()), before, "{what}: nothing was changed");

        let mended = repair(copied.path(), true, &mut quiet).unwrap();
        assert!(mended.rebuilt.is_some(), "{what}");
        assert_eq!(mended.kept.first().map(|kept| fs::read(kept).unwrap()), before, "{what}: the damaged file is kept");
        let after = check(copied.path(), &mut quiet).unwrap();
        assert!(after.is_whole(), "{what}: {after:?}");

        let (mut node, _) = open(copied.path(), 2, &small());
        let mut lost = 0;
        for pair in &pairs {
            let (first, head, _) = node.messages(pair.id, ALL);
            let mut after = Seq(first.0 - 1);
            while after < head {
                let (_, _, page) = node.messages(pair.id, ringline_schema::record::Range { after, ..ALL });
                for message in &page {
                    assert_eq!(message.seq, after.next(), "{what}: a conversation reads without a gap");
                    after = message.seq;
                    lost += u64::from(!is_same(message, &pair.message(message.seq.0)));
                }
            }
            lost += first.0 - 1 + (300 - head.0);
        }
        let told: u64 = mended.holes.iter().map(|hole| hole.last.0 - hole.first.0 + 1).sum();
        assert!(lost > 0 && lost <= lost_max, "{what}: {lost}");
        assert!(told <= lost && mended.holes.iter().all(|Hole { first, last, .. }| first <= last), "{what}");
        let list = node.conversations(&name("ann"), conformance_device(), 9);
        assert_eq!(list.len(), 2, "{what}");
        assert!(list.iter().any(|row| row.conversation == pair.id));
    }
}

fn conformance_device() -> ringline_schema::ids::DeviceId {
    ringline_schema::ids::DeviceId(1)
}

/// The message as it was sent, or the sign that it is lost.
fn is_same(found: &StoredMessage, sent: &StoredMessage) -> bool {
    let deleted = found.extra.as_ref().is_some_and(|extra| extra.state == MessageState::Deleted);
    assert!(found == sent || (deleted && found.body.is_empty()), "{found:?}");
    !deleted
}

fn record_offsets_of(dir: &Path, log: u16, number: u32) -> Vec<u32> {
    let segment = Segments::new(dir.join("log")).get(log, number).unwrap();
    let mut scanner = scan::Scanner::to_end(segment, format::SEGMENT_HEADER_BYTES).unwrap();
    let mut offsets = vec![scanner.offset()];
    while let scan::Found::Record { .. } = scanner.next().unwrap() {
        offsets.push(scanner.offset());
    }
    offsets
}

/// Every file of the index, at places spread over all of it.
#[test]
fn flipped_bytes_of_an_index_never_give_a_wrong_answer() {
    let (dir, pairs) = folder(&lazy());
    let index = dir.path().join("index");
    let mut files = Vec::new();
    let mut folders = vec![index.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if fs::metadata(&path).unwrap().len() > 0 {
                files.push(path.strip_prefix(dir.path()).unwrap().to_owned());
            }
        }
    }
    assert!(files.len() > 2, "{files:?}");
    for file in files {
        let bytes = fs::read(dir.path().join(&file)).unwrap();
        let written = bytes.iter().rposition(|&byte| byte != 0).unwrap_or(0);
        for part in [0, 1, 3, 5, 8] {
            let copied = tempfile::tempdir().unwrap();
            copy(dir.path(), copied.path());
            flip(&copied.path().join(&file), (written * part / 8) as u64);
            let report = check(copied.path(), &mut quiet).unwrap();
            assert!(report.damage.is_empty(), "the logs are whole");
            // Either the start notices it, or what is asked notices it and the next start makes the index anew.
            let (mut node, opened) = open(copied.path(), 2, &lazy());
            let all =
                |node: &mut conformance::Node| pairs.each_ref().map(|pair| node.ask(pair.id.partition(), every(pair)));
            let whole = |answers: &[ringline_schema::record::Answer; 2]| {
                answers.iter().all(|answer| match answer {
                    ringline_schema::record::Answer::Messages { head, messages, .. } => {
                        assert_eq!((*head, messages.len()), (Seq(300), 300), "{file:?}: {opened:?}");
                        true
                    }
                    ringline_schema::record::Answer::Failed => false,
                    other => panic!("{other:?}"),
                })
            };
            if !whole(&all(&mut node)) {
                drop(node);
                let (mut node, opened) = open(copied.path(), 2, &lazy());
                assert!(opened.index_rebuilt.is_some(), "{file:?}");
                assert!(whole(&all(&mut node)));
            }
        }
    }
}

fn every(pair: &Pair) -> ringline_schema::record::Query {
    ringline_schema::record::Query::Messages { conversation: pair.id, range: ALL, reader: None }
}

#[test]
fn an_export_has_everything_once_and_in_order() {
    let (dir, pairs) = folder(&small());
    let (mut users, mut conversations, mut messages, mut rows) = (0, 0, Vec::new(), 0);
    let mut each = |exported| {
        match exported {
            Exported::User(user) => users += u64::from(user.name == name("ann")),
            Exported::Conversation { head, members, .. } => {
                assert!(head == Seq(300) && members.is_some());
                conversations += 1;
            }
            Exported::Message(message) => messages.push(message),
            Exported::Row(row) => {
                assert!(matches!(row.value, Some(RowValue::Mark(MarkRow { pinned: true, .. }))));
                rows += 1;
            }
        }
        Ok(())
    };
    export(dir.path(), &mut each, &mut quiet).unwrap();
    assert_eq!((users, conversations, rows), (1, 2, 1));
    let mut wanted: Vec<_> = pairs.iter().flat_map(|pair| (1..=300).map(|seq| pair.message(seq))).collect();
    wanted.sort_by_key(|message| (message.conversation, message.seq));
    assert_eq!(messages, wanted);

    let mut refuse = |_| Err(std::io::Error::other("full"));
    assert!(matches!(export(dir.path(), &mut refuse, &mut quiet), Err(OpenError::Io { .. })));
}

#[test]
fn other_folders_and_running_servers_are_refused_and_nothing_is_made() {
    let foreign = tempfile::tempdir().unwrap();
    assert!(matches!(check(foreign.path(), &mut quiet), Err(OpenError::NoDataFolder { .. })));
    assert!(matches!(repair(foreign.path(), true, &mut quiet), Err(OpenError::NoDataFolder { .. })));
    assert_eq!(fs::read_dir(foreign.path()).unwrap().count(), 0);
    let dir = tempfile::tempdir().unwrap();
    let (node, _) = open(dir.path(), 1, &small());
    assert!(matches!(check(dir.path(), &mut quiet), Err(OpenError::InUse { .. })));
    drop(node);
    assert!(check(dir.path(), &mut quiet).unwrap().is_whole());
}
