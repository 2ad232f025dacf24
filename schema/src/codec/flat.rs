//! Codec 0: FlatBuffers, by the tables of `fbs/wire.fbs`.
//!
//! Reading verifies once, with limits on depth and number of tables, and borrows. An absent string or vector reads as
//! empty: the core judges values, this file only shapes. What every message passes goes by [`hot`] instead.

mod chat;
mod group;
pub(super) mod hot;

use flatbuffers::{FlatBufferBuilder, Follow, Verifiable, VerifierOptions, WIPOffset};

use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::generated::wire::ringline::wire as fb;
use crate::ids::{ConversationId, DeviceId, Seq};
use crate::limits;
use crate::message::{
    Ack, BodyKind, Class, Conversation, Credential, DeviceKind, Extra, Fetch, GoawayReason, KickReason, Login, LoginOk,
    Mentions, Message, MessageState, Names, OnlineUser, Outcome, Receipt, Reply, Request, Secret, Send, SendAck,
};

/// FlatBuffers tables of a request, and of an answer.
const TABLES: usize = limits::TABLES_MAX;
const TABLES_OF_ANSWER: usize = limits::ANSWER_TABLES_MAX;

fn options(tables_max: usize) -> VerifierOptions {
    VerifierOptions {
        max_depth: limits::TABLE_DEPTH_MAX,
        max_tables: tables_max,
        max_apparent_size: 2 * limits::FRAME_BYTES_CEILING as usize,
        ignore_missing_null_terminator: true,
    }
}

fn root<'a, T>(body: &'a [u8], tables_max: usize) -> Result<T::Inner, ErrorCode>
where
    T: Follow<'a> + Verifiable + 'a,
{
    flatbuffers::root_with_opts::<T>(&options(tables_max), body).map_err(|_| ErrorCode::BadBody)
}

fn conversation(id: Option<&fb::Id128>) -> ConversationId {
    ConversationId(id.map_or(0, |id| (u128::from(id.a()) << 64) | u128::from(id.b())))
}

fn id128(id: ConversationId) -> fb::Id128 {
    fb::Id128::new((id.0 >> 64) as u64, id.0 as u64)
}

pub(super) fn decode_request(command: Command, body: &[u8]) -> Result<Request<'_>, ErrorCode> {
    match command {
        Command::Send => match hot::read_send(body)? {
            Some(send) => Ok(Request::Send(send)),
            None => decode_any_request(command, body),
        },
        Command::Ack => Ok(Request::Ack(hot::read_ack(body)?)),
        _ => decode_any_request(command, body),
    }
}

/// Any request, by the general verifier.
#[inline(never)]
fn decode_any_request(command: Command, body: &[u8]) -> Result<Request<'_>, ErrorCode> {
    if let Some(request) = group::decode_request(command, body)? {
        return Ok(request);
    }
    if let Some(request) = chat::decode_request(command, body)? {
        return Ok(request);
    }
    Ok(match command {
        Command::Register => {
            let table = root::<fb::Register>(body, TABLES)?;
            Request::Register {
                user: table.user().unwrap_or_default(),
                password: Secret(table.password().unwrap_or_default()),
            }
        }
        Command::Login => Request::Login(login(root::<fb::Login>(body, TABLES)?)?),
        Command::Logout => root::<fb::Logout>(body, TABLES).map(|_| Request::Logout)?,
        Command::Ping => Request::Ping { stamp: root::<fb::Ping>(body, TABLES)?.stamp() },
        Command::Route => Request::Route { user: root::<fb::Route>(body, TABLES)?.user().unwrap_or_default() },
        Command::Send => Request::Send(send(root::<fb::Send>(body, TABLES)?)?),
        Command::Ack => Request::Ack(ack(root::<fb::Ack>(body, TABLES)?)),
        Command::Fetch => Request::Fetch(fetch(root::<fb::Fetch>(body, TABLES)?)),
        Command::Online => {
            let table = root::<fb::Online>(body, TABLES)?;
            Request::Online { cursor: table.cursor().unwrap_or_default(), limit: table.limit() }
        }
        Command::Conversations => {
            let table = root::<fb::Conversations>(body, TABLES)?;
            Request::Conversations { cursor: conversation(table.cursor()), limit: table.limit() }
        }
        _ => return Err(ErrorCode::UnknownCommand),
    })
}

