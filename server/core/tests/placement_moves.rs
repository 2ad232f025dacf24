//! Partitions that change hands while shards run: each promise, each limit and each error of it; then many moves and deaths at
//! once, with people who write all the while.

mod realm;

use realm::{Realm, Seat, decode, name, partition_of};
use ringline_cluster::ownership::PartitionSet;
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::{Event, NodeNews};
use ringline_schema::ids::{ConversationId, DeviceKey, Seq};
use ringline_schema::message::group::JoinPolicy;
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Query};

const NONE: [&str; 0] = [];

/// Two users on nodes 0 and 1 whose conversation lives with the second.
fn apart(realm: &Realm) -> (String, String) {
    let bob = realm.user_of("bob", 1, None);
    let ann = realm.user_of("ann", 0, Some(&bob));
    (ann, bob)
}

/// The members, one on each node, of a group that lives on node 2.
fn team(realm: &mut Realm) -> (String, Vec<String>, Vec<Seat>) {
    let group = realm.group_of("team", 2);
    let users: Vec<_> = (0..3).map(|node| realm.user_of("user", node, None)).collect();
    let seats: Vec<_> = users.iter().map(|user| realm.login(user)).collect();
    let create = GroupAct::Create { title: "t", join: JoinPolicy::Open, users: Names::default() };
    assert_eq!(realm.act(seats[0], &group, create), "GROUP_OK");
    for seat in &seats[1..] {
        assert_eq!(realm.act(*seat, &group, GroupAct::Join { greeting: "" }), "GROUP_OK");
    }
    seats.iter().for_each(|seat| drop(realm.texts(*seat)));
    (group, users, seats)
}

#[test]
fn what_nobody_owns_is_unavailable_until_somebody_does() {
    let mut realm = Realm::new(2, 1);
    realm.settle();
    let seat = realm.knock(0, ("ann", 1), 1);
    assert_eq!(realm.texts(seat), ["UNAVAILABLE"]);
    realm.take(name("ann").partition(), 1);
    realm.publish();
    realm.settle();
    let seat = realm.knock(0, ("ann", 1), 1);
    assert_eq!(realm.texts(seat), ["REDIRECT n1"]);
    let seat = realm.login("ann");
    assert_eq!(realm.send(seat, 1, "ann"), "SEND_ACK 1", "what is her own she may write");
    // Whose conversation with her lives with him, and with her.
    let find = |home: &str, stem: &str| {
        let lives =
            |user: &String| partition_of("ann", user) == name(if home == "ann" { home } else { user }).partition();
        (0..10_000).map(|number| format!("{stem}-{number}")).find(lives).unwrap()
    };
    for (number, user) in [(2, find("his", "bob")), (3, find("ann", "cid"))] {
        assert_eq!(realm.send(seat, number, &user), "UNAVAILABLE", "nobody keeps it, or says whether he takes it");
        realm.take(name(&user).partition(), 0);
        realm.publish();
        realm.settle();
        realm.login(&user);
        assert_eq!(realm.send(seat, number, &user), "SEND_ACK 1");
    }
}

