//! One client against scripted replies: what it sends, when, and what it counts.

use super::*;
use crate::check::Verdict;
use crate::plan::Scenario;
use crate::plan::tests::plan;
use ringline_schema::codec::decode_request;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::ConversationId;
use ringline_schema::message::{Extra, KickReason};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
const CONVERSATION: ConversationId = ConversationId(9);
const CLOSED: Pace = Pace::Closed { window: 2 };

/// A SEND as the server would see it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    id: u32,
    to: String,
    client_seq: u64,
    body: Vec<u8>,
}

struct Rig {
    plan: Plan,
    timeline: Timeline,
    now_ns: u64,
    desk: Desk,
    peer: Peer,
}

impl Rig {
    /// Client 0 of 4, not logged in; the run goes from 0 to 100 s, warm-up is the first second.
    fn offline(scenario: Scenario, pace: Pace) -> Self {
        let timeline = Timeline { start_ns: 0, measure_from_ns: SECOND, measure_to_ns: 100 * SECOND };
        Self { plan: plan(scenario, pace, 4), timeline, now_ns: SECOND, desk: Desk::new(4), peer: Peer::new(0, 0) }
    }

    fn ready(scenario: Scenario, pace: Pace) -> Self {
        let mut rig = Self::offline(scenario, pace);
        rig.act(|peer, turn| peer.login("a.b.c", turn));
        assert_eq!(rig.reply(LOGIN_ID, &login_ok(4)), Outcome::LoggedIn { ping_interval_ms: 20_000 });
        rig.desk.out.clear();
        rig
    }

    fn act<T>(&mut self, act: impl FnOnce(&mut Peer, &mut Turn<'_>) -> T) -> T {
        let (plan, timeline, now_ns) = (&self.plan, self.timeline, self.now_ns);
        act(&mut self.peer, &mut Turn { plan, timeline, now_ns, desk: &mut self.desk })
    }

    fn reply(&mut self, id: u32, reply: &Reply<'_>) -> Outcome {
        let mut bytes = Vec::new();
        Encoder::new().reply(Codec::FlatBuffers, id, reply, &mut bytes);
        let mut decoder = FrameDecoder::new();
        let frame = decoder.next(&mut &bytes[..], 1 << 20).unwrap().unwrap();
        self.act(|peer, turn| peer.on_frame(&frame, turn))
    }

    fn ack(&mut self, id: u32, dup: bool) {
        let ack = SendAck { conversation: CONVERSATION, seq: Seq(u64::from(id)), time_ms: 0, dup };
        assert_eq!(self.reply(id, &Reply::SendAck(ack)), Outcome::Fine);
    }

    fn fail(&mut self, id: u32, code: ErrorCode) -> Outcome {
        self.reply(id, &Reply::Failure { code, retry_after_ms: 20, detail: "" })
    }

    /// Pumps, and takes what was written since the last call, shaped by `pick`.
    fn requests<T>(&mut self, pick: impl Fn(u32, Request<'_>) -> Option<T>) -> Vec<T> {
        self.act(Peer::pump);
        let bytes = std::mem::take(&mut self.desk.out);
        let (mut decoder, mut input, mut picked) = (FrameDecoder::new(), &bytes[..], Vec::new());
        while let Some(frame) = decoder.next(&mut input, 1 << 20).unwrap() {
            picked.extend(pick(frame.header.request_id, decode_request(&frame.header, frame.body).unwrap()));
        }
        picked
    }

    fn sends(&mut self) -> Vec<Sent> {
        self.requests(|id, request| match request {
            Request::Send(send) => {
                Some(Sent { id, to: send.to.to_owned(), client_seq: send.client_seq, body: send.body.to_vec() })
            }
            other => panic!("only sends are expected here: {other:?}"),
        })
    }

    fn ids(&mut self) -> Vec<u32> {
        self.sends().into_iter().map(|send| send.id).collect()
    }

    fn incidents(&self) -> Vec<(&str, u64)> {
        self.desk.tally.incidents.iter().map(|(&name, &count)| (name, count)).collect()
    }

    /// A message of this run as the server would deliver it.
    fn deliver(&mut self, sender: u32, number: u32, seq: u64) -> Outcome {
        let target = self.plan.target(sender, number);
        let (mut body, run) = (Vec::new(), self.plan.run);
        Stamp { run, sender, number, intended_ns: SECOND }.write(64, &mut body);
        let (from, to) = (self.plan.name(sender).to_owned(), self.plan.name(target).to_owned());
        self.reply(0, &Reply::Deliver(message(&from, &to, (seq, &body))))
    }
}

fn login_ok(sends_in_flight_max: u32) -> Reply<'static> {
    Reply::LoginOk(LoginOk {
        user: "bench-000001",
        session: 1,
        server_time_ms: 1,
        ping_interval_ms: 20_000,
        idle_timeout_ms: 60_000,
        frame_bytes_max: 65_536,
        sends_in_flight_max,
    })
}

fn message<'a>(from: &'a str, to: &'a str, (seq, body): (u64, &'a [u8])) -> Message<'a> {
    Message {
        conversation: CONVERSATION,
        seq: Seq(seq),
        time_ms: 1,
        from,
        to,
        device: DeviceId(1),
        client_seq: 1,
        class: Class::Durable,
        kind: BodyKind::Custom,
        delivery: 0,
        body,
        extra: Extra::default(),
    }
}

