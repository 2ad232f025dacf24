//! The shell of Ringline, floor 3: threads, sockets, files and clocks around the pure core. It holds no chat rules.
//!
//! The way of a byte: [`net`] → [`edge`] → the shard, and back as effects that [`reactor`] performs. Cores speak over
//! [`lanes`], rung by [`wake`]. [`boot`] checks the machine, [`node`] starts and stops everything, [`config`] is the one
//! table of keys, [`joined`] makes it one of several, which [`peers`] links by what [`certs`] makes, [`doctor`] explains the
//! machine, [`admin`] tells what it does, [`route`] where clients should connect.

#![deny(unsafe_code)]

pub mod admin;
pub mod allocations;
pub mod auth;
pub mod boot;
pub mod certs;
pub mod cli;
pub mod cluster_cli;
pub mod config;
pub mod doctor;
pub mod edge;
pub mod etcd;
pub mod http;
pub mod joined;
pub mod lanes;
pub mod logs;
pub mod net;
pub mod node;
pub mod park;
pub mod peers;
mod placed;
pub mod reactor;
pub mod route;
pub mod signals;
pub mod steward;
pub mod stop;
pub mod store_cli;
pub mod tunnels;
pub mod wake;
pub mod workers;
