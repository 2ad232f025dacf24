//! Links to the other nodes of a cluster, as one core has them: one to each, driven by the core's own loop over the same
//! net as its clients, so a link costs no thread and its bytes go out once a turn. Owned by the core's thread.
//!
//! - Link number k lives on core k of each node (modulo its cores): it carries what core k of either side sends. A node with
//!   more cores than this one brings links that this one only receives by.
//! - TLS is used sans-IO ([`wire`]). The side that is called reads the hello before it knows which core the link is for, and
//!   passes socket and TLS state on over the lanes.
//! - What a link promises is in [`ringline_cluster::link`]: in order, once each, as long as both processes live.
//! - Every connection that comes to nothing is counted by a named reason ([`refused`]).
//!
//! Invariants: at most one connection carries a link; at most one buffer of a connection is in flight; nothing of an old
//! process of a peer is given out after its [`PeerEvent::Reset`]; per link at most a window of batches waits here, and what
//! lanes can't take stays in it, so that a slow core slows the peer down and not this node's memory up.

mod conn;
pub mod door;
mod flow;
mod greet;
pub mod refused;
pub mod roster;
pub mod secure;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use ringline_cluster::link::channel::OUT_BYTES_MAX;
use ringline_cluster::link::hello::{Hello, Incarnation, is_dialled_by_the_right_one};
use ringline_cluster::link::line::{Line, Process, Sender, Told};
use ringline_cluster::link::{batch, frame};
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::router::Board;
use ringline_core::event::ConnId;

use self::conn::Conn;
use self::door::Arrivals;
use self::flow::Link;
use self::refused::{Reason, Refused, RefusedCounts};
use self::roster::Roster;
use self::wire::Wire;
use crate::net::Admission;

/// What a core hears of other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// The node is there with so many shards; [`PeerLinks::send`] takes messages for it.
    Up { node: NodeIndex, shards: u16, incarnation: Incarnation },
    /// It is not, or was not heard of for [`ringline_cluster::link::channel::SILENCE_MS`]. What is under way still arrives if
    /// the same process comes back.
    Down { node: NodeIndex },
    /// The node is a new process, after `Down` and before `Up`: what was under way either way is lost.
    Reset { node: NodeIndex },
    /// In order per sending shard. The bytes have no alignment.
    Message { node: NodeIndex, from_shard: u16, payload: Bytes },
}

/// Why [`PeerLinks::send`] did not take a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// As many bytes wait for the node as may; there is room again when it takes some.
    #[error("the link has no room")]
    Full,
    /// The node is not up.
    #[error("the node is away")]
    Away,
    /// Above [`batch::PAYLOAD_BYTES_MAX`]: no link ever takes it.
    #[error("the message is larger than any link takes")]
    TooLarge,
}

/// What cores pass to each other about links, over the lanes.
#[derive(Debug)]
pub enum PeerLane {
    /// A message for a shard whose core does not have the link that it came by.
    Message { node: NodeIndex, process: Process, from_shard: u16, payload: Bytes },
    /// A connection for a link of that core.
    Guest(Box<Guest>),
}

/// A connection that has said hello, on its way to the core of its link.
#[derive(Debug)]
pub struct Guest {
    socket: OwnedFd,
    wire: Wire,
    node: NodeIndex,
    hello: Hello,
}

/// Counters of one core's links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerCounters {
    pub dials: u64,
    pub accepted: u64,
    /// Connections that came to carry a link.
    pub connected: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub batches_sent: u64,
    /// Batches that went out once more on a later connection.
    pub batches_sent_again: u64,
    pub batches_received: u64,
    /// Batches that came once more, and were dropped.
    pub batches_again: u64,
    pub messages_sent: u64,
    pub messages_received: u64,
    /// Messages passed to the core that they are for.
    pub messages_passed: u64,
    /// Messages not taken because the link was full.
    pub full: u64,
    /// Messages of a process that has been replaced, or for no shard that there is.
    pub dropped: u64,
    /// Processes of peers that were replaced.
    pub resets: u64,
    pub refused: RefusedCounts,
}

/// One link, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkStatus {
    pub node: String,
    pub address: String,
    /// The core, here and there.
    pub number: u16,
    /// Whether this node also sends by it.
    pub is_own: bool,
    pub up: bool,
    pub for_ms: u64,
    pub incarnation: u64,
    pub shards: u16,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    /// Bytes sent or waiting that the peer has not acknowledged.
    pub waiting_bytes: u64,
}

