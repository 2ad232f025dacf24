//! Everything around messages on the wire: sync, receipts, devices, presence, signals, amendments, block lists.

use super::names::{Names, Place, Places};
use super::{BodyKind, Credential, DeviceKind, Message, numbered};
use crate::commands::Command;
use crate::ids::{ConversationId, DeviceId, Seq};

numbered! {
    /// What a message has become since it was sent.
    #[derive(Default)]
    MessageState {
        #[default]
        AsSent = 0,
        Edited = 1,
        /// Taken back by its sender: the body is gone.
        Recalled = 2,
        /// Deleted for all: the body is gone.
        Deleted = 3,
        /// Deleted by the reader for himself alone: others still see it.
        Hidden = 4,
    }
}

numbered! {
    /// What AMEND does to a message.
    AmendAction {
        /// The sender, within `AMEND_WINDOW_MS`: another body.
        Edit = 1,
        /// The sender, within `AMEND_WINDOW_MS`: the body is gone for everyone.
        Recall = 2,
        /// Anyone who sees it, for himself alone.
        DeleteForMe = 3,
        /// The sender at any time; in a group also who ranks higher.
        DeleteForAll = 4,
    }
}

numbered! {
    /// Who may write to a user.
    #[derive(Default)]
    MessagesFrom {
        #[default]
        Anyone = 1,
        /// Whom this user has written to.
        Known = 2,
        /// Not even them.
        Nobody = 3,
    }
}

/// Signals below this number are ours; the others belong to applications.
pub const SIGNAL_APPLICATION: u8 = 16;
/// "is writing".
pub const SIGNAL_TYPING: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sync<'a> {
    /// How far this device has conversations; for others, what it has acknowledged.
    pub places: Places<'a>,
    /// Where the page before ended; zero: the beginning.
    pub from: Place,
    pub limit: u16,
}

/// Settings of a user in one conversation; `None`: as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub conversation: ConversationId,
    pub pinned: Option<bool>,
    /// Unix milliseconds; 0: not muted.
    pub muted_until_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amend<'a> {
    /// The other user, or the group.
    pub with: &'a str,
    pub seq: Seq,
    pub action: AmendAction,
    /// Of the new body; counts for an edit only.
    pub kind: BodyKind,
    /// As in a SEND, from the same row of numbers; without meaning for who deletes for himself.
    pub client_seq: u64,
    pub body: &'a [u8],
}

