//! The rules of groups, over several shards: who may do what, who sees which message, and every limit at its edge.

mod edges;
mod passing;
mod receipts;
mod slices;
mod town;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::group::{JoinPolicy, Role, What};
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Query};
use ringline_schema::rows::{GroupRow, MemberRow, Row, RowKey, RowValue};
use town::{Acted, Seat, Town, decode, name};

const TEAM: &str = "#team";

fn create(join: JoinPolicy) -> GroupAct<'static> {
    GroupAct::Create { title: "The team", join, users: Names::default() }
}

fn join() -> GroupAct<'static> {
    GroupAct::Join { greeting: "" }
}

fn invite(town: &mut Town, seat: Seat, users: &[&str]) -> Acted {
    town.act(seat, TEAM, GroupAct::Invite { users: users.into() })
}

/// A town with ann as the owner of an open group, and others in it.
fn team(shards: u16, others: &[&str]) -> (Town, Seat, Vec<Seat>) {
    let mut town = Town::new(shards);
    let ann = town.login("ann");
    town.act(ann, TEAM, create(JoinPolicy::Open)).unwrap();
    let seats: Vec<_> = others.iter().map(|user| town.login(user)).collect();
    for &seat in &seats {
        town.act(seat, TEAM, join()).unwrap();
    }
    for &seat in seats.iter().chain([&ann]) {
        town.told(seat);
    }
    (town, ann, seats)
}

/// Pushes about groups that a device was told since the last look.
fn pushes(town: &mut Town, seat: Seat) -> Vec<(What, String, String)> {
    let push = |frame: &Vec<u8>| match decode(frame) {
        Reply::Group(GroupReply::Changed { group, by, change, .. }) => {
            assert_eq!(group, TEAM);
            Some((change.what, by.to_owned(), change.text.to_owned()))
        }
        _ => None,
    };
    town.told(seat).iter().filter_map(push).collect()
}

#[test]
fn a_group_from_its_creation_to_its_first_messages() {
    for shards in [1, 2, 5] {
        let mut town = Town::new(shards);
        let (ann, bob, eve) = (town.login("ann"), town.login("bob"), town.login("eve"));
        let ann2 = town.login_as("ann", 2);
        let act = GroupAct::Create { title: "The team", join: JoinPolicy::Invite, users: (&["bob"][..]).into() };
        assert_eq!(town.act(ann, TEAM, act), Ok((Seq(1), Some(Standing::Member))));
        assert_eq!(town.act(eve, TEAM, create(JoinPolicy::Open)), Err(ErrorCode::GroupExists));
        assert_eq!(pushes(&mut town, bob), [(What::Invited, "ann".to_owned(), String::new())]);
        assert_eq!(town.act(bob, TEAM, join()), Ok((Seq(2), Some(Standing::Member))));
        assert_eq!(town.send(bob, TEAM, 1), Ok(Seq(3)));
        assert_eq!(town.send(ann, TEAM, 1), Ok(Seq(4)));
        assert_eq!(town.delivered(ann), [1, 2, 3], "its own message came as an acknowledgement");
        assert_eq!(town.delivered(ann2), [1, 2, 3, 4]);
        assert_eq!(town.delivered(bob), [2, 4]);
        assert_eq!(town.fetch(bob, TEAM, 0), Ok((2, 4, vec![2, 3, 4])), "from the row of its joining on");
        assert_eq!(town.fetch(ann, TEAM, 0), Ok((1, 4, vec![1, 2, 3, 4])));
        assert_eq!(town.send(eve, TEAM, 1), Err(ErrorCode::NotMember));
        assert_eq!(town.fetch(eve, TEAM, 0), Err(ErrorCode::NoSuchGroup));
        assert_eq!(town.act(eve, TEAM, join()), Err(ErrorCode::NotInvited));
        assert!(town.told(eve).is_empty(), "nothing reached who is no member");
    }
}

