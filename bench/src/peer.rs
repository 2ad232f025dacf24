//! One simulated client: replies in, request bytes out. Pure: no socket, no clock, no randomness.
//!
//! Owned by one generator thread, which lends it the [`Desk`] of that thread for each call. Invariants: `pending`
//! holds the messages from `oldest` on without a gap, its front is unanswered; a retry has the same client_seq and
//! body as the first try; a client never gets so far ahead of its oldest unanswered send that the server could have
//! forgotten it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, Frame};
use ringline_schema::ids::{DeviceId, Seq};
use ringline_schema::message::{
    Ack, BodyKind, ChatReply, Class, Credential, DeviceKind, Fetch, Login, LoginOk, Mentions, Message, Reply, Request,
    Secret, Send, SendAck,
};

use crate::check::{Arrival, Inbox, Ledger, NUMBERS_MAX};
use crate::intervals::Kind;
use crate::plan::{Pace, Plan, Timeline};
use crate::stamp::{NotOurs, Stamp};
use crate::tally::{self, Incident, Tally};

/// Transient sends of one client that may be unanswered; the server sets no limit, so the generator does.
const TRANSIENT_IN_FLIGHT_MAX: u32 = 1024;
/// A retry waits at least this long, whatever the server asks.
const RETRY_MS_MIN: u32 = 1;
/// A retry waits at most this long, whatever the server asks.
const RETRY_MS_MAX: u32 = 10_000;
/// Between two cursor acknowledgements of one conversation.
const CURSOR_INTERVAL_NS: u64 = 1_000_000_000;
/// Gaps that one client keeps for fetching.
const GAPS_MAX: usize = 256;
const NS_PER_MS: u64 = 1_000_000;

/// Request ids with this bit are not sends; a send has its number + 1.
const OTHER: u32 = 1 << 31;
const LOGIN_ID: u32 = OTHER | 1;
const PING_ID: u32 = OTHER | 2;
const FETCH_ID: u32 = OTHER | 3;
const ACK_ID: u32 = OTHER | 4;

const _: () = assert!(NUMBERS_MAX < OTHER);

/// What a thread keeps for all its clients. Buffers are reused from call to call.
pub struct Desk {
    encoder: Encoder,
    body: Vec<u8>,
    /// What the client at hand has to write; the caller empties it.
    pub out: Vec<u8>,
    pub tally: Tally,
    pub ledger: Ledger,
    pub alarms: BinaryHeap<Reverse<Alarm>>,
}

impl Desk {
    /// A desk for a run by this plan.
    pub fn for_plan(plan: &Plan) -> Self {
        let mut desk = Self::new(plan.clients());
        desk.tally.intervals.set_length(plan.interval_ns);
        desk
    }

    /// A desk for a run of `clients` clients in all, without an interval log.
    pub fn new(clients: u32) -> Self {
        Self {
            encoder: Encoder::new(),
            body: Vec::new(),
            out: Vec::new(),
            tally: Tally::default(),
            ledger: Ledger::new(clients),
            alarms: BinaryHeap::new(),
        }
    }
}

/// Something a client has to do again later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alarm {
    pub due_ns: u64,
    /// Place of the client in its thread.
    pub slot: u32,
    pub job: Job,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Job {
    Login,
    /// The message with this number.
    Send(u32),
    Fetch,
}

/// What a call to a [`Peer`] may look at and write to.
pub struct Turn<'a> {
    pub plan: &'a Plan,
    pub timeline: Timeline,
    pub now_ns: u64,
    pub desk: &'a mut Desk,
}

impl Turn<'_> {
    /// How late the generator is with a message of an open loop; of a closed one nothing is due.
    fn note_lag(&mut self, intended_ns: u64) {
        if matches!(self.plan.pace, Pace::Open { .. }) && self.timeline.measured(intended_ns) {
            tally::record(&mut self.desk.tally.lag_us, intended_ns, self.now_ns);
        }
    }
}

