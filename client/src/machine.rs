//! The client without its shell, for a simulator or a runtime of one's own: bytes, commands and the time go in; bytes,
//! events and results come out. [`Client`](crate::Client) drives the same machine.
//!
//! Owned by whoever made it; no thread, clock, socket or randomness. Time is in milliseconds since any fixed moment.
//! Call [`Machine::advance`] before every wait and no later than [`Machine::next_wake`], then take output, events and
//! results.

use std::time::Duration;

use bytes::Bytes;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::chat::{AmendAction, Mark, MessagesFrom};
use ringline_schema::message::group::{JoinPolicy, Role};
use ringline_schema::message::{BodyKind, Credential, DeviceKind, Place, Secret};

use crate::account::{AccountAnswer, AccountQuery, DeleteProof, Device, ExportPage, ReceiptPage, SyncPage};
use crate::amend::Amends;
use crate::group::{Act, GroupAnswer, GroupDone};
use crate::pending::{
    Accepted, Answer, CallError, ConversationPage, Delivery, Done, History, HistoryRange, Outgoing, Query, SendError,
    SendOptions,
};
pub use crate::session::Cut;
use crate::session::{Config, Event, Session};
use crate::social::{Presence, SignalOut, SocialAnswer, SocialQuery};
use crate::streams::{CatchUp, Taken};

/// Who a machine is.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    pub user: UserName,
    pub device: DeviceId,
    pub device_kind: DeviceKind,
    pub catch_up: CatchUp,
    /// As [`ClientBuilder::sends_queued_max`](crate::ClientBuilder::sends_queued_max).
    pub sends_queued_max: usize,
    /// As [`ClientBuilder::events_queued_max`](crate::ClientBuilder::events_queued_max).
    pub events_queued_max: usize,
    /// Above every number that this device has used before.
    pub first_client_seq: u64,
}

/// The end of something that was asked for, by the number that asking gave.
#[derive(Debug)]
pub enum Finished {
    Sent(u64, Result<Accepted, SendError>),
    Delivered(u64, Result<Delivery, SendError>),
    Answered(u64, Result<Told, CallError>),
}

/// What can be asked for; each as the function of [`Client`](crate::Client) of that name.
#[derive(Clone, Debug)]
pub enum Ask {
    History {
        with: UserName,
        range: HistoryRange,
    },
    Conversations {
        cursor: ConversationId,
        limit: u16,
    },
    Sync {
        places: Vec<Place>,
        from: Place,
        limit: u16,
    },
    Read {
        conversation: ConversationId,
        seq: Seq,
    },
    Devices,
    DropDevice(DeviceId),
    DeleteForMe {
        with: UserName,
        seq: Seq,
    },
    Receipts {
        conversation: ConversationId,
        seq: Seq,
        limit: u16,
    },
    Watch(Vec<UserName>),
    Unwatch(Vec<UserName>),
    /// `token`: of the user itself, for its own account; `None`: an administrator deletes another.
    DeleteUser {
        user: UserName,
        token: Option<String>,
        recall: bool,
    },
    SetStatus {
        status: String,
        visible: bool,
    },
    /// Takes nothing of this user any more, or takes it again.
    Block {
        user: UserName,
        block: bool,
    },
    TakeMessagesFrom(MessagesFrom),
    Mark(Mark),
    /// To every device online; for administrators.
    Broadcast(Bytes),
    Export {
        cursor: String,
    },
    CreateGroup {
        group: UserName,
        join: JoinPolicy,
        users: Vec<UserName>,
    },
    JoinGroup(UserName),
    LeaveGroup(UserName),
    RenameGroup {
        group: UserName,
        title: String,
    },
    Invite {
        group: UserName,
        users: Vec<UserName>,
    },
    AnswerRequest {
        group: UserName,
        user: UserName,
        approve: bool,
    },
    Kick {
        group: UserName,
        user: UserName,
    },
    Mute {
        group: UserName,
        user: UserName,
        for_ms: u64,
    },
    SetJoinPolicy {
        group: UserName,
        join: JoinPolicy,
    },
    SetRole {
        group: UserName,
        user: UserName,
        role: Role,
    },
    TransferGroup {
        group: UserName,
        user: UserName,
    },
    DissolveGroup(UserName),
}

