//! Clients at a gateway, a node of weight 0, with their sessions at two owners: real processes. What goes over it is what goes
//! over an owner's own socket, and each of the three may be killed.

mod common;

use common::nodes::{Nodes, PASSWORD, login, register, until};
use common::sdk::{find, run};
use common::{PATIENCE, Received, Wire};
use ringline_client::{Client, CloseReason, Event, Events, JoinPolicy, KickReason, SendOptions};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::Seq;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::{BodyKind, Class, Fetch, Reply, Request, Send};

const A: usize = 0;
const B: usize = 1;
const G: usize = 2;
const NODES: [(&str, u32); 3] = [("a", 1), ("b", 1), ("g", 0)];

/// Waits for a message of a text.
async fn hears(events: &mut Events, text: &str) {
    let is_it = |event: Event| match event {
        Event::Message(message) if message.text() == text => Some(()),
        _ => None,
    };
    tokio::time::timeout(PATIENCE, find(events, is_it)).await.unwrap_or_else(|_| panic!("{text:?} does not come"));
}

fn code(answer: &Received) -> Option<ErrorCode> {
    match answer.reply() {
        Reply::Failure { code, .. } => Some(code),
        _ => None,
    }
}

/// A raw connection at that node, whose user is registered.
fn knock(nodes: &Nodes, node: usize, user: &str) -> Wire {
    run(async {
        register(&Client::builder(&nodes.clients[node]).user(user).password(PASSWORD)).await;
    });
    let (wire, answer) = nodes.knock(node, (user, PASSWORD));
    assert!(matches!(answer.reply(), Reply::LoginOk(_)), "{:?}", answer.reply());
    wire
}

#[test]
fn people_at_a_gateway_chat_as_everywhere() {
    let nodes = Nodes::start(&NODES, "2", &[]);
    let (ann_name, bob_name) = (nodes.user_of(A, "ann"), nodes.user_of(B, "bob"));
    run(async {
        let gateway = &nodes.clients[G];
        let (ann, mut anns) = nodes.log_in(gateway, (&ann_name, 1)).await;
        let (bob, mut bobs) = nodes.log_in(gateway, (&bob_name, 1)).await;
        // The same user at his owner, too.
        let (tablet, mut tablets) = nodes.log_in(&nodes.clients[B], (&bob_name, 2)).await;
        until("two are held", || nodes.metric(G, "ringline_tunnels_held") == 2);
        assert_eq!((nodes.metric(A, "ringline_tunnels_served"), nodes.metric(B, "ringline_tunnels_served")), (1, 1));

        ann.send(&bob_name, "durable").await.unwrap();
        hears(&mut bobs, "durable").await;
        hears(&mut tablets, "durable").await;
        bob.send_with(&ann_name, "transient", SendOptions::transient()).await.unwrap();
        hears(&mut anns, "transient").await;
        tablet.send(&ann_name, "from the owner").await.unwrap();
        hears(&mut anns, "from the owner").await;
        ann.create_group("#team", ("The team", JoinPolicy::Open), &[]).await.unwrap();
        bob.join_group("#team", "").await.unwrap();
        ann.send("#team", "to all").await.unwrap();
        hears(&mut bobs, "to all").await;
        hears(&mut tablets, "to all").await;
        assert!(nodes.metric(G, "ringline_tunnels_up_bytes_total") > 0);
        assert!(nodes.metric(G, "ringline_tunnels_down_bytes_total") > 0);

        // The device that he has at the gateway logs in at his owner.
        let (_again, _) = nodes.log_in(&nodes.clients[B], (&bob_name, 1)).await;
        let reason = find(&mut bobs, |event| match event {
            Event::Closed { why } => Some(why),
            _ => None,
        });
        let reason = reason.await;
        assert!(matches!(reason, CloseReason::Kicked { reason: KickReason::Replaced, .. }), "{reason:?}");
        until("one is held", || nodes.metric(G, "ringline_tunnels_held") == 1);
        ann.close(PATIENCE).await;
        until("nobody is held", || nodes.metric(G, "ringline_tunnels_held") == 0);
        until("nobody is served", || nodes.metric(A, "ringline_tunnels_served") == 0);
        assert_eq!(nodes.metric(G, "ringline_tunnels_lost_total"), 0);
    });
}

