//! The command line, and the checks that turn it into a [`Plan`].
//!
//! Main thread only. Every default is written here, once.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ringline_schema::ids::{UserName, body_hash};
use ringline_schema::limits::{FRAME_BYTES_MAX, MESSAGE_OVERHEAD_BYTES_MAX};
use ringline_schema::message::Class;

use crate::Failure;
use crate::compare::cli::Contest;
use crate::crowd::{Crowd, CrowdArgs};
use crate::idle::IdleArgs;
use crate::intervals;
use crate::place::{Pairs, settle};
use crate::plan::{Pace, Plan, Scenario, Slow, names};
use crate::search::SearchArgs;
use crate::stamp::STAMP_BYTES;
use crate::storm::StormArgs;
use crate::torture::TortureArgs;

/// The largest payload that fits a default frame.
const PAYLOAD_BYTES_MAX: u32 = FRAME_BYTES_MAX - MESSAGE_OVERHEAD_BYTES_MAX;
/// Clients of one generator process.
const CLIENTS_MAX: u32 = 1_000_000;
/// Sends in flight a client; the server usually allows fewer and says so at login.
const WINDOW_MAX: u32 = 1024;
const DEFAULT_CORE: usize = 1;
const DEFAULT_TARGET: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_700);
const DEFAULT_ISSUER_KEY: &str = "./ringline-data/issuer.pem";
const NS_PER_S: u64 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;
/// Phases longer than a day are a slip of the keyboard.
const PHASE_S_MAX: f64 = 86_400.0;

/// Load generator of Ringline.
///
/// Simulates many clients on few threads, measures latency from the intended send time, and checks every single message
/// for loss, duplicates and order. Start the server first; the generator needs its issuer key.
#[derive(Debug, Parser)]
#[command(name = "ringline-bench", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Send messages, measure, check
    ///
    /// Phases: connect and log in, warm-up, measured window, drain. Warm-up is left out of rates and latencies but not
    /// out of the checks for loss, duplicates and order.
    ///
    /// Exit code: 0 all well; 1 a message was lost, doubled, reordered, damaged or never answered, a client was
    /// disconnected, or the run could not be done; 2 wrong usage.
    Run(RunArgs),
    /// Log in many clients and hold them idle: seconds to log in, server memory per client
    ///
    /// Exit code: 0 all well; 1 a client was disconnected or the run could not be done; 2 wrong usage.
    Idle(IdleArgs),
    /// Connect and log in as fast as the server takes it, then drop and reconnect clients at a steady rate
    ///
    /// Shows logins a second, login latency, and what was refused or failed, by name. A client whose login fails or
    /// whose connection is closed comes back after a back-off with full jitter, 0.2 s to 30 s.
    ///
    /// Exit code: 0 every client is logged in at the end; 1 some are not, or the run could not be done; 2 wrong usage.
    Storm(StormArgs),
    /// Kill, stop, cut off, leave without disk and restart a server under mixed traffic, and check what its clients saw
    ///
    /// Starts a server of its own. Every accepted message must be there afterwards, once, at its place; every stream
    /// without gap and repetition; and so on: the same checker judges the simulator's runs.
    ///
    /// Exit code: 0 every promise held; 1 one did not, or the run could not be done; 2 wrong usage.
    Torture(TortureArgs),
    #[command(flatten)]
    Contest(Contest),
}

/// What both commands need.
#[derive(Clone, Debug, Args)]
pub struct FleetArgs {
    /// Cores of the generator's threads, such as 1 or 0-3,8 [default: 1, or 0 on a machine with one core]
    #[arg(long, value_parser = parse_cores)]
    pub cores: Option<Cores>,
    /// Generator threads, dealt round the cores [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Address and port of the server, for run of the nodes of a cluster, with commas [default: 127.0.0.1:9700; idle starts a
    /// server of its own]
    #[arg(long, value_name = "ADDRESS:PORT", value_delimiter = ',')]
    pub target: Vec<SocketAddr>,
    /// The server's issuer key (Ed25519, PKCS#8 PEM), which it writes into its data folder [default:
    /// ./ringline-data/issuer.pem]
    #[arg(long, value_name = "FILE")]
    pub issuer_key: Option<PathBuf>,
    /// The users are called PREFIX-000001 and so on; the server makes them at their first login
    #[arg(long, default_value = "bench", value_name = "PREFIX")]
    pub user_prefix: String,
    /// Process whose CPU time and memory are reported [default: the one that listens on the target's port]
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// Draw no progress bar
    #[arg(long)]
    pub no_progress: bool,
}

