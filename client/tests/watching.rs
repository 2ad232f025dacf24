//! Whom a client watches on its next connection: those it watches, and nobody whom it has looked away from.

use ringline_client::machine::{Ask, Finished, Machine, MachineConfig};
use ringline_client::{CatchUp, DeviceId, DeviceKind, UserName};
use ringline_schema::codec::{Codec, Encoder, decode_request};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::message::chat::PresenceRow;
use ringline_schema::message::{ChatReply, ChatRequest, LoginOk, Place, Reply, Request};

const USER: &str = "bob";

/// A client and the server's end of its connection, which answers watching only when it is told to.
struct Talk {
    machine: Machine,
    now_ms: u64,
    watches: Vec<u32>,
    unwatches: Vec<u32>,
}

impl Talk {
    fn new() -> Self {
        let machine = Machine::new(MachineConfig {
            user: UserName::new("ann").unwrap(),
            device: DeviceId(1),
            device_kind: DeviceKind::Other,
            catch_up: CatchUp::All,
            sends_queued_max: 8,
            events_queued_max: 64,
            first_client_seq: 1,
        });
        Self { machine, now_ms: 1, watches: Vec::new(), unwatches: Vec::new() }
    }

    fn answer(&mut self, request_id: u32, reply: &Reply<'_>) {
        let mut bytes = Vec::new();
        Encoder::new().reply(Codec::FlatBuffers, request_id, reply, &mut bytes);
        self.machine.received(self.now_ms, &bytes).unwrap();
    }

    /// Takes what the client asks, and answers what it is not about.
    fn go_on(&mut self) {
        loop {
            self.machine.advance(self.now_ms).unwrap();
            let (mut bytes, mut decoder) = (Vec::new(), FrameDecoder::new());
            self.machine.take_output(&mut bytes);
            if bytes.is_empty() {
                return;
            }
            let mut input = &bytes[..];
            while let Some(frame) = decoder.next(&mut input, u32::MAX).unwrap() {
                let id = frame.header.request_id;
                match decode_request(&frame.header, frame.body).unwrap() {
                    Request::Login(_) => self.log_in(id),
                    Request::Chat(ChatRequest::Sync(_)) => {
                        let next = Place::default();
                        self.answer(id, &Reply::Chat(ChatReply::SyncOk { messages: Vec::new(), next }));
                    }
                    Request::Chat(ChatRequest::Watch { .. }) => self.watches.push(id),
                    Request::Chat(ChatRequest::Unwatch { .. }) => self.unwatches.push(id),
                    other => panic!("not expected: {other:?}"),
                }
            }
        }
    }

    fn log_in(&mut self, id: u32) {
        let ok = LoginOk {
            user: "ann",
            session: 1,
            server_time_ms: 0,
            ping_interval_ms: 20_000,
            idle_timeout_ms: 60_000,
            frame_bytes_max: 4_096,
            sends_in_flight_max: 8,
        };
        self.answer(id, &Reply::LoginOk(ok));
    }

    fn connect(&mut self) {
        self.machine.disconnected();
        (self.watches, self.unwatches) = (Vec::new(), Vec::new());
        self.machine.connected(self.now_ms, "token");
        self.go_on();
    }

    fn ask(&mut self, ask: Ask) {
        self.machine.ask(self.now_ms, ask).unwrap();
        self.go_on();
    }

    fn look_away_done(&mut self) {
        for id in std::mem::take(&mut self.unwatches) {
            self.answer(id, &Reply::Chat(ChatReply::Done));
        }
        self.go_on();
    }

    /// Refuses whatever is not answered, and lets more time pass than anybody waits then.
    fn refuse(&mut self) {
        for id in std::mem::take(&mut self.watches).into_iter().chain(std::mem::take(&mut self.unwatches)) {
            self.answer(id, &Reply::Failure { code: ErrorCode::Busy, retry_after_ms: 50, detail: "" });
        }
        self.now_ms += 1_000;
        self.go_on();
    }

    /// Calls that have ended well since the last look.
    fn ended(&mut self) -> usize {
        let ended = self.machine.take_finished();
        ended.into_iter().filter(|finished| matches!(finished, Finished::Answered(_, Ok(_)))).count()
    }

