//! Users that are deleted, devices that are dropped, and who is watched no more: what has been ended stays so.
//!
//! A deletion that was answered, or that turned somebody away, stands for ever: nobody logs in under the name, nobody writes
//! to it, it says nothing, it is in no group, and what was to be taken back with it is. One that was asked for and not
//! answered may be so or not. Others lose nothing by it: for them all rules hold.
//!
//! Deleted are only users who have made no group; of the groups of those who have nobody else reads all.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::judge::{Checker, End};
use super::members::Members;
use super::{Device, Moment, Peer, Place, Rule, Shown, State};

/// The number of the device that takes messages back in the name of who was deleted; no process has it.
const DELETER: u64 = 0;

/// What was heard of it until now.
#[derive(Default)]
pub struct Ended {
    /// Who was to be deleted, and whether with what he wrote.
    asked: BTreeMap<u32, bool>,
    /// Since when it stands that nobody logs in under the name …
    certain: BTreeMap<u32, Moment>,
    /// … and that everybody knows.
    kept: BTreeMap<u32, Moment>,
    /// When a connection was begun, and when its device was told that it is logged in.
    begun: HashMap<u64, Moment>,
    logged_in: HashMap<u64, Moment>,
    drop_asked: HashMap<Device, Moment>,
    /// From when to when: what it was logged in on before the first is ended by the second.
    dropped: HashMap<Device, (Moment, Moment)>,
    /// What came on a connection that had been ended.
    late: Vec<(Device, Place, Moment)>,
    unwatched: HashSet<(Device, u32)>,
}

impl Ended {
    /// Nothing is promised to who was perhaps deleted.
    pub fn is_deleted(&self, user: u32) -> bool {
        self.asked.contains_key(&user)
    }

    /// What somebody wrote to himself nobody reads back when he is deleted.
    pub fn reads_alone(&self, user: u32, to: Peer) -> bool {
        to == Peer::User(user) && self.is_deleted(user)
    }

    /// Whether that row takes a message back in the name of a deleted user.
    pub fn takes_back(&self, row: &Shown) -> bool {
        row.of.is_some() && row.device == DELETER && self.recalls(row.from)
    }

    /// Whether what this user wrote may have been taken back with him.
    pub fn recalls(&self, user: u32) -> bool {
        self.asked.get(&user) == Some(&true)
    }
}

impl Checker<'_> {
    pub fn connects(&mut self, connection: u64) {
        self.ended.begun.insert(connection, self.now);
    }

    pub fn logged_in(&mut self, device: Device, connection: u64) {
        self.ended.logged_in.insert(connection, self.now);
        let began = self.ended.begun.get(&connection).copied().unwrap_or_default();
        if self.ended.certain.get(&device.user).is_some_and(|since| *since < began) {
            let text = format!("{device:?} logged in, and was deleted before");
            self.verdict.broken(Rule::DeletedForEver, text);
        }
    }

    pub fn turned_away(&mut self, device: Device) {
        self.verdict.counts.turned_away += 1;
        if !self.ended.is_deleted(device.user) {
            let text = format!("{device:?} was told that its user is deleted, which nobody has asked for");
            self.verdict.broken(Rule::DeletedForEver, text);
        }
        self.ended.certain.entry(device.user).or_insert(self.now);
    }

    pub fn delete_asked(&mut self, user: u32, recall: bool) {
        self.ended.asked.insert(user, recall);
        self.presence_ends(user, false);
    }

    pub fn delete_kept(&mut self, user: u32) {
        self.ended.certain.entry(user).or_insert(self.now);
        self.ended.kept.entry(user).or_insert(self.now);
        self.presence_ends(user, true);
    }

    pub fn drop_asked(&mut self, device: Device) {
        self.dropped.insert(device);
        self.ended.drop_asked.insert(device, self.now);
    }

    pub fn drop_kept(&mut self, device: Device) {
        if let Some(since) = self.ended.drop_asked.get(&device) {
            self.ended.dropped.insert(device, (*since, self.now));
        }
    }

    /// Something was pushed.
    pub fn came_late(&mut self, device: Device, connection: u64, place: Place) {
        let Some((asked, kept)) = self.ended.dropped.get(&device) else { return };
        if self.ended.logged_in.get(&connection).is_some_and(|since| since < asked) {
            self.ended.late.push((device, place, *kept));
        }
    }

    pub fn watch_asked(&mut self, device: Device, users: &[u32]) {
        users.iter().for_each(|user| _ = self.ended.unwatched.remove(&(device, *user)));
    }

    pub fn unwatched(&mut self, device: Device, users: &[u32]) {
        self.ended.unwatched.extend(users.iter().map(|user| (device, *user)));
    }

    /// A new process has looked away from nobody.
    pub fn unwatches_nobody(&mut self, device: Device) {
        self.ended.unwatched.retain(|(of, _)| *of != device);
    }

    /// Somebody's presence was pushed.
    pub fn presence_pushed(&mut self, device: Device, user: u32) {
        if self.ended.unwatched.contains(&(device, user)) {
            let text = format!("{device:?} was told how user {user} is, whom it does not watch any more");
            self.verdict.broken(Rule::UnwatchedIsSilent, text);
        }
    }

    pub fn check_ended(&mut self, members: &Members) {
        self.verdict.counts.deleted = self.ended.kept.len() as u64;
        for (device, place, kept) in std::mem::take(&mut self.ended.late) {
            // What was on its way when it was ended may come; what was sent after that may not.
            if self.send_at(place).is_some_and(|send| send.at > kept) {
                let text = format!("{device:?} was pushed {place:?} on a connection that had been ended by then");
                self.verdict.broken(Rule::DroppedIsOut, text);
            }
        }
        let mut wrong = Vec::new();
        for ((device, number), send) in &self.sends {
            let End::Accepted(place) = send.end else { continue };
            let after = |user: u32| self.ended.kept.get(&user).is_some_and(|kept| *kept < send.at);
            let takes_back = send.amends.is_some_and(|(_, what)| what != State::Edited);
            if matches!(send.to, Peer::User(user) if after(user) && place.seq != 0 && !takes_back) {
                wrong.push(format!("send {number} of {device:?} was accepted at {place:?} by who is deleted"));
            }
            if after(device.user) {
                wrong.push(format!("send {number} of {device:?} was accepted at {place:?}, its sender is deleted"));
            }
        }
        // Nobody is told of who leaves a group that was dissolved.
        let told = |log: &&u128| !members.is_unknown(**log) && !self.groups.is_dissolved(**log);
        for group in self.logs.keys().filter(|log| !self.pairs.contains_key(*log)).filter(told) {
            let here: BTreeSet<u32> = members.now(*group).map_or_else(BTreeSet::new, Iterator::collect);
            for user in self.ended.kept.keys().filter(|user| here.contains(*user)) {
                wrong.push(format!("user {user} is deleted and still a member of {group:032x}"));
            }
        }
        for (reader, messages) in &self.amendments.readings {
            let stays = |shown: &&Shown| {
                let goes = self.ended.kept.contains_key(&shown.from) && self.ended.recalls(shown.from);
                goes && shown.is_message() && matches!(shown.state, State::AsSent | State::Edited)
            };
            let stays = messages.iter().filter(stays);
            wrong.extend(
                stays.map(|shown| format!("{reader:?} read {shown:?}, whose sender is deleted and took it back")),
            );
        }
        wrong.into_iter().for_each(|text| self.verdict.broken(Rule::DeletedIsGone, text));
    }
}
