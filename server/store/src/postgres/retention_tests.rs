//! Retention on a real PostgreSQL: what goes, what stays, and what is still known of what went.

use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Partition, Seq};
use ringline_schema::message::{BodyKind, MessageState};
use ringline_schema::record::{Change, Query, Record, StoredExtra, StoredMessage};
use ringline_schema::rows::{AmendedRow, Row, RowKey, RowList, RowValue};

use super::held::Epochs;
use super::rig::Cluster;
use super::tests::{TERMINATE, boxed, options, wait};
use super::*;
use crate::conformance::{ALL, Node, Pair};
use crate::embedded::Retention;

/// A node alone, with a retainer that makes a pass when it is told to.
struct Kept {
    node: Node,
    retainer: Retainer,
    runtime: Runtime,
}

fn open(url: &str, policy: Retention) -> Kept {
    let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::WARN).try_init();
    let options = Arc::new(options(url));
    let address = Arc::new(Address::read(url, None).unwrap());
    let side = runtime().unwrap();
    let (_, owner, epochs) = side.block_on(prepare(&address, ("a", 1))).unwrap();
    let held = Arc::new(Held::new(epochs));
    let (handles, workers) = lines(&options, (&address, owner, &held), 1).unwrap();
    run(side, workers, Others::default()).unwrap();
    let writer = Writer { owner, shard: RETAINER };
    let retainer = Retainer::new((address, writer, held), (policy, Duration::ZERO));
    Kept { node: Node::new(boxed(handles)), retainer, runtime: runtime().unwrap() }
}

impl Kept {
    fn pass(&mut self, now_ms: u64) {
        self.runtime.block_on(self.retainer.pass(now_ms)).unwrap_or_else(|error| panic!("{error}"));
    }

    /// First, head, and that what lies between is there without gaps.
    fn ends(&mut self, pair: &Pair) -> (u64, u64) {
        let (first, head, messages) = self.node.messages(pair.id, ALL);
        let seqs: Vec<u64> = messages.iter().map(|message| message.seq.0).collect();
        assert_eq!(seqs, (first.0..=head.0).collect::<Vec<_>>());
        (first.0, head.0)
    }

    fn filter(&mut self, pair: &Pair) -> Vec<u64> {
        let head = self.node.head(pair.id, DeviceKey::new(&pair.one, DeviceId(1)));
        head.filter.iter().map(|accepted| accepted.client_seq).collect()
    }
}

/// What the figures say is kept is what there is.
fn check_bytes(cluster: &Cluster, url: &str, kept: &Kept) -> u64 {
    let sum =
        "SELECT coalesce(sum(octet_length(body) + coalesce(octet_length(extra), 0) + 200), 0) FROM ringline.messages";
    let found = cluster.sql(url, sum).parse().unwrap();
    assert_eq!(kept.retainer.figures.stats().log_bytes, found);
    found
}

#[test]
fn the_newest_of_each_conversation_stay_and_the_filter_knows_those_that_went() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pairs = [Pair::new("ann", "bob"), Pair::new("carl", "dora"), Pair::new("emil", "fay")];
    let mut kept = open(&url, Retention { messages: 10, ..Retention::default() });
    // More than go in one transaction, as many as stay, and fewer.
    for (pair, head) in pairs.iter().zip([600, 10, 3]) {
        kept.node.commit(&pair.history(head));
    }
    let before = kept.filter(&pairs[0]);
    assert_eq!(before, (537..=600).collect::<Vec<_>>());
    kept.pass(0);
    let ends = pairs.each_ref().map(|pair| kept.ends(pair));
    assert_eq!(ends, [(591, 600), (1, 10), (1, 3)]);
    assert_eq!(kept.filter(&pairs[0]), before, "repeats are still recognised");
    let rows = "SELECT count(*), min(client_seq), max(client_seq) FROM ringline.accepted";
    assert_eq!(cluster.sql(&url, rows), "64|527|590", "no more is kept than may be needed");
    check_bytes(&cluster, &url, &kept);
    let stats = kept.retainer.figures.stats();
    assert_eq!((stats.messages_released, stats.floors), (590, 3), "in three transactions");
    kept.node.commit(&[pairs[0].message(601).into(), pairs[0].message(602).into()]);
    kept.pass(0);
    assert_eq!((kept.ends(&pairs[0]), kept.filter(&pairs[0])), ((593, 602), (539..=602).collect()));
    // A later start counts on.
    kept.node.close();
    let mut kept = open(&url, Retention { messages: 5, ..Retention::default() });
    kept.pass(0);
    assert_eq!((kept.ends(&pairs[0]), kept.ends(&pairs[1])), ((598, 602), (6, 10)));
    assert_eq!(kept.filter(&pairs[0]), (539..=602).collect::<Vec<_>>());
    check_bytes(&cluster, &url, &kept);
    kept.node.close();
}

