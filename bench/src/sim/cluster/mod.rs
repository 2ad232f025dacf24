//! A cluster under one seed: real shards, the real state machines of links, and where partitions change hands the real decisions
//! about them; nodes that die, pause, leave and come back as new processes; and the SDK's machine, which is sent on to the
//! node its user lives on.
//!
//! As [`super::world`], with several nodes. What clients saw goes to the same checker; beside it a referee, who knows what no
//! client can, sees that nobody serves without a lease, takes what another may still serve, or gives back what it still writes.
//!
//! **What may be lost, doubled and late.** Between two nodes: bytes are delayed, held while one direction is cut, cut anywhere by
//! the end of a connection, and sent again on the next; connections are dialled from both sides and overtake each other. So
//! below a link anything is lost and doubled, and the link makes of it what shards rely on: in order and once each while both
//! processes live, and `Reset` when one did not. Messages of a process that ended are lost, wholly or from any one on. Between
//! links, and between the lanes of a node, nothing is ordered. A link may also refuse ("full"), and the shard is given its
//! message back. Within a node lanes only delay: see [`super`].
//!
//! - Configured nodes, each with a disk of its own: `nodes`, `peers`, `net`, `faults`.
//! - Partitions that move, over one simulated PostgreSQL and etcd: [`database`], `sessions`, [`etcd`], `steward`.
//! - Here: the queue of what happens when, and the clients.

pub mod database;
pub mod etcd;
mod faults;
mod net;
mod nodes;
mod peers;
mod sessions;
mod setup;
mod steward;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use ringline_client::machine::{Ask, Cut};
use ringline_client::{Class, JoinPolicy, LinkError, SendOptions};
use ringline_cluster::reconcile::Start;
use ringline_core::event::ConnId;
use ringline_schema::frame::FrameDecoder;

use super::acts::{GROUPS, peers};
use super::device::{Device, Tap};
use super::world::USERS;
use super::{Run, acts};
use crate::checker::{Device as Name, Happening, History, Peer, Place};
use crate::observed;
use database::Database;
use etcd::{Etcd, ToEtcd};
use net::Socket;
use nodes::{AtNode, Node};
use sessions::{Asked, Waiter};
pub use setup::{Bug, Played, Setup};

const DEVICES_PER_USER: u64 = 2;
const STEPS_MAX: u64 = 3_000_000;
/// Virtual time after the faults within which everything must have settled.
const HEAL_US: u64 = 240_000_000;
/// A moved cursor is written within a second, and devices of another node hear of what they lack; this is longer.
const SETTLE_US: u64 = 10_000_000;
/// Longer than the SDK's patience with a question.
const PATIENCE_US: u64 = 75_000_000;
const BACK_OFF_US_MIN: u64 = 200_000;
const BACK_OFF_US_MAX: u64 = 5_000_000;
const OPEN_SENDS_MAX: u32 = 40;

