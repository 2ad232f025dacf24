//! Nodes made of nothing but their links, driven turn by turn on one thread, with a clock that can be put forward.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::placement::NodeIndex;

use crate::certs;
use crate::lanes::{self, LaneEnd, LaneItem};
use crate::net::epoll::EpollNet;
use crate::net::ring::RingNet;
use crate::net::{Admission, Flow, Net, NetOptions};
use crate::peers::door::{self, Door};
use crate::peers::roster::Roster;
use crate::peers::secure::Identity;
use crate::peers::{NotSent, PeerEvent, PeerLinks, PeerSnapshot};
use crate::wake::Waker;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Ring,
    Epoll,
}

/// A node and a core of it.
pub type Place = (NodeIndex, u16);
/// From where to where.
pub type Route = (Place, Place);

struct Core {
    net: Box<dyn Net>,
    links: PeerLinks,
    lanes: LaneEnd,
    _waker: Arc<Waker>,
}

struct Node {
    name: &'static str,
    shards: u16,
    address: SocketAddr,
    /// Held while the node has not started, so that nobody else gets the port.
    listener: Option<OwnedFd>,
    /// Where it believes others to be, if not at their own address.
    detours: BTreeMap<NodeIndex, SocketAddr>,
    running: Option<(Door, Vec<Core>)>,
    starts: u64,
    paused: bool,
    blocked: bool,
}

pub struct Cluster {
    kind: Kind,
    folder: tempfile::TempDir,
    nodes: Vec<Node>,
    proxies: Vec<Proxy>,
    epoch: Instant,
    ahead_ms: u64,
    came: BTreeMap<Route, Vec<Bytes>>,
    told: BTreeMap<Place, Vec<PeerEvent>>,
}

/// A link's certificate from the folder of `certs init`.
pub fn identity(folder: &Path, node: &str) -> Identity {
    let file = |name: String| -> PathBuf { folder.join(name) };
    let (ca, cert, key) = (file("ca.pem".into()), file(format!("{node}.pem")), file(format!("{node}.key")));
    Identity::load((&ca, &cert, &key), node).unwrap()
}

/// The numbers that messages begin with.
pub fn numbers(payloads: &[Bytes]) -> Vec<u32> {
    payloads.iter().map(|payload| u32::from_le_bytes(*payload.first_chunk().unwrap())).collect()
}

