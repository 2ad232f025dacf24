//! What the store keeps, and what the core asks of it. The owned forms that travel inside a node; [`crate::disk`]
//! gives their bytes.

use std::sync::Arc;

use bytes::Bytes;

use crate::errors::ErrorCode;
use crate::ids::{ConversationId, DeviceId, DeviceKey, Partition, Seq, UserName, body_hash};
use crate::message::group::What;
use crate::message::{self, BodyKind, Class, Extra, GroupChange, Mentions, MessageState, Standing};
use crate::pack::{BadPack, Reader, Writer};
use crate::rows::{Row, RowKey, RowList};

/// One durable message, as it is stored and delivered. The body is shared, never copied between the two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMessage {
    pub conversation: ConversationId,
    pub seq: Seq,
    pub from: UserName,
    /// The receiving user of a direct conversation, or the group.
    pub to: UserName,
    pub device: DeviceId,
    pub client_seq: u64,
    /// Unix milliseconds, given by the owner at append.
    pub time_ms: u64,
    pub kind: BodyKind,
    pub body: Bytes,
    /// What few messages have, so that the others stay small.
    pub extra: Option<Box<StoredExtra>>,
}

/// See [`Extra`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredExtra {
    pub mentions: Vec<UserName>,
    pub mention_all: bool,
    pub refers: Seq,
    pub state: MessageState,
    pub amended_ms: u64,
    pub change: Option<StoredChange>,
}

/// See [`GroupChange`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChange {
    pub what: What,
    pub users: Vec<UserName>,
    pub text: String,
    pub number: u64,
}

impl StoredChange {
    /// The owned form. Errors: `BAD_BODY` for a name that is none.
    pub fn from_wire(change: &GroupChange<'_>) -> Result<Self, ErrorCode> {
        let users = change.users.iter().map(UserName::new).collect::<Result<_, _>>();
        let (users, text) = (users.map_err(|_| ErrorCode::BadBody)?, change.text.to_owned());
        Ok(Self { what: change.what, users, text, number: change.number })
    }

    /// The wire form.
    pub fn as_wire(&self) -> GroupChange<'_> {
        GroupChange { what: self.what, users: self.users[..].into(), text: &self.text, number: self.number }
    }
}

impl StoredExtra {
    /// The owned form; `None` when there is nothing in it. Errors: `BAD_BODY` for a name that is none.
    pub fn from_wire(extra: &Extra<'_>) -> Result<Option<Box<Self>>, ErrorCode> {
        if *extra == Extra::default() {
            return Ok(None);
        }
        let mentions = extra.mentions.users.iter().map(UserName::new).collect::<Result<_, _>>();
        Ok(Some(Box::new(Self {
            mentions: mentions.map_err(|_| ErrorCode::BadBody)?,
            mention_all: extra.mentions.all,
            refers: extra.refers,
            state: extra.state,
            amended_ms: extra.amended_ms,
            change: extra.change.as_ref().map(StoredChange::from_wire).transpose()?,
        })))
    }

