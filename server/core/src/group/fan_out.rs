//! From the log to the members: one message a shard, encoded once there, whatever the number of members.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::message::group::{GroupInfo, Member, Role};
use ringline_schema::message::{GroupReply, Reply, Standing};
use ringline_schema::record::{StoredChange, StoredMessage};
use ringline_schema::rows::{GroupRow, MemberRow};

use crate::event::{ConnId, Effects, ShardMessage};
use crate::group::list::MemberList;
use crate::group::passing::Relay;
use crate::group::scan::Cargo;
use crate::group::state::Targets;
use crate::peer::Origin;
use crate::planted::Bug;
use crate::session::Shared;
use crate::shard::Shard;

/// How an act ended well; travels to the shard of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupAnswer {
    Ok { conversation: ConversationId, seq: Seq, standing: Option<Standing> },
    Info(Box<InfoAnswer>),
    Members { members: Vec<MemberAnswer>, next: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoAnswer {
    pub conversation: ConversationId,
    pub row: GroupRow,
    pub members: u32,
    /// What the asking user is to the group.
    pub known: Option<MemberRow>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberAnswer {
    pub user: UserName,
    pub row: MemberRow,
}

impl GroupAnswer {
    /// The wire form.
    pub(crate) fn as_wire(&self) -> GroupReply<'_> {
        match self {
            Self::Ok { conversation, seq, standing } => {
                GroupReply::Ok { conversation: *conversation, seq: *seq, standing: *standing }
            }
            Self::Info(info) => {
                let InfoAnswer { conversation, row, members, known } = &**info;
                GroupReply::Info(GroupInfo {
                    conversation: *conversation,
                    group: row.name.as_str(),
                    title: &row.title,
                    join: row.join,
                    owner: row.owner.as_str(),
                    members: *members,
                    created_ms: row.created_ms,
                    dissolved: row.dissolved != Seq::ZERO,
                    standing: known.as_ref().map(|row| row.standing),
                    role: known.as_ref().map_or(Role::Member, |row| row.role),
                    muted_until_ms: known.as_ref().map_or(0, |row| row.muted_until_ms),
                })
            }
            Self::Members { members, next } => {
                let members = members.iter().map(|member| Member {
                    user: member.user.as_str(),
                    role: member.row.role,
                    standing: member.row.standing,
                    joined_ms: member.row.since_ms,
                    muted_until_ms: member.row.muted_until_ms,
                });
                GroupReply::Members { members: members.collect(), next }
            }
        }
    }
}

/// What users who do not see the messages of a group are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPush {
    pub conversation: ConversationId,
    pub group: UserName,
    pub title: String,
    pub by: UserName,
    pub time_ms: u64,
    pub change: StoredChange,
}

impl Shard {
    /// Tells the session whose act it was.
    pub(crate) fn answer_group(&mut self, origin: Origin, answer: GroupAnswer, fx: &mut Effects) {
        if self.is_here(origin.shard) {
            self.group_answered(origin, &answer, fx);
        } else {
            self.tell_shard(origin.shard, ShardMessage::GroupAnswered { origin, answer }, fx);
        }
    }

    /// Gives a message on disk to the shards of its members. The device that sent it knows it by its acknowledgement.
    pub(crate) fn fan_out(
        &mut self,
        message: &Arc<StoredMessage>,
        targets: &Targets,
        (origin, relay): (Origin, Option<Relay>),
        fx: &mut Effects,
    ) {
        for (shard, members) in &**targets {
            let is_sender = *shard == origin.shard && message.client_seq != 0;
            let skip = is_sender.then_some(origin.conn);
            self.sessions.counters.fan_outs += 1;
            if self.is_here(*shard) {
                self.deliver_to_members(message, members, (skip, relay), fx);
            } else if !self.planted.is(Bug::LostGroupPush) {
                let (message, members) = (Arc::clone(message), members.clone());
                self.tell_shard(*shard, ShardMessage::DeliverGroup { message, members, skip, relay }, fx);
            }
        }
    }

