//! What clients of a round ask beside their sends: groups, READ, SYNC, lists, devices, who may write, marks, notices; and
//! what is read back in the end.
//!
//! Functions of an SDK client that give what happened, for the device's history. What has no answer (the connection was cut,
//! the server killed, the act not allowed) gives nothing: only a READ is told when it is asked, because it may count all
//! the same.

use std::collections::BTreeMap;

use rand::RngExt;
use rand::rngs::SmallRng;
use ringline_client::group::GroupDone;
use ringline_client::{
    CallError, Client, ConversationId, ConversationPage, DeviceId, ErrorCode, HistoryRange, JoinPolicy, MessagesFrom,
    Place as WirePlace, Role, Seq,
};

use super::traffic::{DEVICES_PER_USER, GROUPS, USERS};
use crate::checker::{Device, Happening, Moment, Notice, Peer, Permit, Place, Range, Source, Takes};
use crate::observed;

const PAGE_ROWS: u16 = 200;
/// How long a muted member is silent.
const MUTE_MS: u64 = 500;

/// One thing to ask for.
#[derive(Clone, Debug)]
pub enum Wish {
    Create(u32),
    Join(u32),
    Leave(u32),
    Invite(u32, u32),
    Approve(u32, u32),
    Kick(u32, u32),
    Rename(u32),
    Mute(u32, u32),
    Read(Place),
    /// What is behind these.
    Sync(Vec<Place>),
    List,
    DropDevice(u64),
    Hide(Peer, Place),
    Fetch((Peer, u128), Range),
    Watch(u32),
    Say(String),
    Block(u32, bool),
    Take(Takes),
    /// A conversation, pinned or not.
    Mark(u128, bool),
    /// A notice to everyone; for one user only.
    Tell(String),
    Promote(u32, u32, bool),
    Transfer(u32, u32),
    Policy(u32, JoinPolicy),
    Dissolve(u32),
}

/// How those may join whom a group does not know.
fn policy(number: u32) -> JoinPolicy {
    [JoinPolicy::Open, JoinPolicy::Invite, JoinPolicy::Approval][number as usize % 3]
}

impl Wish {
    /// A wish of a device whose application has `seen` so much, and remembers a message. Group n belongs to user n.
    pub fn any(
        (Device { user, number }, message): (Device, Option<(Peer, Place, u32)>),
        seen: &BTreeMap<u128, u64>,
        rng: &mut SmallRng,
    ) -> Self {
        if let (Some((with, place, _)), what) = (message, rng.random_range(0..100)) {
            // Often far back, where something may be gone.
            let after = rng.random_range(0..=if what % 5 == 0 { place.seq } else { place.seq.min(50) });
            let before = (what % 2 == 0).then(|| rng.random_range(after.max(1)..=place.seq + 2));
            match what {
                0..8 => return Self::Hide(with, place),
                8..20 => {
                    let range = Range { after, before, newest: what % 3 == 0 };
                    return Self::Fetch((with, place.conversation), range);
                }
                _ => {}
            }
        }
        match rng.random_range(0..100) {
            0..5 => return Self::Watch((user + rng.random_range(1..USERS)) % USERS),
            // One device speaks for its user, so that what was said last is known.
            5..10 if number == 1 => return Self::Say(format!("{user} feels {}", rng.random_range(0..u32::MAX))),
            10..20 if number == 1 => return Self::settles(user, seen, rng),
            20..22 => return Self::Tell(format!("{user}.{number} tells all {}", rng.random_range(0..u64::MAX))),
            22..28 => return Self::of_rank(user, rng),
            _ => {}
        }
        let group = rng.random_range(0..GROUPS);
        let other = (user + rng.random_range(1..USERS)) % USERS;
        let known = seen.iter().nth(rng.random_range(0..=seen.len()));
        let place = known.map(|(&conversation, &seq)| Place { conversation, seq });
        match (rng.random_range(0..100), place) {
            (0..5, _) => Self::Create(user.min(GROUPS - 1)),
            (5..15, _) if user == group => Self::Invite(group, other),
            (15..20, _) if user == group => Self::Approve(group, other),
            (20..25, _) if user == group => Self::Kick(group, other),
            (25..30, _) if user == group => Self::Rename(group),
            (30..35, _) if user == group => Self::Mute(group, other),
            (0..25, _) => Self::Join(group),
            (25..28, _) => Self::Leave(group),
            (28..60, Some(place)) => Self::Read(place),
            (60..75, Some(place)) => Self::Sync(vec![Place { seq: rng.random_range(0..=place.seq), ..place }]),
            (75..77, _) => Self::DropDevice(rng.random_range(1..=DEVICES_PER_USER)),
            (_, _) => Self::List,
        }
    }

