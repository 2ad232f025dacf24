//! Every command goes out and comes back the same; no bytes are anything but a value or an error.

use super::*;
use crate::frame::{Flags, FrameDecoder, Header};
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::message::chat::*;
use crate::message::group::*;
use crate::message::*;
use proptest::prelude::*;

const ID: ConversationId = ConversationId(0x0123_4567_89ab_cdef_1122_3344_5566_7788);

fn requests() -> Vec<Request<'static>> {
    let login = |credential| {
        let (device, device_kind) = (DeviceId(77), DeviceKind::Phone);
        Request::Login(Login { user: "ann", credential, device, device_kind, agent: "test/1" })
    };
    let send = |class, ack_timeout_ms: Option<u32>| {
        let body = b"hello \0 there";
        let mentions = Mentions { users: Names::from(&["ann", "bob"][..]), all: ack_timeout_ms.is_some() };
        Request::Send(Send {
            to: "bob",
            class,
            kind: BodyKind::Link,
            client_seq: u64::MAX,
            ack_timeout_ms,
            body,
            mentions,
        })
    };
    let fetch = |before| Request::Fetch(Fetch { with: "bob", after: Seq(3), before, limit: 40, newest: true });
    let mut all = vec![
        Request::Register { user: "Jürgen", password: Secret("s3cret-word") },
        login(Credential::Password(Secret("pw"))),
        login(Credential::Token(Secret("a.b.c"))),
        Request::Logout,
        Request::Ping { stamp: 5 },
        Request::Route { user: "bob" },
        send(Class::Durable, None),
        send(Class::Transient, Some(1_000)),
        Request::Ack(Ack::Upto { conversation: ID, seq: Seq(9) }),
        Request::Ack(Ack::Delivery(12)),
        fetch(None),
        fetch(Some(Seq(10))),
        Request::Online { cursor: "m", limit: 10 },
        Request::Conversations { cursor: ID, limit: 0 },
    ];
    all.extend(group_acts().map(|act| Request::Group { group: "#team", act }));
    all.extend(chat_requests().map(Request::Chat));
    all
}

fn group_acts() -> impl Iterator<Item = GroupAct<'static>> {
    let users = Names::from(&["bob", "cid"][..]);
    [
        GroupAct::Create { title: "The team", join: JoinPolicy::Approval, users },
        GroupAct::Rename { title: "A team" },
        GroupAct::Policy { join: JoinPolicy::Open },
        GroupAct::Join { greeting: "let me in" },
        GroupAct::Invite { users },
        GroupAct::Answer { user: "bob", approve: true },
        GroupAct::Leave,
        GroupAct::Kick { user: "bob" },
        GroupAct::Mute { user: "bob", for_ms: u64::MAX },
        GroupAct::Role { user: "bob", role: Role::Admin },
        GroupAct::Transfer { user: "bob" },
        GroupAct::Dissolve,
        GroupAct::Members { cursor: "a", limit: 9, standing: Standing::Invited },
        GroupAct::Info,
    ]
    .into_iter()
}

fn chat_requests() -> impl Iterator<Item = ChatRequest<'static>> {
    const PLACES: &[Place] = &[Place { conversation: ID, seq: Seq(4) }];
    let (from, places) = (Place { conversation: ID, seq: Seq(2) }, Places::from(PLACES));
    let users = Names::from(&["bob"][..]);
    let (action, kind) = (AmendAction::Edit, BodyKind::Emoji);
    [
        ChatRequest::Read { conversation: ID, seq: Seq(3) },
        ChatRequest::Sync(Sync { places, from, limit: 7 }),
        ChatRequest::Mark(Mark { conversation: ID, pinned: Some(false), muted_until_ms: None }),
        ChatRequest::Mark(Mark { conversation: ID, pinned: None, muted_until_ms: Some(9) }),
        ChatRequest::Devices,
        ChatRequest::DropDevice { device: DeviceId(4) },
        ChatRequest::Receipts { conversation: ID, seq: Seq(3), cursor: "a", limit: 5 },
        ChatRequest::Broadcast { kind, device_kinds: 6, body: b"all" },
        ChatRequest::Signal { to: "#team", kind: SIGNAL_TYPING, body: b"" },
        ChatRequest::Watch { users },
        ChatRequest::Unwatch { users },
        ChatRequest::PresenceSet { status: Some("away"), visible: Some(false) },
        ChatRequest::PresenceSet { status: None, visible: None },
        ChatRequest::Amend(Amend { with: "bob", seq: Seq(2), action, kind, client_seq: 8, body: b"new" }),
        ChatRequest::Block { user: "bob" },
        ChatRequest::Unblock { user: "bob" },
        ChatRequest::Blocks { cursor: "", limit: 0 },
        ChatRequest::Privacy { messages_from: Some(MessagesFrom::Nobody) },
        ChatRequest::Privacy { messages_from: None },
        ChatRequest::Export { cursor: "x" },
        ChatRequest::DeleteUser { user: "ann", proof: None, recall: false },
        ChatRequest::DeleteUser { user: "ann", proof: Some(Credential::Password(Secret("pw"))), recall: true },
        ChatRequest::DeleteUser { user: "ann", proof: Some(Credential::Token(Secret("a.b.c"))), recall: false },
    ]
    .into_iter()
}

