//! The world of a run: a queue of what happens when, and the clients' side of it.
//!
//! Invariants: what is put into the queue for one moment comes out in the order it was put in; bytes of one direction of
//! a connection arrive in order; nothing that belongs to an earlier life of the node or of a process has an effect.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use ringline_client::machine::Cut;
use ringline_client::{CloseReason, ErrorCode, KickReason};
use ringline_core::event::{ConnId, ShardMessage, Token, Work};
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::record::Query;

use super::Bug;
use super::acts;
use super::device::{Device, EPOCH_US, Tap};
use super::disk::Disk;
use super::node::Side;
use crate::checker::{Device as Name, Happening, History, Notice};

pub const USERS: u32 = 5;
/// Deletes others, and tells everyone.
pub const ADMIN: u32 = 0;
/// Chance in percent that a user is deleted in a run, and else that groups are dissolved.
const DELETES_PERCENT: u32 = 40;
const DISSOLVES_PERCENT: u32 = 60;
const DEVICES_PER_USER: u64 = 2;
/// Steps after which a run is given up: something spins.
const STEPS_MAX: u64 = 3_000_000;
/// Virtual time after the faults within which everything must have settled.
const HEAL_US: u64 = 180_000_000;
/// A moved cursor is written within a second; this is longer.
const CURSOR_TIME_US: u64 = 5_000_000;
/// Chance in percent that retention is at work in a run.
const LETS_GO_PERCENT: u32 = 50;
/// Longer than a watching shard waits before it asks again how everyone is.
const REST_US: u64 = 35_000_000;
/// How long who is deleted waits before it tries again, at most.
const GONE_US_MAX: u64 = 5_000_000;
/// As the SDK's shell: a random time up to a bound that doubles from here …
const BACK_OFF_US_MIN: u64 = 200_000;
/// … to here (the SDK's is 30 s; shorter, so that more happens in a run).
const BACK_OFF_US_MAX: u64 = 5_000_000;

/// What can happen.
pub enum Action {
    /// A client tries to connect.
    Connect {
        client: usize,
        process: u32,
    },
    ToServer {
        link: u64,
        bytes: Vec<u8>,
    },
    ToClient {
        link: u64,
        bytes: Vec<u8>,
    },
    ServerSeesEnd {
        link: u64,
    },
    ClientSeesEnd {
        link: u64,
    },
    /// A connection arrives at the shard of its user.
    HandOver {
        link: u64,
    },
    /// The client's kernel has taken bytes.
    Sent {
        link: u64,
        bytes: usize,
    },
    Lane {
        epoch: u32,
        lane: (u16, u16),
    },
    Commit {
        epoch: u32,
        shard: usize,
    },
    Loaded {
        epoch: u32,
        shard: usize,
        token: Token,
        query: Query,
    },
    Worked {
        epoch: u32,
        shard: usize,
        token: Token,
        work: Work,
    },
    Timer {
        epoch: u32,
        shard: usize,
    },
    Wake {
        client: usize,
        process: u32,
    },
    Take {
        client: usize,
        process: u32,
    },
    Act {
        client: usize,
    },
    Delete(Mortal),
    Fault,
    /// The disk has written that it lets go of these messages.
    Checkpoint {
        epoch: u32,
        conversation: ConversationId,
        floor: Seq,
    },
    Restart {
        epoch: u32,
        orderly: bool,
    },
}

/// Who is deleted, by whom, and whether with what he wrote.
#[derive(Clone, Copy, Debug)]
pub struct Mortal {
    pub user: u32,
    pub by: u32,
    pub recall: bool,
}

struct Due {
    at_us: u64,
    number: u64,
    action: Action,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_us, self.number).cmp(&(other.at_us, other.number))
    }
}

/// A connection.
pub struct Link {
    pub client: usize,
    pub shard: usize,
    pub conn: ConnId,
    pub decoder: FrameDecoder,
    /// The server reads no more.
    pub stopped: bool,
    /// On its way to another shard: the bytes that came meanwhile.
    pub moving: Option<Vec<u8>>,
    pub in_flight: bool,
    pub server_open: bool,
    pub client_open: bool,
    pub tap: Tap,
    pub to_server_us: u64,
    pub to_client_us: u64,
}

