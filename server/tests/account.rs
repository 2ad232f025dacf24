//! What the devices of a user share, from SDK to SDK over a real server of two cores: receipts, marks, devices.

mod common;

use common::Server;
use common::sdk::{find, log_in, run};
use ringline_client::{CallError, CloseReason, DeviceId, ErrorCode, Event, Events, KickReason, ReadUpto, Seq};

async fn read_upto(events: &mut Events, seq: u64) -> ReadUpto {
    find(events, |event| match event {
        Event::ReadUpto(upto) if upto.read == Seq(seq) => Some(upto),
        _ => None,
    })
    .await
}

async fn account(server: &Server) {
    // Names on both cores, whichever owns the conversations.
    for (a, b) in [("ann", "bob"), ("carl", "dora"), ("eve", "fred")] {
        let (one, mut ones) = log_in(server, (a, 1)).await;
        let (other, _others) = log_in(server, (b, 1)).await;
        let (desk, mut desks) = log_in(server, (b, 2)).await;
        let mut last = one.send(b, "first").await.unwrap();
        for text in ["second", "third"] {
            last = one.send(b, text).await.unwrap();
        }
        other.read(last.conversation, Seq(2)).await.unwrap();
        assert_eq!(read_upto(&mut ones, 2).await.user.unwrap().as_str(), b);
        assert_eq!(read_upto(&mut desks, 2).await.with.as_str(), a, "the reader's other device knows it too");
        other.pin(last.conversation, true).await.unwrap();
        other.mute(last.conversation, 9).await.unwrap();
        let page = desk.conversations(None, 0).await.unwrap();
        let row = &page.conversations[0];
        assert_eq!((row.unread(), row.pinned, row.muted_until_ms), (1, true, 9));
        assert_eq!(row.last.as_ref().unwrap().text(), "third");
        let receipts = one.receipts(last.conversation, Seq(2), None, 0).await.unwrap();
        assert_eq!((receipts.members, receipts.delivered, receipts.read), (1, 1, 1));
        assert_eq!(receipts.rows[0].read, Seq(2));
        let devices = other.devices().await.unwrap();
        assert_eq!(devices.iter().map(|row| (row.device.0, row.online)).collect::<Vec<_>>(), [(1, true), (2, true)]);
        other.drop_device(DeviceId(2)).await.unwrap();
        let closed = find(&mut desks, |event| match event {
            Event::Closed { why } => Some(why),
            _ => None,
        });
        assert!(matches!(closed.await, CloseReason::Kicked { reason: KickReason::LoggedOut, .. }));
        let again = other.drop_device(DeviceId(2)).await;
        assert!(matches!(again, Err(CallError::Refused { code: ErrorCode::NoSuchDevice, .. })), "{again:?}");
    }
}

#[test]
fn devices_and_receipts_over_a_real_server() {
    let server = Server::start(&["--cores", "2"]);
    run(account(&server));
}
