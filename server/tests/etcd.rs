//! Registration and looking around with a real etcd: all at once, silence, an etcd that goes and comes, a history that was
//! compacted, and starts of a node that meet another of it.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::etcd::{Etcd, free_port};
use ringline::etcd::access::Access;
use ringline::etcd::entry::{Entry, Listing};
use ringline::etcd::lease::{LeaseClock, RegisterError};
use ringline::etcd::{Directory, EtcdOptions, Keeper, Lost, watch};
use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::membership::{Change, Member, Membership, Placing, Standing};
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::reconcile::Start;
use ringline_core::config::Lease;
use tokio::sync::{Notify, watch as changing};
use tokio::task::JoinHandle;

fn options(endpoints: &[String]) -> EtcdOptions {
    let endpoints = endpoints.iter().map(|text| text.parse().unwrap()).collect();
    EtcdOptions { endpoints, prefix: "/test".into(), timeout: Duration::from_secs(10), access: Access::default() }
}

fn entry(number: u16, start: i64) -> Entry {
    let member = Member {
        incarnation: Incarnation(start.unsigned_abs()),
        peer_address: SocketAddr::from(([127, 0, 0, 1], 9_800 + number)),
        client_address: format!("127.0.0.1:{}", 9_700 + number),
        weight: 1,
        client_weight: 1,
        connections: 0,
        standing: Standing::Up,
    };
    Entry { member, start: Start(start), number: NodeIndex(number), owned: Some(0) }
}

fn clock() -> LeaseClock {
    LeaseClock::new(Instant::now(), Lease::new(0))
}

/// A start that is registered and kept so.
struct Kept {
    entry: changing::Sender<Entry>,
    clock: LeaseClock,
    task: JoinHandle<Result<(), Lost>>,
}

impl Kept {
    async fn new(options: &EtcdOptions, name: &str, entry: Entry) -> Result<Self, RegisterError> {
        let clock = clock();
        let keeper = Keeper::register(options, name, entry.clone(), clock.clone()).await?;
        let (sender, receiver) = changing::channel(entry);
        Ok(Self { entry: sender, clock, task: tokio::spawn(keeper.keep(receiver)) })
    }

    fn may_serve(&self) -> bool {
        !self.clock.is_over(Instant::now())
    }

    /// As by SIGKILL: it says nothing more.
    fn vanish(&self) {
        self.task.abort();
    }

    async fn leave(self) {
        drop(self.entry);
        assert_eq!(self.task.await.unwrap(), Ok(()));
    }
}

