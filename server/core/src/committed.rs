//! What follows the commit of durable messages to users: the senders' answers, and the deliveries.
//!
//! A commit holds many messages, and those that a device sent one after the other to one user stand in a row in it. They
//! are a [run](Shard::run_committed): conversation, sender and receiver are looked up once for all of them. Each still has
//! an answer and deliveries of its own, in order.

use std::sync::Arc;

use bytes::Bytes;
use ringline_schema::ids::ConversationId;
use ringline_schema::message::SendAck;
use ringline_schema::record::StoredMessage;

use crate::conversation::{Pending, PendingWork};
use crate::deletion::walk::DELETER;
use crate::event::{Effects, ShardMessage};
use crate::peer::{Origin, Wanted};
use crate::shard::Shard;

/// Messages that are looked at together, at most.
const RUN_MESSAGES_MAX: usize = 256;
/// Blocks of messages that are kept for the next ones, 160 bytes each.
const SPARE_MESSAGES_MAX: usize = 4096;

/// A message on its way to the disk, and who waits for it.
#[derive(Debug)]
pub(crate) struct Sent {
    pub message: Arc<StoredMessage>,
    pub origin: Origin,
    pub ack_timeout_ms: Option<u32>,
}

impl Sent {
    /// A connection is one device for as long as it is logged in, so these two have one sender; and the conversation of
    /// two users one receiver for each. What deleted users take back has no connection.
    fn follows(&self, first: &Self) -> bool {
        let key = |sent: &Self| (sent.origin.conn, sent.origin.shard, sent.message.conversation);
        key(self) == key(first) && self.origin.conn != DELETER
    }

    pub(crate) fn ack(&self) -> SendAck {
        let message = &self.message;
        SendAck { conversation: message.conversation, seq: message.seq, time_ms: message.time_ms, dup: false }
    }

    fn wanted(&self) -> Option<Wanted> {
        self.ack_timeout_ms.map(|timeout_ms| Wanted { origin: self.origin, timeout_ms })
    }
}

/// Memory of messages that were delivered, for those that come: at load none is taken and none is given back. Bounded.
#[derive(Default)]
pub(crate) struct SpareMessages(Vec<Arc<StoredMessage>>);

impl SpareMessages {
    /// The message, where another one was.
    pub(crate) fn place(&mut self, message: StoredMessage) -> Arc<StoredMessage> {
        let Some(mut block) = self.0.pop() else { return Arc::new(message) };
        match Arc::get_mut(&mut block) {
            Some(place) => *place = message,
            None => return Arc::new(message),
        }
        block
    }

    /// Keeps the block of a message that nobody else has, and lets go of its body.
    fn keep(&mut self, mut block: Arc<StoredMessage>) {
        if self.0.len() < SPARE_MESSAGES_MAX
            && let Some(message) = Arc::get_mut(&mut block)
        {
            (message.body, message.extra) = (Bytes::new(), None);
            self.0.push(block);
        }
    }
}

impl Shard {
    /// Answers and delivers the run of messages that is first among those that wait, as far as it is durable.
    pub(crate) fn message_stored(&mut self, upto: u64, fx: &mut Effects) {
        let mut run = std::mem::take(&mut self.run);
        while let Some(Pending { lsn, work: PendingWork::Message(sent), .. }) = self.pending.front()
            && *lsn <= upto
            && run.len() < RUN_MESSAGES_MAX
            && run.first().is_none_or(|first| sent.follows(first))
        {
            let Some(Pending { weight, work: PendingWork::Message(sent), .. }) = self.pending.pop_front() else {
                break;
            };
            self.pending_bytes -= weight;
            run.push(sent);
        }
        self.run_committed(&run, fx);
        for Sent { message, .. } in run.drain(..) {
            self.spare_messages.keep(message);
        }
        self.run = run;
    }

