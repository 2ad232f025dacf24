//! Retention: the task on the side thread that lets go of old messages of the partitions that this node owns. One a
//! node, and none where everything is kept.
//!
//! A pass looks at the oldest message of each conversation, some conversations a pass, and lets go of a beginning of
//! those that have more than they should, some messages at a time, each time in one transaction with the floor of the
//! conversation and with what the duplicate filter still has to know of them. It is a writer of its own, the one of the
//! shard [`RETAINER`], and fenced as a shard is: who lost a partition lets go of nothing there. What a conversation still
//! has is always an end of it without gaps.
//!
//! By size the oldest go first, in steps of time: within one step it is conversation after conversation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringline_schema::ids::{ConversationId, Partition};
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::address::Address;
use super::commit::are_held;
use super::errors::{Fate, WriteError};
use super::held::Held;
use super::orphans::Orphans;
use super::session::{Begun, Connection, Writer};
use super::sql::Retains;
use super::values::{Id, number, stored};
use crate::RetentionStats;
use crate::embedded::Retention;

/// The number that the retainer has among the writers of its start.
pub(super) const RETAINER: i32 = -2;
/// Bytes that a message counts as beside its body and what is kept with it. The tables of version 4 say the same.
pub(super) const MESSAGE_BYTES: i64 = 200;
/// Conversations that are looked at with one statement, and those whose messages go in one transaction.
const PAGE: usize = 256;
const CHUNK: usize = 32;
/// Messages of one conversation that go in one transaction.
const MESSAGES_MAX: i64 = 256;
/// Conversations that a pass looks at; the next goes on behind them.
const LOOKS_MAX: usize = 262_144;
/// By size: steps of time from the oldest message until now, of which a pass makes as many as it needs.
const STEPS: u64 = 64;
/// By size: this part of the limit may be kept beyond it.
const SLACK: u64 = 256;
/// A transaction or a look that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) type Value<'a> = &'a (dyn ToSql + Sync);

/// What is shown of it, for the handle of one shard.
#[derive(Debug, Default)]
pub(super) struct Figures {
    floors: AtomicU64,
    messages: AtomicU64,
    bytes: AtomicU64,
    kept_bytes: AtomicU64,
}

impl Figures {
    pub fn stats(&self) -> RetentionStats {
        let read = |value: &AtomicU64| value.load(Ordering::Relaxed);
        RetentionStats {
            log_bytes: read(&self.kept_bytes),
            floors: read(&self.floors),
            bytes_released: read(&self.bytes),
            messages_released: read(&self.messages),
            ..RetentionStats::default()
        }
    }
}

/// See the module.
pub(super) struct Retainer {
    pub address: Arc<Address>,
    pub writer: Writer,
    pub held: Arc<Held>,
    pub policy: Retention,
    pub interval: Duration,
    pub figures: Arc<Figures>,
    state: State,
}

#[derive(Default)]
struct State {
    session: Option<Arc<Session>>,
    /// Where the look that is under way goes on.
    next: Option<ConversationId>,
    orphans: Orphans,
}

/// A connection that has begun a new epoch of the writer.
pub(super) struct Session {
    pub connection: Connection,
    pub retains: Retains,
    writer: Writer,
    begun: Begun,
}

/// The oldest message of a conversation, and its last.
#[derive(Clone, Copy, Debug)]
struct Oldest {
    conversation: ConversationId,
    first: u64,
    first_ms: u64,
    last: u64,
}

/// What goes of a conversation.
#[derive(Clone, Copy, Debug)]
struct Going {
    conversation: ConversationId,
    /// Messages below this.
    floor: i64,
    /// The time of the last of them.
    gone_ms: i64,
    messages: i64,
    bytes: i64,
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// The time of the oldest message.
    oldest_ms: Option<u64>,
    /// There was something that may go.
    may_go: bool,
}

/// What may go in a look.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Messages that are older, in milliseconds since 1970.
    cutoff_ms: u64,
    /// Of each conversation all but so many; 0: all stay.
    messages: u64,
    /// At most so many bytes.
    budget: i64,
}

