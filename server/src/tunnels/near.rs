//! The gateway's side of the tunnels of one core: sockets of clients whose sessions are at other nodes. Owned by the core's
//! thread.
//!
//! States of a connection: opening (its owner has said nothing yet) → open → over (what is left is written, within
//! [`LINGER_US`]) → gone. Nothing of what passes is read; what the gateway says itself goes between two whole frames.

use ringline_cluster::link::tunnel::{Near, RECORD_HEAD_BYTES, Record, Said, TunnelId};
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::ConnId;
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::errors::ErrorCode;
use ringline_schema::message::{GoawayReason, Reply};

use super::{DRAIN_GRACE_US, LINGER_US, Shell, Tunnels, conn_of, id_of, place};
use crate::edge::Tunnelled;
use crate::net::{Flow, Net, NetEvent, Sending};
use crate::peers::NotSent;

/// How long an owner may say nothing to a LOGIN, which it times out itself after `limits.login_timeout_ms` (10 s). An owner of
/// a version without tunnels says nothing for ever.
const OPENING_US: u64 = 15_000_000;
/// Buffers of one connection written in one turn.
const WRITES_PER_TURN_MAX: usize = 4;
/// Clients whose owner was lost come back after this, and up to as long again, so that they do not come at once.
const COME_BACK_MS: u32 = 300;
/// What a client is told to wait whose LOGIN found nobody.
const RETRY_MS: u32 = 1_000;

/// A client held for another node.
pub(super) struct NearEnd {
    generation: u32,
    /// Of the LOGIN or REGISTER that it began with.
    request_id: u32,
    /// Who serves it.
    to: ShardIndex,
    tunnel: Near,
    in_flight: bool,
    /// Looked at in the next flush.
    active: bool,
    finished: bool,
}

// Each held client pays for it; see "Gateways" in tuning.md.
const _: () = assert!(size_of::<NearEnd>() <= 88);

fn find(table: &mut [Option<Box<NearEnd>>], conn: ConnId) -> Option<&mut NearEnd> {
    let near = table.get_mut(conn.slot as usize)?.as_mut()?;
    (near.generation == conn.generation).then_some(near.as_mut())
}

impl Tunnels {
    /// Takes over a connection whose user lives on another node.
    pub fn enter(&mut self, net: &mut dyn Net, Tunnelled { conn, to, bytes }: Tunnelled, now_us: u64) {
        let request_id = bytes.get(8..12).and_then(|id| id.first_chunk()).map_or(0, |id| u32::from_le_bytes(*id));
        let Some(place) = place(&mut self.near, conn) else { return };
        debug_assert!(place.is_none(), "slot {} has a tenant", conn.slot);
        let (tunnel, generation) = (Near::new(bytes), conn.generation);
        let near = NearEnd { generation, request_id, to, tunnel, in_flight: false, active: false, finished: false };
        *place = Some(Box::new(near));
        self.counters.held += 1;
        self.counters.opened += 1;
        self.opening.push_back((now_us + OPENING_US, conn));
        self.activate(conn);
        // The edge has stopped it.
        net.resume(conn);
        if self.grace_us.is_some() {
            self.say_goodbye(conn);
        }
    }

    fn holds(&self, conn: ConnId) -> bool {
        let near = self.near.get(conn.slot as usize).and_then(Option::as_ref);
        near.is_some_and(|near| near.generation == conn.generation)
    }