/// By what somebody proves who he is. Errors: `BAD_REQUEST` for both at once.
fn credential<'a>(password: Option<&'a str>, token: Option<&'a str>) -> Result<Option<Credential<'a>>, ErrorCode> {
    match (password, token) {
        (Some(password), None) => Ok(Some(Credential::Password(Secret(password)))),
        (None, Some(token)) => Ok(Some(Credential::Token(Secret(token)))),
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(ErrorCode::BadRequest),
    }
}

fn login<'a>(table: fb::Login<'a>) -> Result<Login<'a>, ErrorCode> {
    Ok(Login {
        user: table.user().unwrap_or_default(),
        credential: credential(table.password(), table.token())?.ok_or(ErrorCode::BadRequest)?,
        device: DeviceId(table.device()),
        device_kind: DeviceKind::from_number(table.device_kind()).ok_or(ErrorCode::BadDevice)?,
        agent: table.agent().unwrap_or_default(),
    })
}

fn send<'a>(table: fb::Send<'a>) -> Result<Send<'a>, ErrorCode> {
    Ok(Send {
        to: table.to().unwrap_or_default(),
        class: Class::from_number(table.class()).ok_or(ErrorCode::BadRequest)?,
        kind: BodyKind::from_number(table.kind()).filter(|kind| kind.is_for_clients()).ok_or(ErrorCode::BadRequest)?,
        client_seq: table.client_seq(),
        ack_timeout_ms: (table.ack_timeout_ms() != 0).then_some(table.ack_timeout_ms()),
        body: table.body().map(|body| body.bytes()).unwrap_or_default(),
        mentions: Mentions { users: Names::flat(table.mentions()), all: table.mention_all() },
    })
}

fn ack(table: fb::Ack<'_>) -> Ack {
    match table.delivery() {
        0 => Ack::Upto { conversation: conversation(table.conversation()), seq: Seq(table.seq()) },
        delivery => Ack::Delivery(delivery),
    }
}

fn fetch<'a>(table: fb::Fetch<'a>) -> Fetch<'a> {
    Fetch {
        with: table.with().unwrap_or_default(),
        after: Seq(table.after()),
        before: (table.before() != 0).then_some(Seq(table.before())),
        limit: table.limit(),
        newest: table.newest(),
    }
}

pub(super) fn decode_reply(command: Command, body: &[u8]) -> Result<Reply<'_>, ErrorCode> {
    match command {
        Command::Deliver => match hot::read_message(body)? {
            Some(message) => Ok(Reply::Deliver(message)),
            None => decode_any_reply(command, body),
        },
        Command::SendAck => Ok(Reply::SendAck(hot::read_send_ack(body)?)),
        _ => decode_any_reply(command, body),
    }
}

