//! The bytes of a plain message, written and read in one pass: they are what a durable message costs.
//!
//! The layout is that of the archive that `rkyv` makes of `Archived` in the tests below, which hold the two against each
//! other: names and body one behind the other, then the fields, of which three point back to those. Numbers are little
//! endian and lie at any address. The reader takes names and body from anywhere before the fields, as `rkyv` does.

use rkyv::util::AlignedVec;

use super::DiskError;
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::record::StoredMessage;

const CONVERSATION: usize = 0;
const SEQ: usize = 16;
const DEVICE: usize = 24;
const CLIENT_SEQ: usize = 32;
const TIME_MS: usize = 40;
const KIND: usize = 48;
/// Each pointer: its distance to what it points at, `i32`, and the bytes there, `u32`.
const FROM: usize = 49;
const TO: usize = 57;
const BODY: usize = 65;
const FIELDS_BYTES: usize = 73;

/// A message as it lies in a record. Names are not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fields<'a> {
    pub conversation: ConversationId,
    pub seq: Seq,
    pub device: DeviceId,
    pub client_seq: u64,
    pub time_ms: u64,
    pub kind: u8,
    pub from: &'a [u8],
    pub to: &'a [u8],
    pub body: &'a [u8],
}

/// Appends a message that has no extra. Fails only if its body is larger than the format can hold.
#[inline]
pub(super) fn encode(message: &StoredMessage, out: &mut AlignedVec) -> Result<(), DiskError> {
    let (from, to, body) = (message.from.as_str(), message.to.as_str(), &message.body[..]);
    let before = from.len() + to.len() + body.len();
    if i32::try_from(before).is_err() {
        return Err(DiskError("the body is too large".into()));
    }
    let mut fields = [0; FIELDS_BYTES];
    put(&mut fields, CONVERSATION, message.conversation.0.to_le_bytes());
    put(&mut fields, SEQ, message.seq.0.to_le_bytes());
    put(&mut fields, DEVICE, message.device.0.to_le_bytes());
    put(&mut fields, CLIENT_SEQ, message.client_seq.to_le_bytes());
    put(&mut fields, TIME_MS, message.time_ms.to_le_bytes());
    put(&mut fields, KIND, [message.kind as u8]);
    let mut back = before;
    for (at, bytes) in [(FROM, from.len()), (TO, to.len()), (BODY, body.len())] {
        put(&mut fields, at, (-((back + at) as i32)).to_le_bytes());
        put(&mut fields, at + 4, (bytes as u32).to_le_bytes());
        back -= bytes;
    }
    out.reserve(before + FIELDS_BYTES);
    out.extend_from_slice(from.as_bytes());
    out.extend_from_slice(to.as_bytes());
    out.extend_from_slice(body);
    out.extend_from_slice(&fields);
    Ok(())
}

/// Places are constants of the layout.
#[inline(always)]
fn put<const N: usize>(fields: &mut [u8; FIELDS_BYTES], at: usize, value: [u8; N]) {
    fields[at..at + N].copy_from_slice(&value);
}

/// Reads a payload, whatever it is.
#[inline]
pub(super) fn read(payload: &[u8]) -> Result<Fields<'_>, DiskError> {
    let (before, fields) = payload.split_last_chunk::<FIELDS_BYTES>().ok_or_else(no_message)?;
    let pointed =
        |at| pointed(before, (i32::from_le_bytes(take(fields, at)), u32::from_le_bytes(take(fields, at + 4))), at);
    Ok(Fields {
        conversation: ConversationId(u128::from_le_bytes(take(fields, CONVERSATION))),
        seq: Seq(u64::from_le_bytes(take(fields, SEQ))),
        device: DeviceId(u64::from_le_bytes(take(fields, DEVICE))),
        client_seq: u64::from_le_bytes(take(fields, CLIENT_SEQ)),
        time_ms: u64::from_le_bytes(take(fields, TIME_MS)),
        kind: u8::from_le_bytes(take(fields, KIND)),
        from: pointed(FROM).ok_or_else(no_message)?,
        to: pointed(TO).ok_or_else(no_message)?,
        body: pointed(BODY).ok_or_else(no_message)?,
    })
}

