//! Looks after what this node owns in a cluster of etcd: reads who is alive and who owns what, takes what is wanted here and
//! free, has the cores give up what is wanted elsewhere, and tells them all of it. One task of the side thread.
//!
//! One look after the other, each whole: every [`LOOK_EVERY`], at once when etcd's bell rings or a core has released
//! something. What comes of a look follows from what it saw ([`ringline_cluster::reconcile`]), never from what looks before
//! it saw; one that fails is made up for by the next.
//!
//! - Order of a look: first the table, then who is alive; see the invariant of [`ringline_cluster::reconcile`].
//! - Nothing is taken or given while this node's own lease is not certain, or while one of the two can't be read.
//! - What is handed over is first not served any more, by all cores, then released by the core that had it, and then given
//!   back in the table: in between nobody serves it.
//! - A start that has been replaced, or whose lease is gone, ends ([`Lost`]).
//! - What this node says of itself in etcd is as of the table that was read last: whoever is told that it drains and owns
//!   nothing can rely on it. What all of this looks like is shown to who only wants to know ([`view`]).

pub mod desk;
mod registry;
pub mod thread;
pub mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringline_cluster::membership::{Change, ListError, Membership, Placing, Standing};
use ringline_cluster::ownership::{self, Known, Ownership, Part};
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::reconcile::{Holding, Moves, Start, moves};
use ringline_cluster::router::Board;
use ringline_schema::ids::Partition;
use tokio::sync::watch as changing;
use tokio::time::sleep;

use self::desk::{Orders, OrdersDesk};
use self::view::View;
use crate::etcd::entry::{Entry, Listing};
use crate::etcd::lease::LeaseClock;
use crate::etcd::{Directory, EtcdOptions, Lost};
use crate::peers::roster::Roster;

/// Between two looks when nothing calls.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two times that the number of clients is told in etcd: each time makes all nodes look.
const TELL_CLIENTS_EVERY: Duration = Duration::from_secs(5);
/// Between two looks at the least, however often something calls.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Who owns what, as the database says at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deeds {
    /// Rises with every change.
    pub version: u64,
    pub rows: Vec<Holding>,
    /// Name and number of every start that owns something.
    pub starts: BTreeMap<Start, (String, NodeIndex)>,
}

/// Why the table was not read or changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeedsError {
    /// Perhaps done, perhaps not: the next table shows it.
    #[error("{0}")]
    Away(String),
    /// This start may do nothing more.
    #[error("{0}")]
    Replaced(String),
}

/// The table of owners, for one start of a node.
pub trait Registry {
    /// What [`Deeds::version`] would be now.
    fn version(&self) -> impl Future<Output = Result<u64, DeedsError>>;
    fn read(&self) -> impl Future<Output = Result<Deeds, DeedsError>>;
    /// Takes those that are still as they were seen. Returns how many.
    fn take(&self, seen: &[Holding]) -> impl Future<Output = Result<usize, DeedsError>>;
    /// Gives back what is this start's of these.
    fn release(&self, partitions: &[Partition]) -> impl Future<Output = Result<(), DeedsError>>;
}

/// Which start of which node this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    pub name: String,
    pub number: NodeIndex,
    pub start: Start,
}

/// What a steward begins with.
pub struct StewardParts<R> {
    pub own: Own,
    pub etcd: EtcdOptions,
    pub registry: R,
    pub clock: LeaseClock,
    pub desk: OrdersDesk,
    pub roster: Arc<Roster>,
    /// What this node says of itself; see [`crate::etcd::Keeper::keep`].
    pub entry: changing::Sender<Entry>,
    /// What ROUTE goes by.
    pub board: Arc<Board>,
    /// For who only wants to know.
    pub view: changing::Sender<Arc<View>>,
}

/// See the module.
pub struct Steward<R> {
    parts: StewardParts<R>,
    directory: Directory,
    membership: Membership,
    deeds: Deeds,
    listing: Listing,
    /// Since which version of the ownership the cores are asked to give up which partition.
    giving: BTreeMap<Partition, u64>,
    /// The table was changed, whatever its version was before.
    must_read: bool,
    told: Arc<Ownership>,
    /// What was said of a failure last, so that it is said once.
    failing: Failing,
    settled: bool,
    /// When the number of clients was told last.
    told_clients: Option<Instant>,
}

