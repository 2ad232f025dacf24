//! How long a large store takes to start, how much a crash makes it replay, and how much memory it takes.
//!
//! `cargo run --release -p ringline-store --example fill -- --dir DIR --messages 10000000` fills a new store in DIR by the
//! same calls as a server's core and then opens it in processes of their own: after an orderly stop, after a crash, and
//! once more while conversations are asked for at random. One thread plays one core. Invariant: what is timed is
//! `EmbeddedStore::open` alone, and memory is what the kernel says of a process that has done nothing else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::message::BodyKind;
use ringline_schema::record::{Query, Record, StoredMessage, User};
use ringline_store::embedded::{EmbeddedOptions, EmbeddedShard, EmbeddedStore, OpenReport};
use ringline_store::{LoadToken, Store, StoreError, StoreEvent};

/// Messages of one conversation that come one after the other.
const BURST: u64 = 5;
const BODY_BYTES: usize = 64;
/// What is written before the crash, and how often heads are asked for.
const CRASH_MESSAGES: u64 = 1_000_000;
const QUESTIONS: u64 = 100_000;
const FULL_PAUSE: Duration = Duration::from_micros(200);

#[derive(Debug, Parser)]
struct Arguments {
    /// A new folder, on the disk that is meant.
    #[arg(long)]
    dir: PathBuf,
    #[arg(long, default_value_t = 10_000_000)]
    messages: u64,
    #[arg(long, default_value_t = 1_000_000)]
    conversations: u64,
    #[arg(long, default_value_t = 100_000)]
    users: u64,
    /// Which part to do; all of them otherwise.
    #[arg(long)]
    part: Option<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Fill,
    /// Open, and stop in order.
    Open,
    /// Open, ask for many heads, stop in order.
    Ask,
    /// Write more, and end without a word.
    Crash,
}

fn main() {
    let arguments = Arguments::parse();
    match arguments.part {
        Some(Part::Fill) => fill(&arguments),
        Some(Part::Open) => end(open(&arguments.dir, "start").0),
        Some(Part::Ask) => ask(&arguments),
        Some(Part::Crash) => crash(&arguments),
        None => {
            println!(
                "{} messages of {BODY_BYTES} bytes, {} conversations, {} users",
                arguments.messages, arguments.conversations, arguments.users
            );
            for part in ["fill", "open", "open", "ask", "crash", "open", "open"] {
                run(&arguments, part);
            }
        }
    }
}

/// The part in a process of its own.
fn run(arguments: &Arguments, part: &str) {
    let mut command = Command::new(std::env::current_exe().expect("a program"));
    command.args(["--part", part, "--dir"]).arg(&arguments.dir);
    for (key, value) in
        [("--messages", arguments.messages), ("--conversations", arguments.conversations), ("--users", arguments.users)]
    {
        command.args([key, &value.to_string()]);
    }
    let status = command.status().expect("it runs");
    assert!(status.success() || part == "crash", "{part}: {status}");
}

fn open(dir: &Path, what: &str) -> (EmbeddedShard, OpenReport) {
    let started = Instant::now();
    let (mut handles, report) = EmbeddedStore::open(dir, 1, EmbeddedOptions::default()).expect("it opens");
    println!(
        "{what}: {:.3} s, {:.2} s of them on a CPU, {} stop, {} records replayed, {}",
        started.elapsed().as_secs_f64(),
        cpu_s(),
        if report.clean_stop { "clean" } else { "unclean" },
        report.replayed_records,
        memory()
    );
    (handles.remove(0), report)
}

fn end(mut store: EmbeddedShard) {
    let started = Instant::now();
    store.close().expect("it closes");
    drop(store);
    println!("stop: {:.3} s", started.elapsed().as_secs_f64());
}

/// What this process has computed so far: on a machine that is busy the better figure.
fn cpu_s() -> f64 {
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name: the eleventh and twelfth field are user and system time.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

/// Resident memory now and at most, as the kernel says.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024
    };
    format!("memory {} MiB, at most {} MiB", mib("VmRSS:"), mib("VmHWM:"))
}

fn user(number: u64) -> UserName {
    UserName::new(&format!("user {number}")).expect("a name")
}

/// Conversation `number` is that of a user with one of the ten or so next ones.
fn pair(arguments: &Arguments, number: u64) -> [UserName; 2] {
    let one = number % arguments.users;
    let other = (one + 1 + number / arguments.users) % arguments.users;
    let mut pair = [user(one), user(other)];
    pair.sort();
    pair
}

