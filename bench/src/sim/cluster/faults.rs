//! What breaks in a cluster's run. Owned by the cluster.
//!
//! Invariant: nothing breaks once the run is no longer lively, so that what follows can be held to the promises.

use rand::RngExt;

use super::nodes::Node;
use super::steward::Steward;
use super::{Action, Cluster};

/// The longest time that a client hangs, in microseconds.
const STALL_US_MAX: u64 = 3_000_000;
/// Longer than a lease lasts.
const PAUSE_US_MAX: u64 = 16_000_000;
/// How far a clock jumps at most.
const JUMP_MS_MAX: i64 = 600_000;

impl Cluster {
    /// One fault, and the next one planned.
    pub(super) fn fault(&mut self) {
        if !self.lively {
            return;
        }
        let pause = self.random_us(50_000, 900_000);
        self.after(pause, Action::Fault);
        self.faults += 1;
        let client = self.rng.random_range(0..self.clients.len());
        if self.setup.moving && self.chance(30) {
            return self.fault_of_moves();
        }
        let node = self.rng.random_range(0..self.nodes.len());
        let crash_percent = if self.setup.moving { 3 } else { 15 };
        match self.rng.random_range(0..100) {
            0..15 => {
                if self.nodes[node].up && self.chance(crash_percent * 100 / 15) {
                    self.go_down(node, false);
                }
            }
            15..30 => self.cut_nodes(node),
            30..48 => {
                if let Some(socket) = self.any_socket() {
                    self.note(9, socket);
                    self.reset_socket(socket);
                }
            }
            48..55 => {
                let pause = self.random_us(1_000, 2_000_000);
                self.pause(node, pause);
            }
            55..60 => self.nodes[node].clock.skew_ms = self.rng.random_range(-JUMP_MS_MAX..=JUMP_MS_MAX),
            60..72 => {
                if let Some(link) = self.clients[client].link {
                    self.client_cuts(link);
                }
            }
            72..82 => self.restart_process(client),
            82..90 => {
                let stall = self.random_us(100_000, STALL_US_MAX);
                self.clients[client].stalled_until_us = self.now_us + stall;
            }
            _ => self.full_percent = if self.full_percent == 0 { self.rng.random_range(1..20) } else { 0 },
        }
    }

    /// A process does nothing for a while, and then goes on as if no time had passed.
    fn pause(&mut self, node: usize, pause_us: u64) {
        if self.nodes[node].up && !std::mem::replace(&mut self.nodes[node].paused, true) {
            self.note(13, node as u64);
            let epoch = self.nodes[node].epoch;
            self.after(pause_us, Action::Resume { node, epoch });
        }
    }

    pub(super) fn resume(&mut self, node: usize, epoch: u32) {
        let home = &mut self.nodes[node];
        if home.epoch == epoch && std::mem::take(&mut home.paused) {
            let held = std::mem::take(&mut home.held);
            held.into_iter().for_each(|action| self.perform(action));
        }
    }

    /// Nothing goes from one node to another for a while, or in neither direction; short of a silence, or beyond it.
    fn cut_nodes(&mut self, one: usize) {
        let other = (one + self.rng.random_range(1..self.nodes.len())) % self.nodes.len();
        let longest = if self.chance(30) { 8_000_000 } else { 1_500_000 };
        let until_us = self.now_us + self.random_us(10_000, longest);
        self.note(14, (one * 8 + other) as u64);
        self.cut_way((one, other), until_us);
        if self.chance(50) {
            self.cut_way((other, one), until_us);
        }
    }

    /// What breaks around partitions that change hands.
    fn fault_of_moves(&mut self) {
        let node = self.rng.random_range(0..self.nodes.len());
        let until_us = self.now_us + self.random_us(100_000, PAUSE_US_MAX);
        match self.rng.random_range(0..100) {
            0..20 => {
                let pause = self.random_us(2_000_000, PAUSE_US_MAX);
                self.pause(node, pause);
            }
            20..35 => _ = self.etcd_cuts.insert(node, until_us),
            35..45 => self.cut_database(node, until_us.min(self.now_us + 6_000_000)),
            45..60 => self.drain(node),
            60..65 => {
                self.etcd.goes(self.now_us);
                let delay = self.random_us(100_000, 6_000_000);
                self.after(delay, Action::EtcdBack);
            }
            65..85 if self.database.up => {
                self.crash_database();
                let (delay, life) = (self.random_us(50_000, 2_000_000), self.database.life);
                let as_standby = self.chance(50);
                self.after(delay, Action::DatabaseBack { life, as_standby });
            }
            85..93 => self.slow_standby_percent = if self.slow_standby_percent > 5 { 5 } else { 60 },
            _ => self.cut_off(node, until_us),
        }
    }

    /// A node reaches nobody but its clients.
    fn cut_off(&mut self, node: usize, until_us: u64) {
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            self.cut_way((node, other), until_us);
            self.cut_way((other, node), until_us);
        }
        self.etcd_cuts.insert(node, until_us);
        self.cut_database(node, until_us);
    }

    /// Nothing is broken any more, but who is paused goes on in its own time.
    pub(super) fn heal(&mut self) {
        self.full_percent = 0;
        self.slow_standby_percent = 5;
        for until_us in self.cuts.values_mut().chain(self.database_cuts.values_mut()).chain(self.etcd_cuts.values_mut())
        {
            *until_us = 0;
        }
        self.nodes.iter_mut().for_each(|node| node.clock.skew_ms = 0);
        self.etcd.returns(self.now_us);
        if !self.database.up {
            self.database_returns(self.database.life, false);
        }
    }

    /// All nodes are there, and have what they should.
    pub(super) fn is_settled(&self) -> bool {
        let settled = |node: &Node| {
            node.up && !node.paused && (!self.setup.moving || node.steward.as_ref().is_some_and(Steward::is_settled))
        };
        self.nodes.iter().all(settled)
    }
}
