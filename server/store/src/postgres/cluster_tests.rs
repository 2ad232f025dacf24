//! Several nodes on one real PostgreSQL: who gets a partition, what becomes of commits when it changes hands, and of
//! takes when the server is killed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use ringline_schema::ids::{DeviceId, DeviceKey, PARTITIONS, Partition, Seq};
use ringline_schema::record::{Answer, Query};

use super::held::Server;
use super::rig::Cluster;
use super::tests::{PATIENCE, TERMINATE, boxed, check, drive, options, wait};
use super::*;
use crate::conformance::{self, Node, Pair, answers, committed};
use crate::{LoadToken, Lsn, Store, StoreError, StoreEvent};

fn now<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A start of a node.
struct Member {
    shards: Vec<PostgresShard>,
    ownership: Ownership,
}

fn start(url: &str, node: &str, shards: u16) -> Member {
    let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::WARN).try_init();
    let options = PostgresOptions { node: node.into(), ..options(url) };
    let (shards, ownership, _) = PostgresStore::open_cluster(options, shards).unwrap_or_else(|error| panic!("{error}"));
    Member { shards, ownership }
}

impl Member {
    fn table(&self) -> OwnershipTable {
        now(self.ownership.table()).unwrap()
    }

    fn version(&self) -> u64 {
        now(self.ownership.version()).unwrap()
    }

    /// What another has, or nobody.
    fn others(&self) -> Vec<Claim> {
        let own = Some(self.ownership.start());
        self.table().partitions.iter().filter(|row| row.owner != own).map(|row| row.claim).collect()
    }

    fn claim(&self, partition: Partition) -> Claim {
        self.table().partitions[usize::from(partition.number())].claim
    }

    fn take_all(&self) {
        assert_eq!(now(self.ownership.take(&self.others())).unwrap().len(), usize::from(PARTITIONS));
    }

    /// Takes one from whoever has it.
    fn take(&self, partition: Partition) {
        let seen = self.claim(partition);
        let taken = now(self.ownership.take(&[seen])).unwrap();
        assert_eq!(taken, [Claim { partition, epoch: Epoch(seen.epoch.0 + 1) }]);
    }

    fn owner(&self, partition: Partition) -> Option<Start> {
        self.table().partitions[usize::from(partition.number())].owner
    }

    fn head(&mut self, pair: &Pair) -> u64 {
        let device = DeviceKey::new(&pair.one, DeviceId(1));
        self.shards[0].load(LoadToken(1), Query::Head { conversation: pair.id, device }).unwrap();
        let (_, Answer::Head(head)) = answers(&mut self.shards[0], 1).remove(0) else { panic!("the head") };
        head.head.0
    }
}

/// Waits for the failure of a shard. Returns the last that was committed before.
fn failure(store: &mut PostgresShard) -> Lsn {
    let (mut events, since, mut upto) = (Vec::new(), Instant::now(), Lsn(0));
    loop {
        store.poll(&mut events);
        for event in events.drain(..) {
            match event {
                StoreEvent::Committed(lsn) => upto = lsn,
                StoreEvent::Failed => return upto,
                StoreEvent::Loaded(..) => panic!("{event:?}"),
            }
        }
        wait(since, "the failure");
    }
}

