//! A scripted server in memory, for the tests and examples of this package: it speaks the wire, and fails on command.
//!
//! Not a model of the real one: no limits, no persistence, one lock. It runs on the runtime of the test. Invariant:
//! conversations have dense sequences and a duplicate filter, so that a client's resending can be judged.

mod people;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringline_schema::codec::{self, Codec, Encoder};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::{Amend, AmendAction, PresenceRow, Sync};
use ringline_schema::message::{
    self, Ack, BodyKind, ChatReply, ChatRequest, Class, Conversation, Credential, Extra, Fetch, GoawayReason,
    KickReason, Login, LoginOk, MessageState, Names, OnlineUser, Outcome, Place, Receipt, Reply, Request, SendAck,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Where the fake's clock stands, in Unix milliseconds: message n of a conversation is n later.
const EPOCH_MS: u64 = 1_700_000_000_000;

/// What happens to the next SEND that is read, instead of the usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trick {
    /// The connection breaks before anything is kept.
    BreakBeforeStore,
    /// The message is kept and delivered, and the connection breaks before the acknowledgement.
    BreakBeforeAck,
    Refuse(ErrorCode, u32),
    /// It is kept, acknowledged, and its delivery is lost without a word.
    LoseDelivery,
    /// It is kept and acknowledged, and the receiver is told LAGGED in place of a delivery.
    Lag,
    /// It is read, and never answered.
    Swallow,
}

#[derive(Clone)]
struct Stored {
    from: UserName,
    to: UserName,
    device: DeviceId,
    client_seq: u64,
    kind: message::BodyKind,
    body: Vec<u8>,
    ack_timeout: bool,
    /// Of an amendment: which message becomes what.
    amends: Option<(u64, MessageState)>,
}

struct Session {
    number: u64,
    user: UserName,
    device: DeviceId,
    out: mpsc::UnboundedSender<Out>,
}

enum Out {
    Bytes(Vec<u8>),
    Break,
}

#[derive(Default)]
struct State {
    users: HashMap<UserName, String>,
    conversations: BTreeMap<u128, ([UserName; 2], Vec<Stored>)>,
    first_kept: HashMap<u128, u64>,
    cursors: HashMap<(UserName, u64, u128), u64>,
    sessions: Vec<Session>,
    tricks: VecDeque<Trick>,
    /// Messages that a user has deleted for himself.
    hidden: BTreeSet<(UserName, u128, u64)>,
    /// Transient deliveries that wait for their acknowledgement: number → (session of the sender, client_seq).
    deliveries: HashMap<u64, (u64, u64)>,
    last_number: u64,
    mute: bool,
    ping_interval_ms: u32,
    refuse_connections: bool,
    logins: u64,
    sends_read: Vec<u64>,
    window: u32,
    page_rows: usize,
    without_sync: bool,
    /// What ROUTE answers; empty: that there is no such thing.
    route: String,
    routes: u64,
    /// Where a LOGIN is sent on to; empty: it is served.
    home: String,
    syncs: u64,
    statuses: HashMap<String, String>,
    /// What `people` has noted.
    asked: Vec<String>,
    /// What the next requests that `people` answers are told instead.
    refusals: VecDeque<ErrorCode>,
}