/// Any answer or push, by the general verifier.
#[inline(never)]
fn decode_any_reply(command: Command, body: &[u8]) -> Result<Reply<'_>, ErrorCode> {
    if let Some(reply) = group::decode_reply(command, body)? {
        return Ok(reply);
    }
    if let Some(reply) = chat::decode_reply(command, body)? {
        return Ok(reply);
    }
    const TABLES: usize = TABLES_OF_ANSWER;
    Ok(match command {
        Command::Failure => {
            let table = root::<fb::Failure>(body, TABLES)?;
            Reply::Failure {
                // A code of a newer server: the client can only know that it failed.
                code: ErrorCode::from_number(table.code()).unwrap_or(ErrorCode::Internal),
                retry_after_ms: table.retry_after_ms(),
                detail: table.detail().unwrap_or_default(),
            }
        }
        Command::RegisterOk => {
            Reply::RegisterOk { user: root::<fb::RegisterOk>(body, TABLES)?.user().unwrap_or_default() }
        }
        Command::LoginOk => Reply::LoginOk(login_ok(root::<fb::LoginOk>(body, TABLES)?)),
        Command::LogoutOk => root::<fb::LogoutOk>(body, TABLES).map(|_| Reply::LogoutOk)?,
        Command::Pong => {
            let table = root::<fb::Pong>(body, TABLES)?;
            Reply::Pong { stamp: table.stamp(), server_time_ms: table.server_time_ms() }
        }
        Command::RouteOk => {
            let table = root::<fb::RouteOk>(body, TABLES)?;
            Reply::RouteOk { node: table.node().unwrap_or_default(), address: table.address().unwrap_or_default() }
        }
        Command::Redirect => {
            let table = root::<fb::RouteOk>(body, TABLES)?;
            Reply::Redirect { node: table.node().unwrap_or_default(), address: table.address().unwrap_or_default() }
        }
        Command::SendAck => {
            let table = root::<fb::SendAck>(body, TABLES)?;
            Reply::SendAck(SendAck {
                conversation: conversation(table.conversation()),
                seq: Seq(table.seq()),
                time_ms: table.time_ms(),
                dup: table.dup(),
            })
        }
        Command::FetchOk => fetch_ok(root::<fb::FetchOk>(body, TABLES)?)?,
        Command::OnlineOk => online_ok(root::<fb::OnlineOk>(body, TABLES)?),
        Command::ConversationsOk => conversations_ok(root::<fb::ConversationsOk>(body, TABLES)?)?,
        Command::Deliver => Reply::Deliver(message(root::<fb::Message>(body, TABLES)?)?),
        Command::Receipt => receipt(root::<fb::Receipt>(body, TABLES)?)?,
        Command::Lagged => {
            let table = root::<fb::Lagged>(body, TABLES)?;
            Reply::Lagged {
                conversation: conversation(table.conversation()),
                with: table.with().unwrap_or_default(),
                from: Seq(table.from()),
                to: Seq(table.to()),
            }
        }
        Command::Kicked => {
            let table = root::<fb::Kicked>(body, TABLES)?;
            let reason = KickReason::from_number(table.reason()).ok_or(ErrorCode::BadBody)?;
            Reply::Kicked { reason, detail: table.detail().unwrap_or_default() }
        }
        Command::Goaway => {
            let table = root::<fb::Goaway>(body, TABLES)?;
            let reason = GoawayReason::from_number(table.reason()).ok_or(ErrorCode::BadBody)?;
            let (node, address) = (table.node().unwrap_or_default(), table.address().unwrap_or_default());
            Reply::Goaway { reason, reconnect_after_ms: table.reconnect_after_ms(), node, address }
        }
        _ => return Err(ErrorCode::UnknownCommand),
    })
}

fn login_ok<'a>(table: fb::LoginOk<'a>) -> LoginOk<'a> {
    LoginOk {
        user: table.user().unwrap_or_default(),
        session: table.session(),
        server_time_ms: table.server_time_ms(),
        ping_interval_ms: table.ping_interval_ms(),
        idle_timeout_ms: table.idle_timeout_ms(),
        frame_bytes_max: table.frame_bytes_max(),
        sends_in_flight_max: table.sends_in_flight_max(),
    }
}

fn message<'a>(table: fb::Message<'a>) -> Result<Message<'a>, ErrorCode> {
    Ok(Message {
        conversation: conversation(table.conversation()),
        seq: Seq(table.seq()),
        time_ms: table.time_ms(),
        from: table.from().unwrap_or_default(),
        to: table.to().unwrap_or_default(),
        device: DeviceId(table.device()),
        client_seq: table.client_seq(),
        class: Class::from_number(table.class()).ok_or(ErrorCode::BadBody)?,
        kind: BodyKind::from_number(table.kind()).ok_or(ErrorCode::BadBody)?,
        delivery: table.delivery(),
        body: table.body().map(|body| body.bytes()).unwrap_or_default(),
        extra: Extra {
            mentions: Mentions { users: Names::flat(table.mentions()), all: table.mention_all() },
            refers: Seq(table.refers()),
            state: MessageState::from_number(table.state()).ok_or(ErrorCode::BadBody)?,
            amended_ms: table.amended_ms(),
            change: table.change().map(group::change).transpose()?,
        },
    })
}