#[test]
fn a_login_succeeds_waits_or_is_refused() {
    let mut rig = Rig::offline(Scenario::Pair, CLOSED);
    assert!(rig.ids().is_empty(), "nothing is sent before login");
    rig.act(|peer, turn| peer.login("a.b.c", turn));
    let logins = rig.requests(|_, request| match request {
        Request::Login(login) => {
            Some((login.user.to_owned(), login.device, login.credential == Credential::Token(Secret("a.b.c"))))
        }
        _ => None,
    });
    assert_eq!(logins, [("bench-000001".to_owned(), DeviceId(1), true)]);
    assert_eq!(rig.fail(LOGIN_ID, ErrorCode::Busy), Outcome::LoginDelayed);
    assert_eq!(rig.desk.alarms.pop().unwrap().0, Alarm { due_ns: SECOND + 20 * MS, slot: 0, job: Job::Login });
    let refused = Outcome::LoginRefused { code: ErrorCode::AuthFailed, detail: String::new() };
    assert_eq!(rig.fail(LOGIN_ID, ErrorCode::AuthFailed), refused);
    assert_eq!(rig.reply(LOGIN_ID, &login_ok(1)), Outcome::WindowTooLarge { sends_in_flight_max: 1 });
    assert!(!rig.peer.ready());
}

#[test]
fn a_closed_loop_keeps_its_window_full() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    let first = rig.sends();
    assert_eq!(first.iter().map(|send| (send.id, send.client_seq)).collect::<Vec<_>>(), [(1, 1_000), (2, 1_001)]);
    assert!(first.iter().all(|send| send.to == "bench-000002" && send.body.len() == 64));
    assert!(rig.ids().is_empty());
    rig.ack(2, false);
    assert_eq!(rig.ids(), [3], "an answer out of turn frees a slot too");
    assert_eq!(rig.fail(1, ErrorCode::NoSuchUser), Outcome::Fine);
    assert_eq!(rig.ids(), [4], "so does a refusal");
    rig.now_ns = rig.timeline.measure_to_ns;
    rig.ack(3, false);
    assert!(rig.ids().is_empty(), "the end of the window ends it");
    let tally = &rig.desk.tally;
    assert_eq!((tally.sent, tally.ever_sent, tally.ever_accepted, tally.unanswered), (4, 4, 2, 1));
    assert_eq!(tally.accepted, 1, "what is accepted in the drain is in no rate");
    assert_eq!(tally.ack_us.len(), 2, "but in the latencies");
    assert_eq!(rig.incidents(), [("NO_SUCH_USER", 1)]);
}

