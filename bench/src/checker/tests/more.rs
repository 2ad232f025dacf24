//! Amendments, retention, what is not stored, receipts and presence.

use super::*;

fn amend(number: u64, of: u64, what: State) -> Happening {
    let body = if what == State::Edited { format!("e{number}") } else { String::new() };
    Happening::Amended { number, to: Peer::User(1), of: place(of), what, body }
}

/// The row of an amendment by Ann.
fn amendment(seq: u64, of: u64, what: State) -> Shown {
    let body = if what == State::Edited { format!("e{seq}") } else { String::new() };
    Shown { of: Some(of), state: what, body, ..shown(seq) }
}

fn became(seq: u64, state: State, body: &str) -> Shown {
    Shown { state, body: body.to_owned(), ..shown(seq) }
}

fn log_is(messages: Vec<Shown>) -> Happening {
    let head = messages.len() as u64;
    Happening::ReadBack { conversation: TALK, with: Peer::User(1), first: 1, head, messages }
}

/// Ann's third send amends her first message; then the log is as Bob reads it.
fn amended(what: State, log: Vec<Shown>, more: Vec<(Device, Happening)>) -> Vec<Rule> {
    let mut history = clean();
    history.pop();
    history.extend([(ANN, amend(3, 1, what)), (ANN, accepted(3))]);
    history.extend([ANN, BOB].map(|device| (device, Happening::Saw(amendment(3, 1, what)))));
    history.extend(more);
    history.push((BOB, log_is(log)));
    judge(history)
}

#[test]
fn a_message_is_shown_as_its_last_amendment_has_made_it() {
    use State::{Deleted, Edited, Hidden, Recalled};
    let log = |first, what| vec![first, shown(2), amendment(3, 1, what)];
    assert_eq!(amended(Edited, log(became(1, Edited, "e3"), Edited), vec![]), []);
    assert_eq!(amended(Recalled, log(became(1, Recalled, ""), Recalled), vec![]), []);
    for first in [shown(1), became(1, Recalled, ""), became(1, Edited, "m2"), became(1, Hidden, "")] {
        assert_ne!(amended(Edited, log(first.clone(), Edited), vec![]), [], "{first:?}");
    }
    assert_eq!(amended(Recalled, log(shown(1), Recalled), vec![]), [Rule::AmendmentsShow]);
    assert!(amended(Recalled, log(became(1, Deleted, ""), Recalled), vec![]).contains(&Rule::AmendmentsShow));
    // A later one takes the place of an earlier one, whose body is gone.
    let again = vec![(ANN, amend(4, 1, Edited)), (ANN, accepted(4))];
    let later = [ANN, BOB].map(|device| (device, Happening::Saw(amendment(4, 1, Edited))));
    let again = [again, later.to_vec()].concat();
    let old = Shown { state: State::AsSent, body: String::new(), ..amendment(3, 1, Edited) };
    let log = vec![became(1, Edited, "e4"), shown(2), old.clone(), amendment(4, 1, Edited)];
    assert_eq!(amended(Edited, log, again.clone()), []);
    let log = vec![became(1, Edited, "e3"), shown(2), old, amendment(4, 1, Edited)];
    assert_eq!(amended(Edited, log, again.clone()), [Rule::AmendmentsShow]);
    let log = vec![became(1, Edited, "e4"), shown(2), amendment(3, 1, Recalled), amendment(4, 1, Edited)];
    assert!(amended(Recalled, log, again).contains(&Rule::GoneStaysGone), "nothing follows on what is gone");
}

#[test]
fn what_is_gone_is_not_given_to_who_asks_later() {
    let log = || vec![became(1, State::Recalled, ""), shown(2), amendment(3, 1, State::Recalled)];
    // Noted before the answer, and behind everything.
    for (asked, rules) in [(2, vec![]), (99, vec![Rule::GoneStaysGone])] {
        let (asked, messages) = (Moment(asked), vec![shown(1)]);
        let sync = Happening::Synced { asked, behind: vec![place(0)], messages, whole: false };
        assert_eq!(amended(State::Recalled, log(), vec![(BOB, sync)]), rules);
    }
    let anew = vec![(BOB, Happening::Started), (BOB, Happening::Saw(shown(1))), (BOB, Happening::Saw(shown(2)))];
    let rest = (BOB, Happening::Saw(amendment(3, 1, State::Recalled)));
    assert_eq!(amended(State::Recalled, log(), [anew, vec![rest]].concat()), [Rule::GoneStaysGone]);
}

