//! Who may write to whom, roles in groups, mutes, mentions, notices, marks and exports.

use super::*;

fn block(by: Device, user: u32, block: bool) -> [(Device, Happening); 2] {
    let (asked, kept) = (Permit::BlockAsked { user, block }, Permit::BlockKept { user, block });
    [(by, Happening::Permit(asked)), (by, Happening::Permit(kept))]
}

fn takes(takes: Takes) -> [(Device, Happening); 2] {
    [(BOB, Happening::Permit(Permit::TakesAsked(takes))), (BOB, Happening::Permit(Permit::TakesKept(takes)))]
}

/// Ann's third send to Bob, which nobody reads back: what matters is when it was taken or refused.
fn third(more: Vec<(Device, Happening)>) -> BTreeSet<Rule> {
    let mut rules: BTreeSet<Rule> = and(more).into_iter().collect();
    [Rule::AcceptedIsKept, Rule::EverySendEnds].iter().for_each(|rule| _ = rules.remove(rule));
    rules
}

fn cases(cases: &[&[(Device, Happening)]]) -> BTreeSet<Rule> {
    third(cases.concat())
}

#[test]
fn who_is_blocked_is_not_heard_any_more() {
    let (ask, took) = ((ANN, sent(3)), (ANN, accepted(3)));
    let ([asked, kept], [asks_back, back]) = (block(BOB, 0, true), block(BOB, 0, false));
    let broken = BTreeSet::from([Rule::OnlyWhoMayWrites]);
    let both = [asked.clone(), kept.clone()];
    assert_eq!(cases(&[&both, &[ask.clone(), took.clone()]]), broken);
    let (asks, takes) = ([ask.clone()], [took.clone()]);
    assert_eq!(cases(&[&asks, &both, &takes]), BTreeSet::new(), "it was sent before");
    assert_eq!(cases(&[&[asked.clone(), ask.clone(), took.clone(), kept]]), BTreeSet::new(), "nobody was told yet");
    assert_eq!(
        cases(&[&both, &[ask.clone(), asks_back.clone(), took.clone()]]),
        BTreeSet::new(),
        "perhaps not any more"
    );
    assert_eq!(cases(&[&both, &[asks_back, back], &[ask.clone(), took.clone()]]), BTreeSet::new());
    assert_eq!(cases(&[&block(ANN, 1, true), &[ask, took]]), BTreeSet::new(), "whom she blocks may be written to");
    let signal = Happening::Signalled { number: 4, to: Peer::User(1), body: "s".to_owned() };
    let heard = Happening::SawSignal { from: 0, to: Peer::User(1), body: "s".to_owned() };
    assert_eq!(cases(&[&both, &[(ANN, signal), (BOB, heard)]]), broken);
}

#[test]
fn who_takes_nothing_of_strangers_is_written_to_by_those_he_wrote_to() {
    let send = [(ANN, sent(3)), (ANN, accepted(3))];
    let broken = BTreeSet::from([Rule::OnlyWhoMayWrites]);
    assert_eq!(cases(&[&takes(Takes::Nobody), &send]), broken);
    assert_eq!(cases(&[&takes(Takes::Known), &send]), broken);
    assert_eq!(cases(&[&takes(Takes::Known), &takes(Takes::Anyone), &send]), BTreeSet::new());
    let answer = Happening::Sent { number: 1, to: Peer::User(0), body: "b".to_owned(), durable: true };
    assert_eq!(cases(&[&[(BOB, answer.clone())], &takes(Takes::Known), &send]), BTreeSet::new());
    let refusal = [(ANN, sent(3)), (ANN, refused(3, Refusal::NotAccepted))];
    assert_eq!(cases(&[&takes(Takes::Known), &refusal]), BTreeSet::new());
    let known = [(BOB, answer), (BOB, Happening::Accepted { number: 1, place: place(4) })];
    assert_eq!(
        cases(&[&known, &takes(Takes::Known), &refusal]),
        BTreeSet::from([Rule::RefusedForAReason]),
        "he wrote to her"
    );
}

#[test]
fn nothing_is_refused_without_a_reason() {
    let refusal = |why| [(ANN, sent(3)), (ANN, refused(3, why))];
    let broken = BTreeSet::from([Rule::RefusedForAReason]);
    for why in [Refusal::Blocked, Refusal::NotAccepted, Refusal::UserDeleted] {
        assert_eq!(cases(&[&refusal(why)]), broken, "{why:?}");
    }
    let (set, unset) = (block(BOB, 0, true), block(BOB, 0, false));
    assert_eq!(cases(&[&set, &refusal(Refusal::Blocked)]), BTreeSet::new());
    assert_eq!(cases(&[&set, &unset, &refusal(Refusal::Blocked)]), broken);
    let [begins, ends] = refusal(Refusal::Blocked);
    assert_eq!(cases(&[&set, &[begins], &unset, &[ends]]), BTreeSet::new(), "it was so when this was sent");
}

