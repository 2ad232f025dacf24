//! The pure session against a model of the server: random orders of sends, answers, losses, refusals and reconnections.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proptest::prelude::*;
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::frame::Frame;
use ringline_schema::message::chat::Sync;
use ringline_schema::message::{Ack, ChatRequest, Class, Outcome, Place, SendAck};

use super::*;
use crate::pending::SendOptions;

mod refusals;

const DEVICE: DeviceId = DeviceId(7);
/// Rows of the model's pages: small, so that a few messages need several.
const PAGE_ROWS: usize = 3;
const EVENTS_MAX: usize = 4;

fn name(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

fn session(catch_up: CatchUp) -> Session {
    Session::new(Config {
        user: name("ann"),
        device: DEVICE,
        device_kind: DeviceKind::Bot,
        agent: String::new(),
        catch_up,
        sends_queued_max: 1_000,
        events_queued_max: EVENTS_MAX,
        first_client_seq: 1_000,
    })
}

fn outgoing(to: &str, body: &str, options: SendOptions) -> Outgoing {
    Outgoing { to: name(to), body: Bytes::from(body.to_owned()), options, amends: None }
}

#[derive(Default)]
struct Kept {
    with: String,
    /// client_seq (0: the peer's) and body.
    messages: Vec<(u64, Vec<u8>)>,
    acked: u64,
}

/// What a server would keep, and one connection to it.
#[derive(Default)]
struct Model {
    kept: BTreeMap<u128, Kept>,
    inbox: VecDeque<Vec<u8>>,
    outbox: VecDeque<Vec<u8>>,
    connected: bool,
    refusals: u32,
    echo: bool,
    window: u32,
    without_sync: bool,
    /// How far this connection was given conversations: more it can't acknowledge.
    shown: BTreeMap<u128, u64>,
}

impl Model {
    fn answer(&mut self, request_id: u32, reply: &Reply<'_>) {
        let mut bytes = Vec::new();
        Encoder::new().reply(Codec::FlatBuffers, request_id, reply, &mut bytes);
        self.outbox.push_back(bytes);
    }

    /// Serves one request. False: there was none.
    fn serve(&mut self) -> bool {
        let Some(bytes) = self.inbox.pop_front() else { return false };
        let mut decoder = FrameDecoder::new();
        let frame = decoder.next(&mut &bytes[..], u32::MAX).unwrap().unwrap();
        let id = frame.header.request_id;
        match codec::decode_request(&frame.header, frame.body).unwrap() {
            Request::Login(_) => {
                let ok = LoginOk {
                    user: "ann",
                    session: 1,
                    server_time_ms: 0,
                    ping_interval_ms: 20_000,
                    idle_timeout_ms: 60_000,
                    frame_bytes_max: 4_096,
                    sends_in_flight_max: self.window,
                };
                self.answer(id, &Reply::LoginOk(ok));
            }
            Request::Ping { stamp } => self.answer(id, &Reply::Pong { stamp, server_time_ms: 0 }),
            Request::Send(_) if self.refusals > 0 => {
                self.refusals -= 1;
                self.answer(id, &Reply::Failure { code: ErrorCode::Busy, retry_after_ms: 30, detail: "" });
            }
            Request::Send(send) => self.send(id, &send),
            Request::Ack(Ack::Upto { conversation, seq }) => {
                let kept = self.kept.get_mut(&conversation.0).unwrap();
                assert!(seq.0 <= kept.messages.len() as u64, "acknowledged before it exists");
                if self.shown.get(&conversation.0).is_some_and(|shown| seq.0 <= *shown) {
                    kept.acked = kept.acked.max(seq.0);
                } else {
                    let code = ErrorCode::NoSuchConversation;
                    self.answer(id, &Reply::Failure { code, retry_after_ms: 0, detail: "" });
                }
            }
            Request::Fetch(fetch) => self.fetch(id, &fetch),
            Request::Chat(ChatRequest::Sync(_)) if self.without_sync => {
                self.answer(id, &Reply::Failure { code: ErrorCode::Unsupported, retry_after_ms: 0, detail: "" });
            }
            Request::Chat(ChatRequest::Sync(_)) if self.refusals > 0 => {
                self.refusals -= 1;
                self.answer(id, &Reply::Failure { code: ErrorCode::Busy, retry_after_ms: 30, detail: "" });
            }
            Request::Chat(ChatRequest::Sync(sync)) => self.sync(id, &sync),
            Request::Conversations { cursor, limit } => self.list(id, cursor.0, usize::from(limit)),
            other => panic!("not expected: {other:?}"),
        }
        true
    }

    fn send(&mut self, id: u32, send: &message::Send<'_>) {
        let conversation = ConversationId::direct(&name("ann"), &name(send.to));
        let kept = self.kept.entry(conversation.0).or_default();
        send.to.clone_into(&mut kept.with);
        let own: Vec<u64> = kept.messages.iter().map(|(number, _)| *number).filter(|&number| number != 0).collect();
        let filter = &own[own.len().saturating_sub(limits::DUPLICATE_WINDOW)..];
        let reply = if filter.contains(&send.client_seq) {
            let at = kept.messages.iter().position(|(number, _)| *number == send.client_seq).unwrap();
            assert_eq!(kept.messages[at].1, send.body, "one number, one message");
            SendAck { conversation, seq: Seq(at as u64 + 1), time_ms: 5, dup: true }
        } else {
            assert!(!own.contains(&send.client_seq), "out of the filter, so it would have been kept twice");
            kept.messages.push((send.client_seq, send.body.to_vec()));
            SendAck { conversation, seq: Seq(kept.messages.len() as u64), time_ms: 5, dup: false }
        };
        if self.echo && !reply.dup {
            self.deliver(conversation.0, reply.seq.0);
        }
        self.show(conversation.0, reply.seq.0);
        self.answer(id, &Reply::SendAck(reply));
    }

    fn wire<'a>(id: u128, kept: &'a Kept, seq: u64) -> message::Message<'a> {
        let (client_seq, body) = &kept.messages[seq as usize - 1];
        let own = *client_seq != 0;
        message::Message {
            conversation: ConversationId(id),
            seq: Seq(seq),
            time_ms: 5,
            from: if own { "ann" } else { kept.with.as_str() },
            to: if own { kept.with.as_str() } else { "ann" },
            device: if own { DEVICE } else { DeviceId(1) },
            client_seq: *client_seq,
            class: Class::Durable,
            kind: message::BodyKind::Text,
            delivery: 0,
            body,
            extra: message::Extra::default(),
        }
    }

    fn show(&mut self, id: u128, seq: u64) {
        let shown = self.shown.entry(id).or_default();
        *shown = seq.max(*shown);
    }

    fn deliver(&mut self, id: u128, seq: u64) {
        self.show(id, seq);
        let mut bytes = Vec::new();
        let pushed = Reply::Deliver(Self::wire(id, &self.kept[&id], seq));
        Encoder::new().reply(Codec::FlatBuffers, 0, &pushed, &mut bytes);
        self.outbox.push_back(bytes);
    }

    /// A message of the peer. It may be pushed, announced as lagged, or lost with no word.
    fn peer_writes(&mut self, peer: &str, body: &str, push: Push) {
        let id = ConversationId::direct(&name("ann"), &name(peer));
        let kept = self.kept.entry(id.0).or_default();
        peer.clone_into(&mut kept.with);
        kept.messages.push((0, body.as_bytes().to_vec()));
        let seq = kept.messages.len() as u64;
        if !self.connected {
            return;
        }
        match push {
            Push::Deliver => self.deliver(id.0, seq),
            Push::Lag => {
                self.show(id.0, seq);
                let (from, to) = (Seq(seq), Seq(seq));
                self.answer(0, &Reply::Lagged { conversation: id, with: peer, from, to });
            }
        }
    }

    fn fetch(&mut self, id: u32, fetch: &message::Fetch<'_>) {
        let conversation = ConversationId::direct(&name("ann"), &name(fetch.with));
        let kept = &self.kept[&conversation.0];
        let before = fetch.before.map_or(u64::MAX, |before| before.0);
        let seqs = fetch.after.0 + 1..before.min(kept.messages.len() as u64 + 1);
        let messages: Vec<_> = seqs.take(PAGE_ROWS).map(|seq| Self::wire(conversation.0, kept, seq)).collect();
        let last = messages.last().map_or(0, |last| last.seq.0);
        let (first, head) = (Seq(1), Seq(kept.messages.len() as u64));
        let mut bytes = Vec::new();
        let reply = Reply::FetchOk { conversation, first, head, messages };
        Encoder::new().reply(Codec::FlatBuffers, id, &reply, &mut bytes);
        self.outbox.push_back(bytes);
        self.show(conversation.0, last);
    }

    /// Looks at two conversations a page, so that there are empty ones.
    fn sync(&mut self, id: u32, sync: &Sync<'_>) {
        let (mut messages, mut end, mut shown) = (Vec::new(), Place::default(), Vec::new());
        for (looked, (&id, kept)) in self.kept.range(sync.from.conversation.0..).enumerate() {
            let conversation = ConversationId(id);
            let told = sync.places.iter().find(|place| place.conversation == conversation).map(|place| place.seq.0);
            let from = if sync.from.conversation == conversation { sync.from.seq.0 } else { 0 };
            let after = told.unwrap_or(kept.acked).max(from);
            let head = kept.messages.len() as u64;
            if messages.len() == PAGE_ROWS || looked == 2 {
                end = Place { conversation, seq: Seq::ZERO };
                break;
            }
            shown.push((id, head));
            let room = PAGE_ROWS - messages.len();
            messages.extend((after + 1..=head).take(room).map(|seq| Self::wire(id, kept, seq)));
            if head.saturating_sub(after) > room as u64 {
                end = Place { conversation, seq: Seq(after + room as u64) };
                break;
            }
        }
        let mut bytes = Vec::new();
        let reply = Reply::Chat(ChatReply::SyncOk { messages, next: end });
        Encoder::new().reply(Codec::FlatBuffers, id, &reply, &mut bytes);
        self.outbox.push_back(bytes);
        shown.into_iter().for_each(|(id, head)| self.show(id, head));
    }

    fn list(&mut self, id: u32, cursor: u128, limit: usize) {
        let row = |(&id, kept): (&u128, &Kept)| {
            let (first, head, acked) = (Seq(1), Seq(kept.messages.len() as u64), Seq(kept.acked));
            (ConversationId(id), kept.with.clone(), first, head, acked)
        };
        let rows: Vec<_> = self.kept.range(cursor + 1..).take(limit.min(2)).map(row).collect();
        rows.iter().for_each(|(id, _, _, head, _)| self.show(id.0, head.0));
        let more = rows.last().is_some_and(|row| self.kept.range(row.0.0 + 1..).next().is_some());
        let next = rows.last().filter(|_| more).map_or(ConversationId(0), |row| row.0);
        let conversations = rows
            .iter()
            .map(|(conversation, with, first, head, acked)| message::Conversation {
                conversation: *conversation,
                with,
                first: *first,
                head: *head,
                last_time_ms: 5,
                acked: *acked,
                ..Default::default()
            })
            .collect();
        self.answer(id, &Reply::ConversationsOk { conversations, next });
    }
}

