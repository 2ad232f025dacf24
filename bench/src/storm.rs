//! `storm`: many clients connect and log in at once, then some are dropped and come back all the time.
//!
//! Each thread owns its share of the clients and an epoll instance; the main thread, which is not pinned, tells the
//! phases by [`Shared`]. Invariants: connects and logins under way are bounded, so that the listen backlog is never
//! overrun; every failed attempt has a name in the report; a client comes back only after its back-off.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use indicatif::ProgressBar;
use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::DeviceId;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::{Credential, DeviceKind, Login, Reply, Request, Secret};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use serde::Serialize;
use socket2::SockRef;

use crate::Failure;
use crate::cli::{FleetArgs, parse_seconds};
use crate::engine::connect;
use crate::facts::Machine;
use crate::plan::mix;
use crate::report::{Latency, latency_row};
use crate::run::raise_file_limit;
use crate::server_process;
use crate::tally::{self, record};
use crate::token::Issuer;

/// Files the process needs beside one a client.
const FILES_EXTRA: u64 = 64;
const READ_BYTES: usize = 16 * 1024;
const EVENTS_MAX: usize = 256;
/// Drops made in one turn.
const DROPS_MAX: usize = 64;
/// An attempt that takes longer has failed; the server waits as long for a login.
const ATTEMPT_TIMEOUT_NS: u64 = 10_000_000_000;
/// Back-off of the protocol: full jitter from 0 to this, doubled at each failure.
const BACKOFF_NS_MIN: u64 = 200_000_000;
const BACKOFF_NS_MAX: u64 = 30_000_000_000;
/// How often a thread wakes at least.
const TICK_NS: i64 = 5_000_000;
/// All clients are looked at for a ping in this time, in parts.
const SWEEP_NS: u64 = 1_000_000_000;
const SWEEP_SLICES: u64 = 16;
/// The first phase has failed if nobody logs in for this long.
const STALL: Duration = Duration::from_secs(45);
/// At the end: for those who are on their way back.
const SETTLE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);
const NS_PER_S: u64 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;
const LOGIN_ID: u32 = 1;
const PING_ID: u32 = 2;

#[derive(Clone, Debug, Args)]
pub struct StormArgs {
    #[command(flatten)]
    pub fleet: FleetArgs,
    /// Connects and logins under way at once, in all
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub in_flight: u32,
    /// Once all are logged in: clients dropped a second (by a reset, as a lost network does it); each reconnects
    #[arg(long, default_value_t = 0, value_name = "PER_SECOND", value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    pub churn: u64,
    /// Seconds of the churn
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = parse_seconds)]
    pub duration: f64,
    /// Write the result as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<std::path::PathBuf>,
}

/// What a storm has shown. The fields' names are the keys of the JSON object; `null`: unknown.
#[derive(Clone, Debug, Serialize)]
pub struct StormReport {
    pub version: &'static str,
    pub commit: &'static str,
    #[serde(flatten)]
    pub machine: Machine,
    pub clients: u32,
    pub in_flight: u32,
    /// Until every client was logged in once.
    pub connect_s: f64,
    pub logins_per_s: f64,
    /// From the connect to LOGIN_OK.
    pub login_us: Latency,
    pub churn_asked_per_s: u64,
    pub churn_s: f64,
    /// Dropped by this generator.
    pub dropped: u64,
    /// Logged in again during the churn.
    pub returned: u64,
    /// From the new connect to LOGIN_OK, during the churn.
    pub return_us: Latency,
    /// Refusals by code and failures by kind; every attempt counts.
    pub errors: BTreeMap<&'static str, u64>,
    pub logged_in_at_end: u64,
    pub server_cpu_connect_s: Option<f64>,
    pub server_cpu_churn_s: Option<f64>,
    pub server_rss_bytes: Option<u64>,
}

