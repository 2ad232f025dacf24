//! Links between whole nodes on loopback: real sockets, real certificates, the cores driven by the test's own thread.

mod rig;
mod strangers;

use std::time::{Duration, Instant};

use ringline_cluster::link::batch::PAYLOAD_BYTES_MAX;
use ringline_cluster::link::channel::{OUT_BYTES_MAX, SILENCE_MS};
use ringline_cluster::placement::NodeIndex;

use self::rig::{Cluster, Kind, PATIENCE, Proxy, numbers};
use super::refused::Reason;
use super::{NotSent, PeerEvent};

const A: NodeIndex = NodeIndex(0);
const B: NodeIndex = NodeIndex(1);
const C: NodeIndex = NodeIndex(2);

/// Everybody sends numbered messages to every shard of everybody else, and each comes once, in order.
fn everybody_speaks(cluster: &mut Cluster, count: u32) {
    let routes = cluster.routes();
    for number in 0..count {
        for &(from, to) in &routes {
            cluster.send(from, to, &number.to_le_bytes()).unwrap();
        }
        cluster.turn();
    }
    cluster.until("all messages came", |cluster| {
        routes.iter().all(|route| numbers(cluster.came(*route)).len() == count as usize)
    });
    for route in routes {
        assert_eq!(numbers(cluster.came(route)), (0..count).collect::<Vec<_>>(), "{route:?}");
    }
}

#[test]
fn nodes_that_start_at_once_find_each_other_by_ring_and_by_epoll() {
    for kind in [Kind::Ring, Kind::Epoll] {
        let mut cluster = Cluster::new(kind, &[("a", 2), ("b", 2), ("c", 2)]);
        cluster.until("all are up", Cluster::all_up);
        everybody_speaks(&mut cluster, 50);
        let snapshot = cluster.snapshot(A, 0);
        assert_eq!(snapshot.levels(), (2, 2));
        assert_eq!(snapshot.counters.refused.iter().sum::<u64>(), 0);
    }
}

#[test]
fn nodes_start_one_after_another_with_any_number_of_cores() {
    let mut cluster = Cluster::stopped(Kind::Epoll, &[("a", 1), ("b", 3), ("c", 2)]);
    for node in [C, A, B] {
        cluster.start(node);
        cluster.run_for(Duration::from_millis(300));
    }
    cluster.until("all are up", Cluster::all_up);
    everybody_speaks(&mut cluster, 20);
    let Some(PeerEvent::Up { shards, .. }) =
        cluster.told(A, 0).into_iter().find(|event| matches!(event, PeerEvent::Up { node: B, .. }))
    else {
        panic!("a was not told how many shards b has");
    };
    assert_eq!(shards, 3);
}

#[test]
fn a_node_that_is_killed_is_down_and_comes_back_as_another() {
    let mut cluster = Cluster::new(Kind::Ring, &[("a", 2), ("b", 2)]);
    cluster.until("all are up", Cluster::all_up);
    everybody_speaks(&mut cluster, 5);
    cluster.kill(B);
    cluster.until("b is down", |cluster| (0..2).all(|core| !cluster.is_up((A, core), B)));
    assert_eq!(cluster.send((A, 0), (B, 0), b"late"), Err(NotSent::Away));
    cluster.forget_what_came();
    cluster.start(B);
    cluster.until("all are up", Cluster::all_up);
    for core in 0..2 {
        let told = cluster.told(A, core);
        assert!(matches!(told[..], [PeerEvent::Reset { node: B }, PeerEvent::Up { node: B, .. }]), "{told:?}");
    }
    cluster.forget_what_came();
    everybody_speaks(&mut cluster, 5);
}

#[test]
fn a_node_that_stops_in_order_is_down_at_once() {
    let mut cluster = Cluster::new(Kind::Epoll, &[("a", 1), ("b", 1)]);
    cluster.until("all are up", Cluster::all_up);
    cluster.stop(B);
    cluster.forget_what_came();
    cluster.until("b is down", |cluster| !cluster.is_up((A, 0), B));
    assert_eq!(cluster.told(A, 0), [PeerEvent::Down { node: B }]);
}

