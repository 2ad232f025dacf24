//! The clients of a storm on one generator thread: the epoll loop, their attempts, back-offs, drops and pings.
//!
//! Each thread owns its share of the clients and an epoll instance, and shares only [`Shared`] with the others.
//! Invariants: connects and logins under way are bounded, so that the listen backlog is never overrun; every failed
//! attempt is counted under a name; a client comes back only after its back-off.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::DeviceId;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::{Credential, DeviceKind, Login, Reply, Request, Secret};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::SockRef;

use super::{Counts, Shared};
use crate::plan::mix;
use crate::sources::Sources;
use crate::tally::record;

const READ_BYTES: usize = 16 * 1024;
const EVENTS_MAX: usize = 256;
/// Drops made in one turn.
const DROPS_MAX: usize = 64;
/// An attempt that takes longer has failed; the server waits as long for a login.
const ATTEMPT_TIMEOUT_NS: u64 = 10_000_000_000;
/// Back-off of the protocol: full jitter from 0 to this, doubled at each failure.
const BACKOFF_NS_MIN: u64 = 200_000_000;
const BACKOFF_NS_MAX: u64 = 30_000_000_000;
/// How often a thread wakes at least.
const TICK_NS: i64 = 5_000_000;
/// All clients are looked at for a ping in this time, in parts.
const SWEEP_NS: u64 = 1_000_000_000;
const SWEEP_SLICES: u64 = 16;
const NS_PER_MS: u64 = 1_000_000;
const LOGIN_ID: u32 = 1;
const PING_ID: u32 = 2;

/// What one thread is to do.
pub(super) struct Share {
    pub thread: usize,
    /// Client i belongs to thread i % threads.
    pub threads: usize,
    pub shared: Arc<Shared>,
    pub sources: Sources,
    pub names: Arc<Vec<String>>,
    pub tokens: Arc<Vec<String>>,
    /// Connects and logins under way on this thread.
    pub in_flight_max: usize,
    /// Between two drops; `None`: no churn.
    pub drop_period_ns: Option<u64>,
}

enum Stage {
    /// Until its time in `due` comes.
    Away,
    Connecting(TcpStream),
    LoggingIn(TcpStream),
    Open(TcpStream),
}

struct Client {
    index: u32,
    stage: Stage,
    decoder: FrameDecoder,
    began_ns: u64,
    spoke_ns: u64,
    ping_after_ns: u64,
    /// Failures since the last login.
    failures: u32,
}

impl Client {
    fn new(index: u32) -> Self {
        Self {
            index,
            stage: Stage::Away,
            decoder: FrameDecoder::new(),
            began_ns: 0,
            spoke_ns: 0,
            ping_after_ns: u64::MAX,
            failures: 0,
        }
    }
}

/// The clients of one thread.
pub(super) struct Storm {
    share: Share,
    epoll: OwnedFd,
    clients: Vec<Client>,
    /// Who connects when.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    /// Attempts in the order of their begin.
    attempts: VecDeque<(u64, usize)>,
    in_flight: usize,
    drops: u64,
    drop_slot: usize,
    sweep: (u64, usize),
    jitter: u64,
    encoder: Encoder,
    out: Vec<u8>,
    buffer: Vec<u8>,
    counts: Counts,
}

/// The longest back-off after so many failures in a row, in ns.
fn backoff_ns_max(failures: u32) -> u64 {
    BACKOFF_NS_MIN.saturating_mul(1 << failures.min(16)).min(BACKOFF_NS_MAX)
}

