//! What an application holds: the builder, the [`Client`] to ask with, the [`Events`] to listen to.
//!
//! Handles only: everything happens in the client's task (`connection`). Dropping a future of a [`Client`] never loses
//! or doubles anything: a send goes on without its listener.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, UserName};
use ringline_schema::limits;
use ringline_schema::message::DeviceKind;
use tokio::sync::{mpsc, oneshot};

use crate::addresses::Addresses;
use crate::amend::Amends;
use crate::connection::{self, Command, Connection, Ends, Proof, Shared, TokenFuture};
use crate::pending::{
    Accepted, Answer, CallError, ConversationPage, Delivery, History, HistoryRange, OnlinePage, Outgoing, Query,
    SendError, SendOptions,
};
use crate::session::{CloseReason, Config, Cut, Event, LinkError, Session};
use crate::streams::CatchUp;

/// Default of [`ClientBuilder::sends_queued_max`].
const SENDS_QUEUED_MAX: usize = 1_024;
/// Default of [`ClientBuilder::events_queued_max`].
const EVENTS_QUEUED_MAX: usize = 1_024;
/// Names this library in the server's log.
const AGENT: &str = concat!("ringline-rust/", env!("CARGO_PKG_VERSION"));
/// How long a call (history, lists) waits for its answer, reconnections included.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why [`ClientBuilder::connect`] or [`ClientBuilder::register`] did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("{}", ErrorCode::BadName.text())]
    BadName,
    /// The builder has no password and no token provider.
    #[error("no password or token was given")]
    NoCredential,
    /// Also for a user that does not exist: the server does not say which.
    #[error("{}", ErrorCode::AuthFailed.text())]
    AuthFailed,
    #[error("refused: {code}")]
    Refused { code: ErrorCode, detail: String },
    /// Trying again may help.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl From<Cut> for ConnectError {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Lost(LinkError::Refused(code)) => Self::Refused { code, detail: String::new() },
            Cut::Lost(why) => Self::Link(why),
            Cut::End(CloseReason::AuthFailed) => Self::AuthFailed,
            Cut::End(CloseReason::Refused { code, detail }) => Self::Refused { code, detail },
            Cut::End(CloseReason::Kicked { .. } | CloseReason::ByClient) => Self::Link(LinkError::ServerClosed),
        }
    }
}

/// How to connect. Made by [`Client::builder`].
#[derive(Clone)]
#[must_use]
pub struct ClientBuilder {
    address: String,
    user: String,
    proof: Option<Proof>,
    device: DeviceId,
    device_kind: DeviceKind,
    agent: String,
    catch_up: CatchUp,
    sends_queued_max: usize,
    events_queued_max: usize,
}

impl ClientBuilder {
    #[cfg(feature = "chat")]
    pub(crate) fn name(&self) -> &str {
        &self.user
    }

    /// Log in as this user.
    pub fn user(mut self, name: &str) -> Self {
        name.clone_into(&mut self.user);
        self
    }

    /// Log in with a password. It is kept in memory, to log in again after a lost connection.
    pub fn password(mut self, password: &str) -> Self {
        self.proof = Some(Proof::Password(password.to_owned()));
        self
    }

    /// Log in with a token, asked for anew for each connection. An error counts as a failed attempt to connect.
    pub fn token(mut self, provider: impl Fn() -> TokenFuture + Send + Sync + 'static) -> Self {
        self.proof = Some(Proof::Token(Arc::new(provider)));
        self
    }

    /// Names this device of the user; not 0. Choose it once and keep it: the server remembers by it how far the device
    /// has read and which of its sends it knows. The default is a new one: a device that has read nothing.
    pub fn device(mut self, device: DeviceId) -> Self {
        self.device = device;
        self
    }

    /// For servers that allow one device of a kind.
    pub fn device_kind(mut self, kind: DeviceKind) -> Self {
        self.device_kind = kind;
        self
    }

    fn addresses(&self) -> Addresses {
        Addresses::new(&self.address, rand::random_range(0..=usize::MAX))
    }

    /// Names the application in the server's log.
    pub fn agent(mut self, agent: &str) -> Self {
        agent.clone_into(&mut self.agent);
        self
    }

    /// What to fetch when a connection begins; see [`CatchUp`].
    pub fn catch_up(mut self, catch_up: CatchUp) -> Self {
        self.catch_up = catch_up;
        self
    }

    /// Sends that may be unfinished at once; one more is [`SendError::QueueFull`]. 1,024 if not set. They take up to
    /// so many frames of memory (64 KiB each by default).
    pub fn sends_queued_max(mut self, count: usize) -> Self {
        self.sends_queued_max = count.max(1);
        self
    }

