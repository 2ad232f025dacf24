//! The shared language of Ringline, floor 0: everything that two parties must agree on, and nothing that acts.
//!
//! - [`ids`]: names, partitions, conversation ids. [`limits`]: every bound. [`errors`], [`commands`]: the two tables.
//! - [`frame`]: the byte stream. [`codec`]: bodies. [`message`]: the plain structs between codec and core.
//! - [`record`], [`rows`], [`disk`], [`pack`]: what the store keeps, owned and as bytes.

pub mod codec;
pub mod commands;
pub mod disk;
pub mod errors;
pub mod frame;
mod generated;
pub mod ids;
pub mod limits;
pub mod message;
pub mod pack;
pub mod record;
pub mod rows;
