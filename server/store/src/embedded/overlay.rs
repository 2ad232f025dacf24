//! What a shard's log holds beyond the index: recent rows in memory, until the next flush.
//!
//! Written by the shard's index thread alone, read by all index threads under its lock: a user's conversation list names
//! conversations of other shards. Bounded: whoever fills it flushes when it [is full](Overlay::is_full).
//!
//! Who reads both must read the overlay *before* the index: a flush makes rows visible in the index first and only then
//! removes them here, so the other order could miss them in both. A shard has two of them; see [`super::generations`].

use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use foldhash::{HashMap, HashSet};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use ringline_schema::disk::{Burst, DiskError, Indexed, IndexedMessage};
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::record::{Accepted, Record, User};
use ringline_schema::rows::{Row, RowKey};

use super::EmbeddedOptions;
use super::format::Place;
use super::places::Places;
use super::rows::{Created, HeadRow};
use crate::{dropped_device, remember};

#[derive(Debug, Default)]
pub(super) struct Overlay {
    pub conversations: HashMap<ConversationId, Recent>,
    /// With the run that wrote them.
    pub users: HashMap<UserName, (u64, User)>,
    pub lists: BTreeSet<(UserName, ConversationId)>,
    pub cursors: HashMap<(DeviceKey, ConversationId), Seq>,
    /// Devices that are gone: of their cursors only those here count.
    pub dropped: HashSet<DeviceKey>,
    /// By the bytes of their keys.
    pub rows: BTreeMap<Vec<u8>, Row>,
    /// Records taken in since the last flush.
    pub records: usize,
    /// About the memory of all this. One more message of a busy conversation takes little, so many of them share a flush,
    /// which writes each conversation's rows once.
    pub bytes: usize,
    /// The run whose records are being taken in; stays when the rest is cleared.
    pub run: u64,
    /// Read from the log by a start: the index may have any of it, so a conversation that begins here may be known there.
    pub replayed: bool,
    /// Of the senders.
    hasher: RandomState,
}

/// What is new in one conversation.
#[derive(Debug, Default)]
pub(super) struct Recent {
    pub head: HeadRow,
    pub places: Places,
    /// The devices that sent since the last flush.
    pub senders: HashTable<Sender>,
}

/// The new part of one device's duplicate filter.
#[derive(Debug)]
pub(super) struct Sender {
    user: UserName,
    device: DeviceId,
    /// Kept, because hashing it for every message would cost more than all the rest here.
    pub key: DeviceKey,
    pub filter: Vec<Accepted>,
}

/// A conversation with its first message; a further sender in it; a record or row of another kind. Tables that double are
/// half empty at times.
const CONVERSATION_BYTES: usize = 640;
const SENDER_BYTES: usize = 2 * size_of::<Sender>();
const OTHER_BYTES: usize = 640;

impl Overlay {
    /// An empty one; records of this run follow.
    pub fn new(run: u64) -> Self {
        Self { run, ..Self::default() }
    }

    /// One of a start, that reads what the index may have.
    pub fn of_replay(run: u64) -> Self {
        Self { replayed: true, ..Self::new(run) }
    }

    /// Takes a record in. Errors: the sender of its message is no name, and nothing was taken in.
    #[inline]
    pub fn apply(&mut self, indexed: Indexed<'_>, place: Place) -> Result<(), DiskError> {
        self.records += indexed.records();
        match indexed {
            Indexed::Message(message) => self.add(&message, place)?,
            Indexed::Burst(burst) => self.add_burst(&burst, place)?,
            Indexed::Change { message, rows } => {
                if let Some(message) = message {
                    self.add(&message, place)?;
                }
                self.records += rows.len();
                self.bytes += rows.len() * OTHER_BYTES;
                rows.into_iter().for_each(|row| self.put(row));
            }
            Indexed::Other(record) => {
                self.bytes += OTHER_BYTES;
                self.apply_other(record);
            }
        }
        Ok(())
    }

    /// Whether it is time for a flush.
    pub fn is_full(&self, options: &EmbeddedOptions) -> bool {
        self.records >= options.flush_records_max || self.bytes >= options.flush_bytes_max
    }

    #[inline]
    fn add(&mut self, message: &IndexedMessage<'_>, place: Place) -> Result<(), DiskError> {
        let before = self.conversations.len();
        self.bytes += self.conversations.entry(message.conversation).or_default().add(message, place, &self.hasher)?;
        self.bytes += CONVERSATION_BYTES * (self.conversations.len() - before);
        Ok(())
    }

    #[inline]
    fn add_burst(&mut self, burst: &Burst<'_>, place: Place) -> Result<(), DiskError> {
        let mut messages = burst.indexed();
        let Some(first) = messages.next() else { return Ok(()) };
        let before = self.conversations.len();
        let recent = self.conversations.entry(first.conversation).or_default();
        self.bytes += recent.add_all((&first, messages), burst.messages(), place, &self.hasher)?;
        self.bytes += CONVERSATION_BYTES * (self.conversations.len() - before);
        Ok(())
    }

