//! What the loop of a core does for tunnels ([`crate::tunnels`]): clients that it holds for other nodes, and sessions whose
//! clients gateways hold. Owned by the core's thread; a node alone has none of it.

use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::event::{ConnId, Event, NodeNews};

use super::{Parts, Reactor};
use crate::edge::Turn;
use crate::tunnels::{Shell, TunnelCounters, Tunnels};

impl Reactor {
    /// Gives something to the tunnels, with what they work with. Nothing happens on a node alone.
    fn with_tunnels(&mut self, act: impl FnOnce(&mut Tunnels, &mut Shell<'_, '_>)) {
        let Self { parts, tunnels: Some(tunnels), fx, now, .. } = self else { return };
        let Parts { shard, net, peers: Some(peers), .. } = parts else { return };
        let turn = Turn { shard, fx, now: *now };
        act(tunnels, &mut Shell { turn, net: net.as_mut(), peers });
    }

    /// Takes over the connections that have left the edge for another node.
    pub(super) fn enter_tunnels(&mut self) {
        let Self { parts, tunnels: Some(tunnels), edge, now, .. } = self else { return };
        while let Some(tunnelled) = edge.next_tunnelled() {
            tunnels.enter(parts.net.as_mut(), tunnelled, now.mono_us);
        }
    }

    pub(super) fn hear_tunnel(&mut self, (node, from_shard): (NodeIndex, u16), payload: &[u8]) {
        let from = ShardIndex::new(node, from_shard);
        self.with_tunnels(|tunnels, shell| tunnels.hear(shell, from, payload));
    }

    /// A node is down: first what was tunnelled ends, then the shard hears of it.
    pub(super) fn node_down(&mut self, node: NodeIndex) {
        self.with_tunnels(|tunnels, shell| tunnels.node_down(shell, node));
        self.tell(Event::Node { node, news: NodeNews::Down });
    }

    pub(super) fn node_reset(&mut self, node: NodeIndex) {
        if let Some(tunnels) = &mut self.tunnels {
            tunnels.node_reset(node);
        }
        self.tell(Event::Node { node, news: NodeNews::Reset });
    }

    /// The shard ends a connection. False: it has a socket here.
    pub(super) fn end_tunnelled(&mut self, conn: ConnId) -> bool {
        let now_us = self.now.mono_us;
        self.tunnels.as_mut().is_some_and(|tunnels| tunnels.end_far(conn, now_us))
    }

    /// Once a turn, when the shard's output has been looked at and before the links are flushed.
    pub(super) fn flush_tunnels(&mut self) {
        self.with_tunnels(|tunnels, shell| tunnels.flush(shell));
        self.perform();
    }

    pub(super) fn tunnels_due(&mut self) {
        self.with_tunnels(|tunnels, shell| tunnels.due(shell));
        self.perform();
    }

    pub(super) fn drain_tunnels(&mut self) {
        let now_us = self.now.mono_us;
        if let Some(tunnels) = &mut self.tunnels {
            tunnels.drain(now_us);
        }
    }

    pub(super) fn tunnels_are_quiet(&self) -> bool {
        self.tunnels.as_ref().is_none_or(|tunnels| tunnels.is_quiet(self.now.mono_us))
    }

    /// Clients of this core: those of its shard, and those that it holds for other nodes.
    pub(super) fn clients(&self) -> u64 {
        let held = self.tunnels.as_ref().map_or(0, |tunnels| tunnels.held());
        self.parts.shard.connections() as u64 + held
    }

    pub(super) fn tunnel_counters(&self) -> TunnelCounters {
        self.tunnels.as_ref().map_or(TunnelCounters::default(), |tunnels| tunnels.counters())
    }
}
