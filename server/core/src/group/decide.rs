//! The rules of groups: what an act makes of a group, or why it is refused. Pure: nothing is changed here.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::Standing;
use ringline_schema::message::group::{JoinPolicy, Role, What};
use ringline_schema::record::StoredChange;
use ringline_schema::rows::{GroupRow, MemberRow};

use crate::group::act::Act;
use crate::group::state::{Group, Member};

/// The `number` of [`What::Left`] when the user did not leave, but was deleted.
const LEFT_BY_DELETION: u64 = 1;

/// What an act is judged by.
pub(crate) struct Scene<'a> {
    /// `None`: there is no such group.
    pub group: Option<&'a Group>,
    pub name: &'a UserName,
    /// Who acts.
    pub from: &'a UserName,
    /// The number that a row of the log about it gets.
    pub seq: Seq,
    /// Unix milliseconds.
    pub now_ms: u64,
    /// Only with a planted bug.
    pub admits_all: bool,
}

/// What becomes of a group.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    /// What the members are told, as a row of the log.
    pub told: Option<StoredChange>,
    pub group: Option<GroupRow>,
    pub members: Vec<(UserName, Option<MemberRow>)>,
    /// What others are told.
    pub pushes: Vec<Push>,
    /// What the one who acts is now.
    pub standing: Option<Standing>,
}

/// Told to users who do not see the row.
#[derive(Clone, Debug)]
pub(crate) struct Push {
    pub users: Vec<UserName>,
    pub change: StoredChange,
}

fn change(what: What, users: Vec<UserName>) -> StoredChange {
    StoredChange { what, users, text: String::new(), number: 0 }
}

impl Decision {
    fn told(change: StoredChange) -> Self {
        Self { told: Some(change), standing: Some(Standing::Member), ..Self::default() }
    }

    fn push(mut self, users: Vec<UserName>, change: StoredChange) -> Self {
        self.pushes.push(Push { users, change });
        self
    }
}

impl<'a> Scene<'a> {
    /// Judges an act that changes something.
    pub fn decide(&self, act: &Act) -> Result<Decision, ErrorCode> {
        if let Act::Create { title, join, users } = act {
            return self.create(title, *join, users);
        }
        let group = self.group.ok_or(ErrorCode::NoSuchGroup)?;
        if *act == Act::Depart {
            return Ok(self.depart(group));
        }
        if group.row.dissolved != Seq::ZERO {
            return Err(ErrorCode::GroupDissolved);
        }
        match act {
            Act::Rename { title } => {
                self.ranking(group, Role::Admin)?;
                let told = StoredChange { text: title.clone(), ..change(What::Renamed, Vec::new()) };
                let row = GroupRow { title: title.clone(), ..group.row.clone() };
                Ok(Decision { group: Some(row), ..Decision::told(told) })
            }
            Act::Policy { join } => {
                self.ranking(group, Role::Admin)?;
                let told = StoredChange { number: *join as u64, ..change(What::Policy, Vec::new()) };
                let row = GroupRow { join: *join, ..group.row.clone() };
                Ok(Decision { group: Some(row), ..Decision::told(told) })
            }
            Act::Join { greeting } => self.join(group, greeting),
            Act::Invite { users } => self.invite(group, users),
            Act::Answer { user, approve } if user == self.from => self.answer_own(group, *approve),
            Act::Answer { user, approve } => self.answer(group, user, *approve),
            Act::Leave => self.leave(group),
            Act::Kick { user } => self.kick(group, user),
            Act::Mute { user, for_ms } => {
                let target = self.below(group, user)?;
                let muted_until_ms = match for_ms.min(&limits::MUTE_MS_MAX) {
                    0 => 0,
                    ms => self.now_ms.saturating_add(*ms),
                };
                let told = StoredChange { number: muted_until_ms, ..change(What::Muted, vec![user.clone()]) };
                let members = vec![(user.clone(), Some(MemberRow { muted_until_ms, ..target.row() }))];
                Ok(Decision { members, ..Decision::told(told) })
            }
            Act::Role { user, role } => self.give_role(group, user, *role),
            Act::Transfer { user } => self.transfer(group, user),
            Act::Dissolve => {
                self.ranking(group, Role::Owner)?;
                let row = GroupRow { dissolved: self.seq, ..group.row.clone() };
                Ok(Decision { group: Some(row), ..Decision::told(change(What::Dissolved, Vec::new())) })
            }
            Act::Create { .. } | Act::Members { .. } | Act::Info | Act::Depart => Err(ErrorCode::Internal),
        }
    }

