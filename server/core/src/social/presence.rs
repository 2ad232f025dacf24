//! Presence: who is there, since when not, and what they say about themselves; told to who watches.
//!
//! The shard of a user knows its presence and which shards watch it; a watching shard knows which of its sessions watch
//! whom, and how everyone was last. Changes wait at the user's shard for at most `PRESENCE_INTERVAL_MS` and go out as
//! they are then, one message a shard. All of it is soft: a watching shard asks again for everyone it watches within
//! [`REFRESH_MS`], which renews what the other side forgets after [`LEASE_MS`], and shows what a lost message would
//! have told. Sessions end with their shard; the SDK watches again when it logs in again.
//!
//! Whoever is not visible, or blocks the watcher, looks as if away, never seen and silent.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use ringline_cluster::ownership::PartitionSet;
use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::UserName;
use ringline_schema::limits;
use ringline_schema::message::chat::PresenceRow;
use ringline_schema::message::{ChatReply, Names, Reply};
use ringline_schema::rows::SettingRow;
use smallvec::SmallVec;

use super::settings::Parked;
use super::{Gathered, SocialMessage};
use crate::event::{ConnId, Effects};
use crate::planted::Bug;
use crate::shard::Shard;
use crate::timers::Timer;

/// Everyone watched is asked for again within this.
const REFRESH_MS: u64 = 30_000;
/// A shard that has not asked again for so long is not told any more.
const LEASE_MS: u64 = 3 * REFRESH_MS;
/// Rows of one message, to a shard or to a client.
const ROWS_MAX: usize = 64;
/// The last-seen time of a user is written at most this often; what is younger is lost in a crash.
const LAST_SEEN_MS: u64 = 60_000;

/// How a user is, for a shard that watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub user: UserName,
    pub online: bool,
    /// Unix milliseconds; 0: never, or not told.
    pub last_seen_ms: u64,
    pub status: Arc<str>,
    /// To whom it is not told.
    pub hidden_from: Arc<[UserName]>,
}

impl Seen {
    pub(crate) fn nothing(user: UserName) -> Self {
        Self { user, online: false, last_seen_ms: 0, status: "".into(), hidden_from: [].into() }
    }

    pub(crate) fn as_wire(&self, watcher: &UserName) -> PresenceRow<'_> {
        let user = self.user.as_str();
        if self.hidden_from.binary_search(watcher).is_ok() {
            return PresenceRow { user, online: false, last_seen_ms: 0, status: "" };
        }
        PresenceRow { user, online: self.online, last_seen_ms: self.last_seen_ms, status: &self.status }
    }
}

/// A user that sessions of this shard watch.
#[derive(Debug)]
struct Watched {
    sessions: BTreeSet<ConnId>,
    last: Option<Seen>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    /// At the watching side.
    watched: BTreeMap<UserName, Watched>,
    /// Where the walk of refreshing is.
    refreshed: Option<UserName>,
    /// At the user's side: which shards watch, and until when.
    watchers: BTreeMap<UserName, SmallVec<[(ShardIndex, u64); 2]>>,
    changed: BTreeSet<UserName>,
    /// Where the walk through `watchers` is.
    swept: Option<UserName>,
    armed: bool,
}

impl Presence {
    /// The last that is known here of somebody who was so when he was asked for.
    pub fn newest<'a>(&'a self, seen: &'a Seen) -> &'a Seen {
        self.watched.get(&seen.user).and_then(|watched| watched.last.as_ref()).unwrap_or(seen)
    }
}

