//! The memory backend: tables behind one lock, for tests and the simulator. It forgets with its last handle.
//!
//! Owned by whoever holds a handle; all handles of a node share one state. A record is visible and "durable" at
//! `submit`. Written apart from the embedded backend on purpose: each is the other's check.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringline_schema::ids::{ConversationId, ConversationKind, DeviceKey, Seq, UserName};
use ringline_schema::message::Standing;
use ringline_schema::record::{Accepted, Answer, ConversationRow, Head, Query, Range, Record, StoredMessage, User};
use ringline_schema::rows::{GroupRow, MarkRow, MemberRow, ReceiptRow, Row, RowKey, RowList, RowValue};

use crate::shown::{self, Reader};
use crate::{
    LoadToken, Lsn, RECORD_BYTES_MAX, Refused, Store, StoreError, StoreEvent, StoreStats, dropped_device, large_bytes,
    newest, readable, remember, span,
};

/// Bytes (by `Record::weight`) that wait for a submit; more is `Full`. Always room for one largest record.
pub const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Open questions of a handle; more is `Full`.
pub const LOADS_MAX: usize = 4096;

const _: () = assert!(QUEUE_BYTES_MAX >= RECORD_BYTES_MAX + 1024);

/// A fresh store with one handle a shard.
pub fn open(shards: u16) -> Vec<MemoryStore> {
    let tables = Arc::new(Mutex::new(Tables::default()));
    (0..shards).map(|_| MemoryStore::new(Arc::clone(&tables))).collect()
}

/// One shard's handle; see [`Store`].
pub struct MemoryStore {
    tables: Arc<Mutex<Tables>>,
    queued: Vec<Record>,
    queued_bytes: usize,
    last: Lsn,
    events: Vec<StoreEvent>,
    loads: VecDeque<(LoadToken, Query)>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The next submit fails.
    Failing,
    /// Failed or closed.
    Stopped,
}

impl MemoryStore {
    fn new(tables: Arc<Mutex<Tables>>) -> Self {
        Self {
            tables,
            queued: Vec::new(),
            queued_bytes: 0,
            last: Lsn::default(),
            events: Vec::new(),
            loads: VecDeque::new(),
            state: State::Open,
        }
    }

    /// New handles on the same state, as a restart with `shards` shards would have. What this or any other handle has
    /// queued and not submitted stays out of it.
    pub fn reopen(&self, shards: u16) -> Vec<Self> {
        (0..shards).map(|_| Self::new(Arc::clone(&self.tables))).collect()
    }

    /// Lets the next `submit` that has something to commit fail, as a broken disk would.
    pub fn fail_next_commit(&mut self) {
        if self.state == State::Open {
            self.state = State::Failing;
        }
    }

