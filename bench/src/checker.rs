//! The checker: holds what clients saw against what Ringline promises, from outside.
//!
//! Pure; used by the simulator and by `torture`, after a run. It shares no code with the server, the core or the SDK:
//! users are numbers, conversations are opaque, and a [`History`] is a plain list of what happened to devices, in the
//! order of each device. Invariant of its input: no two sends have the same body, so a body names a send.
//!
//! A rule never asks *when* something happened at another device, so that histories of real machines, which have no
//! common clock, are judged as those of the simulator are.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

#[cfg(test)]
mod tests;

/// Violations that are kept of one run; more are only counted.
const VIOLATIONS_KEPT_MAX: usize = 40;

/// One device of one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    pub user: u32,
    pub number: u64,
}

/// A place in the log of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub conversation: u128,
    pub seq: u64,
}

/// A message as a device was shown it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Seq 0: a transient message.
    pub place: Place,
    pub from: u32,
    pub to: u32,
    /// The number of the sender's device.
    pub device: u64,
    pub client_seq: u64,
    pub body: String,
}

/// One thing that happened to a device. `number` is the device's own number of a send, rising.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A process of the device began, with nothing in its memory. Sends of an earlier one that had not ended are unknown.
    Started,
    Sent {
        number: u64,
        to: u32,
        body: String,
        durable: bool,
    },
    Accepted {
        number: u64,
        place: Place,
    },
    /// Refused for a while and tried again, or its answer was lost and may have been that: others may have passed it.
    Passed {
        number: u64,
    },
    /// Ended, and was never accepted.
    Refused {
        number: u64,
    },
    /// Ended, and may have been accepted.
    Unknown {
        number: u64,
    },
    /// A device of the receiver has it, the sender was told.
    Delivered {
        number: u64,
    },
    /// The application was handed a message.
    Saw(Shown),
    /// A transient message is in the device; its application may not have been handed it yet, or never.
    Arrived {
        body: String,
    },
    /// The application was told that it cannot have what is up to here.
    Skipped(Place),
    /// A durable message was pushed on a connection, before any filter of the client.
    Pushed {
        connection: u64,
        place: Place,
    },
    /// The conversation as it was read back, after everything: all from `first` to `head`.
    ReadBack {
        conversation: u128,
        first: u64,
        head: u64,
        messages: Vec<Shown>,
    },
    /// Everything this device saw is acknowledged, and the server had the time to write that down.
    Settled,
}

/// What is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// An accepted message is in the log, once, at the place that its sender was told.
    AcceptedIsKept,
    /// What was refused is not in the log; nothing is there twice.
    KeptOnce,
    /// One (device, client_seq) has one place.
    OnePlacePerSend,
    /// The log has no hole.
    Dense,
    /// One body per place, whoever looks, whenever.
    OneBodyPerPlace,
    /// What a device's application is handed has no gap.
    NoGap,
    /// … and no repetition.
    NoRepetition,
    /// After the faults every device has reached the head of every conversation of its user.
    ReachesTheHead,
    /// Messages of one device are in the order in which it sent them.
    SenderOrder,
    /// Nothing is shown that was not sent.
    OnlyWhatWasSent,
    /// Nothing is shown to others.
    OnlyToItsMembers,
    /// What somebody saw stays in the log.
    NothingVanishes,
    /// Pushes of a conversation rise on a connection.
    PushesRise,
    /// A delivery that is reported has happened.
    TrueReceipts,
    /// What was acknowledged before a restart is not handed out again.
    CursorIsKept,
    /// Every send has an end.
    EverySendEnds,
}

/// One broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.text)
    }
}

/// How much was judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub sends: u64,
    pub accepted: u64,
    pub unknown: u64,
    /// Messages in the logs.
    pub kept: u64,
    /// Messages handed to applications.
    pub seen: u64,
    pub receipts: u64,
    /// Processes of devices.
    pub processes: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.sends += other.sends;
        self.accepted += other.accepted;
        self.unknown += other.unknown;
        self.kept += other.kept;
        self.seen += other.seen;
        self.receipts += other.receipts;
        self.processes += other.processes;
    }
}

/// What the checker says.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub counts: Counts,
    /// The first of them.
    pub violations: Vec<Violation>,
    pub violations_in_all: u64,
}

impl Verdict {
    pub fn is_clean(&self) -> bool {
        self.violations_in_all == 0
    }

    fn broken(&mut self, rule: Rule, text: String) {
        self.violations_in_all += 1;
        if self.violations.len() < VIOLATIONS_KEPT_MAX {
            self.violations.push(Violation { rule, text });
        }
    }
}