#[derive(Clone, Copy, Debug)]
enum Push {
    Deliver,
    Lag,
}

#[derive(Clone, Debug)]
enum Op {
    Send(u8),
    PeerWrites(u8, Push),
    /// The server serves so many requests.
    Serve(u8),
    /// The client reads so many frames.
    Read(u8),
    /// So many bytes of what the client wrote arrive late: all of it is lost if the connection is cut before.
    Take(u8),
    Cut,
    Connect,
    Refuse(u8),
    Wait(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..3u8).prop_map(Op::Send),
        4 => (0..3u8, prop_oneof![Just(Push::Deliver), Just(Push::Deliver), Just(Push::Lag)])
            .prop_map(|(peer, push)| Op::PeerWrites(peer, push)),
        6 => (1..6u8).prop_map(Op::Serve),
        6 => (1..6u8).prop_map(Op::Read),
        4 => (1..6u8).prop_map(Op::Take),
        1 => Just(Op::Cut),
        3 => Just(Op::Connect),
        1 => (1..4u8).prop_map(Op::Refuse),
        3 => (0..2_000u16).prop_map(Op::Wait),
    ]
}

/// The session, the model, and what the application has seen.
struct World {
    session: Session,
    model: Model,
    now: Millis,
    queued: VecDeque<Event>,
    seen: BTreeMap<u128, Vec<(u64, Bytes)>>,
    expected: BTreeMap<u64, String>,
    /// Whom each is for.
    peers: BTreeMap<u64, &'static str>,
    results: BTreeMap<u64, Accepted>,
    written: u64,
}

