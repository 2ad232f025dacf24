//! What a server tells beside conversations: notices of administrators, marks of conversations, exports, mentions.
//!
//! A notice is not stored: a device may miss one, but none gets it more often than it was asked for, and while nothing
//! happens everyone online gets it. An export is asked for while nothing changes, after the same device has read
//! everything back: it holds just that.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::judge::Checker;
use super::permits::Setting;
use super::{Device, Listed, Mentions, Place, Rule, Shown};

/// About a notice to everyone; no two have the same body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// This device asks for it; `at_rest`: while nothing else happens and everybody is there.
    Asked { body: String, at_rest: bool },
    /// This device's user may ask for one.
    Appointed,
    /// The question has been written to a connection, once more.
    Written { body: String },
    /// It was given to so many devices.
    Given { body: String, devices: u32 },
    /// It has arrived at this device.
    Arrived { body: String, from: u32 },
}

/// What a user was given when he asked for everything that is kept about him.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Whose account it is.
    pub user: Option<u32>,
    pub blocks: Vec<u32>,
    /// Where, by whom, and what.
    pub messages: Vec<(Place, u32, String)>,
    /// A line was none that is known.
    pub broken: bool,
}

/// A mark of a conversation: pinned, and until when it is silent, Unix milliseconds.
pub type Mark = (bool, u64);

#[derive(Default)]
struct Broadcast {
    by: Option<Device>,
    at_rest: bool,
    written: u32,
    given: Option<u32>,
    arrived: BTreeMap<Device, u32>,
}

/// What was heard of it until now.
#[derive(Default)]
pub struct Told<'a> {
    notices: BTreeMap<&'a str, Broadcast>,
    /// Who may tell everyone.
    administrators: BTreeSet<u32>,
    marks: BTreeMap<(u32, u128), Setting<Mark>>,
    exports: Vec<(Device, &'a Export)>,
    mentions: HashMap<(Device, u64), &'a Mentions>,
}

impl<'a> Checker<'a> {
    pub fn notice(&mut self, device: Device, notice: &'a Notice) {
        match notice {
            Notice::Asked { body, at_rest } => {
                let broadcast = self.told.notices.entry(body).or_default();
                (broadcast.by, broadcast.at_rest) = (Some(device), *at_rest);
            }
            Notice::Appointed => _ = self.told.administrators.insert(device.user),
            Notice::Written { body } => self.told.notices.entry(body).or_default().written += 1,
            Notice::Given { body, devices } => {
                self.verdict.counts.notices += 1;
                self.told.notices.entry(body).or_default().given = Some(*devices);
            }
            Notice::Arrived { body, from } => self.notice_arrived(device, *from, body),
        }
    }

    fn notice_arrived(&mut self, device: Device, from: u32, body: &'a str) {
        self.verdict.counts.told += 1;
        let broadcast = self.told.notices.entry(body).or_default();
        let times = broadcast.arrived.entry(device).or_default();
        *times += 1;
        let (times, written, by) = (*times, broadcast.written, broadcast.by);
        if by.map(|by| by.user) != Some(from) || !self.told.administrators.contains(&from) {
            let text = format!("{device:?} was told {body:?} by user {from}, asked for by {by:?}");
            self.verdict.broken(Rule::OnlyAdministratorsTell, text);
        }
        // Where nobody listens to what is written, it is not known how often it was.
        if written > 0 && times > written {
            let text = format!("{device:?} was told {body:?} {times} times, asked for {written} times");
            self.verdict.broken(Rule::ToldOnce, text);
        }
    }

    pub fn marks(&mut self, (device, conversation): (Device, u128), mark: Mark, kept: bool) {
        self.verdict.counts.marks += u64::from(kept);
        let now = self.now;
        let marks = self.told.marks.entry((device.user, conversation)).or_default();
        if kept {
            marks.keep(mark, now);
        } else {
            marks.ask(mark);
        }
    }

    pub fn mentioned(&mut self, key: (Device, u64), mentions: &'a Mentions) {
        self.verdict.counts.mentions += 1;
        self.told.mentions.insert(key, mentions);
    }

    /// A message that is shown as it was sent mentions whom its sender has mentioned.
    pub fn check_mentions(&mut self, device: Device, key: (Device, u64), shown: &Shown) {
        let right = match self.told.mentions.get(&key) {
            Some(mentions) => shown.mentions == **mentions,
            None => shown.mentions == Mentions::default(),
        };
        if !right {
            let text = format!("{device:?} was shown {shown:?}, sent with {:?}", self.told.mentions.get(&key));
            self.verdict.broken(Rule::MentionsAsSent, text);
        }
    }

    pub fn exported(&mut self, device: Device, export: &'a Export) {
        self.verdict.counts.exported += export.messages.len() as u64;
        self.told.exports.push((device, export));
    }

    pub fn check_marks(&mut self, device: Device, rows: &BTreeMap<u128, &Listed>) {
        for (conversation, row) in rows {
            let shown = (row.pinned, row.muted_until_ms);
            let mark = self.told.marks.get(&(device.user, *conversation));
            let right = mark.map_or(shown == Mark::default(), |mark| mark.may_be(shown, self.now));
            if !right {
                let text = format!("{device:?} is shown {row:?}, and has asked for {mark:?}");
                self.verdict.broken(Rule::MarksAreKept, text);
            }
        }
    }

    /// Before amendments are judged.
    pub fn check_told(&mut self) {
        let mut wrong = Vec::new();
        for (body, broadcast) in &self.told.notices {
            let reached = broadcast.arrived.len() as u32;
            if let (Some(given), true) = (broadcast.given, broadcast.at_rest && broadcast.written == 1) {
                self.verdict.counts.notices_at_rest += 1;
                if given != reached {
                    wrong.push((Rule::ToldToAll, format!("{body:?} was given to {given}, {reached} have it")));
                }
            }
        }
        for (device, export) in &self.told.exports {
            let read = self.amendments.readings.iter().filter(|(reader, _)| reader == device);
            let shown = read.flat_map(|(_, messages)| messages.iter());
            let own: BTreeMap<Place, (u32, &str)> =
                shown.map(|row| (row.place, (row.from, row.body.as_str()))).collect();
            let given: BTreeMap<Place, (u32, &str)> =
                export.messages.iter().map(|(place, from, body)| (*place, (*from, body.as_str()))).collect();
            let differs = own.iter().find(|(place, row)| given.get(place) != Some(row));
            let more = given.iter().find(|(place, _)| !own.contains_key(place));
            if differs.is_some() || more.is_some() || given.len() != export.messages.len() {
                let text = format!("{device:?} exports {} rows, without {differs:?}, with {more:?}", given.len());
                wrong.push((Rule::ExportIsTrue, text));
            }
            if export.broken || export.user != Some(device.user) {
                wrong.push((Rule::ExportIsTrue, format!("{device:?} exports the account of {:?}", export.user)));
            }
            let users: BTreeSet<u32> = self.devices.iter().map(|device| device.user).collect();
            for user in users {
                let (certain, perhaps) = self.permits.blocked(device.user, user);
                let listed = export.blocks.contains(&user);
                if (certain && !listed) || (listed && !perhaps) {
                    let text = format!("{device:?} exports the blocks {:?}, of user {user}: {certain}", export.blocks);
                    wrong.push((Rule::ExportIsTrue, text));
                }
            }
        }
        wrong.into_iter().for_each(|(rule, text)| self.verdict.broken(rule, text));
    }
}
