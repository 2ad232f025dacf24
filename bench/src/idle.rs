//! `idle`: what a logged-in connection costs that says nothing: memory of the server, memory of the kernel, CPU.
//!
//! Owned by the main thread. Clients log in by steps; each step is held and then sampled, and the cost of a connection
//! is the slope over the steps, so that what the server holds without clients is not counted. A server started here has
//! seen all users before and was started again: what a new user costs its store is no cost of a connection. Invariant: the server's own
//! memory and the kernel's are told apart, and the kernel's says how many ends of each connection it holds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use ringline_schema::message::Class;
use serde::Serialize;

use crate::Failure;
use crate::cli::{Cores, FleetArgs, parse_cores, parse_seconds};
use crate::compare::peers::{self, Row};
use crate::facts::Machine;
use crate::launch::Running;
use crate::plan::{Pace, Plan, Scenario, Slow};
use crate::run::{FILES_EXTRA, Fleet, raise_file_limit};
use crate::server_process::{self, KernelMemory, Sample};
use crate::stamp::STAMP_BYTES;
use crate::wire::ringline::Mode;

const CLIENTS_MAX: i64 = 1_000_000;
const BYTES_PER_MIB: f64 = 1_048_576.0;
const PERCENT: f64 = 100.0;

#[derive(Clone, Debug, Args)]
pub struct IdleArgs {
    #[command(flatten)]
    pub fleet: FleetArgs,
    /// Clients that are logged in at each step, rising; the cost of a connection is the slope over the steps
    #[arg(long, value_delimiter = ',', default_value = "0,5000,10000,15000", value_name = "CLIENTS,...",
        value_parser = clap::value_parser!(u32).range(0..=CLIENTS_MAX))]
    pub steps: Vec<u32>,
    /// Seconds that each step is held before it is sampled, pinging as the server asks
    #[arg(long, default_value = "5", value_name = "SECONDS", value_parser = parse_seconds)]
    pub hold: f64,
    /// Without --target: cores that the server is pinned on
    #[arg(long, default_value = "0", value_parser = parse_cores)]
    pub server_cores: Cores,
    /// Without --target: our server's binary [default: ringline beside this one]
    #[arg(long, value_name = "FILE")]
    pub ringline: Option<PathBuf>,
    /// Without --target: folder for the server's data, removed at the end [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Write the result as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// One step, at the end of its hold. `null`: no server process was found, or `/proc` does not tell.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Step {
    pub clients: u32,
    /// From the first connect of this step to its last login.
    pub login_s: f64,
    pub server_rss_bytes: Option<u64>,
    /// Its anonymous part (RssAnon): without mapped files, such as the program itself.
    pub server_rss_anon_bytes: Option<u64>,
    /// Of the whole machine.
    #[serde(flatten)]
    pub kernel: KernelMemory,
    /// Of the server, for the logins and in the hold.
    pub server_cpu_login_s: Option<f64>,
    pub server_cpu_hold_s: Option<f64>,
    /// Of all the server's threads, in the hold.
    pub server_context_switches: Option<u64>,
}

/// Bytes a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Slopes {
    pub server_rss: Option<f64>,
    pub server_rss_anon: Option<f64>,
    /// One socket end: divided by [`IdleReport::socket_ends`].
    pub kernel_tcp: Option<f64>,
    pub kernel_slab_unreclaimable: Option<f64>,
    pub kernel_slab_reclaimable: Option<f64>,
}

/// What idle clients cost. The fields' names are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub struct IdleReport {
    pub version: &'static str,
    pub commit: &'static str,
    #[serde(flatten)]
    pub machine: Machine,
    pub hold_s: f64,
    pub steps: Vec<Step>,
    /// Ends of each connection that this machine's kernel holds: 2 if the server runs here too.
    pub socket_ends: u32,
    /// By least squares over the steps.
    pub bytes_per_client: Slopes,
    /// From the first step to the last, whatever lies between: what is taken once for many counts in full.
    pub bytes_per_client_end_to_end: Slopes,
    pub pings: u64,
    pub disconnected: u64,
    pub errors: BTreeMap<&'static str, u64>,
}

impl IdleArgs {
    fn clients(&self) -> u32 {
        self.steps.last().copied().unwrap_or_default()
    }

