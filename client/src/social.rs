//! What people are to each other beside their messages: signals, block lists, presence, notices to all.
//!
//! Part of the client's handle, and the owned forms of what the wire says about it. Owned by no thread: requests go
//! through the client's one task as every other call. What a session watches is watched again after a reconnection.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::{MessagesFrom, SIGNAL_TYPING};
use ringline_schema::message::{self, BodyKind, ChatReply, ChatRequest, Reply, Request};

use crate::account::ReadUpto;
use crate::client::Client;
use crate::connection::Command;
use crate::pending::{Answer, CallError, Millis, Query, Wire};
use crate::session::Event;

/// Signals whose refusal is still recognised.
const RECENT_SIGNALS_MAX: usize = 64;

/// "is typing", or what an application makes of it. Not stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signal {
    pub conversation: ConversationId,
    pub from: UserName,
    /// A user, or a group.
    pub to: UserName,
    pub kind: u8,
    pub body: Bytes,
}

impl Signal {
    pub fn is_typing(&self) -> bool {
        self.kind == SIGNAL_TYPING
    }
}

/// Whether somebody is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    pub user: UserName,
    pub online: bool,
    /// Unix milliseconds; 0: not known, or not for this user.
    pub last_seen_ms: u64,
    pub status: String,
}

/// A page of the block list, in order of name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPage {
    pub users: Vec<UserName>,
    /// Where the next page starts; `None`: this was the last.
    pub next: Option<String>,
    /// Who may write to this user.
    pub messages_from: MessagesFrom,
}

/// A message of an administrator to everyone online. Not stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub from: UserName,
    /// Unix milliseconds, by the server's clock.
    pub time_ms: u64,
    pub kind: BodyKind,
    pub body: Bytes,
}

/// A question about people.
#[derive(Clone, Debug)]
pub(crate) enum SocialQuery {
    Block(UserName),
    Unblock(UserName),
    Blocks { cursor: String, limit: u16 },
    Privacy(MessagesFrom),
    Watch(Vec<UserName>),
    Unwatch(Vec<UserName>),
    PresenceSet { status: Option<String>, visible: Option<bool> },
    Broadcast { kind: BodyKind, device_kinds: u32, body: Bytes },
}

impl SocialQuery {
    pub(crate) fn as_wire(&self) -> Request<'_> {
        Request::Chat(match self {
            Self::Block(user) => ChatRequest::Block { user: user.as_str() },
            Self::Unblock(user) => ChatRequest::Unblock { user: user.as_str() },
            Self::Blocks { cursor, limit } => ChatRequest::Blocks { cursor, limit: *limit },
            Self::Privacy(messages_from) => ChatRequest::Privacy { messages_from: Some(*messages_from) },
            Self::Watch(users) => ChatRequest::Watch { users: users[..].into() },
            Self::Unwatch(users) => ChatRequest::Unwatch { users: users[..].into() },
            Self::PresenceSet { status, visible } => {
                ChatRequest::PresenceSet { status: status.as_deref(), visible: *visible }
            }
            Self::Broadcast { kind, device_kinds, body } => {
                ChatRequest::Broadcast { kind: *kind, device_kinds: *device_kinds, body }
            }
        })
    }

    /// Whether that can be its answer.
    pub(crate) fn is_answered_by(&self, answer: &SocialAnswer) -> bool {
        match self {
            Self::Block(_) | Self::Unblock(_) | Self::Privacy(_) | Self::Unwatch(_) | Self::PresenceSet { .. } => {
                matches!(answer, SocialAnswer::Done)
            }
            Self::Blocks { .. } => matches!(answer, SocialAnswer::Blocks(_)),
            Self::Watch(_) => matches!(answer, SocialAnswer::Presence(_)),
            Self::Broadcast { .. } => matches!(answer, SocialAnswer::Broadcast { .. }),
        }
    }
}

#[derive(Debug)]
pub(crate) enum SocialAnswer {
    Done,
    Blocks(BlockPage),
    Presence(Vec<Presence>),
    Broadcast { devices: u32 },
}

fn name(text: &str) -> Result<UserName, ErrorCode> {
    UserName::new(text).map_err(|_| ErrorCode::BadBody)
}

fn presence(rows: &[message::chat::PresenceRow<'_>]) -> Result<Vec<Presence>, ErrorCode> {
    let row = |row: &message::chat::PresenceRow<'_>| {
        let (online, last_seen_ms, status) = (row.online, row.last_seen_ms, row.status.to_owned());
        name(row.user).map(|user| Presence { user, online, last_seen_ms, status })
    };
    rows.iter().map(row).collect()
}

