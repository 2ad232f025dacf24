//! `run --search`: the highest open-loop rate that a server sustains, then runs at 50, 70 and 90 % of it.
//!
//! [`Search`] is pure: rates out, observations in. [`search`] drives it, one whole run a step, on threads of its own, so
//! that the main thread is never pinned. Invariants: a rate counts as too high only if it failed twice, because one
//! hiccup of the machine is no limit of the server; a run in which the generator itself was late says nothing about the
//! server and is made again.
//!
//! How a run is judged, in this order. Latency counts from the intended send time, so what the generator is late by is in
//! it: once that alone takes [`LAG_SHARE_MAX`] of the bound at p99, the run is void (`generator_late`). Then: a broken
//! promise, less than [`ACHIEVED_SHARE_MIN`] of the load, p99 of ack or delivery over the bound, or good.

use std::collections::HashSet;
use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use crate::Failure;
use crate::cli::RunArgs;
use crate::facts::Machine;
use crate::report::{Report, ms};
use crate::run;

/// Less than this part of the offered load accepted or delivered: the rate is too high. What may be on its way at the end
/// of the window, within the bound on latency, is not missing: it counts in short windows.
const ACHIEVED_SHARE_MIN: f64 = 0.99;
/// And this part is missing in any case, however long the bound and short the window.
const UNDER_WAY_SHARE_MAX: f64 = 0.1;
/// The climb doubles the rate until the first failure, then goes on from the last good rate by the asked step.
const COARSE_STEP: f64 = 2.0;
/// A rate fails for good after so many failed runs.
const TRIES_MAX: u32 = 2;
/// A rate whose runs were all void, this many, is the end: the generator's limit, or a machine that is busy.
const VOID_TRIES_MAX: u32 = 5;
/// Of the bound on p99, that the generator itself may be late by at p99.
const LAG_SHARE_MAX: f64 = 0.5;
/// A generator that used more of each of its cores is taken for full.
const FULL_CORE_SHARE: f64 = 0.8;
/// Runs after the climb, in percent of what it found.
const HOLD_PERCENT: [u64; 3] = [50, 70, 90];
const FIRST_RATE_PER_S: u64 = 1_000;
const RATE_PER_S_MAX: u64 = 1_000_000_000;
const US_PER_MS: f64 = 1_000.0;
const US_PER_S: f64 = 1_000_000.0;

#[derive(Clone, Debug, Args)]
pub struct SearchArgs {
    /// Find the highest rate: open loop from --rate (default 1000) upwards until p99 or the achieved rate fails, then
    /// hold 50, 70 and 90 % of it; each step is a run of --warmup and --duration
    #[arg(long, conflicts_with_all = ["window", "interval_ms", "hdr"])]
    pub search: bool,
    /// Search: the longest 99th percentile, of send to ack and of send to delivery, in milliseconds
    #[arg(long, default_value = "5", value_name = "MS", value_parser = parse_p99)]
    pub p99_ms: f64,
    /// Search: factor from one rate to the next, once doubling has failed
    #[arg(long, default_value = "1.25", value_name = "FACTOR", value_parser = parse_step)]
    pub step: f64,
}

fn parse_p99(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(p99_ms) if (0.001..=600_000.0).contains(&p99_ms) => Ok(p99_ms),
        Ok(_) | Err(_) => Err(format!("\"{text}\" is no number of milliseconds from 0.001 to 600000")),
    }
}

fn parse_step(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(step) if (1.01..=10.0).contains(&step) => Ok(step),
        Ok(_) | Err(_) => Err(format!("\"{text}\" is no factor from 1.01 to 10")),
    }
}

/// What one run at one rate has shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observed {
    /// The lower of accepted and delivered.
    pub achieved_per_s: f64,
    /// The higher of ack and delivery.
    pub p99_us: u64,
    /// Length of the measured window.
    pub seconds: f64,
    /// How late the generator was itself.
    pub lag_p99_us: u64,
    /// Nothing lost, doubled, reordered, unanswered; nobody cut off.
    pub clean: bool,
}

