//! What the store keeps, and what the core asks of it. The owned forms that travel inside a node; [`crate::disk`]
//! gives their bytes.

use bytes::Bytes;

use crate::ids::{ConversationId, DeviceId, DeviceKey, Partition, Seq, UserName, body_hash};
use crate::message::{self, BodyKind, Class};

/// One durable message, as it is stored and delivered. The body is shared, never copied between the two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMessage {
    pub conversation: ConversationId,
    pub seq: Seq,
    pub from: UserName,
    /// The receiving user of a direct conversation.
    pub to: UserName,
    pub device: DeviceId,
    pub client_seq: u64,
    /// Unix milliseconds, given by the owner at append.
    pub time_ms: u64,
    pub kind: BodyKind,
    pub body: Bytes,
}

impl StoredMessage {
    /// The duplicate-filter entry of this message.
    pub fn accepted(&self) -> Accepted {
        Accepted { client_seq: self.client_seq, seq: self.seq, time_ms: self.time_ms, body_hash: body_hash(&self.body) }
    }

    /// The wire form.
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
        }
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
    Message(StoredMessage),
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
}

impl Record {
    /// The partition whose owner wrote it.
    pub fn partition(&self) -> Partition {
        match self {
            Self::Message(message) => message.conversation.partition(),
            Self::User(user) => user.name.partition(),
            Self::Conversation { conversation, .. } => conversation.partition(),
            Self::Cursor { user, .. } => user.partition(),
        }
    }

    /// Bytes this record takes in memory and about as many in the log; for bounds, not for accounting to the byte.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 128;
        match self {
            Self::Message(message) => FIXED + message.body.len(),
            Self::User(_) | Self::Conversation { .. } | Self::Cursor { .. } => 2 * FIXED,
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
    },
    /// Conversations of a user with an id above `cursor`, in rising order of id.
    Conversations {
        user: UserName,
        device: DeviceKey,
        cursor: ConversationId,
        limit: u16,
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
}
