//! The rules of CONVERSATIONS and MARK.

mod rig;

use rig::*;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::chat::Mark;
use ringline_schema::message::*;
use ringline_schema::record::Record;

/// (with, head, read, pinned, muted until, last body) in order of id, all pages.
type Row = (String, u64, u64, bool, u64, Option<Vec<u8>>);

fn list(rig: &mut Rig, at: At, limit: u16) -> Vec<Row> {
    let (mut rows, mut cursor) = (Vec::new(), ConversationId(0));
    loop {
        let told = rig.ask(at, Request::Conversations { cursor, limit });
        assert!(told[0].len() <= limits::FRAME_BYTES_MAX as usize);
        let Reply::ConversationsOk { conversations, next } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
        for row in conversations {
            let last = row.last.map(|last| last.body.to_vec());
            rows.push((row.with.to_owned(), row.head.0, row.read.0, row.pinned, row.muted_until_ms, last));
        }
        if next == ConversationId(0) {
            return rows;
        }
        cursor = next;
    }
}

fn mark(conversation: ConversationId, pinned: Option<bool>, muted_until_ms: Option<u64>) -> Request<'static> {
    Request::Chat(ChatRequest::Mark(Mark { conversation, pinned, muted_until_ms }))
}

fn conversation(one: &str, other: &str) -> Record {
    let mut members = [name(one), name(other)];
    members.sort();
    Record::Conversation { conversation: direct(one, other), members, created_ms: 1 }
}

#[test]
fn a_row_tells_head_read_last_message_pin_and_mute() {
    for shards in [1, 3] {
        let mut rig = Rig::new(shards, |_| ());
        let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
        let id = direct("ann", "bob");
        for (client_seq, body) in [(1, "one"), (2, "two"), (3, "three")] {
            rig.send(ann, "bob", client_seq, body.as_bytes());
        }
        assert_eq!(rig.code(bob, Request::Chat(ChatRequest::Read { conversation: id, seq: Seq(1) })), None);
        let last = || Some(b"three".to_vec());
        assert_eq!(list(&mut rig, bob, 0), [("ann".to_owned(), 3, 1, false, 0, last())], "two are unread");
        assert_eq!(rig.code(bob, mark(id, Some(true), None)), None);
        assert_eq!(rig.code(bob, mark(id, None, Some(77))), None);
        assert_eq!(list(&mut rig, bob, 0), [("ann".to_owned(), 3, 1, true, 77, last())]);
        assert_eq!(list(&mut rig, ann, 0), [("bob".to_owned(), 3, 0, false, 0, last())], "marks are of one user");
        rig.restart(2);
        let bob = rig.login("bob", 2);
        assert_eq!(rig.code(bob, mark(id, Some(false), None)), None, "known only from the list");
        assert_eq!(list(&mut rig, bob, 0), [("ann".to_owned(), 3, 1, false, 77, last())]);
    }
}

#[test]
fn large_last_messages_are_left_out_of_a_page_and_the_page_fits_a_frame() {
    let mut rig = Rig::new(1, |_| ());
    let ann = rig.login("ann", 1);
    let body = vec![7; 3_000];
    for number in 0..80 {
        let friend = format!("{number:060}");
        let at = rig.login(&friend, 1);
        rig.leave(at);
        rig.send(ann, &friend, number + 1, &body);
    }
    let rows = list(&mut rig, ann, 200);
    assert_eq!(rows.len(), 80);
    let shown = rows.iter().filter(|row| row.5.as_ref() == Some(&body)).count();
    assert!((5..80).contains(&shown), "{shown}");
}

#[test]
fn pins_have_a_limit_and_others_conversations_no_marks() {
    let mut rig = Rig::new(1, |_| ());
    let friend = |number: usize| format!("friend-{number}");
    let records: Vec<_> = (0..=limits::PINS_MAX).map(|number| conversation(&friend(number), "ann")).collect();
    rig.put(&records);
    let ann = rig.login("ann", 1);
    let id = |number| direct(&friend(number), "ann");
    for number in 0..limits::PINS_MAX {
        assert_eq!(rig.code(ann, mark(id(number), Some(true), None)), None);
    }
    let last = id(limits::PINS_MAX);
    assert_eq!(rig.code(ann, mark(last, Some(true), None)), Some(ErrorCode::TooManyPins));
    assert_eq!(rig.code(ann, mark(last, None, Some(5))), None, "a mute is no pin");
    assert_eq!(rig.code(ann, mark(id(0), Some(true), None)), None, "pinned already");
    assert_eq!(rig.code(ann, mark(id(0), Some(false), None)), None);
    assert_eq!(rig.code(ann, mark(last, Some(true), None)), None);
    assert_eq!(rig.code(ann, mark(direct("eve", "bob"), Some(true), None)), Some(ErrorCode::NoSuchConversation));
}

#[test]
fn one_mark_of_a_user_at_a_time_so_none_is_lost() {
    let mut rig = Rig::new(1, |_| ());
    let (phone, desk) = (rig.login("ann", 1), rig.login("ann", 2));
    rig.send(phone, "ann", 1, b"note");
    let id = direct("ann", "ann");
    rig.committing = false;
    assert_eq!(rig.code(phone, mark(id, Some(true), None)), None);
    assert_eq!(rig.code(desk, mark(id, None, Some(9))), Some(ErrorCode::Busy));
    rig.commit();
    assert_eq!(rig.code(desk, mark(id, None, Some(9))), None);
    assert_eq!(list(&mut rig, desk, 0), [("ann".to_owned(), 1, 0, true, 9, Some(b"note".to_vec()))]);
}
