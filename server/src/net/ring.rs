//! Sockets by completion: one io_uring a core. Owned by its core's thread, which is its only issuer.
//!
//! Accepts and receives are armed once and fire many times; what was received lies in a buffer that the kernel picked
//! from the shared ring, so an idle connection owns none. Everything a turn queues (sends, new receives, cancels) goes
//! to the kernel with the one call that also fetches completions.
//!
//! Invariants: a slot is not given to another connection while an operation on its socket is with the kernel; a buffer
//! being sent is not touched until its completion; at the end the ring goes before the memory it uses.

#![allow(unsafe_code, reason = "the one place for it: each block has its proof")]

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use ringline_core::event::ConnId;
use ringline_store::FileWrite;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec as KernelTimespec, eventfd};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};

mod op;

use self::op::{Completion, GENERATION_MAX, Op, conn_of, errno, make_ring, report_enter, user_data};
use super::buffers::{self, Buffers};
use super::{Admission, CloseCause, Flow, Net, NetCounters, NetEvent, NetOptions, Sending};

/// Queue entries that one turn can fill before it has to call the kernel early.
const SUBMISSIONS_MAX: u32 = 4_096;
/// Completions the kernel can post before it has to hold some back.
const COMPLETIONS_MAX: u32 = 16_384;
/// Completions taken in one turn.
const COMPLETIONS_PER_TURN_MAX: usize = 4_096;
/// How long accepting pauses when the system has no descriptor or memory for another socket.
const ACCEPT_PAUSE_US: u64 = 100_000;
/// A condition that repeats is logged at most this often.
const LOG_INTERVAL_US: u64 = 1_000_000;
const IORING_ENTER_GETEVENTS: u32 = 1;
/// Edges taken before a sleep that is not in the ring; one that is left ends that sleep at once.
const EDGES_MAX: usize = 8;
/// How long the end waits for the kernel to let go of buffers; after it they are leaked rather than freed.
const DROP_WAIT: Duration = Duration::from_secs(1);

struct Slot {
    generation: u32,
    tenant: Option<Tenant>,
}

/// Whether a tenant is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// Its receive is being cancelled; then the socket goes to another core.
    Detaching,
    /// Its owner was told or told us; what is left is for the kernel to let go.
    Dying,
}

struct Tenant {
    socket: OwnedFd,
    /// A receive is armed in the kernel.
    receiving: bool,
    /// The reactor wants to hear of more bytes.
    wanted: bool,
    outgoing: Option<Outgoing>,
    leaving: Leaving,
}

impl Tenant {
    /// Whether the kernel holds no operation of this socket.
    fn is_free(&self) -> bool {
        !self.receiving && self.outgoing.is_none()
    }
}

/// A buffer with the kernel, of which it has taken `done` bytes.
struct Outgoing {
    buffer: Vec<u8>,
    done: usize,
}

/// See the module.
pub struct RingNet {
    // Dropped in this order: the ring first, then what it points into.
    ring: Option<IoUring>,
    buffers: Option<Buffers>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Tenants that are not dying.
    seated: usize,
    listener: Option<OwnedFd>,
    accepting: bool,
    accept_again_us: Option<u64>,
    admission: Arc<Admission>,
    refusal: Vec<u8>,
    watched: Vec<OwnedFd>,
    /// The log write that is with the kernel.
    file_write: Option<FileWrite>,
    /// Rung by the kernel when there is something to enter for. Never read: every ring is a new edge.
    bell: OwnedFd,
    /// The bell and everything watched, edge-triggered; for a sleep that is not in this ring. The bell alone is not
    /// enough: the kernel does not ring it reliably from within the write to another eventfd, as a watched one is.
    sleep_set: OwnedFd,
    /// Connections whose client has ended its stream. Told one poll later: what the bytes before the end caused to be
    /// sent goes out first.
    ended: Vec<ConnId>,
    /// Connections whose receive has to be armed again.
    rearm: Vec<ConnId>,
    reaped: Vec<Completion>,
    /// Entries that found no room, because the kernel took none at that moment: before any newer one. At most one of
    /// each kind a connection, as in the ring.
    left_over: VecDeque<squeue::Entry>,
    /// Entries to treat so.
    #[cfg(test)]
    refusals: usize,
    counters: NetCounters,
    logged_us: u64,
}

/// How much a ring holds. Tests make tiny ones, to see its limits.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    submissions: u32,
    completions: u32,
    buffers: u16,
}

