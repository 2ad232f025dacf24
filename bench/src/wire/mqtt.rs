//! MQTT 3.1.1, as a client: subscribed to the topic of its own name, at QoS 0 or 1; publishes to its partner's.
//!
//! Section numbers are those of the OASIS standard. At QoS 1 the sender gets a PUBACK from the broker, and the receiver
//! owes it one. Ready once the SUBACK came.

use super::{Names, Sink, UNIT_BYTES_MAX, Wire, WireEvent};

const CONNECT: u8 = 0x10;
const CONNACK: u8 = 0x20;
const PUBLISH: u8 = 0x30;
const PUBACK: u8 = 0x40;
const SUBSCRIBE: u8 = 0x82;
const SUBACK: u8 = 0x90;
const PINGRESP: u8 = 0xd0;
/// Section 2.2.3: a remaining length has at most so many bytes.
const LENGTH_BYTES_MAX: usize = 4;
/// SUBACK's code of a refused subscription.
const REFUSED: u8 = 0x80;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    AtMostOnce,
    AtLeastOnce,
}

/// See the module.
pub struct Mqtt {
    names: Names,
    qos: Qos,
    /// The last one used; 0 is not allowed (section 2.3.1).
    packet_id: u16,
    ready: bool,
}

impl Mqtt {
    pub fn new(names: Names, qos: Qos) -> Self {
        Self { names, qos, packet_id: 0, ready: false }
    }

    fn next_packet_id(&mut self) -> u16 {
        self.packet_id = self.packet_id.checked_add(1).unwrap_or(1);
        self.packet_id
    }

    /// Section 3.3.2: topic, packet id at QoS 1, payload.
    fn published(flags: u8, body: &[u8], sink: &mut Sink<'_>) -> Option<()> {
        let (length, rest) = body.split_first_chunk::<2>()?;
        let (_, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        match (flags >> 1) & 3 {
            0 => sink.tell(WireEvent::Delivered(rest)),
            1 => {
                let (id, payload) = rest.split_first_chunk::<2>()?;
                sink.out.extend_from_slice(&[PUBACK, 2]);
                sink.out.extend_from_slice(id);
                sink.tell(WireEvent::Delivered(payload));
            }
            // QoS 2 was not subscribed to.
            _ => return None,
        }
        Some(())
    }

    /// `None`: malformed.
    fn packet(&mut self, head: u8, body: &[u8], sink: &mut Sink<'_>) -> Option<()> {
        match head & 0xf0 {
            PUBLISH => Self::published(head, body, sink)?,
            PUBACK => sink.tell(WireEvent::Accepted),
            CONNACK => match body.get(1)? {
                0 => {}
                code => sink.tell(WireEvent::Failed(format!("CONNACK {code}"))),
            },
            SUBACK => match *body.get(2)? {
                REFUSED => sink.tell(WireEvent::Failed("SUBACK: refused".to_owned())),
                _granted => self.ready = true,
            },
            PINGRESP => {}
            _ => return None,
        }
        Some(())
    }
}

fn field(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Section 2.2.3: seven bits a byte, lowest first.
fn remaining_length(mut length: usize, out: &mut Vec<u8>) {
    while length > 0x7f {
        out.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
}

/// The length and the bytes it took; `Ok(None)`: not whole yet.
fn read_length(bytes: &[u8]) -> Result<Option<(usize, usize)>, String> {
    let mut length = 0;
    for (at, byte) in bytes.iter().take(LENGTH_BYTES_MAX).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((length, at + 1)));
        }
    }
    if bytes.len() >= LENGTH_BYTES_MAX { Err("MQTT length too long".to_owned()) } else { Ok(None) }
}

