//! The owner's side of the tunnels of one core: sessions whose clients gateways hold. Owned by the core's thread.
//!
//! To the shard such a connection is one like any other. What is received is what the gateway passes on; what the shard
//! queues is taken as far as the window goes, so that a client that reads slowly fills its outbox there.

use ringline_cluster::link::tunnel::{Far, RECORD_HEAD_BYTES, Record, Said, Stopped, TunnelId};
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::{ConnId, Event};
use ringline_schema::frame::FrameDecoder;

use super::{LINGER_US, Shell, Tunnels, place};
use crate::edge::{Decoded, decode};

/// A session whose client is elsewhere.
pub(super) struct FarEnd {
    generation: u32,
    /// The core that has its client.
    gateway: ShardIndex,
    id: TunnelId,
    tunnel: Far,
    decoder: FrameDecoder,
    /// Nothing more of it is read.
    deaf: bool,
    /// The shard has ended it: it is over when its output is on the link.
    ending: bool,
    /// Looked at in the next flush.
    speaking: bool,
}

// Each tunnelled session pays for it; see "Gateways" in tuning.md.
const _: () = assert!(size_of::<FarEnd>() <= 72);

fn find(table: &mut [Option<Box<FarEnd>>], conn: ConnId) -> Option<&mut FarEnd> {
    let far = table.get_mut(conn.slot as usize)?.as_mut()?;
    (far.generation == conn.generation).then_some(far.as_mut())
}

impl Tunnels {
    /// A gateway has a client for a user of this shard.
    pub(super) fn open_far(&mut self, shell: &mut Shell<'_, '_>, of: (ShardIndex, TunnelId), bytes: &[u8]) {
        if self.by_id.contains_key(&of) {
            let (node, now_ms) = (of.0.node(), shell.now_us() / 1_000);
            return shell.peers.meaningless(node, &"a tunnel was opened twice", now_ms);
        }
        let conn = shell.net.reserve();
        let Some(place) = place(&mut self.far, conn) else { return shell.net.release(conn) };
        debug_assert!(place.is_none(), "slot {} has a tenant", conn.slot);
        let ((gateway, id), generation) = (of, conn.generation);
        let (tunnel, decoder) = (Far::default(), FrameDecoder::new());
        let (deaf, ending, speaking) = (false, false, false);
        *place = Some(Box::new(FarEnd { generation, gateway, id, tunnel, decoder, deaf, ending, speaking }));
        self.by_id.insert(of, conn);
        self.counters.served += 1;
        shell.turn.tell(Event::Tunnelled { conn });
        self.read(shell, conn, bytes);
    }

    /// More of what its client says.
    pub(super) fn gateway_says(&mut self, shell: &mut Shell<'_, '_>, of: (ShardIndex, TunnelId), bytes: &[u8]) {
        match self.by_id.get(&of).copied() {
            Some(conn) => self.read(shell, conn, bytes),
            None => self.owe(of.0, of.1, Said::Ended),
        }
    }

    fn read(&mut self, shell: &mut Shell<'_, '_>, conn: ConnId, bytes: &[u8]) {
        let Some(far) = find(&mut self.far, conn).filter(|far| !far.deaf) else { return };
        match decode((conn, &mut far.decoder), &mut shell.turn, bytes, &mut self.tails) {
            Decoded::All => {}
            // `Effect::Close` is on its way.
            Decoded::Stopped => far.deaf = true,
            Decoded::HandOver(_) => {
                debug_assert!(false, "the core hands no tunnelled connection over");
                self.forget_far(shell, conn, true);
            }
        }
    }

    pub(super) fn credit_far(&mut self, of: (ShardIndex, TunnelId), bytes: u32) {
        let Some(conn) = self.by_id.get(&of).copied() else { return self.owe(of.0, of.1, Said::Ended) };
        if let Some(far) = find(&mut self.far, conn) {
            far.tunnel.credit(bytes);
        }
        self.speaks_for(conn);
    }

