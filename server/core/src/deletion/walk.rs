//! The work behind a deletion: the user leaves its groups, its messages are taken back if that is wanted, its rows go.
//!
//! In three stages ([`DeletionStage`]), each a walk of which the row of the deletion says how far it has come. First all
//! groups are left, page by page of the user's conversations. After [`SETTLE_MS`], when nothing can be on its way any more
//! that a session of the user had begun (a group made, a message sent), the conversations are walked again; whatever is
//! found is left, and messages are recalled. Then devices with their cursors, marks, block list, what was hidden, and the
//! password's hash are erased, and the row itself.
//!
//! The owners of groups and conversations do the work, asked by the messages that sessions send as well ([`Submit`],
//! [`ShardMessage::Fetch`]) under the connection [`DELETER`], which no session has. Every question may be repeated: one
//! that is not answered in [`PATIENCE_MS`] is asked again, one that was refused after [`RETRY_MS`], for ever. So nothing
//! depends on a message of a lane, and a crash between any two records only repeats a page. In a cluster a page of conversations
//! is put together from all nodes, and waits for one that is away.
//!
//! Bounded: [`DELETIONS_ACTIVE_MAX`] deletions work at a time, each with one page of conversations and [`JOBS_OPEN_MAX`]
//! questions open. Invariant: `asks` names exactly the open jobs of all users.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::message::{BodyKind, MessageState, Standing};
use ringline_schema::record::{
    Answer, Change, ConversationRow, Query, Range, Record, StoredExtra, StoredMessage, User,
};
use ringline_schema::rows::{DeletionRow, DeletionStage, Row, RowKey, RowList, RowValue};

use super::DeletionQuestion;
use crate::amend::{Amending, shows_a_body};
use crate::config::{DELETIONS_ACTIVE_MAX, DELETIONS_MAX};
use crate::conversation::{Pending, PendingWork};
use crate::event::{ConnId, Effects, ShardMessage};
use crate::group::act::Act;
use crate::nodes::reads::{ListAsk, Whole};
use crate::peer::{Origin, Submit, SubmitMore};
use crate::planted::Bug;
use crate::shard::{Question, Shard};
use crate::timers::Timer;

/// What asks in the name of a deleted user; the number of the request names the question.
pub(crate) const DELETER: ConnId = ConnId { slot: u32::MAX, generation: 1 };

/// How long whatever a kicked session has begun is waited for.
const SETTLE_MS: u64 = 5_000;
/// A question that was not answered for so long is asked again.
const PATIENCE_MS: u64 = 5_000;
/// The same for one that was refused.
const RETRY_MS: u64 = 1_000;
/// How often deletions that wait are looked at.
const TICK_MS: u64 = 1_000;
/// Conversations of one page.
const PAGE_CONVERSATIONS: u16 = 64;
/// Rows of one page, to be erased by one record.
const PAGE_ROWS: u16 = 256;
/// Messages of one page that are looked at, and about the bytes of them.
const PAGE_MESSAGES: u16 = 64;
const PAGE_BYTES: u32 = 64 * 1024;
/// Questions to owners that one deletion has open.
const JOBS_OPEN_MAX: usize = 16;
/// Deletions of an earlier run asked of the store at once.
const PAGE_DELETIONS: u16 = 256;

/// What the store was asked about deletions of an earlier run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Recovery {
    /// Not asked yet, or not further than this user.
    #[default]
    Wanted,
    Loading,
    /// There was no room for all of them; asked again when those in memory have ended.
    More,
    Done,
}

/// A deletion that is not at its end.
#[derive(Debug)]
pub(crate) struct Deletion {
    row: DeletionRow,
    /// Of its row.
    stamp: u64,
    step: Step,
    /// What is to be erased, the next list first.
    lists: VecDeque<Erase>,
    /// Conversations of the page that are still to be done.
    jobs: VecDeque<Job>,
    /// Those that somebody was asked about, by the number of the question.
    open: BTreeMap<u32, Job>,
    /// Where the page ends.
    page_end: ConversationId,
    /// Nothing of an earlier session is on its way any more from then on.
    settled_us: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Its row, or rows that go, are on the way to the disk.
    Writing,
    /// Until that moment; then it waits for its turn.
    Resting {
        until_us: u64,
    },
    Waiting,
    /// The store was asked.
    Loading,
    /// Owners are asked about the conversations of a page.
    Walking,
}

