//! A small scripted server on loopback: it speaks the schema codec, and breaks its promises on demand.
//!
//! One blocking thread a connection, one lock around everything else: order is kept by construction, so every fault
//! that the generator reports was planted by the [`Script`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringline_schema::codec::{Codec, Encoder, decode_request};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::{Flags, Frame, FrameDecoder};
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::chat::Sync;
use ringline_schema::message::{
    Ack, BodyKind, ChatReply, ChatRequest, Class, Credential, Extra, GroupAct, GroupReply, LoginOk, Message, Place,
    Reply, Request, Send, SendAck,
};
use socket2::SockRef;

/// Makes a socket fill up soon.
const SMALL_BUFFER_BYTES: usize = 64 * 1024;

/// What the server does wrong. A number n means every n-th message, counted over all; 0 never.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    pub lose: u64,
    pub duplicate: u64,
    /// Hold this one back until the next for the same receiver has gone.
    pub swap: u64,
    pub corrupt: u64,
    /// Deliver to the sender what was for another.
    pub misdeliver: u64,
    /// Refuse with BUSY before accepting it at the next try.
    pub busy: u64,
    /// Accept, but never answer.
    pub mute: u64,
    /// Do not push, say LAGGED instead.
    pub lag: u64,
    /// Close the connection of the sender.
    pub hang_up: u64,
    /// Leave the second message of each page of a SYNC out.
    pub sync_gap: bool,
    pub refuse_login: bool,
    /// Read nothing for so long after the login, through a small socket buffer.
    pub read_pause_ms: u64,
    pub ping_interval_ms: u32,
    pub sends_in_flight_max: u32,
}

impl Script {
    pub const GOOD: Self = Self {
        lose: 0,
        duplicate: 0,
        swap: 0,
        corrupt: 0,
        misdeliver: 0,
        busy: 0,
        mute: 0,
        lag: 0,
        hang_up: 0,
        sync_gap: false,
        refuse_login: false,
        read_pause_ms: 0,
        ping_interval_ms: 20_000,
        sends_in_flight_max: 64,
    };
}

/// What the server has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub logins: u64,
    /// Messages accepted, each once.
    pub accepted: u64,
    pub busy: u64,
    pub pings: u64,
    pub cursors: u64,
    pub fetches: u64,
    pub syncs: u64,
    pub reads: u64,
}

struct Stored {
    seq: u64,
    from: String,
    to: String,
    client_seq: u64,
    body: Vec<u8>,
}

#[derive(Default)]
struct State {
    seen: Seen,
    users: HashMap<String, TcpStream>,
    history: BTreeMap<ConversationId, Vec<Stored>>,
    /// Members of each group.
    groups: HashMap<String, Vec<String>>,
    refused: HashSet<(String, u64)>,
    held: HashMap<String, Vec<u8>>,
}

