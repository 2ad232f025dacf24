//! The nodes of a cluster's run: their shells, played. Owned by the cluster.
//!
//! Invariants: nothing of an earlier process of a node has an effect; a node that is paused does what was due when it goes on,
//! in order; each append is record n of its shard; a lane keeps its order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rand::RngExt;
use ringline_cluster::link::hello::{Hello, Incarnation};
use ringline_cluster::link::line::Process;
use ringline_cluster::ownership::Ownership;
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig};
use ringline_core::event::{ConnId, Effect, Effects, Event, Now, ShardMessage, Token, Verdict, Work, WorkOutcome};
use ringline_schema::frame::FrameDecoder;
use ringline_schema::message::Request;
use ringline_schema::record::Query;

use super::super::device::EPOCH_US;
use super::super::disk::{Disk, Written};
use super::peers::PeerLink;
use super::sessions::{FromDatabase, Session};
use super::steward::{FromEtcd, Steward};
use super::{Action, Bug, Cluster};

const OUTBOX_BYTES_MAX: usize = 6 * 1024;
const CACHED_MAX: usize = 2;
/// How much faster or slower the clock of a machine runs, at most, in parts of a thousand.
const RATE_MAX: i64 = 5;
/// How far apart monotonic clocks begin.
const OFFSET_US_MAX: u64 = 1_000_000_000;

/// What is due at a node.
pub enum AtNode {
    Lane {
        lane: (u16, u16),
    },
    Commit {
        shard: usize,
    },
    Loaded {
        shard: usize,
        token: Token,
        query: Query,
    },
    Worked {
        shard: usize,
        token: Token,
        work: Work,
    },
    Timer {
        shard: usize,
    },
    /// The links of a core have something to write.
    Flush {
        core: usize,
    },
    /// … or something that is due.
    Tick {
        core: usize,
    },
    Drain {
        core: usize,
        link: usize,
    },
    NotDialled {
        core: usize,
        link: usize,
    },
    /// A connection comes to the core of its link.
    Guest {
        core: usize,
        socket: u64,
        hello: Box<Hello>,
    },
    Late {
        socket: u64,
        end: usize,
    },
    /// Who owns what, as the steward told a core.
    Placement {
        core: usize,
        ownership: Arc<Ownership>,
        listed: Vec<usize>,
    },
    Database(FromDatabase),
    /// A session with the database is begun again.
    Connect {
        shard: usize,
    },
    Etcd(FromEtcd),
    Register,
    Renew,
    Look {
        number: u64,
    },
    /// A bell rings: look sooner.
    Bell,
    /// Everything was handed over, and the cores may end.
    Stop,
    /// This start may not go on.
    End,
}

/// The clocks of a machine.
#[derive(Clone, Copy, Default)]
pub struct Clock {
    offset_us: u64,
    /// Parts of a thousand that it runs faster.
    rate: i64,
    /// How far the time of day is off.
    pub skew_ms: i64,
}

impl Clock {
    fn pace(self) -> u128 {
        (1_000 + self.rate).unsigned_abs().into()
    }

    pub fn mono_us(self, now_us: u64) -> u64 {
        self.offset_us + (u128::from(now_us) * self.pace() / 1_000) as u64
    }

    /// When it shows at least that.
    pub fn when_us(self, mono_us: u64) -> u64 {
        (u128::from(mono_us.saturating_sub(self.offset_us)) * 1_000).div_ceil(self.pace()) as u64
    }

    fn unix_ms(self, now_us: u64) -> u64 {
        ((EPOCH_US + now_us) / 1_000).saturating_add_signed(self.skew_ms)
    }
}

/// What travels between the cores of a node.
pub enum LaneItem {
    Core(ShardMessage),
    /// A message of another node that came by the link of another core.
    Passed {
        peer: usize,
        process: Process,
        from: u16,
        payload: Vec<u8>,
    },
}

