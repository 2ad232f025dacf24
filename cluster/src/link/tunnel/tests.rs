//! Both ends of a tunnel against a link that is full now and then and a client that reads when it likes.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const ID: TunnelId = TunnelId(7);

fn frame(body: usize, fill: u8) -> Vec<u8> {
    let mut bytes = vec![fill; FRAME_HEADER_BYTES + body];
    bytes[12..16].copy_from_slice(&(body as u32).to_le_bytes());
    bytes
}

/// Gateway, owner, and the link between them.
struct Pair {
    near: Near,
    far: Option<Far>,
    up: VecDeque<Vec<u8>>,
    down: VecDeque<Vec<u8>>,
    /// Records that the link takes before it is full.
    room: usize,
    client_said: Vec<u8>,
    owner_heard: Vec<u8>,
    owner_said: Vec<u8>,
    /// Said by the owner and not given to its end yet.
    outbox: VecDeque<Vec<u8>>,
    client_got: Vec<u8>,
    /// Given to the socket and not read.
    socket: usize,
    ended: bool,
}

impl Pair {
    fn new() -> Self {
        let first = vec![1; 40];
        Self {
            near: Near::new(first.clone()),
            far: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            room: 0,
            client_said: first,
            owner_heard: Vec::new(),
            owner_said: Vec::new(),
            outbox: VecDeque::new(),
            client_got: Vec::new(),
            socket: 0,
            ended: false,
        }
    }

    fn gateway_speaks(&mut self) {
        let Self { near, up, room, .. } = self;
        near.speak(ID, &mut |record| put(up, room, record));
        near.may_read_on();
    }

    fn owner_speaks(&mut self) {
        let Self { far: Some(far), down, room, outbox, .. } = self else { return };
        loop {
            let (_, stopped) = far.speak(ID, &mut |record| put(down, room, record));
            if stopped != Stopped::Done {
                return;
            }
            let Some(frames) = outbox.pop_front() else { return };
            far.give(frames);
        }
    }

    fn carry_up(&mut self) {
        let Some(bytes) = self.up.pop_front() else { return };
        let Record { id, said } = Record::decode(&bytes).unwrap();
        assert_eq!(id, ID);
        match said {
            Said::Open(bytes) => {
                assert!(self.far.is_none(), "opened once");
                self.far = Some(Far::default());
                self.owner_heard.extend_from_slice(bytes);
            }
            Said::Up(bytes) => {
                assert!(self.far.is_some(), "opened first");
                self.owner_heard.extend_from_slice(bytes);
            }
            Said::Credit(bytes) => {
                let far = self.far.as_mut().unwrap();
                assert!(bytes as usize <= far.uncredited, "no more credit than was sent");
                far.credit(bytes);
            }
            Said::Left | Said::Down(_) | Said::Ended => panic!("{said:?}"),
        }
    }

    fn carry_down(&mut self) {
        let Some(bytes) = self.down.pop_front() else { return };
        match Record::decode(&bytes).unwrap().said {
            Said::Down(frames) => {
                assert_eq!(cut(frames), frames.len(), "whole frames");
                self.near.owner_said(frames).unwrap();
            }
            Said::Ended => {
                self.near.end();
                self.ended = true;
            }
            other => panic!("{other:?}"),
        }
    }

    /// The socket has room for so many bytes that the client has not read.
    fn write(&mut self, room: usize) {
        if self.socket > room {
            return;
        }
        if let Some(bytes) = self.near.take_down() {
            self.socket += bytes.len();
            self.client_got.extend_from_slice(&bytes);
        }
    }

    fn read(&mut self, bytes: usize) {
        let read = bytes.min(self.socket);
        self.socket -= read;
        self.near.written(read);
    }

    fn progress(&self) -> [usize; 4] {
        [self.owner_heard.len(), self.client_got.len(), self.near.held, self.near.owed]
    }

    fn check(&self) {
        assert!(self.client_said.starts_with(&self.owner_heard));
        assert!(self.owner_said.starts_with(&self.client_got));
        assert!(self.near.held_bytes() < WINDOW_BYTES + FRAME_BYTES_CEILING as usize);
        assert!(self.near.owed <= self.near.held && self.near.up.len() <= UP_BYTES_MAX + 50_000);
        let under_way: usize = self.down.iter().map(Vec::len).sum();
        assert!(under_way <= WINDOW_BYTES + 200_100 + 10 * self.down.len(), "the link holds no more than a window");
    }
}

fn put(lane: &mut VecDeque<Vec<u8>>, room: &mut usize, record: &Record<'_>) -> bool {
    if *room == 0 {
        return false;
    }
    *room -= 1;
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    lane.push_back(bytes);
    true
}

/// Bytes of whole frames.
fn cut(mut bytes: &[u8]) -> usize {
    let all = bytes.len();
    while let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
        let length = FRAME_HEADER_BYTES + u32::from_le_bytes(head[12..16].try_into().unwrap()) as usize;
        let Some(rest) = bytes.get(length..) else { break };
        bytes = rest;
    }
    all - bytes.len()
}

