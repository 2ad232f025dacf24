//! What is read from the stores of other nodes. Owned by the shard that asks.
//!
//! A list of a user's conversations is put together from the stores of all nodes; each row comes from the node of the
//! conversation, and what only the user's own node knows (cursors, marks) is laid over it. Messages come from the shard that
//! owns their conversation. Invariant: a reading ends once, by all its parts, by a node that went, or by its time.

use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceKey, UserName};
use ringline_schema::record::{Answer, ConversationRow, Query, Range};
use smallvec::SmallVec;

use super::veil::Then;
use super::{Due, Nodes};
use crate::event::Effects;
use crate::peer::ShardMessage;
use crate::shard::{Question, Shard};

/// A question that a shard puts to the store of another node: only what that node owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeRead {
    Conversations { user: UserName, device: DeviceKey, cursor: ConversationId, limit: u16 },
    Messages { conversation: ConversationId, range: Range, reader: Option<UserName> },
    GroupCount { user: UserName },
}

impl NodeRead {
    pub(crate) fn into_query(self) -> Query {
        match self {
            Self::Conversations { user, device, cursor, limit } => Query::Conversations { user, device, cursor, limit },
            Self::Messages { conversation, range, reader } => Query::Messages { conversation, range, reader },
            Self::GroupCount { user } => Query::GroupCount { user },
        }
    }
}

/// Whose parts make a list whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whole {
    /// Of every node: if one is away there is no answer.
    All,
    /// Of those that are up; what others have is made good when they are back.
    Reachable,
    /// As [`Whole::Reachable`], but there is no answer without the node of this conversation, which is asked of its owner: so
    /// that nobody is told that there is no such conversation who only could not be told of it.
    With(ConversationId),
    /// Of this one alone.
    Only(NodeIndex),
}

/// A list of conversations as it is asked for.
#[derive(Clone, Debug)]
pub(crate) struct ListAsk {
    pub user: UserName,
    pub device: DeviceKey,
    pub cursor: ConversationId,
    pub limit: u16,
}

/// One under way.
#[derive(Debug)]
pub(crate) struct Reading {
    question: Question,
    /// Nodes whose part is awaited.
    from: SmallVec<[NodeIndex; 4]>,
    whole: Whole,
    gathered: Gathering,
}

#[derive(Debug)]
enum Gathering {
    List(ListAsk, Vec<ConversationRow>),
    Count(u32),
    /// From one node, for that reader.
    Messages(Option<Answer>, Option<UserName>),
}

impl Nodes {
    /// Whether there is no answer without that node.
    fn needs(&self, whole: Whole, node: NodeIndex) -> bool {
        match whole {
            Whole::All => true,
            Whole::Reachable => false,
            Whole::With(id) => self.placement.node_of(id.partition()) == node,
            Whole::Only(only) => only == node,
        }
    }
}

impl Shard {
    /// Asks the stores that have what is asked: this node's, the owner's, or those that `whole` says.
    pub(crate) fn load_anywhere(&mut self, question: Question, (query, whole): (Query, Whole), fx: &mut Effects) {
        match query {
            Query::Conversations { user, device, cursor, limit } => {
                self.load_list(question, (ListAsk { user, device, cursor, limit }, whole), fx);
            }
            Query::Messages { conversation, range, reader } => {
                self.load_messages(question, (conversation, range, reader), fx);
            }
            Query::GroupCount { user } => self.load_group_count(question, user, fx),
            Query::User { .. } | Query::Head { .. } | Query::Row { .. } | Query::Rows { .. } | Query::Listed { .. } => {
                self.load(question, query, fx);
            }
        }
    }

    /// Asks for conversations of a user, of all nodes that `whole` says.
    pub(crate) fn load_list(&mut self, question: Question, (ask, whole): (ListAsk, Whole), fx: &mut Effects) {
        let ListAsk { user, device, cursor, limit } = ask.clone();
        if !self.stores_are_apart() {
            return self.load(question, Query::Conversations { user, device, cursor, limit }, fx);
        }
        let read = NodeRead::Conversations { user: user.clone(), device, cursor, limit };
        self.read_from(question, (whole, Gathering::List(ask, Vec::new())), (&user, read), fx);
    }

