//! One client's side of the protocol: login, heartbeat, answers to their askers, pushes to the streams.
//!
//! Pure, as `pending` and `streams`, which it drives; owned by the client's one task, which feeds it bytes, commands and
//! the time, writes what [`Session::take_output`] gives, and ends the connection when a function returns a [`Cut`].

use std::collections::BTreeSet;
use std::time::Duration;

use ringline_schema::codec;
use ringline_schema::commands::Command;
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Frame, FrameDecoder};
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{
    self, BodyKind, ChatReply, Credential, DeviceKind, GoawayReason, GroupReply, KickReason, Login, LoginOk, Receipt,
    Reply, Request,
};

use crate::account::{self, ReadUpto};
use crate::group::{GroupAnswer, GroupChanged};
use crate::pending::{
    Accepted, Answer, CallError, Calls, Conversation, ConversationPage, Done, History, Millis, OnlinePage, OnlineUser,
    Outgoing, Query, Refusal, SendError, Sends, Waiting, Wire,
};
use crate::social::{self, Notice, Presence, Signal, SignalOut, Signals, SocialAnswer, SocialQuery};
use crate::streams::{CatchUp, Message, Streams, Taken};

/// A connection on which any request stays unanswered for this long is given up.
const ANSWER_TIMEOUT_MS: Millis = 30_000;
/// A PING that is not followed by any byte within this time (or one ping interval, if that is shorter) shows that the
/// connection is dead.
const PONG_TIMEOUT_MS: Millis = 10_000;
/// When something was asked, and for so long not a byte has come, a PING asks whether anybody is there: a process that hangs
/// keeps its connections.
const UNANSWERED_MS: Millis = 5_000;
/// Bounds of the ping interval that a server may ask for.
const PING_INTERVAL_MS_MIN: u32 = 50;
const PING_INTERVAL_MS_MAX: u32 = 3_600_000;
/// After GOAWAY, how long answers to sends in flight are waited for.
const GOAWAY_LINGER_MS: Millis = 2_000;
/// A server's wish for when to come back is shortened to this.
const COME_BACK_MS_MAX: u32 = 600_000;

/// What the application is told, in order.
#[derive(Clone, Debug)]
pub enum Event {
    /// Logged in, for the first time or again.
    Connected {
        /// The server's number for this session, as its log has it.
        session: u64,
    },
    /// All that was missed before this connection has been handed on.
    CaughtUp {
        /// How many messages that were.
        messages: u64,
    },
    /// A message of any device of either side, this one included: compare [`Message::device`].
    Message(Message),
    /// What became of a message with a delivery timeout; [`Sending::delivered`](crate::Sending::delivered) says it too.
    Receipt(Receipt),
    /// Somebody is typing, or an application signals.
    Signal(Signal),
    /// A signal of this client did not get through: `NOT_ONLINE`, `BLOCKED`, `NOT_ACCEPTED` or `BUSY`.
    SignalRefused { to: UserName, code: ErrorCode },
    /// Users that this client watches have changed.
    Presence(Vec<Presence>),
    /// An administrator tells everyone.
    Notice(Notice),
    /// Somebody has received or read more of a conversation; at most once a second a conversation.
    ReadUpto(ReadUpto),
    /// Messages of a conversation that can't be had, so its stream goes on after them.
    Skipped {
        conversation: ConversationId,
        with: UserName,
        from: Seq,
        to: Seq,
        /// `TRUNCATED`: older than what the server keeps.
        why: ErrorCode,
    },
    /// Another device of this user has deleted a message for the user alone.
    Hidden { conversation: ConversationId, seq: Seq },
    /// A group changed for this user, or somebody asks to join one.
    GroupChanged(Box<GroupChanged>),
    /// The application took events too slowly, and so many were dropped: transient messages, receipts and news of the
    /// connection. Durable messages are not among them, they wait.
    Missed { count: u64 },
    /// The server is about to leave; the client reconnects by itself.
    Goaway { reason: GoawayReason, reconnect_after: Duration },
    /// The connection is lost and will be tried again after `delay`. Sends are kept meanwhile.
    Reconnecting {
        /// From 1; back to 1 after a connection that lasted.
        attempt: u32,
        delay: Duration,
        why: LinkError,
    },
    /// The end; nothing follows.
    Closed { why: CloseReason },
}

