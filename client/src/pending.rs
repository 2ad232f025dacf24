//! What was asked and not yet answered: request ids, sends until their acknowledgement, calls until their answer.
//!
//! Pure: time is an argument (milliseconds since the client started), bytes go to a buffer, results to a list. Owned by
//! the client's one task. Invariants: a send keeps its client_seq from its first writing to its end, whatever happens to
//! connections, and ends exactly once; when a send is written is said by `lanes`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{self, BodyKind, Class, Mentions, Outcome, Receipt, Request, Standing};

use crate::account::{AccountAnswer, AccountQuery};
use crate::amend::Amends;
use crate::group::{Act, Extra, GroupAnswer};
use crate::lanes::Lanes;
use crate::social::{SocialAnswer, SocialQuery};
use crate::streams::Message;

/// Milliseconds since the client started.
pub(crate) type Millis = u64;

/// A transient send without a deadline of its own is given up after this.
const TRANSIENT_GIVE_UP_MS: Millis = 10_000;
/// How much longer than its own timeout a delivery receipt is waited for, for the way there and back.
const RECEIPT_GRACE_MS: Millis = 5_000;
/// First pause after a refusal that names no time; it doubles with each refusal of the same send.
const RETRY_MS_MIN: Millis = 200;
/// A longer pause, whoever asks for it, is shortened to this.
pub(crate) const RETRY_MS_MAX: Millis = 30_000;
/// Calls that may be open at once; one more is [`CallError::QueueFull`].
const CALLS_MAX: usize = 256;

// --- request ids -------------------------------------------------------------------------------------------------

/// What a request id stands for until its answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    Login,
    Logout,
    Ping,
    /// By client_seq.
    Send(u64),
    Call(u64),
    /// Missing messages of a conversation.
    Fetch(ConversationId),
    /// The row of one conversation.
    Row(ConversationId),
    /// A page of the conversation list.
    Page,
    /// A page of what was missed.
    Sync,
}

/// Frames to write on the present connection, and what their answers will mean.
#[derive(Default)]
pub(crate) struct Wire {
    encoder: Encoder,
    pub(crate) out: Vec<u8>,
    /// The last request id given. Wire ids are its low half: it never wraps, so the map below stays in order of time.
    issued: u64,
    waiting: BTreeMap<u64, (Waiting, Millis)>,
    pub(crate) wrote_at: Millis,
}

impl Wire {
    /// Writes a request whose answer will mean `waiting`.
    pub(crate) fn ask(&mut self, now: Millis, waiting: Waiting, request: &Request<'_>) {
        let id = self.write(now, request);
        self.waiting.insert(id, (waiting, now));
    }

    /// Writes a request that is answered only if it is refused. Its id on the wire.
    pub(crate) fn tell(&mut self, now: Millis, request: &Request<'_>) -> u32 {
        self.write(now, request) as u32
    }

    fn write(&mut self, now: Millis, request: &Request<'_>) -> u64 {
        self.issued += 1;
        if self.issued as u32 == 0 {
            // 0 belongs to pushes.
            self.issued += 1;
        }
        self.encoder.request(Codec::FlatBuffers, self.issued as u32, request, &mut self.out);
        self.wrote_at = now;
        self.issued
    }

    /// Takes what `request_id` stood for; `None` when nothing waits for it.
    pub(crate) fn answered(&mut self, request_id: u32) -> Option<Waiting> {
        const LOW_HALF: u64 = u32::MAX as u64;
        let same_half = (self.issued & !LOW_HALF) | u64::from(request_id);
        let id = if same_half <= self.issued { same_half } else { same_half.checked_sub(LOW_HALF + 1)? };
        self.waiting.remove(&id).map(|(waiting, _)| waiting)
    }

    #[cfg(test)]
    pub(crate) fn start_at(&mut self, issued: u64) {
        self.issued = issued;
    }

    /// When the longest unanswered request was written.
    pub(crate) fn oldest(&self) -> Option<Millis> {
        self.waiting.first_key_value().map(|(_, (_, at))| *at)
    }

    /// Forgets the connection: what was not written, and what will not be answered.
    pub(crate) fn reset(&mut self) {
        self.out.clear();
        self.waiting.clear();
    }
}

// --- sends -------------------------------------------------------------------------------------------------------

