//! What is not stored keeps its order on the way from one device to another, whatever it waits for.

mod rig;

use rig::*;
use ringline_schema::ids::Seq;
use ringline_schema::message::chat::MessagesFrom;
use ringline_schema::message::*;

fn privacy(messages_from: MessagesFrom) -> Request<'static> {
    Request::Chat(ChatRequest::Privacy { messages_from: Some(messages_from) })
}

#[test]
fn what_is_decided_at_once_does_not_overtake_what_waits_for_the_store() {
    for shards in [1, 2, 5] {
        let mut rig = Rig::new(shards, |_| ());
        let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
        assert_eq!(rig.send(ann, "bob", 1, b"she knows him"), Seq(1));
        rig.ask(ann, privacy(MessagesFrom::Known));
        rig.holding = true;
        let transient = |number, body| Request::Send(Send { class: Class::Transient, ..durable("ann", number, body) });
        rig.ask(bob, transient(1, b"one"));
        rig.ask(bob, transient(2, b"two"));
        rig.holding = false;
        rig.ask(ann, privacy(MessagesFrom::Anyone));
        rig.ask(bob, transient(3, b"three"));
        assert!(rig.told(ann).is_empty(), "all three wait: {shards} shards");
        rig.release();
        let told = rig.told(ann);
        let bodies = told.iter().filter_map(|frame| match decode(frame) {
            Reply::Deliver(message) => Some(String::from_utf8_lossy(message.body).into_owned()),
            _ => None,
        });
        assert_eq!(bodies.collect::<Vec<_>>(), ["one", "two", "three"], "{shards} shards");
        // Nothing waits any more: what comes next is decided at once.
        rig.ask(bob, transient(4, b"four"));
        assert_eq!(rig.told(ann).len(), 1, "{shards} shards");
    }
}
