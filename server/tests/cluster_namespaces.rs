//! A cluster of real processes, each in a network of its own: partitions, one-way cuts, nodes that hang, die or restart, under
//! load. Whatever happens, every accepted message comes once and in order, and what clients saw of it is printed.
//!
//! Needs root and network namespaces; without, each test says so and does nothing. Times are printed and never judged.
//! `cargo test -p ringline --test cluster_namespaces -- --nocapture` shows the tables.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use common::net::{Net, address};
use common::{PATIENCE, ringline};
use ringline_client::{Class, Client, DeviceId, Event, Events, SendError, SendOptions};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
use ringline_schema::ids::UserName;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

/// Longer than the silence after which a node counts as away.
const TROUBLE: Duration = Duration::from_secs(7);
/// After it: refused sends are written again after a pause, and a case must not wait for the next one's end.
const CALM: Duration = Duration::from_secs(2);
/// Between two messages of a sender.
const PACE: Duration = Duration::from_millis(20);
/// How long a transient message is tried: what clients see in between is told that often.
const PROBE: Duration = Duration::from_millis(100);

struct Cluster {
    net: Net,
    folder: tempfile::TempDir,
    children: Vec<Option<Child>>,
    /// One that lives on each node.
    users: Vec<String>,
}

impl Cluster {
    /// `None`: not here, which was printed.
    fn new(test: &str, nodes: usize) -> Option<Self> {
        let skipped = |why: String| {
            eprintln!("{test}: skipped, as namespaces can't be used here: {why}");
            None
        };
        let net = match Net::new(test, nodes) {
            Ok(net) => net,
            Err(why) => return skipped(why),
        };
        if let Err(why) = net.enter() {
            return skipped(why);
        }
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..nodes).map(|node| format!("n{node}")).collect();
        let certs = folder.path().join("certs");
        let made = common::run(&["certs", "init", certs.to_str().unwrap(), "--nodes", &names.join(",")]);
        assert!(made.status.success(), "{made:?}");
        let listed: Vec<_> = (0..nodes).map(|node| format!("n{node}@{0}:9800/{0}:9700", address(node))).collect();
        for node in 0..nodes {
            let file = |name: String| certs.join(name).display().to_string();
            let sets = [
                ("data_dir", folder.path().join(format!("data{node}")).display().to_string()),
                ("cores", "1".to_owned()),
                ("node.name", format!("n{node}")),
                ("net.listen", format!("{}:9700", address(node))),
                ("admin.listen", format!("{}:9701", address(node))),
                ("auth.issuer", file("issuer.pem".into())),
                ("cluster.mode", "static".to_owned()),
                ("cluster.nodes", listed.join(",")),
                ("cluster.ca", file("ca.pem".into())),
                ("cluster.cert", file(format!("n{node}.pem"))),
                ("cluster.key", file(format!("n{node}.key"))),
            ];
            let lines: String = sets.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
            std::fs::write(folder.path().join(format!("n{node}.sets")), lines).unwrap();
        }
        let weights: Vec<_> = names.iter().map(|name| (name.clone(), 1)).collect();
        let placement = ClusterPlacement::new("n0", CorePlacement::new(1).unwrap(), &weights).unwrap();
        let lives_on = |user: &String| usize::from(placement.node_of(UserName::new(user).unwrap().partition()).0);
        let user_of = |node| (0..).map(|number| format!("user{number}")).find(|user| lives_on(user) == node).unwrap();
        let users = (0..nodes).map(user_of).collect();
        Some(Self { net, folder, children: (0..nodes).map(|_| None).collect(), users })
    }

    fn log(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("n{node}.log"))
    }

    /// Starts a node's process, without waiting for anything.
    fn start(&mut self, node: usize) {
        let sets = std::fs::read_to_string(self.folder.path().join(format!("n{node}.sets"))).unwrap();
        let log = File::options().create(true).append(true).open(self.log(node)).unwrap();
        let space = self.net.space(node);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &space]).arg(ringline().get_program()).arg("serve");
        for set in sets.lines() {
            command.args(["--set", set]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.children[node] = Some(command.spawn().unwrap());
    }

    fn signal(&self, node: usize, name: &str) {
        let pid = self.children[node].as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Waits until a process has ended that was told to.
    async fn ended(&mut self, node: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.children[node].as_mut().unwrap().try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "n{node} does not end:\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Until every node sees every other; how long that took.
    async fn whole(&self) -> Duration {
        let began = Instant::now();
        for node in 0..self.users.len() {
            let admin = format!("{}:9701", address(node));
            loop {
                let admin = admin.clone();
                let asked = move || common::run(&["cluster", "status", "--admin", &admin]).status.code();
                if tokio::task::spawn_blocking(asked).await.unwrap() == Some(0) {
                    break;
                }
                assert!(began.elapsed() < PATIENCE, "n{node} does not see all:\n{}", self.logs());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        began.elapsed()
    }

    fn logs(&self) -> String {
        let read = |node| std::fs::read_to_string(self.log(node)).unwrap_or_default();
        (0..self.users.len()).map(|node| format!("--- n{node}\n{}", read(node))).collect()
    }

    async fn log_in(&self, node: usize) -> (Client, Events) {
        let issuer = self.folder.path().join("certs/issuer.pem");
        let set = format!("auth.issuer={}", issuer.display());
        let made = common::run(&["token", "--user", &self.users[node], "--set", &set]);
        assert!(made.status.success(), "{made:?}");
        let token = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let builder = Client::builder(format!("{}:9700", address(node))).user(&self.users[node]).device(DeviceId(1));
        let builder = builder.token(move || Box::pin(std::future::ready(Ok(token.clone()))));
        builder.connect().await.unwrap()
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

/// What senders saw since it was last looked at.
#[derive(Default)]
struct Seen {
    accepted: u64,
    longest_wait: Duration,
    /// Transient messages that did not go, by their reason.
    refused: BTreeMap<String, u64>,
    /// When a pair began to be refused, and the longest that one was.
    since: BTreeMap<(usize, usize), Instant>,
    longest_refusal: Duration,
}

impl Seen {
    fn accepted(&mut self, waited: Duration) {
        self.accepted += 1;
        self.longest_wait = self.longest_wait.max(waited);
    }
}

/// Everybody writes to everybody, until it is stopped.
struct Load {
    seen: Rc<RefCell<Seen>>,
    going: Rc<RefCell<bool>>,
    senders: Vec<JoinHandle<u64>>,
    probes: Vec<JoinHandle<()>>,
    readers: Vec<JoinHandle<Events>>,
    read: Rc<RefCell<Read>>,
    _clients: Vec<Client>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Self {
        let (seen, going, read) = (Rc::<RefCell<Seen>>::default(), Rc::new(RefCell::new(true)), Rc::default());
        let (mut clients, mut readers) = (Vec::new(), Vec::new());
        for node in 0..cluster.users.len() {
            let (client, events) = cluster.log_in(node).await;
            clients.push(client);
            readers.push(spawn_local(read_all(cluster.users[node].clone(), events, Rc::clone(&read))));
        }
        let (mut senders, mut probes) = (Vec::new(), Vec::new());
        for (from, client) in clients.iter().enumerate() {
            for (to, name) in cluster.users.iter().enumerate().filter(|(to, _)| *to != from) {
                let (client, pair) = (client.clone(), ((from, to), name.clone()));
                senders.push(spawn_local(send_all(
                    client.clone(),
                    pair.clone(),
                    (Rc::clone(&seen), Rc::clone(&going)),
                )));
                probes.push(spawn_local(probe(client, pair, (Rc::clone(&seen), Rc::clone(&going)))));
            }
        }
        Self { seen, going, senders, probes, readers, read, _clients: clients }
    }

    /// A row of the table: what was seen since the last.
    async fn row(&self, case: &str, note: &str) {
        tokio::time::sleep(CALM).await;
        let now = Instant::now();
        let mut seen = self.seen.take();
        for since in seen.since.values() {
            seen.longest_refusal = seen.longest_refusal.max(now - *since);
        }
        let refused: Vec<_> = seen.refused.iter().map(|(why, count)| format!("{count} {why}")).collect();
        let refused = if refused.is_empty() { "none".to_owned() } else { refused.join(", ") };
        println!(
            "| {case} | {} | {:.2} s | {refused} | {:.1} s | {note} |",
            seen.accepted,
            seen.longest_wait.as_secs_f64(),
            seen.longest_refusal.as_secs_f64(),
        );
        // A pair that is still refused goes on being so.
        self.seen.borrow_mut().since = seen.since.keys().map(|pair| (*pair, now)).collect();
    }

    /// Ends it, and checks that all that was accepted has come, once and in order.
    async fn finish(self, users: &[String]) {
        *self.going.borrow_mut() = false;
        let mut sent = Vec::new();
        for sender in self.senders {
            sent.push(tokio::time::timeout(PATIENCE, sender).await.expect("in time").unwrap());
        }
        for probe in self.probes {
            tokio::time::timeout(PATIENCE, probe).await.expect("in time").unwrap();
        }
        let pairs = (0..users.len()).flat_map(|from| (0..users.len()).map(move |to| (from, to)));
        let pairs: Vec<_> = pairs.filter(|(from, to)| from != to).collect();
        let deadline = Instant::now() + PATIENCE;
        for ((from, to), sent) in pairs.into_iter().zip(sent) {
            let key = (users[to].clone(), users[from].clone());
            let count = || self.read.borrow().get(&key).map_or(0, Vec::len) as u64;
            while count() < sent && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let read = self.read.borrow_mut().remove(&key).unwrap_or_default();
            assert_eq!(read, (0..sent).collect::<Vec<_>>(), "from {} to {}", users[from], users[to]);
        }
        self.readers.iter().for_each(JoinHandle::abort);
    }
}

/// Numbers by receiver and sender, in the order in which they came.
type Read = BTreeMap<(String, String), Vec<u64>>;

type Shared = (Rc<RefCell<Seen>>, Rc<RefCell<bool>>);

/// Durable messages, each after the last was accepted; how many.
async fn send_all(client: Client, (_, to): ((usize, usize), String), (seen, going): Shared) -> u64 {
    let mut number = 0;
    while *going.borrow() {
        let began = Instant::now();
        client.send(&to, number.to_string()).await.expect("accepted in the end");
        number += 1;
        seen.borrow_mut().accepted(began.elapsed());
        tokio::time::sleep(PACE).await;
    }
    number
}

/// Transient messages that are not tried for long: what a client is told meanwhile.
async fn probe(client: Client, (pair, to): ((usize, usize), String), (seen, going): Shared) {
    while *going.borrow() {
        let options = SendOptions { class: Class::Transient, give_up_after: Some(PROBE), ..SendOptions::default() };
        let began = Instant::now();
        let outcome = client.send_with(&to, "probe", options).await;
        {
            let mut seen = seen.borrow_mut();
            match outcome {
                Ok(_) => {
                    if let Some(since) = seen.since.remove(&pair) {
                        seen.longest_refusal = seen.longest_refusal.max(since.elapsed());
                    }
                }
                Err(error) => {
                    let why = match error {
                        SendError::Refused { code, .. } => code.name().to_owned(),
                        SendError::NotSent => "not sent".to_owned(),
                        _ => "UNKNOWN".to_owned(),
                    };
                    *seen.refused.entry(why).or_default() += 1;
                    seen.since.entry(pair).or_insert(began);
                }
            }
        }
        tokio::time::sleep(PROBE).await;
    }
}

async fn read_all(own: String, mut events: Events, read: Rc<RefCell<Read>>) -> Events {
    while let Some(event) = events.next().await {
        if let Event::Message(message) = event
            && message.from.as_str() != own
            && let Ok(number) = message.text().parse()
        {
            let key = (own.clone(), message.from.as_str().to_owned());
            read.borrow_mut().entry(key).or_default().push(number);
        }
    }
    events
}

fn table(title: &str) {
    println!(
        "\n{title}\n| case | durable accepted | longest wait | transient refused | longest refusal | whole again |"
    );
    println!("|---|--:|--:|---|--:|--:|");
}

fn run(test: impl Future<Output = ()>) {
    common::sdk::run(async { LocalSet::new().run_until(test).await });
}

/// Starts all at once and waits until they are one.
async fn start_all(cluster: &mut Cluster) -> Duration {
    let began = Instant::now();
    (0..cluster.users.len()).for_each(|node| cluster.start(node));
    cluster.whole().await;
    began.elapsed()
}

async fn stop_all(cluster: &mut Cluster) {
    for node in 0..cluster.users.len() {
        cluster.signal(node, "TERM");
    }
    for node in 0..cluster.users.len() {
        cluster.ended(node).await;
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[test]
fn slow_three_nodes_under_load_lose_and_double_nothing_whatever_is_cut_hangs_or_restarts() {
    let Some(mut cluster) = Cluster::new("trouble", 3) else { return };
    run(async {
        table("three nodes, everybody writes to everybody");
        let started = start_all(&mut cluster).await;
        let load = Load::start(&cluster).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        load.row("nothing happens for 1 s", &format!("started in {}", seconds(started))).await;
        cluster.net.cut_off(2, true);
        tokio::time::sleep(TROUBLE).await;
        cluster.net.cut_off(2, false);
        let whole = cluster.whole().await;
        load.row("n2 is cut off from both for 7 s", &seconds(whole)).await;
        cluster.net.cut(0, 2, true);
        tokio::time::sleep(TROUBLE).await;
        cluster.net.cut(0, 2, false);
        let whole = cluster.whole().await;
        load.row("n2 does not hear n0 for 7 s", &seconds(whole)).await;
        cluster.signal(2, "STOP");
        tokio::time::sleep(TROUBLE).await;
        cluster.signal(2, "CONT");
        let whole = cluster.whole().await;
        load.row("n2 hangs for 7 s", &seconds(whole)).await;
        for node in 0..3 {
            cluster.signal(node, "TERM");
            cluster.ended(node).await;
            cluster.start(node);
            let whole = cluster.whole().await;
            load.row(&format!("n{node} restarts in order"), &seconds(whole)).await;
        }
        cluster.signal(1, "KILL");
        cluster.ended(1).await;
        cluster.start(1);
        let whole = cluster.whole().await;
        load.row("n1 is killed and comes back", &seconds(whole)).await;
        load.finish(&cluster.users).await;
        stop_all(&mut cluster).await;
    });
}

#[test]
fn three_and_five_nodes_that_start_at_the_same_moment_become_one() {
    for nodes in [3, 5] {
        let Some(mut cluster) = Cluster::new(&format!("start{nodes}"), nodes) else { return };
        // The thread is in a namespace that goes with this cluster; the next one enters its own.
        run(async {
            let rounds = if std::env::var_os("RINGLINE_TEST_LONG").is_some() { 10 } else { 1 };
            for round in 0..rounds {
                let started = start_all(&mut cluster).await;
                println!("{nodes} nodes, round {round}: one after {}", seconds(started));
                stop_all(&mut cluster).await;
            }
        });
    }
}

/// With `RINGLINE_TEST_LONG` set: a node that hangs for longer than sessions, links and clients have patience.
#[test]
fn slow_a_node_that_hangs_for_40_s_is_part_of_it_again() {
    if std::env::var_os("RINGLINE_TEST_LONG").is_none() {
        return eprintln!("skipped: set RINGLINE_TEST_LONG to run it");
    }
    let Some(mut cluster) = Cluster::new("hang", 3) else { return };
    run(async {
        table("three nodes, one hangs");
        start_all(&mut cluster).await;
        let load = Load::start(&cluster).await;
        cluster.signal(2, "STOP");
        tokio::time::sleep(Duration::from_secs(40)).await;
        cluster.signal(2, "CONT");
        let whole = cluster.whole().await;
        load.row("n2 hangs for 40 s", &seconds(whole)).await;
        load.finish(&cluster.users).await;
        stop_all(&mut cluster).await;
    });
}
