//! One sample of each command and each record, and more of those that are built in several ways: the corpus that fuzzing
//! begins with.
//!
//! `WRITE_CORPUS=1 cargo test -p ringline-schema --test corpus` writes them to `fuzz/corpus`; without it the test compares.

use std::collections::BTreeMap;

use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::disk::{self, BurstWriter, RecordType};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::limits::{self, FRAME_HEADER_BYTES};
use ringline_schema::message::chat::*;
use ringline_schema::message::group::*;
use ringline_schema::message::*;
use ringline_schema::record::{Change, Record, StoredChange, StoredExtra, StoredMessage, User};
use ringline_schema::rows::*;

/// File name and bytes.
pub type Sample = (String, Vec<u8>);

const TALK: ConversationId = ConversationId(0x1234_5678_9abc_def0_1122_3344_5566_7788);
const USERS: &[&str] = &["ann", "bob"];
const PLACE: message_place::Place = message_place::Place { conversation: TALK, seq: Seq(3) };

mod message_place {
    pub use ringline_schema::message::Place;
}

fn names() -> Names<'static> {
    USERS.into()
}

fn command(number: u16, name: &str, frame: &[u8]) -> Sample {
    (name.to_lowercase(), [&number.to_le_bytes(), &frame[FRAME_HEADER_BYTES..]].concat())
}

pub fn requests() -> Vec<Sample> {
    let mut all = vec![
        Request::Register { user: "ann", password: Secret("correct horse") },
        Request::Login(Login {
            user: "ann",
            credential: Credential::Token(Secret("a.b.c")),
            device: DeviceId(7),
            device_kind: DeviceKind::Phone,
            agent: "sample",
        }),
        Request::Logout,
        Request::Ping { stamp: 9 },
        Request::Route { user: "ann" },
        Request::Send(Send {
            to: "#team",
            class: Class::Durable,
            kind: BodyKind::Link,
            client_seq: 11,
            ack_timeout_ms: Some(500),
            body: b"hello",
            mentions: Mentions { users: names(), all: true },
        }),
        Request::Ack(Ack::Upto { conversation: TALK, seq: Seq(5) }),
        Request::Fetch(Fetch { with: "bob", after: Seq(1), before: Some(Seq(9)), limit: 20, newest: true }),
        Request::Online { cursor: "0/ann", limit: 10 },
        Request::Conversations { cursor: TALK, limit: 10 },
    ];
    all.extend(chat_requests().into_iter().map(Request::Chat));
    all.extend(acts().into_iter().map(|act| Request::Group { group: "#team", act }));
    all.iter().map(request).collect()
}

fn request(request: &Request<'_>) -> Sample {
    let mut bytes = Vec::new();
    Encoder::new().request(Codec::FlatBuffers, 1, request, &mut bytes);
    command(request.command() as u16, request.command().name(), &bytes)
}

/// The others of a command that is built in several ways, numbered from 2.
fn others(samples: impl Iterator<Item = Sample>) -> Vec<Sample> {
    let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
    let number = |(name, bytes): Sample| {
        let number = numbers.entry(name.clone()).or_insert(1);
        *number += 1;
        (format!("{name}_{number}"), bytes)
    };
    samples.map(number).collect()
}

