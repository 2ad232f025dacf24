//! SYNC: what a device missed in all conversations of its user, page by page. Runs on the shard of the user.
//!
//! A page is read from this shard's store handle, conversation by conversation in order of id. What other shards have
//! committed is seen there only a moment later; so before its first page each of them is asked to bring its index up to
//! date ([`ShardMessage::Flush`]). Without that, a message committed just before a login could be missed: too early to be
//! pushed, too late to be listed. In a cluster the list is read from all nodes that are up, and each conversation from its own.
//! Pages after the first need none: what is committed since the login is pushed.
//!
//! Invariants: one SYNC a session and [`SYNCS_IN_FLIGHT_MAX`] a shard; a page fits into a frame; each takes at most
//! [`SYNC_QUESTIONS_MAX`] questions to the store, so a page may be empty and still name where to go on.

use std::collections::{BTreeMap, VecDeque};

use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, ConversationKind, DeviceKey, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::Sync;
use ringline_schema::message::{ChatReply, Place, Reply};
use ringline_schema::record::{Answer, ConversationRow, Query, Range, StoredMessage};

use crate::config::{SYNC_QUESTIONS_MAX, SYNCS_IN_FLIGHT_MAX};
use crate::event::{ConnId, Effects, ShardMessage};
use crate::nodes::reads::Whole;
use crate::peer::Origin;
use crate::planted::Bug;
use crate::shard::{Question, Shard};

/// What a name in a list takes on the wire at most, with its table entry.
const NAME_BYTES: usize = limits::USER_NAME_BYTES_MAX + 16;

/// A SYNC under way.
#[derive(Debug)]
pub(crate) struct SyncWork {
    origin: Origin,
    user: UserName,
    device: DeviceKey,
    /// How far the device says that it has conversations.
    places: BTreeMap<ConversationId, Seq>,
    from: Place,
    /// The list is read up to here.
    cursor: ConversationId,
    listed: bool,
    /// Conversations found behind and not read yet, in order.
    behind: VecDeque<Behind>,
    /// Tells the answers of other shards to this SYNC from those to an earlier one.
    number: u64,
    /// Shards whose index is still awaited.
    flushing: usize,
    questions_left: u32,
    rows_left: u16,
    bytes_left: usize,
    messages: Vec<StoredMessage>,
}

/// A conversation of which this device misses something.
#[derive(Debug)]
struct Behind {
    conversation: ConversationId,
    after: Seq,
    head: Seq,
    /// What follows `after` is not kept any more: the oldest that is.
    truncated: Option<Seq>,
}

impl SyncWork {
    /// Notes which of these conversations are behind.
    fn list(&mut self, rows: &[ConversationRow], acked: impl Fn(ConversationId) -> Seq) {
        self.listed = rows.is_empty();
        for row in rows {
            let id = row.conversation;
            self.cursor = id;
            let said = self.places.get(&id).copied().unwrap_or_else(|| row.acked.max(acked(id)));
            let after = if id == self.from.conversation { said.max(self.from.seq) } else { said };
            if after < row.head {
                let behind = Behind { conversation: id, after, head: row.head, truncated: None };
                self.behind.push_back(Behind { truncated: behind.lost(row.first), ..behind });
            }
        }
    }

    /// Takes messages of the first conversation that is behind, as far as the page has room.
    fn take(&mut self, first: Seq, messages: Vec<StoredMessage>) {
        let Some(behind) = self.behind.front_mut() else { return };
        if behind.conversation.kind() == Some(ConversationKind::Direct) {
            behind.truncated = behind.lost(first);
            if behind.truncated.is_some() {
                return;
            }
        }
        let mut exhausted = messages.is_empty();
        for message in messages {
            let bytes = wire_bytes(&message);
            if self.rows_left == 0 || (bytes > self.bytes_left && !self.messages.is_empty()) {
                self.rows_left = 0;
                return;
            }
            self.rows_left -= 1;
            self.bytes_left = self.bytes_left.saturating_sub(bytes);
            behind.after = message.seq;
            exhausted = behind.after >= behind.head;
            self.messages.push(message);
        }
        if exhausted {
            self.behind.pop_front();
        }
    }

    fn full(&self) -> bool {
        self.rows_left == 0 || self.bytes_left == 0 || self.questions_left == 0
    }

    /// Where the page after this one begins; zero: nothing more was missed.
    fn next(&self) -> Place {
        match self.behind.front() {
            Some(behind) => Place { conversation: behind.conversation, seq: behind.after },
            None if self.listed => Place::default(),
            None => Place { conversation: ConversationId(self.cursor.0.saturating_add(1)), seq: Seq::ZERO },
        }
    }
}

