//! RECEIPTS: who has received and read one message, with counts. Served by the owner of the conversation, which pages
//! through its rows of members and receipts.
//!
//! Invariants: at most [`RECEIPT_LISTS_MAX`] under way a shard, each holding the members of one conversation; a page fits
//! into a frame. Only who may read a message is told who else has it.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, ConversationKind, Seq, UserName};
use ringline_schema::message::chat::MemberReceipt;
use ringline_schema::message::{ChatReply, Reply, Standing};
use ringline_schema::record::{Answer, Query, Range, StoredMessage};
use ringline_schema::rows::{ReceiptRow, Row, RowKey, RowList, RowValue};

use crate::config::RECEIPT_LISTS_MAX;
use crate::event::{Effects, ShardMessage};
use crate::peer::Origin;
use crate::planted::Bug;
use crate::shard::{Question, Shard};

/// Rows asked of the store at once.
const ROWS_PER_QUESTION: u16 = 1_000;

/// A question for receipts, on its way to the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptAsk {
    pub origin: Origin,
    pub user: UserName,
    pub conversation: ConversationId,
    pub seq: Seq,
    /// Only rows behind this name.
    pub after: Option<UserName>,
    pub limit: u16,
}

/// The answer, on its way back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptPage {
    pub members: u32,
    pub delivered: u32,
    pub read: u32,
    pub rows: Vec<(UserName, ReceiptRow)>,
    pub more: bool,
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoReceipts {
    Refused(ErrorCode),
    /// The message is older than what is kept.
    Truncated {
        conversation: ConversationId,
        first: Seq,
    },
}

/// One under way at the owner.
#[derive(Debug)]
pub(crate) struct ReceiptList {
    ask: ReceiptAsk,
    /// Everyone but the sender, once it is known who that is.
    members: BTreeMap<UserName, ReceiptRow>,
    sender: Option<UserName>,
    /// The members are known; what is read now are receipts.
    counted: bool,
}

impl ReceiptList {
    pub(crate) fn conversation(&self) -> ConversationId {
        self.ask.conversation
    }

    /// Who has to have the message: in a direct conversation the other user, in a group whoever is a member now.
    fn message(&mut self, message: StoredMessage) -> Result<RowList, NoReceipts> {
        let conversation = self.ask.conversation;
        if conversation.kind() == Some(ConversationKind::Group) {
            self.sender = Some(message.from);
            return Ok(RowList::Members(conversation));
        }
        if message.from != self.ask.user && message.to != self.ask.user {
            return Err(NoReceipts::Refused(ErrorCode::NoSuchConversation));
        }
        if message.to != message.from {
            self.members.insert(message.to, ReceiptRow::default());
        }
        self.sender = Some(message.from);
        self.counted = true;
        Ok(RowList::Receipts(conversation))
    }

    fn row(&mut self, row: Row) {
        match (row.key, row.value) {
            (RowKey::Member(_, user), Some(RowValue::Member(member))) => {
                if member.standing == Standing::Member && self.sender.as_ref() != Some(&user) {
                    self.members.insert(user, ReceiptRow::default());
                }
            }
            (RowKey::Receipt(_, user), Some(RowValue::Receipt(receipt))) => {
                if let Some(known) = self.members.get_mut(&user) {
                    *known = receipt;
                }
            }
            (_, _) => debug_assert!(false, "a row of another list"),
        }
    }

    fn page(&self) -> ReceiptPage {
        let count = |place: fn(&ReceiptRow) -> Seq| {
            self.members.values().filter(|row| place(row) >= self.ask.seq).count() as u32
        };
        let start = self.ask.after.as_ref().map_or(Unbounded, Excluded);
        let mut behind = self.members.range::<UserName, _>((start, Unbounded));
        let rows = behind.by_ref().take(usize::from(self.ask.limit)).map(|(user, row)| (user.clone(), *row)).collect();
        ReceiptPage {
            members: self.members.len() as u32,
            delivered: count(|row| row.delivered),
            read: count(|row| row.read),
            rows,
            more: behind.next().is_some(),
        }
    }
}

impl Shard {
    /// RECEIPTS, on the shard of its session. Errors here: `BUSY`, `BAD_NAME` for a cursor that is none, `BAD_REQUEST`.
    pub(crate) fn receipts(
        &mut self,
        origin: Origin,
        (conversation, seq): (ConversationId, Seq),
        (cursor, limit): (&str, u16),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        self.may_page(origin.conn)?;
        if seq == Seq::ZERO {
            return Err(ErrorCode::BadRequest);
        }
        let after = if cursor.is_empty() { None } else { Some(UserName::new(cursor)?) };
        let limit = self.page_rows(limit);
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        let ask = ReceiptAsk { origin, user: login.user.clone(), conversation, seq, after, limit };
        let owner = self.owner(conversation.partition());
        if self.is_here(owner) {
            self.receipts_asked(ask, fx);
        } else if self.is_blocked(owner) {
            return Err(ErrorCode::Busy);
        } else {
            self.tell_shard(owner, ShardMessage::ReceiptAsk(Box::new(ask)), fx);
        }
        Ok(())
    }

