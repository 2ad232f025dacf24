//! Three real processes as one cluster: users of all nodes talk, whichever node they knock at; a node that is killed is waited
//! for, who needs it is told UNAVAILABLE, and when it is back nothing is lost.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{PATIENCE, Wire, free_ports, ringline};
use ringline_client::{Client, DeviceId, Event, Events};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::message::{Class, Credential, DeviceKind, Login, Reply, Request, Secret, Send};

const NODES: usize = 3;
const PASSWORD: &str = "correct horse";

/// The cluster's nodes, of which some run.
struct Cluster {
    folder: tempfile::TempDir,
    clients: Vec<String>,
    children: Vec<Option<Child>>,
    placement: ClusterPlacement,
}

impl Cluster {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ports = free_ports(2 * NODES);
        let (clients, peers) = ports.split_at(NODES);
        let clients: Vec<_> = clients.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let node = |at: usize| {
            let (peer, client) = (peers[at], &clients[at]);
            format!("{{ name = \"n{at}\", peer_address = \"127.0.0.1:{peer}\", client_address = \"{client}\" }}")
        };
        let nodes = (0..NODES).map(node).collect::<Vec<_>>().join(",\n");
        for (at, client) in clients.iter().enumerate() {
            let text = format!(
                "cores = \"1\"\ndata_dir = \"{}\"\n[node]\nname = \"n{at}\"\n[net]\nlisten = \"{client}\"\n\
                 [cluster]\nmode = \"static\"\ntls = \"off\"\nnodes = [{nodes}]\n",
                folder.path().join(format!("data{at}")).display()
            );
            std::fs::write(config(folder.path(), at), text).unwrap();
        }
        let listed: Vec<_> = (0..NODES).map(|at| (format!("n{at}"), 1)).collect();
        let placement = ClusterPlacement::new("n0", CorePlacement::new(1).unwrap(), &listed).unwrap();
        let mut cluster = Self { folder, clients, children: (0..NODES).map(|_| None).collect(), placement };
        (0..NODES).for_each(|at| cluster.boot(at));
        cluster
    }

    fn boot(&mut self, at: usize) {
        let config = config(self.folder.path(), at);
        let mut child =
            ringline().args(["serve", "--config", config.to_str().unwrap()]).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut log = Vec::new();
        while !log.last().is_some_and(|line: &String| line.contains("ready on")) {
            log.push(lines.next().unwrap_or_else(|| panic!("node {at} ended:\n{}", log.join("\n"))));
        }
        std::thread::spawn(move || lines.for_each(drop));
        self.children[at] = Some(child);
    }

    fn kill(&mut self, at: usize) {
        let mut child = self.children[at].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn home(&self, user: &str) -> usize {
        usize::from(self.placement.node_of(UserName::new(user).unwrap().partition()).0)
    }

    /// The node that owns what two users say to each other.
    fn home_of_pair(&self, one: &str, other: &str) -> NodeIndex {
        let [one, other] = [one, other].map(|name| UserName::new(name).unwrap());
        self.placement.node_of(ConversationId::direct(&one, &other).partition())
    }

    /// Logged in through a node that need not be the user's.
    async fn log_in(&self, user: &str, through: usize) -> (Client, Events) {
        let builder = Client::builder(self.clients[through].clone()).user(user).password(PASSWORD).device(DeviceId(1));
        patiently(async || builder.clone().register().await.map_err(|error| error.to_string())).await;
        patiently(async || builder.clone().connect().await.map_err(|error| error.to_string())).await
    }

    /// A connection that sends what it is told, to the user's own node.
    fn wire(&self, user: &str, device: u64) -> Wire {
        let mut wire = Wire::connect(&self.clients[self.home(user)]);
        let credential = Credential::Password(Secret(PASSWORD));
        let (device, device_kind) = (DeviceId(device), DeviceKind::Bot);
        let login = Request::Login(Login { user, credential, device, device_kind, agent: "" });
        assert!(matches!(wire.request(&login).reply(), Reply::LoginOk(_)));
        wire
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn config(folder: &Path, at: usize) -> PathBuf {
    folder.join(format!("n{at}.toml"))
}

/// Again until it succeeds: nodes find each other a moment after they are ready.
async fn patiently<T>(attempt: impl AsyncFn() -> Result<T, String>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Bodies from others, until there are so many.
async fn receive(events: &mut Events, (own, count): (&str, usize)) -> Vec<(String, String)> {
    let mut got = Vec::new();
    while got.len() < count {
        let event = tokio::time::timeout(PATIENCE, events.next()).await.expect("in time").expect("an event");
        if let Event::Message(message) = event
            && message.from.as_str() != own
        {
            got.push((message.from.as_str().to_owned(), message.text().into_owned()));
        }
    }
    got
}

#[test]
fn users_of_all_nodes_talk_and_a_killed_node_is_waited_for() {
    let mut cluster = Cluster::start();
    // One user a node, and of the pairs with the last node one that this owns.
    let names: Vec<String> = (0..400).map(|number| format!("user-{number}")).collect();
    let first = |node: usize| names.iter().find(|name| cluster.home(name) == node).unwrap().clone();
    let (ann, bob) = (first(0), first(1));
    let cid = names.iter().find(|name| cluster.home(name) == 2 && cluster.home_of_pair(&ann, name) == NodeIndex(2));
    let cid = cid.unwrap().clone();
    let users = [ann.clone(), bob, cid.clone()];
    common::sdk::run(async {
        let mut people = BTreeMap::new();
        for (at, user) in users.iter().enumerate() {
            people.insert(user.clone(), cluster.log_in(user, (at + 1) % NODES).await);
        }
        for from in &users {
            for to in users.iter().filter(|to| *to != from) {
                let (client, _) = &people[from];
                let body = format!("{from} greets {to}");
                client.send(to, body).await.unwrap();
            }
        }
        for (user, (_, events)) in &mut people {
            let mut got = receive(events, (user, NODES - 1)).await;
            got.sort();
            let others = users.iter().filter(|other| *other != user);
            let mut expected: Vec<_> = others.map(|from| (from.clone(), format!("{from} greets {user}"))).collect();
            expected.sort();
            assert_eq!(got, expected);
        }

        cluster.kill(2);
        let mut wire = cluster.wire(&ann, 7);
        let send = Send { to: &cid, class: Class::Durable, client_seq: 1, body: b"are you there?", ..Send::default() };
        let told = loop {
            // The links notice a moment later; until then its fate is unknown.
            match wire.request(&Request::Send(send)).reply() {
                Reply::Failure { code: ErrorCode::Unknown, .. } => {}
                Reply::Failure { code, retry_after_ms, .. } => break (code, retry_after_ms > 0),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(told, (ErrorCode::Unavailable, true));
        assert!(ErrorCode::Unavailable.retryable());
        // The SDK keeps it, and others go on.
        let (client, _) = &people[&ann];
        let waiting = client.send(&cid, "kept for you");
        let bob = users[1].clone();
        client.send(&bob, "still here").await.unwrap();
        let got = receive(&mut people.get_mut(&bob).unwrap().1, (&bob, 1)).await;
        assert_eq!(got, [(ann.clone(), "still here".to_owned())]);

        cluster.boot(2);
        waiting.await.unwrap();
        let got = receive(&mut people.get_mut(&cid).unwrap().1, (&cid, 1)).await;
        assert!(got.iter().all(|(from, _)| *from == ann), "{got:?}");
        assert!(got.iter().any(|(_, body)| body == "kept for you"), "{got:?}");
    });
}
