//! Connections of a shard: their states, their limits, and the output that waits for each.
//!
//! States go fresh → greeted → logged in → draining, and end by `Event::Closed`. Output is bounded: above
//! `outbox_bytes_max` durable pushes become LAGGED and transient ones are dropped; answers may reach twice that, then
//! the connection is closed as SLOW_READER. An idle connection owns no buffer.

mod runs;
mod straight;

use std::collections::BTreeMap;

use bytes::Bytes;
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{BodyKind, DeviceKind, Message, MessageState, Reply};
use ringline_schema::record::StoredMessage;

use crate::config::{CoreConfig, LAGGED_CONVERSATIONS_MAX, SPARE_BUFFER_BYTES_MAX, SPARE_BUFFERS_MAX};
use crate::counters::Counters;
use crate::event::{CloseReason, ConnId, Effect, Effects};
use crate::login::Attempt;
use crate::social::Sociable;

/// Conversations whose delivered range a session remembers, to judge its ACKs; above it the lowest id is forgotten.
const KNOWN_CONVERSATIONS_MAX: usize = 4_096;

/// Where a connection stands.
#[derive(Debug)]
pub enum State {
    /// Nothing was heard yet.
    Fresh,
    /// Speaks the protocol, has not proved who it is. At most one REGISTER or LOGIN is under way.
    Greeted(Option<Box<Attempt>>),
    LoggedIn(Box<Login>),
    /// Told why it ends; what is queued is still written.
    Draining,
}

/// A logged-in device.
#[derive(Debug)]
pub struct Login {
    pub user: UserName,
    pub device: DeviceId,
    pub kind: DeviceKind,
    /// No other device of the user was here since this one came: nobody needs a copy of what it sends. False is always
    /// right, only slower.
    pub alone: bool,
    /// The user has deleted messages for itself alone: it fetches edits, as the store shows them to it. True is always right,
    /// only slower.
    pub hides: bool,
    /// Durable sends without an answer.
    pub sends_in_flight: u32,
    /// What only a device has that does something: most connections of a server are idle, and pay for it with a word.
    active: Option<Box<Active>>,
}

/// What a device has once it has sent, been given or asked for something.
#[derive(Debug)]
struct Active {
    key: DeviceKey,
    /// The conversation of the last durable send, whose id is a hash of two names.
    last_sent: Option<(UserName, ConversationId)>,
    /// Conversations this device has seen something of.
    known: BTreeMap<ConversationId, Known>,
    /// What few devices have, so that the others stay small.
    social: Option<Box<Sociable>>,
    /// Dropped durable deliveries that LAGGED has yet to tell.
    lagged: BTreeMap<ConversationId, Lag>,
}

static NOTHING_KNOWN: BTreeMap<ConversationId, Known> = BTreeMap::new();

/// What a device has been given of a conversation, and what it says it has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    pub shown: Seq,
    pub acked: Seq,
    /// An ACK of this session says something of messages from here on: the first that it was given, or, once it was
    /// `told`, the first that was kept then.
    pub from: Seq,
    /// An answer has said which is the first that is kept.
    pub told: bool,
    /// `acked` has moved since it was last written.
    pub dirty: bool,
}

impl Known {
    /// Notes the first that is kept, as an answer says it; it never goes back, though answers may.
    pub fn tell(&mut self, first: Seq) {
        self.from = if self.told { self.from.max(first) } else { first };
        self.told = true;
    }
}

/// A range of dropped deliveries.
#[derive(Clone, Debug)]
pub struct Lag {
    pub with: UserName,
    pub from: Seq,
    pub to: Seq,
}

impl Login {
    pub fn new(user: UserName, device: DeviceId, kind: DeviceKind) -> Self {
        Self { user, device, kind, alone: false, hides: true, sends_in_flight: 0, active: None }
    }

    fn active(&mut self) -> &mut Active {
        self.active.get_or_insert_with(|| {
            let key = DeviceKey::new(&self.user, self.device);
            let (known, lagged) = (BTreeMap::new(), BTreeMap::new());
            Box::new(Active { key, last_sent: None, known, social: None, lagged })
        })
    }

