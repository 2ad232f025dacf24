//! DELETE_USER: who may, what is so from then on, what becomes of groups, messages and rows, and that no crash between two
//! records and no lost message of a lane leaves anything undone.

#[path = "groups/town.rs"]
mod town;

use ringline_core::config::{DELETIONS_MAX, LOGIN_FAILURES_MAX};
use ringline_core::event::{Act, ShardMessage};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::{AmendAction, Mark, SIGNAL_TYPING};
use ringline_schema::message::group::{JoinPolicy, Role, What};
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Query, Record, User};
use ringline_schema::rows::{MemberRow, Membership, Row, RowKey, RowList, RowValue};
use town::{Seat, Shape, Town, decode, name};

/// A node alone, and nodes of a cluster.
const SHAPES: [Shape; 5] = [
    Shape { nodes: 1, shards: 1 },
    Shape { nodes: 1, shards: 2 },
    Shape { nodes: 1, shards: 5 },
    Shape { nodes: 2, shards: 1 },
    Shape { nodes: 3, shards: 2 },
];
/// Enough for a deletion to come to its end.
const DELETION_MS: u64 = 12_000;
const PASSWORD: Option<Credential<'static>> = Some(Credential::Password(Secret("secret")));
const TOKEN: Option<Credential<'static>> = Some(Credential::Token(Secret("token")));

fn town(shape: impl Into<Shape>) -> Town {
    Town::of(shape.into(), |config| config.admins = vec![name("root")])
}

fn with_password(town: &mut Town, user: &str) {
    town.seed(&Record::User(User { name: name(user), password_hash: Some("secret".into()), created_ms: 1 }));
}

fn delete<'a>(user: &'a str, proof: Option<Credential<'a>>, recall: bool) -> Request<'a> {
    Request::Chat(ChatRequest::DeleteUser { user, proof, recall })
}

