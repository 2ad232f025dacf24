//! What arrives: one contiguous stream a conversation, handed to the application without a gap or a duplicate.
//!
//! Pure, as `pending`; owned by the client's one task. Invariants: `handed` of a conversation only rises, by one with
//! each message handed on, or by what an [`Event::Skipped`] names; nothing is acknowledged before the application has
//! taken it; every queue here is bounded, and what does not fit is either fetched again later (durable messages) or
//! counted in [`Event::Missed`].

mod sync;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{self, Ack, BodyKind, Class, Fetch, Request};

use crate::group::Extra;
use crate::pending::{Conversation, Millis, Refusal, Waiting, Wire};
use crate::session::Event;
use sync::Syncing;

/// Conversations that are followed at once. Above it idle ones are forgotten (the server knows how far they are
/// acknowledged), and if none is idle, messages of new ones are missed until the next login.
const STREAMS_MAX: usize = 65_536;
/// Messages held back because an earlier one is missing, over all conversations. More are dropped and fetched again.
const EARLY_MAX: usize = 1_024;
/// Fetches under way at once.
const FETCHES_MAX: usize = 4;
/// Pause before a fetch that brought nothing is tried again.
const REPAIR_PAUSE_MS: Millis = 500;
/// An acknowledgement waits so long for more of its conversation, …
const ACK_DELAY_MS: Millis = 50;
/// … unless so many messages wait for it.
const ACK_MESSAGES_MAX: u64 = 32;
/// Acknowledgements remembered, in case they are refused or lost with the connection.
const RECENT_ACKS_MAX: usize = 64;

/// What to fetch when a connection begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CatchUp {
    /// In every conversation all that this device has not acknowledged.
    #[default]
    All,
    /// What was missed in the conversations that this client has seen; others begin with their next message.
    Seen,
    /// Nothing. A gap is filled when the next message of its conversation shows it.
    None,
}

/// A message as it was delivered or read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub conversation: ConversationId,
    /// Its place in the conversation; 0 for a transient message.
    pub seq: Seq,
    /// Unix milliseconds, by the server's clock.
    pub time_ms: u64,
    pub from: UserName,
    pub to: UserName,
    /// The device that sent it.
    pub device: DeviceId,
    pub client_seq: u64,
    pub class: Class,
    pub kind: BodyKind,
    pub body: Bytes,
    /// What few messages carry.
    pub extra: Option<Box<Extra>>,
}

impl Message {
    /// The body as text; bytes that are no UTF-8 are replaced.
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.body)
    }

    /// The other user of the conversation, as `me` sees it, or the group.
    pub fn peer(&self, me: &UserName) -> &UserName {
        if self.from == *me || self.to.is_group() { &self.to } else { &self.from }
    }

    /// Errors: `BAD_BODY` when a name is none.
    pub(crate) fn from_wire(wire: &message::Message<'_>) -> Result<Self, ErrorCode> {
        let name = |text| UserName::new(text).map_err(|_| ErrorCode::BadBody);
        Ok(Self {
            conversation: wire.conversation,
            seq: wire.seq,
            time_ms: wire.time_ms,
            from: name(wire.from)?,
            to: name(wire.to)?,
            device: wire.device,
            client_seq: wire.client_seq,
            class: wire.class,
            kind: wire.kind,
            body: Bytes::copy_from_slice(wire.body),
            extra: Extra::from_wire(&wire.extra)?,
        })
    }
}

/// What the application has taken from the event queue since it was last asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Taken {
    pub events: usize,
    /// The highest message of each conversation.
    pub upto: BTreeMap<ConversationId, Seq>,
}

/// What a conversation needs from the server before it can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    Nothing,
    /// In the queue for one of [`FETCHES_MAX`] places.
    Queued,
    Asked,
    /// Again at this time.
    Later(Millis),
}

struct Stream {
    with: UserName,
    /// The last seq handed on; `None` until the server has said how far this device had acknowledged.
    handed: Option<Seq>,
    /// The highest seq known to exist.
    head: Seq,
    /// Ask for the row of the conversation, not for messages: where it begins is not known.
    row_wanted: bool,
    early: BTreeMap<Seq, Message>,
    repair: Repair,
    taken: Seq,
    acked: Seq,
}

