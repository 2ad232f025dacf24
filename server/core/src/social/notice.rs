//! BROADCAST: a notice of an administrator to every device that is online, or to those of some kinds. Not stored.
//!
//! Every shard gives it to its own sessions, a slice of them a turn, so that nobody else waits; what each of them queued
//! is added up for the answer. A device that reads too slowly is left out, and not counted.

use bytes::Bytes;
use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::UserName;
use ringline_schema::limits;
use ringline_schema::message::{BodyKind, ChatReply, Reply};

use super::{Gathered, SocialMessage};
use crate::event::{ConnId, Effects};
use crate::planted::Bug;
use crate::shard::Shard;
use crate::timers::Timer;

/// Broadcasts of one shard's sessions that are under way; one more is BUSY. A shard has at most so many from each.
const BROADCASTS_MAX: usize = 8;
/// Connections that are looked at in one turn.
const SLICE: usize = 1_024;

/// A broadcast on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoticeOut {
    pub from: UserName,
    pub time_ms: u64,
    pub kind: BodyKind,
    /// Bit n is kind n; 0: all.
    pub device_kinds: u32,
    pub body: Bytes,
    pub gather: u64,
}

/// How far it is on this shard.
#[derive(Debug)]
pub(crate) struct Giving {
    asker: ShardIndex,
    notice: Box<NoticeOut>,
    next_slot: usize,
    devices: u32,
}

impl Shard {
    pub(crate) fn broadcast(
        &mut self,
        conn: ConnId,
        request_id: u32,
        (kind, device_kinds, body): (BodyKind, u32, &[u8]),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        if self.draining {
            return Err(ErrorCode::ShuttingDown);
        }
        let login = self.sessions.get(conn).and_then(|session| session.login()).ok_or(ErrorCode::NotLoggedIn)?;
        let from = login.user.clone();
        if !self.config.admins.contains(&from) && !self.planted.is(Bug::StrangersTell) {
            return Err(ErrorCode::NotAllowed);
        }
        let body_bytes_max = self.config.frame_bytes_max.saturating_sub(limits::MESSAGE_OVERHEAD_BYTES_MAX);
        if body.len() > body_bytes_max as usize {
            return Err(ErrorCode::BodyTooLarge);
        }
        let others = self.reachable_shards();
        let full = others.iter().any(|shard| self.is_blocked(*shard));
        if full || self.open_broadcasts() >= BROADCASTS_MAX {
            return Err(ErrorCode::Busy);
        }
        let parts = (others.len() + 1, Gathered::Broadcast { devices: 0 });
        let Some(gather) = self.gather((conn, request_id), parts, fx) else { return Ok(()) };
        let (time_ms, body) = (self.now.unix_ms, Bytes::copy_from_slice(body));
        let notice = Box::new(NoticeOut { from, time_ms, kind, device_kinds, body, gather });
        for shard in others {
            self.tell_social(shard, SocialMessage::Notice(notice.clone()), fx);
        }
        self.begin_notice(self.config.shard, notice);
        Ok(())
    }

    /// Gives it to this shard's sessions from the next turn on.
    pub(crate) fn begin_notice(&mut self, asker: ShardIndex, notice: Box<NoticeOut>) {
        self.social.notices.push_back(Giving { asker, notice, next_slot: 0, devices: 0 });
        self.timers.arm(self.now.mono_us, Timer::Notice);
    }

    /// One slice of the oldest broadcast.
    pub(crate) fn notice_due(&mut self, fx: &mut Effects) {
        let Some(mut giving) = self.social.notices.pop_front() else { return };
        let NoticeOut { from, time_ms, kind, device_kinds, body, gather } = &*giving.notice;
        let reply = Reply::Chat(ChatReply::Notice { from: from.as_str(), time_ms: *time_ms, kind: *kind, body });
        for conn in self.sessions.slice(giving.next_slot, SLICE) {
            let Some(login) = self.sessions.get(conn).and_then(|session| session.login()) else { continue };
            let wanted = *device_kinds == 0 || device_kinds & (1 << (login.kind as u32)) != 0;
            let (twice, none) =
                (self.planted.is(Bug::ToldTwice), self.planted.is(Bug::SomeNotTold) && conn.slot % 2 == 1);
            giving.devices += u32::from(wanted && (none || self.sessions.offer(conn, &reply, fx)));
            let _ = wanted && twice && self.sessions.offer(conn, &reply, fx);
        }
        giving.next_slot = giving.next_slot.saturating_add(SLICE);
        let (asker, gather, devices) = (giving.asker, *gather, giving.devices);
        if giving.next_slot < self.sessions.slots() {
            self.social.notices.push_front(giving);
        } else if self.is_here(asker) {
            self.noticed(gather, devices, fx);
        } else {
            self.tell_social(asker, SocialMessage::Noticed { gather, devices }, fx);
        }
        if !self.social.notices.is_empty() {
            // After this moment, so that it is another turn.
            self.timers.arm(self.now.mono_us + 1, Timer::Notice);
        }
    }
}