#[test]
fn warm_up_is_checked_and_not_measured() {
    let mut rig = Rig::ready(Scenario::SelfChat, CLOSED);
    rig.now_ns = 5;
    assert_eq!(rig.ids(), [1, 2]);
    rig.ack(1, false);
    let tally = &rig.desk.tally;
    assert_eq!((tally.sent, tally.ever_sent, tally.accepted, tally.ack_us.len()), (0, 2, 0, 0));
    assert_eq!(rig.desk.ledger.verdict().lost, 1);
}

#[test]
fn busy_is_tried_again_with_the_same_number_and_body() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    let first = rig.sends();
    rig.fail(1, ErrorCode::Busy);
    rig.fail(2, ErrorCode::RateLimited);
    assert!(rig.ids().is_empty(), "a refused send keeps its slot");
    rig.now_ns += 20 * MS;
    for _ in 0..2 {
        let Job::Send(number) = rig.desk.alarms.pop().unwrap().0.job else { panic!("a send") };
        rig.act(|peer, turn| peer.send_again(number, turn));
    }
    let mut again = rig.sends();
    again.sort_by_key(|send| send.id);
    assert_eq!(again, first);
    rig.act(|peer, turn| peer.send_again(0, turn));
    assert!(rig.ids().is_empty(), "nothing goes twice for one refusal");
    rig.ack(1, true);
    rig.ack(2, false);
    assert_eq!(rig.incidents(), [("BUSY", 1), ("RATE_LIMITED", 1)]);
    assert_eq!(rig.ids(), [3, 4]);
}

#[test]
fn a_client_never_runs_ahead_of_the_duplicate_filter() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    assert_eq!(rig.ids(), [1, 2]);
    rig.fail(1, ErrorCode::Busy);
    for id in [2, 3, 4] {
        rig.ack(id, false);
        let expected: &[u32] = if id < 4 { &[id + 1] } else { &[] };
        assert_eq!(rig.ids(), expected, "4 in flight: 5 has to wait for 1");
    }
    assert_eq!(rig.peer.refused(), 1);
    rig.act(|peer, turn| peer.send_again(0, turn));
    assert_eq!(rig.ids(), [1]);
    rig.ack(1, false);
    assert_eq!(rig.ids(), [5, 6]);
}

#[test]
fn an_open_loop_catches_up_and_keeps_the_intended_times() {
    let mut rig = Rig::ready(Scenario::Pair, Pace::Open { period_ns: 100 * MS });
    rig.timeline = Timeline { start_ns: SECOND, measure_from_ns: SECOND, measure_to_ns: 2 * SECOND };
    assert_eq!(rig.ids(), [1]);
    rig.now_ns = SECOND + 650 * MS;
    let late = rig.sends();
    let intended = |send: &Sent| Stamp::read(&send.body, 42).unwrap().intended_ns;
    assert_eq!(late.iter().map(intended).collect::<Vec<_>>(), [1_100 * MS, 1_200 * MS, 1_300 * MS]);
    rig.ack(1, false);
    assert_eq!(rig.desk.tally.ack_us.max() / 1_000, 650, "from the intended time");
    assert_eq!(rig.ids(), [5], "the window of 4 holds the backlog back");
    rig.now_ns = 3 * SECOND;
    (2..=5).for_each(|id| rig.ack(id, false));
    assert!(rig.ids().is_empty());
    assert_eq!(rig.peer.unsent(&rig.plan, &rig.timeline), 5, "due 0.5 to 0.9 s after the start");
}

