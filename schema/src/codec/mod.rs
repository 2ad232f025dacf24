//! The seam between the plain structs of [`crate::message`] and the bytes of a body.
//!
//! The codec byte of each frame picks the codec, and an answer uses the codec of its request. A second codec joins by
//! one variant here; any other byte is refused by name (`BAD_CODEC`) when the header is read.

mod flat;

pub use flat::hot::{PlainSend, PlainSender};

use crate::commands::{Command, Direction};
use crate::errors::ErrorCode;
use crate::frame::{Flags, Header};
use crate::limits::FRAME_HEADER_BYTES;
use crate::message::{Message, Reply, Request, SendAck};

/// How a body is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// The tables of `fbs/wire.fbs`.
    #[default]
    FlatBuffers = 0,
}

impl Codec {
    pub fn from_number(number: u8) -> Option<Self> {
        (number == 0).then_some(Self::FlatBuffers)
    }
}

/// Decodes what a client sent. Verified with our own limits; borrows from the body.
///
/// Errors: `UNKNOWN_COMMAND` for a number that is no request, `BAD_BODY` for a body that is not this command's table,
/// `BAD_REQUEST` for a number outside its list (class, kind).
pub fn decode_request<'a>(header: &Header, body: &'a [u8]) -> Result<Request<'a>, ErrorCode> {
    let command = Command::from_number(header.command)
        .filter(|command| command.direction() == Direction::Request)
        .ok_or(ErrorCode::UnknownCommand)?;
    match header.codec {
        Codec::FlatBuffers => flat::decode_request(command, body),
    }
}

/// Decodes a SEND that is laid out as [`Encoder`] lays it out, but for its name; `None` for anything else, sound or not,
/// which is for [`decode_request`]. Less than half of the work, and what most messages are.
#[inline]
pub fn decode_plain_send<'a>(header: &Header, body: &'a [u8]) -> Option<PlainSend<'a>> {
    if header.command != Command::Send as u16 {
        return None;
    }
    match header.codec {
        Codec::FlatBuffers => PlainSend::read(body),
    }
}

/// Decodes what a server sent; the client's half. Errors as [`decode_request`].
pub fn decode_reply<'a>(header: &Header, body: &'a [u8]) -> Result<Reply<'a>, ErrorCode> {
    let command = Command::from_number(header.command)
        .filter(|command| command.direction() != Direction::Request)
        .ok_or(ErrorCode::UnknownCommand)?;
    match header.codec {
        Codec::FlatBuffers => flat::decode_reply(command, body),
    }
}

/// Writes frames. Keeps its scratch memory between calls: one per shard or client.
#[derive(Default)]
pub struct Encoder {
    flat: flat::Builder,
}

impl Encoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one whole request frame to `out`.
    pub fn request(&mut self, codec: Codec, request_id: u32, request: &Request<'_>, out: &mut Vec<u8>) {
        self.request_flagged((codec, Flags::default()), request_id, request, out);
    }

    /// The same with flags.
    pub fn request_flagged(
        &mut self,
        (codec, flags): (Codec, Flags),
        request_id: u32,
        request: &Request<'_>,
        out: &mut Vec<u8>,
    ) {
        let header = Header { codec, command: request.command() as u16, flags, request_id, body_bytes: 0 };
        match codec {
            Codec::FlatBuffers => {
                if !flat::hot::write_request(header, request, out) {
                    append(header, self.flat.request(request), out);
                }
            }
        }
    }

    /// Appends the DELIVER of a message: the same as [`Encoder::reply`] of it, without a copy of it.
    #[inline]
    pub fn deliver(&mut self, codec: Codec, message: &Message<'_>, out: &mut Vec<u8>) {
        let (command, flags) = (Command::Deliver as u16, Flags::default());
        let header = Header { codec, command, flags, request_id: 0, body_bytes: 0 };
        match codec {
            Codec::FlatBuffers => {
                if !flat::hot::write_deliver(header, message, out) {
                    append(header, self.flat.reply(&Reply::Deliver(*message)), out);
                }
            }
        }
    }

    /// Appends a SEND_ACK: the same as [`Encoder::reply`] of it.
    #[inline]
    pub fn send_ack(&mut self, codec: Codec, request_id: u32, ack: &SendAck, out: &mut Vec<u8>) {
        let (command, flags) = (Command::SendAck as u16, Flags::default());
        match codec {
            Codec::FlatBuffers => {
                flat::hot::write_send_ack(Header { codec, command, flags, request_id, body_bytes: 0 }, ack, out);
            }
        }
    }

    /// Appends one whole answer or push frame to `out`. Pushes have request id 0.
    pub fn reply(&mut self, codec: Codec, request_id: u32, reply: &Reply<'_>, out: &mut Vec<u8>) {
        let (command, flags) = (reply.command() as u16, Flags::default());
        let header = Header { codec, command, flags, request_id, body_bytes: 0 };
        match codec {
            Codec::FlatBuffers => {
                if !flat::hot::write_reply(header, reply, out) {
                    append(header, self.flat.reply(reply), out);
                }
            }
        }
    }
}

/// Appends a frame; `header.body_bytes` is set here.
fn append(header: Header, body: &[u8], out: &mut Vec<u8>) {
    let header = Header { body_bytes: body.len() as u32, ..header };
    out.reserve(FRAME_HEADER_BYTES + body.len());
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(body);
}

#[cfg(test)]
mod tests;
