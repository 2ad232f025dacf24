//! The generator that `compare` uses for every server: one epoll loop a thread, closed loop, pair chat.
//!
//! Each thread owns its clients; with the main thread it shares only [`Stage`]. A client keeps `window` messages on
//! their way and sends the next when one has reached its partner, whatever answers the protocol gives: so all protocols
//! carry the same load and are measured the same way. Invariant: every message names sender and number, and each
//! receiver has one sender, so a lost, doubled or reordered message is seen.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use hdrhistogram::Histogram;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};

use crate::sources::Sources;
use crate::tally::{self, add_fields};
use crate::wire::{Session, Sink, Wire, WireEvent};

/// Connections of one thread that are not ready yet, so that no listen backlog is overrun.
const LOGINS_IN_FLIGHT_MAX: usize = 64;
const READ_BYTES: usize = 64 * 1024;
const EVENTS_MAX: usize = 256;
/// How long one wait for events lasts at most: a stop is seen after it.
const WAIT_NS: i64 = 20_000_000;
/// What one run keeps of the reasons for failures.
const REASONS_MAX: usize = 4;

/// Bytes of the text at the front of every payload: sender (8), number (8), time in ns (16), all hexadecimal.
pub const STAMP_BYTES: usize = 32;

/// Times of a run, in ns since [`Stage::epoch`].
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub start_ns: u64,
    pub measure_from_ns: u64,
    pub measure_to_ns: u64,
    /// What has not arrived by then is lost.
    pub drained_ns: u64,
}

/// What the threads and the main thread tell each other.
pub struct Stage {
    pub epoch: Instant,
    /// Clients that are ready.
    pub ready: AtomicUsize,
    /// Set by the main thread once all are.
    pub times: OnceLock<Times>,
    pub fatal: OnceLock<String>,
    pub stop: AtomicBool,
}

impl Default for Stage {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            ready: AtomicUsize::new(0),
            times: OnceLock::new(),
            fatal: OnceLock::new(),
            stop: AtomicBool::new(false),
        }
    }
}

impl Stage {
    pub fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Ends the run; the first reason is kept.
    pub fn fail(&self, why: String) {
        let _ = self.fatal.set(why);
        self.stop.store(true, Ordering::Release);
    }
}

/// Whom a client's messages come back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Client 0 with 1, 2 with 3, and so on.
    Pair,
    /// Each with itself: the echo.
    Own,
}

/// What one thread is to do.
pub struct Share {
    pub sources: Sources,
    /// Clients `first` up to but not `end`; both even in pair chat.
    pub first: u32,
    pub end: u32,
    pub window: u32,
    pub payload_bytes: usize,
    pub pairing: Pairing,
    pub stage: Arc<Stage>,
}

/// What one thread has counted.
#[derive(Clone, Debug)]
pub struct Count {
    /// Delivered inside the measured window, and how long they took.
    pub delivered: u64,
    pub latency_us: Histogram<u64>,
    pub ever_sent: u64,
    pub ever_delivered: u64,
    pub ever_accepted: u64,
    /// Numbers that were passed over and never came.
    pub lost: u64,
    pub doubled: u64,
    /// Bodies that no client of this run has sent to this receiver.
    pub corrupt: u64,
    pub failed: u64,
    pub reasons: Vec<String>,
}

impl Default for Count {
    fn default() -> Self {
        Self {
            delivered: 0,
            latency_us: tally::histogram(),
            ever_sent: 0,
            ever_delivered: 0,
            ever_accepted: 0,
            lost: 0,
            doubled: 0,
            corrupt: 0,
            failed: 0,
            reasons: Vec::new(),
        }
    }
}

impl Count {
    pub fn add(&mut self, other: &Self) {
        add_fields!(self, other; delivered, ever_sent, ever_delivered, ever_accepted, lost, doubled, corrupt, failed);
        tally::add(&mut self.latency_us, &other.latency_us);
        other.reasons.iter().for_each(|reason| self.reason(reason.clone()));
    }

