//! The rules of the chat, one by one, on a single shard with a store that commits at once.

use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{CoreConfig, DevicePolicy};
use ringline_core::event::{CloseReason, ConnId, Effect, Effects, Event, Now, Token, Verdict, Work, WorkOutcome};
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::ids::{DeviceId, Seq};
use ringline_schema::limits;
use ringline_schema::message::*;
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

/// One shard, its store, and what each connection was told.
struct Node {
    shard: Shard,
    store: MemoryStore,
    now: Now,
    next: u32,
    frames: Vec<(ConnId, Vec<u8>)>,
    closed: Vec<(ConnId, CloseReason)>,
    /// Whether clients read: otherwise output stays in the shell's hands.
    reading: bool,
    unread: Vec<(ConnId, usize)>,
    /// Whether the store commits.
    committing: bool,
}

impl Node {
    fn new(change: impl FnOnce(&mut CoreConfig)) -> Self {
        let mut config = CoreConfig::new(ShardIndex(0), CorePlacement::new(1).unwrap());
        change(&mut config);
        Self {
            shard: Shard::new(config, 1),
            store: memory::open(1).remove(0),
            now: Now { mono_us: 1_000_000, unix_ms: 1_700_000_000_000 },
            next: 0,
            frames: Vec::new(),
            closed: Vec::new(),
            reading: true,
            unread: Vec::new(),
            committing: true,
        }
    }

    fn event(&mut self, event: Event<'_>) -> Verdict {
        let mut fx = Effects::default();
        let verdict = self.shard.handle(event, self.now, &mut fx);
        self.shard.check_invariants();
        for effect in fx.list {
            match effect {
                Effect::Close { conn, reason } => self.closed.push((conn, reason)),
                Effect::Append(record) => drop(self.store.append(&record).unwrap()),
                Effect::Load { token, query } => self.store.load(LoadToken(token.0), query).unwrap(),
                Effect::Work { token, work } => self.work(token, work),
                Effect::ToShard { .. } | Effect::Released { .. } => panic!("there is only one shard"),
            }
        }
        for conn in fx.dirty {
            self.take(conn);
        }
        if self.committing {
            self.commit();
        }
        verdict
    }

    fn commit(&mut self) {
        self.store.submit();
        let mut events = Vec::new();
        self.store.poll(&mut events);
        for event in events {
            let _ = self.event(match event {
                StoreEvent::Committed(lsn) => Event::Stored { upto: lsn.0 },
                StoreEvent::Failed => Event::StoreFailed,
                StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
            });
        }
    }

    /// The hash of a password is the password itself; the token of a user is its name.
    fn work(&mut self, token: Token, work: Work) {
        let outcome = match work {
            Work::HashPassword { password } => WorkOutcome::Hashed(password),
            Work::VerifyPassword { password, hash } => WorkOutcome::Verified(hash == Some(password)),
            Work::VerifyToken { token, user } => WorkOutcome::Verified(token == user.as_str()),
        };
        let _ = self.event(Event::Worked { token, outcome });
    }