/// One conversation.
#[derive(Debug)]
struct Job {
    conversation: ConversationId,
    /// The other user, or the group.
    with: UserName,
    todo: Todo,
    /// When the open question is asked again.
    due_us: u64,
}

#[derive(Debug)]
enum Todo {
    /// Leave the group, then recall if that is wanted.
    Leave,
    /// Look at the messages above this one.
    Read(Seq),
    /// Recall these, one after the other, then read on.
    Recall { left: VecDeque<(Seq, BodyKind)>, read: Seq },
}

/// What is erased.
#[derive(Clone, Debug)]
enum Erase {
    List(RowList),
    Hash,
    /// The row of the deletion: the last thing.
    End,
}

impl Deletion {
    /// At its beginning; its row is on the way to the disk.
    pub fn new(row: DeletionRow, stamp: u64, now_us: u64) -> Self {
        Self {
            row,
            stamp,
            step: Step::Writing,
            lists: VecDeque::new(),
            jobs: VecDeque::new(),
            open: BTreeMap::new(),
            page_end: ConversationId::default(),
            settled_us: now_us + SETTLE_MS * 1_000,
        }
    }

    /// As an earlier run has left it.
    fn resumed(row: DeletionRow, stamp: u64, now_us: u64) -> Self {
        Self { step: Step::Waiting, ..Self::new(row, stamp, now_us) }
    }

    /// The row that says how far it is.
    pub fn row(&self, user: &UserName) -> Row {
        let value = Some(RowValue::Deletion(self.row));
        Row { key: RowKey::Deletion(user.clone()), stamp: self.stamp, value }
    }

    fn is_at_work(&self) -> bool {
        match self.step {
            Step::Writing | Step::Loading | Step::Walking => true,
            Step::Resting { .. } | Step::Waiting => false,
        }
    }

    /// What a conversation needs in this stage.
    fn job(&self, row: ConversationRow) -> Option<Job> {
        let here = matches!(row.standing, Some(Standing::Member | Standing::Invited | Standing::Asked));
        let recalls = self.row.recall && self.row.stage == DeletionStage::Sweeping;
        let todo = match (here, recalls) {
            (true, _) => Todo::Leave,
            (false, true) => Todo::Read(Seq::ZERO),
            (false, false) => return None,
        };
        Some(Job { conversation: row.conversation, with: row.with, todo, due_us: 0 })
    }
}

impl Shard {
    /// Begins or goes on with deletions that wait for their turn, as many as may work at a time.
    fn deletions_on(&mut self, fx: &mut Effects) {
        if self.draining || self.poisoned {
            return;
        }
        self.arm_deletions();
        let at_work = self.deletions.users.values().filter(|deletion| deletion.is_at_work()).count();
        let waiting = self.deletions.users.iter().filter(|(_, deletion)| deletion.step == Step::Waiting);
        let free = DELETIONS_ACTIVE_MAX.saturating_sub(at_work);
        let next: Vec<_> = waiting.take(free).map(|(user, _)| user.clone()).collect();
        for user in next {
            self.deletion_on(&user, fx);
        }
    }

    fn arm_deletions(&mut self) {
        let pending = !self.deletions.users.is_empty() || self.deletions.recovery != Recovery::Done;
        if pending && !std::mem::replace(&mut self.deletions.armed, true) {
            self.timers.arm(self.now.mono_us + TICK_MS * 1_000, Timer::Deletions);
        }
    }

    /// Looks at what waits: at the start, and once in a while as long as there is a deletion.
    pub(crate) fn deletions_due(&mut self, fx: &mut Effects) {
        self.deletions.armed = false;
        if self.draining || self.poisoned {
            return;
        }
        let more = self.deletions.recovery == Recovery::More && self.deletions.users.is_empty();
        if (more || self.deletions.recovery == Recovery::Wanted) && self.may_load() {
            self.deletions.recovery = Recovery::Loading;
            self.recover(None, fx);
        }
        let now_us = self.now.mono_us;
        let mut late = Vec::new();
        for (user, deletion) in &mut self.deletions.users {
            if matches!(deletion.step, Step::Resting { until_us } if until_us <= now_us) {
                deletion.step = Step::Waiting;
            }
            let due = deletion.open.iter().filter(|(_, job)| job.due_us <= now_us);
            late.extend(due.map(|(number, _)| (user.clone(), *number)));
        }
        for (user, number) in late {
            self.deletions.asks.remove(&number);
            let deletion = self.deletions.users.get_mut(&user);
            if let Some(job) = deletion.and_then(|deletion| deletion.open.remove(&number)) {
                self.ask_owner(&user, job, fx);
            }
        }
        self.deletions_on(fx);
    }

