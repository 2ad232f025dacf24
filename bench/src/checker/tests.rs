//! Each rule of the checker: a small history that keeps it, and one that breaks it.

use std::collections::BTreeSet;

use super::*;

mod ended;
mod more;
mod permitted;

const TALK: u128 = 7;
const ANN: Device = Device { user: 0, number: 1 };
const BOB: Device = Device { user: 1, number: 1 };

fn place(seq: u64) -> Place {
    Place { conversation: TALK, seq }
}

fn shown(seq: u64) -> Shown {
    let (to, body) = (Peer::User(1), format!("m{seq}"));
    Shown {
        place: place(seq),
        from: 0,
        to,
        device: 1,
        client_seq: seq,
        body,
        change: None,
        of: None,
        state: State::AsSent,
        mentions: Mentions::default(),
        time_ms: 0,
    }
}

fn sent(number: u64) -> Happening {
    Happening::Sent { number, to: Peer::User(1), body: format!("m{number}"), durable: true }
}

fn listing(head: u64, read: u64) -> Listed {
    Listed { conversation: TALK, first: 1, head, read, pinned: false, muted_until_ms: 0 }
}

fn refused(number: u64, why: Refusal) -> Happening {
    Happening::Refused { number, why }
}

fn accepted(number: u64) -> Happening {
    Happening::Accepted { number, place: place(number) }
}

fn read_back(seqs: &[u64]) -> Happening {
    let messages: Vec<_> = seqs.iter().map(|seq| shown(*seq)).collect();
    let head = seqs.last().copied().unwrap_or(0);
    Happening::ReadBack { conversation: TALK, with: Peer::User(1), first: 1, head, messages }
}

/// Ann sends two messages, both see both, Bob reads the log back.
fn clean() -> Vec<(Device, Happening)> {
    vec![
        (ANN, Happening::Started),
        (BOB, Happening::Started),
        (ANN, sent(1)),
        (ANN, sent(2)),
        (ANN, accepted(1)),
        (ANN, accepted(2)),
        (ANN, Happening::Saw(shown(1))),
        (ANN, Happening::Saw(shown(2))),
        (BOB, Happening::Saw(shown(1))),
        (BOB, Happening::Saw(shown(2))),
        (ANN, Happening::Delivered { number: 1 }),
        (BOB, read_back(&[1, 2])),
    ]
}

fn judge(happenings: Vec<(Device, Happening)>) -> Vec<Rule> {
    let mut history = History::default();
    happenings.into_iter().for_each(|(device, happening)| history.push(device, happening));
    let verdict = history.check();
    let rules: BTreeSet<Rule> = verdict.violations.iter().map(|violation| violation.rule).collect();
    assert_eq!(verdict.violations_in_all, verdict.violations.len() as u64);
    rules.into_iter().collect()
}

/// The clean history with one happening put in the place of another.
fn with(at: usize, device: Device, happening: Happening) -> Vec<Rule> {
    let mut history = clean();
    history[at] = (device, happening);
    judge(history)
}

/// The clean history with more before its end.
fn and(more: Vec<(Device, Happening)>) -> Vec<Rule> {
    let mut history = clean();
    let end = history.len() - 1;
    history.splice(end..end, more);
    judge(history)
}

#[test]
fn a_clean_history_is_clean() {
    assert_eq!(judge(clean()), []);
    assert_eq!(judge(Vec::new()), []);
}

#[test]
fn what_is_lost_doubled_or_changed_is_seen() {
    assert_eq!(with(11, BOB, read_back(&[1])), [Rule::AcceptedIsKept, Rule::ReachesTheHead, Rule::NothingVanishes]);
    assert_eq!(with(11, BOB, read_back(&[2])), [Rule::AcceptedIsKept, Rule::Dense, Rule::NothingVanishes]);
    let moved = Happening::Accepted { number: 2, place: place(1) };
    assert_eq!(with(5, ANN, moved), [Rule::AcceptedIsKept]);
    assert_eq!(with(5, ANN, refused(2, Refusal::Other)), [Rule::KeptOnce]);
    assert_eq!(with(5, ANN, Happening::Unknown { number: 2 }), [], "an unknown end may be either");
    assert_eq!(and(vec![(ANN, accepted(2))]), [Rule::OnePlacePerSend]);
    let twice = Shown { place: place(3), ..shown(2) };
    let log = Happening::ReadBack {
        conversation: TALK,
        with: Peer::User(1),
        first: 1,
        head: 3,
        messages: vec![shown(1), shown(2), twice],
    };
    assert_eq!(with(11, BOB, log), [Rule::KeptOnce, Rule::OnePlacePerSend, Rule::ReachesTheHead]);
    assert!(with(9, BOB, Happening::Saw(Shown { body: "m1".to_owned(), ..shown(2) })).contains(&Rule::OneBodyPerPlace));
}

