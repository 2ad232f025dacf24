//! The tables around messages: sync, receipts, devices, presence, signals, amendments, block lists.

use flatbuffers::WIPOffset;

use super::{Fbb, TABLES, TABLES_OF_ANSWER, conversation, credential, id128, message, root, strings, write_message};
use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::generated::wire::ringline::wire as fb;
use crate::ids::{DeviceId, Seq};
use crate::message::chat::{Amend, AmendAction, Device, Mark, MemberReceipt, MessagesFrom, PresenceRow, Sync};
use crate::message::{
    BodyKind, ChatReply, ChatRequest, Credential, DeviceKind, Names, Place, Places, Reply, Request, Secret,
};

fn client_kind(number: u8) -> Result<BodyKind, ErrorCode> {
    BodyKind::from_number(number).filter(|kind| kind.is_for_clients()).ok_or(ErrorCode::BadRequest)
}

/// `None` when the command is none of these.
pub(super) fn decode_request(command: Command, body: &[u8]) -> Result<Option<Request<'_>>, ErrorCode> {
    Ok(Some(Request::Chat(match command {
        Command::Read => {
            let table = root::<fb::Read>(body, TABLES)?;
            ChatRequest::Read { conversation: conversation(table.conversation()), seq: Seq(table.seq()) }
        }
        Command::Sync => {
            let table = root::<fb::Sync>(body, TABLES)?;
            let from = table.from().map(Place::from).unwrap_or_default();
            ChatRequest::Sync(Sync { places: Places::flat(table.places()), from, limit: table.limit() })
        }
        Command::Mark => {
            let table = root::<fb::Mark>(body, TABLES)?;
            ChatRequest::Mark(Mark {
                conversation: conversation(table.conversation()),
                pinned: table.set_pinned().then(|| table.pinned()),
                muted_until_ms: table.set_mute().then(|| table.muted_until_ms()),
            })
        }
        Command::Devices => root::<fb::Devices>(body, TABLES).map(|_| ChatRequest::Devices)?,
        Command::DropDevice => {
            ChatRequest::DropDevice { device: DeviceId(root::<fb::DropDevice>(body, TABLES)?.device()) }
        }
        Command::Receipts => {
            let table = root::<fb::Receipts>(body, TABLES)?;
            let (conversation, seq) = (conversation(table.conversation()), Seq(table.seq()));
            let (cursor, limit) = (table.cursor().unwrap_or_default(), table.limit());
            ChatRequest::Receipts { conversation, seq, cursor, limit }
        }
        Command::Broadcast => {
            let table = root::<fb::Broadcast>(body, TABLES)?;
            let (kind, device_kinds) = (client_kind(table.kind())?, table.device_kinds());
            ChatRequest::Broadcast { kind, device_kinds, body: bytes(table.body()) }
        }
        Command::Signal => {
            let table = root::<fb::Signal>(body, TABLES)?;
            let (to, kind) = (table.to().unwrap_or_default(), table.kind());
            ChatRequest::Signal { to, kind, body: bytes(table.body()) }
        }
        Command::PresenceWatch => {
            ChatRequest::Watch { users: Names::flat(root::<fb::PresenceWatch>(body, TABLES)?.users()) }
        }
        Command::PresenceUnwatch => {
            ChatRequest::Unwatch { users: Names::flat(root::<fb::PresenceWatch>(body, TABLES)?.users()) }
        }
        Command::PresenceSet => {
            let table = root::<fb::PresenceSet>(body, TABLES)?;
            ChatRequest::PresenceSet { status: table.status(), visible: visible(table.visible())? }
        }
        Command::Amend => ChatRequest::Amend(amend(root::<fb::Amend>(body, TABLES)?)?),
        Command::Block => ChatRequest::Block { user: root::<fb::Block>(body, TABLES)?.user().unwrap_or_default() },
        Command::Unblock => ChatRequest::Unblock { user: root::<fb::Block>(body, TABLES)?.user().unwrap_or_default() },
        Command::Blocks => {
            let table = root::<fb::Blocks>(body, TABLES)?;
            ChatRequest::Blocks { cursor: table.cursor().unwrap_or_default(), limit: table.limit() }
        }
        Command::Privacy => {
            let messages_from = messages_from(root::<fb::Privacy>(body, TABLES)?.messages_from())?;
            ChatRequest::Privacy { messages_from }
        }
        Command::Export => {
            ChatRequest::Export { cursor: root::<fb::Export>(body, TABLES)?.cursor().unwrap_or_default() }
        }
        Command::DeleteUser => {
            let table = root::<fb::DeleteUser>(body, TABLES)?;
            let proof = credential(table.password(), table.token())?;
            ChatRequest::DeleteUser { user: table.user().unwrap_or_default(), proof, recall: table.recall() }
        }
        _ => return Ok(None),
    })))
}

