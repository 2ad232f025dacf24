//! `ringline-bench torture`: a real server under mixed traffic is killed, stopped, cut off, left without disk and started
//! again with another number of cores, and what its clients saw is held to the promises by the [`checker`](crate::checker).
//!
//! One thread, one tokio runtime. A round has a fresh data folder and so many kills; a long run is many rounds, so that
//! what is remembered stays bounded. The clients are the SDK's, through a [`proxy`] that can break connections at any
//! byte. The seed decides which faults come when; what they meet is up to the machine.

mod asks;
mod proxy;
mod server;
mod traffic;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::Failure;
use crate::checker::{Counts, History, Verdict};
use crate::token::Issuer;
use proxy::Proxy;
use server::Server;
use traffic::{Phase, Traffic};

/// How long clients may take to finish after the last fault.
const FINISH_TIME: Duration = Duration::from_secs(90);
/// Nothing new for so long: everybody has what there is.
const QUIET_TIME: Duration = Duration::from_secs(2);
/// The server writes cursors that moved within a second.
const CURSOR_TIME: Duration = Duration::from_secs(2);
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// Between two faults, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 200..1_800;
/// … and so much has to have happened to clients in between, on a machine that is slow to start a server; but no longer
/// than this.
const HAPPENINGS_BETWEEN: usize = 300;
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long a stopped server stays stopped, in milliseconds.
const FREEZE_MS: std::ops::Range<u64> = 100..1_000;
/// How long the disk stays full, in milliseconds: a server looks once a second.
const FULL_MS: std::ops::Range<u64> = 1_500..3_000;
/// After there is room again, sends may still be refused for so long.
const ROOM_SEEN: Duration = Duration::from_millis(1_500);
/// A server on a slow machine has to have noticed by then that the disk is full, and that it is not any more.
const DISK_SEEN_TIME: Duration = Duration::from_secs(30);
/// The number of that fault.
const FILL: u32 = 8;
const KILLS_MAX: i64 = 10_000;

#[derive(Clone, Debug, Args)]
pub struct TortureArgs {
    /// Kills (SIGKILL) of a round; other faults come in between
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=KILLS_MAX))]
    pub kills: u32,
    /// Begin rounds for so many hours [default: one round]
    #[arg(long, value_name = "HOURS")]
    pub hours: Option<f64>,
    /// Our server's binary [default: ringline beside this one]
    #[arg(long, value_name = "FILE")]
    pub ringline: Option<PathBuf>,
    /// Folder in which each round has its data folder [default: the system's for temporary files]
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Most cores that a server is started with
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cores: u16,
    /// Decides which faults come when [default: a random one, printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Draw no progress bar
    #[arg(long)]
    pub no_progress: bool,
}

/// What all parts of a round write to.
pub(crate) type Record = Arc<Mutex<History>>;

pub(crate) fn with_history<R>(record: &Record, act: impl FnOnce(&mut History) -> R) -> R {
    act(&mut record.lock().unwrap_or_else(PoisonError::into_inner))
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::Failed(format!("torture: {what}: {error}"))
}

/// True if every promise held.
pub fn torture(args: &TortureArgs) -> Result<bool, Failure> {
    let program = match &args.ringline {
        Some(path) => path.clone(),
        None => std::env::current_exe().map_err(|error| failed("own path", &error))?.with_file_name("ringline"),
    };
    if !program.exists() {
        let text = format!("there is no server at {} (cargo build -p ringline, or --ringline FILE)", program.display());
        return Err(Failure::Usage(text));
    }
    let seed = args.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    println!("torture: seed {seed}, {} kills a round", args.kills);
    let began = Instant::now();
    let (mut totals, mut rounds) = (Counts::default(), 0u64);
    loop {
        let rng = SmallRng::seed_from_u64(seed.wrapping_add(rounds));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| failed("cannot start", &error))?;
        let mut folder = tempfile::Builder::new();
        folder.prefix("ringline-torture-");
        let parent = args.data_dir.clone().unwrap_or_else(std::env::temp_dir);
        let mut folder = folder.tempdir_in(parent).map_err(|error| failed("cannot make a data folder", &error))?;
        let server = Server::new(program.clone(), folder.path().to_owned())?;
        let verdict = runtime.block_on(round(args, rng, server))?;
        rounds += 1;
        totals += verdict.counts;
        print_round(rounds, &verdict);
        if !verdict.is_clean() {
            folder.disable_cleanup(true);
            println!("the data stays in {}", folder.path().display());
            return Ok(false);
        }
        let more = args.hours.is_some_and(|hours| began.elapsed().as_secs_f64() < hours * 3_600.0);
        if !more {
            println!(
                "torture: {rounds} rounds in {:.0} s, every promise held: {totals:?}",
                began.elapsed().as_secs_f64()
            );
            return Ok(true);
        }
    }
}