/// Requests without what may be left out, with what stands in its place, and as short and as long as they come.
pub fn more_requests() -> Vec<Sample> {
    let (nobody, empty) = (Names::default(), Mentions::default());
    let long = "n".repeat(limits::USER_NAME_BYTES_MAX);
    let credential = Credential::Password(Secret("correct horse"));
    let send = Send {
        to: "bob",
        class: Class::Transient,
        kind: BodyKind::Text,
        client_seq: 1,
        ack_timeout_ms: None,
        body: b"",
        mentions: empty,
    };
    let amend =
        Amend { with: "bob", seq: Seq(4), action: AmendAction::Edit, kind: BodyKind::Text, client_seq: 0, body: b"" };
    let mut all = vec![
        Request::Login(Login {
            user: &long,
            credential,
            device: DeviceId(0),
            device_kind: DeviceKind::Other,
            agent: "",
        }),
        Request::Send(send),
        Request::Send(Send { class: Class::Durable, kind: BodyKind::Custom, body: &[0xff; 300], ..send }),
        Request::Send(Send { client_seq: u64::MAX, ack_timeout_ms: Some(u32::MAX), to: &long, ..send }),
        Request::Ack(Ack::Delivery(7)),
        Request::Fetch(Fetch { with: "#team", after: Seq(0), before: None, limit: 0, newest: false }),
        Request::Online { cursor: "", limit: 0 },
    ];
    all.extend(
        [
            ChatRequest::Sync(Sync { places: [][..].into(), from: message_place::Place::default(), limit: 0 }),
            ChatRequest::Mark(Mark { conversation: TALK, pinned: None, muted_until_ms: None }),
            ChatRequest::Watch { users: nobody },
            ChatRequest::PresenceSet { status: None, visible: None },
            ChatRequest::Privacy { messages_from: None },
            ChatRequest::DeleteUser { user: "eve", proof: None, recall: false },
            ChatRequest::DeleteUser { user: "eve", proof: Some(Credential::Token(Secret("a.b.c"))), recall: false },
            ChatRequest::Amend(Amend { action: AmendAction::Recall, ..amend }),
            ChatRequest::Amend(Amend { action: AmendAction::DeleteForAll, ..amend }),
            ChatRequest::Amend(Amend { action: AmendAction::DeleteForMe, ..amend }),
        ]
        .map(Request::Chat),
    );
    let act = |act| Request::Group { group: "#t", act };
    all.push(act(GroupAct::Create { title: "t", join: JoinPolicy::Open, users: nobody }));
    all.push(act(GroupAct::Members { cursor: "", limit: 0, standing: Standing::Member }));
    others(all.iter().map(request))
}

fn chat_requests() -> Vec<ChatRequest<'static>> {
    const PLACES: &[message_place::Place] = &[PLACE];
    vec![
        ChatRequest::Read { conversation: TALK, seq: Seq(4) },
        ChatRequest::Sync(Sync { places: PLACES.into(), from: PLACE, limit: 100 }),
        ChatRequest::Mark(Mark { conversation: TALK, pinned: Some(true), muted_until_ms: Some(5) }),
        ChatRequest::Devices,
        ChatRequest::DropDevice { device: DeviceId(3) },
        ChatRequest::Receipts { conversation: TALK, seq: Seq(4), cursor: "ann", limit: 5 },
        ChatRequest::Broadcast { kind: BodyKind::Text, device_kinds: 3, body: b"all" },
        ChatRequest::Signal { to: "bob", kind: SIGNAL_TYPING, body: b"" },
        ChatRequest::Watch { users: names() },
        ChatRequest::Unwatch { users: names() },
        ChatRequest::PresenceSet { status: Some("away"), visible: Some(false) },
        ChatRequest::Amend(Amend {
            with: "bob",
            seq: Seq(4),
            action: AmendAction::Edit,
            kind: BodyKind::Text,
            client_seq: 12,
            body: b"hullo",
        }),
        ChatRequest::Block { user: "eve" },
        ChatRequest::Unblock { user: "eve" },
        ChatRequest::Blocks { cursor: "eve", limit: 5 },
        ChatRequest::Privacy { messages_from: Some(MessagesFrom::Known) },
        ChatRequest::Export { cursor: "x" },
        ChatRequest::DeleteUser { user: "eve", proof: Some(Credential::Password(Secret("pw"))), recall: true },
    ]
}

fn acts() -> Vec<GroupAct<'static>> {
    vec![
        GroupAct::Create { title: "The team", join: JoinPolicy::Approval, users: names() },
        GroupAct::Rename { title: "They" },
        GroupAct::Policy { join: JoinPolicy::Open },
        GroupAct::Join { greeting: "hi" },
        GroupAct::Invite { users: names() },
        GroupAct::Answer { user: "bob", approve: true },
        GroupAct::Leave,
        GroupAct::Kick { user: "bob" },
        GroupAct::Mute { user: "bob", for_ms: 1_000 },
        GroupAct::Role { user: "bob", role: Role::Admin },
        GroupAct::Transfer { user: "bob" },
        GroupAct::Dissolve,
        GroupAct::Members { cursor: "ann", limit: 5, standing: Standing::Asked },
        GroupAct::Info,
    ]
}

