//! What is kept of a conversation: floors that rise, and pages that say what is gone.
//!
//! Of a direct conversation; in a group a page begins where its reader's membership does, which says nothing of what is
//! kept, so there only the order of rows and the conversation list are judged.

use std::collections::BTreeMap;

use super::judge::Checker;
use super::{Device, Moment, Page, Peer, Place, Range, Rule, Shown};

/// What was heard of it until now.
#[derive(Default)]
pub struct Kept {
    /// The first that a user was shown, rising, and since when.
    firsts: BTreeMap<(u32, u128), Vec<(Moment, u64)>>,
    /// Who was told that what comes next, or all of it, is below the first: so that has to be at least here.
    truncated: Vec<(Device, Place)>,
}

impl<'a> Checker<'a> {
    /// The first that is kept, by an answer to what was asked at that moment.
    pub fn floor_shown(&mut self, device: Device, asked: Moment, Place { conversation, seq: first }: Place) {
        let known = self.kept.firsts.entry((device.user, conversation)).or_default();
        let before = known.iter().rev().find(|(since, _)| *since < asked).map_or(0, |(_, first)| *first);
        if known.last().is_none_or(|(_, highest)| first > *highest) {
            known.push((self.now, first));
        }
        if first < before {
            let text = format!("{device:?} was told that {conversation:032x} begins at {first}, after {before}");
            self.verdict.broken(Rule::FloorRises, text);
        }
    }

    pub fn fetched(
        &mut self,
        (device, asked): (Device, Moment),
        (with, conversation): (Peer, u128),
        range: Range,
        page: &'a Page,
    ) {
        self.verdict.counts.pages += 1;
        let direct = matches!(with, Peer::User(_));
        match page {
            Page::Truncated => {
                self.verdict.counts.truncated += 1;
                let below = if range.newest { range.before.unwrap_or(0) } else { range.after.saturating_add(2) };
                self.kept.truncated.push((device, Place { conversation, seq: below }));
            }
            Page::Messages { first, head, messages } => {
                for shown in messages {
                    self.look_at(device, shown);
                    self.not_gone(device, asked, shown);
                }
                let inside = |shown: &Shown| {
                    let seq = shown.place.seq;
                    shown.place.conversation == conversation
                        && seq > range.after
                        && range.before.is_none_or(|before| seq < before)
                };
                let rises = messages.is_sorted_by(|one, other| one.place.seq < other.place.seq);
                if !rises || !messages.iter().all(inside) {
                    let text = format!("{device:?} asked for {range:?} and got {messages:?}");
                    self.verdict.broken(Rule::SyncHasNoGap, text);
                }
                if direct {
                    self.floor_shown(device, asked, Place { conversation, seq: *first });
                    self.check_page(device, (range, *first, *head), messages);
                }
            }
        }
    }

    /// A page of a direct conversation has no hole, at its beginning neither.
    fn check_page(&mut self, device: Device, (range, first, head): (Range, u64, u64), messages: &[Shown]) {
        let seqs = || messages.iter().map(|shown| shown.place.seq);
        if seqs().any(|seq| seq < first) {
            let text = format!("{device:?} was given {messages:?}, of which {first} is the first");
            self.verdict.broken(Rule::NothingBelowTheFloor, text);
        }
        let next = if range.newest {
            let last = range.before.map_or(head, |before| before.saturating_sub(1).min(head));
            (last.max(1), messages.last())
        } else if range.after == 0 {
            (first, messages.first())
        } else {
            (range.after.saturating_add(1), messages.first())
        };
        let (expected, got) = (next.0, next.1.map(|shown| shown.place.seq));
        let asked_for = expected > range.after && range.before.is_none_or(|before| expected < before);
        let wrong = match got {
            Some(got) => got != expected,
            None => asked_for && (1..=head).contains(&expected),
        };
        let hole = !seqs().zip(seqs().skip(1)).all(|(one, next)| next == one + 1);
        // At the end there may be nothing: then the answer says by its first that all is gone.
        let all_gone = range.newest && range.before.is_none_or(|before| before > first) && first > head;
        if hole || (wrong && !all_gone) {
            let text = format!("{device:?} asked for {range:?} of {first}..={head} and got {got:?} for {expected}");
            self.verdict.broken(Rule::TruncatedIsSaid, text);
        }
    }

    pub fn check_kept(&mut self) {
        for (device, below) in std::mem::take(&mut self.kept.truncated) {
            let first = self.first(below.conversation);
            // Of what nobody has read back in the end, as he who could is deleted, nothing is known.
            if first < below.seq && self.heads.contains_key(&below.conversation) {
                let text = format!("{device:?} was told that all below {below:?} is gone, the first is {first}");
                self.verdict.broken(Rule::TruncatedIsTrue, text);
            }
        }
    }

    /// The first that is kept in the end.
    pub fn first(&self, conversation: u128) -> u64 {
        self.firsts.get(&conversation).copied().unwrap_or(1).max(1)
    }
}
