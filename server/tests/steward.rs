//! Stewards of several nodes with a real etcd, a table of owners in memory, and cores that do nothing but obey: who serves
//! what while nodes come, are drained and die.

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::etcd::Etcd;
use ringline::etcd::access::Access;
use ringline::etcd::drains::Drains;
use ringline::etcd::entry::{Entry, Listing};
use ringline::etcd::lease::LeaseClock;
use ringline::etcd::{Directory, EtcdOptions, Keeper, Lost, watch};
use ringline::peers::roster::Roster;
use ringline::steward::desk::{self, OrdersPort};
use ringline::steward::view::View;
use ringline::steward::{Deeds, DeedsError, Own, Registry, Steward, StewardParts};
use ringline::wake::Waker;
use ringline_cluster::balance::Strategy;
use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::membership::{Member, Standing};
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::reconcile::{Holding, Start};
use ringline_cluster::router::{Board, Router};
use ringline_core::config::Lease;
use ringline_schema::ids::{PARTITIONS, Partition};
use tokio::sync::{Notify, watch as changing};
use tokio::task::JoinHandle;

/// The table and the starts in it, as a database would keep them.
#[derive(Clone, Default)]
struct Table(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    deeds: Deeds,
    is_away: bool,
    replaced: Option<Start>,
}

impl Table {
    fn new() -> Self {
        let row = |number| Holding { partition: Partition::new(number).unwrap(), epoch: 0, owner: Start::NOBODY };
        let table = Self::default();
        table.0.lock().unwrap().deeds.rows = (0..PARTITIONS).map(row).collect();
        table
    }

    fn enter(&self, own: &Own) -> Registered {
        let mut inner = self.0.lock().unwrap();
        inner.deeds.version += 1;
        inner.deeds.starts.insert(own.start, (own.name.clone(), own.number));
        Registered { table: self.clone(), start: own.start }
    }

    fn owned(&self) -> BTreeMap<Start, usize> {
        let mut owned = BTreeMap::new();
        self.0.lock().unwrap().deeds.rows.iter().for_each(|row| *owned.entry(row.owner).or_default() += 1);
        owned
    }
}

/// One start's way to the table.
struct Registered {
    table: Table,
    start: Start,
}

impl Registered {
    fn with<T>(&self, act: impl FnOnce(&mut Deeds) -> T) -> Result<T, DeedsError> {
        let mut inner = self.table.0.lock().unwrap();
        if inner.is_away {
            return Err(DeedsError::Away("the database is away".into()));
        }
        if inner.replaced == Some(self.start) {
            return Err(DeedsError::Replaced("another start has taken this one's place".into()));
        }
        Ok(act(&mut inner.deeds))
    }
}

impl Registry for Registered {
    async fn version(&self) -> Result<u64, DeedsError> {
        self.with(|deeds| deeds.version)
    }

    async fn read(&self) -> Result<Deeds, DeedsError> {
        self.with(|deeds| deeds.clone())
    }

    async fn take(&self, seen: &[Holding]) -> Result<usize, DeedsError> {
        self.with(|deeds| {
            let mut taken = 0;
            for seen in seen {
                let row = &mut deeds.rows[usize::from(seen.partition.number())];
                if row == seen {
                    *row = Holding { epoch: row.epoch + 1, owner: self.start, ..*row };
                    taken += 1;
                }
            }
            deeds.version += 1;
            taken
        })
    }

    async fn release(&self, partitions: &[Partition]) -> Result<(), DeedsError> {
        self.with(|deeds| {
            for partition in partitions {
                let row = &mut deeds.rows[usize::from(partition.number())];
                if row.owner == self.start {
                    *row = Holding { epoch: row.epoch + 1, owner: Start::NOBODY, ..*row };
                }
            }
            deeds.version += 1;
        })
    }
}

/// Who serves which partition.
type Serving = BTreeMap<u16, Vec<(Start, LeaseClock)>>;

/// The same over all nodes: never two at once.
#[derive(Clone, Default)]
struct Served(Arc<Mutex<Serving>>);

impl Served {
    /// A core has new orders.
    fn obey(&self, own: &Own, clock: &LeaseClock, serves: impl Fn(Partition) -> bool) {
        let mut served = self.0.lock().unwrap();
        for number in 0..PARTITIONS {
            let by = served.entry(number).or_default();
            by.retain(|(start, _)| *start != own.start);
            if !serves(Partition::new(number).unwrap()) {
                continue;
            }
            let others: Vec<_> = by.iter().filter(|(_, clock)| !clock.is_over(Instant::now())).collect();
            assert!(others.is_empty(), "{number} is served by {own:?} and {others:?}");
            by.push((own.start, clock.clone()));
        }
    }
}

/// One node: a registration, a steward, a bell, and one core that does as it is told.
struct Node {
    own: Own,
    drain: changing::Sender<bool>,
    /// Kept as long as the key is to stay.
    entry: changing::Sender<Entry>,
    steward: JoinHandle<Result<(), Lost>>,
    keeper: JoinHandle<Result<(), Lost>>,
    rest: Vec<JoinHandle<()>>,
    board: Arc<Board>,
    views: changing::Receiver<Arc<View>>,
}

