//! The one task of a client: a socket, the pure session, and the way back when the socket breaks.
//!
//! Runs on whatever tokio runtime the application has; nothing is shared with the application but channels and the small
//! [`Shared`]. Invariants: every frame that is ready goes out in one write; waiting to write never stops reading; commands
//! and deadlines are served in every state, also between connections; the task ends only by a [`CloseReason`].

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ringline_schema::codec::{self, Codec, Encoder};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::UserName;
use ringline_schema::limits;
use ringline_schema::message::{Credential, Reply, Request, Secret};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::addresses::Addresses;
use crate::client::ConnectError;
use crate::pending::{Accepted, Answer, CallError, Delivery, Done, Millis, Outgoing, Query, SendError};
use crate::session::{CloseReason, Cut, Event, LinkError, Session};
use crate::social::SignalOut;
use crate::streams::Taken;

/// Bytes read at once.
const READ_BYTES: usize = 64 * 1024;
/// Commands taken in before the socket gets its turn.
const COMMANDS_PER_TURN: usize = 256;
/// Name look-up, TCP connection and the token provider, together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a REGISTER may take: the server hashes the password, behind others.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(30);
/// Reconnecting waits a random time between 0 and a bound, which doubles from here …
const BACK_OFF_MS_MIN: u64 = 200;
/// … to here.
const BACK_OFF_MS_MAX: u64 = 30_000;
/// A node that died is replaced within some 15 s. As long as one that lives says that the user's is away, or sends the client to
/// one that can't be reached, so many attempts more wait no longer than this one.
const AWAY_ATTEMPT: u32 = 5;
const AWAY_ATTEMPTS: u32 = 12;
/// A connection that lasted so long ends a row of failed attempts.
const LASTED: Duration = Duration::from_secs(10);
/// When the last [`Client`](crate::Client) is dropped, what is open still gets so long.
const DROP_LINGER: Duration = Duration::from_secs(1);

/// What a token provider gives: the token, or why there is none.
pub type TokenFuture = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// What to log in with, asked anew for every connection.
#[derive(Clone)]
pub(crate) enum Proof {
    Password(String),
    Token(Arc<dyn Fn() -> TokenFuture + Send + Sync>),
}

/// From the application to the task.
pub(crate) enum Command {
    Send {
        outgoing: Outgoing,
        accepted: oneshot::Sender<Result<Accepted, SendError>>,
        delivered: Option<oneshot::Sender<Result<Delivery, SendError>>>,
    },
    Call {
        query: Query,
        timeout: Duration,
        answered: oneshot::Sender<Result<Answer, CallError>>,
    },
    Signal(SignalOut),
    Close {
        patience: Duration,
    },
}

/// What the application's event queue and the task both touch.
#[derive(Default)]
pub(crate) struct Shared {
    taken: Mutex<Taken>,
    wake: Notify,
    closed: OnceLock<CloseReason>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        // The lock is held for single assignments only: there is no half-done state to fear.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The application is done with an event.
    pub(crate) fn take(&self, event: &Event) {
        let mut taken = self.lock();
        taken.events += 1;
        if let Event::Message(message) = event
            && message.seq.0 > 0
        {
            let upto = taken.upto.entry(message.conversation).or_default();
            *upto = (*upto).max(message.seq);
        }
        drop(taken);
        self.wake.notify_one();
    }

    pub(crate) fn close_reason(&self) -> CloseReason {
        // Unset only when the runtime was shut down under the task.
        self.closed.get().cloned().unwrap_or(CloseReason::ByClient)
    }
}

/// A connection and what is on its way to and from it.
pub(crate) struct Link {
    socket: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// A write has failed. What the server said before it closed is still read: it may be why.
    write_failed: bool,
}

impl Link {
    fn new(socket: TcpStream) -> Self {
        Self { socket, input: vec![0; READ_BYTES], output: Vec::new(), write_failed: false }
    }
}