    fn run_committed(&mut self, run: &[Sent], fx: &mut Effects) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return };
        let (origin, id) = (first.origin, first.message.conversation);
        if let Some(conversation) = self.conversations.peek_mut(&id) {
            debug_assert_eq!(conversation.committed.next(), first.message.seq, "commits are dense");
            conversation.committed = last.message.seq;
            conversation.in_flight -= run.len() as u64;
            debug_assert!(run.iter().map(|sent| sent.message.seq).is_sorted(), "and in order");
        }
        self.sessions.counters.accepted += run.len() as u64;
        if self.is_here(origin.shard) && origin.conn != DELETER {
            self.answer_run(origin, id, run, fx);
        } else {
            for sent in run {
                self.answer_send(sent.origin, (true, Ok(sent.ack())), Some(&sent.message), fx);
            }
        }
        let target = self.owner(first.message.to.partition());
        if self.is_here(target) {
            return self.deliver(run, fx);
        }
        for sent in run {
            let (message, wanted) = (Arc::clone(&sent.message), sent.wanted());
            self.tell_shard(target, ShardMessage::Deliver { message, wanted }, fx);
        }
    }

    /// The end of the sends of a run, at their origin.
    fn answer_run(&mut self, origin: Origin, id: ConversationId, run: &[Sent], fx: &mut Effects) {
        let Some(last) = run.last() else { return };
        let mut alone = false;
        if let Some(login) = self.sessions.login_mut(origin.conn) {
            alone = login.alone;
            login.sends_in_flight = login.sends_in_flight.saturating_sub(run.len() as u32);
            login.show(id, last.message.seq);
        }
        self.sessions.answer_run(origin.conn, run, fx);
        // In a chat with oneself they are its receivers.
        if !alone
            && last.message.from != last.message.to
            && let Some(conns) = self.online.get(&last.message.from)
        {
            for &conn in conns.iter().filter(|&&conn| conn != origin.conn) {
                self.sessions.deliver_run(conn, run, &last.message.to, fx);
            }
        }
    }

    /// Gives committed messages of one sender to every device of their receiver that is online here.
    pub(crate) fn deliver(&mut self, run: &[Sent], fx: &mut Effects) {
        for sent in run {
            if let Some(wanted) = sent.wanted() {
                self.await_ack(&sent.message, wanted, fx);
            }
        }
        let Some(message) = run.last().map(|sent| &sent.message) else { return };
        let to = self.receiver(message);
        let Some(conns) = self.online.get(to) else { return };
        for &conn in conns {
            self.sessions.deliver_run(conn, run, &message.from, fx);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::ids::{DeviceId, Seq, UserName};
    use ringline_schema::message::BodyKind;

    fn message(seq: u64) -> StoredMessage {
        let [ann, bob] = ["ann", "bob"].map(|name| UserName::new(name).unwrap());
        StoredMessage {
            conversation: ConversationId::direct(&ann, &bob),
            seq: Seq(seq),
            from: ann,
            to: bob,
            device: DeviceId(1),
            client_seq: seq,
            time_ms: 1,
            kind: BodyKind::Text,
            body: Bytes::from(vec![seq as u8; 10]),
            extra: None,
        }
    }

    #[test]
    fn a_block_is_used_again_only_when_nobody_has_its_message() {
        let mut spare = SpareMessages::default();
        let first = spare.place(message(1));
        let (shared, place) = (Arc::clone(&first), Arc::as_ptr(&first));
        spare.keep(first);
        let second = spare.place(message(2));
        assert_ne!(Arc::as_ptr(&second), place, "somebody still has it");
        assert_eq!(*shared, message(1));
        let (body, place) = (second.body.clone(), Arc::as_ptr(&second));
        spare.keep(second);
        assert!(body.is_unique(), "a body goes when its message does");
        let third = spare.place(message(3));
        assert_eq!((Arc::as_ptr(&third), &*third), (place, &message(3)));
        let blocks: Vec<_> = (0..2 * SPARE_MESSAGES_MAX as u64).map(|seq| spare.place(message(seq))).collect();
        blocks.into_iter().for_each(|block| spare.keep(block));
        assert_eq!(spare.0.len(), SPARE_MESSAGES_MAX);
    }
}