impl LinkStatus {
    /// One line of `GET /cluster`.
    pub fn to_json(&self, core: u16) -> serde_json::Value {
        let Self { node, address, number, is_own, up, for_ms, incarnation, shards, .. } = self;
        serde_json::json!({
            "core": core, "node": node, "address": address, "link": number, "sends": is_own, "up": up, "for_ms": for_ms,
            "incarnation": incarnation, "cores": shards, "bytes_received": self.bytes_received,
            "bytes_sent": self.bytes_sent, "waiting_bytes": self.waiting_bytes,
        })
    }
}

/// All of a core's links at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerSnapshot {
    pub counters: PeerCounters,
    pub links: Vec<LinkStatus>,
}

impl PeerSnapshot {
    /// Links to other nodes that this core sends by and that are up, and all of them.
    pub fn levels(&self) -> (u64, u64) {
        let own = self.links.iter().filter(|link| link.is_own);
        (own.clone().filter(|link| link.up).count() as u64, own.count() as u64)
    }
}

/// See the module.
pub struct PeerLinks {
    roster: Arc<Roster>,
    /// Where it is put up how many clients nodes have.
    board: Arc<Board>,
    shard: u16,
    admission: Arc<Admission>,
    arrivals: Arrivals,
    /// Those that this core sends by and those that only bring something. None ever goes: a node that is not listed any more
    /// is not dialled, and finds its link when it is back.
    links: Vec<Link>,
    /// By number of node: the place of the link that this core sends by.
    own_links: Vec<Option<usize>>,
    conns: HashMap<ConnId, Conn>,
    /// By slot: whether one of ours sits there. Looked at for every event of the net.
    marks: Vec<bool>,
    /// Connections whose hello was read and whose link is another core's.
    leaving: Vec<ConnId>,
    /// Connections to close as soon as the net can be called.
    closing: Vec<ConnId>,
    events: Vec<PeerEvent>,
    /// Reused.
    told: Vec<Told>,
    pumped: Vec<ConnId>,
    counters: PeerCounters,
    refused: Refused,
}

impl PeerLinks {
    /// Of core `shard`. `now_ms` is monotonic, as everywhere here.
    pub fn new(
        roster: Arc<Roster>,
        shard: u16,
        (admission, arrivals): (Arc<Admission>, Arrivals),
        now_ms: u64,
    ) -> Self {
        let mut links = Self {
            roster,
            board: Arc::default(),
            shard,
            admission,
            arrivals,
            links: Vec::new(),
            own_links: Vec::new(),
            conns: HashMap::new(),
            marks: Vec::new(),
            leaving: Vec::new(),
            closing: Vec::new(),
            events: Vec::new(),
            told: Vec::new(),
            pumped: Vec::new(),
            counters: PeerCounters::default(),
            refused: Refused::default(),
        };
        links.open_links(now_ms);
        links
    }

    /// Nodes have come or gone, or have other addresses. Those that have gone are down at once and refused from here on;
    /// a connection to one that has moved stays as long as it lives, and the next goes to the new address.
    pub fn set_roster(&mut self, roster: Arc<Roster>, now_ms: u64) {
        self.roster = roster;
        self.open_links(now_ms);
        for at in 0..self.links.len() {
            let Some(link) = self.links.get_mut(at) else { break };
            let is_listed = self.roster.node(link.node).is_some_and(|node| node.is_listed);
            if link.is_wanted == is_listed {
                continue;
            }
            link.is_wanted = is_listed;
            let conn = if is_listed { None } else { link.conn.take() };
            if !is_listed {
                link.line.gone((now_ms, rand::random()), &mut self.told);
                self.tell(at);
            }
            if let Some(conn) = conn {
                self.close_later(conn);
            }
        }
    }

    /// A link of this core to every node that is listed.
    fn open_links(&mut self, now_ms: u64) {
        for (node, other) in self.roster.others() {
            let at = usize::from(node.0);
            if self.own_links.len() <= at {
                self.own_links.resize(at + 1, None);
            }
            let Some(place @ None) = self.own_links.get_mut(at) else { continue };
            *place = Some(self.links.len());
            let right = is_dialled_by_the_right_one(self.roster.own_name(), &other.name);
            self.links.push(Link::new((node, self.shard), Line::new((true, right), now_ms)));
        }
    }

    /// With the board of this node.
    pub fn with_board(self, board: Arc<Board>) -> Self {
        Self { board, ..self }
    }

