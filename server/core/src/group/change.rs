//! At the owner of a group: messages and acts are judged when they are numbered, then go to the log.

use std::sync::Arc;

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::group::{JoinPolicy, Role};
use ringline_schema::message::{BodyKind, SendAck, Standing};
use ringline_schema::record::{Change, Record, StoredExtra, StoredMessage};
use ringline_schema::rows::{Row, RowKey, RowValue};

use crate::amend::record_of;
use crate::conversation::{Pending, PendingWork};
use crate::event::Effects;
use crate::group::act::Act;
use crate::group::decide::{Decision, Push, Scene};
use crate::group::fan_out::{GroupAnswer, GroupPush, InfoAnswer, MemberAnswer};
use crate::group::state::{Group, Targets};
use crate::peer::{Origin, Submit, Wanted};
use crate::planted::Bug;
use crate::shard::Shard;

/// What follows when a change of a group, or a message to it, is on disk.
#[derive(Debug)]
pub(crate) struct GroupPending {
    pub conversation: ConversationId,
    /// The row of the log, and who gets it: the members at the moment it was numbered.
    pub message: Option<(Arc<StoredMessage>, Targets)>,
    pub origin: Origin,
    /// Of an act; a message is acknowledged by its own number.
    pub answer: Option<GroupAnswer>,
    pub pushes: Vec<(Vec<UserName>, Arc<GroupPush>)>,
    /// Of a message whose sender wants to hear of its delivery.
    pub ack_timeout_ms: Option<u32>,
}

impl Shard {
    /// Whether the sender may write now. `Ok` only while the group is in memory; the caller has made sure of that.
    pub(crate) fn may_write(&self, submit: &Submit) -> Result<(), ErrorCode> {
        let slot = self.groups.peek(&submit.message.conversation).ok_or(ErrorCode::Busy)?;
        let group = slot.group.as_ref().ok_or(ErrorCode::NoSuchGroup)?;
        if submit.amending().is_some_and(|amending| amending.of_deleted) {
            return Ok(());
        }
        if self.planted.is(Bug::StrangersWrite) {
            return Ok(());
        }
        let member = group.member(&submit.message.from).ok_or(ErrorCode::NotMember)?;
        if group.row.dissolved != Seq::ZERO && !self.planted.is(Bug::DissolvedStaysOpen) {
            return Err(ErrorCode::GroupDissolved);
        }
        let takes_back = submit.amending().is_some_and(|amending| amending.takes_back());
        if member.muted_until_ms > self.now.unix_ms && !takes_back && !self.planted.is(Bug::MutedWrite) {
            return Err(ErrorCode::Muted);
        }
        let extra = submit.message.extra.as_ref();
        let ranks = member.role >= Role::Admin || self.planted.is(Bug::MentionAllByAnyone);
        if extra.is_some_and(|extra| extra.mention_all) && !ranks {
            return Err(ErrorCode::NotAllowed);
        }
        Ok(())
    }

    /// A message or an act whose conversation is loaded is judged. Its group was there when it began to wait for the
    /// conversation, and has stayed since; only a guest that was looked up may have been forgotten.
    pub(crate) fn accept_in_group(&mut self, submit: Submit, fx: &mut Effects) {
        let slot = self.groups.peek(&submit.message.conversation).filter(|slot| slot.loaded);
        debug_assert!(slot.is_some(), "a group stays while something waits for its conversation");
        let unknown = slot.and_then(|slot| slot.group.as_ref()).zip(submit.act());
        let unknown = unknown.and_then(|(group, act)| act.needs(group, &submit.message.from));
        if slot.is_none() || unknown.is_some() {
            return self.refuse(submit.origin, ErrorCode::Busy, fx);
        }
        if submit.act().is_some() {
            return self.group_act(submit, fx);
        }
        match (self.may_write(&submit), submit.amending()) {
            (Ok(()), None) => self.write_to_group(submit, fx),
            (Ok(()), Some(amending)) => self.read_original(submit, amending, fx),
            (Err(code), _) => self.refuse(submit.origin, code, fx),
        }
    }

    /// The members by shard, as they are now.
    pub(crate) fn group_targets(&mut self, id: ConversationId) -> Targets {
        let (cores, nodes) = (self.config.placement, &self.nodes);
        let owner = |partition| match nodes {
            None => cores.shard_of(partition),
            Some(nodes) => nodes.placement.shard_of(partition),
        };
        let group = self.groups.get_mut(&id).and_then(|slot| slot.group.as_mut());
        group.map_or_else(|| Arc::from([]), |group| group.targets(owner))
    }

