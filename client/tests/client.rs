//! The client over real sockets against the scripted server: what breaks, and how it mends.

use std::time::Duration;

use ringline_client::testing::{FakeServer, Trick};
use ringline_client::{
    Amendment, BodyKind, CatchUp, Client, ClientBuilder, CloseReason, ConnectError, DeviceId, ErrorCode, Event, Events,
    HistoryRange, LinkError, Message, MessageState, Outcome, SendError, SendOptions, Seq,
};

const PASSWORD: &str = "secret word";
/// No test takes so long: it stops one that would hang.
const PATIENCE: Duration = Duration::from_secs(30);

fn builder(server: &FakeServer, name: &str) -> ClientBuilder {
    server.add_user(name, PASSWORD);
    Client::builder(server.address()).user(name).password(PASSWORD)
}

async fn log_in(server: &FakeServer, name: &str) -> (Client, Events) {
    builder(server, name).connect().await.unwrap()
}

async fn next(events: &mut Events) -> Event {
    tokio::time::timeout(PATIENCE, events.next()).await.expect("an event in time").expect("an event")
}

async fn next_message(events: &mut Events) -> Message {
    loop {
        if let Event::Message(message) = next(events).await {
            return message;
        }
    }
}

async fn bodies(events: &mut Events, count: usize) -> Vec<String> {
    let mut bodies = Vec::new();
    while bodies.len() < count {
        bodies.push(next_message(events).await.text().into_owned());
    }
    bodies
}

/// Waits for what the server has heard to become so.
async fn until(condition: impl Fn() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, met).await.expect("the condition in time");
}

#[tokio::test]
async fn a_send_that_was_lost_is_sent_again_under_the_same_number() {
    let server = FakeServer::start().await.unwrap();
    server.add_user("bob", PASSWORD);
    let (ann, mut events) = log_in(&server, "ann").await;
    server.trick(Trick::BreakBeforeStore);
    let accepted = ann.send("bob", "lost on the way").await.unwrap();
    assert_eq!((accepted.seq.0, accepted.dup), (1, false));
    server.trick(Trick::BreakBeforeAck);
    let accepted = ann.send("bob", "kept, answer lost").await.unwrap();
    assert_eq!((accepted.seq.0, accepted.dup), (2, true));
    assert_eq!(server.stored("ann", "bob"), ["lost on the way", "kept, answer lost"]);
    let read = server.sends_read();
    assert_eq!(read.len(), 4);
    assert!(read[0] == read[1] && read[2] == read[3] && read[1] < read[2], "{read:?}");
    assert_eq!(bodies(&mut events, 2).await, ["lost on the way", "kept, answer lost"]);
}

#[tokio::test]
async fn sends_are_pipelined_in_order_and_resent_in_order() {
    let server = FakeServer::start().await.unwrap();
    server.add_user("bob", PASSWORD);
    server.window(8);
    let (ann, _) = log_in(&server, "ann").await;
    server.trick(Trick::Swallow);
    server.trick(Trick::Swallow);
    let texts: Vec<String> = (0..100).map(|number| format!("text {number}")).collect();
    let sendings: Vec<_> = texts.iter().map(|text| ann.send("bob", text.clone())).collect();
    // The oldest two are unanswered, so the window ends six after them.
    until(|| server.sends_read().len() == 8).await;
    server.break_connections();
    for sending in sendings {
        sending.await.unwrap();
    }
    let mut stored = server.stored("ann", "bob");
    assert_eq!(stored.len(), 100);
    // What was swallowed is kept at the second try, behind what had been accepted by then.
    stored.sort_by_key(|text| texts.iter().position(|other| other == text));
    assert_eq!(stored, texts);
}

