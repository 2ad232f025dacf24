//! Three real processes with a real etcd and a real PostgreSQL as one chat: started at once, one is killed, one is drained, one
//! is stopped for longer than its lease, while SDK clients write. Nothing that was accepted is lost, and each conversation has
//! one order.

mod common;

use std::time::{Duration, Instant};

use common::etcd::Etcd;
use common::sdk::run;
use common::{PATIENCE, Server};
use ringline_client::{Client, DeviceId, HistoryRange, Seq};
use ringline_store::postgres::rig::Cluster as Postgres;

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Users that write in a ring, so that every node owns some of their conversations.
const USERS: usize = 12;

struct Cluster {
    servers: Vec<Server>,
    folder: tempfile::TempDir,
    _etcd: Etcd,
    _postgres: Postgres,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.servers.iter().for_each(|server| eprintln!("{}:\n{}\n", server.address, server.log.join("\n")));
        }
    }
}

impl Cluster {
    /// Starts all nodes at once.
    fn start() -> Self {
        let (etcd, postgres) = (Etcd::start(), Postgres::start(&[]));
        let folder = tempfile::tempdir().unwrap();
        let certs = folder.path().join("certs");
        let made = common::run(&["certs", "init", certs.to_str().unwrap(), "--nodes", &NAMES.join(",")]);
        assert!(made.status.success(), "{made:?}");
        let url = postgres.database();
        let arguments = |name: &str| -> Vec<String> {
            let file = |name: String| certs.join(name).display().to_string();
            let keys = [
                ("node.name", name.to_owned()),
                ("cluster.mode", "etcd".to_owned()),
                ("cluster.listen", format!("127.0.0.1:{}", common::etcd::free_port())),
                ("cluster.ca", file("ca.pem".into())),
                ("cluster.cert", file(format!("{name}.pem"))),
                ("cluster.key", file(format!("{name}.key"))),
                ("etcd.endpoints", etcd.endpoint()),
                ("store.kind", "postgres".to_owned()),
                ("postgres.url", url.clone()),
                ("auth.issuer", file("issuer.pem".into())),
            ];
            let sets = keys.into_iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]);
            ["--cores", "1"].map(str::to_owned).into_iter().chain(sets).collect()
        };
        let servers = std::thread::scope(|scope| {
            let starting: Vec<_> = NAMES
                .map(|name| {
                    let arguments = arguments(name);
                    scope.spawn(move || Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>()))
                })
                .into_iter()
                .collect();
            starting.into_iter().map(|starting| starting.join().unwrap()).collect()
        });
        let mut cluster = Self { servers, folder, _etcd: etcd, _postgres: postgres };
        cluster.settle(&[0, 1, 2]);
        cluster
    }

    /// Waits until each of these has said that it owns what it should.
    fn settle(&mut self, nodes: &[usize]) {
        for at in nodes {
            self.servers[*at].wait_for_line("as it should");
        }
    }

    fn token(&self, user: &str) -> String {
        let issuer = format!("auth.issuer={}", self.folder.path().join("certs/issuer.pem").display());
        let made = common::run(&["token", "--user", user, "--set", &issuer]);
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    }
}

fn name(user: usize) -> String {
    format!("user{user}")
}