    /// Asks how many groups a user is in.
    pub(crate) fn load_group_count(&mut self, question: Question, user: UserName, fx: &mut Effects) {
        if !self.stores_are_apart() {
            return self.load(question, Query::GroupCount { user }, fx);
        }
        let read = NodeRead::GroupCount { user: user.clone() };
        self.read_from(question, (Whole::Reachable, Gathering::Count(0)), (&user, read), fx);
    }

    /// Asks for messages of a conversation, wherever it lives.
    pub(crate) fn load_messages(
        &mut self,
        question: Question,
        (conversation, range, reader): (ConversationId, Range, Option<UserName>),
        fx: &mut Effects,
    ) {
        let owner = self.owner(conversation.partition());
        if !self.stores_are_apart() || !self.is_remote(owner) {
            return self.load(question, Query::Messages { conversation, range, reader }, fx);
        }
        let (from, whole) = (SmallVec::from_slice(&[owner.node()]), Whole::Only(owner.node()));
        let gathered = Gathering::Messages(None, reader.clone());
        let number = self.begin_read(Reading { question, from, whole, gathered });
        let read = Box::new(NodeRead::Messages { conversation, range, reader });
        self.tell_shard(owner, ShardMessage::Read { number, read }, fx);
    }

    fn begin_read(&mut self, reading: Reading) -> u64 {
        let Some(nodes) = &mut self.nodes else { return 0 };
        let number = nodes.number();
        nodes.reads.insert(number, reading);
        self.expire_later(Due::Read(number));
        number
    }

    fn read_from(
        &mut self,
        question: Question,
        (whole, gathered): (Whole, Gathering),
        (user, read): (&UserName, NodeRead),
        fx: &mut Effects,
    ) {
        let Some(nodes) = &mut self.nodes else { return };
        let own = nodes.placement.own();
        let all: SmallVec<[NodeIndex; 4]> = match whole {
            Whole::Only(node) => SmallVec::from_slice(&[node]),
            // Gateways keep nothing.
            Whole::All | Whole::Reachable | Whole::With(_) => {
                nodes.placement.nodes().filter(|node| nodes.placement.owns(*node)).collect()
            }
        };
        let needed = |node: &NodeIndex| nodes.needs(whole, *node);
        let (from, away): (SmallVec<[_; 4]>, SmallVec<[_; 4]>) = all.into_iter().partition(|node| nodes.is_up(*node));
        if away.iter().any(needed) {
            return self.unanswered(question, fx);
        }
        for node in &away {
            nodes.stale(*node);
        }
        let partition = |node: NodeIndex| match whole {
            Whole::With(id) if nodes.placement.node_of(id.partition()) == node => id.partition(),
            Whole::With(_) | Whole::All | Whole::Reachable | Whole::Only(_) => user.partition(),
        };
        let shards: SmallVec<[_; 4]> =
            from.iter().map(|node| nodes.placement.shard_on(*node, partition(*node))).collect();
        let number = self.begin_read(Reading { question, from, whole, gathered });
        for shard in shards {
            if shard.node() == own {
                self.load(Question::Part(number), read.clone().into_query(), fx);
            } else {
                self.tell_shard(shard, ShardMessage::Read { number, read: Box::new(read.clone()) }, fx);
            }
        }
    }

    /// A shard of another node reads here.
    pub(crate) fn read_for(&mut self, asker: ShardIndex, number: u64, read: NodeRead, fx: &mut Effects) {
        if self.may_load() {
            self.load(Question::Read(asker, number), read.into_query(), fx);
        } else {
            self.tell_shard(asker, ShardMessage::ReadDone { number, answer: Box::new(Answer::Failed) }, fx);
        }
    }

    /// A part has come from a node.
    pub(crate) fn read_done(&mut self, number: u64, (node, answer): (NodeIndex, Answer), fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        let own = nodes.placement.own();
        let Some(reading) = nodes.reads.get_mut(&number) else { return };
        let Some(at) = reading.from.iter().position(|from| *from == node) else { return };
        reading.from.swap_remove(at);
        match (&mut reading.gathered, answer) {
            // A peer with a defect does not list what others own.
            (Gathering::List(_, rows), Answer::Conversations(more)) => {
                let its = |row: &ConversationRow| nodes.placement.node_of(row.conversation.partition()) == node;
                rows.extend(more.into_iter().filter(its));
            }
            (Gathering::Count(sum), Answer::Count(more)) => *sum = sum.saturating_add(more),
            (Gathering::Messages(place, _), answer @ (Answer::Messages { .. } | Answer::NotReadable)) => {
                *place = Some(answer);
            }
            (Gathering::List(..) | Gathering::Count(_) | Gathering::Messages(..), _) => {
                let reading = nodes.reads.remove(&number);
                return reading.map_or((), |reading| self.unanswered(reading.question, fx));
            }
        }
        debug_assert!(node == own || self.is_clustered());
        self.read_on(number, fx);
    }

