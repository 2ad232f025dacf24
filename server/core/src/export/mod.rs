//! EXPORT: everything that is kept about a user, as lines of JSON, page by page. Runs on the shard of the user.
//!
//! [`Exporter`] is pure and serves `ringline store export --user` as well. In order: the account without its password's
//! hash, settings, devices, blocked users, and the conversation list, each conversation followed by the messages that this
//! user may read, as he is shown them. What other shards have committed may be missing for a moment, as in FETCH.
//! Invariants: a page is at most `bytes_max` long; a longer line is cut and goes on in the next page, so who puts the
//! pages together has whole lines; pages may be asked for again. [`EXPORTS_IN_FLIGHT_MAX`] a shard.

pub mod lines;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{ChatReply, Reply};
use ringline_schema::record::{Answer, Query, Range};
use ringline_schema::rows::{Row, RowKey, RowList};
use serde_json::Value;

use crate::config::{EXPORT_QUESTIONS_MAX, EXPORTS_IN_FLIGHT_MAX};
use crate::event::Effects;
use crate::nodes::reads::Whole;
use crate::peer::Origin;
use crate::planted::Bug;
use crate::shard::{Question, Shard};

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Account,
    Settings,
    /// Behind this one.
    Devices(Option<DeviceId>),
    Blocks(Option<UserName>),
    Conversations(ConversationId),
    Messages(ConversationId, Seq),
    End,
}

/// One page on its way.
#[derive(Debug)]
pub struct Exporter {
    user: UserName,
    at: Place,
    /// Bytes of the next line that an earlier page has.
    given: usize,
    page: Vec<u8>,
    bytes_max: usize,
    full: bool,
}

impl Exporter {
    /// `cursor`: as [`Exporter::finish`] gave it, empty for the first page. `None`: it is none.
    pub fn new(user: UserName, cursor: &str, bytes_max: usize) -> Option<Self> {
        let (given, at) = match cursor {
            "" => (0, Place::Account),
            cursor => {
                let (given, place) = cursor.split_once(':')?;
                (given.parse().ok()?, Place::decode(place)?)
            }
        };
        Some(Self { user, at, given, page: Vec::new(), bytes_max: bytes_max.max(1), full: false })
    }

    /// What the store is asked next; `None`: the page is full, or this was all.
    pub fn question(&self) -> Option<Query> {
        let user = self.user.clone();
        let rows = |list, after| Query::Rows { list, after, limit: limits::PAGE_ROWS_MAX };
        if self.full {
            return None;
        }
        Some(match &self.at {
            Place::Account => Query::User { name: user },
            Place::Settings => Query::Row { key: RowKey::Setting(user) },
            Place::Devices(after) => {
                rows(RowList::Devices(user.clone()), after.map(|device| RowKey::Device(user, device)))
            }
            Place::Blocks(after) => {
                rows(RowList::Blocks(user.clone()), after.clone().map(|other| RowKey::Block(user, other)))
            }
            Place::Conversations(cursor) => {
                Query::Conversations { user, device: DeviceKey(0), cursor: *cursor, limit: 1 }
            }
            Place::Messages(conversation, after) => {
                let (limit, bytes_max) = (limits::PAGE_ROWS_MAX, u32::try_from(self.bytes_max).unwrap_or(u32::MAX));
                let range = Range { after: *after, before: None, limit, bytes_max, newest: false };
                Query::Messages { conversation: *conversation, range, reader: Some(user) }
            }
            Place::End => return None,
        })
    }

    /// Takes the answer to the last question. Errors: `NO_SUCH_USER`; `INTERNAL` when the store can't read.
    pub fn take(&mut self, answer: Answer) -> Result<(), ErrorCode> {
        match (self.at.clone(), answer) {
            (Place::Account, Answer::User(Some(user))) => {
                if self.put(&lines::user_line(&user)) {
                    self.at = Place::Settings;
                }
            }
            (Place::Account, Answer::User(None)) => return Err(ErrorCode::NoSuchUser),
            (Place::Settings, Answer::Row(row)) => {
                if row.is_none_or(|row| self.put(&lines::row_line(&row))) {
                    self.at = Place::Devices(None);
                }
            }
            (Place::Devices(_), Answer::Rows(rows)) => self.rows(&rows, Place::Blocks(None)),
            (Place::Blocks(_), Answer::Rows(rows)) => self.rows(&rows, Place::Conversations(ConversationId(0))),
            (Place::Conversations(_), Answer::Conversations(rows)) => match rows.first() {
                None => self.at = Place::End,
                Some(row) if self.put(&lines::listed_line(row)) => {
                    self.at = Place::Messages(row.conversation, Seq::ZERO);
                }
                Some(_) => {}
            },
            (Place::Messages(id, _), Answer::NotReadable) => self.at = Place::Conversations(id),
            (Place::Messages(id, _), Answer::Messages { messages, .. }) => {
                if messages.is_empty() {
                    self.at = Place::Conversations(id);
                }
                for message in messages {
                    if !self.put(&lines::message_line(&message)) {
                        break;
                    }
                    self.at = Place::Messages(id, message.seq);
                }
            }
            (_, _) => return Err(ErrorCode::Internal),
        }
        Ok(())
    }

