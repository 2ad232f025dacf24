//! Connections between nodes on one core's net, from their socket to their end. Owned by the core's thread.
//!
//! States: greeting → carrying a link → ending, or greeting → leaving → (on another core). A connection that does not
//! get through its greeting or its ending in time is closed.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use ringline_cluster::link::frame::Frame;
use ringline_cluster::link::hello::Hello;
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::ConnId;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::flow::Link;
use super::refused::Reason;
use super::wire::Wire;
use super::{Guest, PeerLane, PeerLinks};
use crate::lanes::{LaneEnd, LaneItem};
use crate::net::{Flow, Net, NetEvent};

/// How long a connection may take from its first byte to a hello that was judged.
pub const GREETING_MS: u64 = 5_000;
/// How long one that was refused may take to read why.
const ENDING_MS: u64 = 1_000;
/// Connections of one core that have not said hello yet; over it new ones are closed.
const GREETINGS_MAX: usize = 64;

/// Who dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// This core, for the link at that place.
    Dialled(usize),
    Accepted,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Until both hellos are judged.
    Greeting { hello_sent: bool },
    /// Its link is another core's.
    Leaving { node: NodeIndex, hello: Hello },
    /// Carries the link at that place.
    Live(usize),
    /// What is left to say is sent, nothing is heard any more.
    Ending { finished: bool },
}

#[derive(Debug)]
pub(super) struct Conn {
    pub wire: Wire,
    pub role: Role,
    pub stage: Stage,
    pub in_flight: bool,
    /// Not looked at while it carries a link.
    pub deadline_ms: u64,
}

impl Conn {
    fn is_greeting(&self) -> bool {
        matches!(self.stage, Stage::Greeting { .. } | Stage::Leaving { .. })
    }
}

impl PeerLinks {
    /// Whether events about this connection are for [`PeerLinks`] and not for clients.
    fn owns(&self, conn: ConnId) -> bool {
        self.marks.get(conn.slot as usize).copied().unwrap_or(false) && self.conns.contains_key(&conn)
    }

