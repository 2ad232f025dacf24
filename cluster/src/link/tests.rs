//! Two channels over connections that break anywhere, and bytes that are cut anywhere.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use ringline_schema::ids::{ConversationId, Seq};

use super::channel::*;
use super::frame::*;
use super::hello::*;

/// What happens next between the two sides.
#[derive(Clone, Debug)]
enum Step {
    /// A side offers a batch of so many bytes.
    Offer(bool, usize),
    /// A side writes what it has to say.
    Speak(bool),
    /// A side reads one frame of what has reached it.
    Read(bool),
    /// A side works off one batch that it was given.
    Work(bool),
    /// The connection breaks: what is under way is lost, and both begin a new one.
    Break,
    /// Time passes.
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<bool>(), prop_oneof![0usize..100, 0..=BATCH_BYTES_MAX]).prop_map(|(side, bytes)| Step::Offer(side, bytes)),
        4 => any::<bool>().prop_map(Step::Speak),
        8 => any::<bool>().prop_map(Step::Read),
        6 => any::<bool>().prop_map(Step::Work),
        1 => Just(Step::Break),
        1 => (0..BEAT_MS * 2).prop_map(Step::Wait),
    ]
}

struct Side {
    channel: Channel,
    /// Frames on their way to this side.
    inbox: VecDeque<Frame>,
    given: VecDeque<Bytes>,
    /// What the other side offered, and what came out here.
    expected: VecDeque<Bytes>,
    came: u64,
    offered: u64,
}

impl Side {
    fn new() -> Self {
        Self {
            channel: Channel::new(0),
            inbox: VecDeque::new(),
            given: VecDeque::new(),
            expected: VecDeque::new(),
            came: 0,
            offered: 0,
        }
    }
}

/// Two sides and a clock.
struct Pair {
    sides: [Side; 2],
    now_ms: u64,
}

impl Pair {
    fn act(&mut self, step: &Step) {
        match *step {
            Step::Offer(side, bytes) => self.offer(usize::from(side), bytes),
            Step::Speak(side) => self.speak(usize::from(side)),
            Step::Read(side) => self.read(usize::from(side)),
            Step::Work(side) => self.work(usize::from(side)),
            Step::Break => self.reconnect(),
            Step::Wait(ms) => self.now_ms += ms,
        }
    }

    fn offer(&mut self, side: usize, bytes: usize) {
        let own = &mut self.sides[side];
        // Each is told from every other by its beginning.
        let mut batch = vec![0; bytes.max(8)];
        batch[..8].copy_from_slice(&own.offered.to_le_bytes());
        batch.truncate(BATCH_BYTES_MAX);
        let batch = Bytes::from(batch);
        if own.channel.offer(batch.clone()).is_ok() {
            own.offered += 1;
            self.sides[1 - side].expected.push_back(batch);
        } else {
            assert!(own.channel.kept_bytes() >= OUT_BYTES_MAX, "refused with room");
        }
    }

    fn speak(&mut self, side: usize) {
        while let Some(frame) = self.sides[side].channel.next_frame(self.now_ms) {
            self.sides[1 - side].inbox.push_back(frame);
        }
    }

    fn read(&mut self, side: usize) {
        let own = &mut self.sides[side];
        let Some(frame) = own.inbox.pop_front() else { return };
        match own.channel.hear(frame, self.now_ms).expect("an honest peer breaks no rule") {
            Heard::Batch(bytes) => {
                assert_eq!(Some(&bytes), own.expected.front(), "batch {} came out of order or twice", own.came);
                own.expected.pop_front();
                own.came += 1;
                own.given.push_back(bytes);
            }
            Heard::Again | Heard::Clients(_) | Heard::Nothing => {}
            Heard::Bye => panic!("nobody said it"),
        }
        let waiting: usize = own.given.iter().map(Bytes::len).sum();
        assert!(waiting as u64 <= WINDOW_BYTES, "{waiting} bytes wait in a window of {WINDOW_BYTES}");
    }

    fn work(&mut self, side: usize) {
        let own = &mut self.sides[side];
        if let Some(bytes) = own.given.pop_front() {
            own.channel.worked_off(&bytes);
        }
    }

    fn reconnect(&mut self) {
        let has = [self.sides[0].channel.received(), self.sides[1].channel.received()];
        for (side, own) in self.sides.iter_mut().enumerate() {
            own.inbox.clear();
            own.channel.reconnected(has[1 - side], self.now_ms).unwrap();
        }
    }