#[test]
fn what_happens_is_a_message_that_says_what_and_to_whom() {
    let (mut town, ann, seats) = team(2, &["bob"]);
    town.act(ann, TEAM, GroupAct::Mute { user: "bob", for_ms: 5_000 }).unwrap();
    let told = town.told(seats[0]);
    let Reply::Deliver(message) = decode(&told[0]) else { panic!() };
    assert_eq!((message.from, message.to, message.kind), ("ann", TEAM, BodyKind::System));
    let change = message.extra.change.unwrap();
    assert_eq!((change.what, change.users.iter().collect::<Vec<_>>()), (What::Muted, vec!["bob"]));
    assert_eq!(change.number, town.now.unix_ms + 5_000);
    assert_eq!(town.send(seats[0], TEAM, 1), Err(ErrorCode::Muted));
    town.pass(5_000);
    assert!(town.send(seats[0], TEAM, 1).is_ok());
    town.act(ann, TEAM, GroupAct::Mute { user: "bob", for_ms: u64::MAX }).unwrap();
    assert_eq!(town.send(seats[0], TEAM, 2), Err(ErrorCode::Muted));
    town.act(ann, TEAM, GroupAct::Mute { user: "bob", for_ms: 0 }).unwrap();
    assert!(town.send(seats[0], TEAM, 2).is_ok());
}

#[test]
fn a_group_by_approval_asks_its_owner_and_administrators() {
    let mut town = Town::new(3);
    let (ann, bob, cid) = (town.login("ann"), town.login("bob"), town.login("cid"));
    town.act(ann, TEAM, create(JoinPolicy::Approval)).unwrap();
    town.told(ann);
    let greeting = "it's me";
    let asked = Ok((Seq(0), Some(Standing::Asked)));
    assert_eq!(town.act(bob, TEAM, GroupAct::Join { greeting }), asked);
    assert_eq!(town.act(bob, TEAM, GroupAct::Join { greeting }), asked, "asking twice is one request");
    assert_eq!(pushes(&mut town, ann), [(What::Asked, "bob".to_owned(), greeting.to_owned())]);
    assert_eq!(town.send(bob, TEAM, 1), Err(ErrorCode::NotMember));
    assert_eq!(town.members(ann, TEAM, ("", Standing::Asked)), Ok((vec!["bob".to_owned()], String::new())));
    let answer = |user, approve| GroupAct::Answer { user, approve };
    assert_eq!(town.act(cid, TEAM, answer("bob", true)), Err(ErrorCode::NotMember));
    assert_eq!(town.act(bob, TEAM, answer("bob", true)), Err(ErrorCode::NotAllowed));
    assert_eq!(town.act(ann, TEAM, answer("cid", true)), Err(ErrorCode::NoSuchMember));
    assert_eq!(town.act(ann, TEAM, answer("bob", true)), Ok((Seq(2), Some(Standing::Member))));
    assert_eq!(town.delivered(bob), [2]);
    assert_eq!(town.send(bob, TEAM, 1), Ok(Seq(3)));
    assert_eq!(town.act(cid, TEAM, join()), asked);
    assert_eq!(town.act(ann, TEAM, answer("cid", false)), Ok((Seq(0), Some(Standing::Member))));
    assert_eq!(pushes(&mut town, cid), [(What::Refused, "ann".to_owned(), String::new())]);
    assert_eq!(town.act(cid, TEAM, join()), asked);
    assert_eq!(town.act(cid, TEAM, answer("cid", false)), Ok((Seq(0), None)), "takes its own request back");
    assert_eq!(town.act(ann, TEAM, answer("cid", true)), Err(ErrorCode::NoSuchMember));
    town.act(cid, TEAM, join()).unwrap();
    assert_eq!(invite(&mut town, ann, &["cid"]), Ok((Seq(4), Some(Standing::Member))), "who has asked is let in");
    assert_eq!(town.send(cid, TEAM, 1), Ok(Seq(5)));
}

