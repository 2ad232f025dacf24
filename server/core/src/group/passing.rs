//! What is not stored and goes to a group: transient messages and signals. From the shard of the session to the owner of
//! the group, which knows who may write, and from there as one message to each shard with members, encoded once there.
//!
//! A transient message is answered when every shard has said how many devices it gave it to: none of them all is
//! NOT_ONLINE. Devices of its sender get neither. Who waits for a delivery acknowledgement, of a transient message or a
//! durable one, waits at the owner: the first device of another member that acknowledges is told, once.
//!
//! Invariant: it is given to who is a member on disk. While a change of the group is on its way there, what is sent waits
//! for it, in order, with the members that the group has by then.

use std::sync::Arc;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::{ChatReply, Class, Extra, Message, Reply, SendAck};
use ringline_schema::record::StoredMessage;

use crate::config::APPENDS_IN_FLIGHT_MAX;
use crate::conversation::{Pending, PendingWork};
use crate::deliver::{DeliveryWait, Whose};
use crate::event::{Effects, ShardMessage};
use crate::group::list::MemberList;
use crate::group::scan::Cargo;
use crate::group::state::Targets;
use crate::peer::{Origin, Submit, Wanted};
use crate::planted::Bug;
use crate::session::Shared;
use crate::shard::Shard;
use crate::social::{Gathered, SocialMessage};

/// What goes to a group and is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// A transient message; `no_reply`: only a failure is told.
    Message {
        no_reply: bool,
    },
    Signal {
        kind: u8,
    },
}

/// The owner of a group waits for a device of any member; `wait` is its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relay {
    pub owner: ShardIndex,
    pub wait: u64,
    pub timeout_ms: u32,
}

/// A message or signal on its way from the owner of the group to its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    pub submit: Submit,
    pub passing: Passing,
    pub time_ms: u64,
    /// Whom to tell how many devices got it; 0: nobody.
    pub gather: u64,
    pub relay: Option<Relay>,
}

impl Pass {
    /// The wire form. `delivery`: the number that its acknowledgement names; 0: none is wanted.
    pub(crate) fn as_wire(&self, delivery: u64) -> Reply<'_> {
        let submit = &self.submit;
        match self.passing {
            Passing::Message { .. } => Reply::Deliver(Message {
                conversation: NO_CONVERSATION,
                seq: Seq::ZERO,
                time_ms: self.time_ms,
                from: submit.message.from.as_str(),
                to: submit.message.to.as_str(),
                device: submit.message.device,
                client_seq: submit.message.client_seq,
                class: Class::Transient,
                kind: submit.message.kind,
                delivery,
                body: &submit.message.body,
                extra: Extra::default(),
            }),
            Passing::Signal { kind } => {
                let (from, to) = (submit.message.from.as_str(), submit.message.to.as_str());
                let (conversation, body) = (submit.message.conversation, &submit.message.body[..]);
                Reply::Chat(ChatReply::Signalled { conversation, from, to, kind, body })
            }
        }
    }
}

impl Shard {
    /// From the session's shard to the owner. Errors: `BUSY`.
    pub(crate) fn pass_up(&mut self, submit: Submit, fx: &mut Effects) -> Result<(), ErrorCode> {
        let owner = self.owner(submit.message.conversation.partition());
        if self.is_here(owner) {
            self.pass(submit, fx);
        } else if self.is_blocked(owner) {
            return Err(ErrorCode::Busy);
        } else {
            self.tell_shard(owner, ShardMessage::Submit(Box::new(submit)), fx);
        }
        Ok(())
    }

    /// At the owner, as soon as the group is in memory.
    pub(crate) fn pass(&mut self, submit: Submit, fx: &mut Effects) {
        let Some(submit) = self.group_is_there(submit, fx) else { return };
        if let Err(code) = self.may_write(&submit) {
            return self.refuse_submit(&submit, code, fx);
        }
        let id = submit.message.conversation;
        let targets = self.group_targets(id);
        let waits = self.groups.peek(&id).is_some_and(|slot| slot.in_flight > 0);
        if !waits {
            return self.pass_on(submit, &targets, fx);
        }
        // Who comes is no member before that is on disk: a crash would undo it, and could not take back what he was given.
        if let Err(code) = self.may_await_commit() {
            return self.refuse_submit(&submit, code, fx);
        }
        let work = PendingWork::Pass(Box::new((submit, targets)));
        self.pending.push_back(Pending { lsn: self.appended, weight: 0, work });
    }

