//! What the machine says of itself, read from `/proc`, `/sys` and the process's limits. Runs on the main thread.
//!
//! Invariants: nothing is changed; nothing fails or panics: what is missing or reads strangely is `None`, "not known
//! here". Judging is [`super::checks`]' and [`super::machine`]'s part.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use ringline_store::postgres::{PostgresOptions, PostgresStore};
use rustix::process::{Resource, getrlimit};

use crate::boot::{self, RingFeatures};
use crate::config::{Config, StoreKind};

/// What is read of one file at most; the files here are some lines long.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Entries looked at in one folder at most (processes, interrupts, idle states).
const ENTRIES_MAX: usize = 65_536;
/// The largest CPU or port number in a list.
const LIST_NUMBER_MAX: usize = 65_535;

/// What the node would be started with, as far as the machine has to offer it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Cores with a shard, in rising order.
    pub cores: Vec<usize>,
    pub connections: usize,
    pub backlog: u32,
    pub listen: SocketAddr,
    pub outbox_bytes: usize,
    pub data_dir: PathBuf,
    /// The store is in a database.
    pub postgres: Option<PostgresOptions>,
}

impl Plan {
    pub fn new(config: &Config, cores: &[usize]) -> Self {
        Self {
            cores: cores.to_vec(),
            connections: config.connections_max,
            backlog: config.net_backlog,
            listen: config.net_listen,
            outbox_bytes: config.outbox_bytes_max,
            data_dir: config.data_dir.clone(),
            postgres: (config.store_kind == StoreKind::Postgres).then(|| boot::postgres_options(config)),
        }
    }
}

/// A limit of CPU time by the control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuQuota {
    Unlimited,
    /// `quota_us` of CPU time in every `period_us`.
    Limited {
        quota_us: u64,
        period_us: u64,
    },
}

/// Whether the address can be listened on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listening {
    Free,
    InUse,
    Refused(String),
}

/// Where the data directory lies, or would: the nearest folder above it that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    pub place: PathBuf,
    /// As in `/proc/self/mounts`: `ext4`, `tmpfs`.
    pub kind: Option<String>,
    pub free_bytes: Option<u64>,
    pub is_writable: bool,
}

/// A network card that is up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nic {
    pub name: String,
    pub receive_queues: usize,
    /// Interrupts and the CPUs that serve them.
    pub interrupts: Vec<(u32, Vec<usize>)>,
    /// Receive packet steering is on for at least one queue.
    pub steers_packets: bool,
    pub numa_node: Option<usize>,
}

/// The readings. `None`, or an empty list: not known here, or not read (see [`Readings::cheap`]).
#[derive(Clone, Debug)]
pub struct Readings {
    pub plan: Plan,
    /// Major and minor number.
    pub kernel: Option<(u32, u32)>,
    pub ring: Option<Result<RingFeatures, String>>,
    pub ring_disabled: Option<u64>,
    /// The hard limit; `u64::MAX` is none.
    pub memlock_bytes: Option<u64>,
    /// The hard limit; `u64::MAX` is none.
    pub files: Option<u64>,
    pub somaxconn: Option<u64>,
    /// Low, pressure, high.
    pub tcp_mem_pages: Option<[u64; 3]>,
    pub page_bytes: u64,
    /// Least, default, most.
    pub tcp_rmem_bytes: Option<[u64; 3]>,
    pub tcp_wmem_bytes: Option<[u64; 3]>,
    pub port_range: Option<(u64, u64)>,
    pub ports_reserved: Vec<usize>,
    /// Entries now, entries at most. `None`: the module is not there.
    pub conntrack: Option<(u64, u64)>,
    pub clocksource: Option<String>,
    pub cpu_quota: Option<CpuQuota>,
    /// `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// By core of the plan.
    pub governors: Vec<(usize, String)>,
    pub cpus_online: Vec<usize>,
    /// The deepest enabled idle state of the plan's cores: exit latency in µs, name.
    pub idle_state: Option<(u64, String)>,
    pub irqbalance_runs: Option<bool>,
    pub nics: Vec<Nic>,
    pub steering_flows: Option<u64>,
    /// Hardware threads that share a core, by physical core of the plan.
    pub siblings: Vec<Vec<usize>>,
    /// CPUs that share a last-level cache, by domain of the plan.
    pub l3_domains: Vec<Vec<usize>>,
    /// CPUs of each NUMA node.
    pub numa_nodes: Vec<(usize, Vec<usize>)>,
    pub isolated: Option<Vec<usize>>,
    pub nohz_full: Option<Vec<usize>>,
    pub filesystem: Option<Filesystem>,
    pub listening: Option<Listening>,
    /// Place and version of the database, or why it would not do. `None`: none is used.
    pub database: Option<Result<(String, String), String>>,
}

