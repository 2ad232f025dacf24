//! The result of a run: one JSON object for machines, one table for people. Pure.
//!
//! Invariant: every figure says under what it was measured: loop, pace, commit, kernel, CPUs, and whether the generator
//! itself kept up (`valid`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::SystemTime;

use hdrhistogram::Histogram;
use ringline_schema::message::Class;
use serde::Serialize;

use crate::check::Verdict;
use crate::facts::Machine;
use crate::intervals::Intervals;
use crate::metrics::Told;
use crate::plan::{Pace, Plan};
use crate::run::{Point, Samples};
use crate::tally::Tally;

/// An open loop whose generator was later than this, at the 99th percentile, has measured itself.
pub const LAG_US_MAX: u64 = 10_000;
/// An open loop that left more than this part of its sends unmade has not offered the load it was asked for.
const UNSENT_SHARE_MAX: f64 = 0.01;
const BYTES_PER_MIB: f64 = 1_048_576.0;
const NS_PER_S: f64 = 1e9;

/// What a run has found.
pub struct Measured {
    pub tally: Tally,
    pub verdict: Verdict,
    /// From the first connect to the last login.
    pub connect_s: f64,
    /// Length of the measured window.
    pub seconds: f64,
    /// When the measured window began.
    pub since: SystemTime,
    /// From the start of the warm-up to the end of the window.
    pub points: Vec<Point>,
    /// By the server's metrics page.
    pub told: Told,
    /// The servers.
    pub targets: Vec<SocketAddr>,
}

/// One of several targets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeUse {
    pub target: SocketAddr,
    /// That live on it.
    pub clients: usize,
    /// Used inside the measured window; at its end.
    pub cpu_s: Option<f64>,
    pub rss_bytes: Option<u64>,
}

/// Of several targets what each has used.
fn node_uses(plan: &Plan, targets: &[SocketAddr], [before, after]: [&Samples; 2]) -> Vec<NodeUse> {
    if targets.len() < 2 {
        return Vec::new();
    }
    let mut uses = Vec::new();
    for (at, (target, (before, after))) in targets.iter().zip(before.nodes.iter().zip(&after.nodes)).enumerate() {
        uses.push(NodeUse {
            target: *target,
            clients: plan.homes.iter().filter(|home| usize::from(**home) == at).count(),
            cpu_s: before.zip(*after).map(|(before, after)| after.cpu_s - before.cpu_s),
            rss_bytes: after.map(|sample| sample.rss_bytes),
        });
    }
    uses
}

/// What the pages and logs are drawn from and the JSON object has no room for.
#[derive(Clone, Debug)]
pub struct Detail {
    pub since: SystemTime,
    pub ack_us: Histogram<u64>,
    pub deliver_us: Histogram<u64>,
    pub slow_deliver_us: Histogram<u64>,
    pub intervals: Intervals,
    pub points: Vec<Point>,
}

/// Percentiles in µs; all 0 when nothing was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Latency {
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

impl Latency {
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max: histogram.max() }
    }
}

/// How late the generator itself was, in µs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Lag {
    pub p99: u64,
    pub max: u64,
}

/// The JSON object; the fields' names are the keys. `null` where a figure does not apply or could not be had.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub version: &'static str,
    #[serde(flatten)]
    pub machine: Machine,
    pub valid: bool,
    pub scenario: &'static str,
    pub class: &'static str,
    /// What an acknowledgement means.
    pub durability: &'static str,
    pub clients: u32,
    /// Closed loop only.
    pub window: Option<u32>,
    /// Open loop only: messages a second in all.
    pub rate: Option<f64>,
    pub payload_bytes: usize,
    #[serde(rename = "loop")]
    pub loop_kind: &'static str,
    pub seconds: f64,
    pub sent_per_s: f64,
    pub accepted_per_s: f64,
    pub delivered_per_s: f64,
    /// From the intended send time to SEND_ACK, and to the first DELIVER.
    pub ack_us: Latency,
    pub deliver_us: Latency,
    /// The same to the receivers that read slowly on purpose.
    pub slow_deliver_us: Option<Latency>,
    pub connect_s: f64,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
    /// Everything else that went wrong, by name.
    pub errors: BTreeMap<&'static str, u64>,
    /// Open loop only.
    pub generator_lag_us: Option<Lag>,
    /// Used by the server inside the measured window; at its end.
    pub server_cpu_s: Option<f64>,
    pub server_rss_bytes: Option<u64>,
    /// With several targets, of each; what is said of the server is said of all together.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeUse>,
    /// Used by the generator's process inside the measured window.
    pub generator_cpu_s: Option<f64>,
    /// What the server's metrics page counted in the window.
    pub server_metrics: Told,
    pub commit: &'static str,
    /// Why the run is not valid.
    #[serde(skip)]
    pub invalid_because: Vec<String>,
    /// What the table shows and the JSON does not.
    #[serde(skip)]
    pub notes: Vec<(&'static str, String)>,
    #[serde(skip)]
    pub detail: Detail,
}

