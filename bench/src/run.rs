//! The phases of a run: files and limits, threads, login, warm-up, window, drain, judgement.
//!
//! Owned by the main thread, which sleeps between its looks at the gauges and shares the generator's first core, so
//! that the server's cores stay the server's.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Failure;
use crate::cli::{FleetArgs, RunArgs};
use crate::engine::{Engine, Share, Shared};
use crate::facts::Machine;
use crate::metrics::{Source, Told};
use crate::peer::Desk;
use crate::plan::{Plan, Timeline};
use crate::report::{Measured, Report};
use crate::server_process::{self, Sample};
use crate::sources::Sources;
use crate::token::Issuer;

/// Files that a process needs beside one a client: the generator, or the server that it starts.
pub(crate) const FILES_EXTRA: u64 = 256;
/// A login phase in which nothing moves for this long has failed.
const LOGIN_STALL: Duration = Duration::from_secs(30);
/// How often the main thread looks.
const LOOK: Duration = Duration::from_millis(50);
/// Between "all logged in" and the start, so that all threads see the timeline in time.
const START_DELAY_NS: u64 = 100_000_000;
/// After everything was delivered: watched on for messages delivered twice.
const DUPLICATE_WATCH_NS: u64 = 200_000_000;
/// Between two points of the curves over time, and how many a run has at most.
const SAMPLE_NS: u64 = 250_000_000;
const POINTS_MAX: usize = 4_000;
const NS_PER_S: f64 = 1e9;

/// A whole run. The report says whether it was clean; an error means that there is none.
pub fn run(args: &RunArgs) -> Result<Report, Failure> {
    let machine = Machine::here(args.fleet.target(), args.fleet.server());
    let plan = Arc::new(args.placed_plan()?);
    let mut fleet = Fleet::launch(&args.fleet, &plan)?;
    let start_ns = fleet.shared.now_ns() + START_DELAY_NS;
    let measure_from_ns = start_ns + nanoseconds(args.warmup);
    let timeline = Timeline { start_ns, measure_from_ns, measure_to_ns: measure_from_ns + nanoseconds(args.duration) };
    // Only this thread sets it, once.
    let _ = fleet.shared.timeline.set(timeline);
    fleet.series = Series::new(timeline);

    let page = || args.metrics.as_deref().map(|url| Source::new(url).read());
    fleet.watch("warm-up", timeline.measure_from_ns)?;
    let (before, page_before, since) = (fleet.samples(), page(), SystemTime::now());
    fleet.watch("measuring", timeline.measure_to_ns)?;
    let (after, page_after) = (fleet.samples(), page());
    fleet.drain(Duration::from_secs_f64(args.drain))?;

    let (connect_s, points) = (fleet.connect_s, std::mem::take(&mut fleet.series.points));
    let desk = fleet.finish()?;
    let (verdict, seconds) = (desk.ledger.verdict(), args.duration);
    let told = Told::between(page_before, page_after);
    let targets = args.fleet.targets();
    let measured = Measured { verdict, tally: desk.tally, connect_s, seconds, since, points, told, targets };
    Ok(Report::new(&plan, measured, [before, after], machine))
}

/// How the run stood at one moment. Counts since the start of the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// Seconds since the start of the measured window; negative in the warm-up.
    pub at_s: f64,
    pub sent: u64,
    pub accepted: u64,
    pub delivered: u64,
    pub server_cpu_s: Option<f64>,
    pub generator_cpu_s: Option<f64>,
}

/// The points of a run: one every 250 ms, or fewer in a long run, so that there are never more than [`POINTS_MAX`].
#[derive(Clone, Debug)]
struct Series {
    measure_from_ns: u64,
    step_ns: u64,
    due_ns: u64,
    points: Vec<Point>,
}

impl Series {
    fn new(timeline: Timeline) -> Self {
        let length_ns = timeline.measure_to_ns.saturating_sub(timeline.start_ns);
        Self {
            measure_from_ns: timeline.measure_from_ns,
            step_ns: SAMPLE_NS.max(length_ns / POINTS_MAX as u64),
            due_ns: timeline.start_ns,
            points: Vec::new(),
        }
    }

    fn due(&self, now_ns: u64) -> bool {
        now_ns >= self.due_ns && self.points.len() < POINTS_MAX
    }

    fn at_s(&self, now_ns: u64) -> f64 {
        (now_ns as f64 - self.measure_from_ns as f64) / NS_PER_S
    }
}

fn nanoseconds(seconds: f64) -> u64 {
    (seconds * NS_PER_S) as u64
}

/// CPU time and memory at one moment.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// Of all targets together.
    pub server: Option<Sample>,
    /// Of each.
    pub nodes: Vec<Option<Sample>>,
    pub generator: Option<Sample>,
}

impl FleetArgs {
    /// The server's process, if it can be found.
    pub(crate) fn server(&self) -> Option<u32> {
        self.server_pid.or_else(|| server_process::listening_on(self.target().port()))
    }