/// What can't be read for now.
#[derive(Debug, Default)]
struct Failing {
    table: bool,
    list: bool,
}

/// What a look has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Nothing more to do until something calls.
    Done,
    /// The table has changed by it: look again.
    Again,
}

impl<R: Registry> Steward<R> {
    pub fn new(parts: StewardParts<R>) -> Self {
        let incarnation = parts.roster.incarnation();
        Self {
            directory: Directory::new(&parts.etcd),
            membership: Membership::new(&parts.own.name, incarnation, Placing::Alive),
            deeds: Deeds::default(),
            listing: Listing::default(),
            giving: BTreeMap::new(),
            must_read: true,
            told: Arc::new(Ownership::new(0)),
            failing: Failing::default(),
            settled: false,
            told_clients: None,
            parts,
        }
    }

    /// Looks again and again. Errors: this start may not go on.
    pub async fn run(mut self, drain: changing::Receiver<bool>) -> Result<(), Lost> {
        loop {
            let is_draining = *drain.borrow();
            if is_draining {
                self.say_draining();
            }
            if self.parts.desk.has_failed() {
                return Err(Lost::Store);
            }
            let look = self.look().await?;
            self.say_of_itself(is_draining);
            self.show();
            if is_draining && self.owns_nothing() {
                return Ok(());
            }
            sleep(LOOK_PAUSE).await;
            if look == Look::Done {
                tokio::select! {
                    () = sleep(LOOK_EVERY) => {}
                    () = self.parts.desk.called() => {}
                }
            }
        }
    }

    fn say_draining(&self) {
        self.parts.entry.send_if_modified(|entry| {
            std::mem::replace(&mut entry.member.standing, Standing::Draining) != Standing::Draining
        });
    }

    /// What others are told of this node: whether it drains, how much it owns, how many clients it has.
    fn say_of_itself(&mut self, is_draining: bool) {
        // What was taken or given back since the table was read is not known to be so.
        if self.must_read {
            return;
        }
        let drains = is_draining || self.listing.drained.contains(&self.parts.own.name);
        let standing = if drains { Standing::Draining } else { Standing::Up };
        let owned = Some(u16::try_from(self.owned()).unwrap_or(u16::MAX));
        let is_time = self.told_clients.is_none_or(|at| at.elapsed() >= TELL_CLIENTS_EVERY);
        let clients = is_time.then(|| self.parts.board.clients());
        let told = self.parts.entry.send_if_modified(|entry| {
            let connections =
                clients.map_or(entry.member.connections, |now| worth_telling(entry.member.connections, now));
            let news = (standing, owned, connections);
            let is_news = news != (entry.member.standing, entry.owned, entry.member.connections);
            (entry.member.standing, entry.owned, entry.member.connections) = news;
            is_news
        });
        if told && is_time {
            self.told_clients = Some(Instant::now());
        }
    }

    /// Partitions of this start, as the table said last.
    fn owned(&self) -> usize {
        self.deeds.rows.iter().filter(|row| row.owner == self.parts.own.start).count()
    }

    /// Nothing is this node's any more, or nobody is there to take it.
    fn owns_nothing(&self) -> bool {
        !self.listing.has_others(&self.parts.own.name) || self.owned() == 0
    }

    /// Shows what this look has seen, if it is news.
    fn show(&self) {
        let is_current = !self.failing.table && !self.failing.list;
        let (deeds, listing, told) = (&self.deeds, &self.listing, &self.told);
        if self.parts.view.borrow().is_of((deeds, listing), told, is_current) {
            return;
        }
        let number = |partition| Some(listing.entries.get(self.membership.owner(partition)?)?.number);
        let wanted = ownership::all().map(number).collect();
        let (deeds, listing, told) = (deeds.clone(), listing.clone(), Arc::clone(told));
        let own = self.parts.own.clone();
        self.parts.view.send_replace(Arc::new(View { own, deeds, listing, wanted, told, is_current }));
    }

