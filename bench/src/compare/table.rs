//! The result of `compare` and `floor`: medians with their spread, one table a load for people, one JSON object for
//! machines. Pure, but for writing the file.
//!
//! Invariant: each row says whether the sender gets an answer and whether anything was synced, and is set against the
//! row of ours that promises the same.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::cli::{LoadArgs, Point};
use super::drive::Count;
use super::peers::Row;
use crate::Failure;
use crate::cli::Cores;
use crate::facts::Machine;
use crate::metrics::Told;
use crate::server_process::Sample;

const BYTES_PER_MIB: f64 = 1_048_576.0;
const PERCENT: f64 = 100.0;

/// What one run has measured. CPU is in cores: 1 is one core fully used.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    pub delivered_per_s: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub server_cpu_cores: f64,
    pub generator_cpu_cores: f64,
    pub server_rss_bytes: u64,
    /// Over the whole run, warm-up included.
    pub sent: u64,
    pub accepted: u64,
    pub lost: u64,
    pub doubled: u64,
    pub corrupt: u64,
    pub failed: u64,
    pub reasons: Vec<String>,
    /// Length of the measured window.
    pub seconds: f64,
    /// What ours counted in it.
    #[serde(rename = "server_metrics")]
    pub told: Told,
}

/// The server's and the generator's, at one moment.
type Samples = (Option<Sample>, Option<Sample>);

impl Figures {
    pub fn new(count: &Count, seconds: f64, (before, after): (Samples, Samples)) -> Self {
        let cores = |before: Option<Sample>, after: Option<Sample>| {
            before.zip(after).map_or(0.0, |(before, after)| (after.cpu_s - before.cpu_s) / seconds)
        };
        let at = |quantile| count.latency_us.value_at_quantile(quantile);
        Self {
            delivered_per_s: count.delivered as f64 / seconds,
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            server_cpu_cores: cores(before.0, after.0),
            generator_cpu_cores: cores(before.1, after.1),
            server_rss_bytes: after.0.map_or(0, |sample| sample.rss_bytes),
            sent: count.ever_sent,
            accepted: count.ever_accepted,
            lost: count.lost,
            doubled: count.doubled,
            corrupt: count.corrupt,
            failed: count.failed,
            reasons: count.reasons.clone(),
            seconds,
            told: Told::NotAsked,
        }
    }
}

/// All runs of one row at one load.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub row: Row,
    pub runs: Vec<Figures>,
    /// Runs that could not be done.
    pub failures: Vec<String>,
}

impl Line {
    pub fn new(row: Row) -> Self {
        Self { row, runs: Vec::new(), failures: Vec::new() }
    }

    /// Nothing lost, doubled, damaged or refused, and no run missing.
    pub fn is_clean(&self) -> bool {
        let clean = |run: &Figures| run.lost == 0 && run.doubled == 0 && run.corrupt == 0 && run.failed == 0;
        self.failures.is_empty() && self.runs.iter().all(clean)
    }

    fn median(&self, figure: impl Fn(&Figures) -> f64) -> Option<f64> {
        let mut values: Vec<f64> = self.runs.iter().map(figure).collect();
        values.sort_unstable_by(f64::total_cmp);
        let (low, high) = (values.get(values.len().saturating_sub(1) / 2)?, values.get(values.len() / 2)?);
        Some(f64::midpoint(*low, *high))
    }

    fn delivered_per_s(&self) -> Option<f64> {
        self.median(|run| run.delivered_per_s)
    }

    /// From the slowest to the fastest run, in percent of the median.
    fn spread_percent(&self) -> Option<f64> {
        let rates = self.runs.iter().map(|run| run.delivered_per_s);
        let (low, high) = (rates.clone().fold(f64::MAX, f64::min), rates.fold(0.0, f64::max));
        self.delivered_per_s().filter(|median| *median > 0.0).map(|median| (high - low) / median * PERCENT)
    }

    /// What has to be said below the table.
    fn remarks(&self) -> Vec<String> {
        let mut remarks: Vec<String> = self.failures.iter().map(|why| format!("run failed: {why}")).collect();
        for run in &self.runs {
            let counts =
                [(run.lost, "lost"), (run.doubled, "doubled"), (run.corrupt, "corrupt"), (run.failed, "failed")];
            let counts = counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
            let counts: Vec<String> = counts.collect();
            if !counts.is_empty() {
                remarks.push(format!("of {} messages {} {}", run.sent, counts.join(", "), run.reasons.join("; ")));
            }
        }
        let commits = |run: &Figures| match &run.told {
            Told::NotAsked => None,
            Told::Missing(why) => Some(why.clone()),
            Told::Counted(counted) => {
                counted.commits.filter(|it| it.commits > 0).map(|commits| commits.text(run.seconds))
            }
        };
        let commits: Vec<String> = self.runs.iter().filter_map(commits).collect();
        if !commits.is_empty() {
            remarks.push(format!("store commits by run: {}", commits.join(" | ")));
        }
        remarks
    }
}