/// Errors: `BAD_BODY` for the answer to another question.
pub(crate) fn answer(reply: &ChatReply<'_>) -> Result<SocialAnswer, ErrorCode> {
    match reply {
        ChatReply::Done => Ok(SocialAnswer::Done),
        ChatReply::BlocksOk { users, next, messages_from } => {
            let users = users.iter().map(|user| name(user)).collect::<Result<_, _>>()?;
            let (next, messages_from) = ((!next.is_empty()).then(|| (*next).to_owned()), *messages_from);
            Ok(SocialAnswer::Blocks(BlockPage { users, next, messages_from }))
        }
        ChatReply::PresenceOk { users } => presence(users).map(SocialAnswer::Presence),
        ChatReply::BroadcastOk { devices } => Ok(SocialAnswer::Broadcast { devices: *devices }),
        ChatReply::Truncated { .. }
        | ChatReply::SyncOk { .. }
        | ChatReply::DevicesOk { .. }
        | ChatReply::ReceiptsOk { .. }
        | ChatReply::ExportOk { .. }
        | ChatReply::ReceiptUpto { .. }
        | ChatReply::Signalled { .. }
        | ChatReply::PresenceChanged { .. }
        | ChatReply::Hidden { .. }
        | ChatReply::Notice { .. } => Err(ErrorCode::BadBody),
    }
}

/// What a push tells the application; `None`: nothing of this module.
pub(crate) fn event(reply: &Reply<'_>) -> Result<Option<Event>, ErrorCode> {
    let Reply::Chat(reply) = reply else { return Ok(None) };
    Ok(Some(match reply {
        ChatReply::Signalled { conversation, from, to, kind, body } => {
            let (from, to, body) = (name(from)?, name(to)?, Bytes::copy_from_slice(body));
            Event::Signal(Signal { conversation: *conversation, from, to, kind: *kind, body })
        }
        ChatReply::PresenceChanged { users } => Event::Presence(presence(users)?),
        ChatReply::Hidden { conversation, seq } => Event::Hidden { conversation: *conversation, seq: *seq },
        ChatReply::ReceiptUpto { conversation, with, user, delivered, read } => {
            let user = (!user.is_empty()).then(|| name(user)).transpose()?;
            let with = name(with)?;
            Event::ReadUpto(ReadUpto { conversation: *conversation, with, user, delivered: *delivered, read: *read })
        }
        ChatReply::Notice { from, time_ms, kind, body } => {
            let (from, body) = (name(from)?, Bytes::copy_from_slice(body));
            Event::Notice(Notice { from, time_ms: *time_ms, kind: *kind, body })
        }
        ChatReply::Done
        | ChatReply::Truncated { .. }
        | ChatReply::SyncOk { .. }
        | ChatReply::DevicesOk { .. }
        | ChatReply::ReceiptsOk { .. }
        | ChatReply::BroadcastOk { .. }
        | ChatReply::PresenceOk { .. }
        | ChatReply::BlocksOk { .. }
        | ChatReply::ExportOk { .. } => return Ok(None),
    }))
}

/// A signal on its way, and what was signalled lately: refusals name only a request.
#[derive(Clone, Debug)]
pub(crate) struct SignalOut {
    pub to: UserName,
    pub kind: u8,
    pub body: Bytes,
}

/// See [`SignalOut`]; forgotten with the connection.
#[derive(Debug, Default)]
pub(crate) struct Signals(VecDeque<(u32, UserName)>);

impl Signals {
    pub(crate) fn send(&mut self, now: Millis, signal: &SignalOut, wire: &mut Wire) {
        let request = ChatRequest::Signal { to: signal.to.as_str(), kind: signal.kind, body: &signal.body };
        let id = wire.tell(now, &Request::Chat(request));
        if self.0.len() >= RECENT_SIGNALS_MAX {
            self.0.pop_front();
        }
        self.0.push_back((id, signal.to.clone()));
    }

    /// What the application hears of a refused request, if that was a signal.
    pub(crate) fn refused(&mut self, request_id: u32, code: ErrorCode) -> Option<Event> {
        let at = self.0.iter().position(|(id, _)| *id == request_id)?;
        self.0.remove(at).map(|(_, to)| Event::SignalRefused { to, code })
    }

    pub(crate) fn reset(&mut self) {
        self.0.clear();
    }
}

impl Client {
    /// Tells a user, or the other members of a group, "I am typing". Cheap to call at every key: the server drops repeats within a second.
    pub fn typing(&self, to: &str) -> Result<(), CallError> {
        self.signal(to, SIGNAL_TYPING, Bytes::new())
    }