impl Retainer {
    pub fn new(
        (address, writer, held): (Arc<Address>, Writer, Arc<Held>),
        (policy, interval): (Retention, Duration),
    ) -> Self {
        Self { address, writer, held, policy, interval, figures: Arc::default(), state: State::default() }
    }

    /// The task's body. Ends when this start was replaced, or with the side thread.
    pub async fn run(mut self) {
        loop {
            sleep(self.interval).await;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
            let Err(error) = self.pass(now_ms).await else { continue };
            self.state.session = None;
            match error {
                // The shards are told by their own commits.
                WriteError::Fenced(_) => return,
                error if error.fate() == Fate::Stop => tracing::error!(%error, "retention can't work"),
                error => tracing::warn!(%error, "retention waits for PostgreSQL"),
            }
        }
    }

    /// Lets go of what may go. Errors: what has gone is gone, the next pass goes on.
    pub async fn pass(&mut self, now_ms: u64) -> Result<(), WriteError> {
        let session = match &self.state.session {
            Some(session) => Arc::clone(session),
            None => {
                let begin = Session::begin(&self.address, self.writer);
                let session = Arc::new(timeout(LIMIT, begin).await.map_err(|_| WriteError::TimedOut(LIMIT))??);
                Arc::clone(self.state.session.insert(session))
            }
        };
        let before = (self.figures.floors.load(Ordering::Relaxed), self.figures.messages.load(Ordering::Relaxed));
        let Retention { age_ms, size_bytes, messages } = self.policy;
        let cutoff_ms = if age_ms == 0 { 0 } else { now_ms.saturating_sub(age_ms) };
        let seen = self.look(&session, Limits { cutoff_ms, messages, budget: i64::MAX }).await?;
        if let Some(oldest_ms) = seen.oldest_ms.filter(|_| size_bytes > 0) {
            self.by_size(&session, (oldest_ms, now_ms)).await?;
        }
        let floors = self.figures.floors.load(Ordering::Relaxed) - before.0;
        let gone = self.state.orphans.drop_some(&session, (floors > 0, &self.held)).await?;
        self.kept_bytes(&session).await?;
        let messages = self.figures.messages.load(Ordering::Relaxed) - before.1;
        if floors > 0 || gone > 0 {
            tracing::info!(floors, messages, rows = gone, "retention let go of old messages");
        }
        Ok(())
    }

    async fn kept_bytes(&self, session: &Session) -> Result<u64, WriteError> {
        let kept = session.kept_bytes().await?;
        self.figures.kept_bytes.store(kept, Ordering::Relaxed);
        Ok(kept)
    }

    /// While more is kept than should be: what is oldest, a step of time after the other.
    async fn by_size(&mut self, session: &Arc<Session>, (oldest_ms, now_ms): (u64, u64)) -> Result<(), WriteError> {
        let step_ms = (now_ms.saturating_sub(oldest_ms) / STEPS).max(1);
        for step in 1..=STEPS {
            let excess = self.kept_bytes(session).await?.saturating_sub(self.policy.size_bytes);
            // So little is not worth a look at all conversations.
            if excess <= self.policy.size_bytes / SLACK {
                break;
            }
            let cutoff_ms = oldest_ms.saturating_add(step_ms.saturating_mul(step));
            let budget = i64::try_from(excess).unwrap_or(i64::MAX);
            let before = self.figures.messages.load(Ordering::Relaxed);
            let seen = self.look(session, Limits { cutoff_ms, messages: 0, budget }).await?;
            // The next message is larger than what is too much.
            if seen.may_go && self.figures.messages.load(Ordering::Relaxed) == before {
                break;
            }
        }
        Ok(())
    }

