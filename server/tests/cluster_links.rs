//! Three real processes under TLS as one chat: SDK clients knock at any of them while one is killed and returns, and what people
//! are told of the cluster.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use common::sdk::run;
use common::{PATIENCE, Server, complaint, free_ports};
use ringline_client::{Client, DeviceId, Event, Events};

const NAMES: [&str; 3] = ["a", "b", "c"];
const USERS: u64 = 9;

struct Cluster {
    servers: Vec<Server>,
    /// A setting.
    issuer: String,
    clients: Vec<String>,
    admins: Vec<String>,
    _folder: tempfile::TempDir,
}

fn arguments(certs: &Path, nodes: &str, (name, client, admin): (&str, &str, &str)) -> Vec<String> {
    let file = |name: String| certs.join(name).display().to_string();
    let keys = [
        ("node.name", name.to_owned()),
        ("cluster.mode", "static".to_owned()),
        ("cluster.nodes", nodes.to_owned()),
        ("cluster.ca", file("ca.pem".into())),
        ("cluster.cert", file(format!("{name}.pem"))),
        ("cluster.key", file(format!("{name}.key"))),
        // Tokens of one issuer are good at every node.
        ("auth.issuer", file("issuer.pem".into())),
        ("admin.listen", admin.to_owned()),
    ];
    let sets = keys.into_iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]);
    ["--listen", client, "--cores", "1"].map(str::to_owned).into_iter().chain(sets).collect()
}

