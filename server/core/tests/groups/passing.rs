//! What is not stored and goes to a group: transient messages, signals; and delivery acknowledgements of its members.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::chat::{SIGNAL_APPLICATION, SIGNAL_TYPING};
use ringline_schema::message::*;

use crate::town::{Seat, Town, decode, name};
use crate::{TEAM, join, team};

const SHARD_COUNTS: [u16; 3] = [1, 2, 5];

fn send(class: Class, client_seq: u64, ack_timeout_ms: Option<u32>) -> Request<'static> {
    let (kind, mentions) = (BodyKind::Custom, Mentions::default());
    Request::Send(Send { to: TEAM, class, kind, client_seq, ack_timeout_ms, body: b"move", mentions })
}

fn pass(town: &mut Town, seat: Seat, client_seq: u64, ack_timeout_ms: Option<u32>) -> Result<SendAck, ErrorCode> {
    match decode(&town.answer(seat, send(Class::Transient, client_seq, ack_timeout_ms))) {
        Reply::SendAck(ack) => Ok(ack),
        Reply::Failure { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

/// Delivery numbers of transient messages since the last look.
fn passed(town: &mut Town, seat: Seat) -> Vec<u64> {
    let delivery = |frame: &Vec<u8>| match decode(frame) {
        Reply::Deliver(message) => {
            assert_eq!(
                (message.class, message.seq, message.to, message.body),
                (Class::Transient, Seq(0), TEAM, &b"move"[..])
            );
            Some(message.delivery)
        }
        other => panic!("{other:?}"),
    };
    town.told(seat).iter().filter_map(delivery).collect()
}

fn receipts(town: &mut Town, seat: Seat) -> Vec<(Outcome, u64, u64)> {
    let receipt = |frame: &Vec<u8>| match decode(frame) {
        Reply::Receipt(receipt) => Some((receipt.outcome, receipt.client_seq, receipt.device.0)),
        _ => None,
    };
    town.told(seat).iter().filter_map(receipt).collect()
}

fn signal(town: &mut Town, seat: Seat, kind: u8, body: &[u8]) -> Option<ErrorCode> {
    town.told(seat);
    town.ask(seat, Request::Chat(ChatRequest::Signal { to: TEAM, kind, body }));
    town.told(seat).iter().find_map(|frame| match decode(frame) {
        Reply::Failure { code, .. } => Some(code),
        _ => None,
    })
}

fn signals(town: &mut Town, seat: Seat) -> Vec<(String, u8)> {
    let signal = |frame: &Vec<u8>| match decode(frame) {
        Reply::Chat(ChatReply::Signalled { conversation, from, to, kind, .. }) => {
            assert_eq!((conversation, to), (ConversationId::group(&name(TEAM)), TEAM));
            Some((from.to_owned(), kind))
        }
        _ => None,
    };
    town.told(seat).iter().filter_map(signal).collect()
}

#[test]
fn a_transient_message_reaches_the_members_that_are_online_and_nobody_else() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, seats) = team(shards, &["bob", "cid", "dora"]);
        let (ann_2, bob_2, eve) = (town.login_as("ann", 2), town.login_as("bob", 2), town.login("eve"));
        let records = town.records;
        let ack = pass(&mut town, ann, 1, None).unwrap();
        assert_eq!((ack.seq, ack.conversation), (Seq(0), ConversationId(0)));
        for seat in seats.iter().copied().chain([bob_2]) {
            assert_eq!(passed(&mut town, seat), [0]);
        }
        assert!(passed(&mut town, ann).is_empty() && passed(&mut town, ann_2).is_empty() && town.told(eve).is_empty());
        assert_eq!(town.records, records, "nothing is stored");
        assert_eq!(pass(&mut town, eve, 1, None), Err(ErrorCode::NotMember));
        town.act(ann, TEAM, GroupAct::Mute { user: "bob", for_ms: 5_000 }).unwrap();
        assert_eq!(pass(&mut town, seats[0], 1, None), Err(ErrorCode::Muted));
        for seat in seats.into_iter().chain([bob_2]) {
            town.leave(seat);
        }
        assert_eq!(pass(&mut town, ann, 2, None), Err(ErrorCode::NotOnline), "the own devices are not meant");
        town.act(ann, TEAM, GroupAct::Dissolve).unwrap();
        assert_eq!(pass(&mut town, ann, 3, None), Err(ErrorCode::GroupDissolved));
    }
}

