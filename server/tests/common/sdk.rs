//! SDK clients of a real server, for tests that talk as applications do.

use std::time::Duration;

use ringline_client::{Client, DeviceId, Event, Events};

use super::Server;

/// No test takes so long: it stops one that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device of a user, logged in by a token of the server's own.
pub async fn log_in(server: &Server, (user, device): (&str, u64)) -> (Client, Events) {
    let token = server.token(user);
    let builder = Client::builder(&server.address).user(user).device(DeviceId(device)).token(move || {
        let token = token.clone();
        Box::pin(async move { Ok(token) })
    });
    builder.connect().await.unwrap()
}

/// The next event that is looked for; others are passed over.
pub async fn find<T>(events: &mut Events, wanted: impl Fn(Event) -> Option<T>) -> T {
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

/// Runs a test of clients on this thread.
pub fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}
