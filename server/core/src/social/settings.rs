//! Who may write to whom: block lists and privacy, kept with the user who set them.
//!
//! The owner of a user's partition writes its settings and is the one that decides. Transient messages and signals are
//! decided when they reach it. A durable one is decided by the owner of its conversation, which asks here and keeps the
//! answer for [`PERMIT_MS`] at most: when somebody blocks, the owner of that one conversation is told; when somebody
//! changes who may write, every shard is. BLOCK, UNBLOCK and PRIVACY are answered after those shards have heard of it,
//! so nothing that was refused before DONE is accepted after it. If such news is lost, the answer runs out by itself.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};

use ringline_cluster::ownership::PartitionSet;
use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::MessagesFrom;
use ringline_schema::message::{ChatReply, Reply};
use ringline_schema::record::{Answer, Change, Query, Record, User};
use ringline_schema::rows::{Row, RowKey, RowList, RowValue, SettingRow};

use super::signal::SignalSend;
use super::{News, SocialPending, SocialQuestion};
use crate::config::WAITERS_PER_LOAD_MAX;
use crate::conversation::{Pending, PendingWork};
use crate::deletion::{DeleteAsk, deleted_row};
use crate::event::{ConnId, Effects};
use crate::online::{Devices, Held};
use crate::peer::{Ask, Submit, TransientSend};
use crate::planted::Bug;
use crate::shard::Shard;

/// How long the owner of a conversation goes by an answer that somebody may write in it.
pub(crate) const PERMIT_MS: u64 = 30_000;
/// The same for a refusal.
pub(crate) const REFUSAL_MS: u64 = 1_000;
/// Users of whom one user's settings remember that it has written to them.
const KNOWN_CACHED_MAX: usize = 256;
/// Names on cached block lists, per shard; above it settings leave the cache early.
const BLOCKED_NAMES_CACHED_MAX: usize = 262_144;
/// How many cached settings are looked at to find some that may go.
const EVICTION_LOOKS_MAX: usize = 8;
/// Users whose changes of privacy are remembered one by one; above it all permits are asked for again.
const PRIVACY_CHANGES_MAX: usize = 4_096;

/// What one user has set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub row: SettingRow,
    /// Counts the changes of the row and of the block list.
    pub stamp: u64,
    pub blocked: BTreeSet<UserName>,
    /// Some of those that this user has written to.
    known: BTreeSet<UserName>,
    /// Changes that are not on disk yet.
    writes: u32,
    /// Questions to the store whether this user has written to somebody.
    asking: u32,
    /// What the disk has of `row.last_seen_ms`.
    pub last_seen_written_ms: u64,
}

impl Settings {
    /// Stamp and last-seen time, if all else is as by default and on disk.
    pub(crate) fn plain(&self) -> Option<(u32, u64)> {
        let Self { row, stamp, blocked, known, writes, asking, last_seen_written_ms } = self;
        let last_seen_ms = row.last_seen_ms;
        let default = *row == SettingRow { last_seen_ms, ..SettingRow::default() };
        let idle = *writes == 0 && *asking == 0;
        let empty = blocked.is_empty() && known.is_empty() && idle && *last_seen_written_ms == last_seen_ms;
        u32::try_from(*stamp).ok().filter(|_| default && empty).map(|stamp| (stamp, last_seen_ms))
    }

    pub(crate) fn of_plain(stamp: u32, last_seen_ms: u64) -> Self {
        let row = SettingRow { last_seen_ms, ..SettingRow::default() };
        Self { row, stamp: u64::from(stamp), last_seen_written_ms: last_seen_ms, ..Self::default() }
    }

    /// Leaves nothing but that the user was deleted then. The stamp of the row that says so, and how many names leave the
    /// block list.
    pub(crate) fn delete(&mut self, now_ms: u64) -> (u64, usize) {
        let blocked = std::mem::take(&mut self.blocked).len();
        self.known.clear();
        self.row = deleted_row(now_ms);
        self.last_seen_written_ms = 0;
        self.stamp += 1;
        self.writes += 1;
        (self.stamp, blocked)
    }

