//! Codec 0 for the four tables that every message passes: SEND, SEND_ACK, DELIVER and ACK.
//!
//! What is read and written here are the same FlatBuffers as everywhere, only without the general verifier and builder,
//! which cost a fifth of a core under load. Tables with rare fields (mentions, amendments, group changes) are left to
//! them. The tests hold both ways of reading against each other on sound and damaged bodies, and every written body
//! against the general verifier.
//!
//! A table: `u32` offset of the table from the body's beginning; the table begins with an `i32`, the distance back to
//! its vtable: `u16` bytes of the vtable, `u16` bytes of the table, then for each field (a slot) a `u16`, the distance
//! of its value from the table's beginning, 0 where the field has its default. Strings and vectors lie anywhere
//! behind the `u32` that tells their distance. All little-endian, numbers aligned to their size from the body's beginning.

mod plain;
mod read;
mod write;

pub use plain::{PlainSend, PlainSender};
pub(super) use read::{read_ack, read_message, read_send, read_send_ack};
pub(in crate::codec) use write::{write_deliver, write_reply, write_request, write_send_ack};

/// Slots of `Send`.
mod send {
    pub const TO: usize = 0;
    pub const CLASS: usize = 1;
    pub const KIND: usize = 2;
    pub const CLIENT_SEQ: usize = 3;
    pub const ACK_TIMEOUT_MS: usize = 4;
    pub const BODY: usize = 5;
    /// From here on the rare ones: mentions.
    pub const RARE: usize = 6;
}

/// Slots of `Ack`.
mod ack {
    pub const CONVERSATION: usize = 0;
    pub const SEQ: usize = 1;
    pub const DELIVERY: usize = 2;
}

/// Slots of `SendAck`.
mod send_ack {
    pub const CONVERSATION: usize = 0;
    pub const SEQ: usize = 1;
    pub const TIME_MS: usize = 2;
    pub const DUP: usize = 3;
}

/// Slots of `Message`.
mod message {
    pub const CONVERSATION: usize = 0;
    pub const SEQ: usize = 1;
    pub const TIME_MS: usize = 2;
    pub const FROM: usize = 3;
    pub const TO: usize = 4;
    pub const DEVICE: usize = 5;
    pub const CLIENT_SEQ: usize = 6;
    pub const CLASS: usize = 7;
    pub const KIND: usize = 8;
    pub const DELIVERY: usize = 9;
    pub const BODY: usize = 10;
    /// From here on the rare ones: mentions, amendments, group changes.
    pub const RARE: usize = 11;
}

#[cfg(test)]
mod tests;