const PEERS: [&str; 3] = ["bob", "carl", "ann"];

impl World {
    fn new(echo: bool, window: u32) -> Self {
        Self {
            session: session(CatchUp::All),
            model: Model { echo, window, ..Model::default() },
            now: 0,
            queued: VecDeque::new(),
            seen: BTreeMap::new(),
            expected: BTreeMap::new(),
            peers: BTreeMap::new(),
            results: BTreeMap::new(),
            written: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Send(peer) => {
                self.written += 1;
                let (to, body) = (PEERS[usize::from(*peer)], format!("message {}", self.written));
                let number = self.session.send(self.now, outgoing(to, &body, SendOptions::default())).unwrap();
                assert!(self.expected.insert(number, body).is_none());
                self.peers.insert(number, to);
            }
            Op::PeerWrites(peer, push) => {
                self.written += 1;
                self.model.peer_writes(PEERS[usize::from(*peer % 2)], &format!("message {}", self.written), *push);
            }
            Op::Serve(count) => {
                for _ in 0..*count {
                    self.model.serve();
                }
            }
            Op::Read(count) => {
                for _ in 0..*count {
                    let Some(bytes) = self.model.outbox.pop_front() else { break };
                    if self.session.received(self.now, &bytes).is_err() {
                        self.cut();
                    }
                }
            }
            Op::Take(count) => self.take(usize::from(*count)),
            Op::Cut => self.cut(),
            Op::Connect => self.connect(),
            Op::Refuse(count) => self.model.refusals += u32::from(*count),
            Op::Wait(ms) => self.now += Millis::from(*ms),
        }
        self.flush();
    }

