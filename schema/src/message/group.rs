//! Groups on the wire: what is asked of one, what is answered, what its members are told.
//!
//! A group is named by its creator, once and for ever: `#` and 1 to 63 bytes. Its conversation, and so its partition,
//! follow from that name. The title is what people see, and may change.

use super::names::Names;
use super::numbered;
use crate::commands::Command;
use crate::ids::{ConversationId, Seq};

numbered! {
    /// How somebody becomes a member.
    #[derive(Default)]
    JoinPolicy {
        /// Only who was invited may join.
        #[default]
        Invite = 0,
        /// Who was not invited asks, and the owner or an administrator answers.
        Approval = 1,
        /// Everyone may join, but who was kicked needs an invitation.
        Open = 2,
    }
}

numbered! {
    /// What a member may do; each may do what the ones before may.
    #[derive(Default, PartialOrd, Ord)]
    Role {
        #[default]
        Member = 1,
        /// Invites, answers requests, kicks and mutes members, renames, mentions all.
        Admin = 2,
        /// One a group. Gives roles, transfers, dissolves.
        Owner = 3,
    }
}

numbered! {
    /// What a user is to a group.
    Standing {
        Member = 1,
        Invited = 2,
        /// Has asked to join.
        Asked = 3,
        Left = 4,
        /// Has to be invited to come back.
        Kicked = 5,
    }
}

numbered! {
    /// What happened to a group.
    What {
        Created = 1,
        /// `text` is the new title.
        Renamed = 2,
        /// `number` is the new [`JoinPolicy`].
        Policy = 3,
        Joined = 4,
        /// `number` 1: because the user was deleted.
        Left = 5,
        Kicked = 6,
        /// `number`: until when, Unix milliseconds; 0: the mute is lifted.
        Muted = 7,
        /// `number` is the new [`Role`].
        Role = 8,
        /// The user is the owner now.
        Transferred = 9,
        Dissolved = 10,
        /// Only as a push, to who is invited.
        Invited = 11,
        /// Only as a push, to owner and administrators; `text` is what the user says.
        Asked = 12,
        /// Only as a push: the request was refused, or the invitation declined or taken back.
        Refused = 13,
    }
}

/// A command of a group. Beside each: the fields of table `GroupAct` that carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupAct<'a> {
    /// In table `GroupCreate`. `users` are invited.
    Create {
        title: &'a str,
        join: JoinPolicy,
        users: Names<'a>,
    },
    /// `text`. Owner and administrators.
    Rename {
        title: &'a str,
    },
    /// `number`. Owner and administrators.
    Policy {
        join: JoinPolicy,
    },
    /// `text`: what is said to those who decide, if they have to.
    Join {
        greeting: &'a str,
    },
    /// `users`. Owner and administrators. Who has asked to join becomes a member.
    Invite {
        users: Names<'a>,
    },
    /// `user`, `number` 1 or 0. Owner and administrators answer a request or take an invitation back (0); a user
    /// declines an own invitation or takes an own request back (0).
    Answer {
        user: &'a str,
        approve: bool,
    },
    Leave,
    /// `user`. Whoever ranks higher.
    Kick {
        user: &'a str,
    },
    /// `user`, `number`: for how many milliseconds; 0 lifts it. Whoever ranks higher.
    Mute {
        user: &'a str,
        for_ms: u64,
    },
    /// `user`, `number`: administrator or member. The owner.
    Role {
        user: &'a str,
        role: Role,
    },
    /// `user`: the new owner; the old one becomes an administrator. The owner.
    Transfer {
        user: &'a str,
    },
    /// The owner. The name stays taken; who was a member can still read.
    Dissolve,
    /// `user`: names above this; `limit`; `number`: a [`Standing`], 0 for members. Members only; those who are invited
    /// or have asked are shown to owner and administrators.
    Members {
        cursor: &'a str,
        limit: u16,
        standing: Standing,
    },
    /// Members, and who is invited; of an open group or one with requests everyone.
    Info,
}

impl GroupAct<'_> {
    pub fn command(&self) -> Command {
        match self {
            Self::Create { .. } => Command::GroupCreate,
            Self::Rename { .. } => Command::GroupRename,
            Self::Policy { .. } => Command::GroupPolicy,
            Self::Join { .. } => Command::GroupJoin,
            Self::Invite { .. } => Command::GroupInvite,
            Self::Answer { .. } => Command::GroupAnswer,
            Self::Leave => Command::GroupLeave,
            Self::Kick { .. } => Command::GroupKick,
            Self::Mute { .. } => Command::GroupMute,
            Self::Role { .. } => Command::GroupRole,
            Self::Transfer { .. } => Command::GroupTransfer,
            Self::Dissolve => Command::GroupDissolve,
            Self::Members { .. } => Command::GroupMembers,
            Self::Info => Command::GroupInfo,
        }
    }
}

/// What happened, as it is told. Who did it stands beside it: `from` of a message, `by` of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupChange<'a> {
    pub what: What,
    /// The members it happened to.
    pub users: Names<'a>,
    pub text: &'a str,
    pub number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupInfo<'a> {
    pub conversation: ConversationId,
    pub group: &'a str,
    pub title: &'a str,
    pub join: JoinPolicy,
    pub owner: &'a str,
    pub members: u32,
    pub created_ms: u64,
    pub dissolved: bool,
    /// What the asking user is to it; `None`: nothing.
    pub standing: Option<Standing>,
    pub role: Role,
    pub muted_until_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member<'a> {
    pub user: &'a str,
    pub role: Role,
    pub standing: Standing,
    pub joined_ms: u64,
    pub muted_until_ms: u64,
}

/// Answers and pushes of groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupReply<'a> {
    /// The change is on disk. `seq`: its place in the conversation; 0: an invitation, a request or their end.
    Ok {
        conversation: ConversationId,
        seq: Seq,
        standing: Option<Standing>,
    },
    Info(GroupInfo<'a>),
    /// In order of name. An empty `next` ends the list.
    Members {
        members: Vec<Member<'a>>,
        next: &'a str,
    },
    /// For who does not see the group's messages, or has to answer a request.
    Changed {
        conversation: ConversationId,
        group: &'a str,
        title: &'a str,
        by: &'a str,
        time_ms: u64,
        change: GroupChange<'a>,
    },
}

impl GroupReply<'_> {
    pub fn command(&self) -> Command {
        match self {
            Self::Ok { .. } => Command::GroupOk,
            Self::Info(_) => Command::GroupInfoOk,
            Self::Members { .. } => Command::MembersOk,
            Self::Changed { .. } => Command::GroupChanged,
        }
    }
}