fn message() -> Message<'static> {
    Message {
        conversation: TALK,
        seq: Seq(4),
        time_ms: 1_700_000_000_000,
        from: "ann",
        to: "#team",
        device: DeviceId(7),
        client_seq: 11,
        class: Class::Durable,
        kind: BodyKind::Amendment,
        delivery: 0,
        body: b"hello",
        extra: Extra {
            mentions: Mentions { users: names(), all: true },
            refers: Seq(2),
            state: MessageState::Edited,
            amended_ms: 5,
            change: Some(change()),
        },
    }
}

fn change() -> GroupChange<'static> {
    GroupChange { what: What::Joined, users: names(), text: "hi", number: 2 }
}

pub fn replies() -> Vec<Sample> {
    let mut all = vec![
        Reply::Failure { code: ErrorCode::Busy, retry_after_ms: 50, detail: "later" },
        Reply::RegisterOk { user: "ann" },
        Reply::LoginOk(LoginOk {
            user: "ann",
            session: 1,
            server_time_ms: 2,
            ping_interval_ms: 3,
            idle_timeout_ms: 4,
            frame_bytes_max: 5,
            sends_in_flight_max: 6,
        }),
        Reply::LogoutOk,
        Reply::Pong { stamp: 9, server_time_ms: 8 },
        Reply::RouteOk { node: "n1", address: "127.0.0.1:9700" },
        Reply::Redirect { node: "n2", address: "127.0.0.1:9701" },
        Reply::SendAck(SendAck { conversation: TALK, seq: Seq(4), time_ms: 1, dup: true }),
        Reply::FetchOk { conversation: TALK, first: Seq(1), head: Seq(4), messages: vec![message()] },
        Reply::OnlineOk { users: vec![OnlineUser { user: "ann", devices: 2 }], next: "0/ann" },
        Reply::ConversationsOk {
            conversations: vec![Conversation { with: "bob", last: Some(message()), ..Default::default() }],
            next: TALK,
        },
        Reply::Deliver(message()),
        Reply::Receipt(Receipt {
            conversation: TALK,
            seq: Seq(4),
            client_seq: 11,
            outcome: Outcome::Delivered,
            device: DeviceId(3),
        }),
        Reply::Lagged { conversation: TALK, with: "bob", from: Seq(2), to: Seq(4) },
        Reply::Kicked { reason: KickReason::LoggedOut, detail: "bye" },
        Reply::Goaway {
            reason: GoawayReason::ShuttingDown,
            reconnect_after_ms: 10,
            node: "b",
            address: "10.0.0.2:9700",
        },
    ];
    all.extend(chat_replies().into_iter().map(Reply::Chat));
    all.extend(group_replies().into_iter().map(Reply::Group));
    all.iter().map(reply).collect()
}

fn reply(reply: &Reply<'_>) -> Sample {
    let mut bytes = Vec::new();
    Encoder::new().reply(Codec::FlatBuffers, 1, reply, &mut bytes);
    command(reply.command() as u16, reply.command().name(), &bytes)
}

