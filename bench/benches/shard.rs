//! One step of the pure shard: what a message costs without sockets, lanes and disk.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringline_cluster::placement::{CorePlacement, ShardIndex};
use ringline_core::Shard;
use ringline_core::config::CoreConfig;
use ringline_core::event::{ConnId, Effect, Effects, Event, Now, Token, WorkOutcome};
use ringline_schema::codec::Codec;
use ringline_schema::ids::{DeviceId, Seq};
use ringline_schema::message::{BodyKind, Class, Credential, DeviceKind, Login, Mentions, Request, Secret, Send};
use ringline_schema::record::{Answer, Head, User};

/// Clients of the shard; they write to each other in pairs.
const CLIENTS: u32 = 200;
const BODY: [u8; 64] = [7; 64];

/// A shard whose store and workers answer at once.
struct Node {
    shard: Shard,
    fx: Effects,
    now: Now,
    appended: u64,
    client_seq: u64,
}

impl Node {
    fn new() -> Self {
        let mut config = CoreConfig::new(ShardIndex(0), CorePlacement::new(1).unwrap());
        (config.requests_per_s, config.requests_burst) = (u32::MAX, u32::MAX);
        let now = Now { mono_us: 1, unix_ms: 1_700_000_000_000 };
        let mut node = Self { shard: Shard::new(config, 1), fx: Effects::default(), now, appended: 0, client_seq: 0 };
        for client in 0..CLIENTS {
            let user = format!("client-{client}");
            node.event(Event::Opened { conn: conn(client) });
            let credential = Credential::Token(Secret("token"));
            let (device, device_kind) = (DeviceId(1), DeviceKind::Other);
            let login = Login { user: &user, credential, device, device_kind, agent: "" };
            node.request(client, Request::Login(login));
            node.settle();
        }
        node
    }

    fn event(&mut self, event: Event<'_>) {
        let _ = black_box(self.shard.handle(event, self.now, &mut self.fx));
    }

    fn request(&mut self, client: u32, request: Request<'_>) {
        let (conn, codec) = (conn(client), Codec::FlatBuffers);
        let flags = Default::default();
        self.event(Event::Request { conn, codec, flags, request_id: 1, request });
    }

    /// Answers every effect, and takes all output as a socket would.
    fn settle(&mut self) {
        while !self.fx.list.is_empty() || !self.fx.dirty.is_empty() {
            for effect in std::mem::take(&mut self.fx.list) {
                match effect {
                    Effect::Append(_) => self.appended += 1,
                    Effect::Load { token, query } => {
                        let answer = match query {
                            ringline_schema::record::Query::User { name } => {
                                Answer::User(Some(User { name, password_hash: None, created_ms: 0 }))
                            }
                            _ => Answer::Head(Head { exists: true, first: Seq(1), head: Seq(0), filter: Vec::new() }),
                        };
                        self.event(Event::Loaded { token, answer });
                    }
                    Effect::Work { token: Token(token), .. } => {
                        self.event(Event::Worked { token: Token(token), outcome: WorkOutcome::Verified(true) });
                    }
                    Effect::Close { .. } | Effect::ToShard { .. } | Effect::Released { .. } => {
                        panic!("not in this scene")
                    }
                }
            }
            self.event(Event::Stored { upto: self.appended });
            for conn in std::mem::take(&mut self.fx.dirty) {
                if let Some(output) = self.shard.take_output(conn) {
                    self.event(Event::Sent { conn, bytes: output.len() });
                    self.shard.give_back(output);
                }
            }
        }
    }

    /// Every client sends one message to its partner.
    fn round(&mut self, class: Class, names: &[String]) {
        self.now.mono_us += 1_000;
        self.client_seq += 1;
        for client in 0..CLIENTS {
            let to = names[(client ^ 1) as usize].as_str();
            let (kind, client_seq, body) = (BodyKind::Text, self.client_seq, &BODY[..]);
            self.request(
                client,
                Request::Send(Send {
                    to,
                    class,
                    kind,
                    client_seq,
                    ack_timeout_ms: None,
                    body,
                    mentions: Mentions::default(),
                }),
            );
        }
        self.settle();
    }
}

fn conn(client: u32) -> ConnId {
    ConnId { slot: client, generation: 1 }
}

fn steps(criterion: &mut Criterion) {
    let names: Vec<String> = (0..CLIENTS).map(|client| format!("client-{client}")).collect();
    let mut group = criterion.benchmark_group("shard_step");
    group.throughput(Throughput::Elements(u64::from(CLIENTS)));
    group.sample_size(30);
    for (name, class) in [("transient_64B", Class::Transient), ("durable_64B", Class::Durable)] {
        let mut node = Node::new();
        group.bench_function(name, |bencher| bencher.iter(|| node.round(class, &names)));
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
