//! What people are to each other, from SDK to SDK over a real server of two cores: signals, blocks, presence, notices.

mod common;

use std::time::Duration;

use common::Server;
use ringline_client::{CallError, Client, ErrorCode, Event, Events, MessagesFrom, SendError, SendOptions};

/// No test takes so long: it stops one that would hang.
const PATIENCE: Duration = Duration::from_secs(30);

async fn log_in(server: &Server, address: &str, user: &str) -> (Client, Events) {
    let token = server.token(user);
    let builder = Client::builder(address).user(user).token(move || {
        let token = token.clone();
        Box::pin(async move { Ok(token) })
    });
    builder.connect().await.unwrap()
}

/// The next event that is looked for; others are passed over.
async fn find<T>(events: &mut Events, wanted: impl Fn(Event) -> Option<T>) -> T {
    let found = async {
        loop {
            let event = events.next().await.expect("an event");
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("in time")
}

fn refusal(result: Result<ringline_client::Accepted, SendError>) -> ErrorCode {
    match result {
        Err(SendError::Refused { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    }
}

async fn chat(server: &Server, address: &str) {
    // Names on both cores, whichever owns the conversations.
    for (a, b) in [("ann", "bob"), ("carl", "dora"), ("eve", "fred")] {
        let (one, mut ones) = log_in(server, address, a).await;
        let (other, mut others) = log_in(server, address, b).await;
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
    let address = server.address.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(chat(&server, &address));
}