fn fetch_ok<'a>(table: fb::FetchOk<'a>) -> Result<Reply<'a>, ErrorCode> {
    let messages = table.messages().into_iter().flatten().map(message).collect::<Result<_, _>>()?;
    Ok(Reply::FetchOk {
        conversation: conversation(table.conversation()),
        first: Seq(table.first()),
        head: Seq(table.head()),
        messages,
    })
}

fn online_ok<'a>(table: fb::OnlineOk<'a>) -> Reply<'a> {
    let users = table.users().into_iter().flatten();
    Reply::OnlineOk {
        users: users.map(|row| OnlineUser { user: row.user().unwrap_or_default(), devices: row.devices() }).collect(),
        next: table.next().unwrap_or_default(),
    }
}

fn conversations_ok<'a>(table: fb::ConversationsOk<'a>) -> Result<Reply<'a>, ErrorCode> {
    let rows = table.conversations().into_iter().flatten();
    let row = |row: fb::Conversation<'a>| {
        Ok(Conversation {
            conversation: conversation(row.conversation()),
            with: row.with().unwrap_or_default(),
            first: Seq(row.first()),
            head: Seq(row.head()),
            last_time_ms: row.last_time_ms(),
            acked: Seq(row.acked()),
            read: Seq(row.read()),
            pinned: row.pinned(),
            muted_until_ms: row.muted_until_ms(),
            standing: group::standing(row.standing())?,
            title: row.title().unwrap_or_default(),
            last: row.last().map(message).transpose()?,
        })
    };
    let conversations = rows.map(row).collect::<Result<_, _>>()?;
    Ok(Reply::ConversationsOk { conversations, next: conversation(table.next()) })
}

fn receipt<'a>(table: fb::Receipt<'a>) -> Result<Reply<'a>, ErrorCode> {
    Ok(Reply::Receipt(Receipt {
        conversation: conversation(table.conversation()),
        seq: Seq(table.seq()),
        client_seq: table.client_seq(),
        outcome: Outcome::from_number(table.outcome()).ok_or(ErrorCode::BadBody)?,
        device: DeviceId(table.device()),
    }))
}

/// A FlatBuffers builder whose memory is kept between bodies.
#[derive(Default)]
pub(super) struct Builder {
    fbb: FlatBufferBuilder<'static>,
}

impl Builder {
    pub(super) fn request(&mut self, request: &Request<'_>) -> &[u8] {
        self.fbb.reset();
        let fbb = &mut self.fbb;
        match request {
            Request::Register { user, password } => {
                let (user, password) = (Some(fbb.create_string(user)), Some(fbb.create_string(password.0)));
                let table = fb::Register::create(fbb, &fb::RegisterArgs { user, password });
                fbb.finish_minimal(table);
            }
            Request::Login(login) => write_login(fbb, login),
            Request::Logout => {
                let table = fb::Logout::create(fbb, &fb::LogoutArgs {});
                fbb.finish_minimal(table);
            }
            Request::Ping { stamp } => {
                let table = fb::Ping::create(fbb, &fb::PingArgs { stamp: *stamp });
                fbb.finish_minimal(table);
            }
            Request::Route { user } => {
                let user = Some(fbb.create_string(user));
                let table = fb::Route::create(fbb, &fb::RouteArgs { user });
                fbb.finish_minimal(table);
            }
            Request::Send(send) => write_send(fbb, send),
            Request::Ack(ack) => write_ack(fbb, ack),
            Request::Fetch(fetch) => write_fetch(fbb, fetch),
            Request::Online { cursor, limit } => {
                let cursor = Some(fbb.create_string(cursor));
                let table = fb::Online::create(fbb, &fb::OnlineArgs { cursor, limit: *limit });
                fbb.finish_minimal(table);
            }
            Request::Conversations { cursor, limit } => {
                let cursor = id128(*cursor);
                let args = fb::ConversationsArgs { cursor: Some(&cursor), limit: *limit };
                let table = fb::Conversations::create(fbb, &args);
                fbb.finish_minimal(table);
            }
            Request::Group { group, act } => group::write_request(fbb, group, act),
            Request::Chat(request) => chat::write_request(fbb, request),
        }
        self.fbb.finished_data()
    }

