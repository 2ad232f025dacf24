//! The simulated node: shards, a store that commits when chance says so, lanes with delay and loss, and clients that
//! retry under the same client_seq, as the SDK does.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{CoreConfig, DevicePolicy};
use ringline_core::event::{ConnId, Effect, Effects, Event, Now, ShardMessage, Token, Verdict, Work, WorkOutcome};
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::ids::{ConversationId, DeviceId, Partition, Seq, UserName};
use ringline_schema::message::group::{JoinPolicy, What};
use ringline_schema::message::{
    Ack, BodyKind, ChatReply, Class, Credential, DeviceKind, Fetch, GroupAct, Login, Mentions, Names, Reply, Request,
    Secret, Send,
};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

const USERS: usize = 6;
const DEVICES_PER_USER: u64 = 2;
/// The group that everyone may join, and its place behind the users.
const GROUP: &str = "#group";
const TO_GROUP: usize = USERS;

/// One durable send as its client sees it.
#[derive(Clone, Debug)]
struct Outstanding {
    to: usize,
    body: String,
    tried_us: u64,
    /// The request that carried it last.
    last_request: u32,
}

/// One device of one user. Its connection comes and goes; what it has sent and seen stays.
struct Client {
    user: usize,
    device: DeviceId,
    conn: Option<(usize, ConnId)>,
    logged_in: bool,
    decoder: FrameDecoder,
    next_client_seq: u64,
    outstanding: BTreeMap<u64, Outstanding>,
    requests: HashMap<u32, u64>,
    /// (conversation, client_seq) → where it was accepted.
    accepted: BTreeMap<(usize, u64), (ConversationId, Seq)>,
    /// Last seq delivered on this connection, per conversation.
    stream: HashMap<ConversationId, Seq>,
    /// Everything ever seen, from deliveries and fetches.
    seen: BTreeMap<(ConversationId, Seq), String>,
    /// What happened to the group: who came (true) or went.
    changes: BTreeMap<Seq, (bool, String)>,
    login_us: u64,
}

struct ShardSide {
    shard: Shard,
    store: MemoryStore,
    work: VecDeque<(Token, Work)>,
    next_slot: u32,
}

pub struct World {
    rng: SmallRng,
    faults: bool,
    lossy: bool,
    placement: CorePlacement,
    now: Now,
    sides: Vec<ShardSide>,
    /// In order per (from, to).
    lanes: BTreeMap<(u16, u16), VecDeque<ShardMessage>>,
    clients: Vec<Client>,
    bodies: u64,
    trace: u64,
    generation: u32,
}

fn name(user: usize) -> String {
    if user == TO_GROUP { GROUP.to_owned() } else { format!("user-{user}") }
}

fn group_id() -> ConversationId {
    ConversationId::group(&UserName::new(GROUP).unwrap())
}

impl World {
    pub fn new(seed: u64, shards: u16, faults: bool) -> Self {
        let placement = CorePlacement::new(shards).unwrap();
        let clients = (0..USERS * DEVICES_PER_USER as usize).map(|at| Client {
            user: at % USERS,
            device: DeviceId(1 + at as u64 / USERS as u64),
            conn: None,
            logged_in: false,
            decoder: FrameDecoder::new(),
            next_client_seq: 1,
            outstanding: BTreeMap::new(),
            requests: HashMap::new(),
            accepted: BTreeMap::new(),
            stream: HashMap::new(),
            seen: BTreeMap::new(),
            changes: BTreeMap::new(),
            login_us: 0,
        });
        let mut world = Self {
            rng: SmallRng::seed_from_u64(seed),
            faults,
            lossy: faults,
            placement,
            now: Now { mono_us: 1, unix_ms: 1_700_000_000_000 },
            sides: Vec::new(),
            lanes: BTreeMap::new(),
            clients: clients.collect(),
            bodies: 0,
            trace: seed,
            generation: 0,
        };
        world.boot(memory::open(shards));
        world
    }

