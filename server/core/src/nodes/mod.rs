//! Other nodes of a cluster, as a shard deals with them. Owned by the shard; a node that is alone has none of it.
//!
//! Of configured nodes every user and every conversation belongs to one node for ever, which alone writes and keeps its rows; a
//! node that is away is waited for. (Where partitions change hands, all nodes share one store: see [`moves`].) So nothing is copied between nodes: a list is put together from the stores of all ([`reads`]), and what
//! can't be asked is told at once: `UNAVAILABLE` when it was not sent, `UNKNOWN` when it was and the node went ([`lost`]).
//!
//! A link carries what is said in order, once each, as long as both processes live, over any number of connections. What
//! it can lose, and who repairs it:
//! - *Questions and answers.* Whoever waits is remembered with the node ([`Nodes::waits`]) and told when that goes, or after
//!   [`WAIT_MS`]; an answer that comes later is dropped, because its request has been answered. Small answers to a node that
//!   can't be reached just now are kept for it ([`kept`]).
//! - *What devices are pushed.* The sender remembers that something did not go out to a node and says so (`Missed`) as soon as
//!   it can; a node that comes back as a new process has lost whatever it had sent. Either way the receiving shard compares
//!   what that node's conversations hold with what its own sessions have, and says `LAGGED` ([`resync`]). The log of the
//!   conversation is the truth, so no news of it has to be kept durably.
//! - *A SYNC while a node is away* leaves that node's conversations out; when it is back they are compared in the same way.

pub(crate) mod catch_up;
mod fields;
mod kept;
pub(crate) mod lease;
mod letting_go;
mod lost;
mod moves;
pub mod reads;
pub mod record;
pub(crate) mod resync;
mod route;
pub(crate) mod veil;

use std::collections::{BTreeMap, VecDeque};

use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NOBODY, NODES_MAX, NodeIndex, ShardIndex};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Partition};
use ringline_schema::message::Reply;

use crate::config::ClusterConfig;
use crate::conversation::Stage;
use crate::event::{CloseReason, ConnId, Effect, Effects, NodeNews, Verdict};
use crate::group::passing::Passing;
use crate::peer::{Origin, ShardMessage, SocialMessage, Submit};
use crate::shard::Shard;
use crate::timers::Timer;
use kept::Kept;
use moves::Moves;
use reads::Reading;
use resync::Resync;

/// A request that another node has not answered for so long ends as `UNKNOWN`, or `UNAVAILABLE` if asking does nothing.
pub(crate) const WAIT_MS: u64 = 15_000;
/// Requests of this shard that wait for other nodes; one more is UNAVAILABLE.
const WAITS_MAX: usize = 65_536;
/// How soon what a full link did not take is told again.
const RETRY_MS: u64 = 500;

/// What becomes of a request when its answer is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// A send or an act that may have been done.
    Durable,
    Transient,
    /// A request that is no send and may have been done.
    Act,
    /// A question, or something that can be asked twice.
    Question,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    node: NodeIndex,
    fate: Fate,
    number: u64,
}

/// What has a deadline; all have the same time, so they are in order.
#[derive(Clone, Copy, Debug)]
enum Due {
    Wait((ConnId, u32), u64),
    Read(u64),
    Resync(NodeIndex, u64),
    /// The SYNC of a connection waits for the index of other nodes.
    Sync(ConnId, u64),
}

#[derive(Debug)]
struct Peer {
    name: String,
    /// Where clients connect to.
    address: String,
    up: bool,
    /// Something for its devices was not sent.
    missed: bool,
    /// Devices here may lack something of its conversations.
    stale: bool,
    /// Answers that did not go out.
    kept: Kept,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Nodes {
    pub(crate) placement: ClusterPlacement,
    peers: Vec<Peer>,
    /// Requests of this shard's sessions that another node has to answer.
    waits: BTreeMap<(ConnId, u32), Wait>,
    reads: BTreeMap<u64, Reading>,
    due: VecDeque<(u64, Due)>,
    /// Numbers waits, reads and comparisons.
    next: u64,
    resyncs: BTreeMap<NodeIndex, Resync>,
    /// `None`: of configured nodes nothing changes hands.
    moves: Option<Box<Moves>>,
}

impl Nodes {
    pub(crate) fn new(config: &ClusterConfig) -> Self {
        let (own, moves) = (config.placement.own(), config.placement.is_moving());
        let peer = |(at, (name, address)): (usize, (String, String))| Peer {
            name,
            address,
            up: at == usize::from(own.0),
            missed: false,
            stale: false,
            kept: Kept::new(),
        };
        // Where nodes come and go each number has its place from the beginning.
        let unnamed = if moves { NODES_MAX.saturating_sub(config.nodes.len()) } else { 0 };
        let named = config.nodes.iter().cloned().chain(std::iter::repeat_n(Default::default(), unnamed));
        Self {
            placement: config.placement.clone(),
            peers: named.enumerate().map(peer).collect(),
            waits: BTreeMap::new(),
            reads: BTreeMap::new(),
            due: VecDeque::new(),
            next: 0,
            resyncs: BTreeMap::new(),
            moves: moves.then(Box::default),
        }
    }