    fn reason(&mut self, reason: String) {
        if self.reasons.len() < REASONS_MAX && !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }
}

/// One generated message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    sender: u32,
    number: u32,
    sent_ns: u64,
}

impl Stamp {
    /// Text, because XMPP carries nothing else; padded with dots to `bytes`.
    fn write(self, bytes: usize, body: &mut Vec<u8>) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        body.clear();
        let nibbles = (u128::from(self.sender) << 96) | (u128::from(self.number) << 64) | u128::from(self.sent_ns);
        let digit = |place: usize| HEX.get((nibbles >> (4 * (STAMP_BYTES - 1 - place))) as usize & 15);
        body.extend((0..STAMP_BYTES).filter_map(digit));
        body.resize(bytes.max(STAMP_BYTES), b'.');
    }

    fn read(body: &[u8], bytes: usize) -> Option<Self> {
        let (digits, padding) = body.split_at_checked(STAMP_BYTES)?;
        if body.len() != bytes || padding.iter().any(|byte| *byte != b'.') {
            return None;
        }
        let nibbles = digits.iter().try_fold(0_u128, |nibbles, digit| {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            Some(nibbles << 4 | u128::from(value))
        })?;
        Some(Self { sender: (nibbles >> 96) as u32, number: (nibbles >> 64) as u32, sent_ns: nibbles as u64 })
    }
}

struct Link {
    stream: TcpStream,
    session: Session,
    /// What the socket did not take yet.
    out: Vec<u8>,
    /// Epoll watches for room to write.
    blocked: bool,
    ready: bool,
    next_number: u32,
    /// The next number that its one sender has for it.
    expected: u32,
}

/// One thread's loop.
pub struct Drive {
    share: Share,
    epoll: OwnedFd,
    links: Vec<Link>,
    ready: usize,
    set_off: bool,
    times: Option<Times>,
    count: Count,
    buffer: Vec<u8>,
    body: Vec<u8>,
}