#[test]
fn connections_cut_anywhere_lose_and_double_nothing() {
    const MESSAGES: u32 = 400;
    for kind in [Kind::Ring, Kind::Epoll] {
        let mut cluster = Cluster::stopped(kind, &[("a", 1), ("b", 1)]);
        // Both ways: each dials the other through a line that breaks.
        cluster.connect_through(A, B, Proxy::new());
        cluster.connect_through(B, A, Proxy::new());
        cluster.start(A);
        cluster.start(B);
        cluster.until("all are up", Cluster::all_up);
        let routes = [((A, 0), (B, 0)), ((B, 0), (A, 0))];
        let mut next = [0u32; 2];
        let (mut size, mut cuts) = (1usize, 0);
        let started = Instant::now();
        while next.iter().any(|next| *next < MESSAGES) {
            assert!(started.elapsed() < PATIENCE, "{next:?} were taken\n{}", cluster.describe());
            for (at, (from, to)) in routes.into_iter().enumerate() {
                // Any size, so that cuts fall anywhere in batches.
                size = size * 7 % 60_013;
                let mut payload = next[at].to_le_bytes().to_vec();
                payload.resize(4 + size, 7);
                let up = next[at] < MESSAGES && cluster.is_up(from, to.0);
                next[at] += u32::from(up && cluster.send(from, to, &payload).is_ok());
            }
            // Once for each so many messages: a line that is always cut carries none.
            if next[0] / 20 > cuts {
                cuts = next[0] / 20;
                cluster.cut_after(size);
            }
            cluster.turn();
        }
        cluster.cut_after(usize::MAX);
        cluster.until("all messages came", |cluster| {
            routes.iter().all(|route| numbers(cluster.came(*route)).len() == MESSAGES as usize)
        });
        for route in routes {
            assert_eq!(numbers(cluster.came(route)), (0..MESSAGES).collect::<Vec<_>>());
        }
        let counters = cluster.snapshot(A, 0).counters;
        assert!(counters.connected > 3, "it was cut: {counters:?}");
        let resets = |event: &PeerEvent| matches!(event, PeerEvent::Reset { .. });
        assert!(!cluster.told(A, 0).iter().any(resets) && !cluster.told(B, 0).iter().any(resets));
    }
}

#[test]
fn a_silent_node_is_down_after_five_seconds_and_up_when_it_speaks_again() {
    let mut cluster = Cluster::new(Kind::Epoll, &[("a", 1), ("b", 1)]);
    cluster.until("all are up", Cluster::all_up);
    // b's thread stands still; its sockets stay open.
    cluster.pause(B, true);
    cluster.forget_what_came();
    cluster.run_for(Duration::from_millis(100));
    assert!(cluster.is_up((A, 0), B));
    cluster.send((A, 0), (B, 0), &0u32.to_le_bytes()).unwrap();
    cluster.advance_clock(SILENCE_MS);
    cluster.until("b is down", |cluster| !cluster.is_up((A, 0), B));
    assert_eq!(cluster.told(A, 0), [PeerEvent::Down { node: B }]);
    cluster.pause(B, false);
    cluster.until("all are up", Cluster::all_up);
    cluster.send((A, 0), (B, 0), &1u32.to_le_bytes()).unwrap();
    cluster.until("both came", |cluster| cluster.came(((A, 0), (B, 0))).len() == 2);
    assert_eq!(numbers(cluster.came(((A, 0), (B, 0)))), [0, 1], "what was under way is not lost");
    assert!(!cluster.told(A, 0).iter().any(|event| matches!(event, PeerEvent::Reset { .. })));
}

#[test]
fn a_slow_node_costs_bounded_memory_and_gets_everything_in_the_end() {
    let mut cluster = Cluster::new(Kind::Ring, &[("a", 1), ("b", 1)]);
    cluster.until("all are up", Cluster::all_up);
    // It reads, and works nothing off: the credit ends, not the socket.
    cluster.block(B, true);
    let mut payload = vec![7; 100_000];
    let mut sent = 0u32;
    loop {
        payload[..4].copy_from_slice(&sent.to_le_bytes());
        match cluster.send((A, 0), (B, 0), &payload) {
            Ok(()) => sent += 1,
            Err(error) => {
                assert_eq!(error, NotSent::Full);
                break;
            }
        }
        cluster.turn();
    }
    let waiting = cluster.snapshot(A, 0).links[0].waiting_bytes as usize;
    assert!((OUT_BYTES_MAX - 200_000..OUT_BYTES_MAX + 200_000).contains(&waiting), "{waiting} bytes wait");
    // Beats go on: it is slow, not away.
    cluster.advance_clock(SILENCE_MS / 2);
    cluster.run_for(Duration::from_millis(50));
    assert!(cluster.is_up((A, 0), B) && cluster.came(((A, 0), (B, 0))).is_empty());
    cluster.block(B, false);
    cluster.until("all came", |cluster| cluster.came(((A, 0), (B, 0))).len() == sent as usize);
    assert_eq!(numbers(cluster.came(((A, 0), (B, 0)))), (0..sent).collect::<Vec<_>>());
    cluster.send((A, 0), (B, 0), &payload).unwrap();
    assert_eq!(cluster.snapshot(A, 0).counters.full, 1);
}