#[tokio::test]
async fn busy_is_tried_again_and_a_final_refusal_is_not() {
    let server = FakeServer::start().await.unwrap();
    server.add_user("bob", PASSWORD);
    let (ann, _) = log_in(&server, "ann").await;
    server.trick(Trick::Refuse(ErrorCode::Busy, 20));
    server.trick(Trick::Refuse(ErrorCode::RateLimited, 20));
    assert_eq!(ann.send("bob", "hello").await.unwrap().seq.0, 1);
    assert_eq!(server.sends_read().len(), 3);
    let refused = |code| Err(SendError::Refused { code, detail: String::new() });
    assert_eq!(ann.send("nobody", "hello").await, refused(ErrorCode::NoSuchUser));
    assert_eq!(ann.send_with("bob", "hello", SendOptions::transient()).await, refused(ErrorCode::NotOnline));
    assert_eq!(ann.send(" bad name", "hello").await, Err(SendError::BadName));
    // A refusal that ends the connection ends the send as well: it would only be refused again.
    server.trick(Trick::Refuse(ErrorCode::BadBody, 0));
    assert_eq!(ann.send("bob", "hello").await, refused(ErrorCode::BadBody));
    assert_eq!(ann.send("bob", "and on").await.unwrap().seq.0, 2);
}

#[tokio::test]
async fn gaps_and_lag_are_filled_before_what_follows() {
    let server = FakeServer::start().await.unwrap();
    let (ann, _) = log_in(&server, "ann").await;
    let device = DeviceId(9);
    let (_bob, mut events) = builder(&server, "bob").device(device).connect().await.unwrap();
    for trick in [Trick::LoseDelivery, Trick::LoseDelivery, Trick::Lag] {
        server.trick(trick);
    }
    for text in ["one", "two", "three"] {
        ann.send("bob", text).await.unwrap();
    }
    assert_eq!(bodies(&mut events, 3).await, ["one", "two", "three"]);
    for _ in 0..7 {
        server.trick(Trick::LoseDelivery);
    }
    for number in 4..=11 {
        ann.send("bob", number.to_string()).await.unwrap();
    }
    assert_eq!(bodies(&mut events, 8).await, ["4", "5", "6", "7", "8", "9", "10", "11"]);
    // The last is acknowledged when the next is asked for.
    let waiting = tokio::spawn(async move { events.next().await });
    until(|| server.acked("bob", device, "ann") == 11).await;
    waiting.abort();
}

#[tokio::test]
async fn what_was_missed_comes_first_and_only_once() {
    let server = FakeServer::start().await.unwrap();
    let device = DeviceId(9);
    for (from, count) in [("ann", 8), ("carl", 1), ("dora", 1), ("emil", 1), ("fay", 2)] {
        server.add_user(from, PASSWORD);
        for number in 1..=count {
            server.store(from, "bob", &format!("{from} {number}"));
        }
    }
    server.truncate("ann", "bob", 3);
    let (bob, mut events) = builder(&server, "bob").device(device).connect().await.unwrap();
    let mut got = Vec::new();
    loop {
        match next(&mut events).await {
            Event::Message(message) => got.push(message.text().into_owned()),
            Event::CaughtUp { messages } => break assert_eq!(messages, 11),
            other => assert!(matches!(other, Event::Connected { .. }), "{other:?}"),
        }
    }
    let of_ann: Vec<_> = got.iter().filter(|text| text.starts_with("ann")).collect();
    assert_eq!(of_ann, ["ann 3", "ann 4", "ann 5", "ann 6", "ann 7", "ann 8"]);
    assert_eq!(got.len(), 11);
    // While away: one conversation goes on, one begins.
    server.refuse_connections(true);
    server.break_connections();
    assert!(matches!(next(&mut events).await, Event::Reconnecting { attempt: 1, .. }));
    server.store("carl", "bob", "carl 2");
    server.store("gus", "bob", "gus 1");
    server.refuse_connections(false);
    let mut missed = bodies(&mut events, 2).await;
    missed.sort();
    assert_eq!(missed, ["carl 2", "gus 1"]);
    drop(events);
    bob.close(PATIENCE).await;
}

