//! The simulated PostgreSQL of a run: a primary and a standby that it waits for. Pure; owned by the cluster, which decides when
//! what is written reaches the standby, and when the primary dies.
//!
//! What is written stands in one log. Nobody sees it, and nobody is told of it, before the standby has it (synchronous
//! replication); a primary that crashes and starts again shows all that it had written, the standby may not have the end of
//! that, and if it takes over then, that end has never been. So a row that is shown may never have been acknowledged, until
//! something that was written behind it is.
//!
//! Who may write is judged against all that is written, as the row locks of the real one do: a commit by the epochs of its
//! partitions and the session of its writer, a take by the epochs that were seen. Invariants: a partition has one owner
//! or none, and its epoch rises whenever that changes; what was told as written is in the log for ever.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringline_cluster::reconcile::{Holding, Start};
use ringline_schema::ids::{PARTITIONS, Partition};
use ringline_schema::record::{Answer, Query, Record};
use ringline_store::memory::{self, MemoryStore};
use ringline_store::{LoadToken, Store, StoreEvent};

/// One shard of one start of a node, or what takes and gives for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Writer {
    pub start: Start,
    /// `None`: what takes and gives.
    pub shard: Option<usize>,
}

/// One transaction.
#[derive(Clone, Debug)]
pub enum Txn {
    /// A start of a node begins; an earlier one of it writes nothing more.
    Enter { node: usize },
    /// A session of a writer begins; an earlier one of it writes nothing more.
    Begin { writer: Writer, session: u64 },
    /// What one shard has queued, with the epochs that it has its partitions with.
    Commit { writer: Writer, session: u64, records: Arc<Vec<Record>>, epochs: Vec<(Partition, Option<i64>)> },
    /// Takes what is still as it was seen.
    Take { writer: Writer, session: u64, seen: Vec<Holding> },
    /// Gives back what is this start's.
    Release { writer: Writer, session: u64, partitions: Vec<Partition> },
}

/// What is told of a transaction when the standby has it.
#[derive(Clone, Debug)]
pub enum Done {
    Entered(Start),
    /// So many commits of this writer are there.
    Begun {
        commits: u64,
    },
    Committed,
    /// These are this start's, with their epochs.
    Taken(Vec<(Partition, i64)>),
    Released,
}

/// Why a transaction is not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The primary is away.
    Away,
    /// Another start, or a newer session, has taken the place of this one.
    Fenced,
    /// The same, and it had given the partition back itself.
    Given,
}

/// Who owns what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deeds {
    pub rows: Vec<Holding>,
    /// The node of every start, and whether it may write.
    pub starts: BTreeMap<Start, (usize, bool)>,
}

/// All that follows from a beginning of the log, but the messages.
#[derive(Clone, Default)]
struct Facts {
    deeds: Deeds,
    /// By partition: who gave it back last.
    given: BTreeMap<Partition, Start>,
    /// Session and commits.
    writers: BTreeMap<Writer, (u64, u64)>,
    starts: i64,
}

/// See the module.
pub struct Database {
    log: Vec<Txn>,
    /// As much of it as the standby has.
    replicated: usize,
    /// As much of it as is shown.
    shown: usize,
    head: Facts,
    facts: Facts,
    store: MemoryStore,
    pub up: bool,
    /// Rises whenever the primary dies: nothing of before is answered.
    pub life: u32,
    /// A planted bug: epochs are not compared.
    pub unfenced: bool,
}

impl Facts {
    fn new() -> Self {
        let rows = (0..PARTITIONS).filter_map(Partition::new);
        let rows = rows.map(|partition| Holding { partition, epoch: 0, owner: Start::NOBODY }).collect();
        Self { deeds: Deeds { rows, starts: BTreeMap::new() }, ..Self::default() }
    }

    fn row(&self, partition: Partition) -> &Holding {
        &self.deeds.rows[usize::from(partition.number())]
    }

    fn give(&mut self, partition: Partition, owner: Start) -> i64 {
        let row = &mut self.deeds.rows[usize::from(partition.number())];
        (row.epoch, row.owner) = (row.epoch + 1, owner);
        row.epoch
    }