    fn connect(&mut self) {
        if !self.model.connected {
            self.model.connected = true;
            self.model.shown.clear();
            self.session.connected(self.now, Credential::Password(message::Secret("secret")));
        }
    }

    fn cut(&mut self) {
        self.model.connected = false;
        self.model.inbox.clear();
        self.model.outbox.clear();
        self.session.disconnected();
    }

    fn take(&mut self, count: usize) {
        let mut taken = Taken::default();
        for _ in 0..count {
            let Some(event) = self.queued.pop_front() else { break };
            taken.events += 1;
            if let Event::Message(message) = event {
                let seen = self.seen.entry(message.conversation.0).or_default();
                assert_eq!(message.seq.0, seen.len() as u64 + 1, "a gap or a duplicate");
                seen.push((message.client_seq, message.body));
                taken.upto.insert(message.conversation, message.seq);
            }
        }
        self.session.taken(self.now, taken);
    }

    fn flush(&mut self) {
        if self.session.advance(self.now).is_err() {
            self.cut();
        }
        let mut bytes = Vec::new();
        self.session.take_output(&mut bytes);
        self.queued.extend(self.session.take_events());
        assert!(self.queued.len() <= EVENTS_MAX);
        for done in self.session.take_done() {
            let Done::Sent(number, result) = done else { panic!("not expected: {done:?}") };
            assert!(self.results.insert(number, result.unwrap()).is_none(), "resolved twice");
        }
        let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
        while let Some(Frame { header, body, raw }) = decoder.next(&mut input, u32::MAX).unwrap() {
            assert!(self.model.connected, "written without a connection");
            if let Request::Send(send) = codec::decode_request(&header, body).unwrap() {
                let same = |number: &u64| self.peers[number] == send.to;
                let oldest = self.peers.keys().find(|number| same(number) && !self.results.contains_key(number));
                // Of what a test has sent by itself nothing is known here.
                let oldest = oldest.copied().unwrap_or(send.client_seq);
                let upto = self.peers.range(oldest..=send.client_seq).filter(|(number, _)| same(number));
                assert!(upto.count() <= self.model.window as usize, "beyond the window of its conversation");
            }
            self.model.inbox.push_back(raw.to_vec());
        }
        let sends = self.model.inbox.iter().filter(|bytes| {
            let mut decoder = FrameDecoder::new();
            let frame = decoder.next(&mut &bytes[..], u32::MAX).unwrap().unwrap();
            frame.header.command == Command::Send as u16
        });
        assert!(sends.count() <= self.model.window as usize, "more under way than the server allows");
        self.session.check_invariants();
    }