impl Observed {
    fn of(report: &Report) -> Self {
        Self {
            achieved_per_s: report.accepted_per_s.min(report.delivered_per_s),
            p99_us: report.ack_us.p99.max(report.deliver_us.p99),
            seconds: report.seconds,
            lag_p99_us: report.generator_lag_us.map_or(0, |lag| lag.p99),
            clean: report.clean(),
        }
    }
}

/// How a rate did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    Good,
    /// p99 over the bound.
    TooSlow,
    /// Less than 99 % of the offered load.
    TooLittle,
    /// Something was lost, doubled, reordered, unanswered or cut off.
    Broken,
    /// The generator was too late itself: the run says nothing about the server.
    GeneratorLate,
}

impl Judgement {
    pub fn text(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::TooSlow => "p99 over the bound",
            Self::TooLittle => "less than 99 % achieved",
            Self::Broken => "a promise broken or a client cut off",
            Self::GeneratorLate => "void: the generator was late itself",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Doubling; nothing has failed.
    Coarse,
    /// By the asked step; this rate is known to be too high.
    Fine {
        failed: u64,
    },
    /// At this place of [`HOLD_PERCENT`].
    Hold(usize),
    Done,
}

/// See the file's head.
#[derive(Clone, Debug)]
pub struct Search {
    p99_us_max: u64,
    step: f64,
    phase: Phase,
    rate: u64,
    /// Runs at this rate that failed, and that were void.
    tries: u32,
    voids: u32,
    best: Option<u64>,
    limit: Option<Judgement>,
}

impl Search {
    /// Begins at `rate` messages a second.
    pub fn new(rate: u64, p99_us_max: u64, step: f64) -> Self {
        let rate = rate.clamp(1, RATE_PER_S_MAX);
        Self { p99_us_max, step, phase: Phase::Coarse, rate, tries: 0, voids: 0, best: None, limit: None }
    }

    /// The rate to run next, and whether it is one to hold; `None` at the end.
    pub fn next(&self) -> Option<(u64, bool)> {
        match self.phase {
            Phase::Coarse | Phase::Fine { .. } => Some((self.rate, false)),
            Phase::Hold(_) => Some((self.rate, true)),
            Phase::Done => None,
        }
    }

    /// The highest good rate so far, and what ended the climb; `None` while it climbs, or if nothing failed up to the
    /// highest rate there is.
    pub fn found(&self) -> (Option<u64>, Option<Judgement>) {
        (self.best, self.limit)
    }

    /// How this observation is judged at this rate.
    fn judge(&self, rate: u64, observed: Observed) -> Judgement {
        if observed.lag_p99_us as f64 > LAG_SHARE_MAX * self.p99_us_max as f64 {
            Judgement::GeneratorLate
        } else if !observed.clean {
            Judgement::Broken
        } else if observed.achieved_per_s < self.achieved_per_s_min(rate, observed.seconds) {
            Judgement::TooLittle
        } else if observed.p99_us > self.p99_us_max {
            Judgement::TooSlow
        } else {
            Judgement::Good
        }
    }

    fn achieved_per_s_min(&self, rate: u64, seconds: f64) -> f64 {
        let under_way_share = self.p99_us_max as f64 / US_PER_S / seconds.max(f64::MIN_POSITIVE);
        rate as f64 * ACHIEVED_SHARE_MIN.min(1.0 - under_way_share.min(UNDER_WAY_SHARE_MAX))
    }

