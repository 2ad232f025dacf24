//! The sessions of a run's nodes with the simulated database: what is asked goes over a network that delays and is cut, and what
//! is answered comes back when the standby has what it rests on. Owned by the cluster; a session by a shard.
//!
//! As of the real store: one commit of a shard at a time; a session that is lost is begun anew, with a transaction of its own
//! behind which everything is read and by which it finds out what became of the commit under way; what was asked before is
//! asked again. Invariant: what an older session had sent has no effect once a newer one has begun.

use std::collections::VecDeque;
use std::sync::Arc;

use ringline_core::event::{Event, Token};
use ringline_schema::ids::Partition;
use ringline_schema::record::{Answer, Query, Record};

use super::database::{Deeds, Done, Refused, Txn, Writer};
use super::nodes::AtNode;
use super::{Action, Bug, Cluster};

/// How long a question waits for a database that is away.
const QUESTION_WAIT_US: u64 = 5_000_000;
const BACK_OFF_US_MIN: u64 = 50_000;
const BACK_OFF_US_MAX: u64 = 5_000_000;
/// Failures in a row after which the store is called away.
const FAILURES_TO_BE_AWAY: u32 = 2;
/// What connecting to a server that is not reached takes at most.
const CONNECT_US_MAX: u64 = 2_000_000;

/// What is asked of the database.
pub enum Ask {
    Write(Txn),
    Question { token: Token, query: Query },
    Deeds,
}

/// What a node hears of the database. `shard` `None`: what takes and gives.
pub struct FromDatabase {
    pub shard: Option<usize>,
    pub session: u64,
    pub said: Said,
}

pub enum Said {
    Done(Done),
    /// This start may write nothing more.
    Refused,
    Answer {
        token: Token,
        answer: Box<Answer>,
    },
    Deeds(Box<Deeds>),
    Lost,
}

/// On its way to the database.
pub struct Asked {
    pub node: usize,
    pub epoch: u32,
    pub shard: Option<usize>,
    pub session: u64,
    /// Of the database, when it was asked.
    pub life: u32,
    pub ask: Ask,
}

/// Who waits for the standby.
pub enum Waiter {
    Asked {
        node: usize,
        epoch: u32,
        shard: Option<usize>,
        session: u64,
        done: Done,
    },
    /// A process that begins.
    Start {
        node: usize,
        epoch: u32,
        done: Done,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    #[default]
    Lost,
    Beginning,
    Ready,
    /// Another start may write, this one may not any more.
    Stopped,
}

/// See the module.
#[derive(Default)]
pub struct Session {
    standing: Standing,
    number: u64,
    /// Of the database, when it began.
    life: u32,
    queued: Vec<Record>,
    /// The commit under way.
    batch: Option<Arc<Vec<Record>>>,
    /// Commits and records that are there.
    committed: u64,
    stored: u64,
    /// Not answered yet; so many of the first are asked.
    questions: VecDeque<(Token, Query, u64)>,
    asked: usize,
    failures: u32,
    is_away: bool,
    ask_due_us: u64,
    answer_due_us: u64,
}

impl Session {
    pub fn append(&mut self, record: Record) {
        self.queued.push(record);
    }
}

impl Cluster {
    fn session_mut(&mut self, (node, shard): (usize, usize)) -> &mut Session {
        &mut self.nodes[node].sides[shard].session
    }

    pub(super) fn next_session(&mut self) -> u64 {
        self.sessions += 1;
        self.sessions
    }

    fn database_is_cut(&self, node: usize) -> bool {
        self.database_cuts.get(&node).is_some_and(|until_us| *until_us > self.now_us)
    }

    fn writer(&self, node: usize, shard: Option<usize>) -> Option<Writer> {
        Some(Writer { start: self.nodes[node].steward.as_ref()?.start, shard })
    }

    /// Sends something to the database.
    pub(super) fn ask_database(&mut self, node: usize, (shard, session): (Option<usize>, u64), ask: Ask) {
        let slow = self.chance(5);
        let delay = if slow { self.random_us(1_000, 200_000) } else { self.random_us(50, 2_000) };
        let mut at_us = self.now_us + delay;
        if let Some(shard) = shard {
            // One connection: in order.
            let due_us = &mut self.session_mut((node, shard)).ask_due_us;
            *due_us = at_us.max(*due_us);
            at_us = *due_us;
        }
        let home = &self.nodes[node];
        let begun = match shard {
            Some(shard) => home.sides.get(shard).map(|side| side.session.life),
            None => home.steward.as_ref().map(|steward| steward.life),
        };
        let (epoch, life) = (home.epoch, begun.unwrap_or_default());
        self.at(at_us, Action::Asked(Box::new(Asked { node, epoch, shard, session, life, ask })));
    }

