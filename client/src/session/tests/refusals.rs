//! What a refusal holds back, and what it does not: one conversation, or all of them.

use super::*;

/// Who the SENDs are for that wait for the server, and their request ids.
fn waiting_sends(model: &Model) -> Vec<(u32, String)> {
    let sends = model.inbox.iter().filter_map(|bytes| {
        let mut decoder = FrameDecoder::new();
        let frame = decoder.next(&mut &bytes[..], u32::MAX).unwrap().unwrap();
        let Request::Send(send) = codec::decode_request(&frame.header, frame.body).unwrap() else { return None };
        Some((frame.header.request_id, send.to.to_owned()))
    });
    sends.collect()
}

/// The server refuses everything for that user, as when the node of the conversation is away.
fn refuse_for(world: &mut World, user: &str, (code, retry_after_ms): (ErrorCode, u32)) {
    let refused: Vec<u32> =
        waiting_sends(&world.model).into_iter().filter_map(|(id, to)| (to == user).then_some(id)).collect();
    world.model.inbox.retain(|bytes| {
        let mut decoder = FrameDecoder::new();
        let frame = decoder.next(&mut &bytes[..], u32::MAX).unwrap().unwrap();
        !refused.contains(&frame.header.request_id)
    });
    for id in refused {
        world.model.answer(id, &Reply::Failure { code, retry_after_ms, detail: "" });
    }
    world.apply(&Op::Read(200));
}

fn receivers(world: &World) -> Vec<String> {
    waiting_sends(&world.model).into_iter().map(|(_, to)| to).collect()
}

#[test]
fn a_refusal_holds_back_its_own_conversation_and_too_many_requests_all_of_them() {
    let mut world = online();
    world.apply(&Op::Send(0));
    refuse_for(&mut world, "bob", (ErrorCode::Unavailable, 1_000));
    world.apply(&Op::Send(0));
    assert_eq!(receivers(&world), [""; 0], "behind the one that was refused, in order");
    world.apply(&Op::Send(1));
    assert_eq!(receivers(&world), ["carl"]);
    assert_eq!(world.session.next_wake(0), Some(1_000));
    world.apply(&Op::Wait(999));
    assert_eq!(receivers(&world), ["carl"]);
    world.apply(&Op::Wait(1));
    assert_eq!(receivers(&world), ["carl", "bob", "bob"]);
    refuse_for(&mut world, "bob", (ErrorCode::RateLimited, 1_000));
    world.apply(&Op::Send(1));
    assert_eq!(receivers(&world), ["carl"]);
    world.apply(&Op::Wait(1_000));
    assert_eq!(receivers(&world), ["carl", "bob", "bob", "carl"]);
    world.settle();
}

#[test]
fn a_conversation_that_is_refused_for_long_costs_the_others_nothing_and_loses_nothing() {
    const SENDS: usize = 200;
    let mut world = online();
    for _ in 0..SENDS {
        world.apply(&Op::Send(0));
        world.apply(&Op::Send(1));
        refuse_for(&mut world, "bob", (ErrorCode::Unavailable, 50));
        for op in [Op::Serve(200), Op::Read(200), Op::Take(9), Op::Wait(10)] {
            world.apply(&op);
        }
    }
    let ended = |world: &World, user: &str| world.results.keys().filter(|number| world.peers[*number] == user).count();
    assert_eq!((ended(&world, "bob"), ended(&world, "carl")), (0, SENDS));
    // It is back: everything comes once (the model says so if not), and the first is still known to the filter.
    world.settle();
    assert_eq!((ended(&world, "bob"), ended(&world, "carl")), (SENDS, SENDS));
}
