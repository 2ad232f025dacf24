//! Messages to many members of a group go out in slices, so that nobody else waits for all of them.
//!
//! Owned by the shard of the members. Each group with something under way has a [`Scan`]; in each turn the scans are
//! visited in a circle, and together take at most
//! [`fan_out_slice_units`](crate::config::CoreConfig::fan_out_slice_units). What was answered or asked meanwhile is
//! handled between two slices. Whoever logs in is visited like everyone else if his place comes later; if it was before,
//! the message was on disk before the login, and SYNC has it. A message to few goes at once, with no list and no wait,
//! unless earlier ones of its group are under way or the turn has given out enough already.
//!
//! A group that gets its next message before the last one has been everywhere is behind. Then a slice is followed by as
//! long a pause: the lap takes longer, each visit gives several messages, and at least half of the core is left to
//! everyone else. A group that is not behind goes round without pauses.
//!
//! Bounds: [`FAN_OUT_MESSAGES_MAX`] a group, and no more bytes of it than half an outbox takes; [`FAN_OUT_BYTES_MAX`] and
//! [`FAN_OUT_GROUPS_MAX`] a shard. Over them durable messages become LAGGED and transient ones are dropped and counted.
//! Invariant: each scan is in the circle once and has something under way.

use std::collections::{BTreeMap, VecDeque};

use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::message::Standing;

use crate::config::{
    FAN_OUT_BYTES_MAX, FAN_OUT_GROUPS_MAX, FAN_OUT_MESSAGES_MAX, FAN_OUT_PAUSE_US_MAX, FAN_OUT_PAUSE_US_MIN,
    FAN_OUT_UNIT_BYTES, FAN_OUT_VISIT_UNITS, FAN_OUTS_AT_ONCE_MAX,
};
use crate::event::{ConnId, Effects};
use crate::group::fan_out::GroupAnswer;
use crate::group::list::MemberList;
use crate::group::scan::{Cargo, Scan, UnderWay};
use crate::session::Sessions;
use crate::shard::Shard;
use crate::timers::Timer;

/// Groups that share a slice; of more the others have the next ones, so that a slice is not all coming and going.
const GROUPS_PER_SLICE_MAX: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct FanOuts {
    scans: BTreeMap<ConversationId, Scan>,
    circle: VecDeque<ConversationId>,
    bytes: usize,
    armed: bool,
    /// When the last slice began, until the pause after it has been thought of.
    slice_began_us: Option<u64>,
    /// Members that were given something at once in the turn of this time.
    at_once: (u64, usize),
}

impl FanOuts {
    /// Groups with something under way.
    pub fn len(&self) -> usize {
        self.scans.len()
    }

    pub fn is_empty(&self) -> bool {
        self.scans.is_empty()
    }

    /// Bytes under way.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The turn after a slice: until when there is to be none, if something is behind. What a turn took is known by when the
    /// next one begins.
    fn pause(&mut self, now_us: u64) -> Option<u64> {
        let took_us = now_us.saturating_sub(self.slice_began_us.take()?).min(FAN_OUT_PAUSE_US_MAX);
        let mut next = self.circle.iter().take(GROUPS_PER_SLICE_MAX).filter_map(|group| self.scans.get(group));
        let behind = next.any(|scan| scan.len() > 1);
        (behind && took_us >= FAN_OUT_PAUSE_US_MIN).then(|| now_us + took_us)
    }

    /// For the sweep.
    pub fn check_invariants(&self) {
        assert!(self.scans.values().all(|scan| scan.is_well_formed() && !scan.is_done()));
        assert_eq!(self.bytes, self.scans.values().map(Scan::bytes).sum::<usize>());
        assert!(self.circle.len() == self.scans.len() && self.circle.iter().all(|id| self.scans.contains_key(id)));
        assert!(self.scans.is_empty() || self.armed, "somebody goes on with them");
        assert!(self.scans.len() <= FAN_OUT_GROUPS_MAX && self.bytes <= FAN_OUT_BYTES_MAX);
    }
}

