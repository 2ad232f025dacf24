//! A node of several shards, or several such nodes, whose lanes, links and stores move at once, for the rules of groups and of
//! deletions.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::{HashMap, VecDeque};

use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig};
use ringline_core::counters::{Counters, Levels};
use ringline_core::event::{ConnId, Effect, Effects, Event, NodeNews, Now, ShardMessage, Token, Work, WorkOutcome};
use ringline_core::nodes::record;
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder, Header};
use ringline_schema::ids::{DeviceId, Partition, Seq, UserName};
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Change, Query, Record, User};
use ringline_schema::rows::{Row, RowList};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

/// One device that is logged in: its shard and connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seat {
    shard: usize,
    conn: ConnId,
}

/// How an act ended: its place and what the actor is now.
pub type Acted = Result<(Seq, Option<Standing>), ErrorCode>;

struct Side {
    shard: Shard,
    store: MemoryStore,
}

/// How many nodes, and shards of each.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub nodes: u16,
    pub shards: u16,
}

/// A node alone.
impl From<u16> for Shape {
    fn from(shards: u16) -> Self {
        Self { nodes: 1, shards }
    }
}

pub struct Town {
    sides: Vec<Side>,
    placement: CorePlacement,
    /// `None`: a node alone.
    cluster: Option<ClusterPlacement>,
    pub now: Now,
    lanes: VecDeque<(ShardIndex, usize, ShardMessage)>,
    inbox: HashMap<Seat, Vec<Vec<u8>>>,
    next: u32,
    /// Whether stores commit.
    pub committing: bool,
    /// Devices that do not read.
    pub stuck: Vec<Seat>,
    /// What was done since it was last looked at.
    pub records: usize,
    /// The node dies when it is about to write one more.
    pub records_max: usize,
    dead: bool,
    /// Messages of lanes that a test wants lost.
    pub drops: fn(&ShardMessage) -> bool,
    pub fan_outs: usize,
    pub loads: usize,
}

pub fn name(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

pub fn decode(frame: &[u8]) -> Reply<'_> {
    let header = Header::decode(frame.first_chunk().unwrap(), u32::MAX).unwrap();
    decode_reply(&header, &frame[16..]).unwrap()
}

impl Town {
    pub fn new(shards: u16) -> Self {
        Self::with(memory::open(shards), |_| ())
    }

    pub fn with(stores: Vec<MemoryStore>, change: impl Fn(&mut CoreConfig)) -> Self {
        Self::of_nodes(vec![stores], change)
    }

    pub fn of(shape: Shape, change: impl Fn(&mut CoreConfig)) -> Self {
        Self::of_nodes((0..shape.nodes).map(|_| memory::open(shape.shards)).collect(), change)
    }

    /// By node and shard; all have as many shards.
    fn of_nodes(stores: Vec<Vec<MemoryStore>>, change: impl Fn(&mut CoreConfig)) -> Self {
        let placement = CorePlacement::new(stores[0].len() as u16).unwrap();
        let names: Vec<_> = (0..stores.len()).map(|node| (format!("n{node}"), 1)).collect();
        let placed = |own: usize| ClusterPlacement::new(&names[own].0, placement, &names).unwrap();
        let mut sides = Vec::new();
        for (node, stores) in stores.into_iter().enumerate() {
            for (within, store) in (0..).zip(stores) {
                let mut config = CoreConfig::new(ShardIndex::new(NodeIndex(node as u16), within), placement);
                let nodes = names.iter().map(|(name, _)| (name.clone(), name.clone())).collect();
                config.cluster = (names.len() > 1).then(|| ClusterConfig { placement: placed(node), nodes });
                change(&mut config);
                sides.push(Side { shard: Shard::new(config, 1), store });
            }
        }
        let mut cluster = (names.len() > 1).then(|| placed(0));
        if let Some(cluster) = &mut cluster {
            for node in (1..names.len() as u16).map(NodeIndex) {
                cluster.learn(node, placement);
            }
        }
        let mut town = Self {
            sides,
            placement,
            cluster,
            now: Now { mono_us: 1_000_000, unix_ms: 1_700_000_000_000 },
            lanes: VecDeque::new(),
            inbox: HashMap::new(),
            next: 0,
            committing: true,
            stuck: Vec::new(),
            records: 0,
            records_max: usize::MAX,
            dead: false,
            drops: |_| false,
            fan_outs: 0,
            loads: 0,
        };
        (0..town.nodes()).for_each(|node| town.apart(node, false));
        town
    }