struct World {
    etcd: Etcd,
    table: Table,
    served: Served,
    starts: i64,
}

impl World {
    fn new() -> Self {
        Self { etcd: Etcd::start(), table: Table::new(), served: Served::default(), starts: 0 }
    }

    fn options(&self) -> EtcdOptions {
        let endpoints = vec![self.etcd.endpoint().parse().unwrap()];
        EtcdOptions { endpoints, prefix: "/test".into(), timeout: Duration::from_secs(2), access: Access::default() }
    }

    async fn start(&mut self, number: u16) -> Node {
        self.starts += 1;
        let own = Own { name: format!("n{number}"), number: NodeIndex(number), start: Start(self.starts) };
        let registry = self.table.enter(&own);
        let address = SocketAddr::from(([127, 0, 0, 1], 9_800 + number));
        let incarnation = Incarnation(own.start.0.unsigned_abs());
        let list = vec![(own.number, own.name.clone(), address)];
        let roster = Arc::new(Roster::numbered(("test", &own.name), list, (incarnation, 1), None).unwrap());
        let member = Member {
            incarnation,
            peer_address: address,
            client_address: format!("127.0.0.1:{}", 9_700 + number),
            weight: 1,
            client_weight: 1,
            connections: 0,
            standing: Standing::Up,
        };
        let entry = Entry { member, start: own.start, number: own.number, owned: Some(0) };
        let clock = LeaseClock::new(Instant::now(), Lease::new(0));
        let etcd = self.options();
        let keeper = Keeper::register(&etcd, &own.name, entry.clone(), clock.clone()).await.unwrap();
        let (sender, receiver) = changing::channel(entry);
        let bell = Arc::new(Notify::new());
        let (desk, mut ports) = desk::desk(&[Arc::new(Waker::new().unwrap())], &bell);
        let core = core(ports.remove(0), own.clone(), clock.clone(), self.served.clone());
        let rest = vec![tokio::spawn(core), tokio::spawn(watch::ring(etcd.clone(), bell))];
        let (view, views) = changing::channel(Arc::default());
        let board = Arc::new(Board::new(1));
        let (entry, seen) = (sender.clone(), board.clone());
        let parts = StewardParts { own: own.clone(), etcd, registry, clock, desk, roster, entry, board, view };
        let (drain, draining) = changing::channel(false);
        let steward = tokio::task::spawn_local(Steward::new(parts).run(draining));
        let keeper = tokio::spawn(keeper.keep(receiver));
        Node { own, drain, entry: sender, steward, keeper, rest, board: seen, views }
    }

