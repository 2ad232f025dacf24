//! The store against a real PostgreSQL: the suite, and what happens when it goes away, comes back, or has another owner.

use std::sync::atomic::{AtomicBool, Ordering};

use ringline_schema::ids::{DeviceId, DeviceKey, Seq};
use ringline_schema::record::{Answer, Query, Record};

use super::rig::Cluster;
use super::*;
use crate::conformance::{self, ALL, Node, Pair, answers, committed};
use crate::{LoadToken, Lsn, Refused, Store, StoreError, StoreEvent};

/// How long anything may take before a test gives up.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn wait(since: Instant, what: &str) {
    assert!(since.elapsed() < PATIENCE, "{what}: nothing came");
    std::thread::sleep(Duration::from_millis(2));
}

pub(super) const TERMINATE: &str =
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ringline'";

pub(super) fn options(url: &str) -> PostgresOptions {
    PostgresOptions { url: url.into(), ..PostgresOptions::default() }
}

pub(super) fn open(url: &str, shards: u16) -> Vec<PostgresShard> {
    let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::WARN).try_init();
    PostgresStore::open(options(url), shards).unwrap_or_else(|error| panic!("{error}")).0
}

fn refusal(url: &str) -> String {
    PostgresStore::open(options(url), 1).err().expect("a refusal").to_string()
}

pub(super) fn boxed(handles: Vec<PostgresShard>) -> Vec<Box<dyn Store>> {
    handles.into_iter().map(|handle| Box::new(handle) as Box<dyn Store>).collect()
}

/// Appends messages one by one as fast as they are taken, until the last is committed.
pub(super) fn drive(store: &mut PostgresShard, pair: &Pair, (from, to): (u64, u64)) {
    let (mut events, mut since, mut next) = (Vec::new(), Instant::now(), from);
    let (first, mut announced) = (store.append(&pair.record()).unwrap(), Lsn(0));
    while announced < Lsn(first.0 + to - from + 1) {
        for _ in 0..10 {
            if next <= to && store.append(&pair.message(next).into()).is_ok() {
                next += 1;
            }
        }
        store.submit();
        store.poll(&mut events);
        for event in events.drain(..) {
            let StoreEvent::Committed(upto) = event else { panic!("{event:?}") };
            assert!(upto > announced, "in order");
            (announced, since) = (upto, Instant::now());
        }
        wait(since, "the commit");
    }
}

/// All messages are there once, in a store that is opened anew.
pub(super) fn check(url: &str, pair: &Pair, head: u64) {
    let mut node = Node::new(boxed(open(url, 1)));
    conformance::check(&mut node, std::slice::from_ref(pair), head);
    node.close();
}

#[test]
fn passes_the_conformance_suite() {
    let cluster = Cluster::start(&[]);
    for case in conformance::CASES {
        let url = cluster.database();
        (case.check)(&mut |shards| boxed(open(&url, shards)));
    }
}

#[test]
fn a_database_that_goes_away_loses_and_doubles_nothing() {
    let mut cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut store = open(&url, 1).remove(0);
    let stop = AtomicBool::new(false);
    let head = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut head = 0;
            while !stop.load(Ordering::Relaxed) {
                drive(&mut store, &pair, (head + 1, head + 200));
                head += 200;
            }
            head
        });
        for round in 0..9 {
            std::thread::sleep(Duration::from_millis(150 + 37 * round));
            match round % 3 {
                0 => drop(cluster.sql("postgres", TERMINATE)),
                1 => {
                    cluster.kill();
                    cluster.begin();
                }
                _ => {
                    cluster.stop();
                    cluster.begin();
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap()
    });
    println!("{head} messages, {} reconnects", store.stats().reconnects);
    assert!(store.stats().reconnects >= 6 && !store.is_away());
    store.close().unwrap();
    check(&url, &pair, head);
}

#[test]
fn a_commit_whose_answer_was_lost_is_found_and_not_written_again() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut store = open(&url, 1).remove(0);
    drive(&mut store, &pair, (1, 1));
    // A standby that does not exist: commits are on this disk, and nobody is told.
    let standby = |name: &str| {
        cluster.sql("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'"));
        cluster.sql("postgres", "SELECT pg_reload_conf()");
    };
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let becomes = |sql: &str, wanted: &str| {
        let since = Instant::now();
        while cluster.sql(&url, sql) != wanted {
            wait(since, sql);
        }
    };
    standby("nobody");
    becomes("SHOW synchronous_standby_names", "nobody");
    let lsn = store.append(&pair.message(2).into()).unwrap();
    store.submit();
    becomes(waiting, "1");
    cluster.sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
    let written = "SELECT xmin FROM ringline.messages WHERE seq = 2";
    becomes("SELECT count(*) FROM ringline.messages WHERE seq = 2", "1");
    let xmin = cluster.sql(&url, written);
    // The new session waits as well: until it is let go nothing is read and nothing is announced.
    becomes(waiting, "1");
    store.load(LoadToken(7), Query::User { name: pair.one.clone() }).unwrap();
    let mut events = Vec::new();
    store.poll(&mut events);
    assert_eq!(events, []);
    standby("");
    let since = Instant::now();
    while events.len() < 2 {
        store.poll(&mut events);
        wait(since, "the commit and the answer");
    }
    assert!(events.contains(&StoreEvent::Committed(lsn)), "{events:?}");
    assert!(events.iter().any(|event| matches!(event, StoreEvent::Loaded(LoadToken(7), _))), "{events:?}");
    assert_eq!(cluster.sql(&url, written), xmin, "it was not written again");
    assert!(store.stats().reconnects >= 1);
    drive(&mut store, &pair, (3, 40));
    store.close().unwrap();
    check(&url, &pair, 40);
}

