//! The shard: one inbox, one writer. Owns everything of its partitions; every change enters by [`Shard::handle`].

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use bytes::BytesMut;
use foldhash::fast::FixedState;
use lru::LruCache;
use ringline_cluster::placement::ShardIndex;
use ringline_cluster::router::Router;
use ringline_schema::codec::{Codec, PlainSend};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::Flags;
use ringline_schema::ids::{ConversationId, DeviceKey, Seq, UserName};
use ringline_schema::message::{Class, GoawayReason, Reply, Request, Send};
use ringline_schema::record::{Answer, Query, Range, Record, User};

use crate::committed::{Sent, SpareMessages};
use crate::config::{
    APPEND_BYTES_IN_FLIGHT_MAX, APPENDS_IN_FLIGHT_MAX, CURSOR_FLUSH_MS, CoreConfig, LOADS_IN_FLIGHT_MAX,
    WORK_IN_FLIGHT_MAX,
};
use crate::conversation::{Conversation, Pending};
use crate::counters::{Counters, Levels};
use crate::deletion::{DeletionQuestion, Deletions};
use crate::deliver::DeliveryWaits;
use crate::devices::DeviceWork;
use crate::event::{CloseReason, ConnId, Effect, Effects, Event, Now, ShardMessage, Token, Verdict, Work, WorkOutcome};
use crate::export::ExportWork;
use crate::group::cache::{GroupQuestion, Slot};
use crate::group::slices::FanOuts;
use crate::hide::Hiding;
use crate::list::{ListWork, MarkWork};
use crate::nodes::Nodes;
use crate::nodes::catch_up::CatchUpPage;
use crate::nodes::lease::Leased;
use crate::nodes::resync::ResyncPage;
use crate::nodes::veil::Veil;
use crate::online::Online;
use crate::peer::{Ask, Origin, Submit};
use crate::planted::{Bug, Planted};
use crate::read::is_truncated;
use crate::receipt_list::ReceiptList;
use crate::receipts::{Reader, Receipts};
use crate::session::{Sessions, State};
use crate::social::{Social, SocialQuestion};
use crate::sync::SyncWork;
use crate::timers::{Timer, Timers};

/// What an open question to the store or the workers is for.
#[derive(Debug)]
pub(crate) enum Question {
    /// The user that a connection's REGISTER or LOGIN is about.
    AttemptUser(ConnId),
    AttemptWork(ConnId),
    /// The head of a conversation and the filter of this device in it.
    Head(ConversationId, DeviceKey),
    /// Whether a user exists, for the first message of a conversation owned by that shard.
    KnowUser(ShardIndex, Box<Ask>),
    Social(SocialQuestion),
    Fetch(Origin, ConversationId, Range),
    Group(GroupQuestion),
    /// How many groups the sender of an act is in.
    GroupCount(Box<Submit>),
    /// Whether the next user that an act names exists.
    Visited(Box<Submit>),
    Conversations(Origin),
    /// The last message of the next conversation of a page.
    Last(Box<ListWork>),
    Mark(Box<MarkWork>),
    Devices(Box<DeviceWork>),
    /// The message that the first waiting submit of a conversation amends.
    Original(ConversationId),
    /// Whether there is a message that its reader deletes for himself.
    Hide(Box<Hiding>),
    /// How far a user has a conversation of this shard.
    Receipt(Box<Reader>),
    Receipts(Box<ReceiptList>),
    Export(Box<ExportWork>),
    Deletion(DeletionQuestion),
    /// What the SYNC of this connection asks next.
    Sync(ConnId),
    /// Whether this shard's index is up to date, for the SYNC of a connection of that shard.
    Flush(ShardIndex, (ConnId, u64)),
    /// This node's part of what is read from all.
    Part(u64),
    /// What a shard of another node reads.
    Read(ShardIndex, u64),
    /// What the sessions here may lack of another node's conversations.
    Resync(Box<ResyncPage>),
    /// What the reader of messages of another node has deleted for himself.
    Veil(Box<Veil>),
    /// What a session may lack after partitions changed hands.
    CatchUp(Box<CatchUpPage>),
}