impl Report {
    /// `samples` are those of the start and the end of the measured window.
    pub fn new(plan: &Plan, measured: Measured, samples: [Samples; 2], machine: Machine) -> Self {
        let Measured { tally, verdict, connect_s, seconds, since, points, told, targets } = measured;
        let [before, after] = &samples;
        let nodes = node_uses(plan, &targets, [before, after]);
        let per_s = |count: u64| per_s_of(count as f64, seconds);
        let server_cpu_s = before.server.zip(after.server).map(|(before, after)| after.cpu_s - before.cpu_s);
        let (window, rate, lag) = match plan.pace {
            Pace::Closed { window } => (Some(window), None, None),
            Pace::Open { period_ns } => {
                let rate = f64::from(plan.senders()) * NS_PER_S / period_ns as f64;
                let lag = Lag { p99: tally.lag_us.value_at_quantile(0.99), max: tally.lag_us.max() };
                (None, Some(rate), Some(lag))
            }
        };
        let generator_cpu_s = before.generator.zip(after.generator).map(|(before, after)| after.cpu_s - before.cpu_s);
        let invalid_because = doubts(&tally, lag, generator_cpu_s.map(|cpu_s| per_s_of(cpu_s, seconds)));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            machine,
            valid: invalid_because.is_empty(),
            scenario: plan.scenario.name(),
            class: class_name(plan.class),
            durability: durability(plan.class),
            clients: plan.clients(),
            window,
            rate,
            payload_bytes: plan.payload_bytes,
            loop_kind: plan.pace.name(),
            seconds,
            sent_per_s: per_s(tally.sent),
            accepted_per_s: per_s(tally.accepted),
            delivered_per_s: per_s(tally.delivered),
            ack_us: Latency::of(&tally.ack_us),
            deliver_us: Latency::of(&tally.deliver_us),
            slow_deliver_us: (!tally.slow_deliver_us.is_empty()).then(|| Latency::of(&tally.slow_deliver_us)),
            connect_s,
            lost: verdict.lost,
            duplicated: verdict.duplicated,
            reordered: verdict.reordered,
            errors: errors(&tally, &verdict),
            generator_lag_us: lag,
            server_cpu_s,
            server_rss_bytes: after.server.map(|sample| sample.rss_bytes),
            nodes,
            generator_cpu_s,
            server_metrics: told,
            commit: env!("RINGLINE_COMMIT"),
            invalid_because,
            notes: notes(&tally, &verdict, &samples, seconds),
            detail: Detail {
                since,
                ack_us: tally.ack_us,
                deliver_us: tally.deliver_us,
                slow_deliver_us: tally.slow_deliver_us,
                intervals: tally.intervals,
                points,
            },
        }
    }

    /// Whether the server kept its promises: nothing lost, doubled, reordered, damaged or unanswered, nobody cut off.
    pub fn clean(&self) -> bool {
        let broken = self.errors.keys().any(|name| BROKEN.contains(name) || name.starts_with("DISCONNECTED"));
        self.lost == 0 && self.duplicated == 0 && self.reordered == 0 && !broken
    }

    /// The JSON text, one object on one line.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// What was run, in one line.
    pub fn title(&self) -> String {
        let pace = match (self.window, self.rate) {
            (Some(window), _) => format!("closed loop, {window} in flight"),
            (None, rate) => format!("open loop, {:.0} msg/s", rate.unwrap_or_default()),
        };
        format!(
            "{} {} messages of {} bytes, {} clients, {pace}, {} s",
            self.scenario, self.class, self.payload_bytes, self.clients, self.seconds
        )
    }

    /// Every figure with its name, in the order of the table.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        row("connected in", format!("{:.2} s", self.connect_s));
        row("sent", format!("{:.0}/s", self.sent_per_s));
        row("accepted", format!("{:.0}/s", self.accepted_per_s));
        row("delivered", format!("{:.0}/s", self.delivered_per_s));
        for (name, latency) in [("send to ack, ms", self.ack_us), ("send to delivery, ms", self.deliver_us)] {
            row(name, latency_row(latency));
        }
        if let Some(latency) = self.slow_deliver_us {
            row("to slow readers, ms", latency_row(latency));
        }
        if let Some(lag) = self.generator_lag_us {
            row("generator lag, ms", format!("p99 {}  max {}", ms(lag.p99), ms(lag.max)));
        }
        row("lost", self.lost.to_string());
        row("duplicated", self.duplicated.to_string());
        row("reordered", self.reordered.to_string());
        for (name, count) in &self.errors {
            row(name, count.to_string());
        }
        for (name, value) in &self.notes {
            row(name, value.clone());
        }
        for NodeUse { target, clients, cpu_s, .. } in &self.nodes {
            let cpu = cpu_s.map_or("not found".to_owned(), |cpu_s| cpu_share(cpu_s, self.seconds));
            row(&format!("node {target}"), format!("{cpu}, {clients} clients"));
        }
        rows.extend(self.server_metrics.rows(self.seconds));
        rows
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = self.title() + "\n";
        for (name, value) in self.rows() {
            let _ = writeln!(text, "  {name:<24} {value}");
        }
        for why in &self.invalid_because {
            let _ = writeln!(text, "INVALID: {why}");
        }
        text
    }
}

