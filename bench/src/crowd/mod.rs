//! `run --scenario group | sync | mix`: what one connection a client and one receiver a message do not show. Groups beside
//! pairs that chat, devices that come back to what they missed, and declared proportions of everything.
//!
//! One thread with a tokio runtime of its own, on the generator's first core. [`seat`]: one client, pure; `line`: its
//! socket; `party`: the phases of group and mix; `back`: those of sync; `report`: what is told. Invariant: every message
//! of the run names its sender, number and intended time, so each receiver checks what it gets; what was acknowledged and
//! did not arrive is counted as lost.

mod back;
mod line;
mod party;
pub mod report;
pub mod seat;

use std::str::FromStr;

use clap::{Args, ValueEnum};

use crate::Failure;
use crate::cli::RunArgs;
use crate::facts::Machine;
use report::CrowdReport;
use seat::{OPS, Op};

const GROUPS_MAX: i64 = 10_000;
const MEMBERS_MAX: i64 = 10_000;
const MISSED_MAX: i64 = 1_000_000;

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Crowd {
    /// --groups of --members, some --online, --senders write --group-rate messages a second; meanwhile --clients chat in pairs.
    Group,
    /// --clients that were away come back to --missed messages each and SYNC, --window of them at once.
    Sync,
    /// --clients in pairs and groups that do what --mix says, each one thing after the other or by an interval.
    Mix,
}

impl Crowd {
    pub fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Sync => "sync",
            Self::Mix => "mix",
        }
    }
}

/// Options of these scenarios alone.
#[derive(Clone, Debug, Args)]
pub struct CrowdArgs {
    /// Scenarios group and mix: how many groups; 0 leaves only the pairs, to compare with
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=GROUPS_MAX))]
    pub groups: u32,
    /// Scenario group: members of each group
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=MEMBERS_MAX))]
    pub members: u32,
    /// Scenario group: members of each that are online [default: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=MEMBERS_MAX))]
    pub online: Option<u32>,
    /// Scenario group: members of each that write. Scenario sync: users that write what is missed
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=MEMBERS_MAX))]
    pub senders: u32,
    /// Scenario group: messages a second to all groups together
    #[arg(long, default_value_t = 40, value_name = "PER_SECOND", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub group_rate: u64,
    /// Scenario sync: messages that each client has missed
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=MISSED_MAX))]
    pub missed: u32,
    /// Scenario mix: what the clients do, in parts
    #[arg(long, default_value = "direct=60,group=20,transient=10,read=5,sync=5", value_name = "LIST")]
    pub mix: Mix,
}

/// How often each thing is done, as parts of their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix(pub [u32; OPS.len()]);

impl Mix {
    /// Only this.
    pub fn only(op: Op) -> Self {
        Self(OPS.map(|other| u32::from(other == op)))
    }

    /// What a number that is drawn at random stands for.
    pub fn pick(&self, drawn: u64) -> Option<Op> {
        let sum: u64 = self.0.iter().map(|part| u64::from(*part)).sum();
        let mut place = drawn.checked_rem(sum)?;
        for (op, part) in OPS.into_iter().zip(self.0) {
            match place.checked_sub(part.into()) {
                Some(rest) => place = rest,
                None => return Some(op),
            }
        }
        None
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = [0; OPS.len()];
        for item in text.split(',') {
            let (name, part) = item.split_once('=').ok_or_else(|| format!("\"{item}\": write such as direct=60"))?;
            let at = OPS.iter().position(|op| op.name() == name.trim()).ok_or_else(|| {
                let names: Vec<_> = OPS.iter().map(|op| op.name()).collect();
                format!("\"{name}\" is none of {}", names.join(", "))
            })?;
            let part = part.trim().parse::<u32>().map_err(|error| format!("\"{part}\": {error}"))?;
            if let Some(place) = parts.get_mut(at) {
                *place = part;
            }
        }
        let sum = parts.iter().fold(0u32, |sum, part| sum.saturating_add(*part));
        if sum == 0 || sum == u32::MAX {
            Err("the parts add up to nothing, or to too much".to_owned())
        } else {
            Ok(Self(parts))
        }
    }
}

/// A whole run. The report says whether it was clean; an error means that there is none.
pub fn run(args: &RunArgs, crowd: Crowd) -> Result<CrowdReport, Failure> {
    let machine = Machine::here(args.fleet.target(), args.fleet.server());
    if args.class != crate::cli::ClassArg::Durable || args.no_reply {
        let text = format!("--scenario {} is for stored messages; its transient ones are part of --mix", crowd.name());
        return Err(Failure::Usage(text));
    }
    if let Some(&core) = args.fleet.thread_cores()?.first() {
        core_affinity::set_for_current(core_affinity::CoreId { id: core });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::Failed(format!("cannot start: {error}")))?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        match crowd {
            Crowd::Group | Crowd::Mix => party::run(args, crowd, machine).await,
            Crowd::Sync => back::run(args, machine).await,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_read_and_drawn_from() {
        let mix: Mix = "direct=3, sync=1".parse().unwrap();
        let drawn: Vec<_> = (0..8).filter_map(|number| mix.pick(number)).collect();
        let round = [Op::Direct, Op::Direct, Op::Direct, Op::Sync];
        assert_eq!(drawn, [round, round].concat());
        assert_eq!(Mix::only(Op::Group).pick(7), Some(Op::Group));
        assert_eq!(Mix([0; OPS.len()]).pick(0), None);
        for bad in ["", "direct", "direct=x", "walk=3", "direct=0", "direct=4294967295,group=1"] {
            assert!(bad.parse::<Mix>().is_err(), "{bad}");
        }
    }
}
