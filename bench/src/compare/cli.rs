//! The command lines of `floor` and `compare`, with their defaults and bounds.
//!
//! Main thread only.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ringline_schema::limits::SENDS_IN_FLIGHT_MAX;

use super::drive::STAMP_BYTES;
use super::peers::Peer;
use crate::Failure;
use crate::cli::{Cores, parse_cores, parse_seconds};

/// Connections from one loopback address; the usual range of local ports has 28,232.
const CLIENTS_MAX: u32 = 28_000;
const PAYLOAD_BYTES_MAX: i64 = 32 * 1024;
const ROUNDS_MAX: i64 = 99;

#[derive(Debug, Subcommand)]
pub enum Contest {
    /// The limits of this machine: a bare-ring TCP echo, and a bare file appended to and synced
    ///
    /// Exit code: 0 all well; 1 a run could not be done; 2 wrong usage.
    Floor(FloorArgs),
    /// Drive ours and other servers with the same load, one after the other, and compare
    ///
    /// Starts each server itself, pinned, on a free loopback port, with its data in a folder that is removed, and
    /// prints the settings of each. Rounds are interleaved; figures are medians.
    ///
    /// Exit code: 0 all well; 1 ours lost, doubled or refused a message, or no run could be done; 2 wrong usage.
    Compare(CompareArgs),
    /// The echo that `floor` and `compare` start as a process of its own
    ///
    /// Exit code: 1 the kernel refused; it does not end by itself.
    #[command(hide = true)]
    FloorServer(FloorServerArgs),
}

/// The load and where it runs.
#[derive(Clone, Debug, Args)]
pub struct LoadArgs {
    /// Loads: clients x messages that each keeps on their way
    #[arg(long, value_delimiter = ',', default_value = "64x1,200x16,5000x1,5000x8", value_parser = parse_point,
        value_name = "CLIENTSxWINDOW,...")]
    pub points: Vec<Point>,
    /// Bytes of each message body
    #[arg(long, default_value_t = 64, value_name = "BYTES",
        value_parser = clap::value_parser!(u32).range(STAMP_BYTES as i64..=PAYLOAD_BYTES_MAX))]
    pub payload: u32,
    /// Seconds measured in each run
    #[arg(long, default_value = "3", value_name = "SECONDS", value_parser = parse_seconds)]
    pub duration: f64,
    /// Seconds before it that are not measured
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = parse_seconds)]
    pub warmup: f64,
    /// Runs of each row at each load
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=ROUNDS_MAX))]
    pub rounds: u32,
    /// Cores that each server is pinned on
    #[arg(long, default_value = "0", value_parser = parse_cores)]
    pub server_cores: Cores,
    /// Cores of the generator's threads, one a core
    #[arg(long, default_value = "1", value_parser = parse_cores)]
    pub cores: Cores,
    /// Write the result as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct FloorArgs {
    #[command(flatten)]
    pub load: LoadArgs,
    /// Folder for the file that is appended to: on the disk that is meant [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Bytes of each record
    #[arg(long, default_value_t = 136, value_name = "BYTES",
        value_parser = clap::value_parser!(u32).range(1..=PAYLOAD_BYTES_MAX))]
    pub record: u32,
    /// Records that are written and synced together
    #[arg(long, value_delimiter = ',', default_value = "1,16,256,2048", value_name = "RECORDS,...",
        value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batches: Vec<u32>,
}

#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    pub load: LoadArgs,
    /// What ours is compared with
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "floor,redis,nats,mosquitto,ejabberd",
        value_name = "PEER,..."
    )]
    pub with: Vec<Peer>,
    /// Our server's binary [default: ringline beside this one]
    #[arg(long, value_name = "FILE")]
    pub ringline: Option<PathBuf>,
    /// Folder for the servers' data [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct FloorServerArgs {
    /// Address and port to echo on
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
}

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub clients: u32,
    /// Messages that each client keeps on their way.
    pub window: u32,
}

fn parse_point(text: &str) -> Result<Point, String> {
    let parts = text.split_once('x').and_then(|(clients, window)| clients.parse().ok().zip(window.parse().ok()));
    match parts {
        Some((clients, window))
            if (2..=CLIENTS_MAX).contains(&clients)
                && clients % 2 == 0
                && (1..=SENDS_IN_FLIGHT_MAX).contains(&window) =>
        {
            Ok(Point { clients, window })
        }
        Some(_) | None => Err(format!(
            "\"{text}\" is no load: write CLIENTSxWINDOW, an even number of clients up to {CLIENTS_MAX} and a window up \
             to {SENDS_IN_FLIGHT_MAX}"
        )),
    }
}

impl LoadArgs {
    /// Refuses cores that are not there and a window of no time.
    pub fn check(&self) -> Result<(), Failure> {
        let there: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        let (Cores(servers), Cores(own)) = (&self.server_cores, &self.cores);
        if let Some(missing) = servers.iter().chain(own).find(|core| !there.contains(core)) {
            return Err(Failure::Usage(format!("core {missing} is not there; there are {there:?}")));
        }
        if self.duration <= 0.0 {
            return Err(Failure::Usage("--duration must be more than 0".to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_even_clients_and_a_window() {
        assert_eq!(parse_point("200x16"), Ok(Point { clients: 200, window: 16 }));
        for bad in ["", "200", "3x1", "0x1", "2x0", "2x65", "30000x1", "ax1", "2x1x1"] {
            assert!(parse_point(bad).is_err(), "{bad}");
        }
    }
}
