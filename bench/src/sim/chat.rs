//! What simulated applications do beside sending and asking: whom they take messages of, marks, mentions, notices to
//! everyone, and what becomes of groups.
//!
//! The first device of a user settles what counts by its last answer, one thing after the other. Everybody tries what
//! only some may, now and then: that it is refused is what the checker looks for.

use rand::RngExt;
use ringline_client::machine::Ask;
use ringline_client::{Class, ConversationId, JoinPolicy, MessagesFrom, Role, SendOptions};
use ringline_schema::message::chat::Mark;

use super::acts::GROUPS;
use super::asked::{Once, Purpose};
use super::device::{Device, EPOCH_US};
use super::world::{ADMIN, USERS, World};
use crate::checker::{Happening, History, Notice, Peer, Permit, Place, Takes};
use crate::observed;

/// How long a muted member is silent.
const MUTE_MS: u64 = 500;
/// Chance in percent that a durable message mentions somebody.
const MENTIONS_PERCENT: u32 = 10;

impl Device {
    /// Asks for something that counts from the answer on.
    fn settle(&mut self, now_ms: u64, ask: Ask, (asked, kept): (Happening, Happening), history: &mut History) {
        if self.name.number != 1 || self.asked.settling {
            return;
        }
        if self.asks(now_ms, Purpose::Once(Once::Settling(Box::new(kept))), ask) {
            self.asked.settling = true;
            history.push(self.name, asked);
        }
    }

    /// Whom it has blocked it mostly takes again.
    fn block(&mut self, now_ms: u64, (user, block): (u32, bool), history: &mut History) {
        let user = self.asked.blocked.take().filter(|_| !block).unwrap_or(user);
        self.asked.blocked = block.then_some(user);
        let ask = Ask::Block { user: observed::name(Peer::User(user)), block };
        let (asked, kept) = (Permit::BlockAsked { user, block }, Permit::BlockKept { user, block });
        self.settle(now_ms, ask, (Happening::Permit(asked), Happening::Permit(kept)), history);
    }

    fn take_messages_from(&mut self, now_ms: u64, takes: Takes, history: &mut History) {
        let ask = Ask::TakeMessagesFrom(match takes {
            Takes::Anyone => MessagesFrom::Anyone,
            Takes::Known => MessagesFrom::Known,
            Takes::Nobody => MessagesFrom::Nobody,
        });
        let (asked, kept) = (Permit::TakesAsked(takes), Permit::TakesKept(takes));
        self.settle(now_ms, ask, (Happening::Permit(asked), Happening::Permit(kept)), history);
    }

    fn mark(&mut self, now_ms: u64, conversation: u128, (pinned, until_ms): (bool, u64), history: &mut History) {
        let id = ConversationId(conversation);
        let ask = Ask::Mark(Mark { conversation: id, pinned: Some(pinned), muted_until_ms: Some(until_ms) });
        let mark = (pinned, until_ms);
        let marks = |kept| Happening::Marks { place: conversation, mark, kept };
        self.settle(now_ms, ask, (marks(false), marks(true)), history);
    }

    /// A notice to everyone, which only an administrator may send.
    pub fn tell_everyone(&mut self, now_ms: u64, at_rest: bool, history: &mut History) {
        let number = self.next_body();
        let body = format!("{}.{} tells all {number}", self.name.user, self.name.number);
        if self.asks(now_ms, Purpose::Once(Once::Notice(body.clone())), Ask::Broadcast(body.clone().into())) {
            history.push(self.name, Happening::Notice(Notice::Asked { body, at_rest }));
        }
    }
}

impl World {
    /// Whose messages it takes, or how it marks a conversation.
    pub(super) fn settle_something(&mut self, client: usize) {
        let (now_ms, own) = (self.now_ms(), self.clients[client].name.user);
        let other = (own + self.rng.random_range(1..USERS)) % USERS;
        let (what, block, pinned) = (self.rng.random_range(0..100), self.chance(50), self.chance(50));
        let place = self.clients[client].asked.place(self.rng.random_range(0..64));
        let until_ms = if self.chance(50) { EPOCH_US + self.now_us } else { 0 };
        let device = &mut self.clients[client];
        match (what, place) {
            (0..50, _) => device.block(now_ms, (other, block), &mut self.history),
            (50..65, _) => device.take_messages_from(now_ms, Takes::Anyone, &mut self.history),
            (65..72, _) => device.take_messages_from(now_ms, Takes::Known, &mut self.history),
            (72..78, _) => device.take_messages_from(now_ms, Takes::Nobody, &mut self.history),
            (_, Some(Place { conversation, .. })) => {
                device.mark(now_ms, conversation, (pinned, until_ms), &mut self.history);
            }
            (_, None) => {}
        }
    }

    /// Nothing else happens, and everybody is there.
    pub(super) fn tell_all_at_rest(&mut self) {
        let now_ms = self.now_ms();
        let all = self.clients.iter().all(|client| client.gone || client.machine.is_online());
        let admin = self.clients.iter().position(|client| client.name.user == ADMIN);
        if let Some(client) = admin.filter(|_| all) {
            self.clients[client].tell_everyone(now_ms, true, &mut self.history);
            self.pump(client);
        }
    }

    /// Whom a message mentions, mostly nobody.
    pub(super) fn mentions(&mut self, (class, to): (Class, Peer)) -> SendOptions {
        let mut options = SendOptions::default();
        if class == Class::Durable && self.chance(MENTIONS_PERCENT) {
            let count = self.rng.random_range(0..3);
            let users = (0..count).map(|_| self.rng.random_range(0..USERS)).collect::<Vec<_>>();
            options.mentions = users.into_iter().map(|user| observed::name(Peer::User(user))).collect();
            options.mention_all = matches!(to, Peer::Group(_)) && self.chance(40);
        }
        options
    }

    /// Mostly of the group that it has made.
    pub(super) fn change_some_group(&mut self, client: usize) {
        let own = self.clients[client].name.user;
        let group = if own < GROUPS && self.chance(70) { own } else { self.rng.random_range(0..GROUPS) };
        self.change_group(client, group);
    }

    /// Who ranks high enough changes something of a group; others are refused.
    pub(super) fn change_group(&mut self, client: usize, number: u32) {
        let group = observed::name(Peer::Group(number));
        let own = self.clients[client].name.user;
        let other = (own + self.rng.random_range(1..USERS)) % USERS;
        let user = observed::name(Peer::User(other));
        let (late, some) = (self.now_us > self.ends_us / 2, self.chance(50));
        let role = if some { Role::Admin } else { Role::Member };
        let what = self.rng.random_range(0..100);
        let ask = match what {
            0..30 => {
                let name = self.clients[client].name;
                self.history.push(name, Happening::Invites { group: number, open: None, users: vec![other] });
                Ask::Invite { group, users: vec![user] }
            }
            30..45 => Ask::AnswerRequest { group, user, approve: some },
            // Who made it stays: nobody else can read all of it.
            45..55 if other != number => Ask::Kick { group, user },
            55..63 => Ask::Mute { group, user, for_ms: MUTE_MS },
            63..77 => Ask::SetRole { group, user, role },
            77..81 => Ask::TransferGroup { group, user },
            81..86 => {
                let join = [JoinPolicy::Open, JoinPolicy::Invite, JoinPolicy::Approval][what % 3];
                Ask::SetJoinPolicy { group, join }
            }
            86..94 if self.dissolves && late => Ask::DissolveGroup(group),
            _ => Ask::RenameGroup { group, title: format!("title {what}") },
        };
        let now_ms = self.now_ms();
        self.clients[client].ask_group(now_ms, ask);
    }
}
