//! The edge: what a core keeps for each socket between the kernel's bytes and the shard's requests and frames. Owned
//! by its core's thread.
//!
//! States of a connection: open → closing → (closed), or open → leaving → (on another core, or a tunnel's:
//! [`crate::tunnels`]). Invariants: at most one
//! buffer of a connection is in flight; a leaving connection is let go only when its output is in the kernel; the
//! shard hears `Closed` exactly once for each connection that it has not handed over.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use ringline_cluster::placement::{NodeIndex, ShardIndex};
use ringline_core::Shard;
use ringline_core::event::{ConnId, Effects, Event, Now, Verdict};
use ringline_schema::codec::Codec;
use ringline_schema::frame::{FrameDecoder, TailPool};

use crate::net::{Flow, Net, Sending};

/// How long a closing connection may take to accept its last output and to end its own stream.
const LINGER_US: u64 = 1_000_000;
/// Bytes read and thrown away from a closing connection, so that the last answer is not lost to a reset.
const LINGER_BYTES_MAX: u32 = 1024 * 1024;
/// Buffers of one connection written in one turn.
const WRITES_PER_TURN_MAX: usize = 4;

/// What the edge works with during a turn.
pub struct Turn<'a> {
    pub shard: &'a mut Shard,
    pub fx: &'a mut Effects,
    pub now: Now,
}

impl Turn<'_> {
    /// An event whose verdict is always to go on.
    pub fn tell(&mut self, event: Event<'_>) {
        let verdict = self.shard.handle(event, self.now, self.fx);
        debug_assert_eq!(verdict, Verdict::Continue, "only requests change what is read");
    }
}

/// A connection that may go to another core now.
pub struct Departure {
    pub to: ShardIndex,
    pub socket: OwnedFd,
    pub bytes: Vec<u8>,
}

/// A connection whose user lives on another node: it stays here, and only its bytes go there.
pub struct Tunnelled {
    pub conn: ConnId,
    pub to: ShardIndex,
    pub bytes: Vec<u8>,
}

enum State {
    Open,
    Closing {
        /// All output is in the kernel and the stream was ended.
        finished: bool,
        discarded_bytes: u32,
    },
    Leaving(Box<Leaving>),
}

/// What goes with a connection to another shard.
pub struct Leaving {
    to: ShardIndex,
    bytes: Vec<u8>,
    /// The last output of this core, to be written first.
    output: Option<Vec<u8>>,
}

/// Its slot is its place in the table.
struct Connection {
    decoder: FrameDecoder,
    state: State,
    generation: u32,
    in_flight: bool,
}

// Every connection pays for it; see "Cost of a connection" in tuning.md.
const _: () = assert!(size_of::<Option<Connection>>() <= 32);

/// All connections of a core.
#[derive(Default)]
pub struct Edge {
    /// This one; others' connections are tunnelled.
    node: NodeIndex,
    table: Vec<Option<Connection>>,
    /// Connections whose departure began; looked at after each poll.
    leaving: Vec<ConnId>,
    /// Those that have left the table for a tunnel.
    tunnelled: Vec<Tunnelled>,
    /// Closing connections in order of their deadlines.
    closing: VecDeque<(u64, ConnId)>,
    in_flight: usize,
    /// For frames that a receive buffer cuts.
    tails: TailPool,
}

impl Edge {
    /// Of a node, without connections.
    pub fn of(node: NodeIndex) -> Self {
        Self { node, ..Self::default() }
    }

    pub fn opened(&mut self, conn: ConnId) {
        let slot = conn.slot as usize;
        if self.table.len() <= slot {
            self.table.resize_with(slot + 1, || None);
        }
        if let Some(place) = self.table.get_mut(slot) {
            debug_assert!(place.is_none(), "slot {slot} has a tenant");
            let (decoder, generation) = (FrameDecoder::new(), conn.generation);
            *place = Some(Connection { decoder, state: State::Open, generation, in_flight: false });
        }
    }