    fn apply(&mut self, txn: &Txn) -> Done {
        match txn {
            Txn::Enter { node } => {
                self.starts += 1;
                let start = Start(self.starts);
                let earlier = self.deeds.starts.values_mut().filter(|(of, _)| of == node);
                earlier.for_each(|(_, may_write)| *may_write = false);
                self.deeds.starts.insert(start, (*node, true));
                Done::Entered(start)
            }
            Txn::Begin { writer, session } => {
                let known = self.writers.entry(*writer).or_default();
                known.0 = *session;
                Done::Begun { commits: known.1 }
            }
            Txn::Commit { writer, .. } => {
                self.writers.entry(*writer).or_default().1 += 1;
                Done::Committed
            }
            Txn::Take { writer, seen, .. } => {
                let mut taken = Vec::new();
                for seen in seen {
                    let row = *self.row(seen.partition);
                    if row.epoch == seen.epoch {
                        taken.push((seen.partition, self.give(seen.partition, writer.start)));
                    } else if row.owner == writer.start {
                        // By a request whose answer was lost.
                        taken.push((seen.partition, row.epoch));
                    }
                }
                Done::Taken(taken)
            }
            Txn::Release { writer, partitions, .. } => {
                for partition in partitions {
                    if self.row(*partition).owner == writer.start {
                        self.give(*partition, Start::NOBODY);
                        self.given.insert(*partition, writer.start);
                    }
                }
                Done::Released
            }
        }
    }

    fn judge(&self, txn: &Txn) -> Result<(), Refused> {
        let (writer, session) = match txn {
            Txn::Enter { .. } => return Ok(()),
            Txn::Begin { writer, .. } => (writer, None),
            Txn::Commit { writer, session, .. }
            | Txn::Take { writer, session, .. }
            | Txn::Release { writer, session, .. } => (writer, Some(*session)),
        };
        if !self.deeds.starts.get(&writer.start).is_some_and(|(_, may_write)| *may_write) {
            return Err(Refused::Fenced);
        }
        let newest = self.writers.get(writer).map(|(newest, _)| *newest);
        if session.is_some_and(|session| newest != Some(session)) {
            return Err(Refused::Fenced);
        }
        let Txn::Commit { epochs, .. } = txn else { return Ok(()) };
        for (partition, epoch) in epochs {
            let row = self.row(*partition);
            if row.owner != writer.start || Some(row.epoch) != *epoch {
                let given = self.given.get(partition) == Some(&writer.start);
                return Err(if given { Refused::Given } else { Refused::Fenced });
            }
        }
        Ok(())
    }
}

impl Database {
    pub fn new(unfenced: bool) -> Self {
        Self {
            log: Vec::new(),
            replicated: 0,
            shown: 0,
            head: Facts::new(),
            facts: Facts::new(),
            store: memory::open(1).remove(0),
            up: true,
            life: 0,
            unfenced,
        }
    }

    /// Writes a transaction: its place in the log, and what is told of it once the standby has that. Errors: [`Refused`].
    pub fn write(&mut self, txn: Txn) -> Result<(usize, Done), Refused> {
        if !self.up {
            return Err(Refused::Away);
        }
        match self.head.judge(&txn) {
            Err(Refused::Fenced | Refused::Given) if self.unfenced && matches!(txn, Txn::Commit { .. }) => {}
            judged => judged?,
        }
        let done = self.head.apply(&txn);
        self.log.push(txn);
        Ok((self.log.len(), done))
    }

    /// Who would lose what by a take, now: for the referee.
    pub fn owner(&self, seen: &Holding) -> Option<Start> {
        let row = self.head.row(seen.partition);
        (row.epoch == seen.epoch && row.owner != Start::NOBODY).then_some(row.owner)
    }

    pub fn written(&self) -> usize {
        self.log.len()
    }

    /// The standby has the log up to there, and so it is shown.
    pub fn replicate(&mut self, upto: usize) {
        self.replicated = self.replicated.max(upto.min(self.log.len()));
        self.show(self.replicated);
    }

    fn show(&mut self, upto: usize) {
        for txn in self.log.get(self.shown..upto).unwrap_or_default() {
            self.facts.apply(txn);
            if let Txn::Commit { records, .. } = txn {
                for record in records.iter() {
                    self.store.append(record).expect("the simulation's records fit the memory backend");
                }
                self.store.submit();
                self.store.poll(&mut Vec::new());
            }
        }
        self.shown = self.shown.max(upto);
    }

    pub fn deeds(&self) -> Option<&Deeds> {
        self.up.then_some(&self.facts.deeds)
    }