/// Logs in by any of these addresses; what is refused for now is tried again.
async fn log_in(addresses: &[String], (user, token): (&str, &str), device: u64) -> Client {
    let deadline = Instant::now() + PATIENCE;
    for address in addresses.iter().cycle() {
        let token = token.to_owned();
        let builder = Client::builder(address).user(user).device(DeviceId(device)).token(move || {
            let token = token.clone();
            Box::pin(async move { Ok(token) })
        });
        match tokio::time::timeout(Duration::from_secs(5), builder.connect()).await {
            Ok(Ok((client, mut events))) => {
                tokio::spawn(async move { while events.next().await.is_some() {} });
                return client;
            }
            other => assert!(Instant::now() < deadline, "{user} can't log in: {:?}", other.map(|done| done.err())),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    unreachable!("there are addresses")
}

/// Everybody writes `count` messages to the next one. Each is accepted in the end; returns their numbers and texts.
async fn write(addresses: &[String], tokens: &[String], (round, count): (u64, usize)) -> Vec<Vec<(Seq, String)>> {
    let writing = (0..USERS).map(|user| {
        let (addresses, token) = (addresses.to_vec(), tokens[user].clone());
        tokio::spawn(async move {
            let client = log_in(&addresses, (&name(user), &token), round).await;
            let mut accepted = Vec::new();
            for number in 0..count {
                let text = format!("round {round}, message {number} of {user}");
                let sent = tokio::time::timeout(PATIENCE, client.send(&name((user + 1) % USERS), text.clone())).await;
                let sent = sent.unwrap_or_else(|_| panic!("not accepted in time: {text}"));
                accepted.push((sent.unwrap_or_else(|error| panic!("{text}: {error}")).seq, text));
            }
            client.close(Duration::from_secs(1)).await;
            accepted
        })
    });
    let mut all = Vec::new();
    for writing in writing.collect::<Vec<_>>() {
        all.push(writing.await.unwrap());
    }
    all
}

/// Everything that was accepted is there, once, at the number it was given.
async fn check(addresses: &[String], tokens: &[String], accepted: &[Vec<(Seq, String)>]) {
    for (user, accepted) in accepted.iter().enumerate() {
        let client = log_in(addresses, (&name(user), &tokens[user]), 99).await;
        let deadline = Instant::now() + PATIENCE;
        let with = name((user + 1) % USERS);
        let mut log: Vec<String> = Vec::new();
        loop {
            let range = HistoryRange { after: Seq(log.len() as u64), newest: false, ..HistoryRange::default() };
            let page = match client.history(&with, range).await {
                Ok(page) => page,
                Err(error) => {
                    assert!(Instant::now() < deadline, "{with}: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            for message in &page.messages {
                assert_eq!(message.seq.0, log.len() as u64 + 1, "numbers are dense");
                log.push(String::from_utf8(message.body.to_vec()).unwrap());
            }
            if page.messages.is_empty() {
                break;
            }
        }
        for (seq, text) in accepted {
            assert_eq!(&log[seq.0 as usize - 1], text);
            assert_eq!(log.iter().filter(|kept| *kept == text).count(), 1, "{text}");
        }
        client.close(Duration::from_secs(1)).await;
    }
}

fn join(all: &mut [Vec<(Seq, String)>], more: Vec<Vec<(Seq, String)>>) {
    all.iter_mut().zip(more).for_each(|(all, more)| all.extend(more));
}

#[test]
fn slow_nodes_are_killed_drained_and_stopped_under_load_and_nothing_is_lost() {
    let mut cluster = Cluster::start();
    let tokens: Vec<String> = (0..USERS).map(|user| cluster.token(&name(user))).collect();
    let addresses = |cluster: &Cluster, of: &[usize]| -> Vec<String> {
        of.iter().map(|at| cluster.servers[*at].address.clone()).collect()
    };
    let all = addresses(&cluster, &[0, 1, 2]);
    let mut accepted = vec![Vec::new(); USERS];
    run(async {
        // Somebody to write to.
        for (user, token) in tokens.iter().enumerate() {
            log_in(&all, (&name(user), token), 1).await.close(Duration::from_secs(1)).await;
        }
        join(&mut accepted, write(&all, &tokens, (1, 20)).await);
        check(&all, &tokens, &accepted).await;
    });

    // Killed in the middle of it: the others have its part when its lease has ended.
    let under_load = |cluster: &mut Cluster, round: u64, of: &[usize], act: &dyn Fn(&mut Cluster)| {
        let (by, tokens) = (addresses(cluster, of), tokens.clone());
        let load = std::thread::spawn(move || {
            let mut accepted = Vec::new();
            run(async { accepted = write(&by, &tokens, (round, 60)).await });
            accepted
        });
        std::thread::sleep(Duration::from_millis(300));
        act(cluster);
        load.join().unwrap()
    };
    let more = under_load(&mut cluster, 2, &[1, 2, 0], &|cluster| cluster.servers[0].kill());
    join(&mut accepted, more);
    cluster.settle(&[1, 2]);
    let left = addresses(&cluster, &[1, 2]);
    run(check(&left, &tokens, &accepted));

    // Back, as another start.
    cluster.servers[0].restart(None);
    cluster.settle(&[0, 1, 2]);

    // Drained: it hands over and ends in order.
    let more = under_load(&mut cluster, 3, &[0, 2, 1], &|cluster| {
        assert_eq!(cluster.servers[1].stop(), Some(0), "{}", cluster.servers[1].log.join("\n"));
    });
    join(&mut accepted, more);
    let left = addresses(&cluster, &[0, 2]);
    run(check(&left, &tokens, &accepted));
    cluster.servers[1].restart(None);
    cluster.settle(&[1]);

    // Stopped for longer than its lease: it finds itself replaced, and ends.
    let more = under_load(&mut cluster, 4, &[0, 1, 2], &|cluster| {
        cluster.servers[2].signal("STOP");
        cluster.settle(&[0, 1]);
        cluster.servers[2].signal("CONT");
        assert_eq!(cluster.servers[2].wait(), Some(1), "{}", cluster.servers[2].log.join("\n"));
    });
    join(&mut accepted, more);
    let left = addresses(&cluster, &[0, 1]);
    run(check(&left, &tokens, &accepted));
    for at in [0, 1] {
        assert_eq!(cluster.servers[at].stop(), Some(0), "{}", cluster.servers[at].log.join("\n"));
    }
}
