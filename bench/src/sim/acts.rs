//! What simulated applications do: they send, in bursts, to users and groups; they come into groups and leave them, read, ask for
//! lists and for what they missed, and log each other out.
//!
//! Group n is made by user n, who stays a member, perhaps not its owner, and so can read all of it in the end.

use std::time::Duration;

use rand::RngExt;
use ringline_client::machine::Ask;
use ringline_client::{Class, JoinPolicy, SendOptions};
use ringline_schema::message::chat::AmendAction;

use super::device::Device;
use super::world::{Action, Mortal, USERS, World};
use crate::checker::{Happening, Peer, Place, Range};
use crate::observed;

/// At most one a user.
pub const GROUPS: u32 = 3;
/// Sends without an answer above which an application waits.
const OPEN_SENDS_MAX: u32 = 40;

const _: () = assert!(GROUPS <= USERS);

/// All that can be written to.
pub fn peers() -> impl Iterator<Item = Peer> {
    (0..USERS).map(Peer::User).chain((0..GROUPS).map(Peer::Group))
}

/// What `own` does with a message that `by` has written; `what` picks.
pub fn amendment((own, by): (u32, u32), with: Peer, what: usize) -> AmendAction {
    use AmendAction::{DeleteForAll, DeleteForMe, Edit, Recall};
    match with {
        _ if by == own => [Edit, Edit, Edit, Recall, DeleteForAll, DeleteForMe][what % 6],
        Peer::Group(group) if group == own => [DeleteForAll, DeleteForMe, Edit][what % 3],
        Peer::User(_) | Peer::Group(_) => [DeleteForMe, DeleteForMe, Edit, Recall, DeleteForAll][what % 5],
    }
}

impl World {
    pub(super) fn act(&mut self, client: usize) {
        if !self.lively {
            return;
        }
        let pause = self.random_us(10_000, 400_000);
        self.after(pause, Action::Act { client });
        if self.clients[client].gone {
            return;
        }
        if self.chance(8) {
            self.settle_something(client);
        } else if self.chance(14) {
            self.change_some_group(client);
        } else if self.chance(30) {
            self.ask_something(client);
        } else if self.chance(15) {
            self.amend_something(client);
        } else if self.chance(10) {
            self.pass_something(client);
        } else if self.clients[client].open_sends <= OPEN_SENDS_MAX {
            self.send_some(client);
        }
        self.pump(client);
    }

    fn send_some(&mut self, client: usize) {
        // Now and then a burst, so that several are in one batch of the disk.
        let count = if self.chance(10) { self.rng.random_range(2..12) } else { 1 };
        for _ in 0..count {
            let to_group = self.chance(30);
            let to = match to_group {
                true => Peer::Group(self.rng.random_range(0..GROUPS)),
                false => Peer::User(self.rng.random_range(0..USERS)),
            };
            let padding = if self.chance(5) { self.rng.random_range(200..3_000) } else { 0 };
            let timeout = Duration::from_millis(self.rng.random_range(1..1_500));
            let class = if self.chance(15) { Class::Transient } else { Class::Durable };
            // A false receipt shows best on a message that never arrives, which only a transient one may.
            let wanted_percent = if class == Class::Transient { 80 } else { 20 };
            let options = SendOptions {
                class,
                delivery_timeout: self.chance(wanted_percent).then_some(timeout),
                give_up_after: self.chance(10).then_some(Duration::from_secs(2)),
                ..self.mentions((class, to))
            };
            let now_ms = self.now_ms();
            self.clients[client].send((now_ms, to), (options, padding), &mut self.history);
        }
    }

    /// Signals, watches others, says how it is.
    fn pass_something(&mut self, client: usize) {
        let (now_ms, other) = (self.now_ms(), self.rng.random_range(0..USERS));
        let to = if self.chance(50) { Peer::Group(other % GROUPS) } else { Peer::User(other) };
        let (what, visible) = (self.rng.random_range(0..100), self.chance(80));
        let device = &mut self.clients[client];
        match what {
            0..50 => device.signal(now_ms, to, &mut self.history),
            50..55 => device.tell_everyone(now_ms, false, &mut self.history),
            55..73 if other != device.name.user && device.may_watch() => {
                device.watch(now_ms, &[other], &mut self.history);
            }
            73..87 if other != device.name.user => device.unwatch(now_ms, other, &mut self.history),
            // The first device of a user speaks for him, so that what was said last is known.
            87..100 if device.name.number == 1 => device.say(now_ms, visible, &mut self.history),
            _ => {}
        }
    }

