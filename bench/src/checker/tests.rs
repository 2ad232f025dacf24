//! Each rule of the checker: a small history that keeps it, and one that breaks it.

use super::*;

const TALK: u128 = 7;
const ANN: Device = Device { user: 0, number: 1 };
const BOB: Device = Device { user: 1, number: 1 };

fn place(seq: u64) -> Place {
    Place { conversation: TALK, seq }
}

fn shown(seq: u64) -> Shown {
    Shown { place: place(seq), from: 0, to: 1, device: 1, client_seq: seq, body: format!("m{seq}") }
}

fn sent(number: u64) -> Happening {
    Happening::Sent { number, to: 1, body: format!("m{number}"), durable: true }
}

fn accepted(number: u64) -> Happening {
    Happening::Accepted { number, place: place(number) }
}

fn read_back(seqs: &[u64]) -> Happening {
    let messages: Vec<_> = seqs.iter().map(|seq| shown(*seq)).collect();
    let head = seqs.last().copied().unwrap_or(0);
    Happening::ReadBack { conversation: TALK, first: 1, head, messages }
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
    assert_eq!(with(5, ANN, Happening::Refused { number: 2 }), [Rule::KeptOnce]);
    assert_eq!(with(5, ANN, Happening::Unknown { number: 2 }), [], "an unknown end may be either");
    assert_eq!(and(vec![(ANN, accepted(2))]), [Rule::OnePlacePerSend]);
    let twice = Shown { place: place(3), ..shown(2) };
    let log = Happening::ReadBack { conversation: TALK, first: 1, head: 3, messages: vec![shown(1), shown(2), twice] };
    assert_eq!(with(11, BOB, log), [Rule::KeptOnce, Rule::OnePlacePerSend, Rule::ReachesTheHead]);
    assert!(with(9, BOB, Happening::Saw(Shown { body: "m1".to_owned(), ..shown(2) })).contains(&Rule::OneBodyPerPlace));
}

#[test]
fn streams_have_no_gap_and_no_repetition() {
    assert_eq!(with(8, BOB, Happening::Settled), [Rule::NoGap, Rule::TrueReceipts]);
    assert_eq!(with(9, BOB, Happening::Settled), [Rule::ReachesTheHead]);
    assert_eq!(and(vec![(BOB, Happening::Saw(shown(2)))]), [Rule::NoRepetition]);
    let restarted = vec![(BOB, Happening::Started), (BOB, Happening::Saw(shown(2)))];
    assert_eq!(and(restarted.clone()), [], "what was not acknowledged comes again");
    let settled = [vec![(BOB, Happening::Settled)], restarted].concat();
    assert_eq!(and(settled), [Rule::CursorIsKept]);
    let skipped = vec![(BOB, Happening::Started), (BOB, Happening::Skipped(place(2)))];
    assert_eq!(and(skipped), []);
}

#[test]
fn only_what_was_sent_and_only_to_whom() {
    let eve = Device { user: 9, number: 1 };
    assert_eq!(and(vec![(eve, Happening::Saw(shown(1)))]), [Rule::OnlyToItsMembers]);
    let forged = Shown { body: "x".to_owned(), place: place(0), ..shown(1) };
    assert_eq!(and(vec![(BOB, Happening::Saw(forged))]), [Rule::OnlyWhatWasSent]);
    let transient = |number| Happening::Sent { number, to: 1, body: format!("m{number}"), durable: false };
    let ended = |number| Happening::Unknown { number };
    let flash = Happening::Saw(Shown { place: place(0), ..shown(5) });
    assert_eq!(and(vec![(ANN, transient(5)), (BOB, flash.clone()), (ANN, ended(5))]), []);
    let doubled = vec![(ANN, transient(5)), (BOB, flash.clone()), (BOB, flash.clone()), (ANN, ended(5))];
    assert_eq!(and(doubled), [Rule::NoRepetition]);
    let refused = vec![(ANN, transient(5)), (BOB, flash), (ANN, Happening::Refused { number: 5 })];
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
        history[11] = (BOB, Happening::ReadBack { conversation: TALK, first: 1, head: 2, messages });
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
