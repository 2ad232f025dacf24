//! Which node a client should connect to: the strategies behind ROUTE.
//!
//! A [`Balancer`] belongs to one thread and has no clock and no randomness of its own. Nodes that drain or are gone are
//! not among its targets. A weight of 0 keeps a node out, unless all have it: then all count the same, because a cluster that
//! nobody can enter helps nobody. Whoever owns a user is asked by [`Strategy::ConsistentHash`] whatever its weight.

use std::fmt;
use std::str::FromStr;

use crate::placement::NodeIndex;
use crate::rendezvous::WEIGHT_MAX;

/// How ROUTE picks a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The node that owns the user: no hop between nodes for what is said to it, and the same answer everywhere.
    #[default]
    ConsistentHash,
    /// The node with the fewest connections for its weight.
    LeastConnections,
    /// By lot; chances follow weights.
    WeightedRandom,
    /// One after the other, each as often as its weight says, evenly spread.
    RoundRobin,
}

impl Strategy {
    pub const ALL: [Self; 4] = [Self::ConsistentHash, Self::LeastConnections, Self::WeightedRandom, Self::RoundRobin];

    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConsistentHash => "consistent_hash",
            Self::LeastConnections => "least_connections",
            Self::WeightedRandom => "weighted_random",
            Self::RoundRobin => "round_robin",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no strategy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no strategy: consistent_hash, least_connections, weighted_random or round_robin")]
pub struct UnknownStrategy(pub String);

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(word: &str) -> Result<Self, UnknownStrategy> {
        let found = Self::ALL.into_iter().find(|strategy| strategy.name() == word);
        found.ok_or_else(|| UnknownStrategy(word.to_owned()))
    }
}

/// A node that takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub node: NodeIndex,
    /// Its part of the connections, against the weights of the others; above [`WEIGHT_MAX`] counts as that.
    pub weight: u32,
    /// Connections that it last reported.
    pub connections: u64,
    /// Which of its reports that was: any number that changes with each.
    pub report: u64,
}

#[derive(Debug)]
struct Place {
    target: Target,
    /// Sent there since its last report. A report is seconds old: without this, all who come in between would go to the
    /// node that had the fewest.
    sent: u64,
    /// What smooth round robin owes it, in weights.
    credit: i64,
}

/// Picks nodes for clients.
#[derive(Debug, Default)]
pub struct Balancer {
    /// In the order of their numbers, so that equal nodes are decided the same everywhere.
    places: Vec<Place>,
}

impl Balancer {
    /// Takes the nodes of now. What round robin owes to those that stay is kept, and who was sent to a node since its last
    /// report still counts there until the next.
    pub fn set_targets(&mut self, mut targets: Vec<Target>) {
        targets.sort_by_key(|target| target.node);
        targets.dedup_by_key(|target| target.node);
        let mut before = std::mem::take(&mut self.places);
        let mut place = |target: Target| {
            let known = before.iter().position(|place| place.target.node == target.node);
            let known = known.map(|at| before.swap_remove(at));
            let sent =
                known.as_ref().filter(|known| known.target.report == target.report).map_or(0, |known| known.sent);
            Place { target, sent, credit: known.map_or(0, |known| known.credit) }
        };
        self.places = targets.into_iter().map(&mut place).collect();
    }

    /// The node for a user; `None` when there is none. `owner`: the node that owns the user, which only
    /// [`Strategy::ConsistentHash`] looks at. `draw` is random in its whole range; only [`Strategy::WeightedRandom`] looks
    /// at it.
    pub fn pick(&mut self, strategy: Strategy, owner: Option<NodeIndex>, draw: u64) -> Option<NodeIndex> {
        let at = match strategy {
            Strategy::ConsistentHash => self.places.iter().position(|place| Some(place.target.node) == owner),
            Strategy::LeastConnections => self.by_connections(),
            Strategy::WeightedRandom => self.by_lot(draw),
            Strategy::RoundRobin => self.by_turn(),
        }?;
        let place = self.places.get_mut(at)?;
        place.sent += 1;
        Some(place.target.node)
    }

    /// Weights as they count, in the order of places.
    fn weights(&self) -> impl Iterator<Item = u32> + use<> {
        let given: Vec<u32> = self.places.iter().map(|place| place.target.weight.min(WEIGHT_MAX)).collect();
        let all_zero = given.iter().all(|weight| *weight == 0);
        given.into_iter().map(move |weight| if all_zero { 1 } else { weight })
    }

