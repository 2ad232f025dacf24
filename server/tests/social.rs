//! What people are to each other, from SDK to SDK over a real server of two cores: signals, blocks, presence, notices;
//! and what becomes of their messages.

mod common;

use common::Server;
use common::sdk::{find, log_in, run};
use ringline_client::{
    Amendment, CallError, Client, CloseReason, ConnectError, ErrorCode, Event, HistoryRange, JoinPolicy, KickReason,
    MessageState, MessagesFrom, Outcome, SendError, SendOptions, UserName, What,
};

fn refusal(result: Result<ringline_client::Accepted, SendError>) -> ErrorCode {
    match result {
        Err(SendError::Refused { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    }
}

async fn chat(server: &Server) {
    // Names on both cores, whichever owns the conversations.
    for (a, b) in [("ann", "bob"), ("carl", "dora"), ("eve", "fred")] {
        let (one, mut ones) = log_in(server, (a, 1)).await;
        let (other, mut others) = log_in(server, (b, 1)).await;
        one.typing(b).unwrap();
        let signal = find(&mut others, |event| match event {
            Event::Signal(signal) => Some(signal),
            _ => None,
        });
        let signal = signal.await;
        assert!(signal.is_typing() && signal.from.as_str() == a);
        one.send(b, "hello").await.unwrap();
        let rows = one.watch(&[b]).await.unwrap();
        assert!(rows.len() == 1 && rows[0].online && rows[0].user.as_str() == b);
        other.set_status("busy").await.unwrap();
        find(&mut ones, |event| match event {
            Event::Presence(rows) => rows.iter().any(|row| row.status == "busy").then_some(()),
            _ => None,
        })
        .await;
        other.block(a).await.unwrap();
        assert_eq!(refusal(one.send(b, "hello?").await), ErrorCode::Blocked);
        assert_eq!(refusal(one.send_with(b, "hello?", SendOptions::transient()).await), ErrorCode::Blocked);
        // Another signal: the same would be dropped as a repeat.
        one.signal(b, 16, "x").unwrap();
        let refused = find(&mut ones, |event| match event {
            Event::SignalRefused { to, code } => Some((to, code)),
            _ => None,
        });
        assert_eq!(refused.await.1, ErrorCode::Blocked);
        let page = other.blocks(None, 0).await.unwrap();
        assert_eq!((page.users.len(), page.next, page.messages_from), (1, None, MessagesFrom::Anyone));
        other.unblock(a).await.unwrap();
        one.send(b, "there you are").await.unwrap();
        other.take_messages_from(MessagesFrom::Known).await.unwrap();
        assert_eq!(refusal(one.send(b, "a stranger").await), ErrorCode::NotAccepted);
        other.send(a, "hello").await.unwrap();
        one.send(b, "known now").await.unwrap();
        let notice = one.broadcast("hi all", 0).await;
        if a == "ann" {
            assert!(notice.unwrap() >= 2);
            find(&mut others, |event| match event {
                Event::Notice(notice) => (&notice.body[..] == b"hi all").then_some(()),
                _ => None,
            })
            .await;
        } else {
            assert!(matches!(notice, Err(CallError::Refused { code: ErrorCode::NotAllowed, .. })));
        }
    }
}

#[test]
fn people_over_a_real_server() {
    let server = Server::start(&["--cores", "2", "--set", "auth.admins=ann"]);
    run(chat(&server));
}

/// What each message of a conversation shows.
async fn history(client: &Client, with: &str) -> Vec<(MessageState, String)> {
    let history = client.history(with, HistoryRange { limit: 50, ..HistoryRange::default() }).await.unwrap();
    history.messages.iter().map(|message| (message.state(), message.text().into_owned())).collect()
}

async fn amend(server: &Server) {
    use MessageState::{AsSent, Deleted, Edited, Hidden, Recalled};
    for (a, b) in [("ann", "bob"), ("carl", "dora"), ("eve", "fred")] {
        let (one, _ones) = log_in(server, (a, 1)).await;
        let (other, mut others) = log_in(server, (b, 1)).await;
        let (tablet, mut tablets) = log_in(server, (b, 2)).await;
        let first = one.send(b, "helo").await.unwrap().seq;
        let second = one.send(b, "secret").await.unwrap().seq;
        let third = one.send(b, "silly").await.unwrap().seq;
        one.edit(b, first, "hello").await.unwrap();
        one.recall(b, second).await.unwrap();
        for events in [&mut others, &mut tablets] {
            for (of, state) in [(first, Edited), (second, Recalled)] {
                let amendment = find(events, |event| match event {
                    Event::Message(message) => message.amendment(),
                    _ => None,
                });
                assert_eq!(amendment.await, Amendment { of, state });
            }
        }
        other.delete_for_me(a, third).await.unwrap();
        let hidden = find(&mut tablets, |event| match event {
            Event::Hidden { seq, .. } => Some(seq),
            _ => None,
        });
        assert_eq!(hidden.await, third);
        assert_eq!(refusal(other.edit(a, first, "x").await), ErrorCode::NotAllowed);
        assert_eq!(refusal(one.recall(b, second).await), ErrorCode::NoSuchMessage);
        let row = |state, text: &str| (state, text.to_owned());
        let shown = history(&one, b).await;
        assert_eq!(shown[..3], [row(Edited, "hello"), row(Recalled, ""), row(AsSent, "silly")]);
        assert_eq!(history(&tablet, a).await[2], row(Hidden, ""));
        one.delete_for_all(b, third).await.unwrap();
        assert_eq!(history(&one, b).await[2], row(Deleted, ""));
    }
}

async fn group(server: &Server) {
    let (ann, mut anns) = log_in(server, ("ann", 1)).await;
    let (bob, mut bobs) = log_in(server, ("bob", 1)).await;
    ann.create_group("#team", ("The team", JoinPolicy::Open), &[]).await.unwrap();
    let refused = ann.send_with("#team", "anybody?", SendOptions::transient()).await;
    assert!(matches!(refused, Err(SendError::Refused { code: ErrorCode::NotOnline, .. })), "{refused:?}");
    bob.join_group("#team", "").await.unwrap();
    ann.send_with("#team", "move", SendOptions::transient()).await.unwrap();
    find(&mut bobs, |event| match event {
        Event::Message(message) => (message.seq.0 == 0 && message.to.as_str() == "#team").then_some(()),
        _ => None,
    })
    .await;
    bob.typing("#team").unwrap();
    let from = find(&mut anns, |event| match event {
        Event::Signal(signal) => Some(signal.from),
        _ => None,
    });
    assert_eq!(from.await.as_str(), "bob");
    let options = SendOptions { delivery_timeout: Some(std::time::Duration::from_secs(30)), ..SendOptions::default() };
    let mut sending = ann.send_with("#team", "hello", options);
    let sent = (&mut sending).await.unwrap();
    // Asking for what follows it is what acknowledges a message.
    tokio::spawn(async move { while bobs.next().await.is_some() {} });
    assert_eq!(sending.delivered().await.unwrap().outcome, Outcome::Delivered);
    bob.read(sent.conversation, sent.seq).await.unwrap();
    find(&mut anns, |event| match event {
        Event::ReadUpto(upto) => (upto.user.is_none() && upto.read >= sent.seq).then_some(()),
        _ => None,
    })
    .await;
}

#[test]
fn messages_are_amended_over_a_real_server() {
    let server = Server::start(&["--cores", "2"]);
    run(amend(&server));
}

#[test]
fn a_group_over_a_real_server() {
    let server = Server::start(&["--cores", "2"]);
    run(group(&server));
}

fn refused(result: Result<(), CallError>) -> ErrorCode {
    match result {
        Err(CallError::Refused { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    }
}

/// Waits until a user of whom nothing is left is gone from a group.
async fn left_of(events: &mut ringline_client::Events, group: &str) -> (Vec<UserName>, u64) {
    find(events, |event| match event {
        Event::Message(message) if message.to.as_str() == group => {
            let change = message.extra?.change.filter(|change| change.what == What::Left)?;
            Some((change.users, change.number))
        }
        _ => None,
    })
    .await
}

async fn delete(server: &mut Server) {
    let (root, mut roots) = log_in(server, ("root", 1)).await;
    for (user, other) in [("ann", "bob"), ("carl", "dora"), ("eve", "fred")] {
        let builder = Client::builder(&server.address).user(user).password("secret word");
        builder.clone().register().await.unwrap();
        let (one, mut ones) = builder.clone().connect().await.unwrap();
        let (two, _twos) = log_in(server, (other, 1)).await;
        let group = format!("#{user}");
        one.create_group(&group, ("t", JoinPolicy::Open), &[]).await.unwrap();
        root.join_group(&group, "").await.unwrap();
        one.send(other, "hello").await.unwrap();
        two.send(user, "hello").await.unwrap();
        assert_eq!(refused(one.delete_account("secret", true).await), ErrorCode::AuthFailed);
        assert_eq!(refused(two.delete_user(user, true).await), ErrorCode::NotAllowed);
        assert_eq!(refused(two.delete_account("secret word", true).await), ErrorCode::AuthFailed, "it has none");
        one.delete_account("secret word", true).await.unwrap();
        let why = find(&mut ones, |event| match event {
            Event::Closed { why } => Some(why),
            _ => None,
        });
        assert!(matches!(why.await, CloseReason::Kicked { reason: KickReason::UserDeleted, .. }));
        assert_eq!(refusal(two.send(user, "hello?").await), ErrorCode::UserDeleted);
        assert_eq!(refusal(two.send_with(user, "hello?", SendOptions::transient()).await), ErrorCode::UserDeleted);
        for result in [builder.clone().register().await, builder.connect().await.map(|_| ())] {
            assert!(matches!(result, Err(ConnectError::Refused { code: ErrorCode::UserDeleted, .. })), "{result:?}");
        }
        assert_eq!(left_of(&mut roots, &group).await, (vec![UserName::new(user).unwrap()], 1));
        assert_eq!(refused(root.delete_user(user, false).await), ErrorCode::UserDeleted);
        root.delete_user(other, false).await.unwrap();
    }
    drop((root, roots));
    // Whatever was not at its end when the server died goes on.
    server.kill();
    server.restart(None);
    let (root, _roots) = log_in(server, ("root", 1)).await;
    let builder = Client::builder(&server.address).user("fred").password("secret word");
    assert!(matches!(builder.register().await, Err(ConnectError::Refused { code: ErrorCode::UserDeleted, .. })));
    assert_eq!(refused(root.delete_user("eve", false).await), ErrorCode::UserDeleted);
    assert_eq!(refusal(root.send("dora", "hello?").await), ErrorCode::UserDeleted);
}

#[test]
fn users_are_deleted_over_a_real_server() {
    let mut server = Server::start(&["--cores", "2", "--set", "auth.admins=root"]);
    run(delete(&mut server));
}
