//! Commands of groups at the shard of the session: what can be judged without the group, and the way to its owner.
//!
//! A command that names other users visits their shards one after the other before it reaches the owner of the group,
//! and nobody keeps count of it on the way: if a message is lost with a shard, the client asks again.

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::limits;
use ringline_schema::message::group::{JoinPolicy, Role};
use ringline_schema::message::{BodyKind, GroupAct, Names, Reply, Standing};
use ringline_schema::record::{Answer, Query};

use crate::deletion::walk::DELETER;
use crate::event::{ConnId, Effects, ShardMessage};
use crate::group::fan_out::GroupAnswer;
use crate::group::state::Group;
use crate::peer::{Origin, Submit, SubmitMore};
use crate::shard::{Question, Shard};
use crate::social::settings::Parked;

/// A command, checked as far as it can be without the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    Create {
        title: String,
        join: JoinPolicy,
        users: Vec<UserName>,
    },
    Rename {
        title: String,
    },
    Policy {
        join: JoinPolicy,
    },
    Join {
        greeting: String,
    },
    Invite {
        users: Vec<UserName>,
    },
    Answer {
        user: UserName,
        approve: bool,
    },
    Leave,
    Kick {
        user: UserName,
    },
    Mute {
        user: UserName,
        for_ms: u64,
    },
    Role {
        user: UserName,
        role: Role,
    },
    Transfer {
        user: UserName,
    },
    Dissolve,
    Members {
        cursor: String,
        limit: u16,
        standing: Standing,
    },
    Info,
    /// No command: the user was deleted, and is to be nothing to the group any more.
    Depart,
}

impl Act {
    fn new(act: &GroupAct<'_>) -> Result<Self, ErrorCode> {
        Ok(match *act {
            GroupAct::Create { title, join, users } => {
                Self::Create { title: title_of(title)?, join, users: names(users)? }
            }
            GroupAct::Rename { title } => Self::Rename { title: title_of(title)? },
            GroupAct::Policy { join } => Self::Policy { join },
            GroupAct::Join { greeting } => {
                if greeting.len() > limits::GREETING_BYTES_MAX {
                    return Err(ErrorCode::TextTooLong);
                }
                Self::Join { greeting: greeting.to_owned() }
            }
            GroupAct::Invite { users } => {
                let users = names(users)?;
                if users.is_empty() {
                    return Err(ErrorCode::BadRequest);
                }
                Self::Invite { users }
            }
            GroupAct::Answer { user, approve } => Self::Answer { user: UserName::of_user(user)?, approve },
            GroupAct::Leave => Self::Leave,
            GroupAct::Kick { user } => Self::Kick { user: UserName::of_user(user)? },
            GroupAct::Mute { user, for_ms } => Self::Mute { user: UserName::of_user(user)?, for_ms },
            GroupAct::Role { user, role } => Self::Role { user: UserName::of_user(user)?, role },
            GroupAct::Transfer { user } => Self::Transfer { user: UserName::of_user(user)? },
            GroupAct::Dissolve => Self::Dissolve,
            GroupAct::Members { cursor, limit, standing } => {
                if cursor.len() > limits::USER_NAME_BYTES_MAX {
                    return Err(ErrorCode::BadRequest);
                }
                Self::Members { cursor: cursor.to_owned(), limit, standing }
            }
            GroupAct::Info => Self::Info,
        })
    }

    /// Whether only some members may do that, by their rank; for a planted bug.
    pub(crate) fn needs_rank(&self) -> bool {
        match self {
            Self::Rename { .. } | Self::Policy { .. } | Self::Kick { .. } | Self::Mute { .. } => true,
            Self::Role { .. } | Self::Transfer { .. } | Self::Dissolve => true,
            Self::Create { .. } | Self::Join { .. } | Self::Invite { .. } | Self::Answer { .. } | Self::Leave => false,
            Self::Members { .. } | Self::Info | Self::Depart => false,
        }
    }

