//! The hot way and the general way agree on every body, sound or damaged, and what the one writes the other reads.

use proptest::prelude::*;

use super::super::{Builder, decode_any_reply, decode_any_request, fb};
use super::*;
use crate::codec::{Codec, Encoder};
use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::frame::{Flags, Header};
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::limits::{FRAME_HEADER_BYTES, USER_NAME_BYTES_MAX};
use crate::message::{
    Ack, BodyKind, Class, Extra, Mentions, Message, MessageState, Names, Reply, Request, Send, SendAck,
};

fn hot_request(command: Command, body: &[u8]) -> Option<Result<Request<'_>, ErrorCode>> {
    match command {
        Command::Send => read_send(body).map(|send| send.map(Request::Send)).transpose(),
        Command::Ack => Some(read_ack(body).map(Request::Ack)),
        _ => None,
    }
}

fn hot_reply(command: Command, body: &[u8]) -> Option<Result<Reply<'_>, ErrorCode>> {
    match command {
        Command::Deliver => read_message(body).map(|message| message.map(Reply::Deliver)).transpose(),
        Command::SendAck => Some(read_send_ack(body).map(Reply::SendAck)),
        _ => None,
    }
}

fn header(command: Command) -> Header {
    let (codec, flags) = (Codec::FlatBuffers, Flags::default());
    Header { codec, command: command as u16, flags, request_id: 7, body_bytes: 0 }
}

/// The body of a frame, after a look at its header.
fn body(command: Command, frame: &[u8]) -> &[u8] {
    let (head, body) = frame.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
    let head = Header::decode(head, u32::MAX).unwrap();
    assert_eq!(head, Header { body_bytes: body.len() as u32, ..header(command) });
    body
}

/// A value that is often 0, the default that the general builder leaves out.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), any::<u64>()]
}

prop_compose! {
    fn any_send()(
        (to, body) in (".{0,12}", prop::collection::vec(any::<u8>(), 0..40)),
        (client_seq, timeout, transient, kind) in (number(), number(), any::<bool>(), 0u8..8),
    ) -> (String, Vec<u8>, Send<'static>) {
        let class = if transient { Class::Transient } else { Class::Durable };
        let kind = BodyKind::from_number(kind).unwrap();
        let ack_timeout_ms = (timeout as u32 != 0).then_some(timeout as u32);
        let mentions = Mentions::default();
        (to, body, Send { to: "", class, kind, client_seq, ack_timeout_ms, body: &[], mentions })
    }
}

prop_compose! {
    fn any_message()(
        (from, to, body) in (".{0,9}", ".{0,9}", prop::collection::vec(any::<u8>(), 0..40)),
        (id, seq, time_ms, device) in (number(), number(), number(), number()),
        (client_seq, delivery, transient, kind) in (number(), number(), any::<bool>(), 0u8..10),
    ) -> (String, String, Vec<u8>, Message<'static>) {
        let class = if transient { Class::Transient } else { Class::Durable };
        let kind = BodyKind::from_number(kind).unwrap();
        let conversation = ConversationId(u128::from(id) << 3);
        let message = Message {
            conversation, seq: Seq(seq), time_ms, from: "", to: "", device: DeviceId(device), client_seq, class, kind,
            delivery, body: &[], extra: Extra::default(),
        };
        (from, to, body, message)
    }
}

fn any_ack() -> impl Strategy<Value = Ack> {
    let upto = (number(), number())
        .prop_map(|(id, seq)| Ack::Upto { conversation: ConversationId(u128::from(id) * 5), seq: Seq(seq) });
    prop_oneof![upto, (1..u64::MAX).prop_map(Ack::Delivery)]
}

fn any_send_ack() -> impl Strategy<Value = SendAck> {
    (number(), number(), number(), any::<bool>()).prop_map(|(id, seq, time_ms, dup)| SendAck {
        conversation: ConversationId(u128::from(id) << 64 | u128::from(id)),
        seq: Seq(seq),
        time_ms,
        dup,
    })
}