impl StormReport {
    /// Whether everybody is there at the end.
    pub fn clean(&self) -> bool {
        self.logged_in_at_end == u64::from(self.clients)
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = format!("storm of {} clients, {} under way at once\n", self.clients, self.in_flight);
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<24} {value}");
        };
        row("logged in", format!("{:.2} s ({:.0}/s)", self.connect_s, self.logins_per_s));
        row("login, ms", latency_row(self.login_us));
        if self.churn_asked_per_s > 0 {
            let per_s = |count: u64| count as f64 / self.churn_s.max(f64::MIN_POSITIVE);
            let (asked, is) = (self.churn_asked_per_s, per_s(self.dropped));
            row("dropped", format!("{} ({is:.0}/s, {asked}/s asked)", self.dropped));
            row("came back", format!("{} ({:.0}/s)", self.returned, per_s(self.returned)));
            row("login on return, ms", latency_row(self.return_us));
        }
        row("logged in at the end", self.logged_in_at_end.to_string());
        let cpu = |cpu_s: Option<f64>| cpu_s.map_or_else(|| "unknown".to_owned(), |cpu_s| format!("{cpu_s:.2} s"));
        let (connect, churn) = (cpu(self.server_cpu_connect_s), cpu(self.server_cpu_churn_s));
        row("server CPU", format!("{connect} for the logins, {churn} in the churn"));
        for (name, count) in &self.errors {
            row(name, count.to_string());
        }
        text
    }
}

/// What the threads and the main thread tell each other. Times are nanoseconds since `epoch`.
struct Shared {
    epoch: Instant,
    /// Drops happen between these.
    churn_from_ns: AtomicU64,
    churn_to_ns: AtomicU64,
    stop: AtomicBool,
    /// Clients that are logged in now, and logins ever.
    open: AtomicU64,
    logins: AtomicU64,
    /// What makes the storm impossible.
    fatal: std::sync::OnceLock<String>,
}

impl Shared {
    fn new() -> Self {
        Self {
            epoch: Instant::now(),
            churn_from_ns: AtomicU64::new(u64::MAX),
            churn_to_ns: AtomicU64::new(u64::MAX),
            stop: AtomicBool::new(false),
            open: AtomicU64::new(0),
            logins: AtomicU64::new(0),
            fatal: std::sync::OnceLock::new(),
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn churns(&self, now_ns: u64) -> bool {
        (self.churn_from_ns.load(Ordering::Acquire)..self.churn_to_ns.load(Ordering::Acquire)).contains(&now_ns)
    }
}

/// What one thread counts.
#[derive(Clone, Debug)]
struct Counts {
    login_us: Histogram<u64>,
    return_us: Histogram<u64>,
    dropped: u64,
    returned: u64,
    errors: BTreeMap<&'static str, u64>,
}

impl Counts {
    fn new() -> Self {
        let (login_us, return_us) = (tally::histogram(), tally::histogram());
        Self { login_us, return_us, dropped: 0, returned: 0, errors: BTreeMap::new() }
    }

    fn merge(&mut self, other: &Self) {
        tally::add(&mut self.login_us, &other.login_us);
        tally::add(&mut self.return_us, &other.return_us);
        self.dropped += other.dropped;
        self.returned += other.returned;
        for (name, count) in &other.errors {
            *self.errors.entry(name).or_default() += count;
        }
    }
}

enum Stage {
    /// Until its time in `due` comes.
    Away,
    Connecting(TcpStream),
    LoggingIn(TcpStream),
    Open(TcpStream),
}

struct Client {
    index: u32,
    stage: Stage,
    decoder: FrameDecoder,
    began_ns: u64,
    spoke_ns: u64,
    ping_after_ns: u64,
    /// Failures since the last login.
    failures: u32,
}

/// The clients of one thread.
struct Storm {
    shared: Arc<Shared>,
    target: SocketAddr,
    names: Arc<Vec<String>>,
    tokens: Arc<Vec<String>>,
    in_flight_max: usize,
    /// Between two drops; `None`: no churn.
    drop_period_ns: Option<u64>,
    epoll: OwnedFd,
    clients: Vec<Client>,
    /// Who connects when.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    /// Attempts in the order of their begin.
    attempts: VecDeque<(u64, usize)>,
    in_flight: usize,
    drops: u64,
    drop_slot: usize,
    sweep: (u64, usize),
    jitter: u64,
    encoder: Encoder,
    out: Vec<u8>,
    buffer: Vec<u8>,
    counts: Counts,
}

/// The longest back-off after so many failures in a row, in ns.
fn backoff_ns_max(failures: u32) -> u64 {
    BACKOFF_NS_MIN.saturating_mul(1 << failures.min(16)).min(BACKOFF_NS_MAX)
}

impl Storm {
    fn run(mut self) -> Counts {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        while !self.shared.stop.load(Ordering::Acquire) {
            self.begin_attempts();
            events.clear();
            let tick = Timespec { tv_sec: 0, tv_nsec: TICK_NS };
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&tick)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.fatal(format!("epoll: {error}")),
            }
            for event in &events {
                // The event is packed: copy before use.
                let data = event.data;
                self.on_event(data.u64() as usize);
            }
            self.time_out();
            self.churn();
            self.ping();
        }
        self.counts
    }

