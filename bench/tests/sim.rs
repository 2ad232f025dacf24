//! The simulator itself: equal seeds give equal runs, the runs do something, and a few seeds hold.
//!
//! More seeds are played by the program: `cargo run -p ringline-bench --bin sim -- --seeds 0..5000`.

use ringline_bench::checker::Counts;
use ringline_bench::sim;

#[test]
fn equal_seeds_give_equal_runs() {
    for seed in 1_000..1_004 {
        let (one, other) = (sim::run(seed, None), sim::run(seed, None));
        assert_eq!((one.trace, one.steps, one.millis), (other.trace, other.steps, other.millis), "seed {seed}");
        assert_eq!(one.verdict.counts, other.verdict.counts, "seed {seed}");
    }
    assert_ne!(sim::run(1_000, None).trace, sim::run(1_001, None).trace);
}

#[test]
fn a_few_seeds_hold_and_do_something() {
    let mut counts = Counts::default();
    for seed in 0..12 {
        let run = sim::run(seed, None);
        let again = format!("cargo run -p ringline-bench --bin sim -- --seeds {seed}..{}", seed + 1);
        assert!(run.verdict.is_clean(), "{:?}; again: {again}", run.verdict.violations);
        counts += run.verdict.counts;
    }
    assert!(counts.accepted > 1_000 && counts.seen > 3 * counts.accepted && counts.receipts > 20, "{counts:?}");
    assert!(counts.unknown > 0, "some sends have an unknown end: {counts:?}");
    assert!(counts.changes > 50 && counts.reads > 100 && counts.synced > 1_000, "{counts:?}");
    assert!(counts.amended > 50 && counts.hidden > 30, "{counts:?}");
    assert!(counts.passed > 200 && counts.presence > 50 && counts.pages > 30, "{counts:?}");
    // Each rule was looked at: one that never bites proves nothing.
    assert!(counts.deleted > 0 && counts.turned_away > 0, "{counts:?}");
    assert!(counts.permits > 20 && counts.barred > 20, "{counts:?}");
    assert!(counts.ranked > 20 && counts.outranked > 20 && counts.dissolved > 0, "{counts:?}");
    assert!(counts.mentions > 50 && counts.marks > 10 && counts.exported > 1_000, "{counts:?}");
    assert!(counts.notices > 10 && counts.told > 50 && counts.notices_at_rest > 5, "{counts:?}");
}