    pub(super) fn reply(&mut self, reply: &Reply<'_>) -> &[u8] {
        self.fbb.reset();
        let fbb = &mut self.fbb;
        match reply {
            Reply::Failure { code, retry_after_ms, detail } => {
                let detail = (!detail.is_empty()).then(|| fbb.create_string(detail));
                let args = fb::FailureArgs { code: *code as u16, retry_after_ms: *retry_after_ms, detail };
                let table = fb::Failure::create(fbb, &args);
                fbb.finish_minimal(table);
            }
            Reply::RegisterOk { user } => {
                let user = Some(fbb.create_string(user));
                let table = fb::RegisterOk::create(fbb, &fb::RegisterOkArgs { user });
                fbb.finish_minimal(table);
            }
            Reply::LoginOk(ok) => write_login_ok(fbb, ok),
            Reply::LogoutOk => {
                let table = fb::LogoutOk::create(fbb, &fb::LogoutOkArgs {});
                fbb.finish_minimal(table);
            }
            Reply::Pong { stamp, server_time_ms } => {
                let table = fb::Pong::create(fbb, &fb::PongArgs { stamp: *stamp, server_time_ms: *server_time_ms });
                fbb.finish_minimal(table);
            }
            Reply::RouteOk { node, address } | Reply::Redirect { node, address } => {
                let (node, address) = (Some(fbb.create_string(node)), Some(fbb.create_string(address)));
                let table = fb::RouteOk::create(fbb, &fb::RouteOkArgs { node, address });
                fbb.finish_minimal(table);
            }
            Reply::SendAck(ack) => write_send_ack(fbb, ack),
            Reply::FetchOk { conversation, first, head, messages } => {
                write_fetch_ok(fbb, *conversation, (*first, *head), messages);
            }
            Reply::OnlineOk { users, next } => write_online_ok(fbb, users, next),
            Reply::ConversationsOk { conversations, next } => write_conversations_ok(fbb, conversations, *next),
            Reply::Deliver(message) => {
                let table = write_message(fbb, message);
                fbb.finish_minimal(table);
            }
            Reply::Receipt(receipt) => write_receipt(fbb, receipt),
            Reply::Lagged { conversation, with, from, to } => {
                let (id, with) = (id128(*conversation), Some(fbb.create_string(with)));
                let args = fb::LaggedArgs { conversation: Some(&id), with, from: from.0, to: to.0 };
                let table = fb::Lagged::create(fbb, &args);
                fbb.finish_minimal(table);
            }
            Reply::Kicked { reason, detail } => {
                let detail = Some(fbb.create_string(detail));
                let table = fb::Kicked::create(fbb, &fb::KickedArgs { reason: *reason as u8, detail });
                fbb.finish_minimal(table);
            }
            Reply::Goaway { reason, reconnect_after_ms, node, address } => {
                // Nothing for what is empty: a node that says nothing of it writes what it always wrote.
                let node = (!node.is_empty()).then(|| fbb.create_string(node));
                let address = (!address.is_empty()).then(|| fbb.create_string(address));
                let (reason, reconnect_after_ms) = (*reason as u8, *reconnect_after_ms);
                let table = fb::Goaway::create(fbb, &fb::GoawayArgs { reason, reconnect_after_ms, node, address });
                fbb.finish_minimal(table);
            }
            Reply::Group(reply) => group::write_reply(fbb, reply),
            Reply::Chat(reply) => chat::write_reply(fbb, reply),
        }
        self.fbb.finished_data()
    }
}