#[test]
fn what_an_owner_refuses_comes_through_and_what_cannot_be_read_ends_there() {
    let nodes = Nodes::start(&NODES, "1", &[]);
    let (ann, bob) = (nodes.user_of(A, "ann"), nodes.user_of(B, "bob"));
    drop((knock(&nodes, G, &ann), knock(&nodes, G, &bob)));
    let (mut wire, answer) = nodes.knock(G, (&ann, "wrong horse"));
    assert_eq!(code(&answer), Some(ErrorCode::AuthFailed));
    let answer = login(&mut wire, (&ann, PASSWORD));
    assert!(matches!(answer.reply(), Reply::LoginOk(_)), "the same connection, again: {:?}", answer.reply());
    assert!(matches!(wire.request(&Request::Ping { stamp: 7 }).reply(), Reply::Pong { stamp: 7, .. }));
    assert_eq!(code(&login(&mut wire, (&ann, PASSWORD))), Some(ErrorCode::AlreadyLoggedIn));
    wire.send_raw(b"this is no frame at all");
    assert_eq!(code(&wire.push()), Some(ErrorCode::BadMagic));
    assert!(wire.is_ended());
    // A tunnel leads to one owner: for a user of another the client comes back.
    let (mut wire, _) = nodes.knock(G, (&ann, "wrong horse"));
    assert_eq!(code(&login(&mut wire, (&bob, PASSWORD))), Some(ErrorCode::Unavailable));
    assert!(wire.is_ended());
    // What comes before a login is the gateway's.
    let mut wire = nodes.servers[G].connect();
    wire.send_raw(b"nor is this, whoever sends it");
    assert_eq!(code(&wire.push()), Some(ErrorCode::BadMagic));
    assert!(wire.is_ended());
    until("nobody is held", || nodes.metric(G, "ringline_tunnels_held") == 0);
    until("nobody is served", || nodes.metric(A, "ringline_tunnels_served") == 0);
}

