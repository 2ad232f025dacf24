//! What could not be sent to another node, and what comes from one: who has to hear of it. Owned by the shard.

use ringline_cluster::placement::{NOBODY, ShardIndex};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::Partition;

use crate::event::{Effects, GroupAnswer};
use crate::peer::{ShardMessage, SocialMessage};
use crate::receipt_list::NoReceipts;
use crate::shard::Shard;
use crate::social::presence::Seen;

/// The partition that something is for, if only its owner may take it.
pub(super) fn meant_for(message: &ShardMessage) -> Option<Partition> {
    match message {
        ShardMessage::Submit(submit) => Some(submit.message.conversation.partition()),
        ShardMessage::Transient(send) => Some(send.to.partition()),
        ShardMessage::AskUser(ask) => Some(ask.user.partition()),
        ShardMessage::Fetch { conversation, .. } => Some(conversation.partition()),
        ShardMessage::ReceiptUp(up) => Some(up.conversation.partition()),
        ShardMessage::ReceiptAsk(ask) => Some(ask.conversation.partition()),
        ShardMessage::Social(SocialMessage::Delete(ask)) => Some(ask.user.partition()),
        ShardMessage::Deliver { .. }
        | ShardMessage::SendResult { .. }
        | ShardMessage::Receipt { .. }
        | ShardMessage::UserKnown { .. }
        | ShardMessage::Social(_)
        | ShardMessage::Fetched { .. }
        | ShardMessage::ReceiptNews(_)
        | ShardMessage::ReceiptPage { .. }
        | ShardMessage::Done { .. }
        | ShardMessage::Flush { .. }
        | ShardMessage::Flushed { .. }
        | ShardMessage::Online { .. }
        | ShardMessage::Visit(_)
        | ShardMessage::GroupAnswered { .. }
        | ShardMessage::DeliverGroup { .. }
        | ShardMessage::PassGroup { .. }
        | ShardMessage::GroupReached { .. }
        | ShardMessage::PushGroup { .. }
        | ShardMessage::OnlinePage { .. }
        | ShardMessage::Read { .. }
        | ShardMessage::ReadDone { .. }
        | ShardMessage::Missed
        | ShardMessage::Moved { .. } => None,
    }
}

impl Shard {
    /// Something has not gone out to a shard of another node, and will not: whoever waits is told, what devices are
    /// pushed is made good later.
    pub(crate) fn undelivered(&mut self, to: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        let gone = ErrorCode::Unavailable;
        match message {
            ShardMessage::Submit(submit) | ShardMessage::Visit(submit) => self.refuse_submit(&submit, gone, fx),
            ShardMessage::Transient(send) => self.answer_send(send.origin, (false, Err(gone)), None, fx),
            ShardMessage::AskUser(ask) => self.user_known(ask.conversation, &ask.user, Err(gone), fx),
            ShardMessage::Fetch { origin, .. } => self.tell_done(origin, Err(gone), fx),
            ShardMessage::ReceiptUp(up) => {
                if let Some(origin) = up.origin {
                    self.tell_done(origin, Err(gone), fx);
                }
            }
            ShardMessage::ReceiptAsk(ask) => self.receipts_answer(ask.origin, Err(NoReceipts::Refused(gone)), fx),
            ShardMessage::Online { origin, .. } => self.online_page(origin, to, (Vec::new(), false), fx),
            ShardMessage::Flush { conn, number } => self.flushed((conn, number), false, fx),
            ShardMessage::Read { number, .. } => self.read_lost(number, to.node(), fx),
            ShardMessage::PassGroup { pass, .. } => {
                if pass.gather != 0 {
                    self.passed(pass.gather, 0, fx);
                }
            }
            ShardMessage::Deliver { message, wanted } => {
                self.not_pushed(to);
                if let Some(wanted) = wanted {
                    self.tell_timeout(wanted.origin, &message, fx);
                }
            }
            ShardMessage::DeliverGroup { .. }
            | ShardMessage::PushGroup { .. }
            | ShardMessage::Missed
            | ShardMessage::Moved { .. } => self.not_pushed(to),
            ShardMessage::SendResult { origin, durable, result, copy } => {
                if copy.is_some() {
                    self.not_pushed(to);
                }
                self.keep_answer(to, ShardMessage::SendResult { origin, durable, result, copy: None });
            }
            ShardMessage::ReceiptNews(_) => self.sessions.counters.receipts_untold += 1,
            ShardMessage::Social(message) => self.undelivered_social(message, fx),
            answer @ (ShardMessage::Receipt { .. }
            | ShardMessage::UserKnown { .. }
            | ShardMessage::Done { .. }
            | ShardMessage::Flushed { .. }
            | ShardMessage::GroupReached { .. }
            | ShardMessage::GroupAnswered { answer: GroupAnswer::Ok { .. }, .. }) => self.keep_answer(to, answer),
            // Who waits for these is told at the other node, by its own clock if by nothing else.
            ShardMessage::Fetched { .. }
            | ShardMessage::ReceiptPage { .. }
            | ShardMessage::GroupAnswered { .. }
            | ShardMessage::OnlinePage { .. }
            | ShardMessage::ReadDone { .. } => {}
        }
    }

