//! The client without its shell, for a simulator or a runtime of one's own: bytes, commands and the time go in; bytes,
//! events and results come out. [`Client`](crate::Client) drives the same machine.
//!
//! Owned by whoever made it; no thread, clock, socket or randomness. Time is in milliseconds since any fixed moment.
//! Call [`Machine::advance`] before every wait and no later than [`Machine::next_wake`], then take output, events and
//! results.

use std::time::Duration;

use bytes::Bytes;
use ringline_schema::ids::{DeviceId, UserName};
use ringline_schema::message::{Credential, DeviceKind, Secret};

use crate::pending::{
    Accepted, Answer, CallError, Delivery, Done, History, HistoryRange, Outgoing, Query, SendError, SendOptions,
};
pub use crate::session::Cut;
use crate::session::{Config, Event, Session};
use crate::streams::{CatchUp, Taken};

/// Who a machine is.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    pub user: UserName,
    pub device: DeviceId,
    pub device_kind: DeviceKind,
    pub catch_up: CatchUp,
    /// As [`ClientBuilder::sends_queued_max`](crate::ClientBuilder::sends_queued_max).
    pub sends_queued_max: usize,
    /// As [`ClientBuilder::events_queued_max`](crate::ClientBuilder::events_queued_max).
    pub events_queued_max: usize,
    /// Above every number that this device has used before.
    pub first_client_seq: u64,
}

/// The end of something that was asked for, by the number that asking gave.
#[derive(Debug)]
pub enum Finished {
    Sent(u64, Result<Accepted, SendError>),
    Delivered(u64, Result<Delivery, SendError>),
    History(u64, Result<History, CallError>),
}

/// See the module.
pub struct Machine {
    session: Session,
    taken: Taken,
}

impl Machine {
    pub fn new(config: MachineConfig) -> Self {
        let MachineConfig { user, device, device_kind, catch_up, sends_queued_max, events_queued_max, .. } = config;
        let session = Session::new(Config {
            user,
            device,
            device_kind,
            agent: "ringline-machine".to_owned(),
            catch_up,
            sends_queued_max,
            events_queued_max,
            first_client_seq: config.first_client_seq,
        });
        Self { session, taken: Taken::default() }
    }

    /// Numbers a send: its client_seq. Errors: `QueueFull` keeps nothing.
    pub fn send(&mut self, now_ms: u64, (to, body): (UserName, Bytes), options: SendOptions) -> Result<u64, SendError> {
        self.session.send(now_ms, Outgoing { to, body, options, amends: None })
    }

    /// Asks for a piece of a conversation. Errors: `QueueFull` asks nothing.
    pub fn history(&mut self, now_ms: u64, with: UserName, range: HistoryRange) -> Result<u64, CallError> {
        const PATIENCE: Duration = Duration::from_secs(60);
        self.session.call(now_ms, Query::History { with, range }, PATIENCE)
    }

    /// The application is done with an event; acknowledged at the next [`Machine::advance`] or a little later.
    pub fn take(&mut self, event: &Event) {
        self.taken.events += 1;
        if let Event::Message(message) = event
            && message.seq.0 > 0
        {
            let upto = self.taken.upto.entry(message.conversation).or_default();
            *upto = (*upto).max(message.seq);
        }
    }

    /// A connection stands: the login is the first output.
    pub fn connected(&mut self, now_ms: u64, token: &str) {
        self.session.connected(now_ms, Credential::Token(Secret(token)));
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        self.session.disconnected();
    }

    /// Bytes came. Errors: the connection must end.
    pub fn received(&mut self, now_ms: u64, bytes: &[u8]) -> Result<(), Cut> {
        self.session.received(now_ms, bytes)
    }

    /// Does what is due. Errors: the connection must end.
    pub fn advance(&mut self, now_ms: u64) -> Result<(), Cut> {
        if self.taken.events > 0 {
            self.session.taken(now_ms, std::mem::take(&mut self.taken));
        }
        self.session.advance(now_ms)
    }

    /// When [`Machine::advance`] next has something to do by itself.
    pub fn next_wake(&self, now_ms: u64) -> Option<u64> {
        self.session.next_wake(now_ms)
    }

    /// Moves the bytes to write to the end of `out`.
    pub fn take_output(&mut self, out: &mut Vec<u8>) {
        self.session.take_output(out);
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        self.session.take_events()
    }

    pub fn take_finished(&mut self) -> Vec<Finished> {
        let finished = |done| match done {
            Done::Sent(number, result) => Some(Finished::Sent(number, result)),
            Done::Delivered(number, result) => Some(Finished::Delivered(number, result)),
            Done::Answered(number, Ok(Answer::History(history))) => Some(Finished::History(number, Ok(history))),
            Done::Answered(number, Err(error)) => Some(Finished::History(number, Err(error))),
            // Only histories can be asked for.
            Done::Answered(_, Ok(_)) => None,
        };
        self.session.take_done().into_iter().filter_map(finished).collect()
    }

    pub fn is_online(&self) -> bool {
        self.session.is_online()
    }
}
