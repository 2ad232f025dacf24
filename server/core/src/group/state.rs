//! One group in memory: compact, sorted, and split by shard for the fan-out. Pure.
//!
//! Invariants: members are sorted by name, no name twice; a name is a member or a guest, never both; `stamp` is the
//! highest of all rows of the group, so that the next change gets a higher one.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::ids::{Partition, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::Standing;
use ringline_schema::message::group::Role;
use ringline_schema::rows::{GroupRow, MemberRow, Membership};

use crate::group::list::MemberList;

/// Guests kept in memory; above it those that were only looked up are let go.
const GUESTS_MAX: usize = 2 * limits::GROUP_PENDING_MAX;

/// The members on each shard that has any. Shared by every message until the next change.
pub type Targets = Arc<[(ShardIndex, MemberList)]>;

/// The same members, by the shards that have them now.
pub(crate) fn placed_anew(targets: &Targets, owner: impl Fn(Partition) -> ShardIndex) -> Targets {
    let mut lists: BTreeMap<ShardIndex, Vec<UserName>> = BTreeMap::new();
    let mut names: Vec<_> = targets.iter().flat_map(|(_, list)| list.iter().cloned()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        lists.entry(owner(name.partition())).or_default().push(name);
    }
    lists.into_iter().filter_map(|(shard, names)| Some((shard, MemberList::new(&names)?))).collect()
}

/// A present member. About 100 bytes with its name.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub name: UserName,
    pub role: Role,
    pub since_ms: u64,
    pub muted_until_ms: u64,
    ranges: Box<[Membership]>,
}

impl Member {
    fn new(name: UserName, row: MemberRow) -> Self {
        let MemberRow { role, since_ms, muted_until_ms, ranges, .. } = row;
        Self { name, role, since_ms, muted_until_ms, ranges: ranges.into_boxed_slice() }
    }