impl Behind {
    /// Whether messages behind `after` are gone. Who has nothing of a conversation misses nothing of what is gone.
    fn lost(&self, first: Seq) -> Option<Seq> {
        (self.after != Seq::ZERO && self.after.0.saturating_add(1) < first.0).then_some(first)
    }
}

/// What a message takes of a page beside its fixed part.
fn wire_bytes(message: &StoredMessage) -> usize {
    let extra = message.extra.as_ref().map_or(0, |extra| {
        let change = extra.change.as_ref().map_or(0, |change| change.users.len() * NAME_BYTES + change.text.len());
        extra.mentions.len() * NAME_BYTES + change
    });
    message.body.len() + extra
}

impl Shard {
    /// Errors: `BAD_REQUEST` for more places than `SYNC_PLACES_MAX`, `BUSY` while one is under way or a queue is full.
    pub(crate) fn sync(&mut self, origin: Origin, sync: &Sync<'_>, fx: &mut Effects) -> Result<(), ErrorCode> {
        if sync.places.len() > limits::SYNC_PLACES_MAX {
            return Err(ErrorCode::BadRequest);
        }
        self.may_page(origin.conn)?;
        if self.syncs.contains_key(&origin.conn) || self.syncs.len() >= SYNCS_IN_FLIGHT_MAX {
            return Err(ErrorCode::Busy);
        }
        let first_page = sync.from == Place::default();
        // A store that all nodes share shows what is committed at once.
        let asks = first_page && !self.is_moving();
        let others: Vec<_> = if asks { self.reachable_shards() } else { Vec::new() };
        if others.iter().any(|&shard| self.is_blocked(shard)) {
            return Err(ErrorCode::Busy);
        }
        self.next_token += 1;
        let number = self.next_token;
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        let mut places = BTreeMap::new();
        for place in sync.places.iter() {
            let seq: &mut Seq = places.entry(place.conversation).or_default();
            *seq = place.seq.max(*seq);
        }
        let work = SyncWork {
            origin,
            user: login.user.clone(),
            device: login.key(),
            places,
            from: sync.from,
            cursor: ConversationId(sync.from.conversation.0.saturating_sub(1)),
            listed: false,
            behind: VecDeque::new(),
            number,
            flushing: others.len(),
            questions_left: SYNC_QUESTIONS_MAX,
            rows_left: self.page_rows(sync.limit),
            bytes_left: self.config.frame_bytes_max as usize / 2,
            messages: Vec::new(),
        };
        self.syncs.insert(origin.conn, Box::new(work));
        if !others.is_empty() {
            self.expire_sync(origin.conn, number);
        }
        for shard in others {
            self.tell_shard(shard, ShardMessage::Flush { conn: origin.conn, number }, fx);
        }
        self.sync_on(origin.conn, fx);
        Ok(())
    }

    /// Another shard wants all that is committed here to be seen by questions it asks from now on: any answer to a
    /// question asked now comes when it is.
    pub(crate) fn flush(&mut self, asker: ShardIndex, sync: (ConnId, u64), fx: &mut Effects) {
        if self.may_load() {
            let query = Query::Head { conversation: ConversationId(0), device: DeviceKey(0) };
            self.load(Question::Flush(asker, sync), query, fx);
        } else {
            self.tell_shard(asker, ShardMessage::Flushed { conn: sync.0, number: sync.1, done: false }, fx);
        }
    }

    pub(crate) fn flush_loaded(&mut self, asker: ShardIndex, sync: (ConnId, u64), answer: &Answer, fx: &mut Effects) {
        let done = !matches!(answer, Answer::Failed);
        self.tell_shard(asker, ShardMessage::Flushed { conn: sync.0, number: sync.1, done }, fx);
    }

    pub(crate) fn flushed(&mut self, (conn, number): (ConnId, u64), done: bool, fx: &mut Effects) {
        if self.resync_flushed((conn, number), done, fx) {
            return;
        }
        let Some(work) = self.syncs.get_mut(&conn).filter(|work| work.number == number) else { return };
        work.flushing = work.flushing.saturating_sub(1);
        if done {
            self.sync_on(conn, fx);
        } else {
            self.sync_failed(conn, ErrorCode::Busy, fx);
        }
    }