/// How a message is sent. The default: a durable text, retried until it is acknowledged.
#[derive(Clone, Debug, Default)]
pub struct SendOptions {
    /// Durable messages are stored and sequenced; transient ones reach who is online, or nobody.
    pub class: Class,
    /// What the body is.
    pub kind: BodyKind,
    /// Ask to be told whether a device of the receiver, or of any other member of the group, acknowledged the message
    /// within this time (at most 60 s); see
    /// [`Sending::delivered`](crate::Sending::delivered).
    pub delivery_timeout: Option<Duration>,
    /// Users this message is meant for above others (at most 100). Durable messages only.
    pub mentions: Vec<UserName>,
    /// Meant for every member of a group; its owner and administrators only.
    pub mention_all: bool,
    /// Stop trying after this. `None`: never for durable messages, 10 s for transient ones.
    pub give_up_after: Option<Duration>,
}

impl SendOptions {
    /// Options of a transient message.
    pub fn transient() -> Self {
        Self { class: Class::Transient, ..Self::default() }
    }

    fn as_mentions(&self) -> Mentions<'_> {
        Mentions { users: self.mentions[..].into(), all: self.mention_all }
    }

    /// What a message sent with these options carries.
    pub(crate) fn extra(&self) -> Option<Box<Extra>> {
        let Self { mentions, mention_all, .. } = self;
        let some = !self.as_mentions().is_empty();
        some.then(|| Box::new(Extra { mentions: mentions.clone(), mention_all: *mention_all, ..Extra::default() }))
    }
}

/// The server has the message. A durable one is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub conversation: ConversationId,
    /// Its place in the conversation; 0 for a transient message.
    pub seq: Seq,
    /// Unix milliseconds, by the server's clock.
    pub time_ms: u64,
    /// It was sent more than once (after a lost connection) and kept once.
    pub dup: bool,
}

/// What became of a message with a delivery timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub outcome: Outcome,
    /// The device that acknowledged first; 0 on a timeout.
    pub device: DeviceId,
}

/// Why a send did not end in [`Accepted`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Too many sends wait already; nothing was kept of this one.
    #[error("too many messages wait to be sent")]
    QueueFull,
    /// The receiver's name can't be a name.
    #[error("{}", ErrorCode::BadName.text())]
    BadName,
    /// The body does not fit the frame that this server allows.
    #[error("the message has {bytes} bytes, at most {bytes_max} can be sent")]
    BodyTooLarge { bytes: usize, bytes_max: usize },
    /// The server refused it for good, or was still refusing it when the time was over. It was not accepted.
    #[error("refused: {code}")]
    Refused { code: ErrorCode, detail: String },
    /// The time was over, or the client closed, before it was ever written. It was not accepted.
    #[error("not sent: the time was over before a server could be reached")]
    NotSent,
    /// It was written, and no answer came. It may have been accepted.
    #[error("unknown: no answer came, the message may have been accepted")]
    Unknown,
    /// [`Sending::delivered`](crate::Sending::delivered) on a send without a delivery timeout.
    #[error("no delivery acknowledgement was asked for")]
    DeliveryNotAsked,
}

/// A message on its way, before it has a number.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub to: UserName,
    pub body: Bytes,
    pub options: SendOptions,
    /// `None`: a plain message.
    pub amends: Option<Amends>,
}

/// A result for the caller.
#[derive(Debug)]
pub(crate) enum Done {
    /// By client_seq.
    Sent(u64, Result<Accepted, SendError>),
    Delivered(u64, Result<Delivery, SendError>),
    Answered(u64, Result<Answer, CallError>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Is to be written, for the first time or again.
    Waiting,
    /// Written on this connection, not answered.
    InFlight,
}

/// What the server is known to have of a send, its present flight aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    NotWritten,
    /// Every copy was refused.
    Refused(ErrorCode),
    /// A copy was lost without an answer.
    Unknown,
}

#[derive(Debug)]
struct Send {
    outgoing: Outgoing,
    stage: Stage,
    fate: Fate,
    give_up_at: Option<Millis>,
    refusals: u32,
}

