//! A node of several shards for tests of rules: lanes and store move at once, unless a test holds or drops them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::VecDeque;

use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::CoreConfig;
use ringline_core::event::{ConnId, Effect, Effects, Event, Now, ShardMessage, Token, Work, WorkOutcome};
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder, Header};
use ringline_schema::ids::{DeviceId, UserName};
use ringline_schema::message::*;
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

struct Side {
    shard: Shard,
    store: MemoryStore,
}

/// A logged-in device: its shard, its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat(pub usize, pub ConnId);

pub struct Town {
    sides: Vec<Side>,
    placement: CorePlacement,
    pub now: Now,
    next: u32,
    lanes: VecDeque<(usize, usize, ShardMessage)>,
    /// Lane messages that a test wants lost.
    pub drops: fn(&ShardMessage) -> bool,
    frames: Vec<(Seat, Vec<u8>)>,
    /// Whether stores commit.
    pub committing: bool,
}

impl Town {
    pub fn new(shards: u16, change: impl Fn(&mut CoreConfig)) -> Self {
        let placement = CorePlacement::new(shards).unwrap();
        let sides = memory::open(shards).into_iter().enumerate().map(|(at, store)| {
            let mut config = CoreConfig::new(ShardIndex(at as u16), placement);
            change(&mut config);
            Side { shard: Shard::new(config, 1), store }
        });
        let now = Now { mono_us: 1_000_000, unix_ms: 1_700_000_000_000 };
        let (lanes, frames) = (VecDeque::new(), Vec::new());
        Self { sides: sides.collect(), placement, now, next: 0, lanes, drops: |_| false, frames, committing: true }
    }

    fn event(&mut self, at: usize, event: Event<'_>) {
        self.one_event(at, event);
        while let Some((from, to, message)) = self.lanes.pop_front() {
            if !(self.drops)(&message) {
                self.one_event(to, Event::Shard { from: ShardIndex(from as u16), message });
            }
        }
    }

    fn one_event(&mut self, at: usize, event: Event<'_>) {
        let mut fx = Effects::default();
        let _ = self.sides[at].shard.handle(event, self.now, &mut fx);
        self.sides[at].shard.check_invariants();
        let mut worked = Vec::new();
        for effect in fx.list {
            match effect {
                Effect::Close { .. } | Effect::Released { .. } => {}
                Effect::Append(record) => drop(self.sides[at].store.append(&record).unwrap()),
                Effect::Load { token, query } => self.sides[at].store.load(LoadToken(token.0), query).unwrap(),
                Effect::Work { token, work } => {
                    assert!(matches!(work, Work::VerifyToken { .. }));
                    worked.push(token);
                }
                Effect::ToShard { to, message } => self.lanes.push_back((at, usize::from(to.0), message)),
            }
        }
        for conn in fx.dirty {
            self.take(Seat(at, conn));
        }
        for token in worked {
            self.one_event(at, Event::Worked { token, outcome: WorkOutcome::Verified(true) });
        }
        self.commit(at);
    }

    fn commit(&mut self, at: usize) {
        if self.committing {
            self.sides[at].store.submit();
        }
        let mut events = Vec::new();
        self.sides[at].store.poll(&mut events);
        for event in events {
            let event = match event {
                StoreEvent::Committed(lsn) => Event::Stored { upto: lsn.0 },
                StoreEvent::Failed => Event::StoreFailed,
                StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
            };
            self.one_event(at, event);
        }
    }