    /// Takes an event of the net if it is about one of these connections, and gives it back otherwise.
    pub fn take<'a>(&mut self, event: NetEvent<'a>, lanes: &mut LaneEnd, now_ms: u64) -> Result<Flow, NetEvent<'a>> {
        match event {
            NetEvent::Received { conn, bytes } if self.owns(conn) => return Ok(self.received(conn, bytes, now_ms)),
            NetEvent::Sent { conn, bytes, ref buffer } if self.owns(conn) => self.sent(conn, bytes, buffer.is_some()),
            NetEvent::Closed { conn, .. } if self.owns(conn) => self.closed(conn, now_ms),
            NetEvent::Detached { conn, socket } if self.owns(conn) => self.detached(conn, socket, lanes),
            other => return Err(other),
        }
        Ok(Flow::Continue)
    }

    fn mark(&mut self, conn: ConnId, owned: bool) {
        let slot = conn.slot as usize;
        if self.marks.len() <= slot {
            self.marks.resize(slot + 1, false);
        }
        if let Some(mark) = self.marks.get_mut(slot) {
            *mark = owned;
        }
    }

    pub(super) fn seat(&mut self, conn: ConnId, (wire, role, stage): (Wire, Role, Stage), now_ms: u64) {
        self.mark(conn, true);
        let deadline_ms = now_ms + GREETING_MS;
        self.conns.insert(conn, Conn { wire, role, stage, in_flight: false, deadline_ms });
    }

    fn unseat(&mut self, conn: ConnId) -> Option<Conn> {
        self.mark(conn, false);
        self.conns.remove(&conn)
    }

    /// Gives a socket to the net. It counts as a connection of the node, and is not refused when clients have all places:
    /// a cluster must hold together then too.
    fn take_in(&mut self, net: &mut dyn Net, socket: OwnedFd) -> std::io::Result<ConnId> {
        self.admission.enter_always();
        net.adopt(socket)
    }

    /// Bytes came.
    fn received(&mut self, conn: ConnId, bytes: &[u8], now_ms: u64) -> Flow {
        let Some(own) = self.conns.get_mut(&conn) else { return Flow::Stop };
        if matches!(own.stage, Stage::Ending { .. }) {
            return Flow::Continue;
        }
        self.counters.bytes_received += bytes.len() as u64;
        if let Stage::Live(at) = own.stage
            && let Some(link) = self.links.get_mut(at)
        {
            link.bytes_received += bytes.len() as u64;
        }
        match own.wire.receive(bytes) {
            Ok(()) => self.advance(conn, now_ms),
            Err(error) => self.refuse(conn, Reason::from(&error), &error, now_ms),
        }
        // What follows is for the core that it goes to.
        match self.conns.get(&conn).map(|own| &own.stage) {
            Some(Stage::Leaving { .. }) | None => Flow::Stop,
            Some(Stage::Greeting { .. } | Stage::Live(_) | Stage::Ending { .. }) => Flow::Continue,
        }
    }

    /// A buffer is in the kernel.
    pub(super) fn sent(&mut self, conn: ConnId, bytes: usize, is_last: bool) {
        let Some(own) = self.conns.get_mut(&conn) else { return };
        own.in_flight &= !is_last;
        self.counters.bytes_sent += bytes as u64;
        if let Stage::Live(at) = own.stage
            && let Some(link) = self.links.get_mut(at)
        {
            link.bytes_sent += bytes as u64;
        }
    }

    /// The socket is gone.
    fn closed(&mut self, conn: ConnId, now_ms: u64) {
        if let Some(own) = self.unseat(conn) {
            self.over((conn, own.role, &own.stage), now_ms);
        }
    }

    /// What the end of a connection means for its link.
    fn over(&mut self, (conn, role, stage): (ConnId, Role, &Stage), now_ms: u64) {
        match (stage, role) {
            (Stage::Live(at), _) => {
                // One that was replaced is not the link's any more.
                if let Some(link) = self.links.get_mut(*at).filter(|link| link.conn == Some(conn)) {
                    link.conn = None;
                    link.line.lost(now_ms, rand::random());
                }
            }
            (Stage::Greeting { .. } | Stage::Leaving { .. }, Role::Dialled(at)) => {
                if let Some(link) = self.links.get_mut(at) {
                    link.line.dial_failed(now_ms, rand::random());
                }
            }
            (Stage::Greeting { .. } | Stage::Leaving { .. }, Role::Accepted) | (Stage::Ending { .. }, _) => {}
        }
    }

    /// The peer of this connection is refused: counted, told by what is queued already, closed.
    pub(super) fn refuse(&mut self, conn: ConnId, reason: Reason, why: &dyn std::fmt::Display, now_ms: u64) {
        let who = match self.conns.get(&conn).map(|own| (own.role, &own.stage)) {
            Some((Role::Dialled(at), _)) | Some((Role::Accepted, &Stage::Live(at))) => {
                let node = self.links.get(at).map(|link| link.node);
                format!("node {}", node.map_or("", |node| self.roster.name(node)))
            }
            Some((Role::Accepted, _)) | None => "the peer port".to_owned(),
        };
        self.refused.note(reason, now_ms, (&who, why));
        self.end(conn, now_ms);
    }

    /// Sends what is queued, then closes.
    pub(super) fn end(&mut self, conn: ConnId, now_ms: u64) {
        let Some(own) = self.conns.get_mut(&conn) else { return };
        let stage = std::mem::replace(&mut own.stage, Stage::Ending { finished: false });
        own.deadline_ms = now_ms + ENDING_MS;
        let role = own.role;
        self.over((conn, role, &stage), now_ms);
    }

    /// Closes without another word, as soon as the net can be called.
    pub(super) fn close_later(&mut self, conn: ConnId) {
        if let Some(own) = self.conns.get_mut(&conn) {
            own.stage = Stage::Ending { finished: true };
            self.closing.push(conn);
        }
    }

    /// What the polling of the net could not do itself, and what has come to the peer port. After every poll.
    pub fn tend(&mut self, net: &mut dyn Net, lanes: &mut LaneEnd, now_ms: u64) {
        for conn in std::mem::take(&mut self.closing) {
            if self.unseat(conn).is_some() {
                net.close(conn);
            }
        }
        self.let_go(net, lanes);
        while let Some(socket) = self.arrivals.next() {
            self.welcome(net, socket, now_ms);
        }
    }

    /// Whether [`PeerLinks::tend`] has something to do. To be asked before a sleep.
    pub fn is_called(&self) -> bool {
        !self.arrivals.is_empty() || !self.closing.is_empty()
    }

    fn welcome(&mut self, net: &mut dyn Net, socket: OwnedFd, now_ms: u64) {
        if self.conns.values().filter(|own| own.is_greeting()).count() >= GREETINGS_MAX {
            self.refused.note(Reason::TooMany, now_ms, ("the peer port", &"closed unread"));
            return;
        }
        let wire = match Wire::accepted(self.roster.identity()) {
            Ok(wire) => wire,
            Err(error) => return self.refused.note(Reason::Tls, now_ms, ("the peer port", &error)),
        };
        match self.take_in(net, socket) {
            Ok(conn) => {
                self.counters.accepted += 1;
                self.seat(conn, (wire, Role::Accepted, Stage::Greeting { hello_sent: false }), now_ms);
            }
            Err(error) => tracing::warn!(%error, "a connection of a node could not be taken in"),
        }
    }

    /// Lets go of connections whose link is another core's, when nothing of them is in flight.
    fn let_go(&mut self, net: &mut dyn Net, lanes: &mut LaneEnd) {
        for conn in std::mem::take(&mut self.leaving) {
            let Some(own) = self.conns.get(&conn) else { continue };
            if !matches!(own.stage, Stage::Leaving { .. }) {
                continue;
            }
            if own.in_flight {
                self.leaving.push(conn);
                continue;
            }
            if let Some(socket) = net.detach(conn) {
                self.detached(conn, socket, lanes);
            }
        }
    }

    /// A leaving connection is out of the net.
    fn detached(&mut self, conn: ConnId, socket: OwnedFd, lanes: &mut LaneEnd) {
        let Some(Conn { wire, stage: Stage::Leaving { node, hello }, .. }) = self.unseat(conn) else { return };
        let to = ShardIndex(hello.core % self.roster.shards().max(1));
        lanes.push(to, LaneItem::Peer(PeerLane::Guest(Box::new(Guest { socket, wire, node, hello }))));
    }

    /// A connection that another core has greeted, for a link of this one.
    pub(super) fn take_guest(&mut self, net: &mut dyn Net, guest: Guest, now_ms: u64) {
        let Guest { socket, wire, node, hello } = guest;
        // It has its place among the connections already.
        match net.adopt(socket) {
            Ok(conn) => {
                self.seat(conn, (wire, Role::Accepted, Stage::Greeting { hello_sent: false }), now_ms);
                self.settle(conn, (node, hello), now_ms);
                self.advance(conn, now_ms);
            }
            Err(error) => tracing::warn!(%error, "a connection of a node could not be taken in"),
        }
    }

    /// Everything that time alone causes: dials, beats, silences, deadlines. Once a turn, before [`PeerLinks::flush`].
    pub fn tick(&mut self, net: &mut dyn Net, now_ms: u64) {
        let late = |(_, own): &(&ConnId, &Conn)| !matches!(own.stage, Stage::Live(_)) && own.deadline_ms <= now_ms;
        let late: Vec<ConnId> = self.conns.iter().filter(late).map(|(conn, _)| *conn).collect();
        for conn in late {
            self.too_late(net, conn, now_ms);
        }
        for at in 0..self.links.len() {
            let due = |link: &&mut Link| link.next_ms().is_some_and(|at_ms| at_ms <= now_ms);
            let Some(link) = self.links.get_mut(at).filter(due) else { continue };
            let silent = link.line.tick((now_ms, rand::random()), &mut self.told);
            let conn = if silent { link.conn.take() } else { None };
            let dials = link.line.dial(now_ms);
            self.tell(at);
            if let Some(conn) = conn
                && self.unseat(conn).is_some()
            {
                net.close(conn);
            }
            if dials {
                self.dial(net, at, now_ms);
            }
        }
    }

    fn too_late(&mut self, net: &mut dyn Net, conn: ConnId, now_ms: u64) {
        let Some(own) = self.conns.get(&conn) else { return };
        if let (Role::Accepted, Stage::Greeting { .. }) = (own.role, &own.stage) {
            self.refuse(conn, Reason::Late, &"it did not say who it is in time", now_ms);
        }
        net.close(conn);
        self.closed(conn, now_ms);
    }

    /// When [`PeerLinks::tick`] has something to do.
    pub fn next_ms(&self) -> Option<u64> {
        let conns = self.conns.values().filter(|own| !matches!(own.stage, Stage::Live(_))).map(|own| own.deadline_ms);
        conns.chain(self.links.iter().filter_map(Link::next_ms)).min()
    }

    fn dial(&mut self, net: &mut dyn Net, at: usize, now_ms: u64) {
        let Some(link) = self.links.get_mut(at) else { return };
        let Some(peer) = self.roster.node(link.node) else { return };
        self.counters.dials += 1;
        let wire = Wire::dialled(self.roster.identity(), &peer.name);
        let socket = connect(peer.address);
        let (wire, socket) = match (wire, socket) {
            (Ok(wire), Ok(socket)) => (wire, socket),
            (wire, socket) => {
                tracing::debug!(tls = ?wire.err(), socket = ?socket.err(), "node {} can't be dialled", peer.name);
                return link.line.dial_failed(now_ms, rand::random());
            }
        };
        match self.take_in(net, socket) {
            Ok(conn) => {
                self.seat(conn, (wire, Role::Dialled(at), Stage::Greeting { hello_sent: false }), now_ms);
                self.advance(conn, now_ms);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to a node could not be taken in");
                if let Some(link) = self.links.get_mut(at) {
                    link.line.dial_failed(now_ms, rand::random());
                }
            }
        }
    }

    /// Says goodbye on every link and gives the kernel a moment to take it, so that peers know at once.
    pub fn farewell(&mut self, net: &mut dyn Net, lanes: &mut LaneEnd, now_ms: u64) {
        const ROUNDS_MAX: usize = 40;
        const ROUND: std::time::Duration = std::time::Duration::from_millis(5);
        let live = |(_, own): &(&ConnId, &Conn)| matches!(own.stage, Stage::Live(_));
        let live: Vec<ConnId> = self.conns.iter().filter(live).map(|(conn, _)| *conn).collect();
        for conn in &live {
            if let Some(own) = self.conns.get_mut(conn) {
                let mut bye = Vec::new();
                Frame::Bye.encode(&mut bye);
                own.wire.write(&bye);
            }
            self.end(*conn, now_ms);
        }
        for _ in 0..ROUNDS_MAX {
            self.flush(net, now_ms);
            net.flush();
            if live.iter().all(|conn| self.conns.get(conn).is_none_or(|own| !own.in_flight)) {
                return;
            }
            net.wait(ROUND);
            let _ = net.poll(now_ms * 1_000, &mut |event| {
                // What clients still say is not heard any more.
                let _ = self.take(event, lanes, now_ms);
                Flow::Stop
            });
        }
    }
}

/// Begins to connect; the rest is told by the net, as the socket's first bytes or its end.
fn connect(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}
