//! NATS core, as a client: a subscription to its own name, publishes to its partner's. Not verbose: no answers.
//!
//! The protocol is described at docs.nats.io, "Client Protocol". Ready once the PONG behind the subscription came.

use super::{Names, Sink, UNIT_BYTES_MAX, Wire, WireEvent, line, number};

/// See the module.
pub struct Nats {
    names: Names,
    ready: bool,
}

impl Nats {
    pub fn new(names: Names) -> Self {
        Self { names, ready: false }
    }

    /// MSG <subject> <sid> [reply-to] <#bytes>: the payload follows, then CR LF.
    fn message(words: &[u8], rest: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let length = words.rsplit(|byte| *byte == b' ').next().and_then(number);
        let Some(length) = length.filter(|length| *length <= UNIT_BYTES_MAX) else {
            return Err(format!("MSG without a length: {}", String::from_utf8_lossy(words)));
        };
        let (Some(payload), Some(end)) = (rest.get(..length), rest.get(length..length + 2)) else { return Ok(0) };
        if end != b"\r\n" {
            return Err("MSG does not end in CR LF".to_owned());
        }
        sink.tell(WireEvent::Delivered(payload));
        Ok(length + 2)
    }
}

impl Wire for Nats {
    fn hello(&mut self, out: &mut Vec<u8>) {
        let own = &self.names.own;
        let options = r#"{"verbose":false,"pedantic":false,"echo":false,"lang":"rust","version":"1","protocol":1}"#;
        out.extend_from_slice(format!("CONNECT {options}\r\nSUB {own} 1\r\nPING\r\n").as_bytes());
    }

    fn ready(&self) -> bool {
        self.ready
    }

    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"PUB ");
        out.extend_from_slice(self.names.partner.as_bytes());
        out.push(b' ');
        out.extend_from_slice(payload.len().to_string().as_bytes());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(payload);
        out.extend_from_slice(b"\r\n");
    }

    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let Some((words, used)) = line(bytes) else { return Ok(0) };
        if words.starts_with(b"MSG ") {
            let rest = bytes.get(used..).unwrap_or_default();
            return Self::message(words, rest, sink).map(|length| if length == 0 { 0 } else { used + length });
        }
        match words.split(|byte| *byte == b' ').next().unwrap_or_default() {
            b"PONG" => self.ready = true,
            b"PING" => sink.out.extend_from_slice(b"PONG\r\n"),
            b"INFO" => {}
            b"+OK" => sink.tell(WireEvent::Accepted),
            b"-ERR" => sink.tell(WireEvent::Failed(String::from_utf8_lossy(words).into_owned())),
            _ => return Err(format!("not NATS: {}", String::from_utf8_lossy(words))),
        }
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::script::hear_any_split;

    fn make() -> Box<dyn Wire> {
        Box::new(Nats::new(Names::of_pair(0)))
    }

    #[test]
    fn a_conversation_is_read_in_any_split() {
        let stream = b"INFO {\"server_id\":\"x\"}\r\nPONG\r\nPING\r\nMSG bench-000000 1 5\r\nhel\r\n\r\n\
            MSG bench-000000 1 reply 2\r\nyo\r\n-ERR 'Slow Consumer'\r\n";
        let heard = hear_any_split(&make, stream);
        assert_eq!(heard.events, ["delivered hel\r\n", "delivered yo", "failed -ERR 'Slow Consumer'"]);
        assert!(heard.ready && heard.error.is_none());
        assert!(heard.out.ends_with(b"SUB bench-000000 1\r\nPING\r\nPONG\r\n"));
    }

    #[test]
    fn a_publish_names_the_partner_and_its_length() {
        let mut out = Vec::new();
        make().send(b"hello", &mut out);
        assert_eq!(out, b"PUB bench-000001 5\r\nhello\r\n");
    }

    #[test]
    fn what_is_not_nats_fails() {
        for bad in [&b"HTTP/1.1 400\r\n"[..], b"MSG a 1 x\r\n", b"MSG a 1 99999999999\r\n", b"MSG a 1 1\r\nxyz"] {
            assert!(hear_any_split(&make, bad).error.is_some());
        }
    }
}