#[derive(Clone, Debug)]
enum Step {
    Client(usize),
    Owner(usize, u8),
    Room(usize),
    Gateway,
    OwnerSpeaks,
    Up,
    Down,
    Write(usize),
    Read(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1usize..50_000).prop_map(Step::Client),
        (prop_oneof![0usize..500, 0usize..200_000], 1u8..200).prop_map(|(body, fill)| Step::Owner(body, fill)),
        (1usize..5).prop_map(Step::Room),
        Just(Step::Gateway),
        Just(Step::OwnerSpeaks),
        Just(Step::Up),
        Just(Step::Down),
        (0usize..100_000).prop_map(Step::Write),
        (1usize..100_000).prop_map(Step::Read),
    ]
}

proptest! {
    #[test]
    fn all_bytes_come_through_in_order_and_within_the_window(
        steps in prop::collection::vec(step(), 0..300),
        end in any::<bool>(),
    ) {
        let mut pair = Pair::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                // A socket that is not read says nothing.
                Step::Client(bytes) if !pair.near.paused => {
                    let bytes = vec![number as u8; bytes];
                    pair.client_said.extend_from_slice(&bytes);
                    pair.near.client_said(&bytes);
                }
                Step::Client(_) => {}
                Step::Owner(body, fill) => {
                    let frames = [frame(body, fill), frame(3, fill)].concat();
                    pair.owner_said.extend_from_slice(&frames);
                    pair.outbox.push_back(frames);
                }
                Step::Room(records) => pair.room = records,
                Step::Gateway => pair.gateway_speaks(),
                Step::OwnerSpeaks => pair.owner_speaks(),
                Step::Up => pair.carry_up(),
                Step::Down => pair.carry_down(),
                Step::Write(room) => pair.write(room),
                Step::Read(bytes) => pair.read(bytes),
            }
            pair.check();
        }
        // From here on nothing stands in the way, and all of it comes through.
        while pair.owner_heard.len() < pair.client_said.len() || pair.client_got.len() < pair.owner_said.len() {
            let before = pair.progress();
            pair.room = usize::MAX;
            pair.gateway_speaks();
            while !pair.up.is_empty() {
                pair.carry_up();
            }
            pair.owner_speaks();
            while !pair.down.is_empty() {
                pair.carry_down();
            }
            pair.write(usize::MAX);
            pair.read(usize::MAX);
            pair.check();
            prop_assert_ne!(before, pair.progress(), "it stands still");
        }
        if end {
            put(&mut pair.down, &mut pair.room, &Record { id: ID, said: Said::Ended });
            pair.carry_down();
            prop_assert!(pair.ended && pair.near.is_over() && pair.near.take_down().is_none());
        }
    }

    #[test]
    fn records_read_back_and_garbage_is_refused(
        id in any::<u64>(),
        bytes in prop::collection::vec(any::<u8>(), 0..60),
        credit in any::<u32>(),
    ) {
        let all = [
            Said::Open(&bytes), Said::Up(&bytes), Said::Credit(credit), Said::Left, Said::Down(&bytes), Said::Ended,
        ];
        for said in all {
            let record = Record { id: TunnelId(id), said };
            let mut out = vec![9; 3];
            record.encode(&mut out);
            prop_assert!(Record::is_one(&out));
            prop_assert_eq!(Record::decode(&out), Ok(record));
            if !matches!(said, Said::Open(_) | Said::Up(_) | Said::Down(_)) {
                out.push(0);
                prop_assert!(Record::decode(&out).is_err());
            }
        }
        let _ = Record::decode(&bytes);
        prop_assert!(Record::decode(&[&[MARK, 77][..], &bytes].concat()).is_err());
    }
}

#[test]
fn a_client_that_reads_nothing_stops_the_owner_at_a_window() {
    let mut pair = Pair::new();
    pair.room = usize::MAX;
    pair.gateway_speaks();
    pair.carry_up();
    for _ in 0..1_000 {
        pair.outbox.push_back(frame(1_000, 1));
    }
    pair.owner_speaks();
    let sent: usize = pair.down.iter().map(|record| record.len() - RECORD_HEAD_BYTES).sum();
    assert!((WINDOW_BYTES..WINDOW_BYTES + 1_016).contains(&sent), "{sent}");
    let far = pair.far.as_mut().unwrap();
    assert_eq!(far.speak(ID, &mut |_| panic!("it has no credit")), (0, Stopped::NoCredit));
}

#[test]
fn an_owner_that_sends_beyond_the_window_is_told_apart() {
    let mut near = Near::new(vec![1]);
    assert!(near.is_unanswered() && !near.end(), "the owner never heard of it");
    let mut near = Near::new(vec![1]);
    near.speak(ID, &mut |_| true);
    let frames = frame(WINDOW_BYTES, 1);
    assert_eq!(near.owner_said(&frames), Ok(()));
    assert_eq!(near.owner_said(&frame(0, 1)), Err(BeyondWindow));
    assert!(!near.is_unanswered() && near.end(), "the owner is to be told");
    assert_eq!(near.owner_said(&frames), Ok(()), "what comes behind an end is dropped");
    assert_eq!(near.take_down().map(|bytes| bytes.len()), Some(frames.len()));
}

#[test]
fn what_the_gateway_says_itself_is_no_credit() {
    let mut near = Near::new(vec![1]);
    near.speak(ID, &mut |_| true);
    near.interject(&frame(CREDIT_BYTES_MIN * 2, 1));
    let written = near.take_down().unwrap().len();
    near.written(written);
    assert!(near.speak(ID, &mut |record| panic!("{record:?}")));
}