    /// Events that may wait for [`Events::next`]; above it durable messages wait at the server and others are dropped
    /// and counted. 1,024 if not set.
    pub fn events_queued_max(mut self, count: usize) -> Self {
        self.events_queued_max = count.max(1);
        self
    }

    /// Registers the user with the password of this builder, on a connection of its own. Log in by
    /// [`Self::connect`] afterwards.
    pub async fn register(&self) -> Result<(), ConnectError> {
        let user = UserName::new(&self.user).map_err(|_| ConnectError::BadName)?;
        let Some(Proof::Password(password)) = self.proof.clone() else { return Err(ConnectError::NoCredential) };
        connection::register(self.addresses(), &user, password).await
    }

    /// Connects and logs in: one attempt. Once it has succeeded, the client reconnects by itself for as long as it
    /// lives. Must be called within a tokio runtime with I/O and time; the task of the client lives there.
    ///
    /// Drop the [`Events`] to only send: then nothing is received, and nothing acknowledged.
    pub async fn connect(self) -> Result<(Client, Events), ConnectError> {
        let user = UserName::new(&self.user).map_err(|_| ConnectError::BadName)?;
        let addresses = self.addresses();
        let proof = self.proof.ok_or(ConnectError::NoCredential)?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let session = Session::new(Config {
            user: user.clone(),
            device: self.device,
            device_kind: self.device_kind,
            agent: self.agent,
            catch_up: self.catch_up,
            sends_queued_max: self.sends_queued_max,
            events_queued_max: self.events_queued_max,
            first_client_seq: u64::try_from(since_1970.as_micros()).unwrap_or(1),
        });
        let (command_sender, commands) = mpsc::channel(self.sends_queued_max);
        let (events, event_receiver) = mpsc::channel(self.events_queued_max);
        let shared = Arc::new(Shared::default());
        let ends = Ends { commands, events, shared: Arc::clone(&shared) };
        let mut connection = Connection::new(addresses, proof, session, ends);
        let link = connection.connect(Duration::ZERO).await?;
        tokio::spawn(connection.run(link));
        let client = Client { commands: command_sender, user, device: self.device };
        Ok((client, Events { receiver: event_receiver, shared, last: None, ended: false }))
    }
}

/// One logged-in user. Clones speak over the same connection, which closes when the last is dropped.
#[derive(Clone)]
pub struct Client {
    pub(crate) commands: mpsc::Sender<Command>,
    user: UserName,
    device: DeviceId,
}