    fn take(&mut self, conn: ConnId) {
        let Some(bytes) = self.shard.take_output(conn) else { return };
        let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
        while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
            self.frames.push((conn, frame.raw.to_vec()));
        }
        if self.reading {
            let _ = self.event(Event::Sent { conn, bytes: bytes.len() });
        } else {
            self.unread.push((conn, bytes.len()));
        }
    }

    fn open(&mut self) -> ConnId {
        self.next += 1;
        let conn = ConnId { slot: self.next, generation: 1 };
        let _ = self.event(Event::Opened { conn });
        conn
    }

    fn ask(&mut self, conn: ConnId, request: Request<'_>) -> Verdict {
        self.ask_flagged(conn, Flags::default(), request)
    }

    fn ask_flagged(&mut self, conn: ConnId, flags: Flags, request: Request<'_>) -> Verdict {
        self.event(Event::Request { conn, codec: Codec::FlatBuffers, flags, request_id: 7, request })
    }

    fn login_as(&mut self, user: &str, device: u64, device_kind: DeviceKind) -> ConnId {
        let conn = self.open();
        let credential = Credential::Token(Secret(user));
        let login = Login { user, credential, device: DeviceId(device), device_kind, agent: "" };
        let _ = self.ask(conn, Request::Login(login));
        assert!(matches!(decode(&self.told(conn)[0]), Reply::LoginOk(_)));
        conn
    }

    fn login(&mut self, user: &str) -> ConnId {
        self.login_as(user, 1, DeviceKind::Other)
    }

    /// What a connection was told since the last look.
    fn told(&mut self, conn: ConnId) -> Vec<Vec<u8>> {
        let (own, others) = std::mem::take(&mut self.frames).into_iter().partition(|(to, _)| *to == conn);
        self.frames = others;
        let own: Vec<(ConnId, Vec<u8>)> = own;
        own.into_iter().map(|(_, frame)| frame).collect()
    }

    fn told_codes(&mut self, conn: ConnId) -> Vec<ErrorCode> {
        let code = |frame: &Vec<u8>| match decode(frame) {
            Reply::Failure { code, .. } => Some(code),
            _ => None,
        };
        self.told(conn).iter().filter_map(code).collect()
    }

    fn send(&mut self, conn: ConnId, to: &str, class: Class, client_seq: u64) {
        let body = b"hello";
        let send = Send {
            to,
            class,
            kind: BodyKind::Text,
            client_seq,
            ack_timeout_ms: None,
            body,
            mentions: Mentions::default(),
        };
        let _ = self.ask(conn, Request::Send(send));
    }

    fn pass(&mut self, ms: u64) {
        let end_us = self.now.mono_us + ms * 1_000;
        while self.now.mono_us < end_us {
            self.now.mono_us = (self.now.mono_us + 100_000).min(end_us);
            let _ = self.event(Event::Timer);
        }
    }
}

fn decode(frame: &[u8]) -> Reply<'_> {
    let header = ringline_schema::frame::Header::decode(frame.first_chunk().unwrap(), u32::MAX).unwrap();
    decode_reply(&header, &frame[16..]).unwrap()
}

fn is_closed(node: &Node, conn: ConnId, code: ErrorCode) -> bool {
    node.closed.contains(&(conn, CloseReason::Error(code)))
}

#[test]
fn register_then_login_by_password() {
    let mut node = Node::new(|_| ());
    let conn = node.open();
    let register = |user, password| Request::Register { user, password: Secret(password) };
    let _ = node.ask(conn, register("ann", "short"));
    assert_eq!(node.told_codes(conn), [ErrorCode::BadPassword]);
    let _ = node.ask(conn, register("ann\n", "longer-word"));
    assert_eq!(node.told_codes(conn), [ErrorCode::BadName]);
    let _ = node.ask(conn, register("ann", "longer-word"));
    assert!(matches!(decode(&node.told(conn)[0]), Reply::RegisterOk { user: "ann" }));
    let _ = node.ask(conn, register("ann", "another-word"));
    assert_eq!(node.told_codes(conn), [ErrorCode::NameTaken]);
    let login = |user, password| {
        let credential = Credential::Password(Secret(password));
        Request::Login(Login { user, credential, device: DeviceId(1), device_kind: DeviceKind::Other, agent: "" })
    };
    let _ = node.ask(conn, login("ann", "wrong-word"));
    let _ = node.ask(conn, login("nobody", "wrong-word"));
    assert_eq!(node.told_codes(conn), [ErrorCode::AuthFailed; 2]);
    let _ = node.ask(conn, login("ann", "longer-word"));
    assert!(matches!(decode(&node.told(conn)[0]), Reply::LoginOk(ok) if ok.user == "ann"));
    let _ = node.ask(conn, login("ann", "longer-word"));
    assert_eq!(node.told_codes(conn), [ErrorCode::AlreadyLoggedIn]);
}

