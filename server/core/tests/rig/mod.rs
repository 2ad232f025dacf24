//! Shards with stores in memory and lanes that deliver at once, and what each connection was told.

#![allow(dead_code)]

use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::CoreConfig;
use ringline_core::event::{
    CloseReason, ConnId, Effect, Effects, Event, Now, ShardMessage, Token, Verdict, Work, WorkOutcome,
};
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Query, Record};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

/// A connection and the shard it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At(pub usize, pub ConnId);

pub struct Rig {
    pub shards: Vec<(Shard, MemoryStore)>,
    pub now: Now,
    next: u32,
    frames: Vec<(At, Vec<u8>)>,
    pub closed: Vec<(At, CloseReason)>,
    /// Whether stores commit.
    pub committing: bool,
    /// Whether clients read; otherwise output stays on its way.
    pub reading: bool,
    /// Whether stores leave what they are asked for later.
    pub holding: bool,
    held: Vec<(usize, LoadToken, Query)>,
    /// Messages of lanes that were delivered, for counts.
    pub lane_messages: usize,
}

impl Rig {
    pub fn new(shards: u16, change: impl Fn(&mut CoreConfig)) -> Self {
        let mut rig = Self {
            shards: Vec::new(),
            now: Now { mono_us: 1_000_000, unix_ms: 1_700_000_000_000 },
            next: 0,
            frames: Vec::new(),
            closed: Vec::new(),
            committing: true,
            reading: true,
            holding: false,
            held: Vec::new(),
            lane_messages: 0,
        };
        rig.boot(memory::open(shards), change);
        rig
    }

    fn boot(&mut self, stores: Vec<MemoryStore>, change: impl Fn(&mut CoreConfig)) {
        let placement = CorePlacement::new(stores.len() as u16).unwrap();
        let shard = |(at, store): (usize, MemoryStore)| {
            let mut config = CoreConfig::new(ShardIndex(at as u16), placement);
            change(&mut config);
            (Shard::new(config, 1), store)
        };
        self.shards = stores.into_iter().enumerate().map(shard).collect();
    }

    /// The node dies and comes back; what was not committed is gone.
    pub fn restart(&mut self, shards: u16) {
        let stores = self.shards[0].1.reopen(shards);
        self.frames.clear();
        self.held.clear();
        self.boot(stores, |_| ());
    }

    pub fn event(&mut self, at: usize, event: Event<'_>) -> Verdict {
        let mut lanes: Vec<(ShardIndex, usize, ShardMessage)> = Vec::new();
        let verdict = self.step(at, event, &mut lanes);
        while !lanes.is_empty() {
            let (from, to, message) = lanes.remove(0);
            self.lane_messages += 1;
            let _ = self.step(to, Event::Shard { from, message }, &mut lanes);
        }
        verdict
    }

    fn step(&mut self, at: usize, event: Event<'_>, lanes: &mut Vec<(ShardIndex, usize, ShardMessage)>) -> Verdict {
        let mut fx = Effects::default();
        let verdict = self.shards[at].0.handle(event, self.now, &mut fx);
        self.shards[at].0.check_invariants();
        for effect in fx.list {
            match effect {
                Effect::Close { conn, reason } => self.closed.push((At(at, conn), reason)),
                Effect::Append(record) => {
                    self.shards[at].1.append(&record).unwrap();
                }
                Effect::Load { token, query } if self.holding => self.held.push((at, LoadToken(token.0), query)),
                Effect::Load { token, query } => self.shards[at].1.load(LoadToken(token.0), query).unwrap(),
                Effect::Work { token, work } => {
                    let outcome = match work {
                        Work::HashPassword { password } => WorkOutcome::Hashed(password),
                        Work::VerifyPassword { .. } | Work::VerifyToken { .. } => WorkOutcome::Verified(true),
                    };
                    let _ = self.step(at, Event::Worked { token, outcome }, lanes);
                }
                Effect::ToShard { to, message } => lanes.push((ShardIndex(at as u16), usize::from(to.0), message)),
                Effect::Released { .. } => panic!("a node alone gives nothing up"),
            }
        }
        for conn in fx.dirty {
            self.take(At(at, conn), lanes);
        }
        self.store(at, lanes);
        verdict
    }

