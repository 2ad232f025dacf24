//! What a batch of records makes of the tables: the columns of a few statements, whatever the size of the batch. Pure.
//!
//! Invariant: to apply these is to apply the records one after the other. Of what replaces each other within the batch
//! only the last is sent, because one statement may touch a row once.

use std::collections::{BTreeMap, HashMap};

use ringline_schema::ids::{ConversationId, DeviceKey, UserName};
use ringline_schema::record::{Record, StoredMessage, User};
use ringline_schema::rows::{Row, RowKey};

use super::retainer::MESSAGE_BYTES;
use super::values::{Id, stored};
use crate::dropped_device;

/// Messages, a vector a column.
#[derive(Debug, Default)]
pub(super) struct Messages<'a> {
    pub conversation: Vec<Id>,
    pub seq: Vec<i64>,
    pub device: Vec<i64>,
    pub client_seq: Vec<i64>,
    pub time_ms: Vec<i64>,
    pub body_hash: Vec<i64>,
    pub device_key: Vec<Id>,
    pub kind: Vec<i16>,
    pub sender: Vec<&'a str>,
    pub receiver: Vec<&'a str>,
    pub body: Vec<&'a [u8]>,
    pub extra: Vec<Option<Vec<u8>>>,
    /// Of all of them, as retention counts.
    pub bytes: i64,
}

#[derive(Debug, Default)]
pub(super) struct Users<'a> {
    pub name: Vec<&'a str>,
    pub password_hash: Vec<Option<&'a str>>,
    pub created_ms: Vec<i64>,
}

#[derive(Debug, Default)]
pub(super) struct Conversations<'a> {
    pub conversation: Vec<Id>,
    pub one: Vec<&'a str>,
    pub other: Vec<&'a str>,
    pub created_ms: Vec<i64>,
}

#[derive(Debug, Default)]
pub(super) struct Lists<'a> {
    pub name: Vec<&'a str>,
    pub conversation: Vec<Id>,
}

#[derive(Debug, Default)]
pub(super) struct Cursors {
    pub device_key: Vec<Id>,
    pub conversation: Vec<Id>,
    pub seq: Vec<i64>,
}

/// Devices that are gone, by the rows that say so.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    pub device_key: Vec<Id>,
    pub key: Vec<Vec<u8>>,
    pub stamp: Vec<i64>,
}

#[derive(Debug, Default)]
pub(super) struct Keyed {
    pub key: Vec<Vec<u8>>,
    pub stamp: Vec<i64>,
    pub value: Vec<Option<Vec<u8>>>,
}

/// See the module. To be applied in the order of the fields.
#[derive(Debug, Default)]
pub(super) struct Columns<'a> {
    /// Whose rows are written, rising.
    pub partitions: Vec<i16>,
    pub users: Users<'a>,
    pub conversations: Conversations<'a>,
    pub lists: Lists<'a>,
    pub messages: Messages<'a>,
    pub dropped: Dropped,
    pub cursors: Cursors,
    pub keyed: Keyed,
}

impl<'a> Columns<'a> {
    pub fn of(records: &'a [Record]) -> Self {
        let mut merged = Merged::default();
        let mut columns = Self::default();
        for record in records {
            columns.partitions.push(record.partition().number() as i16);
            columns.add(record, &mut merged);
        }
        columns.partitions.sort_unstable();
        columns.partitions.dedup();
        columns.finish(merged);
        columns
    }

    fn add(&mut self, record: &'a Record, merged: &mut Merged<'a>) {
        match record {
            Record::Message(message) => self.messages.add(message),
            Record::User(user) => drop(merged.users.insert(&user.name, user)),
            Record::Conversation { conversation, members, created_ms } => {
                for member in members {
                    merged.lists.insert((member.as_str(), *conversation), ());
                }
                merged.conversations.insert(*conversation, (members, *created_ms));
            }
            Record::Cursor { user, device, conversation, seq } => {
                let cursor = merged.cursors.entry((DeviceKey::new(user, *device).0, *conversation)).or_default();
                *cursor = seq.0.max(*cursor);
            }
            Record::Change(change) => {
                if let Some(message) = &change.message {
                    self.messages.add(message);
                }
                change.rows.iter().for_each(|row| self.put(row, merged));
            }
        }
    }

    fn put(&mut self, row: &'a Row, merged: &mut Merged<'a>) {
        if let RowKey::Member(conversation, user) = &row.key {
            merged.lists.insert((user.as_str(), *conversation), ());
        }
        let key = row.key.encode();
        if merged.rows.get(&key).is_some_and(|kept| kept.stamp > row.stamp) {
            return;
        }
        if let Some(gone) = dropped_device(row) {
            merged.cursors.retain(|(device, _), _| *device != gone.0);
            self.dropped.device_key.push(gone.into());
            self.dropped.key.push(key.clone());
            self.dropped.stamp.push(stored(row.stamp));
        }
        merged.rows.insert(key, row);
    }

