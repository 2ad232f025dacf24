//! Receipts, RECEIPTS and SYNC over groups.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::chat::Sync;
use ringline_schema::message::*;

use crate::town::{Seat, Town, decode, name};
use crate::{TEAM, join, team};

const SHARD_COUNTS: [u16; 3] = [1, 2, 5];

fn id() -> ConversationId {
    ConversationId::group(&name(TEAM))
}

fn read(town: &mut Town, seat: Seat, seq: u64) -> Option<ErrorCode> {
    let request = ChatRequest::Read { conversation: id(), seq: Seq(seq) };
    match decode(&town.answer(seat, Request::Chat(request))) {
        Reply::Chat(ChatReply::Done) => None,
        Reply::Failure { code, .. } => Some(code),
        other => panic!("{other:?}"),
    }
}

/// What a device was told of the group since the last look: delivered and read.
fn upto(town: &mut Town, seat: Seat) -> Vec<(u64, u64)> {
    let upto = |frame: &Vec<u8>| match decode(frame) {
        Reply::Chat(ChatReply::ReceiptUpto { conversation, with, user, delivered, read }) => {
            assert_eq!((conversation, with, user), (id(), TEAM, ""));
            Some((delivered.0, read.0))
        }
        _ => None,
    };
    town.told(seat).iter().filter_map(upto).collect()
}

/// Members, delivered, read, and the rows.
type Receipts = (u32, u32, u32, Vec<(String, u64, u64)>);

fn receipts(town: &mut Town, seat: Seat, seq: u64) -> Result<Receipts, ErrorCode> {
    let (mut rows, mut cursor) = (Vec::new(), String::new());
    loop {
        let request = ChatRequest::Receipts { conversation: id(), seq: Seq(seq), cursor: &cursor, limit: 2 };
        match decode(&town.answer(seat, Request::Chat(request))) {
            Reply::Chat(ChatReply::ReceiptsOk { members, delivered, read, rows: page, next }) => {
                assert!(page.len() <= 2);
                rows.extend(page.iter().map(|row| (row.user.to_owned(), row.delivered.0, row.read.0)));
                if next.is_empty() {
                    return Ok((members, delivered, read, rows));
                }
                cursor = next.to_owned();
            }
            Reply::Failure { code, .. } => return Err(code),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn who_wrote_hears_of_others_at_most_once_a_second() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, seats) = team(shards, &["bob", "cid", "dora", "emil"]);
        let ann_2 = town.login_as("ann", 2);
        town.elapse(3_000);
        for client_seq in 1..=3 {
            town.send(ann, TEAM, client_seq).unwrap();
        }
        town.told(ann);
        town.told(ann_2);
        assert_eq!(read(&mut town, seats[0], 6), None);
        assert_eq!((upto(&mut town, ann), upto(&mut town, ann_2)), (vec![(6, 6)], vec![(6, 6)]));
        for (at, seq) in [(1, 6), (2, 7), (3, 8), (0, 7)] {
            assert_eq!(read(&mut town, seats[at], seq), None);
        }
        assert!(upto(&mut town, ann).is_empty(), "not twice in a second");
        town.elapse(limits::RECEIPTS_INTERVAL_MS + 100);
        assert_eq!(upto(&mut town, ann), [(8, 8)], "the highest of all");
        assert_eq!(read(&mut town, seats[0], 8), None);
        town.elapse(3 * limits::RECEIPTS_INTERVAL_MS);
        assert!(upto(&mut town, ann).is_empty(), "all was read by somebody");
        assert!(seats.iter().all(|seat| upto(&mut town, *seat).is_empty()), "who has not written hears nothing");
        // Delivered alone, by cursors.
        town.send(seats[3], TEAM, 1).unwrap();
        town.ask(ann, Request::Ack(Ack::Upto { conversation: id(), seq: Seq(9) }));
        town.elapse(3_000);
        assert_eq!(upto(&mut town, seats[3]), [(9, 8)]);
        assert!(upto(&mut town, ann).is_empty(), "the other's message is not hers");
    }
}

#[test]
fn receipts_of_a_group_are_counted_and_listed_member_by_member() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, seats) = team(shards, &["bob", "cid", "dora"]);
        let eve = town.login("eve");
        town.send(ann, TEAM, 1).unwrap();
        town.send(ann, TEAM, 2).unwrap();
        read(&mut town, seats[0], 6);
        read(&mut town, seats[1], 5);
        town.ask(seats[2], Request::Ack(Ack::Upto { conversation: id(), seq: Seq(5) }));
        town.elapse(2_000);
        let row = |user: &str, delivered, read| (user.to_owned(), delivered, read);
        let rows = vec![row("bob", 6, 6), row("cid", 5, 5), row("dora", 5, 0)];
        assert_eq!(receipts(&mut town, ann, 5), Ok((3, 3, 2, rows.clone())));
        assert_eq!(receipts(&mut town, seats[0], 6), Ok((3, 1, 1, rows)), "not only the sender may ask");
        assert_eq!(receipts(&mut town, eve, 5), Err(ErrorCode::NoSuchConversation));
        assert_eq!(receipts(&mut town, ann, 7), Err(ErrorCode::NoSuchMessage));
        assert_eq!(receipts(&mut town, ann, 0), Err(ErrorCode::BadRequest));
        assert_eq!(read(&mut town, seats[0], 7), Some(ErrorCode::BadRequest), "there is none");
        assert_eq!(read(&mut town, eve, 1), Some(ErrorCode::NoSuchConversation));
        assert_eq!(read(&mut town, seats[0], 1), None, "nothing to do");
        town.act(seats[0], TEAM, GroupAct::Leave).unwrap();
        let (members, delivered, read, rows) = receipts(&mut town, ann, 5).unwrap();
        assert_eq!((members, delivered, read, rows.len()), (2, 2, 1, 2), "who is a member now");
        assert_eq!(receipts(&mut town, eve, 5), Err(ErrorCode::NoSuchConversation));
    }
}

