//! What looks after the partitions of a run's nodes: the real decisions of [`ringline_cluster::reconcile`] and
//! [`ringline_cluster::membership`], under a shell that is played as the server's is. Owned by the cluster; a steward by a node.
//!
//! One look after the other: first the table of owners, then who is alive, then what follows; and the cores are told what is so.
//! Nothing is taken or given unless both could be read and the own lease is certain. What is wanted elsewhere is first not
//! served any more, then released by its core, then given back. A start whose lease is gone, or that has been replaced, ends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::membership::{Member, Membership, Placing, Standing};
use ringline_cluster::ownership::{Known, Ownership, Part};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement, NodeIndex};
use ringline_cluster::reconcile::{Holding, Moves, Start, moves};
use ringline_core::config::{ClusterConfig, Lease};
use ringline_core::event::Event;
use ringline_schema::ids::Partition;

use super::database::{Deeds, Done, Txn, Writer};
pub use super::etcd::FromEtcd;
use super::etcd::{Entry, LEASE_US, ToEtcd};
use super::nodes::{AtNode, name};
use super::sessions::{Ask, Said, Waiter};
use super::{Action, Bug, Cluster};

/// How much earlier a node stops to serve than etcd may forget it.
const MARGIN_US: u64 = 1_000_000;
const RENEW_EVERY_US: u64 = 3_000_000;
const RENEW_AGAIN_US: u64 = 500_000;
const REGISTER_AGAIN_US: u64 = 250_000;
const LOOK_EVERY_US: u64 = 1_000_000;
const LOOK_PAUSE_US: u64 = 20_000;
/// How long one question to etcd is waited for.
const ETCD_TIMEOUT_US: u64 = 1_000_000;
/// How long a leaving node waits for others to take what it has.
const DRAIN_US: u64 = 15_000_000;
/// Chance in percent that a watch tells of a change.
const BELL_PERCENT: u32 = 70;

/// See the module.
pub struct Steward {
    pub start: Start,
    pub lease: Lease,
    is_registered: bool,
    /// A renewal is planned.
    renews: bool,
    membership: Membership,
    listing: BTreeMap<usize, Entry>,
    deeds: Deeds,
    /// Since which version of the ownership the cores are asked to give up which partition.
    giving: BTreeMap<Partition, u64>,
    told: Arc<Ownership>,
    told_us: u64,
    /// What commits compare.
    pub held: BTreeMap<Partition, i64>,
    /// With the database; 0: none.
    pub session: u64,
    /// Of the database, when that began.
    pub life: u32,
    is_ready: bool,
    is_settled: bool,
    look: Look,
    /// Since when it leaves; `None`: it stays.
    draining_us: Option<u64>,
}

/// The look that is under way, or was last.
#[derive(Default)]
struct Look {
    number: u64,
    is_busy: bool,
    /// Somebody called meanwhile.
    called: bool,
    has_table: bool,
    /// It has changed something.
    again: bool,
}

impl Cluster {
    /// A process of a moving node has its place in the database.
    pub(super) fn start_process(&mut self, (at, epoch): (usize, u32), start: Start) {
        if self.nodes[at].epoch != epoch || self.nodes[at].up {
            return;
        }
        let incarnation = Incarnation(start.0.unsigned_abs());
        let node = &mut self.nodes[at];
        node.epoch += 1;
        node.incarnation = incarnation;
        let cores = CorePlacement::new(node.shards).expect("1 to 3 shards");
        let placement = ClusterPlacement::moving(NodeIndex(at as u16), cores).expect("a small number");
        node.list = placement.fingerprint();
        node.steward = Some(Steward {
            start,
            lease: Lease::new(0),
            is_registered: false,
            renews: false,
            membership: Membership::new(&name(at), incarnation, Placing::Alive),
            listing: BTreeMap::new(),
            deeds: Deeds::default(),
            giving: BTreeMap::new(),
            told: Arc::new(Ownership::new(0)),
            told_us: 0,
            held: BTreeMap::new(),
            session: 0,
            life: 0,
            is_ready: false,
            is_settled: false,
            look: Look::default(),
            draining_us: None,
        });
        self.open_shards(at, &ClusterConfig { placement, nodes: Vec::new() });
        (0..self.nodes[at].sides.len()).for_each(|shard| self.connect_database((at, shard)));
        self.register(at);
    }

