//! The duplicate filter of one device in one conversation: what was accepted under which client_seq.
//!
//! It remembers the `DUPLICATE_WINDOW` highest client_seqs and never forgets by time. A number above the lowest
//! remembered one that is not remembered was never accepted, so a refused send may be retried under its old number.

use std::collections::VecDeque;

use ringline_schema::ids::Seq;
use ringline_schema::limits::DUPLICATE_WINDOW;
use ringline_schema::record::Accepted;

/// What a send is to the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    New,
    /// The same message was accepted before.
    Repeat(Accepted),
    /// The number was used for another body.
    Conflict,
    /// Older than everything remembered: accepted or not, nobody knows any more.
    Stale,
}

/// Invariant: strictly rising by client_seq, at most `DUPLICATE_WINDOW` long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    accepted: VecDeque<Accepted>,
}

impl Filter {
    /// From what a store remembers, already in rising order; anything else in it is dropped.
    pub fn restore(mut accepted: Vec<Accepted>) -> Self {
        accepted.sort_unstable_by_key(|entry| entry.client_seq);
        accepted.dedup_by_key(|entry| entry.client_seq);
        let excess = accepted.len().saturating_sub(DUPLICATE_WINDOW);
        accepted.drain(..excess);
        Self { accepted: accepted.into() }
    }

    pub fn check(&self, client_seq: u64, body_hash: u64) -> Seen {
        if self.accepted.back().is_none_or(|newest| client_seq > newest.client_seq) {
            return Seen::New;
        }
        match self.accepted.binary_search_by_key(&client_seq, |entry| entry.client_seq) {
            Ok(at) => match self.accepted.get(at) {
                Some(entry) if entry.body_hash == body_hash => Seen::Repeat(*entry),
                _ => Seen::Conflict,
            },
            Err(0) if self.accepted.len() >= DUPLICATE_WINDOW => Seen::Stale,
            Err(_) => Seen::New,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.accepted.is_empty()
    }

    /// Remembers a send that [`Filter::check`] called new.
    pub fn insert(&mut self, entry: Accepted) {
        // Nearly always the newest; then nothing has to move.
        if self.accepted.back().is_none_or(|newest| entry.client_seq > newest.client_seq) {
            if self.accepted.len() >= DUPLICATE_WINDOW {
                self.accepted.pop_front();
            }
            return self.accepted.push_back(entry);
        }
        let at = match self.accepted.binary_search_by_key(&entry.client_seq, |known| known.client_seq) {
            Ok(_) => return debug_assert!(false, "client_seq {} accepted twice", entry.client_seq),
            Err(at) => at,
        };
        if self.accepted.len() < DUPLICATE_WINDOW {
            self.accepted.insert(at, entry);
        } else if at > 0 {
            self.accepted.pop_front();
            self.accepted.insert(at - 1, entry);
        }
    }

    /// The highest place of a remembered send.
    pub fn newest_seq(&self) -> Seq {
        self.accepted.iter().map(|entry| entry.seq).max().unwrap_or_default()
    }

    pub fn is_well_formed(&self) -> bool {
        self.accepted.len() <= DUPLICATE_WINDOW && self.accepted.iter().is_sorted_by(|a, b| a.client_seq < b.client_seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::ids::Seq;

    fn entry(client_seq: u64, seq: u64) -> Accepted {
        Accepted { client_seq, seq: Seq(seq), time_ms: 0, body_hash: client_seq * 10 }
    }

    #[test]
    fn repeats_conflicts_gaps_and_the_far_past() {
        let mut filter = Filter::default();
        assert_eq!(filter.check(5, 50), Seen::New);
        filter.insert(entry(5, 1));
        filter.insert(entry(8, 2));
        assert_eq!(filter.check(5, 50), Seen::Repeat(entry(5, 1)));
        assert_eq!(filter.check(5, 51), Seen::Conflict);
        assert_eq!(filter.check(7, 70), Seen::New, "refused earlier, retried after its successor");
        assert_eq!(filter.check(1, 10), Seen::New, "the window is not full: everything accepted is in it");
        for number in 9..9 + DUPLICATE_WINDOW as u64 {
            filter.insert(entry(number, number));
        }
        assert_eq!(filter.check(8, 80), Seen::Stale);
        assert_eq!(filter.check(9, 90), Seen::Repeat(entry(9, 9)));
        assert!(filter.is_well_formed());
    }

    #[test]
    fn a_late_one_in_a_full_window_takes_the_place_of_the_oldest() {
        let mut filter = Filter::default();
        for number in (1..=2 * DUPLICATE_WINDOW as u64).map(|number| 2 * number) {
            filter.insert(entry(number, number));
            assert!(filter.is_well_formed());
        }
        let (oldest, late) = (DUPLICATE_WINDOW as u64 * 2 + 2, DUPLICATE_WINDOW as u64 * 3 + 1);
        assert_eq!(filter.check(oldest, oldest * 10), Seen::Repeat(entry(oldest, oldest)));
        filter.insert(entry(late, 500));
        assert!(filter.is_well_formed());
        assert_eq!(filter.check(late, late * 10), Seen::Repeat(entry(late, 500)));
        assert_eq!(filter.check(oldest, oldest * 10), Seen::Stale);
    }

    #[test]
    fn restoring_sorts_and_bounds() {
        let filter = Filter::restore((1..=100).rev().map(|number| entry(number, number)).collect());
        assert!(filter.is_well_formed());
        assert_eq!(filter.check(36, 360), Seen::Stale);
        assert_eq!(filter.check(37, 370), Seen::Repeat(entry(37, 37)));
    }
}
