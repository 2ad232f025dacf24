//! Roles in groups: who may change what, which follows from the group's own log, row after row.
//!
//! A change is a row, and rows have one order, so what somebody was when he did it is what the rows before say: no rule
//! here needs a clock but that of mutes, which is the server's own and stands in the rows. Groups of which too much was
//! let go are not judged.

use std::collections::{BTreeMap, BTreeSet};

use super::judge::Checker;
use super::members::Members;
use super::{Change, Moment, Peer, Place, Rank, Rule, Shown, State};

/// Every change of somebody's rank; `None`: he is no member.
type Ranks = Vec<(u64, Option<Rank>)>;

/// What was asked of groups, as far as their rows do not say it.
#[derive(Default)]
pub struct Groups {
    /// When somebody was first invited.
    invited: BTreeMap<(u32, u32), Moment>,
    /// Whether anybody may join, as whoever made the group asked.
    open: BTreeMap<u32, bool>,
    ranks: BTreeMap<(u128, u32), Ranks>,
    /// Where groups were dissolved.
    pub dissolved: BTreeMap<u128, u64>,
}

impl Groups {
    /// What a user was when that row was written.
    pub fn rank(&self, place: Place, user: u32) -> Option<Rank> {
        let changes = self.ranks.get(&(place.conversation, user))?;
        changes.iter().rev().find(|(seq, _)| *seq < place.seq).and_then(|(_, rank)| *rank)
    }

    pub fn is_dissolved(&self, conversation: u128) -> bool {
        self.dissolved.contains_key(&conversation)
    }
}

/// A group as its rows up to one of them have made it.
#[derive(Default)]
struct Standing {
    ranks: BTreeMap<u32, Rank>,
    muted: BTreeMap<u32, u64>,
    open: bool,
    dissolved: bool,
}

impl Standing {
    fn has(&self, user: u32, rank: Rank) -> bool {
        self.ranks.get(&user).is_some_and(|own| *own >= rank)
    }

    fn outranks(&self, user: u32, other: u32) -> bool {
        let rank = |user: &u32| self.ranks.get(user).copied();
        self.has(user, Rank::Admin) && rank(&user) > rank(&other)
    }

    /// Whether that row may be there, by the ranks of those it is about.
    fn allows(&self, row: &Shown) -> bool {
        let from = row.from;
        match &row.change {
            Some(Change::Created) => self.ranks.is_empty(),
            Some(Change::Came(users)) => users[..] == [from] || self.has(from, Rank::Admin),
            Some(Change::Went(users)) => users.iter().all(|user| match *user == from {
                true => !self.has(from, Rank::Owner),
                false => self.outranks(from, *user),
            }),
            Some(Change::Ranked(..) | Change::Transferred(_) | Change::Dissolved) => self.has(from, Rank::Owner),
            Some(Change::Renamed | Change::Policy { .. }) => self.has(from, Rank::Admin),
            Some(Change::Muted(user, _)) => self.outranks(from, *user),
            Some(Change::Other) => true,
            None => !row.mentions.all || row.state != State::AsSent || self.has(from, Rank::Admin),
        }
    }

    fn follow(&mut self, row: &Shown) {
        match &row.change {
            Some(Change::Created) => _ = self.ranks.insert(row.from, Rank::Owner),
            Some(Change::Came(users)) => {
                for user in users {
                    self.ranks.insert(*user, Rank::Member);
                    self.muted.remove(user);
                }
            }
            Some(Change::Went(users)) => {
                for user in users {
                    self.ranks.remove(user);
                    self.muted.remove(user);
                }
            }
            Some(Change::Ranked(user, rank)) => _ = self.ranks.insert(*user, *rank),
            Some(Change::Transferred(user)) => {
                self.ranks.insert(row.from, Rank::Admin);
                self.ranks.insert(*user, Rank::Owner);
                self.muted.remove(user);
            }
            Some(Change::Dissolved) => self.dissolved = true,
            Some(Change::Policy { open }) => self.open = *open,
            Some(Change::Muted(user, until_ms)) => _ = self.muted.insert(*user, *until_ms),
            Some(Change::Renamed | Change::Other) | None => {}
        }
    }