/// Why a connection was lost. Another may be tried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("{0}")]
    Io(String),
    #[error("no connection within {} s", .0.as_secs())]
    ConnectTimeout(Duration),
    #[error("the token provider failed: {0}")]
    Token(String),
    #[error("the server closed the connection")]
    ServerClosed,
    #[error("the server does not answer")]
    NoAnswer,
    #[error("the server sent what this client can't read: {0}")]
    Protocol(ErrorCode),
    #[error("{0}")]
    Refused(ErrorCode),
    /// Followed by itself; seen only when it leads in circles.
    #[error("this user lives at {address}")]
    Redirected { address: String },
    #[error("the server is going away")]
    Goaway {
        /// The server's wish.
        reconnect_after: Duration,
        /// Where this user is served from now on; `None`: at any of the addresses that were given.
        address: Option<String>,
    },
}

/// Why a client ended for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    #[error("closed")]
    ByClient,
    /// The server told this device to go.
    #[error("{}", told_to_go(*reason))]
    Kicked { reason: KickReason, detail: String },
    #[error("{}", ErrorCode::AuthFailed.text())]
    AuthFailed,
    /// The login was refused in a way that trying again can't mend.
    #[error("login refused: {code}")]
    Refused { code: ErrorCode, detail: String },
}

fn told_to_go(reason: KickReason) -> &'static str {
    match reason {
        KickReason::Replaced | KickReason::DevicePolicy => "another login took this session's place",
        KickReason::LoggedOut => "another device of this user logged this one out",
        KickReason::UserDeleted => "this user was deleted",
    }
}

/// The connection must end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Another connection may be tried.
    Lost(LinkError),
    End(CloseReason),
}

impl Cut {
    fn protocol(code: ErrorCode) -> Self {
        Self::Lost(LinkError::Protocol(code))
    }
}

/// What a client keeps from connection to connection.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub user: UserName,
    pub device: DeviceId,
    pub device_kind: DeviceKind,
    pub agent: String,
    pub catch_up: CatchUp,
    pub sends_queued_max: usize,
    pub events_queued_max: usize,
    /// Unix microseconds at start: above every client_seq of this device's earlier runs.
    pub first_client_seq: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Offline,
    LoggingIn,
    Online,
    /// GOAWAY was heard: no new sends on this connection, and it ends at the latest then.
    Leaving {
        until: Millis,
        reconnect_after: Duration,
        address: Option<String>,
    },
    /// LOGOUT is written.
    LoggingOut,
}

/// See the module.
pub(crate) struct Session {
    config: Config,
    state: State,
    wire: Wire,
    decoder: FrameDecoder,
    sends: Sends,
    calls: Calls,
    streams: Streams,
    signals: Signals,
    /// Watched on this connection, or to be watched on the next.
    watched: BTreeSet<UserName>,
    /// Calls that watch again.
    rewatching: BTreeSet<u64>,
    ping_interval_ms: Millis,
    heard_at: Millis,
    /// A PING without its PONG yet.
    pinged_at: Option<Millis>,
    /// The application closes: at this time whatever is still open is given up.
    closing: Option<Millis>,
}

