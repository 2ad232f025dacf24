//! A shard of a node among others: what it tells clients of a node that is away, goes or comes back. The other node is played
//! by the test.

use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig};
use ringline_core::event::{
    Ask, ConnId, Effect, Effects, Event, NodeNews, Now, ShardMessage, Token, Verdict, WorkOutcome,
};
use ringline_core::nodes::reads::NodeRead;
use ringline_schema::codec::{Codec, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::{
    ChatRequest, Class, Credential, DeviceKind, Fetch, Login, Reply, Request, Secret, Send, SendAck, chat,
};
use ringline_schema::record::{Answer, ConversationRow};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

const HERE: NodeIndex = NodeIndex(0);
const THERE: NodeIndex = NodeIndex(1);
/// As long as another node is waited for.
const WAIT_US: u64 = 15_000_000;

/// One shard of the first of two nodes.
struct Node {
    shard: Shard,
    store: MemoryStore,
    placement: ClusterPlacement,
    now_us: u64,
    next: u32,
    /// What it said to the other node.
    said: Vec<ShardMessage>,
    /// Frames to clients.
    told: Vec<(ConnId, u32, String)>,
    /// Of the last request.
    verdict: Verdict,
}

fn name(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

impl Node {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut CoreConfig)) -> Self {
        let cores = CorePlacement::new(1).unwrap();
        let listed = [("a".to_owned(), 1), ("b".to_owned(), 1)];
        let placement = ClusterPlacement::new("a", cores, &listed).unwrap();
        let nodes = vec![("a".to_owned(), "a:1".to_owned()), ("b".to_owned(), "b:2".to_owned())];
        let mut config = CoreConfig::new(ShardIndex::new(HERE, 0), cores);
        config.cluster = Some(ClusterConfig { placement: placement.clone(), nodes });
        change(&mut config);
        let store = memory::open(1).remove(0);
        let (said, told) = (Vec::new(), Vec::new());
        let (shard, verdict) = (Shard::new(config, 1), Verdict::Continue);
        Self { shard, store, placement, now_us: 1_000_000, next: 0, said, told, verdict }
    }

    /// The first user of that node.
    fn user(&self, node: NodeIndex) -> String {
        let users = (0..).map(|number| format!("user-{number}"));
        users.into_iter().find(|user| self.placement.node_of(name(user).partition()) == node).unwrap()
    }

    /// A user of the other node whose conversation with `user` belongs to that node.
    fn partner(&self, user: &str, owner: NodeIndex) -> String {
        let users = (0..).map(|number| format!("other-{number}"));
        let fits = |other: &String| {
            let id = ConversationId::direct(&name(user), &name(other));
            let lives = self.placement.node_of(name(other).partition());
            lives == THERE && self.placement.node_of(id.partition()) == owner
        };
        users.into_iter().find(fits).unwrap()
    }

    fn event(&mut self, event: Event<'_>) {
        let mut fx = Effects::default();
        let now = Now { mono_us: self.now_us, unix_ms: 1_700_000_000_000 };
        let asked = matches!(event, Event::Request { .. });
        let verdict = self.shard.handle(event, now, &mut fx);
        self.verdict = if asked { verdict } else { self.verdict };
        self.shard.check_invariants();
        for effect in fx.list {
            match effect {
                Effect::Append(record) => drop(self.store.append(&record).unwrap()),
                Effect::Load { token, query } => self.store.load(LoadToken(token.0), query).unwrap(),
                Effect::Work { token, .. } => self.event(Event::Worked { token, outcome: WorkOutcome::Verified(true) }),
                Effect::ToShard { to, message } => {
                    assert_eq!(to.node(), THERE);
                    self.said.push(message);
                }
                Effect::Close { .. } | Effect::Released { .. } => {}
            }
        }
        for conn in fx.dirty {
            let Some(bytes) = self.shard.take_output(conn) else { continue };
            let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
            while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
                let reply = decode_reply(&frame.header, frame.body).unwrap();
                let text = match reply {
                    Reply::Failure { code, .. } => code.name().to_owned(),
                    Reply::Redirect { node, address } | Reply::RouteOk { node, address } => format!("{node} {address}"),
                    Reply::Lagged { with, from, to, .. } => format!("LAGGED {with} {from}..{to}"),
                    other => other.command().name().to_owned(),
                };
                self.told.push((conn, frame.header.request_id, text));
            }
            self.event(Event::Sent { conn, bytes: bytes.len() });
        }
        self.store.submit();
        let mut events = Vec::new();
        self.store.poll(&mut events);
        for event in events {
            self.event(match event {
                StoreEvent::Committed(upto) => Event::Stored { upto: upto.0 },
                StoreEvent::Failed => Event::StoreFailed,
                StoreEvent::Loaded(token, answer) => Event::Loaded { token: Token(token.0), answer },
            });
        }
    }

    fn news(&mut self, news: NodeNews) {
        self.event(Event::Node { node: THERE, news });
    }

    fn hear(&mut self, message: ShardMessage) {
        self.event(Event::Shard { from: ShardIndex::new(THERE, 0), message });
    }

    /// What clients were told since the last look.
    fn texts(&mut self) -> Vec<String> {
        std::mem::take(&mut self.told).into_iter().map(|(_, _, text)| text).collect()
    }

    fn said(&mut self) -> Vec<ShardMessage> {
        std::mem::take(&mut self.said)
    }

    fn ask(&mut self, conn: ConnId, request_id: u32, request: Request<'_>) -> Vec<String> {
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        self.event(Event::Request { conn, codec, flags, request_id, request });
        self.texts()
    }

    fn knock(&mut self, user: &str) -> (ConnId, Vec<String>) {
        self.knock_as(user, |conn| Event::Opened { conn })
    }

    fn knock_as(&mut self, user: &str, opened: fn(ConnId) -> Event<'static>) -> (ConnId, Vec<String>) {
        self.next += 1;
        let conn = ConnId { slot: self.next, generation: 1 };
        self.event(opened(conn));
        let (credential, device) = (Credential::Token(Secret("token")), DeviceId(1));
        let login = Login { user, credential, device, device_kind: DeviceKind::Bot, agent: "" };
        let told = self.ask(conn, 1, Request::Login(login));
        (conn, told)
    }

    fn send(&mut self, conn: ConnId, request_id: u32, to: &str) -> Vec<String> {
        let send = Send { to, class: Class::Durable, client_seq: request_id.into(), body: b"x", ..Send::default() };
        self.ask(conn, request_id, Request::Send(send))
    }

    /// Time passes, with its timers.
    fn pass(&mut self, us: u64) -> Vec<String> {
        self.now_us += us;
        self.event(Event::Timer);
        self.texts()
    }
}

