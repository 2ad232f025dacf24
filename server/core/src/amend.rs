//! AMEND: a sender edits a message, takes it back or deletes it for all. Owned by the shard of the conversation.
//!
//! An amendment is a row of the log like a message: it has a client_seq, a place in the conversation and a delivery, so
//! devices that were away learn of it in their stream. A keyed row beside it says what its original has become, and the
//! store shows that to whoever reads the original. The original is read before the amendment is written, and nothing of
//! its conversation is written in between; amendments that are not on disk yet are remembered in the conversation.
//!
//! Who may: the sender edits and takes back within `amend_window_ms`, and deletes at any time; in a group whoever ranks
//! higher than the sender deletes too. Who may not write (blocked, muted) may not edit either, but may take back; who
//! is no member of the group may do nothing in it.

use std::sync::Arc;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::message::chat::{Amend, AmendAction};
use ringline_schema::message::group::Role;
use ringline_schema::message::{BodyKind, MessageState, Send};
use ringline_schema::record::{Answer, Change, Query, Range, Record, StoredExtra, StoredMessage};
use ringline_schema::rows::{AmendedRow, Row, RowKey, RowValue};

use crate::conversation::Stage;
use crate::event::Effects;
use crate::peer::{Origin, Submit, SubmitMore};
use crate::planted::Bug;
use crate::shard::{Question, Shard};

/// Amendments of one conversation that are on their way to the disk; one more is BUSY.
pub(crate) const AMENDS_IN_FLIGHT_MAX: usize = 64;

/// What a submitted row amends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amending {
    pub refers: Seq,
    pub state: MessageState,
    /// Of the new body.
    pub kind: BodyKind,
    /// It has to come within `amend_window_ms`.
    pub soon: bool,
    /// By a user who was deleted, and may be no member any more.
    pub of_deleted: bool,
}

impl Amending {
    /// Whether it only takes away.
    pub(crate) fn takes_back(&self) -> bool {
        self.state != MessageState::Edited
    }
}

/// An amendment on its way to the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AmendOut {
    pub of: Seq,
    pub by: Seq,
    pub state: MessageState,
}

/// The record of a message: with the row that it makes of another, if it amends one.
pub(crate) fn record_of(message: &Arc<StoredMessage>) -> Record {
    let shared = Arc::clone(message);
    let Some((of, state)) = message.amends() else { return Record::Message(shared) };
    let amended = AmendedRow { state, by: message.seq, at_ms: message.time_ms };
    let (key, value) = (RowKey::Amended(message.conversation, of), Some(RowValue::Amended(amended)));
    let rows = vec![Row { key, stamp: message.seq.0, value }];
    Record::Change(Box::new(Change { message: Some(shared), rows }))
}

impl Shard {
    /// Errors here: those of a SEND, and of [`Shard::hide`] for who deletes for himself. Answered by SEND_ACK or DONE.
    pub(crate) fn amend(&mut self, origin: Origin, amend: &Amend<'_>, fx: &mut Effects) -> Result<(), ErrorCode> {
        let with = UserName::new(amend.with)?;
        let (state, soon) = match amend.action {
            AmendAction::Edit => (MessageState::Edited, true),
            AmendAction::Recall => (MessageState::Recalled, true),
            AmendAction::DeleteForAll => (MessageState::Deleted, false),
            AmendAction::DeleteForMe => return self.hide(origin, (with, amend.seq), fx),
        };
        let body = if state == MessageState::Edited { amend.body } else { &[] };
        let (client_seq, kind) = (amend.client_seq, BodyKind::Amendment);
        let send = Send { to: amend.with, kind, client_seq, body, ..Send::default() };
        self.check_send(&send)?;
        let amending = Amending { refers: amend.seq, state, kind: amend.kind, soon, of_deleted: false };
        let extra = StoredExtra { refers: amend.seq, state, ..StoredExtra::default() };
        let more = SubmitMore { amend: Some(amending), ..SubmitMore::default() };
        let more = (Some(Box::new(extra)), Some(Box::new(more)));
        self.send_durable((origin.conn, origin.request_id), &send, more, fx)
    }