    async fn look(&mut self) -> Result<Look, Lost> {
        let table = self.read_table().await?;
        let list = self.read_list().await?;
        let is_certain = table && list && !self.parts.clock.is_over(Instant::now());
        let mut look = Look::Done;
        if is_certain {
            let moves = self.moves();
            look = self.carry_out(&moves).await?;
            self.say_settled(&moves);
        }
        self.tell_board();
        self.tell_cores();
        Ok(look)
    }

    /// Whether what is known of the table is what it says now.
    async fn read_table(&mut self) -> Result<bool, Lost> {
        let registry = &self.parts.registry;
        let read = match registry.version().await {
            Ok(version) if version == self.deeds.version && !self.must_read => Ok(None),
            Ok(_) => registry.read().await.map(Some),
            Err(error) => Err(error),
        };
        if let Ok(Some(deeds)) = &read {
            self.deeds = deeds.clone();
            self.must_read = false;
        }
        let failed = self.judge(read)?;
        say_once(&mut self.failing.table, failed.as_deref(), "who owns what");
        Ok(failed.is_none())
    }

    /// What is said of a failure; `Err`: the end.
    fn judge<T>(&self, result: Result<T, DeedsError>) -> Result<Option<String>, Lost> {
        match result {
            Ok(_) => Ok(None),
            Err(DeedsError::Away(why)) => Ok(Some(why)),
            Err(DeedsError::Replaced(why)) => Err(Lost::Start(why)),
        }
    }

    /// Whether what is known of who is alive is as of now.
    async fn read_list(&mut self) -> Result<bool, Lost> {
        let listed = self.directory.list().await;
        say_once(&mut self.failing.list, listed.as_ref().err().map(ToString::to_string).as_deref(), "who is alive");
        let Ok(listing) = listed else { return Ok(false) };
        let own = &self.parts.own;
        if !listing.may_live(&own.name, own.start) {
            return match listing.entries.get(&own.name) {
                Some(other) => {
                    let (name, ours) = (own.name.clone(), own.start.0.unsigned_abs());
                    Err(Lost::Replaced(ListError::Replaced { name, ours, theirs: other.start.0.unsigned_abs() }))
                }
                None => Err(Lost::Lease),
            };
        }
        match self.membership.update(listing.members()) {
            Ok(changes) => changes.iter().for_each(|change| tracing::info!("{}", Said(change))),
            Err(error @ ListError::Replaced { .. }) => return Err(Lost::Replaced(error)),
            Err(error @ ListError::TooMany(_)) => {
                tracing::error!("{error}: those who are there go on as they are");
                return Ok(false);
            }
        }
        self.listing = listing;
        Ok(true)
    }

    fn moves(&self) -> Moves {
        let own = &self.parts.own;
        let alive: BTreeSet<Start> = self
            .deeds
            .starts
            .iter()
            .filter(|(start, (name, _))| self.listing.may_live(name, **start))
            .map(|(start, _)| *start)
            .collect();
        let wanted = |partition: Partition| self.membership.owner(partition);
        moves(&self.deeds.rows, |start| alive.contains(&start), &wanted, (&own.name, own.start))
    }

    /// Takes what is free, has given up what is wanted elsewhere, and gives back what was released.
    async fn carry_out(&mut self, moves: &Moves) -> Result<Look, Lost> {
        let mut look = Look::Done;
        if !moves.take.is_empty() {
            let taken = self.parts.registry.take(&moves.take).await;
            if let Ok(count) = taken {
                tracing::info!("took {count} of {} partitions that nobody alive had", moves.take.len());
            }
            self.changed(taken)?;
            look = Look::Again;
        }
        let next = self.told.version + 1;
        let wanted: BTreeSet<Partition> = moves.hand_over.iter().copied().collect();
        self.giving.retain(|partition, _| wanted.contains(partition));
        for partition in wanted {
            self.giving.entry(partition).or_insert(next);
        }
        let free = self.free();
        if !free.is_empty() {
            let released = self.parts.registry.release(&free).await;
            if released.is_ok() {
                tracing::info!("handed over {} partitions", free.len());
            }
            self.changed(released)?;
            look = Look::Again;
        }
        Ok(look)
    }

