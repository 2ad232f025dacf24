//! Bytes of a [`Record`]: `rkyv` archives, checked on access, without alignment demands.
//!
//! A plain message is written and read by hand, see [`message`]; its bytes are those of the archive. Several of one sender
//! in a row are one record, see [`burst`].
//!
//! The frame around them (length, checksum, type, version) is the log's. A type number is never reused; a changed
//! layout is a new type number, so a log tells its own format record by record.

use std::sync::Arc;

use bytes::Bytes;
use rkyv::rancor::Error;
use rkyv::util::AlignedVec;
use rkyv::with::InlineAsBox;
use rkyv::{Archive, Serialize};

mod burst;
mod message;

pub use burst::{BURST_BYTES_MAX, BURST_MESSAGES_MAX, Burst, BurstWriter};

use crate::ids::{ConversationId, DeviceId, Seq, UserName, body_hash};
use crate::message::BodyKind;
use crate::record::{Accepted, Change, Record, StoredExtra, StoredMessage, User, sent_hash};
use crate::rows::{Row, decode_rows, encode_rows};

/// What the payload of a log record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordType {
    Message = 1,
    User = 2,
    Conversation = 3,
    Cursor = 4,
    /// A message with more than a plain one has, rows, or both.
    Change = 5,
    /// Several plain messages, see [`Burst`].
    Burst = 6,
}

impl RecordType {
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Message),
            2 => Some(Self::User),
            3 => Some(Self::Conversation),
            4 => Some(Self::Cursor),
            5 => Some(Self::Change),
            6 => Some(Self::Burst),
            _ => None,
        }
    }
}

/// A payload that is not an archive of its type, or holds a value outside its rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("record does not decode: {0}")]
pub struct DiskError(String);

#[derive(Archive, Serialize)]
struct DiskUser<'a> {
    created_ms: u64,
    #[rkyv(with = InlineAsBox)]
    name: &'a str,
    /// Empty: none.
    #[rkyv(with = InlineAsBox)]
    password_hash: &'a str,
}

#[derive(Archive, Serialize)]
struct DiskConversation<'a> {
    conversation: u128,
    created_ms: u64,
    #[rkyv(with = InlineAsBox)]
    low: &'a str,
    #[rkyv(with = InlineAsBox)]
    high: &'a str,
}

#[derive(Archive, Serialize)]
struct DiskCursor<'a> {
    conversation: u128,
    seq: u64,
    device: u64,
    #[rkyv(with = InlineAsBox)]
    user: &'a str,
}

/// A message with its extra and the rows beside it. Without a message, `seq` is 0 and all about it is empty.
#[derive(Archive, Default, Serialize)]
struct DiskChange<'a> {
    conversation: u128,
    seq: u64,
    device: u64,
    client_seq: u64,
    time_ms: u64,
    kind: u8,
    #[rkyv(with = InlineAsBox)]
    from: &'a str,
    #[rkyv(with = InlineAsBox)]
    to: &'a str,
    #[rkyv(with = InlineAsBox)]
    body: &'a [u8],
    /// Packed; empty: none.
    #[rkyv(with = InlineAsBox)]
    extra: &'a [u8],
    /// Packed.
    #[rkyv(with = InlineAsBox)]
    rows: &'a [u8],
}

fn disk_change<'a>(message: Option<&'a StoredMessage>, extra: &'a [u8], rows: &'a [u8]) -> DiskChange<'a> {
    let Some(message) = message else { return DiskChange { rows, ..Default::default() } };
    DiskChange {
        conversation: message.conversation.0,
        seq: message.seq.0,
        device: message.device.0,
        client_seq: message.client_seq,
        time_ms: message.time_ms,
        kind: message.kind as u8,
        from: message.from.as_str(),
        to: message.to.as_str(),
        body: &message.body,
        extra,
        rows,
    }
}

fn packed_extra(message: Option<&StoredMessage>) -> Vec<u8> {
    message.and_then(|message| message.extra.as_deref()).map(StoredExtra::encode).unwrap_or_default()
}