/// One shard and what its shell knows.
pub struct Side {
    pub shard: Shard,
    pub conns: BTreeMap<ConnId, u64>,
    next_slot: u32,
    timer_us: u64,
    /// Links to other nodes.
    pub peers: Vec<PeerLink>,
    /// When they have something due; 0: not planned.
    pub tick_us: u64,
    /// They have something to write, soon.
    pub flushes: bool,
    /// With the database, where partitions move.
    pub session: Session,
    /// The version up to which it has given up what it was asked to.
    pub released: u64,
}

/// A node, up or not; its disk stays.
pub struct Node {
    pub up: bool,
    /// Rises with each life.
    pub epoch: u32,
    pub shards: u16,
    disk: Disk,
    pub sides: Vec<Side>,
    lanes: BTreeMap<(u16, u16), VecDeque<LaneItem>>,
    lane_due_us: BTreeMap<(u16, u16), u64>,
    pub clock: Clock,
    /// It does nothing, and what was due meanwhile waits.
    pub paused: bool,
    pub held: Vec<Action>,
    pub incarnation: Incarnation,
    /// The newest process of each node that it has heard of.
    pub newest: BTreeMap<usize, Incarnation>,
    /// The fingerprint of its list of nodes.
    pub list: u64,
    /// Where partitions move; `None` while it is down.
    pub steward: Option<Steward>,
}

impl Node {
    pub fn new(shards: u16, clock: Clock) -> Self {
        Self {
            up: false,
            epoch: 0,
            shards,
            disk: Disk::new(shards, None),
            sides: Vec::new(),
            lanes: BTreeMap::new(),
            lane_due_us: BTreeMap::new(),
            clock,
            paused: false,
            held: Vec::new(),
            incarnation: Incarnation::default(),
            newest: BTreeMap::new(),
            list: 0,
            steward: None,
        }
    }

    fn now(&self, now_us: u64) -> Now {
        Now { mono_us: self.clock.mono_us(now_us), unix_ms: self.clock.unix_ms(now_us) }
    }

    pub fn open_conn(&mut self, shard: usize) -> ConnId {
        let side = &mut self.sides[shard];
        side.next_slot += 1;
        ConnId { slot: side.next_slot - 1, generation: self.epoch }
    }
}

pub fn name(node: usize) -> String {
    format!("n{node}")
}

impl Cluster {
    pub(super) fn any_clock(&mut self) -> Clock {
        let (offset_us, rate) = (self.random_us(0, OFFSET_US_MAX), self.rng.random_range(-RATE_MAX..=RATE_MAX));
        Clock { offset_us, rate, skew_ms: 0 }
    }

    /// Plans something for the present process of a node.
    pub(super) fn at_node(&mut self, (node, epoch): (usize, u32), delay_us: u64, what: AtNode) {
        self.after(delay_us, Action::At { node, epoch, what });
    }

