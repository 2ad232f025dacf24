//! Which sends may be written now. Every conversation has a lane of its own: its order, its window and its pause, so that
//! one whose owner is away or busy holds up no other.
//!
//! Pure, as `pending`, which owns it. Invariants: the sends of a conversation are written in the order of the caller, but
//! one that is refused may be passed by those that it was in flight with; from the oldest open send of a conversation to
//! the newest that was written there are at most as many as the server's duplicate filter remembers of that conversation,
//! so whatever is written again is still in it; and no more are unanswered in all than the server allows.

use std::collections::{BTreeMap, BTreeSet};

use ringline_schema::ids::UserName;
use ringline_schema::limits;

use crate::pending::Millis;

#[derive(Debug, Default)]
struct Lane {
    /// Open sends and their places in this conversation, which count from the first that was open.
    open: BTreeMap<u64, u64>,
    /// Those of `open` that are to be written, for the first time or again.
    waiting: BTreeSet<u64>,
    next_place: u64,
    /// The first of `waiting`, while it may be written.
    ready: Option<u64>,
    /// Nothing is written before.
    paused_until: Option<Millis>,
}

impl Lane {
    /// The first that waits, if pause and window let it.
    fn first(&self, window: u64) -> Option<u64> {
        let first = *self.waiting.first()?;
        let (oldest, place) = (self.open.first_key_value()?.1, self.open.get(&first)?);
        (self.paused_until.is_none() && *place < oldest.saturating_add(window)).then_some(first)
    }
}

/// See the module. Sends go by their client_seq, conversations by whom the sends are for.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: BTreeMap<UserName, Lane>,
    /// The ready one of each lane.
    ready: BTreeSet<u64>,
    paused: BTreeSet<(Millis, UserName)>,
    /// Of all lanes: the whole connection is to slow down.
    paused_until: Millis,
    waiting: usize,
    /// Written on this connection and not answered, also those that nobody waits for any more.
    unanswered: u64,
    window: u64,
}

impl Lanes {
    pub(crate) fn new() -> Self {
        Self {
            lanes: BTreeMap::new(),
            ready: BTreeSet::new(),
            paused: BTreeSet::new(),
            paused_until: 0,
            waiting: 0,
            unanswered: 0,
            window: u64::from(limits::SENDS_IN_FLIGHT_MAX),
        }
    }

    /// How many the server allows. More than its duplicate filter remembers would not be safe to resend, so that is cut.
    pub(crate) fn allow(&mut self, in_flight_max: u32) {
        self.window = u64::from(in_flight_max.clamp(1, limits::SENDS_IN_FLIGHT_MAX));
        for to in self.lanes.keys().cloned().collect::<Vec<_>>() {
            self.look_at(&to);
        }
    }

    /// A new send, with a number above all others.
    pub(crate) fn push(&mut self, client_seq: u64, to: &UserName) {
        let lane = self.lanes.entry(to.clone()).or_default();
        lane.open.insert(client_seq, lane.next_place);
        lane.next_place += 1;
        lane.waiting.insert(client_seq);
        self.waiting += 1;
        self.look_at(to);
    }

    /// The next to write now.
    pub(crate) fn next(&mut self, now: Millis) -> Option<u64> {
        while let Some((at, to)) = self.paused.first().cloned()
            && at <= now
        {
            self.paused.pop_first();
            if let Some(lane) = self.lanes.get_mut(&to) {
                lane.paused_until = None;
            }
            self.look_at(&to);
        }
        let may = now >= self.paused_until && self.unanswered < self.window;
        self.ready.first().copied().filter(|_| may)
    }

    /// It was written.
    pub(crate) fn written(&mut self, client_seq: u64, to: &UserName) {
        let waited = self.lanes.get_mut(to).is_some_and(|lane| lane.waiting.remove(&client_seq));
        debug_assert!(waited, "written without waiting");
        self.waiting -= usize::from(waited);
        self.unanswered += 1;
        self.look_at(to);
    }

    /// One that was written on this connection has its answer, whether or not it is still open.
    pub(crate) fn answered(&mut self) {
        self.unanswered = self.unanswered.saturating_sub(1);
    }

    /// One that was written is to be written again.
    pub(crate) fn again(&mut self, client_seq: u64, to: &UserName) {
        let known = self.lanes.get_mut(to).filter(|lane| lane.open.contains_key(&client_seq));
        self.waiting += usize::from(known.is_some_and(|lane| lane.waiting.insert(client_seq)));
        self.look_at(to);
    }

    /// It has ended.
    pub(crate) fn end(&mut self, client_seq: u64, to: &UserName) {
        if let Some(lane) = self.lanes.get_mut(to) {
            lane.open.remove(&client_seq);
            self.waiting -= usize::from(lane.waiting.remove(&client_seq));
        }
        self.look_at(to);
    }

    /// Holds a conversation back.
    pub(crate) fn pause(&mut self, to: &UserName, until: Millis) {
        if let Some(lane) = self.lanes.get_mut(to)
            && lane.paused_until.is_none_or(|before| before < until)
        {
            if let Some(before) = lane.paused_until.replace(until) {
                self.paused.remove(&(before, to.clone()));
            }
            self.paused.insert((until, to.clone()));
        }
        self.look_at(to);
    }

    /// Holds all of them back.
    pub(crate) fn pause_all(&mut self, until: Millis) {
        self.paused_until = self.paused_until.max(until);
    }