#[test]
fn messages_have_a_largest_size_and_the_largest_goes_through() {
    let mut cluster = Cluster::new(Kind::Epoll, &[("a", 1), ("b", 1)]);
    assert_eq!(cluster.send((A, 0), (B, 0), b"early"), Err(NotSent::Away));
    cluster.until("all are up", Cluster::all_up);
    assert_eq!(cluster.send((A, 0), (A, 0), b"to itself"), Err(NotSent::Away));
    assert_eq!(cluster.send((A, 0), (NodeIndex(9), 0), b"nobody"), Err(NotSent::Away));
    assert_eq!(cluster.send((A, 0), (B, 0), &vec![0; PAYLOAD_BYTES_MAX + 1]), Err(NotSent::TooLarge));
    cluster.send((A, 0), (B, 0), b"before").unwrap();
    cluster.send((A, 0), (B, 0), &vec![9; PAYLOAD_BYTES_MAX]).unwrap();
    // For a shard that b does not have: dropped there, counted.
    cluster.send((A, 0), (B, 7), b"lost").unwrap();
    cluster.send((A, 0), (B, 0), b"after").unwrap();
    cluster.until("three came", |cluster| cluster.came(((A, 0), (B, 0))).len() == 3);
    let lengths: Vec<_> = cluster.came(((A, 0), (B, 0))).iter().map(|payload| payload.len()).collect();
    assert_eq!(lengths, [6, PAYLOAD_BYTES_MAX, 5]);
    assert_eq!(cluster.snapshot(B, 0).counters.dropped, 1);
}

#[test]
fn nodes_join_and_leave_while_the_others_run() {
    let mut cluster = Cluster::stopped(Kind::Epoll, &[("a", 2), ("b", 1), ("c", 2)]);
    for node in [A, B] {
        cluster.start(node);
        cluster.list(node, &[A, B]);
    }
    cluster.until("a and b are up", |cluster| cluster.is_up((A, 0), B) && cluster.is_up((B, 0), A));
    // It knows the others, which do not know it: refused by name, and nobody hears of it.
    cluster.start(C);
    let unknown = |cluster: &Cluster| {
        let refused = |node, shard| cluster.snapshot(node, shard).counters.refused[Reason::UnknownNode as usize];
        refused(A, 0) + refused(A, 1) + refused(B, 0)
    };
    cluster.until("c is refused", |cluster| unknown(cluster) > 0);
    assert!(!cluster.is_up((A, 0), C) && cluster.snapshot(A, 0).levels() == (1, 1));
    for node in [A, B] {
        cluster.list(node, &[A, B, C]);
    }
    cluster.until("all are up", Cluster::all_up);
    everybody_speaks(&mut cluster, 20);
    // It leaves: down at once, refused, and what is sent to it is not taken.
    cluster.forget_what_came();
    cluster.list(A, &[A, B]);
    cluster.turn();
    assert_eq!(
        (cluster.told(A, 0), cluster.told(A, 1)),
        (vec![PeerEvent::Down { node: C }], vec![PeerEvent::Down { node: C }])
    );
    assert_eq!(cluster.send((A, 0), (C, 0), b"late"), Err(NotSent::Away));
    let before = unknown(&cluster);
    cluster.until("c is refused again", |cluster| unknown(cluster) > before);
    assert!(cluster.is_up((B, 0), C) && cluster.is_up((A, 0), B), "others stay as they are");
    // The same process is back: what either had for the other goes on.
    cluster.list(A, &[A, B, C]);
    cluster.until("all are up again", Cluster::all_up);
    cluster.forget_what_came();
    everybody_speaks(&mut cluster, 20);
}