#[inline(always)]
fn take<const N: usize>(fields: &[u8; FIELDS_BYTES], at: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&fields[at..at + N]);
    value
}

/// What the pointer at `at` of the fields behind `before` points at.
#[inline(always)]
fn pointed(before: &[u8], (distance, bytes): (i32, u32), at: usize) -> Option<&[u8]> {
    let start = before.len().checked_add(at)?.checked_add_signed(distance as isize)?;
    before.get(start..start.checked_add(bytes as usize)?)
}

#[cold]
fn no_message() -> DiskError {
    DiskError("not the bytes of a message".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::UserName;
    use crate::message::BodyKind;
    use bytes::Bytes;
    use proptest::prelude::*;
    use rkyv::rancor::Error;
    use rkyv::with::InlineAsBox;
    use rkyv::{Archive, Serialize};

    #[derive(Archive, Serialize)]
    struct Archived<'a> {
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
    }

    fn archive(message: &StoredMessage, before: AlignedVec) -> AlignedVec {
        let archived = Archived {
            conversation: message.conversation.0,
            seq: message.seq.0,
            device: message.device.0,
            client_seq: message.client_seq,
            time_ms: message.time_ms,
            kind: message.kind as u8,
            from: message.from.as_str(),
            to: message.to.as_str(),
            body: &message.body,
        };
        rkyv::api::high::to_bytes_in::<_, Error>(&archived, before).unwrap()
    }

    fn message() -> impl Strategy<Value = StoredMessage> {
        let numbers = (any::<u128>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        let names = ("[a-zA-Z0-9]{1,40}", "#?[a-zé]{1,20}");
        (numbers, names, prop::collection::vec(any::<u8>(), 0..300)).prop_map(|(numbers, (from, to), body)| {
            let (conversation, seq, device, client_seq, time_ms) = numbers;
            StoredMessage {
                conversation: ConversationId(conversation),
                seq: Seq(seq),
                from: UserName::new(&from).unwrap(),
                to: UserName::new(&to).unwrap(),
                device: DeviceId(device),
                client_seq,
                time_ms,
                kind: BodyKind::Voice,
                body: Bytes::from(body),
                extra: None,
            }
        })
    }

    proptest! {
        #[test]
        fn the_bytes_are_those_of_the_archive(message in message(), before in 0usize..20) {
            let mut out = AlignedVec::new();
            out.extend_from_slice(&vec![7; before]);
            let archived = archive(&message, out.clone());
            encode(&message, &mut out).unwrap();
            prop_assert_eq!(&out[..], &archived[..]);
            let fields = read(&out[before..]).unwrap();
            prop_assert_eq!(fields.from, message.from.as_str().as_bytes());
            prop_assert_eq!(fields.to, message.to.as_str().as_bytes());
            prop_assert_eq!(fields.body, &message.body[..]);
            prop_assert_eq!(fields.kind, message.kind as u8);
            let numbers = (fields.conversation, fields.seq, fields.device, fields.client_seq, fields.time_ms);
            let (device, client_seq) = (message.device, message.client_seq);
            prop_assert_eq!(numbers, (message.conversation, message.seq, device, client_seq, message.time_ms));
        }

        #[test]
        fn pointers_never_lead_out_of_the_record(
            message in message(),
            at in prop::sample::select(vec![FROM, TO, BODY]),
            distance in any::<i32>(),
            bytes in any::<u32>(),
        ) {
            let mut out = AlignedVec::new();
            encode(&message, &mut out).unwrap();
            let fields = out.len() - FIELDS_BYTES;
            out[fields + at..fields + at + 4].copy_from_slice(&distance.to_le_bytes());
            out[fields + at + 4..fields + at + 8].copy_from_slice(&bytes.to_le_bytes());
            if let Ok(read) = read(&out) {
                let end = fields as i64;
                let start = end + at as i64 + i64::from(distance);
                prop_assert!(start >= 0 && start + i64::from(bytes) <= end);
                let found = if at == FROM { read.from } else if at == TO { read.to } else { read.body };
                prop_assert_eq!(found.len(), bytes as usize);
            }
        }
    }
}