    /// Who the device is to conversations: a hash, which is remembered.
    pub fn key(&mut self) -> DeviceKey {
        self.active().key
    }

    /// Whom the last durable send went to.
    pub fn last_sent_to(&self) -> Option<&UserName> {
        self.active.as_ref()?.last_sent.as_ref().map(|(name, _)| name)
    }

    /// The user or group with this name, and the id of the conversation with it. Errors: `BAD_NAME`.
    pub fn conversation(&mut self, to: &str) -> Result<(UserName, ConversationId), ErrorCode> {
        if let Some((name, conversation)) = self.active.as_ref().and_then(|active| active.last_sent.as_ref())
            && name.as_str() == to
        {
            return Ok((name.clone(), *conversation));
        }
        let name = UserName::new(to)?;
        let conversation = ConversationId::with(&self.user, &name);
        self.active().last_sent = Some((name.clone(), conversation));
        Ok((name, conversation))
    }

    /// What this device says, before its owner gives it number and time.
    pub fn message(
        &self,
        (to, conversation): (UserName, ConversationId),
        kind: BodyKind,
        body: Bytes,
    ) -> StoredMessage {
        let (from, device) = (self.user.clone(), self.device);
        let (seq, client_seq, time_ms) = (Seq::ZERO, 0, 0);
        StoredMessage { conversation, seq, from, to, device, client_seq, time_ms, kind, body, extra: None }
    }

    /// Conversations this device has seen something of.
    pub fn known(&self) -> &BTreeMap<ConversationId, Known> {
        self.active.as_ref().map_or(&NOTHING_KNOWN, |active| &active.known)
    }

    pub fn known_mut(&mut self, conversation: ConversationId) -> Option<&mut Known> {
        self.active.as_mut()?.known.get_mut(&conversation)
    }

    /// What few devices have.
    /// Forgets what this device was given and has, also what was not written of it.
    pub fn forget_known(&mut self) {
        if let Some(active) = &mut self.active {
            active.known.clear();
        }
    }

    pub fn social(&self) -> Option<&Sociable> {
        self.active.as_ref()?.social.as_deref()
    }

    pub fn social_mut(&mut self) -> &mut Sociable {
        self.active().social.get_or_insert_default()
    }

    /// Notes that this device was given `seq`.
    pub fn show(&mut self, conversation: ConversationId, seq: Seq) {
        self.show_run(conversation, (seq, seq));
    }

    /// The same of several.
    fn show_run(&mut self, conversation: ConversationId, (from, shown): (Seq, Seq)) {
        if let Some(known) = self.known_mut(conversation) {
            known.shown = known.shown.max(shown);
            return;
        }
        let all = &mut self.active().known;
        all.insert(conversation, Known { shown, from, ..Known::default() });
        if all.len() > KNOWN_CONVERSATIONS_MAX {
            let clean = all.iter().find(|(id, known)| !known.dirty && **id != conversation);
            if let Some(id) = clean.map(|(id, _)| *id) {
                all.remove(&id);
            }
        }
    }

    /// Whether LAGGED has yet to tell of this conversation.
    fn lags(&self, conversation: ConversationId) -> bool {
        self.active.as_ref().is_some_and(|active| active.lagged.contains_key(&conversation))
    }

    /// Whether this message may say what the user does not want to see any more.
    fn has_to_fetch(&self, message: &StoredMessage) -> bool {
        self.hides && message.amends().is_some_and(|(_, state)| state == MessageState::Edited)
    }

