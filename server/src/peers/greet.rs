//! From the first byte of a connection between nodes to the link that it carries. Owned by the core's thread.
//!
//! The side that dialled says hello first, with the number of its link; the side that was called answers once the
//! connection is on the core of that link, and answers also what it refuses, so that both sides name the same reason.

use ringline_cluster::link::frame::{Frame, FrameError};
use ringline_cluster::link::hello::{Agreed, Hello, is_dialled_by_the_right_one};
use ringline_cluster::link::line::{Joined, Line};
use ringline_cluster::placement::NodeIndex;
use ringline_core::event::ConnId;

use super::PeerLinks;
use super::conn::{Role, Stage};
use super::flow::Link;
use super::refused::Reason;

impl PeerLinks {
    /// Goes on with what a connection has received.
    pub(super) fn advance(&mut self, conn: ConnId, now_ms: u64) {
        let Some(own) = self.conns.get_mut(&conn) else { return };
        match &mut own.stage {
            Stage::Live(at) => {
                let at = *at;
                return self.hear(conn, at, now_ms);
            }
            Stage::Leaving { .. } | Stage::Ending { .. } => return,
            Stage::Greeting { hello_sent } => {
                if let Role::Dialled(at) = own.role
                    && own.wire.is_ready()
                    && !std::mem::replace(hello_sent, true)
                    && let Some(link) = self.links.get(at)
                {
                    let hello = self.roster.hello(link.number, link.line.knows());
                    own.wire.write(&encoded(hello));
                }
            }
        }
        match Frame::decode_hello(&mut own.wire.inbound) {
            Ok(None) => {}
            Ok(Some(hello)) => self.greet(conn, hello, now_ms),
            Err(error) => self.refuse_frame(conn, &error, now_ms),
        }
    }

    pub(super) fn refuse_frame(&mut self, conn: ConnId, error: &FrameError, now_ms: u64) {
        self.refuse(conn, Reason::from(error), error, now_ms);
    }

    /// The peer has said who it is.
    fn greet(&mut self, conn: ConnId, hello: Hello, now_ms: u64) {
        let Some(own) = self.conns.get(&conn) else { return };
        let certified = self.certified(own.role, own.wire.certified(), &hello);
        let node = match self.judge(&hello, &certified) {
            Ok((node, _)) => node,
            Err((reason, why)) => {
                if own.role == Role::Accepted {
                    self.say_hello(conn, self.shard, None);
                }
                return self.refuse(conn, reason, &why, now_ms);
            }
        };
        self.roster.saw(node, hello.incarnation);
        let is_here = hello.core % self.roster.shards().max(1) == self.shard;
        let Some(own) = self.conns.get_mut(&conn) else { return };
        if own.role == Role::Accepted && !is_here {
            own.stage = Stage::Leaving { node, hello };
            self.leaving.push(conn);
            return;
        }
        self.settle(conn, (node, hello), now_ms);
        self.advance(conn, now_ms);
    }

    /// The name that the peer can prove. Without TLS it is believed, but a dial goes to one node only.
    fn certified(&self, role: Role, names: Option<Vec<String>>, hello: &Hello) -> String {
        if let Role::Dialled(at) = role {
            // TLS has checked that the certificate is for the node that was dialled.
            return self.links.get(at).map_or(String::new(), |link| self.roster.name(link.node).to_owned());
        }
        match names {
            Some(names) if !names.contains(&hello.node) => names.into_iter().next().unwrap_or_default(),
            Some(_) | None => hello.node.clone(),
        }
    }

    fn judge(&self, hello: &Hello, certified: &str) -> Result<(NodeIndex, Agreed), (Reason, String)> {
        let newest = self.roster.find(&hello.node).and_then(|node| self.roster.newest(node));
        let agreed = self.roster.hello(self.shard, None).judge(hello, certified, newest);
        let agreed = agreed.map_err(|refusal| (Reason::from(&refusal), refusal.to_string()))?;
        let unknown = || (Reason::UnknownNode, format!("{:?} is not in cluster.nodes", hello.node));
        Ok((self.roster.find(&hello.node).ok_or_else(unknown)?, agreed))
    }

    /// The connection is on the core of its link: it carries that from now on, unless a better one does.
    pub(super) fn settle(&mut self, conn: ConnId, (node, hello): (NodeIndex, Hello), now_ms: u64) {
        let Some(role) = self.conns.get(&conn).map(|own| own.role) else { return };
        // Once more: on its way here a newer process may have come.
        let agreed = match self.judge(&hello, &hello.node) {
            Ok((_, agreed)) => agreed,
            Err((reason, why)) => return self.refuse(conn, reason, &why, now_ms),
        };
        let (at, right) = match role {
            Role::Dialled(at) => (at, is_dialled_by_the_right_one(self.roster.own_name(), &hello.node)),
            Role::Accepted => self.called(node, &hello, now_ms),
        };
        let Some(link) = self.links.get_mut(at) else { return };
        let joined = link.line.join((&hello, &agreed), right, now_ms, &mut self.told);
        self.tell(at);
        match joined {
            Err(violation) => self.refuse(conn, Reason::from(&violation), &violation, now_ms),
            Ok(Joined::Superfluous) => self.end(conn, now_ms),
            Ok(Joined::Stands | Joined::Replaces) => self.carry(conn, (at, role)),
        }
    }

    /// The link that the other side has dialled for, and whether its dial counts.
    fn called(&mut self, node: NodeIndex, hello: &Hello, now_ms: u64) -> (usize, bool) {
        let number = hello.core;
        let found = self.links.iter().position(|link| link.node == node && link.number == number);
        if number == self.shard
            && let Some(at) = found
        {
            return (at, is_dialled_by_the_right_one(&hello.node, self.roster.own_name()));
        }
        // One that the peer has because it has more cores: only it dials.
        let at = found.unwrap_or_else(|| {
            self.links.push(Link::new((node, number), Line::new((false, false), now_ms)));
            self.links.len() - 1
        });
        (at, true)
    }

    fn carry(&mut self, conn: ConnId, (at, role): (usize, Role)) {
        let Some(link) = self.links.get_mut(at) else { return };
        let (before, number) = (link.conn.replace(conn), self.shard);
        let knows = link.line.knows();
        self.counters.connected += 1;
        if let Some(own) = self.conns.get_mut(&conn) {
            own.stage = Stage::Live(at);
        }
        if let Some(before) = before {
            self.close_later(before);
        }
        if role == Role::Accepted {
            self.say_hello(conn, number, knows);
        }
    }

    fn say_hello(&mut self, conn: ConnId, core: u16, knows: Option<(super::Incarnation, u64)>) {
        let hello = self.roster.hello(core, knows);
        if let Some(own) = self.conns.get_mut(&conn).filter(|own| own.wire.is_ready()) {
            own.wire.write(&encoded(hello));
        }
    }
}

fn encoded(hello: Hello) -> Vec<u8> {
    let mut bytes = Vec::new();
    Frame::Hello(hello).encode(&mut bytes);
    bytes
}