/// The server; it stops when this is dropped.
pub struct FakeServer {
    address: String,
    state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.task.abort();
        self.break_connections();
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeServer {
    /// Listens on a free port of the loopback.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let state = State { ping_interval_ms: 20_000, window: 64, page_rows: 3, ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let task = tokio::spawn(accept(listener, Arc::clone(&state)));
        Ok(Self { address, state, task })
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    pub fn add_user(&self, name: &str, password: &str) {
        if let Ok(name) = UserName::new(name) {
            locked(&self.state).users.insert(name, password.to_owned());
        }
    }

    /// Queues what happens to the next sends.
    pub fn trick(&self, trick: Trick) {
        locked(&self.state).tricks.push_back(trick);
    }

    /// Keeps a message as if another node had accepted it: nobody is told.
    pub fn store(&self, from: &str, to: &str, body: &str) {
        let (Ok(from), Ok(to)) = (UserName::new(from), UserName::new(to)) else { return };
        let stored = Stored {
            from,
            to,
            device: DeviceId(1),
            client_seq: 0,
            kind: message::BodyKind::Text,
            body: body.as_bytes().to_vec(),
            ack_timeout: false,
            amends: None,
        };
        locked(&self.state).append(stored);
    }

    /// Forgets messages below `first`, as retention does.
    pub fn truncate(&self, one: &str, other: &str, first: u64) {
        if let (Ok(one), Ok(other)) = (UserName::new(one), UserName::new(other)) {
            locked(&self.state).first_kept.insert(ConversationId::direct(&one, &other).0, first);
        }
    }

    /// All bodies of a conversation, in order.
    pub fn stored(&self, one: &str, other: &str) -> Vec<String> {
        let (Ok(one), Ok(other)) = (UserName::new(one), UserName::new(other)) else { return Vec::new() };
        let state = locked(&self.state);
        let conversation = state.conversations.get(&ConversationId::direct(&one, &other).0);
        let body = |stored: &Stored| String::from_utf8_lossy(&stored.body).into_owned();
        conversation.map(|(_, messages)| messages.iter().map(body).collect()).unwrap_or_default()
    }

    /// How far a device has acknowledged.
    pub fn acked(&self, user: &str, device: DeviceId, with: &str) -> u64 {
        let (Ok(user), Ok(with)) = (UserName::new(user), UserName::new(with)) else { return 0 };
        let id = ConversationId::direct(&user, &with).0;
        locked(&self.state).cursors.get(&(user, device.0, id)).copied().unwrap_or(0)
    }

    /// The client_seqs of all sends read so far, repeats included.
    pub fn sends_read(&self) -> Vec<u64> {
        locked(&self.state).sends_read.clone()
    }

    pub fn logins(&self) -> u64 {
        locked(&self.state).logins
    }

    pub fn break_connections(&self) {
        for session in &locked(&self.state).sessions {
            let _ = session.out.send(Out::Break);
        }
    }

    /// While set, connections are accepted and dropped at once.
    pub fn refuse_connections(&self, refuse: bool) {
        locked(&self.state).refuse_connections = refuse;
    }

    /// While set, nothing is answered: a half-open server.
    pub fn mute(&self, mute: bool) {
        locked(&self.state).mute = mute;
    }

    /// The heartbeat that the next logins are told.
    pub fn ping_interval(&self, interval: Duration) {
        locked(&self.state).ping_interval_ms = u32::try_from(interval.as_millis()).unwrap_or(u32::MAX);
    }

    /// While set, SYNC is a command that it does not know.
    pub fn without_sync(&self, without: bool) {
        locked(&self.state).without_sync = without;
    }

    /// The address that ROUTE answers; empty, as at the beginning: that there is no such command.
    pub fn route_to(&self, address: &str) {
        locked(&self.state).route = address.to_owned();
    }

    /// ROUTEs that were asked.
    pub fn routes(&self) -> u64 {
        locked(&self.state).routes
    }

    /// The address that LOGIN and REGISTER are sent on to; empty, as at the beginning: all users live here.
    pub fn redirect_to(&self, address: &str) {
        locked(&self.state).home = address.to_owned();
    }

    /// What a user says beside the name.
    pub fn status(&self, user: &str, status: &str) {
        locked(&self.state).statuses.insert(user.to_owned(), status.to_owned());
    }

    /// What was asked of groups, people and devices since this was called last, and which mentions messages had.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut locked(&self.state).asked)
    }

    /// Queues a refusal of what is asked next of groups, people or devices.
    pub fn refuse(&self, code: ErrorCode) {
        locked(&self.state).refusals.push_back(code);
    }

    /// Pages of SYNC that were asked for.
    pub fn syncs(&self) -> u64 {
        locked(&self.state).syncs
    }