    fn answer_node(&mut self, (node, epoch): (usize, u32), from: FromDatabase) {
        let slow = self.chance(5);
        let delay = if slow { self.random_us(1_000, 200_000) } else { self.random_us(50, 2_000) };
        let mut at_us = self.now_us + delay;
        if let Some(shard) = from.shard
            && self.lives(node, epoch)
        {
            let due_us = &mut self.session_mut((node, shard)).answer_due_us;
            *due_us = at_us.max(*due_us);
            at_us = *due_us;
        }
        self.at_node((node, epoch), at_us - self.now_us, AtNode::Database(from));
    }

    // --- at the database -----------------------------------------------------------------------------------------

    /// Something reaches the database, perhaps much later than it was sent.
    pub(super) fn database_asked(&mut self, mut asked: Box<Asked>) {
        let Asked { node, epoch, shard, session, life, .. } = *asked;
        if self.database_is_cut(node) {
            if self.chance(50) {
                let at_us = self.database_cuts[&node] + self.random_us(0, 50_000);
                self.at(at_us, Action::Asked(asked));
            }
            return;
        }
        let target = |said| FromDatabase { shard, session, said };
        if life != self.database.life || !self.database.up {
            return self.answer_node((node, epoch), target(Said::Lost));
        }
        match std::mem::replace(&mut asked.ask, Ask::Deeds) {
            Ask::Question { token, query } => {
                let answer = Box::new(self.database.answer(query));
                self.answer_node((node, epoch), target(Said::Answer { token, answer }));
            }
            Ask::Deeds => {
                let Some(deeds) = self.database.deeds().cloned() else { return };
                self.answer_node((node, epoch), target(Said::Deeds(Box::new(deeds))));
            }
            Ask::Write(txn) => {
                self.judge_take(&txn);
                let unwaited = self.bug(Bug::NoBarrier) && matches!(txn, Txn::Begin { .. });
                match self.database.write(txn) {
                    Ok((_, done)) if unwaited => self.answer_node((node, epoch), target(Said::Done(done))),
                    Ok((upto, done)) => self.wait_for(upto, Waiter::Asked { node, epoch, shard, session, done }),
                    Err(Refused::Away) => self.answer_node((node, epoch), target(Said::Lost)),
                    Err(Refused::Fenced) => self.answer_node((node, epoch), target(Said::Refused)),
                    Err(Refused::Given) => {
                        self.breach(format!("n{node} has given back what it still writes"));
                        self.answer_node((node, epoch), target(Said::Refused));
                    }
                }
            }
        }
    }

    /// The referee: nobody takes what another may still serve.
    fn judge_take(&mut self, txn: &Txn) {
        let Txn::Take { writer, seen, .. } = txn else { return };
        let losers = seen.iter().filter_map(|seen| self.database.owner(seen)).filter(|owner| *owner != writer.start);
        let losers: std::collections::BTreeSet<_> = losers.collect();
        for node in 0..self.nodes.len() {
            let home = &self.nodes[node];
            let Some(steward) = home.steward.as_ref().filter(|own| losers.contains(&own.start)) else { continue };
            if home.clock.mono_us(self.now_us) / 1_000 < steward.lease.until_ms() {
                self.breach(format!("n{node} may still serve what start {} takes", writer.start.0));
            }
        }
    }

    /// What is written is told when the standby has it.
    pub(super) fn wait_for(&mut self, upto: usize, waiter: Waiter) {
        self.waiting.insert(upto, waiter);
        let slow = self.chance(self.slow_standby_percent);
        let delay = if slow { self.random_us(20_000, 500_000) } else { self.random_us(50, 3_000) };
        self.replicate_us = self.replicate_us.max(self.now_us + delay);
        let (at_us, life) = (self.replicate_us, self.database.life);
        self.at(at_us, Action::Replicated { life, upto });
    }

    pub(super) fn replicated(&mut self, life: u32, upto: usize) {
        if life != self.database.life || !self.database.up {
            return;
        }
        self.note(3, upto as u64);
        self.database.replicate(upto);
        while let Some(first) = self.waiting.first_entry().filter(|first| *first.key() <= upto) {
            match first.remove() {
                Waiter::Asked { node, epoch, shard, session, done } => {
                    self.answer_node((node, epoch), FromDatabase { shard, session, said: Said::Done(done) });
                }
                Waiter::Start { node, epoch, done } => {
                    let Done::Entered(start) = done else { continue };
                    let delay = self.random_us(1_000, 50_000);
                    self.after(delay, Action::Start { node, epoch, start });
                }
            }
        }
    }