const UP: NodeNews = NodeNews::Up { shards: 1 };

#[test]
fn who_lives_elsewhere_is_sent_there_if_that_node_is_up() {
    let mut node = Node::new();
    let user = node.user(THERE);
    assert_eq!(node.knock(&user).1, ["UNAVAILABLE"]);
    node.news(UP);
    let (conn, told) = node.knock(&user);
    assert_eq!(told, ["b b:2"]);
    assert_eq!(node.ask(conn, 2, Request::Route { user: &user }), ["b b:2"]);
    let own = node.user(HERE);
    assert_eq!(node.ask(conn, 3, Request::Route { user: &own }), ["ringline 127.0.0.1:9700"]);
    assert_eq!(node.knock(&own).1, ["LOGIN_OK"]);
}

#[test]
fn a_gateway_keeps_who_lives_elsewhere_and_hands_the_bytes_over() {
    let mut node = Node::with(|config| config.gateway = true);
    let user = node.user(THERE);
    assert_eq!((node.knock(&user).1, node.verdict), (vec!["UNAVAILABLE".to_owned()], Verdict::Continue));
    node.news(UP);
    assert_eq!(node.knock(&user).1, [""; 0]);
    assert_eq!(node.verdict, Verdict::HandOver(ShardIndex::new(THERE, 0)));
    assert_eq!(node.shard.connections(), 1, "the second is forgotten");
    let own = node.user(HERE);
    assert_eq!(node.knock(&own).1, ["LOGIN_OK"]);
}

#[test]
fn who_comes_by_a_gateway_is_served_as_ever_and_never_sent_elsewhere() {
    let mut node = Node::new();
    node.news(UP);
    let tunnelled = |conn| Event::Tunnelled { conn };
    let (own, other) = (node.user(HERE), node.user(THERE));
    let (conn, told) = node.knock_as(&own, tunnelled);
    assert_eq!(told, ["LOGIN_OK"]);
    assert_eq!(node.send(conn, 2, &own), ["SEND_ACK", "DELIVER"]);
    assert_eq!(node.knock_as(&other, tunnelled).1, ["UNAVAILABLE"]);
    assert_eq!(node.verdict, Verdict::Stop, "it comes again, and the gateway looks where to");
}

