//! The way of messages to a large group on one shard: a lift that goes round the list of members. Pure.
//!
//! It stands at one place of the list. A message enters where it stands and leaves when the lift is there again; at each
//! place it gives the member everything that is under way and that he has not had. So one visit gives several messages
//! when they come faster than the lift goes round: the more a shard is behind, the less a message costs.
//!
//! Invariants: what is under way is in order of entry, and what a member has had of it is its beginning, so that nobody
//! gets a message before an earlier one, none twice and none not at all; a member that comes gets what enters after him;
//! one that goes is given the rest at that moment, for he may see what was numbered while he was in.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::record::StoredMessage;

use crate::event::ConnId;
use crate::group::list::{Differences, MemberList};
use crate::group::passing::Pass;
use crate::session::Shared;

/// What a message takes beside what can be large in it, in bytes: itself, its frame's fixed part, its place here.
const MESSAGE_FIXED_BYTES: usize = 512;

/// What is under way.
#[derive(Debug)]
pub(crate) enum Cargo {
    /// A message on disk; `skip`: the connection that sent it.
    Stored { message: Arc<StoredMessage>, skip: Option<ConnId> },
    /// Messages on disk that there was no room for: devices are told to fetch them.
    Missed { conversation: ConversationId, group: UserName, from: Seq, to: Seq },
    /// What is not stored; `owner` is told how many `devices` got it.
    Passing { pass: Arc<Pass>, owner: ShardIndex, delivery: u64, devices: u32 },
}

impl Cargo {
    /// What it is counted as.
    pub fn bytes(&self) -> usize {
        match self {
            // Once as it is and once as a frame.
            Self::Stored { message, .. } => MESSAGE_FIXED_BYTES + 2 * message.bytes(),
            Self::Passing { pass, .. } => MESSAGE_FIXED_BYTES + 2 * pass.submit.message.body.len(),
            Self::Missed { .. } => 0,
        }
    }
}

/// A message, and where it entered.
#[derive(Debug)]
pub(crate) struct UnderWay {
    number: u64,
    lap: u64,
    entry: usize,
    pub bytes: usize,
    pub cargo: Cargo,
    pub shared: Shared,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scan {
    members: MemberList,
    /// The next place to visit.
    at: usize,
    lap: u64,
    under_way: VecDeque<UnderWay>,
    bytes: usize,
    next_number: u64,
    /// Members who get only what has this number or a higher one, whatever their place says.
    floors: BTreeMap<UserName, u64>,
}

impl Scan {
    pub fn new(members: &MemberList) -> Self {
        Self {
            members: members.clone(),
            at: 0,
            lap: 0,
            under_way: VecDeque::new(),
            bytes: 0,
            next_number: 0,
            floors: BTreeMap::new(),
        }
    }

    pub fn members(&self) -> &MemberList {
        &self.members
    }

