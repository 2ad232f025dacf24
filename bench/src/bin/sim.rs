//! `sim`: plays seeds of the simulator on all cores and says which fail, with the command that plays one again.
//!
//! The main thread shows progress; each other thread plays one seed at a time. Exit codes: 0 all seeds hold, 1 one does
//! not, 2 wrong usage.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use ringline_bench::checker::Counts;
use ringline_bench::sim::cluster::{self, Setup};
use ringline_bench::sim::{self, Run};

/// Failing seeds after which the rest is left out.
const FAILURES_MAX: usize = 5;
const THREADS_MAX: usize = 64;

/// Simulator of Ringline: real shards and clients, simulated disk, lanes, connections and time, one seed decides all.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Seeds to play: the first, and the first that is left out
    #[arg(long, default_value = "0..200", value_name = "FROM..TO", value_parser = parse_seeds)]
    seeds: Range<u64>,
    /// A cluster in place of a node alone
    #[arg(long, value_enum)]
    cluster: Option<Kind>,
    /// Nodes of the cluster
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=8), requires = "cluster")]
    nodes: u16,
    /// Threads that play [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX as i64))]
    threads: Option<u16>,
    /// Print all that clients did and saw; for one seed of a node alone
    #[arg(long, conflicts_with = "cluster")]
    history: bool,
    /// Draw no progress bar
    #[arg(long)]
    no_progress: bool,
}

/// What the nodes of a cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Each has its own partitions for ever, on its own disk.
    Configured,
    /// Partitions change hands, by etcd and PostgreSQL.
    Moving,
}

impl Args {
    fn setup(&self) -> Option<Setup> {
        let moving = self.cluster? == Kind::Moving;
        Some(Setup { nodes: usize::from(self.nodes), moving, bug: None })
    }

    /// The command that plays a seed again.
    fn again(&self, seed: u64) -> String {
        let what = match self.cluster {
            None => "--history".to_owned(),
            Some(Kind::Configured) => format!("--cluster configured --nodes {}", self.nodes),
            Some(Kind::Moving) => format!("--cluster moving --nodes {}", self.nodes),
        };
        format!("cargo run -p ringline-bench --bin sim -- --seeds {seed}..{} {what}", seed + 1)
    }
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("such as 0..5000")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    let seeds = number(from)?..number(to)?;
    if seeds.is_empty() { Err("there is no seed in it".to_owned()) } else { Ok(seeds) }
}

/// A seed's run with what the referee of a cluster saw, or the text of the panic that ended it.
fn play(seed: u64, setup: Option<Setup>) -> Result<(Run, Vec<String>), String> {
    let played = || match setup {
        None => (sim::run(seed, None), Vec::new()),
        Some(setup) => {
            let played = cluster::run(seed, setup);
            (played.run, played.breaches)
        }
    };
    catch_unwind(AssertUnwindSafe(played)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a text").to_owned()
    })
}

/// Prints what is wrong with a seed; true if nothing is.
fn judge((seed, again): (u64, &str), played: &Result<(Run, Vec<String>), String>, totals: &mut Totals) -> bool {
    let problems: Vec<String> = match played {
        Ok((run, breaches)) => {
            totals.counts += run.verdict.counts;
            totals.steps += run.steps;
            totals.faults += run.faults;
            totals.millis += run.millis;
            breaches.iter().cloned().chain(run.verdict.violations.iter().map(ToString::to_string)).collect()
        }
        Err(panic) => vec![format!("panic: {panic}")],
    };
    if problems.is_empty() {
        return true;
    }
    eprintln!("\nseed {seed} fails:");
    problems.iter().for_each(|problem| eprintln!("  {problem}"));
    eprintln!("  again: {again}");
    false
}

#[derive(Default)]
struct Totals {
    counts: Counts,
    steps: u64,
    faults: u64,
    millis: u64,
}

/// What was judged beside messages.
fn print_people(counts: &Counts) {
    println!(
        "{} users deleted, {} times turned away; {} blocks and settings of who may write, {} refused for one; {} rows of \
         rank, {} refused for it; {} groups dissolved, {} mentions; {} notices, {} arrived, {} at rest; {} marks, {} exported",
        counts.deleted,
        counts.turned_away,
        counts.permits,
        counts.barred,
        counts.ranked,
        counts.outranked,
        counts.dissolved,
        counts.mentions,
        counts.notices,
        counts.told,
        counts.notices_at_rest,
        counts.marks,
        counts.exported
    );
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.history {
        let world = sim::history(args.seeds.start);
        world.iter().for_each(|(device, happening)| println!("{}.{} {happening:?}", device.user, device.number));
    }
    let bar =
        if args.no_progress { ProgressBar::hidden() } else { ProgressBar::new(args.seeds.end - args.seeds.start) };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let threads = args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let setup = args.setup();
    let (next, end) = (AtomicU64::new(args.seeds.start), args.seeds.end);
    let (sender, results) = mpsc::channel();
    let (mut totals, mut failed, mut played) = (Totals::default(), 0, 0);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(THREADS_MAX) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    // The receiver goes when enough have failed.
                    if seed >= end || sender.send((seed, play(seed, setup))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let results = results;
        for (seed, run) in &results {
            bar.inc(1);
            played += 1;
            failed += usize::from(!judge((seed, &args.again(seed)), &run, &mut totals));
            if failed >= FAILURES_MAX {
                break;
            }
        }
    });
    bar.finish_and_clear();
    let Totals { counts, steps, faults, millis } = totals;
    println!(
        "{played} seeds, {failed} failed: {} virtual s, {steps} steps, {faults} faults, {} processes; {} sends, {} accepted, \
         {} unknown, {} in logs, {} handed to applications, {} receipts; {} changes of groups, {} READs, {} synced; \
         {} amended, {} hidden, {} pages, {} truncated, {} transient, {} of presence, {} groups not judged",
        millis / 1_000,
        counts.processes,
        counts.sends,
        counts.accepted,
        counts.unknown,
        counts.kept,
        counts.seen,
        counts.receipts,
        counts.changes,
        counts.reads,
        counts.synced,
        counts.amended,
        counts.hidden,
        counts.pages,
        counts.truncated,
        counts.passed,
        counts.presence,
        counts.unjudged
    );
    print_people(&counts);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