    fn take_lagged(&mut self) -> BTreeMap<ConversationId, Lag> {
        self.active.as_mut().map(|active| std::mem::take(&mut active.lagged)).unwrap_or_default()
    }
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    pub conn: ConnId,
    pub codec: Codec,
    pub state: State,
    /// Logins that failed.
    pub failures: u8,
    dirty: bool,
    /// A gateway holds its client.
    pub tunnelled: bool,
    /// When the last whole request came. Bytes that complete nothing do not count.
    pub heard_us: u64,
    /// When output last moved, or began to wait.
    pub progress_us: u64,
    /// When this connection is next looked at; a timer that fires before it is stale.
    pub look_us: u64,
    out: Vec<u8>,
    in_flight_bytes: usize,
    bucket: Bucket,
}

impl Session {
    pub fn login(&self) -> Option<&Login> {
        match &self.state {
            State::LoggedIn(login) => Some(login),
            State::Fresh | State::Greeted(_) | State::Draining => None,
        }
    }

    pub fn login_mut(&mut self) -> Option<&mut Login> {
        match &mut self.state {
            State::LoggedIn(login) => Some(login),
            State::Fresh | State::Greeted(_) | State::Draining => None,
        }
    }

    pub fn is_draining(&self) -> bool {
        matches!(self.state, State::Draining)
    }

    /// Bytes queued here or in the shell's hands.
    pub fn waiting_bytes(&self) -> usize {
        self.out.len() + self.in_flight_bytes
    }

    /// Whether a push still fits.
    fn has_room(&self, outbox_bytes_max: usize) -> bool {
        self.waiting_bytes() < session_limit(outbox_bytes_max)
    }

    /// Counts a request against the connection's rate; `Err`: after how many milliseconds it may come again.
    pub fn take_rate(&mut self, now_us: u64, rate: &Rate) -> Result<(), u32> {
        self.bucket.take(now_us, rate)
    }
}

/// A push that many devices get, encoded once for those of one codec after the other.
#[derive(Debug, Default)]
pub struct Shared {
    codec: Option<Codec>,
    frame: Vec<u8>,
}

impl Shared {
    /// Bytes that each copy takes.
    pub fn len(&self) -> usize {
        self.frame.len()
    }
}

/// What writes output: borrowed from [`Sessions`] beside one of its connections, which so is looked up once.
struct Pen<'a> {
    encoder: &'a mut Encoder,
    spare: &'a mut Vec<Vec<u8>>,
    now_us: u64,
}

impl Pen<'_> {
    /// A connection is about to get output.
    #[inline]
    fn begin(&mut self, session: &mut Session, fx: &mut Effects) {
        if session.out.capacity() == 0 {
            session.out = self.spare.pop().unwrap_or_default();
        }
        if session.waiting_bytes() == 0 {
            session.progress_us = self.now_us;
        }
        if !session.dirty {
            session.dirty = true;
            fx.dirty.push(session.conn);
        }
    }

    #[inline]
    fn write(mut self, session: &mut Session, request_id: u32, reply: &Reply<'_>, fx: &mut Effects) {
        self.begin(session, fx);
        self.encoder.reply(session.codec, request_id, reply, &mut session.out);
    }

    #[inline]
    fn deliver(mut self, session: &mut Session, message: &Message<'_>, fx: &mut Effects) {
        self.begin(session, fx);
        self.encoder.deliver(session.codec, message, &mut session.out);
    }
}

// What an idle connection pays for; see "Cost of a connection" in tuning.md.
const _: () = assert!(size_of::<Option<Session>>() <= 96 && size_of::<Login>() <= 48);

/// How many requests a connection may make, as a [`Bucket`] counts them: with nothing left to divide.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    one_ns: u64,
    burst_ns: u64,
}

impl Rate {
    fn new(per_s: u32, burst: u32) -> Self {
        let one_ns = 1_000_000_000 / u64::from(per_s.max(1));
        Self { one_ns, burst_ns: one_ns.saturating_mul(u64::from(burst)) }
    }
}

/// Token bucket, kept as one time: when it will be full. Each request puts that off by what it takes to refill.
///
/// In nanoseconds, so a rate that does not divide them is passed by less than one request in a thousand at the highest.
#[derive(Debug, Default)]
struct Bucket {
    full_ns: u64,
}

