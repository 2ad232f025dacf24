//! Who may write to whom: block lists and who-may-write, as their owner was told that they are kept.
//!
//! What somebody has asked for and was not told of may be so or not, so a rule bites only where it is certain: what was
//! first sent after the answer, and came before the contrary was asked for. The other way round nothing is refused for
//! a reason that cannot have been there. Groups know no blocks, and who is kept out may still take back. One device of
//! a user changes these, one thing after the other: what it asked for later counts.

use std::collections::BTreeMap;

use super::judge::{Checker, End, Send};
use super::{Device, Moment, Peer, Rule, State};

/// Whose messages a user takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Takes {
    #[default]
    Anyone,
    /// Of those that he has written to.
    Known,
    Nobody,
}

/// What a user settles about who writes to him.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// He takes nothing of this user any more, or takes it again …
    BlockAsked {
        user: u32,
        block: bool,
    },
    /// … and was told that this is kept.
    BlockKept {
        user: u32,
        block: bool,
    },
    TakesAsked(Takes),
    TakesKept(Takes),
}

/// Why a send was refused, where that is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Blocked,
    NotAccepted,
    UserDeleted,
    /// The sender's rank in a group is too low for it.
    NotAllowed,
    Other,
}

/// Something that one side settles: what is kept, and what may be.
#[derive(Debug)]
pub(super) struct Setting<T> {
    kept: T,
    since: Moment,
    /// Not answered yet, or never.
    asked: Vec<T>,
    /// Until when something else may have been so.
    last: BTreeMap<T, Moment>,
}

impl<T: Default> Default for Setting<T> {
    fn default() -> Self {
        Self { kept: T::default(), since: Moment::default(), asked: Vec::new(), last: BTreeMap::new() }
    }
}

impl<T: Copy + Ord> Setting<T> {
    pub fn ask(&mut self, value: T) {
        self.asked.push(value);
    }

    pub fn keep(&mut self, value: T, now: Moment) {
        let before = std::mem::take(&mut self.asked);
        let other = before.iter().copied().chain([self.kept]).filter(|one| *one != value);
        let mut changed = false;
        for one in other {
            self.last.insert(one, now);
            changed = true;
        }
        if changed {
            self.since = now;
        }
        self.kept = value;
    }

    /// What it is for certain, and since when.
    pub fn certain(&self) -> Option<(T, Moment)> {
        self.asked.iter().all(|one| *one == self.kept).then_some((self.kept, self.since))
    }

    /// Whether it may be so at any moment from `since` on.
    pub fn may_be(&self, value: T, since: Moment) -> bool {
        let now = self.kept == value || self.asked.contains(&value);
        now || self.last.get(&value).is_some_and(|until| *until >= since)
    }
}

/// What was heard of it until now.
#[derive(Default)]
pub struct Permits {
    blocks: BTreeMap<(u32, u32), Setting<bool>>,
    takes: BTreeMap<u32, Setting<Takes>>,
    /// Who has written to whom, first: when that was sent, and when it was accepted.
    wrote: BTreeMap<(u32, u32), (Moment, Option<Moment>)>,
}

impl Permits {
    /// Whether `user` certainly took nothing of `from` when that was sent, and does not now.
    fn bars(&self, (user, from): (u32, u32), sent: Moment) -> bool {
        let certain = self.blocks.get(&(user, from)).and_then(Setting::certain);
        if certain.is_some_and(|(block, since)| block && since < sent) {
            return true;
        }
        match self.takes.get(&user).and_then(Setting::certain).filter(|(_, since)| *since < sent) {
            Some((Takes::Nobody, _)) => true,
            Some((Takes::Known, _)) => !self.wrote.contains_key(&(user, from)),
            Some((Takes::Anyone, _)) | None => false,
        }
    }

    /// Whether `user` perhaps refused what `from` sent then as not accepted.
    fn may_not_accept(&self, (user, from): (u32, u32), sent: Moment) -> bool {
        let Some(takes) = self.takes.get(&user) else { return false };
        let accepted = self.wrote.get(&(user, from)).and_then(|(_, accepted)| *accepted);
        let known = accepted.is_some_and(|accepted| accepted < sent);
        takes.may_be(Takes::Nobody, sent) || (takes.may_be(Takes::Known, sent) && !known)
    }

