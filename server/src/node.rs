//! The node: checks, opens, starts one thread a core, waits for the signal, stops in order. Owned by the main thread.
//!
//! Invariant: a core that ends unasked ends the process. What was accepted is on disk, and a supervisor starts it anew;
//! a node that lacks a core would leave its users without answers.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};
use glommio::{LocalExecutorBuilder, Placement};
use ringline_cluster::placement::{CorePlacement, NodeIndex, ShardIndex};
use ringline_cluster::router::Board;
use ringline_core::Shard;
use ringline_core::config::{ClusterConfig, CoreConfig};
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::errors::ErrorCode;
use ringline_schema::message::Reply;
use ringline_store::embedded::{EmbeddedStore, OpenError, OpenReport};
use ringline_store::postgres::{self, Ownership, PostgresStore};
use ringline_store::{Store, memory};

use crate::admin::snapshot::SnapshotPort;
use crate::admin::{self, Facts, Nodes};
use crate::auth::{Issuer, Verifier};
use crate::boot::{self, BootError};
use crate::config::{ClusterMode, Config, StoreKind};
use crate::doctor;
use crate::etcd::Lost;
use crate::http::Endpoint;
use crate::joined::{self, Joined, LinkSeed, Moving};
use crate::lanes;
use crate::net::epoll::EpollNet;
use crate::net::ring::RingNet;
use crate::net::{Admission, Net, NetKind, NetOptions};
use crate::park::{ParkKind, Parker};
use crate::peers::door::Door;
use crate::placed::Placed;
use crate::reactor::{CoreReport, Ended, Parts, Reactor};
use crate::route::{self, Owners, Twin};
use crate::signals::StopSignals;
use crate::steward::StewardParts;
use crate::steward::desk::OrdersPort;
use crate::steward::thread::{self, Endings, Running};
use crate::steward::view::Watching;
use crate::stop::Control;
use crate::wake::Waker;
use crate::workers::{self, WorkerOptions};

/// Exit code of a second signal, of a store that could not be closed, and of a core that ended unasked.
pub const EXIT_NOT_CLEAN: u8 = 1;
/// What a client is told to wait when it finds no place.
const REFUSED_RETRY_MS: u32 = 5_000;

/// A core's last word.
enum CoreEnd {
    Stopped(ShardIndex, Ended, Result<(), String>),
    Panicked(ShardIndex),
}

/// What a core's thread is started with.
struct Seed {
    core: usize,
    net: NetKind,
    park: ParkKind,
    config: CoreConfig,
    listener: OwnedFd,
    admission: Arc<Admission>,
    refusal: Vec<u8>,
    rest: SeedRest,
}

/// The parts that go into the reactor as they are.
struct SeedRest {
    store: Box<dyn Store + Send>,
    lanes: lanes::LaneEnd,
    waker: Arc<crate::wake::Waker>,
    workers: workers::WorkersHandle,
    worked: Receiver<workers::Done>,
    control: Arc<Control>,
    reports: Sender<CoreReport>,
    port: SnapshotPort,
    /// `None`: a node alone.
    peers: Option<LinkSeed>,
    /// `None`: nothing of the cluster changes while it runs.
    orders: Option<OrdersPort>,
    board: Arc<Board>,
    epoch: Instant,
}

