//! A simulated device: the SDK's own machine, an application that takes its time, and what both have seen.
//!
//! Owned by the world, which moves its bytes. Invariants: everything that the application sends and sees is in the
//! history, in order; a body is used once; a process that is started anew knows nothing of the one before, but counts
//! its sends from a higher number.

use std::collections::{BTreeMap, VecDeque};

use ringline_client::machine::{Finished, Machine, MachineConfig};
use ringline_client::{
    CatchUp, Class, DeviceId, DeviceKind, Event, HistoryRange, Message, Outcome, SendError, SendOptions, Seq, UserName,
};
use ringline_schema::codec::{decode_reply, decode_request};
use ringline_schema::frame::FrameDecoder;
use ringline_schema::limits;
use ringline_schema::message::{Reply, Request};

use crate::checker::{Device as Name, Happening, History, Place, Shown};

/// Unix microseconds at which the simulation begins.
pub const EPOCH_US: u64 = 1_700_000_000_000_000;
/// Events that may wait for a simulated application.
const EVENTS_QUEUED_MAX: usize = 64;

/// Names of users are their numbers.
pub fn user_name(user: u32) -> UserName {
    UserName::new(&format!("user-{user}")).expect("a plain name")
}

fn user_number(name: &UserName) -> u32 {
    name.as_str().strip_prefix("user-").and_then(|number| number.parse().ok()).unwrap_or(u32::MAX)
}

/// A conversation that is read back, page by page.
#[derive(Default)]
pub struct Reading {
    with: VecDeque<u32>,
    messages: Vec<Shown>,
    first: u64,
}

/// Listens on one connection, before the SDK's filters: what is pushed, and which sends are refused for a while.
#[derive(Default)]
pub struct Tap {
    from_client: FrameDecoder,
    from_server: FrameDecoder,
    /// Sends without an answer: request id → client_seq.
    asked: BTreeMap<u32, u64>,
}

/// See the module.
pub struct Device {
    pub name: Name,
    pub machine: Machine,
    /// Rises with each process.
    pub process: u32,
    pub link: Option<u64>,
    /// Failed connections in a row.
    pub attempts: u32,
    /// Events that the application has not taken.
    pub inbox: VecDeque<Event>,
    /// Taken by nobody before this moment: the application is slow, or hangs.
    pub stalled_until_us: u64,
    /// When the machine is woken next; 0: not planned.
    pub wake_us: u64,
    pub taking: bool,
    pub open_sends: u32,
    bodies: u64,
    pub reading: Option<Reading>,
}

impl Device {
    pub fn new(name: Name) -> Self {
        Self {
            name,
            machine: machine(name, 0),
            process: 0,
            link: None,
            attempts: 0,
            inbox: VecDeque::new(),
            stalled_until_us: 0,
            wake_us: 0,
            taking: false,
            open_sends: 0,
            bodies: 0,
            reading: None,
        }
    }

    /// A new process of the same device. Its connection is gone with the old one.
    pub fn restart(&mut self, now_us: u64, history: &mut History) {
        let (name, process, bodies) = (self.name, self.process + 1, self.bodies);
        *self = Self { machine: machine(name, now_us), process, bodies, ..Self::new(name) };
        history.push(name, Happening::Started);
    }

    /// The application sends something.
    pub fn send(&mut self, (now_ms, to): (u64, u32), (options, padding): (SendOptions, usize), history: &mut History) {
        self.bodies += 1;
        let body = format!("{}.{} says {} {}", self.name.user, self.name.number, self.bodies, "x".repeat(padding));
        let durable = options.class == Class::Durable;
        if let Ok(number) = self.machine.send(now_ms, (user_name(to), body.clone().into()), options) {
            self.open_sends += 1;
            history.push(self.name, Happening::Sent { number, to, body, durable });
        }
    }

    /// The application takes up to `count` events.
    pub fn take(&mut self, count: usize, history: &mut History) {
        for _ in 0..count {
            let Some(event) = self.inbox.pop_front() else { return };
            // The rest is told again or can be asked for: no promise of a stream.
            if let Event::Message(message) = &event {
                history.push(self.name, Happening::Saw(shown(message)));
            } else if let Event::Skipped { conversation, to, .. } = &event {
                let place = Place { conversation: conversation.0, seq: to.0 };
                history.push(self.name, Happening::Skipped(place));
            }
            self.machine.take(&event);
        }
    }

