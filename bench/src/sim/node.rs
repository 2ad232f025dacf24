//! The node of a run: the server's shell, played. Events into the shards, effects out of them, in the order and with the
//! guarantees that the real reactor gives.
//!
//! Invariants: one buffer of a connection is in flight at a time; the shard hears `Closed` once for each connection that
//! it has not handed over; a lane keeps its order; each append is record n of its shard.
//!
//! **What lanes may do.** The real ones delay and are full; they lose and double nothing, and what waits for an answer over one
//! rests on that. What is durable does not: in some lives of the node lanes lose messages of every kind, and give those twice
//! that are known again by a number (a plain send by its device's, news of receipts by their place in the log). Then everything
//! that clients are shown has to be right all the same, and all that waits is made good by the next life and by what devices ask
//! then. Nothing else is doubled: a push would go out twice (the SDK drops it, a connection is promised better), and answers
//! and votes are counted. Between two lanes nothing is ordered.

use std::collections::BTreeMap;

use rand::RngExt;
use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::{CoreConfig, FAN_OUT_VISIT_UNITS};
use ringline_core::event::{ConnId, Effect, Effects, Event, Now, ShardMessage, Token, Verdict, Work, WorkOutcome};
use ringline_schema::frame::FrameDecoder;
use ringline_schema::record::Query;

use super::Bug;
use super::device::EPOCH_US;
use super::disk::Written;
use super::world::{ADMIN, Action, World};
use crate::checker::Peer;
use crate::observed;

/// Bytes that may wait for a slow device: little, so that devices do lag.
const OUTBOX_BYTES_MAX: usize = 6 * 1024;
/// What a turn of a busy core takes at most.
const TURN_US_MAX: u64 = 3_000;
/// A bucket of the cache of users and conversations: small, so that loading and evicting is the common case.
const CACHED_MAX: usize = 2;

/// Chance in percent that the lanes of a life of the node lose and double.
const LOSSY_PERCENT: u32 = 15;
/// Chance in percent that such a lane loses a message, or gives it twice.
const LOST_PERCENT: u32 = 2;

/// One shard and what its shell knows.
pub struct Side {
    pub shard: Shard,
    pub conns: BTreeMap<ConnId, u64>,
    next_slot: u32,
    /// When the timer fires; 0: it does not.
    timer_us: u64,
    /// Its lanes lose and double.
    pub lossy: bool,
}

impl World {
    /// The node's next life begins, on what the disk has.
    pub(super) fn boot(&mut self, shards: u16) {
        let placement = CorePlacement::new(shards).expect("1 to 4 shards");
        self.epoch += 1;
        self.up = true;
        let hash_seed = self.trace;
        let bug = self.bug;
        let in_slices = self.chance(50);
        let lossy = self.lively && self.chance(LOSSY_PERCENT);
        let side = |at| {
            let mut config = CoreConfig::new(ShardIndex(at), placement);
            config.conversations_cached_max = CACHED_MAX;
            config.users_cached_max = CACHED_MAX;
            config.outbox_bytes_max = OUTBOX_BYTES_MAX;
            config.admins = vec![observed::name(Peer::User(ADMIN))];
            if in_slices {
                // The groups here are small: one device a slice.
                (config.fan_out_at_once_max, config.fan_out_slice_units) = (1, FAN_OUT_VISIT_UNITS);
            }
            #[cfg_attr(not(feature = "planted-bugs"), expect(unused_mut, reason = "only bugs are put in later"))]
            let mut shard = Shard::new(config, hash_seed);
            #[cfg(feature = "planted-bugs")]
            if let Some(Bug::Shard(bug)) = bug {
                shard.plant(Some(bug));
            }
            #[cfg(not(feature = "planted-bugs"))]
            let _ = bug;
            Side { shard, conns: BTreeMap::new(), next_slot: 0, timer_us: 0, lossy }
        };
        self.sides = (0..shards).map(side).collect();
    }