    // --- at a node -----------------------------------------------------------------------------------------------

    /// A shard asks its store.
    pub(super) fn question(&mut self, place: (usize, usize), token: Token, query: Query) {
        let now_us = self.now_us;
        self.session_mut(place).questions.push_back((token, query, now_us));
        self.ask_questions(place);
    }

    fn ask_questions(&mut self, place: (usize, usize)) {
        let session = self.session_mut(place);
        if session.standing != Standing::Ready {
            return;
        }
        let (number, from) = (session.number, std::mem::replace(&mut session.asked, session.questions.len()));
        let asks: Vec<_> =
            session.questions.iter().skip(from).map(|(token, query, _)| (*token, query.clone())).collect();
        for (token, query) in asks {
            self.ask_database(place.0, (Some(place.1), number), Ask::Question { token, query });
        }
    }

    /// Begins the next commit, if none is under way.
    pub(super) fn submit(&mut self, place: (usize, usize)) {
        let session = self.session_mut(place);
        if session.standing == Standing::Ready && session.batch.is_none() && !session.queued.is_empty() {
            session.batch = Some(Arc::new(std::mem::take(&mut session.queued)));
            self.write_batch(place);
        }
    }

    fn write_batch(&mut self, (node, shard): (usize, usize)) {
        let session = &self.nodes[node].sides[shard].session;
        let (Some(records), number) = (session.batch.clone(), session.number) else { return };
        let (Some(writer), Some(steward)) = (self.writer(node, Some(shard)), &self.nodes[node].steward) else { return };
        let partitions: std::collections::BTreeSet<Partition> = records.iter().map(Record::partition).collect();
        let epochs = partitions.into_iter().map(|one| (one, steward.held.get(&one).copied())).collect();
        let txn = Txn::Commit { writer, session: number, records, epochs };
        self.ask_database(node, (Some(shard), number), Ask::Write(txn));
    }

    pub(super) fn connect_database(&mut self, (node, shard): (usize, usize)) {
        let (number, life) = (self.next_session(), self.database.life);
        let Some(writer) = self.writer(node, Some(shard)) else { return };
        let session = self.session_mut((node, shard));
        if session.standing != Standing::Lost {
            return;
        }
        (session.standing, session.number, session.life) = (Standing::Beginning, number, life);
        if self.database_is_cut(node) {
            let (delay, epoch) = (self.random_us(10_000, CONNECT_US_MAX), self.nodes[node].epoch);
            let lost = FromDatabase { shard: Some(shard), session: number, said: Said::Lost };
            return self.at_node((node, epoch), delay, AtNode::Database(lost));
        }
        let begin = Ask::Write(Txn::Begin { writer, session: number });
        self.ask_database(node, (Some(shard), number), begin);
    }

    /// A shard hears of the database.
    pub(super) fn session_hears(&mut self, place: (usize, usize), session: u64, said: Said) {
        let is_lost = matches!(said, Said::Lost);
        if self.session_mut(place).number != session || (self.database_is_cut(place.0) && !is_lost) {
            return;
        }
        match said {
            Said::Done(Done::Begun { commits }) => self.session_begun(place, commits),
            Said::Done(Done::Committed) => self.batch_is_there(place),
            Said::Done(Done::Entered(_) | Done::Taken(_) | Done::Released) | Said::Deeds(_) => {}
            Said::Answer { token, answer } => {
                let session = self.session_mut(place);
                let Some(at) = session.questions.iter().position(|(of, ..)| *of == token) else { return };
                session.questions.remove(at);
                session.asked = session.asked.saturating_sub(1);
                self.tell(place, Event::Loaded { token, answer: *answer });
            }
            Said::Refused => self.session_stops(place),
            Said::Lost => self.session_lost(place),
        }
    }

    fn session_begun(&mut self, place: (usize, usize), commits: u64) {
        let session = self.session_mut(place);
        (session.standing, session.failures, session.asked) = (Standing::Ready, 0, 0);
        let was_away = std::mem::take(&mut session.is_away);
        let is_there = commits > session.committed;
        if session.batch.is_some() {
            if is_there { self.batch_is_there(place) } else { self.write_batch(place) }
        }
        if was_away {
            self.tell(place, Event::StoreAway { away: false });
        }
        self.ask_questions(place);
        self.submit(place);
    }

    fn batch_is_there(&mut self, place: (usize, usize)) {
        let session = self.session_mut(place);
        let Some(batch) = session.batch.take() else { return };
        session.committed += 1;
        session.stored += batch.len() as u64;
        let upto = session.stored;
        self.tell(place, Event::Stored { upto });
    }