/// What happened, in the order of each device.
#[derive(Clone, Debug, Default)]
pub struct History {
    happenings: Vec<(Device, Happening)>,
}

impl History {
    pub fn push(&mut self, device: Device, happening: Happening) {
        self.happenings.push((device, happening));
    }

    pub fn len(&self) -> usize {
        self.happenings.len()
    }

    pub fn is_empty(&self) -> bool {
        self.happenings.is_empty()
    }

    /// All of it.
    pub fn iter(&self) -> impl Iterator<Item = &(Device, Happening)> {
        self.happenings.iter()
    }

    /// Judges a run that has ended: faults are over, clients had the time to finish, logs were read back.
    pub fn check(&self) -> Verdict {
        let mut checker = Checker::default();
        self.happenings.iter().for_each(|(device, happening)| checker.take(*device, happening));
        checker.finish()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Accepted(Place),
    Refused,
    Unknown,
}

struct Send<'a> {
    to: u32,
    body: &'a str,
    durable: bool,
    end: End,
    passed: bool,
    delivered: bool,
}

/// One device's stream of one conversation.
#[derive(Default)]
struct Stream {
    /// Handed out last by the present process; `None` when it has handed out nothing yet.
    last: Option<u64>,
    /// The highest ever handed out (or skipped) by any process of the device.
    highest: u64,
    /// Acknowledged for good: no process may be handed this again.
    floor: u64,
}