    /// Lets go of the messages of a conversation below `floor`, as retention does.
    pub fn let_go(&self, conversation: ConversationId, floor: Seq) {
        if let Some(found) = self.tables().conversations.get_mut(&conversation) {
            while let Some(oldest) = found.messages.first_entry().filter(|oldest| *oldest.key() < floor) {
                let message = oldest.remove();
                found.gone = (message.seq.next(), message.time_ms);
            }
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // A panic of another holder leaves whole records behind: each is applied under one lock.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn append(&mut self, record: &Record) -> Result<Lsn, StoreError> {
        if self.state == State::Stopped {
            return Err(StoreError::Poisoned);
        }
        if large_bytes(record) > RECORD_BYTES_MAX {
            return Err(StoreError::TooLarge);
        }
        let bytes = self.queued_bytes + record.weight();
        if bytes > QUEUE_BYTES_MAX {
            return Err(StoreError::Full);
        }
        self.queued_bytes = bytes;
        self.queued.push(record.clone());
        self.last = Lsn(self.last.0 + 1);
        Ok(self.last)
    }

    fn submit(&mut self) {
        if self.queued.is_empty() || self.state == State::Stopped {
            return;
        }
        self.queued_bytes = 0;
        let queued = std::mem::take(&mut self.queued);
        if self.state == State::Failing {
            self.state = State::Stopped;
            self.events.push(StoreEvent::Failed);
            return;
        }
        let mut tables = self.tables();
        for record in queued {
            tables.apply(record);
        }
        drop(tables);
        self.events.push(StoreEvent::Committed(self.last));
    }

    fn load(&mut self, token: LoadToken, query: Query) -> Result<(), Refused> {
        if self.state == State::Stopped {
            return Err(Refused { error: StoreError::Poisoned, query: Box::new(query) });
        }
        if self.loads.len() >= LOADS_MAX {
            return Err(Refused { error: StoreError::Full, query: Box::new(query) });
        }
        self.loads.push_back((token, query));
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<StoreEvent>) {
        events.append(&mut self.events);
        while let Some((token, query)) = self.loads.pop_front() {
            let answer = self.tables().answer(&query);
            events.push(StoreEvent::Loaded(token, answer));
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn close(&mut self) -> Result<(), StoreError> {
        self.submit();
        let was = std::mem::replace(&mut self.state, State::Stopped);
        if was == State::Stopped { Err(StoreError::Poisoned) } else { Ok(()) }
    }

    fn stats(&self) -> StoreStats {
        StoreStats::new()
    }
}

#[derive(Default)]
struct Tables {
    users: HashMap<UserName, User>,
    conversations: HashMap<ConversationId, Conversation>,
    lists: BTreeMap<(UserName, ConversationId), ()>,
    cursors: HashMap<(DeviceKey, ConversationId), Seq>,
    /// By the bytes of their keys.
    rows: BTreeMap<Vec<u8>, Row>,
}

#[derive(Default)]
struct Conversation {
    members: Option<[UserName; 2]>,
    created_ms: u64,
    messages: BTreeMap<Seq, StoredMessage>,
    filters: HashMap<DeviceKey, Vec<Accepted>>,
    /// Behind the last message that was let go, and its time.
    gone: (Seq, u64),
}

impl Conversation {
    fn first(&self) -> Seq {
        self.messages.first_key_value().map_or(self.gone.0, |(&seq, _)| seq)
    }

    fn head(&self) -> Seq {
        self.messages.last_key_value().map_or(Seq(self.gone.0.0.saturating_sub(1)), |(&seq, _)| seq)
    }

    fn last_time_ms(&self) -> u64 {
        let gone = if self.gone.0 == Seq::ZERO { self.created_ms } else { self.gone.1 };
        self.messages.last_key_value().map_or(gone, |(_, message)| message.time_ms)
    }
}

impl Tables {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Message(message) => self.add(Arc::unwrap_or_clone(message)),
            Record::Change(change) => {
                if let Some(message) = change.message {
                    self.add(Arc::unwrap_or_clone(message));
                }
                change.rows.into_iter().for_each(|row| self.put(row));
            }
            Record::User(user) => {
                self.users.insert(user.name.clone(), user);
            }
            Record::Conversation { conversation, members, created_ms } => {
                for member in &members {
                    self.lists.insert((member.clone(), conversation), ());
                }
                let entry = self.conversations.entry(conversation).or_default();
                entry.members = Some(members);
                entry.created_ms = created_ms;
            }
            Record::Cursor { user, device, conversation, seq } => {
                let cursor = self.cursors.entry((DeviceKey::new(&user, device), conversation)).or_default();
                *cursor = seq.max(*cursor);
            }
        }
    }

    fn add(&mut self, message: StoredMessage) {
        let conversation = self.conversations.entry(message.conversation).or_default();
        let device = DeviceKey::new(&message.from, message.device);
        remember(conversation.filters.entry(device).or_default(), message.accepted());
        conversation.messages.insert(message.seq, message);
    }

    fn put(&mut self, row: Row) {
        if let RowKey::Member(conversation, user) = &row.key {
            self.lists.insert((user.clone(), *conversation), ());
        }
        let key = row.key.encode();
        if self.rows.get(&key).is_none_or(|kept| kept.stamp <= row.stamp) {
            if let Some(gone) = dropped_device(&row) {
                self.cursors.retain(|(device, _), _| *device != gone);
            }
            self.rows.insert(key, row);
        }
    }

    fn value(&self, key: &RowKey) -> Option<&RowValue> {
        self.rows.get(&key.encode()).and_then(|row| row.value.as_ref())
    }

    fn member(&self, conversation: ConversationId, user: &UserName) -> Option<&MemberRow> {
        match self.value(&RowKey::Member(conversation, user.clone())) {
            Some(RowValue::Member(member)) => Some(member),
            _ => None,
        }
    }

    fn group(&self, conversation: ConversationId) -> Option<&GroupRow> {
        match self.value(&RowKey::Group(conversation)) {
            Some(RowValue::Group(group)) => Some(group),
            _ => None,
        }
    }

    fn list(&self, list: &RowList, after: Option<&RowKey>, limit: u16) -> Vec<Row> {
        let prefix = list.prefix();
        let rows = self.rows.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
        let after = after.map(RowKey::encode);
        let rows = rows.filter(|(key, row)| row.value.is_some() && after.as_ref().is_none_or(|after| *key > after));
        rows.map(|(_, row)| row.clone()).take(usize::from(limit)).collect()
    }

    fn group_count(&self, user: &UserName) -> u32 {
        let own = self.lists.keys().filter(|(owner, _)| owner == user);
        let present = own.filter(|(user, conversation)| {
            self.member(*conversation, user).is_some_and(|member| member.standing == Standing::Member)
                && self.group(*conversation).is_some_and(|group| group.dissolved == Seq::ZERO)
        });
        present.count() as u32
    }

    fn answer(&self, query: &Query) -> Answer {
        match query {
            Query::User { name } => Answer::User(self.users.get(name).cloned()),
            Query::Head { conversation, device } => Answer::Head(self.head(*conversation, *device)),
            Query::Messages { conversation, range, reader: None } => {
                self.messages(*conversation, range, Reader::default())
            }
            Query::Messages { conversation, range, reader: Some(reader) } => {
                self.messages_for(*conversation, range, reader)
            }
            Query::Row { key } => Answer::Row(self.rows.get(&key.encode()).filter(|row| row.value.is_some()).cloned()),
            Query::Rows { list, after, limit } => Answer::Rows(self.list(list, after.as_ref(), *limit)),
            Query::GroupCount { user } => Answer::Count(self.group_count(user)),
            Query::Listed { user, device, rows } => {
                Answer::Conversations(rows.iter().map(|row| self.laid_over(user, *device, row)).collect())
            }
            Query::Conversations { user, device, cursor, limit } => {
                let after = (std::ops::Bound::Excluded((user.clone(), *cursor)), std::ops::Bound::Unbounded);
                let rows = self.lists.range(after).take_while(|((owner, _), ())| owner == user);
                let rows = rows.filter_map(|((_, conversation), ())| self.row(user, *device, *conversation));
                Answer::Conversations(rows.take(usize::from(*limit)).collect())
            }
        }
    }

    fn head(&self, conversation: ConversationId, device: DeviceKey) -> Head {
        let Some(found) = self.conversations.get(&conversation) else {
            return Head::default();
        };
        let filter = found.filters.get(&device).map_or(Vec::new(), |filter| newest(filter).to_vec());
        Head { exists: true, first: found.first(), head: found.head(), filter }
    }

    fn messages(&self, conversation: ConversationId, range: &Range, reader: Reader<'_>) -> Answer {
        let Some(found) = self.conversations.get(&conversation) else {
            return Answer::Messages { first: Seq::ZERO, head: Seq::ZERO, messages: Vec::new() };
        };
        let shown = |message: &StoredMessage| self.shown(found, message, reader);
        let inside = |seq: Seq| seq > range.after && range.before.is_none_or(|before| seq < before);
        let matching = found.messages.values().filter(|message| inside(message.seq)).map(shown);
        let mut bytes = 0;
        let mut fits = |message: &StoredMessage| {
            let first = bytes == 0;
            bytes += message.bytes().max(1);
            first || bytes <= range.bytes_max as usize
        };
        let limit = usize::from(range.limit);
        let messages = if range.newest {
            let mut newest: Vec<_> = matching.rev().take(limit).take_while(&mut fits).collect();
            newest.reverse();
            newest
        } else {
            matching.take(limit).take_while(&mut fits).collect()
        };
        Answer::Messages { first: found.first(), head: found.head(), messages }
    }

    /// A message as this reader is shown it.
    fn shown(&self, found: &Conversation, message: &StoredMessage, reader: Reader<'_>) -> StoredMessage {
        let id = message.conversation;
        let row = |seq| match self.value(&RowKey::Amended(id, seq)) {
            Some(RowValue::Amended(row)) => Some(row),
            _ => None,
        };
        let key = |user: &UserName, seq| RowKey::Hidden(user.clone(), id, seq);
        let hidden = |seq| reader.user.is_some_and(|user| self.value(&key(user, seq)).is_some());
        match (message.amends(), row(message.seq)) {
            (Some((of, _)), _) => shown::amendment(message.clone(), row(of).filter(|_| !hidden(of))),
            (None, _) if hidden(message.seq) => message.clone().hidden(),
            (None, Some(row)) => {
                let edit = reader.edit(row).and_then(|by| found.messages.get(&by));
                shown::original(message.clone(), row, edit.cloned())
            }
            (None, None) => message.clone(),
        }
    }

    fn messages_for(&self, conversation: ConversationId, range: &Range, reader: &UserName) -> Answer {
        if conversation.kind() != Some(ConversationKind::Group) {
            return self.messages(conversation, range, Reader { user: Some(reader), member: None });
        }
        let member = self.member(conversation, reader).filter(|member| !member.ranges.is_empty());
        let (Some(member), Some(found)) = (member, self.conversations.get(&conversation)) else {
            return Answer::NotReadable;
        };
        let part = readable(member, (found.first(), found.head()), range);
        match self.messages(conversation, &part.range, Reader { user: Some(reader), member: Some(member) }) {
            Answer::Messages { messages, .. } => Answer::Messages { first: part.first, head: part.head, messages },
            other => other,
        }
    }

    /// A row of another node with what is kept here of the user.
    fn laid_over(&self, user: &UserName, device: DeviceKey, row: &ConversationRow) -> ConversationRow {
        let (mut row, conversation) = (row.clone(), row.conversation);
        let acked = self.cursors.get(&(device, conversation)).copied().unwrap_or_default();
        row.acked = row.acked.max(acked);
        if let Some(RowValue::Mark(mark)) = self.value(&RowKey::Mark(user.clone(), conversation)) {
            (row.pinned, row.muted_until_ms) = (mark.pinned, mark.muted_until_ms);
        }
        row
    }

    fn row(&self, user: &UserName, device: DeviceKey, conversation: ConversationId) -> Option<ConversationRow> {
        let nothing = Conversation::default();
        let mark = match self.value(&RowKey::Mark(user.clone(), conversation)) {
            Some(RowValue::Mark(mark)) => *mark,
            _ => MarkRow::default(),
        };
        let receipt = match self.value(&RowKey::Receipt(conversation, user.clone())) {
            Some(RowValue::Receipt(receipt)) => *receipt,
            _ => ReceiptRow::default(),
        };
        let found = self.conversations.get(&conversation).unwrap_or(&nothing);
        let mut row = ConversationRow {
            conversation,
            with: user.clone(),
            first: found.first(),
            head: found.head(),
            last_time_ms: found.last_time_ms(),
            acked: self.cursors.get(&(device, conversation)).copied().unwrap_or_default(),
            read: receipt.read,
            pinned: mark.pinned,
            muted_until_ms: mark.muted_until_ms,
            standing: None,
            title: String::new(),
        };
        if conversation.kind() == Some(ConversationKind::Group) {
            let (group, member) = (self.group(conversation)?, self.member(conversation, user)?);
            (row.first, row.head) = span(member, (row.first, row.head));
            if member.standing != Standing::Member {
                row.last_time_ms = member.since_ms;
            }
            (row.with, row.title, row.standing) = (group.name.clone(), group.title.clone(), Some(member.standing));
        } else {
            let [one, other] = found.members.as_ref()?;
            row.with = if one == user { other.clone() } else { one.clone() };
        }
        Some(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;

    #[test]
    fn passes_the_conformance_suite() {
        for case in conformance::CASES {
            let mut kept: Option<MemoryStore> = None;
            (case.check)(&mut |shards| {
                let handles = kept.as_ref().map_or_else(|| open(shards), |store| store.reopen(shards));
                kept = handles.first().map(|store| store.reopen(1).remove(0));
                handles.into_iter().map(|store| Box::new(store) as Box<dyn Store>).collect()
            });
        }
    }

    #[test]
    fn a_failing_commit_poisons() {
        let mut store = open(1).remove(0);
        let user = Record::User(User { name: UserName::new("ann").unwrap(), password_hash: None, created_ms: 1 });
        store.fail_next_commit();
        store.append(&user).unwrap();
        store.submit();
        let mut events = Vec::new();
        store.poll(&mut events);
        assert_eq!(events, [StoreEvent::Failed]);
        assert!(matches!(store.append(&user), Err(StoreError::Poisoned)));
        assert!(matches!(store.close(), Err(StoreError::Poisoned)));
    }
}