#[test]
fn only_who_may_amends_and_only_the_asked_is_hidden() {
    let by_bob = Shown { from: 1, to: Peer::User(0), ..amendment(3, 1, State::Recalled) };
    let mut history = clean();
    history.pop();
    let ask =
        Happening::Amended { number: 3, to: Peer::User(0), of: place(1), what: State::Recalled, body: String::new() };
    history.extend([
        (BOB, ask),
        (BOB, accepted(3)),
        (ANN, Happening::Saw(by_bob.clone())),
        (BOB, Happening::Saw(by_bob.clone())),
    ]);
    history.push((BOB, log_is(vec![became(1, State::Recalled, ""), shown(2), by_bob])));
    assert_eq!(judge(history), [Rule::OnlyWhoMayAmends]);
    let hidden = || became(1, State::Hidden, "");
    let hide = |kept: bool, log: Shown| {
        let mut history = clean();
        history.pop();
        history.push((BOB, Happening::HideAsked(place(1))));
        history.extend(kept.then_some((BOB, Happening::HideKept(place(1)))));
        history.push((BOB, log_is(vec![log, shown(2)])));
        judge(history)
    };
    assert_eq!((hide(true, hidden()), hide(false, hidden()), hide(false, shown(1))), (vec![], vec![], vec![]));
    assert_eq!(hide(true, shown(1)), [Rule::HiddenStaysHidden]);
    assert_eq!(with(11, BOB, log_is(vec![hidden(), shown(2)])), [Rule::OnlyAskedIsHidden]);
    assert_eq!(and(vec![(BOB, Happening::HideTold(place(1)))]), [Rule::OnlyAskedIsHidden]);
}

fn page(first: u64, seqs: &[u64]) -> Page {
    Page::Messages { first, head: 2, messages: seqs.iter().map(|seq| shown(*seq)).collect() }
}

fn fetched(asked: usize, range: Range, page: Page) -> (Device, Happening) {
    (BOB, Happening::Fetched { asked: Moment(asked), with: Peer::User(0), conversation: TALK, range, page })
}

#[test]
fn floors_rise_and_pages_say_what_is_gone() {
    let from = |after| Range { after, before: None, newest: false };
    let upto = |before| Range { after: 0, before: Some(before), newest: true };
    for right in [
        fetched(0, from(0), page(1, &[1, 2])),
        fetched(0, from(0), page(1, &[1])),
        fetched(0, from(1), page(1, &[2])),
        fetched(0, from(2), page(1, &[])),
        fetched(0, upto(2), page(1, &[1])),
        fetched(0, upto(9), page(1, &[1, 2])),
    ] {
        assert_eq!(and(vec![right.clone()]), [], "{right:?}");
    }
    assert_eq!(and(vec![fetched(0, from(0), page(1, &[2]))]), [Rule::TruncatedIsSaid]);
    assert_eq!(and(vec![fetched(0, from(1), page(1, &[]))]), [Rule::TruncatedIsSaid]);
    assert_eq!(and(vec![fetched(0, upto(2), page(1, &[]))]), [Rule::TruncatedIsSaid]);
    assert_eq!(and(vec![fetched(0, from(0), page(2, &[1, 2]))]), [Rule::NothingBelowTheFloor, Rule::TruncatedIsSaid]);
    assert_eq!(and(vec![fetched(0, from(1), Page::Truncated)]), [Rule::TruncatedIsTrue]);
    let back = |asked| vec![fetched(0, from(1), page(2, &[2])), fetched(asked, from(0), page(1, &[1, 2]))];
    assert_eq!(and(back(99)), [Rule::FloorRises]);
    assert_eq!(and(back(0)), [], "asked before, answered after");
    let listed = |asked, seq| (BOB, Happening::FloorShown { asked: Moment(asked), first: place(seq) });
    assert_eq!(and(vec![listed(0, 2), listed(99, 1)]), [Rule::FloorRises]);
    // What is let go may be missing everywhere.
    let messages = vec![shown(2)];
    let kept = Happening::ReadBack { conversation: TALK, with: Peer::User(1), first: 2, head: 2, messages };
    assert_eq!(with(11, BOB, kept), []);
}

fn signal(from: Device, number: u64, to: Peer) -> (Device, Happening) {
    (from, Happening::Signalled { number, to, body: format!("s{number}") })
}

fn heard(at: Device, number: u64, to: Peer) -> (Device, Happening) {
    (at, Happening::SawSignal { from: 0, to, body: format!("s{number}") })
}