/// See the module. Fields are shared by the `impl` blocks of this crate's files, each of which says what it owns.
pub struct Shard {
    pub(crate) config: CoreConfig,
    pub(crate) now: Now,
    pub(crate) sessions: Sessions,
    pub(crate) timers: Timers,
    pub(crate) draining: bool,
    /// The store's disk has no room.
    pub(crate) disk_full: bool,
    pub(crate) store_away: bool,
    pub(crate) poisoned: bool,
    pub(crate) lanes_blocked: Vec<bool>,
    /// `None`: the node is alone.
    pub(crate) nodes: Option<Box<Nodes>>,
    /// `None`: what this node owns is its own whatever happens.
    pub(crate) lease: Option<Box<Leased>>,
    pub(crate) router: Router,
    pub(crate) questions: HashMap<Token, Question, FixedState>,
    pub(crate) next_token: u64,

    /// Users of this shard with devices logged in here.
    pub(crate) online: Online,
    pub(crate) logins: u64,
    /// Users asked for lately, bounded. Whoever logs in leaves it: that they exist is known as long as they stay.
    pub(crate) users: LruCache<UserName, User, FixedState>,
    /// Users whose record is on its way to the disk.
    pub(crate) creating: BTreeSet<UserName>,

    /// Conversations this shard owns, bounded; those with something in flight are never evicted.
    pub(crate) conversations: LruCache<ConversationId, Conversation, FixedState>,
    /// Groups this shard owns, bounded by their number and their members together.
    pub(crate) groups: LruCache<ConversationId, Slot, FixedState>,
    pub(crate) groups_members: usize,
    /// Messages of groups on their way to members here.
    pub(crate) fan_outs: FanOuts,
    /// Appends that somebody waits for, in order of their record numbers.
    pub(crate) pending: VecDeque<Pending>,
    pub(crate) pending_bytes: usize,
    /// Used again for each run of messages that are answered together; empty between events.
    pub(crate) run: Vec<Sent>,
    pub(crate) spare_messages: SpareMessages,
    /// The block that the next bodies go into.
    pub(crate) bodies: BytesMut,
    pub(crate) appended: u64,
    pub(crate) stored: u64,

    /// Delivery acknowledgements awaited from devices of this shard's users.
    pub(crate) delivery_waits: DeliveryWaits,
    /// The durable ones of them by what a cumulative ACK names.
    pub(crate) delivery_index: BTreeMap<(ConversationId, Option<UserName>, Seq), u64>,
    pub(crate) dirty_cursors: Vec<(ConnId, ConversationId)>,
    pub(crate) cursors_armed: bool,
    pub(crate) social: Social,

    /// SYNCs under way, at most one a session.
    pub(crate) syncs: BTreeMap<ConnId, Box<SyncWork>>,
    /// How far users have the conversations of this shard.
    pub(crate) receipts: Receipts,
    /// Users with a MARK under way.
    pub(crate) marking: BTreeSet<UserName>,
    /// RECEIPTS under way.
    pub(crate) receipt_lists: usize,
    /// EXPORTs under way.
    pub(crate) exports: usize,
    pub(crate) deletions: Deletions,
    pub(crate) planted: Planted,
}

