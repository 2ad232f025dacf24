//! The loop of a core: gather → step → perform → flush → park. One per core, alone on its thread.
//!
//! Invariants: everything gathered in a turn is bounded; the clock is read once a turn; the store, the lanes and each
//! dirty connection are flushed once a turn; the core sleeps only when a whole turn found nothing.

mod tunnelled;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender};
use ringline_cluster::link::tunnel;
use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_cluster::router::Board;
use ringline_core::Shard;
use ringline_core::event::{
    CloseReason, ConnId, Effect, Effects, Event, NodeNews, Now, ShardMessage, Token, Verdict, Work, WorkOutcome,
};
use ringline_core::nodes::record;
use ringline_schema::record::{Answer, Query, Record};
use ringline_store::{LoadToken, Refused, Store, StoreError, StoreEvent};

use crate::admin::snapshot::{ShellCounters, Snapshot, SnapshotPort};
use crate::allocations;
use crate::edge::{Departure, Edge, Turn};
use crate::lanes::{HandOver, LaneEnd, LaneItem};
use crate::net::{Flow, Net, NetEvent};
use crate::park::{Parker, SLEEP_US_MAX};
use crate::peers::{PeerEvent, PeerLinks};
use crate::steward::desk::OrdersPort;
use crate::stop::{Control, Phase};
use crate::tunnels::Tunnels;
use crate::wake::Waker;
use crate::workers::{Done, WorkersHandle};

/// Answers taken from the workers in one turn.
const WORKED_PER_TURN_MAX: usize = 256;
/// Sleep while a lane or the store is full: nobody rings when it has room again.
const BLOCKED_SLEEP_US: u64 = 1_000;
/// Sleep while stopping: other cores' quiet is looked at, not announced.
const STOPPING_SLEEP_US: u64 = 2_000;
/// How long the end waits for the disk.
const WRITE_WAIT: Duration = Duration::from_secs(10);
/// How often counters go to the main thread.
const REPORT_INTERVAL_US: u64 = 60_000_000;

/// What a core tells the main thread now and then, and once at its end.
#[derive(Debug)]
pub struct CoreReport {
    pub is_last: bool,
    pub snapshot: Snapshot,
}

/// What a core is made of; see [`Reactor`].
pub struct Parts {
    /// Within the node.
    pub index: ShardIndex,
    /// The node's place in its cluster; 0: a node alone.
    pub node: NodeIndex,
    pub shard: Shard,
    pub net: Box<dyn Net>,
    pub store: Box<dyn Store>,
    pub lanes: LaneEnd,
    pub waker: Arc<Waker>,
    pub workers: WorkersHandle,
    pub worked: Receiver<Done>,
    pub control: Arc<Control>,
    pub reports: Sender<CoreReport>,
    pub port: SnapshotPort,
    /// Links to other nodes; `None`: a node alone.
    pub peers: Option<PeerLinks>,
    /// What changes of the cluster while it runs; `None`: nothing does.
    pub orders: Option<OrdersPort>,
    /// What all of the node go by when they are asked for a route.
    pub board: Arc<Board>,
    /// The same on all cores: monotonic times are compared between them in logs.
    pub epoch: Instant,
}

/// One core.
pub struct Reactor {
    parts: Parts,
    edge: Edge,
    /// `None`: a node alone.
    tunnels: Option<Box<Tunnels>>,
    fx: Effects,
    now: Now,
    store_events: Vec<StoreEvent>,
    /// Reused by the gathering of lanes.
    arrived: Vec<(ShardIndex, LaneItem)>,
    /// Reused by the gathering of what other nodes say.
    peer_events: Vec<PeerEvent>,
    /// The bytes of a message to another node; reused.
    record: Vec<u8>,
    /// Records that the store had no room for: in order, before any newer one.
    backlog: VecDeque<Record>,
    /// Questions that the store had no room for, while it writes its index for one: in order, before any newer one.
    /// Bounded by the core, which opens no more than `LOADS_IN_FLIGHT_MAX` for sends and logins.
    questions: VecDeque<(LoadToken, Query)>,
    store_failed: bool,
    disk_full: bool,
    store_away: bool,
    draining: bool,
    reported_us: u64,
    handed_in: u64,
    turns: u64,
    sleeps: u64,
}

