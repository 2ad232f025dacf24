//! Start-up checks: what the machine must offer, looked at before anything is started. Runs on the main thread.
//!
//! Each failure is one line that says what to do; nothing was changed but limits of this process.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use ringline_cluster::link::channel::{OUT_BYTES_MAX, WINDOW_BYTES};
use ringline_cluster::link::tunnel;
use ringline_cluster::placement::{NODES_MAX, PlacementError};
use ringline_core::config as core_bounds;
use ringline_store::embedded::{EmbeddedOptions, Retention};
use ringline_store::postgres::PostgresOptions;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::auth::AuthError;
use crate::config::{ClusterMode, Config, ConfigError, Cores, StoreKind};
use crate::peers::roster::RosterError;
use crate::placed::PlacedError;

/// Memory of each executor's ring for file buffers, which nothing here uses: the least it takes.
pub const RING_IO_BYTES: usize = 64 * 1024;
/// The executor refuses to start below this, whatever it then locks (at most three times [`RING_IO_BYTES`] a core; with
/// less room it goes on without registered buffers).
pub const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;
/// Descriptors beside connections: logs, key files, the store's index.
const FILES_RESERVED: usize = 192;
/// Rings, timers, doorbells, listener and log segments of one core.
const FILES_PER_CORE: usize = 48;
/// A node that can hold fewer is not worth starting.
pub const CONNECTIONS_MIN: usize = 64;

/// Why the node did not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{0} is in use: stop what listens there (ss -ltnp), or choose another --listen")]
    PortInUse(SocketAddr),
    #[error("cannot listen on {0}: {1}; choose another --listen")]
    Listen(SocketAddr, std::io::Error),
    #[error("the admin endpoint cannot listen on {0}: {1}; choose another admin.listen, or leave it empty")]
    AdminListen(SocketAddr, std::io::Error),
    #[error("routes over HTTP cannot listen on {0}: {1}; choose another cluster.route_listen, or leave it empty")]
    RouteListen(SocketAddr, std::io::Error),
    #[error("io_uring is not available ({reason}): {advice}")]
    NoRing { reason: String, advice: &'static str },
    #[error("locked memory is limited to {have} bytes, {need} are needed: raise it (ulimit -l, LimitMEMLOCK=)")]
    Memlock { have: u64, need: u64 },
    #[error(
        "open files are limited to {have}, at least {need} are needed for {cores} cores: raise it (ulimit -n, LimitNOFILE=)"
    )]
    Files { have: usize, need: usize, cores: usize },
    #[error("core {core} does not exist or is not allowed here: there are {have}; correct --cores")]
    NoSuchCore { core: usize, have: String },
    #[error("{want} cores are wanted, there are {have}; correct --cores")]
    TooFewCores { want: usize, have: usize },
    #[error(transparent)]
    Store(#[from] ringline_store::embedded::OpenError),
    #[error(transparent)]
    Database(#[from] ringline_store::postgres::OpenError),
    #[error("the data directory {path} cannot be used: {error}; choose another --data-dir")]
    DataDir { path: String, error: std::io::Error },
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error(transparent)]
    Roster(#[from] RosterError),
    #[error(transparent)]
    Placement(#[from] PlacementError),
    #[error(transparent)]
    Placed(#[from] PlacedError),
    #[error("other nodes cannot connect to {0}: {1}; choose another cluster.listen, or this node's peer_address")]
    PeerListen(SocketAddr, std::io::Error),
    #[error("{what} could not be started: {error}")]
    System { what: &'static str, error: std::io::Error },
    #[error("core {core} could not be started: {reason}")]
    Core { core: usize, reason: String },
}

/// What the kernel's io_uring offers, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    pub multishot_receive: bool,
    pub buffer_rings: bool,
    pub single_issuer: bool,
    pub defer_taskrun: bool,
    pub zero_copy_send: bool,
}

impl fmt::Display for RingFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.multishot_receive, "multishot receive"),
            (self.buffer_rings, "provided buffer rings"),
            (self.single_issuer, "SINGLE_ISSUER"),
            (self.defer_taskrun, "DEFER_TASKRUN"),
            (self.zero_copy_send, "zero-copy send"),
        ];
        let found: Vec<&str> = all.iter().filter(|(found, _)| *found).map(|(_, name)| *name).collect();
        if found.is_empty() { f.write_str("basic") } else { f.write_str(&found.join(", ")) }
    }
}