impl Shard {
    /// `hash_seed` should be random in production: names are chosen by clients.
    pub fn new(config: CoreConfig, hash_seed: u64) -> Self {
        let hasher = FixedState::with_seed(hash_seed);
        let lanes = usize::from(config.placement.shards());
        let mut timers = Timers::default();
        Self {
            deletions: Deletions::new(&mut timers),
            now: Now::default(),
            sessions: Sessions::new(&config),
            timers,
            draining: false,
            disk_full: false,
            store_away: false,
            poisoned: false,
            lanes_blocked: vec![false; lanes],
            nodes: config.cluster.as_ref().map(|cluster| Box::new(Nodes::new(cluster))),
            lease: config.lease.clone().map(|lease| Box::new(Leased::new(lease))),
            router: Router::new(config.route.strategy, config.route.board.clone(), hash_seed),
            questions: HashMap::with_hasher(hasher.clone()),
            next_token: 0,
            online: Online::new(&hasher),
            logins: 0,
            users: LruCache::unbounded_with_hasher(hasher.clone()),
            creating: BTreeSet::new(),
            social: Social::new(&hasher),
            conversations: LruCache::unbounded_with_hasher(hasher.clone()),
            groups: LruCache::unbounded_with_hasher(hasher),
            groups_members: 0,
            fan_outs: FanOuts::default(),
            pending: VecDeque::new(),
            pending_bytes: 0,
            run: Vec::new(),
            spare_messages: SpareMessages::default(),
            bodies: BytesMut::new(),
            appended: 0,
            stored: 0,
            delivery_waits: DeliveryWaits::new(),
            delivery_index: BTreeMap::new(),
            dirty_cursors: Vec::new(),
            cursors_armed: false,
            syncs: BTreeMap::new(),
            receipts: Receipts::new(FixedState::with_seed(hash_seed)),
            marking: BTreeSet::new(),
            receipt_lists: 0,
            exports: 0,
            planted: Planted::default(),
            config,
        }
    }

    /// Switches a planted bug on; for tests of the simulator's checker.
    #[cfg(feature = "planted-bugs")]
    pub fn plant(&mut self, bug: Option<Bug>) {
        self.planted.plant(bug);
    }

    /// Takes one event to its end. Effects are added to `fx`; the verdict is about the event's connection.
    pub fn handle(&mut self, event: Event<'_>, now: Now, fx: &mut Effects) -> Verdict {
        self.now = now;
        self.sessions.now_us = now.mono_us;
        if self.lease.is_some() && !self.holds_lease(fx) {
            return self.handle_without_lease(event, fx);
        }
        let verdict = match event {
            Event::Request { conn, codec, flags, request_id, request } => {
                self.request(conn, (codec, request_id, flags), request, fx)
            }
            Event::Send { conn, codec, flags, request_id, send } => {
                let head = (codec, request_id, flags);
                if self.send_straight(conn, head, &send, fx) {
                    Verdict::Continue
                } else {
                    self.send_checked(conn, head, &send, fx)
                }
            }
            Event::Refused { conn, codec, request_id, code } => self.refused(conn, (codec, request_id), code, fx),
            other => {
                self.background(other, fx);
                Verdict::Continue
            }
        };
        if self.planted.is(Bug::AckBeforeCommit) {
            self.stored(self.appended, fx);
        }
        self.forget_ended(fx);
        verdict
    }

    /// Sessions that ended leave the online list.
    pub(crate) fn forget_ended(&mut self, fx: &mut Effects) {
        while let Some((conn, login)) = self.sessions.ended.pop() {
            self.forget_login(conn, &login, fx);
        }
    }

    /// A SEND that is not for the straight way.
    #[inline(never)]
    fn send_checked(
        &mut self,
        conn: ConnId,
        (codec, request_id, flags): (Codec, u32, Flags),
        send: &PlainSend<'_>,
        fx: &mut Effects,
    ) -> Verdict {
        // A run of messages to one name: it was looked at with the first of them.
        let last = self.sessions.get(conn).and_then(|session| session.login()?.last_sent_to()).cloned();
        match last.as_ref().and_then(|name| send.to_name(name.as_str())).map_or_else(|| send.check(), Ok) {
            Ok(send) => self.request(conn, (codec, request_id, flags), Request::Send(send), fx),
            Err(code) => self.refused(conn, (codec, request_id), code, fx),
        }
    }

    pub(crate) fn refused(
        &mut self,
        conn: ConnId,
        (codec, request_id): (Codec, u32),
        code: ErrorCode,
        fx: &mut Effects,
    ) -> Verdict {
        if let Some(session) = self.sessions.get_mut(conn) {
            session.codec = codec;
        }
        self.sessions.fail(conn, request_id, code, fx);
        if code.closes() { Verdict::Stop } else { Verdict::Continue }
    }