    fn by_connections(&self) -> Option<usize> {
        let loads = self.places.iter().zip(self.weights()).enumerate().filter(|(_, (_, weight))| *weight > 0);
        let load = |place: &Place| u128::from(place.target.connections) + u128::from(place.sent);
        // The load it would have with one more, so that of two empty nodes the heavier one is first.
        let least = loads.min_by(|(_, (one, weight)), (_, (other, other_weight))| {
            ((load(one) + 1) * u128::from(*other_weight)).cmp(&((load(other) + 1) * u128::from(*weight)))
        });
        least.map(|(at, _)| at)
    }

    fn by_lot(&self, draw: u64) -> Option<usize> {
        let total: u64 = self.weights().map(u64::from).sum();
        let mut lot = ((u128::from(draw) * u128::from(total)) >> 64) as u64;
        self.weights().map(u64::from).position(|weight| {
            let mine = lot < weight;
            lot = lot.saturating_sub(weight);
            mine
        })
    }

    /// Smooth weighted round robin, as nginx does it: each is owed its weight a turn, the one who is owed most goes and
    /// pays the sum of all.
    fn by_turn(&mut self) -> Option<usize> {
        let weights: Vec<i64> = self.weights().map(i64::from).collect();
        let total: i64 = weights.iter().sum();
        for (place, weight) in self.places.iter_mut().zip(&weights) {
            place.credit += weight;
        }
        let open = self.places.iter().zip(&weights).enumerate().filter(|(_, (_, weight))| **weight > 0);
        let next =
            open.max_by(|(at, (one, _)), (other_at, (other, _))| one.credit.cmp(&other.credit).then(other_at.cmp(at)));
        let next = next.map(|(at, _)| at)?;
        self.places.get_mut(next)?.credit -= total;
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ringline_schema::ids::UserName;

    use super::*;
    use crate::rendezvous::{self, Candidate};

    fn balancer(weights: &[u32]) -> Balancer {
        let mut balancer = Balancer::default();
        balancer.set_targets(targets(weights));
        balancer
    }

    fn targets(weights: &[u32]) -> Vec<Target> {
        let node = |at: usize| NodeIndex(at as u16);
        let target = |(at, &weight): (usize, &u32)| Target { node: node(at), weight, connections: 0, report: 0 };
        weights.iter().enumerate().map(target).collect()
    }

    /// The owner of that user, where the weights are those of the partitions.
    fn owner(at: u64, weights: &[u32]) -> Option<NodeIndex> {
        let names: Vec<_> = (0..weights.len()).map(|at| format!("n{at}")).collect();
        let members: Vec<_> = names.iter().zip(weights).map(|(name, &weight)| Candidate { name, weight }).collect();
        let user = UserName::new(&format!("user-{at}")).unwrap();
        rendezvous::owner(user.partition(), &members).map(|at| NodeIndex(at as u16))
    }

    /// A fixed sequence of draws that is as good as random.
    fn draw(at: u64) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&at.to_le_bytes())
    }

    /// How often each is picked for `count` users.
    fn tally((balancer, weights): (&mut Balancer, &[u32]), strategy: Strategy, count: u64) -> BTreeMap<u16, u64> {
        let mut picks = BTreeMap::new();
        for at in 0..count {
            let node = balancer.pick(strategy, owner(at, weights), draw(at)).unwrap();
            *picks.entry(node.0).or_default() += 1;
        }
        picks
    }

    /// Strategies that look at weights of their own.
    const SPREADING: [Strategy; 3] = [Strategy::LeastConnections, Strategy::WeightedRandom, Strategy::RoundRobin];

    #[test]
    fn none_one_and_names() {
        for strategy in Strategy::ALL {
            assert_eq!(Balancer::default().pick(strategy, Some(NodeIndex(0)), 5), None);
            for weight in [0, 1, u32::MAX] {
                assert_eq!(tally((&mut balancer(&[weight]), &[1]), strategy, 10)[&0], 10, "{strategy} {weight}");
            }
            assert_eq!(strategy.name().parse(), Ok(strategy));
        }
        let error = "random".parse::<Strategy>().unwrap_err();
        assert!(error.to_string().contains("weighted_random"), "{error}");
    }

    #[test]
    fn a_zero_weight_keeps_out_unless_all_have_it() {
        for strategy in SPREADING {
            assert!(!tally((&mut balancer(&[1, 0, 1]), &[1]), strategy, 500).contains_key(&1), "{strategy}");
            let picks = tally((&mut balancer(&[0, 0, 0]), &[1]), strategy, 3_000);
            assert!(
                picks.len() == 3 && picks.values().all(|count| (800..1_200).contains(count)),
                "{strategy} {picks:?}"
            );
        }
    }

    #[test]
    fn the_owner_is_picked_whatever_its_weight_and_nobody_in_its_place() {
        let mut balancer = balancer(&[1, 0, 1]);
        for at in [0, 1, 2] {
            let owner = Some(NodeIndex(at));
            assert_eq!(balancer.pick(Strategy::ConsistentHash, owner, 9), owner);
        }
        assert_eq!(balancer.pick(Strategy::ConsistentHash, Some(NodeIndex(3)), 9), None, "it takes no clients now");
        assert_eq!(balancer.pick(Strategy::ConsistentHash, None, 9), None, "nobody owns it");
    }

    /// Picks follow weights: exactly where it is no lot, else within five standard deviations of it. The owner of a user
    /// also carries the scatter of 1,024 partitions.
    #[test]
    fn picks_follow_weights() {
        const COUNT: u64 = 12_000;
        for weights in [&[1, 1, 1][..], &[1, 2, 3], &[5, 1], &[1_000, 1_000, 1_000, 1_000]] {
            let total: u32 = weights.iter().sum();
            for strategy in Strategy::ALL {
                let picks = tally((&mut balancer(weights), weights), strategy, COUNT);
                for (at, weight) in weights.iter().enumerate() {
                    let chance = f64::from(*weight) / f64::from(total);
                    let scatter = |draws: f64| 5.0 * (chance * (1.0 - chance) / draws).sqrt() * COUNT as f64;
                    let allowed = match strategy {
                        Strategy::LeastConnections | Strategy::RoundRobin => 1.0,
                        Strategy::WeightedRandom => scatter(COUNT as f64),
                        Strategy::ConsistentHash => scatter(COUNT as f64) + scatter(1_024.0),
                    };
                    let (count, expected) = (picks[&(at as u16)] as f64, COUNT as f64 * chance);
                    assert!(
                        (count - expected).abs() <= allowed,
                        "{strategy} {weights:?}: n{at} {count} not {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_user_stays_where_it_was_when_others_come_and_go() {
        let mut four = balancer(&[1; 4]);
        let mut moved = 0;
        for at in 0..4_000 {
            let mut pick = |nodes: usize| four.pick(Strategy::ConsistentHash, owner(at, &[1; 4][..nodes]), 0).unwrap();
            let (before, after) = (pick(3), pick(4));
            assert!(before == after || after.0 == 3, "user {at} moved from {before:?} to {after:?}");
            moved += u64::from(before != after);
        }
        assert!((800..1_200).contains(&moved), "{moved} of 4,000 moved to a fourth node");
    }

    #[test]
    fn round_robin_takes_turns_evenly_and_goes_on_when_nodes_change() {
        let mut balancer = balancer(&[3, 1]);
        let turns = |count: usize, balancer: &mut Balancer| {
            (0..count).map(|_| balancer.pick(Strategy::RoundRobin, None, 0).unwrap().0).collect::<Vec<_>>()
        };
        assert_eq!(turns(8, &mut balancer), [0, 0, 1, 0, 0, 0, 1, 0]);
        // In the middle of a round a third joins: nobody starts from the beginning.
        assert_eq!(turns(1, &mut balancer), [0]);
        balancer.set_targets(targets(&[1, 1, 1]));
        let next = turns(3, &mut balancer);
        assert_eq!(next[0], 1, "n0 has just had its turn: {next:?}");
    }

    #[test]
    fn the_fewest_connections_fill_up_first_between_two_reports() {
        let mut balancer = Balancer::default();
        let mut nodes = targets(&[1, 1, 2]);
        for (node, connections) in nodes.iter_mut().zip([100, 40, 100]) {
            node.connections = connections;
        }
        balancer.set_targets(nodes.clone());
        let mut picks = BTreeMap::<u16, u64>::new();
        for _ in 0..8 {
            // The same reports again change nothing: who was sent since counts.
            balancer.set_targets(nodes.clone());
            for _ in 0..20 {
                *picks.entry(balancer.pick(Strategy::LeastConnections, None, 0).unwrap().0).or_default() += 1;
            }
        }
        // 400 in all over weights of 4: 100, 100, 200.
        assert_eq!(picks, BTreeMap::from([(1, 60), (2, 100)]));
        // The next reports count those who came: none did to n2.
        for (node, connections) in nodes.iter_mut().zip([100, 100, 0]) {
            (node.connections, node.report) = (connections, 1);
        }
        balancer.set_targets(nodes);
        assert_eq!(tally((&mut balancer, &[1]), Strategy::LeastConnections, 10)[&2], 10);
    }
}
