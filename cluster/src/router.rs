//! What ROUTE goes by, and its answer. Pure.
//!
//! A [`Board`] is shared by the threads of a node: whoever hears something of a node puts it up there, and whoever is asked
//! looks. Each entry is a number of its own, so nobody waits for anybody, and none of it is on the way of a message. A
//! [`Router`] belongs to one thread. Invariant: what is on the board is advice. Whoever is sent to a node that does not
//! own it is sent on by that node's REDIRECT (or served through it, if it is a gateway), so an entry that is seconds old costs a connection and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::balance::{Balancer, Strategy, Target};
use crate::placement::{NODES_MAX, NodeIndex};

/// What is known of one node.
#[derive(Debug)]
struct Entry {
    clients: AtomicU64,
    reports: AtomicU64,
    weight: AtomicU32,
    up: AtomicBool,
    leaving: AtomicBool,
    gateway: AtomicBool,
}

impl Default for Entry {
    fn default() -> Self {
        let (clients, reports) = (AtomicU64::new(0), AtomicU64::new(0));
        let (up, leaving, gateway) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
        Self { clients, reports, weight: AtomicU32::new(1), up, leaving, gateway }
    }
}

/// The clients of one core of this node, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Count(AtomicU64);

/// See the module.
#[derive(Debug)]
pub struct Board {
    /// By number of the node.
    nodes: Vec<Entry>,
    /// By core.
    cores: Vec<Count>,
}

impl Default for Board {
    fn default() -> Self {
        Self::new(1)
    }
}

impl Board {
    /// Of a node with so many cores. Every other node is down, and has weight 1 and no clients, until something else is said.
    pub fn new(cores: usize) -> Self {
        Self {
            nodes: (0..NODES_MAX).map(|_| Entry::default()).collect(),
            cores: (0..cores).map(|_| Count::default()).collect(),
        }
    }

    fn entry(&self, node: NodeIndex) -> Option<&Entry> {
        self.nodes.get(usize::from(node.0))
    }

    /// Its part of the clients, for all strategies but [`Strategy::ConsistentHash`].
    pub fn set_weight(&self, node: NodeIndex, weight: u32) {
        if let Some(entry) = self.entry(node) {
            entry.weight.store(weight, Ordering::Relaxed);
        }
    }

    /// Whether a node is a gateway: where there are some, clients are sent to them, but by [`Strategy::ConsistentHash`].
    pub fn set_gateway(&self, node: NodeIndex, gateway: bool) {
        if let Some(entry) = self.entry(node) {
            entry.gateway.store(gateway, Ordering::Relaxed);
        }
    }

    /// Whether it is one that takes its part of the clients.
    fn is_gateway(&self, node: NodeIndex) -> bool {
        let weighs = |entry: &Entry| entry.weight.load(Ordering::Relaxed) > 0;
        self.entry(node).is_some_and(|entry| entry.gateway.load(Ordering::Relaxed) && weighs(entry))
    }

    /// Whether a node takes clients.
    pub fn set_up(&self, node: NodeIndex, up: bool) {
        if let Some(entry) = self.entry(node) {
            entry.up.store(up, Ordering::Relaxed);
        }
    }

    pub fn is_up(&self, node: NodeIndex) -> bool {
        self.entry(node).is_some_and(|entry| entry.up.load(Ordering::Relaxed))
    }

    /// Whether a node gives away what it owns: it still serves its users, and gets no other clients.
    pub fn set_leaving(&self, node: NodeIndex, leaving: bool) {
        if let Some(entry) = self.entry(node) {
            entry.leaving.store(leaving, Ordering::Relaxed);
        }
    }

    fn is_leaving(&self, node: NodeIndex) -> bool {
        self.entry(node).is_some_and(|entry| entry.leaving.load(Ordering::Relaxed))
    }