/// Tries a ring, and asks what it can do.
pub fn probe_ring() -> Result<RingFeatures, BootError> {
    let ring = IoUring::new(8).map_err(|error| no_ring(&error))?;
    let mut probe = Probe::new();
    let known = ring.submitter().register_probe(&mut probe).is_ok();
    let has = |code: u8| known && probe.is_supported(code);
    let builds = |single: bool, defer: bool| {
        let mut builder = IoUring::<squeue::Entry, cqueue::Entry>::builder();
        if single {
            builder.setup_single_issuer();
        }
        if defer {
            builder.setup_defer_taskrun();
        }
        builder.build(8).is_ok()
    };
    Ok(RingFeatures {
        // Not operations of their own: each came with the release of one that can be probed (6.0, 5.19).
        multishot_receive: has(opcode::SendZc::CODE),
        buffer_rings: has(opcode::Socket::CODE),
        single_issuer: builds(true, false),
        defer_taskrun: builds(true, true),
        zero_copy_send: has(opcode::SendZc::CODE),
    })
}

fn no_ring(error: &std::io::Error) -> BootError {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let advice = match (error.raw_os_error().map(rustix::io::Errno::from_raw_os_error), disabled.trim()) {
        (Some(rustix::io::Errno::NOSYS), _) => "a kernel of 5.8 or newer is needed, built with io_uring",
        (_, "2") => "it is switched off: sysctl kernel.io_uring_disabled=0",
        (_, "1") => {
            "it is switched off for this user: sysctl kernel.io_uring_disabled=0, or join kernel.io_uring_group"
        }
        (Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS), _) => {
            "a sandbox forbids it: allow io_uring_setup, io_uring_enter and io_uring_register (seccomp profile)"
        }
        (Some(rustix::io::Errno::NOMEM), _) => "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
        _ => "check the kernel's log",
    };
    BootError::NoRing { reason: error.to_string(), advice }
}

/// Makes sure the executors may lock what they want to.
pub fn check_memlock() -> Result<(), BootError> {
    let limit = raise_to(Resource::Memlock, MEMLOCK_BYTES_MIN);
    if limit < MEMLOCK_BYTES_MIN {
        return Err(BootError::Memlock { have: limit, need: MEMLOCK_BYTES_MIN });
    }
    Ok(())
}

/// Descriptors that are no connections.
pub fn files_reserved(cores: usize) -> usize {
    FILES_RESERVED.saturating_add(cores.saturating_mul(FILES_PER_CORE))
}

/// How many clients fit, at most `limits.connections_max`: links to other nodes take descriptors too, and are never refused
/// for lack of one. Two connections each, while one replaces the other, and strangers in their greeting.
pub fn fit_clients(config: &Config, cores: usize) -> Result<usize, BootError> {
    const STRANGERS: usize = 64;
    let links = match config.cluster_mode {
        ClusterMode::None => 0,
        ClusterMode::Static => cores * (2 * config.cluster_nodes.len() + STRANGERS),
        ClusterMode::Etcd => cores * (2 * NODES_MAX + STRANGERS),
    };
    Ok(fit_connections(config.connections_max + links, cores)?.saturating_sub(links).max(CONNECTIONS_MIN))
}

/// How many connections fit under the limit of open files, at most `wanted`.
pub fn fit_connections(wanted: usize, cores: usize) -> Result<usize, BootError> {
    let reserved = files_reserved(cores);
    let limit = usize::try_from(raise_to(Resource::Nofile, (wanted + reserved) as u64)).unwrap_or(usize::MAX);
    let fit = limit.saturating_sub(reserved).min(wanted);
    if fit < CONNECTIONS_MIN {
        return Err(BootError::Files { have: limit, need: reserved + CONNECTIONS_MIN, cores });
    }
    Ok(fit)
}

/// Raises the soft limit as far as it may be, if it is below `wanted`. Returns what it is now.
fn raise_to(resource: Resource, wanted: u64) -> u64 {
    let limit = getrlimit(resource);
    let current = limit.current.unwrap_or(u64::MAX);
    if current >= wanted {
        return current;
    }
    let raised = wanted.min(limit.maximum.unwrap_or(u64::MAX));
    match setrlimit(resource, Rlimit { current: Some(raised), maximum: limit.maximum }) {
        Ok(()) => raised.max(current),
        Err(_) => current,
    }
}

