//! What the body of every generated message says about itself, so that whoever receives it can check it.
//!
//! Layout, little endian: hash `u64` over all that follows, magic `u32`, sender `u32`, run `u64`, number `u32`, length
//! of the whole body `u32`, intended send time `u64`, padding. Invariant: a retry has the same bytes, because every
//! byte is a function of the stamp and the length.

use ringline_schema::ids::body_hash;

/// The smallest body that carries a stamp.
pub const STAMP_BYTES: usize = 40;
const HASH_BYTES: usize = 8;
const MAGIC: u32 = u32::from_le_bytes(*b"RLbn");
const PADDING: u8 = b'.';

/// One generated message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Which run it belongs to.
    pub run: u64,
    /// Index of the sending client.
    pub sender: u32,
    /// Counts the messages of one sender from 0, whoever they go to.
    pub number: u32,
    /// When it should have been sent, in nanoseconds since the start of the run.
    pub intended_ns: u64,
}

/// Why a body is none of this run's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotOurs {
    /// A whole message of another run.
    OtherRun,
    /// Not the bytes that any run has sent.
    Corrupt,
}

impl Stamp {
    /// Replaces `body` by this stamp padded to `bytes` (at least [`STAMP_BYTES`]).
    pub fn write(&self, bytes: usize, body: &mut Vec<u8>) {
        let bytes = bytes.max(STAMP_BYTES);
        body.clear();
        body.extend_from_slice(&[0; HASH_BYTES]);
        body.extend_from_slice(&MAGIC.to_le_bytes());
        body.extend_from_slice(&self.sender.to_le_bytes());
        body.extend_from_slice(&self.run.to_le_bytes());
        body.extend_from_slice(&self.number.to_le_bytes());
        body.extend_from_slice(&u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes());
        body.extend_from_slice(&self.intended_ns.to_le_bytes());
        body.resize(bytes, PADDING);
        if let Some((head, rest)) = body.split_at_mut_checked(HASH_BYTES) {
            head.copy_from_slice(&body_hash(rest).to_le_bytes());
        }
    }

    /// Reads a body and checks every byte of it.
    pub fn read(body: &[u8], run: u64) -> Result<Self, NotOurs> {
        let stamp = Self::parse(body).ok_or(NotOurs::Corrupt)?;
        if stamp.run == run { Ok(stamp) } else { Err(NotOurs::OtherRun) }
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let (hash, rest) = body.split_first_chunk::<HASH_BYTES>()?;
        let (magic, fields) = rest.split_first_chunk::<4>()?;
        if u64::from_le_bytes(*hash) != body_hash(rest) || u32::from_le_bytes(*magic) != MAGIC {
            return None;
        }
        let (sender, fields) = fields.split_first_chunk::<4>()?;
        let (run, fields) = fields.split_first_chunk::<8>()?;
        let (number, fields) = fields.split_first_chunk::<4>()?;
        let (length, fields) = fields.split_first_chunk::<4>()?;
        let (intended, _) = fields.split_first_chunk::<8>()?;
        (u32::from_le_bytes(*length) as usize == body.len()).then(|| Self {
            run: u64::from_le_bytes(*run),
            sender: u32::from_le_bytes(*sender),
            number: u32::from_le_bytes(*number),
            intended_ns: u64::from_le_bytes(*intended),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { run: 7, sender: 3, number: 99, intended_ns: 123_456_789 };

    #[test]
    fn a_stamp_survives_and_fills_the_asked_length() {
        for bytes in [0, STAMP_BYTES, 64, 5_000] {
            let mut body = vec![1, 2, 3];
            STAMP.write(bytes, &mut body);
            assert_eq!(body.len(), bytes.max(STAMP_BYTES));
            assert_eq!(Stamp::read(&body, 7), Ok(STAMP));
            assert_eq!(Stamp::read(&body, 8), Err(NotOurs::OtherRun));
        }
    }

    #[test]
    fn any_changed_cut_or_added_byte_is_seen() {
        let mut body = Vec::new();
        STAMP.write(64, &mut body);
        for at in 0..body.len() {
            let mut changed = body.clone();
            changed[at] ^= 1;
            assert_eq!(Stamp::read(&changed, 7), Err(NotOurs::Corrupt), "byte {at}");
            assert_eq!(Stamp::read(&body[..at], 7), Err(NotOurs::Corrupt), "cut at {at}");
        }
        body.push(PADDING);
        assert_eq!(Stamp::read(&body, 7), Err(NotOurs::Corrupt));
    }
}