    fn fatal(&self, why: String) {
        let _ = self.shared.fatal.set(why);
        self.shared.stop.store(true, Ordering::Release);
    }

    fn begin_attempts(&mut self) {
        while self.in_flight < self.in_flight_max {
            let now_ns = self.shared.now_ns();
            let Some(&Reverse((due_ns, slot))) = self.due.peek() else { return };
            if due_ns > now_ns {
                return;
            }
            self.due.pop();
            let Some(client) = self.clients.get_mut(slot) else { continue };
            client.began_ns = now_ns;
            client.decoder = FrameDecoder::new();
            self.in_flight += 1;
            self.attempts.push_back((now_ns, slot));
            let begun = connect(self.target, client.index, None).and_then(|stream| {
                epoll::add(&self.epoll, &stream, EventData::new_u64(slot as u64), EventFlags::OUT)?;
                Ok(stream)
            });
            match begun {
                Ok(stream) => client.stage = Stage::Connecting(stream),
                Err(error) => self.failed(slot, connect_error(&error)),
            }
        }
    }

    fn on_event(&mut self, slot: usize) {
        let Some(client) = self.clients.get_mut(slot) else { return };
        match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::Away => {}
            Stage::Connecting(stream) => self.connected(slot, stream),
            stage @ (Stage::LoggingIn(_) | Stage::Open(_)) => {
                client.stage = stage;
                self.read(slot);
            }
        }
    }

    fn connected(&mut self, slot: usize, stream: TcpStream) {
        let ready = match stream.take_error() {
            Ok(None) => epoll::modify(&self.epoll, &stream, EventData::new_u64(slot as u64), EventFlags::IN)
                .map_err(io::Error::from),
            Ok(Some(error)) | Err(error) => Err(error),
        };
        if let Err(error) = ready {
            return self.failed(slot, connect_error(&error));
        }
        let Some(client) = self.clients.get_mut(slot) else { return };
        client.stage = Stage::LoggingIn(stream);
        let at = client.index as usize;
        let (names, tokens) = (Arc::clone(&self.names), Arc::clone(&self.tokens));
        let login = Login {
            user: names.get(at).map_or("", String::as_str),
            credential: Credential::Token(Secret(tokens.get(at).map_or("", String::as_str))),
            device: DeviceId(u64::from(client.index) + 1),
            device_kind: DeviceKind::Bot,
            agent: concat!("ringline-bench/", env!("CARGO_PKG_VERSION")),
        };
        self.say(slot, LOGIN_ID, &Request::Login(login));
    }

    /// A frame is far smaller than an empty socket buffer: one that does not go out whole is a failure.
    fn say(&mut self, slot: usize, id: u32, request: &Request<'_>) {
        self.out.clear();
        self.encoder.request(Codec::FlatBuffers, id, request, &mut self.out);
        let now_ns = self.shared.now_ns();
        let Some(client) = self.clients.get_mut(slot) else { return };
        client.spoke_ns = now_ns;
        let (Stage::LoggingIn(stream) | Stage::Open(stream)) = &mut client.stage else { return };
        match stream.write(&self.out) {
            Ok(bytes) if bytes == self.out.len() => {}
            Ok(_) => self.failed(slot, "NOT_TAKEN"),
            Err(error) => self.failed(slot, io_error(&error)),
        }
    }

    fn read(&mut self, slot: usize) {
        let Some(client) = self.clients.get_mut(slot) else { return };
        let (Stage::LoggingIn(stream) | Stage::Open(stream)) = &mut client.stage else { return };
        let bytes = match stream.read(&mut self.buffer) {
            Ok(0) => return self.failed(slot, "CLOSED_BY_SERVER"),
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(error) => return self.failed(slot, io_error(&error)),
        };
        let mut input = self.buffer.get(..bytes).unwrap_or_default();
        let (mut ping_interval_ms, mut refused, mut told) = (None, None, Vec::new());
        let unreadable = loop {
            match client.decoder.next(&mut input, FRAME_BYTES_CEILING) {
                Ok(Some(frame)) => match decode_reply(&frame.header, frame.body) {
                    Ok(Reply::LoginOk(ok)) => ping_interval_ms = Some(ok.ping_interval_ms),
                    Ok(Reply::Failure { code, retry_after_ms, .. }) => refused = Some((code, retry_after_ms)),
                    Ok(Reply::Kicked { .. }) => told.push("KICKED"),
                    Ok(Reply::Goaway { .. }) => told.push("GOAWAY"),
                    // Pongs, and what other runs left for these users.
                    Ok(_) | Err(ErrorCode::UnknownCommand) => {}
                    Err(_) => break true,
                },
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        for name in told {
            *self.counts.errors.entry(name).or_default() += 1;
        }
        if let Some(ping_interval_ms) = ping_interval_ms {
            self.logged_in(slot, ping_interval_ms);
        }
        if unreadable {
            self.failed(slot, "UNREADABLE");
        } else if let Some((code, retry_after_ms)) = refused {
            self.refused(slot, code, retry_after_ms);
        }
    }

    fn logged_in(&mut self, slot: usize, ping_interval_ms: u32) {
        let now_ns = self.shared.now_ns();
        let Some(client) = self.clients.get_mut(slot) else { return };
        let stream = match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::LoggingIn(stream) => stream,
            stage @ (Stage::Away | Stage::Connecting(_) | Stage::Open(_)) => return client.stage = stage,
        };
        client.stage = Stage::Open(stream);
        client.failures = 0;
        client.ping_after_ns = u64::from(ping_interval_ms) * NS_PER_MS / 4 * 3;
        self.in_flight = self.in_flight.saturating_sub(1);
        if now_ns < self.shared.churn_from_ns.load(Ordering::Acquire) {
            record(&mut self.counts.login_us, client.began_ns, now_ns);
        } else {
            record(&mut self.counts.return_us, client.began_ns, now_ns);
            self.counts.returned += 1;
        }
        self.shared.open.fetch_add(1, Ordering::Relaxed);
        self.shared.logins.fetch_add(1, Ordering::Relaxed);
    }

    fn refused(&mut self, slot: usize, code: ErrorCode, retry_after_ms: u32) {
        if code == ErrorCode::AuthFailed {
            self.fatal(format!("login refused: {}: is --issuer-key the key of this server?", code.text()));
        }
        // What the server asks is the least: the back-off alone may be shorter.
        self.failed_for(slot, code.name(), u64::from(retry_after_ms) * NS_PER_MS);
    }

    /// The connection is of no more use: the client comes back after its back-off.
    fn failed(&mut self, slot: usize, name: &'static str) {
        self.failed_for(slot, name, 0);
    }

    fn failed_for(&mut self, slot: usize, name: &'static str, least_ns: u64) {
        *self.counts.errors.entry(name).or_default() += 1;
        self.jitter = self.jitter.wrapping_add(1);
        let Some(client) = self.clients.get_mut(slot) else { return };
        let wait_ns = mix(self.jitter ^ (u64::from(client.index) << 32)) % backoff_ns_max(client.failures);
        client.failures = client.failures.saturating_add(1);
        self.leave(slot, wait_ns.max(least_ns.min(BACKOFF_NS_MAX)));
    }

    /// Closes what is open and comes back in `wait_ns`.
    fn leave(&mut self, slot: usize, wait_ns: u64) {
        let due_ns = self.shared.now_ns().saturating_add(wait_ns);
        let Some(client) = self.clients.get_mut(slot) else { return };
        match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::Open(_) => drop(self.shared.open.fetch_sub(1, Ordering::Relaxed)),
            // An attempt that fails before it has a socket is under way too.
            Stage::Away | Stage::Connecting(_) | Stage::LoggingIn(_) => {
                self.in_flight = self.in_flight.saturating_sub(1);
            }
        }
        self.due.push(Reverse((due_ns, slot)));
    }

    fn time_out(&mut self) {
        let now_ns = self.shared.now_ns();
        while let Some(&(began_ns, slot)) = self.attempts.front() {
            let client = self.clients.get(slot);
            let under_way = client.is_some_and(|client| {
                client.began_ns == began_ns && matches!(client.stage, Stage::Connecting(_) | Stage::LoggingIn(_))
            });
            if under_way && now_ns.saturating_sub(began_ns) < ATTEMPT_TIMEOUT_NS {
                return;
            }
            self.attempts.pop_front();
            if under_way {
                self.failed(slot, "TIMED_OUT");
            }
        }
    }

    /// Drops whoever is next in turn, by a reset: a closed port would rest for a minute and use up all of them.
    fn churn(&mut self) {
        let (Some(period_ns), now_ns) = (self.drop_period_ns, self.shared.now_ns()) else { return };
        if !self.shared.churns(now_ns) || self.clients.is_empty() {
            return;
        }
        let wanted = (now_ns - self.shared.churn_from_ns.load(Ordering::Acquire)) / period_ns.max(1);
        for _ in 0..DROPS_MAX {
            if self.drops >= wanted {
                return;
            }
            // One that is not there now cannot be dropped; its turn is over all the same.
            self.drops += 1;
            let slot = self.drop_slot;
            self.drop_slot = if slot + 1 < self.clients.len() { slot + 1 } else { 0 };
            if let Some(Stage::Open(stream)) = self.clients.get(slot).map(|client| &client.stage) {
                // Without it the drop is only a more polite one.
                let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
                self.counts.dropped += 1;
                self.leave(slot, 0);
            }
        }
    }

    fn ping(&mut self) {
        let now_ns = self.shared.now_ns();
        let (due_ns, mut slot) = self.sweep;
        if now_ns < due_ns {
            return;
        }
        for _ in 0..self.clients.len().div_ceil(SWEEP_SLICES as usize) {
            let silent = |client: &Client| now_ns.saturating_sub(client.spoke_ns) >= client.ping_after_ns;
            let client = self.clients.get(slot);
            if client.is_some_and(|client| matches!(client.stage, Stage::Open(_)) && silent(client)) {
                self.say(slot, PING_ID, &Request::Ping { stamp: now_ns });
            }
            slot = if slot + 1 < self.clients.len() { slot + 1 } else { 0 };
        }
        self.sweep = (now_ns + SWEEP_NS / SWEEP_SLICES, slot);
    }
}

