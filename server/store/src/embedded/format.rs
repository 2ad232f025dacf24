//! Bytes of a log: the header of a segment and the frame of a record. Pure; any thread.
//!
//! A segment is a header of [`SEGMENT_HEADER_BYTES`], then records without a gap, each padded to 8 bytes, then zeros.
//! A record, little endian: length `u32` (of what follows the checksum, without padding), crc32c `u32`, type `u8` (its
//! top bit: first record of a batch), version `u8`, partition `u16`, payload.
//!
//! Two things make a cut-off tail and damage two different sights:
//! - A batch is written only when the one before is synced. So a readable record that *begins a batch* proves that
//!   everything before it was durable: damage before it is damage, not a torn tail.
//! - The checksum starts from a random salt of the segment and the record's offset. So no message body can pose as a
//!   record, and no stale or misplaced bytes are taken for one.

use rkyv::util::AlignedVec;

use ringline_schema::disk::RecordType;
use ringline_schema::ids::Partition;

use crate::RECORD_BYTES_MAX;

pub(super) const SEGMENT_HEADER_BYTES: u32 = 32;
/// Length, checksum, type, version, partition.
pub(super) const RECORD_HEADER_BYTES: usize = 12;
/// Payload of a run record.
pub(super) const RUN_BYTES: usize = 8;
/// Every record begins at a multiple of this.
pub(super) const RECORD_ALIGN_BYTES: usize = 8;
/// Names, numbers and archive pointers beside the large part of a record, at most.
pub(super) const RECORD_OVERHEAD_BYTES_MAX: usize = 512;

const MAGIC: [u8; 8] = *b"RINGLOG1";
const FORMAT_VERSION: u16 = 1;
const RECORD_VERSION: u8 = 1;
const FIRST_OF_BATCH: u8 = 0x80;
const SEAL_NUMBER: u8 = 0x7f;
const RUN_NUMBER: u8 = 0x7e;
/// Bytes of a record that the length counts before the payload: type, version, partition.
const COUNTED_HEAD_BYTES: usize = 4;
const LENGTH_MAX: usize = COUNTED_HEAD_BYTES + RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES_MAX;

/// A place between records of one log. Ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub segment: u32,
    pub offset: u32,
}

impl Position {
    /// Where the records of a segment begin.
    pub fn start_of(segment: u32) -> Self {
        Self { segment, offset: SEGMENT_HEADER_BYTES }
    }
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub log: u16,
    pub segment: u32,
    pub offset: u32,
    /// Header and payload, without padding.
    pub bytes: u32,
}

/// What a segment says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub log: u16,
    pub number: u32,
    pub salt: u32,
}

impl SegmentHeader {
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES as usize] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES as usize];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.log.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.salt.to_le_bytes());
        // 20..28: zero, for later versions.
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The error says what is wrong, for people.
    pub fn decode(bytes: &[u8; SEGMENT_HEADER_BYTES as usize]) -> Result<Self, &'static str> {
        let (head, crc) = bytes.split_at(28);
        if head.get(..8) != Some(&MAGIC) {
            return Err("not a log segment");
        }
        if u32_at(crc, 0) != Some(crc32c::crc32c(head)) {
            return Err("bad segment header");
        }
        if u16_at(head, 8) != Some(FORMAT_VERSION) {
            return Err("segment of a format that this version does not read");
        }
        match (u16_at(head, 10), u32_at(head, 12), u32_at(head, 16)) {
            (Some(log), Some(number), Some(salt)) => Ok(Self { log, number, salt }),
            _ => Err("bad segment header"),
        }
    }
}

/// What a record of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Record(RecordType),
    /// The last record of a full segment: the log goes on in the next one.
    Seal,
    /// Before the first record of a run: its number, `u64`. Runs of a data folder are counted over all logs; in one run
    /// a user's records are all in one log. So (run, place) orders them, however often the number of shards changed.
    Run,
}

/// A record whose checksum holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Framed<'a> {
    pub kind: Kind,
    pub first_of_batch: bool,
    pub partition: u16,
    pub payload: &'a [u8],
    /// Header and payload.
    pub bytes: usize,
}

impl Framed<'_> {
    /// The number in a run record.
    pub fn run(&self) -> Option<u64> {
        let number = self.payload.first_chunk::<RUN_BYTES>().filter(|_| self.kind == Kind::Run);
        number.map(|bytes| u64::from_le_bytes(*bytes))
    }
}

/// What lies at a place of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    Record(Framed<'a>),
    /// Zeros: nothing was written here.
    Nothing,
    /// The bytes end before the record does; it wants this many.
    NeedMore(usize),
    Bad(&'static str),
    /// Its checksum holds, and yet this program does not know what it is: a newer one wrote it.
    Foreign,
}

/// Leaves room for a record's header and says where it begins.
pub(super) fn begin(out: &mut AlignedVec) -> usize {
    let start = out.len();
    out.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
    start
}