    fn undelivered_social(&mut self, message: SocialMessage, fx: &mut Effects) {
        match message {
            SocialMessage::Signal(signal) => self.refuse_signal(&signal, ErrorCode::Unavailable, fx),
            SocialMessage::AskAgain { gather, .. } | SocialMessage::PrivacyChanged { gather, .. } => {
                self.gather_failed(gather, ErrorCode::Unavailable, fx);
            }
            // As if away; asked again with the next refresh.
            SocialMessage::Watch { users, gather } => {
                self.shown(users.into_iter().map(Seen::nothing).collect(), gather, fx);
            }
            SocialMessage::Delete(ask) => self.tell_done(ask.origin, Err(ErrorCode::Unavailable), fx),
            SocialMessage::Notice(notice) => self.noticed(notice.gather, 0, fx),
            SocialMessage::Refused { .. }
            | SocialMessage::Seen { .. }
            | SocialMessage::Noticed { .. }
            | SocialMessage::Passed { .. }
            | SocialMessage::NotWatched { .. }
            | SocialMessage::Part { .. } => {}
        }
    }

    fn not_pushed(&mut self, to: ShardIndex) {
        // Whoever owns it next hears of it.
        if to == NOBODY {
            return;
        }
        // When it is down, its next `Up` is what it is told with.
        if self.nodes.as_mut().is_some_and(|nodes| nodes.missed(to.node())) {
            self.nodes_again();
        }
    }

    /// Judges what a shard of another node says. `None`: it has been dealt with.
    pub(crate) fn take_from_node(
        &mut self,
        from: ShardIndex,
        message: ShardMessage,
        fx: &mut Effects,
    ) -> Option<ShardMessage> {
        if !self.is_moving() && meant_for(&message).is_some_and(|partition| !self.is_here(self.owner(partition))) {
            // The other node counted other cores here: it has yet to hear that this one has started again.
            self.not_served(from, message, fx);
            return None;
        }
        let own = self.config.shard;
        let origin = match &message {
            ShardMessage::SendResult { origin, .. }
            | ShardMessage::Fetched { origin, .. }
            | ShardMessage::ReceiptPage { origin, .. }
            | ShardMessage::Done { origin, .. }
            | ShardMessage::OnlinePage { origin, .. } => *origin,
            // Whether it is still awaited is looked at where it is told: some come from this node.
            ShardMessage::GroupAnswered { origin, .. } => return (origin.shard == own).then_some(message),
            ShardMessage::Submit(_)
            | ShardMessage::Transient(_)
            | ShardMessage::Deliver { .. }
            | ShardMessage::Receipt { .. }
            | ShardMessage::AskUser(_)
            | ShardMessage::UserKnown { .. }
            | ShardMessage::Social(_)
            | ShardMessage::Fetch { .. }
            | ShardMessage::ReceiptUp(_)
            | ShardMessage::ReceiptNews(_)
            | ShardMessage::ReceiptAsk(_)
            | ShardMessage::Flush { .. }
            | ShardMessage::Flushed { .. }
            | ShardMessage::Online { .. }
            | ShardMessage::Visit(_)
            | ShardMessage::DeliverGroup { .. }
            | ShardMessage::PassGroup { .. }
            | ShardMessage::GroupReached { .. }
            | ShardMessage::PushGroup { .. }
            | ShardMessage::Read { .. }
            | ShardMessage::ReadDone { .. }
            | ShardMessage::Missed
            | ShardMessage::Moved { .. } => return Some(message),
        };
        if origin.shard != own || self.is_awaited(origin) {
            return (origin.shard == own).then_some(message);
        }
        let ShardMessage::SendResult { durable, result, copy, .. } = message else { return None };
        if let Some(copy) = copy {
            // Its request was answered when the node seemed gone. The other devices of the sender still want it.
            self.copy_to_own(origin.conn, &copy, fx);
        } else if let Err(code) = result
            && !durable
        {
            // Of a send that only failures are told of.
            self.sessions.fail(origin.conn, origin.request_id, code, fx);
        }
        None
    }
}
