//! The one table of checks, and what is judged of the kernel, its limits and its network. The processor's part is in
//! [`super::machine`]. Pure: readings in, judgements out; runs on the main thread.
//!
//! Invariant: a `Fail` is what keeps the node from starting or from keeping what it promises; a `Warn` costs speed or
//! refuses clients under load; a `Note` is worth knowing.

use serde::Serialize;

use super::machine;
use super::readings::{Listening, Readings};
use crate::boot;

/// Kernel memory of one connection that is counted on: a page each way.
const TCP_PAGES_PER_CONNECTION: u64 = 2;
/// A default receive buffer above this is held against memory by every busy connection.
const RECEIVE_DEFAULT_BYTES_MAX: u64 = 1_048_576;
/// Connections that one machine opens to one address; a load test from here wants more.
const OUTGOING_PORTS_MIN: u64 = 50_000;
/// A data directory with less room is nearly full.
const FREE_BYTES_MIN: u64 = 4 << 30;
/// Entries of the connection tracker for one connection, with what lingers after its end.
const TRACKED_PER_CONNECTION: u64 = 2;

/// How a check came out, in rising weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Note,
    Warn,
    Fail,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// What was found, and the command that mends it (empty: there is nothing to mend, or no command does).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    pub finding: String,
    pub mend: String,
}

pub(super) fn ok(finding: impl Into<String>) -> Judgement {
    Judgement { verdict: Verdict::Ok, finding: finding.into(), mend: String::new() }
}

pub(super) fn bad(verdict: Verdict, finding: impl Into<String>, mend: impl Into<String>) -> Judgement {
    Judgement { verdict, finding: finding.into(), mend: mend.into() }
}

pub(super) fn unknown() -> Judgement {
    bad(Verdict::Note, "not known here", "")
}

/// One line of the table.
pub struct Check {
    pub name: &'static str,
    /// What it reads.
    pub reads: &'static str,
    /// Why it matters.
    pub why: &'static str,
    /// Part of the cheap look that `serve` takes.
    pub at_start: bool,
    pub judge: fn(&Readings) -> Judgement,
}

macro_rules! checks {
    ($($name:literal, $reads:literal, $at_start:literal, $judge:path, $why:literal;)*) => {
        /// Every check, in the order of the report.
        pub const CHECKS: &[Check] =
            &[$(Check { name: $name, reads: $reads, why: $why, at_start: $at_start, judge: $judge },)*];
    };
}

// `files` is not looked at by `serve`: it has a line of its own there, with the number of connections that are left.
checks! {
    "kernel", "uname", true, kernel,
        "The own ring for sockets needs 6.1; before it epoll serves them, at about half the messages a core.";
    "ring_features", "io_uring_setup, probe", true, ring_features,
        "Without a ring nothing starts; without its newer flags sockets are served by epoll.";
    "io_uring_disabled", "kernel.io_uring_disabled", true, ring_disabled,
        "Distributions and containers switch io_uring off.";
    "memlock", "RLIMIT_MEMLOCK", true, memlock,
        "Rings and their buffers are locked memory.";
    "files", "RLIMIT_NOFILE", false, files,
        "Every connection is an open file; the server raises the soft limit itself, as far as the hard one.";
    "somaxconn", "net.core.somaxconn", true, somaxconn,
        "It caps net.backlog; what comes over it in a storm of reconnects is dropped and tried again seconds later.";
    "tcp_mem", "net.ipv4.tcp_mem", true, tcp_mem,
        "Over the pressure mark the kernel shrinks every window, over the high mark it drops.";
    "tcp_buffers", "net.ipv4.tcp_rmem, tcp_wmem", true, tcp_buffers,
        "A send buffer smaller than an outbox makes a burst to one client wait for its reader, round trip by round trip.";
    "port_range", "net.ipv4.ip_local_port_range", false, port_range,
        "An outgoing connection may hold the server's port when it wants to start; load tests from here need many.";
    "listen", "bind of net.listen", false, listening,
        "The address must exist here and be free.";
    "conntrack", "nf_conntrack_count, nf_conntrack_max", true, conntrack,
        "When the table of tracked connections is full the firewall drops new ones without a word to either side.";
    "data_dir", "statvfs, mounts", false, data_dir,
        "Accepted means on disk: the folder must be writable, have room, and lie on a disk.";
    "postgres", "postgres.url", false, postgres,
        "Accepted means committed there: the database must be reachable, of version 15 or newer, and durable.";
    "cpu_quota", "cpu.max of the control group", true, machine::cpu_quota,
        "A quota stops all cores at once when it is used up, for tens of milliseconds.";
    "clocksource", "current_clocksource", true, machine::clocksource,
        "Any clock but the processor's own costs a system call or a device access at every look.";
    "governor", "cpufreq/scaling_governor", true, machine::governor,
        "A governor that saves power lets a core that wakes begin slowly.";
    "c_states", "cpuidle", false, machine::idle_states,
        "A core in a deep idle state needs its exit latency before it handles the first message.";
    "thp", "transparent_hugepage/enabled", true, machine::huge_pages,
        "Huge pages for all memory let it grow, and compaction stalls a thread that touches a new page.";
    "irqbalance", "processes", false, machine::irqbalance,
        "It moves interrupts by its own measure, also onto cores with a shard.";
    "nic_queues", "/sys/class/net", false, machine::nic_queues,
        "One receive queue is served by one core; with a queue a core the work spreads.";
    "irq_affinity", "/proc/irq", false, machine::interrupt_affinity,
        "Interrupts take their time from the shard on the same core.";
    "rps_rfs", "rps_cpus, rps_sock_flow_entries", false, machine::packet_steering,
        "With fewer queues than cores, steering in software spreads the receive work.";
    "smt", "thread_siblings_list", false, machine::siblings,
        "Two shards on the two threads of one core share its units: more in all, less and less evenly each.";
    "l3", "cache/index3/shared_cpu_list", false, machine::l3_domains,
        "A batch between cores of one last-level cache stays in it; between two it crosses the fabric.";
    "numa", "node/*/cpulist, device/numa_node", false, machine::numa_nodes,
        "Memory and cards of another node are further away.";
    "isolcpus", "cpu/isolated", false, machine::isolated,
        "The scheduler puts nothing else on an isolated core.";
    "nohz_full", "cpu/nohz_full", false, machine::nohz_full,
        "A core with one thread needs no tick; it is a small, steady disturbance.";
}