fn change() -> GroupChange<'static> {
    GroupChange { what: What::Muted, users: Names::from(&["bob"][..]), text: "why", number: 3 }
}

fn group_replies() -> impl Iterator<Item = GroupReply<'static>> {
    let info = GroupInfo {
        conversation: ID,
        group: "#team",
        title: "The team",
        join: JoinPolicy::Open,
        owner: "ann",
        members: 10_000,
        created_ms: 5,
        dissolved: true,
        standing: None,
        role: Role::Owner,
        muted_until_ms: 6,
    };
    let (role, standing) = (Role::Admin, Standing::Member);
    let member = Member { user: "bob", role, standing, joined_ms: 1, muted_until_ms: 2 };
    let (group, title, by) = ("#team", "The team", "ann");
    [
        GroupReply::Ok { conversation: ID, seq: Seq(4), standing: Some(Standing::Asked) },
        GroupReply::Info(info),
        GroupReply::Members { members: vec![member, member], next: "bob" },
        GroupReply::Changed { conversation: ID, group, title, by, time_ms: 9, change: change() },
    ]
    .into_iter()
}

fn chat_replies() -> impl Iterator<Item = ChatReply<'static>> {
    let kind = DeviceKind::Web;
    let device = Device { device: DeviceId(3), kind, agent: "x", first_ms: 1, last_ms: 2, online: true };
    let row = PresenceRow { user: "bob", online: true, last_seen_ms: 4, status: "here" };
    let receipt = MemberReceipt { user: "bob", delivered: Seq(4), read: Seq(2) };
    let (user, with) = ("bob", "#team");
    [
        ChatReply::Done,
        ChatReply::Truncated { conversation: ID, first: Seq(9) },
        ChatReply::SyncOk { messages: vec![message(b"a")], next: Place { conversation: ID, seq: Seq(4) } },
        ChatReply::DevicesOk { devices: vec![device] },
        ChatReply::ReceiptsOk { members: 3, delivered: 2, read: 1, rows: vec![receipt], next: "" },
        ChatReply::BroadcastOk { devices: 12 },
        ChatReply::PresenceOk { users: vec![row] },
        ChatReply::BlocksOk { users: vec!["bob"], next: "bob", messages_from: MessagesFrom::Known },
        ChatReply::ExportOk { body: b"{}", next: "1" },
        ChatReply::ReceiptUpto { conversation: ID, with, user, delivered: Seq(5), read: Seq(3) },
        ChatReply::Signalled { conversation: ID, from: "ann", to: "#team", kind: 17, body: b"x" },
        ChatReply::PresenceChanged { users: vec![row, row] },
        ChatReply::Hidden { conversation: ID, seq: Seq(2) },
        ChatReply::Notice { from: "root", time_ms: 8, kind: BodyKind::Text, body: b"down at 5" },
    ]
    .into_iter()
}

fn message(body: &[u8]) -> Message<'_> {
    Message {
        conversation: ID,
        seq: Seq(4),
        time_ms: 1_700_000_000_000,
        from: "ann",
        to: "bob",
        device: DeviceId(8),
        client_seq: 6,
        class: Class::Transient,
        kind: BodyKind::Emoji,
        delivery: 3,
        body,
        extra: Extra {
            mentions: Mentions { users: Names::from(&["bob"][..]), all: true },
            refers: Seq(2),
            state: MessageState::Recalled,
            amended_ms: 7,
            change: Some(change()),
        },
    }
}

