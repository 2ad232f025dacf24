//! Writes the hot tables straight behind their frame header: a fixed part that is one copy of a prepared layout with
//! its numbers put in, then names and body.

use super::{ack, message, send, send_ack};
use crate::frame::Header;
use crate::ids::{ConversationId, Seq};
use crate::limits::FRAME_HEADER_BYTES;
use crate::message::{Ack, Message, Reply, Request, Send, SendAck};

/// Appends the frame of a SEND or ACK; false, and nothing is written, for any other and for one with rare fields.
/// `header.body_bytes` is set here.
#[inline]
pub(in crate::codec) fn write_request(header: Header, request: &Request<'_>, out: &mut Vec<u8>) -> bool {
    match request {
        Request::Send(send) if send.mentions.is_empty() => write_send(header, send, out),
        Request::Ack(ack) => write_ack(header, ack, out),
        _ => return false,
    }
    true
}

/// Appends the frame of a SEND_ACK or DELIVER; false, and nothing is written, for any other and for one with rare fields.
#[inline]
pub(in crate::codec) fn write_reply(header: Header, reply: &Reply<'_>, out: &mut Vec<u8>) -> bool {
    match reply {
        Reply::SendAck(ack) => write_send_ack(header, ack, out),
        Reply::Deliver(message) => return write_deliver(header, message, out),
        _ => return false,
    }
    true
}

/// Appends the frame of a DELIVER; false, and nothing is written, for one with rare fields.
#[inline]
pub(in crate::codec) fn write_deliver(header: Header, message: &Message<'_>, out: &mut Vec<u8>) -> bool {
    let has_layout = has_layout(message);
    if has_layout {
        write_message(header, message, out);
    }
    has_layout
}

/// A table's fixed part: where the table begins, and the first `SLOTS` slots of its vtable, each the place of the
/// field in the body (not in the table), 0 for a field that is left out.
struct Layout<const SLOTS: usize> {
    table: usize,
    /// Where the fields end.
    end: usize,
    places: [usize; SLOTS],
}

/// The root's offset, then the vtable.
const VTABLE: usize = 4;

impl<const SLOTS: usize> Layout<SLOTS> {
    /// Frame header (left zero), root, vtable, and a table whose fields are all zero.
    const fn prepare<const BYTES: usize>(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let vtable_bytes = 4 + 2 * SLOTS;
        assert!(
            self.table.is_multiple_of(4) && VTABLE + vtable_bytes <= self.table,
            "the vtable fits before its table"
        );
        assert!(FRAME_HEADER_BYTES + self.end <= BYTES, "the fields fit");
        put_u16(&mut bytes, 0, self.table as u16);
        put_u16(&mut bytes, VTABLE, vtable_bytes as u16);
        put_u16(&mut bytes, VTABLE + 2, (self.end - self.table) as u16);
        put_u16(&mut bytes, self.table, (self.table - VTABLE) as u16);
        let mut slot = 0;
        while slot < SLOTS {
            if self.places[slot] != 0 {
                put_u16(&mut bytes, VTABLE + 4 + 2 * slot, (self.places[slot] - self.table) as u16);
            }
            slot += 1;
        }
        bytes
    }
}

const fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    let [low, high] = value.to_le_bytes();
    bytes[FRAME_HEADER_BYTES + at] = low;
    bytes[FRAME_HEADER_BYTES + at + 1] = high;
}

/// The fixed part of a frame that was just appended, to put its numbers in.
pub(super) struct Fixed<'a, const BYTES: usize>(&'a mut [u8; BYTES]);

/// Appends the fixed part of a frame and makes room for the rest of it: `body_bytes` counts that too. `put` fills it in.
#[inline(always)]
pub(super) fn append_fixed<const BYTES: usize>(
    fixed: &[u8; BYTES],
    (header, body_bytes): (Header, usize),
    out: &mut Vec<u8>,
    put: impl FnOnce(Fixed<'_, BYTES>),
) {
    let header = Header { body_bytes: body_bytes as u32, ..header };
    out.reserve(FRAME_HEADER_BYTES + body_bytes);
    out.extend_from_slice(fixed);
    if let Some(appended) = out.last_chunk_mut::<BYTES>() {
        appended[..FRAME_HEADER_BYTES].copy_from_slice(&header.encode());
        put(Fixed(appended));
    }
}

impl<const BYTES: usize> Fixed<'_, BYTES> {
    /// Puts a value at a place of the body. Places are constants of a layout, checked against `BYTES` at build time.
    #[inline(always)]
    pub(super) fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.0[FRAME_HEADER_BYTES + at..FRAME_HEADER_BYTES + at + N].copy_from_slice(&value);
    }

    #[inline(always)]
    fn put_id(&mut self, at: usize, id: ConversationId) {
        self.put(at, ((id.0 >> 64) as u64).to_le_bytes());
        self.put(at + 8, (id.0 as u64).to_le_bytes());
    }

    /// Puts the distance from the field at `at` to `target`, both places in the body.
    #[inline(always)]
    pub(super) fn point(&mut self, at: usize, target: usize) {
        self.put(at, ((target - at) as u32).to_le_bytes());
    }
}