    /// The user deletes a message for itself alone, for the first time. The row that says so, and its stamp.
    pub(crate) fn begin_hiding(&mut self) -> (u64, SettingRow) {
        self.row.hides = true;
        self.stamp += 1;
        self.writes += 1;
        self.last_seen_written_ms = self.row.last_seen_ms;
        (self.stamp, self.row.clone())
    }

    /// What somebody without a device is to who sends what is not stored.
    fn when_away(&self) -> ErrorCode {
        if self.row.deleted_ms == 0 { ErrorCode::NotOnline } else { ErrorCode::UserDeleted }
    }

    /// Whether `from` may write to this user.
    fn opinion(&self, from: &UserName) -> Opinion {
        if self.row.deleted_ms != 0 {
            return Opinion::Decided(Err(ErrorCode::UserDeleted));
        }
        if self.blocked.contains(from) {
            return Opinion::Decided(Err(ErrorCode::Blocked));
        }
        match self.row.messages_from {
            MessagesFrom::Anyone => Opinion::Decided(Ok(())),
            MessagesFrom::Known if self.known.contains(from) => Opinion::Decided(Ok(())),
            MessagesFrom::Known => Opinion::IfKnown,
            MessagesFrom::Nobody => Opinion::Decided(Err(ErrorCode::NotAccepted)),
        }
    }
}

/// Settings on their way from the store.
#[derive(Debug, Default)]
pub(crate) struct Loading {
    row: Option<(SettingRow, u64)>,
    blocked: Option<BTreeSet<UserName>>,
    waiting: VecDeque<Parked>,
}

/// What waits for somebody's settings.
#[derive(Clone, Debug)]
pub(crate) enum Parked {
    /// The owner of a conversation asks.
    Ask(ShardIndex, Box<Ask>),
    Transient(Box<TransientSend>),
    Signal(Box<SignalSend>),
    /// A request of the user.
    Own {
        conn: ConnId,
        request_id: u32,
        own: Own,
    },
    /// A shard watches the user.
    Shown {
        user: UserName,
        asker: ShardIndex,
        gather: Option<u64>,
    },
    /// Who watches the user is to be told of a change.
    Moved(UserName),
    /// The first device of the user has come.
    Arrived(UserName),
    /// The last went, at that Unix millisecond.
    Left(UserName, u64),
    /// A REGISTER or LOGIN of that connection is about this user.
    Attempt(ConnId, Box<User>),
    /// An act of a group names the user.
    Visit(Box<Submit>),
    /// The user is to be deleted.
    Delete(Box<DeleteAsk>),
}

/// A user's request about its own settings.
#[derive(Clone, Debug)]
pub(crate) enum Own {
    Block(UserName),
    Unblock(UserName),
    Blocks { after: Option<UserName>, limit: u16 },
    Privacy(Option<MessagesFrom>),
    Presence { status: Option<String>, visible: Option<bool> },
}

/// Whether somebody may write to a user.
enum Opinion {
    Decided(Result<(), ErrorCode>),
    /// Only if the user has written to them.
    IfKnown,
    /// The settings are not in memory.
    NotLoaded,
}

impl Opinion {
    fn of(held: &Held, from: &UserName) -> Self {
        match held {
            Held::NotLoaded => Self::NotLoaded,
            Held::Plain { .. } => Self::Decided(Ok(())),
            Held::Full(settings) => settings.opinion(from),
        }
    }
}

/// When users of any shard changed who may write to them, as far as a permit may be older.
#[derive(Debug, Default)]
pub(crate) struct PrivacyChanges {
    changed_us: HashMap<UserName, u64>,
    all_us: Option<u64>,
}

impl PrivacyChanges {
    pub(crate) fn note(&mut self, user: UserName, now_us: u64) {
        if self.changed_us.len() >= PRIVACY_CHANGES_MAX {
            self.changed_us.retain(|_, at_us| now_us < *at_us + PERMIT_MS * 1_000);
        }
        if self.changed_us.len() >= PRIVACY_CHANGES_MAX {
            self.changed_us.clear();
            self.all_us = Some(now_us);
        }
        self.changed_us.insert(user, now_us);
    }