/// Answers and pushes with nothing in them, with several of a kind, and messages of each form.
pub fn more_replies() -> Vec<Sample> {
    let plain = Message { to: "bob", kind: BodyKind::Text, extra: Extra::default(), ..message() };
    let transient =
        Message { conversation: ConversationId(0), seq: Seq(0), class: Class::Transient, delivery: 9, ..plain };
    let states = [MessageState::Recalled, MessageState::Deleted, MessageState::Hidden];
    let gone = states.map(|state| Message { body: b"", extra: Extra { state, ..Extra::default() }, ..plain });
    let several = [&[plain, transient, message()][..], &gone].concat();
    let mut all: Vec<Reply<'_>> = vec![
        Reply::Deliver(plain),
        Reply::Deliver(transient),
        Reply::Deliver(Message { kind: BodyKind::System, body: b"", ..message() }),
        Reply::FetchOk { conversation: TALK, first: Seq(0), head: Seq(0), messages: Vec::new() },
        Reply::FetchOk { conversation: TALK, first: Seq(1), head: Seq(9), messages: several.clone() },
        Reply::OnlineOk { users: Vec::new(), next: "" },
        Reply::ConversationsOk {
            conversations: vec![Conversation { with: "#team", last: None, ..Default::default() }; 3],
            next: ConversationId(0),
        },
        Reply::Failure { code: ErrorCode::Internal, retry_after_ms: 0, detail: "" },
        Reply::Receipt(Receipt {
            conversation: ConversationId(0),
            seq: Seq(0),
            client_seq: 1,
            outcome: Outcome::DeliveryTimeout,
            device: DeviceId(0),
        }),
    ];
    all.extend(
        [
            ChatReply::SyncOk { messages: several, next: message_place::Place::default() },
            ChatReply::DevicesOk { devices: Vec::new() },
            ChatReply::ReceiptUpto { conversation: TALK, with: "#team", user: "", delivered: Seq(4), read: Seq(0) },
            ChatReply::PresenceOk { users: Vec::new() },
        ]
        .map(Reply::Chat),
    );
    all.push(Reply::Group(GroupReply::Ok { conversation: TALK, seq: Seq(0), standing: None }));
    others(all.iter().map(reply))
}

fn chat_replies() -> Vec<ChatReply<'static>> {
    let presence = || vec![PresenceRow { user: "ann", online: true, last_seen_ms: 5, status: "here" }];
    let device =
        Device { device: DeviceId(7), kind: DeviceKind::Web, agent: "sample", first_ms: 1, last_ms: 2, online: true };
    let row = MemberReceipt { user: "bob", delivered: Seq(4), read: Seq(3) };
    vec![
        ChatReply::Done,
        ChatReply::Truncated { conversation: TALK, first: Seq(9) },
        ChatReply::SyncOk { messages: vec![message()], next: PLACE },
        ChatReply::DevicesOk { devices: vec![device] },
        ChatReply::ReceiptsOk { members: 3, delivered: 2, read: 1, rows: vec![row], next: "bob" },
        ChatReply::BroadcastOk { devices: 3 },
        ChatReply::PresenceOk { users: presence() },
        ChatReply::BlocksOk { users: vec!["eve"], next: "eve", messages_from: MessagesFrom::Nobody },
        ChatReply::ExportOk { body: b"{}\n", next: "x" },
        ChatReply::ReceiptUpto { conversation: TALK, with: "bob", user: "bob", delivered: Seq(4), read: Seq(3) },
        ChatReply::Signalled { conversation: TALK, from: "bob", to: "ann", kind: 20, body: b"s" },
        ChatReply::PresenceChanged { users: presence() },
        ChatReply::Notice { from: "ann", time_ms: 1, kind: BodyKind::Text, body: b"n" },
        ChatReply::Hidden { conversation: TALK, seq: Seq(4) },
    ]
}

fn group_replies() -> Vec<GroupReply<'static>> {
    let (group, title, standing) = ("#team", "The team", Some(Standing::Member));
    vec![
        GroupReply::Ok { conversation: TALK, seq: Seq(4), standing },
        GroupReply::Info(GroupInfo {
            conversation: TALK,
            group,
            title,
            join: JoinPolicy::Open,
            owner: "ann",
            members: 3,
            created_ms: 1,
            dissolved: true,
            standing,
            role: Role::Admin,
            muted_until_ms: 9,
        }),
        GroupReply::Members {
            members: vec![Member {
                user: "ann",
                role: Role::Owner,
                standing: Standing::Member,
                joined_ms: 1,
                muted_until_ms: 2,
            }],
            next: "ann",
        },
        GroupReply::Changed { conversation: TALK, group, title, by: "ann", time_ms: 1, change: change() },
    ]
}