fn append(store: &mut EmbeddedShard, record: &Record) {
    let mut events = Vec::new();
    while let Err(error) = store.append(record) {
        assert!(matches!(error, StoreError::Full), "{error}");
        store.submit();
        store.poll(&mut events);
        std::thread::sleep(FULL_PAUSE);
    }
}

/// Writes messages `range` of the whole: conversation by conversation in bursts, again and again.
fn write(store: &mut EmbeddedShard, arguments: &Arguments, range: std::ops::Range<u64>, bar: &ProgressBar) {
    const SUBMIT_MESSAGES: u64 = 256;
    let body: bytes::Bytes = vec![b'x'; BODY_BYTES].into();
    let mut events = Vec::new();
    for message in range {
        let (burst, in_burst) = (message / BURST, message % BURST);
        let (round, number) = (burst / arguments.conversations, burst % arguments.conversations);
        let [from, to] = pair(arguments, number);
        let seq = round * BURST + in_burst + 1;
        let stored = StoredMessage {
            conversation: ConversationId::direct(&from, &to),
            seq: Seq(seq),
            from,
            to,
            device: DeviceId(1),
            client_seq: seq,
            time_ms: 1_700_000_000_000 + message,
            kind: BodyKind::Text,
            body: body.clone(),
            extra: None,
        };
        append(store, &Record::Message(stored.into()));
        if message % SUBMIT_MESSAGES == 0 {
            store.submit();
            events.clear();
            store.poll(&mut events);
            assert!(!events.contains(&StoreEvent::Failed), "the store failed");
            bar.set_position(message);
        }
    }
}

fn bar(messages: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("filling: {wide_bar} {human_pos}/{human_len}, {eta} left");
    ProgressBar::new(messages).with_style(style.unwrap_or(ProgressStyle::default_bar()))
}

fn fill(arguments: &Arguments) {
    let (mut store, _) = open(&arguments.dir, "empty");
    let started = Instant::now();
    for number in 0..arguments.users {
        let password_hash = Some("$argon2id$v=19$m=19456,t=2,p=1$".to_owned() + &"x".repeat(64));
        append(&mut store, &Record::User(User { name: user(number), password_hash, created_ms: number }));
    }
    for number in 0..arguments.conversations {
        let members = pair(arguments, number);
        let conversation = ConversationId::direct(&members[0], &members[1]);
        append(&mut store, &Record::Conversation { conversation, members, created_ms: number });
    }
    let bar = bar(arguments.messages);
    write(&mut store, arguments, 0..arguments.messages, &bar);
    bar.finish_and_clear();
    let took = started.elapsed().as_secs_f64();
    println!("filled in {took:.0} s, {:.0} messages/s, {}", arguments.messages as f64 / took, memory());
    end(store);
}

fn ask(arguments: &Arguments) {
    let (mut store, _) = open(&arguments.dir, "start");
    let mut rng = SmallRng::seed_from_u64(1);
    let (started, mut answered, mut events) = (Instant::now(), 0, Vec::new());
    for token in 0..QUESTIONS {
        let [one, other] = pair(arguments, rng.random_range(0..arguments.conversations));
        let conversation = ConversationId::direct(&one, &other);
        let query = Query::Head { conversation, device: DeviceKey::new(&one, DeviceId(1)) };
        while store.load(LoadToken(token), query.clone()).is_err() {
            store.poll(&mut events);
            std::thread::sleep(FULL_PAUSE);
        }
    }
    while answered < QUESTIONS {
        store.poll(&mut events);
        answered += events.drain(..).filter(|event| matches!(event, StoreEvent::Loaded(..))).count() as u64;
        std::thread::sleep(FULL_PAUSE);
    }
    let rate = QUESTIONS as f64 / started.elapsed().as_secs_f64();
    println!("asked for {QUESTIONS} heads at random, {rate:.0}/s, {}", memory());
    end(store);
}

fn crash(arguments: &Arguments) {
    let (mut store, _) = open(&arguments.dir, "start");
    let bar = bar(arguments.messages + CRASH_MESSAGES);
    write(&mut store, arguments, arguments.messages..arguments.messages + CRASH_MESSAGES, &bar);
    bar.finish_and_clear();
    println!("crash after {CRASH_MESSAGES} more, {}", memory());
    // Whatever is queued or in memory is gone.
    std::process::abort();
}