impl Client {
    /// Begins to describe a client of the server at `address`, `host:port`; of a cluster, several nodes with commas between
    /// them. Any of them is asked for the route, and whichever answers sends the client on to the node that its user lives
    /// on; one address may as well be that of a balancer before all nodes. Where the client is told to go it stays until
    /// that can't be reached.
    pub fn builder(address: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            address: address.into(),
            user: String::new(),
            proof: None,
            device: DeviceId(rand::random_range(1..=u64::MAX)),
            device_kind: DeviceKind::default(),
            agent: AGENT.to_owned(),
            catch_up: CatchUp::default(),
            sends_queued_max: SENDS_QUEUED_MAX,
            events_queued_max: EVENTS_QUEUED_MAX,
        }
    }

    pub fn user(&self) -> &UserName {
        &self.user
    }

    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Sends a durable text. It is queued before this returns: messages go out in the order of the calls, awaited or
    /// not, and one that the server refuses for a while (`BUSY`) may be passed by others that it was in flight with.
    pub fn send(&self, to: &str, body: impl Into<Bytes>) -> Sending {
        self.send_with(to, body, SendOptions::default())
    }

    /// Sends with options.
    pub fn send_with(&self, to: &str, body: impl Into<Bytes>, options: SendOptions) -> Sending {
        self.queue(to, body.into(), options, None)
    }

    pub(crate) fn queue(&self, to: &str, body: Bytes, options: SendOptions, amends: Option<Amends>) -> Sending {
        let (accepted, accepted_receiver) = oneshot::channel();
        let (delivered, delivered_receiver) = match options.delivery_timeout {
            Some(_) => Some(oneshot::channel()).unzip(),
            None => (None, None),
        };
        let sending = Sending { accepted: accepted_receiver, delivered: delivered_receiver };
        let refuse = |command: Command, error: SendError| {
            if let Command::Send { accepted, delivered, .. } = command {
                // The receivers are in `sending`, so these can't fail.
                let _ = accepted.send(Err(error.clone()));
                let _ = delivered.map(|delivered| delivered.send(Err(error)));
            }
        };
        let name = UserName::new(to);
        let known_name = name.is_ok();
        let outgoing = Outgoing { to: name.unwrap_or_else(|_| self.user.clone()), body, options, amends };
        let command = Command::Send { outgoing, accepted, delivered };
        if !known_name {
            refuse(command, SendError::BadName);
            return sending;
        }
        match self.commands.try_send(command) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(command)) => refuse(command, SendError::QueueFull),
            Err(mpsc::error::TrySendError::Closed(command)) => refuse(command, SendError::NotSent),
        }
        sending
    }

    /// Reads a piece of the conversation with a user. Only reads: nothing is acknowledged, [`Events`] are not affected.
    pub async fn history(&self, with: &str, range: HistoryRange) -> Result<History, CallError> {
        let with = UserName::new(with).map_err(|_| CallError::BadName)?;
        match self.call(Query::History { with, range }).await? {
            Answer::History(history) => Ok(history),
            Answer::Online(_)
            | Answer::Conversations(_)
            | Answer::Social(_)
            | Answer::Account(_)
            | Answer::Group(_) => Err(CallError::Closed),
        }
    }

    /// A page of this user's conversations: from the first with `None`, then from the `next` of the page before. At
    /// most 200 rows; `limit` 0 stands for 50.
    pub async fn conversations(&self, from: Option<ConversationId>, limit: u16) -> Result<ConversationPage, CallError> {
        let cursor = from.unwrap_or(ConversationId(0));
        match self.call(Query::Conversations { cursor, limit }).await? {
            Answer::Conversations(page) => Ok(page),
            Answer::Online(_) | Answer::History(_) | Answer::Social(_) | Answer::Account(_) | Answer::Group(_) => {
                Err(CallError::Closed)
            }
        }
    }

    /// A page of who is online, in order of name: from the first with `None`, then from the `next` of the page before.
    /// At most 200 rows; `limit` 0 stands for 50.
    pub async fn online(&self, from: Option<&str>, limit: u16) -> Result<OnlinePage, CallError> {
        let cursor = from.unwrap_or_default();
        if cursor.len() > limits::USER_NAME_BYTES_MAX {
            return Err(CallError::BadName);
        }
        match self.call(Query::Online { cursor: cursor.to_owned(), limit }).await? {
            Answer::Online(page) => Ok(page),
            Answer::History(_)
            | Answer::Conversations(_)
            | Answer::Social(_)
            | Answer::Account(_)
            | Answer::Group(_) => Err(CallError::Closed),
        }
    }

    pub(crate) async fn call(&self, query: Query) -> Result<Answer, CallError> {
        let (answered, answer) = oneshot::channel();
        let command = Command::Call { query, timeout: CALL_TIMEOUT, answered };
        self.commands.send(command).await.map_err(|_| CallError::Closed)?;
        answer.await.unwrap_or(Err(CallError::Closed))
    }

    /// Closes for all clones: waits until every send has its answer, but no longer than `patience`, acknowledges what
    /// was received and logs out.
    pub async fn close(self, patience: Duration) {
        // If the task is gone, it is closed.
        let _ = self.commands.send(Command::Close { patience }).await;
        self.commands.closed().await;
    }
}

/// A message on its way. Await it for the server's acknowledgement; dropped, the message goes on all the same.
#[must_use = "await it to know whether the server has the message"]
pub struct Sending {
    accepted: oneshot::Receiver<Result<Accepted, SendError>>,
    delivered: Option<oneshot::Receiver<Result<Delivery, SendError>>>,
}

impl Sending {
    /// Waits until a device of the receiver has acknowledged the message, or did not in time. Only for sends with
    /// [`SendOptions::delivery_timeout`]. To have both answers, await `&mut sending` first.
    pub async fn delivered(self) -> Result<Delivery, SendError> {
        match self.delivered {
            Some(delivered) => delivered.await.unwrap_or(Err(SendError::Unknown)),
            None => Err(SendError::DeliveryNotAsked),
        }
    }
}

impl Future for Sending {
    type Output = Result<Accepted, SendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // The task is gone without a word only when its runtime was shut down: it may have written the message.
        Pin::new(&mut self.accepted).poll(context).map(|result| result.unwrap_or(Err(SendError::Unknown)))
    }
}

/// What happens to a client, in order; every conversation as one stream without gap or duplicate.
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
    /// Handed out last; taken when the next is asked for.
    last: Option<Event>,
    ended: bool,
}

impl Events {
    /// The next event; `None` after [`Event::Closed`].
    ///
    /// Asking for the next event says that the last is dealt with: only then is a message acknowledged to the server,
    /// so one that the application did not finish comes again after a restart. Cancellation-safe.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(last) = self.last.take() {
            self.shared.take(&last);
        }
        if let Some(event) = self.receiver.recv().await {
            self.last = Some(event.clone());
            return Some(event);
        }
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        Some(Event::Closed { why: self.shared.close_reason() })
    }
}
