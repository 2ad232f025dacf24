//! XMPP client to server (RFC 6120, 6121), in clear on loopback: SASL PLAIN, bind, presence, message stanzas.
//!
//! Only as much XML as is needed to cut a stream into stanzas: tags, quotes, depth. The payload has to be text without
//! `<`, `>` and `&`. Ready once the answer to the bind came.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::{Names, Sink, Wire, WireEvent};

/// The host that the server is set up to serve.
pub const HOST: &str = "localhost";
const RESOURCE: &str = "bench";

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Stream features, before SASL.
    Mechanisms,
    /// The outcome of SASL.
    Outcome,
    /// Stream features of the second stream.
    Features,
    Bound,
    Ready,
}

/// See the module.
pub struct Xmpp {
    names: Names,
    stage: Stage,
}

impl Xmpp {
    pub fn new(names: Names) -> Self {
        Self { names, stage: Stage::Mechanisms }
    }

    fn open_stream(out: &mut Vec<u8>) {
        let stream = format!(
            "<?xml version='1.0'?><stream:stream to='{HOST}' version='1.0' xmlns='jabber:client' \
             xmlns:stream='http://etherx.jabber.org/streams'>"
        );
        out.extend_from_slice(stream.as_bytes());
    }

    fn features(&mut self, stanza: &str, sink: &mut Sink<'_>) {
        match self.stage {
            Stage::Mechanisms if stanza.contains(">PLAIN<") => {
                // RFC 4616: authzid, NUL, authcid, NUL, password.
                let secret = BASE64_STANDARD.encode(format!("\0{}\0bench", self.names.own));
                let auth = format!("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{secret}</auth>");
                sink.out.extend_from_slice(auth.as_bytes());
                self.stage = Stage::Outcome;
            }
            Stage::Mechanisms => sink.tell(WireEvent::Failed(format!("no SASL PLAIN: {stanza}"))),
            Stage::Features => {
                let bind = format!(
                    "<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>\
                     <resource>{RESOURCE}</resource></bind></iq><presence/>"
                );
                sink.out.extend_from_slice(bind.as_bytes());
                self.stage = Stage::Bound;
            }
            Stage::Outcome | Stage::Bound | Stage::Ready => {}
        }
    }

    fn stanza(&mut self, stanza: &str, sink: &mut Sink<'_>) {
        let failed = |sink: &mut Sink<'_>| sink.tell(WireEvent::Failed(stanza.to_owned()));
        let head = stanza.split('>').next().unwrap_or_default();
        let is_error = head.contains("type='error'") || head.contains("type=\"error\"");
        match head.split([' ', '/', '<']).nth(1).unwrap_or_default() {
            "message" if is_error => failed(sink),
            "message" => {
                // Other messages (subjects, states) have no body.
                let body = stanza.split_once("<body").and_then(|(_, rest)| rest.split_once('>'));
                if let Some((payload, _)) = body.and_then(|(_, rest)| rest.split_once("</body>")) {
                    sink.tell(WireEvent::Delivered(payload.as_bytes()));
                }
            }
            "stream:features" => self.features(stanza, sink),
            "success" => {
                Self::open_stream(sink.out);
                self.stage = Stage::Features;
            }
            "iq" if self.stage == Stage::Bound => {
                if is_error {
                    failed(sink);
                } else {
                    self.stage = Stage::Ready;
                }
            }
            "presence" | "iq" => {}
            _ => failed(sink),
        }
    }
}

/// One thing at the front of a stream.
#[derive(Debug, PartialEq, Eq)]
enum Piece<'a> {
    /// White space, XML declaration, stream header, or the end of the stream.
    Skip(usize),
    Stanza(&'a [u8]),
}