impl Wire for Mqtt {
    fn hello(&mut self, out: &mut Vec<u8>) {
        // Section 3.1: protocol name, level 4, clean session, no keep alive, client id.
        let mut body = Vec::new();
        field("MQTT", &mut body);
        body.extend_from_slice(&[4, 2, 0, 0]);
        field(&self.names.own, &mut body);
        out.push(CONNECT);
        remaining_length(body.len(), out);
        out.append(&mut body);
        // Section 3.8: packet id, topic filter, QoS.
        body.extend_from_slice(&self.next_packet_id().to_be_bytes());
        field(&self.names.own, &mut body);
        body.push(self.qos as u8);
        out.push(SUBSCRIBE);
        remaining_length(body.len(), out);
        out.append(&mut body);
    }

    fn ready(&self) -> bool {
        self.ready
    }

    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        let id_bytes = match self.qos {
            Qos::AtMostOnce => 0,
            Qos::AtLeastOnce => 2,
        };
        out.push(PUBLISH | (self.qos as u8) << 1);
        remaining_length(2 + self.names.partner.len() + id_bytes + payload.len(), out);
        field(&self.names.partner, out);
        if id_bytes > 0 {
            out.extend_from_slice(&self.next_packet_id().to_be_bytes());
        }
        out.extend_from_slice(payload);
    }

    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let Some((head, rest)) = bytes.split_first() else { return Ok(0) };
        let Some((length, used)) = read_length(rest)? else { return Ok(0) };
        if length > UNIT_BYTES_MAX {
            return Err(format!("an MQTT packet of {length} bytes"));
        }
        let Some(body) = rest.get(used..used + length) else { return Ok(0) };
        self.packet(*head, body, sink).ok_or_else(|| format!("malformed MQTT packet {head:#04x}"))?;
        Ok(1 + used + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::script::hear_any_split;

    fn make(qos: Qos) -> Box<dyn Wire> {
        Box::new(Mqtt::new(Names::of_pair(0), qos))
    }

    #[test]
    fn a_conversation_is_read_in_any_split() {
        let mut stream = vec![CONNACK, 2, 0, 0, SUBACK, 3, 0, 1, 1, PUBACK, 2, 0, 2];
        // What the other side would publish to us at QoS 0, and at QoS 1 with an id and a length of two bytes.
        Mqtt::new(Names::of_pair(1), Qos::AtMostOnce).send(b"plain", &mut stream);
        let long = "x".repeat(200);
        Mqtt::new(Names::of_pair(1), Qos::AtLeastOnce).send(long.as_bytes(), &mut stream);
        let heard = hear_any_split(&|| make(Qos::AtLeastOnce), &stream);
        assert_eq!(heard.events, ["accepted", "delivered plain", &format!("delivered {long}")]);
        assert!(heard.ready && heard.error.is_none());
        assert!(heard.out.ends_with(&[PUBACK, 2, 0, 1]), "what came at QoS 1 is acknowledged");
    }

    #[test]
    fn packets_are_those_of_the_standard() {
        let mut out = Vec::new();
        make(Qos::AtMostOnce).hello(&mut out);
        assert_eq!(&out[..12], b"\x10\x18\x00\x04MQTT\x04\x02\x00\x00");
        assert_eq!(&out[26..], b"\x82\x11\x00\x01\x00\x0cbench-000000\x00");
        out.clear();
        make(Qos::AtLeastOnce).send(b"hi", &mut out);
        assert_eq!(out, b"\x32\x12\x00\x0cbench-000001\x00\x01hi");
    }

    #[test]
    fn refusals_and_malformed_packets_are_told() {
        let heard = hear_any_split(&|| make(Qos::AtMostOnce), &[CONNACK, 2, 0, 5, SUBACK, 3, 0, 1, REFUSED]);
        assert_eq!(heard.events, ["failed CONNACK 5", "failed SUBACK: refused"]);
        assert!(!heard.ready);
        for bad in [&[0x30, 0xff, 0xff, 0xff, 0xff][..], &[0x30, 1, 0], &[0x00, 0], &[0x30, 0xff, 0xff, 0xff, 0x7f]] {
            assert!(hear_any_split(&|| make(Qos::AtMostOnce), bad).error.is_some(), "{bad:?}");
        }
    }
}