#[test]
fn who_takes_over_fences_who_was_there() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut old = open(&url, 2);
    let shard = usize::from(pair.id.partition().number() % 2);
    drive(&mut old[shard], &pair, (1, 20));
    let mut new = Node::new(boxed(open(&url, 2)));
    old[shard].append(&pair.message(21).into()).unwrap();
    old[shard].submit();
    let (mut events, since) = (Vec::new(), Instant::now());
    while events.is_empty() {
        old[shard].poll(&mut events);
        wait(since, "the failure");
    }
    assert_eq!(events, [StoreEvent::Failed]);
    assert_eq!(old[shard].append(&pair.message(22).into()), Err(StoreError::Poisoned));
    let query = Query::User { name: pair.one.clone() };
    let refused = old[shard].load(LoadToken(1), query.clone());
    assert_eq!(refused, Err(Refused { error: StoreError::Poisoned, query: Box::new(query) }));
    assert!(old[shard].close().is_err());
    // The other shard finds out when it writes, or when it has to connect anew.
    cluster
        .sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ringline'");
    let since = Instant::now();
    while events.len() < 2 {
        old[1 - shard].poll(&mut events);
        wait(since, "the other failure");
    }
    assert_eq!(events[1], StoreEvent::Failed);
    assert_eq!(new.messages(pair.id, ALL).1, Seq(20), "nothing of it was written");
    new.commit(&[pair.message(21).into()]);
    conformance::check(&mut new, &[pair], 21);
    new.close();
}

#[test]
fn a_commit_that_comes_late_writes_nothing() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut old = open(&url, 1).remove(0);
    drive(&mut old, &pair, (1, 5));
    // Its server processes stand still, whatever they are at.
    let pids = "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE application_name = 'ringline'";
    let pids = cluster.sql("postgres", pids);
    let signal = |name: &str| {
        for pid in pids.split(' ') {
            let _ = std::process::Command::new("kill").args([&format!("-{name}"), pid]).status();
        }
    };
    signal("STOP");
    old.append(&pair.message(6).into()).unwrap();
    old.submit();
    let mut new = Node::new(boxed(open(&url, 1)));
    new.commit(&[pair.message(6).into(), pair.message(7).into()]);
    signal("CONT");
    let (mut events, since) = (Vec::new(), Instant::now());
    while events.is_empty() {
        old.poll(&mut events);
        wait(since, "the failure");
    }
    assert_eq!(events, [StoreEvent::Failed]);
    conformance::check(&mut new, &[pair], 7);
    new.close();
}

#[test]
fn a_row_that_is_there_is_no_error_if_it_is_the_same() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut store = open(&url, 1).remove(0);
    drive(&mut store, &pair, (1, 9));
    let again: Vec<Record> = pair.history(9);
    let mut last = Lsn(0);
    for record in &again {
        last = store.append(record).unwrap();
    }
    committed(&mut store, last);
    let mut other = pair.message(4);
    other.body = bytes::Bytes::from_static(b"something else");
    store.append(&pair.message(10).into()).unwrap();
    store.append(&other.into()).unwrap();
    store.submit();
    let (mut events, since) = (Vec::new(), Instant::now());
    while events.is_empty() {
        store.poll(&mut events);
        wait(since, "the failure");
    }
    assert_eq!(events, [StoreEvent::Failed]);
    assert!(store.close().is_err());
    check(&url, &pair, 9);
}

#[test]
fn a_store_says_that_its_database_is_away_and_questions_wait_for_it() {
    let mut cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut store = open(&url, 1).remove(0);
    drive(&mut store, &pair, (1, 9));
    assert!(!store.is_away());
    cluster.kill();
    let since = Instant::now();
    while !store.is_away() {
        wait(since, "to be away");
    }
    let (conversation, device) = (pair.id, DeviceKey::new(&pair.one, DeviceId(1)));
    // One that nobody can wait for any longer is answered all the same.
    store.load(LoadToken(1), Query::Head { conversation, device }).unwrap();
    assert_eq!(answers(&mut store, 1), [(LoadToken(1), Answer::Failed)]);
    let lsn = store.append(&pair.message(10).into()).unwrap();
    store.submit();
    store.load(LoadToken(2), Query::Head { conversation, device }).unwrap();
    cluster.begin();
    let (mut events, since) = (Vec::new(), Instant::now());
    while events.len() < 2 {
        store.poll(&mut events);
        wait(since, "the answer and the commit");
    }
    assert!(events.contains(&StoreEvent::Committed(lsn)) && !store.is_away(), "{events:?}");
    store.close().unwrap();
    check(&url, &pair, 10);
}

