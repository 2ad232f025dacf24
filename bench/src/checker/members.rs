//! Who may see what: both users of a direct conversation all of it, members of a group what got its number while they were
//! members, which follows from the group's own log.
//!
//! Made once for a run, from the logs as they were read back. Invariant: a range is rising, ranges of a user do not overlap.

use std::collections::{BTreeMap, BTreeSet};

use super::judge::Checker;
use super::{Change, Device, Rule, Shown};

/// Times one user's coming and going is remembered for one group: what was said in earlier ones may be out of reach.
const RANGES_KEPT_MAX: usize = 16;

/// A device was given what is before `after` and from `before` on, and nothing between them.
#[derive(Clone, Copy, Debug)]
pub struct Hop {
    /// What it breaks if there is something between.
    pub rule: Rule,
    pub device: Device,
    pub conversation: u128,
    pub after: u64,
    pub before: u64,
}

type Log<'a> = BTreeMap<u64, &'a Shown>;
type Ranges = Vec<(u64, u64)>;

/// See the module.
#[derive(Default)]
pub struct Members {
    /// First and last seq of each time that a user was a member.
    ranges: BTreeMap<(u128, u32), Ranges>,
    groups: BTreeSet<u128>,
    /// Groups of which so much was let go that nobody knows who came and went.
    unknown: BTreeSet<u128>,
    /// The first that is kept in the end.
    firsts: BTreeMap<u128, u64>,
}

impl Members {
    pub fn new(
        logs: &BTreeMap<u128, Log<'_>>,
        (firsts, heads): (&BTreeMap<u128, u64>, &BTreeMap<u128, u64>),
        pairs: &BTreeMap<u128, BTreeSet<u32>>,
    ) -> Self {
        let mut members = Self { firsts: firsts.clone(), ..Self::default() };
        for (&conversation, log) in logs {
            let Some((&last, _)) = log.last_key_value() else { continue };
            let head = heads.get(&conversation).copied().unwrap_or(last).max(last);
            match pairs.get(&conversation) {
                Some(pair) => {
                    let first = firsts.get(&conversation).copied().unwrap_or(1);
                    for &user in pair {
                        members.ranges.insert((conversation, user), vec![(first, head)]);
                    }
                }
                None if members.first(conversation) > 1 && (head > last || !is_whole(log)) => {
                    members.unknown.insert(conversation);
                }
                None => {
                    members.groups.insert(conversation);
                    members.of_group((conversation, head), log);
                }
            }
        }
        members
    }

    fn of_group(&mut self, (conversation, head): (u128, u64), log: &Log<'_>) {
        for (&seq, shown) in log {
            let came = match &shown.change {
                Some(Change::Created) => &[shown.from][..],
                Some(Change::Came(users)) => users,
                Some(_) | None => &[],
            };
            for user in came {
                self.ranges.entry((conversation, *user)).or_default().push((seq, head));
            }
            if let Some(Change::Went(users)) = &shown.change {
                for user in users {
                    let last = self.ranges.get_mut(&(conversation, *user)).and_then(|ranges| ranges.last_mut());
                    if let Some((_, end)) = last {
                        *end = (*end).min(seq.saturating_sub(1));
                    }
                }
            }
        }
    }

    /// The first that is kept.
    fn first(&self, conversation: u128) -> u64 {
        self.firsts.get(&conversation).copied().unwrap_or(1)
    }

    /// Whether nobody knows who its members were.
    pub fn is_unknown(&self, conversation: u128) -> bool {
        self.unknown.contains(&conversation)
    }

    pub fn unknown(&self) -> usize {
        self.unknown.len()
    }

    /// Who is a member in the end; `None`: not known.
    pub fn now(&self, conversation: u128) -> Option<impl Iterator<Item = u32>> {
        let head = self.users(conversation).filter_map(|user| self.head(conversation, user)).max()?;
        Some(self.users(conversation).filter(move |user| self.head(conversation, *user) == Some(head)))
    }

    /// All who ever were members.
    pub fn users(&self, conversation: u128) -> impl Iterator<Item = u32> {
        self.ranges.range((conversation, 0)..=(conversation, u32::MAX)).map(|((_, user), _)| *user)
    }

    pub fn all(&self, conversation: u128, user: u32) -> &[(u64, u64)] {
        self.ranges.get(&(conversation, user)).map_or(&[], Vec::as_slice)
    }