impl Readings {
    /// Nothing is known yet.
    pub fn unknown(plan: Plan) -> Self {
        Self {
            plan,
            kernel: None,
            ring: None,
            ring_disabled: None,
            memlock_bytes: None,
            files: None,
            somaxconn: None,
            tcp_mem_pages: None,
            page_bytes: 4_096,
            tcp_rmem_bytes: None,
            tcp_wmem_bytes: None,
            port_range: None,
            ports_reserved: Vec::new(),
            conntrack: None,
            clocksource: None,
            cpu_quota: None,
            huge_pages: None,
            governors: Vec::new(),
            cpus_online: Vec::new(),
            idle_state: None,
            irqbalance_runs: None,
            nics: Vec::new(),
            steering_flows: None,
            siblings: Vec::new(),
            l3_domains: Vec::new(),
            numa_nodes: Vec::new(),
            isolated: None,
            nohz_full: None,
            filesystem: None,
            listening: None,
            database: None,
        }
    }

    /// What a start can afford: some small files, no folder is walked.
    pub fn cheap(plan: Plan, ring: Result<RingFeatures, String>) -> Self {
        let mut readings = Self::unknown(plan);
        readings.ring = Some(ring);
        readings.read_limits();
        readings.read_cheap(&Tree::new("/"));
        readings
    }

    /// Everything. Takes some milliseconds, more where there are many processes.
    pub fn all(plan: Plan) -> Self {
        let mut readings = Self::cheap(plan, boot::probe_ring().map_err(|error| error.to_string()));
        readings.read_rest(&Tree::new("/"));
        readings.filesystem = Some(filesystem(&readings.plan.data_dir));
        readings.listening = Some(match TcpListener::bind(readings.plan.listen) {
            Ok(_) => Listening::Free,
            Err(error) if error.kind() == ErrorKind::AddrInUse => Listening::InUse,
            Err(error) => Listening::Refused(error.to_string()),
        });
        let probe = |options| PostgresStore::probe(options).map_err(|error| error.to_string());
        readings.database = readings.plan.postgres.as_ref().map(probe);
        readings
    }

