//! The checker can see: every planted bug is found within a bounded number of seeds, and by what clients saw.
//!
//! Needs the feature `planted-bugs`.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ringline_bench::checker::Rule;
use ringline_bench::sim::cluster::{self, Setup};
use ringline_bench::sim::{self, Bug};

/// Seeds within which a bug has to be found.
const SEEDS_MAX: u64 = 100;

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = Vec::new();
    for bug in Bug::all() {
        // A panic of the shard's own assertions is no proof of the checker: only verdicts count.
        let caught = (0..SEEDS_MAX).find_map(|seed| {
            let run = catch_unwind(AssertUnwindSafe(|| sim::run(seed, Some(bug)))).ok()?;
            let violations = run.verdict.violations;
            (!violations.is_empty()).then_some((seed, violations))
        });
        match caught {
            Some((seed, violations)) => {
                let rules: BTreeSet<Rule> = violations.iter().map(|violation| violation.rule).collect();
                println!("{bug:?}: seed {seed}, {rules:?}");
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not seen within {SEEDS_MAX} seeds: {missed:?}");
}

#[test]
fn without_a_bug_the_same_seeds_are_clean() {
    for seed in 0..SEEDS_MAX / 4 {
        let run = sim::run(seed, None);
        assert!(run.verdict.is_clean(), "seed {seed}: {:?}", run.verdict.violations.first());
    }
}

/// Bugs of partitions that change hands, seen by what clients saw or by the referee.
#[test]
fn every_planted_bug_of_a_cluster_is_caught() {
    let mut missed = Vec::new();
    for bug in [cluster::Bug::ServesOn, cluster::Bug::LongLease, cluster::Bug::GivesAtOnce] {
        let setup = Setup { nodes: 3, moving: true, bug: Some(bug) };
        let caught = (0..SEEDS_MAX).find_map(|seed| {
            let played = catch_unwind(AssertUnwindSafe(|| cluster::run(seed, setup))).ok()?;
            (!played.is_clean()).then_some((seed, played))
        });
        match caught {
            Some((seed, played)) => {
                let rules = played.run.verdict.violations.iter().map(|violation| violation.rule);
                println!("{bug:?}: seed {seed}, {:?} {:?}", rules.collect::<BTreeSet<Rule>>(), played.breaches);
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not seen within {SEEDS_MAX} seeds: {missed:?}");
}