    /// As shown at this moment.
    pub fn answer(&mut self, query: Query) -> Answer {
        let mut events = Vec::new();
        if self.store.load(LoadToken(0), query).is_err() {
            return Answer::Failed;
        }
        self.store.poll(&mut events);
        let answer = events.into_iter().find_map(|event| match event {
            StoreEvent::Loaded(_, answer) => Some(answer),
            StoreEvent::Committed(_) | StoreEvent::Failed => None,
        });
        answer.unwrap_or(Answer::Failed)
    }

    /// The primary dies.
    pub fn crash(&mut self) {
        self.up = false;
        self.life += 1;
    }

    /// It starts again, and shows all that it had written.
    pub fn restart(&mut self) {
        self.up = true;
        self.show(self.log.len());
    }

    /// The standby takes over: what it does not have has never been.
    pub fn fail_over(&mut self) {
        let (log, kept) = (std::mem::take(&mut self.log), self.replicated);
        *self = Self { life: self.life, ..Self::new(self.unfenced) };
        for txn in log.into_iter().take(kept) {
            self.head.apply(&txn);
            self.log.push(txn);
        }
        self.replicated = self.log.len();
        self.show(self.replicated);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::ids::UserName;
    use ringline_schema::record::User;

    fn record(name: &str) -> Record {
        Record::User(User { name: UserName::new(name).unwrap(), password_hash: None, created_ms: 1 })
    }

    fn holding(name: &str, epoch: i64) -> Holding {
        Holding { partition: UserName::new(name).unwrap().partition(), epoch, owner: Start::NOBODY }
    }

    fn knows(database: &mut Database, name: &str) -> bool {
        let query = Query::User { name: UserName::new(name).unwrap() };
        matches!(database.answer(query), Answer::User(Some(_)))
    }

    fn begin(database: &mut Database, node: usize) -> Writer {
        let (_, Done::Entered(start)) = database.write(Txn::Enter { node }).unwrap() else { panic!("not entered") };
        let writer = Writer { start, shard: Some(0) };
        database.write(Txn::Begin { writer, session: 1 }).unwrap();
        writer
    }

    fn commit(writer: Writer, name: &str, epoch: i64) -> Txn {
        let epochs = vec![(holding(name, 0).partition, Some(epoch))];
        Txn::Commit { writer, session: 1, records: Arc::new(vec![record(name)]), epochs }
    }

    #[test]
    fn a_primary_that_crashed_shows_what_was_never_acknowledged_and_a_standby_does_not_have_it() {
        let mut database = Database::new(false);
        let writer = begin(&mut database, 0);
        database.write(Txn::Take { writer, session: 1, seen: vec![holding("ann", 0)] }).unwrap();
        database.replicate(database.written());
        database.write(commit(writer, "ann", 1)).unwrap();
        assert!(!knows(&mut database, "ann"), "nobody sees it before the standby has it");
        database.crash();
        assert_eq!(database.write(commit(writer, "ann", 1)).unwrap_err(), Refused::Away);
        database.restart();
        assert!(knows(&mut database, "ann"));
        database.crash();
        database.fail_over();
        assert!(!knows(&mut database, "ann"));
        let (upto, _) = database.write(commit(writer, "ann", 1)).unwrap();
        database.replicate(upto);
        assert!(knows(&mut database, "ann"));
    }

    #[test]
    fn who_does_not_own_it_any_more_writes_nothing() {
        let mut database = Database::new(false);
        let (one, other) = (begin(&mut database, 0), begin(&mut database, 1));
        database.write(Txn::Take { writer: one, session: 1, seen: vec![holding("ann", 0)] }).unwrap();
        database.write(Txn::Take { writer: other, session: 1, seen: vec![holding("ann", 1)] }).unwrap();
        assert_eq!(database.write(commit(one, "ann", 1)).unwrap_err(), Refused::Fenced);
        let partitions = vec![holding("ann", 0).partition];
        database.write(Txn::Release { writer: other, session: 1, partitions }).unwrap();
        assert_eq!(database.write(commit(other, "ann", 2)).unwrap_err(), Refused::Given);
        database.write(Txn::Take { writer: one, session: 1, seen: vec![holding("ann", 3)] }).unwrap();
        database.write(Txn::Begin { writer: one, session: 2 }).unwrap();
        assert_eq!(database.write(commit(one, "ann", 4)).unwrap_err(), Refused::Fenced, "a session of before");
        begin(&mut database, 0);
        let late = Txn::Take { writer: one, session: 2, seen: vec![] };
        assert_eq!(database.write(late).unwrap_err(), Refused::Fenced, "its node has started again");
    }
}
