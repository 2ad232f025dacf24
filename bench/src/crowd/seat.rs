//! One client of a crowd: what it does when, and what it makes of what it is told. Pure: no socket, no clock.
//!
//! Owned by the task of its connection; all share one [`Sums`]. Invariants: an intended time follows from the plan alone; a
//! message counts as delivered once a receiver; every seq of a conversation that a client hears of is noted, by push or as
//! the answer to its own send, so a hole at the end is a loss.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use hdrhistogram::Histogram;
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::message::chat::Sync;
use ringline_schema::message::{
    Ack, BodyKind, ChatReply, ChatRequest, Class, Mentions, Message, Place, Reply, Request, Send,
};

use super::Mix;
use crate::plan::mix as scatter;
use crate::stamp::Stamp;
use crate::tally;

/// What a client can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Direct,
    Group,
    Transient,
    Read,
    Sync,
}

/// All, in the order of their numbers.
pub const OPS: [Op; 5] = [Op::Direct, Op::Group, Op::Transient, Op::Read, Op::Sync];

/// Rows of a SYNC's page.
pub const PAGE_ROWS: u16 = 200;
/// Unanswered requests of one client; above it what is due waits, and counts from when it was due.
const OPEN_MAX: usize = 32;

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Group => "group",
            Self::Transient => "transient",
            Self::Read => "read",
            Self::Sync => "sync",
        }
    }
}

/// One kind of thing, over all clients.
#[derive(Clone, Debug)]
pub struct Line {
    /// Inside the measured window, by intended time.
    pub asked: u64,
    pub answered: u64,
    /// Intended time to answer, µs.
    pub answer_us: Histogram<u64>,
    /// Inside the window.
    pub delivered: u64,
    /// Intended time to each delivery, µs.
    pub deliver_us: Histogram<u64>,
    /// Over the whole run: what has to arrive, and what has.
    pub expected_ever: u64,
    pub delivered_ever: u64,
}

impl Default for Line {
    fn default() -> Self {
        let (answer_us, deliver_us) = (tally::histogram(), tally::histogram());
        Self { asked: 0, answered: 0, answer_us, delivered: 0, deliver_us, expected_ever: 0, delivered_ever: 0 }
    }
}

/// Of all clients.
#[derive(Clone, Debug, Default)]
pub struct Sums {
    pub lines: [Line; OPS.len()],
    /// How late the generator itself was with what was due, µs.
    pub lag_us: Option<Histogram<u64>>,
    pub repeated: u64,
    pub corrupt: u64,
    /// Holes in conversations when it was over.
    pub holes: u64,
    /// Asked and not answered yet.
    pub open: u64,
    /// Refusals by code, LAGGED, lost connections.
    pub errors: BTreeMap<&'static str, u64>,
}

impl Sums {
    pub fn line(&mut self, op: Op) -> &mut Line {
        &mut self.lines[op as usize]
    }

    pub fn count(&mut self, what: &'static str) {
        *self.errors.entry(what).or_default() += 1;
    }

    /// What was acknowledged and has not arrived.
    pub fn missing(&self) -> u64 {
        self.lines.iter().map(|line| line.expected_ever.saturating_sub(line.delivered_ever)).sum()
    }
}

/// What all clients go by.
#[derive(Clone, Debug)]
pub struct Plan {
    pub run: u64,
    pub payload_bytes: usize,
    pub client_seq_base: u64,
    /// User names of all clients.
    pub names: Vec<String>,
    pub groups: Vec<Group>,
    pub start_ns: u64,
    pub from_ns: u64,
    pub to_ns: u64,
}

#[derive(Clone, Debug)]
pub struct Group {
    pub name: String,
    /// Members whose clients are here.
    pub online: u64,
}

impl Plan {
    fn measured(&self, at_ns: u64) -> bool {
        (self.from_ns..self.to_ns).contains(&at_ns)
    }
}

/// What one client does.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    pub partner: Option<u32>,
    pub group: Option<u32>,
    pub mix: Mix,
    /// When, from the start on; `None`: nothing at all.
    pub pace: Option<Pace>,
}