    /// Takes an event of the net if it is about a client held here, and gives it back otherwise.
    pub fn take<'a>(&mut self, event: NetEvent<'a>) -> Result<Flow, NetEvent<'a>> {
        match event {
            NetEvent::Received { conn, bytes } if self.holds(conn) => return Ok(self.client_says(conn, bytes)),
            NetEvent::Sent { conn, bytes, ref buffer } if self.holds(conn) => {
                self.written(conn, (bytes, buffer.is_some()));
            }
            NetEvent::Closed { conn, .. } if self.holds(conn) => self.forget_near(conn),
            other => return Err(other),
        }
        Ok(Flow::Continue)
    }

    fn activate(&mut self, conn: ConnId) {
        let Some(near) = find(&mut self.near, conn) else { return };
        if !std::mem::replace(&mut near.active, true) {
            self.active.push(conn);
        }
    }

    fn client_says(&mut self, conn: ConnId, bytes: &[u8]) -> Flow {
        let Some(near) = find(&mut self.near, conn) else { return Flow::Stop };
        let reads_on = near.tunnel.client_said(bytes);
        self.activate(conn);
        if reads_on { Flow::Continue } else { Flow::Stop }
    }

    fn written(&mut self, conn: ConnId, (bytes, is_last): (usize, bool)) {
        let Some(near) = find(&mut self.near, conn) else { return };
        near.tunnel.written(bytes);
        near.in_flight &= !is_last;
        self.activate(conn);
    }

    /// The socket is gone.
    fn forget_near(&mut self, conn: ConnId) {
        let Some(near) = find(&mut self.near, conn) else { return };
        let (to, known) = (near.to, near.tunnel.end());
        if let Some(place) = self.near.get_mut(conn.slot as usize) {
            *place = None;
        }
        self.counters.held -= 1;
        if known {
            self.owe(to, id_of(conn), Said::Left);
        }
    }

    /// Ends the tunnel of a client whose owner is not there, and tells the client to come back.
    fn lose(&mut self, now_us: u64, conn: ConnId) {
        let Some(near) = find(&mut self.near, conn).filter(|near| !near.tunnel.is_over()) else { return };
        let said = if near.tunnel.is_unanswered() {
            let code = ErrorCode::Unavailable;
            encoded(near.request_id, &Reply::Failure { code, retry_after_ms: RETRY_MS, detail: code.text() })
        } else {
            let reconnect_after_ms = COME_BACK_MS + spread(conn);
            let (reason, node, address) = (GoawayReason::Moved, "", "");
            encoded(0, &Reply::Goaway { reason, reconnect_after_ms, node, address })
        };
        near.tunnel.interject(&said);
        let (to, known) = (near.to, near.tunnel.end());
        if known {
            self.owe(to, id_of(conn), Said::Left);
        }
        self.counters.lost += 1;
        self.ending.push_back((now_us + LINGER_US, conn));
        self.activate(conn);
    }

    pub(super) fn open_too_long(&mut self, now_us: u64, conn: ConnId) {
        if find(&mut self.near, conn).is_some_and(|near| near.tunnel.is_unanswered()) {
            self.lose(now_us, conn);
        }
    }

    pub(super) fn lose_near(&mut self, now_us: u64, node: NodeIndex) {
        for conn in self.near_conns(|near| near.to.node() == node) {
            self.lose(now_us, conn);
        }
    }

    fn near_conns(&self, wanted: impl Fn(&NearEnd) -> bool) -> Vec<ConnId> {
        let all = self.near.iter().enumerate().filter_map(|(slot, near)| Some((slot as u32, near.as_ref()?)));
        let wanted = all.filter(|(_, near)| wanted(near));
        wanted.map(|(slot, near)| ConnId { slot, generation: near.generation }).collect()
    }

    /// The owner says something to the client.
    pub(super) fn owner_says(&mut self, shell: &mut Shell<'_, '_>, (from, id): (ShardIndex, TunnelId), frames: &[u8]) {
        let conn = conn_of(id);
        let Some(near) = find(&mut self.near, conn).filter(|near| near.to == from) else {
            return self.owe(from, id, Said::Left);
        };
        match near.tunnel.owner_said(frames) {
            Ok(()) => self.activate(conn),
            Err(error) => {
                let now_us = shell.now_us();
                shell.peers.meaningless(from.node(), &error, now_us / 1_000);
                self.lose(now_us, conn);
            }
        }
    }

    /// The owner has ended the session.
    pub(super) fn ended(&mut self, now_us: u64, (from, id): (ShardIndex, TunnelId)) {
        let conn = conn_of(id);
        let Some(near) = find(&mut self.near, conn).filter(|near| near.to == from && !near.tunnel.is_over()) else {
            return;
        };
        near.tunnel.end();
        self.ending.push_back((now_us + LINGER_US, conn));
        self.activate(conn);
    }

    /// The node stops: clients are told, and answers still come for a while.
    pub fn drain(&mut self, now_us: u64) {
        self.grace_us = Some(now_us + DRAIN_GRACE_US);
        for conn in self.near_conns(|near| !near.tunnel.is_over()) {
            self.say_goodbye(conn);
        }
    }

    fn say_goodbye(&mut self, conn: ConnId) {
        let (reason, node, address) = (GoawayReason::ShuttingDown, "", "");
        let goaway =
            encoded(0, &Reply::Goaway { reason, reconnect_after_ms: COME_BACK_MS + spread(conn), node, address });
        if let Some(near) = find(&mut self.near, conn) {
            near.tunnel.interject(&goaway);
        }
        self.activate(conn);
    }

    /// Writes what has come for the client, and puts on the link what it has said.
    pub(super) fn serve_near(&mut self, shell: &mut Shell<'_, '_>, conn: ConnId) {
        self.write(shell.net, conn);
        let Self { near, shard, record, counters, .. } = self;
        let Some(near) = find(near, conn) else { return };
        near.active = false;
        let (to, mut away) = (near.to, false);
        let said_all = near.tunnel.speak(id_of(conn), &mut |said: &Record<'_>| {
            said.encode(record);
            match shell.peers.send(to.node(), (*shard, to.within()), record) {
                Ok(()) => {
                    let bytes = matches!(said.said, Said::Open(_) | Said::Up(_));
                    counters.up_bytes += if bytes { (record.len() - RECORD_HEAD_BYTES) as u64 } else { 0 };
                    true
                }
                Err(error) => {
                    away = error != NotSent::Full;
                    false
                }
            }
        });
        if near.tunnel.may_read_on() {
            shell.net.resume(conn);
        }
        if away {
            self.lose(shell.now_us(), conn);
            self.write(shell.net, conn);
        } else if !said_all {
            self.activate(conn);
        }
    }

    fn write(&mut self, net: &mut dyn Net, conn: ConnId) {
        for _ in 0..WRITES_PER_TURN_MAX {
            let Some(near) = find(&mut self.near, conn).filter(|near| !near.in_flight) else { return };
            let Some(buffer) = near.tunnel.take_down() else {
                if near.tunnel.is_over() && !std::mem::replace(&mut near.finished, true) {
                    net.finish(conn);
                }
                return;
            };
            self.counters.down_bytes += buffer.len() as u64;
            match net.send(conn, buffer) {
                Sending::Done(buffer) => near.tunnel.written(buffer.len()),
                Sending::InFlight { bytes } => {
                    near.in_flight = true;
                    near.tunnel.written(bytes);
                }
            }
        }
    }

    /// A client that was told that it is over has had its time.
    pub(super) fn close_near(&mut self, net: &mut dyn Net, conn: ConnId) {
        if find(&mut self.near, conn).is_some_and(|near| near.tunnel.is_over()) {
            net.close(conn);
            self.forget_near(conn);
        }
    }
}

fn encoded(request_id: u32, reply: &Reply<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::new().reply(Codec::default(), request_id, reply, &mut bytes);
    bytes
}

/// When a client comes back, beside what all wait.
fn spread(conn: ConnId) -> u32 {
    (conn.slot.wrapping_mul(2_654_435_761) >> 16) % COME_BACK_MS
}
