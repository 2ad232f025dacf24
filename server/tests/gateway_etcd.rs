//! A gateway in a cluster of etcd: a client stays there while the owner of its user dies and another takes over.

mod common;

use common::etcd::{Etcd, free_port};
use common::nodes::{PASSWORD, patiently, register};
use common::sdk::{find, run};
use common::{PATIENCE, Server};
use ringline_client::{Client, DeviceId, Event, Events};
use ringline_store::postgres::rig::Cluster as Postgres;

/// Names and weights.
const NODES: [(&str, u32); 3] = [("a", 1), ("b", 1), ("g", 0)];
const USERS: usize = 6;

fn start(at: usize, (etcd, url): (&Etcd, &str)) -> Server {
    let (name, weight) = NODES[at];
    let keys = [
        format!("node.name={name}"),
        "cluster.mode=etcd".to_owned(),
        "cluster.tls=off".to_owned(),
        format!("cluster.listen=127.0.0.1:{}", free_port()),
        format!("cluster.weight={weight}"),
        format!("etcd.endpoints={}", etcd.endpoint()),
        "store.kind=postgres".to_owned(),
        format!("postgres.url={url}"),
    ];
    let sets = keys.iter().flat_map(|key| ["--set", key]);
    let mut server = Server::start(&["--cores", "1"].into_iter().chain(sets).collect::<Vec<_>>());
    server.wait_for_line("as it should");
    server
}

/// A device of a user, logged in at the gateway.
async fn log_in(address: &str, user: &str) -> (Client, Events) {
    let builder = Client::builder(address).user(user).password(PASSWORD).device(DeviceId(1));
    register(&builder).await;
    patiently(async || builder.clone().connect().await.map_err(|error| error.to_string())).await
}

/// Everybody writes to the next one, and hears from the one before.
async fn chat(people: &mut [(Client, Events)], round: usize) {
    let count = people.len();
    for (at, (client, _)) in people.iter().enumerate() {
        let sent = client.send(&format!("user-{}", (at + 1) % count), format!("{round} from {at}"));
        tokio::time::timeout(PATIENCE, sent).await.expect("in time").unwrap();
    }
    for (at, (_, events)) in people.iter_mut().enumerate() {
        let expected = format!("{round} from {}", (at + count - 1) % count);
        let is_it = |event: Event| match event {
            Event::Message(message) if message.text() == expected => Some(()),
            _ => None,
        };
        find(events, is_it).await;
    }
}

#[test]
fn slow_clients_stay_at_a_gateway_while_the_owner_of_their_users_dies() {
    let (etcd, postgres) = (Etcd::start(), Postgres::start(&[]));
    let url = postgres.database();
    let mut servers: Vec<Server> = (0..NODES.len()).map(|at| start(at, (&etcd, &url))).collect();
    let gateway = servers[2].address.clone();
    run(async {
        let mut people = Vec::new();
        for at in 0..USERS {
            people.push(log_in(&gateway, &format!("user-{at}")).await);
        }
        chat(&mut people, 1).await;
        servers[0].kill();
        servers[1].wait_for_line("as it should");
        chat(&mut people, 2).await;
        // The node is back, takes its part again, and its users come back to it by the gateway.
        servers[0].restart(None);
        servers[0].wait_for_line("as it should");
        chat(&mut people, 3).await;
    });
}