fn connect_error(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionRefused => "CONNECT_REFUSED",
        ErrorKind::ConnectionReset => "CONNECT_RESET",
        ErrorKind::TimedOut => "CONNECT_TIMED_OUT",
        ErrorKind::AddrNotAvailable => "NO_LOCAL_PORT",
        _ => "CONNECT_FAILED",
    }
}

fn io_error(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "RESET_BY_SERVER",
        _ => "SOCKET_ERROR",
    }
}

/// The whole storm. An error means that there is no result.
pub fn storm(args: &StormArgs) -> Result<StormReport, Failure> {
    let server = args.fleet.server();
    let machine = Machine::here(args.fleet.target, server);
    let shared = Arc::new(Shared::new());
    let before = server.and_then(server_process::sample);
    let threads = launch(args, &shared)?;
    let clients = u64::from(args.fleet.clients);
    let began = Instant::now();
    let outcome = wait_for_logins(args, &shared, clients);
    let connect_s = began.elapsed().as_secs_f64();
    let connected = server.and_then(server_process::sample);
    if outcome.is_ok() && args.churn > 0 {
        let from_ns = shared.now_ns();
        shared.churn_to_ns.store(from_ns + (args.duration * NS_PER_S as f64) as u64, Ordering::Release);
        shared.churn_from_ns.store(from_ns, Ordering::Release);
        std::thread::sleep(Duration::from_secs_f64(args.duration));
    }
    let churned = server.and_then(server_process::sample);
    let settle = Instant::now();
    while shared.open.load(Ordering::Relaxed) < clients && settle.elapsed() < SETTLE && outcome.is_ok() {
        std::thread::sleep(LOOK);
    }
    let logged_in_at_end = shared.open.load(Ordering::Relaxed);
    shared.stop.store(true, Ordering::Release);
    let mut counts = Counts::new();
    for thread in threads {
        counts.merge(&thread.join().map_err(|_| Failure::Failed("a generator thread panicked".to_owned()))?);
    }
    outcome.map_err(|why| Failure::Failed(format!("{why}; so far: {:?}", counts.errors)))?;
    let cpu = |from: Option<server_process::Sample>, to: Option<server_process::Sample>| {
        from.zip(to).map(|(from, to)| to.cpu_s - from.cpu_s)
    };
    Ok(StormReport {
        version: env!("CARGO_PKG_VERSION"),
        commit: env!("RINGLINE_COMMIT"),
        machine,
        clients: args.fleet.clients,
        in_flight: args.in_flight,
        connect_s,
        logins_per_s: clients as f64 / connect_s.max(1e-9),
        login_us: Latency::of(&counts.login_us),
        churn_asked_per_s: args.churn,
        churn_s: args.duration,
        dropped: counts.dropped,
        returned: counts.returned,
        return_us: Latency::of(&counts.return_us),
        errors: counts.errors,
        logged_in_at_end,
        server_cpu_connect_s: cpu(before, connected),
        server_cpu_churn_s: cpu(connected, churned),
        server_rss_bytes: churned.map(|sample| sample.rss_bytes),
    })
}

