//! Keys and values of the index, as bytes. Pure; any thread.
//!
//! Keys sort as they are read: everything of a conversation lies together. Numbers in keys are big endian, numbers in
//! values are variable-length. Every merge here gives the same whatever the order and however often it is repeated, so
//! logs can be replayed one after the other and from any earlier place.

use ringline_schema::ids::{ConversationId, DeviceKey, Seq, UserName};
use ringline_schema::limits::DUPLICATE_WINDOW;
use ringline_schema::pack;
use ringline_schema::record::{Accepted, User};
use ringline_schema::rows::{Row, RowKey, RowValue};

use super::format::{Place, Position};

/// Version of everything in this file; another one found on disk means: rebuild.
pub(super) const ROWS_VERSION: u8 = 2;
/// Places in one block row.
pub(super) const BLOCK_PLACES: u64 = 64;

/// A value that does not read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a row of the index is damaged: {0}")]
pub(super) struct BadRow(pub &'static str);

/// Key of the row that says which data folder and which version of rows this is.
pub(super) const IDENTITY_KEY: &[u8] = b"mi";

/// Prefix of the watermark rows.
pub(super) const WATERMARK_PREFIX: &[u8] = b"mw";

pub(super) fn watermark_key(log: u16) -> [u8; 4] {
    let [high, low] = log.to_be_bytes();
    [b'm', b'w', high, low]
}

pub(super) fn log_of_watermark_key(key: &[u8]) -> Result<u16, BadRow> {
    match key {
        [b'm', b'w', high, low] => Ok(u16::from_be_bytes([*high, *low])),
        _ => Err(BadRow("watermark key")),
    }
}

/// Prefix of the rows that say where a log begins, since retention let go of what was before.
pub(super) const KEPT_PREFIX: &[u8] = b"mk";

pub(super) fn kept_key(log: u16) -> [u8; 4] {
    let [high, low] = log.to_be_bytes();
    [b'm', b'k', high, low]
}

pub(super) fn log_of_kept_key(key: &[u8]) -> Result<u16, BadRow> {
    match key {
        [b'm', b'k', high, low] => Ok(u16::from_be_bytes([*high, *low])),
        _ => Err(BadRow("log start key")),
    }
}

/// Whether a row goes into a checkpoint: all but the places of messages and what is said of this index itself.
pub(super) fn outlives_log(key: &[u8]) -> bool {
    match key.first() {
        Some(b'm') => false,
        Some(b'c') => key.get(17) != Some(&b'p'),
        Some(_) | None => true,
    }
}

pub(super) fn head_key(conversation: ConversationId) -> [u8; 18] {
    conversation_key(conversation, b'h')
}

pub(super) fn block_key(conversation: ConversationId, block: u64) -> [u8; 26] {
    let mut key = [0; 26];
    key[..18].copy_from_slice(&conversation_key(conversation, b'p'));
    key[18..].copy_from_slice(&block.to_be_bytes());
    key
}

pub(super) fn filter_key(conversation: ConversationId, device: DeviceKey) -> [u8; 34] {
    let mut key = [0; 34];
    key[..18].copy_from_slice(&conversation_key(conversation, b'f'));
    key[18..].copy_from_slice(&device.0.to_be_bytes());
    key
}

fn conversation_key(conversation: ConversationId, part: u8) -> [u8; 18] {
    let mut key = [0; 18];
    key[0] = b'c';
    key[1..17].copy_from_slice(&conversation.0.to_be_bytes());
    key[17] = part;
    key
}

/// What a row of a conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConversationPart {
    Head,
    Filter,
    /// With its number.
    Block(u64),
}

/// Prefix of the rows of conversations; in order: filters, head, blocks.
pub(super) const CONVERSATION_PREFIX: &[u8] = b"c";

pub(super) fn conversation_of_key(key: &[u8]) -> Result<(ConversationId, ConversationPart), BadRow> {
    const BAD: BadRow = BadRow("conversation key");
    let (id, rest) = key.get(1..).and_then(|rest| rest.split_first_chunk::<16>()).ok_or(BAD)?;
    let part = match rest {
        [b'h'] => ConversationPart::Head,
        [b'f', device @ ..] if device.len() == 16 => ConversationPart::Filter,
        [b'p', block @ ..] => ConversationPart::Block(u64::from_be_bytes(block.try_into().map_err(|_| BAD)?)),
        _ => return Err(BAD),
    };
    Ok((ConversationId(u128::from_be_bytes(*id)), part))
}

