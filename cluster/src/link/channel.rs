//! Batches from one shard to another, in order and once each, over any number of connections.
//!
//! Every batch has a number and keeps its bytes until the other side says it has taken it. A new connection begins with
//! both sides telling how far they have come; what is behind that is sent again, and what comes twice is dropped.
//!
//! **Credit.** The receiver grants a window in bytes, counted from the beginning of both processes: a sender without credit
//! holds its batches back, and with [`OUT_BYTES_MAX`] held back it takes no more ([`Full`]). The caller then tells only which
//! conversations have moved: [`Channel::note_head`] keeps the newest seq of each, and gives them out as soon as there is
//! room. So a slow node costs a bounded amount of memory, and nothing that is on disk is lost: who hears of a head fetches.
//!
//! Invariants, asserted: numbers of kept batches are consecutive; bytes kept are their sum and at most `OUT_BYTES_MAX` and
//! one batch; what was sent never passes what was granted.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use ringline_schema::ids::{ConversationId, Seq};

use super::frame::{BATCH_BYTES_MAX, Frame};

/// Bytes that may be sent and not yet worked off by the receiver.
pub const WINDOW_BYTES: u64 = 4 * BATCH_BYTES_MAX as u64;
/// The receiver grants more when a quarter of the window has been worked off, so that grants do not become traffic.
const GRANT_BYTES_MIN: u64 = WINDOW_BYTES / 4;
/// Bytes of batches that are kept: under way, or waiting for credit.
pub const OUT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Conversations whose heads wait for room. One more makes all of them count as moved.
pub const HEADS_MAX: usize = 65_536;
/// A peer that has said nothing for so long is gone, whatever its socket says.
pub const SILENCE_MS: u64 = 5_000;
/// How often a node says that it is there, whatever else it says.
pub const BEAT_MS: u64 = 1_000;
/// An empty batch has its price too, or many of them would be free.
const BATCH_OVERHEAD_BYTES: usize = 64;

/// The channel takes no more now: tell heads instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the link has no room")]
pub struct Full;

/// The other side broke a rule of the channel. The connection ends; a peer that does so again has a defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("batch {got} came where {expected} was to come")]
    Gap { expected: u64, got: u64 },
    #[error("a batch came beyond the window")]
    BeyondWindow,
    #[error("batch {said} was acknowledged, the last one sent is {sent}")]
    NeverSent { said: u64, sent: u64 },
    #[error("a second hello")]
    SecondHello,
}

/// What a frame of the other side amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// To be worked off, then told to [`Channel::worked_off`].
    Batch(Bytes),
    /// A batch that was here before: dropped, counted by the caller.
    Again,
    /// The other side has so many clients.
    Clients(u64),
    /// Nothing for the caller.
    Nothing,
    /// The other side is about to close.
    Bye,
}

/// Conversations that moved while there was no room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heads {
    /// The newest seq of each.
    These(BTreeMap<ConversationId, Seq>),
    /// Too many to name: everything that the other side holds open may have moved.
    Any,
}

#[derive(Debug)]
struct Kept {
    number: u64,
    bytes: Bytes,
    /// All bytes ever sent with this batch included: what the window is compared with.
    end: u64,
}

fn cost(bytes: &Bytes) -> usize {
    bytes.len() + BATCH_OVERHEAD_BYTES
}

/// One direction out and one in, between two processes.
#[derive(Debug)]
pub struct Channel {
    /// Not yet acknowledged, in rising order.
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// The number of the last batch taken from the caller, and all bytes up to it.
    last: u64,
    last_end: u64,
    /// The last one sent on this connection, or known to the other side.
    sent: u64,
    /// The last one ever sent: the other side may say that it has a batch which came by an older connection.
    ever_sent: u64,
    /// Batches sent once more than once.
    sent_again: u64,
    /// How far the other side lets us send.
    window_end: u64,
    heads: Heads,
    /// The last batch received, and all bytes up to it.
    received: u64,
    received_bytes: u64,
    worked_off_bytes: u64,
    /// What the other side was last told of both.
    told: (u64, u64),
    heard_ms: u64,
    beat_ms: u64,
}

