//! What shards say to each other: those of one node in order per pair, never lost, bounded by the lanes that carry it; those
//! of different nodes as [`crate::nodes`] says.

use std::sync::Arc;

use bytes::Bytes;
use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, ConversationKind, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::message::{BodyKind, Receipt, SendAck};
use ringline_schema::record::{Answer, Range, StoredMessage, sent_hash};

use crate::amend::Amending;
use crate::event::ConnId;
use crate::group::act::Act;
use crate::group::fan_out::{GroupAnswer, GroupPush};
use crate::group::list::MemberList;
use crate::group::passing::{Pass, Passing, Relay};
use crate::nodes::reads::NodeRead;
use crate::receipt_list::{NoReceipts, ReceiptAsk, ReceiptPage};
use crate::receipts::{ReceiptNews, ReceiptUp};
pub use crate::social::SocialMessage;

/// The request that something is an answer to. The connection may be gone when the answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub shard: ShardIndex,
    pub conn: ConnId,
    pub request_id: u32,
}

/// A durable send on its way to the owner of its conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submit {
    pub origin: Origin,
    pub device_key: DeviceKey,
    /// What is sent, in the one place where it stays until it is delivered. Number and time are the owner's to give.
    pub message: Arc<StoredMessage>,
    pub ack_timeout_ms: Option<u32>,
    /// What few sends have.
    pub more: Option<Box<SubmitMore>>,
}

/// What goes the way of a durable send and is more than a plain message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubmitMore {
    pub amend: Option<Amending>,
    /// A command to the group: nothing is sent.
    pub act: Option<Act>,
    /// Not stored: only the members that are online get it.
    pub passing: Option<Passing>,
    /// Users that the act names and whose shards it has yet to see.
    pub unvisited: Vec<UserName>,
}

impl Submit {
    pub(crate) fn is_to_group(&self) -> bool {
        self.message.conversation.kind() == Some(ConversationKind::Group)
    }

    /// The message with the number and the time that its owner gives it. Not copied: nobody else holds it yet.
    pub(crate) fn numbered(&mut self, seq: Seq, time_ms: u64) -> Arc<StoredMessage> {
        let message = Arc::make_mut(&mut self.message);
        (message.seq, message.time_ms) = (seq, time_ms);
        Arc::clone(&self.message)
    }

    /// The act, if it is one and no message.
    pub fn act(&self) -> Option<&Act> {
        self.more.as_ref().and_then(|more| more.act.as_ref())
    }

    /// How it passes the group by, if it is not stored.
    pub fn passing(&self) -> Option<Passing> {
        self.more.as_ref().and_then(|more| more.passing)
    }

    /// What it amends, if it does.
    pub fn amending(&self) -> Option<Amending> {
        self.more.as_ref().and_then(|more| more.amend)
    }

    /// Its fingerprint for the duplicate filter.
    pub fn hash(&self) -> u64 {
        sent_hash(&self.message.body, self.message.extra.as_deref())
    }
}

/// A transient send on its way to the shard of its target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransientSend {
    pub origin: Origin,
    pub from: UserName,
    pub to: UserName,
    pub device: DeviceId,
    pub client_seq: u64,
    pub kind: BodyKind,
    pub body: Bytes,
    pub ack_timeout_ms: Option<u32>,
    /// Only a failure is told.
    pub no_reply: bool,
}

/// The owner of a conversation asks the shard of `user`: may `from` write?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    pub conversation: ConversationId,
    pub user: UserName,
    pub from: UserName,
    /// The conversation exists, so the user does.
    pub exists: bool,
    /// The user has written in it.
    pub answered: bool,
}

/// Somebody waits to hear that a message reached a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub origin: Origin,
    pub timeout_ms: u32,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardMessage {
    /// To the owner of the conversation.
    Submit(Box<Submit>),
    /// To the shard of the target.
    Transient(Box<TransientSend>),
    /// To the origin of a send; `copy` is what the sender's other devices get.
    SendResult {
        origin: Origin,
        durable: bool,
        result: Result<SendAck, ErrorCode>,
        copy: Option<Arc<StoredMessage>>,
    },
    /// To the shard of a receiving user.
    Deliver {
        message: Arc<StoredMessage>,
        wanted: Option<Wanted>,
    },
    /// To the origin of a send that asked for a delivery acknowledgement.
    Receipt {
        origin: Origin,
        receipt: Receipt,
    },
    AskUser(Box<Ask>),
    /// The answer: whether `user` takes a message in that conversation now.
    UserKnown {
        conversation: ConversationId,
        user: UserName,
        known: Result<(), ErrorCode>,
    },
    Social(SocialMessage),
    /// To the owner of the conversation.
    Fetch {
        origin: Origin,
        conversation: ConversationId,
        range: Range,
        /// Of a group: who reads.
        reader: Option<UserName>,
    },
    Fetched {
        origin: Origin,
        conversation: ConversationId,
        /// What was asked for next is not kept any more.
        truncated: bool,
        answer: Answer,
    },
    /// To the owner of the conversation.
    ReceiptUp(Box<ReceiptUp>),
    /// To the shard of a user who is told.
    ReceiptNews(Box<ReceiptNews>),
    /// To the owner of the conversation; answered by `ReceiptPage`.
    ReceiptAsk(Box<ReceiptAsk>),
    ReceiptPage {
        origin: Origin,
        page: Box<Result<ReceiptPage, NoReceipts>>,
    },
    /// To the origin of a request that is answered by DONE or a failure.
    Done {
        origin: Origin,
        result: Result<(), ErrorCode>,
    },
    /// To every other shard, before the SYNC of a connection: bring the index up to date. Answered by `Flushed`.
    Flush {
        conn: ConnId,
        number: u64,
    },
    /// `done` false: it is too busy, or its store cannot read.
    Flushed {
        conn: ConnId,
        number: u64,
        done: bool,
    },
    /// To a shard whose part of the online list is wanted.
    Online {
        origin: Origin,
        after: Option<UserName>,
        limit: u16,
    },
    /// To the shard of the next user that an act names.
    Visit(Box<Submit>),
    /// To the origin of an act.
    GroupAnswered {
        origin: Origin,
        answer: GroupAnswer,
    },
    /// To a shard with members of a group. Message and list are shared, not copied.
    DeliverGroup {
        message: Arc<StoredMessage>,
        members: MemberList,
        /// The connection that sent it.
        skip: Option<ConnId>,
        relay: Option<Relay>,
    },
    /// To a shard with members of a group: what is not stored.
    PassGroup {
        pass: Arc<Pass>,
        members: MemberList,
    },
    /// To the owner of a group: a device of a member has acknowledged what is waited for.
    GroupReached {
        wait: u64,
        device: DeviceId,
    },
    /// To the shard of users who are told of a change of a group.
    PushGroup {
        users: Vec<UserName>,
        push: Arc<GroupPush>,
    },
    OnlinePage {
        origin: Origin,
        users: Vec<(UserName, u16)>,
        more: bool,
    },
    /// To a shard of another node: what its store has. Answered by `ReadDone`.
    Read {
        number: u64,
        read: Box<NodeRead>,
    },
    ReadDone {
        number: u64,
        answer: Box<Answer>,
    },
    /// To every shard of another node: something for its devices could not be sent.
    Missed,
    /// To a shard that has these partitions now: what was sent before to who had them may not have come to their users.
    Moved {
        partitions: Vec<u16>,
    },
}
