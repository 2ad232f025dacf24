//! The links of the nodes of a run: the real state machines of [`ringline_cluster::link`] over connections that break, under
//! a shell that is played as the server's is. Owned by the cluster; each link by a core of a node.
//!
//! Link number k lives on core k of each node (modulo its cores) and carries what core k of either side sends; a node with more
//! cores brings links that the other only receives by. What a connection loses is sent again on the next one, what comes
//! twice is dropped; only the end of a process loses messages, and then `Reset` is told before the next `Up`.
//! Invariants: an honest peer breaks no rule of a channel; nothing of an old process is given out after its reset.

use std::collections::VecDeque;

use bytes::Bytes;
use rand::RngExt;
use ringline_cluster::link::batch::{self, Items};
use ringline_cluster::link::channel::Heard;
use ringline_cluster::link::frame::{BATCH_BYTES_MAX, Frame};
use ringline_cluster::link::hello::{Agreed, Hello, Incarnation, PROTOCOL, is_dialled_by_the_right_one};
use ringline_cluster::link::line::{Joined, Line, Process, Sender, Told};
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::{Event, NodeNews, ShardMessage};
use ringline_core::nodes::record;

use super::net::Stage;
use super::nodes::{LaneItem, name};
use super::{AtNode, Bug, Cluster};

/// How long who connects may take to say who it is.
const GREETING_US: u64 = 5_000_000;

/// A core of a node.
type Core = (usize, usize);

/// One link of a core.
pub struct PeerLink {
    pub node: usize,
    pub number: usize,
    /// The node belongs to the cluster now; otherwise it is not dialled.
    pub is_wanted: bool,
    line: Line,
    /// The connection that carries it, and which end of that is here.
    socket: Option<(u64, usize)>,
    /// For the next flush.
    batch: Vec<u8>,
    /// To be worked off, and who sent it.
    inbox: VecDeque<(Process, Bytes)>,
}

impl PeerLink {
    fn new((node, number): (usize, usize), line: Line) -> Self {
        let (batch, inbox) = (Vec::new(), VecDeque::new());
        Self { node, number, is_wanted: true, line, socket: None, batch, inbox }
    }
}

impl Cluster {
    fn now_ms_of(&self, node: usize) -> u64 {
        self.nodes[node].clock.mono_us(self.now_us) / 1_000
    }

    fn peer_mut(&mut self, (node, core): Core, at: usize) -> Option<&mut PeerLink> {
        self.nodes[node].sides.get_mut(core)?.peers.get_mut(at)
    }

    /// The place of a core's own link to a node.
    fn own_link(&self, (node, core): Core, peer: usize) -> Option<usize> {
        let peers = &self.nodes[node].sides.get(core)?.peers;
        peers.iter().position(|link| link.node == peer && link.number == core)
    }

    /// A link of a core to every node that belongs to the cluster now, and none to the others.
    pub(super) fn set_peers(&mut self, (node, core): Core, listed: &[usize]) {
        let now_ms = self.now_ms_of(node);
        for &peer in listed.iter().filter(|peer| **peer != node) {
            if self.own_link((node, core), peer).is_none() {
                let right = is_dialled_by_the_right_one(&name(node), &name(peer));
                let line = Line::new((true, right), now_ms);
                self.nodes[node].sides[core].peers.push(PeerLink::new((peer, core), line));
            }
        }
        for at in 0..self.nodes[node].sides[core].peers.len() {
            let draw = self.rng.random();
            let link = &mut self.nodes[node].sides[core].peers[at];
            let is_listed = listed.contains(&link.node);
            if std::mem::replace(&mut link.is_wanted, is_listed) && !is_listed {
                let (socket, mut told) = (link.socket.take(), Vec::new());
                link.line.gone((now_ms, draw), &mut told);
                self.tell_line((node, core), at, told);
                socket.into_iter().for_each(|socket| self.close_socket(socket));
            }
        }
        self.arm_peers((node, core));
    }