    /// The processes of all targets.
    fn servers(&self) -> Vec<Option<u32>> {
        match self.targets()[..] {
            [] | [_] => vec![self.server()],
            ref several => several.iter().map(|target| server_process::listening_on(target.port())).collect(),
        }
    }
}

/// The threads of a run. They end when it is dropped.
pub(crate) struct Fleet {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Desk>>,
    servers: Vec<Option<u32>>,
    bar: ProgressBar,
    /// From the first connect to the last login.
    connect_s: f64,
    series: Series,
}

impl Fleet {
    /// Every client logged in.
    fn launch(args: &FleetArgs, plan: &Arc<Plan>) -> Result<Self, Failure> {
        let began = Instant::now();
        let mut fleet = Self::start(args, plan, plan.clients())?;
        fleet.wait_for_logins(u64::from(plan.clients()))?;
        fleet.connect_s = began.elapsed().as_secs_f64();
        Ok(fleet)
    }

    /// Threads that connect the first clients of the plan: so many, or more when [`Self::admit`] says so.
    pub(crate) fn start(args: &FleetArgs, plan: &Arc<Plan>, admitted: u32) -> Result<Self, Failure> {
        let cores = args.thread_cores()?;
        // Threads without a client would only get in the way.
        let threads = cores.len().clamp(1, plan.names.len().max(1));
        let tokens = Arc::new(Issuer::load(&args.issuer_key())?.tokens(&plan.names)?);
        raise_file_limit(u64::from(plan.clients()) + FILES_EXTRA)?;
        let bar = if args.no_progress { ProgressBar::hidden() } else { ProgressBar::new(u64::from(plan.clients())) };
        let servers = args.servers();
        if let Some(&first) = cores.first() {
            core_affinity::set_for_current(core_affinity::CoreId { id: first });
        }
        let shared = Arc::new(Shared::new(threads));
        shared.admit(admitted);
        let mut fleet =
            Self { shared, threads: Vec::new(), servers, bar, connect_s: 0.0, series: Series::new(Timeline::NEVER) };
        let sources = Sources::to(args.target());
        let further: Vec<_> = args.targets().into_iter().skip(1).map(Sources::to).collect();
        for (thread, core) in cores.into_iter().take(threads).enumerate() {
            let (plan, tokens, shared) = (Arc::clone(plan), Arc::clone(&tokens), Arc::clone(&fleet.shared));
            let share = Share { thread, threads, plan, tokens, sources, further: further.clone(), shared };
            fleet.threads.push(spawn(share, core)?);
        }
        Ok(fleet)
    }

    /// Lets clients up to this number connect.
    pub(crate) fn admit(&self, clients: u32) {
        self.shared.admit(clients);
    }

    /// Waits for so many seconds while the clients do what they do.
    pub(crate) fn hold(&mut self, seconds: f64) -> Result<(), Failure> {
        self.watch("holding", self.shared.now_ns() + nanoseconds(seconds))
    }

    fn failed(&self) -> Result<(), Failure> {
        match self.shared.fatal.get() {
            Some(why) => Err(Failure::Failed(why.clone())),
            None => Ok(()),
        }
    }