    /// Carries out an act on a group that is in memory, and whose conversation is.
    pub(crate) fn group_act(&mut self, submit: Submit, fx: &mut Effects) {
        let Some(act) = submit.act() else { return };
        if let Some(answer) = self.group_read(&submit, act) {
            return match answer {
                Ok(answer) => self.answer_group(submit.origin, answer, fx),
                Err(code) => self.refuse(submit.origin, code, fx),
            };
        }
        let id = submit.message.conversation;
        let Some(seq) = self.conversations.get(&id).map(|conversation| conversation.head.next()) else { return };
        let group = self.groups.peek(&id).and_then(|slot| slot.group.as_ref());
        let now_ms = self.now.unix_ms;
        let owner = group.map(|group| &group.row.owner).filter(|_| self.planted.is(Bug::AnyoneRanks));
        let from = owner.filter(|_| act.needs_rank()).unwrap_or(&submit.message.from);
        let admits_all = self.planted.is(Bug::AnyoneJoins);
        let scene = Scene { group, name: &submit.message.to, from, seq, now_ms, admits_all };
        match scene.decide(act) {
            Ok(decision) => self.group_change(&submit, seq, decision, fx),
            Err(code) => self.refuse(submit.origin, code, fx),
        }
    }

    /// Brings a decision into memory and on its way to the disk.
    fn group_change(&mut self, submit: &Submit, seq: Seq, decision: Decision, fx: &mut Effects) {
        let id = submit.message.conversation;
        let Decision { told, group: new_row, members, pushes, standing } = decision;
        let answer_seq = if told.is_some() { seq } else { Seq::ZERO };
        let answer = GroupAnswer::Ok { conversation: id, seq: answer_seq, standing };
        if told.is_none() && members.is_empty() && new_row.is_none() {
            return self.answer_group(submit.origin, answer, fx);
        }
        let Some(slot) = self.groups.get_mut(&id) else { return };
        let before = slot.group.as_ref().map_or(0, |group| group.members().len());
        let Some(group) = slot.group.take().or_else(|| new_row.clone().map(|row| Group::new(row, 0))) else { return };
        let group = slot.group.insert(group);
        group.stamp += 1;
        let rows = apply(group, id, (new_row, members));
        debug_assert!(group.is_well_formed());
        let (title, after) = (group.row.title.clone(), group.members().len());
        slot.in_flight += 1;
        self.groups_members = (self.groups_members + after).saturating_sub(before);
        let message = told.map(|change| {
            let extra = StoredExtra { change: Some(change), ..StoredExtra::default() };
            Arc::new(StoredMessage {
                conversation: id,
                seq,
                from: submit.message.from.clone(),
                to: submit.message.to.clone(),
                device: DeviceId(0),
                client_seq: 0,
                time_ms: self.now.unix_ms,
                kind: BodyKind::System,
                body: Bytes::new(),
                extra: Some(Box::new(extra)),
            })
        });
        let pushes = pushes.into_iter().map(|push| self.push_of(submit, &title, push)).collect();
        let record = Record::Change(Box::new(Change { message: message.clone(), rows }));
        let targets = message.is_some().then(|| self.group_targets(id));
        let message = message.zip(targets);
        self.sessions.counters.group_changes += 1;
        let origin = submit.origin;
        let answer = Some(answer);
        let pending = GroupPending { conversation: id, message, origin, answer, pushes, ack_timeout_ms: None };
        self.append_of_group(record, pending, fx);
        self.evict_groups();
    }

    fn push_of(&self, submit: &Submit, title: &str, push: Push) -> (Vec<UserName>, Arc<GroupPush>) {
        let group = GroupPush {
            conversation: submit.message.conversation,
            group: submit.message.to.clone(),
            title: title.to_owned(),
            by: submit.message.from.clone(),
            time_ms: self.now.unix_ms,
            change: push.change,
        };
        (push.users, Arc::new(group))
    }

    /// A message to a group that may be written: gives it its number and sends it to the log.
    pub(crate) fn write_to_group(&mut self, mut submit: Submit, fx: &mut Effects) {
        let (id, time_ms) = (submit.message.conversation, self.now.unix_ms);
        let targets = self.group_targets(id);
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        let message = submit.numbered(conversation.head.next(), time_ms);
        conversation.remember(submit.device_key, message.accepted());
        conversation.note_amend(&message);
        let record = record_of(&message);
        let message = Some((message, targets));
        let (origin, ack_timeout_ms) = (submit.origin, submit.ack_timeout_ms);
        let (answer, pushes) = (None, Vec::new());
        let pending = GroupPending { conversation: id, message, origin, answer, pushes, ack_timeout_ms };
        self.append_of_group(record, pending, fx);
    }

    fn append_of_group(&mut self, record: Record, pending: GroupPending, fx: &mut Effects) {
        if let Some(conversation) = self.conversations.get_mut(&pending.conversation)
            && pending.message.is_some()
        {
            conversation.exists = true;
            conversation.head = conversation.head.next();
            conversation.in_flight += 1;
        }
        let weight = record.weight();
        self.pending_bytes += weight;
        let lsn = self.append(record, fx);
        self.pending.push_back(Pending { lsn, weight, work: PendingWork::Group(Box::new(pending)) });
    }