fn check_request(request: &Request<'_>) {
    let command = request.command();
    let mut frame = Vec::new();
    assert!(write_request(header(command), request, &mut frame));
    let written = body(command, &frame);
    // The general verifier accepts it whole, null ends included, and finds the same.
    match request {
        Request::Send(_) => flatbuffers::root::<fb::Send>(written).map(|_| ()).unwrap(),
        _ => flatbuffers::root::<fb::Ack>(written).map(|_| ()).unwrap(),
    }
    assert_eq!(&decode_any_request(command, written).unwrap(), request);
    assert_eq!(hot_request(command, written).unwrap().as_ref(), Ok(request));
    if let Request::Send(send) = request {
        assert_eq!(PlainSend::read(written).unwrap().check(), Ok(*send), "our own layout is the plain one");
    }
    let mut builder = Builder::default();
    assert_eq!(hot_request(command, builder.request(request)).unwrap().as_ref(), Ok(request));
}

fn check_reply(reply: &Reply<'_>) {
    let command = reply.command();
    let mut frame = Vec::new();
    let mut builder = Builder::default();
    let built = builder.reply(reply);
    assert_eq!(hot_reply(command, built).unwrap().as_ref(), Ok(reply));
    let (mut direct, mut by_reply, codec) = (Vec::new(), Vec::new(), Codec::FlatBuffers);
    match reply {
        Reply::Deliver(message) => Encoder::new().deliver(codec, message, &mut direct),
        Reply::SendAck(ack) => Encoder::new().send_ack(codec, 0, ack, &mut direct),
        other => panic!("{other:?} has no way of its own"),
    }
    Encoder::new().reply(codec, 0, reply, &mut by_reply);
    assert_eq!(direct, by_reply);
    if !write_reply(header(command), reply, &mut frame) {
        // A durable message with a delivery number, which no server makes.
        let Reply::Deliver(message) = reply else { panic!("{reply:?} was not written") };
        assert!(message.delivery != 0 && (message.seq != Seq::ZERO || message.conversation != ConversationId(0)));
        return assert!(frame.is_empty());
    }
    let written = body(command, &frame);
    match reply {
        Reply::Deliver(_) => flatbuffers::root::<fb::Message>(written).map(|_| ()).unwrap(),
        _ => flatbuffers::root::<fb::SendAck>(written).map(|_| ()).unwrap(),
    }
    assert_eq!(&decode_any_reply(command, written).unwrap(), reply);
    assert_eq!(hot_reply(command, written).unwrap().as_ref(), Ok(reply));
}

/// Damages and cuts a body; both ways must say the same of it.
fn check_damaged(command: Command, body: &[u8], (flips, cut): (&[(prop::sample::Index, u8)], prop::sample::Index)) {
    let mut damaged = body.to_vec();
    for (place, value) in flips {
        // Offsets and lengths lie in the front: most flips go there.
        let place = place.index((2 * damaged.len()).max(1)) % damaged.len().clamp(1, 100);
        if let Some(byte) = damaged.get_mut(place) {
            *byte = *value;
        }
    }
    let cut = cut.index(damaged.len() + 1);
    for candidate in [&damaged[..], &damaged[..cut], &body[..cut.min(body.len())]] {
        if let Some(hot) = hot_request(command, candidate) {
            assert_eq!(hot, decode_any_request(command, candidate));
        }
        if let Some(plain) = PlainSend::read(candidate).filter(|_| command == Command::Send) {
            assert_eq!(plain.check().map(Request::Send), decode_any_request(command, candidate));
        }
        if let Some(hot) = hot_reply(command, candidate) {
            assert_eq!(hot, decode_any_reply(command, candidate));
        }
    }
}

fn damage() -> impl Strategy<Value = (Vec<(prop::sample::Index, u8)>, prop::sample::Index)> {
    let value = prop_oneof![0u8..64, any::<u8>()];
    (prop::collection::vec((any::<prop::sample::Index>(), value), 0..4), any::<prop::sample::Index>())
}

fn written(request: &Request<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    assert!(write_request(header(request.command()), request, &mut frame));
    frame.split_off(FRAME_HEADER_BYTES)
}