#[test]
fn what_is_too_old_goes_and_a_conversation_goes_on_behind_it() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut kept = open(&url, Retention { age_ms: 1_000, ..Retention::default() });
    kept.node.commit(&pair.history(300));
    kept.pass(3_001);
    assert_eq!(kept.ends(&pair), (1, 300), "the first is as old as it may be");
    kept.pass(3_101);
    assert_eq!(kept.ends(&pair), (101, 300));
    kept.pass(9_000);
    assert_eq!(kept.ends(&pair), (301, 300));
    assert_eq!(check_bytes(&cluster, &url, &kept), 0);
    let row = kept.node.conversations(&pair.one, DeviceId(1), 9).remove(0);
    assert_eq!((row.first, row.head, row.last_time_ms), (Seq(301), Seq(300), 2_300));
    kept.node.close();
    let mut kept = open(&url, Retention::default());
    assert_eq!(kept.filter(&pair), (237..=300).collect::<Vec<_>>());
    kept.node.commit(&[pair.message(301).into()]);
    assert_eq!(kept.ends(&pair), (301, 301));
    kept.node.close();
}

#[test]
fn by_size_the_oldest_go_and_no_more_than_has_to() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pairs: Vec<Pair> = (0..6).map(|n| Pair::new(&format!("ann{n}"), &format!("bob{n}"))).collect();
    let size_bytes = 200_000;
    let mut kept = open(&url, Retention { size_bytes, ..Retention::default() });
    for (n, pair) in pairs.iter().enumerate() {
        // Each conversation is a hundred milliseconds behind the one before.
        let messages = (1..=400).map(|seq| {
            let message = pair.message(seq);
            Record::Message(StoredMessage { time_ms: message.time_ms + 100 * n as u64, ..message }.into())
        });
        kept.node.commit(&std::iter::once(pair.record()).chain(messages).collect::<Vec<_>>());
    }
    let now_ms = 4_000;
    kept.pass(now_ms);
    let left = check_bytes(&cluster, &url, &kept);
    assert!(left >= size_bytes && left <= size_bytes + size_bytes / 256 + 400, "{left}");
    let ends: Vec<_> = pairs.iter().map(|pair| kept.ends(pair)).collect();
    let oldest: Vec<u64> = ends.iter().enumerate().map(|(n, (first, _))| first + 100 * n as u64).collect();
    // Within a step of time, one conversation after the other.
    let step_ms = (now_ms - 2_001) / 64 + 1;
    assert!(ends.iter().all(|(first, head)| *first > 1 || *head == 400));
    let has_lost_some = |(first, head): &(u64, u64)| *first > 1 && first <= head;
    let full: Vec<u64> = oldest.iter().zip(&ends).filter(|(_, ends)| has_lost_some(ends)).map(|(at, _)| *at).collect();
    let (low, high) = (full.iter().min().unwrap(), full.iter().max().unwrap());
    assert!(high - low <= 2 * step_ms, "{ends:?}");
    kept.pass(now_ms);
    assert_eq!(check_bytes(&cluster, &url, &kept), left, "there is nothing more to do");
    kept.node.close();
}

#[test]
fn rows_about_messages_that_went_go_and_others_stay() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut kept = open(&url, Retention { messages: 10, ..Retention::default() });
    kept.node.commit(&pair.history(20));
    let amendment = |seq: u64, refers: u64| {
        let extra = StoredExtra { refers: Seq(refers), state: MessageState::Edited, ..StoredExtra::default() };
        let message = StoredMessage { kind: BodyKind::Amendment, extra: Some(Box::new(extra)), ..pair.message(seq) };
        let value = RowValue::Amended(AmendedRow { state: MessageState::Edited, by: Seq(seq), at_ms: seq });
        let row = Row { key: RowKey::Amended(pair.id, Seq(refers)), stamp: seq, value: Some(value) };
        Record::Change(Box::new(Change { message: Some(message.into()), rows: vec![row] }))
    };
    let hide = |seq: u64| {
        let key = RowKey::Hidden(pair.other.clone(), pair.id, Seq(seq));
        Record::Change(Box::new(Change {
            message: None,
            rows: vec![Row { key, stamp: seq, value: Some(RowValue::Hidden) }],
        }))
    };
    // Messages 21 to 23 amend 1, 2 and 19.
    kept.node.commit(&[amendment(21, 1), amendment(22, 2), amendment(23, 19), hide(1), hide(3), hide(18)]);
    let seqs = |kept: &mut Kept| -> (Vec<u64>, Vec<u64>) {
        let seq = |row: Row| match row.key {
            RowKey::Amended(_, seq) | RowKey::Hidden(_, _, seq) => seq.0,
            key => panic!("{key:?}"),
        };
        let amended = kept.node.rows(RowList::Amended(pair.id), 9).into_iter().map(seq).collect();
        (amended, kept.node.rows(RowList::AllHidden(pair.other.clone()), 9).into_iter().map(seq).collect())
    };
    kept.pass(0);
    assert_eq!(kept.ends(&pair), (14, 23));
    // 21 and 22 are shown, and tell of 1 and 2.
    assert_eq!(seqs(&mut kept), (vec![1, 2, 19], vec![1, 18]));
    let more: Vec<Record> = (24..=31).map(|seq| pair.message(seq).into()).collect();
    kept.node.commit(&more);
    kept.pass(0);
    kept.pass(0);
    assert_eq!(kept.ends(&pair), (22, 31));
    assert_eq!(seqs(&mut kept), (vec![2, 19], vec![]));
    kept.node.close();
}

