//! Receipts: how far each user of a conversation has it, delivered and read. Belongs to the owner of the conversation,
//! which alone writes their rows.
//!
//! Both places are cumulative and only rise. A READ is answered once its row is on disk. What devices acknowledge comes
//! here with the cursors of their session, at most once in `CURSOR_FLUSH_MS`; if the last of these is lost with a session
//! whose lane was full, the next acknowledgement or READ repairs it. News goes to the other user (and of what was read, to
//! the reader's own devices) only after it is on disk, so nobody sees it go back, and at most once in
//! `RECEIPTS_INTERVAL_MS` a conversation. In a group those who wrote lately hear how far at least one other member is, and
//! who reads on one of several devices that are online, the others. It is a convenience: a device that reads too slowly
//! goes without, and RECEIPTS tells the state at any time.
//!
//! Invariants: rows are kept in a bounded cache; those with something in flight are never evicted; `cooling` and `due` hold
//! the same conversations.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::FixedState;
use lru::LruCache;
use ringline_cluster::ownership::PartitionSet;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, ConversationKind, DeviceKey, Seq, UserName};
use ringline_schema::limits::RECEIPTS_INTERVAL_MS;
use ringline_schema::message::{ChatReply, Reply};
use ringline_schema::record::{Answer, Change, Query, Record, StoredMessage};
use ringline_schema::rows::{ReceiptRow, Row, RowKey, RowValue};
use smallvec::SmallVec;

use crate::config::{RECEIPT_GROUPS_MAX, RECEIPTS_CACHED_MAX, RECEIPTS_TOLD_MAX, WAITERS_PER_LOAD_MAX};
use crate::conversation::{Pending, PendingWork};
use crate::event::{Effects, ShardMessage};
use crate::group::reached::Reached;
use crate::peer::Origin;
use crate::planted::Bug;
use crate::shard::{Question, Shard};
use crate::timers::Timer;

/// How many cached rows are looked at to find one that may go.
const EVICTION_LOOKS_MAX: usize = 8;

/// A user of a conversation.
pub(crate) type Reader = (ConversationId, UserName);

/// A user has more of a conversation; on its way to the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptUp {
    /// Who waits for the row to be on disk.
    pub origin: Option<Origin>,
    pub conversation: ConversationId,
    pub user: UserName,
    pub delivered: Seq,
    pub read: Seq,
    /// The session was given messages up to there: they exist.
    pub shown: bool,
    /// The reader has other devices here, which are told what was read.
    pub others: bool,
}

/// What devices of `to` are told: how far `user` has the conversation that `to` has with `with`; `None`: somebody of a
/// group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptNews {
    pub to: UserName,
    pub conversation: ConversationId,
    pub with: UserName,
    pub user: Option<UserName>,
    pub row: ReceiptRow,
}

/// A row on its way to the disk.
#[derive(Debug)]
pub(crate) struct ReceiptWrite {
    origin: Option<Origin>,
    conversation: ConversationId,
    moved: Moved,
}

#[derive(Clone, Debug)]
struct Moved {
    user: UserName,
    /// The other user, or the group.
    with: Option<UserName>,
    row: ReceiptRow,
    read_moved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Loading,
    Ready,
}

#[derive(Debug)]
struct Entry {
    stage: Stage,
    with: Option<UserName>,
    /// A seq that is known to exist for this user.
    head: Seq,
    /// The row as it was last written, perhaps not yet on disk.
    row: ReceiptRow,
    in_flight: u32,
    /// In order of arrival, while loading.
    waiting: VecDeque<ReceiptUp>,
}

/// The receipts of one shard.
pub(crate) struct Receipts {
    rows: LruCache<Reader, Entry, FixedState>,
    /// Conversations told of within the last interval, with what has moved since.
    cooling: HashMap<ConversationId, SmallVec<[Moved; 2]>, FixedState>,
    /// Of groups.
    reached: LruCache<ConversationId, Reached, FixedState>,
    /// When each of them may be told of again; in order of time, because the interval is the same for all.
    due: VecDeque<(u64, ConversationId)>,
}

impl Receipts {
    pub fn new(hasher: FixedState) -> Self {
        let rows = LruCache::unbounded_with_hasher(hasher.clone());
        let reached = LruCache::unbounded_with_hasher(hasher.clone());
        Self { rows, reached, cooling: HashMap::with_hasher(hasher), due: VecDeque::new() }
    }