    /// The ranges that a user can still read.
    fn kept(&self, conversation: u128, user: u32) -> &[(u64, u64)] {
        let all = self.all(conversation, user);
        all.get(all.len().saturating_sub(RANGES_KEPT_MAX)..).unwrap_or(all)
    }

    pub fn may_see(&self, conversation: u128, user: u32, seq: u64) -> bool {
        self.all(conversation, user).iter().any(|(first, last)| (*first..=*last).contains(&seq))
    }

    /// The last that a user may see; `None`: was never a member.
    pub fn head(&self, conversation: u128, user: u32) -> Option<u64> {
        self.all(conversation, user).last().map(|(_, last)| *last)
    }

    /// The first that a device may see and a hop left out.
    pub fn left_out(&self, hop: &Hop) -> Option<u64> {
        let kept = self.kept(hop.conversation, hop.device.user);
        let lowest = self.first(hop.conversation).max(hop.after.saturating_add(1));
        let parts = kept.iter().map(|(first, last)| ((*first).max(lowest), *last));
        parts.filter(|(first, last)| first <= last && *first < hop.before).map(|(first, _)| first).next()
    }

    /// Whether a user reached all of a conversation up to its head that is still kept.
    pub fn reaches(&self, conversation: u128, reached: u64, head: u64) -> bool {
        reached == head || (reached < head && self.first(conversation) > head)
    }

    /// Conversations of a user, with the head of each.
    pub fn of_user(&self, user: u32) -> impl Iterator<Item = (u128, u64)> {
        let own = self.ranges.iter().filter(move |((_, member), _)| *member == user);
        own.filter_map(|((conversation, _), ranges)| ranges.last().map(|(_, head)| (*conversation, *head)))
    }
}

fn is_whole(log: &Log<'_>) -> bool {
    (1..).zip(log.keys()).all(|(expected, seq)| *seq == expected)
}

impl Checker<'_> {
    /// What members were given of a group is what was said while they were members: no more, and no less.
    pub fn check_groups(&mut self, members: &Members) {
        for conversation in &members.groups {
            let Some(log) = self.logs.get(conversation) else { continue };
            // What was let go is there too as somebody saw it: the whole log is known.
            let begins = log.first_key_value().is_some_and(|(_, row)| row.change == Some(Change::Created));
            if !begins || !is_whole(log) {
                let text = format!("{conversation:032x} has a hole, or does not begin with its creation");
                self.verdict.broken(Rule::Dense, text);
            }
        }
        let rows = members.groups.iter().filter_map(|group| self.logs.get(group)).flat_map(BTreeMap::values);
        for row in rows.filter(|row| row.change.is_none() && !self.ended.takes_back(row)) {
            if !members.may_see(row.place.conversation, row.from, row.place.seq) {
                self.verdict.broken(Rule::OnlyMembersWrite, format!("{row:?} is there, its sender was no member"));
            }
        }
        for (place, user) in &self.given {
            let of_group = members.groups.contains(&place.conversation);
            if of_group && !members.may_see(place.conversation, *user, place.seq) {
                let text = format!("user {user} was given {place:?} and was no member then");
                self.verdict.broken(Rule::OnlyToItsMembers, text);
            }
        }
        for (reader, conversation, (_, head), messages) in &self.readings {
            let read: BTreeSet<u64> = messages.iter().map(|shown| shown.place.seq).collect();
            let kept = members.kept(*conversation, reader.user);
            if members.is_unknown(*conversation) {
                continue;
            }
            let lowest = members.first(*conversation);
            let mut kept = kept.iter().flat_map(|(first, last)| (*first).max(lowest)..=*last);
            let missing = kept.find(|seq| !read.contains(seq));
            let rises = messages.is_sorted_by(|one, other| one.place.seq < other.place.seq);
            let own_head = members.head(*conversation, reader.user).unwrap_or(0);
            if missing.is_some() || !rises || *head != own_head {
                let text = format!("{reader:?} read {conversation:032x} to {head} of {own_head}, without {missing:?}");
                self.verdict.broken(Rule::MembersReadAll, text);
            }
        }
        for hop in self.hops.iter().filter(|hop| !members.is_unknown(hop.conversation)) {
            if let Some(seq) = members.left_out(hop) {
                let Hop { device, conversation, after, before, .. } = hop;
                let text = format!("{device:?} was given {before} of {conversation:032x} after {after}, without {seq}");
                self.verdict.broken(hop.rule, text);
            }
        }
    }
}
