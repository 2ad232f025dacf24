//! Nodes over one store whose partitions change hands, for the rules of that: shards, their stores' handles, lanes, links and
//! the table of owners, all moved by the test, one thing at a time.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use ringline_cluster::ownership::{Known, Ownership, Part, PartitionSet, all};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig, Lease};
use ringline_core::event::{ConnId, Effect, Effects, Event, NodeNews, Now, ShardMessage, Token, Verdict, WorkOutcome};
use ringline_core::nodes::record;
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder, Header};
use ringline_schema::ids::{ConversationId, DeviceId, Partition, Seq, UserName};
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Query, Record};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

pub const UNIX_MS: u64 = 1_700_000_000_000;

/// A connection: the place of its shard, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seat {
    pub at: usize,
    pub conn: ConnId,
}

/// What is on its way to a shard.
pub enum Item {
    Message(ShardIndex, Box<ShardMessage>),
    News(NodeIndex, NodeNews),
    Placement(Arc<Ownership>),
}

pub struct Side {
    pub shard: Shard,
    store: MemoryStore,
    /// Partitions of what is not committed yet.
    queued: Vec<Partition>,
    pub released: u64,
}

pub struct Realm {
    pub sides: Vec<Option<Side>>,
    pub nodes: u16,
    pub shards: u16,
    /// What the database says; `giving` is of its owner.
    pub truth: Ownership,
    pub now_us: u64,
    /// By where from and where to; what a table says comes from nowhere.
    pub lanes: BTreeMap<(usize, usize), VecDeque<Item>>,
    pub inbox: HashMap<Seat, Vec<Vec<u8>>>,
    /// Connections that the server has ended.
    pub closed: HashSet<Seat>,
    pub lease: Lease,
    store: MemoryStore,
    next_conn: u32,
    /// Commits of what another owns are refused by the database: the test wants none.
    pub fenced: usize,
}

pub const NOWHERE: usize = usize::MAX;

pub fn name(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

pub fn decode(frame: &[u8]) -> Reply<'_> {
    let header = Header::decode(frame.first_chunk().unwrap(), u32::MAX).unwrap();
    decode_reply(&header, &frame[16..]).unwrap()
}

pub fn request_id(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[8..12].try_into().unwrap())
}

impl Realm {
    /// Nobody owns anything yet; all nodes are up and see each other.
    pub fn new(nodes: u16, shards: u16) -> Self {
        let store = memory::open(1).remove(0);
        let mut realm = Self {
            sides: (0..nodes * shards).map(|_| None).collect(),
            nodes,
            shards,
            truth: Ownership::new(1),
            now_us: 1_000_000,
            lanes: BTreeMap::new(),
            inbox: HashMap::new(),
            closed: HashSet::new(),
            lease: Lease::new(u64::MAX),
            store,
            next_conn: 0,
            fenced: 0,
        };
        for node in 0..nodes {
            let known = Known { name: format!("n{node}"), address: format!("n{node}:1") };
            realm.truth.name(NodeIndex(node), known);
        }
        (0..nodes).for_each(|node| realm.start(node));
        realm
    }

    /// The same, and each partition is owned: in turn.
    pub fn shared_out(nodes: u16, shards: u16) -> Self {
        let mut realm = Self::new(nodes, shards);
        for partition in all() {
            realm.take(partition, partition.number() / shards % nodes);
        }
        realm.publish();
        realm.settle();
        // What is compared because users have come.
        realm.pass(1_000);
        realm
    }

    pub fn index(&self, at: usize) -> ShardIndex {
        let shards = usize::from(self.shards);
        ShardIndex::new(NodeIndex((at / shards) as u16), (at % shards) as u16)
    }

    pub fn place(&self, shard: ShardIndex) -> usize {
        usize::from(shard.node().0 * self.shards + shard.within())
    }

    pub fn is_up(&self, node: u16) -> bool {
        self.sides[usize::from(node * self.shards)].is_some()
    }

    pub fn places_of(&self, node: u16) -> std::ops::Range<usize> {
        usize::from(node * self.shards)..usize::from((node + 1) * self.shards)
    }

    /// A process of the node starts, and others hear of it.
    pub fn start(&mut self, node: u16) {
        let cores = CorePlacement::new(self.shards).unwrap();
        for at in self.places_of(node) {
            let mut config = CoreConfig::new(self.index(at), cores);
            let placement = ClusterPlacement::moving(NodeIndex(node), cores).unwrap();
            config.cluster = Some(ClusterConfig { placement, nodes: Vec::new() });
            config.lease = Some(self.lease.clone());
            config.conversations_cached_max = 8;
            let store = self.store.reopen(1).remove(0);
            self.sides[at] = Some(Side { shard: Shard::new(config, 7), store, queued: Vec::new(), released: 0 });
        }
        // What an earlier process had is not this one's.
        for partition in all().filter(|partition| self.owner(*partition) == Some(node)).collect::<Vec<_>>() {
            let epoch = self.truth.part(partition).epoch;
            self.truth.set(partition, Part { owner: None, epoch, giving: false });
        }
        let shards = self.shards;
        for other in (0..self.nodes).filter(|other| *other != node && self.is_up(*other)).collect::<Vec<_>>() {
            self.tell_news(other, node, NodeNews::Reset);
            self.tell_news(other, node, NodeNews::Up { shards });
            self.tell_news(node, other, NodeNews::Up { shards });
        }
        self.publish();
    }

