//! The straight way of a message and the long way, side by side: whatever clients do, both do the same.

mod rig;

use proptest::prelude::*;
use proptest::sample::Index;
use rig::{At, Rig};
use ringline_core::Shard;
use ringline_core::counters::Counters;
use ringline_core::event::{CloseReason, Event, Verdict};
use ringline_schema::codec::{Codec, Encoder, decode_request};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::limits;
use ringline_schema::message::*;

/// Users who log in: names that lie in place, that do not, and that are not ASCII. Some are of another shard.
const USERS: [&str; 5] = ["ann", "bob", "eve-with-a-name-of-some-length", "zoë", "dan"];
/// Names beside them that messages go to.
const OTHERS: [&str; 6] =
    ["ghost", " x", "", "#team", "a\u{7}b", "12345678901234567890123456789012345678901234567890123456789012345"];

#[derive(Clone, Debug)]
struct Message {
    to: &'static str,
    class: Class,
    kind: BodyKind,
    client_seq: u64,
    ack_timeout_ms: Option<u32>,
    flags: Flags,
    body: Vec<u8>,
    /// A byte of its frame's body that is something else.
    damage: Option<(Index, u8)>,
}

#[derive(Clone, Debug)]
enum Step {
    Send(Index, Message),
    /// The same so many times, as somebody does who writes too fast or to one who does not read.
    Burst(Index, Message, u64),
    Login(Index, u64),
    Leave(Index),
    Block(Index, Index),
    Unblock(Index, Index),
    /// From everybody, or only from those one has written to.
    Privacy(Index, bool),
    Status(Index, bool),
    Pass(u64),
    /// Whether clients read.
    Reading(bool),
    Drain,
}

