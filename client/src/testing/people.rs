//! Groups, people and devices of the fake server: it notes what it was asked, and answers as if that were done.
//!
//! Runs where the fake does. Keeps nothing and checks no right: what a server makes of it is for tests of a real one.

use ringline_schema::ids::{ConversationId, DeviceId, Seq};
use ringline_schema::message::chat::{Device, MemberReceipt, MessagesFrom};
use ringline_schema::message::group::{GroupInfo, JoinPolicy, Member, Role, Standing};
use ringline_schema::message::{ChatReply, ChatRequest, DeviceKind, GroupAct, GroupReply, Reply, Request};

/// When everything happened that it tells of, in Unix milliseconds.
const TIME_MS: u64 = 1_700_000_000_000;

/// How a request is noted; `None`: it is not.
pub(super) fn note(request: &Request<'_>) -> Option<String> {
    match request {
        Request::Group { group, act } => Some(format!("{group} {act:?}")),
        Request::Chat(ChatRequest::Sync(_) | ChatRequest::Signal { .. } | ChatRequest::Read { .. }) => None,
        Request::Chat(request) => Some(format!("{request:?}")),
        Request::Send(send) if !send.mentions.is_empty() => {
            let users: Vec<_> = send.mentions.users.iter().collect();
            Some(format!("to {}: {users:?}{}", send.to, if send.mentions.all { " and all" } else { "" }))
        }
        Request::Register { .. }
        | Request::Login(_)
        | Request::Logout
        | Request::Ping { .. }
        | Request::Route { .. }
        | Request::Send(_)
        | Request::Ack(_)
        | Request::Fetch(_)
        | Request::Online { .. }
        | Request::Conversations { .. } => None,
    }
}

/// `None`: a request of another kind. Lists have two pages.
pub(super) fn answer(request: &Request<'_>) -> Option<Reply<'static>> {
    match request {
        Request::Group { act, .. } => Some(Reply::Group(group(act))),
        Request::Chat(request) => chat(request).map(Reply::Chat),
        Request::Register { .. }
        | Request::Login(_)
        | Request::Logout
        | Request::Ping { .. }
        | Request::Route { .. }
        | Request::Send(_)
        | Request::Ack(_)
        | Request::Fetch(_)
        | Request::Online { .. }
        | Request::Conversations { .. } => None,
    }
}

fn group(act: &GroupAct<'_>) -> GroupReply<'static> {
    let conversation = ConversationId(0);
    let done = |standing| GroupReply::Ok { conversation, seq: Seq(1), standing };
    match act {
        GroupAct::Members { cursor, standing, .. } => members(cursor, *standing),
        GroupAct::Info => GroupReply::Info(GroupInfo {
            conversation,
            group: "#team",
            title: "The \u{1b}team",
            join: JoinPolicy::Approval,
            owner: "ann",
            members: 3,
            created_ms: TIME_MS,
            dissolved: true,
            standing: Some(Standing::Member),
            role: Role::Owner,
            muted_until_ms: 0,
        }),
        GroupAct::Join { .. } => done(Some(Standing::Asked)),
        GroupAct::Leave => done(Some(Standing::Left)),
        GroupAct::Create { .. }
        | GroupAct::Rename { .. }
        | GroupAct::Policy { .. }
        | GroupAct::Invite { .. }
        | GroupAct::Answer { .. }
        | GroupAct::Kick { .. }
        | GroupAct::Mute { .. }
        | GroupAct::Role { .. }
        | GroupAct::Transfer { .. }
        | GroupAct::Dissolve => done(Some(Standing::Member)),
    }
}

/// Members ann, bob and cid; invited dan; nobody asks.
fn members(cursor: &str, standing: Standing) -> GroupReply<'static> {
    let row = |user, role| Member { user, role, standing, joined_ms: TIME_MS, muted_until_ms: 0 };
    let (members, next) = match (standing, cursor) {
        (Standing::Member, "") => (vec![row("ann", Role::Owner), row("bob", Role::Admin)], "bob"),
        (Standing::Member, _) => (vec![row("cid", Role::Member)], ""),
        (Standing::Invited, _) => (vec![row("dan", Role::Member)], ""),
        (Standing::Asked | Standing::Left | Standing::Kicked, _) => (Vec::new(), ""),
    };
    GroupReply::Members { members, next }
}

fn chat(request: &ChatRequest<'_>) -> Option<ChatReply<'static>> {
    Some(match request {
        ChatRequest::Block { .. }
        | ChatRequest::Unblock { .. }
        | ChatRequest::Privacy { .. }
        | ChatRequest::PresenceSet { .. }
        | ChatRequest::Unwatch { .. }
        | ChatRequest::Mark(_)
        | ChatRequest::DropDevice { .. } => ChatReply::Done,
        ChatRequest::Blocks { cursor, .. } => {
            let (users, next) = if cursor.is_empty() { (vec!["bob"], "bob") } else { (vec!["cid"], "") };
            ChatReply::BlocksOk { users, next, messages_from: MessagesFrom::Known }
        }
        ChatRequest::Broadcast { .. } => ChatReply::BroadcastOk { devices: 3 },
        ChatRequest::Devices => {
            let (kind, agent) = (DeviceKind::Desktop, "first \u{1b}");
            let device = Device { device: DeviceId(1), kind, agent, first_ms: 0, last_ms: TIME_MS, online: true };
            let devices = vec![device, Device { device: DeviceId(2), agent: "second", online: false, ..device }];
            ChatReply::DevicesOk { devices }
        }
        ChatRequest::Receipts { seq, cursor, .. } => {
            let row = |user, delivered, read| MemberReceipt { user, delivered, read };
            let (rows, next) = match *cursor {
                "" => (vec![row("bob", *seq, *seq), row("cid", *seq, Seq::ZERO)], "cid"),
                _ => (vec![row("dan", Seq::ZERO, Seq::ZERO)], ""),
            };
            ChatReply::ReceiptsOk { members: 3, delivered: 2, read: 1, rows, next }
        }
        ChatRequest::Read { .. }
        | ChatRequest::Sync(_)
        | ChatRequest::Signal { .. }
        | ChatRequest::Watch { .. }
        | ChatRequest::Amend(_)
        | ChatRequest::Export { .. }
        | ChatRequest::DeleteUser { .. } => return None,
    })
}