impl Session {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            state: State::Offline,
            wire: Wire::default(),
            decoder: FrameDecoder::new(),
            sends: Sends::new(config.first_client_seq, config.sends_queued_max),
            calls: Calls::default(),
            signals: Signals::default(),
            watched: BTreeSet::new(),
            rewatching: BTreeSet::new(),
            streams: Streams::new(config.user.clone(), config.catch_up, config.events_queued_max),
            ping_interval_ms: PONG_TIMEOUT_MS,
            heard_at: 0,
            pinged_at: None,
            closing: None,
            config,
        }
    }

    // --- the application's side --------------------------------------------------------------------------------

    pub(crate) fn send(&mut self, now: Millis, outgoing: Outgoing) -> Result<u64, SendError> {
        self.sends.push(now, outgoing)
    }

    pub(crate) fn call(&mut self, now: Millis, query: Query, timeout: Duration) -> Result<u64, CallError> {
        let number = self.calls.push(now, query, timeout)?;
        // From now on, not from the answer: on another connection this may go out before what is watched again by itself.
        if let Some(Query::Social(SocialQuery::Unwatch(away))) = self.calls.query(number) {
            away.iter().for_each(|user| _ = self.watched.remove(user));
        }
        self.calls.overrule(number);
        Ok(number)
    }

    /// Without a connection it is dropped: what somebody did then is no news.
    pub(crate) fn signal(&mut self, now: Millis, signal: &SignalOut) {
        if self.state == State::Online {
            self.signals.send(now, signal, &mut self.wire);
        }
    }

    pub(crate) fn taken(&mut self, now: Millis, taken: Taken) {
        self.streams.taken(now, taken);
    }

    pub(crate) fn stop_receiving(&mut self) {
        self.streams.stop_receiving();
    }

    /// Finish what is open, but no longer than until `deadline`, then log out.
    pub(crate) fn close(&mut self, deadline: Millis) {
        self.closing = Some(self.closing.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    /// The end: every send, receipt and call that is open gets its last answer.
    pub(crate) fn end(&mut self) {
        self.sends.close();
        self.calls.close();
    }

    pub(crate) fn user(&self) -> &UserName {
        &self.config.user
    }

    pub(crate) fn announce(&mut self, event: Event) {
        self.streams.emit(event);
    }

    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.streams.events)
    }

    pub(crate) fn take_done(&mut self) -> Vec<Done> {
        let mut done = std::mem::take(&mut self.sends.done);
        done.append(&mut self.calls.done);
        done
    }

    // --- the connection's side ---------------------------------------------------------------------------------

    /// A connection stands: log in on it.
    pub(crate) fn connected(&mut self, now: Millis, credential: Credential<'_>) {
        self.decoder = FrameDecoder::new();
        self.wire.reset();
        self.state = State::LoggingIn;
        (self.heard_at, self.pinged_at) = (now, None);
        let Config { user, device, device_kind, agent, .. } = &self.config;
        let (device, device_kind) = (*device, *device_kind);
        let login = Login { user: user.as_str(), credential, device, device_kind, agent };
        self.wire.ask(now, Waiting::Login, &Request::Login(login));
    }

    /// The connection is gone.
    pub(crate) fn disconnected(&mut self) {
        self.state = State::Offline;
        self.wire.reset();
        self.signals.reset();
        self.sends.disconnected();
        self.calls.disconnected();
        self.streams.disconnected();
    }

    pub(crate) fn is_online(&self) -> bool {
        match self.state {
            State::Online | State::Leaving { .. } | State::LoggingOut => true,
            State::Offline | State::LoggingIn => false,
        }
    }

    /// Moves what is to be written to the end of `out`.
    pub(crate) fn take_output(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.wire.out);
    }

    /// Lets time pass and writes what may be written. Call before every wait.
    pub(crate) fn advance(&mut self, now: Millis) -> Result<(), Cut> {
        self.sends.expire(now);
        self.calls.expire(now);
        let idle = self.sends.is_empty();
        if self.closing.is_some_and(|deadline| deadline <= now || (idle && self.state == State::Offline)) {
            return Err(Cut::End(CloseReason::ByClient));
        }
        if self.state == State::Offline {
            return Ok(());
        }
        if self.wire.oldest().is_some_and(|at| now.saturating_sub(at) >= ANSWER_TIMEOUT_MS) {
            return Err(Cut::Lost(LinkError::NoAnswer));
        }
        match &self.state {
            State::Offline | State::LoggingIn | State::LoggingOut => return Ok(()),
            State::Online => {
                self.heartbeat(now)?;
                self.sends.pump(now, &mut self.wire);
                self.calls.pump(now, &mut self.wire);
            }
            State::Leaving { until, reconnect_after, address } => {
                if *until <= now || !self.sends.any_in_flight() {
                    let (reconnect_after, address) = (*reconnect_after, address.clone());
                    return Err(Cut::Lost(LinkError::Goaway { reconnect_after, address }));
                }
            }
        }
        self.streams.pump(now, &mut self.wire);
        if self.closing.is_some() && idle {
            self.streams.flush_acks(now, &mut self.wire);
            self.wire.ask(now, Waiting::Logout, &Request::Logout);
            self.state = State::LoggingOut;
        }
        Ok(())
    }

    /// What a connection that was lost so has ended by: after GOAWAY the server closes it when it likes.
    pub(crate) fn ended_by(&self, cut: Cut) -> Cut {
        if let State::Leaving { reconnect_after, address, .. } = &self.state
            && matches!(cut, Cut::Lost(LinkError::ServerClosed | LinkError::Io(_)))
        {
            return Cut::Lost(LinkError::Goaway { reconnect_after: *reconnect_after, address: address.clone() });
        }
        cut
    }

    fn heartbeat(&mut self, now: Millis) -> Result<(), Cut> {
        if self.heartbeat_at() > now {
            return Ok(());
        }
        if self.pinged_at.is_some() {
            return Err(Cut::Lost(LinkError::NoAnswer));
        }
        self.pinged_at = Some(now);
        self.wire.ask(now, Waiting::Ping, &Request::Ping { stamp: now });
        Ok(())
    }

    /// When a PING is due, or when the one under way is lost. Silence on either side asks for one: the server closes
    /// when it hears nothing, and we do.
    fn heartbeat_at(&self) -> Millis {
        match self.pinged_at {
            Some(at) => at.max(self.heard_at) + self.ping_interval_ms.min(PONG_TIMEOUT_MS),
            None => {
                let silent = self.heard_at.min(self.wire.wrote_at) + self.ping_interval_ms;
                let unanswered = self.wire.oldest().map(|at| at.max(self.heard_at) + UNANSWERED_MS);
                unanswered.map_or(silent, |unanswered| silent.min(unanswered))
            }
        }
    }

    /// When [`Self::advance`] next has something to do by itself.
    pub(crate) fn next_wake(&self, now: Millis) -> Option<Millis> {
        let always = [self.sends.next_end(), self.calls.next_wake(now), self.closing];
        let answer = self.wire.oldest().map(|at| at + ANSWER_TIMEOUT_MS);
        let connected = match &self.state {
            State::Offline => [None; 4],
            State::LoggingIn | State::LoggingOut => [answer, None, None, None],
            State::Online => [answer, Some(self.heartbeat_at()), self.streams.next_wake(), self.sends.next_write()],
            State::Leaving { until, .. } => [answer, Some(*until), self.streams.next_wake(), None],
        };
        always.into_iter().chain(connected).flatten().min()
    }

    /// Bytes arrived.
    pub(crate) fn received(&mut self, now: Millis, mut bytes: &[u8]) -> Result<(), Cut> {
        self.heard_at = now;
        let mut decoder = std::mem::take(&mut self.decoder);
        let result = loop {
            match decoder.next(&mut bytes, limits::FRAME_BYTES_CEILING) {
                Ok(Some(frame)) => {
                    if let Err(cut) = self.frame(now, &frame) {
                        break Err(cut);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(Cut::protocol(error.code)),
            }
        };
        self.decoder = decoder;
        result
    }

    fn frame(&mut self, now: Millis, frame: &Frame<'_>) -> Result<(), Cut> {
        if Command::from_number(frame.header.command).is_none() {
            // A push of a newer server: nothing that this version could miss.
            return Ok(());
        }
        let reply = codec::decode_reply(&frame.header, frame.body).map_err(Cut::protocol)?;
        match reply {
            Reply::Failure { code, retry_after_ms, detail } => {
                self.failure(now, frame.header.request_id, Refusal { code, retry_after_ms, detail })
            }
            Reply::LoginOk(_)
            | Reply::RegisterOk { .. }
            | Reply::LogoutOk
            | Reply::Pong { .. }
            | Reply::RouteOk { .. }
            | Reply::Redirect { .. }
            | Reply::SendAck(_)
            | Reply::FetchOk { .. }
            | Reply::OnlineOk { .. }
            | Reply::ConversationsOk { .. }
            | Reply::Group(GroupReply::Ok { .. } | GroupReply::Info(_) | GroupReply::Members { .. }) => {
                match self.wire.answered(frame.header.request_id) {
                    Some(waiting) => self.answer(now, waiting, reply),
                    None => Err(Cut::protocol(ErrorCode::BadRequest)),
                }
            }
            Reply::Chat(reply) if !reply.is_push() => match self.wire.answered(frame.header.request_id) {
                Some(waiting) => self.answer(now, waiting, Reply::Chat(reply)),
                None => Err(Cut::protocol(ErrorCode::BadRequest)),
            },
            Reply::Group(reply @ GroupReply::Changed { .. }) => {
                if let Some(changed) = GroupChanged::from_wire(&reply) {
                    self.streams.emit(Event::GroupChanged(Box::new(changed)));
                }
                Ok(())
            }
            // Nothing that a stream could miss: each is told again, or can be asked for.
            Reply::Chat(_) => {
                if let Some(event) = social::event(&reply).map_err(Cut::protocol)? {
                    self.streams.emit(event);
                }
                Ok(())
            }
            Reply::Deliver(_) | Reply::Receipt(_) | Reply::Lagged { .. } if !self.is_online() => {
                Err(Cut::protocol(ErrorCode::NotLoggedIn))
            }
            Reply::Deliver(pushed) => {
                let message = Message::from_wire(&pushed).map_err(Cut::protocol)?;
                self.streams.arrived(message, pushed.delivery);
                Ok(())
            }
            Reply::Receipt(receipt) => {
                self.sends.receipt(&receipt);
                self.streams.emit(Event::Receipt(receipt));
                Ok(())
            }
            Reply::Lagged { conversation, with, from, to } => {
                let with = UserName::new(with).map_err(Cut::protocol)?;
                self.streams.lagged(conversation, with, (from, to));
                Ok(())
            }
            Reply::Kicked { reason, detail } => {
                Err(Cut::End(CloseReason::Kicked { reason, detail: detail.to_owned() }))
            }
            Reply::Goaway { reason, reconnect_after_ms, node: _, address } => {
                let reconnect_after = Duration::from_millis(reconnect_after_ms.min(COME_BACK_MS_MAX).into());
                self.streams.emit(Event::Goaway { reason, reconnect_after });
                let address = (!address.is_empty()).then(|| address.to_owned());
                self.state = State::Leaving { until: now + GOAWAY_LINGER_MS, reconnect_after, address };
                Ok(())
            }
        }
    }

    fn answer(&mut self, now: Millis, waiting: Waiting, reply: Reply<'_>) -> Result<(), Cut> {
        match waiting {
            Waiting::Login => match reply {
                Reply::LoginOk(ok) => self.logged_in(now, &ok),
                Reply::Redirect { address, .. } => {
                    return Err(Cut::Lost(LinkError::Redirected { address: address.to_owned() }));
                }
                _ => return Err(wrong_answer()),
            },
            Waiting::Logout => {
                let Reply::LogoutOk = reply else { return Err(wrong_answer()) };
                return Err(Cut::End(CloseReason::ByClient));
            }
            Waiting::Ping => {
                let Reply::Pong { .. } = reply else { return Err(wrong_answer()) };
                self.pinged_at = None;
            }
            Waiting::Send(client_seq) => {
                let Reply::SendAck(ack) = reply else { return Err(wrong_answer()) };
                self.send_acked(now, client_seq, ack);
            }
            Waiting::Call(number) => {
                let answer = match reply {
                    Reply::FetchOk { .. } => Answer::History(history(reply)?),
                    Reply::ConversationsOk { .. } => Answer::Conversations(conversation_page(reply)?),
                    Reply::Chat(ChatReply::Truncated { .. }) => {
                        let code = ErrorCode::Truncated;
                        self.calls.refused(now, number, Refusal { code, retry_after_ms: 0, detail: code.text() });
                        return Ok(());
                    }
                    Reply::Chat(reply) if matches!(self.calls.query(number), Some(Query::Account(_))) => {
                        Answer::Account(account::answer(&reply).map_err(Cut::protocol)?)
                    }
                    // Nobody waits for it any more.
                    Reply::Chat(_) if self.calls.query(number).is_none() => return Ok(()),
                    Reply::Chat(reply) => {
                        let answer = social::answer(&reply).map_err(Cut::protocol)?;
                        self.watching(number, &answer);
                        Answer::Social(answer)
                    }
                    Reply::Group(reply) => Answer::Group(GroupAnswer::from_wire(&reply).map_err(Cut::protocol)?),
                    other => Answer::Online(online_page(other)?),
                };
                self.calls.answered(number, answer).map_err(Cut::protocol)?;
            }
            Waiting::Fetch(id) => self.streams.fetched(now, id, history(reply)?),
            Waiting::Row(id) => {
                let row = conversation_page(reply)?.conversations.into_iter().find(|row| row.conversation == id);
                self.streams.row(now, id, row);
            }
            Waiting::Page => self.streams.page(now, conversation_page(reply)?),
            Waiting::Sync => {
                if let Reply::Chat(ChatReply::SyncOk { messages, next }) = reply {
                    let messages = messages.iter().map(Message::from_wire).collect::<Result<_, _>>();
                    self.streams.synced(now, messages.map_err(Cut::protocol)?, next);
                } else if let Reply::Chat(ChatReply::Truncated { conversation, first }) = reply {
                    self.streams.sync_truncated(now, conversation, first);
                } else {
                    return Err(wrong_answer());
                }
            }
        }
        Ok(())
    }

    fn logged_in(&mut self, now: Millis, ok: &LoginOk<'_>) {
        self.state = State::Online;
        let interval_ms = ok.ping_interval_ms.clamp(PING_INTERVAL_MS_MIN, PING_INTERVAL_MS_MAX);
        self.ping_interval_ms = interval_ms.into();
        self.sends.allow(ok.sends_in_flight_max, ok.frame_bytes_max);
        self.streams.emit(Event::Connected { session: ok.session });
        self.streams.connected(now);
        // What was asked before and is still open watches by itself.
        self.rewatching.retain(|number| self.calls.query(*number).is_some());
        let watched: Vec<UserName> = self.watched.iter().cloned().collect();
        for chunk in watched.chunks(social::WATCH_CHUNK) {
            let query = Query::Social(SocialQuery::Watch(chunk.to_vec()));
            if let Ok(number) = self.calls.push(now, query, social::WATCH_TIMEOUT) {
                self.rewatching.insert(number);
            }
        }
    }

    /// Keeps what is watched in step with what the server has confirmed.
    fn watching(&mut self, number: u64, answer: &SocialAnswer) {
        match self.calls.query(number) {
            // Of what was watched again by itself nothing is new, and some may not be watched any more.
            Some(Query::Social(SocialQuery::Watch(_))) if self.rewatching.contains(&number) => {}
            Some(Query::Social(SocialQuery::Watch(users))) => self.watched.extend(users.iter().cloned()),
            Some(Query::Social(SocialQuery::Unwatch(users))) => users.iter().for_each(|user| {
                self.watched.remove(user);
            }),
            Some(_) | None => {}
        }
        if self.rewatching.remove(&number)
            && let SocialAnswer::Presence(rows) = answer
        {
            self.streams.emit(Event::Presence(rows.clone()));
        }
    }

    /// Our own message enters its conversation's stream here, whether or not the server also pushes it to the device
    /// that sent it: the filter drops the second.
    fn send_acked(&mut self, now: Millis, client_seq: u64, ack: message::SendAck) {
        let message::SendAck { conversation, seq, time_ms, dup } = ack;
        let accepted = Accepted { conversation, seq, time_ms, dup };
        let Some(outgoing) = self.sends.accepted(now, client_seq, accepted) else { return };
        let Outgoing { to, body, options, amends } = outgoing;
        if seq != Seq::ZERO {
            let (from, device) = (self.config.user.clone(), self.config.device);
            let class = options.class;
            let (kind, extra) = match amends {
                Some(amends) => (BodyKind::Amendment, Some(amends.extra(time_ms))),
                None => (options.kind, options.extra()),
            };
            let message =
                Message { conversation, seq, time_ms, from, to, device, client_seq, class, kind, body, extra };
            self.streams.arrived(message, 0);
        }
    }

    fn failure(&mut self, now: Millis, request_id: u32, refusal: Refusal<'_>) -> Result<(), Cut> {
        let code = refusal.code;
        match self.wire.answered(request_id) {
            Some(Waiting::Login) => {
                return Err(match code {
                    ErrorCode::AuthFailed => Cut::End(CloseReason::AuthFailed),
                    code if code.retryable() => Cut::Lost(LinkError::Refused(code)),
                    code => Cut::End(CloseReason::Refused { code, detail: refusal.detail.to_owned() }),
                });
            }
            Some(Waiting::Logout) => return Err(Cut::End(CloseReason::ByClient)),
            Some(Waiting::Ping) => self.pinged_at = None,
            Some(Waiting::Send(client_seq)) => self.sends.refused(now, client_seq, refusal),
            Some(Waiting::Call(number)) => self.calls.refused(now, number, refusal),
            Some(Waiting::Fetch(id) | Waiting::Row(id)) => self.streams.refused(now, id, refusal),
            Some(Waiting::Page) => self.streams.page_refused(now, refusal),
            Some(Waiting::Sync) => self.streams.sync_refused(now, refusal),
            None => match self.signals.refused(request_id, code) {
                Some(event) => drop(self.streams.emit(event)),
                None => self.streams.ack_refused(now, request_id, refusal),
            },
        }
        if code.closes() { Err(Cut::Lost(LinkError::Refused(code))) } else { Ok(()) }
    }

    #[cfg(test)]
    pub(crate) fn check_invariants(&self) {
        self.streams.check_invariants();
    }
}

fn wrong_answer() -> Cut {
    Cut::protocol(ErrorCode::BadBody)
}

fn history(reply: Reply<'_>) -> Result<History, Cut> {
    let Reply::FetchOk { conversation, first, head, messages } = reply else { return Err(wrong_answer()) };
    let messages = messages.iter().map(Message::from_wire).collect::<Result<_, _>>().map_err(Cut::protocol)?;
    Ok(History { conversation, first, head, messages })
}

fn conversation_page(reply: Reply<'_>) -> Result<ConversationPage, Cut> {
    let Reply::ConversationsOk { conversations, next } = reply else { return Err(wrong_answer()) };
    let row = |row: message::Conversation<'_>| {
        let message::Conversation { conversation, first, head, last_time_ms, acked, read, .. } = row;
        let message::Conversation { pinned, muted_until_ms, standing, .. } = row;
        let (with, last) = (UserName::new(row.with)?, row.last.as_ref().map(Message::from_wire).transpose()?);
        let title = row.title.to_owned();
        Ok(Conversation {
            conversation,
            with,
            first,
            head,
            last_time_ms,
            acked,
            read,
            pinned,
            muted_until_ms,
            last,
            standing,
            title,
        })
    };
    let conversations = conversations.into_iter().map(row).collect::<Result<_, _>>().map_err(Cut::protocol)?;
    Ok(ConversationPage { conversations, next: (next != ConversationId(0)).then_some(next) })
}

fn online_page(reply: Reply<'_>) -> Result<OnlinePage, Cut> {
    let Reply::OnlineOk { users, next } = reply else { return Err(wrong_answer()) };
    let row =
        |row: message::OnlineUser<'_>| UserName::new(row.user).map(|user| OnlineUser { user, devices: row.devices });
    let users = users.into_iter().map(row).collect::<Result<_, _>>().map_err(Cut::protocol)?;
    Ok(OnlinePage { users, next: (!next.is_empty()).then(|| next.to_owned()) })
}

#[cfg(test)]
mod tests;
