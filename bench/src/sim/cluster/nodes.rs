//! The nodes of a cluster's run: their shells, played, and the links between them.

use std::collections::{BTreeMap, VecDeque};

use rand::RngExt;
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig};
use ringline_core::event::{ConnId, Effect, Effects, Event, NodeNews, Now, ShardMessage, Verdict, Work, WorkOutcome};
use ringline_core::nodes::record;
use ringline_schema::frame::FrameDecoder;

use super::super::device::EPOCH_US;
use super::super::disk::{Disk, Written};
use super::{Action, Cluster, NODES, Parcel};

const OUTBOX_BYTES_MAX: usize = 6 * 1024;
const CACHED_MAX: usize = 2;
/// The longest time that a client hangs, in microseconds.
const STALL_US_MAX: u64 = 3_000_000;

/// One shard and what its shell knows.
pub struct Side {
    shard: Shard,
    pub conns: BTreeMap<ConnId, u64>,
    next_slot: u32,
    timer_us: u64,
}

/// A node, up or not; its disk stays.
pub struct Node {
    pub up: bool,
    /// Rises with each life.
    epoch: u32,
    shards: u16,
    disk: Disk,
    pub sides: Vec<Side>,
    lanes: BTreeMap<(u16, u16), VecDeque<ShardMessage>>,
    lane_due_us: BTreeMap<(u16, u16), u64>,
    /// Other nodes that it has a link to, and the life of them that it spoke with last.
    linked: BTreeMap<usize, bool>,
    spoke_with: BTreeMap<usize, u32>,
}

/// What is on its way over a link to one shard.
#[derive(Default)]
pub struct Wire {
    items: VecDeque<Item>,
    due_us: u64,
}

enum Item {
    News(NodeNews),
    Message { from: u16, bytes: Vec<u8> },
}

impl Node {
    pub fn new(shards: u16) -> Self {
        Self {
            up: false,
            epoch: 0,
            shards,
            disk: Disk::new(shards, None),
            sides: Vec::new(),
            lanes: BTreeMap::new(),
            lane_due_us: BTreeMap::new(),
            linked: BTreeMap::new(),
            spoke_with: BTreeMap::new(),
        }
    }

    pub fn open_conn(&mut self, shard: usize) -> ConnId {
        let side = &mut self.sides[shard];
        side.next_slot += 1;
        ConnId { slot: side.next_slot - 1, generation: self.epoch }
    }
}

fn name(node: usize) -> String {
    format!("n{node}")
}

impl Cluster {
    pub(super) fn perform_at_node(&mut self, action: Action) {
        match action {
            Action::Lane { node, epoch, lane } if self.lives(node, epoch) => self.lane_moves(node, lane),
            Action::Wire { node, epoch, wire } if self.lives(node, epoch) => self.wire_moves(node, wire),
            Action::Commit { node, epoch, shard } if self.lives(node, epoch) => self.commit((node, shard)),
            Action::Loaded { node, epoch, shard, token, query } if self.lives(node, epoch) => {
                let answer = self.nodes[node].disk.answer(shard, query, true);
                self.tell((node, shard), Event::Loaded { token, answer });
            }
            Action::Worked { node, epoch, shard, token, work } if self.lives(node, epoch) => {
                let outcome = match work {
                    Work::HashPassword { .. } => WorkOutcome::Hashed("hash".to_owned()),
                    Work::VerifyPassword { .. } | Work::VerifyToken { .. } => WorkOutcome::Verified(true),
                };
                self.tell((node, shard), Event::Worked { token, outcome });
            }
            Action::Timer { node, epoch, shard } if self.lives(node, epoch) => {
                self.nodes[node].sides[shard].timer_us = 0;
                self.tell((node, shard), Event::Timer);
            }
            Action::Boot { node, epoch } if self.nodes[node].epoch == epoch && !self.nodes[node].up => self.boot(node),
            _ => {}
        }
    }

    fn lives(&self, node: usize, epoch: u32) -> bool {
        self.nodes[node].up && self.nodes[node].epoch == epoch
    }

