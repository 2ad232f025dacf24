//! Our own wire, as a client: LOGIN with a token, SEND to the partner; durable, transient, or transient without answer.
//!
//! The FlatBuffers scratch memory is one a thread, so that 5,000 clients do not own 5,000 of them. Ready once LOGIN_OK
//! came. It sends no cursors and no pings: a run is shorter than the idle time of the server.

use std::cell::RefCell;

use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::frame::{Flags, Header};
use ringline_schema::ids::DeviceId;
use ringline_schema::limits::{FRAME_BYTES_CEILING, FRAME_HEADER_BYTES};
use ringline_schema::message::{
    BodyKind, Class, Credential, DeviceKind, Login, Mentions, Reply, Request, Secret, Send,
};

use super::{Names, Sink, Wire, WireEvent};

thread_local! {
    static ENCODER: RefCell<Encoder> = RefCell::new(Encoder::new());
}

/// The three ways to send that `compare` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Durable,
    Transient,
    TransientNoReply,
}

impl Mode {
    fn class(self) -> Class {
        match self {
            Self::Durable => Class::Durable,
            Self::Transient | Self::TransientNoReply => Class::Transient,
        }
    }

    fn flags(self) -> Flags {
        match self {
            Self::Durable | Self::Transient => Flags::default(),
            Self::TransientNoReply => Flags::NO_REPLY,
        }
    }
}

/// See the module.
pub struct Ringline {
    names: Names,
    mode: Mode,
    token: String,
    device: DeviceId,
    client_seq: u64,
    ready: bool,
}

impl Ringline {
    /// `device` is not 0; `token` is one for `names.own`.
    pub fn new(names: Names, mode: Mode, (device, token): (DeviceId, String)) -> Self {
        Self { names, mode, token, device, client_seq: 0, ready: false }
    }

    fn reply(&mut self, reply: &Reply<'_>, sink: &mut Sink<'_>) {
        match reply {
            Reply::SendAck(_) => sink.tell(WireEvent::Accepted),
            Reply::Deliver(message) => sink.tell(WireEvent::Delivered(message.body)),
            Reply::LoginOk(_) => self.ready = true,
            Reply::Failure { code, detail, .. } => {
                sink.tell(WireEvent::Failed(format!("{} {detail}", code.name())));
            }
            Reply::Redirect { .. } | Reply::Lagged { .. } | Reply::Kicked { .. } | Reply::Goaway { .. } => {
                sink.tell(WireEvent::Failed(reply.command().name().to_owned()));
            }
            Reply::Pong { .. }
            | Reply::RegisterOk { .. }
            | Reply::LogoutOk
            | Reply::RouteOk { .. }
            | Reply::FetchOk { .. }
            | Reply::OnlineOk { .. }
            | Reply::ConversationsOk { .. }
            | Reply::Receipt(_)
            | Reply::Group(_)
            | Reply::Chat(_) => {}
        }
    }
}

fn write(flags: Flags, request_id: u32, request: &Request<'_>, out: &mut Vec<u8>) {
    ENCODER.with_borrow_mut(|encoder| encoder.request_flagged((Codec::FlatBuffers, flags), request_id, request, out));
}

impl Wire for Ringline {
    fn hello(&mut self, out: &mut Vec<u8>) {
        let login = Login {
            user: &self.names.own,
            credential: Credential::Token(Secret(&self.token)),
            device: self.device,
            device_kind: DeviceKind::Bot,
            agent: concat!("ringline-bench/", env!("CARGO_PKG_VERSION")),
        };
        write(Flags::default(), 1, &Request::Login(login), out);
    }

    fn ready(&self) -> bool {
        self.ready
    }

    fn send(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        self.client_seq += 1;
        let send = Send {
            to: &self.names.partner,
            class: self.mode.class(),
            kind: BodyKind::Text,
            client_seq: self.client_seq,
            ack_timeout_ms: None,
            body: payload,
            mentions: Mentions::default(),
        };
        write(self.mode.flags(), self.client_seq as u32, &Request::Send(send), out);
    }

    fn unit(&mut self, bytes: &[u8], sink: &mut Sink<'_>) -> Result<usize, String> {
        let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(0) };
        let header = Header::decode(head, FRAME_BYTES_CEILING).map_err(|error| error.to_string())?;
        let length = header.body_bytes as usize;
        let Some(body) = rest.get(..length) else { return Ok(0) };
        let reply = decode_reply(&header, body).map_err(|code| format!("an answer that is {}", code.name()))?;
        self.reply(&reply, sink);
        Ok(FRAME_HEADER_BYTES + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::script::hear_any_split;
    use ringline_schema::codec::decode_request;
    use ringline_schema::errors::ErrorCode;
    use ringline_schema::ids::{ConversationId, Seq};
    use ringline_schema::message::{LoginOk, Message, SendAck};

    fn make(mode: Mode) -> Box<dyn Wire> {
        Box::new(Ringline::new(Names::of_pair(0), mode, (DeviceId(1), "token".to_owned())))
    }

    #[test]
    fn a_conversation_is_read_in_any_split() {
        let ok = LoginOk {
            user: "bench-000000",
            session: 1,
            server_time_ms: 1,
            ping_interval_ms: 1,
            idle_timeout_ms: 1,
            frame_bytes_max: 1,
            sends_in_flight_max: 1,
        };
        let message = Message {
            conversation: ConversationId(1),
            seq: Seq(1),
            time_ms: 1,
            from: "bench-000001",
            to: "bench-000000",
            device: DeviceId(2),
            client_seq: 1,
            class: Class::Transient,
            kind: BodyKind::Text,
            delivery: 0,
            body: b"hello",
            extra: ringline_schema::message::Extra::default(),
        };
        let ack = SendAck { conversation: ConversationId(1), seq: Seq(0), time_ms: 1, dup: false };
        let failure = Reply::Failure { code: ErrorCode::NotOnline, retry_after_ms: 0, detail: "" };
        let mut stream = Vec::new();
        let mut encoder = Encoder::new();
        for reply in [Reply::LoginOk(ok), Reply::Deliver(message), Reply::SendAck(ack), failure] {
            encoder.reply(Codec::FlatBuffers, 1, &reply, &mut stream);
        }
        let heard = hear_any_split(&|| make(Mode::Transient), &stream);
        assert_eq!(heard.events, ["delivered hello", "accepted", "failed NOT_ONLINE "]);
        assert!(heard.ready && heard.error.is_none());
        assert!(hear_any_split(&|| make(Mode::Transient), b"GET / HTTP/1.1\r\n\r\n").error.is_some());
    }

    #[test]
    fn the_mode_sets_class_and_flag() {
        for (mode, class, flags) in [
            (Mode::Durable, Class::Durable, Flags::default()),
            (Mode::Transient, Class::Transient, Flags::default()),
            (Mode::TransientNoReply, Class::Transient, Flags::NO_REPLY),
        ] {
            let mut out = Vec::new();
            make(mode).send(b"hello", &mut out);
            let (head, body) = out.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
            let header = Header::decode(head, FRAME_BYTES_CEILING).unwrap();
            assert_eq!(header.flags, flags);
            let Ok(Request::Send(send)) = decode_request(&header, body) else { panic!("not a SEND") };
            assert_eq!((send.class, send.to, send.body, send.client_seq), (class, "bench-000001", &b"hello"[..], 1));
        }
    }
}