/// Names in `errors` that break a promise; the others are answers that the protocol foresees.
const BROKEN: [&str; 5] = ["CORRUPT", "MISDELIVERED", "UNANSWERED", "DUP_WITHOUT_RETRY", "UNEXPECTED_ANSWER"];

fn errors(tally: &Tally, verdict: &Verdict) -> BTreeMap<&'static str, u64> {
    let mut errors = tally.incidents.clone();
    let more = [
        ("CORRUPT", verdict.corrupt),
        ("MISDELIVERED", verdict.misdelivered),
        ("UNANSWERED", tally.unanswered + tally.abandoned),
        ("GIVEN_UP", tally.given_up),
        ("UNSENT", tally.unsent),
    ];
    errors.extend(more.into_iter().filter(|&(_, count)| count > 0));
    errors
}

fn per_s_of(amount: f64, seconds: f64) -> f64 {
    amount / seconds.max(f64::MIN_POSITIVE)
}

/// Why the figures say little about the server. `cores` is what the generator used of them.
fn doubts(tally: &Tally, lag: Option<Lag>, cores: Option<f64>) -> Vec<String> {
    let mut doubts = Vec::new();
    if let Some(lag) = lag.filter(|lag| lag.p99 > LAG_US_MAX) {
        let (is, may) = (ms(lag.p99), ms(LAG_US_MAX));
        let used = cores.map_or_else(String::new, |cores| format!(" and used {cores:.2} cores"));
        doubts.push(format!(
            "the generator was {is} ms late at p99, more than {may} ms{used}: if its cores were full, give it more \
             (--cores) or less to do; if not, something else kept this machine busy"
        ));
    }
    let due = tally.ever_sent + tally.unsent;
    if tally.unsent as f64 > UNSENT_SHARE_MAX * due as f64 {
        let unsent = tally.unsent;
        doubts.push(format!("{unsent} of {due} sends were due and never made: the server left too many unanswered"));
    }
    if tally.sent == 0 {
        doubts.push("nothing was sent inside the measured window".to_owned());
    }
    doubts
}

/// What a SEND_ACK says about the message, by the server's promise.
fn durability(class: Class) -> &'static str {
    match class {
        Class::Durable => {
            "durable: acknowledged after its record is on disk (fdatasync by batch, or as the server's backend says)"
        }
        Class::Transient => "transient: forwarded, never stored",
    }
}

fn cpu_share(cpu_s: f64, seconds: f64) -> String {
    format!("{cpu_s:.2} s ({:.0} % of a core)", 100.0 * cpu_s / seconds)
}