    fn boot(&mut self, at: usize) {
        let hash_seed = self.trace;
        let node = &mut self.nodes[at];
        let cores = CorePlacement::new(node.shards).expect("1 to 3 shards");
        let listed: Vec<_> = (0..usize::from(NODES)).map(|node| (name(node), 1)).collect();
        let placement = ClusterPlacement::new(&name(at), cores, &listed).expect("a cluster of three");
        let addresses = (0..usize::from(NODES)).map(|node| (name(node), name(node))).collect::<Vec<_>>();
        node.epoch += 1;
        node.up = true;
        let side = |within| {
            let mut config = CoreConfig::new(ShardIndex::new(NodeIndex(at as u16), within), cores);
            config.cluster = Some(ClusterConfig { placement: placement.clone(), nodes: addresses.clone() });
            config.conversations_cached_max = CACHED_MAX;
            config.users_cached_max = CACHED_MAX;
            config.outbox_bytes_max = OUTBOX_BYTES_MAX;
            Side { shard: Shard::new(config, hash_seed), conns: BTreeMap::new(), next_slot: 0, timer_us: 0 }
        };
        node.sides = (0..node.shards).map(side).collect();
        self.note(7, at as u64);
        for other in (0..usize::from(NODES)).filter(|other| *other != at) {
            self.establish((at.min(other), at.max(other)));
        }
    }

    /// The node dies: everything but its disk is gone.
    fn crash(&mut self, at: usize) {
        self.note(5, at as u64);
        let shards = self.rng.random_range(1..=3);
        let node = &mut self.nodes[at];
        node.disk.restart((shards, false), &mut self.rng);
        (node.up, node.shards) = (false, shards);
        node.sides.clear();
        node.lanes.clear();
        node.lane_due_us.clear();
        node.spoke_with.clear();
        let linked = std::mem::take(&mut node.linked);
        let epoch = node.epoch;
        self.wires.retain(|(to, _, _), _| *to != at);
        self.held.retain(|(from, to), _| *from != at && *to != at);
        for other in linked.into_iter().filter_map(|(other, linked)| linked.then_some(other)) {
            self.nodes[other].linked.insert(at, false);
            self.lose_in_flight(at, other);
            self.news(other, at, NodeNews::Down, 500_000);
        }
        let links: Vec<u64> = self.links.iter().filter(|(_, link)| link.node == at).map(|(link, _)| *link).collect();
        for link in links {
            let Some(open) = self.links.get_mut(&link) else { continue };
            open.server_open = false;
            let at_us = open.to_client_us.max(self.now_us);
            self.at(at_us, Action::ClientSeesEnd { link });
        }
        let delay = self.random_us(1_000, 3_000_000);
        self.after(delay, Action::Boot { node: at, epoch });
    }

    /// Of what a node had sent before it died, an end of any length does not arrive.
    fn lose_in_flight(&mut self, from: usize, to: usize) {
        for ((_, _, peer), wire) in self.wires.range_mut((to, 0, 0)..(to + 1, 0, 0)) {
            if *peer == from {
                let keep = self.rng.random_range(0..=wire.items.len());
                let mut at = 0;
                wire.items.retain(|item| {
                    at += 1;
                    at <= keep || matches!(item, Item::News(_))
                });
            }
        }
    }

    /// Tells every shard of a node something of another.
    fn news(&mut self, node: usize, of: usize, news: NodeNews, delay_us_max: u64) {
        for shard in 0..self.nodes[node].sides.len() as u16 {
            let delay = self.random_us(100, delay_us_max);
            self.put_on_wire((node, shard, of), Item::News(news), delay);
        }
    }

    fn put_on_wire(&mut self, key: (usize, u16, usize), item: Item, delay_us: u64) {
        let (node, shard, from) = key;
        let stalled_us = self.stalls_us.get(&(from, node)).copied().unwrap_or(0);
        let wire = self.wires.entry(key).or_default();
        wire.due_us = wire.due_us.max(self.now_us + delay_us).max(stalled_us);
        wire.items.push_back(item);
        let (at_us, epoch) = (wire.due_us, self.nodes[node].epoch);
        self.at(at_us, Action::Wire { node, epoch, wire: (shard, from) });
    }