fn bytes<'a>(body: Option<flatbuffers::Vector<'a, u8>>) -> &'a [u8] {
    body.map(|body| body.bytes()).unwrap_or_default()
}

fn messages_from(number: u8) -> Result<Option<MessagesFrom>, ErrorCode> {
    match number {
        0 => Ok(None),
        number => MessagesFrom::from_number(number).map(Some).ok_or(ErrorCode::BadRequest),
    }
}

fn visible(number: u8) -> Result<Option<bool>, ErrorCode> {
    match number {
        0 => Ok(None),
        1 => Ok(Some(true)),
        2 => Ok(Some(false)),
        _ => Err(ErrorCode::BadRequest),
    }
}

fn amend<'a>(table: fb::Amend<'a>) -> Result<Amend<'a>, ErrorCode> {
    Ok(Amend {
        with: table.with().unwrap_or_default(),
        seq: Seq(table.seq()),
        action: AmendAction::from_number(table.action()).ok_or(ErrorCode::BadRequest)?,
        kind: client_kind(table.kind())?,
        client_seq: table.client_seq(),
        body: bytes(table.body()),
    })
}

/// Finishes a table made of its arguments.
macro_rules! table {
    ($fbb:ident, $name:ident, $args:ident { $($field:tt)* }) => {{
        let table = fb::$name::create($fbb, &fb::$args { $($field)* });
        $fbb.finish_minimal(table);
    }};
}

pub(super) fn write_request(fbb: &mut Fbb, request: &ChatRequest<'_>) {
    match request {
        ChatRequest::Read { conversation, seq } => {
            let id = id128(*conversation);
            table!(fbb, Read, ReadArgs { conversation: Some(&id), seq: seq.0 });
        }
        ChatRequest::Sync(sync) => {
            let places: Vec<_> = sync.places.iter().map(place).collect();
            let (places, from) = (Some(fbb.create_vector(&places)), place(sync.from));
            table!(fbb, Sync, SyncArgs { places, from: Some(&from), limit: sync.limit });
        }
        ChatRequest::Mark(mark) => {
            let id = id128(mark.conversation);
            let (set_pinned, pinned) = (mark.pinned.is_some(), mark.pinned.unwrap_or_default());
            let (set_mute, muted_until_ms) = (mark.muted_until_ms.is_some(), mark.muted_until_ms.unwrap_or_default());
            table!(fbb, Mark, MarkArgs { conversation: Some(&id), set_pinned, pinned, set_mute, muted_until_ms });
        }
        ChatRequest::Devices => table!(fbb, Devices, DevicesArgs {}),
        ChatRequest::DropDevice { device } => table!(fbb, DropDevice, DropDeviceArgs { device: device.0 }),
        ChatRequest::Receipts { conversation, seq, cursor, limit } => {
            let (id, cursor) = (id128(*conversation), Some(fbb.create_string(cursor)));
            table!(fbb, Receipts, ReceiptsArgs { conversation: Some(&id), seq: seq.0, cursor, limit: *limit });
        }
        ChatRequest::Broadcast { kind, device_kinds, body } => {
            let body = Some(fbb.create_vector(body));
            table!(fbb, Broadcast, BroadcastArgs { kind: *kind as u8, device_kinds: *device_kinds, body });
        }
        ChatRequest::Signal { to, kind, body } => {
            let (to, body) = (Some(fbb.create_string(to)), Some(fbb.create_vector(body)));
            table!(fbb, Signal, SignalArgs { to, kind: *kind, body });
        }
        ChatRequest::Watch { users } | ChatRequest::Unwatch { users } => {
            let users = strings(fbb, *users);
            table!(fbb, PresenceWatch, PresenceWatchArgs { users });
        }
        ChatRequest::PresenceSet { status, visible } => {
            let status = status.map(|status| fbb.create_string(status));
            let visible = visible.map_or(0, |visible| if visible { 1 } else { 2 });
            table!(fbb, PresenceSet, PresenceSetArgs { status, visible });
        }
        ChatRequest::Amend(amend) => {
            let (with, body) = (Some(fbb.create_string(amend.with)), Some(fbb.create_vector(amend.body)));
            let (seq, action, kind) = (amend.seq.0, amend.action as u8, amend.kind as u8);
            table!(fbb, Amend, AmendArgs { with, seq, action, kind, client_seq: amend.client_seq, body });
        }
        ChatRequest::Block { user } | ChatRequest::Unblock { user } => {
            let user = Some(fbb.create_string(user));
            table!(fbb, Block, BlockArgs { user });
        }
        ChatRequest::Blocks { cursor, limit } => {
            let cursor = Some(fbb.create_string(cursor));
            table!(fbb, Blocks, BlocksArgs { cursor, limit: *limit });
        }
        ChatRequest::Privacy { messages_from } => {
            let messages_from = messages_from.map_or(0, |who| who as u8);
            table!(fbb, Privacy, PrivacyArgs { messages_from });
        }
        ChatRequest::Export { cursor } => {
            let cursor = Some(fbb.create_string(cursor));
            table!(fbb, Export, ExportArgs { cursor });
        }
        ChatRequest::DeleteUser { user, proof, recall } => {
            let user = Some(fbb.create_string(user));
            let (password, token) = match proof {
                Some(Credential::Password(Secret(password))) => (Some(fbb.create_string(password)), None),
                Some(Credential::Token(Secret(token))) => (None, Some(fbb.create_string(token))),
                None => (None, None),
            };
            table!(fbb, DeleteUser, DeleteUserArgs { user, password, token, recall: *recall });
        }
    }
}

