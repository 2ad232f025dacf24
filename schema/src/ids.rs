//! Names and numbers that everything else is keyed by.
//!
//! All hashes here are part of the disk format and of placement: they never change.

use std::borrow::Borrow;
use std::fmt;

use smol_str::SmolStr;

use crate::errors::ErrorCode;
use crate::limits;

/// Fixed number of partitions, for ever. Users, groups and direct conversations each live in one.
pub const PARTITIONS: u16 = 1024;

/// One of the 1,024 placement units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition(u16);

impl Partition {
    /// `None` when `number` is not below [`PARTITIONS`].
    pub fn new(number: u16) -> Option<Self> {
        (number < PARTITIONS).then_some(Self(number))
    }

    pub fn number(self) -> u16 {
        self.0
    }

    /// The partition of a user: `xxh3_64(name) % 1024`.
    pub fn of_user(name: &str) -> Self {
        Self((xxhash_rust::xxh3::xxh3_64(name.as_bytes()) % u64::from(PARTITIONS)) as u16)
    }
}

/// A name: UTF-8, 1 to 64 bytes, no control characters, no white space at its ends.
///
/// Users and groups share one space of names, so that a message has one `to`: what begins with `#` names a group
/// ([`UserName::is_group`]), and nobody can register or log in under it. Cheap to clone: up to 23 bytes inline, shared above.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserName(SmolStr);

impl UserName {
    /// Checks the rules above. Comparison is by bytes: no case folding, no normalisation.
    pub fn new(name: &str) -> Result<Self, ErrorCode> {
        let length_ok = !name.is_empty() && name.len() <= limits::USER_NAME_BYTES_MAX;
        // Names of visible ASCII keep all rules; looking at bytes is several times faster than at characters.
        let plain = name.bytes().all(|byte| byte.is_ascii_graphic());
        let ruled_out = || name.chars().any(char::is_control) || name.trim() != name;
        if !length_ok || (!plain && ruled_out()) {
            return Err(ErrorCode::BadName);
        }
        Ok(Self(SmolStr::new(name)))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The partition of the user. A group's is that of its conversation.
    pub fn partition(&self) -> Partition {
        Partition::of_user(&self.0)
    }

    /// Whether this names a group: `#` and something behind it.
    pub fn is_group(&self) -> bool {
        self.0.starts_with('#')
    }

    /// A name that a user can have. Errors: `BAD_NAME`, also for the name of a group.
    pub fn of_user(name: &str) -> Result<Self, ErrorCode> {
        Self::new(name).ok().filter(|name| !name.is_group()).ok_or(ErrorCode::BadName)
    }

    /// A name that a group can have. Errors: `BAD_GROUP`.
    pub fn of_group(name: &str) -> Result<Self, ErrorCode> {
        Self::new(name).ok().filter(|name| name.is_group() && name.0.len() > 1).ok_or(ErrorCode::BadGroup)
    }
}

impl Borrow<str> for UserName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a client calls its device; unique among the devices of one user. Never 0 on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u64);

/// Identity of a device across users: the first 16 bytes of `blake3(user name ‖ 0 ‖ device id)`.
///
/// A cryptographic hash, because a peer chooses its device id freely and must not be able to land in the duplicate
/// filter of somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceKey(pub u128);

impl DeviceKey {
    pub fn new(user: &UserName, device: DeviceId) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(user.as_str().as_bytes());
        hasher.update(&[0]);
        hasher.update(&device.0.to_le_bytes());
        Self(first_16(&hasher.finalize()))
    }
}

/// A place in a conversation: 1, 2, 3 … without a gap. 0 means "before the first".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seq(pub u64);

impl Seq {
    pub const ZERO: Self = Self(0);

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A conversation: its partition in the top 10 bits, its kind in the next 2, then 116 bits of hash.
///
/// The partition is part of the id, so whoever holds an id knows the owner without a look-up.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConversationId(pub u128);

/// Bits 117..116 of a [`ConversationId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConversationKind {
    Direct,
    Group,
}

const HASH_BITS: u32 = 116;
const PARTITION_SHIFT: u32 = 118;

