//! The frame: a 16-byte little-endian header and a body, and the incremental decoder that cuts a byte stream into frames.
//!
//! The decoder yields frames in place. Only a frame that the input splits is copied, into a tail that is given back
//! when it empties, so an idle connection owns no buffer. Whoever decodes many streams lends all of them one [`TailPool`].

use crate::codec::Codec;
use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::limits::FRAME_HEADER_BYTES;

/// First two bytes of every frame, `"RL"` on the wire.
pub const MAGIC: u16 = u16::from_le_bytes(*b"RL");
/// The frame version this build speaks.
pub const VERSION: u8 = 1;

/// The flags of a frame, bits of a `u16`. A bit that this version does not know refuses the frame: `BAD_FLAGS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// On a transient SEND: no SEND_ACK on success, failures are still told. On any other request: `BAD_REQUEST`.
    pub const NO_REPLY: Self = Self(1);
    const KNOWN: u16 = 1;

    pub fn from_bits(bits: u16) -> Option<Self> {
        (bits & !Self::KNOWN == 0).then_some(Self(bits))
    }

    pub fn bits(self) -> u16 {
        self.0
    }

    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A decoded header. All fields have been checked but the command, which may be unknown without harm to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub codec: Codec,
    /// Raw number: an unknown one is answered, and the stream goes on.
    pub command: u16,
    pub flags: Flags,
    /// Chosen by the client; answers carry it back. 0 on pushes.
    pub request_id: u32,
    /// Bytes after the header.
    pub body_bytes: u32,
}

impl Header {
    /// The 16 bytes of this header.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2] = VERSION;
        bytes[3] = self.codec as u8;
        bytes[4..6].copy_from_slice(&self.command.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.flags.bits().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.request_id.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes
    }

    /// Checks a header against everything that would make the rest of the stream unreadable.
    ///
    /// `frame_bytes_max` counts header and body.
    #[inline]
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES], frame_bytes_max: u32) -> Result<Self, FrameError> {
        let [m0, m1, version, codec, c0, c1, f0, f1, r0, r1, r2, r3, b0, b1, b2, b3] = *bytes;
        let request_id = u32::from_le_bytes([r0, r1, r2, r3]);
        let refuse = |code| FrameError { code, request_id };
        if u16::from_le_bytes([m0, m1]) != MAGIC {
            return Err(FrameError { code: ErrorCode::BadMagic, request_id: 0 });
        }
        if version != VERSION {
            return Err(refuse(ErrorCode::BadVersion));
        }
        let Some(codec) = Codec::from_number(codec) else { return Err(refuse(ErrorCode::BadCodec)) };
        let Some(flags) = Flags::from_bits(u16::from_le_bytes([f0, f1])) else {
            return Err(refuse(ErrorCode::BadFlags));
        };
        let body_bytes = u32::from_le_bytes([b0, b1, b2, b3]);
        let command = u16::from_le_bytes([c0, c1]);
        let in_frame = body_bytes <= frame_bytes_max.saturating_sub(FRAME_HEADER_BYTES as u32);
        if !in_frame || (body_bytes > Command::ANY_BODY_BYTES_MAX && body_bytes > own_max(command)) {
            return Err(refuse(ErrorCode::FrameTooLarge));
        }
        Ok(Self { codec, command, flags, request_id, body_bytes })
    }

    fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.body_bytes as usize
    }
}

/// The longest body of a command. One that is not known is not bound by that.
fn own_max(command: u16) -> u32 {
    Command::from_number(command).map_or(u32::MAX, Command::body_bytes_max)
}

/// Why a byte stream can't be read on. Always the sender's fault; the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}")]
pub struct FrameError {
    pub code: ErrorCode,
    /// As far as the header could be read; 0 otherwise.
    pub request_id: u32,
}

/// One frame, borrowed from the input or from the decoder's tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub header: Header,
    pub body: &'a [u8],
    /// Header and body as they came, for handing a connection over.
    pub raw: &'a [u8],
}

/// Emptied tails that a [`TailPool`] keeps.
pub const TAILS_SPARE_MAX: usize = 64;
/// A tail with more room than this is given back to the allocator instead.
pub const TAIL_SPARE_BYTES_MAX: usize = 4_096;