/// Bytes of a string of so many bytes of text: its length, the text, an end mark, and zeros up to the next multiple of
/// four.
#[inline(always)]
pub(super) const fn string_bytes(text_bytes: usize) -> usize {
    (4 + text_bytes + 1).next_multiple_of(4)
}

/// Appends a string. Something is always behind it in a frame, so that room for up to three bytes more is there.
#[inline(always)]
pub(super) fn append_string(text: &str, out: &mut Vec<u8>) {
    let end = out.len() + string_bytes(text.len());
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    // One piece of fixed size, cut where the string ends, costs less than one of the right size.
    out.extend_from_slice(&[0; 4]);
    out.truncate(end);
}

#[inline(always)]
fn append_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Where the fields of a SEND lie, for its writer and for those who know it by that.
pub(super) mod send_places {
    use super::*;

    pub const TABLE: usize = 20;
    pub const CLIENT_SEQ: usize = 24;
    pub const TO: usize = 32;
    pub const BODY: usize = 36;
    pub const ACK_TIMEOUT_MS: usize = 40;
    pub const CLASS: usize = 44;
    pub const KIND: usize = 45;
    pub const NAMES: usize = 48;
    pub const FIXED: [u8; FRAME_HEADER_BYTES + NAMES] = {
        let mut places = [0; send::RARE];
        places[send::TO] = TO;
        places[send::CLASS] = CLASS;
        places[send::KIND] = KIND;
        places[send::CLIENT_SEQ] = CLIENT_SEQ;
        places[send::ACK_TIMEOUT_MS] = ACK_TIMEOUT_MS;
        places[send::BODY] = BODY;
        Layout { table: TABLE, end: KIND + 1, places }.prepare()
    };
}

fn write_send(header: Header, send: &Send<'_>, out: &mut Vec<u8>) {
    use send_places::*;
    let body = NAMES + string_bytes(send.to.len());
    append_fixed(&FIXED, (header, body + 4 + send.body.len()), out, |mut fixed| {
        fixed.put(CLIENT_SEQ, send.client_seq.to_le_bytes());
        fixed.put(ACK_TIMEOUT_MS, send.ack_timeout_ms.unwrap_or(0).to_le_bytes());
        fixed.put(CLASS, [send.class as u8, send.kind as u8]);
        fixed.point(TO, NAMES);
        fixed.point(BODY, body);
    });
    append_string(send.to, out);
    append_bytes(send.body, out);
}

fn write_ack(header: Header, ack: &Ack, out: &mut Vec<u8>) {
    const SEQ: usize = 24;
    const CONVERSATION: usize = 32;
    const END: usize = 48;
    const UPTO: [u8; FRAME_HEADER_BYTES + END] = {
        let mut places = [0; ack::DELIVERY];
        places[ack::CONVERSATION] = CONVERSATION;
        places[ack::SEQ] = SEQ;
        Layout { table: 20, end: END, places }.prepare()
    };
    const DELIVERY: usize = 24;
    const DELIVERY_END: usize = 32;
    const ONE: [u8; FRAME_HEADER_BYTES + DELIVERY_END] = {
        let mut places = [0; ack::DELIVERY + 1];
        places[ack::DELIVERY] = DELIVERY;
        Layout { table: 20, end: DELIVERY_END, places }.prepare()
    };
    match ack {
        Ack::Upto { conversation, seq } => {
            append_fixed(&UPTO, (header, END), out, |mut fixed| {
                fixed.put_id(CONVERSATION, *conversation);
                fixed.put(SEQ, seq.0.to_le_bytes());
            });
        }
        Ack::Delivery(delivery) => {
            append_fixed(&ONE, (header, DELIVERY_END), out, |mut fixed| {
                fixed.put(DELIVERY, delivery.to_le_bytes());
            });
        }
    }
}

/// A transient message has no conversation and no seq: they are left out.
#[inline]
pub(in crate::codec) fn write_send_ack(header: Header, ack: &SendAck, out: &mut Vec<u8>) {
    const TIME_MS: usize = 24;
    const DUP: usize = 32;
    const TRANSIENT_END: usize = DUP + 1;
    const TRANSIENT: [u8; FRAME_HEADER_BYTES + TRANSIENT_END] = {
        let mut places = [0; send_ack::DUP + 1];
        places[send_ack::TIME_MS] = TIME_MS;
        places[send_ack::DUP] = DUP;
        Layout { table: 20, end: TRANSIENT_END, places }.prepare()
    };
    const SEQ: usize = 40;
    const CONVERSATION: usize = 48;
    const END: usize = 64;
    const DURABLE: [u8; FRAME_HEADER_BYTES + END] = {
        let mut places = [0; send_ack::DUP + 1];
        places[send_ack::CONVERSATION] = CONVERSATION;
        places[send_ack::SEQ] = SEQ;
        places[send_ack::TIME_MS] = TIME_MS;
        places[send_ack::DUP] = DUP;
        Layout { table: 20, end: END, places }.prepare()
    };
    if is_transient(ack.conversation, ack.seq) {
        append_fixed(&TRANSIENT, (header, TRANSIENT_END), out, |mut fixed| {
            fixed.put(TIME_MS, ack.time_ms.to_le_bytes());
            fixed.put(DUP, [u8::from(ack.dup)]);
        });
    } else {
        append_fixed(&DURABLE, (header, END), out, |mut fixed| {
            fixed.put(TIME_MS, ack.time_ms.to_le_bytes());
            fixed.put(DUP, [u8::from(ack.dup)]);
            fixed.put(SEQ, ack.seq.0.to_le_bytes());
            fixed.put_id(CONVERSATION, ack.conversation);
        });
    }
}