    /// Users who have to exist.
    fn named(&self) -> &[UserName] {
        match self {
            Self::Create { users, .. } | Self::Invite { users } => users,
            Self::Rename { .. }
            | Self::Policy { .. }
            | Self::Join { .. }
            | Self::Answer { .. }
            | Self::Leave
            | Self::Kick { .. }
            | Self::Mute { .. }
            | Self::Role { .. }
            | Self::Transfer { .. }
            | Self::Dissolve
            | Self::Members { .. }
            | Self::Info
            | Self::Depart => &[],
        }
    }

    /// Whether it makes the one who sends it a member.
    fn adds_sender(&self) -> bool {
        matches!(self, Self::Create { .. } | Self::Join { .. })
    }

    /// The first user whose row has to be looked up before this can be judged.
    pub(crate) fn needs(&self, group: &Group, from: &UserName) -> Option<UserName> {
        let unknown = |user: &&UserName| group.member(user).is_none() && group.guest(user).is_none();
        match self {
            Self::Join { .. } | Self::Info | Self::Depart => Some(from).filter(unknown).cloned(),
            Self::Answer { user, .. } => Some(user).filter(unknown).cloned(),
            Self::Invite { users } => users.iter().find(unknown).cloned(),
            Self::Create { .. }
            | Self::Rename { .. }
            | Self::Policy { .. }
            | Self::Leave
            | Self::Kick { .. }
            | Self::Mute { .. }
            | Self::Role { .. }
            | Self::Transfer { .. }
            | Self::Dissolve
            | Self::Members { .. } => None,
        }
    }
}

fn title_of(title: &str) -> Result<String, ErrorCode> {
    let length_ok = !title.is_empty() && title.len() <= limits::GROUP_TITLE_BYTES_MAX;
    if !length_ok || title.chars().any(char::is_control) || title.trim() != title {
        return Err(ErrorCode::BadTitle);
    }
    Ok(title.to_owned())
}

/// Sorted, each once.
fn names(names: Names<'_>) -> Result<Vec<UserName>, ErrorCode> {
    if names.len() > limits::USERS_PER_REQUEST_MAX {
        return Err(ErrorCode::TooManyUsers);
    }
    let mut users = names.iter().map(UserName::of_user).collect::<Result<Vec<_>, _>>()?;
    users.sort_unstable();
    users.dedup();
    Ok(users)
}