    /// The window that the next logins are told.
    pub fn window(&self, sends_in_flight_max: u32) {
        locked(&self.state).window = sends_in_flight_max;
    }

    pub fn kick(&self, user: &str) {
        self.push(user, &Reply::Kicked { reason: KickReason::Replaced, detail: "" });
    }

    pub fn goaway(&self, user: &str, after: Duration) {
        let reconnect_after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        let reason = GoawayReason::ShuttingDown;
        self.push(user, &Reply::Goaway { reason, reconnect_after_ms, node: "", address: "" });
    }

    /// Tells a user to go on at that address.
    pub fn move_to(&self, user: &str, address: &str) {
        let (reason, node) = (GoawayReason::Moved, "other");
        self.push(user, &Reply::Goaway { reason, reconnect_after_ms: 0, node, address });
    }

    /// Pushes anything to all devices of a user.
    pub fn push(&self, user: &str, reply: &Reply<'_>) {
        locked(&self.state).push(user, reply);
    }

    /// Writes bytes that are no frame to all devices of a user.
    pub fn garbage(&self, user: &str) {
        for session in &locked(&self.state).sessions {
            if session.user.as_str() == user {
                let _ = session.out.send(Out::Bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()));
            }
        }
    }
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>) {
    while let Ok((socket, _)) = listener.accept().await {
        if !locked(&state).refuse_connections {
            tokio::spawn(serve(socket, Arc::clone(&state)));
        }
    }
}

async fn serve(mut socket: TcpStream, state: Arc<Mutex<State>>) {
    let number = {
        let mut state = locked(&state);
        state.last_number += 1;
        state.last_number
    };
    let (out, mut outgoing) = mpsc::unbounded_channel();
    let (mut decoder, mut input) = (FrameDecoder::new(), vec![0; 16 * 1024]);
    'connection: loop {
        tokio::select! {
            read = socket.read(&mut input) => {
                let Ok(count @ 1..) = read else { break };
                let mut bytes = input.get(..count).unwrap_or_default();
                while let Ok(Some(frame)) = decoder.next(&mut bytes, limits::FRAME_BYTES_MAX) {
                    let id = frame.header.request_id;
                    let keep_on = match codec::decode_request(&frame.header, frame.body) {
                        Ok(request) => locked(&state).request(&Asker { number, id, out: &out }, request),
                        Err(_) => false,
                    };
                    if !keep_on {
                        break 'connection;
                    }
                }
            }
            Some(item) = outgoing.recv() => match item {
                Out::Bytes(bytes) => {
                    if socket.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
                Out::Break => break,
            },
        }
    }
    locked(&state).sessions.retain(|session| session.number != number);
}

/// Who asks, and under which request id.
struct Asker<'a> {
    number: u64,
    id: u32,
    out: &'a mpsc::UnboundedSender<Out>,
}

impl Asker<'_> {
    fn answer(&self, reply: &Reply<'_>) {
        let mut bytes = Vec::new();
        Encoder::new().reply(Codec::FlatBuffers, self.id, reply, &mut bytes);
        let _ = self.out.send(Out::Bytes(bytes));
    }

    fn refuse(&self, code: ErrorCode, retry_after_ms: u32) {
        self.answer(&Reply::Failure { code, retry_after_ms, detail: "" });
    }
}

