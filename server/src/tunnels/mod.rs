//! Tunnels of one core: clients that it holds for other nodes (it is their gateway), and sessions whose clients gateways hold.
//! Owned by the core's thread; what the two ends say to each other, and how much, is in [`ringline_cluster::link::tunnel`].
//!
//! - *At the gateway* ([`near`]) the shard reads the first LOGIN or REGISTER as ever; of a user of another node it hands the
//!   connection over, and the edge gives it here: socket and slot stay, bytes go both ways, and the shard has forgotten it.
//!   What comes before, limits and time among it, is the gateway's, everything after it the owner's.
//! - *At the owner* ([`far`]) it is a connection like any other to the shard, under an id that the net lends without a socket; its
//!   output goes to the link instead of a socket.
//!
//! Ends: a client that goes is told to the owner ([`Said::Left`]), a session that ends to the gateway, behind its last bytes
//! ([`Said::Ended`]). When the link is down both sides end what went over it: the client is told GOAWAY (or UNAVAILABLE to its
//! LOGIN) and comes back, and each side tells the other of what it has ended as soon as it can. At most [`OWED_MAX`] of these wait
//! for a node; one more is not told, and found by the next word of the other side or by the session's idle timeout.
//!
//! Invariants: a connection is the edge's or a tunnel's; the shard hears `Closed` once of each tunnelled session; a lent
//! id is given back once.

mod far;
mod near;

use std::collections::{HashMap, VecDeque};

use ringline_cluster::link::tunnel::{Record, Said, TunnelId};
use ringline_cluster::placement::{NODES_MAX, NodeIndex, ShardIndex};
use ringline_core::event::ConnId;
use ringline_schema::frame::TailPool;

use self::far::FarEnd;
use self::near::NearEnd;
use crate::edge::Turn;
use crate::net::Net;
use crate::peers::{NotSent, PeerLinks};

/// Ends that wait to be told to one node.
const OWED_MAX: usize = 65_536;
/// How long what is left of a tunnel that has ended may take to be written, and the client to end its own stream.
const LINGER_US: u64 = 1_000_000;
/// How long the answers to what clients have asked may take to come through a gateway that stops.
const DRAIN_GRACE_US: u64 = 1_000_000;

/// Counters and levels of one core's tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelCounters {
    /// Clients held here for other nodes, now.
    pub held: u64,
    /// Sessions here whose clients gateways hold, now.
    pub served: u64,
    /// Of clients held here.
    pub opened: u64,
    /// Of clients held here: those that ended because their owner was away or did not answer.
    pub lost: u64,
    /// Bytes from clients held here to their owners, and back.
    pub up_bytes: u64,
    pub down_bytes: u64,
}

/// What tunnels work with.
pub struct Shell<'a, 'b> {
    pub turn: Turn<'a>,
    pub net: &'b mut dyn Net,
    pub peers: &'b mut PeerLinks,
}

impl Shell<'_, '_> {
    fn now_us(&self) -> u64 {
        self.turn.now.mono_us
    }
}

/// An end that the other side is to be told of.
#[derive(Clone, Copy, Debug)]
struct Owed {
    to: ShardIndex,
    id: TunnelId,
    said: Said<'static>,
}

/// See the module.
pub struct Tunnels {
    /// Within its node.
    shard: u16,
    /// By slot.
    near: Vec<Option<Box<NearEnd>>>,
    /// By slot.
    far: Vec<Option<Box<FarEnd>>>,
    /// The ends of `far`, by who opened them.
    by_id: HashMap<(ShardIndex, TunnelId), ConnId>,
    /// Ends of `near`, and of `far`, that have something to do in the next flush.
    active: Vec<ConnId>,
    speaking: Vec<ConnId>,
    /// By number of node.
    owed: Vec<VecDeque<Owed>>,
    /// All of them.
    owes: usize,
    /// Ends of `near` whose owner has said nothing yet, in order of their deadlines.
    opening: VecDeque<(u64, ConnId)>,
    /// Ends of both that are over, in order of their deadlines.
    ending: VecDeque<(u64, ConnId)>,
    /// Set once the node stops: until when answers are waited for.
    grace_us: Option<u64>,
    /// Reused.
    record: Vec<u8>,
    tails: TailPool,
    counters: TunnelCounters,
}

impl Tunnels {
    /// Of a core, by its number within the node.
    pub fn new(shard: u16) -> Self {
        Self {
            shard,
            near: Vec::new(),
            far: Vec::new(),
            by_id: HashMap::new(),
            active: Vec::new(),
            speaking: Vec::new(),
            owed: (0..NODES_MAX).map(|_| VecDeque::new()).collect(),
            owes: 0,
            opening: VecDeque::new(),
            ending: VecDeque::new(),
            grace_us: None,
            record: Vec::new(),
            tails: TailPool::default(),
            counters: TunnelCounters::default(),
        }
    }

