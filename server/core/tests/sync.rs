//! The rules of SYNC, FETCH and the copies for a sender's other devices.

mod rig;

use rig::*;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq};
use ringline_schema::limits;
use ringline_schema::message::chat::Sync;
use ringline_schema::message::*;
use ringline_schema::record::{Record, StoredMessage};

type Seen = Vec<(ConversationId, u64)>;

/// One page: what came, and where the next begins; or the place that is truncated.
fn page(rig: &mut Rig, at: At, sync: Sync<'_>) -> Result<(Seen, Place), (ConversationId, Seq)> {
    let told = rig.ask(at, Request::Chat(ChatRequest::Sync(sync)));
    let answer = told.iter().find_map(|frame| match decode(frame) {
        Reply::Chat(ChatReply::SyncOk { messages, next }) => {
            assert!(frame.len() <= limits::FRAME_BYTES_MAX as usize, "{} bytes", frame.len());
            Some(Ok((messages.iter().map(|message| (message.conversation, message.seq.0)).collect(), next)))
        }
        Reply::Chat(ChatReply::Truncated { conversation, first }) => Some(Err((conversation, first))),
        _ => None,
    });
    answer.unwrap_or_else(|| panic!("{:?}", told.iter().map(|frame| decode(frame)).collect::<Vec<_>>()))
}

fn all(rig: &mut Rig, at: At, places: &[Place], limit: u16) -> Seen {
    let (mut seen, mut from) = (Vec::new(), Place::default());
    for _ in 0..1_000 {
        let (part, next) = page(rig, at, Sync { places: places.into(), from, limit }).unwrap();
        assert!(part.len() <= usize::from(limit.max(1)) || limit == 0);
        seen.extend(part);
        if next == Place::default() {
            return seen;
        }
        assert!(next > from, "pages rise");
        from = next;
    }
    panic!("a sync that does not end");
}

fn stored(from: &str, to: &str, seq: u64) -> Record {
    Record::from(StoredMessage {
        conversation: direct(from, to),
        seq: Seq(seq),
        from: name(from),
        to: name(to),
        device: DeviceId(1),
        client_seq: seq,
        time_ms: 1,
        kind: BodyKind::Text,
        body: bytes::Bytes::from_static(b"old"),
        extra: None,
    })
}

fn created(one: &str, other: &str) -> Record {
    let mut members = [name(one), name(other)];
    members.sort();
    Record::Conversation { conversation: direct(one, other), members, created_ms: 1 }
}

#[test]
fn everything_missed_comes_in_order_over_all_conversations_whatever_the_page() {
    for shards in [1, 3] {
        let mut rig = Rig::new(shards, |_| ());
        let bob = rig.login("bob", 1);
        rig.leave(bob);
        let mut expected = Vec::new();
        for number in 0..7 {
            let friend = format!("friend-{number}");
            let at = rig.login(&friend, 1);
            for seq in 1..=number + 1 {
                assert_eq!(rig.send(at, "bob", seq, b"hello"), Seq(seq));
                expected.push((direct(&friend, "bob"), seq));
            }
        }
        expected.sort_unstable();
        let bob = rig.login("bob", 1);
        for limit in [0, 1, 2, 5, 200] {
            assert_eq!(all(&mut rig, bob, &[], limit), expected, "{shards} shards, pages of {limit}");
        }
        // What was synced can be acknowledged, and is then not told again; a named place counts instead.
        let (id, last) = *expected.last().unwrap();
        assert_eq!(rig.code(bob, Request::Ack(Ack::Upto { conversation: id, seq: Seq(last) })), None);
        let rest: Vec<_> = expected.iter().copied().filter(|(other, _)| *other != id).collect();
        assert_eq!(all(&mut rig, bob, &[], 3), rest);
        let places: Vec<_> = rest.iter().map(|&(conversation, seq)| Place { conversation, seq: Seq(seq) }).collect();
        assert_eq!(all(&mut rig, bob, &places, 3), [], "of two places of one conversation the higher counts");
        let back = [Place { conversation: id, seq: Seq(last - 1) }];
        assert!(all(&mut rig, bob, &back, 3).contains(&(id, last)), "what was acknowledged and lost is had again");
        // The cursor survives the session: acknowledged places are written when it ends.
        rig.leave(bob);
        let bob = rig.login("bob", 1);
        assert_eq!(all(&mut rig, bob, &[], 3), rest);
        let other = rig.login("bob", 2);
        assert_eq!(all(&mut rig, other, &[], 0), expected, "another device has its own cursors");
    }
}

#[test]
fn large_bodies_make_small_pages() {
    let mut rig = Rig::new(2, |_| ());
    let ann = rig.login("ann", 1);
    let _ = rig.login("bob", 1);
    let large = vec![7; (limits::FRAME_BYTES_MAX - limits::MESSAGE_OVERHEAD_BYTES_MAX) as usize];
    for (client_seq, bytes) in [(1, 20_000), (2, large.len()), (3, large.len()), (4, 10), (5, 30_000)] {
        rig.send(ann, "bob", client_seq, &large[..bytes]);
    }
    let bob = rig.login("bob", 2);
    let expected: Vec<_> = (1..=5).map(|seq| (direct("ann", "bob"), seq)).collect();
    assert_eq!(all(&mut rig, bob, &[], 0), expected);
}