/// Streams of frames, each behind a byte that says into what pieces it is cut.
pub fn frames() -> Vec<Sample> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new();
    for request in [Request::Ping { stamp: 1 }, Request::Logout, Request::Route { user: "ann" }] {
        encoder.request(Codec::FlatBuffers, 3, &request, &mut bytes);
    }
    encoder.reply(Codec::FlatBuffers, 0, &Reply::Deliver(message()), &mut bytes);
    let cut = bytes.get(..bytes.len() - 5).unwrap_or_default();
    let sample = |name: &str, piece: u8, bytes: &[u8]| (name.to_owned(), [&[piece], bytes].concat());
    vec![sample("four", 7, &bytes), sample("cut", 1, cut), sample("no_frame", 3, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")]
}

fn user(text: &str) -> UserName {
    UserName::new(text).expect("a name")
}

fn value(key: &RowKey) -> RowValue {
    match key {
        RowKey::Group(_) => RowValue::Group(GroupRow {
            name: user("#team"),
            title: "The team".to_owned(),
            join: JoinPolicy::Approval,
            owner: user("ann"),
            created_ms: 1,
            dissolved: Seq(9),
        }),
        RowKey::Member(..) => {
            let past = Membership { join: Seq(1), leave: Some(Seq(3)) };
            let ranges = vec![past, Membership { join: Seq(5), leave: None }];
            let (standing, role) = (Standing::Member, Role::Admin);
            RowValue::Member(MemberRow { standing, role, since_ms: 1, muted_until_ms: 2, ranges })
        }
        RowKey::Receipt(..) => RowValue::Receipt(ReceiptRow { delivered: Seq(4), read: Seq(3) }),
        RowKey::Wrote(..) => RowValue::Wrote,
        RowKey::Amended(..) => {
            RowValue::Amended(AmendedRow { state: MessageState::Edited, by: Seq(6), at_ms: 1_700_000_000_000 })
        }
        RowKey::Device(..) => {
            let (kind, agent) = (DeviceKind::Web, "sample".to_owned());
            RowValue::Device(DeviceRow { kind, agent, first_ms: 1, last_ms: 2 })
        }
        RowKey::Setting(_) => RowValue::Setting(SettingRow {
            messages_from: MessagesFrom::Known,
            visible: false,
            status: "away".to_owned(),
            last_seen_ms: 3,
            deleted_ms: 4,
            hides: true,
        }),
        RowKey::Block(..) => RowValue::Block,
        RowKey::Mark(..) => RowValue::Mark(MarkRow { pinned: true, muted_until_ms: 5 }),
        RowKey::Hidden(..) => RowValue::Hidden,
        RowKey::Deletion(_) => {
            RowValue::Deletion(DeletionRow { stage: DeletionStage::Sweeping, recall: true, done: TALK })
        }
    }
}

/// The name of a kind of row; a kind that is added has to be given one here, and a sample below.
fn kind(key: &RowKey) -> &'static str {
    match key {
        RowKey::Group(_) => "row_group",
        RowKey::Member(..) => "row_member",
        RowKey::Receipt(..) => "row_receipt",
        RowKey::Wrote(..) => "row_wrote",
        RowKey::Amended(..) => "row_amended",
        RowKey::Device(..) => "row_device",
        RowKey::Setting(_) => "row_setting",
        RowKey::Block(..) => "row_block",
        RowKey::Mark(..) => "row_mark",
        RowKey::Hidden(..) => "row_hidden",
        RowKey::Deletion(_) => "row_deletion",
    }
}

/// Of each kind of row a record that writes one, and one that takes all of them away.
fn all_rows() -> Vec<(&'static str, Record)> {
    let (ann, eve) = (user("ann"), user("eve"));
    let keys = vec![
        RowKey::Group(TALK),
        RowKey::Member(TALK, ann.clone()),
        RowKey::Receipt(TALK, ann.clone()),
        RowKey::Wrote(TALK, ann.clone()),
        RowKey::Amended(TALK, Seq(4)),
        RowKey::Device(ann.clone(), DeviceId(7)),
        RowKey::Setting(ann.clone()),
        RowKey::Block(ann.clone(), eve),
        RowKey::Mark(ann.clone(), TALK),
        RowKey::Hidden(ann.clone(), TALK, Seq(4)),
        RowKey::Deletion(ann),
    ];
    let change = |rows| Record::Change(Box::new(Change { message: None, rows }));
    let one = |key: &RowKey| (kind(key), change(vec![Row { key: key.clone(), stamp: 7, value: Some(value(key)) }]));
    let mut all: Vec<_> = keys.iter().map(one).collect();
    all.push(("rows_gone", change(keys.into_iter().map(|key| Row { key, stamp: u64::MAX, value: None }).collect())));
    all
}