    fn check(&self) -> Result<(), Failure> {
        let rises = self.steps.iter().zip(self.steps.iter().skip(1)).all(|(step, next)| step < next);
        if self.steps.len() < 2 || !rises {
            let why = "--steps: two numbers of clients at least, each larger than the one before";
            return Err(Failure::Usage(why.to_owned()));
        }
        self.fleet.check_single()?;
        if self.fleet.target.is_empty() && self.fleet.issuer_key.is_some() {
            return Err(Failure::Usage("--issuer-key is that of a --target: name it too".to_owned()));
        }
        Ok(())
    }

    /// Nothing is ever sent.
    fn plan(&self) -> Result<Plan, Failure> {
        Ok(Plan {
            scenario: Scenario::SelfChat,
            slow: Slow { percent: 0, bytes_per_s: 0 },
            interval_ns: None,
            class: Class::Transient,
            no_reply: false,
            pace: Pace::Closed { window: 1 },
            payload_bytes: STAMP_BYTES,
            run: 0,
            client_seq_base: 1,
            ack_cursors: false,
            names: self.fleet.names(self.clients())?,
            homes: Vec::new(),
        })
    }

    /// Our server, started here, and how to reach it.
    fn own_server(&self) -> Result<(Running, FleetArgs), Failure> {
        let row = Row::Ringline(Mode::Transient);
        let program = row.program(self.ringline.as_deref()).map_err(Failure::Failed)?;
        let folder = self.data_dir.clone().unwrap_or_else(std::env::temp_dir);
        let Cores(cores) = &self.server_cores;
        // It inherits the limit: one socket a client on its side too.
        raise_file_limit(u64::from(self.clients()) + FILES_EXTRA)?;
        let mut server = peers::start(row, &program, (cores, &folder))?;
        server.issuer()?;
        self.make_users(&self.fleet_of(&server))?;
        server.restart()?;
        let fleet = self.fleet_of(&server);
        Ok((server, fleet))
    }

    /// A first login makes a user, which the store keeps for ever: that is no cost of a connection.
    fn make_users(&self, fleet: &FleetArgs) -> Result<(), Failure> {
        let fleet = Fleet::start(fleet, &Arc::new(self.plan()?), 0)?;
        fleet.admit(self.clients());
        fleet.wait_for_logins(u64::from(self.clients()))?;
        fleet.finish().map(drop)
    }

    fn fleet_of(&self, server: &Running) -> FleetArgs {
        FleetArgs {
            target: vec![server.target],
            issuer_key: Some(server.issuer_key()),
            server_pid: Some(server.pid),
            ..self.fleet.clone()
        }
    }
}

/// Logs the clients in, step by step, and holds them.
pub fn idle(args: &IdleArgs) -> Result<IdleReport, Failure> {
    args.check()?;
    let (own, fleet_args) = if args.fleet.target.is_empty() {
        args.own_server().map(|(server, fleet)| (Some(server), fleet))?
    } else {
        (None, args.fleet.clone())
    };
    let server = fleet_args.server();
    let machine = Machine::here(fleet_args.target(), server);
    let plan = Arc::new(args.plan()?);
    let mut fleet = Fleet::start(&fleet_args, &plan, 0)?;
    let mut steps = Vec::new();
    for &clients in &args.steps {
        let explained = |failure: Failure| match &own {
            Some(server) => Failure::Failed(format!("{failure} (server: {})", server.last_words())),
            None => failure,
        };
        steps.push(step(&mut fleet, clients, (server, args.hold)).map_err(explained)?);
    }
    let desk = fleet.finish()?;
    let socket_ends = if server.is_some() { 2 } else { 1 };
    Ok(IdleReport {
        version: env!("CARGO_PKG_VERSION"),
        commit: env!("RINGLINE_COMMIT"),
        machine,
        hold_s: args.hold,
        bytes_per_client: Slopes::of(&steps.iter().collect::<Vec<_>>(), socket_ends),
        bytes_per_client_end_to_end: Slopes::of(
            &[steps.first(), steps.last()].into_iter().flatten().collect::<Vec<_>>(),
            socket_ends,
        ),
        steps,
        socket_ends,
        pings: desk.tally.pings,
        disconnected: desk.tally.disconnected,
        errors: desk.tally.incidents,
    })
}