#[derive(Default)]
struct Checker<'a> {
    verdict: Verdict,
    sends: BTreeMap<(Device, u64), Send<'a>>,
    by_body: HashMap<&'a str, (Device, u64)>,
    streams: BTreeMap<(Device, u128), Stream>,
    pushed: HashMap<(u64, u128), u64>,
    /// Every durable message that anybody was shown, by place.
    shown: BTreeMap<Place, &'a Shown>,
    places: HashMap<(u32, u64, u64), Place>,
    /// Who was handed which body.
    saw: HashSet<(Device, &'a str)>,
    /// Which transient bodies are in which devices.
    arrived: HashSet<(Device, &'a str)>,
    logs: BTreeMap<u128, BTreeMap<u64, &'a Shown>>,
    firsts: BTreeMap<u128, u64>,
    devices: BTreeSet<Device>,
    members: BTreeMap<u128, BTreeSet<u32>>,
}

impl<'a> Checker<'a> {
    fn take(&mut self, device: Device, happening: &'a Happening) {
        match happening {
            Happening::Started => self.started(device),
            Happening::Sent { number, to, body, durable } => {
                let send = Send { to: *to, body, durable: *durable, end: End::Open, passed: false, delivered: false };
                self.by_body.insert(body, (device, *number));
                self.sends.insert((device, *number), send);
                self.verdict.counts.sends += 1;
            }
            Happening::Accepted { number, place } => {
                self.verdict.counts.accepted += 1;
                self.end(device, *number, End::Accepted(*place));
            }
            Happening::Refused { number } => self.end(device, *number, End::Refused),
            Happening::Unknown { number } => {
                self.verdict.counts.unknown += 1;
                self.end(device, *number, End::Unknown);
            }
            Happening::Passed { number } => {
                if let Some(send) = self.sends.get_mut(&(device, *number)) {
                    send.passed = true;
                }
            }
            Happening::Delivered { number } => {
                self.verdict.counts.receipts += 1;
                if let Some(send) = self.sends.get_mut(&(device, *number)) {
                    send.delivered = true;
                }
            }
            Happening::Saw(shown) => self.saw(device, shown),
            Happening::Arrived { body } => {
                self.arrived.insert((device, body));
            }
            Happening::Skipped(place) => {
                let stream = self.streams.entry((device, place.conversation)).or_default();
                stream.last = Some(place.seq);
                stream.highest = stream.highest.max(place.seq);
            }
            Happening::Pushed { connection, place } => {
                let last = self.pushed.insert((*connection, place.conversation), place.seq).unwrap_or(0);
                if place.seq <= last {
                    self.verdict.broken(Rule::PushesRise, format!("{device:?} was pushed {place:?} after {last}"));
                }
            }
            Happening::ReadBack { conversation, first, head, messages } => {
                self.read_back(device, (*conversation, *first, *head), messages);
            }
            Happening::Settled => {
                for (_, stream) in self.streams.range_mut((device, 0)..=(device, u128::MAX)) {
                    stream.floor = stream.highest;
                }
            }
        }
    }

    fn started(&mut self, device: Device) {
        self.verdict.counts.processes += 1;
        self.devices.insert(device);
        for (_, send) in self.sends.range_mut((device, 0)..=(device, u64::MAX)) {
            if send.end == End::Open {
                send.end = End::Unknown;
                self.verdict.counts.unknown += 1;
            }
        }
        for (_, stream) in self.streams.range_mut((device, 0)..=(device, u128::MAX)) {
            stream.last = None;
        }
    }

    fn end(&mut self, device: Device, number: u64, end: End) {
        if let Some(send) = self.sends.get_mut(&(device, number)) {
            match send.end {
                End::Open => send.end = end,
                first => {
                    let text = format!("{device:?} was told of its send {number}: {first:?}, then {end:?}");
                    self.verdict.broken(Rule::OnePlacePerSend, text);
                }
            }
        }
    }

    fn saw(&mut self, device: Device, shown: &'a Shown) {
        self.verdict.counts.seen += 1;
        self.look_at(device, shown);
        let again = !self.saw.insert((device, &shown.body));
        let Place { conversation, seq } = shown.place;
        if seq == 0 {
            if again {
                self.verdict.broken(Rule::NoRepetition, format!("{device:?} was handed {shown:?} twice"));
            }
            return;
        }
        let stream = self.streams.entry((device, conversation)).or_default();
        let (last, highest, floor) = (stream.last, stream.highest, stream.floor);
        stream.last = Some(seq);
        stream.highest = highest.max(seq);
        let expected = last.map_or(highest + 1, |last| last + 1);
        if seq > expected {
            let text = format!("{device:?} was handed {seq} of {conversation:032x} where {expected} was next");
            self.verdict.broken(Rule::NoGap, text);
        }
        if last.is_some_and(|last| seq <= last) {
            let text = format!("{device:?} was handed {seq} of {conversation:032x} after {}", last.unwrap_or(0));
            self.verdict.broken(Rule::NoRepetition, text);
        }
        if seq <= floor {
            let text =
                format!("{device:?} was handed {seq} of {conversation:032x}, long after it acknowledged {floor}");
            self.verdict.broken(Rule::CursorIsKept, text);
        }
    }

    /// What holds for every message, wherever it is seen.
    fn look_at(&mut self, device: Device, shown: &'a Shown) {
        if device.user != shown.from && device.user != shown.to {
            self.verdict.broken(Rule::OnlyToItsMembers, format!("{device:?} was shown {shown:?}"));
        }
        let sender = Device { user: shown.from, number: shown.device };
        let sent = self.by_body.get(shown.body.as_str()).filter(|(by, _)| *by == sender);
        let sent = sent.and_then(|key| self.sends.get(key));
        let durable = shown.place.seq != 0;
        if sent.is_none_or(|send| send.to != shown.to || send.durable != durable) {
            self.verdict.broken(Rule::OnlyWhatWasSent, format!("{device:?} was shown {shown:?}"));
        }
        if !durable {
            return;
        }
        let members = self.members.entry(shown.place.conversation).or_default();
        members.extend([shown.from, shown.to]);
        let first = *self.shown.entry(shown.place).or_insert(shown);
        if first != shown {
            self.verdict.broken(Rule::OneBodyPerPlace, format!("first {first:?}, to {device:?} {shown:?}"));
        }
        let named = (shown.from, shown.device, shown.client_seq);
        let place = *self.places.entry(named).or_insert(shown.place);
        if place != shown.place {
            let text = format!("send {named:?} is at {place:?} and at {:?}", shown.place);
            self.verdict.broken(Rule::OnePlacePerSend, text);
        }
    }

    fn read_back(&mut self, reader: Device, (conversation, first, head): (u128, u64, u64), messages: &'a [Shown]) {
        let mut expected = first.max(1);
        for shown in messages {
            self.look_at(reader, shown);
            if shown.place != (Place { conversation, seq: expected }) {
                let text = format!("{reader:?} read {:?} where {expected} is next", shown.place);
                self.verdict.broken(Rule::Dense, text);
            }
            expected = shown.place.seq.saturating_add(1);
            self.logs.entry(conversation).or_default().insert(shown.place.seq, shown);
        }
        if expected != head.saturating_add(1) && !(messages.is_empty() && head == 0) {
            let text = format!("{reader:?} read {conversation:032x} up to {}, its head is {head}", expected - 1);
            self.verdict.broken(Rule::Dense, text);
        }
        self.firsts.insert(conversation, first.max(1));
    }

    fn finish(mut self) -> Verdict {
        self.check_logs();
        self.check_sends();
        self.check_order();
        self.check_receipts();
        self.check_heads();
        self.verdict.counts.kept = self.logs.values().map(|log| log.len() as u64).sum();
        self.verdict
    }

    /// Everything that was ever shown is in the log, and nothing is in it twice.
    fn check_logs(&mut self) {
        for (place, shown) in &self.shown {
            let kept = self.logs.get(&place.conversation).is_some_and(|log| log.contains_key(&place.seq));
            let dropped = self.firsts.get(&place.conversation).is_some_and(|first| place.seq < *first);
            if !kept && !dropped {
                self.verdict.broken(Rule::NothingVanishes, format!("{shown:?} was seen and is gone"));
            }
        }
        let mut bodies: HashMap<&str, u64> = HashMap::new();
        for shown in self.logs.values().flat_map(BTreeMap::values) {
            let times = bodies.entry(&shown.body).or_default();
            *times += 1;
            if *times == 2 {
                self.verdict.broken(Rule::KeptOnce, format!("{shown:?} is there twice"));
            }
        }
    }

    fn check_sends(&mut self) {
        for ((device, number), send) in &self.sends {
            let name = || format!("send {number} of {device:?} ({:?})", send.body);
            let kept = self.shown_by_body(send.body);
            match send.end {
                End::Open => self.verdict.broken(Rule::EverySendEnds, format!("{} never ended", name())),
                End::Accepted(place) if send.durable && kept != Some(place) => {
                    let text = format!("{} was accepted at {place:?} and is at {kept:?}", name());
                    self.verdict.broken(Rule::AcceptedIsKept, text);
                }
                End::Refused if kept.is_some() || (!send.durable && self.anybody_saw(send)) => {
                    self.verdict.broken(Rule::KeptOnce, format!("{} was refused and is at {kept:?}", name()));
                }
                End::Accepted(_) | End::Refused | End::Unknown => {}
            }
        }
    }

    fn shown_by_body(&self, body: &str) -> Option<Place> {
        let (device, number) = self.by_body.get(body)?;
        let send = self.sends.get(&(*device, *number))?;
        let place = match send.end {
            End::Accepted(place) => place,
            // Looked for only where it must not be.
            End::Open | End::Refused | End::Unknown => {
                return self.logs.values().flat_map(BTreeMap::values).find(|s| s.body == body).map(|s| s.place);
            }
        };
        let kept = self.logs.get(&place.conversation)?.get(&place.seq)?;
        (kept.body == body).then_some(place)
    }

    fn anybody_saw(&self, send: &Send<'_>) -> bool {
        self.devices.iter().any(|device| self.saw.contains(&(*device, send.body)))
    }

    /// Of two sends of a device in one log, neither of which was refused in between, the earlier is first.
    fn check_order(&mut self) {
        let mut lines: BTreeMap<(Device, u128), Vec<(u64, u64)>> = BTreeMap::new();
        for (conversation, log) in &self.logs {
            for (seq, shown) in log {
                let Some(key) = self.by_body.get(shown.body.as_str()) else { continue };
                if self.sends.get(key).is_some_and(|send| !send.passed) {
                    lines.entry((key.0, *conversation)).or_default().push((*seq, key.1));
                }
            }
        }
        for ((device, conversation), line) in lines {
            for pair in line.windows(2) {
                if let [(seq, number), (_, next)] = pair
                    && next < number
                {
                    let text =
                        format!("{device:?} sent {next} before {number}, {conversation:032x} has it after {seq}");
                    self.verdict.broken(Rule::SenderOrder, text);
                }
            }
        }
    }

    fn check_receipts(&mut self) {
        for ((device, number), send) in self.sends.iter().filter(|(_, send)| send.delivered) {
            let has = |at: &Device| self.saw.contains(&(*at, send.body)) || self.arrived.contains(&(*at, send.body));
            let reached = self.devices.iter().any(|at| at.user == send.to && has(at));
            if !reached {
                let text = format!("{device:?} was told that its send {number} reached {}, it did not", send.to);
                self.verdict.broken(Rule::TrueReceipts, text);
            }
        }
    }

    fn check_heads(&mut self) {
        for (conversation, log) in &self.logs {
            let Some((&head, _)) = log.last_key_value() else { continue };
            for device in &self.devices {
                if !self.members.get(conversation).is_some_and(|members| members.contains(&device.user)) {
                    continue;
                }
                let reached = self.streams.get(&(*device, *conversation)).map_or(0, |stream| stream.highest);
                if reached != head {
                    let text = format!("{device:?} has {conversation:032x} up to {reached} of {head}");
                    self.verdict.broken(Rule::ReachesTheHead, text);
                }
            }
        }
    }
}