    pub(super) fn perform_at_node(&mut self, node: usize, what: AtNode) {
        match what {
            AtNode::Lane { lane } => self.lane_moves(node, lane),
            AtNode::Commit { shard } => self.commit((node, shard)),
            AtNode::Loaded { shard, token, query } => {
                let answer = self.nodes[node].disk.answer(shard, query, true);
                self.tell((node, shard), Event::Loaded { token, answer });
            }
            AtNode::Worked { shard, token, work } => {
                let outcome = match work {
                    Work::HashPassword { .. } => WorkOutcome::Hashed("hash".to_owned()),
                    Work::VerifyPassword { .. } | Work::VerifyToken { .. } => WorkOutcome::Verified(true),
                };
                self.tell((node, shard), Event::Worked { token, outcome });
            }
            AtNode::Timer { shard } => {
                self.nodes[node].sides[shard].timer_us = 0;
                self.tell((node, shard), Event::Timer);
            }
            AtNode::Flush { core } => self.flush_peers((node, core)),
            AtNode::Tick { core } => self.tick_peers((node, core)),
            AtNode::Drain { core, link } => self.drain_link((node, core), link),
            AtNode::NotDialled { core, link } => self.not_dialled((node, core), link),
            AtNode::Guest { core, socket, hello } => self.take_guest(core, socket, &hello),
            AtNode::Late { socket, end } => self.too_late(socket, end),
            AtNode::Placement { core, ownership, listed } => {
                self.set_peers((node, core), &listed);
                self.tell((node, core), Event::Placement(ownership));
            }
            AtNode::Database(FromDatabase { shard: Some(shard), session, said }) => {
                self.session_hears((node, shard), session, said);
            }
            AtNode::Database(FromDatabase { shard: None, session, said }) => self.steward_hears(node, session, said),
            AtNode::Connect { shard } => self.connect_database((node, shard)),
            AtNode::Etcd(from) => self.etcd_says(node, from),
            AtNode::Register => self.register(node),
            AtNode::Renew => self.renew(node),
            AtNode::Look { number } => self.look(node, number),
            AtNode::Bell => self.bell(node),
            AtNode::Stop => self.stop(node),
            AtNode::End => self.go_down(node, false),
        }
    }

    pub(super) fn lives(&self, node: usize, epoch: u32) -> bool {
        self.nodes[node].up && self.nodes[node].epoch == epoch
    }

    /// A process of a configured node begins.
    pub(super) fn boot(&mut self, at: usize) {
        let count = self.nodes.len();
        let node = &mut self.nodes[at];
        node.epoch += 1;
        node.incarnation = Incarnation(node.epoch.into());
        let cores = CorePlacement::new(node.shards).expect("1 to 3 shards");
        let listed: Vec<_> = (0..count).map(|node| (name(node), 1)).collect();
        let placement = ClusterPlacement::new(&name(at), cores, &listed).expect("a cluster of a few");
        node.list = placement.fingerprint();
        let addresses = (0..count).map(|node| (name(node), name(node))).collect::<Vec<_>>();
        self.open_shards(at, &ClusterConfig { placement, nodes: addresses });
        let listed: Vec<_> = (0..count).collect();
        (0..self.nodes[at].sides.len()).for_each(|core| self.set_peers((at, core), &listed));
    }

    /// The cores of a new process.
    pub(super) fn open_shards(&mut self, at: usize, cluster: &ClusterConfig) {
        let (hash_seed, serves_on) = (self.trace, self.bug(Bug::ServesOn));
        let node = &mut self.nodes[at];
        node.up = true;
        let cores = CorePlacement::new(node.shards).expect("1 to 3 shards");
        let lease = node.steward.as_ref().map(|steward| steward.lease.clone());
        let side = |within| {
            let mut config = CoreConfig::new(ShardIndex::new(NodeIndex(at as u16), within), cores);
            config.cluster = Some(cluster.clone());
            config.lease = lease.clone().filter(|_| !serves_on);
            config.conversations_cached_max = CACHED_MAX;
            config.users_cached_max = CACHED_MAX;
            config.outbox_bytes_max = OUTBOX_BYTES_MAX;
            Side {
                shard: Shard::new(config, hash_seed),
                conns: BTreeMap::new(),
                next_slot: 0,
                timer_us: 0,
                peers: Vec::new(),
                tick_us: 0,
                flushes: false,
                session: Session::default(),
                released: 0,
            }
        };
        node.sides = (0..node.shards).map(side).collect();
        self.note(7, at as u64);
    }