    /// A process of a moving node wants its place in the database.
    pub(super) fn enter(&mut self, node: usize) {
        let epoch = self.nodes[node].epoch;
        match self.database.write(Txn::Enter { node }) {
            Ok((upto, done)) => self.wait_for(upto, Waiter::Start { node, epoch, done }),
            Err(_) => self.after(RENEW_AGAIN_US, Action::Boot { node, epoch }),
        }
    }

    fn steward(&mut self, node: usize) -> &mut Steward {
        self.nodes[node].steward.as_mut().expect("a moving node that is up has one")
    }

    fn place_of(&self, node: usize) -> (usize, u32) {
        (node, self.nodes[node].epoch)
    }

    // --- etcd ----------------------------------------------------------------------------------------------------

    fn ask_etcd(&mut self, node: usize, ask: ToEtcd) {
        let slow = self.chance(5);
        let delay = if slow { self.random_us(1_000, 300_000) } else { self.random_us(100, 5_000) };
        let epoch = self.nodes[node].epoch;
        self.after(delay, Action::EtcdAsked { node, epoch, ask });
    }

    /// A question reaches etcd, or nobody.
    pub(super) fn etcd_asked(&mut self, (node, epoch): (usize, u32), ask: ToEtcd) {
        let is_cut = self.etcd_cuts.get(&node).is_some_and(|until_us| *until_us > self.now_us);
        let (answer, changed) =
            if is_cut { (FromEtcd::Silent(ask), false) } else { self.etcd.ask(node, ask, self.now_us) };
        let delay = match answer {
            FromEtcd::Silent(_) => ETCD_TIMEOUT_US,
            _ if self.chance(5) => self.random_us(1_000, 300_000),
            _ => self.random_us(100, 5_000),
        };
        // An answer may be lost as well.
        let is_lost = self.lively && self.chance(1);
        let (answer, delay) = if is_lost { (FromEtcd::Silent(ask), ETCD_TIMEOUT_US) } else { (answer, delay) };
        self.at_node((node, epoch), delay, AtNode::Etcd(answer));
        if changed {
            for other in (0..self.nodes.len()).filter(|other| *other != node) {
                if self.chance(BELL_PERCENT) {
                    let (delay, place) = (self.random_us(1_000, 200_000), self.place_of(other));
                    self.at_node(place, delay, AtNode::Bell);
                }
            }
        }
    }

    pub(super) fn register(&mut self, node: usize) {
        let asked_us = self.nodes[node].clock.mono_us(self.now_us);
        let start = self.steward(node).start;
        self.ask_etcd(node, ToEtcd::Register { start, asked_us });
    }

    /// The next renewal, unless one is planned.
    fn renew_in(&mut self, node: usize, delay_us: u64) {
        if !std::mem::replace(&mut self.steward(node).renews, true) {
            let place = self.place_of(node);
            self.at_node(place, delay_us, AtNode::Renew);
        }
    }

    pub(super) fn renew(&mut self, node: usize) {
        let asked_us = self.nodes[node].clock.mono_us(self.now_us);
        let own = self.steward(node);
        own.renews = false;
        let (start, is_draining) = (own.start, own.draining_us.is_some());
        let standing = if is_draining { Standing::Draining } else { Standing::Up };
        self.ask_etcd(node, ToEtcd::Renew { start, asked_us, standing });
    }