fn print_round(number: u64, verdict: &Verdict) {
    let counts = verdict.counts;
    println!(
        "round {number}: {} sends, {} accepted, {} unknown, {} kept, {} handed to applications, {} processes: {}",
        counts.sends,
        counts.accepted,
        counts.unknown,
        counts.kept,
        counts.seen,
        counts.processes,
        if verdict.is_clean() { "clean".to_owned() } else { format!("{} BROKEN", verdict.violations_in_all) }
    );
    verdict.violations.iter().for_each(|violation| println!("  {violation}"));
}

async fn round(args: &TortureArgs, mut rng: SmallRng, mut server: Server) -> Result<Verdict, Failure> {
    server.start(rng.random_range(1..=args.cores)).await?;
    let issuer = Issuer::load(&server.issuer_key())?;
    let proxy = Proxy::start(server.target()).await.map_err(|error| failed("no proxy", &error))?;
    let record = Record::default();
    let (phase, phases) = watch::channel(Phase::Load);
    let traffic = Traffic::start(&issuer, (proxy.address(), record.clone()), &phases)?;
    let bar = if args.no_progress { ProgressBar::hidden() } else { ProgressBar::new(args.kills.into()) };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} kills, {elapsed}  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let (mut kills, mut fills) = (0, 0);
    while kills < args.kills {
        pause(&record, rng.random_range(PAUSE_MS)).await;
        // Once in a round at least.
        let fault = if fills == 0 && 2 * kills >= args.kills { FILL } else { rng.random_range(0..10) };
        match fault {
            0..6 => {
                kills += 1;
                server.kill();
                server.start(rng.random_range(1..=args.cores)).await?;
                bar.inc(1);
            }
            6 => {
                server.stop().await?;
                server.start(rng.random_range(1..=args.cores)).await?;
            }
            7 => {
                server.freeze()?;
                sleep(Duration::from_millis(rng.random_range(FREEZE_MS))).await;
                server.thaw()?;
            }
            FILL => {
                fill(&server, &traffic, rng.random_range(FULL_MS)).await?;
                fills += 1;
            }
            _ => proxy.cut(),
        }
        bar.set_message(format!("{} happenings", with_history(&record, |history| history.len())));
    }
    bar.finish_and_clear();
    settle(&phase, &record, &traffic).await?;
    traffic.read_back(&issuer, proxy.address()).await?;
    traffic.note_rest();
    // The promise about cursors: devices that begin anew are handed nothing twice.
    sleep(CURSOR_TIME).await;
    phase.send_replace(Phase::Anew);
    sleep(CURSOR_TIME).await;
    phase.send_replace(Phase::End);
    traffic.join().await;
    server.stop().await?;
    Ok(with_history(&record, |history| history.check()))
}

/// The disk is full for a while. Errors: nothing durable was refused for it, or nothing is accepted when there is room.
async fn fill(server: &Server, traffic: &Traffic, ms: u64) -> Result<(), Failure> {
    traffic.set_full(true);
    let refused = traffic.refused_full();
    if !server.fill_disk() {
        println!("torture: there is not enough room here to fill the disk: what a full one does is not looked at");
        traffic.set_full(false);
        return Ok(());
    }
    sleep(Duration::from_millis(ms)).await;
    let was_refused = becomes(|| traffic.refused_full() > refused).await;
    server.free_disk();
    let room = traffic.room_again();
    let accepts = becomes(|| traffic.accepts_since(room)).await;
    sleep(ROOM_SEEN).await;
    traffic.set_full(false);
    match (was_refused, accepts) {
        (true, true) => Ok(()),
        (false, _) => Err(Failure::Failed("torture: the disk was full and no durable send was refused".to_owned())),
        (true, false) => Err(Failure::Failed("torture: there is room again and nothing is accepted".to_owned())),
    }
}

/// Waits until it is so; false: for too long.
async fn becomes(is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + DISK_SEEN_TIME;
    while !is_so() && Instant::now() < deadline {
        sleep(BETWEEN_LOOKS).await;
    }
    is_so()
}

/// Lets clients do something before the next fault.
async fn pause(record: &Record, ms: u64) {
    let began = Instant::now();
    let enough = with_history(record, |history| history.len()) + HAPPENINGS_BETWEEN;
    sleep(Duration::from_millis(ms)).await;
    while with_history(record, |history| history.len()) < enough && began.elapsed() < PAUSE_MAX {
        sleep(BETWEEN_LOOKS).await;
    }
}

/// Faults are over: every send ends, every device gets all there is.
async fn settle(phase: &watch::Sender<Phase>, record: &Record, traffic: &Traffic) -> Result<(), Failure> {
    phase.send_replace(Phase::Finish);
    let deadline = Instant::now() + FINISH_TIME;
    let (mut happenings, mut since) = (0, Instant::now());
    while Instant::now() < deadline {
        let now = with_history(record, |history| history.len());
        if now != happenings || traffic.open_sends() > 0 || !traffic.all_online() {
            (happenings, since) = (now, Instant::now());
        }
        if since.elapsed() >= QUIET_TIME {
            return Ok(());
        }
        sleep(BETWEEN_LOOKS).await;
    }
    // Not an error of this program: the checker says what is missing.
    Ok(())
}