impl Drive {
    /// Errors: the kernel has no epoll instance left.
    pub fn new(share: Share) -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            share,
            links: Vec::new(),
            ready: 0,
            set_off: false,
            times: None,
            count: Count::default(),
            buffer: vec![0; READ_BYTES],
            body: Vec::new(),
        })
    }

    /// Runs until all is delivered, or the time for it is over, or [`Stage::stop`]. `make` gives each client its wire.
    pub fn run(mut self, make: &dyn Fn(u32) -> Box<dyn Wire>) -> Count {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS_MAX);
        while !self.share.stage.stop.load(Ordering::Acquire) && !self.is_over() {
            if let Err(why) = self.connect_more(make).and_then(|()| self.turn(&mut events)) {
                self.share.stage.fail(why);
            }
        }
        let arrived = self.count.ever_delivered + self.count.lost;
        self.count.lost += self.count.ever_sent.saturating_sub(arrived);
        self.count
    }

    fn is_over(&self) -> bool {
        let Some(times) = self.times else { return false };
        let now_ns = self.share.stage.now_ns();
        let quiet = self.count.ever_delivered >= self.count.ever_sent;
        now_ns >= times.drained_ns || (now_ns >= times.measure_to_ns && quiet)
    }

    fn turn(&mut self, events: &mut Vec<Event>) -> Result<(), String> {
        events.clear();
        match epoll::wait(&self.epoll, spare_capacity(events), Some(&Timespec { tv_sec: 0, tv_nsec: WAIT_NS })) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("epoll: {error}")),
        }
        for event in events.iter() {
            // The event is packed: copy before use.
            let (flags, data) = (event.flags, event.data);
            let slot = data.u64() as usize;
            if flags.contains(EventFlags::OUT) {
                self.write(slot)?;
            }
            if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
                self.read(slot)?;
            }
        }
        self.set_off()
    }

    fn clients(&self) -> usize {
        self.share.end.saturating_sub(self.share.first) as usize
    }

    fn connect_more(&mut self, make: &dyn Fn(u32) -> Box<dyn Wire>) -> Result<(), String> {
        while self.links.len() < self.clients() && self.links.len() - self.ready < LOGINS_IN_FLIGHT_MAX {
            let (slot, index) = (self.links.len(), self.share.first + self.links.len() as u32);
            let stream = self.share.sources.connect(index, None).map_err(|error| format!("cannot connect: {error}"))?;
            epoll::add(&self.epoll, &stream, EventData::new_u64(slot as u64), EventFlags::IN)
                .map_err(|error| format!("epoll: {error}"))?;
            let (mut session, mut out) = (Session::new(make(index)), Vec::new());
            session.hello(&mut out);
            let (next_number, expected) = (0, 0);
            let link = Link { stream, session, out, blocked: false, ready: false, next_number, expected };
            self.links.push(link);
            self.write(slot)?;
            self.note_ready(slot);
        }
        Ok(())
    }

    fn note_ready(&mut self, slot: usize) {
        let Some(link) = self.links.get_mut(slot) else { return };
        if !link.ready && link.session.ready() {
            link.ready = true;
            self.ready += 1;
            self.share.stage.ready.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Each client's first window of messages, once, at the start.
    fn set_off(&mut self) -> Result<(), String> {
        if self.set_off {
            return Ok(());
        }
        let Some(times) = self.share.stage.times.get() else { return Ok(()) };
        if self.share.stage.now_ns() < times.start_ns {
            return Ok(());
        }
        (self.times, self.set_off) = (Some(*times), true);
        (0..self.links.len()).try_for_each(|slot| self.send(slot, self.share.window))
    }

    /// Sends `messages` new ones from this client, unless the run is over.
    fn send(&mut self, slot: usize, messages: u32) -> Result<(), String> {
        let now_ns = self.share.stage.now_ns();
        if self.times.is_none_or(|times| now_ns >= times.measure_to_ns) {
            return Ok(());
        }
        let Some(link) = self.links.get_mut(slot) else { return Ok(()) };
        for _ in 0..messages {
            let stamp = Stamp { sender: self.share.first + slot as u32, number: link.next_number, sent_ns: now_ns };
            stamp.write(self.share.payload_bytes, &mut self.body);
            link.session.send(&self.body, &mut link.out);
            link.next_number = link.next_number.wrapping_add(1);
        }
        self.count.ever_sent += u64::from(messages);
        self.write(slot)
    }

    fn partner(&self, slot: usize) -> usize {
        match self.share.pairing {
            Pairing::Pair => slot ^ 1,
            Pairing::Own => slot,
        }
    }

    /// One `recv`; epoll tells again if there is more.
    fn read(&mut self, slot: usize) -> Result<(), String> {
        let partner = self.partner(slot);
        let Some(link) = self.links.get_mut(slot) else { return Ok(()) };
        let bytes = match link.stream.read(&mut self.buffer) {
            Ok(0) => return Err("the server closed a connection".to_owned()),
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
            Err(error) => return Err(format!("a connection failed: {error}")),
        };
        let mut inbox = Inbox {
            from: self.share.first + partner as u32,
            payload_bytes: self.share.payload_bytes,
            now_ns: self.share.stage.now_ns(),
            times: self.times,
            expected: link.expected,
            arrived: 0,
            count: &mut self.count,
        };
        let mut take = |event: WireEvent<'_>| inbox.take(event);
        let mut sink = Sink { out: &mut link.out, events: &mut take };
        link.session.receive(self.buffer.get(..bytes).unwrap_or_default(), &mut sink)?;
        let arrived = inbox.arrived;
        link.expected = inbox.expected;
        self.note_ready(slot);
        if arrived > 0 {
            self.send(partner, arrived)?;
        }
        self.write(slot)
    }

    /// One `send` of all that waits; what the socket does not take stays.
    fn write(&mut self, slot: usize) -> Result<(), String> {
        let Some(link) = self.links.get_mut(slot) else { return Ok(()) };
        if !link.out.is_empty() {
            match link.stream.write(&link.out) {
                Ok(taken) => drop(link.out.drain(..taken)),
                // Not connected yet, or no room.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::NotConnected
                    ) => {}
                Err(error) => return Err(format!("a connection failed: {error}")),
            }
        }
        let blocked = !link.out.is_empty();
        if blocked == link.blocked {
            return Ok(());
        }
        link.blocked = blocked;
        let flags = if blocked { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        epoll::modify(&self.epoll, &link.stream, EventData::new_u64(slot as u64), flags)
            .map_err(|error| format!("epoll: {error}"))
    }
}

/// Judges what one client is told.
struct Inbox<'a> {
    from: u32,
    payload_bytes: usize,
    now_ns: u64,
    times: Option<Times>,
    expected: u32,
    arrived: u32,
    count: &'a mut Count,
}