impl Shard {
    /// Errors: `TOO_MANY_USERS`, `TOO_MANY_WATCHED` (also when the shard of one of them has as many users that are watched as
    /// it may), `BAD_NAME`, `BUSY`; then nothing was changed.
    pub(crate) fn watch(
        &mut self,
        conn: ConnId,
        request_id: u32,
        users: Names<'_>,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let users = checked(users)?;
        let mut by_shard: BTreeMap<ShardIndex, Vec<UserName>> = BTreeMap::new();
        for user in &users {
            by_shard.entry(self.owner(user.partition())).or_default().push(user.clone());
        }
        if by_shard.keys().any(|shard| !self.is_here(*shard) && self.is_blocked(*shard)) {
            return Err(ErrorCode::Busy);
        }
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        let watching = login.social().map(|social| &social.watching);
        let known = |user: &&UserName| watching.is_some_and(|watching| watching.contains(*user));
        let new: Vec<UserName> = users.iter().filter(|user| !known(user)).cloned().collect();
        if watching.map_or(0, BTreeSet::len) + new.len() > limits::WATCHED_MAX {
            return Err(ErrorCode::TooManyWatched);
        }
        if users.is_empty() {
            let users = Vec::new();
            self.sessions.answer(conn, request_id, &Reply::Chat(ChatReply::PresenceOk { users }), fx);
            return Ok(());
        }
        let watcher = login.user.clone();
        let gathered = Gathered::Presence { watcher, seen: Vec::new(), new };
        let Some(gather) = self.gather((conn, request_id), (users.len(), gathered), fx) else { return Ok(()) };
        if let Some(login) = self.sessions.login_mut(conn) {
            login.social_mut().watching.extend(users.iter().cloned());
        }
        for user in users {
            let watched = self.social.presence.watched.entry(user);
            let watched = watched.or_insert_with(|| Watched { sessions: BTreeSet::new(), last: None });
            watched.sessions.insert(conn);
        }
        self.arm_presence();
        for (shard, users) in by_shard {
            self.ask_presence(shard, users, Some(gather), fx);
        }
        Ok(())
    }

    pub(crate) fn unwatch(
        &mut self,
        conn: ConnId,
        request_id: u32,
        users: Names<'_>,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let users = checked(users)?;
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        let watching = &mut login.social_mut().watching;
        let gone: Vec<_> = users.into_iter().filter(|user| watching.remove(user)).collect();
        if !self.planted.is(Bug::UnwatchForgotten) {
            gone.iter().for_each(|user| self.forget_watch(conn, user));
        }
        self.done(conn, request_id, fx);
        Ok(())
    }

    /// A session ends, or looks away.
    pub(crate) fn forget_watch(&mut self, conn: ConnId, user: &UserName) {
        let Some(watched) = self.social.presence.watched.get_mut(user) else { return };
        watched.sessions.remove(&conn);
        if watched.sessions.is_empty() {
            self.social.presence.watched.remove(user);
        }
    }

    fn ask_presence(&mut self, shard: ShardIndex, users: Vec<UserName>, gather: Option<u64>, fx: &mut Effects) {
        if self.is_here(shard) {
            self.watch_from_peer(shard, users, gather, fx);
        } else {
            self.tell_social(shard, SocialMessage::Watch { users, gather }, fx);
        }
    }

    /// A shard watches users of ours, for the first time or still.
    pub(crate) fn watch_from_peer(
        &mut self,
        asker: ShardIndex,
        users: Vec<UserName>,
        gather: Option<u64>,
        fx: &mut Effects,
    ) {
        let until_us = self.now.mono_us + LEASE_MS * 1_000;
        let watched_users_max = self.config.watched_users_max;
        let (mut rows, mut full) = (Vec::with_capacity(users.len()), false);
        for user in users {
            // As if away: who watches hears of the new owner and asks there.
            if !self.may_write_of(user.partition()) {
                rows.push(Seen::nothing(user));
                continue;
            }
            let watchers = &mut self.social.presence.watchers;
            if watchers.len() < watched_users_max || watchers.contains_key(&user) {
                let shards = watchers.entry(user.clone()).or_default();
                shards.retain(|(shard, _)| *shard != asker);
                shards.push((asker, until_us));
            } else {
                full = true;
            }
            match self.seen(&user) {
                Some(seen) => rows.push(seen),
                None => self.with_settings(&user, Parked::Shown { user: user.clone(), asker, gather }, fx),
            }
        }
        self.arm_presence();
        // Who watched them before there was no room goes on by asking again, as after a lost message.
        if let Some(gather) = gather.filter(|_| full) {
            return match self.is_here(asker) {
                true => self.not_watched(gather, fx),
                false => self.tell_social(asker, SocialMessage::NotWatched { gather }, fx),
            };
        }
        self.show(asker, rows, gather, fx);
    }

    /// How a user of this shard is; `None`: its settings are not in memory.
    fn seen(&mut self, user: &UserName) -> Option<Seen> {
        let settings = self.settings(user)?;
        if !settings.row.visible {
            return Some(Seen::nothing(user.clone()));
        }
        let SettingRow { status, last_seen_ms, .. } = &settings.row;
        let (last_seen_ms, status) = (*last_seen_ms, status.as_str().into());
        let hidden_from = settings.blocked.iter().cloned().collect();
        let online = self.online.contains_key(user);
        Some(Seen { user: user.clone(), online, last_seen_ms, status, hidden_from })
    }

