//! The clients of a round: a few users with a few devices each, SDK clients that send to each other and to groups, ask for
//! this and that, and write down what they see.
//!
//! One task a device. Invariants: a body is used once; a process of a device ends with an end of each of its sends;
//! what was handed to the application is in the record before the next event is asked for.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use ringline_client::{
    Accepted, Class, Client, ClientBuilder, DeviceId, ErrorCode, Event, Events, SendError, SendOptions, Sending, Seq,
};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{interval, sleep};

use super::asks::{self, Wish};
use super::{Record, failed, with_history};
use crate::Failure;
use crate::checker::{Device, Happening, Notice, Peer, Place, State};
use crate::observed::{self, Memory};
use crate::token::Issuer;

pub const USERS: u32 = 6;
pub const DEVICES_PER_USER: u64 = 2;
/// May tell everyone.
pub const ADMIN: u32 = 0;
/// At most one a user: group n is made by user n.
pub const GROUPS: u32 = 3;
/// The number of the device that reads logs back.
const READER: u64 = 99;
/// Sends without an answer a device: few enough that none is refused for their number.
const OPEN_SENDS_MAX: usize = 16;
const SEND_EVERY: Duration = Duration::from_millis(20);
/// A client that would wait longer than this to reconnect is replaced by a new process of its device.
const PATIENCE: Duration = Duration::from_millis(600);
const BETWEEN_TRIES: Duration = Duration::from_millis(50);
/// Chance in percent that a send is transient, that it goes to a group, that it amends another, and that it is given up
/// soon: what is still refused then is told.
const TRANSIENT_PERCENT: u32 = 10;
const GROUP_PERCENT: u32 = 30;
const AMEND_PERCENT: u32 = 8;
const HASTY_PERCENT: u32 = 10;
const HASTE: Duration = Duration::from_millis(300);
/// … and all of them while the disk is full, long enough to be written and refused.
const HASTE_FULL: Duration = Duration::from_millis(1_500);
/// Chance in percent that an application signals as well.
const SIGNAL_PERCENT: u32 = 4;
/// Chance in percent that a durable message mentions somebody, and that all of its group.
const MENTIONS_PERCENT: u32 = 10;
/// An application's own signal.
const SIGNAL_KIND: u8 = 16;
/// Asked for beside sends, one after the other, so that answers are noted in their order.
const ASK_EVERY: Duration = Duration::from_millis(100);
const OPEN_ASKS_MAX: usize = 1;

/// What the clients are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Load,
    /// Send nothing more, receive what is left.
    Finish,
    /// Begin once more as a new process, and receive.
    Anew,
    End,
}

/// Counted over all devices.
#[derive(Default)]
struct Gauges {
    open_sends: AtomicI64,
    online: AtomicI64,
    /// Sends may be refused for a while now, and passed by others.
    full: AtomicBool,
    /// Sends that were refused because the disk was full.
    refused_full: AtomicU64,
    /// How often there was room again; and which of these times a durable send was made that was accepted.
    room: AtomicU64,
    accepted_in: AtomicU64,
}

/// See the module.
pub struct Traffic {
    devices: Vec<JoinHandle<()>>,
    gauges: Arc<Gauges>,
    record: Record,
}

pub fn user_name(user: u32) -> String {
    observed::name(Peer::User(user)).as_str().to_owned()
}

fn builder(address: SocketAddr, user: u32, token: &str) -> ClientBuilder {
    let token = token.to_owned();
    Client::builder(address.to_string()).user(&user_name(user)).token(move || {
        let token = token.clone();
        Box::pin(async move { Ok(token) })
    })
}