impl Bucket {
    /// Takes one request, or says after how many milliseconds one will be there.
    fn take(&mut self, now_us: u64, rate: &Rate) -> Result<(), u32> {
        let now_ns = now_us.saturating_mul(1_000);
        let full_ns = self.full_ns.max(now_ns).saturating_add(rate.one_ns);
        let excess_ns = full_ns.saturating_sub(now_ns).saturating_sub(rate.burst_ns);
        if excess_ns == 0 {
            self.full_ns = full_ns;
            return Ok(());
        }
        Err(u32::try_from(excess_ns.div_ceil(1_000_000)).unwrap_or(u32::MAX))
    }
}

/// All connections of a shard, and the one way output is written.
pub struct Sessions {
    table: Vec<Option<Session>>,
    count: usize,
    encoder: Encoder,
    spare: Vec<Vec<u8>>,
    outbox_bytes_max: usize,
    pub rate: Rate,
    pub counters: Counters,
    pub now_us: u64,
    /// Logins that ended during this event.
    pub ended: Vec<(ConnId, Box<Login>)>,
    /// Output of a connection that was just handed over, for the shell to write before it lets go.
    handed: Option<(ConnId, Vec<u8>)>,
}

impl Sessions {
    pub fn new(config: &CoreConfig) -> Self {
        Self {
            table: Vec::new(),
            count: 0,
            encoder: Encoder::new(),
            spare: Vec::new(),
            outbox_bytes_max: config.outbox_bytes_max,
            rate: Rate::new(config.requests_per_s, config.requests_burst),
            counters: Counters::default(),
            now_us: 0,
            ended: Vec::new(),
            handed: None,
        }
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn iter(&self) -> impl Iterator<Item = &Session> {
        self.table.iter().flatten()
    }

    /// Places of the table.
    pub fn slots(&self) -> usize {
        self.table.len()
    }

    /// Connections in `count` places from `slot` on.
    pub fn slice(&self, slot: usize, count: usize) -> Vec<ConnId> {
        self.table.iter().skip(slot).take(count).flatten().map(|session| session.conn).collect()
    }

    pub fn ids(&self) -> Vec<ConnId> {
        self.iter().map(|session| session.conn).collect()
    }

    pub fn get(&self, conn: ConnId) -> Option<&Session> {
        self.table.get(conn.slot as usize)?.as_ref().filter(|session| session.conn == conn)
    }

    pub fn get_mut(&mut self, conn: ConnId) -> Option<&mut Session> {
        self.table.get_mut(conn.slot as usize)?.as_mut().filter(|session| session.conn == conn)
    }

    pub fn login_mut(&mut self, conn: ConnId) -> Option<&mut Login> {
        self.get_mut(conn)?.login_mut()
    }

    pub fn open(&mut self, conn: ConnId) {
        let slot = conn.slot as usize;
        if self.table.len() <= slot {
            self.table.resize_with(slot + 1, || None);
        }
        let now_us = self.now_us;
        let Some(place) = self.table.get_mut(slot) else { return };
        debug_assert!(place.is_none(), "slot {slot} has a tenant");
        self.count += usize::from(place.is_none());
        *place = Some(Session {
            conn,
            codec: Codec::default(),
            state: State::Fresh,
            failures: 0,
            dirty: false,
            tunnelled: false,
            heard_us: now_us,
            progress_us: now_us,
            look_us: 0,
            out: Vec::new(),
            in_flight_bytes: 0,
            bucket: Bucket::default(),
        });
        self.counters.connections_opened += 1;
    }

    /// Forgets a connection. A login it had is put into `ended`.
    pub fn remove(&mut self, conn: ConnId) -> Option<Session> {
        let place = self.table.get_mut(conn.slot as usize)?;
        if place.as_ref().is_none_or(|session| session.conn != conn) {
            return None;
        }
        self.count -= 1;
        let mut session = place.take()?;
        if let State::LoggedIn(login) = std::mem::replace(&mut session.state, State::Draining) {
            self.ended.push((conn, login));
        }
        Some(session)
    }

    /// Forgets a connection that another shard takes; what it still had to say can be taken once more.
    pub fn hand_over(&mut self, conn: ConnId) {
        if let Some(session) = self.remove(conn) {
            self.counters.connections_handed += 1;
            self.handed = (!session.out.is_empty()).then_some((conn, session.out));
        }
    }

    /// Queues an answer. Closes the connection when it reads so slowly that even answers pile up.
    pub fn answer(&mut self, conn: ConnId, request_id: u32, reply: &Reply<'_>, fx: &mut Effects) {
        let outbox_bytes_max = self.outbox_bytes_max;
        let Some((session, pen)) = self.open_session(conn) else {
            self.counters.orphaned_answers += 1;
            return;
        };
        if session.waiting_bytes() > 2 * session_limit(outbox_bytes_max) {
            self.close(conn, CloseReason::Error(ErrorCode::SlowReader), fx);
            return;
        }
        pen.write(session, request_id, reply, fx);
    }

    /// Answers with a failure; ends the connection if the code says so.
    pub fn fail(&mut self, conn: ConnId, request_id: u32, code: ErrorCode, fx: &mut Effects) {
        let retry_after_ms = match code {
            ErrorCode::Busy => crate::config::BUSY_RETRY_MS,
            _ if code.retryable() => 1_000,
            _ => 0,
        };
        self.fail_after(conn, request_id, (code, retry_after_ms), fx);
    }

    pub fn fail_after(&mut self, conn: ConnId, request_id: u32, (code, ms): (ErrorCode, u32), fx: &mut Effects) {
        self.counters.failure(code);
        self.answer(conn, request_id, &Reply::Failure { code, retry_after_ms: ms, detail: code.text() }, fx);
        if code.closes() {
            self.close(conn, CloseReason::Error(code), fx);
        }
    }

    /// Queues a push that is small and must not be lost (KICKED, GOAWAY, RECEIPT).
    pub fn push(&mut self, conn: ConnId, reply: &Reply<'_>, fx: &mut Effects) {
        self.answer(conn, 0, reply, fx);
    }

    /// Queues a push that nobody misses for ever, or drops and counts it. True when queued.
    pub fn offer(&mut self, conn: ConnId, reply: &Reply<'_>, fx: &mut Effects) -> bool {
        self.write_if_room(conn, |pen, session| pen.write(session, 0, reply, fx))
    }

    /// Queues a transient delivery, or drops and counts it. True when queued.
    pub fn deliver_transient(&mut self, conn: ConnId, message: &Message<'_>, fx: &mut Effects) -> bool {
        let queued = self.write_if_room(conn, |pen, session| pen.deliver(session, message, fx));
        self.counters.delivered += u64::from(queued);
        queued
    }

    #[inline]
    fn write_if_room(&mut self, conn: ConnId, write: impl FnOnce(Pen<'_>, &mut Session)) -> bool {
        let outbox_bytes_max = self.outbox_bytes_max;
        match self.open_session(conn).filter(|(session, _)| session.has_room(outbox_bytes_max)) {
            Some((session, pen)) => {
                write(pen, session);
                true
            }
            None => {
                self.counters.dropped_transient += 1;
                false
            }
        }
    }

    /// Queues a durable delivery, or notes that the device lags. `with` names the conversation to the device.
    #[inline]
    pub fn deliver_durable(&mut self, conn: ConnId, message: &StoredMessage, with: &UserName, fx: &mut Effects) {
        let Some(login) = self.login_mut(conn) else { return };
        login.show(message.conversation, message.seq);
        self.deliver_shown(conn, message, with, fx);
    }

    #[inline]
    fn deliver_shown(&mut self, conn: ConnId, message: &StoredMessage, with: &UserName, fx: &mut Effects) {
        let (conversation, seq) = (message.conversation, message.seq);
        let outbox_bytes_max = self.outbox_bytes_max;
        let Some((session, pen)) = self.open_session(conn) else { return };
        let room = session.has_room(outbox_bytes_max);
        let Some(login) = session.login() else { return };
        if login.has_to_fetch(message) {
            return self.miss(conn, (conversation, with), (seq, seq), fx);
        }
        if room && !login.lags(conversation) {
            pen.deliver(session, &message.as_wire(), fx);
            self.counters.delivered += 1;
        } else {
            self.counters.dropped_durable += 1;
            self.note_lag(conn, conversation, Lag { with: with.clone(), from: seq, to: seq }, fx);
        }
    }

    /// Queues a durable delivery that many devices get, or notes that the device lags.
    pub fn deliver_shared(&mut self, conn: ConnId, message: &StoredMessage, shared: &mut Shared, fx: &mut Effects) {
        if self.login_mut(conn).is_some_and(|login| login.has_to_fetch(message)) {
            return self.miss(conn, (message.conversation, &message.to), (message.seq, message.seq), fx);
        }
        if self.may_deliver(conn, (message.conversation, message.seq), &message.to, fx) {
            self.copy(conn, || Reply::Deliver(message.as_wire()), shared, fx);
        }
    }

    /// Queues a push that many devices get and nobody misses for ever, or drops and counts it. True when queued.
    pub fn offer_shared<'a>(
        &mut self,
        conn: ConnId,
        reply: impl FnOnce() -> Reply<'a>,
        shared: &mut Shared,
        fx: &mut Effects,
    ) -> bool {
        if !self.room(conn) {
            self.counters.dropped_transient += u64::from(self.get(conn).is_some());
            return false;
        }
        self.copy(conn, reply, shared, fx)
    }

    /// Copies a frame that is encoded for the first who gets it.
    fn copy<'a>(
        &mut self,
        conn: ConnId,
        reply: impl FnOnce() -> Reply<'a>,
        shared: &mut Shared,
        fx: &mut Effects,
    ) -> bool {
        let Some((session, mut pen)) = self.open_session(conn) else { return false };
        if shared.codec != Some(session.codec) {
            if shared.frame.capacity() == 0 {
                shared.frame = pen.spare.pop().unwrap_or_default();
            }
            shared.frame.clear();
            pen.encoder.reply(session.codec, 0, &reply(), &mut shared.frame);
            shared.codec = Some(session.codec);
        }
        pen.begin(session, fx);
        session.out.extend_from_slice(&shared.frame);
        true
    }