/// Places that both layouts of a message share.
pub(super) mod shared {
    pub const TABLE: usize = 36;
    pub const TIME_MS: usize = 40;
    pub const DEVICE: usize = 48;
    pub const CLIENT_SEQ: usize = 56;
    /// `delivery` of a transient message, `seq` of a durable one.
    pub const NUMBER: usize = 64;
    pub const FROM: usize = 72;
    pub const TO: usize = 76;
    pub const BODY: usize = 80;
    pub const CLASS: usize = 84;
    pub const KIND: usize = 85;
    /// Where the fields of a transient message end; the names begin at the next multiple of four.
    pub const END: usize = 86;
}

const fn message_places() -> [usize; message::RARE] {
    let mut places = [0; message::RARE];
    places[message::TIME_MS] = shared::TIME_MS;
    places[message::FROM] = shared::FROM;
    places[message::TO] = shared::TO;
    places[message::DEVICE] = shared::DEVICE;
    places[message::CLIENT_SEQ] = shared::CLIENT_SEQ;
    places[message::CLASS] = shared::CLASS;
    places[message::KIND] = shared::KIND;
    places[message::BODY] = shared::BODY;
    places
}

fn is_transient(conversation: ConversationId, seq: Seq) -> bool {
    conversation.0 == 0 && seq == Seq::ZERO
}

/// A transient message has no conversation and no seq, a durable one no delivery number, and neither anything rare.
fn has_layout(message: &Message<'_>) -> bool {
    message.extra.is_empty() && (message.delivery == 0 || is_transient(message.conversation, message.seq))
}

/// Where the names of a transient message begin.
pub(super) const TRANSIENT_NAMES: usize = 88;
pub(super) const TRANSIENT_MESSAGE: [u8; FRAME_HEADER_BYTES + TRANSIENT_NAMES] = {
    let mut places = message_places();
    places[message::DELIVERY] = shared::NUMBER;
    Layout { table: shared::TABLE, end: shared::END, places }.prepare()
};

#[inline(never)] // bench/cost.sh counts its calls
fn write_message(header: Header, message: &Message<'_>, out: &mut Vec<u8>) {
    const CONVERSATION: usize = 88;
    const DURABLE_NAMES: usize = 104;
    const DURABLE: [u8; FRAME_HEADER_BYTES + DURABLE_NAMES] = {
        let mut places = message_places();
        places[message::SEQ] = shared::NUMBER;
        places[message::CONVERSATION] = CONVERSATION;
        Layout { table: shared::TABLE, end: DURABLE_NAMES, places }.prepare()
    };
    if is_transient(message.conversation, message.seq) {
        let layout = (header, TRANSIENT_NAMES, &TRANSIENT_MESSAGE);
        append_message(layout, message, out, |fixed| fixed.put(shared::NUMBER, message.delivery.to_le_bytes()));
    } else {
        append_message((header, DURABLE_NAMES, &DURABLE), message, out, |fixed| {
            fixed.put(shared::NUMBER, message.seq.0.to_le_bytes());
            fixed.put_id(CONVERSATION, message.conversation);
        });
    }
}

/// Appends the frame of a message: what both layouts share, and what `put` adds.
#[inline(always)]
fn append_message<const BYTES: usize>(
    (header, from, prepared): (Header, usize, &[u8; BYTES]),
    message: &Message<'_>,
    out: &mut Vec<u8>,
    put: impl FnOnce(&mut Fixed<'_, BYTES>),
) {
    let to = from + string_bytes(message.from.len());
    let body = to + string_bytes(message.to.len());
    append_fixed(prepared, (header, body + 4 + message.body.len()), out, |mut fixed| {
        fixed.put(shared::TIME_MS, message.time_ms.to_le_bytes());
        fixed.put(shared::DEVICE, message.device.0.to_le_bytes());
        fixed.put(shared::CLIENT_SEQ, message.client_seq.to_le_bytes());
        fixed.put(shared::CLASS, [message.class as u8, message.kind as u8]);
        fixed.point(shared::FROM, from);
        fixed.point(shared::TO, to);
        fixed.point(shared::BODY, body);
        put(&mut fixed);
    });
    append_string(message.from, out);
    append_string(message.to, out);
    append_bytes(message.body, out);
}