/// What became of a frame, as far as the connection is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Fine,
    LoggedIn {
        ping_interval_ms: u32,
    },
    /// The login will be tried again by an alarm.
    LoginDelayed,
    LoginRefused {
        code: ErrorCode,
        detail: String,
    },
    /// The plan wants more sends in flight than this server allows.
    WindowTooLarge {
        sends_in_flight_max: u32,
    },
    /// The body does not decode: the connection is of no more use.
    Unreadable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Offline,
    LoggingIn,
    Ready,
    Gone,
}

/// Where a send stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Sent,
    /// Waits for its alarm.
    Refused,
    Resent,
    Answered,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    intended_ns: u64,
    progress: Progress,
}

/// Deliveries that the server dropped: `after` < seq <= `to`.
#[derive(Clone, Debug)]
struct Gap {
    with: String,
    after: Seq,
    to: Seq,
}

/// See the file's head.
pub struct Peer {
    index: u32,
    slot: u32,
    state: State,
    sends_in_flight_max: u32,
    ping_after_ns: u64,
    pending: VecDeque<Pending>,
    oldest: u32,
    unanswered: u32,
    /// Messages below this have had their turn: [`Peer::due`].
    turns: u32,
    inbox: Inbox,
    gaps: VecDeque<Gap>,
    last_sent_ns: u64,
    last_cursors_ns: u64,
}