/// The answer to a request: DONE, or why not.
fn done(town: &mut Town, seat: Seat, request: Request<'_>) -> Result<(), ErrorCode> {
    match decode(&town.answer(seat, request)) {
        Reply::Chat(ChatReply::Done) => Ok(()),
        Reply::Failure { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

fn kicks(town: &mut Town, seat: Seat) -> Vec<KickReason> {
    let reason = |frame: &Vec<u8>| match decode(frame) {
        Reply::Kicked { reason, .. } => Some(reason),
        _ => None,
    };
    town.told(seat).iter().filter_map(reason).collect()
}

fn rows(town: &mut Town, list: RowList) -> Vec<Row> {
    match town.stored(Query::Rows { list, after: None, limit: 1_000 }) {
        Answer::Rows(rows) => rows,
        other => panic!("{other:?}"),
    }
}

fn row(town: &mut Town, key: RowKey) -> Option<RowValue> {
    match town.stored(Query::Row { key }) {
        Answer::Row(row) => row.and_then(|row| row.value),
        other => panic!("{other:?}"),
    }
}

fn member(town: &mut Town, group: &str, user: &str) -> Option<MemberRow> {
    match row(town, RowKey::Member(ConversationId::group(&name(group)), name(user))) {
        Some(RowValue::Member(row)) => Some(row),
        None => None,
        other => panic!("{other:?}"),
    }
}

fn owner(town: &mut Town, group: &str) -> (String, bool) {
    match row(town, RowKey::Group(ConversationId::group(&name(group)))) {
        Some(RowValue::Group(row)) => (row.owner.as_str().to_owned(), row.dissolved != Seq::ZERO),
        other => panic!("{other:?}"),
    }
}

/// Nothing is left of the user but that it was deleted.
fn expect_erased(town: &mut Town, user: &str) {
    let user = name(user);
    for list in [
        RowList::Devices(user.clone()),
        RowList::Marks(user.clone()),
        RowList::Blocks(user.clone()),
        RowList::AllHidden(user.clone()),
        RowList::Deletions,
    ] {
        assert_eq!(rows(town, list), []);
    }
    let Some(RowValue::Setting(setting)) = row(town, RowKey::Setting(user.clone())) else { panic!("no settings") };
    assert!(setting.deleted_ms != 0 && setting.status.is_empty() && setting.last_seen_ms == 0 && !setting.visible);
    let Answer::User(Some(found)) = town.stored(Query::User { name: user }) else { panic!("the name is free") };
    assert_eq!(found.password_hash, None);
}

fn create(town: &mut Town, seat: Seat, group: &str, join: JoinPolicy) {
    town.act(seat, group, GroupAct::Create { title: "t", join, users: Names::default() }).unwrap();
}

/// A user who has everything that can be had.
fn settle_in(town: &mut Town, user: &str) -> Seat {
    ["bob", "carl", "eve"].into_iter().for_each(|user| town.seed_user(user));
    let seat = town.login_as(user, 1);
    for other in ["bob", "carl"] {
        done(town, seat, Request::Chat(ChatRequest::Block { user: other })).unwrap();
        done(town, seat, Request::Chat(ChatRequest::Unblock { user: other })).unwrap();
    }
    done(town, seat, Request::Chat(ChatRequest::Block { user: "eve" })).unwrap();
    let set = ChatRequest::PresenceSet { status: Some("here I am"), visible: None };
    done(town, seat, Request::Chat(set)).unwrap();
    let seq = town.send(seat, "bob", 1).unwrap();
    let conversation = ConversationId::direct(&name(user), &name("bob"));
    let mark = Mark { conversation, pinned: Some(true), muted_until_ms: Some(9) };
    done(town, seat, Request::Chat(ChatRequest::Mark(mark))).unwrap();
    hide(town, seat, "bob", seq).unwrap();
    seat
}

fn hide(town: &mut Town, seat: Seat, with: &str, seq: Seq) -> Result<(), ErrorCode> {
    let (action, kind) = (AmendAction::DeleteForMe, BodyKind::Text);
    let amend = chat::Amend { with, seq, action, kind, client_seq: 0, body: b"" };
    done(town, seat, Request::Chat(ChatRequest::Amend(amend)))
}

/// The states of the messages of a conversation, as somebody is shown them.
fn states(town: &mut Town, seat: Seat, with: &str) -> Vec<(String, BodyKind, MessageState)> {
    let fetch = Fetch { with, after: Seq(0), before: None, limit: 200, newest: false };
    let frame = town.answer(seat, Request::Fetch(fetch));
    let Reply::FetchOk { messages, .. } = decode(&frame) else { panic!("{:?}", decode(&frame)) };
    messages.iter().map(|message| (message.from.to_owned(), message.kind, message.extra.state)).collect()
}

#[test]
fn until_it_is_on_disk_nobody_is_told_that_it_is_so() {
    for shards in [1, 2, 5] {
        let mut town = town(shards);
        let (root, ann) = (town.login("root"), town.login("ann"));
        town.committing = false;
        town.ask(ann, delete("ann", TOKEN, false));
        assert!(town.told(ann).is_empty());
        let (credential, device) = (Credential::Token(Secret("token")), DeviceId(2));
        let login = Login { user: "ann", credential, device, device_kind: DeviceKind::Other, agent: "" };
        assert_eq!(town.refused_at_door("ann", Request::Login(login)), Some(ErrorCode::Busy), "a crash may undo it");
        assert_eq!(done(&mut town, root, delete("ann", None, false)), Err(ErrorCode::Busy));
        assert_eq!(town.restarted(shards).refused_at_door("ann", Request::Login(login)), None);
        town.committing = true;
        town.settle();
        assert_eq!(kicks(&mut town, ann), [KickReason::UserDeleted]);
        assert_eq!(town.refused_at_door("ann", Request::Login(login)), Some(ErrorCode::UserDeleted));
        assert_eq!(done(&mut town, root, delete("ann", None, false)), Err(ErrorCode::UserDeleted));
        assert_eq!(town.restarted(shards).refused_at_door("ann", Request::Login(login)), Some(ErrorCode::UserDeleted));
    }
}

#[test]
fn own_accounts_take_a_proof_and_those_of_others_an_administrator() {
    for shape in SHAPES {
        let mut town = town(shape);
        ["ann", "root"].into_iter().for_each(|user| with_password(&mut town, user));
        let (ann, bob, root) = (town.login("ann"), town.login("bob"), town.login("root"));
        let long = "x".repeat(limits::PASSWORD_BYTES_MAX + 1);
        let wrong = |secret| Some(Credential::Password(Secret(secret)));
        for (seat, request, code) in [
            (bob, delete("ann", TOKEN, false), ErrorCode::NotAllowed),
            (bob, delete("nobody", TOKEN, false), ErrorCode::NotAllowed),
            (bob, delete("#group", TOKEN, false), ErrorCode::BadName),
            (root, delete("nobody", None, false), ErrorCode::NoSuchUser),
            (root, delete("root", None, false), ErrorCode::AuthFailed),
            (ann, delete("ann", None, false), ErrorCode::AuthFailed),
            (ann, delete("ann", wrong("secrets"), false), ErrorCode::AuthFailed),
            (ann, delete("ann", wrong(&long), false), ErrorCode::AuthFailed),
            // A token may have been lent; who has a password says it.
            (ann, delete("ann", TOKEN, false), ErrorCode::AuthFailed),
            (bob, delete("bob", PASSWORD, false), ErrorCode::AuthFailed),
            (bob, delete("bob", Some(Credential::Token(Secret("wrong"))), false), ErrorCode::AuthFailed),
        ] {
            assert_eq!(done(&mut town, seat, request), Err(code), "{request:?}");
        }
        assert_eq!(done(&mut town, ann, delete("ann", PASSWORD, false)), Ok(()));
        assert_eq!(done(&mut town, bob, delete("bob", TOKEN, false)), Ok(()));
        town.login("carl");
        assert_eq!(done(&mut town, root, delete("carl", None, false)), Ok(()));
        for user in ["ann", "bob", "carl"] {
            assert_eq!(done(&mut town, root, delete(user, None, false)), Err(ErrorCode::UserDeleted));
        }
        assert_eq!(done(&mut town, root, delete("root", PASSWORD, false)), Ok(()));
    }
}

#[test]
fn guesses_of_the_proof_end_the_connection() {
    let mut town = town(2);
    with_password(&mut town, "ann");
    let ann = town.login("ann");
    let guess = || delete("ann", Some(Credential::Password(Secret("guess!"))), false);
    for _ in 1..LOGIN_FAILURES_MAX {
        assert_eq!(done(&mut town, ann, guess()), Err(ErrorCode::AuthFailed));
    }
    assert_eq!(done(&mut town, ann, guess()), Err(ErrorCode::TooManyLogins));
    let (again, other) = (town.login_as("ann", 1), town.login_as("ann", 2));
    assert_eq!(done(&mut town, other, guess()), Err(ErrorCode::AuthFailed), "counted by connection");
    assert!(town.send(again, "ann", 1).is_ok());
}

#[test]
fn from_done_on_the_user_is_gone() {
    for shape in SHAPES {
        let mut town = town(shape);
        let (ann, phone) = (settle_in(&mut town, "ann"), town.login_as("ann", 2));
        let (bob, carl) = (town.login("bob"), town.login("carl"));
        assert!(town.send(bob, "ann", 1).is_ok(), "who may write is remembered");
        create(&mut town, carl, "#club", JoinPolicy::Invite);
        let watch = Request::Chat(ChatRequest::Watch { users: (&["ann"][..]).into() });
        town.ask(carl, watch);
        town.elapse(1_500);
        [ann, phone, bob, carl].into_iter().for_each(|seat| drop(town.told(seat)));
        assert_eq!(done(&mut town, ann, delete("ann", TOKEN, false)), Ok(()));
        assert_eq!(kicks(&mut town, ann), [KickReason::UserDeleted], "after DONE");
        assert_eq!(kicks(&mut town, phone), [KickReason::UserDeleted]);
        expect_gone(&mut town, bob);
        town.elapse(1_500);
        let seen = town.told(carl).iter().any(|frame| match decode(frame) {
            Reply::Chat(ChatReply::PresenceChanged { users }) => users
                .iter()
                .any(|row| row.user == "ann" && !row.online && row.last_seen_ms == 0 && row.status.is_empty()),
            _ => false,
        });
        assert!(seen, "who watches sees the user go");
        let users = &["ann"][..];
        let invite = GroupAct::Invite { users: users.into() };
        assert_eq!(town.act(carl, "#club", invite), Err(ErrorCode::UserDeleted));
        town.elapse(DELETION_MS);
        expect_erased(&mut town, "ann");
        expect_gone(&mut town, bob);
        let shown = states(&mut town, bob, "ann");
        assert!(shown.iter().all(|(_, _, state)| *state == MessageState::AsSent), "{shown:?}");
        assert_eq!(shown.iter().map(|(from, ..)| &from[..]).collect::<Vec<_>>(), ["ann", "bob"]);
        let mut town = town.restarted(shape.shards % 3 + 1);
        town.elapse(2_000);
        let bob = town.login("bob");
        expect_gone(&mut town, bob);
        expect_erased(&mut town, "ann");
    }
}

/// What anybody is told who wants something of ann.
fn expect_gone(town: &mut Town, bob: Seat) {
    let gone = Some(ErrorCode::UserDeleted);
    let login = Login {
        user: "ann",
        credential: Credential::Token(Secret("token")),
        device: DeviceId(3),
        device_kind: DeviceKind::Other,
        agent: "",
    };
    let password = Credential::Password(Secret("secret"));
    for request in [
        Request::Register { user: "ann", password: Secret("secret") },
        Request::Login(login),
        Request::Login(Login { credential: password, ..login }),
    ] {
        assert_eq!(town.refused_at_door("ann", request), gone, "{request:?}");
    }
    let code = |frame: Vec<u8>| match decode(&frame) {
        Reply::Failure { code, .. } => Some(code),
        _ => None,
    };
    for class in [Class::Durable, Class::Transient] {
        let (kind, mentions) = (BodyKind::Text, Mentions::default());
        let send = Send { to: "ann", class, kind, client_seq: 70, ack_timeout_ms: None, body: b"?", mentions };
        assert_eq!(code(town.answer(bob, Request::Send(send))), gone, "{class:?}");
    }
    let signal = ChatRequest::Signal { to: "ann", kind: SIGNAL_TYPING, body: b"" };
    assert_eq!(code(town.answer(bob, Request::Chat(signal))), gone);
    let (action, kind) = (AmendAction::Edit, BodyKind::Text);
    let edit = chat::Amend { with: "ann", seq: Seq(2), action, kind, client_seq: 71, body: b"!" };
    assert_eq!(code(town.answer(bob, Request::Chat(ChatRequest::Amend(edit)))), gone);
}

/// Groups in all the roles that ann can have.
fn join_groups(town: &mut Town, ann: Seat, others: [Seat; 3]) {
    let [bob, carl, dora] = others;
    for group in ["#heir-admin", "#heir-member", "#alone", "#over"] {
        create(town, ann, group, JoinPolicy::Open);
    }
    let join = GroupAct::Join { greeting: "" };
    for (seat, ms) in [(carl, 1), (dora, 1), (bob, 1)] {
        town.pass(ms);
        town.act(seat, "#heir-admin", join).unwrap();
        town.act(seat, "#heir-member", join).unwrap();
    }
    for user in ["dora", "bob"] {
        town.act(ann, "#heir-admin", GroupAct::Role { user, role: Role::Admin }).unwrap();
    }
    town.act(ann, "#over", GroupAct::Dissolve).unwrap();
    create(town, bob, "#bobs", JoinPolicy::Open);
    town.act(ann, "#bobs", join).unwrap();
    town.send(ann, "#bobs", 1).unwrap();
    create(town, bob, "#left", JoinPolicy::Open);
    town.act(ann, "#left", join).unwrap();
    town.send(ann, "#left", 1).unwrap();
    town.act(ann, "#left", GroupAct::Leave).unwrap();
    create(town, bob, "#invited", JoinPolicy::Invite);
    let users = &["ann"][..];
    town.act(bob, "#invited", GroupAct::Invite { users: users.into() }).unwrap();
    create(town, bob, "#asked", JoinPolicy::Approval);
    town.act(ann, "#asked", join).unwrap();
}

/// What has become of them.
fn expect_left(town: &mut Town) {
    for group in ["#heir-admin", "#heir-member", "#alone", "#over", "#bobs", "#left"] {
        let row = member(town, group, "ann").unwrap();
        assert_eq!((row.standing, row.role), (Standing::Left, Role::Member), "{group}");
        assert!(row.ranges.iter().all(|range| range.leave.is_some()), "{group}");
    }
    for group in ["#invited", "#asked"] {
        assert_eq!(member(town, group, "ann"), None, "{group}");
    }
    assert_eq!(owner(town, "#heir-admin"), ("dora".to_owned(), false), "the administrator who came first");
    assert_eq!(owner(town, "#heir-member"), ("carl".to_owned(), false), "the member who came first");
    assert_eq!(owner(town, "#alone"), ("ann".to_owned(), true));
    assert_eq!(owner(town, "#over"), ("ann".to_owned(), true));
    assert_eq!(member(town, "#heir-admin", "dora").map(|row| row.role), Some(Role::Owner));
    assert_eq!(member(town, "#heir-admin", "bob").map(|row| row.role), Some(Role::Admin));
    let count = town.stored(Query::GroupCount { user: name("ann") });
    assert_eq!(count, Answer::Count(0));
}

#[test]
fn groups_are_left_and_those_of_the_user_go_to_the_oldest() {
    for shape in SHAPES {
        let mut town = town(shape);
        let [ann, bob, carl, dora] = ["ann", "bob", "carl", "dora"].map(|user| town.login(user));
        join_groups(&mut town, ann, [bob, carl, dora]);
        town.told(bob);
        assert_eq!(done(&mut town, ann, delete("ann", TOKEN, false)), Ok(()));
        town.elapse(DELETION_MS);
        expect_left(&mut town);
        expect_erased(&mut town, "ann");
        let told = town.told(bob);
        let change = |frame: &Vec<u8>| match decode(frame) {
            Reply::Deliver(message) if message.to == "#heir-admin" => message.extra.change.map(|change| {
                let users: Vec<_> = change.users.iter().map(str::to_owned).collect();
                (change.what, users, change.number)
            }),
            _ => None,
        };
        let changes: Vec<_> = told.iter().filter_map(change).collect();
        let heir = (What::Transferred, vec!["dora".to_owned()], 0);
        assert_eq!(changes, [heir, (What::Left, vec!["ann".to_owned()], 1)], "rows of the log, pushed to members");
        assert!(town.act(dora, "#heir-admin", GroupAct::Role { user: "bob", role: Role::Member }).is_ok());
        let (members, _) = town.members(bob, "#bobs", ("", Standing::Member)).unwrap();
        assert_eq!(members, ["bob"]);
        assert_eq!(states(&mut town, bob, "#bobs")[2].2, MessageState::AsSent, "what was written stays");
    }
}

#[test]
fn messages_are_taken_back_if_that_is_wanted_and_those_of_others_never() {
    for shape in SHAPES {
        let mut town = town(shape);
        let [ann, bob, carl, dora] = ["ann", "bob", "carl", "dora"].map(|user| town.login(user));
        join_groups(&mut town, ann, [bob, carl, dora]);
        // More than one page, and one that carl has already deleted for himself.
        for number in 1..=70 {
            town.send(ann, "carl", number).unwrap();
            town.send(carl, "ann", number).unwrap();
        }
        hide(&mut town, carl, "ann", Seq(3)).unwrap();
        town.told(carl);
        assert_eq!(done(&mut town, ann, delete("ann", TOKEN, true)), Ok(()));
        town.elapse(2 * DELETION_MS);
        expect_left(&mut town);
        expect_erased(&mut town, "ann");
        for (from, kind, state) in states(&mut town, carl, "ann") {
            match (&from[..], kind) {
                ("ann", BodyKind::Text) => assert!(matches!(state, MessageState::Recalled | MessageState::Hidden)),
                ("carl", BodyKind::Text) => assert_eq!(state, MessageState::AsSent),
                (_, kind) => assert_eq!(kind, BodyKind::Amendment),
            }
        }
        let amended = rows(&mut town, RowList::Amended(ConversationId::direct(&name("ann"), &name("carl"))));
        assert_eq!(amended.len(), 70, "each once");
        for group in ["#bobs", "#left"] {
            let shown = states(&mut town, bob, group);
            let texts: Vec<_> = shown.iter().filter(|(_, kind, _)| *kind == BodyKind::Text).collect();
            assert!(texts.iter().all(|(_, _, state)| *state == MessageState::Recalled), "{group}: {texts:?}");
            assert_eq!(texts.len(), 1, "{group}, left before or not");
        }
        let recalled = town.delivered(carl).len();
        assert!(recalled >= 70, "devices are told as of any message: {recalled}");
    }
}

/// Everything up to the request, in a node that is the same every time.
fn prepared(shape: impl Into<Shape>) -> (Town, Seat) {
    let mut town = town(shape);
    with_password(&mut town, "ann");
    let ann = settle_in(&mut town, "ann");
    let [bob, carl, dora] = ["bob", "carl", "dora"].map(|user| town.login(user));
    join_groups(&mut town, ann, [bob, carl, dora]);
    (town, ann)
}

fn whole_deletion(shape: Shape) -> usize {
    let (mut town, ann) = prepared(shape);
    let before = town.records;
    assert_eq!(done(&mut town, ann, delete("ann", PASSWORD, true)), Ok(()));
    town.elapse(2 * DELETION_MS);
    expect_left(&mut town);
    expect_erased(&mut town, "ann");
    town.records - before
}

#[test]
fn a_crash_between_any_two_records_is_only_a_pause() {
    for shape in (1..=5).map(Shape::from).chain([Shape { nodes: 2, shards: 1 }, Shape { nodes: 3, shards: 2 }]) {
        let records = whole_deletion(shape);
        assert!(records > 20, "{records} records");
        for cut in 0..records {
            let (mut town, ann) = prepared(shape);
            town.records_max = town.records + cut;
            town.ask(ann, delete("ann", PASSWORD, true));
            town.elapse(2 * DELETION_MS);
            assert!(town.is_dead(), "{cut} of {records} records");
            let mut town = town.restarted(shape.shards % 5 + 1);
            town.elapse(2 * DELETION_MS);
            if cut == 0 {
                assert!(member(&mut town, "#bobs", "ann").is_some_and(|row| row.standing == Standing::Member));
                town.login("ann");
                continue;
            }
            expect_left(&mut town);
            expect_erased(&mut town, "ann");
            let bob = town.login("bob");
            expect_gone(&mut town, bob);
            for with in ["ann", "#bobs", "#left"] {
                let shown = states(&mut town, bob, with);
                let own = shown.iter().filter(|(from, kind, _)| from == "ann" && *kind == BodyKind::Text);
                let states: Vec<_> = own.map(|(_, _, state)| *state).collect();
                assert_eq!(states, [MessageState::Recalled], "{with} after {cut} records");
            }
        }
    }
}

#[test]
fn what_a_lane_loses_is_asked_again() {
    let of_deletion = |message: &ShardMessage| match message {
        ShardMessage::Submit(submit) => submit.act() == Some(&Act::Depart) || submit.message.device == DeviceId(0),
        ShardMessage::GroupAnswered { origin, .. }
        | ShardMessage::SendResult { origin, .. }
        | ShardMessage::Fetch { origin, .. }
        | ShardMessage::Fetched { origin, .. } => origin.conn.slot == u32::MAX,
        _ => false,
    };
    for shape in [2.into(), 5.into(), Shape { nodes: 2, shards: 1 }, Shape { nodes: 3, shards: 2 }] {
        let (mut town, ann) = prepared(shape);
        town.drops = of_deletion;
        assert_eq!(done(&mut town, ann, delete("ann", PASSWORD, true)), Ok(()), "nobody waits for what is lost");
        town.elapse(3 * DELETION_MS);
        assert_eq!(rows(&mut town, RowList::Deletions).len(), 1, "it goes on trying");
        town.drops = |_| false;
        town.elapse(3 * DELETION_MS);
        expect_left(&mut town);
        expect_erased(&mut town, "ann");
    }
}

#[test]
fn a_node_that_was_not_told_by_all_its_shards_answers_all_the_same() {
    let mut town = town(3);
    let ann = town.login("ann");
    town.drops = |message| matches!(message, ShardMessage::Social(_));
    town.ask(ann, delete("ann", TOKEN, false));
    assert_eq!(town.told(ann).len(), 0, "shards are asked first");
    town.elapse(6_000);
    let told = town.told(ann);
    assert!(matches!(decode(&told[0]), Reply::Chat(ChatReply::Done)), "{told:?}");
}

#[test]
fn long_lists_go_page_by_page() {
    let mut town = town(3);
    let ann = town.login("ann");
    let (mut seeded, groups) = (Vec::new(), 150);
    for number in 0..groups {
        let group = format!("#group-{number}");
        town.seed_rows(group_rows(&group, number % 2 == 0));
        seeded.push(group);
    }
    let blocks = (0..700).map(|number| RowKey::Block(name("ann"), name(&format!("user-{number}"))));
    town.seed_rows(blocks.map(|key| Row { key, stamp: 1, value: Some(RowValue::Block) }).collect());
    assert_eq!(done(&mut town, ann, delete("ann", TOKEN, false)), Ok(()));
    town.elapse(DELETION_MS);
    expect_erased(&mut town, "ann");
    for (number, group) in seeded.iter().enumerate() {
        assert_eq!(member(&mut town, group, "ann").map(|row| row.standing), Some(Standing::Left), "{group}");
        let heir = if number % 2 == 0 { "bob" } else { "carl" };
        assert_eq!(owner(&mut town, group), (heir.to_owned(), false));
    }
}

/// A group of ann, bob and carl, as earlier runs have left it.
fn group_rows(group: &str, bob_is_older: bool) -> Vec<Row> {
    use ringline_schema::rows::GroupRow;
    let id = ConversationId::group(&name(group));
    let (join, owner, dissolved) = (JoinPolicy::Open, name("ann"), Seq(0));
    let row = GroupRow { name: name(group), title: "t".into(), join, owner, created_ms: 1, dissolved };
    let mut rows = vec![Row { key: RowKey::Group(id), stamp: 1, value: Some(RowValue::Group(row)) }];
    let since = if bob_is_older { [1, 5, 6] } else { [1, 6, 5] };
    for ((user, role), since_ms) in
        [("ann", Role::Owner), ("bob", Role::Member), ("carl", Role::Member)].into_iter().zip(since)
    {
        let ranges = vec![Membership { join: Seq(1), leave: None }];
        let member = MemberRow { standing: Standing::Member, role, since_ms, muted_until_ms: 0, ranges };
        rows.push(Row { key: RowKey::Member(id, name(user)), stamp: 1, value: Some(RowValue::Member(member)) });
    }
    rows
}

#[test]
fn as_many_deletions_wait_as_may_and_all_come_to_their_end() {
    let mut town = town(1);
    let root = town.login("root");
    let user = |number: usize| format!("user-{number}");
    (0..=DELETIONS_MAX).for_each(|number| town.seed_user(&user(number)));
    for number in 0..DELETIONS_MAX {
        assert_eq!(done(&mut town, root, delete(&user(number), None, false)), Ok(()));
    }
    let one_more = user(DELETIONS_MAX);
    assert_eq!(done(&mut town, root, delete(&one_more, None, false)), Err(ErrorCode::Busy));
    let mut town = town.restarted(2);
    let root = town.login("root");
    town.elapse(DELETION_MS);
    assert_eq!(rows(&mut town, RowList::Deletions), [], "a restart goes on with all of them");
    assert_eq!(
        done(&mut town, root, delete(&one_more, None, false)),
        Err(ErrorCode::NotAllowed),
        "of no administrator"
    );
    let names: Vec<UserName> = (0..DELETIONS_MAX).map(|number| name(&user(number))).collect();
    for user in names {
        let Some(RowValue::Setting(setting)) = row(&mut town, RowKey::Setting(user)) else { panic!("no settings") };
        assert!(setting.deleted_ms != 0);
    }
}

#[test]
fn what_is_made_while_the_user_goes_is_found_as_well() {
    for shape in SHAPES {
        let mut town = town(shape);
        let [ann, bob] = ["ann", "bob"].map(|user| town.login(user));
        assert!(town.send(bob, "ann", 1).is_ok());
        assert_eq!(done(&mut town, ann, delete("ann", TOKEN, false)), Ok(()));
        town.elapse(1_000);
        // As a request of a session that ended would have left it, had it been on its way for long.
        town.seed_rows(group_rows("#late", true));
        town.elapse(DELETION_MS);
        assert_eq!(member(&mut town, "#late", "ann").map(|row| row.standing), Some(Standing::Left));
        assert_eq!(owner(&mut town, "#late"), ("bob".to_owned(), false));
    }
}

#[test]
fn a_store_that_fails_deletes_nobody() {
    let mut town = town(1);
    let ann = town.login("ann");
    town.committing = false;
    town.ask(ann, delete("ann", TOKEN, false));
    assert!(town.told(ann).is_empty(), "not before it is on disk");
    let mut town = town.restarted(1);
    town.elapse(DELETION_MS);
    let ann = town.login("ann");
    assert!(town.send(ann, "ann", 1).is_ok());
}

#[test]
fn whoever_has_nothing_is_deleted_too() {
    // A deletion whose user is nothing to anybody: no conversation, no device, no hash.
    let mut town = town(2);
    let root = town.login("root");
    town.seed_user("ann");
    assert_eq!(done(&mut town, root, delete("ann", None, true)), Ok(()));
    town.elapse(DELETION_MS);
    expect_erased(&mut town, "ann");
}