impl Cluster {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let certs = folder.path().join("certs");
        let made = common::run(&["certs", "init", certs.to_str().unwrap(), "--nodes", &NAMES.join(",")]);
        assert!(made.status.success(), "{made:?}");
        let ports = free_ports(9);
        let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
        let nodes: Vec<_> =
            NAMES.iter().enumerate().map(|(at, name)| format!("{name}@{}/{}", address(at), address(3 + at))).collect();
        let arguments_of =
            |at: usize| arguments(&certs, &nodes.join(","), (NAMES[at], &address(3 + at), &address(6 + at)));
        let servers: Vec<_> = (0..NAMES.len())
            .map(|at| Server::start(&arguments_of(at).iter().map(String::as_str).collect::<Vec<_>>()))
            .collect();
        let (clients, admins) = ((3..6).map(address).collect(), (6..9).map(address).collect());
        let issuer = format!("auth.issuer={}", certs.join("issuer.pem").display());
        let cluster = Self { servers, issuer, clients, admins, _folder: folder };
        cluster.wait_until_whole();
        cluster
    }

    /// Asks until every node sees every other.
    fn wait_until_whole(&self) {
        let deadline = std::time::Instant::now() + PATIENCE;
        for admin in &self.admins {
            while self.status(admin).0 != Some(0) {
                assert!(std::time::Instant::now() < deadline, "{}", self.status(admin).1);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn status(&self, admin: &str) -> (Option<i32>, String) {
        let output = common::run(&["cluster", "status", "--admin", admin]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    /// A user, by way of one of the nodes.
    async fn log_in(&self, user: u64, by: usize) -> (Client, Events) {
        let made = common::run(&["token", "--user", &name(user), "--set", &self.issuer]);
        assert!(made.status.success(), "{made:?}");
        let token = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let builder =
            Client::builder(&self.clients[by]).user(&name(user)).device(DeviceId(user + 1)).token(move || {
                let token = token.clone();
                Box::pin(async move { Ok(token) })
            });
        builder.connect().await.unwrap()
    }

    async fn everybody(&self) -> Vec<(Client, Events)> {
        let mut all = Vec::new();
        for user in 0..USERS {
            all.push(self.log_in(user, user as usize % 3).await);
        }
        all
    }
}

fn name(user: u64) -> String {
    format!("user{user}")
}

/// Takes messages until each of the others has sent so many: each once, in order.
async fn expect(own: u64, events: &mut Events, from_each: u64) {
    let mut next: BTreeMap<String, u64> = (0..USERS).filter(|user| *user != own).map(|user| (name(user), 0)).collect();
    while next.values().any(|next| *next < from_each) {
        let event = tokio::time::timeout(PATIENCE, events.next()).await;
        let event = event.unwrap_or_else(|_| panic!("{} waits: {next:?}", name(own))).expect("an event");
        let Event::Message(message) = event else { continue };
        if message.from.as_str() == name(own) {
            continue;
        }
        let expected = next.get_mut(message.from.as_str()).expect("somebody of us");
        let text = String::from_utf8(message.body.to_vec()).unwrap();
        assert_eq!(text, expected.to_string(), "from {} to {}", message.from.as_str(), name(own));
        *expected += 1;
    }
}

/// Message number `number` from everybody to everybody else. All are accepted in the end.
async fn round(all: &[(Client, Events)], number: u64) {
    let mut sendings = Vec::new();
    for (own, (client, _)) in all.iter().enumerate() {
        for other in (0..USERS).filter(|other| *other != own as u64) {
            sendings.push(client.send(&name(other), number.to_string()));
        }
    }
    for sending in sendings {
        tokio::time::timeout(PATIENCE, sending).await.expect("in time").expect("accepted");
    }
}

#[test]
fn everything_accepted_comes_once_and_in_order_though_a_node_dies() {
    let mut cluster = Cluster::start();
    let (code, table) = cluster.status(&cluster.admins[0]);
    assert_eq!((code, table.lines().count()), (Some(0), 3), "{table}");
    run(async {
        let mut all = cluster.everybody().await;
        for number in 0..3 {
            round(&all, number).await;
        }
        // While one is away what it owns waits; the others go on.
        cluster.servers[2].kill();
        let away = async {
            while cluster.status(&cluster.admins[0]).0 != Some(2) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, away).await.expect("c is seen away");
        let mut waiting = Vec::new();
        for (own, (client, _)) in all.iter().enumerate() {
            for other in (0..USERS).filter(|other| *other != own as u64) {
                waiting.push(client.send(&name(other), "3"));
            }
        }
        cluster.servers[2].restart(None);
        for sending in waiting {
            tokio::time::timeout(PATIENCE, sending).await.expect("in time").expect("accepted");
        }
        round(&all, 4).await;
        for (own, (_, events)) in all.iter_mut().enumerate() {
            expect(own as u64, events, 5).await;
        }
    });
    cluster.wait_until_whole();
    for server in &mut cluster.servers {
        assert_eq!(server.stop(), Some(0), "{}", server.log.join("\n"));
    }
}

#[test]
fn mistakes_of_a_cluster_are_told_before_it_starts() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let refused = |sets: &[&str]| {
        let mut all = vec!["serve", "--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap(), "--cores", "1"];
        sets.iter().for_each(|set| all.extend(["--set", set]));
        let (code, text) = complaint(&all);
        assert_eq!(code, 1, "{text}");
        text.lines().last().unwrap_or_default().to_owned()
    };
    let nodes = "cluster.nodes=a@127.0.0.1:1/127.0.0.1:2";
    assert!(refused(&["cluster.mode=etcd"]).contains("cluster.mode = etcd needs cluster.listen"));
    assert!(refused(&["cluster.mode=static"]).contains("cluster.nodes is empty"));
    assert!(refused(&["cluster.mode=static", nodes]).contains("does not list this node, node.name = \"ringline\""));
    assert!(refused(&["cluster.mode=static", "node.name=a", nodes]).contains("cluster.ca is empty"));
    let files = ["cluster.ca=/nowhere.pem", "cluster.cert=/nowhere.pem", "cluster.key=/nowhere.pem"];
    let error = refused(&[&["cluster.mode=static", "node.name=a", nodes][..], &files].concat());
    assert!(error.contains("cluster.ca: cannot read /nowhere.pem"), "{error}");
    assert!(refused(&["auth.issuer=/nowhere.pem"]).contains("auth.issuer: cannot read /nowhere.pem"));
    let (code, error) = complaint(&["token", "--user", "ann", "--set", "auth.issuer=/nowhere.pem"]);
    assert!(code == 1 && error.contains("auth.issuer: cannot read /nowhere.pem"), "{error}");
}

/// How often a node has refused somebody at its peer port for this reason.
fn refusals(admin: &str, reason: &str) -> u64 {
    let mut stream = TcpStream::connect(admin).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let label = format!("reason=\"{reason}\"");
    let lines = page.lines().filter(|line| line.starts_with("ringline_peer_refused_total{") && line.contains(&label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

fn wait_for_refusal(admin: &str, (reason, before): (&str, u64)) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while refusals(admin, reason) <= before {
        assert!(std::time::Instant::now() < deadline, "nobody was refused for {reason}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn strangers_at_the_peer_port_of_a_server_are_refused_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let [certs, others] = ["certs", "others"].map(|name| folder.path().join(name));
    for dir in [&certs, &others] {
        let made = common::run(&["certs", "init", dir.to_str().unwrap(), "--nodes", "a,b"]);
        assert!(made.status.success(), "{made:?}");
    }
    let ports = free_ports(6);
    let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
    let nodes = format!("a@{}/{},b@{}/{}", address(0), address(1), address(2), address(3));
    let (a_admin, b_admin) = (address(4), address(5));
    let started = |arguments: Vec<String>| Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut a = started(arguments(&certs, &nodes, ("a", &address(1), &a_admin)));

    for bytes in [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], &[0xff; 4_096]] {
        let before = refusals(&a_admin, "not_tls");
        let mut stream = TcpStream::connect(address(0)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        // Closed, perhaps with what was not read still on its way.
        let _ = stream.read_to_end(&mut Vec::new());
        wait_for_refusal(&a_admin, ("not_tls", before));
    }
    let b = |certs: &Path, nodes: &str, more: &[&str]| {
        let mut all = arguments(certs, nodes, ("b", &address(3), &b_admin));
        all.extend(more.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]));
        started(all)
    };
    let heavier = format!("{nodes}*2");
    let impostors = [
        ("wrong_ca", &others, &nodes, &[][..]),
        ("other_cluster", &certs, &nodes, &["cluster.name=other"]),
        ("other_list", &certs, &heavier, &[]),
    ];
    for (reason, certs, nodes, more) in impostors {
        let mut impostor = b(certs, nodes, more);
        wait_for_refusal(&a_admin, (reason, 0));
        assert_eq!(impostor.stop(), Some(0));
    }
    let mut b = b(&certs, &nodes, &[]);
    let deadline = std::time::Instant::now() + PATIENCE;
    while common::run(&["cluster", "status", "--admin", &a_admin]).status.code() != Some(0) {
        assert!(std::time::Instant::now() < deadline, "the real one is not let in: {}", a.log.join("\n"));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((a.stop(), b.stop()), (Some(0), Some(0)));
}