    /// The process of a node ends: everything but its disk is gone. `orderly`: what it had said still arrives.
    pub(super) fn go_down(&mut self, at: usize, orderly: bool) {
        self.note(5, at as u64);
        let shards = self.rng.random_range(1..=3);
        if orderly {
            self.say_bye(at);
        }
        self.end_sockets_of(at, !orderly);
        let node = &mut self.nodes[at];
        node.disk.restart((shards, orderly), &mut self.rng);
        (node.up, node.shards, node.paused) = (false, shards, false);
        node.sides.clear();
        node.lanes.clear();
        node.lane_due_us.clear();
        node.newest.clear();
        node.steward = None;
        // It finds nobody any more.
        let held = std::mem::take(&mut node.held);
        held.into_iter().for_each(|action| self.at(self.now_us, action));
        let links: Vec<u64> = self.links.iter().filter(|(_, link)| link.node == at).map(|(link, _)| *link).collect();
        for link in links {
            let Some(open) = self.links.get_mut(&link) else { continue };
            open.server_open = false;
            let at_us = open.to_client_us.max(self.now_us);
            self.at(at_us, Action::ClientSeesEnd { link });
        }
        let (delay, epoch) = (self.random_us(1_000, 3_000_000), self.nodes[at].epoch);
        self.after(delay, Action::Boot { node: at, epoch });
    }

    // --- a node's shell ------------------------------------------------------------------------------------------

    pub(super) fn opened(&mut self, place: (usize, usize), conn: ConnId) {
        self.tell(place, Event::Opened { conn });
    }

    pub(super) fn tell(&mut self, place: (usize, usize), event: Event<'_>) {
        let verdict = self.handle(place, event);
        assert_eq!(verdict, Verdict::Continue, "only requests change what is read");
    }

    fn handle(&mut self, place: (usize, usize), event: Event<'_>) -> Verdict {
        let (node, shard) = place;
        let mut fx = Effects::default();
        let now = self.nodes[node].now(self.now_us);
        let verdict = self.nodes[node].sides[shard].shard.handle(event, now, &mut fx);
        self.carry_out(place, fx);
        verdict
    }

    /// A request of a client. Without its lease a shard neither asks its store nor other shards for it.
    fn request(&mut self, place: (usize, usize), event: Event<'_>) -> Verdict {
        let (node, shard) = place;
        let ends = matches!(event, Event::Request { request: Request::Logout, .. });
        let mut fx = Effects::default();
        let now = self.nodes[node].now(self.now_us);
        let verdict = self.nodes[node].sides[shard].shard.handle(event, now, &mut fx);
        let over = self.nodes[node].steward.as_ref().is_some_and(|own| now.mono_us / 1_000 >= own.lease.until_ms());
        if over && !ends && !fx.list.iter().all(|effect| matches!(effect, Effect::Close { .. })) {
            self.breach(format!("n{node} serves a request without its lease"));
        }
        self.carry_out(place, fx);
        verdict
    }

    fn carry_out(&mut self, place: (usize, usize), fx: Effects) {
        let (node, shard) = place;
        let epoch = self.nodes[node].epoch;
        let (mut ended, mut unsent) = (Vec::new(), Vec::new());
        for effect in fx.list {
            match effect {
                Effect::Close { conn, .. } => ended.push(conn),
                Effect::Append(record) if self.setup.moving => {
                    self.nodes[node].sides[shard].session.append(record);
                }
                Effect::Append(record) => {
                    self.nodes[node].disk.append(shard, record);
                }
                Effect::Load { token, query } if self.setup.moving => self.question(place, token, query),
                Effect::Load { token, query } => {
                    let delay = if self.chance(5) { self.random_us(1_000, 200_000) } else { self.random_us(10, 500) };
                    self.at_node((node, epoch), delay, AtNode::Loaded { shard, token, query });
                }
                Effect::Work { token, work } => {
                    let delay = self.random_us(100, 20_000);
                    self.at_node((node, epoch), delay, AtNode::Worked { shard, token, work });
                }
                Effect::ToShard { to, message } if usize::from(to.node().0) == node => {
                    self.put_on_lane(node, (shard as u16, to.within()), LaneItem::Core(message));
                }
                Effect::ToShard { to, message } => {
                    unsent.extend(self.send(place, to, message).map(|message| (to, message)));
                }
                Effect::Released { version } => self.released(place, version),
            }
        }
        for conn in fx.dirty {
            self.write(place, conn);
        }
        for conn in ended {
            self.server_ends(place, conn);
        }
        if self.setup.moving {
            self.submit(place);
        } else if self.nodes[node].disk.submit(shard) {
            let delay = if self.chance(5) { self.random_us(5_000, 300_000) } else { self.random_us(50, 3_000) };
            self.at_node((node, epoch), delay, AtNode::Commit { shard });
        }
        let (clock, side) = (self.nodes[node].clock, &mut self.nodes[node].sides[shard]);
        if let Some(due_us) = side.shard.next_deadline_us()
            && (side.timer_us == 0 || due_us < side.timer_us)
        {
            side.timer_us = due_us;
            let delay = clock.when_us(due_us).saturating_sub(self.now_us);
            self.at_node((node, epoch), delay, AtNode::Timer { shard });
        }
        for (to, message) in unsent {
            self.tell(place, Event::Unsent { to, message });
        }
    }

