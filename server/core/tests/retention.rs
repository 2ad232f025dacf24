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
