//! The shard's whole interface: events in, effects out, and what shards say to each other.

use std::sync::Arc;

use ringline_cluster::ownership::Ownership;
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_schema::codec::{Codec, PlainSend, decode_plain_send, decode_request};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, Frame, Header};
use ringline_schema::ids::UserName;
use ringline_schema::message::Request;
use ringline_schema::record::{Answer, Query, Record};

pub use crate::group::act::Act;
pub use crate::group::fan_out::{GroupAnswer, GroupPush, InfoAnswer, MemberAnswer};
pub use crate::group::passing::{Pass, Passing, Relay};
pub use crate::group::state::Targets;
pub use crate::peer::{Ask, ShardMessage};

/// Time as the shell sees it at the head of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic microseconds since any fixed moment. Deadlines are counted in it.
    pub mono_us: u64,
    /// Unix milliseconds. Only stamped on messages, never compared.
    pub unix_ms: u64,
}

/// A connection of this shard. The shell makes the numbers; one is not used again for another connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    /// Place in the shell's table, used again after a close.
    pub slot: u32,
    /// Tells the tenants of one slot apart.
    pub generation: u32,
}

/// Names an open question to the store or the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Everything that can happen to a shard.
#[derive(Debug)]
pub enum Event<'a> {
    /// A socket was accepted here, or handed over by another shard.
    Opened {
        conn: ConnId,
    },
    /// The same of a connection that a gateway holds, whose LOGIN or REGISTER follows. Its client comes back to the gateway
    /// and is never sent elsewhere: who lives on another shard is told UNAVAILABLE.
    Tunnelled {
        conn: ConnId,
    },
    Request {
        conn: ConnId,
        codec: Codec,
        flags: Flags,
        request_id: u32,
        request: Request<'a>,
    },
    /// A SEND, the request that most are, before its name was looked at: the straight way of a message begins with it. The
    /// same to the shard as the `Request` that it is.
    Send {
        conn: ConnId,
        codec: Codec,
        flags: Flags,
        request_id: u32,
        send: PlainSend<'a>,
    },
    /// The edge could not decode what came; it is answered, and the connection ends if `code.closes()`.
    Refused {
        conn: ConnId,
        codec: Codec,
        request_id: u32,
        code: ErrorCode,
    },
    /// `bytes` of the connection's output went into the kernel.
    Sent {
        conn: ConnId,
        bytes: usize,
    },
    /// The socket is gone, whoever ended it. The last event of a connection, also after [`Effect::Close`].
    Closed {
        conn: ConnId,
    },
    /// The first `upto` records this shard appended are durable.
    Stored {
        upto: u64,
    },
    /// The store is poisoned: nothing more will become durable.
    StoreFailed,
    /// The store's disk has no room, or has room again: durable work is refused with `DISK_FULL` meanwhile.
    DiskSpace {
        full: bool,
    },
    /// The store's database cannot be written for now, or can be again: durable work is refused with `UNAVAILABLE`
    /// meanwhile. What was appended before waits for it.
    StoreAway {
        away: bool,
    },
    /// The answer to [`Effect::Load`].
    Loaded {
        token: Token,
        answer: Answer,
    },
    /// The answer to [`Effect::Work`].
    Worked {
        token: Token,
        outcome: WorkOutcome,
    },
    /// Another shard says something. In order per sender.
    Shard {
        from: ShardIndex,
        message: ShardMessage,
    },
    /// What a link says of another node.
    Node {
        node: NodeIndex,
        news: NodeNews,
    },
    /// Who owns what now; only where partitions change hands ([`crate::nodes`]). If this node is asked to give something up,
    /// [`Effect::Released`] follows with its version or a later one.
    Placement(Arc<Ownership>),
    /// The link to another node had no room for this, which will not go out.
    Unsent {
        to: ShardIndex,
        message: ShardMessage,
    },
    /// At or after [`crate::Shard::next_deadline_us`].
    Timer,
    /// The node is stopping: refuse new work, tell clients, let what is in flight be answered.
    Drain,
}