impl Inbox<'_> {
    fn take(&mut self, event: WireEvent<'_>) {
        match event {
            WireEvent::Accepted => self.count.ever_accepted += 1,
            WireEvent::Failed(why) => {
                self.count.failed += 1;
                self.count.reason(why);
            }
            WireEvent::Delivered(body) => self.delivered(body),
        }
    }

    fn delivered(&mut self, body: &[u8]) {
        let stamp = Stamp::read(body, self.payload_bytes).filter(|stamp| stamp.sender == self.from);
        let Some(stamp) = stamp else {
            self.count.corrupt += 1;
            return;
        };
        if stamp.number < self.expected {
            self.count.doubled += 1;
            return;
        }
        self.count.lost += u64::from(stamp.number - self.expected);
        self.expected = stamp.number.wrapping_add(1);
        self.arrived += 1;
        self.count.ever_delivered += 1;
        let measured = |times: Times| (times.measure_from_ns..times.measure_to_ns).contains(&self.now_ns);
        if self.times.is_some_and(measured) {
            self.count.delivered += 1;
            tally::record(&mut self.count.latency_us, stamp.sent_ns, self.now_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_text_and_any_other_body_is_none() {
        let stamp = Stamp { sender: 3, number: 0xffff_fffe, sent_ns: 123_456_789_012 };
        let mut body = Vec::new();
        stamp.write(64, &mut body);
        assert_eq!((body.len(), body.is_ascii()), (64, true));
        assert_eq!(Stamp::read(&body, 64), Some(stamp));
        assert_eq!(Stamp::read(&body[..63], 64), None);
        body[63] = b'x';
        assert_eq!(Stamp::read(&body, 64), None);
        body[63] = b'.';
        body[0] = b'G';
        assert_eq!(Stamp::read(&body, 64), None);
    }

    #[test]
    fn lost_doubled_and_foreign_messages_are_told_apart() {
        let mut count = Count::default();
        let times = Times { start_ns: 0, measure_from_ns: 0, measure_to_ns: 10_000, drained_ns: 20_000 };
        let (mut body, mut arrived) = (Vec::new(), 0);
        for (sender, number) in [(1, 0), (1, 2), (1, 1), (0, 3), (1, 3)] {
            let mut inbox = Inbox {
                from: 1,
                payload_bytes: 40,
                now_ns: 9_000,
                times: Some(times),
                expected: arrived,
                arrived: 0,
                count: &mut count,
            };
            Stamp { sender, number, sent_ns: 4_000 }.write(40, &mut body);
            inbox.take(WireEvent::Delivered(&body));
            arrived = inbox.expected;
        }
        assert_eq!((count.ever_delivered, count.lost, count.doubled, count.corrupt), (3, 1, 1, 1));
        assert_eq!((count.delivered, count.latency_us.max()), (3, 5));
    }
}
