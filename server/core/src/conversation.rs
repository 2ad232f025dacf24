//! The owner's side of durable messages: duplicate check, sequence, append, and what follows the commit.
//!
//! A conversation is loaded on demand and kept in a bounded cache. While it loads, sends to it wait in order. Numbers
//! are given at append and become visible at commit; records commit in order, so a conversation's sequence is dense.

use std::collections::VecDeque;
use std::sync::Arc;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::message::SendAck;
use ringline_schema::record::{Accepted, Answer, Change, Query, Record, StoredMessage, User};
use ringline_schema::rows::{Row, RowKey, RowValue};
use smallvec::SmallVec;

use crate::amend::{AmendOut, record_of};
use crate::committed::Sent;
use crate::config::WAITERS_PER_LOAD_MAX;
use crate::deletion::DeleteAsk;
use crate::event::{ConnId, Effects, ShardMessage};
use crate::filter::{Filter, Seen};
use crate::group::change::GroupPending;
use crate::group::state::Targets;
use crate::hide::Hiding;
use crate::peer::{Ask, Origin, Submit};
use crate::planted::Bug;
use crate::receipts::ReceiptWrite;
use crate::shard::{Question, Shard};
use crate::social::SocialPending;
use crate::social::settings::{PERMIT_MS, Parked, PrivacyChanges, REFUSAL_MS};

/// Devices whose filters one conversation keeps in memory before it lets go of those of others.
const FILTERS_PER_CONVERSATION_MAX: usize = 64;
/// A question about a user that was not answered for this long is asked again when the next send comes.
const ASK_AGAIN_US: u64 = 1_000_000;
/// How many cached conversations are looked at to find one that may go.
const EVICTION_LOOKS_MAX: usize = 8;

/// What a conversation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Ready,
    /// The store, for the head and a device's filter.
    Loading,
    /// The shard of the other user, since this moment: does it take messages of this one?
    AskingUser {
        since_us: u64,
    },
}

/// A conversation this shard owns.
#[derive(Debug)]
pub(crate) struct Conversation {
    pub stage: Stage,
    /// The head is known (a filter may still be missing).
    pub loaded: bool,
    /// Its first record is written or on its way.
    pub exists: bool,
    /// The highest number given.
    pub head: Seq,
    /// The highest number on disk.
    pub committed: Seq,
    /// Messages appended and not yet on disk: `head − committed`.
    pub in_flight: u64,
    pub senders: Vec<Sender>,
    /// It began here and no sender was let go of: a device that is not among them has never sent, nothing needs to be asked.
    senders_whole: bool,
    /// Amendments, at least those that are not on disk yet.
    pub amends: Vec<AmendOut>,
    /// What was asked about writing to either side, by the side.
    permits: SmallVec<[Permit; 2]>,
    /// Who has written as far as this is known here; then the row that says so exists.
    wrote: SmallVec<[UserName; 2]>,
    /// Sends that wait for the stage to pass, in order of arrival.
    pub waiting: VecDeque<Submit>,
}

/// Whether messages to `to` are taken, as its shard said at that moment.
#[derive(Debug)]
struct Permit {
    to: UserName,
    result: Result<(), ErrorCode>,
    since_us: u64,
}

impl Permit {
    fn lasts_us(&self) -> u64 {
        1_000 * if self.result.is_ok() { PERMIT_MS } else { REFUSAL_MS }
    }
}

impl Conversation {
    fn new() -> Self {
        Self {
            stage: Stage::Loading,
            loaded: false,
            exists: false,
            head: Seq::ZERO,
            committed: Seq::ZERO,
            in_flight: 0,
            senders: Vec::new(),
            senders_whole: false,
            amends: Vec::new(),
            permits: SmallVec::new(),
            wrote: SmallVec::new(),
            waiting: VecDeque::new(),
        }
    }

    fn may_go(&self) -> bool {
        self.stage == Stage::Ready && self.in_flight == 0 && self.waiting.is_empty()
    }

    /// Notes that `user` writes. True when that is new here.
    fn note_writer(&mut self, user: &UserName) -> bool {
        let new = !self.wrote.contains(user);
        if new {
            self.wrote.push(user.clone());
        }
        new
    }

