//! Reads the hot tables in one pass: each field is checked where it is taken.

use super::{ack, message, send, send_ack};
use crate::errors::ErrorCode;
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::message::{Ack, BodyKind, Class, Extra, Mentions, Message, Send, SendAck};

/// Bytes of a vtable before its slots: its own length and the table's.
const VTABLE_HEAD_BYTES: usize = 4;

/// A SEND; `Ok(None)` for one that carries rare fields. Errors: `BAD_BODY` and `BAD_REQUEST`, as the general way.
#[inline]
pub(in crate::codec::flat) fn read_send(body: &[u8]) -> Result<Option<Send<'_>>, ErrorCode> {
    let table = Table::root(body)?;
    if table.has_any_from(send::RARE) {
        return Ok(None);
    }
    // Shapes first, values after them: a body that is no table at all is BAD_BODY whatever its numbers are.
    let (to, class, kind) = (table.str(send::TO)?, table.u8(send::CLASS)?, table.u8(send::KIND)?);
    let (client_seq, ack_timeout_ms) = (table.u64(send::CLIENT_SEQ)?, table.u32(send::ACK_TIMEOUT_MS)?);
    let bytes = table.bytes(send::BODY)?;
    Ok(Some(Send {
        to,
        class: Class::from_number(class).ok_or(ErrorCode::BadRequest)?,
        kind: BodyKind::from_number(kind).filter(|kind| kind.is_for_clients()).ok_or(ErrorCode::BadRequest)?,
        client_seq,
        ack_timeout_ms: (ack_timeout_ms != 0).then_some(ack_timeout_ms),
        body: bytes,
        mentions: Mentions::default(),
    }))
}

/// Errors: `BAD_BODY`.
pub(in crate::codec::flat) fn read_ack(body: &[u8]) -> Result<Ack, ErrorCode> {
    let table = Table::root(body)?;
    let (conversation, seq) = (table.id(ack::CONVERSATION)?, Seq(table.u64(ack::SEQ)?));
    Ok(match table.u64(ack::DELIVERY)? {
        0 => Ack::Upto { conversation, seq },
        delivery => Ack::Delivery(delivery),
    })
}

/// Errors: `BAD_BODY`.
#[inline]
pub(in crate::codec::flat) fn read_send_ack(body: &[u8]) -> Result<SendAck, ErrorCode> {
    let table = Table::root(body)?;
    Ok(SendAck {
        conversation: table.id(send_ack::CONVERSATION)?,
        seq: Seq(table.u64(send_ack::SEQ)?),
        time_ms: table.u64(send_ack::TIME_MS)?,
        dup: table.u8(send_ack::DUP)? != 0,
    })
}

/// The message of a DELIVER; `Ok(None)` for one that carries rare fields. Errors: `BAD_BODY`.
#[inline]
pub(in crate::codec::flat) fn read_message(body: &[u8]) -> Result<Option<Message<'_>>, ErrorCode> {
    let table = Table::root(body)?;
    if table.has_any_from(message::RARE) {
        return Ok(None);
    }
    Ok(Some(Message {
        conversation: table.id(message::CONVERSATION)?,
        seq: Seq(table.u64(message::SEQ)?),
        time_ms: table.u64(message::TIME_MS)?,
        from: table.str(message::FROM)?,
        to: table.str(message::TO)?,
        device: DeviceId(table.u64(message::DEVICE)?),
        client_seq: table.u64(message::CLIENT_SEQ)?,
        class: Class::from_number(table.u8(message::CLASS)?).ok_or(ErrorCode::BadBody)?,
        kind: BodyKind::from_number(table.u8(message::KIND)?).ok_or(ErrorCode::BadBody)?,
        delivery: table.u64(message::DELIVERY)?,
        body: table.bytes(message::BODY)?,
        extra: Extra::default(),
    }))
}

/// A table whose vtable lies inside the body. Fields are checked when they are read; an absent one is its default.
struct Table<'a> {
    body: &'a [u8],
    /// Where the table begins.
    at: usize,
    slots: &'a [u8],
}

