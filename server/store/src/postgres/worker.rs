//! The task of one shard on the side thread: it has the shard's session, writes one commit at a time, and answers
//! questions in the order in which they were asked.
//!
//! A lost connection ends nothing: the task connects anew, with longer and longer pauses, and finds by the count of
//! commits whether the one that was under way is in the database; if it is not, it is written again. Questions wait for
//! [`QUESTION_WAIT`] and are answered `Failed` after that. Only what can't pass at all (another owner, data that the
//! database refuses) stops the shard.

use std::collections::VecDeque;
use std::future::{Future, pending};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use rand::RngExt;
use ringline_schema::record::{Answer, Query, Record};
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::address::Address;
use super::batch::Columns;
use super::commit;
use super::errors::{Fate, QueryError, WriteError};
use super::held::{Held, Taken};
use super::query;
use super::session::{Session, Writer};
use crate::LoadToken;

/// Questions that are with the server at once.
const PIPELINE_MAX: usize = 64;
/// How long a question waits for a server that is away.
pub(super) const QUESTION_WAIT: Duration = Duration::from_secs(5);
/// A server that has not answered a question by then is taken for gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(40);
/// Pause before the second attempt to connect; each next is twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Failures in a row after which the store is called away.
const FAILURES_TO_BE_AWAY: u32 = 2;

/// Work for a task.
pub(super) enum Job {
    /// The next commit; none is under way.
    Commit(Vec<Record>),
    Load(LoadToken, Query),
    /// Nothing is under way and nothing more comes.
    Close,
}

/// What a task gives back.
pub(super) enum Reply {
    /// The commit that was under way is in the database.
    Committed,
    Loaded(LoadToken, Answer),
    /// The shard has to stop.
    Failed,
}

/// What the handle may look at any time.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// The database cannot be written for now.
    pub away: AtomicBool,
    /// Sessions that were lost.
    pub reconnects: AtomicU64,
}

/// The way back to the shard. There is always room: no more is asked than there are places.
#[derive(Clone)]
pub(super) struct Out {
    pub replies: Sender<Reply>,
    pub wake: Arc<OwnedFd>,
    pub shown: Arc<Shown>,
}

impl Out {
    pub fn say(&self, reply: Reply) {
        // A handle that is gone needs no reply.
        let _ = self.replies.try_send(reply);
        self.ring();
    }

    fn ring(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn set_away(&self, away: bool) {
        if self.shown.away.swap(away, Ordering::Relaxed) != away {
            self.ring();
        }
    }
}

struct Question {
    token: LoadToken,
    query: Arc<Query>,
    since: Instant,
}

type Asked = FuturesOrdered<Pin<Box<dyn Future<Output = Result<Answer, QueryError>> + Send>>>;
type Writing = Option<Pin<Box<dyn Future<Output = Result<(), WriteError>> + Send>>>;

/// The state of a task.
pub(super) struct Worker {
    pub address: Arc<Address>,
    pub writer: Writer,
    pub held: Arc<Held>,
    pub jobs: Receiver<Job>,
    pub out: Out,
    /// An attempt to connect or to commit that takes longer has failed.
    pub limit: Duration,
    state: State,
}

#[derive(Default)]
struct State {
    /// Commits that were acknowledged.
    committed: i64,
    /// The commit that is under way: it is number `committed + 1`.
    batch: Option<Arc<Vec<Record>>>,
    /// In the order in which they were asked.
    questions: VecDeque<Question>,
    failures: u32,
}

impl Worker {
    pub fn new(
        (address, writer, held): (Arc<Address>, Writer, Arc<Held>),
        (jobs, out): (Receiver<Job>, Out),
        limit: Duration,
    ) -> Self {
        Self { address, writer, held, jobs, out, limit, state: State::default() }
    }