/// Whether this kernel can make such a ring.
///
/// Errors: the kernel's, as from [`RingNet::new`].
pub fn is_supported() -> io::Result<()> {
    let ring = make_ring(8, 16)?;
    let buffers = Buffers::register(&ring.submitter(), 8)?;
    drop(ring);
    drop(buffers);
    Ok(())
}

impl RingNet {
    /// Must be called on the thread that will use it.
    ///
    /// Errors: the kernel's; `EINVAL` where it lacks the set-up flags (before 6.1) or buffer rings.
    pub fn new(options: NetOptions) -> io::Result<Self> {
        let sizes = Sizes { submissions: SUBMISSIONS_MAX, completions: COMPLETIONS_MAX, buffers: buffers::BUFFERS };
        Self::with_sizes(options, sizes)
    }

    fn with_sizes(options: NetOptions, sizes: Sizes) -> io::Result<Self> {
        let ring = make_ring(sizes.submissions, sizes.completions)?;
        let buffers = Buffers::register(&ring.submitter(), sizes.buffers)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let sleep_set = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&sleep_set, &bell, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        let mut net = Self {
            ring: Some(ring),
            buffers: Some(buffers),
            slots: Vec::new(),
            free: Vec::new(),
            seated: 0,
            listener: Some(options.listener),
            accepting: false,
            accept_again_us: None,
            admission: options.admission,
            refusal: options.refusal,
            watched: Vec::new(),
            file_write: None,
            bell,
            sleep_set,
            ended: Vec::new(),
            rearm: Vec::new(),
            reaped: Vec::with_capacity(COMPLETIONS_PER_TURN_MAX),
            left_over: VecDeque::new(),
            #[cfg(test)]
            refusals: 0,
            counters: NetCounters::default(),
            logged_us: 0,
        };
        net.arm_accept();
        net.enter(false);
        Ok(net)
    }

    fn live(&mut self, conn: ConnId) -> Option<&mut Tenant> {
        self.tenant(conn).filter(|tenant| tenant.leaving != Leaving::Dying)
    }

    fn tenant(&mut self, conn: ConnId) -> Option<&mut Tenant> {
        let slot = self.slots.get_mut(conn.slot as usize)?;
        if slot.generation == conn.generation { slot.tenant.as_mut() } else { None }
    }

    /// Queues an entry; calls the kernel first when the queue is full. One that the kernel leaves no room for waits.
    ///
    /// Only called with entries whose pointers stay valid until their completion: sends point into the `Outgoing` of a
    /// tenant and a file write into `file_write`, both on the heap and neither dropped nor touched before; no other
    /// operation carries a pointer.
    fn queue(&mut self, entry: &squeue::Entry) {
        if self.left_over.is_empty() {
            if self.push(entry) {
                return;
            }
            self.enter(false);
            if self.push(entry) {
                return;
            }
            tracing::warn!("the submission queue stays full: what is left waits for the next call");
        }
        self.left_over.push_back(entry.clone());
    }