impl State {
    /// False: the connection breaks.
    fn request(&mut self, asker: &Asker<'_>, request: Request<'_>) -> bool {
        if self.mute {
            return true;
        }
        let node = "other";
        match request {
            Request::Register { .. } | Request::Login(_) if !self.home.is_empty() => {
                asker.answer(&Reply::Redirect { node, address: &self.home });
            }
            Request::Route { .. } if !self.route.is_empty() => {
                self.routes += 1;
                asker.answer(&Reply::RouteOk { node, address: &self.route });
            }
            Request::Register { user, password } => self.register(asker, user, password.0),
            Request::Login(login) => self.login(asker, &login),
            Request::Logout => {
                asker.answer(&Reply::LogoutOk);
                let _ = asker.out.send(Out::Break);
            }
            Request::Ping { stamp } => asker.answer(&Reply::Pong { stamp, server_time_ms: EPOCH_MS }),
            Request::Route { .. } => asker.refuse(ErrorCode::BadRequest, 0),
            Request::Send(_)
            | Request::Ack(_)
            | Request::Fetch(_)
            | Request::Online { .. }
            | Request::Conversations { .. }
            | Request::Group { .. }
            | Request::Chat(_) => {
                let session = self.sessions.iter().find(|session| session.number == asker.number);
                let Some((user, device)) = session.map(|session| (session.user.clone(), session.device)) else {
                    asker.refuse(ErrorCode::NotLoggedIn, 0);
                    return false;
                };
                return self.session_request(asker, (&user, device), request);
            }
        }
        true
    }

    fn session_request(&mut self, asker: &Asker<'_>, who: (&UserName, DeviceId), request: Request<'_>) -> bool {
        let (user, device) = who;
        self.asked.extend(people::note(&request));
        match request {
            Request::Send(send) => return self.send(asker, who, &send),
            Request::Ack(Ack::Upto { conversation, seq }) => {
                let cursor = self.cursors.entry((user.clone(), device.0, conversation.0)).or_default();
                *cursor = (*cursor).max(seq.0);
                self.durable_receipt(conversation, seq, device);
            }
            Request::Ack(Ack::Delivery(delivery)) => {
                if let Some((sender, client_seq)) = self.deliveries.remove(&delivery) {
                    let (conversation, seq) = (ConversationId(0), Seq::ZERO);
                    let outcome = Outcome::Delivered;
                    let receipt = Receipt { conversation, seq, client_seq, outcome, device };
                    self.push_where(&Reply::Receipt(receipt), |session| session.number == sender);
                }
            }
            Request::Fetch(fetch) => self.fetch(asker, user, &fetch),
            Request::Online { cursor, limit: _ } => self.online(asker, cursor),
            Request::Chat(ChatRequest::Sync(sync)) if !self.without_sync => self.sync(asker, who, &sync),
            Request::Chat(ChatRequest::Watch { users }) => self.watch(asker, users),
            Request::Chat(ChatRequest::Signal { to, kind, body }) => {
                let from = user.as_str();
                let conversation = ConversationId(0);
                self.push(to, &Reply::Chat(ChatReply::Signalled { conversation, from, to, kind, body }));
            }
            Request::Chat(ChatRequest::Amend(amend)) => return self.amend(asker, who, &amend),
            // Two pieces, cut within a line.
            Request::Chat(ChatRequest::Export { cursor }) => {
                let text = format!("{{\"type\":\"user\",\"name\":\"{}\"}}\n{{\"type\":\"row\"}}\n", user.as_str());
                let (first, second) = text.split_at(text.len() / 2);
                let (body, next) = if cursor.is_empty() { (first, "1") } else { (second, "") };
                asker.answer(&Reply::Chat(ChatReply::ExportOk { body: body.as_bytes(), next }));
            }
            Request::Chat(ChatRequest::DeleteUser { user: name, proof, .. }) => {
                let right = match (proof, self.users.get(user)) {
                    (Some(Credential::Password(message::Secret(given))), Some(password)) => {
                        name == user.as_str() && given == password
                    }
                    (_, _) => name != user.as_str(),
                };
                if !right {
                    asker.refuse(ErrorCode::AuthFailed, 0);
                    return true;
                }
                self.users.retain(|known, _| known.as_str() != name);
                asker.answer(&Reply::Chat(ChatReply::Done));
                self.push(name, &Reply::Kicked { reason: KickReason::UserDeleted, detail: "" });
            }
            Request::Group { .. } | Request::Chat(_) => match (self.refusals.pop_front(), people::answer(&request)) {
                (None, Some(reply)) => asker.answer(&reply),
                (code, _) => asker.refuse(code.unwrap_or(ErrorCode::Unsupported), 0),
            },
            Request::Conversations { cursor, limit } => self.list(asker, who, (cursor, limit)),
            Request::Register { .. }
            | Request::Login(_)
            | Request::Logout
            | Request::Ping { .. }
            | Request::Route { .. } => {}
        }
        true
    }