    /// Every event that is not a client's request.
    pub(crate) fn background(&mut self, event: Event<'_>, fx: &mut Effects) {
        match event {
            Event::Opened { conn } => self.opened(conn, fx),
            Event::Tunnelled { conn } => {
                self.opened(conn, fx);
                if let Some(session) = self.sessions.get_mut(conn) {
                    session.tunnelled = true;
                }
            }
            Event::Sent { conn, bytes } => self.sessions.sent(conn, bytes, fx),
            Event::Closed { conn } => {
                if self.sessions.remove(conn).is_some() {
                    self.sessions.counters.connections_closed += 1;
                }
            }
            Event::Stored { upto } if !self.planted.is(Bug::AckBeforeCommit) => self.stored(upto, fx),
            Event::Stored { .. } => {}
            Event::StoreFailed => self.store_failed(fx),
            Event::DiskSpace { full } => self.disk_full = full,
            Event::StoreAway { away } => self.store_away = away,
            Event::Loaded { token, answer } => self.loaded(token, answer, fx),
            Event::Worked { token, outcome } => self.worked(token, outcome, fx),
            Event::Shard { from, message } => self.hear(from, message, fx),
            Event::Placement(ownership) => self.placement_on(ownership, fx),
            Event::Node { node, news } => self.node_news(node, news, fx),
            Event::Unsent { to, message } => self.unsent(to, message, fx),
            Event::Timer => self.timers_due(fx),
            Event::Drain => self.drain(fx),
            Event::Request { .. } | Event::Send { .. } | Event::Refused { .. } => {
                debug_assert!(false, "handled by the caller")
            }
        }
    }

    fn hear(&mut self, from: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        let Some(message) = self.take_if_served(from, message, fx) else { return };
        let taken = if self.is_remote(from) { self.take_from_node(from, message, fx) } else { Some(message) };
        if let Some(message) = taken {
            self.shard_message(from, message, fx);
        }
    }

    fn opened(&mut self, conn: ConnId, fx: &mut Effects) {
        let full = self.sessions.len() >= self.config.connections_max;
        self.sessions.open(conn);
        if full {
            self.sessions.fail(conn, 0, ErrorCode::TooManyConnections, fx);
        } else if self.draining {
            self.sessions.push(conn, &GOAWAY, fx);
            self.sessions.close(conn, CloseReason::Draining, fx);
        } else {
            self.look_at(conn, self.now.mono_us + self.config.login_timeout_ms * 1_000);
        }
    }

    /// Looks at a connection's deadlines at this moment, and not before.
    pub(crate) fn look_at(&mut self, conn: ConnId, at_us: u64) {
        if let Some(session) = self.sessions.get_mut(conn) {
            session.look_us = at_us;
            self.timers.arm(at_us, Timer::Session(conn));
        }
    }

    pub(crate) fn request(
        &mut self,
        conn: ConnId,
        (codec, request_id, flags): (Codec, u32, Flags),
        request: Request<'_>,
        fx: &mut Effects,
    ) -> Verdict {
        let (now_us, rate) = (self.now.mono_us, self.sessions.rate);
        let Some(session) = self.sessions.get_mut(conn).filter(|session| !session.is_draining()) else {
            return Verdict::Stop;
        };
        session.codec = codec;
        session.heard_us = now_us;
        if matches!(session.state, State::Fresh) {
            session.state = State::Greeted(None);
        }
        let logged_in = session.login().is_some();
        let rate = session.take_rate(now_us, &rate);
        self.sessions.counters.requests += 1;
        if let Err(retry_ms) = rate {
            self.sessions.fail_after(conn, request_id, (ErrorCode::RateLimited, retry_ms), fx);
            return Verdict::Continue;
        }
        if !logged_in && !request.command().before_login() {
            self.sessions.fail(conn, request_id, ErrorCode::NotLoggedIn, fx);
            return Verdict::Stop;
        }
        let no_reply = flags.contains(Flags::NO_REPLY);
        if no_reply && !matches!(request, Request::Send(Send { class: Class::Transient, .. })) {
            self.sessions.fail(conn, request_id, ErrorCode::BadRequest, fx);
            return Verdict::Continue;
        }
        match request {
            Request::Register { user, password } => return self.register(conn, request_id, (user, password), fx),
            Request::Login(login) => return self.login(conn, request_id, &login, fx),
            Request::Logout => self.logout(conn, request_id, fx),
            Request::Ping { stamp } => {
                let reply = Reply::Pong { stamp, server_time_ms: self.now.unix_ms };
                self.sessions.answer(conn, request_id, &reply, fx);
            }
            Request::Route { user } => self.route(conn, request_id, user, fx),
            Request::Send(send) => self.send(conn, (request_id, no_reply), &send, fx),
            Request::Ack(ack) => self.ack(conn, request_id, ack, fx),
            Request::Fetch(fetch) => self.fetch(conn, request_id, &fetch, fx),
            Request::Online { cursor, limit } => self.online(conn, request_id, (cursor, limit), fx),
            Request::Conversations { cursor, limit } => self.conversations(conn, request_id, (cursor, limit), fx),
            Request::Chat(request) => self.chat(conn, request_id, request, fx),
            Request::Group { group, act } => self.group_request(conn, request_id, (group, &act), fx),
        }
        match self.sessions.get(conn) {
            Some(session) if !session.is_draining() => Verdict::Continue,
            _ => Verdict::Stop,
        }
    }

