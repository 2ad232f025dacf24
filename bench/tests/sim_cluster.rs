//! A simulated cluster: what holds on one node holds on several, whatever happens to nodes and links, to leases and to the
//! database.
//!
//! More seeds are played by the program: `cargo run -p ringline-bench --bin sim -- --cluster moving --nodes 5 --seeds 0..500`.

use ringline_bench::checker::Counts;
use ringline_bench::sim::cluster::{self, Setup};

fn seeds(default: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let told = std::env::var("SEEDS").ok().and_then(|seeds| {
        let (from, to) = seeds.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    told.unwrap_or(default)
}

fn setups() -> [Setup; 4] {
    let of = |nodes, moving| Setup { nodes, moving, bug: None };
    [of(3, false), of(5, false), of(3, true), of(5, true)]
}

#[test]
fn equal_seeds_give_equal_runs() {
    for setup in setups() {
        let (one, other) = (cluster::run(1_000, setup), cluster::run(1_000, setup));
        let told = |played: &cluster::Played| (played.run.trace, played.run.steps, played.run.millis);
        assert_eq!(told(&one), told(&other), "{setup:?}");
    }
}

fn hold(setup: Setup, default: std::ops::Range<u64>) {
    let (mut counts, mut resent) = (Counts::default(), 0);
    for seed in seeds(default) {
        let played = cluster::run(seed, setup);
        let kind = if setup.moving { "moving" } else { "configured" };
        let again = format!(
            "cargo run -p ringline-bench --bin sim -- --cluster {kind} --nodes {} --seeds {seed}..{}",
            setup.nodes,
            seed + 1
        );
        assert!(played.is_clean(), "{:?} {:?}; again: {again}", played.breaches, played.run.verdict.violations);
        counts += played.run.verdict.counts;
        resent += played.resent;
    }
    println!("{setup:?}: {counts:?}, {resent} batches came twice");
    assert!(counts.accepted > 100 && counts.seen > counts.accepted && counts.unknown > 0, "{counts:?}");
}

#[test]
fn three_configured_nodes_hold() {
    hold(setups()[0], 0..30);
}

#[test]
fn five_configured_nodes_hold() {
    hold(setups()[1], 0..15);
}

#[test]
fn three_nodes_with_partitions_that_move_hold() {
    hold(setups()[2], 0..15);
}

#[test]
fn five_nodes_with_partitions_that_move_hold() {
    hold(setups()[3], 0..8);
}