    pub(crate) fn wait_for_logins(&self, clients: u64) -> Result<(), Failure> {
        self.style("{msg:<10} {wide_bar} {pos}/{len}", "connecting");
        let (mut last, mut moved) = (0, Instant::now());
        loop {
            self.failed()?;
            let logged_in = self.shared.sum(|gauge| &gauge.logged_in);
            self.bar.set_position(logged_in);
            if logged_in >= clients {
                return Ok(());
            }
            if logged_in != last {
                (last, moved) = (logged_in, Instant::now());
            } else if moved.elapsed() > LOGIN_STALL {
                let s = LOGIN_STALL.as_secs();
                return Err(Failure::Failed(format!(
                    "{logged_in} of {clients} clients logged in, then none for {s} s"
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a moment of the run, showing what goes on.
    fn watch(&mut self, phase: &'static str, until_ns: u64) -> Result<(), Failure> {
        let (begin_ns, begin_sent) = (self.shared.now_ns(), self.shared.sum(|gauge| &gauge.sent));
        self.bar.set_length(until_ns.saturating_sub(begin_ns));
        self.style("{prefix:<10} {wide_bar} {msg}", "");
        self.bar.set_prefix(phase);
        loop {
            self.failed()?;
            let now_ns = self.shared.now_ns();
            self.note(now_ns);
            if now_ns >= until_ns {
                return Ok(());
            }
            let elapsed_ns = now_ns - begin_ns;
            let sent = self.shared.sum(|gauge| &gauge.sent) - begin_sent;
            let gone = self.shared.sum(|gauge| &gauge.disconnected);
            self.bar.set_position(elapsed_ns);
            let rate = sent as f64 * NS_PER_S / (elapsed_ns.max(1) as f64);
            self.bar.set_message(format!("{rate:.0} msg/s, {gone} disconnected"));
            std::thread::sleep(LOOK.min(Duration::from_nanos(until_ns - now_ns)));
        }
    }

    /// Keeps a point of the series if one is due.
    fn note(&mut self, now_ns: u64) {
        if !self.series.due(now_ns) {
            return;
        }
        let samples = self.samples();
        let point = Point {
            at_s: self.series.at_s(now_ns),
            sent: self.shared.sum(|gauge| &gauge.sent),
            accepted: self.shared.sum(|gauge| &gauge.accepted),
            delivered: self.shared.sum(|gauge| &gauge.delivered),
            server_cpu_s: samples.server.map(|sample| sample.cpu_s),
            generator_cpu_s: samples.generator.map(|sample| sample.cpu_s),
        };
        self.series.points.push(point);
        self.series.due_ns = self.series.due_ns.saturating_add(self.series.step_ns).max(now_ns);
    }

    /// Waits until everything is answered and delivered, and a little longer for doubles; or until `longest`.
    fn drain(&self, longest: Duration) -> Result<(), Failure> {
        let began = Instant::now();
        let mut quiet_since_ns = None;
        self.bar.set_prefix("drain");
        while began.elapsed() < longest {
            self.failed()?;
            let written_ns = self.shared.written_ns();
            let unanswered = self.shared.sum(|gauge| &gauge.unanswered);
            let accepted = self.shared.sum(|gauge| &gauge.accepted);
            let missing = accepted.saturating_sub(self.shared.sum(|gauge| &gauge.delivered));
            self.bar.set_message(format!("{unanswered} unanswered, {missing} undelivered"));
            if unanswered > 0 || missing > 0 {
                quiet_since_ns = None;
            } else if written_ns > *quiet_since_ns.get_or_insert(self.shared.now_ns()) + DUPLICATE_WATCH_NS {
                // By figures of every thread that are as new as this: a busy thread is not taken for a quiet one.
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn style(&self, template: &str, message: &'static str) {
        // A template that does not parse only costs the looks.
        self.bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.bar.set_message(message);
    }

    fn samples(&self) -> Samples {
        let generator = server_process::sample(std::process::id());
        let nodes: Vec<_> = self.servers.iter().map(|server| server.and_then(server_process::sample)).collect();
        let server = nodes.iter().copied().reduce(|sum, node| Some(sum?.plus(node?))).flatten();
        Samples { server, nodes, generator }
    }

    /// Stops the threads and adds up what they counted.
    pub(crate) fn finish(mut self) -> Result<Desk, Failure> {
        self.shared.stop();
        let mut sum: Option<Desk> = None;
        for thread in self.threads.drain(..) {
            let desk = thread.join().map_err(|_| Failure::Failed("a generator thread panicked".to_owned()))?;
            match &mut sum {
                None => sum = Some(desk),
                Some(sum) => {
                    sum.tally.merge(&desk.tally);
                    sum.ledger.merge(&desk.ledger);
                }
            }
        }
        self.failed()?;
        sum.ok_or_else(|| Failure::Failed("no generator thread ran".to_owned()))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.shared.stop();
        self.bar.finish_and_clear();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn spawn(share: Share, core: usize) -> Result<JoinHandle<Desk>, Failure> {
    let clients = share.plan.clients();
    let body = move || {
        core_affinity::set_for_current(core_affinity::CoreId { id: core });
        let shared = Arc::clone(&share.shared);
        match Engine::new(share) {
            Ok(engine) => engine.run(),
            Err(error) => {
                shared.fail(format!("epoll: {error}"));
                Desk::new(clients)
            }
        }
    };
    let name = format!("bench-core-{core}");
    std::thread::Builder::new().name(name).spawn(body).map_err(|error| Failure::Failed(format!("thread: {error}")))
}

/// Raises the limit of open files to `wanted` at least, to the hard limit if it can.
pub(crate) fn raise_file_limit(wanted: u64) -> Result<(), Failure> {
    let limit = getrlimit(Resource::Nofile);
    // None: no limit.
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let hard = limit.maximum.unwrap_or(u64::MAX);
    if raised.is_ok() && hard >= wanted {
        return Ok(());
    }
    let got = if raised.is_ok() { hard } else { limit.current.unwrap_or(u64::MAX) };
    Err(Failure::Failed(format!(
        "too few open files: {wanted} are needed, {got} are allowed; raise the limit (ulimit -n {wanted}) or use fewer \
         clients"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_files_are_named_before_anything_starts() {
        assert_eq!(raise_file_limit(8), Ok(()));
        let Err(Failure::Failed(line)) = raise_file_limit(u64::MAX - 1) else { panic!("no machine has so many") };
        assert!(line.contains("open files") && line.contains("ulimit"), "{line}");
    }
}
