//! Cost of the wire: encoding, cutting and decoding SEND and DELIVER frames of 64-byte messages.
//!
//! One thread, no sockets. `request decode` includes the verification of the FlatBuffer, which is done once a frame.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringline_schema::codec::{Codec, Encoder, decode_reply, decode_request};
use ringline_schema::frame::{FrameDecoder, Header};
use ringline_schema::ids::{ConversationId, DeviceId, Seq};
use ringline_schema::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use ringline_schema::message::{BodyKind, Class, Extra, Mentions, Message, Reply, Request, Send};

const PAYLOAD: [u8; 64] = [b'x'; 64];
/// Frames in the stream that the frame decoder cuts.
const STREAM_FRAMES: usize = 64;

fn send() -> Request<'static> {
    Request::Send(Send {
        to: "bench-000002",
        class: Class::Durable,
        kind: BodyKind::Text,
        client_seq: 7,
        ack_timeout_ms: None,
        body: &PAYLOAD,
        mentions: Mentions::default(),
    })
}

fn deliver() -> Reply<'static> {
    Reply::Deliver(Message {
        conversation: ConversationId(1 << 100),
        seq: Seq(9),
        time_ms: 1_700_000_000_000,
        from: "bench-000001",
        to: "bench-000002",
        device: DeviceId(1),
        client_seq: 7,
        class: Class::Durable,
        kind: BodyKind::Text,
        delivery: 0,
        body: &PAYLOAD,
        extra: Extra::default(),
    })
}

/// A frame as header and body.
fn parts(bytes: &[u8]) -> (Header, &[u8]) {
    let (header, body) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>().expect("a whole frame");
    (Header::decode(header, FRAME_BYTES_MAX).expect("a good header"), body)
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode 64 B");
    group.throughput(Throughput::Elements(1));
    let (mut encoder, mut out) = (Encoder::new(), Vec::with_capacity(1024));
    group.bench_function("SEND", |bencher| {
        bencher.iter(|| {
            out.clear();
            encoder.request(Codec::FlatBuffers, 1, black_box(&send()), &mut out);
            black_box(out.len())
        });
    });
    group.bench_function("DELIVER", |bencher| {
        bencher.iter(|| {
            out.clear();
            encoder.reply(Codec::FlatBuffers, 0, black_box(&deliver()), &mut out);
            black_box(out.len())
        });
    });
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    let (mut encoder, mut request, mut reply) = (Encoder::new(), Vec::new(), Vec::new());
    encoder.request(Codec::FlatBuffers, 1, &send(), &mut request);
    encoder.reply(Codec::FlatBuffers, 0, &deliver(), &mut reply);

    let mut group = criterion.benchmark_group("decode 64 B");
    group.throughput(Throughput::Elements(1));
    let (header, body) = parts(&request);
    group.bench_function("SEND (request decode)", |bencher| {
        bencher.iter(|| decode_request(black_box(&header), black_box(body)).map(|request| request.command()));
    });
    let (header, body) = parts(&reply);
    group.bench_function("DELIVER (reply decode)", |bencher| {
        bencher.iter(|| decode_reply(black_box(&header), black_box(body)).map(|reply| reply.command()));
    });
    group.finish();

    let mut group = criterion.benchmark_group("cut a stream into frames");
    group.throughput(Throughput::Elements(STREAM_FRAMES as u64));
    for (name, frame) in [("SEND", &request), ("DELIVER", &reply)] {
        let stream = frame.repeat(STREAM_FRAMES);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let (mut decoder, mut input, mut frames) = (FrameDecoder::new(), black_box(&stream[..]), 0);
                while let Ok(Some(frame)) = decoder.next(&mut input, FRAME_BYTES_MAX) {
                    frames += frame.body.len();
                }
                frames
            });
        });
    }
    group.finish();
}

criterion_group!(benches, encode, decode);
criterion_main!(benches);