#[test]
fn streams_have_no_gap_and_no_repetition() {
    assert_eq!(with(8, BOB, Happening::Started), [Rule::NoGap, Rule::TrueReceipts]);
    assert_eq!(with(9, BOB, Happening::Settled), [Rule::ReachesTheHead]);
    assert_eq!(and(vec![(BOB, Happening::Saw(shown(2)))]), [Rule::NoRepetition]);
    let restarted = vec![(BOB, Happening::Started), (BOB, Happening::Saw(shown(2)))];
    assert_eq!(and(restarted.clone()), [], "what was not acknowledged comes again");
    let settled = [vec![(BOB, Happening::Settled)], restarted].concat();
    assert_eq!(and(settled), [Rule::CursorIsKept]);
    let forgotten = vec![
        (BOB, Happening::DropAsked(1)),
        (BOB, Happening::Settled),
        (BOB, Happening::Started),
        (BOB, Happening::Saw(shown(1))),
        (BOB, Happening::Saw(shown(2))),
    ];
    assert_eq!(and(forgotten), [], "a device that is forgotten begins anew");
    let skipped = vec![(BOB, Happening::Started), (BOB, Happening::Skipped { conversation: TALK, from: 1, to: 2 })];
    assert_eq!(and(skipped.clone()), [Rule::NoGap], "what is kept can be had");
    let mut dropped = clean();
    let (with, messages) = (Peer::User(1), vec![shown(2)]);
    dropped[4] = (ANN, Happening::Unknown { number: 1 });
    dropped[11] = (BOB, Happening::ReadBack { conversation: TALK, with, first: 2, head: 2, messages });
    dropped.extend([skipped[0].clone(), (BOB, Happening::Skipped { conversation: TALK, from: 1, to: 1 })]);
    dropped.push((BOB, Happening::Saw(shown(2))));
    assert_eq!(judge(dropped), [], "what is not kept can't");
}

#[test]
fn only_what_was_sent_and_only_to_whom() {
    let eve = Device { user: 9, number: 1 };
    assert_eq!(and(vec![(eve, Happening::Saw(shown(1)))]), [Rule::OnlyToItsMembers]);
    let forged = Shown { body: "x".to_owned(), place: place(0), ..shown(1) };
    assert_eq!(and(vec![(BOB, Happening::Saw(forged))]), [Rule::OnlyWhatWasSent]);
    let transient = |number| Happening::Sent { number, to: Peer::User(1), body: format!("m{number}"), durable: false };
    let ended = |number| Happening::Unknown { number };
    let flash = Happening::Saw(Shown { place: place(0), ..shown(5) });
    assert_eq!(and(vec![(ANN, transient(5)), (BOB, flash.clone()), (ANN, ended(5))]), []);
    let doubled = vec![(ANN, transient(5)), (BOB, flash.clone()), (BOB, flash.clone()), (ANN, ended(5))];
    assert_eq!(and(doubled), [Rule::NoRepetition]);
    let refused = vec![(ANN, transient(5)), (BOB, flash), (ANN, self::refused(5, Refusal::Other))];
    assert_eq!(and(refused), [Rule::KeptOnce]);
}

#[test]
fn order_receipts_pushes_and_ends() {
    let swapped = |passed: bool| {
        let mut history = clean();
        let at = |seq, number| Shown { place: place(seq), ..shown(number) };
        history[4] = (ANN, Happening::Accepted { number: 1, place: place(2) });
        history[5] = (ANN, Happening::Accepted { number: 2, place: place(1) });
        for (index, device, seq, number) in [(6, ANN, 1, 2), (7, ANN, 2, 1), (8, BOB, 1, 2), (9, BOB, 2, 1)] {
            history[index] = (device, Happening::Saw(at(seq, number)));
        }
        let messages = vec![at(1, 2), at(2, 1)];
        history[11] =
            (BOB, Happening::ReadBack { conversation: TALK, with: Peer::User(1), first: 1, head: 2, messages });
        if passed {
            history.insert(4, (ANN, Happening::Passed { number: 1 }));
        }
        judge(history)
    };
    assert_eq!(swapped(false), [Rule::SenderOrder]);
    assert_eq!(swapped(true), [], "one that was refused for a while may be passed");
    assert_eq!(and(vec![(ANN, sent(3))]), [Rule::EverySendEnds]);
    assert_eq!(
        and(vec![(ANN, sent(3)), (ANN, Happening::Delivered { number: 3 }), (ANN, Happening::Unknown { number: 3 })]),
        [Rule::TrueReceipts]
    );
    let arrived = Happening::Arrived { body: "m3".to_owned() };
    let told = Happening::Delivered { number: 3 };
    assert_eq!(and(vec![(ANN, sent(3)), (BOB, arrived), (ANN, told), (ANN, Happening::Unknown { number: 3 })]), []);
    let push = |seq| (BOB, Happening::Pushed { connection: 1, place: place(seq) });
    assert_eq!(and(vec![push(1), push(2)]), []);
    assert_eq!(and(vec![push(2), push(1)]), [Rule::PushesRise]);
}