/// How a core's loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything accepted was answered.
    Quiet,
    /// The stop took longer than it may.
    TimedOut,
}

impl Reactor {
    pub fn new(parts: Parts) -> Self {
        Self {
            edge: Edge::of(parts.node),
            tunnels: parts.peers.as_ref().map(|_| Box::new(Tunnels::new(parts.index.0))),
            parts,
            fx: Effects::default(),
            now: Now::default(),
            store_events: Vec::new(),
            arrived: Vec::new(),
            peer_events: Vec::new(),
            record: Vec::new(),
            backlog: VecDeque::new(),
            questions: VecDeque::new(),
            store_failed: false,
            disk_full: false,
            store_away: false,
            draining: false,
            reported_us: 0,
            handed_in: 0,
            turns: 0,
            sleeps: 0,
        }
    }

    /// Runs until the node stops, then closes the store.
    pub async fn run(mut self, mut parker: Parker) -> (Ended, Result<(), StoreError>) {
        let ended = loop {
            let busy = self.turn();
            if let Some(ended) = self.stopping(busy) {
                break ended;
            }
            // A sleep by the executor costs more than another look; a direct one is that look.
            if if parker.is_direct() { !self.fx.dirty.is_empty() } else { busy } {
                continue;
            }
            self.parts.waker.about_to_sleep();
            if self.nothing_came() {
                let sleep_us = self.sleep_us();
                self.sleeps += 1;
                parker.park(self.parts.net.as_mut(), sleep_us).await;
            }
            self.parts.waker.awake();
        };
        self.report(true);
        let Parts { peers, net, lanes, .. } = &mut self.parts;
        if let Some(peers) = peers {
            peers.farewell(net.as_mut(), lanes, self.now.mono_us / 1_000);
        }
        self.take_back_writes();
        (ended, self.parts.store.close())
    }

    /// One turn. True if it found anything to do.
    fn turn(&mut self) -> bool {
        self.turns += 1;
        self.read_clock();
        if self.parts.port.is_wanted() {
            let snapshot = self.snapshot();
            self.parts.port.answer(snapshot);
        }
        let mut busy = self.gather_orders() | self.gather_net();
        busy |= self.gather_lanes();
        busy |= self.gather_store();
        busy |= self.gather_workers();
        busy |= self.gather_timers();
        busy |= self.gather_peers();
        self.parts.board.count(self.parts.index.0, self.clients());
        self.flush() | busy
    }

    /// Other nodes are there now, or other partitions are this node's.
    fn gather_orders(&mut self) -> bool {
        let port = self.parts.orders.as_mut().filter(|port| port.is_new());
        let Some(orders) = port.and_then(OrdersPort::take) else { return false };
        if let Some(peers) = &mut self.parts.peers {
            peers.set_roster(orders.roster, self.now.mono_us / 1_000);
        }
        self.tell(Event::Placement(orders.ownership));
        self.perform();
        true
    }

    fn read_clock(&mut self) {
        let mono_us = self.parts.epoch.elapsed().as_micros() as u64;
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        self.now = Now { mono_us, unix_ms };
        if mono_us.saturating_sub(self.reported_us) >= REPORT_INTERVAL_US {
            self.reported_us = mono_us;
            self.report(false);
        }
    }

    /// Tells the shard something whose verdict is always to go on.
    fn tell(&mut self, event: Event<'_>) {
        let verdict = self.parts.shard.handle(event, self.now, &mut self.fx);
        debug_assert_eq!(verdict, Verdict::Continue, "only requests change what is read");
    }