    pub(super) fn etcd_says(&mut self, node: usize, from: FromEtcd) {
        let place = self.place_of(node);
        let is_longer = self.bug(Bug::LongLease);
        match from {
            FromEtcd::Renewed { asked_us } => {
                let own = self.steward(node);
                let until_us = asked_us + LEASE_US - MARGIN_US + if is_longer { 2 * MARGIN_US } else { 0 };
                own.lease.set(own.lease.until_ms().max(until_us / 1_000));
                let is_new = !std::mem::replace(&mut own.is_registered, true) && own.look.number == 0;
                self.renew_in(node, RENEW_EVERY_US);
                if is_new {
                    self.look_in(node, 0);
                }
            }
            FromEtcd::Occupied => self.at_node(place, REGISTER_AGAIN_US, AtNode::Register),
            FromEtcd::Gone => {
                self.steward(node).lease.set(0);
                self.lost(node);
            }
            FromEtcd::Listing(listing) => self.listed(node, Some(listing)),
            FromEtcd::Silent(ToEtcd::Register { .. }) => self.register(node),
            FromEtcd::Silent(ToEtcd::Renew { .. }) => self.renew_in(node, RENEW_AGAIN_US),
            FromEtcd::Silent(ToEtcd::List) => self.listed(node, None),
            FromEtcd::Silent(ToEtcd::Leave { .. }) => {}
        }
    }

    /// This start may not go on: soon it ends.
    fn lost(&mut self, node: usize) {
        let (delay, place) = (self.random_us(1_000, 1_000_000), self.place_of(node));
        self.at_node(place, delay, AtNode::End);
    }

    // --- looks ---------------------------------------------------------------------------------------------------

    fn look_in(&mut self, node: usize, delay_us: u64) {
        let look = &mut self.steward(node).look;
        look.is_busy = false;
        look.number += 1;
        let (number, place) = (look.number, self.place_of(node));
        self.at_node(place, delay_us, AtNode::Look { number });
    }

    pub(super) fn bell(&mut self, node: usize) {
        let own = self.steward(node);
        if own.look.is_busy {
            own.look.called = true;
        } else if own.is_registered {
            self.look_in(node, LOOK_PAUSE_US);
        }
    }

    pub(super) fn look(&mut self, node: usize, number: u64) {
        if self.steward(node).look.number != number {
            return;
        }
        self.steward(node).look = Look { number, is_busy: true, ..Look::default() };
        if self.database_cuts.get(&node).is_some_and(|until_us| *until_us > self.now_us) {
            self.steward(node).is_ready = false;
            return self.ask_etcd(node, ToEtcd::List);
        }
        if self.steward(node).is_ready {
            let session = self.steward(node).session;
            return self.ask_database(node, (None, session), Ask::Deeds);
        }
        let (session, life) = (self.next_session(), self.database.life);
        let own = self.steward(node);
        (own.session, own.life) = (session, life);
        let writer = own.writer();
        self.ask_database(node, (None, session), Ask::Write(Txn::Begin { writer, session }));
    }

    pub(super) fn steward_hears(&mut self, node: usize, session: u64, said: Said) {
        let own = self.steward(node);
        if own.session != session {
            return;
        }
        match said {
            Said::Done(Done::Begun { .. }) => {
                own.is_ready = true;
                self.ask_database(node, (None, session), Ask::Deeds);
            }
            Said::Deeds(deeds) => {
                let start = own.start;
                if !deeds.starts.get(&start).is_some_and(|(_, may_write)| *may_write) {
                    return self.lost(node);
                }
                let mine = deeds.rows.iter().filter(|row| row.owner == start);
                own.held = mine.map(|row| (row.partition, row.epoch)).collect();
                own.deeds = *deeds;
                own.look.has_table = true;
                self.ask_etcd(node, ToEtcd::List);
            }
            Said::Done(Done::Taken(taken)) => {
                own.held.extend(taken);
                own.look.again = true;
                self.give_back(node);
            }
            Said::Done(Done::Released) => {
                own.look.again = true;
                self.looked(node);
            }
            Said::Done(Done::Committed | Done::Entered(_)) | Said::Answer { .. } => {}
            Said::Refused => self.lost(node),
            Said::Lost => {
                // Whatever was asked may have been done: the next look shows it.
                (own.is_ready, own.session) = (false, 0);
                if own.look.is_busy && own.look.has_table {
                    self.looked(node);
                } else if own.look.is_busy {
                    self.ask_etcd(node, ToEtcd::List);
                }
            }
        }
    }