fn launch(args: &StormArgs, shared: &Arc<Shared>) -> Result<Vec<std::thread::JoinHandle<Counts>>, Failure> {
    let names = Arc::new(args.fleet.names()?);
    let tokens = Arc::new(Issuer::load(&args.fleet.issuer_key)?.tokens(&names)?);
    let cores = args.fleet.thread_cores()?;
    raise_file_limit(u64::from(args.fleet.clients) + FILES_EXTRA)?;
    let threads = cores.len().clamp(1, names.len().max(1));
    let mut handles = Vec::new();
    for (thread, core) in cores.into_iter().take(threads).enumerate() {
        let index = (thread as u32..args.fleet.clients).step_by(threads);
        let clients: Vec<Client> = index.map(new_client).collect();
        let storm = Storm {
            shared: Arc::clone(shared),
            target: args.fleet.target,
            names: Arc::clone(&names),
            tokens: Arc::clone(&tokens),
            in_flight_max: (args.in_flight as usize / threads).max(1),
            drop_period_ns: (args.churn > 0).then(|| NS_PER_S * threads as u64 / args.churn.max(1)),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)
                .map_err(|error| Failure::Failed(format!("epoll: {error}")))?,
            due: (0..clients.len()).map(|slot| Reverse((0, slot))).collect(),
            clients,
            attempts: VecDeque::new(),
            in_flight: 0,
            drops: 0,
            drop_slot: 0,
            sweep: (0, 0),
            jitter: thread as u64,
            encoder: Encoder::new(),
            out: Vec::new(),
            buffer: vec![0; READ_BYTES],
            counts: Counts::new(),
        };
        let body = move || {
            core_affinity::set_for_current(core_affinity::CoreId { id: core });
            storm.run()
        };
        let spawned = std::thread::Builder::new().name(format!("storm-core-{core}")).spawn(body);
        handles.push(spawned.map_err(|error| Failure::Failed(format!("thread: {error}")))?);
    }
    Ok(handles)
}