    /// Somebody has written to a group, on disk.
    pub fn wrote(&mut self, message: &StoredMessage) {
        let new = || Reached::new(message.to.clone());
        self.reached.get_or_insert_mut(message.conversation, new).wrote(&message.from, message.seq);
        if self.reached.len() > RECEIPT_GROUPS_MAX {
            self.reached.pop_lru();
        }
    }

    /// Keeps the cache within its bound, but for what is in flight.
    fn evict(&mut self) {
        let mut looks = 0;
        while self.rows.len() > RECEIPTS_CACHED_MAX && looks < EVICTION_LOOKS_MAX {
            looks += 1;
            let Some((key, entry)) = self.rows.pop_lru() else { return };
            if entry.stage == Stage::Loading || entry.in_flight > 0 {
                self.rows.put(key, entry);
            }
        }
    }

    pub fn check_invariants(&self) {
        assert_eq!(self.cooling.len(), self.due.len());
        assert!(self.due.iter().is_sorted_by_key(|(at_us, _)| *at_us));
        for (key, entry) in &self.rows {
            assert!(entry.stage == Stage::Loading || entry.waiting.is_empty(), "{key:?}: nobody waits for nothing");
            assert!(entry.row.read <= entry.row.delivered, "{key:?}: read before it was delivered");
        }
    }
}

impl Shard {
    /// READ, on the shard of its session. Errors: `BUSY`; the owner answers the others.
    pub(crate) fn read_upto(
        &mut self,
        origin: Origin,
        (conversation, seq): (ConversationId, Seq),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        let shown = login.known().get(&conversation).is_some_and(|known| seq <= known.shown);
        let (user, origin, delivered) = (login.user.clone(), Some(origin), Seq::ZERO);
        let others = self.online.get(&user).is_some_and(|devices| devices.len() > 1);
        self.send_up(ReceiptUp { origin, conversation, user, delivered, read: seq, shown, others }, fx)
    }

    /// A device of `user` has acknowledged up to `seq`; not told for a chat with oneself. `BUSY`: later.
    pub(crate) fn tell_delivered(
        &mut self,
        user: &UserName,
        (conversation, seq): (ConversationId, Seq),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        if self.draining || conversation == ConversationId::direct(user, user) {
            return Ok(());
        }
        let (user, read) = (user.clone(), Seq::ZERO);
        self.send_up(
            ReceiptUp { origin: None, conversation, user, delivered: seq, read, shown: true, others: false },
            fx,
        )
    }

    fn send_up(&mut self, up: ReceiptUp, fx: &mut Effects) -> Result<(), ErrorCode> {
        let owner = self.owner(up.conversation.partition());
        if self.is_here(owner) {
            self.receipt_up(up, fx);
        } else if self.is_blocked(owner) {
            return Err(ErrorCode::Busy);
        } else {
            self.tell_shard(owner, ShardMessage::ReceiptUp(Box::new(up)), fx);
        }
        Ok(())
    }

    /// At the owner. What nobody waits for and can't be served now is left to the next acknowledgement.
    pub(crate) fn receipt_up(&mut self, up: ReceiptUp, fx: &mut Effects) {
        let key = (up.conversation, up.user.clone());
        let may_load = self.may_load();
        match self.receipts.rows.get_mut(&key) {
            Some(entry) if entry.stage == Stage::Ready => self.raise(up, false, fx),
            Some(entry) if entry.waiting.len() < WAITERS_PER_LOAD_MAX => entry.waiting.push_back(up),
            Some(_) => self.up_ended(&up, Err(ErrorCode::Busy), fx),
            None if may_load => {
                let (waiting, row) = (VecDeque::from([up]), ReceiptRow::default());
                let entry = Entry { stage: Stage::Loading, with: None, head: Seq::ZERO, row, in_flight: 0, waiting };
                self.receipts.rows.put(key.clone(), entry);
                self.receipts.evict();
                self.load_reader(key, fx);
            }
            None => self.up_ended(&up, Err(ErrorCode::Busy), fx),
        }
    }

    /// First the conversation as its user has it, then the row.
    fn load_reader(&mut self, key: Reader, fx: &mut Effects) {
        let (device, cursor) = (DeviceKey(0), ConversationId(key.0.0.saturating_sub(1)));
        let query = Query::Conversations { user: key.1.clone(), device, cursor, limit: 1 };
        self.load(Question::Receipt(Box::new(key)), query, fx);
    }