/// See the module.
pub(crate) struct Connection {
    addresses: Addresses,
    proof: Proof,
    session: Session,
    commands: mpsc::Receiver<Command>,
    /// False once every [`Client`](crate::Client) is dropped.
    commanded: bool,
    events: mpsc::Sender<Event>,
    /// False once the application has dropped its [`Events`](crate::Events).
    received: bool,
    shared: Arc<Shared>,
    accepted: HashMap<u64, oneshot::Sender<Result<Accepted, SendError>>>,
    delivered: HashMap<u64, oneshot::Sender<Result<Delivery, SendError>>>,
    answered: HashMap<u64, oneshot::Sender<Result<Answer, CallError>>>,
    started: Instant,
    /// The last attempt to connect found a node that lives, and only the user's own away.
    away: bool,
}

/// The ends of the channels that the task holds.
pub(crate) struct Ends {
    pub commands: mpsc::Receiver<Command>,
    pub events: mpsc::Sender<Event>,
    pub shared: Arc<Shared>,
}

impl Connection {
    pub(crate) fn new(addresses: Addresses, proof: Proof, session: Session, ends: Ends) -> Self {
        let Ends { commands, events, shared } = ends;
        Self {
            addresses,
            proof,
            session,
            commands,
            commanded: true,
            events,
            received: true,
            shared,
            accepted: HashMap::new(),
            delivered: HashMap::new(),
            answered: HashMap::new(),
            started: Instant::now(),
            away: false,
        }
    }

    fn now(&self) -> Millis {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// One attempt to connect and log in, at the node that the user lives on.
    pub(crate) async fn connect(&mut self, delay: Duration) -> Result<Link, Cut> {
        let (mut delay, mut sent_on) = (delay, false);
        loop {
            let cut = match self.log_in(delay).await {
                Ok(link) => {
                    self.addresses.reached();
                    self.away = false;
                    return Ok(link);
                }
                Err(cut) => cut,
            };
            if let Cut::Lost(LinkError::Redirected { address }) = &cut
                && self.addresses.redirect(address)
            {
                self.session.disconnected();
                (delay, sent_on) = (Duration::ZERO, true);
                continue;
            }
            let unreachable =
                matches!(cut, Cut::Lost(LinkError::Io(_) | LinkError::ConnectTimeout(_) | LinkError::ServerClosed));
            if unreachable && self.addresses.pass_over() {
                self.session.disconnected();
                delay = Duration::ZERO;
                continue;
            }
            let refused = matches!(cut, Cut::Lost(LinkError::Refused(ErrorCode::Unavailable)));
            self.away = refused || (unreachable && sent_on);
            self.addresses.failed();
            return Err(cut);
        }
    }

    /// The same, at one address.
    async fn log_in(&mut self, delay: Duration) -> Result<Link, Cut> {
        let dialled = self.dial_while_serving(delay).await?;
        let (socket, secret) = dialled.map_err(Cut::Lost)?;
        let credential = match self.proof {
            Proof::Password(_) => Credential::Password(Secret(&secret)),
            Proof::Token(_) => Credential::Token(Secret(&secret)),
        };
        let now = self.now();
        self.session.connected(now, credential);
        let mut link = Link::new(socket);
        while !self.session.is_online() {
            self.turn(&mut link).await?;
        }
        Ok(link)
    }

    /// Waits `delay`, then connects; meanwhile sends are queued and deadlines kept.
    async fn dial_while_serving(&mut self, delay: Duration) -> Result<Result<(TcpStream, String), LinkError>, Cut> {
        let ask = self.addresses.is_a_guess().then(|| self.session.user().clone());
        let dialling = dial((self.addresses.next(), ask), self.proof.clone(), delay);
        tokio::pin!(dialling);
        loop {
            self.advance()?;
            tokio::select! {
                dialled = &mut dialling => return Ok(dialled),
                () = self.serve() => {}
            }
        }
    }

    /// The life of the task, from the first login on.
    pub(crate) async fn run(mut self, link: Link) {
        let reason = self.keep_connected(link).await;
        // Set before the event channel closes, so that whoever sees the end knows why.
        let _ = self.shared.closed.set(reason);
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            self.command(command);
        }
        self.session.end();
        self.hand_out();
    }

