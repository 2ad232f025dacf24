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

type Row = (String, bool, u64, String);

fn rows(users: &[chat::PresenceRow<'_>]) -> Vec<Row> {
    let mut rows: Vec<Row> =
        users.iter().map(|row| (row.user.to_owned(), row.online, row.last_seen_ms, row.status.to_owned())).collect();
    rows.sort();
    rows
}

/// Watches, and tells how everyone is.
fn watch(town: &mut Town, seat: Seat, users: &[&str]) -> Vec<Row> {
    town.told(seat);
    town.chat(seat, ChatRequest::Watch { users: users.into() });
    let told = town.told(seat);
    assert_eq!(told.len(), 1);
    match decode(&told[0]) {
        Reply::Chat(ChatReply::PresenceOk { users }) => rows(&users),
        other => panic!("{other:?}"),
    }
}

/// The pushes of presence since the last look, each as one list.
fn changes(town: &mut Town, seat: Seat) -> Vec<Vec<Row>> {
    let list = |frame: &Vec<u8>| match decode(frame) {
        Reply::Chat(ChatReply::PresenceChanged { users }) => Some(rows(&users)),
        _ => None,
    };
    town.told(seat).iter().filter_map(list).collect()
}

#[test]
fn who_watches_hears_of_coming_going_and_status_at_most_once_a_second() {
    for shards in SHARD_COUNTS {
        let mut town = Town::new(shards, |_| ());
        let (ann, other) = (town.login("ann"), town.login("eve"));
        let bob = town.login("bob");
        let seen = watch(&mut town, ann, &["bob", "carl", "bob"]);
        assert_eq!(seen, [("bob".into(), true, 0, String::new()), ("carl".into(), false, 0, String::new())]);
        town.expect(bob, ChatRequest::PresenceSet { status: Some("one"), visible: None }, None);
        town.expect(bob, ChatRequest::PresenceSet { status: Some("two"), visible: None }, None);
        let _carl = town.login("carl");
        town.pass(limits::PRESENCE_INTERVAL_MS);
        let told = changes(&mut town, ann);
        let merged: Vec<_> = told.iter().flatten().cloned().collect();
        assert!(told.len() <= usize::from(shards), "one push a shard of theirs: {told:?}");
        assert!(merged.contains(&("bob".into(), true, 0, "two".into())), "{merged:?}");
        assert!(merged.contains(&("carl".into(), true, 0, String::new())), "{merged:?}");
        assert_eq!(merged.len(), 2);
        let left_ms = town.now.unix_ms;
        town.leave(bob);
        town.pass(limits::PRESENCE_INTERVAL_MS);
        assert_eq!(changes(&mut town, ann), [[("bob".into(), false, left_ms, "two".into())]]);
        town.pass(5_000);
        assert!(changes(&mut town, ann).is_empty(), "nothing changes, nothing is told");
        assert!(changes(&mut town, other).is_empty(), "who does not watch hears nothing");
        town.expect(ann, ChatRequest::Unwatch { users: ["bob"][..].into() }, None);
        town.login("bob");
        town.pass(limits::PRESENCE_INTERVAL_MS);
        assert!(changes(&mut town, ann).is_empty());
    }
}

#[test]
fn who_is_not_visible_or_blocks_the_watcher_looks_away() {
    for shards in SHARD_COUNTS {
        let mut town = Town::new(shards, |_| ());
        let (ann, bob, carl) = (town.login("ann"), town.login("bob"), town.login("carl"));
        let nothing = |user: &str| -> Row { (user.to_owned(), false, 0, String::new()) };
        town.expect(bob, ChatRequest::PresenceSet { status: Some("here"), visible: None }, None);
        watch(&mut town, ann, &["bob"]);
        watch(&mut town, carl, &["bob"]);
        town.expect(bob, ChatRequest::Block { user: "ann" }, None);
        town.pass(limits::PRESENCE_INTERVAL_MS);
        assert_eq!(changes(&mut town, ann).pop(), Some(vec![nothing("bob")]));
        assert_eq!(watch(&mut town, carl, &["bob"]), [("bob".into(), true, 0, "here".into())]);
        town.expect(bob, ChatRequest::PresenceSet { status: None, visible: Some(false) }, None);
        assert_eq!(watch(&mut town, carl, &["bob"]), [nothing("bob")]);
        let online = |town: &mut Town, seat: Seat| {
            let (mut names, mut cursor) = (Vec::new(), String::new());
            loop {
                town.ask(seat, Request::Online { cursor: &cursor, limit: 0 });
                let told = town.told(seat);
                let Reply::OnlineOk { users, next } = decode(told.last().unwrap()) else { panic!() };
                names.extend(users.iter().map(|row| row.user.to_owned()));
                if next.is_empty() {
                    return names;
                }
                next.clone_into(&mut cursor);
            }
        };
        assert!(!online(&mut town, carl).contains(&"bob".to_owned()));
        town.restart(shards);
        let (carl, bob) = (town.login("carl"), town.login("bob"));
        assert!(!online(&mut town, carl).contains(&"bob".to_owned()), "it is on disk");
        assert_eq!(watch(&mut town, carl, &["bob"]), [nothing("bob")]);
        town.expect(bob, ChatRequest::PresenceSet { status: None, visible: Some(true) }, None);
        assert!(online(&mut town, carl).contains(&"bob".to_owned()));
        assert_eq!(watch(&mut town, carl, &["bob"]), [("bob".into(), true, 0, "here".into())]);
    }
}

#[test]
fn lost_news_of_presence_is_told_by_the_next_refresh() {
    let mut town = Town::new(5, |config| config.idle_timeout_ms = 600_000);
    let users: Vec<String> = (0..20).map(|n| format!("user-{n}")).collect();
    let names: Vec<&str> = users.iter().map(String::as_str).collect();
    let ann = town.login("ann");
    watch(&mut town, ann, &names);
    town.drops = |message| matches!(message, ShardMessage::Social(_));
    users.iter().for_each(|user| {
        town.login(user);
    });
    town.pass(limits::PRESENCE_INTERVAL_MS);
    let here = changes(&mut town, ann).concat().len();
    assert!(here < users.len(), "news was lost");
    town.drops = |_| false;
    town.pass(31_000);
    assert_eq!(changes(&mut town, ann).concat().len(), users.len() - here);
    // Subscriptions are renewed: long after, changes are still told within a second.
    town.pass(200_000);
    town.told(ann);
    users.iter().for_each(|user| {
        town.login(user);
    });
    let bob = town.login("user-3");
    town.expect(bob, ChatRequest::PresenceSet { status: Some("still"), visible: None }, None);
    town.pass(limits::PRESENCE_INTERVAL_MS);
    assert!(changes(&mut town, ann).concat().iter().any(|row| row.3 == "still"));
}

#[test]
fn watching_and_status_are_bounded() {
    let mut town = Town::new(2, |_| ());
    let ann = town.login("ann");
    let users: Vec<String> = (0..=limits::WATCHED_MAX).map(|n| format!("user-{n}")).collect();
    let names: Vec<&str> = users.iter().map(String::as_str).collect();
    for chunk in names[..limits::WATCHED_MAX].chunks(limits::USERS_PER_REQUEST_MAX) {
        assert_eq!(watch(&mut town, ann, chunk).len(), chunk.len());
    }
    assert_eq!(watch(&mut town, ann, &names[..1]).len(), 1, "watched already");
    let request = |names| ChatRequest::Watch { users: names };
    town.expect(ann, request(names[limits::WATCHED_MAX..].into()), Some(ErrorCode::TooManyWatched));
    town.expect(ann, request(names[..=limits::USERS_PER_REQUEST_MAX].into()), Some(ErrorCode::TooManyUsers));
    town.expect(ann, request(["#team"][..].into()), Some(ErrorCode::BadName));
    assert!(watch(&mut town, ann, &[]).is_empty());
    town.expect(ann, ChatRequest::Unwatch { users: names[..1].into() }, None);
    assert_eq!(watch(&mut town, ann, &names[limits::WATCHED_MAX..]).len(), 1);
    let longest = "x".repeat(limits::STATUS_BYTES_MAX);
    town.expect(ann, ChatRequest::PresenceSet { status: Some(&longest), visible: None }, None);
    let status = format!("{longest}x");
    let longer = ChatRequest::PresenceSet { status: Some(&status), visible: None };
    town.expect(ann, longer, Some(ErrorCode::TextTooLong));
}

fn notices(town: &mut Town, seat: Seat) -> Vec<(String, Vec<u8>)> {
    let notice = |frame: &Vec<u8>| match decode(frame) {
        Reply::Chat(ChatReply::Notice { from, body, .. }) => Some((from.to_owned(), body.to_vec())),
        _ => None,
    };
    town.told(seat).iter().filter_map(notice).collect()
}

#[test]
fn a_broadcast_of_an_administrator_reaches_every_device_online_and_counts_them() {
    for shards in SHARD_COUNTS {
        let root = UserName::new("root").unwrap();
        let mut town = Town::new(shards, |config| config.admins = vec![root.clone()]);
        let seats: Vec<Seat> = (0..40).map(|n| town.login(&format!("user-{n}"))).collect();
        let phone = town.login_as("user-1", 2, DeviceKind::Phone);
        let (admin, other) = (town.login("root"), town.login("Root"));
        let to = |device_kinds, body| ChatRequest::Broadcast { kind: BodyKind::Text, device_kinds, body };
        town.expect(other, to(0, b"hi"), Some(ErrorCode::NotAllowed));
        let counted = |town: &mut Town, request: ChatRequest<'_>| {
            town.told(admin);
            town.chat(admin, request);
            town.pass(100);
            let told = town.told(admin);
            told.iter().find_map(|frame| match decode(frame) {
                Reply::Chat(ChatReply::BroadcastOk { devices }) => Some(devices),
                _ => None,
            })
        };
        assert_eq!(counted(&mut town, to(0, b"down at noon")), Some(43));
        let everyone: Vec<Seat> = seats.iter().copied().chain([phone, other]).collect();
        for seat in everyone {
            assert_eq!(notices(&mut town, seat), [("root".to_owned(), b"down at noon".to_vec())]);
        }
        assert_eq!(counted(&mut town, to(1 << DeviceKind::Phone as u32, b"phones")), Some(1));
        assert_eq!(notices(&mut town, phone).len(), 1);
        assert!(notices(&mut town, seats[1]).is_empty());
        let body = vec![0; 64 * 1024];
        town.expect(admin, to(0, &body), Some(ErrorCode::BodyTooLarge));
    }
}

#[test]
fn so_many_broadcasts_are_under_way_at_once_and_one_that_stays_without_answers_ends() {
    let root = UserName::new("root").unwrap();
    let mut town = Town::new(3, |config| config.admins = vec![root.clone()]);
    let admin = town.login("root");
    let request = ChatRequest::Broadcast { kind: BodyKind::Text, device_kinds: 0, body: b"hi" };
    (0..8).for_each(|_| town.chat(admin, request));
    town.expect(admin, request, Some(ErrorCode::Busy));
    town.drops = |message| matches!(message, ShardMessage::Social(_));
    town.pass(6_000);
    assert_eq!(codes(&mut town, admin), [ErrorCode::Internal; 8]);
}