    /// The wire form.
    pub fn as_wire(&self) -> Extra<'_> {
        Extra {
            mentions: Mentions { users: self.mentions[..].into(), all: self.mention_all },
            refers: self.refers,
            state: self.state,
            amended_ms: self.amended_ms,
            change: self.change.as_ref().map(StoredChange::as_wire),
        }
    }

    /// About what it takes in a frame.
    fn bytes(&self) -> usize {
        const NAME_BYTES: usize = 16;
        let names = |names: &[UserName]| names.iter().map(|name| NAME_BYTES + name.as_str().len()).sum::<usize>();
        let change = self.change.as_ref().map_or(0, |change| 64 + names(&change.users) + change.text.len());
        names(&self.mentions) + change
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.names(&self.mentions);
        out.number(u64::from(self.mention_all));
        out.number(self.refers.0);
        out.number(self.state as u64);
        out.number(self.amended_ms);
        if let Some(change) = &self.change {
            out.number(change.what as u64);
            out.names(&change.users);
            out.text(&change.text);
            out.number(change.number);
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadPack> {
        let mut reader = Reader(bytes);
        let (mentions, mention_all) = (reader.names()?, reader.number()? != 0);
        let (refers, state) = (Seq(reader.number()?), reader.small()?);
        let state = MessageState::from_number(state).ok_or(BadPack("message state"))?;
        let amended_ms = reader.number()?;
        let change = match reader.small()? {
            0 => None,
            what => Some(StoredChange {
                what: What::from_number(what).ok_or(BadPack("group change"))?,
                users: reader.names()?,
                text: reader.text()?.to_owned(),
                number: reader.number()?,
            }),
        };
        Ok(Self { mentions, mention_all, refers, state, amended_ms, change })
    }
}

impl StoredMessage {
    /// The duplicate-filter entry of this message.
    pub fn accepted(&self) -> Accepted {
        let body_hash = sent_hash(&self.body, self.extra.as_deref());
        Accepted { client_seq: self.client_seq, seq: self.seq, time_ms: self.time_ms, body_hash }
    }

    /// The message that this row amends and what it makes of it, if it is an amendment.
    pub fn amends(&self) -> Option<(Seq, MessageState)> {
        let extra = self.extra.as_ref().filter(|extra| extra.refers != Seq::ZERO)?;
        (self.kind == BodyKind::Amendment).then_some((extra.refers, extra.state))
    }

    /// As a reader is shown it who has deleted it for himself.
    pub fn hidden(self) -> Self {
        self.gone((MessageState::Hidden, 0))
    }

    /// Without a body: what has become of it, and when (Unix time in ms).
    pub fn gone(self, (state, amended_ms): (MessageState, u64)) -> Self {
        let extra = StoredExtra { state, amended_ms, ..StoredExtra::default() };
        Self { body: Bytes::new(), extra: Some(Box::new(extra)), ..self }
    }

    /// An amendment of which nothing is left to do for its reader.
    pub fn without_news(mut self) -> Self {
        self.body = Bytes::new();
        let extra = self.extra.get_or_insert_default();
        (extra.state, extra.amended_ms) = (MessageState::AsSent, 0);
        self
    }

    /// Bytes of what can be large in it: what bounds a page.
    pub fn bytes(&self) -> usize {
        self.body.len() + self.extra.as_ref().map_or(0, |extra| extra.bytes())
    }

    /// The wire form.
    #[inline]
    pub fn as_wire(&self) -> message::Message<'_> {
        message::Message {
            conversation: self.conversation,
            seq: self.seq,
            time_ms: self.time_ms,
            from: self.from.as_str(),
            to: self.to.as_str(),
            device: self.device,
            client_seq: self.client_seq,
            class: Class::Durable,
            kind: self.kind,
            delivery: 0,
            body: &self.body,
            extra: self.extra.as_deref().map(StoredExtra::as_wire).unwrap_or_default(),
        }
    }
}

/// Fingerprint of what was sent, kept beside its client_seq: that of the body, and for an amendment of what it amends.
pub fn sent_hash(body: &[u8], extra: Option<&StoredExtra>) -> u64 {
    let hash = body_hash(body);
    match extra.filter(|extra| extra.refers != Seq::ZERO) {
        Some(extra) => body_hash(&[hash, extra.refers.0, extra.state as u64].map(u64::to_le_bytes).concat()),
        None => hash,
    }
}

/// A registered user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: UserName,
    /// PHC string of argon2id; `None` when the user only logs in by token.
    pub password_hash: Option<String>,
    pub created_ms: u64,
}

/// One entry of a duplicate filter: a send that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub client_seq: u64,
    pub seq: Seq,
    pub time_ms: u64,
    pub body_hash: u64,
}

/// One durable change. The log is a sequence of these; the index is derived from them alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Shared with who waits for its commit to deliver it.
    Message(Arc<StoredMessage>),
    User(User),
    /// The first record of a direct conversation; both names are equal in a chat with oneself.
    Conversation {
        conversation: ConversationId,
        members: [UserName; 2],
        created_ms: u64,
    },
    /// How far a device has acknowledged a conversation. The index keeps the highest.
    Cursor {
        user: UserName,
        device: DeviceId,
        conversation: ConversationId,
        seq: Seq,
    },
    /// Rows that change together, with the message that tells of it if there is one. Never empty.
    Change(Box<Change>),
}

/// See [`Record::Change`]. All of one owner, and all or nothing on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub message: Option<Arc<StoredMessage>>,
    pub rows: Vec<Row>,
}

impl From<StoredMessage> for Record {
    fn from(message: StoredMessage) -> Self {
        Self::Message(message.into())
    }
}

impl Record {
    /// The message in it, if there is one.
    pub fn message(&self) -> Option<&StoredMessage> {
        match self {
            Self::Message(message) => Some(message),
            Self::Change(change) => change.message.as_deref(),
            Self::User(_) | Self::Conversation { .. } | Self::Cursor { .. } => None,
        }
    }