type Fbb = FlatBufferBuilder<'static>;

type Strings<'b> = WIPOffset<flatbuffers::Vector<'b, flatbuffers::ForwardsUOffset<&'b str>>>;

/// No vector at all for no names.
fn strings<'b>(fbb: &mut FlatBufferBuilder<'b>, names: Names<'_>) -> Option<Strings<'b>> {
    if names.is_empty() {
        return None;
    }
    let names: Vec<_> = names.iter().map(|name| fbb.create_string(name)).collect();
    Some(fbb.create_vector(&names))
}

fn write_login(fbb: &mut Fbb, login: &Login<'_>) {
    let user = Some(fbb.create_string(login.user));
    let (password, token) = match login.credential {
        Credential::Password(Secret(password)) => (Some(fbb.create_string(password)), None),
        Credential::Token(Secret(token)) => (None, Some(fbb.create_string(token))),
    };
    let agent = Some(fbb.create_string(login.agent));
    let (device, device_kind) = (login.device.0, login.device_kind as u8);
    let table = fb::Login::create(fbb, &fb::LoginArgs { user, password, token, device, device_kind, agent });
    fbb.finish_minimal(table);
}

fn write_send(fbb: &mut Fbb, send: &Send<'_>) {
    let mentions = strings(fbb, send.mentions.users);
    let (to, body) = (Some(fbb.create_string(send.to)), Some(fbb.create_vector(send.body)));
    let args = fb::SendArgs {
        to,
        class: send.class as u8,
        kind: send.kind as u8,
        client_seq: send.client_seq,
        ack_timeout_ms: send.ack_timeout_ms.unwrap_or(0),
        body,
        mentions,
        mention_all: send.mentions.all,
    };
    let table = fb::Send::create(fbb, &args);
    fbb.finish_minimal(table);
}

fn write_ack(fbb: &mut Fbb, ack: &Ack) {
    let table = match ack {
        Ack::Upto { conversation, seq } => {
            let id = id128(*conversation);
            fb::Ack::create(fbb, &fb::AckArgs { conversation: Some(&id), seq: seq.0, delivery: 0 })
        }
        Ack::Delivery(delivery) => {
            fb::Ack::create(fbb, &fb::AckArgs { conversation: None, seq: 0, delivery: *delivery })
        }
    };
    fbb.finish_minimal(table);
}

fn write_fetch(fbb: &mut Fbb, fetch: &Fetch<'_>) {
    let with = Some(fbb.create_string(fetch.with));
    let args = fb::FetchArgs {
        with,
        after: fetch.after.0,
        before: fetch.before.map_or(0, |seq| seq.0),
        limit: fetch.limit,
        newest: fetch.newest,
    };
    let table = fb::Fetch::create(fbb, &args);
    fbb.finish_minimal(table);
}

fn write_login_ok(fbb: &mut Fbb, ok: &LoginOk<'_>) {
    let user = Some(fbb.create_string(ok.user));
    let args = fb::LoginOkArgs {
        user,
        session: ok.session,
        server_time_ms: ok.server_time_ms,
        ping_interval_ms: ok.ping_interval_ms,
        idle_timeout_ms: ok.idle_timeout_ms,
        frame_bytes_max: ok.frame_bytes_max,
        sends_in_flight_max: ok.sends_in_flight_max,
    };
    let table = fb::LoginOk::create(fbb, &args);
    fbb.finish_minimal(table);
}

fn write_send_ack(fbb: &mut Fbb, ack: &SendAck) {
    let id = id128(ack.conversation);
    let args = fb::SendAckArgs { conversation: Some(&id), seq: ack.seq.0, time_ms: ack.time_ms, dup: ack.dup };
    let table = fb::SendAck::create(fbb, &args);
    fbb.finish_minimal(table);
}