    /// Whether something that is not written may wait for what is on its way to the disk.
    fn may_await_commit(&self) -> Result<(), ErrorCode> {
        match self.poisoned {
            true => Err(ErrorCode::StoreFailed),
            false if self.pending.len() >= APPENDS_IN_FLIGHT_MAX => Err(ErrorCode::Busy),
            false => Ok(()),
        }
    }

    /// The members that this is for are members on disk.
    pub(crate) fn pass_on(&mut self, submit: Submit, targets: &Targets, fx: &mut Effects) {
        let full = targets.iter().any(|(shard, _)| !self.is_here(*shard) && self.is_blocked(*shard));
        if full || self.gathers_are_full() {
            return self.refuse_submit(&submit, ErrorCode::Busy, fx);
        }
        self.pass_to(submit, targets, fx);
    }

    fn pass_to(&mut self, submit: Submit, targets: &Targets, fx: &mut Effects) {
        let Some(passing) = submit.passing() else { return };
        let (origin, time_ms) = (submit.origin, self.now.unix_ms);
        let mut pass = Pass { passing, time_ms, gather: 0, relay: None, submit };
        if let Passing::Message { no_reply } = passing {
            let conversation = NO_CONVERSATION;
            pass.relay = match self.group_relay(&pass.submit, (conversation, Seq::ZERO)) {
                Ok(relay) => relay,
                Err(code) => return self.refuse_submit(&pass.submit, code, fx),
            };
            let wait = pass.relay.map_or(0, |relay| relay.wait);
            let passed = Gathered::Passed { origin, devices: 0, wait, no_reply, time_ms };
            let parts = (targets.len(), passed);
            let Some(gather) = self.gather((origin.conn, origin.request_id), parts, fx) else { return };
            pass.gather = gather;
        }
        let pass = Arc::new(pass);
        for (shard, members) in &**targets {
            if self.is_here(*shard) {
                self.pass_to_members(*shard, &pass, members, fx);
            } else {
                let (pass, members) = (Arc::clone(&pass), members.clone());
                self.tell_shard(*shard, ShardMessage::PassGroup { pass, members }, fx);
            }
        }
    }

    /// Begins to wait at the owner for an acknowledgement, if one is wanted. Errors: `BUSY`.
    fn group_relay(
        &mut self,
        submit: &Submit,
        (conversation, seq): (ConversationId, Seq),
    ) -> Result<Option<Relay>, ErrorCode> {
        let Some(timeout_ms) = submit.ack_timeout_ms else { return Ok(None) };
        let wanted = Wanted { origin: submit.origin, timeout_ms };
        self.relay_for(wanted, (conversation, seq, submit.message.client_seq)).map(Some)
    }

    /// The same, of a message that is on disk: what cannot be waited for is told as if nobody acknowledged it.
    pub(crate) fn relay_committed(
        &mut self,
        message: &StoredMessage,
        wanted: Wanted,
        fx: &mut Effects,
    ) -> Option<Relay> {
        let relay = self.relay_for(wanted, (message.conversation, message.seq, message.client_seq));
        if relay.is_err() {
            self.tell_timeout(wanted.origin, message, fx);
        }
        relay.ok()
    }

    fn relay_for(
        &mut self,
        wanted: Wanted,
        (conversation, seq, client_seq): (ConversationId, Seq, u64),
    ) -> Result<Relay, ErrorCode> {
        let wait = DeliveryWait { wanted, whose: Whose::Relayed, conversation, seq, client_seq };
        let wait = self.delivery_waits.begin(wait, &mut self.timers, self.now.mono_us)?;
        Ok(Relay { owner: self.config.shard, wait, timeout_ms: wanted.timeout_ms })
    }

    /// Waits here for a device of any of these members but `from`. The number of the wait; 0: too many are open, and the owner's
    /// time runs out.
    pub(crate) fn await_member(
        &mut self,
        relay: Relay,
        (origin, from, members): (Origin, &UserName, &MemberList),
        (conversation, seq, client_seq): (ConversationId, Seq, u64),
    ) -> u64 {
        let Relay { owner, wait, timeout_ms } = relay;
        let whose = Whose::Member { but: from.clone(), of: members.clone(), owner, wait };
        let wanted = Wanted { origin, timeout_ms };
        let wait = DeliveryWait { wanted, whose, conversation, seq, client_seq };
        self.delivery_waits.begin(wait, &mut self.timers, self.now.mono_us).unwrap_or(0)
    }