    /// The same, taken out.
    pub fn into_message(self) -> Option<StoredMessage> {
        match self {
            Self::Message(message) => Some(Arc::unwrap_or_clone(message)),
            Self::Change(change) => change.message.map(Arc::unwrap_or_clone),
            Self::User(_) | Self::Conversation { .. } | Self::Cursor { .. } => None,
        }
    }

    /// The partition whose owner wrote it.
    pub fn partition(&self) -> Partition {
        match self {
            Self::Message(message) => message.conversation.partition(),
            Self::User(user) => user.name.partition(),
            Self::Conversation { conversation, .. } => conversation.partition(),
            Self::Cursor { user, .. } => user.partition(),
            Self::Change(change) => match (&change.message, change.rows.first()) {
                (Some(message), _) => message.conversation.partition(),
                (None, Some(row)) => row.key.partition(),
                (None, None) => Partition::default(),
            },
        }
    }

    /// Bytes this record takes in memory and about as many in the log; for bounds, not for accounting to the byte.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 128;
        match self {
            Self::Message(message) => FIXED + message.body.len(),
            Self::User(_) | Self::Conversation { .. } | Self::Cursor { .. } => 2 * FIXED,
            Self::Change(change) => {
                let body = change.message.as_ref().map_or(0, |message| message.body.len());
                FIXED + body + 2 * FIXED * change.rows.len()
            }
        }
    }
}

/// What the core asks of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    User {
        name: UserName,
    },
    /// The head of a conversation and the duplicate filter of one device in it.
    Head {
        conversation: ConversationId,
        device: DeviceKey,
    },
    /// Messages with `after` < seq < `before`, at most `limit` of them and about `bytes_max` bytes of bodies (at least
    /// one row if any matches); `newest` picks which end. In rising order.
    Messages {
        conversation: ConversationId,
        range: Range,
        /// In a group: only what this user may read, by the ranges of its membership; page by page from one of them,
        /// and `first` and `head` of the answer are those of what is left to read. [`Answer::NotReadable`] when there
        /// never was such a member. `None`: everything.
        reader: Option<UserName>,
    },
    /// Conversations of a user with an id above `cursor`, in rising order of id.
    Conversations {
        user: UserName,
        device: DeviceKey,
        cursor: ConversationId,
        limit: u16,
    },
    /// One row.
    Row {
        key: RowKey,
    },
    /// Rows of a list with a key above `after`, in order of key, at most `limit`. Keys that are gone are left out.
    Rows {
        list: RowList,
        after: Option<RowKey>,
        limit: u16,
    },
    /// Rows of conversations that another node keeps, with what this one has of the user and the device laid over them.
    Listed {
        user: UserName,
        device: DeviceKey,
        rows: Vec<ConversationRow>,
    },
    /// How many groups a user is a member of.
    GroupCount {
        user: UserName,
    },
}

/// Which messages of a conversation are wanted; see [`Query::Messages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub after: Seq,
    pub before: Option<Seq>,
    pub limit: u16,
    pub bytes_max: u32,
    pub newest: bool,
}

/// What a store answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    User(Option<User>),
    Head(Head),
    Messages {
        first: Seq,
        head: Seq,
        messages: Vec<StoredMessage>,
    },
    Conversations(Vec<ConversationRow>),
    /// The reader of [`Query::Messages`] was never a member.
    NotReadable,
    Row(Option<Row>),
    Rows(Vec<Row>),
    Count(u32),
    /// The store cannot read; the reason is in its log.
    Failed,
}

/// State of a conversation as the store knows it. `head` is 0 when it does not exist or holds no message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub exists: bool,
    /// The oldest seq that is kept.
    pub first: Seq,
    pub head: Seq,
    /// The last accepted sends of the asked device, in rising order of client_seq, at most `DUPLICATE_WINDOW`.
    pub filter: Vec<Accepted>,
}

/// One row of a user's conversation list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConversationRow {
    pub conversation: ConversationId,
    pub with: UserName,
    pub first: Seq,
    pub head: Seq,
    pub last_time_ms: u64,
    /// The highest seq the asked device has acknowledged.
    pub acked: Seq,
    /// The highest seq this user has read.
    pub read: Seq,
    pub pinned: bool,
    pub muted_until_ms: u64,
    /// In a group; then `first` and `head` are those of what the user may read. `None`: a conversation with a user.
    pub standing: Option<Standing>,
    /// Of a group.
    pub title: String,
}
