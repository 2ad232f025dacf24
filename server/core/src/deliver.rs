//! The receiving side: DELIVER to the devices of a user, their ACKs, cursors, and delivery acknowledgements.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, ConversationKind, DeviceId, Seq, UserName};
use ringline_schema::message::{Ack, Outcome, Receipt, Reply};
use ringline_schema::record::{Record, StoredMessage};

use crate::config::{CURSORS_PER_TURN_MAX, DELIVERY_ACKS_MAX};
use crate::event::{ConnId, Effects, ShardMessage};
use crate::group::list::MemberList;
use crate::peer::{Origin, Wanted};
use crate::planted::Bug;
use crate::session::Login;
use crate::shard::Shard;
use crate::timers::{Timer, Timers};

/// A sender that waits to hear of a device's ACK.
#[derive(Debug)]
pub(crate) struct DeliveryWait {
    pub wanted: Wanted,
    pub whose: Whose,
    pub conversation: ConversationId,
    pub seq: Seq,
    pub client_seq: u64,
}

/// Who has to acknowledge.
#[derive(Debug)]
pub(crate) enum Whose {
    User(UserName),
    /// Any member of the group but one, at the shard of the members; then the owner's wait is over.
    Member {
        but: UserName,
        /// Who was given it, in order of name: who joins later has a place behind it and was not.
        of: MemberList,
        owner: ShardIndex,
        wait: u64,
    },
    /// At the owner of a group: shards of members tell it.
    Relayed,
}

impl Whose {
    /// What a cumulative ACK is looked up by: the user, or nobody in particular.
    pub(crate) fn user(&self) -> Option<&UserName> {
        match self {
            Self::User(user) => Some(user),
            Self::Member { .. } | Self::Relayed => None,
        }
    }
}

/// Those that wait, by a number that is never used again, and when each gives up.
///
/// Most end long before, so that each has no timer of its own, which would stay until it is due: there is one for the
/// first of them. Invariants: `due` has exactly the waits; while there is one, a timer stands no later than the first.
#[derive(Debug)]
pub(crate) struct DeliveryWaits {
    waits: BTreeMap<u64, (DeliveryWait, u64)>,
    due: BTreeSet<(u64, u64)>,
    next: u64,
    /// The earliest timer that stands; `u64::MAX`: none does.
    armed_us: u64,
}

impl DeliveryWaits {
    pub fn new() -> Self {
        Self { waits: BTreeMap::new(), due: BTreeSet::new(), next: 0, armed_us: u64::MAX }
    }

    pub fn len(&self) -> usize {
        self.waits.len()
    }

    pub fn get(&self, number: u64) -> Option<&DeliveryWait> {
        self.waits.get(&number).map(|(wait, _)| wait)
    }

    pub fn remove(&mut self, number: u64) -> Option<DeliveryWait> {
        let (wait, due_us) = self.waits.remove(&number)?;
        self.due.remove(&(due_us, number));
        Some(wait)
    }

    /// Registers a wait, with its timeout. `BUSY` when too many are open.
    pub fn begin(&mut self, wait: DeliveryWait, timers: &mut Timers, now_us: u64) -> Result<u64, ErrorCode> {
        if self.waits.len() >= DELIVERY_ACKS_MAX {
            return Err(ErrorCode::Busy);
        }
        self.next += 1;
        let due_us = now_us + u64::from(wait.wanted.timeout_ms) * 1_000;
        self.due.insert((due_us, self.next));
        self.waits.insert(self.next, (wait, due_us));
        self.arm(timers);
        Ok(self.next)
    }

    /// One whose time is over; `None`: the others have a timer again.
    fn overdue(&mut self, timers: &mut Timers, now_us: u64) -> Option<u64> {
        if self.armed_us <= now_us {
            self.armed_us = u64::MAX;
        }
        match self.due.first() {
            Some(&(due_us, number)) if due_us <= now_us => Some(number),
            Some(_) | None => {
                self.arm(timers);
                None
            }
        }
    }