    /// This shard has more users than before, whose deletions go on here.
    pub(crate) fn recover_again(&mut self) {
        match self.deletions.recovery {
            Recovery::Loading => self.deletions.again = true,
            Recovery::Wanted | Recovery::More | Recovery::Done => self.deletions.recovery = Recovery::Wanted,
        }
        self.arm_deletions();
    }

    fn recover(&mut self, after: Option<RowKey>, fx: &mut Effects) {
        let query = Query::Rows { list: RowList::Deletions, after, limit: PAGE_DELETIONS };
        self.load(Question::Deletion(DeletionQuestion::Recover), query, fx);
    }

    /// Deletions that an earlier run has not ended; those of this shard go on here.
    pub(crate) fn recovered(&mut self, answer: Answer, fx: &mut Effects) {
        let Answer::Rows(rows) = answer else {
            self.deletions.recovery = Recovery::Wanted;
            return self.arm_deletions();
        };
        let last = rows.last().map(|row| row.key.clone());
        let mut room = true;
        for row in rows {
            let (RowKey::Deletion(user), Some(RowValue::Deletion(value))) = (row.key, row.value) else { continue };
            if !self.is_here(self.owner(user.partition())) || self.deletions.users.contains_key(&user) {
                continue;
            }
            room = self.deletions.users.len() < DELETIONS_MAX;
            if !room {
                break;
            }
            let deletion = Deletion::resumed(value, row.stamp, self.now.mono_us);
            self.deletions.users.insert(user, deletion);
        }
        let again = last.is_none() && std::mem::take(&mut self.deletions.again);
        self.deletions.recovery = match last {
            _ if again => Recovery::Wanted,
            Some(_) if !room => Recovery::More,
            Some(last) => {
                self.recover(Some(last), fx);
                Recovery::Loading
            }
            None => Recovery::Done,
        };
        self.deletions_on(fx);
    }

    /// The row of a deletion is on disk.
    pub(crate) fn deletion_written(&mut self, user: &UserName, fx: &mut Effects) {
        if let Some(deletion) = self.deletions.users.get_mut(user) {
            let early = deletion.row.stage != DeletionStage::Leaving && deletion.settled_us > self.now.mono_us;
            deletion.step = if early { Step::Resting { until_us: deletion.settled_us } } else { Step::Waiting };
        }
        self.deletions_on(fx);
    }

    /// Goes on with one deletion where it is.
    fn deletion_on(&mut self, user: &UserName, fx: &mut Effects) {
        if !self.may_load() {
            return self.deletion_rests(user);
        }
        let Some(deletion) = self.deletions.users.get_mut(user) else { return };
        deletion.step = Step::Loading;
        if deletion.row.stage != DeletionStage::Erasing {
            let (device, cursor) = (DeviceKey(0), deletion.row.done);
            let ask = ListAsk { user: user.clone(), device, cursor, limit: PAGE_CONVERSATIONS };
            let question = Question::Deletion(DeletionQuestion::Page(user.clone()));
            return self.load_list(question, (ask, Whole::All), fx);
        }
        if deletion.lists.is_empty() {
            deletion.lists = [
                Erase::List(RowList::Devices(user.clone())),
                Erase::List(RowList::Marks(user.clone())),
                Erase::List(RowList::Blocks(user.clone())),
                Erase::List(RowList::AllHidden(user.clone())),
                Erase::Hash,
                Erase::End,
            ]
            .into();
        }
        match deletion.lists.front().cloned() {
            Some(Erase::List(list)) => {
                let query = Query::Rows { list, after: None, limit: PAGE_ROWS };
                self.load(Question::Deletion(DeletionQuestion::Rows(user.clone())), query, fx);
            }
            Some(Erase::Hash) => {
                let query = Query::User { name: user.clone() };
                self.load(Question::Deletion(DeletionQuestion::Hash(user.clone())), query, fx);
            }
            Some(Erase::End) | None => self.end_deletion(user, fx),
        }
    }

