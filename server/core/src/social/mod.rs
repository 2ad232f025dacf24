//! What people are to each other beside their messages: signals, who may write to whom, presence, notices to all.
//!
//! Owned by the shard of the user that it is about; other shards ask and are told by [`SocialMessage`]. Everything here
//! but the rows of the log is soft: after a restart it is loaded or asked for again.
//!
//! Invariants: settings with a row on its way to the disk stay in memory, so that no reload misses it; whoever waits for
//! settings gets an answer when they are loaded or could not be; a request that needs other shards is answered when all
//! of them have said so, or after [`GATHER_MS`].

pub(crate) mod notice;
pub(crate) mod presence;
pub(crate) mod settings;
pub(crate) mod signal;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use foldhash::fast::FixedState;
use lru::LruCache;
use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::limits;
use ringline_schema::message::{ChatReply, ChatRequest, Reply};
use ringline_schema::record::Answer;

use crate::deletion::DeleteAsk;
use crate::event::{ConnId, Effects};
use crate::peer::{Origin, ShardMessage};
use crate::planted::Bug;
use crate::shard::{Question, Shard};
use crate::timers::Timer;
use notice::{Giving, NoticeOut};
use presence::{Presence, Seen};
use settings::{Loading, Own, Parked, PrivacyChanges, Settings};
use signal::{SignalSend, Signalled};

/// Requests that wait for other shards, per shard; over it BUSY.
const GATHERS_MAX: usize = 4_096;
/// A shard that has not answered by then never will: the request ends as INTERNAL, and may be made again.
const GATHER_MS: u64 = 5_000;

/// What a session has of this module.
#[derive(Debug, Default)]
pub struct Sociable {
    pub signalled: Signalled,
    pub watching: BTreeSet<UserName>,
}

/// What shards tell each other about people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocialMessage {
    /// To the shard of the receiver.
    Signal(Box<SignalSend>),
    /// To the origin of a signal that was refused.
    Refused { origin: Origin, code: ErrorCode },
    /// To the owner of a conversation: ask again whether `user` takes messages in it.
    AskAgain { conversation: ConversationId, user: UserName, gather: u64 },
    /// To every shard: ask again wherever somebody writes to `user`.
    PrivacyChanged { user: UserName, gather: u64 },
    /// To the shard of these users: tell how they are, now and when it changes.
    Watch { users: Vec<UserName>, gather: Option<u64> },
    /// The answer, or what changed.
    Seen { rows: Vec<Seen>, gather: Option<u64> },
    /// To every shard.
    Notice(Box<NoticeOut>),
    /// So many devices of one shard got it.
    Noticed { gather: u64, devices: u32 },
    /// So many devices of one shard got a transient message to a group.
    Passed { gather: u64, devices: u32 },
    /// One shard has done its part.
    Part { gather: u64 },
    /// To a shard that watches: one of the users can't be watched by one shard more.
    NotWatched { gather: u64 },
    /// An administrator deletes a user: to the shard of the user. Answered by [`ShardMessage::Done`].
    Delete(Box<DeleteAsk>),
}

/// What a question to the store is for.
#[derive(Clone, Debug)]
pub(crate) enum SocialQuestion {
    Setting(UserName),
    Blocks(UserName),
    /// Whether `user` has written to whom this is from.
    Wrote {
        user: UserName,
        from: UserName,
        parked: Box<Parked>,
    },
}

/// What waits for a row to be durable.
#[derive(Debug)]
pub(crate) struct SocialPending {
    pub conn: ConnId,
    pub request_id: u32,
    pub user: UserName,
    pub news: News,
}

/// Who has to hear of a change before it is answered.
#[derive(Debug)]
pub(crate) enum News {
    /// The owner of the conversation with that user.
    Block(UserName),
    /// Every shard.
    Privacy,
    /// Who watches, but nobody waits for that.
    Presence,
    /// Nobody, and nobody waits.
    Nothing,
}

/// What the parts of a request come together to.
#[derive(Debug)]
pub(crate) enum Gathered {
    Done,
    Broadcast {
        devices: u32,
    },
    /// A transient message to a group, and the wait for a delivery acknowledgement (0: none).
    Passed {
        origin: Origin,
        devices: u32,
        wait: u64,
        no_reply: bool,
        time_ms: u64,
    },
    /// How users are, for that user; of them this session did not watch `new` before.
    Presence {
        watcher: UserName,
        seen: Vec<Seen>,
        new: Vec<UserName>,
    },
    /// A user was deleted.
    Deleted {
        origin: Origin,
        user: UserName,
    },
}

/// A request that other shards have a part in.
#[derive(Debug)]
struct Gather {
    due_us: u64,
    conn: ConnId,
    request_id: u32,
    left: usize,
    gathered: Gathered,
}