    pub(super) fn put_on_lane(&mut self, node: usize, lane: (u16, u16), item: LaneItem) {
        let delay = if self.chance(3) { self.random_us(1_000, 50_000) } else { self.random_us(1, 300) };
        let now_us = self.now_us;
        let home = &mut self.nodes[node];
        let due = home.lane_due_us.entry(lane).or_default();
        *due = (*due).max(now_us + delay);
        let (delay, epoch) = (*due - now_us, home.epoch);
        home.lanes.entry(lane).or_default().push_back(item);
        self.at_node((node, epoch), delay, AtNode::Lane { lane });
    }

    fn lane_moves(&mut self, node: usize, lane: (u16, u16)) {
        let Some(item) = self.nodes[node].lanes.get_mut(&lane).and_then(VecDeque::pop_front) else { return };
        let (from, to) = lane;
        self.note(2, u64::from(from) << 16 | u64::from(to));
        let place = (node, usize::from(to));
        match item {
            LaneItem::Core(message) => {
                let from = ShardIndex::new(NodeIndex(node as u16), from);
                self.tell(place, Event::Shard { from, message });
            }
            LaneItem::Passed { peer, process, from, payload } => {
                self.hear_passed(place, (peer, process), (from, &payload));
            }
        }
    }

    fn commit(&mut self, place: (usize, usize)) {
        if let Some(Written::Upto(upto)) = self.nodes[place.0].disk.finish(place.1) {
            self.note(3, upto);
            self.tell(place, Event::Stored { upto });
        }
    }

    pub(super) fn check_shards(&self) {
        self.nodes.iter().flat_map(|node| &node.sides).for_each(|side| side.shard.check_invariants());
    }

    // --- connections ---------------------------------------------------------------------------------------------

    pub(super) fn server_receives(&mut self, number: u64, bytes: &[u8]) {
        let Some(link) = self.links.get_mut(&number).filter(|link| link.server_open && !link.stopped) else { return };
        if let Some(moving) = &mut link.moving {
            moving.extend_from_slice(bytes);
            return;
        }
        let (node, shard, conn) = (link.node, link.shard, link.conn);
        let mut decoder = std::mem::take(&mut link.decoder);
        let mut input = bytes;
        let verdict = loop {
            let limit = self.nodes[node].sides[shard].shard.frame_limit(conn);
            let (raw, verdict) = match decoder.next(&mut input, limit) {
                Ok(None) => break None,
                Err(error) => panic!("the SDK wrote what is no frame: {error:?}"),
                Ok(Some(frame)) => match Event::of_frame(conn, &frame) {
                    Event::Refused { code, .. } => panic!("the SDK wrote what is no request: {code}"),
                    event => (frame.raw.to_vec(), self.request((node, shard), event)),
                },
            };
            match verdict {
                Verdict::Continue => {}
                other => break Some((raw, other)),
            }
        };
        let Some(link) = self.links.get_mut(&number) else { return };
        match verdict {
            None => link.decoder = decoder,
            Some((_, Verdict::Stop | Verdict::Continue)) => link.stopped = true,
            Some((raw, Verdict::HandOver(to))) => {
                assert_eq!(usize::from(to.node().0), node, "a socket stays on its node");
                link.moving = Some([&raw[..], &decoder.into_tail(), input].concat());
                self.nodes[node].sides[shard].conns.remove(&conn);
                link.shard = usize::from(to.within());
                let delay = self.random_us(5, 2_000);
                self.after(delay, Action::HandOver { link: number });
            }
        }
    }

