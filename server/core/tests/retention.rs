//! What clients see of messages that retention has let go: FETCH, SYNC, the conversation list, and what comes after.

mod rig;

use rig::*;
use ringline_schema::ids::{ConversationId, DeviceId, Seq};
use ringline_schema::message::chat::Sync;
use ringline_schema::message::*;
use ringline_schema::record::{Record, StoredMessage};

const HEAD: u64 = 9;

/// A node in which ann has written to bob, and everything below `floor` is let go.
fn kept_from(shards: u16, floor: u64) -> (Rig, At) {
    let mut rig = Rig::new(shards, |_| ());
    let members = [name("ann"), name("bob")];
    let mut records = vec![Record::Conversation { conversation: direct("ann", "bob"), members, created_ms: 1 }];
    records.extend((1..=HEAD).map(|seq| {
        Record::from(StoredMessage {
            conversation: direct("ann", "bob"),
            seq: Seq(seq),
            from: name("ann"),
            to: name("bob"),
            device: DeviceId(1),
            client_seq: seq,
            time_ms: 1_000 + seq,
            kind: BodyKind::Text,
            body: bytes::Bytes::from_static(b"old"),
            extra: None,
        })
    }));
    rig.put(&records);
    rig.shards[0].1.let_go(direct("ann", "bob"), Seq(floor));
    let bob = rig.login("bob", 1);
    (rig, bob)
}

