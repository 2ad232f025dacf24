//! `ringline doctor`: what the machine offers, judged against what the node would be started with, each finding with
//! why it matters and the command that mends it; and the short look that `serve` takes. Runs on the main thread, before
//! or without a node.
//!
//! The way of a finding: [`readings`] reads, the table in [`checks`] judges (with [`machine`]), [`selftest`] measures,
//! and a [`Report`] is printed as text or JSON. Invariant: nothing of the machine is changed.

pub mod checks;
pub mod machine;
pub mod readings;
pub mod selftest;

use std::fmt::Write as _;

use serde::Serialize;

use crate::boot::{RingFeatures, ranges};
use crate::config::Config;
use checks::{CHECKS, Judgement, Verdict};
use readings::{Plan, Readings};
use selftest::{Bench, Latency, Outcome, PROBES};

/// Exit code when something fails.
pub const EXIT_FAIL: u8 = 1;
/// Lines that `serve` logs at most.
const LINES_AT_START_MAX: usize = 5;

/// A judged check.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub name: &'static str,
    pub reads: &'static str,
    pub verdict: Verdict,
    pub finding: String,
    pub why: &'static str,
    /// Empty: nothing to mend.
    pub mend: String,
}

/// A judged measurement. Times in µs.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    pub name: &'static str,
    pub measures: &'static str,
    pub verdict: Verdict,
    pub finding: String,
    /// `null`: it failed, or was given up.
    pub latency: Option<Latency>,
    pub normal_us: u64,
    pub bad_us: u64,
    pub mend: String,
}

/// All that the doctor says; the fields' names are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub version: &'static str,
    /// The weightiest verdict.
    pub verdict: Verdict,
    pub cores: Vec<usize>,
    pub listen: String,
    pub data_dir: String,
    pub checks: Vec<Finding>,
    pub self_test: Vec<Measurement>,
}

/// Reads, judges and measures: some seconds (see [`selftest::SELF_TEST_MS_MAX`]).
pub fn examine(config: &Config, cores: &[usize]) -> Report {
    let readings = Readings::all(Plan::new(config, cores));
    let checks: Vec<Finding> = CHECKS
        .iter()
        .map(|check| {
            let Judgement { verdict, finding, mend } = (check.judge)(&readings);
            Finding { name: check.name, reads: check.reads, verdict, finding, why: check.why, mend }
        })
        .collect();
    let folder = readings::nearest_folder(&config.data_dir);
    let outcomes = selftest::run(&Bench { cores: cores.to_vec(), folder });
    let self_test: Vec<Measurement> = PROBES
        .iter()
        .zip(outcomes)
        .map(|(probe, outcome)| {
            let Judgement { verdict, finding, mend } = selftest::judge(probe, &outcome);
            let latency = match outcome {
                Outcome::Measured(latency) => Some(latency),
                Outcome::Failed(_) | Outcome::TimedOut => None,
            };
            let (name, measures, normal_us, bad_us) = (probe.name, probe.what, probe.normal_us, probe.bad_us);
            Measurement { name, measures, verdict, finding, latency, normal_us, bad_us, mend }
        })
        .collect();
    let verdicts = checks.iter().map(|check| check.verdict).chain(self_test.iter().map(|measured| measured.verdict));
    Report {
        version: env!("CARGO_PKG_VERSION"),
        verdict: verdicts.max().unwrap_or(Verdict::Ok),
        cores: cores.to_vec(),
        listen: config.net_listen.to_string(),
        data_dir: config.data_dir.display().to_string(),
        checks,
        self_test,
    }
}

impl Report {
    pub fn exit_code(&self) -> u8 {
        if self.verdict == Verdict::Fail { EXIT_FAIL } else { 0 }
    }