#[test]
fn who_is_asked_to_give_up_ends_what_is_on_its_way_refuses_what_comes_and_then_says_so() {
    let mut realm = Realm::shared_out(3, 2);
    let (group, users, seats) = team(&mut realm);
    let moving = ConversationId::group(&name(&group)).partition();
    let owner = realm.place(ShardIndex::new(NodeIndex(2), moving.number() % 2));
    assert_eq!(realm.send(seats[0], 1, &group), "SEND_ACK 4");
    seats.iter().for_each(|seat| drop(realm.texts(*seat)));
    // One that is appended, and not yet on disk.
    realm.begin_send(seats[0], 2, &group);
    realm.lane_turn((seats[0].at, owner));
    realm.ask_for(moving, true);
    let version = realm.publish();
    realm.lane_turn((realm::NOWHERE, owner));
    assert!(!realm.has_released(2, version), "its record is on the way to the disk");
    realm.begin_send(seats[0], 3, &group);
    realm.lane_turn((seats[0].at, owner));
    realm.settle();
    assert!(realm.has_released(2, version));
    assert_eq!(
        (realm.answer(seats[0], 1_002), realm.answer(seats[0], 1_003)),
        ("SEND_ACK 5".into(), "UNAVAILABLE".into())
    );
    assert_eq!(realm.texts(seats[1]), [format!("DELIVER {} 5", users[0])]);
    assert_eq!(realm.send(seats[0], 3, &group), "UNAVAILABLE");
    realm.release(&[moving].into_iter().collect());
    realm.publish();
    realm.settle();
    assert_eq!(realm.send(seats[0], 3, &group), "UNAVAILABLE", "nobody has it");
    realm.take(moving, 0);
    realm.publish();
    realm.settle();
    assert_eq!(realm.send(seats[0], 3, &group), "SEND_ACK 6");
    assert_eq!(realm.send(seats[0], 2, &group), "SEND_ACK 5 dup", "the new owner knows what the old one took");
    assert_eq!(realm.texts(seats[1]), [format!("DELIVER {} 6", users[0])]);
    assert_eq!(realm.fenced, 0);
}

#[test]
fn sessions_of_who_goes_are_told_and_closed_and_their_cursors_are_kept() {
    let mut realm = Realm::shared_out(3, 2);
    let (ann, bob) = apart(&realm);
    let (seat, other) = (realm.login(&ann), realm.login(&bob));
    realm.send(seat, 1, &bob);
    realm.texts(other);
    let conversation = ConversationId::direct(&name(&ann), &name(&bob));
    let _ = realm.ask(other, 9, Request::Ack(Ack::Upto { conversation, seq: Seq(1) }));
    let at = name(&bob).partition();
    realm.hand_over(at, 2);
    assert_eq!(realm.texts(other), ["GOAWAY"]);
    let (user, device) = (name(&bob), DeviceKey::new(&name(&bob), ringline_schema::ids::DeviceId(1)));
    let list = Query::Conversations { user, device, cursor: ConversationId(0), limit: 9 };
    let Answer::Conversations(rows) = realm.stored(list) else { panic!() };
    assert_eq!((rows.len(), rows[0].acked), (1, Seq(1)), "the old owner wrote it before it let go");
    let seat_there = realm.knock(0, (&bob, 1), 1);
    assert_eq!(realm.texts(seat_there), ["REDIRECT n2"]);
    let other = realm.login(&bob);
    assert_eq!(realm.send(seat, 2, &bob), "SEND_ACK 2");
    assert_eq!(realm.texts(other), [format!("DELIVER {ann} 2")]);
    assert_eq!(realm.send(other, 1, &ann), "SEND_ACK 3", "and the other way");
    assert_eq!(realm.fenced, 0);
}

#[test]
fn a_wish_that_is_taken_back_is_as_if_there_had_been_none_and_an_old_picture_is_not_looked_at() {
    let mut realm = Realm::shared_out(2, 1);
    let ann = realm.user_of("ann", 0, None);
    let seat = realm.login(&ann);
    let moving = name(&ann).partition();
    assert_eq!(realm.send(seat, 1, &ann), "SEND_ACK 1");
    let old = realm.truth.clone();
    realm.begin_send(seat, 2, &ann);
    realm.ask_for(moving, true);
    let asked = realm.publish();
    realm.lane_turn((realm::NOWHERE, 0));
    realm.ask_for(moving, false);
    realm.publish();
    realm.lane_turn((realm::NOWHERE, 0));
    realm.settle();
    assert!(!realm.has_released(0, asked), "it serves it again");
    let seat = realm.login(&ann);
    assert_eq!(realm.send(seat, 3, &ann), "SEND_ACK 3", "the second was on its way to the disk");
    let mut old = old;
    for partition in ringline_cluster::ownership::all() {
        old.set(partition, Default::default());
    }
    let _ = realm.event(0, Event::Placement(old.into()));
    assert_eq!(realm.send(seat, 4, &ann), "SEND_ACK 4");
}