    fn boot(&mut self, stores: Vec<MemoryStore>) {
        let placement = self.placement;
        let side = |(at, store): (usize, MemoryStore)| {
            let mut config = CoreConfig::new(ShardIndex(at as u16), placement);
            config.device_policy = DevicePolicy::Many;
            // Small caches, so that loading and evicting is the common case.
            config.conversations_cached_max = 2;
            config.users_cached_max = 2;
            ShardSide { shard: Shard::new(config, 7), store, work: VecDeque::new(), next_slot: 0 }
        };
        self.sides = stores.into_iter().enumerate().map(side).collect();
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    /// One random thing happens.
    pub fn step(&mut self) {
        self.now.mono_us += self.rng.random_range(0..20_000);
        self.now.unix_ms = 1_700_000_000_000 + self.now.mono_us / 1_000;
        match self.rng.random_range(0..100) {
            0..30 => self.client_acts(),
            30..60 => self.lane_moves(),
            60..75 => self.store_moves(),
            75..85 => self.workers_move(),
            85..92 => self.time_passes(),
            92..97 => self.client_retries(),
            97..99 if self.chance(20) => self.client_drops(),
            _ if self.faults && self.chance(10) => self.crash(),
            _ => {}
        }
        if self.chance(10) {
            self.sides.iter().for_each(|side| side.shard.check_invariants());
        }
    }

    fn handle(&mut self, at: usize, event: Event<'_>) -> Verdict {
        let mut fx = Effects::default();
        let verdict = self.sides[at].shard.handle(event, self.now, &mut fx);
        self.perform(at, fx);
        verdict
    }

    fn perform(&mut self, at: usize, fx: Effects) {
        let mut closed = Vec::new();
        for effect in fx.list {
            match effect {
                Effect::Close { conn, .. } => closed.push(conn),
                Effect::Append(record) => {
                    self.sides[at].store.append(&record).unwrap();
                }
                Effect::Load { token, query } => self.sides[at].store.load(LoadToken(token.0), query).unwrap(),
                Effect::Work { token, work } => self.sides[at].work.push_back((token, work)),
                Effect::ToShard { to, message } => {
                    if !(self.lossy && self.chance(3)) {
                        self.lanes.entry((at as u16, to.0)).or_default().push_back(message);
                    }
                }
                Effect::Released { .. } => panic!("a node alone gives nothing up"),
            }
        }
        for conn in fx.dirty {
            self.flush(at, conn);
        }
        for conn in closed {
            let _ = self.sides[at].shard.handle(Event::Closed { conn }, self.now, &mut Effects::default());
            if let Some(client) = self.clients.iter_mut().find(|client| client.conn == Some((at, conn))) {
                client.disconnect();
            }
        }
    }

    fn flush(&mut self, at: usize, conn: ConnId) {
        let Some(bytes) = self.sides[at].shard.take_output(conn) else { return };
        let client = self.clients.iter().position(|client| client.conn == Some((at, conn)));
        if let Some(client) = client {
            self.receive(client, &bytes);
        }
        let mut fx = Effects::default();
        let sent = Event::Sent { conn, bytes: bytes.len() };
        let _ = self.sides[at].shard.handle(sent, self.now, &mut fx);
        self.perform(at, fx);
    }

    /// A client reads frames.
    fn receive(&mut self, who: usize, bytes: &[u8]) {
        let mut input = bytes;
        let mut decoder = std::mem::take(&mut self.clients[who].decoder);
        while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
            self.trace = self.trace.wrapping_mul(31).wrapping_add(ringline_schema::ids::body_hash(frame.raw));
            let reply = decode_reply(&frame.header, frame.body).unwrap();
            self.clients[who].read(frame.header.request_id, &reply);
        }
        self.clients[who].decoder = decoder;
    }

    fn request(&mut self, who: usize, request_id: u32, request: Request<'_>) {
        let Some((at, conn)) = self.clients[who].conn else { return };
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        let event = Event::Request { conn, codec, flags, request_id, request };
        if let Verdict::HandOver(_) = self.handle(at, event) {
            panic!("a client that connected to its owner was handed over");
        }
    }

    fn client_acts(&mut self) {
        let who = self.rng.random_range(0..self.clients.len());
        if self.clients[who].conn.is_none() {
            return self.connect(who);
        }
        if !self.clients[who].logged_in {
            return;
        }
        match self.rng.random_range(0..11) {
            0..6 if self.clients[who].outstanding.len() < 20 => {
                let to = self.rng.random_range(0..=TO_GROUP);
                self.bodies += 1;
                let body = format!("m{}", self.bodies);
                let client = &mut self.clients[who];
                let client_seq = client.next_client_seq;
                client.next_client_seq += 1;
                client.outstanding.insert(client_seq, Outstanding { to, body, tried_us: 0, last_request: 0 });
                self.transmit(who, client_seq);
            }
            6..8 => self.acknowledge(who),
            8 => {
                let (with, after) = (self.rng.random_range(0..=TO_GROUP), Seq(self.rng.random_range(0..30)));
                self.fetch(who, with, after);
            }
            9 => self.come_or_go(who),
            _ => self.request(who, 0, Request::Online { cursor: "", limit: 3 }),
        }
    }

