//! Tunnels: a client's connection that a gateway holds and the owner of its user serves, over the link between the two.
//! Pure. [`Near`] belongs to the gateway's core that has the socket, [`Far`] to the owner's core that has the session.
//!
//! The gateway has read the first LOGIN or REGISTER; from there on it carries bytes it does not look into. The records of a
//! tunnel go from one core to one core, in order and once each, as long as both processes live.
//!
//! - **Down, to the client, there is a window**: the owner sends at most [`WINDOW_BYTES`] (and the frame that crosses its end)
//!   that the gateway has not written to the socket. What a slow client does not read so waits at the owner, where the rules
//!   for slow readers are, and neither on the link nor at the gateway.
//! - **Up there is none**: what the link does not take waits in [`Near`], and above [`UP_BYTES_MAX`] in the client's own socket,
//!   which is not read meanwhile. The owner works off what comes at once, within the window of the link.
//! - **Down come whole frames**, so the gateway can say something of its own between two (GOAWAY).
//! - Each side ends a tunnel whenever it likes and says so once. Whoever is told of a tunnel that it does not have answers
//!   with its end, and an end of what is gone means nothing: so an end that was lost is found at the next word.
//!
//! Invariants: bytes come out as they went in; credit is never more than what came; nothing follows an end.

use ringline_schema::limits::{FRAME_BYTES_CEILING, FRAME_HEADER_BYTES};

use super::batch::PAYLOAD_BYTES_MAX;

/// Bytes that the owner may have sent and the gateway not yet written to the client's socket.
pub const WINDOW_BYTES: usize = 128 * 1024;
/// The gateway gives credit back in pieces of this size, so that a tunnel that is idle or small says nothing of it.
const CREDIT_BYTES_MIN: usize = WINDOW_BYTES / 2;
/// Bytes of a client that wait for room on the link; above it the client's socket is not read.
pub const UP_BYTES_MAX: usize = 64 * 1024;
/// Bytes of one record, if no frame is larger.
pub const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// The first byte of every record. Other messages between nodes begin with their version, which is a small number.
pub const MARK: u8 = 0xf7;
/// Mark, kind, id.
pub const RECORD_HEAD_BYTES: usize = 10;

const _: () = assert!(RECORD_HEAD_BYTES + FRAME_BYTES_CEILING as usize <= PAYLOAD_BYTES_MAX);
const _: () = assert!(CHUNK_BYTES_MAX <= FRAME_BYTES_CEILING as usize && CREDIT_BYTES_MIN <= u32::MAX as usize);

/// A tunnel, among all that one core of a gateway opens in the life of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunnelId(pub u64);

/// What the two ends say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// Gateway to owner: a client has come, and these are its first bytes, a LOGIN or REGISTER at their head.
    Open(&'a [u8]),
    /// Gateway to owner: more of them.
    Up(&'a [u8]),
    /// Gateway to owner: so many bytes more were written to the client.
    Credit(u32),
    /// Gateway to owner: the client is gone.
    Left,
    /// Owner to gateway: whole frames for the client.
    Down(&'a [u8]),
    /// Owner to gateway: the connection ends once the client has what was sent before.
    Ended,
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub id: TunnelId,
    pub said: Said<'a>,
}

/// Bytes that are no record of a tunnel: the peer has a defect, or another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes that are no record of a tunnel, of kind {0}")]
pub struct BadRecord(pub u8);

impl<'a> Record<'a> {
    /// Whether a message between nodes is one of these.
    pub fn is_one(payload: &[u8]) -> bool {
        payload.first() == Some(&MARK)
    }

    /// Writes it into a buffer, whose room is used again.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let credit: [u8; 4];
        let (kind, rest): (u8, &[u8]) = match self.said {
            Said::Open(bytes) => (1, bytes),
            Said::Up(bytes) => (2, bytes),
            Said::Credit(bytes) => {
                credit = bytes.to_le_bytes();
                (3, &credit)
            }
            Said::Left => (4, &[]),
            Said::Down(bytes) => (5, bytes),
            Said::Ended => (6, &[]),
        };
        out.clear();
        out.extend_from_slice(&[MARK, kind]);
        out.extend_from_slice(&self.id.0.to_le_bytes());
        out.extend_from_slice(rest);
    }

    /// Reads one, whatever the bytes are. Errors: [`BadRecord`].
    pub fn decode(payload: &'a [u8]) -> Result<Self, BadRecord> {
        let Some((&[mark, kind, i0, i1, i2, i3, i4, i5, i6, i7], rest)) =
            payload.split_first_chunk::<RECORD_HEAD_BYTES>()
        else {
            return Err(BadRecord(0));
        };
        let id = TunnelId(u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]));
        let said = match (mark, kind, rest) {
            (MARK, 1, bytes) => Said::Open(bytes),
            (MARK, 2, bytes) => Said::Up(bytes),
            (MARK, 3, &[c0, c1, c2, c3]) => Said::Credit(u32::from_le_bytes([c0, c1, c2, c3])),
            (MARK, 4, &[]) => Said::Left,
            (MARK, 5, bytes) => Said::Down(bytes),
            (MARK, 6, &[]) => Said::Ended,
            (_, kind, _) => return Err(BadRecord(kind)),
        };
        Ok(Self { id, said })
    }
}

