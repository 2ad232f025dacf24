//! The origin's side of SEND: checks, the way to the owner or the target, and the one answer.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{Class, Extra, Message, Reply, Send, SendAck};
use ringline_schema::record::{StoredExtra, StoredMessage};

use crate::deletion::walk::DELETER;
use crate::deliver::{DeliveryWait, Whose};
use crate::event::{ConnId, Effects, ShardMessage};
use crate::group::passing::Passing;
use crate::online::Devices;
use crate::peer::{Origin, Submit, SubmitMore, TransientSend, Wanted};
use crate::planted::Bug;
use crate::shard::Shard;
use crate::social::settings::Parked;

/// Bodies are copied out of what was received into blocks of this size, which they share.
const BODY_BLOCK_BYTES: usize = 64 * 1024;
/// A larger body has memory of its own.
const BODY_SHARED_BYTES_MAX: usize = BODY_BLOCK_BYTES / 8;

/// The one copy of a body that outlives its request. No allocation a message: a block is used again when all bodies in
/// it are gone. A body keeps its whole block, so this is for what is soon forgotten: bodies are not kept in caches.
fn keep_body(block: &mut BytesMut, body: &[u8]) -> Bytes {
    if body.is_empty() || body.len() > BODY_SHARED_BYTES_MAX {
        return Bytes::copy_from_slice(body);
    }
    if block.capacity() < body.len() {
        // Takes the old block if nobody else has a part of it, else a new one.
        block.reserve(BODY_BLOCK_BYTES);
    }
    block.extend_from_slice(body);
    block.split().freeze()
}

/// How a send ended: whether it was durable, and what its sender is told.
pub(crate) type SendEnd = (bool, Result<SendAck, ErrorCode>);

impl Shard {
    /// `no_reply`: a success is not told; only transient sends come with it.
    pub(crate) fn send(
        &mut self,
        conn: ConnId,
        (request_id, no_reply): (u32, bool),
        send: &Send<'_>,
        fx: &mut Effects,
    ) {
        let sent = self.check_send(send).and_then(|()| match send.class {
            Class::Durable => {
                let mut extra = extra_of(send)?;
                if self.planted.is(Bug::MentionsLost) {
                    extra = None;
                }
                self.send_durable((conn, request_id), send, (extra, None), fx)
            }
            Class::Transient => {
                let to = UserName::new(send.to)?;
                self.send_transient(conn, (request_id, no_reply), (to, send), fx)
            }
        });
        if let Err(code) = sent {
            self.sessions.fail(conn, request_id, code, fx);
        }
    }

    /// What a send must be, whomever it goes to.
    pub(crate) fn check_send(&self, send: &Send<'_>) -> Result<(), ErrorCode> {
        self.may_send(send.client_seq, send.body)
    }

    #[inline]
    pub(crate) fn may_send(&self, client_seq: u64, body: &[u8]) -> Result<(), ErrorCode> {
        let body_bytes_max = self.config.frame_bytes_max.saturating_sub(limits::MESSAGE_OVERHEAD_BYTES_MAX);
        if self.draining {
            Err(ErrorCode::ShuttingDown)
        } else if client_seq == 0 {
            Err(ErrorCode::BadRequest)
        } else if body.len() > body_bytes_max as usize {
            Err(ErrorCode::BodyTooLarge)
        } else {
            Ok(())
        }
    }

    pub(crate) fn origin(&self, conn: ConnId, request_id: u32) -> Origin {
        Origin { shard: self.config.shard, conn, request_id }
    }

    pub(crate) fn send_durable(
        &mut self,
        (conn, request_id): (ConnId, u32),
        send: &Send<'_>,
        (extra, more): (Option<Box<StoredExtra>>, Option<Box<SubmitMore>>),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let origin = self.origin(conn, request_id);
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        let (to, conversation) = login.conversation(send.to)?;
        if login.sends_in_flight >= limits::SENDS_IN_FLIGHT_MAX {
            return Err(ErrorCode::Busy);
        }
        let owner = self.owner(conversation.partition());
        if !self.is_here(owner) && self.is_blocked(owner) {
            return Err(ErrorCode::Busy);
        }
        let body = keep_body(&mut self.bodies, send.body);
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        login.sends_in_flight += 1;
        let plain = login.message((to, conversation), send.kind, body);
        let submit = Submit {
            origin,
            device_key: login.key(),
            message: self.spare_messages.place(StoredMessage { client_seq: send.client_seq, extra, ..plain }),
            ack_timeout_ms: send.ack_timeout_ms.map(|ms| ms.min(limits::ACK_TIMEOUT_MS_MAX)),
            more,
        };
        self.sessions.counters.sends_durable += 1;
        if self.is_here(owner) {
            self.submit(submit, fx);
        } else {
            self.tell_shard(owner, ShardMessage::Submit(Box::new(submit)), fx);
        }
        Ok(())
    }