    /// Takes in what a shard of another node says. Bytes that mean nothing are counted at its link.
    pub fn hear(&mut self, shell: &mut Shell<'_, '_>, from: ShardIndex, payload: &[u8]) {
        let Record { id, said } = match Record::decode(payload) {
            Ok(record) => record,
            Err(error) => return shell.peers.meaningless(from.node(), &error, shell.turn.now.mono_us / 1_000),
        };
        match said {
            Said::Open(bytes) => self.open_far(shell, (from, id), bytes),
            Said::Up(bytes) => self.gateway_says(shell, (from, id), bytes),
            Said::Credit(bytes) => self.credit_far((from, id), bytes),
            Said::Left => self.left(shell, (from, id)),
            Said::Down(frames) => self.owner_says(shell, (from, id), frames),
            Said::Ended => self.ended(shell.now_us(), (from, id)),
        }
    }

    /// A node can't be reached: what went there and what came from there ends.
    pub fn node_down(&mut self, shell: &mut Shell<'_, '_>, node: NodeIndex) {
        self.lose_near(shell.now_us(), node);
        self.lose_far(shell, node);
    }

    /// A node is a new process, which knows of no tunnel.
    pub fn node_reset(&mut self, node: NodeIndex) {
        if let Some(owed) = self.owed.get_mut(usize::from(node.0)) {
            self.owes -= owed.len();
            owed.clear();
        }
    }

    fn owe(&mut self, to: ShardIndex, id: TunnelId, said: Said<'static>) {
        if let Some(owed) = self.owed.get_mut(usize::from(to.node().0)).filter(|owed| owed.len() < OWED_MAX) {
            owed.push_back(Owed { to, id, said });
            self.owes += 1;
        }
    }

    /// Puts what there is to say on the links, and what has come for clients into their sockets. Once a turn, before the links
    /// are flushed.
    pub fn flush(&mut self, shell: &mut Shell<'_, '_>) {
        for conn in std::mem::take(&mut self.active) {
            self.serve_near(shell, conn);
        }
        for conn in std::mem::take(&mut self.speaking) {
            self.serve_far(shell, conn);
        }
        if self.owes > 0 {
            self.tell_ends(shell.peers);
        }
    }

    fn tell_ends(&mut self, peers: &mut PeerLinks) {
        let Self { shard, owed, owes, record, .. } = self;
        for owed in owed.iter_mut().filter(|owed| !owed.is_empty()) {
            while let Some(Owed { to, id, said }) = owed.front().copied() {
                Record { id, said }.encode(record);
                match peers.send(to.node(), (*shard, to.within()), record) {
                    Ok(()) | Err(NotSent::TooLarge) => {}
                    Err(NotSent::Full | NotSent::Away) => break,
                }
                owed.pop_front();
                *owes -= 1;
            }
        }
    }

    /// Ends what had its time.
    pub fn due(&mut self, shell: &mut Shell<'_, '_>) {
        let now_us = shell.now_us();
        while let Some((_, conn)) = self.opening.pop_front_if(|(at_us, _)| *at_us <= now_us) {
            self.open_too_long(now_us, conn);
        }
        while let Some((_, conn)) = self.ending.pop_front_if(|(at_us, _)| *at_us <= now_us) {
            self.close_near(shell.net, conn);
            self.close_far(shell, conn);
        }
    }

    /// When [`Tunnels::due`] has something to do, in monotonic microseconds.
    pub fn next_deadline_us(&self) -> Option<u64> {
        let fronts = [self.opening.front(), self.ending.front()];
        fronts.into_iter().flatten().map(|(at_us, _)| *at_us).min()
    }

    /// Whether the core may stop: nobody waits for an answer from another node, or has waited long enough.
    pub fn is_quiet(&self, now_us: u64) -> bool {
        self.counters.held == 0 || self.grace_us.is_some_and(|at_us| at_us <= now_us)
    }

    /// Connections that are here and that the shard does not count.
    pub fn held(&self) -> u64 {
        self.counters.held
    }

    pub fn counters(&self) -> TunnelCounters {
        self.counters
    }
}

/// The name of a tunnel: that of its client's connection, which the net gives only once.
fn id_of(conn: ConnId) -> TunnelId {
    TunnelId(u64::from(conn.generation) << 32 | u64::from(conn.slot))
}

fn conn_of(id: TunnelId) -> ConnId {
    ConnId { slot: id.0 as u32, generation: (id.0 >> 32) as u32 }
}

/// The place of a slot in a table that grows with them.
fn place<T>(table: &mut Vec<Option<Box<T>>>, conn: ConnId) -> Option<&mut Option<Box<T>>> {
    let slot = conn.slot as usize;
    if table.len() <= slot {
        table.resize_with(slot + 1, || None);
    }
    table.get_mut(slot)
}