    /// What was asked is in memory, or could not be had: then the next refresh asks again.
    pub(crate) fn show_one(&mut self, user: UserName, asker: ShardIndex, gather: Option<u64>, fx: &mut Effects) {
        let seen = self.seen(&user).unwrap_or_else(|| Seen::nothing(user));
        self.show(asker, vec![seen], gather, fx);
    }

    fn show(&mut self, to: ShardIndex, rows: Vec<Seen>, gather: Option<u64>, fx: &mut Effects) {
        if rows.is_empty() {
            return;
        }
        if self.is_here(to) {
            self.shown(rows, gather, fx);
        } else if gather.is_some() || !self.is_blocked(to) {
            self.tell_social(to, SocialMessage::Seen { rows, gather }, fx);
        }
    }

    /// Another shard tells how users are. Sessions hear of what is new to this shard.
    pub(crate) fn shown(&mut self, rows: Vec<Seen>, gather: Option<u64>, fx: &mut Effects) {
        let asking = gather.and_then(|gather| self.asker_of(gather));
        let mut pushes: BTreeMap<ConnId, Vec<usize>> = BTreeMap::new();
        for (at, row) in rows.iter().enumerate() {
            let Some(watched) = self.social.presence.watched.get_mut(&row.user) else { continue };
            if watched.last.as_ref() == Some(row) {
                continue;
            }
            watched.last = Some(row.clone());
            if !row.online && self.planted.is(Bug::LeaveNotTold) {
                continue;
            }
            for conn in watched.sessions.iter().filter(|&&conn| Some(conn) != asking) {
                pushes.entry(*conn).or_default().push(at);
            }
        }
        for (conn, places) in pushes {
            self.push_presence(conn, places.iter().filter_map(|at| rows.get(*at)).collect(), fx);
        }
        if let Some(gather) = gather {
            self.gathered_presence(gather, rows, fx);
        }
    }

    fn push_presence(&mut self, conn: ConnId, rows: Vec<&Seen>, fx: &mut Effects) {
        let Some(login) = self.sessions.get(conn).and_then(|session| session.login()) else { return };
        let watcher = login.user.clone();
        for rows in rows.chunks(ROWS_MAX) {
            let users = rows.iter().map(|row| row.as_wire(&watcher)).collect();
            if self.sessions.offer(conn, &Reply::Chat(ChatReply::PresenceChanged { users }), fx) {
                continue;
            }
            // A slow reader: the next refresh tells it as news.
            for row in rows {
                if let Some(watched) = self.social.presence.watched.get_mut(&row.user) {
                    watched.last = None;
                }
            }
        }
    }

    /// Something about a user changed that watchers see.
    pub(crate) fn presence_moved(&mut self, user: &UserName) {
        if self.social.presence.watchers.contains_key(user) {
            self.social.presence.changed.insert(user.clone());
            self.arm_presence();
        }
    }

    fn arm_presence(&mut self) {
        if !std::mem::replace(&mut self.social.presence.armed, true) {
            self.timers.arm(self.now.mono_us + limits::PRESENCE_INTERVAL_MS * 1_000, Timer::Presence);
        }
    }

    /// Once an interval while anybody watches or is watched.
    pub(crate) fn presence_due(&mut self, fx: &mut Effects) {
        self.social.presence.armed = false;
        self.tell_changes(fx);
        self.refresh(fx);
        self.sweep_watchers();
        let presence = &self.social.presence;
        if !(presence.watched.is_empty() && presence.watchers.is_empty()) {
            self.arm_presence();
        }
    }

    fn tell_changes(&mut self, fx: &mut Effects) {
        let mut by_shard: BTreeMap<ShardIndex, Vec<Seen>> = BTreeMap::new();
        for user in std::mem::take(&mut self.social.presence.changed) {
            let Some(shards) = self.social.presence.watchers.get(&user).cloned() else { continue };
            match self.seen(&user) {
                Some(seen) => shards.iter().for_each(|(shard, _)| {
                    by_shard.entry(*shard).or_default().push(seen.clone());
                }),
                None => self.with_settings(&user, Parked::Moved(user.clone()), fx),
            }
        }
        for (shard, rows) in by_shard {
            for rows in rows.chunks(ROWS_MAX) {
                self.show(shard, rows.to_vec(), None, fx);
            }
        }
    }

