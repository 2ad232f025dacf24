//! Under what a figure was measured: the machine, the server's process, this process. Read from `/proc` and `/sys`.
//!
//! Main thread only, before the clock of a run starts. What cannot be read is "unknown", never left out: a report that
//! is silent about a fact looks like one where the fact does not matter.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde::Serialize;

use crate::server_process::bytes_of;

const UNKNOWN: &str = "unknown";
const BYTES_PER_GIB: f64 = 1_073_741_824.0;
/// Of a command line that is shown.
const COMMAND_CHARS_MAX: usize = 2_000;

/// Where and how a run took place.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    /// Logical CPUs this process may use.
    pub cpus: usize,
    pub cpu_model: String,
    pub memory_gib: Option<f64>,
    /// Kernel mitigations that are active, by name; they cost system calls.
    pub mitigations: String,
    /// Frequency governor of CPU 0.
    pub governor: String,
    /// What the messages go through: loopback, or the interface that is up.
    pub nic: String,
    /// The server's own command line, if its process is on this machine.
    pub server_command_line: String,
    pub command_line: String,
}

impl Machine {
    /// This machine and process, with the server's. Call it before the thread is pinned: a pinned thread sees one CPU.
    pub fn here(target: SocketAddr, server_pid: Option<u32>) -> Self {
        let read = |path: &str| fs::read_to_string(path).ok();
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_model: read("/proc/cpuinfo").and_then(|text| cpu_model(&text)).unwrap_or_else(unknown),
            memory_gib: read("/proc/meminfo").and_then(|text| memory_gib(&text)),
            mitigations: mitigations(Path::new("/sys/devices/system/cpu/vulnerabilities")),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").map_or_else(
                || "none (no cpufreq, such as in a virtual machine)".to_owned(),
                |text| text.trim().into(),
            ),
            nic: nic(target.ip()),
            server_command_line: server_pid.and_then(command_line_of).unwrap_or_else(unknown),
            command_line: std::env::args().collect::<Vec<_>>().join(" "),
        }
    }

    /// Name and value of each fact, for tables and comments.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let memory = self.memory_gib.map_or_else(unknown, |gib| format!("{gib:.1} GiB"));
        vec![
            ("command line", self.command_line.clone()),
            ("server command line", self.server_command_line.clone()),
            ("CPU", format!("{}, {} logical CPUs", self.cpu_model, self.cpus)),
            ("memory", memory),
            ("kernel", self.kernel.clone()),
            ("mitigations", self.mitigations.clone()),
            ("governor", self.governor.clone()),
            ("NIC", self.nic.clone()),
        ]
    }
}

fn unknown() -> String {
    UNKNOWN.to_owned()
}

/// From the text of `/proc/cpuinfo`; other architectures than x86 name the parts only.
fn cpu_model(cpuinfo: &str) -> Option<String> {
    let field = |wanted: &str| {
        let named = |line: &str| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == wanted).then(|| value.trim().to_owned())
        };
        cpuinfo.lines().find_map(named).filter(|value| !value.is_empty())
    };
    field("model name")
        .or_else(|| Some(format!("implementer {}, part {}", field("CPU implementer")?, field("CPU part")?)))
}

fn memory_gib(meminfo: &str) -> Option<f64> {
    bytes_of(meminfo, "MemTotal:").map(|bytes| bytes as f64 / BYTES_PER_GIB)
}

/// Names of the files in this folder whose text begins with "Mitigation" or "Vulnerable".
fn mitigations(folder: &Path) -> String {
    let Ok(entries) = fs::read_dir(folder) else { return unknown() };
    let (mut mitigated, mut vulnerable) = (Vec::new(), Vec::new());
    for entry in entries.flatten() {
        let (name, text) = (entry.file_name(), fs::read_to_string(entry.path()).unwrap_or_default());
        let name = name.to_string_lossy().into_owned();
        if text.starts_with("Mitigation") {
            mitigated.push(name);
        } else if text.starts_with("Vulnerable") {
            vulnerable.push(name);
        }
    }
    mitigated.sort_unstable();
    vulnerable.sort_unstable();
    let list = |names: Vec<String>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!("active: {}; vulnerable without: {}", list(mitigated), list(vulnerable))
}

/// Loopback, or every interface that is up, with speed (Mbit/s) and driver where the kernel tells them.
fn nic(target: IpAddr) -> String {
    if target.is_loopback() {
        return "none: loopback, generator and server share this machine".to_owned();
    }
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let up = entries.filter_map(|entry| {
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).map(|text| text.trim().to_owned()).ok();
        (read("operstate")? == "up").then(|| {
            let speed = read("speed").map_or_else(unknown, |mbit| format!("{mbit} Mbit/s"));
            let driver = fs::read_link(entry.path().join("device/driver")).ok();
            let driver =
                driver.as_deref().and_then(Path::file_name).map_or(UNKNOWN.into(), |name| name.to_string_lossy());
            format!("{} ({speed}, driver {driver})", entry.file_name().to_string_lossy())
        })
    });
    let mut up: Vec<String> = up.collect();
    up.sort_unstable();
    if up.is_empty() { unknown() } else { up.join("; ") }
}

/// The arguments of a process, joined by spaces; `None` once it is gone.
fn command_line_of(pid: u32) -> Option<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.split('\0').filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    Some(line.chars().take(COMMAND_CHARS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_texts_are_read() {
        assert_eq!(cpu_model("processor : 0\nmodel name\t: Big Iron 9\n"), Some("Big Iron 9".to_owned()));
        let arm = "CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n";
        assert_eq!(cpu_model(arm), Some("implementer 0x41, part 0xd0c".to_owned()));
        assert_eq!(cpu_model("bogomips : 1"), None);
        assert_eq!(memory_gib("MemTotal:       2097152 kB\nMemFree: 1 kB"), Some(2.0));
        assert_eq!(memory_gib(""), None);
    }

    #[test]
    fn mitigations_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("a", "Mitigation: x\n"), ("b", "Not affected\n"), ("c", "Vulnerable\n")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(mitigations(folder.path()), "active: a; vulnerable without: c");
        assert_eq!(mitigations(&folder.path().join("absent")), UNKNOWN);
    }

    #[test]
    fn every_fact_is_told_even_if_unknown() {
        let here = Machine::here(SocketAddr::from(([127, 0, 0, 1], 1)), Some(std::process::id()));
        let rows = here.rows();
        for name in ["command line", "server command line", "CPU", "memory", "kernel", "mitigations", "governor", "NIC"]
        {
            assert!(rows.iter().any(|(key, value)| *key == name && !value.is_empty()), "{name}");
        }
        assert_eq!(here.server_command_line, here.command_line, "both are this process");
        assert!(here.nic.contains("loopback"));
        assert_eq!(command_line_of(u32::MAX), None);
    }
}
