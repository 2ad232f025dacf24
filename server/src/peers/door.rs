//! The peer port: one thread that accepts, and gives the cores their turns. Nothing is read here.
//!
//! A thread of its own, because the listeners of the net seam are for clients and hand out protocol, limits and refusals of
//! clients; connections between nodes are few, and it sleeps in `accept` until one comes. Which core a connection is for
//! is known only when its hello has been read: the core that reads it passes it on.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::wake::Waker;

/// Connections that a core has not looked at yet; over it new ones are closed.
const WAITING_MAX: usize = 64;
const BACKLOG: i32 = 256;
/// How long accepting pauses when the system has no descriptor or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// The thread; stops when it is dropped.
#[derive(Debug)]
pub struct Door {
    address: SocketAddr,
    listener: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What a core gets from it.
#[derive(Debug)]
pub struct Arrivals {
    queue: Receiver<OwnedFd>,
    turned_away: Arc<AtomicU64>,
}

impl Arrivals {
    pub fn next(&self) -> Option<OwnedFd> {
        self.queue.try_recv().ok()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Connections closed at once because as many wait for this core as may.
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }
}

/// The door's side of it.
struct Core {
    queue: Sender<OwnedFd>,
    turned_away: Arc<AtomicU64>,
    waker: Arc<Waker>,
}

/// Binds the peer port. Errors: the kernel's.
pub fn bind(address: SocketAddr) -> io::Result<(SocketAddr, OwnedFd)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A node that starts again finds connections of its former process in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    let address = socket.local_addr()?.as_socket().unwrap_or(address);
    Ok((address, socket.into()))
}

/// Starts accepting, for the cores of these wakers, in turn. Errors: no thread.
pub fn open((address, listener): (SocketAddr, OwnedFd), wakers: &[Arc<Waker>]) -> io::Result<(Door, Vec<Arrivals>)> {
    let line = |waker: &Arc<Waker>| {
        let (sender, queue) = bounded(WAITING_MAX);
        let turned_away = Arc::new(AtomicU64::new(0));
        let core = Core { queue: sender, turned_away: turned_away.clone(), waker: waker.clone() };
        (core, Arrivals { queue, turned_away })
    };
    let (cores, arrivals): (Vec<Core>, Vec<Arrivals>) = wakers.iter().map(line).unzip();
    let listener = Arc::new(listener);
    let accepting = listener.clone();
    let run = move || accept_all(&accepting, &cores);
    let thread = std::thread::Builder::new().name("peer-port".into()).spawn(run)?;
    Ok((Door { address, listener, thread: Some(thread) }, arrivals))
}

impl Door {
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Ends the `accept` that the thread sleeps in.
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept_all(listener: &OwnedFd, cores: &[Core]) {
    let mut turn = cores.iter().cycle();
    loop {
        match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => {
                let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
                let Some(core) = turn.next() else { return };
                // A core that is this far behind gets no more: the socket is closed, and the peer tries again.
                match core.queue.try_send(socket) {
                    Ok(()) => core.waker.wake(),
                    Err(_) => {
                        core.turned_away.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => std::thread::sleep(PAUSE),
            // Shut down: the node stops.
            Err(Errno::INVAL | Errno::BADF) => return,
            // The peer gave up while it waited, or the network told of an error of its own.
            Err(_) => {}
        }
    }
}
