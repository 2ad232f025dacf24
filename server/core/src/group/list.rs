//! The members of a group on one shard, in order of name. Pure; shared by every message until the next change, which copies
//! one chunk of names and the list of chunks, and not ten thousand names.
//!
//! Invariants: names rise strictly through all chunks; no chunk is empty or has more than [`CHUNK_NAMES_MAX`] names; the start
//! of a chunk is the number of names before it.

use std::cmp::Ordering;
use std::sync::Arc;

use ringline_schema::ids::UserName;

/// A change copies so many names at most, and a pointer for each so many names.
const CHUNK_NAMES_MAX: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Chunk {
    start: usize,
    names: Arc<[UserName]>,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberList {
    chunks: Arc<[Chunk]>,
}

impl Default for MemberList {
    fn default() -> Self {
        Self { chunks: Arc::from([]) }
    }
}

/// Names that are on only one of two lists.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// Those of the first list, with their places there.
    pub gone: Vec<(usize, UserName)>,
    pub come: Vec<UserName>,
}

impl MemberList {
    /// `None`: the names do not rise strictly.
    pub fn new(names: &[UserName]) -> Option<Self> {
        let rising = names.windows(2).all(|two| matches!(two, [one, next] if one < next));
        rising.then(|| Self::of_chunks(names.chunks(CHUNK_NAMES_MAX).map(Arc::from)))
    }

    fn of_chunks(chunks: impl Iterator<Item = Arc<[UserName]>>) -> Self {
        let with_start = chunks.scan(0, |next, names| {
            let start = *next;
            *next += names.len();
            Some(Chunk { start, names })
        });
        Self { chunks: with_start.collect() }
    }

    pub fn len(&self) -> usize {
        self.chunks.last().map_or(0, |last| last.start + last.names.len())
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &UserName> {
        self.chunks.iter().flat_map(|chunk| chunk.names.iter())
    }

    pub fn get(&self, place: usize) -> Option<&UserName> {
        let after = self.chunks.partition_point(|chunk| chunk.start <= place);
        let chunk = self.chunks.get(after.checked_sub(1)?)?;
        chunk.names.get(place - chunk.start)
    }

    /// Whether it is the same list, not only an equal one: then nobody has come or gone.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.chunks, &other.chunks)
    }

    pub fn contains(&self, user: &UserName) -> bool {
        self.place_of(user).is_ok()
    }

    /// The place of a name, or else the place that it would have.
    pub(crate) fn place_of(&self, user: &UserName) -> Result<usize, usize> {
        let (at, place) = self.find(user);
        let start = self.chunks.get(at).map_or(0, |chunk| chunk.start);
        place.map(|place| start + place).map_err(|place| start + place)
    }

    /// The chunk that a name is in or belongs into, and its place there.
    fn find(&self, user: &UserName) -> (usize, Result<usize, usize>) {
        let first_is_not_above = |chunk: &Chunk| chunk.names.first().is_some_and(|first| first <= user);
        let at = self.chunks.partition_point(first_is_not_above).saturating_sub(1);
        (at, self.chunks.get(at).map_or(Err(0), |chunk| chunk.names.binary_search(user)))
    }

    /// The list with this name.
    pub(crate) fn with(&self, user: &UserName) -> Self {
        let (at, Err(place)) = self.find(user) else { return self.clone() };
        let mut names = self.names_of(at);
        names.insert(place.min(names.len()), user.clone());
        let half = if names.len() > CHUNK_NAMES_MAX { names.len() / 2 } else { names.len() };
        self.replaced(at, 1, names.chunks(half))
    }

    /// The list without this name.
    pub(crate) fn without(&self, user: &UserName) -> Self {
        let (at, Ok(place)) = self.find(user) else { return self.clone() };
        let mut names = self.names_of(at);
        names.remove(place);
        // Neighbours that are half a chunk together become one, so that many small ones do not stay behind.
        let few = |chunk: &&Chunk| names.len() + chunk.names.len() <= CHUNK_NAMES_MAX / 2;
        let before = at.checked_sub(1).and_then(|before| self.chunks.get(before)).filter(few);
        if let Some(before) = before {
            names.splice(..0, before.names.iter().cloned());
            return self.replaced(at - 1, 2, names.chunks(CHUNK_NAMES_MAX));
        }
        let after = self.chunks.get(at + 1).filter(few);
        names.extend(after.into_iter().flat_map(|after| after.names.iter().cloned()));
        self.replaced(at, 1 + usize::from(after.is_some()), names.chunks(CHUNK_NAMES_MAX))
    }

    fn names_of(&self, at: usize) -> Vec<UserName> {
        let mut names = Vec::with_capacity(CHUNK_NAMES_MAX + 1);
        names.extend(self.chunks.get(at).into_iter().flat_map(|chunk| chunk.names.iter().cloned()));
        names
    }