#[test]
fn invitations_are_for_users_who_exist_and_can_be_declined_and_taken_back() {
    let mut town = Town::new(4);
    let (ann, bob) = (town.login("ann"), town.login("bob"));
    town.seed_user("offline");
    town.act(ann, TEAM, create(JoinPolicy::Invite)).unwrap();
    assert_eq!(invite(&mut town, ann, &["bob", "ghost"]), Err(ErrorCode::NoSuchUser));
    assert_eq!(town.act(bob, TEAM, join()), Err(ErrorCode::NotInvited), "all or nothing");
    assert_eq!(invite(&mut town, ann, &[]), Err(ErrorCode::BadRequest));
    assert_eq!(invite(&mut town, ann, &["#team"]), Err(ErrorCode::BadName));
    assert_eq!(invite(&mut town, ann, &["ann"]), Err(ErrorCode::AlreadyMember));
    assert!(invite(&mut town, ann, &["bob", "bob", "offline", "ann"]).is_ok());
    assert!(invite(&mut town, ann, &["bob"]).is_ok(), "inviting twice is one invitation");
    let open = town.members(ann, TEAM, ("", Standing::Invited)).unwrap().0;
    assert_eq!(open, ["bob", "offline"]);
    let answer = |user, approve| GroupAct::Answer { user, approve };
    assert_eq!(town.act(bob, TEAM, answer("bob", false)), Ok((Seq(0), None)));
    assert_eq!(town.act(bob, TEAM, join()), Err(ErrorCode::NotInvited));
    invite(&mut town, ann, &["bob"]).unwrap();
    assert!(town.act(ann, TEAM, answer("bob", false)).is_ok());
    assert_eq!(town.act(bob, TEAM, join()), Err(ErrorCode::NotInvited));
    invite(&mut town, ann, &["bob"]).unwrap();
    assert_eq!(town.act(bob, TEAM, answer("bob", true)), Ok((Seq(2), Some(Standing::Member))));
    assert_eq!(invite(&mut town, bob, &["offline"]), Err(ErrorCode::NotAllowed), "a plain member does not invite");
}

#[test]
fn who_ranks_higher_may_kick_and_the_owner_alone_gives_roles() {
    let (mut town, ann, seats) = team(3, &["bob", "cid", "dan"]);
    let [bob, cid, dan] = seats[..] else { panic!() };
    let kick = |user| GroupAct::Kick { user };
    let role = |user, role| GroupAct::Role { user, role };
    assert_eq!(town.act(bob, TEAM, kick("cid")), Err(ErrorCode::NotAllowed));
    assert_eq!(town.act(bob, TEAM, role("bob", Role::Admin)), Err(ErrorCode::NotAllowed));
    assert!(town.act(ann, TEAM, role("bob", Role::Admin)).is_ok());
    assert!(town.act(ann, TEAM, role("cid", Role::Admin)).is_ok());
    assert_eq!(town.act(ann, TEAM, role("cid", Role::Owner)), Err(ErrorCode::BadRequest));
    assert_eq!(town.act(ann, TEAM, role("ann", Role::Member)), Err(ErrorCode::BadRequest));
    assert_eq!(town.act(ann, TEAM, role("eve", Role::Admin)), Err(ErrorCode::NoSuchMember));
    assert_eq!(town.act(bob, TEAM, kick("cid")), Err(ErrorCode::NotAllowed), "equals");
    assert_eq!(town.act(bob, TEAM, kick("ann")), Err(ErrorCode::NotAllowed));
    assert!(town.act(bob, TEAM, GroupAct::Rename { title: "Ours" }).is_ok());
    assert_eq!(town.act(dan, TEAM, GroupAct::Rename { title: "Mine" }), Err(ErrorCode::NotAllowed));
    town.told(dan);
    assert!(town.act(bob, TEAM, kick("dan")).is_ok());
    assert_eq!(pushes(&mut town, dan), [(What::Kicked, "bob".to_owned(), String::new())]);
    assert_eq!(town.act(dan, TEAM, join()), Err(ErrorCode::NotInvited), "an open group, but not for who was kicked");
    assert!(invite(&mut town, cid, &["dan"]).is_ok());
    assert!(town.act(dan, TEAM, join()).is_ok());
    assert_eq!(town.act(ann, TEAM, GroupAct::Leave), Err(ErrorCode::OwnerStays));
    assert_eq!(town.act(bob, TEAM, GroupAct::Transfer { user: "bob" }), Err(ErrorCode::NotAllowed));
    assert_eq!(town.act(ann, TEAM, GroupAct::Transfer { user: "ann" }), Err(ErrorCode::BadRequest));
    assert!(town.act(ann, TEAM, GroupAct::Transfer { user: "dan" }).is_ok());
    assert_eq!(town.act(ann, TEAM, GroupAct::Dissolve), Err(ErrorCode::NotAllowed));
    assert_eq!(town.act(ann, TEAM, GroupAct::Leave).map(|(_, standing)| standing), Ok(Some(Standing::Left)));
    let info = town.answer(bob, Request::Group { group: TEAM, act: GroupAct::Info });
    let Reply::Group(GroupReply::Info(info)) = decode(&info) else { panic!() };
    assert_eq!((info.title, info.owner, info.members, info.role), ("Ours", "dan", 3, Role::Admin));
    let before = town.fetch(dan, TEAM, 0).unwrap().1;
    assert_eq!(town.act(dan, TEAM, GroupAct::Dissolve), Ok((Seq(before + 1), Some(Standing::Member))));
    assert_eq!(town.send(bob, TEAM, 9), Err(ErrorCode::GroupDissolved));
    assert_eq!(town.act(ann, TEAM, join()), Err(ErrorCode::GroupDissolved));
    assert_eq!(town.act(ann, TEAM, create(JoinPolicy::Open)), Err(ErrorCode::GroupExists), "the name stays taken");
    assert_eq!(town.fetch(bob, TEAM, before).unwrap().2, [before + 1], "and can be read");
}

