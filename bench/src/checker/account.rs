//! What is said about conversations beside their messages: how far they are read, what a SYNC brings, the lists.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::judge::Checker;
use super::members::{Hop, Members};
use super::{Device, Listed, Moment, Place, Receipts, Rule, Shown, Source, Verdict};

/// A user's place in a conversation.
type Reader = (u128, u32);

/// What was heard of it until now.
#[derive(Default)]
pub struct Account<'a> {
    asked: HashMap<Reader, u64>,
    kept: HashMap<Reader, u64>,
    /// READs that were answered.
    pub reads: u64,
    /// What a device was told last.
    shown: BTreeMap<(Device, Source, Reader), u64>,
    whole: Vec<(Device, BTreeMap<u128, u64>)>,
    pub lists: Vec<(Device, &'a [Listed])>,
    pub devices: Vec<(Device, &'a [u64])>,
    pub receipts: Vec<(Device, &'a Receipts)>,
}

fn raise(places: &mut HashMap<Reader, u64>, reader: Reader, seq: u64) {
    let kept = places.entry(reader).or_default();
    *kept = seq.max(*kept);
}

impl Account<'_> {
    pub fn read_asked(&mut self, device: Device, place: Place) {
        raise(&mut self.asked, (place.conversation, device.user), place.seq);
    }

    pub fn read_kept(&mut self, device: Device, place: Place) {
        self.reads += 1;
        raise(&mut self.kept, (place.conversation, device.user), place.seq);
    }

    pub fn read_shown(
        &mut self,
        (device, source): (Device, Source),
        (user, place): (u32, Place),
        verdict: &mut Verdict,
    ) {
        let last = self.shown.entry((device, source, (place.conversation, user))).or_default();
        if place.seq < *last {
            let text = format!("{device:?} was told by {source:?} that user {user} has read {place:?}, after {last}");
            verdict.broken(Rule::ReadRises, text);
        }
        *last = place.seq.max(*last);
    }
}

impl<'a> Checker<'a> {
    pub fn synced(
        &mut self,
        (device, asked): (Device, Moment),
        (behind, whole): (&[Place], bool),
        messages: &'a [Shown],
    ) {
        self.verdict.counts.synced += messages.len() as u64;
        let mut places: BTreeMap<u128, u64> = behind.iter().map(|place| (place.conversation, place.seq)).collect();
        let mut before: Option<Place> = None;
        for shown in messages {
            self.look_at(device, shown);
            self.not_gone(device, asked, shown);
            let Place { conversation, seq } = shown.place;
            if before.is_some_and(|before| before >= shown.place) {
                let text = format!("{device:?} got {:?} after {before:?}", shown.place);
                self.verdict.broken(Rule::SyncHasNoGap, text);
            }
            before = Some(shown.place);
            // In others the server goes on behind what the device acknowledges, of which more may be pushed meanwhile.
            let Some(reached) = places.get_mut(&conversation) else { continue };
            let after = std::mem::replace(reached, seq);
            if seq > after + 1 {
                self.hops.push(Hop { rule: Rule::SyncHasNoGap, device, conversation, after, before: seq });
            }
        }
        if whole {
            self.account.whole.push((device, places));
        }
    }

    pub fn check_account(&mut self, members: &Members) {
        for (&(device, source, reader), &seq) in &self.account.shown {
            let asked = self.account.asked.get(&reader).copied().unwrap_or(0);
            if seq > asked {
                let text = format!("{device:?} was told by {source:?} that {reader:?} has read {seq} of {asked}");
                self.verdict.broken(Rule::ReadWasAsked, text);
            }
        }
        for (device, places) in &self.account.whole {
            for (conversation, head) in members.of_user(device.user) {
                let reached = places.get(&conversation).copied().unwrap_or(0);
                if !members.reaches(conversation, reached, head) {
                    let text = format!("{device:?} got {conversation:032x} up to {reached} of {head}");
                    self.verdict.broken(Rule::SyncIsWhole, text);
                }
            }
        }
        self.check_lists(members);
        for (device, receipts) in std::mem::take(&mut self.account.receipts) {
            if let Some(text) = self.wrong_receipts(device, receipts, members) {
                self.verdict.broken(Rule::ReceiptsAreTrue, text);
            }
        }
    }

    /// Somebody is said to have so much: then one of his devices was handed it, and he said that he has read so far.
    pub fn has_shown(&mut self, device: Device, user: Option<u32>, (conversation, delivered, read): (u128, u64, u64)) {
        let counts = |other: u32| user.map_or(other != device.user, |user| user == other);
        let given = self.handed(conversation).filter(|(other, _)| counts(*other)).map(|(_, seq)| seq).max();
        let asked = self.account.asked.iter().filter(|((of, other), _)| *of == conversation && counts(*other));
        let asked = asked.map(|(_, seq)| *seq).max();
        // Who reads has it, on whatever way.
        if delivered > given.max(asked).unwrap_or(0) || read > asked.unwrap_or(0) {
            let text = format!(
                "{device:?} was told that {user:?} has {delivered} of {conversation:032x} and has read {read}: given \
                 {given:?}, said {asked:?}"
            );
            self.verdict.broken(Rule::HasIsTrue, text);
        }
    }

    fn wrong_receipts(&self, device: Device, receipts: &Receipts, members: &Members) -> Option<String> {
        let Receipts { place, rows, .. } = receipts;
        let sender = self.shown.get(place)?.from;
        let users: BTreeSet<u32> = members.now(place.conversation)?.filter(|user| *user != sender).collect();
        let said = |told: &HashMap<Reader, u64>, user| told.get(&(place.conversation, user)).copied().unwrap_or(0);
        let row_is_wrong = |&(user, delivered, read): &(u32, u64, u64)| {
            let (kept, asked) = (said(&self.account.kept, user), said(&self.account.asked, user));
            let given = self.handed(place.conversation).filter(|(other, _)| *other == user).map(|(_, seq)| seq).max();
            !(kept..=asked).contains(&read) || delivered < read || delivered > given.unwrap_or(0).max(asked)
        };
        let count = |seq: fn(&(u32, u64, u64)) -> u64| rows.iter().filter(|row| seq(row) >= place.seq).count();
        let counts = (receipts.members as usize, receipts.delivered as usize, receipts.read as usize);
        let right = counts == (rows.len(), count(|row| row.1), count(|row| row.2));
        let named: BTreeSet<u32> = rows.iter().map(|(user, ..)| *user).collect();
        let wrong = !right || named != users || named.len() != rows.len() || rows.iter().any(row_is_wrong);
        wrong.then(|| format!("{device:?} was shown {receipts:?}, sent by user {sender}, members {users:?}"))
    }

    fn check_lists(&mut self, members: &Members) {
        for (device, rows) in std::mem::take(&mut self.account.lists) {
            let rows: BTreeMap<u128, &Listed> = rows.iter().map(|row| (row.conversation, row)).collect();
            self.check_marks(device, &rows);
            for (conversation, head) in members.of_user(device.user) {
                let row = rows.get(&conversation);
                if row.is_none_or(|row| row.head != head) {
                    let text = format!("{device:?} is shown {row:?} for {conversation:032x}, whose head is {head}");
                    self.verdict.broken(Rule::ListIsTrue, text);
                }
                let kept = self.account.kept.get(&(conversation, device.user)).copied().unwrap_or(0);
                if row.is_some_and(|row| row.read < kept) {
                    let text = format!("{device:?} is shown {row:?}, and was told that {kept} is kept");
                    self.verdict.broken(Rule::ReadIsKept, text);
                }
            }
        }
        for (device, numbers) in &self.account.devices {
            let listed: BTreeSet<u64> = numbers.iter().copied().collect();
            let mut own = self.devices.iter().filter(|other| other.user == device.user);
            if let Some(missing) = own.find(|other| !listed.contains(&other.number)) {
                let text = format!("{device:?} is shown {numbers:?}, without {missing:?}");
                self.verdict.broken(Rule::DevicesAreListed, text);
            }
        }
    }
}