impl Storm {
    /// Errors: the kernel has no epoll instance left.
    pub(super) fn new(share: Share) -> io::Result<Self> {
        let own = (share.thread as u32..share.names.len() as u32).step_by(share.threads.max(1));
        let clients: Vec<Client> = own.map(Client::new).collect();
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            due: (0..clients.len()).map(|slot| Reverse((0, slot))).collect(),
            clients,
            attempts: VecDeque::new(),
            in_flight: 0,
            drops: 0,
            drop_slot: 0,
            sweep: (0, 0),
            jitter: share.thread as u64,
            encoder: Encoder::new(),
            out: Vec::new(),
            buffer: vec![0; READ_BYTES],
            counts: Counts::new(),
            share,
        })
    }

    /// Until [`Shared::stop`].
    pub(super) fn run(mut self) -> Counts {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        while !self.share.shared.stop.load(Ordering::Acquire) {
            self.begin_attempts();
            events.clear();
            let tick = Timespec { tv_sec: 0, tv_nsec: TICK_NS };
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&tick)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.fatal(format!("epoll: {error}")),
            }
            for event in &events {
                // The event is packed: copy before use.
                let data = event.data;
                self.on_event(data.u64() as usize);
            }
            self.time_out();
            self.churn();
            self.ping();
        }
        self.counts
    }

    fn fatal(&self, why: String) {
        let _ = self.share.shared.fatal.set(why);
        self.share.shared.stop.store(true, Ordering::Release);
    }

    fn begin_attempts(&mut self) {
        while self.in_flight < self.share.in_flight_max {
            let now_ns = self.share.shared.now_ns();
            let Some(&Reverse((due_ns, slot))) = self.due.peek() else { return };
            if due_ns > now_ns {
                return;
            }
            self.due.pop();
            let Some(client) = self.clients.get_mut(slot) else { continue };
            client.began_ns = now_ns;
            client.decoder = FrameDecoder::new();
            self.in_flight += 1;
            self.attempts.push_back((now_ns, slot));
            let begun = self.share.sources.connect(client.index, None).and_then(|stream| {
                epoll::add(&self.epoll, &stream, EventData::new_u64(slot as u64), EventFlags::OUT)?;
                Ok(stream)
            });
            match begun {
                Ok(stream) => client.stage = Stage::Connecting(stream),
                Err(error) => self.failed(slot, connect_error(&error)),
            }
        }
    }

    fn on_event(&mut self, slot: usize) {
        let Some(client) = self.clients.get_mut(slot) else { return };
        match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::Away => {}
            Stage::Connecting(stream) => self.connected(slot, stream),
            stage @ (Stage::LoggingIn(_) | Stage::Open(_)) => {
                client.stage = stage;
                self.read(slot);
            }
        }
    }

    fn connected(&mut self, slot: usize, stream: TcpStream) {
        let ready = match stream.take_error() {
            Ok(None) => epoll::modify(&self.epoll, &stream, EventData::new_u64(slot as u64), EventFlags::IN)
                .map_err(io::Error::from),
            Ok(Some(error)) | Err(error) => Err(error),
        };
        if let Err(error) = ready {
            return self.failed(slot, connect_error(&error));
        }
        let Some(client) = self.clients.get_mut(slot) else { return };
        client.stage = Stage::LoggingIn(stream);
        let at = client.index as usize;
        let (names, tokens) = (Arc::clone(&self.share.names), Arc::clone(&self.share.tokens));
        let login = Login {
            user: names.get(at).map_or("", String::as_str),
            credential: Credential::Token(Secret(tokens.get(at).map_or("", String::as_str))),
            device: DeviceId(u64::from(client.index) + 1),
            device_kind: DeviceKind::Bot,
            agent: concat!("ringline-bench/", env!("CARGO_PKG_VERSION")),
        };
        self.say(slot, LOGIN_ID, &Request::Login(login));
    }

    /// A frame is far smaller than an empty socket buffer: one that does not go out whole is a failure.
    fn say(&mut self, slot: usize, id: u32, request: &Request<'_>) {
        self.out.clear();
        self.encoder.request(Codec::FlatBuffers, id, request, &mut self.out);
        let now_ns = self.share.shared.now_ns();
        let Some(client) = self.clients.get_mut(slot) else { return };
        client.spoke_ns = now_ns;
        let (Stage::LoggingIn(stream) | Stage::Open(stream)) = &mut client.stage else { return };
        match stream.write(&self.out) {
            Ok(bytes) if bytes == self.out.len() => {}
            Ok(_) => self.failed(slot, "NOT_TAKEN"),
            Err(error) => self.failed(slot, io_error(&error)),
        }
    }

    fn read(&mut self, slot: usize) {
        let Some(client) = self.clients.get_mut(slot) else { return };
        let (Stage::LoggingIn(stream) | Stage::Open(stream)) = &mut client.stage else { return };
        let bytes = match stream.read(&mut self.buffer) {
            Ok(0) => return self.failed(slot, "CLOSED_BY_SERVER"),
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(error) => return self.failed(slot, io_error(&error)),
        };
        let mut input = self.buffer.get(..bytes).unwrap_or_default();
        let (mut ping_interval_ms, mut refused, mut told) = (None, None, Vec::new());
        let unreadable = loop {
            match client.decoder.next(&mut input, FRAME_BYTES_CEILING) {
                Ok(Some(frame)) => match decode_reply(&frame.header, frame.body) {
                    Ok(Reply::LoginOk(ok)) => ping_interval_ms = Some(ok.ping_interval_ms),
                    Ok(Reply::Failure { code, retry_after_ms, .. }) => refused = Some((code, retry_after_ms)),
                    Ok(Reply::Kicked { .. }) => told.push("KICKED"),
                    Ok(Reply::Goaway { .. }) => told.push("GOAWAY"),
                    // Pongs, and what other runs left for these users.
                    Ok(_) | Err(ErrorCode::UnknownCommand) => {}
                    Err(_) => break true,
                },
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        for name in told {
            *self.counts.errors.entry(name).or_default() += 1;
        }
        if let Some(ping_interval_ms) = ping_interval_ms {
            self.logged_in(slot, ping_interval_ms);
        }
        if unreadable {
            self.failed(slot, "UNREADABLE");
        } else if let Some((code, retry_after_ms)) = refused {
            self.refused(slot, code, retry_after_ms);
        }
    }

    fn logged_in(&mut self, slot: usize, ping_interval_ms: u32) {
        let now_ns = self.share.shared.now_ns();
        let Some(client) = self.clients.get_mut(slot) else { return };
        let stream = match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::LoggingIn(stream) => stream,
            stage @ (Stage::Away | Stage::Connecting(_) | Stage::Open(_)) => return client.stage = stage,
        };
        client.stage = Stage::Open(stream);
        client.failures = 0;
        client.ping_after_ns = u64::from(ping_interval_ms) * NS_PER_MS / 4 * 3;
        self.in_flight = self.in_flight.saturating_sub(1);
        if now_ns < self.share.shared.churn_from_ns.load(Ordering::Acquire) {
            record(&mut self.counts.login_us, client.began_ns, now_ns);
        } else {
            record(&mut self.counts.return_us, client.began_ns, now_ns);
            self.counts.returned += 1;
        }
        self.share.shared.open.fetch_add(1, Ordering::Relaxed);
        self.share.shared.logins.fetch_add(1, Ordering::Relaxed);
    }

    fn refused(&mut self, slot: usize, code: ErrorCode, retry_after_ms: u32) {
        if code == ErrorCode::AuthFailed {
            self.fatal(format!("login refused: {}: is --issuer-key the key of this server?", code.text()));
        }
        // What the server asks is the least: the back-off alone may be shorter.
        self.failed_for(slot, code.name(), u64::from(retry_after_ms) * NS_PER_MS);
    }

    /// The connection is of no more use: the client comes back after its back-off.
    fn failed(&mut self, slot: usize, name: &'static str) {
        self.failed_for(slot, name, 0);
    }

    fn failed_for(&mut self, slot: usize, name: &'static str, least_ns: u64) {
        *self.counts.errors.entry(name).or_default() += 1;
        self.jitter = self.jitter.wrapping_add(1);
        let Some(client) = self.clients.get_mut(slot) else { return };
        let wait_ns = mix(self.jitter ^ (u64::from(client.index) << 32)) % backoff_ns_max(client.failures);
        client.failures = client.failures.saturating_add(1);
        self.leave(slot, wait_ns.max(least_ns.min(BACKOFF_NS_MAX)));
    }

    /// Closes what is open and comes back in `wait_ns`.
    fn leave(&mut self, slot: usize, wait_ns: u64) {
        let due_ns = self.share.shared.now_ns().saturating_add(wait_ns);
        let Some(client) = self.clients.get_mut(slot) else { return };
        match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::Open(_) => drop(self.share.shared.open.fetch_sub(1, Ordering::Relaxed)),
            // An attempt that fails before it has a socket is under way too.
            Stage::Away | Stage::Connecting(_) | Stage::LoggingIn(_) => {
                self.in_flight = self.in_flight.saturating_sub(1);
            }
        }
        self.due.push(Reverse((due_ns, slot)));
    }

    fn time_out(&mut self) {
        let now_ns = self.share.shared.now_ns();
        while let Some(&(began_ns, slot)) = self.attempts.front() {
            let client = self.clients.get(slot);
            let under_way = client.is_some_and(|client| {
                client.began_ns == began_ns && matches!(client.stage, Stage::Connecting(_) | Stage::LoggingIn(_))
            });
            if under_way && now_ns.saturating_sub(began_ns) < ATTEMPT_TIMEOUT_NS {
                return;
            }
            self.attempts.pop_front();
            if under_way {
                self.failed(slot, "TIMED_OUT");
            }
        }
    }

    /// Drops whoever is next in turn, by a reset: a closed port would rest for a minute and use up all of them.
    fn churn(&mut self) {
        let (Some(period_ns), now_ns) = (self.share.drop_period_ns, self.share.shared.now_ns()) else { return };
        if !self.share.shared.churns(now_ns) || self.clients.is_empty() {
            return;
        }
        let wanted = (now_ns - self.share.shared.churn_from_ns.load(Ordering::Acquire)) / period_ns.max(1);
        for _ in 0..DROPS_MAX {
            if self.drops >= wanted {
                return;
            }
            // One that is not there now cannot be dropped; its turn is over all the same.
            self.drops += 1;
            let slot = self.drop_slot;
            self.drop_slot = if slot + 1 < self.clients.len() { slot + 1 } else { 0 };
            if let Some(Stage::Open(stream)) = self.clients.get(slot).map(|client| &client.stage) {
                // Without it the drop is only a more polite one.
                let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
                self.counts.dropped += 1;
                self.leave(slot, 0);
            }
        }
    }

    fn ping(&mut self) {
        let now_ns = self.share.shared.now_ns();
        let (due_ns, mut slot) = self.sweep;
        if now_ns < due_ns {
            return;
        }
        for _ in 0..self.clients.len().div_ceil(SWEEP_SLICES as usize) {
            let silent = |client: &Client| now_ns.saturating_sub(client.spoke_ns) >= client.ping_after_ns;
            let client = self.clients.get(slot);
            if client.is_some_and(|client| matches!(client.stage, Stage::Open(_)) && silent(client)) {
                self.say(slot, PING_ID, &Request::Ping { stamp: now_ns });
            }
            slot = if slot + 1 < self.clients.len() { slot + 1 } else { 0 };
        }
        self.sweep = (now_ns + SWEEP_NS / SWEEP_SLICES, slot);
    }
}

