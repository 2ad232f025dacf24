//! What breaks in a run, and when the node comes back.
//!
//! Invariant: nothing breaks once the world is no longer lively, so that what follows can be held to the promises.

use rand::RngExt;
use ringline_cluster::placement::ShardIndex;
use ringline_core::event::Event;
use ringline_schema::ids::{ConversationId, Seq};

use super::acts::GROUPS;
use super::world::{Action, USERS, World};
use crate::checker::Peer;
use crate::observed;

/// The longest time that a client hangs, in microseconds.
const STALL_US_MAX: u64 = 3_000_000;

impl World {
    /// One fault, and the next one planned.
    pub(super) fn fault(&mut self) {
        if !self.lively {
            return;
        }
        let pause = self.random_us(50_000, 800_000);
        self.after(pause, Action::Fault);
        self.faults += 1;
        let client = self.rng.random_range(0..self.clients.len());
        if self.lets_go && self.chance(60) {
            self.begin_checkpoint();
        }
        match self.rng.random_range(0..100) {
            0..15 if self.up => self.crash(),
            15..20 if self.up => self.stop(),
            20..50 => self.cut(client),
            50..65 => self.restart_process(client),
            65..80 => {
                let stall = self.random_us(100_000, STALL_US_MAX);
                self.clients[client].stalled_until_us = self.now_us + stall;
            }
            80..88 if self.up => self.block_lane(),
            88..92 if self.up => {
                let shard = self.rng.random_range(0..self.sides.len());
                self.disk.break_next(shard);
                // Somebody sees it in the log and starts the node again.
                let (delay, epoch) = (self.random_us(50_000, 2_000_000), self.epoch);
                self.after(delay, Action::Restart { epoch, orderly: false });
            }
            92..96 => self.unreadable_percent = if self.chance(50) { self.rng.random_range(1..10) } else { 0 },
            _ => self.slow_disk_percent = self.rng.random_range(0..40),
        }
    }

    /// Retention picks what one conversation may let go of; that happens when its checkpoint is written, if the node lives
    /// so long.
    fn begin_checkpoint(&mut self) {
        let (one, other) = (self.rng.random_range(0..USERS), self.rng.random_range(0..USERS));
        let name = |user| observed::name(Peer::User(user));
        let conversation = match self.chance(20) {
            true => ConversationId::group(&observed::name(Peer::Group(one % GROUPS))),
            false => ConversationId::direct(&name(one), &name(other)),
        };
        let Some((first, head)) = self.disk.bounds(conversation) else { return };
        let all = self.chance(10);
        let floor = if all { head.0 + 1 } else { self.rng.random_range(first.0..=head.0.max(first.0)) };
        let (delay, epoch) = (self.random_us(1_000, 200_000), self.epoch);
        self.after(delay, Action::Checkpoint { epoch, conversation, floor: Seq(floor) });
    }

    /// A connection breaks, at whatever byte it was.
    fn cut(&mut self, client: usize) {
        let Some(link) = self.clients[client].link else { return };
        let half_open = self.chance(30);
        let Some(open) = self.links.get_mut(&link) else { return };
        if half_open {
            // The server hears nothing of it for a while.
            open.to_server_us = open.to_server_us.max(self.now_us + 2_000_000);
        } else if open.server_open {
            // Bytes under way are lost.
            self.server_sees_end(link);
        }
        self.client_cuts(link);
    }

    /// A lane is full for a while; or not any more.
    fn block_lane(&mut self) {
        let (from, to) = (self.rng.random_range(0..self.sides.len()), self.rng.random_range(0..self.sides.len()));
        let blocked = self.chance(40);
        if from != to {
            self.sides[from].shard.set_lane_blocked(ShardIndex(to as u16), blocked);
        }
    }

    /// All lanes have room again, and what they lost is made good by a new life.
    pub(super) fn free_lanes(&mut self) {
        if self.sides.iter().any(|side| side.lossy) {
            self.crash();
        }
        let shards = self.sides.len() as u16;
        for side in &mut self.sides {
            (0..shards).for_each(|to| side.shard.set_lane_blocked(ShardIndex(to), false));
        }
    }

    /// The node dies. Everything but the disk is gone; clients see their connections end.
    pub(super) fn crash(&mut self) {
        self.note(5, 0);
        self.go_down(false);
    }

    /// An orderly stop: clients are told, what was queued is written.
    fn stop(&mut self) {
        self.note(6, 0);
        for shard in 0..self.sides.len() {
            self.tell(shard, Event::Drain);
        }
        let (delay, epoch) = (self.random_us(100_000, 600_000), self.epoch);
        self.after(delay, Action::Restart { epoch, orderly: true });
    }

    fn go_down(&mut self, orderly: bool) {
        let shards = self.rng.random_range(1..=4);
        self.disk.restart((shards, orderly), &mut self.rng);
        self.up = false;
        self.epoch += 1;
        self.lanes.clear();
        self.held_pass = None;
        self.lane_due_us.clear();
        self.sides.clear();
        let links: Vec<u64> = self.links.keys().copied().collect();
        for link in links {
            let Some(open) = self.links.get_mut(&link) else { continue };
            open.server_open = false;
            let at_us = open.to_client_us.max(self.now_us);
            self.at(at_us, Action::ClientSeesEnd { link });
        }
        let (delay, epoch) = (self.random_us(1_000, 700_000), self.epoch);
        // While it is down, `sides` is empty: the restart makes as many as the disk was opened with.
        self.next_shards = shards;
        self.after(delay, Action::Restart { epoch, orderly: false });
    }

    /// The end of a life, or the beginning of one.
    pub(super) fn restart(&mut self, orderly: bool) {
        if self.up {
            return self.go_down(orderly);
        }
        self.note(7, u64::from(self.next_shards));
        self.boot(self.next_shards);
        // Lanes are free and the disk is as fast as it is in a new life.
        self.sides.iter().for_each(|side| side.shard.check_invariants());
    }
}