    pub(crate) fn receipt_loaded(&mut self, key: Reader, answer: Answer, fx: &mut Effects) {
        let Some(entry) = self.receipts.rows.get_mut(&key) else { return };
        let error = match answer {
            Answer::Conversations(rows) => match rows.into_iter().find(|row| row.conversation == key.0) {
                Some(row) => {
                    entry.head = row.head;
                    entry.with = Some(row.with);
                    let query = Query::Row { key: RowKey::Receipt(key.0, key.1.clone()) };
                    return self.load(Question::Receipt(Box::new(key)), query, fx);
                }
                None => ErrorCode::NoSuchConversation,
            },
            Answer::Row(row) => {
                if let Some(RowValue::Receipt(row)) = row.and_then(|row| row.value) {
                    // What was written and is not on disk yet stays.
                    entry.row.delivered = entry.row.delivered.max(row.delivered);
                    entry.row.read = entry.row.read.max(row.read);
                }
                entry.stage = Stage::Ready;
                for up in std::mem::take(&mut entry.waiting) {
                    self.raise(up, true, fx);
                }
                return;
            }
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Rows(_)
            | Answer::Count(_) => ErrorCode::Internal,
        };
        let waiting = std::mem::take(&mut entry.waiting);
        if entry.in_flight > 0 {
            entry.stage = Stage::Ready;
        } else {
            self.receipts.rows.pop(&key);
        }
        for up in waiting {
            self.up_ended(&up, Err(error), fx);
        }
    }

    /// Writes what has risen. `loaded`: the head is fresh, so what is above it does not exist.
    fn raise(&mut self, up: ReceiptUp, loaded: bool, fx: &mut Effects) {
        let key = (up.conversation, up.user.clone());
        let may_load = self.may_load();
        let cached = self.conversations.peek(&up.conversation).map_or(Seq::ZERO, |cached| cached.committed);
        let is_direct = up.conversation.kind() == Some(ConversationKind::Direct);
        let Some(entry) = self.receipts.rows.get_mut(&key) else { return };
        let head = if is_direct { entry.head.max(cached) } else { entry.head };
        if up.read > head && !up.shown {
            if loaded || !may_load {
                let code = if loaded { ErrorCode::BadRequest } else { ErrorCode::Busy };
                return self.up_ended(&up, Err(code), fx);
            }
            entry.stage = Stage::Loading;
            entry.waiting.push_back(up);
            return self.load_reader(key, fx);
        }
        let old = entry.row;
        let mut row =
            ReceiptRow { delivered: old.delivered.max(up.delivered).max(up.read), read: old.read.max(up.read) };
        if self.planted.is(Bug::ReadGoesBack) && up.read != Seq::ZERO {
            row.read = up.read;
        }
        if self.planted.is(Bug::ReadForgotten) {
            entry.row = row;
            return self.up_ended(&up, Ok(()), fx);
        }
        if row == old {
            let in_flight = entry.in_flight > 0;
            return match up.origin {
                Some(origin) if in_flight => {
                    let work = PendingWork::Done(origin);
                    self.pending.push_back(Pending { lsn: self.appended, weight: 0, work });
                }
                Some(_) | None => self.up_ended(&up, Ok(()), fx),
            };
        }
        if let Err(code) = self.may_append() {
            return self.up_ended(&up, Err(code), fx);
        }
        let Some(entry) = self.receipts.rows.get_mut(&key) else { return };
        entry.row = row;
        entry.in_flight += 1;
        // Nobody is told of it in a group but who has other devices to be told.
        let read_moved = row.read > old.read && (is_direct || up.others);
        let moved = Moved { user: key.1, with: entry.with.clone(), row, read_moved };
        let write = ReceiptWrite { origin: up.origin, conversation: key.0, moved };
        self.write_receipt(write, fx);
    }