impl Send {
    fn as_wire(&self, client_seq: u64) -> Request<'_> {
        let Outgoing { to, body, options, amends } = &self.outgoing;
        if let Some(amends) = amends {
            return amends.as_wire((to, client_seq), options.kind, body);
        }
        Request::Send(message::Send {
            to: to.as_str(),
            class: options.class,
            kind: options.kind,
            client_seq,
            ack_timeout_ms: options.delivery_timeout.map(delivery_timeout_ms),
            body,
            mentions: options.as_mentions(),
        })
    }

    /// What can be said when nothing more will be tried.
    fn verdict(&self) -> SendError {
        match (self.stage, self.fate) {
            (Stage::InFlight, _) | (Stage::Waiting, Fate::Unknown) => SendError::Unknown,
            (Stage::Waiting, Fate::NotWritten) => SendError::NotSent,
            (Stage::Waiting, Fate::Refused(code)) => SendError::Refused { code, detail: String::new() },
        }
    }
}

/// On the wire 0 means that none is wanted, so the shortest is 1 ms.
fn delivery_timeout_ms(timeout: Duration) -> u32 {
    u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).clamp(1, limits::ACK_TIMEOUT_MS_MAX)
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    GiveUp(u64),
    Receipt(u64),
}

/// All sends that have not ended, and all receipts that have not come.
pub(crate) struct Sends {
    pub(crate) done: Vec<Done>,
    next_client_seq: u64,
    open_max: usize,
    /// By client_seq, which is the order of the caller.
    open: BTreeMap<u64, Send>,
    /// All of `open`, those in [`Stage::Waiting`] as waiting.
    lanes: Lanes,
    /// client_seq → when to stop waiting, once the send itself was accepted.
    receipts: BTreeMap<u64, Option<Millis>>,
    timers: BTreeSet<(Millis, Timer)>,
    /// Given up while in flight on this connection: their answers may still come, and say what others see by now.
    given_up: BTreeMap<u64, Outgoing>,
    frame_bytes_max: u32,
}

impl Sends {
    /// `first_client_seq` must be above all that this device used before: Unix microseconds are.
    pub(crate) fn new(first_client_seq: u64, open_max: usize) -> Self {
        Self {
            done: Vec::new(),
            next_client_seq: first_client_seq.max(1),
            open_max,
            open: BTreeMap::new(),
            lanes: Lanes::new(),
            receipts: BTreeMap::new(),
            timers: BTreeSet::new(),
            given_up: BTreeMap::new(),
            frame_bytes_max: limits::FRAME_BYTES_MAX,
        }
    }

    /// What LOGIN_OK allows.
    pub(crate) fn allow(&mut self, in_flight_max: u32, frame_bytes_max: u32) {
        self.lanes.allow(in_flight_max);
        self.frame_bytes_max = frame_bytes_max;
    }

    /// Takes a send in and numbers it; [`SendError::QueueFull`] keeps nothing.
    pub(crate) fn push(&mut self, now: Millis, outgoing: Outgoing) -> Result<u64, SendError> {
        if self.open.len() >= self.open_max || self.receipts.len() >= self.open_max.saturating_mul(2) {
            return Err(SendError::QueueFull);
        }
        let client_seq = self.next_client_seq;
        self.next_client_seq += 1;
        let give_up_ms = match (outgoing.options.give_up_after, outgoing.options.class) {
            (Some(after), Class::Durable | Class::Transient) => Some(millis(after)),
            (None, Class::Transient) => Some(TRANSIENT_GIVE_UP_MS),
            (None, Class::Durable) => None,
        };
        let give_up_at = give_up_ms.map(|after| now.saturating_add(after));
        if let Some(at) = give_up_at {
            self.timers.insert((at, Timer::GiveUp(client_seq)));
        }
        if outgoing.options.delivery_timeout.is_some() {
            self.receipts.insert(client_seq, None);
        }
        self.lanes.push(client_seq, &outgoing.to);
        let send = Send { outgoing, stage: Stage::Waiting, fate: Fate::NotWritten, give_up_at, refusals: 0 };
        self.open.insert(client_seq, send);
        Ok(client_seq)
    }