    /// Looks at conversations of our partitions, from where the last look ended, all of them once or as many as one pass
    /// may.
    async fn look(&mut self, session: &Arc<Session>, mut limits: Limits) -> Result<Seen, WriteError> {
        let (mut looked, mut seen) = (0, Seen::default());
        let begun = self.state.next.take();
        let partitions: Vec<i16> = self.held.epochs().keys().copied().collect();
        for partition in partitions.into_iter().filter_map(|number| Partition::new(u16::try_from(number).ok()?)) {
            let (mut from, to) = ConversationId::range_of(partition);
            match begun {
                Some(begun) if begun > to => continue,
                Some(begun) => from = from.max(begun),
                None => {}
            }
            loop {
                let page = session.oldest((from, to)).await?;
                seen.oldest_ms = page.iter().map(|one| one.first_ms).chain(seen.oldest_ms).min();
                let may_go = |one: &Oldest| {
                    let count = (one.last.saturating_sub(one.first)).saturating_add(1);
                    one.first_ms < limits.cutoff_ms || (limits.messages > 0 && count > limits.messages)
                };
                let going: Vec<Oldest> = page.iter().copied().filter(may_go).collect();
                seen.may_go |= !going.is_empty();
                for chunk in going.chunks(CHUNK) {
                    self.let_go(session, (partition, chunk), &mut limits).await?;
                    if limits.budget < MESSAGE_BYTES {
                        return Ok(seen);
                    }
                }
                looked += page.len();
                let Some(last) = page.last().filter(|_| page.len() == PAGE) else { break };
                from = ConversationId(last.conversation.0.saturating_add(1));
                if looked >= LOOKS_MAX {
                    self.state.next = Some(from);
                    return Ok(seen);
                }
            }
        }
        Ok(seen)
    }

    /// Of some conversations of one partition, all messages that may go.
    async fn let_go(
        &self,
        session: &Session,
        (partition, chunk): (Partition, &[Oldest]),
        limits: &mut Limits,
    ) -> Result<(), WriteError> {
        loop {
            let mut going = session.beginnings(chunk, limits).await?;
            let is_cut = going.iter().any(|going| going.messages >= MESSAGES_MAX);
            let mut left = limits.budget;
            going.retain(|going| {
                let fits = going.bytes <= left;
                left -= if fits { going.bytes } else { 0 };
                fits
            });
            if going.is_empty() || !self.write(session, (partition, &going)).await? {
                return Ok(());
            }
            // Without a budget there is none to use up.
            limits.budget = if limits.budget == i64::MAX { i64::MAX } else { left };
            if !is_cut {
                return Ok(());
            }
        }
    }

    /// One transaction. False: the partition is not ours any more.
    async fn write(&self, session: &Session, (partition, going): (Partition, &[Going])) -> Result<bool, WriteError> {
        let written = session.write((partition, going), &self.held);
        if !timeout(LIMIT, written).await.map_err(|_| WriteError::TimedOut(LIMIT))?? {
            return Ok(false);
        }
        let sum = |of: fn(&Going) -> i64| going.iter().map(of).map(number).sum::<u64>();
        self.figures.floors.fetch_add(going.len() as u64, Ordering::Relaxed);
        self.figures.messages.fetch_add(sum(|going| going.messages), Ordering::Relaxed);
        self.figures.bytes.fetch_add(sum(|going| going.bytes), Ordering::Relaxed);
        Ok(true)
    }
}

impl Session {
    async fn begin(address: &Address, writer: Writer) -> Result<Self, WriteError> {
        let connection = Connection::open(address).await?;
        connection.check(address).await?;
        let retains = Retains::prepare(&connection.client).await?;
        match connection.begin(&retains.begin_session, writer).await? {
            Some(begun) => Ok(Self { connection, retains, writer, begun }),
            None => Err(connection.replaced(writer).await),
        }
    }

    /// Of all messages of all nodes.
    async fn kept_bytes(&self) -> Result<u64, WriteError> {
        let kept: i64 = self.connection.client.query_one(&self.retains.kept_bytes, &[]).await?.try_get(0)?;
        Ok(u64::try_from(kept).unwrap_or(0))
    }

