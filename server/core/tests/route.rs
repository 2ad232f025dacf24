//! ROUTE of a node among others: which one a client is told by each strategy, and what it is told when there is none.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringline_cluster::balance::Strategy;
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, ShardIndex};
use ringline_cluster::router::Board;
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig, RouteConfig};
use ringline_core::event::{ConnId, Effects, Event, NodeNews, Now};
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::ids::{DeviceId, UserName};
use ringline_schema::message::{Credential, DeviceKind, Login, Reply, Request, Secret};

const CONN: ConnId = ConnId { slot: 1, generation: 1 };
/// Names and weights of the partitions: c is a gateway, which owns nothing.
const NODES: [(&str, u32); 3] = [("a", 1), ("b", 1), ("c", 0)];

/// The one shard of node a, with one connection that is not logged in.
struct Node {
    shard: Shard,
    placement: ClusterPlacement,
    board: Arc<Board>,
}

impl Node {
    /// With these nodes up beside itself.
    fn new(strategy: Strategy, up: &[u16]) -> Self {
        let cores = CorePlacement::new(1).unwrap();
        let listed: Vec<_> = NODES.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
        let placement = ClusterPlacement::new("a", cores, &listed).unwrap();
        let nodes = NODES.iter().map(|(name, _)| ((*name).to_owned(), format!("{name}:1"))).collect();
        let mut config = CoreConfig::new(ShardIndex::new(NodeIndex(0), 0), cores);
        (config.node, config.address) = ("a".to_owned(), "a:1".to_owned());
        config.cluster = Some(ClusterConfig { placement: placement.clone(), nodes });
        let board = Arc::new(Board::new(1));
        config.route = RouteConfig { strategy, board: Arc::clone(&board) };
        let mut node = Self { shard: Shard::new(config, 1), placement, board };
        node.event(Event::Opened { conn: CONN });
        up.iter().for_each(|at| node.news(*at, NodeNews::Up { shards: 1 }));
        node
    }

    fn event(&mut self, event: Event<'_>) -> String {
        let mut fx = Effects::default();
        let _ = self.shard.handle(event, Now { mono_us: 1_000_000, unix_ms: 1_700_000_000_000 }, &mut fx);
        self.shard.check_invariants();
        let Some(bytes) = self.shard.take_output(CONN) else { return String::new() };
        let mut input = &bytes[..];
        let mut decoder = FrameDecoder::new();
        let frame = decoder.next(&mut input, 1 << 20).unwrap().unwrap();
        let text = match decode_reply(&frame.header, frame.body).unwrap() {
            Reply::Failure { code, .. } => code.name().to_owned(),
            Reply::RouteOk { node, address } => format!("{node} {address}"),
            Reply::Redirect { node, address } => format!("REDIRECT {node} {address}"),
            other => other.command().name().to_owned(),
        };
        let _ = self.shard.handle(Event::Sent { conn: CONN, bytes: bytes.len() }, Now::default(), &mut fx);
        text
    }

    fn news(&mut self, node: u16, news: NodeNews) {
        self.event(Event::Node { node: NodeIndex(node), news });
    }

    fn ask(&mut self, request: Request<'_>) -> String {
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        self.event(Event::Request { conn: CONN, codec, flags, request_id: 7, request })
    }

    fn route(&mut self, user: &str) -> String {
        self.ask(Request::Route { user })
    }

    /// How often each node is named.
    fn routes(&mut self, count: usize) -> BTreeMap<String, usize> {
        let mut routes = BTreeMap::new();
        for _ in 0..count {
            let node = self.route("").split(' ').next().unwrap().to_owned();
            *routes.entry(node).or_default() += 1;
        }
        routes
    }

    /// A user of that node.
    fn user(&self, node: u16) -> String {
        let owner = |user: &String| self.placement.node_of(UserName::new(user).unwrap().partition());
        (0..).map(|at| format!("user-{at}")).find(|user| owner(user) == NodeIndex(node)).unwrap()
    }
}