impl Stream {
    fn behind(&self) -> bool {
        self.row_wanted || self.handed.is_none_or(|handed| handed < self.head)
    }

    fn idle(&self) -> bool {
        !self.behind() && self.handed == Some(self.acked) && self.repair == Repair::Nothing
    }
}

fn next(seq: Seq) -> Seq {
    Seq(seq.0.saturating_add(1))
}

fn previous(seq: Seq) -> Seq {
    Seq(seq.0.saturating_sub(1))
}

/// How far the SYNC is, or the walk through the conversation list, that begins a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    Done,
    Asked(ConversationId),
    Later(Millis, ConversationId),
    SyncAsked,
    SyncLater(Millis),
}

/// All conversations of this client.
pub(crate) struct Streams {
    me: UserName,
    pub(crate) events: Vec<Event>,
    events_max: usize,
    /// Events that the application has not taken yet.
    untaken: usize,
    missed: u64,
    /// False once the application has dropped its end: then nothing is followed and nothing acknowledged.
    receiving: bool,
    catch_up: CatchUp,
    by_id: BTreeMap<ConversationId, Stream>,
    early: usize,
    /// Could hand more on if the application took some.
    paused: BTreeSet<ConversationId>,
    queue: VecDeque<ConversationId>,
    asked: usize,
    later: BTreeSet<(Millis, ConversationId)>,
    listing: Listing,
    sync: Syncing,
    /// Conversations found behind at the beginning of the connection, and up to where; `None` when caught up.
    filling: Option<BTreeMap<ConversationId, Seq>>,
    filled: u64,
    dirty: BTreeSet<ConversationId>,
    ack_at: Option<Millis>,
    /// Transient deliveries to acknowledge.
    deliveries: Vec<u64>,
    recent_acks: VecDeque<(u32, ConversationId)>,
}

impl Streams {
    pub(crate) fn new(me: UserName, catch_up: CatchUp, events_max: usize) -> Self {
        Self {
            me,
            events: Vec::new(),
            events_max,
            untaken: 0,
            missed: 0,
            receiving: true,
            catch_up,
            by_id: BTreeMap::new(),
            early: 0,
            paused: BTreeSet::new(),
            queue: VecDeque::new(),
            asked: 0,
            later: BTreeSet::new(),
            listing: Listing::Done,
            sync: Syncing::default(),
            filling: None,
            filled: 0,
            dirty: BTreeSet::new(),
            ack_at: None,
            deliveries: Vec::new(),
            recent_acks: VecDeque::new(),
        }
    }

    // --- towards the application -------------------------------------------------------------------------------

    fn full(&self) -> bool {
        self.untaken >= self.events_max
    }

    /// Hands an event on, or counts it as missed. True when it was handed on.
    pub(crate) fn emit(&mut self, event: Event) -> bool {
        if !self.receiving {
            return false;
        }
        if self.full() {
            self.missed = self.missed.saturating_add(1);
            return false;
        }
        self.untaken += 1;
        self.events.push(event);
        true
    }

    /// The application has dropped its end. Only what it took before is still acknowledged.
    pub(crate) fn stop_receiving(&mut self) {
        self.disconnected();
        self.receiving = false;
        self.early = 0;
        self.paused.clear();
        self.by_id.retain(|id, _| self.dirty.contains(id));
        for stream in self.by_id.values_mut() {
            stream.early.clear();
        }
    }

    /// The application has taken events: acknowledge, and hand on what waited for room.
    pub(crate) fn taken(&mut self, now: Millis, taken: Taken) {
        self.untaken = self.untaken.saturating_sub(taken.events);
        for (id, seq) in taken.upto {
            let Some(stream) = self.by_id.get_mut(&id) else { continue };
            stream.taken = stream.taken.max(seq);
            let unacked = stream.taken.0.saturating_sub(stream.acked.0);
            if unacked > 0 {
                let at = if unacked >= ACK_MESSAGES_MAX { now } else { now + ACK_DELAY_MS };
                self.ack_at = Some(self.ack_at.map_or(at, |earlier| earlier.min(at)));
                self.dirty.insert(id);
            }
        }
        if self.missed > 0 && !self.full() {
            let count = std::mem::take(&mut self.missed);
            self.emit(Event::Missed { count });
        }
        while !self.full()
            && let Some(id) = self.paused.pop_first()
        {
            self.settle(id);
        }
        self.check_caught_up();
    }