    /// At most [`PAGE`] conversations from one to another, rising.
    async fn oldest(&self, (from, to): (ConversationId, ConversationId)) -> Result<Vec<Oldest>, WriteError> {
        let values: [Value<'_>; 3] = [&Id::from(from), &Id::from(to), &(PAGE as i64)];
        let found = self.connection.client.query(&self.retains.oldest, &values).await?;
        let oldest = |row: &Row| {
            let conversation = ConversationId(row.try_get::<_, Id>(0)?.0);
            let last: Option<i64> = row.try_get(3)?;
            let (first, first_ms) = (number(row.try_get(1)?), number(row.try_get(2)?));
            Ok(Oldest { conversation, first, first_ms, last: last.map_or(first, number) })
        };
        found.iter().map(oldest).collect::<Result<_, tokio_postgres::Error>>().map_err(WriteError::from)
    }

    /// What may go of these conversations, at most [`MESSAGES_MAX`] of each, and of each no more than the budget.
    async fn beginnings(&self, chunk: &[Oldest], limits: &Limits) -> Result<Vec<Going>, WriteError> {
        let conversations: Vec<Id> = chunk.iter().map(|one| one.conversation.into()).collect();
        let floor = |one: &Oldest| match limits.messages {
            0 => 0,
            keep => stored(one.last.saturating_add(1).saturating_sub(keep)),
        };
        let floors: Vec<i64> = chunk.iter().map(floor).collect();
        let cutoff = stored(limits.cutoff_ms);
        let values: [Value<'_>; 5] = [&conversations, &floors, &cutoff, &MESSAGES_MAX, &limits.budget];
        let found = self.connection.client.query(&self.retains.beginnings, &values).await?;
        let going = |row: &Row| {
            let conversation = ConversationId(row.try_get::<_, Id>(0)?.0);
            let (last, gone_ms): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
            let (messages, bytes) = (row.try_get(3)?, row.try_get(4)?);
            Ok(Going { conversation, floor: last.saturating_add(1), gone_ms, messages, bytes })
        };
        found.iter().map(going).collect::<Result<_, tokio_postgres::Error>>().map_err(WriteError::from)
    }

    /// Lets go of messages: their floors rise, and the duplicate filter keeps what it needs. False: nothing was done, the
    /// partition is not ours any more.
    async fn write(&self, (partition, going): (Partition, &[Going]), held: &Held) -> Result<bool, WriteError> {
        let partitions = [partition.number() as i16];
        let bytes = going.iter().map(|going| going.bytes).sum::<i64>();
        if !self.open((&partitions, -bytes), held).await? {
            return Ok(false);
        }
        let conversations: Vec<Id> = going.iter().map(|going| going.conversation.into()).collect();
        let floors: Vec<i64> = going.iter().map(|going| going.floor).collect();
        let gone_ms: Vec<i64> = going.iter().map(|going| going.gone_ms).collect();
        let which: [Value<'_>; 2] = [&conversations, &floors];
        let raised: [Value<'_>; 3] = [&conversations, &floors, &gone_ms];
        let (client, retains) = (&self.connection.client, &self.retains);
        let (floors, kept, dropped, gone) = tokio::join!(
            biased;
            client.execute(&retains.floors, &raised),
            client.execute(&retains.keep_accepted, &which),
            client.execute(&retains.drop_accepted, &which),
            client.execute(&retains.messages, &which),
        );
        floors?;
        kept?;
        dropped?;
        gone?;
        client.batch_execute("COMMIT").await?;
        Ok(true)
    }

    /// Begins a transaction that holds some partitions and counts bytes that came or went. False: there is none, because
    /// one of them is not ours.
    pub async fn open(&self, (partitions, bytes): (&[i16], i64), held: &Held) -> Result<bool, WriteError> {
        let (client, retains) = (&self.connection.client, &self.retains);
        let Writer { owner, shard } = self.writer;
        let (counting, holding): ([Value<'_>; 4], [Value<'_>; 2]) =
            ([&owner, &shard, &self.begun.epoch, &bytes], [&partitions, &owner]);
        let epochs = held.epochs();
        let (begun, counted, found) = tokio::join!(
            biased;
            client.batch_execute("BEGIN"),
            client.execute(&retains.count, &counting),
            client.query(&retains.hold, &holding),
        );
        begun?;
        let (is_counted, are_ours) = (counted? == 1, are_held(&found?, partitions, &epochs)?);
        if is_counted && are_ours {
            return Ok(true);
        }
        client.batch_execute("ROLLBACK").await?;
        if is_counted { Ok(false) } else { Err(self.connection.replaced(self.writer).await) }
    }
}