fn connect_error(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionRefused => "CONNECT_REFUSED",
        ErrorKind::ConnectionReset => "CONNECT_RESET",
        ErrorKind::TimedOut => "CONNECT_TIMED_OUT",
        ErrorKind::AddrNotAvailable => "NO_LOCAL_PORT",
        _ => "CONNECT_FAILED",
    }
}

fn io_error(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "RESET_BY_SERVER",
        _ => "SOCKET_ERROR",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_off_doubles_to_its_bound() {
        assert_eq!(backoff_ns_max(0), BACKOFF_NS_MIN);
        assert_eq!(backoff_ns_max(3), 8 * BACKOFF_NS_MIN);
        assert_eq!([8, 16, u32::MAX].map(backoff_ns_max), [BACKOFF_NS_MAX; 3]);
    }

    #[test]
    fn every_error_has_a_name_of_its_own() {
        let kinds = [
            ErrorKind::ConnectionRefused,
            ErrorKind::ConnectionReset,
            ErrorKind::TimedOut,
            ErrorKind::AddrNotAvailable,
        ];
        let names: std::collections::HashSet<_> = kinds.map(|kind| connect_error(&kind.into())).into();
        assert_eq!(names.len(), kinds.len());
        assert_eq!(io_error(&ErrorKind::BrokenPipe.into()), io_error(&ErrorKind::ConnectionReset.into()));
    }
}