    /// The task's body. Ends when the handle is closed or gone, or when nothing more can be written.
    pub async fn run(mut self) {
        let shard = self.writer.shard;
        loop {
            let address = Arc::clone(&self.address);
            let (writer, known, limit) = (self.writer, self.state.committed, self.limit);
            let taken = self.held.taken();
            let begin = async move { Session::begin(&address, writer, (known, limit)).await };
            let Some(begun) = self.meanwhile(begin).await else { return };
            let ended = match begun {
                Ok(session) => self.serve(Arc::new(session), taken).await,
                Err(error) => Err(error),
            };
            let Err(error) = ended else { return };
            if error.fate() == Fate::Stop {
                tracing::error!(shard, %error, "the store of this shard stops");
                return self.fail();
            }
            self.out.shown.reconnects.fetch_add(1, Ordering::Relaxed);
            self.state.failures = self.state.failures.saturating_add(1);
            tracing::warn!(shard, %error, failures = self.state.failures, "PostgreSQL is lost: connecting anew");
            self.out.set_away(self.state.failures >= FAILURES_TO_BE_AWAY);
            let pause = self.pause();
            if self.meanwhile(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// None before the first attempt, then longer and longer, somewhere in between so that shards and nodes spread.
    fn pause(&self) -> Duration {
        let doublings = self.state.failures.saturating_sub(2).min(16);
        let most = PAUSE_MIN.saturating_mul(1 << doublings).min(PAUSE_MAX);
        if self.state.failures < 2 { Duration::ZERO } else { most.mul_f64(rand::rng().random_range(0.5..1.0)) }
    }

    /// Waits for something without a session: jobs are taken in, and questions that have waited too long are answered.
    /// `None`: the handle is closed or gone.
    async fn meanwhile<F: Future>(&mut self, future: F) -> Option<F::Output> {
        tokio::pin!(future);
        loop {
            let late = self.state.questions.front().map(|question| question.since + QUESTION_WAIT);
            tokio::select! {
                output = &mut future => return Some(output),
                job = self.jobs.recv() => if !self.take(job) { return None },
                () = sleep_until(late.unwrap_or_else(Instant::now)), if late.is_some() => self.answer(Answer::Failed),
            }
        }
    }

    /// False: nothing more comes.
    fn take(&mut self, job: Option<Job>) -> bool {
        match job {
            Some(Job::Commit(records)) => self.state.batch = Some(Arc::new(records)),
            Some(Job::Load(token, query)) => {
                self.state.questions.push_back(Question { token, query: Arc::new(query), since: Instant::now() });
            }
            Some(Job::Close) | None => return false,
        }
        true
    }

    /// Answers the oldest question.
    fn answer(&mut self, answer: Answer) {
        if let Some(question) = self.state.questions.pop_front() {
            self.out.say(Reply::Loaded(question.token, answer));
        }
    }

    fn fail(&mut self) {
        while !self.state.questions.is_empty() {
            self.answer(Answer::Failed);
        }
        self.out.say(Reply::Failed);
    }

    /// Works with a session until the handle is closed or gone, or the session is of no more use. `taken`: the last take
    /// before the session began.
    async fn serve(&mut self, session: Arc<Session>, taken: Taken) -> Result<(), WriteError> {
        self.resolve(&session);
        let (mut writing, mut asked): (Writing, Asked) = (None, Asked::new());
        let started = Instant::now();
        self.state.questions.iter_mut().for_each(|question| question.since = started);
        loop {
            // Looked at before what came behind the take is asked or written.
            let last = self.held.taken();
            if last.count > taken.count && last.server != session.begun.server {
                return Err(WriteError::Moved);
            }
            if writing.is_none() {
                writing = self.write(&session);
            }
            while let Some(question) = self.state.questions.get(asked.len()).filter(|_| asked.len() < PIPELINE_MAX) {
                let (session, query) = (Arc::clone(&session), Arc::clone(&question.query));
                asked.push_back(Box::pin(async move { query::answer(&session, &query).await }));
            }
            let late = self.state.questions.front().map(|question| question.since + ANSWER_LIMIT);
            tokio::select! {
                written = finished(&mut writing) => {
                    written?;
                    writing = None;
                    self.committed();
                }
                Some(answered) = asked.next() => self.answered(answered)?,
                job = self.jobs.recv() => if !self.take(job) { return Ok(()) },
                () = session.ended() => return Err(WriteError::Ended),
                () = sleep_until(late.unwrap_or(started)), if late.is_some() => {
                    return Err(WriteError::TimedOut(ANSWER_LIMIT));
                }
            }
        }
    }

    /// What became of the commit that was under way when the session before was lost.
    fn resolve(&mut self, session: &Session) {
        let shard = self.writer.shard;
        if self.state.failures > 0 {
            tracing::info!(shard, "PostgreSQL is there again");
        }
        match &self.state.batch {
            Some(_) if session.begun.commits > self.state.committed => {
                tracing::info!(shard, "the commit that was under way had come through");
                self.committed();
            }
            Some(_) if self.state.failures > 0 => {
                tracing::info!(shard, "the commit that was under way is written again")
            }
            Some(_) => {}
            None => self.calm(),
        }
    }

    fn calm(&mut self) {
        self.state.failures = 0;
        self.out.set_away(false);
    }

    fn committed(&mut self) {
        self.state.committed += 1;
        self.state.batch = None;
        self.calm();
        self.out.say(Reply::Committed);
    }

    /// Begins the commit that is to be written, if there is one.
    fn write(&self, session: &Arc<Session>) -> Writing {
        let batch = Arc::clone(self.state.batch.as_ref()?);
        let (session, epochs) = (Arc::clone(session), self.held.epochs());
        let (number, limit) = (self.state.committed + 1, self.limit);
        Some(Box::pin(async move {
            let columns = Columns::of(&batch);
            let written = timeout(limit, commit::write(&session, &columns, (number, &epochs))).await;
            written.map_err(|_| WriteError::TimedOut(limit))?
        }))
    }

    fn answered(&mut self, answered: Result<Answer, QueryError>) -> Result<(), WriteError> {
        match answered {
            Ok(answer) => self.answer(answer),
            Err(QueryError::Database(error)) if QueryError::is_lost(&error) => return Err(error.into()),
            Err(error) => {
                tracing::error!(shard = self.writer.shard, %error, "the store cannot answer a question");
                self.answer(Answer::Failed);
            }
        }
        Ok(())
    }
}

/// The end of a commit; never, while none is under way.
async fn finished(writing: &mut Writing) -> Result<(), WriteError> {
    match writing {
        Some(writing) => writing.await,
        None => pending().await,
    }
}
