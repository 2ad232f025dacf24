//! Real processes with a real etcd and a real PostgreSQL as one chat, users that write to each other, and what they were told
//! compared with what is kept.

use std::time::{Duration, Instant};

use ringline_client::{Client, DeviceId, HistoryRange, Seq};
use ringline_store::postgres::rig::Cluster as Postgres;

use super::etcd::{Etcd, free_port};
use super::{PATIENCE, Server};

pub const NAMES: [&str; 3] = ["a", "b", "c"];
/// Users that write in a ring, so that every node owns some of their conversations.
pub const USERS: usize = 12;

pub struct Cluster {
    pub servers: Vec<Server>,
    pub etcd: Etcd,
    pub postgres: Postgres,
    /// What each was started with.
    pub arguments: Vec<Vec<String>>,
    folder: tempfile::TempDir,
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
    pub fn start() -> Self {
        Self::start_with(|_| Vec::new())
    }

    /// The same with further keys of the node at that place.
    pub fn start_with(more: impl Fn(usize) -> Vec<(&'static str, String)>) -> Self {
        let (etcd, postgres) = (Etcd::start(), Postgres::start(&[]));
        let folder = tempfile::tempdir().unwrap();
        let certs = folder.path().join("certs");
        let made = super::run(&["certs", "init", certs.to_str().unwrap(), "--nodes", &NAMES.join(",")]);
        assert!(made.status.success(), "{made:?}");
        let url = postgres.database();
        let arguments = |(at, name): (usize, &str)| -> Vec<String> {
            let file = |name: String| certs.join(name).display().to_string();
            let keys = [
                ("node.name", name.to_owned()),
                ("cluster.mode", "etcd".to_owned()),
                ("cluster.listen", format!("127.0.0.1:{}", free_port())),
                ("cluster.ca", file("ca.pem".into())),
                ("cluster.cert", file(format!("{name}.pem"))),
                ("cluster.key", file(format!("{name}.key"))),
                ("etcd.endpoints", etcd.endpoint()),
                ("store.kind", "postgres".to_owned()),
                ("postgres.url", url.clone()),
                ("auth.issuer", file("issuer.pem".into())),
            ];
            let keys = keys.into_iter().chain(more(at));
            let sets = keys.flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]);
            ["--cores", "1"].map(str::to_owned).into_iter().chain(sets).collect()
        };
        let arguments: Vec<_> = NAMES.into_iter().enumerate().map(arguments).collect();
        let start = |arguments: &Vec<String>| Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let servers = std::thread::scope(|scope| {
            let starting: Vec<_> = arguments.iter().map(|arguments| scope.spawn(move || start(arguments))).collect();
            starting.into_iter().map(|starting| starting.join().unwrap()).collect()
        });
        let mut cluster = Self { servers, etcd, postgres, arguments, folder };
        cluster.settle(&[0, 1, 2]);
        cluster
    }

    /// Waits until each of these has said that it owns what it should.
    pub fn settle(&mut self, nodes: &[usize]) {
        for at in nodes {
            self.servers[*at].wait_for_line("as it should");
        }
    }

    pub fn token(&self, user: &str) -> String {
        let issuer = format!("auth.issuer={}", self.folder.path().join("certs/issuer.pem").display());
        let made = super::run(&["token", "--user", user, "--set", &issuer]);
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    }
}

pub fn name(user: usize) -> String {
    format!("user{user}")
}

/// Logs in by any of these addresses; what is refused for now is tried again.
pub async fn log_in(addresses: &[String], (user, token): (&str, &str), device: u64) -> Client {
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
pub async fn write(addresses: &[String], tokens: &[String], (round, count): (u64, usize)) -> Vec<Vec<(Seq, String)>> {
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
pub async fn check(addresses: &[String], tokens: &[String], accepted: &[Vec<(Seq, String)>]) {
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

pub fn join(all: &mut [Vec<(Seq, String)>], more: Vec<Vec<(Seq, String)>>) {
    all.iter_mut().zip(more).for_each(|(all, more)| all.extend(more));
}