/// A listening server; its threads end with their connections.
pub struct Server {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        if script.read_pause_ms > 0 {
            SockRef::from(&listener).set_recv_buffer_size(SMALL_BUFFER_BYTES).unwrap();
        }
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || Connection::new(stream, script, state).serve());
            }
        });
        Self { address, state }
    }

    pub fn seen(&self) -> Seen {
        lock(&self.state).seen
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Connection {
    stream: TcpStream,
    script: Script,
    state: Arc<Mutex<State>>,
    encoder: Encoder,
    user: String,
}

impl Connection {
    fn new(stream: TcpStream, script: Script, state: Arc<Mutex<State>>) -> Self {
        stream.set_nodelay(true).unwrap();
        Self { stream, script, state, encoder: Encoder::new(), user: String::new() }
    }

    fn serve(mut self) {
        let (mut decoder, mut buffer) = (FrameDecoder::new(), vec![0; 16 * 1024]);
        let mut pause = Duration::from_millis(self.script.read_pause_ms);
        loop {
            let Ok(bytes @ 1..) = self.stream.read(&mut buffer) else { return };
            let mut input = &buffer[..bytes];
            while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
                self.on_frame(&frame);
            }
            std::thread::sleep(std::mem::take(&mut pause));
        }
    }

    fn on_frame(&mut self, frame: &Frame<'_>) {
        let id = frame.header.request_id;
        match decode_request(&frame.header, frame.body).unwrap() {
            Request::Login(login) => {
                assert!(matches!(login.credential, Credential::Token(_)));
                if self.script.refuse_login {
                    return self.fail(id, ErrorCode::AuthFailed);
                }
                self.user = login.user.to_owned();
                let stream = self.stream.try_clone().unwrap();
                let state = Arc::clone(&self.state);
                let mut state = lock(&state);
                state.users.insert(self.user.clone(), stream);
                state.seen.logins += 1;
                let ok = LoginOk {
                    user: login.user,
                    session: 1,
                    server_time_ms: 1,
                    ping_interval_ms: self.script.ping_interval_ms,
                    idle_timeout_ms: 60_000,
                    frame_bytes_max: 65_536,
                    sends_in_flight_max: self.script.sends_in_flight_max,
                };
                self.answer(id, &Reply::LoginOk(ok));
            }
            Request::Send(send) => self.on_send((id, frame.header.flags != Flags::NO_REPLY), &send),
            Request::Group { group, act: GroupAct::Create { .. } | GroupAct::Join { .. } } => {
                // In one step: members join side by side.
                lock(&self.state).groups.entry(group.to_owned()).or_default().push(self.user.clone());
                let (conversation, seq) = (conversation(&self.user, group), Seq(1));
                self.answer(id, &Reply::Group(GroupReply::Ok { conversation, seq, standing: None }));
            }
            Request::Chat(ChatRequest::Read { .. }) => {
                lock(&self.state).seen.reads += 1;
                self.answer(id, &Reply::Chat(ChatReply::Done));
            }
            Request::Chat(ChatRequest::Sync(sync)) => self.on_sync(id, &sync),
            Request::Ping { stamp } => {
                let state = Arc::clone(&self.state);
                let mut state = lock(&state);
                state.seen.pings += 1;
                self.answer(id, &Reply::Pong { stamp, server_time_ms: 1 });
            }
            Request::Ack(Ack::Upto { seq, .. }) => {
                assert!(seq > Seq::ZERO);
                lock(&self.state).seen.cursors += 1;
            }
            Request::Fetch(fetch) => {
                let conversation = conversation(&self.user, fetch.with);
                let state = Arc::clone(&self.state);
                let mut state = lock(&state);
                state.seen.fetches += 1;
                let wanted = |stored: &&Stored| {
                    stored.seq > fetch.after.0 && fetch.before.is_none_or(|before| stored.seq < before.0)
                };
                let rows = state.history.get(&conversation).into_iter().flatten().filter(wanted);
                let messages = rows.map(|stored| wire(conversation, stored)).collect();
                self.answer(id, &Reply::FetchOk { conversation, first: Seq(1), head: Seq(1), messages });
            }
            other => panic!("the generator sends no {other:?}"),
        }
    }

    fn answer(&mut self, id: u32, reply: &Reply<'_>) {
        let bytes = self.encoded(id, reply);
        // A client that is gone needs no answer.
        let _ = self.stream.write_all(&bytes);
    }

    fn encoded(&mut self, id: u32, reply: &Reply<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.encoder.reply(Codec::FlatBuffers, id, reply, &mut bytes);
        bytes
    }

    fn fail(&mut self, id: u32, code: ErrorCode) {
        self.answer(id, &Reply::Failure { code, retry_after_ms: 5, detail: "" });
    }

    fn on_sync(&mut self, id: u32, sync: &Sync<'_>) {
        let (user, state) = (self.user.clone(), Arc::clone(&self.state));
        let mut state = lock(&state);
        state.seen.syncs += 1;
        let own = |stored: &&Stored| stored.from == user || stored.to == user;
        let rows = state.history.iter().flat_map(|(id, log)| log.iter().filter(own).map(|stored| (*id, stored)));
        let place = |id, stored: &Stored| Place { conversation: id, seq: Seq(stored.seq) };
        let known = |at: Place| sync.places.iter().any(|known| known.conversation == at.conversation && known >= at);
        let mut rows = rows.filter(|(id, stored)| place(*id, stored) > sync.from && !known(place(*id, stored)));
        let page: Vec<_> = rows.by_ref().take(sync.limit.into()).collect();
        let more = rows.next().is_some();
        let next = page.last().filter(|_| more).map(|(id, stored)| place(*id, stored)).unwrap_or_default();
        let left_out = |at: &usize| !(self.script.sync_gap && *at == 1);
        let given = (0..).zip(&page).filter(|(at, _)| left_out(at));
        let messages = given.map(|(_, (id, stored))| wire(*id, stored)).collect();
        self.answer(id, &Reply::Chat(ChatReply::SyncOk { messages, next }));
    }

    fn on_send(&mut self, (id, answered): (u32, bool), send: &Send<'_>) {
        let (script, state) = (self.script, Arc::clone(&self.state));
        let mut state = lock(&state);
        let count = state.seen.accepted + state.seen.busy + 1;
        let planted = |every: u64| every > 0 && count.is_multiple_of(every);
        let key = (self.user.clone(), send.client_seq);
        if planted(script.busy) && !state.refused.contains(&key) {
            state.refused.insert(key);
            state.seen.busy += 1;
            return self.fail(id, ErrorCode::Busy);
        }
        state.seen.accepted += 1;
        if planted(script.hang_up) {
            let _ = self.stream.shutdown(Shutdown::Both);
            return;
        }
        let conversation = conversation(&self.user, send.to);
        let history = state.history.entry(conversation).or_default();
        let stored = Stored {
            seq: if send.class == Class::Durable { history.len() as u64 + 1 } else { 0 },
            from: self.user.clone(),
            to: send.to.to_owned(),
            client_seq: send.client_seq,
            body: send.body.to_vec(),
        };
        let seq = Seq(stored.seq);
        if answered && !planted(script.mute) {
            self.answer(id, &Reply::SendAck(SendAck { conversation, seq, time_ms: 1, dup: false }));
        }
        let mut pushed = wire(conversation, &stored);
        let broken = [&send.body[..send.body.len() - 1], b"!"].concat();
        if planted(script.corrupt) {
            pushed.body = &broken;
        }
        let push = self.encoded(0, &Reply::Deliver(pushed));
        let receiver = if planted(script.misdeliver) { &self.user } else { &stored.to }.clone();
        let lagged = Reply::Lagged { conversation, with: &stored.from, from: seq, to: seq };
        let frames = match () {
            () if planted(script.lose) => Vec::new(),
            () if planted(script.lag) => self.encoded(0, &lagged),
            () if planted(script.duplicate) => push.repeat(2),
            () if planted(script.swap) => {
                let earlier = state.held.insert(receiver.clone(), push);
                earlier.unwrap_or_default()
            }
            () => [push, state.held.remove(&receiver).unwrap_or_default()].concat(),
        };
        if send.class == Class::Durable {
            state.history.entry(conversation).or_default().push(stored);
        }
        let members = state.groups.get(&receiver).cloned().unwrap_or_default();
        let receivers = if receiver.starts_with('#') { members } else { vec![receiver] };
        for receiver in receivers.iter().filter(|to| **to != self.user || !send.to.starts_with('#')) {
            if let Some(mut stream) = state.users.get(receiver) {
                let _ = stream.write_all(&frames);
            }
        }
    }
}

fn conversation(one: &str, other: &str) -> ConversationId {
    ConversationId::with(&UserName::new(one).unwrap(), &UserName::new(other).unwrap())
}

fn wire(conversation: ConversationId, stored: &Stored) -> Message<'_> {
    Message {
        conversation,
        seq: Seq(stored.seq),
        time_ms: 1,
        from: &stored.from,
        to: &stored.to,
        device: DeviceId(1),
        client_seq: stored.client_seq,
        class: if stored.seq == 0 { Class::Transient } else { Class::Durable },
        kind: BodyKind::Custom,
        delivery: 0,
        body: &stored.body,
        extra: Extra::default(),
    }
}