    /// Writes what may be written.
    pub(crate) fn pump(&mut self, now: Millis, wire: &mut Wire) {
        while let Some(client_seq) = self.lanes.next(now) {
            let Some(send) = self.open.get_mut(&client_seq) else { return };
            let bytes_max = self.frame_bytes_max.saturating_sub(limits::MESSAGE_OVERHEAD_BYTES_MAX) as usize;
            let bytes = send.outgoing.body.len();
            if bytes > bytes_max {
                self.end(client_seq, Err(SendError::BodyTooLarge { bytes, bytes_max }));
                continue;
            }
            send.stage = Stage::InFlight;
            wire.ask(now, Waiting::Send(client_seq), &send.as_wire(client_seq));
            self.lanes.written(client_seq, &send.outgoing.to);
        }
    }

    /// SEND_ACK came. Gives the message back, to enter it into its conversation's stream; also one that was given up.
    pub(crate) fn accepted(&mut self, now: Millis, client_seq: u64, accepted: Accepted) -> Option<Outgoing> {
        self.lanes.answered();
        let Some(send) = self.end(client_seq, Ok(accepted)) else { return self.given_up.remove(&client_seq) };
        if let (Some(at), Some(timeout)) = (self.receipts.get_mut(&client_seq), send.outgoing.options.delivery_timeout)
        {
            let due = now + Millis::from(delivery_timeout_ms(timeout)) + RECEIPT_GRACE_MS;
            *at = Some(due);
            self.timers.insert((due, Timer::Receipt(client_seq)));
        }
        Some(send.outgoing)
    }

    /// FAILURE came: ends the send, or has it written again later under the same number.
    pub(crate) fn refused(&mut self, now: Millis, client_seq: u64, refusal: Refusal<'_>) {
        self.lanes.answered();
        self.given_up.remove(&client_seq);
        let Some(send) = self.open.get_mut(&client_seq) else { return };
        let code = refusal.code;
        let again = match send.outgoing.options.class {
            Class::Durable => code.retryable() && code != ErrorCode::NotOnline,
            Class::Transient => matches!(code, ErrorCode::Busy | ErrorCode::RateLimited),
        };
        if !again {
            // Too old for the filter, after a copy was lost: that copy may well be what the filter has forgotten.
            let forgotten = code == ErrorCode::StaleClientSeq && send.fate == Fate::Unknown;
            let error = SendError::Refused { code, detail: refusal.detail.to_owned() };
            let unknown = forgotten || code == ErrorCode::Unknown;
            self.end(client_seq, Err(if unknown { SendError::Unknown } else { error }));
            return;
        }
        let kept_perhaps = matches!(code, ErrorCode::StoreFailed | ErrorCode::Internal | ErrorCode::Unknown);
        send.fate = if kept_perhaps || send.fate == Fate::Unknown { Fate::Unknown } else { Fate::Refused(code) };
        send.stage = Stage::Waiting;
        let pause = refusal.pause_ms(send.refusals);
        send.refusals = send.refusals.saturating_add(1);
        self.lanes.again(client_seq, &send.outgoing.to);
        let until = now.saturating_add(pause);
        // Too many requests are the connection's; anything else is about this conversation, and the next is not slower for it.
        if code == ErrorCode::RateLimited {
            self.lanes.pause_all(until);
        } else {
            self.lanes.pause(&send.outgoing.to, until);
        }
    }

    /// RECEIPT came.
    pub(crate) fn receipt(&mut self, receipt: &Receipt) {
        let Some(due) = self.receipts.remove(&receipt.client_seq) else { return };
        if let Some(due) = due {
            self.timers.remove(&(due, Timer::Receipt(receipt.client_seq)));
        }
        let delivery = Delivery { outcome: receipt.outcome, device: receipt.device };
        self.done.push(Done::Delivered(receipt.client_seq, Ok(delivery)));
    }

    /// The connection is gone: durable sends in flight will be written again, transient ones end as unknown.
    pub(crate) fn disconnected(&mut self) {
        self.lanes.disconnected();
        self.given_up.clear();
        let in_flight: Vec<(u64, Class)> = self
            .open
            .iter()
            .filter(|(_, send)| send.stage == Stage::InFlight)
            .map(|(&client_seq, send)| (client_seq, send.outgoing.options.class))
            .collect();
        for (client_seq, class) in in_flight {
            match class {
                Class::Durable => {
                    if let Some(send) = self.open.get_mut(&client_seq) {
                        (send.stage, send.fate) = (Stage::Waiting, Fate::Unknown);
                        self.lanes.again(client_seq, &send.outgoing.to);
                    }
                }
                Class::Transient => {
                    self.end(client_seq, Err(SendError::Unknown));
                }
            }
        }
    }