impl Shard {
    /// Whether a message to these members can't go to all of them now.
    pub(crate) fn goes_in_slices(&mut self, group: ConversationId, members: &MemberList) -> bool {
        if self.fan_outs.scans.contains_key(&group) {
            return true;
        }
        let (most, at_once_max) = (members.len().min(self.online.len()), self.config.fan_out_at_once_max);
        let (turn_us, given) = self.fan_outs.at_once;
        let given = if turn_us == self.now.mono_us { given + most } else { most };
        let fits = most <= at_once_max && given <= at_once_max.saturating_mul(FAN_OUTS_AT_ONCE_MAX);
        if fits {
            self.fan_outs.at_once = (self.now.mono_us, given);
        }
        !fits
    }

    /// Sends a message round these members, beginning with the next slice.
    pub(crate) fn send_round(&mut self, group: ConversationId, members: &MemberList, cargo: Cargo, fx: &mut Effects) {
        let mut scan = match self.fan_outs.scans.remove(&group) {
            Some(scan) => scan,
            None => {
                self.make_room_for_a_group(fx);
                self.fan_outs.circle.push_back(group);
                Scan::new(members)
            }
        };
        for (user, first) in scan.change(members) {
            self.give(&mut scan, &user, first, fx);
        }
        self.let_out(&mut scan, fx);
        self.take_up(&mut scan, cargo, fx);
        self.put_back(group, scan);
        if !self.fan_outs.is_empty() && !std::mem::replace(&mut self.fan_outs.armed, true) {
            self.timers.arm(self.now.mono_us, Timer::FanOut);
        }
    }

    /// Lets a message enter, or what stands for it where there is no room.
    fn take_up(&mut self, scan: &mut Scan, cargo: Cargo, fx: &mut Effects) {
        let bytes = cargo.bytes();
        let group_full = scan.bytes() + bytes > self.config.outbox_bytes_max / 2 || scan.len() >= FAN_OUT_MESSAGES_MAX;
        if (scan.is_done() || !group_full) && self.fan_outs.bytes + bytes <= FAN_OUT_BYTES_MAX {
            self.fan_outs.bytes += bytes;
            return scan.enter(cargo);
        }
        match cargo {
            Cargo::Stored { message, .. } => {
                self.sessions.counters.fan_outs_missed += 1;
                scan.miss(&message);
            }
            Cargo::Passing { pass, owner, delivery, devices } => {
                self.sessions.counters.fan_outs_dropped += 1;
                self.passed_here((owner, &pass), delivery, devices, fx);
            }
            Cargo::Missed { .. } => debug_assert!(false, "nothing else makes one"),
        }
    }

    fn put_back(&mut self, group: ConversationId, scan: Scan) {
        if scan.is_done() {
            self.fan_outs.circle.retain(|other| *other != group);
        } else {
            self.fan_outs.scans.insert(group, scan);
        }
    }

    /// The group that waited longest gives way.
    fn make_room_for_a_group(&mut self, fx: &mut Effects) {
        if self.fan_outs.scans.len() < FAN_OUT_GROUPS_MAX {
            return;
        }
        if let Some(group) = self.fan_outs.circle.pop_front() {
            self.go_round(group, usize::MAX, fx);
        }
    }

    /// A slice: every group in turn, until it is used up.
    pub(crate) fn fan_outs_due(&mut self, fx: &mut Effects) {
        self.fan_outs.armed = false;
        if let Some(until_us) = self.fan_outs.pause(self.now.mono_us) {
            self.fan_outs.armed = true;
            return self.timers.arm(until_us, Timer::FanOut);
        }
        self.fan_outs.slice_began_us = Some(self.now.mono_us);
        let mut left = self.config.fan_out_slice_units;
        let share = left / self.fan_outs.circle.len().clamp(1, GROUPS_PER_SLICE_MAX);
        while left > 0
            && let Some(group) = self.fan_outs.circle.pop_front()
        {
            left = left.saturating_sub(self.go_round(group, share.min(left), fx));
        }
        if !self.fan_outs.is_empty() {
            self.fan_outs.armed = true;
            // After this moment, so that it is another turn.
            self.timers.arm(self.now.mono_us + 1, Timer::FanOut);
        }
    }

