//! Requests, answers and pushes as plain borrowed structs: what the core speaks, whatever codec carried them.
//!
//! Field meanings, units and defaults are those of `fbs/wire.fbs`.

pub mod chat;
pub mod group;
pub mod names;

use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::ids::{ConversationId, DeviceId, Seq};

pub use chat::{ChatReply, ChatRequest, MessageState};
pub use group::{GroupAct, GroupChange, GroupReply, Standing};
pub use names::{Names, Place, Places};

/// An enum of the wire: each variant has its number, for ever.
macro_rules! numbered {
    ($(#[$attribute:meta])* $name:ident { $($(#[$note:meta])* $variant:ident = $number:literal,)* }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        $(#[$attribute])*
        pub enum $name {
            $($(#[$note])* $variant = $number,)*
        }

        impl $name {
            /// `None` for a number that this version does not know.
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}
use numbered;

/// Durable messages are stored and sequenced; transient ones reach who is online now, or nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Class {
    #[default]
    Durable = 0,
    Transient = 1,
}

impl Class {
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Durable),
            1 => Some(Self::Transient),
            _ => None,
        }
    }
}

/// What a body is. The server forwards bodies without looking into them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BodyKind {
    #[default]
    Text = 0,
    Image = 1,
    Emoji = 2,
    Voice = 3,
    Video = 4,
    File = 5,
    Link = 6,
    Custom = 7,
    /// A change of a group, told in `change`. Only the server makes these two.
    System = 8,
    /// The row of an AMEND: `refers` names the message it changes, `state` says to what.
    Amendment = 9,
}

impl BodyKind {
    pub fn from_number(number: u8) -> Option<Self> {
        const ALL: [BodyKind; 10] = {
            use BodyKind::{Amendment, Custom, Emoji, File, Image, Link, System, Text, Video, Voice};
            [Text, Image, Emoji, Voice, Video, File, Link, Custom, System, Amendment]
        };
        ALL.get(usize::from(number)).copied()
    }

    /// Whether a client may send it.
    pub fn is_for_clients(self) -> bool {
        !matches!(self, Self::System | Self::Amendment)
    }
}

/// The kind of a device, for the one-per-kind policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DeviceKind {
    #[default]
    Other = 0,
    Phone = 1,
    Tablet = 2,
    Desktop = 3,
    Web = 4,
    Bot = 5,
}

impl DeviceKind {
    pub fn from_number(number: u8) -> Option<Self> {
        let all = [Self::Other, Self::Phone, Self::Tablet, Self::Desktop, Self::Web, Self::Bot];
        all.get(usize::from(number)).copied()
    }
}

/// Why a device was told to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum KickReason {
    /// The same device logged in again.
    Replaced = 1,
    /// Another device logged in and the policy allows no more.
    DevicePolicy = 2,
    /// Another device of the user logged this one out.
    LoggedOut = 3,
    /// The user was deleted.
    UserDeleted = 4,
}

impl KickReason {
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Replaced),
            2 => Some(Self::DevicePolicy),
            3 => Some(Self::LoggedOut),
            4 => Some(Self::UserDeleted),
            _ => None,
        }
    }
}

/// Why the server asks a client to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GoawayReason {
    ShuttingDown = 1,
    /// Another node serves this user from now on.
    Moved = 2,
}

impl GoawayReason {
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::ShuttingDown),
            2 => Some(Self::Moved),
            _ => None,
        }
    }
}

/// What became of a message with a delivery acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// A device of the receiver acknowledged it.
    Delivered = 1,
    /// No device did so in time. A durable message stays stored all the same.
    DeliveryTimeout = 2,
}

impl Outcome {
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Delivered),
            2 => Some(Self::DeliveryTimeout),
            _ => None,
        }
    }
}

/// A password or token on its way through. Never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret<'a>(pub &'a str);

