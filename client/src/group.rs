//! Groups for an application: what it asks of one, and what it is told.
//!
//! A group is named `#` and 1 to 63 bytes. Messages go to it and come from it as to a user: [`Client::send`] with its
//! name, [`Event::Message`](crate::Event::Message) with its name as `to`. What happens to a group comes as a message
//! too, with a [`Change`] in its `extra`; who is no member hears of it by
//! [`Event::GroupChanged`](crate::Event::GroupChanged).

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::message::group::{self, JoinPolicy, Role, Standing};
use ringline_schema::message::{GroupAct, GroupReply, Request};
use ringline_schema::record::{StoredChange, StoredExtra};

use crate::client::Client;
use crate::pending::{Answer, CallError, Query};

/// What happened to a group. Who did it is the sender of the message, or `by` of the event.
pub type Change = StoredChange;
/// What few messages carry: mentions, a change of their group, what became of them since.
pub type Extra = StoredExtra;

/// A change of a group is done, and on the server's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupDone {
    pub conversation: ConversationId,
    /// Its place in the conversation; 0: an invitation, a request, or their end.
    pub seq: Seq,
    /// What this user is to the group now; `None`: nothing.
    pub standing: Option<Standing>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupInfo {
    pub conversation: ConversationId,
    pub group: UserName,
    pub title: String,
    pub join: JoinPolicy,
    pub owner: UserName,
    pub members: u32,
    /// Unix milliseconds.
    pub created_ms: u64,
    pub dissolved: bool,
    /// What this user is to the group; `None`: nothing.
    pub standing: Option<Standing>,
    pub role: Role,
    /// Unix milliseconds; 0: not muted.
    pub muted_until_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    pub user: UserName,
    pub role: Role,
    pub standing: Standing,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
    /// Unix milliseconds; 0: not muted.
    pub muted_until_ms: u64,
}

/// Members in order of name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberPage {
    pub members: Vec<GroupMember>,
    /// Where the next page starts; `None`: this was the last.
    pub next: Option<String>,
}

/// A group changed for this user, who does not see its messages (invited, kicked, refused), or somebody asks to join a
/// group that this user decides about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupChanged {
    pub conversation: ConversationId,
    pub group: UserName,
    pub title: String,
    pub by: UserName,
    pub time_ms: u64,
    pub change: Change,
}

/// A command that waits for its answer.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Create { title: String, join: JoinPolicy, users: Vec<UserName> },
    Rename(String),
    Policy(JoinPolicy),
    Join(String),
    Invite(Vec<UserName>),
    Answer(UserName, bool),
    Leave,
    Kick(UserName),
    Mute(UserName, u64),
    Role(UserName, Role),
    Transfer(UserName),
    Dissolve,
    Members { cursor: String, limit: u16, standing: Standing },
    Info,
}

impl Act {
    pub(crate) fn as_wire<'a>(&'a self, group: &'a UserName) -> Request<'a> {
        let act = match self {
            Self::Create { title, join, users } => GroupAct::Create { title, join: *join, users: users[..].into() },
            Self::Rename(title) => GroupAct::Rename { title },
            Self::Policy(join) => GroupAct::Policy { join: *join },
            Self::Join(greeting) => GroupAct::Join { greeting },
            Self::Invite(users) => GroupAct::Invite { users: users[..].into() },
            Self::Answer(user, approve) => GroupAct::Answer { user: user.as_str(), approve: *approve },
            Self::Leave => GroupAct::Leave,
            Self::Kick(user) => GroupAct::Kick { user: user.as_str() },
            Self::Mute(user, for_ms) => GroupAct::Mute { user: user.as_str(), for_ms: *for_ms },
            Self::Role(user, role) => GroupAct::Role { user: user.as_str(), role: *role },
            Self::Transfer(user) => GroupAct::Transfer { user: user.as_str() },
            Self::Dissolve => GroupAct::Dissolve,
            Self::Members { cursor, limit, standing } => {
                GroupAct::Members { cursor, limit: *limit, standing: *standing }
            }
            Self::Info => GroupAct::Info,
        };
        Request::Group { group: group.as_str(), act }
    }
}

/// An answer, owned.
#[derive(Debug)]
pub(crate) enum GroupAnswer {
    Done(GroupDone),
    Info(GroupInfo),
    Members(MemberPage),
}