    pub(crate) fn is_remote(&self, shard: ShardIndex) -> bool {
        shard.node() != self.placement.own() || shard == NOBODY
    }

    pub(crate) fn is_up(&self, node: NodeIndex) -> bool {
        self.peer(node).is_some_and(|peer| peer.up)
    }

    fn peer(&self, node: NodeIndex) -> Option<&Peer> {
        self.peers.get(usize::from(node.0))
    }

    fn peer_mut(&mut self, node: NodeIndex) -> Option<&mut Peer> {
        self.peers.get_mut(usize::from(node.0))
    }

    fn others(&self) -> impl Iterator<Item = NodeIndex> + use<> {
        let own = self.placement.own();
        self.placement.nodes().filter(move |node| *node != own)
    }

    /// Every shard of a node; of one that was never seen the first, which stands for all.
    fn shards_of(&self, node: NodeIndex) -> impl Iterator<Item = ShardIndex> + use<> {
        (0..self.placement.shards(node).max(1)).map(move |within| ShardIndex::new(node, within))
    }

    /// Something for the devices of a node did not go out. True: that is new, and it can be told soon.
    fn missed(&mut self, node: NodeIndex) -> bool {
        self.peer_mut(node).is_some_and(|peer| !std::mem::replace(&mut peer.missed, true) && peer.up)
    }