#[test]
fn wrong_deliveries_are_told_apart() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    rig.deliver(1, 0, 1);
    rig.deliver(1, 2, 2);
    rig.deliver(1, 1, 3);
    rig.deliver(1, 1, 3);
    rig.deliver(0, 0, 4);
    rig.deliver(2, 0, 1);
    rig.reply(0, &Reply::Deliver(message("bench-000002", "bench-000001", (9, b"not a stamp"))));
    let mut body = Vec::new();
    Stamp { run: 1, sender: 1, number: 0, intended_ns: 0 }.write(64, &mut body);
    rig.reply(0, &Reply::Deliver(message("bench-000002", "bench-000001", (9, &body))));
    Stamp { run: 42, sender: 1, number: 9, intended_ns: 0 }.write(64, &mut body);
    rig.reply(0, &Reply::Deliver(message("somebody", "bench-000001", (9, &body))));
    let expected = Verdict {
        reordered: 1,
        duplicated: 1,
        echoed: 1,
        misdelivered: 2,
        corrupt: 1,
        other_runs: 1,
        ..Verdict::default()
    };
    assert_eq!(rig.desk.ledger.verdict(), expected);
    assert_eq!((rig.desk.tally.ever_delivered, rig.desk.tally.deliver_us.len()), (3, 3));
}

#[test]
fn cursors_go_once_a_second_and_pings_after_silence() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    rig.timeline = Timeline::NEVER;
    let kinds = |rig: &mut Rig| {
        rig.act(Peer::housekeep);
        rig.requests(|_, request| match request {
            Request::Ack(Ack::Upto { conversation, seq }) if conversation == CONVERSATION => Some(seq.0),
            Request::Ping { .. } => Some(0),
            other => panic!("{other:?}"),
        })
    };
    rig.deliver(1, 0, 1);
    rig.deliver(1, 1, 2);
    assert_eq!(kinds(&mut rig), [2], "cumulative");
    rig.deliver(1, 2, 3);
    rig.now_ns += SECOND - 1;
    assert!(kinds(&mut rig).is_empty());
    rig.now_ns += 1;
    assert_eq!(kinds(&mut rig), [3]);
    rig.now_ns += 14 * SECOND;
    assert!(kinds(&mut rig).is_empty());
    rig.now_ns += SECOND;
    assert_eq!(kinds(&mut rig), [0], "three quarters of the ping interval");
    assert!(kinds(&mut rig).is_empty());
    rig.plan.ack_cursors = false;
    rig.deliver(1, 3, 4);
    rig.now_ns += SECOND;
    assert!(kinds(&mut rig).is_empty());
    assert_eq!(rig.desk.tally.pings, 1);
}

#[test]
fn what_lagged_names_is_fetched_page_by_page() {
    let mut rig = Rig::ready(Scenario::Pair, Pace::Open { period_ns: u64::MAX });
    let fetches = |rig: &mut Rig| {
        rig.requests(|_, request| match request {
            Request::Fetch(fetch) => Some((fetch.with.to_owned(), fetch.after.0, fetch.before.map(|seq| seq.0))),
            Request::Send(_) => None,
            other => panic!("{other:?}"),
        })
    };
    let with = "bench-000002";
    rig.reply(0, &Reply::Lagged { conversation: CONVERSATION, with, from: Seq(3), to: Seq(6) });
    rig.reply(0, &Reply::Lagged { conversation: CONVERSATION, with, from: Seq(9), to: Seq(9) });
    assert_eq!(fetches(&mut rig), [(with.to_owned(), 2, Some(7))]);
    rig.fail(FETCH_ID, ErrorCode::Busy);
    assert_eq!(rig.desk.alarms.pop().unwrap().0.job, Job::Fetch);
    rig.act(Peer::fetch_again);
    assert_eq!(fetches(&mut rig), [(with.to_owned(), 2, Some(7))]);
    let mut bodies = vec![Vec::new(); 2];
    for (number, body) in (0..).zip(&mut bodies) {
        Stamp { run: 42, sender: 1, number, intended_ns: SECOND }.write(64, body);
    }
    let page = |at: usize, seq| message(with, "bench-000001", (seq, &bodies[at]));
    let answer = |messages| Reply::FetchOk { conversation: CONVERSATION, first: Seq(1), head: Seq(9), messages };
    rig.reply(FETCH_ID, &answer(vec![page(0, 3)]));
    assert_eq!(fetches(&mut rig), [(with.to_owned(), 3, Some(7))], "the page ended before the gap");
    rig.reply(FETCH_ID, &answer(vec![page(0, 3), page(1, 6)]));
    assert_eq!(fetches(&mut rig), [(with.to_owned(), 8, Some(10))], "the next gap");
    rig.reply(FETCH_ID, &answer(Vec::new()));
    assert!(fetches(&mut rig).is_empty());
    assert_eq!((rig.desk.tally.fetched, rig.desk.tally.ever_delivered), (2, 2));
    assert_eq!(rig.desk.ledger.verdict(), Verdict::default());
    assert_eq!(rig.incidents(), [("BUSY", 1), ("LAGGED", 2)]);
}