    /// Who is alive was read, or not.
    fn listed(&mut self, node: usize, listing: Option<BTreeMap<usize, Entry>>) {
        let now_ms = self.nodes[node].clock.mono_us(self.now_us) / 1_000;
        let own = self.steward(node);
        if !own.look.is_busy {
            return;
        }
        let Some(listing) = listing else { return self.looked(node) };
        if listing.get(&node).is_none_or(|entry| entry.start != own.start) {
            return self.lost(node);
        }
        if own.membership.update(members(&listing)).is_err() {
            return self.lost(node);
        }
        own.listing = listing;
        let is_certain = own.look.has_table && now_ms < own.lease.until_ms();
        if !is_certain {
            return self.looked(node);
        }
        let moves = own.moves(node);
        own.is_settled = moves.is_settled();
        let next = own.told.version + 1;
        let wanted: BTreeSet<Partition> = moves.hand_over.iter().copied().collect();
        own.giving.retain(|partition, _| wanted.contains(partition));
        for partition in wanted {
            own.giving.entry(partition).or_insert(next);
        }
        if moves.take.is_empty() {
            return self.give_back(node);
        }
        let (writer, session) = (own.writer(), own.session);
        self.ask_database(node, (None, session), Ask::Write(Txn::Take { writer, session, seen: moves.take }));
    }

    /// Gives back what its core has released.
    fn give_back(&mut self, node: usize) {
        let at_once = self.bug(Bug::GivesAtOnce);
        let home = &self.nodes[node];
        let (Some(own), Some(cores)) = (&home.steward, CorePlacement::new(home.shards)) else { return };
        let is_free = |(one, since): &(&Partition, &u64)| {
            let side = home.sides.get(usize::from(cores.shard_of(**one).within()));
            at_once || side.is_some_and(|side| side.released >= **since)
        };
        let partitions: Vec<Partition> = own.giving.iter().filter(is_free).map(|(one, _)| *one).collect();
        if partitions.is_empty() {
            return self.looked(node);
        }
        let own = self.steward(node);
        own.held.retain(|partition, _| !partitions.contains(partition));
        let (writer, session) = (own.writer(), own.session);
        self.ask_database(node, (None, session), Ask::Write(Txn::Release { writer, session, partitions }));
    }

    /// The look has come to its end.
    fn looked(&mut self, node: usize) {
        self.tell_cores(node);
        let now_us = self.now_us;
        let own = self.steward(node);
        let soon = own.look.again || own.look.called;
        if let Some(since_us) = own.draining_us
            && (own.owns_nothing() || now_us >= since_us + DRAIN_US)
        {
            own.look.is_busy = false;
            let place = self.place_of(node);
            return self.at_node(place, LOOK_PAUSE_US, AtNode::Stop);
        }
        self.look_in(node, if soon { LOOK_PAUSE_US } else { LOOK_EVERY_US });
    }

    fn tell_cores(&mut self, node: usize) {
        let now_us = self.now_us;
        let own = self.steward(node);
        let mut ownership = own.ownership(node);
        if ownership == *own.told {
            return;
        }
        ownership.version += 1;
        own.told = Arc::new(ownership);
        let ownership = own.told.clone();
        let listed: Vec<usize> = own.listing.keys().copied().collect();
        let due_us = own.told_us.max(now_us);
        let (delay, place) = (self.random_us(10, 5_000), self.place_of(node));
        self.steward(node).told_us = due_us + delay;
        for core in 0..self.nodes[node].sides.len() {
            let (ownership, listed) = (ownership.clone(), listed.clone());
            self.at_node(place, due_us + delay - now_us, AtNode::Placement { core, ownership, listed });
        }
    }