/// Appends the payload of a record to `out` and says its type.
///
/// Fails only if a field is larger than the format can hold, which the wire limits exclude.
pub fn encode(record: &Record, out: &mut AlignedVec) -> Result<RecordType, DiskError> {
    if let Record::Message(message) = record
        && message.extra.is_none()
    {
        message::encode(message, out)?;
        return Ok(RecordType::Message);
    }
    let taken = std::mem::take(out);
    let (record_type, result) = match record {
        Record::Message(message) => {
            let extra = packed_extra(Some(message));
            let disk = disk_change(Some(message), &extra, &[]);
            (RecordType::Change, rkyv::api::high::to_bytes_in::<_, Error>(&disk, taken))
        }
        Record::Change(change) => {
            let (message, rows) = (change.message.as_deref(), encode_rows(&change.rows));
            let extra = packed_extra(message);
            let disk = disk_change(message, &extra, &rows);
            (RecordType::Change, rkyv::api::high::to_bytes_in::<_, Error>(&disk, taken))
        }
        Record::User(user) => {
            let password_hash = user.password_hash.as_deref().unwrap_or_default();
            let disk = DiskUser { created_ms: user.created_ms, name: user.name.as_str(), password_hash };
            (RecordType::User, rkyv::api::high::to_bytes_in::<_, Error>(&disk, taken))
        }
        Record::Conversation { conversation, members: [low, high], created_ms } => {
            let (low, high) = (low.as_str(), high.as_str());
            let disk = DiskConversation { conversation: conversation.0, created_ms: *created_ms, low, high };
            (RecordType::Conversation, rkyv::api::high::to_bytes_in::<_, Error>(&disk, taken))
        }
        Record::Cursor { user, device, conversation, seq } => {
            let disk = DiskCursor { conversation: conversation.0, seq: seq.0, device: device.0, user: user.as_str() };
            (RecordType::Cursor, rkyv::api::high::to_bytes_in::<_, Error>(&disk, taken))
        }
    };
    *out = result.map_err(refused)?;
    Ok(record_type)
}

/// Reads the records of a payload back: the messages of a burst in their order, else one. `payload` may lie at any
/// address; bodies are copied out of it.
pub fn decode(record_type: RecordType, payload: &[u8]) -> Result<Vec<Record>, DiskError> {
    if record_type != RecordType::Burst {
        return decode_one(record_type, payload).map(|record| vec![record]);
    }
    let message = |fields| stored(fields).map(|message| Record::Message(message.into()));
    Burst::read(payload)?.fields().map(message).collect()
}

/// Reads the message of this conversation and seq out of a payload, if it is there.
pub fn decode_message(
    record_type: RecordType,
    payload: &[u8],
    wanted: (ConversationId, Seq),
) -> Result<Option<StoredMessage>, DiskError> {
    let is_wanted = |message: &StoredMessage| (message.conversation, message.seq) == wanted;
    if record_type != RecordType::Burst {
        return Ok(decode_one(record_type, payload)?.into_message().filter(is_wanted));
    }
    let mut fields = Burst::read(payload)?.fields();
    let found = fields.find(|fields| (fields.conversation, fields.seq) == wanted);
    found.map(stored).transpose()
}

/// How many records a payload was made of; it is not looked at more closely.
pub fn records(record_type: RecordType, payload: &[u8]) -> u64 {
    if record_type == RecordType::Burst { burst::said_messages(payload).into() } else { 1 }
}

fn stored(disk: message::Fields<'_>) -> Result<StoredMessage, DiskError> {
    Ok(StoredMessage {
        conversation: disk.conversation,
        seq: disk.seq,
        from: name_of(disk.from)?,
        to: name_of(disk.to)?,
        device: disk.device,
        client_seq: disk.client_seq,
        time_ms: disk.time_ms,
        kind: BodyKind::from_number(disk.kind).ok_or_else(|| DiskError("body kind".into()))?,
        body: Bytes::copy_from_slice(disk.body),
        extra: None,
    })
}

fn decode_one(record_type: RecordType, payload: &[u8]) -> Result<Record, DiskError> {
    let record = match record_type {
        RecordType::Message => Record::Message(Arc::new(stored(message::read(payload)?)?)),
        RecordType::Burst => return Err(DiskError("several messages instead of a record".into())),
        RecordType::Change => change(payload)?,
        RecordType::User => {
            let disk = rkyv::access::<ArchivedDiskUser<'_>, Error>(payload).map_err(refused)?;
            let password_hash = (!disk.password_hash.is_empty()).then(|| disk.password_hash.to_string());
            Record::User(User { name: name(&disk.name)?, password_hash, created_ms: disk.created_ms.to_native() })
        }
        RecordType::Conversation => {
            let disk = rkyv::access::<ArchivedDiskConversation<'_>, Error>(payload).map_err(refused)?;
            Record::Conversation {
                conversation: ConversationId(disk.conversation.to_native()),
                members: [name(&disk.low)?, name(&disk.high)?],
                created_ms: disk.created_ms.to_native(),
            }
        }
        RecordType::Cursor => {
            let disk = rkyv::access::<ArchivedDiskCursor<'_>, Error>(payload).map_err(refused)?;
            Record::Cursor {
                user: name(&disk.user)?,
                device: DeviceId(disk.device.to_native()),
                conversation: ConversationId(disk.conversation.to_native()),
                seq: Seq(disk.seq.to_native()),
            }
        }
    };
    Ok(record)
}

