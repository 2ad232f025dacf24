//! Who takes which partition and who gives which away, with etcd and a database: what follows from who is alive and from the
//! table of owners. Pure; asked by the one thread of a node that watches both, again and again.
//!
//! The table is the truth, and a step is only ever a proposal: taking is a compare-and-set on the epoch that was read, so of
//! two that propose the same one gets it. All nodes that see the same members want the same owners
//! ([`crate::membership::Membership::owner`]); while they see different ones, partitions wait or move once more, and never have two.
//!
//! - What nobody has, or a start of a node that is not alive any more, is taken by the node that is wanted for it.
//! - What is this node's own and wanted for another is handed over, a bounded number at a time, so that each is without an
//!   owner for a short time only.
//! - What a living other has is waited for.
//!
//! Invariant, kept by the caller: who is alive was asked *after* the table was read. A start registers before it takes
//! anything, so one that is in the table and not in a later list has ended; in an older list it may not have been yet.

use ringline_schema::ids::Partition;

/// Partitions that are being handed over at one time: the time that each is without an owner follows from it.
pub const HANDED_OVER_AT_ONCE_MAX: usize = 128;

/// One start of a node, by its number in the table of owners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Start(pub i64);

impl Start {
    /// Of what nobody owns.
    pub const NOBODY: Self = Self(0);
}

/// One row of the table of owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    pub partition: Partition,
    /// Rises with every change of owner; what is taken is taken from this one.
    pub epoch: i64,
    pub owner: Start,
}

/// What a node does about one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is its own and stays so.
    Keep,
    /// Nobody alive has it, and it is wanted here.
    Take,
    /// It is its own, and wanted at another that is there.
    HandOver,
    /// It is wanted here, and a living other has it.
    Await,
    /// A matter of others.
    Leave,
}

/// What is to be done, in the order of partitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    pub take: Vec<Holding>,
    /// At most [`HANDED_OVER_AT_ONCE_MAX`].
    pub hand_over: Vec<Partition>,
    /// How many more are to be handed over, later.
    pub more: usize,
    pub awaited: usize,
}

impl Moves {
    /// Whether everything is where it should be, as far as this node is concerned.
    pub fn is_settled(&self) -> bool {
        self.take.is_empty() && self.hand_over.is_empty() && self.awaited == 0
    }
}

/// What node `own` does about a partition of that owner, which is wanted at node `wanted`. `lives`: that start is, or may be,
/// alive.
pub fn step(owner: Start, lives: bool, wanted: Option<&str>, (name, own): (&str, Start)) -> Step {
    let wanted_here = wanted == Some(name);
    if owner == own {
        return if wanted_here || wanted.is_none() { Step::Keep } else { Step::HandOver };
    }
    match (wanted_here, owner != Start::NOBODY && lives) {
        (true, true) => Step::Await,
        (true, false) => Step::Take,
        (false, _) => Step::Leave,
    }
}

