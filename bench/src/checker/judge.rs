//! Takes a history in, device by device, and judges what does not depend on memberships: sends and their ends, logs, order,
//! streams.
//!
//! Owned by one call of [`History::check`](super::History::check). Gaps are only noted while taking in: whether one hides
//! something that its device may see is known when the logs are.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::account::Account;
use super::members::{Hop, Members};
use super::{Device, Happening, Peer, Place, Rule, Shown, Verdict};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Accepted(Place),
    Refused,
    Unknown,
}

struct Send<'a> {
    to: Peer,
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
pub(super) struct Checker<'a> {
    pub verdict: Verdict,
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
    pub logs: BTreeMap<u128, BTreeMap<u64, &'a Shown>>,
    firsts: BTreeMap<u128, u64>,
    pub devices: BTreeSet<Device>,
    /// Those that had the time to reach everything without beginning anew.
    settled: BTreeSet<Device>,
    /// Those that were to be forgotten: nothing is promised of how far they were.
    dropped: BTreeSet<Device>,
    /// The two of each direct conversation.
    pub pairs: BTreeMap<u128, BTreeSet<u32>>,
    /// Where streams and SYNCs left something out.
    pub hops: Vec<Hop>,
    /// Users who were given a row, on whatever way.
    pub given: BTreeSet<(Place, u32)>,
    /// Groups as their users read them back.
    pub readings: Vec<(Device, u128, u64, &'a [Shown])>,
    changed: Vec<(Device, Place)>,
    pub account: Account<'a>,
}