pub(super) const USER_PREFIX: &[u8] = b"u";

pub(super) fn name_of_user_key(key: &[u8]) -> Result<UserName, BadRow> {
    let text = key.get(1..).and_then(|name| std::str::from_utf8(name).ok()).ok_or(BadRow("user key"))?;
    UserName::new(text).map_err(|_| BadRow("user key"))
}

/// The device's key stands for its user: it is a hash of both.
pub(super) fn cursor_key(device: DeviceKey, conversation: ConversationId) -> [u8; 33] {
    let mut key = [0; 33];
    key[0] = b'k';
    key[1..17].copy_from_slice(&device.0.to_be_bytes());
    key[17..].copy_from_slice(&conversation.0.to_be_bytes());
    key
}

/// What the cursors of a device begin with.
pub(super) fn cursor_prefix(device: DeviceKey) -> [u8; 17] {
    let mut prefix = [0; 17];
    prefix[0] = b'k';
    prefix[1..].copy_from_slice(&device.0.to_be_bytes());
    prefix
}

pub(super) fn conversation_of_cursor_key(key: &[u8]) -> Result<ConversationId, BadRow> {
    let id = key.get(17..).and_then(|id| id.try_into().ok()).ok_or(BadRow("cursor key"))?;
    Ok(ConversationId(u128::from_be_bytes(id)))
}

pub(super) fn user_key(name: &UserName) -> Vec<u8> {
    [b"u", name.as_str().as_bytes()].concat()
}

/// A name holds no control characters, so a zero ends it.
pub(super) fn list_key(user: &UserName, conversation: ConversationId) -> Vec<u8> {
    [b"l", user.as_str().as_bytes(), &[0], &conversation.0.to_be_bytes()].concat()
}

pub(super) fn conversation_of_list_key(key: &[u8]) -> Result<ConversationId, BadRow> {
    let id = key.last_chunk::<16>().ok_or(BadRow("conversation list key"))?;
    Ok(ConversationId(u128::from_be_bytes(*id)))
}

/// Prefix of the keyed rows; behind it stand the bytes of their own keys.
pub(super) const KEYED_PREFIX: u8 = b'r';

pub(super) fn keyed_key(key: &[u8]) -> Vec<u8> {
    [&[KEYED_PREFIX], key].concat()
}

pub(super) fn encode_keyed(row: &Row) -> Vec<u8> {
    let mut out = pack::Writer::default();
    out.number(row.stamp);
    out.number(u64::from(row.value.is_some()));
    if let Some(value) = &row.value {
        out.bytes(&value.encode());
    }
    out.0
}

pub(super) fn decode_keyed(key: RowKey, bytes: &[u8]) -> Result<Row, BadRow> {
    let read = || {
        let mut row = pack::Reader(bytes);
        let (stamp, there) = (row.number()?, row.number()?);
        let value = if there == 0 { None } else { Some(RowValue::decode(&key, row.bytes()?)?) };
        Ok((stamp, value))
    };
    let (stamp, value) = read().map_err(|pack::BadPack(what)| BadRow(what))?;
    Ok(Row { key, stamp, value })
}

/// The block of a seq and its slot in it. Seqs begin at 1.
pub(super) fn block_of(seq: Seq) -> (u64, usize) {
    let from_0 = seq.0.saturating_sub(1);
    (from_0 / BLOCK_PLACES, (from_0 % BLOCK_PLACES) as usize)
}

/// How far the index knows a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watermark {
    pub at: Position,
    /// The run that wrote what lies before.
    pub run: u64,
    /// The log ended exactly there when the store was closed.
    pub closed: bool,
}

impl Watermark {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.number(u64::from(self.at.segment));
        out.number(u64::from(self.at.offset));
        out.number(self.run);
        out.number(u64::from(self.closed));
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadRow> {
        let mut row = Reader(bytes);
        let at = Position { segment: row.small()?, offset: row.small()? };
        Ok(Self { at, run: row.number()?, closed: row.number()? == 1 })
    }
}