    /// Goes on with a group that was taken out of the circle. What it took, in units; `units_max` is passed by less than
    /// one member's part.
    fn go_round(&mut self, group: ConversationId, units_max: usize, fx: &mut Effects) -> usize {
        let Some(mut scan) = self.fan_outs.scans.remove(&group) else { return 0 };
        let members = scan.members().clone();
        let mut units = 0_usize;
        while units < units_max
            && !scan.is_done()
            && let Some((place, first)) = scan.place()
            && let Some(user) = members.get(place)
        {
            units += 1 + self.give(&mut scan, user, first, fx);
            scan.advance();
            self.let_out(&mut scan, fx);
        }
        if !scan.is_done() {
            self.fan_outs.circle.push_back(group);
        }
        self.put_back(group, scan);
        units
    }

    /// Gives every device of a member what is under way from the `first` message on. What it took, in units.
    fn give(&mut self, scan: &mut Scan, user: &UserName, first: usize, fx: &mut Effects) -> usize {
        let Self { online, sessions, .. } = self;
        let Some(devices) = online.get(user) else { return 0 };
        sessions.counters.fan_out_visits += 1;
        let mut units = 0;
        for &conn in devices {
            let bytes: usize = scan.rest(first).map(|message| hand(message, (conn, user), sessions, fx)).sum();
            units += FAN_OUT_VISIT_UNITS + bytes / FAN_OUT_UNIT_BYTES;
        }
        units
    }

    /// Takes out what has been everywhere.
    fn let_out(&mut self, scan: &mut Scan, fx: &mut Effects) {
        while let Some(UnderWay { bytes, cargo, shared, .. }) = scan.finished() {
            self.fan_outs.bytes -= bytes;
            self.sessions.done_with(shared);
            match cargo {
                Cargo::Passing { pass, owner, delivery, devices } => {
                    self.passed_here((owner, &pass), delivery, devices, fx);
                }
                Cargo::Stored { .. } | Cargo::Missed { .. } => {}
            }
        }
    }

    /// Gives a member now what is under way in a group, before something that must not overtake it.
    pub(crate) fn hurry(&mut self, group: ConversationId, user: &UserName, fx: &mut Effects) {
        let Some(mut scan) = self.fan_outs.scans.remove(&group) else { return };
        if let Some(first) = scan.rest_of(user) {
            self.give(&mut scan, user, first, fx);
        }
        self.fan_outs.scans.insert(group, scan);
    }

    /// Who has left a group hears so after what was numbered before.
    pub(crate) fn hurry_who_left(&mut self, conn: ConnId, answer: &GroupAnswer, fx: &mut Effects) {
        let GroupAnswer::Ok { conversation, standing: Some(Standing::Left), .. } = answer else { return };
        if let Some(user) = self.sessions.get(conn).and_then(|session| session.login()).map(|login| login.user.clone())
        {
            self.hurry(*conversation, &user, fx);
        }
    }
}

/// Gives a device one message. The bytes of it, whether or not there was room for them.
fn hand(message: &mut UnderWay, (conn, user): (ConnId, &UserName), sessions: &mut Sessions, fx: &mut Effects) -> usize {
    let UnderWay { cargo, shared, .. } = message;
    match cargo {
        Cargo::Stored { message, skip } => {
            if *skip != Some(conn) {
                sessions.deliver_shared(conn, message, shared, fx);
            }
        }
        Cargo::Missed { conversation, group, from, to } => {
            sessions.miss(conn, (*conversation, group), (*from, *to), fx);
        }
        Cargo::Passing { pass, delivery, devices, .. } => {
            if pass.submit.message.from != *user {
                *devices += u32::from(sessions.offer_shared(conn, || pass.as_wire(*delivery), shared, fx));
            }
        }
    }
    shared.len()
}