    fn shard_message(&mut self, from: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        match message {
            ShardMessage::Submit(submit) => self.submit(*submit, fx),
            ShardMessage::Transient(send) => self.transient_from_peer(send, fx),
            ShardMessage::SendResult { origin, durable, result, copy } => {
                self.send_result(origin, (durable, result), copy.as_ref(), fx);
            }
            ShardMessage::Deliver { message, wanted } => self.deliver_from_peer(message, wanted, fx),
            ShardMessage::Receipt { origin, receipt } => self.receipt(origin, receipt, fx),
            ShardMessage::AskUser(ask) => self.know_user(from, ask, fx),
            ShardMessage::UserKnown { conversation, user, known } => {
                self.user_known(conversation, &user, known, fx);
            }
            ShardMessage::Social(message) => self.social_message(from, message, fx),
            ShardMessage::Fetch { origin, conversation, range, reader } => {
                let query = Query::Messages { conversation, range, reader };
                self.load(Question::Fetch(origin, conversation, range), query, fx);
            }
            ShardMessage::Visit(submit) => self.visit(*submit, fx),
            ShardMessage::GroupAnswered { origin, answer } => self.group_answered(origin, &answer, fx),
            ShardMessage::DeliverGroup { message, members, skip, relay } => {
                self.deliver_to_members(&message, &members, (skip, relay), fx);
            }
            ShardMessage::PassGroup { pass, members } => self.pass_to_members(from, &pass, &members, fx),
            ShardMessage::GroupReached { wait, device } => self.delivered(wait, device, fx),
            ShardMessage::PushGroup { users, push } => self.group_pushed(&users, &push, fx),
            ShardMessage::Fetched { origin, conversation, truncated, answer } => {
                self.fetched(origin, (conversation, truncated), answer, fx);
            }
            ShardMessage::ReceiptUp(up) => self.receipt_up(*up, fx),
            ShardMessage::ReceiptNews(news) => self.receipt_news(&news, fx),
            ShardMessage::ReceiptAsk(ask) => self.receipts_asked(*ask, fx),
            ShardMessage::ReceiptPage { origin, page } => self.receipts_answer(origin, *page, fx),
            ShardMessage::Done { origin, result } => self.tell_done(origin, result, fx),
            ShardMessage::Flush { conn, number } => self.flush(from, (conn, number), fx),
            ShardMessage::Flushed { conn, number, done } => self.flushed((conn, number), done, fx),
            ShardMessage::Online { origin, after, limit } => self.online_part(origin, (after, limit), fx),
            ShardMessage::OnlinePage { origin, users, more } => self.online_page(origin, from, (users, more), fx),
            ShardMessage::Read { number, read } => self.read_for(from, number, *read, fx),
            ShardMessage::ReadDone { number, answer } => self.read_done(number, (from.node(), *answer), fx),
            ShardMessage::Missed => self.missed_from(from, fx),
            ShardMessage::Moved { partitions } => self.moved_here(&partitions),
        }
    }

