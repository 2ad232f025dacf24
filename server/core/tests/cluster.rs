//! Several nodes as one chat: what a user has at one node is in force for what another keeps, and waits for one that is away.

#[path = "groups/town.rs"]
mod town;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::message::chat::{Amend, AmendAction, Sync};
use ringline_schema::message::group::JoinPolicy;
use ringline_schema::message::*;
use ringline_schema::record::{Record, User};
use town::{Seat, Shape, Town, decode, name};

const SHAPES: [Shape; 2] = [Shape { nodes: 2, shards: 1 }, Shape { nodes: 3, shards: 2 }];
/// Enough for a deletion to come to its end.
const DELETION_MS: u64 = 20_000;
const TOKEN: Option<Credential<'static>> = Some(Credential::Token(Secret("token")));

fn town(shape: Shape) -> Town {
    Town::of(shape, |config| config.admins = vec![name("root")])
}

/// The node that has a conversation.
fn home(town: &Town, one: &str, other: &str) -> u16 {
    town.node_of_partition(ConversationId::direct(&name(one), &name(other)).partition())
}

/// Users, the second of whom lives on another node, and so does their conversation.
fn strangers(town: &Town) -> (String, String) {
    let ann = "ann".to_owned();
    let mut others = (0..).map(|number| format!("other-{number}"));
    let far =
        |other: &String| home(town, &ann, other) != town.node_of(&ann) && town.node_of(other) != town.node_of(&ann);
    let bob = others.find(far).unwrap();
    (ann, bob)
}

