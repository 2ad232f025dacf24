//! Frames between nodes: an 8-byte head (length, kind) and a body. All little-endian.
//!
//! TLS below guards the bytes, so a frame has no checksum. The peer is authenticated, and still every length is checked
//! before it is believed: a node with a defect must not take another with it.

use bytes::{Buf, Bytes, BytesMut};
use ringline_schema::pack::{BadPack, Reader, Writer};

use super::hello::Hello;

/// Length of the body and kind of the frame.
pub const HEAD_BYTES: usize = 8;
/// The largest batch of one frame: the largest message there is and the names of the members of the largest group fit.
pub const BATCH_BYTES_MAX: usize = 2 * 1024 * 1024;
/// The largest hello: two names and a few numbers.
pub const HELLO_BYTES_MAX: usize = 256;
/// The largest body: a batch and its number.
const BODY_BYTES_MAX: usize = BATCH_BYTES_MAX + 16;

/// What one node tells the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The first on a connection, from both sides.
    Hello(Hello),
    /// A batch. Numbers rise by one from 1 as long as both processes live.
    Batch { number: u64, bytes: Bytes },
    /// Batches up to `number` are taken, and the sender may send until `window_end` bytes have been sent in all.
    Taken { number: u64, window_end: u64 },
    /// Alive, with so many clients, for the ROUTE of the other side.
    Beat { clients: u64 },
    /// No more will come; the connection can be closed.
    Bye,
}

/// Why the bytes of a peer can't be read on. The connection ends; what was not acknowledged is sent again on the next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {bytes} bytes, where {max} are the most")]
    TooLarge { bytes: u32, max: usize },
    #[error("kind {0} is no frame")]
    Kind(u8),
    #[error("a frame before the hello")]
    NoHello,
    #[error("{0}")]
    Body(#[from] BadPack),
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Batch { .. } => 2,
            Self::Taken { .. } => 3,
            Self::Beat { .. } => 4,
            Self::Bye => 5,
        }
    }

    /// Appends the whole frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; HEAD_BYTES]);
        let mut body = Writer(std::mem::take(out));
        match self {
            Self::Hello(hello) => hello.encode(&mut body),
            Self::Batch { number, bytes } => {
                body.0.extend_from_slice(&number.to_le_bytes());
                body.0.extend_from_slice(bytes);
            }
            Self::Taken { number, window_end } => {
                body.number(*number);
                body.number(*window_end);
            }
            Self::Beat { clients } => body.number(*clients),
            Self::Bye => {}
        }
        *out = body.0;
        let length = (out.len() - start - HEAD_BYTES) as u32;
        if let Some(head) = out.get_mut(start..start + HEAD_BYTES) {
            head[..4].copy_from_slice(&length.to_le_bytes());
            head[4] = self.kind();
        }
    }

    /// Takes the next frame off the front of what was received. `Ok(None)`: more bytes are needed.
    pub fn decode(received: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        Self::decode_within(received, BODY_BYTES_MAX)
    }

    /// The first frame of a connection, from somebody who has not said who it is: what is larger than a hello is refused
    /// by its head.
    pub fn decode_hello(received: &mut BytesMut) -> Result<Option<Hello>, FrameError> {
        Ok(match Self::decode_within(received, HELLO_BYTES_MAX)? {
            None => None,
            Some(Self::Hello(hello)) => Some(hello),
            Some(Self::Batch { .. } | Self::Taken { .. } | Self::Beat { .. } | Self::Bye) => {
                return Err(FrameError::NoHello);
            }
        })
    }

    fn decode_within(received: &mut BytesMut, max: usize) -> Result<Option<Self>, FrameError> {
        let Some([l0, l1, l2, l3, kind, ..]) = received.first_chunk::<HEAD_BYTES>().copied() else { return Ok(None) };
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length as usize > max {
            return Err(FrameError::TooLarge { bytes: length, max });
        }
        let whole = HEAD_BYTES + length as usize;
        if received.len() < whole {
            // Room for the rest at once instead of piece by piece.
            received.reserve(whole - received.len());
            return Ok(None);
        }
        let mut body = received.split_to(whole).freeze();
        body.advance(HEAD_BYTES);
        Self::decode_body(kind, body).map(Some)
    }

    fn decode_body(kind: u8, mut body: Bytes) -> Result<Self, FrameError> {
        Ok(match kind {
            1 => Self::Hello(Hello::decode(&mut Reader(&body))?),
            2 => {
                let number = *body.first_chunk::<8>().ok_or(BadPack("number of a batch"))?;
                body.advance(8);
                Self::Batch { number: u64::from_le_bytes(number), bytes: body }
            }
            3 => {
                let mut body = Reader(&body);
                Self::Taken { number: body.number()?, window_end: body.number()? }
            }
            4 => Self::Beat { clients: Reader(&body).number()? },
            5 => Self::Bye,
            other => return Err(FrameError::Kind(other)),
        })
    }
}