#[test]
fn the_fifth_failed_login_ends_the_connection() {
    let mut node = Node::new(|_| ());
    let conn = node.open();
    let credential = Credential::Token(Secret("somebody else"));
    let (device, device_kind) = (DeviceId(1), DeviceKind::Other);
    let login = Request::Login(Login { user: "ann", credential, device, device_kind, agent: "" });
    for _ in 0..5 {
        let _ = node.ask(conn, login);
    }
    let codes = node.told_codes(conn);
    assert_eq!(codes[..4], [ErrorCode::AuthFailed; 4]);
    assert_eq!(codes[4], ErrorCode::TooManyLogins);
    assert!(is_closed(&node, conn, ErrorCode::TooManyLogins));
    assert_eq!(node.ask(conn, login), Verdict::Stop);
}

#[test]
fn a_token_creates_its_user_only_when_that_is_allowed() {
    let mut node = Node::new(|config| config.token_creates_user = false);
    let conn = node.open();
    let credential = Credential::Token(Secret("ann"));
    let (device, device_kind) = (DeviceId(1), DeviceKind::Other);
    let _ = node.ask(conn, Request::Login(Login { user: "ann", credential, device, device_kind, agent: "" }));
    assert_eq!(node.told_codes(conn), [ErrorCode::AuthFailed]);
}

#[test]
fn before_login_only_four_commands_are_served() {
    let mut node = Node::new(|_| ());
    let conn = node.open();
    let _ = node.ask(conn, Request::Ping { stamp: 3 });
    let _ = node.ask(conn, Request::Route { user: "" });
    let told = node.told(conn);
    assert!(matches!(decode(&told[0]), Reply::Pong { stamp: 3, .. }));
    assert!(matches!(decode(&told[1]), Reply::RouteOk { address: "127.0.0.1:9700", .. }));
    assert_eq!(node.ask(conn, Request::Online { cursor: "", limit: 0 }), Verdict::Stop);
    assert!(is_closed(&node, conn, ErrorCode::NotLoggedIn));
}

#[test]
fn silence_ends_a_connection_before_and_after_login() {
    let mut node = Node::new(|_| ());
    let (fresh, ann) = (node.open(), node.login("ann"));
    node.pass(9_900);
    assert!(node.closed.is_empty());
    node.pass(200);
    assert!(is_closed(&node, fresh, ErrorCode::LoginTimeout));
    node.pass(40_000);
    let _ = node.ask(ann, Request::Ping { stamp: 1 });
    node.pass(59_000);
    assert_eq!(node.closed.len(), 1, "a ping counts as life");
    node.pass(1_200);
    assert!(is_closed(&node, ann, ErrorCode::IdleTimeout));
}

#[test]
fn a_message_to_oneself_comes_back_and_is_in_the_history() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 1);
    node.send(ann, "ann", Class::Transient, 2);
    let told = node.told(ann);
    assert!(matches!(decode(&told[0]), Reply::SendAck(ack) if ack.seq == Seq(1) && !ack.dup));
    assert!(matches!(decode(&told[1]), Reply::Deliver(message) if message.seq == Seq(1) && message.body == b"hello"));
    assert!(matches!(decode(&told[2]), Reply::Deliver(message) if message.class == Class::Transient));
    assert!(matches!(decode(&told[3]), Reply::SendAck(ack) if ack.seq == Seq(0)));
    let fetch = Fetch { with: "ann", after: Seq(0), before: None, limit: 0, newest: false };
    let _ = node.ask(ann, Request::Fetch(fetch));
    let told = node.told(ann);
    assert!(matches!(decode(&told[0]), Reply::FetchOk { messages, head: Seq(1), .. } if messages.len() == 1));
}