impl<'a> Event<'a> {
    /// What a frame of a client is to the shard.
    #[inline]
    pub fn of_frame(conn: ConnId, frame: &Frame<'a>) -> Self {
        let Header { codec, flags, request_id, .. } = frame.header;
        if let Some(send) = decode_plain_send(&frame.header, frame.body) {
            return Self::Send { conn, codec, flags, request_id, send };
        }
        match decode_request(&frame.header, frame.body) {
            Ok(request) => Self::Request { conn, codec, flags, request_id, request },
            Err(code) => Self::Refused { conn, codec, request_id, code },
        }
    }
}

/// What a link says of the node at its other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeNews {
    /// It can be spoken to, and has so many shards.
    Up { shards: u16 },
    /// It can't be spoken to now. What is on its way arrives when it is up again, unless it is reset.
    Down,
    /// It is a new process: what was on its way in either direction is lost. Comes before its `Up`.
    Reset,
}

/// What the shell does with the rest of a connection's bytes after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Decode on.
    Continue,
    /// This connection's user lives on another shard: take the socket out, send it there with the raw frame that was
    /// just handled and every byte after it. This shard has forgotten the connection: no `Closed` follows. Of a gateway it
    /// may be a shard of another node: the socket stays, and its bytes go there.
    HandOver(ShardIndex),
    /// The connection ends: read nothing more of it. `Effect::Close` says the same to the writer.
    Stop,
}

/// Why the server ends a connection; for logs and counters. The client has been told by a frame where one fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// The client logged out.
    Logout,
    /// Told by a FAILURE frame.
    Error(ErrorCode),
    /// Told by KICKED.
    Kicked,
    /// Told by GOAWAY.
    Draining,
    /// The user belongs to another node now. Told by GOAWAY, or by UNAVAILABLE who was logging in.
    Moved,
}

/// Work that may block, for the pool.
#[derive(Clone, PartialEq, Eq)]
pub enum Work {
    HashPassword {
        password: String,
    },
    /// `hash: None`: there is no such user (or no password). The same time is spent, and the outcome is `false`.
    VerifyPassword {
        password: String,
        hash: Option<String>,
    },
    /// True when the token is valid now and its subject is this user.
    VerifyToken {
        token: String,
        user: UserName,
    },
}

/// Never prints a secret.
impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HashPassword { .. } => "HashPassword",
            Self::VerifyPassword { .. } => "VerifyPassword",
            Self::VerifyToken { .. } => "VerifyToken",
        })
    }
}

/// What the pool says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkOutcome {
    /// The PHC string.
    Hashed(String),
    Verified(bool),
    /// The pool's queue is full; the client is told BUSY.
    Busy,
    /// The worker could not do it; the client is told INTERNAL.
    Failed,
}

/// What the shell does for a shard, in this order.
#[derive(Debug)]
pub enum Effect {
    /// Write what output is left, then close; then say `Event::Closed`.
    Close {
        conn: ConnId,
        reason: CloseReason,
    },
    /// Queue for the store. The n-th append of a shard is record n of `Event::Stored`.
    Append(Record),
    /// Ask the store; a store that can't take it answers `Answer::Failed`.
    Load {
        token: Token,
        query: Query,
    },
    Work {
        token: Token,
        work: Work,
    },
    /// Put on the lane to another shard of this node, or on the link to the node of that one. Never to itself.
    ToShard {
        to: ShardIndex,
        message: ShardMessage,
    },
    /// Of what this node was asked to give up, by the placement of that version or an earlier one, this shard has nothing in
    /// flight any more and serves nothing.
    Released {
        version: u64,
    },
}

/// Effects of one or several events, kept by the shell and reused.
#[derive(Debug, Default)]
pub struct Effects {
    pub list: Vec<Effect>,
    /// Connections that have output to take ([`crate::Shard::take_output`]). Each at most once until taken.
    pub dirty: Vec<ConnId>,
}