#[test]
fn what_is_taken_without_asking_is_written_no_more_and_served_again_only_anew() {
    let mut realm = Realm::shared_out(2, 1);
    let ann = realm.user_of("ann", 0, None);
    let seat = realm.login(&ann);
    assert_eq!(realm.send(seat, 1, &ann), "SEND_ACK 1");
    let conversation = ConversationId::direct(&name(&ann), &name(&ann));
    let _ = realm.ask(seat, 9, Request::Ack(Ack::Upto { conversation, seq: Seq(1) }));
    let moving: PartitionSet = [name(&ann).partition(), conversation.partition()].into_iter().collect();
    // Node 1 has both for a while, and writes.
    moving.iter().for_each(|partition| realm.take(partition, 1));
    realm.texts(seat);
    realm.publish();
    realm.settle();
    assert_eq!((realm.texts(seat), realm.fenced), (vec!["GOAWAY".to_owned()], 0), "no cursor, no last-seen time");
    let there = realm.login(&ann);
    assert_eq!(realm.send(there, 2, &ann), "SEND_ACK 2");
    moving.iter().for_each(|partition| realm.take(partition, 0));
    realm.publish();
    realm.settle();
    let seat = realm.login(&ann);
    assert_eq!(realm.send(seat, 3, &ann), "SEND_ACK 3", "by what the store says, not by what it knew before");
    // Lost and back between two pictures: the epoch tells.
    let number = name(&ann).partition();
    realm.texts(seat);
    realm.begin_send(seat, 4, &ann);
    moving.iter().for_each(|partition| {
        realm.take(partition, 1);
        realm.take(partition, 0);
    });
    realm.publish();
    realm.lane_turn((realm::NOWHERE, 0));
    assert_eq!(realm.texts(seat), ["GOAWAY"]);
    let again = realm.knock(0, (&ann, 1), 1);
    assert_eq!(realm.texts(again), ["UNAVAILABLE"], "something of before is on its way to the disk: {number:?}");
    realm.settle();
    let seat = realm.login(&ann);
    assert_eq!(realm.send(seat, 5, &ann), "SEND_ACK 5");
}

fn synced(realm: &mut Realm, seat: realm::Seat) {
    let sync = chat::Sync { places: Places::default(), from: Place::default(), limit: 0 };
    let _ = realm.ask(seat, 5, Request::Chat(ChatRequest::Sync(sync)));
    realm.settle();
    assert_eq!(realm.texts(seat), ["SYNC_OK"]);
}

#[test]
fn what_a_dead_node_had_committed_and_not_pushed_is_told_when_others_have_all_that_it_owned() {
    let mut realm = Realm::shared_out(3, 2);
    let (group, _, seats) = team(&mut realm);
    realm.ack(seats[1], &group, 3);
    let home = ConversationId::group(&name(&group)).partition();
    let owner = realm.place(ShardIndex::new(NodeIndex(2), home.number() % 2));
    realm.begin_send(seats[0], 1, &group);
    realm.lane_turn((seats[0].at, owner));
    realm.store_turn(owner);
    realm.kill(2, 0);
    realm.settle();
    assert_eq!(realm.answer(seats[0], 1_001), "UNKNOWN");
    realm.pass(1_000);
    assert_eq!(realm.texts(seats[1]), NONE, "it may yet commit");
    let mine: Vec<_> = realm.truth.owned(NodeIndex(2)).iter().collect();
    let (last, first) = mine.split_last().unwrap();
    first.iter().for_each(|partition| realm.take(*partition, partition.number() % 2));
    realm.publish();
    realm.settle();
    realm.pass(1_000);
    assert_eq!(realm.texts(seats[1]), NONE);
    realm.take(*last, 0);
    realm.publish();
    realm.settle();
    realm.pass(1_000);
    assert_eq!(realm.texts(seats[1]), [format!("LAGGED {group} 4..4")]);
    assert_eq!(realm.send(seats[0], 1, &group), "SEND_ACK 4 dup");
    assert_eq!(realm.fenced, 0);
}