/// One line for the terminal while it goes on.
pub fn progress(point: Point, row: Row, result: &Result<Figures, Failure>) -> String {
    let (clients, window, name) = (point.clients, point.window, row.name());
    match result {
        Ok(run) => format!("{clients}x{window} {name}: {:.0}/s, p99 {} us", run.delivered_per_s, run.p99_us),
        Err(failure) => format!("{clients}x{window} {failure}"),
    }
}

/// Everything that was measured, and under what.
pub struct Report {
    machine: Machine,
    load: String,
    rounds: u32,
    settings: Vec<(Row, String)>,
    missing: Vec<String>,
    points: Vec<(Point, Vec<Line>)>,
}

impl Report {
    pub fn new(machine: Machine, load: &LoadArgs, (settings, missing): (Vec<(Row, String)>, Vec<String>)) -> Self {
        let (Cores(server_cores), Cores(cores)) = (&load.server_cores, &load.cores);
        let text = format!(
            "pair chat, closed loop: each client keeps its window of {} byte messages on their way and sends the next \
             when one has reached its partner; {} s after {} s of warm-up, {} rounds; servers on cores {server_cores:?}, \
             generator on cores {cores:?}",
            load.payload, load.duration, load.warmup, load.rounds
        );
        Self { machine, load: text, rounds: load.rounds, settings, missing, points: Vec::new() }
    }

    pub fn add(&mut self, point: Point, lines: Vec<Line>) {
        self.points.push((point, lines));
    }

    pub fn lines(&self) -> impl Iterator<Item = &Line> {
        self.points.iter().flat_map(|(_, lines)| lines)
    }

    /// Settings and tables, in Markdown.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in self.machine.rows() {
            let _ = writeln!(text, "- {name}: {value}");
        }
        let _ = writeln!(text, "- commit: {}\n- load: {}", env!("RINGLINE_COMMIT"), self.load);
        for (row, settings) in &self.settings {
            let _ = writeln!(text, "- {}: `{settings}`", row.name());
        }
        for missing in &self.missing {
            let _ = writeln!(text, "- {missing}");
        }
        for (point, lines) in &self.points {
            let _ = write!(text, "\n{}", self.table(*point, lines));
        }
        text
    }

    fn table(&self, point: Point, lines: &[Line]) -> String {
        let mut text = format!("### {} clients, {} on their way each\n\n", point.clients, point.window);
        text.push_str(
            "| | answer | synced | delivered/s | spread | p50 µs | p99 µs | p99.9 µs | server CPU | generator CPU | \
             RSS MiB | ours is |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
        );
        for line in lines {
            text.push_str(&self.table_row(line, lines));
        }
        for line in lines {
            for remark in line.remarks() {
                let _ = write!(text, "\n{}: {remark}\n", line.row.name());
            }
        }
        text
    }

    fn table_row(&self, line: &Line, lines: &[Line]) -> String {
        let row = line.row;
        let yes = |yes: bool| if yes { "yes" } else { "no" };
        let shown = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let cpu =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |cores| format!("{:.0} %", cores * PERCENT));
        let cells = [
            row.name().to_owned(),
            yes(row.answers()).to_owned(),
            yes(row.synced()).to_owned(),
            shown(line.delivered_per_s(), 0),
            line.spread_percent().map_or_else(|| "-".to_owned(), |percent| format!("{percent:.0} %")),
            shown(line.median(|run| run.p50_us as f64), 0),
            shown(line.median(|run| run.p99_us as f64), 0),
            shown(line.median(|run| run.p999_us as f64), 0),
            cpu(line.median(|run| run.server_cpu_cores)),
            cpu(line.median(|run| run.generator_cpu_cores)),
            shown(line.median(|run| run.server_rss_bytes as f64 / BYTES_PER_MIB), 0),
            ratio(line, lines).map_or_else(String::new, |ratio| format!("{ratio:.2} x")),
        ];
        format!("| {} |\n", cells.join(" | "))
    }

    /// The JSON text, one object.
    pub fn json(&self) -> String {
        let points = self.points.iter().map(|(point, lines)| {
            let rows = lines.iter().map(|line| {
                json!({
                    "row": line.row.name(), "answer": line.row.answers(), "synced": line.row.synced(),
                    "delivered_per_s": line.delivered_per_s(), "spread_percent": line.spread_percent(),
                    "p50_us": line.median(|run| run.p50_us as f64),
                    "p99_us": line.median(|run| run.p99_us as f64),
                    "p999_us": line.median(|run| run.p999_us as f64),
                    "ours_over_this": ratio(line, lines),
                    "runs": line.runs, "failures": line.failures,
                })
            });
            let rows: Vec<_> = rows.collect();
            json!({ "clients": point.clients, "window": point.window, "rows": rows })
        });
        let points: Vec<_> = points.collect();
        let settings: Vec<_> =
            self.settings.iter().map(|(row, text)| json!({ "row": row.name(), "settings": text })).collect();
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"), "commit": env!("RINGLINE_COMMIT"), "machine": self.machine,
            "load": self.load, "loop": "closed", "rounds": self.rounds, "settings": settings,
            "missing": self.missing, "points": points,
        });
        report.to_string()
    }

    /// Writes the JSON object, if a file is wanted.
    pub fn write_json(&self, path: Option<&Path>) -> Result<(), Failure> {
        let Some(path) = path else { return Ok(()) };
        let written = std::fs::write(path, self.json() + "\n");
        written.map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))
    }
}

