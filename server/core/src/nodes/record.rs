//! The bytes of what shards of different nodes say to each other: version, message, end mark. Pure; keeps nothing.
//!
//! Packed by hand, field by field ([`super::fields`]), and not `rkyv` archives as on disk: an archive would have to be turned
//! into these owned messages all the same, so checking it in place saves nothing here, and its layout would follow every
//! change of a type that is otherwise private to the core. What is packed has numbers of its own, is checked as it is
//! read, and a name takes its length and one byte. Peers are authenticated, and still a node with a defect must not take
//! another with it: whatever the bytes are, they are a message or a [`BadRecord`].

use ringline_cluster::link::batch::PAYLOAD_BYTES_MAX;
use ringline_schema::limits;
use ringline_schema::pack::{BadPack, Reader, Writer};

use super::fields::Field;
use crate::event::ShardMessage;

/// Version of these bytes. Two nodes only speak when both know one version: the hello of their link says which.
pub const VERSION: u8 = 1;
/// The last byte: what was cut short does not end by chance where fields at the end may be 0.
const END: u64 = 0x5a;

/// A message of the largest frame goes with the names of all members of the largest group: lengths, ids and marks beside.
const _: () = assert!(
    limits::FRAME_BYTES_CEILING as usize + limits::GROUP_MEMBERS_MAX * (limits::USER_NAME_BYTES_MAX + 2) + 64 * 1024
        <= PAYLOAD_BYTES_MAX
);

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRecord {
    /// Of another version.
    Version(u8),
    Damaged(BadPack),
    /// More bytes than the message has.
    Trailing,
}

impl std::fmt::Display for BadRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => write!(f, "version {version} of messages between nodes is not spoken here"),
            Self::Damaged(error) => error.fmt(f),
            Self::Trailing => f.write_str("bytes behind the end of a message"),
        }
    }
}

impl std::error::Error for BadRecord {}

/// Writes a message into a buffer, whose room is used again.
pub fn encode(message: &ShardMessage, out: &mut Vec<u8>) {
    out.clear();
    let mut writer = Writer(std::mem::take(out));
    writer.0.push(VERSION);
    message.put(&mut writer);
    writer.number(END);
    *out = writer.0;
}

/// Reads a message, whatever the bytes are. Errors: [`BadRecord`].
pub fn decode(payload: &[u8]) -> Result<ShardMessage, BadRecord> {
    let (&version, rest) = payload.split_first().ok_or(BadRecord::Damaged(BadPack("version")))?;
    if version != VERSION {
        return Err(BadRecord::Version(version));
    }
    let mut reader = Reader(rest);
    let message = ShardMessage::take(&mut reader).map_err(BadRecord::Damaged)?;
    if reader.number().map_err(BadRecord::Damaged)? != END {
        return Err(BadRecord::Damaged(BadPack("end")));
    }
    if reader.0.is_empty() { Ok(message) } else { Err(BadRecord::Trailing) }
}

/// A fixed sequence of numbers that is as good as random, for values of tests.
#[cfg(test)]
pub(crate) struct Dice(pub u64);

#[cfg(test)]
impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Of any length: 0 and the largest are among them.
    pub fn number(&mut self) -> u64 {
        let shift = self.next() % 65;
        self.next().checked_shr(shift as u32).unwrap_or(0)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// One of the values that an enum of the wire has.
    pub fn of<T>(&mut self, from_number: fn(u8) -> Option<T>) -> T {
        let mut values: Vec<_> = (0..=u8::MAX).filter_map(from_number).collect();
        values.swap_remove(self.below(values.len()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn bytes(message: &ShardMessage) -> Vec<u8> {
        let mut out = vec![7; 9];
        encode(message, &mut out);
        out
    }

    #[test]
    fn every_message_reads_back_and_all_kinds_are_seen() {
        let mut kinds = HashSet::new();
        for seed in 0..3_000 {
            let message = ShardMessage::throw(&mut Dice(seed));
            let bytes = bytes(&message);
            assert_eq!(decode(&bytes).as_ref(), Ok(&message), "seed {seed}");
            kinds.insert(std::mem::discriminant(&message));
        }
        assert_eq!(kinds.len(), 29, "one for each kind");
    }

    #[test]
    fn what_is_cut_short_or_goes_on_is_an_error() {
        for seed in 0..300 {
            let bytes = bytes(&ShardMessage::throw(&mut Dice(seed)));
            for length in 0..bytes.len() {
                assert!(decode(&bytes[..length]).is_err(), "seed {seed}, the first {length} of {} bytes", bytes.len());
            }
            let longer = [&bytes[..], &[0]].concat();
            assert_eq!(decode(&longer), Err(BadRecord::Trailing));
        }
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let mut bytes = bytes(&ShardMessage::Missed);
        bytes[0] = 9;
        assert_eq!(decode(&bytes), Err(BadRecord::Version(9)));
        assert!(BadRecord::Version(9).to_string().contains('9'));
    }

    #[test]
    fn a_password_never_leaves_its_node() {
        use ringline_schema::ids::UserName;
        use ringline_schema::record::{Answer, User};
        let name = UserName::new("ann").unwrap();
        let user = User { name, password_hash: Some("$argon2id$secret".into()), created_ms: 1 };
        let (number, answer) = (1, Box::new(Answer::User(Some(user))));
        let bytes = bytes(&ShardMessage::ReadDone { number, answer });
        assert!(!bytes.windows(6).any(|window| window == b"secret"));
        assert_eq!(decode(&bytes), Ok(ShardMessage::ReadDone { number: 1, answer: Box::new(Answer::Failed) }));
    }

    proptest! {
        #[test]
        fn messages_of_any_seed_read_back(seed in any::<u64>()) {
            let message = ShardMessage::throw(&mut Dice(seed));
            prop_assert_eq!(decode(&bytes(&message)), Ok(message));
        }

        #[test]
        fn garbage_and_damage_never_panic(
            seed in any::<u64>(),
            garbage in prop::collection::vec(any::<u8>(), 0..200),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let _ = decode(&garbage);
            let _ = decode(&[&[VERSION][..], &garbage].concat());
            let mut bytes = bytes(&ShardMessage::throw(&mut Dice(seed)));
            for (place, value) in flips {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            let _ = decode(&bytes);
        }
    }
}
