//! Partitions that change hands while nodes run. Owned by the shard; of configured nodes there is none of it.
//!
//! All nodes share one store, and the database says who owns what ([`Ownership`], one whole picture after the other). A shard
//! serves a partition while the picture says that it is its node's and that the node is not asked to give it up. What belongs
//! to nobody now is `UNAVAILABLE`, which clients try again.
//!
//! *A partition that comes* brings nothing: all is loaded on demand, behind the barrier that its new owner committed.
//! *A partition that goes* takes its sessions with it, is answered `UNAVAILABLE` at once where somebody waits, and is let go of
//! when nothing of it is on its way to the disk any more ([`super::letting_go`]); if it was asked for, that is told by
//! [`Effect::Released`]. One that was taken without asking is not served again before that moment either: what is in memory of
//! it is of before. What happens to each part of a shard:
//!
//! | field | a partition goes | a partition comes |
//! |---|---|---|
//! | `sessions`, `online` | its users are told GOAWAY, cursors are written if it was asked for, closed | they log in |
//! | `users`, `creating`, `marking` | forgotten; what is on its way to the disk ends first | on demand |
//! | `conversations` | who waits is `UNAVAILABLE`; forgotten when nothing of it is on its way to the disk | on demand |
//! | `groups`, `groups_members` | the same | on demand; members are sorted by their new shards |
//! | `receipts` | the same; what was not told yet is not told | on demand |
//! | `social.settings`, `.loading` | the same | on demand |
//! | `social.presence` | who watched is forgotten, and asks the new owner | who is watched here is asked for at once |
//! | `social.privacy`, `.notices`, `.gathers` | stay: they name no partition, and end by themselves | stay |
//! | `deletions` | forgotten: their rows say how far they are | looked for in the store |
//! | `questions` | those about it are taken back; their answers find nobody | none |
//! | `pending` | ends: committed is committed, and is answered and pushed | members are sorted anew |
//! | `fan_outs`, `run`, `bodies`, `spare_messages` | stay: members that are not here get nothing | stay |
//! | `delivery_waits`, `delivery_index` | stay, to run out as DELIVERY_TIMEOUT | stay |
//! | `syncs`, `exports`, `receipt_lists` | end with their sessions and questions | none |
//! | `dirty_cursors`, `timers`, `lanes_blocked` | find nothing of it | none |
//!
//! *What others own* changes as well: requests that wait for an old owner are answered by it, or end with its link; conversations
//! that asked it about a user ask again; groups are sorted by the new shards, also in what is on its way to the disk; who is
//! watched is asked for again. What an old owner had pushed may be lost with it, and what others pushed may have gone to where
//! a user was: [`super::catch_up`] finds out what sessions lack.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringline_cluster::ownership::{Ownership, PartitionSet, all};
use ringline_cluster::placement::{ClusterPlacement, NOBODY, NodeIndex, ShardIndex};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{Partition, UserName};
use ringline_schema::message::{GoawayReason, Reply};

use super::catch_up::CatchUp;
use super::lost::meant_for;
use crate::conversation::Stage;
use crate::event::{CloseReason, ConnId, Effect, Effects};
use crate::group::state::placed_anew;
use crate::peer::{Origin, ShardMessage, SocialMessage, Submit};
use crate::session::State;
use crate::shard::Shard;

/// Sessions of a partition that goes are told to come back after this, and up to as long again, so that they do not come at once.
const COME_BACK_MS: u32 = 300;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    latest: Option<Arc<Ownership>>,
    /// Of this shard's partitions those that it serves.
    served: PartitionSet,
    /// Not served any more; something of them may be on its way to the disk, up to that record.
    leaving: PartitionSet,
    leaving_upto: u64,
    /// Of those, what may not be served again before.
    withheld: PartitionSet,
    /// The version to be told as released.
    asked: Option<u64>,
    pub catch_up: CatchUp,
}

impl Moves {
    /// Whether a node owns something.
    pub fn owns(&self, node: NodeIndex) -> bool {
        let latest = self.latest.as_ref();
        latest.is_some_and(|latest| all().any(|partition| latest.part(partition).owner == Some(node)))
    }

    pub fn latest_shared(&self) -> Option<Arc<Ownership>> {
        self.latest.clone()
    }

    pub fn serves(&self, partition: Partition) -> bool {
        self.served.contains(partition)
    }