impl Ask {
    fn into_query(self) -> Query {
        let group = |group, act| Query::Group { group, act };
        match self {
            Self::History { with, range } => Query::History { with, range },
            Self::Conversations { cursor, limit } => Query::Conversations { cursor, limit },
            Self::Sync { places, from, limit } => Query::Account(AccountQuery::Sync { places, from, limit }),
            Self::Read { conversation, seq } => Query::Account(AccountQuery::Read { conversation, seq }),
            Self::Devices => Query::Account(AccountQuery::Devices),
            Self::DropDevice(device) => Query::Account(AccountQuery::Drop(device)),
            Self::DeleteForMe { with, seq } => Query::Account(AccountQuery::Hide { with, seq }),
            Self::Receipts { conversation, seq, limit } => {
                Query::Account(AccountQuery::Receipts { conversation, seq, cursor: String::new(), limit })
            }
            Self::Watch(users) => Query::Social(SocialQuery::Watch(users)),
            Self::Unwatch(users) => Query::Social(SocialQuery::Unwatch(users)),
            Self::DeleteUser { user, token, recall } => {
                let proof = token.map_or(DeleteProof::Rank, DeleteProof::Token);
                Query::Account(AccountQuery::Delete { user, proof, recall })
            }
            Self::SetStatus { status, visible } => {
                Query::Social(SocialQuery::PresenceSet { status: Some(status), visible: Some(visible) })
            }
            Self::Block { user, block: true } => Query::Social(SocialQuery::Block(user)),
            Self::Block { user, block: false } => Query::Social(SocialQuery::Unblock(user)),
            Self::TakeMessagesFrom(who) => Query::Social(SocialQuery::Privacy(who)),
            Self::Mark(mark) => Query::Account(AccountQuery::Mark(mark)),
            Self::Broadcast(body) => {
                Query::Social(SocialQuery::Broadcast { kind: BodyKind::Text, device_kinds: 0, body })
            }
            Self::Export { cursor } => Query::Account(AccountQuery::Export { cursor }),
            Self::CreateGroup { group: name, join, users } => {
                let title = name.as_str().to_owned();
                group(name, Act::Create { title, join, users })
            }
            Self::JoinGroup(name) => group(name, Act::Join(String::new())),
            Self::LeaveGroup(name) => group(name, Act::Leave),
            Self::RenameGroup { group: name, title } => group(name, Act::Rename(title)),
            Self::Invite { group: name, users } => group(name, Act::Invite(users)),
            Self::AnswerRequest { group: name, user, approve } => group(name, Act::Answer(user, approve)),
            Self::Kick { group: name, user } => group(name, Act::Kick(user)),
            Self::Mute { group: name, user, for_ms } => group(name, Act::Mute(user, for_ms)),
            Self::SetJoinPolicy { group: name, join } => group(name, Act::Policy(join)),
            Self::SetRole { group: name, user, role } => group(name, Act::Role(user, role)),
            Self::TransferGroup { group: name, user } => group(name, Act::Transfer(user)),
            Self::DissolveGroup(name) => group(name, Act::Dissolve),
        }
    }
}

/// The answer to an [`Ask`].
#[derive(Debug)]
pub enum Told {
    History(History),
    Conversations(ConversationPage),
    Sync(SyncPage),
    Devices(Vec<Device>),
    Group(GroupDone),
    Receipts(ReceiptPage),
    Presence(Vec<Presence>),
    /// How many devices were given a notice.
    Broadcast(u32),
    Export(ExportPage),
    Done,
}

/// `None` for what no [`Ask`] asks.
fn told(answer: Answer) -> Option<Told> {
    match answer {
        Answer::History(history) => Some(Told::History(history)),
        Answer::Conversations(page) => Some(Told::Conversations(page)),
        Answer::Account(AccountAnswer::Sync(page)) => Some(Told::Sync(page)),
        Answer::Account(AccountAnswer::Devices(devices)) => Some(Told::Devices(devices)),
        Answer::Account(AccountAnswer::Done) | Answer::Social(SocialAnswer::Done) => Some(Told::Done),
        Answer::Account(AccountAnswer::Receipts(page)) => Some(Told::Receipts(page)),
        Answer::Social(SocialAnswer::Presence(rows)) => Some(Told::Presence(rows)),
        Answer::Group(GroupAnswer::Done(done)) => Some(Told::Group(done)),
        Answer::Account(AccountAnswer::Export(page)) => Some(Told::Export(page)),
        Answer::Social(SocialAnswer::Broadcast { devices }) => Some(Told::Broadcast(devices)),
        Answer::Group(GroupAnswer::Info(_) | GroupAnswer::Members(_))
        | Answer::Online(_)
        | Answer::Social(SocialAnswer::Blocks(_)) => None,
    }
}