    /// Hands on everything of a conversation that is next in order.
    fn drain(&mut self, id: ConversationId) {
        if !self.receiving {
            return;
        }
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        let Some(mut handed) = stream.handed else { return };
        while let Some((&seq, _)) = stream.early.first_key_value() {
            if seq > next(handed) {
                break;
            }
            if seq == next(handed) && seq > handed && self.untaken >= self.events_max {
                self.paused.insert(id);
                break;
            }
            let Some((_, message)) = stream.early.pop_first() else { break };
            self.early -= 1;
            if seq > handed {
                handed = seq;
                self.untaken += 1;
                self.events.push(Event::Message(message));
                if self.filling.as_ref().is_some_and(|filling| filling.get(&id).is_some_and(|&upto| seq <= upto)) {
                    self.filled += 1;
                }
            }
        }
        stream.handed = Some(handed);
        self.moved(id);
    }

    /// Drains, then asks for what is missing, if something is.
    fn settle(&mut self, id: ConversationId) {
        self.drain(id);
        let (full, syncing) = (self.full(), self.is_syncing());
        let Some(stream) = self.by_id.get_mut(&id).filter(|_| self.receiving) else { return };
        let next_is_here = stream.handed.is_some_and(|handed| stream.early.contains_key(&next(handed)));
        if !stream.behind() || next_is_here || stream.repair != Repair::Nothing {
            return;
        }
        if syncing && !stream.row_wanted {
            return;
        }
        if full && stream.handed.is_some() {
            self.paused.insert(id);
            return;
        }
        stream.repair = Repair::Queued;
        self.queue.push_back(id);
    }

    /// Moves over messages that can't be had, and says so.
    fn skip(&mut self, id: ConversationId, to: Seq, why: ErrorCode) {
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        let handed = stream.handed.unwrap_or(Seq::ZERO);
        if to <= handed {
            return;
        }
        stream.handed = Some(to);
        let event = Event::Skipped { conversation: id, with: stream.with.clone(), from: next(handed), to, why };
        self.emit(event);
        self.moved(id);
    }

    fn moved(&mut self, id: ConversationId) {
        let handed = self.by_id.get(&id).and_then(|stream| stream.handed);
        if let Some(filling) = &mut self.filling
            && filling.get(&id).is_some_and(|&upto| handed.is_some_and(|handed| handed >= upto))
        {
            filling.remove(&id);
            self.check_caught_up();
        }
    }

    fn check_caught_up(&mut self) {
        let complete = self.listing == Listing::Done && self.filling.as_ref().is_some_and(BTreeMap::is_empty);
        if complete && !self.full() {
            self.filling = None;
            let messages = std::mem::take(&mut self.filled);
            self.emit(Event::CaughtUp { messages });
        }
    }

    // --- from the server ---------------------------------------------------------------------------------------

    /// A message was pushed, or one of our own was accepted. `delivery` as on the wire.
    pub(crate) fn arrived(&mut self, message: Message, delivery: u64) {
        match message.class {
            Class::Transient => {
                if self.emit(Event::Message(message)) && delivery != 0 {
                    self.deliveries.push(delivery);
                }
            }
            Class::Durable => {
                if message.seq == Seq::ZERO || !self.receiving {
                    return;
                }
                let id = message.conversation;
                if self.follow(id, message.peer(&self.me).clone(), message.seq) {
                    self.raise_head(id, message.seq);
                    self.keep(id, message);
                    self.settle(id);
                } else {
                    self.missed = self.missed.saturating_add(1);
                }
            }
        }
    }

    fn raise_head(&mut self, id: ConversationId, head: Seq) {
        if let Some(stream) = self.by_id.get_mut(&id) {
            stream.head = stream.head.max(head);
        }
    }

    /// Begins to follow a conversation if it is new; `from` is the first seq heard of. False: no room.
    fn follow(&mut self, id: ConversationId, with: UserName, from: Seq) -> bool {
        if self.by_id.contains_key(&id) {
            return true;
        }
        let handed = match self.catch_up {
            CatchUp::All => (from <= Seq(1)).then_some(Seq::ZERO),
            CatchUp::Seen | CatchUp::None => Some(previous(from)),
        };
        self.begin(id, with, handed)
    }