const TEAM: u128 = 9;
const EVE: Device = Device { user: 2, number: 1 };

fn at(seq: u64) -> Place {
    Place { conversation: TEAM, seq }
}

fn row(seq: u64, from: u32, change: Change) -> Shown {
    let (place, to, body) = (at(seq), Peer::Group(0), String::new());
    Shown { place, from, to, device: 0, client_seq: 0, body, change: Some(change), ..shown(seq) }
}

fn said(seq: u64) -> Shown {
    Shown { place: at(seq), to: Peer::Group(0), ..shown(seq) }
}

fn read_group(head: u64, messages: &[Shown]) -> Happening {
    let (conversation, with, messages) = (TEAM, Peer::Group(0), messages.to_vec());
    Happening::ReadBack { conversation, with, first: 1, head, messages }
}

/// Ann makes a group (1), Bob comes (2), Ann says 3 and 4, Bob goes (5), Ann says 6.
fn log() -> [Shown; 6] {
    [
        row(1, 0, Change::Created),
        row(2, 1, Change::Came(vec![1])),
        said(3),
        said(4),
        row(5, 0, Change::Went(vec![1])),
        said(6),
    ]
}

fn group() -> Vec<(Device, Happening)> {
    let mut history = vec![(ANN, Happening::Started), (BOB, Happening::Started), (EVE, Happening::Started)];
    for number in [3, 4, 6] {
        let (to, body) = (Peer::Group(0), format!("m{number}"));
        history.push((ANN, Happening::Sent { number, to, body, durable: true }));
        history.push((ANN, Happening::Accepted { number, place: at(number) }));
    }
    history.push((BOB, Happening::Changed(at(2))));
    history.extend(log().map(|shown| (ANN, Happening::Saw(shown))));
    history.extend(log()[1..4].iter().map(|shown| (BOB, Happening::Saw(shown.clone()))));
    history.push((ANN, read_group(6, &log())));
    history.push((BOB, read_group(4, &log()[1..4])));
    history
}

/// The history of the group with more before its end, or without one of its happenings.
fn group_and(more: Vec<(Device, Happening)>) -> Vec<Rule> {
    let mut history = group();
    let end = history.len() - 2;
    history.splice(end..end, more);
    judge(history)
}

fn group_with(of: &Happening, instead: Happening) -> Vec<Rule> {
    let mut history = group();
    let at = history.iter().position(|(_, happening)| happening == of).unwrap();
    history[at].1 = instead;
    judge(history)
}

#[test]
fn members_get_what_was_said_while_they_were_members() {
    assert_eq!(judge(group()), []);
    for stranger in [(BOB, at(6)), (BOB, at(1)), (EVE, at(3))] {
        let push = Happening::Pushed { connection: 1, place: stranger.1 };
        assert_eq!(group_and(vec![(stranger.0, push)]), [Rule::OnlyToItsMembers]);
    }
    assert_eq!(
        group_and(vec![(BOB, Happening::Saw(said(6)))]),
        [Rule::ReachesTheHead, Rule::OnlyToItsMembers],
        "what is between is not for him: no gap"
    );
    assert_eq!(group_with(&Happening::Saw(said(4)), Happening::Settled), [Rule::NoGap, Rule::ReachesTheHead]);
    let skipped = |from, to| Happening::Skipped { conversation: TEAM, from, to };
    assert_eq!(group_with(&Happening::Saw(said(4)), skipped(4, 4)), [Rule::NoGap]);
    assert_eq!(group_with(&read_group(4, &log()[1..4]), read_group(4, &log()[1..3])), [Rule::MembersReadAll]);
    assert_eq!(group_with(&read_group(4, &log()[1..4]), read_group(6, &log()[1..4])), [Rule::MembersReadAll]);
    assert!(group_with(&read_group(6, &log()), read_group(6, &log()[..3])).contains(&Rule::MembersReadAll));
    assert_eq!(group_with(&Happening::Changed(at(2)), Happening::Changed(at(3))), [Rule::AcceptedIsKept]);
    let other = Shown { to: Peer::Group(0), place: at(7), from: 2, body: "eve".to_owned(), ..shown(7) };
    let sent = Happening::Sent { number: 7, to: Peer::Group(0), body: "eve".to_owned(), durable: true };
    let log: Vec<_> = log().into_iter().chain([other.clone()]).collect();
    let mut history = group();
    history.retain(|(_, happening)| *happening != read_group(6, &self::log()));
    let accepted = Happening::Accepted { number: 7, place: at(7) };
    history.extend([(EVE, sent), (EVE, accepted), (ANN, Happening::Saw(other)), (ANN, read_group(7, &log))]);
    assert_eq!(judge(history), [Rule::OnlyMembersWrite]);
}