#[test]
fn answers_to_nothing_and_pushes_are_counted() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    assert_eq!(rig.ids(), [1, 2]);
    rig.ack(1, false);
    rig.ack(1, false);
    rig.ack(77, false);
    rig.ack(0, false);
    rig.ack(2, true);
    rig.fail(99, ErrorCode::Internal);
    rig.reply(0, &Reply::Kicked { reason: KickReason::Replaced, detail: "" });
    rig.reply(0, &Reply::LogoutOk);
    let expected = [("DUP_WITHOUT_RETRY", 1), ("INTERNAL", 1), ("KICKED", 1), ("UNEXPECTED_ANSWER", 5)];
    assert_eq!(rig.incidents(), expected);
    assert_eq!(rig.ids(), [3, 4]);
    assert_eq!(rig.peer.gone(), 2);
    assert!(rig.ids().is_empty());
}

#[test]
fn a_body_that_does_not_decode_ends_the_connection() {
    let mut rig = Rig::ready(Scenario::Pair, CLOSED);
    let header = |command| ringline_schema::frame::Header {
        codec: Codec::FlatBuffers,
        command,
        flags: Default::default(),
        request_id: 0,
        body_bytes: 3,
    };
    for (command, expected) in [(0x0301, Outcome::Unreadable), (0x7fff, Outcome::Fine)] {
        let bytes = [&header(command).encode()[..], b"bad"].concat();
        let mut decoder = FrameDecoder::new();
        let frame = decoder.next(&mut &bytes[..], 1 << 20).unwrap().unwrap();
        assert_eq!(rig.act(|peer, turn| peer.on_frame(&frame, turn)), expected);
    }
}

#[test]
fn lag_is_what_the_generator_is_late_by_and_not_what_the_server_is() {
    let mut rig = Rig::ready(Scenario::Pair, Pace::Open { period_ns: 100 * MS });
    rig.timeline.measure_from_ns = 0;
    let due = |rig: &mut Rig, number: u32, at_ms: u64| {
        rig.now_ns = at_ms * MS;
        rig.act(|peer, turn| peer.due(number, u64::from(number) * 100 * MS, turn));
    };
    let lags = |rig: &Rig| (rig.desk.tally.lag_us.len(), rig.desk.tally.lag_us.max() / 1_000);
    due(&mut rig, 0, 5);
    assert_eq!(lags(&rig), (1, 5));
    // It reads an answer before its turn, and sends what is due by then; the late turn finds it gone.
    rig.now_ns = 107 * MS;
    let first = rig.ids();
    due(&mut rig, 1, 190);
    assert_eq!(lags(&rig), (2, 7));
    // Four are on their way, as many as the server allows: the fifth waits for answers, which is no lag.
    (2..4).for_each(|number| due(&mut rig, number, u64::from(number) * 100));
    due(&mut rig, 4, 402);
    assert_eq!(lags(&rig), (5, 7));
    rig.now_ns = 490 * MS;
    rig.ack(first[0], false);
    assert_eq!(rig.ids().len(), 3, "the third, the fourth, and now the fifth");
    assert_eq!(lags(&rig), (5, 7));
}
