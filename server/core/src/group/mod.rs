//! Groups: who is in, who may do what, and the way of a message to ten thousand members.
//!
//! A group is owned by the shard of its name's partition, beside its conversation. What changes it goes the way of a
//! message: to the owner, checked there when it is numbered, one record of the log, answered when that is on disk. So
//! whoever was a member when a message got its number sees it, and nobody else.
//!
//! - [`state`]: one group in memory, [`list`] its members on a shard. [`cache`]: loading and letting go. [`act`]: commands at the session's shard, and the
//!   visits to the shards of the users they name. [`decide`]: the rules. [`change`]: from a decision to the log.
//!   [`fan_out`]: from the log to the members; to many of them in [`slices`], by a [`scan`]. [`passing`]: what is not stored.
//!   [`reached`]: what writers are told of who has received and read.

pub(crate) mod act;
pub(crate) mod cache;
pub(crate) mod change;
mod decide;
pub(crate) mod fan_out;
pub mod list;
pub(crate) mod passing;
pub(crate) mod reached;
pub(crate) mod scan;
pub(crate) mod slices;
pub(crate) mod state;