    /// The client is gone.
    pub(super) fn left(&mut self, shell: &mut Shell<'_, '_>, of: (ShardIndex, TunnelId)) {
        if let Some(conn) = self.by_id.get(&of).copied() {
            self.forget_far(shell, conn, false);
            shell.turn.tell(Event::Closed { conn });
        }
    }

    pub(super) fn lose_far(&mut self, shell: &mut Shell<'_, '_>, node: NodeIndex) {
        let lost = self.by_id.iter().filter(|((gateway, _), _)| gateway.node() == node).map(|(_, conn)| *conn);
        for conn in lost.collect::<Vec<_>>() {
            self.forget_far(shell, conn, true);
            shell.turn.tell(Event::Closed { conn });
        }
    }

    /// The shard ends a connection. False: it is none of these.
    pub fn end_far(&mut self, conn: ConnId, now_us: u64) -> bool {
        let Some(far) = find(&mut self.far, conn) else { return false };
        (far.deaf, far.ending) = (true, true);
        self.ending.push_back((now_us + LINGER_US, conn));
        self.speaks_for(conn)
    }

    /// The shard has output for a connection. False: it is none of these.
    pub fn speaks_for(&mut self, conn: ConnId) -> bool {
        let Some(far) = find(&mut self.far, conn) else { return false };
        if !std::mem::replace(&mut far.speaking, true) {
            self.speaking.push(conn);
        }
        true
    }

    /// Puts on the link what the shard says to the client, as far as it may.
    pub(super) fn serve_far(&mut self, shell: &mut Shell<'_, '_>, conn: ConnId) {
        if let Some(far) = find(&mut self.far, conn) {
            far.speaking = false;
        }
        loop {
            let Self { far, shard, record, .. } = self;
            let Some(far) = find(far, conn) else { return };
            let gateway = far.gateway;
            let (bytes, stopped) = far.tunnel.speak(far.id, &mut |said: &Record<'_>| {
                said.encode(record);
                debug_assert!(record.len() > RECORD_HEAD_BYTES, "only bytes are said");
                shell.peers.send(gateway.node(), (*shard, gateway.within()), record).is_ok()
            });
            if bytes > 0 {
                shell.turn.tell(Event::Sent { conn, bytes });
            }
            match stopped {
                // It goes on when the gateway gives credit.
                Stopped::NoCredit => return,
                // Again in the next turn; when the node is down, it ends by that.
                Stopped::NoRoom => {
                    self.speaks_for(conn);
                    return;
                }
                Stopped::Done => {}
            }
            if let Some(buffer) = far.tunnel.take_buffer() {
                shell.turn.shard.give_back(buffer);
            }
            let Some(frames) = shell.turn.shard.take_output(conn) else { break };
            far.tunnel.give(frames);
        }
        if find(&mut self.far, conn).is_some_and(|far| far.ending) {
            self.close_far(shell, conn);
        }
    }

    /// Ends a session that the shard has ended, whatever it still had to say.
    pub(super) fn close_far(&mut self, shell: &mut Shell<'_, '_>, conn: ConnId) {
        if find(&mut self.far, conn).is_some_and(|far| far.ending) {
            self.forget_far(shell, conn, true);
            shell.turn.tell(Event::Closed { conn });
        }
    }

    /// `tells`: the gateway is to hear of it.
    fn forget_far(&mut self, shell: &mut Shell<'_, '_>, conn: ConnId, tells: bool) {
        if find(&mut self.far, conn).is_none() {
            return;
        }
        let Some(FarEnd { gateway, id, .. }) =
            self.far.get_mut(conn.slot as usize).and_then(Option::take).map(|far| *far)
        else {
            return;
        };
        self.by_id.remove(&(gateway, id));
        self.counters.served -= 1;
        shell.net.release(conn);
        if tells {
            self.owe(gateway, id, Said::Ended);
        }
    }
}