/// The cores of the shards. Only cores that this process may run on count.
pub fn pick_cores(wanted: &Cores) -> Result<Vec<usize>, BootError> {
    let mut there: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
    there.sort_unstable();
    there.dedup();
    match wanted {
        Cores::All if there.is_empty() => Err(BootError::TooFewCores { want: 1, have: 0 }),
        Cores::All => Ok(there),
        Cores::Count(count) => {
            let want = usize::from(*count);
            there.get(..want).map(<[usize]>::to_vec).ok_or(BootError::TooFewCores { want, have: there.len() })
        }
        Cores::List(list) => match list.iter().find(|core| !there.contains(core)) {
            Some(&core) => Err(BootError::NoSuchCore { core, have: ranges(&there) }),
            None => Ok(list.clone()),
        },
    }
}

/// `[0, 1, 2, 5]` → `0-2,5`.
pub fn ranges(cores: &[usize]) -> String {
    let groups = cores.chunk_by(|one, next| one + 1 == *next);
    let texts: Vec<String> = groups
        .filter_map(|group| match group {
            [] => None,
            [one] => Some(one.to_string()),
            [first, .., last] => Some(format!("{first}-{last}")),
        })
        .collect();
    texts.join(",")
}

/// How long a start waits for its address. The kernel takes the rings of a killed server apart after its end, and its
/// sockets stay open as long.
const LISTEN_WAIT: Duration = Duration::from_secs(2);
const LISTEN_RETRY: Duration = Duration::from_millis(50);

/// One listening socket a core on the same address; waits [`LISTEN_WAIT`] for one that is in use. See [`listen_now`].
pub fn listen(address: SocketAddr, backlog: u32, cores: usize) -> Result<(SocketAddr, Vec<OwnedFd>), BootError> {
    let deadline = Instant::now() + LISTEN_WAIT;
    let mut said = false;
    loop {
        match listen_now(address, backlog, cores) {
            Err(BootError::PortInUse(_)) if Instant::now() < deadline => {
                if !std::mem::replace(&mut said, true) {
                    tracing::info!("{address} is in use: waiting up to {} s for it", LISTEN_WAIT.as_secs());
                }
                std::thread::sleep(LISTEN_RETRY);
            }
            other => return other,
        }
    }
}

/// One listening socket a core on the same address. The address comes back with the port the kernel chose for port 0.
fn listen_now(address: SocketAddr, backlog: u32, cores: usize) -> Result<(SocketAddr, Vec<OwnedFd>), BootError> {
    let refused = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => BootError::PortInUse(address),
        _ => BootError::Listen(address, error),
    };
    // Sockets that share a port also share it with another server of the same user; one that does not share finds it.
    let alone = TcpListener::bind(address).map_err(refused)?;
    let address = alone.local_addr().map_err(refused)?;
    drop(alone);
    let open = || -> std::io::Result<OwnedFd> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SockAddr::from(address))?;
        socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
        Ok(socket.into())
    };
    let listeners = (0..cores).map(|_| open()).collect::<std::io::Result<Vec<_>>>().map_err(refused)?;
    Ok((address, listeners))
}

/// How the configuration shapes the embedded store; `stop`: whether its opening is to end.
pub fn store_options(config: &Config, stop: &Arc<AtomicBool>) -> EmbeddedOptions {
    EmbeddedOptions {
        stop: Arc::clone(stop),
        segment_bytes: config.store_segment_bytes,
        index_cache_bytes: config.store_cache_bytes,
        free_bytes_min: config.store_free_bytes_min,
        retention: retention(config),
        retention_interval_ms: config.retention_interval_ms,
        // Whatever the core may ask at once finds room.
        loads_max: core_bounds::LOADS_IN_FLIGHT_MAX + core_bounds::WORK_IN_FLIGHT_MAX,
        ..EmbeddedOptions::default()
    }
}

fn retention(config: &Config) -> Retention {
    Retention {
        age_ms: config.retention_age_hours.saturating_mul(3_600_000),
        size_bytes: config.retention_size_bytes,
        messages: config.retention_messages,
    }
}

/// How the configuration shapes the PostgreSQL store.
pub fn postgres_options(config: &Config) -> PostgresOptions {
    let file = &config.postgres_password_file;
    PostgresOptions {
        url: config.postgres_url.0.clone(),
        password_file: (!file.is_empty()).then(|| PathBuf::from(file)),
        node: config.node_name.clone(),
        ca: (!config.postgres_ca.is_empty()).then(|| PathBuf::from(&config.postgres_ca)),
        timeout: Duration::from_millis(config.postgres_timeout_ms),
        retention: retention(config),
        retention_interval: Duration::from_millis(config.retention_interval_ms),
        // Whatever the core may ask at once finds room.
        loads_max: core_bounds::LOADS_IN_FLIGHT_MAX + core_bounds::WORK_IN_FLIGHT_MAX,
        ..PostgresOptions::default()
    }
}