impl<'a> Checker<'a> {
    pub fn take(&mut self, device: Device, happening: &'a Happening) {
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
            Happening::Passed { number } => self.mark(device, *number, |send| send.passed = true),
            Happening::Delivered { number } => {
                self.verdict.counts.receipts += 1;
                self.mark(device, *number, |send| send.delivered = true);
            }
            Happening::Saw(shown) => self.saw(device, shown),
            Happening::Arrived { body } => _ = self.arrived.insert((device, body)),
            Happening::Skipped { conversation, from, to } => self.skipped(device, *conversation, (*from, *to)),
            Happening::Pushed { connection, place } => {
                self.given.insert((*place, device.user));
                let last = self.pushed.insert((*connection, place.conversation), place.seq).unwrap_or(0);
                if place.seq <= last {
                    self.verdict.broken(Rule::PushesRise, format!("{device:?} was pushed {place:?} after {last}"));
                }
            }
            Happening::ReadBack { conversation, with: Peer::User(_), first, head, messages } => {
                self.read_back(device, (*conversation, *first, *head), messages);
            }
            Happening::ReadBack { conversation, with: Peer::Group(_), head, messages, .. } => {
                self.readings.push((device, *conversation, *head, messages));
                for shown in messages {
                    self.look_at(device, shown);
                    self.logs.entry(*conversation).or_default().insert(shown.place.seq, shown);
                }
            }
            Happening::Changed(place) => {
                self.verdict.counts.changes += 1;
                self.changed.push((device, *place));
            }
            Happening::ReadAsked(place) => self.account.read_asked(device, *place),
            Happening::ReadKept(place) => {
                self.verdict.counts.reads += 1;
                self.account.read_kept(device, *place);
            }
            Happening::ReadShown { source, user, place } => {
                self.account.read_shown((device, *source), (*user, *place), &mut self.verdict);
            }
            Happening::Synced { behind, messages, whole } => self.synced(device, (behind, *whole), messages),
            Happening::Listed(rows) => self.account.lists.push((device, rows)),
            Happening::Devices(numbers) => self.account.devices.push((device, numbers)),
            Happening::DropAsked(number) => _ = self.dropped.insert(Device { number: *number, ..device }),
            Happening::Settled if self.dropped.contains(&device) => {}
            Happening::Settled => {
                self.settled.insert(device);
                for (_, stream) in self.streams.range_mut((device, 0)..=(device, u128::MAX)) {
                    stream.floor = stream.highest;
                }
            }
        }
    }

    fn mark(&mut self, device: Device, number: u64, how: impl FnOnce(&mut Send<'a>)) {
        if let Some(send) = self.sends.get_mut(&(device, number)) {
            how(send);
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
        let before = last.unwrap_or(highest);
        if seq > before + 1 {
            self.hops.push(Hop { rule: Rule::NoGap, device, conversation, after: before, before: seq });
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

    /// The stream goes on behind these: nothing that its device may see can be among them.
    fn skipped(&mut self, device: Device, conversation: u128, (from, to): (u64, u64)) {
        let stream = self.streams.entry((device, conversation)).or_default();
        let after = stream.last.unwrap_or(stream.highest).min(from.saturating_sub(1));
        stream.last = Some(to);
        stream.highest = stream.highest.max(to);
        self.hops.push(Hop { rule: Rule::NoGap, device, conversation, after, before: to.saturating_add(1) });
    }

    /// What holds for every message, wherever it is seen.
    pub fn look_at(&mut self, device: Device, shown: &'a Shown) {
        match shown.to {
            Peer::User(to) if device.user != shown.from && device.user != to => {
                self.verdict.broken(Rule::OnlyToItsMembers, format!("{device:?} was shown {shown:?}"));
            }
            Peer::User(_) => {}
            Peer::Group(_) => {
                self.given.insert((shown.place, device.user));
            }
        }
        if shown.change.is_some() {
            return self.one_body(device, shown);
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
        if let Peer::User(to) = shown.to {
            self.pairs.entry(shown.place.conversation).or_default().extend([shown.from, to]);
        }
        self.one_body(device, shown);
        let named = (shown.from, shown.device, shown.client_seq);
        let place = *self.places.entry(named).or_insert(shown.place);
        if place != shown.place {
            let text = format!("send {named:?} is at {place:?} and at {:?}", shown.place);
            self.verdict.broken(Rule::OnePlacePerSend, text);
        }
    }

    fn one_body(&mut self, device: Device, shown: &'a Shown) {
        let first = *self.shown.entry(shown.place).or_insert(shown);
        if first != shown {
            self.verdict.broken(Rule::OneBodyPerPlace, format!("first {first:?}, to {device:?} {shown:?}"));
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

    pub fn finish(mut self) -> Verdict {
        self.check_logs();
        self.check_sends();
        self.check_order();
        self.check_receipts();
        self.check_changes();
        let members = Members::new(&self.logs, &self.firsts, &self.pairs);
        self.check_groups(&members);
        self.check_heads(&members);
        self.check_account(&members);
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
        let bodied = self.logs.values().flat_map(BTreeMap::values).filter(|shown| shown.change.is_none());
        for shown in bodied {
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
            let reached = self.devices.iter().any(|at| send.to == Peer::User(at.user) && has(at));
            if !reached {
                let text = format!("{device:?} was told that its send {number} reached {:?}, it did not", send.to);
                self.verdict.broken(Rule::TrueReceipts, text);
            }
        }
    }

    /// A change of a group that was answered is the row that the answer named.
    fn check_changes(&mut self) {
        for (device, place) in &self.changed {
            let row = self.logs.get(&place.conversation).and_then(|log| log.get(&place.seq));
            if !row.is_some_and(|row| row.change.is_some() && row.from == device.user) {
                let text = format!("{device:?} changed its group with {place:?}, there is {row:?}");
                self.verdict.broken(Rule::AcceptedIsKept, text);
            }
        }
    }

    fn check_heads(&mut self, members: &Members) {
        for &conversation in self.logs.keys() {
            for device in &self.devices {
                let Some(head) = members.head(conversation, device.user) else { continue };
                let settled = self.settled.contains(device);
                let upto = |stream: &Stream| if settled { stream.floor } else { stream.highest };
                let reached = self.streams.get(&(*device, conversation)).map_or(0, upto);
                if reached != head {
                    let text = format!("{device:?} has {conversation:032x} up to {reached} of {head}");
                    self.verdict.broken(Rule::ReachesTheHead, text);
                }
            }
        }
    }
}