/// Room for unfinished frames, shared by the streams of one thread: a stream that is cut in the middle of a frame again
/// and again, as by receive buffers of fixed size, does not allocate each time. Holds at most [`TAILS_SPARE_MAX`] times
/// [`TAIL_SPARE_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub struct TailPool {
    #[expect(clippy::vec_box, reason = "as the decoders hold them, which pay a word when they have none")]
    spare: Vec<Box<Tail>>,
}

impl TailPool {
    fn take(&mut self) -> Box<Tail> {
        self.spare.pop().unwrap_or_default()
    }

    fn give_back(&mut self, mut tail: Box<Tail>) {
        if self.spare.len() < TAILS_SPARE_MAX && (1..=TAIL_SPARE_BYTES_MAX).contains(&tail.bytes.capacity()) {
            tail.bytes.clear();
            tail.given = false;
            self.spare.push(tail);
        }
    }
}

/// The first part of a frame whose rest is still to come.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
    /// It was completed and given out; it is dropped at the next call.
    given: bool,
}

/// Cuts a stream into frames. Bounded: never holds more than one frame of `frame_bytes_max`. A stream that is not in the
/// middle of a frame costs a word: most connections of a server are idle.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    tail: Option<Box<Tail>>,
}

impl FrameDecoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of an unfinished frame held back.
    pub fn buffered(&self) -> usize {
        self.tail.as_ref().filter(|tail| !tail.given).map_or(0, |tail| tail.bytes.len())
    }

    /// The unfinished frame, to hand it over with the connection.
    pub fn into_tail(self) -> Vec<u8> {
        self.tail.filter(|tail| !tail.given).map(|tail| tail.bytes).unwrap_or_default()
    }

    /// The next frame of `input`, which is advanced past it. `Ok(None)`: the input is used up, more is needed.
    ///
    /// After an error the stream is unreadable: do not call again.
    pub fn next<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
        frame_bytes_max: u32,
    ) -> Result<Option<Frame<'s>>, FrameError> {
        drop(self.take_given());
        self.cut(input, frame_bytes_max)
    }

    /// The same, with a tail from a pool, which gets it back at the call after the frame in it was given out.
    #[inline]
    pub fn next_pooled<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
        frame_bytes_max: u32,
        pool: &mut TailPool,
    ) -> Result<Option<Frame<'s>>, FrameError> {
        if self.tail.is_none()
            && let Some((frame, rest)) = first_frame(input, frame_bytes_max)?
        {
            *input = rest;
            return Ok(Some(frame));
        }
        self.next_cut(input, frame_bytes_max, pool)
    }

    /// The next frame where one is cut: at the ends of an input.
    #[inline(never)]
    fn next_cut<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
        frame_bytes_max: u32,
        pool: &mut TailPool,
    ) -> Result<Option<Frame<'s>>, FrameError> {
        if let Some(tail) = self.take_given() {
            pool.give_back(tail);
        }
        // What is left of the input is an unfinished frame only in the last call, so look before taking.
        if self.tail.is_none() && !input.is_empty() && !holds_frame(input) {
            self.tail = Some(pool.take());
        }
        self.cut(input, frame_bytes_max)
    }

    fn cut<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
        frame_bytes_max: u32,
    ) -> Result<Option<Frame<'s>>, FrameError> {
        if self.tail.as_ref().is_some_and(|tail| !tail.bytes.is_empty()) {
            return self.finish_tail(input, frame_bytes_max);
        }
        if let Some((frame, rest)) = first_frame(input, frame_bytes_max)? {
            *input = rest;
            return Ok(Some(frame));
        }
        let frame_bytes = input.first_chunk().map(|header| Header::decode(header, frame_bytes_max)).transpose()?;
        self.keep(input, frame_bytes.map_or(0, |header| header.frame_bytes()));
        Ok(None)
    }

    fn finish_tail<'s>(&'s mut self, input: &mut &[u8], frame_bytes_max: u32) -> Result<Option<Frame<'s>>, FrameError> {
        let Some(tail) = &mut self.tail else { return Ok(None) };
        tail.fill(input, FRAME_HEADER_BYTES);
        let Some(header_bytes) = tail.bytes.first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(header_bytes, frame_bytes_max)?;
        tail.fill(input, header.frame_bytes());
        if tail.bytes.len() < header.frame_bytes() {
            return Ok(None);
        }
        tail.given = true;
        Ok(Some(Frame { header, body: tail.bytes.get(FRAME_HEADER_BYTES..).unwrap_or(&[]), raw: &tail.bytes }))
    }

    fn take_given(&mut self) -> Option<Box<Tail>> {
        self.tail.take_if(|tail| tail.given)
    }

    /// Keeps the rest of the input, the first part of a frame of so many bytes (0: not known yet).
    fn keep(&mut self, input: &mut &[u8], frame_bytes: usize) {
        if !input.is_empty() {
            let tail = self.tail.get_or_insert_default();
            tail.bytes.reserve_exact(frame_bytes);
            tail.bytes.extend_from_slice(input);
            *input = &[];
        }
    }
}

