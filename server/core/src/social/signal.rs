//! SIGNAL: "is typing" and what applications make of it. Not stored; to every device of the receiver that is online now,
//! or of the other members of a group.
//!
//! From the sender's shard to the receiver's, which knows who may signal whom. One that says the same again within
//! `PRESENCE_INTERVAL_MS` is dropped at its origin. Answered only when refused.

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName, body_hash};
use ringline_schema::limits;
use ringline_schema::message::chat::{SIGNAL_APPLICATION, SIGNAL_TYPING};
use ringline_schema::message::{BodyKind, ChatReply, Reply};

use super::SocialMessage;
use super::settings::Parked;
use crate::event::{ConnId, Effects};
use crate::group::passing::Passing;
use crate::peer::{Origin, Submit, SubmitMore};
use crate::planted::Bug;
use crate::shard::Shard;

/// Signals of a session that are remembered, to drop their repeats; with more of them at once a repeat may pass.
const SIGNALS_REMEMBERED_MAX: usize = 8;

/// A signal on its way to the shard of its receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignalSend {
    pub origin: Origin,
    pub from: UserName,
    pub to: UserName,
    pub kind: u8,
    pub body: Bytes,
}

/// What a session has signalled lately, oldest first.
#[derive(Debug, Default)]
pub struct Signalled(Vec<Remembered>);

#[derive(Debug)]
struct Remembered {
    to: UserName,
    kind: u8,
    body_hash: u64,
    at_us: u64,
}

impl Signalled {
    /// Whether the same was signalled less than `PRESENCE_INTERVAL_MS` ago; if not, it is noted as signalled now.
    fn repeats(&mut self, (to, kind, body): (&UserName, u8, &[u8]), now_us: u64) -> bool {
        let body_hash = body_hash(body);
        self.0.retain(|past| now_us < past.at_us + limits::PRESENCE_INTERVAL_MS * 1_000);
        if self.0.iter().any(|past| past.to == *to && past.kind == kind && past.body_hash == body_hash) {
            return true;
        }
        if self.0.len() >= SIGNALS_REMEMBERED_MAX {
            self.0.remove(0);
        }
        self.0.push(Remembered { to: to.clone(), kind, body_hash, at_us: now_us });
        false
    }
}

impl Shard {
    pub(crate) fn signal(
        &mut self,
        conn: ConnId,
        request_id: u32,
        (to, kind, body): (&str, u8, &[u8]),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        if self.draining {
            return Err(ErrorCode::ShuttingDown);
        }
        if kind != SIGNAL_TYPING && kind < SIGNAL_APPLICATION {
            return Err(ErrorCode::BadRequest);
        }
        if body.len() > limits::SIGNAL_BYTES_MAX {
            return Err(ErrorCode::BodyTooLarge);
        }
        let to = UserName::new(to)?;
        // A group is owned by the shard of its name.
        let target = self.owner(to.partition());
        let here = self.is_here(target);
        if !here && self.is_blocked(target) {
            return Err(ErrorCode::Busy);
        }
        let now_us = self.now.mono_us;
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        if login.social_mut().signalled.repeats((&to, kind, body), now_us) {
            self.sessions.counters.signals_coalesced += 1;
            return Ok(());
        }
        let origin = Origin { shard: self.config.shard, conn, request_id };
        if to.is_group() {
            let conversation = ConversationId::group(&to);
            let message = login.message((to, conversation), BodyKind::Custom, Bytes::copy_from_slice(body));
            let submit = Submit {
                origin,
                device_key: login.key(),
                message: message.into(),
                ack_timeout_ms: None,
                more: Some(Box::new(SubmitMore { passing: Some(Passing::Signal { kind }), ..SubmitMore::default() })),
            };
            self.sessions.counters.signals += 1;
            return self.pass_up(submit, fx);
        }
        let from = login.user.clone();
        self.sessions.counters.signals += 1;
        let signal = Box::new(SignalSend { origin, from, to, kind, body: Bytes::copy_from_slice(body) });
        if here {
            self.signal_from_peer(signal, fx);
        } else {
            self.tell_social(target, SocialMessage::Signal(signal), fx);
        }
        Ok(())
    }

    /// A signal has reached the shard of its receiver.
    pub(crate) fn signal_from_peer(&mut self, signal: Box<SignalSend>, fx: &mut Effects) {
        match self.reach_now(&signal.to, &signal.from).map(|reached| reached.map(|_| ())) {
            Some(Ok(())) => self.give_signal(&signal, fx),
            Some(Err(code)) => self.refuse_signal(&signal, code, fx),
            None => {
                let to = signal.to.clone();
                self.with_settings(&to, Parked::Signal(signal), fx);
            }
        }
    }

    /// To every device of the receiver but the one that it comes from.
    pub(crate) fn give_signal(&mut self, signal: &SignalSend, fx: &mut Effects) {
        let mut to = &signal.to;
        if self.planted.is(Bug::SignalAstray) {
            to = self.online.listed_after(None).find(|name| **name != signal.from).unwrap_or(to);
        }
        let Some(conns) = self.online.get(to) else {
            return self.refuse_signal(signal, ErrorCode::NotOnline, fx);
        };
        let reply = Reply::Chat(ChatReply::Signalled {
            conversation: ConversationId::direct(&signal.from, &signal.to),
            from: signal.from.as_str(),
            to: signal.to.as_str(),
            kind: signal.kind,
            body: &signal.body,
        });
        for &conn in conns.iter().filter(|&&conn| conn != signal.origin.conn || signal.from != signal.to) {
            self.sessions.offer(conn, &reply, fx);
        }
    }

    pub(crate) fn refuse_signal(&mut self, signal: &SignalSend, code: ErrorCode, fx: &mut Effects) {
        let origin = signal.origin;
        if self.is_here(origin.shard) {
            self.signal_refused(origin, code, fx);
        } else {
            self.tell_social(origin.shard, SocialMessage::Refused { origin, code }, fx);
        }
    }

    /// The next one is to be tried, even if it says the same.
    pub(crate) fn signal_refused(&mut self, origin: Origin, code: ErrorCode, fx: &mut Effects) {
        if let Some(login) = self.sessions.login_mut(origin.conn).filter(|login| login.social().is_some()) {
            login.social_mut().signalled = Signalled::default();
        }
        self.sessions.fail(origin.conn, origin.request_id, code, fx);
    }
}
