//! What a login leaves behind in a shard, and that a transient message leaves nothing: the guards of "Cost of a connection"
//! and "Cost per message" in tuning.md. They count what the allocator gave out, so a field, a table or a cache entry more
//! for everyone shows here.

use allocation_counter::measure;
use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::CoreConfig;
use ringline_core::event::{ConnId, Effect, Effects, Event, Now, Token, WorkOutcome};
use ringline_schema::codec::{Codec, Encoder};
use ringline_schema::frame::{Flags, FrameDecoder};
use ringline_schema::ids::DeviceId;
use ringline_schema::message::*;
use ringline_schema::record::{Answer, Query, User};
use ringline_schema::rows::{DeviceRow, Row, RowKey, RowList, RowValue, SettingRow};

/// With the one before them, and the timer of the start, they fill the tables that double.
const CLIENTS: u32 = 4_094;
/// Measured 298, of which 96 in the table of sessions; the rest of a connection (edge, net) is the shell's.
const BYTES_PER_LOGIN_MAX: i64 = 320;
/// The login, the user, and a share of the list of users.
const BLOCKS_PER_LOGIN_MAX: i64 = 3;

const NOW: Now = Now { mono_us: 1_000_000, unix_ms: 1_700_000_000_000 };

/// Answers as a store that has seen all these users before.
fn answer(query: Query) -> Answer {
    match query {
        Query::User { name } => Answer::User(Some(User { name, password_hash: None, created_ms: 1 })),
        Query::Row { key: key @ RowKey::Setting(_) } => {
            let row = SettingRow { last_seen_ms: NOW.unix_ms - 9_000, ..SettingRow::default() };
            Answer::Row(Some(Row { key, stamp: 7, value: Some(RowValue::Setting(row)) }))
        }
        Query::Rows { list: RowList::Blocks(_), .. } => Answer::Rows(Vec::new()),
        Query::Rows { list: RowList::Devices(user), .. } => {
            let last_ms = NOW.unix_ms - 9_000;
            let row = DeviceRow { kind: DeviceKind::Phone, agent: "idle/1".into(), first_ms: 1, last_ms };
            let key = RowKey::Device(user, DeviceId(1));
            Answer::Rows(vec![Row { key, stamp: 7, value: Some(RowValue::Device(row)) }])
        }
        other => panic!("a login asks for {other:?}"),
    }
}

fn handle(shard: &mut Shard, event: Event<'_>) {
    let mut fx = Effects::default();
    let _ = shard.handle(event, NOW, &mut fx);
    for conn in fx.dirty {
        let output = shard.take_output(conn).expect("what is dirty has output");
        let bytes = output.len();
        shard.give_back(output);
        handle(shard, Event::Sent { conn, bytes });
    }
    for effect in fx.list {
        match effect {
            Effect::Load { token: Token(token), query } => {
                handle(shard, Event::Loaded { token: Token(token), answer: answer(query) });
            }
            Effect::Work { token, .. } => {
                handle(shard, Event::Worked { token, outcome: WorkOutcome::Verified(true) });
            }
            other => panic!("a login of a known user and device does {other:?}"),
        }
    }
}

fn log_in(shard: &mut Shard, slot: u32) {
    let conn = ConnId { slot, generation: 1 };
    let user = format!("user-{slot:06}");
    let login = Login {
        user: &user,
        device: DeviceId(1),
        device_kind: DeviceKind::Phone,
        agent: "idle/1",
        credential: Credential::Token(Secret("token")),
    };
    handle(shard, Event::Opened { conn });
    let request = Request::Login(login);
    handle(shard, Event::Request { conn, codec: Codec::default(), flags: Flags::default(), request_id: 1, request });
}

#[test]
fn an_idle_login_leaves_little_behind() {
    let placement = CorePlacement::new(1).unwrap();
    let mut shard = Shard::new(CoreConfig::new(ShardIndex(0), placement), 1);
    // Buffers that are used again, and the tables of open questions.
    log_in(&mut shard, 0);
    let taken = measure(|| (1..=CLIENTS).for_each(|slot| log_in(&mut shard, slot)));
    assert_eq!(shard.levels().sessions, CLIENTS as usize + 1);
    shard.check_invariants();
    let each = |count: i64| count / i64::from(CLIENTS);
    println!("{} bytes in {} blocks a login", each(taken.bytes_current), each(taken.count_current));
    assert!(each(taken.bytes_current) <= BYTES_PER_LOGIN_MAX, "{} bytes", each(taken.bytes_current));
    assert!(each(taken.count_current) <= BLOCKS_PER_LOGIN_MAX, "{} blocks", each(taken.count_current));
}

/// A message of the first user to the second, as its client writes it.
fn frames(messages: u64, flags: Flags) -> Vec<u8> {
    let (mut encoder, mut bytes) = (Encoder::new(), Vec::new());
    for client_seq in 1..=messages {
        let (class, kind, mentions) = (Class::Transient, BodyKind::Text, Mentions::default());
        let send = Send { to: "user-000001", class, kind, client_seq, ack_timeout_ms: None, body: &[7; 64], mentions };
        let at = bytes.len();
        encoder.request(Codec::default(), 9, &Request::Send(send), &mut bytes);
        bytes[at + 6..at + 8].copy_from_slice(&flags.bits().to_le_bytes());
    }
    bytes
}

#[test]
fn a_transient_message_allocates_nothing() {
    const MESSAGES: u64 = 1_000;
    for flags in [Flags::default(), Flags::NO_REPLY] {
        let mut config = CoreConfig::new(ShardIndex(0), CorePlacement::new(1).unwrap());
        (config.requests_per_s, config.requests_burst) = (1_000_000, 1_000_000);
        let mut shard = Shard::new(config, 1);
        log_in(&mut shard, 0);
        log_in(&mut shard, 1);
        let (bytes, mut fx) = (frames(MESSAGES, flags), Effects::default());
        let mut play = || {
            let (mut decoder, mut input) = (FrameDecoder::new(), &bytes[..]);
            while let Some(frame) = decoder.next(&mut input, 1 << 16).unwrap() {
                let event = Event::of_frame(ConnId { slot: 0, generation: 1 }, &frame);
                let _ = shard.handle(event, NOW, &mut fx);
                while let Some(conn) = fx.dirty.pop() {
                    let output = shard.take_output(conn).expect("what is dirty has output");
                    let bytes = output.len();
                    shard.give_back(output);
                    let _ = shard.handle(Event::Sent { conn, bytes }, NOW, &mut fx);
                }
            }
        };
        // Buffers that are used again.
        play();
        let taken = measure(&mut play);
        assert_eq!((taken.count_total, shard.counters().delivered), (0, 2 * MESSAGES), "{flags:?}");
    }
}
