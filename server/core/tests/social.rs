//! Signals, block lists and who may write to whom, on one shard and on several.

mod town;

use ringline_core::event::ShardMessage;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::{MessagesFrom, SIGNAL_APPLICATION, SIGNAL_TYPING};
use ringline_schema::message::*;
use town::{Seat, Town, decode};

const SHARD_COUNTS: [u16; 3] = [1, 2, 5];

fn typing(to: &str) -> ChatRequest<'_> {
    ChatRequest::Signal { to, kind: SIGNAL_TYPING, body: b"" }
}

fn signals(town: &mut Town, seat: Seat) -> usize {
    town.told(seat).iter().filter(|frame| matches!(decode(frame), Reply::Chat(ChatReply::Signalled { .. }))).count()
}

fn codes(town: &mut Town, seat: Seat) -> Vec<ErrorCode> {
    let code = |frame: &Vec<u8>| match decode(frame) {
        Reply::Failure { code, .. } => Some(code),
        _ => None,
    };
    town.told(seat).iter().filter_map(code).collect()
}

/// Pairs whose conversation lives on either side, whatever the number of shards.
fn pairs() -> Vec<(String, String)> {
    (0..12).map(|n| (format!("ann{n}"), format!("bob{n}"))).collect()
}

#[test]
fn a_signal_reaches_every_device_of_its_receiver_and_repeats_are_dropped_for_a_second() {
    for shards in SHARD_COUNTS {
        let mut town = Town::new(shards, |_| ());
        let ann = town.login("ann");
        let (one, two) = (town.login("bob"), town.login_as("bob", 2, DeviceKind::Phone));
        town.chat(ann, typing("bob"));
        let told = town.told(one);
        let Reply::Chat(ChatReply::Signalled { conversation, from, to, kind, body }) = decode(&told[0]) else {
            panic!("{told:?}")
        };
        let id = ConversationId::direct(&UserName::new("ann").unwrap(), &UserName::new("bob").unwrap());
        assert_eq!((conversation, from, to, kind, body), (id, "ann", "bob", SIGNAL_TYPING, &b""[..]));
        assert_eq!(signals(&mut town, two), 1);
        assert!(town.told(ann).is_empty(), "answered only when refused");
        town.pass(limits::PRESENCE_INTERVAL_MS - 100);
        town.chat(ann, typing("bob"));
        assert_eq!(signals(&mut town, one), 0, "the same again");
        town.chat(ann, ChatRequest::Signal { to: "bob", kind: SIGNAL_APPLICATION, body: b"1" });
        town.chat(ann, ChatRequest::Signal { to: "bob", kind: SIGNAL_APPLICATION, body: b"2" });
        assert_eq!(signals(&mut town, one), 2, "others");
        town.pass(100);
        town.chat(ann, typing("bob"));
        assert_eq!(signals(&mut town, one), 1);
    }
}

#[test]
fn signals_are_refused_by_name() {
    let mut town = Town::new(2, |_| ());
    let (ann, _bob) = (town.login("ann"), town.login("bob"));
    let long = vec![0; limits::SIGNAL_BYTES_MAX + 1];
    let signal = |to, kind, body| ChatRequest::Signal { to, kind, body };
    for (request, code) in [
        (signal("bob", 0, b""), ErrorCode::BadRequest),
        (signal("bob", SIGNAL_APPLICATION - 1, b""), ErrorCode::BadRequest),
        (signal("bob", SIGNAL_APPLICATION, &long), ErrorCode::BodyTooLarge),
        (signal(" ", SIGNAL_TYPING, b""), ErrorCode::BadName),
        (signal("carl", SIGNAL_TYPING, b""), ErrorCode::NotOnline),
    ] {
        town.expect(ann, request, Some(code));
    }
    town.expect(ann, typing("carl"), Some(ErrorCode::NotOnline));
    town.chat(ann, signal("bob", SIGNAL_APPLICATION, &long[1..]));
    assert!(codes(&mut town, ann).is_empty(), "as long as it may be");
}