    fn take(&mut self, at: At, lanes: &mut Vec<(ShardIndex, usize, ShardMessage)>) {
        let Some(bytes) = self.shards[at.0].0.take_output(at.1) else { return };
        let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
        while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
            self.frames.push((at, frame.raw.to_vec()));
        }
        if self.reading {
            let _ = self.step(at.0, Event::Sent { conn: at.1, bytes: bytes.len() }, lanes);
        }
    }

    fn store(&mut self, at: usize, lanes: &mut Vec<(ShardIndex, usize, ShardMessage)>) {
        if self.committing {
            self.shards[at].1.submit();
        }
        let mut events = Vec::new();
        self.shards[at].1.poll(&mut events);
        for event in events {
            let event = match event {
                StoreEvent::Committed(lsn) => Event::Stored { upto: lsn.0 },
                StoreEvent::Failed => Event::StoreFailed,
                StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
            };
            let _ = self.step(at, event, lanes);
        }
    }

    /// Commits what has waited while `committing` was off.
    pub fn commit(&mut self) {
        self.committing = true;
        for at in 0..self.shards.len() {
            let _ = self.event(at, Event::Timer);
        }
    }

    /// Answers what was left for later.
    pub fn release(&mut self) {
        self.holding = false;
        for (at, token, query) in std::mem::take(&mut self.held) {
            self.shards[at].1.load(token, query).unwrap();
            let _ = self.event(at, Event::Timer);
        }
    }

    /// Answers what was left for later as a database does that is away.
    pub fn fail(&mut self) {
        self.holding = false;
        for (at, token, _) in std::mem::take(&mut self.held) {
            let _ = self.event(at, Event::Loaded { token: Token(token.0), answer: Answer::Failed });
        }
    }

    /// Writes records as another run of the node would have left them.
    pub fn put(&mut self, records: &[Record]) {
        let store = &mut self.shards[0].1.reopen(1)[0];
        for record in records {
            store.append(record).unwrap();
        }
        store.submit();
    }

    pub fn ask(&mut self, at: At, request: Request<'_>) -> Vec<Vec<u8>> {
        self.told(at);
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        let _ = self.event(at.0, Event::Request { conn: at.1, codec, flags, request_id: 7, request });
        self.told(at)
    }

    pub fn login_as(&mut self, user: &str, device: u64, device_kind: DeviceKind) -> At {
        let owner = CorePlacement::new(self.shards.len() as u16).unwrap().shard_of(name(user).partition());
        self.next += 1;
        let at = At(usize::from(owner.0), ConnId { slot: self.next, generation: 1 });
        let _ = self.event(at.0, Event::Opened { conn: at.1 });
        let credential = Credential::Token(Secret(user));
        let login = Login { user, credential, device: DeviceId(device), device_kind, agent: "rig/1" };
        let told = self.ask(at, Request::Login(login));
        assert!(matches!(decode(&told[0]), Reply::LoginOk(_)), "{:?}", decode(&told[0]));
        at
    }

    pub fn login(&mut self, user: &str, device: u64) -> At {
        self.login_as(user, device, DeviceKind::Other)
    }

    pub fn leave(&mut self, at: At) {
        let _ = self.event(at.0, Event::Closed { conn: at.1 });
    }

    /// What a connection was told since the last look.
    pub fn told(&mut self, at: At) -> Vec<Vec<u8>> {
        let all = std::mem::take(&mut self.frames);
        let (own, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(to, _)| *to == at);
        self.frames = others;
        own.into_iter().map(|(_, frame)| frame).collect()
    }

    pub fn code(&mut self, at: At, request: Request<'_>) -> Option<ErrorCode> {
        self.ask(at, request).iter().find_map(|frame| match decode(frame) {
            Reply::Failure { code, .. } => Some(code),
            _ => None,
        })
    }

    /// Sends a durable text and says where it was accepted.
    pub fn send(&mut self, at: At, to: &str, client_seq: u64, body: &[u8]) -> Seq {
        let told = self.ask(at, Request::Send(durable(to, client_seq, body)));
        let ack = told.iter().find_map(|frame| match decode(frame) {
            Reply::SendAck(ack) => Some(ack.seq),
            _ => None,
        });
        ack.unwrap_or_else(|| panic!("not accepted: {:?}", told.iter().map(|frame| decode(frame)).collect::<Vec<_>>()))
    }

    pub fn pass(&mut self, ms: u64) {
        let end_us = self.now.mono_us + ms * 1_000;
        while self.now.mono_us < end_us {
            let step_us = (end_us - self.now.mono_us).min(100_000);
            self.now.mono_us += step_us;
            self.now.unix_ms += step_us / 1_000;
            for at in 0..self.shards.len() {
                let _ = self.event(at, Event::Timer);
            }
        }
    }
}

pub fn name(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

pub fn direct(one: &str, other: &str) -> ConversationId {
    ConversationId::direct(&name(one), &name(other))
}

pub fn durable<'a>(to: &'a str, client_seq: u64, body: &'a [u8]) -> Send<'a> {
    let (class, kind) = (Class::Durable, BodyKind::Text);
    Send { to, class, kind, client_seq, ack_timeout_ms: None, body, mentions: Mentions::default() }
}

pub fn decode(frame: &[u8]) -> Reply<'_> {
    let header = ringline_schema::frame::Header::decode(frame.first_chunk().unwrap(), u32::MAX).unwrap();
    decode_reply(&header, &frame[16..]).unwrap()
}