/// What becomes of a plain send is what is written of its message, byte for byte.
fn check_plain(body: &[u8], from: &str, (device, time_ms, request_id): (u64, u64, u32)) {
    let (plain, codec) = (PlainSend::read(body).unwrap(), Codec::FlatBuffers);
    let Ok(send) = plain.check() else { panic!("it was text") };
    let message = Message {
        conversation: ConversationId(0),
        seq: Seq::ZERO,
        time_ms,
        from,
        to: send.to,
        device: DeviceId(device),
        client_seq: send.client_seq,
        class: Class::Transient,
        kind: send.kind,
        delivery: 0,
        body: send.body,
        extra: Extra::default(),
    };
    // Behind other output, as in an outbox.
    let (mut straight, mut long) = (vec![1, 2, 3], vec![1, 2, 3]);
    plain.deliver(codec, &PlainSender { from, device: DeviceId(device), time_ms }, &mut straight);
    let push = Header { request_id: 0, ..header(Command::Deliver) };
    assert!(write_reply(push, &Reply::Deliver(message), &mut long));
    let ack = SendAck { conversation: ConversationId(0), seq: Seq::ZERO, time_ms, dup: false };
    Encoder::new().send_ack(codec, request_id, &ack, &mut straight);
    assert!(write_reply(Header { request_id, ..header(Command::SendAck) }, &Reply::SendAck(ack), &mut long));
    assert_eq!(straight, long);
}

#[test]
fn only_its_own_layout_is_plain() {
    let (class, kind, mentions) = (Class::Transient, BodyKind::Text, Mentions::default());
    for bytes in 0..=USER_NAME_BYTES_MAX + 1 {
        let to = "n".repeat(bytes);
        let send = Send { to: &to, class, kind, client_seq: 1, ack_timeout_ms: None, body: b"hello", mentions };
        let body = written(&Request::Send(send));
        assert_eq!(PlainSend::read(&body).is_some(), bytes <= USER_NAME_BYTES_MAX, "a name of {bytes} bytes");
        // Sound to the general verifier: room behind the body, and something in the room behind the name.
        let longer = [&body[..], &[0; 4]].concat();
        let mut rubbish = body.clone();
        rubbish[48 + 4 + bytes] = 9;
        for body in [&longer[..], &rubbish[..], Builder::default().request(&Request::Send(send))] {
            assert_eq!(PlainSend::read(body), None);
            assert_eq!(read_send(body), Ok(Some(send)));
        }
        for cut in 0..body.len() {
            assert_eq!(PlainSend::read(&body[..cut]), None);
        }
    }
    let send = Send { to: "ann", class, kind, client_seq: 1, ack_timeout_ms: None, body: b"hello", mentions };
    let mut body = written(&Request::Send(send));
    for (class, kind, plain) in
        [(0, 7, true), (1, 0, true), (2, 0, false), (1, 8, false), (1, 9, false), (1, 10, false)]
    {
        (body[44], body[45]) = (class, kind);
        assert_eq!(PlainSend::read(&body).is_some(), plain);
        assert_eq!(read_send(&body).is_ok(), plain);
    }
    (body[44], body[45], body[52]) = (1, 0, 0xff);
    assert_eq!(PlainSend::read(&body).unwrap().check(), Err(ErrorCode::BadBody), "no text");
    assert_eq!(read_send(&body), Err(ErrorCode::BadBody));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_plain_send_becomes_what_its_message_would(
        (to, bytes, send) in any_send(), from in ".{0,30}", more in any::<(u64, u64, u32)>(),
    ) {
        check_plain(&written(&Request::Send(Send { to: &to, body: &bytes, ..send })), &from, more);
    }

    #[test]
    fn sends_and_acks_come_back_the_same((to, bytes, send) in any_send(), ack in any_ack()) {
        check_request(&Request::Send(Send { to: &to, body: &bytes, ..send }));
        check_request(&Request::Ack(ack));
    }

    #[test]
    fn messages_and_send_acks_come_back_the_same((from, to, bytes, message) in any_message(), ack in any_send_ack()) {
        check_reply(&Reply::Deliver(Message { from: &from, to: &to, body: &bytes, ..message }));
        check_reply(&Reply::SendAck(ack));
    }

    #[test]
    fn damaged_requests_mean_the_same_to_both((to, bytes, send) in any_send(), ack in any_ack(), damage in damage()) {
        let send = Request::Send(Send { to: &to, body: &bytes, ..send });
        for request in [send, Request::Ack(ack)] {
            let (command, mut frame, mut builder) = (request.command(), Vec::new(), Builder::default());
            write_request(header(command), &request, &mut frame);
            for body in [body(command, &frame), builder.request(&request)] {
                check_damaged(command, body, (&damage.0, damage.1));
            }
        }
    }

    #[test]
    fn damaged_replies_mean_the_same_to_both(
        (from, to, bytes, message) in any_message(), ack in any_send_ack(), damage in damage(),
    ) {
        let message = Message { from: &from, to: &to, body: &bytes, delivery: 0, ..message };
        for reply in [Reply::Deliver(message), Reply::SendAck(ack)] {
            let (command, mut frame, mut builder) = (reply.command(), Vec::new(), Builder::default());
            prop_assert!(write_reply(header(command), &reply, &mut frame));
            for body in [body(command, &frame), builder.reply(&reply)] {
                check_damaged(command, body, (&damage.0, damage.1));
            }
        }
    }

    #[test]
    fn any_bytes_mean_the_same_to_both(
        bytes in prop::collection::vec(prop_oneof![0u8..40, any::<u8>()], 0..120),
        damage in damage(),
    ) {
        for command in [Command::Send, Command::Ack, Command::SendAck, Command::Deliver] {
            check_damaged(command, &bytes, (&damage.0, damage.1));
        }
    }
}

