//! The floor of any server on this machine: a TCP echo on one bare io_uring, with the flags our server uses.
//!
//! One thread, which is the ring's only issuer: multishot accept and receive, buffers that the kernel picks from a
//! shared ring, at most one send a connection and turn. What is received is copied once into the connection's output,
//! as every server has to do that sends something else than it received.
//!
//! Invariants: a slot is not given to another connection while an operation on its socket is with the kernel; bytes
//! being sent are not touched until their completion; the process ends without dropping ring or buffers.

#![allow(unsafe_code, reason = "the one place for it in this package: each block has its proof")]

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, Fd};
use io_uring::{IoUring, Submitter, cqueue, opcode, squeue};

/// As in the server: entries a turn can queue, completions the kernel can post.
const SUBMISSIONS_MAX: u32 = 4_096;
const COMPLETIONS_MAX: u32 = 16_384;
/// As in the server: bytes of a receive buffer, and how many there are (a power of two).
const BUFFER_BYTES: usize = 2_048;
const BUFFERS: u16 = 4_096;
const GROUP: u16 = 0;
const PAGE_BYTES: usize = 4_096;
/// A connection that does not read until so much waits for it is closed.
const WAITING_BYTES_MAX: usize = 1 << 20;

const ACCEPT: u64 = 1 << 56;
const RECEIVE: u64 = 2 << 56;
const SEND: u64 = 3 << 56;
const SLOT_MASK: u64 = u32::MAX as u64;

const _: () = assert!(BUFFERS.is_power_of_two());

/// The receive buffers. Never freed: they live as long as the process.
struct Buffers {
    entries: NonNull<BufRingEntry>,
    data: NonNull<u8>,
    /// Our copy of the shared tail.
    tail: u16,
}

impl Buffers {
    fn register(submitter: &Submitter<'_>) -> io::Result<Self> {
        let entries = allocate(usize::from(BUFFERS) * size_of::<BufRingEntry>())?.cast();
        let data = allocate(usize::from(BUFFERS) * BUFFER_BYTES)?;
        let mut buffers = Self { entries, data, tail: 0 };
        // SAFETY: the entries are page-aligned, zeroed, hold `BUFFERS` places and are never freed.
        unsafe { submitter.register_buf_ring_with_flags(entries.as_ptr() as u64, BUFFERS, GROUP, 0)? };
        (0..BUFFERS).for_each(|id| buffers.give_back(id));
        buffers.publish();
        Ok(buffers)
    }

    /// The first `length` bytes of a buffer that a completion has just given us; empty for what no kernel gives.
    fn received(&self, id: u16, length: usize) -> &[u8] {
        if id >= BUFFERS || length > BUFFER_BYTES {
            return &[];
        }
        // SAFETY: inside the allocation, which is initialised. The buffer is ours until `give_back`, which needs
        // `&mut self` and so cannot be called while the slice lives.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().add(usize::from(id) * BUFFER_BYTES), length) }
    }