#[test]
fn what_is_not_kept_any_more_is_told_with_the_first_that_is() {
    let mut rig = Rig::new(1, |_| ());
    let mut records = vec![created("ann", "bob"), created("bob", "zoe")];
    records.extend((5..=9).map(|seq| stored("ann", "bob", seq)));
    records.extend((1..=2).map(|seq| stored("zoe", "bob", seq)));
    rig.put(&records);
    let bob = rig.login("bob", 1);
    let (ann, zoe) = (direct("ann", "bob"), direct("zoe", "bob"));
    let mut expected: Vec<_> = (5..=9).map(|seq| (ann, seq)).chain((1..=2).map(|seq| (zoe, seq))).collect();
    expected.sort_unstable();
    assert_eq!(all(&mut rig, bob, &[], 0), expected, "who has nothing misses nothing of what is gone");
    let place = |seq| [Place { conversation: ann, seq: Seq(seq) }];
    let mut ask = |seq, from| page(&mut rig, bob, Sync { places: place(seq)[..].into(), from, limit: 0 });
    let mut from = Place::default();
    let told = loop {
        match ask(3, from) {
            Ok((_, next)) if next != Place::default() => from = next,
            other => break other,
        }
    };
    assert_eq!(told, Err((ann, Seq(5))));
    let rest: Vec<_> = expected.iter().copied().filter(|(id, _)| *id >= ann).collect();
    let (seen, _) = ask(4, from).unwrap();
    assert_eq!(seen[..5], rest[..5], "from the first that is kept, it goes on");
    let fetch = Fetch { with: "ann", after: Seq(0), before: Some(Seq(7)), limit: 0, newest: false };
    let told = rig.ask(bob, Request::Fetch(fetch));
    let Reply::FetchOk { first, head, messages, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    assert_eq!((first, head, messages.len()), (Seq(5), Seq(9), 2), "a fetch tells the first that is kept");
}

#[test]
fn limits_of_a_sync() {
    let mut rig = Rig::new(1, |_| ());
    let bob = rig.login("bob", 1);
    let place = |number| Place { conversation: ConversationId(number), seq: Seq(1) };
    let places: Vec<_> = (0..=limits::SYNC_PLACES_MAX as u128).map(place).collect();
    let mut ask = |count: usize| {
        let sync = Sync { places: places[..count].into(), from: Place::default(), limit: 0 };
        rig.code(bob, Request::Chat(ChatRequest::Sync(sync)))
    };
    assert_eq!(ask(limits::SYNC_PLACES_MAX), None);
    assert_eq!(ask(limits::SYNC_PLACES_MAX + 1), Some(ErrorCode::BadRequest));
}

#[test]
fn many_conversations_without_news_take_several_pages_and_none_is_left_out() {
    let mut rig = Rig::new(1, |_| ());
    let mut records = Vec::new();
    for number in 0..300 {
        let friend = format!("friend-{number}");
        records.extend([created(&friend, "bob"), stored(&friend, "bob", 1)]);
    }
    rig.put(&records);
    let bob = rig.login("bob", 1);
    let seen = all(&mut rig, bob, &[], 0);
    assert_eq!(seen.len(), 300);
    assert!(seen.is_sorted());
}

#[test]
fn fetch_reads_both_ways() {
    let mut rig = Rig::new(2, |_| ());
    let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
    for client_seq in 1..=9 {
        rig.send(ann, "bob", client_seq, b"hello");
    }
    let mut fetch = |after, before: Option<u64>, limit, newest| {
        let fetch = Fetch { with: "ann", after: Seq(after), before: before.map(Seq), limit, newest };
        let told = rig.ask(bob, Request::Fetch(fetch));
        let Reply::FetchOk { messages, head, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
        assert_eq!(head, Seq(9));
        messages.iter().map(|message| message.seq.0).collect::<Vec<_>>()
    };
    assert_eq!(fetch(0, None, 3, false), [1, 2, 3]);
    assert_eq!(fetch(3, None, 3, false), [4, 5, 6]);
    assert_eq!(fetch(0, None, 3, true), [7, 8, 9]);
    assert_eq!(fetch(0, Some(7), 3, true), [4, 5, 6]);
    assert_eq!(fetch(4, Some(7), 9, true), [5, 6]);
    assert!(fetch(9, None, 3, false).is_empty());
}

#[test]
fn the_senders_other_devices_get_the_message_too() {
    for shards in [1, 2, 4] {
        let mut rig = Rig::new(shards, |_| ());
        let (phone, desk, bob) = (rig.login("ann", 1), rig.login("ann", 2), rig.login("bob", 1));
        rig.send(phone, "bob", 1, b"hello");
        for (at, count) in [(phone, 0), (desk, 1), (bob, 1)] {
            let told = rig.told(at);
            let delivered =
                told.iter().filter(|frame| matches!(decode(frame), Reply::Deliver(message) if message.seq == Seq(1)));
            assert_eq!(delivered.count(), count);
        }
        rig.send(phone, "ann", 2, b"to myself");
        assert!(
            rig.told(desk).iter().any(|frame| matches!(decode(frame), Reply::Deliver(message) if message.to == "ann"))
        );
    }
}