    /// Asks again for the next of those who are watched here.
    fn refresh(&mut self, fx: &mut Effects) {
        let presence = &mut self.social.presence;
        let users = next_of(&presence.watched, &mut presence.refreshed);
        let mut by_shard: BTreeMap<ShardIndex, Vec<UserName>> = BTreeMap::new();
        for user in users {
            by_shard.entry(self.owner(user.partition())).or_default().push(user);
        }
        for (shard, users) in by_shard {
            for users in users.chunks(ROWS_MAX) {
                if self.is_here(shard) || !self.is_blocked(shard) {
                    self.ask_presence(shard, users.to_vec(), None, fx);
                }
            }
        }
    }

    /// Those that sessions of this shard watch, of these partitions.
    pub(crate) fn watched_of(&self, partitions: &PartitionSet) -> Vec<UserName> {
        let watched = self.social.presence.watched.keys();
        watched.filter(|user| partitions.contains(user.partition())).cloned().collect()
    }

    /// Asks a shard how users are that are watched here.
    pub(crate) fn ask_presence_of(&mut self, shard: ShardIndex, users: &[UserName], fx: &mut Effects) {
        for users in users.chunks(ROWS_MAX) {
            self.ask_presence(shard, users.to_vec(), None, fx);
        }
    }

    /// Users of these partitions are another's: who watches them asks there.
    pub(crate) fn forget_watchers_of(&mut self, partitions: &PartitionSet) {
        let presence = &mut self.social.presence;
        presence.watchers.retain(|user, _| !partitions.contains(user.partition()));
        presence.changed.retain(|user| !partitions.contains(user.partition()));
    }

    /// Forgets shards that have not asked for a while, some users at a time.
    fn sweep_watchers(&mut self) {
        let now_us = self.now.mono_us;
        let presence = &mut self.social.presence;
        for user in next_of(&presence.watchers, &mut presence.swept) {
            let Some(shards) = presence.watchers.get_mut(&user) else { continue };
            shards.retain(|(_, until_us)| now_us < *until_us);
            if shards.is_empty() {
                presence.watchers.remove(&user);
            }
        }
    }

    /// The first device of a user is there.
    pub(crate) fn arrived(&mut self, user: &UserName, fx: &mut Effects) {
        self.presence_moved(user);
        self.settings_arrived(user);
        self.with_settings(user, Parked::Arrived(user.clone()), fx);
    }

    /// The last device of a user is gone.
    pub(crate) fn left(&mut self, user: &UserName, fx: &mut Effects) {
        self.presence_moved(user);
        let known = self.has_settings(user);
        if known || !self.draining {
            self.with_settings(user, Parked::Left(user.clone(), self.now.unix_ms), fx);
        }
    }

    /// Who is not visible, or of whom that is not known yet, is not on the list of who is online.
    pub(crate) fn list_if_visible(&mut self, user: &UserName) {
        let visible = self.settings(user).is_some_and(|settings| settings.row.visible);
        self.online.list(user, visible);
    }

    /// Notes when a user was last there. In memory at once; on disk now and then.
    pub(crate) fn note_last_seen(&mut self, user: &UserName, unix_ms: u64, fx: &mut Effects) {
        if !self.may_write_of(user.partition()) {
            return;
        }
        let writable = !self.poisoned && self.may_append() != Err(ErrorCode::Busy);
        let Some(settings) = self.settings_mut(user).filter(|settings| settings.row.deleted_ms == 0) else { return };
        settings.row.last_seen_ms = settings.row.last_seen_ms.max(unix_ms);
        let due = unix_ms >= settings.last_seen_written_ms.saturating_add(LAST_SEEN_MS);
        if due && writable {
            self.write_last_seen(user, fx);
        }
        self.presence_moved(user);
    }
}

/// The next users of a walk that comes to all within [`REFRESH_MS`], a part of them each interval; `place` is where it is.
fn next_of<V>(all: &BTreeMap<UserName, V>, place: &mut Option<UserName>) -> Vec<UserName> {
    let count = all.len().div_ceil((REFRESH_MS / limits::PRESENCE_INTERVAL_MS) as usize).max(1);
    let start = place.as_ref().map_or(Unbounded, Excluded);
    let users: Vec<_> =
        all.range::<UserName, _>((start, Unbounded)).take(count).map(|(user, _)| user.clone()).collect();
    *place = if users.len() < count { None } else { users.last().cloned() };
    users
}

/// Each name once.
fn checked(users: Names<'_>) -> Result<BTreeSet<UserName>, ErrorCode> {
    if users.len() > limits::USERS_PER_REQUEST_MAX {
        return Err(ErrorCode::TooManyUsers);
    }
    users.iter().map(UserName::of_user).collect()
}
