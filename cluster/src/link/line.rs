//! One link of a core with a peer node, while connections come and go: which of two survives, whether the peer counts as
//! there, when to dial again. Owned by the core.
//!
//! - The caller is told `Up` once the peer's process is known to be there, and from then on messages are taken. A break that
//!   heals within [`BROKEN_MS`] is not told: what was under way goes out again. Then it is told `Down`.
//! - A peer that was started again is told as `Reset`, after `Down` and before `Up`: what was never acknowledged is lost,
//!   and nothing of the old process comes after it.
//! - Both sides dial. When both succeed, the connection that the node with the lower name has dialled stays; both sides
//!   find that by the same rule, whichever of the two stood first there.

use super::channel::{Channel, SILENCE_MS, Violation};
use super::dial::Backoff;
use super::hello::{Agreed, Hello, Incarnation};

/// A break that heals within this is not told.
pub const BROKEN_MS: u64 = 250;
/// How long a process that another core has heard of may take to connect here before it is told as down.
pub const MET_MS: u64 = SILENCE_MS;
/// The node with the higher name leaves the other so much time to dial before it does.
pub const COURTESY_MS: u64 = 200;

/// A process of a node, and how many shards it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub incarnation: Incarnation,
    pub shards: u16,
}

/// What the caller is to know, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Messages are taken from now on.
    Up(Process),
    /// No message is taken any more.
    Down,
    /// The peer is a new process: what was under way, either way, is lost.
    Reset,
}

/// What becomes of a connection whose hello is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// It carries the link; there was none.
    Stands,
    /// It carries the link instead of the one before, which is to be closed.
    Replaces,
    /// The one that is there stays; close the new one.
    Superfluous,
}