#[test]
fn a_transient_message_to_a_group_that_has_to_be_loaded_or_is_none() {
    for shards in SHARD_COUNTS {
        let (town, ..) = team(shards, &["bob"]);
        let mut town = town.restarted(shards);
        let (ann, bob) = (town.login("ann"), town.login("bob"));
        town.told(bob);
        pass(&mut town, ann, 1, None).unwrap();
        assert_eq!(passed(&mut town, bob), [0]);
        let mentions = Mentions { users: (&["bob"][..]).into(), all: false };
        let (class, kind) = (Class::Transient, BodyKind::Text);
        let send = Send { to: TEAM, class, kind, client_seq: 2, ack_timeout_ms: None, body: b"", mentions };
        let refused = town.answer(ann, Request::Send(send));
        assert!(matches!(decode(&refused), Reply::Failure { code: ErrorCode::BadRequest, .. }));
        let to_none = Send { to: "#none", mentions: Mentions::default(), ..send };
        let refused = town.answer(ann, Request::Send(to_none));
        assert!(matches!(decode(&refused), Reply::Failure { code: ErrorCode::NoSuchGroup, .. }));
        town.told(ann);
        town.ask(ann, Request::Chat(ChatRequest::Signal { to: "#none", kind: SIGNAL_TYPING, body: b"" }));
        let told = town.told(ann);
        assert!(matches!(decode(&told[0]), Reply::Failure { code: ErrorCode::NoSuchGroup, .. }));
    }
}

#[test]
fn signals_reach_the_other_members_and_repeats_are_dropped_for_a_second() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, seats) = team(shards, &["bob", "cid"]);
        let (ann_2, eve) = (town.login_as("ann", 2), town.login("eve"));
        assert_eq!(signal(&mut town, ann, SIGNAL_TYPING, b""), None);
        assert_eq!(signal(&mut town, ann, SIGNAL_TYPING, b""), None);
        assert_eq!(signal(&mut town, ann, SIGNAL_APPLICATION, b"x"), None);
        for seat in &seats {
            let wanted = [SIGNAL_TYPING, SIGNAL_APPLICATION].map(|kind| ("ann".to_owned(), kind));
            assert_eq!(signals(&mut town, *seat), wanted);
        }
        assert!(signals(&mut town, ann).is_empty() && signals(&mut town, ann_2).is_empty());
        town.elapse(limits::PRESENCE_INTERVAL_MS);
        assert_eq!(signal(&mut town, ann, SIGNAL_TYPING, b""), None);
        assert_eq!(signals(&mut town, seats[0]).len(), 1);
        assert_eq!(signal(&mut town, eve, SIGNAL_TYPING, b""), Some(ErrorCode::NotMember));
        assert_eq!(
            signal(&mut town, eve, SIGNAL_TYPING, b""),
            Some(ErrorCode::NotMember),
            "a refused one is tried again"
        );
        town.act(ann, TEAM, GroupAct::Mute { user: "bob", for_ms: 5_000 }).unwrap();
        assert_eq!(signal(&mut town, seats[0], SIGNAL_TYPING, b""), Some(ErrorCode::Muted));
    }
}

#[test]
fn the_first_device_of_another_member_that_acknowledges_is_told_once() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, seats) = team(shards, &["bob", "cid", "dora"]);
        let ann_2 = town.login_as("ann", 2);
        let id = ConversationId::group(&name(TEAM));
        let ack =
            |town: &mut Town, seat, seq| town.ask(seat, Request::Ack(Ack::Upto { conversation: id, seq: Seq(seq) }));
        town.answer(ann, send(Class::Durable, 1, Some(5_000)));
        ack(&mut town, ann_2, 5);
        assert!(receipts(&mut town, ann).is_empty(), "an own device is not meant");
        ack(&mut town, seats[1], 4);
        assert!(receipts(&mut town, ann).is_empty(), "not yet");
        ack(&mut town, seats[1], 5);
        ack(&mut town, seats[0], 5);
        assert_eq!(receipts(&mut town, ann), [(Outcome::Delivered, 1, 1)]);
        town.elapse(6_000);
        assert!(receipts(&mut town, ann).is_empty(), "once");
        town.answer(ann, send(Class::Durable, 2, Some(5_000)));
        town.elapse(6_000);
        ack(&mut town, seats[0], 6);
        assert_eq!(receipts(&mut town, ann), [(Outcome::DeliveryTimeout, 2, 0)]);
        // The same for a transient one.
        seats.iter().for_each(|seat| drop(town.told(*seat)));
        pass(&mut town, ann, 3, Some(5_000)).unwrap();
        let numbers = [0, 1, 2].map(|at| passed(&mut town, seats[at])[0]);
        assert!(numbers.iter().all(|number| *number != 0));
        for at in [2, 1, 0] {
            town.ask(seats[at], Request::Ack(Ack::Delivery(numbers[at])));
            assert!(town.told(seats[at]).is_empty(), "a second one is no error");
        }
        assert_eq!(receipts(&mut town, ann), [(Outcome::Delivered, 3, 1)]);
        pass(&mut town, ann, 4, Some(1_000)).unwrap();
        town.elapse(2_000);
        assert_eq!(receipts(&mut town, ann), [(Outcome::DeliveryTimeout, 4, 0)]);
    }
}