#[test]
fn groups_have_no_hole_and_one_body_for_all() {
    let mut other = log();
    other[2].change = Some(Change::Other);
    assert!(group_and(vec![(ANN, read_group(6, &other))]).contains(&Rule::OneBodyPerPlace));
    let mut history = group();
    let whole = history.iter().position(|(_, happening)| *happening == read_group(6, &log())).unwrap();
    history[whole].1 = read_group(6, &[&log()[..3], &log()[4..]].concat());
    let last = history.len() - 1;
    history[last].1 = read_group(4, &log()[1..3]);
    assert!(judge(history).contains(&Rule::Dense));
}

#[test]
fn what_was_read_rises_is_kept_and_was_asked_for() {
    let seen = |source, seq| (ANN, Happening::ReadShown { source, user: 1, place: place(seq) });
    let asked = |seq| (BOB, Happening::ReadAsked(place(seq)));
    assert_eq!(and(vec![asked(2), seen(Source::Push, 1), seen(Source::Push, 2)]), []);
    assert_eq!(and(vec![asked(2), seen(Source::Push, 2), seen(Source::Push, 1)]), [Rule::ReadRises]);
    assert_eq!(and(vec![asked(2), seen(Source::Push, 2), seen(Source::List, 1)]), [], "a list may be a moment late");
    assert_eq!(and(vec![asked(1), seen(Source::Push, 2)]), [Rule::ReadWasAsked]);
    let listed = |head, read| (BOB, Happening::Listed(vec![listing(head, read)]));
    let kept = (BOB, Happening::ReadKept(place(2)));
    assert_eq!(and(vec![asked(2), kept.clone(), listed(2, 2)]), []);
    assert_eq!(and(vec![asked(2), kept, listed(2, 1)]), [Rule::ReadIsKept]);
    assert_eq!(and(vec![listed(1, 0)]), [Rule::ListIsTrue]);
    assert_eq!(and(vec![(BOB, Happening::Listed(Vec::new()))]), [Rule::ListIsTrue]);
    assert_eq!(and(vec![(BOB, Happening::Devices(vec![1]))]), []);
    assert_eq!(and(vec![(BOB, Happening::Devices(vec![2]))]), [Rule::DevicesAreListed]);
}

#[test]
fn a_sync_is_whole_and_its_pages_follow_each_other() {
    let sync = |after, seqs: &[u64], whole| {
        let messages = seqs.iter().map(|seq| shown(*seq)).collect();
        let (asked, behind) = (Moment::default(), vec![place(after)]);
        (BOB, Happening::Synced { asked, behind, messages, whole })
    };
    assert_eq!(and(vec![sync(0, &[1, 2], true), sync(1, &[2], true), sync(2, &[], true)]), []);
    assert_eq!(and(vec![sync(0, &[1], false)]), [], "it was cut short");
    assert_eq!(and(vec![sync(0, &[2], false)]), [Rule::SyncHasNoGap]);
    assert_eq!(and(vec![sync(0, &[2, 1], false)]), [Rule::SyncHasNoGap]);
    assert_eq!(and(vec![sync(0, &[1], true)]), [Rule::SyncIsWhole]);
    let elsewhere = (
        BOB,
        Happening::Synced { asked: Moment::default(), behind: Vec::new(), messages: vec![shown(2)], whole: false },
    );
    assert_eq!(and(vec![elsewhere]), [], "where it begins elsewhere is up to what was acknowledged");
}