    /// What the next picture takes from this shard: what is asked for, and what is gone.
    fn going(&self, next: &Ownership, own: NodeIndex) -> (PartitionSet, PartitionSet) {
        let (mut given, mut lost) = (PartitionSet::default(), PartitionSet::default());
        for partition in self.served.iter() {
            let (part, known) = (next.part(partition), self.epoch(partition));
            if part.owner != Some(own) || part.epoch != known {
                lost.insert(partition);
            } else if part.giving {
                given.insert(partition);
            }
        }
        (given, lost)
    }

    fn epoch(&self, partition: Partition) -> u64 {
        self.latest.as_ref().map_or(0, |latest| latest.part(partition).epoch)
    }

    /// Of what is leaving already, what has changed hands.
    fn gone_meanwhile(&self, next: &Ownership, own: NodeIndex) -> PartitionSet {
        let gone = |partition: &Partition| {
            let part = next.part(*partition);
            part.owner != Some(own) || part.epoch != self.epoch(*partition)
        };
        self.leaving.iter().filter(gone).collect()
    }
}

impl Shard {
    /// Whether partitions change hands, and all nodes share one store.
    pub(crate) fn is_moving(&self) -> bool {
        self.nodes.as_ref().is_some_and(|nodes| nodes.moves.is_some())
    }

    /// Whether what other nodes own is in stores that this one can't read.
    pub(crate) fn stores_are_apart(&self) -> bool {
        self.nodes.as_ref().is_some_and(|nodes| nodes.moves.is_none())
    }

    fn moves(&self) -> Option<&Moves> {
        self.nodes.as_ref()?.moves.as_deref()
    }

    /// Whether records of a partition may be written here.
    pub(crate) fn may_write_of(&self, partition: Partition) -> bool {
        !self.is_moving() || self.is_here(self.owner(partition))
    }

    /// For the sweep: whether something of a partition may still be in memory.
    pub(crate) fn may_hold(&self, partition: Partition) -> bool {
        let leaving = self.moves().is_some_and(|moves| moves.leaving.contains(partition));
        leaving || self.is_here(self.owner(partition))
    }

    /// Judges what another shard says where partitions change hands. `None`: it is for what is not served here, and has been
    /// answered.
    pub(crate) fn take_if_served(
        &mut self,
        from: ShardIndex,
        message: ShardMessage,
        fx: &mut Effects,
    ) -> Option<ShardMessage> {
        let Some(moves) = self.moves() else { return Some(message) };
        match served_for(&message) {
            Some(partition) if !moves.serves(partition) => {
                self.not_served(from, message, fx);
                None
            }
            Some(_) | None => Some(message),
        }
    }

    /// Answers what is for a partition that is not served here. Nothing of it was done.
    pub(super) fn not_served(&mut self, from: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        let gone = ErrorCode::Unavailable;
        match message {
            ShardMessage::AskUser(ask) => self.tell_user_known(from, &ask, Err(gone), fx),
            // Who pushed it hears of the new place of its user, and says so there.
            ShardMessage::Deliver { message, wanted } => {
                if let Some(wanted) = wanted {
                    self.tell_timeout(wanted.origin, &message, fx);
                }
            }
            // The permit is with another shard now; who asks is told when the time is over.
            ShardMessage::Social(SocialMessage::AskAgain { .. }) => {}
            other => self.undelivered(self.config.shard, other, fx),
        }
    }

    /// Who owns what has changed, or what this node is asked to give up.
    pub(crate) fn placement_on(&mut self, next: Arc<Ownership>, fx: &mut Effects) {
        let version = next.version;
        let Some(nodes) = &mut self.nodes else { return debug_assert!(false, "a node alone") };
        let own = nodes.placement.own();
        let Some(moves) = nodes.moves.as_mut() else { return debug_assert!(false, "configured nodes") };
        if moves.latest.as_ref().is_some_and(|latest| latest.version > version) {
            return;
        }
        let (given, lost) = moves.going(&next, own);
        let meanwhile = moves.gone_meanwhile(&next, own);
        moves.asked = all()
            .any(|partition| {
                let part = next.part(partition);
                part.giving && part.owner == Some(own)
            })
            .then_some(version);
        // What is given is written until here; what is lost is another's already.
        self.close_sessions_of(&given, fx);
        let Some(nodes) = &mut self.nodes else { return };
        let Some(moves) = nodes.moves.as_mut() else { return };
        moves.withheld.join(&lost);
        moves.withheld.join(&meanwhile);
        let mut going = given;
        going.join(&lost);
        moves.leaving.join(&going);
        moves.served.part_from(&going);
        let before = nodes.placement.clone();
        moves.latest = Some(Arc::clone(&next));
        self.name_nodes(&next);
        self.follow_latest();
        self.forget_known_of(&lost);
        self.close_sessions_of(&lost, fx);
        self.let_go_of(&going, fx);
        let upto = self.appended;
        if let Some(moves) = self.nodes.as_mut().and_then(|nodes| nodes.moves.as_mut()) {
            moves.leaving_upto = if going.is_empty() { moves.leaving_upto } else { upto };
        }
        self.others_moved(&before, fx);
        self.owners_changed();
        self.left_behind(fx);
    }