    /// At the owner: first the message, which tells its sender and whether the asker may read it.
    pub(crate) fn receipts_asked(&mut self, ask: ReceiptAsk, fx: &mut Effects) {
        if self.receipt_lists >= RECEIPT_LISTS_MAX || !self.may_load() {
            return self.receipts_answer(ask.origin, Err(NoReceipts::Refused(ErrorCode::Busy)), fx);
        }
        self.receipt_lists += 1;
        let range = Range {
            after: Seq(ask.seq.0.saturating_sub(1)),
            before: ask.seq.0.checked_add(1).map(Seq),
            limit: 1,
            bytes_max: 1,
            newest: false,
        };
        let (conversation, reader) = (ask.conversation, Some(ask.user.clone()));
        let list = ReceiptList { ask, members: BTreeMap::new(), sender: None, counted: false };
        self.load(Question::Receipts(Box::new(list)), Query::Messages { conversation, range, reader }, fx);
    }

    pub(crate) fn receipts_loaded(&mut self, mut list: Box<ReceiptList>, answer: Answer, fx: &mut Effects) {
        let refused = |code| Err(NoReceipts::Refused(code));
        let conversation = list.ask.conversation;
        let next = match answer {
            Answer::Messages { first, mut messages, .. } => match messages.pop() {
                Some(message) => {
                    let rows = list.message(message).map(|rows| (rows, None));
                    if self.planted.is(Bug::SenderIsCounted) {
                        list.sender = None;
                    }
                    rows
                }
                None if list.ask.seq < first => Err(NoReceipts::Truncated { conversation, first }),
                None => refused(ErrorCode::NoSuchMessage),
            },
            Answer::NotReadable => refused(ErrorCode::NoSuchConversation),
            Answer::Rows(rows) => {
                let full = rows.len() == usize::from(ROWS_PER_QUESTION);
                let last = rows.last().map(|row| row.key.clone());
                rows.into_iter().for_each(|row| list.row(row));
                let counted = list.counted;
                list.counted |= !full;
                match (counted, full) {
                    (false, true) => Ok((RowList::Members(conversation), last)),
                    (false, false) => Ok((RowList::Receipts(conversation), None)),
                    (true, true) => Ok((RowList::Receipts(conversation), last)),
                    (true, false) => return self.receipts_done(&list, fx),
                }
            }
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Count(_) => refused(ErrorCode::Internal),
        };
        match next {
            Ok((rows, after)) => {
                let query = Query::Rows { list: rows, after, limit: ROWS_PER_QUESTION };
                self.load(Question::Receipts(list), query, fx);
            }
            Err(why) => {
                self.receipt_lists = self.receipt_lists.saturating_sub(1);
                self.receipts_answer(list.ask.origin, Err(why), fx);
            }
        }
    }

    /// The conversation is another's.
    pub(crate) fn receipts_unavailable(&mut self, list: &ReceiptList, fx: &mut Effects) {
        self.receipt_lists = self.receipt_lists.saturating_sub(1);
        self.receipts_answer(list.ask.origin, Err(NoReceipts::Refused(ErrorCode::Unavailable)), fx);
    }

    fn receipts_done(&mut self, list: &ReceiptList, fx: &mut Effects) {
        self.receipt_lists = self.receipt_lists.saturating_sub(1);
        self.receipts_answer(list.ask.origin, Ok(list.page()), fx);
    }

    /// Answers, here or on the shard that asked.
    pub(crate) fn receipts_answer(
        &mut self,
        origin: Origin,
        result: Result<ReceiptPage, NoReceipts>,
        fx: &mut Effects,
    ) {
        if !self.is_here(origin.shard) {
            let page = Box::new(result);
            return self.tell_shard(origin.shard, ShardMessage::ReceiptPage { origin, page }, fx);
        }
        let (conn, request_id) = (origin.conn, origin.request_id);
        let reply = match &result {
            Ok(page) => {
                let rows = page.rows.iter();
                ChatReply::ReceiptsOk {
                    members: page.members,
                    delivered: page.delivered,
                    read: page.read,
                    rows: rows
                        .map(|(user, row)| MemberReceipt {
                            user: user.as_str(),
                            delivered: row.delivered,
                            read: row.read,
                        })
                        .collect(),
                    next: page.rows.last().filter(|_| page.more).map_or("", |(user, _)| user.as_str()),
                }
            }
            Err(NoReceipts::Truncated { conversation, first }) => {
                ChatReply::Truncated { conversation: *conversation, first: *first }
            }
            Err(NoReceipts::Refused(code)) => return self.sessions.fail(conn, request_id, *code, fx),
        };
        self.sessions.answer(conn, request_id, &Reply::Chat(reply), fx);
    }
}