    fn worked(&mut self, token: Token, outcome: WorkOutcome, fx: &mut Effects) {
        match self.questions.remove(&token) {
            Some(Question::AttemptWork(conn)) => self.attempt_worked(conn, outcome, fx),
            Some(Question::Deletion(DeletionQuestion::Proof(ask))) => self.proof_worked(&ask, &outcome, fx),
            _ => debug_assert!(self.is_moving(), "work nobody asked for"),
        }
    }

    fn loaded(&mut self, token: Token, answer: Answer, fx: &mut Effects) {
        match self.questions.remove(&token) {
            Some(question) => self.answered(question, answer, fx),
            // What was asked for a partition that went was taken back.
            None => debug_assert!(self.is_moving(), "an answer nobody asked for"),
        }
    }

    /// A question has its answer, from the store of this node or put together from several.
    pub(crate) fn answered(&mut self, question: Question, answer: Answer, fx: &mut Effects) {
        match question {
            Question::AttemptUser(conn) => self.attempt_user(conn, answer, fx),
            Question::Head(conversation, device) => self.head_loaded(conversation, device, answer, fx),
            Question::KnowUser(asker, ask) => self.user_loaded(asker, ask, answer, fx),
            Question::Social(question) => self.social_loaded(question, answer, fx),
            Question::Fetch(origin, id, range) => {
                let mut truncated = is_truncated(id, &range, &answer) && !self.planted.is(Bug::BelowTheFloor);
                truncated |= range.after != Seq::ZERO && self.planted.is(Bug::AllIsTruncated);
                self.fetched(origin, (id, truncated), answer, fx);
            }
            Question::Group(question) => self.group_loaded(question, answer, fx),
            Question::GroupCount(submit) => self.groups_counted(*submit, &answer, fx),
            Question::Visited(submit) => self.visited(*submit, answer, fx),
            Question::Conversations(origin) => self.conversations_loaded(origin, answer, fx),
            Question::Last(work) => self.last_loaded(work, answer, fx),
            Question::Mark(work) => self.mark_loaded(work, answer, fx),
            Question::Devices(work) => self.devices_loaded(*work, answer, fx),
            Question::Original(conversation) => self.original_loaded(conversation, answer, fx),
            Question::Hide(hiding) => self.hide_loaded(hiding, answer, fx),
            Question::Receipt(reader) => self.receipt_loaded(*reader, answer, fx),
            Question::Receipts(list) => self.receipts_loaded(list, answer, fx),
            Question::Export(work) => self.export_loaded(work, answer, fx),
            Question::Deletion(question) => self.deletion_loaded(question, answer, fx),
            Question::Sync(conn) => self.sync_loaded(conn, answer, fx),
            Question::Flush(asker, sync) => self.flush_loaded(asker, sync, &answer, fx),
            Question::Part(number) => self.read_done(number, (self.config.shard.node(), answer), fx),
            Question::Read(asker, number) => {
                let answer = Box::new(answer);
                self.tell_shard(asker, ShardMessage::ReadDone { number, answer }, fx);
            }
            Question::Resync(page) => self.resync_loaded(page, answer, fx),
            Question::Veil(veil) => self.veil_loaded(veil, answer, fx),
            Question::CatchUp(page) => self.catch_up_loaded(*page, answer, fx),
            Question::AttemptWork(_) => debug_assert!(false, "workers answer that"),
        }
    }

    /// Asks the store. A refused question is answered at once as failed.
    pub(crate) fn load(&mut self, question: Question, query: Query, fx: &mut Effects) {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.questions.insert(token, question);
        self.sessions.counters.loads += 1;
        fx.list.push(Effect::Load { token, query });
    }

    /// Whether another question may be opened; the caller answers BUSY otherwise.
    pub(crate) fn may_load(&self) -> bool {
        self.questions.len() < LOADS_IN_FLIGHT_MAX + WORK_IN_FLIGHT_MAX
    }

    /// Asks the workers.
    pub(crate) fn work(&mut self, question: Question, work: Work, fx: &mut Effects) {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.questions.insert(token, question);
        fx.list.push(Effect::Work { token, work });
    }