/// Appends messages as fast as they are taken until the store fails or is told to stop. Returns the last that was
/// acknowledged.
fn drive_until(store: &mut PostgresShard, pair: &Pair, (from, stop): (u64, &AtomicBool)) -> u64 {
    let (mut next, mut events, mut acknowledged) = (from, Vec::new(), from - 1);
    let mut seqs = BTreeMap::new();
    loop {
        while next < from + 100_000 && seqs.len() < 64 && !stop.load(Ordering::Relaxed) {
            match store.append(&pair.message(next).into()) {
                Ok(lsn) => drop(seqs.insert(lsn, next)),
                Err(StoreError::Full) => break,
                Err(_) => return acknowledged,
            }
            next += 1;
        }
        store.submit();
        store.poll(&mut events);
        for event in events.drain(..) {
            match event {
                StoreEvent::Committed(upto) => {
                    let later = seqs.split_off(&Lsn(upto.0 + 1));
                    acknowledged = seqs.values().last().copied().unwrap_or(acknowledged);
                    seqs = later;
                }
                StoreEvent::Failed => return acknowledged,
                StoreEvent::Loaded(..) => panic!("{event:?}"),
            }
        }
        if stop.load(Ordering::Relaxed) && seqs.is_empty() {
            return acknowledged;
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_member_that_took_all_passes_the_conformance_suite() {
    let cluster = Cluster::start(&[]);
    for case in conformance::CASES {
        let url = cluster.database();
        (case.check)(&mut |shards| {
            let member = start(&url, "a", shards);
            member.take_all();
            boxed(member.shards)
        });
    }
}

#[test]
fn numbers_of_nodes_are_given_once_and_stay() {
    let cluster = Cluster::start(&[]);
    for _ in 0..3 {
        let url = cluster.database();
        let begin = |round: u32| -> BTreeMap<String, (u8, i64)> {
            std::thread::scope(|scope| {
                let starts = (0..6).map(|node| {
                    let (url, name) = (&url, format!("node{}", (node + round) % 6));
                    scope.spawn(move || {
                        let member = start(url, &name, 2);
                        (name, (member.ownership.number(), member.ownership.start().0))
                    })
                });
                let starts: Vec<_> = starts.collect();
                starts.into_iter().map(|start| start.join().unwrap()).collect()
            })
        };
        let (first, second) = (begin(0), begin(3));
        let mut numbers: Vec<u8> = first.values().map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5]);
        for (node, (number, start)) in &first {
            assert!(second[node].0 == *number && second[node].1 > *start, "{node}: {first:?} {second:?}");
        }
        cluster
            .sql(&url, "INSERT INTO ringline.nodes SELECT number, 'x' || number FROM generate_series(6, 63) AS number");
        let refused = PostgresStore::open_cluster(PostgresOptions { node: "late".into(), ..options(&url) }, 1);
        let told = refused.err().expect("a refusal").to_string();
        assert!(told.contains("all 64 numbers") && told.contains("late"), "{told}");
        assert_eq!(start(&url, "x63", 1).ownership.number(), 63);
    }
}

#[test]
fn a_partition_that_several_take_at_once_is_given_to_one() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let members = ["a", "b", "c"].map(|node| start(&url, node, 1));
    assert!(members[0].table().partitions.iter().all(|row| row.owner.is_none()));
    for round in 0..8 {
        let seen: Vec<Claim> = members[0].table().partitions.iter().map(|row| row.claim).collect();
        let taken: Vec<Vec<Claim>> = std::thread::scope(|scope| {
            let takes = members.each_ref().map(|member| {
                let seen = &seen;
                // What is one's own already is told as well; so each asks only for what is not.
                scope.spawn(move || {
                    let (own, table) = (Some(member.ownership.start()), member.table());
                    let not_own = |claim: &&Claim| table.partitions[usize::from(claim.partition.number())].owner != own;
                    let wanted: Vec<Claim> = seen.iter().filter(not_own).copied().collect();
                    now(member.ownership.take(&wanted)).unwrap()
                })
            });
            takes.into_iter().map(|take| take.join().unwrap()).collect()
        });
        let table = members[round % 3].table();
        for (member, taken) in members.iter().zip(&taken) {
            for claim in taken {
                let row = table.partitions[usize::from(claim.partition.number())];
                assert_eq!((row.claim, row.owner), (*claim, Some(member.ownership.start())));
            }
        }
        let mut all: Vec<Partition> = taken.iter().flatten().map(|claim| claim.partition).collect();
        all.sort_unstable();
        let count = all.len();
        all.dedup();
        assert_eq!(all.len(), count, "none was given twice");
        for row in &table.partitions {
            let before = seen[usize::from(row.claim.partition.number())].epoch;
            assert_eq!(row.claim.epoch.0 - before.0, i64::from(all.binary_search(&row.claim.partition).is_ok()));
        }
    }
}