/// A record without what an index leaves in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Indexed<'a> {
    Message(IndexedMessage<'a>),
    Change {
        message: Option<IndexedMessage<'a>>,
        rows: Vec<Row>,
    },
    /// Several plain messages.
    Burst(Burst<'a>),
    /// None of these.
    Other(Record),
}

impl Indexed<'_> {
    /// How many records were made one here.
    pub fn records(&self) -> usize {
        match self {
            Self::Burst(burst) => burst.messages().into(),
            Self::Message(_) | Self::Change { .. } | Self::Other(_) => 1,
        }
    }
}

impl<'a> Burst<'a> {
    /// Each message as an index wants it.
    pub fn indexed(&self) -> impl Iterator<Item = IndexedMessage<'a>> + use<'a> {
        self.fields().map(|fields| indexed(&fields))
    }
}

/// A message without its body and receiver. Its sender's name is as it lies in the record: whoever keeps it asks for
/// [`IndexedMessage::from`], and who knows it already need not check it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexedMessage<'a> {
    pub conversation: ConversationId,
    pub from_bytes: &'a [u8],
    pub device: DeviceId,
    pub accepted: Accepted,
}

impl IndexedMessage<'_> {
    /// The sender. Errors: it is no name.
    pub fn from(&self) -> Result<UserName, DiskError> {
        name_of(self.from_bytes)
    }
}

/// Like [`decode`], but copies no body.
pub fn decode_for_index(record_type: RecordType, payload: &[u8]) -> Result<Indexed<'_>, DiskError> {
    match record_type {
        RecordType::Message => message::read(payload).map(|disk| Indexed::Message(indexed(&disk))),
        RecordType::Burst => Burst::read(payload).map(Indexed::Burst),
        RecordType::Change => change_for_index(payload),
        RecordType::User | RecordType::Conversation | RecordType::Cursor => {
            decode_one(record_type, payload).map(Indexed::Other)
        }
    }
}

#[inline]
fn indexed<'a>(disk: &message::Fields<'a>) -> IndexedMessage<'a> {
    let (client_seq, seq, time_ms) = (disk.client_seq, disk.seq, disk.time_ms);
    let accepted = Accepted { client_seq, seq, time_ms, body_hash: body_hash(disk.body) };
    IndexedMessage { conversation: disk.conversation, from_bytes: disk.from, device: disk.device, accepted }
}

fn change_for_index(payload: &[u8]) -> Result<Indexed<'_>, DiskError> {
    let disk = rkyv::access::<ArchivedDiskChange<'_>, Error>(payload).map_err(refused)?;
    let rows = decode_rows(&disk.rows).map_err(|error| DiskError(error.to_string()))?;
    let seq = Seq(disk.seq.to_native());
    if seq == Seq::ZERO {
        return Ok(Indexed::Change { message: None, rows });
    }
    let extra = if disk.extra.is_empty() { None } else { Some(StoredExtra::decode(&disk.extra)) };
    let extra = extra.transpose().map_err(|error| DiskError(error.to_string()))?;
    let message = IndexedMessage {
        conversation: ConversationId(disk.conversation.to_native()),
        from_bytes: disk.from.as_bytes(),
        device: DeviceId(disk.device.to_native()),
        accepted: Accepted {
            client_seq: disk.client_seq.to_native(),
            seq,
            time_ms: disk.time_ms.to_native(),
            body_hash: sent_hash(&disk.body, extra.as_ref()),
        },
    };
    Ok(if rows.is_empty() { Indexed::Message(message) } else { Indexed::Change { message: Some(message), rows } })
}

/// A message that was written without rows comes back as the message it was.
fn change(payload: &[u8]) -> Result<Record, DiskError> {
    let disk = rkyv::access::<ArchivedDiskChange<'_>, Error>(payload).map_err(refused)?;
    let bad = |error: crate::pack::BadPack| DiskError(error.to_string());
    let rows = decode_rows(&disk.rows).map_err(bad)?;
    let seq = Seq(disk.seq.to_native());
    if seq == Seq::ZERO {
        return Ok(Record::Change(Box::new(Change { message: None, rows })));
    }
    let extra = if disk.extra.is_empty() { None } else { Some(StoredExtra::decode(&disk.extra).map_err(bad)?) };
    let message = StoredMessage {
        conversation: ConversationId(disk.conversation.to_native()),
        seq,
        from: name(&disk.from)?,
        to: name(&disk.to)?,
        device: DeviceId(disk.device.to_native()),
        client_seq: disk.client_seq.to_native(),
        time_ms: disk.time_ms.to_native(),
        kind: BodyKind::from_number(disk.kind).ok_or_else(|| DiskError("body kind".into()))?,
        body: Bytes::copy_from_slice(&disk.body),
        extra: extra.map(Box::new),
    };
    if rows.is_empty() {
        return Ok(Record::Message(message.into()));
    }
    Ok(Record::Change(Box::new(Change { message: Some(message.into()), rows })))
}

