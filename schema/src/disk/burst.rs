//! Several messages that one device sent to one conversation in a row, as one record: names, conversation and device stand
//! there once. It is what a durable message of a busy client costs on the disk.
//!
//! The payload is that of the first message, see [`message`], then each further one as a [`HEAD_BYTES`] head and its body,
//! then how many bytes the first has and how many messages there are, each `u16`. Numbers are little endian and lie at
//! any address. The head of a message: how much its client seq and its time are above those of the one before, the length
//! of its body, each `u16`, and its kind, `u8`. Its seq is one above.

use rkyv::util::AlignedVec;

use super::DiskError;
use super::message::{self, Fields};
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::record::StoredMessage;

/// Messages of one record, at most.
pub const BURST_MESSAGES_MAX: u16 = 64;
/// A record of several messages is no larger: who reads one of them reads it whole, and what is damaged of it is lost
/// whole.
pub const BURST_BYTES_MAX: usize = 4096;

const HEAD_BYTES: usize = 7;
const TAIL_BYTES: usize = 4;

/// A record that is being written: a plain message, to which those that follow it may be added.
#[derive(Debug)]
pub struct BurstWriter {
    /// Where the payload begins in the buffer.
    start: usize,
    first_bytes: usize,
    messages: u16,
    conversation: ConversationId,
    device: DeviceId,
    from_bytes: usize,
    to_bytes: usize,
    /// Of the last message.
    seq: Seq,
    client_seq: u64,
    time_ms: u64,
}

impl BurstWriter {
    /// Appends a message that has no extra. Fails only if its body is larger than the format can hold.
    #[inline]
    pub fn begin(message: &StoredMessage, out: &mut AlignedVec) -> Result<Self, DiskError> {
        let start = out.len();
        message::encode(message, out)?;
        Ok(Self {
            start,
            first_bytes: out.len() - start,
            messages: 1,
            conversation: message.conversation,
            device: message.device,
            from_bytes: message.from.as_str().len(),
            to_bytes: message.to.as_str().len(),
            seq: message.seq,
            client_seq: message.client_seq,
            time_ms: message.time_ms,
        })
    }

    /// Adds a message behind the last one, in the same buffer. False, and nothing is written: it does not follow, or
    /// there is no room for it.
    #[inline]
    pub fn add(&mut self, message: &StoredMessage, out: &mut AlignedVec) -> bool {
        let Some(head) = self.head_of(message, out) else { return false };
        out.extend_from_slice(&head);
        out.extend_from_slice(&message.body);
        self.messages += 1;
        (self.seq, self.client_seq, self.time_ms) = (message.seq, message.client_seq, message.time_ms);
        true
    }

    #[inline]
    fn head_of(&self, message: &StoredMessage, out: &AlignedVec) -> Option<[u8; HEAD_BYTES]> {
        let (from, to) = (message.from.as_str().as_bytes(), message.to.as_str().as_bytes());
        let follows = message.conversation == self.conversation
            && message.device == self.device
            && self.seq.0.checked_add(1) == Some(message.seq.0)
            && message.extra.is_none()
            && self.messages < BURST_MESSAGES_MAX
            && out.len() - self.start + HEAD_BYTES + message.body.len() + TAIL_BYTES <= BURST_BYTES_MAX
            && (from.len(), to.len()) == (self.from_bytes, self.to_bytes);
        let names = out.get(self.start..self.start + self.from_bytes + self.to_bytes)?;
        let (known_from, known_to) = names.split_at_checked(self.from_bytes)?;
        if !follows || from != known_from || to != known_to {
            return None;
        }
        let [c0, c1] = above(message.client_seq, self.client_seq)?;
        let [t0, t1] = above(message.time_ms, self.time_ms)?;
        let [b0, b1] = u16::try_from(message.body.len()).ok()?.to_le_bytes();
        Some([c0, c1, t0, t1, b0, b1, message.kind as u8])
    }

    /// Ends the record. True: it holds several messages, and its type is [`super::RecordType::Burst`]; else a plain one.
    #[inline]
    pub fn end(self, out: &mut AlignedVec) -> bool {
        if self.messages == 1 {
            return false;
        }
        // Within `BURST_BYTES_MAX`, which `add` has seen to.
        out.extend_from_slice(&(self.first_bytes as u16).to_le_bytes());
        out.extend_from_slice(&self.messages.to_le_bytes());
        true
    }
}

/// How far a number is above the one before, if it is and not too far.
fn above(this: u64, before: u64) -> Option<[u8; 2]> {
    u16::try_from(this.checked_sub(before)?).ok().map(u16::to_le_bytes)
}

/// Messages of one record, whole and in order. Names and kinds are not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Burst<'a> {
    first: Fields<'a>,
    /// Heads and bodies of the others.
    others: &'a [u8],
    messages: u16,
}