    /// It is on disk: answer, and tell everyone.
    pub(crate) fn group_committed(&mut self, pending: GroupPending, fx: &mut Effects) {
        let GroupPending { conversation: id, message, origin, answer, pushes, ack_timeout_ms } = pending;
        if answer.is_some()
            && let Some(slot) = self.groups.peek_mut(&id)
        {
            slot.in_flight = slot.in_flight.saturating_sub(1);
        }
        if let Some((message, _)) = &message
            && let Some(conversation) = self.conversations.peek_mut(&id)
        {
            debug_assert_eq!(conversation.committed.next(), message.seq, "commits are dense");
            conversation.committed = message.seq;
            conversation.in_flight -= 1;
        }
        match (answer, &message) {
            (Some(answer), _) => self.answer_group(origin, answer, fx),
            (None, Some((message, _))) => {
                self.sessions.counters.accepted += 1;
                self.receipts.wrote(message);
                let ack = SendAck { conversation: id, seq: message.seq, time_ms: message.time_ms, dup: false };
                self.answer_send(origin, (true, Ok(ack)), None, fx);
            }
            (None, None) => {}
        }
        if let Some((message, targets)) = message {
            let wanted = ack_timeout_ms.map(|timeout_ms| Wanted { origin, timeout_ms });
            let relay = wanted.and_then(|wanted| self.relay_committed(&message, wanted, fx));
            self.fan_out(&message, &targets, (origin, relay), fx);
        }
        for (users, push) in pushes {
            self.push_to_users(users, &push, fx);
        }
    }

    /// The answer to an act that only reads; `None` for the others.
    fn group_read(&self, submit: &Submit, act: &Act) -> Option<Result<GroupAnswer, ErrorCode>> {
        let group = || {
            let slot = self.groups.peek(&submit.message.conversation).ok_or(ErrorCode::Busy)?;
            slot.group.as_ref().ok_or(ErrorCode::NoSuchGroup)
        };
        match act {
            Act::Members { cursor, limit, standing } => {
                let page = (&cursor[..], usize::from(self.page_rows(*limit)), *standing);
                Some(group().and_then(|group| members_of(group, &submit.message.from, page)))
            }
            Act::Info => Some(group().and_then(|group| info_of(group, submit))),
            Act::Create { .. }
            | Act::Rename { .. }
            | Act::Policy { .. }
            | Act::Join { .. }
            | Act::Invite { .. }
            | Act::Answer { .. }
            | Act::Leave
            | Act::Kick { .. }
            | Act::Mute { .. }
            | Act::Role { .. }
            | Act::Transfer { .. }
            | Act::Dissolve
            | Act::Depart => None,
        }
    }
}

/// Changes the group in memory, and gives the rows that say the same on disk.
fn apply(
    group: &mut Group,
    id: ConversationId,
    (new_row, members): (
        Option<ringline_schema::rows::GroupRow>,
        Vec<(UserName, Option<ringline_schema::rows::MemberRow>)>,
    ),
) -> Vec<Row> {
    let stamp = group.stamp;
    if let Some(row) = new_row {
        group.row = row;
    }
    // The group's own row carries the stamp of every change: rows of those who are gone are not loaded with the group, and
    // one written later with a lower stamp would count for nothing.
    let mut rows = Vec::with_capacity(1 + members.len());
    rows.push(Row { key: RowKey::Group(id), stamp, value: Some(RowValue::Group(group.row.clone())) });
    for (name, row) in members {
        let key = RowKey::Member(id, name.clone());
        rows.push(Row { key, stamp, value: row.clone().map(RowValue::Member) });
        group.set(name, row);
    }
    rows
}

fn members_of(
    group: &Group,
    asker: &UserName,
    (cursor, limit, standing): (&str, usize, Standing),
) -> Result<GroupAnswer, ErrorCode> {
    let asker = group.member(asker).ok_or(ErrorCode::NotMember)?;
    let mut members: Vec<MemberAnswer> = match standing {
        Standing::Member => {
            let page = group.members_above(cursor).iter().take(limit + 1);
            page.map(|member| MemberAnswer { user: member.name.clone(), row: member.row() }).collect()
        }
        Standing::Invited | Standing::Asked if asker.role < Role::Admin => return Err(ErrorCode::NotAllowed),
        Standing::Invited | Standing::Asked => {
            let page = group.pending().filter(|(name, row)| row.standing == standing && name.as_str() > cursor);
            let page = page.map(|(name, row)| MemberAnswer { user: name.clone(), row: row.clone() });
            page.take(limit + 1).collect()
        }
        Standing::Left | Standing::Kicked => return Err(ErrorCode::BadRequest),
    };
    let more = members.len() > limit;
    members.truncate(limit);
    let next = members.last().filter(|_| more).map(|member| member.user.as_str().to_owned());
    Ok(GroupAnswer::Members { members, next: next.unwrap_or_default() })
}

fn info_of(group: &Group, submit: &Submit) -> Result<GroupAnswer, ErrorCode> {
    let member = group.member(&submit.message.from).map(|member| member.row());
    let known = member.or_else(|| group.guest(&submit.message.from).flatten().cloned());
    if known.is_none() && group.row.join == JoinPolicy::Invite {
        return Err(ErrorCode::NoSuchGroup);
    }
    let (row, members) = (group.row.clone(), group.members().len() as u32);
    Ok(GroupAnswer::Info(Box::new(InfoAnswer { conversation: submit.message.conversation, row, members, known })))
}