    fn now(&self) -> Now {
        Now { mono_us: self.now_us, unix_ms: (EPOCH_US + self.now_us) / 1_000 }
    }

    pub(super) fn open_conn(&mut self, shard: usize) -> ConnId {
        let side = &mut self.sides[shard];
        side.next_slot += 1;
        ConnId { slot: side.next_slot - 1, generation: self.epoch }
    }

    pub(super) fn opened(&mut self, shard: usize, conn: ConnId) {
        self.tell(shard, Event::Opened { conn });
    }

    /// An event whose verdict is always to go on.
    pub(super) fn tell(&mut self, shard: usize, event: Event<'_>) {
        let verdict = self.handle(shard, event);
        assert_eq!(verdict, Verdict::Continue, "only requests change what is read");
    }

    fn handle(&mut self, shard: usize, event: Event<'_>) -> Verdict {
        let mut fx = Effects::default();
        let now = self.now();
        let verdict = self.sides[shard].shard.handle(event, now, &mut fx);
        self.carry_out(shard, fx);
        verdict
    }

    fn carry_out(&mut self, shard: usize, fx: Effects) {
        let epoch = self.epoch;
        let mut ended = Vec::new();
        for effect in fx.list {
            match effect {
                Effect::Close { conn, .. } => ended.push(conn),
                Effect::Append(record) => {
                    self.disk.append(shard, record);
                }
                Effect::Load { token, query } => {
                    let slow = self.chance(self.slow_disk_percent);
                    let delay = if slow { self.random_us(1_000, 300_000) } else { self.random_us(10, 500) };
                    self.after(delay, Action::Loaded { epoch, shard, token, query });
                }
                Effect::Work { token, work } => {
                    let delay = self.random_us(100, 20_000);
                    self.after(delay, Action::Worked { epoch, shard, token, work });
                }
                Effect::ToShard { to, message } => self.put_on_lane((shard as u16, to.0), message),
                Effect::Released { .. } => unreachable!("a node alone gives nothing up"),
            }
        }
        for conn in fx.dirty {
            self.write(shard, conn);
        }
        for conn in ended {
            self.server_ends(shard, conn);
        }
        if self.disk.submit(shard) {
            let slow = self.chance(self.slow_disk_percent);
            let delay = if slow { self.random_us(5_000, 400_000) } else { self.random_us(50, 3_000) };
            self.after(delay, Action::Commit { epoch, shard });
        }
        let side = &self.sides[shard];
        if let Some(due_us) = side.shard.next_deadline_us()
            && (side.timer_us == 0 || due_us < side.timer_us)
        {
            // What is due at once is due in the next turn, and one of a busy core may take its time.
            let turn_us = if due_us <= self.now_us + 1 { self.random_us(1, TURN_US_MAX) } else { 0 };
            self.sides[shard].timer_us = due_us;
            self.at(due_us.max(self.now_us) + turn_us, Action::Timer { epoch, shard });
        }
    }

    fn put_on_lane(&mut self, lane: (u16, u16), message: ShardMessage) {
        let lossy = self.sides[usize::from(lane.0)].lossy;
        if lossy && self.chance(LOST_PERCENT) {
            return;
        }
        if lossy && has_number(&message) && self.chance(LOST_PERCENT) {
            self.put_one_on_lane(lane, message.clone());
        }
        self.put_one_on_lane(lane, message);
    }

    fn put_one_on_lane(&mut self, lane: (u16, u16), message: ShardMessage) {
        let delay = if self.chance(3) { self.random_us(1_000, 50_000) } else { self.random_us(1, 300) };
        let due = self.lane_due_us.entry(lane).or_default();
        *due = (*due).max(self.now_us + delay);
        let (at_us, epoch) = (*due, self.epoch);
        self.lanes.entry(lane).or_default().push_back(message);
        self.at(at_us, Action::Lane { epoch, lane });
    }

