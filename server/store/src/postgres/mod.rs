//! The PostgreSQL store: tables of a database that other machines keep, for nodes that may die with their disks.
//!
//! - [`address`]: where it is; [`tls`]: how the way there is hidden. [`tables`]: its tables, their versions, who owns them. [`session`]: a shard's connections;
//!   [`sql`]: what they say; [`values`]: how our values stand there.
//! - [`batch`], [`commit`]: a batch of records as one transaction. [`query`]: what is answered.
//! - [`shard`]: the handle on the shard's thread; [`worker`]: its task. All tasks run on one plain thread, the side
//!   thread; no reactor ever waits for the database.
//! - `retainer`, with `orphans`: the task that lets go of old messages.
//! - [`ownership`]: in a cluster, who owns which partition; [`registrar`]: its task; [`held`]: what this start owns.
//!
//! **Who may write.** Each start of a node is an *owner*. Alone, it takes all partitions over; in a cluster it takes and
//! gives back some while it runs; each time in one transaction that waits for commits under way. Every commit holds the
//! rows of the partitions it writes and compares their epochs, so an owner of before writes nothing and is told that it is
//! fenced: the shard stops, and the node with it. Within an owner each shard is a *writer*, whose epoch rises with every
//! session: what a lost connection left behind in the server is fenced by the next. A session that is begun anew takes no
//! partition: what others took meanwhile stays theirs.
//!
//! **What is read.** Of a partition that is owned, from the take on: everything that was acknowledged and nothing that was
//! not, because the take is a commit behind all of it, and is waited for on the server that is read from. A question about
//! a partition that is not owned, or is given back while it is answered, is answered with what is there at some moment:
//! whether it may be asked and whether its answer still counts is for the core to know.
//!
//! **What a lost connection means.** A commit counts itself in the row of its writer. The next session commits a new
//! epoch before it reads that count, so what it reads is decided: the commit is there, or never will be and is written
//! again. Whoever waits for it is told nothing wrong meanwhile, and nothing at all.

mod address;
mod batch;
#[cfg(test)]
mod cluster_tests;
mod commit;
mod errors;
mod held;
mod orphans;
mod ownership;
mod query;
mod registrar;
mod retainer;
#[cfg(test)]
mod retention_tests;
#[cfg(any(test, feature = "conformance"))]
pub mod rig;
mod session;
mod shard;
mod sql;
mod tables;
#[cfg(test)]
mod tests;
mod tls;
#[cfg(test)]
mod tls_tests;
mod values;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use rustix::event::{EventfdFlags, eventfd};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::channel;

use self::address::Address;
pub use self::address::without_password;
pub use self::errors::OpenError;
use self::held::{Epochs, Held};
use self::ownership::REQUESTS_MAX;
pub use self::ownership::{Claim, Epoch, NODES_MAX, Owned, Ownership, OwnershipError, OwnershipTable, Start, StartRow};
use self::registrar::{REGISTRAR, Registrar};
use self::retainer::{RETAINER, Retainer};
use self::session::{Connection, Writer};
pub use self::shard::PostgresShard;
use self::shard::Queue;
use self::worker::{Out, Reply, Shown, Worker};
use crate::StoreStats;
use crate::embedded::Retention;

/// Places in the line to a task beside those for questions: one commit, and the end.
const JOBS_SPARE: usize = 4;
/// Places in the line back beside those for answers.
const REPLIES_SPARE: usize = 4;