    /// Brings the view of who owns what up to date, and what of it is served here.
    fn follow_latest(&mut self) {
        let Some(nodes) = &mut self.nodes else { return };
        let Some(moves) = nodes.moves.as_mut() else { return };
        let Some(latest) = &moves.latest else { return };
        nodes.placement.follow(latest, &moves.withheld);
        let (shard, before) = (self.config.shard, moves.served);
        let here = |partition: &Partition| nodes.placement.shard_of(*partition) == shard;
        moves.served = all().filter(here).collect();
        // A wish that was taken back: it is as if there had been none.
        moves.leaving.part_from(&moves.served);
        let mut come = moves.served;
        come.part_from(&before);
        if !come.is_empty() {
            self.recover_again();
        }
    }

    fn name_nodes(&mut self, next: &Ownership) {
        let Some(nodes) = &mut self.nodes else { return };
        for (node, known) in next.nodes() {
            if let Some(peer) = nodes.peer_mut(node) {
                peer.name.clone_from(&known.name);
                peer.address.clone_from(&known.address);
            }
        }
    }

    /// Whether the last of what has gone is on disk: then nothing of it stays.
    pub(crate) fn left_behind(&mut self, fx: &mut Effects) {
        let stored = self.stored;
        let Some(moves) = self.nodes.as_mut().and_then(|nodes| nodes.moves.as_mut()) else { return };
        if stored < moves.leaving_upto {
            return;
        }
        let (left, withheld) = (std::mem::take(&mut moves.leaving), std::mem::take(&mut moves.withheld));
        let asked = moves.asked.take();
        if !left.is_empty() {
            self.forget_all_of(&left);
        }
        if !withheld.is_empty() {
            self.follow_latest();
        }
        fx.list.extend(asked.map(|version| Effect::Released { version }));
    }

    /// Sessions of these users end, and logins under way.
    fn close_sessions_of(&mut self, gone: &PartitionSet, fx: &mut Effects) {
        if gone.is_empty() {
            return;
        }
        for conn in self.sessions.ids() {
            match self.sessions.get(conn).map(|session| &session.state) {
                Some(State::LoggedIn(login)) if gone.contains(login.user.partition()) => {
                    let partition = login.user.partition();
                    // Who has it now, if that is told and can be reached; while it is nobody's the client looks for it, and
                    // one that a gateway holds comes back to that.
                    let held = self.sessions.get(conn).is_some_and(|session| session.tunnelled);
                    let home = self.nodes.as_ref().filter(|_| !held).and_then(|nodes| {
                        let owner = nodes.placement.owner_of(partition)?;
                        nodes.peer(owner).filter(|peer| peer.up && owner != nodes.placement.own())
                    });
                    let (node, address) = home.map_or(("", ""), |peer| (peer.name.as_str(), peer.address.as_str()));
                    let (reason, reconnect_after_ms) = (GoawayReason::Moved, COME_BACK_MS + spread(conn));
                    let goaway = Reply::Goaway { reason, reconnect_after_ms, node, address };
                    self.sessions.push(conn, &goaway, fx);
                    self.sessions.close(conn, CloseReason::Moved, fx);
                }
                Some(State::Greeted(Some(attempt))) if gone.contains(attempt.partition()) => {
                    self.attempt_failed(conn, ErrorCode::Unavailable, fx);
                    self.sessions.close(conn, CloseReason::Moved, fx);
                }
                Some(State::Fresh | State::Greeted(_) | State::LoggedIn(_) | State::Draining) | None => {}
            }
        }
        self.forget_ended(fx);
    }

    /// What devices of these users have acknowledged and is not written is another's to write.
    fn forget_known_of(&mut self, lost: &PartitionSet) {
        if lost.is_empty() {
            return;
        }
        for conn in self.sessions.ids() {
            if let Some(login) = self.sessions.login_mut(conn).filter(|login| lost.contains(login.user.partition())) {
                login.forget_known();
            }
        }
    }

