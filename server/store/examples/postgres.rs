//! How many messages a second a PostgreSQL store takes, and how long a commit is.
//!
//! `cargo run --release -p ringline-store --example postgres -- --url postgres://ringline@127.0.0.1/test` writes into that
//! database by the same calls as a server's core, in batches of each size, and prints a line for each. One thread plays
//! one core. Invariant: latency is from `submit` to the poll that saw the commit.

use std::time::{Duration, Instant};

use clap::Parser;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::BodyKind;
use ringline_schema::record::{Record, StoredMessage};
use ringline_store::postgres::{PostgresOptions, PostgresShard, PostgresStore};
use ringline_store::{Lsn, Store, StoreEvent};

const BODY_BYTES: usize = 64;
const CONVERSATIONS: u64 = 1_000;
const BATCHES: [u64; 5] = [1, 16, 256, 2_048, 8_192];
const POLL_PAUSE: Duration = Duration::from_micros(20);

#[derive(Debug, Parser)]
struct Arguments {
    /// A database that may be written to, with a password in PGPASSFILE if it needs one.
    #[arg(long)]
    url: String,
    /// For each size of a batch.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

fn main() {
    let arguments = Arguments::parse();
    let options = PostgresOptions { url: arguments.url, ..PostgresOptions::default() };
    let (mut stores, report) = PostgresStore::open(options, 1).unwrap_or_else(|error| panic!("{error}"));
    println!("PostgreSQL {} at {}, bodies of {BODY_BYTES} bytes", report.version, report.place);
    let mut store = stores.remove(0);
    // A run of its own conversations: numbers begin at 1.
    let pairs: Vec<Pair> = (0..CONVERSATIONS).map(|number| Pair::new(report.owner, number)).collect();
    let mut sent = 0;
    for size in BATCHES {
        let (mut latencies_us, started) = (Vec::new(), Instant::now());
        let before = sent;
        while started.elapsed() < Duration::from_secs(arguments.seconds) {
            let mut last = Lsn::default();
            for _ in 0..size {
                let pair = &pairs[(sent % CONVERSATIONS) as usize];
                last = store.append(&pair.message(1 + sent / CONVERSATIONS)).expect("room for a batch");
                sent += 1;
            }
            latencies_us.push(commit(&mut store, last));
        }
        let rate = (sent - before) as f64 / started.elapsed().as_secs_f64();
        latencies_us.sort_unstable();
        let at = |share: usize| latencies_us[(latencies_us.len() * share / 100).min(latencies_us.len() - 1)];
        let commits = latencies_us.len();
        println!(
            "batch {size:5}: {rate:9.0} messages/s, commit {:7} µs median, {:7} µs p99, {commits} commits",
            at(50),
            at(99)
        );
    }
    store.close().expect("an orderly end");
}

/// Submits and waits. Returns µs.
fn commit(store: &mut PostgresShard, wanted: Lsn) -> u64 {
    let (started, mut events) = (Instant::now(), Vec::new());
    store.submit();
    loop {
        store.poll(&mut events);
        for event in events.drain(..) {
            match event {
                StoreEvent::Committed(upto) if upto >= wanted => return started.elapsed().as_micros() as u64,
                StoreEvent::Committed(_) => {}
                StoreEvent::Failed | StoreEvent::Loaded(..) => panic!("{event:?}"),
            }
        }
        std::thread::sleep(POLL_PAUSE);
    }
}

struct Pair {
    id: ConversationId,
    from: UserName,
    to: UserName,
}

impl Pair {
    fn new(run: i64, number: u64) -> Self {
        let name = |who: &str| UserName::new(&format!("{who} {number} of run {run}")).expect("a name");
        let (from, to) = (name("ann"), name("bob"));
        Self { id: ConversationId::direct(&from, &to), from, to }
    }

    fn message(&self, seq: u64) -> Record {
        StoredMessage {
            conversation: self.id,
            seq: Seq(seq),
            from: self.from.clone(),
            to: self.to.clone(),
            device: DeviceId(1),
            client_seq: seq,
            time_ms: seq,
            kind: BodyKind::Text,
            body: vec![b'x'; BODY_BYTES].into(),
            extra: None,
        }
        .into()
    }
}
