//! The rules of READ, RECEIPT_UPTO and RECEIPTS.

mod rig;

use rig::*;
use ringline_core::event::Event;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::*;

fn read(conversation: ConversationId, seq: u64) -> Request<'static> {
    Request::Chat(ChatRequest::Read { conversation, seq: Seq(seq) })
}

fn ack(conversation: ConversationId, seq: u64) -> Request<'static> {
    Request::Ack(Ack::Upto { conversation, seq: Seq(seq) })
}

fn is_done(told: &[Vec<u8>]) -> bool {
    told.iter().any(|frame| decode(frame) == Reply::Chat(ChatReply::Done))
}

/// The news a connection was told: (with, user, delivered, read).
fn news(rig: &mut Rig, at: At) -> Vec<(String, String, u64, u64)> {
    let told = rig.told(at);
    let told = told.iter().filter_map(|frame| match decode(frame) {
        Reply::Chat(ChatReply::ReceiptUpto { with, user, delivered, read, .. }) => {
            Some((with.to_owned(), user.to_owned(), delivered.0, read.0))
        }
        _ => None,
    });
    told.collect()
}

fn of_bob(delivered: u64, read: u64) -> (String, String, u64, u64) {
    ("bob".to_owned(), "bob".to_owned(), delivered, read)
}

/// (members, delivered, read, rows) of a message.
type List = (u32, u32, u32, Vec<(String, u64, u64)>);

fn list(rig: &mut Rig, at: At, conversation: ConversationId, seq: u64) -> List {
    let request = ChatRequest::Receipts { conversation, seq: Seq(seq), cursor: "", limit: 0 };
    let told = rig.ask(at, Request::Chat(request));
    let Reply::Chat(ChatReply::ReceiptsOk { members, delivered, read, rows, next }) = decode(&told[0]) else {
        panic!("{:?}", decode(&told[0]))
    };
    assert_eq!(next, "");
    (members, delivered, read, rows.iter().map(|row| (row.user.to_owned(), row.delivered.0, row.read.0)).collect())
}