#[test]
fn the_version_rises_with_every_change_and_with_no_other() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let a = start(&url, "a", 1);
    let mut last = a.version();
    let mut has_risen = || {
        let version = a.version();
        std::mem::replace(&mut last, version) < version
    };
    assert!(!has_risen());
    let b = start(&url, "b", 1);
    assert!(has_risen() && !has_risen());
    let one = Partition::new(17).unwrap();
    let seen = b.claim(one);
    b.take(one);
    assert!(has_risen());
    assert_eq!(now(a.ownership.take(&[seen])).unwrap(), [], "somebody was faster");
    assert_eq!(now(b.ownership.take(&[seen])).unwrap().len(), 1, "it is one's own already");
    now(a.ownership.release(&[one])).unwrap();
    assert!(!has_risen(), "it is not a's");
    let table = a.table();
    let row = table.owner(one).unwrap();
    assert_eq!((row.start, row.node.as_str(), row.number), (b.ownership.start(), "b", Some(1)));
    now(b.ownership.release(&[one])).unwrap();
    assert!(has_risen());
    assert_eq!((a.owner(one), a.claim(one).epoch), (None, Epoch(seen.epoch.0 + 2)));
    assert_eq!(a.table().starts.len(), 2);
}

#[test]
fn what_a_member_does_not_own_it_does_not_write() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let (ann, carl) = (Pair::new("ann", "bob"), Pair::new("carl", "dora"));
    let (ours, other) = (ann.id.partition(), carl.id.partition());
    assert_ne!(ours, other);
    let mut a = start(&url, "a", 1);
    a.take(ours);
    drive(&mut a.shards[0], &ann, (1, 20));
    // One commit, of which a part is not its own.
    a.shards[0].append(&ann.message(21).into()).unwrap();
    a.shards[0].append(&carl.message(1).into()).unwrap();
    a.shards[0].submit();
    failure(&mut a.shards[0]);
    assert_eq!(a.shards[0].append(&ann.message(22).into()), Err(StoreError::Poisoned));
    assert_eq!(cluster.sql(&url, "SELECT count(*), max(seq) FROM ringline.messages"), "20|20");
    // What was given back is not written either, though nobody else has it.
    let mut b = start(&url, "b", 1);
    b.take(ours);
    drive(&mut b.shards[0], &ann, (21, 30));
    now(b.ownership.release(&[ours])).unwrap();
    b.shards[0].append(&ann.message(31).into()).unwrap();
    b.shards[0].submit();
    failure(&mut b.shards[0]);
    assert_eq!(cluster.sql(&url, "SELECT count(*), max(seq) FROM ringline.messages"), "30|30");
    check(&url, &ann, 30);
}

#[test]
fn partitions_that_are_taken_under_load_lose_and_double_nothing() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let partition = pair.id.partition();
    let never = AtomicBool::new(false);
    let (mut owner, mut head) = (start(&url, "n0", 1), 0);
    owner.take(partition);
    drive(&mut owner.shards[0], &pair, (1, 5));
    head += 5;
    for round in 1..7 {
        let mut next = start(&url, &format!("n{}", round % 3), 1);
        let found = std::thread::scope(|scope| {
            let load = scope.spawn(|| drive_until(&mut owner.shards[0], &pair, (head + 1, &never)));
            std::thread::sleep(Duration::from_millis(20 * round));
            next.take(partition);
            let found = next.head(&pair);
            let acknowledged = load.join().unwrap();
            assert!(found >= acknowledged, "{acknowledged} were acknowledged, {found} are there");
            found
        });
        assert_eq!(next.head(&pair), found, "nothing came after the take");
        assert!(found > head);
        drive(&mut next.shards[0], &pair, (found + 1, found + 10));
        (owner, head) = (next, found + 10);
    }
    check(&url, &pair, head);
}

