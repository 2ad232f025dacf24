//! Partition → node: weighted rendezvous hashing over the live members.
//!
//! Each member draws a lot for each partition from its name alone, and the best lot owns it; so all nodes that know the same
//! members agree without a word. A member that comes takes its share from all, one that goes leaves its share to all,
//! and nothing else moves. A member of weight 0 draws no lots: a gateway, which only holds connections.
//!
//! The lot is exponentially distributed with the weight as its rate, −log(u) / weight, and the least wins: the chance
//! to win is the member's part of all weight (Thaler and Ravishankar's highest random weight, with weights as in
//! draft-ietf-bess-weighted-hrw). The logarithm is computed in integers: every node, whatever its build, must find the same.

use ringline_schema::ids::{PARTITIONS, Partition};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The largest weight of a member.
pub const WEIGHT_MAX: u32 = 1_000;

/// A member as placement sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Unique in its cluster.
    pub name: &'a str,
    /// Its part of the partitions, against the weights of the others. 0: owns nothing; above [`WEIGHT_MAX`] counts as that.
    pub weight: u32,
}

/// The owner of a partition, as an index into `members`, whose order does not matter. `None` when nobody may own.
///
/// Takes time linear in the members; for many partitions at once use [`owners`].
pub fn owner(partition: Partition, members: &[Candidate<'_>]) -> Option<usize> {
    let eligible = members.iter().enumerate().filter(|(_, member)| member.weight > 0);
    let best = eligible.min_by(|(_, one), (_, other)| {
        let lot = |member: &Candidate<'_>| u128::from(exponential(partition, member.name));
        let weight = |member: &Candidate<'_>| u128::from(member.weight.min(WEIGHT_MAX));
        // lot / weight, compared without dividing. Equal lots are as good as impossible; the name decides them all the same.
        (lot(one) * weight(other)).cmp(&(lot(other) * weight(one))).then_with(|| one.name.cmp(other.name))
    });
    best.map(|(at, _)| at)
}

/// The owner of every partition, by its number.
pub fn owners(members: &[Candidate<'_>]) -> Vec<Option<usize>> {
    (0..PARTITIONS).map(|number| owner(Partition::new(number)?, members)).collect()
}

/// An exponentially distributed draw of a member for a partition, in units of 2⁻³² bit.
fn exponential(partition: Partition, name: &str) -> u64 {
    minus_log2(xxh3_64_with_seed(name.as_bytes(), u64::from(partition.number())))
}

/// −log₂((draw + 1) / 2⁶⁴) with 32 bits behind the point: 0 for the largest draw, 64 · 2³² for 0.
fn minus_log2(draw: u64) -> u64 {
    const FRACTION_BITS: u32 = 32;
    const POINT: u32 = 62;
    let value = u128::from(draw) + 1;
    let whole = value.ilog2();
    // In [1, 2) with 62 bits behind the point; each squaring doubles the logarithm, whose next bit comes out in front.
    let mut mantissa = (value << (64 - whole)) >> (64 - POINT);
    let mut fraction = 0;
    for _ in 0..FRACTION_BITS {
        mantissa = (mantissa * mantissa) >> POINT;
        let bit = mantissa >> (POINT + 1);
        mantissa >>= bit;
        fraction = fraction << 1 | bit as u64;
    }
    (64 << FRACTION_BITS) - (u64::from(whole) << FRACTION_BITS | fraction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members<'a>(names: &'a [String], weights: &[u32]) -> Vec<Candidate<'a>> {
        names.iter().zip(weights).map(|(name, &weight)| Candidate { name, weight }).collect()
    }

    fn names(count: usize) -> Vec<String> {
        (1..=count).map(|at| format!("node-{at}")).collect()
    }

    /// Owners by name, so that lists of different order and length can be compared.
    fn named<'a>(members: &[Candidate<'a>]) -> Vec<Option<&'a str>> {
        owners(members).into_iter().map(|owner| owner.map(|at| members[at].name)).collect()
    }

    #[test]
    fn the_logarithm_is_right_to_nine_digits() {
        assert_eq!(minus_log2(u64::MAX), 0);
        assert_eq!(minus_log2(0), 64 << 32);
        assert_eq!(minus_log2((1 << 63) - 1), 1 << 32);
        for draw in [1, 2, 1_000, 1 << 40, 0xdead_beef_0bad_cafe, u64::MAX - 1_000_000_007] {
            let exact = 64.0 - (draw as f64 + 1.0).log2();
            let ours = minus_log2(draw) as f64 / 2f64.powi(32);
            assert!((ours - exact).abs() < 1e-9, "{draw}: {ours} instead of {exact}");
        }
    }

    /// A release that places otherwise splits a cluster that is upgraded node by node.
    #[test]
    fn placement_never_changes() {
        let (names, weights) = (names(3), [1, 2, 1]);
        let members = members(&names, &weights);
        let first: Vec<_> = owners(&members).into_iter().take(24).flatten().collect();
        assert_eq!(first, PLACEMENT_OF_THREE);
    }
    const PLACEMENT_OF_THREE: [usize; 24] = [1, 2, 1, 0, 2, 0, 1, 0, 1, 1, 0, 0, 0, 2, 1, 1, 1, 0, 0, 0, 1, 1, 2, 0];

    #[test]
    fn nobody_one_and_gateways() {
        let (names, none) = (names(3), [0, 0, 0]);
        assert!(owners(&[]).iter().all(Option::is_none));
        assert!(owners(&members(&names, &none)).iter().all(Option::is_none));
        assert!(owners(&members(&names[..1], &[7])).iter().all(|owner| *owner == Some(0)));
        let with_gateway = owners(&members(&names, &[1, 0, 1]));
        assert!(with_gateway.iter().all(|owner| matches!(owner, Some(0 | 2))));
    }

    /// Shares follow weights: 1,024 draws with probability p scatter by √(1,024 p (1 − p)), and five of that is never seen.
    #[test]
    fn shares_follow_weights() {
        for weights in [&[1, 1, 1][..], &[1; 10], &[1, 2, 3, 4], &[100, 300], &[1_000, 1, 1], &[5; 64], &[9_999, 1_000]]
        {
            let names = names(weights.len());
            let owners = owners(&members(&names, weights));
            let total: u32 = weights.iter().map(|weight| (*weight).min(WEIGHT_MAX)).sum();
            for (at, weight) in weights.iter().enumerate() {
                let chance = f64::from((*weight).min(WEIGHT_MAX)) / f64::from(total);
                let expected = f64::from(PARTITIONS) * chance;
                let spread = (expected * (1.0 - chance)).sqrt().max(1.0);
                let count = owners.iter().filter(|owner| **owner == Some(at)).count() as f64;
                assert!((count - expected).abs() < 5.0 * spread, "{weights:?}: {at} has {count} instead of {expected}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn only_what_must_move_moves(
            weights in prop::collection::vec(0u32..5, 1..9),
            which in any::<prop::sample::Index>(),
            raised in 1u32..9,
        ) {
            let names = names(weights.len());
            let all = members(&names, &weights);
            let before = named(&all);
            let changed = which.index(all.len());
            let name = all[changed].name;

            // One goes: only what it had moves. (Read the other way round: one comes, and only takes.)
            let mut without = all.clone();
            without.remove(changed);
            for (had, has) in before.iter().zip(named(&without)) {
                prop_assert!(*had == has || *had == Some(name));
            }
            // One gets heavier: it only takes.
            let mut heavier = all.clone();
            heavier[changed].weight += raised;
            for (had, has) in before.iter().zip(named(&heavier)) {
                prop_assert!(*had == has || has == Some(name));
            }
            // All weights doubled, and any order: nothing moves.
            let mut doubled: Vec<_> = all.iter().map(|member| Candidate { weight: 2 * member.weight, ..*member }).collect();
            doubled.reverse();
            prop_assert_eq!(&before, &named(&doubled));
        }
    }
}