    pub fn is_done(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Messages under way.
    pub fn len(&self) -> usize {
        self.under_way.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Messages under way from the `first` on, in order.
    pub fn rest(&mut self, first: usize) -> impl Iterator<Item = &mut UnderWay> {
        self.under_way.iter_mut().skip(first)
    }

    pub fn enter(&mut self, cargo: Cargo) {
        let bytes = cargo.bytes();
        let (number, lap, entry, shared) = (self.next_number, self.lap, self.at, Shared::default());
        self.next_number += 1;
        self.bytes += bytes;
        self.under_way.push_back(UnderWay { number, lap, entry, bytes, cargo, shared });
    }

    /// A message on disk that there is no room for. It joins what was missed just before it, so this list stays short;
    /// who was told of that already is told once more.
    pub fn miss(&mut self, message: &StoredMessage) {
        let last = self.under_way.pop_back_if(|last| matches!(last.cargo, Cargo::Missed { .. }));
        let from = match last.map(|last| last.cargo) {
            Some(Cargo::Missed { from, .. }) => from,
            Some(Cargo::Stored { .. } | Cargo::Passing { .. }) | None => message.seq,
        };
        let (conversation, group) = (message.conversation, message.to.clone());
        self.enter(Cargo::Missed { conversation, group, from, to: message.seq });
    }

    /// The place to visit now, and the first message that its member has not had.
    pub fn place(&self) -> Option<(usize, usize)> {
        let user = self.members.get(self.at)?;
        Some((self.at, self.floor(user)))
    }

    /// The member of this place has been visited.
    pub fn advance(&mut self) {
        self.at += 1;
        if self.at >= self.members.len() {
            self.at = 0;
            self.lap += 1;
        }
    }

    /// Takes out a message that has been everywhere.
    pub fn finished(&mut self) -> Option<UnderWay> {
        let (lap, at, nobody) = (self.lap, self.at, self.members.is_empty());
        let done = self.under_way.pop_front_if(|first| nobody || (first.lap < lap && first.entry <= at))?;
        self.bytes -= done.bytes;
        let oldest = self.under_way.front().map_or(self.next_number, |first| first.number);
        if !self.floors.is_empty() {
            self.floors.retain(|_, number| *number > oldest);
        }
        Some(done)
    }

    /// The first message that this member has not had; from now on he gets only what enters later. The caller gives him
    /// the rest. `None`: he is no member.
    pub fn rest_of(&mut self, user: &UserName) -> Option<usize> {
        let place = self.members.place_of(user).ok()?;
        let first = self.first_for(place, user);
        self.floors.insert(user.clone(), self.next_number);
        Some(first)
    }

    /// Goes on with these members. Those who are gone, and the first message that each of them has not had.
    pub fn change(&mut self, members: &MemberList) -> Vec<(UserName, usize)> {
        if self.members.is(members) {
            return Vec::new();
        }
        let Differences { gone, come } = self.members.differences(members);
        let rest_of = |(place, user): (usize, UserName)| (user.clone(), self.first_for(place, &user));
        let gone: Vec<_> = gone.into_iter().map(rest_of).collect();
        for (user, _) in &gone {
            self.floors.remove(user);
        }
        self.floors.extend(come.into_iter().map(|user| (user, self.next_number)));
        let (before, after) = (std::mem::replace(&mut self.members, members.clone()), members);
        let moved = |(lap, at): (u64, usize)| {
            let name = before.get(at);
            let place = name.map_or(after.len(), |name| after.place_of(name).unwrap_or_else(|place| place));
            if place < after.len() { (lap, place) } else { (lap + 1, 0) }
        };
        for message in &mut self.under_way {
            (message.lap, message.entry) = moved((message.lap, message.entry));
        }
        (self.lap, self.at) = moved((self.lap, self.at));
        gone
    }

    /// The first message that the member of this place has not had.
    fn first_for(&self, place: usize, user: &UserName) -> usize {
        let had = |message: &UnderWay| {
            let before = place < self.at;
            if message.lap == self.lap { message.entry <= place && before } else { message.entry <= place || before }
        };
        self.under_way.partition_point(had).max(self.floor(user))
    }

    fn floor(&self, user: &UserName) -> usize {
        if self.floors.is_empty() {
            return 0;
        }
        let floor = self.floors.get(user).copied().unwrap_or_default();
        self.under_way.partition_point(|message| message.number < floor)
    }

    /// For the sweep.
    pub fn is_well_formed(&self) -> bool {
        let entry = |message: &UnderWay| (message.number, message.lap, message.entry);
        let entries: Vec<_> = self.under_way.iter().map(entry).collect();
        let rising = entries.windows(2).all(|two| match two {
            [one, next] => one.0 < next.0 && (one.1, one.2) <= (next.1, next.2),
            _ => false,
        });
        let seqs = self.under_way.iter().filter_map(|message| match &message.cargo {
            Cargo::Stored { message, .. } => Some(message.seq),
            Cargo::Missed { to, .. } => Some(*to),
            Cargo::Passing { .. } => None,
        });
        rising
            && seqs.is_sorted()
            && self.at < self.members.len().max(1)
            && entries
                .iter()
                .all(|(_, lap, at)| (*lap == self.lap && *at <= self.at) || (lap + 1 == self.lap && *at > self.at))
            && self.bytes == self.under_way.iter().map(|message| message.bytes).sum::<usize>()
            && self.floors.len() <= self.members.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use ringline_schema::ids::DeviceId;
    use ringline_schema::message::BodyKind;

    fn message(seq: u64) -> Arc<StoredMessage> {
        let name = |text: &str| UserName::new(text).unwrap();
        Arc::new(StoredMessage {
            conversation: ConversationId(1),
            seq: Seq(seq),
            from: name("ann"),
            to: name("#team"),
            device: DeviceId(1),
            client_seq: seq,
            time_ms: 1,
            kind: BodyKind::Text,
            body: Bytes::new(),
            extra: None,
        })
    }

    /// What everyone should have had and has had.
    #[derive(Default)]
    struct Book {
        due: BTreeMap<UserName, Vec<u64>>,
        had: BTreeMap<UserName, Vec<u64>>,
    }

    impl Book {
        fn give(&mut self, scan: &mut Scan, user: &UserName, first: usize) {
            for message in scan.rest(first) {
                let Cargo::Stored { message, .. } = &message.cargo else { panic!() };
                self.had.entry(user.clone()).or_default().push(message.seq.0);
            }
        }

        fn step(&mut self, scan: &mut Scan) {
            let (place, first) = scan.place().unwrap();
            let user = scan.members().get(place).unwrap().clone();
            self.give(scan, &user, first);
            scan.advance();
            while scan.finished().is_some() {}
            assert!(scan.is_well_formed(), "{scan:?}");
        }
    }

    /// Messages, steps, people who come and go, in any order: everyone gets exactly what was numbered while he was in.
    #[test]
    fn everyone_gets_everything_once_and_in_order_whoever_comes_and_goes() {
        for seed in 0..400 {
            let mut rng = StdRng::seed_from_u64(seed);
            let all: Vec<_> = (0..12).map(|at| UserName::new(&format!("user-{at:02}")).unwrap()).collect();
            let mut list = MemberList::new(&all[..6]).unwrap();
            let (mut scan, mut book) = (Scan::new(&list), Book::default());
            for seq in 1..=200 {
                if rng.random_ratio(1, 5) {
                    let kept = all.iter().filter(|user| list.contains(user) != rng.random_ratio(1, 6));
                    let kept: Vec<_> = kept.cloned().collect();
                    list = if kept.is_empty() { list } else { MemberList::new(&kept).unwrap() };
                }
                for (user, first) in scan.change(&list) {
                    book.give(&mut scan, &user, first);
                }
                while scan.finished().is_some() {}
                scan.enter(Cargo::Stored { message: message(seq), skip: None });
                list.iter().for_each(|user| book.due.entry(user.clone()).or_default().push(seq));
                assert!(scan.is_well_formed(), "seed {seed}: {scan:?}");
                if rng.random_ratio(1, 8) {
                    let user = &all[rng.random_range(0..all.len())];
                    if let Some(first) = scan.rest_of(user) {
                        book.give(&mut scan, user, first);
                    }
                }
                for _ in 0..rng.random_range(0..8) {
                    if !scan.is_done() {
                        book.step(&mut scan);
                    }
                }
            }
            while !scan.is_done() {
                book.step(&mut scan);
            }
            assert!(book.due == book.had, "seed {seed}: {:?} and {:?}", book.due, book.had);
            assert!(scan.bytes() == 0 && scan.floors.is_empty());
        }
    }

    #[test]
    fn a_lap_gives_all_that_came_meanwhile_in_one_visit() {
        let names: Vec<_> = (0..100).map(|at| UserName::new(&format!("user-{at:02}")).unwrap()).collect();
        let list = MemberList::new(&names).unwrap();
        let (mut scan, mut book) = (Scan::new(&list), Book::default());
        scan.enter(Cargo::Stored { message: message(1), skip: None });
        for seq in 2..=50 {
            book.step(&mut scan);
            scan.enter(Cargo::Stored { message: message(seq), skip: None });
        }
        let mut visits = 49;
        while !scan.is_done() {
            book.step(&mut scan);
            visits += 1;
        }
        assert_eq!(visits, 149, "one lap and the way to where the last entered, not 50 laps");
        assert!(book.had.values().all(|had| had.len() == 50 && had.is_sorted()));
    }

    #[test]
    fn what_there_was_no_room_for_is_one_entry() {
        let list = MemberList::new(&[UserName::new("ann").unwrap(), UserName::new("bob").unwrap()]).unwrap();
        let mut scan = Scan::new(&list);
        scan.enter(Cargo::Stored { message: message(1), skip: None });
        (2..=9).for_each(|seq| scan.miss(&message(seq)));
        scan.enter(Cargo::Stored { message: message(10), skip: None });
        scan.miss(&message(11));
        assert!(scan.is_well_formed());
        let missed = |message: &mut UnderWay| match message.cargo {
            Cargo::Missed { from, to, .. } => Some((from.0, to.0)),
            Cargo::Stored { .. } | Cargo::Passing { .. } => None,
        };
        assert_eq!(scan.rest(0).filter_map(missed).collect::<Vec<_>>(), [(2, 9), (11, 11)]);
    }
}
