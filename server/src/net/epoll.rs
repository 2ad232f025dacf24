//! Sockets by readiness: one epoll set a core, for kernels without the features of an own ring. Owned by its core's
//! thread.
//!
//! One receive buffer serves all connections. Each ready connection is read once a turn (level-triggered: what is left
//! is reported again), so a loud one can't starve the others. A send goes to the kernel at once; only its rest waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ringline_core::event::ConnId;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};

use super::{Admission, CloseCause, Flow, Net, NetCounters, NetEvent, NetOptions, Sending};

/// Bytes read from one connection in one turn.
const RECEIVE_BYTES_MAX: usize = 64 * 1024;
/// Readiness events taken in one turn.
const EVENTS_PER_TURN_MAX: usize = 256;
/// Connections accepted in one turn.
const ACCEPTS_PER_TURN_MAX: usize = 64;
/// How long accepting pauses when the system has no descriptor or memory for another socket.
const ACCEPT_PAUSE_US: u64 = 100_000;
/// A condition that repeats is logged at most this often.
const LOG_INTERVAL_US: u64 = 1_000_000;

/// Generation 0 is no connection's: these two share it.
const LISTENER: ConnId = ConnId { slot: 0, generation: 0 };
const WATCHED: ConnId = ConnId { slot: 1, generation: 0 };

/// See the module.
pub struct EpollNet {
    epoll: OwnedFd,
    listener: Option<OwnedFd>,
    accept_again_us: Option<u64>,
    admission: Arc<Admission>,
    refusal: Vec<u8>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots of ids without a socket.
    reserved: usize,
    /// Connections on which a send failed; told at the next poll.
    broken: Vec<(ConnId, CloseCause)>,
    ready: Vec<Event>,
    receive: Vec<u8>,
    counters: NetCounters,
    logged_us: u64,
}

struct Slot {
    generation: u32,
    tenant: Option<Tenant>,
}

struct Tenant {
    socket: OwnedFd,
    reading: bool,
    outgoing: Option<Outgoing>,
}

/// A buffer of which the kernel has taken `done` bytes.
struct Outgoing {
    buffer: Vec<u8>,
    done: usize,
}

impl Tenant {
    fn interest(&self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.reading);
        flags.set(EventFlags::OUT, self.outgoing.is_some());
        flags
    }
}

