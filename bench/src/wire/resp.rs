//! Redis pub/sub over RESP3, as a client: HELLO 3 lets one connection subscribe and publish.
//!
//! A PUBLISH is answered with the number of receivers: 0 means that the message reached nobody and is a failure. Ready
//! once the push that confirms the subscription came.

use super::{Names, Sink, UNIT_BYTES_MAX, Wire, WireEvent, line, number};

/// Aggregates inside aggregates; deeper is not an answer to what is asked here.
const DEPTH_MAX: usize = 8;
/// Leaves that are looked at; a pub/sub push has three.
const LEAVES: usize = 4;

/// See the module.
pub struct Resp {
    names: Names,
    ready: bool,
}

impl Resp {
    pub fn new(names: Names) -> Self {
        Self { names, ready: false }
    }
}

/// A value laid flat: its first leaves, and how far it goes.
#[derive(Default)]
struct Flat<'a> {
    leaves: [&'a [u8]; LEAVES],
    count: usize,
    at: usize,
}

impl<'a> Flat<'a> {
    fn leaf(&mut self, leaf: &'a [u8]) {
        if let Some(place) = self.leaves.get_mut(self.count) {
            *place = leaf;
        }
        self.count += 1;
    }

    /// Reads one value at `self.at`. `Ok(false)`: it is not whole yet.
    fn read(&mut self, bytes: &'a [u8], depth: usize) -> Result<bool, String> {
        let Some((head, used)) = line(bytes.get(self.at..).unwrap_or_default()) else { return Ok(false) };
        self.at += used;
        let Some((kind, rest)) = head.split_first() else { return Err("an empty RESP line".to_owned()) };
        let length = |limit: usize| {
            let length = number(rest).filter(|length| *length <= limit);
            length.ok_or_else(|| format!("RESP length {}", String::from_utf8_lossy(head)))
        };
        match kind {
            b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => self.leaf(rest),
            b'$' | b'*' if rest == b"-1" => self.leaf(b""),
            b'$' | b'=' | b'!' => {
                let length = length(UNIT_BYTES_MAX)?;
                let (Some(text), Some(_)) = (bytes.get(self.at..self.at + length), bytes.get(self.at + length + 1))
                else {
                    return Ok(false);
                };
                self.leaf(text);
                self.at += length + 2;
            }
            b'*' | b'>' | b'~' | b'%' => {
                if depth >= DEPTH_MAX {
                    return Err("RESP nested too deep".to_owned());
                }
                // Ends with the bytes at the latest, however large the number is.
                let values = length(UNIT_BYTES_MAX)? * if *kind == b'%' { 2 } else { 1 };
                for _ in 0..values {
                    if !self.read(bytes, depth + 1)? {
                        return Ok(false);
                    }
                }
            }
            _ => return Err(format!("not RESP3: {}", String::from_utf8_lossy(head))),
        }
        Ok(true)
    }
}

impl Wire for Resp {
    fn hello(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("HELLO 3\r\nSUBSCRIBE {}\r\n", self.names.own).as_bytes());
    }

    fn ready(&self) -> bool {
        self.ready
    }

    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"*3\r\n$7\r\nPUBLISH\r\n");
        for part in [self.names.partner.as_bytes(), payload] {
            out.push(b'$');
            out.extend_from_slice(part.len().to_string().as_bytes());
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(part);
            out.extend_from_slice(b"\r\n");
        }
    }

    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let mut value = Flat::default();
        if !value.read(bytes, 0)? {
            return Ok(0);
        }
        let [what, _, payload, _] = value.leaves;
        match bytes.first() {
            Some(b'>') => match what {
                b"message" => sink.tell(WireEvent::Delivered(payload)),
                b"subscribe" => self.ready = true,
                other => return Err(format!("unknown push {}", String::from_utf8_lossy(other))),
            },
            Some(b':') if what == b"0" => sink.tell(WireEvent::Failed("PUBLISH reached nobody".to_owned())),
            Some(b':') => sink.tell(WireEvent::Accepted),
            Some(b'-' | b'!') => sink.tell(WireEvent::Failed(String::from_utf8_lossy(what).into_owned())),
            // The answer to HELLO.
            _ => {}
        }
        Ok(value.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::script::hear_any_split;

    fn make() -> Box<dyn Wire> {
        Box::new(Resp::new(Names::of_pair(0)))
    }

    #[test]
    fn a_conversation_is_read_in_any_split() {
        let stream = b"%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nmodules\r\n*0\r\n\
            >3\r\n$9\r\nsubscribe\r\n$12\r\nbench-000000\r\n:1\r\n:1\r\n\
            >3\r\n$7\r\nmessage\r\n$12\r\nbench-000000\r\n$5\r\nhe\r\nl\r\n:0\r\n-ERR no\r\n";
        let heard = hear_any_split(&make, stream);
        assert_eq!(heard.events, ["accepted", "delivered he\r\nl", "failed PUBLISH reached nobody", "failed ERR no"]);
        assert!(heard.ready && heard.error.is_none());
    }

    #[test]
    fn a_publish_is_an_array_of_three() {
        let mut out = Vec::new();
        make().send(b"hello", &mut out);
        assert_eq!(out, b"*3\r\n$7\r\nPUBLISH\r\n$12\r\nbench-000001\r\n$5\r\nhello\r\n");
    }

    #[test]
    fn hostile_lengths_and_depths_end_in_an_error() {
        let deep = b"*1\r\n".repeat(20);
        for bad in [&b"$99999999999\r\n"[..], b"*-5\r\n", b"hello\r\n", b"\r\n", &deep] {
            assert!(hear_any_split(&make, bad).error.is_some());
        }
        let unfinished = hear_any_split(&make, b"*1000000\r\n:1\r\n");
        assert!(unfinished.error.is_none() && unfinished.events.is_empty());
    }
}