/// Where a log begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// The first segment that must be there. Those below were let go, or will be.
    pub segment: u32,
    /// The run that was writing when it begins.
    pub run: u64,
}

impl Default for Kept {
    fn default() -> Self {
        Self { segment: 1, run: 0 }
    }
}

impl Kept {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.number(u64::from(self.segment));
        out.number(self.run);
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadRow> {
        let mut row = Reader(bytes);
        Ok(Self { segment: row.small()?, run: row.number()? })
    }
}

/// State of a conversation. `head` 0: no message yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HeadRow {
    pub created: Option<Created>,
    /// The lowest that was ever seen.
    pub lowest: Seq,
    /// What is below was let go by retention, wherever it may still lie. Only rises.
    pub floor: Seq,
    pub head: Seq,
    /// Time of the message `head`.
    pub last_time_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Created {
    pub members: [UserName; 2],
    pub created_ms: u64,
}

impl HeadRow {
    /// Takes in a message of the conversation.
    pub fn add(&mut self, seq: Seq, time_ms: u64) {
        if self.lowest == Seq::ZERO || seq < self.lowest {
            self.lowest = seq;
        }
        if seq >= self.head {
            self.head = seq;
            self.last_time_ms = time_ms;
        }
    }

    pub fn merge(&mut self, other: &Self) {
        if self.created.is_none() {
            self.created.clone_from(&other.created);
        }
        if other.head != Seq::ZERO {
            let (last_time_ms, head) = (other.last_time_ms, other.head);
            self.add(head, last_time_ms);
            self.lowest = self.lowest.min(other.lowest);
        }
        self.floor = self.floor.max(other.floor);
    }