    async fn keep_connected(&mut self, first: Link) -> CloseReason {
        let mut attempt = 0u32;
        let mut cut = self.live(first).await;
        loop {
            let why = match cut {
                Cut::End(reason) => return reason,
                Cut::Lost(why) => why,
            };
            self.session.disconnected();
            if let LinkError::Goaway { address: Some(address), .. } = &why {
                self.addresses.send_to(address);
            }
            if why == LinkError::NoAnswer {
                // It may still take connections, and answer none: another node knows who has its users now.
                self.addresses.failed();
            }
            attempt = attempt.saturating_add(1);
            let delay = back_off(attempt, (&why, self.away));
            self.session.announce(Event::Reconnecting { attempt, delay, why });
            cut = match self.connect(delay).await {
                Ok(link) => {
                    let began = Instant::now();
                    let cut = self.live(link).await;
                    // A server that sends its clients on says itself when they are to come: that is no failure to be slower for.
                    let sent_on = matches!(cut, Cut::Lost(LinkError::Goaway { .. }));
                    attempt = if sent_on || began.elapsed() >= LASTED { 0 } else { attempt };
                    cut
                }
                Err(cut) => cut,
            };
        }
    }

    /// Serves a connection until it ends.
    async fn live(&mut self, mut link: Link) -> Cut {
        loop {
            if let Err(cut) = self.turn(&mut link).await {
                return self.session.ended_by(cut);
            }
        }
    }

    /// Does what is due, then waits for one thing to happen and takes it in.
    async fn turn(&mut self, link: &mut Link) -> Result<(), Cut> {
        self.advance()?;
        self.session.take_output(&mut link.output);
        let Link { socket, input, output, write_failed } = link;
        let (mut reader, mut writer) = socket.split();
        tokio::select! {
            read = reader.read(input) => match read {
                Ok(0) => Err(Cut::Lost(LinkError::ServerClosed)),
                Ok(count) => {
                    let now = self.now();
                    self.session.received(now, input.get(..count).unwrap_or_default())
                }
                Err(error) => Err(Cut::Lost(io_error(&error))),
            },
            written = writer.write(output), if !output.is_empty() && !*write_failed => {
                match written {
                    Ok(count) => drop(output.drain(..count)),
                    Err(_) => *write_failed = true,
                }
                Ok(())
            }
            () = self.serve() => Ok(()),
        }
    }

    /// Lets time pass in the session and hands out what that brought.
    fn advance(&mut self) -> Result<(), Cut> {
        let now = self.now();
        let result = self.session.advance(now);
        self.hand_out();
        result
    }

    /// Waits for the application or the next deadline. Whatever it takes in, it takes in whole: it may be dropped while
    /// it waits.
    async fn serve(&mut self) {
        const FAR: Duration = Duration::from_secs(3_600);
        let wake = self.session.next_wake(self.now());
        let at = wake.map_or_else(|| Instant::now() + FAR, |at| self.started + Duration::from_millis(at));
        tokio::select! {
            command = self.commands.recv(), if self.commanded => match command {
                Some(command) => {
                    self.command(command);
                    for _ in 1..COMMANDS_PER_TURN {
                        let Ok(command) = self.commands.try_recv() else { break };
                        self.command(command);
                    }
                }
                None => {
                    self.commanded = false;
                    self.command(Command::Close { patience: DROP_LINGER });
                }
            },
            () = self.shared.wake.notified() => self.note_taken(),
            () = self.events.closed(), if self.received => {
                self.received = false;
                self.note_taken();
                self.session.stop_receiving();
            }
            () = sleep_until(at) => {}
        }
    }

    fn note_taken(&mut self) {
        let taken = std::mem::take(&mut *self.shared.lock());
        let now = self.now();
        self.session.taken(now, taken);
    }