    /// A core has nothing in flight of what it was asked to give up.
    pub(super) fn released(&mut self, (node, core): (usize, usize), version: u64) {
        let released = &mut self.nodes[node].sides[core].released;
        *released = version.max(*released);
        let place = self.place_of(node);
        self.at_node(place, 0, AtNode::Bell);
    }

    // --- leaving -------------------------------------------------------------------------------------------------

    /// A node is asked to leave in order.
    pub(super) fn drain(&mut self, node: usize) {
        let now_us = self.now_us;
        let Some(own) = self.nodes[node].steward.as_mut().filter(|own| own.is_registered) else { return };
        if own.draining_us.is_none() {
            own.draining_us = Some(now_us);
            self.note(12, node as u64);
            let asked_us = self.nodes[node].clock.mono_us(now_us);
            let start = self.steward(node).start;
            self.ask_etcd(node, ToEtcd::Renew { start, asked_us, standing: Standing::Draining });
        }
    }

    /// Everything was handed over: clients are told, then the process ends, and its key goes.
    pub(super) fn stop(&mut self, node: usize) {
        for shard in 0..self.nodes[node].sides.len() {
            self.tell((node, shard), Event::Drain);
        }
        let own = self.steward(node);
        own.is_registered = false;
        let start = own.start;
        let delay = self.random_us(50_000, 500_000);
        let (at_us, place) = (self.now_us + delay, self.place_of(node));
        self.at(at_us, Action::EtcdAsked { node, epoch: place.1, ask: ToEtcd::Leave { start } });
        self.at_node(place, delay, AtNode::End);
    }
}

impl Steward {
    fn writer(&self) -> Writer {
        Writer { start: self.start, shard: None }
    }

    /// Everything was where it should be when it looked last, and it stays.
    pub fn is_settled(&self) -> bool {
        self.is_settled && self.is_registered && self.draining_us.is_none()
    }

    /// Whether that start of that node may still be alive.
    fn may_live(&self, start: Start) -> Option<usize> {
        let (node, _) = self.deeds.starts.get(&start)?;
        self.listing.get(node).is_some_and(|entry| entry.start == start).then_some(*node)
    }

    fn moves(&self, node: usize) -> Moves {
        let wanted = |partition: Partition| self.membership.owner(partition);
        let lives = |start| self.may_live(start).is_some();
        moves(&self.deeds.rows, lives, &wanted, (&name(node), self.start))
    }

    /// Nothing is this node's any more, or nobody is there to take it.
    fn owns_nothing(&self) -> bool {
        let others = |entry: &Entry| entry.start != self.start && entry.standing == Standing::Up;
        !self.listing.values().any(others) || self.deeds.rows.iter().all(|row| row.owner != self.start)
    }

    fn ownership(&self, node: usize) -> Ownership {
        let mut ownership = Ownership::new(self.told.version);
        for Holding { partition, epoch, owner } in &self.deeds.rows {
            let is_own = *owner == self.start;
            let owner = if is_own { Some(node) } else { self.may_live(*owner) };
            let owner = owner.map(|node| NodeIndex(node as u16));
            let giving = is_own && self.giving.contains_key(partition);
            ownership.set(*partition, Part { owner, epoch: epoch.unsigned_abs(), giving });
        }
        for node in self.listing.keys() {
            ownership.name(NodeIndex(*node as u16), Known { name: name(*node), address: name(*node) });
        }
        ownership
    }
}

fn members(listing: &BTreeMap<usize, Entry>) -> BTreeMap<String, Member> {
    let member = |node: usize, entry: &Entry| Member {
        incarnation: Incarnation(entry.start.0.unsigned_abs()),
        peer_address: SocketAddr::from(([127, 0, 0, 1], node as u16)),
        client_address: name(node),
        weight: 1,
        client_weight: 1,
        connections: 0,
        standing: entry.standing,
    };
    listing.iter().map(|(node, entry)| (name(*node), member(*node, entry))).collect()
}
