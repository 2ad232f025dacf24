//! The epoll loop of one generator thread: sockets, clock and timers under its share of the clients.
//!
//! Each thread owns its clients, buffers, figures and epoll instance; with the others it shares only [`Shared`], which
//! is written once a turn and never on the path of a message. Invariants: a client is written to at most once for each
//! batch that it read and for each time it was due; a client whose socket is full keeps its bytes and is not read less
//! for it.

use std::cmp::Reverse;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::Class;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::peer::{Alarm, Desk, Job, Outcome, Peer, Turn};
use crate::plan::{Pace, Plan, Timeline};
use crate::sources::Sources;
use crate::tally::{Disconnect, Incident};

/// Connects and logins under way in the whole process, so that a listen backlog is never overrun.
const LOGINS_IN_FLIGHT_MAX: usize = 128;
const READ_BYTES: usize = 64 * 1024;
/// Receive buffer that a slow reader asks the kernel for.
const SLOW_BUFFER_BYTES: usize = 4 * 1024;
/// Events taken in one turn, and due sends made in one turn, so that neither starves the other.
const EVENTS_MAX: usize = 256;
const DUE_MAX: usize = 512;
/// All clients are visited for housekeeping in this time, or in a quarter of the ping interval if that is less.
const SWEEP_NS_MAX: u64 = 250_000_000;
const SWEEP_NS_MIN: u64 = 10_000_000;
/// A sweep is cut into so many parts.
const SWEEP_SLICES: u64 = 16;
const NS_PER_MS: u64 = 1_000_000;
const NS_PER_S: u64 = 1_000_000_000;

/// What a thread shows the main thread, once a turn. Counts since the beginning.
#[derive(Default)]
#[repr(align(128))]
pub struct Gauge {
    pub logged_in: AtomicU64,
    pub sent: AtomicU64,
    pub accepted: AtomicU64,
    pub delivered: AtomicU64,
    pub unanswered: AtomicU64,
    pub disconnected: AtomicU64,
    /// When this was written, by the clock of the run. A thread that is busy shows old figures.
    pub written_ns: AtomicU64,
}

/// What the threads and the main thread tell each other.
pub struct Shared {
    /// All times of a run are nanoseconds since this.
    pub epoch: Instant,
    /// Set by the main thread once all clients are logged in.
    pub timeline: OnceLock<Timeline>,
    /// The first thing that makes the run impossible, for people.
    pub fatal: OnceLock<String>,
    pub stop: AtomicBool,
    /// Clients from this index on do not connect yet.
    admitted: AtomicU32,
    /// One a thread.
    pub gauges: Vec<Gauge>,
}

impl Shared {
    pub fn new(threads: usize) -> Self {
        let gauges = (0..threads).map(|_| Gauge::default()).collect();
        Self {
            epoch: Instant::now(),
            timeline: OnceLock::new(),
            fatal: OnceLock::new(),
            stop: AtomicBool::new(false),
            admitted: AtomicU32::new(u32::MAX),
            gauges,
        }
    }

    pub fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// One figure, summed over the threads.
    pub fn sum(&self, figure: impl Fn(&Gauge) -> &AtomicU64) -> u64 {
        self.gauges.iter().map(|gauge| figure(gauge).load(Ordering::Relaxed)).sum()
    }

    /// When the oldest figures were written: what is summed after this call is at least as new.
    pub fn written_ns(&self) -> u64 {
        self.gauges.iter().map(|gauge| gauge.written_ns.load(Ordering::Acquire)).min().unwrap_or(0)
    }