#[test]
fn partitions_are_handed_over_while_others_are_written() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let busy = [Pair::new("ann", "bob"), Pair::new("carl", "dora"), Pair::new("emil", "fay")];
    let wanderer = Pair::new("gus", "hal");
    let partition = wanderer.id.partition();
    assert!(busy.iter().all(|pair| pair.id.partition() != partition));
    let mut members = ["a", "b", "c"].map(|node| start(&url, node, 2));
    for (member, pair) in members.iter_mut().zip(&busy) {
        member.take(pair.id.partition());
        drive(&mut member.shards[0], pair, (1, 1));
    }
    let stop = AtomicBool::new(false);
    let mut head = 0;
    let heads: Vec<u64> = std::thread::scope(|scope| {
        let (mut loads, mut others) = (Vec::new(), Vec::new());
        for (member, pair) in members.iter_mut().zip(&busy) {
            let Member { shards, ownership } = member;
            let (one, other) = shards.split_at_mut(1);
            let stop = &stop;
            loads.push(scope.spawn(move || drive_until(&mut one[0], pair, (2, stop))));
            others.push((&mut other[0], &*ownership));
        }
        for round in 0..24 {
            let (store, ownership) = &mut others[round % 3];
            let table = now(ownership.table()).unwrap();
            let seen = table.partitions[usize::from(partition.number())];
            assert_eq!(seen.owner, None);
            assert_eq!(now(ownership.take(&[seen.claim])).unwrap().len(), 1);
            drive(store, &wanderer, (head + 1, head + 5));
            head += 5;
            now(ownership.release(&[partition])).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    });
    assert!(heads.iter().all(|head| *head > 24), "{heads:?}");
    drop(members);
    let mut node = Node::new(boxed(super::tests::open(&url, 1)));
    for (pair, head) in busy.iter().zip(heads).chain([(&wanderer, head)]) {
        assert_eq!(node.messages(pair.id, conformance::ALL).1, Seq(head));
    }
    let dense = "SELECT count(*) FROM (SELECT conversation FROM ringline.messages GROUP BY conversation \
                 HAVING count(*) <> max(seq) OR min(seq) <> 1) AS gaps";
    assert_eq!(cluster.sql(&url, dense), "0");
    node.close();
}

/// Takes what is free and gives it back, again and again. `owners` is what everybody believes: of each partition, the
/// start that was told it is its own.
fn grab(member: &Member, (owners, stop): (&[AtomicI64], &AtomicBool)) -> u64 {
    let (own, mut taken) = (member.ownership.start().0, 0);
    let ask = || loop {
        match now(member.ownership.table()) {
            Ok(table) => return table,
            Err(OwnershipError::Away(_)) => {}
            Err(error) => panic!("{error}"),
        }
    };
    while !stop.load(Ordering::Relaxed) {
        let free: Vec<Claim> = ask().partitions.iter().filter(|row| row.owner.is_none()).map(|row| row.claim).collect();
        let got: Vec<Partition> = match now(member.ownership.take(&free)) {
            Ok(claims) => claims.iter().map(|claim| claim.partition).collect(),
            Err(OwnershipError::Away(_)) => {
                let own = Some(member.ownership.start());
                ask().partitions.iter().filter(|row| row.owner == own).map(|row| row.claim.partition).collect()
            }
            Err(error) => panic!("{error}"),
        };
        for partition in &got {
            let cell = &owners[usize::from(partition.number())];
            assert_eq!(cell.compare_exchange(0, own, Ordering::SeqCst, Ordering::SeqCst), Ok(0), "given twice");
        }
        taken += got.len() as u64;
        for partition in &got {
            owners[usize::from(partition.number())].store(0, Ordering::SeqCst);
        }
        while let Err(error) = now(member.ownership.release(&got)) {
            assert!(matches!(error, OwnershipError::Away(_)), "{error}");
        }
    }
    taken
}

#[test]
fn a_server_that_is_killed_in_the_middle_of_takes_gives_none_twice() {
    let mut cluster = Cluster::start(&[]);
    let url = cluster.database();
    let members = ["a", "b", "c"].map(|node| start(&url, node, 1));
    let owners: Vec<AtomicI64> = (0..PARTITIONS).map(|_| AtomicI64::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let grabs = members.each_ref().map(|member| scope.spawn(|| grab(member, (&owners, &stop))));
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(300 + 123 * round));
            if round % 2 == 0 {
                cluster.kill();
                cluster.begin();
            } else {
                cluster.sql("postgres", TERMINATE);
            }
        }
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        let taken = grabs.map(|grab| grab.join().unwrap());
        println!("{taken:?} partitions were taken");
        assert!(taken.iter().sum::<u64>() > 0);
    });
    assert!(members[0].table().partitions.iter().all(|row| row.owner.is_none()));
}