/// What a message that came by another core's link says of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The process that is known.
    Known,
    /// A new one. A connection of this link belongs to the old one and is to be closed.
    New,
    /// One that has been replaced: its messages are lost.
    Old,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Away,
    /// Told as up, and without a connection for now.
    Broken {
        until_ms: u64,
    },
    Connected {
        /// Dialled by the node whose dial counts.
        right: bool,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Line {
    channel: Channel,
    process: Option<Process>,
    state: State,
    since_ms: u64,
    backoff: Backoff,
    dials: bool,
    /// `None`: a dial is under way, or not wanted.
    dial_ms: Option<u64>,
}

impl Line {
    /// `dials`: this side may dial. `right`: its dial is the one that counts.
    pub fn new((dials, right): (bool, bool), now_ms: u64) -> Self {
        let courtesy_ms = if right { 0 } else { COURTESY_MS };
        Self {
            channel: Channel::new(now_ms),
            process: None,
            state: State::Away,
            since_ms: now_ms,
            backoff: Backoff::default(),
            dials,
            dial_ms: dials.then_some(now_ms + courtesy_ms),
        }
    }

    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    pub fn channel_mut(&mut self) -> &mut Channel {
        &mut self.channel
    }

    /// The process at the other end, also while it is away.
    pub fn process(&self) -> Option<Process> {
        self.process
    }

    /// Whether messages are taken.
    pub fn is_up(&self) -> bool {
        self.state != State::Away
    }

    pub fn is_connected(&self) -> bool {
        matches!(self.state, State::Connected { .. })
    }

    /// Since when it has been up, or not.
    pub fn since_ms(&self) -> u64 {
        self.since_ms
    }

    /// For the hello of a connection of this link.
    pub fn knows(&self) -> Option<(Incarnation, u64)> {
        self.process.map(|process| (process.incarnation, self.channel.received()))
    }

    /// A hello was judged good. `right`: the connection was dialled by the node whose dial counts.
    ///
    /// Errors: the peer claims batches that were never sent; the connection is to be closed, the link stays what it was.
    pub fn join(
        &mut self,
        (hello, agreed): (&Hello, &Agreed),
        right: bool,
        now_ms: u64,
        told: &mut Vec<Told>,
    ) -> Result<Joined, Violation> {
        let process = Process { incarnation: hello.incarnation, shards: hello.cores };
        let had = self.is_connected();
        if self.process.is_none_or(|known| known.incarnation != process.incarnation) {
            self.meet(process, now_ms, told);
        } else if self.state == (State::Connected { right: true }) && !right {
            return Ok(Joined::Superfluous);
        }
        self.channel.reconnected(agreed.peer_has, now_ms)?;
        if !self.is_up() {
            told.push(Told::Up(process));
            self.since_ms = now_ms;
        }
        self.state = State::Connected { right };
        self.backoff.connected(now_ms);
        self.dial_ms = None;
        Ok(if had { Joined::Replaces } else { Joined::Stands })
    }

    /// A message of this node came by another core's link.
    pub fn heard_of(&mut self, process: Process, now_ms: u64, told: &mut Vec<Told>) -> Sender {
        let had = self.is_connected();
        let sender = match self.process.map(|known| known.incarnation.cmp(&process.incarnation)) {
            Some(std::cmp::Ordering::Equal) => Sender::Known,
            Some(std::cmp::Ordering::Greater) => return Sender::Old,
            Some(std::cmp::Ordering::Less) | None => {
                self.meet(process, now_ms, told);
                Sender::New
            }
        };
        if !self.is_up() {
            // It is there, and will connect here too; it may be answered already.
            told.push(Told::Up(process));
            self.since_ms = now_ms;
            self.state = State::Broken { until_ms: now_ms + MET_MS };
            // The new process may have fewer cores, and then none that dials for this link.
            let dials = if had { self.dials } else { self.dial_ms.is_some() };
            self.dial_ms = dials.then_some(now_ms);
        }
        sender
    }

    /// Another process from here on.
    fn meet(&mut self, process: Process, now_ms: u64, told: &mut Vec<Told>) {
        self.away(now_ms, told);
        if self.process.replace(process).is_some() {
            self.channel.peer_restarted(now_ms);
            told.push(Told::Reset);
        }
    }

    fn away(&mut self, now_ms: u64, told: &mut Vec<Told>) {
        if self.is_up() {
            told.push(Told::Down);
            self.since_ms = now_ms;
            self.state = State::Away;
        }
    }

    /// The connection of this link has ended. `draw`: random in its whole range.
    pub fn lost(&mut self, now_ms: u64, draw: u64) {
        if self.is_connected() {
            self.state = State::Broken { until_ms: now_ms + BROKEN_MS };
            self.dial_later(now_ms, draw);
        }
    }

    /// The peer said goodbye, or nothing for too long: its connection is to be closed.
    pub fn gone(&mut self, (now_ms, draw): (u64, u64), told: &mut Vec<Told>) {
        self.lost(now_ms, draw);
        self.away(now_ms, told);
    }

    /// A dial came to nothing.
    pub fn dial_failed(&mut self, now_ms: u64, draw: u64) {
        if !self.is_connected() {
            self.dial_later(now_ms, draw);
        }
    }

    fn dial_later(&mut self, now_ms: u64, draw: u64) {
        let wait_ms = self.backoff.wait_ms(now_ms, draw);
        self.dial_ms = self.dials.then_some(now_ms + wait_ms);
    }

    /// Whether to dial now. Said once; then [`Line::join`] or [`Line::dial_failed`] is awaited.
    pub fn dial(&mut self, now_ms: u64) -> bool {
        let due = !self.is_connected() && self.dial_ms.is_some_and(|at_ms| at_ms <= now_ms);
        if due {
            self.dial_ms = None;
        }
        due
    }

    /// To be called at [`Line::next_ms`]. True: the connection is to be closed, its peer is silent.
    pub fn tick(&mut self, (now_ms, draw): (u64, u64), told: &mut Vec<Told>) -> bool {
        match self.state {
            State::Away => false,
            State::Broken { until_ms } => {
                if until_ms <= now_ms {
                    self.away(now_ms, told);
                }
                false
            }
            State::Connected { .. } => {
                let silent = self.channel.is_silent(now_ms);
                if silent {
                    self.gone((now_ms, draw), told);
                }
                silent
            }
        }
    }

    /// When to look at it again even if nothing happens; `None`: never.
    pub fn next_ms(&self) -> Option<u64> {
        match self.state {
            State::Away => self.dial_ms,
            State::Broken { until_ms } => Some(self.dial_ms.map_or(until_ms, |at_ms| at_ms.min(until_ms))),
            State::Connected { .. } => Some(self.channel.next_ms()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::frame::Frame;
    use bytes::Bytes;

    fn hello(incarnation: u64) -> Hello {
        let (cluster, node) = ("c".to_owned(), "b".to_owned());
        let incarnation = Incarnation(incarnation);
        Hello { cluster, node, incarnation, list: 0, protocol: (1, 1), cores: 3, core: 0, knows: None }
    }

    fn process(incarnation: u64) -> Process {
        Process { incarnation: Incarnation(incarnation), shards: 3 }
    }

    fn join(line: &mut Line, incarnation: u64, right: bool, peer_has: u64) -> (Joined, Vec<Told>) {
        let mut told = Vec::new();
        let agreed = Agreed { protocol: 1, peer_has, peer_is_new: false };
        let joined = line.join((&hello(incarnation), &agreed), right, 100, &mut told).unwrap();
        (joined, told)
    }

    #[test]
    fn of_two_connections_the_right_one_stays_whichever_stood_first() {
        let up = vec![Told::Up(process(5))];
        let mut line = Line::new((true, true), 0);
        assert_eq!(join(&mut line, 5, true, 0), (Joined::Stands, up.clone()));
        assert_eq!(join(&mut line, 5, false, 0), (Joined::Superfluous, vec![]));
        assert_eq!(join(&mut line, 5, true, 0), (Joined::Replaces, vec![]), "it was dialled anew");
        let mut line = Line::new((true, false), 0);
        assert_eq!(join(&mut line, 5, false, 0), (Joined::Stands, up));
        assert_eq!(join(&mut line, 5, false, 0).0, Joined::Replaces);
        assert_eq!(join(&mut line, 5, true, 0).0, Joined::Replaces);
        assert_eq!(join(&mut line, 5, false, 0).0, Joined::Superfluous);
    }

    #[test]
    fn a_short_break_is_not_told_and_a_long_one_is() {
        let mut line = Line::new((true, true), 0);
        join(&mut line, 5, true, 0);
        line.lost(100, 0);
        assert!(line.is_up() && !line.is_connected());
        let mut told = Vec::new();
        assert!(!line.tick((100 + BROKEN_MS - 1, 0), &mut told));
        assert_eq!(join(&mut line, 5, false, 0), (Joined::Stands, vec![]));
        line.lost(100, 0);
        line.tick((100 + BROKEN_MS, 0), &mut told);
        assert_eq!(told, [Told::Down]);
        assert_eq!(join(&mut line, 5, true, 0), (Joined::Stands, vec![Told::Up(process(5))]), "the same process");
        told.clear();
        assert!(line.tick((100 + SILENCE_MS, 0), &mut told), "silence closes the connection");
        assert_eq!(told, [Told::Down]);
    }

    #[test]
    fn another_process_is_told_whoever_hears_of_it_first() {
        let mut line = Line::new((true, true), 0);
        join(&mut line, 5, true, 0);
        line.channel_mut().offer(Bytes::from_static(b"lost")).unwrap();
        let all = vec![Told::Down, Told::Reset, Told::Up(process(6))];
        assert_eq!(join(&mut line, 6, false, 0), (Joined::Replaces, all.clone()));
        assert_eq!(line.channel().kept_bytes(), 0);
        let mut told = Vec::new();
        assert_eq!(line.heard_of(process(5), 100, &mut told), Sender::Old);
        assert_eq!(line.heard_of(process(6), 100, &mut told), Sender::Known);
        assert!(told.is_empty());
        assert_eq!(line.heard_of(process(7), 100, &mut told), Sender::New);
        assert_eq!(told, [Told::Down, Told::Reset, Told::Up(process(7))]);
        // What is sent to it from now on stays, and goes out when it connects.
        line.channel_mut().offer(Bytes::from_static(b"kept")).unwrap();
        assert_eq!(join(&mut line, 7, true, 0), (Joined::Stands, vec![]));
        let frames: Vec<_> = std::iter::from_fn(|| line.channel_mut().next_frame(100)).collect();
        assert!(matches!(frames[..], [Frame::Taken { .. }, Frame::Batch { number: 1, .. }]), "{frames:?}");
    }

    #[test]
    fn a_new_process_that_was_only_heard_of_is_dialled() {
        let mut line = Line::new((true, true), 0);
        join(&mut line, 5, true, 0);
        let mut told = Vec::new();
        // The connection to the old one is closed by the caller, who tells nothing of it any more.
        assert_eq!(line.heard_of(process(6), 100, &mut told), Sender::New);
        assert!(line.dial(100) && !line.dial(100), "once");
        line.dial_failed(100, 0);
        assert_eq!(line.heard_of(process(6), 101, &mut told), Sender::Known);
        assert!(line.dial(200), "as after any other failure");
        let mut line = Line::new((false, false), 0);
        join(&mut line, 5, true, 0);
        assert_eq!(line.heard_of(process(6), 100, &mut told), Sender::New);
        assert!(!line.dial(100), "not where only the other side dials");
    }

    #[test]
    fn who_was_heard_of_and_never_connects_is_down_again() {
        let (mut line, mut told) = (Line::new((false, false), 0), Vec::new());
        assert_eq!(line.next_ms(), None);
        line.heard_of(process(5), 100, &mut told);
        assert_eq!(line.next_ms(), Some(100 + MET_MS));
        line.tick((100 + MET_MS, 0), &mut told);
        assert_eq!(told, [Told::Up(process(5)), Told::Down]);
    }

    #[test]
    fn dials_follow_each_other_with_pauses() {
        let mut line = Line::new((true, false), 0);
        assert!(!line.dial(COURTESY_MS - 1) && line.dial(COURTESY_MS) && !line.dial(COURTESY_MS));
        line.dial_failed(1_000, u64::MAX);
        assert_eq!(line.next_ms(), Some(1_050));
        assert!(line.dial(1_050));
        join(&mut line, 5, true, 0);
        line.dial_failed(1_100, 0);
        assert!(!line.dial(60_000), "another connection stands");
        line.lost(1_200, u64::MAX);
        assert!(line.dial(1_300));
    }
}
