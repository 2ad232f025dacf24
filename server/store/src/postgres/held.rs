//! Which partitions this start of a node owns, and since when: what the commits of its shards compare. Shared by the
//! tasks of the side thread; changed by the registrar alone, or never, where a node is alone.
//!
//! Invariants: a commit keeps the epochs that it began with. A session that began before the last take on another server
//! than the one that committed it is of no more use: what it shows may be older than what was taken.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The epochs of the partitions that this start owns.
pub(super) type Epochs = BTreeMap<i16, i64>;

/// A run of a server, by the microsecond in which it started: two that both say they are the primary differ in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Server(pub i64);

/// The last take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Takes so far.
    pub count: u64,
    /// Which server committed it.
    pub server: Server,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Held {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    epochs: Arc<Epochs>,
    taken: Taken,
}

impl Held {
    pub fn new(epochs: Epochs) -> Self {
        Self { state: Mutex::new(State { epochs: Arc::new(epochs), taken: Taken::default() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn epochs(&self) -> Arc<Epochs> {
        Arc::clone(&self.state().epochs)
    }

    pub fn taken(&self) -> Taken {
        self.state().taken
    }

    /// Adds what a committed transaction has taken.
    pub fn add(&self, taken: impl IntoIterator<Item = (i16, i64)>, server: Server) {
        let mut state = self.state();
        Arc::make_mut(&mut state.epochs).extend(taken);
        state.taken = Taken { count: state.taken.count + 1, server };
    }

    pub fn remove(&self, partitions: &[i16]) {
        let mut state = self.state();
        Arc::make_mut(&mut state.epochs).retain(|partition, _| !partitions.contains(partition));
    }

    /// Takes in what the database says, decided as it is: another may have taken partitions, and a take or a release
    /// whose answer was lost may have come through or not.
    pub fn become_as(&self, epochs: Epochs, server: Server) {
        let mut state = self.state();
        let has_more = epochs.iter().any(|(partition, epoch)| state.epochs.get(partition) != Some(epoch));
        if has_more {
            state.taken = Taken { count: state.taken.count + 1, server };
        }
        if has_more || epochs.len() != state.epochs.len() {
            state.epochs = Arc::new(epochs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_under_way_keeps_what_it_began_with() {
        let held = Held::new(Epochs::from([(1, 4)]));
        let begun = held.epochs();
        held.add([(2, 9)], Server(5));
        held.remove(&[1, 7]);
        assert_eq!((&*begun, &*held.epochs()), (&Epochs::from([(1, 4)]), &Epochs::from([(2, 9)])));
        assert_eq!(held.taken(), Taken { count: 1, server: Server(5) });
    }

    #[test]
    fn only_what_is_more_than_before_counts_as_a_take() {
        let held = Held::new(Epochs::from([(1, 4), (2, 9)]));
        held.become_as(Epochs::from([(1, 4), (2, 9)]), Server(5));
        held.become_as(Epochs::from([(2, 9)]), Server(5));
        assert_eq!((&*held.epochs(), held.taken()), (&Epochs::from([(2, 9)]), Taken::default()));
        held.become_as(Epochs::from([(2, 10)]), Server(5));
        assert_eq!((&*held.epochs(), held.taken().count), (&Epochs::from([(2, 10)]), 1), "it was away meanwhile");
    }
}