    pub fn tell_news(&mut self, to: u16, of: u16, news: NodeNews) {
        let from = usize::from(of * self.shards);
        for at in self.places_of(to) {
            self.lanes.entry((from, at)).or_default().push_back(Item::News(NodeIndex(of), news));
        }
    }

    /// A process dies, with all that it had not committed. Of what it had sent only this many of each lane still arrive.
    pub fn kill(&mut self, node: u16, arrive: usize) {
        let places = self.places_of(node);
        for at in places.clone() {
            self.sides[at] = None;
            self.inbox.retain(|seat, _| seat.at != at);
        }
        self.lanes.retain(|(_, to), _| !places.contains(to));
        for ((from, _), lane) in &mut self.lanes {
            if places.contains(from) {
                lane.truncate(arrive);
            }
        }
        for other in (0..self.nodes).filter(|other| *other != node && self.is_up(*other)).collect::<Vec<_>>() {
            self.tell_news(other, node, NodeNews::Down);
        }
    }

    pub fn owner(&self, partition: Partition) -> Option<u16> {
        self.truth.part(partition).owner.map(|owner| owner.0)
    }

    /// Somebody takes a partition, from nobody or from who is dead; told with the next [`Realm::publish`].
    pub fn take(&mut self, partition: Partition, node: u16) {
        let epoch = self.truth.part(partition).epoch + 1;
        self.truth.set(partition, Part { owner: Some(NodeIndex(node)), epoch, giving: false });
    }

    /// Its owner is asked to give a partition up.
    pub fn ask_for(&mut self, partition: Partition, giving: bool) {
        let part = self.truth.part(partition);
        self.truth.set(partition, Part { giving, ..part });
    }

    /// Everybody is told who owns what; each hears of its own wishes alone.
    pub fn publish(&mut self) -> u64 {
        self.truth.version += 1;
        for node in 0..self.nodes {
            let mut told = self.truth.clone();
            for partition in all() {
                let part = told.part(partition);
                told.set(partition, Part { giving: part.giving && part.owner == Some(NodeIndex(node)), ..part });
            }
            let told = Arc::new(told);
            for at in self.places_of(node).filter(|at| self.sides[*at].is_some()) {
                self.lanes.entry((NOWHERE, at)).or_default().push_back(Item::Placement(Arc::clone(&told)));
            }
        }
        self.truth.version
    }

    /// Whether all shards of a node have released what they were asked for by that version.
    pub fn has_released(&self, node: u16, version: u64) -> bool {
        self.places_of(node).all(|at| self.sides[at].as_ref().is_some_and(|side| side.released >= version))
    }

    /// What owners have been asked for and have released is nobody's.
    pub fn release(&mut self, partitions: &PartitionSet) {
        for partition in partitions.iter() {
            let epoch = self.truth.part(partition).epoch + 1;
            self.truth.set(partition, Part { owner: None, epoch, giving: false });
        }
    }

    /// A partition goes over in order, with everything at rest in between.
    pub fn hand_over(&mut self, partition: Partition, to: u16) {
        let from = self.owner(partition).unwrap();
        self.ask_for(partition, true);
        let version = self.publish();
        self.settle();
        assert!(self.has_released(from, version), "nothing is in flight");
        self.release(&[partition].into_iter().collect());
        self.publish();
        self.settle();
        self.take(partition, to);
        self.publish();
        self.settle();
    }