    fn wire_moves(&mut self, node: usize, (shard, from): (u16, usize)) {
        let Some(item) = self.wires.get_mut(&(node, shard, from)).and_then(|wire| wire.items.pop_front()) else {
            return;
        };
        if usize::from(shard) >= self.nodes[node].sides.len() {
            return;
        }
        let peer = NodeIndex(from as u16);
        self.note(8, (node as u64) << 32 | u64::from(shard) << 16 | from as u64);
        match item {
            Item::News(news) => self.tell((node, usize::from(shard)), Event::Node { node: peer, news }),
            Item::Message { from, bytes } => {
                let message = record::decode(&bytes).expect("what a shard says reads back");
                let from = ShardIndex::new(peer, from);
                self.tell((node, usize::from(shard)), Event::Shard { from, message });
            }
        }
    }

    /// Puts a message on the link to another node, or gives it back: there is no room.
    fn send(&mut self, (node, shard): (usize, usize), to: ShardIndex, message: ShardMessage) -> Option<ShardMessage> {
        if self.full_percent > 0 && self.chance(self.full_percent) {
            return Some(message);
        }
        let mut bytes = Vec::new();
        record::encode(&message, &mut bytes);
        let other = usize::from(to.node().0);
        let item = (shard as u16, to.within(), bytes);
        if self.nodes[node].linked.get(&other) == Some(&true) {
            self.put_message((node, other), item);
        } else {
            self.held.entry((node, other)).or_default().push_back(item);
        }
        None
    }

    fn put_message(&mut self, (from_node, to_node): (usize, usize), (from, to, bytes): Parcel) {
        let delay = if self.chance(3) { self.random_us(1_000, 80_000) } else { self.random_us(50, 1_500) };
        self.put_on_wire((to_node, to, from_node), Item::Message { from, bytes }, delay);
    }

    /// Two nodes can speak again, or for the first time.
    fn establish(&mut self, pair: (usize, usize)) {
        let (one, other) = pair;
        if self.cuts.contains_key(&pair) || !self.nodes[one].up || !self.nodes[other].up {
            return;
        }
        for (node, peer) in [(one, other), (other, one)] {
            let life = self.nodes[peer].epoch;
            let before = self.nodes[node].spoke_with.insert(peer, life);
            if before.is_some_and(|before| before != life) {
                self.news(node, peer, NodeNews::Reset, 1_000);
            }
            self.nodes[node].linked.insert(peer, true);
            let shards = self.nodes[peer].shards;
            self.news(node, peer, NodeNews::Up { shards }, 100_000);
        }
        for way in [(one, other), (other, one)] {
            for item in self.held.remove(&way).unwrap_or_default() {
                self.put_message(way, item);
            }
        }
    }

    /// No link between two nodes for a while.
    fn cut(&mut self) {
        let one = self.rng.random_range(0..self.nodes.len());
        let other = (one + self.rng.random_range(1..self.nodes.len())) % self.nodes.len();
        let pair = (one.min(other), one.max(other));
        if self.cuts.insert(pair, true).is_some() {
            return;
        }
        self.note(9, (pair.0 * 8 + pair.1) as u64);
        for (node, peer) in [(one, other), (other, one)] {
            if self.nodes[node].linked.insert(peer, false) == Some(true) && self.nodes[node].up {
                self.news(node, peer, NodeNews::Down, 2_000_000);
            }
        }
        let delay = self.random_us(10_000, 6_000_000);
        self.after(delay, Action::Heal { pair });
    }

    pub(super) fn heal(&mut self, pair: (usize, usize)) {
        if self.cuts.remove(&pair).is_some() {
            self.establish(pair);
        }
    }

