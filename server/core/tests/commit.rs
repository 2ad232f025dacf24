//! What follows a commit that holds many messages: every send is answered, and every device gets every message once and in
//! order, however the messages of senders and conversations lie among each other.

mod rig;

use std::collections::BTreeMap;

use rig::{At, Rig, decode, direct, durable};
use ringline_core::event::{CloseReason, Event};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::message::{Fetch, Reply, Request};

/// By conversation: the seqs that a connection was acknowledged, and those it was given with their bodies.
type Told = BTreeMap<ConversationId, (Vec<u64>, Vec<(u64, String)>)>;

fn told(rig: &mut Rig, at: At) -> Told {
    let mut told = Told::new();
    for frame in rig.told(at) {
        match decode(&frame) {
            Reply::SendAck(ack) => {
                assert!(!ack.dup);
                told.entry(ack.conversation).or_default().0.push(ack.seq.0);
            }
            Reply::Deliver(message) => {
                let body = String::from_utf8(message.body.to_vec()).unwrap();
                told.entry(message.conversation).or_default().1.push((message.seq.0, body));
            }
            _ => {}
        }
    }
    told
}

/// Sends that nobody hears of before [`Rig::commit`].
fn send(rig: &mut Rig, at: At, (to, client_seq): (&str, u64)) {
    let body = format!("{to} {client_seq}");
    let told = rig.ask(at, Request::Send(durable(to, client_seq, body.as_bytes())));
    assert!(told.is_empty(), "nothing is told before the commit");
}

#[test]
fn every_message_of_a_commit_is_answered_and_given_once_and_in_order() {
    for shards in [1, 4] {
        let mut rig = Rig::new(shards, |_| ());
        let [ann, other] = [1, 2].map(|device| rig.login("ann", device));
        let [bob, cat] = ["bob", "cat"].map(|user| rig.login(user, 1));
        // Conversations, filters and permits are in memory from here on.
        for (number, to) in (1..).zip(["bob", "cat", "ann"]) {
            assert_eq!(rig.send(ann, to, number, b"hello"), Seq(1));
        }
        assert_eq!(rig.send(bob, "ann", 1, b"hello"), Seq(2));
        for at in [ann, other, bob, cat] {
            rig.told(at);
        }
        rig.committing = false;
        for (number, to) in (10..).zip(["bob", "bob", "bob", "cat", "cat", "ann", "ann", "bob", "cat", "bob"]) {
            send(&mut rig, ann, (to, number));
        }
        send(&mut rig, bob, ("ann", 20));
        send(&mut rig, bob, ("ann", 21));
        send(&mut rig, ann, ("bob", 30));
        rig.commit();

        let bodies = |to: &str, numbers: &[u64]| numbers.iter().map(|number| format!("{to} {number}")).collect();
        let given = |first: u64, bodies: Vec<String>| (first..).zip(bodies).collect::<Vec<_>>();
        let to_bob: Vec<String> = bodies("bob", &[10, 11, 12, 17, 19]);
        let (to_cat, to_ann): (Vec<String>, Vec<String>) = (bodies("cat", &[13, 14, 18]), bodies("ann", &[15, 16]));
        let (pair, cats, own) = (direct("ann", "bob"), direct("ann", "cat"), direct("ann", "ann"));
        let from_bob = given(8, bodies("ann", &[20, 21]));
        let last = (10, "bob 30".to_owned());

        let heard = told(&mut rig, ann);
        assert_eq!(heard[&pair], ((3..=7).chain([10]).collect(), from_bob.clone()), "{shards} shards");
        assert_eq!(heard[&cats], ((2..=4).collect(), vec![]));
        assert_eq!(heard[&own], ((2..=3).collect(), given(2, to_ann.clone())));
        // The other device has what was said in its user's name and to it, in one order.
        let heard = told(&mut rig, other);
        let all: Vec<_> = given(3, to_bob.clone()).into_iter().chain(from_bob).chain([last.clone()]).collect();
        let mut seen = heard[&pair].1.clone();
        if shards > 1 {
            // Copies and deliveries come by different ways when sender and conversation live apart.
            seen.sort();
        }
        assert_eq!((heard[&pair].0.len(), seen), (0, all));
        assert_eq!(heard[&cats], (vec![], given(2, to_cat.clone())));
        assert_eq!(heard[&own], (vec![], given(2, to_ann)));
        let heard = told(&mut rig, bob);
        let to_bob: Vec<_> = given(3, to_bob).into_iter().chain([last]).collect();
        assert_eq!(heard[&pair], (vec![8, 9], to_bob));
        assert_eq!(told(&mut rig, cat)[&cats], (vec![], given(2, to_cat)));
    }
}

#[test]
fn a_device_that_comes_before_the_commit_gets_what_its_user_said() {
    let mut rig = Rig::new(1, |_| ());
    let [ann, bob] = ["ann", "bob"].map(|user| rig.login(user, 1));
    rig.send(ann, "bob", 1, b"hello");
    rig.told(bob);
    rig.committing = false;
    send(&mut rig, ann, ("bob", 2));
    let pair = direct("ann", "bob");
    let other = rig.login("ann", 2);
    rig.commit();
    assert_eq!(told(&mut rig, ann)[&pair], (vec![2], vec![]));
    let copy = vec![(2, "bob 2".to_owned())];
    assert_eq!(told(&mut rig, other)[&pair], (vec![], copy.clone()));
    assert_eq!(told(&mut rig, bob)[&pair], (vec![], copy));
}