    /// User 0 makes the group and stays; others come and go.
    fn come_or_go(&mut self, who: usize) {
        let act = match (self.clients[who].user, self.rng.random_range(0..2)) {
            (0, _) => GroupAct::Create { title: "all", join: JoinPolicy::Open, users: Names::default() },
            (_, 0) => GroupAct::Join { greeting: "" },
            (_, _) => GroupAct::Leave,
        };
        self.request(who, u32::MAX - 2, Request::Group { group: GROUP, act });
    }

    fn connect(&mut self, who: usize) {
        let user = name(self.clients[who].user);
        let owner = self.placement.shard_of(Partition::of_user(&user));
        let at = usize::from(owner.0);
        self.generation += 1;
        let conn = ConnId { slot: self.sides[at].next_slot, generation: self.generation };
        self.sides[at].next_slot += 1;
        self.clients[who].conn = Some((at, conn));
        self.clients[who].login_us = self.now.mono_us;
        let _ = self.handle(at, Event::Opened { conn });
        let login = Login {
            user: &user,
            credential: Credential::Token(Secret("token")),
            device: self.clients[who].device,
            device_kind: DeviceKind::Other,
            agent: "sim",
        };
        self.request(who, u32::MAX, Request::Login(login));
    }

    /// Sends, or sends again under the same number.
    fn transmit(&mut self, who: usize, client_seq: u64) {
        let now_us = self.now.mono_us;
        let Some(send) = self.clients[who].outstanding.get_mut(&client_seq) else { return };
        send.tried_us = now_us;
        send.last_request = self.rng.random_range(1..u32::MAX);
        let (to, body) = (name(send.to), send.body.clone());
        let request_id = send.last_request;
        self.clients[who].requests.insert(request_id, client_seq);
        let send = Send {
            to: &to,
            class: Class::Durable,
            kind: BodyKind::Text,
            client_seq,
            ack_timeout_ms: (to != GROUP).then_some(500),
            body: body.as_bytes(),
            mentions: Mentions::default(),
        };
        self.request(who, request_id, Request::Send(send));
    }

    fn acknowledge(&mut self, who: usize) {
        let stream = &self.clients[who].stream;
        let mut acks: Vec<_> = stream.iter().map(|(id, seq)| (*id, *seq)).collect();
        acks.sort_unstable();
        for (conversation, seq) in acks {
            self.request(who, 0, Request::Ack(Ack::Upto { conversation, seq }));
        }
    }

    fn fetch(&mut self, who: usize, with: usize, after: Seq) {
        let with = name(with);
        let fetch = Fetch { with: &with, after, before: None, limit: 0, newest: false };
        self.request(who, u32::MAX - 1, Request::Fetch(fetch));
    }

    fn lane_moves(&mut self) {
        let open: Vec<_> = self.lanes.iter().filter(|(_, lane)| !lane.is_empty()).map(|(key, _)| *key).collect();
        if open.is_empty() {
            return;
        }
        let (from, to) = open[self.rng.random_range(0..open.len())];
        let count = self.rng.random_range(1..8);
        for _ in 0..count {
            let Some(message) = self.lanes.get_mut(&(from, to)).and_then(VecDeque::pop_front) else { return };
            let _ = self.handle(usize::from(to), Event::Shard { from: ShardIndex(from), message });
        }
    }

    fn store_moves(&mut self) {
        let at = self.rng.random_range(0..self.sides.len());
        if self.chance(70) {
            self.sides[at].store.submit();
        }
        self.store_events(at);
    }

    fn store_events(&mut self, at: usize) {
        let mut events = Vec::new();
        self.sides[at].store.poll(&mut events);
        for event in events {
            let event = match event {
                StoreEvent::Committed(lsn) => Event::Stored { upto: lsn.0 },
                StoreEvent::Failed => Event::StoreFailed,
                StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
            };
            let _ = self.handle(at, event);
        }
    }

    fn workers_move(&mut self) {
        let at = self.rng.random_range(0..self.sides.len());
        while let Some((token, work)) = self.sides[at].work.pop_front() {
            let outcome = match work {
                Work::HashPassword { .. } => WorkOutcome::Hashed("hash".to_owned()),
                Work::VerifyPassword { .. } | Work::VerifyToken { .. } => WorkOutcome::Verified(true),
            };
            let _ = self.handle(at, Event::Worked { token, outcome });
        }
    }