#[test]
fn a_link_that_is_back_with_the_same_process_has_lost_nothing_and_nothing_is_compared() {
    let mut realm = Realm::shared_out(2, 1);
    let ann = realm.user_of("ann", 0, None);
    let seat = realm.login(&ann);
    let loads = |realm: &Realm| realm.sides[0].as_ref().unwrap().shard.counters().loads;
    let before = loads(&realm);
    realm.tell_news(0, 1, NodeNews::Down);
    realm.settle();
    realm.pass(1_000);
    realm.tell_news(0, 1, NodeNews::Up { shards: 1 });
    realm.settle();
    realm.pass(1_000);
    assert_eq!((loads(&realm), realm.texts(seat)), (before, Vec::new()));
}

#[test]
fn who_pushed_to_where_a_user_was_has_the_new_place_look() {
    let mut realm = Realm::shared_out(3, 2);
    let (group, users, seats) = team(&mut realm);
    // The owner of the group hears late of the move.
    let moving = name(&users[1]).partition();
    realm.ask_for(moving, true);
    let late: Vec<_> = realm.places_of(2).map(|at| (realm::NOWHERE, at)).collect();
    let mut held = Vec::new();
    let mut elsewhere = |realm: &mut Realm| {
        realm.publish();
        held.extend(late.iter().filter_map(|lane| Some((*lane, realm.lanes.remove(lane)?))));
        realm.settle();
    };
    elsewhere(&mut realm);
    realm.release(&[moving].into_iter().collect());
    realm.take(moving, 0);
    elsewhere(&mut realm);
    assert_eq!(realm.texts(seats[1]), ["GOAWAY"]);
    let moved = realm.login(&users[1]);
    synced(&mut realm, moved);
    realm.ack(moved, &group, 3);
    realm.pass(1_000);
    assert_eq!(realm.texts(moved), NONE);
    assert_eq!(realm.send(seats[0], 1, &group), "SEND_ACK 4");
    assert_eq!(realm.texts(moved), NONE, "it went to where he was");
    for (lane, items) in held {
        realm.lanes.entry(lane).or_default().extend(items);
    }
    realm.settle();
    realm.pass(1_000);
    assert_eq!(realm.texts(moved), [format!("LAGGED {group} 4..4")]);
}

#[test]
fn a_group_finds_its_members_where_they_are_and_moves_itself() {
    let mut realm = Realm::shared_out(3, 2);
    let (group, users, seats) = team(&mut realm);
    let heard = |realm: &mut Realm, seats: &[Seat]| {
        let told = seats.iter().map(|seat| realm.texts(*seat).join(","));
        told.collect::<Vec<_>>()
    };
    let news = |seq: u64| vec![format!("DELIVER {} {seq}", users[0]); 2];
    assert_eq!(realm.send(seats[0], 1, &group), "SEND_ACK 4");
    assert_eq!(heard(&mut realm, &seats[1..]), news(4));
    realm.hand_over(name(&users[1]).partition(), 2);
    assert_eq!(realm.texts(seats[1]), ["GOAWAY"]);
    let seats = [seats[0], realm.login(&users[1]), seats[2]];
    assert_eq!(realm.send(seats[0], 2, &group), "SEND_ACK 5");
    assert_eq!(heard(&mut realm, &seats[1..]), news(5));
    realm.hand_over(ConversationId::group(&name(&group)).partition(), 1);
    assert_eq!(realm.send(seats[0], 3, &group), "SEND_ACK 6");
    assert_eq!(heard(&mut realm, &seats[1..]), news(6));
    assert_eq!(realm.fenced, 0);
}

