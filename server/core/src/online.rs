//! Users with devices at this shard: their connections, the list of them, and what they have set.
//!
//! Owned by the shard. Most users of a server are idle and have set nothing, so what is kept of one is one small block:
//! the table holds pointers to them and no names of its own, and settings that say nothing special are two numbers
//! ([`Held::Plain`]). Invariants: a user is here as long as it has a device; its settings are here or, when it is away,
//! in the cache of [`crate::social`], never in both; who is on the list is here.

use std::collections::BTreeSet;
use std::collections::btree_set::Range;
use std::hash::{BuildHasher, Hasher};
use std::ops::Bound::{Excluded, Unbounded};

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use ringline_schema::ids::UserName;
use smallvec::SmallVec;

use crate::event::ConnId;
use crate::social::settings::Settings;

/// The connections of one user in order of login: nearly always one, which then lies in place.
pub(crate) type Devices = SmallVec<[ConnId; 2]>;

/// What a user that is here has set.
#[derive(Debug, Default)]
pub(crate) enum Held {
    /// Not in memory yet.
    #[default]
    NotLoaded,
    /// Nothing but the defaults, nobody blocked, all of it on disk.
    Plain {
        stamp: u32,
        last_seen_ms: u64,
    },
    Full(Box<Settings>),
}

impl Held {
    /// The smallest form that says the same.
    pub(crate) fn new(settings: Settings) -> Self {
        match settings.plain() {
            Some((stamp, last_seen_ms)) => Self::Plain { stamp, last_seen_ms },
            None => Self::Full(Box::new(settings)),
        }
    }

    pub(crate) fn is_loaded(&self) -> bool {
        !matches!(self, Self::NotLoaded)
    }

    pub(crate) fn into_settings(self) -> Option<Settings> {
        match self {
            Self::NotLoaded => None,
            Self::Plain { stamp, last_seen_ms } => Some(Settings::of_plain(stamp, last_seen_ms)),
            Self::Full(settings) => Some(*settings),
        }
    }

    /// To change them; [`Held::settle`] makes them small again.
    pub(crate) fn open(&mut self) -> Option<&mut Settings> {
        if let Self::Plain { stamp, last_seen_ms } = *self {
            *self = Self::Full(Box::new(Settings::of_plain(stamp, last_seen_ms)));
        }
        match self {
            Self::Full(settings) => Some(settings),
            Self::NotLoaded | Self::Plain { .. } => None,
        }
    }

    pub(crate) fn settle(&mut self) {
        if let Self::Full(settings) = self
            && let Some((stamp, last_seen_ms)) = settings.plain()
        {
            *self = Self::Plain { stamp, last_seen_ms };
        }
    }
}

#[derive(Debug)]
struct Person {
    user: UserName,
    devices: Devices,
    settings: Held,
}

/// See the module.
pub(crate) struct Online {
    table: HashTable<Box<Person>>,
    hasher: FixedState,
    /// Those of them that others may see.
    listed: BTreeSet<UserName>,
    devices: usize,
}

impl Online {
    pub(crate) fn new(hasher: &FixedState) -> Self {
        Self { table: HashTable::new(), hasher: hasher.clone(), listed: BTreeSet::new(), devices: 0 }
    }

    /// Users.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Devices of all users together.
    pub(crate) fn devices(&self) -> usize {
        self.devices
    }

    /// In no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&UserName, &Devices)> {
        self.table.iter().map(|person| (&person.user, &person.devices))
    }

    pub(crate) fn contains_key(&self, user: &UserName) -> bool {
        self.person(user).is_some()
    }

    pub(crate) fn get(&self, user: &UserName) -> Option<&Devices> {
        self.person(user).map(|person| &person.devices)
    }

    /// What a user that is here has set, and its devices.
    pub(crate) fn reach(&self, user: &UserName) -> Option<(&Held, &Devices)> {
        self.person(user).map(|person| (&person.settings, &person.devices))
    }

    /// What a user that is here has set.
    pub(crate) fn settings(&self, user: &UserName) -> Option<&Held> {
        self.person(user).map(|person| &person.settings)
    }

    /// The device of the user with this name, where there is just one and everybody may write to it. Bytes that are no
    /// name are nobody's.
    #[inline]
    pub(crate) fn plain_device(&self, name: &[u8]) -> Option<ConnId> {
        let person = self.find(name).filter(|person| matches!(person.settings, Held::Plain { .. }))?;
        match person.devices[..] {
            [conn] => Some(conn),
            _ => None,
        }
    }

    pub(crate) fn settings_mut(&mut self, user: &UserName) -> Option<&mut Held> {
        let hash = hash_of(&self.hasher, user.as_str().as_bytes());
        self.table.find_mut(hash, |person| person.user == *user).map(|person| &mut person.settings)
    }

    /// A device has logged in. True: it is the first of its user, who is listed once it is known that others may see it.
    pub(crate) fn add(&mut self, user: &UserName, conn: ConnId) -> bool {
        self.devices += 1;
        let hash = hash_of(&self.hasher, user.as_str().as_bytes());
        if let Some(person) = self.table.find_mut(hash, |person| person.user == *user) {
            person.devices.push(conn);
            return false;
        }
        let person = Person { user: user.clone(), devices: Devices::from_slice(&[conn]), settings: Held::NotLoaded };
        self.table
            .insert_unique(hash, Box::new(person), |person| hash_of(&self.hasher, person.user.as_str().as_bytes()));
        true
    }

    /// A device is gone. `Some`: it was the last of its user, who had set this.
    pub(crate) fn remove(&mut self, user: &UserName, conn: ConnId) -> Option<Held> {
        let hash = hash_of(&self.hasher, user.as_str().as_bytes());
        let mut found = self.table.find_entry(hash, |person| person.user == *user).ok()?;
        let devices = &mut found.get_mut().devices;
        let before = devices.len();
        devices.retain(|other| *other != conn);
        self.devices -= before - devices.len();
        if !devices.is_empty() {
            return None;
        }
        self.listed.remove(user);
        Some(found.remove().0.settings)
    }

    /// Puts a user on the list, or takes it off. Who is not here is never on it.
    pub(crate) fn list(&mut self, user: &UserName, visible: bool) {
        if visible && self.contains_key(user) {
            self.listed.insert(user.clone());
        } else {
            self.listed.remove(user);
        }
    }

    /// Those on the list whose names come after this one, in order.
    pub(crate) fn listed_after(&self, after: Option<&UserName>) -> Range<'_, UserName> {
        self.listed.range::<UserName, _>((after.map_or(Unbounded, Excluded), Unbounded))
    }

    fn person(&self, user: &UserName) -> Option<&Person> {
        self.find(user.as_str().as_bytes())
    }

    #[inline]
    fn find(&self, name: &[u8]) -> Option<&Person> {
        let hash = hash_of(&self.hasher, name);
        self.table.find(hash, |person| person.user.as_str().as_bytes() == name).map(|person| &**person)
    }
}