    /// Answers when all parts are there.
    fn read_on(&mut self, number: u64, fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        if nodes.reads.get(&number).is_none_or(|reading| !reading.from.is_empty()) {
            return;
        }
        let Some(Reading { question, gathered, .. }) = nodes.reads.remove(&number) else { return };
        match gathered {
            Gathering::Count(sum) => self.answered(question, Answer::Count(sum), fx),
            Gathering::Messages(Some(answer), reader) => self.veil((reader, answer), Then::Answer(question), fx),
            Gathering::Messages(None, _) => self.unanswered(question, fx),
            Gathering::List(ListAsk { user, device, limit, .. }, mut rows) => {
                rows.sort_unstable_by_key(|row| row.conversation);
                rows.dedup_by_key(|row| row.conversation);
                rows.truncate(usize::from(limit));
                self.load(question, Query::Listed { user, device, rows }, fx);
            }
        }
    }

    /// A part will not come.
    pub(crate) fn read_lost(&mut self, number: u64, node: NodeIndex, fx: &mut Effects) {
        let Some(nodes) = &mut self.nodes else { return };
        let Some(reading) = nodes.reads.get_mut(&number) else { return };
        let whole = reading.whole;
        reading.from.retain(|from| *from != node);
        if !nodes.needs(whole, node) {
            if nodes.stale(node) {
                self.nodes_again();
            }
            return self.read_on(number, fx);
        }
        if let Some(reading) = nodes.reads.remove(&number) {
            self.unanswered(reading.question, fx);
        }
    }

    /// A node is gone, and with it what was asked of it.
    pub(crate) fn reads_lost(&mut self, node: NodeIndex, fx: &mut Effects) {
        let Some(nodes) = &self.nodes else { return };
        let asked = nodes.reads.iter().filter(|(_, reading)| reading.from.contains(&node)).map(|(number, _)| *number);
        for number in asked.collect::<Vec<_>>() {
            self.read_lost(number, node, fx);
        }
    }

    /// The time of a reading is over.
    pub(crate) fn read_late(&mut self, number: u64, fx: &mut Effects) {
        if let Some(reading) = self.nodes.as_mut().and_then(|nodes| nodes.reads.remove(&number)) {
            self.unanswered(reading.question, fx);
        }
    }

    /// What was asked of other nodes can't be answered now.
    fn unanswered(&mut self, question: Question, fx: &mut Effects) {
        let gone = ErrorCode::Unavailable;
        match question {
            Question::Conversations(origin) => self.sessions.fail(origin.conn, origin.request_id, gone, fx),
            Question::Sync(conn) => self.sync_failed(conn, gone, fx),
            Question::Last(work) => self.last_loaded(work, Answer::Failed, fx),
            Question::Mark(work) => self.mark_unavailable(&work, fx),
            Question::GroupCount(submit) => self.refuse(submit.origin, gone, fx),
            Question::Export(work) => self.export_unavailable(&work, fx),
            Question::Resync(resync) => self.resync_failed(&resync, fx),
            Question::Hide(hiding) => self.tell_done(hiding.origin, Err(gone), fx),
            // Tried again.
            Question::Deletion(question) => self.deletion_loaded(question, Answer::Failed, fx),
            Question::AttemptUser(_)
            | Question::AttemptWork(_)
            | Question::Head(..)
            | Question::KnowUser(..)
            | Question::Social(_)
            | Question::Fetch(..)
            | Question::Group(_)
            | Question::Visited(_)
            | Question::Devices(_)
            | Question::Original(_)
            | Question::Veil(_)
            | Question::CatchUp(_)
            | Question::Receipt(_)
            | Question::Receipts(_)
            | Question::Flush(..)
            | Question::Part(_)
            | Question::Read(..) => debug_assert!(false, "asked of this node alone"),
        }
    }
}