#[test]
fn who_connects_anew_takes_nothing_back() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let (ann, carl) = (Pair::new("ann", "bob"), Pair::new("carl", "dora"));
    let mut a = start(&url, "a", 1);
    a.take_all();
    drive(&mut a.shards[0], &ann, (1, 10));
    drive(&mut a.shards[0], &carl, (1, 10));
    let mut b = start(&url, "b", 1);
    b.take(ann.id.partition());
    let since = Instant::now();
    cluster.sql("postgres", TERMINATE);
    while a.shards[0].stats().reconnects == 0 {
        wait(since, "the loss");
    }
    drive(&mut a.shards[0], &carl, (11, 20));
    drive(&mut b.shards[0], &ann, (11, 20));
    assert_eq!(b.owner(ann.id.partition()), Some(b.ownership.start()));
    assert_eq!(a.owner(carl.id.partition()), Some(a.ownership.start()));
    a.shards[0].append(&ann.message(21).into()).unwrap();
    a.shards[0].submit();
    failure(&mut a.shards[0]);
    drive(&mut b.shards[0], &ann, (21, 25));
    check(&url, &ann, 25);
}

#[test]
fn a_later_start_of_the_same_node_takes_the_place_of_the_earlier() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let mut old = start(&url, "a", 1);
    old.take_all();
    drive(&mut old.shards[0], &pair, (1, 9));
    let mut new = start(&url, "a", 1);
    assert_eq!(new.owner(pair.id.partition()), Some(old.ownership.start()), "it takes nothing by itself");
    let replaced = |result: Result<OwnershipTable, OwnershipError>| match result {
        Err(OwnershipError::Replaced(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = replaced(now(old.ownership.table()));
    assert!(why.contains(&format!("node a, start {}", new.ownership.start().0)), "{why}");
    let wanted = [old.claim_in(&new, pair.id.partition())];
    assert!(matches!(now(old.ownership.take(&wanted)), Err(OwnershipError::Replaced(_))));
    old.shards[0].append(&pair.message(10).into()).unwrap();
    old.shards[0].submit();
    failure(&mut old.shards[0]);
    new.take_all();
    drive(&mut new.shards[0], &pair, (10, 12));
    // A node alone takes everything, and says so to all.
    let alone = super::tests::open(&url, 1);
    replaced(now(new.ownership.table()));
    drop(alone);
    check(&url, &pair, 12);
}

impl Member {
    /// What another sees of a partition.
    fn claim_in(&self, other: &Member, partition: Partition) -> Claim {
        assert_ne!(self.ownership.start(), other.ownership.start());
        other.claim(partition)
    }
}

#[test]
fn a_session_on_another_server_than_that_of_the_last_take_is_given_up() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let pair = Pair::new("ann", "bob");
    let options = Arc::new(options(&url));
    let address = Arc::new(Address::read(&url, None).unwrap());
    let runtime = runtime().unwrap();
    let (_, owner, epochs) = runtime.block_on(prepare(&address, ("a", 1))).unwrap();
    let held = Arc::new(Held::new(epochs));
    let (mut handles, workers) = lines(&options, (&address, owner, &held), 1).unwrap();
    run(runtime, workers, Others::default()).unwrap();
    let mut store = handles.remove(0);
    drive(&mut store, &pair, (1, 9));
    assert_eq!(store.stats().reconnects, 0);
    held.add([], Server(1));
    let lsn = store.append(&pair.message(10).into()).unwrap();
    committed(&mut store, lsn);
    assert_eq!(store.stats().reconnects, 1, "the session that began after it is good");
    drive(&mut store, &pair, (11, 20));
    assert_eq!(store.stats().reconnects, 1);
    store.close().unwrap();
    check(&url, &pair, 20);
}

#[test]
fn requests_are_answered_when_the_server_is_away_and_when_it_is_back() {
    let mut cluster = Cluster::start(&[]);
    let url = cluster.database();
    let options = PostgresOptions { timeout: Duration::from_millis(700), ..options(&url) };
    let (shards, ownership, report) = PostgresStore::open_cluster(options, 1).unwrap();
    assert_eq!(report.owner, ownership.start().0);
    cluster.kill();
    assert!(matches!(now(ownership.version()), Err(OwnershipError::Away(_))));
    cluster.begin();
    let since = Instant::now();
    while now(ownership.version()).is_err() {
        wait(since, "an answer");
    }
    assert!(since.elapsed() < PATIENCE);
    // The handle outlives those of the shards.
    drop(shards);
    assert!(now(ownership.table()).is_ok());
}