impl Tail {
    /// Moves bytes from the input until the tail holds `wanted`, or the input is empty.
    fn fill(&mut self, input: &mut &[u8], wanted: usize) {
        let missing = wanted.saturating_sub(self.bytes.len()).min(input.len());
        let (taken, rest) = input.split_at(missing);
        self.bytes.extend_from_slice(taken);
        *input = rest;
    }
}

/// The frame that the input begins with, and what comes behind it. `None`: it does not hold a whole one.
#[inline]
fn first_frame(input: &[u8], frame_bytes_max: u32) -> Result<Option<(Frame<'_>, &[u8])>, FrameError> {
    let Some(header_bytes) = input.first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(None) };
    let header = Header::decode(header_bytes, frame_bytes_max)?;
    let Some((raw, rest)) = input.split_at_checked(header.frame_bytes()) else { return Ok(None) };
    Ok(Some((Frame { header, body: raw.get(FRAME_HEADER_BYTES..).unwrap_or(&[]), raw }, rest)))
}

/// Whether the input begins with a whole frame, if its header is one at all.
fn holds_frame(input: &[u8]) -> bool {
    let Some((_, [b0, b1, b2, b3])) =
        input.first_chunk::<FRAME_HEADER_BYTES>().and_then(|head| head.split_last_chunk())
    else {
        return false;
    };
    let body_bytes = u32::from_le_bytes([*b0, *b1, *b2, *b3]) as usize;
    input.len() - FRAME_HEADER_BYTES >= body_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: u32 = 1024;

    fn frame(command: u16, request_id: u32, body: &[u8]) -> Vec<u8> {
        let (codec, flags) = (Codec::FlatBuffers, Flags::default());
        let header = Header { codec, command, flags, request_id, body_bytes: body.len() as u32 };
        [&header.encode()[..], body].concat()
    }

    /// Command, request id, body.
    type Owned = (u16, u32, Vec<u8>);

    /// All frames of a stream cut at the given points.
    fn decode_in_parts(stream: &[u8], cuts: &[usize]) -> (Vec<Owned>, Option<FrameError>) {
        let alone = decode_by(stream, cuts, None);
        assert_eq!(alone, decode_by(stream, cuts, Some(TailPool::default())));
        alone
    }

    fn decode_by(stream: &[u8], cuts: &[usize], mut pool: Option<TailPool>) -> (Vec<Owned>, Option<FrameError>) {
        let mut decoder = FrameDecoder::new();
        let mut frames = Vec::new();
        let mut bounds: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        bounds.extend([0, stream.len()]);
        bounds.sort_unstable();
        for window in bounds.windows(2) {
            let mut input = &stream[window[0]..window[1]];
            loop {
                let frame = match &mut pool {
                    Some(pool) => decoder.next_pooled(&mut input, MAX, pool),
                    None => decoder.next(&mut input, MAX),
                };
                match frame {
                    Ok(Some(frame)) => {
                        assert_eq!(frame.raw.len(), 16 + frame.body.len());
                        frames.push((frame.header.command, frame.header.request_id, frame.body.to_vec()));
                    }
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error)),
                }
            }
            assert!(input.is_empty());
            assert!(decoder.buffered() <= MAX as usize);
        }
        (frames, None)
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8),
            cuts in prop::collection::vec(any::<usize>(), 0..40),
        ) {
            let stream: Vec<u8> =
                bodies.iter().enumerate().flat_map(|(at, body)| frame(0x106, at as u32, body)).collect();
            let (frames, error) = decode_in_parts(&stream, &cuts);
            prop_assert_eq!(error, None);
            prop_assert_eq!(frames.len(), bodies.len());
            for (at, (frame, body)) in frames.iter().zip(&bodies).enumerate() {
                prop_assert_eq!(frame, &(0x106, at as u32, body.clone()));
            }
        }

        #[test]
        fn any_split_of_any_bytes_gives_the_same_result(
            stream in prop::collection::vec(any::<u8>(), 0..200),
            good in any::<bool>(),
            cuts in prop::collection::vec(any::<usize>(), 0..20),
        ) {
            let mut bytes = if good { frame(0x104, 1, b"x") } else { Vec::new() };
            bytes.extend(stream);
            prop_assert_eq!(decode_in_parts(&bytes, &cuts), decode_in_parts(&bytes, &[]));
        }
    }

    #[test]
    fn hostile_headers_give_typed_errors() {
        let good = frame(0x106, 9, b"");
        let refused = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            decode_in_parts(&bytes, &[]).1.map(|error| (error.code, error.request_id))
        };
        assert_eq!(refused(0, b'G'), Some((ErrorCode::BadMagic, 0)));
        assert_eq!(refused(2, 2), Some((ErrorCode::BadVersion, 9)));
        assert_eq!(refused(3, 1), Some((ErrorCode::BadCodec, 9)));
        assert_eq!(refused(3, 250), Some((ErrorCode::BadCodec, 9)));
        assert_eq!(refused(6, 2), Some((ErrorCode::BadFlags, 9)));
        assert_eq!(refused(7, 1), Some((ErrorCode::BadFlags, 9)));
        assert_eq!(refused(6, 1), None, "a flag that is known");
        assert_eq!(refused(15, 0xff), Some((ErrorCode::FrameTooLarge, 9)));
        assert_eq!(refused(4, 0xee), None, "an unknown command does not break the stream");
    }

    #[test]
    fn a_command_has_its_own_limit_below_the_frame_limit() {
        let body = vec![0; Command::Ping.body_bytes_max() as usize + 1];
        let mut decoder = FrameDecoder::new();
        let bytes = frame(Command::Ping as u16, 3, &body);
        let error = decoder.next(&mut &bytes[..], 1 << 20).unwrap_err();
        assert_eq!(error.code, ErrorCode::FrameTooLarge);
    }

    #[test]
    fn streams_cut_anywhere_share_a_few_tails_and_give_them_back() {
        let stream: Vec<u8> = (0..40).flat_map(|at| frame(0x106, at, &[at as u8; 100])).collect();
        let mut pool = TailPool::default();
        let mut decoders = [FrameDecoder::new(), FrameDecoder::new()];
        let mut seen = [0; 2];
        let mut rooms = Vec::new();
        for part in stream.chunks(77) {
            for (decoder, seen) in decoders.iter_mut().zip(&mut seen) {
                let mut input = part;
                while let Some(frame) = decoder.next_pooled(&mut input, MAX, &mut pool).unwrap() {
                    assert_eq!((frame.header.request_id, frame.body), (*seen, &[*seen as u8; 100][..]));
                    *seen += 1;
                }
                rooms.extend(decoder.tail.as_ref().map(|tail| tail.bytes.as_ptr()));
            }
        }
        assert_eq!(seen, [40; 2]);
        assert!(decoders.iter().all(|decoder| decoder.tail.is_none()), "an emptied tail is in the pool");
        rooms.sort();
        rooms.dedup();
        assert!(rooms.len() <= 4 && !pool.spare.is_empty(), "{} blocks for 60 unfinished frames", rooms.len());
        // A large one is not kept.
        let (large, kept) = (frame(0x106, 9, &[1; 900]), pool.spare.len());
        let tail = Tail { bytes: Vec::with_capacity(TAIL_SPARE_BYTES_MAX + 1), given: true };
        let mut decoder = FrameDecoder { tail: Some(Box::new(tail)) };
        assert!(decoder.next_pooled(&mut &large[..], MAX, &mut pool).unwrap().is_some());
        assert_eq!(pool.spare.len(), kept);
    }

    #[test]
    fn an_emptied_tail_owns_no_memory() {
        let bytes = frame(0x106, 1, &[7; 500]);
        let mut decoder = FrameDecoder::new();
        assert!(decoder.next(&mut &bytes[..100], MAX).unwrap().is_none());
        assert_eq!(decoder.buffered(), 100);
        assert!(decoder.next(&mut &bytes[100..], MAX).unwrap().is_some());
        assert!(decoder.next(&mut &[][..], MAX).unwrap().is_none());
        assert!(decoder.tail.is_none());
        assert_eq!(size_of::<FrameDecoder>(), size_of::<usize>());
    }
}