    /// What is done for users and conversations of shards that were others before.
    fn others_moved(&mut self, before: &ClusterPlacement, fx: &mut Effects) {
        let Some(nodes) = &self.nodes else { return };
        let now = &nodes.placement;
        let differs = |partition: &Partition| before.shard_of(*partition) != now.shard_of(*partition);
        let moved: PartitionSet = all().filter(differs).collect();
        if moved.is_empty() {
            return;
        }
        self.forget_targets();
        self.place_pending_anew();
        self.ask_again_about(&moved, fx);
        self.watch_again(&moved, fx);
        let mut told: BTreeMap<ShardIndex, Vec<u16>> = BTreeMap::new();
        for partition in moved.iter() {
            told.entry(self.owner(partition)).or_default().push(partition.number());
        }
        for (shard, partitions) in told {
            if shard != NOBODY && !self.is_here(shard) {
                self.tell_shard(shard, ShardMessage::Moved { partitions }, fx);
            }
        }
    }

    /// What is on its way to the disk goes to the members where they are then.
    fn place_pending_anew(&mut self) {
        let Some(nodes) = &self.nodes else { return };
        // Messages of one group share their list.
        let mut last = None;
        for pending in &mut self.pending {
            let Some(targets) = pending.work.targets_mut() else { continue };
            match &last {
                Some((old, new)) if Arc::ptr_eq(old, targets) => *targets = Arc::clone(new),
                Some(_) | None => {
                    let new = placed_anew(targets, |partition| nodes.placement.shard_of(partition));
                    last = Some((std::mem::replace(targets, Arc::clone(&new)), new));
                }
            }
        }
    }

    /// Conversations that have asked about a user whose shard was another.
    fn ask_again_about(&mut self, moved: &PartitionSet, fx: &mut Effects) {
        let asking = self.conversations.iter().filter_map(|(id, conversation)| {
            let user = conversation.waiting.front().map(|submit: &Submit| submit.message.to.clone())?;
            let asks = matches!(conversation.stage, Stage::AskingUser { .. });
            (asks && moved.contains(user.partition())).then_some((*id, user))
        });
        let mut asking: Vec<_> = asking.collect();
        asking.sort_unstable();
        for (id, user) in asking {
            self.user_known(id, &user, Err(ErrorCode::Unavailable), fx);
        }
    }

    fn watch_again(&mut self, moved: &PartitionSet, fx: &mut Effects) {
        let users = self.watched_of(moved);
        let mut by_shard: BTreeMap<ShardIndex, Vec<UserName>> = BTreeMap::new();
        for user in users {
            by_shard.entry(self.owner(user.partition())).or_default().push(user);
        }
        for (shard, users) in by_shard {
            self.ask_presence_of(shard, &users, fx);
        }
    }

    /// The copy of a message for its sender's other devices goes where the request came from; they may be elsewhere by now.
    pub(crate) fn copy_follows(&mut self, origin: Origin, user: &UserName, fx: &mut Effects) {
        if !self.is_moving() {
            return;
        }
        let home = self.owner(user.partition());
        if home == origin.shard || home == NOBODY {
            return;
        }
        let partitions = vec![user.partition().number()];
        if self.is_here(home) {
            self.moved_here(&partitions);
        } else {
            self.tell_shard(home, ShardMessage::Moved { partitions }, fx);
        }
    }
}

/// When a connection comes back, beside what all wait.
fn spread(conn: ConnId) -> u32 {
    (conn.slot.wrapping_mul(2_654_435_761) >> 16) % COME_BACK_MS
}

/// The partition that something is for, if only who serves it may take it.
fn served_for(message: &ShardMessage) -> Option<Partition> {
    match message {
        ShardMessage::Deliver { message, .. } => Some(message.to.partition()),
        ShardMessage::Social(SocialMessage::Signal(signal)) => Some(signal.to.partition()),
        ShardMessage::Social(SocialMessage::AskAgain { conversation, .. }) => Some(conversation.partition()),
        ShardMessage::Visit(submit) => {
            let next = submit.more.as_ref().and_then(|more| more.unvisited.last());
            next.map(UserName::partition)
        }
        // Every node reads what all share.
        ShardMessage::Fetch { .. } => None,
        other => meant_for(other),
    }
}