#[test]
fn retention_floors_are_seen() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut node = Node::new(boxed(open(&url, 1)));
    node.commit(&pair.history(9));
    let let_go = |floor: u64| {
        cluster.sql(&url, &format!("DELETE FROM ringline.messages WHERE seq < {floor}"));
        cluster.sql(&url, &format!("UPDATE ringline.conversations SET floor = {floor}, gone_ms = {}", 1_999 + floor));
    };
    let device = DeviceKey::new(&pair.one, DeviceId(1));
    let_go(5);
    let (first, head, messages) = node.messages(pair.id, ALL);
    assert_eq!((first, head, messages.len()), (Seq(5), Seq(9), 5));
    let_go(10);
    assert_eq!(node.messages(pair.id, ALL), (Seq(10), Seq(9), Vec::new()));
    let head = node.head(pair.id, device);
    assert_eq!((head.exists, head.first, head.head), (true, Seq(10), Seq(9)));
    let row = node.conversations(&pair.one, DeviceId(1), 9).remove(0);
    assert_eq!((row.first, row.head, row.last_time_ms), (Seq(10), Seq(9), 2_009));
    node.close();
}

#[test]
fn tables_of_an_older_version_are_brought_up_and_of_a_newer_left_alone() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    cluster.sql(&url, "CREATE SCHEMA ringline; CREATE TABLE ringline.schema_version (version integer PRIMARY KEY, since timestamptz NOT NULL DEFAULT now()); INSERT INTO ringline.schema_version VALUES (1)");
    cluster.sql(&url, tables::VERSIONS[0]);
    cluster.sql(&url, "INSERT INTO ringline.users VALUES ('ann', NULL, 7)");
    let mut node = Node::new(boxed(open(&url, 1)));
    let query = Query::User { name: pair.one.clone() };
    let Answer::User(Some(user)) = node.ask(pair.one.partition(), query) else { panic!("the user") };
    assert_eq!(user.created_ms, 7);
    node.commit(&pair.history(5));
    node.close();
    let newest = tables::VERSIONS.len().to_string();
    assert_eq!(cluster.sql(&url, "SELECT max(version) FROM ringline.schema_version"), newest);
    cluster.sql(&url, "INSERT INTO ringline.schema_version VALUES (99)");
    let told = refusal(&url);
    assert!(told.contains("version 99") && told.contains("start a newer build"), "{told}");
    cluster.sql(&url, "DELETE FROM ringline.schema_version WHERE version = 99");
    check(&url, &pair, 5);
}

#[test]
fn nodes_that_start_together_make_the_tables_once() {
    let cluster = Cluster::start(&[]);
    for _ in 0..3 {
        let url = cluster.database();
        let opened: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..5).map(|_| scope.spawn(|| open(&url, 1))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(
            cluster.sql(&url, "SELECT count(*) FROM ringline.schema_version"),
            tables::VERSIONS.len().to_string()
        );
        let owners = "SELECT count(DISTINCT owner), min(epoch), max(epoch) FROM ringline.partitions";
        assert_eq!(cluster.sql(&url, owners), "1|5|5");
        drop(opened);
    }
}

#[test]
fn databases_that_cannot_keep_the_promise_are_refused_by_name() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let database = url.rsplit("dbname=").next().unwrap();
    cluster.sql("postgres", &format!("ALTER DATABASE {database} SET synchronous_commit = off"));
    let told = refusal(&url);
    assert!(told.contains("synchronous_commit = off"), "{told}");
    cluster.sql("postgres", &format!("ALTER DATABASE {database} RESET synchronous_commit"));
    cluster.sql("postgres", &format!("ALTER DATABASE {database} SET default_transaction_read_only = on"));
    refusal(&url);
    cluster.sql("postgres", "CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0");
    let told = refusal(&cluster.url("ascii"));
    assert!(told.contains("SQL_ASCII") && told.contains("UTF8"), "{told}");
    let told = refusal(&cluster.url("nowhere"));
    assert!(told.contains("does not let us in") && told.contains("nowhere"), "{told}");
    drop(cluster);
    let told = refusal(&url);
    assert!(told.contains("cannot be reached"), "{told}");
    let told = refusal("postgres://ann:s3cret@127.0.0.1:1/x?connect_timeout=1");
    assert!(told.contains("127.0.0.1:1/x as ann") && !told.contains("s3cret"), "{told}");
    let unsynced = Cluster::start(&["fsync=off"]);
    let told = refusal(&unsynced.database());
    assert!(told.contains("fsync = off"), "{told}");
}
