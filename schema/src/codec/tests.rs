//! Every command goes out and comes back the same; no bytes are anything but a value or an error.

use super::*;
use crate::frame::{Flags, FrameDecoder, Header};
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::message::*;
use proptest::prelude::*;

const ID: ConversationId = ConversationId(0x0123_4567_89ab_cdef_1122_3344_5566_7788);

fn requests() -> Vec<Request<'static>> {
    let login = |credential| {
        let (device, device_kind) = (DeviceId(77), DeviceKind::Phone);
        Request::Login(Login { user: "ann", credential, device, device_kind, agent: "test/1" })
    };
    let send = |class, ack_timeout_ms| {
        let body = b"hello \0 there";
        Request::Send(Send { to: "bob", class, kind: BodyKind::Link, client_seq: u64::MAX, ack_timeout_ms, body })
    };
    let fetch = |before| Request::Fetch(Fetch { with: "bob", after: Seq(3), before, limit: 40, newest: true });
    vec![
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
    ]
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
    let row =
        Conversation { conversation: ID, with: "bob", first: Seq(1), head: Seq(9), last_time_ms: 7, acked: Seq(5) };
    let receipt =
        Receipt { conversation: ID, seq: Seq(2), client_seq: 3, outcome: Outcome::Delivered, device: DeviceId(4) };
    vec![
        Reply::Failure { code: ErrorCode::Busy, retry_after_ms: 50, detail: "queue" },
        Reply::Failure { code: ErrorCode::BadBody, retry_after_ms: 0, detail: "" },
        Reply::RegisterOk { user: "ann" },
        Reply::LoginOk(login_ok),
        Reply::LogoutOk,
        Reply::Pong { stamp: 1, server_time_ms: 2 },
        Reply::RouteOk { node: "n1", address: "127.0.0.1:9700" },
        Reply::SendAck(SendAck { conversation: ID, seq: Seq(1), time_ms: 2, dup: true }),
        Reply::FetchOk { conversation: ID, first: Seq(1), head: Seq(2), messages: vec![message(b"a"), message(b"")] },
        Reply::OnlineOk { users: vec![OnlineUser { user: "ann", devices: 2 }], next: "ann" },
        Reply::ConversationsOk { conversations: vec![row], next: ID },
        Reply::Deliver(message(&[0xff; 300])),
        Reply::Receipt(receipt),
        Reply::Lagged { conversation: ID, with: "bob", from: Seq(1), to: Seq(5) },
        Reply::Kicked { reason: KickReason::DevicePolicy, detail: "newer device" },
        Reply::Goaway { reason: GoawayReason::ShuttingDown, reconnect_after_ms: 100 },
    ]
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