fn kernel(readings: &Readings) -> Judgement {
    let Some((major, minor)) = readings.kernel else { return unknown() };
    match (major, minor) {
        version if version < (5, 8) => bad(
            Verdict::Fail,
            format!("{major}.{minor}, older than 5.8"),
            "install a kernel of 6.1 or newer from the distribution",
        ),
        version if version < (6, 1) => bad(
            Verdict::Warn,
            format!("{major}.{minor}, older than 6.1: sockets are served by epoll"),
            "install a kernel of 6.1 or newer from the distribution",
        ),
        _ => ok(format!("{major}.{minor}")),
    }
}

fn ring_features(readings: &Readings) -> Judgement {
    match &readings.ring {
        None => unknown(),
        Some(Err(reason)) => {
            let switched_off = readings.ring_disabled.is_some_and(|value| value > 0);
            let sandbox = "dmesg | tail, and the seccomp profile of the container";
            bad(Verdict::Fail, reason, if switched_off { "sysctl -w kernel.io_uring_disabled=0" } else { sandbox })
        }
        Some(Ok(features)) if !(features.single_issuer && features.defer_taskrun && features.buffer_rings) => bad(
            Verdict::Warn,
            format!("{features}; the own ring lacks what it needs"),
            "install a kernel of 6.1 or newer from the distribution",
        ),
        Some(Ok(features)) => ok(features.to_string()),
    }
}

fn ring_disabled(readings: &Readings) -> Judgement {
    const MEND: &str = "sysctl -w kernel.io_uring_disabled=0";
    let works = matches!(readings.ring, Some(Ok(_)));
    match readings.ring_disabled {
        // Kernels before 6.6 have no such switch.
        None if works => ok("no such switch here"),
        None => unknown(),
        Some(0) => ok("0: allowed to everybody"),
        Some(value) if works => bad(Verdict::Note, format!("{value}: allowed to this user, not to everybody"), MEND),
        Some(value) => bad(Verdict::Fail, format!("{value}: refused to this user"), MEND),
    }
}

fn memlock(readings: &Readings) -> Judgement {
    const MEND: &str = "ulimit -Hl unlimited (as root), or LimitMEMLOCK=infinity in the unit";
    let Some(have) = readings.memlock_bytes else { return unknown() };
    let least = boot::MEMLOCK_BYTES_MIN;
    let comfortable = least + 3 * boot::RING_IO_BYTES as u64 * readings.plan.cores.len() as u64;
    let found = limit(have.div_ceil(1_024), "KiB");
    if have < least {
        bad(Verdict::Fail, format!("{found}, at least {} KiB are needed", least / 1_024), MEND)
    } else if have < comfortable {
        let want = comfortable.div_ceil(1_024);
        bad(Verdict::Warn, format!("{found}, {want} KiB would serve {} cores", readings.plan.cores.len()), MEND)
    } else {
        ok(found)
    }
}

