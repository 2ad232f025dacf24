//! The load generator of Ringline, floor 4: it drives a server as a stranger would, over TCP, and checks every message.
//!
//! - Pure: [`plan`] (who sends what to whom, when), [`stamp`] (the body of a message), [`check`] (loss, duplicates,
//!   order), [`tally`] (counts and latencies), [`peer`] (one simulated client), [`intervals`] (latency by interval),
//!   [`report`], [`html`] (the page of a run), [`search`] (the highest rate; with its thin shell).
//! - Shell: [`engine`] (the epoll loop of one thread), [`run`] (threads and phases), [`idle`] (what idle clients cost),
//!   [`storm`] (logins and drops), [`launch`] (servers started here), [`metrics`] (what the server counts),
//!   [`crowd`] (groups, devices that come back, mixed load),
//!   [`sources`] (local addresses), [`facts`], [`server_process`], [`token`], [`cli`].
//! - Against others: [`wire`] (protocols, pure), [`compare`], [`floor`], [`floor_ring`] (the bare echo).
//!
//! - Correctness: [`checker`] (histories against promises; shares no code with what it judges), [`sim`] (shards and SDK
//!   under one seed), [`torture`] (real servers that are killed), `observed` (what their clients saw, as histories say it).
//!
//! What measures uses nothing of the server or of the SDK: what is measured is what the wire shows. The simulator alone
//! drives shards; it and `torture` drive the SDK.

pub mod check;
pub mod checker;
pub mod cli;
pub mod compare;
pub mod crowd;
pub mod engine;
pub mod facts;
pub mod floor;
pub mod floor_ring;
pub mod html;
pub mod idle;
pub mod intervals;
pub mod launch;
pub mod metrics;
mod observed;
pub mod peer;
pub mod place;
pub mod plan;
pub mod report;
pub mod run;
pub mod search;
pub mod server_process;
pub mod sim;
pub mod sources;
pub mod stamp;
pub mod storm;
pub mod tally;
pub mod token;
pub mod torture;
pub mod wire;

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
