//! Limits of groups at their edge, and who may change who may join.

use super::*;

#[test]
fn who_may_join_can_be_changed_by_its_owner_and_administrators() {
    let (mut town, ann, seats) = team(3, &["bob", "cid"]);
    let dan = town.login("dan");
    let policy = |join| GroupAct::Policy { join };
    assert_eq!(town.act(dan, TEAM, policy(JoinPolicy::Open)), Err(ErrorCode::NotMember));
    assert_eq!(town.act(seats[0], TEAM, policy(JoinPolicy::Invite)), Err(ErrorCode::NotAllowed));
    town.act(ann, TEAM, policy(JoinPolicy::Invite)).unwrap();
    let told = town.told(seats[1]);
    let Reply::Deliver(message) = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    let change = message.extra.change.unwrap();
    assert_eq!((change.what, change.number), (What::Policy, JoinPolicy::Invite as u64));
    assert_eq!(town.act(dan, TEAM, join()), Err(ErrorCode::NotInvited));
    town.act(ann, TEAM, GroupAct::Role { user: "bob", role: Role::Admin }).unwrap();
    town.act(seats[0], TEAM, policy(JoinPolicy::Approval)).unwrap();
    let mut town = town.restarted(2);
    let (ann, dan, eve) = (town.login("ann"), town.login("dan"), town.login("eve"));
    assert_eq!(town.act(dan, TEAM, join()), Ok((Seq(0), Some(Standing::Asked))), "also after a restart");
    town.act(ann, TEAM, policy(JoinPolicy::Open)).unwrap();
    assert!(matches!(town.act(eve, TEAM, join()), Ok((_, Some(Standing::Member)))));
}

#[test]
fn a_new_group_names_so_many_users() {
    let mut town = Town::new(2);
    let ann = town.login("ann");
    let users: Vec<_> = (0..=limits::USERS_PER_REQUEST_MAX).map(|number| format!("user-{number:03}")).collect();
    users.iter().for_each(|user| town.seed_user(user));
    let names: Vec<_> = users.iter().map(String::as_str).collect();
    let act = |users: &[&str], town: &mut Town| {
        let act = GroupAct::Create { title: "The team", join: JoinPolicy::Invite, users: users.into() };
        town.act(ann, TEAM, act)
    };
    assert_eq!(act(&names, &mut town), Err(ErrorCode::TooManyUsers));
    assert_eq!(act(&names[1..], &mut town), Ok((Seq(1), Some(Standing::Member))));
}

#[test]
fn one_request_to_join_too_many_is_refused_until_one_is_answered() {
    let mut town = Town::new(2);
    let ann = town.login("ann");
    town.act(ann, TEAM, create(JoinPolicy::Approval)).unwrap();
    for number in 0..limits::GROUP_PENDING_MAX {
        let seat = town.login(&format!("user-{number:04}"));
        assert_eq!(town.act(seat, TEAM, join()), Ok((Seq(0), Some(Standing::Asked))), "{number}");
        town.leave(seat);
    }
    let zoe = town.login("zoe");
    assert_eq!(town.act(zoe, TEAM, join()), Err(ErrorCode::TooManyPending));
    town.act(ann, TEAM, GroupAct::Answer { user: "user-0000", approve: true }).unwrap();
    assert_eq!(town.act(zoe, TEAM, join()), Ok((Seq(0), Some(Standing::Asked))));
}

#[test]
fn a_mute_is_ten_years_at_most() {
    let (mut town, ann, seats) = team(1, &["bob"]);
    let mut until = |for_ms: u64| {
        town.act(ann, TEAM, GroupAct::Mute { user: "bob", for_ms }).unwrap();
        let now_ms = town.now.unix_ms;
        let told = town.told(seats[0]);
        let Reply::Deliver(message) = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
        message.extra.change.unwrap().number - now_ms
    };
    assert_eq!(until(limits::MUTE_MS_MAX - 1), limits::MUTE_MS_MAX - 1);
    assert_eq!(until(limits::MUTE_MS_MAX), limits::MUTE_MS_MAX);
    assert_eq!(until(limits::MUTE_MS_MAX + 1), limits::MUTE_MS_MAX);
}