    /// Lets the clients below this index connect, and no others. At the beginning all may.
    pub fn admit(&self, clients: u32) {
        self.admitted.store(clients, Ordering::Relaxed);
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Ends the run; the first reason given is the one that is told.
    pub fn fail(&self, why: String) {
        let _ = self.fatal.set(why);
        self.stop();
    }
}

/// What one thread is to do.
pub struct Share {
    pub thread: usize,
    /// Client i belongs to thread i % threads: neighbours in an open loop are due on different threads.
    pub threads: usize,
    pub plan: Arc<Plan>,
    /// The tokens of all clients.
    pub tokens: Arc<Vec<String>>,
    /// To the first target, and to the others.
    pub sources: Sources,
    pub further: Vec<Sources>,
    pub shared: Arc<Shared>,
}

impl Share {
    /// How a client reaches its node.
    fn sources(&self, client: u32) -> Sources {
        let further = self.plan.home(client).checked_sub(1).and_then(|at| self.further.get(at));
        further.copied().unwrap_or(self.sources)
    }
}

enum Stage {
    /// Not begun.
    Waiting,
    Connecting(TcpStream),
    LoggingIn(TcpStream),
    Open(TcpStream),
    Closed,
}

impl Stage {
    fn stream(&self) -> Option<&TcpStream> {
        match self {
            Self::Connecting(stream) | Self::LoggingIn(stream) | Self::Open(stream) => Some(stream),
            Self::Waiting | Self::Closed => None,
        }
    }
}

struct Link {
    peer: Peer,
    stage: Stage,
    decoder: FrameDecoder,
    /// What the socket did not take; empty nearly always.
    unwritten: Vec<u8>,
    /// Reads slowly on purpose: epoll is not asked for reads, the sweep makes them.
    sips: bool,
    /// When it read last.
    sipped_ns: u64,
}

impl Link {
    /// What to ask epoll for: reads, unless the sweep makes them; writes while something waits to be written.
    fn interest(&self) -> EventFlags {
        let reads = if self.sips { EventFlags::empty() } else { EventFlags::IN };
        let writes = if self.unwritten.is_empty() { EventFlags::empty() } else { EventFlags::OUT };
        reads | writes
    }
}

/// See the file's head.
pub struct Engine {
    share: Share,
    epoll: OwnedFd,
    links: Vec<Link>,
    desk: Desk,
    buffer: Vec<u8>,
    events: Vec<Event>,
    timeline: Timeline,
    /// The closed loop has been set off.
    set_off: bool,
    /// Open loop: the next (number, slot) that is due.
    due: (u32, usize),
    next_connect: usize,
    logins_in_flight: usize,
    logged_in: u64,
    sweep_ns: u64,
    sweep_slot: usize,
    sweep_due_ns: u64,
}

impl Engine {
    /// Fails if the kernel has no epoll instance left.
    pub fn new(share: Share) -> io::Result<Self> {
        let clients = share.plan.clients();
        let own = (share.thread as u32..clients).step_by(share.threads.max(1)).enumerate();
        let links = own.map(|(slot, index)| Link {
            peer: Peer::new(index, slot as u32),
            stage: Stage::Waiting,
            decoder: FrameDecoder::new(),
            unwritten: Vec::new(),
            sips: false,
            sipped_ns: 0,
        });
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            links: links.collect(),
            desk: Desk::for_plan(&share.plan),
            buffer: vec![0; READ_BYTES],
            events: Vec::with_capacity(EVENTS_MAX),
            timeline: Timeline::NEVER,
            set_off: false,
            due: (0, 0),
            next_connect: 0,
            logins_in_flight: 0,
            logged_in: 0,
            sweep_ns: SWEEP_NS_MAX,
            sweep_slot: 0,
            sweep_due_ns: 0,
            share,
        })
    }

    /// Runs until [`Shared::stop`]; gives back what was counted.
    pub fn run(mut self) -> Desk {
        while !self.share.shared.stop.load(Ordering::Acquire) {
            self.connect_more();
            if let Err(error) = self.take_events() {
                self.share.shared.fail(format!("epoll: {error}"));
            }
            self.begin();
            self.send_due();
            self.fire_alarms();
            self.sweep();
            self.publish();
        }
        for link in &self.links {
            let (tally, refused) = (&mut self.desk.tally, link.peer.refused());
            tally.unsent += link.peer.unsent(&self.share.plan, &self.timeline);
            tally.given_up += refused;
            tally.unanswered = tally.unanswered.saturating_sub(refused);
            let plan = &self.share.plan;
            let may_miss = plan.class == Class::Transient || !link.peer.ready();
            if plan.reads_slowly(link.peer.index()) && may_miss {
                self.desk.ledger.excuse(plan.target(link.peer.index(), 0));
            }
        }
        self.desk
    }

    fn now_ns(&self) -> u64 {
        self.share.shared.now_ns()
    }

    // --- connecting ---------------------------------------------------------------------------------------------

    fn connect_more(&mut self) {
        let in_flight_max = (LOGINS_IN_FLIGHT_MAX / self.share.threads.max(1)).max(1);
        while self.logins_in_flight < in_flight_max {
            let slot = self.next_connect;
            let Some(link) = self.links.get_mut(slot) else { return };
            let index = link.peer.index();
            if index >= self.share.shared.admitted.load(Ordering::Relaxed) {
                return;
            }
            // Before the connection: the kernel must not read on behalf of who is to read slowly.
            let buffer_bytes = self.share.plan.reads_slowly(index).then_some(SLOW_BUFFER_BYTES);
            match self.share.sources(index).connect(index, buffer_bytes) {
                Ok(stream) => {
                    let added = epoll::add(&self.epoll, &stream, EventData::new_u64(slot as u64), EventFlags::OUT);
                    link.stage = Stage::Connecting(stream);
                    if let Err(error) = added {
                        return self.connect_failed(index, &error.into());
                    }
                }
                Err(error) => return self.connect_failed(index, &error),
            }
            self.next_connect += 1;
            self.logins_in_flight += 1;
        }
    }

    fn connect_failed(&self, client: u32, error: &io::Error) {
        let target = self.share.sources(client).target();
        self.share.shared.fail(match error.kind() {
            ErrorKind::ConnectionRefused => format!("no server at {target}: connection refused"),
            ErrorKind::AddrNotAvailable => format!(
                "no local port left for a connection to {target}: use fewer clients, or wait a minute until the \
                     ports of earlier runs are free"
            ),
            _ => format!("cannot connect to {target}: {error}"),
        });
    }

    fn connected(&mut self, slot: usize) {
        let Some(link) = self.links.get_mut(slot) else { return };
        let stage = std::mem::replace(&mut link.stage, Stage::Closed);
        let Stage::Connecting(stream) = stage else { return };
        let client = link.peer.index();
        let ready = match stream.take_error() {
            Ok(None) => interest(&self.epoll, &stream, (slot, EventFlags::IN)),
            Ok(Some(error)) | Err(error) => Err(error),
        };
        link.stage = Stage::LoggingIn(stream);
        match ready {
            Ok(()) => self.login(slot),
            Err(error) => self.connect_failed(client, &error),
        }
    }

    fn login(&mut self, slot: usize) {
        let tokens = Arc::clone(&self.share.tokens);
        self.with_peer(slot, |peer, turn| {
            let token = tokens.get(peer.index() as usize).map_or("", String::as_str);
            peer.login(token, turn);
        });
    }

    fn logged_in(&mut self, slot: usize, ping_interval_ms: u32) {
        let Some(link) = self.links.get_mut(slot) else { return };
        if let Stage::LoggingIn(stream) = std::mem::replace(&mut link.stage, Stage::Closed) {
            link.stage = Stage::Open(stream);
        }
        if self.share.plan.reads_slowly(link.peer.index()) {
            self.set_sips(slot, true);
        }
        self.logins_in_flight = self.logins_in_flight.saturating_sub(1);
        self.logged_in += 1;
        let quarter_ns = u64::from(ping_interval_ms) * NS_PER_MS / 4;
        self.sweep_ns = self.sweep_ns.min(quarter_ns).max(SWEEP_NS_MIN);
    }

    // --- reading and writing ------------------------------------------------------------------------------------

    /// Waits for events until something is due, and handles one batch of them.
    fn take_events(&mut self) -> io::Result<()> {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.poll_events(&mut events)?;
        if events.is_empty() {
            self.sleep_until(self.next_due_ns())?;
            self.poll_events(&mut events)?;
        }
        for event in &events {
            // The event is packed: copy before use.
            let (flags, data) = (event.flags, event.data);
            self.on_event(data.u64() as usize, flags);
        }
        self.events = events;
        Ok(())
    }

    fn poll_events(&self, events: &mut Vec<Event>) -> io::Result<()> {
        const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.epoll, spare_capacity(events), Some(&AT_ONCE)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// `ppoll` on the epoll instance: its timeout is in nanoseconds, that of `epoll_wait` in milliseconds.
    fn sleep_until(&self, due_ns: u64) -> io::Result<()> {
        let wait_ns = due_ns.saturating_sub(self.now_ns());
        if wait_ns == 0 {
            return Ok(());
        }
        let timeout = Timespec { tv_sec: (wait_ns / NS_PER_S) as i64, tv_nsec: (wait_ns % NS_PER_S) as i64 };
        match poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The sweep comes round many times a second, so the sleep is always short enough to see a stop.
    fn next_due_ns(&self) -> u64 {
        let alarm_ns = self.desk.alarms.peek().map_or(u64::MAX, |Reverse(alarm)| alarm.due_ns);
        let start_ns = if self.set_off { u64::MAX } else { self.timeline.start_ns };
        let send_ns = self.next_send().map_or(u64::MAX, |(_, intended_ns)| intended_ns);
        self.sweep_due_ns.min(alarm_ns).min(start_ns).min(send_ns)
    }

    fn on_event(&mut self, slot: usize, flags: EventFlags) {
        let Some(link) = self.links.get(slot) else { return };
        match link.stage {
            Stage::Connecting(_) => self.connected(slot),
            Stage::LoggingIn(_) | Stage::Open(_) => {
                if flags.contains(EventFlags::OUT) {
                    self.write(slot);
                }
                if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
                    self.read(slot);
                }
            }
            Stage::Waiting | Stage::Closed => {}
        }
    }

    /// Begins or ends slow reading.
    fn set_sips(&mut self, slot: usize, sips: bool) {
        let now_ns = self.now_ns();
        let Some(link) = self.links.get_mut(slot) else { return };
        (link.sips, link.sipped_ns) = (sips, now_ns);
        let Some(stream) = link.stage.stream() else { return };
        if let Err(error) = interest(&self.epoll, stream, (slot, link.interest())) {
            self.io_failed(slot, &error);
        }
    }

    /// Reads what a slow reader may by now; at full speed again once the window is over, so that it catches up.
    fn sip(&mut self, slot: usize) {
        let now_ns = self.now_ns();
        if now_ns >= self.timeline.measure_to_ns {
            return self.set_sips(slot, false);
        }
        let Some(link) = self.links.get_mut(slot) else { return };
        let waited_ns = now_ns.saturating_sub(link.sipped_ns);
        let bytes = u128::from(self.share.plan.slow.bytes_per_s) * u128::from(waited_ns) / u128::from(NS_PER_S);
        if bytes > 0 {
            link.sipped_ns = now_ns;
            self.read_at_most(slot, usize::try_from(bytes).unwrap_or(READ_BYTES));
        }
    }

    fn read(&mut self, slot: usize) {
        self.read_at_most(slot, READ_BYTES);
    }

    /// One `recv`; epoll reports again if there is more.
    fn read_at_most(&mut self, slot: usize, bytes_max: usize) {
        let Some(link) = self.links.get_mut(slot) else { return };
        let Some(mut stream) = link.stage.stream() else { return };
        let room = bytes_max.min(self.buffer.len());
        let bytes = match stream.read(self.buffer.get_mut(..room).unwrap_or_default()) {
            Ok(0) => return self.close(slot, Disconnect::ByServer),
            Ok(bytes) => bytes,
            Err(error) => return self.io_failed(slot, &error),
        };
        let mut input = self.buffer.get(..bytes).unwrap_or_default();
        let now_ns = self.share.shared.now_ns();
        let mut turn = Turn { plan: &self.share.plan, timeline: self.timeline, now_ns, desk: &mut self.desk };
        let (mut logged_in, mut bad) = (None, None);
        while bad.is_none() {
            match link.decoder.next(&mut input, FRAME_BYTES_CEILING) {
                Ok(Some(frame)) => match link.peer.on_frame(&frame, &mut turn) {
                    Outcome::Fine | Outcome::LoginDelayed => {}
                    Outcome::LoggedIn { ping_interval_ms } => logged_in = Some(ping_interval_ms),
                    outcome @ (Outcome::LoginRefused { .. } | Outcome::WindowTooLarge { .. } | Outcome::Unreadable) => {
                        bad = Some(outcome);
                    }
                },
                Ok(None) => break,
                Err(_) => bad = Some(Outcome::Unreadable),
            }
        }
        link.peer.pump(&mut turn);
        if let Some(ping_interval_ms) = logged_in {
            self.logged_in(slot, ping_interval_ms);
        }
        self.write(slot);
        if let Some(outcome) = bad {
            self.refused(slot, outcome);
        }
    }

    fn refused(&mut self, slot: usize, outcome: Outcome) {
        let user = self.user(slot).to_owned();
        match outcome {
            Outcome::LoginRefused { code, detail } => {
                let detail = if detail.is_empty() { code.text() } else { detail.as_str() };
                let wrong_key = code == ErrorCode::AuthFailed;
                let hint = if wrong_key { ": is --issuer-key the key of this server?" } else { "" };
                self.share.shared.fail(format!("login of {user} refused: {} ({detail}){hint}", code.name()));
            }
            Outcome::WindowTooLarge { sends_in_flight_max } => self.share.shared.fail(format!(
                "--window is too large: this server allows {sends_in_flight_max} sends in flight a client"
            )),
            Outcome::Unreadable => self.close(slot, Disconnect::Unreadable),
            Outcome::Fine | Outcome::LoginDelayed | Outcome::LoggedIn { .. } => {}
        }
    }

    fn user(&self, slot: usize) -> &str {
        self.links.get(slot).map_or("", |link| self.share.plan.name(link.peer.index()))
    }

    /// Lets a client act, then writes what it has to say.
    fn with_peer(&mut self, slot: usize, act: impl FnOnce(&mut Peer, &mut Turn<'_>)) {
        let now_ns = self.now_ns();
        let Some(link) = self.links.get_mut(slot) else { return };
        let mut turn = Turn { plan: &self.share.plan, timeline: self.timeline, now_ns, desk: &mut self.desk };
        act(&mut link.peer, &mut turn);
        self.write(slot);
    }

    /// One `send` of all that this client has to write. What the socket does not take waits for epoll.
    fn write(&mut self, slot: usize) {
        let Some(link) = self.links.get_mut(slot) else { return };
        let (out, waited) = (&mut self.desk.out, !link.unwritten.is_empty());
        if waited {
            link.unwritten.append(out);
        }
        let bytes = if waited { &link.unwritten } else { &*out };
        let stream = link.stage.stream().filter(|_| !bytes.is_empty());
        let Some(mut stream) = stream else { return out.clear() };
        let taken = match stream.write(bytes) {
            Ok(taken) => taken,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => {
                out.clear();
                return self.io_failed(slot, &error);
            }
        };
        if waited {
            link.unwritten.drain(..taken);
        } else {
            link.unwritten.extend_from_slice(out.get(taken..).unwrap_or_default());
            out.clear();
        }
        let waits = !link.unwritten.is_empty();
        if waits != waited
            && let Err(error) = interest(&self.epoll, stream, (slot, link.interest()))
        {
            return self.io_failed(slot, &error);
        }
        if !waits && waited {
            link.unwritten = Vec::new();
        }
    }

    fn io_failed(&mut self, slot: usize, error: &io::Error) {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => self.close(slot, Disconnect::Reset),
            _ => self.close(slot, Disconnect::Socket),
        }
    }

    fn close(&mut self, slot: usize, why: Disconnect) {
        let Some(link) = self.links.get_mut(slot) else { return };
        let incident = if link.sips { Incident::SlowReaderClosed } else { Incident::Disconnected(why) };
        let early = !matches!(link.stage, Stage::Open(_));
        link.stage = Stage::Closed;
        link.unwritten = Vec::new();
        let abandoned = u64::from(link.peer.gone());
        let tally = &mut self.desk.tally;
        tally.count(incident);
        tally.disconnected += u64::from(!link.sips);
        tally.abandoned += abandoned;
        tally.unanswered = tally.unanswered.saturating_sub(abandoned);
        if early {
            let refusals: Vec<_> = tally.incidents.keys().copied().collect();
            let why = format!("{} could not log in: {}", self.user(slot), refusals.join(", "));
            self.share.shared.fail(why);
        }
    }

    // --- time ---------------------------------------------------------------------------------------------------

    /// Takes over the timeline when it is there, and sets a closed loop off at its start.
    fn begin(&mut self) {
        if self.set_off {
            return;
        }
        if let Some(timeline) = self.share.shared.timeline.get() {
            self.timeline = *timeline;
        }
        if self.now_ns() < self.timeline.start_ns {
            return;
        }
        self.set_off = true;
        if let Pace::Closed { .. } = self.share.plan.pace {
            (0..self.links.len()).for_each(|slot| self.with_peer(slot, Peer::pump));
        }
    }

    /// Open loop: who is next, and when.
    fn next_send(&self) -> Option<(usize, u64)> {
        let (number, slot) = self.due;
        let index = self.links.get(slot).filter(|_| self.timeline.begun())?.peer.index();
        let intended_ns = self.share.plan.intended_ns(self.timeline.start_ns, index, number)?;
        (intended_ns < self.timeline.measure_to_ns).then_some((slot, intended_ns))
    }

    fn send_due(&mut self) {
        for _ in 0..DUE_MAX {
            let Some((slot, intended_ns)) = self.next_send() else { return };
            let now_ns = self.now_ns();
            if intended_ns > now_ns {
                return;
            }
            let (number, _) = self.due;
            self.with_peer(slot, |peer, turn| peer.due(number, intended_ns, turn));
            self.due =
                if slot + 1 < self.links.len() { (self.due.0, slot + 1) } else { (self.due.0.saturating_add(1), 0) };
        }
    }

    fn fire_alarms(&mut self) {
        let now_ns = self.now_ns();
        while let Some(&Reverse(Alarm { due_ns, slot, job })) = self.desk.alarms.peek() {
            if due_ns > now_ns {
                return;
            }
            self.desk.alarms.pop();
            let slot = slot as usize;
            match job {
                Job::Login => self.login(slot),
                Job::Send(number) => self.with_peer(slot, |peer, turn| peer.send_again(number, turn)),
                Job::Fetch => self.with_peer(slot, Peer::fetch_again),
            }
        }
    }

    /// Housekeeping of the next part of the clients.
    fn sweep(&mut self) {
        let now_ns = self.now_ns();
        if now_ns < self.sweep_due_ns {
            return;
        }
        self.sweep_due_ns = now_ns + self.sweep_ns / SWEEP_SLICES;
        let part = self.links.len().div_ceil(SWEEP_SLICES as usize);
        for _ in 0..part {
            let slot = self.sweep_slot;
            self.sweep_slot = if slot + 1 < self.links.len() { slot + 1 } else { 0 };
            if self.links.get(slot).is_some_and(|link| link.sips) {
                self.sip(slot);
            }
            // A client that cannot write now says nothing more that could wait.
            if self.links.get(slot).is_some_and(|link| link.unwritten.is_empty() && link.peer.ready()) {
                self.with_peer(slot, Peer::housekeep);
            }
        }
    }

    fn publish(&self) {
        let Some(gauge) = self.share.shared.gauges.get(self.share.thread) else { return };
        let tally = &self.desk.tally;
        gauge.logged_in.store(self.logged_in, Ordering::Relaxed);
        gauge.sent.store(tally.ever_sent, Ordering::Relaxed);
        gauge.accepted.store(tally.ever_accepted, Ordering::Relaxed);
        gauge.delivered.store(tally.ever_delivered, Ordering::Relaxed);
        gauge.unanswered.store(tally.unanswered, Ordering::Relaxed);
        gauge.disconnected.store(tally.disconnected, Ordering::Relaxed);
        gauge.written_ns.store(self.now_ns(), Ordering::Release);
    }
}

fn interest(epoll: &OwnedFd, stream: &TcpStream, (slot, flags): (usize, EventFlags)) -> io::Result<()> {
    Ok(epoll::modify(epoll, stream, EventData::new_u64(slot as u64), flags)?)
}
