//! Messages to many members: in slices, with everything else in between, and still each once and in order.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::Seq;
use ringline_schema::message::group::{JoinPolicy, What};
use ringline_schema::message::*;
use ringline_store::memory;

use crate::town::{Seat, Town, decode};
use crate::{TEAM, create, join};

/// Members of the groups here; two are visited in a slice.
const MEMBERS: usize = 20;
const SLICE_UNITS: usize = 2 * 17;
/// Over half of it nothing more of a group is under way.
const OUTBOX_BYTES: usize = 64 * 1024;

fn user(at: usize) -> String {
    format!("user-{at:02}")
}

/// Users 0 to 19 in these groups, all of them online, in order of the places that are visited on one shard.
fn crowd(shards: u16, groups: &[&str]) -> (Town, Vec<Seat>) {
    let mut town = Town::with(memory::open(shards), |config| {
        config.fan_out_at_once_max = 3;
        config.fan_out_slice_units = SLICE_UNITS;
        config.outbox_bytes_max = OUTBOX_BYTES;
    });
    let seats: Vec<_> = (0..MEMBERS).map(|at| town.login(&user(at))).collect();
    for group in groups {
        town.act(seats[0], group, create(JoinPolicy::Open)).unwrap();
        for &seat in &seats[1..] {
            town.act(seat, group, join()).unwrap();
        }
    }
    town.finish();
    seats.iter().for_each(|&seat| drop(town.told(seat)));
    (town, seats)
}

/// Numbers of the messages to a group that came since the last look, and of the ranges that are to be fetched.
fn got(town: &mut Town, seat: Seat, group: &str) -> Vec<(u64, u64)> {
    let told = town.told(seat);
    let range = |frame: &Vec<u8>| match decode(frame) {
        Reply::Deliver(message) if message.to == group => Some((message.seq.0, message.seq.0)),
        Reply::Lagged { with, from, to, .. } if with == group => Some((from.0, to.0)),
        _ => None,
    };
    told.iter().filter_map(range).collect()
}

fn numbers(seqs: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
    seqs.into_iter().map(|seq| (seq, seq)).collect()
}

#[test]
fn a_message_of_two_is_handled_between_two_slices() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    let seq = town.send(seats[0], TEAM, 1).unwrap().0;
    assert!(!town.is_quiet(), "a stop waits for it");
    assert!(seats.iter().all(|&seat| town.told(seat).is_empty()), "not before the next turn");
    town.turn();
    town.turn();
    town.send(seats[18], &user(19), 1).unwrap();
    assert_eq!(town.delivered(seats[19]), [1], "who has nothing of the group yet has this");
    let visited = seats.iter().filter(|&&seat| got(&mut town, seat, TEAM) == numbers([seq])).count();
    assert!((3..6).contains(&visited), "{visited} in two slices");
    let turns = town.finish();
    assert!(turns >= 6, "{turns}");
    for &seat in &seats[visited + 1..19] {
        assert_eq!(got(&mut town, seat, TEAM), numbers([seq]));
    }
    assert!(town.is_quiet() && town.levels().fan_out_bytes == 0);
}

/// A slice takes 500 µs. What two messages at once cost in visits and time, the second after a part of the first lap.
#[test]
fn a_group_that_is_behind_pauses_as_long_as_its_slices_take_and_one_that_is_not_does_not() {
    const SLICE_US: u64 = 500;
    let go_on = |town: &mut Town| {
        let mut turns = 0;
        while town.levels().fan_outs > 0 {
            town.turn_after(SLICE_US);
            turns += 1;
        }
        turns
    };
    let (mut town, seats) = crowd(1, &[TEAM]);
    town.send(seats[0], TEAM, 1).unwrap();
    let alone = go_on(&mut town);
    assert!((9..=12).contains(&alone), "two members a turn: {alone}");

    let before = town.count(|counters| counters.fan_out_visits);
    let first = town.send(seats[0], TEAM, 2).unwrap().0;
    (0..3).for_each(|_| town.turn_after(SLICE_US));
    let second = town.send(seats[0], TEAM, 3).unwrap().0;
    let behind = go_on(&mut town);
    let visits = town.count(|counters| counters.fan_out_visits) - before;
    assert!((16..=28).contains(&behind), "every second turn is left to others while both are under way: {behind}");
    assert!(visits <= MEMBERS as u64 + 8, "most were given both in one visit: {visits}");
    for &seat in &seats[1..] {
        assert_eq!(got(&mut town, seat, TEAM)[1..], numbers([first, second]));
    }
}

