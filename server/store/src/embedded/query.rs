//! Answers to the core's questions, from overlays, index and logs.
//!
//! On the index thread of the shard that asks. Reads overlays before the index; see [`super::overlay`].

use std::collections::BTreeMap;

use ringline_schema::ids::{ConversationId, ConversationKind, DeviceKey, Seq, UserName};
use ringline_schema::message::Standing;
use ringline_schema::record::{Answer, ConversationRow, Head, Query, Range, StoredMessage, User};
use ringline_schema::rows::{GroupRow, MarkRow, MemberRow, ReceiptRow, Row, RowKey, RowList, RowValue};

use super::Node;
use super::format::Place;
use super::generations::{Generations, Held};
use super::index::IndexError;
use super::rows::{self, HeadRow};
use super::segments::Reading;
use crate::shown::Reader;
use crate::{newest, readable, remember, span};

/// Entries of a user's list that are read at a time to count groups.
const COUNT_PAGE: usize = 256;

/// Answers a question; what can't be read is said loudly in the log and answered `Failed`.
pub(super) fn answer(node: &Node, query: &Query) -> Answer {
    let answer = match query {
        Query::User { name } => node.user(name).map(Answer::User),
        Query::Head { conversation, device } => node.head(*conversation, *device).map(Answer::Head),
        Query::Messages { conversation, range, reader } => match reader {
            Some(reader) if conversation.kind() == Some(ConversationKind::Group) => {
                node.messages_for(*conversation, range, reader)
            }
            reader => node.messages(*conversation, range, Reader { user: reader.as_ref(), member: None }),
        },
        Query::Row { key } => node.row(key).map(Answer::Row),
        Query::Rows { list, after, limit } => node.rows(list, after.as_ref(), usize::from(*limit)).map(Answer::Rows),
        Query::GroupCount { user } => node.group_count(user).map(Answer::Count),
        Query::Listed { user, device, rows } => node.laid_over(user, *device, rows).map(Answer::Conversations),
        Query::Conversations { user, device, cursor, limit } => {
            node.conversations(user, *device, (*cursor, usize::from(*limit))).map(Answer::Conversations)
        }
    };
    answer.unwrap_or_else(|error| {
        node.note_damage(&error);
        Answer::Failed
    })
}

