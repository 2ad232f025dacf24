//! Where things live, floor 1: pure placement.
//!
//! One node knows one step so far: partition → core. Nodes, membership and links join here with the cluster.

pub mod placement;