    /// Puts a message into the next flush. `from_shard` and `to_shard` count within their nodes.
    ///
    /// Errors: [`NotSent`]; nothing was taken.
    pub fn send(&mut self, node: NodeIndex, (from_shard, to_shard): (u16, u16), payload: &[u8]) -> Result<(), NotSent> {
        if payload.len() > batch::PAYLOAD_BYTES_MAX {
            return Err(NotSent::TooLarge);
        }
        let Some(link) = self.own_link(node).and_then(|at| self.links.get_mut(at)) else { return Err(NotSent::Away) };
        if !link.line.is_up() {
            return Err(NotSent::Away);
        }
        if link.line.channel().kept_bytes() + link.batch.len() >= OUT_BYTES_MAX {
            self.counters.full += 1;
            return Err(NotSent::Full);
        }
        if link.batch.len() + batch::item_bytes(payload) > frame::BATCH_BYTES_MAX {
            link.offer(&mut self.counters);
        }
        batch::append(&mut link.batch, (from_shard, to_shard), payload);
        self.counters.messages_sent += 1;
        Ok(())
    }

    /// A message that came has no meaning here: its sender has a defect, or another version.
    pub fn meaningless(&mut self, node: NodeIndex, why: &dyn std::fmt::Display, now_ms: u64) {
        let who = format!("node {}", self.roster.name(node));
        self.refused.note(Reason::Garbage, now_ms, (&who, why));
        self.counters.dropped += 1;
    }

    /// This node.
    pub fn node(&self) -> NodeIndex {
        self.roster.own()
    }

    /// Whether messages for a node are taken.
    pub fn is_up(&self, node: NodeIndex) -> bool {
        self.own_link(node).and_then(|at| self.links.get(at)).is_some_and(|link| link.line.is_up())
    }

    /// The place of this core's own link to a node.
    fn own_link(&self, node: NodeIndex) -> Option<usize> {
        *self.own_links.get(usize::from(node.0))?
    }

    /// A message of a node came by a link of another number: whether it is of the process that is known. What it says of
    /// that process is told first.
    fn is_of_known_process(&mut self, node: NodeIndex, process: Process, now_ms: u64) -> bool {
        let Some(at) = self.own_link(node) else { return false };
        let Some(link) = self.links.get_mut(at).filter(|link| link.is_wanted) else { return false };
        let sender = link.line.heard_of(process, now_ms, &mut self.told);
        let conn = if sender == Sender::New { link.conn.take() } else { None };
        self.roster.saw(node, process.incarnation);
        self.tell(at);
        if let Some(conn) = conn {
            self.close_later(conn);
        }
        sender != Sender::Old
    }

    /// Passes on what a line says, logged and with what it means for the link.
    fn tell(&mut self, at: usize) {
        let Some(link) = self.links.get_mut(at) else { return };
        let (node, own) = (link.node, link.number == self.shard);
        let name = self.roster.name(node);
        for told in self.told.drain(..) {
            if told == Told::Reset {
                link.forget(&mut self.counters);
            }
            // What a link that only brings something says of the node, the core's own link says too.
            if !own {
                continue;
            }
            let shard = self.shard;
            self.events.push(match told {
                Told::Up(Process { incarnation, shards }) => {
                    tracing::info!(shard, incarnation = incarnation.0, shards, "node {name} is up");
                    PeerEvent::Up { node, shards, incarnation }
                }
                Told::Down => {
                    tracing::warn!(shard, "node {name} is down");
                    PeerEvent::Down { node }
                }
                Told::Reset => {
                    tracing::warn!(shard, "node {name} is a new process: what was under way is lost");
                    PeerEvent::Reset { node }
                }
            });
        }
    }

    /// Counters and links, for the metrics and `ringline cluster status`.
    pub fn snapshot(&self, now_ms: u64) -> PeerSnapshot {
        let again: u64 = self.links.iter().map(|link| link.line.channel().sent_again()).sum();
        let mut counters = PeerCounters { refused: self.refused.counts(), batches_sent_again: again, ..self.counters };
        counters.refused[Reason::TooMany as usize] += self.arrivals.turned_away();
        let listed = self.links.iter().filter(|link| link.is_wanted);
        PeerSnapshot { counters, links: listed.map(|link| self.status(link, now_ms)).collect() }
    }

    fn status(&self, link: &Link, now_ms: u64) -> LinkStatus {
        let process = link.line.process();
        LinkStatus {
            node: self.roster.name(link.node).to_owned(),
            address: self.roster.node(link.node).map_or(String::new(), |node| node.address.to_string()),
            number: link.number,
            is_own: link.number == self.shard,
            up: link.line.is_up(),
            for_ms: now_ms.saturating_sub(link.line.since_ms()),
            incarnation: process.map_or(0, |process| process.incarnation.0),
            shards: process.map_or(0, |process| process.shards),
            bytes_received: link.bytes_received,
            bytes_sent: link.bytes_sent,
            waiting_bytes: link.line.channel().kept_bytes() as u64,
        }
    }
}