impl<'a> Table<'a> {
    #[inline]
    fn root(body: &'a [u8]) -> Result<Self, ErrorCode> {
        let at = u32::from_le_bytes(chunk(body, 0)?) as usize;
        let back = i32::from_le_bytes(aligned(body, at)?);
        // No body is near 2 GiB, so the sum is exact.
        let vtable_at = usize::try_from(at as i64 - i64::from(back)).map_err(|_| ErrorCode::BadBody)?;
        let vtable_bytes = usize::from(u16::from_le_bytes(aligned(body, vtable_at)?));
        let end = vtable_at.checked_add(vtable_bytes).filter(|end| end.is_multiple_of(2)).ok_or(ErrorCode::BadBody)?;
        let vtable = body.get(vtable_at..end).ok_or(ErrorCode::BadBody)?;
        Ok(Self { body, at, slots: vtable.get(VTABLE_HEAD_BYTES..).unwrap_or_default() })
    }

    /// Where a field's value lies; `None` for its default.
    #[inline]
    fn place(&self, slot: usize) -> Option<usize> {
        let distance = self.slots.get(2 * slot..)?.first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes));
        (distance != 0).then(|| self.at + usize::from(distance))
    }

    #[inline]
    fn has_any_from(&self, slot: usize) -> bool {
        self.slots.get(2 * slot..).is_some_and(|rest| rest.iter().any(|byte| *byte != 0))
    }

    #[inline]
    fn u8(&self, slot: usize) -> Result<u8, ErrorCode> {
        let Some(place) = self.place(slot) else { return Ok(0) };
        self.body.get(place).copied().ok_or(ErrorCode::BadBody)
    }

    #[inline]
    fn u32(&self, slot: usize) -> Result<u32, ErrorCode> {
        self.place(slot).map_or(Ok(0), |place| Ok(u32::from_le_bytes(aligned(self.body, place)?)))
    }

    #[inline]
    fn u64(&self, slot: usize) -> Result<u64, ErrorCode> {
        self.place(slot).map_or(Ok(0), |place| Ok(u64::from_le_bytes(aligned(self.body, place)?)))
    }

    /// A struct of two numbers. Structs are not checked for alignment, here as in the general verifier.
    #[inline]
    fn id(&self, slot: usize) -> Result<ConversationId, ErrorCode> {
        let Some(place) = self.place(slot) else { return Ok(ConversationId(0)) };
        let high = u64::from_le_bytes(chunk(self.body, place)?);
        let low = u64::from_le_bytes(chunk(self.body, place + 8)?);
        Ok(ConversationId((u128::from(high) << 64) | u128::from(low)))
    }

    #[inline]
    fn bytes(&self, slot: usize) -> Result<&'a [u8], ErrorCode> {
        let Some(place) = self.place(slot) else { return Ok(&[]) };
        let distance = u32::from_le_bytes(aligned(self.body, place)?) as usize;
        let at = place + distance;
        let count = u32::from_le_bytes(aligned(self.body, at)?) as usize;
        let start = at + 4;
        self.body.get(start..start + count).ok_or(ErrorCode::BadBody)
    }

    #[inline]
    fn str(&self, slot: usize) -> Result<&'a str, ErrorCode> {
        std::str::from_utf8(self.bytes(slot)?).map_err(|_| ErrorCode::BadBody)
    }
}

/// `N` bytes that must begin at a multiple of `N`.
#[inline]
fn aligned<const N: usize>(body: &[u8], at: usize) -> Result<[u8; N], ErrorCode> {
    if !at.is_multiple_of(N) {
        return Err(ErrorCode::BadBody);
    }
    chunk(body, at)
}

#[inline]
pub(super) fn chunk<const N: usize>(body: &[u8], at: usize) -> Result<[u8; N], ErrorCode> {
    body.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(ErrorCode::BadBody)
}