    /// Whether `user` is hidden from `watcher`: perhaps, and perhaps not.
    pub fn hides(&self, user: u32, watcher: u32) -> (bool, bool) {
        let block = self.blocks.get(&(user, watcher));
        let may_be = |value: bool| block.map_or(!value, |block| block.may_be(value, Moment(usize::MAX)));
        (may_be(true), may_be(false))
    }

    /// Whom `user` certainly blocks, and whom perhaps.
    pub fn blocked(&self, user: u32, other: u32) -> (bool, bool) {
        let block = self.blocks.get(&(user, other));
        let certain = block.and_then(Setting::certain).is_some_and(|(block, _)| block);
        (certain, block.is_some_and(|block| block.may_be(true, Moment(usize::MAX))))
    }

    /// `from` sends something durable, which makes `to` known to him; `accepted`: for certain.
    pub fn writes(&mut self, (from, to): (u32, u32), accepted: bool, now: Moment) {
        let (_, known) = self.wrote.entry((from, to)).or_insert((now, None));
        if accepted {
            known.get_or_insert(now);
        }
    }
}

impl Checker<'_> {
    pub fn permit(&mut self, device: Device, permit: Permit) {
        let (user, now) = (device.user, self.now);
        match permit {
            Permit::BlockAsked { user: other, block } => {
                self.permits.blocks.entry((user, other)).or_default().ask(block);
            }
            Permit::BlockKept { user: other, block } => {
                self.verdict.counts.permits += 1;
                self.permits.blocks.entry((user, other)).or_default().keep(block, now);
            }
            Permit::TakesAsked(takes) => self.permits.takes.entry(user).or_default().ask(takes),
            Permit::TakesKept(takes) => {
                self.verdict.counts.permits += 1;
                self.permits.takes.entry(user).or_default().keep(takes, now);
            }
        }
    }

    /// Who this is for, if he may refuse it.
    fn taker(device: Device, send: &Send<'_>) -> Option<u32> {
        let takes_back = send.amends.is_some_and(|(_, what)| what != State::Edited);
        match send.to {
            Peer::User(user) if user != device.user && !takes_back => Some(user),
            Peer::User(_) | Peer::Group(_) => None,
        }
    }

    /// Something that `from` sent then to that user was taken, or given to him.
    pub fn was_taken(&mut self, (from, to): (u32, Peer), sent: Moment, what: &str) {
        if let Peer::User(user) = to
            && user != from
            && self.permits.bars((user, from), sent)
        {
            let text = format!("{what} of user {from}, who was kept out by user {user} before");
            self.verdict.broken(Rule::OnlyWhoMayWrites, text);
        }
    }

    /// That send was accepted, or its row is there.
    pub fn send_was_taken(&mut self, device: Device, number: u64) {
        let Some(send) = self.sends.get(&(device, number)) else { return };
        if Self::taker(device, send).is_some() {
            let (to, at, text) = (send.to, send.at, format!("send {number} {:?}", send.body));
            self.was_taken((device.user, to), at, &text);
        }
    }

    pub fn refused(&mut self, device: Device, number: u64, why: Refusal) {
        let Some(send) = self.sends.get(&(device, number)) else { return };
        let (to, at, taker) = (send.to, send.at, Self::taker(device, send));
        let between = taker.map(|user| (user, device.user));
        let right = match (why, between) {
            (Refusal::Other | Refusal::NotAllowed, _) => true,
            (Refusal::Blocked, Some(between)) => {
                self.permits.blocks.get(&between).is_some_and(|block| block.may_be(true, at))
            }
            (Refusal::NotAccepted, Some(between)) => self.permits.may_not_accept(between, at),
            (Refusal::UserDeleted, _) => {
                let to = matches!(to, Peer::User(user) if self.ended.is_deleted(user));
                to || self.ended.is_deleted(device.user)
            }
            (Refusal::Blocked | Refusal::NotAccepted, None) => false,
        };
        if !right {
            let text = format!("send {number} of {device:?} to {to:?} was refused as {why:?}, which was not so");
            self.verdict.broken(Rule::RefusedForAReason, text);
        }
        if matches!(why, Refusal::Blocked | Refusal::NotAccepted)
            && between.is_some_and(|between| self.permits.bars(between, at))
        {
            self.verdict.counts.barred += 1;
        }
        self.end(device, number, End::Refused);
    }
}