/// How many messages ours delivers for each one of this row. `None`: there is no such row of ours, or this is it.
fn ratio(line: &Line, lines: &[Line]) -> Option<f64> {
    let ours = lines.iter().find(|other| other.row == line.row.ours())?.delivered_per_s()?;
    let theirs = line.delivered_per_s().filter(|rate| *rate > 0.0)?;
    line.row.peer().map(|_| ours / theirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ringline::Mode;

    fn line(row: Row, rates: &[f64]) -> Line {
        let runs = rates.iter().map(|rate| Figures { delivered_per_s: *rate, ..Figures::default() });
        Line { row, runs: runs.collect(), failures: Vec::new() }
    }

    fn report(lines: Vec<Line>) -> Report {
        let machine = Machine::here((std::net::Ipv4Addr::LOCALHOST, 0).into(), None);
        let (settings, points) = (vec![(Row::Redis, "--port PORT".to_owned())], Vec::new());
        let missing = vec!["nats core: left out".to_owned()];
        let mut report = Report { machine, load: "a load".to_owned(), rounds: 3, settings, missing, points };
        report.add(Point { clients: 2, window: 1 }, lines);
        report
    }

    #[test]
    fn medians_and_spread_are_those_of_the_runs() {
        let three = line(Row::Redis, &[300.0, 100.0, 200.0]);
        assert_eq!((three.delivered_per_s(), three.spread_percent()), (Some(200.0), Some(100.0)));
        assert_eq!(line(Row::Redis, &[100.0, 200.0]).delivered_per_s(), Some(150.0));
        assert_eq!(line(Row::Redis, &[]).delivered_per_s(), None);
    }

    #[test]
    fn each_row_is_set_against_ours_of_its_kind() {
        let lines = vec![
            line(Row::Ringline(Mode::TransientNoReply), &[800.0]),
            line(Row::Ringline(Mode::Transient), &[400.0]),
            line(Row::Redis, &[200.0]),
            line(Row::Nats, &[200.0]),
            line(Row::Ejabberd, &[]),
        ];
        let ratios: Vec<_> = lines.iter().map(|line| ratio(line, &lines)).collect();
        assert_eq!(ratios, [None, None, Some(2.0), Some(4.0), None]);
        let text = report(lines).text();
        for part in
            ["| redis pub/sub | yes | no | 200 |", "| 4.00 x |", "| ejabberd | no | no | - |", "left out", "CPU"]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn what_went_wrong_is_said_in_text_and_json() {
        let mut broken = line(Row::Ringline(Mode::Durable), &[1.0]);
        broken.failures.push("did not start".to_owned());
        if let Some(run) = broken.runs.first_mut() {
            (run.sent, run.lost, run.reasons) = (9, 2, vec!["BUSY".to_owned()]);
        }
        assert!(!broken.is_clean());
        let report = report(vec![broken]);
        let text = report.text();
        assert!(text.contains("of 9 messages 2 lost BUSY") && text.contains("run failed: did not start"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["points"][0]["rows"][0]["runs"][0]["lost"], 2);
        assert_eq!(json["points"][0]["rows"][0]["failures"][0], "did not start");
    }
}