impl std::fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// What a LOGIN proves itself with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential<'a> {
    Password(Secret<'a>),
    Token(Secret<'a>),
}

/// Client to server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    Register {
        user: &'a str,
        password: Secret<'a>,
    },
    Login(Login<'a>),
    Logout,
    Ping {
        stamp: u64,
    },
    Route {
        user: &'a str,
    },
    Send(Send<'a>),
    Ack(Ack),
    Fetch(Fetch<'a>),
    /// Users online with a name above `cursor`.
    Online {
        cursor: &'a str,
        limit: u16,
    },
    /// Conversations of the session's user with an id above `cursor`.
    Conversations {
        cursor: ConversationId,
        limit: u16,
    },
    Group {
        group: &'a str,
        act: GroupAct<'a>,
    },
    Chat(ChatRequest<'a>),
}

impl Request<'_> {
    pub fn command(&self) -> Command {
        match self {
            Self::Register { .. } => Command::Register,
            Self::Login(_) => Command::Login,
            Self::Logout => Command::Logout,
            Self::Ping { .. } => Command::Ping,
            Self::Route { .. } => Command::Route,
            Self::Send(_) => Command::Send,
            Self::Ack(_) => Command::Ack,
            Self::Fetch(_) => Command::Fetch,
            Self::Online { .. } => Command::Online,
            Self::Conversations { .. } => Command::Conversations,
            Self::Group { act, .. } => act.command(),
            Self::Chat(request) => request.command(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Login<'a> {
    pub user: &'a str,
    pub credential: Credential<'a>,
    pub device: DeviceId,
    pub device_kind: DeviceKind,
    pub agent: &'a str,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Send<'a> {
    /// A user, or a group.
    pub to: &'a str,
    pub class: Class,
    pub kind: BodyKind,
    pub client_seq: u64,
    /// `None`: no delivery acknowledgement wanted.
    pub ack_timeout_ms: Option<u32>,
    pub body: &'a [u8],
    pub mentions: Mentions<'a>,
}

/// Whom a message is meant for above others. Carried, shown by clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mentions<'a> {
    pub users: Names<'a>,
    /// `@all`: owner and administrators of a group only.
    pub all: bool,
}

impl Mentions<'_> {
    pub fn is_empty(&self) -> bool {
        !self.all && self.users.is_empty()
    }
}

/// What a device has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// Everything of a conversation up to `seq`.
    Upto { conversation: ConversationId, seq: Seq },
    /// One transient delivery that asked for it.
    Delivery(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch<'a> {
    /// The other user of the conversation, or the group.
    pub with: &'a str,
    /// Only messages above this.
    pub after: Seq,
    /// Only messages below this; `None`: up to the head.
    pub before: Option<Seq>,
    pub limit: u16,
    /// When more match than `limit`: the newest of them (true) or the oldest (false). Always answered in rising order.
    pub newest: bool,
}

/// Server to client: answers and pushes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    Failure {
        code: ErrorCode,
        retry_after_ms: u32,
        detail: &'a str,
    },
    RegisterOk {
        user: &'a str,
    },
    LoginOk(LoginOk<'a>),
    LogoutOk,
    Pong {
        stamp: u64,
        server_time_ms: u64,
    },
    RouteOk {
        node: &'a str,
        address: &'a str,
    },
    /// To REGISTER or LOGIN: this user lives on that node, where clients connect to this address.
    Redirect {
        node: &'a str,
        address: &'a str,
    },
    SendAck(SendAck),
    FetchOk {
        conversation: ConversationId,
        first: Seq,
        head: Seq,
        messages: Vec<Message<'a>>,
    },
    OnlineOk {
        users: Vec<OnlineUser<'a>>,
        next: &'a str,
    },
    ConversationsOk {
        conversations: Vec<Conversation<'a>>,
        next: ConversationId,
    },
    Deliver(Message<'a>),
    Receipt(Receipt),
    Lagged {
        conversation: ConversationId,
        with: &'a str,
        from: Seq,
        to: Seq,
    },
    Kicked {
        reason: KickReason,
        detail: &'a str,
    },
    /// `node` and `address`: where the user is served from now on; empty when that is not known.
    Goaway {
        reason: GoawayReason,
        reconnect_after_ms: u32,
        node: &'a str,
        address: &'a str,
    },
    Group(GroupReply<'a>),
    Chat(ChatReply<'a>),
}

impl Reply<'_> {
    pub fn command(&self) -> Command {
        match self {
            Self::Failure { .. } => Command::Failure,
            Self::RegisterOk { .. } => Command::RegisterOk,
            Self::LoginOk(_) => Command::LoginOk,
            Self::LogoutOk => Command::LogoutOk,
            Self::Pong { .. } => Command::Pong,
            Self::RouteOk { .. } => Command::RouteOk,
            Self::Redirect { .. } => Command::Redirect,
            Self::SendAck(_) => Command::SendAck,
            Self::FetchOk { .. } => Command::FetchOk,
            Self::OnlineOk { .. } => Command::OnlineOk,
            Self::ConversationsOk { .. } => Command::ConversationsOk,
            Self::Deliver(_) => Command::Deliver,
            Self::Receipt(_) => Command::Receipt,
            Self::Lagged { .. } => Command::Lagged,
            Self::Kicked { .. } => Command::Kicked,
            Self::Goaway { .. } => Command::Goaway,
            Self::Group(reply) => reply.command(),
            Self::Chat(reply) => reply.command(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginOk<'a> {
    pub user: &'a str,
    pub session: u64,
    pub server_time_ms: u64,
    pub ping_interval_ms: u32,
    pub idle_timeout_ms: u32,
    pub frame_bytes_max: u32,
    pub sends_in_flight_max: u32,
}

/// The one acknowledgement of a send. For a durable message: it is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendAck {
    pub conversation: ConversationId,
    /// 0 for a transient message.
    pub seq: Seq,
    pub time_ms: u64,
    /// The message had been accepted before; `seq` and `time_ms` are those of the first time.
    pub dup: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    pub conversation: ConversationId,
    pub seq: Seq,
    pub time_ms: u64,
    pub from: &'a str,
    pub to: &'a str,
    pub device: DeviceId,
    pub client_seq: u64,
    pub class: Class,
    pub kind: BodyKind,
    /// Not 0: acknowledge this transient delivery with [`Ack::Delivery`].
    pub delivery: u64,
    pub body: &'a [u8],
    pub extra: Extra<'a>,
}

/// What only some messages carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extra<'a> {
    pub mentions: Mentions<'a>,
    /// The message that this row amends; 0: none.
    pub refers: Seq,
    pub state: MessageState,
    /// When `state` came to be, Unix milliseconds; 0: as sent.
    pub amended_ms: u64,
    /// Of a system message.
    pub change: Option<GroupChange<'a>>,
}

impl Extra<'_> {
    /// Whether there is nothing of it.
    pub fn is_empty(&self) -> bool {
        let amended = self.refers != Seq::ZERO || self.state != MessageState::AsSent || self.amended_ms != 0;
        !amended && self.mentions.is_empty() && self.change.is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnlineUser<'a> {
    pub user: &'a str,
    pub devices: u16,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conversation<'a> {
    pub conversation: ConversationId,
    pub with: &'a str,
    pub first: Seq,
    pub head: Seq,
    pub last_time_ms: u64,
    pub acked: Seq,
    /// The highest seq this user has read, on whatever device.
    pub read: Seq,
    pub pinned: bool,
    /// Unix milliseconds; 0: not muted.
    pub muted_until_ms: u64,
    /// `None` for a conversation with a user.
    pub standing: Option<Standing>,
    /// Of a group.
    pub title: &'a str,
    pub last: Option<Message<'a>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub conversation: ConversationId,
    /// 0 for a transient message.
    pub seq: Seq,
    pub client_seq: u64,
    pub outcome: Outcome,
    /// The device that acknowledged first; 0 on a timeout.
    pub device: DeviceId,
}