/// What makes the clients send: at most one of the three.
#[derive(Clone, Debug, Default, Args)]
#[group(multiple = false)]
pub struct PaceArgs {
    /// Closed loop: each client keeps so many sends unanswered [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(WINDOW_MAX)))]
    pub window: Option<u32>,
    /// Open loop: messages a second in all, evenly spread, whatever the server does
    #[arg(long, value_name = "PER_SECOND", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub rate: Option<u64>,
    /// Open loop: each client sends once in so many milliseconds, the clients staggered
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=86_400_000))]
    pub interval_ms: Option<u64>,
}

#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub fleet: FleetArgs,
    /// Simulated clients, one connection each
    #[arg(long, value_parser = parse_clients())]
    pub clients: u32,
    /// Who sends to whom
    #[arg(long, value_enum)]
    pub scenario: AnyScenario,
    /// Stored and sequenced, or forwarded to who is online
    #[arg(long, value_enum, default_value = "durable")]
    pub class: ClassArg,
    /// Transient messages that are answered only when they are refused; needs an open loop
    #[arg(long)]
    pub no_reply: bool,
    /// Scenario pair, with several targets: whether the two of a pair live on one node
    #[arg(long, value_enum, default_value = "any")]
    pub pairs: Pairs,
    #[command(flatten)]
    pub pace: PaceArgs,
    #[command(flatten)]
    pub crowd: CrowdArgs,
    /// Bytes of each message body; the first 40 carry what the checks need
    #[arg(long, default_value_t = 64, value_name = "BYTES",
        value_parser = clap::value_parser!(u32).range(STAMP_BYTES as i64..=i64::from(PAYLOAD_BYTES_MAX)))]
    pub payload: u32,
    /// Seconds of the measured window
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = parse_seconds)]
    pub duration: f64,
    /// Seconds before it that are not measured
    #[arg(long, default_value = "2", value_name = "SECONDS", value_parser = parse_seconds)]
    pub warmup: f64,
    /// Seconds to wait at the end, at most, for what was accepted to be delivered
    #[arg(long, default_value = "5", value_name = "SECONDS", value_parser = parse_seconds)]
    pub drain: f64,
    /// Acknowledge deliveries by cumulative cursors, once a second and conversation [default: on for durable]
    #[arg(long, value_enum)]
    pub ack_cursors: Option<Switch>,
    /// Scenario slow: percent of all clients that read slowly, and send nothing, until the measured window ends
    #[arg(long, default_value_t = 10, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=50))]
    pub slow_percent: u32,
    /// Scenario slow: what such a client reads; less than it is sent, or nothing will pile up
    #[arg(long, default_value_t = 1_000, value_name = "BYTES",
        value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub slow_bytes_per_s: u32,
    /// The server's metrics page (its admin.listen): what it counted inside the measured window is added to the result
    #[arg(long, value_name = "URL")]
    pub metrics: Option<String>,
    #[command(flatten)]
    pub search: SearchArgs,
    /// Write the result as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the result as one HTML page with curves
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write an HdrHistogram interval log: latencies in µs a second, tags ack and deliver
    #[arg(long, value_name = "FILE")]
    pub hdr: Option<PathBuf>,
}

/// One that a [`Plan`] describes, or one of [`crate::crowd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyScenario {
    Plain(Scenario),
    Crowd(Crowd),
}