    /// A device of a member has acknowledged: at the shard of the member.
    pub(crate) fn tell_reached(&mut self, (owner, wait): (ShardIndex, u64), device: DeviceId, fx: &mut Effects) {
        if self.is_here(owner) {
            self.delivered(wait, device, fx);
        } else {
            self.tell_shard(owner, ShardMessage::GroupReached { wait, device }, fx);
        }
    }

    /// Gives a transient message or a signal to the members that are online here.
    pub(crate) fn pass_to_members(
        &mut self,
        owner: ShardIndex,
        pass: &Arc<Pass>,
        members: &MemberList,
        fx: &mut Effects,
    ) {
        let submit = &pass.submit;
        let in_slices = self.goes_in_slices(submit.message.conversation, members);
        let mut conns = if in_slices { Vec::new() } else { self.online_members(members, Some(&submit.message.from)) };
        if self.planted.is(Bug::StrangersHear) {
            conns = self.online.iter().flat_map(|(_, devices)| devices.iter().copied()).collect();
            conns.sort_unstable();
        }
        if self.planted.is(Bug::TransientTwice) {
            conns.extend_from_within(..);
        }
        let delivery = match pass.relay.filter(|_| in_slices || !conns.is_empty()) {
            Some(relay) => {
                let place = (NO_CONVERSATION, Seq::ZERO, submit.message.client_seq);
                self.await_member(relay, (submit.origin, &submit.message.from, members), place)
            }
            None => 0,
        };
        if in_slices {
            let cargo = Cargo::Passing { pass: Arc::clone(pass), owner, delivery, devices: 0 };
            return self.send_round(submit.message.conversation, members, cargo, fx);
        }
        let (mut shared, mut devices) = (Shared::default(), 0);
        for conn in conns {
            devices += u32::from(self.sessions.offer_shared(conn, || pass.as_wire(delivery), &mut shared, fx));
        }
        self.sessions.done_with(shared);
        self.passed_here((owner, pass), delivery, devices, fx);
    }

    /// So many devices of this shard were given it.
    pub(crate) fn passed_here(
        &mut self,
        (owner, pass): (ShardIndex, &Pass),
        delivery: u64,
        devices: u32,
        fx: &mut Effects,
    ) {
        if devices == 0 {
            self.delivery_waits.remove(delivery);
        }
        match pass.passing {
            Passing::Message { .. } => self.sessions.counters.delivered += u64::from(devices),
            Passing::Signal { .. } => {}
        }
        if pass.gather == 0 {
            return;
        }
        if self.is_here(owner) {
            self.passed(pass.gather, devices, fx);
        } else {
            self.tell_social(owner, SocialMessage::Passed { gather: pass.gather, devices }, fx);
        }
    }

    /// Every shard has said to how many devices it gave a transient message.
    pub(crate) fn passed_to_all(
        &mut self,
        origin: Origin,
        (devices, wait, time_ms): (u32, u64, u64),
        no_reply: bool,
        fx: &mut Effects,
    ) {
        let result = if devices == 0 {
            self.delivery_waits.remove(wait);
            Err(ErrorCode::NotOnline)
        } else {
            Ok(SendAck { conversation: NO_CONVERSATION, seq: Seq::ZERO, time_ms, dup: false })
        };
        if !no_reply || result.is_err() {
            self.answer_send(origin, (false, result), None, fx);
        }
    }

    /// Answers what can't go on, as what it is.
    pub(crate) fn refuse_submit(&mut self, submit: &Submit, code: ErrorCode, fx: &mut Effects) {
        let origin = submit.origin;
        match submit.passing() {
            None => self.refuse(origin, code, fx),
            Some(Passing::Message { .. }) => self.answer_send(origin, (false, Err(code)), None, fx),
            Some(Passing::Signal { .. }) if self.is_here(origin.shard) => self.signal_refused(origin, code, fx),
            Some(Passing::Signal { .. }) => self.tell_social(origin.shard, SocialMessage::Refused { origin, code }, fx),
        }
    }
}

/// Transient messages belong to no stored conversation.
const NO_CONVERSATION: ConversationId = ConversationId(0);