    fn replaced<'a>(&self, at: usize, count: usize, by: impl Iterator<Item = &'a [UserName]>) -> Self {
        let names = |chunk: &Chunk| Arc::clone(&chunk.names);
        let before = self.chunks.iter().take(at).map(names);
        let after = self.chunks.iter().skip(at + count).map(names);
        Self::of_chunks(before.chain(by.map(Arc::from)).chain(after))
    }

    /// What has changed from this list to another one. Takes as long as the chunks that they do not share are, and a step
    /// for each that they do.
    pub(crate) fn differences(&self, other: &Self) -> Differences {
        let mut found = Differences::default();
        let (mut one, mut two) = (Walk::of(self), Walk::of(other));
        loop {
            if one.stands_before_the_chunk_of(&two) {
                one.skip_chunk();
                two.skip_chunk();
                continue;
            }
            let order = match (one.name(), two.name()) {
                (None, None) => return found,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(name), Some(other)) => name.cmp(other),
            };
            if order.is_lt() {
                found.gone.extend(one.place().zip(one.name().cloned()));
            } else if order.is_gt() {
                found.come.extend(two.name().cloned());
            }
            if order.is_le() {
                one.step();
            }
            if order.is_ge() {
                two.step();
            }
        }
    }

    #[cfg(test)]
    fn is_well_formed(&self) -> bool {
        let mut start = 0;
        let chunks = self.chunks.iter().all(|chunk| {
            let right = chunk.start == start && (1..=CHUNK_NAMES_MAX).contains(&chunk.names.len());
            start += chunk.names.len();
            right
        });
        chunks && self.iter().zip(self.iter().skip(1)).all(|(one, next)| one < next)
    }
}

/// A place on a list that goes forward.
struct Walk<'a> {
    chunks: &'a [Chunk],
    at: usize,
}

impl<'a> Walk<'a> {
    fn of(list: &'a MemberList) -> Self {
        Self { chunks: &list.chunks, at: 0 }
    }

    /// Both stand at the beginning of one and the same chunk.
    fn stands_before_the_chunk_of(&self, other: &Self) -> bool {
        let (0, 0, [one, ..], [two, ..]) = (self.at, other.at, self.chunks, other.chunks) else { return false };
        Arc::ptr_eq(&one.names, &two.names)
    }

    fn name(&self) -> Option<&'a UserName> {
        self.chunks.first()?.names.get(self.at)
    }

    fn place(&self) -> Option<usize> {
        Some(self.chunks.first()?.start + self.at)
    }

    fn step(&mut self) {
        self.at += 1;
        if self.chunks.first().is_none_or(|chunk| self.at >= chunk.names.len()) {
            self.skip_chunk();
        }
    }

    fn skip_chunk(&mut self) {
        self.at = 0;
        self.chunks = self.chunks.get(1..).unwrap_or(&[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::collections::BTreeSet;

    fn name(number: usize) -> UserName {
        UserName::new(&format!("user-{number:05}")).unwrap()
    }

    /// Against a plain set: come and go in any order, and what two lists tell of each other.
    #[test]
    fn a_list_is_a_sorted_set_and_tells_what_has_changed() {
        for seed in 0..20 {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut list, mut set) = (MemberList::default(), BTreeSet::new());
            let (mut then, mut set_then) = (list.clone(), set.clone());
            for step in 0..3_000 {
                let user = name(rng.random_range(0..2_000));
                // First it grows, then it shrinks.
                if rng.random_ratio(if step < 1_800 { 9 } else { 1 }, 10) {
                    list = list.with(&user);
                    set.insert(user);
                } else {
                    list = list.without(&user);
                    set.remove(&user);
                }
                if step % 50 == 0 {
                    assert!(list.is_well_formed() && list.iter().eq(set.iter()) && list.len() == set.len());
                    let found = then.differences(&list);
                    assert!(found.come.iter().eq(set.difference(&set_then)));
                    assert!(found.gone.iter().map(|(_, user)| user).eq(set_then.difference(&set)));
                    assert!(found.gone.iter().all(|(place, user)| then.get(*place) == Some(user)));
                    (then, set_then) = (list.clone(), set.clone());
                }
            }
            for (place, user) in set.iter().enumerate() {
                assert_eq!((list.get(place), list.place_of(user)), (Some(user), Ok(place)));
            }
            assert_eq!((list.get(set.len()), list.place_of(&name(9_999))), (None, Err(set.len())));
            set.iter().for_each(|user| list = list.without(user));
            assert!(list.is_empty() && list.chunks.is_empty() && list.place_of(&name(1)) == Err(0));
        }
    }

    #[test]
    fn a_change_copies_one_chunk_of_many_and_small_ones_do_not_stay() {
        let all: Vec<_> = (0..10_000).map(|number| name(2 * number)).collect();
        let list = MemberList::new(&all).unwrap();
        let shared = |other: &MemberList| {
            let kept = |chunk: &&Chunk| list.chunks.iter().any(|old| Arc::ptr_eq(&old.names, &chunk.names));
            other.chunks.iter().filter(kept).count()
        };
        let more = list.with(&name(5_001));
        assert!(shared(&more) + 1 == list.chunks.len() && more.len() == 10_001 && more.is_well_formed());
        assert_eq!(shared(&more.without(&name(5_000))), shared(&more));
        assert!(list.is(&list.clone()) && !list.is(&more));
        let few = all
            .iter()
            .filter(|user| !user.as_str().ends_with("00"))
            .fold(list.clone(), |list, user| list.without(user));
        assert!(few.is_well_formed() && few.len() == 200 && few.chunks.len() <= 6, "{} chunks", few.chunks.len());
        assert!(MemberList::new(&[name(2), name(1)]).is_none() && MemberList::new(&[name(1), name(1)]).is_none());
    }
}