    fn settled(&self) -> bool {
        let seen = |(id, kept): (&u128, &Kept)| {
            self.seen.get(id).map_or(0, Vec::len) == kept.messages.len() && kept.acked == kept.messages.len() as u64
        };
        self.results.len() == self.expected.len() && self.model.kept.iter().all(seen)
    }

    /// With a good network everything comes to its end.
    fn settle(&mut self) {
        for _ in 0..5_000 {
            if self.settled() {
                return;
            }
            for op in [Op::Connect, Op::Serve(200), Op::Read(200), Op::Take(200), Op::Wait(100)] {
                self.apply(&op);
            }
        }
        let heads: Vec<_> = self.model.kept.values().map(|kept| (kept.messages.len(), kept.acked)).collect();
        let seen: Vec<_> = self.seen.values().map(Vec::len).collect();
        panic!("never settles: {} of {} sends; {heads:?} {seen:?}", self.results.len(), self.expected.len());
    }
}

proptest! {
    #[test]
    fn every_send_ends_once_and_every_stream_is_whole(
        ops in prop::collection::vec(op(), 0..250),
        echo in any::<bool>(),
        window in prop_oneof![Just(64u32), 1..5u32],
        without_sync in any::<bool>(),
    ) {
        let mut world = World::new(echo, window);
        world.model.without_sync = without_sync;
        for op in &ops {
            world.apply(op);
        }
        world.settle();
        let refused = ops.iter().any(|op| matches!(op, Op::Refuse(_)));
        for (number, body) in &world.expected {
            let accepted = &world.results[number];
            let kept = &world.model.kept[&accepted.conversation.0].messages[accepted.seq.0 as usize - 1];
            prop_assert_eq!(kept, &(*number, body.clone().into_bytes()), "the message is where its answer says");
        }
        for (id, kept) in &world.model.kept {
            let seen: Vec<_> = world.seen[id].iter().map(|(number, body)| (*number, body.to_vec())).collect();
            prop_assert_eq!(&seen, &kept.messages);
            let own: Vec<_> = kept.messages.iter().map(|(number, _)| *number).filter(|&number| number != 0).collect();
            prop_assert!(refused || own.is_sorted(), "in the order of the caller: {:?}", own);
        }
    }

    #[test]
    fn no_bytes_of_a_server_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), login in any::<bool>()) {
        let mut world = World::new(false, 64);
        world.apply(&Op::Connect);
        if login {
            for op in [Op::Serve(9), Op::Read(9)] {
                world.apply(&op);
            }
        }
        let _ = world.session.received(1, &bytes);
    }
}