/// Runs a node until it is told to stop. The result is the process's exit code.
pub fn serve(mut config: Config) -> Result<u8, BootError> {
    let started = Instant::now();
    check_early(&config)?;
    // Before any thread exists this takes almost no time.
    glommio::early_init();
    let signals = StopSignals::watch().map_err(system("signal handling"))?;
    let features = boot::probe_ring()?;
    boot::check_memlock()?;
    let cores = boot::pick_cores(&config.cores)?;
    let wanted = config.connections_max;
    config.connections_max = boot::fit_clients(&config, cores.len())?;
    let (address, listeners) = boot::listen(config.net_listen, config.net_backlog, cores.len())?;
    tracing::info!("ringline {}, kernel {}, io_uring: {features}", env!("CARGO_PKG_VERSION"), kernel());
    say_if_lowered(config.connections_max, wanted);
    doctor::at_start(&config, &cores, features).iter().for_each(|line| tracing::warn!("{line}"));
    let (admin_listener, route_listener) = (config.admin_listen.map(admin::bind).transpose()?, route::bind(&config)?);
    let (net_kind, instead) = pick_net(config.net_kind, crate::net::ring::is_supported());
    say_net(net_kind, instead.as_ref());
    let placed = Placed::check(&config)?;
    let (stores, ownership) = match open_store(&config, cores.len(), signals.asked()) {
        Err(BootError::Store(OpenError::Stopped)) => {
            tracing::info!("stopped while the logs were read; the next start goes on from here");
            return Ok(0);
        }
        opened => opened?,
    };
    placed.keep()?;
    let verifier = open_auth(&config)?;
    let threads = worker_threads(&config, cores.len());
    say_what_is_used(&config, &cores, threads);

    let (wakers, ends) = lanes::mesh(cores.len() as u16).map_err(system("the lanes"))?;
    let mut entered = enter_cluster((&config, ownership), &wakers, (address, started))?;
    let route = route::settings(&config, entered.cluster.as_ref(), cores.len());
    let options = WorkerOptions { threads, queue: config.workers_queue, cores: spare_cores(&cores), verifier };
    let handles = workers::start(options, &wakers).map_err(system("the workers"))?;
    let control = Arc::new(Control::new(wakers.clone(), Duration::from_millis(config.server_stop_timeout_ms)));
    let (reports, reports_in) = unbounded();
    let admission = Arc::new(Admission::new(config.connections_max));
    let (desk, ports) = admin::snapshot::desk(&wakers);
    let parts = ends.into_iter().zip(wakers).zip(handles).zip(stores).zip(listeners.into_iter().zip(ports));
    let mut seeds = Vec::new();
    for (at, ((((lanes, waker), (workers, worked)), store), (listener, port))) in parts.enumerate() {
        let control = control.clone();
        let reports = reports.clone();
        let (peers, orders, board, epoch) = (entered.links.next(), entered.orders.next(), route.board.clone(), started);
        let rest =
            SeedRest { store, lanes, waker, workers, worked, control, reports, port, peers, orders, board, epoch };
        let core_config = core_config((&config, &entered), (at, cores.len()), address);
        let core_config = CoreConfig { route: route.clone(), ..core_config };
        let core = cores.get(at).copied().unwrap_or(at);
        let (admission, refusal) = (admission.clone(), refusal());
        let (net, park) = (net_kind, config.net_park);
        seeds.push(Seed { core, net, park, config: core_config, listener, admission, refusal, rest });
    }
    drop(reports);
    let nodes = entered.watching().map(|watching| Nodes { watching, board: route.board.clone() });
    let facts = Facts { kernel: kernel(), net: net_name(net_kind), cores: cores.clone(), nodes };
    let admin = admin_listener.map(|listener| admin::start(listener, desk, facts)).transpose()?;
    let own = (config.node_name.clone(), joined::advertised(&config, address));
    let owners = Owners::of(entered.cluster.take(), entered.watching());
    let twin = Twin::new(own, owners, &route, control.clone());
    let twin = route_listener.map(|listener| twin.serve(listener)).transpose()?;
    let ends = start_cores(seeds)?;
    let (steward, lost) = start_steward(&config, (entered.moving.take(), &route.board), &control)?;
    signals.attach(control);
    tracing::info!("ready on {address} in {} ms", started.elapsed().as_millis());
    let code = wait(&reports_in, (&ends, &lost), cores.len());
    if let Some(steward) = steward {
        steward.end();
    }
    admin.into_iter().chain(twin).for_each(Endpoint::stop);
    Ok(code)
}