fn write_message<'b>(fbb: &mut FlatBufferBuilder<'b>, message: &Message<'_>) -> WIPOffset<fb::Message<'b>> {
    let id = id128(message.conversation);
    let (from, to) = (Some(fbb.create_string(message.from)), Some(fbb.create_string(message.to)));
    let mentions = strings(fbb, message.extra.mentions.users);
    let change = message.extra.change.as_ref().map(|change| group::write_change(fbb, change));
    let body = Some(fbb.create_vector(message.body));
    let args = fb::MessageArgs {
        conversation: Some(&id),
        seq: message.seq.0,
        time_ms: message.time_ms,
        from,
        to,
        device: message.device.0,
        client_seq: message.client_seq,
        class: message.class as u8,
        kind: message.kind as u8,
        delivery: message.delivery,
        body,
        mentions,
        mention_all: message.extra.mentions.all,
        refers: message.extra.refers.0,
        state: message.extra.state as u8,
        amended_ms: message.extra.amended_ms,
        change,
    };
    fb::Message::create(fbb, &args)
}

fn write_fetch_ok(fbb: &mut Fbb, conversation: ConversationId, (first, head): (Seq, Seq), messages: &[Message<'_>]) {
    let rows: Vec<_> = messages.iter().map(|message| write_message(fbb, message)).collect();
    let (id, messages) = (id128(conversation), Some(fbb.create_vector(&rows)));
    let args = fb::FetchOkArgs { conversation: Some(&id), first: first.0, head: head.0, messages };
    let table = fb::FetchOk::create(fbb, &args);
    fbb.finish_minimal(table);
}

fn write_online_ok(fbb: &mut Fbb, users: &[OnlineUser<'_>], next: &str) {
    let mut rows = Vec::with_capacity(users.len());
    for row in users {
        let user = Some(fbb.create_string(row.user));
        rows.push(fb::OnlineUser::create(fbb, &fb::OnlineUserArgs { user, devices: row.devices }));
    }
    let (users, next) = (Some(fbb.create_vector(&rows)), Some(fbb.create_string(next)));
    let table = fb::OnlineOk::create(fbb, &fb::OnlineOkArgs { users, next });
    fbb.finish_minimal(table);
}

fn write_conversations_ok(fbb: &mut Fbb, conversations: &[Conversation<'_>], next: ConversationId) {
    let mut rows = Vec::with_capacity(conversations.len());
    for row in conversations {
        let last = row.last.as_ref().map(|message| write_message(fbb, message));
        let title = (!row.title.is_empty()).then(|| fbb.create_string(row.title));
        let (id, with) = (id128(row.conversation), Some(fbb.create_string(row.with)));
        let args = fb::ConversationArgs {
            conversation: Some(&id),
            with,
            first: row.first.0,
            head: row.head.0,
            last_time_ms: row.last_time_ms,
            acked: row.acked.0,
            read: row.read.0,
            pinned: row.pinned,
            muted_until_ms: row.muted_until_ms,
            standing: row.standing.map_or(0, |standing| standing as u8),
            title,
            last,
        };
        rows.push(fb::Conversation::create(fbb, &args));
    }
    let (next, conversations) = (id128(next), Some(fbb.create_vector(&rows)));
    let table = fb::ConversationsOk::create(fbb, &fb::ConversationsOkArgs { conversations, next: Some(&next) });
    fbb.finish_minimal(table);
}

fn write_receipt(fbb: &mut Fbb, receipt: &Receipt) {
    let id = id128(receipt.conversation);
    let args = fb::ReceiptArgs {
        conversation: Some(&id),
        seq: receipt.seq.0,
        client_seq: receipt.client_seq,
        outcome: receipt.outcome as u8,
        device: receipt.device.0,
    };
    let table = fb::Receipt::create(fbb, &args);
    fbb.finish_minimal(table);
}