/// The group of Ann with this row behind all others.
fn group_ends_with(last: Shown) -> Vec<Rule> {
    let mut history = group();
    history.retain(|(_, happening)| *happening != read_group(6, &log()));
    let log: Vec<Shown> = log().into_iter().chain([last.clone()]).collect();
    history.extend([(ANN, Happening::Saw(last)), (ANN, read_group(7, &log))]);
    judge(history)
}

#[test]
fn only_who_ranks_changes_a_group() {
    for change in [Change::Renamed, Change::Dissolved, Change::Policy { open: false }] {
        assert_eq!(group_ends_with(row(7, 0, change.clone())), [], "the owner may");
        assert_eq!(group_ends_with(row(7, 2, change)), [Rule::OnlyWhoRanksActs], "a stranger may not");
    }
    let mut log = log();
    log[5] = row(6, 0, Change::Muted(1, 7));
    assert_eq!(judge_log(&log), [], "ranks count, and Bob has gone");
    log[3] = row(4, 0, Change::Ranked(1, Rank::Admin));
    log[4] = row(5, 1, Change::Renamed);
    assert_eq!(judge_log(&log), [], "an administrator renames");
    log[3] = row(4, 0, Change::Ranked(1, Rank::Member));
    assert_eq!(judge_log(&log), [Rule::OnlyWhoRanksActs]);
    log[3] = row(4, 0, Change::Transferred(1));
    log[5] = row(6, 1, Change::Ranked(0, Rank::Member));
    assert_eq!(judge_log(&log), [], "the group is his");
    log[5] = row(6, 0, Change::Dissolved);
    assert_eq!(judge_log(&log), [Rule::OnlyWhoRanksActs], "she is an administrator only");
}

/// Ann's and Bob's group, of which Ann reads all and nobody anything else; its messages are taken as sent.
fn judge_log(log: &[Shown]) -> Vec<Rule> {
    let unjudged = [Rule::OnlyWhatWasSent, Rule::ReachesTheHead, Rule::MembersReadAll];
    let rules = judge(vec![(ANN, Happening::Started), (ANN, read_group(log.len() as u64, log))]);
    rules.into_iter().filter(|rule| !unjudged.contains(rule)).collect()
}

#[test]
fn who_is_muted_is_silent_and_a_dissolved_group_too() {
    let muted = |until_ms| {
        let mut log = log();
        log[3] = row(4, 0, Change::Muted(1, until_ms));
        log[4] = Shown { from: 1, time_ms: 5, ..said(5) };
        judge_log(&log)
    };
    assert_eq!((muted(5), muted(6)), (vec![], vec![Rule::MutedIsSilent]));
    let mut log = log();
    log[4] = row(5, 0, Change::Dissolved);
    assert_eq!(judge_log(&log), [Rule::DissolvedIsSilent]);
    assert_eq!(judge_log(&log[..5]), []);
    let team = Peer::Group(0);
    let signal = Happening::Signalled { number: 9, to: team, body: "s".to_owned() };
    let heard = Happening::SawSignal { from: 0, to: team, body: "s".to_owned() };
    let mut history = vec![(ANN, Happening::Started), (BOB, Happening::Started)];
    history.push((ANN, Happening::Saw(log[4].clone())));
    history.extend([(ANN, signal), (BOB, heard), (ANN, read_group(5, &log[..5]))]);
    assert!(judge(history).contains(&Rule::OnlyMembersWrite), "what passes is silent too");
}

#[test]
fn a_closed_group_is_joined_by_the_invited() {
    let makes = |open| (ANN, Happening::Invites { group: 0, open: Some(open), users: vec![] });
    let invited = (ANN, Happening::Invites { group: 0, open: None, users: vec![1] });
    let case = |more: Vec<(Device, Happening)>| judge([more, group()].concat());
    assert_eq!(case(vec![makes(true)]), []);
    assert_eq!(case(vec![makes(false)]), [Rule::OnlyTheInvitedJoin]);
    assert_eq!(case(vec![makes(false), invited]), []);
}