impl ValueEnum for AnyScenario {
    fn value_variants<'a>() -> &'a [Self] {
        use AnyScenario::{Crowd as Many, Plain};
        &[
            Plain(Scenario::SelfChat),
            Plain(Scenario::Pair),
            Plain(Scenario::Random),
            Plain(Scenario::Mutual),
            Plain(Scenario::Slow),
            Many(Crowd::Group),
            Many(Crowd::Sync),
            Many(Crowd::Mix),
        ]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        match self {
            Self::Plain(scenario) => scenario.to_possible_value(),
            Self::Crowd(crowd) => crowd.to_possible_value(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClassArg {
    Durable,
    Transient,
}

impl ClassArg {
    pub fn class(self) -> Class {
        match self {
            Self::Durable => Class::Durable,
            Self::Transient => Class::Transient,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Durable => "durable",
            Self::Transient => "transient",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

/// Core numbers as the operating system counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(pub Vec<usize>);

pub(crate) fn parse_cores(text: &str) -> Result<Cores, String> {
    const CORE_MAX: usize = 4_095;
    let number = |part: &str| match part.trim().parse::<usize>() {
        Ok(core) if core <= CORE_MAX => Ok(core),
        Ok(_) | Err(_) => Err(format!("\"{part}\" is no core number: write such as 1 or 0-3,8")),
    };
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(format!("\"{part}\" runs backwards"));
        }
        cores.extend(first..=last);
    }
    Ok(Cores(cores))
}

/// A number of clients that one process can be asked for.
pub(crate) fn parse_clients() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(CLIENTS_MAX))
}

pub(crate) fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=PHASE_S_MAX).contains(&seconds) => Ok(seconds),
        Ok(_) | Err(_) => Err(format!("\"{text}\" is no number of seconds from 0 to {PHASE_S_MAX}")),
    }
}

impl FleetArgs {
    /// The server that was named, or the one at its default address.
    pub fn target(&self) -> SocketAddr {
        self.target.first().copied().unwrap_or(DEFAULT_TARGET)
    }

    /// All that were named, or the one at its default address.
    pub fn targets(&self) -> Vec<SocketAddr> {
        if self.target.is_empty() { vec![DEFAULT_TARGET] } else { self.target.clone() }
    }

    /// For what measures one server.
    pub fn check_single(&self) -> Result<(), Failure> {
        match self.target.len() {
            0 | 1 => Ok(()),
            _ => {
                Err(Failure::Usage("--target: only run of a plain scenario takes several, and no --search".to_owned()))
            }
        }
    }

    /// The file of the server's key.
    pub fn issuer_key(&self) -> PathBuf {
        self.issuer_key.clone().unwrap_or_else(|| DEFAULT_ISSUER_KEY.into())
    }

    /// One core for each thread. Refuses cores that are not there.
    pub fn thread_cores(&self) -> Result<Vec<usize>, Failure> {
        let there: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        let cores = match &self.cores {
            Some(Cores(cores)) => cores.clone(),
            None if there.contains(&DEFAULT_CORE) => vec![DEFAULT_CORE],
            None => there.first().copied().into_iter().collect(),
        };
        if let Some(missing) = cores.iter().find(|core| !there.contains(core)) {
            return Err(Failure::Usage(format!("--cores: core {missing} is not there; there are {there:?}")));
        }
        let threads = self.threads.map_or(cores.len(), usize::from);
        Ok(cores.into_iter().cycle().take(threads).collect())
    }

    /// User names, checked as the server will check them.
    pub(crate) fn names(&self, clients: u32) -> Result<Vec<String>, Failure> {
        let names = names(&self.user_prefix, clients);
        match names.last().map(|name| UserName::new(name)) {
            Some(Err(error)) => Err(Failure::Usage(format!("--user-prefix: {error}"))),
            Some(Ok(_)) | None => Ok(names),
        }
    }
}