/// How a PostgreSQL store is reached and used. Bounds are per shard.
#[derive(Clone)]
pub struct PostgresOptions {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE?…` or `key=value …`; never logged.
    pub url: String,
    /// Its first line is the password, unless the URL has one.
    pub password_file: Option<PathBuf>,
    /// PEM file of who signed the server's certificate: with it the way there is encrypted and the server has to prove who
    /// it is.
    pub ca: Option<PathBuf>,
    /// This node, as others are told who took over from them.
    pub node: String,
    /// Bytes that may wait for a commit; more is `Full`. At least room for one largest record (2 MiB).
    pub batch_bytes_max: usize,
    /// Open questions; more is `Full`.
    pub loads_max: usize,
    /// A commit, an attempt to connect, and the end that take longer have failed.
    pub timeout: Duration,
    /// What is kept at least; of size, that of the messages of all nodes of the database as `retainer` counts it.
    pub retention: Retention,
    /// Time between two looks at what may be let go.
    pub retention_interval: Duration,
}

impl std::fmt::Debug for PostgresOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let url = without_password(&self.url);
        let mut all = f.debug_struct("PostgresOptions");
        all.field("url", &url).field("password_file", &self.password_file).field("node", &self.node);
        all.field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self {
            url: String::new(),
            password_file: None,
            ca: None,
            node: "ringline".into(),
            batch_bytes_max: 4 * 1024 * 1024,
            loads_max: 4096,
            timeout: Duration::from_secs(10),
            retention: Retention::default(),
            retention_interval: Duration::from_secs(60),
        }
    }
}

/// What a start found.
#[derive(Clone, Debug)]
pub struct OpenReport {
    /// `HOST:PORT/DATABASE as USER`.
    pub place: String,
    /// Of the server, as people write it.
    pub version: String,
    /// The number of this start among all.
    pub owner: i64,
    /// The way to the server leaves this machine, and is not encrypted.
    pub is_open: bool,
    pub took_ms: u64,
}

/// What memory a store may take, by part, in bytes; answers under way come on top.
pub fn memory_budget(options: &PostgresOptions, shards: u16) -> Vec<(&'static str, u64)> {
    const QUESTION_BYTES: u64 = 256;
    let shards = u64::from(shards);
    vec![
        // One waits, one is under way as records and as the bytes of its statements.
        ("store batches", shards * 3 * options.batch_bytes_max as u64),
        ("store questions", shards * options.loads_max as u64 * QUESTION_BYTES),
    ]
}

/// The PostgreSQL store.
pub struct PostgresStore;

impl PostgresStore {
    /// Connects, makes what is missing in the database, takes all partitions over and gives one handle a shard, at least
    /// one. Whoever had them is fenced. Blocks.
    ///
    /// Each handle is moved to its shard's thread. Errors say what to do in one line.
    pub fn open(options: PostgresOptions, shards: u16) -> Result<(Vec<PostgresShard>, OpenReport), OpenError> {
        let started = Instant::now();
        let (options, shards) = (Arc::new(options), shards.max(1));
        let address = Arc::new(address_of(&options)?);
        let runtime = runtime()?;
        let (version, owner, epochs) = runtime.block_on(prepare(&address, (&options.node, shards)))?;
        let held = Arc::new(Held::new(epochs));
        let (mut handles, workers) = lines(&options, (&address, owner, &held), shards)?;
        let report = report(&address, (version, owner), started);
        let retainer = retainer(&options, (address, owner, held), &mut handles);
        run(runtime, workers, Others { registrar: None, retainer })?;
        Ok((handles, report))
    }

    /// Connects, makes what is missing in the database, and makes this start of the node one of those that may own
    /// partitions, with a handle a shard, at least one. It owns none yet: what is appended before [`Ownership::take`] is
    /// fenced. An earlier start of the same node writes and takes nothing any more. Blocks.
    ///
    /// Each handle is moved to its shard's thread, the last thing to any. Errors say what to do in one line.
    pub fn open_cluster(
        options: PostgresOptions,
        shards: u16,
    ) -> Result<(Vec<PostgresShard>, Ownership, OpenReport), OpenError> {
        let started = Instant::now();
        let (options, shards) = (Arc::new(options), shards.max(1));
        let address = Arc::new(address_of(&options)?);
        let runtime = runtime()?;
        let (version, owner, number) = runtime.block_on(enter(&address, (&options.node, shards)))?;
        let held = Arc::new(Held::default());
        let (mut handles, workers) = lines(&options, (&address, owner, &held), shards)?;
        let retainer = retainer(&options, (Arc::clone(&address), owner, Arc::clone(&held)), &mut handles);
        let (requests, requests_in) = channel(REQUESTS_MAX);
        let ownership = Ownership { start: Start(owner), number, requests };
        let report = report(&address, (version, owner), started);
        let writer = Writer { owner, shard: REGISTRAR };
        let registrar = Registrar {
            address,
            writer,
            held,
            requests: requests_in,
            limit: options.timeout,
            session: None,
            is_away: false,
        };
        run(runtime, workers, Others { registrar: Some(registrar), retainer })?;
        Ok((handles, ownership, report))
    }

    /// Connects and looks whether this database would do; changes nothing. Returns its place and version. Blocks.
    pub fn probe(options: &PostgresOptions) -> Result<(String, String), OpenError> {
        let address = address_of(options)?;
        let version = runtime()?.block_on(async { Connection::open(&address).await?.check(&address).await })?;
        Ok((address.place, version))
    }
}

fn address_of(options: &PostgresOptions) -> Result<Address, OpenError> {
    Address::read(&options.url, options.password_file.as_deref())?.trust(options.ca.as_deref())
}

fn runtime() -> Result<Runtime, OpenError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(|source| OpenError::System { what: "no side thread for PostgreSQL", source })
}

async fn prepare(address: &Address, node: (&str, u16)) -> Result<(String, i64, Epochs), OpenError> {
    let connection = Connection::open(address).await?;
    let version = connection.check(address).await?;
    tables::migrate(&connection.client, address).await?;
    let (owner, epochs) = tables::take_over(&connection.client, address, node).await?;
    Ok((version, owner, epochs))
}

async fn enter(address: &Address, node: (&str, u16)) -> Result<(String, i64, u8), OpenError> {
    let connection = Connection::open(address).await?;
    let version = connection.check(address).await?;
    tables::migrate(&connection.client, address).await?;
    let (owner, number) = tables::join(&connection.client, address, node).await?;
    Ok((version, owner, number))
}

fn report(address: &Address, (version, owner): (String, i64), started: Instant) -> OpenReport {
    let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    OpenReport { place: address.place.clone(), version, owner, is_open: address.is_open(), took_ms }
}

/// What carries out retention, if anything may go. The handle of the first shard shows what it does.
fn retainer(
    options: &PostgresOptions,
    (address, owner, held): (Arc<Address>, i64, Arc<Held>),
    handles: &mut [PostgresShard],
) -> Option<Retainer> {
    if options.retention.is_off() {
        return None;
    }
    let writer = Writer { owner, shard: RETAINER };
    let retainer = Retainer::new((address, writer, held), (options.retention, options.retention_interval));
    if let Some(first) = handles.first_mut() {
        first.figures = Some(Arc::clone(&retainer.figures));
    }
    Some(retainer)
}

/// Handles and tasks of all shards.
fn lines(
    options: &Arc<PostgresOptions>,
    (address, owner, held): (&Arc<Address>, i64, &Arc<Held>),
    shards: u16,
) -> Result<(Vec<PostgresShard>, Vec<Worker>), OpenError> {
    let all: Result<Vec<_>, _> =
        (0..shards).map(|shard| line(options, (address, Writer { owner, shard: i32::from(shard) }, held))).collect();
    Ok(all?.into_iter().unzip())
}

/// A handle and its task.
fn line(
    options: &Arc<PostgresOptions>,
    (address, writer, held): (&Arc<Address>, Writer, &Arc<Held>),
) -> Result<(PostgresShard, Worker), OpenError> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let wake = wake.map_err(|error| OpenError::System { what: "no eventfd", source: error.into() })?;
    let (wake, shown) = (Arc::new(wake), Arc::new(Shown::default()));
    let (jobs, jobs_in) = channel(options.loads_max + JOBS_SPARE);
    let (replies, replies_in) = bounded(options.loads_max + REPLIES_SPARE);
    let out = Out { replies, wake: Arc::clone(&wake), shown: Arc::clone(&shown) };
    let whose = (Arc::clone(address), writer, Arc::clone(held));
    let worker = Worker::new(whose, (jobs_in, out), options.timeout);
    let handle = PostgresShard {
        options: Arc::clone(options),
        jobs: Some(jobs),
        replies: replies_in,
        wake,
        shown,
        queue: Queue::default(),
        figures: None,
        loads_open: 0,
        events: Vec::new(),
        stats: StoreStats::new(),
    };
    Ok((handle, worker))
}

/// Tasks beside those of the shards.
#[derive(Default)]
struct Others {
    registrar: Option<Registrar>,
    /// Ends with the thread.
    retainer: Option<Retainer>,
}

/// Starts the side thread: it ends with the last of the tasks of shards and of the registrar.
fn run(runtime: Runtime, workers: Vec<Worker>, others: Others) -> Result<(), OpenError> {
    let body = move || {
        runtime.block_on(async {
            let start = |worker: Worker| (worker.out.clone(), tokio::spawn(worker.run()));
            let tasks: Vec<_> = workers.into_iter().map(start).collect();
            let registrar = others.registrar.map(|registrar| tokio::spawn(registrar.run()));
            others.retainer.map(|retainer| tokio::spawn(retainer.run()));
            for (out, task) in tasks {
                if task.await.is_err() {
                    tracing::error!("the task of a shard's store panicked");
                    out.say(Reply::Failed);
                }
            }
            if let Some(registrar) = registrar
                && registrar.await.is_err()
            {
                tracing::error!("the task that takes partitions panicked");
            }
        });
    };
    let started = std::thread::Builder::new().name("postgres".into()).spawn(body);
    started.map(drop).map_err(|source| OpenError::System { what: "no side thread for PostgreSQL", source })
}