    /// This start writes nothing more: the node has to end.
    fn session_stops(&mut self, place: (usize, usize)) {
        self.session_mut(place).standing = Standing::Stopped;
        self.tell(place, Event::StoreFailed);
        self.fail_questions(place, 0);
        let (delay, epoch) = (self.random_us(1_000, 1_000_000), self.nodes[place.0].epoch);
        self.at_node((place.0, epoch), delay, AtNode::End);
    }

    fn session_lost(&mut self, place: (usize, usize)) {
        let session = self.session_mut(place);
        if session.standing == Standing::Stopped {
            return;
        }
        session.standing = Standing::Lost;
        session.failures += 1;
        let is_away = session.failures >= FAILURES_TO_BE_AWAY;
        let bound = (BACK_OFF_US_MIN << session.failures.min(10)).min(BACK_OFF_US_MAX);
        if is_away && !std::mem::replace(&mut session.is_away, true) {
            self.tell(place, Event::StoreAway { away: true });
        }
        self.fail_questions(place, QUESTION_WAIT_US);
        let (delay, epoch) = (self.random_us(0, bound), self.nodes[place.0].epoch);
        self.at_node((place.0, epoch), delay, AtNode::Connect { shard: place.1 });
    }

    /// Questions that wait for so long are answered.
    fn fail_questions(&mut self, place: (usize, usize), waited_us: u64) {
        let now_us = self.now_us;
        let session = self.session_mut(place);
        let old = |(_, _, since_us): &mut (Token, Query, u64)| now_us.saturating_sub(*since_us) >= waited_us;
        let mut failed = Vec::new();
        while let Some((token, ..)) = session.questions.pop_front_if(old) {
            failed.push(token);
        }
        session.asked = 0;
        for token in failed {
            self.tell(place, Event::Loaded { token, answer: Answer::Failed });
        }
    }

    // --- faults --------------------------------------------------------------------------------------------------

    /// The primary dies; who waits for it hears so, sooner or later.
    pub(super) fn crash_database(&mut self) {
        self.note(11, u64::from(self.database.life));
        self.database.crash();
        for waiter in std::mem::take(&mut self.waiting).into_values() {
            if let Waiter::Start { node, epoch, .. } = waiter {
                self.after(500_000, Action::Boot { node, epoch });
            }
        }
        (0..self.nodes.len()).for_each(|node| self.lose_sessions(node));
    }

    /// It is back: the one that died, or what was its standby.
    pub(super) fn database_returns(&mut self, life: u32, as_standby: bool) {
        if life != self.database.life || self.database.up {
            return;
        }
        if as_standby {
            self.database.fail_over();
        } else {
            self.database.restart();
        }
        // What dies once may die again, before its standby has what it shows.
        if !as_standby && self.lively && self.chance(60) {
            let (delay, life) = (self.random_us(200_000, 1_500_000), self.database.life);
            self.after(delay, Action::DatabaseDies { life });
        }
        // Its (next) standby finds it after a while; until then nothing that is written is told.
        let (delay, life, upto) = (self.random_us(1_000, 1_500_000), self.database.life, self.database.written());
        self.replicate_us = self.now_us + delay;
        self.at(self.replicate_us, Action::Replicated { life, upto });
    }

    /// It dies again, and its standby takes over.
    pub(super) fn database_dies(&mut self, life: u32) {
        if life == self.database.life && self.database.up && self.lively {
            self.crash_database();
            let (delay, life) = (self.random_us(50_000, 1_000_000), self.database.life);
            self.after(delay, Action::DatabaseBack { life, as_standby: true });
        }
    }

    /// The connections of a node with the database break, each when it is noticed.
    pub(super) fn lose_sessions(&mut self, node: usize) {
        if !self.nodes[node].up {
            return;
        }
        let epoch = self.nodes[node].epoch;
        let numbers: Vec<_> = self.nodes[node].sides.iter().map(|side| side.session.number).collect();
        for (shard, session) in numbers.into_iter().enumerate() {
            let delay = self.random_us(0, CONNECT_US_MAX);
            let lost = FromDatabase { shard: Some(shard), session, said: Said::Lost };
            self.at_node((node, epoch), delay, AtNode::Database(lost));
        }
        if let Some(session) = self.nodes[node].steward.as_ref().map(|steward| steward.session) {
            let delay = self.random_us(0, CONNECT_US_MAX);
            let lost = FromDatabase { shard: None, session, said: Said::Lost };
            self.at_node((node, epoch), delay, AtNode::Database(lost));
        }
    }

    pub(super) fn cut_database(&mut self, node: usize, until_us: u64) {
        self.database_cuts.insert(node, until_us);
        self.lose_sessions(node);
    }
}