/// Of the bytes alone: nothing else is hashed with them, so no end mark is needed.
#[inline]
fn hash_of(hasher: &FixedState, name: &[u8]) -> u64 {
    let mut hasher = hasher.build_hasher();
    hasher.write(name);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    fn conn(slot: u32) -> ConnId {
        ConnId { slot, generation: 1 }
    }

    #[test]
    fn a_user_is_here_as_long_as_a_device_is() {
        let mut online = Online::new(&FixedState::with_seed(7));
        let (ann, bob) = (name("ann"), name("bob"));
        assert!(online.add(&bob, conn(1)) && online.add(&ann, conn(2)) && !online.add(&ann, conn(3)));
        assert_eq!((online.len(), online.devices()), (2, 3));
        assert_eq!(online.get(&ann).map(|devices| devices.to_vec()), Some(vec![conn(2), conn(3)]));
        assert_eq!(online.listed_after(None).count(), 0, "not before it is known that they may be seen");
        online.list(&bob, true);
        online.list(&ann, true);
        assert_eq!(online.listed_after(None).collect::<Vec<_>>(), [&ann, &bob]);
        online.list(&ann, false);
        assert_eq!(online.listed_after(None).collect::<Vec<_>>(), [&bob], "who is not seen is here all the same");
        assert!(online.remove(&ann, conn(2)).is_none() && online.remove(&ann, conn(9)).is_none());
        assert!(online.remove(&ann, conn(3)).is_some_and(|held| !held.is_loaded()));
        online.list(&ann, true);
        assert_eq!((online.len(), online.devices(), online.contains_key(&ann)), (1, 1, false));
        assert_eq!(online.listed_after(Some(&ann)).collect::<Vec<_>>(), [&bob]);
        assert_eq!(online.listed_after(Some(&bob)).count(), 0);
    }

    #[test]
    fn plain_settings_are_two_numbers_and_come_back_as_they_were() {
        let held = Held::new(Settings::of_plain(3, 77));
        assert!(matches!(held, Held::Plain { stamp: 3, last_seen_ms: 77 }));
        let settings = held.into_settings().unwrap();
        assert_eq!((settings.stamp, settings.row.last_seen_ms, settings.last_seen_written_ms), (3, 77, 77));
        let mut held = Held::Plain { stamp: 3, last_seen_ms: 77 };
        held.open().unwrap().row.status = "away".to_owned();
        held.settle();
        assert!(matches!(&held, Held::Full(settings) if settings.row.status == "away"), "that is not plain");
        held.open().unwrap().row.status.clear();
        held.settle();
        assert!(matches!(held, Held::Plain { .. }));
        let mut blocking = Settings::of_plain(3, 77);
        blocking.blocked.insert(name("bob"));
        assert!(matches!(Held::new(blocking), Held::Full(_)));
        let mut beyond = Settings::of_plain(0, 0);
        beyond.stamp = u64::MAX;
        assert_eq!(Held::new(beyond).into_settings().map(|settings| settings.stamp), Some(u64::MAX));
        assert!(Held::NotLoaded.open().is_none());
    }

    #[test]
    fn what_is_kept_of_an_idle_user_is_small() {
        // Raise these only with a look at "Cost of a connection" in tuning.md.
        assert_eq!(size_of::<Held>(), 16);
        assert!(size_of::<Person>() <= 64, "{}", size_of::<Person>());
    }
}
