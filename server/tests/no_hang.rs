//! A node that sleeps must wake: many cycles of start, load, idle, load, stop of the real binary, over either net and
//! with one and two cores. Every wait is under a watchdog, which says what each thread of the server was doing.
//!
//! A load is a burst of durable and transient messages between SDK clients, all of them on their way at once; it is over
//! when every send was acknowledged and every message has arrived. Idle is long enough for every core to park, so that
//! the second load is answered only if its first bytes wake a core, and its hand-overs wake the others.
//!
//! `NO_HANG_CYCLES=1000 cargo test --package ringline --test no_hang` runs so many cycles instead of
//! [`CYCLES_DEFAULT`]. These tests choose their net themselves, whatever `TEST_NET_KIND` says.

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::{Server, threads_of};
use ringline_client::{Client, Event, Events, SendOptions};
use ringline_schema::ids::DeviceId;

/// Start-load-idle-load-stop cycles of each combination.
const CYCLES_DEFAULT: usize = 100;
/// Of the way to park that is not the default.
const CYCLES_OTHER_PARK: usize = 25;
/// Clients of a cycle, in a ring: each sends to the next. With two cores some are on either.
const CLIENTS: usize = 4;
/// Messages of each class that a client has on their way at once.
const BURST: usize = 24;
/// Long enough for every core to find nothing to do and sleep.
const IDLE: Duration = Duration::from_millis(150);
/// No step of a healthy cycle comes near it.
const WATCHDOG: Duration = Duration::from_secs(20);

struct Talker {
    name: String,
    client: Client,
    events: Events,
}

/// What a wait belongs to: the server, and where in which cycle.
struct Scene<'a> {
    server: &'a Server,
    cycle: usize,
}

impl Scene<'_> {
    /// Waits for `step`, but not for ever.
    async fn watched<T>(&self, what: &str, step: impl Future<Output = T>) -> T {
        match tokio::time::timeout(WATCHDOG, step).await {
            Ok(done) => done,
            Err(_) => panic!(
                "cycle {}: {what} took more than {} s\n{}\n{}",
                self.cycle,
                WATCHDOG.as_secs(),
                threads_of(self.server.pid()),
                self.server.log.join("\n"),
            ),
        }
    }
}

fn name(at: usize) -> String {
    format!("talker{}", at % CLIENTS)
}

async fn connect(scene: &Scene<'_>, (at, token): (usize, &str)) -> Talker {
    let token = token.to_owned();
    let builder = Client::builder(&scene.server.address)
        .user(&name(at))
        .device(DeviceId(1 + at as u64))
        .token(move || Box::pin(std::future::ready(Ok(token.clone()))));
    let (client, events) = scene.watched("a login", builder.connect()).await.expect("a login");
    Talker { name: name(at), client, events }
}

/// Sends a burst to `to` and takes the one of `from`, until all of both is answered and there.
async fn exchange(talker: &mut Talker, (to, from): (String, String), tag: &str) {
    let mut sends = Vec::new();
    for at in 0..BURST {
        sends.push(talker.client.send(&to, format!("{tag} durable {at}")));
        sends.push(talker.client.send_with(&to, format!("{tag} transient {at}"), SendOptions::transient()));
    }
    let mut seen = HashSet::new();
    while seen.len() < sends.len() {
        match talker.events.next().await {
            Some(Event::Message(message)) if message.from.as_str() == from => {
                let text = message.text().into_owned();
                // What a device had not acknowledged when its server stopped comes again.
                if text.starts_with(tag) {
                    assert!(seen.insert(text.clone()), "{text:?} came twice to {}", talker.name);
                }
            }
            Some(Event::Message(_) | Event::Connected { .. } | Event::CaughtUp { .. } | Event::ReadUpto(_)) => {}
            other => panic!("{tag}: {} saw {other:?}", talker.name),
        }
    }
    for send in sends {
        send.await.unwrap_or_else(|error| panic!("{tag}: {} to {to}: {error}", talker.name));
    }
}

async fn load(scene: &Scene<'_>, talkers: &mut [Talker; CLIENTS], phase: &str) {
    let tag = format!("{}-{phase} ", scene.cycle);
    let ends = |at: usize| (name(at + 1), name(at + CLIENTS - 1));
    let [a, b, c, d] = talkers;
    let all = async {
        tokio::join!(
            exchange(a, ends(0), &tag),
            exchange(b, ends(1), &tag),
            exchange(c, ends(2), &tag),
            exchange(d, ends(3), &tag),
        )
    };
    scene.watched(&format!("the {phase} load"), all).await;
}

/// Load, idle, load on a server that has just started.
async fn talk(scene: &Scene<'_>, tokens: &[String; CLIENTS]) {
    let [a, b, c, d] = tokens;
    let mut talkers = [
        connect(scene, (0, a)).await,
        connect(scene, (1, b)).await,
        connect(scene, (2, c)).await,
        connect(scene, (3, d)).await,
    ];
    load(scene, &mut talkers, "first").await;
    tokio::time::sleep(IDLE).await;
    load(scene, &mut talkers, "second").await;
    for talker in talkers {
        scene.watched("a logout", talker.client.close(WATCHDOG)).await;
    }
}

fn cycles(default: usize) -> usize {
    std::env::var("NO_HANG_CYCLES").map_or(default, |text| text.parse().expect("NO_HANG_CYCLES is a number"))
}

fn run_cycles(cycles: usize, arguments: &[&str]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut server = Server::start(arguments);
    let tokens = std::array::from_fn(|at| server.token(&name(at)));
    for cycle in 0..cycles {
        if cycle > 0 {
            server.restart(None);
        }
        runtime.block_on(talk(&Scene { server: &server, cycle }, &tokens));
        assert_eq!(server.stop(), Some(0), "cycle {cycle}: {}", server.log.join("\n"));
    }
}

#[test]
fn slow_own_net_ring_on_one_core_never_hangs() {
    run_cycles(cycles(CYCLES_DEFAULT), &["--set", "net.kind=ring", "--cores", "1"]);
}

#[test]
fn slow_own_net_ring_on_two_cores_never_hangs() {
    run_cycles(cycles(CYCLES_DEFAULT), &["--set", "net.kind=ring", "--cores", "2"]);
}

#[test]
fn slow_own_net_epoll_on_one_core_never_hangs() {
    run_cycles(cycles(CYCLES_DEFAULT), &["--set", "net.kind=epoll", "--cores", "1"]);
}

#[test]
fn slow_own_net_epoll_on_two_cores_never_hangs() {
    run_cycles(cycles(CYCLES_DEFAULT), &["--set", "net.kind=epoll", "--cores", "2"]);
}

#[test]
fn slow_own_net_parked_by_the_executor_never_hangs() {
    for kind in ["net.kind=ring", "net.kind=epoll"] {
        run_cycles(cycles(CYCLES_OTHER_PARK), &["--set", kind, "--set", "net.park=glommio", "--cores", "2"]);
    }
}