#[test]
fn three_groups_at_once_take_turns_and_each_member_has_each_message_once_and_in_order() {
    const GROUPS: [&str; 3] = ["#one", "#two", "#three"];
    for shards in [1, 2, 3] {
        let (mut town, seats) = crowd(shards, &GROUPS);
        let mut sent = [0; 3];
        for round in 0..12 {
            for (at, group) in GROUPS.iter().enumerate() {
                // The sender is not given its own.
                sent[at] = town.send(seats[0], group, round * 3 + at as u64 + 1).unwrap().0;
            }
            town.send(seats[1], &user(2), round + 1).unwrap();
            assert_eq!(town.delivered(seats[2]).iter().filter(|&&seq| seq == round + 1).count(), 1);
            (0..round % 4).for_each(|_| town.turn());
            if round == 0 && shards == 1 {
                assert_eq!(town.levels().fan_outs, 3);
                (0..3).for_each(|_| town.turn());
                let told = town.told(seats[1]).len();
                assert_eq!(told, GROUPS.len(), "six visits: two in each group");
            }
        }
        town.finish();
        for &seat in &seats[3..] {
            let told = town.told(seat);
            for (at, group) in GROUPS.iter().enumerate() {
                let mine = |frame: &Vec<u8>| match decode(frame) {
                    Reply::Deliver(message) if message.to == *group => Some(message.seq.0),
                    _ => None,
                };
                let seqs: Vec<_> = told.iter().filter_map(mine).collect();
                assert_eq!(seqs, (sent[at] - 11..=sent[at]).collect::<Vec<_>>(), "{group} with {shards} shards");
            }
        }
        assert!(town.told(seats[0]).is_empty());
    }
}

#[test]
fn one_visit_gives_all_that_came_meanwhile() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    let visits = town.count(|counters| counters.fan_out_visits);
    for client_seq in 1..=10 {
        town.send(seats[0], TEAM, client_seq).unwrap();
    }
    town.finish();
    assert_eq!(town.count(|counters| counters.fan_out_visits) - visits, MEMBERS as u64, "not ten times as many");
    assert!(seats[1..].iter().all(|&seat| town.delivered(seat).len() == 10));
}

#[test]
fn who_goes_has_what_was_numbered_before_and_nothing_after() {
    for (kicked, shards) in [(true, 1), (false, 1), (true, 3), (false, 3)] {
        let (mut town, seats) = crowd(shards, &[TEAM]);
        let before = town.send(seats[0], TEAM, 1).unwrap().0;
        town.turn();
        let (last, gone) = (user(MEMBERS - 1), seats[MEMBERS - 1]);
        if kicked {
            town.act(seats[0], TEAM, GroupAct::Kick { user: &last }).unwrap();
        } else {
            town.ask(gone, Request::Group { group: TEAM, act: GroupAct::Leave });
        }
        let after = town.send(seats[0], TEAM, 2).unwrap().0;
        town.finish();
        let told = town.told(gone);
        let place = |wanted: fn(&Reply<'_>) -> bool| told.iter().position(|frame| wanted(&decode(frame)));
        let message = place(|reply| matches!(reply, Reply::Deliver(_))).unwrap();
        let news = place(|reply| matches!(reply, Reply::Group(_))).unwrap();
        assert!(message < news, "what was before comes before");
        let seqs = |frame: &Vec<u8>| match decode(frame) {
            Reply::Deliver(message) => Some(message.seq.0),
            _ => None,
        };
        assert_eq!(told.iter().filter_map(seqs).collect::<Vec<_>>(), [before], "kicked: {kicked}, {shards} shards");
        for &seat in &seats[1..MEMBERS - 1] {
            assert_eq!(got(&mut town, seat, TEAM), numbers(before..=after));
        }
    }
}

#[test]
fn who_comes_has_nothing_of_what_was_numbered_before() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    let late = town.login("zoe");
    town.send(seats[0], TEAM, 1).unwrap();
    town.turn();
    let (joined, _) = town.act(late, TEAM, join()).unwrap();
    let last = town.send(seats[0], TEAM, 2).unwrap();
    town.finish();
    assert_eq!(got(&mut town, late, TEAM), numbers(joined.0..=last.0));
    assert_eq!(town.fetch(late, TEAM, 0), Ok((joined.0, last.0, (joined.0..=last.0).collect())));
}

