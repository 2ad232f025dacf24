//! What flows over the links of a core: frames in and out, messages to this core and past it. Owned by the core's thread.

use std::collections::VecDeque;

use bytes::Bytes;
use ringline_cluster::link::batch::{Item, Items};
use ringline_cluster::link::channel::Heard;
use ringline_cluster::link::frame::Frame;
use ringline_cluster::link::line::{Line, Process};
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::ConnId;

use super::conn::Stage;
use super::refused::Reason;
use super::{PeerCounters, PeerEvent, PeerLane, PeerLinks};
use crate::lanes::{LaneEnd, LaneItem};
use crate::net::{Net, Sending};

/// Bytes that one buffer to a socket is filled up to; a batch goes over it.
const SEND_BYTES_MAX: usize = 256 * 1024;
/// Buffers of one connection that the kernel takes at once in one turn.
const SENDS_PER_TURN_MAX: usize = 4;
/// Bytes of batches of one link that are worked off in one turn.
const DRAIN_BYTES_MAX: usize = 1024 * 1024;

/// One link of this core.
#[derive(Debug)]
pub(super) struct Link {
    pub node: NodeIndex,
    pub number: u16,
    /// Whether the node is listed; otherwise it is not dialled.
    pub is_wanted: bool,
    pub line: Line,
    /// The connection that carries it.
    pub conn: Option<ConnId>,
    /// Messages for the next flush.
    pub batch: Vec<u8>,
    /// Batches to be worked off, and who sent them.
    inbox: VecDeque<(Process, Bytes)>,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

impl Link {
    pub fn new((node, number): (NodeIndex, u16), line: Line) -> Self {
        Self {
            node,
            number,
            is_wanted: true,
            line,
            conn: None,
            batch: Vec::new(),
            inbox: VecDeque::new(),
            bytes_received: 0,
            bytes_sent: 0,
        }
    }

    /// When something is to be done on it even if nothing happens.
    pub fn next_ms(&self) -> Option<u64> {
        self.line.next_ms().filter(|_| self.is_wanted)
    }

    /// Gives the collected messages to the channel.
    pub fn offer(&mut self, counters: &mut PeerCounters) {
        if self.batch.is_empty() {
            return;
        }
        // `send` has seen to the room.
        match self.line.channel_mut().offer(Bytes::from(std::mem::take(&mut self.batch))) {
            Ok(()) => counters.batches_sent += 1,
            Err(full) => debug_assert!(false, "{full}"),
        }
    }

    /// The process at the other end was replaced: what it sent and what was meant for it is gone.
    pub fn forget(&mut self, counters: &mut PeerCounters) {
        self.inbox.clear();
        self.batch.clear();
        counters.resets += 1;
    }
}

impl PeerLinks {
    /// Reads the frames of a connection that carries a link.
    pub(super) fn hear(&mut self, conn: ConnId, at: usize, now_ms: u64) {
        loop {
            let Some(own) = self.conns.get_mut(&conn) else { return };
            let Some(link) = self.links.get_mut(at).filter(|link| link.conn == Some(conn)) else { return };
            let frame = match Frame::decode(&mut own.wire.inbound) {
                Ok(None) => return,
                Ok(Some(frame)) => frame,
                Err(error) => return self.refuse_frame(conn, &error, now_ms),
            };
            match link.line.channel_mut().hear(frame, now_ms) {
                Ok(Heard::Nothing) => {}
                Ok(Heard::Clients(clients)) => self.board.report(link.node, clients),
                Ok(Heard::Again) => self.counters.batches_again += 1,
                Ok(Heard::Batch(bytes)) => {
                    self.counters.batches_received += 1;
                    if let Some(process) = link.line.process() {
                        link.inbox.push_back((process, bytes));
                    }
                }
                Ok(Heard::Bye) => {
                    link.line.gone((now_ms, rand::random()), &mut self.told);
                    link.conn = None;
                    self.tell(at);
                    return self.close_later(conn);
                }
                Err(violation) => return self.refuse(conn, Reason::from(&violation), &violation, now_ms),
            }
        }
    }

    /// Gives out what has come: events and messages of this core to `out`, messages of other cores to the lanes. While a
    /// lane is full nothing is worked off, and the peers run out of credit.
    pub fn drain(&mut self, lanes: &mut LaneEnd, out: &mut Vec<PeerEvent>, now_ms: u64) {
        out.append(&mut self.events);
        for at in 0..self.links.len() {
            let mut drained = 0;
            while drained < DRAIN_BYTES_MAX && !lanes.is_blocked() {
                let Some(link) = self.links.get_mut(at) else { break };
                let Some((process, bytes)) = link.inbox.pop_front() else { break };
                drained += bytes.len();
                link.line.channel_mut().worked_off(&bytes);
                let (node, own) = (link.node, link.number == self.shard);
                self.work_off((node, own.then_some(at)), (process, bytes), lanes, now_ms);
                out.append(&mut self.events);
            }
        }
    }