    pub fn event(&mut self, at: usize, event: Event<'_>) -> Verdict {
        let Some(side) = &mut self.sides[at] else { return Verdict::Stop };
        let mut fx = Effects::default();
        let now = Now { mono_us: self.now_us, unix_ms: UNIX_MS + self.now_us / 1_000 };
        let verdict = side.shard.handle(event, now, &mut fx);
        side.shard.check_invariants();
        let (closes, others): (Vec<_>, Vec<_>) =
            fx.list.into_iter().partition(|effect| matches!(effect, Effect::Close { .. }));
        others.into_iter().for_each(|effect| self.perform(at, effect));
        for conn in fx.dirty {
            let Some(bytes) = self.sides[at].as_mut().and_then(|side| side.shard.take_output(conn)) else { continue };
            let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
            while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
                self.inbox.entry(Seat { at, conn }).or_default().push(frame.raw.to_vec());
            }
            let _ = self.event(at, Event::Sent { conn, bytes: bytes.len() });
        }
        // What was left has gone out.
        closes.into_iter().for_each(|effect| self.perform(at, effect));
        verdict
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        let own = self.index(at);
        let Some(side) = &mut self.sides[at] else { return };
        match effect {
            Effect::Close { conn, .. } => {
                self.closed.insert(Seat { at, conn });
                let _ = self.event(at, Event::Closed { conn });
            }
            Effect::Append(record) => {
                side.queued.push(record.partition());
                side.store.append(&record).unwrap();
            }
            Effect::Load { token, query } => side.store.load(LoadToken(token.0), query).unwrap(),
            Effect::Work { token, .. } => {
                let _ = self.event(at, Event::Worked { token, outcome: WorkOutcome::Verified(true) });
            }
            Effect::ToShard { to, message } => {
                let mut carried = message;
                if own.node() != to.node() {
                    let mut bytes = Vec::new();
                    record::encode(&carried, &mut bytes);
                    carried = record::decode(&bytes).unwrap();
                }
                let to = self.place(to);
                if self.sides[to].is_some() {
                    self.lanes.entry((at, to)).or_default().push_back(Item::Message(own, Box::new(carried)));
                }
            }
            Effect::Released { version } => side.released = side.released.max(version),
        }
    }

    /// Commits what is queued at a shard, and answers its questions. False: there was nothing.
    pub fn store_turn(&mut self, at: usize) -> bool {
        let own = self.index(at).node();
        let Some(side) = &mut self.sides[at] else { return false };
        let foreign = |partition: &Partition| self.truth.part(*partition).owner != Some(own);
        self.fenced += side.queued.iter().filter(|partition| foreign(partition)).count();
        side.queued.clear();
        side.store.submit();
        self.answers(at)
    }

    /// Answers the questions of a shard alone.
    pub fn answers(&mut self, at: usize) -> bool {
        let Some(side) = &mut self.sides[at] else { return false };
        let mut events = Vec::new();
        side.store.poll(&mut events);
        let any = !events.is_empty();
        for event in events {
            let _ = self.event(
                at,
                match event {
                    StoreEvent::Committed(lsn) => Event::Stored { upto: lsn.0 },
                    StoreEvent::Failed => Event::StoreFailed,
                    StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
                },
            );
        }
        any
    }

    /// The next of one lane arrives.
    pub fn lane_turn(&mut self, lane: (usize, usize)) {
        let Some(item) = self.lanes.get_mut(&lane).and_then(VecDeque::pop_front) else { return };
        let event = match item {
            Item::Message(from, message) => Event::Shard { from, message: *message },
            Item::News(node, news) => Event::Node { node, news },
            Item::Placement(ownership) => Event::Placement(ownership),
        };
        let _ = self.event(lane.1, event);
    }

    /// Until nothing moves; time stands still.
    pub fn settle(&mut self) {
        loop {
            let lanes: Vec<_> = self.lanes.iter().filter(|(_, lane)| !lane.is_empty()).map(|(key, _)| *key).collect();
            let mut moved = !lanes.is_empty();
            lanes.into_iter().for_each(|lane| self.lane_turn(lane));
            for at in 0..self.sides.len() {
                moved |= self.store_turn(at);
            }
            if !moved {
                return;
            }
        }
    }

    /// Time passes, with its timers, and everything settles.
    pub fn pass(&mut self, ms: u64) {
        let end_us = self.now_us + ms * 1_000;
        while self.now_us < end_us {
            self.now_us = end_us.min(self.now_us + 50_000);
            for at in 0..self.sides.len() {
                let _ = self.event(at, Event::Timer);
            }
            self.settle();
        }
    }

    pub fn connect(&mut self, at: usize) -> Seat {
        self.next_conn += 1;
        let conn = ConnId { slot: self.next_conn, generation: 1 };
        let _ = self.event(at, Event::Opened { conn });
        Seat { at, conn }
    }

    pub fn ask(&mut self, seat: Seat, request_id: u32, request: Request<'_>) -> Verdict {
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        self.event(seat.at, Event::Request { conn: seat.conn, codec, flags, request_id, request })
    }

    /// Tries to log in at a shard. The seat where the connection ends up.
    pub fn knock(&mut self, at: usize, (user, device): (&str, u64), request_id: u32) -> Seat {
        let mut seat = self.connect(at);
        let credential = Credential::Token(Secret("token"));
        let (device, device_kind) = (DeviceId(device), DeviceKind::Other);
        let login = || Request::Login(Login { user, credential, device, device_kind, agent: "" });
        for _ in 0..4 {
            let Verdict::HandOver(to) = self.ask(seat, request_id, login()) else { break };
            seat = self.connect(self.place(to));
        }
        seat
    }

    /// The place of the shard that serves a user.
    pub fn home(&self, user: &str) -> usize {
        let partition = name(user).partition();
        let node = self.owner(partition).expect("somebody owns it");
        self.place(ShardIndex::new(NodeIndex(node), partition.number() % self.shards))
    }

    pub fn login(&mut self, user: &str) -> Seat {
        let seat = self.knock(self.home(user), (user, 1), 1);
        self.settle();
        let told = self.texts(seat);
        assert_eq!(told, ["LOGIN_OK"], "{user}");
        seat
    }

    pub fn told(&mut self, seat: Seat) -> Vec<Vec<u8>> {
        self.inbox.remove(&seat).unwrap_or_default()
    }

    /// What a connection was told since the last look, in short.
    pub fn texts(&mut self, seat: Seat) -> Vec<String> {
        self.told(seat).iter().map(|frame| text(frame)).collect()
    }

    pub fn begin_send(&mut self, seat: Seat, client_seq: u64, to: &str) {
        let body = format!("{to} {client_seq}");
        let send = Send { to, class: Class::Durable, client_seq, body: body.as_bytes(), ..Send::default() };
        let _ = self.ask(seat, client_seq as u32 + 1_000, Request::Send(send));
    }

    /// Sends, and takes the answer out of what the device was told; empty: there was none.
    pub fn send(&mut self, seat: Seat, client_seq: u64, to: &str) -> String {
        self.begin_send(seat, client_seq, to);
        self.settle();
        self.answer(seat, client_seq as u32 + 1_000)
    }

    /// A device has a group up to there.
    pub fn ack(&mut self, seat: Seat, group: &str, seq: u64) {
        let ack = Ack::Upto { conversation: ConversationId::group(&name(group)), seq: Seq(seq) };
        let _ = self.ask(seat, 9, Request::Ack(ack));
        assert_eq!(self.answer(seat, 9), "");
    }

    pub fn act(&mut self, seat: Seat, group: &str, act: GroupAct<'_>) -> String {
        let _ = self.ask(seat, 7, Request::Group { group, act });
        self.settle();
        self.answer(seat, 7)
    }

    pub fn answer(&mut self, seat: Seat, number: u32) -> String {
        let told = self.inbox.entry(seat).or_default();
        let at = told.iter().position(|frame| request_id(frame) == number);
        at.map_or(String::new(), |at| text(&told.remove(at)))
    }

    /// Asks the store itself.
    pub fn stored(&self, query: Query) -> Answer {
        let mut store = self.store.reopen(1).remove(0);
        store.load(LoadToken(1), query).unwrap();
        let mut events = Vec::new();
        store.poll(&mut events);
        match events.pop() {
            Some(StoreEvent::Loaded(_, answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Puts a record into the store behind the back of the shards.
    pub fn seed(&mut self, record: &Record) {
        self.store.append(record).unwrap();
        self.store.submit();
        self.store.poll(&mut Vec::new());
    }

    /// The first user with this stem whose partition that node owns, and whose conversation with `with`, if there is one, lives
    /// in the partition of `with`.
    pub fn user_of(&self, stem: &str, node: u16, with: Option<&str>) -> String {
        let fits = |user: &String| {
            let lives = with.is_none_or(|other| partition_of(user, other) == name(other).partition());
            self.owner(name(user).partition()) == Some(node) && lives
        };
        (0..10_000).map(|number| format!("{stem}-{number}")).find(fits).unwrap()
    }

    /// The first group with this stem whose partition that node owns.
    pub fn group_of(&self, stem: &str, node: u16) -> String {
        let fits = |group: &String| self.owner(ConversationId::group(&name(group)).partition()) == Some(node);
        (0..10_000).map(|number| format!("#{stem}-{number}")).find(fits).unwrap()
    }
}

fn text(frame: &[u8]) -> String {
    match decode(frame) {
        Reply::Failure { code, .. } => code.name().to_owned(),
        Reply::Redirect { node, .. } => format!("REDIRECT {node}"),
        Reply::Deliver(message) => format!("DELIVER {} {}", message.from, message.seq.0),
        Reply::SendAck(ack) => format!("SEND_ACK {}{}", ack.seq.0, if ack.dup { " dup" } else { "" }),
        Reply::Lagged { with, from, to, .. } => format!("LAGGED {with} {}..{}", from.0, to.0),
        other => other.command().name().to_owned(),
    }
}

pub fn partition_of(one: &str, other: &str) -> Partition {
    ConversationId::direct(&name(one), &name(other)).partition()
}

pub fn is_retryable(code: ErrorCode) -> bool {
    code.retryable()
}