pub fn records() -> Vec<Sample> {
    let (ann, team) = (user("ann"), user("#team"));
    let change = StoredChange { what: What::Joined, users: vec![ann.clone()], text: "hi".to_owned(), number: 1 };
    let extra = StoredExtra { change: Some(change), refers: Seq(2), ..StoredExtra::default() };
    let message = |extra| StoredMessage {
        conversation: TALK,
        seq: Seq(4),
        from: ann.clone(),
        to: team.clone(),
        device: DeviceId(7),
        client_seq: 11,
        time_ms: 1_700_000_000_000,
        kind: BodyKind::Text,
        body: b"hello"[..].into(),
        extra,
    };
    let receipt = RowValue::Receipt(ReceiptRow { delivered: Seq(4), read: Seq(3) });
    let rows = vec![
        Row { key: RowKey::Receipt(TALK, ann.clone()), stamp: 7, value: Some(receipt) },
        Row { key: RowKey::Block(ann.clone(), user("eve")), stamp: 1, value: Some(RowValue::Block) },
        Row { key: RowKey::Device(ann.clone(), DeviceId(7)), stamp: 2, value: None },
    ];
    let hash = Some("$argon2id$v=19$x".to_owned());
    let users = vec![ann.clone(), user("bob")];
    let mentions = StoredExtra { mentions: users, mention_all: true, ..StoredExtra::default() };
    let (refers, state) = (Seq(2), MessageState::Recalled);
    let amends = StoredExtra { refers, state, ..StoredExtra::default() };
    let of_extra = |extra| Record::Message(message(Some(Box::new(extra))).into());
    let mut all = vec![
        ("message_mentions", of_extra(mentions)),
        ("message_amends", of_extra(amends)),
        ("user_by_token", Record::User(User { name: user("eve"), password_hash: None, created_ms: 1 })),
        ("message", Record::Message(message(None).into())),
        ("user", Record::User(User { name: ann.clone(), password_hash: hash, created_ms: 1 })),
        (
            "conversation",
            Record::Conversation { conversation: TALK, members: [ann.clone(), user("bob")], created_ms: 1 },
        ),
        ("cursor", Record::Cursor { user: ann.clone(), device: DeviceId(7), conversation: TALK, seq: Seq(4) }),
        ("change", Record::Change(Box::new(Change { message: Some(message(Some(Box::new(extra))).into()), rows }))),
    ];
    all.extend(all_rows());
    let encode = |(name, record): &(&str, Record)| {
        let mut bytes = Default::default();
        let record_type = disk::encode(record, &mut bytes).expect("a sample");
        ((*name).to_owned(), [&[record_type as u8], &bytes[..]].concat())
    };
    all.iter().map(encode).chain([("burst".to_owned(), burst(&message(None)))]).collect()
}

/// Three messages in a row.
fn burst(first: &StoredMessage) -> Vec<u8> {
    let mut bytes = Default::default();
    let mut writer = BurstWriter::begin(first, &mut bytes).expect("a sample");
    for (at, body) in [(1, &b"and"[..]), (2, b"again")] {
        let (seq, client_seq) = (Seq(first.seq.0 + at), first.client_seq + at);
        let next = StoredMessage { seq, client_seq, time_ms: first.time_ms + at, body: body.into(), ..first.clone() };
        assert!(writer.add(&next, &mut bytes));
    }
    assert!(writer.end(&mut bytes));
    [&[RecordType::Burst as u8], &bytes[..]].concat()
}