#[test]
fn who_is_blocked_is_told_so_whatever_they_send() {
    for shards in SHARD_COUNTS {
        let mut town = Town::new(shards, |_| ());
        for (a, b) in pairs() {
            let (ann, bob) = (town.login(&a), town.login(&b));
            town.send(ann, &b, Class::Durable, 1).unwrap();
            town.expect(bob, ChatRequest::Block { user: &a }, None);
            assert_eq!(town.send(ann, &b, Class::Durable, 2), Err(ErrorCode::Blocked));
            assert_eq!(town.send(ann, &b, Class::Transient, 3), Err(ErrorCode::Blocked));
            town.expect(ann, typing(&b), Some(ErrorCode::Blocked));
            assert!(town.send(ann, &b, Class::Durable, 1).unwrap().dup, "what was accepted before is still known");
            town.send(bob, &a, Class::Durable, 1).unwrap();
            town.expect(bob, ChatRequest::Unblock { user: &a }, None);
            assert_eq!(town.send(ann, &b, Class::Durable, 2).unwrap().seq.0, 3, "the refused number is free");
            town.send(ann, &b, Class::Transient, 4).unwrap();
            town.chat(ann, typing(&b));
            assert!(codes(&mut town, ann).is_empty());
        }
    }
}

#[test]
fn a_stranger_can_be_blocked_before_the_first_word_and_while_the_user_is_away() {
    for shards in SHARD_COUNTS {
        let mut town = Town::new(shards, |_| ());
        for (a, b) in pairs() {
            let (ann, bob) = (town.login(&a), town.login(&b));
            town.expect(bob, ChatRequest::Block { user: &a }, None);
            town.leave(bob);
            assert_eq!(town.send(ann, &b, Class::Durable, 1), Err(ErrorCode::Blocked));
        }
        town.restart(3);
        for (a, b) in pairs() {
            let ann = town.login(&a);
            assert_eq!(town.send(ann, &b, Class::Durable, 1), Err(ErrorCode::Blocked), "it is on disk");
            let bob = town.login(&b);
            town.expect(bob, ChatRequest::Unblock { user: &a }, None);
            town.pass(1_000);
            town.send(ann, &b, Class::Durable, 1).unwrap();
        }
    }
}

#[test]
fn news_of_a_block_that_is_lost_is_not_answered_as_done_and_mends_itself() {
    let mut town = Town::new(5, |_| ());
    let lost: Vec<_> = pairs()
        .into_iter()
        .filter(|(a, b)| {
            let id = ConversationId::direct(&UserName::new(a).unwrap(), &UserName::new(b).unwrap());
            let owner = id.partition() == UserName::new(a).unwrap().partition();
            owner && town.shard_of(a) != town.shard_of(b)
        })
        .collect();
    assert!(!lost.is_empty(), "some conversations live with who is blocked");
    for (a, b) in lost {
        let (ann, bob) = (town.login(&a), town.login(&b));
        town.send(ann, &b, Class::Durable, 1).unwrap();
        town.told(bob);
        town.drops = |message| matches!(message, ShardMessage::Social(_));
        town.chat(bob, ChatRequest::Block { user: &a });
        assert!(town.told(bob).is_empty());
        town.send(ann, &b, Class::Durable, 2).unwrap();
        town.pass(5_000);
        assert_eq!(codes(&mut town, bob), [ErrorCode::Internal], "no silence");
        town.pass(25_000);
        assert_eq!(town.send(ann, &b, Class::Durable, 3), Err(ErrorCode::Blocked), "asked again");
        town.drops = |_| false;
    }
}