#[test]
fn a_send_is_unavailable_when_not_sent_unknown_when_it_was_and_a_late_answer_is_dropped() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    let bob = node.partner(&ann, THERE);
    let (conn, _) = node.knock(&ann);
    assert_eq!(node.send(conn, 2, &bob), ["UNAVAILABLE"]);
    node.news(UP);
    node.said();
    assert_eq!(node.send(conn, 3, &bob), [""; 0]);
    let Some(ShardMessage::Submit(submit)) = node.said().pop() else { panic!() };
    node.news(NodeNews::Down);
    assert_eq!(node.texts(), ["UNKNOWN"]);
    let ack = SendAck { conversation: submit.message.conversation, seq: Seq(1), time_ms: 1, dup: false };
    let late = |origin| ShardMessage::SendResult { origin, durable: true, result: Ok(ack), copy: None };
    node.news(UP);
    node.hear(late(submit.origin));
    assert_eq!(node.texts(), [""; 0], "it has been answered");
    assert_eq!(node.send(conn, 4, &bob), [""; 0]);
    let Some(ShardMessage::Submit(submit)) = node.said().pop() else { panic!() };
    node.hear(late(submit.origin));
    assert_eq!(node.texts(), ["SEND_ACK"]);
    assert_eq!(node.pass(2 * WAIT_US), [""; 0], "nothing is waited for any more");
}

#[test]
fn nobody_waits_longer_than_the_time_allowed() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    let bob = node.partner(&ann, THERE);
    node.news(UP);
    let (conn, _) = node.knock(&ann);
    node.send(conn, 2, &bob);
    let fetch = Fetch { with: &bob, after: Seq(0), before: None, limit: 9, newest: false };
    assert_eq!(node.ask(conn, 3, Request::Fetch(fetch)), [""; 0]);
    assert_eq!(node.pass(WAIT_US - 1), [""; 0]);
    assert_eq!(node.pass(1), ["UNKNOWN", "UNAVAILABLE"]);
}

#[test]
fn what_a_full_link_did_not_take_is_told_and_made_good_when_it_has_room() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    let bob = node.partner(&ann, HERE);
    node.news(UP);
    let (conn, _) = node.knock(&ann);
    node.said();
    assert_eq!(node.send(conn, 2, &bob), [""; 0]);
    let Some(ShardMessage::AskUser(ask)) = node.said().pop() else { panic!() };
    let to = ShardIndex::new(THERE, 0);
    node.event(Event::Unsent { to, message: ShardMessage::AskUser(ask.clone()) });
    assert_eq!(node.texts(), ["UNAVAILABLE"]);
    assert_eq!(node.send(conn, 3, &bob), [""; 0]);
    node.said();
    node.hear(ShardMessage::UserKnown { conversation: ask.conversation, user: ask.user, known: Ok(()) });
    assert_eq!(node.texts(), ["SEND_ACK"]);
    let Some(deliver @ ShardMessage::Deliver { .. }) = node.said().pop() else { panic!() };
    node.event(Event::Unsent { to, message: deliver });
    assert_eq!(node.said(), []);
    node.pass(500_000);
    assert_eq!(node.said(), [ShardMessage::Missed]);
    node.news(NodeNews::Down);
    assert_eq!(node.send(conn, 4, &bob), ["SEND_ACK"], "that he takes it was known");
    assert_eq!(node.said(), []);
    node.news(UP);
    assert_eq!(node.said(), [ShardMessage::Missed]);
}

#[test]
fn after_a_reset_devices_are_told_what_they_lack() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    let bob = node.partner(&ann, THERE);
    node.news(UP);
    let (_, told) = node.knock(&ann);
    assert_eq!(told, ["LOGIN_OK"]);
    node.said();
    node.news(NodeNews::Down);
    node.news(NodeNews::Reset);
    assert_eq!(node.said(), [], "it is not there");
    node.news(UP);
    let Some(ShardMessage::Flush { conn, number }) = node.said().pop() else { panic!() };
    node.hear(ShardMessage::Flushed { conn, number, done: true });
    let Some(ShardMessage::Read { number, read }) = node.said().pop() else { panic!() };
    let NodeRead::Conversations { user, .. } = *read else { panic!() };
    assert_eq!(user, name(&ann));
    let row = ConversationRow {
        conversation: ConversationId::direct(&name(&ann), &name(&bob)),
        with: name(&bob),
        first: Seq(1),
        head: Seq(4),
        last_time_ms: 1,
        acked: Seq(0),
        read: Seq(0),
        pinned: false,
        muted_until_ms: 0,
        standing: None,
        title: String::new(),
    };
    let foreign = ConversationRow { conversation: ConversationId::direct(&name(&ann), &name(&ann)), ..row.clone() };
    node.hear(ShardMessage::ReadDone { number, answer: Box::new(Answer::Conversations(vec![row, foreign])) });
    assert_eq!(node.texts(), [format!("LAGGED {bob} 1..4")], "and nothing of what that node does not own");
    assert_eq!(ErrorCode::Unavailable.retryable(), ErrorCode::Unknown.retryable());
}

