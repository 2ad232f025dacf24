//! Answers for shards of a node that can't be reached at the moment. Owned by the shard that answers.
//!
//! Each side of a pair of nodes has a link of its own to send on, and one may be up before the other is. A request that comes
//! from a node whose own link here is not up yet would be answered into nothing, and whoever waits would do so until the time is
//! over. So small answers are kept for as long as anybody could wait for them, and go out when the link is up or has room again.
//! Pages are not kept: who asks for one is told `UNAVAILABLE` in time and asks again. An answer that nobody waits for any more
//! is dropped where it arrives. Bound: [`ANSWERS_KEPT_MAX`] a node, the oldest goes first.

use std::collections::VecDeque;

use ringline_cluster::placement::{NodeIndex, ShardIndex};

use super::WAIT_MS;
use crate::event::Effects;
use crate::peer::ShardMessage;
use crate::shard::Shard;

/// Answers that wait for one node.
const ANSWERS_KEPT_MAX: usize = 4_096;

/// When nobody waits for it any more, for which shard, and the answer.
pub(super) type Kept = VecDeque<(u64, ShardIndex, ShardMessage)>;

impl Shard {
    /// Keeps an answer that did not go out.
    pub(super) fn keep_answer(&mut self, to: ShardIndex, answer: ShardMessage) {
        let until_us = self.now.mono_us + WAIT_MS * 1_000;
        let Some(peer) = self.nodes.as_mut().and_then(|nodes| nodes.peer_mut(to.node())) else { return };
        if peer.kept.len() >= ANSWERS_KEPT_MAX {
            peer.kept.pop_front();
        }
        peer.kept.push_back((until_us, to, answer));
        if peer.up {
            self.nodes_again();
        }
    }

    /// Sends what was kept for a node, if it is there.
    pub(super) fn tell_kept(&mut self, node: NodeIndex, fx: &mut Effects) {
        let now_us = self.now.mono_us;
        let Some(peer) = self.nodes.as_mut().and_then(|nodes| nodes.peer_mut(node)).filter(|peer| peer.up) else {
            return;
        };
        for (until_us, to, answer) in std::mem::take(&mut peer.kept) {
            if until_us > now_us {
                self.tell_node(to, answer, fx);
            }
        }
    }
}