#[test]
fn the_sender_is_the_session_and_other_devices_of_both_sides_get_the_message() {
    let mut node = Node::new(|_| ());
    let (ann, ann2) = (node.login_as("ann", 1, DeviceKind::Phone), node.login_as("ann", 2, DeviceKind::Desktop));
    let (bob, bob2) = (node.login_as("bob", 1, DeviceKind::Phone), node.login_as("bob", 2, DeviceKind::Web));
    node.send(ann, "bob", Class::Durable, 1);
    for conn in [ann2, bob, bob2] {
        let told = node.told(conn);
        assert_eq!(told.len(), 1);
        assert!(matches!(decode(&told[0]), Reply::Deliver(message) if message.from == "ann" && message.to == "bob"));
    }
    assert!(matches!(decode(&node.told(ann)[0]), Reply::SendAck(_)));
}

#[test]
fn absent_targets_have_named_answers() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ghost", Class::Transient, 1);
    node.send(ann, "ghost", Class::Durable, 2);
    node.send(ann, " ", Class::Durable, 3);
    node.send(ann, "ghost", Class::Durable, 0);
    let codes = [ErrorCode::NotOnline, ErrorCode::NoSuchUser, ErrorCode::BadName, ErrorCode::BadRequest];
    assert_eq!(node.told_codes(ann), codes);
    let body = vec![0; limits::FRAME_BYTES_MAX as usize];
    let (class, kind) = (Class::Durable, BodyKind::Text);
    let send = Send {
        to: "ann",
        class,
        kind,
        client_seq: 4,
        ack_timeout_ms: None,
        body: &body,
        mentions: Mentions::default(),
    };
    let _ = node.ask(ann, Request::Send(send));
    assert_eq!(node.told_codes(ann), [ErrorCode::BodyTooLarge]);
}

#[test]
fn a_transient_send_without_reply_is_silent_unless_it_fails() {
    let mut node = Node::new(|_| ());
    let (ann, bob) = (node.login("ann"), node.login("bob"));
    let send = |to, class| {
        let (kind, client_seq) = (BodyKind::Text, 1);
        Request::Send(Send {
            to,
            class,
            kind,
            client_seq,
            ack_timeout_ms: None,
            body: b"x",
            mentions: Mentions::default(),
        })
    };
    let _ = node.ask_flagged(ann, Flags::NO_REPLY, send("bob", Class::Transient));
    assert!(node.told(ann).is_empty());
    assert_eq!(node.told(bob).len(), 1);
    let _ = node.ask_flagged(ann, Flags::NO_REPLY, send("ghost", Class::Transient));
    let _ = node.ask_flagged(ann, Flags::NO_REPLY, send("bob", Class::Durable));
    let _ = node.ask_flagged(ann, Flags::NO_REPLY, Request::Ping { stamp: 1 });
    assert_eq!(node.told_codes(ann), [ErrorCode::NotOnline, ErrorCode::BadRequest, ErrorCode::BadRequest]);
}

#[test]
fn a_repeat_gets_its_old_seq_and_another_body_is_a_conflict() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 5);
    node.told(ann);
    node.send(ann, "ann", Class::Durable, 5);
    let told = node.told(ann);
    assert_eq!(told.len(), 1, "a repeat is not delivered again");
    assert!(matches!(decode(&told[0]), Reply::SendAck(ack) if ack.seq == Seq(1) && ack.dup));
    let (class, kind) = (Class::Durable, BodyKind::Text);
    let send = Send {
        to: "ann",
        class,
        kind,
        client_seq: 5,
        ack_timeout_ms: None,
        body: b"other",
        mentions: Mentions::default(),
    };
    let _ = node.ask(ann, Request::Send(send));
    assert_eq!(node.told_codes(ann), [ErrorCode::Conflict]);
}