fn files(readings: &Readings) -> Judgement {
    let Some(have) = readings.files else { return unknown() };
    let reserved = boot::files_reserved(readings.plan.cores.len()) as u64;
    let want = reserved + readings.plan.connections as u64;
    let least = reserved + boot::CONNECTIONS_MIN as u64;
    let mend = format!("ulimit -Hn {want} (as root), or LimitNOFILE={want} in the unit");
    let found = format!("hard limit {}", limit(have, "files"));
    if have < least {
        bad(Verdict::Fail, format!("{found}, at least {least} are needed"), mend)
    } else if have < want {
        let fit = have.saturating_sub(reserved);
        let wanted = readings.plan.connections;
        bad(Verdict::Warn, format!("{found}: room for {fit} connections of the {wanted} configured"), mend)
    } else {
        ok(found)
    }
}

fn limit(value: u64, unit: &str) -> String {
    // "Unlimited" is the largest number, or near it after a division.
    if value >= u64::MAX / 1_024 { "unlimited".to_owned() } else { format!("{value} {unit}") }
}

fn somaxconn(readings: &Readings) -> Judgement {
    let Some(have) = readings.somaxconn else { return unknown() };
    let want = u64::from(readings.plan.backlog);
    if have < want {
        let found = format!("{have}, less than net.backlog = {want}");
        return bad(Verdict::Warn, found, format!("sysctl -w net.core.somaxconn={want}"));
    }
    ok(have.to_string())
}

fn tcp_mem(readings: &Readings) -> Judgement {
    let Some([_, pressure, high]) = readings.tcp_mem_pages else { return unknown() };
    let want = readings.plan.connections as u64 * TCP_PAGES_PER_CONNECTION;
    let mib = |pages: u64| pages.saturating_mul(readings.page_bytes) >> 20;
    let found = format!("pressure at {} MiB, at most {} MiB", mib(pressure), mib(high));
    let mend = format!("sysctl -w net.ipv4.tcp_mem='{want} {} {}'", want * 3 / 2, want * 2);
    let connections = readings.plan.connections;
    if high < want {
        bad(Verdict::Warn, format!("{found}; {connections} connections may want {} MiB", mib(want)), mend)
    } else if pressure < want {
        bad(Verdict::Note, format!("{found}; {connections} connections may reach {} MiB", mib(want)), mend)
    } else {
        ok(found)
    }
}

fn tcp_buffers(readings: &Readings) -> Judgement {
    let (Some([_, receive, _]), Some([_, _, send])) = (readings.tcp_rmem_bytes, readings.tcp_wmem_bytes) else {
        return unknown();
    };
    let found = format!("receive {} KiB at first, send {} KiB at most", receive >> 10, send >> 10);
    let outbox = readings.plan.outbox_bytes as u64;
    if send < outbox {
        let mend = format!("sysctl -w net.ipv4.tcp_wmem='4096 16384 {}'", outbox.max(4 << 20));
        bad(Verdict::Warn, format!("{found}; less than an outbox of {} KiB", outbox >> 10), mend)
    } else if receive > RECEIVE_DEFAULT_BYTES_MAX {
        let mend = "sysctl -w net.ipv4.tcp_rmem='4096 131072 6291456'";
        bad(Verdict::Note, format!("{found}; many connections may take much memory"), mend)
    } else {
        ok(found)
    }
}

fn port_range(readings: &Readings) -> Judgement {
    let Some((low, high)) = readings.port_range else { return unknown() };
    let port = readings.plan.listen.port();
    let ports = high.saturating_sub(low) + 1;
    let found = format!("{low} to {high}");
    if port != 0 && (low..=high).contains(&u64::from(port)) && !readings.ports_reserved.contains(&usize::from(port)) {
        let mend = format!("sysctl -w net.ipv4.ip_local_reserved_ports={port}");
        return bad(Verdict::Warn, format!("{found}: the server's port {port} is inside and not reserved"), mend);
    }
    if ports < OUTGOING_PORTS_MIN {
        let mend = "sysctl -w net.ipv4.ip_local_port_range='10240 65535'";
        return bad(Verdict::Note, format!("{found}: {ports} connections from here to one address"), mend);
    }
    ok(found)
}

fn listening(readings: &Readings) -> Judgement {
    let address = readings.plan.listen;
    match &readings.listening {
        None => unknown(),
        Some(Listening::Free) => ok(format!("{address} is free")),
        Some(Listening::InUse) => {
            bad(Verdict::Note, format!("{address} is in use: by a running server?"), "ss -ltnp tells by whom")
        }
        Some(Listening::Refused(reason)) => bad(
            Verdict::Fail,
            format!("{address}: {reason}"),
            "choose another --listen; ip address lists what is there",
        ),
    }
}

