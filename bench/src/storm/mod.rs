//! `storm`: many clients connect and log in at once, then some are dropped and come back all the time.
//!
//! Owned by the main thread, which is not pinned and tells the phases by [`Shared`]; the clients are those of
//! [`clients`], on threads of their own. Invariant: a storm ends in a report or in one line that says what each failed
//! attempt was called.

mod clients;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use indicatif::ProgressBar;
use serde::Serialize;

use self::clients::{Share, Storm};
use crate::Failure;
use crate::cli::{FleetArgs, parse_clients, parse_seconds};
use crate::facts::Machine;
use crate::report::{Latency, latency_row};
use crate::run::{FILES_EXTRA, raise_file_limit};
use crate::server_process;
use crate::sources::Sources;
use crate::tally;
use crate::token::Issuer;

/// The first phase has failed if nobody logs in for this long.
const STALL: Duration = Duration::from_secs(45);
/// At the end: for those who are on their way back.
const SETTLE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);
const NS_PER_S: u64 = 1_000_000_000;

#[derive(Clone, Debug, Args)]
pub struct StormArgs {
    #[command(flatten)]
    pub fleet: FleetArgs,
    /// Simulated clients, one connection each
    #[arg(long, value_parser = parse_clients())]
    pub clients: u32,
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
        tally::add_fields!(self, other; dropped, returned);
        tally::add_names(&mut self.errors, &other.errors);
    }
}

/// The whole storm. An error means that there is no result.
pub fn storm(args: &StormArgs) -> Result<StormReport, Failure> {
    let server = args.fleet.server();
    let machine = Machine::here(args.fleet.target(), server);
    let shared = Arc::new(Shared::new());
    let before = server.and_then(server_process::sample);
    let threads = launch(args, &shared)?;
    let clients = u64::from(args.clients);
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
        clients: args.clients,
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
    let names = Arc::new(args.fleet.names(args.clients)?);
    let tokens = Arc::new(Issuer::load(&args.fleet.issuer_key())?.tokens(&names)?);
    let cores = args.fleet.thread_cores()?;
    raise_file_limit(u64::from(args.clients) + FILES_EXTRA)?;
    let threads = cores.len().clamp(1, names.len().max(1));
    let (mut handles, sources) = (Vec::new(), Sources::to(args.fleet.target()));
    for (thread, core) in cores.into_iter().take(threads).enumerate() {
        let share = Share {
            thread,
            threads,
            shared: Arc::clone(shared),
            sources,
            names: Arc::clone(&names),
            tokens: Arc::clone(&tokens),
            in_flight_max: (args.in_flight as usize / threads).max(1),
            drop_period_ns: (args.churn > 0).then(|| NS_PER_S * threads as u64 / args.churn.max(1)),
        };
        let storm = Storm::new(share).map_err(|error| Failure::Failed(format!("epoll: {error}")))?;
        let body = move || {
            core_affinity::set_for_current(core_affinity::CoreId { id: core });
            storm.run()
        };
        let spawned = std::thread::Builder::new().name(format!("storm-core-{core}")).spawn(body);
        handles.push(spawned.map_err(|error| Failure::Failed(format!("thread: {error}")))?);
    }
    Ok(handles)
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
    fn threads_add_up() {
        let mut one = Counts::new();
        let mut other = Counts { dropped: 2, returned: 1, ..Counts::new() };
        other.errors.insert("BUSY", 3);
        tally::record(&mut other.login_us, 0, 5_000);
        one.merge(&other);
        one.merge(&other);
        assert_eq!((one.dropped, one.returned, one.login_us.len(), one.errors["BUSY"]), (4, 2, 2, 6));
    }
}