    fn gather_net(&mut self) -> bool {
        let Self { parts, edge, tunnels, fx, now, .. } = self;
        let Parts { net, shard, lanes, store, peers, .. } = parts;
        let now = *now;
        let now_ms = now.mono_us / 1_000;
        // Everything is told at once and in order: a slot that is freed here may be taken by the next event.
        let any = net.poll(now.mono_us, &mut |event| {
            let event = match peers {
                None => event,
                Some(peers) => match peers.take(event, lanes, now_ms) {
                    Ok(flow) => return flow,
                    Err(event) => event,
                },
            };
            let event = match tunnels {
                None => event,
                Some(tunnels) => match tunnels.take(event) {
                    Ok(flow) => return flow,
                    Err(event) => event,
                },
            };
            let mut turn = Turn { shard, fx, now };
            match event {
                NetEvent::Received { conn, bytes } => return edge.received(&mut turn, conn, bytes),
                NetEvent::Accepted { conn } => {
                    edge.opened(conn);
                    turn.tell(Event::Opened { conn });
                }
                NetEvent::Sent { conn, bytes, buffer } => edge.sent(&mut turn, conn, (bytes, buffer)),
                NetEvent::Detached { conn, socket } => {
                    edge.detached(conn, socket, |departure| depart(lanes, departure));
                }
                NetEvent::FileWritten { write, result } => store.written(write, result),
                NetEvent::Closed { conn, cause } => {
                    tracing::debug!(slot = conn.slot, ?cause, "the client's socket ended");
                    edge.closed(&mut turn, conn);
                }
            }
            Flow::Continue
        });
        edge.depart(net.as_mut(), |departure| depart(lanes, departure));
        if let Some(peers) = peers {
            peers.tend(net.as_mut(), lanes, now_ms);
        }
        self.enter_tunnels();
        self.perform();
        any
    }

    /// What other nodes say, and what is due on the links to them.
    fn gather_peers(&mut self) -> bool {
        let Parts { net, lanes, peers: Some(peers), .. } = &mut self.parts else { return false };
        let now_ms = self.now.mono_us / 1_000;
        peers.tick(net.as_mut(), now_ms);
        peers.drain(lanes, &mut self.peer_events, now_ms);
        let events = std::mem::take(&mut self.peer_events);
        let any = !events.is_empty();
        self.hear_peers(events);
        self.perform();
        any
    }

    fn hear_peers(&mut self, mut events: Vec<PeerEvent>) {
        for event in events.drain(..) {
            match event {
                PeerEvent::Up { node, shards, incarnation: _ } => {
                    self.parts.board.set_up(node, true);
                    self.tell(Event::Node { node, news: NodeNews::Up { shards } });
                }
                PeerEvent::Down { node } => {
                    self.parts.board.set_up(node, false);
                    self.node_down(node);
                }
                PeerEvent::Reset { node } => self.node_reset(node),
                PeerEvent::Message { node, from_shard, payload } if tunnel::Record::is_one(&payload) => {
                    self.hear_tunnel((node, from_shard), &payload);
                }
                PeerEvent::Message { node, from_shard, payload } => match record::decode(&payload) {
                    Ok(message) => self.tell(Event::Shard { from: ShardIndex::new(node, from_shard), message }),
                    Err(error) => {
                        if let Some(peers) = &mut self.parts.peers {
                            peers.meaningless(node, &error, self.now.mono_us / 1_000);
                        }
                    }
                },
            }
        }
        self.peer_events = events;
    }

    /// On the lane to a core of this node, or on the link to another node.
    fn carry(&mut self, to: ShardIndex, message: ShardMessage) {
        let (node, index) = (self.parts.node, self.parts.index);
        let Some(peers) = self.parts.peers.as_mut().filter(|_| to.node() != node) else {
            return self.parts.lanes.push(ShardIndex(to.within()), LaneItem::Core(message));
        };
        record::encode(&message, &mut self.record);
        if let Err(error) = peers.send(to.node(), (index.0, to.within()), &self.record) {
            tracing::debug!(node = to.node().0, %error, "a message to another node was not sent");
            self.tell(Event::Unsent { to, message });
        }
    }

    fn gather_lanes(&mut self) -> bool {
        let mut arrived = std::mem::take(&mut self.arrived);
        if self.parts.lanes.is_empty() {
            self.arrived = arrived;
            return false;
        }
        if self.draining {
            // Not quiet from here on, before the count of received batches rises.
            self.parts.control.set_quiet(self.parts.index, false);
        }
        let any = self.parts.lanes.receive(|from, item| arrived.push((from, item)));
        for (from, item) in arrived.drain(..) {
            match item {
                LaneItem::Core(message) => {
                    let from = ShardIndex::new(self.parts.node, from.0);
                    self.tell(Event::Shard { from, message });
                }
                LaneItem::HandOver(hand_over) => self.take_in(hand_over),
                LaneItem::Peer(item) => {
                    let Parts { net, peers: Some(peers), .. } = &mut self.parts else { continue };
                    peers.from_lane(item, net.as_mut(), &mut self.peer_events, self.now.mono_us / 1_000);
                    let events = std::mem::take(&mut self.peer_events);
                    self.hear_peers(events);
                }
            }
        }
        self.arrived = arrived;
        self.perform();
        any
    }

