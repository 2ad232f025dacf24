//! `compare`: ours and other servers under the same load, by the same generator, one after the other.
//!
//! Pure: [`drive`]'s judgement, [`table`]. Shell: [`peers`] (processes), [`drive`] (sockets), and this file, which the
//! main thread owns: rows x loads x rounds. Invariants: a server runs only while it is measured; rows take turns within
//! a round, and each round begins with another row, so that no row always follows the same neighbour.

pub mod cli;
pub mod drive;
pub mod peers;
pub mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::cli::{CompareArgs, LoadArgs, Point};
use self::drive::{Count, Drive, Share, Stage, Times};
use self::peers::{Make, Row};
use self::table::{Figures, Line, Report};
use crate::cli::Cores;
use crate::facts::Machine;
use crate::launch::Running;
use crate::metrics::{Source, Told};
use crate::run::{FILES_EXTRA, raise_file_limit};
use crate::sources::Sources;
use crate::{Failure, server_process};

/// Between "all are ready" and the start.
const START_DELAY_NS: u64 = 50_000_000;
/// After the measured window, at most, for what is on its way: a slow server has 40,000 messages to work off.
const DRAIN_NS: u64 = 15_000_000_000;
/// A login phase in which nothing moves for this long has failed.
const LOGIN_STALL: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(5);
const NS_PER_S: f64 = 1e9;

/// A row whose program is there.
struct Entrant {
    row: Row,
    program: PathBuf,
}

/// Runs everything and prints it. Whether ours kept every promise.
pub fn compare(args: &CompareArgs) -> Result<bool, Failure> {
    args.load.check()?;
    let machine = Machine::here((std::net::Ipv4Addr::LOCALHOST, 0).into(), None);
    let wanted = Row::ALL.into_iter().filter(|row| row.peer().is_none_or(|peer| args.with.contains(&peer)));
    let mut missing = Vec::new();
    let mut entrants = Vec::new();
    for row in wanted {
        match row.program(args.ringline.as_deref()) {
            Ok(program) => entrants.push(Entrant { row, program }),
            Err(why) => missing.push(format!("{}: left out: {why}", row.name())),
        }
    }
    let folder = args.data_dir.clone().unwrap_or_else(std::env::temp_dir);
    let report = contest(&args.load, &folder, (machine, entrants, missing))?;
    print!("{}", report.text());
    report.write_json(args.load.json.as_deref())?;
    let ours = |line: &Line| line.row.peer().is_none();
    let kept = report.lines().filter(|line| ours(line)).all(Line::is_clean);
    Ok(kept && report.lines().any(|line| !line.runs.is_empty()))
}

/// The echo alone, for `floor`.
pub fn echo(load: &LoadArgs) -> Result<Report, Failure> {
    load.check()?;
    let machine = Machine::here((std::net::Ipv4Addr::LOCALHOST, 0).into(), None);
    let program = Row::Floor.program(None).map_err(Failure::Failed)?;
    let entrants = vec![Entrant { row: Row::Floor, program }];
    contest(load, &std::env::temp_dir(), (machine, entrants, Vec::new()))
}

type Field = (Machine, Vec<Entrant>, Vec<String>);

fn contest(load: &LoadArgs, folder: &Path, (machine, entrants, missing): Field) -> Result<Report, Failure> {
    let clients_max = load.points.iter().map(|point| point.clients).max().unwrap_or(0);
    // Also of the servers, which inherit it. Too low a limit shows as a connection that cannot be made.
    let _ = raise_file_limit(u64::from(clients_max) + FILES_EXTRA);
    let Cores(server_cores) = &load.server_cores;
    let setting = |entrant: &Entrant| (entrant.row, peers::settings(entrant.row, server_cores));
    let settings = entrants.iter().map(setting).collect();
    let mut report = Report::new(machine, load, (settings, missing));
    for point in &load.points {
        let mut lines: Vec<Line> = entrants.iter().map(|entrant| Line::new(entrant.row)).collect();
        for round in 0..load.rounds as usize {
            for turn in 0..entrants.len() {
                let at = (turn + round) % entrants.len();
                let (Some(entrant), Some(line)) = (entrants.get(at), lines.get_mut(at)) else { continue };
                let result = run_once(entrant, load, (*point, folder));
                eprintln!("{}", table::progress(*point, entrant.row, &result));
                match result {
                    Ok(figures) => line.runs.push(figures),
                    Err(failure) => line.failures.push(failure.to_string()),
                }
            }
        }
        report.add(*point, lines);
    }
    Ok(report)
}

/// One server's life: start, logins, warm-up, measured window, drain, stop.
fn run_once(entrant: &Entrant, load: &LoadArgs, (point, folder): (Point, &Path)) -> Result<Figures, Failure> {
    let Cores(server_cores) = &load.server_cores;
    let server = peers::start(entrant.row, &entrant.program, (server_cores, folder))?;
    let make = entrant.row.wires(&server, point.clients)?;
    let fleet = Fleet::launch(entrant.row, load, (point, &server, &make));
    let explained = |failure: Failure| Failure::Failed(format!("{failure} (server: {})", server.last_words()));
    fleet.and_then(|fleet| fleet.measure(load, &server)).map_err(explained)
}

/// The generator's threads.
struct Fleet {
    stage: Arc<Stage>,
    threads: Vec<JoinHandle<std::io::Result<Count>>>,
    clients: usize,
}