    /// The same data under new shards, as after a restart.
    pub fn restarted(&self, shards: u16) -> Self {
        let each = self.sides.chunks(usize::from(self.placement.shards()));
        Self::of_nodes(each.map(|sides| sides[0].store.reopen(shards)).collect(), |_| ())
    }

    fn nodes(&self) -> u16 {
        (self.sides.len() / usize::from(self.placement.shards())) as u16
    }

    fn index(&self, at: usize) -> ShardIndex {
        let shards = usize::from(self.placement.shards());
        ShardIndex::new(NodeIndex((at / shards) as u16), (at % shards) as u16)
    }

    fn place(&self, shard: ShardIndex) -> usize {
        usize::from(shard.node().0) * usize::from(self.placement.shards()) + usize::from(shard.within())
    }

    /// Cuts a node off from all others, or ends that.
    pub fn apart(&mut self, node: u16, cut: bool) {
        let news = |cut| if cut { NodeNews::Down } else { NodeNews::Up { shards: self.placement.shards() } };
        let news = news(cut);
        for at in 0..self.sides.len() {
            let own = self.index(at).node();
            for other in (0..self.nodes()).map(NodeIndex).filter(|other| *other != own) {
                if own.0 == node || other.0 == node {
                    self.event(at, Event::Node { node: other, news });
                }
            }
        }
        self.settle();
    }

    /// The node that a user lives on.
    pub fn node_of(&self, user: &str) -> u16 {
        self.node_of_partition(name(user).partition())
    }

    pub fn node_of_partition(&self, partition: Partition) -> u16 {
        self.index(self.owner(partition)).node().0
    }

    fn owner(&self, partition: Partition) -> usize {
        let shard = match &self.cluster {
            Some(cluster) => cluster.shard_of(partition),
            None => self.placement.shard_of(partition),
        };
        self.place(shard)
    }

    /// Puts records into the store behind the back of the shards.
    pub fn seed(&mut self, record: &Record) {
        let at = self.owner(record.partition());
        self.sides[at].store.reopen(1).iter_mut().for_each(|store| {
            store.append(record).unwrap();
            store.submit();
        });
    }

    pub fn seed_rows(&mut self, rows: Vec<Row>) {
        const ROWS_PER_RECORD: usize = 1_000;
        for rows in rows.chunks(ROWS_PER_RECORD) {
            self.seed(&Record::Change(Box::new(Change { message: None, rows: rows.to_vec() })));
        }
    }

    pub fn seed_user(&mut self, user: &str) {
        self.seed(&Record::User(User { name: name(user), password_hash: None, created_ms: 1 }));
    }

    /// Asks the store itself, of the node that has the answer; of all deletions, the first that has one.
    pub fn stored(&mut self, query: Query) -> Answer {
        let partition = match &query {
            Query::User { name } => Some(name.partition()),
            Query::Row { key } => Some(key.partition()),
            Query::Rows { list: RowList::Deletions, .. } => None,
            Query::Rows { list, .. } => Some(match list {
                RowList::Members(of) | RowList::Receipts(of) | RowList::Amended(of) => of.partition(),
                RowList::Devices(user) | RowList::Blocks(user) | RowList::Marks(user) => user.partition(),
                RowList::Hidden(user, _) | RowList::AllHidden(user) => user.partition(),
                RowList::Deletions => unreachable!(),
            }),
            Query::Head { conversation, .. } | Query::Messages { conversation, .. } => Some(conversation.partition()),
            Query::Conversations { .. } | Query::Listed { .. } | Query::GroupCount { .. } => {
                Some(Partition::of_user(""))
            }
        };
        if let Some(partition) = partition {
            return self.stored_at(self.owner(partition), query);
        }
        let mut answers = (0..self.sides.len()).map(|at| self.stored_at(at, query.clone()));
        let first = answers.next().unwrap();
        answers.find(|answer| *answer != Answer::Rows(Vec::new())).unwrap_or(first)
    }