    fn begin(&mut self, id: ConversationId, with: UserName, handed: Option<Seq>) -> bool {
        if self.by_id.len() >= STREAMS_MAX {
            self.by_id.retain(|_, stream| !stream.idle());
            if self.by_id.len() >= STREAMS_MAX {
                return false;
            }
        }
        let acked = handed.unwrap_or(Seq::ZERO);
        let stream = Stream {
            with,
            handed,
            head: acked,
            row_wanted: handed.is_none(),
            early: BTreeMap::new(),
            repair: Repair::Nothing,
            taken: acked,
            acked,
        };
        self.by_id.insert(id, stream);
        true
    }

    /// Puts a message where [`Self::drain`] finds it. What is old, there already or too much is dropped.
    fn keep(&mut self, id: ConversationId, message: Message) {
        let Some(stream) = self.by_id.get_mut(&id).filter(|_| self.receiving) else { return };
        let old = stream.handed.is_some_and(|handed| message.seq <= handed);
        // One that can be handed on at once needs no room, so a full buffer can't stop a conversation.
        let is_next = stream.handed.is_some_and(|handed| message.seq == next(handed));
        let no_room = self.early >= EARLY_MAX && !(is_next && self.untaken < self.events_max);
        if old || no_room || stream.early.contains_key(&message.seq) {
            return;
        }
        self.early += 1;
        stream.early.insert(message.seq, message);
        if is_next {
            self.drain(id);
        }
    }

    /// LAGGED: messages up to `to` were not pushed.
    pub(crate) fn lagged(&mut self, id: ConversationId, with: UserName, span: (Seq, Seq)) {
        let (from, to) = span;
        if !self.receiving {
            return;
        }
        if self.follow(id, with, from) {
            self.raise_head(id, to);
            self.settle(id);
        } else {
            self.missed = self.missed.saturating_add(to.0.saturating_sub(previous(from).0));
        }
    }

    /// The answer to a fetch of missing messages.
    pub(crate) fn fetched(&mut self, now: Millis, id: ConversationId, history: crate::pending::History) {
        let Some(before) = self.repaired(id) else { return };
        self.raise_head(id, history.head);
        self.skip(id, previous(history.first), ErrorCode::Truncated);
        for message in history.messages {
            if message.conversation == id && message.class == Class::Durable {
                self.keep(id, message);
            }
        }
        self.go_on(now, id, before);
    }

    /// A fetch or a row was refused.
    pub(crate) fn refused(&mut self, now: Millis, id: ConversationId, refusal: Refusal<'_>) {
        if self.repaired(id).is_none() {
            return;
        }
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        if refusal.code == ErrorCode::Truncated {
            stream.row_wanted = true;
            self.settle(id);
        } else if refusal.code.retryable() {
            self.again(id, now + refusal.pause_ms(0).max(REPAIR_PAUSE_MS));
        } else {
            stream.row_wanted = false;
            let to = stream.early.first_key_value().map_or(stream.head, |(&seq, _)| previous(seq));
            self.skip(id, to, refusal.code);
            self.settle(id);
        }
    }

    /// The answer to the question for one row; `None` when the server lists no such conversation.
    pub(crate) fn row(&mut self, now: Millis, id: ConversationId, row: Option<Conversation>) {
        let Some(before) = self.repaired(id) else { return };
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        stream.row_wanted = false;
        let first_early = stream.early.first_key_value().map(|(&seq, _)| previous(seq));
        let floor = row.as_ref().map_or(Seq::ZERO, |row| previous(row.first));
        let acked = row.as_ref().map(|row| row.acked).or(first_early).unwrap_or(stream.head);
        stream.head = stream.head.max(row.map_or(Seq::ZERO, |row| row.head));
        if stream.handed.is_none() {
            let begin = acked.max(floor);
            (stream.handed, stream.taken, stream.acked) = (Some(begin), begin, acked);
            self.settle(id);
        } else {
            self.skip(id, floor, ErrorCode::Truncated);
            self.go_on(now, id, before);
        }
    }

    /// A repair step is answered. The seq handed on last, or `None` if the conversation is not followed.
    fn repaired(&mut self, id: ConversationId) -> Option<Option<Seq>> {
        self.asked = self.asked.saturating_sub(1);
        let stream = self.by_id.get_mut(&id)?;
        stream.repair = Repair::Nothing;
        Some(stream.handed)
    }

