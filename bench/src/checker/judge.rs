//! Takes a history in, device by device, and judges what does not depend on memberships: sends and their ends, logs, order,
//! streams.
//!
//! Owned by one call of [`History::check`](super::History::check). Gaps are only noted while taking in: whether one hides
//! something that its device may see is known when the logs are.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::account::Account;
use super::amended::Amendments;
use super::ended::Ended;
use super::kept::Kept;
use super::members::{Hop, Members};
use super::passing::Passing;
use super::permits::Permits;
use super::presence::Presences;
use super::roles::Groups;
use super::told::Told;
use super::{Device, Happening, Moment, Peer, Place, Rule, Shown, State, Verdict};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Open,
    Accepted(Place),
    Refused,
    Unknown,
}

pub(super) struct Send<'a> {
    pub to: Peer,
    /// Empty for an amendment that takes away.
    pub body: &'a str,
    durable: bool,
    /// The message that it makes something of.
    pub amends: Option<(Place, State)>,
    pub at: Moment,
    pub end: End,
    pub passed: bool,
    delivered: bool,
}

impl Send<'_> {
    /// Whether that row can be this send of that device.
    fn is(&self, device: Device, row: &Shown) -> bool {
        let who = (row.from, row.device, row.to, row.of);
        let same = who == (device.user, device.number, self.to, self.amends.map(|(of, _)| of.seq));
        // What has become of it since may have taken its body.
        same && (row.tells() < FULL || row.body == self.body) && row.change.is_none()
    }
}

/// A row that is shown as it was sent; see [`Shown::tells`].
const FULL: u8 = 3;