    /// Whether the receiver takes this message, if that was asked lately.
    fn permission(&self, submit: &Submit, privacy: &PrivacyChanges, now_us: u64) -> Option<Result<(), ErrorCode>> {
        // Who is kept out may still take back what is there.
        if submit.amending().is_some_and(|amending| amending.takes_back()) || submit.is_to_group() {
            return Some(Ok(()));
        }
        let StoredMessage { from, to, .. } = &*submit.message;
        let Some(permit) = self.permits.iter().find(|permit| permit.to == *to) else {
            // Nobody asks whether a user takes messages of its own.
            return (from == to).then_some(Ok(()));
        };
        let lasts = now_us < permit.since_us.saturating_add(permit.lasts_us());
        (lasts && privacy.is_newer(to, permit.since_us)).then_some(permit.result)
    }

    /// A new message, whose fingerprint is `hash`, gets its number.
    fn number(&mut self, submit: &mut Submit, (hash, time_ms): (u64, u64), unfiltered: bool) -> Numbered {
        let first = !std::mem::replace(&mut self.exists, true);
        self.head = self.head.next();
        self.in_flight += 1;
        let message = submit.numbered(self.head, time_ms);
        self.note_amend(&message);
        let (mut known_device, mut noted) = (false, false);
        if let Some(sender) = self.sender(submit.device_key).filter(|_| !unfiltered) {
            known_device = !sender.filter.is_empty();
            noted = std::mem::replace(&mut sender.noted, true);
            let (client_seq, seq) = (message.client_seq, message.seq);
            sender.filter.insert(Accepted { client_seq, seq, time_ms, body_hash: hash });
        }
        // Who was a stranger to the sender is none any more.
        if self.permits.iter().any(|permit| permit.result.is_err()) {
            self.permits.retain(|permit| permit.result.is_ok() || permit.to != message.from);
        }
        let direct = !noted && message.from != message.to && !submit.is_to_group();
        let begins = direct && self.note_writer(&message.from) && !known_device;
        Numbered { message, first, begins }
    }

    /// Notes a message that is on its way to the disk, if it amends another.
    pub(crate) fn note_amend(&mut self, message: &StoredMessage) {
        self.amends.extend(message.amends().map(|(of, state)| AmendOut { of, by: message.seq, state }));
    }

    /// Notes an accepted send.
    pub(crate) fn remember(&mut self, device: DeviceKey, accepted: Accepted) {
        if let Some(sender) = self.sender(device) {
            sender.filter.insert(accepted);
        }
    }

    /// The sender, if it is known or known to be new.
    fn sender_or_new(&mut self, device: DeviceKey) -> Option<&mut Sender> {
        match self.senders.iter().position(|sender| sender.device == device) {
            Some(at) => self.senders.get_mut(at),
            None if self.senders_whole => {
                self.add_sender(device, Filter::default());
                self.senders.last_mut()
            }
            None => None,
        }
    }

    /// Whether its device is known here, and this is no repeat and takes nothing back.
    fn is_new(&self, submit: &Submit) -> bool {
        if submit.amending().is_some_and(|amending| amending.takes_back()) {
            return false;
        }
        let sender = self.senders.iter().find(|sender| sender.device == submit.device_key);
        sender.is_some_and(|sender| sender.filter.check(submit.message.client_seq, submit.hash()) == Seen::New)
    }

    fn add_sender(&mut self, device: DeviceKey, filter: Filter) {
        if self.senders.len() >= FILTERS_PER_CONVERSATION_MAX {
            // What is not on disk yet is nowhere but here.
            let committed = self.committed;
            self.senders.retain(|sender| sender.filter.newest_seq() > committed);
            self.senders_whole = false;
        }
        self.senders.push(Sender { device, filter, noted: false });
    }

    fn sender(&mut self, device: DeviceKey) -> Option<&mut Sender> {
        self.senders.iter_mut().find(|sender| sender.device == device)
    }
}

/// A message that has its number.
struct Numbered {
    message: Arc<StoredMessage>,
    /// The conversation begins with it.
    first: bool,
    /// Its sender has not written there before.
    begins: bool,
}

/// What a conversation keeps of a device that sends to it.
#[derive(Debug)]
pub(crate) struct Sender {
    pub device: DeviceKey,
    pub filter: Filter,
    /// Its user is known to have written.
    noted: bool,
}

/// Something that waits for record `lsn` to be durable.
#[derive(Debug)]
pub(crate) struct Pending {
    pub lsn: u64,
    pub weight: usize,
    pub work: PendingWork,
}

