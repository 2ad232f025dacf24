//! Several real shards under virtual time: random sends, retries, reconnects, crashes of the node, delayed and lost
//! lane messages. From outside, on what clients saw, it checks density, order, and that nothing is lost or doubled.
//!
//! A failure prints its seed; `RINGLINE_SEED=n cargo test -p ringline-core --test shards` replays it.

mod world;

use world::World;

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("RINGLINE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..60,
    }
}

/// Runs one seed to its end and gives the fingerprint of everything clients saw.
fn run(seed: u64, shards: u16, faults: bool) -> u64 {
    let result = std::panic::catch_unwind(|| {
        let mut world = World::new(seed, shards, faults);
        for _ in 0..4_000 {
            world.step();
        }
        world.heal();
        world.check();
        world.fingerprint()
    });
    result.unwrap_or_else(|panic| {
        eprintln!("failed: RINGLINE_SEED={seed} cargo test -p ringline-core --test shards");
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn order_density_and_duplicates_hold_without_faults() {
    for seed in seeds() {
        run(seed, 1 + (seed % 4) as u16, false);
    }
}

#[test]
fn order_density_and_duplicates_hold_with_lost_lanes_and_crashes() {
    for seed in seeds() {
        run(seed, 1 + (seed % 5) as u16, true);
    }
}

#[test]
fn equal_seeds_give_equal_histories() {
    for seed in 100..105 {
        assert_eq!(run(seed, 3, true), run(seed, 3, true), "seed {seed}");
    }
    assert_ne!(run(100, 3, true), run(101, 3, true));
}