    /// The sender may write here: what does it amend?
    pub(crate) fn read_original(&mut self, submit: Submit, amending: Amending, fx: &mut Effects) {
        let id = submit.message.conversation;
        let may_load = self.may_load();
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        // The store shows those that are on disk by itself.
        let committed = conversation.committed;
        conversation.amends.retain(|amend| amend.by > committed);
        if !may_load || conversation.amends.len() >= AMENDS_IN_FLIGHT_MAX {
            return self.refuse(submit.origin, ErrorCode::Busy, fx);
        }
        conversation.stage = Stage::Loading;
        conversation.waiting.push_front(submit);
        let (after, before) = (Seq(amending.refers.0.saturating_sub(1)), Seq(amending.refers.0.saturating_add(1)));
        let range = Range { after, before: Some(before), limit: 1, bytes_max: u32::MAX, newest: false };
        self.load(Question::Original(id), Query::Messages { conversation: id, range, reader: None }, fx);
    }

    /// The message that the first waiting submit amends, as it is now.
    pub(crate) fn original_loaded(&mut self, id: ConversationId, answer: Answer, fx: &mut Effects) {
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        conversation.stage = Stage::Ready;
        let Some(mut submit) = conversation.waiting.pop_front() else { return };
        match self.judge_amend(&submit, answer).and_then(|()| self.may_append()) {
            Ok(()) => {
                if let Some(extra) = Arc::make_mut(&mut submit.message).extra.as_mut() {
                    extra.amended_ms = self.now.unix_ms;
                }
                if submit.message.to.is_group() {
                    self.write_to_group(submit, fx);
                } else {
                    self.write(submit, fx);
                }
            }
            Err(code) => self.refuse(submit.origin, code, fx),
        }
        self.advance(id, fx);
    }

    /// Errors: `NO_SUCH_MESSAGE` for what is none, or gone; `TRUNCATED`, `NOT_ALLOWED`, `AMEND_TOO_LATE`, `BAD_REQUEST`
    /// when an edit makes something else of it, an image of a text.
    fn judge_amend(&self, submit: &Submit, answer: Answer) -> Result<(), ErrorCode> {
        let amending = submit.amending().ok_or(ErrorCode::Internal)?;
        let Answer::Messages { first, messages, .. } = answer else { return Err(ErrorCode::Internal) };
        let Some(original) = messages.into_iter().find(|message| message.seq == amending.refers) else {
            let truncated = amending.refers != Seq::ZERO && amending.refers < first;
            return Err(if truncated { ErrorCode::Truncated } else { ErrorCode::NoSuchMessage });
        };
        let in_flight = self.conversations.peek(&submit.message.conversation).map_or(&[][..], |known| &known.amends);
        let gone = |amend: &AmendOut| amend.of == amending.refers && amend.state != MessageState::Edited;
        let is_gone = !shows_a_body(&original) || in_flight.iter().any(gone);
        if is_gone && !self.planted.is(Bug::GoneIsAmended) {
            return Err(ErrorCode::NoSuchMessage);
        }
        if original.from != submit.message.from && !self.planted.is(Bug::AnyoneAmends) {
            let deletes = amending.state == MessageState::Deleted;
            return if deletes && self.outranks(submit, &original.from) { Ok(()) } else { Err(ErrorCode::NotAllowed) };
        }
        if amending.soon && self.now.unix_ms > original.time_ms.saturating_add(self.config.amend_window_ms) {
            return Err(ErrorCode::AmendTooLate);
        }
        if amending.state == MessageState::Edited && amending.kind != original.kind {
            return Err(ErrorCode::BadRequest);
        }
        Ok(())
    }

    /// Whether who submits ranks higher in the group than that user, who may have left it: then like a plain member.
    fn outranks(&self, submit: &Submit, sender: &UserName) -> bool {
        let group = self.groups.peek(&submit.message.conversation).and_then(|slot| slot.group.as_ref());
        let role = |user| group.and_then(|group| group.member(user)).map(|member| member.role);
        submit.message.to.is_group()
            && role(&submit.message.from).is_some_and(|own| own > role(sender).unwrap_or(Role::Member))
    }
}

/// Whether it is a message of a user that is still there.
pub(crate) fn shows_a_body(original: &StoredMessage) -> bool {
    let state = original.extra.as_ref().map_or(MessageState::AsSent, |extra| extra.state);
    original.kind.is_for_clients() && matches!(state, MessageState::AsSent | MessageState::Edited)
}