    fn register(&mut self, asker: &Asker<'_>, user: &str, password: &str) {
        let Ok(name) = UserName::new(user) else { return asker.refuse(ErrorCode::BadName, 0) };
        if self.users.contains_key(&name) {
            return asker.refuse(ErrorCode::NameTaken, 0);
        }
        if password.len() < limits::PASSWORD_BYTES_MIN {
            return asker.refuse(ErrorCode::BadPassword, 0);
        }
        self.users.insert(name, password.to_owned());
        asker.answer(&Reply::RegisterOk { user });
    }

    fn login(&mut self, asker: &Asker<'_>, login: &Login<'_>) {
        let known = self.users.get_key_value(login.user);
        let right = known.filter(|(_, password)| match login.credential {
            Credential::Password(secret) => secret.0 == password.as_str(),
            Credential::Token(secret) => secret.0 == format!("token of {}", login.user),
        });
        let Some(user) = right.map(|(name, _)| name.clone()) else { return asker.refuse(ErrorCode::AuthFailed, 0) };
        self.logins += 1;
        asker.answer(&Reply::LoginOk(LoginOk {
            user: login.user,
            session: asker.number,
            server_time_ms: EPOCH_MS,
            ping_interval_ms: self.ping_interval_ms,
            idle_timeout_ms: 60_000,
            frame_bytes_max: limits::FRAME_BYTES_MAX,
            sends_in_flight_max: self.window,
        }));
        self.sessions.push(Session { number: asker.number, user, device: login.device, out: asker.out.clone() });
    }

    fn send(&mut self, asker: &Asker<'_>, who: (&UserName, DeviceId), send: &message::Send<'_>) -> bool {
        let (from, device) = (who.0.clone(), who.1);
        self.sends_read.push(send.client_seq);
        let trick = self.tricks.pop_front();
        match trick {
            Some(Trick::BreakBeforeStore) => return false,
            Some(Trick::Refuse(code, after_ms)) => {
                asker.refuse(code, after_ms);
                return true;
            }
            Some(Trick::Swallow) => return true,
            Some(Trick::BreakBeforeAck | Trick::LoseDelivery | Trick::Lag) | None => {}
        }
        let Some(to) = self.users.get_key_value(send.to).map(|(name, _)| name.clone()) else {
            asker.refuse(ErrorCode::NoSuchUser, 0);
            return true;
        };
        let stored = Stored {
            from,
            to,
            device,
            client_seq: send.client_seq,
            kind: send.kind,
            body: send.body.to_vec(),
            ack_timeout: send.ack_timeout_ms.is_some(),
            amends: None,
        };
        match send.class {
            Class::Transient => self.send_transient(asker, stored),
            Class::Durable => return self.send_durable(asker, stored, trick),
        }
        true
    }