/// A group as its reader had it: conversation, first and head, all between.
pub(super) type Reading<'a> = (Device, u128, (u64, u64), &'a [Shown]);

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
    /// Of the happening that is taken in.
    pub now: Moment,
    pub sends: BTreeMap<(Device, u64), Send<'a>>,
    pub by_body: HashMap<&'a str, (Device, u64)>,
    by_place: HashMap<Place, (Device, u64)>,
    streams: BTreeMap<(Device, u128), Stream>,
    pushed: HashMap<(u64, u128), u64>,
    /// Every durable message that anybody was shown, by place.
    pub shown: BTreeMap<Place, &'a Shown>,
    places: HashMap<(u32, u64, u64), Place>,
    /// When anybody had a row first.
    pub first_seen: HashMap<Place, Moment>,
    /// Who was handed which body.
    pub saw: HashSet<(Device, &'a str)>,
    saw_place: HashSet<(Device, Place)>,
    /// Which transient bodies are in which devices.
    arrived: HashSet<(Device, &'a str)>,
    pub logs: BTreeMap<u128, BTreeMap<u64, &'a Shown>>,
    pub firsts: BTreeMap<u128, u64>,
    /// The heads as they were read back, which may be of messages that were let go before anybody saw them.
    pub heads: BTreeMap<u128, u64>,
    pub devices: BTreeSet<Device>,
    /// Those that had the time to reach everything without beginning anew.
    settled: BTreeSet<Device>,
    /// Those that were to be forgotten: nothing is promised of how far they were.
    pub dropped: BTreeSet<Device>,
    /// The two of each direct conversation.
    pub pairs: BTreeMap<u128, BTreeSet<u32>>,
    /// Where streams and SYNCs left something out.
    pub hops: Vec<Hop>,
    /// Users who were given a row, on whatever way.
    pub given: BTreeSet<(Place, u32)>,
    /// Groups as their users read them back.
    pub readings: Vec<Reading<'a>>,
    changed: Vec<(Device, Place)>,
    pub account: Account<'a>,
    pub amendments: Amendments<'a>,
    pub kept: Kept,
    pub passing: Passing<'a>,
    pub presence: Presences<'a>,
    pub ended: Ended,
    pub permits: Permits,
    pub groups: Groups,
    pub told: Told<'a>,
    /// When the present process of a device began.
    began: HashMap<Device, Moment>,
}

impl<'a> Checker<'a> {
    pub fn take(&mut self, device: Device, happening: &'a Happening) {
        match happening {
            Happening::Started => self.started(device),
            Happening::Sent { number, to, body, durable } => {
                self.sent((device, *number), (*to, *durable), (body, None));
            }
            Happening::Amended { number, to, of, what, body } => {
                self.sent((device, *number), (*to, true), (body, Some((*of, *what))));
            }
            Happening::Accepted { number, place } => self.accepted((device, *number), *place),
            Happening::Mentioned { number, mentions } => self.mentioned((device, *number), mentions),
            Happening::Refused { number, why } => self.refused(device, *number, *why),
            Happening::Unknown { number } => self.end(device, *number, End::Unknown),
            Happening::Passed { number } => self.mark(device, *number, |send| send.passed = true),
            Happening::Delivered { number } => self.mark(device, *number, |send| send.delivered = true),
            Happening::Saw(shown) => self.saw(device, shown),
            Happening::Arrived { body } => _ = self.arrived.insert((device, body)),
            Happening::Skipped { conversation, from, to } => self.skipped(device, *conversation, (*from, *to)),
            Happening::Pushed { connection, place } => self.pushed(device, *connection, *place),
            Happening::ReadBack { conversation, with, first, head, messages } => {
                self.read_back((device, *with), (*conversation, *first, *head), messages);
            }
            Happening::Permit(permit) => self.permit(device, *permit),
            Happening::Marks { place, mark, kept } => self.marks((device, *place), *mark, *kept),
            Happening::Notice(notice) => self.notice(device, notice),
            Happening::Exported(export) => self.exported(device, export),
            Happening::Invites { group, open, users } => self.invites((*group, *open), users),
            Happening::Outranked => self.verdict.counts.outranked += 1,
            Happening::Changed(place) => self.changed(device, *place),
            Happening::ReadAsked(place) => self.account.read_asked(device, *place),
            Happening::ReadKept(place) => self.account.read_kept(device, *place),
            Happening::ReadShown { source, user, place } => {
                self.account.read_shown((device, *source), (*user, *place), &mut self.verdict);
            }
            Happening::Fetched { asked, with, conversation, range, page } => {
                self.fetched((device, *asked), (*with, *conversation), *range, page);
            }
            Happening::FloorShown { asked, first } => self.floor_shown(device, *asked, *first),
            Happening::Signalled { number, to, body } => self.signalled(device, (*number, *to), body),
            Happening::SawSignal { from, to, body } => self.saw_signal(device, (*from, *to), body),
            Happening::HasShown { user, conversation, delivered, read } => {
                self.has_shown(device, *user, (*conversation, *delivered, *read));
            }
            Happening::ReceiptsShown(receipts) => self.account.receipts.push((device, receipts)),
            Happening::WatchAsked(users) => self.watch_asked(device, users),
            Happening::Watches(users) => self.watches(device, users),
            Happening::UnwatchAsked(users) => self.looks_away(device, users),
            Happening::Unwatched(users) => self.unwatched(device, users),
            Happening::PresenceShown { connection, presence, pushed } => {
                self.presence_shown(device, (*connection, *pushed), presence);
            }
            Happening::Connects { connection } => self.connects(*connection),
            Happening::LoggedIn { connection } => self.logged_in(device, *connection),
            Happening::TurnedAway => self.turned_away(device),
            Happening::DeleteAsked { user, recall } => self.delete_asked(*user, *recall),
            Happening::DeleteKept { user } => self.delete_kept(*user),
            Happening::StatusAsked { status, visible } => self.status_asked(device, (status, *visible)),
            Happening::StatusKept => self.status_kept(device),
            Happening::Rested { left_ms } => self.rested(device, *left_ms),
            Happening::HideAsked(place) => self.hide_asked(device, *place),
            Happening::HideKept(place) => self.hide_kept(device, *place),
            Happening::HideTold(place) => self.hide_told(device, *place),
            Happening::Synced { asked, behind, messages, whole } => {
                self.synced((device, *asked), (behind, *whole), messages);
            }
            Happening::Listed(rows) => self.account.lists.push((device, rows)),
            Happening::Devices(numbers) => self.account.devices.push((device, numbers)),
            Happening::DropAsked(number) => self.drop_asked(Device { number: *number, ..device }),
            Happening::DropKept(number) => self.drop_kept(Device { number: *number, ..device }),
            Happening::Settled => self.settled(device),
        }
    }

    fn settled(&mut self, device: Device) {
        if self.dropped.contains(&device) {
            return;
        }
        self.settled.insert(device);
        for (_, stream) in self.streams.range_mut((device, 0)..=(device, u128::MAX)) {
            stream.floor = stream.highest;
        }
    }

    fn pushed(&mut self, device: Device, connection: u64, place: Place) {
        self.given.insert((place, device.user));
        self.first_seen.entry(place).or_insert(self.now);
        self.came_late(device, connection, place);
        let last = self.pushed.insert((connection, place.conversation), place.seq).unwrap_or(0);
        if place.seq <= last {
            self.verdict.broken(Rule::PushesRise, format!("{device:?} was pushed {place:?} after {last}"));
        }
    }

    fn changed(&mut self, device: Device, place: Place) {
        self.verdict.counts.changes += 1;
        self.first_seen.entry(place).or_insert(self.now);
        self.changed.push((device, place));
    }

    fn sent(
        &mut self,
        key: (Device, u64),
        (to, durable): (Peer, bool),
        (body, amends): (&'a str, Option<(Place, State)>),
    ) {
        let send = Send { to, body, durable, amends, at: self.now, end: End::Open, passed: false, delivered: false };
        if !body.is_empty() {
            self.by_body.insert(body, key);
        }
        self.sends.insert(key, send);
        if let (Peer::User(user), true) = (to, durable) {
            self.permits.writes((key.0.user, user), false, self.now);
        }
        self.verdict.counts.sends += 1;
    }

    fn accepted(&mut self, key: (Device, u64), place: Place) {
        self.verdict.counts.accepted += 1;
        self.by_place.insert(place, key);
        self.first_seen.entry(place).or_insert(self.now);
        self.send_was_taken(key.0, key.1);
        let (mut amends, mut writes_to) = (None, None);
        if let Some(send) = self.sends.get(&key) {
            amends = send.amends;
            writes_to = if let (Peer::User(user), true) = (send.to, send.durable) { Some(user) } else { None };
        }
        if let Some(user) = writes_to {
            self.permits.writes((key.0.user, user), true, self.now);
        }
        if let Some((of, what)) = amends {
            self.amendment_accepted(of, what);
        }
        self.end(key.0, key.1, End::Accepted(place));
    }

    /// What was accepted at that place.
    pub fn send_at(&self, place: Place) -> Option<&Send<'a>> {
        self.by_place.get(&place).and_then(|key| self.sends.get(key))
    }

    /// A row of a log as somebody read it back.
    fn keep(&mut self, shown: &'a Shown) {
        let log = self.logs.entry(shown.place.conversation).or_default();
        let kept = log.entry(shown.place.seq).or_insert(shown);
        if kept.tells() < shown.tells() {
            *kept = shown;
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
        self.began.insert(device, self.now);
        self.watches_nobody(device);
        self.unwatches_nobody(device);
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

    pub fn end(&mut self, device: Device, number: u64, end: End) {
        if let Some(send) = self.sends.get_mut(&(device, number)) {
            self.verdict.counts.unknown += u64::from(end == End::Unknown);
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
        // Its own the device has in its memory, and is handed it when it is accepted.
        if (shown.from, shown.device) != (device.user, device.number) {
            let began = self.began.get(&device).copied().unwrap_or_default();
            self.not_gone(device, began, shown);
        }
        let again = !self.saw.insert((device, &shown.body));
        let Place { conversation, seq } = shown.place;
        if seq == 0 {
            self.transient_came(device, shown);
            if again {
                self.verdict.broken(Rule::NoRepetition, format!("{device:?} was handed {shown:?} twice"));
            }
            return;
        }
        self.saw_place.insert((device, shown.place));
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
        let durable = shown.place.seq != 0;
        if shown.is_message() && shown.state == State::AsSent {
            let sent = self.by_body.get(shown.body.as_str()).filter(|(by, _)| *by == sender);
            let key = sent.copied();
            let sent = key.and_then(|key| self.sends.get(&key));
            if sent.is_none_or(|send| send.to != shown.to || send.durable != durable || send.amends.is_some()) {
                self.verdict.broken(Rule::OnlyWhatWasSent, format!("{device:?} was shown {shown:?}"));
            } else if let Some(key) = key {
                self.check_mentions(device, key, shown);
                if device.user != shown.from {
                    self.send_was_taken(key.0, key.1);
                }
            }
        } else {
            self.look_at_amended(device, shown);
        }
        if !durable {
            return;
        }
        if let Peer::User(to) = shown.to {
            self.pairs.entry(shown.place.conversation).or_default().extend([shown.from, to]);
        }
        self.one_body(device, shown);
        if self.ended.takes_back(shown) {
            return;
        }
        let named = (shown.from, shown.device, shown.client_seq);
        let place = *self.places.entry(named).or_insert(shown.place);
        if place != shown.place {
            let text = format!("send {named:?} is at {place:?} and at {:?}", shown.place);
            self.verdict.broken(Rule::OnePlacePerSend, text);
        }
    }

    fn one_body(&mut self, device: Device, shown: &'a Shown) {
        self.first_seen.entry(shown.place).or_insert(self.now);
        let kept = self.shown.entry(shown.place).or_insert(shown);
        let first = *kept;
        if kept.tells() < shown.tells() {
            *kept = shown;
        }
        let who = |row: &'a Shown| (row.from, row.to, row.device, row.client_seq, &row.change, row.of);
        let both_full = first.tells() == FULL && shown.tells() == FULL;
        if who(first) != who(shown) || (both_full && (first.state, &first.body) != (shown.state, &shown.body)) {
            self.verdict.broken(Rule::OneBodyPerPlace, format!("first {first:?}, to {device:?} {shown:?}"));
        }
    }

    fn read_back(
        &mut self,
        (reader, with): (Device, Peer),
        (conversation, first, head): (u128, u64, u64),
        messages: &'a [Shown],
    ) {
        self.amendments.readings.push((reader, messages));
        let known = self.heads.entry(conversation).or_default();
        *known = head.max(*known);
        if matches!(with, Peer::Group(_)) {
            self.readings.push((reader, conversation, (first, head), messages));
            for shown in messages {
                self.look_at(reader, shown);
                self.keep(shown);
            }
            return;
        }
        let mut expected = first.max(1);
        for shown in messages {
            self.look_at(reader, shown);
            if shown.place != (Place { conversation, seq: expected }) {
                let text = format!("{reader:?} read {:?} where {expected} is next", shown.place);
                self.verdict.broken(Rule::Dense, text);
            }
            expected = shown.place.seq.saturating_add(1);
            self.keep(shown);
        }
        if expected != head.saturating_add(1) && !(messages.is_empty() && head == 0) {
            let text = format!("{reader:?} read {conversation:032x} up to {}, its head is {head}", expected - 1);
            self.verdict.broken(Rule::Dense, text);
        }
        self.firsts.insert(conversation, first.max(1));
    }

    /// What is kept of groups, and what was let go of all as somebody saw it.
    fn complete_logs(&mut self) {
        let mut groups: BTreeMap<u128, (u64, u64)> = BTreeMap::new();
        // Who is a member has the highest head; who was one from the beginning sees what is kept.
        for (_, conversation, (first, head), _) in &self.readings {
            let known = groups.entry(*conversation).or_insert((*first, *head));
            if *head > known.1 {
                *known = (*first, *head);
            } else if *head == known.1 {
                known.0 = known.0.min(*first);
            }
        }
        self.firsts.extend(groups.into_iter().map(|(conversation, (first, _))| (conversation, first.max(1))));
        for (place, shown) in &self.shown {
            let first = self.firsts.get(&place.conversation).copied().unwrap_or(1);
            if place.seq < first {
                self.logs.entry(place.conversation).or_default().entry(place.seq).or_insert(shown);
            }
        }
    }

    pub fn finish(mut self) -> Verdict {
        self.complete_logs();
        self.check_logs();
        self.check_sends();
        self.check_order();
        self.check_receipts();
        self.check_changes();
        let members = Members::new(&self.logs, (&self.firsts, &self.heads), &self.pairs);
        self.check_groups(&members);
        self.check_roles(&members);
        // These look at what was read back, which the judgement of amendments uses up.
        self.check_ended(&members);
        self.check_told();
        self.check_amendments(&members);
        self.check_kept();
        self.check_passing(&members);
        self.check_presence();
        self.verdict.counts.unjudged = members.unknown() as u64;
        self.check_heads(&members);
        self.check_account(&members);
        self.verdict.counts.reads = self.account.reads;
        self.verdict.counts.receipts = self.sends.values().filter(|send| send.delivered).count() as u64;
        self.verdict.counts.kept = self.logs.values().map(|log| log.len() as u64).sum();
        self.verdict
    }

    /// Everything that was ever shown is in the log, and nothing is in it twice.
    fn check_logs(&mut self) {
        for (place, shown) in &self.shown {
            let kept = self.logs.get(&place.conversation).is_some_and(|log| log.contains_key(&place.seq));
            let dropped = self.firsts.get(&place.conversation).is_some_and(|first| place.seq < *first);
            if !kept && !dropped && !self.ended.reads_alone(shown.from, shown.to) {
                self.verdict.broken(Rule::NothingVanishes, format!("{shown:?} was seen and is gone"));
            }
        }
        let mut bodies: HashMap<&str, u64> = HashMap::new();
        let rows = self.logs.values().flat_map(BTreeMap::values);
        // A message that was edited has the body of its edit, which is a row of its own.
        for shown in rows.filter(|row| row.change.is_none() && row.tells() == FULL && !row.body.is_empty()) {
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
            let kept = self.kept_at(*device, send);
            match send.end {
                End::Open => self.verdict.broken(Rule::EverySendEnds, format!("{} never ended", name())),
                End::Accepted(place) if place.seq < self.first(place.conversation) => {}
                End::Accepted(_) if self.ended.reads_alone(device.user, send.to) => {}
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

    fn kept_at(&self, device: Device, send: &Send<'_>) -> Option<Place> {
        match send.end {
            End::Accepted(place) => {
                let row = self.logs.get(&place.conversation)?.get(&place.seq)?;
                send.is(device, row).then_some(place)
            }
            // Looked for only where it must not be.
            End::Open | End::Refused | End::Unknown if send.body.is_empty() => None,
            End::Open | End::Refused | End::Unknown => {
                let mut rows = self.logs.values().flat_map(BTreeMap::values);
                rows.find(|row| row.body == send.body).map(|row| row.place)
            }
        }
    }

    fn anybody_saw(&self, send: &Send<'_>) -> bool {
        self.devices.iter().any(|device| self.saw.contains(&(*device, send.body)))
    }

    /// Of two sends of a device in one log, neither of which was refused in between, the earlier is first.
    fn check_order(&mut self) {
        let mut lines: BTreeMap<(Device, u128), Vec<(u64, u64)>> = BTreeMap::new();
        for (conversation, log) in &self.logs {
            for (seq, shown) in log {
                let place = Place { conversation: *conversation, seq: *seq };
                let by_body = || self.by_body.get(shown.body.as_str()).filter(|_| shown.tells() == FULL);
                let Some(key) = self.by_place.get(&place).or_else(by_body) else { continue };
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
            let has = |at: &Device| match send.end {
                End::Accepted(place) if send.durable => self.saw_place.contains(&(*at, place)),
                _ => self.saw.contains(&(*at, send.body)) || self.arrived.contains(&(*at, send.body)),
            };
            let counts = |at: &Device| match send.to {
                Peer::User(user) => at.user == user,
                Peer::Group(_) => at.user != device.user,
            };
            let reached = self.devices.iter().any(|at| counts(at) && has(at));
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
            let gone = row.is_none() && place.seq < self.first(place.conversation);
            if !gone && !row.is_some_and(|row| row.change.is_some() && row.from == device.user) {
                let text = format!("{device:?} changed its group with {place:?}, there is {row:?}");
                self.verdict.broken(Rule::AcceptedIsKept, text);
            }
        }
    }

    /// How far any device of each user has been handed a conversation.
    pub fn handed(&self, conversation: u128) -> impl Iterator<Item = (u32, u64)> {
        let of_it = self.streams.iter().filter(move |((_, id), _)| *id == conversation);
        of_it.map(|((device, _), stream)| (device.user, stream.highest))
    }

    fn check_heads(&mut self, members: &Members) {
        for &conversation in self.logs.keys() {
            for device in self.devices.iter().filter(|device| !self.ended.is_deleted(device.user)) {
                let Some(head) = members.head(conversation, device.user) else { continue };
                let settled = self.settled.contains(device);
                let upto = |stream: &Stream| if settled { stream.floor } else { stream.highest };
                let reached = self.streams.get(&(*device, conversation)).map_or(0, upto);
                if !members.reaches(conversation, reached, head) {
                    let text = format!("{device:?} has {conversation:032x} up to {reached} of {head}");
                    self.verdict.broken(Rule::ReachesTheHead, text);
                }
            }
        }
    }
}