    /// Ends what is past its time.
    pub(crate) fn expire(&mut self, now: Millis) {
        while let Some(&(at, timer)) = self.timers.first() {
            if at > now {
                return;
            }
            self.timers.pop_first();
            match timer {
                Timer::GiveUp(client_seq) => self.give_up(client_seq),
                Timer::Receipt(client_seq) => {
                    self.receipts.remove(&client_seq);
                    self.done.push(Done::Delivered(client_seq, Err(SendError::Unknown)));
                }
            }
        }
    }

    /// The client closes: everything ends with what is known of it.
    pub(crate) fn close(&mut self) {
        while let Some((&client_seq, _)) = self.open.first_key_value() {
            self.give_up(client_seq);
        }
        for (client_seq, _) in std::mem::take(&mut self.receipts) {
            self.done.push(Done::Delivered(client_seq, Err(SendError::Unknown)));
        }
        self.timers.clear();
    }

    fn give_up(&mut self, client_seq: u64) {
        if let Some(send) = self.open.get(&client_seq) {
            let (verdict, in_flight) = (send.verdict(), send.stage == Stage::InFlight);
            let send = self.end(client_seq, Err(verdict));
            // No more than the window allows in flight.
            self.given_up.extend(send.filter(|_| in_flight).map(|send| (client_seq, send.outgoing)));
        }
    }

    /// The one place where a send ends.
    fn end(&mut self, client_seq: u64, result: Result<Accepted, SendError>) -> Option<Send> {
        let send = self.open.remove(&client_seq)?;
        self.lanes.end(client_seq, &send.outgoing.to);
        if let Some(at) = send.give_up_at {
            self.timers.remove(&(at, Timer::GiveUp(client_seq)));
        }
        if let Err(error) = &result
            && self.receipts.remove(&client_seq).is_some()
        {
            self.done.push(Done::Delivered(client_seq, Err(error.clone())));
        }
        self.done.push(Done::Sent(client_seq, result));
        Some(send)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn any_in_flight(&self) -> bool {
        self.open.len() > self.lanes.waiting()
    }

    /// When [`Self::expire`] next has something to do.
    pub(crate) fn next_end(&self) -> Option<Millis> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// When [`Self::pump`] next has something to do by itself.
    pub(crate) fn next_write(&self) -> Option<Millis> {
        self.lanes.next_wake()
    }
}

/// A FAILURE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal<'a> {
    pub code: ErrorCode,
    /// 0: the server names no time.
    pub retry_after_ms: u32,
    pub detail: &'a str,
}

impl Refusal<'_> {
    /// How long to wait before asking again, after `refusals` earlier ones.
    pub(crate) fn pause_ms(&self, refusals: u32) -> Millis {
        match self.retry_after_ms {
            0 => RETRY_MS_MIN.checked_shl(refusals.min(16)).unwrap_or(RETRY_MS_MAX).min(RETRY_MS_MAX),
            named => Millis::from(named).min(RETRY_MS_MAX),
        }
    }
}

// --- calls -------------------------------------------------------------------------------------------------------

/// Which messages of a conversation to read. The default: the newest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryRange {
    /// Only messages above this.
    pub after: Seq,
    /// Only messages below this; `None`: up to the newest.
    pub before: Option<Seq>,
    /// At most so many; the server lowers it to 200. 0: 50.
    pub limit: u16,
    /// When more match: the newest of them (true) or the oldest (false).
    pub newest: bool,
}

impl Default for HistoryRange {
    fn default() -> Self {
        Self { after: Seq::ZERO, before: None, limit: 0, newest: true }
    }
}

/// A piece of a conversation, in rising order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    pub conversation: ConversationId,
    /// The oldest seq that the server keeps.
    pub first: Seq,
    /// The newest.
    pub head: Seq,
    pub messages: Vec<Message>,
}