    /// The user whose time has come is deleted by one of its own devices or by the administrator, who ask until they are
    /// told that it is done, or may not ask any more.
    pub(super) fn delete_somebody(&mut self, mortal: Mortal) {
        let pause = self.random_us(500_000, 3_000_000);
        let Mortal { user, by, recall } = mortal;
        let (now_ms, number) = (self.now_ms(), self.rng.random_range(1..=2));
        let told = self.clients.iter().any(|client| client.name.user == user && client.gone);
        if !self.lively || told {
            return;
        }
        let asks = |client: &Device| client.name.user == by && client.name.number == number;
        if let Some(client) = self.clients.iter().position(asks) {
            self.clients[client].delete_user(now_ms, (user, recall), &mut self.history);
            self.pump(client);
        }
        self.after(pause, Action::Delete(mortal));
    }

    /// A part of a history: from anywhere, to anywhere, from either end.
    fn fetch_something(&mut self, client: usize) {
        let (now_ms, number) = (self.now_ms(), self.rng.random_range(0..1_024));
        let Some((with, place, _)) = self.clients[client].asked.memory.message(number) else { return };
        // Often far back, where something may be gone.
        let most = if self.chance(50) { place.seq.min(5) } else { place.seq };
        let after = self.rng.random_range(0..=most);
        let before = self.chance(50).then(|| self.rng.random_range(after.max(1)..=place.seq + 2));
        let range = Range { after, before, newest: self.chance(50) };
        self.clients[client].fetch(now_ms, (with, place.conversation), range, &self.history);
    }

    /// Mostly what is allowed.
    fn amend_something(&mut self, client: usize) {
        let (now_ms, number) = (self.now_ms(), self.rng.random_range(0..1_024));
        let Some((with, place, by)) = self.clients[client].asked.memory.message(number) else { return };
        let own = self.clients[client].name.user;
        let what = self.rng.random_range(0..100);
        let action = amendment((own, by), with, what);
        self.clients[client].amend(now_ms, (with, place), action, &mut self.history);
    }

    fn ask_something(&mut self, client: usize) {
        let now_ms = self.now_ms();
        let number = self.rng.random_range(0..64);
        let place = self.clients[client].asked.place(number);
        match self.rng.random_range(0..100) {
            0..40 => self.act_in_group(client),
            40..65 => {
                if let Some(place) = place {
                    self.clients[client].read(now_ms, place, &mut self.history);
                }
            }
            65..82 => {
                let behind = place.map(|place| Place { seq: self.rng.random_range(0..=place.seq), ..place });
                self.clients[client].sync(now_ms, behind.into_iter().collect(), &self.history);
            }
            82..90 => self.clients[client].list(now_ms, &self.history),
            90..99 => self.fetch_something(client),
            _ => {
                let number = self.rng.random_range(1..=2);
                self.clients[client].drop_device(now_ms, number, &mut self.history);
            }
        }
    }

    /// The owner's first wish of a group.
    pub(super) fn create_group(&mut self, client: usize, group: u32) {
        let join = [JoinPolicy::Open, JoinPolicy::Invite, JoinPolicy::Approval][group as usize % 3];
        let users: Vec<u32> = (0..USERS).filter(|user| (user + group).is_multiple_of(2)).collect();
        let names = users.iter().map(|user| observed::name(Peer::User(*user))).collect();
        let ask = Ask::CreateGroup { group: observed::name(Peer::Group(group)), join, users: names };
        let (name, now_ms) = (self.clients[client].name, self.now_ms());
        self.history.push(name, Happening::Invites { group, open: Some(join == JoinPolicy::Open), users });
        self.clients[client].ask_group(now_ms, ask);
    }

    fn act_in_group(&mut self, client: usize) {
        let number = self.rng.random_range(0..GROUPS);
        let group = observed::name(Peer::Group(number));
        let own = self.clients[client].name.user;
        let made = own == number;
        let ask = match self.rng.random_range(0..100) {
            0..10 if made => return self.create_group(client, number),
            0..100 if made => return self.change_group(client, number),
            0..55 => Ask::JoinGroup(group),
            55..67 => Ask::LeaveGroup(group),
            67..77 => {
                let (user, approve) = (observed::name(Peer::User(own)), self.chance(50));
                Ask::AnswerRequest { group, user, approve }
            }
            // He may have been given the rank for it, or not.
            _ => return self.change_group(client, number),
        };
        let now_ms = self.now_ms();
        self.clients[client].ask_group(now_ms, ask);
    }
}
