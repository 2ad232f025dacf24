//! A node on a PostgreSQL of the test's own: what people see when either is killed and started again, and who takes over.

mod common;

use std::time::{Duration, Instant};

use common::sdk::{find, log_in, run};
use common::{PATIENCE, Server, complaint, ringline};
use ringline_client::{Client, DeviceId, Event, HistoryRange, JoinPolicy, Seq};
use ringline_schema::message::{ChatReply, Fetch, Reply, Request};
use ringline_store::postgres::rig::Cluster;

/// Messages of one round.
const ROUND: usize = 60;

/// What `serve` is told to use this database.
fn on(url: &str) -> [String; 6] {
    let url = format!("postgres.url={url}");
    ["--cores", "2", "--set", "store.kind=postgres", "--set", &url].map(str::to_owned)
}

fn start(url: &str) -> Server {
    let arguments = on(url);
    Server::start(&arguments.each_ref().map(String::as_str))
}

/// Everything that was accepted is there, once, at the number it was given.
async fn check(server: &Server, (who, with): (&str, &str), accepted: &[(Seq, String)]) {
    let (client, _) = log_in(server, (who, 9)).await;
    let mut log: Vec<String> = Vec::new();
    loop {
        let range = HistoryRange { after: Seq(log.len() as u64), newest: false, ..HistoryRange::default() };
        let page = client.history(with, range).await.unwrap();
        for message in &page.messages {
            assert_eq!(message.seq.0, log.len() as u64 + 1, "numbers are dense");
            log.push(String::from_utf8(message.body.to_vec()).unwrap());
        }
        if page.messages.is_empty() {
            break;
        }
    }
    for (seq, body) in accepted {
        assert_eq!(&log[seq.0 as usize - 1], body);
        assert_eq!(log.iter().filter(|kept| *kept == body).count(), 1, "{body}");
    }
    client.close(Duration::from_secs(1)).await;
}

/// What a user needs to log in from any thread.
struct Way {
    address: String,
    user: &'static str,
    token: String,
}

impl Way {
    fn of(server: &Server, user: &'static str) -> Self {
        Self { address: server.address.clone(), user, token: server.token(user) }
    }

    async fn log_in(self, device: u64) -> Client {
        let Self { address, user, token } = self;
        let builder = Client::builder(&address).user(user).device(DeviceId(device)).token(move || {
            let token = token.clone();
            Box::pin(async move { Ok(token) })
        });
        builder.connect().await.unwrap().0
    }
}

/// Sends a round of messages. All are accepted in the end.
async fn send(way: Way, to: &str, round: u64) -> Vec<(Seq, String)> {
    let client = way.log_in(round + 1).await;
    let bodies: Vec<String> = (0..ROUND).map(|number| format!("round {round}, message {number}")).collect();
    let sendings: Vec<_> = bodies.iter().map(|body| client.send(to, body.clone())).collect();
    let mut accepted = Vec::new();
    for (sending, body) in sendings.into_iter().zip(bodies) {
        accepted.push((sending.await.unwrap().seq, body));
    }
    client.close(Duration::from_secs(1)).await;
    accepted
}

#[test]
fn what_was_accepted_survives_kills_of_either() {
    let mut cluster = Cluster::start(&[]);
    let url = cluster.database();
    let mut server = start(&url);
    assert!(server.log.iter().any(|line| line.contains("PostgreSQL 15")), "{:?}", server.log);
    let mut accepted = Vec::new();
    run(async {
        log_in(&server, ("bob", 1)).await;
        accepted = send(Way::of(&server, "ann"), "bob", 0).await;
    });
    for round in 1..4 {
        std::thread::scope(|scope| {
            let way = Way::of(&server, "ann");
            let load = scope.spawn(move || {
                let mut accepted = Vec::new();
                run(async { accepted = send(way, "bob", round).await });
                accepted
            });
            std::thread::sleep(Duration::from_millis(40 * round));
            if round % 2 == 0 {
                cluster.stop()
            } else {
                cluster.kill()
            }
            cluster.begin();
            accepted.extend(load.join().unwrap());
        });
    }
    run(check(&server, ("ann", "bob"), &accepted));
    server.kill();
    server.restart(None);
    run(check(&server, ("bob", "ann"), &accepted));
    assert_eq!(server.stop(), Some(0));
    cluster.kill();
    cluster.begin();
    server.restart(None);
    run(async {
        check(&server, ("ann", "bob"), &accepted).await;
        accepted.extend(send(Way::of(&server, "ann"), "bob", 4).await);
        check(&server, ("bob", "ann"), &accepted).await;
    });
    assert_eq!(accepted.len(), 5 * ROUND);
}

