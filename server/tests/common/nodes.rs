//! Real processes as one static cluster on this machine, gateways among them.

use std::time::{Duration, Instant};

use ringline_client::{Client, ClientBuilder, DeviceId, Events};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
use ringline_schema::ids::UserName;
use ringline_schema::message::{Credential, DeviceKind, Login, Request, Secret};

use super::{PATIENCE, Received, Server, Wire, free_ports, http, sum};

pub const PASSWORD: &str = "correct horse";

/// See the module.
pub struct Nodes {
    pub servers: Vec<Server>,
    /// Where clients connect.
    pub clients: Vec<String>,
    placement: ClusterPlacement,
}

impl Nodes {
    /// Names and weights, in the order of their names; of each so many cores; `keys`: what all of them are told beside.
    pub fn start(nodes: &[(&str, u32)], cores: &str, keys: &[&str]) -> Self {
        let ports = free_ports(2 * nodes.len());
        let (clients, peers) = ports.split_at(nodes.len());
        let clients: Vec<_> = clients.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let listed: Vec<_> = (nodes.iter().zip(&clients).zip(peers))
            .map(|(((name, weight), client), peer)| format!("{name}@127.0.0.1:{peer}/{client}*{weight}"))
            .collect();
        let listed = format!("cluster.nodes={}", listed.join(","));
        let start = |(at, (name, _)): (usize, &(&str, u32))| {
            let name = format!("node.name={name}");
            let fixed = ["cluster.mode=static", "cluster.tls=off", "admin.listen=127.0.0.1:0", &listed, &name];
            let mut arguments = vec!["--listen", &clients[at], "--cores", cores];
            arguments.extend(fixed.into_iter().chain(keys.iter().copied()).flat_map(|key| ["--set", key]));
            Server::start(&arguments)
        };
        let servers = nodes.iter().enumerate().map(start).collect();
        let weights: Vec<_> = nodes.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
        let placement = ClusterPlacement::new(nodes[0].0, CorePlacement::new(1).unwrap(), &weights).unwrap();
        Self { servers, clients, placement }
    }

    /// A user of that node, whose name begins so.
    pub fn user_of(&self, node: usize, stem: &str) -> String {
        let owner = |user: &String| self.placement.node_of(UserName::new(user).unwrap().partition()).0;
        (0..).map(|at| format!("{stem}-{at}")).find(|user| usize::from(owner(user)) == node).unwrap()
    }

    /// The sum over its cores.
    pub fn metric(&self, node: usize, name: &str) -> u64 {
        let line =
            self.servers[node].log.iter().find(|line| line.contains("metrics on http://")).expect("it says where");
        let address = line.split("http://").nth(1).unwrap().trim_end_matches("/metrics");
        sum(&http(address, "GET", "/metrics").2, name).unwrap_or(0)
    }

    /// A device registered and logged in by these addresses, as soon as the nodes have found each other.
    pub async fn log_in(&self, addresses: &str, (user, device): (&str, u64)) -> (Client, Events) {
        let builder = Client::builder(addresses).user(user).password(PASSWORD).device(DeviceId(device));
        register(&builder).await;
        patiently(async || builder.clone().connect().await.map_err(|error| error.to_string())).await
    }

    /// The answer to a LOGIN on a connection of its own, once the user is registered.
    pub fn knock(&self, node: usize, (user, password): (&str, &str)) -> (Wire, Received) {
        let mut wire = Wire::connect(&self.clients[node]);
        let answer = login(&mut wire, (user, password));
        (wire, answer)
    }
}

/// The answer to a LOGIN.
pub fn login(wire: &mut Wire, (user, password): (&str, &str)) -> Received {
    let (credential, device) = (Credential::Password(Secret(password)), DeviceId(77));
    wire.request(&Request::Login(Login { user, credential, device, device_kind: DeviceKind::Bot, agent: "" }))
}

/// A name that is taken was registered before, or by an attempt whose answer was lost.
pub async fn register(builder: &ClientBuilder) {
    patiently(async || match builder.clone().register().await {
        Err(error) if !error.to_string().contains("registered already") => Err(error.to_string()),
        Ok(()) | Err(_) => Ok(()),
    })
    .await;
}

/// Again until it succeeds: nodes find each other a moment after they are ready.
pub async fn patiently<T>(attempt: impl AsyncFn() -> Result<T, String>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits for something to be so.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it does not become so: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