#[test]
fn who_is_watched_is_watched_where_he_is() {
    let mut realm = Realm::shared_out(3, 2);
    let (ann, bob) = apart(&realm);
    let (seat, other) = (realm.login(&ann), realm.login(&bob));
    let bytes = [bob.clone()];
    let users: Vec<&str> = bytes.iter().map(String::as_str).collect();
    let watch = Request::Chat(ChatRequest::Watch { users: Names::from(&users[..]) });
    let _ = realm.ask(seat, 4, watch);
    realm.settle();
    let online = |realm: &mut Realm| {
        let frames = realm.told(seat);
        let last = frames.last().expect("news");
        match decode(last) {
            Reply::Chat(ChatReply::PresenceOk { users } | ChatReply::PresenceChanged { users }) => users[0].online,
            other => panic!("{other:?}"),
        }
    };
    assert!(online(&mut realm));
    realm.hand_over(name(&bob).partition(), 2);
    assert_eq!(realm.texts(other), ["GOAWAY"]);
    realm.pass(1_100);
    assert!(!online(&mut realm), "he is away until he comes back");
    realm.login(&bob);
    realm.pass(2_500);
    assert!(online(&mut realm));
}

#[test]
fn behind_its_lease_a_node_serves_nothing_and_goes_on_with_what_it_held() {
    let mut realm = Realm::shared_out(2, 1);
    let (ann, bob) = (realm.user_of("ann", 0, None), realm.user_of("bob", 0, None));
    let (seat, other) = (realm.login(&ann), realm.login(&bob));
    assert_eq!(realm.send(seat, 1, &ann), "SEND_ACK 1");
    realm.begin_send(seat, 2, &ann);
    let until_ms = realm.now_us / 1_000 + 10;
    realm.lease.set(until_ms);
    realm.now_us = until_ms * 1_000 - 1;
    assert_eq!(realm.send(other, 1, &bob), "SEND_ACK 1", "to the last microsecond");
    assert_eq!(realm.answer(seat, 1_002), "SEND_ACK 2");
    realm.texts(seat);
    realm.begin_send(seat, 3, &ann);
    realm.now_us = until_ms * 1_000;
    realm.settle();
    assert_eq!(realm.texts(seat), NONE, "its commit is held");
    assert_eq!(realm.send(seat, 4, &ann), "UNAVAILABLE");
    let _ = realm.ask(seat, 9, Request::Ping { stamp: 1 });
    assert_eq!(realm.texts(seat), ["PONG"]);
    let at = realm.knock(0, (&ann, 2), 1);
    assert_eq!(realm.texts(at), ["UNAVAILABLE"]);
    realm.texts(other);
    let transient = Send { to: &bob, class: Class::Transient, client_seq: 9, body: b"x", ..Send::default() };
    let _ = realm.ask(seat, 8, Request::Send(transient));
    assert_eq!((realm.texts(seat), realm.texts(other).len()), (vec!["UNAVAILABLE".to_owned()], 0));
    let due = realm.sides[0].as_ref().unwrap().shard.next_deadline_us();
    assert_eq!(due, Some(realm.now_us + 20_000), "it looks again");
    realm.lease.set(until_ms + 60_000);
    realm.now_us += 20_000;
    let _ = realm.event(0, Event::Timer);
    assert_eq!(realm.answer(seat, 1_003), "SEND_ACK 3");
    assert_eq!(realm.send(seat, 4, &ann), "SEND_ACK 4");
}

#[test]
fn an_act_whose_commit_takes_too_long_is_answered_once() {
    let mut realm = Realm::shared_out(1, 1);
    let ann = realm.login("ann");
    let act = GroupAct::Create { title: "t", join: JoinPolicy::Open, users: Names::default() };
    let _ = realm.ask(ann, 7, Request::Group { group: "#team", act });
    // What it asks is answered, and nothing is committed.
    while realm.answers(0) {}
    realm.now_us += 16_000_000;
    let _ = realm.event(0, Event::Timer);
    assert_eq!(realm.texts(ann), ["UNKNOWN"]);
    realm.settle();
    let told = realm.texts(ann);
    assert!(!told.contains(&"GROUP_OK".to_owned()), "{told:?}");
    assert_eq!(realm.act(ann, "#team", GroupAct::Rename { title: "it was made" }), "GROUP_OK");
}