/// A key that is not there is told before anything is touched.
fn check_early(config: &Config) -> Result<(), BootError> {
    if !config.auth_issuer.is_empty() {
        Issuer::existing(config)?;
    }
    Ok(())
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> BootError {
    move |error| BootError::System { what, error }
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// What makes a node one of several; nothing of a node alone.
struct Entered {
    cluster: Option<ClusterConfig>,
    links: std::vec::IntoIter<LinkSeed>,
    orders: std::vec::IntoIter<OrdersPort>,
    moving: Option<Moving>,
    /// Accepts as long as it is there.
    _door: Option<Door>,
}

impl Entered {
    /// For who only wants to know what comes and goes.
    fn watching(&self) -> Option<Watching> {
        self.moving.as_ref().map(|moving| moving.watching.clone())
    }
}

fn enter_cluster(
    (config, ownership): (&Config, Option<Ownership>),
    wakers: &[Arc<Waker>],
    (address, started): (SocketAddr, Instant),
) -> Result<Entered, BootError> {
    let joined = match ownership {
        Some(ownership) => Some(joined::join_moving((config, ownership), wakers, (address, started))?),
        None => joined::join(config, wakers)?,
    };
    let Some(Joined { config, seeds, door, mut moving }) = joined else {
        let (links, orders) = (Vec::new().into_iter(), Vec::new().into_iter());
        return Ok(Entered { cluster: None, links, orders, moving: None, _door: None });
    };
    let orders = moving.as_mut().map_or(Vec::new(), |moving| std::mem::take(&mut moving.ports)).into_iter();
    Ok(Entered { cluster: Some(config), links: seeds.into_iter(), orders, moving, _door: Some(door) })
}

/// A store a core, and in a cluster of etcd what this start owns of it.
type Opened = (Vec<Box<dyn Store + Send>>, Option<Ownership>);

/// Starts the side thread of a cluster of etcd; the other end tells when this start may not go on.
fn start_steward(
    config: &Config,
    (moving, board): (Option<Moving>, &Arc<Board>),
    control: &Arc<Control>,
) -> Result<(Option<Running>, Receiver<Lost>), BootError> {
    let Some(Moving { parts, bell, .. }) = moving else { return Ok((None, never())) };
    let (lost, lost_in) = unbounded();
    let drain_timeout = Duration::from_millis(config.server_stop_timeout_ms);
    let endings = Endings { control: control.clone(), drain_timeout, lost };
    let parts = StewardParts { board: board.clone(), ..parts };
    let running = thread::start(parts, bell, endings).map_err(system("the side thread of the cluster"))?;
    Ok((Some(running), lost_in))
}

fn open_store(config: &Config, cores: usize, stop: &Arc<AtomicBool>) -> Result<Opened, BootError> {
    let shards = cores as u16;
    match config.store_kind {
        StoreKind::Memory => {
            make_data_dir(config)?;
            tracing::warn!("store.kind is memory: messages are forgotten when the server stops");
            Ok((boxed(memory::open(shards)), None))
        }
        StoreKind::Embedded => {
            let (stores, report) = EmbeddedStore::open(&config.data_dir, shards, boot::store_options(config, stop))?;
            say_what_was_found(&config.data_dir, &report);
            Ok((boxed(stores), None))
        }
        StoreKind::Postgres => {
            make_data_dir(config)?;
            let options = boot::postgres_options(config);
            let (stores, ownership, report) = match config.cluster_mode {
                ClusterMode::Etcd => {
                    let (stores, ownership, report) = PostgresStore::open_cluster(options, shards)?;
                    (stores, Some(ownership), report)
                }
                ClusterMode::None | ClusterMode::Static => {
                    let (stores, report) = PostgresStore::open(options, shards)?;
                    (stores, None, report)
                }
            };
            let postgres::OpenReport { place, version, owner, took_ms, is_open } = report;
            let taken = if ownership.is_some() { "none yet of the" } else { "all" };
            tracing::info!(
                "PostgreSQL {version} at {place}: {taken} partitions taken over as start {owner} in {took_ms} ms"
            );
            if is_open {
                tracing::warn!(
                    "the way to PostgreSQL leaves this machine and is not encrypted: set postgres.ca, or keep it in a net of your own"
                );
            }
            Ok((boxed(stores), ownership))
        }
    }
}

fn boxed(stores: Vec<impl Store + Send + 'static>) -> Vec<Box<dyn Store + Send>> {
    stores.into_iter().map(|store| Box::new(store) as Box<dyn Store + Send>).collect()
}

/// Of a store that keeps nothing there: the key of the token issuer lies in it.
fn make_data_dir(config: &Config) -> Result<(), BootError> {
    let path = config.data_dir.display().to_string();
    std::fs::create_dir_all(&config.data_dir).map_err(|error| BootError::DataDir { path, error })
}

fn say_what_was_found(data_dir: &Path, report: &OpenReport) {
    let place = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned());
    let stop = if report.clean_stop { "clean" } else { "not stopped in order last time" };
    tracing::info!(
        "data directory {}: {stop}, {} records replayed, opened in {} ms",
        place.display(),
        report.replayed_records,
        report.took_ms
    );
    if let Some(reason) = &report.index_rebuilt {
        tracing::warn!("the index was made anew from the logs: {reason}");
    }
    for cut in &report.cuts {
        tracing::warn!(
            "{}: {} bytes of an unfinished commit were cut at {}; nobody was told it was stored",
            cut.file.display(),
            cut.bytes,
            cut.offset
        );
    }
}

fn open_auth(config: &Config) -> Result<Arc<Verifier>, BootError> {
    let (issuer, new) = Issuer::of(config)?;
    if new {
        tracing::info!("a new token issuer key was made in {}", config.data_dir.display());
    }
    Ok(Arc::new(Verifier::new(&issuer, &config.auth_public_keys, &config.auth_audience)?))
}

fn say_if_lowered(connections_max: usize, wanted: usize) {
    if connections_max < wanted {
        tracing::warn!(
            "connections are limited to {connections_max} instead of {wanted} by the limit of open files: raise it (ulimit -n)"
        );
    }
}

/// Settles `auto`: the ring if this kernel can make one, and otherwise why not.
fn pick_net(wanted: NetKind, ring: io::Result<()>) -> (NetKind, Option<io::Error>) {
    match (wanted, ring) {
        (NetKind::Auto, Err(error)) => (NetKind::Epoll, Some(error)),
        (NetKind::Auto, Ok(())) => (NetKind::Ring, None),
        (NetKind::Ring | NetKind::Epoll, _) => (wanted, None),
    }
}

fn say_net(picked: NetKind, instead: Option<&io::Error>) {
    match instead {
        Some(error) => tracing::info!("sockets are served by epoll: this kernel makes no ring for them ({error})"),
        None => tracing::info!("sockets are served by {}", net_name(picked)),
    }
}

fn net_name(picked: NetKind) -> &'static str {
    match picked {
        NetKind::Ring => "io_uring",
        NetKind::Auto | NetKind::Epoll => "epoll",
    }
}

