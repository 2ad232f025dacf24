//! A repeat gets its old place whatever its receiver thinks of new messages meanwhile.

mod rig;

use rig::*;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::Seq;
use ringline_schema::message::*;

#[test]
fn a_repeat_that_waits_behind_a_refused_message_is_not_refused_with_it() {
    for shards in [1, 3] {
        let mut rig = Rig::new(shards, |_| ());
        let (ann, bob) = (rig.login("ann", 1), rig.login("bob", 1));
        assert_eq!(rig.send(ann, "bob", 1, b"one"), Seq(1));
        rig.ask(bob, Request::Chat(ChatRequest::Block { user: "ann" }));
        // Nothing of the conversation is in memory; ann never heard of her first message.
        rig.restart(shards);
        let ann = rig.login("ann", 1);
        rig.holding = true;
        rig.ask(ann, Request::Send(durable("bob", 2, b"two")));
        rig.ask(ann, Request::Send(durable("bob", 1, b"one")));
        rig.ask(ann, Request::Send(durable("bob", 3, b"three")));
        rig.release();
        let told = rig.told(ann);
        let (mut acks, mut refused) = (Vec::new(), 0);
        for frame in &told {
            match decode(frame) {
                Reply::SendAck(ack) => acks.push((ack.seq, ack.dup)),
                Reply::Failure { code, .. } => {
                    assert_eq!(code, ErrorCode::Blocked);
                    refused += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((acks, refused), (vec![(Seq(1), true)], 2), "{shards} shards");
    }
}
