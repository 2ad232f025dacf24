//! The pure shard of Ringline, floor 2: events in, effects out.
//!
//! One [`Shard`] is the only writer of the users, sessions and conversations of its partitions. It has no socket,
//! clock, thread or randomness: time comes with each event, so the same code runs under the reactor and under a seeded
//! simulator. Everything enters by [`Shard::handle`]; one event runs to completion.
//!
//! - [`event`]: the interface. [`config`]: settings and bounds.
//! - `session`: connections, their states and output. `login`: who is who. `send`, `conversation`: the way of a
//!   message from its sender to the log. `deliver`: from the log to the devices, and back as acknowledgements.
//!   `amend`: edits, recalls, deletions. `hide`: a message deleted for one user. `read`: history. `list`: conversations
//!   and marks. `devices`: of a user. `online`: who is here. `sync`: what a device missed. `receipts`, `receipt_list`:
//!   who has received and read what. `social`: signals, block lists, privacy, presence. `group`: groups, their rules and
//!   their fan-out. [`nodes`]: shards of other nodes. `export`: what is kept about a user. `deletion`: of a user. `chat`: who
//!   serves which.

#![forbid(unsafe_code)]

mod amend;
mod chat;
mod committed;
pub mod config;
mod conversation;
pub mod counters;
mod deletion;
mod deliver;
mod devices;
pub mod event;
pub mod export;
mod filter;
mod group;
mod hide;
mod invariants;
mod list;
mod login;
pub mod nodes;
mod online;
mod peer;
pub mod planted;
mod read;
mod receipt_list;
mod receipts;
mod send;
mod session;
mod shard;
mod social;
mod sync;
mod timers;

pub use shard::Shard;