/// Cores without a shard on which the process may run.
fn spare_cores(shards: &[usize]) -> Vec<usize> {
    let all = core_affinity::get_core_ids().unwrap_or_default();
    all.iter().map(|core| core.id).filter(|core| !shards.contains(core)).collect()
}

fn worker_threads(config: &Config, cores: usize) -> usize {
    const AUTO_MIN: usize = 2;
    match config.workers_threads {
        0 => core_affinity::get_core_ids().map_or(0, |all| all.len().saturating_sub(cores)).max(AUTO_MIN),
        threads => threads,
    }
}

fn say_what_is_used(config: &Config, cores: &[usize], threads: usize) {
    let placement = CorePlacement::new(cores.len() as u16);
    let partitions: Vec<String> = (0..cores.len())
        .filter_map(|at| placement.map(|placement| placement.partitions_of(ShardIndex(at as u16)).to_string()))
        .collect();
    tracing::info!(
        "cores {} with {} partitions, {threads} workers, up to {} connections",
        boot::ranges(cores),
        partitions.join("+"),
        config.connections_max
    );
    let mib = |bytes: u64| bytes.div_ceil(1_048_576);
    let parts = boot::memory_budget(config, cores.len(), threads);
    let texts: Vec<String> = parts.iter().map(|(name, bytes)| format!("{name} {}", mib(*bytes))).collect();
    let sum: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    tracing::info!("memory at most {} MiB: {}", mib(sum), texts.join(", "));
}

