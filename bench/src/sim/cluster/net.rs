//! The network between the nodes of a run: connections whose bytes are delayed, cut anywhere, lost with the end of a
//! connection, and held while one direction is cut. Owned by the cluster.
//!
//! Invariants, as of TCP: the bytes of one direction arrive in order, and a beginning of what was written, all of it
//! unless the connection broke; an end hears of the end of its connection once, behind what still came. Nothing is damaged
//! and nothing comes twice: that is what the links above may rely on, and all they may. Between two connections nothing
//! is ordered.

use std::collections::VecDeque;

use bytes::BytesMut;
use rand::RngExt;

use super::{Action, Cluster};

/// How long a dial into a cut network is tried.
const DIAL_US: u64 = 3_000_000;
/// Chance in percent that a machine that dies says nothing to who is connected with it.
const SILENT_PERCENT: u32 = 20;

/// What an end of a connection is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Greeting,
    /// It carries the link at that place of its core.
    Live(usize),
    /// It hears and says nothing any more.
    Over,
}

/// One end of a connection.
pub struct End {
    pub node: usize,
    /// The life of that node.
    pub epoch: u32,
    pub core: usize,
    pub stage: Stage,
    pub inbound: BytesMut,
    /// On their way to this end, and when the last of them is here.
    coming: VecDeque<Vec<u8>>,
    due_us: u64,
    /// What is written to it from now on does not arrive.
    broken: bool,
}

/// A connection between cores of two nodes: the end that has dialled, and the other.
pub struct Socket {
    pub ends: [End; 2],
    /// The place of the link that was dialled for, at the core that did.
    pub link: usize,
}

impl End {
    fn new((node, epoch, core): (usize, u32, usize)) -> Self {
        let (inbound, coming) = (BytesMut::new(), VecDeque::new());
        Self { node, epoch, core, stage: Stage::Greeting, inbound, coming, due_us: 0, broken: false }
    }
}

impl Cluster {
    /// A direction between two nodes that carries nothing now, and until when.
    fn cut_until(&self, way: (usize, usize)) -> Option<u64> {
        self.cuts.get(&way).copied().filter(|until_us| *until_us > self.now_us)
    }

    fn delay_us(&mut self) -> u64 {
        if self.chance(3) { self.random_us(1_000, 80_000) } else { self.random_us(50, 1_500) }
    }

    /// Dials another node for a link; what comes of it is told later.
    pub(super) fn dial(&mut self, (node, core): (usize, usize), (at, peer): (usize, usize)) {
        let epoch = self.nodes[node].epoch;
        let is_cut = self.cut_until((node, peer)).is_some() || self.cut_until((peer, node)).is_some();
        let far = &self.nodes[peer];
        if is_cut || !far.up {
            let delay = if is_cut { DIAL_US } else { self.delay_us() };
            return self.at_node((node, epoch), delay, super::AtNode::NotDialled { core, link: at });
        }
        // The kernel of the other node spreads who calls over its cores.
        let (there, count) = (far.epoch, far.sides.len());
        let called = self.rng.random_range(0..count);
        self.next_socket += 1;
        let socket = self.next_socket;
        let ends = [End::new((node, epoch, core)), End::new((peer, there, called))];
        self.sockets.insert(socket, Socket { ends, link: at });
        let delay = 2 * self.delay_us();
        self.after(delay, Action::Dialled { socket });
    }

    /// Writes bytes at one end, in pieces whose ends have nothing to do with those of frames.
    pub(super) fn write_socket(&mut self, (socket, end): (u64, usize), bytes: &[u8]) {
        let to = 1 - end;
        let Some(open) = self.sockets.get(&socket).filter(|open| !open.ends[to].broken) else { return };
        let cut_us = self.cut_until((open.ends[end].node, open.ends[to].node)).unwrap_or(0);
        let half = self.rng.random_range(0..=bytes.len());
        for piece in [&bytes[..half], &bytes[half..]].into_iter().filter(|piece| !piece.is_empty()) {
            let delay = self.delay_us();
            let (now_us, Some(open)) = (self.now_us, self.sockets.get_mut(&socket)) else { return };
            let far = &mut open.ends[to];
            far.due_us = far.due_us.max(now_us + delay).max(cut_us);
            far.coming.push_back(piece.to_vec());
            let at_us = far.due_us;
            self.at(at_us, Action::Bytes { socket, end: to });
        }
    }

