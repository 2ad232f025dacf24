//! What messages have become: edited, taken back, deleted for all or for one reader.
//!
//! What follows from one sighting is judged at once; what a message has to look like in the end follows from the last
//! amendment of its log. Who may amend: the sender, and in a group who outranks him deletes too.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::judge::Checker;
use super::members::Members;
use super::{Device, Moment, Peer, Place, Rank, Rule, Shown, State};

/// What was heard of it until now.
#[derive(Default)]
pub struct Amendments<'a> {
    /// Somebody was told that the message is gone for all.
    gone: HashMap<Place, Moment>,
    hide_asked: HashSet<(u32, Place)>,
    hide_kept: HashSet<(u32, Place)>,
    /// Original, what it was shown as, and who did it, as far as the row says.
    claims: BTreeSet<(Place, State, Option<Device>)>,
    /// Logs as they were read back in the end.
    pub readings: Vec<(Device, &'a [Shown])>,
}

impl Shown {
    /// A message that somebody sent, and no amendment or change of a group.
    pub(super) fn is_message(&self) -> bool {
        self.change.is_none() && self.of.is_none()
    }

    /// Of two sightings of one row the one that tells more of what was sent is kept.
    pub(super) fn tells(&self) -> u8 {
        match (self.of.is_some(), self.state) {
            (false, State::AsSent) | (true, State::Edited | State::Recalled | State::Deleted) => 3,
            (false, State::Edited) => 2,
            (false, State::Recalled | State::Deleted) => 1,
            (false, State::Hidden) | (true, State::AsSent | State::Hidden) => 0,
        }
    }

    /// The message that this row is or amends.
    fn original(&self) -> Place {
        Place { seq: self.of.unwrap_or(self.place.seq), ..self.place }
    }
}

impl<'a> Checker<'a> {
    pub fn amendment_accepted(&mut self, of: Place, what: State) {
        self.verdict.counts.amended += 1;
        if matches!(what, State::Recalled | State::Deleted) {
            self.amendments.gone.entry(of).or_insert(self.now);
        }
    }

    pub fn hide_asked(&mut self, device: Device, place: Place) {
        self.amendments.hide_asked.insert((device.user, place));
    }

    pub fn hide_kept(&mut self, device: Device, place: Place) {
        self.verdict.counts.hidden += 1;
        self.amendments.hide_kept.insert((device.user, place));
    }

    pub fn hide_told(&mut self, device: Device, place: Place) {
        if !self.amendments.hide_asked.contains(&(device.user, place)) {
            let text = format!("{device:?} was told that its user has deleted {place:?} for himself");
            self.verdict.broken(Rule::OnlyAskedIsHidden, text);
        }
    }

    /// What was gone for all when this was asked for has no body.
    pub fn not_gone(&mut self, device: Device, asked: Moment, shown: &Shown) {
        let gone = shown.is_message() && self.amendments.gone.get(&shown.place).is_some_and(|since| *since < asked);
        if gone && !shown.body.is_empty() {
            self.verdict.broken(Rule::GoneStaysGone, format!("{device:?} asked later and was shown {shown:?}"));
        }
    }

    /// One sighting of a row that is no message as it was sent. True: it is well so far.
    pub fn look_at_amended(&mut self, device: Device, shown: &Shown) {
        let Shown { place, from, body, of, state, .. } = shown;
        let by = of.map(|_| Device { user: *from, number: shown.device });
        let wrong = match state {
            State::Hidden if !self.amendments.hide_asked.contains(&(device.user, *place)) => {
                Some(Rule::OnlyAskedIsHidden)
            }
            State::Edited if !body.is_empty() => self.check_edit(shown),
            _ if place.seq == 0 || !body.is_empty() => Some(Rule::AmendmentsShow),
            State::AsSent | State::Hidden => None,
            State::Edited | State::Recalled | State::Deleted => {
                self.amendments.claims.insert((shown.original(), *state, by));
                None
            }
        };
        if let Some(rule) = wrong {
            self.verdict.broken(rule, format!("{device:?} was shown {shown:?}"));
        }
    }

    /// The body is that of an edit of this message.
    fn check_edit(&self, shown: &Shown) -> Option<Rule> {
        let Some(key) = self.by_body.get(shown.body.as_str()) else { return Some(Rule::OnlyWhatWasSent) };
        let amends = self.sends.get(key).and_then(|send| send.amends);
        if amends != Some((shown.original(), State::Edited)) {
            return Some(Rule::AmendmentsShow);
        }
        let sender = Device { user: shown.from, number: shown.device };
        let may = if shown.of.is_some() { key.0 == sender } else { key.0.user == shown.from };
        (!may).then_some(Rule::OnlyWhoMayAmends)
    }

