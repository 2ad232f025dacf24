//! What SDK clients saw, said as the checker's histories say it. Shared by the simulator and `torture`.
//!
//! Pure. Names of users and groups are their numbers, so that a name can be told from a number and back.

use std::collections::{BTreeMap, VecDeque};

use ringline_client::{
    Accepted, CallError, Conversation, ErrorCode, Event, History, JoinPolicy, Message, MessageState, ReadUpto,
    ReceiptPage, Role, SendError, SendOptions, Signal, UserName, What,
};
use serde_json::Value;

use crate::checker::{
    Change, Export, Happening, Listed, Mentions, Notice, Page, Peer, Place, Presence, Rank, Receipts, Refusal, Shown,
    Source, State,
};

/// Messages that an application remembers to amend them.
const REMEMBERED_MAX: usize = 32;

/// What an application of a user remembers of what it was handed. Forgotten with its process, or not.
#[derive(Default)]
pub struct Memory {
    /// The last of each conversation.
    pub seen: BTreeMap<u128, u64>,
    /// With whom, where, by whom.
    messages: VecDeque<(Peer, Place, u32)>,
}

impl Memory {
    /// The application of `user` is handed something.
    pub fn saw(&mut self, user: u32, shown: &Shown) {
        let place = shown.place;
        if place.seq == 0 {
            return;
        }
        self.seen.insert(place.conversation, place.seq);
        if shown.change.is_none() && shown.of.is_none() {
            if self.messages.len() >= REMEMBERED_MAX {
                self.messages.pop_front();
            }
            let with = if shown.to == Peer::User(user) { Peer::User(shown.from) } else { shown.to };
            self.messages.push_back((with, place, shown.from));
        }
    }

    /// The `number`th of the messages that it remembers, counted round and round: with whom, where, by whom.
    pub fn message(&self, number: usize) -> Option<(Peer, Place, u32)> {
        self.messages.get(number.checked_rem(self.messages.len())?).copied()
    }
}

/// What an event tells of messages and of others; nothing for news of the connection, and for presence, which counts as it
/// comes on its connection.
pub fn happenings(event: &Event) -> Vec<Happening> {
    match event {
        Event::Message(message) => vec![Happening::Saw(shown(message))],
        Event::Skipped { conversation, from, to, .. } => {
            vec![Happening::Skipped { conversation: conversation.0, from: from.0, to: to.0 }]
        }
        Event::Hidden { conversation, seq } => {
            vec![Happening::HideTold(Place { conversation: conversation.0, seq: seq.0 })]
        }
        Event::ReadUpto(read) => read_upto(read),
        Event::Signal(signal) => vec![self::signal(signal)],
        Event::Notice(notice) => {
            let (body, from) = (String::from_utf8_lossy(&notice.body).into_owned(), user(&notice.from));
            vec![Happening::Notice(Notice::Arrived { body, from })]
        }
        Event::Connected { .. }
        | Event::CaughtUp { .. }
        | Event::Receipt(_)
        | Event::SignalRefused { .. }
        | Event::Presence(_)
        | Event::GroupChanged(_)
        | Event::Missed { .. }
        | Event::Goaway { .. }
        | Event::Reconnecting { .. }
        | Event::Closed { .. } => Vec::new(),
    }
}

/// The name of a user or a group.
pub fn name(peer: Peer) -> UserName {
    let text = match peer {
        Peer::User(number) => format!("user-{number}"),
        Peer::Group(number) => format!("#group-{number}"),
    };
    UserName::new(&text).expect("a plain name")
}

/// Whom a name names. A name that is none of ours is nobody's: `u32::MAX`.
pub fn peer(name: &UserName) -> Peer {
    let number = |text: &str| text.parse().unwrap_or(u32::MAX);
    match name.as_str().strip_prefix("#group-") {
        Some(text) => Peer::Group(number(text)),
        None => Peer::User(name.as_str().strip_prefix("user-").map_or(u32::MAX, number)),
    }
}

/// As [`peer`], for what can only be a user.
pub fn user(name: &UserName) -> u32 {
    match peer(name) {
        Peer::User(number) => number,
        Peer::Group(_) => u32::MAX,
    }
}

pub fn shown(message: &Message) -> Shown {
    let change = message.extra.as_ref().and_then(|extra| extra.change.as_ref());
    let change = change.map(|change| {
        let users = || change.users.iter().map(user).collect();
        let one = || change.users.first().map_or(u32::MAX, user);
        match change.what {
            What::Created => Change::Created,
            What::Joined => Change::Came(users()),
            What::Left | What::Kicked => Change::Went(users()),
            What::Renamed => Change::Renamed,
            What::Policy => Change::Policy { open: change.number == JoinPolicy::Open as u64 },
            What::Muted => Change::Muted(one(), change.number),
            What::Role => Change::Ranked(one(), rank(change.number)),
            What::Transferred => Change::Transferred(one()),
            What::Dissolved => Change::Dissolved,
            // Pushes, never rows.
            What::Invited | What::Asked | What::Refused => Change::Other,
        }
    });
    let mentions = message
        .extra
        .as_ref()
        .map(|extra| Mentions { users: extra.mentions.iter().map(user).collect(), all: extra.mention_all });
    Shown {
        place: Place { conversation: message.conversation.0, seq: message.seq.0 },
        from: user(&message.from),
        to: peer(&message.to),
        device: message.device.0,
        client_seq: message.client_seq,
        body: message.text().into_owned(),
        change,
        of: message.amendment().map(|amendment| amendment.of.0),
        state: state(message.state()),
        mentions: mentions.unwrap_or_default(),
        time_ms: message.time_ms,
    }
}