    /// Queues a record and returns its number. The caller has checked [`Shard::may_append`].
    pub(crate) fn append(&mut self, record: Record, fx: &mut Effects) -> u64 {
        debug_assert!(!self.poisoned, "append after the store failed");
        debug_assert!(self.may_write_of(record.partition()), "a record of a partition of another: {record:?}");
        self.appended += 1;
        fx.list.push(Effect::Append(self.planted.spoiled(record)));
        self.appended
    }

    /// Whether the queue to the disk takes another record: `STORE_FAILED`, `SHUTTING_DOWN`,
    /// `DISK_FULL`, `UNAVAILABLE` or `BUSY` otherwise.
    pub(crate) fn may_append(&self) -> Result<(), ErrorCode> {
        if self.poisoned {
            return Err(ErrorCode::StoreFailed);
        }
        if self.draining {
            return Err(ErrorCode::ShuttingDown);
        }
        if self.disk_full {
            return Err(ErrorCode::DiskFull);
        }
        if self.store_away {
            return Err(ErrorCode::Unavailable);
        }
        let records = (self.appended - self.stored) as usize;
        if records >= APPENDS_IN_FLIGHT_MAX || self.pending_bytes >= APPEND_BYTES_IN_FLIGHT_MAX {
            return Err(ErrorCode::Busy);
        }
        Ok(())
    }

    /// What the store did not answer is told as: to be tried again while its database is away.
    pub(crate) fn unread(&self) -> ErrorCode {
        if self.store_away { ErrorCode::Unavailable } else { ErrorCode::Internal }
    }

    /// The shard that owns a user or conversation.
    pub(crate) fn owner(&self, partition: ringline_schema::ids::Partition) -> ShardIndex {
        match &self.nodes {
            None => self.config.placement.shard_of(partition),
            Some(nodes) => nodes.placement.shard_of(partition),
        }
    }

    pub(crate) fn is_here(&self, shard: ShardIndex) -> bool {
        shard == self.config.shard
    }

    /// Whether new work for that shard must be refused until its lane has room. What goes to another node finds out when
    /// it is sent.
    pub(crate) fn is_blocked(&self, shard: ShardIndex) -> bool {
        !self.is_remote(shard) && self.lanes_blocked.get(usize::from(shard.within())).copied().unwrap_or(true)
    }

    pub(crate) fn tell_shard(&mut self, to: ShardIndex, message: ShardMessage, fx: &mut Effects) {
        debug_assert!(!self.is_here(to), "a lane to oneself");
        if self.is_remote(to) {
            return self.tell_node(to, message, fx);
        }
        fx.list.push(Effect::ToShard { to, message });
    }

    fn timers_due(&mut self, fx: &mut Effects) {
        while let Some(timer) = self.timers.pop_due(self.now.mono_us) {
            match timer {
                Timer::Session(conn) => self.session_due(conn, fx),
                Timer::Deliveries => self.deliveries_due(fx),
                Timer::Gathers => self.gathers_due(fx),
                Timer::Notice => self.notice_due(fx),
                Timer::FanOut => self.fan_outs_due(fx),
                Timer::Presence => self.presence_due(fx),
                Timer::Cursors => self.cursors_due(fx),
                Timer::Receipts => self.receipts_due(fx),
                Timer::Deletions => self.deletions_due(fx),
                Timer::Nodes => self.nodes_due(fx),
            }
        }
    }

    /// Looks whether a connection has been silent or stuck for too long, and arms the next look.
    fn session_due(&mut self, conn: ConnId, fx: &mut Effects) {
        let (now_us, config) = (self.now.mono_us, &self.config);
        let Some(session) = self.sessions.get(conn).filter(|session| now_us >= session.look_us) else { return };
        let (deadline_us, code) = match &session.state {
            // Looked at once, when its time to log in is over.
            State::Fresh | State::Greeted(_) => (session.look_us, ErrorCode::LoginTimeout),
            State::LoggedIn(_) => {
                let idle_us = session.heard_us + config.idle_timeout_ms * 1_000;
                let stall_us = session.progress_us + config.write_stall_ms * 1_000;
                if session.waiting_bytes() > 0 && stall_us < idle_us {
                    (stall_us, ErrorCode::SlowReader)
                } else {
                    (idle_us, ErrorCode::IdleTimeout)
                }
            }
            State::Draining => return,
        };
        if now_us >= deadline_us {
            self.sessions.fail(conn, 0, code, fx);
        } else {
            // Output may begin to stall at any time: look at least once a stall period.
            let look_us = deadline_us.min(now_us + config.write_stall_ms * 1_000);
            self.look_at(conn, look_us);
        }
    }