fn name(text: &str) -> Result<UserName, DiskError> {
    UserName::new(text).map_err(|_| DiskError("user name".into()))
}

fn name_of(bytes: &[u8]) -> Result<UserName, DiskError> {
    let text = std::str::from_utf8(bytes).map_err(|_| DiskError("user name".into()))?;
    name(text)
}

fn refused(error: Error) -> DiskError {
    DiskError(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MessageState;
    use crate::message::group::What;
    use crate::record::StoredChange;
    use proptest::prelude::*;

    fn samples() -> Vec<Record> {
        let (ann, bob) = (UserName::new("ann").unwrap(), UserName::new("Bøb with a rather long name").unwrap());
        let conversation = ConversationId::direct(&ann, &bob);
        let plain = StoredMessage {
            conversation,
            seq: Seq(7),
            from: ann.clone(),
            to: bob.clone(),
            device: DeviceId(3),
            client_seq: 99,
            time_ms: 1_700_000_000_000,
            kind: BodyKind::Voice,
            body: Bytes::from_static(b"hello \0 there"),
            extra: None,
        };
        let users = vec![bob.clone()];
        let change = Some(StoredChange { what: What::Joined, users: users.clone(), text: "hi".into(), number: 5 });
        let extra = StoredExtra {
            mentions: users,
            mention_all: true,
            refers: Seq(3),
            state: MessageState::Edited,
            amended_ms: 77,
            change,
        };
        let marked = StoredMessage { extra: Some(Box::new(extra)), ..plain.clone() };
        let rows = crate::rows::samples();
        vec![
            Record::Change(Box::new(Change { message: Some(marked.clone().into()), rows: rows.clone() })),
            Record::Change(Box::new(Change { message: Some(plain.clone().into()), rows: rows.clone() })),
            Record::Change(Box::new(Change { message: None, rows })),
            Record::Message(marked.into()),
            Record::Message(plain.into()),
            Record::User(User { name: ann.clone(), password_hash: Some("$argon2id$".into()), created_ms: 5 }),
            Record::User(User { name: bob.clone(), password_hash: None, created_ms: 6 }),
            Record::Conversation { conversation, members: [ann.clone(), bob], created_ms: 8 },
            Record::Cursor { user: ann, device: DeviceId(3), conversation, seq: Seq(7) },
        ]
    }

    #[test]
    fn every_record_survives_the_disk_at_any_address() {
        for record in samples() {
            let mut payload = AlignedVec::new();
            let record_type = encode(&record, &mut payload).unwrap();
            for shift in 0..9 {
                let moved = [&vec![0; shift][..], &payload].concat();
                assert_eq!(decode(record_type, &moved[shift..]).unwrap(), std::slice::from_ref(&record));
            }
        }
    }

    fn without_body(message: &StoredMessage) -> IndexedMessage<'_> {
        let (accepted, conversation) = (message.accepted(), message.conversation);
        IndexedMessage { conversation, from_bytes: message.from.as_str().as_bytes(), device: message.device, accepted }
    }

    #[test]
    fn an_index_sees_the_same_record() {
        for record in samples() {
            let mut payload = AlignedVec::new();
            let record_type = encode(&record, &mut payload).unwrap();
            let indexed = decode_for_index(record_type, &payload).unwrap();
            match record {
                Record::Message(message) => assert_eq!(indexed, Indexed::Message(without_body(&message))),
                Record::Change(change) => {
                    let Change { message, rows } = *change;
                    let message = message.as_deref().map(without_body);
                    assert_eq!(indexed, Indexed::Change { message, rows });
                }
                Record::User(_) | Record::Conversation { .. } | Record::Cursor { .. } => {
                    assert_eq!(indexed, Indexed::Other(record));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_never_a_panic(
            number in 1u8..=6,
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
            garbage in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0usize..64,
        ) {
            let record_type = RecordType::from_number(number).unwrap();
            let _ = (decode(record_type, &garbage), decode_for_index(record_type, &garbage));
            for record in samples() {
                let mut payload = AlignedVec::new();
                let own = encode(&record, &mut payload).unwrap();
                let mut bytes = payload.to_vec();
                let place = at.index(bytes.len());
                bytes[place] = value;
                let _ = (decode(own, &bytes), decode_for_index(own, &bytes));
                let _ = decode(own, &payload[cut.min(payload.len())..]);
            }
        }
    }
}
