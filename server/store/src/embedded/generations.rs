//! The rows of one log that the index lacks, in two generations: the one that takes in, and the one being written.
//!
//! The index thread fills the young one and, when it is full, makes it the old one; the flush thread writes the old one
//! into the index and then forgets it. So a flush of a million rows holds up neither questions nor the following of the log.
//!
//! Who reads looks into the young one first, then into the old one, then into the index: rows only move that way, and are
//! visible in the next place before they leave the one before.

use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::overlay::Overlay;

/// See the module.
#[derive(Debug)]
pub(super) struct Generations {
    young: RwLock<Overlay>,
    old: RwLock<Option<Arc<Overlay>>>,
}

/// One generation, held for reading.
pub(super) enum Held<'a> {
    Young(RwLockReadGuard<'a, Overlay>),
    Old(Arc<Overlay>),
}

impl Deref for Held<'_> {
    type Target = Overlay;

    fn deref(&self) -> &Overlay {
        match self {
            Self::Young(overlay) => overlay,
            Self::Old(overlay) => overlay,
        }
    }
}

// A panic of a writer leaves whole records behind, so reading and writing on is safe: poison is ignored in all of these.
impl Generations {
    pub fn new(run: u64) -> Self {
        Self { young: RwLock::new(Overlay::new(run)), old: RwLock::new(None) }
    }

    /// The young one. Read before [`Self::old`].
    pub fn young(&self) -> RwLockReadGuard<'_, Overlay> {
        self.young.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn old(&self) -> Option<Arc<Overlay>> {
        self.old.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For the index thread, the only writer.
    pub fn young_mut(&self) -> RwLockWriteGuard<'_, Overlay> {
        self.young.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both, in the order in which they must be read.
    pub fn both(&self) -> impl Iterator<Item = Held<'_>> {
        let old = std::iter::once_with(|| self.old()).flatten().map(Held::Old);
        std::iter::once_with(|| Held::Young(self.young())).chain(old)
    }

    /// Makes the young one the old one, which must be gone, and begins a new young one.
    pub fn age(&self) -> Arc<Overlay> {
        let mut young = self.young_mut();
        let run = young.run;
        let aged = Arc::new(std::mem::replace(&mut *young, Overlay::new(run)));
        let mut old = self.old.write().unwrap_or_else(PoisonError::into_inner);
        debug_assert!(old.is_none(), "one flush at a time");
        // While the young one is locked: nobody finds its rows in neither.
        *old = Some(Arc::clone(&aged));
        aged
    }

    /// Forgets the old one, once it is visible in the index.
    pub fn forget_old(&self) {
        *self.old.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use ringline_schema::ids::UserName;
    use ringline_schema::record::User;

    use super::*;

    #[test]
    fn rows_are_found_in_the_order_in_which_they_move() {
        let generations = Generations::new(7);
        let user = |at| User { name: UserName::new("ann").unwrap(), password_hash: None, created_ms: at };
        let seen = || generations.both().map(|held| held.users.values().map(|(_, user)| user.created_ms).sum());
        let seen = || seen().collect::<Vec<u64>>();
        generations.young_mut().users.insert(user(1).name, (7, user(1)));
        assert_eq!(seen(), [1]);
        let aged = generations.age();
        generations.young_mut().users.insert(user(2).name, (7, user(2)));
        assert_eq!(seen(), [2, 1]);
        assert_eq!((aged.run, generations.young().run), (7, 7), "the run goes on");
        generations.forget_old();
        assert_eq!(seen(), [2]);
    }
}