    /// Takes back what a push was encoded into.
    pub fn done_with(&mut self, shared: Shared) {
        self.give_back(shared.frame);
    }

    /// Tells a device which messages it has to fetch, or notes it while other output waits.
    pub fn miss(
        &mut self,
        conn: ConnId,
        (conversation, with): (ConversationId, &UserName),
        range: (Seq, Seq),
        fx: &mut Effects,
    ) {
        let low = self.outbox_bytes_max / 2;
        let Some(session) = self.get_mut(conn) else { return };
        let waiting = session.waiting_bytes();
        let Some(login) = session.login_mut() else { return };
        login.show(conversation, range.1);
        let lagging = login.lags(conversation);
        self.counters.dropped_durable += 1;
        if lagging || waiting > low {
            self.note_lag(conn, conversation, Lag { with: with.clone(), from: range.0, to: range.1 }, fx);
        } else {
            self.counters.lagged += 1;
            let reply = Reply::Lagged { conversation, with: with.as_str(), from: range.0, to: range.1 };
            self.push(conn, &reply, fx);
        }
    }

    /// Whether a durable delivery can be queued; otherwise it is noted that the device lags.
    fn may_deliver(
        &mut self,
        conn: ConnId,
        (conversation, seq): (ConversationId, Seq),
        with: &UserName,
        fx: &mut Effects,
    ) -> bool {
        let room = self.room(conn);
        let Some(login) = self.login_mut(conn) else { return false };
        login.show(conversation, seq);
        if room && !login.lags(conversation) {
            self.counters.delivered += 1;
            return true;
        }
        self.counters.dropped_durable += 1;
        self.note_lag(conn, conversation, Lag { with: with.clone(), from: seq, to: seq }, fx);
        false
    }