impl Shard {
    pub(crate) fn group_request(
        &mut self,
        conn: ConnId,
        request_id: u32,
        (group, act): (&str, &GroupAct<'_>),
        fx: &mut Effects,
    ) {
        let origin = Origin { shard: self.config.shard, conn, request_id };
        if let Err(code) = self.try_group_request(origin, (group, act), fx) {
            self.sessions.fail(conn, request_id, code, fx);
        }
    }

    fn try_group_request(
        &mut self,
        origin: Origin,
        (group, act): (&str, &GroupAct<'_>),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        if self.draining {
            return Err(ErrorCode::ShuttingDown);
        }
        let group = UserName::of_group(group)?;
        let act = Act::new(act)?;
        if !self.may_load() || !self.sessions.room_for_page(origin.conn) {
            return Err(ErrorCode::Busy);
        }
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        if login.sends_in_flight >= limits::SENDS_IN_FLIGHT_MAX {
            return Err(ErrorCode::Busy);
        }
        login.sends_in_flight += 1;
        let adds_sender = act.adds_sender();
        let unvisited: Vec<_> = act.named().iter().filter(|user| **user != login.user).cloned().collect();
        let conversation = ConversationId::group(&group);
        let message = login.message((group, conversation), BodyKind::System, Bytes::new());
        let submit = Submit {
            origin,
            device_key: login.key(),
            message: message.into(),
            ack_timeout_ms: None,
            more: Some(Box::new(SubmitMore { act: Some(act), unvisited, ..SubmitMore::default() })),
        };
        self.await_act(&submit);
        if adds_sender {
            let user = submit.message.from.clone();
            self.load_group_count(Question::GroupCount(Box::new(submit)), user, fx);
        } else {
            self.visit(submit, fx);
        }
        Ok(())
    }

    /// How many groups the sender of a GROUP_CREATE or GROUP_JOIN is in.
    pub(crate) fn groups_counted(&mut self, submit: Submit, answer: &Answer, fx: &mut Effects) {
        match answer {
            Answer::Count(count) if (*count as usize) < limits::GROUPS_PER_USER_MAX => self.visit(submit, fx),
            Answer::Count(_) => self.refuse(submit.origin, ErrorCode::TooManyGroups, fx),
            Answer::User(_)
            | Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Failed => self.refuse(submit.origin, self.unread(), fx),
        }
    }

    /// Goes on to the shard of the next user that was named, or to the owner of the group.
    pub(crate) fn visit(&mut self, mut submit: Submit, fx: &mut Effects) {
        if self.act_has_ended(&submit) {
            return;
        }
        while let Some(user) = submit.more.as_ref().and_then(|more| more.unvisited.last()) {
            let shard = self.owner(user.partition());
            if !self.is_here(shard) {
                if self.is_blocked(shard) {
                    return self.refuse(submit.origin, ErrorCode::Busy, fx);
                }
                return self.tell_shard(shard, ShardMessage::Visit(Box::new(submit)), fx);
            }
            let known = self.users.get(user).is_some() || self.online.contains_key(user);
            if known && !self.has_settings(user) {
                let user = user.clone();
                return self.with_settings(&user, Parked::Visit(Box::new(submit)), fx);
            }
            if known && self.is_deleted(user) {
                return self.refuse(submit.origin, ErrorCode::UserDeleted, fx);
            }
            if !known {
                if !self.may_load() {
                    return self.refuse(submit.origin, ErrorCode::Busy, fx);
                }
                let query = Query::User { name: user.clone() };
                return self.load(Question::Visited(Box::new(submit)), query, fx);
            }
            if let Some(more) = &mut submit.more {
                more.unvisited.pop();
            }
        }
        let owner = self.owner(submit.message.conversation.partition());
        if self.is_here(owner) {
            self.submit(submit, fx);
        } else if self.is_blocked(owner) {
            self.refuse(submit.origin, ErrorCode::Busy, fx);
        } else {
            self.tell_shard(owner, ShardMessage::Submit(Box::new(submit)), fx);
        }
    }

    /// Whether the user that an act named exists.
    pub(crate) fn visited(&mut self, submit: Submit, answer: Answer, fx: &mut Effects) {
        match answer {
            Answer::User(Some(user)) => {
                self.remember_user(user);
                self.visit(submit, fx);
            }
            Answer::User(None) => self.refuse(submit.origin, ErrorCode::NoSuchUser, fx),
            Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Count(_)
            | Answer::Failed => self.refuse(submit.origin, self.unread(), fx),
        }
    }

    /// An act has ended well, at its origin.
    pub(crate) fn group_answered(&mut self, origin: Origin, answer: &GroupAnswer, fx: &mut Effects) {
        if origin.conn == DELETER {
            let standing = if let GroupAnswer::Ok { standing, .. } = answer { *standing } else { None };
            return self.deletion_answered(origin.request_id, Ok(standing), fx);
        }
        // In a cluster each act has a time, and who waited longer, also for the store of this node, was told UNKNOWN.
        if self.is_clustered() && !self.is_awaited(origin) {
            return;
        }
        if let Some(login) = self.sessions.login_mut(origin.conn) {
            login.sends_in_flight = login.sends_in_flight.saturating_sub(1);
        }
        self.hurry_who_left(origin.conn, answer, fx);
        self.sessions.answer(origin.conn, origin.request_id, &Reply::Group(answer.as_wire()), fx);
    }
}
