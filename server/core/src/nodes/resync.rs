//! Brings the sessions of this shard up to date with the conversations of one node, after something of it was lost.
//!
//! Session by session, page by page: what the node's conversations hold beyond what the device has is told by LAGGED, and the
//! device fetches it. Sessions that log in later begin with a SYNC of their own. Invariants: one a node, at most
//! [`READS_MAX`] questions of it are open; when the node goes meanwhile, it begins anew when that is back.

use std::collections::VecDeque;

use ringline_cluster::placement::NodeIndex;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::Reply;
use ringline_schema::record::{Answer, ConversationRow};

use super::Due;
use super::reads::{ListAsk, Whole};
use crate::event::{ConnId, Effects};
use crate::peer::ShardMessage;
use crate::shard::{Question, Shard};

/// Questions of one comparison that are open at once.
const READS_MAX: usize = 32;
/// The place of a session, for questions that are asked for none.
const NO_SESSION: u32 = u32::MAX;

/// See the module.
#[derive(Debug)]
pub(crate) struct Resync {
    number: u64,
    /// Shards of the node whose index is awaited.
    flushing: usize,
    sessions: VecDeque<ConnId>,
    open: usize,
}

/// One page of one session.
#[derive(Debug)]
pub(crate) struct ResyncPage {
    node: NodeIndex,
    number: u64,
    conn: ConnId,
}

impl Shard {
    /// Begins, if devices here may lack something of that node and it is there.
    pub(super) fn resync_if_stale(&mut self, node: NodeIndex, fx: &mut Effects) {
        if self.is_moving() {
            return self.catch_up_if_stale(node);
        }
        let Some(nodes) = &mut self.nodes else { return };
        let begins = nodes.peer_mut(node).is_some_and(|peer| peer.up && std::mem::take(&mut peer.stale));
        if !begins {
            return;
        }
        let (number, shards) = (nodes.number(), nodes.shards_of(node).collect::<Vec<_>>());
        let sessions = self.sessions.iter().filter(|session| session.login().is_some()).map(|session| session.conn);
        let resync = Resync { number, flushing: shards.len(), sessions: sessions.collect(), open: 0 };
        nodes.resyncs.insert(node, resync);
        self.expire_later(Due::Resync(node, number));
        let conn = ConnId { slot: NO_SESSION, generation: u32::from(node.0) };
        for shard in shards {
            self.tell_shard(shard, ShardMessage::Flush { conn, number }, fx);
        }
    }

    /// A shard of the node has brought its index up to date. False: that was not for a comparison.
    pub(crate) fn resync_flushed(&mut self, (conn, number): (ConnId, u64), done: bool, fx: &mut Effects) -> bool {
        let Some(nodes) = self.nodes.as_mut().filter(|_| conn.slot == NO_SESSION) else { return false };
        let node = NodeIndex(conn.generation as u16);
        let Some(resync) = nodes.resyncs.get_mut(&node).filter(|resync| resync.number == number) else { return true };
        if done {
            resync.flushing = resync.flushing.saturating_sub(1);
            self.resync_on(node, fx);
        } else {
            self.resync_later(node);
        }
        true
    }

    /// It did not succeed: again in a while, or when the node is back.
    fn resync_later(&mut self, node: NodeIndex) {
        let Some(nodes) = &mut self.nodes else { return };
        nodes.resyncs.remove(&node);
        if nodes.stale(node) {
            self.nodes_again();
        }
    }

    /// The index of the node is awaited for too long: perhaps its answer had no room.
    pub(crate) fn resync_late(&mut self, node: NodeIndex, number: u64) {
        let resync = self.nodes.as_ref().and_then(|nodes| nodes.resyncs.get(&node));
        if resync.is_some_and(|resync| resync.number == number && resync.flushing > 0) {
            self.resync_later(node);
        }
    }

    fn resync_on(&mut self, node: NodeIndex, fx: &mut Effects) {
        loop {
            let Some(nodes) = &mut self.nodes else { return };
            let Some(resync) = nodes.resyncs.get_mut(&node).filter(|resync| resync.flushing == 0) else { return };
            if resync.open >= READS_MAX {
                return;
            }
            let Some(conn) = resync.sessions.pop_front() else {
                if resync.open == 0 {
                    nodes.resyncs.remove(&node);
                }
                return;
            };
            resync.open += 1;
            let page = ResyncPage { node, number: resync.number, conn };
            self.resync_page(page, ConversationId(0), fx);
        }
    }

    fn resync_page(&mut self, page: ResyncPage, cursor: ConversationId, fx: &mut Effects) {
        let Some(login) = self.sessions.login_mut(page.conn) else { return self.resync_ended(&page, fx) };
        let ask = ListAsk { user: login.user.clone(), device: login.key(), cursor, limit: limits::PAGE_ROWS_MAX };
        let whole = Whole::Only(page.node);
        self.load_list(Question::Resync(Box::new(page)), (ask, whole), fx);
    }

    /// The session has heard of everything.
    fn resync_ended(&mut self, page: &ResyncPage, fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        let Some(resync) = nodes.resyncs.get_mut(&page.node).filter(|resync| resync.number == page.number) else {
            return;
        };
        resync.open = resync.open.saturating_sub(1);
        self.resync_on(page.node, fx);
    }

    pub(crate) fn resync_failed(&mut self, page: &ResyncPage, _fx: &mut Effects) {
        let current = self.nodes.as_ref().and_then(|nodes| nodes.resyncs.get(&page.node));
        if current.is_some_and(|resync| resync.number == page.number) {
            self.resync_later(page.node);
        }
    }

    pub(crate) fn resync_loaded(&mut self, page: Box<ResyncPage>, answer: Answer, fx: &mut Effects) {
        let Answer::Conversations(rows) = answer else { return self.resync_failed(&page, fx) };
        for row in &rows {
            self.tell_behind(page.conn, row, fx);
        }
        match rows.last() {
            Some(last) if rows.len() >= usize::from(limits::PAGE_ROWS_MAX) => {
                self.resync_page(*page, last.conversation, fx);
            }
            Some(_) | None => self.resync_ended(&page, fx),
        }
    }

    /// Tells a device of what it was not given of a conversation.
    pub(super) fn tell_behind(&mut self, conn: ConnId, row: &ConversationRow, fx: &mut Effects) {
        let Some(login) = self.sessions.login_mut(conn) else { return };
        // What was shown counts for nothing: lists show heads whose messages were not given.
        let known = login.known().get(&row.conversation).map_or(Seq::ZERO, |known| known.acked);
        let has = known.max(row.acked).max(Seq(row.first.0.saturating_sub(1)));
        if has >= row.head {
            return;
        }
        login.show(row.conversation, row.head);
        self.kept_from(conn, row.conversation, row.first, fx);
        let reply =
            Reply::Lagged { conversation: row.conversation, with: row.with.as_str(), from: has.next(), to: row.head };
        self.sessions.counters.lagged += 1;
        self.sessions.push(conn, &reply, fx);
    }
}