    /// Whose rank that row changes.
    fn touches(row: &Shown) -> BTreeSet<u32> {
        let mut users = BTreeSet::from([row.from]);
        match &row.change {
            Some(Change::Came(more) | Change::Went(more)) => users.extend(more),
            Some(Change::Ranked(user, _) | Change::Transferred(user)) => _ = users.insert(*user),
            Some(Change::Created | Change::Dissolved | Change::Renamed | Change::Policy { .. })
            | Some(Change::Muted(..) | Change::Other)
            | None => {}
        }
        users
    }
}

impl Checker<'_> {
    /// Somebody asks that these users are invited to a group, or to make it so.
    pub fn invites(&mut self, (group, open): (u32, Option<bool>), users: &[u32]) {
        if let Some(open) = open {
            self.groups.open.insert(group, open);
        }
        for user in users {
            self.groups.invited.entry((group, *user)).or_insert(self.now);
        }
    }

    /// Works out who was what, and judges every row by it. Before amendments are judged.
    pub fn check_roles(&mut self, members: &Members) {
        for conversation in self.logs.keys().copied().collect::<Vec<_>>() {
            let log: Vec<&Shown> =
                self.logs.get(&conversation).into_iter().flat_map(BTreeMap::values).copied().collect();
            let Some(Peer::Group(group)) = log.first().map(|row| row.to) else { continue };
            let begins = log.first().is_some_and(|row| row.change == Some(Change::Created));
            if begins && !members.is_unknown(conversation) {
                self.judge_group(group, &log);
            }
        }
    }

    fn judge_group(&mut self, group: u32, log: &[&Shown]) {
        let open = self.groups.open.get(&group).copied();
        let mut standing = Standing { open: open.unwrap_or(true), ..Standing::default() };
        for row in log {
            self.judge_row((group, open.is_some()), &standing, row);
            standing.follow(row);
            let Place { conversation, seq } = row.place;
            for user in Standing::touches(row) {
                let changes = self.groups.ranks.entry((conversation, user)).or_default();
                changes.push((seq, standing.ranks.get(&user).copied()));
            }
            if row.change == Some(Change::Dissolved) {
                self.groups.dissolved.insert(conversation, seq);
                self.verdict.counts.dissolved += 1;
            }
        }
    }

    fn judge_row(&mut self, (group, judged): (u32, bool), standing: &Standing, row: &Shown) {
        let ranked = !matches!(row.change, None | Some(Change::Created | Change::Came(_) | Change::Went(_)));
        self.verdict.counts.ranked += u64::from(ranked || row.mentions.all);
        if self.ended.takes_back(row) {
            return;
        }
        if standing.dissolved {
            self.verdict.broken(Rule::DissolvedIsSilent, format!("{row:?} is there, its group was dissolved"));
        }
        if !standing.allows(row) {
            let ranks = &standing.ranks;
            self.verdict.broken(Rule::OnlyWhoRanksActs, format!("{row:?} is there, the ranks were {ranks:?}"));
        }
        let alone = matches!(&row.change, Some(Change::Came(users)) if users[..] == [row.from]);
        let seen = self.first_seen.get(&row.place).copied().unwrap_or(Moment(usize::MAX));
        let invited = self.groups.invited.get(&(group, row.from)).is_some_and(|asked| *asked < seen);
        if alone && judged && !standing.open && !invited {
            self.verdict.broken(Rule::OnlyTheInvitedJoin, format!("{row:?} is there, nobody has invited him"));
        }
        let says = row.change.is_none() && (row.of.is_none() || row.state == State::Edited);
        if says && standing.muted.get(&row.from).is_some_and(|until_ms| row.time_ms < *until_ms) {
            self.verdict.broken(Rule::MutedIsSilent, format!("{row:?} is there, its sender was muted"));
        }
    }
}
