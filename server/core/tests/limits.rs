//! Limits that no other file meets at their edge: the last that is allowed, and the first that is refused by name.

mod rig;

use rig::*;
use ringline_core::config::{EXPORTS_IN_FLIGHT_MAX, RECEIPT_LISTS_MAX};
use ringline_core::event::{ConnId, Event};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq};
use ringline_schema::limits;
use ringline_schema::message::*;
use ringline_schema::record::Record;

/// Rows of a page that fits a frame, by what was asked for: above the most it is the most, and without a number the usual.
const PAGES: [(u16, usize); 5] = [(0, 50), (1, 1), (199, 199), (200, 200), (u16::MAX, 200)];

/// A connection that has not said who it is.
fn knock(rig: &mut Rig, slot: u32) -> At {
    let at = At(0, ConnId { slot: 10_000 + slot, generation: 1 });
    let _ = rig.event(0, Event::Opened { conn: at.1 });
    at
}

fn login<'a>(credential: Credential<'a>, device: u64) -> Request<'a> {
    let (device, device_kind) = (DeviceId(device), DeviceKind::Other);
    Request::Login(Login { user: "ann", credential, device, device_kind, agent: "" })
}

#[test]
fn passwords_tokens_and_devices_at_the_door() {
    let mut rig = Rig::new(1, |_| ());
    for (slot, bytes, code) in [(1, 5, Some(ErrorCode::BadPassword)), (2, 6, None), (3, 256, None)] {
        let (at, user) = (knock(&mut rig, slot), format!("user-{bytes}"));
        let password = "p".repeat(bytes);
        assert_eq!(rig.code(at, Request::Register { user: &user, password: Secret(&password) }), code, "{bytes}");
    }
    let (at, long) = (knock(&mut rig, 4), "p".repeat(limits::PASSWORD_BYTES_MAX + 1));
    let register = Request::Register { user: "ann", password: Secret(&long) };
    assert_eq!(rig.code(at, register), Some(ErrorCode::BadPassword));
    let token = "t".repeat(limits::TOKEN_BYTES_MAX);
    assert_eq!(rig.code(at, login(Credential::Token(Secret(&token)), 0)), Some(ErrorCode::BadDevice));
    assert_eq!(rig.code(at, login(Credential::Token(Secret(&token)), 1)), None);
    let at = knock(&mut rig, 5);
    let token = "t".repeat(limits::TOKEN_BYTES_MAX + 1);
    assert_eq!(rig.code(at, login(Credential::Token(Secret(&token)), 1)), Some(ErrorCode::AuthFailed));
}

#[test]
fn a_second_login_of_a_connection_waits_for_the_first() {
    let mut rig = Rig::new(1, |_| ());
    rig.holding = true;
    let at = knock(&mut rig, 1);
    assert!(rig.ask(at, login(Credential::Token(Secret("first")), 1)).is_empty(), "its user is being read");
    assert_eq!(rig.code(at, login(Credential::Token(Secret("second")), 1)), Some(ErrorCode::LoginInProgress));
    rig.release();
    assert!(matches!(decode(&rig.told(at)[0]), Reply::LoginOk(_)));
}

#[test]
fn what_a_client_says_of_itself_is_cut_between_two_letters() {
    let mut rig = Rig::new(1, |_| ());
    // One byte too long, and the letter that would pass the limit has two.
    let agent = format!("{}é", "a".repeat(limits::AGENT_BYTES_MAX - 1));
    let at = knock(&mut rig, 1);
    let (credential, device_kind) = (Credential::Token(Secret("ann")), DeviceKind::Phone);
    rig.ask(at, Request::Login(Login { user: "ann", credential, device: DeviceId(1), device_kind, agent: &agent }));
    let told = rig.ask(at, Request::Chat(ChatRequest::Devices));
    let Reply::Chat(ChatReply::DevicesOk { devices }) = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    assert_eq!(devices[0].agent, "a".repeat(limits::AGENT_BYTES_MAX - 1));
}

