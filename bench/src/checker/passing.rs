//! What is not stored: transient messages and signals. At most once, in order, and of a group only to its members.
//!
//! They have no place in a log, so when a user was no member is told from outside: a change of the group was written before
//! anybody saw it or a later row, and after all that is before it in the log was sent. Who was certainly no member from
//! the sending to the arrival of something must not have it.

use std::collections::{BTreeMap, HashMap};

use super::judge::Checker;
use super::members::Members;
use super::{Device, Moment, Peer, Rule, Shown};

/// Something that arrived.
struct Arrival {
    at: Device,
    from: Device,
    to: Peer,
    /// Of its sender, rising.
    number: u64,
    signal: bool,
    sent: Moment,
    came: Moment,
}

struct Signal {
    from: Device,
    number: u64,
    to: Peer,
    sent: Moment,
}

/// What was heard of it until now.
#[derive(Default)]
pub struct Passing<'a> {
    signals: HashMap<&'a str, Signal>,
    arrivals: Vec<Arrival>,
}

/// From when to when something was so, at least.
type Span = (Moment, Moment);

impl<'a> Checker<'a> {
    pub fn signalled(&mut self, from: Device, (number, to): (u64, Peer), body: &'a str) {
        self.passing.signals.insert(body, Signal { from, number, to, sent: self.now });
    }

    /// A transient message was handed to an application.
    pub fn transient_came(&mut self, at: Device, shown: &Shown) {
        let Some(&(from, number)) = self.by_body.get(shown.body.as_str()) else { return };
        let Some(sent) = self.sends.get(&(from, number)).map(|send| send.at) else { return };
        let (to, came) = (shown.to, self.now);
        self.passing.arrivals.push(Arrival { at, from, to, number, signal: false, sent, came });
    }

    pub fn saw_signal(&mut self, at: Device, (from, to): (u32, Peer), body: &'a str) {
        let known = self.passing.signals.get(body).filter(|signal| signal.from.user == from && signal.to == to);
        let for_it = match to {
            Peer::User(user) => at.user == user,
            Peer::Group(_) => at.user != from,
        };
        let Some(signal) = known.filter(|signal| for_it && signal.from != at) else {
            let text = format!("{at:?} got the signal {body:?} from user {from} to {to:?}");
            return self.verdict.broken(Rule::OnlyWhatWasSignalled, text);
        };
        let (from, number, sent, came) = (signal.from, signal.number, signal.sent, self.now);
        self.was_taken((from.user, to), sent, &format!("the signal {body:?}"));
        if !self.saw.insert((at, body)) {
            self.verdict.broken(Rule::OnlyWhatWasSignalled, format!("{at:?} got the signal {body:?} twice"));
        }
        self.passing.arrivals.push(Arrival { at, from, to, number, signal: true, sent, came });
    }

    pub fn check_passing(&mut self, members: &Members) {
        let arrivals = std::mem::take(&mut self.passing.arrivals);
        self.verdict.counts.passed += arrivals.len() as u64;
        let mut last: HashMap<(Device, Device, Peer, bool), u64> = HashMap::new();
        for arrival in &arrivals {
            let Arrival { at, from, to, number, signal, .. } = arrival;
            if !signal && self.sends.get(&(*from, *number)).is_some_and(|send| send.passed) {
                continue;
            }
            let before = last.insert((*at, *from, *to, *signal), *number).unwrap_or(0);
            if *number < before {
                let what = if *signal { "signal" } else { "message" };
                let text = format!("{at:?} got the {what} {number} of {from:?} to {to:?} after {before}");
                self.verdict.broken(Rule::PassingOrder, text);
            }
        }
        let outside = self.outside(members);
        let nowhere = vec![(Moment::default(), Moment(usize::MAX))];
        for arrival in &arrivals {
            let Peer::Group(group) = arrival.to else { continue };
            let Some((users, _)) = outside.get(&group) else { continue };
            let out = |user| {
                let spans = users.get(&user).unwrap_or(&nowhere);
                spans.iter().any(|(since, until)| *since < arrival.sent && arrival.came < *until)
            };
            for (rule, user) in [(Rule::OnlyToItsMembers, arrival.at.user), (Rule::OnlyMembersWrite, arrival.from.user)]
            {
                if out(user) {
                    let Arrival { at, from, number, .. } = arrival;
                    let text =
                        format!("{at:?} got {number} of {from:?} to group {group}, user {user} was no member then");
                    self.verdict.broken(rule, text);
                }
            }
        }
    }

    /// When users were certainly no members, of the groups whose logs are known.
    fn outside(&self, members: &Members) -> HashMap<u32, (BTreeMap<u32, Vec<Span>>, u128)> {
        let mut groups = HashMap::new();
        for (&conversation, log) in &self.logs {
            let Some(Peer::Group(number)) = log.values().next().map(|row| row.to) else { continue };
            if members.is_unknown(conversation) {
                continue;
            }
            // No later than that it was written: when it or something behind it was first seen.
            let mut written: BTreeMap<u64, Moment> = BTreeMap::new();
            let mut earliest = Moment(usize::MAX);
            for (seq, row) in log.iter().rev() {
                earliest = earliest.min(self.first_seen.get(&row.place).copied().unwrap_or(earliest));
                written.insert(*seq, earliest);
            }
            // No earlier than that: when something before it was sent.
            let mut begun: BTreeMap<u64, Moment> = BTreeMap::new();
            let mut latest = Moment::default();
            for (seq, row) in log {
                latest = latest.max(self.send_at(row.place).map_or(Moment::default(), |send| send.at));
                begun.insert(*seq, latest);
            }
            let since = |seq: u64| written.range(seq..).next().map_or(Moment(usize::MAX), |(_, at)| *at);
            let until = |seq: u64| begun.range(..=seq).next_back().map_or(Moment::default(), |(_, at)| *at);
            let dissolved = self.groups.dissolved.get(&conversation).copied();
            let mut users: BTreeMap<u32, Vec<Span>> = BTreeMap::new();
            for user in members.users(conversation) {
                let spans = users.entry(user).or_default();
                let mut from = Moment::default();
                for (first, last) in members.all(conversation, user) {
                    spans.push((from, until(*first)));
                    from = since(last.saturating_add(1));
                }
                spans.push((from, Moment(usize::MAX)));
                spans.extend(dissolved.map(|seq| (since(seq), Moment(usize::MAX))));
            }
            groups.insert(number, (users, conversation));
        }
        groups
    }
}
