//! The conversation list of a user: CONVERSATIONS, with the last message of each, and MARK (pin, mute). Runs on the shard of
//! the user, which alone writes their marks.
//!
//! What is unread is `head − read`, which a client reckons itself: there is no counter that could go wrong. Invariants: one
//! MARK a user is under way, so two devices never write the same row from one state; a page with its last messages fits
//! into a frame. In a cluster the list is put together from all nodes that are up.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::Mark;
use ringline_schema::message::{Conversation, Reply};
use ringline_schema::record::{Answer, Change, ConversationRow, Query, Range, Record, StoredMessage};
use ringline_schema::rows::{MarkRow, Row, RowKey, RowList, RowValue};

use crate::conversation::{Pending, PendingWork};
use crate::event::{ConnId, Effects};
use crate::nodes::reads::{ListAsk, Whole};
use crate::peer::Origin;
use crate::shard::{Question, Shard};

/// Marks asked of the store at once, to count the pinned.
const MARKS_PER_QUESTION: u16 = 1_000;
/// What a row and its last message take of a page beside the body: four names, a title, two tables.
const ROW_BYTES: u32 = 512;

/// A page of the list that waits for the last messages of its conversations.
#[derive(Debug)]
pub(crate) struct ListWork {
    origin: Origin,
    user: UserName,
    rows: Vec<ConversationRow>,
    /// Of the first rows, as far as they are loaded.
    lasts: Vec<Option<StoredMessage>>,
    /// For bodies; a last message that is larger than what is left is left out.
    bytes_left: usize,
}

/// A MARK under way.
#[derive(Debug)]
pub(crate) struct MarkWork {
    origin: Origin,
    user: UserName,
    mark: Mark,
    stamp: u64,
    row: MarkRow,
    /// Pinned conversations counted so far.
    pinned: usize,
}

impl MarkWork {
    /// Whose it is.
    pub(crate) fn user(&self) -> &UserName {
        &self.user
    }
}

impl Shard {
    pub(crate) fn conversations(
        &mut self,
        conn: ConnId,
        request_id: u32,
        (cursor, limit): (ConversationId, u16),
        fx: &mut Effects,
    ) {
        let origin = Origin { shard: self.config.shard, conn, request_id };
        if let Err(code) = self.may_page(conn) {
            return self.sessions.fail(conn, request_id, code, fx);
        }
        // Half a frame of rows, a quarter of bodies.
        let fit = (self.config.frame_bytes_max / 2 / ROW_BYTES).clamp(1, u32::from(limits::PAGE_ROWS_MAX)) as u16;
        let limit = self.page_rows(limit).min(fit);
        let Some(login) = self.sessions.login_mut(conn) else { return };
        let ask = ListAsk { user: login.user.clone(), device: login.key(), cursor, limit };
        // Who asks for one row asks about that conversation.
        let next = ConversationId(cursor.0.saturating_add(1));
        let whole = if limit == 1 { Whole::With(next) } else { Whole::Reachable };
        self.load_list(Question::Conversations(origin), (ask, whole), fx);
    }

    pub(crate) fn conversations_loaded(&mut self, origin: Origin, answer: Answer, fx: &mut Effects) {
        let Answer::Conversations(rows) = answer else {
            return self.sessions.fail(origin.conn, origin.request_id, self.unread(), fx);
        };
        let Some(login) = self.sessions.login_mut(origin.conn) else { return };
        // A device may have what this row says it has not acknowledged: its ACK died with a node or a connection. It can
        // say so again without being given the messages again.
        for row in rows.iter().filter(|row| row.acked < row.head) {
            login.show(row.conversation, row.head);
        }
        let user = login.user.clone();
        for row in &rows {
            self.kept_from(origin.conn, row.conversation, row.first, fx);
        }
        let (user, bytes_left) = (user, self.config.frame_bytes_max as usize / 4);
        let lasts = Vec::with_capacity(rows.len());
        self.list_on(Box::new(ListWork { origin, user, rows, lasts, bytes_left }), fx);
    }

    /// Asks for the next last message, or answers.
    fn list_on(&mut self, mut work: Box<ListWork>, fx: &mut Effects) {
        while let Some(row) = work.rows.get(work.lasts.len()) {
            if row.head == Seq::ZERO {
                work.lasts.push(None);
                continue;
            }
            let range = Range { after: Seq::ZERO, before: None, limit: 1, bytes_max: 1, newest: true };
            let (conversation, reader) = (row.conversation, Some(work.user.clone()));
            return self.load_messages(Question::Last(work), (conversation, range, reader), fx);
        }
        self.list_done(&work, fx);
    }

    pub(crate) fn last_loaded(&mut self, mut work: Box<ListWork>, answer: Answer, fx: &mut Effects) {
        let last = match answer {
            Answer::Messages { mut messages, .. } => messages.pop(),
            Answer::Failed
            | Answer::NotReadable
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Count(_) => None,
        };
        // Mentions and changes of groups are for who reads on.
        let fits = last.filter(|last| last.bytes() == last.body.len() && last.body.len() <= work.bytes_left);
        work.bytes_left -= fits.as_ref().map_or(0, |last| last.body.len());
        work.lasts.push(fits);
        self.list_on(work, fx);
    }