#[test]
fn a_sync_whose_answer_a_full_link_lost_ends_in_time_and_may_be_asked_again() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    node.news(UP);
    let (conn, _) = node.knock(&ann);
    node.said();
    let sync = || {
        Request::Chat(ChatRequest::Sync(chat::Sync {
            places: ringline_schema::message::Places::default(),
            from: ringline_schema::message::Place::default(),
            limit: 0,
        }))
    };
    assert_eq!(node.ask(conn, 2, sync()), [""; 0]);
    let Some(ShardMessage::Flush { conn: of, number }) = node.said().pop() else { panic!() };
    assert_eq!(node.ask(conn, 3, sync()), ["BUSY"], "one at a time");
    assert_eq!(node.pass(WAIT_US - 1), [""; 0]);
    assert_eq!(node.pass(1), ["UNAVAILABLE"]);
    assert_eq!(node.ask(conn, 4, sync()), [""; 0]);
    node.hear(ShardMessage::Flushed { conn: of, number, done: true });
    assert_eq!(node.texts(), [""; 0], "that was of the first");
    let Some(ShardMessage::Flush { conn: of, number }) = node.said().pop() else { panic!() };
    node.hear(ShardMessage::Flushed { conn: of, number, done: true });
    let Some(ShardMessage::Read { number, .. }) = node.said().pop() else { panic!() };
    node.hear(ShardMessage::ReadDone { number, answer: Box::new(Answer::Conversations(Vec::new())) });
    assert_eq!(node.texts(), ["SYNC_OK"]);
    assert_eq!(node.pass(2 * WAIT_US), [""; 0]);
}

#[test]
fn a_question_about_a_user_that_is_not_served_here_is_answered_to_who_asked() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    let bob = node.partner(&ann, THERE);
    node.news(UP);
    node.said();
    let (conversation, user, from) = (ConversationId::direct(&name(&ann), &name(&bob)), name(&bob), name(&ann));
    let ask = Ask { conversation, user: user.clone(), from, exists: false, answered: false };
    node.hear(ShardMessage::AskUser(Box::new(ask)));
    let known = Err(ErrorCode::Unavailable);
    assert_eq!(node.said(), [ShardMessage::UserKnown { conversation, user, known }], "its message waits for it");
}

#[test]
fn an_answer_to_a_node_whose_link_is_not_up_yet_is_kept_for_as_long_as_anybody_waits() {
    let mut node = Node::new();
    let ann = node.user(HERE);
    let bob = node.partner(&ann, THERE);
    node.knock(&ann);
    let ask = || {
        let (conversation, user, from) = (ConversationId::direct(&name(&ann), &name(&bob)), name(&ann), name(&bob));
        ShardMessage::AskUser(Box::new(Ask { conversation, user, from, exists: false, answered: false }))
    };
    node.hear(ask());
    assert_eq!(node.said(), [], "its own link to here was up first");
    node.news(UP);
    assert!(matches!(node.said()[..], [ShardMessage::UserKnown { known: Ok(()), .. }]));
    node.news(NodeNews::Down);
    node.hear(ask());
    node.pass(WAIT_US);
    node.news(UP);
    assert_eq!(node.said(), [], "too late");
    // A full link: again in a moment.
    node.hear(ask());
    let answer = node.said().pop().unwrap();
    node.event(Event::Unsent { to: ShardIndex::new(THERE, 0), message: answer.clone() });
    assert_eq!(node.said(), []);
    node.pass(500_000);
    assert_eq!(node.said(), [answer]);
    // A new process waits for nothing.
    node.news(NodeNews::Down);
    node.hear(ask());
    node.news(NodeNews::Reset);
    node.news(UP);
    assert!(!node.said().iter().any(|message| matches!(message, ShardMessage::UserKnown { .. })));
}