    /// The table may be another now; one that was changed without an answer surely has to be read.
    fn changed<T>(&mut self, result: Result<T, DeedsError>) -> Result<(), Lost> {
        if let Some(why) = self.judge(result)? {
            tracing::warn!("partitions were perhaps taken or given back: {why}");
        }
        self.must_read = true;
        Ok(())
    }

    /// What is to be given up and of which the core that had it has nothing in flight any more. One that was kept in between
    /// has to be released anew.
    fn free(&self) -> Vec<Partition> {
        let desk = &self.parts.desk;
        let Some(cores) = desk.cores() else { return Vec::new() };
        let free = self.giving.iter().filter(|(one, since)| **since <= desk.released(cores.shard_of(**one)));
        free.map(|(one, _)| *one).collect()
    }

    /// Puts up how ROUTE is to treat the nodes.
    fn tell_board(&self) {
        for (name, member) in &self.listing.members() {
            let Some(entry) = self.listing.entries.get(name) else { continue };
            self.parts.board.set_weight(entry.number, member.client_weight);
            self.parts.board.set_gateway(entry.number, member.weight == 0);
            self.parts.board.set_leaving(entry.number, member.standing == Standing::Draining);
        }
    }

    /// Tells the cores what is so now, if that is news.
    fn tell_cores(&mut self) {
        let entries = self.listing.entries.iter();
        let nodes: Vec<_> =
            entries.map(|(name, entry)| (entry.number, name.clone(), entry.member.peer_address)).collect();
        let roster = self.parts.roster.with_nodes(&nodes).ok();
        let roster = roster.filter(|roster| !roster.lists_as(&self.parts.roster));
        let mut ownership = self.ownership();
        if roster.is_none() && ownership == *self.told {
            return;
        }
        if let Some(roster) = roster {
            self.parts.roster = Arc::new(roster);
        }
        ownership.version += 1;
        self.told = Arc::new(ownership);
        self.parts.desk.issue(&Orders { roster: self.parts.roster.clone(), ownership: self.told.clone() });
    }

    /// Who serves what now, under the version that was told last.
    fn ownership(&self) -> Ownership {
        let own = &self.parts.own;
        let mut ownership = Ownership::new(self.told.version);
        for row in &self.deeds.rows {
            let owner = if row.owner == own.start { Some(own.number) } else { self.living(row.owner) };
            let giving = row.owner == own.start && self.giving.contains_key(&row.partition);
            ownership.set(row.partition, Part { owner, epoch: row.epoch.unsigned_abs(), giving });
        }
        for (name, entry) in &self.listing.entries {
            ownership.name(entry.number, Known { name: name.clone(), address: entry.member.client_address.clone() });
        }
        ownership
    }

    /// The number of a node whose start that is, if it may be alive.
    fn living(&self, start: Start) -> Option<NodeIndex> {
        let (name, number) = self.deeds.starts.get(&start)?;
        self.listing.may_live(name, start).then_some(*number)
    }

    fn say_settled(&mut self, moves: &Moves) {
        let settled = moves.is_settled();
        if settled && !std::mem::replace(&mut self.settled, settled) {
            tracing::info!("this node owns {} partitions, as it should", self.owned());
        }
        self.settled = settled;
    }
}

/// The number of clients that is told instead of that before: each change makes all nodes look, so a small one is not told.
fn worth_telling(before: u64, now: u64) -> u64 {
    if now.abs_diff(before) > before / 8 { now } else { before }
}

/// Says that something can't be read, and that it can be again, once each.
fn say_once(failing: &mut bool, why: Option<&str>, what: &str) {
    match (why, std::mem::replace(failing, why.is_some())) {
        (Some(why), false) => tracing::warn!("{what} can't be read, nothing is taken or given meanwhile: {why}"),
        (None, true) => tracing::info!("{what} can be read again"),
        (Some(_), true) | (None, false) => {}
    }
}

/// A change of the members, for people.
struct Said<'a>(&'a Change);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Change::Joined(name) => write!(f, "node {name} has joined"),
            Change::Left(name) => write!(f, "node {name} has left"),
            Change::Restarted(name) => write!(f, "node {name} has started again"),
            Change::Moved(name) => write!(f, "node {name} has another address"),
            Change::Draining(name) => write!(f, "node {name} is being drained"),
        }
    }
}