    /// What a line says, and what that means for the link.
    fn tell_line(&mut self, place: Core, at: usize, told: Vec<Told>) {
        for told in told {
            let Some(link) = self.peer_mut(place, at) else { return };
            if told == Told::Reset {
                link.inbox.clear();
                link.batch.clear();
            }
            let (peer, own) = (link.node, link.number == place.1);
            // Of a link that only brings something the core's own link says the same.
            if !own || (told == Told::Reset && self.bug(Bug::ResetUntold)) {
                continue;
            }
            let news = match told {
                Told::Up(Process { shards, .. }) => NodeNews::Up { shards },
                Told::Down => NodeNews::Down,
                Told::Reset => NodeNews::Reset,
            };
            self.note(8, (place.0 * 64 + place.1) as u64);
            self.tell(place, Event::Node { node: NodeIndex(peer as u16), news });
        }
    }

    // --- out -----------------------------------------------------------------------------------------------------

    /// Puts a message into the next flush, or gives it back: there is no room, or nobody there.
    pub(super) fn send(&mut self, place: Core, to: ShardIndex, message: ShardMessage) -> Option<ShardMessage> {
        let peer = usize::from(to.node().0);
        let is_full = self.full_percent > 0 && self.chance(self.full_percent);
        let at = self.own_link(place, peer);
        let link = at.and_then(|at| self.peer_mut(place, at)).filter(|link| link.line.is_up() && !is_full);
        let Some(link) = link else { return Some(message) };
        let mut bytes = Vec::new();
        record::encode(&message, &mut bytes);
        if link.batch.len() + batch::item_bytes(&bytes) > BATCH_BYTES_MAX {
            let whole = Bytes::from(std::mem::take(&mut link.batch));
            link.line.channel_mut().offer(whole).expect("a simulated link is never as full as that");
        }
        batch::append(&mut link.batch, (place.1 as u16, to.within()), &bytes);
        let side = &mut self.nodes[place.0].sides[place.1];
        if !std::mem::replace(&mut side.flushes, true) {
            let (delay, epoch) = (self.random_us(0, 400), self.nodes[place.0].epoch);
            self.at_node((place.0, epoch), delay, AtNode::Flush { core: place.1 });
        }
        None
    }

    /// Sends what the last turns had to say.
    pub(super) fn flush_peers(&mut self, (node, core): Core) {
        self.nodes[node].sides[core].flushes = false;
        for at in 0..self.nodes[node].sides[core].peers.len() {
            let link = &mut self.nodes[node].sides[core].peers[at];
            if !link.batch.is_empty() {
                let whole = Bytes::from(std::mem::take(&mut link.batch));
                link.line.channel_mut().offer(whole).expect("a simulated link is never as full as that");
            }
            self.pump_link((node, core), at);
        }
        self.arm_peers((node, core));
    }

    fn pump_link(&mut self, place: Core, at: usize) {
        let now_ms = self.now_ms_of(place.0);
        let Some(link) = self.peer_mut(place, at) else { return };
        let Some(socket) = link.socket else { return };
        let mut bytes = Vec::new();
        while let Some(frame) = link.line.channel_mut().next_frame(now_ms) {
            frame.encode(&mut bytes);
        }
        if !bytes.is_empty() {
            self.write_socket(socket, &bytes);
        }
    }

    // --- time ----------------------------------------------------------------------------------------------------

    /// Everything that time alone causes.
    pub(super) fn tick_peers(&mut self, place: Core) {
        let (node, core) = place;
        self.nodes[node].sides[core].tick_us = 0;
        let now_ms = self.now_ms_of(node);
        for at in 0..self.nodes[node].sides[core].peers.len() {
            let draw = self.rng.random();
            let link = &mut self.nodes[node].sides[core].peers[at];
            if !link.is_wanted {
                continue;
            }
            let mut told = Vec::new();
            let silent = link.line.tick((now_ms, draw), &mut told);
            let socket = if silent { link.socket.take() } else { None };
            let dials = link.line.dial(now_ms);
            let peer = link.node;
            self.tell_line(place, at, told);
            socket.into_iter().for_each(|socket| self.close_socket(socket));
            if dials {
                self.dial(place, (at, peer));
            }
            self.pump_link(place, at);
        }
        self.arm_peers(place);
    }