    /// Lets everything flow until nothing does.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            for side in [0, 1] {
                self.speak(side);
            }
            for side in [0, 1] {
                while !self.sides[side].inbox.is_empty() {
                    self.read(side);
                }
                while !self.sides[side].given.is_empty() {
                    self.work(side);
                }
            }
            if self.sides.iter().all(|side| side.expected.is_empty() && side.channel.kept_bytes() == 0) {
                return;
            }
        }
        panic!("batches never arrived: {:?}", self.sides.iter().map(|side| side.expected.len()).collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_batch_comes_once_and_in_order_however_connections_break(steps in prop::collection::vec(step(), 1..300)) {
        let mut pair = Pair { sides: [Side::new(), Side::new()], now_ms: 0 };
        steps.iter().for_each(|step| pair.act(step));
        pair.settle();
        for side in [0, 1] {
            prop_assert_eq!(pair.sides[side].came, pair.sides[1 - side].offered);
        }
    }

    #[test]
    fn frames_come_back_the_same_however_they_are_cut(
        numbers in prop::collection::vec((any::<u64>(), any::<u64>(), 0usize..5), 1..20),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let frame = |&(one, other, kind): &(u64, u64, usize)| match kind {
            0 => Frame::Batch { number: one, bytes: Bytes::copy_from_slice(&other.to_le_bytes()[..(one % 9) as usize]) },
            1 => Frame::Taken { number: one, window_end: other },
            2 => Frame::Hello(Hello {
                cluster: "c1".into(), node: format!("n{other}"), incarnation: Incarnation(one.max(1)), list: other,
                protocol: (one as u16, other as u16), cores: 8, core: 3,
                knows: (other != 0).then_some((Incarnation(other), one)),
            }),
            3 => Frame::Beat { clients: other },
            _ => Frame::Bye,
        };
        let frames: Vec<_> = numbers.iter().map(frame).collect();
        let mut stream = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut stream));
        let mut places: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        places.extend([0, stream.len()]);
        places.sort_unstable();
        let (mut received, mut came) = (BytesMut::new(), Vec::new());
        for part in places.windows(2) {
            received.extend_from_slice(&stream[part[0]..part[1]]);
            while let Some(frame) = Frame::decode(&mut received).unwrap() {
                came.push(frame);
            }
        }
        prop_assert_eq!(came, frames);
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic_or_a_large_buffer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut received = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = Frame::decode(&mut received) {}
        prop_assert!(received.capacity() <= 2 * BATCH_BYTES_MAX + 200);
    }
}

#[test]
fn a_peer_that_breaks_a_rule_is_told_which() {
    let mut channel = Channel::new(0);
    let batch = |number, bytes: usize| Frame::Batch { number, bytes: Bytes::from(vec![0; bytes]) };
    assert_eq!(channel.hear(batch(2, 1), 0), Err(Violation::Gap { expected: 1, got: 2 }));
    assert!(matches!(channel.hear(batch(1, 1), 0), Ok(Heard::Batch(_))));
    assert_eq!(channel.hear(batch(1, 1), 0), Ok(Heard::Again));
    let taken = Frame::Taken { number: 1, window_end: 0 };
    assert_eq!(channel.hear(taken, 0), Err(Violation::NeverSent { said: 1, sent: 0 }));
    // Nothing is worked off: what came first and four of the largest batches do not fit into the window of four.
    for number in 2..5 {
        assert!(matches!(channel.hear(batch(number, BATCH_BYTES_MAX), 0), Ok(Heard::Batch(_))));
    }
    assert_eq!(channel.hear(batch(5, BATCH_BYTES_MAX), 0), Err(Violation::BeyondWindow));
    let huge = [0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0];
    assert_eq!(
        Frame::decode(&mut BytesMut::from(&huge[..])),
        Err(FrameError::TooLarge { bytes: u32::MAX, max: BATCH_BYTES_MAX + 16 })
    );
    let odd = [0, 0, 0, 0, 9, 0, 0, 0];
    assert_eq!(Frame::decode(&mut BytesMut::from(&odd[..])), Err(FrameError::Kind(9)));
}

#[test]
fn a_slow_peer_costs_bounded_memory_and_is_told_heads_when_it_is_back() {
    let mut channel = Channel::new(0);
    let batch = Bytes::from(vec![7; BATCH_BYTES_MAX]);
    let mut taken = 0;
    while channel.offer(batch.clone()).is_ok() {
        taken += 1;
        channel.next_frame(0);
    }
    assert!((OUT_BYTES_MAX..=OUT_BYTES_MAX + BATCH_BYTES_MAX + 1_024).contains(&channel.kept_bytes()));
    for seq in [3, 9, 5] {
        channel.note_head(ConversationId(1), Seq(seq));
    }
    channel.note_head(ConversationId(2), Seq(1));
    assert_eq!(channel.take_heads(), None, "there is no room yet");
    channel.hear(Frame::Taken { number: 3, window_end: u64::MAX }, 0).unwrap();
    while channel.next_frame(0).is_some() {}
    channel.hear(Frame::Taken { number: taken, window_end: u64::MAX }, 0).unwrap();
    let heads = [(ConversationId(1), Seq(9)), (ConversationId(2), Seq(1))];
    assert_eq!(channel.take_heads(), Some(Heads::These(heads.into())));
    assert_eq!(channel.take_heads(), None);
    for at in 0..=HEADS_MAX as u128 {
        channel.note_head(ConversationId(at), Seq(1));
    }
    channel.note_head(ConversationId(0), Seq(2));
    assert_eq!(channel.take_heads(), Some(Heads::Any));
}

