//! Where things live and how nodes speak, floor 1: pure, without sockets, clocks or randomness.
//!
//! Partition → node is [`rendezvous`], or [`ownership`] where partitions change hands; partition → core within a node is
//! [`placement`], and [`balance`] picks the node a client should connect to, by what is on the board of [`router`].
//! [`membership`] is who is there, [`reconcile`] who takes and gives, [`link`] what two nodes say to each other.

pub mod balance;
pub mod link;
pub mod membership;
pub mod ownership;
pub mod placement;
pub mod reconcile;
pub mod rendezvous;
pub mod router;