#[test]
fn what_passes_comes_once_in_order_and_to_whom_it_is_for() {
    let to = Peer::User(1);
    let signals = [signal(ANN, 1, to), signal(ANN, 2, to)];
    let and_then = |more: &[(Device, Happening)]| and([&signals[..], more].concat());
    assert_eq!(and_then(&[heard(BOB, 1, to), heard(BOB, 2, to)]), []);
    assert_eq!(and_then(&[heard(BOB, 2, to), heard(BOB, 1, to)]), [Rule::PassingOrder]);
    assert_eq!(and_then(&[heard(BOB, 1, to), heard(BOB, 1, to)]), [Rule::OnlyWhatWasSignalled]);
    assert_eq!(and_then(&[heard(EVE, 1, to)]), [Rule::OnlyWhatWasSignalled]);
    assert_eq!(and_then(&[heard(BOB, 3, to)]), [Rule::OnlyWhatWasSignalled]);
    let team = Peer::Group(0);
    let mut history = group();
    // While he may be there; then after it is known that he went: a later message was accepted.
    history.splice(3..3, [signal(ANN, 1, team), heard(BOB, 1, team)]);
    assert_eq!(judge(history.clone()), []);
    history.extend([signal(ANN, 2, team), heard(BOB, 2, team)]);
    assert_eq!(judge(history), [Rule::OnlyToItsMembers]);
}

#[test]
fn who_has_what_is_said_truly() {
    let has = |user, delivered, read| (ANN, Happening::HasShown { user, conversation: TALK, delivered, read });
    let asked = (BOB, Happening::ReadAsked(place(1)));
    assert_eq!(and(vec![asked.clone(), has(Some(1), 2, 1)]), []);
    assert_eq!(and(vec![asked.clone(), has(Some(1), 3, 1)]), [Rule::HasIsTrue]);
    assert_eq!(and(vec![asked.clone(), has(None, 2, 2)]), [Rule::HasIsTrue]);
    let receipts = |members, delivered, read, rows: &[(u32, u64, u64)]| {
        let rows = rows.to_vec();
        let shown = Happening::ReceiptsShown(Receipts { place: place(2), members, delivered, read, rows });
        and(vec![asked.clone(), (BOB, Happening::ReadKept(place(1))), (ANN, shown)])
    };
    assert_eq!(receipts(1, 1, 0, &[(1, 2, 1)]), []);
    for (members, delivered, read, row) in
        [(2, 1, 0, (1, 2, 1)), (1, 0, 0, (1, 2, 1)), (1, 1, 1, (1, 2, 2)), (1, 1, 0, (1, 2, 0)), (1, 1, 0, (0, 2, 1))]
    {
        assert_eq!(receipts(members, delivered, read, &[row]), [Rule::ReceiptsAreTrue]);
    }
}

#[test]
fn watchers_know_who_is_there_after_a_while() {
    let told = |online, last_seen_ms, status: &str| {
        let presence = Presence { user: 0, online, last_seen_ms, status: status.to_owned() };
        (BOB, Happening::PresenceShown { connection: 1, presence, pushed: false })
    };
    let watches = || vec![(BOB, Happening::Watches(vec![0]))];
    let rest = |left_ms| [(ANN, Happening::Rested { left_ms }), (BOB, Happening::Rested { left_ms: None })];
    let case = |more: Vec<(Device, Happening)>, left_ms| and([watches(), more, rest(left_ms).to_vec()].concat());
    assert_eq!(case(vec![told(true, 5, "")], None), []);
    assert_eq!(case(vec![told(false, 5, "")], None), [Rule::PresenceConverges]);
    assert_eq!(case(vec![], None), [Rule::PresenceConverges], "nothing was told");
    assert_eq!(case(vec![told(true, 5, ""), told(false, 7, "")], Some(6)), []);
    assert_eq!(case(vec![told(true, 5, "")], Some(6)), [Rule::PresenceConverges]);
    assert_eq!(case(vec![told(false, 5, "")], Some(6)), [Rule::PresenceConverges], "seen after that");
    let says = |status: &str, visible| (ANN, Happening::StatusAsked { status: status.to_owned(), visible });
    let kept = (ANN, Happening::StatusKept);
    assert_eq!(case(vec![says("here", true), told(true, 5, "here")], None), []);
    assert_eq!(case(vec![says("here", true), told(true, 5, "")], None), [], "perhaps it was lost");
    assert_eq!(case(vec![says("here", true), kept.clone(), told(true, 5, "")], None), [Rule::PresenceConverges]);
    assert_eq!(case(vec![says("here", false), kept.clone(), told(false, 0, "")], None), []);
    assert_eq!(case(vec![says("here", false), kept, told(true, 5, "here")], None), [Rule::PresenceConverges]);
}