#[test]
fn who_is_left_alone_of_two_devices_still_hears_what_it_should() {
    let mut rig = Rig::new(1, |_| ());
    let [ann, other] = [1, 2].map(|device| rig.login("ann", device));
    let bob = rig.login("bob", 1);
    rig.send(ann, "bob", 1, b"hello");
    rig.leave(ann);
    rig.told(other);
    rig.send(other, "bob", 1, b"again");
    let again = rig.login("ann", 1);
    rig.send(again, "bob", 2, b"third");
    let pair = direct("ann", "bob");
    assert_eq!(told(&mut rig, other)[&pair].1, [(3, "third".to_owned())]);
    let bodies = ["hello", "again", "third"].map(str::to_owned);
    assert_eq!(told(&mut rig, bob)[&pair].1, (1..).zip(bodies).collect::<Vec<_>>());
}

/// A shard whose clients may have 4 KiB waiting, and ann's sends to bob on their way to the disk.
fn sent_before_the_commit(count: u64) -> (Rig, [At; 2]) {
    let mut rig = Rig::new(1, |config| config.outbox_bytes_max = 4_096);
    let [ann, bob] = ["ann", "bob"].map(|user| rig.login(user, 1));
    rig.send(ann, "bob", 1, b"hello");
    rig.told(bob);
    rig.committing = false;
    (2..=count).for_each(|number| send(&mut rig, ann, ("bob", number)));
    (rig, [ann, bob])
}

#[test]
fn what_does_not_fit_of_a_commit_is_told_as_missed() {
    let (mut rig, [ann, bob]) = sent_before_the_commit(60);
    rig.commit();
    let pair = direct("ann", "bob");
    assert_eq!(told(&mut rig, ann)[&pair].0, (2..=60).collect::<Vec<_>>());
    let frames = rig.told(bob);
    let mut next = 2;
    let mut bytes = 0;
    for frame in &frames[..frames.len() - 1] {
        let Reply::Deliver(message) = decode(frame) else { panic!() };
        assert!(bytes < 4_096, "given beyond what may wait");
        (bytes, next) = (bytes + frame.len(), next + u64::from(message.seq == Seq(next)));
    }
    assert!(bytes >= 4_096 && next == frames.len() as u64 + 1, "all that fits, in order: {next}");
    let Some(Reply::Lagged { with: "ann", from, to, .. }) = frames.last().map(|frame| decode(frame)) else { panic!() };
    assert_eq!((from, to), (Seq(next), Seq(60)));
    let counters = rig.shards[0].0.counters();
    assert_eq!((counters.delivered, counters.dropped_durable), (next - 1, 61 - next));
}

#[test]
fn who_does_not_read_answers_is_closed_in_the_middle_of_a_commit() {
    let (mut rig, [ann, bob]) = sent_before_the_commit(60);
    rig.reading = false;
    let mut waiting = 0;
    while waiting < 5_000 {
        waiting += rig.ask(ann, Request::Ping { stamp: 1 }).iter().map(Vec::len).sum::<usize>();
    }
    rig.commit();
    let frames = rig.told(ann);
    for (frame, seq) in frames.iter().zip(2..) {
        assert!(matches!(decode(frame), Reply::SendAck(ack) if ack.seq == Seq(seq)));
        assert!(waiting <= 2 * 4_096, "answered beyond what may wait");
        waiting += frame.len();
    }
    assert!(frames.len() < 59 && waiting > 2 * 4_096);
    assert_eq!(rig.closed, [(ann, CloseReason::Error(ErrorCode::SlowReader))]);
    let unanswered = rig.shards[0].0.counters().orphaned_answers as usize;
    assert_eq!(frames.len() + 1 + unanswered, 59, "the one that closed it, and those after it");
    assert!(!rig.told(bob).is_empty(), "what is on the disk is given");
}

#[test]
fn what_a_database_that_is_away_did_not_answer_is_asked_again() {
    let mut rig = Rig::new(1, |_| ());
    let (ann, _) = (rig.login("ann", 1), rig.login("bob", 1));
    rig.send(ann, "bob", 1, b"x");
    let asks = || {
        let fetch = Fetch { with: "bob", after: Seq(0), before: None, limit: 1, newest: false };
        [Request::Fetch(fetch), Request::Conversations { cursor: ConversationId(0), limit: 1 }]
    };
    for (away, code) in [(true, ErrorCode::Unavailable), (false, ErrorCode::Internal)] {
        let _ = rig.event(0, Event::StoreAway { away });
        for request in asks() {
            rig.holding = true;
            assert!(rig.ask(ann, request).is_empty());
            rig.fail();
            let told = rig.told(ann);
            assert!(matches!(decode(&told[0]), Reply::Failure { code: found, .. } if found == code), "{away}");
        }
    }
}