    fn command(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Send { outgoing, accepted, delivered } => match self.session.send(now, outgoing) {
                Ok(client_seq) => {
                    self.accepted.insert(client_seq, accepted);
                    if let Some(delivered) = delivered {
                        self.delivered.insert(client_seq, delivered);
                    }
                }
                Err(error) => {
                    // A caller that does not wait for the answer is no error, here and below.
                    let _ = accepted.send(Err(error.clone()));
                    let _ = delivered.map(|delivered| delivered.send(Err(error)));
                }
            },
            Command::Call { query, timeout, answered } => match self.session.call(now, query, timeout) {
                Ok(number) => {
                    self.answered.insert(number, answered);
                }
                Err(error) => {
                    let _ = answered.send(Err(error));
                }
            },
            Command::Signal(signal) => self.session.signal(now, &signal),
            Command::Close { patience } => {
                // What was taken before must be acknowledged before the goodbye.
                self.note_taken();
                let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
                self.session.close(now.saturating_add(patience_ms));
            }
        }
    }

    fn hand_out(&mut self) {
        for event in self.session.take_events() {
            // The queue is as long as what the session may have untaken, so it is never full; a closed one is noticed
            // in `serve`.
            let _ = self.events.try_send(event);
        }
        for done in self.session.take_done() {
            match done {
                Done::Sent(client_seq, result) => {
                    let _ = self.accepted.remove(&client_seq).map(|sender| sender.send(result));
                }
                Done::Delivered(client_seq, result) => {
                    let _ = self.delivered.remove(&client_seq).map(|sender| sender.send(result));
                }
                Done::Answered(number, result) => {
                    let _ = self.answered.remove(&number).map(|sender| sender.send(result));
                }
            }
        }
    }
}

fn io_error(error: &io::Error) -> LinkError {
    LinkError::Io(error.to_string())
}

/// Full jitter: anything from 0 to a bound that doubles, so that clients that were cut off together come back apart.
fn back_off(attempt: u32, (why, away): (&LinkError, bool)) -> Duration {
    let jitter = Duration::from_millis(rand::random_range(0..=back_off_ms_max(attempt, away)));
    match why {
        LinkError::Goaway { reconnect_after, .. } => *reconnect_after + jitter,
        LinkError::Io(_)
        | LinkError::ConnectTimeout(_)
        | LinkError::Token(_)
        | LinkError::ServerClosed
        | LinkError::NoAnswer
        | LinkError::Redirected { .. }
        | LinkError::Protocol(_)
        | LinkError::Refused(_) => jitter,
    }
}

/// The longest that [`back_off`] may wait beyond what a server has asked for.
fn back_off_ms_max(attempt: u32, away: bool) -> u64 {
    let attempt = if away { attempt.min(AWAY_ATTEMPT).max(attempt.saturating_sub(AWAY_ATTEMPTS)) } else { attempt };
    let doubled = BACK_OFF_MS_MIN.checked_shl(attempt.saturating_sub(1).min(16)).unwrap_or(BACK_OFF_MS_MAX);
    doubled.min(BACK_OFF_MS_MAX)
}

/// After `delay`, a connection and the secret to log in with. `ask`: the user whose route is asked for first; the error is
/// [`LinkError::Redirected`] if it leads elsewhere.
async fn dial(
    (address, ask): (String, Option<UserName>),
    proof: Proof,
    delay: Duration,
) -> Result<(TcpStream, String), LinkError> {
    sleep(delay).await;
    let dialling = async {
        let secret = match proof {
            Proof::Password(password) => password,
            Proof::Token(provider) => provider().await.map_err(LinkError::Token)?,
        };
        let mut socket = TcpStream::connect(&address).await.map_err(|error| io_error(&error))?;
        socket.set_nodelay(true).map_err(|error| io_error(&error))?;
        if let Some(user) = ask {
            let request = Request::Route { user: user.as_str() };
            match ask_once(&mut socket, &request, routed).await?? {
                Some(leads_to) if leads_to != address => return Err(LinkError::Redirected { address: leads_to }),
                Some(_) | None => {}
            }
        }
        Ok((socket, secret))
    };
    timeout(DIAL_TIMEOUT, dialling).await.unwrap_or(Err(LinkError::ConnectTimeout(DIAL_TIMEOUT)))
}