    fn send_transient(
        &mut self,
        conn: ConnId,
        (request_id, no_reply): (u32, bool),
        (to, send): (UserName, &Send<'_>),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let origin = self.origin(conn, request_id);
        if !send.mentions.is_empty() {
            return Err(ErrorCode::BadRequest);
        }
        if to.is_group() {
            return self.send_transient_to_group(origin, send, no_reply, fx);
        }
        let target = self.owner(to.partition());
        let here = self.is_here(target);
        if !here && self.is_blocked(target) {
            return Err(ErrorCode::Busy);
        }
        let login = self.sessions.get(conn).and_then(|session| session.login()).ok_or(ErrorCode::NotLoggedIn)?;
        let (from, device) = (login.user.clone(), login.device);
        let ack_timeout_ms = send.ack_timeout_ms.map(|ms| ms.min(limits::ACK_TIMEOUT_MS_MAX));
        self.sessions.counters.sends_transient += 1;
        let reached = if here { self.reach_now(&to, &from).transpose()?.cloned() } else { None };
        if let Some(devices) = reached {
            let message = Message {
                conversation: NO_CONVERSATION,
                seq: Seq::ZERO,
                time_ms: self.now.unix_ms,
                from: from.as_str(),
                to: to.as_str(),
                device,
                client_seq: send.client_seq,
                class: Class::Transient,
                kind: send.kind,
                delivery: 0,
                body: send.body,
                extra: Extra::default(),
            };
            let wanted = ack_timeout_ms.map(|timeout_ms| Wanted { origin, timeout_ms });
            let result = self.deliver_transient((&to, &devices), message, wanted, fx);
            if !no_reply || result.is_err() {
                self.answer_send(origin, (false, result), None, fx);
            }
        } else {
            let (client_seq, kind, body) = (send.client_seq, send.kind, keep_body(&mut self.bodies, send.body));
            let send = TransientSend { origin, from, to, device, client_seq, kind, body, ack_timeout_ms, no_reply };
            let send = Box::new(send);
            if here {
                self.transient_from_peer(send, fx);
            } else {
                self.tell_shard(target, ShardMessage::Transient(send), fx);
            }
        }
        Ok(())
    }

    fn send_transient_to_group(
        &mut self,
        origin: Origin,
        send: &Send<'_>,
        no_reply: bool,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let body = keep_body(&mut self.bodies, send.body);
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        let group = login.conversation(send.to)?;
        let plain = login.message(group, send.kind, body);
        let submit = Submit {
            origin,
            device_key: login.key(),
            message: Arc::new(StoredMessage { client_seq: send.client_seq, ..plain }),
            ack_timeout_ms: send.ack_timeout_ms.map(|ms| ms.min(limits::ACK_TIMEOUT_MS_MAX)),
            more: Some(Box::new(SubmitMore { passing: Some(Passing::Message { no_reply }), ..SubmitMore::default() })),
        };
        self.sessions.counters.sends_transient += 1;
        self.pass_up(submit, fx)
    }

    /// A transient message has reached the shard of its target, which knows whether it may come in.
    pub(crate) fn transient_from_peer(&mut self, send: Box<TransientSend>, fx: &mut Effects) {
        match self.reach_now(&send.to, &send.from).map(|reached| reached.map(|_| ())) {
            Some(Ok(())) => self.give_transient(&send, fx),
            Some(Err(code)) => self.answer_send(send.origin, (false, Err(code)), None, fx),
            None => {
                let to = send.to.clone();
                self.with_settings(&to, Parked::Transient(send), fx);
            }
        }
    }

    pub(crate) fn give_transient(&mut self, send: &TransientSend, fx: &mut Effects) {
        let message = Message {
            conversation: NO_CONVERSATION,
            seq: Seq::ZERO,
            time_ms: self.now.unix_ms,
            from: send.from.as_str(),
            to: send.to.as_str(),
            device: send.device,
            client_seq: send.client_seq,
            class: Class::Transient,
            kind: send.kind,
            delivery: 0,
            body: &send.body,
            extra: Extra::default(),
        };
        let wanted = send.ack_timeout_ms.map(|timeout_ms| Wanted { origin: send.origin, timeout_ms });
        let devices = self.online.get(&send.to).cloned().unwrap_or_default();
        let result = self.deliver_transient((&send.to, &devices), message, wanted, fx);
        if !send.no_reply || result.is_err() {
            self.answer_send(send.origin, (false, result), None, fx);
        }
    }

    /// Gives a transient message to every device of its target that has room.
    fn deliver_transient(
        &mut self,
        (to, devices): (&UserName, &Devices),
        mut message: Message<'_>,
        wanted: Option<Wanted>,
        fx: &mut Effects,
    ) -> Result<SendAck, ErrorCode> {
        if devices.is_empty() {
            return Err(ErrorCode::NotOnline);
        }
        if let Some(wanted) = wanted {
            let wait = DeliveryWait {
                wanted,
                whose: Whose::User(to.clone()),
                conversation: NO_CONVERSATION,
                seq: Seq::ZERO,
                client_seq: message.client_seq,
            };
            message.delivery = self.delivery_waits.begin(wait, &mut self.timers, self.now.mono_us)?;
        }
        let mut queued = false;
        for &conn in devices {
            queued |= self.sessions.deliver_transient(conn, &message, fx);
        }
        if !queued {
            self.delivery_waits.remove(message.delivery);
            return Err(ErrorCode::Busy);
        }
        Ok(SendAck { conversation: NO_CONVERSATION, seq: Seq::ZERO, time_ms: message.time_ms, dup: false })
    }

    /// Tells the origin how its send ended; `copy` is for the sender's other devices.
    pub(crate) fn answer_send(
        &mut self,
        origin: Origin,
        (durable, result): SendEnd,
        copy: Option<&Arc<StoredMessage>>,
        fx: &mut Effects,
    ) {
        if self.is_here(origin.shard) {
            self.send_result(origin, (durable, result), copy, fx);
        } else {
            let copy = copy.filter(|message| message.from != message.to).cloned();
            if let Some(copy) = &copy {
                self.copy_follows(origin, &copy.from, fx);
            }
            self.tell_shard(origin.shard, ShardMessage::SendResult { origin, durable, result, copy }, fx);
        }
    }

    /// The end of a send, at its origin.
    pub(crate) fn send_result(
        &mut self,
        origin: Origin,
        (durable, result): SendEnd,
        copy: Option<&Arc<StoredMessage>>,
        fx: &mut Effects,
    ) {
        if origin.conn == DELETER {
            return self.deletion_answered(origin.request_id, result.map(|_| None), fx);
        }
        self.is_awaited(origin);
        let mut alone = false;
        if durable && let Some(login) = self.sessions.login_mut(origin.conn) {
            alone = login.alone;
            login.sends_in_flight = login.sends_in_flight.saturating_sub(1);
            if let Ok(ack) = &result {
                login.show(ack.conversation, ack.seq);
            }
        }
        match result {
            Ok(ack) => self.sessions.answer(origin.conn, origin.request_id, &Reply::SendAck(ack), fx),
            Err(code) => self.sessions.fail(origin.conn, origin.request_id, code, fx),
        }
        // In a chat with oneself they are its receivers.
        if let Some(message) = copy.filter(|message| !alone && message.from != message.to) {
            self.copy_to_own(origin.conn, message, fx);
        }
    }

    /// Gives a message to its sender's devices but the one that sent it.
    pub(crate) fn copy_to_own(&mut self, sender: ConnId, message: &Arc<StoredMessage>, fx: &mut Effects) {
        let Some(conns) = self.online.get(&message.from) else { return };
        for &conn in conns.iter().filter(|&&conn| conn != sender) {
            self.sessions.deliver_durable(conn, message, &message.to, fx);
        }
    }
}

/// What a durable send carries beside its body. `None` for most.
#[inline]
fn extra_of(send: &Send<'_>) -> Result<Option<Box<StoredExtra>>, ErrorCode> {
    if send.mentions.is_empty() {
        return Ok(None);
    }
    let to = UserName::new(send.to)?;
    if send.mentions.all && !to.is_group() {
        return Err(ErrorCode::BadRequest);
    }
    if send.mentions.users.len() > limits::MENTIONS_MAX {
        return Err(ErrorCode::TooManyMentions);
    }
    let mentions = send.mentions.users.iter().map(UserName::of_user).collect::<Result<_, _>>()?;
    let extra = StoredExtra { mentions, mention_all: send.mentions.all, ..StoredExtra::default() };
    Ok(Some(Box::new(extra)))
}

/// Transient messages belong to no stored conversation.
pub(crate) const NO_CONVERSATION: ConversationId = ConversationId(0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_share_blocks_which_are_used_again() {
        let mut block = BytesMut::new();
        let first = keep_body(&mut block, b"first");
        let place = first.as_ptr();
        let second = keep_body(&mut block, b"second");
        assert_eq!(second.as_ptr(), place.wrapping_add(5), "one block");
        assert_eq!((&first[..], &second.clone()[..]), (&b"first"[..], &b"second"[..]));
        drop((first, second));
        for number in 0..100_000u32 {
            let body = keep_body(&mut block, &number.to_le_bytes());
            assert_eq!(&body[..], &number.to_le_bytes());
            let offset = (body.as_ptr() as usize).wrapping_sub(place as usize);
            assert!(offset < BODY_BLOCK_BYTES, "the same block, when nobody holds a part of it");
        }
        let held = keep_body(&mut block, b"held");
        let others: Vec<_> = (0..20_000u32).map(|number| keep_body(&mut block, &number.to_le_bytes())).collect();
        assert_eq!(&held[..], b"held");
        assert!(others.iter().zip(0u32..).all(|(body, number)| body[..] == number.to_le_bytes()));
        let large = vec![7; BODY_SHARED_BYTES_MAX + 1];
        assert_eq!(keep_body(&mut block, &large), large);
        assert!(keep_body(&mut block, b"").is_empty());
    }
}