#[derive(Debug)]
pub(crate) enum PendingWork {
    Message(Sent),
    /// A repeat of a message that is itself still on its way.
    Repeat {
        origin: Origin,
        ack: SendAck,
    },
    User {
        conn: ConnId,
        user: User,
    },
    Social(Box<SocialPending>),
    Receipt(Box<ReceiptWrite>),
    /// A MARK of this user.
    Mark(Origin, UserName),
    /// A message deleted for one user.
    Hidden(Box<Hiding>),
    /// A DROP_DEVICE.
    Dropped(Origin, DeviceId),
    /// A request that is answered by DONE.
    Done(Origin),
    Group(Box<GroupPending>),
    /// What is not stored, for members of a group of whom some came or went with this record.
    Pass(Box<(Submit, Targets)>),
    /// A user was deleted.
    Deleted(Box<DeleteAsk>),
    /// The deletion of this user has come further.
    Deletion(UserName),
}

impl PendingWork {
    /// The members that it goes to, by shard.
    pub(crate) fn targets_mut(&mut self) -> Option<&mut Targets> {
        match self {
            Self::Group(group) => group.message.as_mut().map(|(_, targets)| targets),
            Self::Pass(pass) => Some(&mut pass.1),
            Self::Message(_)
            | Self::Repeat { .. }
            | Self::User { .. }
            | Self::Social(_)
            | Self::Receipt(_)
            | Self::Mark(..)
            | Self::Hidden(_)
            | Self::Dropped(..)
            | Self::Done(_)
            | Self::Deleted(_)
            | Self::Deletion(_) => None,
        }
    }
}

impl Shard {
    /// A durable send has reached the owner of its conversation.
    pub(crate) fn submit(&mut self, submit: Submit, fx: &mut Effects) {
        if submit.passing().is_some() {
            return self.pass(submit, fx);
        }
        if !submit.is_to_group() {
            return self.accept(submit, fx);
        }
        match self.may_append() {
            Ok(()) => {
                if let Some(submit) = self.group_is_there(submit, fx) {
                    self.accept(submit, fx);
                }
            }
            Err(code) => self.refuse(submit.origin, code, fx),
        }
    }

    /// A send to a conversation that waits for something waits too.
    fn wait(&mut self, submit: Submit, fx: &mut Effects) {
        let id = submit.message.conversation;
        let Some(conversation) = self.conversations.peek_mut(&id) else { return };
        if conversation.waiting.len() >= WAITERS_PER_LOAD_MAX {
            return self.refuse(submit.origin, ErrorCode::Busy, fx);
        }
        conversation.waiting.push_back(submit);
        // The question or its answer may have been lost; the sender's retry brings us here.
        if let Stage::AskingUser { since_us } = conversation.stage
            && self.now.mono_us >= since_us + ASK_AGAIN_US
        {
            conversation.stage = Stage::AskingUser { since_us: self.now.mono_us };
            self.ask_user(id, fx);
        }
    }

    /// The first send to a conversation that is not in memory: it waits there.
    fn submit_first(&mut self, submit: Submit, fx: &mut Effects) {
        if !self.may_load() {
            return self.refuse(submit.origin, ErrorCode::Busy, fx);
        }
        let (id, device) = (submit.message.conversation, submit.device_key);
        let mut conversation = Conversation::new();
        conversation.waiting.push_back(submit);
        self.conversations.put(id, conversation);
        self.evict_conversations();
        self.load(Question::Head(id, device), Query::Head { conversation: id, device }, fx);
    }

    /// What is known of writing to `user` does not count any more.
    pub(crate) fn forget_permit(&mut self, id: ConversationId, user: &UserName) {
        if let Some(conversation) = self.conversations.peek_mut(&id)
            && !self.planted.is(Bug::BlockUnheard)
        {
            conversation.permits.retain(|permit| permit.to != *user);
        }
    }