/// See the module.
pub struct World {
    pub(super) rng: SmallRng,
    pub(super) bug: Option<Bug>,
    pub now_us: u64,
    queue: BinaryHeap<Reverse<Due>>,
    queued: u64,
    pub(super) disk: Disk,
    pub(super) sides: Vec<Side>,
    /// Rises with each life of the node.
    pub(super) epoch: u32,
    /// False between a crash and the restart.
    pub(super) up: bool,
    pub(super) next_shards: u16,
    pub(super) lanes: BTreeMap<(u16, u16), VecDeque<ShardMessage>>,
    /// What [`Bug::SwappedPasses`] holds back until the next of its lane.
    pub(super) held_pass: Option<((u16, u16), ShardMessage)>,
    pub(super) lane_due_us: BTreeMap<(u16, u16), u64>,
    pub(super) links: BTreeMap<u64, Link>,
    pub(super) next_link: u64,
    pub(super) clients: Vec<Device>,
    pub history: History,
    /// The workload goes on, and things break.
    pub(super) lively: bool,
    /// Chance in percent that a write or an answer of the disk takes long.
    pub(super) slow_disk_percent: u32,
    /// … and that a question to the disk fails.
    pub(super) unreadable_percent: u32,
    /// Retention is at work.
    pub(super) lets_go: bool,
    /// Groups are dissolved, towards the end.
    pub(super) dissolves: bool,
    pub(super) ends_us: u64,
    pub trace: u64,
    pub steps: u64,
    pub faults: u64,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let shards = rng.random_range(1..=4);
        let names = (0..USERS).flat_map(|user| (1..=DEVICES_PER_USER).map(move |number| Name { user, number }));
        let mut world = Self {
            bug,
            now_us: 1,
            queue: BinaryHeap::new(),
            queued: 0,
            disk: Disk::new(shards, bug),
            sides: Vec::new(),
            epoch: 0,
            up: true,
            next_shards: shards,
            lanes: BTreeMap::new(),
            held_pass: None,
            lane_due_us: BTreeMap::new(),
            links: BTreeMap::new(),
            next_link: 0,
            clients: names.map(Device::new).collect(),
            history: History::default(),
            lively: true,
            slow_disk_percent: rng.random_range(0..10),
            unreadable_percent: 0,
            lets_go: rng.random_range(0..100) < LETS_GO_PERCENT,
            dissolves: false,
            ends_us: rng.random_range(4_000_000..10_000_000),
            trace: seed,
            steps: 0,
            faults: 0,
            rng,
        };
        world.boot(shards);
        for client in 0..world.clients.len() {
            world.history.push(world.clients[client].name, Happening::Started);
            let (connect, act) = (world.random_us(0, 50_000), world.random_us(0, 500_000));
            world.after(connect, Action::Connect { client, process: 0 });
            world.after(act, Action::Act { client });
            let Name { user, number } = world.clients[client].name;
            if user == ADMIN {
                world.history.push(world.clients[client].name, Happening::Notice(Notice::Appointed));
            }
            if user < acts::GROUPS && number == 1 {
                world.create_group(client, user);
            }
        }
        world.after(300_000, Action::Fault);
        if world.chance(DELETES_PERCENT) {
            // Who has made no group; see the checker.
            let user = world.rng.random_range(acts::GROUPS..USERS);
            let by = if world.chance(30) { ADMIN } else { user };
            let (recall, at) = (world.chance(50), world.random_us(1_000_000, world.ends_us));
            world.after(at, Action::Delete(Mortal { user, by, recall }));
        } else {
            // Of who leaves a group that is dissolved nobody is told.
            world.dissolves = world.chance(DISSOLVES_PERCENT);
        }
        world
    }

    pub(super) fn random_us(&mut self, from: u64, to: u64) -> u64 {
        self.rng.random_range(from..=to)
    }

    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.now_us / 1_000
    }

    pub(super) fn after(&mut self, delay_us: u64, action: Action) {
        self.at(self.now_us + delay_us, action);
    }

    pub(super) fn at(&mut self, at_us: u64, action: Action) {
        self.queued += 1;
        self.queue.push(Reverse(Due { at_us, number: self.queued, action }));
    }

    /// Mixes something that happened into the trace.
    pub(super) fn note(&mut self, kind: u64, what: u64) {
        self.trace = (self.trace ^ kind ^ what.rotate_left(17) ^ self.now_us).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.trace ^= self.trace >> 29;
    }

    fn step(&mut self) -> bool {
        let Some(Reverse(due)) = self.queue.pop() else { return false };
        self.steps += 1;
        assert!(self.steps < STEPS_MAX, "the run does not come to an end");
        self.now_us = self.now_us.max(due.at_us);
        self.perform(due.action);
        true
    }

    /// Faults and load, until the seed's time is over.
    pub fn play(&mut self) {
        while self.now_us < self.ends_us && self.step() {}
        self.lively = false;
        (self.slow_disk_percent, self.unreadable_percent) = (0, 0);
    }

    /// Nothing breaks any more: everybody gets time to finish, logs are read back, cursors are held to their word.
    pub fn finish(&mut self) {
        if self.up && self.disk.any_failed() {
            self.crash();
        }
        self.free_lanes();
        self.clients.iter_mut().for_each(|client| client.stalled_until_us = 0);
        let deadline = self.now_us + HEAL_US;
        self.run_until(deadline, |world| {
            let ready = |client: &Device| client.gone || (client.open_sends == 0 && client.machine.is_online());
            world.up && world.clients.iter().all(ready)
        });
        // Whoever is behind catches up, and acknowledges.
        self.run_until(self.now_us + CURSOR_TIME_US, |_| false);
        self.rest();
        self.tell_all_at_rest();
        self.run_until(self.now_us + CURSOR_TIME_US, |_| false);
        let now_ms = self.now_ms();
        for client in 0..self.clients.len() {
            if self.clients[client].name.number == 1 && !self.clients[client].gone {
                self.clients[client].ask_all(now_ms, acts::peers(), &self.history);
                self.clients[client].export_too();
                self.pump(client);
            }
        }
        self.run_until(self.now_us + HEAL_US, |world| world.clients.iter().all(|client| client.asked.is_done()));
        self.run_until(self.now_us + CURSOR_TIME_US, |_| false);
        for client in 0..self.clients.len() {
            let online = self.clients[client].machine.is_online();
            if online && self.clients[client].inbox.is_empty() {
                self.history.push(self.clients[client].name, Happening::Settled);
            }
            self.restart_process(client);
        }
        self.run_until(self.now_us + CURSOR_TIME_US, |_| false);
        self.sides.iter().for_each(|side| side.shard.check_invariants());
    }

    /// Nothing changes for a while; then somebody is gone for a while, and comes back.
    fn rest(&mut self) {
        self.run_until(self.now_us + REST_US, |_| false);
        self.note_rest(None);
        let user = self.rng.random_range(0..USERS);
        let left_ms = (EPOCH_US + self.now_us) / 1_000;
        let away: Vec<usize> = (0..self.clients.len()).filter(|at| self.clients[*at].name.user == user).collect();
        for &client in &away {
            self.restart_process(client);
            self.clients[client].away = true;
        }
        self.run_until(self.now_us + REST_US, |_| false);
        self.note_rest(Some((user, left_ms)));
        for &client in &away {
            self.clients[client].away = false;
            let process = self.clients[client].process;
            self.after(0, Action::Connect { client, process });
        }
        self.run_until(self.now_us + CURSOR_TIME_US, |_| false);
    }

    /// `away`: who is gone, and since when.
    fn note_rest(&mut self, away: Option<(u32, u64)>) {
        for client in &self.clients {
            let left_ms = away.filter(|(user, _)| client.name.user == *user).map(|(_, at_ms)| at_ms);
            let left_ms = if client.gone { Some(0) } else { left_ms };
            if left_ms.is_some() || client.machine.is_online() {
                self.history.push(client.name, Happening::Rested { left_ms });
            }
        }
    }

    fn run_until(&mut self, deadline_us: u64, done: impl Fn(&Self) -> bool) {
        while self.now_us < deadline_us && !done(self) {
            if self.queue.peek().is_none_or(|due| due.0.at_us > deadline_us) {
                self.now_us = deadline_us;
                return;
            }
            self.step();
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Connect { client, process } => {
                if self.clients[client].process == process && self.clients[client].link.is_none() {
                    self.connect(client);
                }
            }
            Action::ToServer { link, bytes } => self.server_receives(link, &bytes),
            Action::ToClient { link, bytes } => self.client_receives(link, &bytes),
            Action::ServerSeesEnd { link } => self.server_sees_end(link),
            Action::ClientSeesEnd { link } => self.client_sees_end(link),
            Action::HandOver { link } => self.hand_over(link),
            Action::Sent { link, bytes } => self.sent(link, bytes),
            Action::Lane { epoch, lane } if epoch == self.epoch => self.lane_moves(lane),
            Action::Commit { epoch, shard } if epoch == self.epoch => self.commit(shard),
            Action::Loaded { epoch, shard, token, query } if epoch == self.epoch => self.loaded(shard, token, query),
            Action::Worked { epoch, shard, token, work } if epoch == self.epoch => self.worked(shard, token, &work),
            Action::Timer { epoch, shard } if epoch == self.epoch => self.timer(shard),
            Action::Lane { .. }
            | Action::Commit { .. }
            | Action::Loaded { .. }
            | Action::Worked { .. }
            | Action::Timer { .. } => {}
            Action::Wake { client, process } => {
                if self.clients[client].process == process {
                    self.clients[client].wake_us = 0;
                    self.pump(client);
                }
            }
            Action::Take { client, process } => self.take(client, process),
            Action::Act { client } => self.act(client),
            Action::Delete(mortal) => self.delete_somebody(mortal),
            Action::Fault => self.fault(),
            Action::Checkpoint { epoch, conversation, floor } => {
                if epoch == self.epoch {
                    self.disk.let_go(conversation, floor);
                }
            }
            Action::Restart { epoch, orderly } => {
                if epoch == self.epoch {
                    self.restart(orderly);
                }
            }
        }
    }

    // --- clients -------------------------------------------------------------------------------------------------

    /// Lets a client's machine do what is due, and takes out what it brought.
    pub(super) fn pump(&mut self, client: usize) {
        let now_ms = self.now_ms();
        let device = &mut self.clients[client];
        let cut = device.machine.advance(now_ms).err();
        device.finish(now_ms, &mut self.history);
        // What an answer made the application ask goes out now, not when something else happens.
        let cut = cut.or_else(|| device.machine.advance(now_ms).err());
        let mut bytes = Vec::new();
        device.machine.take_output(&mut bytes);
        device.inbox.extend(device.machine.take_events());
        let (process, link) = (device.process, device.link);
        if let Some(link) = link {
            self.client_writes(link, &bytes);
            match cut {
                Some(Cut::Lost(_)) => self.client_cuts(link),
                Some(Cut::End(why)) => return self.ended(client, &why),
                None => {}
            }
        }
        let device = &mut self.clients[client];
        if !device.inbox.is_empty() && !device.taking {
            device.taking = true;
            let at_us = device.stalled_until_us.max(self.now_us);
            let delay = self.random_us(0, 5_000);
            self.at(at_us + delay, Action::Take { client, process });
        }
        let wake = self.clients[client].machine.next_wake(now_ms).map(|at_ms| at_ms.max(now_ms + 1) * 1_000);
        if let Some(at_us) = wake
            && (self.clients[client].wake_us == 0 || at_us < self.clients[client].wake_us)
        {
            self.clients[client].wake_us = at_us;
            self.at(at_us, Action::Wake { client, process });
        }
    }

    fn take(&mut self, client: usize, process: u32) {
        if self.clients[client].process != process {
            return;
        }
        self.clients[client].taking = false;
        if self.clients[client].stalled_until_us <= self.now_us {
            let count = self.rng.random_range(1..20);
            self.clients[client].take(count, &mut self.history);
        }
        self.pump(client);
    }

    fn connect(&mut self, client: usize) {
        if self.clients[client].away {
            return;
        }
        if !self.up {
            return self.try_again(client);
        }
        let shard = self.rng.random_range(0..self.sides.len());
        self.next_link += 1;
        let number = self.next_link;
        let link = Link {
            client,
            shard,
            conn: self.open_conn(shard),
            decoder: FrameDecoder::new(),
            stopped: false,
            moving: None,
            in_flight: false,
            server_open: true,
            client_open: true,
            tap: Tap::default(),
            to_server_us: 0,
            to_client_us: 0,
        };
        self.links.insert(number, link);
        self.sides[shard].conns.insert(self.links[&number].conn, number);
        self.opened(shard, self.links[&number].conn);
        let now_ms = self.now_ms();
        self.history.push(self.clients[client].name, Happening::Connects { connection: number });
        self.clients[client].link = Some(number);
        self.clients[client].machine.connected(now_ms, "token");
        self.pump(client);
    }

    /// After a back-off with full jitter.
    fn try_again(&mut self, client: usize) {
        let device = &mut self.clients[client];
        device.attempts += 1;
        let (attempts, process) = (device.attempts, device.process);
        let bound = (BACK_OFF_US_MIN << attempts.min(10)).min(BACK_OFF_US_MAX);
        let delay = self.random_us(0, bound);
        self.after(delay, Action::Connect { client, process });
    }

    fn client_writes(&mut self, link: u64, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() && self.links.get(&link).is_some_and(|link| link.client_open) {
            // In pieces, whose ends have nothing to do with those of frames.
            let size = if self.chance(20) { self.rng.random_range(1..=rest.len()) } else { rest.len() };
            let (piece, left) = rest.split_at(size);
            rest = left;
            let delay = self.random_us(50, 2_000);
            let (now_us, Some(open)) = (self.now_us, self.links.get_mut(&link)) else { return };
            open.tap.wrote(piece);
            let (name, notices) = (self.clients[open.client].name, open.tap.take_notices());
            open.to_server_us = open.to_server_us.max(now_us + delay);
            let (at_us, bytes) = (open.to_server_us, piece.to_vec());
            notices.into_iter().for_each(|body| self.history.push(name, Happening::Notice(Notice::Written { body })));
            self.at(at_us, Action::ToServer { link, bytes });
        }
    }

    fn client_receives(&mut self, link: u64, bytes: &[u8]) {
        let Some(open) = self.links.get_mut(&link).filter(|link| link.client_open) else { return };
        let client = open.client;
        open.tap.reached((self.clients[client].name, link), bytes, &mut self.history);
        self.note(1, link.wrapping_mul(31).wrapping_add(ringline_schema::ids::body_hash(bytes)));
        let now_ms = self.now_ms();
        let cut = self.clients[client].machine.received(now_ms, bytes).err();
        if self.clients[client].machine.is_online() {
            self.clients[client].attempts = 0;
        }
        match cut {
            Some(Cut::Lost(_)) => self.client_cuts(link),
            Some(Cut::End(why)) => return self.ended(client, &why),
            None => {}
        }
        self.pump(client);
    }

    /// Logged out by another device, or deleted: the application begins anew, and tries whether that is for ever.
    fn ended(&mut self, client: usize, why: &CloseReason) {
        let deleted = match why {
            CloseReason::Kicked { reason, .. } => *reason == KickReason::UserDeleted,
            CloseReason::Refused { code, .. } => *code == ErrorCode::UserDeleted,
            CloseReason::ByClient | CloseReason::AuthFailed => false,
        };
        if deleted {
            self.clients[client].gone = true;
            self.history.push(self.clients[client].name, Happening::TurnedAway);
        }
        self.restart_process(client);
    }

    /// The client ends a connection.
    pub(super) fn client_cuts(&mut self, link: u64) {
        let Some(open) = self.links.get_mut(&link) else { return };
        let (at_us, was_open) = (open.to_server_us, std::mem::replace(&mut open.client_open, false));
        if was_open {
            self.at(at_us.max(self.now_us), Action::ServerSeesEnd { link });
            self.client_lost(link);
        }
    }

    fn client_sees_end(&mut self, link: u64) {
        let Some(open) = self.links.get_mut(&link) else { return };
        if std::mem::replace(&mut open.client_open, false) {
            self.client_lost(link);
        }
        self.forget_link(link);
    }

    fn client_lost(&mut self, link: u64) {
        let Some(open) = self.links.get(&link) else { return };
        let client = open.client;
        // What was not answered may have been refused, and the refusal lost: others may have passed it.
        open.tap.lost(self.clients[client].name, &mut self.history);
        if self.clients[client].link == Some(link) {
            self.clients[client].link = None;
            self.clients[client].machine.disconnected();
            self.try_again(client);
            self.pump(client);
        }
    }

    pub(super) fn forget_link(&mut self, link: u64) {
        if self.links.get(&link).is_some_and(|link| !link.client_open && !link.server_open) {
            self.links.remove(&link);
        }
    }

    /// The process of a device dies, and another begins.
    pub(super) fn restart_process(&mut self, client: usize) {
        if let Some(link) = self.clients[client].link.take()
            && let Some(open) = self.links.get_mut(&link)
        {
            open.client_open = false;
            let at_us = open.to_server_us.max(self.now_us);
            self.at(at_us, Action::ServerSeesEnd { link });
        }
        let now_us = self.now_us;
        self.clients[client].restart(now_us, &mut self.history);
        let later_us = if self.clients[client].gone { GONE_US_MAX } else { 300_000 };
        let (delay, process) = (self.random_us(0, later_us), self.clients[client].process);
        self.after(delay, Action::Connect { client, process });
    }
}