/// Closes the record that began at `start` and whose payload has been appended since. `offset` is the record's place in
/// its segment.
pub(super) fn finish(out: &mut AlignedVec, start: usize, stamp: Stamp) {
    let padding = out.len().next_multiple_of(RECORD_ALIGN_BYTES) - out.len();
    let bytes = out.len() - start;
    out.extend_from_slice(&[0; RECORD_ALIGN_BYTES][..padding]);
    let number = match stamp.kind {
        Kind::Record(record_type) => record_type as u8,
        Kind::Seal => SEAL_NUMBER,
        Kind::Run => RUN_NUMBER,
    };
    let record = &mut out[start..start + bytes];
    record[8] = if stamp.first_of_batch { number | FIRST_OF_BATCH } else { number };
    record[9] = RECORD_VERSION;
    record[10..12].copy_from_slice(&stamp.partition.to_le_bytes());
    let crc = crc32c::crc32c_append(seed(stamp.salt, stamp.offset), &record[8..]);
    record[0..4].copy_from_slice(&((bytes - 8) as u32).to_le_bytes());
    record[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// What [`finish`] writes around a payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub kind: Kind,
    pub first_of_batch: bool,
    pub partition: u16,
    pub salt: u32,
    pub offset: u32,
}

/// How many bytes the record that begins here says it has; those that tell it when there is none.
#[inline]
pub(super) fn said_bytes(bytes: &[u8]) -> usize {
    match u32_at(bytes, 0).map(|length| length as usize) {
        Some(length) if (COUNTED_HEAD_BYTES..=LENGTH_MAX).contains(&length) => 8 + length,
        Some(_) | None => RECORD_ALIGN_BYTES,
    }
}

/// Reads what lies at `offset` of a segment; `bytes` begin there and may end anywhere.
pub(super) fn parse(bytes: &[u8], salt: u32, offset: u32) -> Parsed<'_> {
    parse_if(bytes, |crc, counted| crc32c::crc32c_append(seed(salt, offset), counted) == crc)
}

/// The same for what this process has written and synced, without the checksum.
pub(super) fn parse_own(bytes: &[u8]) -> Parsed<'_> {
    parse_if(bytes, |_, _| true)
}

fn parse_if(bytes: &[u8], matches: impl FnOnce(u32, &[u8]) -> bool) -> Parsed<'_> {
    let (Some(length), Some(crc)) = (u32_at(bytes, 0), u32_at(bytes, 4)) else {
        return Parsed::NeedMore(RECORD_ALIGN_BYTES);
    };
    let length = length as usize;
    if length == 0 {
        return if crc == 0 { Parsed::Nothing } else { Parsed::Bad("checksum without a record") };
    }
    if !(COUNTED_HEAD_BYTES..=LENGTH_MAX).contains(&length) {
        return Parsed::Bad("impossible length");
    }
    let Some(counted) = bytes.get(8..8 + length) else {
        return Parsed::NeedMore(8 + length);
    };
    if !matches(crc, counted) {
        return Parsed::Bad("checksum does not match");
    }
    let [number, version, p0, p1, payload @ ..] = counted else {
        return Parsed::Bad("impossible length");
    };
    let partition = u16::from_le_bytes([*p0, *p1]);
    if *version != RECORD_VERSION || Partition::new(partition).is_none() {
        return Parsed::Foreign;
    }
    let kind = match number & !FIRST_OF_BATCH {
        SEAL_NUMBER => Kind::Seal,
        RUN_NUMBER if payload.len() == RUN_BYTES => Kind::Run,
        number => match RecordType::from_number(number) {
            Some(record_type) => Kind::Record(record_type),
            None => return Parsed::Foreign,
        },
    };
    let first_of_batch = number & FIRST_OF_BATCH != 0;
    Parsed::Record(Framed { kind, first_of_batch, partition, payload, bytes: 8 + length })
}

fn seed(salt: u32, offset: u32) -> u32 {
    salt ^ offset
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<4>().map(|chunk| u32::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(payload: &[u8], first_of_batch: bool, offset: u32) -> AlignedVec {
        let mut out = AlignedVec::new();
        let start = begin(&mut out);
        out.extend_from_slice(payload);
        let kind = Kind::Record(RecordType::User);
        finish(&mut out, start, Stamp { kind, first_of_batch, partition: 1023, salt: 77, offset });
        out
    }

    #[test]
    fn a_record_reads_back_only_at_its_own_place() {
        for length in 0..40 {
            let payload: Vec<u8> = (0..length).collect();
            let bytes = record(&payload, length % 2 == 0, 640);
            assert_eq!(bytes.len() % RECORD_ALIGN_BYTES, 0);
            let Parsed::Record(framed) = parse(&bytes, 77, 640) else { panic!("{length}") };
            assert_eq!((framed.payload, framed.first_of_batch), (&payload[..], length % 2 == 0));
            assert_eq!(framed.bytes.next_multiple_of(RECORD_ALIGN_BYTES), bytes.len());
            assert!(matches!(parse(&bytes, 78, 640), Parsed::Bad(_)));
            assert!(matches!(parse(&bytes, 77, 648), Parsed::Bad(_)));
        }
        assert_eq!(parse(&[0; 64], 77, 32), Parsed::Nothing);
    }

    #[test]
    fn a_segment_header_reads_back_and_every_flipped_bit_is_seen() {
        let header = SegmentHeader { log: 3, number: 9, salt: 0xdead_beef };
        let bytes = header.encode();
        assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&flipped).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn garbage_and_cut_records_are_never_records(
            garbage in prop::collection::vec(any::<u8>(), 0..200),
            payload in prop::collection::vec(any::<u8>(), 0..100),
            flip in any::<prop::sample::Index>(),
        ) {
            prop_assert!(!matches!(parse(&garbage, 5, 32), Parsed::Record(_)));
            let bytes = record(&payload, false, 32);
            let whole = RECORD_HEADER_BYTES + payload.len();
            let bit = flip.index(whole * 8);
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!matches!(parse(&flipped, 77, 32), Parsed::Record(_)));
            let cut = flip.index(whole);
            prop_assert!(matches!(parse(&bytes[..cut], 77, 32), Parsed::NeedMore(_)));
        }
    }
}