    /// Takes one send, or has it wait for what its conversation needs. The conversation is looked up once.
    fn accept(&mut self, mut submit: Submit, fx: &mut Effects) {
        if let Err(code) = self.may_append() {
            return self.refuse(submit.origin, code, fx);
        }
        let id = submit.message.conversation;
        let Some(conversation) = self.conversations.get_mut(&id) else { return self.submit_first(submit, fx) };
        if conversation.stage != Stage::Ready {
            return self.wait(submit, fx);
        }
        if submit.act().is_some() {
            return self.accept_in_group(submit, fx);
        }
        let Some(sender) = conversation.sender_or_new(submit.device_key) else {
            conversation.stage = Stage::Loading;
            let device = submit.device_key;
            conversation.waiting.push_front(submit);
            return self.load(Question::Head(id, device), Query::Head { conversation: id, device }, fx);
        };
        let unfiltered = self.planted.is(Bug::NoDuplicateFilter);
        let hash = submit.hash();
        let seen = if unfiltered { Seen::New } else { sender.filter.check(submit.message.client_seq, hash) };
        match seen {
            Seen::New if submit.is_to_group() => self.accept_in_group(submit, fx),
            Seen::New => match conversation.permission(&submit, &self.social.privacy, self.now.mono_us) {
                Some(Ok(())) => match submit.amending() {
                    None => {
                        let numbered = conversation.number(&mut submit, (hash, self.now.unix_ms), unfiltered);
                        self.write_numbered(submit, numbered, fx);
                    }
                    Some(amending) => self.read_original(submit, amending, fx),
                },
                Some(Err(code)) => self.refuse(submit.origin, code, fx),
                None => {
                    conversation.stage = Stage::AskingUser { since_us: self.now.mono_us };
                    conversation.waiting.push_front(submit);
                    self.ask_user(id, fx);
                }
            },
            Seen::Repeat(accepted) => {
                let ack = SendAck { conversation: id, seq: accepted.seq, time_ms: accepted.time_ms, dup: true };
                let on_disk = accepted.seq <= conversation.committed;
                self.sessions.counters.duplicates += 1;
                if on_disk {
                    self.answer_send(submit.origin, (true, Ok(ack)), None, fx);
                } else {
                    let work = PendingWork::Repeat { origin: submit.origin, ack };
                    self.pending.push_back(Pending { lsn: self.appended, weight: 0, work });
                }
            }
            Seen::Conflict => self.refuse(submit.origin, ErrorCode::Conflict, fx),
            Seen::Stale => self.refuse(submit.origin, ErrorCode::StaleClientSeq, fx),
        }
    }

    /// A message that is taken by who it is for.
    fn permitted(&mut self, submit: Submit, fx: &mut Effects) {
        match submit.amending() {
            None => self.write(submit, fx),
            Some(amending) => self.read_original(submit, amending, fx),
        }
    }

    /// Gives a new message its number and sends it to the log.
    pub(crate) fn write(&mut self, mut submit: Submit, fx: &mut Effects) {
        let (hash, unfiltered) = (submit.hash(), self.planted.is(Bug::NoDuplicateFilter));
        let Some(conversation) = self.conversations.peek_mut(&submit.message.conversation) else { return };
        let numbered = conversation.number(&mut submit, (hash, self.now.unix_ms), unfiltered);
        self.write_numbered(submit, numbered, fx);
    }

    fn write_numbered(&mut self, submit: Submit, numbered: Numbered, fx: &mut Effects) {
        let Numbered { message, first, begins } = numbered;
        let (id, time_ms) = (message.conversation, message.time_ms);
        if first {
            let (one, other) = (message.from.clone(), message.to.clone());
            let members = if one <= other { [one, other] } else { [other, one] };
            self.append(Record::Conversation { conversation: id, members, created_ms: time_ms }, fx);
        }
        if begins {
            let key = RowKey::Wrote(id, message.from.clone());
            let rows = vec![Row { key, stamp: 1, value: Some(RowValue::Wrote) }];
            self.append(Record::Change(Box::new(Change { message: None, rows })), fx);
        }
        let record = record_of(&message);
        let weight = record.weight();
        self.pending_bytes += weight;
        let lsn = self.append(record, fx);
        let sent = Sent { message, origin: submit.origin, ack_timeout_ms: submit.ack_timeout_ms };
        self.pending.push_back(Pending { lsn, weight, work: PendingWork::Message(sent) });
    }

    /// Serves what has waited, until the conversation has to wait again.
    pub(crate) fn advance(&mut self, id: ConversationId, fx: &mut Effects) {
        while let Some(conversation) = self.conversations.get_mut(&id)
            && conversation.stage == Stage::Ready
            && let Some(submit) = conversation.waiting.pop_front()
        {
            self.accept(submit, fx);
        }
    }

    /// The store has answered about a conversation and one device.
    pub(crate) fn head_loaded(&mut self, id: ConversationId, device: DeviceKey, answer: Answer, fx: &mut Effects) {
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        conversation.stage = Stage::Ready;
        let Answer::Head(head) = answer else {
            // Nothing was appended, so this is a plain refusal.
            let loaded = conversation.loaded;
            for submit in std::mem::take(&mut conversation.waiting) {
                self.refuse(submit.origin, self.unread(), fx);
            }
            if !loaded {
                self.conversations.pop(&id);
            }
            return;
        };
        if !conversation.loaded {
            conversation.loaded = true;
            conversation.exists = head.exists;
            conversation.senders_whole = !head.exists;
            let low = u64::from(self.planted.is(Bug::HeadOneLow));
            conversation.head = Seq(head.head.0.saturating_sub(low));
            conversation.committed = conversation.head;
        }
        if conversation.sender(device).is_none() {
            conversation.add_sender(device, Filter::restore(head.filter));
        }
        self.advance(id, fx);
    }

