//! Faults of a cluster of etcd with real processes: nodes, etcd and PostgreSQL are killed, stopped, restarted and cut off from each
//! other while SDK clients write, a ledger of what each was told decides in the end ([`load`]), and a table says for how long whom
//! nothing was accepted of.
//!
//! Times are printed and never judged. The long tests run with `RINGLINE_TEST_LONG=1`; those that cut need root and network
//! namespaces, and say so where they have none. `RINGLINE_TEST_KILLS=N` (see `bench/failover.sh`) measures fail-over. To see the
//! tables: `cargo test -p ringline --test cluster_faults -- --nocapture`.

#[path = "../common/mod.rs"]
mod common;
mod ensemble;
mod load;
mod world;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use load::{Distance, Load, table};
use world::{Ground, World};

const NODES: usize = 3;
/// Rings of users, one on each node.
const RINGS: usize = 2;
/// The same while fail-over is measured.
const RINGS_MEASURED: usize = 8;
/// How long a cut, or a stop of what all need, lasts: longer than a lease of 10 s.
const TROUBLE: Duration = Duration::from_secs(30);
/// How long PostgreSQL, or etcd's leader, is away before it comes back.
const AWAY: Duration = Duration::from_secs(3);
/// How long a node hangs at the least in the long test.
const HANGS: Duration = Duration::from_secs(40);
/// Of 100 packets, where some are lost.
const LOST_PERCENT: u8 = 10;

/// Each of these tests alone: they load the machine, and one that stalls loses leases.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_long() -> bool {
    let long = std::env::var_os("RINGLINE_TEST_LONG").is_some();
    if !long {
        eprintln!("skipped: set RINGLINE_TEST_LONG to run it");
    }
    long
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// A cluster under load.
struct Scene {
    world: World,
    load: Load,
}

impl Scene {
    fn begin(mut world: World, rings: usize) -> Self {
        let started = world.start_all();
        let mut load = Load::start(&mut world, rings);
        world.pass(AWAY);
        load.until_served(&mut world);
        load.row("nothing happens for 3 s", None, &format!("all own their parts {} after the start", seconds(started)));
        Self { world, load }
    }

    fn end(self) {
        let Self { mut world, load } = self;
        load.finish(&mut world);
        let all = world.all_but(&[]);
        world.stop(&all);
    }

    /// Waits until everything is as it should be and everybody is served; how long that took.
    fn whole(&mut self) -> Duration {
        let settled = self.world.settle(&self.world.all_but(&[]));
        settled + self.load.until_served(&mut self.world)
    }

    /// A node is killed, the others take over; then it is started again.
    fn killed(&mut self, node: usize) -> [BTreeMap<Distance, Vec<Duration>>; 2] {
        self.world.kill(node);
        let taken = self.world.settle(&self.world.all_but(&[node]));
        self.load.until_served(&mut self.world);
        let gone =
            self.load.row("a node is killed", Some(node), &format!("others own its part after {}", seconds(taken)));
        self.world.start(node);
        let whole = self.whole();
        let back = self.load.row("it is started again", Some(node), &format!("whole after {}", seconds(whole)));
        [gone, back]
    }

    /// A node is stopped for longer than its lease, and goes on: it finds itself replaced, ends, and is started anew.
    fn hangs(&mut self, node: usize, at_least: Duration) {
        let before = self.world.restarts();
        self.world.signal(node, "STOP");
        let taken = self.world.settle(&self.world.all_but(&[node]));
        self.world.pass(at_least.saturating_sub(taken));
        let hung = taken.max(at_least);
        let case = format!("a node hangs (SIGSTOP) for {}", seconds(hung));
        self.load.row(&case, Some(node), &format!("others own its part after {}", seconds(taken)));
        self.world.signal(node, "CONT");
        self.world.until("the end of the node that was replaced", |world| world.restarts() > before);
        let whole = self.whole();
        self.load.row("it goes on, ends, is started anew", Some(node), &format!("whole after {}", seconds(whole)));
    }

    fn etcds_leader_is_killed(&mut self) {
        let leader = self.world.etcd.leader();
        self.world.etcd.kill(leader);
        self.world.pass(AWAY);
        self.load.until_served(&mut self.world);
        self.load.row("etcd's leader of three is killed", None, "");
        self.world.etcd.begin_all();
    }

