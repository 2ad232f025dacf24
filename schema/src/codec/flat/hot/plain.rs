//! The straight way of a message whose bytes are laid out as this crate's own writer lays them out.
//!
//! Such a SEND is known by its first bytes, so every field is at a place that is a constant. Its last two fields, the
//! receiver's name and the body, are laid out as in the DELIVER that comes of it: they are copied in one piece. Anything
//! else, also what is sound but laid out in another way, is left to [`super::read`] and the general verifier, and what
//! is taken here means the same to them.

use super::read::chunk;
use super::write::{
    TRANSIENT_MESSAGE, TRANSIENT_NAMES, append_fixed, append_string, send_places, shared, string_bytes,
};
use crate::codec::Codec;
use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::frame::{Flags, Header};
use crate::ids::DeviceId;
use crate::limits::{FRAME_HEADER_BYTES, USER_NAME_BYTES_MAX};
use crate::message::{BodyKind, Class, Mentions, Send};

/// A SEND without rare fields whose name nobody has looked at yet: it may even not be UTF-8. All else has been checked as
/// by [`crate::codec::decode_request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainSend<'a> {
    pub to: &'a [u8],
    pub class: Class,
    pub kind: BodyKind,
    pub client_seq: u64,
    pub ack_timeout_ms: Option<u32>,
    pub body: &'a [u8],
    /// `to` and `body` with their lengths, as they lie in the SEND and will lie in the DELIVER.
    tail: &'a [u8],
}

/// Who says what a [`PlainSend`] carries, and when.
#[derive(Clone, Copy, Debug)]
pub struct PlainSender<'a> {
    pub from: &'a str,
    pub device: DeviceId,
    pub time_ms: u64,
}

impl<'a> PlainSend<'a> {
    /// `None` for what is not laid out so, sound or not.
    #[inline]
    pub(in crate::codec) fn read(body: &'a [u8]) -> Option<Self> {
        use send_places::*;
        /// Root, vtable, and the table's way back to it: the same in all.
        const SHAPE_BYTES: usize = TABLE + 4;
        const SHAPE: [u8; SHAPE_BYTES] = {
            let (_, shape) = FIXED.split_at(FRAME_HEADER_BYTES);
            *shape.first_chunk().unwrap()
        };
        let (head, tail) = body.split_first_chunk::<NAMES>()?;
        if head.first_chunk() != Some(&SHAPE) {
            return None;
        }
        let to_bytes = u32::from_le_bytes(chunk(tail, 0).ok()?) as usize;
        if to_bytes > USER_NAME_BYTES_MAX {
            return None;
        }
        // The name is followed by one to four zeros and the body, which ends the frame.
        let string_bytes = string_bytes(to_bytes);
        let (string, rest) = tail.split_at_checked(string_bytes)?;
        let (body_bytes, body) = rest.split_first_chunk::<4>()?;
        let (to, zeros) = string.get(4..)?.split_at_checked(to_bytes)?;
        let last_word = u32::from_le_bytes(*string.last_chunk()?);
        let to_distance = u32::from_le_bytes(chunk(head, TO).ok()?) as usize;
        let body_distance = u32::from_le_bytes(chunk(head, BODY).ok()?) as usize;
        let well_laid = to_distance == NAMES - TO
            && body_distance == NAMES - BODY + string_bytes
            && u32::from_le_bytes(*body_bytes) as usize == body.len()
            && u64::from(last_word) >> (8 * (4 - zeros.len())) == 0;
        if !well_laid {
            return None;
        }
        let [class, kind] = chunk(head, CLASS).ok()?;
        let ack_timeout_ms = u32::from_le_bytes(chunk(head, ACK_TIMEOUT_MS).ok()?);
        Some(Self {
            to,
            class: Class::from_number(class)?,
            kind: BodyKind::from_number(kind).filter(|kind| kind.is_for_clients())?,
            client_seq: u64::from_le_bytes(chunk(head, CLIENT_SEQ).ok()?),
            ack_timeout_ms: (ack_timeout_ms != 0).then_some(ack_timeout_ms),
            body,
            tail,
        })
    }

    /// The same with a name that is text. Errors: `BAD_BODY`.
    pub fn check(&self) -> Result<Send<'a>, ErrorCode> {
        Ok(self.with_name(std::str::from_utf8(self.to).map_err(|_| ErrorCode::BadBody)?))
    }

    /// The same if it goes to this name, which then needs no look.
    #[inline]
    pub fn to_name<'n>(&self, name: &'n str) -> Option<Send<'n>>
    where
        'a: 'n,
    {
        (self.to == name.as_bytes()).then(|| self.with_name(name))
    }

    #[inline]
    fn with_name<'n>(&self, to: &'n str) -> Send<'n>
    where
        'a: 'n,
    {
        Send {
            to,
            class: self.class,
            kind: self.kind,
            client_seq: self.client_seq,
            ack_timeout_ms: self.ack_timeout_ms,
            body: self.body,
            mentions: Mentions::default(),
        }
    }

    /// Appends the DELIVER of this message as a transient one that nobody waits for. Only for a name that is known to be
    /// one: it is copied as it came.
    #[inline(never)] // bench/cost.sh counts its calls
    pub fn deliver(&self, codec: Codec, sender: &PlainSender<'_>, out: &mut Vec<u8>) {
        let to = TRANSIENT_NAMES + string_bytes(sender.from.len());
        let body = to + string_bytes(self.to.len());
        let (command, flags) = (Command::Deliver as u16, Flags::default());
        let header = Header { codec, command, flags, request_id: 0, body_bytes: 0 };
        append_fixed(&TRANSIENT_MESSAGE, (header, to + self.tail.len()), out, |mut fixed| {
            fixed.put(shared::TIME_MS, sender.time_ms.to_le_bytes());
            fixed.put(shared::DEVICE, sender.device.0.to_le_bytes());
            fixed.put(shared::CLIENT_SEQ, self.client_seq.to_le_bytes());
            fixed.put(shared::CLASS, [Class::Transient as u8, self.kind as u8]);
            fixed.point(shared::FROM, TRANSIENT_NAMES);
            fixed.point(shared::TO, to);
            fixed.point(shared::BODY, body);
        });
        append_string(sender.from, out);
        out.extend_from_slice(self.tail);
    }
}
