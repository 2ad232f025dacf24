//! Where things live, floor 1: pure placement and balance.
//!
//! Partition → node is [`rendezvous`], partition → core within a node is [`placement`], and [`balance`] picks the node a
//! client should connect to. Membership and links join here with the cluster.

pub mod balance;
pub mod placement;
pub mod rendezvous;