    fn finish(&mut self, merged: Merged<'a>) {
        for user in merged.users.into_values() {
            self.users.name.push(user.name.as_str());
            self.users.password_hash.push(user.password_hash.as_deref());
            self.users.created_ms.push(stored(user.created_ms));
        }
        for (conversation, ([one, other], created_ms)) in merged.conversations {
            self.conversations.conversation.push(conversation.into());
            self.conversations.one.push(one.as_str());
            self.conversations.other.push(other.as_str());
            self.conversations.created_ms.push(stored(created_ms));
        }
        for (name, conversation) in merged.lists.into_keys() {
            self.lists.name.push(name);
            self.lists.conversation.push(conversation.into());
        }
        for ((device, conversation), seq) in merged.cursors {
            self.cursors.device_key.push(Id(device));
            self.cursors.conversation.push(conversation.into());
            self.cursors.seq.push(stored(seq));
        }
        for (key, row) in merged.rows {
            self.keyed.key.push(key);
            self.keyed.stamp.push(stored(row.stamp));
            self.keyed.value.push(row.value.as_ref().map(ringline_schema::rows::RowValue::encode));
        }
    }
}

impl<'a> Messages<'a> {
    fn add(&mut self, message: &'a StoredMessage) {
        self.conversation.push(message.conversation.into());
        self.seq.push(stored(message.seq.0));
        self.device.push(stored(message.device.0));
        self.client_seq.push(stored(message.client_seq));
        self.time_ms.push(stored(message.time_ms));
        self.body_hash.push(stored(message.accepted().body_hash));
        self.device_key.push(DeviceKey::new(&message.from, message.device).into());
        self.kind.push(message.kind as i16);
        self.sender.push(message.from.as_str());
        self.receiver.push(message.to.as_str());
        self.body.push(&message.body);
        let extra = message.extra.as_ref().map(|extra| extra.encode());
        self.bytes += MESSAGE_BYTES + (message.body.len() + extra.as_ref().map_or(0, Vec::len)) as i64;
        self.extra.push(extra);
    }
}

/// What may replace each other.
#[derive(Default)]
struct Merged<'a> {
    users: HashMap<&'a UserName, &'a User>,
    /// In order as well: retention locks several at once.
    conversations: BTreeMap<ConversationId, (&'a [UserName; 2], u64)>,
    lists: HashMap<(&'a str, ConversationId), ()>,
    cursors: HashMap<(u128, ConversationId), u64>,
    /// In the order of keys, so that rows are locked in one order everywhere.
    rows: BTreeMap<Vec<u8>, &'a Row>,
}

#[cfg(test)]
mod tests {
    use ringline_schema::ids::{DeviceId, Seq};
    use ringline_schema::message::DeviceKind;
    use ringline_schema::record::Change;
    use ringline_schema::rows::{DeviceRow, RowValue};

    use super::*;
    use crate::conformance::{Pair, name};

    #[test]
    fn a_row_is_touched_once_and_the_last_counts() {
        let pair = Pair::new("ann", "bob");
        let user = |created_ms| Record::User(User { name: name("ann"), password_hash: None, created_ms });
        let cursor = |device, seq| Record::Cursor {
            user: name("ann"),
            device: DeviceId(device),
            conversation: pair.id,
            seq: Seq(seq),
        };
        let device = |stamp, alive: bool| {
            let (kind, agent) = (DeviceKind::Phone, String::new());
            let value = alive.then_some(RowValue::Device(DeviceRow { kind, agent, first_ms: 1, last_ms: 1 }));
            let rows = vec![Row { key: RowKey::Device(name("ann"), DeviceId(1)), stamp, value }];
            Record::Change(Box::new(Change { message: None, rows }))
        };
        let records = [
            pair.record(),
            pair.record(),
            user(1),
            user(2),
            cursor(1, 9),
            cursor(2, 5),
            cursor(2, 4),
            device(2, false),
            cursor(1, 3),
            device(1, true),
            pair.message(1).into(),
        ];
        let columns = Columns::of(&records);
        assert_eq!((columns.users.name.len(), columns.users.created_ms[0]), (1, 2));
        assert_eq!((columns.conversations.conversation.len(), columns.lists.name.len()), (1, 2));
        let mut seqs = columns.cursors.seq.clone();
        seqs.sort_unstable();
        assert_eq!(seqs, [3, 5], "what the device had before it went is forgotten");
        assert_eq!((columns.keyed.stamp.as_slice(), &columns.keyed.value[0]), (&[2][..], &None));
        assert_eq!((columns.dropped.stamp.len(), columns.messages.seq.as_slice()), (1, &[1][..]));
        let mut partitions = vec![pair.id.partition().number() as i16, name("ann").partition().number() as i16];
        partitions.sort_unstable();
        partitions.dedup();
        assert_eq!(columns.partitions, partitions);
    }
}