    /// Takes what the run at [`Self::next`]'s rate has shown.
    pub fn observe(&mut self, observed: Observed) -> Judgement {
        let judgement = self.judge(self.rate, observed);
        if judgement == Judgement::GeneratorLate {
            self.voids += 1;
            if self.voids < VOID_TRIES_MAX {
                return judgement;
            }
            // Enough: take it as it is.
            self.tries = TRIES_MAX;
        } else {
            self.tries += 1;
        }
        match self.phase {
            Phase::Hold(at) => self.hold(at + 1),
            Phase::Done => {}
            Phase::Coarse | Phase::Fine { .. } if judgement != Judgement::Good => {
                if self.tries >= TRIES_MAX {
                    self.failed(judgement);
                }
            }
            Phase::Coarse => self.climb(COARSE_STEP, u64::MAX),
            Phase::Fine { failed } => self.climb(self.step, failed),
        }
        judgement
    }

    /// From a good rate to the next, which stays below one that has failed.
    fn climb(&mut self, factor: f64, failed: u64) {
        self.best = Some(self.rate);
        let next = ((self.rate as f64 * factor) as u64).max(self.rate + 1).min(RATE_PER_S_MAX);
        if next >= failed || next == self.rate {
            return self.hold(0);
        }
        (self.rate, self.tries, self.voids) = (next, 0, 0);
    }

    fn failed(&mut self, judgement: Judgement) {
        self.limit = Some(judgement);
        let failed = self.rate;
        match (self.phase, self.best) {
            (Phase::Coarse, Some(best)) => {
                self.phase = Phase::Fine { failed };
                self.rate = best;
                self.climb(self.step, failed);
            }
            (Phase::Coarse, None) | (Phase::Fine { .. } | Phase::Hold(_) | Phase::Done, _) => self.hold(0),
        }
    }

    fn hold(&mut self, at: usize) {
        (self.tries, self.voids) = (0, 0);
        match (self.best, HOLD_PERCENT.get(at)) {
            (Some(best), Some(percent)) => {
                self.phase = Phase::Hold(at);
                self.rate = (best * percent / 100).max(1);
            }
            (Some(_), None) | (None, _) => self.phase = Phase::Done,
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub rate: u64,
    pub held: bool,
    pub accepted_per_s: f64,
    pub delivered_per_s: f64,
    pub ack_p50_us: u64,
    pub ack_p99_us: u64,
    pub deliver_p50_us: u64,
    pub deliver_p99_us: u64,
    pub generator_lag_p99_us: u64,
    /// In cores.
    pub server_cpu: Option<f64>,
    pub generator_cpu: Option<f64>,
    pub judgement: Judgement,
}

impl Row {
    const HEAD: &str =
        "      rate/s  accepted/s delivered/s   ack p50    ack p99   dlv p50    dlv p99   lag p99   CPU  own CPU";

    fn of(report: &Report, (rate, held): (u64, bool), judgement: Judgement) -> Self {
        Self {
            rate,
            held,
            accepted_per_s: report.accepted_per_s,
            delivered_per_s: report.delivered_per_s,
            ack_p50_us: report.ack_us.p50,
            ack_p99_us: report.ack_us.p99,
            deliver_p50_us: report.deliver_us.p50,
            deliver_p99_us: report.deliver_us.p99,
            generator_lag_p99_us: report.generator_lag_us.map_or(0, |lag| lag.p99),
            server_cpu: report.server_cpu_s.map(|cpu_s| cpu_s / report.seconds.max(f64::MIN_POSITIVE)),
            generator_cpu: report.generator_cpu_s.map(|cpu_s| cpu_s / report.seconds.max(f64::MIN_POSITIVE)),
            judgement,
        }
    }

    /// For people; latencies in ms, CPU of the server and of the generator in cores.
    pub fn line(&self) -> String {
        let kind = if self.held { "hold" } else { "step" };
        let cores = |cpu: Option<f64>| cpu.map_or_else(|| "?".to_owned(), |cpu| format!("{cpu:.2}"));
        let (cpu, own) = (cores(self.server_cpu), cores(self.generator_cpu));
        format!(
            "{kind} {:>7} {:>11.0} {:>11.0} {:>9} {:>10} {:>9} {:>10} {:>9} {cpu:>5} {own:>8}  {}",
            self.rate,
            self.accepted_per_s,
            self.delivered_per_s,
            ms(self.ack_p50_us),
            ms(self.ack_p99_us),
            ms(self.deliver_p50_us),
            ms(self.deliver_p99_us),
            ms(self.generator_lag_p99_us),
            self.judgement.text()
        )
    }
}

/// The result; the fields' names are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub struct SearchReport {
    pub version: &'static str,
    pub commit: &'static str,
    #[serde(flatten)]
    pub machine: Machine,
    /// The climb was ended by the server, not by the generator, and no held run was void. If not, the rate that was
    /// found is a lower bound.
    pub valid: bool,
    /// Cores that the generator's threads are pinned on.
    pub generator_cores: f64,
    pub scenario: &'static str,
    pub class: &'static str,
    pub clients: u32,
    pub payload_bytes: usize,
    pub p99_ms_max: f64,
    /// Messages a second; `null` if even the first rate failed.
    pub sustained_per_s: Option<u64>,
    pub limited_by: Option<Judgement>,
    pub steps: Vec<Row>,
    /// The whole reports of the held runs.
    pub held: Vec<Report>,
    /// A promise was broken in some step.
    pub broken: bool,
}

impl SearchReport {
    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = self.summary() + "\n" + Row::HEAD + "\n";
        for row in &self.steps {
            text.push_str(&(row.line() + "\n"));
        }
        if !self.valid {
            let _ = writeln!(text, "INVALID: {}", self.why_invalid());
        }
        text
    }