#[test]
fn rare_fields_go_the_general_way() {
    let names = ["ann"];
    let mentioned =
        [Mentions { users: Names::from(&names[..]), all: false }, Mentions { users: Names::default(), all: true }];
    for mentions in mentioned {
        let (to, class, kind) = ("#team", Class::Durable, BodyKind::Text);
        let send = Send { to, class, kind, client_seq: 1, ack_timeout_ms: None, body: b"x", mentions };
        let (request, mut frame) = (Request::Send(send), Vec::new());
        assert!(!write_request(header(Command::Send), &request, &mut frame) && frame.is_empty());
        assert_eq!(read_send(Builder::default().request(&request)), Ok(None));
    }
    let plain = Extra::default();
    let extras = [
        Extra { mentions: mentioned[0], ..plain },
        Extra { refers: Seq(1), ..plain },
        Extra { state: MessageState::Edited, ..plain },
        Extra { amended_ms: 1, ..plain },
    ];
    for extra in extras {
        let message = Message {
            conversation: ConversationId(5),
            seq: Seq(2),
            time_ms: 3,
            from: "ann",
            to: "bob",
            device: DeviceId(4),
            client_seq: 5,
            class: Class::Durable,
            kind: BodyKind::Text,
            delivery: 0,
            body: b"x",
            extra,
        };
        let (reply, mut frame) = (Reply::Deliver(message), Vec::new());
        assert!(!write_reply(header(Command::Deliver), &reply, &mut frame) && frame.is_empty());
        assert_eq!(read_message(Builder::default().reply(&reply)), Ok(None));
    }
}

/// The slot numbers are those of the generated code.
#[test]
fn slots_are_those_of_the_tables() {
    let slot = |vt: flatbuffers::VOffsetT| (usize::from(vt) - 4) / 2;
    let of_send = [send::TO, send::CLASS, send::KIND, send::CLIENT_SEQ, send::ACK_TIMEOUT_MS, send::BODY, send::RARE];
    use fb::Send as S;
    let generated =
        [S::VT_TO, S::VT_CLASS, S::VT_KIND, S::VT_CLIENT_SEQ, S::VT_ACK_TIMEOUT_MS, S::VT_BODY, S::VT_MENTIONS];
    assert_eq!(of_send, generated.map(slot));
    use fb::Message as M;
    let of_message = [
        message::CONVERSATION,
        message::SEQ,
        message::TIME_MS,
        message::FROM,
        message::TO,
        message::DEVICE,
        message::CLIENT_SEQ,
        message::CLASS,
        message::KIND,
        message::DELIVERY,
        message::BODY,
        message::RARE,
    ];
    let generated = [
        M::VT_CONVERSATION,
        M::VT_SEQ,
        M::VT_TIME_MS,
        M::VT_FROM,
        M::VT_TO,
        M::VT_DEVICE,
        M::VT_CLIENT_SEQ,
        M::VT_CLASS,
        M::VT_KIND,
        M::VT_DELIVERY,
        M::VT_BODY,
        M::VT_MENTIONS,
    ];
    assert_eq!(of_message, generated.map(slot));
    use fb::SendAck as A;
    let of_ack = [send_ack::CONVERSATION, send_ack::SEQ, send_ack::TIME_MS, send_ack::DUP];
    assert_eq!(of_ack, [A::VT_CONVERSATION, A::VT_SEQ, A::VT_TIME_MS, A::VT_DUP].map(slot));
    let of_ack = [ack::CONVERSATION, ack::SEQ, ack::DELIVERY];
    assert_eq!(of_ack, [fb::Ack::VT_CONVERSATION, fb::Ack::VT_SEQ, fb::Ack::VT_DELIVERY].map(slot));
}
