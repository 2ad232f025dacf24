//! The wire protocols that `compare` drives, behind one trait. Pure: bytes in, bytes and events out.
//!
//! Each connection owns one [`Session`]. Invariant: whatever way the server's bytes are cut up, a session yields the
//! same events; what it keeps of an unfinished unit is bounded.

pub mod echo;
pub mod mqtt;
pub mod nats;
pub mod resp;
pub mod ringline;
pub mod xmpp;

/// The longest unfinished unit of a server that is kept; a longer one fails the connection.
pub const UNIT_BYTES_MAX: usize = 1 << 20;

/// What a server has said.
#[derive(Debug, PartialEq, Eq)]
pub enum WireEvent<'a> {
    /// The server has answered one send of this connection.
    Accepted,
    /// A message for this connection.
    Delivered(&'a [u8]),
    /// The server has refused something, or says what no server of this protocol says.
    Failed(String),
}

/// What a unit may write and tell.
pub struct Sink<'a> {
    /// To the server.
    pub out: &'a mut Vec<u8>,
    pub events: &'a mut dyn FnMut(WireEvent<'_>),
}

impl Sink<'_> {
    pub fn tell(&mut self, event: WireEvent<'_>) {
        (self.events)(event);
    }
}

/// One connection's side of a protocol.
pub trait Wire {
    /// What the client says first; nothing where the server speaks first.
    fn hello(&mut self, out: &mut Vec<u8>);

    /// Whether sends may begin: logged in, and subscribed to its own name.
    fn ready(&self) -> bool;

    /// Appends one message to the partner.
    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>);

    /// Takes one unit (line, packet, frame, stanza) off the front of what the server sent and returns its length in
    /// bytes; 0: it is not whole yet.
    ///
    /// Errors: bytes that are not of this protocol; the connection is of no more use.
    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String>;
}

/// Who a connection is and to whom it sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    pub own: String,
    pub partner: String,
}

impl Names {
    /// Client `index` of a pair chat: 0 with 1, 2 with 3, and so on.
    pub fn of_pair(index: u32) -> Self {
        Self { own: name(index), partner: name(index ^ 1) }
    }
}

/// The user, channel, subject, topic or JID local part of a client.
pub fn name(index: u32) -> String {
    format!("bench-{index:06}")
}

/// A wire and the beginning of a unit that has not come whole yet.
pub struct Session {
    wire: Box<dyn Wire>,
    tail: Vec<u8>,
}

impl Session {
    pub fn new(wire: Box<dyn Wire>) -> Self {
        Self { wire, tail: Vec::new() }
    }

    pub fn hello(&mut self, out: &mut Vec<u8>) {
        self.wire.hello(out);
    }

    pub fn ready(&self) -> bool {
        self.wire.ready()
    }

    pub fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        self.wire.send(payload, out);
    }

    /// Takes what the server sent, cut anywhere.
    ///
    /// Errors: as [`Wire::unit`], and a unit longer than [`UNIT_BYTES_MAX`]; do not call again after one.
    pub fn receive(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<(), String> {
        if self.tail.is_empty() {
            let used = self.take_whole(bytes, sink)?;
            self.tail.extend_from_slice(bytes.get(used..).unwrap_or_default());
        } else {
            let mut tail = std::mem::take(&mut self.tail);
            tail.extend_from_slice(bytes);
            let used = self.take_whole(&tail, sink)?;
            tail.drain(..used);
            self.tail = tail;
        }
        if self.tail.len() > UNIT_BYTES_MAX {
            return Err(format!("a unit of more than {UNIT_BYTES_MAX} bytes"));
        }
        Ok(())
    }

    fn take_whole(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let mut used = 0;
        loop {
            let rest = bytes.get(used..).unwrap_or_default();
            match self.wire.unit(rest, sink)? {
                0 => return Ok(used),
                length => used += length.min(rest.len()),
            }
            if used >= bytes.len() {
                return Ok(used);
            }
        }
    }
}

/// The first line without its CR LF, and the length with it. `None`: not whole yet.
fn line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    Some((bytes.get(..end)?, end + 2))
}

/// A decimal number that is all of `text`.
fn number(text: &[u8]) -> Option<usize> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
pub mod script {
    //! Runs a recorded conversation through a wire, cut at every place.

    use super::{Session, Sink, Wire, WireEvent};

    /// What a wire made of a stream.
    #[derive(Debug, PartialEq, Eq)]
    pub struct Heard {
        pub events: Vec<String>,
        pub out: Vec<u8>,
        pub ready: bool,
        pub error: Option<String>,
    }

    fn text(event: &WireEvent<'_>) -> String {
        match event {
            WireEvent::Accepted => "accepted".to_owned(),
            WireEvent::Delivered(payload) => format!("delivered {}", String::from_utf8_lossy(payload)),
            WireEvent::Failed(why) => format!("failed {why}"),
        }
    }

    fn hear(wire: Box<dyn Wire>, pieces: &[&[u8]]) -> Heard {
        let (mut session, mut out, mut events, mut error) = (Session::new(wire), Vec::new(), Vec::new(), None);
        session.hello(&mut out);
        for piece in pieces {
            let mut note = |event: WireEvent<'_>| events.push(text(&event));
            let mut sink = Sink { out: &mut out, events: &mut note };
            if let Err(why) = session.receive(piece, &mut sink) {
                error = Some(why);
                break;
            }
        }
        Heard { events, out, ready: session.ready(), error }
    }

    /// What the wire hears, after checking that each cut into two pieces, and into single bytes, makes no difference.
    pub fn hear_any_split(make: &dyn Fn() -> Box<dyn Wire>, stream: &[u8]) -> Heard {
        let whole = hear(make(), &[stream]);
        for at in 0..=stream.len() {
            assert_eq!(hear(make(), &[&stream[..at], &stream[at..]]), whole, "cut at {at}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(hear(make(), &bytes), whole, "byte by byte");
        whole
    }
}