/// See the module.
pub(crate) struct Social {
    pub(crate) settings: LruCache<UserName, Settings, FixedState>,
    /// Names on the block lists in `settings`.
    pub(crate) blocked_names: usize,
    pub(crate) loading: HashMap<UserName, Loading, FixedState>,
    /// What waits behind something that waits for the store to say whether the first of two users has written to the second.
    pub(crate) wrote_asked: BTreeMap<(UserName, UserName), VecDeque<Parked>>,
    pub(crate) privacy: PrivacyChanges,
    pub(crate) presence: Presence,
    pub(crate) notices: VecDeque<Giving>,
    /// By number, and so by when they are due.
    gathers: BTreeMap<u64, Gather>,
    next_gather: u64,
    gathers_armed: bool,
}

impl Social {
    pub(crate) fn new(hasher: &FixedState) -> Self {
        Self {
            settings: LruCache::unbounded_with_hasher(hasher.clone()),
            blocked_names: 0,
            loading: HashMap::with_hasher(hasher.clone()),
            wrote_asked: BTreeMap::new(),
            privacy: PrivacyChanges::default(),
            presence: Presence::default(),
            notices: VecDeque::new(),
            gathers: BTreeMap::new(),
            next_gather: 0,
            gathers_armed: false,
        }
    }
}