    /// `own`: it came by this core's own link, so its process is the one that is known.
    fn work_off(
        &mut self,
        (node, own): (NodeIndex, Option<usize>),
        (process, bytes): (Process, Bytes),
        lanes: &mut LaneEnd,
        now_ms: u64,
    ) {
        for item in Items(bytes) {
            let Ok(Item { from_shard, to_shard, payload }) = item else {
                let why = format!("a batch of node {} does not add up", self.roster.name(node));
                self.refused.note(Reason::Garbage, now_ms, ("a link", &why));
                return;
            };
            self.counters.messages_received += 1;
            if from_shard >= process.shards {
                self.counters.dropped += 1;
            } else if to_shard == self.shard {
                if own.is_some() || self.is_of_known_process(node, process, now_ms) {
                    self.events.push(PeerEvent::Message { node, from_shard, payload });
                } else {
                    self.counters.dropped += 1;
                }
            } else if to_shard < self.roster.shards() {
                self.counters.messages_passed += 1;
                let message = PeerLane::Message { node, process, from_shard, payload };
                lanes.push(ShardIndex(to_shard), LaneItem::Peer(message));
            } else {
                self.counters.dropped += 1;
            }
        }
    }

    /// Something that another core passed on. Messages and events go to `out`.
    pub fn from_lane(&mut self, item: PeerLane, net: &mut dyn Net, out: &mut Vec<PeerEvent>, now_ms: u64) {
        match item {
            PeerLane::Message { node, process, from_shard, payload } => {
                let known = self.is_of_known_process(node, process, now_ms);
                out.append(&mut self.events);
                if known {
                    out.push(PeerEvent::Message { node, from_shard, payload });
                } else {
                    self.counters.dropped += 1;
                }
            }
            PeerLane::Guest(guest) => {
                self.take_guest(net, *guest, now_ms);
                out.append(&mut self.events);
            }
        }
    }

    /// Whether something waits to be drained.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty() || self.links.iter().any(|link| !link.inbox.is_empty())
    }

    /// Whether all messages given to [`PeerLinks::send`] have been given to the kernel, as far as the peers let it.
    pub fn is_quiet(&self) -> bool {
        !self.has_events() && !self.has_unsent()
    }

    /// Sends what this turn has to say, one buffer a connection. Once a turn.
    pub fn flush(&mut self, net: &mut dyn Net, now_ms: u64) {
        for link in &mut self.links {
            link.offer(&mut self.counters);
        }
        let mut conns = std::mem::take(&mut self.pumped);
        conns.extend(self.conns.keys());
        for conn in conns.drain(..) {
            self.pump(net, conn, now_ms);
        }
        self.pumped = conns;
    }

    /// Whether [`PeerLinks::send`] has taken something since the last flush.
    pub fn has_unsent(&self) -> bool {
        self.links.iter().any(|link| !link.batch.is_empty())
    }

    fn pump(&mut self, net: &mut dyn Net, conn: ConnId, now_ms: u64) {
        let mut frames = Vec::new();
        for _ in 0..SENDS_PER_TURN_MAX {
            let Some(own) = self.conns.get_mut(&conn).filter(|own| !own.in_flight) else { return };
            if let Stage::Live(at) = own.stage
                && let Some(link) = self.links.get_mut(at).filter(|link| link.conn == Some(conn))
            {
                frames.clear();
                while frames.len() < SEND_BYTES_MAX
                    && let Some(mut frame) = link.line.channel_mut().next_frame(now_ms)
                {
                    if let Frame::Beat { clients } = &mut frame {
                        *clients = self.board.clients();
                        // As old as what the others know, so that all are compared alike.
                        self.board.report(self.roster.own(), *clients);
                    }
                    frame.encode(&mut frames);
                }
                own.wire.write(&frames);
            }
            let Some(buffer) = own.wire.take_output() else {
                if let Stage::Ending { finished } = &mut own.stage
                    && !std::mem::replace(finished, true)
                {
                    net.finish(conn);
                }
                return;
            };
            match net.send(conn, buffer) {
                Sending::Done(buffer) => self.sent(conn, buffer.len(), true),
                Sending::InFlight { bytes } => {
                    own.in_flight = true;
                    self.sent(conn, bytes, false);
                    return;
                }
            }
        }
    }
}