    /// Devices here may lack something of a node's conversations. True: that is new, and the node is there.
    fn stale(&mut self, node: NodeIndex) -> bool {
        self.peer_mut(node).is_some_and(|peer| !std::mem::replace(&mut peer.stale, true) && peer.up)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// The session that waits for the answer to this, if one does.
fn awaited(message: &ShardMessage) -> Option<(Origin, Fate)> {
    match message {
        ShardMessage::Submit(submit) | ShardMessage::Visit(submit) => {
            let fate = match submit.passing() {
                None => Fate::Durable,
                Some(Passing::Message { no_reply: false }) => Fate::Transient,
                Some(Passing::Message { no_reply: true } | Passing::Signal { .. }) => return None,
            };
            Some((submit.origin, fate))
        }
        ShardMessage::Transient(send) => (!send.no_reply).then_some((send.origin, Fate::Transient)),
        ShardMessage::Fetch { origin, .. } | ShardMessage::Online { origin, .. } => Some((*origin, Fate::Question)),
        ShardMessage::ReceiptUp(up) => up.origin.map(|origin| (origin, Fate::Question)),
        ShardMessage::ReceiptAsk(ask) => Some((ask.origin, Fate::Question)),
        ShardMessage::Social(SocialMessage::Delete(ask)) => Some((ask.origin, Fate::Act)),
        ShardMessage::SendResult { .. }
        | ShardMessage::Deliver { .. }
        | ShardMessage::Receipt { .. }
        | ShardMessage::AskUser(_)
        | ShardMessage::UserKnown { .. }
        | ShardMessage::Social(_)
        | ShardMessage::Fetched { .. }
        | ShardMessage::ReceiptNews(_)
        | ShardMessage::ReceiptPage { .. }
        | ShardMessage::Done { .. }
        | ShardMessage::Flush { .. }
        | ShardMessage::Flushed { .. }
        | ShardMessage::GroupAnswered { .. }
        | ShardMessage::DeliverGroup { .. }
        | ShardMessage::PassGroup { .. }
        | ShardMessage::GroupReached { .. }
        | ShardMessage::PushGroup { .. }
        | ShardMessage::OnlinePage { .. }
        | ShardMessage::Read { .. }
        | ShardMessage::ReadDone { .. }
        | ShardMessage::Missed
        | ShardMessage::Moved { .. } => None,
    }
}

impl Shard {
    pub(crate) fn is_clustered(&self) -> bool {
        self.nodes.is_some()
    }

    /// Whether a shard of another node is meant.
    pub(crate) fn is_remote(&self, shard: ShardIndex) -> bool {
        self.nodes.as_ref().is_some_and(|nodes| nodes.is_remote(shard))
    }

    /// Whether sessions may not have heard of a conversation because its node is or was away: what they say of it is to be
    /// said again.
    pub(crate) fn may_lack(&self, conversation: ConversationId) -> bool {
        self.nodes.as_ref().is_some_and(|nodes| {
            if let Some(moves) = &nodes.moves {
                return moves.catch_up.is_wanted() || nodes.placement.owner_of(conversation.partition()).is_none();
            }
            let node = nodes.placement.node_of(conversation.partition());
            let peer = nodes.peer(node).filter(|_| node != nodes.placement.own());
            peer.is_some_and(|peer| !peer.up || peer.stale || nodes.resyncs.contains_key(&node))
        })
    }

    /// Every other shard that can be reached: those of this node, and of the nodes that are up.
    pub(crate) fn reachable_shards(&self) -> Vec<ShardIndex> {
        let Some(nodes) = &self.nodes else { return self.shards_here().collect() };
        let up = nodes.others().filter(|node| nodes.is_up(*node));
        self.shards_here().chain(up.flat_map(|node| nodes.shards_of(node))).collect()
    }

    /// Every other shard there is; one stands for all of a node that is away. A node that is away and owns nothing is none.
    pub(crate) fn other_shards(&self) -> Vec<ShardIndex> {
        let Some(nodes) = &self.nodes else { return self.shards_here().collect() };
        let owns = |node: NodeIndex| match &nodes.moves {
            Some(moves) => moves.owns(node),
            None => nodes.placement.owns(node),
        };
        let counts = |node: &NodeIndex| nodes.is_up(*node) || owns(*node);
        self.shards_here().chain(nodes.others().filter(counts).flat_map(|node| nodes.shards_of(node))).collect()
    }

    /// The other shards of this node.
    fn shards_here(&self) -> impl Iterator<Item = ShardIndex> + use<> {
        let own = self.config.shard;
        let all = (0..self.config.placement.shards()).map(move |within| ShardIndex::new(own.node(), within));
        all.filter(move |shard| *shard != own)
    }

    /// The shard whose part of the online list comes after that of `shard`; `None` begins.
    pub(crate) fn next_listed(&self, after: Option<ShardIndex>) -> Option<ShardIndex> {
        let mut all = self.reachable_shards();
        all.push(self.config.shard);
        all.sort_unstable();
        all.into_iter().find(|shard| after.is_none_or(|after| *shard > after))
    }

    /// Answers a REGISTER or LOGIN of a user of another node. `None`: it lives here, or this is a gateway and its owner is
    /// there.
    pub(crate) fn redirect(
        &mut self,
        (conn, request_id): (ConnId, u32),
        partition: Partition,
        fx: &mut Effects,
    ) -> Option<Verdict> {
        if self.sessions.get(conn).is_some_and(|session| session.tunnelled) && !self.is_here(self.owner(partition)) {
            // The gateway looks for the owner when the client comes back; it knows of a change about as soon as this node.
            self.sessions.fail(conn, request_id, ErrorCode::Unavailable, fx);
            self.sessions.close(conn, CloseReason::Moved, fx);
            return Some(Verdict::Stop);
        }
        let nodes = self.nodes.as_ref()?;
        let owner = nodes.placement.owner_of(partition);
        if owner == Some(nodes.placement.own()) {
            return None;
        }
        match owner.and_then(|owner| nodes.peer(owner)).filter(|peer| peer.up) {
            Some(_) if self.config.gateway => return None,
            Some(Peer { name: node, address, .. }) => {
                self.sessions.answer(conn, request_id, &Reply::Redirect { node, address }, fx);
            }
            None => self.sessions.fail(conn, request_id, ErrorCode::Unavailable, fx),
        }
        Some(Verdict::Continue)
    }

    /// Sends something to a shard of another node, or deals with it as lost.
    pub(crate) fn tell_node(&mut self, to: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        let own = self.config.shard;
        let Some(nodes) = &mut self.nodes else { return };
        if to == NOBODY || !nodes.is_up(to.node()) {
            return self.undelivered(to, message, fx);
        }
        if let Some((origin, fate)) = awaited(&message).filter(|(origin, _)| origin.shard == own) {
            if nodes.waits.len() >= WAITS_MAX {
                return self.undelivered(to, message, fx);
            }
            let (key, number) = ((origin.conn, origin.request_id), nodes.number());
            nodes.waits.insert(key, Wait { node: to.node(), fate, number });
            self.expire_later(Due::Wait(key, number));
        }
        fx.list.push(Effect::ToShard { to, message });
    }

    /// The SYNC of a connection waits for shards, of which some may be of other nodes: their answer may be lost.
    pub(crate) fn expire_sync(&mut self, conn: ConnId, number: u64) {
        if self.nodes.is_some() {
            self.expire_later(Due::Sync(conn, number));
        }
    }

    fn expire_later(&mut self, due: Due) {
        let at_us = self.now.mono_us + WAIT_MS * 1_000;
        let Some(nodes) = &mut self.nodes else { return };
        if nodes.due.is_empty() {
            self.timers.arm(at_us, Timer::Nodes);
        }
        nodes.due.push_back((at_us, due));
    }

    /// An act begins that may go on to other nodes from a shard of this one.
    pub(crate) fn await_act(&mut self, submit: &Submit) {
        let Some(nodes) = &mut self.nodes else { return };
        let node = nodes.placement.node_of(submit.message.conversation.partition());
        let (key, number) = ((submit.origin.conn, submit.origin.request_id), nodes.number());
        nodes.waits.insert(key, Wait { node, fate: Fate::Durable, number });
        self.expire_later(Due::Wait(key, number));
    }

    /// An act of a session here was answered while it was on its way, because a node went: it goes no further.
    pub(crate) fn act_has_ended(&self, submit: &Submit) -> bool {
        let (origin, own) = (submit.origin, self.config.shard);
        let waits = self.nodes.as_ref().map(|nodes| &nodes.waits);
        waits.is_some_and(|waits| origin.shard == own && !waits.contains_key(&(origin.conn, origin.request_id)))
    }

    /// Whether an answer of another node still has somebody waiting for it; then nobody does any more.
    pub(crate) fn is_awaited(&mut self, origin: Origin) -> bool {
        let key = (origin.conn, origin.request_id);
        self.nodes.as_mut().is_some_and(|nodes| nodes.waits.remove(&key).is_some())
    }

    /// Ends a request whose answer is lost.
    fn end_wait(&mut self, (conn, request_id): (ConnId, u32), fate: Fate, fx: &mut Effects) {
        let origin = Origin { shard: self.config.shard, conn, request_id };
        match fate {
            Fate::Durable => self.send_result(origin, (true, Err(ErrorCode::Unknown)), None, fx),
            Fate::Transient => self.send_result(origin, (false, Err(ErrorCode::Unknown)), None, fx),
            Fate::Act => self.sessions.fail(conn, request_id, ErrorCode::Unknown, fx),
            Fate::Question => self.sessions.fail(conn, request_id, ErrorCode::Unavailable, fx),
        }
    }

    /// What a link says of another node.
    pub(crate) fn node_news(&mut self, node: NodeIndex, news: NodeNews, fx: &mut Effects) {
        let moving = self.is_moving();
        let Some(nodes) = self.nodes.as_mut().filter(|nodes| nodes.placement.own() != node) else { return };
        match news {
            NodeNews::Up { shards } => {
                let Some(cores) = CorePlacement::new(shards) else { return };
                let moved = nodes.placement.learn(node, cores);
                if let Some(peer) = nodes.peer_mut(node) {
                    peer.up = true;
                }
                if moved {
                    self.forget_targets();
                }
                self.node_is_back(node);
                self.tell_kept(node, fx);
                self.tell_missed(node, fx);
                self.resync_if_stale(node, fx);
            }
            NodeNews::Down => {
                if let Some(peer) = nodes.peer_mut(node) {
                    peer.up = false;
                }
                self.node_lost(node, fx);
                self.node_is_away(node, false);
            }
            NodeNews::Reset => {
                if let Some(peer) = nodes.peer_mut(node) {
                    // Its devices have begun anew with it; ours may have lost what it had sent.
                    (peer.missed, peer.stale) = (false, !moving);
                    peer.kept.clear();
                }
                self.node_lost(node, fx);
                self.node_is_away(node, true);
                self.resync_if_stale(node, fx);
            }
        }
    }

    /// What waits for a node ends.
    fn node_lost(&mut self, node: NodeIndex, fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        if nodes.resyncs.remove(&node).is_some() {
            nodes.stale(node);
        }
        let ended: Vec<_> = nodes.waits.extract_if(.., |_, wait| wait.node == node).collect();
        for (key, wait) in ended {
            self.end_wait(key, wait.fate, fx);
        }
        self.reads_lost(node, fx);
        self.syncs_lost(fx);
        self.asks_lost(node, fx);
    }

    /// Conversations that have asked about a user of that node.
    fn asks_lost(&mut self, node: NodeIndex, fx: &mut Effects) {
        let Some(nodes) = &self.nodes else { return };
        let asking = self.conversations.iter().filter_map(|(id, conversation)| {
            let user = conversation.waiting.front().map(|submit: &Submit| submit.message.to.clone())?;
            let asks = matches!(conversation.stage, Stage::AskingUser { .. });
            (asks && nodes.placement.node_of(user.partition()) == node).then_some((*id, user))
        });
        let mut asking: Vec<_> = asking.collect();
        asking.sort_unstable();
        for (id, user) in asking {
            self.user_known(id, &user, Err(ErrorCode::Unavailable), fx);
        }
    }

    /// A link had no room for something that was sent.
    pub(crate) fn unsent(&mut self, to: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        if let Some((origin, _)) = awaited(&message).filter(|(origin, _)| origin.shard == self.config.shard) {
            self.is_awaited(origin);
        }
        self.undelivered(to, message, fx);
    }

    /// A shard of another node could not send something that was for devices here.
    pub(crate) fn missed_from(&mut self, from: ShardIndex, fx: &mut Effects) {
        if let Some(nodes) = &mut self.nodes {
            nodes.stale(from.node());
        }
        self.resync_if_stale(from.node(), fx);
    }

    /// Tells every shard of a node that something was not sent, if so.
    fn tell_missed(&mut self, node: NodeIndex, fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        let shards: Vec<_> = nodes.shards_of(node).collect();
        let missed = nodes.peer_mut(node).is_some_and(|peer| peer.up && std::mem::take(&mut peer.missed));
        for shard in shards.into_iter().filter(|_| missed) {
            self.tell_node(shard, ShardMessage::Missed, fx);
        }
    }

    /// Deadlines of what waits for other nodes, and another try of what a full link did not take.
    pub(crate) fn nodes_due(&mut self, fx: &mut Effects) {
        let now_us = self.now.mono_us;
        loop {
            let Some(nodes) = &mut self.nodes else { return };
            let Some((_, due)) = nodes.due.pop_front_if(|(at_us, _)| *at_us <= now_us) else { break };
            match due {
                Due::Wait(key, number) => {
                    if nodes.waits.get(&key).is_some_and(|wait| wait.number == number)
                        && let Some(wait) = nodes.waits.remove(&key)
                    {
                        self.end_wait(key, wait.fate, fx);
                    }
                }
                Due::Read(number) => self.read_late(number, fx),
                Due::Resync(node, number) => self.resync_late(node, number),
                Due::Sync(conn, number) => self.sync_late(conn, number, fx),
            }
        }
        let Some(nodes) = &self.nodes else { return };
        if let Some((at_us, _)) = nodes.due.front() {
            self.timers.arm(*at_us, Timer::Nodes);
        }
        for node in nodes.others().collect::<Vec<_>>() {
            self.tell_kept(node, fx);
            self.tell_missed(node, fx);
            self.resync_if_stale(node, fx);
        }
        self.catch_up_due(fx);
    }

    fn forget_targets(&mut self) {
        let groups = self.groups.iter_mut().filter_map(|(_, slot)| slot.group.as_mut());
        groups.for_each(|group| group.forget_targets());
    }

    fn nodes_again(&mut self) {
        self.timers.arm(self.now.mono_us + RETRY_MS * 1_000, Timer::Nodes);
    }

    /// Nobody here waits for another node.
    pub(crate) fn nodes_are_quiet(&self) -> bool {
        self.nodes.as_ref().is_none_or(|nodes| nodes.waits.is_empty() && nodes.reads.is_empty())
    }
}