    /// What counts from the answer on: asked for by one device of a user.
    fn settles(user: u32, seen: &BTreeMap<u128, u64>, rng: &mut SmallRng) -> Self {
        let other = (user + rng.random_range(1..USERS)) % USERS;
        let known = seen.keys().nth(rng.random_range(0..=seen.len()));
        match (rng.random_range(0..100), known) {
            (0..45, _) => Self::Block(other, rng.random_range(0..2) == 0),
            (45..60, _) => Self::Take(Takes::Anyone),
            (60..66, _) => Self::Take(Takes::Known),
            (66..70, _) => Self::Take(Takes::Nobody),
            (pick, Some(&conversation)) => Self::Mark(conversation, pick % 2 == 0),
            (_, None) => Self::Take(Takes::Anyone),
        }
    }

    /// What only some members may: who made the group mostly, others try.
    fn of_rank(user: u32, rng: &mut SmallRng) -> Self {
        let group = if rng.random_range(0..4) > 0 { user % GROUPS } else { rng.random_range(0..GROUPS) };
        let other = (user + rng.random_range(1..USERS)) % USERS;
        match rng.random_range(0..1_000) {
            0..600 => Self::Promote(group, other, rng.random_range(0..2) == 0),
            600..700 => Self::Transfer(group, other),
            700..900 => Self::Policy(group, policy(rng.random_range(0..3))),
            900..902 => Self::Dissolve(group),
            // Who made it stays: nobody else can read all of it.
            902..950 if other != group => Self::Kick(group, other),
            _ => Self::Rename(group),
        }
    }

    /// What is to be noted before it is asked.
    pub fn before(&self) -> Option<Happening> {
        match self {
            Self::Create(group) => Some(Happening::Invites {
                group: *group,
                open: Some(policy(*group) == JoinPolicy::Open),
                users: Vec::new(),
            }),
            Self::Invite(group, other) => Some(Happening::Invites { group: *group, open: None, users: vec![*other] }),
            Self::Block(user, block) => Some(Happening::Permit(Permit::BlockAsked { user: *user, block: *block })),
            Self::Take(takes) => Some(Happening::Permit(Permit::TakesAsked(*takes))),
            Self::Mark(conversation, pinned) => {
                Some(Happening::Marks { place: *conversation, mark: (*pinned, 0), kept: false })
            }
            Self::Tell(body) => Some(Happening::Notice(Notice::Asked { body: body.clone(), at_rest: false })),
            Self::Hide(_, place) => Some(Happening::HideAsked(*place)),
            Self::Say(status) => Some(Happening::StatusAsked { status: status.clone(), visible: true }),
            Self::Read(place) => Some(Happening::ReadAsked(*place)),
            Self::DropDevice(number) => Some(Happening::DropAsked(*number)),
            _ => None,
        }
    }