fn core_config((config, entered): (&Config, &Entered), (at, cores): (usize, usize), address: SocketAddr) -> CoreConfig {
    // Checked: there is at least one core and at most 1,024.
    let placement = CorePlacement::new(cores as u16).or(CorePlacement::new(1));
    let placement = placement.unwrap_or_else(|| unreachable!("one shard is always a placement"));
    let node = entered.cluster.as_ref().map_or(NodeIndex(0), |cluster| cluster.placement.own());
    CoreConfig {
        node: config.node_name.clone(),
        address: joined::advertised(config, address),
        frame_bytes_max: config.frame_bytes_max,
        outbox_bytes_max: config.outbox_bytes_max,
        write_stall_ms: config.write_stall_ms,
        login_timeout_ms: config.login_timeout_ms,
        idle_timeout_ms: config.idle_timeout_ms,
        ping_interval_ms: config.ping_interval_ms,
        requests_per_s: config.requests_per_s,
        requests_burst: config.requests_burst,
        device_policy: config.devices_policy,
        devices_max: config.devices_max,
        token_creates_user: config.auth_token_creates_user,
        amend_window_ms: config.amend_window_ms,
        admins: config.auth_admins.clone(),
        conversations_cached_max: config.cache_conversations,
        users_cached_max: config.cache_users,
        connections_max: config.connections_max,
        gateway: config.is_gateway(),
        cluster: entered.cluster.clone(),
        lease: entered.moving.as_ref().map(|moving| moving.lease.clone()),
        ..CoreConfig::new(ShardIndex::new(node, at as u16), placement)
    }
}

/// What a client hears that finds no place.
fn refusal() -> Vec<u8> {
    let code = ErrorCode::TooManyConnections;
    let mut bytes = Vec::new();
    let failure = Reply::Failure { code, retry_after_ms: REFUSED_RETRY_MS, detail: code.text() };
    Encoder::new().reply(Codec::default(), 0, &failure, &mut bytes);
    bytes
}

/// Starts the threads and waits until all of them serve.
fn start_cores(seeds: Vec<Seed>) -> Result<Receiver<CoreEnd>, BootError> {
    let (ready, ready_in) = bounded(seeds.len());
    let (ends, ends_in) = bounded(seeds.len());
    let count = seeds.len();
    for seed in seeds {
        let (ready, ends) = (ready.clone(), ends.clone());
        let index = ShardIndex(seed.config.shard.within());
        let run = move || {
            let end = catch_unwind(AssertUnwindSafe(|| run_core(seed, &ready)));
            let _ = match end {
                Ok(Some((ended, closed))) => ends.send(CoreEnd::Stopped(index, ended, closed)),
                // It never began, and has said so.
                Ok(None) => Ok(()),
                Err(_) => ends.send(CoreEnd::Panicked(index)),
            };
        };
        std::thread::Builder::new().name(format!("core-{}", index.0)).spawn(run).map_err(system("a core's thread"))?;
    }
    drop(ready);
    for _ in 0..count {
        match ready_in.recv() {
            Ok(outcome) => outcome?,
            Err(_) => return Err(BootError::Core { core: 0, reason: "it ended at once".into() }),
        }
    }
    Ok(ends_in)
}

/// A core's thread from its first to its last line. `None`: it could not begin.
fn run_core(seed: Seed, ready: &Sender<Result<(), BootError>>) -> Option<(Ended, Result<(), String>)> {
    let core = seed.core;
    let fail = |reason: String| {
        let _ = ready.send(Err(BootError::Core { core, reason }));
    };
    let executor = LocalExecutorBuilder::new(Placement::Fixed(core)).io_memory(boot::RING_IO_BYTES).make();
    let executor = match executor {
        Ok(executor) => executor,
        Err(error) => {
            fail(error.to_string());
            return None;
        }
    };
    executor.run(async move {
        let prepared = prepare(seed);
        match prepared {
            Ok((reactor, parker)) => {
                let _ = ready.send(Ok(()));
                let (ended, closed) = reactor.run(parker).await;
                Some((ended, closed.map_err(|error| error.to_string())))
            }
            Err(error) => {
                fail(error.to_string());
                None
            }
        }
    })
}

fn prepare(seed: Seed) -> std::io::Result<(Reactor, Parker)> {
    let Seed { net, park, config, listener, admission, refusal, mut rest, core: _ } = seed;
    let (index, node) = (ShardIndex(config.shard.within()), config.shard.node());
    let now_ms = rest.epoch.elapsed().as_millis() as u64;
    let peers = rest.peers.map(|seed| seed.links(index.0, admission.clone(), now_ms));
    let peers = peers.map(|peers| peers.with_board(rest.board.clone()));
    let options = NetOptions { listener, admission, refusal };
    let mut net: Box<dyn Net> = match net {
        NetKind::Ring => Box::new(RingNet::new(options)?),
        NetKind::Auto | NetKind::Epoll => Box::new(EpollNet::new(options)?),
    };
    net.watch(rest.waker.bell())?;
    if let Some(fd) = rest.store.wake_fd() {
        net.watch(fd)?;
    }
    if net.writes_files() {
        rest.store.lend_writes();
    }
    let parker = Parker::new(park, net.as_ref())?;
    let parts = Parts {
        index,
        node,
        shard: Shard::new(config, rand::random()),
        net,
        store: rest.store,
        lanes: rest.lanes,
        waker: rest.waker,
        workers: rest.workers,
        worked: rest.worked,
        control: rest.control,
        reports: rest.reports,
        port: rest.port,
        peers,
        orders: rest.orders,
        board: rest.board,
        epoch: rest.epoch,
    };
    Ok((Reactor::new(parts), parker))
}

