//! A cluster of etcd as its operator uses it: who owns what, where clients are sent, a node that is drained under load and given
//! its part again, and what is refused. Real processes, a real etcd, a real PostgreSQL.

mod common;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::moving::{Cluster, NAMES, USERS, check, join, log_in, name, write};
use common::sdk::run;
use common::{PATIENCE, complaint, free_ports, http};
use serde_json::Value;

struct Site {
    cluster: Cluster,
    twins: Vec<String>,
}

impl Site {
    fn start() -> Self {
        let ports = free_ports(2 * NAMES.len());
        let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
        let (admins, twins): (Vec<_>, Vec<_>) =
            (0..NAMES.len()).map(|at| (address(2 * at), address(2 * at + 1))).unzip();
        let cluster = Cluster::start_with(|at| {
            let route = ("cluster.route", "least_connections".to_owned());
            vec![("admin.listen", admins[at].clone()), ("cluster.route_listen", twins[at].clone()), route]
        });
        Self { cluster, twins }
    }

    /// Exit code and standard output of `ringline cluster COMMAND` with the configuration of a node.
    fn command(&self, at: usize, command: &[&str]) -> (Option<i32>, String) {
        let sets = self.cluster.arguments[at].iter().map(String::as_str);
        let arguments: Vec<_> = ["cluster"].into_iter().chain(command.iter().copied()).chain(sets).collect();
        let output = common::run(&arguments);
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    /// How many partitions each node owns, as one of them sees it; waits until all are where they should be.
    fn owned(&self, at: usize) -> [usize; 3] {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (code, json) = self.command(at, &["partitions", "--json"]);
            if code == Some(0) {
                let json: Value = serde_json::from_str(&json).unwrap();
                let rows = json["partitions"].as_array().unwrap();
                assert_eq!(rows.len(), 1_024);
                return NAMES.map(|name| rows.iter().filter(|row| row["owner"] == name).count());
            }
            assert!(Instant::now() < deadline, "{code:?}: {:?}", self.command(at, &["partitions"]));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn until_owned(&self, at: usize, what: &str, done: impl Fn([usize; 3]) -> bool) {
        until(what, || done(self.owned(at)));
    }

    /// The node that the twin of another names for anybody; `None`: none for now.
    fn named(&self, at: usize) -> Option<String> {
        let (status, _, body) = http(&self.twins[at], "GET", "/route?user=somebody");
        let json: Value = serde_json::from_str(&body).unwrap();
        (status == 200).then(|| json["node"].as_str().unwrap().to_owned())
    }

    fn addresses(&self) -> Vec<String> {
        self.cluster.servers.iter().map(|server| server.address.clone()).collect()
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whoever has clients is left out until it has told that they are gone.
fn routes_follow_the_clients(site: &Site) {
    until("all are named in turn", || {
        let named: Vec<_> = (0..6).filter_map(|_| site.named(1)).collect();
        NAMES.iter().all(|name| named.iter().any(|named| named == name))
    });
    let held: Vec<_> = (0..16).map(|_| TcpStream::connect(&site.cluster.servers[0].address).unwrap()).collect();
    for at in [1, 2] {
        until("a has too many", || (0..6).all(|_| site.named(at).is_some_and(|named| named != "a")));
    }
    drop(held);
    until("a has none any more", || site.named(1).as_deref() == Some("a"));
}

fn what_cannot_be_drained_is_refused(site: &Site) {
    let (code, text) = site.command(0, &["drain", "nobody"]);
    assert!(code == Some(1) && text.contains("\"nobody\"") && text.contains("a, b, c"), "{text}");
    let (code, text) = site.command(0, &["undrain", "b"]);
    assert!(code == Some(1) && text.contains("was not drained"), "{text}");
}

#[test]
fn slow_a_node_is_drained_under_load_and_given_its_part_again() {
    let mut site = Site::start();
    let first = site.owned(0);
    assert!(first.iter().sum::<usize>() == 1_024 && first.iter().all(|owned| *owned > 150), "{first:?}");
    until("all partitions are shown", || {
        let (code, text) = site.command(1, &["partitions", "--all"]);
        code == Some(0) && text.starts_with("PARTITIONS") && text.lines().count() > 100
    });
    until("all see all", || site.command(2, &["status"]).0 == Some(0));
    routes_follow_the_clients(&site);
    what_cannot_be_drained_is_refused(&site);

    let tokens: Vec<String> = (0..USERS).map(|user| site.cluster.token(&name(user))).collect();
    // Asked for the route, any of them names any.
    let all = vec![site.addresses().join(",")];
    let mut accepted = vec![Vec::new(); USERS];
    run(async {
        for (user, token) in tokens.iter().enumerate() {
            log_in(&all, (&name(user), token), 1).await.close(Duration::from_secs(1)).await;
        }
    });
    let load = {
        let (all, tokens) = (all.clone(), tokens.clone());
        std::thread::spawn(move || {
            let mut accepted = Vec::new();
            run(async { accepted = write(&all, &tokens, (1, 60)).await });
            accepted
        })
    };
    let (code, text) = site.command(0, &["drain", "b"]);
    assert!(code == Some(0) && text.contains("node b owns nothing"), "{code:?}: {text}");
    join(&mut accepted, load.join().unwrap());
    site.until_owned(2, "b owns nothing", |owned| owned[1] == 0 && owned[0] + owned[2] == 1_024);
    run(check(&all, &tokens, &accepted));
    for at in 0..NAMES.len() {
        until("b is named no more", || (0..6).all(|_| site.named(at).is_some_and(|named| named != "b")));
    }
    until("b is shown as drained", || {
        let (_, text) = site.command(0, &["status"]);
        text.lines().any(|line| line.starts_with("b ") && line.contains("drained"))
    });

    // Another start of it owns nothing either.
    assert_eq!(site.cluster.servers[1].stop(), Some(0));
    site.cluster.servers[1].restart(None);
    site.cluster.settle(&[1]);
    site.until_owned(1, "b is back and owns nothing", |owned| owned[1] == 0);
    let (code, text) = site.command(2, &["drain", "c"]);
    assert!(code == Some(0) && text.contains("node c owns nothing"), "{code:?}: {text}");
    let (code, text) = site.command(2, &["drain", "a"]);
    assert!(code == Some(1) && text.contains("the last one"), "{code:?}: {text}");
    let all = vec![site.addresses().join(",")];
    join(&mut accepted, write_once(&all, &tokens));
    run(check(&all, &tokens, &accepted));

    for node in ["b", "c"] {
        assert_eq!(site.command(0, &["undrain", node]).0, Some(0));
    }
    site.until_owned(0, "all own their parts again", |owned| owned == first);
    run(check(&all, &tokens, &accepted));
    site.cluster.etcd.stop();
    let (code, text) = site.command(0, &["drain", "b"]);
    assert!(code == Some(1) && text.contains("no etcd answers"), "{code:?}: {text}");
}

fn write_once(all: &[String], tokens: &[String]) -> Vec<Vec<(ringline_client::Seq, String)>> {
    let mut accepted = Vec::new();
    run(async { accepted = write(all, tokens, (2, 5)).await });
    accepted
}

#[test]
fn what_needs_etcd_is_refused_without_it() {
    let server = common::Server::start(&["--set", "admin.listen=127.0.0.1:0"]);
    let line = server.log.iter().find(|line| line.contains("metrics on http://")).expect("an admin endpoint");
    let admin = line.split("http://").nth(1).unwrap().trim_end_matches("/metrics");
    let (code, text) = complaint(&["cluster", "partitions", "--admin", admin]);
    assert!(code == 1 && text.contains("UNSUPPORTED") && text.contains("not etcd"), "{text}");
    let (code, text) = complaint(&["cluster", "drain", "b"]);
    assert!(code == 1 && text.contains("cluster.mode of this configuration is not etcd"), "{text}");
    let (code, text) = complaint(&["cluster", "undrain", "b"]);
    assert!(code == 1 && text.contains("is not etcd"), "{text}");
}