    /// Called once for each buffer that a completion gave, and once for each at the start.
    fn give_back(&mut self, id: u16) {
        if id >= BUFFERS {
            return;
        }
        let place = usize::from(self.tail & (BUFFERS - 1));
        // SAFETY: the place lies inside the entries, the address inside the data; the kernel does not read the entry
        // before the tail passes it. Field by field, because the tail lies in the reserved field of place 0.
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(place);
            entry.set_addr(self.data.as_ptr().add(usize::from(id) * BUFFER_BYTES) as u64);
            entry.set_len(BUFFER_BYTES as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// Lets the kernel see what was given back.
    fn publish(&mut self) {
        // SAFETY: the pointer is the first entry of the registered ring, whose tail is an aligned 16-bit word that only
        // this thread writes and the kernel reads, with release order as it expects.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr()).cast_mut().cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }
}

fn allocate(bytes: usize) -> io::Result<NonNull<u8>> {
    let layout = Layout::from_size_align(bytes, PAGE_BYTES).map_err(io::Error::other)?;
    // SAFETY: both callers ask for a constant size above zero.
    let memory = unsafe { alloc_zeroed(layout) };
    Ok(NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout)))
}

struct Conn {
    socket: OwnedFd,
    /// Received and not yet with the kernel.
    waiting: Vec<u8>,
    /// With the kernel while `in_flight`, which has taken `done` bytes of it.
    sending: Vec<u8>,
    done: usize,
    in_flight: bool,
    receiving: bool,
    /// Listed in `dirty`.
    dirty: bool,
    closing: bool,
}

struct Echo {
    ring: IoUring,
    buffers: Buffers,
    listener: TcpListener,
    conns: Vec<Option<Conn>>,
    free: Vec<u32>,
    dirty: Vec<u32>,
    reaped: Vec<(u64, i32, u32)>,
}

/// Echoes on this thread for ever.
///
/// Errors: the kernel's; `EINVAL` where it lacks the set-up flags (before 6.1) or buffer rings.
pub fn serve(listener: TcpListener) -> io::Result<Infallible> {
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_cqsize(COMPLETIONS_MAX)
        .build(SUBMISSIONS_MAX)?;
    let buffers = Buffers::register(&ring.submitter())?;
    let (conns, free, dirty, reaped) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // Never dropped: an error ends the process, and the kernel takes back ring and memory together.
    let mut echo = std::mem::ManuallyDrop::new(Echo { ring, buffers, listener, conns, free, dirty, reaped });
    echo.arm_accept()?;
    loop {
        echo.turn()?;
    }
}

impl Echo {
    fn turn(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(error) => return Err(error),
        }
        let mut reaped = std::mem::take(&mut self.reaped);
        reaped.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result(), entry.flags())));
        for (user_data, result, flags) in reaped.drain(..) {
            let slot = (user_data & SLOT_MASK) as u32;
            match user_data & !SLOT_MASK {
                ACCEPT => self.on_accept(result, flags)?,
                RECEIVE => self.on_receive(slot, result, flags)?,
                SEND => self.on_sent(slot, result)?,
                other => return Err(io::Error::other(format!("a completion of nothing: {other:#x}"))),
            }
        }
        self.reaped = reaped;
        self.buffers.publish();
        let mut dirty = std::mem::take(&mut self.dirty);
        for slot in dirty.drain(..) {
            self.flush(slot)?;
        }
        self.dirty = dirty;
        Ok(())
    }

    /// Queues an entry; calls the kernel first when the queue is full.
    ///
    /// Only called with entries whose pointers stay valid until their completion: sends point into `Conn::sending`,
    /// which is neither moved nor touched while `in_flight`, and no other entry carries a pointer.
    fn queue(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            // SAFETY: see above; a connection keeps its socket while an operation is with the kernel, and the listener
            // lives as long as the ring.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
        Err(io::Error::other("the submission queue stays full"))
    }

    fn conn(&mut self, slot: u32) -> Option<&mut Conn> {
        self.conns.get_mut(slot as usize)?.as_mut()
    }

    fn arm_accept(&mut self) -> io::Result<()> {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let entry = opcode::AcceptMulti::new(Fd(self.listener.as_raw_fd())).flags(flags).build();
        self.queue(&entry.user_data(ACCEPT))
    }

    fn on_accept(&mut self, result: i32, flags: u32) -> io::Result<()> {
        if result >= 0 {
            // SAFETY: a successful accept gives a fresh descriptor that nobody else owns.
            let socket = unsafe { OwnedFd::from_raw_fd(result) };
            // Fails only when the client is gone already, which its receive will tell.
            let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
            let conn = Conn {
                socket,
                waiting: Vec::new(),
                sending: Vec::new(),
                done: 0,
                in_flight: false,
                receiving: false,
                dirty: false,
                closing: false,
            };
            let slot = self.free.pop().unwrap_or(self.conns.len() as u32);
            match self.conns.get_mut(slot as usize) {
                Some(place) => *place = Some(conn),
                None => self.conns.push(Some(conn)),
            }
            self.arm_receive(slot)?;
        } else if matches!(-result, libc::EMFILE | libc::ENFILE) {
            return Err(io::Error::from_raw_os_error(-result));
        }
        if cqueue::more(flags) { Ok(()) } else { self.arm_accept() }
    }

    fn arm_receive(&mut self, slot: u32) -> io::Result<()> {
        let Some(conn) = self.conn(slot) else { return Ok(()) };
        conn.receiving = true;
        let entry = opcode::RecvMulti::new(Fd(conn.socket.as_raw_fd()), GROUP).build();
        self.queue(&entry.user_data(RECEIVE | u64::from(slot)))
    }

    fn on_receive(&mut self, slot: u32, result: i32, flags: u32) -> io::Result<()> {
        let Some(conn) = self.conns.get_mut(slot as usize).and_then(Option::as_mut) else { return Ok(()) };
        conn.receiving = cqueue::more(flags);
        if let Some(id) = cqueue::buffer_select(flags) {
            conn.waiting.extend_from_slice(self.buffers.received(id, usize::try_from(result).unwrap_or(0)));
            self.buffers.give_back(id);
            if !conn.dirty {
                conn.dirty = true;
                self.dirty.push(slot);
            }
        }
        let again = matches!(-result, libc::ENOBUFS | libc::EINTR | libc::EAGAIN);
        if result == 0 || (result < 0 && !again) || conn.waiting.len() > WAITING_BYTES_MAX {
            self.close(slot);
        } else if !conn.receiving && !conn.closing {
            // Out of buffers: what this turn gives back has to be seen first.
            self.buffers.publish();
            return self.arm_receive(slot);
        }
        self.bury(slot);
        Ok(())
    }

    /// At the end of a turn: one send of all that waits, unless one is on its way.
    fn flush(&mut self, slot: u32) -> io::Result<()> {
        let Some(conn) = self.conn(slot) else { return Ok(()) };
        conn.dirty = false;
        if conn.in_flight || conn.closing || conn.waiting.is_empty() {
            return Ok(());
        }
        conn.sending.clear();
        std::mem::swap(&mut conn.sending, &mut conn.waiting);
        conn.done = 0;
        self.queue_send(slot)
    }

    fn queue_send(&mut self, slot: u32) -> io::Result<()> {
        let Some(conn) = self.conn(slot) else { return Ok(()) };
        let rest = conn.sending.get(conn.done..).unwrap_or_default();
        let (socket, start, length) = (Fd(conn.socket.as_raw_fd()), rest.as_ptr(), rest.len() as u32);
        conn.in_flight = true;
        let entry = opcode::Send::new(socket, start, length).flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL).build();
        self.queue(&entry.user_data(SEND | u64::from(slot)))
    }

    fn on_sent(&mut self, slot: u32, result: i32) -> io::Result<()> {
        let Some(conn) = self.conn(slot) else { return Ok(()) };
        conn.in_flight = false;
        let again = matches!(-result, libc::EINTR | libc::EAGAIN);
        match usize::try_from(result) {
            Ok(bytes) => conn.done += bytes,
            Err(_) if again => {}
            Err(_) => self.close(slot),
        }
        let Some(conn) = self.conn(slot) else { return Ok(()) };
        if !conn.closing && conn.done < conn.sending.len() {
            return self.queue_send(slot);
        }
        if !conn.closing && !conn.waiting.is_empty() && !conn.dirty {
            conn.dirty = true;
            self.dirty.push(slot);
        }
        self.bury(slot);
        Ok(())
    }

    /// Shuts both ways, so that the kernel completes what it holds.
    fn close(&mut self, slot: u32) {
        if let Some(conn) = self.conn(slot)
            && !std::mem::replace(&mut conn.closing, true)
        {
            let _ = rustix::net::shutdown(&conn.socket, rustix::net::Shutdown::Both);
        }
    }

    /// Empties the slot of a closing connection, once the kernel has let go and no list names it.
    fn bury(&mut self, slot: u32) {
        if self.conn(slot).is_some_and(|conn| conn.closing && !conn.receiving && !conn.in_flight)
            && let Some(place) = self.conns.get_mut(slot as usize)
        {
            *place = None;
            self.free.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpStream};

    #[test]
    fn what_is_sent_comes_back_whole_and_slots_are_used_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(listener).map(|_| ()));
        for round in 0..3_u8 {
            let mut clients: Vec<_> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
            for (at, client) in clients.iter_mut().enumerate() {
                let sent = vec![round * 8 + at as u8; 100_000];
                client.write_all(&sent).unwrap();
                let mut back = vec![0; sent.len()];
                client.read_exact(&mut back).unwrap();
                assert_eq!(back, sent);
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
            }
        }
    }
}