    /// The one who acts, if a member of at least this rank.
    fn ranking(&self, group: &'a Group, role: Role) -> Result<&'a Member, ErrorCode> {
        let actor = group.member(self.from).ok_or(ErrorCode::NotMember)?;
        if actor.role >= role { Ok(actor) } else { Err(ErrorCode::NotAllowed) }
    }

    /// A member who ranks below the one who acts.
    fn below(&self, group: &'a Group, user: &UserName) -> Result<&'a Member, ErrorCode> {
        let actor = self.ranking(group, Role::Admin)?;
        let target = group.member(user).ok_or(ErrorCode::NoSuchMember)?;
        if target.role < actor.role { Ok(target) } else { Err(ErrorCode::NotAllowed) }
    }

    fn fresh(&self, standing: Standing, role: Role) -> MemberRow {
        MemberRow { standing, role, since_ms: self.now_ms, muted_until_ms: 0, ranges: Vec::new() }
    }

    /// The row of somebody who becomes a member with this act. What they could read before, they still can.
    fn joining(&self, known: Option<&MemberRow>) -> MemberRow {
        let mut row = self.fresh(Standing::Member, Role::Member);
        if let Some(known) = known {
            row.ranges.clone_from(&known.ranges);
        }
        row.begin(self.seq);
        row
    }

    /// The row of somebody who ceases to be a member with this act, or never became one.
    fn leaving(&self, row: MemberRow, standing: Standing) -> MemberRow {
        let mut row = MemberRow { ranges: row.ranges, ..self.fresh(standing, Role::Member) };
        row.end(self.seq);
        row
    }

    fn create(&self, title: &str, join: JoinPolicy, users: &[UserName]) -> Result<Decision, ErrorCode> {
        if self.group.is_some() {
            return Err(ErrorCode::GroupExists);
        }
        let row = GroupRow {
            name: self.name.clone(),
            title: title.to_owned(),
            join,
            owner: self.from.clone(),
            created_ms: self.now_ms,
            dissolved: Seq::ZERO,
        };
        let owner = MemberRow { role: Role::Owner, ..self.joining(None) };
        let invited: Vec<_> = users.iter().filter(|user| *user != self.from).cloned().collect();
        let mut members = vec![(self.from.clone(), Some(owner))];
        members.extend(invited.iter().map(|user| {
            let row = self.fresh(Standing::Invited, Role::Member);
            (user.clone(), Some(row))
        }));
        let told = StoredChange { text: title.to_owned(), ..change(What::Created, Vec::new()) };
        let decision = Decision { group: Some(row), members, ..Decision::told(told) };
        Ok(if invited.is_empty() { decision } else { decision.push(invited, change(What::Invited, Vec::new())) })
    }

    fn join(&self, group: &Group, greeting: &str) -> Result<Decision, ErrorCode> {
        if group.member(self.from).is_some() {
            return Err(ErrorCode::AlreadyMember);
        }
        let known = group.guest(self.from).flatten();
        let standing = known.map(|row| row.standing);
        let invited = standing == Some(Standing::Invited);
        if standing == Some(Standing::Kicked) && !invited {
            return Err(ErrorCode::NotInvited);
        }
        match group.row.join {
            _ if self.admits_all => self.admit(group, vec![(self.from.clone(), known)]),
            JoinPolicy::Open => self.admit(group, vec![(self.from.clone(), known)]),
            JoinPolicy::Invite | JoinPolicy::Approval if invited => self.admit(group, vec![(self.from.clone(), known)]),
            JoinPolicy::Invite => Err(ErrorCode::NotInvited),
            JoinPolicy::Approval if standing == Some(Standing::Asked) => {
                Ok(Decision { standing: Some(Standing::Asked), ..Decision::default() })
            }
            JoinPolicy::Approval => {
                self.room_for_pending(group, 1)?;
                let ranges = known.map(|row| row.ranges.clone()).unwrap_or_default();
                let row = MemberRow { ranges, ..self.fresh(Standing::Asked, Role::Member) };
                let deciders = group.members().iter().filter(|member| member.role >= Role::Admin);
                let deciders = deciders.map(|member| member.name.clone()).collect();
                let asked = change(What::Asked, vec![self.from.clone()]);
                let asked = StoredChange { text: greeting.to_owned(), ..asked };
                let members = vec![(self.from.clone(), Some(row))];
                let standing = Some(Standing::Asked);
                Ok(Decision { members, standing, ..Decision::default() }.push(deciders, asked))
            }
        }
    }

    fn room_for_pending(&self, group: &Group, more: usize) -> Result<(), ErrorCode> {
        if group.pending().count() + more > limits::GROUP_PENDING_MAX {
            return Err(ErrorCode::TooManyPending);
        }
        Ok(())
    }

    /// Makes them members.
    fn admit(&self, group: &Group, who: Vec<(UserName, Option<&MemberRow>)>) -> Result<Decision, ErrorCode> {
        if group.members().len() + who.len() > limits::GROUP_MEMBERS_MAX {
            return Err(ErrorCode::GroupFull);
        }
        let users = who.iter().map(|(user, _)| user.clone()).collect();
        let members = who.into_iter().map(|(user, known)| (user, Some(self.joining(known)))).collect();
        Ok(Decision { members, ..Decision::told(change(What::Joined, users)) })
    }

    /// Those who have asked become members, the others are invited; who is one of both already stays so.
    fn invite(&self, group: &Group, users: &[UserName]) -> Result<Decision, ErrorCode> {
        self.ranking(group, Role::Admin)?;
        let (mut asked, mut invited) = (Vec::new(), Vec::new());
        let mut open = 0;
        for user in users.iter().filter(|user| group.member(user).is_none()) {
            let known = group.guest(user).flatten();
            match known.map(|row| row.standing) {
                Some(Standing::Asked) => asked.push((user.clone(), known)),
                Some(Standing::Invited) => open += 1,
                Some(Standing::Member | Standing::Left | Standing::Kicked) | None => {
                    let ranges = known.map(|row| row.ranges.clone()).unwrap_or_default();
                    let row = MemberRow { ranges, ..self.fresh(Standing::Invited, Role::Member) };
                    invited.push((user.clone(), Some(row)));
                }
            }
        }
        if asked.is_empty() && invited.is_empty() && open == 0 {
            return Err(ErrorCode::AlreadyMember);
        }
        self.room_for_pending(group, invited.len())?;
        let told: Vec<_> = invited.iter().map(|(user, _)| user.clone()).collect();
        let mut decision = if asked.is_empty() { Decision::default() } else { self.admit(group, asked)? };
        decision.standing = Some(Standing::Member);
        decision.members.extend(invited);
        Ok(if told.is_empty() { decision } else { decision.push(told, change(What::Invited, Vec::new())) })
    }

    /// Somebody answers an own invitation, or takes an own request back.
    fn answer_own(&self, group: &Group, approve: bool) -> Result<Decision, ErrorCode> {
        let known = group.guest(self.from).flatten().ok_or(ErrorCode::NoSuchMember)?;
        match known.standing {
            Standing::Invited if approve => self.admit(group, vec![(self.from.clone(), Some(known))]),
            Standing::Asked if approve => Err(ErrorCode::NotAllowed),
            Standing::Invited | Standing::Asked => {
                let (row, standing) = self.gone(known);
                let members = vec![(self.from.clone(), row)];
                Ok(Decision { members, standing, ..Decision::default() })
            }
            Standing::Member | Standing::Left | Standing::Kicked => Err(ErrorCode::NoSuchMember),
        }
    }

    /// What remains of an invitation or a request: nothing, or what was read in earlier times.
    fn gone(&self, known: &MemberRow) -> (Option<MemberRow>, Option<Standing>) {
        if known.ranges.is_empty() {
            return (None, None);
        }
        (Some(self.leaving(known.clone(), Standing::Left)), Some(Standing::Left))
    }

    /// Owner or administrators answer a request, or take an invitation back.
    fn answer(&self, group: &Group, user: &UserName, approve: bool) -> Result<Decision, ErrorCode> {
        self.ranking(group, Role::Admin)?;
        let known = group.guest(user).flatten().ok_or(ErrorCode::NoSuchMember)?;
        match known.standing {
            Standing::Asked if approve => self.admit(group, vec![(user.clone(), Some(known))]),
            Standing::Invited if approve => Err(ErrorCode::NotAllowed),
            Standing::Asked | Standing::Invited => {
                let members = vec![(user.clone(), self.gone(known).0)];
                let decision = Decision { members, standing: Some(Standing::Member), ..Decision::default() };
                Ok(decision.push(vec![user.clone()], change(What::Refused, Vec::new())))
            }
            Standing::Member | Standing::Left | Standing::Kicked => Err(ErrorCode::NoSuchMember),
        }
    }

    fn leave(&self, group: &Group) -> Result<Decision, ErrorCode> {
        let actor = self.ranking(group, Role::Member)?;
        if actor.role == Role::Owner {
            return Err(ErrorCode::OwnerStays);
        }
        let members = vec![(self.from.clone(), Some(self.leaving(actor.row(), Standing::Left)))];
        let told = change(What::Left, vec![self.from.clone()]);
        Ok(Decision { members, standing: Some(Standing::Left), ..Decision::told(told) })
    }

    /// A user who was deleted is nothing to the group any more. An owner first gives it to whoever has been an administrator
    /// for longest, or else a member, or else dissolves it; then it stays a member until it is asked again.
    fn depart(&self, group: &Group) -> Decision {
        let Some(actor) = group.member(self.from) else {
            let pending = |known: &&MemberRow| matches!(known.standing, Standing::Invited | Standing::Asked);
            let Some(known) = group.guest(self.from).flatten().filter(pending) else { return Decision::default() };
            let (row, standing) = self.gone(known);
            return Decision { members: vec![(self.from.clone(), row)], standing, ..Decision::default() };
        };
        let dissolved = group.row.dissolved != Seq::ZERO;
        if actor.role == Role::Owner && !dissolved {
            return self.hand_down(group, actor);
        }
        let members = vec![(self.from.clone(), Some(self.leaving(actor.row(), Standing::Left)))];
        let told = StoredChange { number: LEFT_BY_DELETION, ..change(What::Left, vec![self.from.clone()]) };
        // Nothing is said any more in a group that was dissolved.
        Decision { members, told: (!dissolved).then_some(told), standing: Some(Standing::Left), ..Decision::default() }
    }

    fn hand_down(&self, group: &Group, actor: &Member) -> Decision {
        let others = group.members().iter().filter(|member| member.name != *self.from);
        let heir = others.min_by_key(|member| (member.role != Role::Admin, member.since_ms, &member.name));
        let Some(heir) = heir else {
            let row = GroupRow { dissolved: self.seq, ..group.row.clone() };
            return Decision { group: Some(row), ..Decision::told(change(What::Dissolved, Vec::new())) };
        };
        let members = vec![
            (heir.name.clone(), Some(MemberRow { role: Role::Owner, muted_until_ms: 0, ..heir.row() })),
            (self.from.clone(), Some(MemberRow { role: Role::Member, ..actor.row() })),
        ];
        let row = GroupRow { owner: heir.name.clone(), ..group.row.clone() };
        let told = change(What::Transferred, vec![heir.name.clone()]);
        Decision { group: Some(row), members, ..Decision::told(told) }
    }

    fn kick(&self, group: &Group, user: &UserName) -> Result<Decision, ErrorCode> {
        let target = self.below(group, user)?;
        let members = vec![(user.clone(), Some(self.leaving(target.row(), Standing::Kicked)))];
        let told = change(What::Kicked, vec![user.clone()]);
        Ok(Decision { members, ..Decision::told(told.clone()) }.push(vec![user.clone()], told))
    }

    fn give_role(&self, group: &Group, user: &UserName, role: Role) -> Result<Decision, ErrorCode> {
        self.ranking(group, Role::Owner)?;
        let target = group.member(user).ok_or(ErrorCode::NoSuchMember)?;
        if role == Role::Owner || target.role == Role::Owner {
            return Err(ErrorCode::BadRequest);
        }
        if role == Role::Admin && target.role != Role::Admin && group.admins() >= limits::GROUP_ADMINS_MAX {
            return Err(ErrorCode::TooManyAdmins);
        }
        let told = StoredChange { number: role as u64, ..change(What::Role, vec![user.clone()]) };
        let members = vec![(user.clone(), Some(MemberRow { role, ..target.row() }))];
        Ok(Decision { members, ..Decision::told(told) })
    }

    fn transfer(&self, group: &Group, user: &UserName) -> Result<Decision, ErrorCode> {
        let actor = self.ranking(group, Role::Owner)?;
        let target = group.member(user).ok_or(ErrorCode::NoSuchMember)?;
        if user == self.from {
            return Err(ErrorCode::BadRequest);
        }
        if target.role != Role::Admin && group.admins() >= limits::GROUP_ADMINS_MAX {
            return Err(ErrorCode::TooManyAdmins);
        }
        let members = vec![
            (user.clone(), Some(MemberRow { role: Role::Owner, muted_until_ms: 0, ..target.row() })),
            (self.from.clone(), Some(MemberRow { role: Role::Admin, ..actor.row() })),
        ];
        let row = GroupRow { owner: user.clone(), ..group.row.clone() };
        let told = change(What::Transferred, vec![user.clone()]);
        Ok(Decision { group: Some(row), members, ..Decision::told(told) })
    }
}