    fn take(&mut self, seat: Seat) {
        let Some(bytes) = self.sides[seat.0].shard.take_output(seat.1) else { return };
        let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
        while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
            self.frames.push((seat, frame.raw.to_vec()));
        }
        self.one_event(seat.0, Event::Sent { conn: seat.1, bytes: bytes.len() });
    }

    pub fn shard_of(&self, user: &str) -> usize {
        usize::from(self.placement.shard_of(UserName::new(user).unwrap().partition()).0)
    }

    pub fn login_as(&mut self, user: &str, device: u64, device_kind: DeviceKind) -> Seat {
        let at = self.shard_of(user);
        self.next += 1;
        let seat = Seat(at, ConnId { slot: self.next, generation: 1 });
        self.event(at, Event::Opened { conn: seat.1 });
        let credential = Credential::Token(Secret(user));
        self.ask(seat, Request::Login(Login { user, credential, device: DeviceId(device), device_kind, agent: "" }));
        let told = self.told(seat);
        assert!(matches!(decode(&told[0]), Reply::LoginOk(_)), "{told:?}");
        seat
    }

    pub fn login(&mut self, user: &str) -> Seat {
        self.login_as(user, 1, DeviceKind::Other)
    }

    pub fn leave(&mut self, seat: Seat) {
        self.event(seat.0, Event::Closed { conn: seat.1 });
    }

    pub fn ask(&mut self, seat: Seat, request: Request<'_>) {
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        self.event(seat.0, Event::Request { conn: seat.1, codec, flags, request_id: 7, request });
    }

    pub fn chat(&mut self, seat: Seat, request: ChatRequest<'_>) {
        self.ask(seat, Request::Chat(request));
    }

    /// Frames of a device since the last look.
    pub fn told(&mut self, seat: Seat) -> Vec<Vec<u8>> {
        let (own, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.frames).into_iter().partition(|(to, _)| *to == seat);
        self.frames = others;
        own.into_iter().map(|(_, frame)| frame).collect()
    }

    /// Asks, and expects exactly this refusal; `None`: exactly DONE.
    pub fn expect(&mut self, seat: Seat, request: ChatRequest<'_>, refusal: Option<ErrorCode>) {
        self.told(seat);
        self.chat(seat, request);
        let told = self.told(seat);
        assert_eq!(told.len(), 1, "{request:?} is answered once");
        match (decode(&told[0]), refusal) {
            (Reply::Chat(ChatReply::Done), None) => {}
            (Reply::Failure { code, .. }, Some(expected)) => assert_eq!(code, expected, "{request:?}"),
            (other, _) => panic!("{request:?}: {other:?}"),
        }
    }

    /// Sends and tells how it ended.
    pub fn send(&mut self, seat: Seat, to: &str, class: Class, client_seq: u64) -> Result<SendAck, ErrorCode> {
        let (kind, mentions) = (BodyKind::Text, Mentions::default());
        self.told(seat);
        let send = Send { to, class, kind, client_seq, ack_timeout_ms: None, body: b"hello", mentions };
        self.ask(seat, Request::Send(send));
        let told = self.told(seat);
        assert_eq!(told.iter().filter(|frame| !matches!(decode(frame), Reply::Deliver(_))).count(), 1);
        let answer = told.iter().find_map(|frame| match decode(frame) {
            Reply::SendAck(ack) => Some(Ok(ack)),
            Reply::Failure { code, .. } => Some(Err(code)),
            _ => None,
        });
        answer.expect("an answer")
    }

    pub fn pass(&mut self, ms: u64) {
        let end_us = self.now.mono_us + ms * 1_000;
        while self.now.mono_us < end_us {
            self.now.mono_us = (self.now.mono_us + 100_000).min(end_us);
            self.now.unix_ms += 100;
            for at in 0..self.sides.len() {
                self.event(at, Event::Timer);
            }
        }
    }

    /// The node stops at once and starts again, with so many shards.
    pub fn restart(&mut self, shards: u16) {
        self.placement = CorePlacement::new(shards).unwrap();
        let stores = self.sides[0].store.reopen(shards);
        let placement = self.placement;
        let side = |(at, store): (usize, MemoryStore)| {
            let config = CoreConfig::new(ShardIndex(at as u16), placement);
            Side { shard: Shard::new(config, 1), store }
        };
        self.sides = stores.into_iter().enumerate().map(side).collect();
        self.frames.clear();
    }
}

pub fn decode(frame: &[u8]) -> Reply<'_> {
    let header = Header::decode(frame.first_chunk().unwrap(), u32::MAX).unwrap();
    decode_reply(&header, &frame[16..]).unwrap()
}