    fn apply_other(&mut self, record: Record) {
        match record {
            Record::Message(_) | Record::Change(_) => debug_assert!(false, "a message is indexed without its body"),
            Record::User(user) => {
                self.users.insert(user.name.clone(), (self.run, user));
            }
            Record::Conversation { conversation, members, created_ms } => {
                for member in &members {
                    self.lists.insert((member.clone(), conversation));
                }
                let head = &mut self.conversations.entry(conversation).or_default().head;
                head.created = Some(Created { members, created_ms });
            }
            Record::Cursor { user, device, conversation, seq } => {
                let cursor = self.cursors.entry((DeviceKey::new(&user, device), conversation)).or_default();
                *cursor = seq.max(*cursor);
            }
        }
    }

    fn put(&mut self, row: Row) {
        if let RowKey::Member(conversation, user) = &row.key {
            self.lists.insert((user.clone(), *conversation));
        }
        let key = row.key.encode();
        if self.rows.get(&key).is_none_or(|kept| kept.stamp <= row.stamp) {
            if let Some(gone) = dropped_device(&row) {
                self.cursors.retain(|(device, _), _| *device != gone);
                self.dropped.insert(gone);
            }
            self.rows.insert(key, row);
        }
    }

    /// Rows with a key above `after` that begin with `prefix`, up to the `limit`-th that has a value.
    pub fn rows_above(&self, prefix: &[u8], after: &[u8], limit: usize) -> Vec<(Vec<u8>, Row)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let mut values = 0;
        let all = self.rows.range::<[u8], _>((Excluded(after), Unbounded));
        let own = all.take_while(|(key, row)| {
            values += usize::from(row.value.is_some());
            key.starts_with(prefix) && values <= limit
        });
        own.map(|(key, row)| (key.clone(), row.clone())).collect()
    }

    /// Forgets all rows. Only after a flush made it all visible in the index.
    pub fn clear(&mut self) {
        // New tables, because the old ones keep the room of the largest burst.
        *self = Self { replayed: self.replayed, ..Self::new(self.run) };
    }

    /// Conversations of a user above `cursor`, rising, at most `limit`.
    pub fn conversations_of(&self, user: &UserName, cursor: ConversationId, limit: usize) -> Vec<ConversationId> {
        let after = (std::ops::Bound::Excluded((user.clone(), cursor)), std::ops::Bound::Unbounded);
        let own = self.lists.range(after).take_while(|(owner, _)| owner == user);
        own.map(|&(_, conversation)| conversation).take(limit).collect()
    }
}

impl Recent {
    /// It began since the last flush, its first message with it: the index knows nothing of it. A repair makes the record
    /// of a conversation anew, but no first message.
    pub fn is_new(&self) -> bool {
        self.head.created.is_some() && self.head.lowest == Seq(1)
    }

    /// Gives the memory that it takes more.
    #[inline]
    fn add(&mut self, message: &IndexedMessage<'_>, place: Place, hasher: &RandomState) -> Result<usize, DiskError> {
        self.add_all((message, std::iter::empty()), 1, place, hasher)
    }

    /// So many messages of one record: the first, and the others of the same sender.
    #[inline]
    fn add_all<'a>(
        &mut self,
        (first, others): (&IndexedMessage<'a>, impl Iterator<Item = IndexedMessage<'a>>),
        messages: u16,
        place: Place,
        hasher: &RandomState,
    ) -> Result<usize, DiskError> {
        let (sender, mut bytes) = sender_of(&mut self.senders, first, hasher)?;
        let filter = sender.filter.capacity();
        let (seq, mut last) = (first.accepted.seq, first.accepted);
        remember(&mut sender.filter, last);
        for message in others {
            last = message.accepted;
            remember(&mut sender.filter, last);
        }
        bytes += (sender.filter.capacity() - filter) * size_of::<Accepted>();
        self.head.add(seq, first.accepted.time_ms);
        self.head.add(last.seq, last.time_ms);
        let places = self.places.bytes();
        self.places.add(seq, messages.into(), place);
        Ok(bytes + self.places.bytes() - places)
    }
}

/// The sender of a message, and the memory that it takes more. Errors: it is no name.
#[inline]
fn sender_of<'a>(
    senders: &'a mut HashTable<Sender>,
    message: &IndexedMessage<'_>,
    hasher: &RandomState,
) -> Result<(&'a mut Sender, usize), DiskError> {
    let (name, device) = (message.from_bytes, message.device);
    let hash = hasher.hash_one((name, device));
    let known = |sender: &Sender| sender.device == device && sender.user.as_str().as_bytes() == name;
    let hash_of = |sender: &Sender| hasher.hash_one((sender.user.as_str().as_bytes(), sender.device));
    match senders.entry(hash, known, hash_of) {
        Entry::Occupied(sender) => Ok((sender.into_mut(), 0)),
        Entry::Vacant(place) => {
            let user = message.from()?;
            let sender = Sender { key: DeviceKey::new(&user, device), user, device, filter: Vec::new() };
            Ok((place.insert(sender).into_mut(), SENDER_BYTES))
        }
    }
}