#[test]
fn a_transient_message_leaves_no_deadline_behind() {
    let (mut town, ann, seats) = team(3, &["bob", "cid"]);
    pass(&mut town, ann, 1, None).unwrap();
    let timers = town.levels().timers;
    for client_seq in 2..500 {
        town.pass(1);
        pass(&mut town, ann, client_seq, None).unwrap();
    }
    assert_eq!(town.levels().timers, timers, "one for all of them");
    town.elapse(6_000);
    assert!(pass(&mut town, ann, 500, None).is_ok() && passed(&mut town, seats[0]).len() == 500);
}

#[test]
fn who_joins_later_does_not_acknowledge_what_was_said_before() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, _) = team(shards, &["bob"]);
        // On whichever shard: many, of whom some are where a device of a member waits to be heard of.
        let late = ["cid", "dora", "emil", "finn", "gus", "hal"].map(|user| town.login(user));
        let ann_2 = town.login_as("ann", 2);
        let id = ConversationId::group(&name(TEAM));
        let Reply::SendAck(sent) = decode(&town.answer(ann, send(Class::Durable, 1, Some(5_000)))) else { panic!() };
        for (seat, seq) in late.into_iter().zip(sent.seq.0 + 1..) {
            assert_eq!(town.act(seat, TEAM, join()).unwrap().0, Seq(seq));
            town.ask(seat, Request::Ack(Ack::Upto { conversation: id, seq: Seq(seq) }));
        }
        town.ask(ann_2, Request::Ack(Ack::Upto { conversation: id, seq: Seq(sent.seq.0 + 1) }));
        assert!(receipts(&mut town, ann).is_empty(), "it was for bob alone");
        town.elapse(6_000);
        assert_eq!(receipts(&mut town, ann), [(Outcome::DeliveryTimeout, 1, 0)]);
    }
}

#[test]
fn nobody_is_given_anything_as_a_member_before_that_is_on_disk() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, _) = team(shards, &[]);
        let bob = town.login("bob");
        let sends = |town: &mut Town| {
            town.ask(bob, Request::Group { group: TEAM, act: join() });
            town.ask(bob, send(Class::Transient, 1, None));
            town.ask(ann, send(Class::Transient, 2, None));
            town.ask(ann, Request::Chat(ChatRequest::Signal { to: TEAM, kind: SIGNAL_APPLICATION, body: b"s" }));
        };
        town.committing = false;
        sends(&mut town);
        assert!(town.told(ann).is_empty() && town.told(bob).is_empty(), "it waits for the commit");
        let mut after = town.restarted(shards);
        let [ann_after, bob_after] = ["ann", "bob"].map(|user| after.login(user));
        assert_eq!(after.send(bob_after, TEAM, 3), Err(ErrorCode::NotMember), "the crash has undone it");
        assert_eq!(after.send(ann_after, TEAM, 3), Ok(Seq(2)));
        town.committing = true;
        town.settle();
        let moves = |told: &[Vec<u8>]| {
            let number = |frame: &Vec<u8>| match decode(frame) {
                Reply::Deliver(message) if message.class == Class::Transient => Some(message.client_seq),
                _ => None,
            };
            told.iter().filter_map(number).collect::<Vec<_>>()
        };
        let told = town.told(bob);
        assert!(matches!(decode(&told[0]), Reply::Group(GroupReply::Ok { .. })), "first that he is a member");
        assert_eq!(moves(&told), [2]);
        assert!(told.iter().any(|frame| matches!(decode(frame), Reply::Chat(ChatReply::Signalled { .. }))));
        assert_eq!(moves(&town.told(ann)), [1]);
        // Whoever goes is given nothing more, and nobody waits for long.
        town.committing = false;
        town.ask(bob, Request::Group { group: TEAM, act: GroupAct::Leave });
        town.ask(ann, send(Class::Transient, 5, None));
        town.committing = true;
        town.settle();
        assert!(moves(&town.told(bob)).is_empty());
        let told = town.told(ann);
        assert!(told.iter().any(|frame| matches!(decode(frame), Reply::Failure { code: ErrorCode::NotOnline, .. })));
    }
}