    fn deletion_rests(&mut self, user: &UserName) {
        let until_us = self.now.mono_us + RETRY_MS * 1_000;
        if let Some(deletion) = self.deletions.users.get_mut(user) {
            deletion.step = Step::Resting { until_us };
        }
        self.arm_deletions();
    }

    /// A page of the user's conversations.
    pub(crate) fn page_loaded(&mut self, user: &UserName, answer: Answer, fx: &mut Effects) {
        let Answer::Conversations(rows) = answer else { return self.deletion_rests(user) };
        let settled_us = self.now.mono_us + SETTLE_MS * 1_000;
        let clustered = self.is_clustered();
        let Some(deletion) = self.deletions.users.get_mut(user) else { return };
        let Some(last) = rows.last().map(|row| row.conversation) else {
            if clustered {
                // What sessions had sent to a node came there before this page was asked of it, perhaps just before.
                deletion.settled_us = settled_us;
            }
            deletion.row.stage = match deletion.row.stage {
                DeletionStage::Leaving => DeletionStage::Sweeping,
                DeletionStage::Sweeping | DeletionStage::Erasing => DeletionStage::Erasing,
            };
            deletion.row.done = ConversationId::default();
            return self.note_progress(user, fx);
        };
        deletion.page_end = last;
        let planted = &self.planted;
        let forgotten = |job: &Job| match job.todo {
            Todo::Leave => planted.is(Bug::DeletedStay),
            Todo::Read(_) | Todo::Recall { .. } => planted.is(Bug::RecallForgotten),
        };
        let jobs = rows.into_iter().filter_map(|row| deletion.job(row));
        let jobs: VecDeque<Job> = jobs.filter(|job| !forgotten(job)).collect();
        if jobs.is_empty() {
            // Nothing that would have to be found again.
            deletion.row.done = last;
            return self.deletion_on(user, fx);
        }
        (deletion.jobs, deletion.step) = (jobs, Step::Walking);
        self.walk_on(user, fx);
    }

    /// Asks about as many conversations of the page as may be open; notes the end of the page.
    fn walk_on(&mut self, user: &UserName, fx: &mut Effects) {
        while let Some(deletion) = self.deletions.users.get_mut(user)
            && deletion.open.len() < JOBS_OPEN_MAX
            && let Some(job) = deletion.jobs.pop_front()
        {
            self.ask_owner(user, job, fx);
        }
        let Some(deletion) = self.deletions.users.get_mut(user) else { return };
        if deletion.open.is_empty() && deletion.jobs.is_empty() && deletion.step == Step::Walking {
            deletion.row.done = deletion.page_end;
            self.note_progress(user, fx);
        }
    }

    /// Writes how far a deletion has come; it goes on when that is on disk.
    fn note_progress(&mut self, user: &UserName, fx: &mut Effects) {
        // What is not noted is done again: the page is asked for anew.
        if self.may_append().is_err() {
            return self.deletion_rests(user);
        }
        let Some(deletion) = self.deletions.users.get_mut(user) else { return };
        deletion.step = Step::Writing;
        deletion.stamp = deletion.stamp.saturating_add(1);
        let row = deletion.row(user);
        self.append_of_deletion(user, vec![row], fx);
    }