impl EpollNet {
    /// Errors: the kernel's, in practice only "too many open files".
    pub fn new(options: NetOptions) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &options.listener, data(LISTENER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            listener: Some(options.listener),
            accept_again_us: None,
            admission: options.admission,
            refusal: options.refusal,
            slots: Vec::new(),
            free: Vec::new(),
            reserved: 0,
            broken: Vec::new(),
            ready: Vec::with_capacity(EVENTS_PER_TURN_MAX),
            receive: vec![0; RECEIVE_BYTES_MAX],
            counters: NetCounters::default(),
            logged_us: 0,
        })
    }

    fn tenant(&mut self, conn: ConnId) -> Option<&mut Tenant> {
        let slot = self.slots.get_mut(conn.slot as usize)?;
        if slot.generation == conn.generation { slot.tenant.as_mut() } else { None }
    }

    /// A slot that nobody has, under a new generation.
    fn take_slot(&mut self) -> ConnId {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Slot { generation: 0, tenant: None });
                (self.slots.len() - 1) as u32
            }
        };
        let place = &mut self.slots[slot as usize];
        debug_assert!(place.tenant.is_none(), "slot {slot} is free");
        // After 2^32 tenants of one slot an id comes again; skipping 0 keeps the listener's apart.
        place.generation = place.generation.checked_add(1).unwrap_or(1);
        ConnId { slot, generation: place.generation }
    }

    /// Gives a socket a slot and waits for its bytes.
    fn seat(&mut self, socket: OwnedFd) -> io::Result<ConnId> {
        let conn = self.take_slot();
        if let Err(error) = epoll::add(&self.epoll, &socket, data(conn), EventFlags::IN) {
            self.free.push(conn.slot);
            return Err(error.into());
        }
        if let Some(place) = self.slots.get_mut(conn.slot as usize) {
            place.tenant = Some(Tenant { socket, reading: true, outgoing: None });
        }
        Ok(conn)
    }

    /// Empties a slot. Closing the last descriptor of a socket also takes it out of the epoll set.
    fn unseat(&mut self, conn: ConnId) -> Option<Tenant> {
        let slot = self.slots.get_mut(conn.slot as usize)?;
        if slot.generation != conn.generation {
            return None;
        }
        let tenant = slot.tenant.take()?;
        self.free.push(conn.slot);
        Some(tenant)
    }

    fn accept_some(&mut self, now_us: u64, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        for _ in 0..ACCEPTS_PER_TURN_MAX {
            let Some(listener) = &self.listener else { return };
            match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => self.welcome(socket, sink),
                Err(Errno::AGAIN) => return,
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    return self.pause_accepting(now_us, error);
                }
                // The client gave up while it waited, or the network told of an error of its own: the next one.
                Err(_) => {}
            }
        }
    }

    fn welcome(&mut self, socket: OwnedFd, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if !self.admission.enter() {
            self.counters.refused += 1;
            // A fresh socket has room for one small frame; whoever is gone already does not miss it.
            let _ = rustix::net::send(&socket, &self.refusal, SendFlags::NOSIGNAL);
            return;
        }
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        match self.seat(socket) {
            Ok(conn) => {
                self.counters.accepted += 1;
                let _ = sink(NetEvent::Accepted { conn });
            }
            Err(error) => {
                self.admission.leave();
                tracing::warn!(%error, "an accepted socket could not be watched");
            }
        }
    }

    /// Looks away from the listener for a while: the backlog holds the clients, and the loop does not spin.
    fn pause_accepting(&mut self, now_us: u64, error: Errno) {
        self.counters.accept_pauses += 1;
        if now_us.saturating_sub(self.logged_us) >= LOG_INTERVAL_US {
            self.logged_us = now_us;
            tracing::warn!(%error, "cannot accept: raise the limit of open files (ulimit -n) or lower limits.connections_max");
        }
        if let Some(listener) = &self.listener {
            let _ = epoll::modify(&self.epoll, listener, data(LISTENER), EventFlags::empty());
            self.accept_again_us = Some(now_us + ACCEPT_PAUSE_US);
        }
    }

    fn maybe_accept_again(&mut self, now_us: u64) {
        if self.accept_again_us.is_none_or(|at_us| now_us < at_us) {
            return;
        }
        self.accept_again_us = None;
        if let Some(listener) = &self.listener {
            let _ = epoll::modify(&self.epoll, listener, data(LISTENER), EventFlags::IN);
        }
    }

    fn on_ready(&mut self, conn: ConnId, flags: EventFlags, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if flags.contains(EventFlags::OUT) {
            self.send_rest(conn, sink);
        }
        let Some(reading) = self.tenant(conn).map(|tenant| tenant.reading) else { return };
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if reading && (gone || flags.contains(EventFlags::IN)) {
            self.receive_some(conn, sink);
        } else if gone {
            // Not read any more, and nothing can be written: the kernel would report it for ever.
            self.lose(conn, CloseCause::Peer, sink);
        }
    }

    fn receive_some(&mut self, conn: ConnId, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        let Some(slot) = self.slots.get(conn.slot as usize) else { return };
        let Some(tenant) = &slot.tenant else { return };
        match rustix::net::recv(&tenant.socket, self.receive.as_mut_slice(), RecvFlags::empty()) {
            Ok((0, _)) => self.lose(conn, CloseCause::Peer, sink),
            Ok((bytes, _)) => {
                self.counters.bytes_received += bytes as u64;
                let bytes = self.receive.get(..bytes).unwrap_or(&[]);
                match sink(NetEvent::Received { conn, bytes }) {
                    Flow::Continue => {}
                    Flow::Stop => self.stop_reading(conn),
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => self.lose(conn, CloseCause::Error(error.kind()), sink),
        }
    }

    fn stop_reading(&mut self, conn: ConnId) {
        if let Some(tenant) = self.tenant(conn) {
            tenant.reading = false;
            self.update_interest(conn);
        }
    }

    fn update_interest(&mut self, conn: ConnId) {
        let Some(slot) = self.slots.get(conn.slot as usize) else { return };
        if let Some(tenant) = &slot.tenant {
            let _ = epoll::modify(&self.epoll, &tenant.socket, data(conn), tenant.interest());
        }
    }

    fn send_rest(&mut self, conn: ConnId, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        let Some(tenant) = self.tenant(conn) else { return };
        let Some(outgoing) = &mut tenant.outgoing else { return };
        let before = outgoing.done;
        let result = push_out(&tenant.socket, outgoing);
        let bytes = outgoing.done - before;
        let finished = outgoing.done == outgoing.buffer.len();
        let buffer = if finished { tenant.outgoing.take().map(|outgoing| outgoing.buffer) } else { None };
        self.counters.bytes_sent += bytes as u64;
        if finished {
            self.update_interest(conn);
        }
        if bytes > 0 || finished {
            let _ = sink(NetEvent::Sent { conn, bytes, buffer });
        }
        if let Err(error) = result {
            self.lose(conn, CloseCause::Error(error.kind()), sink);
        }
    }

    fn lose(&mut self, conn: ConnId, cause: CloseCause, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if self.unseat(conn).is_some() {
            self.admission.leave();
            let _ = sink(NetEvent::Closed { conn, cause });
        }
    }

    fn fetch_ready(&mut self, timeout: Duration) {
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        self.ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.ready), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                debug_assert!(false, "epoll_wait: {error}");
                tracing::error!(%error, "epoll_wait failed");
            }
        }
    }
}