    /// Decodes what came and feeds the shard.
    pub fn received(&mut self, turn: &mut Turn<'_>, conn: ConnId, bytes: &[u8]) -> Flow {
        let Some(connection) = find(&mut self.table, conn) else { return Flow::Stop };
        match &mut connection.state {
            State::Open => {}
            State::Closing { discarded_bytes, .. } => {
                *discarded_bytes = discarded_bytes.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                return if *discarded_bytes > LINGER_BYTES_MAX { Flow::Stop } else { Flow::Continue };
            }
            State::Leaving(leaving) => {
                leaving.bytes.extend_from_slice(bytes);
                return Flow::Stop;
            }
        }
        match decode((conn, &mut connection.decoder), turn, bytes, &mut self.tails) {
            Decoded::All => Flow::Continue,
            Decoded::Stopped => {
                // `Effect::Close` is on its way. Reading goes on, to throw away.
                connection.state = State::Closing { finished: false, discarded_bytes: 0 };
                Flow::Continue
            }
            Decoded::HandOver(leaving) => {
                connection.state = State::Leaving(Box::new(leaving));
                self.leaving.push(conn);
                Flow::Stop
            }
        }
    }

    /// Writes the output that waits for a connection, unless some is in flight.
    pub fn write(&mut self, turn: &mut Turn<'_>, net: &mut dyn Net, conn: ConnId) {
        for _ in 0..WRITES_PER_TURN_MAX {
            let Some(connection) = find(&mut self.table, conn).filter(|connection| !connection.in_flight) else {
                return;
            };
            if matches!(connection.state, State::Leaving(_)) {
                return;
            }
            let Some(buffer) = turn.shard.take_output(conn) else {
                return finish_if_closing((conn, connection), net);
            };
            let (bytes, done) = match net.send(conn, buffer) {
                Sending::Done(buffer) => {
                    let bytes = buffer.len();
                    turn.shard.give_back(buffer);
                    (bytes, true)
                }
                Sending::InFlight { bytes } => (bytes, false),
            };
            if !done {
                connection.in_flight = true;
                self.in_flight += 1;
            }
            if bytes > 0 {
                turn.tell(Event::Sent { conn, bytes });
            }
        }
        // The rest in the next turn: others want to write too.
        turn.fx.dirty.push(conn);
    }

    /// The kernel has taken more of a buffer in flight.
    pub fn sent(&mut self, turn: &mut Turn<'_>, conn: ConnId, (bytes, buffer): (usize, Option<Vec<u8>>)) {
        let Some(connection) = find(&mut self.table, conn) else { return };
        let leaving = matches!(connection.state, State::Leaving(_));
        if buffer.is_some() && std::mem::replace(&mut connection.in_flight, false) {
            self.in_flight -= 1;
            if leaving {
                self.leaving.push(conn);
            }
        }
        if leaving {
            return;
        }
        if bytes > 0 {
            turn.tell(Event::Sent { conn, bytes });
        }
        if let Some(buffer) = buffer {
            turn.shard.give_back(buffer);
            turn.fx.dirty.push(conn);
        }
    }

    /// Begins to end a connection: its output is still written, within [`LINGER_US`].
    pub fn close(&mut self, conn: ConnId, now: Now) {
        let Some(connection) = find(&mut self.table, conn) else { return };
        match connection.state {
            State::Open => connection.state = State::Closing { finished: false, discarded_bytes: 0 },
            State::Closing { .. } => {}
            State::Leaving(_) => {
                debug_assert!(false, "closed a connection that was handed over");
                return;
            }
        }
        self.closing.push_back((now.mono_us + LINGER_US, conn));
    }

    /// The socket is gone.
    pub fn closed(&mut self, turn: &mut Turn<'_>, conn: ConnId) {
        let Some(connection) = self.remove(conn) else { return };
        match connection.state {
            State::Open | State::Closing { .. } => turn.tell(Event::Closed { conn }),
            State::Leaving(_) => {}
        }
    }

    /// Closes what had its time.
    pub fn close_overdue(&mut self, turn: &mut Turn<'_>, net: &mut dyn Net) {
        while let Some(&(deadline_us, conn)) = self.closing.front() {
            if deadline_us > turn.now.mono_us {
                return;
            }
            self.closing.pop_front();
            if find(&mut self.table, conn).is_some() {
                net.close(conn);
                self.closed(turn, conn);
            }
        }
    }

    /// When [`Edge::close_overdue`] has something to do, in monotonic microseconds.
    pub fn next_deadline_us(&self) -> Option<u64> {
        self.closing.front().map(|(deadline_us, _)| *deadline_us)
    }