impl Node {
    /// In the order in which rows move; see [`super::generations`].
    fn overlays(&self) -> impl Iterator<Item = Held<'_>> {
        self.overlays.iter().flat_map(Generations::both)
    }

    fn user(&self, name: &UserName) -> Result<Option<User>, IndexError> {
        let recent = self.overlays().find_map(|overlay| overlay.users.get(name).cloned());
        let found = if recent.is_some() { recent } else { self.index.user(name)? };
        Ok(found.map(|(_, user)| user))
    }

    fn head(&self, conversation: ConversationId, device: DeviceKey) -> Result<Head, IndexError> {
        let mut recent_filter = Vec::new();
        for overlay in self.overlays() {
            let recent = overlay.conversations.get(&conversation);
            let mut senders = recent.iter().flat_map(|recent| &recent.senders);
            if let Some(sender) = senders.find(|sender| sender.key == device) {
                recent_filter.extend_from_slice(&sender.filter);
            }
        }
        let Some(row) = self.head_row(conversation)? else {
            return Ok(Head::default());
        };
        let mut filter = self.index.filter(conversation, device)?;
        recent_filter.into_iter().for_each(|accepted| remember(&mut filter, accepted));
        Ok(Head { exists: true, first: row.first(), head: row.head, filter: newest(&filter).to_vec() })
    }

    fn head_row(&self, conversation: ConversationId) -> Result<Option<HeadRow>, IndexError> {
        let mut found: Option<HeadRow> = None;
        for overlay in self.overlays() {
            if let Some(recent) = overlay.conversations.get(&conversation) {
                found.get_or_insert_default().merge(&recent.head);
            }
        }
        if let Some(row) = self.index.head(conversation)? {
            found.get_or_insert_default().merge(&row);
        }
        Ok(found)
    }

    fn messages(&self, conversation: ConversationId, range: &Range, reader: Reader<'_>) -> Result<Answer, IndexError> {
        let mut row = self.head_row(conversation)?.unwrap_or_default();
        loop {
            let (first, head) = (row.first(), row.head);
            let error = match self.read_messages(conversation, wanted(range, first, head), (range, reader)) {
                Ok(messages) => return Ok(Answer::Messages { first, head, messages }),
                Err(error) => error,
            };
            // Retention may have let go of them between the look at the floor and the look into the log.
            row = self.head_row(conversation)?.unwrap_or_default();
            if row.first() == first {
                return Err(error);
            }
        }
    }

    fn read_messages(
        &self,
        conversation: ConversationId,
        mut wanted: Vec<Seq>,
        (range, reader): (&Range, Reader<'_>),
    ) -> Result<Vec<StoredMessage>, IndexError> {
        let places = self.places(conversation, &wanted)?;
        let changed = self.changed(conversation, &wanted, reader)?;
        if range.newest {
            wanted.reverse();
        }
        let (mut bytes, mut reading) = (0, Reading::default());
        let mut messages: Vec<StoredMessage> = Vec::new();
        for seq in wanted {
            let place = places.get(&seq).ok_or(IndexError::Missing(conversation, seq))?;
            let message = self.message((conversation, seq), *place, &mut reading)?;
            let message = self.shown(message, &changed, reader)?;
            bytes += message.bytes().max(1);
            if bytes > range.bytes_max as usize && !messages.is_empty() {
                break;
            }
            messages.push(message);
        }
        if range.newest {
            messages.reverse();
        }
        Ok(messages)
    }

    pub(super) fn message(
        &self,
        (conversation, seq): (ConversationId, Seq),
        place: Place,
        reading: &mut Reading,
    ) -> Result<StoredMessage, IndexError> {
        let found = reading.message(&self.segments, place, (conversation, seq))?;
        found.ok_or(IndexError::Wrong(conversation, seq))
    }

    /// Where the wanted messages lie; what is not found is missing from the answer.
    pub(super) fn places(
        &self,
        conversation: ConversationId,
        wanted: &[Seq],
    ) -> Result<BTreeMap<Seq, Place>, IndexError> {
        let (Some(&lowest), Some(&highest)) = (wanted.first(), wanted.last()) else {
            return Ok(BTreeMap::new());
        };
        let mut places = BTreeMap::new();
        for overlay in self.overlays() {
            if let Some(recent) = overlay.conversations.get(&conversation) {
                let after = Seq(lowest.0.saturating_sub(1));
                places.extend(recent.places.between(after, Seq(highest.0.saturating_add(1))));
            }
        }
        for chunk in wanted.chunk_by(|one, other| rows::block_of(*one).0 == rows::block_of(*other).0) {
            let Some(&seq) = chunk.first().filter(|_| chunk.iter().any(|seq| !places.contains_key(seq))) else {
                continue;
            };
            let block = self.index.block(conversation, rows::block_of(seq).0)?;
            for &seq in chunk {
                if let Some(place) = block.0.get(rows::block_of(seq).1).copied().flatten() {
                    places.entry(seq).or_insert(place);
                }
            }
        }
        Ok(places)
    }

    fn conversations(
        &self,
        user: &UserName,
        device: DeviceKey,
        (cursor, limit): (ConversationId, usize),
    ) -> Result<Vec<ConversationRow>, IndexError> {
        let (mut found, mut cursor) = (Vec::new(), cursor);
        // Conversations of which there is no row any more are on the list and no part of it: an empty page is its end.
        while found.len() < limit {
            let ids = self.listed(user, cursor, limit - found.len())?;
            let Some(&last) = ids.last() else { break };
            cursor = last;
            for conversation in ids {
                found.extend(self.conversation_row(user, device, conversation)?);
            }
        }
        Ok(found)
    }

    /// What is on the list of a user above `cursor`, rising, at most `limit`.
    fn listed(&self, user: &UserName, cursor: ConversationId, limit: usize) -> Result<Vec<ConversationId>, IndexError> {
        let mut ids = Vec::new();
        for overlay in self.overlays() {
            ids.extend(overlay.conversations_of(user, cursor, limit));
        }
        ids.extend(self.index.conversations_of(user, cursor, limit)?);
        ids.sort_unstable();
        ids.dedup();
        ids.truncate(limit);
        Ok(ids)
    }

    fn conversation_row(
        &self,
        user: &UserName,
        device: DeviceKey,
        conversation: ConversationId,
    ) -> Result<Option<ConversationRow>, IndexError> {
        let place = match conversation.kind() {
            Some(ConversationKind::Group) => self.group_place(user, conversation)?,
            Some(ConversationKind::Direct) | None => self.direct_place(user, conversation)?,
        };
        let Some(place) = place else { return Ok(None) };
        let mark = match self.value(&RowKey::Mark(user.clone(), conversation))? {
            Some(RowValue::Mark(mark)) => mark,
            Some(_) | None => MarkRow::default(),
        };
        let receipt = match self.value(&RowKey::Receipt(conversation, user.clone()))? {
            Some(RowValue::Receipt(receipt)) => receipt,
            Some(_) | None => ReceiptRow::default(),
        };
        Ok(Some(ConversationRow {
            acked: self.cursor(device, conversation)?,
            read: receipt.read,
            pinned: mark.pinned,
            muted_until_ms: mark.muted_until_ms,
            ..place
        }))
    }

    /// Rows of another node with what is kept here of the user.
    fn laid_over(
        &self,
        user: &UserName,
        device: DeviceKey,
        rows: &[ConversationRow],
    ) -> Result<Vec<ConversationRow>, IndexError> {
        let lay = |row: &ConversationRow| {
            let mut row = row.clone();
            row.acked = row.acked.max(self.cursor(device, row.conversation)?);
            if let Some(RowValue::Mark(mark)) = self.value(&RowKey::Mark(user.clone(), row.conversation))? {
                (row.pinned, row.muted_until_ms) = (mark.pinned, mark.muted_until_ms);
            }
            Ok(row)
        };
        rows.iter().map(lay).collect()
    }

    /// The row of a conversation with another user, without what is only this user's.
    fn direct_place(&self, user: &UserName, id: ConversationId) -> Result<Option<ConversationRow>, IndexError> {
        let Some(row) = self.head_row(id)? else { return Ok(None) };
        let (first, head, last_time_ms) = (row.first(), row.head, row.last_time_ms);
        let Some(created) = row.created else { return Ok(None) };
        let [one, other] = created.members;
        let with = if one == *user { other } else { one };
        let last_time_ms = if head == Seq::ZERO { created.created_ms } else { last_time_ms };
        Ok(Some(blank_row(id, with, (first, head), last_time_ms)))
    }

    /// The row of a group, as far as the user may read it.
    fn group_place(&self, user: &UserName, id: ConversationId) -> Result<Option<ConversationRow>, IndexError> {
        let (Some(group), Some(member)) = (self.group(id)?, self.member(id, user)?) else { return Ok(None) };
        let row = self.head_row(id)?.unwrap_or_default();
        let (first, head) = span(&member, (row.first(), row.head));
        let last_time_ms = if member.standing == Standing::Member { row.last_time_ms } else { member.since_ms };
        let place = blank_row(id, group.name, (first, head), last_time_ms);
        Ok(Some(ConversationRow { standing: Some(member.standing), title: group.title, ..place }))
    }

    fn messages_for(
        &self,
        conversation: ConversationId,
        range: &Range,
        reader: &UserName,
    ) -> Result<Answer, IndexError> {
        let member = self.member(conversation, reader)?.filter(|member| !member.ranges.is_empty());
        let (Some(member), Some(row)) = (member, self.head_row(conversation)?) else {
            return Ok(Answer::NotReadable);
        };
        let part = readable(&member, (row.first(), row.head), range);
        let reader = Reader { user: Some(reader), member: Some(&member) };
        Ok(match self.messages(conversation, &part.range, reader)? {
            Answer::Messages { messages, .. } => Answer::Messages { first: part.first, head: part.head, messages },
            other => other,
        })
    }

    pub(super) fn row(&self, key: &RowKey) -> Result<Option<Row>, IndexError> {
        let bytes = key.encode();
        let mut found: Option<Row> = None;
        for overlay in self.overlays() {
            if let Some(row) = overlay.rows.get(&bytes)
                && found.as_ref().is_none_or(|kept| kept.stamp < row.stamp)
            {
                found = Some(row.clone());
            }
        }
        // Rows of one key are in one overlay, or in several after the number of shards changed; the index may hold a
        // newer one than an overlay that is being flushed.
        if let Some(row) = self.index.keyed(key)?
            && found.as_ref().is_none_or(|kept| kept.stamp < row.stamp)
        {
            found = Some(row);
        }
        Ok(found.filter(|row| row.value.is_some()))
    }

    pub(super) fn value(&self, key: &RowKey) -> Result<Option<RowValue>, IndexError> {
        Ok(self.row(key)?.and_then(|row| row.value))
    }

    fn group(&self, id: ConversationId) -> Result<Option<GroupRow>, IndexError> {
        Ok(match self.value(&RowKey::Group(id))? {
            Some(RowValue::Group(group)) => Some(group),
            Some(_) | None => None,
        })
    }

    fn member(&self, id: ConversationId, user: &UserName) -> Result<Option<MemberRow>, IndexError> {
        Ok(match self.value(&RowKey::Member(id, user.clone()))? {
            Some(RowValue::Member(member)) => Some(member),
            Some(_) | None => None,
        })
    }

    pub(super) fn rows(&self, list: &RowList, after: Option<&RowKey>, limit: usize) -> Result<Vec<Row>, IndexError> {
        let prefix = list.prefix();
        // Every key of the list is longer than its prefix.
        let after = after.map_or_else(|| prefix.clone(), RowKey::encode).max(prefix.clone());
        let mut found: BTreeMap<Vec<u8>, Row> = BTreeMap::new();
        let keep = |found: &mut BTreeMap<Vec<u8>, Row>, key: Vec<u8>, row: Row| match found.get_mut(&key) {
            Some(kept) if kept.stamp >= row.stamp => {}
            Some(kept) => *kept = row,
            None => drop(found.insert(key, row)),
        };
        for overlay in self.overlays() {
            // What is gone in a younger one makes no room for what follows in an older one.
            let gone = found.values().filter(|row| row.value.is_none()).count();
            overlay
                .rows_above(&prefix, &after, limit + gone)
                .into_iter()
                .for_each(|(key, row)| keep(&mut found, key, row));
        }
        let gone: Vec<_> = found.iter().filter(|(_, row)| row.value.is_none()).map(|(key, _)| key.clone()).collect();
        let mut values = 0;
        self.index.keyed_above((&prefix, &after), &mut |key, row| {
            values += usize::from(row.value.is_some() && gone.binary_search(&key).is_err());
            keep(&mut found, key, row);
            values < limit
        })?;
        Ok(found.into_values().filter(|row| row.value.is_some()).take(limit).collect())
    }

    fn group_count(&self, user: &UserName) -> Result<u32, IndexError> {
        let (mut count, mut cursor) = (0, ConversationId(0));
        loop {
            let ids = self.listed(user, cursor, COUNT_PAGE)?;
            let Some(&last) = ids.last() else { return Ok(count) };
            cursor = last;
            for id in ids.into_iter().filter(|id| id.kind() == Some(ConversationKind::Group)) {
                let member = self.member(id, user)?.is_some_and(|member| member.standing == Standing::Member);
                let lives = self.group(id)?.is_some_and(|group| group.dissolved == Seq::ZERO);
                count += u32::from(member && lives);
            }
        }
    }

    fn cursor(&self, device: DeviceKey, conversation: ConversationId) -> Result<Seq, IndexError> {
        let (mut recent, mut dropped) = (Seq::ZERO, false);
        for overlay in self.overlays() {
            recent = recent.max(overlay.cursors.get(&(device, conversation)).copied().unwrap_or_default());
            dropped = overlay.dropped.contains(&device);
            if dropped {
                // What is older counts no more.
                break;
            }
        }
        Ok(if dropped { recent } else { self.index.cursor(device, conversation)?.max(recent) })
    }
}

fn blank_row(
    conversation: ConversationId,
    with: UserName,
    (first, head): (Seq, Seq),
    last_time_ms: u64,
) -> ConversationRow {
    ConversationRow {
        conversation,
        with,
        first,
        head,
        last_time_ms,
        acked: Seq::ZERO,
        read: Seq::ZERO,
        pinned: false,
        muted_until_ms: 0,
        standing: None,
        title: String::new(),
    }
}

/// The seqs to read, rising: those inside the range and the conversation, from the end that is asked for.
fn wanted(range: &Range, first: Seq, head: Seq) -> Vec<Seq> {
    let lowest = first.0.max(range.after.0.saturating_add(1)).max(1);
    let highest = range.before.map_or(head.0, |before| head.0.min(before.0.saturating_sub(1)));
    let limit = u64::from(range.limit);
    let (start, end) = if range.newest {
        (lowest.max(highest.saturating_add(1).saturating_sub(limit)), highest)
    } else {
        (lowest, highest.min(lowest.saturating_add(limit).saturating_sub(1)))
    };
    if limit == 0 { Vec::new() } else { (start..=end).map(Seq).collect() }
}