    /// Settles, but waits a while if the last step brought nothing: the server may not have what it announced yet.
    fn go_on(&mut self, now: Millis, id: ConversationId, before: Option<Seq>) {
        self.drain(id);
        let full = self.full();
        let Some(stream) = self.by_id.get(&id) else { return };
        if stream.handed == before && stream.behind() && !full {
            self.again(id, now + REPAIR_PAUSE_MS);
        } else {
            self.settle(id);
        }
    }

    fn again(&mut self, id: ConversationId, at: Millis) {
        if let Some(stream) = self.by_id.get_mut(&id) {
            stream.repair = Repair::Later(at);
            self.later.insert((at, id));
        }
    }

    /// A page of the conversation list.
    pub(crate) fn page(&mut self, now: Millis, page: crate::pending::ConversationPage) {
        let Listing::Asked(cursor) = self.listing else { return };
        for row in page.conversations {
            self.listed(now, row);
        }
        // A server whose pages do not rise must not keep us turning them.
        self.listing = match page.next {
            Some(next) if next > cursor => Listing::Later(now, next),
            Some(_) | None => Listing::Done,
        };
        self.check_caught_up();
    }

    pub(crate) fn page_refused(&mut self, now: Millis, refusal: Refusal<'_>) {
        let Listing::Asked(cursor) = self.listing else { return };
        self.listing = if refusal.code.retryable() {
            Listing::Later(now.saturating_add(refusal.pause_ms(0).max(REPAIR_PAUSE_MS)), cursor)
        } else {
            Listing::Done
        };
        self.check_caught_up();
    }

    fn listed(&mut self, now: Millis, row: Conversation) {
        let id = row.conversation;
        let begin = row.acked.max(previous(row.first));
        if !self.by_id.contains_key(&id) {
            match self.catch_up {
                CatchUp::Seen | CatchUp::None => return,
                CatchUp::All => {}
            }
            if !self.begin(id, row.with, Some(begin)) {
                self.missed = self.missed.saturating_add(row.head.0.saturating_sub(begin.0));
                return;
            }
        }
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        if stream.handed.is_none() && stream.repair != Repair::Asked {
            (stream.handed, stream.taken, stream.acked) = (Some(begin), begin, row.acked);
            stream.row_wanted = false;
        }
        stream.head = stream.head.max(row.head);
        if row.acked < stream.taken {
            stream.acked = row.acked;
            self.dirty.insert(id);
            self.ack_at.get_or_insert(now);
        }
        if stream.behind()
            && let Some(filling) = &mut self.filling
        {
            filling.insert(id, stream.head);
        }
        self.settle(id);
    }

    // --- towards the server ------------------------------------------------------------------------------------

    /// Logged in: find out what was missed.
    pub(crate) fn connected(&mut self, now: Millis) {
        if !self.receiving {
            return;
        }
        self.filled = 0;
        self.filling = Some(BTreeMap::new());
        match self.catch_up {
            CatchUp::All => self.begin_sync(now),
            // SYNC would give what was missed in all others as well.
            CatchUp::Seen => self.listing = Listing::Later(now, ConversationId(0)),
            CatchUp::None => self.listing = Listing::Done,
        }
        self.settle_behind();
        self.check_caught_up();
    }

    /// The connection is gone, and with it every question and perhaps the last acknowledgements.
    pub(crate) fn disconnected(&mut self) {
        for stream in self.by_id.values_mut() {
            stream.repair = Repair::Nothing;
        }
        self.queue.clear();
        self.later.clear();
        self.asked = 0;
        self.listing = Listing::Done;
        self.filling = None;
        self.deliveries.clear();
        let refused = std::mem::take(&mut self.sync.unsure);
        for id in std::mem::take(&mut self.recent_acks).into_iter().map(|(_, id)| id).chain(refused) {
            self.doubt_ack(id);
        }
    }

    /// An ACK was refused.
    pub(crate) fn ack_refused(&mut self, now: Millis, request_id: u32, refusal: Refusal<'_>) {
        let Some(at) = self.recent_acks.iter().position(|(id, _)| *id == request_id) else { return };
        let Some((_, id)) = self.recent_acks.remove(at) else { return };
        if refusal.code.retryable() {
            self.doubt_ack(id);
            self.ack_at = Some(now + refusal.pause_ms(0));
        } else if self.is_syncing() {
            // On this connection the server has not given anything of it yet.
            self.sync.unsure.insert(id);
        }
    }