    /// Whether an answer of that moment about writing to `user` still counts.
    pub(crate) fn is_newer(&self, user: &UserName, since_us: u64) -> bool {
        let after = |at_us: Option<&u64>| at_us.is_none_or(|at_us| since_us > *at_us);
        after(self.all_us.as_ref()) && (self.changed_us.is_empty() || after(self.changed_us.get(user)))
    }
}

impl Shard {
    /// Goes on with something once the user's settings are in memory.
    pub(crate) fn with_settings(&mut self, user: &UserName, parked: Parked, fx: &mut Effects) {
        if self.has_settings(user) {
            return self.resume(user, parked, fx);
        }
        if let Some(loading) = self.social.loading.get_mut(user) {
            if loading.waiting.len() >= WAITERS_PER_LOAD_MAX {
                return self.finish(parked, Err(ErrorCode::Busy), fx);
            }
            return loading.waiting.push_back(parked);
        }
        if !self.may_load() {
            return self.finish(parked, Err(ErrorCode::Busy), fx);
        }
        let loading = Loading { waiting: VecDeque::from([parked]), ..Loading::default() };
        self.social.loading.insert(user.clone(), loading);
        let (list, limit) = (RowList::Blocks(user.clone()), limits::BLOCKS_MAX as u16);
        self.social_ask(SocialQuestion::Setting(user.clone()), Query::Row { key: RowKey::Setting(user.clone()) }, fx);
        self.social_ask(SocialQuestion::Blocks(user.clone()), Query::Rows { list, after: None, limit }, fx);
    }

    pub(crate) fn setting_loaded(&mut self, user: &UserName, answer: Answer, fx: &mut Effects) {
        let row = match answer {
            Answer::Row(None) => Some((SettingRow::default(), 0)),
            Answer::Row(Some(Row { value: Some(RowValue::Setting(row)), stamp, .. })) => Some((row, stamp)),
            _ => None,
        };
        let Some(row) = row else { return self.settings_failed(user, fx) };
        if let Some(loading) = self.social.loading.get_mut(user) {
            loading.row = Some(row);
        }
        self.settings_loaded(user, fx);
    }

    pub(crate) fn blocks_loaded(&mut self, user: &UserName, answer: Answer, fx: &mut Effects) {
        let Answer::Rows(rows) = answer else { return self.settings_failed(user, fx) };
        let name = |row: Row| match row.key {
            RowKey::Block(_, other) => Some(other),
            _ => None,
        };
        if let Some(loading) = self.social.loading.get_mut(user) {
            loading.blocked = Some(rows.into_iter().filter_map(name).collect());
        }
        self.settings_loaded(user, fx);
    }

    /// Users of these partitions are another's: who waits for their settings is told so. What is on its way to the disk stays.
    pub(crate) fn let_settings_go(&mut self, gone: &PartitionSet, fx: &mut Effects) {
        let loading = self.social.loading.keys().filter(|user| gone.contains(user.partition())).cloned();
        let mut loading: Vec<_> = loading.collect();
        // The table has no order of its own; replays must agree.
        loading.sort_unstable();
        for user in loading {
            let waiting = self.social.loading.remove(&user).map(|loading| loading.waiting);
            for parked in waiting.into_iter().flatten() {
                self.finish(parked, Err(ErrorCode::Unavailable), fx);
            }
        }
        self.forget_settings(gone, false);
    }

    /// Forgets cached settings; those with something on its way to the disk only if `written` says that all of it is there.
    pub(crate) fn forget_settings(&mut self, gone: &PartitionSet, written: bool) {
        let cached = self.social.settings.iter();
        let goes =
            |user: &UserName, settings: &Settings| gone.contains(user.partition()) && (written || settings.writes == 0);
        let users: Vec<_> = cached.filter(|(user, kept)| goes(user, kept)).map(|(user, _)| user.clone()).collect();
        for user in users {
            let blocked = self.social.settings.pop(&user).map_or(0, |settings| settings.blocked.len());
            self.social.blocked_names = self.social.blocked_names.saturating_sub(blocked);
        }
    }

    fn settings_failed(&mut self, user: &UserName, fx: &mut Effects) {
        let Some(loading) = self.social.loading.remove(user) else { return };
        for parked in loading.waiting {
            self.finish(parked, Err(ErrorCode::Internal), fx);
        }
    }