    /// One fault, and the next one planned.
    pub(super) fn fault(&mut self) {
        if !self.lively {
            return;
        }
        let pause = self.random_us(50_000, 900_000);
        self.after(pause, Action::Fault);
        self.faults += 1;
        let client = self.rng.random_range(0..self.clients.len());
        let node = self.rng.random_range(0..self.nodes.len());
        match self.rng.random_range(0..100) {
            0..18 if self.nodes[node].up => self.crash(node),
            18..40 => self.cut(),
            40..55 => {
                let to = (node + self.rng.random_range(1..self.nodes.len())) % self.nodes.len();
                let until_us = self.now_us + self.random_us(100_000, 3_000_000);
                self.stalls_us.insert((node, to), until_us);
            }
            55..72 => {
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

    // --- a node's shell ------------------------------------------------------------------------------------------

    pub(super) fn opened(&mut self, place: (usize, usize), conn: ConnId) {
        self.tell(place, Event::Opened { conn });
    }

    fn tell(&mut self, place: (usize, usize), event: Event<'_>) {
        let verdict = self.handle(place, event);
        assert_eq!(verdict, Verdict::Continue, "only requests change what is read");
    }

    fn handle(&mut self, place: (usize, usize), event: Event<'_>) -> Verdict {
        let (node, shard) = place;
        let mut fx = Effects::default();
        let now = Now { mono_us: self.now_us, unix_ms: (EPOCH_US + self.now_us) / 1_000 };
        let verdict = self.nodes[node].sides[shard].shard.handle(event, now, &mut fx);
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
                Effect::Append(record) => {
                    self.nodes[node].disk.append(shard, record);
                }
                Effect::Load { token, query } => {
                    let delay = if self.chance(5) { self.random_us(1_000, 200_000) } else { self.random_us(10, 500) };
                    self.after(delay, Action::Loaded { node, epoch, shard, token, query });
                }
                Effect::Work { token, work } => {
                    let delay = self.random_us(100, 20_000);
                    self.after(delay, Action::Worked { node, epoch, shard, token, work });
                }
                Effect::ToShard { to, message } if usize::from(to.node().0) == node => {
                    self.put_on_lane(node, (shard as u16, to.within()), message);
                }
                Effect::ToShard { to, message } => {
                    unsent.extend(self.send(place, to, message).map(|message| (to, message)));
                }
                Effect::Released { .. } => unreachable!("configured nodes give nothing up"),
            }
        }
        for conn in fx.dirty {
            self.write(place, conn);
        }
        for conn in ended {
            self.server_ends(place, conn);
        }
        if self.nodes[node].disk.submit(shard) {
            let delay = if self.chance(5) { self.random_us(5_000, 300_000) } else { self.random_us(50, 3_000) };
            self.after(delay, Action::Commit { node, epoch, shard });
        }
        let side = &mut self.nodes[node].sides[shard];
        if let Some(due_us) = side.shard.next_deadline_us()
            && (side.timer_us == 0 || due_us < side.timer_us)
        {
            side.timer_us = due_us;
            self.at(due_us.max(self.now_us), Action::Timer { node, epoch, shard });
        }
        for (to, message) in unsent {
            self.tell(place, Event::Unsent { to, message });
        }
    }

    fn put_on_lane(&mut self, node: usize, lane: (u16, u16), message: ShardMessage) {
        let delay = if self.chance(3) { self.random_us(1_000, 50_000) } else { self.random_us(1, 300) };
        let now_us = self.now_us;
        let home = &mut self.nodes[node];
        let due = home.lane_due_us.entry(lane).or_default();
        *due = (*due).max(now_us + delay);
        let (at_us, epoch) = (*due, home.epoch);
        home.lanes.entry(lane).or_default().push_back(message);
        self.at(at_us, Action::Lane { node, epoch, lane });
    }

    fn lane_moves(&mut self, node: usize, lane: (u16, u16)) {
        let Some(message) = self.nodes[node].lanes.get_mut(&lane).and_then(VecDeque::pop_front) else { return };
        let (from, to) = lane;
        self.note(2, u64::from(from) << 16 | u64::from(to));
        let from = ShardIndex::new(NodeIndex(node as u16), from);
        self.tell((node, usize::from(to)), Event::Shard { from, message });
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
                    event => (frame.raw.to_vec(), self.handle((node, shard), event)),
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