    fn read_limits(&mut self) {
        self.kernel = version(&rustix::system::uname().release().to_string_lossy());
        self.memlock_bytes = Some(getrlimit(Resource::Memlock).maximum.unwrap_or(u64::MAX));
        self.files = Some(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX));
    }

    fn read_cheap(&mut self, tree: &Tree) {
        self.page_bytes = page_bytes(tree).unwrap_or(self.page_bytes);
        self.ring_disabled = tree.number("proc/sys/kernel/io_uring_disabled");
        self.somaxconn = tree.number("proc/sys/net/core/somaxconn");
        self.tcp_mem_pages = tree.triple("proc/sys/net/ipv4/tcp_mem");
        self.tcp_rmem_bytes = tree.triple("proc/sys/net/ipv4/tcp_rmem");
        self.tcp_wmem_bytes = tree.triple("proc/sys/net/ipv4/tcp_wmem");
        self.conntrack = tree
            .number("proc/sys/net/netfilter/nf_conntrack_count")
            .zip(tree.number("proc/sys/net/netfilter/nf_conntrack_max"));
        self.clocksource = tree.text("sys/devices/system/clocksource/clocksource0/current_clocksource");
        self.huge_pages = tree.text("sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| chosen(&text));
        self.cpu_quota = cpu_quota(tree);
        self.cpus_online = tree.list("sys/devices/system/cpu/online").unwrap_or_default();
        let governor = |&core: &usize| Some((core, tree.text(&cpu(core, "cpufreq/scaling_governor"))?));
        self.governors = self.plan.cores.iter().filter_map(governor).collect();
    }

    fn read_rest(&mut self, tree: &Tree) {
        let cores = &self.plan.cores;
        self.port_range = tree.text("proc/sys/net/ipv4/ip_local_port_range").and_then(|text| {
            let mut numbers = text.split_whitespace().map(str::parse);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
        self.ports_reserved = tree.list("proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
        self.idle_state = cores.iter().filter_map(|&core| deepest_idle_state(tree, core)).max();
        self.irqbalance_runs = irqbalance_runs(tree);
        self.nics = nics(tree);
        self.steering_flows = tree.number("proc/sys/net/core/rps_sock_flow_entries");
        self.siblings = groups(cores, |core| tree.list(&cpu(core, "topology/thread_siblings_list")));
        self.l3_domains = groups(cores, |core| tree.list(&cpu(core, "cache/index3/shared_cpu_list")));
        let nodes = tree.list("sys/devices/system/node/online").unwrap_or_default();
        let cpus = |node| Some((node, tree.list(&format!("sys/devices/system/node/node{node}/cpulist"))?));
        self.numa_nodes = nodes.into_iter().filter_map(cpus).collect();
        self.isolated = tree.list("sys/devices/system/cpu/isolated");
        self.nohz_full = tree.list("sys/devices/system/cpu/nohz_full");
    }
}

/// Where `/proc` and `/sys` are looked for; tests make their own.
struct Tree {
    root: PathBuf,
}

impl Tree {
    fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn text(&self, path: &str) -> Option<String> {
        let mut text = String::new();
        let file = std::fs::File::open(self.root.join(path)).ok()?;
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    fn triple(&self, path: &str) -> Option<[u64; 3]> {
        let text = self.text(path)?;
        let numbers: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
        numbers.try_into().ok()
    }

    fn list(&self, path: &str) -> Option<Vec<usize>> {
        number_list(&self.text(path)?)
    }

    /// Names in a folder, sorted; none if it is not there.
    fn names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.root.join(path)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.take(ENTRIES_MAX).filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

fn cpu(core: usize, file: &str) -> String {
    format!("sys/devices/system/cpu/cpu{core}/{file}")
}

/// `0-3,8` → `[0, 1, 2, 3, 8]`; an empty text is an empty list. `None`: no such list, or a number over
/// [`LIST_NUMBER_MAX`].
fn number_list(text: &str) -> Option<Vec<usize>> {
    let mut list = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last > LIST_NUMBER_MAX {
            return None;
        }
        list.extend(first..=last);
    }
    list.sort_unstable();
    list.dedup();
    Some(list)
}

/// `6.18.44-name` → (6, 18).
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

/// `always [madvise] never` → `madvise`.
fn chosen(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// From the first mapping of this process, `KernelPageSize:  4 kB`.
fn page_bytes(tree: &Tree) -> Option<u64> {
    let mappings = tree.text("proc/self/smaps")?;
    let size = mappings.lines().find_map(|line| line.strip_prefix("KernelPageSize:"))?;
    size.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1_024)
}

/// The tightest limit on the way from the root to this process's group (version 2).
fn cpu_quota(tree: &Tree) -> Option<CpuQuota> {
    let groups = tree.text("proc/self/cgroup")?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned();
    // In a container the group is the root of what can be seen, and its path may lead out of it.
    let seen = Path::new(&path).ancestors().map(|group| format!("sys/fs/cgroup/{}/cpu.max", group.display()));
    let limits = seen.take(ENTRIES_MAX).filter_map(|file| tree.text(&file)).filter_map(|text| {
        let (quota, period) = text.split_once(' ')?;
        Some((quota.parse().ok()?, period.trim().parse().ok().filter(|&period| period > 0)?))
    });
    let tightest = limits.min_by_key(|&(quota_us, period_us): &(u64, u64)| quota_us.saturating_mul(1_000) / period_us);
    Some(tightest.map_or(CpuQuota::Unlimited, |(quota_us, period_us)| CpuQuota::Limited { quota_us, period_us }))
}

fn deepest_idle_state(tree: &Tree, core: usize) -> Option<(u64, String)> {
    let folder = cpu(core, "cpuidle");
    let enabled = tree.names(&folder).into_iter().filter_map(|state| {
        let read = |file: &str| tree.text(&format!("{folder}/{state}/{file}"));
        let disabled = read("disable").is_some_and(|text| text != "0");
        if disabled { None } else { Some((read("latency")?.parse().ok()?, read("name")?)) }
    });
    enabled.max()
}

fn irqbalance_runs(tree: &Tree) -> Option<bool> {
    let processes: Vec<String> =
        tree.names("proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect();
    let runs = |id: &String| tree.text(&format!("proc/{id}/comm")).is_some_and(|name| name == "irqbalance");
    (!processes.is_empty()).then(|| processes.iter().any(runs))
}

/// Cards with a device behind them: no loopback, bridge or tunnel.
fn nics(tree: &Tree) -> Vec<Nic> {
    let nic = |name: String| {
        let folder = format!("sys/class/net/{name}");
        let has_device = tree.root.join(&folder).join("device").exists();
        let is_up = tree.text(&format!("{folder}/operstate")).is_some_and(|state| state == "up");
        if !has_device || !is_up {
            return None;
        }
        let queues = tree.names(&format!("{folder}/queues"));
        let receive: Vec<&String> = queues.iter().filter(|queue| queue.starts_with("rx-")).collect();
        let steers = |queue: &&String| {
            let mask = tree.text(&format!("{folder}/queues/{queue}/rps_cpus"));
            mask.is_some_and(|mask| mask.bytes().any(|digit| !matches!(digit, b'0' | b',')))
        };
        Some(Nic {
            receive_queues: receive.len(),
            steers_packets: receive.iter().any(steers),
            interrupts: interrupts(tree, &folder),
            // −1 is "none".
            numa_node: tree.text(&format!("{folder}/device/numa_node")).and_then(|node| node.parse().ok()),
            name,
        })
    };
    tree.names("sys/class/net").into_iter().filter_map(nic).collect()
}

fn interrupts(tree: &Tree, folder: &str) -> Vec<(u32, Vec<usize>)> {
    // A virtio card's interrupts belong to the PCI device above it.
    let own = tree.names(&format!("{folder}/device/msi_irqs"));
    let numbers = if own.is_empty() { tree.names(&format!("{folder}/device/../msi_irqs")) } else { own };
    let served = |name: String| {
        let number: u32 = name.parse().ok()?;
        let effective =
            tree.list(&format!("proc/irq/{number}/effective_affinity_list")).filter(|cpus| !cpus.is_empty());
        let cpus = effective.or_else(|| tree.list(&format!("proc/irq/{number}/smp_affinity_list")))?;
        Some((number, cpus))
    };
    numbers.into_iter().filter_map(served).collect()
}

/// The distinct groups that the cores belong to.
fn groups(cores: &[usize], group_of: impl Fn(usize) -> Option<Vec<usize>>) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = cores.iter().filter_map(|&core| group_of(core)).collect();
    groups.sort();
    groups.dedup();
    groups
}

/// The nearest folder from `wanted` upwards that is there.
pub fn nearest_folder(wanted: &Path) -> PathBuf {
    let absolute = std::path::absolute(wanted).unwrap_or_else(|_| wanted.to_owned());
    let there = absolute.ancestors().find(|folder| folder.is_dir()).map(Path::to_owned);
    there.unwrap_or_else(|| PathBuf::from("/"))
}

fn filesystem(data_dir: &Path) -> Filesystem {
    let folder = nearest_folder(data_dir);
    let place = folder.canonicalize().unwrap_or(folder);
    let mounts = Tree::new("/").text("proc/self/mounts").unwrap_or_default();
    let free = rustix::fs::statvfs(&place).ok().map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let is_writable = rustix::fs::access(&place, rustix::fs::Access::WRITE_OK).is_ok();
    Filesystem { kind: mounted_kind(&mounts, &place), free_bytes: free, is_writable, place }
}

/// The kind of the innermost mount that holds `place`; of two on the same point the later covers the earlier.
fn mounted_kind(mounts: &str, place: &Path) -> Option<String> {
    let holding = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?.replace("\\040", " "), words.next()?);
        place.starts_with(&point).then(|| (Path::new(&point).components().count(), kind.to_owned()))
    });
    holding.max_by_key(|(depth, _)| *depth).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(cores: &[usize]) -> Plan {
        Plan::new(&Config::default(), cores)
    }

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let tree = Tree::new(folder.path());
        (folder, tree)
    }

    #[test]
    fn lists_versions_and_choices() {
        assert_eq!(number_list("0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(number_list(""), Some(vec![]));
        for bad in ["a", "1-", "0-99999999999", "18446744073709551615"] {
            assert_eq!(number_list(bad), None, "{bad}");
        }
        assert_eq!(version("6.18.44-x"), Some((6, 18)));
        assert_eq!(version("five"), None);
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("always"), None);
    }

    #[test]
    fn an_empty_machine_is_not_known_and_no_failure() {
        let (_folder, tree) = tree(&[]);
        let mut readings = Readings::unknown(plan(&[0, 1]));
        readings.read_cheap(&tree);
        readings.read_rest(&tree);
        assert_eq!(readings.somaxconn, None);
        assert_eq!(readings.cpu_quota, None);
        assert_eq!(readings.irqbalance_runs, None);
        assert!(readings.nics.is_empty() && readings.siblings.is_empty());
    }

    #[test]
    fn a_machine_made_of_files_is_read() {
        let (_folder, tree) = tree(&[
            ("proc/sys/net/ipv4/tcp_mem", "1\t2\t3\n"),
            ("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n"),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/cpu.max", "50000 100000\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("proc/17/comm", "irqbalance\n"),
            ("sys/devices/system/cpu/cpu1/cpuidle/state0/latency", "2\n"),
            ("sys/devices/system/cpu/cpu1/cpuidle/state0/name", "C1\n"),
            ("sys/devices/system/cpu/cpu1/cpuidle/state1/latency", "170\n"),
            ("sys/devices/system/cpu/cpu1/cpuidle/state1/name", "C6\n"),
            ("sys/devices/system/cpu/cpu1/cpuidle/state1/disable", "1\n"),
            ("sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "0-1\n"),
            ("sys/devices/system/cpu/cpu1/topology/thread_siblings_list", "0-1\n"),
            ("sys/devices/system/node/online", "0\n"),
            ("sys/devices/system/node/node0/cpulist", "0-1\n"),
            ("sys/class/net/lo/operstate", "unknown\n"),
            ("sys/class/net/eth0/operstate", "up\n"),
            ("sys/class/net/eth0/device/msi_irqs/40", "msix\n"),
            ("sys/class/net/eth0/device/numa_node", "-1\n"),
            ("sys/class/net/eth0/queues/rx-0/rps_cpus", "00000000,00000003\n"),
            ("proc/irq/40/effective_affinity_list", "1\n"),
        ]);
        let mut readings = Readings::unknown(plan(&[0, 1]));
        readings.read_cheap(&tree);
        readings.read_rest(&tree);
        assert_eq!(readings.tcp_mem_pages, Some([1, 2, 3]));
        assert_eq!(readings.port_range, Some((32_768, 60_999)));
        assert_eq!(readings.cpu_quota, Some(CpuQuota::Limited { quota_us: 50_000, period_us: 100_000 }));
        assert_eq!(readings.irqbalance_runs, Some(true));
        assert_eq!(readings.idle_state, Some((2, "C1".to_owned())));
        assert_eq!(readings.siblings, [[0, 1]]);
        assert_eq!(readings.numa_nodes, [(0, vec![0, 1])]);
        let interrupts = vec![(40, vec![1])];
        let nic = Nic { name: "eth0".into(), receive_queues: 1, interrupts, steers_packets: true, numa_node: None };
        assert_eq!(readings.nics, [nic]);
    }

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/b /tmp/my\\040data xfs rw 0 0\n";
        assert_eq!(mounted_kind(mounts, Path::new("/tmp/x")).as_deref(), Some("tmpfs"));
        assert_eq!(mounted_kind(mounts, Path::new("/tmp/my data/x")).as_deref(), Some("xfs"));
        assert_eq!(mounted_kind(mounts, Path::new("/tmpfoo")).as_deref(), Some("ext4"));
        assert_eq!(nearest_folder(Path::new("/proc/no/such/folder")), Path::new("/proc"));
    }
}