/// What SYNC gives a device that says it has the group up to `after`, page by page.
fn sync(town: &mut Town, seat: Seat, after: u64, limit: u16) -> Vec<u64> {
    let places = [Place { conversation: id(), seq: Seq(after) }];
    let (mut from, mut seqs) = (Place::default(), Vec::new());
    loop {
        let request = Sync { places: places[..].into(), from, limit };
        match decode(&town.answer(seat, Request::Chat(ChatRequest::Sync(request)))) {
            Reply::Chat(ChatReply::SyncOk { messages, next }) => {
                assert!(messages.len() <= usize::from(limit));
                seqs.extend(messages.iter().map(|message| message.seq.0));
                if next == Place::default() {
                    return seqs;
                }
                from = next;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn sync_gives_of_a_group_what_its_reader_may_read_and_has_not() {
    for shards in SHARD_COUNTS {
        let (mut town, ann, seats) = team(shards, &["bob", "cid"]);
        let (bob, eve) = (seats[0], town.login("eve"));
        for client_seq in 1..=5 {
            town.send(ann, TEAM, client_seq).unwrap();
        }
        assert_eq!(sync(&mut town, bob, 0, 3), [2, 3, 4, 5, 6, 7, 8], "from the row of his joining on");
        assert_eq!(sync(&mut town, bob, 6, 1), [7, 8]);
        assert!(sync(&mut town, bob, 8, 3).is_empty() && sync(&mut town, eve, 0, 3).is_empty());
        town.ask(bob, Request::Ack(Ack::Upto { conversation: id(), seq: Seq(4) }));
        town.act(bob, TEAM, GroupAct::Leave).unwrap();
        for client_seq in 6..=7 {
            town.send(ann, TEAM, client_seq).unwrap();
        }
        town.act(bob, TEAM, join()).unwrap();
        town.send(ann, TEAM, 8).unwrap();
        town.elapse(2_000);
        assert_eq!(sync(&mut town, bob, 6, 2), [7, 8, 12, 13], "not what was written while he was out");
        let mut town = town.restarted(3);
        let bob = town.login("bob");
        assert_eq!(sync(&mut town, bob, 4, 200), [5, 6, 7, 8, 12, 13]);
    }
}

#[test]
fn who_reads_in_a_group_is_told_so_on_the_other_devices() {
    for shards in SHARD_COUNTS {
        let (mut town, owner, seats) = team(shards, &["ann-2", "bob"]);
        let (ann, bob) = (seats[0], seats[1]);
        let tablet = town.login_as("bob", 2);
        for number in 1..=3 {
            town.send(owner, TEAM, number).unwrap();
        }
        let head = town.fetch(bob, TEAM, 0).unwrap().1;
        [ann, bob, tablet].into_iter().for_each(|seat| drop(town.told(seat)));
        let own = |town: &mut Town, seat: Seat| -> Vec<u64> {
            let read = |frame: &Vec<u8>| match decode(frame) {
                Reply::Chat(ChatReply::ReceiptUpto { with: TEAM, user: "bob", read, .. }) => Some(read.0),
                _ => None,
            };
            town.told(seat).iter().filter_map(read).collect()
        };
        assert_eq!(read(&mut town, bob, head - 2), None);
        assert_eq!(read(&mut town, bob, head - 1), None);
        assert_eq!(read(&mut town, bob, head), None);
        assert_eq!(own(&mut town, tablet), [head - 2], "once a second");
        town.elapse(limits::RECEIPTS_INTERVAL_MS);
        assert_eq!(own(&mut town, tablet), [head]);
        assert_eq!(own(&mut town, ann), [0; 0], "nobody else's business");
        town.leave(tablet);
        assert_eq!(read(&mut town, bob, head), None);
        town.elapse(limits::RECEIPTS_INTERVAL_MS);
        town.told(bob);
        town.send(owner, TEAM, 4).unwrap();
        town.fetch(bob, TEAM, 0).unwrap();
        assert_eq!(read(&mut town, bob, head + 1), None);
        town.elapse(2 * limits::RECEIPTS_INTERVAL_MS);
        assert_eq!(own(&mut town, bob), [0; 0], "who has one device is told nothing");
    }
}