    /// Asks the store for what comes next, or answers.
    fn sync_on(&mut self, conn: ConnId, fx: &mut Effects) {
        let Some(work) = self.syncs.get_mut(&conn).filter(|work| work.flushing == 0) else { return };
        let front = work.behind.front();
        let stuck = front.is_some_and(|behind| behind.truncated.is_some());
        if work.full() || stuck || (front.is_none() && work.listed) {
            return self.sync_done(conn, fx);
        }
        work.questions_left -= 1;
        let user = work.user.clone();
        let query = match front {
            Some(behind) => {
                let range = Range {
                    after: behind.after,
                    before: None,
                    limit: work.rows_left,
                    bytes_max: u32::try_from(work.bytes_left).unwrap_or(u32::MAX),
                    newest: false,
                };
                Query::Messages { conversation: behind.conversation, range, reader: Some(user) }
            }
            None => {
                let (device, cursor, limit) = (work.device, work.cursor, limits::PAGE_ROWS_MAX);
                Query::Conversations { user, device, cursor, limit }
            }
        };
        self.load_anywhere(Question::Sync(conn), (query, Whole::Reachable), fx);
    }

    pub(crate) fn sync_loaded(&mut self, conn: ConnId, answer: Answer, fx: &mut Effects) {
        // The session is gone: nobody asks any more.
        let (Some(work), Some(login)) = (self.syncs.get_mut(&conn), self.sessions.login_mut(conn)) else { return };
        match answer {
            Answer::Conversations(rows) => {
                // A device may have what this row says it has not acknowledged: its ACK died with a node or a connection.
                // It can say so again without being given the messages again.
                for row in rows.iter().filter(|row| row.acked < row.head) {
                    login.show(row.conversation, row.head);
                }
                // What this session has said is newer than what was written of it.
                work.list(&rows, |id| login.known().get(&id).map_or(Seq::ZERO, |known| known.acked));
                for row in &rows {
                    self.kept_from(conn, row.conversation, row.first, fx);
                }
            }
            Answer::Messages { first, messages, .. } => {
                let conversation = work.behind.front().map(|behind| behind.conversation);
                work.take(first, messages);
                if let Some(conversation) = conversation {
                    self.kept_from(conn, conversation, first, fx);
                }
            }
            // Left out of the group for good, or its messages went: nothing to read there.
            Answer::NotReadable => drop(work.behind.pop_front()),
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Count(_) => return self.sync_failed(conn, ErrorCode::Internal, fx),
        }
        self.sync_on(conn, fx);
    }

    fn sync_done(&mut self, conn: ConnId, fx: &mut Effects) {
        let Some(work) = self.syncs.remove(&conn) else { return };
        let request_id = work.origin.request_id;
        let truncated = work.behind.front().and_then(|behind| Some((behind.conversation, behind.truncated?)));
        if let Some((conversation, first)) = truncated.filter(|_| work.messages.is_empty()) {
            let reply = Reply::Chat(ChatReply::Truncated { conversation, first });
            return self.sessions.answer(conn, request_id, &reply, fx);
        }
        if let Some(login) = self.sessions.login_mut(conn) {
            for message in &work.messages {
                login.show(message.conversation, message.seq);
            }
        }
        let messages = work.messages.iter().map(StoredMessage::as_wire).collect();
        let mut next = work.next();
        if self.planted.is(Bug::SyncSkipsOne) && next.seq != Seq::ZERO {
            next.seq = next.seq.next();
        }
        let reply = Reply::Chat(ChatReply::SyncOk { messages, next });
        self.sessions.answer(conn, request_id, &reply, fx);
    }

    /// A node is gone: SYNCs that may wait for its index end, to be asked for again.
    pub(crate) fn syncs_lost(&mut self, fx: &mut Effects) {
        let waiting = self.syncs.iter().filter(|(_, work)| work.flushing > 0).map(|(conn, _)| *conn);
        for conn in waiting.collect::<Vec<_>>() {
            self.sync_failed(conn, ErrorCode::Unavailable, fx);
        }
    }

    /// The index of other shards is awaited for too long: perhaps an answer had no room on a link.
    pub(crate) fn sync_late(&mut self, conn: ConnId, number: u64, fx: &mut Effects) {
        if self.syncs.get(&conn).is_some_and(|work| work.number == number && work.flushing > 0) {
            self.sync_failed(conn, ErrorCode::Unavailable, fx);
        }
    }

    pub(crate) fn sync_failed(&mut self, conn: ConnId, code: ErrorCode, fx: &mut Effects) {
        if let Some(work) = self.syncs.remove(&conn) {
            self.sessions.fail(conn, work.origin.request_id, code, fx);
        }
    }
}