    pub(super) fn hand_over(&mut self, number: u64) {
        let Some(link) = self.links.get(&number).filter(|link| link.server_open) else { return };
        let (node, shard) = (link.node, link.shard);
        let conn = self.nodes[node].open_conn(shard);
        let Some(link) = self.links.get_mut(&number) else { return };
        let bytes = link.moving.take().unwrap_or_default();
        (link.conn, link.decoder) = (conn, FrameDecoder::new());
        self.nodes[node].sides[shard].conns.insert(conn, number);
        self.opened((node, shard), conn);
        self.server_receives(number, &bytes);
    }

    fn write(&mut self, (node, shard): (usize, usize), conn: ConnId) {
        let Some(&number) = self.nodes[node].sides[shard].conns.get(&conn) else { return };
        if self.links.get(&number).is_none_or(|link| link.in_flight) {
            return;
        }
        let Some(bytes) = self.nodes[node].sides[shard].shard.take_output(conn) else { return };
        let delay = if self.chance(2) { self.random_us(10_000, 500_000) } else { self.random_us(50, 2_000) };
        let (now_us, Some(link)) = (self.now_us, self.links.get_mut(&number)) else { return };
        link.in_flight = true;
        let stalled_us = self.clients[link.client].stalled_until_us;
        link.to_client_us = link.to_client_us.max(now_us + delay).max(stalled_us);
        let (at_us, length) = (link.to_client_us, bytes.len());
        self.at(at_us, Action::ToClient { link: number, bytes });
        self.at(at_us, Action::Sent { link: number, bytes: length });
    }

    pub(super) fn sent(&mut self, number: u64, bytes: usize) {
        let Some(link) = self.links.get_mut(&number).filter(|link| link.server_open && link.moving.is_none()) else {
            return;
        };
        link.in_flight = false;
        let (place, conn) = ((link.node, link.shard), link.conn);
        self.tell(place, Event::Sent { conn, bytes });
        self.write(place, conn);
    }

    fn server_ends(&mut self, place: (usize, usize), conn: ConnId) {
        let (node, shard) = place;
        let Some(&number) = self.nodes[node].sides[shard].conns.get(&conn) else { return };
        let rest = self.nodes[node].sides[shard].shard.take_output(conn);
        let (now_us, Some(link)) = (self.now_us, self.links.get_mut(&number)) else { return };
        (link.stopped, link.server_open) = (true, false);
        link.to_client_us = link.to_client_us.max(now_us + 100);
        let at_us = link.to_client_us;
        if let Some(bytes) = rest {
            self.at(at_us, Action::ToClient { link: number, bytes });
        }
        self.at(at_us, Action::ClientSeesEnd { link: number });
        self.nodes[node].sides[shard].conns.remove(&conn);
        self.tell(place, Event::Closed { conn });
    }

    pub(super) fn server_sees_end(&mut self, number: u64) {
        let Some(link) = self.links.get_mut(&number) else { return };
        let was_open = std::mem::replace(&mut link.server_open, false);
        let (node, shard, conn, moving) = (link.node, link.shard, link.conn, link.moving.is_some());
        if was_open && !moving {
            self.nodes[node].sides[shard].conns.remove(&conn);
            self.tell((node, shard), Event::Closed { conn });
        }
        self.forget_link(number);
    }
}