    fn append_of_deletion(&mut self, user: &UserName, rows: Vec<Row>, fx: &mut Effects) {
        let record = Record::Change(Box::new(Change { message: None, rows }));
        let lsn = self.append(record, fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Deletion(user.clone()) });
    }

    /// Asks the owner of a conversation to do what is next there.
    fn ask_owner(&mut self, user: &UserName, mut job: Job, fx: &mut Effects) {
        let number = self.deletions.next_ask;
        self.deletions.next_ask = number.wrapping_add(1);
        // Every shard reads a store that all share.
        let reads = self.is_moving() && matches!(job.todo, Todo::Read(_));
        let owner = if reads { self.config.shard } else { self.owner(job.conversation.partition()) };
        let free = self.is_here(owner) || !self.is_blocked(owner);
        job.due_us = self.now.mono_us + 1_000 * if free { PATIENCE_MS } else { RETRY_MS };
        let origin = Origin { shard: self.config.shard, conn: DELETER, request_id: number };
        let message = job.message(origin, user);
        let Some(deletion) = self.deletions.users.get_mut(user) else { return };
        deletion.open.insert(number, job);
        self.deletions.asks.insert(number, user.clone());
        if !free {
            return;
        }
        match message {
            message if !self.is_here(owner) => self.tell_shard(owner, message, fx),
            ShardMessage::Submit(submit) => self.submit(*submit, fx),
            ShardMessage::Fetch { origin, conversation, range, reader } => {
                let query = Query::Messages { conversation, range, reader };
                self.load(Question::Fetch(origin, conversation, range), query, fx);
            }
            _ => debug_assert!(false, "a job asks by one of two messages"),
        }
    }

    /// Takes the job that this is the answer to; `None`: it was asked again, or the deletion is over.
    fn answered_job(&mut self, number: u32) -> Option<(UserName, Job)> {
        let user = self.deletions.asks.remove(&number)?;
        let job = self.deletions.users.get_mut(&user)?.open.remove(&number)?;
        Some((user, job))
    }

    /// A group was left, or a message recalled; or not.
    pub(crate) fn deletion_answered(
        &mut self,
        number: u32,
        result: Result<Option<Standing>, ErrorCode>,
        fx: &mut Effects,
    ) {
        let Some((user, mut job)) = self.answered_job(number) else { return };
        let recalls = self
            .deletions
            .users
            .get(&user)
            .is_some_and(|deletion| deletion.row.recall && deletion.row.stage == DeletionStage::Sweeping);
        match (&mut job.todo, result) {
            // The group has another owner now, or is dissolved.
            (Todo::Leave, Ok(Some(Standing::Member))) => {}
            (Todo::Leave, Ok(_) | Err(ErrorCode::NoSuchGroup)) if recalls => job.todo = Todo::Read(Seq::ZERO),
            (Todo::Leave, Ok(_) | Err(ErrorCode::NoSuchGroup)) => return self.walk_on(&user, fx),
            (Todo::Recall { left, read }, Ok(_)) => {
                left.pop_front();
                if left.is_empty() {
                    job.todo = Todo::Read(*read);
                }
            }
            (Todo::Recall { left, read }, Err(code)) if is_settled(code) => {
                left.pop_front();
                if left.is_empty() {
                    job.todo = Todo::Read(*read);
                }
            }
            (Todo::Leave | Todo::Recall { .. } | Todo::Read(_), _) => return self.ask_later(&user, number, job),
        }
        self.ask_owner(&user, job, fx);
    }

    /// Under its old number, which nobody answers any more: it is late in a moment.
    fn ask_later(&mut self, user: &UserName, number: u32, mut job: Job) {
        job.due_us = self.now.mono_us + RETRY_MS * 1_000;
        if let Some(deletion) = self.deletions.users.get_mut(user) {
            deletion.open.insert(number, job);
            self.deletions.asks.insert(number, user.clone());
        }
    }

    /// A page of a conversation, in which the user's own messages are looked for.
    pub(crate) fn deletion_fetched(&mut self, number: u32, answer: Answer, fx: &mut Effects) {
        let Some((user, mut job)) = self.answered_job(number) else { return };
        let Answer::Messages { messages, .. } = answer else { return self.ask_later(&user, number, job) };
        let Some(read) = messages.last().map(|last| last.seq) else { return self.walk_on(&user, fx) };
        let own = |message: &StoredMessage| message.from == user && shows_a_body(message);
        let left: VecDeque<_> =
            messages.iter().filter(|message| own(message)).map(|message| (message.seq, message.kind)).collect();
        job.todo = if left.is_empty() { Todo::Read(read) } else { Todo::Recall { left, read } };
        self.ask_owner(&user, job, fx);
    }

    /// Rows of the next list; none: the list is empty.
    pub(crate) fn rows_to_erase(&mut self, user: &UserName, answer: Answer, fx: &mut Effects) {
        let Answer::Rows(rows) = answer else { return self.deletion_rests(user) };
        if rows.is_empty() {
            return self.erase_on(user, fx);
        }
        if self.may_append().is_err() {
            return self.deletion_rests(user);
        }
        let gone = |row: Row| Row { key: row.key, stamp: row.stamp.saturating_add(1), value: None };
        let rows = rows.into_iter().map(gone).collect();
        if let Some(deletion) = self.deletions.users.get_mut(user) {
            deletion.step = Step::Writing;
        }
        self.append_of_deletion(user, rows, fx);
    }

    /// The user's record, to be written without the hash.
    pub(crate) fn hash_to_erase(&mut self, user: &UserName, answer: Answer, fx: &mut Effects) {
        let Answer::User(found) = answer else { return self.deletion_rests(user) };
        let Some(found) = found.filter(|found| found.password_hash.is_some()) else {
            return self.erase_on(user, fx);
        };
        if self.may_append().is_err() {
            return self.deletion_rests(user);
        }
        if let Some(deletion) = self.deletions.users.get_mut(user) {
            deletion.step = Step::Writing;
        }
        self.users.pop(user);
        let lsn = self.append(Record::User(User { password_hash: None, ..found }), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Deletion(user.clone()) });
    }

    /// The next of what is to be erased.
    fn erase_on(&mut self, user: &UserName, fx: &mut Effects) {
        if let Some(deletion) = self.deletions.users.get_mut(user) {
            deletion.lists.pop_front();
        }
        self.deletion_on(user, fx);
    }

    /// Everything is done: the row of the deletion goes, and what it was for stays with the user's settings.
    fn end_deletion(&mut self, user: &UserName, fx: &mut Effects) {
        if self.may_append().is_err() {
            return self.deletion_rests(user);
        }
        let Some(deletion) = self.deletions.users.remove(user) else { return };
        let stamp = deletion.stamp.saturating_add(1);
        let row = Row { key: RowKey::Deletion(user.clone()), stamp, value: None };
        self.append_of_deletion(user, vec![row], fx);
    }

    /// For [`Shard::check_invariants`].
    pub(crate) fn check_deletions(&self) {
        let deletions = &self.deletions;
        let open: usize = deletions.users.values().map(|deletion| deletion.open.len()).sum();
        assert_eq!(open, deletions.asks.len(), "every open question has its user");
        for (number, user) in &deletions.asks {
            let deletion = deletions.users.get(user).expect("a question is of a deletion");
            assert!(deletion.open.contains_key(number) && deletion.open.len() <= JOBS_OPEN_MAX);
        }
        assert!(deletions.users.len() <= DELETIONS_MAX);
    }
}

