//! The rules of DEVICES, DROP_DEVICE and the device policies.

mod rig;

use rig::*;
use ringline_core::config::DevicePolicy;
use ringline_core::event::CloseReason;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId};
use ringline_schema::limits;
use ringline_schema::message::*;

/// (device, kind, agent, first_ms, last_ms, online) in order of device.
type Listed = (u64, DeviceKind, String, u64, u64, bool);

fn list(rig: &mut Rig, at: At) -> Vec<Listed> {
    let told = rig.ask(at, Request::Chat(ChatRequest::Devices));
    let Reply::Chat(ChatReply::DevicesOk { devices }) = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    let row =
        |row: &chat::Device<'_>| (row.device.0, row.kind, row.agent.to_owned(), row.first_ms, row.last_ms, row.online);
    devices.iter().map(row).collect()
}

fn ids(rig: &mut Rig, at: At) -> Vec<u64> {
    list(rig, at).into_iter().map(|row| row.0).collect()
}

fn drop_device(device: u64) -> Request<'static> {
    Request::Chat(ChatRequest::DropDevice { device: DeviceId(device) })
}

fn kicked(rig: &mut Rig, at: At) -> Option<KickReason> {
    let told = rig.told(at);
    let kicked = told.iter().find_map(|frame| match decode(frame) {
        Reply::Kicked { reason, .. } => Some(reason),
        _ => None,
    });
    assert_eq!(kicked.is_some(), rig.closed.contains(&(at, CloseReason::Kicked)));
    kicked
}

#[test]
fn devices_are_listed_with_their_first_and_last_login_also_after_a_restart() {
    let mut rig = Rig::new(2, |config| config.idle_timeout_ms = 600_000);
    let start_ms = rig.now.unix_ms;
    let phone = rig.login_as("ann", 2, DeviceKind::Phone);
    rig.leave(phone);
    rig.pass(1_000);
    let desk = rig.login_as("ann", 1, DeviceKind::Desktop);
    let _ = rig.login_as("bob", 3, DeviceKind::Phone);
    let agent = || "rig/1".to_owned();
    let expected = |last_ms, online| {
        [
            (1, DeviceKind::Desktop, agent(), start_ms + 1_000, start_ms + 1_000, true),
            (2, DeviceKind::Phone, agent(), start_ms, start_ms + last_ms, online),
        ]
    };
    assert_eq!(list(&mut rig, desk), expected(0, false));
    rig.pass(58_999);
    let phone = rig.login_as("ann", 2, DeviceKind::Phone);
    assert_eq!(list(&mut rig, desk), expected(0, true), "noted within the last minute");
    rig.leave(phone);
    rig.pass(1);
    let phone = rig.login_as("ann", 2, DeviceKind::Phone);
    assert_eq!(list(&mut rig, desk), expected(60_000, true));
    rig.leave(phone);
    let _ = rig.login_as("ann", 2, DeviceKind::Tablet);
    assert_eq!(list(&mut rig, desk)[1].1, DeviceKind::Tablet, "what has changed is noted at once");
    rig.restart(3);
    let third = rig.login("ann", 9);
    assert_eq!(ids(&mut rig, third), [1, 2, 9]);
}

#[test]
fn a_dropped_device_is_logged_out_and_forgotten_and_may_come_back() {
    for shards in [1, 2] {
        let mut rig = Rig::new(shards, |_| ());
        let (phone, desk, bob) = (rig.login("ann", 1), rig.login("ann", 2), rig.login("bob", 2));
        assert_eq!(rig.code(phone, drop_device(7)), Some(ErrorCode::NoSuchDevice));
        assert_eq!(rig.code(phone, drop_device(2)), None);
        assert_eq!(kicked(&mut rig, desk), Some(KickReason::LoggedOut));
        assert_eq!(kicked(&mut rig, bob), None, "of another user");
        assert_eq!(ids(&mut rig, phone), [1]);
        assert_eq!(rig.code(phone, drop_device(2)), Some(ErrorCode::NoSuchDevice), "it is gone");
        rig.pass(100);
        let desk = rig.login("ann", 2);
        assert_eq!(ids(&mut rig, desk), [1, 2], "a new login is a new device");
        rig.leave(phone);
        assert_eq!(rig.code(desk, drop_device(1)), None, "also one that is away");
        assert_eq!(ids(&mut rig, desk), [2]);
        let told = rig.ask(desk, drop_device(2));
        assert_eq!(decode(&told[0]), Reply::Chat(ChatReply::Done), "who drops his own device is told before he goes");
        assert!(matches!(decode(&told[1]), Reply::Kicked { reason: KickReason::LoggedOut, .. }));
    }
}