    pub(super) fn lane_moves(&mut self, lane: (u16, u16)) {
        let swap = self.bug == Some(Bug::SwappedDeliveries) && self.chance(30);
        let swap_passes = self.bug == Some(Bug::SwappedPasses);
        let Some(waiting) = self.lanes.get_mut(&lane) else { return };
        let is_delivery = |message: &ShardMessage| matches!(message, ShardMessage::Deliver { .. });
        if swap && waiting.len() > 1 && waiting.iter().take(2).all(is_delivery) {
            waiting.swap(0, 1);
        }
        let Some(message) = waiting.pop_front() else { return };
        if !swap_passes || !matches!(message, ShardMessage::PassGroup { .. }) {
            return self.arrives(lane, message);
        }
        // Each second one comes before the first.
        match self.held_pass.take() {
            None => self.held_pass = Some((lane, message)),
            Some((of, held)) if of == lane => {
                self.arrives(lane, message);
                self.arrives(lane, held);
            }
            other => {
                self.held_pass = other;
                self.arrives(lane, message);
            }
        }
    }

    fn arrives(&mut self, (from, to): (u16, u16), message: ShardMessage) {
        self.note(2, u64::from(from) << 16 | u64::from(to));
        self.tell(usize::from(to), Event::Shard { from: ShardIndex(from), message });
    }

    pub(super) fn commit(&mut self, shard: usize) {
        match self.disk.finish(shard) {
            Some(Written::Upto(upto)) => {
                self.note(3, upto);
                self.tell(shard, Event::Stored { upto });
            }
            Some(Written::Failed) => {
                self.note(4, shard as u64);
                self.tell(shard, Event::StoreFailed);
            }
            None => {}
        }
    }

    pub(super) fn loaded(&mut self, shard: usize, token: Token, query: Query) {
        let readable = !self.chance(self.unreadable_percent);
        let answer = self.disk.answer(shard, query, readable);
        self.tell(shard, Event::Loaded { token, answer });
    }

    pub(super) fn worked(&mut self, shard: usize, token: Token, work: &Work) {
        let outcome = match work {
            Work::HashPassword { .. } => WorkOutcome::Hashed("hash".to_owned()),
            Work::VerifyPassword { .. } | Work::VerifyToken { .. } => WorkOutcome::Verified(true),
        };
        self.tell(shard, Event::Worked { token, outcome });
    }

    pub(super) fn timer(&mut self, shard: usize) {
        self.sides[shard].timer_us = 0;
        self.tell(shard, Event::Timer);
    }

    // --- connections ---------------------------------------------------------------------------------------------

    /// Bytes of a client: cut into frames, decoded, given to the shard, as the edge does.
    pub(super) fn server_receives(&mut self, number: u64, bytes: &[u8]) {
        let Some(link) = self.links.get_mut(&number).filter(|link| link.server_open && !link.stopped) else { return };
        if let Some(moving) = &mut link.moving {
            moving.extend_from_slice(bytes);
            return;
        }
        let (shard, conn) = (link.shard, link.conn);
        let mut decoder = std::mem::take(&mut link.decoder);
        let mut input = bytes;
        let verdict = loop {
            let limit = self.sides[shard].shard.frame_limit(conn);
            let (raw, verdict) = match decoder.next(&mut input, limit) {
                Ok(None) => break None,
                Err(error) => panic!("the SDK wrote what is no frame: {error:?}"),
                Ok(Some(frame)) => match Event::of_frame(conn, &frame) {
                    Event::Refused { code, .. } => panic!("the SDK wrote what is no request: {code}"),
                    event => (frame.raw.to_vec(), self.handle(shard, event)),
                },
            };
            match verdict {
                Verdict::Continue => {}
                other => break Some((raw, other)),
            }
        };
        let Some(link) = self.links.get_mut(&number) else { return };
        match verdict {
            None => link.decoder = decoder,
            Some((_, Verdict::Stop | Verdict::Continue)) => link.stopped = true,
            Some((raw, Verdict::HandOver(to))) => {
                link.moving = Some([&raw[..], &decoder.into_tail(), input].concat());
                self.sides[shard].conns.remove(&conn);
                link.shard = usize::from(to.0);
                let delay = self.random_us(5, 2_000);
                self.after(delay, Action::HandOver { link: number });
            }
        }
    }