    /// Asks, and says what happened. `asked`: when.
    pub async fn ask(self, client: Client, asked: Moment) -> Vec<Happening> {
        let name = |peer| observed::name(peer).as_str().to_owned();
        let (user, group) = (|user| name(Peer::User(user)), |group| name(Peer::Group(group)));
        let done = match self {
            Self::Create(number) => client.create_group(&group(number), ("a group", policy(number)), &[]).await,
            Self::Join(number) => client.join_group(&group(number), "").await,
            Self::Leave(number) => client.leave_group(&group(number)).await,
            Self::Invite(number, other) => client.invite(&group(number), &[&user(other)]).await,
            Self::Approve(number, other) => client.answer_request(&group(number), &user(other), true).await,
            Self::Kick(number, other) => client.kick(&group(number), &user(other)).await,
            Self::Rename(number) => client.rename_group(&group(number), "another title").await,
            Self::Mute(number, other) => client.mute_member(&group(number), &user(other), MUTE_MS).await,
            Self::Read(place) => {
                let read = client.read(ConversationId(place.conversation), Seq(place.seq)).await;
                return read.map(|()| Happening::ReadKept(place)).into_iter().collect();
            }
            Self::Sync(behind) => return sync(&client, (asked, behind), false).await.into_iter().collect(),
            Self::List => return list(&client).await.map(|pages| reads_of(&client, asked, &pages)).unwrap_or_default(),
            Self::Hide(with, place) => {
                let hidden = client.delete_for_me(&name(with), Seq(place.seq)).await;
                return hidden.map(|()| Happening::HideKept(place)).into_iter().collect();
            }
            Self::Fetch(of, range) => return fetch(&client, asked, of, range).await.into_iter().collect(),
            Self::Watch(other) => {
                // How they are is told by events, and by them alone.
                let _ = client.watch(&[&user(other)]).await;
                return Vec::new();
            }
            Self::Say(status) => {
                return client.set_status(&status).await.map(|()| Happening::StatusKept).into_iter().collect();
            }
            Self::Block(other, block) => {
                let (other, kept) = (user(other), Permit::BlockKept { user: other, block });
                let done = if block { client.block(&other).await } else { client.unblock(&other).await };
                return done.map(|()| Happening::Permit(kept)).into_iter().collect();
            }
            Self::Take(takes) => {
                let who = match takes {
                    Takes::Anyone => MessagesFrom::Anyone,
                    Takes::Known => MessagesFrom::Known,
                    Takes::Nobody => MessagesFrom::Nobody,
                };
                let done = client.take_messages_from(who).await;
                return done.map(|()| Happening::Permit(Permit::TakesKept(takes))).into_iter().collect();
            }
            Self::Mark(conversation, pinned) => {
                let done = client.pin(ConversationId(conversation), pinned).await;
                return done
                    .map(|()| Happening::Marks { place: conversation, mark: (pinned, 0), kept: true })
                    .into_iter()
                    .collect();
            }
            Self::Tell(body) => return tell(&client, body).await,
            Self::Promote(number, other, up) => {
                let role = if up { Role::Admin } else { Role::Member };
                client.set_role(&group(number), &user(other), role).await
            }
            Self::Transfer(number, other) => client.transfer_group(&group(number), &user(other)).await,
            Self::Policy(number, join) => client.set_join_policy(&group(number), join).await,
            Self::Dissolve(number) => client.dissolve_group(&group(number)).await,
            Self::DropDevice(number) => {
                // Whether it was this device itself, its session ends then.
                let _ = client.drop_device(DeviceId(number)).await;
                return Vec::new();
            }
        };
        changed(done).into_iter().collect()
    }
}

async fn tell(client: &Client, body: String) -> Vec<Happening> {
    match client.broadcast(body.clone(), 0).await {
        Ok(devices) => vec![Happening::Notice(Notice::Given { body, devices })],
        Err(CallError::Refused { code: ErrorCode::NotAllowed, .. }) => vec![Happening::Outranked],
        Err(_) => Vec::new(),
    }
}

/// A part of a history.
async fn fetch(client: &Client, asked: Moment, (with, conversation): (Peer, u128), range: Range) -> Option<Happening> {
    let Range { after, before, newest } = range;
    let wanted = HistoryRange { after: Seq(after), before: before.map(Seq), limit: PAGE_ROWS, newest };
    let answer = client.history(observed::name(with).as_str(), wanted).await;
    let page = observed::page(answer.as_ref())?;
    Some(Happening::Fetched { asked, with, conversation, range, page })
}

/// Who has the last message of each conversation.
async fn receipts(client: &Client, pages: &[ConversationPage]) -> Vec<Happening> {
    let mut happenings = Vec::new();
    for row in pages.iter().flat_map(|page| &page.conversations).filter(|row| row.head > Seq::ZERO) {
        // What is refused is none of ours any more, or let go.
        if let Ok(page) = client.receipts(row.conversation, row.head, None, PAGE_ROWS).await {
            let place = Place { conversation: row.conversation.0, seq: row.head.0 };
            happenings.push(Happening::ReceiptsShown(observed::receipts(place, &page)));
        }
    }
    happenings
}

fn changed(done: Result<GroupDone, CallError>) -> Option<Happening> {
    if let Err(CallError::Refused { code: ErrorCode::NotAllowed, .. }) = done {
        return Some(Happening::Outranked);
    }
    let done = done.ok().filter(|done| done.seq > Seq::ZERO)?;
    Some(Happening::Changed(Place { conversation: done.conversation.0, seq: done.seq.0 }))
}