impl Traffic {
    /// Starts all devices. Errors: no token could be signed.
    pub fn start(
        issuer: &Issuer,
        (address, record): (SocketAddr, Record),
        phases: &watch::Receiver<Phase>,
    ) -> Result<Self, Failure> {
        let tokens = issuer.tokens(&(0..USERS).map(user_name).collect::<Vec<_>>())?;
        let gauges = Arc::new(Gauges::default());
        let mut devices = Vec::new();
        for (user, token) in (0..).zip(&tokens) {
            for number in 1..=DEVICES_PER_USER {
                let (builder, name) = (builder(address, user, token).device(DeviceId(number)), Device { user, number });
                let rng = SmallRng::seed_from_u64(u64::from(user) * 100 + number);
                let parts = (record.clone(), Arc::clone(&gauges), phases.clone());
                devices.push(tokio::spawn(
                    Life {
                        name,
                        builder,
                        rng,
                        sent: 0,
                        connection: 0,
                        memory: Memory::default(),
                        open: BTreeSet::new(),
                        parts,
                    }
                    .live(),
                ));
            }
        }
        Ok(Self { devices, gauges, record })
    }

    pub fn open_sends(&self) -> i64 {
        self.gauges.open_sends.load(Ordering::Relaxed)
    }

    pub fn set_full(&self, full: bool) {
        self.gauges.full.store(full, Ordering::Relaxed);
    }

    /// Sends that were refused because the disk was full.
    pub fn refused_full(&self) -> u64 {
        self.gauges.refused_full.load(Ordering::Relaxed)
    }

    /// There is room again, for the time that is returned.
    pub fn room_again(&self) -> u64 {
        self.gauges.room.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether a durable send that was made since then has been accepted.
    pub fn accepts_since(&self, room: u64) -> bool {
        self.gauges.accepted_in.load(Ordering::Relaxed) >= room
    }

    /// Nothing has changed for a while: all that are online are noted, the readers too.
    pub fn note_rest(&self) {
        let devices = (1..=DEVICES_PER_USER).chain([READER]);
        let all = (0..USERS).flat_map(|user| devices.clone().map(move |number| Device { user, number }));
        with_history(&self.record, |history| {
            all.for_each(|device| history.push(device, Happening::Rested { left_ms: None }));
        });
    }

    pub fn all_online(&self) -> bool {
        self.gauges.online.load(Ordering::Relaxed) == self.devices.len() as i64
    }

    /// Waits for the end of all devices.
    pub async fn join(self) {
        for device in self.devices {
            if let Err(error) = device.await {
                eprintln!("torture: a client ended: {error}");
            }
        }
    }

    /// Reads everything back, as each user. Errors: a page can't be had.
    pub async fn read_back(&self, issuer: &Issuer, address: SocketAddr) -> Result<(), Failure> {
        let tokens = issuer.tokens(&(0..USERS).map(user_name).collect::<Vec<_>>())?;
        for (user, token) in (0..).zip(&tokens) {
            let (client, events) = loop {
                match builder(address, user, token).device(DeviceId(READER)).connect().await {
                    Ok(connected) => break connected,
                    Err(_) => sleep(BETWEEN_TRIES).await,
                }
            };
            drop(events);
            let asked = with_history(&self.record, |history| history.now());
            let all = asks::read_all(&client, asked)
                .await
                .map_err(|error| failed("what was sent can't be read back", &error))?;
            let reader = Device { user, number: READER };
            with_history(&self.record, |history| all.into_iter().for_each(|one| history.push(reader, one)));
            client.close(Duration::from_secs(1)).await;
        }
        Ok(())
    }
}

/// Number, how often there was room before it was sent, how it ended.
type Ended = (u64, u64, Result<Accepted, SendError>);

/// One device, over all its processes.
struct Life {
    name: Device,
    builder: ClientBuilder,
    rng: SmallRng,
    sent: u64,
    /// What was handed to the application, over all processes.
    memory: Memory,
    /// Rises with each connection.
    connection: u64,
    /// Sends without an end that nobody has been said to pass.
    open: BTreeSet<u64>,
    parts: (Record, Arc<Gauges>, watch::Receiver<Phase>),
}

impl Life {
    fn note(&self, happening: Happening) {
        with_history(&self.parts.0, |history| history.push(self.name, happening));
    }

    fn phase(&self) -> Phase {
        *self.parts.2.borrow()
    }