#[test]
fn a_membership_decides_what_can_be_read_now_and_later() {
    let (mut town, ann, seats) = team(2, &["bob"]);
    let bob = seats[0];
    assert_eq!(town.send(ann, TEAM, 1), Ok(Seq(3)));
    assert_eq!(town.act(bob, TEAM, GroupAct::Leave), Ok((Seq(4), Some(Standing::Left))));
    assert_eq!(town.send(ann, TEAM, 2), Ok(Seq(5)));
    assert_eq!(town.delivered(bob), [3], "neither the row of its leaving nor what follows");
    assert_eq!(town.fetch(bob, TEAM, 0), Ok((2, 3, vec![2, 3])));
    assert_eq!(town.send(bob, TEAM, 1), Err(ErrorCode::NotMember));
    assert_eq!(town.act(bob, TEAM, join()), Ok((Seq(6), Some(Standing::Member))));
    assert_eq!(town.send(ann, TEAM, 3), Ok(Seq(7)));
    assert_eq!(town.delivered(bob), [6, 7]);
    assert_eq!(town.fetch(bob, TEAM, 0), Ok((2, 7, vec![2, 3])), "a page ends with a membership");
    assert_eq!(town.fetch(bob, TEAM, 3), Ok((6, 7, vec![6, 7])), "and the next says where it goes on");
    let request = Request::Conversations { cursor: ConversationId(0), limit: 10 };
    let told = town.answer(bob, request);
    let Reply::ConversationsOk { conversations, .. } = decode(&told) else { panic!() };
    let row = conversations[0];
    assert_eq!((row.with, row.title, row.standing), (TEAM, "The team", Some(Standing::Member)));
    assert_eq!((row.first, row.head), (Seq(2), Seq(7)));
    let mut later = town.restarted(3);
    let bob = later.login("bob");
    assert_eq!(later.fetch(bob, TEAM, 3), Ok((6, 7, vec![6, 7])));
    assert_eq!(later.send(bob, TEAM, 1), Ok(Seq(8)));
}

#[test]
fn who_declined_before_a_restart_and_joins_after_it_is_a_member_for_good() {
    let (town, bob) = (&mut Town::new(2), "bob");
    let (ann, guest) = (town.login("ann"), town.login(bob));
    town.act(ann, TEAM, create(JoinPolicy::Open)).unwrap();
    for _ in 0..3 {
        invite(town, ann, &[bob]).unwrap();
        town.act(guest, TEAM, GroupAct::Answer { user: bob, approve: false }).unwrap();
    }
    let mut later = town.restarted(3);
    let guest = later.login(bob);
    assert_eq!(later.act(guest, TEAM, join()), Ok((Seq(2), Some(Standing::Member))));
    let mut later = later.restarted(1);
    let guest = later.login(bob);
    assert_eq!(later.fetch(guest, TEAM, 0), Ok((2, 2, vec![2])));
    assert_eq!(later.send(guest, TEAM, 1), Ok(Seq(3)));
}