    /// Without any rule but that there must be such a message.
    fn amend(&mut self, asker: &Asker<'_>, who: (&UserName, DeviceId), amend: &Amend<'_>) -> bool {
        let ((from, device), at) = (who, amend.seq.0.wrapping_sub(1) as usize);
        let Ok(to) = UserName::new(amend.with) else { return false };
        let conversation = ConversationId::direct(from, &to);
        let known = self.conversations.get(&conversation.0).is_some_and(|(_, messages)| at < messages.len());
        let state = match amend.action {
            _ if !known => {
                asker.refuse(ErrorCode::NoSuchMessage, 0);
                return true;
            }
            AmendAction::DeleteForMe => {
                self.hidden.insert((from.clone(), conversation.0, amend.seq.0));
                asker.answer(&Reply::Chat(ChatReply::Done));
                let hidden = Reply::Chat(ChatReply::Hidden { conversation, seq: amend.seq });
                let others = |session: &Session| session.user == *from && session.number != asker.number;
                self.push_where(&hidden, others);
                return true;
            }
            AmendAction::Edit => MessageState::Edited,
            AmendAction::Recall => MessageState::Recalled,
            AmendAction::DeleteForAll => MessageState::Deleted,
        };
        let stored = Stored {
            from: from.clone(),
            to,
            device,
            client_seq: amend.client_seq,
            kind: BodyKind::Amendment,
            body: amend.body.to_vec(),
            ack_timeout: false,
            amends: Some((amend.seq.0, state)),
        };
        let trick = self.tricks.pop_front();
        self.send_durable(asker, stored, trick)
    }

    fn send_transient(&mut self, asker: &Asker<'_>, message: Stored) {
        if !self.sessions.iter().any(|session| session.user == message.to) {
            return asker.refuse(ErrorCode::NotOnline, 0);
        }
        self.last_number += 1;
        let delivery = if message.ack_timeout { self.last_number } else { 0 };
        if message.ack_timeout {
            self.deliveries.insert(delivery, (asker.number, message.client_seq));
        }
        let conversation = ConversationId::direct(&message.from, &message.to);
        asker.answer(&Reply::SendAck(SendAck { conversation, seq: Seq::ZERO, time_ms: EPOCH_MS, dup: false }));
        let wire = message::Message { class: Class::Transient, delivery, ..wire(conversation, 0, &message) };
        self.push_where(&Reply::Deliver(wire), |session| session.user == message.to && session.number != asker.number);
    }

    fn send_durable(&mut self, asker: &Asker<'_>, message: Stored, trick: Option<Trick>) -> bool {
        let conversation = ConversationId::direct(&message.from, &message.to);
        let known = self.conversations.get(&conversation.0).and_then(|(_, messages)| {
            let same = |stored: &Stored| (stored.device, stored.client_seq) == (message.device, message.client_seq);
            messages.iter().position(same)
        });
        let (seq, dup) = match known {
            Some(at) => (at as u64 + 1, true),
            None => (self.append(message.clone()), false),
        };
        if !dup {
            self.deliver(asker, conversation, (seq, &message), trick);
        }
        if trick == Some(Trick::BreakBeforeAck) {
            return false;
        }
        asker.answer(&Reply::SendAck(SendAck { conversation, seq: Seq(seq), time_ms: EPOCH_MS + seq, dup }));
        true
    }

    fn deliver(&self, asker: &Asker<'_>, conversation: ConversationId, new: (u64, &Stored), trick: Option<Trick>) {
        let (seq, message) = new;
        let others = |session: &Session| {
            (session.user == message.to || session.user == message.from) && session.number != asker.number
        };
        if trick == Some(Trick::Lag) {
            let (from, to, with) = (Seq(seq), Seq(seq), message.from.as_str());
            self.push_where(&Reply::Lagged { conversation, with, from, to }, others);
        } else if trick != Some(Trick::LoseDelivery) {
            self.push_where(&Reply::Deliver(wire(conversation, seq, message)), others);
        }
    }

    fn append(&mut self, message: Stored) -> u64 {
        let id = ConversationId::direct(&message.from, &message.to);
        let members = [message.from.clone(), message.to.clone()];
        let (_, messages) = self.conversations.entry(id.0).or_insert((members, Vec::new()));
        messages.push(message);
        messages.len() as u64
    }

    fn durable_receipt(&self, conversation: ConversationId, seq: Seq, device: DeviceId) {
        let Some((_, messages)) = self.conversations.get(&conversation.0) else { return };
        let Some(message) = seq.0.checked_sub(1).and_then(|at| messages.get(at as usize)) else { return };
        if message.ack_timeout && message.device != device {
            let (client_seq, outcome) = (message.client_seq, Outcome::Delivered);
            let receipt = Receipt { conversation, seq, client_seq, outcome, device };
            self.push_where(&Reply::Receipt(receipt), |session| session.device == message.device);
        }
    }