    async fn live(mut self) {
        let mut anew = false;
        while self.phase() != Phase::End {
            self.note(Happening::Started);
            if self.name.user == ADMIN {
                self.note(Happening::Notice(Notice::Appointed));
            }
            let (client, events) = loop {
                match self.builder.clone().connect().await {
                    Ok(connected) => break connected,
                    Err(_) if self.phase() == Phase::End => return,
                    Err(_) => sleep(BETWEEN_TRIES).await,
                }
            };
            let mut sends = JoinSet::new();
            self.parts.1.online.fetch_add(1, Ordering::Relaxed);
            self.process((&client, events), &mut sends, anew).await;
            self.parts.1.online.fetch_sub(1, Ordering::Relaxed);
            client.close(Duration::ZERO).await;
            while let Some(ended) = sends.join_next().await {
                self.ended(ended);
            }
            if self.phase() == Phase::Anew && !anew {
                anew = true;
                self.note(Happening::Settled);
            }
        }
    }

    /// One process, until it is to end or its connection has been lost for too long.
    async fn process(&mut self, (client, mut events): (&Client, Events), sends: &mut JoinSet<Ended>, anew: bool) {
        let (mut ticks, mut wishes) = (interval(SEND_EVERY), interval(ASK_EVERY));
        let mut asks = JoinSet::new();
        loop {
            match self.phase() {
                Phase::End => return,
                Phase::Anew if !anew => return,
                Phase::Load | Phase::Finish | Phase::Anew => {}
            }
            tokio::select! {
                event = events.next() => {
                    if !event.is_some_and(|event| self.event(event)) {
                        return;
                    }
                }
                Some(ended) = sends.join_next() => self.ended(ended),
                Some(Ok(happenings)) = asks.join_next() => {
                    let happenings: Vec<Happening> = happenings;
                    happenings.into_iter().for_each(|happening| self.note(happening));
                }
                _ = ticks.tick() => {
                    if self.parts.1.full.load(Ordering::Relaxed) {
                        for number in std::mem::take(&mut self.open) {
                            self.note(Happening::Passed { number });
                        }
                    }
                    if self.phase() == Phase::Load && sends.len() < OPEN_SENDS_MAX {
                        self.send(client, sends);
                    }
                }
                _ = wishes.tick() => {
                    if self.phase() == Phase::Load && asks.len() < OPEN_ASKS_MAX {
                        let message = self.any_message();
                        let wish = Wish::any((self.name, message), &self.memory.seen, &mut self.rng);
                        wish.before().into_iter().for_each(|happening| self.note(happening));
                        let asked = with_history(&self.parts.0, |history| history.now());
                        asks.spawn(wish.ask(client.clone(), asked));
                    }
                }
            }
        }
    }

    /// Takes an event in; false: the process is to end.
    fn event(&mut self, event: Event) -> bool {
        for happening in observed::happenings(&event) {
            if let Happening::Saw(shown) = &happening {
                self.memory.saw(self.name.user, shown);
            }
            self.note(happening);
        }
        if let Event::Connected { .. } = &event {
            self.connection += 1;
        } else if let Event::Presence(rows) = &event {
            for presence in rows.iter().map(observed::presence) {
                // Answers and events come on two ways; these are in the order of the connection.
                self.note(Happening::Watches(vec![presence.user]));
                self.note(Happening::PresenceShown { connection: self.connection, presence, pushed: false });
            }
        }
        let waits_long = matches!(event, Event::Reconnecting { delay, .. } if delay > PATIENCE);
        !waits_long && !matches!(event, Event::Closed { .. })
    }