    fn arm_peers(&mut self, (node, core): Core) {
        let home = &self.nodes[node];
        let Some(side) = home.sides.get(core) else { return };
        let due_ms = side.peers.iter().filter(|link| link.is_wanted).filter_map(|link| link.line.next_ms()).min();
        let Some(due_ms) = due_ms else { return };
        let at_us = home.clock.when_us(due_ms * 1_000).max(self.now_us + 1);
        if side.tick_us == 0 || at_us < side.tick_us {
            let epoch = home.epoch;
            self.nodes[node].sides[core].tick_us = at_us;
            self.at_node((node, epoch), at_us - self.now_us, AtNode::Tick { core });
        }
    }

    pub(super) fn not_dialled(&mut self, place: Core, at: usize) {
        let (now_ms, draw) = (self.now_ms_of(place.0), self.rng.random());
        if let Some(link) = self.peer_mut(place, at) {
            link.line.dial_failed(now_ms, draw);
        }
        self.arm_peers(place);
    }

    // --- in ------------------------------------------------------------------------------------------------------

    fn hello(&self, node: usize, core: usize, knows: Option<(Incarnation, u64)>) -> Hello {
        let home = &self.nodes[node];
        Hello {
            cluster: "sim".to_owned(),
            node: name(node),
            incarnation: home.incarnation,
            list: home.list,
            protocol: (*PROTOCOL.start(), *PROTOCOL.end()),
            cores: home.shards,
            core: core as u16,
            knows,
        }
    }

    fn say_hello(&mut self, socket: (u64, usize), hello: Hello) {
        let mut bytes = Vec::new();
        Frame::Hello(hello).encode(&mut bytes);
        self.write_socket(socket, &bytes);
    }

    /// A dial has come through: who dialled says who it is.
    pub(super) fn dialled(&mut self, socket: u64) {
        let Some(open) = self.sockets.get(&socket) else { return };
        let [own, far] = &open.ends;
        let (place, epoch, peer, at) = ((own.node, own.core), own.epoch, (far.node, far.epoch), open.link);
        if !self.lives(place.0, epoch) {
            return;
        }
        if !self.lives(peer.0, peer.1) {
            self.close_socket((socket, 1));
            return;
        }
        let link = &self.nodes[place.0].sides[place.1].peers[at];
        let hello = self.hello(place.0, link.number, link.line.knows());
        self.say_hello((socket, 0), hello);
        for (end, node) in [(0, (place.0, epoch)), (1, peer)] {
            self.at_node(node, GREETING_US, AtNode::Late { socket, end });
        }
    }

    /// A connection over which nobody has said who it is in time.
    pub(super) fn too_late(&mut self, socket: u64, end: usize) {
        if self.sockets.get(&socket).is_some_and(|open| open.ends[end].stage == Stage::Greeting) {
            self.refuse((socket, end));
        }
    }

    /// Bytes are there.
    pub(super) fn hear_socket(&mut self, socket: u64, end: usize) {
        if !self.bytes_came(socket, end) {
            return;
        }
        let Some(own) = self.sockets.get_mut(&socket).map(|open| &mut open.ends[end]) else { return };
        match own.stage {
            Stage::Over => {}
            Stage::Live(at) => self.hear_link((socket, end), at),
            Stage::Greeting => match Frame::decode_hello(&mut own.inbound) {
                Ok(None) => {}
                Ok(Some(hello)) => self.greet((socket, end), hello),
                Err(error) => panic!("a node said what is no hello: {error}"),
            },
        }
    }