    /// Gives a message of a group to every device of the members that are online here, but `skip`.
    pub(crate) fn deliver_to_members(
        &mut self,
        message: &Arc<StoredMessage>,
        members: &MemberList,
        (skip, relay): (Option<ConnId>, Option<Relay>),
        fx: &mut Effects,
    ) {
        if self.goes_in_slices(message.conversation, members) {
            self.await_relay(message, members, relay);
            let cargo = Cargo::Stored { message: Arc::clone(message), skip };
            return self.send_round(message.conversation, members, cargo, fx);
        }
        let mut conns = self.online_members(members, None);
        if self.planted.is(Bug::EveryoneIsMember) {
            conns = self.online.iter().flat_map(|(_, devices)| devices.iter().copied()).collect();
            conns.sort_unstable();
        }
        conns.retain(|conn| Some(*conn) != skip);
        self.await_relay(message, members, relay.filter(|_| !conns.is_empty()));
        let mut shared = Shared::default();
        for conn in conns {
            self.sessions.deliver_shared(conn, message, &mut shared, fx);
        }
        self.sessions.done_with(shared);
    }

    /// The sender wants to hear of the first device that has it.
    fn await_relay(&mut self, message: &StoredMessage, members: &MemberList, relay: Option<Relay>) {
        let Some(relay) = relay else { return };
        let (conversation, seq, none) = (message.conversation, message.seq, ConnId { slot: u32::MAX, generation: 0 });
        // The owner knows the origin; here only who does not count does.
        let origin = Origin { shard: relay.owner, conn: none, request_id: 0 };
        let place = (conversation, seq, message.client_seq);
        let number = self.await_member(relay, (origin, &message.from, members), place);
        if number != 0 {
            self.delivery_index.insert((conversation, None, seq), number);
        }
    }

    /// The devices of these members that are online here, in an order that replays agree on; without those of `but`.
    pub(crate) fn online_members(&self, members: &MemberList, but: Option<&UserName>) -> Vec<ConnId> {
        // Whichever is shorter is walked, the other looked into.
        let mut conns: Vec<ConnId> = Vec::new();
        if self.online.len() < members.len() {
            let here = self.online.iter().filter(|(user, _)| members.contains(user));
            conns.extend(here.flat_map(|(_, devices)| devices.iter().copied()));
            // The table has no order of its own; replays must agree.
            conns.sort_unstable();
        } else {
            let here = members.iter().filter_map(|user| self.online.get(user));
            conns.extend(here.flat_map(|devices| devices.iter().copied()));
        }
        if let Some(own) = but.and_then(|but| self.online.get(but)) {
            conns.retain(|conn| !own.contains(conn));
        }
        conns
    }

    /// Tells users of a change of a group whose messages they do not see.
    pub(crate) fn push_to_users(&mut self, users: Vec<UserName>, push: &Arc<GroupPush>, fx: &mut Effects) {
        let mut lists: BTreeMap<ShardIndex, Vec<UserName>> = BTreeMap::new();
        for user in users {
            lists.entry(self.owner(user.partition())).or_default().push(user);
        }
        for (shard, users) in lists {
            if self.is_here(shard) {
                self.group_pushed(&users, push, fx);
            } else {
                self.tell_shard(shard, ShardMessage::PushGroup { users, push: Arc::clone(push) }, fx);
            }
        }
    }

    /// Users of this shard are told; who is not online finds it in the list of conversations.
    pub(crate) fn group_pushed(&mut self, users: &[UserName], push: &GroupPush, fx: &mut Effects) {
        let change = push.change.as_wire();
        let reply = Reply::Group(GroupReply::Changed {
            conversation: push.conversation,
            group: push.group.as_str(),
            title: &push.title,
            by: push.by.as_str(),
            time_ms: push.time_ms,
            change,
        });
        for user in users {
            // Who is out now may see what was numbered before, and first.
            self.hurry(push.conversation, user, fx);
            let Some(devices) = self.online.get(user) else { continue };
            for &conn in devices {
                self.sessions.push(conn, &reply, fx);
            }
        }
    }
}
