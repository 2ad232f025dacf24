//! ROUTE: which node a client should connect to. Owned by the shard that is asked; a node alone answers with itself.
//!
//! By the owner of the user (`consistent_hash`) the answer is the node that serves the LOGIN. Any other strategy
//! spreads the first connections over the nodes, or the gateways where there are some, and the LOGIN is answered by REDIRECT
//! where the user does not live and the node is no gateway: sessions live at their owner. A node that can't be reached from here is not named, nor is one that stops.

use ringline_cluster::placement::NodeIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::UserName;
use ringline_schema::message::Reply;

use super::Nodes;
use crate::event::{ConnId, Effects};
use crate::shard::Shard;

impl Nodes {
    /// The node of a user, of any without one; `None`: nobody owns it now.
    fn home(&self, user: Option<&UserName>) -> Option<NodeIndex> {
        user.map_or(Some(self.placement.own()), |user| self.placement.owner_of(user.partition()))
    }
}

impl Shard {
    /// Answers a ROUTE. Errors: `BAD_NAME`, `SHUTTING_DOWN`, and `UNAVAILABLE` when no node may be named now.
    pub(crate) fn route(&mut self, conn: ConnId, request_id: u32, user: &str, fx: &mut Effects) {
        let user = if user.is_empty() { Ok(None) } else { UserName::of_user(user).map(Some) };
        match user.and_then(|user| self.pick_node(user.as_ref())) {
            Ok((node, address)) => {
                self.sessions.answer(conn, request_id, &Reply::RouteOk { node: &node, address: &address }, fx);
            }
            Err(code) => self.sessions.fail(conn, request_id, code, fx),
        }
    }

    /// Name and client address of the node for a user.
    fn pick_node(&mut self, user: Option<&UserName>) -> Result<(String, String), ErrorCode> {
        let here = || (self.config.node.clone(), self.config.address.clone());
        let Some(nodes) = &self.nodes else {
            return if self.draining { Err(ErrorCode::ShuttingDown) } else { Ok(here()) };
        };
        let (own, draining) = (nodes.placement.own(), self.draining);
        let open = |node: NodeIndex| if node == own { !draining } else { nodes.is_up(node) };
        let picked = self.router.pick(nodes.home(user), &mut nodes.placement.nodes().filter(|node| open(*node)));
        match picked {
            Some(node) if node == own => Ok(here()),
            Some(node) => {
                let peer = nodes.peer(node).map(|peer| (peer.name.clone(), peer.address.clone()));
                peer.ok_or(ErrorCode::Unavailable)
            }
            None => Err(ErrorCode::Unavailable),
        }
    }
}