fn told(town: &mut Town, seat: Seat, request: Request<'_>) -> Result<(), ErrorCode> {
    match decode(&town.answer(seat, request)) {
        Reply::Chat(ChatReply::Done) | Reply::SendAck(_) => Ok(()),
        Reply::Failure { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

fn amend<'a>(with: &'a str, seq: u64, action: AmendAction, (client_seq, body): (u64, &'a [u8])) -> Request<'a> {
    let (seq, kind) = (Seq(seq), BodyKind::Text);
    Request::Chat(ChatRequest::Amend(Amend { with, seq, action, kind, client_seq, body }))
}

fn hide(town: &mut Town, seat: Seat, with: &str, seq: u64) -> Result<(), ErrorCode> {
    told(town, seat, amend(with, seq, AmendAction::DeleteForMe, (0, b"")))
}

/// Number, state and length of messages.
type Shown = Vec<(u64, MessageState, usize)>;

fn shown(messages: &[Message<'_>]) -> Shown {
    messages.iter().map(|message| (message.seq.0, message.extra.state, message.body.len())).collect()
}

fn fetched(town: &mut Town, seat: Seat, with: &str) -> Shown {
    let fetch = Fetch { with, after: Seq(0), before: None, limit: 200, newest: false };
    let frame = town.answer(seat, Request::Fetch(fetch));
    let Reply::FetchOk { messages, .. } = decode(&frame) else { panic!("{:?}", decode(&frame)) };
    shown(&messages)
}

fn synced(town: &mut Town, seat: Seat, with: &str) -> Shown {
    let frame = town.answer(
        seat,
        Request::Chat(ChatRequest::Sync(Sync { places: Places::default(), from: Place::default(), limit: 0 })),
    );
    let Reply::Chat(ChatReply::SyncOk { messages, .. }) = decode(&frame) else { panic!("{:?}", decode(&frame)) };
    let of: Vec<_> = messages.into_iter().filter(|message| message.from == with || message.to == with).collect();
    shown(&of)
}

#[test]
fn what_a_user_deletes_for_himself_is_gone_for_him_wherever_it_is_kept() {
    use MessageState::{AsSent, Edited, Hidden};
    for shape in SHAPES {
        let mut town = town(shape);
        let (ann, bob) = strangers(&town);
        let (seat, other) = (town.login_as(&ann, 1), town.login(&bob));
        for number in 1..=3 {
            assert_eq!(town.send(other, &ann, number), Ok(Seq(number)));
        }
        assert_eq!(hide(&mut town, seat, &bob, 2), Ok(()));
        assert_eq!(hide(&mut town, seat, &bob, 2), Ok(()), "twice is as once");
        assert_eq!(hide(&mut town, seat, &bob, 9), Err(ErrorCode::NoSuchMessage));
        let expected = [(1, AsSent, 6), (2, Hidden, 0), (3, AsSent, 6)];
        assert_eq!(fetched(&mut town, seat, &bob), expected);
        assert_eq!(fetched(&mut town, other, &ann)[1], (2, AsSent, 6), "for nobody else");
        // On another device, as it catches up.
        let second = town.login_as(&ann, 2);
        assert_eq!(synced(&mut town, second, &bob), expected);
        // What its sender makes of it later is not for this user either.
        let edit = amend(&ann, 2, AmendAction::Edit, (4, b"another text"));
        assert_eq!(told(&mut town, other, edit), Ok(()));
        let edit = amend(&ann, 3, AmendAction::Edit, (5, b"seen"));
        assert_eq!(told(&mut town, other, edit), Ok(()));
        let all = fetched(&mut town, seat, &bob);
        assert_eq!(all[1..3], [(2, Hidden, 0), (3, Edited, 4)], "{all:?}");
        assert_eq!(all[3].2, 0, "the amendment of what is hidden has no body: {all:?}");
        assert_eq!(all[4].2, 4, "{all:?}");
        assert_eq!(fetched(&mut town, other, &ann)[1], (2, Edited, 12));
    }
}

#[test]
fn more_rows_than_one_question_takes_are_all_laid_over() {
    let mut town = town(SHAPES[0]);
    let (ann, bob) = strangers(&town);
    let (seat, other) = (town.login(&ann), town.login(&bob));
    for number in 1..=300 {
        town.send(other, &ann, number).unwrap();
        hide(&mut town, seat, &bob, number).unwrap();
    }
    // One that amends the first: its page needs rows from there on.
    let edit = amend(&ann, 1, AmendAction::Edit, (301, b"another text"));
    assert_eq!(told(&mut town, other, edit), Ok(()));
    let fetch = Fetch { with: &bob, after: Seq(200), before: None, limit: 200, newest: false };
    let frame = town.answer(seat, Request::Fetch(fetch));
    let Reply::FetchOk { messages, .. } = decode(&frame) else { panic!("{:?}", decode(&frame)) };
    assert!(messages.len() > 50 && messages.iter().all(|message| message.body.is_empty()), "{messages:?}");
}

#[test]
fn nothing_is_hidden_while_its_node_is_away() {
    let mut town = town(SHAPES[1]);
    let (ann, bob) = strangers(&town);
    let (seat, other) = (town.login(&ann), town.login(&bob));
    town.send(other, &ann, 1).unwrap();
    let away = home(&town, &ann, &bob);
    town.apart(away, true);
    assert_eq!(hide(&mut town, seat, &bob, 1), Err(ErrorCode::Unavailable));
    town.apart(away, false);
    assert_eq!(hide(&mut town, seat, &bob, 1), Ok(()));
    assert_eq!(fetched(&mut town, seat, &bob)[0].1, MessageState::Hidden);
}

fn delete<'a>(user: &'a str, proof: Option<Credential<'a>>) -> Request<'a> {
    Request::Chat(ChatRequest::DeleteUser { user, proof, recall: true })
}

#[test]
fn a_deletion_is_done_at_once_and_waits_with_its_work_for_a_node_that_is_away() {
    let mut town = town(SHAPES[1]);
    let (ann, bob) = strangers(&town);
    let (seat, other) = (town.login(&ann), town.login(&bob));
    let away = home(&town, &ann, &bob);
    let groups: Vec<_> = (0..6).map(|number| format!("#group-{number}")).collect();
    for group in &groups {
        let create = GroupAct::Create { title: "t", join: JoinPolicy::Open, users: Names::default() };
        town.act(seat, group, create).unwrap();
        town.act(other, group, GroupAct::Join { greeting: "" }).unwrap();
    }
    town.send(seat, &bob, 1).unwrap();
    town.apart(away, true);
    assert_eq!(told(&mut town, seat, delete(&ann, TOKEN)), Ok(()));
    let login = Login {
        user: &ann,
        credential: Credential::Token(Secret("token")),
        device: ringline_schema::ids::DeviceId(7),
        device_kind: DeviceKind::Other,
        agent: "",
    };
    assert_eq!(town.refused_at_door(&ann, Request::Login(login)), Some(ErrorCode::UserDeleted));
    town.elapse(2 * DELETION_MS);
    let text = |town: &mut Town| fetched(town, other, &ann)[0];
    town.apart(away, false);
    assert_eq!(text(&mut town), (1, MessageState::AsSent, 6), "its node could not be asked");
    town.elapse(2 * DELETION_MS);
    assert_eq!(text(&mut town), (1, MessageState::Recalled, 0));
    for group in &groups {
        let (members, _) = town.members(other, group, ("", Standing::Member)).unwrap();
        assert_eq!(members, [bob.as_str()], "{group}");
    }
    assert_eq!(town.send(other, &ann, 9), Err(ErrorCode::UserDeleted));
}

#[test]
fn administrators_delete_users_of_other_nodes_if_these_are_there() {
    let mut town = town(SHAPES[1]);
    let away = (town.node_of("root") + 1) % 3;
    let users: Vec<_> =
        (0..).map(|number| format!("user-{number}")).filter(|user| town.node_of(user) == away).take(2).collect();
    for user in &users {
        town.seed(&Record::User(User { name: name(user), password_hash: None, created_ms: 1 }));
    }
    let root = town.login("root");
    town.apart(away, true);
    assert_eq!(told(&mut town, root, delete(&users[0], None)), Err(ErrorCode::Unavailable));
    town.apart(away, false);
    assert_eq!(told(&mut town, root, delete(&users[0], None)), Ok(()));
    assert_eq!(told(&mut town, root, delete(&users[0], None)), Err(ErrorCode::UserDeleted));
    assert_eq!(told(&mut town, root, delete("nobody", None)), Err(ErrorCode::NoSuchUser));
    // It goes while it is asked: perhaps it has done it.
    town.drops = |message| matches!(message, ringline_core::event::ShardMessage::Done { .. });
    town.ask(root, delete(&users[1], None));
    town.drops = |_| false;
    assert_eq!(town.told(root).len(), 0);
    town.apart(away, true);
    let frames = town.told(root);
    assert!(matches!(decode(&frames[0]), Reply::Failure { code: ErrorCode::Unknown, .. }), "{frames:?}");
}