fn conntrack(readings: &Readings) -> Judgement {
    let Some((now, most)) = readings.conntrack else { return ok("no connection tracking") };
    let want = (readings.plan.connections as u64).saturating_mul(TRACKED_PER_CONNECTION);
    let found = format!("{now} of {most} entries");
    let mend = format!("sysctl -w net.netfilter.nf_conntrack_max={}", want.max(most));
    if most >= want {
        ok(found)
    } else if now == 0 {
        bad(Verdict::Note, format!("{found}: nothing is tracked yet, {want} would be wanted"), mend)
    } else {
        let connections = readings.plan.connections;
        bad(Verdict::Warn, format!("{found}: {connections} connections want {want}"), mend)
    }
}

fn data_dir(readings: &Readings) -> Judgement {
    let Some(filesystem) = &readings.filesystem else { return unknown() };
    let place = filesystem.place.display();
    let kind = filesystem.kind.as_deref().unwrap_or("filesystem not known");
    let room = filesystem.free_bytes.map_or("room not known".to_owned(), |free| format!("{} MiB free", free >> 20));
    let found = format!("{place}: {kind}, {room}");
    if !filesystem.is_writable {
        bad(
            Verdict::Fail,
            format!("{found}, not writable"),
            format!("chown \"$(id -u)\" {place}, or another --data-dir"),
        )
    } else if matches!(kind, "tmpfs" | "ramfs") {
        bad(Verdict::Warn, format!("{found}: memory, gone at a restart"), "--data-dir on a local disk")
    } else if kind.starts_with("nfs") || matches!(kind, "cifs" | "smb3" | "9p" | "ceph") {
        bad(Verdict::Warn, format!("{found}: over the network"), "--data-dir on a local disk")
    } else if filesystem.free_bytes.is_some_and(|free| free < FREE_BYTES_MIN) {
        bad(Verdict::Warn, format!("{found}: nearly full"), format!("du -xh {place} | sort -h | tail"))
    } else {
        ok(found)
    }
}