/// Logs what the cores report, until the last of them has ended. Returns the exit code.
fn wait(reports: &Receiver<CoreReport>, (ends, lost): (&Receiver<CoreEnd>, &Receiver<Lost>), cores: usize) -> u8 {
    let mut summary = Summary::new(cores);
    let mut code = 0;
    let mut left = cores;
    while left > 0 {
        select! {
            recv(lost) -> lost => if let Ok(lost) = lost {
                tracing::error!("the node ends, and is to be started anew: {lost}");
                std::process::exit(i32::from(EXIT_NOT_CLEAN));
            },
            recv(reports) -> report => if let Ok(report) = report { summary.take(report) },
            recv(ends) -> end => match end {
                Ok(CoreEnd::Stopped(shard, ended, closed)) => {
                    left -= 1;
                    if ended == Ended::TimedOut {
                        tracing::warn!(shard = shard.0, "the stop took too long: some requests were not answered");
                    }
                    if let Err(error) = closed {
                        tracing::error!(shard = shard.0, error, "the store could not be closed in order");
                        code = EXIT_NOT_CLEAN;
                    }
                }
                Ok(CoreEnd::Panicked(shard)) => {
                    tracing::error!(shard = shard.0, "a core panicked: the node ends; what was accepted is on disk");
                    std::process::exit(i32::from(EXIT_NOT_CLEAN));
                }
                Err(_) => break,
            },
        }
    }
    reports.try_iter().for_each(|report| summary.take(report));
    summary.print("stopped");
    code
}

/// Counters of the node, as one line.
struct Summary {
    latest: BTreeMap<ShardIndex, CoreReport>,
    fresh: usize,
    cores: usize,
    printed: String,
}

impl Summary {
    fn new(cores: usize) -> Self {
        Self { latest: BTreeMap::new(), fresh: 0, cores, printed: String::new() }
    }

    /// Prints when every core has spoken since the last time and something changed.
    fn take(&mut self, report: CoreReport) {
        // The last words are printed together, by the caller.
        self.fresh += usize::from(!report.is_last);
        self.latest.insert(report.snapshot.shard, report);
        if self.fresh >= self.cores {
            self.fresh = 0;
            let line = self.line();
            if line != self.printed {
                self.print("serving");
            }
        }
    }

    fn line(&self) -> String {
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for (name, value) in self.latest.values().flat_map(|report| report.snapshot.list()) {
            match sums.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += value,
                None => sums.push((name, value)),
            }
        }
        let connections: usize = self.latest.values().map(|report| report.snapshot.levels.connections).sum();
        let texts: Vec<String> =
            sums.iter().filter(|(_, value)| *value > 0).map(|(name, value)| format!("{name}={value}")).collect();
        format!("connections={connections} {}", texts.join(" "))
    }

    fn print(&mut self, state: &str) {
        let line = self.line();
        tracing::info!("{state}: {line}");
        self.printed = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_ring_gets_epoll_unless_the_ring_is_asked_for() {
        let lacks = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let picked = |wanted, ring| {
            let (picked, instead) = pick_net(wanted, ring);
            (net_name(picked), instead.is_some())
        };
        assert_eq!(picked(NetKind::Auto, Ok(())), ("io_uring", false));
        assert_eq!(picked(NetKind::Auto, lacks()), ("epoll", true), "and the log says why");
        // Then the start fails with the error of the kernel, rather than serving by something else.
        assert_eq!(picked(NetKind::Ring, lacks()), ("io_uring", false));
        assert_eq!(picked(NetKind::Epoll, Ok(())), ("epoll", false));
    }
}