fn rank(number: u64) -> Rank {
    match number {
        _ if number == Role::Owner as u64 => Rank::Owner,
        _ if number == Role::Admin as u64 => Rank::Admin,
        _ => Rank::Member,
    }
}

/// What a send of that number mentions, if anything.
pub fn mentioned(number: u64, options: &SendOptions) -> Option<Happening> {
    let mentions = Mentions { users: options.mentions.iter().map(user).collect(), all: options.mention_all };
    (mentions != Mentions::default()).then_some(Happening::Mentioned { number, mentions })
}

/// The lines of an export, as the checker takes them.
pub fn export(bytes: &[u8]) -> Export {
    let mut export = Export::default();
    for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let known = serde_json::from_slice(line).ok().and_then(|line: Value| exported(&line, &mut export));
        export.broken |= known.is_none();
    }
    export
}

/// Takes one line in; `None`: it is none that is known.
fn exported(line: &Value, export: &mut Export) -> Option<()> {
    let text = |field: &str| line.get(field)?.as_str();
    let named = |text: &str| UserName::new(text).ok().map(|name| user(&name));
    match text("type")? {
        "user" => export.user = Some(named(text("name")?)?),
        "message" => {
            let conversation = u128::from_str_radix(text("conversation")?, 16).ok()?;
            let place = Place { conversation, seq: line.get("seq")?.as_u64()? };
            export.messages.push((place, named(text("from")?)?, text("body")?.to_owned()));
        }
        "row" if text("table")? == "block" => export.blocks.push(named(text("key")?)?),
        "row" | "conversation" => {}
        _ => return None,
    }
    Some(())
}

fn state(state: MessageState) -> State {
    match state {
        MessageState::AsSent => State::AsSent,
        MessageState::Edited => State::Edited,
        MessageState::Recalled => State::Recalled,
        MessageState::Deleted => State::Deleted,
        MessageState::Hidden => State::Hidden,
    }
}

/// How far somebody has a conversation.
fn read_upto(read: &ReadUpto) -> Vec<Happening> {
    let (conversation, delivered, read_to) = (read.conversation.0, read.delivered.0, read.read.0);
    let user = read.user.as_ref().map(user);
    let has = Happening::HasShown { user, conversation, delivered, read: read_to };
    let place = Place { conversation, seq: read_to };
    let read = user.map(|user| Happening::ReadShown { source: Source::Push, user, place });
    std::iter::once(has).chain(read).collect()
}

pub fn presence(row: &ringline_client::Presence) -> Presence {
    let (online, last_seen_ms, status) = (row.online, row.last_seen_ms, row.status.clone());
    Presence { user: user(&row.user), online, last_seen_ms, status }
}

fn signal(signal: &Signal) -> Happening {
    let body = String::from_utf8_lossy(&signal.body).into_owned();
    Happening::SawSignal { from: user(&signal.from), to: peer(&signal.to), body }
}

pub fn receipts(place: Place, page: &ReceiptPage) -> Receipts {
    let rows = page.rows.iter().map(|row| (user(&row.user), row.delivered.0, row.read.0)).collect();
    Receipts { place, members: page.members, delivered: page.delivered, read: page.read, rows }
}

/// The answer to a FETCH; `None`: it was refused for another reason.
pub fn page(answer: Result<&History, &CallError>) -> Option<Page> {
    match answer {
        Ok(History { first, head, messages, .. }) => {
            let messages = messages.iter().map(shown).collect();
            Some(Page::Messages { first: first.0, head: head.0, messages })
        }
        Err(CallError::Refused { code: ErrorCode::Truncated, .. }) => Some(Page::Truncated),
        Err(_) => None,
    }
}

pub fn end_of_send(number: u64, result: Result<Accepted, SendError>) -> Happening {
    match result {
        Ok(accepted) => {
            let place = Place { conversation: accepted.conversation.0, seq: accepted.seq.0 };
            Happening::Accepted { number, place }
        }
        Err(SendError::Unknown) => Happening::Unknown { number },
        Err(SendError::Refused { code, .. }) => Happening::Refused { number, why: refusal(code) },
        Err(
            SendError::NotSent
            | SendError::QueueFull
            | SendError::BadName
            | SendError::BodyTooLarge { .. }
            | SendError::DeliveryNotAsked,
        ) => Happening::Refused { number, why: Refusal::Other },
    }
}

fn refusal(code: ErrorCode) -> Refusal {
    match code {
        ErrorCode::Blocked => Refusal::Blocked,
        ErrorCode::NotAccepted => Refusal::NotAccepted,
        ErrorCode::UserDeleted => Refusal::UserDeleted,
        ErrorCode::NotAllowed => Refusal::NotAllowed,
        _ => Refusal::Other,
    }
}

pub fn listed(row: &Conversation) -> Listed {
    Listed {
        conversation: row.conversation.0,
        first: row.first.0,
        head: row.head.0,
        read: row.read.0,
        pinned: row.pinned,
        muted_until_ms: row.muted_until_ms,
    }
}