/// Registers a user on a connection of its own, to the node that the user will live on.
pub(crate) async fn register(mut addresses: Addresses, user: &UserName, password: String) -> Result<(), ConnectError> {
    loop {
        let ask = addresses.is_a_guess().then(|| user.clone());
        let result = register_at((addresses.next(), ask), user, password.clone()).await;
        match &result {
            Err(ConnectError::Link(LinkError::Redirected { address })) if addresses.redirect(address) => {}
            Ok(()) | Err(_) => return result,
        }
    }
}

async fn register_at(at: (String, Option<UserName>), user: &UserName, password: String) -> Result<(), ConnectError> {
    let (mut socket, password) = dial(at, Proof::Password(password), Duration::ZERO).await?;
    let request = Request::Register { user: user.as_str(), password: Secret(&password) };
    let asking = ask_once(&mut socket, &request, registered);
    timeout(REGISTER_TIMEOUT, asking).await.unwrap_or(Err(LinkError::NoAnswer))?
}

/// Asks the first question of a connection and reads its answer.
async fn ask_once<T>(socket: &mut TcpStream, request: &Request<'_>, read: fn(Reply<'_>) -> T) -> Result<T, LinkError> {
    /// Enough for the answers that there are.
    const ANSWER_BYTES: usize = 4 * 1024;
    let (mut frame, mut input) = (Vec::new(), vec![0; ANSWER_BYTES]);
    Encoder::new().request(Codec::FlatBuffers, 1, request, &mut frame);
    socket.write_all(&frame).await.map_err(|error| io_error(&error))?;
    let mut decoder = FrameDecoder::new();
    loop {
        let count = socket.read(&mut input).await.map_err(|error| io_error(&error))?;
        if count == 0 {
            return Err(LinkError::ServerClosed);
        }
        let mut bytes = input.get(..count).unwrap_or_default();
        loop {
            let frame = decoder.next(&mut bytes, limits::FRAME_BYTES_CEILING);
            let Some(frame) = frame.map_err(|error| LinkError::Protocol(error.code))? else { break };
            // What is not the answer is a push, of which none matters yet.
            if frame.header.request_id == 1 {
                return codec::decode_reply(&frame.header, frame.body).map(read).map_err(LinkError::Protocol);
            }
        }
    }
}

/// Where a route leads; `None`: the server has none to tell, and whoever asks tries it there.
fn routed(reply: Reply<'_>) -> Result<Option<String>, LinkError> {
    match reply {
        Reply::RouteOk { address, .. } => Ok(Some(address.to_owned())),
        // Its node is away, or this one is stopping: another may know better.
        Reply::Failure { code, .. } if code.retryable() => Err(LinkError::Refused(code)),
        Reply::Failure { .. } => Ok(None),
        _ => Err(LinkError::Protocol(ErrorCode::BadBody)),
    }
}

fn registered(reply: Reply<'_>) -> Result<(), ConnectError> {
    if let Reply::RegisterOk { .. } = reply {
        return Ok(());
    }
    if let Reply::Redirect { address, .. } = reply {
        return Err(ConnectError::Link(LinkError::Redirected { address: address.to_owned() }));
    }
    let Reply::Failure { code, detail, .. } = reply else {
        return Err(ConnectError::Link(LinkError::Protocol(ErrorCode::BadBody)));
    };
    Err(ConnectError::Refused { code, detail: detail.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_stay_short_for_a_while_when_only_the_users_node_is_away() {
        let pauses = |away| (1..=21).map(|attempt| back_off_ms_max(attempt, away)).collect::<Vec<_>>();
        let lost = pauses(false);
        assert_eq!(lost[..8], [200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600]);
        assert!(lost[8..].iter().all(|pause| *pause == 30_000));
        let away = pauses(true);
        assert_eq!(away[..5], lost[..5]);
        assert!(away[5..17].iter().all(|pause| *pause == 3_200));
        assert_eq!(away[17..], [6_400, 12_800, 25_600, 30_000]);
        assert_eq!(back_off_ms_max(u32::MAX, true), 30_000);
    }
}