/// Messages that a SYNC from the beginning gives, and what was pushed before or beside it.
fn synced(town: &mut Town, seat: Seat, group: &str) -> Vec<u64> {
    let sync = chat::Sync { places: (&[][..]).into(), from: Place::default(), limit: 200 };
    match decode(&town.answer(seat, Request::Chat(ChatRequest::Sync(sync)))) {
        Reply::Chat(ChatReply::SyncOk { messages, .. }) => {
            messages.iter().filter(|message| message.to == group).map(|message| message.seq.0).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_login_between_two_slices_finds_everything_by_sync_and_pushes() {
    for (at, shards) in [(1, 1), (MEMBERS - 1, 1), (7, 3)] {
        let (mut town, seats) = crowd(shards, &[TEAM]);
        let first = town.send(seats[0], TEAM, 1).unwrap().0;
        town.turn();
        town.turn();
        let device = town.login_as(&user(at), 2);
        let second = town.send(seats[0], TEAM, 2).unwrap().0;
        let mut all = synced(&mut town, device, TEAM);
        town.finish();
        let pushed: Vec<_> = got(&mut town, device, TEAM).iter().map(|range| range.0).collect();
        assert!(pushed.is_sorted() && pushed.contains(&second), "{pushed:?}");
        all.extend(pushed);
        all.sort_unstable();
        all.dedup();
        assert!(all.ends_with(&[first, second]), "user {at}, {shards} shards: {all:?}");
        assert_eq!(got(&mut town, seats[at], TEAM), numbers(first..=second), "its first device has each once");
    }
}

#[test]
fn a_logout_between_two_slices_takes_nothing_from_the_others() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    let seq = town.send(seats[0], TEAM, 1).unwrap().0;
    town.turn();
    town.leave(seats[10]);
    town.ask(seats[12], Request::Logout);
    town.finish();
    for at in (1..MEMBERS).filter(|at| ![10, 12].contains(at)) {
        assert_eq!(got(&mut town, seats[at], TEAM), numbers([seq]), "user {at}");
    }
    let back = town.login_as(&user(10), 1);
    assert!(synced(&mut town, back, TEAM).ends_with(&[seq]));
}

fn large(town: &mut Town, seat: Seat, client_seq: u64, body: &[u8]) -> Seq {
    let (class, kind, mentions) = (Class::Durable, BodyKind::Text, Mentions::default());
    let send = Send { to: TEAM, class, kind, client_seq, ack_timeout_ms: None, body, mentions };
    match decode(&town.answer(seat, Request::Send(send))) {
        Reply::SendAck(ack) => ack.seq,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_that_reads_too_slowly_is_told_what_to_fetch() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    let slow = seats[5];
    town.stuck.push(slow);
    let seqs: Vec<_> = (1..=12)
        .map(|client_seq| {
            let seq = large(&mut town, seats[0], client_seq, &[7; 10_000]).0;
            town.finish();
            seq
        })
        .collect();
    town.stuck.clear();
    town.take(slow);
    let (given, last) = (got(&mut town, slow, TEAM), *seqs.last().unwrap());
    let (lag, before) = given.split_last().unwrap();
    assert_eq!(before, numbers(seqs[0]..lag.0), "in order, as long as there was room");
    assert_eq!(lag.1, last);
    assert!(before.len() >= 6 && town.count(|counters| counters.lagged) == 1);
    assert_eq!(got(&mut town, seats[6], TEAM), numbers(seqs[0]..=last));
}

#[test]
fn what_is_under_way_is_bounded_and_nothing_durable_is_lost() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    let seqs: Vec<_> = (1..=40).map(|n| large(&mut town, seats[0], n, &[7; 4_000]).0).collect();
    let bytes = town.levels().fan_out_bytes;
    assert!((4_000..=OUTBOX_BYTES / 2).contains(&bytes), "{bytes} bytes");
    let missed = town.count(|counters| counters.fan_outs_missed);
    assert!(missed >= 30, "{missed}");
    let (first, last) = (seqs[0], *seqs.last().unwrap());
    let begins = last + 1 - missed;
    // What is not stored finds no room either, and says so.
    let (class, kind, mentions) = (Class::Transient, BodyKind::Text, Mentions::default());
    let send = Send { to: TEAM, class, kind, client_seq: 99, ack_timeout_ms: Some(500), body: &[1; 30_000], mentions };
    match decode(&town.answer(seats[0], Request::Send(send))) {
        Reply::Failure { code, .. } => assert_eq!(code, ErrorCode::NotOnline),
        other => panic!("{other:?}"),
    }
    assert_eq!(town.count(|counters| counters.fan_outs_dropped), 1);
    town.finish();
    for &seat in &seats[1..] {
        let mut expected = numbers(first..begins);
        expected.push((begins, last));
        assert_eq!(got(&mut town, seat, TEAM), expected);
        assert_eq!(town.fetch(seat, TEAM, begins - 1).unwrap().1, last);
    }
}

#[test]
fn a_transient_message_and_its_acknowledgement_go_round_too() {
    for shards in [1, 3] {
        let (mut town, seats) = crowd(shards, &[TEAM]);
        let own = town.login_as(&user(0), 2);
        let (class, kind, mentions) = (Class::Transient, BodyKind::Custom, Mentions::default());
        let send = Send { to: TEAM, class, kind, client_seq: 5, ack_timeout_ms: Some(500), body: b"move", mentions };
        town.ask(seats[0], Request::Send(send));
        assert!(town.told(seats[0]).is_empty(), "answered when it has been everywhere");
        town.finish();
        assert!(matches!(decode(&town.told(seats[0])[0]), Reply::SendAck(_)));
        assert!(town.told(own).is_empty(), "no device of its sender");
        for &seat in &seats[1..] {
            let told = town.told(seat);
            assert_eq!(told.len(), 1);
            let Reply::Deliver(message) = decode(&told[0]) else { panic!() };
            assert!(message.class == Class::Transient && message.delivery != 0 && message.body == b"move");
            town.ask(seat, Request::Ack(Ack::Delivery(message.delivery)));
        }
        let receipts = town.told(seats[0]);
        assert_eq!(receipts.len(), 1, "the first who acknowledged");
        assert!(matches!(decode(&receipts[0]), Reply::Receipt(Receipt { outcome: Outcome::Delivered, .. })));
        let signal = ChatRequest::Signal { to: TEAM, kind: chat::SIGNAL_TYPING, body: b"" };
        town.ask(seats[3], Request::Chat(signal));
        town.finish();
        let typing = |frame: &Vec<u8>| matches!(decode(frame), Reply::Chat(ChatReply::Signalled { .. }));
        assert!(seats.iter().all(|&seat| town.told(seat).iter().any(typing) == (seat != seats[3])));
    }
}

#[test]
fn who_is_removed_hears_it_after_the_messages_before() {
    let (mut town, seats) = crowd(1, &[TEAM]);
    town.send(seats[0], TEAM, 1).unwrap();
    let last = user(MEMBERS - 1);
    town.act(seats[0], TEAM, GroupAct::Kick { user: &last }).unwrap();
    let told = town.told(seats[MEMBERS - 1]);
    let told: Vec<_> = told.iter().map(|frame| decode(frame)).collect();
    assert!(matches!(told[0], Reply::Deliver(_)), "{told:?}");
    let removed = |reply: &Reply<'_>| matches!(reply, Reply::Group(GroupReply::Changed { change, .. }) if change.what == What::Kicked);
    assert!(removed(&told[1]) && told.len() == 2, "{told:?}");
}

#[test]
fn many_cursors_are_written_a_part_a_turn() {
    let mut town = Town::new(1);
    let writers: Vec<_> = (0..300).map(|at| town.login(&format!("writer-{at}"))).collect();
    let bob = town.login("bob");
    for &writer in &writers {
        town.pass(1);
        town.send(writer, "bob", 1).unwrap();
    }
    for frame in town.told(bob) {
        let Reply::Deliver(message) = decode(&frame) else { panic!() };
        let (conversation, seq) = (message.conversation, message.seq);
        town.ask(bob, Request::Ack(Ack::Upto { conversation, seq }));
    }
    town.pass(1_000);
    let written = |town: &Town| town.count(|counters| counters.cursors_written);
    let before = written(&town);
    town.turn();
    let part = written(&town) - before;
    assert!(part > 0 && part < 300, "{part} in the first turn");
    town.turn();
    assert_eq!(written(&town) - before, 300);
}
