//! A simulated device: the SDK's own machine, an application that takes its time, and what both have seen.
//!
//! Owned by the world, which moves its bytes. Invariants: everything that the application sends and sees is in the
//! history, in order; a body is used once; a process that is started anew knows nothing of the one before, but counts
//! its sends from a higher number.

use std::collections::{BTreeMap, VecDeque};

use ringline_client::machine::{Finished, Machine, MachineConfig};
use ringline_client::{CatchUp, Class, DeviceId, DeviceKind, Event, Outcome, SendOptions, Seq, UserName};
use ringline_schema::codec::{decode_reply, decode_request};
use ringline_schema::frame::FrameDecoder;
use ringline_schema::limits;
use ringline_schema::message::chat::{Amend, AmendAction, PresenceRow, SIGNAL_APPLICATION};
use ringline_schema::message::{ChatReply, ChatRequest, Reply, Request};

use super::asked::Asked;
use crate::checker::{Device as Name, Happening, History, Peer, Place, Presence, State};
use crate::observed;

/// Unix microseconds at which the simulation begins.
pub const EPOCH_US: u64 = 1_700_000_000_000_000;
/// Events that may wait for a simulated application.
const EVENTS_QUEUED_MAX: usize = 64;

/// Listens on one connection, before the SDK's filters: what is pushed, and which sends are refused for a while.
#[derive(Default)]
pub struct Tap {
    from_client: FrameDecoder,
    from_server: FrameDecoder,
    /// Sends without an answer: request id → client_seq.
    asked: BTreeMap<u32, u64>,
    /// Notices that were written, not yet taken note of.
    notices: Vec<String>,
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
    /// Stays without a connection.
    pub away: bool,
    /// Its user is deleted, as it was told.
    pub gone: bool,
    pub open_sends: u32,
    bodies: u64,
    /// What the application has asked beside its sends.
    pub asked: Asked,
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
            away: false,
            gone: false,
            open_sends: 0,
            bodies: 0,
            asked: Asked::default(),
        }
    }

    /// A new process of the same device. Its connection is gone with the old one.
    pub fn restart(&mut self, now_us: u64, history: &mut History) {
        let (name, process, bodies, gone) = (self.name, self.process + 1, self.bodies, self.gone);
        *self = Self { machine: machine(name, now_us), process, bodies, gone, ..Self::new(name) };
        history.push(name, Happening::Started);
    }

    /// The application sends something.
    pub fn send(&mut self, (now_ms, to): (u64, Peer), (options, padding): (SendOptions, usize), history: &mut History) {
        self.bodies += 1;
        let body = format!("{}.{} says {} {}", self.name.user, self.name.number, self.bodies, "x".repeat(padding));
        let durable = options.class == Class::Durable;
        let mentions = options.clone();
        if let Ok(number) = self.machine.send(now_ms, (observed::name(to), body.clone().into()), options) {
            self.open_sends += 1;
            history.push(self.name, Happening::Sent { number, to, body, durable });
            if let Some(mentioned) = observed::mentioned(number, &mentions) {
                history.push(self.name, mentioned);
            }
        }
    }

    /// A number for a body that nothing else of this device has.
    pub(super) fn next_body(&mut self) -> u64 {
        self.bodies += 1;
        self.bodies
    }

    /// The application edits a message, takes it back, or deletes it for all.
    pub fn amend(&mut self, now_ms: u64, (with, of): (Peer, Place), action: AmendAction, history: &mut History) {
        let what = match action {
            AmendAction::Edit => State::Edited,
            AmendAction::Recall => State::Recalled,
            AmendAction::DeleteForAll => State::Deleted,
            AmendAction::DeleteForMe => return self.hide(now_ms, (with, of), history),
        };
        self.bodies += 1;
        let edits = what == State::Edited;
        let body = if edits {
            format!("{}.{} edits {}", self.name.user, self.name.number, self.bodies)
        } else {
            String::new()
        };
        let (to, message) = (with, (observed::name(with), Seq(of.seq)));
        if let Ok(number) = self.machine.amend(now_ms, message, (action, body.clone().into())) {
            self.open_sends += 1;
            history.push(self.name, Happening::Amended { number, to, of, what, body });
        }
    }

    /// The application signals something of its own; without a connection nobody hears it.
    pub fn signal(&mut self, now_ms: u64, to: Peer, history: &mut History) {
        if self.machine.is_online() {
            self.bodies += 1;
            let (number, body) =
                (self.bodies, format!("{}.{} signals {}", self.name.user, self.name.number, self.bodies));
            self.machine.signal(now_ms, observed::name(to), (SIGNAL_APPLICATION, body.clone().into()));
            history.push(self.name, Happening::Signalled { number, to, body });
        }
    }

    /// The application takes up to `count` events.
    pub fn take(&mut self, count: usize, history: &mut History) {
        for _ in 0..count {
            let Some(event) = self.inbox.pop_front() else { return };
            for happening in observed::happenings(&event) {
                if let Happening::Saw(shown) = &happening {
                    self.asked.memory.saw(self.name.user, shown);
                }
                history.push(self.name, happening);
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
                    history.push(self.name, observed::end_of_send(number, result));
                }
                Finished::Delivered(number, Ok(delivery)) if delivery.outcome == Outcome::Delivered => {
                    history.push(self.name, Happening::Delivered { number });
                }
                Finished::Delivered(..) => {}
                Finished::Answered(number, answer) => self.answered(now_ms, (number, answer), history),
            }
        }
    }
}