    /// What has made the generator late, and what to do about it. Of use only if the result is not valid.
    pub fn why_invalid(&self) -> String {
        let void = || self.steps.iter().filter(|row| row.judgement == Judgement::GeneratorLate);
        let lag_us = void().map(|row| row.generator_lag_p99_us).min().unwrap_or_default();
        let full = void().any(|row| row.generator_cpu.is_some_and(|cpu| cpu >= FULL_CORE_SHARE * self.generator_cores));
        let cause = if full {
            "its cores are full, so this is its limit and not the server's: give it more --cores"
        } else {
            "its cores were not full, so something else on this machine held it up: run it on a quiet machine, or raise \
             --p99-ms"
        };
        format!("the generator was {} ms late or more at p99; {cause}", ms(lag_us))
    }

    /// What was found, in one line.
    pub fn summary(&self) -> String {
        let what = format!("{} {}, {} clients, {} bytes", self.scenario, self.class, self.clients, self.payload_bytes);
        let limit = self.limited_by.map_or("nothing failed", Judgement::text);
        match self.sustained_per_s {
            Some(rate) => {
                let at_least = if self.valid { "" } else { "at least " };
                format!("{what}: {at_least}{rate} msg/s sustained with p99 <= {} ms ({limit})", self.p99_ms_max)
            }
            None if self.limited_by == Some(Judgement::GeneratorLate) => format!("{what}: no run counts ({limit})"),
            None => format!("{what}: the first rate failed ({limit}); begin lower with --rate"),
        }
    }
}

/// Runs the whole search; `show` gets each line as it comes.
pub fn search(args: &RunArgs, mut show: impl FnMut(&str)) -> Result<SearchReport, Failure> {
    let first = args.pace.rate.unwrap_or(FIRST_RATE_PER_S);
    let bounds = &args.search;
    let mut search = Search::new(first, (bounds.p99_ms * US_PER_MS) as u64, bounds.step);
    let (mut steps, mut held, mut broken) = (Vec::new(), Vec::<(u64, Judgement, Report)>::new(), false);
    let machine = Machine::here(args.fleet.target(), args.fleet.server());
    let plan = args.plan()?;
    show(Row::HEAD);
    while let Some((rate, holds)) = search.next() {
        let report = run_at(args, rate)?;
        let judgement = search.observe(Observed::of(&report));
        let row = Row::of(&report, (rate, holds), judgement);
        show(&row.line());
        // An overloaded server may leave sends unanswered; it may never lose, double or reorder.
        broken |= report.lost + report.duplicated + report.reordered > 0 || (holds && !report.clean());
        steps.push(row);
        if holds {
            // A void run has been made again: the last one counts.
            held.retain(|(earlier, ..)| *earlier != rate);
            held.push((rate, judgement, report));
        }
    }
    let (sustained_per_s, limited_by) = search.found();
    let held_void = held.iter().any(|(_, judgement, _)| *judgement == Judgement::GeneratorLate);
    let valid = limited_by != Some(Judgement::GeneratorLate) && !held_void;
    Ok(SearchReport {
        version: env!("CARGO_PKG_VERSION"),
        commit: env!("RINGLINE_COMMIT"),
        machine,
        valid,
        generator_cores: args.fleet.thread_cores()?.into_iter().collect::<HashSet<_>>().len() as f64,
        scenario: plan.scenario.name(),
        class: args.class.name(),
        clients: args.clients,
        payload_bytes: plan.payload_bytes,
        p99_ms_max: bounds.p99_ms,
        sustained_per_s,
        limited_by,
        steps,
        held: held.into_iter().map(|(.., report)| report).collect(),
        broken,
    })
}

/// One run at this rate, on a thread of its own, because a run pins its thread.
fn run_at(args: &RunArgs, rate: u64) -> Result<Report, Failure> {
    let mut args = args.clone();
    args.pace.rate = Some(rate);
    std::thread::scope(|scope| match scope.spawn(|| run::run(&args)).join() {
        Ok(result) => result,
        Err(_) => Err(Failure::Failed("a step of the search panicked".to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that serves `capacity` a second, with a queue's latency: 200 µs / (1 - load).
    fn server(rate: u64, capacity: f64) -> Observed {
        let load = rate as f64 / capacity;
        let p99_us = if load < 1.0 { (200.0 / (1.0 - load)) as u64 } else { 1_000_000 };
        Observed { achieved_per_s: (rate as f64).min(capacity), p99_us, seconds: 10.0, lag_p99_us: 100, clean: true }
    }

    /// Drives a search; gives it and every (rate, held, judgement).
    fn drive(mut search: Search, mut run: impl FnMut(u64) -> Observed) -> (Search, Vec<(u64, bool, Judgement)>) {
        let mut steps = Vec::new();
        while let Some((rate, held)) = search.next() {
            let judgement = search.observe(run(rate));
            steps.push((rate, held, judgement));
            assert!(steps.len() < 200, "a search ends");
        }
        (search, steps)
    }

    #[test]
    fn it_finds_the_rate_where_p99_passes_the_bound() {
        // 200 µs / (1 - load) = 5,000 µs at load 0.96.
        for capacity in [3_000.0, 50_000.0, 777_777.0] {
            let (search, steps) = drive(Search::new(1_000, 5_000, 1.25), |rate| server(rate, capacity));
            let (Some(best), Some(limit)) = search.found() else { panic!("found") };
            let edge = 0.96 * capacity;
            assert!(best as f64 <= edge && best as f64 * 1.25 > edge * 0.99, "{best} of {edge}");
            assert!(matches!(limit, Judgement::TooSlow | Judgement::TooLittle));
            let held: Vec<u64> = steps.iter().filter(|step| step.1).map(|step| step.0).collect();
            assert_eq!(held, [best / 2, best * 70 / 100, best * 90 / 100]);
        }
    }

    #[test]
    fn too_little_achieved_ends_it_at_any_latency() {
        let quick = |rate: u64| Observed { p99_us: 100, ..server(rate, 10_000.0) };
        let (search, _) = drive(Search::new(1_000, 5_000, 1.25), quick);
        let (best, limit) = search.found();
        assert!(best.is_some_and(|best| (8_000..=10_100).contains(&best)), "{best:?}");
        assert_eq!(limit, Some(Judgement::TooLittle));
    }

    #[test]
    fn what_is_on_its_way_at_the_end_of_a_short_window_is_not_missing() {
        let mut search = Search::new(1_000, 50_000, 1.25);
        let short = |achieved_per_s| Observed { achieved_per_s, seconds: 1.0, ..server(1_000, 50_000.0) };
        assert_eq!(search.clone().observe(short(951.0)), Judgement::Good);
        assert_eq!(search.clone().observe(short(949.0)), Judgement::TooLittle);
        assert_eq!(search.clone().observe(Observed { seconds: 0.1, ..short(899.0) }), Judgement::TooLittle);
        assert_eq!(search.observe(Observed { seconds: 10.0, ..short(989.0) }), Judgement::TooLittle);
    }

    #[test]
    fn one_hiccup_is_tried_again_and_two_are_a_limit() {
        let mut hiccups = 1;
        let (search, steps) = drive(Search::new(1_000, 5_000, 1.25), |rate| {
            if rate == 4_000 && hiccups > 0 {
                hiccups -= 1;
                return Observed { p99_us: 90_000, ..server(rate, 50_000.0) };
            }
            server(rate, 50_000.0)
        });
        assert!(search.found().0.is_some_and(|best| best > 38_000), "{:?}", search.found());
        let tries = steps.iter().filter(|step| step.0 == 4_000).map(|step| step.2).collect::<Vec<_>>();
        assert_eq!(tries, [Judgement::TooSlow, Judgement::Good]);
    }

    #[test]
    fn a_first_rate_that_fails_holds_nothing() {
        let (search, steps) = drive(Search::new(1_000, 5_000, 1.25), |rate| server(rate, 10.0));
        assert_eq!(search.found(), (None, Some(Judgement::TooLittle)));
        assert_eq!(steps.len(), TRIES_MAX as usize);
    }

    #[test]
    fn a_late_generator_and_a_broken_promise_have_names() {
        let late = |rate| Observed { lag_p99_us: if rate > 8_000 { 2_501 } else { 2_500 }, ..server(rate, 1e12) };
        let (search, steps) = drive(Search::new(1_000, 5_000, 1.25), late);
        assert_eq!(search.found(), (Some(8_000), Some(Judgement::GeneratorLate)));
        assert_eq!(steps.iter().filter(|step| step.0 == 16_000).count(), VOID_TRIES_MAX as usize);
        let broken = |rate| Observed { clean: rate < 2_000, ..server(rate, 1e12) };
        let (search, _) = drive(Search::new(1_000, 5_000, 1.25), broken);
        assert_eq!(search.found().1, Some(Judgement::Broken));
    }

    #[test]
    fn void_runs_are_made_again_and_count_for_nothing() {
        // Every other run is void, whatever the rate, and would have failed.
        let mut runs = 0;
        let (search, steps) = drive(Search::new(1_000, 5_000, 1.25), |rate| {
            runs += 1;
            let void = Observed { lag_p99_us: 9_000, p99_us: 90_000, ..server(rate, 50_000.0) };
            if runs % 2 == 1 { void } else { server(rate, 50_000.0) }
        });
        assert!(search.found().0.is_some_and(|best| best > 38_000), "{:?}", search.found());
        assert_ne!(search.found().1, Some(Judgement::GeneratorLate));
        let held: Vec<Judgement> = steps.iter().filter(|step| step.1).map(|step| step.2).collect();
        assert_eq!(held.iter().filter(|judgement| **judgement == Judgement::Good).count(), HOLD_PERCENT.len());
    }

    #[test]
    fn an_endless_server_ends_at_the_highest_rate() {
        let (search, _) = drive(Search::new(1_000, 5_000, 1.25), |rate| server(rate, 1e15));
        assert_eq!(search.found(), (Some(RATE_PER_S_MAX), None));
    }
}