    fn fetch(&self, asker: &Asker<'_>, user: &UserName, fetch: &Fetch<'_>) {
        let Ok(with) = UserName::new(fetch.with) else { return asker.refuse(ErrorCode::BadName, 0) };
        let id = ConversationId::direct(user, &with);
        let Some((_, stored)) = self.conversations.get(&id.0) else {
            return asker.refuse(ErrorCode::NoSuchConversation, 0);
        };
        let first = self.first_kept.get(&id.0).copied().unwrap_or(1);
        if fetch.after.0 + 1 < first && !fetch.newest {
            return asker.refuse(ErrorCode::Truncated, 0);
        }
        let wanted = |seq: u64| seq >= first && seq > fetch.after.0 && fetch.before.is_none_or(|before| seq < before.0);
        let shown = |(seq, message): (u64, &'_ Stored)| {
            let changed = stored.iter().rev().find(|row| row.amends.is_some_and(|(of, _)| of == seq));
            let hidden = self.hidden.contains(&(user.clone(), id.0, seq));
            let state = if hidden { Some(MessageState::Hidden) } else { changed.and_then(|row| Some(row.amends?.1)) };
            let Some(state) = state else { return (seq, message.clone(), MessageState::AsSent) };
            let body = changed.filter(|_| state == MessageState::Edited).map_or(Vec::new(), |row| row.body.clone());
            (seq, Stored { body, ..message.clone() }, state)
        };
        let rows: Vec<_> = (1..).zip(stored).filter(|(seq, _)| wanted(*seq)).map(shown).collect();
        let rows = rows.iter().map(|(seq, message, state)| match state {
            MessageState::AsSent => wire(id, *seq, message),
            state => message::Message { extra: Extra { state: *state, ..Extra::default() }, ..wire(id, *seq, message) },
        });
        let mut messages: Vec<_> = rows.collect();
        // Small pages, so that a few messages exercise paging; a person's question is answered in full.
        let limit = if fetch.newest { usize::from(fetch.limit.max(1)) } else { self.page_rows };
        let excess = messages.len().saturating_sub(limit);
        if fetch.newest {
            messages.drain(..excess);
        } else {
            messages.truncate(limit);
        }
        let (first, head) = (Seq(first), Seq(stored.len() as u64));
        asker.answer(&Reply::FetchOk { conversation: id, first, head, messages });
    }