/// A world that is logged in and has nothing left to do.
fn online() -> World {
    let mut world = World::new(false, 64);
    for op in [Op::Connect, Op::Serve(9), Op::Read(9), Op::Serve(9), Op::Read(9), Op::Take(9)] {
        world.apply(&op);
    }
    assert!(world.session.is_online() && world.model.inbox.is_empty());
    world
}

fn results(session: &mut Session) -> Vec<Result<Accepted, SendError>> {
    let sent = |done| match done {
        Done::Sent(_, result) => Some(result),
        Done::Delivered(..) | Done::Answered(..) => None,
    };
    session.take_done().into_iter().filter_map(sent).collect()
}

fn give_up_after(ms: u64) -> SendOptions {
    SendOptions { give_up_after: Some(Duration::from_millis(ms)), ..SendOptions::default() }
}

#[test]
fn a_timeout_says_what_is_known() {
    // Written, no answer: unknown.
    let mut world = online();
    world.session.send(0, outgoing("bob", "x", give_up_after(100))).unwrap();
    world.session.advance(0).unwrap();
    world.session.advance(100).unwrap();
    assert_eq!(results(&mut world.session), [Err(SendError::Unknown)]);
    // Its answer comes after all: everyone has the message, and so has this device.
    for op in [Op::Serve(9), Op::Serve(9), Op::Read(9)] {
        world.apply(&op);
    }
    let own = |event: &Event| matches!(event, Event::Message(message) if message.text() == "x");
    assert!(world.queued.iter().any(own) && results(&mut world.session).is_empty());
    // Never written: not sent.
    let mut offline = session(CatchUp::All);
    offline.send(0, outgoing("bob", "x", give_up_after(100))).unwrap();
    offline.advance(99).unwrap();
    assert!(results(&mut offline).is_empty());
    assert_eq!(offline.next_wake(99), Some(100));
    offline.advance(100).unwrap();
    assert_eq!(results(&mut offline), [Err(SendError::NotSent)]);
    // Refused until the end: refused.
    let mut world = online();
    world.model.refusals = 100;
    world.session.send(0, outgoing("bob", "x", give_up_after(100))).unwrap();
    for now in (0..=100).step_by(10) {
        world.now = now;
        world.session.advance(now).unwrap();
        let done = results(&mut world.session);
        if now == 100 {
            assert_eq!(done, [Err(SendError::Refused { code: ErrorCode::Busy, detail: String::new() })]);
            break;
        }
        for op in [Op::Serve(9), Op::Read(9)] {
            world.apply(&op);
        }
    }
    assert!(world.model.refusals < 99, "tried more than once");
}

#[test]
fn a_transient_send_is_not_repeated_once_it_was_written() {
    let mut world = online();
    world.session.send(0, outgoing("bob", "written", SendOptions::transient())).unwrap();
    world.session.advance(0).unwrap();
    world.session.disconnected();
    world.session.send(0, outgoing("bob", "queued", SendOptions::transient())).unwrap();
    assert_eq!(results(&mut world.session), [Err(SendError::Unknown)]);
    world.session.end();
    assert_eq!(results(&mut world.session), [Err(SendError::NotSent)]);
}

#[test]
fn queues_are_bounded_and_say_so() {
    let mut session = session(CatchUp::All);
    for _ in 0..1_000 {
        session.send(0, outgoing("bob", "x", SendOptions::default())).unwrap();
    }
    assert_eq!(session.send(0, outgoing("bob", "x", SendOptions::default())), Err(SendError::QueueFull));
    let mut world = online();
    let bytes = "x".repeat(4_000);
    world.session.send(0, outgoing("bob", &bytes, SendOptions::default())).unwrap();
    world.session.advance(0).unwrap();
    let expected = SendError::BodyTooLarge { bytes: 4_000, bytes_max: 4_096 - 512 };
    assert_eq!(results(&mut world.session), [Err(expected)]);
}