    fn judge(&self, node: usize, hello: &Hello) -> Option<(usize, Agreed)> {
        let peer = (0..self.nodes.len()).find(|peer| name(*peer) == hello.node)?;
        let home = &self.nodes[node];
        let is_listed = home.sides.first()?.peers.iter().any(|link| link.node == peer && link.is_wanted);
        let newest = home.newest.get(&peer).copied();
        // Who is not listed (yet), and an old process, are refused, and try again.
        let agreed = self.hello(node, 0, None).judge(hello, &hello.node, newest).ok()?;
        is_listed.then_some((peer, agreed))
    }

    /// The other side has said who it is; its connection goes to the core of its link.
    fn greet(&mut self, socket: (u64, usize), hello: Hello) {
        let Some(own) = self.sockets.get(&socket.0).map(|open| &open.ends[socket.1]) else { return };
        let (node, core, epoch) = (own.node, own.core, own.epoch);
        let Some((peer, _)) = self.judge(node, &hello) else { return self.refuse(socket) };
        let newest = self.nodes[node].newest.entry(peer).or_default();
        *newest = hello.incarnation.max(*newest);
        let home = usize::from(hello.core) % self.nodes[node].sides.len();
        if socket.1 == 1 && home != core {
            let delay = self.random_us(5, 2_000);
            self.at_node((node, epoch), delay, AtNode::Guest { core: home, socket: socket.0, hello: Box::new(hello) });
        } else {
            self.settle(socket, &hello);
        }
    }

    /// A connection that another core has greeted.
    pub(super) fn take_guest(&mut self, core: usize, socket: u64, hello: &Hello) {
        if let Some(open) = self.sockets.get_mut(&socket).filter(|open| open.ends[1].stage != Stage::Over) {
            open.ends[1].core = core;
            self.settle((socket, 1), hello);
        }
    }

    fn refuse(&mut self, socket: (u64, usize)) {
        let stage = self.sockets.get(&socket.0).map(|open| open.ends[socket.1].stage);
        self.close_socket(socket);
        self.over(socket, stage);
        self.forget_socket(socket.0);
    }

    /// The connection carries its link from now on, unless a better one does.
    fn settle(&mut self, socket: (u64, usize), hello: &Hello) {
        let Some(open) = self.sockets.get(&socket.0) else { return };
        let (dialled_for, own) = (open.link, &open.ends[socket.1]);
        let place = (own.node, own.core);
        let now_ms = self.now_ms_of(place.0);
        // Once more: on its way here a newer process may have come.
        let Some((peer, agreed)) = self.judge(place.0, hello) else { return self.refuse(socket) };
        let (at, right) = match socket.1 {
            0 => (dialled_for, is_dialled_by_the_right_one(&name(place.0), &name(peer))),
            _ => self.called(place, (peer, usize::from(hello.core)), now_ms),
        };
        let Some(link) = self.peer_mut(place, at) else { return };
        let mut told = Vec::new();
        let joined = link.line.join((hello, &agreed), right, now_ms, &mut told);
        self.tell_line(place, at, told);
        match joined.expect("an honest peer claims only what was sent") {
            Joined::Superfluous => self.refuse(socket),
            Joined::Stands | Joined::Replaces => self.carry(place, at, socket),
        }
        self.arm_peers(place);
    }

    /// The link that the other side has dialled for, and whether its dial counts.
    fn called(&mut self, place: Core, (peer, number): (usize, usize), now_ms: u64) -> (usize, bool) {
        let peers = &mut self.nodes[place.0].sides[place.1].peers;
        let found = peers.iter().position(|link| link.node == peer && link.number == number);
        match found {
            Some(at) if number == place.1 => (at, is_dialled_by_the_right_one(&name(peer), &name(place.0))),
            Some(at) => (at, true),
            None => {
                peers.push(PeerLink::new((peer, number), Line::new((false, false), now_ms)));
                (peers.len() - 1, true)
            }
        }
    }