#[test]
fn a_message_mentions_whom_its_sender_has_mentioned() {
    let mentions = || Mentions { users: vec![1], all: false };
    let mentioned = |number| (ANN, Happening::Mentioned { number, mentions: mentions() });
    let seen = |mentions| (BOB, Happening::Saw(Shown { mentions, ..shown(3) }));
    let case = |mentioned: Vec<(Device, Happening)>, seen| {
        let rules = third([vec![(ANN, sent(3))], mentioned, vec![seen, (ANN, accepted(3))]].concat());
        rules.contains(&Rule::MentionsAsSent)
    };
    assert!(!case(vec![mentioned(3)], seen(mentions())));
    assert!(case(vec![mentioned(3)], seen(Mentions::default())));
    assert!(case(vec![], seen(mentions())));
    let all = Shown { mentions: Mentions { users: vec![], all: true }, from: 1, ..said(5) };
    let mut log = log();
    log[4] = all.clone();
    assert_eq!(judge_log(&log), [Rule::OnlyWhoRanksActs], "Bob is a plain member");
    log[4] = Shown { from: 0, ..all };
    assert_eq!(judge_log(&log), []);
}

fn arrived(at: Device, from: u32) -> (Device, Happening) {
    (at, Happening::Notice(Notice::Arrived { body: "all".to_owned(), from }))
}

#[test]
fn a_notice_is_of_an_administrator_and_comes_once() {
    let asked = |at_rest| (ANN, Happening::Notice(Notice::Asked { body: "all".to_owned(), at_rest }));
    let written = (ANN, Happening::Notice(Notice::Written { body: "all".to_owned() }));
    let given = |devices| (ANN, Happening::Notice(Notice::Given { body: "all".to_owned(), devices }));
    let case = |at_rest, more: &[(Device, Happening)]| {
        and([&[(ANN, Happening::Notice(Notice::Appointed)), asked(at_rest), written.clone()], more].concat())
    };
    assert_eq!(case(false, &[arrived(BOB, 0), given(2)]), []);
    assert_eq!(case(true, &[arrived(BOB, 0), given(2)]), [Rule::ToldToAll]);
    assert_eq!(case(true, &[arrived(BOB, 0), arrived(ANN, 0), given(2)]), []);
    assert_eq!(case(false, &[arrived(BOB, 0), arrived(BOB, 0)]), [Rule::ToldOnce]);
    assert_eq!(case(false, &[arrived(BOB, 0), written.clone(), arrived(BOB, 0)]), [], "it was asked for again");
    assert_eq!(case(false, &[arrived(BOB, 1)]), [Rule::OnlyAdministratorsTell]);
    assert_eq!(and(vec![asked(false), written.clone(), arrived(BOB, 0)]), [Rule::OnlyAdministratorsTell]);
}

#[test]
fn marks_are_kept() {
    let mark = |pinned| Happening::Marks { place: TALK, mark: (pinned, 0), kept: false };
    let kept = |pinned| Happening::Marks { place: TALK, mark: (pinned, 0), kept: true };
    let listed = |pinned| (BOB, Happening::Listed(vec![Listed { pinned, ..listing(2, 0) }]));
    assert_eq!(and(vec![listed(true)]), [Rule::MarksAreKept]);
    assert_eq!(and(vec![(BOB, mark(true)), listed(false)]), [], "nobody was told");
    assert_eq!(and(vec![(BOB, mark(true)), listed(true)]), []);
    assert_eq!(and(vec![(BOB, mark(true)), (BOB, kept(true)), listed(false)]), [Rule::MarksAreKept]);
    assert_eq!(and(vec![(BOB, mark(true)), (BOB, kept(true)), (BOB, mark(false)), listed(false)]), []);
}

#[test]
fn an_export_holds_what_its_user_reads() {
    let full = || Export {
        user: Some(1),
        blocks: vec![],
        messages: [1, 2].map(|seq| (place(seq), 0, format!("m{seq}"))).to_vec(),
        broken: false,
    };
    let case = |export: Export, before: &[(Device, Happening)]| {
        let mut history = [before, &clean()].concat();
        history.push((BOB, Happening::Exported(export)));
        judge(history)
    };
    assert_eq!(case(full(), &[]), []);
    let mut short = full();
    short.messages.pop();
    let mut more = full();
    more.messages.push((place(3), 0, "m3".to_owned()));
    let mut other = full();
    other.messages[0].2 = "m2".to_owned();
    for wrong in [short, more, other, Export { user: Some(0), ..full() }, Export { broken: true, ..full() }] {
        assert_eq!(case(wrong.clone(), &[]), [Rule::ExportIsTrue], "{wrong:?}");
    }
    let blocks = |blocks| Export { blocks, ..full() };
    assert_eq!(case(blocks(vec![0]), &[]), [Rule::ExportIsTrue]);
    assert_eq!(case(blocks(vec![0]), &block(BOB, 0, true)), [Rule::OnlyWhoMayWrites], "only her writing is wrong then");
    assert_eq!(case(blocks(vec![]), &block(BOB, 0, true)), [Rule::OnlyWhoMayWrites, Rule::ExportIsTrue]);
}