    /// The row of this member as it is.
    pub fn row(&self) -> MemberRow {
        MemberRow {
            standing: Standing::Member,
            role: self.role,
            since_ms: self.since_ms,
            muted_until_ms: self.muted_until_ms,
            ranges: self.ranges.to_vec(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Group {
    pub row: GroupRow,
    pub stamp: u64,
    members: Vec<Member>,
    /// Everyone who is invited or has asked, and others that were looked up (`None`: nothing is known of them).
    guests: BTreeMap<UserName, Option<MemberRow>>,
    /// The members by shard as they were before `changed`; `None`: they have to be sorted anew.
    lists: Option<BTreeMap<ShardIndex, MemberList>>,
    /// Who has come or gone since.
    changed: Vec<UserName>,
    targets: Option<Targets>,
}

impl Group {
    pub fn new(row: GroupRow, stamp: u64) -> Self {
        Self {
            row,
            stamp,
            members: Vec::new(),
            guests: BTreeMap::new(),
            lists: None,
            changed: Vec::new(),
            targets: None,
        }
    }

    pub fn members(&self) -> &[Member] {
        &self.members
    }

    pub fn member(&self, name: &UserName) -> Option<&Member> {
        self.members.binary_search_by(|member| member.name.cmp(name)).ok().and_then(|at| self.members.get(at))
    }

    /// Members with a name above `cursor`, in order.
    pub fn members_above(&self, cursor: &str) -> &[Member] {
        let start = self.members.partition_point(|member| member.name.as_str() <= cursor);
        self.members.get(start..).unwrap_or(&[])
    }

    pub fn admins(&self) -> usize {
        self.members.iter().filter(|member| member.role == Role::Admin).count()
    }

    /// Those who are invited or have asked.
    pub fn pending(&self) -> impl Iterator<Item = (&UserName, &MemberRow)> {
        let guests = self.guests.iter().filter_map(|(name, row)| row.as_ref().map(|row| (name, row)));
        guests.filter(|(_, row)| is_pending(row))
    }

    /// What is known of somebody who is no member; `None`: it has to be looked up.
    pub fn guest(&self, name: &UserName) -> Option<Option<&MemberRow>> {
        self.guests.get(name).map(Option::as_ref)
    }

    /// Takes in what a look-up found.
    pub fn looked_up(&mut self, name: UserName, row: Option<MemberRow>) {
        if self.guests.len() >= GUESTS_MAX {
            self.guests.retain(|_, row| row.as_ref().is_some_and(is_pending));
        }
        if self.member(&name).is_none() {
            self.guests.insert(name, row);
        }
    }

    /// Takes in rows in order of name, as a load gives them: only members and those who are invited or have asked.
    pub fn load(&mut self, name: UserName, stamp: u64, row: MemberRow) {
        self.stamp = self.stamp.max(stamp);
        if row.standing == Standing::Member {
            debug_assert!(self.members.last().is_none_or(|last| last.name < name), "a list in order of name");
            self.members.push(Member::new(name, row));
        } else if is_pending(&row) {
            self.guests.insert(name, Some(row));
        }
    }

    /// Gives somebody a new row, or none.
    pub fn set(&mut self, name: UserName, row: Option<MemberRow>) {
        let who = name.clone();
        let place = self.members.binary_search_by(|member| member.name.cmp(&name));
        let joins = row.as_ref().is_some_and(|row| row.standing == Standing::Member);
        match (place, row) {
            (Ok(at), Some(row)) if joins => {
                if let Some(member) = self.members.get_mut(at) {
                    *member = Member::new(name, row);
                }
                return;
            }
            (Err(at), Some(row)) if joins => {
                self.guests.remove(&name);
                self.members.insert(at, Member::new(name, row));
            }
            (place, row) => {
                let Ok(at) = place else { return self.looked_up(name, row) };
                self.members.remove(at);
                self.looked_up(name, row);
            }
        }
        if self.lists.is_some() {
            self.changed.push(who);
        }
        self.targets = None;
    }

    /// The members by shard.
    pub fn targets(&mut self, owner: impl Fn(Partition) -> ShardIndex) -> Targets {
        if let Some(targets) = &self.targets {
            return Arc::clone(targets);
        }
        let mut lists = self.lists.take().unwrap_or_else(|| {
            self.changed.clear();
            sorted_out(&self.members, &owner)
        });
        for name in std::mem::take(&mut self.changed) {
            let is_member = self.member(&name).is_some();
            let list = lists.entry(owner(name.partition())).or_default();
            *list = if is_member { list.with(&name) } else { list.without(&name) };
        }
        lists.retain(|_, list| !list.is_empty());
        let targets: Targets = lists.iter().map(|(shard, list)| (*shard, list.clone())).collect();
        self.lists = Some(lists);
        self.targets = Some(Arc::clone(&targets));
        targets
    }

    /// Shards have other partitions now.
    pub fn forget_targets(&mut self) {
        (self.lists, self.targets) = (None, None);
    }

    /// A group that was dissolved loses its owner when that user is deleted.
    fn owners(&self) -> usize {
        self.members.iter().filter(|member| member.role == Role::Owner).count()
    }

    pub fn is_well_formed(&self) -> bool {
        self.members.windows(2).all(|pair| matches!(pair, [one, other] if one.name < other.name))
            && self.guests.keys().all(|name| self.member(name).is_none())
            && (self.row.dissolved != Seq::ZERO || self.owners() == 1)
    }
}

fn sorted_out(members: &[Member], owner: impl Fn(Partition) -> ShardIndex) -> BTreeMap<ShardIndex, MemberList> {
    let mut names: BTreeMap<ShardIndex, Vec<UserName>> = BTreeMap::new();
    for member in members {
        names.entry(owner(member.name.partition())).or_default().push(member.name.clone());
    }
    let list = |names: Vec<UserName>| MemberList::new(&names).unwrap_or_default();
    names.into_iter().map(|(shard, names)| (shard, list(names))).collect()
}

fn is_pending(row: &MemberRow) -> bool {
    matches!(row.standing, Standing::Invited | Standing::Asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::message::group::JoinPolicy;

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    fn row(standing: Standing, role: Role) -> MemberRow {
        MemberRow { standing, role, since_ms: 0, muted_until_ms: 0, ranges: Vec::new() }
    }

    #[test]
    fn members_stay_sorted_and_each_is_on_the_list_of_its_shard() {
        let group_row = GroupRow {
            name: name("#team"),
            title: "t".into(),
            join: JoinPolicy::Open,
            owner: name("user-0"),
            created_ms: 0,
            dissolved: Seq(0),
        };
        let mut group = Group::new(group_row, 1);
        for number in (0..200).rev() {
            let role = if number == 0 { Role::Owner } else { Role::Member };
            group.set(name(&format!("user-{number}")), Some(row(Standing::Member, role)));
        }
        group.set(name("user-7"), Some(row(Standing::Left, Role::Member)));
        group.set(name("guest"), Some(row(Standing::Invited, Role::Member)));
        assert!(group.is_well_formed());
        let placement = ringline_cluster::placement::CorePlacement::new(3).unwrap();
        let targets = group.targets(|partition| placement.shard_of(partition));
        assert_eq!(targets.iter().map(|(_, list)| list.len()).sum::<usize>(), 199);
        for (shard, list) in &*targets {
            assert!(list.iter().all(|user| placement.shard_of(user.partition()) == *shard));
            assert!(list.iter().is_sorted());
        }
        // What follows changes is what sorting anew gives.
        for number in [7, 11, 150, 199] {
            let standing = if number == 7 { Standing::Member } else { Standing::Left };
            group.set(name(&format!("user-{number}")), Some(row(standing, Role::Member)));
        }
        let changed = group.targets(|partition| placement.shard_of(partition));
        group.forget_targets();
        let anew = group.targets(|partition| placement.shard_of(partition));
        let names = |targets: &Targets| -> Vec<Vec<UserName>> {
            targets.iter().map(|(_, list)| list.iter().cloned().collect()).collect()
        };
        assert_eq!(names(&changed), names(&anew));
        assert_eq!(names(&anew).concat().len(), 197);
        group.set(name("user-7"), Some(row(Standing::Left, Role::Member)));
        assert_eq!(group.members_above("user-98")[0].name, name("user-99"));
        assert!(group.member(&name("user-7")).is_none() && group.pending().count() == 1);
        for number in 0..3 * GUESTS_MAX {
            group.looked_up(name(&format!("stranger-{number}")), None);
        }
        assert!(group.guests.len() <= GUESTS_MAX && group.pending().count() == 1);
    }
}