    fn time_passes(&mut self) {
        for at in 0..self.sides.len() {
            if self.sides[at].shard.next_deadline_us().is_some_and(|due| due <= self.now.mono_us) {
                let _ = self.handle(at, Event::Timer);
            }
        }
    }

    fn client_retries(&mut self) {
        const PATIENCE_US: u64 = 400_000;
        for who in 0..self.clients.len() {
            let late: Vec<_> = (self.clients[who].outstanding.iter())
                .filter(|(_, send)| send.tried_us + PATIENCE_US < self.now.mono_us)
                .map(|(client_seq, _)| *client_seq)
                .collect();
            if self.clients[who].logged_in {
                late.into_iter().for_each(|client_seq| self.transmit(who, client_seq));
            } else if self.clients[who].login_us + PATIENCE_US < self.now.mono_us {
                self.drop_client(who);
            }
        }
    }

    fn client_drops(&mut self) {
        let who = self.rng.random_range(0..self.clients.len());
        self.drop_client(who);
    }

    fn drop_client(&mut self, who: usize) {
        if let Some((at, conn)) = self.clients[who].conn {
            self.clients[who].disconnect();
            let _ = self.handle(at, Event::Closed { conn });
        }
    }

    /// The node dies: what was not submitted to the store is gone, and so is every connection, lane and session. It
    /// comes back with another number of shards.
    fn crash(&mut self) {
        let shards = self.rng.random_range(1..6);
        self.placement = CorePlacement::new(shards).unwrap();
        let stores = self.sides[0].store.reopen(shards);
        self.lanes.clear();
        self.clients.iter_mut().for_each(Client::disconnect);
        self.boot(stores);
    }

    /// Faults stop; everything gets time to finish.
    pub fn heal(&mut self) {
        self.lossy = false;
        self.faults = false;
        for _ in 0..400 {
            for who in 0..self.clients.len() {
                if self.clients[who].conn.is_none() {
                    self.connect(who);
                }
            }
            self.settle();
            self.now.mono_us += 500_000;
            self.time_passes();
            // A lost answer also leaks its place in the in-flight count until the connection is made anew.
            if self.rng.random_range(0..8) == 0 {
                self.client_drops();
            }
            self.client_retries();
            let done = self.clients.iter().all(|client| client.outstanding.is_empty() && client.logged_in);
            if done && self.sides.iter().all(|side| side.shard.is_quiet()) {
                break;
            }
        }
        for who in 0..self.clients.len() {
            for with in 0..=TO_GROUP {
                // A page of the group ends where a membership ends, so it takes more of them.
                for page in 0..if with == TO_GROUP { 100 } else { 20 } {
                    self.fetch(who, with, Seq(if with == TO_GROUP { page * 10 } else { page * 50 }));
                    self.settle();
                }
            }
        }
    }

    /// Lanes, store and workers run until nothing moves.
    fn settle(&mut self) {
        for _ in 0..50 {
            for _ in 0..40 {
                self.lane_moves();
                self.workers_move();
            }
            for at in 0..self.sides.len() {
                self.sides[at].store.submit();
                self.store_events(at);
            }
            if self.lanes.values().all(VecDeque::is_empty) && self.sides.iter().all(|side| side.shard.is_quiet()) {
                return;
            }
        }
    }

    /// The promises, judged from what clients saw.
    pub fn check(&self) {
        self.sides.iter().for_each(|side| side.shard.check_invariants());
        let mut log: BTreeMap<(ConversationId, Seq), &str> = BTreeMap::new();
        for client in &self.clients {
            assert!(client.outstanding.is_empty(), "a send was never answered: {:?}", client.outstanding);
            for (key, body) in &client.seen {
                let first = log.entry(*key).or_insert(body);
                assert_eq!(first, body, "two bodies at {key:?}");
            }
        }
        let mut heads: BTreeMap<ConversationId, u64> = BTreeMap::new();
        for (conversation, seq) in log.keys() {
            let head = heads.entry(*conversation).or_default();
            assert_eq!(seq.0, *head + 1, "{conversation} has a hole");
            *head = seq.0;
        }
        let mut bodies: HashMap<&str, (ConversationId, Seq)> = HashMap::new();
        for (key, body) in &log {
            assert_eq!(bodies.insert(body, *key), None, "{body} is there twice");
        }
        self.check_group();
        let mut accepted = 0;
        for client in &self.clients {
            for ((_, client_seq), place) in &client.accepted {
                assert!(log.contains_key(place), "accepted {client_seq} at {place:?} and not there");
                accepted += 1;
            }
        }
        let changes = self.clients.iter().flat_map(|client| client.changes.keys()).collect::<BTreeSet<_>>().len();
        assert_eq!(accepted + changes, log.len(), "what is in the log was accepted, once each");
        assert!(accepted > 50, "the run did something: {accepted}");
    }