    /// Takes in what the machine has finished.
    pub fn finish(&mut self, now_ms: u64, history: &mut History) {
        for finished in self.machine.take_finished() {
            match finished {
                Finished::Sent(number, result) => {
                    self.open_sends = self.open_sends.saturating_sub(1);
                    history.push(self.name, end_of_send(number, result));
                }
                Finished::Delivered(number, Ok(delivery)) if delivery.outcome == Outcome::Delivered => {
                    history.push(self.name, Happening::Delivered { number });
                }
                Finished::Delivered(..) => {}
                Finished::History(_, Ok(page)) => self.read_page(now_ms, page, history),
                Finished::History(_, Err(_)) => self.read_next(now_ms, Seq::ZERO),
            }
        }
    }

    /// Begins to read back the conversations with these users.
    pub fn read_back(&mut self, now_ms: u64, with: impl Iterator<Item = u32>) {
        self.reading = Some(Reading { with: with.collect(), messages: Vec::new(), first: 0 });
        self.read_next(now_ms, Seq::ZERO);
    }

    fn read_next(&mut self, now_ms: u64, after: Seq) {
        let Some(reading) = &mut self.reading else { return };
        let Some(&with) = reading.with.front() else {
            self.reading = None;
            return;
        };
        // Both ways of turning pages are used; small ones, so that there are several.
        let range = HistoryRange { after, before: None, limit: 20, newest: false };
        // Only one is open at a time, so the queue is never full.
        let _ = self.machine.history(now_ms, user_name(with), range);
    }

    fn read_page(&mut self, now_ms: u64, page: ringline_client::History, history: &mut History) {
        let Some(reading) = &mut self.reading else { return };
        reading.first = page.first.0;
        let last = page.messages.last().map(|message| message.seq);
        reading.messages.extend(page.messages.iter().map(shown));
        if let Some(last) = last {
            return self.read_next(now_ms, last);
        }
        let messages = std::mem::take(&mut reading.messages);
        let (conversation, first, head) = (page.conversation.0, reading.first, page.head.0);
        history.push(self.name, Happening::ReadBack { conversation, first, head, messages });
        reading.with.pop_front();
        self.read_next(now_ms, Seq::ZERO);
    }
}

fn machine(name: Name, now_us: u64) -> Machine {
    Machine::new(MachineConfig {
        user: user_name(name.user),
        device: DeviceId(name.number),
        device_kind: DeviceKind::Other,
        catch_up: CatchUp::All,
        sends_queued_max: 128,
        events_queued_max: EVENTS_QUEUED_MAX,
        first_client_seq: EPOCH_US + now_us,
    })
}

fn end_of_send(number: u64, result: Result<ringline_client::Accepted, SendError>) -> Happening {
    match result {
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

impl Tap {
    /// Bytes that the client wrote.
    pub fn wrote(&mut self, mut bytes: &[u8]) {
        while let Ok(Some(frame)) = self.from_client.next(&mut bytes, limits::FRAME_BYTES_CEILING) {
            if let Ok(Request::Send(send)) = decode_request(&frame.header, frame.body) {
                self.asked.insert(frame.header.request_id, send.client_seq);
            }
        }
    }

    /// The connection is gone, and with it the answers to these.
    pub fn lost(&self, device: Name, history: &mut History) {
        for &number in self.asked.values() {
            history.push(device, Happening::Passed { number });
        }
    }

    /// Bytes that reached the client.
    pub fn reached(&mut self, (device, connection): (Name, u64), mut bytes: &[u8], history: &mut History) {
        while let Ok(Some(frame)) = self.from_server.next(&mut bytes, limits::FRAME_BYTES_CEILING) {
            match decode_reply(&frame.header, frame.body) {
                Ok(Reply::Deliver(message)) if message.seq > Seq::ZERO => {
                    let place = Place { conversation: message.conversation.0, seq: message.seq.0 };
                    history.push(device, Happening::Pushed { connection, place });
                }
                Ok(Reply::Deliver(message)) => {
                    let body = String::from_utf8_lossy(message.body).into_owned();
                    history.push(device, Happening::Arrived { body });
                }
                Ok(Reply::Failure { code, .. }) if code.retryable() => {
                    if let Some(number) = self.asked.remove(&frame.header.request_id) {
                        history.push(device, Happening::Passed { number });
                    }
                }
                Ok(Reply::SendAck(_)) => {
                    self.asked.remove(&frame.header.request_id);
                }
                _ => {}
            }
        }
    }
}