/// A row of the conversation list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    pub conversation: ConversationId,
    pub with: UserName,
    /// The oldest seq that the server keeps.
    pub first: Seq,
    /// The newest.
    pub head: Seq,
    /// Unix milliseconds of the newest message.
    pub last_time_ms: u64,
    /// How far this device has acknowledged.
    pub acked: Seq,
    /// How far this user has read, on whatever device.
    pub read: Seq,
    pub pinned: bool,
    /// Unix milliseconds; 0: not muted.
    pub muted_until_ms: u64,
    /// What this user is to a group; `None` for a conversation with a user.
    pub standing: Option<Standing>,
    /// Of a group.
    pub title: String,
    /// The newest message, unless it is too large for a list.
    pub last: Option<Message>,
}

impl Conversation {
    /// Messages that this user has not read: head less read, never a counter of its own.
    pub fn unread(&self) -> u64 {
        self.head.0.saturating_sub(self.read.0)
    }
}

/// Conversations in order of id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConversationPage {
    pub conversations: Vec<Conversation>,
    /// Where the next page starts; `None`: this was the last.
    pub next: Option<ConversationId>,
}

/// A user who is online.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnlineUser {
    pub user: UserName,
    pub devices: u16,
}

/// Users in order of name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnlinePage {
    pub users: Vec<OnlineUser>,
    /// Where the next page starts; `None`: this was the last.
    pub next: Option<String>,
}

/// Why a call has no answer. A command to a group that had none may be done all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("{}", ErrorCode::BadName.text())]
    BadName,
    #[error("refused: {code}")]
    Refused { code: ErrorCode, detail: String },
    #[error("no answer in time")]
    Timeout,
    #[error("too many calls are open")]
    QueueFull,
    #[error("the client is closed")]
    Closed,
}

/// A question of the application.
#[derive(Clone, Debug)]
pub(crate) enum Query {
    History { with: UserName, range: HistoryRange },
    Online { cursor: String, limit: u16 },
    Conversations { cursor: ConversationId, limit: u16 },
    Social(SocialQuery),
    Account(AccountQuery),
    Group { group: UserName, act: Act },
}