    /// Everyone saw of the group what lay in the times of their membership, and nothing else.
    fn check_group(&self) {
        let mut changes: BTreeMap<Seq, (bool, String)> = BTreeMap::new();
        for client in &self.clients {
            for (seq, change) in &client.changes {
                assert_eq!(changes.entry(*seq).or_insert_with(|| change.clone()), change);
            }
        }
        for client in &self.clients {
            let me = name(client.user);
            let own: Vec<_> = changes.iter().filter(|(_, (_, user))| *user == me).collect();
            let seen = client.seen.keys().filter(|(id, _)| *id == group_id());
            for (_, seq) in seen {
                let last = own.iter().rev().find(|(at, _)| *at <= seq);
                assert!(last.is_some_and(|(_, (came, _))| *came), "{me} saw {seq} of a group and was not in it");
            }
        }
    }

    pub fn fingerprint(&self) -> u64 {
        self.trace
    }
}

impl Client {
    fn disconnect(&mut self) {
        self.conn = None;
        self.logged_in = false;
        self.decoder = FrameDecoder::new();
        self.requests.clear();
        self.stream.clear();
    }

    fn read(&mut self, request_id: u32, reply: &Reply<'_>) {
        match reply {
            Reply::LoginOk(ok) => {
                assert_eq!(ok.user, name(self.user));
                self.logged_in = true;
            }
            Reply::SendAck(ack) => {
                let Some(client_seq) = self.requests.remove(&request_id) else { return };
                let key = (self.user, client_seq);
                let place = (ack.conversation, ack.seq);
                assert_eq!(*self.accepted.entry(key).or_insert(place), place, "a retry got another seq");
                self.outstanding.remove(&client_seq);
            }
            Reply::Deliver(message) => {
                let last = self.stream.entry(message.conversation).or_default();
                assert!(message.seq > *last, "delivered {} after {last} on one connection", message.seq);
                *last = message.seq;
                self.see(message);
            }
            Reply::FetchOk { messages, .. } => messages.iter().for_each(|message| self.see(message)),
            Reply::Failure { code, .. } => {
                const KNOWN: [ErrorCode; 4] =
                    [ErrorCode::Busy, ErrorCode::BadRequest, ErrorCode::NoSuchUser, ErrorCode::NoSuchConversation];
                const OF_GROUPS: [ErrorCode; 5] = [
                    ErrorCode::NoSuchGroup,
                    ErrorCode::NotMember,
                    ErrorCode::GroupExists,
                    ErrorCode::AlreadyMember,
                    ErrorCode::Unsupported,
                ];
                assert!(KNOWN.contains(code) || OF_GROUPS.contains(code), "unexpected {code}");
                // Not a member: it was not accepted, and is not tried again. But an earlier copy's refusal says nothing of
                // the last one, which may meet the group at a better moment.
                if OF_GROUPS.contains(code)
                    && let Some(client_seq) = self.requests.remove(&request_id)
                    && self.outstanding.get(&client_seq).is_some_and(|send| send.last_request == request_id)
                {
                    self.outstanding.remove(&client_seq);
                }
            }
            Reply::Group(_) => {}
            Reply::Receipt(_)
            | Reply::OnlineOk { .. }
            | Reply::Kicked { .. }
            | Reply::Chat(ChatReply::ReceiptUpto { .. }) => {}
            other => panic!("unexpected {other:?}"),
        }
    }

    fn see(&mut self, message: &ringline_schema::message::Message<'_>) {
        let me = name(self.user);
        let of_group = message.to == GROUP;
        assert!(of_group || message.from == me || message.to == me, "{me} was shown a message of others");
        let id = ConversationId::with(&UserName::new(message.from).unwrap(), &UserName::new(message.to).unwrap());
        assert_eq!(message.conversation, id);
        let mut body = String::from_utf8(message.body.to_vec()).unwrap();
        if let Some(change) = message.extra.change {
            body = format!("{} {change:?}", message.seq);
            self.changes.insert(message.seq, (change.what != What::Left, message.from.to_owned()));
        }
        let first = self.seen.entry((message.conversation, message.seq)).or_insert_with(|| body.clone());
        assert_eq!(*first, body);
    }
}