fn replies() -> Vec<Reply<'static>> {
    let login_ok = LoginOk {
        user: "ann",
        session: 1,
        server_time_ms: 2,
        ping_interval_ms: 3,
        idle_timeout_ms: 4,
        frame_bytes_max: 5,
        sends_in_flight_max: 6,
    };
    let row = Conversation {
        conversation: ID,
        with: "bob",
        first: Seq(1),
        head: Seq(9),
        last_time_ms: 7,
        acked: Seq(5),
        read: Seq(4),
        pinned: true,
        muted_until_ms: 3,
        standing: Some(Standing::Invited),
        title: "The team",
        last: Some(message(b"last")),
    };
    let receipt =
        Receipt { conversation: ID, seq: Seq(2), client_seq: 3, outcome: Outcome::Delivered, device: DeviceId(4) };
    let mut all = vec![
        Reply::Failure { code: ErrorCode::Busy, retry_after_ms: 50, detail: "queue" },
        Reply::Failure { code: ErrorCode::BadBody, retry_after_ms: 0, detail: "" },
        Reply::RegisterOk { user: "ann" },
        Reply::LoginOk(login_ok),
        Reply::LogoutOk,
        Reply::Pong { stamp: 1, server_time_ms: 2 },
        Reply::RouteOk { node: "n1", address: "127.0.0.1:9700" },
        Reply::Redirect { node: "n2", address: "127.0.0.1:9701" },
        Reply::SendAck(SendAck { conversation: ID, seq: Seq(1), time_ms: 2, dup: true }),
        Reply::FetchOk { conversation: ID, first: Seq(1), head: Seq(2), messages: vec![message(b"a"), message(b"")] },
        Reply::OnlineOk { users: vec![OnlineUser { user: "ann", devices: 2 }], next: "ann" },
        Reply::ConversationsOk { conversations: vec![row], next: ID },
        Reply::Deliver(message(&[0xff; 300])),
        Reply::Receipt(receipt),
        Reply::Lagged { conversation: ID, with: "bob", from: Seq(1), to: Seq(5) },
        Reply::Kicked { reason: KickReason::DevicePolicy, detail: "newer device" },
        Reply::Goaway { reason: GoawayReason::ShuttingDown, reconnect_after_ms: 100, node: "", address: "" },
        Reply::Goaway { reason: GoawayReason::Moved, reconnect_after_ms: 100, node: "b", address: "10.0.0.2:9700" },
    ];
    all.extend(group_replies().map(Reply::Group));
    all.extend(chat_replies().map(Reply::Chat));
    all
}

#[test]
fn every_request_and_reply_comes_back_the_same() {
    let (mut encoder, mut bytes) = (Encoder::new(), Vec::new());
    for (at, request) in requests().iter().enumerate() {
        encoder.request(Codec::FlatBuffers, at as u32, request, &mut bytes);
    }
    for (at, reply) in replies().iter().enumerate() {
        encoder.reply(Codec::FlatBuffers, at as u32, reply, &mut bytes);
    }
    let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
    for (at, request) in requests().iter().enumerate() {
        let frame = decoder.next(&mut input, 1 << 20).unwrap().unwrap();
        assert_eq!(frame.header.request_id, at as u32);
        assert_eq!(&decode_request(&frame.header, frame.body).unwrap(), request);
        assert_eq!(decode_reply(&frame.header, frame.body), Err(ErrorCode::UnknownCommand));
    }
    for reply in &replies() {
        let frame = decoder.next(&mut input, 1 << 20).unwrap().unwrap();
        assert_eq!(&decode_reply(&frame.header, frame.body).unwrap(), reply);
        assert_eq!(decode_request(&frame.header, frame.body), Err(ErrorCode::UnknownCommand));
    }
    assert!(input.is_empty());
}

#[test]
fn the_samples_cover_the_command_table() {
    let covered: Vec<_> = requests().iter().map(Request::command).chain(replies().iter().map(Reply::command)).collect();
    for command in Command::ALL {
        assert!(covered.contains(command), "{} has no sample", command.name());
    }
}

#[test]
fn a_login_needs_exactly_one_credential() {
    let mut fbb = flatbuffers::FlatBufferBuilder::new();
    let user = Some(fbb.create_string("ann"));
    let args = crate::generated::wire::ringline::wire::LoginArgs { user, device: 1, ..Default::default() };
    let table = crate::generated::wire::ringline::wire::Login::create(&mut fbb, &args);
    fbb.finish_minimal(table);
    let body = fbb.finished_data();
    let (codec, command, flags) = (Codec::FlatBuffers, Command::Login as u16, Flags::default());
    let header = Header { codec, command, flags, request_id: 0, body_bytes: 0 };
    assert_eq!(decode_request(&header, body), Err(ErrorCode::BadRequest));
}

proptest! {
    #[test]
    fn garbage_bodies_are_errors_and_never_panics(
        which in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        garbage in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (mut encoder, mut bytes) = (Encoder::new(), Vec::new());
        let (requests, replies) = (requests(), replies());
        let at = which.index(requests.len() + replies.len());
        match requests.get(at) {
            Some(request) => encoder.request(Codec::FlatBuffers, 1, request, &mut bytes),
            None => encoder.reply(Codec::FlatBuffers, 1, &replies[at - requests.len()], &mut bytes),
        }
        let header = Header::decode(bytes.first_chunk().unwrap(), u32::MAX).unwrap();
        let mut body = bytes[16..].to_vec();
        for (place, value) in flips {
            let place = place.index(body.len().max(1));
            if let Some(byte) = body.get_mut(place) { *byte = value; }
        }
        let cut = cut.index(body.len() + 1);
        for candidate in [&body[..], &body[..cut], &garbage[..]] {
            let _ = decode_request(&header, candidate);
            let _ = decode_reply(&header, candidate);
        }
    }
}
