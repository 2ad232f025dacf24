//! The server as a process: found by its listening port, its CPU time and memory read from `/proc`, and the kernel's.
//!
//! Used by the main thread only, at the ends of the measured window. Linux only, as the server is.

use std::collections::HashSet;
use std::fs;

use serde::Serialize;

/// State "listen" in `/proc/net/tcp`.
const LISTEN: &str = "0A";
const BYTES_PER_KIB: u64 = 1024;

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// User and system time of all threads, in seconds; steps of 10 ms.
    pub cpu_s: f64,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
    /// Its anonymous part (RssAnon): heap, stacks, no mapped files.
    pub rss_anon_bytes: u64,
}

impl Sample {
    /// What two processes have used.
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpu_s: self.cpu_s + other.cpu_s,
            rss_bytes: self.rss_bytes + other.rss_bytes,
            rss_anon_bytes: self.rss_anon_bytes + other.rss_anon_bytes,
        }
    }
}

/// What the kernel of this machine holds, in bytes; all processes together. `None`: it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KernelMemory {
    /// Buffers of TCP sockets: whole pages that hold bytes under way.
    pub tcp_bytes: Option<u64>,
    /// Socket structures, epoll entries and the like.
    pub slab_unreclaimable_bytes: Option<u64>,
    /// Inodes and directory entries, those of sockets too.
    pub slab_reclaimable_bytes: Option<u64>,
}

impl KernelMemory {
    pub fn now() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (sockets, memory) = (read("/proc/net/sockstat"), read("/proc/meminfo"));
        Self {
            tcp_bytes: tcp_pages(&sockets).and_then(|pages| pages.checked_mul(rustix::param::page_size() as u64)),
            slab_unreclaimable_bytes: bytes_of(&memory, "SUnreclaim:"),
            slab_reclaimable_bytes: bytes_of(&memory, "SReclaimable:"),
        }
    }
}

/// From the text of `/proc/net/sockstat`: "TCP: inuse 5 orphan 0 tw 0 alloc 7 mem 1".
fn tcp_pages(sockstat: &str) -> Option<u64> {
    let mut words = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"))?.split_whitespace();
    words.find(|word| *word == "mem")?;
    words.next()?.parse().ok()
}

/// The process that listens on a TCP port of this machine; `None` if there is none, or it belongs to another user.
pub fn listening_on(port: u16) -> Option<u32> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let inodes: HashSet<String> = tables.iter().flat_map(|table| listening_inodes(table, port)).collect();
    if inodes.is_empty() {
        return None;
    }
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().find(|&pid| owns_socket(pid, &inodes))
}

/// Inodes of the sockets that listen on a port, from the text of `/proc/net/tcp` or `tcp6`.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let (_, local_port) = local.rsplit_once(':')?;
        let ours = *state == LISTEN && u16::from_str_radix(local_port, 16) == Ok(port);
        ours.then(|| (*inode).to_owned())
    };
    table.lines().skip(1).filter_map(inode).collect()
}

fn owns_socket(pid: u32, inodes: &HashSet<String>) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|entry| {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        let inode = link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']'));
        inode.is_some_and(|inode| inodes.contains(inode))
    })
}

/// What a process has used; `None` once it is gone.
pub fn sample(pid: u32) -> Option<Sample> {
    let ticks = cpu_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let (rss_bytes, rss_anon_bytes) = (bytes_of(&status, "VmRSS:")?, bytes_of(&status, "RssAnon:")?);
    let ticks_per_s = rustix::param::clock_ticks_per_second();
    Some(Sample { cpu_s: ticks as f64 / ticks_per_s as f64, rss_bytes, rss_anon_bytes })
}

/// How often the threads of a process that live now gave up a core or lost it; `None` once it is gone.
pub fn context_switches(pid: u32) -> Option<u64> {
    let of_thread = |status: String| {
        let fields = status.lines().filter_map(|line| {
            line.strip_prefix("voluntary_ctxt_switches:").or_else(|| line.strip_prefix("nonvoluntary_ctxt_switches:"))
        });
        fields.filter_map(|count| count.trim().parse::<u64>().ok()).sum::<u64>()
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    Some(threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok()).map(of_thread).sum())
}

/// utime + stime of `/proc/PID/stat`: fields 14 and 15, counted behind the name, which may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    user.checked_add(system)
}

/// A field of `/proc/PID/status` or `/proc/meminfo`, which hold "Name: 123 kB" a line.
pub(crate) fn bytes_of(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(BYTES_PER_KIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_texts_are_read_past_odd_names() {
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 1500 250 7 8 20";
        assert_eq!(cpu_ticks(stat), Some(1_750));
        assert_eq!(cpu_ticks("42 (x) S 1"), None);
        assert_eq!(bytes_of("Name:\tx\nVmRSS:\t  2048 kB\n", "VmRSS:"), Some(2 << 20));
        assert_eq!(bytes_of("Name:\tx\n", "VmRSS:"), None);
        let sockstat = "sockets: used 9\nTCP: inuse 5 orphan 0 tw 0 alloc 7 mem 3\nUDP: inuse 1 mem 8\n";
        assert_eq!((tcp_pages(sockstat), tcp_pages("UDP: mem 8")), (Some(3), None));
        let table = "  sl local rem st\n\
            0: 0100007F:25E4 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 777 1\n\
            1: 0100007F:25E4 0100007F:1111 01 00000000:00000000 00:00000000 00000000 0 0 778 1\n\
            2: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 779 1\n";
        assert_eq!(listening_inodes(table, 9700), ["777"]);
    }

    #[test]
    fn this_very_process_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let pid = listening_on(port).unwrap();
        assert_eq!(pid, std::process::id());
        let sample = sample(pid).unwrap();
        assert!(sample.rss_anon_bytes > 0 && sample.rss_bytes >= sample.rss_anon_bytes);
        assert!(context_switches(pid) > Some(0) && KernelMemory::now().slab_unreclaimable_bytes > Some(0));
        drop(listener);
        assert_eq!(listening_on(port), None);
    }
}
