//! Editing, taking back and deleting messages: who may, how long, what readers see, in conversations of two and in
//! groups, on one shard and on several.

mod town;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::{Amend, AmendAction, Sync};
use ringline_schema::message::group::{JoinPolicy, Role};
use ringline_schema::message::*;
use town::{Seat, Town, decode};

fn amend(
    town: &mut Town,
    seat: Seat,
    (with, seq): (&str, u64),
    (action, client_seq, body): (AmendAction, u64, &str),
) -> Result<SendAck, ErrorCode> {
    town.told(seat);
    let kind = BodyKind::Text;
    let request = Amend { with, seq: Seq(seq), action, kind, client_seq, body: body.as_bytes() };
    town.chat(seat, ChatRequest::Amend(request));
    let told = town.told(seat);
    assert_eq!(told.len(), 1, "answered once");
    match decode(&told[0]) {
        Reply::SendAck(ack) => Ok(ack),
        Reply::Failure { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

type Shown = (u64, MessageState, u64, String);

fn shown(message: &Message<'_>) -> Shown {
    let body = String::from_utf8(message.body.to_vec()).unwrap();
    (message.seq.0, message.extra.state, message.extra.refers.0, body)
}

fn history(town: &mut Town, seat: Seat, with: &str) -> Vec<Shown> {
    town.told(seat);
    town.ask(seat, Request::Fetch(Fetch { with, after: Seq::ZERO, before: None, limit: 0, newest: false }));
    let told = town.told(seat);
    let Reply::FetchOk { messages, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    messages.iter().map(shown).collect()
}

/// What a device that has nothing is given by SYNC.
fn synced(town: &mut Town, seat: Seat) -> Vec<Shown> {
    town.told(seat);
    town.chat(seat, ChatRequest::Sync(Sync { places: Places::default(), from: Place::default(), limit: 0 }));
    let told = town.told(seat);
    let Reply::Chat(ChatReply::SyncOk { messages, .. }) = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    messages.iter().map(shown).collect()
}

fn delivered(town: &mut Town, seat: Seat) -> Vec<Shown> {
    let shown = |frame: &Vec<u8>| match decode(frame) {
        Reply::Deliver(message) => {
            assert_eq!(message.kind, BodyKind::Amendment);
            Some(shown(&message))
        }
        _ => None,
    };
    town.told(seat).iter().filter_map(shown).collect()
}

const PAIRS: [(&str, &str); 4] = [("ann", "bob"), ("carl", "dora"), ("eve", "fred"), ("gus", "hal")];

#[test]
fn readers_see_what_a_message_has_become_and_devices_hear_of_it() {
    use MessageState::{AsSent, Edited, Recalled};
    for shards in [1, 2, 5] {
        let mut town = Town::new(shards, |_| ());
        for (a, b) in PAIRS {
            let (ann, tablet, bob) = (town.login(a), town.login_as(a, 2, DeviceKind::Tablet), town.login(b));
            town.send(ann, b, Class::Durable, 1).unwrap();
            town.send(ann, b, Class::Durable, 2).unwrap();
            town.told(bob);
            town.told(tablet);
            assert_eq!(amend(&mut town, ann, (b, 1), (AmendAction::Edit, 3, "one")).unwrap().seq, Seq(3));
            let edit = [(3, Edited, 1, "one".to_owned())];
            assert_eq!((delivered(&mut town, bob), delivered(&mut town, tablet)), (edit.to_vec(), edit.to_vec()));
            amend(&mut town, tablet, (b, 1), (AmendAction::Edit, 1, "two")).unwrap();
            let text = |text: &str| text.to_owned();
            let edited = vec![
                (1, Edited, 0, text("two")),
                (2, AsSent, 0, text("hello")),
                (3, AsSent, 1, text("")),
                (4, Edited, 1, text("two")),
            ];
            assert_eq!((history(&mut town, ann, b), history(&mut town, bob, a)), (edited.clone(), edited));
            assert!(amend(&mut town, ann, (b, 1), (AmendAction::Edit, 3, "one")).unwrap().dup, "a retry");
            amend(&mut town, ann, (b, 1), (AmendAction::Recall, 4, "ignored")).unwrap();
            assert_eq!(delivered(&mut town, bob).pop(), Some((5, Recalled, 1, text(""))));
        }
        town.restart(3);
        for (a, b) in PAIRS {
            let bob = town.login(b);
            let bodies: Vec<_> = history(&mut town, bob, a).into_iter().map(|shown| (shown.1, shown.3)).collect();
            let gone = |state| (state, String::new());
            let second = (AsSent, "hello".to_owned());
            assert_eq!(bodies, [gone(Recalled), second, gone(AsSent), gone(AsSent), gone(Recalled)]);
        }
    }
}

#[test]
fn only_the_sender_amends_in_time_and_only_what_is_there() {
    for shards in [1, 2, 5] {
        let mut town = Town::new(shards, |config| config.idle_timeout_ms = 10 * limits::AMEND_WINDOW_MS);
        let (ann, bob) = (town.login("ann"), town.login("bob"));
        let no = |town: &mut Town, seat, place, what| amend(town, seat, place, what).unwrap_err();
        let edit = |client_seq| (AmendAction::Edit, client_seq, "x");
        assert_eq!(no(&mut town, ann, ("bob", 1), edit(1)), ErrorCode::NoSuchMessage);
        for client_seq in 1..=3 {
            town.send(ann, "bob", Class::Durable, client_seq).unwrap();
        }
        assert_eq!(no(&mut town, bob, ("ann", 1), edit(1)), ErrorCode::NotAllowed);
        assert_eq!(no(&mut town, bob, ("ann", 1), (AmendAction::DeleteForAll, 1, "")), ErrorCode::NotAllowed);
        for seq in [0, 4, u64::MAX] {
            assert_eq!(no(&mut town, ann, ("bob", seq), edit(9)), ErrorCode::NoSuchMessage);
        }
        assert_eq!(no(&mut town, ann, ("bob", 1), edit(0)), ErrorCode::BadRequest);
        assert_eq!(no(&mut town, ann, ("#team", 1), edit(9)), ErrorCode::NoSuchGroup);
        amend(&mut town, ann, ("bob", 1), (AmendAction::Recall, 10, "")).unwrap();
        for action in [AmendAction::Edit, AmendAction::Recall, AmendAction::DeleteForAll] {
            assert_eq!(no(&mut town, ann, ("bob", 1), (action, 11, "x")), ErrorCode::NoSuchMessage, "it is gone");
        }
        assert_eq!(no(&mut town, ann, ("bob", 4), edit(11)), ErrorCode::NoSuchMessage, "no message but an amendment");
        town.expect(bob, ChatRequest::Block { user: "ann" }, None);
        assert_eq!(no(&mut town, ann, ("bob", 2), edit(11)), ErrorCode::Blocked);
        amend(&mut town, ann, ("bob", 2), (AmendAction::Recall, 11, "")).unwrap();
        town.expect(bob, ChatRequest::Unblock { user: "ann" }, None);
        town.now.unix_ms += limits::AMEND_WINDOW_MS;
        amend(&mut town, ann, ("bob", 3), edit(12)).unwrap();
        town.now.unix_ms += 1;
        assert_eq!(no(&mut town, ann, ("bob", 3), edit(13)), ErrorCode::AmendTooLate);
        assert_eq!(no(&mut town, ann, ("bob", 3), (AmendAction::Recall, 13, "")), ErrorCode::AmendTooLate);
        amend(&mut town, ann, ("bob", 3), (AmendAction::DeleteForAll, 13, "")).unwrap();
        assert!(history(&mut town, bob, "ann")[..3].iter().all(|shown| shown.3.is_empty()));
    }
}

#[test]
fn one_number_stands_for_one_amendment() {
    let mut town = Town::new(2, |_| ());
    let (ann, _bob) = (town.login("ann"), town.login("bob"));
    for client_seq in 1..=3 {
        town.send(ann, "bob", Class::Durable, client_seq).unwrap();
    }
    amend(&mut town, ann, ("bob", 1), (AmendAction::Recall, 4, "")).unwrap();
    let mut no = |seq, what| amend(&mut town, ann, ("bob", seq), what).unwrap_err();
    assert_eq!(no(2, (AmendAction::Recall, 4, "")), ErrorCode::Conflict, "another message");
    assert_eq!(no(1, (AmendAction::DeleteForAll, 4, "")), ErrorCode::Conflict, "another action");
    assert_eq!(no(1, (AmendAction::Edit, 1, "hello")), ErrorCode::Conflict, "the number and the body of a message");
    let again = amend(&mut town, ann, ("bob", 1), (AmendAction::Recall, 4, "")).unwrap();
    assert_eq!((again.seq, again.dup), (Seq(4), true));
    town.restart(2);
    let ann = town.login("ann");
    let again = amend(&mut town, ann, ("bob", 1), (AmendAction::Recall, 4, "")).unwrap();
    assert_eq!((again.seq, again.dup), (Seq(4), true), "the store knows the same");
    assert_eq!(amend(&mut town, ann, ("bob", 2), (AmendAction::Recall, 4, "")), Err(ErrorCode::Conflict));
}

#[test]
fn amendments_on_their_way_to_the_disk_count_and_are_bounded() {
    let mut town = Town::new(1, |_| ());
    let (ann, bob) = (town.login("ann"), town.login("bob"));
    for client_seq in 1..=2 {
        town.send(ann, "bob", Class::Durable, client_seq).unwrap();
    }
    town.told(ann);
    town.committing = false;
    let ask = |town: &mut Town, (seq, action), client_seq| {
        let amend = Amend { with: "bob", seq: Seq(seq), action, kind: BodyKind::Text, client_seq, body: b"x" };
        town.chat(ann, ChatRequest::Amend(amend));
        town.told(ann).iter().map(|frame| matches!(decode(frame), Reply::Failure { .. })).collect::<Vec<_>>()
    };
    assert!(ask(&mut town, (1, AmendAction::Recall), 3).is_empty(), "not on disk");
    assert_eq!(ask(&mut town, (1, AmendAction::Edit), 4), [true], "it will be gone");
    // One of the window of SENDS_IN_FLIGHT_MAX, which is the same number, is the recall.
    for client_seq in 5..68 {
        assert!(ask(&mut town, (2, AmendAction::Edit), client_seq).is_empty());
    }
    assert_eq!(ask(&mut town, (2, AmendAction::Edit), 68), [true]);
    town.committing = true;
    town.pass(100);
    assert_eq!(
        history(&mut town, bob, "ann")[..2],
        [(1, MessageState::Recalled, 0, String::new()), (2, MessageState::Edited, 0, "x".to_owned()),]
    );
    for client_seq in 69..90 {
        amend(&mut town, ann, ("bob", 2), (AmendAction::Edit, client_seq, "y")).unwrap();
    }
}

#[test]
fn an_edit_keeps_the_kind_and_the_window_is_what_is_configured() {
    let mut town = Town::new(2, |config| config.amend_window_ms = 5_000);
    let (ann, _bob) = (town.login("ann"), town.login("bob"));
    town.send(ann, "bob", Class::Durable, 1).unwrap();
    town.told(ann);
    let (action, kind) = (AmendAction::Edit, BodyKind::Image);
    let request = Amend { with: "bob", seq: Seq(1), action, kind, client_seq: 2, body: b"image" };
    town.chat(ann, ChatRequest::Amend(request));
    let told = town.told(ann);
    assert!(matches!(decode(&told[0]), Reply::Failure { code: ErrorCode::BadRequest, .. }), "a text is no image");
    town.now.unix_ms += 5_000;
    amend(&mut town, ann, ("bob", 1), (AmendAction::Edit, 3, "x")).unwrap();
    town.now.unix_ms += 1;
    assert_eq!(amend(&mut town, ann, ("bob", 1), (AmendAction::Edit, 4, "x")), Err(ErrorCode::AmendTooLate));
    let long = "x".repeat(limits::FRAME_BYTES_MAX as usize);
    assert_eq!(amend(&mut town, ann, ("bob", 1), (AmendAction::Edit, 4, &long)), Err(ErrorCode::BodyTooLarge));
}

fn act(town: &mut Town, seat: Seat, act: GroupAct<'_>) {
    town.told(seat);
    town.ask(seat, Request::Group { group: TEAM, act });
    let ok = |frame: &Vec<u8>| matches!(decode(frame), Reply::Group(GroupReply::Ok { .. }));
    assert!(town.told(seat).iter().any(ok), "{act:?}");
}

const TEAM: &str = "#team";

/// ann owns the group (row 1 of its log), bob, cid and dora are in it (2 to 4), bob is an administrator (5).
fn team(shards: u16) -> (Town, [Seat; 4]) {
    let mut town = Town::new(shards, |config| config.idle_timeout_ms = 10 * limits::AMEND_WINDOW_MS);
    let seats = ["ann", "bob", "cid", "dora"].map(|user| town.login(user));
    act(&mut town, seats[0], GroupAct::Create { title: "t", join: JoinPolicy::Open, users: Names::default() });
    seats[1..].iter().for_each(|seat| act(&mut town, *seat, GroupAct::Join { greeting: "" }));
    act(&mut town, seats[0], GroupAct::Role { user: "bob", role: Role::Admin });
    (town, seats)
}

#[test]
fn in_a_group_the_sender_amends_and_who_ranks_higher_deletes() {
    use AmendAction::{DeleteForAll, Edit, Recall};
    for shards in [1, 2, 5] {
        let (mut town, [ann, bob, cid, dora]) = team(shards);
        for seat in [ann, bob, cid, dora, cid] {
            let client_seq = if seat == cid { town.now.mono_us } else { 1 };
            town.send(seat, TEAM, Class::Durable, client_seq).unwrap();
            town.pass(100);
        }
        let (of_ann, of_bob, of_cid, of_dora, of_cid_2) = (6, 7, 8, 9, 10);
        for seat in [ann, bob, cid, dora] {
            town.told(seat);
        }
        assert_eq!(amend(&mut town, cid, (TEAM, of_cid), (Edit, 1 << 50, "new")).unwrap().seq, Seq(11));
        for seat in [ann, bob, dora] {
            let wanted = (11, MessageState::Edited, of_cid, "new".to_owned());
            assert_eq!(delivered(&mut town, seat), [wanted], "live, to everyone else");
        }
        assert!(delivered(&mut town, cid).is_empty(), "it has the answer");
        let no = |town: &mut Town, seat, seq, what| amend(town, seat, (TEAM, seq), what).unwrap_err();
        for (seat, seq, action) in [
            (dora, of_cid, DeleteForAll),
            (dora, of_ann, DeleteForAll),
            (bob, of_ann, DeleteForAll),
            (ann, of_cid, Edit),
            (ann, of_cid, Recall),
            (bob, of_cid, Recall),
        ] {
            assert_eq!(no(&mut town, seat, seq, (action, 2, "x")), ErrorCode::NotAllowed, "{seq} {action:?}");
        }
        amend(&mut town, ann, (TEAM, of_bob), (DeleteForAll, 3, "")).unwrap();
        amend(&mut town, bob, (TEAM, of_cid), (DeleteForAll, 3, "")).unwrap();
        town.now.unix_ms += limits::AMEND_WINDOW_MS + 1;
        assert_eq!(no(&mut town, dora, of_dora, (Recall, 3, "")), ErrorCode::AmendTooLate);
        amend(&mut town, dora, (TEAM, of_dora), (DeleteForAll, 3, "")).unwrap();
        act(&mut town, cid, GroupAct::Leave);
        assert_eq!(no(&mut town, cid, of_cid_2, (DeleteForAll, 1 << 51, "")), ErrorCode::NotMember);
        amend(&mut town, bob, (TEAM, of_cid_2), (DeleteForAll, 4, "")).unwrap();
        assert_eq!(no(&mut town, ann, 1, (DeleteForAll, 4, "")), ErrorCode::NoSuchMessage, "what happened, happened");
        town.restart(3);
        let ann = town.login("ann");
        let bodies: Vec<_> = history(&mut town, ann, TEAM).into_iter().filter(|shown| !shown.3.is_empty()).collect();
        assert_eq!(bodies, [(of_ann, MessageState::AsSent, 0, "hello".to_owned())], "nothing else is left to read");
    }
}

#[test]
fn who_is_muted_may_take_back_but_not_edit_and_who_is_gone_may_do_nothing() {
    use AmendAction::{DeleteForAll, Edit, Recall};
    let (mut town, [ann, _, cid, dora]) = team(2);
    for client_seq in 1..=4 {
        town.send(cid, TEAM, Class::Durable, client_seq).unwrap();
    }
    act(&mut town, ann, GroupAct::Mute { user: "cid", for_ms: 60_000 });
    assert_eq!(amend(&mut town, cid, (TEAM, 6), (Edit, 9, "x")), Err(ErrorCode::Muted));
    amend(&mut town, cid, (TEAM, 6), (Recall, 9, "")).unwrap();
    amend(&mut town, cid, (TEAM, 7), (DeleteForAll, 10, "")).unwrap();
    act(&mut town, ann, GroupAct::Kick { user: "cid" });
    for action in [Edit, Recall, DeleteForAll] {
        assert_eq!(amend(&mut town, cid, (TEAM, 8), (action, 11, "x")), Err(ErrorCode::NotMember));
    }
    act(&mut town, ann, GroupAct::Dissolve);
    assert_eq!(amend(&mut town, dora, (TEAM, 8), (Recall, 11, "")), Err(ErrorCode::GroupDissolved));
}

#[test]
fn who_left_sees_that_a_message_was_edited_and_not_what_was_written_since() {
    for shards in [1, 3] {
        let (mut town, [ann, bob, cid, _]) = team(shards);
        town.send(ann, TEAM, Class::Durable, 1).unwrap();
        town.send(ann, TEAM, Class::Durable, 2).unwrap();
        amend(&mut town, ann, (TEAM, 7), (AmendAction::Edit, 3, "before")).unwrap();
        act(&mut town, cid, GroupAct::Leave);
        amend(&mut town, ann, (TEAM, 6), (AmendAction::Edit, 4, "secret")).unwrap();
        let seen: Vec<_> = history(&mut town, cid, TEAM).into_iter().filter(|shown| shown.0 > 5).collect();
        assert_eq!(
            seen,
            [
                (6, MessageState::Edited, 0, String::new()),
                (7, MessageState::Edited, 0, "before".to_owned()),
                (8, MessageState::Edited, 7, "before".to_owned()),
            ]
        );
        amend(&mut town, ann, (TEAM, 7), (AmendAction::Recall, 5, "")).unwrap();
        assert_eq!(
            history(&mut town, cid, TEAM)[4],
            (7, MessageState::Recalled, 0, String::new()),
            "gone for everybody"
        );
        assert_eq!(history(&mut town, bob, TEAM)[4].3, "secret");
    }
}

fn hide(town: &mut Town, seat: Seat, (with, seq): (&str, u64), refusal: Option<ErrorCode>) {
    let (action, kind) = (AmendAction::DeleteForMe, BodyKind::Text);
    let request = Amend { with, seq: Seq(seq), action, kind, client_seq: 0, body: b"" };
    town.expect(seat, ChatRequest::Amend(request), refusal);
}

fn told_hidden(town: &mut Town, seat: Seat) -> Vec<(ConversationId, Seq)> {
    let hidden = |frame: &Vec<u8>| match decode(frame) {
        Reply::Chat(ChatReply::Hidden { conversation, seq }) => Some((conversation, seq)),
        _ => None,
    };
    town.told(seat).iter().filter_map(hidden).collect()
}

#[test]
fn what_a_user_deletes_for_himself_is_gone_for_all_his_devices_and_nobody_else() {
    for shards in [1, 2, 5] {
        let mut town = Town::new(shards, |_| ());
        for (a, b) in PAIRS {
            let (ann, bob, tablet) = (town.login(a), town.login(b), town.login_as(b, 2, DeviceKind::Tablet));
            for client_seq in 1..=3 {
                town.send(ann, b, Class::Durable, client_seq).unwrap();
            }
            amend(&mut town, ann, (b, 2), (AmendAction::Edit, 4, "new")).unwrap();
            town.told(tablet);
            hide(&mut town, bob, (a, 2), None);
            let id = ConversationId::direct(&UserName::new(a).unwrap(), &UserName::new(b).unwrap());
            assert_eq!(told_hidden(&mut town, tablet), [(id, Seq(2))]);
            assert!(told_hidden(&mut town, ann).is_empty() && told_hidden(&mut town, bob).is_empty());
            hide(&mut town, tablet, (a, 2), None);
            assert_eq!(town.told(bob).len(), 1, "told again, and nothing else has changed");
            hide(&mut town, ann, (b, 3), None);
        }
        town.restart(3);
        for (a, b) in PAIRS {
            let (ann, phone) = (town.login(a), town.login_as(b, 3, DeviceKind::Phone));
            let (hello, no) = ("hello".to_owned(), String::new());
            let of_bob = vec![
                (1, MessageState::AsSent, 0, hello.clone()),
                (2, MessageState::Hidden, 0, no.clone()),
                (3, MessageState::AsSent, 0, hello.clone()),
                (4, MessageState::AsSent, 2, no.clone()),
            ];
            assert_eq!((history(&mut town, phone, a), synced(&mut town, phone)), (of_bob.clone(), of_bob));
            let of_ann = vec![
                (1, MessageState::AsSent, 0, hello.clone()),
                (2, MessageState::Edited, 0, "new".to_owned()),
                (3, MessageState::Hidden, 0, no.clone()),
                (4, MessageState::Edited, 2, "new".to_owned()),
            ];
            assert_eq!(history(&mut town, ann, b), of_ann);
            amend(&mut town, ann, (b, 3), (AmendAction::Recall, 5, "")).unwrap();
        }
    }
}

#[test]
fn only_what_is_there_for_a_user_can_be_deleted_for_him() {
    for shards in [1, 3] {
        let (mut town, [ann, bob, cid, _]) = team(shards);
        town.send(ann, TEAM, Class::Durable, 1).unwrap();
        amend(&mut town, ann, (TEAM, 6), (AmendAction::Edit, 2, "new")).unwrap();
        for seq in [0, 1, 7, 8, u64::MAX] {
            hide(&mut town, ann, (TEAM, seq), Some(ErrorCode::NoSuchMessage));
        }
        hide(&mut town, bob, ("ann", 1), Some(ErrorCode::NoSuchMessage));
        hide(&mut town, bob, ("#none", 1), Some(ErrorCode::NoSuchMessage));
        hide(&mut town, bob, (" ", 1), Some(ErrorCode::BadName));
        hide(&mut town, cid, (TEAM, 6), None);
        act(&mut town, cid, GroupAct::Leave);
        town.send(ann, TEAM, Class::Durable, 3).unwrap();
        hide(&mut town, cid, (TEAM, 9), Some(ErrorCode::NoSuchMessage));
        assert_eq!(history(&mut town, cid, TEAM).iter().filter(|shown| !shown.3.is_empty()).count(), 0);
        assert_eq!(history(&mut town, ann, TEAM)[5].3, "new");
    }
}

#[test]
fn a_device_that_was_away_learns_of_everything_in_order() {
    for shards in [1, 2, 5] {
        let mut town = Town::new(shards, |_| ());
        let (ann, bob) = (town.login("ann"), town.login("bob"));
        for client_seq in 1..=3 {
            town.send(ann, "bob", Class::Durable, client_seq).unwrap();
        }
        let conversation = ConversationId::direct(&UserName::new("ann").unwrap(), &UserName::new("bob").unwrap());
        town.ask(bob, Request::Ack(Ack::Upto { conversation, seq: Seq(3) }));
        town.pass(2_000);
        town.leave(bob);
        for (seq, action, client_seq, body) in [
            (1, AmendAction::Edit, 4, "one"),
            (1, AmendAction::Edit, 5, "two"),
            (2, AmendAction::Edit, 6, "secret"),
            (2, AmendAction::Recall, 7, ""),
            (3, AmendAction::DeleteForAll, 8, ""),
        ] {
            amend(&mut town, ann, ("bob", seq), (action, client_seq, body)).unwrap();
        }
        let bob = town.login("bob");
        let no = String::new();
        assert_eq!(
            synced(&mut town, bob),
            [
                (4, MessageState::AsSent, 1, no.clone()),
                (5, MessageState::Edited, 1, "two".to_owned()),
                (6, MessageState::AsSent, 2, no.clone()),
                (7, MessageState::Recalled, 2, no.clone()),
                (8, MessageState::Deleted, 3, no),
            ]
        );
    }
}

/// How often a device was told to fetch, and what it was pushed.
fn pushed(town: &mut Town, seat: Seat) -> (usize, Vec<String>) {
    let (mut lagged, mut bodies) = (0, Vec::new());
    for frame in town.told(seat) {
        match decode(&frame) {
            Reply::Lagged { .. } => lagged += 1,
            Reply::Deliver(message) => bodies.push(String::from_utf8(message.body.to_vec()).unwrap()),
            _ => {}
        }
    }
    (lagged, bodies)
}

#[test]
fn a_later_edit_of_what_a_user_deleted_for_himself_is_not_pushed_to_him() {
    for shards in [1, 2, 5] {
        let (mut town, [ann, bob, cid, _]) = team(shards);
        let tablet = town.login_as("bob", 2, DeviceKind::Tablet);
        for (with, client_seq) in [("bob", 1), (TEAM, 2)] {
            let seq = town.send(ann, with, Class::Durable, client_seq).unwrap().seq;
            let from = if with == "bob" { "ann" } else { TEAM };
            [bob, tablet, cid].into_iter().for_each(|seat| drop(town.told(seat)));
            let edit = (AmendAction::Edit, 10 + client_seq, "pushed");
            amend(&mut town, ann, (with, seq.0), edit).unwrap();
            let before = if client_seq == 1 { (0, vec!["pushed".to_owned()]) } else { (1, Vec::new()) };
            assert_eq!(pushed(&mut town, bob), before, "to who has hidden nothing yet");
            hide(&mut town, bob, (from, seq.0), None);
            town.told(tablet);
            amend(&mut town, ann, (with, seq.0), (AmendAction::Edit, 20 + client_seq, "secret")).unwrap();
            for seat in [bob, tablet] {
                assert_eq!(pushed(&mut town, seat), (1, Vec::new()), "both devices fetch it");
            }
            let hidden = history(&mut town, bob, from).into_iter().find(|row| row.0 == seq.0).unwrap();
            assert_eq!((hidden.1, &hidden.3[..]), (MessageState::Hidden, ""));
            assert!(history(&mut town, bob, from).iter().all(|row| row.3 != "secret"));
            town.told(bob);
            town.send(ann, with, Class::Durable, 30 + client_seq).unwrap();
            assert_eq!(pushed(&mut town, bob).0, 0, "messages are pushed as ever");
        }
        assert_eq!(pushed(&mut town, cid).1.iter().filter(|body| *body == "secret").count(), 1);
        town.restart(2);
        let (ann, bob) = (town.login("ann"), town.login("bob"));
        let seq = town.send(ann, "bob", Class::Durable, 90).unwrap().seq;
        town.told(bob);
        amend(&mut town, ann, ("bob", seq.0), (AmendAction::Edit, 91, "secret")).unwrap();
        assert_eq!(pushed(&mut town, bob), (1, Vec::new()), "remembered");
    }
}