    /// The oldest message that is kept; head + 1 when none is, 0 when there never was one.
    pub fn first(&self) -> Seq {
        if self.head == Seq::ZERO { Seq::ZERO } else { self.lowest.max(self.floor) }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.number(self.lowest.0);
        out.number(self.head.0);
        out.number(self.last_time_ms);
        out.number(self.floor.0);
        if let Some(created) = &self.created {
            out.number(created.created_ms);
            for member in &created.members {
                out.text(member.as_str());
            }
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadRow> {
        let mut row = Reader(bytes);
        let (lowest, head, last_time_ms) = (Seq(row.number()?), Seq(row.number()?), row.number()?);
        let floor = Seq(row.number()?);
        let created = if row.0.is_empty() {
            None
        } else {
            let created_ms = row.number()?;
            Some(Created { members: [row.name()?, row.name()?], created_ms })
        };
        Ok(Self { created, lowest, floor, head, last_time_ms })
    }
}

/// Places of up to 64 messages; a slot is empty until its message was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block(pub [Option<Place>; BLOCK_PLACES as usize]);

impl Default for Block {
    fn default() -> Self {
        Self([None; BLOCK_PLACES as usize])
    }
}

impl Block {
    pub fn is_full(&self) -> bool {
        self.0.iter().all(Option::is_some)
    }

    pub fn set(&mut self, slot: usize, place: Place) {
        if let Some(kept) = self.0.get_mut(slot) {
            *kept = Some(place);
        }
    }

    /// Fills the slots that are empty here.
    pub fn merge(&mut self, other: &Self) {
        for (kept, place) in self.0.iter_mut().zip(&other.0) {
            *kept = kept.or(*place);
        }
    }

    /// A bitmap of the slots, then each place as the difference to the one before: mostly 6 to 8 bytes.
    /// Appended to `out`, which a flush uses for one block after the other.
    pub fn encode(&self, out: &mut Writer) {
        let present = self.0.iter().rev().fold(0, |bits: u64, place| bits << 1 | u64::from(place.is_some()));
        out.0.extend_from_slice(&present.to_le_bytes());
        let mut last = Place::default();
        for place in self.0.iter().flatten() {
            out.number(u64::from(place.log ^ last.log));
            out.difference(place.segment, last.segment);
            out.difference(place.offset, last.offset);
            out.number(u64::from(place.bytes));
            last = *place;
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadRow> {
        let (present, rest) = bytes.split_first_chunk::<8>().ok_or(BadRow("block"))?;
        let mut present = u64::from_le_bytes(*present);
        let mut row = Reader(rest);
        let mut block = Self::default();
        let mut last = Place::default();
        for slot in &mut block.0 {
            if present & 1 == 1 {
                let log = last.log ^ u16::try_from(row.number()?).map_err(|_| BadRow("block"))?;
                let (segment, offset) = (row.sum(last.segment)?, row.sum(last.offset)?);
                last = Place { log, segment, offset, bytes: row.small()? };
                *slot = Some(last);
            }
            present >>= 1;
        }
        Ok(block)
    }
}

/// A duplicate filter: entries rising by client_seq, at most the window of them.
pub(super) fn encode_filter(entries: &[Accepted]) -> Vec<u8> {
    let mut out = Writer(Vec::with_capacity(entries.len() * 16));
    let mut last = Accepted { client_seq: 0, seq: Seq::ZERO, time_ms: 0, body_hash: 0 };
    for entry in entries {
        // Wrapping differences: right for any values, short for the usual rising ones.
        out.number(entry.client_seq.wrapping_sub(last.client_seq));
        out.number(entry.seq.0.wrapping_sub(last.seq.0));
        out.number(entry.time_ms.wrapping_sub(last.time_ms));
        out.0.extend_from_slice(&entry.body_hash.to_le_bytes());
        last = *entry;
    }
    out.0
}

pub(super) fn decode_filter(bytes: &[u8]) -> Result<Vec<Accepted>, BadRow> {
    let mut row = Reader(bytes);
    let mut entries = Vec::new();
    let mut last = Accepted { client_seq: 0, seq: Seq::ZERO, time_ms: 0, body_hash: 0 };
    while !row.0.is_empty() {
        last.client_seq = last.client_seq.wrapping_add(row.number()?);
        last.seq = Seq(last.seq.0.wrapping_add(row.number()?));
        last.time_ms = last.time_ms.wrapping_add(row.number()?);
        let (hash, rest) = row.0.split_first_chunk::<8>().ok_or(BadRow("duplicate filter"))?;
        last.body_hash = u64::from_le_bytes(*hash);
        row = Reader(rest);
        entries.push(last);
        if entries.len() > DUPLICATE_WINDOW {
            return Err(BadRow("duplicate filter"));
        }
    }
    Ok(entries)
}

/// A user, and the run that wrote it.
pub(super) fn encode_user((run, user): &(u64, User)) -> Vec<u8> {
    let mut out = Writer::default();
    out.number(*run);
    out.number(user.created_ms);
    if let Some(hash) = &user.password_hash {
        out.text(hash);
    }
    out.0
}

pub(super) fn decode_user(name: &UserName, bytes: &[u8]) -> Result<(u64, User), BadRow> {
    let mut row = Reader(bytes);
    let (run, created_ms) = (row.number()?, row.number()?);
    let password_hash = if row.0.is_empty() { None } else { Some(row.text()?.to_owned()) };
    Ok((run, User { name: name.clone(), password_hash, created_ms }))
}

pub(super) fn encode_seq(seq: Seq) -> Vec<u8> {
    let mut out = Writer::default();
    out.number(seq.0);
    out.0
}

pub(super) fn decode_seq(bytes: &[u8]) -> Result<Seq, BadRow> {
    Reader(bytes).number().map(Seq)
}

#[derive(Default)]
pub(super) struct Writer(pub Vec<u8>);

impl Writer {
    /// Seven bits a byte, lowest first.
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// The signed difference, its sign in the lowest bit.
    fn difference(&mut self, value: u32, last: u32) {
        let difference = i64::from(value) - i64::from(last);
        self.number(((difference << 1) ^ (difference >> 63)) as u64);
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn number(&mut self) -> Result<u64, BadRow> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(BadRow("number"))?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(BadRow("number"))
    }

    fn small(&mut self) -> Result<u32, BadRow> {
        u32::try_from(self.number()?).map_err(|_| BadRow("number"))
    }

    fn sum(&mut self, last: u32) -> Result<u32, BadRow> {
        let coded = self.number()?;
        let difference = (coded >> 1) as i64 ^ -((coded & 1) as i64);
        let sum = i64::from(last).checked_add(difference).ok_or(BadRow("number"))?;
        u32::try_from(sum).map_err(|_| BadRow("number"))
    }

    fn text(&mut self) -> Result<&'a str, BadRow> {
        let bytes = usize::try_from(self.number()?).map_err(|_| BadRow("text"))?;
        let (text, rest) = self.0.split_at_checked(bytes).ok_or(BadRow("text"))?;
        self.0 = rest;
        std::str::from_utf8(text).map_err(|_| BadRow("text"))
    }

    fn name(&mut self) -> Result<UserName, BadRow> {
        UserName::new(self.text()?).map_err(|_| BadRow("user name"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place() -> impl Strategy<Value = Place> {
        (any::<u16>(), any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(log, segment, offset, bytes)| Place {
            log,
            segment,
            offset,
            bytes,
        })
    }

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    proptest! {
        #[test]
        fn blocks_and_filters_read_back(
            places in prop::collection::vec(prop::option::of(place()), 64),
            numbers in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..=64),
        ) {
            let block = Block(places.try_into().unwrap());
            let mut out = Writer::default();
            block.encode(&mut out);
            prop_assert_eq!(Block::decode(&out.0), Ok(block));
            let entries: Vec<_> = numbers
                .iter()
                .map(|&(client_seq, seq, time_ms, body_hash)| Accepted { client_seq, seq: Seq(seq), time_ms, body_hash })
                .collect();
            prop_assert_eq!(decode_filter(&encode_filter(&entries)), Ok(entries));
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Block::decode(&bytes);
            let _ = decode_filter(&bytes);
            let _ = HeadRow::decode(&bytes);
            let _ = decode_user(&name("ann"), &bytes);
            let _ = Watermark::decode(&bytes);
        }

        #[test]
        fn heads_merge_in_any_order(seqs in prop::collection::vec(1u64..50, 1..20), cut in any::<prop::sample::Index>()) {
            let head = |seqs: &[u64]| {
                let mut head = HeadRow { floor: Seq(seqs.iter().sum::<u64>() % 60), ..HeadRow::default() };
                seqs.iter().for_each(|&seq| head.add(Seq(seq), seq * 10));
                head
            };
            let (left, right) = seqs.split_at(cut.index(seqs.len()));
            let (mut one, mut other) = (head(left), head(right));
            let whole = HeadRow { floor: one.floor.max(other.floor), ..head(&seqs) };
            let one_was = one.clone();
            one.merge(&other);
            other.merge(&one_was);
            prop_assert_eq!(&one, &whole);
            prop_assert_eq!(&other, &whole);
        }
    }

    #[test]
    fn a_full_block_of_neighbours_is_small() {
        let mut block = Block::default();
        for slot in 0..64u32 {
            block.set(slot as usize, Place { log: 1, segment: 3, offset: 50_000 + slot * 400, bytes: 180 });
        }
        assert!(block.is_full());
        let mut out = Writer::default();
        block.encode(&mut out);
        assert!(out.0.len() < 64 * 7, "{}", out.0.len());
    }

    #[test]
    fn rows_read_back() {
        let created = Some(Created { members: [name("ann"), name("bøb")], created_ms: 5 });
        let head = HeadRow { created, lowest: Seq(1), floor: Seq(290), head: Seq(300), last_time_ms: 1 << 41 };
        assert_eq!(head.first(), Seq(290));
        assert_eq!(HeadRow::decode(&head.encode()), Ok(head));
        assert_eq!(HeadRow::decode(&HeadRow::default().encode()), Ok(HeadRow::default()));
        for password_hash in [None, Some("$argon2id$".to_owned())] {
            let user = User { name: name("ann"), password_hash, created_ms: 7 };
            let name = user.name.clone();
            assert_eq!(decode_user(&name, &encode_user(&(3, user.clone()))), Ok((3, user)));
        }
        let watermark = Watermark { at: Position { segment: 7, offset: u32::MAX }, run: 300, closed: true };
        assert_eq!(Watermark::decode(&watermark.encode()), Ok(watermark));
        assert_eq!(log_of_watermark_key(&watermark_key(513)), Ok(513));
        let kept = Kept { segment: 70_000, run: 300 };
        assert_eq!(Kept::decode(&kept.encode()), Ok(kept));
        assert_eq!(log_of_kept_key(&kept_key(513)), Ok(513));
        let id = ConversationId(u128::MAX / 3);
        assert_eq!(conversation_of_list_key(&list_key(&name("ann"), id)), Ok(id));
    }
}