    fn arm(&mut self, timers: &mut Timers) {
        if let Some(&(due_us, _)) = self.due.first()
            && due_us < self.armed_us
        {
            self.armed_us = due_us;
            timers.arm(due_us, Timer::Deliveries);
        }
    }

    /// For the sweep.
    pub fn check_invariants(&self) {
        assert!(self.due.iter().all(|(due_us, number)| self.waits.get(number).is_some_and(|wait| wait.1 == *due_us)));
        assert_eq!(self.due.len(), self.waits.len());
        assert!(self.due.first().is_none_or(|(due_us, _)| self.armed_us <= *due_us), "somebody looks at the first");
    }
}

impl Shard {
    /// A committed message of a conversation of another shard.
    pub(crate) fn deliver_from_peer(&mut self, message: Arc<StoredMessage>, wanted: Option<Wanted>, fx: &mut Effects) {
        if let Some(wanted) = wanted {
            self.await_ack(&message, wanted, fx);
        }
        let to = self.receiver(&message);
        let Some(conns) = self.online.get(to) else { return };
        for &conn in conns {
            self.sessions.deliver_durable(conn, &message, &message.from, fx);
        }
    }

    /// Waits for a device of the receiver to acknowledge a message.
    pub(crate) fn await_ack(&mut self, message: &StoredMessage, wanted: Wanted, fx: &mut Effects) {
        let (user, conversation, seq) = (message.to.clone(), message.conversation, message.seq);
        let whose = Whose::User(user.clone());
        let wait = DeliveryWait { wanted, whose, conversation, seq, client_seq: message.client_seq };
        match self.delivery_waits.begin(wait, &mut self.timers, self.now.mono_us) {
            Ok(number) => {
                self.delivery_index.insert((conversation, Some(user), seq), number);
            }
            // The message is kept all the same; only the news of its delivery can't be waited for.
            Err(_) => self.tell_timeout(wanted.origin, message, fx),
        }
    }

    pub(crate) fn receiver<'a>(&'a self, message: &'a StoredMessage) -> &'a UserName {
        if self.planted.is(Bug::WrongUser) {
            return self.online.listed_after(None).find(|name| **name != message.from).unwrap_or(&message.to);
        }
        &message.to
    }

    pub(crate) fn ack(&mut self, conn: ConnId, request_id: u32, ack: Ack, fx: &mut Effects) {
        let acked = match ack {
            Ack::Upto { conversation, seq } => self.ack_upto(conn, conversation, seq, fx),
            Ack::Delivery(number) => self.ack_delivery(conn, number, fx),
        };
        if let Err(code) = acked {
            self.sessions.fail(conn, request_id, code, fx);
        }
    }

    /// A device has everything of a conversation up to `seq`. It can only say so of what this session was given.
    fn ack_upto(
        &mut self,
        conn: ConnId,
        conversation: ConversationId,
        seq: Seq,
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let unknown = if self.may_lack(conversation) { ErrorCode::Unavailable } else { ErrorCode::NoSuchConversation };
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        let known = login.known_mut(conversation).ok_or(unknown)?;
        if seq > known.shown {
            return Err(ErrorCode::BadRequest);
        }
        if seq <= known.acked {
            return Ok(());
        }
        known.acked = seq;
        let from = known.from;
        let newly_dirty = !std::mem::replace(&mut known.dirty, true);
        let (user, device) = (login.user.clone(), login.device);
        if newly_dirty {
            self.dirty_cursors.push((conn, conversation));
        }
        if self.draining {
            self.flush_cursors(fx);
        } else {
            self.arm_cursors();
        }
        self.reached((user, device), conversation, (from, seq), fx);
        Ok(())
    }