fn postgres(readings: &Readings) -> Judgement {
    match &readings.database {
        None => ok("not used"),
        Some(Ok((place, version))) => ok(format!("PostgreSQL {version} at {place}")),
        Some(Err(reason)) => bad(Verdict::Fail, reason, "pg_isready, and postgres.url in the configuration"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::SocketAddr;

    use super::super::readings::{Filesystem, Plan};
    use super::*;
    use crate::boot::RingFeatures;
    use crate::config::Config;

    pub fn on(cores: &[usize]) -> Readings {
        Readings::unknown(Plan::new(&Config::default(), cores))
    }

    /// The verdict of `judge` after `change`, whose finding is never empty.
    pub fn verdict(judge: fn(&Readings) -> Judgement, change: impl FnOnce(&mut Readings)) -> Verdict {
        let mut readings = on(&[0, 1]);
        change(&mut readings);
        let judgement = judge(&readings);
        assert!(!judgement.finding.is_empty());
        if judgement.verdict >= Verdict::Warn {
            assert!(!judgement.mend.is_empty(), "{}", judgement.finding);
        }
        judgement.verdict
    }

    #[test]
    fn what_is_not_known_is_said_and_weighs_nothing() {
        for check in CHECKS {
            let judgement = (check.judge)(&on(&[0, 1]));
            assert!(judgement.verdict <= Verdict::Note, "{}", check.name);
            assert!(!check.why.is_empty() && check.why.ends_with('.') && !check.reads.is_empty(), "{}", check.name);
        }
    }

    #[test]
    fn names_are_told_apart() {
        let mut names: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CHECKS.len());
    }

    #[test]
    fn kernels_and_rings() {
        assert_eq!(verdict(kernel, |r| r.kernel = Some((5, 4))), Verdict::Fail);
        assert_eq!(verdict(kernel, |r| r.kernel = Some((5, 15))), Verdict::Warn);
        assert_eq!(verdict(kernel, |r| r.kernel = Some((6, 1))), Verdict::Ok);
        let all = RingFeatures { single_issuer: true, defer_taskrun: true, buffer_rings: true, ..Default::default() };
        assert_eq!(verdict(ring_features, |r| r.ring = Some(Ok(all))), Verdict::Ok);
        assert_eq!(verdict(ring_features, |r| r.ring = Some(Ok(RingFeatures::default()))), Verdict::Warn);
        assert_eq!(verdict(ring_features, |r| r.ring = Some(Err("no".into()))), Verdict::Fail);
        let disabled = |value, ring: Result<RingFeatures, String>| {
            verdict(ring_disabled, |r| (r.ring_disabled, r.ring) = (value, Some(ring)))
        };
        assert_eq!(disabled(None, Ok(all)), Verdict::Ok);
        assert_eq!(disabled(Some(0), Ok(all)), Verdict::Ok);
        assert_eq!(disabled(Some(1), Ok(all)), Verdict::Note);
        assert_eq!(disabled(Some(2), Err("no".into())), Verdict::Fail);
    }

    #[test]
    fn limits() {
        assert_eq!(verdict(memlock, |r| r.memlock_bytes = Some(65_536)), Verdict::Fail);
        assert_eq!(verdict(memlock, |r| r.memlock_bytes = Some(600 * 1_024)), Verdict::Warn);
        assert_eq!(verdict(memlock, |r| r.memlock_bytes = Some(u64::MAX)), Verdict::Ok);
        assert_eq!(verdict(files, |r| r.files = Some(100)), Verdict::Fail);
        assert_eq!(verdict(files, |r| r.files = Some(20_000)), Verdict::Warn);
        assert_eq!(verdict(files, |r| r.files = Some(200_000)), Verdict::Ok);
        assert_eq!(limit(u64::MAX, "files"), "unlimited");
    }

    #[test]
    fn network_memory_and_ports() {
        assert_eq!(verdict(somaxconn, |r| r.somaxconn = Some(128)), Verdict::Warn);
        assert_eq!(verdict(somaxconn, |r| r.somaxconn = Some(4_096)), Verdict::Ok);
        assert_eq!(verdict(tcp_mem, |r| r.tcp_mem_pages = Some([1, 2, 3])), Verdict::Warn);
        assert_eq!(verdict(tcp_mem, |r| r.tcp_mem_pages = Some([1, 2, 1 << 30])), Verdict::Note);
        assert_eq!(verdict(tcp_mem, |r| r.tcp_mem_pages = Some([1 << 30; 3])), Verdict::Ok);
        let buffers = |receive, send| {
            let set = |r: &mut Readings| {
                (r.tcp_rmem_bytes, r.tcp_wmem_bytes) = (Some([1, receive, 1]), Some([1, 1, send]));
            };
            verdict(tcp_buffers, set)
        };
        assert_eq!(buffers(131_072, 4 << 20), Verdict::Ok);
        assert_eq!(buffers(4 << 20, 4 << 20), Verdict::Note);
        assert_eq!(buffers(131_072, 4_096), Verdict::Warn);
        let ports = |range, reserved: &[usize]| {
            verdict(port_range, |r| (r.port_range, r.ports_reserved) = (Some(range), reserved.to_vec()))
        };
        assert_eq!(ports((1_024, 65_535), &[]), Verdict::Warn);
        assert_eq!(ports((1_024, 65_535), &[9_700]), Verdict::Ok);
        assert_eq!(ports((32_768, 60_999), &[]), Verdict::Note);
        assert_eq!(verdict(listening, |r| r.listening = Some(Listening::Free)), Verdict::Ok);
        assert_eq!(verdict(listening, |r| r.listening = Some(Listening::InUse)), Verdict::Note);
        assert_eq!(verdict(listening, |r| r.listening = Some(Listening::Refused("no".into()))), Verdict::Fail);
        assert_eq!(verdict(conntrack, |r| r.conntrack = Some((5, 262_144))), Verdict::Ok);
        assert_eq!(verdict(conntrack, |r| r.conntrack = Some((0, 65_536))), Verdict::Note);
        assert_eq!(verdict(conntrack, |r| r.conntrack = Some((5, 65_536))), Verdict::Warn);
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        assert_eq!(verdict(port_range, |r| (r.port_range, r.plan.listen) = (Some((0, 65_535)), any)), Verdict::Ok);
    }

    #[test]
    fn data_directories() {
        let place = |kind: &str, free_bytes, is_writable| {
            let kind = Some(kind.to_owned());
            let found = Filesystem { place: "/data".into(), kind, free_bytes: Some(free_bytes), is_writable };
            verdict(data_dir, |r| r.filesystem = Some(found))
        };
        assert_eq!(place("ext4", 1 << 40, true), Verdict::Ok);
        assert_eq!(place("ext4", 1 << 20, true), Verdict::Warn);
        assert_eq!(place("tmpfs", 1 << 40, true), Verdict::Warn);
        assert_eq!(place("nfs4", 1 << 40, true), Verdict::Warn);
        assert_eq!(place("xfs", 1 << 40, false), Verdict::Fail);
    }
}