/// See the module.
pub struct Machine {
    session: Session,
    taken: Taken,
}

impl Machine {
    pub fn new(config: MachineConfig) -> Self {
        let MachineConfig { user, device, device_kind, catch_up, sends_queued_max, events_queued_max, .. } = config;
        let session = Session::new(Config {
            user,
            device,
            device_kind,
            agent: "ringline-machine".to_owned(),
            catch_up,
            sends_queued_max,
            events_queued_max,
            first_client_seq: config.first_client_seq,
        });
        Self { session, taken: Taken::default() }
    }

    /// Numbers a send: its client_seq. Errors: `QueueFull` keeps nothing.
    pub fn send(&mut self, now_ms: u64, (to, body): (UserName, Bytes), options: SendOptions) -> Result<u64, SendError> {
        self.session.send(now_ms, Outgoing { to, body, options, amends: None })
    }

    /// Edits a message, takes it back or deletes it for all, under a number as a send has it; `body` counts for an edit.
    /// Who deletes for himself asks. Errors: `QueueFull` keeps nothing.
    pub fn amend(
        &mut self,
        now_ms: u64,
        (with, seq): (UserName, Seq),
        (action, body): (AmendAction, Bytes),
    ) -> Result<u64, SendError> {
        let (options, amends) = (SendOptions::default(), Some(Amends { seq, action }));
        self.session.send(now_ms, Outgoing { to: with, body, options, amends })
    }

    /// Signals a user or a group, as [`Client::signal`](crate::Client::signal).
    pub fn signal(&mut self, now_ms: u64, to: UserName, (kind, body): (u8, Bytes)) {
        self.session.signal(now_ms, &SignalOut { to, kind, body });
    }

    /// Asks for something, and gives the number of its answer. Errors: `QueueFull` asks nothing.
    pub fn ask(&mut self, now_ms: u64, ask: Ask) -> Result<u64, CallError> {
        const PATIENCE: Duration = Duration::from_secs(60);
        self.session.call(now_ms, ask.into_query(), PATIENCE)
    }

    /// The application is done with an event; acknowledged at the next [`Machine::advance`] or a little later.
    pub fn take(&mut self, event: &Event) {
        self.taken.events += 1;
        if let Event::Message(message) = event
            && message.seq.0 > 0
        {
            let upto = self.taken.upto.entry(message.conversation).or_default();
            *upto = (*upto).max(message.seq);
        }
    }

    /// A connection stands: the login is the first output.
    pub fn connected(&mut self, now_ms: u64, token: &str) {
        self.session.connected(now_ms, Credential::Token(Secret(token)));
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        self.session.disconnected();
    }

    /// Bytes came. Errors: the connection must end.
    pub fn received(&mut self, now_ms: u64, bytes: &[u8]) -> Result<(), Cut> {
        self.session.received(now_ms, bytes)
    }

    /// Does what is due. Errors: the connection must end.
    pub fn advance(&mut self, now_ms: u64) -> Result<(), Cut> {
        if self.taken.events > 0 {
            self.session.taken(now_ms, std::mem::take(&mut self.taken));
        }
        self.session.advance(now_ms)
    }

    /// When [`Machine::advance`] next has something to do by itself.
    pub fn next_wake(&self, now_ms: u64) -> Option<u64> {
        self.session.next_wake(now_ms)
    }

    /// Moves the bytes to write to the end of `out`.
    pub fn take_output(&mut self, out: &mut Vec<u8>) {
        self.session.take_output(out);
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        self.session.take_events()
    }

    pub fn take_finished(&mut self) -> Vec<Finished> {
        let finished = |done| match done {
            Done::Sent(number, result) => Some(Finished::Sent(number, result)),
            Done::Delivered(number, result) => Some(Finished::Delivered(number, result)),
            Done::Answered(number, Ok(answer)) => told(answer).map(|told| Finished::Answered(number, Ok(told))),
            Done::Answered(number, Err(error)) => Some(Finished::Answered(number, Err(error))),
        };
        self.session.take_done().into_iter().filter_map(finished).collect()
    }

    pub fn is_online(&self) -> bool {
        self.session.is_online()
    }
}