/// The seqs of a page, or the first that is kept.
fn fetch(rig: &mut Rig, at: At, (after, before, newest): (u64, Option<u64>, bool)) -> Result<Vec<u64>, Seq> {
    let fetch = Fetch { with: "ann", after: Seq(after), before: before.map(Seq), limit: 0, newest };
    let told = rig.ask(at, Request::Fetch(fetch));
    match decode(&told[0]) {
        Reply::FetchOk { messages, .. } => Ok(messages.iter().map(|message| message.seq.0).collect()),
        Reply::Chat(ChatReply::Truncated { conversation, first }) => {
            assert_eq!(conversation, direct("ann", "bob"));
            Err(first)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_fetch_below_the_first_is_truncated_from_both_ends_and_exactly_there() {
    for shards in [1, 3] {
        let (mut rig, bob) = kept_from(shards, 5);
        let all: Vec<_> = (5..=HEAD).collect();
        for (asked, wanted) in [
            ((0, None, false), Ok(all.clone())),
            ((1, None, false), Err(Seq(5))),
            ((3, None, false), Err(Seq(5))),
            ((3, Some(5), false), Err(Seq(5))),
            ((4, None, false), Ok(all.clone())),
            ((5, None, false), Ok(all[1..].to_vec())),
            ((0, None, true), Ok(all.clone())),
            ((0, Some(6), true), Ok(vec![5])),
            ((0, Some(5), true), Err(Seq(5))),
            ((0, Some(1), true), Err(Seq(5))),
            ((3, Some(7), true), Ok(vec![5, 6])),
        ] {
            assert_eq!(fetch(&mut rig, bob, asked), wanted, "{shards} shards: {asked:?}");
        }
        let (mut rig, bob) = kept_from(shards, 1);
        assert_eq!(fetch(&mut rig, bob, (0, Some(1), true)), Ok(vec![]), "nothing was let go");
        assert_eq!(fetch(&mut rig, bob, (1, None, false)), Ok((2..=HEAD).collect()));
    }
}

#[test]
fn a_conversation_of_which_nothing_is_kept_is_listed_and_goes_on() {
    for shards in [1, 3] {
        let (mut rig, bob) = kept_from(shards, HEAD + 1);
        let told = rig.ask(bob, Request::Conversations { cursor: ConversationId(0), limit: 0 });
        let Reply::ConversationsOk { conversations, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
        let row = &conversations[0];
        assert_eq!((row.first, row.head, row.last.is_none()), (Seq(HEAD + 1), Seq(HEAD), true));
        assert_eq!(fetch(&mut rig, bob, (0, None, false)), Ok(vec![]));
        assert_eq!(fetch(&mut rig, bob, (0, None, true)), Ok(vec![]));
        assert_eq!(fetch(&mut rig, bob, (HEAD, None, false)), Ok(vec![]));
        assert_eq!(fetch(&mut rig, bob, (HEAD - 1, None, false)), Err(Seq(HEAD + 1)));
        let id = direct("ann", "bob");
        let sync = |rig: &mut Rig, seq| {
            let places = [Place { conversation: id, seq: Seq(seq) }];
            let sync = Sync { places: places[..].into(), from: Place::default(), limit: 0 };
            let told = rig.ask(bob, Request::Chat(ChatRequest::Sync(sync)));
            match decode(&told[0]) {
                Reply::Chat(ChatReply::SyncOk { messages, .. }) => {
                    Ok(messages.iter().map(|message| message.seq.0).collect::<Vec<_>>())
                }
                Reply::Chat(ChatReply::Truncated { first, .. }) => Err(first),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(sync(&mut rig, 3), Err(Seq(HEAD + 1)));
        assert_eq!(sync(&mut rig, HEAD), Ok(vec![]));
        let ann = rig.login("ann", 1);
        assert_eq!(rig.send(ann, "bob", HEAD, b"old"), Seq(HEAD), "a repeat is still known");
        assert_eq!(rig.send(ann, "bob", HEAD + 1, b"new"), Seq(HEAD + 1));
        assert_eq!(sync(&mut rig, HEAD), Ok(vec![HEAD + 1]));
        assert_eq!(sync(&mut rig, 3), Err(Seq(HEAD + 1)));
        assert_eq!(fetch(&mut rig, bob, (0, None, false)), Ok(vec![HEAD + 1]));
    }
}

/// A message whose sender hears of its delivery or of the end of three seconds.
fn wanted(to: &str, client_seq: u64) -> Request<'_> {
    Request::Send(Send { ack_timeout_ms: Some(3_000), ..durable(to, client_seq, b"hear") })
}

/// What a sender was told since the last look of its messages, by their numbers.
fn outcomes(rig: &mut Rig, at: At) -> Vec<(u64, Outcome)> {
    let told = rig.told(at);
    let outcome = |frame: &Vec<u8>| match decode(frame) {
        Reply::Receipt(receipt) => Some((receipt.seq.0, receipt.outcome)),
        _ => None,
    };
    let mut outcomes: Vec<_> = told.iter().filter_map(outcome).collect();
    outcomes.sort_unstable_by_key(|(seq, _)| *seq);
    outcomes
}

fn ack(seq: u64) -> Request<'static> {
    Request::Ack(Ack::Upto { conversation: direct("ann", "bob"), seq: Seq(seq) })
}

fn list() -> Request<'static> {
    Request::Conversations { cursor: ConversationId(0), limit: 0 }
}

fn sync() -> Request<'static> {
    Request::Chat(ChatRequest::Sync(Sync { places: [][..].into(), from: Place::default(), limit: 0 }))
}

#[test]
fn what_was_let_go_before_its_receiver_asked_is_not_delivered_whatever_he_acknowledges() {
    use Outcome::{Delivered, DeliveryTimeout};
    let fetch = || Request::Fetch(Fetch { with: "ann", after: Seq(0), before: None, limit: 0, newest: false });
    let below = || Request::Fetch(Fetch { with: "ann", after: Seq(1), before: None, limit: 0, newest: false });
    for (shards, way) in [1, 3].into_iter().flat_map(|shards| (0..4).map(move |way| (shards, way))) {
        let mut rig = Rig::new(shards, |_| ());
        let ann = rig.login("ann", 1);
        let bob = rig.login("bob", 1);
        rig.leave(bob);
        (1..=4).for_each(|number| drop(rig.ask(ann, wanted("bob", number))));
        rig.shards[0].1.let_go(direct("ann", "bob"), Seq(3));
        let bob = rig.login("bob", 1);
        match way {
            0 => drop(rig.ask(bob, list())),
            1 => drop(rig.ask(bob, sync())),
            2 => drop(rig.ask(bob, fetch())),
            _ => {
                // Told so, then given what is there.
                let told = rig.ask(bob, below());
                assert!(matches!(decode(&told[0]), Reply::Chat(ChatReply::Truncated { .. })));
                rig.ask(bob, fetch());
            }
        }
        rig.told(ann);
        rig.ask(bob, ack(4));
        assert_eq!(outcomes(&mut rig, ann), [(3, Delivered), (4, Delivered)], "{shards} shards, way {way}");
        rig.pass(3_100);
        assert_eq!(outcomes(&mut rig, ann), [(1, DeliveryTimeout), (2, DeliveryTimeout)]);
    }
}

#[test]
fn what_was_pushed_is_delivered_and_an_ack_before_the_first_answer_counts_when_that_comes() {
    use Outcome::{Delivered, DeliveryTimeout};
    let mut rig = Rig::new(2, |_| ());
    let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
    (1..=2).for_each(|number| drop(rig.ask(ann, wanted("bob", number))));
    rig.ask(bob, ack(2));
    assert_eq!(outcomes(&mut rig, ann), [(1, Delivered), (2, Delivered)], "no answer is needed");
    rig.leave(bob);
    (3..=5).for_each(|number| drop(rig.ask(ann, wanted("bob", number))));
    rig.shards[0].1.let_go(direct("ann", "bob"), Seq(4));
    let bob = rig.login("bob", 1);
    rig.ask(ann, wanted("bob", 6));
    rig.told(ann);
    rig.ask(bob, ack(6));
    assert_eq!(outcomes(&mut rig, ann), [(6, Delivered)], "of the others nobody knows yet");
    rig.ask(bob, list());
    assert_eq!(outcomes(&mut rig, ann), [(4, Delivered), (5, Delivered)]);
    rig.pass(3_100);
    assert_eq!(outcomes(&mut rig, ann), [(3, DeliveryTimeout)]);
}

/// However many are acknowledged long before their time, no timer of theirs stays.
#[test]
fn a_delivery_that_is_acknowledged_leaves_no_deadline_behind() {
    let mut rig = Rig::new(1, |_| ());
    let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
    rig.ask(ann, wanted("bob", 1));
    rig.ask(bob, ack(1));
    rig.pass(1_500);
    let timers = rig.shards[0].0.levels().timers;
    for number in 2..200 {
        rig.ask(ann, wanted("bob", number));
        rig.ask(bob, ack(number));
    }
    assert_eq!(rig.shards[0].0.levels().delivery_waits, 0);
    let left = rig.shards[0].0.levels().timers;
    assert!(left <= timers + 3, "{left} after {timers}: cursors, receipts, and one for all deliveries");
    rig.ask(ann, wanted("bob", 200));
    rig.pass(3_100);
    assert_eq!(outcomes(&mut rig, ann).last(), Some(&(200, Outcome::DeliveryTimeout)));
}