impl<'a> Burst<'a> {
    /// Reads a payload, whatever it is.
    #[inline]
    pub(super) fn read(payload: &'a [u8]) -> Result<Self, DiskError> {
        let bad = || DiskError("not the bytes of a burst of messages".into());
        let (rest, [f0, f1, m0, m1]) = payload.split_last_chunk::<TAIL_BYTES>().ok_or_else(bad)?;
        let (first_bytes, messages) = (u16::from_le_bytes([*f0, *f1]), u16::from_le_bytes([*m0, *m1]));
        let (first, others) = rest.split_at_checked(first_bytes.into()).ok_or_else(bad)?;
        let read = Self { first: message::read(first)?, others, messages };
        let (mut left, mut found, mut last) = (others, 1, read.first.clone());
        while let Some((next, rest)) = next(&last, left) {
            (last, left, found) = (next, rest, found + 1);
        }
        let whole = left.is_empty() && found == u32::from(messages) && messages > 1;
        if whole { Ok(read) } else { Err(bad()) }
    }

    /// How many there are.
    pub fn messages(&self) -> u16 {
        self.messages
    }

    #[inline]
    pub(super) fn fields(&self) -> impl Iterator<Item = Fields<'a>> + use<'a> {
        let mut others = self.others;
        std::iter::successors(Some(self.first.clone()), move |last| {
            let (next, rest) = next(last, others)?;
            others = rest;
            Some(next)
        })
    }
}

/// How many messages a payload says it has.
pub(super) fn said_messages(payload: &[u8]) -> u16 {
    payload.last_chunk().map_or(0, |messages| u16::from_le_bytes(*messages))
}