#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// One thing after the other.
    Closed,
    /// At `offset_ns`, and again after each `period_ns`.
    Open { offset_ns: u64, period_ns: u64 },
}

/// What a client knows of a conversation.
#[derive(Clone, Debug, Default)]
struct Track {
    /// Everything up to here has been heard of.
    upto: u64,
    ahead: BTreeSet<u64>,
    /// The device has acknowledged so far.
    acked: u64,
    known: bool,
}

/// See the module.
pub struct Seat {
    plan: Rc<Plan>,
    index: u32,
    task: Task,
    /// Of the next thing to do.
    number: u32,
    next_id: u32,
    /// Request id → what, intended when.
    open: HashMap<u32, (Op, u64)>,
    tracks: BTreeMap<ConversationId, Track>,
    acking: bool,
}

impl Seat {
    pub fn new(plan: Rc<Plan>, index: u32, task: Task) -> Self {
        Self { plan, index, task, number: 0, next_id: 1, open: HashMap::new(), tracks: BTreeMap::new(), acking: false }
    }

    /// When the next thing is due, in nanoseconds of the run; `None`: never, or not before an answer.
    pub fn due_ns(&self, now_ns: u64) -> Option<u64> {
        let due = match self.task.pace? {
            Pace::Closed => self.open.is_empty().then_some(now_ns.max(self.plan.start_ns))?,
            Pace::Open { offset_ns, period_ns } => {
                (self.open.len() < OPEN_MAX).then_some(())?;
                self.plan.start_ns + offset_ns + u64::from(self.number) * period_ns
            }
        };
        (due < self.plan.to_ns).then_some(due)
    }

