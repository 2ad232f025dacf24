//! A small network for tests: a namespace a node, all on one bridge, with directions that can be cut. Needs root and `ip`.
//!
//! A cut is silent, as of a cable: the sender's neighbour entry of the other leads nowhere, so frames leave and nobody takes
//! them. Who tests lives in the namespace of the bridge and reaches every node whatever is cut between them. Everything is
//! named after this process; what earlier ones have left is swept away, and dropping the network removes it.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Output};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const PREFIX: &str = "ringline-test-";
/// Nobody has it.
const NOWHERE: &str = "02:00:00:00:00:ff";

/// See the module.
pub struct Net {
    base: String,
    nodes: usize,
}

fn ip(arguments: &[&str]) -> Result<Output, String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

/// Namespaces of processes that have ended.
fn sweep() {
    let Ok(output) = ip(&["netns", "list"]) else { return };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for name in text.lines().filter_map(|line| line.split_whitespace().next()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = ip(&["netns", "del", name]);
        }
    }
}

impl Net {
    /// Errors: what can't be done here, in one line.
    pub fn new(name: &str, nodes: usize) -> Result<Self, String> {
        sweep();
        let net = Self { base: format!("{PREFIX}{}-{name}", std::process::id()), nodes };
        let hub = net.hub();
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "set", "lo", "up"])?;
        ip(&["-n", &hub, "link", "add", "hub", "type", "bridge"])?;
        ip(&["-n", &hub, "addr", "add", "10.77.0.254/24", "dev", "hub"])?;
        ip(&["-n", &hub, "link", "set", "hub", "up"])?;
        for node in 0..nodes {
            let (space, port) = (net.space(node), format!("port{node}"));
            ip(&["netns", "add", &space])?;
            ip(&["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "hub", "up"])?;
            ip(&["-n", &space, "link", "set", "eth0", "address", &mac(node)])?;
            ip(&["-n", &space, "addr", "add", &format!("{}/24", address(node)), "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
        }
        Ok(net)
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.base)
    }

    /// The namespace of a node.
    pub fn space(&self, node: usize) -> String {
        format!("{}-{node}", self.base)
    }

    /// From now on this thread, and what it starts, is in the namespace of the bridge.
    pub fn enter(&self) -> Result<(), String> {
        let file = File::open(format!("/run/netns/{}", self.hub())).map_err(|error| error.to_string())?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|error| error.to_string())
    }

    /// Nothing of what `from` sends reaches `to`, or all again.
    pub fn cut(&self, from: usize, to: usize, cut: bool) {
        let (space, to_address) = (self.space(from), address(to));
        let mac = if cut { NOWHERE.to_owned() } else { mac(to) };
        let entry = ["-n", &space, "neigh", "replace", &to_address, "lladdr", &mac, "dev", "eth0", "nud", "permanent"];
        ip(&entry).unwrap();
    }

    /// Takes a node's cable out, or puts it back: nobody at all reaches it, who tests neither.
    pub fn unplug(&self, node: usize, unplugged: bool) {
        let port = format!("port{node}");
        let to: &[&str] = if unplugged { &["nomaster"] } else { &["master", "hub"] };
        ip(&[&["-n", &self.hub(), "link", "set", &port][..], to].concat()).unwrap();
    }

    /// So many of 100 packets that come to `to` from `from` are lost; 0: none any more. Errors: no `nft` here, in one line.
    pub fn lose(&self, from: usize, to: usize, percent: u8) -> Result<(), String> {
        let (table, source) = (format!("from{from}"), address(from));
        let chain = "{ type filter hook input priority 0; }";
        let rules = match percent {
            0 => format!("delete table ip {table}"),
            some => format!(
                "add table ip {table}; add chain ip {table} c {chain}; \
                 add rule ip {table} c ip saddr {source} numgen random mod 100 < {some} drop"
            ),
        };
        ip(&["netns", "exec", &self.space(to), "nft", &rules]).map(drop)
    }

    /// Both directions between a node and all others.
    pub fn cut_off(&self, node: usize, cut: bool) {
        for other in (0..self.nodes).filter(|other| *other != node) {
            self.cut(node, other, cut);
            self.cut(other, node, cut);
        }
    }
}

/// Runs this with the calling thread, and what it starts, in a network namespace; then the thread is back where it was.
pub fn within<T>(space: &str, act: impl FnOnce() -> T) -> T {
    let of = |path: &str| File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let go = |to: &File| move_into_link_name_space(to.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    let (here, there) = (of("/proc/thread-self/ns/net"), of(&format!("/run/netns/{space}")));
    go(&there);
    let done = act();
    go(&here);
    done
}

impl Drop for Net {
    fn drop(&mut self) {
        for space in (0..self.nodes).map(|node| self.space(node)).chain([self.hub()]) {
            let _ = ip(&["netns", "del", &space]);
        }
    }
}

/// Of a node.
pub fn address(node: usize) -> String {
    format!("10.77.0.{}", node + 1)
}

fn mac(node: usize) -> String {
    format!("02:00:00:00:00:{:02x}", node + 1)
}