    /// A device has these messages. What is before the first was let go when the device asked, so an ACK that covers it
    /// says nothing of it: nobody claims that it was delivered, and its sender hears of the timeout.
    fn reached(
        &mut self,
        (user, device): (UserName, DeviceId),
        conversation: ConversationId,
        (first, last): (Seq, Seq),
        fx: &mut Effects,
    ) {
        if first > last {
            return;
        }
        let for_all = |user: Option<UserName>| (conversation, user.clone(), first)..=(conversation, user, last);
        let whose = if conversation.kind() == Some(ConversationKind::Group) { None } else { Some(user.clone()) };
        let reached = self.delivery_index.range(for_all(whose)).filter(|(_, number)| self.counts(**number, &user));
        let reached: Vec<_> = reached.map(|(key, number)| (key.clone(), *number)).collect();
        for (key, number) in reached {
            self.delivery_index.remove(&key);
            self.delivered(number, device, fx);
        }
    }

    /// An answer to this session names the first message of a conversation that is kept.
    pub(crate) fn kept_from(&mut self, conn: ConnId, conversation: ConversationId, first: Seq, fx: &mut Effects) {
        let Some(login) = self.sessions.login_mut(conn) else { return };
        let (user, device) = (login.user.clone(), login.device);
        let Some(known) = login.known_mut(conversation) else { return };
        let old = *known;
        known.tell(first);
        // What was acknowledged before the first answer came counts from here on.
        if !old.told && old.acked != Seq::ZERO {
            let (from, acked) = (known.from, old.acked);
            self.reached((user, device), conversation, (from, acked), fx);
        }
    }

    /// Whether an acknowledgement of this user ends that wait.
    fn counts(&self, number: u64, user: &UserName) -> bool {
        self.delivery_waits.get(number).is_some_and(|wait| match &wait.whose {
            Whose::User(whose) => whose == user,
            Whose::Member { but, of, .. } => of.contains(user) && (but != user || self.planted.is(Bug::OwnAckCounts)),
            Whose::Relayed => false,
        })
    }

    fn ack_delivery(&mut self, conn: ConnId, number: u64, fx: &mut Effects) -> Result<(), ErrorCode> {
        let login = self.sessions.login_mut(conn).ok_or(ErrorCode::NotLoggedIn)?;
        // Another device was first, or the time is over: nothing is left to do.
        let Some(wait) = self.delivery_waits.get(number) else { return Ok(()) };
        let mine = match &wait.whose {
            Whose::User(user) => *user == login.user,
            Whose::Member { but, .. } => *but != login.user,
            Whose::Relayed => false,
        };
        if !mine || wait.seq != Seq::ZERO {
            return Err(ErrorCode::BadRequest);
        }
        let device = login.device;
        self.delivered(number, device, fx);
        Ok(())
    }

    pub(crate) fn delivered(&mut self, number: u64, device: DeviceId, fx: &mut Effects) {
        let Some(wait) = self.delivery_waits.remove(number) else { return };
        if let Whose::Member { owner, wait, .. } = wait.whose {
            return self.tell_reached((owner, wait), device, fx);
        }
        let receipt = Receipt {
            conversation: wait.conversation,
            seq: wait.seq,
            client_seq: wait.client_seq,
            outcome: Outcome::Delivered,
            device,
        };
        self.tell_receipt(wait.wanted.origin, receipt, fx);
    }

    /// The time for some acknowledgements is over, perhaps.
    pub(crate) fn deliveries_due(&mut self, fx: &mut Effects) {
        while let Some(number) = self.delivery_waits.overdue(&mut self.timers, self.now.mono_us) {
            self.delivery_due(number, fx);
        }
    }

    fn delivery_due(&mut self, number: u64, fx: &mut Effects) {
        let Some(wait) = self.delivery_waits.remove(number) else { return };
        self.delivery_index.remove(&(wait.conversation, wait.whose.user().cloned(), wait.seq));
        if matches!(wait.whose, Whose::Member { .. }) {
            // The owner's own time is over as well.
            return;
        }
        let lie = self.planted.is(Bug::FalseReceipt);
        let receipt = Receipt {
            conversation: wait.conversation,
            seq: wait.seq,
            client_seq: wait.client_seq,
            outcome: if lie { Outcome::Delivered } else { Outcome::DeliveryTimeout },
            device: DeviceId(0),
        };
        self.tell_receipt(wait.wanted.origin, receipt, fx);
    }