/// Cuts the front off. `None`: not whole yet.
fn piece(bytes: &[u8]) -> Option<Piece<'_>> {
    let blank = bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    if blank > 0 {
        return Some(Piece::Skip(blank));
    }
    let (mut at, mut depth) = (0_usize, 0_usize);
    loop {
        let rest = bytes.get(at..)?;
        let open = rest.iter().position(|byte| *byte == b'<')?;
        let tag = rest.get(open..)?;
        let end = tag_end(tag)?;
        at += open + end;
        let tag = tag.get(..end)?;
        if tag.starts_with(b"<?") || tag.starts_with(b"<stream:stream") || (depth == 0 && tag.starts_with(b"</")) {
            return Some(Piece::Skip(at));
        }
        if tag.starts_with(b"</") {
            depth = depth.saturating_sub(1);
        } else if !tag.ends_with(b"/>") {
            depth += 1;
        }
        if depth == 0 {
            return bytes.get(..at).map(Piece::Stanza);
        }
    }
}

/// The length of a tag with its `>`, which does not count inside quotes.
fn tag_end(tag: &[u8]) -> Option<usize> {
    let mut quote = None;
    for (at, byte) in tag.iter().enumerate() {
        match (quote, byte) {
            (None, b'>') => return Some(at + 1),
            (None, b'\'' | b'"') => quote = Some(*byte),
            (Some(open), _) if open == *byte => quote = None,
            (None | Some(_), _) => {}
        }
    }
    None
}

impl Wire for Xmpp {
    fn hello(&mut self, out: &mut Vec<u8>) {
        Self::open_stream(out);
    }

    fn ready(&self) -> bool {
        self.stage == Stage::Ready
    }

    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"<message type='chat' to='");
        out.extend_from_slice(self.names.partner.as_bytes());
        out.extend_from_slice(format!("@{HOST}/{RESOURCE}'><body>").as_bytes());
        out.extend_from_slice(payload);
        out.extend_from_slice(b"</body></message>");
    }

    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        match piece(bytes) {
            None => Ok(0),
            Some(Piece::Skip(length)) => Ok(length),
            Some(Piece::Stanza(stanza)) => {
                let text = std::str::from_utf8(stanza).map_err(|_| "a stanza that is not UTF-8".to_owned())?;
                self.stanza(text, sink);
                Ok(stanza.len())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::script::hear_any_split;

    fn make() -> Box<dyn Wire> {
        Box::new(Xmpp::new(Names::of_pair(0)))
    }

    const STREAM: &str = "<?xml version='1.0'?><stream:stream id='1' version='1.0' from='localhost' \
        xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";

    #[test]
    fn a_conversation_is_read_in_any_split() {
        let stream = [
            STREAM,
            "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>PLAIN</mechanism>\
             </mechanisms></stream:features><success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
            STREAM,
            "<stream:features><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></stream:features>",
            "<iq type='result' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><jid>a@b/c</jid></bind></iq>",
            "<presence from='x' to='y'/>\n<message xml:lang='en' to='a' from='it&apos;s >' type='chat'>\
             <body>hello</body><x><y/></x></message>",
            "<message type='error' from='a'><body>back</body><error/></message>",
        ]
        .concat();
        let heard = hear_any_split(&make, stream.as_bytes());
        assert_eq!(heard.events.len(), 2, "{:?}", heard.events);
        assert_eq!(heard.events[0], "delivered hello");
        assert!(heard.events[1].starts_with("failed <message type='error'"));
        assert!(heard.ready && heard.error.is_none());
        assert!(String::from_utf8(heard.out).unwrap().contains(">AGJlbmNoLTAwMDAwMABiZW5jaA==</auth>"));
    }

    #[test]
    fn refusals_are_told() {
        let stream = [STREAM, "<stream:features/><stream:error><conflict/></stream:error></stream:stream>"].concat();
        let heard = hear_any_split(&make, stream.as_bytes());
        assert_eq!(heard.events.len(), 2, "{:?}", heard.events);
        assert!(heard.events.iter().all(|event| event.starts_with("failed ")));
    }
}