#[test]
fn a_receipt_resolves_before_or_after_its_acknowledgement_or_never() {
    let options = SendOptions { delivery_timeout: Some(Duration::from_secs(1)), ..SendOptions::default() };
    let receipt = |client_seq| Receipt {
        conversation: ConversationId(1),
        seq: Seq(1),
        client_seq,
        outcome: Outcome::Delivered,
        device: DeviceId(3),
    };
    let mut sends = Sends::new(1, 10);
    let (mut wire, accepted) =
        (Wire::default(), Accepted { conversation: ConversationId(1), seq: Seq(1), time_ms: 0, dup: false });
    for _ in 0..3 {
        sends.push(0, outgoing("bob", "x", options.clone())).unwrap();
    }
    sends.pump(0, &mut wire);
    sends.receipt(&receipt(1));
    sends.accepted(0, 1, accepted);
    sends.accepted(0, 2, accepted);
    sends.receipt(&receipt(2));
    sends.receipt(&receipt(2));
    sends.accepted(0, 3, accepted);
    sends.expire(100_000);
    let delivered: Vec<_> = sends
        .done
        .iter()
        .filter_map(|done| match done {
            Done::Delivered(number, result) => Some((*number, result.is_ok())),
            Done::Sent(..) | Done::Answered(..) => None,
        })
        .collect();
    assert_eq!(delivered, [(1, true), (2, true), (3, false)]);
}

#[test]
fn silence_is_answered_by_a_ping_and_then_given_up() {
    let mut world = online();
    assert_eq!(world.session.next_wake(0), Some(20_000));
    world.session.advance(20_000).unwrap();
    assert_eq!(world.session.next_wake(20_000), Some(30_000));
    world.session.advance(29_999).unwrap();
    assert_eq!(world.session.advance(30_000), Err(Cut::Lost(LinkError::NoAnswer)));
}

#[test]
fn who_waits_for_an_answer_asks_sooner_whether_anybody_is_there() {
    let mut world = online();
    world.session.advance(7_000).unwrap();
    world.session.send(7_000, outgoing("bob", "x", SendOptions::default())).unwrap();
    world.session.advance(7_000).unwrap();
    assert_eq!(world.session.next_wake(7_000), Some(12_000));
    world.session.advance(12_000).unwrap();
    assert_eq!(world.session.next_wake(12_000), Some(22_000));
    world.session.advance(21_999).unwrap();
    assert_eq!(world.session.advance(22_000), Err(Cut::Lost(LinkError::NoAnswer)));
}

#[test]
fn a_server_that_closes_after_goaway_has_sent_its_clients_on() {
    let mut world = online();
    world.session.send(0, outgoing("bob", "x", SendOptions::default())).unwrap();
    world.session.advance(0).unwrap();
    let lost = || Cut::Lost(LinkError::ServerClosed);
    assert_eq!(world.session.ended_by(lost()), lost());
    let reason = message::GoawayReason::Moved;
    let goaway = Reply::Goaway { reason, reconnect_after_ms: 300, node: "b", address: "b:1" };
    let mut bytes = Vec::new();
    Encoder::new().reply(Codec::FlatBuffers, 0, &goaway, &mut bytes);
    world.session.received(0, &bytes).unwrap();
    let sent_on = LinkError::Goaway { reconnect_after: Duration::from_millis(300), address: Some("b:1".to_owned()) };
    assert_eq!(world.session.ended_by(lost()), Cut::Lost(sent_on));
    assert_eq!(world.session.ended_by(Cut::Lost(LinkError::NoAnswer)), Cut::Lost(LinkError::NoAnswer));
}

#[test]
fn request_ids_survive_the_wrap_of_the_wire() {
    let mut wire = Wire::default();
    wire.start_at(u64::from(u32::MAX) - 1);
    for number in 0..4 {
        wire.ask(0, Waiting::Call(number), &Request::Ping { stamp: 0 });
    }
    // Two before the wrap; 0 is left out.
    assert_eq!(wire.answered(0), None);
    for (id, number) in [(2, 2), (u32::MAX, 0), (1, 1), (3, 3)] {
        assert_eq!(wire.answered(id), Some(Waiting::Call(number)), "{id}");
        assert_eq!(wire.answered(id), None);
    }
}