#[test]
fn groups_settings_and_deletions_are_there_after_a_restart() {
    let cluster = Cluster::start(&[]);
    let mut server = start(&cluster.database());
    run(async {
        let (ann, _) = log_in(&server, ("ann", 1)).await;
        let (bob, mut bobs) = log_in(&server, ("bob", 1)).await;
        ann.create_group("#team", ("The team", JoinPolicy::Open), &[]).await.unwrap();
        bob.join_group("#team", "").await.unwrap();
        let sent = ann.send("#team", "hello all").await.unwrap();
        let got = find(&mut bobs, |event| match event {
            Event::Message(message) if message.body == "hello all" => Some(message.seq),
            _ => None,
        });
        assert_eq!(got.await, sent.seq);
        ann.block("carl").await.unwrap();
        ann.delete_for_me("#team", sent.seq).await.unwrap();
    });
    assert_eq!(server.stop(), Some(0));
    server.restart(None);
    run(async {
        let (ann, _) = log_in(&server, ("ann", 1)).await;
        let (bob, _) = log_in(&server, ("bob", 1)).await;
        assert_eq!(ann.group_info("#team").await.unwrap().title, "The team");
        assert_eq!(ann.blocks(None, 0).await.unwrap().users.len(), 1);
        let bodies =
            |page: ringline_client::History| -> Vec<_> { page.messages.into_iter().map(|one| one.body).collect() };
        let newest = HistoryRange { limit: 1, ..HistoryRange::default() };
        assert_eq!(bodies(bob.history("#team", newest).await.unwrap()), ["hello all"]);
        assert_eq!(bodies(ann.history("#team", newest).await.unwrap()), [""]);
        assert_eq!(bob.conversations(None, 0).await.unwrap().conversations.len(), 1);
    });
}

#[test]
fn old_messages_go_and_who_asks_below_the_first_is_told() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let mut arguments = on(&url).to_vec();
    arguments.extend(["--set", "retention.messages=20", "--set", "retention.interval_ms=1000"].map(str::to_owned));
    let mut server = Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    run(async {
        log_in(&server, ("bob", 1)).await;
        send(Way::of(&server, "ann"), "bob", 0).await;
    });
    let mut ann = server.login("ann", 7);
    let fetch = |after| Request::Fetch(Fetch { with: "bob", after: Seq(after), before: None, limit: 9, newest: false });
    let since = Instant::now();
    let first = loop {
        let told = ann.request(&fetch(1));
        match told.reply() {
            Reply::Chat(ChatReply::Truncated { first, .. }) => break first,
            Reply::FetchOk { .. } => assert!(since.elapsed() < PATIENCE, "nothing goes"),
            other => panic!("{other:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(first, Seq(ROUND as u64 - 19));
    assert_eq!(server.stop(), Some(0));
    server.restart(None);
    let mut ann = server.login("ann", 8);
    let told = ann.request(&fetch(first.0 - 1));
    let Reply::FetchOk { first: still, head, .. } = told.reply() else { panic!("{:?}", told.reply()) };
    assert_eq!((still, head), (first, Seq(ROUND as u64)));
}

#[test]
fn the_second_node_on_a_database_takes_it_over_and_the_first_says_so() {
    let cluster = Cluster::start(&[]);
    let url = cluster.database();
    let mut first = start(&url);
    let mut accepted = Vec::new();
    run(async {
        log_in(&first, ("bob", 1)).await;
        accepted = send(Way::of(&first, "ann"), "bob", 0).await;
    });
    let second = start(&url);
    // Somebody writes to the first, which does not know yet.
    let way = Way::of(&first, "ann");
    let late = std::thread::spawn(move || {
        run(async {
            let sending = way.log_in(5).await.send("bob", "too late");
            let accepted = tokio::time::timeout(Duration::from_secs(5), sending).await;
            assert!(!matches!(accepted, Ok(Ok(_))), "{accepted:?}");
        });
    });
    first.wait_for_line("fenced: another node has taken over");
    late.join().unwrap();
    run(check(&second, ("ann", "bob"), &accepted));
}

#[test]
fn what_is_wrong_with_a_database_is_said_in_one_line_without_its_password() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let serve = |settings: &[&str]| {
        let mut arguments = vec!["serve", "--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()];
        arguments.extend(["--set", "store.kind=postgres"]);
        arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        let (code, text) = complaint(&arguments);
        assert!(code != 0 && !text.contains("s3cret"), "{text}");
        text
    };
    assert!(serve(&[]).contains("needs postgres.url"));
    let url = "postgres.url=postgres://ann:s3cret@127.0.0.1:1/x?connect_timeout=1";
    assert!(serve(&[url]).contains("PostgreSQL at 127.0.0.1:1/x as ann cannot be reached"));
    let verified = "postgres.url=postgres://ann:s3cret@127.0.0.1:1/x?sslmode=verify-full";
    assert!(serve(&[verified]).contains("needs postgres.ca"));
    assert!(serve(&[verified, "postgres.ca=/nowhere.pem"]).contains("/nowhere.pem"));
    let told = complaint(&["store", "check", "--set", "store.kind=postgres", "--set", url]).1;
    assert!(told.contains("embedded store") && !told.contains("s3cret"), "{told}");
}

#[test]
fn the_doctor_names_the_version() {
    let cluster = Cluster::start(&[]);
    let arguments = on(&cluster.database());
    let output = ringline().arg("doctor").args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().any(|line| line.contains("postgres ") && line.contains("PostgreSQL 15")), "{text}");
}