/// A whole SYNC; without its end if a page can't be had.
async fn sync(client: &Client, (asked, behind): (Moment, Vec<Place>), at_rest: bool) -> Result<Happening, CallError> {
    let wire = |place: &Place| WirePlace { conversation: ConversationId(place.conversation), seq: Seq(place.seq) };
    let places: Vec<WirePlace> = behind.iter().map(wire).collect();
    let (mut messages, mut from) = (Vec::new(), None);
    loop {
        let page = client.sync(&places, from, PAGE_ROWS).await?;
        messages.extend(page.messages.iter().map(observed::shown));
        match page.next {
            Some(next) => from = Some(next),
            None => return Ok(Happening::Synced { asked, behind, messages, whole: at_rest }),
        }
    }
}

async fn list(client: &Client) -> Result<Vec<ConversationPage>, CallError> {
    let (mut pages, mut from) = (Vec::new(), None);
    loop {
        let page = client.conversations(from, PAGE_ROWS).await?;
        from = page.next;
        pages.push(page);
        if from.is_none() {
            return Ok(pages);
        }
    }
}

fn reads_of(client: &Client, asked: Moment, pages: &[ConversationPage]) -> Vec<Happening> {
    let rows = pages.iter().flat_map(|page| &page.conversations);
    let (source, user) = (Source::List, observed::user(client.user()));
    rows.flat_map(|row| {
        let first = Place { conversation: row.conversation.0, seq: row.first.0 };
        let place = Place { conversation: row.conversation.0, seq: row.read.0 };
        [Happening::FloorShown { asked, first }, Happening::ReadShown { source, user, place }]
    })
    .collect()
}

/// Everything once, when nothing is sent any more. Errors: a page can't be had.
pub async fn read_all(client: &Client, asked: Moment) -> Result<Vec<Happening>, CallError> {
    let mut happenings = Vec::new();
    for with in (0..USERS).map(Peer::User).chain((0..GROUPS).map(Peer::Group)) {
        match read_log(client, with).await {
            Ok(log) => happenings.push(log),
            // Of no group that this user was ever in.
            Err(CallError::Refused { .. }) if matches!(with, Peer::Group(_)) => {}
            Err(error) => return Err(error),
        }
    }
    let pages = list(client).await?;
    happenings.extend(reads_of(client, asked, &pages));
    happenings.extend(receipts(client, &pages).await);
    let rows = || pages.iter().flat_map(|page| &page.conversations);
    happenings.push(Happening::Listed(rows().map(observed::listed).collect()));
    let behind = rows().map(|row| Place { conversation: row.conversation.0, seq: 0 }).collect();
    happenings.push(sync(client, (asked, behind), true).await?);
    let devices = client.devices().await?;
    let others: Vec<String> = (0..USERS).map(|user| observed::name(Peer::User(user)).as_str().to_owned()).collect();
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    for row in client.watch(&others).await? {
        let presence = observed::presence(&row);
        happenings.push(Happening::Watches(vec![presence.user]));
        happenings.push(Happening::PresenceShown { connection: 0, presence, pushed: false });
    }
    happenings.push(Happening::Devices(devices.iter().map(|device| device.device.0).collect()));
    happenings.push(export(client).await?);
    Ok(happenings)
}

/// All that is kept about the user.
async fn export(client: &Client) -> Result<Happening, CallError> {
    let (mut bytes, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = client.export(&cursor).await?;
        bytes.extend(page.body);
        match page.next {
            Some(next) => cursor = next,
            None => return Ok(Happening::Exported(observed::export(&bytes))),
        }
    }
}

async fn read_log(client: &Client, with: Peer) -> Result<Happening, CallError> {
    let (mut messages, mut after) = (Vec::new(), Seq::ZERO);
    let name = observed::name(with);
    loop {
        let range = HistoryRange { after, before: None, limit: PAGE_ROWS, newest: false };
        let page = client.history(name.as_str(), range).await?;
        messages.extend(page.messages.iter().map(observed::shown));
        match page.messages.last() {
            Some(last) => after = last.seq,
            None => {
                let (conversation, first, head) = (page.conversation.0, page.first.0, page.head.0);
                return Ok(Happening::ReadBack { conversation, with, first, head, messages });
            }
        }
    }
}
