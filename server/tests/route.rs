//! Where clients of a cluster are told to connect, by ROUTE and by its HTTP twin, and that they end where their users live: real
//! processes, one of them a gateway, which owns nothing. `gateway.rs` has what is served through one.

mod common;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::sdk::{find, run};
use common::{PATIENCE, Server, complaint, free_ports, http};
use ringline_client::{Client, Event};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
use ringline_schema::ids::UserName;
use ringline_schema::message::{Reply, Request};

/// Names and weights; g is the gateway.
const NODES: [(&str, u32); 3] = [("a", 1), ("b", 1), ("g", 0)];
const PASSWORD: &str = "correct horse";

struct Cluster {
    servers: Vec<Server>,
    clients: Vec<String>,
    twins: Vec<String>,
}

impl Cluster {
    /// All three, when every node sees every other. `part`: of the clients, for the gateway.
    fn start(route: &str, part: u32) -> Self {
        let ports = free_ports(3 * NODES.len());
        let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
        let node = |(at, (name, weight)): (usize, &(&str, u32))| {
            let part = if *weight == 0 { part } else { 1 };
            format!("{name}@{}/{}*{weight}*{part}", address(at), address(NODES.len() + at))
        };
        let nodes: Vec<_> = NODES.iter().enumerate().map(node).collect();
        let clients: Vec<_> = (0..NODES.len()).map(|at| address(NODES.len() + at)).collect();
        let twins: Vec<_> = (0..NODES.len()).map(|at| address(2 * NODES.len() + at)).collect();
        let start = |at: usize| {
            let sets = [
                format!("node.name={}", NODES[at].0),
                "cluster.mode=static".to_owned(),
                "cluster.tls=off".to_owned(),
                format!("cluster.nodes={}", nodes.join(",")),
                format!("cluster.route={route}"),
                format!("cluster.route_listen={}", twins[at]),
            ];
            let mut arguments = vec!["--listen", &clients[at], "--cores", "1"];
            arguments.extend(sets.iter().flat_map(|set| ["--set", set]));
            Server::start(&arguments)
        };
        let servers = (0..NODES.len()).map(start).collect();
        let cluster = Self { servers, clients, twins };
        // Only owners are named by one strategy, everybody in turn by the others.
        for at in 0..NODES.len() {
            let users = (0..NODES.len()).map(|node| cluster.user_of(node % 2));
            users.for_each(|user| until(|| cluster.ask(at, &format!("/route?user={user}")).0 == 200));
        }
        cluster
    }

    fn ask(&self, at: usize, path: &str) -> (u16, serde_json::Value) {
        let (status, head, body) = http(&self.twins[at], "GET", path);
        assert!(head.contains("content-type: application/json") && head.contains("cache-control: no-store"), "{head}");
        (status, serde_json::from_str(&body).unwrap())
    }

    /// The node that the twin of another names.
    fn route(&self, at: usize, user: &str) -> String {
        let (status, json) = self.ask(at, &format!("/route?user={user}"));
        assert_eq!(status, 200, "{json}");
        let name = json["node"].as_str().unwrap().to_owned();
        let node = NODES.iter().position(|(known, _)| *known == name).unwrap();
        assert_eq!(json["address"], self.clients[node].as_str());
        name
    }

    /// A user of that node.
    fn user_of(&self, node: usize) -> String {
        let listed: Vec<_> = NODES.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
        let placement = ClusterPlacement::new("a", CorePlacement::new(1).unwrap(), &listed).unwrap();
        let owner = |user: &String| placement.node_of(UserName::new(user).unwrap().partition()).0;
        (0..).map(|at| format!("user-{at}")).find(|user| usize::from(owner(user)) == node).unwrap()
    }
}

fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it does not become so");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn every_node_names_the_owner_and_refuses_what_it_cannot_answer_by_name() {
    let mut cluster = Cluster::start("consistent_hash", 1);
    let (of_a, of_b) = (cluster.user_of(0), cluster.user_of(1));
    for at in 0..NODES.len() {
        assert_eq!((cluster.route(at, &of_a), cluster.route(at, &of_b)), ("a".to_owned(), "b".to_owned()));
        let mut wire = cluster.servers[at].connect();
        let told = wire.request(&Request::Route { user: &of_b });
        let Reply::RouteOk { node, address } = told.reply() else { panic!("{:?}", told.reply()) };
        assert_eq!((node, address), ("b", cluster.clients[1].as_str()));
    }
    for (path, error) in [
        ("/route?user=%00", "BAD_NAME"),
        ("/route?user=ann&user=bob", "BAD_REQUEST"),
        ("/route?name=ann", "BAD_REQUEST"),
    ] {
        let (status, json) = cluster.ask(0, path);
        assert_eq!((status, &json["error"]), (400, &error.into()), "{path}");
    }
    assert_eq!(http(&cluster.twins[0], "GET", "/metrics").0, 404, "nothing else is told here");
    assert_eq!(http(&cluster.twins[0], "POST", "/route").0, 405);
    let other = cluster.twins[1].clone();
    cluster.servers[1].kill();
    until(|| cluster.ask(2, &format!("/route?user={of_b}")).0 == 503);
    assert_eq!(cluster.ask(2, &format!("/route?user={of_b}")).1["error"], "UNAVAILABLE");
    assert_eq!(cluster.route(2, &of_a), "a");
    assert!(TcpStream::connect(other).is_err());
}

#[test]
fn nodes_tell_each_other_how_many_clients_they_have() {
    let cluster = Cluster::start("least_connections", 0);
    let held: Vec<_> = (0..8).map(|_| TcpStream::connect(&cluster.clients[0]).unwrap()).collect();
    // In turn as long as both have the same; a is left out when b and the gateway have heard of its clients.
    for at in [1, 2] {
        until(|| (0..4).all(|_| cluster.route(at, "ann") != "a"));
    }
    drop(held);
    until(|| cluster.route(1, "ann") == "a");
}

/// Sends to the next, and waits for what the one before has sent.
async fn talk(clients: &mut [(Client, ringline_client::Events)], names: &[String]) {
    for (at, (client, _)) in clients.iter().enumerate() {
        client.send(&names[(at + 1) % names.len()], format!("from {at}")).await.unwrap();
    }
    for (at, (_, events)) in clients.iter_mut().enumerate() {
        let before = (at + names.len() - 1) % names.len();
        let expected = format!("from {before}");
        find(events, |event| match event {
            Event::Message(message) if message.text() == expected => Some(()),
            _ => None,
        })
        .await;
    }
}

#[test]
fn clients_are_sent_to_a_gateway_where_there_is_one() {
    let mut cluster = Cluster::start("round_robin", 1);
    until(|| (0..6).all(|number| cluster.route(number % 3, "ann") == "g"));
    cluster.servers[2].kill();
    until(|| (0..4).all(|number| cluster.route(number % 2, "ann") != "g"));
}

#[test]
fn whoever_knocks_elsewhere_or_is_sent_there_ends_where_its_user_lives() {
    let cluster = Cluster::start("round_robin", 0);
    let names: Vec<_> = (0..4).map(|at| format!("user-{at}")).collect();
    until(|| {
        let in_turn: Vec<_> = (0..2).map(|_| cluster.route(0, &names[0])).collect();
        ["a", "b"].iter().all(|name| in_turn.contains(&(*name).to_owned()))
    });
    run(async {
        let all = cluster.clients.join(",");
        let mut clients = Vec::new();
        for (at, name) in names.iter().enumerate() {
            // Some are given one owner alone, some all nodes: then one of them is asked for the route.
            let address = if at % 2 == 0 { &cluster.clients[0] } else { &all };
            let builder = Client::builder(address).user(name).password(PASSWORD);
            builder.register().await.unwrap();
            clients.push(builder.connect().await.unwrap());
        }
        talk(&mut clients, &names).await;
        let (mut online, mut next) = (Vec::new(), None::<String>);
        loop {
            let page = clients[0].0.online(next.as_deref(), 200).await.unwrap();
            online.extend(page.users.into_iter().map(|row| row.user.as_str().to_owned()));
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        online.sort();
        assert_eq!(online, names, "each once, whichever node they knocked at");
    });
}

#[test]
fn what_is_no_strategy_or_no_free_address_is_told_at_the_start() {
    let (code, line) = complaint(&["serve", "--set", "cluster.route=random"]);
    assert!(code == 2 || code == 1, "{code}");
    assert!(line.contains("cluster.route = random") && line.contains("least_connections"), "{line}");
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("cluster.route_listen={}", held.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("data");
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--cores", "1", "--set", &listen, "--data-dir"];
    let (_, line) = complaint(&[&arguments[..], &[folder.to_str().unwrap()]].concat());
    assert!(line.contains("choose another cluster.route_listen"), "{line}");
}