#[test]
fn a_client_that_does_not_read_at_a_gateway_lags_and_catches_up() {
    const MESSAGES: u64 = 500;
    let keys = ["limits.outbox_bytes_max=65536", "limits.write_stall_ms=600000", "limits.idle_timeout_ms=600000"];
    let nodes = Nodes::start(&NODES, "1", &keys);
    let (ann, bob) = (nodes.user_of(A, "ann"), nodes.user_of(B, "bob"));
    let (mut sleeper, mut sender) = (knock(&nodes, G, &ann), knock(&nodes, G, &bob));
    let mut neighbour = knock(&nodes, G, &nodes.user_of(A, "cid"));
    // More than the kernel's buffers, the window and the outbox together hold.
    let body = vec![b'z'; 32 * 1024];
    for client_seq in 1..=MESSAGES {
        let send =
            Send { to: &ann, class: Class::Durable, kind: BodyKind::File, client_seq, body: &body, ..Send::default() };
        let answer = sender.request(&Request::Send(send));
        assert!(matches!(answer.reply(), Reply::SendAck(_)), "{:?}", answer.reply());
    }
    assert!(matches!(neighbour.request(&Request::Ping { stamp: 1 }).reply(), Reply::Pong { .. }), "others go on");
    let (mut upto, mut lagged) = (Seq(0), Vec::new());
    while upto.0 < MESSAGES {
        let frame = sleeper.next().expect("it is not closed");
        match frame.reply() {
            Reply::Deliver(message) => {
                assert_eq!((message.seq, message.body), (upto.next(), &body[..]));
                upto = message.seq;
            }
            Reply::Lagged { from, to, .. } => {
                assert_eq!(from, upto.next());
                lagged.push((from, to));
                upto = to;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(!lagged.is_empty(), "nobody's buffers hold all of it");
    for (from, to) in lagged {
        let mut after = Seq(from.0 - 1);
        while after < to {
            let fetch = Fetch { with: &bob, after, before: None, limit: 100, newest: false };
            let page = sleeper.request(&Request::Fetch(fetch));
            let Reply::FetchOk { messages, .. } = page.reply() else { panic!("{:?}", page.reply()) };
            assert!(!messages.is_empty());
            for message in messages {
                assert_eq!((message.seq, message.body), (after.next(), &body[..]));
                after = message.seq;
            }
        }
    }
    // What is larger than a frame may be is refused by the owner, as by any node.
    let head = [&b"RL\x01\x00\x06\x01\x00\x00\x01\x00\x00\x00"[..], &FRAME_BYTES_CEILING.to_le_bytes()].concat();
    sleeper.send_raw(&head);
    assert_eq!(code(&sleeper.answer(1)), Some(ErrorCode::FrameTooLarge));
    assert!(sleeper.is_ended());
}

#[test]
fn an_owner_that_is_killed_is_waited_for() {
    let mut nodes = Nodes::start(&NODES, "1", &[]);
    let (ann, bob, cid) = (nodes.user_of(A, "ann"), nodes.user_of(B, "bob"), nodes.user_of(B, "cid"));
    let mut wire = knock(&nodes, G, &cid);
    let gateway = nodes.clients[G].clone();
    run(async {
        let (anns_client, mut anns) = nodes.log_in(&gateway, (&ann, 1)).await;
        let (bobs_client, mut bobs) = nodes.log_in(&gateway, (&bob, 1)).await;
        anns_client.send(&bob, "before").await.unwrap();
        hears(&mut bobs, "before").await;

        nodes.servers[B].kill();
        assert!(matches!(wire.push().reply(), Reply::Goaway { node: "", address: "", .. }), "it may come back at once");
        assert!(wire.is_ended());
        let (_, answer) = nodes.knock(G, (&cid, PASSWORD));
        assert_eq!(code(&answer), Some(ErrorCode::Unavailable));
        let kept = bobs_client.send(&ann, "kept for you");
        let (mut other, _) = nodes.knock(G, (&ann, PASSWORD));
        let answer = other.request(&Request::Ping { stamp: 5 });
        assert!(matches!(answer.reply(), Reply::Pong { stamp: 5, .. }), "the other owner's users go on");

        nodes.servers[B].restart(None);
        kept.await.unwrap();
        hears(&mut anns, "kept for you").await;
        anns_client.send(&bob, "after").await.unwrap();
        hears(&mut bobs, "after").await;
        assert!(nodes.metric(G, "ringline_tunnels_lost_total") >= 2);
    });
}

#[test]
fn whoever_was_at_a_gateway_that_is_gone_goes_on_at_another() {
    const H: usize = 3;
    let listed = [("a", 1), ("b", 1), ("g", 0), ("h", 0)];
    let mut nodes = Nodes::start(&listed, "2", &["cluster.route=least_connections"]);
    let (ann, bob) = (nodes.user_of(A, "ann"), nodes.user_of(B, "bob"));
    run(async {
        // Both know the gateways; ROUTE names nothing else.
        let gateways = [nodes.clients[G].clone(), nodes.clients[H].clone()].join(",");
        let (anns_client, mut anns) = nodes.log_in(&gateways, (&ann, 1)).await;
        let (bobs_client, mut bobs) = nodes.log_in(&gateways, (&bob, 1)).await;
        let held = |nodes: &Nodes| [G, H].map(|node| nodes.metric(node, "ringline_tunnels_held"));
        until("both are held", || held(&nodes).iter().sum::<u64>() == 2);
        let fuller = if held(&nodes)[0] > 0 { G } else { H };
        nodes.servers[fuller].kill();
        anns_client.send(&bob, "by the other one").await.unwrap();
        hears(&mut bobs, "by the other one").await;
        bobs_client.send(&ann, "here, too").await.unwrap();
        hears(&mut anns, "here, too").await;
        let left = G + H - fuller;
        until("both are held by the other", || nodes.metric(left, "ringline_tunnels_held") == 2);
        until("owners forget the first", || {
            [A, B].iter().map(|node| nodes.metric(*node, "ringline_tunnels_served")).sum::<u64>() == 2
        });
    });
}

#[test]
fn a_gateway_that_stops_says_so_and_its_owners_hear_of_it() {
    let mut nodes = Nodes::start(&NODES, "1", &[]);
    let (ann, bob) = (nodes.user_of(A, "ann"), nodes.user_of(B, "bob"));
    let (mut wire, mut other) = (knock(&nodes, G, &ann), knock(&nodes, G, &bob));
    until("two are served", || {
        nodes.metric(A, "ringline_tunnels_served") + nodes.metric(B, "ringline_tunnels_served") == 2
    });
    nodes.servers[G].signal("TERM");
    for wire in [&mut wire, &mut other] {
        assert!(matches!(wire.push().reply(), Reply::Goaway { node: "", .. }));
    }
    assert_eq!(nodes.servers[G].wait(), Some(0));
    until("nobody is served", || {
        nodes.metric(A, "ringline_tunnels_served") + nodes.metric(B, "ringline_tunnels_served") == 0
    });
    assert!(wire.is_ended() && other.is_ended());
}