impl GroupAnswer {
    /// Errors: `BAD_BODY` for a name that is none, or for a push.
    pub(crate) fn from_wire(reply: &GroupReply<'_>) -> Result<Self, ErrorCode> {
        Ok(match reply {
            GroupReply::Ok { conversation, seq, standing } => {
                Self::Done(GroupDone { conversation: *conversation, seq: *seq, standing: *standing })
            }
            GroupReply::Info(info) => Self::Info(GroupInfo {
                conversation: info.conversation,
                group: name(info.group)?,
                title: info.title.to_owned(),
                join: info.join,
                owner: name(info.owner)?,
                members: info.members,
                created_ms: info.created_ms,
                dissolved: info.dissolved,
                standing: info.standing,
                role: info.role,
                muted_until_ms: info.muted_until_ms,
            }),
            GroupReply::Members { members, next } => {
                let members = members.iter().map(member).collect::<Result<_, _>>()?;
                Self::Members(MemberPage { members, next: (!next.is_empty()).then(|| (*next).to_owned()) })
            }
            GroupReply::Changed { .. } => return Err(ErrorCode::BadBody),
        })
    }
}

fn member(member: &group::Member<'_>) -> Result<GroupMember, ErrorCode> {
    let group::Member { user, role, standing, joined_ms: since_ms, muted_until_ms } = *member;
    Ok(GroupMember { user: name(user)?, role, standing, since_ms, muted_until_ms })
}

fn name(text: &str) -> Result<UserName, ErrorCode> {
    UserName::new(text).map_err(|_| ErrorCode::BadBody)
}

impl GroupChanged {
    /// `None` for another reply, or a name that is none.
    pub(crate) fn from_wire(reply: &GroupReply<'_>) -> Option<Self> {
        let GroupReply::Changed { conversation, group, title, by, time_ms, change } = reply else { return None };
        Some(Self {
            conversation: *conversation,
            group: name(group).ok()?,
            title: (*title).to_owned(),
            by: name(by).ok()?,
            time_ms: *time_ms,
            change: StoredChange::from_wire(change).ok()?,
        })
    }
}

/// Commands of groups. Each is answered when it is on the server's disk. One whose answer was lost with the connection
/// is asked again, and may then be refused because it is done already (`GROUP_EXISTS`, `ALREADY_MEMBER`, …).
impl Client {
    /// Makes a group with this user as its owner, and invites others (at most 100).
    pub async fn create_group(
        &self,
        group: &str,
        (title, join): (&str, JoinPolicy),
        users: &[&str],
    ) -> Result<GroupDone, CallError> {
        let users = user_names(users)?;
        self.change_group(group, Act::Create { title: title.to_owned(), join, users }).await
    }