impl RunArgs {
    /// Checks what clap cannot, and gives the run its number.
    pub fn plan(&self) -> Result<Plan, Failure> {
        let clients = self.clients;
        let scenario = match self.scenario {
            AnyScenario::Plain(scenario) => scenario,
            AnyScenario::Crowd(crowd) => {
                return Err(Failure::Usage(format!("--scenario {} has no plan of single receivers", crowd.name())));
            }
        };
        if self.no_reply
            && (self.class != ClassArg::Transient || (self.pace.rate, self.pace.interval_ms) == (None, None))
        {
            let text = "--no-reply needs --class transient, and --rate or --interval-ms: nothing is answered";
            return Err(Failure::Usage(text.to_owned()));
        }
        match scenario {
            Scenario::Pair | Scenario::Slow if clients % 2 == 1 => {
                let name = scenario.name();
                return Err(Failure::Usage(format!(
                    "--scenario {name} needs an even number of clients, not {clients}"
                )));
            }
            Scenario::Random | Scenario::Mutual if clients < 2 => {
                let name = scenario.name();
                return Err(Failure::Usage(format!("--scenario {name} needs two clients or more")));
            }
            Scenario::SelfChat | Scenario::Pair | Scenario::Random | Scenario::Mutual | Scenario::Slow => {}
        }
        if self.duration <= 0.0 {
            return Err(Failure::Usage("--duration must be more than 0".to_owned()));
        }
        let class = self.class.class();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seed = [now.as_nanos().to_le_bytes().as_slice(), &std::process::id().to_le_bytes()].concat();
        let mut plan = Plan {
            scenario,
            no_reply: self.no_reply,
            slow: Slow { percent: self.slow_percent, bytes_per_s: self.slow_bytes_per_s },
            interval_ns: self.hdr.as_ref().map(|_| intervals::length_ns((self.duration * NS_PER_S as f64) as u64)),
            class,
            pace: Pace::Closed { window: 1 },
            payload_bytes: self.payload as usize,
            run: body_hash(&seed),
            // Microseconds: rises from run to run as long as no client sends a million messages a second.
            client_seq_base: u64::try_from(now.as_micros()).unwrap_or(1),
            ack_cursors: match self.ack_cursors {
                Some(Switch::On) => true,
                Some(Switch::Off) => false,
                None => class == Class::Durable,
            },
            names: self.fleet.names(clients)?,
            homes: Vec::new(),
        };
        plan.pace = self.pace(plan.senders())?;
        self.check_pairs(scenario)?;
        Ok(plan)
    }

    fn check_pairs(&self, scenario: Scenario) -> Result<(), Failure> {
        let several = self.fleet.target.len() > 1;
        if self.pairs != Pairs::Any && (scenario != Scenario::Pair || !several) {
            return Err(Failure::Usage("--pairs needs --scenario pair and several --target".to_owned()));
        }
        if several && (self.fleet.server_pid.is_some() || self.metrics.is_some()) {
            return Err(Failure::Usage(
                "--server-pid and --metrics are of one server, --target names several".to_owned(),
            ));
        }
        Ok(())
    }

    /// The plan, with every client at the node that its user lives on.
    pub fn placed_plan(&self) -> Result<Plan, Failure> {
        let (mut plan, targets) = (self.plan()?, self.fleet.targets());
        if targets.len() > 1 {
            let homes = settle(&targets, &self.fleet.user_prefix, (self.clients, self.pairs))?;
            (plan.names, plan.homes) = (homes.names, homes.at);
        }
        Ok(plan)
    }

    fn pace(&self, senders: u32) -> Result<Pace, Failure> {
        let period_ns = match (self.pace.rate, self.pace.interval_ms) {
            (Some(rate), _) => u64::from(senders) * NS_PER_S / rate.max(1),
            (None, Some(interval_ms)) => interval_ms * NS_PER_MS,
            (None, None) => return Ok(Pace::Closed { window: self.pace.window.unwrap_or(1) }),
        };
        if period_ns < 1_000 {
            return Err(Failure::Usage("--rate: a client would send more than a million messages a second".to_owned()));
        }
        Ok(Pace::Open { period_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run_args(more: &[&str]) -> Result<RunArgs, clap::Error> {
        let base = ["ringline-bench", "run", "--clients", "4"];
        match Cli::try_parse_from(base.iter().chain(more))?.command {
            Command::Run(args) => Ok(args),
            Command::Idle(_) | Command::Storm(_) | Command::Torture(_) | Command::Contest(_) => unreachable!(),
        }
    }

    #[test]
    fn the_command_line_is_well_formed_and_documented() {
        let mut cli = Cli::command();
        cli.clone().debug_assert();
        for command in cli.get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            // Those that start their servers themselves ask for no key.
            let starts_servers = ["floor", "compare", "floor-server", "torture"].contains(&command.get_name());
            assert!(help.contains("Exit code") && (starts_servers || help.contains("--issuer-key")), "{help}");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} has no help", argument.get_id());
            }
        }
    }