    /// What LAGGED has yet to tell: as soon as output has moved.
    fn note_lag(&mut self, conn: ConnId, conversation: ConversationId, lag: Lag, fx: &mut Effects) {
        let Some(login) = self.login_mut(conn) else { return };
        let (to, lagged) = (lag.to, &mut login.active().lagged);
        lagged.entry(conversation).or_insert(lag).to = to;
        if lagged.len() > LAGGED_CONVERSATIONS_MAX {
            self.fail(conn, 0, ErrorCode::SlowReader, fx);
        }
    }

    fn room(&self, conn: ConnId) -> bool {
        self.get(conn).is_some_and(|session| !session.is_draining() && session.has_room(self.outbox_bytes_max))
    }

    /// Whether an answer as large as a frame may be asked for now.
    pub fn room_for_page(&self, conn: ConnId) -> bool {
        self.room(conn)
    }

    /// The kernel took output: progress, and perhaps room to tell a lagging device.
    pub fn sent(&mut self, conn: ConnId, bytes: usize, fx: &mut Effects) {
        let (now_us, low) = (self.now_us, self.outbox_bytes_max / 2);
        let Some(session) = self.get_mut(conn) else { return };
        debug_assert!(bytes <= session.in_flight_bytes, "more sent than taken");
        session.in_flight_bytes = session.in_flight_bytes.saturating_sub(bytes);
        session.progress_us = now_us;
        if session.waiting_bytes() > low {
            return;
        }
        let Some(login) = session.login_mut() else { return };
        for (conversation, lag) in login.take_lagged() {
            let reply = Reply::Lagged { conversation, with: lag.with.as_str(), from: lag.from, to: lag.to };
            self.counters.lagged += 1;
            self.push(conn, &reply, fx);
        }
    }