impl Peer {
    /// Client `index` of the plan, at place `slot` of its thread.
    pub fn new(index: u32, slot: u32) -> Self {
        Self {
            index,
            slot,
            state: State::Offline,
            sends_in_flight_max: 1,
            ping_after_ns: u64::MAX,
            pending: VecDeque::new(),
            oldest: 0,
            unanswered: 0,
            turns: 0,
            inbox: Inbox::default(),
            gaps: VecDeque::new(),
            last_sent_ns: 0,
            last_cursors_ns: 0,
        }
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    pub fn ready(&self) -> bool {
        self.state == State::Ready
    }

    /// The number of the next new message.
    pub fn next_number(&self) -> u32 {
        // Both are below NUMBERS_MAX, which is far from overflow.
        self.oldest + self.pending.len() as u32
    }

    /// Asks to log in with a token.
    pub fn login(&mut self, token: &str, turn: &mut Turn<'_>) {
        self.state = State::LoggingIn;
        let login = Login {
            user: turn.plan.name(self.index),
            credential: Credential::Token(Secret(token)),
            device: DeviceId(u64::from(self.index) + 1),
            device_kind: DeviceKind::Bot,
            agent: concat!("ringline-bench/", env!("CARGO_PKG_VERSION")),
        };
        self.request(LOGIN_ID, &Request::Login(login), turn);
    }

    /// The connection has ended. Returns how many sends will never be answered.
    pub fn gone(&mut self) -> u32 {
        self.state = State::Gone;
        std::mem::take(&mut self.unanswered)
    }

    /// Takes one frame of the server. Afterwards call [`Self::pump`], once for a batch of frames.
    pub fn on_frame(&mut self, frame: &Frame<'_>, turn: &mut Turn<'_>) -> Outcome {
        let id = frame.header.request_id;
        match decode_reply(&frame.header, frame.body) {
            Ok(reply) => self.on_reply(id, &reply, turn),
            // A push of a newer server: it may be passed over.
            Err(ErrorCode::UnknownCommand) => {
                turn.desk.tally.count(Incident::UnknownCommand);
                Outcome::Fine
            }
            Err(_) => Outcome::Unreadable,
        }
    }

    fn on_reply(&mut self, id: u32, reply: &Reply<'_>, turn: &mut Turn<'_>) -> Outcome {
        match reply {
            Reply::SendAck(ack) => self.on_send_ack(id, ack, turn),
            Reply::Deliver(message) => self.on_deliver(message, turn),
            Reply::Failure { code, retry_after_ms, detail } => {
                return self.on_failure(id, *code, (*retry_after_ms, detail), turn);
            }
            Reply::LoginOk(ok) => return self.on_login_ok(ok, turn),
            Reply::FetchOk { messages, .. } => self.on_fetched(messages, turn),
            Reply::Lagged { with, from, to, .. } => self.on_lagged(with, (*from, *to), turn),
            Reply::Kicked { .. } => turn.desk.tally.count(Incident::Kicked),
            Reply::Goaway { .. } => turn.desk.tally.count(Incident::Goaway),
            Reply::Pong { .. } | Reply::Chat(ChatReply::ReceiptUpto { .. }) => {}
            Reply::RegisterOk { .. }
            | Reply::LogoutOk
            | Reply::RouteOk { .. }
            | Reply::Redirect { .. }
            | Reply::OnlineOk { .. }
            | Reply::ConversationsOk { .. }
            | Reply::Receipt(_)
            | Reply::Group(_)
            | Reply::Chat(_) => turn.desk.tally.count(Incident::UnexpectedAnswer),
        }
        Outcome::Fine
    }

    fn on_login_ok(&mut self, ok: &LoginOk<'_>, turn: &mut Turn<'_>) -> Outcome {
        if self.state != State::LoggingIn {
            turn.desk.tally.count(Incident::UnexpectedAnswer);
            return Outcome::Fine;
        }
        let sends_in_flight_max = match turn.plan.class {
            Class::Durable => ok.sends_in_flight_max.max(1),
            Class::Transient => TRANSIENT_IN_FLIGHT_MAX,
        };
        if let Pace::Closed { window } = turn.plan.pace
            && window > sends_in_flight_max
        {
            return Outcome::WindowTooLarge { sends_in_flight_max };
        }
        self.state = State::Ready;
        self.sends_in_flight_max = sends_in_flight_max;
        // A little before the interval is over, because housekeeping comes round only now and then.
        self.ping_after_ns = u64::from(ok.ping_interval_ms) * NS_PER_MS / 4 * 3;
        Outcome::LoggedIn { ping_interval_ms: ok.ping_interval_ms }
    }

    fn on_failure(&mut self, id: u32, code: ErrorCode, more: (u32, &str), turn: &mut Turn<'_>) -> Outcome {
        let (retry_after_ms, detail) = more;
        turn.desk.tally.count(Incident::Refused(code));
        let again = matches!(code, ErrorCode::Busy | ErrorCode::RateLimited);
        let due_ns = after_ms(turn.now_ns, retry_after_ms);
        let slot = self.slot;
        let alarm = |job, turn: &mut Turn<'_>| turn.desk.alarms.push(Reverse(Alarm { due_ns, slot, job }));
        if self.state == State::LoggingIn {
            if again {
                alarm(Job::Login, turn);
                return Outcome::LoginDelayed;
            }
            return Outcome::LoginRefused { code, detail: detail.to_owned() };
        }
        if id == FETCH_ID {
            if again {
                alarm(Job::Fetch, turn);
            } else {
                self.gaps.pop_front();
                self.fetch(turn);
            }
        } else if id & OTHER == 0 && id != 0 {
            let number = id - 1;
            let Some(pending) = self.pending_mut(number) else {
                if !turn.plan.no_reply {
                    turn.desk.tally.count(Incident::UnexpectedAnswer);
                }
                return Outcome::Fine;
            };
            if again {
                pending.progress = Progress::Refused;
                alarm(Job::Send(number), turn);
                turn.desk.ledger.retried(self.index, number);
            } else {
                pending.progress = Progress::Answered;
                self.slot_freed(turn);
            }
        }
        Outcome::Fine
    }

    /// The send with this number, if it waits for an answer.
    fn pending_mut(&mut self, number: u32) -> Option<&mut Pending> {
        let at = number.checked_sub(self.oldest)? as usize;
        let waits = |pending: &&mut Pending| matches!(pending.progress, Progress::Sent | Progress::Resent);
        self.pending.get_mut(at).filter(waits)
    }

    fn slot_freed(&mut self, turn: &mut Turn<'_>) {
        self.unanswered = self.unanswered.saturating_sub(1);
        turn.desk.tally.unanswered = turn.desk.tally.unanswered.saturating_sub(1);
        while self.pending.front().is_some_and(|pending| pending.progress == Progress::Answered) {
            self.pending.pop_front();
            self.oldest += 1;
        }
    }

    fn on_send_ack(&mut self, id: u32, ack: &SendAck, turn: &mut Turn<'_>) {
        let number = id.wrapping_sub(1);
        let Some(pending) = self.pending_mut(number) else {
            turn.desk.tally.count(Incident::UnexpectedAnswer);
            return;
        };
        let (intended_ns, first_try) = (pending.intended_ns, pending.progress == Progress::Sent);
        pending.progress = Progress::Answered;
        self.slot_freed(turn);
        if ack.dup && first_try {
            turn.desk.tally.count(Incident::DupWithoutRetry);
        }
        turn.desk.ledger.accepted(self.index, number);
        let tally = &mut turn.desk.tally;
        tally.ever_accepted += 1;
        tally.accepted += u64::from(turn.timeline.measured(turn.now_ns));
        if turn.timeline.measured(intended_ns) {
            tally::record(&mut tally.ack_us, intended_ns, turn.now_ns);
            let at_ns = turn.timeline.since_measure_from(turn.now_ns);
            tally.intervals.record((Kind::Ack, at_ns), intended_ns, turn.now_ns);
        }
    }

    /// The stamp of a message of this run that is meant for this client; anything else is counted.
    fn judge(&self, message: &Message<'_>, turn: &mut Turn<'_>) -> Option<Stamp> {
        let ledger = &mut turn.desk.ledger;
        let stamp = match Stamp::read(message.body, turn.plan.run) {
            Ok(stamp) => stamp,
            Err(NotOurs::OtherRun) => {
                ledger.other_run();
                return None;
            }
            Err(NotOurs::Corrupt) => {
                ledger.corrupt();
                return None;
            }
        };
        let target = turn.plan.target(stamp.sender, stamp.number);
        let named_right = message.from == turn.plan.name(stamp.sender) && message.to == turn.plan.name(target);
        if named_right && target == self.index {
            return Some(stamp);
        }
        if named_right && stamp.sender == self.index {
            ledger.echoed();
        } else {
            ledger.misdelivered();
        }
        None
    }

    fn on_deliver(&mut self, message: &Message<'_>, turn: &mut Turn<'_>) {
        let Some(stamp) = self.judge(message, turn) else { return };
        let arrival = Arrival {
            sender: stamp.sender,
            number: stamp.number,
            conversation: message.conversation,
            seq: message.seq,
        };
        if self.inbox.receive(arrival, &mut turn.desk.ledger) {
            delivered(&stamp, self.index, turn);
        }
    }

    fn on_lagged(&mut self, with: &str, (from, to): (Seq, Seq), turn: &mut Turn<'_>) {
        turn.desk.tally.count(Incident::Lagged);
        if self.gaps.len() >= GAPS_MAX {
            turn.desk.tally.count(Incident::GapForgotten);
            return;
        }
        self.gaps.push_back(Gap { with: with.to_owned(), after: Seq(from.0.saturating_sub(1)), to });
        if self.gaps.len() == 1 {
            self.fetch(turn);
        }
    }

    /// Asks for the next page of the first gap, if there is one.
    fn fetch(&mut self, turn: &mut Turn<'_>) {
        let Some(gap) = self.gaps.pop_front() else { return };
        let before = Some(Seq(gap.to.0.saturating_add(1)));
        let page = Fetch { with: &gap.with, after: gap.after, before, limit: 0, newest: false };
        self.request(FETCH_ID, &Request::Fetch(page), turn);
        self.gaps.push_front(gap);
    }

    fn on_fetched(&mut self, messages: &[Message<'_>], turn: &mut Turn<'_>) {
        for message in messages {
            if let Some(stamp) = self.judge(message, turn)
                && turn.desk.ledger.fetched(stamp.sender, stamp.number)
            {
                turn.desk.tally.fetched += 1;
                delivered(&stamp, self.index, turn);
            }
        }
        let Some(gap) = self.gaps.front_mut() else {
            turn.desk.tally.count(Incident::UnexpectedAnswer);
            return;
        };
        match messages.last() {
            // A page always moves on, so that a server that repeats itself cannot hold the client here.
            Some(last) if last.seq > gap.after && last.seq < gap.to => gap.after = last.seq,
            Some(_) | None => drop(self.gaps.pop_front()),
        }
        self.fetch(turn);
    }

    /// Sends all that the pace allows now.
    pub fn pump(&mut self, turn: &mut Turn<'_>) {
        if self.state != State::Ready {
            return;
        }
        while let Some(intended_ns) = self.next_send(turn) {
            let number = self.next_number();
            self.pending.push_back(Pending { intended_ns, progress: Progress::Sent });
            self.unanswered += 1;
            let tally = &mut turn.desk.tally;
            tally.unanswered += 1;
            tally.ever_sent += 1;
            tally.sent += u64::from(turn.timeline.measured(turn.now_ns));
            if number >= self.turns {
                turn.note_lag(intended_ns);
            }
            self.send(number, intended_ns, turn);
            if turn.plan.no_reply {
                self.taken_for_accepted(number, turn);
            }
        }
    }

    /// No answer will come, unless it is refused: then it counts as lost as well, because nobody sends it again.
    fn taken_for_accepted(&mut self, number: u32, turn: &mut Turn<'_>) {
        if let Some(pending) = self.pending.back_mut() {
            pending.progress = Progress::Answered;
        }
        self.slot_freed(turn);
        turn.desk.ledger.accepted(self.index, number);
        turn.desk.tally.ever_accepted += 1;
        turn.desk.tally.accepted += u64::from(turn.timeline.measured(turn.now_ns));
    }

    /// Open loop: the turn of message `number` has come. It goes now, unless it went as soon as it was due, while the
    /// client read answers, or has to wait for answers.
    ///
    /// The generator's own lag counts up to the earlier of its turn and its sending: what a message waits for answers is
    /// the server's.
    pub fn due(&mut self, number: u32, intended_ns: u64, turn: &mut Turn<'_>) {
        self.pump(turn);
        if self.next_number() <= number {
            turn.note_lag(intended_ns);
        }
        self.turns = number.saturating_add(1);
    }

    /// The intended time of the next message, if it may go now.
    ///
    /// The distance to the oldest unanswered send is bounded too, not only their count: the server's duplicate filter
    /// remembers so many, and a retry below it would be refused as stale.
    fn next_send(&self, turn: &Turn<'_>) -> Option<u64> {
        if turn.plan.reads_slowly(self.index) {
            return None;
        }
        let room = self.pending.len() < self.sends_in_flight_max as usize && self.next_number() < NUMBERS_MAX;
        if !room {
            return None;
        }
        match turn.plan.pace {
            Pace::Closed { window } => {
                (self.unanswered < window && turn.timeline.sends_at(turn.now_ns)).then_some(turn.now_ns)
            }
            Pace::Open { .. } => turn
                .plan
                .intended_ns(turn.timeline.start_ns, self.index, self.next_number())
                .filter(|&intended_ns| turn.timeline.sends_due(intended_ns, turn.now_ns)),
        }
    }

    /// Sends a refused message again, the same as before.
    pub fn send_again(&mut self, number: u32, turn: &mut Turn<'_>) {
        let at = number.checked_sub(self.oldest).map(|at| at as usize);
        let Some(pending) = at.and_then(|at| self.pending.get_mut(at)) else { return };
        if self.state == State::Ready && pending.progress == Progress::Refused {
            pending.progress = Progress::Resent;
            let intended_ns = pending.intended_ns;
            self.send(number, intended_ns, turn);
        }
    }

    /// Asks again for what a refused FETCH had asked.
    pub fn fetch_again(&mut self, turn: &mut Turn<'_>) {
        if self.state == State::Ready {
            self.fetch(turn);
        }
    }

    fn send(&mut self, number: u32, intended_ns: u64, turn: &mut Turn<'_>) {
        self.last_sent_ns = turn.now_ns;
        let (plan, desk) = (turn.plan, &mut *turn.desk);
        let stamp = Stamp { run: plan.run, sender: self.index, number, intended_ns };
        stamp.write(plan.payload_bytes, &mut desk.body);
        let send = Send {
            to: plan.name(plan.target(self.index, number)),
            class: plan.class,
            kind: BodyKind::Custom,
            client_seq: plan.client_seq_base + u64::from(number),
            ack_timeout_ms: None,
            body: &desk.body,
            mentions: Mentions::default(),
        };
        let flags = if plan.no_reply { Flags::NO_REPLY } else { Flags::default() };
        let how = (Codec::FlatBuffers, flags);
        desk.encoder.request_flagged(how, number + 1, &Request::Send(send), &mut desk.out);
    }

    fn request(&mut self, id: u32, request: &Request<'_>, turn: &mut Turn<'_>) {
        self.last_sent_ns = turn.now_ns;
        turn.desk.encoder.request(Codec::FlatBuffers, id, request, &mut turn.desk.out);
    }

    /// What is not urgent: cursor acknowledgements, and a ping after long silence. Call it a few times a second.
    pub fn housekeep(&mut self, turn: &mut Turn<'_>) {
        if self.state != State::Ready {
            return;
        }
        let now_ns = turn.now_ns;
        let cursors_due = now_ns.saturating_sub(self.last_cursors_ns) >= CURSOR_INTERVAL_NS;
        if turn.plan.ack_cursors && cursors_due && self.inbox.has_unacknowledged() {
            let Desk { encoder, out, .. } = &mut *turn.desk;
            self.inbox.take_unacknowledged(|conversation, seq| {
                let ack = Request::Ack(Ack::Upto { conversation, seq });
                encoder.request(Codec::FlatBuffers, ACK_ID, &ack, out);
            });
            (self.last_cursors_ns, self.last_sent_ns) = (now_ns, now_ns);
        }
        if now_ns.saturating_sub(self.last_sent_ns) >= self.ping_after_ns {
            turn.desk.tally.pings += 1;
            self.request(PING_ID, &Request::Ping { stamp: now_ns }, turn);
        }
    }

    /// How many sends wait for another try.
    pub fn refused(&self) -> u64 {
        if self.state == State::Gone {
            return 0;
        }
        self.pending.iter().filter(|pending| pending.progress == Progress::Refused).count() as u64
    }

    /// Open loop: how many messages were due before the end and have not been sent.
    pub fn unsent(&self, plan: &Plan, timeline: &Timeline) -> u64 {
        if plan.reads_slowly(self.index) {
            return 0;
        }
        let due = |number: u32| {
            let intended_ns = plan.intended_ns(timeline.start_ns, self.index, number);
            intended_ns.is_some_and(|intended_ns| intended_ns < timeline.measure_to_ns)
        };
        // Intended times rise with the number: find the first that is not due.
        let (mut low, mut high) = (self.next_number(), NUMBERS_MAX);
        while low < high {
            let middle = low + (high - low) / 2;
            if due(middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        u64::from(low - self.next_number())
    }
}

/// When a retry is due that the server wants this much later.
fn after_ms(now_ns: u64, retry_after_ms: u32) -> u64 {
    now_ns.saturating_add(u64::from(retry_after_ms.clamp(RETRY_MS_MIN, RETRY_MS_MAX)) * NS_PER_MS)
}

/// Counts a message that a receiver sees for the first time.
fn delivered(stamp: &Stamp, receiver: u32, turn: &mut Turn<'_>) {
    let (tally, now_ns) = (&mut turn.desk.tally, turn.now_ns);
    tally.ever_delivered += 1;
    tally.delivered += u64::from(turn.timeline.measured(now_ns));
    if !turn.timeline.measured(stamp.intended_ns) {
        return;
    }
    // Who reads slowly on purpose waits on purpose: the others' latency is the figure.
    if turn.plan.reads_slowly(receiver) {
        tally::record(&mut tally.slow_deliver_us, stamp.intended_ns, now_ns);
    } else {
        tally::record(&mut tally.deliver_us, stamp.intended_ns, now_ns);
        let at_ns = turn.timeline.since_measure_from(now_ns);
        tally.intervals.record((Kind::Deliver, at_ns), stamp.intended_ns, now_ns);
    }
}

#[cfg(test)]
#[path = "peer_tests.rs"]
mod tests;