fn notes(tally: &Tally, verdict: &Verdict, samples: &[Samples; 2], seconds: f64) -> Vec<(&'static str, String)> {
    let [before, after] = samples;
    let mut notes = Vec::new();
    let counts = [
        ("late after a retry", verdict.late_by_retry),
        ("fetched after LAGGED", tally.fetched),
        ("of other runs", verdict.other_runs),
        ("own messages echoed", verdict.echoed),
        ("unread by slow readers", verdict.unread),
    ];
    notes.extend(counts.into_iter().filter(|&(_, count)| count > 0).map(|(name, count)| (name, count.to_string())));
    let share = |cpu_s| cpu_share(cpu_s, seconds);
    match before.server.zip(after.server) {
        Some((before, after)) => {
            notes.push(("server CPU", share(after.cpu_s - before.cpu_s)));
            let [from, to] = [before, after].map(|sample| sample.rss_bytes as f64 / BYTES_PER_MIB);
            notes.push(("server memory", format!("{from:.1} MiB at the start, {to:.1} MiB at the end")));
        }
        None => notes.push(("server process", "not found: pass --server-pid".to_owned())),
    }
    if let Some((before, after)) = before.generator.zip(after.generator) {
        notes.push(("generator CPU", share(after.cpu_s - before.cpu_s)));
    }
    notes
}

fn class_name(class: Class) -> &'static str {
    match class {
        Class::Durable => "durable",
        Class::Transient => "transient",
    }
}

/// Microseconds as milliseconds with three decimals.
pub fn ms(us: u64) -> String {
    format!("{}.{:03}", us / 1_000, us % 1_000)
}