    /// Both halves may have come.
    fn settings_loaded(&mut self, user: &UserName, fx: &mut Effects) {
        let complete = |loading: &Loading| loading.row.is_some() && loading.blocked.is_some();
        if !self.social.loading.get(user).is_some_and(complete) {
            return;
        }
        let Some(Loading { row, blocked, waiting }) = self.social.loading.remove(user) else { return };
        let ((row, stamp), blocked) = (row.unwrap_or_default(), blocked.unwrap_or_default());
        self.social.blocked_names += blocked.len();
        let last_seen_written_ms = row.last_seen_ms;
        let settings = Settings { row, stamp, blocked, last_seen_written_ms, ..Settings::default() };
        self.keep_settings(user, settings);
        for parked in waiting {
            self.with_settings(user, parked, fx);
        }
        self.evict_settings();
    }

    /// Settings in memory, wherever they are.
    pub(crate) fn settings(&self, user: &UserName) -> Option<Cow<'_, Settings>> {
        match self.online.settings(user) {
            Some(Held::Full(settings)) => Some(Cow::Borrowed(settings)),
            Some(Held::Plain { stamp, last_seen_ms }) => Some(Cow::Owned(Settings::of_plain(*stamp, *last_seen_ms))),
            Some(Held::NotLoaded) => None,
            None => self.social.settings.peek(user).map(Cow::Borrowed),
        }
    }

    /// The same, to change them.
    pub(crate) fn settings_mut(&mut self, user: &UserName) -> Option<&mut Settings> {
        match self.online.settings_mut(user) {
            Some(held) => held.open(),
            None => self.social.settings.get_mut(user),
        }
    }

    pub(crate) fn has_settings(&mut self, user: &UserName) -> bool {
        match self.online.settings(user) {
            Some(held) => held.is_loaded(),
            None => self.social.settings.get(user).is_some(),
        }
    }

    fn keep_settings(&mut self, user: &UserName, settings: Settings) {
        match self.online.settings_mut(user) {
            Some(held) => *held = Held::new(settings),
            None => {
                self.social.settings.put(user.clone(), settings);
            }
        }
    }

    /// A user is here now: what is cached of it moves.
    pub(crate) fn settings_arrived(&mut self, user: &UserName) {
        if let Some(settings) = self.social.settings.pop(user) {
            self.keep_settings(user, settings);
        }
    }

    /// A user is not here any more.
    pub(crate) fn settings_left(&mut self, user: &UserName, held: Held) {
        if let Some(settings) = held.into_settings() {
            self.social.settings.put(user.clone(), settings);
            self.evict_settings();
        }
    }

    fn evict_settings(&mut self) {
        let mut looks = 0;
        while looks < EVICTION_LOOKS_MAX
            && (self.social.settings.len() > self.config.users_cached_max.max(1)
                || self.social.blocked_names > BLOCKED_NAMES_CACHED_MAX)
        {
            looks += 1;
            let Some((user, settings)) = self.social.settings.pop_lru() else { return };
            if settings.writes == 0 {
                self.social.blocked_names = self.social.blocked_names.saturating_sub(settings.blocked.len());
            } else {
                self.social.settings.put(user, settings);
            }
        }
    }

    /// The devices of a user of this shard, if a transient message or a signal may reach them now; `None`: that takes a
    /// look into the store, by [`Shard::with_settings`].
    pub(crate) fn reach_now(&self, user: &UserName, from: &UserName) -> Option<Result<&Devices, ErrorCode>> {
        let Some((held, devices)) = self.online.reach(user) else {
            // Only the settings tell who is away from who is gone for ever.
            let away = |settings: &Settings| Err(settings.when_away());
            return self.social.settings.peek(user).map(away);
        };
        if user == from {
            return Some(Ok(devices));
        }
        match Opinion::of(held, from) {
            Opinion::Decided(Ok(())) if self.awaits_store(user, from) => None,
            Opinion::Decided(result) => Some(result.map(|()| devices)),
            Opinion::IfKnown | Opinion::NotLoaded => None,
        }
    }

    /// Whether something of `from` to `user` waits for the store: what comes later must not come before it.
    fn awaits_store(&self, user: &UserName, from: &UserName) -> bool {
        let asked = &self.social.wrote_asked;
        !asked.is_empty() && asked.contains_key(&(user.clone(), from.clone()))
    }

    fn opinion(&mut self, user: &UserName, from: &UserName) -> Opinion {
        let opinion = match self.online.settings(user) {
            Some(held) => Opinion::of(held, from),
            None => self.social.settings.get(user).map_or(Opinion::NotLoaded, |settings| settings.opinion(from)),
        };
        match opinion {
            Opinion::Decided(Err(ErrorCode::UserDeleted)) if self.planted.is(Bug::DeletedGetMail) => {
                Opinion::Decided(Ok(()))
            }
            opinion => opinion,
        }
    }

    /// The settings are in memory.
    fn resume(&mut self, user: &UserName, parked: Parked, fx: &mut Effects) {
        let (from, answered) = match &parked {
            Parked::Ask(_, ask) => (ask.from.clone(), ask.answered),
            Parked::Transient(_) | Parked::Signal(_) if !self.online.contains_key(user) => {
                let code = self.settings(user).map_or(ErrorCode::Internal, |settings| settings.when_away());
                return self.finish(parked, Err(code), fx);
            }
            Parked::Transient(send) => (send.from.clone(), false),
            Parked::Signal(signal) => (signal.from.clone(), false),
            Parked::Own { .. }
            | Parked::Shown { .. }
            | Parked::Moved(_)
            | Parked::Arrived(_)
            | Parked::Left(..)
            | Parked::Attempt(..)
            | Parked::Visit(_)
            | Parked::Delete(_) => return self.finish(parked, Ok(()), fx),
        };
        let passes = matches!(parked, Parked::Transient(_) | Parked::Signal(_));
        if let (true, Some(behind)) = (passes, self.social.wrote_asked.get_mut(&(user.clone(), from.clone()))) {
            if behind.len() >= WAITERS_PER_LOAD_MAX {
                return self.finish(parked, Err(ErrorCode::Busy), fx);
            }
            return behind.push_back(parked);
        }
        match self.opinion(user, &from) {
            Opinion::Decided(result) => self.finish(parked, result, fx),
            Opinion::IfKnown if answered => self.finish(parked, Ok(()), fx),
            Opinion::IfKnown if self.may_load() => {
                if passes {
                    self.social.wrote_asked.insert((user.clone(), from.clone()), VecDeque::new());
                    if let Some(settings) = self.settings_mut(user) {
                        settings.asking += 1;
                    }
                }
                let key = RowKey::Wrote(ConversationId::direct(user, &from), user.clone());
                let question = SocialQuestion::Wrote { user: user.clone(), from, parked: Box::new(parked) };
                self.social_ask(question, Query::Row { key }, fx);
            }
            Opinion::IfKnown => self.finish(parked, Err(ErrorCode::Busy), fx),
            Opinion::NotLoaded => self.finish(parked, Err(ErrorCode::Internal), fx),
        }
    }

    /// Whether the user has written to somebody, in a setting where that counts.
    pub(crate) fn wrote_loaded(
        &mut self,
        (user, from): (&UserName, UserName),
        parked: Parked,
        answer: Answer,
        fx: &mut Effects,
    ) {
        let result = match answer {
            Answer::Row(Some(_)) => Ok(()),
            Answer::Row(None) => Err(ErrorCode::NotAccepted),
            _ => Err(ErrorCode::Internal),
        };
        if result.is_ok()
            && let Some(settings) = self.settings_mut(user)
        {
            if settings.known.len() >= KNOWN_CACHED_MAX {
                settings.known.clear();
            }
            settings.known.insert(from.clone());
        }
        // The user may have changed its mind while the store was asked.
        let result = match self.opinion(user, &from) {
            Opinion::Decided(decided) => decided,
            Opinion::IfKnown | Opinion::NotLoaded => result,
        };
        self.wrote_answered((user, from), parked, result, fx);
    }

    /// The end of such a question, for what has asked and all that has waited behind it.
    pub(crate) fn wrote_answered(
        &mut self,
        (user, from): (&UserName, UserName),
        parked: Parked,
        result: Result<(), ErrorCode>,
        fx: &mut Effects,
    ) {
        let passes = matches!(parked, Parked::Transient(_) | Parked::Signal(_));
        self.finish(parked, result, fx);
        if !passes {
            return;
        }
        for parked in self.social.wrote_asked.remove(&(user.clone(), from)).into_iter().flatten() {
            self.finish(parked, result, fx);
        }
        if let Some(settings) = self.settings_mut(user) {
            settings.asking = settings.asking.saturating_sub(1);
        }
        if let Some(held) = self.online.settings_mut(user) {
            held.settle();
        }
    }

    /// The end of a wait: what may happen happens, what may not is answered.
    pub(crate) fn finish(&mut self, parked: Parked, result: Result<(), ErrorCode>, fx: &mut Effects) {
        match (parked, result) {
            (Parked::Ask(asker, ask), result) => self.tell_user_known(asker, &ask, result, fx),
            (Parked::Transient(send), Ok(())) => self.give_transient(&send, fx),
            (Parked::Transient(send), Err(code)) => self.answer_send(send.origin, (false, Err(code)), None, fx),
            (Parked::Signal(signal), Ok(())) => self.give_signal(&signal, fx),
            (Parked::Signal(signal), Err(code)) => self.refuse_signal(&signal, code, fx),
            (Parked::Shown { user, asker, gather }, _) => self.show_one(user, asker, gather, fx),
            (Parked::Moved(user), Ok(())) => self.presence_moved(&user),
            (Parked::Arrived(user), Ok(())) => {
                self.list_if_visible(&user);
                self.tell_hides(&user);
            }
            (Parked::Left(user, unix_ms), Ok(())) => self.note_last_seen(&user, unix_ms, fx),
            // What is not known now is asked for again by who watches.
            (Parked::Moved(_) | Parked::Arrived(_) | Parked::Left(..), Err(_)) => {}
            (Parked::Attempt(conn, user), result) => self.attempt_settings(conn, *user, result, fx),
            (Parked::Visit(submit), Ok(())) => self.visit(*submit, fx),
            (Parked::Visit(submit), Err(code)) => self.refuse(submit.origin, code, fx),
            (Parked::Delete(ask), result) => self.delete_or_refuse(ask, result, fx),
            (Parked::Own { conn, request_id, own }, result) => {
                if let Err(code) = result.and_then(|()| self.own_request(conn, request_id, own, fx)) {
                    self.sessions.fail(conn, request_id, code, fx);
                }
            }
        }
    }

    fn own_request(&mut self, conn: ConnId, request_id: u32, own: Own, fx: &mut Effects) -> Result<(), ErrorCode> {
        let login = self.sessions.get(conn).and_then(|session| session.login()).ok_or(ErrorCode::NotLoggedIn)?;
        let user = login.user.clone();
        // A device of the user deletes it at this moment.
        if self.is_deleted(&user) {
            return Err(ErrorCode::UserDeleted);
        }
        match own {
            Own::Blocks { after, limit } => self.list_blocks((conn, request_id), &user, (after, limit), fx),
            Own::Block(other) => self.set_block((conn, request_id), user, (other, true), fx),
            Own::Unblock(other) => self.set_block((conn, request_id), user, (other, false), fx),
            Own::Presence { status, visible } => {
                let settings = self.settings(&user).ok_or(ErrorCode::Internal)?;
                let mut row = settings.row.clone();
                row.status = status.unwrap_or(row.status);
                row.visible = visible.unwrap_or(row.visible);
                let pending = SocialPending { conn, request_id, user: user.clone(), news: News::Presence };
                self.write_settings(pending, row, None, fx)?;
                self.list_if_visible(&user);
                Ok(())
            }
            Own::Privacy(messages_from) => {
                let settings = self.settings(&user).ok_or(ErrorCode::Internal)?;
                let wanted = messages_from.unwrap_or(settings.row.messages_from);
                let row = SettingRow { messages_from: wanted, ..settings.row.clone() };
                let news = News::Privacy;
                self.write_settings(SocialPending { conn, request_id, user, news }, row, None, fx)
            }
        }
    }

    fn list_blocks(
        &mut self,
        (conn, request_id): (ConnId, u32),
        user: &UserName,
        (after, limit): (Option<UserName>, u16),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let settings = self.settings(user).ok_or(ErrorCode::Internal)?;
        let start = after.as_ref().map_or(Unbounded, Excluded);
        let mut names = settings.blocked.range::<UserName, _>((start, Unbounded));
        let page: Vec<UserName> = names.by_ref().take(usize::from(limit)).cloned().collect();
        let more = names.next().is_some();
        let messages_from = settings.row.messages_from;
        let users: Vec<_> = page.iter().map(UserName::as_str).collect();
        let next = users.last().copied().filter(|_| more).unwrap_or_default();
        let reply = Reply::Chat(ChatReply::BlocksOk { users, next, messages_from });
        self.sessions.answer(conn, request_id, &reply, fx);
        Ok(())
    }

    /// A repeat is written and told again: it may be the retry of one whose news was lost.
    fn set_block(
        &mut self,
        (conn, request_id): (ConnId, u32),
        user: UserName,
        (other, block): (UserName, bool),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        if other == user {
            return Err(ErrorCode::BadRequest);
        }
        let settings = self.settings(&user).ok_or(ErrorCode::Internal)?;
        if block && settings.blocked.len() >= limits::BLOCKS_MAX && !settings.blocked.contains(&other) {
            return Err(ErrorCode::TooManyBlocks);
        }
        let row = settings.row.clone();
        let news = News::Block(other.clone());
        self.write_settings(SocialPending { conn, request_id, user, news }, row, Some((other, block)), fx)
    }

    /// Changes settings in memory at once and on disk; its news are told and the request answered when they are there.
    fn write_settings(
        &mut self,
        pending: SocialPending,
        row: SettingRow,
        block: Option<(UserName, bool)>,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        self.may_append()?;
        self.append_settings(pending, row, block, fx)
    }

    /// Writes the present settings of a user, of which only the last-seen time has changed.
    pub(crate) fn write_last_seen(&mut self, user: &UserName, fx: &mut Effects) {
        let Some(row) = self.settings(user).map(|settings| settings.row.clone()) else { return };
        let conn = ConnId { slot: u32::MAX, generation: 0 };
        let pending = SocialPending { conn, request_id: 0, user: user.clone(), news: News::Nothing };
        // It can't fail for want of settings; they were just there.
        let _ = self.append_settings(pending, row, None, fx);
    }

    fn append_settings(
        &mut self,
        pending: SocialPending,
        row: SettingRow,
        block: Option<(UserName, bool)>,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let user = pending.user.clone();
        let stuck = self.planted.is(Bug::UnblockUnheard);
        let settings = self.settings_mut(&user).ok_or(ErrorCode::Internal)?;
        settings.last_seen_written_ms = row.last_seen_ms;
        settings.stamp += 1;
        settings.writes += 1;
        settings.row = row.clone();
        let stamp = settings.stamp;
        let mut rows = vec![Row { key: RowKey::Setting(user.clone()), stamp, value: Some(RowValue::Setting(row)) }];
        if let Some((other, block)) = block {
            let before = settings.blocked.len();
            if block {
                settings.blocked.insert(other.clone());
            } else if !stuck {
                settings.blocked.remove(&other);
            }
            let after = settings.blocked.len();
            self.social.blocked_names = self.social.blocked_names + after - before;
            rows.push(Row { key: RowKey::Block(user.clone(), other), stamp, value: block.then_some(RowValue::Block) });
        }
        let lsn = self.append(Record::Change(Box::new(Change { message: None, rows })), fx);
        let work = PendingWork::Social(Box::new(pending));
        self.pending.push_back(Pending { lsn, weight: 0, work });
        Ok(())
    }

    pub(crate) fn settings_written(&mut self, user: &UserName) {
        if let Some(settings) = self.settings_mut(user) {
            settings.writes = settings.writes.saturating_sub(1);
        }
        if let Some(held) = self.online.settings_mut(user) {
            held.settle();
        }
    }
}