    /// Lets go of leaving connections whose output is in the kernel.
    pub fn depart(&mut self, net: &mut dyn Net, mut gone: impl FnMut(Departure)) {
        for conn in std::mem::take(&mut self.leaving) {
            let Some(connection) = find(&mut self.table, conn) else { continue };
            let State::Leaving(leaving) = &mut connection.state else { continue };
            if connection.in_flight {
                continue;
            }
            if let Some(output) = leaving.output.take() {
                match net.send(conn, output) {
                    Sending::Done(_) => {}
                    Sending::InFlight { .. } => {
                        connection.in_flight = true;
                        self.in_flight += 1;
                        continue;
                    }
                }
            }
            if leaving.to.node() != self.node {
                self.tunnel(conn);
            } else if let Some(socket) = net.detach(conn) {
                self.detached(conn, socket, &mut gone);
            }
        }
    }

    fn tunnel(&mut self, conn: ConnId) {
        if let Some(Connection { state: State::Leaving(leaving), .. }) = self.remove(conn) {
            self.tunnelled.push(Tunnelled { conn, to: leaving.to, bytes: leaving.bytes });
        }
    }

    /// A connection that is not the edge's any more; after [`Edge::depart`].
    pub fn next_tunnelled(&mut self) -> Option<Tunnelled> {
        self.tunnelled.pop()
    }

    /// The socket of a leaving connection is out.
    pub fn detached(&mut self, conn: ConnId, socket: OwnedFd, mut gone: impl FnMut(Departure)) {
        let Some(Connection { state: State::Leaving(leaving), .. }) = self.remove(conn) else {
            debug_assert!(false, "a connection was detached that did not leave");
            return;
        };
        gone(Departure { to: leaving.to, socket, bytes: leaving.bytes });
    }

    /// Whether all output is in the kernel and nobody is between two cores.
    pub fn is_quiet(&self) -> bool {
        self.in_flight == 0 && self.leaving.is_empty() && self.tunnelled.is_empty()
    }

    fn remove(&mut self, conn: ConnId) -> Option<Connection> {
        find(&mut self.table, conn)?;
        let connection = self.table.get_mut(conn.slot as usize)?.take()?;
        self.in_flight -= usize::from(connection.in_flight);
        Some(connection)
    }
}

fn find(table: &mut [Option<Connection>], conn: ConnId) -> Option<&mut Connection> {
    table.get_mut(conn.slot as usize)?.as_mut().filter(|connection| connection.generation == conn.generation)
}

fn finish_if_closing((conn, connection): (ConnId, &mut Connection), net: &mut dyn Net) {
    if let State::Closing { finished, .. } = &mut connection.state
        && !std::mem::replace(finished, true)
    {
        net.finish(conn);
    }
}

/// How far [`decode`] came.
pub enum Decoded {
    All,
    /// The connection ends: what follows is not read.
    Stopped,
    /// Another shard is to read it.
    HandOver(Leaving),
}

/// Feeds the shard with the frames of what came for a connection.
pub fn decode(
    (conn, decoder): (ConnId, &mut FrameDecoder),
    turn: &mut Turn<'_>,
    mut input: &[u8],
    tails: &mut TailPool,
) -> Decoded {
    let (shard, fx, now) = (&mut *turn.shard, &mut *turn.fx, turn.now);
    let mut frame_bytes_max = shard.frame_limit(conn);
    loop {
        let frame = match decoder.next_pooled(&mut input, frame_bytes_max, tails) {
            Ok(None) => return Decoded::All,
            Ok(Some(frame)) => frame,
            Err(error) => {
                let (request_id, code) = (error.request_id, error.code);
                let event = Event::Refused { conn, codec: Codec::default(), request_id, code };
                // Whatever the shard says, what follows can't be read.
                let _ = shard.handle(event, now, fx);
                return Decoded::Stopped;
            }
        };
        let event = Event::of_frame(conn, &frame);
        // A message changes nothing of how large the next frame may be.
        let is_send = matches!(event, Event::Send { .. });
        match shard.handle(event, now, fx) {
            Verdict::Continue if is_send => {}
            Verdict::Continue => frame_bytes_max = shard.frame_limit(conn),
            Verdict::Stop => return Decoded::Stopped,
            Verdict::HandOver(to) => {
                let bytes = [frame.raw, input].concat();
                return Decoded::HandOver(Leaving { to, bytes, output: shard.take_output(conn) });
            }
        }
    }
}
