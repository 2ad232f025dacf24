//! The rules of EXPORT: what is in it, for whom, in which pieces, and who is refused.

mod rig;

use rig::*;
use ringline_core::config::EXPORTS_IN_FLIGHT_MAX;
use ringline_core::event::Event;
use ringline_schema::codec::Codec;
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::Flags;
use ringline_schema::limits;
use ringline_schema::message::chat::{Amend, AmendAction, Mark, MessagesFrom};
use ringline_schema::message::*;

fn piece(rig: &mut Rig, at: At, cursor: &str) -> (Vec<u8>, String) {
    let told = rig.ask(at, Request::Chat(ChatRequest::Export { cursor }));
    assert!(told[0].len() <= limits::FRAME_BYTES_MAX as usize);
    match decode(&told[0]) {
        Reply::Chat(ChatReply::ExportOk { body, next }) => (body.to_vec(), next.to_owned()),
        other => panic!("{other:?}"),
    }
}

fn whole(rig: &mut Rig, at: At) -> (String, usize) {
    let (mut bytes, mut cursor, mut pieces) = (Vec::new(), String::new(), 0);
    loop {
        let (body, next) = piece(rig, at, &cursor);
        // Asking again gives the same.
        assert_eq!(piece(rig, at, &cursor), (body.clone(), next.clone()));
        bytes.extend(body);
        pieces += 1;
        if next.is_empty() {
            return (String::from_utf8(bytes).unwrap(), pieces);
        }
        assert_ne!(next, cursor, "it goes on");
        cursor = next;
    }
}

fn chat(rig: &mut Rig, at: At, request: ChatRequest<'_>) {
    assert_eq!(rig.code(at, Request::Chat(request)), None);
}

#[test]
fn an_export_has_everything_of_a_user_once_and_nothing_of_others() {
    for shards in [1, 3, 5] {
        let mut rig = Rig::new(shards, |_| ());
        let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
        let _ = (rig.login("ann", 2), rig.login("cleo", 1));
        for client_seq in 1..=250 {
            rig.send(ann, "bob", client_seq, format!("to bob {client_seq}").as_bytes());
        }
        rig.send(bob, "ann", 1, b"to ann");
        rig.send(bob, "cleo", 1, b"not for ann");
        rig.send(ann, "cleo", 1, &[0xff, 0xfe]);
        chat(&mut rig, ann, ChatRequest::Block { user: "dan \"quoted\"" });
        chat(&mut rig, ann, ChatRequest::Block { user: "zoe" });
        chat(&mut rig, ann, ChatRequest::Privacy { messages_from: Some(MessagesFrom::Known) });
        let pinned = Mark { conversation: direct("ann", "bob"), pinned: Some(true), muted_until_ms: None };
        chat(&mut rig, ann, ChatRequest::Mark(pinned));
        let (text, pieces) = whole(&mut rig, ann);
        let lines: Vec<&str> = text.lines().collect();
        let count = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
        assert!(lines.iter().all(|line| line.starts_with('{') && line.ends_with('}')), "{shards}: {text}");
        assert!(pieces > 1, "{shards}");
        assert_eq!(count("\"type\":\"user\""), 1);
        assert_eq!(count("\"table\":\"device\""), 2);
        assert_eq!(count("\"table\":\"block\""), 2);
        assert_eq!(count("dan \\\"quoted\\\""), 1);
        assert_eq!(count("\"messages_from\":\"known\""), 1);
        assert_eq!((count("\"type\":\"conversation\""), count("\"pinned\":true")), (2, 1));
        assert_eq!(count("\"type\":\"message\""), 252, "{shards} shards");
        assert_eq!(count("\"body\":\"to bob 250\""), 1);
        assert_eq!(count("\"body_base64\":\"//4=\""), 1);
        assert_eq!(count("not for ann"), 0, "what others write to each other");
        assert_eq!(count("argon"), 0, "no password leaves");
        // What a user may not read any more is not in it: a message deleted for all has no body.
        chat(
            &mut rig,
            ann,
            ChatRequest::Amend(Amend {
                with: "bob",
                seq: ringline_schema::ids::Seq(7),
                action: AmendAction::DeleteForMe,
                kind: BodyKind::Text,
                client_seq: 0,
                body: &[],
            }),
        );
        let (text, _) = whole(&mut rig, ann);
        assert!(!text.contains("\"to bob 7\"") && text.contains("\"to bob 8\""));
    }
}

#[test]
fn a_line_that_is_larger_than_a_piece_is_cut_and_whole_again() {
    let mut rig = Rig::new(1, |_| ());
    let (ann, _) = (rig.login("ann", 1), rig.login("bob", 1));
    // Each byte takes six in JSON.
    let body = vec![1; (limits::FRAME_BYTES_MAX - limits::MESSAGE_OVERHEAD_BYTES_MAX) as usize];
    rig.send(ann, "bob", 1, b"before");
    rig.send(ann, "bob", 2, &body);
    rig.send(ann, "bob", 3, b"after");
    let (text, pieces) = whole(&mut rig, ann);
    assert!(pieces > 10, "{pieces}");
    let messages: Vec<_> = text.lines().filter(|line| line.contains("\"type\":\"message\"")).collect();
    assert_eq!(messages.len(), 3);
    assert_eq!(messages[1].matches("\\u0001").count(), body.len());
    assert!(messages[2].contains("after"));
}

#[test]
fn bad_cursors_and_too_many_at_once_are_refused() {
    let mut rig = Rig::new(1, |_| ());
    let ann = rig.login("ann", 1);
    for cursor in
        ["x", ":", "0:", "0:q", "-1:a", "0:c-", "0:m1", "0:m1,x", "0:dx", "0:a1", "99999999999999999999:a", "é:é"]
    {
        let told = rig.code(ann, Request::Chat(ChatRequest::Export { cursor }));
        assert_eq!(told, Some(ErrorCode::BadRequest), "{cursor:?}");
    }
    // Places that nothing is at end.
    for cursor in ["0:m1,7", "7:cffffffffffffffffffffffffffffffff", "0:bzz", "0:d9"] {
        assert_eq!(piece(&mut rig, ann, cursor), (Vec::new(), String::new()), "{cursor:?}");
    }
    // As long as the store does not answer they are under way.
    let (shard, store) = &mut rig.shards[0];
    let now = rig.now;
    let mut busy = 0;
    for request_id in 1..=EXPORTS_IN_FLIGHT_MAX as u32 + 1 {
        let mut fx = ringline_core::event::Effects::default();
        let request = Request::Chat(ChatRequest::Export { cursor: "" });
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        let _ = shard.handle(Event::Request { conn: ann.1, codec, flags, request_id, request }, now, &mut fx);
        busy += usize::from(!fx.list.iter().any(|effect| matches!(effect, ringline_core::event::Effect::Load { .. })));
    }
    let _ = store;
    assert_eq!(busy, 1, "one more than may be");
}