    fn stored_at(&self, at: usize, query: Query) -> Answer {
        let mut store = self.sides[at].store.reopen(1).remove(0);
        store.load(LoadToken(1), query).unwrap();
        let mut events = Vec::new();
        store.poll(&mut events);
        match events.pop() {
            Some(StoreEvent::Loaded(_, answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Whether it died of what it wanted to write.
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    fn event(&mut self, at: usize, event: Event<'_>) {
        if self.dead {
            return;
        }
        let mut fx = Effects::default();
        let _ = self.sides[at].shard.handle(event, self.now, &mut fx);
        for effect in fx.list {
            match effect {
                Effect::Close { .. } | Effect::Released { .. } => {}
                Effect::Append(_) if self.records >= self.records_max => {
                    self.dead = true;
                    return self.sides.iter_mut().for_each(|side| side.store.submit());
                }
                Effect::Append(record) => {
                    self.records += 1;
                    self.sides[at].store.append(&record).unwrap();
                }
                Effect::Load { token, query } => {
                    self.loads += 1;
                    self.sides[at].store.load(LoadToken(token.0), query).unwrap();
                }
                Effect::Work { token, work } => {
                    let outcome = match work {
                        Work::HashPassword { password } => WorkOutcome::Hashed(password),
                        Work::VerifyPassword { password, hash } => WorkOutcome::Verified(hash == Some(password)),
                        Work::VerifyToken { token, .. } => WorkOutcome::Verified(token != "wrong"),
                    };
                    self.event(at, Event::Worked { token, outcome });
                }
                Effect::ToShard { to, message } => {
                    self.fan_outs += usize::from(matches!(message, ShardMessage::DeliverGroup { .. }));
                    let from = self.index(at);
                    let mut carried = message;
                    if from.node() != to.node() {
                        let mut bytes = Vec::new();
                        record::encode(&carried, &mut bytes);
                        carried = record::decode(&bytes).unwrap();
                    }
                    self.lanes.push_back((from, self.place(to), carried));
                }
            }
        }
        for conn in fx.dirty {
            let seat = Seat { shard: at, conn };
            if !self.stuck.contains(&seat) {
                self.take(seat);
            }
        }
    }

    /// The socket of a device takes what waits for it.
    pub fn take(&mut self, seat: Seat) {
        let Seat { shard: at, conn } = seat;
        if let Some(bytes) = self.sides[at].shard.take_output(conn) {
            let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
            while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
                self.inbox.entry(seat).or_default().push(frame.raw.to_vec());
            }
            self.event(at, Event::Sent { conn, bytes: bytes.len() });
        }
    }

    /// Until nothing moves.
    pub fn settle(&mut self) {
        loop {
            let mut moved = false;
            while let Some((from, to, message)) = self.lanes.pop_front() {
                moved = true;
                if !(self.drops)(&message) {
                    self.event(to, Event::Shard { from, message });
                }
            }
            for at in 0..self.sides.len() {
                if self.committing {
                    self.sides[at].store.submit();
                }
                let mut events = Vec::new();
                self.sides[at].store.poll(&mut events);
                for event in events {
                    moved = true;
                    self.event(
                        at,
                        match event {
                            StoreEvent::Committed(lsn) => Event::Stored { upto: lsn.0 },
                            StoreEvent::Failed => Event::StoreFailed,
                            StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
                        },
                    );
                }
            }
            if !moved || self.dead {
                return self.sides.iter().for_each(|side| side.shard.check_invariants());
            }
        }
    }

    pub fn login_as(&mut self, user: &str, device: u64) -> Seat {
        self.next += 1;
        let shard = self.owner(Partition::of_user(user));
        let conn = ConnId { slot: self.next, generation: 1 };
        let seat = Seat { shard, conn };
        self.event(shard, Event::Opened { conn });
        let credential = Credential::Token(Secret("token"));
        let (device, device_kind) = (DeviceId(device), DeviceKind::Other);
        self.ask(seat, Request::Login(Login { user, credential, device, device_kind, agent: "" }));
        let told = self.told(seat);
        assert!(matches!(decode(&told[0]), Reply::LoginOk(_)), "{:?}", decode(&told[0]));
        seat
    }

    /// What a new connection is told that asks this before it is logged in.
    pub fn refused_at_door(&mut self, user: &str, request: Request<'_>) -> Option<ErrorCode> {
        self.next += 1;
        let (shard, conn) = (self.owner(Partition::of_user(user)), ConnId { slot: self.next, generation: 1 });
        let seat = Seat { shard, conn };
        self.event(shard, Event::Opened { conn });
        let code = match decode(&self.answer(seat, request)) {
            Reply::Failure { code, .. } => Some(code),
            _ => None,
        };
        self.leave(seat);
        code
    }

    pub fn login(&mut self, user: &str) -> Seat {
        self.login_as(user, 1)
    }

    pub fn ask(&mut self, seat: Seat, request: Request<'_>) {
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        self.event(seat.shard, Event::Request { conn: seat.conn, codec, flags, request_id: 7, request });
        self.settle();
    }

    /// What a device was told since the last look.
    pub fn told(&mut self, seat: Seat) -> Vec<Vec<u8>> {
        self.inbox.remove(&seat).unwrap_or_default()
    }

    /// Asks, and takes the answer out of what the device was told.
    pub fn answer(&mut self, seat: Seat, request: Request<'_>) -> Vec<u8> {
        self.ask(seat, request);
        let told = self.inbox.get_mut(&seat).unwrap();
        let at = told.iter().position(|frame| u32::from_le_bytes(frame[8..12].try_into().unwrap()) == 7).unwrap();
        told.remove(at)
    }

    pub fn act(&mut self, seat: Seat, group: &str, act: GroupAct<'_>) -> Acted {
        match decode(&self.answer(seat, Request::Group { group, act })) {
            Reply::Group(GroupReply::Ok { seq, standing, .. }) => Ok((seq, standing)),
            Reply::Failure { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    pub fn send_with(
        &mut self,
        seat: Seat,
        (to, client_seq): (&str, u64),
        mentions: Mentions<'_>,
    ) -> Result<SendAck, ErrorCode> {
        let body = format!("body {client_seq}");
        let (class, kind, ack_timeout_ms) = (Class::Durable, BodyKind::Text, None);
        let send = Send { to, class, kind, client_seq, ack_timeout_ms, body: body.as_bytes(), mentions };
        match decode(&self.answer(seat, Request::Send(send))) {
            Reply::SendAck(ack) => Ok(ack),
            Reply::Failure { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    pub fn send(&mut self, seat: Seat, to: &str, client_seq: u64) -> Result<Seq, ErrorCode> {
        self.send_with(seat, (to, client_seq), Mentions::default()).map(|ack| ack.seq)
    }

    /// The numbers of messages that were delivered since the last look.
    pub fn delivered(&mut self, seat: Seat) -> Vec<u64> {
        let seq = |frame: &Vec<u8>| match decode(frame) {
            Reply::Deliver(message) => Some(message.seq.0),
            _ => None,
        };
        self.told(seat).iter().filter_map(seq).collect()
    }

    /// First, head and numbers of a page.
    pub fn fetch(&mut self, seat: Seat, with: &str, after: u64) -> Result<(u64, u64, Vec<u64>), ErrorCode> {
        let fetch = Fetch { with, after: Seq(after), before: None, limit: 200, newest: false };
        match decode(&self.answer(seat, Request::Fetch(fetch))) {
            Reply::FetchOk { first, head, messages, .. } => {
                Ok((first.0, head.0, messages.iter().map(|message| message.seq.0).collect()))
            }
            Reply::Failure { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    /// Names of a page of members, and where the next begins.
    pub fn members(
        &mut self,
        seat: Seat,
        group: &str,
        (cursor, standing): (&str, Standing),
    ) -> Result<(Vec<String>, String), ErrorCode> {
        let act = GroupAct::Members { cursor, limit: 200, standing };
        match decode(&self.answer(seat, Request::Group { group, act })) {
            Reply::Group(GroupReply::Members { members, next }) => {
                Ok((members.iter().map(|member| member.user.to_owned()).collect(), next.to_owned()))
            }
            Reply::Failure { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    pub fn leave(&mut self, seat: Seat) {
        self.event(seat.shard, Event::Closed { conn: seat.conn });
        self.settle();
    }

    /// One turn of every shard: a slice of what goes to many.
    pub fn turn(&mut self) {
        self.turn_after(1);
    }

    /// The same, when the turn before took so long.
    pub fn turn_after(&mut self, us: u64) {
        self.now.mono_us += us;
        for at in 0..self.sides.len() {
            self.event(at, Event::Timer);
        }
        self.settle();
    }

    /// Turns until nothing is under way to members; how many.
    pub fn finish(&mut self) -> usize {
        (0..100_000)
            .find(|_| {
                self.levels().fan_outs == 0 || {
                    self.turn();
                    false
                }
            })
            .unwrap()
    }

    /// Of all shards together: what is under way to members.
    pub fn levels(&self) -> Levels {
        let mut sum = Levels::default();
        for levels in self.sides.iter().map(|side| side.shard.levels()) {
            sum.timers += levels.timers;
            sum.fan_outs += levels.fan_outs;
            sum.fan_out_bytes += levels.fan_out_bytes;
        }
        sum
    }

    /// A counter of all shards together.
    pub fn count(&self, counter: fn(&Counters) -> u64) -> u64 {
        self.sides.iter().map(|side| counter(side.shard.counters())).sum()
    }

    pub fn is_quiet(&self) -> bool {
        self.sides.iter().all(|side| side.shard.is_quiet())
    }

    /// Lets time go by, with what is due in it.
    pub fn elapse(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(100) {
            self.pass(100);
            for at in 0..self.sides.len() {
                self.event(at, Event::Timer);
            }
            self.settle();
        }
    }

    /// Lets the clock of messages go on.
    pub fn pass(&mut self, ms: u64) {
        self.now.unix_ms += ms;
        self.now.mono_us += ms * 1_000;
    }
}