/// Memory by part in bytes, as bounds; the last part is what only happens when every client stops reading.
pub fn memory_budget(config: &Config, cores: usize, worker_threads: usize) -> Vec<(&'static str, u64)> {
    /// Slot, edge and session of an idle connection that is logged in.
    const CONNECTION_BYTES: u64 = 1_024;
    const CONVERSATION_BYTES: u64 = 1_024;
    const USER_BYTES: u64 = 512;
    const HASH_BYTES: u64 = 19 * 1_048_576;
    let each = cores as u64;
    let connections = config.connections_max as u64;
    let spare_buffers = core_bounds::SPARE_BUFFERS_MAX * core_bounds::SPARE_BUFFER_BYTES_MAX;
    let mut parts = vec![
        ("connections", connections * CONNECTION_BYTES),
        ("socket buffers", each * (64 * 1024 + spare_buffers as u64)),
        ("conversations", each * config.cache_conversations as u64 * CONVERSATION_BYTES),
        ("users", each * config.cache_users as u64 * USER_BYTES),
        ("appends in flight", each * core_bounds::APPEND_BYTES_IN_FLIGHT_MAX as u64),
        ("passwords", worker_threads as u64 * HASH_BYTES),
    ];
    match config.store_kind {
        StoreKind::Embedded => {
            let options = store_options(config, &Arc::default());
            parts.extend(ringline_store::embedded::memory_budget(&options, cores as u16));
        }
        StoreKind::Postgres => {
            parts.extend(ringline_store::postgres::memory_budget(&postgres_options(config), cores as u16));
        }
        StoreKind::Memory => {}
    }
    if config.cluster_mode == ClusterMode::Static {
        let links = config.cluster_nodes.len().saturating_sub(1) as u64;
        // What waits to go out, and what has come and is not worked off.
        parts.push(("links to nodes", each * links * (OUT_BYTES_MAX as u64 + WINDOW_BYTES)));
    }
    // What a gateway holds for its clients beside: what owners may have sent them, and what they may have said.
    let frame = config.frame_bytes_max as usize;
    let held = if config.is_gateway() { tunnel::WINDOW_BYTES + tunnel::UP_BYTES_MAX + frame } else { 0 };
    parts.push(("outboxes if nobody reads", connections * config.outbox_bytes_max.max(held) as u64));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_that_are_not_there_are_refused_by_name() {
        let all = pick_cores(&Cores::All).unwrap();
        assert!(!all.is_empty());
        assert_eq!(pick_cores(&Cores::Count(1)).unwrap(), all[..1]);
        assert_eq!(pick_cores(&Cores::List(all.clone())).unwrap(), all);
        let error = pick_cores(&Cores::List(vec![all[0], 4_000])).unwrap_err().to_string();
        assert!(error.contains("core 4000") && error.contains("--cores"), "{error}");
        assert!(pick_cores(&Cores::Count(1_024)).unwrap_err().to_string().contains("1024 cores are wanted"));
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }

    #[test]
    fn a_port_in_use_is_found_even_if_its_user_would_share_it() {
        let (address, held) = listen(SocketAddr::from(([127, 0, 0, 1], 0)), 16, 2).unwrap();
        assert_eq!(held.len(), 2);
        assert!(matches!(listen(address, 16, 1), Err(BootError::PortInUse(found)) if found == address));
        // Let go of while the next start waits for it, as the sockets of a killed server are.
        let next = std::thread::spawn(move || listen(address, 16, 1));
        std::thread::sleep(LISTEN_RETRY);
        drop(held);
        let (found, _) = next.join().unwrap().unwrap();
        assert_eq!(found, address);
    }

    #[test]
    fn too_few_files_lower_the_connections_or_refuse() {
        let hard = getrlimit(Resource::Nofile).maximum.map_or(usize::MAX, |max| max as usize);
        assert_eq!(fit_connections(100, 1).unwrap(), 100);
        if hard < 10_000_000 {
            assert_eq!(fit_connections(20_000_000, 1).unwrap(), hard - FILES_RESERVED - FILES_PER_CORE);
            assert!(matches!(fit_connections(1_000, hard), Err(BootError::Files { .. })));
        }
    }

    #[test]
    fn this_kernel_has_a_ring() {
        probe_ring().unwrap();
        check_memlock().unwrap();
    }
}