fn place(place: Place) -> fb::Place {
    fb::Place::new((place.conversation.0 >> 64) as u64, place.conversation.0 as u64, place.seq.0)
}

/// `None` when the command is none of these.
pub(super) fn decode_reply(command: Command, body: &[u8]) -> Result<Option<Reply<'_>>, ErrorCode> {
    const TABLES: usize = TABLES_OF_ANSWER;
    Ok(Some(Reply::Chat(match command {
        Command::Done => root::<fb::Done>(body, TABLES).map(|_| ChatReply::Done)?,
        Command::Truncated => {
            let table = root::<fb::Truncated>(body, TABLES)?;
            ChatReply::Truncated { conversation: conversation(table.conversation()), first: Seq(table.first()) }
        }
        Command::SyncOk => {
            let table = root::<fb::SyncOk>(body, TABLES)?;
            let messages = table.messages().into_iter().flatten().map(message).collect::<Result<_, _>>()?;
            ChatReply::SyncOk { messages, next: table.next().map(Place::from).unwrap_or_default() }
        }
        Command::DevicesOk => {
            let devices = root::<fb::DevicesOk>(body, TABLES)?.devices().into_iter().flatten();
            ChatReply::DevicesOk { devices: devices.map(device).collect::<Result<_, _>>()? }
        }
        Command::ReceiptsOk => receipts(root::<fb::ReceiptsOk>(body, TABLES)?),
        Command::BroadcastOk => ChatReply::BroadcastOk { devices: root::<fb::BroadcastOk>(body, TABLES)?.devices() },
        Command::PresenceOk => {
            let users = root::<fb::PresenceOk>(body, TABLES)?.users();
            ChatReply::PresenceOk { users: users.into_iter().flatten().map(presence).collect() }
        }
        Command::BlocksOk => {
            let table = root::<fb::BlocksOk>(body, TABLES)?;
            ChatReply::BlocksOk {
                users: table.users().into_iter().flatten().collect(),
                next: table.next().unwrap_or_default(),
                messages_from: MessagesFrom::from_number(table.messages_from()).ok_or(ErrorCode::BadBody)?,
            }
        }
        Command::ExportOk => {
            let table = root::<fb::ExportOk>(body, TABLES)?;
            ChatReply::ExportOk { body: bytes(table.body()), next: table.next().unwrap_or_default() }
        }
        Command::ReceiptUpto => {
            let table = root::<fb::ReceiptUpto>(body, TABLES)?;
            ChatReply::ReceiptUpto {
                conversation: conversation(table.conversation()),
                with: table.with().unwrap_or_default(),
                user: table.user().unwrap_or_default(),
                delivered: Seq(table.delivered()),
                read: Seq(table.read()),
            }
        }
        Command::Signalled => {
            let table = root::<fb::SignalPush>(body, TABLES)?;
            ChatReply::Signalled {
                conversation: conversation(table.conversation()),
                from: table.from().unwrap_or_default(),
                to: table.to().unwrap_or_default(),
                kind: table.kind(),
                body: bytes(table.body()),
            }
        }
        Command::PresenceChanged => {
            let users = root::<fb::PresenceChanged>(body, TABLES)?.users();
            ChatReply::PresenceChanged { users: users.into_iter().flatten().map(presence).collect() }
        }
        Command::Hidden => {
            let table = root::<fb::Read>(body, TABLES)?;
            ChatReply::Hidden { conversation: conversation(table.conversation()), seq: Seq(table.seq()) }
        }
        Command::Notice => {
            let table = root::<fb::Notice>(body, TABLES)?;
            let kind = BodyKind::from_number(table.kind()).ok_or(ErrorCode::BadBody)?;
            let (from, time_ms) = (table.from().unwrap_or_default(), table.time_ms());
            ChatReply::Notice { from, time_ms, kind, body: bytes(table.body()) }
        }
        _ => return Ok(None),
    })))
}

