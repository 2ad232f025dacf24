//! What sessions here may lack after partitions changed hands, found out and told. Owned by the shard of the sessions.
//!
//! All nodes share one store, so each shard compares what it shows a user with what the user's device has, and says LAGGED; the
//! device fetches it. That is wanted
//! - of what a node had pushed that is gone, as soon as all that it owned has changed hands: then nothing of it can be committed
//!   any more ([`Owed`]). A link that is back with the same process has lost nothing;
//! - of users that came here: who pushed to them while he knew them elsewhere says so when he hears of it
//!   ([`ShardMessage::Moved`](crate::event::ShardMessage::Moved));
//! - of everything, when a link had no room for something, or more came than could be held while the lease was over.
//!
//! Comparisons that are wanted become one. One runs at a time, a page of a session after the other, with [`PAGES_MAX`]
//! questions open; what could not be read is compared again. Told twice is as told once.

use std::collections::{BTreeMap, VecDeque};

use ringline_cluster::ownership::{PartitionSet, all};
use ringline_cluster::placement::NodeIndex;
use ringline_schema::ids::{ConversationId, Partition};
use ringline_schema::limits;
use ringline_schema::record::Answer;

use super::reads::{ListAsk, Whole};
use crate::event::{ConnId, Effects};
use crate::shard::{Question, Shard};

/// Questions of a comparison that are open at once.
const PAGES_MAX: usize = 32;

/// What sessions may lack: conversations of these partitions, sessions of users of those.
#[derive(Clone, Copy, Debug)]
struct Lacking {
    users: PartitionSet,
    conversations: PartitionSet,
}

/// What a node that is away had pushed and may be lost.
#[derive(Debug)]
struct Owed {
    /// What it still owns, with the epochs that it has it with.
    left: Vec<(Partition, u64)>,
    conversations: PartitionSet,
    /// It is another process by now: what was on its way is lost.
    died: bool,
}

#[derive(Debug)]
struct Run {
    number: u64,
    lacking: Lacking,
    sessions: VecDeque<ConnId>,
    open: usize,
    failed: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct CatchUp {
    wanted: Option<Lacking>,
    running: Option<Run>,
    /// Of nodes that are away.
    owed: BTreeMap<NodeIndex, Owed>,
    /// What other nodes own or owned since the last comparison of what they had pushed, and the last epoch that they had it
    /// with.
    had: BTreeMap<NodeIndex, BTreeMap<Partition, u64>>,
}

impl CatchUp {
    /// Whether a session here may not have heard of a conversation.
    pub fn is_wanted(&self) -> bool {
        self.wanted.is_some() || self.running.is_some()
    }
}

/// A page of one session.
#[derive(Debug)]
pub(crate) struct CatchUpPage {
    number: u64,
    conn: ConnId,
}

impl Shard {
    fn catch_up_mut(&mut self) -> Option<&mut CatchUp> {
        Some(&mut self.nodes.as_mut()?.moves.as_mut()?.catch_up)
    }

    fn want(&mut self, lacking: Lacking) {
        let Some(catch_up) = self.catch_up_mut() else { return };
        let wanted = catch_up.wanted.get_or_insert(lacking);
        wanted.users.join(&lacking.users);
        wanted.conversations.join(&lacking.conversations);
        self.nodes_again();
    }

    /// Anything may be lacking.
    pub(crate) fn want_all(&mut self) {
        self.want(Lacking { users: PartitionSet::ALL, conversations: PartitionSet::ALL });
    }

    /// Something for devices here was not sent by that node, perhaps.
    pub(super) fn catch_up_if_stale(&mut self, node: NodeIndex) {
        let peer = self.nodes.as_mut().and_then(|nodes| nodes.peer_mut(node));
        if peer.is_some_and(|peer| std::mem::take(&mut peer.stale)) {
            self.want_all();
        }
    }

    /// What another shard pushed to users of these partitions may have gone to where they were.
    pub(crate) fn moved_here(&mut self, partitions: &[u16]) {
        let Some(moves) = self.nodes.as_ref().and_then(|nodes| nodes.moves.as_ref()) else { return };
        let partitions = partitions.iter().filter_map(|number| Partition::new(*number));
        let users: PartitionSet = partitions.filter(|partition| moves.serves(*partition)).collect();
        if !users.is_empty() {
            self.want(Lacking { users, conversations: PartitionSet::ALL });
        }
    }

    /// A node can't be spoken to; `died`: it is another process by now.
    pub(super) fn node_is_away(&mut self, node: NodeIndex, died: bool) {
        let Some(moves) = self.nodes.as_mut().and_then(|nodes| nodes.moves.as_mut()) else { return };
        let Some(latest) = moves.latest_shared() else { return };
        let CatchUp { owed, had, .. } = &mut moves.catch_up;
        let owed = owed.entry(node).or_insert_with(|| {
            let had = had.get(&node);
            let had = || had.into_iter().flatten().map(|(partition, epoch)| (*partition, *epoch));
            // It may have been found dead before its link was; nobody has taken these from it yet.
            let left = had().filter(|(partition, epoch)| latest.part(*partition).epoch == *epoch).collect();
            Owed { left, conversations: had().map(|(partition, _)| partition).collect(), died }
        });
        owed.died |= died;
        self.owners_changed();
    }

