//! Groups in memory: loaded when something is asked of them, let go when there are too many.
//!
//! What waits for a group waits in its slot, in order, before it waits for the conversation: two queues in the other
//! order could overtake each other. So a group stays as long as something waits for its conversation, and as long as a
//! change is on its way to the disk: the store would give back the group as it was before.

use std::collections::VecDeque;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::record::{Answer, Query};
use ringline_schema::rows::{RowKey, RowList, RowValue};

use crate::config::WAITERS_PER_LOAD_MAX;
use crate::event::Effects;
use crate::group::state::Group;
use crate::peer::Submit;
use crate::shard::{Question, Shard};

/// Rows of members that one answer of the store brings.
const MEMBERS_PER_LOAD: u16 = 2_048;
/// How many cached groups are looked at to find one that may go.
const EVICTION_LOOKS_MAX: usize = 8;

/// A group, or that there is none, or the wait for it.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    /// A question to the store is open, and everything new waits.
    pub loading: bool,
    /// `group` is the whole truth, at least of its members.
    pub loaded: bool,
    /// `None` and loaded: there is no such group.
    pub group: Option<Group>,
    /// What waits for the answer, in order of arrival.
    pub waiting: VecDeque<Submit>,
    /// Changes on their way to the disk.
    pub in_flight: u32,
}

/// What was asked of the store for a group.
#[derive(Clone, Debug)]
pub(crate) enum GroupQuestion {
    /// The group itself.
    Row(ConversationId),
    /// A page of its members.
    Members(ConversationId),
    /// One user who is no member.
    Guest(ConversationId, UserName),
}

impl GroupQuestion {
    pub(crate) fn group(&self) -> ConversationId {
        let (Self::Row(id) | Self::Members(id) | Self::Guest(id, _)) = self;
        *id
    }
}

impl Shard {
    /// Whether a send or an act can go on to the conversation. If not, it waits in the slot of its group and comes back
    /// as a submit.
    pub(crate) fn group_is_there(&mut self, submit: Submit, fx: &mut Effects) -> Option<Submit> {
        let id = submit.message.conversation;
        if self.groups.get(&id).is_none() {
            if !self.may_load() {
                self.refuse_submit(&submit, ErrorCode::Busy, fx);
                return None;
            }
            self.groups.put(id, Slot { loading: true, waiting: VecDeque::from([submit]), ..Slot::default() });
            self.evict_groups();
            let query = Query::Row { key: RowKey::Group(id) };
            self.load(Question::Group(GroupQuestion::Row(id)), query, fx);
            return None;
        }
        let slot = self.groups.get_mut(&id)?;
        let stranger = match (&slot.group, submit.act()) {
            (Some(group), Some(act)) if !slot.loading => act.needs(group, &submit.message.from),
            (Some(_) | None, _) => None,
        };
        if !slot.loading && stranger.is_none() {
            return Some(submit);
        }
        if slot.waiting.len() >= WAITERS_PER_LOAD_MAX {
            self.refuse_submit(&submit, ErrorCode::Busy, fx);
            return None;
        }
        match stranger {
            // Whoever was looked up last may be the next to be let go, so it is first in the queue.
            Some(_) => slot.waiting.push_front(submit),
            None => slot.waiting.push_back(submit),
        }
        if let Some(user) = stranger {
            slot.loading = true;
            let query = Query::Row { key: RowKey::Member(id, user.clone()) };
            self.load(Question::Group(GroupQuestion::Guest(id, user)), query, fx);
        }
        None
    }

    /// The store has answered about a group.
    pub(crate) fn group_loaded(&mut self, question: GroupQuestion, answer: Answer, fx: &mut Effects) {
        let (GroupQuestion::Row(id) | GroupQuestion::Members(id) | GroupQuestion::Guest(id, _)) = question;
        let Some(slot) = self.groups.get_mut(&id) else { return };
        let members_after = |after| {
            let query = Query::Rows { list: RowList::Members(id), after, limit: MEMBERS_PER_LOAD };
            (Question::Group(GroupQuestion::Members(id)), query)
        };
        match (question, answer) {
            (GroupQuestion::Row(_), Answer::Row(None)) => {}
            (GroupQuestion::Row(_), Answer::Row(Some(row))) => {
                if let Some(RowValue::Group(value)) = row.value {
                    slot.group = Some(Group::new(value, row.stamp));
                    let (question, query) = members_after(None);
                    return self.load(question, query, fx);
                }
            }
            (GroupQuestion::Members(_), Answer::Rows(rows)) => {
                let last = rows.last().map(|row| row.key.clone());
                for row in rows {
                    if let (RowKey::Member(_, name), Some(RowValue::Member(member)), Some(group)) =
                        (row.key, row.value, &mut slot.group)
                    {
                        group.load(name, row.stamp, member);
                    }
                }
                if last.is_some() {
                    let (question, query) = members_after(last);
                    return self.load(question, query, fx);
                }
                self.groups_members += slot.group.as_ref().map_or(0, |group| group.members().len());
            }
            (GroupQuestion::Guest(_, user), Answer::Row(row)) => {
                let row = row.and_then(|row| row.value);
                let row = if let Some(RowValue::Member(member)) = row { Some(member) } else { None };
                if let Some(group) = &mut slot.group {
                    group.looked_up(user, row);
                }
            }
            (GroupQuestion::Row(_) | GroupQuestion::Members(_) | GroupQuestion::Guest(..), _) => {
                return self.group_not_loaded(id, fx);
            }
        }
        (slot.loading, slot.loaded) = (false, true);
        self.evict_groups();
        self.advance_group(id, fx);
    }

    /// Serves what has waited, until the group has to wait again.
    fn advance_group(&mut self, id: ConversationId, fx: &mut Effects) {
        while let Some(slot) = self.groups.get_mut(&id)
            && !slot.loading
            && let Some(submit) = slot.waiting.pop_front()
        {
            self.submit(submit, fx);
        }
    }

    /// Nothing was appended, so this is a plain refusal. A group that is in memory stays there: changes of it may be on their
    /// way to the disk, and others may wait for its conversation.
    fn group_not_loaded(&mut self, id: ConversationId, fx: &mut Effects) {
        let Some(slot) = self.groups.get_mut(&id) else { return };
        slot.loading = false;
        let waiting = std::mem::take(&mut slot.waiting);
        if !slot.loaded {
            self.groups.pop(&id);
        }
        for submit in waiting {
            self.refuse_submit(&submit, self.unread(), fx);
        }
    }

    /// Keeps the cache within its two bounds, groups and members. Groups that something waits for stay.
    pub(crate) fn evict_groups(&mut self) {
        let mut looks = 0;
        while (self.groups.len() > self.config.groups_cached_max
            || self.groups_members > self.config.group_members_cached_max)
            && self.groups.len() > 1
            && looks < EVICTION_LOOKS_MAX
        {
            looks += 1;
            let Some((id, slot)) = self.groups.pop_lru() else { return };
            let conversation = self.conversations.peek(&id);
            let waited_for = conversation.is_some_and(|conversation| !conversation.waiting.is_empty());
            if slot.loading || slot.in_flight > 0 || waited_for {
                self.groups.put(id, slot);
            } else {
                let members = slot.group.as_ref().map_or(0, |group| group.members().len());
                self.groups_members = self.groups_members.saturating_sub(members);
                self.sessions.counters.groups_evicted += 1;
            }
        }
    }
}
