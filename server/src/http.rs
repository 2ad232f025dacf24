//! An HTTP endpoint on a thread of its own, which has a small async runtime and no timer while nobody asks: what the admin
//! endpoint and the HTTP twin of ROUTE stand on.
//!
//! Bounded: at most so many clients at once, the next waits to be accepted; and where the endpoint is for strangers, a
//! connection lives only so long, so that who keeps one open and says nothing keeps nobody out for longer.

use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, thread};

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Sleep;

/// How many clients, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Clients served at once.
    pub clients_max: usize,
    /// The longest a connection stays; `None`: as long as it likes.
    pub life: Option<Duration>,
}

/// A running endpoint.
#[derive(Debug)]
pub struct Endpoint {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Endpoint {
    /// Closes it, with whatever is being answered.
    pub fn stop(self) {
        // Gone already only if its thread panicked, which the join ignores too: the node is ending anyway.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

/// Takes the address. Errors: those of the socket.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Starts the thread, under that name. Errors: the runtime or the thread could not be made.
pub fn start(name: &str, listener: TcpListener, router: Router, bounds: Bounds) -> io::Result<Endpoint> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    let places = Arc::new(Semaphore::new(bounds.clients_max));
    let bounded = Bounded { listener, places, life: bounds.life };
    let (stop, stopped) = oneshot::channel();
    let run = move || {
        runtime.block_on(async move {
            // It never ends by itself; what is left of it goes with the runtime.
            tokio::spawn(axum::serve(bounded, router).into_future());
            let _ = stopped.await;
        });
    };
    let thread = thread::Builder::new().name(name.into()).spawn(run)?;
    Ok(Endpoint { stop, thread })
}

/// A listener that accepts only as many as may be served at once.
struct Bounded {
    listener: tokio::net::TcpListener,
    places: Arc<Semaphore>,
    life: Option<Duration>,
}

impl axum::serve::Listener for Bounded {
    type Io = Placed;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Placed, SocketAddr) {
        // The semaphore is never closed; were it, the bound would be the backlog's.
        let place = self.places.clone().acquire_owned().await.ok();
        // Tells of errors and waits where it must (no descriptors).
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let end = self.life.map(|life| Box::pin(tokio::time::sleep(life)));
        (Placed { stream, end, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A client and its place, given back when it goes.
struct Placed {
    stream: TcpStream,
    end: Option<Pin<Box<Sleep>>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Placed {
    /// Errors: its time is over. Else it is looked at again when that is so.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().map(|end| end.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => Err(io::ErrorKind::TimedOut.into()),
            Some(Poll::Pending) | None => Ok(()),
        }
    }
}

impl AsyncRead for Placed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use axum::routing::get;

    use super::*;

    fn endpoint(bounds: Bounds) -> (SocketAddr, Endpoint) {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "here\n" }));
        (address, start("test", listener, router, bounds).unwrap())
    }

    fn ask(address: SocketAddr) -> String {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn who_says_nothing_goes_when_the_time_is_over_and_keeps_nobody_out() {
        let (address, endpoint) = endpoint(Bounds { clients_max: 1, life: Some(Duration::from_millis(50)) });
        let mut silent = std::net::TcpStream::connect(address).unwrap();
        let mut slow = std::net::TcpStream::connect(address).unwrap();
        slow.write_all(b"GET / HT").unwrap();
        assert!(ask(address).ends_with("here\n"), "its turn comes");
        for stream in [&mut silent, &mut slow] {
            let mut rest = Vec::new();
            assert!(stream.read_to_end(&mut rest).is_err() || rest.is_empty() || !rest.ends_with(b"here\n"));
        }
        endpoint.stop();
        assert!(std::net::TcpStream::connect(address).is_err());
    }
}