    /// Asks the shard of the receiver of the first waiting message whether it takes it.
    fn ask_user(&mut self, id: ConversationId, fx: &mut Effects) {
        let Some(conversation) = self.conversations.peek(&id) else { return };
        let Some(submit) = conversation.waiting.front() else { return };
        let (user, from) = (submit.message.to.clone(), submit.message.from.clone());
        let (exists, answered) = (conversation.exists, conversation.wrote.contains(&user));
        let owner = self.owner(user.partition());
        if self.is_blocked(owner) && !self.is_here(owner) {
            return self.user_known(id, &user, Err(ErrorCode::Busy), fx);
        }
        let ask = Box::new(Ask { conversation: id, user, from, exists, answered });
        if self.is_here(owner) {
            self.know_user(owner, ask, fx);
        } else {
            self.tell_shard(owner, ShardMessage::AskUser(ask), fx);
        }
    }

    /// Another shard (or this one) asks whether a user of ours exists and takes a message.
    pub(crate) fn know_user(&mut self, asker: ShardIndex, ask: Box<Ask>, fx: &mut Effects) {
        if ask.exists || self.online.contains_key(&ask.user) || self.users.get(&ask.user).is_some() {
            let user = ask.user.clone();
            self.with_settings(&user, Parked::Ask(asker, ask), fx);
        } else if self.may_load() {
            let query = Query::User { name: ask.user.clone() };
            self.load(Question::KnowUser(asker, ask), query, fx);
        } else {
            self.tell_user_known(asker, &ask, Err(ErrorCode::Busy), fx);
        }
    }

    pub(crate) fn user_loaded(&mut self, asker: ShardIndex, ask: Box<Ask>, answer: Answer, fx: &mut Effects) {
        match answer {
            Answer::User(Some(user)) => {
                self.remember_user(user);
                let user = ask.user.clone();
                self.with_settings(&user, Parked::Ask(asker, ask), fx);
            }
            Answer::User(None) => self.tell_user_known(asker, &ask, Err(ErrorCode::NoSuchUser), fx),
            Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Count(_)
            | Answer::Failed => self.tell_user_known(asker, &ask, Err(ErrorCode::Busy), fx),
        }
    }

    pub(crate) fn tell_user_known(
        &mut self,
        asker: ShardIndex,
        ask: &Ask,
        known: Result<(), ErrorCode>,
        fx: &mut Effects,
    ) {
        let (conversation, user) = (ask.conversation, ask.user.clone());
        if self.is_here(asker) {
            self.user_known(conversation, &user, known, fx);
        } else {
            self.tell_shard(asker, ShardMessage::UserKnown { conversation, user, known }, fx);
        }
    }

    /// The answer that a conversation waits for.
    pub(crate) fn user_known(
        &mut self,
        id: ConversationId,
        user: &UserName,
        known: Result<(), ErrorCode>,
        fx: &mut Effects,
    ) {
        let now_us = self.now.mono_us;
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        // An answer to a question that was asked twice may come when the other side is asked about.
        let asked = conversation.waiting.front().is_some_and(|submit| submit.message.to == *user);
        if !asked || !matches!(conversation.stage, Stage::AskingUser { .. }) {
            return;
        }
        conversation.stage = Stage::Ready;
        conversation.permits.retain(|permit| permit.to != *user);
        // What will be another answer in a moment is not kept.
        if matches!(known, Ok(()) | Err(ErrorCode::Blocked | ErrorCode::NotAccepted | ErrorCode::UserDeleted)) {
            conversation.permits.push(Permit { to: user.clone(), result: known, since_us: now_us });
        }
        let Err(code) = known else {
            // The head of the queue is the send that asked: write it without asking again.
            if let Some(submit) = conversation.waiting.pop_front() {
                match self.may_append() {
                    Ok(()) => self.permitted(submit, fx),
                    Err(code) => self.refuse(submit.origin, code, fx),
                }
            }
            return self.advance(id, fx);
        };
        // Both directions wait here; only those that write to this user are refused, and of them only what is new for
        // certain: a repeat of what was taken before has its place.
        let front = conversation.waiting.pop_front();
        let waiting = std::mem::take(&mut conversation.waiting).into_iter();
        let (more, kept): (VecDeque<_>, VecDeque<_>) =
            waiting.partition(|submit| submit.message.to == *user && conversation.is_new(submit));
        conversation.waiting = kept;
        let refused: Vec<_> = front.into_iter().chain(more).collect();
        for submit in refused {
            self.refuse(submit.origin, code, fx);
        }
        self.advance(id, fx);
    }