#[test]
fn whoever_was_a_member_when_a_message_got_its_number_sees_it_and_nobody_else() {
    let (mut town, ann, seats) = team(3, &["bob"]);
    let (bob, cid) = (seats[0], town.login("cid"));
    town.committing = false;
    let quietly = |town: &mut Town, seat, act| town.ask(seat, Request::Group { group: TEAM, act });
    let write = |town: &mut Town, client_seq| {
        let (class, kind, mentions) = (Class::Durable, BodyKind::Text, Mentions::default());
        let send = Send { to: TEAM, class, kind, client_seq, ack_timeout_ms: None, body: b"x", mentions };
        town.ask(ann, Request::Send(send));
    };
    write(&mut town, 1);
    quietly(&mut town, cid, join());
    write(&mut town, 2);
    quietly(&mut town, bob, GroupAct::Leave);
    write(&mut town, 3);
    assert!(town.told(cid).is_empty() && town.told(bob).is_empty(), "nothing is told before it is on disk");
    town.committing = true;
    town.settle();
    assert_eq!(town.delivered(bob), [3, 4, 5]);
    assert_eq!(town.delivered(cid), [4, 5, 6, 7]);
}

#[test]
fn a_repeat_to_a_group_gets_its_old_place_even_after_a_kick() {
    let (mut town, ann, seats) = team(2, &["bob"]);
    let bob = seats[0];
    assert_eq!(town.send(bob, TEAM, 5), Ok(Seq(3)));
    town.act(ann, TEAM, GroupAct::Kick { user: "bob" }).unwrap();
    let again = town.send_with(bob, (TEAM, 5), Mentions::default()).unwrap();
    assert_eq!((again.seq, again.dup), (Seq(3), true));
    assert_eq!(town.send(bob, TEAM, 6), Err(ErrorCode::NotMember));
}

#[test]
fn mentions_are_carried_and_all_is_for_those_who_rank() {
    let (mut town, ann, seats) = team(2, &["bob"]);
    let bob = seats[0];
    let users = ["ann", "somebody"];
    let mentions = |all| Mentions { users: (&users[..]).into(), all };
    assert_eq!(town.send_with(bob, (TEAM, 1), mentions(true)), Err(ErrorCode::NotAllowed));
    assert!(town.send_with(bob, (TEAM, 1), mentions(false)).is_ok());
    assert!(town.send_with(ann, (TEAM, 1), mentions(true)).is_ok());
    let told = town.told(bob);
    let Reply::Deliver(message) = decode(&told[0]) else { panic!() };
    assert!(message.extra.mentions == mentions(true));
    let fetch = Fetch { with: TEAM, after: Seq(2), before: None, limit: 0, newest: false };
    let told = town.answer(ann, Request::Fetch(fetch));
    let Reply::FetchOk { messages, .. } = decode(&told) else { panic!() };
    assert!(messages[0].extra.mentions == mentions(false) && messages[1].extra.mentions.all);
    assert_eq!(town.send_with(ann, ("bob", 2), mentions(true)), Err(ErrorCode::BadRequest));
    assert!(town.send_with(ann, ("bob", 2), mentions(false)).is_ok());
}

// --- limits ------------------------------------------------------------------------------------------------------

fn member_row(user: &str, standing: Standing, role: Role) -> Row {
    let mut row = MemberRow { standing, role, since_ms: 1, muted_until_ms: 0, ranges: Vec::new() };
    if standing == Standing::Member {
        row.begin(Seq(1));
    }
    let key = RowKey::Member(ConversationId::group(&name(TEAM)), name(user));
    Row { key, stamp: 1, value: Some(RowValue::Member(row)) }
}

fn group_row(group: &str) -> Row {
    let row = GroupRow {
        name: name(group),
        title: "Big".into(),
        join: JoinPolicy::Open,
        owner: name("ann"),
        created_ms: 1,
        dissolved: Seq::ZERO,
    };
    Row { key: RowKey::Group(ConversationId::group(&name(group))), stamp: 1, value: Some(RowValue::Group(row)) }
}

/// A group in the store with ann as its owner and some others.
fn seeded(shards: u16, others: impl Iterator<Item = Row>) -> (Town, Seat) {
    let mut town = Town::new(shards);
    let rows = [group_row(TEAM), member_row("ann", Standing::Member, Role::Owner)];
    town.seed_rows(rows.into_iter().chain(others).collect());
    let ann = town.login("ann");
    (town, ann)
}

fn member(number: usize) -> String {
    format!("member-{number:05}")
}