    fn watch(&self, asker: &Asker<'_>, users: Names<'_>) {
        let row = |user: &'_ str| {
            let online = self.sessions.iter().any(|session| session.user.as_str() == user);
            (user.to_owned(), online, self.statuses.get(user).cloned().unwrap_or_default())
        };
        let rows: Vec<_> = users.iter().map(row).collect();
        let users =
            rows.iter().map(|(user, online, status)| PresenceRow { user, online: *online, last_seen_ms: 0, status });
        asker.answer(&Reply::Chat(ChatReply::PresenceOk { users: users.collect() }));
    }

    /// Pages of at most three messages.
    fn sync(&mut self, asker: &Asker<'_>, (user, device): (&UserName, DeviceId), sync: &Sync<'_>) {
        self.syncs += 1;
        let (mut messages, mut end) = (Vec::new(), Place::default());
        for (&id, (members, stored)) in self.conversations.range(sync.from.conversation.0..) {
            if !members.contains(user) {
                continue;
            }
            let conversation = ConversationId(id);
            let told = sync.places.iter().find(|place| place.conversation == conversation).map(|place| place.seq.0);
            let acked = self.cursors.get(&(user.clone(), device.0, id)).copied().unwrap_or(0);
            let from = if sync.from.conversation == conversation { sync.from.seq.0 } else { 0 };
            let after = told.unwrap_or(acked).max(from);
            let first = self.first_kept.get(&id).copied().unwrap_or(1);
            if after != 0 && after + 1 < first && after < stored.len() as u64 {
                if messages.is_empty() {
                    return asker.answer(&Reply::Chat(ChatReply::Truncated { conversation, first: Seq(first) }));
                }
                end = Place { conversation, seq: Seq(after) };
                break;
            }
            let missed = (1..).zip(stored).filter(|(seq, _)| *seq > after && *seq >= first);
            let room = self.page_rows - messages.len();
            messages.extend(missed.clone().take(room).map(|(seq, stored)| wire(conversation, seq, stored)));
            if missed.count() > room {
                let seq = messages
                    .last()
                    .filter(|last| last.conversation == conversation)
                    .map_or(Seq(after), |last| last.seq);
                end = Place { conversation, seq };
                break;
            }
        }
        asker.answer(&Reply::Chat(ChatReply::SyncOk { messages, next: end }));
    }

    fn online(&self, asker: &Asker<'_>, cursor: &str) {
        let mut users: BTreeMap<&str, u16> = BTreeMap::new();
        for session in self.sessions.iter().filter(|session| session.user.as_str() > cursor) {
            *users.entry(session.user.as_str()).or_default() += 1;
        }
        let page: Vec<_> =
            users.iter().take(self.page_rows).map(|(&user, &devices)| OnlineUser { user, devices }).collect();
        let more = users.len() > page.len();
        let next = page.last().filter(|_| more).map_or("", |row| row.user);
        asker.answer(&Reply::OnlineOk { next, users: page.clone() });
    }

    fn list(&self, asker: &Asker<'_>, who: (&UserName, DeviceId), page: (ConversationId, u16)) {
        let ((user, device), (cursor, limit)) = (who, page);
        let limit = self.page_rows.min(usize::from(limit.max(1)));
        let mut conversations = Vec::new();
        for (&id, (members, messages)) in self.conversations.range(cursor.0.saturating_add(1)..) {
            let [one, other] = members;
            if members.contains(user) && conversations.len() <= limit {
                conversations.push(Conversation {
                    conversation: ConversationId(id),
                    with: if one == user { other.as_str() } else { one.as_str() },
                    first: Seq(self.first_kept.get(&id).copied().unwrap_or(1)),
                    head: Seq(messages.len() as u64),
                    last_time_ms: EPOCH_MS + messages.len() as u64,
                    acked: Seq(self.cursors.get(&(user.clone(), device.0, id)).copied().unwrap_or(0)),
                    ..Default::default()
                });
            }
        }
        let more = conversations.len() > limit;
        conversations.truncate(limit);
        let last = conversations.last().map(|row| row.conversation);
        let next = last.filter(|_| more).unwrap_or(ConversationId(0));
        asker.answer(&Reply::ConversationsOk { conversations, next });
    }

    fn push(&self, user: &str, reply: &Reply<'_>) {
        self.push_where(reply, |session| session.user.as_str() == user);
    }

    fn push_where(&self, reply: &Reply<'_>, wanted: impl Fn(&Session) -> bool) {
        let mut bytes = Vec::new();
        Encoder::new().reply(Codec::FlatBuffers, 0, reply, &mut bytes);
        for session in self.sessions.iter().filter(|session| wanted(session)) {
            let _ = session.out.send(Out::Bytes(bytes.clone()));
        }
    }
}

fn wire(conversation: ConversationId, seq: u64, stored: &Stored) -> message::Message<'_> {
    message::Message {
        conversation,
        seq: Seq(seq),
        time_ms: EPOCH_MS + seq,
        from: stored.from.as_str(),
        to: stored.to.as_str(),
        device: stored.device,
        client_seq: stored.client_seq,
        class: Class::Durable,
        kind: stored.kind,
        delivery: 0,
        body: &stored.body,
        extra: stored.amends.map_or_else(Extra::default, |(of, state)| Extra {
            refers: Seq(of),
            state,
            ..Extra::default()
        }),
    }
}