fn step(fleet: &mut Fleet, clients: u32, (server, hold_s): (Option<u32>, f64)) -> Result<Step, Failure> {
    let sample = || server.and_then(server_process::sample);
    let switches = || server.and_then(server_process::context_switches);
    let (before, began) = (sample(), Instant::now());
    fleet.admit(clients);
    fleet.wait_for_logins(u64::from(clients))?;
    let login_s = began.elapsed().as_secs_f64();
    let (logged_in, switched) = (sample(), switches());
    fleet.hold(hold_s)?;
    let (held, switched_held) = (sample(), switches());
    let cpu = |from: Option<Sample>, to: Option<Sample>| from.zip(to).map(|(from, to)| to.cpu_s - from.cpu_s);
    Ok(Step {
        clients,
        login_s,
        server_rss_bytes: held.map(|sample| sample.rss_bytes),
        server_rss_anon_bytes: held.map(|sample| sample.rss_anon_bytes),
        kernel: KernelMemory::now(),
        server_cpu_login_s: cpu(before, logged_in),
        server_cpu_hold_s: cpu(logged_in, held),
        server_context_switches: switched.zip(switched_held).map(|(from, to)| to.saturating_sub(from)),
    })
}

impl Slopes {
    fn of(steps: &[&Step], socket_ends: u32) -> Self {
        let of = |figure: fn(&Step) -> Option<u64>| {
            let points: Option<Vec<(f64, f64)>> =
                steps.iter().map(|step| Some((f64::from(step.clients), figure(step)? as f64))).collect();
            slope(&points?)
        };
        let an_end = |figure| of(figure).map(|bytes| bytes / f64::from(socket_ends.max(1)));
        Self {
            server_rss: of(|step| step.server_rss_bytes),
            server_rss_anon: of(|step| step.server_rss_anon_bytes),
            kernel_tcp: an_end(|step| step.kernel.tcp_bytes),
            kernel_slab_unreclaimable: an_end(|step| step.kernel.slab_unreclaimable_bytes),
            kernel_slab_reclaimable: an_end(|step| step.kernel.slab_reclaimable_bytes),
        }
    }
}

/// The slope of the line with the least squared distance from the points; `None` if they have but one x.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |figure: fn(&(f64, f64)) -> f64| points.iter().map(figure).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let (mut both, mut spread) = (0.0, 0.0);
    for (x, y) in points {
        both += (x - x_mean) * (y - y_mean);
        spread += (x - x_mean) * (x - x_mean);
    }
    (spread > 0.0).then(|| both / spread)
}

/// Picks one of the slopes.
type Figure = fn(&Slopes) -> Option<f64>;

impl IdleReport {
    /// Whether nobody was disconnected.
    pub fn clean(&self) -> bool {
        self.disconnected == 0
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = format!("idle clients by steps, each held {} s\n", self.hold_s);
        let _ = writeln!(
            text,
            "  {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11}",
            "clients", "logins/s", "RSS", "RssAnon", "TCP mem", "slab unr.", "slab rec.", "idle CPU", "switches/s"
        );
        let mut before = 0;
        for step in &self.steps {
            text.push_str(&self.row(step, step.clients.saturating_sub(before)));
            before = step.clients;
        }
        text.push_str("  memory in MiB; TCP mem and slab are the whole machine's; CPU in % of a core\n\n");
        text.push_str("a logged-in idle connection costs, in bytes:\n");
        self.costs(&mut text);
        let _ = writeln!(text, "  {:<34} {}", "pings sent", self.pings);
        for (name, count) in &self.errors {
            let _ = writeln!(text, "  {name:<34} {count}");
        }
        text
    }

