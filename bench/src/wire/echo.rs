//! The floor's protocol: a length of 4 bytes, little endian, and so many bytes of payload, which come back as they are.
//!
//! Each client is its own partner. Invariant: it holds no state at all.

use super::{Sink, UNIT_BYTES_MAX, Wire, WireEvent};

const LENGTH_BYTES: usize = 4;

/// See the module.
pub struct Echo;

impl Wire for Echo {
    fn hello(&mut self, _out: &mut Vec<u8>) {}

    fn ready(&self) -> bool {
        true
    }

    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(payload);
    }

    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else { return Ok(0) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > UNIT_BYTES_MAX {
            return Err(format!("the echo speaks of {length} bytes"));
        }
        let Some(payload) = rest.get(..length) else { return Ok(0) };
        sink.tell(WireEvent::Delivered(payload));
        Ok(LENGTH_BYTES + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::script::hear_any_split;

    #[test]
    fn what_was_sent_comes_back_in_any_split() {
        let mut stream = Vec::new();
        Echo.send(b"one", &mut stream);
        Echo.send(b"", &mut stream);
        Echo.send(b"three", &mut stream);
        let heard = hear_any_split(&|| Box::new(Echo), &stream);
        assert_eq!(heard.events, ["delivered one", "delivered ", "delivered three"]);
        assert!(heard.ready && heard.error.is_none());
        assert!(hear_any_split(&|| Box::new(Echo), &[0xff; 8]).error.is_some());
    }
}