fn device<'a>(table: fb::Device<'a>) -> Result<Device<'a>, ErrorCode> {
    Ok(Device {
        device: DeviceId(table.device()),
        kind: DeviceKind::from_number(table.kind()).ok_or(ErrorCode::BadBody)?,
        agent: table.agent().unwrap_or_default(),
        first_ms: table.first_ms(),
        last_ms: table.last_ms(),
        online: table.online(),
    })
}

fn receipts<'a>(table: fb::ReceiptsOk<'a>) -> ChatReply<'a> {
    let rows = table.rows().into_iter().flatten().map(|row| MemberReceipt {
        user: row.user().unwrap_or_default(),
        delivered: Seq(row.delivered()),
        read: Seq(row.read()),
    });
    ChatReply::ReceiptsOk {
        members: table.members(),
        delivered: table.delivered(),
        read: table.read(),
        rows: rows.collect(),
        next: table.next().unwrap_or_default(),
    }
}

fn presence<'a>(table: fb::PresenceRow<'a>) -> PresenceRow<'a> {
    PresenceRow {
        user: table.user().unwrap_or_default(),
        online: table.online(),
        last_seen_ms: table.last_seen_ms(),
        status: table.status().unwrap_or_default(),
    }
}

pub(super) fn write_reply(fbb: &mut Fbb, reply: &ChatReply<'_>) {
    match reply {
        ChatReply::Done => table!(fbb, Done, DoneArgs {}),
        ChatReply::Truncated { conversation, first } => {
            let id = id128(*conversation);
            table!(fbb, Truncated, TruncatedArgs { conversation: Some(&id), first: first.0 });
        }
        ChatReply::SyncOk { messages, next } => {
            let rows: Vec<_> = messages.iter().map(|message| write_message(fbb, message)).collect();
            let (messages, next) = (Some(fbb.create_vector(&rows)), place(*next));
            table!(fbb, SyncOk, SyncOkArgs { messages, next: Some(&next) });
        }
        ChatReply::DevicesOk { devices } => write_devices(fbb, devices),
        ChatReply::ReceiptsOk { .. } => write_receipts(fbb, reply),
        ChatReply::BroadcastOk { devices } => table!(fbb, BroadcastOk, BroadcastOkArgs { devices: *devices }),
        ChatReply::PresenceOk { users } => {
            let users = Some(write_presence(fbb, users));
            table!(fbb, PresenceOk, PresenceOkArgs { users });
        }
        ChatReply::BlocksOk { users, next, messages_from } => {
            let users = strings(fbb, Names::from(&users[..]));
            let next = Some(fbb.create_string(next));
            table!(fbb, BlocksOk, BlocksOkArgs { users, next, messages_from: *messages_from as u8 });
        }
        ChatReply::ExportOk { body, next } => {
            let (body, next) = (Some(fbb.create_vector(body)), Some(fbb.create_string(next)));
            table!(fbb, ExportOk, ExportOkArgs { body, next });
        }
        ChatReply::ReceiptUpto { conversation, with, user, delivered, read } => {
            let (id, with, user) = (id128(*conversation), Some(fbb.create_string(with)), Some(fbb.create_string(user)));
            let (delivered, read) = (delivered.0, read.0);
            table!(fbb, ReceiptUpto, ReceiptUptoArgs { conversation: Some(&id), with, user, delivered, read });
        }
        ChatReply::Signalled { conversation, from, to, kind, body } => {
            let id = id128(*conversation);
            let (from, to) = (Some(fbb.create_string(from)), Some(fbb.create_string(to)));
            let body = Some(fbb.create_vector(body));
            table!(fbb, SignalPush, SignalPushArgs { conversation: Some(&id), from, to, kind: *kind, body });
        }
        ChatReply::PresenceChanged { users } => {
            let users = Some(write_presence(fbb, users));
            table!(fbb, PresenceChanged, PresenceChangedArgs { users });
        }
        ChatReply::Hidden { conversation, seq } => {
            let id = id128(*conversation);
            table!(fbb, Read, ReadArgs { conversation: Some(&id), seq: seq.0 });
        }
        ChatReply::Notice { from, time_ms, kind, body } => {
            let (from, body) = (Some(fbb.create_string(from)), Some(fbb.create_vector(body)));
            table!(fbb, Notice, NoticeArgs { from, time_ms: *time_ms, kind: *kind as u8, body });
        }
    }
}