impl Query {
    fn as_wire(&self) -> Request<'_> {
        match self {
            Self::History { with, range } => {
                let HistoryRange { after, before, limit, newest } = *range;
                Request::Fetch(message::Fetch { with: with.as_str(), after, before, limit, newest })
            }
            Self::Online { cursor, limit } => Request::Online { cursor, limit: *limit },
            Self::Conversations { cursor, limit } => Request::Conversations { cursor: *cursor, limit: *limit },
            Self::Social(query) => query.as_wire(),
            Self::Account(query) => query.as_wire(),
            Self::Group { group, act } => act.as_wire(group),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Answer {
    History(History),
    Online(OnlinePage),
    Conversations(ConversationPage),
    Social(SocialAnswer),
    Account(AccountAnswer),
    Group(GroupAnswer),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallStage {
    WaitingUntil(Millis),
    InFlight,
}

struct Call {
    query: Query,
    stage: CallStage,
    give_up_at: Millis,
    refusals: u32,
    /// Overruled for all users that it was about: it is not asked again.
    moot: bool,
}

/// Questions of the application that have no answer yet. Few, so they are simply walked through.
#[derive(Default)]
pub(crate) struct Calls {
    pub(crate) done: Vec<Done>,
    open: BTreeMap<u64, Call>,
    last: u64,
}

impl Calls {
    pub(crate) fn push(&mut self, now: Millis, query: Query, timeout: Duration) -> Result<u64, CallError> {
        if self.open.len() >= CALLS_MAX {
            return Err(CallError::QueueFull);
        }
        self.last += 1;
        let give_up_at = now.saturating_add(millis(timeout));
        let call = Call { query, stage: CallStage::WaitingUntil(now), give_up_at, refusals: 0, moot: false };
        self.open.insert(self.last, call);
        Ok(self.last)
    }

    pub(crate) fn pump(&mut self, now: Millis, wire: &mut Wire) {
        for (&number, call) in &mut self.open {
            if matches!(call.stage, CallStage::WaitingUntil(at) if at <= now) {
                wire.ask(now, Waiting::Call(number), &call.query.as_wire());
                call.stage = CallStage::InFlight;
            }
        }
    }

    /// Errors: `BAD_BODY` for the answer to another question.
    pub(crate) fn answered(&mut self, number: u64, answer: Answer) -> Result<(), ErrorCode> {
        let Some(call) = self.open.get(&number) else { return Ok(()) };
        match (&call.query, &answer) {
            (Query::History { .. }, Answer::History(_))
            | (Query::Online { .. }, Answer::Online(_))
            | (Query::Conversations { .. }, Answer::Conversations(_))
            | (Query::Group { .. }, Answer::Group(_)) => self.end(number, Ok(answer)),
            (Query::Account(query), Answer::Account(account)) if query.is_answered_by(account) => {
                self.end(number, Ok(answer));
            }
            (Query::Social(query), Answer::Social(social)) if query.is_answered_by(social) => {
                self.end(number, Ok(answer));
            }
            (Query::History { .. } | Query::Online { .. } | Query::Conversations { .. }, _)
            | (Query::Social(_) | Query::Account(_) | Query::Group { .. }, _) => {
                return Err(ErrorCode::BadBody);
            }
        }
        Ok(())
    }

    /// The later word counts: who is watched by call `number` is no longer looked away from by an earlier one, and the
    /// other way round, however often that one is asked again and whenever it is answered.
    pub(crate) fn overrule(&mut self, number: u64) {
        let (users, watches) = match self.query(number) {
            Some(Query::Social(SocialQuery::Watch(users))) => (users, true),
            Some(Query::Social(SocialQuery::Unwatch(users))) => (users, false),
            Some(_) | None => return,
        };
        let users: BTreeSet<UserName> = users.iter().cloned().collect();
        for call in self.open.range_mut(..number).map(|(_, call)| call) {
            if let (Query::Social(SocialQuery::Unwatch(theirs)), true)
            | (Query::Social(SocialQuery::Watch(theirs)), false) = (&mut call.query, watches)
            {
                let had = !theirs.is_empty();
                theirs.retain(|user| !users.contains(user));
                call.moot |= had && theirs.is_empty();
            }
        }
        self.end_moot();
    }

    /// Ends what is overruled and not under way: there is nothing to ask.
    fn end_moot(&mut self) {
        let moot = |call: &Call| call.moot && call.stage != CallStage::InFlight;
        let moot: Vec<_> = self.open.iter().filter(|(_, call)| moot(call)).map(|(&number, _)| number).collect();
        for number in moot {
            let watches = matches!(self.query(number), Some(Query::Social(SocialQuery::Watch(_))));
            let answer = if watches { SocialAnswer::Presence(Vec::new()) } else { SocialAnswer::Done };
            self.end(number, Ok(Answer::Social(answer)));
        }
    }

    /// What was asked.
    pub(crate) fn query(&self, number: u64) -> Option<&Query> {
        self.open.get(&number).map(|call| &call.query)
    }

    pub(crate) fn refused(&mut self, now: Millis, number: u64, refusal: Refusal<'_>) {
        let Some(call) = self.open.get_mut(&number) else { return };
        if refusal.code.retryable() {
            call.stage = CallStage::WaitingUntil(now.saturating_add(refusal.pause_ms(call.refusals)));
            call.refusals = call.refusals.saturating_add(1);
            self.end_moot();
        } else {
            self.end(number, Err(CallError::Refused { code: refusal.code, detail: refusal.detail.to_owned() }));
        }
    }

    pub(crate) fn disconnected(&mut self) {
        for call in self.open.values_mut() {
            call.stage = CallStage::WaitingUntil(0);
        }
        self.end_moot();
    }

    pub(crate) fn expire(&mut self, now: Millis) {
        let late: Vec<u64> =
            self.open.iter().filter(|(_, call)| call.give_up_at <= now).map(|(&number, _)| number).collect();
        for number in late {
            self.end(number, Err(CallError::Timeout));
        }
    }

    pub(crate) fn close(&mut self) {
        while let Some((&number, _)) = self.open.first_key_value() {
            self.end(number, Err(CallError::Closed));
        }
    }

    fn end(&mut self, number: u64, result: Result<Answer, CallError>) {
        if self.open.remove(&number).is_some() {
            self.done.push(Done::Answered(number, result));
        }
    }

    pub(crate) fn next_wake(&self, now: Millis) -> Option<Millis> {
        let wake = |call: &Call| match call.stage {
            CallStage::WaitingUntil(at) if at > now => at.min(call.give_up_at),
            CallStage::WaitingUntil(_) | CallStage::InFlight => call.give_up_at,
        };
        self.open.values().map(wake).min()
    }
}