    fn carry(&mut self, place: Core, at: usize, socket: (u64, usize)) {
        let Some(link) = self.peer_mut(place, at) else { return };
        let (before, knows) = (link.socket.replace(socket), link.line.knows());
        if let Some(open) = self.sockets.get_mut(&socket.0) {
            open.ends[socket.1].stage = Stage::Live(at);
        }
        before.into_iter().for_each(|before| self.close_socket(before));
        if socket.1 == 1 {
            let hello = self.hello(place.0, place.1, knows);
            self.say_hello(socket, hello);
        }
        // What came right behind the hello.
        self.hear_link(socket, at);
    }

    /// An end hears that its connection is over.
    pub(super) fn shut(&mut self, socket: u64, end: usize) {
        let Some(own) = self.sockets.get_mut(&socket).map(|open| &mut open.ends[end]) else { return };
        let stage = std::mem::replace(&mut own.stage, Stage::Over);
        let (node, epoch) = (own.node, own.epoch);
        if self.lives(node, epoch) {
            self.over((socket, end), Some(stage));
        }
        // The other end has nobody to talk to.
        if let Some(open) = self.sockets.get(&socket)
            && open.ends[1 - end].stage != Stage::Over
        {
            self.close_socket((socket, end));
        }
        self.forget_socket(socket);
    }

    /// What the end of a connection means for its link.
    fn over(&mut self, (socket, end): (u64, usize), stage: Option<Stage>) {
        let Some(open) = self.sockets.get(&socket) else { return };
        let (dialled_for, place) = (open.link, (open.ends[end].node, open.ends[end].core));
        let (now_ms, draw) = (self.now_ms_of(place.0), self.rng.random());
        match stage {
            Some(Stage::Live(at)) => {
                let forgets = self.bug(Bug::ForgottenInbox);
                if let Some(link) = self.peer_mut(place, at).filter(|link| link.socket == Some((socket, end))) {
                    link.socket = None;
                    link.line.lost(now_ms, draw);
                    let forgotten = if forgets { std::mem::take(&mut link.inbox) } else { VecDeque::new() };
                    forgotten.iter().for_each(|(_, bytes)| link.line.channel_mut().worked_off(bytes));
                }
            }
            Some(Stage::Greeting) if end == 0 => {
                if let Some(link) = self.peer_mut(place, dialled_for) {
                    link.line.dial_failed(now_ms, draw);
                }
            }
            Some(Stage::Greeting | Stage::Over) | None => {}
        }
        self.arm_peers(place);
    }

    /// Reads the frames of a connection that carries a link.
    fn hear_link(&mut self, socket: (u64, usize), at: usize) {
        let twice = self.bug(Bug::ResentTwice);
        loop {
            let Some(own) = self.sockets.get_mut(&socket.0).map(|open| &mut open.ends[socket.1]) else { return };
            let (place, epoch) = ((own.node, own.core), own.epoch);
            if own.stage != Stage::Live(at) {
                return;
            }
            let frame = match Frame::decode(&mut own.inbound) {
                Ok(Some(frame)) => frame,
                Ok(None) => break self.pump_link(place, at),
                Err(error) => panic!("a node said what is no frame: {error}"),
            };
            let again = match &frame {
                Frame::Batch { bytes, .. } if twice => Some(bytes.clone()),
                _ => None,
            };
            let (now_ms, draw) = (self.now_ms_of(place.0), self.rng.random());
            let Some(link) = self.peer_mut(place, at).filter(|link| link.socket == Some(socket)) else { return };
            let heard = link.line.channel_mut().hear(frame, now_ms).expect("an honest peer breaks no rule");
            match heard {
                Heard::Nothing | Heard::Clients(_) => {}
                Heard::Again => {
                    self.resent += 1;
                    if let Some(bytes) = again {
                        self.give_out(place, at, &bytes);
                    }
                }
                Heard::Batch(bytes) => {
                    let process = link.line.process().expect("it said hello");
                    link.inbox.push_back((process, bytes));
                    let delay = if self.chance(5) { self.random_us(1_000, 50_000) } else { self.random_us(0, 200) };
                    self.at_node((place.0, epoch), delay, AtNode::Drain { core: place.1, link: at });
                }
                Heard::Bye => {
                    let mut told = Vec::new();
                    link.line.gone((now_ms, draw), &mut told);
                    link.socket = None;
                    self.tell_line(place, at, told);
                    self.close_socket(socket);
                    return self.arm_peers(place);
                }
            }
        }
    }