#[test]
fn a_page_of_history_has_what_was_asked_for_and_200_rows_at_most() {
    let mut rig = Rig::new(2, |config| config.frame_bytes_max = limits::FRAME_BYTES_CEILING);
    let (ann, _) = (rig.login("ann", 1), rig.login("bob", 1));
    for client_seq in 1..=250 {
        rig.send(ann, "bob", client_seq, b"x");
    }
    for (limit, rows) in PAGES {
        let told =
            rig.ask(ann, Request::Fetch(Fetch { with: "bob", after: Seq(0), before: None, limit, newest: false }));
        let Reply::FetchOk { messages, head, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
        assert_eq!((messages.len(), head), (rows, Seq(250)), "{limit}");
    }
}

#[test]
fn a_page_of_conversations_of_users_online_and_of_blocked_users() {
    let mut rig = Rig::new(1, |config| config.frame_bytes_max = limits::FRAME_BYTES_CEILING);
    let ann = rig.login("ann", 1);
    for number in 0..250 {
        let friend = format!("user-{number:03}");
        rig.login(&friend, 1);
        let mut members = [name("ann"), name(&friend)];
        members.sort();
        rig.put(&[Record::Conversation { conversation: direct("ann", &friend), members, created_ms: 1 }]);
        assert_eq!(rig.code(ann, Request::Chat(ChatRequest::Block { user: &friend })), None);
    }
    for (limit, rows) in PAGES {
        let told = rig.ask(ann, Request::Conversations { cursor: ConversationId(0), limit });
        let Reply::ConversationsOk { conversations, next } = decode(&told[0]) else { panic!() };
        assert_eq!(conversations.len(), rows, "conversations, {limit}");
        assert_ne!(next, ConversationId(0));
        let told = rig.ask(ann, Request::Online { cursor: "", limit });
        let Reply::OnlineOk { users, .. } = decode(&told[0]) else { panic!() };
        assert_eq!(users.len(), rows, "online, {limit}");
        let told = rig.ask(ann, Request::Chat(ChatRequest::Blocks { cursor: "", limit }));
        let Reply::Chat(ChatReply::BlocksOk { users, .. }) = decode(&told[0]) else { panic!() };
        assert_eq!(users.len(), rows, "blocked, {limit}");
    }
}

#[test]
fn one_export_and_one_list_of_receipts_too_many_are_busy() {
    let mut rig = Rig::new(1, |_| ());
    let (ann, _) = (rig.login("ann", 1), rig.login("bob", 1));
    rig.send(ann, "bob", 1, b"x");
    let conversation = direct("ann", "bob");
    let export = || Request::Chat(ChatRequest::Export { cursor: "" });
    let receipts = || Request::Chat(ChatRequest::Receipts { conversation, seq: Seq(1), cursor: "", limit: 0 });
    rig.holding = true;
    for number in 0..EXPORTS_IN_FLIGHT_MAX {
        assert_eq!(rig.code(ann, export()), None, "{number}");
    }
    assert_eq!(rig.code(ann, export()), Some(ErrorCode::Busy));
    for number in 0..RECEIPT_LISTS_MAX {
        assert_eq!(rig.code(ann, receipts()), None, "{number}");
    }
    assert_eq!(rig.code(ann, receipts()), Some(ErrorCode::Busy));
}

#[test]
fn a_repeat_that_the_filter_no_longer_remembers_is_stale() {
    let mut rig = Rig::new(1, |_| ());
    let (ann, _) = (rig.login("ann", 1), rig.login("bob", 1));
    let remembered = limits::DUPLICATE_WINDOW as u64;
    for client_seq in 1..=remembered {
        rig.send(ann, "bob", client_seq, b"x");
    }
    assert_eq!(rig.send(ann, "bob", 1, b"x"), Seq(1), "the oldest that is remembered");
    rig.send(ann, "bob", remembered + 1, b"x");
    let code = rig.code(ann, Request::Send(durable("bob", 1, b"x")));
    assert_eq!(code, Some(ErrorCode::StaleClientSeq));
    assert_eq!(rig.send(ann, "bob", 2, b"x"), Seq(2));
}

#[test]
fn a_delivery_timeout_above_a_minute_is_a_minute() {
    let mut rig = Rig::new(1, |config| config.idle_timeout_ms = 600_000);
    let (ann, _) = (rig.login("ann", 1), rig.login("bob", 1));
    let send = Send { ack_timeout_ms: Some(u32::MAX), ..durable("bob", 1, b"x") };
    rig.ask(ann, Request::Send(send));
    rig.told(ann);
    let ended = |rig: &mut Rig| {
        let told = rig.told(ann);
        let timeout = |reply| matches!(reply, Reply::Receipt(Receipt { outcome: Outcome::DeliveryTimeout, .. }));
        told.iter().any(|frame| timeout(decode(frame)))
    };
    rig.pass(u64::from(limits::ACK_TIMEOUT_MS_MAX) - 1_000);
    assert!(!ended(&mut rig));
    rig.pass(2_000);
    assert!(ended(&mut rig));
}