    /// Nobody acknowledges a message in time.
    pub(crate) fn tell_timeout(&mut self, origin: Origin, message: &StoredMessage, fx: &mut Effects) {
        self.tell_receipt(origin, timeout_receipt(message), fx);
    }

    fn tell_receipt(&mut self, origin: Origin, receipt: Receipt, fx: &mut Effects) {
        if self.is_here(origin.shard) {
            self.receipt(origin, receipt, fx);
        } else {
            self.tell_shard(origin.shard, ShardMessage::Receipt { origin, receipt }, fx);
        }
    }

    /// What became of a message, at its origin.
    pub(crate) fn receipt(&mut self, origin: Origin, receipt: Receipt, fx: &mut Effects) {
        self.sessions.counters.receipts += 1;
        self.sessions.push(origin.conn, &Reply::Receipt(receipt), fx);
    }

    /// Writes cursors that moved since the last time, a part of them a turn: after a message to a large group there are
    /// as many as devices.
    pub(crate) fn cursors_due(&mut self, fx: &mut Effects) {
        self.cursors_armed = false;
        let later = self.dirty_cursors.split_off(self.dirty_cursors.len().min(CURSORS_PER_TURN_MAX));
        self.flush_cursors(fx);
        // What could not be told is tried again in its time, behind the others.
        let failed = std::mem::replace(&mut self.dirty_cursors, later);
        self.dirty_cursors.extend(failed);
        if !self.dirty_cursors.is_empty() && !std::mem::replace(&mut self.cursors_armed, true) {
            self.timers.arm(self.now.mono_us + 1, Timer::Cursors);
        }
    }

    /// Writes the cursors that moved since the last time.
    pub(crate) fn flush_cursors(&mut self, fx: &mut Effects) {
        for (conn, conversation) in std::mem::take(&mut self.dirty_cursors) {
            let Some(login) = self.sessions.login_mut(conn) else { continue };
            let Some(known) = login.known_mut(conversation) else { continue };
            let (acked, user, device) = (known.acked, login.user.clone(), login.device);
            if self.tell_delivered(&user, (conversation, acked), fx).is_err() {
                self.dirty_cursors.push((conn, conversation));
                self.arm_cursors();
                continue;
            }
            if let Some(known) = self.sessions.login_mut(conn).and_then(|login| login.known_mut(conversation)) {
                known.dirty = false;
            }
            self.append_cursor(Record::Cursor { user, device, conversation, seq: acked }, fx);
        }
    }

    /// Writes one cursor of a device that is going.
    pub(crate) fn write_cursor(&mut self, login: &Login, conversation: ConversationId, seq: Seq, fx: &mut Effects) {
        // A full lane here loses the news of a receipt until the next acknowledgement.
        let _ = self.tell_delivered(&login.user, (conversation, seq), fx);
        self.append_cursor(Record::Cursor { user: login.user.clone(), device: login.device, conversation, seq }, fx);
    }

    /// A cursor that can't be written is only redelivery after a restart, which clients filter.
    fn append_cursor(&mut self, record: Record, fx: &mut Effects) {
        if !self.may_write_of(record.partition()) {
            return;
        }
        let busy = self.may_append() == Err(ErrorCode::Busy);
        if !self.poisoned && !busy && !self.planted.is(Bug::ForgottenCursor) {
            self.sessions.counters.cursors_written += 1;
            self.append(record, fx);
        }
    }
}

fn timeout_receipt(message: &StoredMessage) -> Receipt {
    Receipt {
        conversation: message.conversation,
        seq: message.seq,
        client_seq: message.client_seq,
        outcome: Outcome::DeliveryTimeout,
        device: DeviceId(0),
    }
}