#[test]
fn frames_of_a_newer_server_are_passed_over_and_wrong_ones_end_the_connection() {
    let mut world = online();
    let unknown = ringline_schema::frame::Header {
        codec: Codec::FlatBuffers,
        command: 0x03ff,
        flags: Default::default(),
        request_id: 0,
        body_bytes: 0,
    };
    assert_eq!(world.session.received(0, &unknown.encode()), Ok(()));
    let mut bytes = Vec::new();
    Encoder::new().reply(Codec::FlatBuffers, 99, &Reply::LogoutOk, &mut bytes);
    assert_eq!(world.session.received(0, &bytes), Err(Cut::protocol(ErrorCode::BadRequest)));
}

#[test]
fn a_long_absence_takes_sync_and_no_fetch() {
    let mut world = online();
    world.apply(&Op::Cut);
    for number in 0..40 {
        world.model.peer_writes(PEERS[number % 2], &number.to_string(), Push::Deliver);
    }
    world.apply(&Op::Connect);
    let (mut syncs, mut fetches) = (0, 0);
    for _ in 0..200 {
        for bytes in &world.model.inbox {
            let mut decoder = FrameDecoder::new();
            let frame = decoder.next(&mut &bytes[..], u32::MAX).unwrap().unwrap();
            match codec::decode_request(&frame.header, frame.body).unwrap() {
                Request::Chat(ChatRequest::Sync(_)) => syncs += 1,
                Request::Fetch(_) | Request::Conversations { .. } => fetches += 1,
                _ => {}
            }
        }
        for op in [Op::Serve(9), Op::Read(9), Op::Take(1), Op::Wait(10)] {
            world.apply(&op);
        }
    }
    assert!(world.settled());
    assert_eq!(fetches, 0);
    assert!(syncs >= 40 / PAGE_ROWS, "{syncs}");
}

#[test]
fn what_may_not_be_read_and_what_is_not_kept_is_passed_over() {
    let mut world = online();
    let id = ConversationId::group(&name("#team"));
    let message = |seq| Message {
        conversation: id,
        seq: Seq(seq),
        time_ms: 1,
        from: name("bob"),
        to: name("#team"),
        device: DeviceId(1),
        client_seq: 1,
        class: Class::Durable,
        kind: BodyKind::Text,
        body: Bytes::new(),
        extra: None,
    };
    world.session.streams.arrived(message(1), 0);
    world.apply(&Op::Take(9));
    world.apply(&Op::Cut);
    world.apply(&Op::Connect);
    for op in [Op::Serve(1), Op::Read(1)] {
        world.apply(&op);
    }
    let skipped = |world: &mut World| match world.queued.pop_front() {
        Some(Event::Skipped { from, to, .. }) => (from.0, to.0),
        other => panic!("{other:?}"),
    };
    world.queued.clear();
    world.session.taken(0, Taken { events: 9, upto: BTreeMap::new() });
    // 2 to 4 were written while this user was no member.
    world.session.streams.synced(0, vec![message(5), message(6)], Place { conversation: id, seq: Seq(6) });
    world.flush();
    assert_eq!(skipped(&mut world), (2, 4));
    assert_eq!(world.queued.len(), 2);
    world.queued.clear();
    world.session.taken(0, Taken { events: 9, upto: BTreeMap::new() });
    world.flush();
    world.session.streams.sync_truncated(0, id, Seq(9));
    world.flush();
    assert_eq!(skipped(&mut world), (7, 8));
    world.session.streams.synced(0, vec![message(9)], Place::default());
    world.flush();
    assert!(matches!(&world.queued[0], Event::Message(message) if message.seq == Seq(9)), "{:?}", world.queued);
    assert!(matches!(world.queued[1], Event::CaughtUp { messages: 3 }), "{:?}", world.queued);
}
