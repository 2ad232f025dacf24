//! Writes what a commit gives one connection: the answers and deliveries of a run of messages, with one look at the
//! connection for all that fits and needs no second look.
//!
//! Owned by the shard. What is left of a run goes message by message, with all the rules of [`super`].

use ringline_schema::ids::UserName;
use ringline_schema::message::Reply;

use super::{Pen, Session, Sessions, session_limit};
use crate::committed::Sent;
use crate::event::{ConnId, Effects};

impl Sessions {
    /// Queues durable deliveries of one conversation, in order, or notes that the device lags. `with` names the
    /// conversation to the device.
    pub(crate) fn deliver_run(&mut self, conn: ConnId, run: &[Sent], with: &UserName, fx: &mut Effects) {
        let (Some(login), Some(first), Some(last)) = (self.login_mut(conn), run.first(), run.last()) else { return };
        login.show_run(last.message.conversation, (first.message.seq, last.message.seq));
        let lags = login.lags(last.message.conversation);
        let limit = session_limit(self.outbox_bytes_max);
        let given = self.write_run(conn, run, |pen, session, sent| {
            // Amendments and the like: the device may have to fetch them instead.
            let plain = !lags && sent.message.extra.is_none() && session.waiting_bytes() < limit;
            if plain {
                pen.begin(session, fx);
                pen.encoder.deliver(session.codec, &sent.message.as_wire(), &mut session.out);
            }
            plain
        });
        self.counters.delivered += given as u64;
        for sent in run.iter().skip(given) {
            self.deliver_shown(conn, &sent.message, with, fx);
        }
    }

    /// Queues the answers of accepted messages.
    pub(crate) fn answer_run(&mut self, conn: ConnId, run: &[Sent], fx: &mut Effects) {
        let limit = 2 * session_limit(self.outbox_bytes_max);
        let answered = self.write_run(conn, run, |pen, session, sent| {
            let room = session.waiting_bytes() <= limit;
            if room {
                pen.begin(session, fx);
                pen.encoder.send_ack(session.codec, sent.origin.request_id, &sent.ack(), &mut session.out);
            }
            room
        });
        for sent in run.iter().skip(answered) {
            self.answer(conn, sent.origin.request_id, &Reply::SendAck(sent.ack()), fx);
        }
    }

    /// Writes the messages at the head of a run for which `write` does so, and says how many they were.
    #[inline]
    fn write_run(
        &mut self,
        conn: ConnId,
        run: &[Sent],
        mut write: impl FnMut(&mut Pen<'_>, &mut Session, &Sent) -> bool,
    ) -> usize {
        let Some((session, mut pen)) = self.open_session(conn) else { return 0 };
        run.iter().take_while(|sent| write(&mut pen, session, sent)).count()
    }
}