fn machine(name: Name, now_us: u64) -> Machine {
    Machine::new(MachineConfig {
        user: observed::name(Peer::User(name.user)),
        device: DeviceId(name.number),
        device_kind: DeviceKind::Other,
        catch_up: CatchUp::All,
        sends_queued_max: 128,
        events_queued_max: EVENTS_QUEUED_MAX,
        first_client_seq: EPOCH_US + now_us,
    })
}

fn presence(row: &PresenceRow<'_>, connection: u64, pushed: bool) -> Happening {
    let user = UserName::new(row.user).map_or(u32::MAX, |name| observed::user(&name));
    let (online, last_seen_ms, status) = (row.online, row.last_seen_ms, row.status.to_owned());
    Happening::PresenceShown { connection, presence: Presence { user, online, last_seen_ms, status }, pushed }
}

impl Tap {
    /// Bytes that the client wrote.
    pub fn wrote(&mut self, mut bytes: &[u8]) {
        while let Ok(Some(frame)) = self.from_client.next(&mut bytes, limits::FRAME_BYTES_CEILING) {
            let client_seq = match decode_request(&frame.header, frame.body) {
                Ok(Request::Send(send)) => send.client_seq,
                Ok(Request::Chat(ChatRequest::Amend(Amend { action, client_seq, .. })))
                    if action != AmendAction::DeleteForMe =>
                {
                    client_seq
                }
                Ok(Request::Chat(ChatRequest::Broadcast { body, .. })) => {
                    self.notices.push(String::from_utf8_lossy(body).into_owned());
                    continue;
                }
                _ => continue,
            };
            self.asked.insert(frame.header.request_id, client_seq);
        }
    }

    /// Notices to everyone that were written since the last call.
    pub fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
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
                Ok(Reply::Chat(ChatReply::PresenceOk { users })) => {
                    users.iter().for_each(|row| history.push(device, presence(row, connection, false)));
                }
                Ok(Reply::Chat(ChatReply::PresenceChanged { users })) => {
                    users.iter().for_each(|row| history.push(device, presence(row, connection, true)));
                }
                Ok(Reply::LoginOk(_)) => history.push(device, Happening::LoggedIn { connection }),
                Ok(Reply::SendAck(_)) => {
                    self.asked.remove(&frame.header.request_id);
                }
                _ => {}
            }
        }
    }
}