    /// Signals a user or a group: `kind` 16 and above belong to applications, the body has at most 1,024 bytes. Not stored, not
    /// repeated, dropped without a connection; a refusal comes as [`Event::SignalRefused`].
    pub fn signal(&self, to: &str, kind: u8, body: impl Into<Bytes>) -> Result<(), CallError> {
        let to = UserName::new(to).map_err(|_| CallError::BadName)?;
        let signal = SignalOut { to, kind, body: body.into() };
        self.commands.try_send(Command::Signal(signal)).map_err(|error| match error {
            tokio::sync::mpsc::error::TrySendError::Full(_) => CallError::QueueFull,
            tokio::sync::mpsc::error::TrySendError::Closed(_) => CallError::Closed,
        })
    }

    /// Takes no messages and signals of this user any more; they are told. At most 1,000 users.
    pub async fn block(&self, user: &str) -> Result<(), CallError> {
        let user = UserName::new(user).map_err(|_| CallError::BadName)?;
        self.social(SocialQuery::Block(user)).await.map(|_| ())
    }

    pub async fn unblock(&self, user: &str) -> Result<(), CallError> {
        let user = UserName::new(user).map_err(|_| CallError::BadName)?;
        self.social(SocialQuery::Unblock(user)).await.map(|_| ())
    }

    /// A page of whom this user blocks: from the first with `None`, then from the `next` of the page before.
    pub async fn blocks(&self, from: Option<&str>, limit: u16) -> Result<BlockPage, CallError> {
        let cursor = from.unwrap_or_default();
        if cursor.len() > limits::USER_NAME_BYTES_MAX {
            return Err(CallError::BadName);
        }
        match self.social(SocialQuery::Blocks { cursor: cursor.to_owned(), limit }).await? {
            SocialAnswer::Blocks(page) => Ok(page),
            SocialAnswer::Done | SocialAnswer::Presence(_) | SocialAnswer::Broadcast { .. } => Err(CallError::Closed),
        }
    }

    /// Settles who may write to this user.
    pub async fn take_messages_from(&self, who: MessagesFrom) -> Result<(), CallError> {
        self.social(SocialQuery::Privacy(who)).await.map(|_| ())
    }

    /// Watches users (at most 100 a call, 1,000 a session) and tells how they are now; changes come as
    /// [`Event::Presence`], at most once a second. Goes on after a reconnection.
    pub async fn watch(&self, users: &[&str]) -> Result<Vec<Presence>, CallError> {
        let users = names(users)?;
        match self.social(SocialQuery::Watch(users)).await? {
            SocialAnswer::Presence(rows) => Ok(rows),
            SocialAnswer::Done | SocialAnswer::Blocks(_) | SocialAnswer::Broadcast { .. } => Err(CallError::Closed),
        }
    }

    /// Watches them no more, on the next connections either, however this ends.
    pub async fn unwatch(&self, users: &[&str]) -> Result<(), CallError> {
        let users = names(users)?;
        self.social(SocialQuery::Unwatch(users)).await.map(|_| ())
    }

    /// Says something about oneself to who watches, at most 256 bytes; empty: nothing.
    pub async fn set_status(&self, status: &str) -> Result<(), CallError> {
        let status = Some(status.to_owned());
        self.social(SocialQuery::PresenceSet { status, visible: None }).await.map(|_| ())
    }

    /// Whether others see that this user is online, its last time and its status.
    pub async fn set_visible(&self, visible: bool) -> Result<(), CallError> {
        self.social(SocialQuery::PresenceSet { status: None, visible: Some(visible) }).await.map(|_| ())
    }

    /// For administrators: a notice to every device online, or to those of some kinds (bit n is kind n, 0 all). How
    /// many it was given to.
    pub async fn broadcast(&self, body: impl Into<Bytes>, device_kinds: u32) -> Result<u32, CallError> {
        let query = SocialQuery::Broadcast { kind: BodyKind::Text, device_kinds, body: body.into() };
        match self.social(query).await? {
            SocialAnswer::Broadcast { devices } => Ok(devices),
            SocialAnswer::Done | SocialAnswer::Blocks(_) | SocialAnswer::Presence(_) => Err(CallError::Closed),
        }
    }

    async fn social(&self, query: SocialQuery) -> Result<SocialAnswer, CallError> {
        match self.call(Query::Social(query)).await? {
            Answer::Social(answer) => Ok(answer),
            Answer::History(_)
            | Answer::Online(_)
            | Answer::Conversations(_)
            | Answer::Account(_)
            | Answer::Group(_) => Err(CallError::Closed),
        }
    }
}

fn names(users: &[&str]) -> Result<Vec<UserName>, CallError> {
    users.iter().map(|user| UserName::new(user).map_err(|_| CallError::BadName)).collect()
}

/// Users per request when what was watched is watched again.
pub(crate) const WATCH_CHUNK: usize = limits::USERS_PER_REQUEST_MAX;
/// How long watching again may take before it is given up.
pub(crate) const WATCH_TIMEOUT: Duration = Duration::from_secs(60);