impl Channel {
    pub fn new(now_ms: u64) -> Self {
        Self {
            kept: VecDeque::new(),
            kept_bytes: 0,
            last: 0,
            last_end: 0,
            sent: 0,
            ever_sent: 0,
            sent_again: 0,
            window_end: WINDOW_BYTES,
            heads: Heads::These(BTreeMap::new()),
            received: 0,
            received_bytes: 0,
            worked_off_bytes: 0,
            told: (0, WINDOW_BYTES),
            heard_ms: now_ms,
            beat_ms: now_ms,
        }
    }

    /// Takes a batch of at most [`BATCH_BYTES_MAX`]. Errors: [`Full`], also for one that is larger; nothing is taken then.
    pub fn offer(&mut self, bytes: Bytes) -> Result<(), Full> {
        if bytes.len() > BATCH_BYTES_MAX || self.kept_bytes >= OUT_BYTES_MAX {
            return Err(Full);
        }
        self.last += 1;
        self.last_end += cost(&bytes) as u64;
        self.kept_bytes += cost(&bytes);
        self.kept.push_back(Kept { number: self.last, bytes, end: self.last_end });
        Ok(())
    }

    /// A conversation moved and its message did not fit.
    pub fn note_head(&mut self, conversation: ConversationId, seq: Seq) {
        let Heads::These(heads) = &mut self.heads else { return };
        let newest = heads.entry(conversation).or_default();
        *newest = seq.max(*newest);
        if heads.len() > HEADS_MAX {
            self.heads = Heads::Any;
        }
    }

    /// The heads that wait, when there is room again to offer them; `None` when none wait.
    pub fn take_heads(&mut self) -> Option<Heads> {
        let waits = match &self.heads {
            Heads::These(heads) => !heads.is_empty(),
            Heads::Any => true,
        };
        // Half empty: else heads and payloads would take turns at the brim.
        let room = self.kept_bytes <= OUT_BYTES_MAX / 2;
        (waits && room).then(|| std::mem::replace(&mut self.heads, Heads::These(BTreeMap::new())))
    }

    /// The last batch received, for the hello of the next connection.
    pub fn received(&self) -> u64 {
        self.received
    }

    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// Batches that went out again on a later connection, for counters.
    pub fn sent_again(&self) -> u64 {
        self.sent_again
    }

    /// A new connection to the same process: the other side has batches up to `peer_has`, the rest goes out again.
    ///
    /// Errors: [`Violation::NeverSent`].
    pub fn reconnected(&mut self, peer_has: u64, now_ms: u64) -> Result<(), Violation> {
        self.acknowledged(peer_has)?;
        self.sent = self.last - self.kept.len() as u64;
        // Whatever was told on the old connection may not have arrived.
        self.told = (0, 0);
        (self.heard_ms, self.beat_ms) = (now_ms, now_ms);
        Ok(())
    }

    /// The process on the other side is another one: both directions begin anew. Gives back the batches that were never
    /// acknowledged, oldest first: whether the old process took them, nobody knows. Those never sent are among them, because
    /// they were meant for what the old process held.
    pub fn peer_restarted(&mut self, now_ms: u64) -> Vec<Bytes> {
        let fresh = Self { sent_again: self.sent_again, ..Self::new(now_ms) };
        std::mem::replace(self, fresh).kept.into_iter().map(|kept| kept.bytes).collect()
    }

    /// The next frame to write; `None`: nothing to say now. To be asked until then after everything that was heard, taken or
    /// worked off, and at [`Channel::next_ms`]. How many clients a beat tells of is the caller's to fill in.
    pub fn next_frame(&mut self, now_ms: u64) -> Option<Frame> {
        let frame = self.due_beat(now_ms).or_else(|| self.due_grant()).or_else(|| self.due_batch())?;
        self.check();
        Some(frame)
    }

    /// Also while much is said: what a node tells of its clients must not grow old just when it is busy.
    fn due_beat(&mut self, now_ms: u64) -> Option<Frame> {
        let due = now_ms.saturating_sub(self.beat_ms) >= BEAT_MS;
        due.then(|| {
            self.beat_ms = now_ms;
            Frame::Beat { clients: 0 }
        })
    }

