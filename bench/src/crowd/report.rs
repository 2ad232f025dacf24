//! What a crowd's run has shown: one JSON object for machines, one table for people. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::seat::{Line, OPS, Sums};
use crate::facts::Machine;
use crate::report::{Lag, Latency, latency_row};

/// One kind of thing that clients did. Latencies from the intended time on, µs.
#[derive(Clone, Debug, Serialize)]
pub struct OpReport {
    pub op: &'static str,
    pub asked: u64,
    pub answered: u64,
    pub answered_per_s: f64,
    pub answer_us: Latency,
    pub delivered: u64,
    pub delivered_per_s: f64,
    pub deliver_us: Latency,
}

/// Devices that came back.
#[derive(Clone, Debug, Serialize)]
pub struct BackReport {
    pub devices: u32,
    pub missed_each: u32,
    pub messages: u64,
    pub pages: u64,
    /// From the first connect to the last page.
    pub seconds: f64,
    pub messages_per_s: f64,
    /// From a device's first SYNC to its last page; and of one page.
    pub device_us: Latency,
    pub page_us: Latency,
}

/// The fields' names are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub struct CrowdReport {
    pub version: &'static str,
    pub commit: &'static str,
    #[serde(flatten)]
    pub machine: Machine,
    pub scenario: &'static str,
    pub what: String,
    pub payload_bytes: usize,
    /// Of the measured window.
    pub seconds: f64,
    pub ops: Vec<OpReport>,
    pub back: Option<BackReport>,
    pub generator_lag_us: Option<Lag>,
    pub server_cpu_s: Option<f64>,
    /// Acknowledged and not arrived; heard of twice; not what was sent; conversations with a hole at the end.
    pub lost: u64,
    pub repeated: u64,
    pub corrupt: u64,
    pub holes: u64,
    /// Asked and never answered.
    pub unanswered: u64,
    pub errors: BTreeMap<&'static str, u64>,
}

fn op(name: &'static str, line: &Line, seconds: f64) -> OpReport {
    let per_s = |count: u64| count as f64 / seconds.max(f64::MIN_POSITIVE);
    OpReport {
        op: name,
        asked: line.asked,
        answered: line.answered,
        answered_per_s: per_s(line.answered),
        answer_us: Latency::of(&line.answer_us),
        delivered: line.delivered,
        delivered_per_s: per_s(line.delivered),
        deliver_us: Latency::of(&line.deliver_us),
    }
}

impl CrowdReport {
    /// Of what all clients counted in `seconds`; nothing of the server, nobody came back.
    pub fn new((scenario, what): (&'static str, String), sums: &Sums, seconds: f64, machine: Machine) -> Self {
        let ops = OPS.into_iter().map(|kind| op(kind.name(), &sums.lines[kind as usize], seconds));
        let lag = sums.lag_us.as_ref().map(|lag| Lag { p99: lag.value_at_quantile(0.99), max: lag.max() });
        Self {
            version: env!("CARGO_PKG_VERSION"),
            commit: env!("RINGLINE_COMMIT"),
            machine,
            scenario,
            what,
            payload_bytes: 0,
            seconds,
            ops: ops.filter(|op| op.asked > 0 || op.delivered > 0).collect(),
            back: None,
            generator_lag_us: lag,
            server_cpu_s: None,
            lost: sums.missing(),
            repeated: sums.repeated,
            corrupt: sums.corrupt,
            holes: sums.holes,
            unanswered: 0,
            errors: sums.errors.clone(),
        }
    }

    /// Whether every promise held: what was acknowledged arrived, once and whole, and everything was answered.
    pub fn clean(&self) -> bool {
        let wrong = [self.lost, self.repeated, self.corrupt, self.holes, self.unanswered];
        wrong.iter().all(|count| *count == 0) && self.errors.is_empty()
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = format!("{}: {}\n", self.scenario, self.what);
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<24} {value}");
        };
        for op in &self.ops {
            row(op.op, format!("{} asked, {} answered ({:.0}/s)", op.asked, op.answered, op.answered_per_s));
            row("  to the answer, ms", latency_row(op.answer_us));
            if op.delivered > 0 {
                row("  delivered", format!("{} ({:.0}/s)", op.delivered, op.delivered_per_s));
                row("  to each delivery, ms", latency_row(op.deliver_us));
            }
        }
        if let Some(back) = &self.back {
            let rate = format!("{} in {:.2} s: {:.0}/s", back.messages, back.seconds, back.messages_per_s);
            row("messages synced", rate);
            row("pages", back.pages.to_string());
            row("a device, ms", latency_row(back.device_us));
            row("a page, ms", latency_row(back.page_us));
        }
        if let Some(lag) = self.generator_lag_us {
            row("generator lag, µs", format!("p99 {}  max {}", lag.p99, lag.max));
        }
        row("server CPU", self.server_cpu_s.map_or_else(|| "unknown".to_owned(), |cpu_s| format!("{cpu_s:.2} s")));
        for (name, count) in [
            ("lost", self.lost),
            ("repeated", self.repeated),
            ("corrupt", self.corrupt),
            ("holes", self.holes),
            ("unanswered", self.unanswered),
        ] {
            row(name, count.to_string());
        }
        for (name, count) in &self.errors {
            row(name, count.to_string());
        }
        text
    }
}
