//! The clients of a round: a few users with a few devices each, SDK clients that send to each other and write down what
//! they see.
//!
//! One task a device. Invariants: a body is used once; a process of a device ends with an end of each of its sends;
//! what was handed to the application is in the record before the next event is asked for.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use ringline_client::{
    Accepted, Class, Client, ClientBuilder, DeviceId, Event, Events, HistoryRange, Message, SendError, SendOptions,
    Seq, UserName,
};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{interval, sleep};

use super::{Record, failed, with_history};
use crate::Failure;
use crate::checker::{Device, Happening, Place, Shown};
use crate::token::Issuer;

const USERS: u32 = 6;
const DEVICES_PER_USER: u64 = 2;
/// The number of the device that reads logs back.
const READER: u64 = 99;
/// Sends without an answer a device: few enough that none is refused for their number.
const OPEN_SENDS_MAX: usize = 16;
const SEND_EVERY: Duration = Duration::from_millis(20);
/// A client that would wait longer than this to reconnect is replaced by a new process of its device.
const PATIENCE: Duration = Duration::from_millis(600);
const BETWEEN_TRIES: Duration = Duration::from_millis(50);
/// Chance in percent that a send is transient.
const TRANSIENT_PERCENT: u32 = 10;

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
}

/// See the module.
pub struct Traffic {
    devices: Vec<JoinHandle<()>>,
    gauges: Arc<Gauges>,
    record: Record,
}

fn user_name(user: u32) -> String {
    format!("user-{user}")
}

fn user_number(name: &UserName) -> u32 {
    name.as_str().strip_prefix("user-").and_then(|number| number.parse().ok()).unwrap_or(u32::MAX)
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
                devices.push(tokio::spawn(Life { name, builder, rng, sent: 0, parts }.live()));
            }
        }
        Ok(Self { devices, gauges, record })
    }

    pub fn open_sends(&self) -> i64 {
        self.gauges.open_sends.load(Ordering::Relaxed)
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

    /// Reads every conversation back, as each of its users. Errors: a page can't be had.
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
            for with in 0..USERS {
                let happening = read_log(&client, &user_name(with)).await?;
                with_history(&self.record, |history| history.push(Device { user, number: READER }, happening));
            }
            client.close(Duration::from_secs(1)).await;
        }
        Ok(())
    }
}

async fn read_log(client: &Client, with: &str) -> Result<Happening, Failure> {
    let mut messages = Vec::new();
    let mut after = Seq::ZERO;
    loop {
        let range = HistoryRange { after, before: None, limit: 200, newest: false };
        let page = client.history(with, range).await.map_err(|error| failed("a log can't be read back", &error))?;
        messages.extend(page.messages.iter().map(shown));
        match page.messages.last() {
            Some(last) => after = last.seq,
            None => {
                let (conversation, first, head) = (page.conversation.0, page.first.0, page.head.0);
                return Ok(Happening::ReadBack { conversation, first, head, messages });
            }
        }
    }
}

fn shown(message: &Message) -> Shown {
    Shown {
        place: Place { conversation: message.conversation.0, seq: message.seq.0 },
        from: user_number(&message.from),
        to: user_number(&message.to),
        device: message.device.0,
        client_seq: message.client_seq,
        body: message.text().into_owned(),
    }
}

type Ended = (u64, Result<Accepted, SendError>);

/// One device, over all its processes.
struct Life {
    name: Device,
    builder: ClientBuilder,
    rng: SmallRng,
    sent: u64,
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
        let mut ticks = interval(SEND_EVERY);
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
                _ = ticks.tick() => {
                    if self.phase() == Phase::Load && sends.len() < OPEN_SENDS_MAX {
                        self.send(client, sends);
                    }
                }
            }
        }
    }

    /// Takes an event in; false: the process is to end.
    fn event(&self, event: Event) -> bool {
        if let Event::Message(message) = &event {
            self.note(Happening::Saw(shown(message)));
        } else if let Event::Skipped { conversation, to, .. } = &event {
            self.note(Happening::Skipped(Place { conversation: conversation.0, seq: to.0 }));
        }
        let waits_long = matches!(event, Event::Reconnecting { delay, .. } if delay > PATIENCE);
        !waits_long && !matches!(event, Event::Closed { .. })
    }

    fn send(&mut self, client: &Client, sends: &mut JoinSet<Ended>) {
        self.sent += 1;
        let (number, to) = (self.sent, self.rng.random_range(0..USERS));
        let padding = if self.rng.random_range(0..50) == 0 { self.rng.random_range(100..4_000) } else { 0 };
        let body = format!("{}.{} says {number} {}", self.name.user, self.name.number, "x".repeat(padding));
        let durable = self.rng.random_range(0..100) >= TRANSIENT_PERCENT;
        self.note(Happening::Sent { number, to, body: body.clone(), durable });
        let class = if durable { Class::Durable } else { Class::Transient };
        let sending = client.send_with(&user_name(to), body, SendOptions { class, ..SendOptions::default() });
        self.parts.1.open_sends.fetch_add(1, Ordering::Relaxed);
        sends.spawn(async move { (number, sending.await) });
    }

    fn ended(&self, ended: Result<Ended, tokio::task::JoinError>) {
        let Ok((number, result)) = ended else { return };
        self.parts.1.open_sends.fetch_sub(1, Ordering::Relaxed);
        self.note(match result {
            Ok(accepted) => {
                let place = Place { conversation: accepted.conversation.0, seq: accepted.seq.0 };
                Happening::Accepted { number, place }
            }
            Err(SendError::Unknown) => Happening::Unknown { number },
            Err(
                SendError::Refused { .. }
                | SendError::NotSent
                | SendError::QueueFull
                | SendError::BadName
                | SendError::BodyTooLarge { .. }
                | SendError::DeliveryNotAsked,
            ) => Happening::Refused { number },
        });
    }
}