#[test]
fn a_conversation_that_began_here_asks_for_no_filter_until_it_let_one_go() {
    let mut node = Node::new(|_| ());
    let seq_of = |node: &mut Node, device: u64, client_seq| {
        let (conn, before) = (node.login_as("ann", device, DeviceKind::Other), node.shard.counters().loads);
        node.send(conn, "ann", Class::Durable, client_seq);
        let loads = node.shard.counters().loads - before;
        let acks = node.told(conn);
        let acks: Vec<_> = acks.iter().map(|frame| decode(frame)).collect();
        let ack = acks.iter().find_map(|reply| if let Reply::SendAck(ack) = reply { Some(*ack) } else { None });
        let _ = node.ask(conn, Request::Logout);
        ack.map(|ack| (ack.seq, ack.dup, loads)).unwrap()
    };
    assert_eq!(seq_of(&mut node, 1, 5), (Seq(1), false, 1), "whether there is such a conversation");
    for device in 2..=64 {
        assert_eq!(seq_of(&mut node, device, 5), (Seq(device), false, 0), "its first message came from here");
    }
    // One more, and those on disk are let go: who is not known may have sent.
    assert_eq!(seq_of(&mut node, 65, 5), (Seq(65), false, 0));
    assert_eq!(seq_of(&mut node, 1, 5), (Seq(1), true, 1), "a repeat is known from the store");
    assert_eq!(seq_of(&mut node, 66, 5), (Seq(66), false, 1));
    node.shard = Shard::new(CoreConfig::new(ShardIndex(0), CorePlacement::new(1).unwrap()), 2);
    node.store = node.store.reopen(1).remove(0);
    assert_eq!(seq_of(&mut node, 2, 5), (Seq(2), true, 1), "and after a restart");
}

#[test]
fn a_store_that_is_away_refuses_what_is_durable_and_nothing_else_until_it_is_back() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 1);
    node.told(ann);
    let _ = node.event(Event::StoreAway { away: true });
    node.send(ann, "ann", Class::Durable, 2);
    assert_eq!(node.told_codes(ann), [ErrorCode::Unavailable]);
    assert!(ErrorCode::Unavailable.retryable());
    node.send(ann, "ann", Class::Transient, 3);
    assert!(!node.told(ann).is_empty(), "it is delivered");
    let _ = node.event(Event::StoreAway { away: false });
    node.send(ann, "ann", Class::Durable, 2);
    let told = node.told(ann);
    assert!(told.iter().any(|told| matches!(decode(told), Reply::SendAck(ack) if ack.seq == Seq(2) && !ack.dup)));
}

#[test]
fn a_full_disk_refuses_what_is_durable_and_nothing_else_until_there_is_room() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 1);
    node.told(ann);
    let _ = node.event(Event::DiskSpace { full: true });
    node.send(ann, "ann", Class::Durable, 2);
    assert_eq!(node.told_codes(ann), [ErrorCode::DiskFull]);
    assert!(ErrorCode::DiskFull.retryable());
    node.send(ann, "ann", Class::Transient, 3);
    assert!(!node.told(ann).is_empty(), "it is delivered");
    let _ = node.event(Event::DiskSpace { full: false });
    node.send(ann, "ann", Class::Durable, 4);
    let told = node.told(ann);
    assert!(told.iter().any(|told| matches!(decode(told), Reply::SendAck(ack) if ack.seq == Seq(2))));
}

#[test]
fn nothing_is_acknowledged_before_the_commit_and_a_failed_store_says_so() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 1);
    node.told(ann);
    node.committing = false;
    node.send(ann, "ann", Class::Durable, 2);
    node.send(ann, "ann", Class::Durable, 2);
    assert!(node.told(ann).is_empty());
    assert!(!node.shard.is_quiet());
    node.commit();
    let told = node.told(ann);
    assert_eq!(told.len(), 3, "one acknowledgement, its delivery, one repeat");
    node.send(ann, "ann", Class::Durable, 3);
    let _ = node.event(Event::StoreFailed);
    node.send(ann, "ann", Class::Durable, 4);
    assert_eq!(node.told_codes(ann), [ErrorCode::StoreFailed; 2]);
}

#[test]
fn more_sends_in_flight_than_the_window_are_busy() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 1);
    node.told(ann);
    node.committing = false;
    for number in 2..2 + u64::from(limits::SENDS_IN_FLIGHT_MAX) {
        node.send(ann, "ann", Class::Durable, number);
    }
    assert!(node.told(ann).is_empty());
    node.send(ann, "ann", Class::Durable, 1_000);
    let told = node.told(ann);
    let told = decode(&told[0]);
    assert!(matches!(told, Reply::Failure { code: ErrorCode::Busy, retry_after_ms, .. } if retry_after_ms > 0));
}