    fn list_done(&mut self, work: &ListWork, fx: &mut Effects) {
        let origin = work.origin;
        let Some(login) = self.sessions.login_mut(origin.conn) else { return };
        // What this session has said is newer than what was written of it.
        let acked = |id: &ConversationId| login.known().get(id).map_or(Seq::ZERO, |known| known.acked);
        let conversations = (work.rows.iter().zip(&work.lasts))
            .map(|(row, last)| Conversation {
                conversation: row.conversation,
                with: row.with.as_str(),
                first: row.first,
                head: last.as_ref().map_or(row.head, |last| last.seq.max(row.head)),
                last_time_ms: row.last_time_ms,
                acked: row.acked.max(acked(&row.conversation)),
                read: row.read,
                pinned: row.pinned,
                muted_until_ms: row.muted_until_ms,
                standing: row.standing,
                title: &row.title,
                last: last.as_ref().map(StoredMessage::as_wire),
            })
            .collect();
        // A short page is not the last one for sure, an empty one is.
        let next = work.rows.last().map_or(ConversationId(0), |row| row.conversation);
        let reply = Reply::ConversationsOk { conversations, next };
        self.sessions.answer(origin.conn, origin.request_id, &reply, fx);
    }

    /// Errors here: `BUSY`, also while another MARK of this user is under way.
    pub(crate) fn mark(&mut self, origin: Origin, mark: Mark, fx: &mut Effects) -> Result<(), ErrorCode> {
        self.may_append()?;
        if !self.may_load() {
            return Err(ErrorCode::Busy);
        }
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        let (user, device, id) = (login.user.clone(), login.key(), mark.conversation);
        // What this session was shown is theirs; a list may learn of a new conversation a moment later.
        let known = login.known().contains_key(&id);
        if !self.marking.insert(user.clone()) {
            return Err(ErrorCode::Busy);
        }
        let query = if known {
            Query::Row { key: RowKey::Mark(user.clone(), id) }
        } else {
            let cursor = ConversationId(id.0.saturating_sub(1));
            Query::Conversations { user: user.clone(), device, cursor, limit: 1 }
        };
        let work = MarkWork { origin, user, mark, stamp: 0, row: MarkRow::default(), pinned: 0 };
        let whole = Whole::Only(self.owner(id.partition()).node());
        self.load_anywhere(Question::Mark(Box::new(work)), (query, whole), fx);
        Ok(())
    }

    pub(crate) fn mark_loaded(&mut self, mut work: Box<MarkWork>, answer: Answer, fx: &mut Effects) {
        let id = work.mark.conversation;
        let next = match answer {
            Answer::Conversations(rows) if rows.iter().any(|row| row.conversation == id) => {
                Ok(Some(Query::Row { key: RowKey::Mark(work.user.clone(), id) }))
            }
            Answer::Conversations(_) => Err(ErrorCode::NoSuchConversation),
            Answer::Row(row) => {
                work.stamp = row.as_ref().map_or(0, |row| row.stamp);
                if let Some(RowValue::Mark(row)) = row.and_then(|row| row.value) {
                    work.row = row;
                }
                let pins = work.mark.pinned == Some(true) && !work.row.pinned;
                Ok(pins.then(|| marks(&work.user, None)))
            }
            Answer::Rows(rows) => {
                let is_pinned = |row: &&Row| matches!(row.value, Some(RowValue::Mark(mark)) if mark.pinned);
                work.pinned += rows.iter().filter(is_pinned).count();
                let full = rows.len() == usize::from(MARKS_PER_QUESTION);
                if work.pinned >= limits::PINS_MAX {
                    Err(ErrorCode::TooManyPins)
                } else {
                    Ok(rows.into_iter().next_back().filter(|_| full).map(|last| marks(&work.user, Some(last.key))))
                }
            }
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Count(_) => Err(ErrorCode::Internal),
        };
        match next.and_then(|next| next.map_or_else(|| self.may_append().map(|()| None), |query| Ok(Some(query)))) {
            Ok(Some(query)) => self.load(Question::Mark(work), query, fx),
            Ok(None) => self.write_mark(*work, fx),
            Err(code) => self.marked(work.origin, &work.user, Err(code), fx),
        }
    }

    /// The node of the conversation is away, or the user is another's.
    pub(crate) fn mark_unavailable(&mut self, work: &MarkWork, fx: &mut Effects) {
        self.marked(work.origin, &work.user, Err(ErrorCode::Unavailable), fx);
    }

    fn write_mark(&mut self, work: MarkWork, fx: &mut Effects) {
        let MarkWork { origin, user, mark, stamp, row, .. } = work;
        if self.is_deleted(&user) {
            return self.marked(origin, &user, Err(ErrorCode::UserDeleted), fx);
        }
        let row = MarkRow {
            pinned: mark.pinned.unwrap_or(row.pinned),
            muted_until_ms: mark.muted_until_ms.unwrap_or(row.muted_until_ms),
        };
        let key = RowKey::Mark(user.clone(), mark.conversation);
        let row = Row { key, stamp: stamp.saturating_add(1), value: Some(RowValue::Mark(row)) };
        let lsn = self.append(Record::Change(Box::new(Change { message: None, rows: vec![row] })), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Mark(origin, user) });
    }

    /// A MARK has ended: its user may make the next.
    pub(crate) fn marked(&mut self, origin: Origin, user: &UserName, result: Result<(), ErrorCode>, fx: &mut Effects) {
        self.marking.remove(user);
        self.tell_done(origin, result, fx);
    }
}

fn marks(user: &UserName, after: Option<RowKey>) -> Query {
    Query::Rows { list: RowList::Marks(user.clone()), after, limit: MARKS_PER_QUESTION }
}