    #[test]
    fn the_pace_is_one_of_three() {
        let pace = |more: &[&str]| run_args(&[&["--scenario", "self"], more].concat()).unwrap().plan().unwrap().pace;
        assert_eq!(pace(&[]), Pace::Closed { window: 1 });
        assert_eq!(pace(&["--window", "8"]), Pace::Closed { window: 8 });
        assert_eq!(pace(&["--rate", "1000"]), Pace::Open { period_ns: 4_000_000 });
        assert_eq!(pace(&["--interval-ms", "250"]), Pace::Open { period_ns: 250_000_000 });
        assert!(run_args(&["--scenario", "self", "--rate", "1", "--window", "1"]).is_err());
        assert!(run_args(&["--scenario", "self", "--payload", "39"]).is_err());
        assert!(run_args(&["--scenario", "self", "--rate", "5000000"]).unwrap().plan().is_err());
    }

    #[test]
    fn plans_that_cannot_be_are_usage_errors() {
        let clients = |clients: &str, scenario: &str| {
            let line = ["ringline-bench", "run", "--clients", clients, "--scenario", scenario];
            let Command::Run(args) = Cli::try_parse_from(line).unwrap().command else { unreachable!() };
            args.plan().map(|plan| plan.names.len())
        };
        assert!(matches!(clients("3", "pair"), Err(Failure::Usage(_))));
        assert!(matches!(clients("1", "random"), Err(Failure::Usage(_))));
        assert_eq!(clients("3", "random"), Ok(3));
        let usage = |more: &[&str]| matches!(run_args(more).unwrap().plan(), Err(Failure::Usage(_)));
        let two = ["--target", "127.0.0.1:1,127.0.0.1:2"];
        assert!(!usage(&[&two[..], &["--scenario", "pair", "--pairs", "across"]].concat()));
        assert!(!usage(&[&two[..], &["--scenario", "random"]].concat()));
        assert!(usage(&[&two[..], &["--scenario", "self", "--pairs", "within"]].concat()));
        assert!(usage(&[&two[..], &["--scenario", "pair", "--server-pid", "1"]].concat()));
        assert!(usage(&["--scenario", "pair", "--pairs", "within"]));
        let bad_name = run_args(&["--scenario", "self", "--user-prefix", " x"]).unwrap();
        assert!(matches!(bad_name.plan(), Err(Failure::Usage(_))));
    }

    #[test]
    fn cursors_follow_the_class_unless_told() {
        let cursors =
            |more: &[&str]| run_args(&[&["--scenario", "self"], more].concat()).unwrap().plan().unwrap().ack_cursors;
        assert!(cursors(&[]));
        assert!(!cursors(&["--class", "transient"]));
        assert!(!cursors(&["--ack-cursors", "off"]));
    }

    #[test]
    fn core_lists_are_numbers_and_ranges() {
        assert_eq!(parse_cores("0-2,5"), Ok(Cores(vec![0, 1, 2, 5])));
        for bad in ["", "a", "3-1", "1-", "99999"] {
            assert!(parse_cores(bad).is_err(), "{bad}");
        }
        let mut fleet = run_args(&["--scenario", "self", "--cores", "0", "--threads", "3"]).unwrap().fleet;
        assert_eq!(fleet.thread_cores(), Ok(vec![0, 0, 0]));
        fleet.cores = Some(Cores(vec![4_000]));
        assert!(matches!(fleet.thread_cores(), Err(Failure::Usage(_))));
    }
}