#[test]
fn the_device_seen_longest_ago_is_forgotten_for_one_too_many() {
    let mut rig = Rig::new(1, |_| ());
    for device in 1..=limits::DEVICES_PER_USER_MAX as u64 {
        let at = rig.login("ann", device);
        rig.leave(at);
        rig.pass(100);
    }
    rig.pass(60_000);
    let at = rig.login("ann", 1);
    assert_eq!(ids(&mut rig, at).len(), limits::DEVICES_PER_USER_MAX);
    rig.pass(100);
    let at = rig.login("ann", 1_000);
    let left = ids(&mut rig, at);
    assert_eq!(left.len(), limits::DEVICES_PER_USER_MAX);
    assert!(left.contains(&1) && left.contains(&1_000) && !left.contains(&2), "2 was seen longest ago");
}

#[test]
fn the_policy_says_which_devices_may_be_there_at_once() {
    use DeviceKind::{Desktop, Phone};
    for (policy, expected) in [
        (DevicePolicy::Many, [None, None, None]),
        (DevicePolicy::OnePerKind, [Some(KickReason::DevicePolicy), None, None]),
        (DevicePolicy::One, [Some(KickReason::DevicePolicy), Some(KickReason::DevicePolicy), None]),
    ] {
        let mut rig = Rig::new(1, |config| config.device_policy = policy);
        let old_phone = rig.login_as("ann", 1, Phone);
        let desk = rig.login_as("ann", 2, Desktop);
        let phone = rig.login_as("ann", 3, Phone);
        let told = [old_phone, desk, phone].map(|at| kicked(&mut rig, at));
        assert_eq!(told, expected, "{policy:?}");
        let again = rig.login_as("ann", 3, Phone);
        assert_eq!(kicked(&mut rig, phone), Some(KickReason::Replaced));
        assert_eq!(ids(&mut rig, again), [1, 2, 3], "who was told to go is still known");
    }
}

#[test]
fn one_device_more_than_may_be_there_at_once_ends_the_oldest() {
    let mut rig = Rig::new(1, |config| config.devices_max = 2);
    let devices = [1, 2, 3].map(|device| rig.login("ann", device));
    assert_eq!(devices.map(|at| kicked(&mut rig, at)), [Some(KickReason::DevicePolicy), None, None]);
}

fn acked(rig: &mut Rig, at: At) -> u64 {
    let told = rig.ask(at, Request::Conversations { cursor: ConversationId(0), limit: 0 });
    let Reply::ConversationsOk { conversations, .. } = decode(&told[0]) else { panic!("{:?}", decode(&told[0])) };
    conversations[0].acked.0
}

#[test]
fn a_device_that_is_dropped_has_read_nothing_when_it_comes_back() {
    for shards in [1, 2, 5] {
        let mut rig = Rig::new(shards, |config| config.idle_timeout_ms = 600_000);
        let (ann, phone, desk) = (
            rig.login("ann", 1),
            rig.login_as("bob", 1, DeviceKind::Phone),
            rig.login_as("bob", 2, DeviceKind::Desktop),
        );
        let (seq, conversation) = (rig.send(ann, "bob", 1, b"hello"), direct("ann", "bob"));
        for device in [phone, desk] {
            rig.ask(device, Request::Ack(Ack::Upto { conversation, seq }));
        }
        rig.pass(2_000);
        rig.ask(desk, drop_device(1));
        let phone = rig.login_as("bob", 1, DeviceKind::Phone);
        assert_eq!((acked(&mut rig, phone), acked(&mut rig, desk)), (0, 1), "what was written");
        rig.ask(phone, Request::Ack(Ack::Upto { conversation, seq }));
        rig.ask(desk, drop_device(1));
        rig.pass(2_000);
        let phone = rig.login_as("bob", 1, DeviceKind::Phone);
        assert_eq!(acked(&mut rig, phone), 0, "and what was not yet");
        rig.ask(phone, Request::Ack(Ack::Upto { conversation, seq }));
        rig.ask(phone, drop_device(1));
        rig.pass(2_000);
        let phone = rig.login_as("bob", 1, DeviceKind::Phone);
        assert_eq!((acked(&mut rig, phone), acked(&mut rig, desk)), (0, 1), "dropped by itself");
    }
}