impl Cluster {
    /// All started, at the same moment. Names in order.
    pub fn new(kind: Kind, nodes: &[(&'static str, u16)]) -> Self {
        let mut cluster = Self::stopped(kind, nodes);
        (0..nodes.len() as u16).for_each(|node| cluster.start(NodeIndex(node)));
        cluster
    }

    pub fn stopped(kind: Kind, nodes: &[(&'static str, u16)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = nodes.iter().map(|(name, _)| (*name).to_owned()).collect();
        certs::make(folder.path(), &names, (1, true)).unwrap();
        let node = |&(name, shards): &(&'static str, u16)| {
            let (address, listener) = door::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
            Node {
                name,
                shards,
                address,
                listener: Some(listener),
                detours: BTreeMap::new(),
                running: None,
                starts: 0,
                paused: false,
                blocked: false,
            }
        };
        Self {
            kind,
            folder,
            nodes: nodes.iter().map(node).collect(),
            proxies: Vec::new(),
            epoch: Instant::now(),
            ahead_ms: 0,
            came: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn address(&self, node: NodeIndex) -> SocketAddr {
        self.nodes[usize::from(node.0)].address
    }

    /// `from` finds `to` behind a proxy, from its next start.
    pub fn connect_through(&mut self, from: NodeIndex, to: NodeIndex, mut proxy: Proxy) {
        proxy.to = Some(self.address(to));
        self.nodes[usize::from(from.0)].detours.insert(to, proxy.address);
        self.proxies.push(proxy);
    }

    /// Every proxy breaks its connections after so many bytes more.
    pub fn cut_after(&mut self, bytes: usize) {
        self.proxies.iter_mut().for_each(|proxy| proxy.left = bytes);
    }

    pub fn start(&mut self, index: NodeIndex) {
        let known: Vec<_> = self.nodes.iter().map(|node| (node.name.to_owned(), node.address)).collect();
        let identity = identity(self.folder.path(), self.nodes[usize::from(index.0)].name);
        let (kind, now_ms) = (self.kind, self.now_ms());
        let node = &mut self.nodes[usize::from(index.0)];
        node.starts += 1;
        let seen = known
            .into_iter()
            .enumerate()
            .map(|(at, (name, address))| (name, node.detours.get(&NodeIndex(at as u16)).copied().unwrap_or(address)));
        let process = (Incarnation(node.starts), node.shards);
        let roster = Arc::new(Roster::new(("test", node.name), seen.collect(), process, Some(identity)).unwrap());
        let (wakers, ends) = lanes::mesh(node.shards).unwrap();
        let listener = node.listener.take().unwrap_or_else(|| door::bind(node.address).unwrap().1);
        let (door, arrivals) = door::open((node.address, listener), &wakers).unwrap();
        let core = |(shard, ((lanes, waker), arrivals)): (usize, ((LaneEnd, Arc<Waker>), door::Arrivals))| {
            let admission = Arc::new(Admission::new(1_000));
            let clients = TcpListener::bind("127.0.0.1:0").unwrap();
            clients.set_nonblocking(true).unwrap();
            let options = NetOptions { listener: clients.into(), admission: admission.clone(), refusal: Vec::new() };
            let net: Box<dyn Net> = match kind {
                Kind::Ring => Box::new(RingNet::new(options).unwrap()),
                Kind::Epoll => Box::new(EpollNet::new(options).unwrap()),
            };
            let links = PeerLinks::new(roster.clone(), shard as u16, (admission, arrivals), now_ms);
            Core { net, links, lanes, _waker: waker }
        };
        let parts = ends.into_iter().zip(wakers).zip(arrivals).enumerate();
        node.running = Some((door, parts.map(core).collect()));
    }

    /// As by SIGKILL: nothing is said.
    pub fn kill(&mut self, index: NodeIndex) {
        self.nodes[usize::from(index.0)].running = None;
    }

    /// In order.
    pub fn stop(&mut self, index: NodeIndex) {
        let now_ms = self.now_ms();
        let (_, cores) = self.nodes[usize::from(index.0)].running.as_mut().unwrap();
        for core in cores {
            core.links.farewell(core.net.as_mut(), &mut core.lanes, now_ms);
        }
        self.kill(index);
    }

    /// From here on a node knows of these, itself among them.
    pub fn list(&mut self, index: NodeIndex, listed: &[NodeIndex]) {
        let node = |of: &NodeIndex| {
            let node = &self.nodes[usize::from(of.0)];
            (*of, node.name.to_owned(), node.address)
        };
        let list: Vec<_> = listed.iter().map(node).collect();
        let now_ms = self.now_ms();
        let (_, cores) = self.nodes[usize::from(index.0)].running.as_mut().unwrap();
        let roster = Arc::new(cores[0].links.roster.with_nodes(&list).unwrap());
        cores.iter_mut().for_each(|core| core.links.set_roster(roster.clone(), now_ms));
    }

    /// A paused node does nothing at all.
    pub fn pause(&mut self, index: NodeIndex, paused: bool) {
        self.nodes[usize::from(index.0)].paused = paused;
    }

    /// A blocked node works nothing off.
    pub fn block(&mut self, index: NodeIndex, blocked: bool) {
        self.nodes[usize::from(index.0)].blocked = blocked;
    }

    pub fn advance_clock(&mut self, ms: u64) {
        self.ahead_ms += ms;
    }

    fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + self.ahead_ms
    }

    /// One turn of every core of every node.
    pub fn turn(&mut self) {
        self.proxies.iter_mut().for_each(Proxy::turn);
        let now_ms = self.now_ms();
        for (at, node) in self.nodes.iter_mut().enumerate().filter(|(_, node)| !node.paused) {
            let Some((_, cores)) = &mut node.running else { continue };
            for (shard, core) in cores.iter_mut().enumerate() {
                let place = (NodeIndex(at as u16), shard as u16);
                for event in turn_of(core, node.blocked, now_ms) {
                    match event {
                        PeerEvent::Message { node, from_shard, payload } => {
                            self.came.entry(((node, from_shard), place)).or_default().push(payload);
                        }
                        other @ (PeerEvent::Up { .. } | PeerEvent::Down { .. } | PeerEvent::Reset { .. }) => {
                            self.told.entry(place).or_default().push(other);
                        }
                    }
                }
            }
        }
    }

    pub fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}\n{}", self.describe());
            self.turn();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn run_for(&mut self, time: Duration) {
        let started = Instant::now();
        while started.elapsed() < time {
            self.turn();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (place, core) in self.cores() {
            text.push_str(&format!("{place:?}: {:?}\n", core.links.snapshot(self.now_ms())));
        }
        text
    }

    fn cores(&self) -> impl Iterator<Item = (Place, &Core)> {
        self.nodes.iter().enumerate().flat_map(|(at, node)| {
            let cores = node.running.iter().flat_map(|(_, cores)| cores).enumerate();
            cores.map(move |(shard, core)| ((NodeIndex(at as u16), shard as u16), core))
        })
    }

    fn core(&mut self, (node, shard): Place) -> &mut Core {
        let (_, cores) = self.nodes[usize::from(node.0)].running.as_mut().unwrap();
        &mut cores[usize::from(shard)]
    }

    pub fn all_up(&self) -> bool {
        let nodes = self.nodes.len() as u16;
        self.cores().all(|((node, _), core)| {
            (0..nodes).map(NodeIndex).filter(|other| *other != node).all(|other| core.links.is_up(other))
        })
    }

    pub fn is_up(&self, place: Place, node: NodeIndex) -> bool {
        self.cores().any(|(own, core)| own == place && core.links.is_up(node))
    }

    /// All routes between shards of different nodes.
    pub fn routes(&self) -> Vec<Route> {
        let places: Vec<Place> = self.cores().map(|(place, _)| place).collect();
        let routes = places.iter().flat_map(|from| places.iter().map(move |to| (*from, *to)));
        routes.filter(|(from, to)| from.0 != to.0).collect()
    }

    pub fn send(&mut self, from: Place, to: Place, payload: &[u8]) -> Result<(), NotSent> {
        self.core(from).links.send(to.0, (from.1, to.1), payload)
    }

    /// What came on a route.
    pub fn came(&self, route: Route) -> &[Bytes] {
        self.came.get(&route).map_or(&[], Vec::as_slice)
    }

    /// What a core was told beside messages.
    pub fn told(&self, node: NodeIndex, shard: u16) -> Vec<PeerEvent> {
        self.told.get(&(node, shard)).cloned().unwrap_or_default()
    }

    pub fn forget_what_came(&mut self) {
        self.came.clear();
        self.told.clear();
    }

    pub fn snapshot(&self, node: NodeIndex, shard: u16) -> PeerSnapshot {
        let (_, core) = self.cores().find(|(place, _)| *place == (node, shard)).unwrap();
        core.links.snapshot(self.now_ms())
    }
}

fn turn_of(core: &mut Core, blocked: bool, now_ms: u64) -> Vec<PeerEvent> {
    let Core { net, links, lanes, .. } = core;
    let mut events = Vec::new();
    let mut arrived = Vec::new();
    net.poll(now_ms * 1_000, &mut |event| links.take(event, lanes, now_ms).unwrap_or(Flow::Continue));
    links.tend(net.as_mut(), lanes, now_ms);
    lanes.receive(|_, item| arrived.push(item));
    for item in arrived {
        match item {
            LaneItem::Peer(item) => links.from_lane(item, net.as_mut(), &mut events, now_ms),
            LaneItem::Core(_) | LaneItem::HandOver(_) => panic!("nobody else is here"),
        }
    }
    links.tick(net.as_mut(), now_ms);
    if !blocked {
        links.drain(lanes, &mut events, now_ms);
    }
    links.flush(net.as_mut(), now_ms);
    net.flush();
    lanes.flush(|_, _| ());
    events
}

/// A line that breaks when it is told to.
pub struct Proxy {
    listener: TcpListener,
    pub address: SocketAddr,
    to: Option<SocketAddr>,
    lines: Vec<(TcpStream, TcpStream)>,
    /// Bytes until everything breaks.
    left: usize,
}

impl Proxy {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        Self { listener, address, to: None, lines: Vec::new(), left: usize::MAX }
    }

    fn turn(&mut self) {
        if let (Ok((from, _)), Some(to)) = (self.listener.accept(), self.to)
            && let Ok(to) = TcpStream::connect(to)
        {
            from.set_nonblocking(true).unwrap();
            to.set_nonblocking(true).unwrap();
            self.lines.push((from, to));
        }
        let left = &mut self.left;
        self.lines.retain(|(one, other)| pass(one, other, left) && pass(other, one, left));
        if *left == 0 {
            self.lines.clear();
            *left = usize::MAX;
        }
    }
}

/// Moves what there is, at most `left`. False: the line is broken.
fn pass(mut from: &TcpStream, mut to: &TcpStream, left: &mut usize) -> bool {
    let mut buffer = [0; 65_536];
    let room = buffer.len().min(*left);
    match from.read(&mut buffer[..room]) {
        Ok(0) => false,
        Ok(bytes) => {
            *left -= bytes;
            let mut rest = &buffer[..bytes];
            while !rest.is_empty() {
                match to.write(rest) {
                    Ok(written) => rest = &rest[written..],
                    // The other side reads when it is its turn, on this same thread: the line breaks here instead.
                    Err(_) => return false,
                }
            }
            true
        }
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}