    fn row(&self, step: &Step, new: u32) -> String {
        let mib = |bytes: Option<u64>| {
            bytes.map_or_else(|| "?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / BYTES_PER_MIB))
        };
        let held_s = self.hold_s.max(f64::MIN_POSITIVE);
        let shown = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "?".to_owned(), |value| format!("{:.digits$}", value / held_s))
        };
        let logins = if new == 0 { "-".to_owned() } else { format!("{:.0}", f64::from(new) / step.login_s.max(1e-9)) };
        format!(
            "  {:>8} {logins:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11}\n",
            step.clients,
            mib(step.server_rss_bytes),
            mib(step.server_rss_anon_bytes),
            mib(step.kernel.tcp_bytes),
            mib(step.kernel.slab_unreclaimable_bytes),
            mib(step.kernel.slab_reclaimable_bytes),
            shown(step.server_cpu_hold_s.map(|cpu_s| cpu_s * PERCENT), 2),
            shown(step.server_context_switches.map(|count| count as f64), 0),
        )
    }

    fn costs(&self, text: &mut String) {
        let figures: [(&str, Figure); 5] = [
            ("server, RssAnon (its own memory)", |slopes| slopes.server_rss_anon),
            ("server, whole RSS", |slopes| slopes.server_rss),
            ("kernel, slab unreclaimable", |slopes| slopes.kernel_slab_unreclaimable),
            ("kernel, slab reclaimable", |slopes| slopes.kernel_slab_reclaimable),
            ("kernel, TCP buffers", |slopes| slopes.kernel_tcp),
        ];
        let shown = |bytes: Option<f64>| bytes.map_or_else(|| "unknown".to_owned(), |bytes| format!("{bytes:.0}"));
        let _ = writeln!(text, "  {:<34} {:>14} {:>14}", "", "least squares", "first to last");
        for (name, figure) in figures {
            let (fitted, ends) = (figure(&self.bytes_per_client), figure(&self.bytes_per_client_end_to_end));
            let _ = writeln!(text, "  {name:<34} {:>14} {:>14}", shown(fitted), shown(ends));
        }
        text.push_str(
            "  Server: the two differ where it took memory once for many connections. It gives back what logins needed \
             for\n  a while only slowly, so hold the steps longer to leave that out.\n",
        );
        text.push_str(match self.socket_ends {
            2 => {
                "  Kernel: the figures are the machine's, divided by the two ends of each connection, because the \
                 clients'\n  ends are on this machine too. Reclaimable slab holds the sockets' inodes, and file caches \
                 that come and go.\n  What the kernel still gives back of earlier runs makes them too low: run it alone, \
                 a minute after others.\n"
            }
            _ => {
                "  No server process was found on this machine (pass --server-pid), so the kernel's figures are those \
                 of the\n  clients' ends alone.\n"
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_the_line_and_no_start_counts() {
        assert_eq!(slope(&[(0.0, 900.0), (10.0, 1_000.0), (20.0, 1_100.0)]), Some(10.0));
        assert_eq!(slope(&[(0.0, 0.0), (1.0, 2.0), (2.0, 1.0)]), Some(0.5));
        assert_eq!(slope(&[(3.0, 1.0), (3.0, 2.0)]), None);
        assert_eq!(slope(&[]), None);
    }

    fn step(clients: u32) -> Step {
        let bytes = |start: u64, each: u64| Some(start + each * u64::from(clients));
        Step {
            clients,
            server_rss_bytes: bytes(9_000, 300),
            server_rss_anon_bytes: bytes(7_000, 200),
            kernel: KernelMemory {
                tcp_bytes: None,
                slab_unreclaimable_bytes: bytes(1 << 30, 4_000),
                slab_reclaimable_bytes: bytes(1 << 30, 1_000),
            },
            ..Step::default()
        }
    }

    #[test]
    fn the_kernels_share_is_that_of_one_end() {
        let steps = [0, 100, 200].map(step);
        let steps: Vec<&Step> = steps.iter().collect();
        let slopes = Slopes::of(&steps, 2);
        assert_eq!((slopes.server_rss, slopes.server_rss_anon, slopes.kernel_tcp), (Some(300.0), Some(200.0), None));
        assert_eq!(slopes.kernel_slab_unreclaimable, Some(2_000.0));
        assert_eq!(slopes.kernel_slab_reclaimable, Some(500.0));
        assert_eq!(Slopes::of(&steps, 1).kernel_slab_unreclaimable, Some(4_000.0));
    }

    #[test]
    fn steps_rise() {
        use crate::cli::{Cli, Command};
        use clap::Parser;
        for (steps, good) in [("0,10", true), ("10", false), ("10,10", false), ("10,5", false), ("1,2,3", true)] {
            let line = ["ringline-bench", "idle", "--steps", steps];
            let Command::Idle(args) = Cli::try_parse_from(line).unwrap().command else { unreachable!() };
            assert_eq!(args.check().is_ok(), good, "{steps}");
        }
    }
}