/// The message behind `last`, and what is behind it.
#[inline]
fn next<'a>(last: &Fields<'a>, others: &'a [u8]) -> Option<(Fields<'a>, &'a [u8])> {
    let ([c0, c1, t0, t1, b0, b1, kind], rest) = others.split_first_chunk::<HEAD_BYTES>()?;
    let (body, rest) = rest.split_at_checked(u16::from_le_bytes([*b0, *b1]).into())?;
    let seq = Seq(last.seq.0.checked_add(1)?);
    let client_seq = last.client_seq.checked_add(u16::from_le_bytes([*c0, *c1]).into())?;
    let time_ms = last.time_ms.checked_add(u16::from_le_bytes([*t0, *t1]).into())?;
    Some((Fields { seq, client_seq, time_ms, kind: *kind, body, ..*last }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Indexed, RecordType, decode, decode_for_index, decode_message, records};
    use crate::ids::UserName;
    use crate::message::BodyKind;
    use crate::record::{Record, StoredExtra};
    use bytes::Bytes;
    use proptest::prelude::*;

    fn first() -> StoredMessage {
        StoredMessage {
            conversation: ConversationId(77),
            seq: Seq(41),
            from: UserName::new("ann").unwrap(),
            to: UserName::new("Bøb").unwrap(),
            device: DeviceId(3),
            client_seq: 9,
            time_ms: 1_700_000_000_000,
            kind: BodyKind::Text,
            body: Bytes::from_static(b"first"),
            extra: None,
        }
    }

    fn after(last: &StoredMessage, body: Vec<u8>) -> StoredMessage {
        let (seq, client_seq) = (last.seq.next(), last.client_seq + 1);
        StoredMessage { seq, client_seq, time_ms: last.time_ms + 2, body: body.into(), ..last.clone() }
    }

    fn written(messages: &[StoredMessage]) -> (RecordType, Vec<u8>) {
        let mut out = AlignedVec::new();
        // Not at the start of the buffer.
        out.extend_from_slice(&[9; 12]);
        let mut writer = BurstWriter::begin(&messages[0], &mut out).unwrap();
        for message in &messages[1..] {
            assert!(writer.add(message, &mut out), "{message:?}");
        }
        let several = writer.end(&mut out);
        (if several { RecordType::Burst } else { RecordType::Message }, out[12..].to_vec())
    }

    #[test]
    fn what_does_not_follow_is_not_added() {
        let first = first();
        let next = after(&first, b"x".to_vec());
        let far = u64::from(u16::MAX);
        let other = || UserName::new("eve").unwrap();
        let no = [
            StoredMessage { conversation: ConversationId(78), ..next.clone() },
            StoredMessage { device: DeviceId(4), ..next.clone() },
            StoredMessage { seq: Seq(43), ..next.clone() },
            StoredMessage { seq: Seq(41), ..next.clone() },
            StoredMessage { from: other(), ..next.clone() },
            StoredMessage { to: other(), ..next.clone() },
            StoredMessage { to: UserName::new("Bøbb").unwrap(), ..next.clone() },
            StoredMessage { client_seq: first.client_seq - 1, ..next.clone() },
            StoredMessage { client_seq: first.client_seq + far + 1, ..next.clone() },
            StoredMessage { time_ms: first.time_ms - 1, ..next.clone() },
            StoredMessage { time_ms: first.time_ms + far + 1, ..next.clone() },
            StoredMessage { extra: Some(Box::new(StoredExtra::default())), ..next.clone() },
            StoredMessage { body: vec![0; BURST_BYTES_MAX].into(), ..next.clone() },
        ];
        for message in no {
            let mut out = AlignedVec::new();
            let mut writer = BurstWriter::begin(&first, &mut out).unwrap();
            let before = out.to_vec();
            assert!(!writer.add(&message, &mut out) && out[..] == before[..], "{message:?}");
            assert!(!writer.end(&mut out) && out[..] == before[..], "a plain message");
        }
        let edge = StoredMessage { client_seq: 9 + far, time_ms: first.time_ms + far, ..next };
        let (record_type, bytes) = written(&[first.clone(), edge.clone()]);
        let both = vec![Record::Message(first.into()), Record::Message(edge.into())];
        assert_eq!(decode(record_type, &bytes).unwrap(), both);
    }

    #[test]
    fn a_burst_ends_at_its_limits() {
        let (mut last, mut out) = (first(), AlignedVec::new());
        let mut writer = BurstWriter::begin(&last, &mut out).unwrap();
        let mut added = 1;
        loop {
            last = after(&last, vec![1; 8]);
            if !writer.add(&last, &mut out) {
                break;
            }
            added += 1;
        }
        assert_eq!(added, BURST_MESSAGES_MAX);
        let (mut last, mut out) = (first(), AlignedVec::new());
        let mut writer = BurstWriter::begin(&last, &mut out).unwrap();
        last = after(&last, vec![1; BURST_BYTES_MAX - out.len() - HEAD_BYTES - TAIL_BYTES]);
        assert!(writer.add(&last, &mut out), "exactly");
        assert!(!writer.add(&after(&last, Vec::new()), &mut out), "not one byte more");
        assert!(writer.end(&mut out) && out.len() == BURST_BYTES_MAX);
    }

    #[test]
    fn client_seqs_and_times_that_overflow_are_refused() {
        let messages = [first(), after(&first(), b"x".to_vec())];
        let (_, bytes) = written(&messages);
        for (at, value) in [(16, u64::MAX), (32, u64::MAX), (40, u64::MAX)] {
            let mut bytes = bytes.clone();
            // The fields of the first message, before the other and the tail.
            let fields = bytes.len() - TAIL_BYTES - HEAD_BYTES - 1 - 73;
            bytes[fields + at..fields + at + 8].copy_from_slice(&value.to_le_bytes());
            assert!(decode_for_index(RecordType::Burst, &bytes).is_err(), "{at}");
        }
    }

    proptest! {
        #[test]
        fn messages_come_back_whole_and_in_order(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..40),
            flip in any::<prop::sample::Index>(),
            value in any::<u8>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut messages = vec![first()];
            for body in bodies {
                messages.push(after(&messages[messages.len() - 1], body));
            }
            let (record_type, bytes) = written(&messages);
            prop_assert_eq!(records(record_type, &bytes), messages.len() as u64);
            let records: Vec<_> = messages.iter().map(|message| Record::Message(message.clone().into())).collect();
            prop_assert_eq!(&decode(record_type, &bytes).unwrap(), &records);
            for message in &messages {
                let found = decode_message(record_type, &bytes, (message.conversation, message.seq)).unwrap();
                prop_assert_eq!(found.as_ref(), Some(message));
            }
            let before = (messages[0].conversation, Seq(40));
            prop_assert_eq!(decode_message(record_type, &bytes, before).unwrap(), None);
            if let Indexed::Burst(burst) = decode_for_index(record_type, &bytes).unwrap() {
                prop_assert_eq!(burst.indexed().count(), messages.len());
                for (seen, message) in burst.indexed().zip(&messages) {
                    prop_assert_eq!(seen.accepted, message.accepted());
                    prop_assert_eq!((seen.conversation, seen.device), (message.conversation, message.device));
                    prop_assert_eq!(seen.from_bytes, b"ann");
                }
            } else {
                prop_assert_eq!(messages.len(), 1);
            }
            let mut damaged = bytes.clone();
            damaged[flip.index(bytes.len())] = value;
            let cut = &bytes[..cut.index(bytes.len())];
            for bytes in [&damaged[..], cut] {
                let _ = (decode(RecordType::Burst, bytes), decode_for_index(RecordType::Burst, bytes));
            }
        }
    }
}