fn message() -> impl Strategy<Value = Message> {
    let class = prop_oneof![4 => Just(Class::Transient), 1 => Just(Class::Durable)];
    let kind = prop_oneof![6 => 0u8..8, 1 => 8u8..10].prop_map(|number| BodyKind::from_number(number).unwrap());
    let ack_timeout_ms = prop_oneof![5 => Just(None), 1 => (1u32..500).prop_map(Some)];
    let flags = any::<bool>().prop_map(|no_reply| if no_reply { Flags::NO_REPLY } else { Flags::default() });
    let bytes = prop_oneof![4 => 0usize..40, 1 => 900usize..1_300];
    let damage = prop_oneof![5 => Just(None), 1 => (any::<Index>(), any::<u8>()).prop_map(Some)];
    let to = prop::sample::select([&USERS[..], &USERS[..], &OTHERS[..]].concat());
    (to, class, kind, 0u64..30, ack_timeout_ms, flags, bytes, damage).prop_map(
        |(to, class, kind, client_seq, ack_timeout_ms, flags, bytes, damage)| Message {
            to,
            class,
            kind,
            client_seq,
            ack_timeout_ms,
            flags,
            body: vec![b'x'; bytes],
            damage,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let (who, whom) = (any::<Index>, any::<Index>);
    prop_oneof![
        40 => (who(), message()).prop_map(|(who, message)| Step::Send(who, message)),
        4 => (who(), message(), 10u64..60).prop_map(|(who, message, times)| Step::Burst(who, message, times)),
        4 => (who(), 1u64..3).prop_map(|(user, device)| Step::Login(user, device)),
        2 => who().prop_map(Step::Leave),
        1 => (who(), whom()).prop_map(|(who, whom)| Step::Block(who, whom)),
        1 => (who(), whom()).prop_map(|(who, whom)| Step::Unblock(who, whom)),
        1 => (who(), any::<bool>()).prop_map(|(who, all)| Step::Privacy(who, all)),
        1 => (who(), any::<bool>()).prop_map(|(who, set)| Step::Status(who, set)),
        4 => (1u64..1_500).prop_map(Step::Pass),
        2 => any::<bool>().prop_map(Step::Reading),
        1 => prop_oneof![15 => Just(Step::Pass(1)), 1 => Just(Step::Drain)],
    ]
}

/// A node whose clients' SENDs go the one way or the other.
struct Side {
    rig: Rig,
    straight: bool,
    seats: Vec<At>,
    draining: bool,
}

impl Side {
    /// `idle_ms`: how long a client may be silent.
    fn new(shards: u16, straight: bool, idle_ms: u64) -> Self {
        let rig = Rig::new(shards, |config| {
            (config.requests_per_s, config.requests_burst) = (40, 30);
            (config.outbox_bytes_max, config.frame_bytes_max) = (4 * 1024, 1_600);
            (config.idle_timeout_ms, config.write_stall_ms) = (idle_ms, idle_ms / 2);
        });
        let mut side = Self { rig, straight, seats: Vec::new(), draining: false };
        side.seats = USERS.map(|user| side.rig.login(user, 1)).to_vec();
        side
    }

    /// What a step gives: the verdict of a SEND.
    fn step(&mut self, step: &Step) -> Option<Verdict> {
        match step {
            Step::Send(who, message) => return Some(self.send(self.seat(who), message)),
            Step::Burst(who, message, times) => {
                for number in 0..*times {
                    let client_seq = message.client_seq + number;
                    let _ = self.send(self.seat(who), &Message { client_seq, ..message.clone() });
                }
            }
            Step::Login(..) if self.draining => {}
            Step::Login(user, device) => {
                let seat = self.rig.login(USERS[user.index(USERS.len())], *device);
                self.seats.push(seat);
            }
            // It stays in its seat, for what is said after its end.
            Step::Leave(who) => self.rig.leave(self.seat(who)),
            Step::Block(who, whom) => {
                self.chat(self.seat(who), ChatRequest::Block { user: USERS[whom.index(USERS.len())] })
            }
            Step::Unblock(who, whom) => {
                self.chat(self.seat(who), ChatRequest::Unblock { user: USERS[whom.index(USERS.len())] })
            }
            Step::Privacy(who, all) => {
                let messages_from = if *all { chat::MessagesFrom::Anyone } else { chat::MessagesFrom::Known };
                self.chat(self.seat(who), ChatRequest::Privacy { messages_from: Some(messages_from) });
            }
            Step::Status(who, set) => {
                let status = Some(if *set { "away" } else { "" });
                self.chat(self.seat(who), ChatRequest::PresenceSet { status, visible: None });
            }
            Step::Pass(ms) => self.rig.pass(*ms),
            Step::Reading(reading) => self.rig.reading = *reading,
            Step::Drain => {
                self.draining = true;
                for at in 0..self.rig.shards.len() {
                    let _ = self.rig.event(at, Event::Drain);
                }
            }
        }
        None
    }

    fn seat(&self, who: &Index) -> At {
        self.seats[who.index(self.seats.len())]
    }

    fn chat(&mut self, at: At, request: ChatRequest<'_>) {
        let (codec, flags, request) = (Codec::FlatBuffers, Flags::default(), Request::Chat(request));
        let _ = self.rig.event(at.0, Event::Request { conn: at.1, codec, flags, request_id: 3, request });
    }

    fn send(&mut self, at: At, message: &Message) -> Verdict {
        let send = Send {
            to: message.to,
            class: message.class,
            kind: message.kind,
            client_seq: message.client_seq,
            ack_timeout_ms: message.ack_timeout_ms,
            body: &message.body,
            mentions: Mentions::default(),
        };
        let mut bytes = Vec::new();
        let head = (Codec::FlatBuffers, message.flags);
        Encoder::new().request_flagged(head, 9, &Request::Send(send), &mut bytes);
        if let Some((place, value)) = &message.damage {
            let place = 16 + place.index(bytes.len() - 16);
            bytes[place] = *value;
        }
        let (mut decoder, conn) = (FrameDecoder::new(), at.1);
        let frame = decoder.next(&mut &bytes[..], 1 << 20).unwrap().unwrap();
        let (codec, flags, request_id) = (frame.header.codec, frame.header.flags, frame.header.request_id);
        let event = match decode_request(&frame.header, frame.body) {
            _ if self.straight => Event::of_frame(conn, &frame),
            Ok(request) => Event::Request { conn, codec, flags, request_id, request },
            Err(code) => Event::Refused { conn, codec, request_id, code },
        };
        self.rig.event(at.0, event)
    }

    /// What both ways count.
    fn counts(&self) -> Vec<(&'static str, u64)> {
        let of_shard = |(shard, _): &(Shard, _)| {
            let counters = shard.counters();
            let names = Counters::TEXTS.iter().map(|(name, _)| *name);
            let counts = names.zip(counters.values()).filter(|(name, _)| *name != "sends_straight");
            counts.chain(counters.failures()).collect::<Vec<_>>()
        };
        self.rig.shards.iter().flat_map(of_shard).collect()
    }

    fn straight(&self) -> u64 {
        self.rig.shards.iter().map(|(shard, _)| shard.counters().sends_straight).sum()
    }
}

/// Whether this message goes straight; a moment later, so that no rate is too high.
fn goes(side: &mut Side, from: usize, message: &Message) -> bool {
    side.rig.pass(100);
    let before = side.straight();
    let _ = side.send(side.seats[from], message);
    side.straight() > before
}

/// Each thing that makes a message take the long way, alone.
#[test]
fn what_needs_a_second_look_does_not_go_straight() {
    let side = &mut Side::new(1, true, 60_000);
    let (class, kind, flags) = (Class::Transient, BodyKind::Text, Flags::default());
    let body = b"hello".to_vec();
    let plain = Message { to: "bob", class, kind, client_seq: 1, ack_timeout_ms: None, flags, body, damage: None };
    assert!(goes(side, 0, &plain) && goes(side, 2, &Message { flags: Flags::NO_REPLY, ..plain.clone() }));
    let exceptions = [
        Message { class: Class::Durable, ..plain.clone() },
        Message { kind: BodyKind::System, ..plain.clone() },
        Message { client_seq: 0, ..plain.clone() },
        Message { ack_timeout_ms: Some(100), ..plain.clone() },
        Message { body: vec![0; 1_600 - limits::MESSAGE_OVERHEAD_BYTES_MAX as usize + 1], ..plain.clone() },
        Message { to: "ann", ..plain.clone() },
        Message { to: "ghost", ..plain.clone() },
        Message { to: "#team", ..plain.clone() },
    ];
    for message in exceptions {
        assert!(!goes(side, 0, &message), "{message:?}");
    }
    // The receiver: two devices, something set, no room.
    let second = side.rig.login("bob", 2);
    assert!(!goes(side, 0, &plain));
    side.rig.leave(second);
    assert!(goes(side, 0, &plain));
    let (bob, status) = (side.seats[1], |status| ChatRequest::PresenceSet { status: Some(status), visible: None });
    side.chat(bob, status("away"));
    assert!(!goes(side, 0, &plain));
    side.chat(bob, status(""));
    assert!(goes(side, 0, &plain));
    side.rig.reading = false;
    let went = (0..100).filter(|_| goes(side, 0, &plain)).count();
    assert!(went > 10 && went < 90, "4 KiB of output hold {went}");
    side.rig.reading = true;
    // The sender: too fast, gone.
    side.rig.pass(1_000);
    let before = side.straight();
    for _ in 0..40 {
        let _ = side.send(side.seats[2], &Message { to: "dan", ..plain.clone() });
    }
    assert_eq!(side.straight() - before, 30, "what the rate allows at once");
    side.rig.leave(side.seats[2]);
    assert!(!goes(side, 2, &Message { to: "dan", ..plain.clone() }));
    let dan = Message { to: "dan", ..plain.clone() };
    assert!(goes(side, 3, &dan));
    let _ = side.step(&Step::Drain);
    assert!(!goes(side, 3, &dan));
    // Another shard.
    let side = &mut Side::new(2, true, 60_000);
    let there = (1..USERS.len()).find(|&user| side.seats[user].0 != side.seats[0].0).unwrap();
    assert!(!goes(side, 0, &Message { to: USERS[there], ..plain }));
}

/// Who does not read its answers is closed by the next one, after its message was given.
#[test]
fn a_sender_that_does_not_read_is_closed_all_the_same() {
    for straight in [true, false] {
        let side = &mut Side::new(1, straight, 60_000);
        let (ann, bob) = (side.seats[0], side.seats[1]);
        side.rig.reading = false;
        let mut waiting = 0;
        while waiting <= 2 * 4_096 {
            side.rig.pass(100);
            waiting += side.rig.ask(ann, Request::Ping { stamp: 1 }).iter().map(Vec::len).sum::<usize>();
        }
        let (class, kind, flags) = (Class::Transient, BodyKind::Text, Flags::NO_REPLY);
        let body = b"hello".to_vec();
        let plain = Message { to: "bob", class, kind, client_seq: 1, ack_timeout_ms: None, flags, body, damage: None };
        assert_eq!(side.send(ann, &plain), Verdict::Continue, "there is no answer");
        assert_eq!((side.rig.told(bob).len(), side.rig.closed.len()), (1, 0));
        assert_eq!(side.send(ann, &Message { flags: Flags::default(), ..plain }), Verdict::Stop);
        assert_eq!(side.rig.told(bob).len(), 1);
        assert_eq!(side.rig.closed, [(ann, CloseReason::Error(ErrorCode::SlowReader))]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn both_ways_do_the_same(steps in prop::collection::vec(step(), 1..120)) {
        let (mut straight, mut long) = (Side::new(2, true, 3_000), Side::new(2, false, 3_000));
        for (number, step) in steps.iter().enumerate() {
            prop_assert_eq!(straight.step(step), long.step(step), "step {}: {:?}", number, step);
            prop_assert_eq!(&straight.seats, &long.seats);
            for &seat in &long.seats {
                prop_assert_eq!(straight.rig.told(seat), long.rig.told(seat), "step {}: {:?}", number, step);
            }
            prop_assert_eq!(&straight.rig.closed, &long.rig.closed);
        }
        prop_assert_eq!(straight.counts(), long.counts());
    }
}