/// Puts a record on the link; false: there is no room, and nothing was taken.
pub type Put<'a> = &'a mut dyn FnMut(&Record<'_>) -> bool;

/// The owner has sent more than it may: it has a defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes beyond the window of a tunnel")]
pub struct BeyondWindow;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The owner does not know of it yet.
    New,
    /// It has been told and has said nothing.
    Opening,
    Open,
    /// One of the two has ended it: the client is given what is left, and nothing goes up any more.
    Over,
}

/// The gateway's end.
#[derive(Debug)]
pub struct Near {
    /// From the client, not on the link yet.
    up: Vec<u8>,
    /// For the client, not given to its socket yet.
    down: Vec<u8>,
    /// Bytes of the owner that it has no credit for yet.
    held: usize,
    /// Of them, written to the socket.
    owed: usize,
    stage: Stage,
    paused: bool,
}

impl Near {
    /// With the first bytes of the client.
    pub fn new(first: Vec<u8>) -> Self {
        Self { up: first, down: Vec::new(), held: 0, owed: 0, stage: Stage::New, paused: false }
    }

    /// Takes what the client says. False: its socket is not to be read until [`Near::may_read_on`].
    pub fn client_said(&mut self, bytes: &[u8]) -> bool {
        if self.stage != Stage::Over {
            self.up.extend_from_slice(bytes);
        }
        self.paused = self.up.len() > UP_BYTES_MAX;
        !self.paused
    }

    /// Whether a socket that was not read may be read again. Said once.
    pub fn may_read_on(&mut self) -> bool {
        let goes_on = self.paused && self.up.len() <= UP_BYTES_MAX / 2;
        self.paused &= !goes_on;
        goes_on
    }

    /// Puts on the link what is to be said. False: it had no room for all of it.
    pub fn speak(&mut self, id: TunnelId, put: Put<'_>) -> bool {
        if self.stage == Stage::Over {
            return true;
        }
        let mut at = 0;
        while let Some(rest) = self.up.get(at..).filter(|rest| !rest.is_empty()) {
            let bytes = rest.get(..CHUNK_BYTES_MAX).unwrap_or(rest);
            let said = if self.stage == Stage::New { Said::Open(bytes) } else { Said::Up(bytes) };
            if !put(&Record { id, said }) {
                break;
            }
            at += bytes.len();
            if self.stage == Stage::New {
                self.stage = Stage::Opening;
            }
        }
        self.up.drain(..at);
        if !self.up.is_empty() {
            return false;
        }
        // An idle tunnel keeps no buffer.
        self.up = Vec::new();
        self.owed < CREDIT_BYTES_MIN || self.give_credit(id, put)
    }

    fn give_credit(&mut self, id: TunnelId, put: Put<'_>) -> bool {
        let credit = u32::try_from(self.owed).unwrap_or(u32::MAX);
        let given = put(&Record { id, said: Said::Credit(credit) });
        if given {
            self.held -= credit as usize;
            self.owed -= credit as usize;
        }
        given
    }

    /// Takes what the owner says to the client. Errors: [`BeyondWindow`]; nothing was taken.
    pub fn owner_said(&mut self, frames: &[u8]) -> Result<(), BeyondWindow> {
        match self.stage {
            Stage::Over => return Ok(()),
            Stage::New | Stage::Opening | Stage::Open => self.stage = Stage::Open,
        }
        if self.held >= WINDOW_BYTES || frames.len() > FRAME_BYTES_CEILING as usize {
            return Err(BeyondWindow);
        }
        self.held += frames.len();
        self.down.extend_from_slice(frames);
        Ok(())
    }

