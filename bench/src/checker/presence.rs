//! Who is there: what watchers were told last is the truth, once nothing has changed for a while.
//!
//! In between anything may be told late. What a connection was told ends with it, because its server may have died.

use std::collections::{BTreeMap, BTreeSet};

use super::judge::Checker;
use super::{Device, Presence, Rule};

/// What a device was told.
#[derive(Default)]
struct View<'a> {
    connection: u64,
    users: BTreeMap<u32, &'a Presence>,
    watched: BTreeSet<u32>,
}

/// What a user says of himself: all that he asked for since what is certainly kept.
#[derive(Default)]
struct Said<'a> {
    kept: Option<(&'a str, bool)>,
    asked: Vec<(&'a str, bool)>,
}

/// What was heard of it until now.
#[derive(Default)]
pub struct Presences<'a> {
    views: BTreeMap<Device, View<'a>>,
    said: BTreeMap<u32, Said<'a>>,
    /// Of this round of rest: the devices, and since when they are gone.
    resting: BTreeMap<Device, Option<u64>>,
}

impl<'a> Checker<'a> {
    /// A new process watches nobody.
    pub fn watches_nobody(&mut self, device: Device) {
        self.presence.views.remove(&device);
    }

    pub fn watches(&mut self, device: Device, users: &[u32]) {
        self.presence.views.entry(device).or_default().watched.extend(users);
    }

    /// Perhaps already, perhaps not yet.
    pub fn looks_away(&mut self, device: Device, users: &[u32]) {
        let view = self.presence.views.entry(device).or_default();
        view.watched.retain(|user| !users.contains(user));
    }

    /// Who is deleted is not to be seen any more; `kept`: for certain.
    pub fn presence_ends(&mut self, user: u32, kept: bool) {
        let said = self.presence.said.entry(user).or_default();
        if kept {
            *said = Said { kept: Some(("", false)), asked: Vec::new() };
        } else {
            said.asked.push(("", false));
        }
    }

    pub fn presence_shown(&mut self, device: Device, (connection, pushed): (u64, bool), presence: &'a Presence) {
        if pushed {
            self.presence_pushed(device, presence.user);
        }
        self.verdict.counts.presence += 1;
        let view = self.presence.views.entry(device).or_default();
        if view.connection != connection {
            view.connection = connection;
            view.users.clear();
        }
        view.users.insert(presence.user, presence);
    }

    pub fn status_asked(&mut self, device: Device, said: (&'a str, bool)) {
        self.presence.said.entry(device.user).or_default().asked.push(said);
    }

    pub fn status_kept(&mut self, device: Device) {
        // Which of the two was later, a deletion or this, is not known.
        if self.ended.is_deleted(device.user) {
            return;
        }
        let said = self.presence.said.entry(device.user).or_default();
        said.kept = said.asked.last().copied().or(said.kept);
        said.asked.clear();
    }

    /// One device of a round of rest.
    pub fn rested(&mut self, device: Device, left_ms: Option<u64>) {
        self.presence.resting.insert(device, left_ms);
    }

    /// A round of rest is over.
    pub fn check_presence(&mut self) {
        let resting = std::mem::take(&mut self.presence.resting);
        for (device, _) in resting.iter().filter(|(_, left_ms)| left_ms.is_none()) {
            let Some(view) = self.presence.views.get(device) else { continue };
            let mut wrong = Vec::new();
            for user in view.watched.iter().filter(|user| resting.keys().any(|other| other.user == **user)) {
                let shown = view.users.get(user).copied();
                let left = resting.iter().filter(|(other, _)| other.user == *user).map(|(_, left_ms)| *left_ms);
                // Online while one device is; else gone since the last of them went.
                let left_ms = left.min_by_key(|left_ms| left_ms.map_or(0, |at| u64::MAX - at)).flatten();
                if !shown.is_some_and(|shown| self.is_true((shown, device.user), left_ms)) {
                    wrong.push(format!("{device:?} was told last {shown:?} of user {user}, who is gone: {left_ms:?}"));
                }
            }
            wrong.into_iter().for_each(|text| self.verdict.broken(Rule::PresenceConverges, text));
        }
    }

    fn is_true(&self, (shown, watcher): (&Presence, u32), left_ms: Option<u64>) -> bool {
        let (hides, shows) = self.permits.hides(shown.user, watcher);
        let as_said = |(status, visible): (&str, bool)| {
            let seen_late = left_ms.is_none_or(|at| shown.last_seen_ms >= at);
            let seen = shown.online == left_ms.is_none() && shown.status == status && seen_late;
            let unseen = !shown.online && shown.status.is_empty() && shown.last_seen_ms == 0;
            (hides && unseen) || (shows && if visible { seen } else { unseen })
        };
        let Some(said) = self.presence.said.get(&shown.user) else { return as_said(("", true)) };
        let first = said.kept.unwrap_or(("", true));
        std::iter::once(first).chain(said.asked.iter().copied()).any(as_said)
    }
}