fn write_devices(fbb: &mut Fbb, devices: &[Device<'_>]) {
    let mut rows = Vec::with_capacity(devices.len());
    for row in devices {
        let agent = Some(fbb.create_string(row.agent));
        let (device, kind) = (row.device.0, row.kind as u8);
        let (first_ms, last_ms, online) = (row.first_ms, row.last_ms, row.online);
        rows.push(fb::Device::create(fbb, &fb::DeviceArgs { device, kind, agent, first_ms, last_ms, online }));
    }
    let devices = Some(fbb.create_vector(&rows));
    table!(fbb, DevicesOk, DevicesOkArgs { devices });
}

fn write_receipts(fbb: &mut Fbb, reply: &ChatReply<'_>) {
    let ChatReply::ReceiptsOk { members, delivered, read, rows, next } = reply else { return };
    let mut written = Vec::with_capacity(rows.len());
    for row in rows {
        let user = Some(fbb.create_string(row.user));
        let args = fb::MemberReceiptArgs { user, delivered: row.delivered.0, read: row.read.0 };
        written.push(fb::MemberReceipt::create(fbb, &args));
    }
    let (rows, next) = (Some(fbb.create_vector(&written)), Some(fbb.create_string(next)));
    let (members, delivered, read) = (*members, *delivered, *read);
    table!(fbb, ReceiptsOk, ReceiptsOkArgs { members, delivered, read, rows, next });
}

type PresenceRows<'b> = WIPOffset<flatbuffers::Vector<'b, flatbuffers::ForwardsUOffset<fb::PresenceRow<'b>>>>;

fn write_presence<'b>(fbb: &mut flatbuffers::FlatBufferBuilder<'b>, users: &[PresenceRow<'_>]) -> PresenceRows<'b> {
    let mut rows = Vec::with_capacity(users.len());
    for row in users {
        let (user, status) = (Some(fbb.create_string(row.user)), Some(fbb.create_string(row.status)));
        let (online, last_seen_ms) = (row.online, row.last_seen_ms);
        rows.push(fb::PresenceRow::create(fbb, &fb::PresenceRowArgs { user, online, last_seen_ms, status }));
    }
    fbb.create_vector(&rows)
}