#[test]
fn a_rate_above_the_limit_is_told_when_to_come_back() {
    let mut node = Node::new(|config| (config.requests_per_s, config.requests_burst) = (10, 5));
    let ann = node.login("ann");
    for stamp in 0..4 {
        let _ = node.ask(ann, Request::Ping { stamp });
    }
    assert!(node.told_codes(ann).is_empty());
    let _ = node.ask(ann, Request::Ping { stamp: 9 });
    let told = node.told(ann);
    let limited =
        Reply::Failure { code: ErrorCode::RateLimited, retry_after_ms: 100, detail: ErrorCode::RateLimited.text() };
    assert_eq!(decode(&told[0]), limited);
    node.pass(100);
    let _ = node.ask(ann, Request::Ping { stamp: 9 });
    assert!(node.told_codes(ann).is_empty());
}

#[test]
fn device_policies_kick_the_older_device() {
    let kicked = |policy, second: (u64, DeviceKind)| {
        let mut node = Node::new(|config| (config.device_policy, config.devices_max) = (policy, 2));
        let first = node.login_as("ann", 1, DeviceKind::Phone);
        node.login_as("ann", second.0, second.1);
        let told = node.told(first);
        let kicked = told.first().map(|frame| match decode(frame) {
            Reply::Kicked { reason, .. } => reason,
            other => panic!("{other:?}"),
        });
        assert_eq!(node.closed.contains(&(first, CloseReason::Kicked)), kicked.is_some());
        kicked
    };
    assert_eq!(kicked(DevicePolicy::Many, (2, DeviceKind::Phone)), None);
    assert_eq!(kicked(DevicePolicy::Many, (1, DeviceKind::Phone)), Some(KickReason::Replaced));
    assert_eq!(kicked(DevicePolicy::OnePerKind, (2, DeviceKind::Phone)), Some(KickReason::DevicePolicy));
    assert_eq!(kicked(DevicePolicy::OnePerKind, (2, DeviceKind::Web)), None);
    assert_eq!(kicked(DevicePolicy::One, (2, DeviceKind::Web)), Some(KickReason::DevicePolicy));
    let mut node = Node::new(|config| config.devices_max = 2);
    let conns: Vec<_> = (1..=3).map(|device| node.login_as("ann", device, DeviceKind::Other)).collect();
    assert_eq!(node.closed, [(conns[0], CloseReason::Kicked)], "the oldest of too many");
}

#[test]
fn a_delivery_acknowledgement_tells_of_the_first_ack_or_of_the_timeout() {
    let mut node = Node::new(|_| ());
    let (ann, bob) = (node.login("ann"), node.login("bob"));
    let send = |class, client_seq| {
        let (kind, ack_timeout_ms) = (BodyKind::Text, Some(1_000));
        Request::Send(Send {
            to: "bob",
            class,
            kind,
            client_seq,
            ack_timeout_ms,
            body: b"x",
            mentions: Mentions::default(),
        })
    };
    for (class, client_seq) in [(Class::Durable, 1), (Class::Transient, 2), (Class::Durable, 3), (Class::Transient, 4)]
    {
        let _ = node.ask(ann, send(class, client_seq));
    }
    let told = node.told(bob);
    let delivered: Vec<_> = told.iter().map(|frame| decode(frame)).collect();
    let [Reply::Deliver(first), Reply::Deliver(second), Reply::Deliver(third), _] = delivered[..] else { panic!() };
    assert!(second.delivery != 0 && first.delivery == 0 && third.seq == Seq(2));
    node.told(ann);
    let _ = node.ask(bob, Request::Ack(Ack::Upto { conversation: first.conversation, seq: first.seq }));
    let _ = node.ask(bob, Request::Ack(Ack::Delivery(second.delivery)));
    let outcomes = |node: &mut Node| -> Vec<(u64, Outcome)> {
        let told = node.told(ann);
        let outcome = |frame: &Vec<u8>| match decode(frame) {
            Reply::Receipt(receipt) => Some((receipt.client_seq, receipt.outcome)),
            // How far the receiver has the conversation comes unasked.
            Reply::Chat(ChatReply::ReceiptUpto { .. }) => None,
            other => panic!("{other:?}"),
        };
        told.iter().filter_map(outcome).collect()
    };
    assert_eq!(outcomes(&mut node), [(1, Outcome::Delivered), (2, Outcome::Delivered)]);
    node.pass(1_100);
    assert_eq!(outcomes(&mut node), [(3, Outcome::DeliveryTimeout), (4, Outcome::DeliveryTimeout)]);
}