    /// Clients of another node, as it told last.
    pub fn clients_of(&self, node: NodeIndex) -> u64 {
        self.entry(node).map_or(0, |entry| entry.clients.load(Ordering::Relaxed))
    }

    /// A node has told how many clients it has.
    pub fn report(&self, node: NodeIndex, clients: u64) {
        if let Some(entry) = self.entry(node) {
            entry.clients.store(clients, Ordering::Relaxed);
            entry.reports.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A core of this node has so many clients now.
    pub fn count(&self, core: u16, clients: u64) {
        if let Some(Count(count)) = self.cores.get(usize::from(core)) {
            count.store(clients, Ordering::Relaxed);
        }
    }

    /// Clients of this node.
    pub fn clients(&self) -> u64 {
        self.cores.iter().map(|Count(count)| count.load(Ordering::Relaxed)).sum()
    }

    fn target(&self, node: NodeIndex) -> Option<Target> {
        let Entry { clients, reports, weight, .. } = self.entry(node)?;
        // The number first: a report that comes between is taken for the next one at worst, and counted in again then.
        let report = reports.load(Ordering::Relaxed);
        let (connections, weight) = (clients.load(Ordering::Relaxed), weight.load(Ordering::Relaxed));
        Some(Target { node, weight, connections, report })
    }
}

/// See the module.
#[derive(Debug)]
pub struct Router {
    strategy: Strategy,
    board: Arc<Board>,
    balancer: Balancer,
    seed: u64,
    drawn: u64,
}

impl Router {
    /// `seed` makes the lots of [`Strategy::WeightedRandom`]: each thread should have one of its own.
    pub fn new(strategy: Strategy, board: Arc<Board>, seed: u64) -> Self {
        Self { strategy, board, balancer: Balancer::default(), seed, drawn: 0 }
    }

    /// The node for a client. `owner`: of its user; `None` when the user is not named, or nobody owns it. `open`: the nodes
    /// that take clients now. `None` when there is none, or the owner is not among them where it counts.
    pub fn pick(&mut self, owner: Option<NodeIndex>, open: &mut dyn Iterator<Item = NodeIndex>) -> Option<NodeIndex> {
        let open: Vec<NodeIndex> = open.collect();
        let staying: Vec<NodeIndex> = open.iter().copied().filter(|node| !self.board.is_leaving(*node)).collect();
        // The owner of a user serves it to the end; and where all leave, anybody is better than nobody.
        let by_owner = self.strategy == Strategy::ConsistentHash;
        let mut named = if by_owner || staying.is_empty() { open } else { staying };
        let is_gateway = |node: &NodeIndex| self.board.is_gateway(*node);
        if !by_owner && named.iter().any(is_gateway) {
            named.retain(is_gateway);
        }
        self.balancer.set_targets(named.into_iter().filter_map(|node| self.board.target(node)).collect());
        self.drawn += 1;
        let draw = xxh3_64_with_seed(&self.drawn.to_le_bytes(), self.seed);
        self.balancer.pick(self.strategy, owner, draw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: [NodeIndex; 3] = [NodeIndex(0), NodeIndex(1), NodeIndex(2)];

    fn picks(router: &mut Router, count: usize) -> [usize; 3] {
        let mut picks = [0; 3];
        for _ in 0..count {
            picks[usize::from(router.pick(None, &mut NODES.into_iter()).unwrap().0)] += 1;
        }
        picks
    }

    #[test]
    fn what_is_put_up_counts_at_the_next_question() {
        let board = Arc::new(Board::new(2));
        let mut router = Router::new(Strategy::LeastConnections, Arc::clone(&board), 7);
        assert_eq!(picks(&mut router, 30), [10; 3]);
        for (node, clients) in NODES.into_iter().zip([50, 10, 50]) {
            board.report(node, clients);
        }
        assert_eq!(picks(&mut router, 40), [0, 40, 0], "one question sees those that were sent by the ones before");
        assert_eq!(picks(&mut router, 30), [10; 3]);
        board.report(NODES[1], 10);
        assert_eq!(picks(&mut router, 10), [0, 10, 0], "none of those who were sent came");
        board.set_weight(NODES[1], 0);
        assert_eq!(picks(&mut router, 10), [5, 0, 5]);
        let mut lots = Router::new(Strategy::WeightedRandom, board, 7);
        let drawn = picks(&mut lots, 1_000);
        assert!(drawn[1] == 0 && drawn[0].abs_diff(500) < 80, "{drawn:?}");
    }

    #[test]
    fn clients_are_sent_to_gateways_where_there_are_some() {
        let board = Arc::new(Board::new(1));
        board.set_gateway(NODES[1], true);
        let mut turns = Router::new(Strategy::RoundRobin, Arc::clone(&board), 7);
        assert_eq!(picks(&mut turns, 30), [0, 30, 0]);
        assert_eq!(turns.pick(None, &mut [NODES[0], NODES[2]].into_iter()), Some(NODES[0]), "no gateway is there");
        board.set_gateway(NODES[2], true);
        assert_eq!(picks(&mut turns, 30), [0, 15, 15]);
        board.set_weight(NODES[2], 0);
        assert_eq!(picks(&mut turns, 30), [0, 30, 0]);
        board.set_weight(NODES[1], 0);
        assert_eq!(picks(&mut turns, 30), [30, 0, 0], "gateways that are to have no clients are none");
        let mut owners = Router::new(Strategy::ConsistentHash, board, 7);
        assert_eq!(owners.pick(Some(NODES[0]), &mut NODES.into_iter()), Some(NODES[0]), "the owner, by its name");
    }

    #[test]
    fn the_owner_or_nobody() {
        let mut router = Router::new(Strategy::ConsistentHash, Arc::default(), 7);
        let mut pick = |owner, open: &[NodeIndex]| router.pick(owner, &mut open.iter().copied());
        assert_eq!(pick(Some(NODES[2]), &NODES), Some(NODES[2]));
        assert_eq!(pick(Some(NODES[2]), &NODES[..2]), None);
        assert_eq!(pick(None, &NODES), None);
        assert_eq!(pick(Some(NODES[0]), &[]), None);
    }

    #[test]
    fn who_leaves_is_named_for_its_users_alone() {
        let board = Arc::new(Board::new(1));
        board.set_leaving(NODES[1], true);
        let mut turns = Router::new(Strategy::RoundRobin, Arc::clone(&board), 7);
        assert_eq!(picks(&mut turns, 10), [5, 0, 5]);
        let mut owners = Router::new(Strategy::ConsistentHash, Arc::clone(&board), 7);
        assert_eq!(owners.pick(Some(NODES[1]), &mut NODES.into_iter()), Some(NODES[1]));
        [NODES[0], NODES[2]].iter().for_each(|node| board.set_leaving(*node, true));
        assert_eq!(picks(&mut turns, 9), [3; 3], "all leave");
        board.set_leaving(NODES[1], false);
        assert_eq!(picks(&mut turns, 9), [0, 9, 0]);
    }

    #[test]
    fn clients_of_the_cores_add_up_and_a_number_that_is_no_node_is_nobody() {
        let board = Board::new(2);
        board.count(0, 3);
        board.count(1, 4);
        board.count(1, 5);
        board.count(2, 100);
        assert_eq!(board.clients(), 8);
        let far = NodeIndex(NODES_MAX as u16);
        board.set_up(far, true);
        board.report(far, 9);
        board.report(NODES[2], 5);
        assert_eq!((board.clients_of(NODES[2]), board.clients_of(far)), (5, 0));
        assert!(!board.is_up(far) && !board.is_up(NODES[1]));
        board.set_up(NODES[1], true);
        assert!(board.is_up(NODES[1]));
        assert_eq!(Router::new(Strategy::RoundRobin, Arc::new(board), 1).pick(None, &mut [far].into_iter()), None);
    }
}