    fn etcd_is_away(&mut self) {
        let before = self.world.restarts();
        self.world.etcd.kill_all();
        self.world.pass(TROUBLE);
        self.load.row(&format!("all of etcd is away for {}", seconds(TROUBLE)), None, "");
        self.world.etcd.begin_all();
        let whole = self.whole();
        let ended = self.world.restarts() - before;
        let note = format!("whole after {}, {ended} nodes ended and were started anew", seconds(whole));
        self.load.row("it is back", None, &note);
    }

    fn postgres_is_away(&mut self, killed: bool) {
        let away = if killed {
            self.world.postgres.kill();
            self.world.pass(AWAY);
            format!("PostgreSQL is killed (-9) and started {} later", seconds(AWAY))
        } else {
            self.world.postgres.stop();
            "PostgreSQL restarts".to_owned()
        };
        self.world.begin_postgres();
        let whole = self.whole();
        self.load.row(&away, None, &format!("whole {} after it answers", seconds(whole)));
    }

    fn rolling_restart(&mut self) {
        for node in 0..self.world.size() {
            self.world.stop(&[node]);
            let left = self.world.all_but(&[node]);
            self.world.settle(&left);
            self.load.until_served(&mut self.world);
            self.load.row("a node is told to stop (SIGTERM)", Some(node), "");
            self.world.start(node);
            let whole = self.whole();
            self.load.row("it is started again", Some(node), &format!("whole after {}", seconds(whole)));
        }
    }

    /// Something is cut or lost for a while, and mended.
    fn cut(&mut self, case: &str, node: usize, cut: &dyn Fn(&World, bool)) {
        let before = self.world.restarts();
        cut(&self.world, true);
        self.world.pass(TROUBLE);
        self.load.row(&format!("{case}, {}", seconds(TROUBLE)), Some(node), "");
        cut(&self.world, false);
        let whole = self.whole();
        let ended = self.world.restarts() - before;
        self.load.row("mended", Some(node), &format!("whole after {}; nodes ended: {ended}", seconds(whole)));
    }
}

/// Both directions between two spaces.
fn apart(world: &World, (one, other): (usize, usize), cut: bool) {
    let net = world.net.as_ref().expect("a world of namespaces");
    net.cut(one, other, cut);
    net.cut(other, one, cut);
}

#[test]
fn slow_own_net_nodes_etcds_leader_and_postgresql_are_killed_and_a_node_hangs() {
    let _alone = alone();
    let Some(world) = World::new("small", NODES, Ground::Loopback) else { return };
    table("three nodes, etcd and PostgreSQL on one machine");
    let mut scene = Scene::begin(world, RINGS);
    scene.killed(2);
    scene.etcds_leader_is_killed();
    scene.postgres_is_away(true);
    scene.hangs(1, Duration::ZERO);
    scene.end();
}

#[test]
fn slow_own_net_long_all_that_ends_and_comes_back() {
    if !is_long() {
        return;
    }
    let _alone = alone();
    let Some(world) = World::new("long", NODES, Ground::Loopback) else { return };
    table("three nodes, etcd and PostgreSQL on one machine");
    let mut scene = Scene::begin(world, RINGS);
    (0..NODES).for_each(|node| drop(scene.killed(node)));
    scene.hangs(1, HANGS);
    scene.etcds_leader_is_killed();
    scene.etcd_is_away();
    scene.postgres_is_away(true);
    scene.postgres_is_away(false);
    scene.rolling_restart();
    scene.end();
}