/// Looks again and again until it is so.
async fn until(directory: &mut Directory, what: &str, done: impl Fn(&Listing) -> bool) -> Listing {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match directory.list().await {
            Ok(listing) if done(&listing) => return listing,
            listing => assert!(Instant::now() < deadline, "{what}: {listing:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn rung(bell: &Notify) {
    tokio::time::timeout(PATIENCE, bell.notified()).await.expect("the bell rings");
}

/// Until it has been silent for a while: what a test changes next is then what it rings for.
async fn calm(bell: &Notify) {
    while tokio::time::timeout(Duration::from_millis(300), bell.notified()).await.is_ok() {}
}

#[tokio::test]
async fn five_nodes_register_at_once_and_one_that_drains_and_leaves_is_seen() {
    let etcd = Etcd::start();
    let options = options(&[etcd.endpoint()]);
    let starting: Vec<_> = (0..5u16)
        .map(|number| {
            let options = options.clone();
            tokio::spawn(async move {
                Kept::new(&options, &format!("n{number}"), entry(number, 1 + i64::from(number))).await.unwrap()
            })
        })
        .collect();
    let mut nodes = Vec::new();
    for starting in starting {
        nodes.push(starting.await.unwrap());
    }
    assert!(nodes.iter().all(Kept::may_serve));
    let mut directory = Directory::new(&options);
    let listing = directory.list().await.unwrap();
    assert_eq!(listing.entries.keys().collect::<Vec<_>>(), ["n0", "n1", "n2", "n3", "n4"]);
    assert_eq!(listing.entries["n3"], entry(3, 4));
    let mut membership = Membership::new("n0", Incarnation(1), Placing::Alive);
    assert_eq!(membership.update(listing.members()).unwrap().len(), 5);

    nodes[3].entry.send_modify(|entry| entry.member.standing = Standing::Draining);
    let listing =
        until(&mut directory, "n3 drains", |list| list.entries["n3"].member.standing == Standing::Draining).await;
    assert_eq!(membership.update(listing.members()).unwrap(), [Change::Draining("n3".into())]);
    let gone = nodes.remove(3);
    let clock = gone.clock.clone();
    gone.leave().await;
    assert!(clock.is_over(Instant::now()));
    let listing = directory.list().await.unwrap();
    assert_eq!(membership.update(listing.members()).unwrap(), [Change::Left("n3".into())], "at once");
    // Another prefix is another cluster.
    let mut other = Directory::new(&EtcdOptions { prefix: "/test2".into(), ..options });
    assert!(other.list().await.unwrap().entries.is_empty());
}

#[tokio::test]
async fn a_lease_ends_only_after_its_node_has_stopped_to_serve_and_the_next_start_waits_for_it() {
    let etcd = Etcd::start();
    let options = options(&[etcd.endpoint()]);
    let mut directory = Directory::new(&options);
    let first = Kept::new(&options, "a", entry(0, 5)).await.unwrap();
    let older = Keeper::register(&options, "a", entry(0, 4), clock()).await.unwrap_err();
    assert_eq!(older, RegisterError::Replaced { ours: Start(4), theirs: Start(5) });

    first.vanish();
    let next = tokio::spawn({
        let options = options.clone();
        async move { Kept::new(&options, "a", entry(0, 6)).await.unwrap() }
    });
    let listing = until(&mut directory, "the first is gone", |list| !list.may_live("a", Start(5))).await;
    assert!(!first.may_serve(), "nobody takes from a node that may still serve");
    let next = next.await.unwrap();
    assert!(next.may_serve());
    let now = directory.list().await.unwrap();
    assert!(now.may_live("a", Start(6)) && now.revision > listing.revision - 1);
}

#[tokio::test]
async fn an_etcd_that_is_stopped_and_started_changes_nothing() {
    let mut etcd = Etcd::start();
    let options = options(&[etcd.endpoint()]);
    let node = Kept::new(&options, "a", entry(0, 1)).await.unwrap();
    let mut directory = Directory::new(&options);
    for round in 0..2 {
        let before = node.clock.until_ms();
        if round == 0 {
            etcd.stop()
        } else {
            etcd.kill()
        }
        assert!(directory.list().await.is_err());
        etcd.begin();
        assert!(directory.list().await.unwrap().may_live("a", Start(1)), "the lease is still there");
        let deadline = Instant::now() + PATIENCE;
        while node.clock.until_ms() <= before {
            assert!(Instant::now() < deadline && !node.task.is_finished(), "it is renewed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    node.leave().await;
    assert!(directory.list().await.unwrap().entries.is_empty());
}

#[tokio::test]
async fn a_start_whose_lease_is_gone_serves_nothing_more() {
    let etcd = Etcd::start();
    let options = options(&[etcd.endpoint()]);
    // Once the lease is taken away, once the key alone: with the lease still renewed, nobody may rely on it.
    for (start, path) in [(1, "/v3/lease/revoke"), (2, "/v3/kv/deleterange")] {
        let node = Kept::new(&options, "a", entry(0, start)).await.unwrap();
        // base64 of /test/nodes/a.
        let key = r#"{"key":"L3Rlc3Qvbm9kZXMvYQ=="}"#;
        let there = etcd.ask("/v3/kv/range", key).unwrap();
        let lease = there.split(r#""lease":""#).nth(1).unwrap().split('"').next().unwrap();
        let taken = if start == 1 { format!(r#"{{"ID":"{lease}"}}"#) } else { key.to_owned() };
        assert!(etcd.ask(path, &taken).unwrap().contains("revision"), "{path}");
        node.entry.send_modify(|entry| entry.member.connections += 1);
        assert_eq!(node.task.await.unwrap(), Err(Lost::Lease), "{path}");
        assert!(node.clock.is_over(Instant::now()));
    }
    // What another program has written there is not overwritten.
    let put = r#"{"key":"L3Rlc3Qvbm9kZXMvYQ==","value":"e30="}"#;
    etcd.ask("/v3/kv/put", put).unwrap();
    let error = Keeper::register(&options, "a", entry(0, 3), clock()).await.unwrap_err();
    assert_eq!(error, RegisterError::Unreadable { key: "/test/nodes/a".into() });
    let listing = Directory::new(&options).list().await.unwrap();
    assert!(listing.may_live("a", Start(2)) && listing.entries.is_empty());
}

#[tokio::test]
async fn the_bell_rings_for_changes_also_after_a_gap_and_a_compaction() {
    let mut etcd = Etcd::start();
    let options = options(&[etcd.endpoint()]);
    let bell = Arc::new(Notify::new());
    let ringing = tokio::spawn(watch::ring(options.clone(), bell.clone()));
    rung(&bell).await;
    calm(&bell).await;
    let a = Kept::new(&options, "a", entry(0, 1)).await.unwrap();
    rung(&bell).await;
    calm(&bell).await;
    a.entry.send_modify(|entry| entry.member.connections += 1);
    rung(&bell).await;
    // A gap: what changes while there is no watch is not told by any, and what came before is compacted away.
    etcd.stop();
    etcd.begin();
    let b = Kept::new(&options, "b", entry(1, 2)).await.unwrap();
    let mut directory = Directory::new(&options);
    let listing = until(&mut directory, "both", |list| list.entries.len() == 2).await;
    let compacted = etcd.ask("/v3/kv/compaction", &format!(r#"{{"revision":"{}"}}"#, listing.revision)).unwrap();
    assert!(compacted.contains("200 OK"), "{compacted}");
    rung(&bell).await;
    calm(&bell).await;
    b.leave().await;
    rung(&bell).await;
    assert_eq!(directory.list().await.unwrap().entries.len(), 1);
    assert!(!ringing.is_finished());
    ringing.abort();
    a.leave().await;
}

#[tokio::test]
async fn an_endpoint_that_is_away_or_hangs_is_passed_over() {
    let (etcd, hung) = (Etcd::start(), Etcd::start());
    let away = format!("http://127.0.0.1:{}", free_port());
    hung.signal("STOP");
    let options = EtcdOptions {
        timeout: Duration::from_millis(300),
        ..options(&[away.clone(), hung.endpoint(), etcd.endpoint()])
    };
    let node = Kept::new(&options, "a", entry(0, 1)).await.unwrap();
    let mut directory = Directory::new(&options);
    assert!(directory.list().await.unwrap().may_live("a", Start(1)));
    node.leave().await;
    let none = EtcdOptions { endpoints: vec![away.parse().unwrap()], ..options };
    let told = Directory::new(&none).list().await.unwrap_err().to_string();
    assert!(told.contains(&away), "{told}");
}