    /// Gives a group another title. Owner and administrators.
    pub async fn rename_group(&self, group: &str, title: &str) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Rename(title.to_owned())).await
    }

    /// Changes how others become members. Owner and administrators.
    pub async fn set_join_policy(&self, group: &str, join: JoinPolicy) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Policy(join)).await
    }

    /// Joins, or asks to: then `standing` of the answer is `Asked`, and `greeting` is told to those who decide.
    pub async fn join_group(&self, group: &str, greeting: &str) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Join(greeting.to_owned())).await
    }

    /// Invites users (at most 100). Who has asked to join becomes a member. Owner and administrators.
    pub async fn invite(&self, group: &str, users: &[&str]) -> Result<GroupDone, CallError> {
        let users = user_names(users)?;
        self.change_group(group, Act::Invite(users)).await
    }

    /// Answers somebody's request, takes an invitation back, declines an own one, or takes an own request back.
    pub async fn answer_request(&self, group: &str, user: &str, approve: bool) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Answer(user_name(user)?, approve)).await
    }

    pub async fn leave_group(&self, group: &str) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Leave).await
    }

    /// Takes a member out, who needs an invitation to come back. Whoever ranks higher.
    pub async fn kick(&self, group: &str, user: &str) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Kick(user_name(user)?)).await
    }

    /// Forbids a member to write for so many milliseconds; 0 allows it again. Whoever ranks higher.
    pub async fn mute_member(&self, group: &str, user: &str, for_ms: u64) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Mute(user_name(user)?, for_ms)).await
    }

    /// Makes a member an administrator, or a plain member again. The owner.
    pub async fn set_role(&self, group: &str, user: &str, role: Role) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Role(user_name(user)?, role)).await
    }

    /// Gives the group to another member. The owner.
    pub async fn transfer_group(&self, group: &str, user: &str) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Transfer(user_name(user)?)).await
    }

    /// Ends a group for all; its messages can still be read. The owner.
    pub async fn dissolve_group(&self, group: &str) -> Result<GroupDone, CallError> {
        self.change_group(group, Act::Dissolve).await
    }

    /// A page of members: from the first with `None`, then from the `next` of the page before. `standing`: members, or
    /// who is invited or has asked (owner and administrators).
    pub async fn group_members(
        &self,
        group: &str,
        standing: Standing,
        from: Option<&str>,
    ) -> Result<MemberPage, CallError> {
        let cursor = from.unwrap_or_default().to_owned();
        match self.ask_group(group, Act::Members { cursor, limit: 0, standing }).await? {
            GroupAnswer::Members(page) => Ok(page),
            GroupAnswer::Done(_) | GroupAnswer::Info(_) => Err(CallError::Closed),
        }
    }

    pub async fn group_info(&self, group: &str) -> Result<GroupInfo, CallError> {
        match self.ask_group(group, Act::Info).await? {
            GroupAnswer::Info(info) => Ok(info),
            GroupAnswer::Done(_) | GroupAnswer::Members(_) => Err(CallError::Closed),
        }
    }

    async fn change_group(&self, group: &str, act: Act) -> Result<GroupDone, CallError> {
        match self.ask_group(group, act).await? {
            GroupAnswer::Done(done) => Ok(done),
            GroupAnswer::Info(_) | GroupAnswer::Members(_) => Err(CallError::Closed),
        }
    }

    async fn ask_group(&self, group: &str, act: Act) -> Result<GroupAnswer, CallError> {
        let group = UserName::of_group(group).map_err(|code| CallError::Refused { code, detail: String::new() })?;
        match self.call(Query::Group { group, act }).await? {
            Answer::Group(answer) => Ok(answer),
            Answer::History(_)
            | Answer::Online(_)
            | Answer::Conversations(_)
            | Answer::Social(_)
            | Answer::Account(_) => Err(CallError::Closed),
        }
    }
}

fn user_name(user: &str) -> Result<UserName, CallError> {
    UserName::of_user(user).map_err(|_| CallError::BadName)
}

fn user_names(users: &[&str]) -> Result<Vec<UserName>, CallError> {
    users.iter().map(|user| user_name(user)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::message::group::What;
    use ringline_schema::message::{GroupChange, Names};

    fn user(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    #[test]
    fn commands_say_on_the_wire_what_the_application_said() {
        let (team, users) = (user("#team"), vec![user("bob"), user("cid")]);
        let (invite, mute) = (Act::Invite(users), Act::Mute(user("bob"), 9));
        let wire = invite.as_wire(&team);
        let users = Names::from(&["bob", "cid"][..]);
        assert_eq!(wire, Request::Group { group: "#team", act: GroupAct::Invite { users } });
        let wire = mute.as_wire(&team);
        assert_eq!(wire, Request::Group { group: "#team", act: GroupAct::Mute { user: "bob", for_ms: 9 } });
    }

    #[test]
    fn answers_are_checked_and_pushes_are_none() {
        let (role, standing) = (Role::Admin, Standing::Member);
        let row = |user| group::Member { user, role, standing, joined_ms: 1, muted_until_ms: 0 };
        let page = GroupReply::Members { members: vec![row("ann"), row("bob")], next: "bob" };
        let Ok(GroupAnswer::Members(page)) = GroupAnswer::from_wire(&page) else { panic!() };
        assert_eq!((page.members[1].user.as_str(), page.next.as_deref()), ("bob", Some("bob")));
        let bad = GroupReply::Members { members: vec![row("")], next: "" };
        assert!(matches!(GroupAnswer::from_wire(&bad), Err(ErrorCode::BadBody)));
        let change = GroupChange { what: What::Asked, users: Names::from(&["bob"][..]), text: "hi", number: 0 };
        let (conversation, group, title) = (ConversationId(1), "#team", "t");
        let push = GroupReply::Changed { conversation, group, title, by: "bob", time_ms: 3, change };
        assert!(matches!(GroupAnswer::from_wire(&push), Err(ErrorCode::BadBody)));
        let changed = GroupChanged::from_wire(&push).unwrap();
        assert_eq!((changed.by.as_str(), changed.change.as_wire()), ("bob", change));
    }
}