fn new_client(index: u32) -> Client {
    Client {
        index,
        stage: Stage::Away,
        decoder: FrameDecoder::new(),
        began_ns: 0,
        spoke_ns: 0,
        ping_after_ns: u64::MAX,
        failures: 0,
    }
}

/// Until every client has logged in.
fn wait_for_logins(args: &StormArgs, shared: &Shared, clients: u64) -> Result<(), String> {
    let bar = if args.fleet.no_progress { ProgressBar::hidden() } else { ProgressBar::new(clients) };
    let (mut last, mut moved) = (0, Instant::now());
    let result = loop {
        if let Some(why) = shared.fatal.get() {
            break Err(why.clone());
        }
        let open = shared.open.load(Ordering::Relaxed);
        bar.set_position(open);
        if open >= clients {
            break Ok(());
        }
        let logins = shared.logins.load(Ordering::Relaxed);
        if logins != last {
            (last, moved) = (logins, Instant::now());
        } else if moved.elapsed() > STALL {
            break Err(format!("{open} of {clients} clients logged in, then none for {} s", STALL.as_secs()));
        }
        std::thread::sleep(LOOK);
    };
    bar.finish_and_clear();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_off_doubles_to_its_bound() {
        assert_eq!(backoff_ns_max(0), BACKOFF_NS_MIN);
        assert_eq!(backoff_ns_max(3), 8 * BACKOFF_NS_MIN);
        assert_eq!([8, 16, u32::MAX].map(backoff_ns_max), [BACKOFF_NS_MAX; 3]);
    }

    #[test]
    fn every_error_has_a_name_of_its_own() {
        let kinds = [
            ErrorKind::ConnectionRefused,
            ErrorKind::ConnectionReset,
            ErrorKind::TimedOut,
            ErrorKind::AddrNotAvailable,
        ];
        let names: std::collections::HashSet<_> = kinds.map(|kind| connect_error(&kind.into())).into();
        assert_eq!(names.len(), kinds.len());
        assert_eq!(io_error(&ErrorKind::BrokenPipe.into()), io_error(&ErrorKind::ConnectionReset.into()));
    }

    #[test]
    fn threads_add_up() {
        let mut one = Counts::new();
        let mut other = Counts { dropped: 2, returned: 1, ..Counts::new() };
        other.errors.insert("BUSY", 3);
        record(&mut other.login_us, 0, 5_000);
        one.merge(&other);
        one.merge(&other);
        assert_eq!((one.dropped, one.returned, one.login_us.len(), one.errors["BUSY"]), (4, 2, 2, 6));
    }
}