    /// Waits until these starts own all partitions between them, each about its part, and nobody else any.
    async fn until_shared(&self, nodes: &[&Node]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let owned = self.table.owned();
            let fair = usize::from(PARTITIONS) / nodes.len();
            let has = |node: &&Node| owned.get(&node.own.start).is_some_and(|count| *count > fair / 2);
            if owned.len() == nodes.len() && nodes.iter().all(has) {
                return;
            }
            assert!(Instant::now() < deadline, "{owned:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Node {
    /// As by SIGKILL.
    fn vanish(self) {
        self.steward.abort();
        self.keeper.abort();
        self.rest.iter().for_each(JoinHandle::abort);
    }

    async fn drained(self) {
        self.drain.send_replace(true);
        assert_eq!(tokio::time::timeout(PATIENCE, self.steward).await.unwrap().unwrap(), Ok(()));
        drop(self.entry);
        assert_eq!(self.keeper.await.unwrap(), Ok(()));
        self.rest.iter().for_each(JoinHandle::abort);
    }
}

/// A core that serves what it is told to, and has never anything in flight for long.
async fn core(mut port: OrdersPort, own: Own, clock: LeaseClock, served: Served) {
    loop {
        if port.is_new()
            && let Some(orders) = port.take()
        {
            let ownership = &orders.ownership;
            served.obey(&own, &clock, |partition| {
                let part = ownership.part(partition);
                part.owner == Some(own.number) && !part.giving
            });
            tokio::time::sleep(Duration::from_millis(5)).await;
            port.release(ownership.version);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Runs on one thread, as the side thread of a node does.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

#[test]
fn partitions_follow_nodes_that_come_are_drained_and_die() {
    run(async {
        let mut world = World::new();
        let a = world.start(0).await;
        let b = world.start(5).await;
        let c = world.start(9).await;
        world.until_shared(&[&a, &b, &c]).await;
        let d = world.start(63).await;
        world.until_shared(&[&a, &b, &c, &d]).await;
        b.drained().await;
        world.until_shared(&[&a, &c, &d]).await;
        // It comes back under its number as another start, and gets its part again.
        let b = world.start(5).await;
        world.until_shared(&[&a, &b, &c, &d]).await;
        c.vanish();
        world.until_shared(&[&a, &b, &d]).await;
        // The last one that is drained has nobody to hand over to.
        b.drained().await;
        d.drained().await;
        world.until_shared(&[&a]).await;
        a.drained().await;
    });
}

#[test]
fn while_the_table_or_etcd_is_away_nothing_moves_and_nobody_ends() {
    run(async {
        let mut world = World::new();
        let a = world.start(0).await;
        world.until_shared(&[&a]).await;
        world.table.0.lock().unwrap().is_away = true;
        let b = world.start(1).await;
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert_eq!(world.table.owned().len(), 1);
        world.table.0.lock().unwrap().is_away = false;
        world.until_shared(&[&a, &b]).await;
        world.etcd.kill();
        world.etcd.begin();
        let c = world.start(2).await;
        world.until_shared(&[&a, &b, &c]).await;
        assert!([&a, &b, &c].iter().all(|node| !node.steward.is_finished() && !node.keeper.is_finished()));
    });
}

#[test]
fn a_start_that_was_replaced_ends() {
    run(async {
        let mut world = World::new();
        let a = world.start(0).await;
        let b = world.start(1).await;
        world.until_shared(&[&a, &b]).await;
        world.table.0.lock().unwrap().replaced = Some(a.own.start);
        let ended = tokio::time::timeout(PATIENCE, a.steward).await.unwrap().unwrap();
        assert!(matches!(&ended, Err(Lost::Start(why)) if why.contains("another start")), "{ended:?}");
        // Its key is taken away under the other one's feet: that is the end of it too.
        b.keeper.abort();
        // base64 of /test/nodes/n1.
        world.etcd.ask("/v3/kv/deleterange", r#"{"key":"L3Rlc3Qvbm9kZXMvbjE="}"#).unwrap();
        assert_eq!(tokio::time::timeout(PATIENCE, b.steward).await.unwrap().unwrap(), Err(Lost::Lease));
    });
}

/// Looks again and again until the node's view is so.
async fn until_view(node: &Node, what: &str, done: impl Fn(&View) -> bool) {
    let mut views = node.views.clone();
    let seen = tokio::time::timeout(PATIENCE, views.wait_for(|view| done(view))).await;
    assert!(seen.is_ok(), "{what}: {:?}", node.views.borrow());
}

#[test]
fn a_mark_drains_a_node_over_its_starts_until_it_is_taken_away() {
    run(async {
        let mut world = World::new();
        // Unlike a node, this one is asked once.
        let patient = EtcdOptions { timeout: PATIENCE, ..world.options() };
        let (mut drains, mut directory) = (Drains::new(&patient), Directory::new(&patient));
        let [a, b] = [world.start(0).await, world.start(1).await];
        world.until_shared(&[&a, &b]).await;
        drains.mark("n1").await.unwrap();
        drains.mark("n1").await.unwrap();
        world.until_shared(&[&a]).await;
        let drained = |listing: &Listing| {
            let entry = &listing.entries["n1"];
            entry.member.standing == Standing::Draining && entry.owned == Some(0)
        };
        let deadline = Instant::now() + PATIENCE;
        while !drained(&directory.list().await.unwrap()) {
            assert!(Instant::now() < deadline, "it says so itself");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!b.steward.is_finished() && !b.keeper.is_finished(), "it stays, and owns nothing");
        // Another start of it owns nothing either.
        b.drained().await;
        let b = world.start(1).await;
        until_view(&b, "it sees that it drains", |view| view.listing.drained.contains("n1")).await;
        until_view(&a, "a sees it", |view| view.listing.entries.contains_key("n1")).await;
        world.until_shared(&[&a]).await;
        // ROUTE names it to nobody who does not live there.
        let mut turns = Router::new(Strategy::RoundRobin, a.board.clone(), 1);
        let both = || [NodeIndex(0), NodeIndex(1)].into_iter();
        assert!((0..4).all(|_| turns.pick(None, &mut both()) == Some(NodeIndex(0))));
        // Where all are drained, those who own go on.
        drains.mark("n0").await.unwrap();
        until_view(&a, "a sees its mark", |view| view.listing.drained.len() == 2 && view.wanted[0].is_none()).await;
        world.until_shared(&[&a]).await;
        assert!(drains.unmark("n0").await.unwrap() && !drains.unmark("n0").await.unwrap());
        assert!(drains.unmark("n1").await.unwrap());
        world.until_shared(&[&a, &b]).await;
    });
}

#[test]
fn what_a_node_says_of_itself_is_how_much_it_owns_and_how_many_clients_it_has() {
    run(async {
        let mut world = World::new();
        let [a, b] = [world.start(0).await, world.start(1).await];
        world.until_shared(&[&a, &b]).await;
        b.board.count(0, 700);
        until_view(&a, "a hears of it", |view| {
            let told = |name: &str| view.listing.entries.get(name).and_then(|entry| entry.owned).unwrap_or(0);
            let clients = view.listing.entries.get("n1").map(|entry| entry.member.connections);
            clients == Some(700) && told("n0") + told("n1") == PARTITIONS
        })
        .await;
        let all = a.views.borrow().nodes(&a.board);
        let shown: u64 = all.as_array().unwrap().iter().map(|node| node["partitions"].as_u64().unwrap()).sum();
        assert_eq!(shown, u64::from(PARTITIONS));
    });
}