#[test]
fn ten_thousand_members_are_one_record_and_one_fan_out_a_shard() {
    const SHARDS: u16 = 4;
    let rows = (1..limits::GROUP_MEMBERS_MAX - 1).map(|at| member_row(&member(at), Standing::Member, Role::Member));
    let (mut town, ann) = seeded(SHARDS, rows);
    let readers: Vec<_> = (1..40).map(|at| town.login(&member(at))).collect();
    let (last, late) = (town.login("last"), town.login("late"));
    assert!(town.act(last, TEAM, join()).is_ok(), "the last place");
    assert_eq!(town.act(late, TEAM, join()), Err(ErrorCode::GroupFull));
    readers.iter().for_each(|&seat| drop(town.told(seat)));
    let (records, fan_outs, loads) = (town.records, town.fan_outs, town.loads);
    let seq = town.send(ann, TEAM, 1).unwrap();
    assert_eq!((town.records - records, town.fan_outs - fan_outs), (1, usize::from(SHARDS) - 1));
    assert!(town.loads - loads <= 1, "the group is in memory, only the sender's filter is not");
    for &seat in &readers {
        assert_eq!(town.delivered(seat), [seq.0]);
    }
    let mut names = Vec::new();
    let mut cursor = String::new();
    loop {
        let (page, next) = town.members(ann, TEAM, (&cursor, Standing::Member)).unwrap();
        assert!(page.len() <= usize::from(limits::PAGE_ROWS_MAX));
        names.extend(page);
        if next.is_empty() {
            break;
        }
        cursor = next;
    }
    assert_eq!(names.len(), limits::GROUP_MEMBERS_MAX);
    assert!(names.is_sorted());
    assert!(town.act(ann, TEAM, GroupAct::Kick { user: &member(7) }).is_ok());
    assert!(town.act(late, TEAM, join()).is_ok(), "a place is free again");
}

#[test]
fn a_user_is_in_so_many_groups_and_no_more() {
    let mut town = Town::new(2);
    let bob = town.login("bob");
    for number in 1..limits::GROUPS_PER_USER_MAX {
        let group = format!("#group-{number}");
        let mut row = member_row("bob", Standing::Member, Role::Owner);
        row.key = RowKey::Member(ConversationId::group(&name(&group)), name("bob"));
        town.seed_rows(vec![group_row(&group), row]);
    }
    let ann = town.login("ann");
    town.act(ann, TEAM, create(JoinPolicy::Open)).unwrap();
    town.act(ann, "#more", create(JoinPolicy::Open)).unwrap();
    assert!(town.act(bob, TEAM, join()).is_ok());
    assert_eq!(town.act(bob, "#more", join()), Err(ErrorCode::TooManyGroups));
    assert_eq!(town.act(bob, "#own", create(JoinPolicy::Open)), Err(ErrorCode::TooManyGroups));
    assert!(town.act(bob, TEAM, GroupAct::Leave).is_ok());
    assert!(town.act(bob, "#more", join()).is_ok());
}

#[test]
fn invitations_administrators_and_names_have_their_limits() {
    let open = (1..limits::GROUP_PENDING_MAX).map(|at| member_row(&member(at), Standing::Invited, Role::Member));
    let admins = (0..limits::GROUP_ADMINS_MAX - 1).map(|at| {
        let user = format!("admin-{at}");
        member_row(&user, Standing::Member, Role::Admin)
    });
    let admins = admins.chain([member_row("bob", Standing::Member, Role::Member)]);
    let admins = admins.chain([member_row("cid", Standing::Member, Role::Member)]);
    let mut rows: Vec<_> = open.chain(admins).collect();
    rows.sort_by(|one, other| one.key.cmp(&other.key));
    let (mut town, ann) = seeded(2, rows.into_iter());
    town.seed_user("one");
    town.seed_user("two");
    assert_eq!(invite(&mut town, ann, &["one", "two"]), Err(ErrorCode::TooManyPending));
    assert!(invite(&mut town, ann, &["one"]).is_ok());
    assert_eq!(invite(&mut town, ann, &["two"]), Err(ErrorCode::TooManyPending));
    let admin = |user| GroupAct::Role { user, role: Role::Admin };
    assert!(town.act(ann, TEAM, admin("bob")).is_ok());
    assert_eq!(town.act(ann, TEAM, admin("cid")), Err(ErrorCode::TooManyAdmins));
    assert_eq!(town.act(ann, TEAM, GroupAct::Transfer { user: "cid" }), Err(ErrorCode::TooManyAdmins));
    assert!(town.act(ann, TEAM, GroupAct::Transfer { user: "bob" }).is_ok(), "an administrator makes room");

    let users: Vec<String> = (0..=limits::USERS_PER_REQUEST_MAX).map(member).collect();
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    assert_eq!(invite(&mut town, ann, &users), Err(ErrorCode::TooManyUsers));
    users.iter().for_each(|user| town.seed_user(user));
    assert_eq!(invite(&mut town, ann, &users[1..]), Ok((Seq(0), Some(Standing::Member))), "all are invited already");
    let mentions = |count| Mentions { users: users[..count].into(), all: false };
    assert!(town.send_with(ann, (TEAM, 1), mentions(limits::MENTIONS_MAX)).is_ok());
    let refused = town.send_with(ann, (TEAM, 2), mentions(limits::MENTIONS_MAX + 1));
    assert_eq!(refused, Err(ErrorCode::TooManyMentions));
}