impl Shard {
    /// A request of this module. Errors are answered by the caller; everything else is answered here, now or later.
    pub(crate) fn social(
        &mut self,
        conn: ConnId,
        request_id: u32,
        request: &ChatRequest<'_>,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let own = match *request {
            ChatRequest::Signal { to, kind, body } => return self.signal(conn, request_id, (to, kind, body), fx),
            ChatRequest::Block { user } => Own::Block(UserName::of_user(user)?),
            ChatRequest::Unblock { user } => Own::Unblock(UserName::of_user(user)?),
            ChatRequest::Blocks { cursor, limit } => {
                let after = if cursor.is_empty() { None } else { Some(UserName::of_user(cursor)?) };
                Own::Blocks { after, limit: self.page_rows(limit) }
            }
            ChatRequest::Privacy { messages_from } => Own::Privacy(messages_from),
            ChatRequest::Broadcast { kind, device_kinds, body } => {
                return self.broadcast(conn, request_id, (kind, device_kinds, body), fx);
            }
            ChatRequest::Watch { users } => return self.watch(conn, request_id, users, fx),
            ChatRequest::Unwatch { users } => return self.unwatch(conn, request_id, users, fx),
            ChatRequest::PresenceSet { status, visible } => {
                if status.is_some_and(|status| status.len() > limits::STATUS_BYTES_MAX) {
                    return Err(ErrorCode::TextTooLong);
                }
                Own::Presence { status: status.map(str::to_owned), visible }
            }
            ChatRequest::Read { .. }
            | ChatRequest::Sync(_)
            | ChatRequest::Mark(_)
            | ChatRequest::Devices
            | ChatRequest::DropDevice { .. }
            | ChatRequest::Receipts { .. }
            | ChatRequest::Amend(_)
            | ChatRequest::Export { .. }
            | ChatRequest::DeleteUser { .. } => return Err(ErrorCode::Unsupported),
        };
        let login = self.sessions.get(conn).and_then(|session| session.login()).ok_or(ErrorCode::NotLoggedIn)?;
        let user = login.user.clone();
        self.with_settings(&user, Parked::Own { conn, request_id, own }, fx);
        Ok(())
    }

    pub(crate) fn social_message(&mut self, from: ShardIndex, message: SocialMessage, fx: &mut Effects) {
        match message {
            SocialMessage::Signal(signal) => self.signal_from_peer(signal, fx),
            SocialMessage::Refused { origin, code } => self.signal_refused(origin, code, fx),
            SocialMessage::AskAgain { conversation, user, gather } => {
                self.forget_permit(conversation, &user);
                self.tell_social(from, SocialMessage::Part { gather }, fx);
            }
            SocialMessage::PrivacyChanged { user, gather } => {
                self.privacy_changed(user);
                self.tell_social(from, SocialMessage::Part { gather }, fx);
            }
            SocialMessage::Watch { users, gather } => self.watch_from_peer(from, users, gather, fx),
            SocialMessage::Seen { rows, gather } => self.shown(rows, gather, fx),
            SocialMessage::Notice(notice) => self.begin_notice(from, notice),
            SocialMessage::Noticed { gather, devices } => self.noticed(gather, devices, fx),
            SocialMessage::Passed { gather, devices } => self.passed(gather, devices, fx),
            SocialMessage::Part { gather } => self.gathered(gather, fx),
            SocialMessage::NotWatched { gather } => self.not_watched(gather, fx),
            SocialMessage::Delete(ask) => self.delete_asked(*ask, fx),
        }
    }

    pub(crate) fn social_loaded(&mut self, question: SocialQuestion, answer: Answer, fx: &mut Effects) {
        match question {
            SocialQuestion::Setting(user) => self.setting_loaded(&user, answer, fx),
            SocialQuestion::Blocks(user) => self.blocks_loaded(&user, answer, fx),
            SocialQuestion::Wrote { user, from, parked } => self.wrote_loaded((&user, from), *parked, answer, fx),
        }
    }

    /// A change of somebody's settings is on disk: who acts on them elsewhere has to know before it is answered.
    pub(crate) fn social_stored(&mut self, pending: SocialPending, fx: &mut Effects) {
        let SocialPending { conn, request_id, user, news } = pending;
        self.settings_written(&user);
        match news {
            News::Nothing => {}
            News::Presence => {
                self.presence_moved(&user);
                self.done(conn, request_id, fx);
            }
            News::Block(other) => {
                self.presence_moved(&user);
                let conversation = ConversationId::direct(&user, &other);
                let owner = self.owner(conversation.partition());
                if self.is_here(owner) {
                    self.forget_permit(conversation, &user);
                    return self.done(conn, request_id, fx);
                }
                let Some(gather) = self.gather((conn, request_id), (1, Gathered::Done), fx) else { return };
                self.tell_social(owner, SocialMessage::AskAgain { conversation, user, gather }, fx);
            }
            News::Privacy => {
                self.privacy_changed(user.clone());
                let others = self.other_shards();
                if others.is_empty() {
                    return self.done(conn, request_id, fx);
                }
                let Some(gather) = self.gather((conn, request_id), (others.len(), Gathered::Done), fx) else { return };
                for shard in others {
                    self.tell_social(shard, SocialMessage::PrivacyChanged { user: user.clone(), gather }, fx);
                }
            }
        }
    }

    /// What was known of writing to this user is asked again.
    fn privacy_changed(&mut self, user: UserName) {
        if !self.planted.is(Bug::PrivacyUnheard) {
            self.social.privacy.note(user, self.now.mono_us);
        }
    }

    pub(crate) fn social_failed(&mut self, pending: &SocialPending, fx: &mut Effects) {
        match pending.news {
            News::Nothing => {}
            News::Block(_) | News::Privacy | News::Presence => {
                self.sessions.fail(pending.conn, pending.request_id, ErrorCode::StoreFailed, fx);
            }
        }
    }

    pub(crate) fn tell_social(&mut self, to: ShardIndex, message: SocialMessage, fx: &mut Effects) {
        self.tell_shard(to, ShardMessage::Social(message), fx);
    }

    pub(crate) fn done(&mut self, conn: ConnId, request_id: u32, fx: &mut Effects) {
        self.sessions.answer(conn, request_id, &Reply::Chat(ChatReply::Done), fx);
    }

    /// Begins to wait for so many parts. `None`: refused as BUSY.
    pub(crate) fn gather(
        &mut self,
        (conn, request_id): (ConnId, u32),
        (left, gathered): (usize, Gathered),
        fx: &mut Effects,
    ) -> Option<u64> {
        if self.gathers_are_full() {
            self.sessions.fail(conn, request_id, ErrorCode::Busy, fx);
            return None;
        }
        self.social.next_gather += 1;
        let number = self.social.next_gather;
        let due_us = self.now.mono_us + GATHER_MS * 1_000;
        self.social.gathers.insert(number, Gather { due_us, conn, request_id, left, gathered });
        self.arm_gathers();
        Some(number)
    }

    /// Nearly all are answered long before: their one timer is set again only when it fires.
    fn arm_gathers(&mut self) {
        let Some((_, oldest)) = self.social.gathers.first_key_value() else { return };
        if !std::mem::replace(&mut self.social.gathers_armed, true) {
            self.timers.arm(oldest.due_us, Timer::Gathers);
        }
    }

    fn gathered(&mut self, number: u64, fx: &mut Effects) {
        let Some(gather) = self.social.gathers.get_mut(&number) else { return };
        gather.left = gather.left.saturating_sub(1);
        if gather.left == 0 {
            self.answer_gathered(number, fx);
        }
    }

    /// The session whose request it is.
    pub(crate) fn asker_of(&self, number: u64) -> Option<ConnId> {
        self.social.gathers.get(&number).map(|gather| gather.conn)
    }

    pub(crate) fn gathered_presence(&mut self, number: u64, rows: Vec<Seen>, fx: &mut Effects) {
        let Some(gather) = self.social.gathers.get_mut(&number) else { return };
        gather.left = gather.left.saturating_sub(rows.len());
        if let Gathered::Presence { seen, .. } = &mut gather.gathered {
            seen.extend(rows);
        }
        if gather.left == 0 {
            self.answer_gathered(number, fx);
        }
    }

    pub(crate) fn noticed(&mut self, number: u64, given: u32, fx: &mut Effects) {
        let Some(gather) = self.social.gathers.get_mut(&number) else { return };
        if let Gathered::Broadcast { devices } = &mut gather.gathered {
            *devices = devices.saturating_add(given);
        }
        self.gathered(number, fx);
    }

    pub(crate) fn passed(&mut self, number: u64, given: u32, fx: &mut Effects) {
        let Some(gather) = self.social.gathers.get_mut(&number) else { return };
        if let Gathered::Passed { devices, .. } = &mut gather.gathered {
            *devices = devices.saturating_add(given);
        }
        self.gathered(number, fx);
    }

    /// Whether one more request that waits for other shards is BUSY.
    pub(crate) fn gathers_are_full(&self) -> bool {
        self.social.gathers.len() >= GATHERS_MAX
    }

    /// Broadcasts that wait for their shards. Few requests wait at all.
    pub(crate) fn open_broadcasts(&self) -> usize {
        let is_broadcast = |gather: &&Gather| matches!(gather.gathered, Gathered::Broadcast { .. });
        self.social.gathers.values().filter(is_broadcast).count()
    }

    fn answer_gathered(&mut self, number: u64, fx: &mut Effects) {
        let Some(gather) = self.social.gathers.remove(&number) else { return };
        match &gather.gathered {
            Gathered::Passed { origin, devices, wait, no_reply, time_ms } => {
                self.passed_to_all(*origin, (*devices, *wait, *time_ms), *no_reply, fx);
            }
            Gathered::Done => self.done(gather.conn, gather.request_id, fx),
            Gathered::Deleted { origin, user } => self.deletion_told(*origin, user, fx),
            Gathered::Broadcast { devices } => {
                let reply = Reply::Chat(ChatReply::BroadcastOk { devices: *devices });
                self.sessions.answer(gather.conn, gather.request_id, &reply, fx);
            }
            Gathered::Presence { watcher, seen, .. } => {
                // What has changed since a part came was told by a push already: an older answer would undo it.
                let newest = seen.iter().map(|seen| self.social.presence.newest(seen));
                let users = newest.map(|seen| seen.as_wire(watcher)).collect();
                let reply = Reply::Chat(ChatReply::PresenceOk { users });
                self.sessions.answer(gather.conn, gather.request_id, &reply, fx);
            }
        }
    }

    /// Parts did not come in time.
    pub(crate) fn gathers_due(&mut self, fx: &mut Effects) {
        self.social.gathers_armed = false;
        let code = if self.is_clustered() { ErrorCode::Unavailable } else { ErrorCode::Internal };
        while let Some(oldest) = self.social.gathers.first_entry()
            && oldest.get().due_us <= self.now.mono_us
        {
            let gather = oldest.remove();
            self.end_gather(gather, code, fx);
        }
        self.arm_gathers();
    }

    /// Somebody can't be watched: the whole request is refused, and what it began is undone.
    pub(crate) fn not_watched(&mut self, number: u64, fx: &mut Effects) {
        let Some(gather) = self.social.gathers.remove(&number) else { return };
        if let Gathered::Presence { new, .. } = &gather.gathered {
            for user in new {
                if let Some(login) = self.sessions.login_mut(gather.conn) {
                    login.social_mut().watching.remove(user);
                }
                self.forget_watch(gather.conn, user);
            }
        }
        self.end_gather(gather, ErrorCode::TooManyWatched, fx);
    }

    /// A part will not come.
    pub(crate) fn gather_failed(&mut self, number: u64, code: ErrorCode, fx: &mut Effects) {
        if let Some(gather) = self.social.gathers.remove(&number) {
            self.end_gather(gather, code, fx);
        }
    }

    fn end_gather(&mut self, gather: Gather, code: ErrorCode, fx: &mut Effects) {
        match gather.gathered {
            // Some may have got it.
            Gathered::Passed { origin, .. } => {
                let code = if self.is_clustered() { ErrorCode::Unknown } else { code };
                self.answer_send(origin, (false, Err(code)), None, fx);
            }
            // It is done whoever has not heard of it: what a shard knew before runs out by itself.
            Gathered::Deleted { origin, user } => self.deletion_told(origin, &user, fx),
            Gathered::Done | Gathered::Broadcast { .. } | Gathered::Presence { .. } => {
                self.sessions.fail(gather.conn, gather.request_id, code, fx);
            }
        }
    }

    pub(crate) fn social_ask(
        &mut self,
        question: SocialQuestion,
        query: ringline_schema::record::Query,
        fx: &mut Effects,
    ) {
        self.load(Question::Social(question), query, fx);
    }
}