impl Net for EpollNet {
    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) -> bool {
        self.maybe_accept_again(now_us);
        let mut any = !self.broken.is_empty();
        for (conn, cause) in std::mem::take(&mut self.broken) {
            self.lose(conn, cause, sink);
        }
        // `wait` may have fetched already.
        if self.ready.is_empty() {
            self.fetch_ready(Duration::ZERO);
        }
        let ready = std::mem::take(&mut self.ready);
        for event in &ready {
            match unpack(event.data) {
                LISTENER => self.accept_some(now_us, sink),
                WATCHED => continue,
                conn => self.on_ready(conn, event.flags, sink),
            }
            any = true;
        }
        self.ready = ready;
        self.ready.clear();
        any
    }

    fn send(&mut self, conn: ConnId, buffer: Vec<u8>) -> Sending {
        let Some(tenant) = self.tenant(conn) else { return Sending::InFlight { bytes: 0 } };
        debug_assert!(tenant.outgoing.is_none(), "one buffer in flight a connection");
        let mut outgoing = Outgoing { buffer, done: 0 };
        let result = push_out(&tenant.socket, &mut outgoing);
        let bytes = outgoing.done;
        self.counters.bytes_sent += bytes as u64;
        if let Err(error) = result {
            self.broken.push((conn, CloseCause::Error(error.kind())));
            return Sending::InFlight { bytes };
        }
        if bytes == outgoing.buffer.len() {
            return Sending::Done(outgoing.buffer);
        }
        if let Some(tenant) = self.tenant(conn) {
            tenant.outgoing = Some(outgoing);
        }
        self.update_interest(conn);
        Sending::InFlight { bytes }
    }

    fn resume(&mut self, conn: ConnId) {
        if let Some(tenant) = self.tenant(conn) {
            tenant.reading = true;
            self.update_interest(conn);
        }
    }

    fn reserve(&mut self) -> ConnId {
        self.reserved += 1;
        self.take_slot()
    }

    fn release(&mut self, conn: ConnId) {
        let kept = self.slots.get(conn.slot as usize).filter(|slot| slot.generation == conn.generation);
        if kept.is_some_and(|slot| slot.tenant.is_none()) {
            self.reserved -= 1;
            self.free.push(conn.slot);
        }
    }

    fn finish(&mut self, conn: ConnId) {
        if let Some(tenant) = self.tenant(conn) {
            // Fails only when the client is gone, which is told by `Closed`.
            let _ = rustix::net::shutdown(&tenant.socket, Shutdown::Write);
        }
    }

    fn close(&mut self, conn: ConnId) {
        if self.unseat(conn).is_some() {
            self.admission.leave();
        }
    }

    fn detach(&mut self, conn: ConnId) -> Option<OwnedFd> {
        let tenant = self.unseat(conn)?;
        debug_assert!(tenant.outgoing.is_none(), "detached with output in flight");
        let _ = epoll::delete(&self.epoll, &tenant.socket);
        Some(tenant.socket)
    }

    fn adopt(&mut self, socket: OwnedFd) -> io::Result<ConnId> {
        self.seat(socket).inspect_err(|_| self.admission.leave())
    }

    fn watch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, data(WATCHED), EventFlags::IN | EventFlags::ET)?)
    }

    fn stop_accepting(&mut self) {
        // Closing it also refuses the clients that wait in its backlog.
        self.listener = None;
    }

    fn flush(&mut self) {
        // Every call above has spoken to the kernel already.
    }

    fn sleep_fd(&self) -> io::Result<OwnedFd> {
        self.epoll.as_fd().try_clone_to_owned()
    }

    fn prepare_sleep(&mut self) -> bool {
        self.ready.is_empty() && self.broken.is_empty()
    }

    fn wait(&mut self, timeout: Duration) {
        if self.ready.is_empty() && self.broken.is_empty() {
            self.fetch_ready(timeout);
        }
    }

    fn next_deadline_us(&self) -> Option<u64> {
        self.accept_again_us
    }

    fn connections(&self) -> usize {
        self.slots.len() - self.free.len() - self.reserved
    }

    fn counters(&self) -> NetCounters {
        self.counters
    }
}

/// Writes until all is written or the kernel takes no more.
fn push_out(socket: &OwnedFd, outgoing: &mut Outgoing) -> Result<(), Errno> {
    while let Some(rest) = outgoing.buffer.get(outgoing.done..).filter(|rest| !rest.is_empty()) {
        match rustix::net::send(socket, rest, SendFlags::NOSIGNAL) {
            Ok(bytes) => outgoing.done += bytes,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn data(conn: ConnId) -> EventData {
    EventData::new_u64(u64::from(conn.generation) << 32 | u64::from(conn.slot))
}

fn unpack(data: EventData) -> ConnId {
    let number = data.u64();
    ConnId { slot: number as u32, generation: (number >> 32) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::conformance::{Bench, listener, run_all};

    #[test]
    fn conforms() {
        run_all(|connections_max, refusal| {
            let (listener, address) = listener();
            let admission = Arc::new(Admission::new(connections_max));
            let options = NetOptions { listener, admission: admission.clone(), refusal: refusal.to_vec() };
            Bench { net: Box::new(EpollNet::new(options).unwrap()), address, admission }
        });
    }
}