#[test]
fn slow_own_net_long_a_node_is_cut_off_from_some_and_from_all() {
    if !is_long() {
        return;
    }
    let _alone = alone();
    let Some(world) = World::new("cuts", NODES, Ground::Namespaces) else { return };
    let (etcd, postgres) = (world.etcd_space(), world.postgres_space());
    table("three nodes, etcd and PostgreSQL, each with a network of its own");
    let mut scene = Scene::begin(world, RINGS);
    let all = [0, 1, etcd, postgres];
    scene.cut("a node is cut off from etcd alone", 2, &|world, cut| apart(world, (2, etcd), cut));
    scene.cut("from PostgreSQL alone", 2, &|world, cut| apart(world, (2, postgres), cut));
    scene.cut("from the other nodes alone", 2, &|world, cut| [0, 1].iter().for_each(|at| apart(world, (2, *at), cut)));
    scene.cut("from all but its clients", 2, &|world, cut| all.iter().for_each(|at| apart(world, (2, *at), cut)));
    let net = |world: &World, act: &dyn Fn(&common::net::Net)| act(world.net.as_ref().expect("a world of namespaces"));
    scene.cut("from all, its clients too", 2, &|world, cut| net(world, &|net| net.unplug(2, cut)));
    let one_way = |hears: bool| {
        move |world: &World, cut: bool| {
            let cut_one =
                |at: &usize| net(world, &|net| if hears { net.cut(2, *at, cut) } else { net.cut(*at, 2, cut) });
            all.iter().for_each(cut_one);
        }
    };
    scene.cut("it hears all, and nobody but its clients hears it", 2, &one_way(true));
    scene.cut("all hear it, and it hears nobody but its clients", 2, &one_way(false));
    scene.cut("etcd's answers to it are lost", 2, &|world, cut| net(world, &|net| net.cut(etcd, 2, cut)));
    scene.cut("PostgreSQL's answers to it are lost", 2, &|world, cut| net(world, &|net| net.cut(postgres, 2, cut)));
    let percent = |lossy: bool| if lossy { LOST_PERCENT } else { 0 };
    let can_lose = scene.world.net.as_ref().map(|net| net.lose(2, 0, LOST_PERCENT).and_then(|()| net.lose(2, 0, 0)));
    match can_lose {
        Some(Err(why)) => eprintln!("loss: skipped, {why}"),
        _ => scene.cut(&format!("{LOST_PERCENT} % of its packets to and from all are lost"), 2, &|world, lossy| {
            for at in all {
                net(world, &|net| net.lose(at, 2, percent(lossy)).and(net.lose(2, at, percent(lossy))).unwrap());
            }
        }),
    }
    scene.end();
}

#[test]
fn slow_own_net_long_three_and_five_nodes_start_at_the_same_moment() {
    if !is_long() {
        return;
    }
    let _alone = alone();
    for nodes in [3, 5] {
        let Some(mut world) = World::new("starts", nodes, Ground::Loopback) else { return };
        for round in 0..10 {
            let started = world.start_all();
            println!("{nodes} nodes, round {round}: all own their parts after {}", seconds(started));
            let all = world.all_but(&[]);
            world.stop(&all);
        }
    }
}

/// `RINGLINE_TEST_KILLS`: how often a node is killed and started again, in turn.
#[test]
fn slow_own_net_long_fail_over_time_as_clients_see_it() {
    let Ok(kills) = std::env::var("RINGLINE_TEST_KILLS") else {
        return eprintln!("skipped: set RINGLINE_TEST_KILLS to run it");
    };
    let kills: usize = kills.parse().expect("a number");
    let _alone = alone();
    let Some(world) = World::new("failover", NODES, Ground::Loopback) else { return };
    table("three nodes, etcd and PostgreSQL on one machine");
    let mut scene = Scene::begin(world, RINGS_MEASURED);
    let mut sums = [BTreeMap::<_, Vec<_>>::new(), BTreeMap::new()];
    for kill in 0..kills {
        for (sum, seen) in sums.iter_mut().zip(scene.killed(kill % NODES)) {
            seen.into_iter().for_each(|(distance, outages)| sum.entry(distance).or_default().extend(outages));
        }
    }
    scene.end();
    println!("\n{kills} kills, outages of all senders in each | p50 | p90 | max |\n|---|--:|--:|--:|");
    for (sum, what) in sums.iter_mut().zip(["killed", "started again"]) {
        for (distance, outages) in sum {
            outages.sort_unstable();
            let at = |percent: usize| seconds(outages[(outages.len() - 1) * percent / 100]);
            println!("| {what}: {} | {} | {} | {} |", distance.name(), at(50), at(90), at(100));
        }
    }
}