/// What can happen.
enum Action {
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
    HandOver {
        link: u64,
    },
    Sent {
        link: u64,
        bytes: usize,
    },
    /// At a node, if that process still lives.
    At {
        node: usize,
        epoch: u32,
        what: AtNode,
    },
    /// A connection between two nodes stands.
    Dialled {
        socket: u64,
    },
    /// Bytes reach an end of one …
    Bytes {
        socket: u64,
        end: usize,
    },
    /// … which hears that it is over.
    Shut {
        socket: u64,
        end: usize,
    },
    /// Something reaches the database …
    Asked(Box<Asked>),
    /// … whose standby has all that is written up to there …
    Replicated {
        life: u32,
        upto: usize,
    },
    /// … and which is back.
    DatabaseBack {
        life: u32,
        as_standby: bool,
    },
    /// It dies for good before its standby has all of it.
    DatabaseDies {
        life: u32,
    },
    EtcdAsked {
        node: usize,
        epoch: u32,
        ask: ToEtcd,
    },
    EtcdBack,
    /// A node that was paused goes on.
    Resume {
        node: usize,
        epoch: u32,
    },
    /// A process has its place in the database.
    Start {
        node: usize,
        epoch: u32,
        start: Start,
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
    Fault,
    Boot {
        node: usize,
        epoch: u32,
    },
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

/// A client's connection.
struct Link {
    client: usize,
    node: usize,
    shard: usize,
    conn: ConnId,
    decoder: FrameDecoder,
    stopped: bool,
    moving: Option<Vec<u8>>,
    in_flight: bool,
    server_open: bool,
    client_open: bool,
    tap: Tap,
    to_server_us: u64,
    to_client_us: u64,
}

/// See the module.
struct Cluster {
    rng: SmallRng,
    now_us: u64,
    queue: BinaryHeap<Reverse<Due>>,
    queued: u64,
    setup: Setup,
    nodes: Vec<Node>,
    /// Connections between nodes.
    sockets: BTreeMap<u64, Socket>,
    next_socket: u64,
    /// Directions that carry nothing, until then.
    cuts: BTreeMap<(usize, usize), u64>,
    database: Database,
    /// Nodes that don't reach it, until then.
    database_cuts: BTreeMap<usize, u64>,
    /// By place in its log: who waits for the standby.
    waiting: BTreeMap<usize, Waiter>,
    replicate_us: u64,
    /// Chance in percent that the standby is slow.
    slow_standby_percent: u32,
    sessions: u64,
    etcd: Etcd,
    etcd_cuts: BTreeMap<usize, u64>,
    /// Batches that came again.
    resent: u64,
    breaches: Vec<String>,
    links: BTreeMap<u64, Link>,
    next_link: u64,
    clients: Vec<Device>,
    /// Where each client was sent.
    targets: Vec<Option<usize>>,
    history: History,
    lively: bool,
    /// Chance in percent that a link takes no more.
    full_percent: u32,
    ends_us: u64,
    trace: u64,
    steps: u64,
    faults: u64,
}

/// Plays one seed to its end.
pub fn run(seed: u64, setup: Setup) -> Played {
    let mut cluster = Cluster::new(seed, setup);
    cluster.play();
    cluster.finish();
    let run = Run {
        verdict: cluster.history.check(),
        trace: cluster.trace,
        steps: cluster.steps,
        faults: cluster.faults,
        millis: cluster.now_us / 1_000,
    };
    Played { run, breaches: cluster.breaches, resent: cluster.resent }
}

impl Cluster {
    fn new(seed: u64, setup: Setup) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        let names = (0..USERS).flat_map(|user| (1..=DEVICES_PER_USER).map(move |number| Name { user, number }));
        let clients: Vec<_> = names.map(Device::new).collect();
        let mut cluster = Self {
            now_us: 1,
            queue: BinaryHeap::new(),
            queued: 0,
            setup,
            nodes: Vec::new(),
            sockets: BTreeMap::new(),
            next_socket: 0,
            cuts: BTreeMap::new(),
            database: Database::new(setup.bug == Some(Bug::NoFence)),
            database_cuts: BTreeMap::new(),
            waiting: BTreeMap::new(),
            replicate_us: 0,
            slow_standby_percent: 5,
            sessions: 0,
            etcd: Etcd::default(),
            etcd_cuts: BTreeMap::new(),
            resent: 0,
            breaches: Vec::new(),
            links: BTreeMap::new(),
            next_link: 0,
            targets: vec![None; clients.len()],
            clients,
            history: History::default(),
            lively: true,
            full_percent: 0,
            ends_us: 0,
            trace: seed,
            steps: 0,
            faults: 0,
            rng,
        };
        // Where leases have to end before something moves, more time passes.
        let lasts_us = if setup.moving { 20_000_000..=45_000_000 } else { 4_000_000..=10_000_000 };
        cluster.ends_us = cluster.rng.random_range(lasts_us);
        for at in 0..setup.nodes {
            let (shards, clock) = (cluster.rng.random_range(1..=3), cluster.any_clock());
            cluster.nodes.push(Node::new(shards, clock));
            let delay = cluster.random_us(0, 300_000);
            cluster.after(delay, Action::Boot { node: at, epoch: 0 });
        }
        for client in 0..cluster.clients.len() {
            cluster.history.push(cluster.clients[client].name, Happening::Started);
            let (connect, act) = (cluster.random_us(0, 50_000), cluster.random_us(0, 500_000));
            cluster.after(connect, Action::Connect { client, process: 0 });
            cluster.after(act, Action::Act { client });
            let Name { user, number } = cluster.clients[client].name;
            if user < GROUPS && number == 1 {
                cluster.create_group(client, user);
            }
        }
        cluster.after(600_000, Action::Fault);
        cluster
    }

    fn bug(&self, bug: Bug) -> bool {
        self.setup.bug == Some(bug)
    }

    /// The referee has seen something.
    fn breach(&mut self, what: String) {
        if !self.breaches.contains(&what) {
            self.breaches.push(what);
        }
    }

    fn random_us(&mut self, from: u64, to: u64) -> u64 {
        self.rng.random_range(from..=to)
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1_000
    }

    fn after(&mut self, delay_us: u64, action: Action) {
        self.at(self.now_us + delay_us, action);
    }

    fn at(&mut self, at_us: u64, action: Action) {
        self.queued += 1;
        self.queue.push(Reverse(Due { at_us, number: self.queued, action }));
    }

    fn note(&mut self, kind: u64, what: u64) {
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

    fn play(&mut self) {
        while self.now_us < self.ends_us && self.step() {}
        self.lively = false;
    }

    /// Nothing breaks any more: everybody gets time to finish, logs are read back, cursors are held to their word.
    fn finish(&mut self) {
        self.heal();
        self.clients.iter_mut().for_each(|client| client.stalled_until_us = 0);
        let deadline = self.now_us + HEAL_US;
        self.run_until(deadline, |cluster| {
            let idle = |client: &Device| client.open_sends == 0 && client.machine.is_online();
            cluster.is_settled() && cluster.clients.iter().all(idle)
        });
        // What was asked before is tried again for a minute, and then it is over.
        self.run_until(self.now_us + PATIENCE_US, |_| false);
        let now_ms = self.now_ms();
        for client in 0..self.clients.len() {
            if self.clients[client].name.number == 1 {
                self.clients[client].ask_all(now_ms, peers(), &self.history);
                self.pump(client);
            }
        }
        self.run_until(self.now_us + HEAL_US, |cluster| cluster.clients.iter().all(|client| client.asked.is_done()));
        self.run_until(self.now_us + SETTLE_US, |_| false);
        for client in 0..self.clients.len() {
            let online = self.clients[client].machine.is_online();
            if online && self.clients[client].inbox.is_empty() {
                self.history.push(self.clients[client].name, Happening::Settled);
            }
            self.restart_process(client);
        }
        self.run_until(self.now_us + SETTLE_US, |_| false);
        self.check_shards();
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

    /// The node whose turn this is, if it is one's.
    fn holder(&self, action: &Action) -> Option<usize> {
        match action {
            Action::At { node, .. } => Some(*node),
            Action::ToServer { link, .. }
            | Action::ServerSeesEnd { link }
            | Action::HandOver { link }
            | Action::Sent { link, .. } => self.links.get(link).map(|link| link.node),
            Action::Dialled { socket } => self.sockets.get(socket).map(|open| open.ends[0].node),
            Action::Bytes { socket, end } | Action::Shut { socket, end } => {
                self.sockets.get(socket).map(|open| open.ends[*end].node)
            }
            Action::Connect { .. }
            | Action::ToClient { .. }
            | Action::ClientSeesEnd { .. }
            | Action::Asked(_)
            | Action::Replicated { .. }
            | Action::DatabaseBack { .. }
            | Action::DatabaseDies { .. }
            | Action::EtcdAsked { .. }
            | Action::EtcdBack
            | Action::Resume { .. }
            | Action::Start { .. }
            | Action::Wake { .. }
            | Action::Take { .. }
            | Action::Act { .. }
            | Action::Fault
            | Action::Boot { .. } => None,
        }
    }

    fn perform(&mut self, action: Action) {
        // Who is paused does it later, all in order.
        if let Some(node) = self.holder(&action).filter(|node| self.nodes[*node].paused) {
            return self.nodes[node].held.push(action);
        }
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
            Action::Wake { client, process } => {
                if self.clients[client].process == process {
                    self.clients[client].wake_us = 0;
                    self.pump(client);
                }
            }
            Action::Take { client, process } => self.take(client, process),
            Action::Act { client } => self.act(client),
            Action::Fault => self.fault(),
            Action::At { node, epoch, what } => {
                if self.lives(node, epoch) {
                    self.perform_at_node(node, what);
                }
            }
            Action::Dialled { socket } => self.dialled(socket),
            Action::Bytes { socket, end } => self.hear_socket(socket, end),
            Action::Shut { socket, end } => self.shut(socket, end),
            Action::Asked(asked) => self.database_asked(asked),
            Action::Replicated { life, upto } => self.replicated(life, upto),
            Action::DatabaseBack { life, as_standby } => self.database_returns(life, as_standby),
            Action::DatabaseDies { life } => self.database_dies(life),
            Action::Resume { node, epoch } => self.resume(node, epoch),
            Action::EtcdAsked { node, epoch, ask } => self.etcd_asked((node, epoch), ask),
            Action::EtcdBack => self.etcd.returns(self.now_us),
            Action::Start { node, epoch, start } => self.start_process((node, epoch), start),
            Action::Boot { node, epoch } if self.nodes[node].epoch == epoch && !self.nodes[node].up => {
                if self.setup.moving { self.enter(node) } else { self.boot(node) }
            }
            Action::Boot { .. } => {}
        }
    }

    // --- clients -------------------------------------------------------------------------------------------------

    fn act(&mut self, client: usize) {
        if !self.lively {
            return;
        }
        let pause = self.random_us(10_000, 400_000);
        self.after(pause, Action::Act { client });
        if self.chance(25) {
            self.ask_something(client);
        } else if self.clients[client].open_sends <= OPEN_SENDS_MAX {
            let count = if self.chance(10) { self.rng.random_range(2..12) } else { 1 };
            for _ in 0..count {
                let to = match self.chance(30) {
                    true => Peer::Group(self.rng.random_range(0..GROUPS)),
                    false => Peer::User(self.rng.random_range(0..USERS)),
                };
                let transient = matches!(to, Peer::User(_)) && self.chance(15);
                let class = if transient { Class::Transient } else { Class::Durable };
                let (now_ms, options) = (self.now_ms(), SendOptions { class, ..SendOptions::default() });
                self.clients[client].send((now_ms, to), (options, 0), &mut self.history);
            }
        }
        self.pump(client);
    }

    fn ask_something(&mut self, client: usize) {
        let (now_ms, number) = (self.now_ms(), self.rng.random_range(0..64));
        let place = self.clients[client].asked.place(number);
        match self.rng.random_range(0..100) {
            0..35 => self.act_in_group(client),
            35..65 => {
                if let Some(place) = place {
                    self.clients[client].read(now_ms, place, &mut self.history);
                }
            }
            65..82 => {
                let behind = place.map(|place| Place { seq: self.rng.random_range(0..=place.seq), ..place });
                self.clients[client].sync(now_ms, behind.into_iter().collect(), &self.history);
            }
            82..90 => self.clients[client].list(now_ms, &self.history),
            _ => self.amend_something(client),
        }
    }

    /// Mostly what is allowed; often for oneself, whose rows and messages may be with different nodes.
    fn amend_something(&mut self, client: usize) {
        let (now_ms, number) = (self.now_ms(), self.rng.random_range(0..1_024));
        let Some((with, place, by)) = self.clients[client].asked.memory.message(number) else { return };
        let (own, what) = (self.clients[client].name.user, self.rng.random_range(0..100));
        self.clients[client].amend(now_ms, (with, place), acts::amendment((own, by), with, what), &mut self.history);
    }

    fn create_group(&mut self, client: usize, group: u32) {
        let users = (0..USERS).filter(|user| (user + group).is_multiple_of(2)).map(Peer::User).map(observed::name);
        let (group, join) = (observed::name(Peer::Group(group)), JoinPolicy::Open);
        let ask = Ask::CreateGroup { group, join, users: users.collect() };
        let now_ms = self.now_ms();
        self.clients[client].ask_group(now_ms, ask);
    }

    fn act_in_group(&mut self, client: usize) {
        let number = self.rng.random_range(0..GROUPS);
        let group = observed::name(Peer::Group(number));
        let own = self.clients[client].name.user;
        let user = observed::name(Peer::User((own + self.rng.random_range(1..USERS)) % USERS));
        let ask = match self.rng.random_range(0..100) {
            0..20 if own == number => return self.create_group(client, number),
            20..60 if own == number => Ask::Invite { group, users: vec![user] },
            _ if own == number => Ask::Kick { group, user },
            0..80 => Ask::JoinGroup(group),
            _ => Ask::LeaveGroup(group),
        };
        let now_ms = self.now_ms();
        self.clients[client].ask_group(now_ms, ask);
    }

    /// Lets a client's machine do what is due, and takes out what it brought.
    fn pump(&mut self, client: usize) {
        let now_ms = self.now_ms();
        let device = &mut self.clients[client];
        let cut = device.machine.advance(now_ms).err();
        device.finish(now_ms, &mut self.history);
        let cut = cut.or_else(|| device.machine.advance(now_ms).err());
        let mut bytes = Vec::new();
        device.machine.take_output(&mut bytes);
        device.inbox.extend(device.machine.take_events());
        let (process, link) = (device.process, device.link);
        if let Some(link) = link {
            self.client_writes(link, &bytes);
            match cut {
                Some(Cut::Lost(_)) => self.client_cuts(link),
                Some(Cut::End(_)) => return self.restart_process(client),
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

    /// To the node that it was sent to, or any.
    fn connect(&mut self, client: usize) {
        let node = self.targets[client].unwrap_or_else(|| self.rng.random_range(0..self.nodes.len()));
        if !self.nodes[node].up || self.nodes[node].paused {
            self.targets[client] = None;
            return self.try_again(client);
        }
        let shard = self.rng.random_range(0..self.nodes[node].sides.len());
        self.next_link += 1;
        let (number, conn) = (self.next_link, self.nodes[node].open_conn(shard));
        let link = Link {
            client,
            node,
            shard,
            conn,
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
        self.nodes[node].sides[shard].conns.insert(conn, number);
        self.opened((node, shard), conn);
        let now_ms = self.now_ms();
        self.clients[client].link = Some(number);
        self.clients[client].machine.connected(now_ms, "token");
        self.pump(client);
    }

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
            let size = if self.chance(20) { self.rng.random_range(1..=rest.len()) } else { rest.len() };
            let (piece, left) = rest.split_at(size);
            rest = left;
            let delay = self.random_us(50, 2_000);
            let (now_us, Some(open)) = (self.now_us, self.links.get_mut(&link)) else { return };
            open.tap.wrote(piece);
            open.to_server_us = open.to_server_us.max(now_us + delay);
            let (at_us, bytes) = (open.to_server_us, piece.to_vec());
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
            Some(Cut::Lost(LinkError::Redirected { address } | LinkError::Goaway { address: Some(address), .. })) => {
                self.client_cuts(link);
                self.targets[client] = address.strip_prefix('n').and_then(|number| number.parse().ok());
            }
            Some(Cut::Lost(LinkError::Protocol(code))) => {
                let (mut decoder, mut rest, mut told) = (FrameDecoder::new(), bytes, Vec::new());
                while let Ok(Some(frame)) = decoder.next(&mut rest, u32::MAX) {
                    told.push((frame.header.command, frame.header.request_id));
                }
                panic!("the server said what the SDK can't take: {code}, among commands and request ids {told:?}")
            }
            Some(Cut::Lost(_)) => self.client_cuts(link),
            Some(Cut::End(_)) => return self.restart_process(client),
            None => {}
        }
        self.pump(client);
    }

    fn client_cuts(&mut self, link: u64) {
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
        open.tap.lost(self.clients[client].name, &mut self.history);
        if self.clients[client].link == Some(link) {
            self.clients[client].link = None;
            // Wherever its user is served now.
            self.targets[client] = None;
            self.clients[client].machine.disconnected();
            self.try_again(client);
            self.pump(client);
        }
    }

    fn forget_link(&mut self, link: u64) {
        if self.links.get(&link).is_some_and(|link| !link.client_open && !link.server_open) {
            self.links.remove(&link);
        }
    }

    fn restart_process(&mut self, client: usize) {
        if let Some(link) = self.clients[client].link.take()
            && let Some(open) = self.links.get_mut(&link)
        {
            open.client_open = false;
            let at_us = open.to_server_us.max(self.now_us);
            self.at(at_us, Action::ServerSeesEnd { link });
        }
        let now_us = self.now_us;
        self.clients[client].restart(now_us, &mut self.history);
        self.targets[client] = None;
        let (delay, process) = (self.random_us(0, 300_000), self.clients[client].process);
        self.after(delay, Action::Connect { client, process });
    }
}

const _: () = assert!(acts::GROUPS <= USERS);