#[test]
fn a_peer_that_starts_anew_leaves_what_it_never_acknowledged() {
    let mut channel = Channel::new(0);
    let batches: Vec<_> = (0..3u8).map(|at| Bytes::from(vec![at; 10])).collect();
    for batch in &batches {
        channel.offer(batch.clone()).unwrap();
    }
    assert!(matches!(channel.next_frame(0), Some(Frame::Batch { number: 1, .. })));
    channel.hear(Frame::Taken { number: 1, window_end: WINDOW_BYTES }, 0).unwrap();
    assert_eq!(channel.peer_restarted(5), batches[1..]);
    assert_eq!((channel.kept_bytes(), channel.received()), (0, 0));
    channel.offer(batches[0].clone()).unwrap();
    assert!(matches!(channel.next_frame(5), Some(Frame::Batch { number: 1, .. })), "numbers begin anew");
}

#[test]
fn silence_is_noticed_and_beats_prevent_it() {
    let mut channel = Channel::new(100);
    assert_eq!(channel.next_frame(100 + BEAT_MS - 1), None);
    assert_eq!(channel.next_ms(), 100 + BEAT_MS);
    assert_eq!(channel.next_frame(100 + BEAT_MS), Some(Frame::Beat { clients: 0 }));
    assert_eq!(channel.next_frame(100 + BEAT_MS), None);
    assert!(!channel.is_silent(100 + SILENCE_MS - 1) && channel.is_silent(100 + SILENCE_MS));
    assert_eq!(channel.hear(Frame::Beat { clients: 7 }, 4_000), Ok(Heard::Clients(7)));
    assert!(!channel.is_silent(100 + SILENCE_MS));
    // Whatever else there is to say.
    channel.offer(Bytes::from_static(b"batch")).unwrap();
    assert!(matches!(channel.next_frame(99 + 2 * BEAT_MS), Some(Frame::Batch { .. })));
    assert_eq!(channel.next_ms(), 100 + 2 * BEAT_MS);
    channel.offer(Bytes::from_static(b"batch")).unwrap();
    assert!(matches!(channel.next_frame(100 + 2 * BEAT_MS), Some(Frame::Beat { .. })));
    assert!(matches!(channel.next_frame(100 + 2 * BEAT_MS), Some(Frame::Batch { .. })));
}

/// Behind the grant that opens every connection.
fn next_batch(channel: &mut Channel) -> Frame {
    let mut frames = std::iter::from_fn(|| channel.next_frame(0));
    frames.find(|frame| matches!(frame, Frame::Batch { .. })).unwrap()
}

#[test]
fn what_came_by_the_old_connection_may_be_acknowledged_on_the_new_one() {
    let mut channel = Channel::new(0);
    for at in 0..3u8 {
        channel.offer(Bytes::from(vec![at; 10])).unwrap();
    }
    while channel.next_frame(0).is_some() {}
    // The hello of the new connection was written before the other side read all of the old one.
    channel.reconnected(1, 0).unwrap();
    assert_eq!(channel.hear(Frame::Taken { number: 3, window_end: WINDOW_BYTES }, 0), Ok(Heard::Nothing));
    assert_eq!((channel.kept_bytes(), channel.sent_again()), (0, 0));
    channel.offer(Bytes::from_static(b"next")).unwrap();
    assert!(matches!(next_batch(&mut channel), Frame::Batch { number: 4, .. }));
    channel.reconnected(3, 0).unwrap();
    assert!(matches!(next_batch(&mut channel), Frame::Batch { number: 4, .. }));
    assert_eq!(channel.sent_again(), 1);
}

#[test]
fn a_stranger_may_only_say_hello() {
    let hello = |received: &[u8]| Frame::decode_hello(&mut BytesMut::from(received));
    let mut beat = Vec::new();
    Frame::Beat { clients: 1 }.encode(&mut beat);
    assert_eq!(hello(&beat), Err(FrameError::NoHello));
    let large = (HELLO_BYTES_MAX as u32 + 1).to_le_bytes();
    let large = [&large[..], &[1, 0, 0, 0]].concat();
    assert_eq!(hello(&large), Err(FrameError::TooLarge { bytes: HELLO_BYTES_MAX as u32 + 1, max: HELLO_BYTES_MAX }));
    let widest = Hello {
        cluster: "c".repeat(NAME_BYTES_MAX),
        node: "n".repeat(NAME_BYTES_MAX),
        incarnation: Incarnation(u64::MAX),
        list: u64::MAX,
        protocol: (u16::MAX, u16::MAX),
        cores: u16::MAX,
        core: u16::MAX,
        knows: Some((Incarnation(u64::MAX), u64::MAX)),
    };
    let mut bytes = Vec::new();
    Frame::Hello(widest.clone()).encode(&mut bytes);
    assert_eq!(hello(&bytes), Ok(Some(widest)));
}