    /// What an amendment says, even if nobody was shown it as it came: what was accepted there.
    fn said(&self, row: &'a Shown) -> Option<(State, &'a str)> {
        if row.state != State::AsSent {
            return Some((row.state, &row.body));
        }
        let send = self.send_at(row.place)?;
        send.amends.map(|(_, what)| (what, send.body))
    }

    pub fn check_amendments(&mut self, members: &Members) {
        let rows = self.logs.values().flat_map(BTreeMap::values).filter(|row| row.of.is_some());
        let rows: Vec<&'a Shown> = rows.copied().collect();
        let mut last: HashMap<Place, &'a Shown> = HashMap::new();
        for row in rows {
            let what = self.said(row).map(|(what, _)| what);
            let before = last.insert(row.original(), row).and_then(|before| self.said(before));
            if before.is_some_and(|(before, _)| before != State::Edited) {
                self.verdict.broken(Rule::GoneStaysGone, format!("{row:?} amends what was gone"));
            }
            self.check_right((row.original(), members), (row.from, what), row);
        }
        for (original, state, by) in std::mem::take(&mut self.amendments.claims) {
            self.check_claim(original, state, by);
        }
        for (reader, messages) in std::mem::take(&mut self.amendments.readings) {
            for shown in messages.iter().filter(|shown| shown.is_message()) {
                self.check_reading(reader, shown, last.get(&shown.place).copied(), members);
            }
        }
    }

    fn check_right(&mut self, (original, members): (Place, &Members), (by, what): (u32, Option<State>), row: &Shown) {
        // What was let go before anybody saw it can't be judged.
        let Some(sender) = self.shown.get(&original).map(|shown| shown.from) else { return };
        let deletes = what.is_none_or(|what| what == State::Deleted);
        // Who has left ranks as a plain member.
        let rank = |user| self.groups.rank(row.place, user);
        let outranks = matches!(row.to, Peer::Group(_)) && rank(by) > Some(rank(sender).unwrap_or(Rank::Member));
        let unjudged = matches!(row.to, Peer::Group(_)) && members.is_unknown(original.conversation);
        let may = by == sender || (deletes && (outranks || unjudged));
        if !may {
            self.verdict.broken(Rule::OnlyWhoMayAmends, format!("{row:?} amends what user {sender} wrote"));
        }
    }

    /// Somebody wanted that of the message.
    fn check_claim(&mut self, original: Place, state: State, by: Option<Device>) {
        // What a deleted user takes back no device of his has asked for.
        let with_him = match by {
            Some(by) => by.number == 0 && self.ended.recalls(by.user),
            None => self.shown.get(&original).is_some_and(|shown| self.ended.recalls(shown.from)),
        };
        if state == State::Recalled && with_him {
            return;
        }
        let mut wanted = self.sends.iter().filter(|(_, send)| send.amends == Some((original, state)));
        if !wanted.any(|((device, _), _)| by.is_none_or(|by| by == *device)) {
            let text = format!("{original:?} was shown as {state:?} by {by:?}, which nobody made of it");
            self.verdict.broken(Rule::OnlyWhatWasSent, text);
        }
    }

    /// A message as it was read back in the end.
    fn check_reading(&mut self, reader: Device, shown: &Shown, last: Option<&'a Shown>, members: &Members) {
        if shown.state == State::Hidden {
            return;
        }
        let key = (reader.user, shown.place);
        if self.amendments.hide_kept.contains(&key) {
            return self.verdict.broken(Rule::HiddenStaysHidden, format!("{reader:?} was shown {shown:?}"));
        }
        let expected = match last {
            None => Some((State::AsSent, shown.body.as_str())),
            Some(row) => match self.said(row) {
                // Who could see it when is not known of all groups.
                Some((State::Edited, _)) if members.is_unknown(row.place.conversation) => None,
                // Who is told of an edit and may not see it is shown no body.
                Some((State::Edited, _)) if !members.may_see(row.place.conversation, reader.user, row.place.seq) => {
                    Some((State::Edited, ""))
                }
                said => said,
            },
        };
        if expected.is_some_and(|expected| expected != (shown.state, shown.body.as_str())) {
            let text = format!("{reader:?} read {shown:?}, which is {expected:?} by {last:?}");
            self.verdict.broken(Rule::AmendmentsShow, text);
        }
    }
}