    fn due_grant(&mut self) -> Option<Frame> {
        let granted = self.worked_off_bytes + WINDOW_BYTES;
        let (told_number, told_end) = self.told;
        // While batches flow the other way too, each acknowledgement may as well wait for a few; the sender keeps what it
        // sent until then, which its window allows for.
        let much = granted.saturating_sub(told_end) >= GRANT_BYTES_MIN;
        let all = self.received > told_number && self.worked_off_bytes == self.received_bytes;
        if !much && !all {
            return None;
        }
        self.told = (self.received, granted);
        Some(Frame::Taken { number: self.received, window_end: granted })
    }

    fn due_batch(&mut self) -> Option<Frame> {
        let first = self.kept.front()?.number;
        let at = usize::try_from((self.sent + 1).saturating_sub(first)).ok()?;
        let next = self.kept.get(at).filter(|next| next.end <= self.window_end)?;
        self.sent = next.number;
        self.sent_again += u64::from(next.number <= self.ever_sent);
        self.ever_sent = self.ever_sent.max(next.number);
        Some(Frame::Batch { number: next.number, bytes: next.bytes.clone() })
    }

    /// Takes a frame of the other side. Errors: [`Violation`]; the state stays what it was.
    pub fn hear(&mut self, frame: Frame, now_ms: u64) -> Result<Heard, Violation> {
        self.heard_ms = now_ms;
        match frame {
            Frame::Hello(_) => Err(Violation::SecondHello),
            Frame::Batch { number, bytes } => self.hear_batch(number, bytes),
            Frame::Taken { number, window_end } => {
                self.acknowledged(number)?;
                // An old grant that was overtaken grants nothing new.
                self.window_end = self.window_end.max(window_end);
                Ok(Heard::Nothing)
            }
            Frame::Beat { clients } => Ok(Heard::Clients(clients)),
            Frame::Bye => Ok(Heard::Bye),
        }
    }

    fn hear_batch(&mut self, number: u64, bytes: Bytes) -> Result<Heard, Violation> {
        if number <= self.received {
            return Ok(Heard::Again);
        }
        if number != self.received + 1 {
            return Err(Violation::Gap { expected: self.received + 1, got: number });
        }
        let end = self.received_bytes + cost(&bytes) as u64;
        if end > self.worked_off_bytes + WINDOW_BYTES {
            return Err(Violation::BeyondWindow);
        }
        (self.received, self.received_bytes) = (number, end);
        Ok(Heard::Batch(bytes))
    }

    /// The caller is done with a batch that it was given: its bytes are credit again.
    pub fn worked_off(&mut self, bytes: &Bytes) {
        self.worked_off_bytes += cost(bytes) as u64;
        assert!(self.worked_off_bytes <= self.received_bytes, "more worked off than received");
    }

    fn acknowledged(&mut self, number: u64) -> Result<(), Violation> {
        if number > self.ever_sent {
            return Err(Violation::NeverSent { said: number, sent: self.ever_sent });
        }
        self.sent = self.sent.max(number);
        while let Some(kept) = self.kept.pop_front_if(|kept| kept.number <= number) {
            self.kept_bytes -= cost(&kept.bytes);
        }
        Ok(())
    }

    /// Whether the other side has been silent for too long: the connection is to be dropped.
    pub fn is_silent(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.heard_ms) >= SILENCE_MS
    }

    /// When to look at the channel again even if nothing happens.
    pub fn next_ms(&self) -> u64 {
        (self.beat_ms + BEAT_MS).min(self.heard_ms + SILENCE_MS)
    }

    fn check(&self) {
        debug_assert_eq!(self.kept_bytes, self.kept.iter().map(|kept| cost(&kept.bytes)).sum::<usize>());
        assert!(self.kept_bytes <= OUT_BYTES_MAX + BATCH_BYTES_MAX + BATCH_OVERHEAD_BYTES);
        if let (Some(first), Some(last)) = (self.kept.front(), self.kept.back()) {
            assert_eq!(last.number - first.number + 1, self.kept.len() as u64);
            assert_eq!(last.number, self.last);
        }
    }
}