impl Job {
    /// What the owner is asked.
    fn message(&self, origin: Origin, user: &UserName) -> ShardMessage {
        let conversation = self.conversation;
        let (client_seq, kind, extra, more) = match &self.todo {
            Todo::Read(after) => {
                let (limit, bytes_max) = (PAGE_MESSAGES, PAGE_BYTES);
                let range = Range { after: *after, before: None, limit, bytes_max, newest: false };
                return ShardMessage::Fetch { origin, conversation, range, reader: None };
            }
            Todo::Leave => (0, BodyKind::System, None, SubmitMore { act: Some(Act::Depart), ..SubmitMore::default() }),
            Todo::Recall { left, .. } => {
                let (refers, kind) = left.front().copied().unwrap_or((Seq::ZERO, BodyKind::Text));
                let state = MessageState::Recalled;
                let amending = Amending { refers, state, kind, soon: false, of_deleted: true };
                let extra = StoredExtra { refers, state, ..StoredExtra::default() };
                let more = SubmitMore { amend: Some(amending), ..SubmitMore::default() };
                // Rising with the messages, so that the duplicate filter takes each once.
                (refers.0, BodyKind::Amendment, Some(Box::new(extra)), more)
            }
        };
        // No session has this device.
        let device = DeviceId(0);
        let message = StoredMessage {
            conversation,
            seq: Seq::ZERO,
            from: user.clone(),
            to: self.with.clone(),
            device,
            client_seq,
            time_ms: 0,
            kind,
            body: Bytes::new(),
            extra,
        };
        ShardMessage::Submit(Box::new(Submit {
            origin,
            device_key: DeviceKey::new(user, device),
            message: message.into(),
            ack_timeout_ms: None,
            more: Some(Box::new(more)),
        }))
    }
}

/// Whether asking again for a message to be recalled would give the same.
fn is_settled(code: ErrorCode) -> bool {
    !code.retryable()
}
