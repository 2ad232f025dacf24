//! The link between two shards of different nodes: pure, without sockets or clocks. Owned by one core on each side.
//!
//! - [`frame`]: the bytes between two nodes. [`hello`]: who they are, and whether they may speak.
//! - [`channel`]: batches in order, once each, over any number of connections, within a window that the receiver grants.
//! - [`dial`]: when to connect again. [`mod@line`]: what becomes of a link when connections come and go, and which of two stays.
//! - [`batch`]: the messages in a batch, each from one shard to another. [`tunnel`]: a client of a gateway, carried to its owner.
//!
//! What a connection loses, the channel sends again on the next one, and the receiver drops what it has. Only the end of
//! a process on either side loses batches: then the side that is still there is told which were never acknowledged, and
//! their fate is unknown. Above it, a send in such a batch is `UNKNOWN` to its client, whose retry finds out.
//!
//! A link carries bytes and does not look into them.

pub mod batch;
pub mod channel;
pub mod dial;
pub mod frame;
pub mod hello;
pub mod line;
pub mod tunnel;

#[cfg(test)]
mod tests;
