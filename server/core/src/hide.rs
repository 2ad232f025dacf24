//! AMEND for oneself alone: a message that its reader does not want to see any more. Runs on the shard of the user,
//! which alone writes the rows that say so.
//!
//! The row that says so is with the user, also when another node has the conversation: there this shard lays it over what it
//! reads ([`crate::nodes::veil`]). Errors of such a node that is away: `UNAVAILABLE`.
//!
//! The store shows such a message to this user as one without a body, whose place is kept, so that no device takes it for
//! a gap. The other devices of the user that are online are told by HIDDEN; those that are away find it so when they
//! read. Nobody else hears of it. Asking twice is the same as once.
//!
//! What its sender makes of it later is not for this user either. So the settings of who has ever hidden something say so,
//! written with the first such row, and the devices of such a user are not pushed edits: they are told LAGGED and fetch
//! them, as the store shows them.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::message::{ChatReply, Reply};
use ringline_schema::record::{Answer, Change, Range, Record};
use ringline_schema::rows::{Row, RowKey, RowValue};

use crate::conversation::{Pending, PendingWork};
use crate::event::Effects;
use crate::peer::Origin;
use crate::shard::{Question, Shard};

/// A message that a user deletes for himself.
#[derive(Clone, Debug)]
pub(crate) struct Hiding {
    pub(crate) origin: Origin,
    pub(crate) user: UserName,
    conversation: ConversationId,
    seq: Seq,
    /// The session was given messages up to there: they exist.
    shown: Seq,
    /// It is the first of its user.
    first: bool,
}

impl Shard {
    /// Errors here: `BUSY` and those of a full disk; later `NO_SUCH_MESSAGE`.
    pub(crate) fn hide(
        &mut self,
        origin: Origin,
        (with, seq): (UserName, Seq),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        self.may_append()?;
        if !self.may_load() {
            return Err(ErrorCode::Busy);
        }
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        let (user, conversation) = (login.user.clone(), ConversationId::with(&login.user, &with));
        let shown = login.known().get(&conversation).map_or(Seq::ZERO, |known| known.shown);
        let (after, before) = (Seq(seq.0.saturating_sub(1)), Some(Seq(seq.0.saturating_add(1))));
        let range = Range { after, before, limit: 1, bytes_max: 1, newest: false };
        let reader = Some(user.clone());
        let hiding = Hiding { origin, user, conversation, seq, shown, first: false };
        self.load_messages(Question::Hide(Box::new(hiding)), (conversation, range, reader), fx);
        Ok(())
    }

    /// Whether there is such a message for this user.
    pub(crate) fn hide_loaded(&mut self, mut hiding: Box<Hiding>, answer: Answer, fx: &mut Effects) {
        let found = match answer {
            Answer::Messages { head, messages, .. } => match messages.first() {
                Some(message) if message.seq == hiding.seq && message.kind.is_for_clients() => Ok(()),
                // Another shard has written it, and this one's index has it in a moment.
                None if hiding.seq > head && hiding.seq <= hiding.shown => Err(ErrorCode::Busy),
                Some(_) | None => Err(ErrorCode::NoSuchMessage),
            },
            Answer::NotReadable => Err(ErrorCode::NoSuchMessage),
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Count(_) => Err(ErrorCode::Internal),
        };
        let gone = if self.is_deleted(&hiding.user) { Err(ErrorCode::UserDeleted) } else { Ok(()) };
        if let Err(code) = gone.and(found).and_then(|()| self.may_append()) {
            return self.tell_done(hiding.origin, Err(code), fx);
        }
        let key = RowKey::Hidden(hiding.user.clone(), hiding.conversation, hiding.seq);
        let mut rows = vec![Row { key, stamp: 1, value: Some(RowValue::Hidden) }];
        let Some(settings) = self.settings_mut(&hiding.user) else {
            // They are on their way, or the user has left.
            return self.tell_done(hiding.origin, Err(ErrorCode::Busy), fx);
        };
        hiding.first = !settings.row.hides;
        if hiding.first {
            let (stamp, row) = settings.begin_hiding();
            rows.push(Row { key: RowKey::Setting(hiding.user.clone()), stamp, value: Some(RowValue::Setting(row)) });
            self.tell_hides(&hiding.user);
        }
        let lsn = self.append(Record::Change(Box::new(Change { message: None, rows })), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Hidden(hiding) });
    }

    /// Tells the devices of a user that are here whether they are pushed edits.
    pub(crate) fn tell_hides(&mut self, user: &UserName) {
        let Some(hides) = self.settings(user).map(|settings| settings.row.hides) else { return };
        for conn in self.online.get(user).cloned().unwrap_or_default() {
            if let Some(login) = self.sessions.login_mut(conn) {
                login.hides = hides;
            }
        }
    }

    /// It is on disk.
    pub(crate) fn hidden(&mut self, hiding: &Hiding, result: Result<(), ErrorCode>, fx: &mut Effects) {
        if hiding.first {
            self.settings_written(&hiding.user);
        }
        self.tell_done(hiding.origin, result, fx);
        let Some(conns) = self.online.get(&hiding.user).filter(|_| result.is_ok()) else { return };
        let reply = Reply::Chat(ChatReply::Hidden { conversation: hiding.conversation, seq: hiding.seq });
        for &conn in conns.iter().filter(|&&conn| conn != hiding.origin.conn) {
            self.sessions.offer(conn, &reply, fx);
        }
    }

    pub(crate) fn hide_failed(&mut self, hiding: &Hiding, fx: &mut Effects) {
        self.hidden(hiding, Err(ErrorCode::StoreFailed), fx);
    }
}
