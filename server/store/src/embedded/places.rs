//! Where the recent messages of one conversation lie, by seq: messages of one record take one entry.
//!
//! Pure; part of an [overlay](super::overlay). Invariant: spans rise by seq and do not overlap.

use ringline_schema::ids::Seq;

use super::format::Place;

/// Messages of one record.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u64,
    messages: u32,
    place: Place,
}

impl Span {
    /// The seq behind its last.
    fn end(&self) -> u64 {
        self.first.saturating_add(self.messages.into())
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Places(Vec<Span>);

impl Places {
    /// Memory, about.
    pub fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<Span>()
    }

    /// So many messages from `first` on lie here. Those that are known already keep their place.
    #[inline]
    pub fn add(&mut self, first: Seq, messages: u32, place: Place) {
        if self.0.last().is_none_or(|last| last.end() <= first.0) {
            self.0.push(Span { first: first.0, messages, place });
            return;
        }
        let end = first.0.saturating_add(messages.into());
        (first.0..end).for_each(|seq| self.insert(seq, place));
    }

    #[cold]
    fn insert(&mut self, seq: u64, place: Place) {
        let at = self.0.partition_point(|span| span.end() <= seq);
        if self.0.get(at).is_none_or(|span| seq < span.first) {
            self.0.insert(at, Span { first: seq, messages: 1, place });
        }
    }

    /// Those of `after` < seq < `before`, rising.
    pub fn between(&self, after: Seq, before: Seq) -> impl Iterator<Item = (Seq, Place)> {
        let start = self.0.partition_point(|span| span.end() <= after.0.saturating_add(1));
        let spans = self.0.get(start..).unwrap_or(&[]).iter().take_while(move |span| span.first < before.0);
        spans.flat_map(move |span| {
            let from = span.first.max(after.0.saturating_add(1));
            (from..span.end().min(before.0)).map(|seq| (Seq(seq), span.place))
        })
    }

    /// Those from `first` on, rising.
    pub fn from(&self, first: Seq) -> impl Iterator<Item = (Seq, Place)> {
        // Seqs begin at 1, and no conversation gets to the last.
        self.between(Seq(first.0.saturating_sub(1)), Seq(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn place(number: u32) -> Place {
        Place { log: 1, segment: 2, offset: number, bytes: 8 }
    }

    #[test]
    fn messages_of_one_record_take_one_entry() {
        let mut places = Places::default();
        places.add(Seq(5), 16, place(1));
        places.add(Seq(21), 16, place(2));
        assert_eq!(places.0.len(), 2);
        let found: Vec<_> = places.between(Seq(19), Seq(23)).map(|(seq, place)| (seq.0, place.offset)).collect();
        assert_eq!(found, [(20, 1), (21, 2), (22, 2)]);
    }

    proptest! {
        #[test]
        fn every_seq_is_found_once_at_its_first_place(
            adds in prop::collection::vec((1u64..60, 1u32..9), 0..20),
            (after, before) in (0u64..70, 0u64..70),
        ) {
            let (mut places, mut known) = (Places::default(), BTreeMap::new());
            for (number, (first, messages)) in (0..).zip(adds) {
                places.add(Seq(first), messages, place(number));
                for seq in first..first + u64::from(messages) {
                    known.entry(seq).or_insert(number);
                }
            }
            let found = |places: &mut dyn Iterator<Item = (Seq, Place)>| -> Vec<(u64, u32)> {
                places.map(|(seq, place)| (seq.0, place.offset)).collect()
            };
            let wanted = |low: u64, high: u64| -> Vec<(u64, u32)> {
                known.iter().filter(|(seq, _)| (low..high).contains(seq)).map(|(seq, number)| (*seq, *number)).collect()
            };
            prop_assert_eq!(found(&mut places.between(Seq(after), Seq(before))), wanted(after + 1, before));
            prop_assert_eq!(found(&mut places.from(Seq(after))), wanted(after, u64::MAX));
        }
    }
}