#[test]
fn the_owner_is_named_if_it_can_be_reached_and_nobody_in_its_place() {
    let mut node = Node::new(Strategy::ConsistentHash, &[2]);
    let (here, there) = (node.user(0), node.user(1));
    assert_eq!(node.route(&here), "a a:1");
    assert_eq!(node.route(&there), "UNAVAILABLE", "the gateway is up, and of no use to this user");
    node.news(1, NodeNews::Up { shards: 1 });
    assert_eq!(node.route(&there), "b b:1");
    assert_eq!(node.route(""), "a a:1", "nobody in particular");
    node.news(1, NodeNews::Down);
    assert_eq!(node.route(&there), "UNAVAILABLE");
    node.event(Event::Drain);
    assert_eq!(node.route(&here), "UNAVAILABLE");
}

#[test]
fn a_name_that_is_none_is_refused_and_whether_the_user_exists_is_not_told() {
    let mut node = Node::new(Strategy::ConsistentHash, &[1, 2]);
    let long = "x".repeat(64);
    assert!(node.route(&long).ends_with(":1"));
    for bad in [&"x".repeat(65), " ann", "a\nb"] {
        assert_eq!(node.route(bad), "BAD_NAME", "{bad:?}");
    }
}

#[test]
fn other_strategies_spread_over_those_that_are_there_by_weight() {
    for strategy in [Strategy::RoundRobin, Strategy::LeastConnections, Strategy::WeightedRandom] {
        let mut node = Node::new(strategy, &[1, 2]);
        let user = node.user(1);
        assert!(node.route(&user).ends_with(":1"), "{strategy}");
        let near = |count: usize, expected: usize| count.abs_diff(expected) <= expected / 4;
        let routes = node.routes(900);
        assert!(routes.len() == 3 && routes.values().all(|count| near(*count, 300)), "{strategy} {routes:?}");
        // A gateway may have more of the clients than the others.
        [(0, 1), (1, 1), (2, 2)].into_iter().for_each(|(at, weight)| node.board.set_weight(NodeIndex(at), weight));
        (0..3).for_each(|at| node.board.report(NodeIndex(at), 0));
        let routes = node.routes(1_200);
        assert!(near(routes["a"], 300) && near(routes["b"], 300) && near(routes["c"], 600), "{strategy} {routes:?}");
        node.board.set_weight(NodeIndex(0), 0);
        assert!(!node.routes(100).contains_key("a"), "{strategy}");
        node.news(1, NodeNews::Down);
        assert_eq!(node.routes(100).into_keys().collect::<Vec<_>>(), ["c"], "{strategy}");
        node.news(2, NodeNews::Down);
        assert_eq!(
            node.routes(10).into_keys().collect::<Vec<_>>(),
            ["a"],
            "{strategy}: all that are left have no weight"
        );
        node.event(Event::Drain);
        assert_eq!(node.route(&user), "UNAVAILABLE", "{strategy}");
    }
}

#[test]
fn the_node_with_the_fewest_clients_is_named_by_what_it_told_last() {
    let mut node = Node::new(Strategy::LeastConnections, &[1, 2]);
    for (at, clients) in [(0, 90), (1, 100), (2, 10)] {
        node.board.report(NodeIndex(at), clients);
    }
    assert_eq!(node.routes(80), BTreeMap::from([("c".to_owned(), 80)]));
    assert_eq!(node.routes(10), BTreeMap::from([("a".to_owned(), 5), ("c".to_owned(), 5)]));
    node.board.report(NodeIndex(1), 0);
    assert_eq!(node.routes(10), BTreeMap::from([("b".to_owned(), 10)]));
}

/// Whatever ROUTE has said, a LOGIN is served where the user lives: a gateway sends everybody on.
#[test]
fn who_lands_elsewhere_is_sent_on_at_login() {
    let mut node = Node::new(Strategy::RoundRobin, &[1, 2]);
    let there = node.user(1);
    let credential = Credential::Token(Secret("token"));
    let login = Login { user: &there, credential, device: DeviceId(1), device_kind: DeviceKind::Bot, agent: "" };
    assert_eq!(node.ask(Request::Login(login)), "REDIRECT b b:1");
    node.news(1, NodeNews::Down);
    assert_eq!(node.ask(Request::Login(login)), "UNAVAILABLE");
}