    /// Makes sure moved cursors are written within [`CURSOR_FLUSH_MS`].
    pub(crate) fn arm_cursors(&mut self) {
        if !self.cursors_armed {
            self.cursors_armed = true;
            self.timers.arm(self.now.mono_us + CURSOR_FLUSH_MS * 1_000, Timer::Cursors);
        }
    }

    fn drain(&mut self, fx: &mut Effects) {
        self.flush_cursors(fx);
        self.draining = true;
        for conn in self.sessions.ids() {
            self.sessions.push(conn, &GOAWAY, fx);
        }
    }

    /// The store failed: what is in flight has an unknown outcome, and nothing more is taken.
    fn store_failed(&mut self, fx: &mut Effects) {
        if std::mem::replace(&mut self.poisoned, true) {
            return;
        }
        self.pending_bytes = 0;
        for pending in std::mem::take(&mut self.pending) {
            self.pending_failed(pending, fx);
        }
    }

    /// How large a frame this connection may send now, in bytes.
    pub fn frame_limit(&self, conn: ConnId) -> u32 {
        match self.sessions.get(conn).and_then(|session| session.login()) {
            Some(_) => self.config.frame_bytes_max,
            None => ringline_schema::limits::FRAME_BYTES_MAX_BEFORE_LOGIN,
        }
    }

    /// Hands out whole frames that wait for a connection, or `None`. The shell says `Event::Sent` for their bytes.
    pub fn take_output(&mut self, conn: ConnId) -> Option<Vec<u8>> {
        self.sessions.take_output(conn)
    }

    /// Gives an output buffer back for reuse.
    pub fn give_back(&mut self, buffer: Vec<u8>) {
        self.sessions.give_back(buffer);
    }

    /// When `Event::Timer` is next wanted, in monotonic microseconds. Some deadlines turn out stale: that is harmless.
    pub fn next_deadline_us(&self) -> Option<u64> {
        self.lease_look_us().or_else(|| self.timers.next_us())
    }

    /// Tells whether the lane to another shard is full. While it is, requests that need that shard are BUSY.
    pub fn set_lane_blocked(&mut self, to: ShardIndex, blocked: bool) {
        if let Some(lane) = self.lanes_blocked.get_mut(usize::from(to.within())) {
            *lane = blocked;
        }
    }

    /// Nothing is in flight that a client waits for: an orderly stop may close the store.
    pub fn is_quiet(&self) -> bool {
        let nothing_open = self.questions.is_empty() && self.fan_outs.is_empty() && self.nodes_are_quiet();
        nothing_open && (self.poisoned || self.appended == self.stored)
    }

    pub fn counters(&self) -> &Counters {
        &self.sessions.counters
    }

    /// Connections of clients, logged in or not.
    pub fn connections(&self) -> usize {
        self.sessions.len()
    }

    /// How much there is of what comes and goes. Cheap: nothing is walked.
    pub fn levels(&self) -> Levels {
        Levels {
            connections: self.sessions.len(),
            sessions: self.online.devices(),
            users_online: self.online.len(),
            conversations_cached: self.conversations.len(),
            users_cached: self.users.len(),
            appends_in_flight: self.appended.saturating_sub(self.stored),
            delivery_waits: self.delivery_waits.len(),
            timers: self.timers.len(),
            fan_outs: self.fan_outs.len(),
            fan_out_bytes: self.fan_outs.bytes(),
        }
    }
}

const GOAWAY: Reply<'static> =
    Reply::Goaway { reason: GoawayReason::ShuttingDown, reconnect_after_ms: 500, node: "", address: "" };