    fn write_receipt(&mut self, write: ReceiptWrite, fx: &mut Effects) {
        let row = write.moved.row;
        let key = RowKey::Receipt(write.conversation, write.moved.user.clone());
        let stamp = row.delivered.0.saturating_add(row.read.0);
        let row = Row { key, stamp, value: Some(RowValue::Receipt(row)) };
        let lsn = self.append(Record::Change(Box::new(Change { message: None, rows: vec![row] })), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Receipt(Box::new(write)) });
    }

    /// Conversations of these partitions are another's: who waits is told so. Rows on their way to the disk stay, unless `all`
    /// are to go: then they are there.
    pub(crate) fn let_receipts_go(&mut self, gone: &PartitionSet, all: bool, fx: &mut Effects) {
        let is_gone = |id: &ConversationId| gone.contains(id.partition());
        let keys = self.receipts.rows.iter().filter(|((id, _), _)| is_gone(id)).map(|(key, _)| key.clone());
        let mut keys: Vec<_> = keys.collect();
        keys.sort_unstable();
        for key in keys {
            let Some(entry) = self.receipts.rows.peek_mut(&key) else { continue };
            let waiting = std::mem::take(&mut entry.waiting);
            entry.stage = Stage::Ready;
            if all || entry.in_flight == 0 {
                self.receipts.rows.pop(&key);
            }
            for up in waiting {
                self.up_ended(&up, Err(ErrorCode::Unavailable), fx);
            }
        }
        self.receipts.cooling.retain(|id, _| !is_gone(id));
        self.receipts.due.retain(|(_, id)| !is_gone(id));
        let reached = self.receipts.reached.iter().filter(|(id, _)| is_gone(id)).map(|(id, _)| *id);
        for id in reached.collect::<Vec<_>>() {
            self.receipts.reached.pop(&id);
        }
    }

    /// Answers who waited, if somebody did.
    fn up_ended(&mut self, up: &ReceiptUp, result: Result<(), ErrorCode>, fx: &mut Effects) {
        if let Some(origin) = up.origin {
            self.tell_done(origin, result, fx);
        }
    }

    /// The row is on disk.
    pub(crate) fn receipt_written(&mut self, write: ReceiptWrite, fx: &mut Effects) {
        let ReceiptWrite { origin, conversation, moved } = write;
        if let Some(entry) = self.receipts.rows.peek_mut(&(conversation, moved.user.clone())) {
            entry.in_flight = entry.in_flight.saturating_sub(1);
        }
        if let Some(origin) = origin {
            self.tell_done(origin, Ok(()), fx);
        }
        if moved.with.as_ref().is_some_and(UserName::is_group) {
            return self.group_receipt(conversation, moved, fx);
        }
        if let Some(changes) = self.receipts.cooling.get_mut(&conversation) {
            note_moved(changes, moved);
        } else if self.receipts.cooling.len() >= RECEIPTS_TOLD_MAX {
            self.sessions.counters.receipts_untold += 1;
        } else {
            let told = self.tell_news(conversation, &moved, fx);
            let untold = if told { SmallVec::new() } else { SmallVec::from_iter([moved]) };
            self.receipts.cooling.insert(conversation, untold);
            self.cool(conversation);
        }
    }

    /// A member of a group has more of it.
    fn group_receipt(&mut self, conversation: ConversationId, moved: Moved, fx: &mut Effects) {
        // None: nobody has written since this shard began, or not lately.
        let reached = self.receipts.reached.get_mut(&conversation).map(|reached| reached.raise(&moved.user, moved.row));
        if let Some(changes) = self.receipts.cooling.get_mut(&conversation) {
            if moved.read_moved {
                note_moved(changes, moved);
            }
            return;
        }
        if reached.is_none() && !moved.read_moved {
            return;
        }
        if self.receipts.cooling.len() >= RECEIPTS_TOLD_MAX {
            self.sessions.counters.receipts_untold += 1;
            return;
        }
        let told = self.tell_writers(conversation, fx);
        if told || moved.read_moved {
            let untold = moved.read_moved && !self.tell_news(conversation, &moved, fx);
            let untold = if untold { SmallVec::from_iter([moved]) } else { SmallVec::new() };
            self.receipts.cooling.insert(conversation, untold);
            self.cool(conversation);
        }
    }

    /// Tells writers of a group what has moved. False: there was nothing to tell.
    fn tell_writers(&mut self, conversation: ConversationId, fx: &mut Effects) -> bool {
        let Some(reached) = self.receipts.reached.peek(&conversation) else { return false };
        let (with, news) = (reached.group.clone(), reached.news());
        let some = !news.is_empty();
        for (to, row) in news {
            let news = ReceiptNews { to: to.clone(), conversation, with: with.clone(), user: None, row };
            let told = self.send_news(news, fx);
            if let Some(reached) = self.receipts.reached.peek_mut(&conversation).filter(|_| told) {
                reached.told(&to, row);
            }
        }
        some
    }

    /// The store failed under it.
    pub(crate) fn receipt_not_written(&mut self, write: &ReceiptWrite, fx: &mut Effects) {
        if let Some(origin) = write.origin {
            self.tell_done(origin, Err(ErrorCode::StoreFailed), fx);
        }
    }

    fn cool(&mut self, conversation: ConversationId) {
        let at_us = self.now.mono_us + RECEIPTS_INTERVAL_MS * 1_000;
        if self.receipts.due.is_empty() {
            self.timers.arm(at_us, Timer::Receipts);
        }
        self.receipts.due.push_back((at_us, conversation));
    }

    /// Tells what has moved in conversations whose interval is over, and begins another; forgets those at rest.
    pub(crate) fn receipts_due(&mut self, fx: &mut Effects) {
        let now_us = self.now.mono_us;
        let mut again = Vec::new();
        while let Some(&(_, conversation)) = self.receipts.due.front().filter(|(at_us, _)| *at_us <= now_us) {
            self.receipts.due.pop_front();
            let mut moved = self.receipts.cooling.remove(&conversation).unwrap_or_default();
            let told = self.tell_writers(conversation, fx);
            if told || !moved.is_empty() {
                moved.retain(|moved| !self.tell_news(conversation, moved, fx));
                self.receipts.cooling.insert(conversation, moved);
                again.push(conversation);
            }
        }
        let at_us = now_us + RECEIPTS_INTERVAL_MS * 1_000;
        self.receipts.due.extend(again.into_iter().map(|conversation| (at_us, conversation)));
        if let Some(&(at_us, _)) = self.receipts.due.front() {
            self.timers.arm(at_us, Timer::Receipts);
        }
    }

    /// False: a lane is full, and it has to be told later (perhaps twice, which harms nobody).
    fn tell_news(&mut self, conversation: ConversationId, moved: &Moved, fx: &mut Effects) -> bool {
        let Some(with) = moved.with.clone() else { return true };
        let (user, row) = (moved.user.clone(), moved.row);
        let to_other = (with != user && !with.is_group()).then(|| (with.clone(), user.clone()));
        let to_own = moved.read_moved.then(|| (user.clone(), with));
        for (to, with) in to_other.into_iter().chain(to_own) {
            if !self.send_news(ReceiptNews { to, conversation, with, user: Some(user.clone()), row }, fx) {
                return false;
            }
        }
        true
    }

    fn send_news(&mut self, news: ReceiptNews, fx: &mut Effects) -> bool {
        let target = self.owner(news.to.partition());
        if self.is_here(target) {
            self.receipt_news(&news, fx);
        } else if self.is_blocked(target) {
            return false;
        } else {
            self.tell_shard(target, ShardMessage::ReceiptNews(Box::new(news)), fx);
        }
        true
    }

    /// Tells the devices of a user that are online here.
    pub(crate) fn receipt_news(&mut self, news: &ReceiptNews, fx: &mut Effects) {
        let Some(conns) = self.online.get(&news.to) else { return };
        let reply = Reply::Chat(ChatReply::ReceiptUpto {
            conversation: news.conversation,
            with: news.with.as_str(),
            user: news.user.as_ref().map_or("", UserName::as_str),
            delivered: Seq(news.row.delivered.0.saturating_add(self.planted.is(Bug::HasOneMore).into())),
            read: news.row.read,
        });
        for &conn in conns {
            if !self.sessions.offer(conn, &reply, fx) {
                self.sessions.counters.receipts_untold += 1;
            }
        }
    }

    /// Answers a request that has nothing else to tell: DONE, or why not.
    pub(crate) fn tell_done(&mut self, origin: Origin, result: Result<(), ErrorCode>, fx: &mut Effects) {
        if !self.is_here(origin.shard) {
            return self.tell_shard(origin.shard, ShardMessage::Done { origin, result }, fx);
        }
        match result {
            Ok(()) => self.sessions.answer(origin.conn, origin.request_id, &Reply::Chat(ChatReply::Done), fx),
            Err(code) => self.sessions.fail(origin.conn, origin.request_id, code, fx),
        }
    }
}

/// Of one user the newest counts.
fn note_moved(changes: &mut SmallVec<[Moved; 2]>, moved: Moved) {
    match changes.iter_mut().find(|known| known.user == moved.user) {
        Some(known) => {
            let read_moved = known.read_moved || moved.read_moved;
            *known = Moved { read_moved, ..moved };
        }
        None => changes.push(moved),
    }
}