#[test]
fn who_may_write_is_the_receivers_choice() {
    for shards in SHARD_COUNTS {
        let mut town = Town::new(shards, |_| ());
        for (a, b) in pairs() {
            let (ann, bob) = (town.login(&a), town.login(&b));
            let privacy = |from| ChatRequest::Privacy { messages_from: Some(from) };
            town.send(ann, &b, Class::Durable, 1).unwrap();
            town.expect(bob, privacy(MessagesFrom::Known), None);
            assert_eq!(town.send(ann, &b, Class::Durable, 2), Err(ErrorCode::NotAccepted));
            assert_eq!(town.send(ann, &b, Class::Transient, 3), Err(ErrorCode::NotAccepted));
            town.expect(ann, typing(&b), Some(ErrorCode::NotAccepted));
            town.send(bob, &a, Class::Durable, 1).unwrap();
            town.send(ann, &b, Class::Durable, 2).unwrap();
            town.send(ann, &b, Class::Transient, 4).unwrap();
            town.expect(bob, privacy(MessagesFrom::Nobody), None);
            assert_eq!(town.send(ann, &b, Class::Durable, 5), Err(ErrorCode::NotAccepted));
            assert_eq!(town.send(ann, &b, Class::Transient, 6), Err(ErrorCode::NotAccepted));
            town.send(bob, &b, Class::Durable, 2).unwrap();
            town.expect(bob, privacy(MessagesFrom::Anyone), None);
            town.send(ann, &b, Class::Durable, 5).unwrap();
        }
    }
}

#[test]
fn whom_a_user_has_written_to_is_known_after_a_restart() {
    let mut town = Town::new(2, |_| ());
    for (a, b) in pairs() {
        let (ann, bob) = (town.login(&a), town.login(&b));
        town.send(bob, &a, Class::Durable, 1).unwrap();
        town.expect(bob, ChatRequest::Privacy { messages_from: Some(MessagesFrom::Known) }, None);
        let _ = ann;
    }
    town.restart(5);
    for (a, b) in pairs() {
        let (ann, bob) = (town.login(&a), town.login(&b));
        town.send(ann, &b, Class::Transient, 1).unwrap();
        town.send(ann, &b, Class::Durable, 2).unwrap();
        let stranger = town.login(&format!("{a}'s friend"));
        assert_eq!(town.send(stranger, &b, Class::Durable, 1), Err(ErrorCode::NotAccepted));
        let _ = bob;
    }
}

#[test]
fn the_block_list_is_paged_and_bounded() {
    let mut town = Town::new(2, |_| ());
    let ann = town.login("ann");
    town.expect(ann, ChatRequest::Block { user: "ann" }, Some(ErrorCode::BadRequest));
    town.expect(ann, ChatRequest::Block { user: "" }, Some(ErrorCode::BadName));
    town.expect(ann, ChatRequest::Unblock { user: "nobody" }, None);
    for n in 0..limits::BLOCKS_MAX {
        town.expect(ann, ChatRequest::Block { user: &format!("user-{n:04}") }, None);
    }
    town.expect(ann, ChatRequest::Block { user: "one more" }, Some(ErrorCode::TooManyBlocks));
    town.expect(ann, ChatRequest::Block { user: "user-0007" }, None);
    town.restart(1);
    let ann = town.login("ann");
    town.expect(ann, ChatRequest::Block { user: "one more" }, Some(ErrorCode::TooManyBlocks));
    let (mut listed, mut cursor) = (Vec::new(), String::new());
    loop {
        town.chat(ann, ChatRequest::Blocks { cursor: &cursor, limit: 64 });
        let told = town.told(ann);
        let Reply::Chat(ChatReply::BlocksOk { users, next, messages_from }) = decode(&told[0]) else { panic!() };
        assert_eq!(messages_from, MessagesFrom::Anyone);
        assert!(users.len() <= 64);
        listed.extend(users.iter().map(|user| (*user).to_owned()));
        if next.is_empty() {
            break;
        }
        next.clone_into(&mut cursor);
    }
    let expected: Vec<_> = (0..limits::BLOCKS_MAX).map(|n| format!("user-{n:04}")).collect();
    assert_eq!(listed, expected);
}