#[test]
fn a_device_can_only_acknowledge_what_it_was_given() {
    let mut node = Node::new(|_| ());
    let (ann, bob, eve) = (node.login("ann"), node.login("bob"), node.login("eve"));
    node.send(ann, "bob", Class::Durable, 1);
    let told = node.told(bob);
    let Reply::Deliver(message) = decode(&told[0]) else { panic!() };
    let ack = |seq| Request::Ack(Ack::Upto { conversation: message.conversation, seq: Seq(seq) });
    let _ = node.ask(eve, ack(1));
    assert_eq!(node.told_codes(eve), [ErrorCode::NoSuchConversation]);
    let _ = node.ask(bob, ack(2));
    assert_eq!(node.told_codes(bob), [ErrorCode::BadRequest]);
    let _ = node.ask(bob, ack(1));
    node.pass(1_100);
    let cursor = ringline_schema::ids::ConversationId(0);
    let _ = node.event(Event::Closed { conn: bob });
    let bob = node.login("bob");
    let _ = node.ask(bob, Request::Conversations { cursor, limit: 10 });
    let told = node.told(bob);
    let Reply::ConversationsOk { conversations, .. } = decode(&told[0]) else { panic!() };
    assert_eq!((conversations[0].with, conversations[0].head, conversations[0].acked), ("ann", Seq(1), Seq(1)));
}

/// A client says an ACK again that died with a connection or a node, when the list shows its conversation behind.
#[test]
fn what_the_list_shows_can_be_acknowledged() {
    let mut node = Node::new(|_| ());
    let (ann, bob) = (node.login("ann"), node.login("bob"));
    node.send(ann, "bob", Class::Durable, 1);
    let told = node.told(bob);
    let Reply::Deliver(message) = decode(&told[0]) else { panic!() };
    let _ = node.event(Event::Closed { conn: bob });
    let bob = node.login("bob");
    let cursor = ringline_schema::ids::ConversationId(0);
    let _ = node.ask(bob, Request::Conversations { cursor, limit: 10 });
    node.told(bob);
    let ack = |seq| Request::Ack(Ack::Upto { conversation: message.conversation, seq: Seq(seq) });
    let _ = node.ask(bob, ack(2));
    assert_eq!(node.told_codes(bob), [ErrorCode::BadRequest], "above the head");
    let _ = node.ask(bob, ack(1));
    assert_eq!(node.told_codes(bob), []);
    let _ = node.ask(bob, Request::Conversations { cursor, limit: 10 });
    let told = node.told(bob);
    let Reply::ConversationsOk { conversations, .. } = decode(&told[0]) else { panic!() };
    assert_eq!(conversations[0].acked, Seq(1));
}