    /// Only called by `queue`, and for what it has left over.
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        #[cfg(test)]
        if self.refusals > 0 {
            self.refusals -= 1;
            return false;
        }
        let Some(ring) = &mut self.ring else { return true };
        // SAFETY: see `queue`; the descriptors are open until the operation ends, because a tenant keeps its socket while
        // `is_free` is false, a file write its file, and listener and watched descriptors live as long as the ring.
        unsafe { ring.submission().push(entry) }.is_ok()
    }

    /// Queues what found no room before.
    fn push_left_over(&mut self) {
        while let Some(entry) = self.left_over.pop_front() {
            if !self.push(&entry) {
                self.left_over.push_front(entry);
                return;
            }
        }
    }

    /// Submits what is queued and lets the kernel post completions; with `only_if_needed` only when there is a reason.
    fn enter(&mut self, only_if_needed: bool) {
        let Some(ring) = &mut self.ring else { return };
        let queue = ring.submission();
        let (queued, pending) = (queue.len(), queue.taskrun() || queue.cq_overflow());
        drop(queue);
        if only_if_needed && queued == 0 && !pending {
            return;
        }
        // SAFETY: no argument is passed, and the queue's entries are valid by the contract of `queue`.
        let entered = unsafe { ring.submitter().enter::<()>(queued as u32, 0, IORING_ENTER_GETEVENTS, None) };
        if let Err(error) = entered {
            report_enter(&error);
        }
    }

    fn arm_accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let conn = ConnId { slot: 0, generation: 0 };
        let entry = opcode::AcceptMulti::new(Fd(listener.as_raw_fd())).flags(flags).build();
        self.accepting = true;
        self.queue(&entry.user_data(user_data(Op::Accept, conn)));
    }

    fn arm_receive(&mut self, conn: ConnId) {
        let Some(tenant) = self.tenant(conn) else { return };
        if tenant.receiving || !tenant.wanted || tenant.leaving != Leaving::No {
            return;
        }
        tenant.receiving = true;
        let socket = Fd(tenant.socket.as_raw_fd());
        let entry = opcode::RecvMulti::new(socket, buffers::GROUP).build();
        self.queue(&entry.user_data(user_data(Op::Receive, conn)));
    }

    fn cancel_receive(&mut self, conn: ConnId) {
        let entry = opcode::AsyncCancel::new(user_data(Op::Receive, conn)).build();
        self.queue(&entry.user_data(user_data(Op::Cancel, conn)));
    }

    fn queue_send(&mut self, conn: ConnId) {
        let Some(tenant) = self.tenant(conn) else { return };
        let Some(rest) = tenant.outgoing.as_ref().and_then(|out| out.buffer.get(out.done..)) else { return };
        let (socket, start, length) = (Fd(tenant.socket.as_raw_fd()), rest.as_ptr(), rest.len() as u32);
        let entry = opcode::Send::new(socket, start, length).flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL).build();
        self.queue(&entry.user_data(user_data(Op::Send, conn)));
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
        place.generation = if place.generation >= GENERATION_MAX { 1 } else { place.generation + 1 };
        ConnId { slot, generation: place.generation }
    }

    /// Gives a socket a slot and arms its receive.
    fn seat(&mut self, socket: OwnedFd) -> ConnId {
        let conn = self.take_slot();
        if let Some(place) = self.slots.get_mut(conn.slot as usize) {
            let leaving = Leaving::No;
            place.tenant = Some(Tenant { socket, receiving: false, wanted: true, outgoing: None, leaving });
        }
        self.seated += 1;
        self.arm_receive(conn);
        conn
    }

    /// Empties the slot of a tenant that is dying, once the kernel has let go.
    fn bury(&mut self, conn: ConnId) {
        let done = self.tenant(conn).is_some_and(|tenant| tenant.leaving == Leaving::Dying && tenant.is_free());
        if done && let Some(slot) = self.slots.get_mut(conn.slot as usize) {
            slot.tenant = None;
            self.free.push(conn.slot);
        }
    }

    /// Ends a socket. Both ways are shut, so the kernel completes what it holds.
    fn kill(&mut self, conn: ConnId) -> bool {
        let Some(tenant) = self.live(conn) else { return false };
        tenant.leaving = Leaving::Dying;
        tenant.wanted = false;
        if !tenant.is_free() {
            // Fails only when the client is gone already, which completes everything as well.
            let _ = rustix::net::shutdown(&tenant.socket, Shutdown::Both);
        }
        self.seated -= 1;
        self.admission.leave();
        self.bury(conn);
        true
    }

    fn lose(&mut self, conn: ConnId, cause: CloseCause, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if self.kill(conn) {
            let _ = sink(NetEvent::Closed { conn, cause });
        }
    }

    fn on_accept(&mut self, (result, flags): (i32, u32), now_us: u64, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        self.accepting &= cqueue::more(flags);
        if result >= 0 {
            // SAFETY: a successful accept gives a fresh descriptor that nobody else owns.
            let socket = unsafe { OwnedFd::from_raw_fd(result) };
            self.welcome(socket, sink);
        } else if let Some(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) = errno(result) {
            self.counters.accept_pauses += 1;
            self.accept_again_us = Some(now_us + ACCEPT_PAUSE_US);
            if now_us.saturating_sub(self.logged_us) >= LOG_INTERVAL_US {
                self.logged_us = now_us;
                tracing::warn!(%errno, "cannot accept: raise the limit of open files (ulimit -n) or lower limits.connections_max");
            }
        }
        if !self.accepting && self.accept_again_us.is_none() {
            self.arm_accept();
        }
    }

    fn welcome(&mut self, socket: OwnedFd, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if self.listener.is_none() {
            return;
        }
        if !self.admission.enter() {
            self.counters.refused += 1;
            // A fresh socket has room for one small frame; whoever is gone already does not miss it.
            let _ = rustix::net::send(&socket, &self.refusal, SendFlags::NOSIGNAL);
            return;
        }
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let conn = self.seat(socket);
        self.counters.accepted += 1;
        let _ = sink(NetEvent::Accepted { conn });
    }

    fn on_receive(&mut self, conn: ConnId, (result, flags): (i32, u32), sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if let Some(tenant) = self.tenant(conn) {
            tenant.receiving &= cqueue::more(flags);
        }
        let ended = !cqueue::more(flags);
        let mut lost = None;
        if let Some(id) = cqueue::buffer_select(flags) {
            self.received(conn, id, (usize::try_from(result).unwrap_or(0), sink));
        }
        match errno(result) {
            None if result == 0 => {
                self.ended.push(conn);
                return self.bury(conn);
            }
            // Out of buffers, or interrupted: armed again below.
            None | Some(Errno::NOBUFS | Errno::INTR | Errno::AGAIN | Errno::CANCELED) => {}
            Some(error) => lost = Some(CloseCause::Error(error.kind())),
        }
        if let Some(cause) = lost {
            self.lose(conn, cause, sink);
        } else if ended {
            self.receive_ended(conn, sink);
        }
        self.bury(conn);
    }

    /// Lends one buffer to the reactor and gives it back to the kernel.
    fn received(&mut self, conn: ConnId, id: u16, (length, sink): (usize, &mut dyn FnMut(NetEvent<'_>) -> Flow)) {
        let wanted = self.live(conn).is_some();
        let Some(buffers) = &mut self.buffers else { return };
        let told_once = buffers.taken(id);
        debug_assert!(told_once, "the kernel gave buffer {id} twice");
        let mut flow = Flow::Continue;
        if wanted && let Some(bytes) = buffers.received(id, length).filter(|bytes| !bytes.is_empty()) {
            self.counters.bytes_received += bytes.len() as u64;
            flow = sink(NetEvent::Received { conn, bytes });
        }
        buffers.give_back(id);
        if flow == Flow::Stop
            && let Some(tenant) = self.live(conn)
            && std::mem::replace(&mut tenant.wanted, false)
            && tenant.receiving
        {
            self.cancel_receive(conn);
        }
    }

    /// A client ended its stream: the connection is lost, or goes to the other core to be lost there.
    fn stream_ended(&mut self, conn: ConnId, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if self.tenant(conn).is_some_and(|tenant| tenant.leaving == Leaving::Detaching) {
            self.receive_ended(conn, sink);
        } else {
            self.lose(conn, CloseCause::Peer, sink);
        }
    }

    /// An armed receive is over: the socket moves on, or is armed again.
    fn receive_ended(&mut self, conn: ConnId, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        let Some(tenant) = self.tenant(conn) else { return };
        match tenant.leaving {
            Leaving::No if tenant.wanted => self.rearm.push(conn),
            Leaving::No | Leaving::Dying => {}
            Leaving::Detaching => {
                if let Some(socket) = self.take_socket(conn) {
                    let _ = sink(NetEvent::Detached { conn, socket });
                }
            }
        }
    }

    fn take_socket(&mut self, conn: ConnId) -> Option<OwnedFd> {
        let slot = self.slots.get_mut(conn.slot as usize)?;
        debug_assert!(slot.tenant.as_ref().is_none_or(Tenant::is_free), "detached with operations in flight");
        let tenant = slot.tenant.take()?;
        self.free.push(conn.slot);
        self.seated -= 1;
        Some(tenant.socket)
    }

    fn on_sent(&mut self, conn: ConnId, result: i32, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        let Some(tenant) = self.tenant(conn) else { return };
        let dying = tenant.leaving == Leaving::Dying;
        let Some(outgoing) = &mut tenant.outgoing else { return };
        let again = matches!(errno(result), Some(Errno::INTR | Errno::AGAIN));
        let bytes = usize::try_from(result).unwrap_or(0);
        outgoing.done += bytes;
        let left = outgoing.done < outgoing.buffer.len();
        if !dying && left && (bytes > 0 || again) {
            self.counters.bytes_sent += bytes as u64;
            let _ = sink(NetEvent::Sent { conn, bytes, buffer: None });
            return self.queue_send(conn);
        }
        let buffer = tenant.outgoing.take().map(|outgoing| outgoing.buffer);
        if dying {
            return self.bury(conn);
        }
        if left {
            let kind = errno(result).map_or(io::ErrorKind::WriteZero, Errno::kind);
            return self.lose(conn, CloseCause::Error(kind), sink);
        }
        self.counters.bytes_sent += bytes as u64;
        let _ = sink(NetEvent::Sent { conn, bytes, buffer });
    }

    fn on_file_written(&mut self, result: i32, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        if let Some(write) = self.file_write.take() {
            let _ = sink(NetEvent::FileWritten { write, result });
        }
    }

    fn arm_watch(&mut self, at: usize) {
        let Some(fd) = self.watched.get(at) else { return };
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        self.queue(&entry.user_data((Op::Watch as u64) << 56 | at as u64));
    }

    fn reap(&mut self) {
        self.reaped.clear();
        let Some(ring) = &mut self.ring else { return };
        let completions = ring.completion().take(COMPLETIONS_PER_TURN_MAX);
        self.reaped.extend(completions.map(|entry| (entry.user_data(), entry.result(), entry.flags())));
    }

    fn dispatch(&mut self, completion: Completion, now_us: u64, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) {
        let (user_data, result, flags) = completion;
        let conn = conn_of(user_data);
        match Op::of(user_data) {
            Some(Op::Accept) => self.on_accept((result, flags), now_us, sink),
            Some(Op::Receive) => self.on_receive(conn, (result, flags), sink),
            Some(Op::Send) => self.on_sent(conn, result, sink),
            Some(Op::FileWrite) => self.on_file_written(result, sink),
            Some(Op::Watch) if !cqueue::more(flags) => self.arm_watch(conn.slot as usize),
            Some(Op::Watch | Op::Cancel) => {}
            None => debug_assert!(false, "a completion of nothing"),
        }
    }

    fn has_kernel_operations(&self) -> bool {
        let mut tenants = self.slots.iter().filter_map(|slot| slot.tenant.as_ref());
        self.file_write.is_some() || tenants.any(|tenant| !tenant.is_free())
    }
}

impl Net for RingNet {
    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(NetEvent<'_>) -> Flow) -> bool {
        if self.accept_again_us.is_some_and(|at_us| now_us >= at_us) {
            self.accept_again_us = None;
            self.arm_accept();
        }
        let ended = std::mem::take(&mut self.ended);
        self.push_left_over();
        self.enter(true);
        self.reap();
        let reaped = std::mem::take(&mut self.reaped);
        for &completion in &reaped {
            self.dispatch(completion, now_us, sink);
        }
        let mut any = !reaped.is_empty();
        for conn in ended {
            any = true;
            self.stream_ended(conn, sink);
        }
        if let Some(buffers) = &mut self.buffers {
            buffers.publish();
        }
        // Now, with buffers to receive into, and before a sleep: what waits in these sockets wakes nobody otherwise.
        for conn in std::mem::take(&mut self.rearm) {
            self.arm_receive(conn);
        }
        self.reaped = reaped;
        any
    }

    fn send(&mut self, conn: ConnId, buffer: Vec<u8>) -> Sending {
        let Some(tenant) = self.live(conn) else { return Sending::InFlight { bytes: 0 } };
        debug_assert!(tenant.outgoing.is_none(), "one buffer in flight a connection");
        if buffer.is_empty() {
            return Sending::Done(buffer);
        }
        tenant.outgoing = Some(Outgoing { buffer, done: 0 });
        self.queue_send(conn);
        Sending::InFlight { bytes: 0 }
    }

    fn resume(&mut self, conn: ConnId) {
        if let Some(tenant) = self.live(conn).filter(|tenant| tenant.leaving == Leaving::No) {
            tenant.wanted = true;
            // A receive whose cancelling is under way is armed again when that ends.
            self.arm_receive(conn);
        }
    }

    fn reserve(&mut self) -> ConnId {
        self.take_slot()
    }

    fn release(&mut self, conn: ConnId) {
        let kept = self.slots.get(conn.slot as usize).filter(|slot| slot.generation == conn.generation);
        if kept.is_some_and(|slot| slot.tenant.is_none()) {
            self.free.push(conn.slot);
        }
    }

    fn finish(&mut self, conn: ConnId) {
        if let Some(tenant) = self.live(conn) {
            // Fails only when the client is gone, which is told by `Closed`.
            let _ = rustix::net::shutdown(&tenant.socket, Shutdown::Write);
        }
    }

    fn close(&mut self, conn: ConnId) {
        self.kill(conn);
    }

    fn detach(&mut self, conn: ConnId) -> Option<OwnedFd> {
        let tenant = self.live(conn)?;
        debug_assert!(tenant.outgoing.is_none(), "detached with output in flight");
        tenant.leaving = Leaving::Detaching;
        if !tenant.receiving {
            return self.take_socket(conn);
        }
        let already_cancelled = !std::mem::replace(&mut tenant.wanted, false);
        if !already_cancelled {
            self.cancel_receive(conn);
        }
        None
    }

    fn adopt(&mut self, socket: OwnedFd) -> io::Result<ConnId> {
        Ok(self.seat(socket))
    }

    fn writes_files(&self) -> bool {
        true
    }

    fn write_file(&mut self, write: FileWrite) -> Result<(), FileWrite> {
        if self.file_write.is_some() || self.ring.is_none() {
            debug_assert!(false, "one write at a time");
            return Err(write);
        }
        let file = Fd(write.file().as_raw_fd());
        let entry = opcode::Write::new(file, write.rest().as_ptr(), write.rest().len() as u32).offset(write.offset());
        // Asynchronous: some file systems would sync inside the submission, on this thread.
        let entry = entry.rw_flags(libc::RWF_DSYNC).build().flags(squeue::Flags::ASYNC);
        self.file_write = Some(write);
        self.queue(&entry.user_data((Op::FileWrite as u64) << 56));
        Ok(())
    }

    fn is_writing_file(&self) -> bool {
        self.file_write.is_some()
    }

    fn watch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        epoll::add(&self.sleep_set, &fd, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        self.watched.push(fd);
        self.arm_watch(self.watched.len() - 1);
        Ok(())
    }

    fn stop_accepting(&mut self) {
        // Shutting it down ends the armed accept and refuses the clients that wait in its backlog.
        if let Some(listener) = self.listener.take() {
            let _ = rustix::net::shutdown(&listener, Shutdown::Both);
        }
        self.accept_again_us = None;
    }

    fn flush(&mut self) {
        // The call that fetches completions, or the one that sleeps, also submits.
    }

    fn sleep_fd(&self) -> io::Result<OwnedFd> {
        if let Some(ring) = &self.ring {
            ring.submitter().register_eventfd(self.bell.as_raw_fd())?;
        }
        self.sleep_set.try_clone()
    }

    fn prepare_sleep(&mut self) -> bool {
        // The set is level-triggered for the executor: take the edges that were seen, then look once more. What they
        // were about is in the ring as well.
        let mut edges = [MaybeUninit::uninit(); EDGES_MAX];
        let _ = epoll::wait(&self.sleep_set, &mut edges[..], Some(&KernelTimespec::default()));
        self.enter(true);
        let Some(ring) = &mut self.ring else { return true };
        let queue = ring.submission();
        // One call runs only some of what is due, or may be refused; nothing would ring again for the rest.
        let left = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        !left && self.left_over.is_empty() && self.ended.is_empty() && ring.completion().is_empty()
    }

    fn wait(&mut self, timeout: Duration) {
        if !self.ended.is_empty() || !self.left_over.is_empty() {
            return;
        }
        let Some(ring) = &mut self.ring else { return };
        let timeout = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        let arguments = SubmitArgs::new().timespec(&timeout);
        if let Err(error) = ring.submitter().submit_with_args(1, &arguments) {
            report_enter(&error);
        }
    }

    fn next_deadline_us(&self) -> Option<u64> {
        self.accept_again_us
    }

    fn connections(&self) -> usize {
        self.seated
    }

    fn counters(&self) -> NetCounters {
        self.counters
    }
}

impl Drop for RingNet {
    /// Waits until the kernel uses none of our memory; leaks it if that takes too long.
    fn drop(&mut self) {
        let conns: Vec<_> = (self.slots.iter().enumerate())
            .filter(|(_, slot)| slot.tenant.is_some())
            .map(|(at, slot)| ConnId { slot: at as u32, generation: slot.generation })
            .collect();
        for conn in conns {
            self.kill(conn);
        }
        let deadline = std::time::Instant::now() + DROP_WAIT;
        while self.has_kernel_operations() && std::time::Instant::now() < deadline {
            self.wait(Duration::from_millis(10));
            let _ = self.poll(u64::MAX / 2, &mut |_| Flow::Stop);
        }
        let clean = !self.has_kernel_operations();
        drop(self.ring.take());
        if !clean {
            std::mem::forget(self.buffers.take());
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(self.file_write.take());
        }
    }
}

#[cfg(test)]
mod tests;