    /// A message that it remembers.
    fn any_message(&mut self) -> Option<(Peer, Place, u32)> {
        self.memory.message(self.rng.random_range(0..1_024))
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn signal(&mut self, client: &Client) {
        self.sent += 1;
        let (number, other) = (self.sent, self.rng.random_range(0..USERS));
        let to = if self.chance(50) { Peer::Group(other % GROUPS) } else { Peer::User(other) };
        let body = format!("{}.{} signals {number}", self.name.user, self.name.number);
        self.note(Happening::Signalled { number, to, body: body.clone() });
        // Not sent without a connection, and nobody hears it then.
        let _ = client.signal(observed::name(to).as_str(), SIGNAL_KIND, body);
    }

    /// Edits, takes back or deletes something, mostly what it may.
    fn amend(&mut self, client: &Client, sends: &mut JoinSet<Ended>) {
        let Some((to, of, by)) = self.any_message() else { return };
        self.sent += 1;
        let (number, what) = (self.sent, self.rng.random_range(0..6));
        let own_group = to == Peer::Group(self.name.user);
        let what = match what {
            0..3 if by == self.name.user => State::Edited,
            3 if by == self.name.user => State::Recalled,
            _ if by == self.name.user || own_group => State::Deleted,
            0 => State::Edited,
            _ => return,
        };
        let edits = what == State::Edited;
        let body =
            if edits { format!("{}.{} edits {number}", self.name.user, self.name.number) } else { String::new() };
        self.note(Happening::Amended { number, to, of, what, body: body.clone() });
        let (with, seq) = (observed::name(to), Seq(of.seq));
        let sending = match what {
            State::Edited => client.edit(with.as_str(), seq, body),
            State::Recalled => client.recall(with.as_str(), seq),
            State::Deleted | State::AsSent | State::Hidden => client.delete_for_all(with.as_str(), seq),
        };
        self.await_end(number, sending, sends);
    }

    fn await_end(&mut self, number: u64, sending: Sending, sends: &mut JoinSet<Ended>) {
        let gauges = &self.parts.1;
        gauges.open_sends.fetch_add(1, Ordering::Relaxed);
        let room = gauges.room.load(Ordering::Relaxed);
        sends.spawn(async move { (number, room, sending.await) });
        self.open.insert(number);
    }

    fn send(&mut self, client: &Client, sends: &mut JoinSet<Ended>) {
        if self.chance(SIGNAL_PERCENT) {
            self.signal(client);
        }
        let full = self.parts.1.full.load(Ordering::Relaxed);
        if !full && self.chance(AMEND_PERCENT) {
            return self.amend(client, sends);
        }
        self.sent += 1;
        let number = self.sent;
        let to = match self.rng.random_range(0..100) < GROUP_PERCENT {
            true => Peer::Group(self.rng.random_range(0..GROUPS)),
            false => Peer::User(self.rng.random_range(0..USERS)),
        };
        let padding = if self.rng.random_range(0..50) == 0 { self.rng.random_range(100..4_000) } else { 0 };
        let body = format!("{}.{} says {number} {}", self.name.user, self.name.number, "x".repeat(padding));
        let transient = self.chance(TRANSIENT_PERCENT);
        let durable = !transient;
        self.note(Happening::Sent { number, to, body: body.clone(), durable });
        let class = if durable { Class::Durable } else { Class::Transient };
        // While the disk is full nothing else would end, and an application waits with more when so much is open.
        let give_up_after = if full { Some(HASTE_FULL) } else { self.chance(HASTY_PERCENT).then_some(HASTE) };
        let options = SendOptions { class, give_up_after, ..self.mentions((class, to)) };
        if let Some(mentioned) = observed::mentioned(number, &options) {
            self.note(mentioned);
        }
        let sending = client.send_with(observed::name(to).as_str(), body, options);
        self.await_end(number, sending, sends);
    }

    /// Whom a message mentions, mostly nobody.
    fn mentions(&mut self, (class, to): (Class, Peer)) -> SendOptions {
        let mut options = SendOptions::default();
        if class == Class::Durable && self.chance(MENTIONS_PERCENT) {
            options.mentions = vec![observed::name(Peer::User(self.rng.random_range(0..USERS)))];
            options.mention_all = matches!(to, Peer::Group(_)) && self.chance(MENTIONS_PERCENT);
        }
        options
    }

    fn ended(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        let Ok((number, room, result)) = ended else { return };
        match &result {
            Ok(accepted) if accepted.seq > Seq::ZERO => {
                self.parts.1.accepted_in.fetch_max(room, Ordering::Relaxed);
            }
            Err(SendError::Refused { code: ErrorCode::DiskFull, .. }) => {
                self.parts.1.refused_full.fetch_add(1, Ordering::Relaxed);
            }
            Ok(_) | Err(_) => {}
        }
        self.parts.1.open_sends.fetch_sub(1, Ordering::Relaxed);
        self.open.remove(&number);
        self.note(observed::end_of_send(number, result));
    }
}