    /// Does what was due at `intended_ns`.
    pub fn act(&mut self, (intended_ns, now_ns): (u64, u64), sums: &mut Sums, wire: (&mut Encoder, &mut Vec<u8>)) {
        let number = self.number;
        self.number += 1;
        let drawn = scatter(self.plan.run ^ (u64::from(self.index) << 32) ^ u64::from(number));
        let Some(op) = self.task.mix.pick(drawn) else { return };
        let measured = self.plan.measured(intended_ns);
        if measured {
            sums.line(op).asked += 1;
            tally::record(sums.lag_us.get_or_insert_with(tally::histogram), intended_ns, now_ns);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.open.insert(id, (op, intended_ns));
        sums.open += 1;
        let (encoder, out) = wire;
        match op {
            Op::Direct | Op::Group | Op::Transient => {
                let partner = self.task.partner.and_then(|partner| self.plan.names.get(partner as usize));
                let group = self.task.group.and_then(|group| self.plan.groups.get(group as usize));
                let to = if op == Op::Group { group.map(|group| &group.name) } else { partner };
                let stamp = Stamp { run: self.plan.run, sender: self.index, number, intended_ns };
                let mut body = Vec::new();
                stamp.write(self.plan.payload_bytes, &mut body);
                let send = Send {
                    to: to.map_or("", String::as_str),
                    class: if op == Op::Transient { Class::Transient } else { Class::Durable },
                    kind: BodyKind::Custom,
                    client_seq: self.plan.client_seq_base + u64::from(number),
                    ack_timeout_ms: None,
                    body: &body,
                    mentions: Mentions::default(),
                };
                encoder.request(Codec::FlatBuffers, id, &Request::Send(send), out);
            }
            Op::Read => {
                let known = self.tracks.iter().filter(|(_, track)| track.upto > 0).max_by_key(|(_, track)| track.upto);
                let (conversation, seq) = known.map_or((ConversationId(0), 0), |(id, track)| (*id, track.upto));
                if seq == 0 {
                    // Nothing to read yet.
                    self.open.remove(&id);
                    sums.open -= 1;
                    return;
                }
                let read = ChatRequest::Read { conversation, seq: Seq(seq) };
                encoder.request(Codec::FlatBuffers, id, &Request::Chat(read), out);
            }
            Op::Sync => {
                let place = |(id, track): (&ConversationId, &Track)| Place { conversation: *id, seq: Seq(track.upto) };
                let places: Vec<Place> = self.tracks.iter().map(place).collect();
                let sync = Sync { places: places[..].into(), from: Place::default(), limit: PAGE_ROWS };
                encoder.request(Codec::FlatBuffers, id, &Request::Chat(ChatRequest::Sync(sync)), out);
            }
        }
    }

    /// Something came.
    pub fn told(&mut self, id: u32, reply: &Reply<'_>, now_ns: u64, sums: &mut Sums) {
        match reply {
            Reply::SendAck(ack) => {
                let op = self.answered(id, now_ns, sums);
                if let Some(op) = op {
                    let group = self.task.group.and_then(|group| self.plan.groups.get(group as usize));
                    let receivers = if op == Op::Group { group.map_or(0, |group| group.online - 1) } else { 1 };
                    sums.line(op).expected_ever += receivers;
                }
                self.heard(ack.conversation, ack.seq, sums);
            }
            Reply::Deliver(message) => self.delivered(message, now_ns, sums),
            Reply::Chat(ChatReply::Done | ChatReply::SyncOk { .. }) => {
                self.answered(id, now_ns, sums);
            }
            Reply::Failure { code, .. } => {
                sums.open -= u64::from(self.open.remove(&id).is_some());
                sums.count(code.name());
            }
            Reply::Lagged { .. } | Reply::Kicked { .. } | Reply::Goaway { .. } => sums.count(reply.command().name()),
            Reply::RegisterOk { .. }
            | Reply::LoginOk(_)
            | Reply::LogoutOk
            | Reply::Pong { .. }
            | Reply::RouteOk { .. }
            | Reply::Redirect { .. }
            | Reply::FetchOk { .. }
            | Reply::OnlineOk { .. }
            | Reply::ConversationsOk { .. }
            | Reply::Receipt(_)
            | Reply::Group(_)
            | Reply::Chat(_) => {}
        }
    }

    fn answered(&mut self, id: u32, now_ns: u64, sums: &mut Sums) -> Option<Op> {
        let (op, intended_ns) = self.open.remove(&id)?;
        sums.open -= 1;
        if self.plan.measured(intended_ns) {
            let line = sums.line(op);
            line.answered += 1;
            tally::record(&mut line.answer_us, intended_ns, now_ns);
        }
        Some(op)
    }

    fn delivered(&mut self, message: &Message<'_>, now_ns: u64, sums: &mut Sums) {
        let new = message.class == Class::Transient || self.heard(message.conversation, message.seq, sums);
        if message.kind == BodyKind::System || !new {
            return;
        }
        let Ok(stamp) = Stamp::read(message.body, self.plan.run) else {
            sums.corrupt += 1;
            return;
        };
        let op = match message.class {
            Class::Transient => Op::Transient,
            Class::Durable if message.to.starts_with('#') => Op::Group,
            Class::Durable => Op::Direct,
        };
        let measured = self.plan.measured(stamp.intended_ns);
        let line = sums.line(op);
        line.delivered_ever += 1;
        if measured {
            line.delivered += 1;
            tally::record(&mut line.deliver_us, stamp.intended_ns, now_ns);
        }
    }

    /// Notes a place of a conversation. False: it was known.
    fn heard(&mut self, conversation: ConversationId, seq: Seq, sums: &mut Sums) -> bool {
        if seq == Seq::ZERO {
            return true;
        }
        let track = self.tracks.entry(conversation).or_default();
        if !track.known {
            // What was before this run is not of this run.
            (track.known, track.upto) = (true, seq.0 - 1);
        }
        if seq.0 <= track.upto || !track.ahead.insert(seq.0) {
            sums.repeated += 1;
            return false;
        }
        while track.ahead.remove(&(track.upto + 1)) {
            track.upto += 1;
        }
        true
    }

    /// Acknowledges what has come; call it about once a second.
    pub fn acknowledge(&mut self, (encoder, out): (&mut Encoder, &mut Vec<u8>)) {
        for (&conversation, track) in self.tracks.iter_mut().filter(|(_, track)| track.upto > track.acked) {
            track.acked = track.upto;
            let ack = Request::Ack(Ack::Upto { conversation, seq: Seq(track.upto) });
            encoder.request(Codec::FlatBuffers, 0, &ack, out);
            self.acking = true;
        }
        if !std::mem::take(&mut self.acking) && self.open.is_empty() {
            encoder.request(Codec::FlatBuffers, 0, &Request::Ping { stamp: 0 }, out);
        }
    }

    /// It is over.
    pub fn finish(&self, sums: &mut Sums) {
        sums.holes += self.tracks.values().filter(|track| !track.ahead.is_empty()).count() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringline_schema::ids::DeviceId;
    use ringline_schema::message::{Extra, SendAck};

    const TEAM: ConversationId = ConversationId(7);

    fn plan() -> Rc<Plan> {
        let groups = vec![Group { name: "#g".to_owned(), online: 3 }];
        let names = vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let (run, payload_bytes, client_seq_base) = (5, 64, 100);
        Rc::new(Plan { run, payload_bytes, client_seq_base, names, groups, start_ns: 10, from_ns: 10, to_ns: 1_000 })
    }

    fn seat(op: Op, pace: Option<Pace>) -> Seat {
        Seat::new(plan(), 0, Task { partner: Some(1), group: Some(0), mix: Mix::only(op), pace })
    }

    fn push(seq: u64, body: &[u8]) -> Message<'_> {
        Message {
            conversation: TEAM,
            seq: Seq(seq),
            time_ms: 1,
            from: "b",
            to: "#g",
            device: DeviceId(2),
            client_seq: 1,
            class: Class::Durable,
            kind: BodyKind::Custom,
            delivery: 0,
            body,
            extra: Extra::default(),
        }
    }

    #[test]
    fn what_is_due_follows_from_the_plan_and_stops_with_it() {
        let mut open = seat(Op::Direct, Some(Pace::Open { offset_ns: 5, period_ns: 400 }));
        let (mut sums, mut encoder, mut out) = (Sums::default(), Encoder::new(), Vec::new());
        let mut due = Vec::new();
        while let Some(at) = open.due_ns(0) {
            due.push(at);
            open.act((at, at), &mut sums, (&mut encoder, &mut out));
        }
        assert_eq!((due, sums.line(Op::Direct).asked), (vec![15, 415, 815], 3));
        let mut closed = seat(Op::Direct, Some(Pace::Closed));
        assert_eq!(closed.due_ns(0), Some(10));
        closed.act((10, 10), &mut sums, (&mut encoder, &mut out));
        assert_eq!(closed.due_ns(20), None, "one after the other");
        assert_eq!(seat(Op::Direct, None).due_ns(20), None);
    }

    #[test]
    fn what_was_acknowledged_must_arrive_once_at_each_of_the_others() {
        let mut sums = Sums::default();
        let (mut encoder, mut out) = (Encoder::new(), Vec::new());
        let mut sender = seat(Op::Group, Some(Pace::Closed));
        sender.act((20, 20), &mut sums, (&mut encoder, &mut out));
        let ack = SendAck { conversation: TEAM, seq: Seq(4), time_ms: 1, dup: false };
        sender.told(1, &Reply::SendAck(ack), 30, &mut sums);
        assert_eq!((sums.missing(), sums.line(Op::Group).answered), (2, 1));
        let mut body = Vec::new();
        Stamp { run: 5, sender: 0, number: 0, intended_ns: 20 }.write(64, &mut body);
        let mut others = [seat(Op::Group, None), seat(Op::Group, None)];
        for other in &mut others {
            other.told(0, &Reply::Deliver(push(4, &body)), 40, &mut sums);
        }
        assert_eq!((sums.missing(), sums.repeated, sums.corrupt), (0, 0, 0));
        let [other, _] = &mut others;
        other.told(0, &Reply::Deliver(push(4, &body)), 40, &mut sums);
        other.told(0, &Reply::Deliver(push(6, b"what is this")), 40, &mut sums);
        other.finish(&mut sums);
        assert_eq!((sums.repeated, sums.corrupt, sums.holes), (1, 1, 1));
        other.told(0, &Reply::Deliver(push(5, &body)), 40, &mut sums);
        out.clear();
        other.acknowledge((&mut encoder, &mut out));
        assert!(!out.is_empty() && other.tracks[&TEAM].upto == 6);
    }
}