impl Fleet {
    fn launch(row: Row, load: &LoadArgs, (point, server, make): (Point, &Running, &Make)) -> Result<Self, Failure> {
        let Cores(cores) = &load.cores;
        let stage = Arc::new(Stage::default());
        let (pairs, threads) = (point.clients / 2, cores.len() as u32);
        let mut handles = Vec::new();
        for (thread, core) in (0..threads).zip(cores.iter().copied()) {
            let from = |thread: u32| 2 * (u64::from(pairs) * u64::from(thread) / u64::from(threads)) as u32;
            let share = Share {
                sources: Sources::to(server.target),
                first: from(thread),
                end: from(thread + 1),
                window: point.window,
                payload_bytes: load.payload as usize,
                pairing: row.pairing(),
                stage: Arc::clone(&stage),
            };
            let make = Arc::clone(make);
            let run = move || {
                core_affinity::set_for_current(core_affinity::CoreId { id: core });
                Drive::new(share).map(|drive| drive.run(&*make))
            };
            let handle = std::thread::Builder::new().name(format!("drive-{thread}")).spawn(run);
            handles.push(handle.map_err(|error| Failure::Failed(format!("no thread for the generator: {error}")))?);
        }
        Ok(Self { stage, threads: handles, clients: point.clients as usize })
    }

    fn measure(mut self, load: &LoadArgs, server: &Running) -> Result<Figures, Failure> {
        self.await_ready()?;
        let start_ns = self.stage.now_ns() + START_DELAY_NS;
        let measure_from_ns = start_ns + (load.warmup * NS_PER_S) as u64;
        let measure_to_ns = measure_from_ns + (load.duration * NS_PER_S) as u64;
        let times = Times { start_ns, measure_from_ns, measure_to_ns, drained_ns: measure_to_ns + DRAIN_NS };
        // Only this thread sets it, once.
        let _ = self.stage.times.set(times);
        let own = std::process::id();
        let sample = || (server_process::sample(server.pid), server_process::sample(own));
        self.sleep_until(measure_from_ns);
        let page = || server.metrics.as_ref().map(Source::read);
        let (page_before, before) = (page(), sample());
        self.sleep_until(measure_to_ns);
        let (after, page_after) = (sample(), page());
        let mut count = Count::default();
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(counted)) => count.add(&counted),
                Ok(Err(error)) => return Err(Failure::Failed(format!("epoll: {error}"))),
                Err(_) => return Err(Failure::Failed("a generator thread panicked".to_owned())),
            }
        }
        if let Some(why) = self.stage.fatal.get() {
            return Err(Failure::Failed(why.clone()));
        }
        let told = Told::between(page_before, page_after);
        Ok(Figures { told, ..Figures::new(&count, load.duration, (before, after)) })
    }

    fn await_ready(&self) -> Result<(), Failure> {
        let (mut ready, mut moved) = (0, Instant::now());
        while ready < self.clients {
            if let Some(why) = self.stage.fatal.get() {
                return Err(Failure::Failed(why.clone()));
            }
            let now = count_of(&self.stage.ready);
            if now > ready {
                (ready, moved) = (now, Instant::now());
            } else if moved.elapsed() > LOGIN_STALL {
                return Err(Failure::Failed(format!("only {ready} of {} clients could log in", self.clients)));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn sleep_until(&self, due_ns: u64) {
        std::thread::sleep(Duration::from_nanos(due_ns.saturating_sub(self.stage.now_ns())));
    }
}

impl Drop for Fleet {
    /// Ends the threads of a run that went wrong before the server is stopped.
    fn drop(&mut self) {
        self.stage.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn count_of(count: &AtomicUsize) -> usize {
    count.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::mqtt::Qos;

    fn load() -> LoadArgs {
        use clap::Parser;
        #[derive(Parser)]
        struct Only {
            #[command(flatten)]
            load: LoadArgs,
        }
        let line = ["x", "--points", "8x2", "--duration", "0.2", "--warmup", "0", "--rounds", "1", "--cores", "0"];
        Only::try_parse_from(line).unwrap().load
    }

    /// A short run against the real server, where it is installed.
    fn drives(row: Row) {
        let program = match row.program(None) {
            Ok(program) => program,
            Err(why) => return println!("skipped: {why}"),
        };
        let folder = tempfile::tempdir().unwrap();
        let point = Point { clients: 8, window: 2 };
        let figures = run_once(&Entrant { row, program }, &load(), (point, folder.path())).unwrap();
        assert!(figures.delivered_per_s > 0.0, "{figures:?}");
        assert_eq!((figures.lost, figures.doubled, figures.corrupt, figures.failed), (0, 0, 0, 0), "{figures:?}");
        assert_eq!(figures.accepted > 0, row.answers(), "{figures:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "its data is removed");
    }

    #[test]
    fn a_real_redis_carries_every_message() {
        drives(Row::Redis);
    }

    #[test]
    fn a_real_mosquitto_carries_every_message() {
        drives(Row::Mosquitto(Qos::AtMostOnce));
        drives(Row::Mosquitto(Qos::AtLeastOnce));
    }

    #[test]
    fn a_real_nats_carries_every_message() {
        drives(Row::Nats);
    }

    #[test]
    fn a_real_ejabberd_carries_every_message() {
        drives(Row::Ejabberd);
    }

    #[test]
    fn a_server_that_is_not_one_is_a_failure_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let entrant = Entrant { row: Row::Redis, program: PathBuf::from("/nowhere/redis-server") };
        let point = Point { clients: 2, window: 1 };
        let Err(failure) = run_once(&entrant, &load(), (point, folder.path())) else { panic!("it ran") };
        assert!(failure.to_string().contains("did not start"), "{failure}");
    }
}