    /// Begins to end a connection: what is queued is still written, nothing more is queued. A login it had is put
    /// into `ended`, for the shard to forget at the end of the event.
    pub fn close(&mut self, conn: ConnId, reason: CloseReason, fx: &mut Effects) {
        let Some(session) = self.get_mut(conn).filter(|session| !session.is_draining()) else { return };
        let state = std::mem::replace(&mut session.state, State::Draining);
        fx.list.push(Effect::Close { conn, reason });
        if let State::LoggedIn(login) = state {
            self.ended.push((conn, login));
        }
    }

    /// A connection that still takes output, and what is needed to write some.
    #[inline]
    fn open_session(&mut self, conn: ConnId) -> Option<(&mut Session, Pen<'_>)> {
        let session = self.table.get_mut(conn.slot as usize)?.as_mut();
        let session = session.filter(|session| session.conn == conn && !session.is_draining())?;
        Some((session, Pen { encoder: &mut self.encoder, spare: &mut self.spare, now_us: self.now_us }))
    }

    /// Hands the queued output of a connection to the shell.
    pub fn take_output(&mut self, conn: ConnId) -> Option<Vec<u8>> {
        if let Some((_, output)) = self.handed.take_if(|(handed, _)| *handed == conn) {
            return Some(output);
        }
        let session = self.get_mut(conn)?;
        session.dirty = false;
        if session.out.is_empty() {
            return None;
        }
        let out = std::mem::take(&mut session.out);
        session.in_flight_bytes += out.len();
        Some(out)
    }

    /// Keeps an output buffer for the next connection that needs one.
    pub fn give_back(&mut self, mut buffer: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS_MAX && buffer.capacity() <= SPARE_BUFFER_BYTES_MAX && buffer.capacity() > 0
        {
            buffer.clear();
            self.spare.push(buffer);
        }
    }
}

/// At least a few frames, however small the configured bound is.
fn session_limit(outbox_bytes_max: usize) -> usize {
    outbox_bytes_max.max(limits::FRAME_BYTES_MAX_BEFORE_LOGIN as usize)
}