impl ConversationId {
    /// The one conversation of two users (or of a user with itself), the same from both sides.
    ///
    /// It lives in the partition of one of the two, picked by the lowest bit of the hash, so that the two share the load.
    pub fn direct(one: &UserName, other: &UserName) -> Self {
        let (low, high) = if one <= other { (one, other) } else { (other, one) };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[low.as_str().len() as u8]);
        hasher.update(low.as_str().as_bytes());
        hasher.update(high.as_str().as_bytes());
        let hash = first_16(&hasher.finalize());
        let home = if hash & 1 == 0 { low } else { high };
        let partition = u128::from(home.partition().number()) << PARTITION_SHIFT;
        Self(partition | (hash & ((1 << HASH_BITS) - 1)))
    }

    /// The conversation of a group. Its partition is the group's, by its name.
    pub fn group(name: &UserName) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"group\0");
        hasher.update(name.as_str().as_bytes());
        let hash = first_16(&hasher.finalize());
        let partition = u128::from(name.partition().number()) << PARTITION_SHIFT;
        Self(partition | (1 << HASH_BITS) | (hash & ((1 << HASH_BITS) - 1)))
    }

    /// The conversation that `me` has with a user or in a group.
    pub fn with(me: &UserName, name: &UserName) -> Self {
        if name.is_group() { Self::group(name) } else { Self::direct(me, name) }
    }

    pub fn partition(self) -> Partition {
        Partition((self.0 >> PARTITION_SHIFT) as u16)
    }

    /// The lowest and the highest number that a conversation of a partition can have.
    pub fn range_of(partition: Partition) -> (Self, Self) {
        let low = u128::from(partition.number()) << PARTITION_SHIFT;
        (Self(low), Self(low | ((1 << PARTITION_SHIFT) - 1)))
    }

    /// `None` for a kind number that no version has used.
    pub fn kind(self) -> Option<ConversationKind> {
        match (self.0 >> HASH_BITS) & 3 {
            0 => Some(ConversationKind::Direct),
            1 => Some(ConversationKind::Group),
            _ => None,
        }
    }
}

impl fmt::Debug for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Fingerprint of a message body, kept beside its client_seq: a repeat with another body is a conflict.
pub fn body_hash(body: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(body)
}

fn first_16(hash: &blake3::Hash) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(hash.as_bytes().first_chunk::<16>().unwrap_or(&[0; 16]));
    u128::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    #[test]
    fn names_are_1_to_64_bytes_of_clean_utf8() {
        assert!(UserName::new("a").is_ok());
        assert!(UserName::new("Jürgen 老师").is_ok());
        assert!(UserName::new(&"x".repeat(64)).is_ok());
        for bad in ["", " a", "a ", "a\nb", "a\0", "\u{7f}", &"x".repeat(65), &"é".repeat(33)] {
            assert_eq!(UserName::new(bad), Err(ErrorCode::BadName), "{bad:?}");
        }
    }

    #[test]
    fn a_direct_conversation_is_the_same_from_both_sides_and_lives_with_one_of_them() {
        let mut homes = [0; 2];
        for number in 0..200 {
            let (ann, bob) = (name(&format!("ann{number}")), name(&format!("bob{number}")));
            let id = ConversationId::direct(&ann, &bob);
            assert_eq!(id, ConversationId::direct(&bob, &ann));
            assert_eq!(id.kind(), Some(ConversationKind::Direct));
            assert!(id.partition() == ann.partition() || id.partition() == bob.partition());
            homes[usize::from(id.partition() == ann.partition())] += 1;
        }
        assert!(homes.iter().all(|&count| count > 60), "both ends share the load: {homes:?}");
        // Same concatenation, another boundary.
        assert_ne!(ConversationId::direct(&name("a"), &name("bc")), ConversationId::direct(&name("ab"), &name("c")));
    }

    #[test]
    fn groups_have_names_and_a_conversation_of_their_own_kind() {
        for (text, user, group) in
            [("ann", true, false), ("#ann", false, true), ("#", false, false), ("", false, false)]
        {
            assert_eq!((UserName::of_user(text).is_ok(), UserName::of_group(text).is_ok()), (user, group), "{text:?}");
        }
        let team = UserName::of_group("#team").unwrap();
        let id = ConversationId::group(&team);
        assert_eq!((id.kind(), id.partition()), (Some(ConversationKind::Group), team.partition()));
        assert_eq!(id, ConversationId::with(&name("ann"), &team));
        assert_ne!(id, ConversationId::group(&name("#team2")));
    }

    #[test]
    fn hashes_are_pinned_because_disks_remember_them() {
        let pinned = (
            Partition::of_user("ann").number(),
            Partition::of_user("bob").number(),
            ConversationId::direct(&name("ann"), &name("bob")).to_string(),
            format!("{:032x}", DeviceKey::new(&name("ann"), DeviceId(7)).0),
        );
        let expected = (712, 229, "b20b599eeeaffe1a3456a97da972e45e", "656e8a94e5371c6eed4bf0d9fb77e842");
        assert_eq!((pinned.0, pinned.1, pinned.2.as_str(), pinned.3.as_str()), expected);
    }
}