    /// A core works off one batch.
    pub(super) fn drain_link(&mut self, place: Core, at: usize) {
        let Some(link) = self.peer_mut(place, at) else { return };
        let Some((process, bytes)) = link.inbox.pop_front() else { return };
        link.line.channel_mut().worked_off(&bytes);
        self.work_off(place, at, (process, bytes));
        self.pump_link(place, at);
    }

    /// A planted bug: what came again is worked off again.
    fn give_out(&mut self, place: Core, at: usize, bytes: &Bytes) {
        if let Some(process) = self.peer_mut(place, at).and_then(|link| link.line.process()) {
            self.work_off(place, at, (process, bytes.clone()));
        }
    }

    fn work_off(&mut self, place: Core, at: usize, (process, bytes): (Process, Bytes)) {
        let (node, core) = place;
        for item in Items(bytes) {
            let item = item.expect("a batch of an honest peer adds up");
            let Some(link) = self.peer_mut(place, at) else { return };
            let (peer, own, to) = (link.node, link.number == core, usize::from(item.to_shard));
            let payload = item.payload.to_vec();
            if to == core {
                if own || self.is_of_known_process(place, peer, process) {
                    self.hear_shard(place, (peer, item.from_shard), &payload);
                }
            } else if to < self.nodes[node].sides.len() {
                let passed = LaneItem::Passed { peer, process, from: item.from_shard, payload };
                self.put_on_lane(node, (core as u16, item.to_shard), passed);
            }
            // Else it is for a core of a process that had more of them.
        }
    }

    /// A message that came by another core's link.
    pub(super) fn hear_passed(&mut self, place: Core, (peer, process): (usize, Process), message: (u16, &[u8])) {
        if self.is_of_known_process(place, peer, process) {
            self.hear_shard(place, (peer, message.0), message.1);
        }
    }

    fn hear_shard(&mut self, place: Core, (peer, from): (usize, u16), payload: &[u8]) {
        self.note(10, (place.0 as u64) << 32 | (place.1 as u64) << 16 | peer as u64);
        let message = record::decode(payload).expect("what a shard says reads back");
        let from = ShardIndex::new(NodeIndex(peer as u16), from);
        self.tell(place, Event::Shard { from, message });
    }

    /// Whether a message is of the process that the core's own link knows; what it says of that process is told first.
    fn is_of_known_process(&mut self, place: Core, peer: usize, process: Process) -> bool {
        let now_ms = self.now_ms_of(place.0);
        let Some(at) = self.own_link(place, peer) else { return false };
        let Some(link) = self.peer_mut(place, at).filter(|link| link.is_wanted) else { return false };
        let mut told = Vec::new();
        let sender = link.line.heard_of(process, now_ms, &mut told);
        let socket = if sender == Sender::New { link.socket.take() } else { None };
        let newest = self.nodes[place.0].newest.entry(peer).or_default();
        *newest = process.incarnation.max(*newest);
        self.tell_line(place, at, told);
        socket.into_iter().for_each(|socket| self.close_socket(socket));
        self.arm_peers(place);
        sender != Sender::Old
    }

    /// A node that stops in order says goodbye on every link.
    pub(super) fn say_bye(&mut self, node: usize) {
        let sockets = self.nodes[node].sides.iter().flat_map(|side| &side.peers).filter_map(|link| link.socket);
        for socket in sockets.collect::<Vec<_>>() {
            let mut bytes = Vec::new();
            Frame::Bye.encode(&mut bytes);
            self.write_socket(socket, &bytes);
        }
    }
}
