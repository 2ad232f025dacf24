//! The load generator of Ringline, floor 4: it drives a server as a stranger would, over TCP, and checks every message.
//!
//! - Pure: [`plan`] (who sends what to whom, when), [`stamp`] (the body of a message), [`check`] (loss, duplicates,
//!   order), [`tally`] (counts and latencies), [`peer`] (one simulated client), [`report`].
//! - Shell: [`engine`] (the epoll loop of one thread), [`run`] (threads and phases), [`server_process`], [`token`],
//!   [`cli`].
//!
//! Nothing of the server or of the client SDK is used: what is measured is what the wire shows.

pub mod check;
pub mod cli;
pub mod engine;
pub mod peer;
pub mod plan;
pub mod report;
pub mod run;
pub mod server_process;
pub mod stamp;
pub mod tally;
pub mod token;

/// Why a command ended without a result. One clear line for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// What was asked for makes no sense: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// It could not be done: exit code 1.
    #[error("{0}")]
    Failed(String),
}