    /// A connection arrives at the shard of its user.
    pub(super) fn hand_over(&mut self, number: u64) {
        let Some(link) = self.links.get(&number).filter(|link| link.server_open) else { return };
        let shard = link.shard;
        let conn = self.open_conn(shard);
        let Some(link) = self.links.get_mut(&number) else { return };
        let bytes = link.moving.take().unwrap_or_default();
        (link.conn, link.decoder) = (conn, FrameDecoder::new());
        self.sides[shard].conns.insert(conn, number);
        self.opened(shard, conn);
        self.server_receives(number, &bytes);
    }

    /// Takes the output of a connection, unless some is in flight.
    fn write(&mut self, shard: usize, conn: ConnId) {
        let Some(&number) = self.sides[shard].conns.get(&conn) else { return };
        if self.links.get(&number).is_none_or(|link| link.in_flight) {
            return;
        }
        let Some(bytes) = self.sides[shard].shard.take_output(conn) else { return };
        let slow = self.chance(2);
        let delay = if slow { self.random_us(10_000, 500_000) } else { self.random_us(50, 2_000) };
        let (now_us, Some(link)) = (self.now_us, self.links.get_mut(&number)) else { return };
        link.in_flight = true;
        let stalled_us = self.clients[link.client].stalled_until_us;
        link.to_client_us = link.to_client_us.max(now_us + delay).max(stalled_us);
        let at_us = link.to_client_us;
        let (length, half) = (bytes.len(), self.rng.random_range(0..=bytes.len()));
        let (one, other) = bytes.split_at(half);
        self.at(at_us, Action::ToClient { link: number, bytes: one.to_vec() });
        self.at(at_us, Action::ToClient { link: number, bytes: other.to_vec() });
        self.at(at_us, Action::Sent { link: number, bytes: length });
    }

    pub(super) fn sent(&mut self, number: u64, bytes: usize) {
        let Some(link) = self.links.get_mut(&number).filter(|link| link.server_open && link.moving.is_none()) else {
            return;
        };
        link.in_flight = false;
        let (shard, conn) = (link.shard, link.conn);
        self.tell(shard, Event::Sent { conn, bytes });
        self.write(shard, conn);
    }

    /// The shard ends a connection; what it had to say still reaches the client.
    fn server_ends(&mut self, shard: usize, conn: ConnId) {
        let Some(&number) = self.sides[shard].conns.get(&conn) else { return };
        let rest = self.sides[shard].shard.take_output(conn);
        let (now_us, Some(link)) = (self.now_us, self.links.get_mut(&number)) else { return };
        (link.stopped, link.server_open) = (true, false);
        link.to_client_us = link.to_client_us.max(now_us + 100);
        let at_us = link.to_client_us;
        if let Some(bytes) = rest {
            self.at(at_us, Action::ToClient { link: number, bytes });
        }
        self.at(at_us, Action::ClientSeesEnd { link: number });
        self.sides[shard].conns.remove(&conn);
        self.tell(shard, Event::Closed { conn });
    }

    pub(super) fn server_sees_end(&mut self, number: u64) {
        let Some(link) = self.links.get_mut(&number) else { return };
        let was_open = std::mem::replace(&mut link.server_open, false);
        let (shard, conn, moving) = (link.shard, link.conn, link.moving.is_some());
        if was_open && !moving {
            self.sides[shard].conns.remove(&conn);
            self.tell(shard, Event::Closed { conn });
        }
        self.forget_link(number);
    }
}

/// Whether who hears it twice knows it again.
fn has_number(message: &ShardMessage) -> bool {
    let by_device = |message: &ShardMessage| matches!(message, ShardMessage::Submit(submit) if submit.more.is_none());
    by_device(message) || matches!(message, ShardMessage::ReceiptNews(_))
}