    /// One JSON object on one line.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self).map(|text| text + "\n")
    }

    /// The table for people: a line a check, and under what is not well why it matters and what mends it.
    pub fn table(&self, colours: bool) -> String {
        let cores = ranges(&self.cores);
        let mut text = format!(
            "ringline {} doctor: cores {cores}, listen {}, data directory {}\n\n",
            self.version, self.listen, self.data_dir
        );
        for check in &self.checks {
            text.push_str(&line(check.verdict, check.name, &check.finding, colours));
            if check.verdict > Verdict::Ok {
                detail(&mut text, "reads", check.reads);
                detail(&mut text, "why", check.why);
                detail(&mut text, "mend", &check.mend);
            }
        }
        text.push_str("\nself-test\n");
        for measured in &self.self_test {
            text.push_str(&line(measured.verdict, measured.name, measured.measures, colours));
            detail(&mut text, "", &measured.finding);
            detail(&mut text, "mend", &measured.mend);
        }
        let count = |verdict| {
            let checks = self.checks.iter().map(|check| check.verdict);
            checks.chain(self.self_test.iter().map(|measured| measured.verdict)).filter(|&one| one == verdict).count()
        };
        let [well, notes, warnings, failures] = [Verdict::Ok, Verdict::Note, Verdict::Warn, Verdict::Fail].map(count);
        let _ = writeln!(text, "\n{well} ok, {notes} to note, {warnings} warnings, {failures} failures");
        text
    }
}

fn line(verdict: Verdict, name: &str, finding: &str, colours: bool) -> String {
    let colour = match verdict {
        Verdict::Ok => "32",
        Verdict::Note => "36",
        Verdict::Warn => "33",
        Verdict::Fail => "31",
    };
    let word = verdict.name();
    let word = if colours { format!("\x1b[{colour}m{word:4}\x1b[0m") } else { format!("{word:4}") };
    format!("{word}  {name:18} {finding}\n")
}

fn detail(text: &mut String, name: &str, value: &str) {
    if !value.is_empty() {
        let _ = writeln!(text, "{:25}{name:5} {value}", "");
    }
}

/// The cheap part, for the log of a start: at most [`LINES_AT_START_MAX`] lines, none when all is well.
pub fn at_start(config: &Config, cores: &[usize], features: RingFeatures) -> Vec<String> {
    let readings = Readings::cheap(Plan::new(config, cores), Ok(features));
    let judged = CHECKS.iter().filter(|check| check.at_start).map(|check| (check.name, (check.judge)(&readings)));
    lines(judged.filter(|(_, judgement)| judgement.verdict >= Verdict::Warn).collect())
}

fn lines(found: Vec<(&'static str, Judgement)>) -> Vec<String> {
    let room = LINES_AT_START_MAX.saturating_sub(1);
    let left = found.len().saturating_sub(room);
    let mut lines: Vec<String> = found
        .iter()
        .take(room)
        .map(|(name, judgement)| format!("{name}: {}; mend it by: {}", judgement.finding, judgement.mend))
        .collect();
    if !lines.is_empty() {
        let more = if left > 0 { format!("{left} more findings: ") } else { String::new() };
        lines.push(format!("{more}ringline doctor tells all"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_says_little() {
        let found = |count| vec![("somaxconn", checks::bad(Verdict::Warn, "128", "sysctl")); count];
        assert!(lines(found(0)).is_empty());
        assert_eq!(lines(found(1)), ["somaxconn: 128; mend it by: sysctl", "ringline doctor tells all"]);
        let many = lines(found(9));
        assert_eq!(many.len(), LINES_AT_START_MAX);
        assert_eq!(many[4], "5 more findings: ringline doctor tells all");
    }

    #[test]
    fn only_a_failure_fails() {
        let check = |verdict| Finding {
            name: "kernel",
            reads: "uname",
            verdict,
            finding: "5.4".into(),
            why: "It is old.",
            mend: "install a newer".into(),
        };
        let report = |verdict| Report {
            version: "0",
            verdict,
            cores: vec![0, 1],
            listen: String::new(),
            data_dir: String::new(),
            checks: vec![check(verdict)],
            self_test: Vec::new(),
        };
        for verdict in [Verdict::Ok, Verdict::Note, Verdict::Warn] {
            assert_eq!(report(verdict).exit_code(), 0);
        }
        let failed = report(Verdict::Fail);
        assert_eq!(failed.exit_code(), EXIT_FAIL);
        let text = failed.table(false);
        for part in ["cores 0-1", "FAIL  kernel", "uname", "It is old.", "install a newer", "1 failures"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(failed.table(true).contains("\x1b[31mFAIL"));
    }
}