    /// A node can be spoken to: if it is the process that it was, what was on its way comes now.
    pub(super) fn node_is_back(&mut self, node: NodeIndex) {
        if let Some(catch_up) = self.catch_up_mut()
            && catch_up.owed.get(&node).is_some_and(|owed| !owed.died)
        {
            catch_up.owed.remove(&node);
        }
    }

    /// Looks which nodes that are away have nothing any more of what they owned.
    pub(super) fn owners_changed(&mut self) {
        let Some(nodes) = &mut self.nodes else { return };
        let own = nodes.placement.own();
        let Some(moves) = nodes.moves.as_mut() else { return };
        let Some(latest) = moves.latest_shared() else { return };
        let CatchUp { owed, had, .. } = &mut moves.catch_up;
        let mut lost = PartitionSet::default();
        owed.retain(|node, owed| {
            // That its owner is not alive says nothing; that nobody writes with this epoch any more does.
            owed.left.retain(|(partition, epoch)| latest.part(*partition).epoch == *epoch);
            if owed.left.is_empty() {
                lost.join(&owed.conversations);
                had.remove(node);
            }
            !owed.left.is_empty()
        });
        for partition in all() {
            if let Some(owner) = latest.part(partition).owner.filter(|owner| *owner != own) {
                had.entry(owner).or_default().insert(partition, latest.part(partition).epoch);
            }
        }
        if !lost.is_empty() {
            self.want(Lacking { users: PartitionSet::ALL, conversations: lost });
        }
    }

    /// Begins what is wanted, unless a comparison runs.
    pub(super) fn catch_up_due(&mut self, fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        let number = nodes.next + 1;
        let Some(moves) = nodes.moves.as_mut() else { return };
        if moves.catch_up.running.is_some() {
            return;
        }
        let Some(lacking) = moves.catch_up.wanted.take() else { return };
        nodes.next = number;
        let of = |partition| lacking.users.contains(partition);
        let sessions =
            self.sessions.iter().filter(|session| session.login().is_some_and(|login| of(login.user.partition())));
        let sessions = sessions.map(|session| session.conn).collect();
        moves.catch_up.running = Some(Run { number, lacking, sessions, open: 0, failed: false });
        self.catch_up_on(fx);
    }

    fn catch_up_on(&mut self, fx: &mut Effects) {
        loop {
            let Some(catch_up) = self.catch_up_mut() else { return };
            let Some(run) = &mut catch_up.running else { return };
            if run.open >= PAGES_MAX {
                return;
            }
            let Some(conn) = run.sessions.pop_front() else {
                if run.open > 0 {
                    return;
                }
                let (failed, lacking) = (run.failed, run.lacking);
                catch_up.running = None;
                if failed {
                    self.want(lacking);
                } else if catch_up.wanted.is_some() {
                    self.nodes_again();
                }
                return;
            };
            let page = CatchUpPage { number: run.number, conn };
            if self.sessions.login_mut(conn).is_some() {
                if let Some(run) = self.catch_up_mut().and_then(|catch_up| catch_up.running.as_mut()) {
                    run.open += 1;
                }
                self.catch_up_page(page, ConversationId(0), fx);
            }
        }
    }

    /// The next page of a session. One that is gone by now has nothing to hear.
    fn catch_up_page(&mut self, page: CatchUpPage, cursor: ConversationId, fx: &mut Effects) {
        let Some(login) = self.sessions.login_mut(page.conn) else { return self.catch_up_ended(&page, true) };
        let ask = ListAsk { user: login.user.clone(), device: login.key(), cursor, limit: limits::PAGE_ROWS_MAX };
        if self.may_load() {
            self.load_list(Question::CatchUp(Box::new(page)), (ask, Whole::Reachable), fx);
        } else {
            self.catch_up_ended(&page, false);
        }
    }

    fn catch_up_ended(&mut self, page: &CatchUpPage, done: bool) {
        let run = self.catch_up_mut().and_then(|catch_up| catch_up.running.as_mut());
        if let Some(run) = run.filter(|run| run.number == page.number) {
            run.open = run.open.saturating_sub(1);
            run.failed |= !done;
        }
    }

    pub(crate) fn catch_up_loaded(&mut self, page: CatchUpPage, answer: Answer, fx: &mut Effects) {
        let run = self.catch_up_mut().and_then(|catch_up| catch_up.running.as_ref());
        let Some(run) = run.filter(|run| run.number == page.number) else { return };
        let of = run.lacking.conversations;
        match answer {
            Answer::Conversations(rows) => {
                for row in rows.iter().filter(|row| of.contains(row.conversation.partition())) {
                    self.tell_behind(page.conn, row, fx);
                }
                match rows.last() {
                    Some(last) if rows.len() >= usize::from(limits::PAGE_ROWS_MAX) => {
                        self.catch_up_page(page, last.conversation, fx);
                    }
                    Some(_) | None => self.catch_up_ended(&page, true),
                }
            }
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Row(_)
            | Answer::Rows(_)
            | Answer::Count(_) => self.catch_up_ended(&page, false),
        }
        self.catch_up_on(fx);
    }
}