#[tokio::test]
async fn a_truncated_gap_is_skipped_by_name() {
    let server = FakeServer::start().await.unwrap();
    let (ann, _) = log_in(&server, "ann").await;
    let (_bob, mut events) = log_in(&server, "bob").await;
    ann.send("bob", "1").await.unwrap();
    assert_eq!(bodies(&mut events, 1).await, ["1"]);
    for _ in 0..4 {
        server.trick(Trick::LoseDelivery);
    }
    server.truncate("ann", "bob", 4);
    for number in 2..=6 {
        ann.send("bob", number.to_string()).await.unwrap();
    }
    let (from, to) = loop {
        match next(&mut events).await {
            Event::Skipped { from, to, why: ErrorCode::Truncated, .. } => break (from.0, to.0),
            Event::CaughtUp { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((from, to), (2, 3));
    assert_eq!(bodies(&mut events, 3).await, ["4", "5", "6"]);
}

#[tokio::test]
async fn delivery_is_told_for_both_classes() {
    let server = FakeServer::start().await.unwrap();
    let (ann, _) = log_in(&server, "ann").await;
    let (_bob, mut events) = log_in(&server, "bob").await;
    let listening = tokio::spawn(async move { while events.next().await.is_some() {} });
    for options in [SendOptions::default(), SendOptions::transient()] {
        let options = SendOptions { delivery_timeout: Some(Duration::from_secs(5)), ..options };
        let mut sending = ann.send_with("bob", "hello", options);
        (&mut sending).await.unwrap();
        assert_eq!(sending.delivered().await.unwrap().outcome, Outcome::Delivered);
    }
    assert_eq!(ann.send("bob", "no receipt").delivered().await, Err(SendError::DeliveryNotAsked));
    listening.abort();
}

#[tokio::test]
async fn a_half_open_server_is_noticed_and_left() {
    let server = FakeServer::start().await.unwrap();
    server.add_user("bob", PASSWORD);
    server.ping_interval(Duration::from_millis(60));
    let (ann, mut events) = log_in(&server, "ann").await;
    server.mute(true);
    loop {
        if let Event::Reconnecting { why, .. } = next(&mut events).await {
            assert_eq!(why, LinkError::NoAnswer);
            break;
        }
    }
    server.mute(false);
    // A connection that was opened while the server was mute will not log in any more.
    server.break_connections();
    assert_eq!(ann.send("bob", "hello").await.unwrap().seq.0, 1);
}

#[tokio::test]
async fn wrong_frames_of_the_server_cost_the_connection_and_nothing_else() {
    let server = FakeServer::start().await.unwrap();
    server.add_user("bob", PASSWORD);
    let (ann, mut events) = log_in(&server, "ann").await;
    server.garbage("ann");
    loop {
        if let Event::Reconnecting { why, .. } = next(&mut events).await {
            assert_eq!(why, LinkError::Protocol(ErrorCode::BadMagic));
            break;
        }
    }
    assert_eq!(ann.send("bob", "hello").await.unwrap().seq.0, 1);
}

#[tokio::test]
async fn the_end_is_told_with_its_reason() {
    let server = FakeServer::start().await.unwrap();
    let (ann, mut events) = log_in(&server, "ann").await;
    server.kick("ann");
    let why = loop {
        if let Event::Closed { why } = next(&mut events).await {
            break why;
        }
    };
    assert!(matches!(why, CloseReason::Kicked { .. }));
    assert!(events.next().await.is_none());
    assert_eq!(ann.send("bob", "too late").await, Err(SendError::NotSent));
    assert!(ann.online(None, 0).await.is_err());
    assert_eq!(server.logins(), 1, "a kicked client does not come back");
    // Close by the application, and a login that is wrong from the start.
    let (bob, mut events) = log_in(&server, "bob").await;
    bob.close(PATIENCE).await;
    while let Some(event) = events.next().await {
        if let Event::Closed { why } = event {
            assert_eq!(why, CloseReason::ByClient);
        }
    }
    let wrong = builder(&server, "ann").password("something else").connect().await;
    assert!(matches!(wrong, Err(ConnectError::AuthFailed)));
    let taken = builder(&server, "ann").register().await;
    assert!(matches!(taken, Err(ConnectError::Refused { code: ErrorCode::NameTaken, .. })));
    let nobody = Client::builder("127.0.0.1:1").user("ann").password(PASSWORD).connect().await;
    assert!(matches!(nobody, Err(ConnectError::Link(LinkError::Io(_)))));
}

#[tokio::test]
async fn goaway_is_followed_and_tokens_are_asked_for_anew() {
    let server = FakeServer::start().await.unwrap();
    server.add_user("ann", PASSWORD);
    let provider = || -> ringline_client::TokenFuture { Box::pin(async { Ok("token of ann".to_owned()) }) };
    let (_ann, mut events) = Client::builder(server.address()).user("ann").token(provider).connect().await.unwrap();
    server.goaway("ann", Duration::from_millis(10));
    loop {
        if let Event::Reconnecting { why: LinkError::Goaway { .. }, delay, .. } = next(&mut events).await {
            assert!(delay >= Duration::from_millis(10));
            break;
        }
    }
    until(|| server.logins() == 2).await;
}

#[tokio::test]
async fn who_is_sent_on_is_not_slower_for_what_failed_before() {
    let server = FakeServer::start().await.unwrap();
    let (_ann, mut events) = log_in(&server, "ann").await;
    // Connections that are lost soon count up.
    for _ in 0..4 {
        server.break_connections();
        while !matches!(next(&mut events).await, Event::Reconnecting { .. }) {}
        while !matches!(next(&mut events).await, Event::Connected { .. }) {}
    }
    server.goaway("ann", Duration::from_millis(10));
    loop {
        if let Event::Reconnecting { why: LinkError::Goaway { .. }, attempt, .. } = next(&mut events).await {
            assert_eq!(attempt, 1);
            break;
        }
    }
}

/// Two servers, and a builder of a client that is given both.
async fn two(first: &str) -> (FakeServer, FakeServer, ClientBuilder) {
    let (one, other) = (FakeServer::start().await.unwrap(), FakeServer::start().await.unwrap());
    let addresses = [one.address(), other.address()].join(", ");
    let builder = Client::builder(addresses).user(first).password(PASSWORD);
    (one, other, builder)
}

#[tokio::test]
async fn any_of_several_addresses_is_asked_for_the_route_and_the_password_goes_to_the_right_one_alone() {
    let (one, other, builder) = two("ann").await;
    // Twenty clients: some of them begin at each.
    for _ in 0..20 {
        one.route_to(&other.address());
        other.route_to(&other.address());
        one.redirect_to("127.0.0.1:1");
        other.add_user("ann", PASSWORD);
        let (_ann, mut events) = builder.clone().connect().await.unwrap();
        next(&mut events).await;
    }
    assert_eq!((one.logins(), other.logins()), (0, 20));
    assert!(one.routes() > 0 && other.routes() > 0, "{} and {}", one.routes(), other.routes());
    let new = Client::builder([one.address(), other.address()].join(",")).user("bob").password(PASSWORD);
    new.register().await.unwrap();
    // Whoever has one address asks nobody.
    let routes = other.routes();
    log_in(&other, "carl").await;
    assert_eq!(other.routes(), routes);
}

#[tokio::test]
async fn a_server_without_routes_and_a_route_to_the_wrong_one_end_at_the_right_one_all_the_same() {
    let (one, other, builder) = two("ann").await;
    other.add_user("ann", PASSWORD);
    one.redirect_to(&other.address());
    for route in [String::new(), one.address()] {
        one.route_to(&route);
        other.route_to(&route);
        for _ in 0..10 {
            builder.clone().connect().await.unwrap();
        }
    }
    assert_eq!((one.logins(), other.logins()), (0, 20));
    // In circles it does not run.
    other.redirect_to(&one.address());
    let error = builder.connect().await.err().unwrap();
    assert!(matches!(error, ConnectError::Link(LinkError::Redirected { .. })), "{error}");
}

#[tokio::test]
async fn a_user_who_moved_is_followed_and_comes_back_there() {
    let (one, other) = (FakeServer::start().await.unwrap(), FakeServer::start().await.unwrap());
    other.add_user("ann", PASSWORD);
    other.add_user("bob", PASSWORD);
    let (ann, mut events) = log_in(&one, "ann").await;
    one.move_to("ann", &other.address());
    loop {
        if let Event::Reconnecting { why: LinkError::Goaway { address, .. }, .. } = next(&mut events).await {
            assert_eq!(address, Some(other.address()));
            break;
        }
    }
    assert_eq!(ann.send("bob", "over there").await.unwrap().seq.0, 1);
    assert_eq!(other.stored("ann", "bob"), ["over there"]);
    other.break_connections();
    until(|| other.logins() == 2).await;
    assert_eq!(one.logins(), 1);
}

#[tokio::test]
async fn who_hangs_is_left_for_the_node_that_has_its_users_now() {
    let (one, other, builder) = two("ann").await;
    for server in [&one, &other] {
        server.add_user("ann", PASSWORD);
        server.add_user("bob", PASSWORD);
        server.route_to(&one.address());
    }
    one.ping_interval(Duration::from_millis(60));
    let (ann, _events) = builder.connect().await.unwrap();
    assert_eq!(other.logins(), 0);
    // It takes connections, and says nothing any more.
    other.route_to(&other.address());
    one.mute(true);
    assert_eq!(ann.send("bob", "over there").await.unwrap().seq.0, 1);
    assert_eq!(other.stored("ann", "bob"), ["over there"]);
}

#[tokio::test]
async fn who_is_sent_to_a_node_that_is_gone_tries_again_soon() {
    let (one, other, builder) = two("ann").await;
    for server in [&one, &other] {
        server.add_user("ann", PASSWORD);
        server.route_to(&one.address());
    }
    let (_ann, mut events) = builder.connect().await.unwrap();
    // Nobody knows yet that the user's node is gone.
    for server in [&one, &other] {
        server.route_to("127.0.0.1:1");
    }
    one.refuse_connections(true);
    one.break_connections();
    let mut attempts = 0;
    while attempts < 8 {
        if let Event::Reconnecting { attempt, delay, .. } = next(&mut events).await {
            assert!(delay <= Duration::from_millis(3_200), "attempt {attempt} waits {delay:?}");
            attempts += 1;
        }
    }
}

#[tokio::test]
async fn a_slow_application_loses_no_durable_message() {
    let server = FakeServer::start().await.unwrap();
    let (ann, _) = log_in(&server, "ann").await;
    let slow = builder(&server, "bob").events_queued_max(4).catch_up(CatchUp::Seen);
    let (_bob, mut events) = slow.connect().await.unwrap();
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    assert!(matches!(next(&mut events).await, Event::CaughtUp { messages: 0 }));
    for number in 0..50 {
        ann.send("bob", number.to_string()).await.unwrap();
        ann.send_with("bob", "typing", SendOptions::transient()).await.unwrap();
    }
    let (mut got, mut missed) = (Vec::new(), 0);
    while got.len() < 50 {
        match next(&mut events).await {
            Event::Message(message) if message.seq.0 > 0 => got.push(message.text().into_owned()),
            Event::Missed { count } => missed += count,
            Event::Message(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(got, (0..50).map(|number| number.to_string()).collect::<Vec<_>>());
    assert!(missed > 0, "what is dropped is counted");
}

#[tokio::test]
async fn lists_and_history_are_read_in_pages() {
    let server = FakeServer::start().await.unwrap();
    let mut clients = Vec::new();
    for name in ["ann", "bob", "carl", "dora", "emil"] {
        clients.push(log_in(&server, name).await);
    }
    let (ann, _) = &clients[0];
    let (mut users, mut from) = (Vec::new(), None);
    loop {
        let page = ann.online(from.as_deref(), 0).await.unwrap();
        users.extend(page.users.iter().map(|row| row.user.to_string()));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(users, ["ann", "bob", "carl", "dora", "emil"]);
    for user in &users {
        ann.send(user, "hello").await.unwrap();
    }
    let (mut rows, mut from) = (0, None);
    loop {
        let page = ann.conversations(from, 0).await.unwrap();
        rows += page.conversations.len();
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(rows, 5);
    let history = ann.history("bob", HistoryRange { limit: 10, ..HistoryRange::default() }).await.unwrap();
    assert_eq!((history.head.0, history.messages.len()), (1, 1));
    assert_eq!(&*history.messages[0].text(), "hello");
}

#[tokio::test]
async fn amendments_are_kept_once_and_told_in_order() {
    let server = FakeServer::start().await.unwrap();
    let (ann, mut own) = log_in(&server, "ann").await;
    let (bob, mut events) = log_in(&server, "bob").await;
    let laptop = builder(&server, "bob").device(DeviceId(77)).connect().await.unwrap();
    let sent = ann.send("bob", "helo").await.unwrap();
    server.trick(Trick::BreakBeforeAck);
    let edit = ann.edit("bob", sent.seq, "hello");
    let recall = ann.recall("bob", sent.seq);
    let (edited, recalled) = (edit.await.unwrap(), recall.await.unwrap());
    assert_eq!((edited.seq.0, edited.dup, recalled.seq.0), (2, true, 3), "written twice, kept once");
    for events in [&mut own, &mut events] {
        assert_eq!(next_message(events).await.amendment(), None);
        let message = next_message(events).await;
        let amendment = Amendment { of: sent.seq, state: MessageState::Edited };
        assert_eq!(
            (message.amendment(), &*message.text(), message.kind),
            (Some(amendment), "hello", BodyKind::Amendment)
        );
        let message = next_message(events).await;
        assert_eq!(message.amendment(), Some(Amendment { of: sent.seq, state: MessageState::Recalled }));
    }
    let history = ann.history("bob", HistoryRange { limit: 10, ..HistoryRange::default() }).await.unwrap();
    assert_eq!((history.messages[0].state(), history.messages[0].body.len()), (MessageState::Recalled, 0));
    let unknown = ann.edit("bob", Seq(9), "x").await.unwrap_err();
    assert!(matches!(unknown, SendError::Refused { code: ErrorCode::NoSuchMessage, .. }), "{unknown:?}");
    assert!(matches!(ann.edit(" ", Seq(1), "x").await, Err(SendError::BadName)));
    bob.delete_for_me("ann", edited.seq).await.unwrap();
    let (_laptop, mut other) = laptop;
    loop {
        match next(&mut other).await {
            Event::Hidden { seq, .. } => break assert_eq!(seq, edited.seq),
            Event::Closed { why } => panic!("{why}"),
            _ => {}
        }
    }
    let history = bob.history("ann", HistoryRange { limit: 10, ..HistoryRange::default() }).await.unwrap();
    assert_eq!(history.messages[1].state(), MessageState::Hidden);
}

#[tokio::test]
async fn a_server_without_sync_is_asked_for_its_list() {
    let server = FakeServer::start().await.unwrap();
    server.without_sync(true);
    for name in ["ann", "bob"] {
        server.add_user(name, PASSWORD);
    }
    for body in ["one", "two", "three", "four", "five"] {
        server.store("bob", "ann", body);
    }
    let (_ann, mut events) = log_in(&server, "ann").await;
    assert_eq!(bodies(&mut events, 5).await, ["one", "two", "three", "four", "five"]);
    assert_eq!(server.syncs(), 0);
    server.without_sync(false);
    server.break_connections();
    server.store("bob", "ann", "six");
    assert_eq!(bodies(&mut events, 1).await, ["six"]);
    assert!(server.syncs() > 0);
}