    fn tell_presence(&mut self) {
        for id in std::mem::take(&mut self.watches) {
            let users = vec![PresenceRow { user: USER, online: true, last_seen_ms: 1, status: "" }];
            self.answer(id, &Reply::Chat(ChatReply::PresenceOk { users }));
        }
        self.go_on();
    }
}

#[test]
fn who_looks_away_while_there_is_no_connection_is_not_made_to_watch_by_the_next() {
    let users = || vec![UserName::new(USER).unwrap()];
    let mut talk = Talk::new();
    talk.connect();
    talk.ask(Ask::Watch(users()));
    talk.tell_presence();
    talk.machine.disconnected();
    talk.machine.ask(1, Ask::Unwatch(users())).unwrap();
    talk.connect();
    assert_eq!((talk.watches.len(), talk.unwatches.len()), (0, 1));
}

#[test]
fn who_has_looked_away_watches_nobody_again_though_an_older_answer_comes_later() {
    let users = || vec![UserName::new(USER).unwrap()];
    let mut talk = Talk::new();
    talk.connect();
    talk.ask(Ask::Watch(users()));
    talk.tell_presence();
    talk.connect();
    assert_eq!(talk.watches.len(), 1, "what was watched is watched again");
    talk.ask(Ask::Unwatch(users()));
    let id = talk.unwatches.pop().unwrap();
    talk.answer(id, &Reply::Chat(ChatReply::Done));
    // Asked before, answered later: it had to wait for somebody.
    talk.tell_presence();
    talk.connect();
    assert!(talk.watches.is_empty(), "it has looked away since");
}

fn bob() -> Vec<UserName> {
    vec![UserName::new(USER).unwrap()]
}

#[test]
fn the_last_word_counts_when_both_are_under_way_in_whatever_order_they_are_answered() {
    for watch_is_last in [false, true] {
        for watch_is_answered_last in [false, true] {
            let mut talk = Talk::new();
            talk.connect();
            let (first, second) = if watch_is_last {
                (Ask::Unwatch(bob()), Ask::Watch(bob()))
            } else {
                (Ask::Watch(bob()), Ask::Unwatch(bob()))
            };
            talk.ask(first);
            talk.ask(second);
            assert_eq!((talk.watches.len(), talk.unwatches.len()), (1, 1));
            if watch_is_answered_last {
                talk.look_away_done();
                talk.tell_presence();
            } else {
                talk.tell_presence();
                talk.look_away_done();
            }
            assert_eq!(talk.ended(), 2);
            talk.connect();
            assert_eq!((talk.watches.len(), talk.unwatches.len()), (usize::from(watch_is_last), 0));
        }
    }
}

#[test]
fn what_was_overruled_is_not_asked_again_after_a_refusal_or_on_another_connection() {
    for watch_is_last in [false, true] {
        let asks = if watch_is_last { [Ask::Unwatch, Ask::Watch] } else { [Ask::Watch, Ask::Unwatch] };
        let last = (usize::from(watch_is_last), usize::from(!watch_is_last));
        for cut in [false, true] {
            let mut talk = Talk::new();
            talk.connect();
            asks.iter().for_each(|ask| talk.ask(ask(bob())));
            if cut {
                talk.connect();
            } else {
                talk.refuse();
            }
            assert_eq!((talk.watches.len(), talk.unwatches.len()), last, "only the last word is asked again");
            assert_eq!(talk.ended(), 1, "and the other has ended");
            talk.look_away_done();
            talk.tell_presence();
            talk.connect();
            assert_eq!((talk.watches.len(), talk.unwatches.len()), (last.0, 0));
        }
    }
}

#[test]
fn the_others_of_a_call_are_still_watched() {
    let mut talk = Talk::new();
    talk.connect();
    talk.ask(Ask::Watch(["bob", "carl"].map(|name| UserName::new(name).unwrap()).to_vec()));
    talk.ask(Ask::Unwatch(bob()));
    talk.refuse();
    assert_eq!((talk.watches.len(), talk.unwatches.len()), (1, 1), "for carl, and for bob");
}