/// Milliseconds, for people.
pub fn latency_row(latency: Latency) -> String {
    let Latency { p50, p90, p99, p999, max } = latency;
    format!("p50 {}  p90 {}  p99 {}  p99.9 {}  max {}", ms(p50), ms(p90), ms(p99), ms(p999), ms(max))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::metrics::tests::told;
    use crate::plan::Scenario;
    use crate::plan::tests::plan;
    use crate::server_process::Sample;
    use crate::tally::{Disconnect, Incident, record};

    const OPEN: Pace = Pace::Open { period_ns: 4_000_000 };

    pub(crate) fn machine() -> Machine {
        Machine {
            kernel: "6.18".into(),
            cpus: 2,
            cpu_model: "Test <CPU>".into(),
            memory_gib: Some(8.0),
            mitigations: "active: retbleed".into(),
            governor: "performance".into(),
            nic: "loopback".into(),
            server_command_line: "ringline serve".into(),
            command_line: "ringline-bench run".into(),
        }
    }

    pub(crate) fn report(pace: Pace, tally: Tally, verdict: Verdict) -> Report {
        let machine = machine();
        let samples = [1.0, 3.5].map(|cpu_s| {
            let sample = Some(Sample { cpu_s, rss_bytes: 1 << 20, ..Sample::default() });
            Samples { server: sample, nodes: vec![sample], generator: sample }
        });
        let point = |step: u32| Point {
            at_s: f64::from(step) * 0.25,
            sent: u64::from(step) * 25,
            accepted: u64::from(step) * 25,
            delivered: u64::from(step) * 24,
            server_cpu_s: Some(f64::from(step) * 0.2),
            generator_cpu_s: Some(f64::from(step) * 0.1),
        };
        let points = (0..9).map(point).collect();
        let since = SystemTime::UNIX_EPOCH;
        let targets = vec![SocketAddr::from(([127, 0, 0, 1], 9_700))];
        let (connect_s, seconds, told) = (0.5, 2.0, told());
        let measured = Measured { tally, verdict, connect_s, seconds, since, points, told, targets };
        Report::new(&plan(Scenario::Pair, pace, 4), measured, samples, machine)
    }

    pub(crate) fn sent(count: u64) -> Tally {
        Tally { sent: count, ever_sent: count, accepted: count, delivered: count, ..Tally::default() }
    }

    #[test]
    fn the_json_has_exactly_the_agreed_keys() {
        let json: serde_json::Value =
            serde_json::from_str(&report(OPEN, sent(10), Verdict::default()).json().unwrap()).unwrap();
        let mut keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        let mut agreed = "scenario class clients window rate payload_bytes loop seconds sent_per_s accepted_per_s \
            delivered_per_s ack_us deliver_us connect_s lost duplicated reordered errors generator_lag_us server_cpu_s \
            server_rss_bytes commit kernel cpus valid version command_line cpu_model memory_gib mitigations governor nic \
            server_command_line durability slow_deliver_us server_metrics generator_cpu_s"
            .split_whitespace()
            .collect::<Vec<_>>();
        agreed.sort_unstable();
        assert_eq!(keys, agreed);
        for key in ["p50", "p90", "p99", "p999", "max"] {
            assert!(json["ack_us"][key].is_u64() && json["deliver_us"][key].is_u64(), "{key}");
        }
        assert_eq!((json["loop"].as_str(), json["rate"].as_f64()), (Some("open"), Some(1_000.0)));
        assert_eq!((json["sent_per_s"].as_f64(), json["server_cpu_s"].as_f64()), (Some(5.0), Some(2.5)));
        assert!(json["window"].is_null() && json["generator_lag_us"]["p99"].is_u64());
        let closed = report(Pace::Closed { window: 3 }, sent(10), Verdict::default());
        assert_eq!((closed.window, closed.rate, closed.generator_lag_us), (Some(3), None, None));
    }

    #[test]
    fn a_late_generator_or_an_unmade_load_is_invalid() {
        assert!(report(OPEN, sent(10), Verdict::default()).valid);
        let mut late = sent(10);
        (0..10).for_each(|_| record(&mut late.lag_us, 0, 11_000_000));
        let late = report(OPEN, late, Verdict::default());
        assert!(!late.valid && late.clean() && late.table().contains("INVALID: the generator"));
        let unsent = report(OPEN, Tally { unsent: 5, ..sent(100) }, Verdict::default());
        assert!(!unsent.valid && unsent.errors["UNSENT"] == 5);
        assert!(!report(OPEN, Tally::default(), Verdict::default()).valid);
    }

    #[test]
    fn broken_promises_are_not_clean_and_foreseen_answers_are() {
        let verdicts = [
            Verdict { lost: 1, ..Verdict::default() },
            Verdict { duplicated: 1, ..Verdict::default() },
            Verdict { reordered: 1, ..Verdict::default() },
            Verdict { corrupt: 1, ..Verdict::default() },
            Verdict { misdelivered: 1, ..Verdict::default() },
        ];
        for verdict in verdicts {
            assert!(!report(OPEN, sent(10), verdict).clean(), "{verdict:?}");
        }
        assert!(!report(OPEN, Tally { abandoned: 1, ..sent(10) }, Verdict::default()).clean());
        let with = |incident| {
            let mut tally = sent(10);
            tally.count(incident);
            report(OPEN, tally, Verdict::default()).clean()
        };
        assert!(with(Incident::Refused(ringline_schema::errors::ErrorCode::Busy)) && with(Incident::Lagged));
        assert!(!with(Incident::Disconnected(Disconnect::Reset)));
    }

    #[test]
    fn the_table_shows_what_was_measured() {
        let mut tally = sent(10);
        record(&mut tally.ack_us, 0, 1_250_000);
        tally.count(Incident::Lagged);
        let text =
            report(Pace::Closed { window: 3 }, tally, Verdict { late_by_retry: 2, ..Verdict::default() }).table();
        for part in [
            "store commits",
            "50/s, 20.0 records each",
            "closed loop, 3 in flight",
            "p50 1.250",
            "LAGGED",
            "late after a retry",
            "server CPU",
            "125 % of a core",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn several_targets_have_a_row_each() {
        let mut plan = plan(Scenario::Pair, Pace::Closed { window: 1 }, 4);
        plan.homes = vec![0, 1, 0, 0];
        let targets = [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let sample = |cpu_s| Some(Sample { cpu_s, rss_bytes: 7, ..Sample::default() });
        let before = Samples { nodes: vec![sample(1.0), sample(2.0)], ..Samples::default() };
        let after = Samples { nodes: vec![sample(2.5), None], ..Samples::default() };
        let uses = node_uses(&plan, &targets, [&before, &after]);
        let one = NodeUse { target: targets[0], clients: 3, cpu_s: Some(1.5), rss_bytes: Some(7) };
        let other = NodeUse { target: targets[1], clients: 1, cpu_s: None, rss_bytes: None };
        assert_eq!(uses, [one, other]);
        assert_eq!(node_uses(&plan, &targets[..1], [&before, &after]), []);
    }
}
