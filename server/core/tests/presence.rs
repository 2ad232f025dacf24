//! What a watcher is told last is the newest, in whatever order the parts of an answer and the news come; and a shard has
//! only so many users that are watched.

mod rig;

use rig::*;
use ringline_schema::errors::ErrorCode;
use ringline_schema::message::*;

/// (user, online) of all presence that a connection was told, in order.
fn told(rig: &mut Rig, at: At) -> Vec<(String, bool)> {
    let mut rows = Vec::new();
    for frame in rig.told(at) {
        if let Reply::Chat(ChatReply::PresenceOk { users } | ChatReply::PresenceChanged { users }) = decode(&frame) {
            rows.extend(users.iter().map(|row| (row.user.to_owned(), row.online)));
        }
    }
    rows
}

fn watch<'a>(users: &'a [&'a str]) -> Request<'a> {
    Request::Chat(ChatRequest::Watch { users: users.into() })
}

#[test]
fn an_answer_that_waited_for_somebody_does_not_undo_the_news_of_somebody_else() {
    for shards in [1, 2, 5] {
        let mut rig = Rig::new(shards, |_| ());
        let bob = rig.login("bob", 1);
        rig.leave(bob);
        rig.pass(1_100);
        let ann = rig.login("ann", 1);
        rig.ask(ann, watch(&["bob"]));
        // Bob is known to be away; what is known of carl is on a slow disk.
        rig.holding = true;
        rig.ask(ann, watch(&["bob", "carl"]));
        rig.holding = false;
        rig.login("bob", 1);
        rig.pass(1_100);
        let before = told(&mut rig, ann);
        rig.release();
        rig.pass(100);
        let after = told(&mut rig, ann);
        let last = [before, after].concat().into_iter().rfind(|(user, _)| user == "bob");
        assert_eq!(last, Some(("bob".to_owned(), true)), "{shards} shards");
    }
}

#[test]
fn a_shard_that_has_as_many_watched_users_as_it_may_says_so() {
    for shards in [1, 2, 5] {
        let mut rig = Rig::new(shards, |config| config.watched_users_max = 2);
        let ann = rig.login("ann", 1);
        let names: Vec<String> = (0..2 * usize::from(shards) + 1).map(|number| format!("user-{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        // More than all shards together take: at least one of them has one too many.
        assert_eq!(rig.code(ann, watch(&names)), Some(ErrorCode::TooManyWatched), "{shards} shards");
        for name in &names {
            rig.login(name, 1);
        }
        rig.pass(1_100);
        assert_eq!(told(&mut rig, ann), [], "a request that is refused watches nobody: {shards} shards");
        // What it left with the shards that had room is forgotten when nobody asks again.
        let mut rig = Rig::new(shards, |config| config.watched_users_max = 2);
        let (ann, eve) = (rig.login("ann", 1), rig.login("eve", 1));
        assert_eq!(rig.code(ann, watch(&names[..2])), None, "up to the edge");
        assert_eq!(rig.code(eve, watch(&names[..2])), None, "by whomever they are watched");
        if shards == 1 {
            assert_eq!(rig.code(eve, watch(&names[2..3])), Some(ErrorCode::TooManyWatched), "one more");
        }
        assert_eq!(rig.code(eve, watch(&names[..2])), None, "whom somebody watches already");
    }
}
