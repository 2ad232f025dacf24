//! A simulated cluster: what holds on one node holds on three, whatever happens to nodes and links.

use ringline_bench::checker::Counts;
use ringline_bench::sim::cluster;

#[test]
fn equal_seeds_give_equal_runs() {
    for seed in 1_000..1_003 {
        let (one, other) = (cluster::run(seed), cluster::run(seed));
        assert_eq!((one.trace, one.steps, one.millis), (other.trace, other.steps, other.millis), "seed {seed}");
    }
}

#[test]
fn a_hundred_seeds_hold_and_do_something() {
    let mut counts = Counts::default();
    let seeds = std::env::var("SEEDS").ok().and_then(|seeds| {
        let (from, to) = seeds.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    for seed in seeds.unwrap_or(0..100) {
        let run = cluster::run(seed);
        let again = format!("SEEDS={seed}..{} cargo test -p ringline-bench --test sim_cluster", seed + 1);
        assert!(run.verdict.is_clean(), "{:?}; again: {again}", run.verdict.violations);
        counts += run.verdict.counts;
    }
    println!("{counts:?}");
}