#[test]
fn names_titles_and_greetings_have_their_limits() {
    let mut town = Town::new(1);
    let (ann, bob) = (town.login("ann"), town.login("bob"));
    let longest = format!("#{}", "g".repeat(limits::GROUP_NAME_BYTES_MAX - 1));
    for bad in ["team", "#", "", "# ", "#a\n", &format!("{longest}g")] {
        assert_eq!(town.act(ann, bad, create(JoinPolicy::Open)), Err(ErrorCode::BadGroup), "{bad:?}");
    }
    assert!(town.act(ann, &longest, create(JoinPolicy::Open)).is_ok());
    let title = "t".repeat(limits::GROUP_TITLE_BYTES_MAX);
    let titled = |title| GroupAct::Create { title, join: JoinPolicy::Approval, users: Names::default() };
    let too_long = format!("{title}t");
    for bad in ["", " t", "t\u{7}", &too_long] {
        assert_eq!(town.act(ann, TEAM, titled(bad)), Err(ErrorCode::BadTitle), "{bad:?}");
        assert_eq!(town.act(ann, TEAM, GroupAct::Rename { title: bad }), Err(ErrorCode::BadTitle));
    }
    assert!(town.act(ann, TEAM, titled(&title)).is_ok());
    let greeting = "g".repeat(limits::GREETING_BYTES_MAX);
    let long = format!("{greeting}g");
    assert_eq!(town.act(bob, TEAM, GroupAct::Join { greeting: &long }), Err(ErrorCode::TextTooLong));
    assert!(town.act(bob, TEAM, GroupAct::Join { greeting: &greeting }).is_ok());
    for group in ["#nothing", "#nowhere"] {
        for act in [join(), GroupAct::Leave, GroupAct::Info, GroupAct::Dissolve] {
            assert_eq!(act_code(&mut town, ann, group, act), ErrorCode::NoSuchGroup);
        }
        assert_eq!(town.send(ann, group, 1), Err(ErrorCode::NoSuchGroup));
    }
}

fn act_code(town: &mut Town, seat: Seat, group: &str, act: GroupAct<'_>) -> ErrorCode {
    match decode(&town.answer(seat, Request::Group { group, act })) {
        Reply::Failure { code, .. } => code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_small_cache_forgets_groups_and_reads_them_again() {
    let stores = ringline_store::memory::open(2);
    let mut town = Town::with(stores, |config| {
        (config.groups_cached_max, config.group_members_cached_max, config.conversations_cached_max) = (1, 2, 1);
    });
    let seats: Vec<_> = (0..5).map(|at| town.login(&member(at))).collect();
    let groups: Vec<_> = (0..6).map(|at| format!("#group-{at}")).collect();
    for group in &groups {
        town.act(seats[0], group, create(JoinPolicy::Open)).unwrap();
        for &seat in &seats[1..] {
            town.act(seat, group, join()).unwrap();
        }
    }
    for round in 1..4u64 {
        for group in &groups {
            let seq = town.send(seats[1], group, round).unwrap();
            assert_eq!(seq, Seq(5 + round));
            assert_eq!(town.members(seats[0], group, ("", Standing::Member)).unwrap().0.len(), 5);
        }
    }
    assert!(town.loads > 30, "groups were loaded again and again: {}", town.loads);
    let key = RowKey::Group(ConversationId::group(&name("#group-3")));
    assert!(matches!(town.stored(Query::Row { key }), Answer::Row(Some(_))));
}
