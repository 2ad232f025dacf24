//! What is fuzzed of the wire and the disk: any bytes go in, and nothing but an answer may come of it. What decodes is encoded
//! and decoded again, and has to be the same.
//!
//! Shared by the fuzz targets and the test that replays their corpus.

use ringline_schema::codec::{Codec, Encoder, decode_reply, decode_request};
use ringline_schema::disk::{self, RecordType};
use ringline_schema::frame::{Flags, FrameDecoder, Header};
use ringline_schema::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use ringline_schema::rows;

/// What a stream of bytes is cut into: header fields and body of each frame, and the error that ended it.
fn frames(bytes: &[u8], piece: usize) -> (Vec<(Header, Vec<u8>)>, bool) {
    let (mut decoder, mut found) = (FrameDecoder::new(), Vec::new());
    for mut bytes in bytes.chunks(piece.max(1)) {
        loop {
            match decoder.next(&mut bytes, FRAME_BYTES_MAX) {
                Ok(Some(frame)) => found.push((frame.header, frame.body.to_vec())),
                Ok(None) => break,
                Err(_) => return (found, false),
            }
        }
    }
    (found, true)
}

/// The first byte says into what pieces the rest is cut: frames do not depend on it.
pub fn frame(data: &[u8]) {
    let Some((&piece, bytes)) = data.split_first() else { return };
    let (whole, good) = frames(bytes, bytes.len());
    assert_eq!(frames(bytes, usize::from(piece)), (whole.clone(), good));
    for (header, body) in whole {
        assert_eq!(header.body_bytes as usize, body.len());
        // Whatever it holds, there is an answer.
        let _ = (decode_request(&header, &body).is_ok(), decode_reply(&header, &body).is_ok());
    }
}

/// A command's number, little endian, then its body.
fn command(data: &[u8]) -> Option<(Header, &[u8])> {
    let (number, body) = data.split_first_chunk::<2>()?;
    let (command, body_bytes) = (u16::from_le_bytes(*number), u32::try_from(body.len()).ok()?);
    Some((Header { codec: Codec::FlatBuffers, command, flags: Flags::default(), request_id: 7, body_bytes }, body))
}

pub fn request(data: &[u8]) {
    let Some((header, body)) = command(data) else { return };
    let Ok(request) = decode_request(&header, body) else { return };
    let mut bytes = Vec::new();
    Encoder::new().request(Codec::FlatBuffers, 7, &request, &mut bytes);
    let again = bytes.get(FRAME_HEADER_BYTES..).expect("a frame has a header");
    assert_eq!(decode_request(&Header { body_bytes: again.len() as u32, ..header }, again), Ok(request));
}

pub fn reply(data: &[u8]) {
    let Some((header, body)) = command(data) else { return };
    let Ok(reply) = decode_reply(&header, body) else { return };
    let mut bytes = Vec::new();
    Encoder::new().reply(Codec::FlatBuffers, 7, &reply, &mut bytes);
    let again = bytes.get(FRAME_HEADER_BYTES..).expect("a frame has a header");
    assert_eq!(decode_reply(&Header { body_bytes: again.len() as u32, ..header }, again), Ok(reply));
}

/// A record's type, then its payload, as a log has it behind length and checksum.
pub fn record(data: &[u8]) {
    let Some((&number, payload)) = data.split_first() else { return };
    let _ = rows::decode_rows(payload).is_ok();
    let Some(record_type) = RecordType::from_number(number) else { return };
    let _ = disk::decode_for_index(record_type, payload).is_ok();
    let Ok(records) = disk::decode(record_type, payload) else { return };
    assert_eq!(disk::records(record_type, payload), records.len() as u64);
    for record in records {
        let mut bytes = Default::default();
        let again = disk::encode(&record, &mut bytes).expect("what was decoded can be encoded");
        assert_eq!(disk::decode(again, &bytes), Ok(vec![record]));
    }
}