    /// Bytes reach an end. False: there is nobody any more.
    pub(super) fn bytes_came(&mut self, socket: u64, end: usize) -> bool {
        let Some(own) = self.sockets.get_mut(&socket).map(|open| &mut open.ends[end]) else { return false };
        let Some(bytes) = own.coming.pop_front() else { return false };
        own.inbound.extend_from_slice(&bytes);
        let (node, epoch, stage) = (own.node, own.epoch, own.stage);
        stage != Stage::Over && self.nodes[node].up && self.nodes[node].epoch == epoch
    }

    /// One end closes: the other hears so behind all that was written.
    pub(super) fn close_socket(&mut self, (socket, end): (u64, usize)) {
        let Some(open) = self.sockets.get_mut(&socket) else { return };
        open.ends[end].stage = Stage::Over;
        let far = &mut open.ends[1 - end];
        far.broken = true;
        let at_us = far.due_us.max(self.now_us);
        self.at(at_us, Action::Shut { socket, end: 1 - end });
    }

    /// An end is over for whoever had it; the connection goes with its second end.
    pub(super) fn forget_socket(&mut self, socket: u64) {
        if self.sockets.get(&socket).is_some_and(|open| open.ends.iter().all(|end| end.stage == Stage::Over)) {
            self.sockets.remove(&socket);
        }
    }

    /// A connection breaks: of what is under way to each end a beginning arrives, of any length.
    pub(super) fn reset_socket(&mut self, socket: u64) {
        for end in [0, 1] {
            self.lose_end_of((socket, end));
            let (now_us, Some(open)) = (self.now_us, self.sockets.get(&socket)) else { return };
            let at_us = open.ends[end].due_us.max(now_us);
            self.at(at_us, Action::Shut { socket, end });
        }
    }

    fn lose_end_of(&mut self, (socket, end): (u64, usize)) {
        let Some(open) = self.sockets.get_mut(&socket) else { return };
        let own = &mut open.ends[end];
        let mut rest: Vec<u8> = own.coming.drain(..).flatten().collect();
        rest.truncate(self.rng.random_range(0..=rest.len()));
        own.coming.push_back(rest);
        own.broken = true;
    }

    /// A connection that may break now, if there is one.
    pub(super) fn any_socket(&mut self) -> Option<u64> {
        let open: Vec<u64> = self.sockets.keys().copied().collect();
        (!open.is_empty()).then(|| open[self.rng.random_range(0..open.len())])
    }

    /// The process of a node has ended: so have its ends, and the others hear of it, unless the machine died with it.
    pub(super) fn end_sockets_of(&mut self, node: usize, may_be_silent: bool) {
        let silent = may_be_silent && self.chance(SILENT_PERCENT);
        let mine = |open: &Socket| open.ends.iter().position(|end| end.node == node);
        let mine: Vec<_> = self.sockets.iter().filter_map(|(socket, open)| Some((*socket, mine(open)?))).collect();
        for (socket, end) in mine {
            let far = (socket, 1 - end);
            if let Some(open) = self.sockets.get_mut(&socket) {
                open.ends[end].stage = Stage::Over;
            }
            if may_be_silent {
                self.lose_end_of(far);
            }
            if !silent {
                self.close_socket((socket, end));
            }
            self.forget_socket(socket);
        }
    }

    /// One direction between two nodes carries nothing for a while: what is written meanwhile arrives later.
    pub(super) fn cut_way(&mut self, way: (usize, usize), until_us: u64) {
        let until = self.cuts.entry(way).or_default();
        *until = until_us.max(*until);
    }
}