/// The steps of all partitions in the table, as far as they are something to do.
pub fn moves<'a>(
    table: &[Holding],
    lives: impl Fn(Start) -> bool,
    wanted: &dyn Fn(Partition) -> Option<&'a str>,
    own: (&str, Start),
) -> Moves {
    let mut moves = Moves::default();
    for holding in table {
        match step(holding.owner, lives(holding.owner), wanted(holding.partition), own) {
            Step::Take => moves.take.push(*holding),
            Step::HandOver if moves.hand_over.len() < HANDED_OVER_AT_ONCE_MAX => {
                moves.hand_over.push(holding.partition);
            }
            Step::HandOver => moves.more += 1,
            Step::Await => moves.awaited += 1,
            Step::Keep | Step::Leave => {}
        }
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use crate::link::hello::Incarnation;
    use crate::membership::{Member, Membership, Placing, Standing};
    use proptest::prelude::*;
    use ringline_schema::ids::PARTITIONS;

    const OWN: (&str, Start) = ("a", Start(5));

    #[test]
    fn each_case_has_its_step() {
        let steps = [
            // (owner, lives, wanted)
            (Start(5), true, Some("a"), Step::Keep),
            // Nobody may own, all drain or are gateways: better than nobody.
            (Start(5), true, None, Step::Keep),
            (Start(5), true, Some("b"), Step::HandOver),
            (Start::NOBODY, false, Some("a"), Step::Take),
            // A nobody is never alive, whatever the list says.
            (Start::NOBODY, true, Some("a"), Step::Take),
            (Start(4), false, Some("a"), Step::Take),
            (Start(4), true, Some("a"), Step::Await),
            (Start(4), false, Some("b"), Step::Leave),
            (Start(4), true, Some("b"), Step::Leave),
            (Start::NOBODY, false, Some("b"), Step::Leave),
            (Start::NOBODY, false, None, Step::Leave),
            (Start(4), false, None, Step::Leave),
        ];
        for (owner, lives, wanted, expected) in steps {
            assert_eq!(step(owner, lives, wanted, OWN), expected, "{owner:?} {lives} {wanted:?}");
        }
    }

    #[test]
    fn a_bounded_number_is_handed_over_at_a_time() {
        let row = |number| Holding { partition: Partition::new(number).unwrap(), epoch: 1, owner: OWN.1 };
        let table: Vec<Holding> = (0..PARTITIONS).map(row).collect();
        let moves = moves(&table, |_| true, &|_| Some("b"), OWN);
        assert_eq!((moves.hand_over.len(), moves.more), (HANDED_OVER_AT_ONCE_MAX, 1_024 - HANDED_OVER_AT_ONCE_MAX));
        assert!(moves.take.is_empty() && !moves.is_settled());
    }

    /// One start of a node in the model.
    struct Node {
        name: String,
        start: Start,
        membership: Membership,
        /// What it believes to own.
        owned: Vec<bool>,
    }

    /// A database and an etcd in a vector each, and nodes that look at them when it is their turn.
    #[derive(Default)]
    struct World {
        table: Vec<Holding>,
        registered: BTreeMap<String, (Start, Standing)>,
        nodes: Vec<Node>,
        starts: i64,
    }

    impl World {
        fn new() -> Self {
            let row = |number| Holding { partition: Partition::new(number).unwrap(), epoch: 0, owner: Start::NOBODY };
            Self { table: (0..PARTITIONS).map(row).collect(), ..Self::default() }
        }

        fn start(&mut self, name: &str) {
            if self.registered.contains_key(name) {
                return;
            }
            self.starts += 1;
            let start = Start(self.starts);
            self.registered.insert(name.into(), (start, Standing::Up));
            let membership = Membership::new(name, Incarnation(self.starts as u64), Placing::Alive);
            let owned = vec![false; usize::from(PARTITIONS)];
            self.nodes.push(Node { name: name.into(), start, membership, owned });
        }

        /// It ends, and its lease with it.
        fn kill(&mut self, name: &str) {
            self.registered.remove(name);
            self.nodes.retain(|node| node.name != name);
        }

        fn drain(&mut self, name: &str) {
            if let Some((_, standing)) = self.registered.get_mut(name) {
                *standing = Standing::Draining;
            }
        }

        fn list(&self) -> BTreeMap<String, Member> {
            let member = |start: Start, standing| Member {
                incarnation: Incarnation(start.0 as u64),
                peer_address: SocketAddr::from(([127, 0, 0, 1], 1)),
                client_address: String::new(),
                weight: 1,
                client_weight: 1,
                connections: 0,
                standing,
            };
            self.registered.iter().map(|(name, (start, standing))| (name.clone(), member(*start, *standing))).collect()
        }

        /// One node looks: at the table as it was `stale` steps of others ago would be refused by the epochs; here as it is.
        fn turn(&mut self, at: usize, seen: &[Holding]) {
            let list = self.list();
            let alive: Vec<Start> = self.registered.values().map(|(start, _)| *start).collect();
            let Some(node) = self.nodes.get_mut(at) else { return };
            node.membership.update(list).unwrap();
            let membership = &node.membership;
            let wanted = |partition: Partition| membership.owner(partition);
            let moves = moves(seen, |start| alive.contains(&start), &wanted, (&node.name, node.start));
            for holding in moves.take {
                let row = &mut self.table[usize::from(holding.partition.number())];
                if row.epoch == holding.epoch && row.owner == holding.owner {
                    *row = Holding { epoch: row.epoch + 1, owner: node.start, ..*row };
                    node.owned[usize::from(holding.partition.number())] = true;
                }
            }
            for partition in moves.hand_over {
                let row = &mut self.table[usize::from(partition.number())];
                // A row that was read before it was taken from this start can't be: only it hands over.
                assert_eq!(row.owner == node.start, node.owned[usize::from(partition.number())]);
                if row.owner == node.start {
                    *row = Holding { epoch: row.epoch + 1, owner: Start::NOBODY, ..*row };
                    node.owned[usize::from(partition.number())] = false;
                }
            }
            self.check();
        }

        /// Nobody believes to own what the table gives to another: each partition has at most one owner alive.
        fn check(&self) {
            for row in &self.table {
                for node in &self.nodes {
                    let believes = node.owned[usize::from(row.partition.number())];
                    assert_eq!(believes, row.owner == node.start, "{:?} of {}", row, node.name);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        /// Nodes come, die, drain and come back, and look in any order, some at an old table: never are there two owners, and
        /// when it is quiet everything is where it is wanted.
        #[test]
        fn partitions_have_one_owner_and_end_where_they_are_wanted(
            events in prop::collection::vec((0u8..8, 0usize..4), 1..60),
        ) {
            const NAMES: [&str; 4] = ["a", "b", "c", "d"];
            let mut world = World::new();
            let mut seen = world.table.clone();
            for (event, at) in events {
                match event {
                    0 | 1 => world.start(NAMES[at]),
                    2 => world.kill(NAMES[at]),
                    3 => world.drain(NAMES[at]),
                    4 => seen = world.table.clone(),
                    5 => world.turn(at, &seen),
                    _ => {
                        let now = world.table.clone();
                        world.turn(at, &now);
                    }
                }
            }
            for _ in 0..16 {
                for at in 0..world.nodes.len() {
                    let now = world.table.clone();
                    world.turn(at, &now);
                }
            }
            let mut eye = Membership::new("eye", Incarnation(u64::MAX), Placing::Alive);
            eye.update(world.list()).unwrap();
            for row in &world.table {
                if let Some(wanted) = eye.owner(row.partition) {
                    prop_assert_eq!(world.registered[wanted].0, row.owner, "{:?}", row);
                }
            }
        }
    }
}