#[test]
fn a_slow_reader_lags_then_fetches_and_in_the_end_is_closed() {
    let mut node = Node::new(|config| config.outbox_bytes_max = 8 * 1024);
    let (ann, bob) = (node.login("ann"), node.login("bob"));
    node.reading = false;
    for number in 1..200 {
        node.send(ann, "bob", Class::Durable, number);
        node.told(ann);
        let unread = std::mem::take(&mut node.unread);
        for (conn, bytes) in unread {
            match conn == ann {
                true => drop(node.event(Event::Sent { conn, bytes })),
                false => node.unread.push((conn, bytes)),
            }
        }
    }
    let told = node.told(bob).len() as u64;
    assert!(told < 199, "deliveries stopped at the bound: {told}");
    node.send(ann, "bob", Class::Transient, 1_000);
    assert_eq!(node.told_codes(ann), [ErrorCode::Busy], "a transient message that nobody can take is refused");
    node.reading = true;
    for (conn, bytes) in std::mem::take(&mut node.unread) {
        let _ = node.event(Event::Sent { conn, bytes });
    }
    let frames = node.told(bob);
    assert_eq!(frames.len(), 1);
    let Reply::Lagged { with: "ann", from, to, .. } = decode(&frames[0]) else { panic!() };
    assert_eq!((from, to), (Seq(told + 1), Seq(199)));
    node.reading = false;
    node.send(ann, "bob", Class::Durable, 2_000);
    for _ in 0..4 {
        node.pass(10_000);
        let _ = node.ask(bob, Request::Ping { stamp: 1 });
    }
    node.pass(30_000);
    assert!(is_closed(&node, bob, ErrorCode::SlowReader), "{:?}", node.closed);
}

#[test]
fn the_online_list_is_paged_and_follows_logins() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    let bob = node.login("bob");
    node.login_as("cid", 1, DeviceKind::Phone);
    node.login_as("cid", 2, DeviceKind::Phone);
    let page = |node: &mut Node, cursor: &str| {
        let _ = node.ask(ann, Request::Online { cursor, limit: 2 });
        let told = node.told(ann);
        let Reply::OnlineOk { users, next } = decode(&told[0]) else { panic!() };
        (users.iter().map(|row| format!("{}:{}", row.user, row.devices)).collect::<Vec<_>>(), next.to_owned())
    };
    let (users, next) = page(&mut node, "");
    assert_eq!(users, ["ann:1", "bob:1"]);
    let (users, next) = page(&mut node, &next);
    assert_eq!((users, next), (vec!["cid:2".to_owned()], String::new()));
    let _ = node.ask(bob, Request::Logout);
    assert!(matches!(decode(&node.told(bob)[0]), Reply::LogoutOk));
    assert!(node.closed.contains(&(bob, CloseReason::Logout)));
    assert_eq!(page(&mut node, "").0, ["ann:1", "cid:2"]);
    let _ = node.ask(ann, Request::Online { cursor: "9/x", limit: 2 });
    assert_eq!(node.told_codes(ann), [ErrorCode::BadRequest]);
}

#[test]
fn a_draining_node_says_goaway_and_answers_what_is_in_flight() {
    let mut node = Node::new(|_| ());
    let ann = node.login("ann");
    node.send(ann, "ann", Class::Durable, 1);
    node.told(ann);
    node.committing = false;
    node.send(ann, "ann", Class::Durable, 2);
    let _ = node.event(Event::Drain);
    node.send(ann, "ann", Class::Durable, 3);
    let told = node.told(ann);
    assert!(matches!(decode(&told[0]), Reply::Goaway { .. }));
    assert!(matches!(decode(&told[1]), Reply::Failure { code: ErrorCode::ShuttingDown, .. }));
    assert!(!node.shard.is_quiet());
    node.committing = true;
    node.commit();
    assert!(matches!(decode(&node.told(ann)[0]), Reply::SendAck(ack) if ack.seq == Seq(2)));
    assert!(node.shard.is_quiet());
    let late = node.open();
    assert!(node.closed.contains(&(late, CloseReason::Draining)));
}

#[test]
fn one_connection_too_many_is_told_so() {
    let mut node = Node::new(|config| config.connections_max = 2);
    node.open();
    node.open();
    let third = node.open();
    assert_eq!(node.told_codes(third), [ErrorCode::TooManyConnections]);
    assert!(is_closed(&node, third, ErrorCode::TooManyConnections));
}