    /// The connection is gone: nothing of it is unanswered any more, and the next begins without pauses.
    pub(crate) fn disconnected(&mut self) {
        (self.unanswered, self.paused_until) = (0, 0);
        for (_, to) in std::mem::take(&mut self.paused) {
            if let Some(lane) = self.lanes.get_mut(&to) {
                lane.paused_until = None;
            }
            self.look_at(&to);
        }
    }

    /// How many are to be written.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// When to ask again for the next, if nothing else happens: when a pause ends. Perhaps already.
    pub(crate) fn next_wake(&self) -> Option<Millis> {
        let all = (!self.ready.is_empty() && self.unanswered < self.window).then_some(self.paused_until);
        self.paused.first().map(|(at, _)| *at).into_iter().chain(all).min()
    }

    /// What may be written of a lane follows from the lane.
    fn look_at(&mut self, to: &UserName) {
        let Some(lane) = self.lanes.get_mut(to) else { return };
        let first = lane.first(self.window);
        let before = std::mem::replace(&mut lane.ready, first);
        let (is_over, paused_until) = (lane.open.is_empty(), lane.paused_until);
        if let Some(before) = before.filter(|_| before != first) {
            self.ready.remove(&before);
        }
        self.ready.extend(first);
        if is_over {
            if let Some(until) = paused_until {
                self.paused.remove(&(until, to.clone()));
            }
            self.lanes.remove(to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    /// Writes all that may be written.
    fn pump(lanes: &mut Lanes, now: Millis, to: impl Fn(u64) -> UserName) -> Vec<u64> {
        let mut written = Vec::new();
        while let Some(next) = lanes.next(now) {
            lanes.written(next, &to(next));
            written.push(next);
        }
        written
    }

    /// Even numbers are for bob, odd ones for carl.
    fn two(number: u64) -> UserName {
        name(if number.is_multiple_of(2) { "bob" } else { "carl" })
    }

    fn lanes(count: u64, window: u32) -> Lanes {
        let mut lanes = Lanes::new();
        lanes.allow(window);
        (0..count).for_each(|number| lanes.push(number, &two(number)));
        lanes
    }

    #[test]
    fn one_that_is_held_back_holds_back_its_conversation_alone() {
        let mut lanes = lanes(6, 64);
        assert_eq!(lanes.next(0), Some(0));
        lanes.written(0, &two(0));
        lanes.answered();
        lanes.again(0, &two(0));
        lanes.pause(&two(0), 100);
        assert_eq!(pump(&mut lanes, 99, two), [1, 3, 5]);
        assert_eq!((lanes.next(99), lanes.next_wake(), lanes.waiting()), (None, Some(100), 3));
        assert_eq!(pump(&mut lanes, 100, two), [0, 2, 4], "in the order of the caller");
        assert_eq!((lanes.next_wake(), lanes.waiting()), (None, 0));
    }

    #[test]
    fn a_longer_pause_counts_and_a_new_connection_ends_them_all() {
        let mut lanes = lanes(2, 64);
        lanes.pause(&two(0), 100);
        lanes.pause(&two(0), 50);
        assert_eq!((pump(&mut lanes, 60, two), lanes.next_wake()), (vec![1], Some(100)));
        lanes.pause(&two(0), 200);
        assert_eq!((lanes.next(100), lanes.next_wake()), (None, Some(200)));
        lanes.push(3, &two(3));
        lanes.pause_all(150);
        assert_eq!((lanes.next(100), lanes.next_wake()), (None, Some(150)));
        lanes.disconnected();
        lanes.again(1, &two(1));
        assert_eq!(pump(&mut lanes, 100, two), [0, 1, 3]);
    }

    #[test]
    fn the_oldest_open_send_holds_the_window_of_its_conversation_alone() {
        let mut lanes = lanes(20, 4);
        // Bob's first is refused again and again, all others are taken: only three of his later ones may go.
        let mut written = Vec::new();
        while let Some(next) = lanes.next(0) {
            lanes.written(next, &two(next));
            lanes.answered();
            written.push(next);
            if next == 0 {
                lanes.again(0, &two(0));
                lanes.pause(&two(0), 100);
            } else {
                lanes.end(next, &two(next));
            }
        }
        assert_eq!(written, [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19]);
        let mut written = Vec::new();
        while let Some(next) = lanes.next(100).filter(|_| written.len() < 9) {
            lanes.written(next, &two(next));
            lanes.answered();
            written.push(next);
            if next != 0 {
                lanes.end(next, &two(next));
            }
        }
        assert_eq!(written, [0, 2, 4, 6], "8 would push the first out of the filter");
        lanes.end(0, &two(0));
        assert_eq!(pump(&mut lanes, 100, two), [8, 10, 12, 14], "no more unanswered than allowed");
        lanes.answered();
        lanes.end(8, &two(8));
        assert_eq!(pump(&mut lanes, 100, two), [16]);
        (10..20).for_each(|number| lanes.end(number, &two(number)));
        assert!(lanes.lanes.is_empty() && lanes.ready.is_empty() && lanes.waiting() == 0);
    }

    #[test]
    fn what_ends_while_it_waits_leaves_nothing_behind() {
        let mut lanes = lanes(4, 64);
        lanes.pause(&two(0), 100);
        (0..4).for_each(|number| lanes.end(number, &two(number)));
        assert!(lanes.lanes.is_empty() && lanes.paused.is_empty() && lanes.ready.is_empty());
        assert_eq!((lanes.next(100), lanes.next_wake(), lanes.waiting()), (None, None, 0));
    }
}