/// Client to server, all of it after login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatRequest<'a> {
    Read {
        conversation: ConversationId,
        seq: Seq,
    },
    Sync(Sync<'a>),
    Mark(Mark),
    Devices,
    DropDevice {
        device: DeviceId,
    },
    Receipts {
        conversation: ConversationId,
        seq: Seq,
        cursor: &'a str,
        limit: u16,
    },
    /// `device_kinds`: bit n is kind n; 0: all.
    Broadcast {
        kind: BodyKind,
        device_kinds: u32,
        body: &'a [u8],
    },
    /// `to`: a user or a group.
    Signal {
        to: &'a str,
        kind: u8,
        body: &'a [u8],
    },
    Watch {
        users: Names<'a>,
    },
    Unwatch {
        users: Names<'a>,
    },
    PresenceSet {
        status: Option<&'a str>,
        visible: Option<bool>,
    },
    Amend(Amend<'a>),
    Block {
        user: &'a str,
    },
    Unblock {
        user: &'a str,
    },
    Blocks {
        cursor: &'a str,
        limit: u16,
    },
    Privacy {
        messages_from: Option<MessagesFrom>,
    },
    Export {
        cursor: &'a str,
    },
    /// `proof`: for who deletes itself.
    DeleteUser {
        user: &'a str,
        proof: Option<Credential<'a>>,
        /// Whether the messages that the user has sent are taken back.
        recall: bool,
    },
}

impl ChatRequest<'_> {
    pub fn command(&self) -> Command {
        match self {
            Self::Read { .. } => Command::Read,
            Self::Sync(_) => Command::Sync,
            Self::Mark(_) => Command::Mark,
            Self::Devices => Command::Devices,
            Self::DropDevice { .. } => Command::DropDevice,
            Self::Receipts { .. } => Command::Receipts,
            Self::Broadcast { .. } => Command::Broadcast,
            Self::Signal { .. } => Command::Signal,
            Self::Watch { .. } => Command::PresenceWatch,
            Self::Unwatch { .. } => Command::PresenceUnwatch,
            Self::PresenceSet { .. } => Command::PresenceSet,
            Self::Amend(_) => Command::Amend,
            Self::Block { .. } => Command::Block,
            Self::Unblock { .. } => Command::Unblock,
            Self::Blocks { .. } => Command::Blocks,
            Self::Privacy { .. } => Command::Privacy,
            Self::Export { .. } => Command::Export,
            Self::DeleteUser { .. } => Command::DeleteUser,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device<'a> {
    pub device: DeviceId,
    pub kind: DeviceKind,
    pub agent: &'a str,
    /// First and last login, Unix milliseconds.
    pub first_ms: u64,
    pub last_ms: u64,
    pub online: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberReceipt<'a> {
    pub user: &'a str,
    pub delivered: Seq,
    pub read: Seq,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PresenceRow<'a> {
    pub user: &'a str,
    pub online: bool,
    /// Unix milliseconds; 0: not known, or not for the asker.
    pub last_seen_ms: u64,
    pub status: &'a str,
}

/// Answers and pushes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChatReply<'a> {
    /// Done; nothing else to tell.
    Done,
    /// What was asked for is older than what is kept: `first` is the oldest.
    Truncated {
        conversation: ConversationId,
        first: Seq,
    },
    /// In order of conversation, then of seq. `next` zero: nothing more was missed.
    SyncOk {
        messages: Vec<Message<'a>>,
        next: Place,
    },
    DevicesOk {
        devices: Vec<Device<'a>>,
    },
    /// Counts are over all members but the sender. An empty `next` ends the list.
    ReceiptsOk {
        members: u32,
        delivered: u32,
        read: u32,
        rows: Vec<MemberReceipt<'a>>,
        next: &'a str,
    },
    BroadcastOk {
        devices: u32,
    },
    PresenceOk {
        users: Vec<PresenceRow<'a>>,
    },
    BlocksOk {
        users: Vec<&'a str>,
        next: &'a str,
        messages_from: MessagesFrom,
    },
    /// Lines of JSON. An empty `next` ends it.
    ExportOk {
        body: &'a [u8],
        next: &'a str,
    },
    /// How far `user` has the conversation with `with`. In a group `user` is empty, and the places are those that at
    /// least one other member has reached, told to who wrote there lately; or the reader, told to its other devices.
    ReceiptUpto {
        conversation: ConversationId,
        with: &'a str,
        user: &'a str,
        delivered: Seq,
        read: Seq,
    },
    Signalled {
        conversation: ConversationId,
        from: &'a str,
        to: &'a str,
        kind: u8,
        body: &'a [u8],
    },
    PresenceChanged {
        users: Vec<PresenceRow<'a>>,
    },
    /// Another device of this user has deleted a message for the user alone.
    Hidden {
        conversation: ConversationId,
        seq: Seq,
    },
    Notice {
        from: &'a str,
        time_ms: u64,
        kind: BodyKind,
        body: &'a [u8],
    },
}

impl ChatReply<'_> {
    pub fn command(&self) -> Command {
        match self {
            Self::Done => Command::Done,
            Self::Truncated { .. } => Command::Truncated,
            Self::SyncOk { .. } => Command::SyncOk,
            Self::DevicesOk { .. } => Command::DevicesOk,
            Self::ReceiptsOk { .. } => Command::ReceiptsOk,
            Self::BroadcastOk { .. } => Command::BroadcastOk,
            Self::PresenceOk { .. } => Command::PresenceOk,
            Self::BlocksOk { .. } => Command::BlocksOk,
            Self::ExportOk { .. } => Command::ExportOk,
            Self::ReceiptUpto { .. } => Command::ReceiptUpto,
            Self::Signalled { .. } => Command::Signalled,
            Self::PresenceChanged { .. } => Command::PresenceChanged,
            Self::Hidden { .. } => Command::Hidden,
            Self::Notice { .. } => Command::Notice,
        }
    }

    /// Whether it comes unasked.
    pub fn is_push(&self) -> bool {
        self.command().direction() == crate::commands::Direction::Push
    }
}
