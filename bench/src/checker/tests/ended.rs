//! Deleted users, dropped devices, and who is watched no more.

use super::*;

fn connects(connection: u64) -> (Device, Happening) {
    (BOB, Happening::Connects { connection })
}

fn logged_in(connection: u64) -> (Device, Happening) {
    (BOB, Happening::LoggedIn { connection })
}

fn asked(recall: bool) -> (Device, Happening) {
    (BOB, Happening::DeleteAsked { user: 1, recall })
}

const KEPT: (Device, Happening) = (BOB, Happening::DeleteKept { user: 1 });
const AWAY: (Device, Happening) = (BOB, Happening::TurnedAway);

#[test]
fn who_is_deleted_never_logs_in_again() {
    assert_eq!(and(vec![connects(4), logged_in(4), asked(false), KEPT, connects(5), AWAY]), []);
    assert_eq!(and(vec![connects(5), asked(false), KEPT, logged_in(5)]), [], "the answer was on its way");
    assert_eq!(and(vec![asked(false), KEPT, connects(5), logged_in(5)]), [Rule::DeletedForEver]);
    assert_eq!(and(vec![asked(false), AWAY, connects(5), logged_in(5)]), [Rule::DeletedForEver]);
    assert_eq!(and(vec![asked(false), connects(5), logged_in(5)]), [], "it may have been lost");
    assert_eq!(and(vec![AWAY]), [Rule::DeletedForEver], "nobody has asked for that");
}

#[test]
fn nobody_writes_to_who_is_deleted_and_it_says_nothing() {
    let late = |more: Vec<(Device, Happening)>| and(more).contains(&Rule::DeletedIsGone);
    let to_bob = || [(ANN, sent(3)), (ANN, accepted(3))];
    assert!(late([&[asked(false), KEPT][..], &to_bob()].concat()));
    let [begins, ends] = to_bob();
    assert!(!late(vec![begins, asked(false), KEPT, ends]), "it was on its way");
    assert!(!late([&[asked(false)][..], &to_bob()].concat()), "it may not be so yet");
    let says = Happening::Sent { number: 1, to: Peer::User(0), body: "b".to_owned(), durable: true };
    let by_bob = [(BOB, says), (BOB, Happening::Accepted { number: 1, place: place(3) })];
    assert!(late([&[asked(false), KEPT][..], &by_bob].concat()));
}

#[test]
fn who_is_deleted_leaves_its_groups_and_takes_back_what_is_to_be() {
    let by_ann = |recall| [(ANN, Happening::DeleteAsked { user: 0, recall }), (ANN, Happening::DeleteKept { user: 0 })];
    assert_eq!(and(by_ann(false).to_vec()), []);
    assert_eq!(and(by_ann(true).to_vec()), [Rule::DeletedIsGone], "both messages are there as they were sent");
    assert!(group_and(by_ann(false).to_vec()).contains(&Rule::DeletedIsGone), "she is still a member");
    let bob = vec![asked(false), KEPT];
    assert_eq!(group_and(bob), [], "he has left");
    // The server takes back what she said, in her name, on no device of hers.
    let back = |seq, of| Shown {
        place: place(seq),
        device: 0,
        client_seq: of,
        body: String::new(),
        of: Some(of),
        state: State::Recalled,
        ..shown(seq)
    };
    let gone = |seq| Shown { body: String::new(), state: State::Recalled, ..shown(seq) };
    let messages = vec![gone(1), gone(2), back(3, 1), back(4, 2)];
    let read = Happening::ReadBack { conversation: TALK, with: Peer::User(1), first: 1, head: 4, messages };
    let mut history = clean();
    let last = history.len() - 1;
    history[last] = (BOB, read);
    history.extend(by_ann(true));
    history.retain(|(_, happening)| !matches!(happening, Happening::Settled));
    history.extend([3, 4].map(|seq| (BOB, Happening::Saw(back(seq, seq - 2)))));
    assert_eq!(judge(history), []);
}

#[test]
fn a_dropped_device_is_given_nothing_on_the_connection_that_it_had() {
    let push = |connection| (BOB, Happening::Pushed { connection, place: place(3) });
    let said = [(ANN, sent(3)), (ANN, accepted(3))];
    let case = |before: &[(Device, Happening)], after: &[(Device, Happening)]| {
        let drop = [(BOB, Happening::DropAsked(1)), (BOB, Happening::DropKept(1))];
        and([before, &drop, after].concat()).contains(&Rule::DroppedIsOut)
    };
    assert!(case(&[logged_in(1)], &[&said[..], &[push(1)]].concat()));
    assert!(!case(&[connects(1)], &[&[logged_in(1)], &said[..], &[push(1)]].concat()), "it has logged in after that");
    assert!(!case(&[logged_in(1)], &[&said[..], &[logged_in(2), push(2)]].concat()), "it has come back");
    assert!(!case(&[&[logged_in(1)], &said[..]].concat(), &[push(1)]), "it was on its way");
}

#[test]
fn who_looks_away_is_told_nothing_more() {
    let presence = || Presence { user: 0, online: true, last_seen_ms: 1, status: String::new() };
    let told = |pushed| (BOB, Happening::PresenceShown { connection: 1, presence: presence(), pushed });
    let (watch, away) = ((BOB, Happening::WatchAsked(vec![0])), (BOB, Happening::Unwatched(vec![0])));
    assert_eq!(and(vec![watch.clone(), told(true), away.clone(), told(false)]), []);
    assert_eq!(and(vec![away.clone(), told(true)]), [Rule::UnwatchedIsSilent]);
    assert_eq!(and(vec![away, watch, told(true)]), []);
}