    /// A connection that another core read the first frame of.
    fn take_in(&mut self, HandOver { socket, bytes }: HandOver) {
        let conn = match self.parts.net.adopt(socket) {
            Ok(conn) => conn,
            Err(error) => {
                tracing::warn!(%error, "a connection handed over could not be taken in");
                return;
            }
        };
        self.handed_in += 1;
        self.edge.opened(conn);
        self.tell(Event::Opened { conn });
        // Its answer comes by an event; what is read next is decided when it is readable.
        let mut turn = Turn { shard: &mut self.parts.shard, fx: &mut self.fx, now: self.now };
        let _ = self.edge.received(&mut turn, conn, &bytes);
    }

    fn gather_store(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.store_events);
        self.parts.store.poll(&mut events);
        let any = !events.is_empty();
        for event in events.drain(..) {
            match event {
                StoreEvent::Committed(upto) => self.tell(Event::Stored { upto: upto.0 }),
                StoreEvent::Failed => self.fail_store(),
                StoreEvent::Loaded(LoadToken(token), answer) => {
                    self.tell(Event::Loaded { token: Token(token), answer });
                }
            }
        }
        self.store_events = events;
        let full = self.parts.store.is_disk_full();
        if std::mem::replace(&mut self.disk_full, full) != full {
            self.tell(Event::DiskSpace { full });
        }
        let away = self.parts.store.is_away();
        if std::mem::replace(&mut self.store_away, away) != away {
            self.tell(Event::StoreAway { away });
        }
        self.perform();
        any
    }

    /// False: the store is full for now. The core bounds what is not durable yet, and with it the backlog.
    fn append(&mut self, record: &Record) -> bool {
        match self.parts.store.append(record) {
            Ok(_) => true,
            Err(StoreError::Full) => false,
            // Frames are far smaller than the largest record. If one came all the same, every later number would be
            // wrong: nothing more may be acknowledged.
            Err(error @ (StoreError::Poisoned | StoreError::TooLarge)) => {
                debug_assert!(!matches!(error, StoreError::TooLarge), "the core lets too large a record pass");
                self.fail_store();
                true
            }
        }
    }

    /// Offers the store what it had no room for.
    fn append_backlog(&mut self) {
        while let Some(record) = self.backlog.pop_front() {
            if !self.append(&record) {
                self.backlog.push_front(record);
                return;
            }
        }
    }

    /// Offers the store the questions that wait. One that it can't answer any more is answered as failed.
    fn ask_questions(&mut self) {
        while let Some((token, query)) = self.questions.pop_front() {
            match self.parts.store.load(token, query) {
                Ok(()) => {}
                Err(Refused { error: StoreError::Full, query }) => return self.questions.push_front((token, *query)),
                Err(Refused { error: StoreError::Poisoned | StoreError::TooLarge, .. }) => {
                    self.tell(Event::Loaded { token: Token(token.0), answer: Answer::Failed });
                }
            }
        }
    }

    fn fail_store(&mut self) {
        if !std::mem::replace(&mut self.store_failed, true) {
            tracing::error!(shard = self.parts.index.0, "the store failed: no durable message is accepted any more");
            self.tell(Event::StoreFailed);
            if let Some(port) = &self.parts.orders {
                port.fail();
            }
        }
    }

    fn gather_workers(&mut self) -> bool {
        let mut any = false;
        for _ in 0..WORKED_PER_TURN_MAX {
            let Ok(Done { token, outcome }) = self.parts.worked.try_recv() else { break };
            any = true;
            self.tell(Event::Worked { token, outcome });
        }
        self.perform();
        any
    }

    fn gather_timers(&mut self) -> bool {
        let due = self.parts.shard.next_deadline_us().is_some_and(|at_us| at_us <= self.now.mono_us);
        if due {
            self.tell(Event::Timer);
        }
        let Self { parts: Parts { shard, net, .. }, edge, fx, now, .. } = self;
        edge.close_overdue(&mut Turn { shard, fx, now: *now }, net.as_mut());
        self.tunnels_due();
        due
    }

    /// Carries out effects, and what they cause in turn, until none is left.
    fn perform(&mut self) {
        while !self.fx.list.is_empty() {
            let mut list = std::mem::take(&mut self.fx.list);
            for effect in list.drain(..) {
                self.perform_one(effect);
            }
            if self.fx.list.is_empty() {
                self.fx.list = list;
            }
        }
    }

    fn perform_one(&mut self, effect: Effect) {
        match effect {
            Effect::Close { conn, reason } => self.begin_close(conn, reason),
            Effect::Append(record) => {
                if !self.backlog.is_empty() || !self.append(&record) {
                    self.backlog.push_back(record);
                }
            }
            Effect::Load { token, query } => {
                self.questions.push_back((LoadToken(token.0), query));
                self.ask_questions();
            }
            Effect::Work { token, work } => self.begin_work(token, work),
            Effect::ToShard { to, message } => self.carry(to, message),
            // Configured nodes are never asked to give something up.
            Effect::Released { version } => {
                if let Some(port) = &self.parts.orders {
                    port.release(version);
                }
            }
        }
    }

    fn begin_close(&mut self, conn: ConnId, reason: CloseReason) {
        tracing::debug!(slot = conn.slot, ?reason, "closing a connection");
        if self.end_tunnelled(conn) {
            return;
        }
        self.edge.close(conn, self.now);
        self.fx.dirty.push(conn);
    }

    fn begin_work(&mut self, token: Token, work: Work) {
        if !self.parts.workers.submit(token, work) {
            self.tell(Event::Worked { token, outcome: WorkOutcome::Busy });
        }
    }

    /// One write a dirty connection, one commit, one batch a lane.
    fn flush(&mut self) -> bool {
        let mut busy = !self.fx.dirty.is_empty();
        // First what others work on meanwhile: the disk and the other cores.
        self.append_backlog();
        self.ask_questions();
        self.commit();
        self.flush_lanes();
        let Self { parts, edge, tunnels, fx, now, .. } = self;
        let Parts { shard, net, .. } = parts;
        let mut dirty = std::mem::take(&mut fx.dirty);
        let mut turn = Turn { shard, fx, now: *now };
        for conn in dirty.drain(..) {
            if !tunnels.as_mut().is_some_and(|tunnels| tunnels.speaks_for(conn)) {
                edge.write(&mut turn, net.as_mut(), conn);
            }
        }
        if fx.dirty.is_empty() {
            fx.dirty = dirty;
        }
        self.perform();
        self.flush_tunnels();
        let Parts { net, peers, .. } = &mut self.parts;
        if let Some(peers) = peers {
            peers.flush(net.as_mut(), self.now.mono_us / 1_000);
        }
        self.parts.net.flush();
        // What the writes have caused in turn, in practice only connections that ended.
        self.commit();
        if self.parts.store.wake_fd().is_none() {
            busy |= self.gather_store();
        }
        self.flush_lanes();
        let Parts { net, peers, .. } = &mut self.parts;
        if let Some(peers) = peers.as_mut().filter(|peers| peers.has_unsent()) {
            peers.flush(net.as_mut(), self.now.mono_us / 1_000);
        }
        busy || !self.fx.dirty.is_empty()
    }

    /// Starts the commit of what is queued, on the net's ring where it has one.
    fn commit(&mut self) {
        let Parts { store, net, .. } = &mut self.parts;
        store.submit();
        while let Some(write) = store.take_write() {
            if let Err(write) = net.write_file(write) {
                store.written(write, -libc::EAGAIN);
                return;
            }
        }
    }

    fn flush_lanes(&mut self) {
        let Parts { lanes, shard, .. } = &mut self.parts;
        lanes.flush(|to, blocked| shard.set_lane_blocked(to, blocked));
    }

    /// Waits for the log write that is with the net, so that the store can close; a write that does not end within
    /// [`WRITE_WAIT`] is the store's to report.
    fn take_back_writes(&mut self) {
        let deadline = Instant::now() + WRITE_WAIT;
        let Parts { store, net, .. } = &mut self.parts;
        while net.is_writing_file() && Instant::now() < deadline {
            net.wait(Duration::from_micros(STOPPING_SLEEP_US));
            let _ = net.poll(self.now.mono_us, &mut |event| {
                if let NetEvent::FileWritten { write, result } = event {
                    store.written(write, result);
                }
                Flow::Stop
            });
        }
    }

    /// The last look before sleep.
    fn nothing_came(&self) -> bool {
        let Parts { lanes, worked, port, peers, orders, .. } = &self.parts;
        let called =
            peers.as_ref().is_some_and(|peers| peers.is_called() || (peers.has_events() && !lanes.is_blocked()));
        let called = called || orders.as_ref().is_some_and(OrdersPort::is_new);
        lanes.is_empty() && worked.is_empty() && !port.is_wanted() && !called && !self.control_changed()
    }

    fn control_changed(&self) -> bool {
        !self.draining && self.parts.control.phase() != Phase::Running
    }

    fn sleep_us(&self) -> u64 {
        let now_us = self.now.mono_us;
        // What is due a microsecond after this turn is work for the next one, as slices of what goes to many are: the
        // kernel rounds so short a sleep up to fifty.
        let until = |at_us: Option<u64>| at_us.map_or(SLEEP_US_MAX, |at_us| at_us.saturating_sub(now_us + 1));
        let Parts { shard, net, .. } = &self.parts;
        let own = until(shard.next_deadline_us()).min(until(self.edge.next_deadline_us()));
        let own = own.min(until(net.next_deadline_us()));
        let own = own.min(until(self.tunnels.as_ref().and_then(|tunnels| tunnels.next_deadline_us())));
        let peers_ms = self.parts.peers.as_ref().and_then(PeerLinks::next_ms);
        let own = own.min(until(peers_ms.map(|at_ms| at_ms.saturating_mul(1_000))));
        let blocked = self.parts.lanes.is_blocked() || !self.backlog.is_empty() || !self.questions.is_empty();
        let blocked = if blocked { BLOCKED_SLEEP_US } else { SLEEP_US_MAX };
        let stopping = if self.draining { STOPPING_SLEEP_US } else { SLEEP_US_MAX };
        own.min(blocked).min(stopping)
    }

    /// Drives the orderly stop. `Some`: the loop ends.
    fn stopping(&mut self, busy: bool) -> Option<Ended> {
        if self.parts.control.phase() == Phase::Running {
            return None;
        }
        if !self.draining {
            self.draining = true;
            self.parts.net.stop_accepting();
            self.tell(Event::Drain);
            self.drain_tunnels();
            self.perform();
            return None;
        }
        let quiet = !busy
            && self.parts.shard.is_quiet()
            && self.edge.is_quiet()
            && self.tunnels_are_quiet()
            && self.parts.peers.as_ref().is_none_or(PeerLinks::is_quiet)
            && self.parts.lanes.is_empty()
            && !self.parts.lanes.is_blocked();
        let control = &self.parts.control;
        control.set_traffic(self.parts.index, self.parts.lanes.traffic());
        control.set_quiet(self.parts.index, quiet);
        if quiet && control.all_quiet() {
            return Some(Ended::Quiet);
        }
        control.is_overdue().then_some(Ended::TimedOut)
    }

    fn report(&self, is_last: bool) {
        // The main thread is gone only when the process ends.
        let _ = self.parts.reports.send(CoreReport { is_last, snapshot: self.snapshot() });
    }

    fn snapshot(&self) -> Snapshot {
        let Parts { index, shard, net, store, lanes, peers, .. } = &self.parts;
        let (lane_batches_sent, lane_batches_received) = lanes.traffic();
        Snapshot {
            shard: *index,
            levels: shard.levels(),
            counters: shard.counters().clone(),
            net: net.counters(),
            store: store.stats(),
            shell: ShellCounters {
                handed_in: self.handed_in,
                lane_batches_sent,
                lane_batches_received,
                turns: self.turns,
                sleeps: self.sleeps,
                tunnels: self.tunnel_counters(),
            },
            peers: peers.as_ref().map(|peers| Box::new(peers.snapshot(self.now.mono_us / 1_000))),
            allocations: allocations::of_this_thread(),
            store_failed: self.store_failed,
            disk_full: self.disk_full,
            store_away: self.store_away,
            draining: self.draining,
        }
    }
}

fn depart(lanes: &mut LaneEnd, Departure { to, socket, bytes }: Departure) {
    lanes.push(ShardIndex(to.within()), LaneItem::HandOver(HandOver { socket, bytes }));
}
