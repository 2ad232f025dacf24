//! The straight way of a transient message: from one session straight into the output of another, without a name made, a
//! message built or an answer matched.
//!
//! Owned by the shard. It is taken when nothing on it needs a second look, and then does what the long way
//! ([`crate::send`]) would do, byte for byte; otherwise it has changed nothing and the long way judges. Whatever is
//! refused, waited for, passed on to another shard or given to several devices goes the long way.

use ringline_schema::codec::{Codec, PlainSend, PlainSender};
use ringline_schema::frame::Flags;
use ringline_schema::ids::Seq;
use ringline_schema::message::{Class, SendAck};

use super::{Pen, Sessions, State, session_limit};
use crate::event::{ConnId, Effects};
use crate::send::NO_CONVERSATION;
use crate::shard::Shard;

impl Shard {
    /// Gives a transient message to a user of this shard, and answers its sender. False: it is not for the straight way,
    /// and nothing has changed.
    pub(crate) fn send_straight(
        &mut self,
        conn: ConnId,
        (codec, request_id, flags): (Codec, u32, Flags),
        send: &PlainSend<'_>,
        fx: &mut Effects,
    ) -> bool {
        let plain = send.class == Class::Transient && send.ack_timeout_ms.is_none();
        if !plain || self.may_send(send.client_seq, send.body).is_err() {
            return false;
        }
        // Who is online here has a name that is one, and is owned by this shard.
        let Some(to) = self.online.plain_device(send.to) else { return false };
        let answered = !flags.contains(Flags::NO_REPLY);
        let way = Way { from: conn, to, codec, answer: answered.then_some(request_id), time_ms: self.now.unix_ms };
        let given = self.sessions.give_straight(&way, send, fx);
        if given && answered {
            self.is_awaited(self.origin(conn, request_id));
        }
        given
    }
}

/// Where a message goes, and how its sender is answered.
struct Way {
    from: ConnId,
    to: ConnId,
    codec: Codec,
    /// The request id of the SEND_ACK, if there is one.
    answer: Option<u32>,
    time_ms: u64,
}

impl Sessions {
    /// False, and nothing has changed: one of the two is not who it should be or does not take output, or the sender
    /// sends too much, or both are the same.
    fn give_straight(&mut self, way: &Way, send: &PlainSend<'_>, fx: &mut Effects) -> bool {
        let limit = session_limit(self.outbox_bytes_max);
        let places = [way.from.slot as usize, way.to.slot as usize];
        let Ok([Some(sender), Some(receiver)]) = self.table.get_disjoint_mut(places) else { return false };
        let receives = receiver.conn == way.to && !receiver.is_draining() && receiver.waiting_bytes() < limit;
        let takes_answer = way.answer.is_none() || sender.waiting_bytes() <= 2 * limit;
        if !receives || sender.conn != way.from || !takes_answer {
            return false;
        }
        let State::LoggedIn(login) = &sender.state else { return false };
        // Last, for it counts.
        if sender.bucket.take(self.now_us, &self.rate).is_err() {
            return false;
        }
        (sender.codec, sender.heard_us) = (way.codec, self.now_us);
        self.counters.requests += 1;
        self.counters.sends_transient += 1;
        self.counters.sends_straight += 1;
        self.counters.delivered += 1;
        let mut pen = Pen { encoder: &mut self.encoder, spare: &mut self.spare, now_us: self.now_us };
        pen.begin(receiver, fx);
        let said = PlainSender { from: login.user.as_str(), device: login.device, time_ms: way.time_ms };
        send.deliver(receiver.codec, &said, &mut receiver.out);
        if let Some(request_id) = way.answer {
            pen.begin(sender, fx);
            let (conversation, seq, time_ms) = (NO_CONVERSATION, Seq::ZERO, way.time_ms);
            let ack = SendAck { conversation, seq, time_ms, dup: false };
            pen.encoder.send_ack(way.codec, request_id, &ack, &mut sender.out);
        }
        true
    }
}