#[test]
fn who_does_not_own_a_partition_lets_go_of_nothing_there() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let (ann, carl) = (Pair::new("ann", "bob"), Pair::new("carl", "dora"));
    let mut kept = open(&url, Retention { messages: 5, ..Retention::default() });
    kept.node.commit(&ann.history(20));
    kept.node.commit(&carl.history(20));
    let number = ann.id.partition().number();
    // It does not know yet that another has taken it.
    cluster.sql(&url, &format!("UPDATE ringline.partitions SET epoch = epoch + 1 WHERE partition = {number}"));
    kept.pass(0);
    assert_eq!((kept.ends(&ann), kept.ends(&carl)), ((1, 20), (16, 20)));
    kept.retainer.held.remove(&[number as i16]);
    kept.pass(0);
    assert_eq!(kept.ends(&ann), (1, 20));
    let epoch = cluster.sql(&url, &format!("SELECT epoch FROM ringline.partitions WHERE partition = {number}"));
    kept.retainer
        .held
        .become_as(Epochs::from([(number as i16, epoch.parse().unwrap())]), super::held::Server::default());
    kept.pass(0);
    assert_eq!(cluster.sql(&url, "SELECT count(*) FROM ringline.messages"), "10");
    // Another start takes its place.
    drop(super::tests::open(&url, 1));
    let error = kept.runtime.block_on(async {
        cluster.sql("postgres", TERMINATE);
        let first = kept.retainer.pass(0).await;
        let second = Retainer::new(
            (kept.retainer.address.clone(), kept.retainer.writer, kept.retainer.held.clone()),
            (kept.retainer.policy, Duration::ZERO),
        )
        .pass(0)
        .await;
        (first.is_err(), second.unwrap_err().to_string())
    });
    assert!(error.0 && error.1.contains("fenced"), "{error:?}");
}

#[test]
fn every_partition_is_looked_at_and_none_beside_it() {
    for number in [0, 1, 511, 1023] {
        let partition = Partition::new(number).unwrap();
        let (first, last) = ConversationId::range_of(partition);
        assert_eq!((first.partition(), last.partition()), (partition, partition));
        assert_eq!(Partition::new(number + 1), last.0.checked_add(1).map(|id| ConversationId(id).partition()));
        assert!(number == 0 || ConversationId(first.0 - 1).partition().number() == number - 1);
    }
}

#[test]
fn a_store_with_limits_keeps_to_them_by_itself_and_counts_what_was_there_before() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    // Tables of the version before retention, with messages.
    cluster.sql(&url, "CREATE SCHEMA ringline; CREATE TABLE ringline.schema_version (version integer PRIMARY KEY, since timestamptz NOT NULL DEFAULT now()); INSERT INTO ringline.schema_version VALUES (3)");
    tables::VERSIONS[..3].iter().for_each(|sql| drop(cluster.sql(&url, sql)));
    let old = "INSERT INTO ringline.messages SELECT '00000000-0000-0000-0000-00000000000a', seq, 1, seq, seq, 0, \
               '00000000-0000-0000-0000-00000000000b', 0, 'ann', 'bob', 'body' FROM generate_series(1, 100) AS seq";
    cluster.sql(&url, old);
    let retention = Retention { messages: 7, ..Retention::default() };
    let options =
        PostgresOptions { retention, retention_interval: Duration::from_millis(50), node: "a".into(), ..options(&url) };
    let (handles, _) = PostgresStore::open(options, 2).unwrap();
    let mut node = Node::new(boxed(handles));
    node.commit(&pair.history(50));
    let since = Instant::now();
    while cluster.sql(&url, "SELECT count(*) FROM ringline.messages") != "14" {
        wait(since, "retention");
    }
    let stats = || node.shards[0].stats().retention;
    while stats().messages_released != 93 + 43 {
        wait(since, "the figures");
    }
    // It is measured at the end of a pass.
    while !(14 * 200..14 * 300).contains(&stats().log_bytes) {
        wait(since, "the size");
    }
    assert_eq!(node.shards[1].stats().retention, crate::RetentionStats::default());
    let query = Query::Messages { conversation: pair.id, range: ALL, reader: None };
    drop(node.ask(pair.id.partition(), query));
    node.close();
}