/// The row of a conversation in the list of a user: (head, read).
fn place(rig: &mut Rig, at: At, conversation: ConversationId) -> (u64, u64) {
    let told = rig.ask(at, Request::Conversations { cursor: ConversationId(0), limit: 0 });
    let Reply::ConversationsOk { conversations, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    let row = conversations.iter().find(|row| row.conversation == conversation).unwrap();
    (row.head.0, row.read.0)
}

#[test]
fn what_was_delivered_and_read_is_told_to_the_sender_once_a_second() {
    for shards in [1, 2, 5] {
        let mut rig = Rig::new(shards, |_| ());
        let (ann, bob, bobs_desk) = (rig.login("ann", 1), rig.login("bob", 1), rig.login("bob", 2));
        let id = direct("ann", "bob");
        for client_seq in 1..=6 {
            rig.send(ann, "bob", client_seq, b"hello");
        }
        rig.ask(bob, ack(id, 3));
        rig.told(ann);
        rig.pass(1_100);
        assert_eq!(news(&mut rig, ann), [of_bob(3, 0)], "{shards} shards");
        assert!(is_done(&rig.ask(bob, read(id, 2))));
        for seq in 3..=5 {
            assert!(is_done(&rig.ask(bob, read(id, seq))));
        }
        assert!(news(&mut rig, ann).len() <= 1, "at most one within a second");
        rig.pass(limits::RECEIPTS_INTERVAL_MS + 100);
        let told = news(&mut rig, ann);
        assert_eq!(told.last(), Some(&of_bob(5, 5)), "what is read was delivered");
        assert!(told.len() <= 2);
        let own = news(&mut rig, bobs_desk);
        assert_eq!(own.last(), Some(&("ann".to_owned(), "bob".to_owned(), 5, 5)), "other devices learn what was read");
        rig.pass(3_000);
        assert!(news(&mut rig, ann).is_empty(), "nothing new, nothing told");
        assert_eq!(place(&mut rig, bob, id), (6, 5), "one is unread");
        assert_eq!(list(&mut rig, ann, id, 5), (1, 1, 1, vec![("bob".to_owned(), 5, 5)]));
        assert_eq!(list(&mut rig, ann, id, 6), (1, 0, 0, vec![("bob".to_owned(), 5, 5)]));
    }
}

#[test]
fn a_read_never_goes_back_and_survives_a_restart() {
    let mut rig = Rig::new(2, |_| ());
    let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
    let id = direct("ann", "bob");
    for client_seq in 1..=5 {
        rig.send(ann, "bob", client_seq, b"hello");
    }
    assert!(is_done(&rig.ask(bob, read(id, 4))));
    assert!(is_done(&rig.ask(bob, read(id, 2))), "an older one is done: it changes nothing");
    assert_eq!(place(&mut rig, bob, id), (5, 4));
    rig.restart(3);
    let bob = rig.login("bob", 1);
    assert_eq!(place(&mut rig, bob, id), (5, 4));
    assert!(is_done(&rig.ask(bob, read(id, 3))));
    assert_eq!(place(&mut rig, bob, id), (5, 4));
    assert!(is_done(&rig.ask(bob, read(id, 5))), "also of a message this session was never given");
    assert_eq!(place(&mut rig, bob, id), (5, 5));
}

#[test]
fn a_read_is_done_and_told_only_when_it_is_on_disk() {
    let mut rig = Rig::new(1, |_| ());
    let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
    let id = direct("ann", "bob");
    rig.send(ann, "bob", 1, b"hello");
    rig.told(ann);
    // The row of the receipt is looked up first, so it is known before the disk stops.
    assert!(is_done(&rig.ask(bob, read(id, 1))));
    rig.send(ann, "bob", 2, b"hello");
    rig.pass(2_000);
    rig.told(ann);
    rig.committing = false;
    assert!(!is_done(&rig.ask(bob, read(id, 2))));
    assert!(!is_done(&rig.ask(bob, read(id, 2))), "its repeat waits for the same record");
    assert!(news(&mut rig, ann).is_empty());
    rig.commit();
    assert_eq!(rig.told(bob).iter().filter(|frame| is_done(&[(*frame).clone()])).count(), 2);
    assert_eq!(news(&mut rig, ann), [of_bob(2, 2)]);
    rig.send(ann, "bob", 3, b"hello");
    rig.committing = false;
    rig.told(bob);
    rig.ask(bob, read(id, 3));
    let _ = rig.event(0, Event::StoreFailed);
    let failed = |frame: &Vec<u8>| matches!(decode(frame), Reply::Failure { code: ErrorCode::StoreFailed, .. });
    assert!(rig.told(bob).iter().any(failed));
}

#[test]
fn what_does_not_exist_or_is_not_theirs_is_refused() {
    for shards in [1, 3] {
        let mut rig = Rig::new(shards, |_| ());
        let (ann, bob, eve) = (rig.login("ann", 1), rig.login("bob", 1), rig.login("eve", 1));
        let id = direct("ann", "bob");
        rig.send(ann, "bob", 1, b"hello");
        assert_eq!(rig.code(bob, read(id, 2)), Some(ErrorCode::BadRequest), "there is no message 2");
        assert_eq!(rig.code(bob, read(direct("bob", "eve"), 1)), Some(ErrorCode::NoSuchConversation));
        assert_eq!(rig.code(eve, read(id, 1)), Some(ErrorCode::NoSuchConversation));
        let asked =
            |seq| Request::Chat(ChatRequest::Receipts { conversation: id, seq: Seq(seq), cursor: "", limit: 0 });
        assert_eq!(rig.code(eve, asked(1)), Some(ErrorCode::NoSuchConversation));
        assert_eq!(rig.code(ann, asked(2)), Some(ErrorCode::NoSuchMessage));
        assert_eq!(rig.code(ann, asked(0)), Some(ErrorCode::BadRequest));
        assert!(is_done(&rig.ask(bob, read(id, 1))));
        rig.send(ann, "bob", 2, b"hello");
        assert!(is_done(&rig.ask(bob, read(id, 2))), "what came since the row was read counts");
    }
}

#[test]
fn a_chat_with_oneself_has_no_receipts_but_what_is_read() {
    let mut rig = Rig::new(1, |_| ());
    let (phone, desk) = (rig.login("ann", 1), rig.login("ann", 2));
    let id = direct("ann", "ann");
    rig.send(phone, "ann", 1, b"note");
    rig.ask(desk, ack(id, 1));
    rig.pass(2_500);
    assert!(news(&mut rig, phone).is_empty());
    assert!(is_done(&rig.ask(desk, read(id, 1))));
    assert_eq!(news(&mut rig, phone), [("ann".to_owned(), "ann".to_owned(), 1, 1)]);
    assert_eq!(list(&mut rig, phone, id, 1), (0, 0, 0, vec![]));
}

#[test]
fn a_device_that_reads_too_slowly_goes_without_news() {
    let mut rig = Rig::new(1, |config| config.outbox_bytes_max = 4_096);
    let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
    let id = direct("ann", "bob");
    for client_seq in 1..=3 {
        rig.send(ann, "bob", client_seq, b"hello");
    }
    rig.reading = false;
    // Its outbox fills with answers, until it has no room for pages.
    while rig.code(ann, Request::Online { cursor: "", limit: 0 }).is_none() {}
    assert!(is_done(&rig.ask(bob, read(id, 3))));
    assert!(news(&mut rig, ann).is_empty());
    assert_eq!(rig.shards[0].0.counters().receipts_untold, 1);
}
