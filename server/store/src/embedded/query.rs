//! Answers to the core's questions, from overlays, index and logs.
//!
//! On the index thread of the shard that asks. Reads overlays before the index; see [`super::overlay`].

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLockReadGuard};

use ringline_schema::ids::{ConversationId, DeviceKey, Seq, UserName};
use ringline_schema::record::{Answer, ConversationRow, Head, Query, Range, Record, StoredMessage, User};

use super::Node;
use super::format::Place;
use super::index::IndexError;
use super::overlay::Overlay;
use super::rows::{self, HeadRow};
use crate::{newest, remember};

/// Answers a question; what can't be read is said loudly in the log and answered `Failed`.
pub(super) fn answer(node: &Node, query: &Query) -> Answer {
    let answer = match query {
        Query::User { name } => node.user(name).map(Answer::User),
        Query::Head { conversation, device } => node.head(*conversation, *device).map(Answer::Head),
        Query::Messages { conversation, range } => node.messages(*conversation, range),
        Query::Conversations { user, device, cursor, limit } => {
            node.conversations(user, *device, (*cursor, usize::from(*limit))).map(Answer::Conversations)
        }
    };
    answer.unwrap_or_else(|error| {
        tracing::error!(%error, "the store cannot answer; if the index is damaged, stop, remove its folder and start: it is rebuilt from the logs");
        Answer::Failed
    })
}

impl Node {
    fn overlays(&self) -> impl Iterator<Item = RwLockReadGuard<'_, Overlay>> {
        // A panic of the writer leaves whole records behind; reading on is safe.
        self.overlays.iter().map(|overlay| overlay.read().unwrap_or_else(PoisonError::into_inner))
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
            let mut senders = recent.iter().flat_map(|recent| recent.senders.values());
            if let Some(sender) = senders.find(|sender| sender.key == device) {
                recent_filter.extend_from_slice(&sender.filter);
            }
        }
        let Some(row) = self.head_row(conversation)? else {
            return Ok(Head::default());
        };
        let mut filter = self.index.filter(conversation, device)?;
        recent_filter.into_iter().for_each(|accepted| remember(&mut filter, accepted));
        Ok(Head { exists: true, first: row.first, head: row.head, filter: newest(&filter).to_vec() })
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

    fn messages(&self, conversation: ConversationId, range: &Range) -> Result<Answer, IndexError> {
        let Some(row) = self.head_row(conversation)? else {
            return Ok(Answer::Messages { first: Seq::ZERO, head: Seq::ZERO, messages: Vec::new() });
        };
        let (first, head) = (row.first, row.head);
        let mut wanted = wanted(range, first, head);
        let places = self.places(conversation, &wanted)?;
        if range.newest {
            wanted.reverse();
        }
        let mut bytes = 0;
        let mut messages: Vec<StoredMessage> = Vec::new();
        for seq in wanted {
            let place = places.get(&seq).ok_or(IndexError::Missing(conversation, seq))?;
            let segment = self.segments.get(place.log, place.segment)?;
            let message = match segment.read(*place)? {
                Record::Message(message) if (message.conversation, message.seq) == (conversation, seq) => message,
                Record::Message(_) | Record::User(_) | Record::Conversation { .. } | Record::Cursor { .. } => {
                    return Err(IndexError::Wrong(conversation, seq));
                }
            };
            bytes += message.body.len().max(1);
            if bytes > range.bytes_max as usize && !messages.is_empty() {
                break;
            }
            messages.push(message);
        }
        if range.newest {
            messages.reverse();
        }
        Ok(Answer::Messages { first, head, messages })
    }

    /// Where the wanted messages lie; what is not found is missing from the answer.
    fn places(&self, conversation: ConversationId, wanted: &[Seq]) -> Result<BTreeMap<Seq, Place>, IndexError> {
        let (Some(&lowest), Some(&highest)) = (wanted.first(), wanted.last()) else {
            return Ok(BTreeMap::new());
        };
        let mut places = BTreeMap::new();
        for overlay in self.overlays() {
            if let Some(recent) = overlay.conversations.get(&conversation) {
                let after = Seq(lowest.0.saturating_sub(1));
                places.extend(recent.places_between(after, Seq(highest.0.saturating_add(1))).iter().copied());
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
        let mut ids = Vec::new();
        for overlay in self.overlays() {
            ids.extend(overlay.conversations_of(user, cursor, limit));
        }
        ids.extend(self.index.conversations_of(user, cursor, limit)?);
        ids.sort_unstable();
        ids.dedup();
        ids.truncate(limit);
        let mut found = Vec::with_capacity(ids.len());
        for conversation in ids {
            let Some(row) = self.head_row(conversation)? else { continue };
            let Some(created) = row.created else { continue };
            let [one, other] = created.members;
            found.push(ConversationRow {
                conversation,
                with: if one == *user { other } else { one },
                first: row.first,
                head: row.head,
                last_time_ms: if row.head == Seq::ZERO { created.created_ms } else { row.last_time_ms },
                acked: self.cursor(device, conversation)?,
            });
        }
        Ok(found)
    }

    fn cursor(&self, device: DeviceKey, conversation: ConversationId) -> Result<Seq, IndexError> {
        let recent = self.overlays().filter_map(|overlay| overlay.cursors.get(&(device, conversation)).copied()).max();
        Ok(self.index.cursor(device, conversation)?.max(recent.unwrap_or_default()))
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