    /// The page, and the cursor of the next one; empty: there is none.
    pub fn finish(self) -> (Vec<u8>, String) {
        let next = if self.at == Place::End { String::new() } else { format!("{}:{}", self.given, self.at.encode()) };
        (self.page, next)
    }

    /// Rows of a list; `then` when it ends here.
    fn rows(&mut self, rows: &[Row], then: Place) {
        for row in rows {
            if !self.put(&lines::row_line(row)) {
                return;
            }
            match &row.key {
                RowKey::Device(_, device) => self.at = Place::Devices(Some(*device)),
                RowKey::Block(_, other) => self.at = Place::Blocks(Some(other.clone())),
                _ => {}
            }
        }
        if rows.len() < usize::from(limits::PAGE_ROWS_MAX) {
            self.at = then;
        }
    }

    /// Whether the line is in the page to its end.
    fn put(&mut self, line: &Value) -> bool {
        let text = format!("{line}\n").into_bytes();
        // A line that has become shorter meanwhile was given to its end.
        let rest = text.get(self.given..).unwrap_or_default();
        let room = self.bytes_max.saturating_sub(self.page.len());
        if rest.len() <= room {
            self.page.extend_from_slice(rest);
            self.given = 0;
            return true;
        }
        self.full = true;
        if self.page.is_empty() {
            self.page.extend_from_slice(rest.get(..room).unwrap_or_default());
            self.given += room;
        }
        false
    }
}

impl Place {
    fn encode(&self) -> String {
        match self {
            Self::Account => "a".to_owned(),
            Self::Settings => "s".to_owned(),
            Self::Devices(after) => after.map_or("d".to_owned(), |device| format!("d{}", device.0)),
            Self::Blocks(after) => after.as_ref().map_or("b".to_owned(), |other| format!("b{}", other.as_str())),
            Self::Conversations(cursor) => format!("c{:x}", cursor.0),
            Self::Messages(conversation, after) => format!("m{:x},{}", conversation.0, after.0),
            Self::End => String::new(),
        }
    }

    fn decode(text: &str) -> Option<Self> {
        let id = |text| u128::from_str_radix(text, 16).ok().map(ConversationId);
        let kind = text.chars().next()?;
        let rest = text.get(kind.len_utf8()..)?;
        Some(match (kind, rest) {
            ('a', "") => Self::Account,
            ('s', "") => Self::Settings,
            ('d', "") => Self::Devices(None),
            ('d', device) => Self::Devices(Some(DeviceId(device.parse().ok()?))),
            ('b', "") => Self::Blocks(None),
            ('b', other) => Self::Blocks(Some(UserName::new(other).ok()?)),
            ('c', cursor) => Self::Conversations(id(cursor)?),
            ('m', place) => {
                let (conversation, after) = place.split_once(',')?;
                Self::Messages(id(conversation)?, Seq(after.parse().ok()?))
            }
            _ => return None,
        })
    }
}

/// An EXPORT under way.
#[derive(Debug)]
pub(crate) struct ExportWork {
    origin: Origin,
    exporter: Exporter,
    questions_left: u32,
}

impl Shard {
    /// Errors: `BAD_REQUEST` for a cursor that is none, `BUSY`.
    pub(crate) fn export(&mut self, origin: Origin, cursor: &str, fx: &mut Effects) -> Result<(), ErrorCode> {
        self.may_page(origin.conn)?;
        if self.exports >= EXPORTS_IN_FLIGHT_MAX {
            return Err(ErrorCode::Busy);
        }
        let user = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?.user.clone();
        let bytes_max = self.config.frame_bytes_max as usize / 2;
        let exporter = Exporter::new(user, cursor, bytes_max).ok_or(ErrorCode::BadRequest)?;
        self.exports += 1;
        self.export_on(Box::new(ExportWork { origin, exporter, questions_left: EXPORT_QUESTIONS_MAX }), fx);
        Ok(())
    }

    fn export_on(&mut self, mut work: Box<ExportWork>, fx: &mut Effects) {
        let question = work.exporter.question().filter(|_| work.questions_left > 0);
        if let Some(mut query) = question {
            if let (Query::Messages { reader, .. }, true) = (&mut query, self.planted.is(Bug::ExportUnread)) {
                *reader = None;
            }
            work.questions_left -= 1;
            return self.load_anywhere(Question::Export(work), (query, Whole::All), fx);
        }
        self.exports = self.exports.saturating_sub(1);
        let origin = work.origin;
        let (body, next) = work.exporter.finish();
        let reply = Reply::Chat(ChatReply::ExportOk { body: &body, next: &next });
        self.sessions.answer(origin.conn, origin.request_id, &reply, fx);
    }

    /// A node is away: what it has is missing, and who exports wants all.
    pub(crate) fn export_unavailable(&mut self, work: &ExportWork, fx: &mut Effects) {
        self.exports = self.exports.saturating_sub(1);
        self.sessions.fail(work.origin.conn, work.origin.request_id, ErrorCode::Unavailable, fx);
    }

    pub(crate) fn export_loaded(&mut self, mut work: Box<ExportWork>, answer: Answer, fx: &mut Effects) {
        match work.exporter.take(answer) {
            Ok(()) => self.export_on(work, fx),
            Err(code) => {
                self.exports = self.exports.saturating_sub(1);
                self.sessions.fail(work.origin.conn, work.origin.request_id, code, fx);
            }
        }
    }
}