    fn doubt_ack(&mut self, id: ConversationId) {
        if let Some(stream) = self.by_id.get_mut(&id) {
            stream.acked = Seq::ZERO;
            self.dirty.insert(id);
            self.ack_at.get_or_insert(0);
        }
    }

    /// Writes questions and acknowledgements that are due.
    pub(crate) fn pump(&mut self, now: Millis, wire: &mut Wire) {
        self.pump_sync(now, wire);
        if let Listing::Later(at, cursor) = self.listing
            && at <= now
        {
            self.listing = Listing::Asked(cursor);
            wire.ask(now, Waiting::Page, &Request::Conversations { cursor, limit: limits::PAGE_ROWS_MAX });
        }
        while let Some(&(at, id)) = self.later.first() {
            if at > now {
                break;
            }
            self.later.pop_first();
            if let Some(stream) = self.by_id.get_mut(&id) {
                stream.repair = Repair::Nothing;
            }
            self.settle(id);
        }
        while self.asked < FETCHES_MAX
            && let Some(id) = self.queue.pop_front()
        {
            self.ask(now, id, wire);
        }
        for delivery in self.deliveries.drain(..) {
            wire.tell(now, &Request::Ack(Ack::Delivery(delivery)));
        }
        if self.ack_at.is_some_and(|at| at <= now) {
            self.flush_acks(now, wire);
        }
    }

    fn ask(&mut self, now: Millis, id: ConversationId, wire: &mut Wire) {
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        stream.repair = Repair::Nothing;
        if !stream.behind() {
            return;
        }
        match stream.handed {
            Some(after) if !stream.row_wanted => {
                let with = stream.with.as_str();
                let before = stream.early.first_key_value().map(|(&seq, _)| seq);
                let limit = limits::PAGE_ROWS_MAX;
                wire.ask(now, Waiting::Fetch(id), &Request::Fetch(Fetch { with, after, before, limit, newest: false }));
            }
            // The list is in order of id, so the first row above the id before this one is its own.
            Some(_) | None => {
                let cursor = ConversationId(id.0.saturating_sub(1));
                wire.ask(now, Waiting::Row(id), &Request::Conversations { cursor, limit: 1 });
            }
        }
        stream.repair = Repair::Asked;
        self.asked += 1;
    }

    /// Acknowledges everything that was taken.
    pub(crate) fn flush_acks(&mut self, now: Millis, wire: &mut Wire) {
        self.ack_at = None;
        for conversation in std::mem::take(&mut self.dirty) {
            let Some(stream) = self.by_id.get_mut(&conversation) else { continue };
            if stream.taken <= stream.acked {
                continue;
            }
            stream.acked = stream.taken;
            let request_id = wire.tell(now, &Request::Ack(Ack::Upto { conversation, seq: stream.taken }));
            if self.recent_acks.len() >= RECENT_ACKS_MAX {
                self.recent_acks.pop_front();
            }
            self.recent_acks.push_back((request_id, conversation));
        }
    }

    /// When [`Self::pump`] next has something to do.
    pub(crate) fn next_wake(&self) -> Option<Millis> {
        let listing = match self.listing {
            Listing::Later(at, _) => Some(at),
            // Taken events wake it.
            Listing::SyncLater(_) if self.full() => None,
            Listing::SyncLater(at) => Some(at),
            Listing::Done | Listing::Asked(_) | Listing::SyncAsked => None,
        };
        [listing, self.later.first().map(|(at, _)| *at), self.ack_at].into_iter().flatten().min()
    }

    #[cfg(test)]
    pub(crate) fn check_invariants(&self) {
        let early: usize = self.by_id.values().map(|stream| stream.early.len()).sum();
        assert_eq!(early, self.early);
        assert!(self.untaken <= self.events_max && self.asked <= FETCHES_MAX);
        for stream in self.by_id.values() {
            assert!(stream.taken <= stream.handed.unwrap_or(Seq::ZERO).max(stream.taken));
            assert!(stream.early.keys().all(|&seq| stream.handed.is_none_or(|handed| seq > handed)));
        }
    }
}