    /// Records up to `upto` are durable: answer, deliver.
    pub(crate) fn stored(&mut self, upto: u64, fx: &mut Effects) {
        debug_assert!(upto <= self.appended && upto >= self.stored, "commits only rise, up to what was appended");
        self.stored = upto.min(self.appended);
        while let Some(pending) = self.pending.front()
            && pending.lsn <= upto
        {
            if matches!(pending.work, PendingWork::Message(_)) {
                self.message_stored(upto, fx);
                continue;
            }
            let Some(pending) = self.pending.pop_front() else { return };
            self.pending_bytes -= pending.weight;
            match pending.work {
                PendingWork::Message(_) => debug_assert!(false, "taken above"),
                PendingWork::Repeat { origin, ack } => self.answer_send(origin, (true, Ok(ack)), None, fx),
                PendingWork::User { conn, user } => self.user_created(conn, user, fx),
                PendingWork::Social(pending) => self.social_stored(*pending, fx),
                PendingWork::Receipt(write) => self.receipt_written(*write, fx),
                PendingWork::Mark(origin, user) => self.marked(origin, &user, Ok(()), fx),
                PendingWork::Hidden(hiding) => self.hidden(&hiding, Ok(()), fx),
                PendingWork::Dropped(origin, device) => self.dropped(origin, device, fx),
                PendingWork::Done(origin) => self.tell_done(origin, Ok(()), fx),
                PendingWork::Group(pending) => self.group_committed(*pending, fx),
                PendingWork::Pass(pass) => self.pass_on(pass.0, &pass.1, fx),
                PendingWork::Deleted(ask) => self.deleted(*ask, fx),
                PendingWork::Deletion(user) => self.deletion_written(&user, fx),
            }
        }
        if self.is_moving() {
            self.left_behind(fx);
        }
    }

    /// The store failed under something that waited: whether it was kept is unknown.
    pub(crate) fn pending_failed(&mut self, pending: Pending, fx: &mut Effects) {
        match pending.work {
            PendingWork::Message(Sent { origin, .. }) | PendingWork::Repeat { origin, .. } => {
                self.refuse(origin, ErrorCode::StoreFailed, fx);
            }
            PendingWork::User { conn, user } => self.user_not_created(conn, &user, fx),
            PendingWork::Social(pending) => self.social_failed(&pending, fx),
            PendingWork::Receipt(write) => self.receipt_not_written(&write, fx),
            PendingWork::Mark(origin, user) => self.marked(origin, &user, Err(ErrorCode::StoreFailed), fx),
            PendingWork::Hidden(hiding) => self.hide_failed(&hiding, fx),
            PendingWork::Dropped(origin, _) | PendingWork::Done(origin) => {
                self.tell_done(origin, Err(ErrorCode::StoreFailed), fx);
            }
            PendingWork::Group(pending) => self.refuse(pending.origin, ErrorCode::StoreFailed, fx),
            PendingWork::Pass(pass) => self.refuse_submit(&pass.0, ErrorCode::StoreFailed, fx),
            PendingWork::Deleted(ask) => self.tell_done(ask.origin, Err(ErrorCode::StoreFailed), fx),
            PendingWork::Deletion(_) => {}
        }
    }

    pub(crate) fn refuse(&mut self, origin: Origin, code: ErrorCode, fx: &mut Effects) {
        self.answer_send(origin, (true, Err(code)), None, fx);
    }

    /// Keeps the cache within its bound. Conversations with something in flight stay, so the bound can be passed by
    /// as many as are in flight at once.
    fn evict_conversations(&mut self) {
        let mut looks = 0;
        while self.conversations.len() > self.config.conversations_cached_max && looks < EVICTION_LOOKS_MAX {
            looks += 1;
            let Some((id, conversation)) = self.conversations.pop_lru() else { return };
            if conversation.may_go() {
                self.sessions.counters.conversations_evicted += 1;
            } else {
                self.conversations.put(id, conversation);
            }
        }
    }
}