    /// Puts a whole frame of the gateway's own between those of the owner.
    pub fn interject(&mut self, frame: &[u8]) {
        self.down.extend_from_slice(frame);
    }

    /// What is to be written to the client; `None`: nothing.
    pub fn take_down(&mut self) -> Option<Vec<u8>> {
        (!self.down.is_empty()).then(|| std::mem::take(&mut self.down))
    }

    /// The kernel has taken so many bytes for the client.
    pub fn written(&mut self, bytes: usize) {
        // What the gateway said itself is no credit of the owner's.
        self.owed = (self.owed + bytes).min(self.held);
    }

    /// Ends it. True: the owner knows of it and is to be told, unless it was the owner who said so.
    pub fn end(&mut self) -> bool {
        let known = matches!(self.stage, Stage::Opening | Stage::Open);
        (self.stage, self.up) = (Stage::Over, Vec::new());
        known
    }

    /// Whether the owner has said nothing so far.
    pub fn is_unanswered(&self) -> bool {
        matches!(self.stage, Stage::New | Stage::Opening)
    }

    /// Whether nothing goes up any more.
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    /// Bytes of the owner here that it has no credit for.
    pub fn held_bytes(&self) -> usize {
        self.held
    }
}

/// Why the owner's end stopped speaking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// All that it was given is on the link.
    Done,
    /// The client reads slowly: it goes on with [`Far::credit`].
    NoCredit,
    /// The link has no room now.
    NoRoom,
}

/// The owner's end.
#[derive(Debug, Default)]
pub struct Far {
    out: Vec<u8>,
    at: usize,
    /// Bytes sent that the gateway has not given credit for.
    uncredited: usize,
}

impl Far {
    /// Whether it has nothing left, and takes [`Far::give`].
    pub fn is_done(&self) -> bool {
        self.at >= self.out.len()
    }

    /// Gives it whole frames to say. Gives back the buffer of those before.
    pub fn give(&mut self, frames: Vec<u8>) -> Vec<u8> {
        debug_assert!(self.is_done(), "one buffer after the other");
        self.at = 0;
        std::mem::replace(&mut self.out, frames)
    }

    /// Takes back the buffer that it is done with, so that an idle tunnel keeps none.
    pub fn take_buffer(&mut self) -> Option<Vec<u8>> {
        (self.is_done() && self.out.capacity() > 0).then(|| {
            self.at = 0;
            std::mem::take(&mut self.out)
        })
    }

    /// Puts on the link what there is to say: how many bytes went, and why it stopped.
    pub fn speak(&mut self, id: TunnelId, put: Put<'_>) -> (usize, Stopped) {
        let before = self.at;
        let stopped = loop {
            let Some(rest) = self.out.get(self.at..).filter(|rest| !rest.is_empty()) else { break Stopped::Done };
            if self.uncredited >= WINDOW_BYTES {
                break Stopped::NoCredit;
            }
            let frames = rest.get(..whole_frames(rest)).unwrap_or(rest);
            if !put(&Record { id, said: Said::Down(frames) }) {
                break Stopped::NoRoom;
            }
            self.at += frames.len();
            self.uncredited += frames.len();
        };
        (self.at - before, stopped)
    }

    /// The gateway has written so many bytes. More than was sent is a defect of the gateway and counts as all.
    pub fn credit(&mut self, bytes: u32) {
        self.uncredited = self.uncredited.saturating_sub(bytes as usize);
    }
}

/// Bytes of the whole frames that the output of an owner begins with: up to [`CHUNK_BYTES_MAX`], or one that is larger.
fn whole_frames(frames: &[u8]) -> usize {
    let mut at = 0;
    while let Some([.., b0, b1, b2, b3]) = frames.get(at..).and_then(|rest| rest.first_chunk::<FRAME_HEADER_BYTES>()) {
        let next = at + FRAME_HEADER_BYTES + u32::from_le_bytes([*b0, *b1, *b2, *b3]) as usize;
        if next > frames.len() || (next > CHUNK_BYTES_MAX && at > 0) {
            break;
        }
        at = next;
    }
    debug_assert!(at > 0 || frames.is_empty(), "output is whole frames");
    if at == 0 { frames.len() } else { at }
}

#[cfg(test)]
mod tests;
