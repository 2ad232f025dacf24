//! The bytes of one connection between nodes, under TLS or (on loopback, if configured) without. Sans-IO: what the socket
//! brings goes in, what it has to send comes out. Owned by the core that has the socket; can move to another core with it.
//!
//! Invariant: plaintext that came is in `inbound`, and no library keeps more than one TLS record of it.

use std::io::{self, BufRead, Write};

use bytes::BytesMut;

use super::secure::{Identity, names_in};

/// See the module.
#[derive(Debug)]
pub struct Wire {
    /// `None`: without TLS.
    tls: Option<Box<rustls::Connection>>,
    /// Plaintext that came.
    pub inbound: BytesMut,
    out: Vec<u8>,
}

impl Wire {
    /// Of a connection that this node has dialled. Errors: of the name.
    pub fn dialled(identity: Option<&Identity>, node: &str) -> Result<Self, rustls::Error> {
        let tls = identity.map(|identity| identity.dial(node)).transpose()?;
        Ok(Self::new(tls))
    }

    /// Of a connection that was accepted.
    pub fn accepted(identity: Option<&Identity>) -> Result<Self, rustls::Error> {
        let tls = identity.map(Identity::accept).transpose()?;
        Ok(Self::new(tls))
    }

    fn new(tls: Option<rustls::Connection>) -> Self {
        let tls = tls.map(|mut tls| {
            // Bounded by its user, who stops at a full buffer in flight.
            tls.set_buffer_limit(None);
            Box::new(tls)
        });
        Self { tls, inbound: BytesMut::new(), out: Vec::new() }
    }

    /// Takes in what the socket brought. Errors: TLS's; an alert for the other side may be left to send.
    pub fn receive(&mut self, mut bytes: &[u8]) -> Result<(), rustls::Error> {
        let Some(tls) = &mut self.tls else {
            self.inbound.extend_from_slice(bytes);
            return Ok(());
        };
        while !bytes.is_empty() {
            // A slice gives no errors, and its plaintext is taken out below.
            let read = tls.read_tls(&mut bytes).map_err(|error| rustls::Error::General(error.to_string()))?;
            tls.process_new_packets()?;
            take_plaintext(tls, &mut self.inbound);
            if read == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Whether plaintext can be written.
    pub fn is_ready(&self) -> bool {
        self.tls.as_ref().is_none_or(|tls| !tls.is_handshaking())
    }

    /// Queues plaintext.
    pub fn write(&mut self, plaintext: &[u8]) {
        match &mut self.tls {
            None => self.out.extend_from_slice(plaintext),
            Some(tls) => {
                // Without a limit all of it is taken.
                let written = tls.writer().write_all(plaintext);
                debug_assert!(written.is_ok(), "{written:?}");
            }
        }
    }

    /// What is to go to the socket; `None`: nothing.
    pub fn take_output(&mut self) -> Option<Vec<u8>> {
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                match tls.write_tls(&mut self.out) {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => break,
                }
            }
        }
        (!self.out.is_empty()).then(|| std::mem::take(&mut self.out))
    }

    /// The names in the other side's certificate; `None` without TLS.
    pub fn certified(&self) -> Option<Vec<String>> {
        let tls = self.tls.as_ref()?;
        Some(tls.peer_certificates().and_then(<[_]>::first).map(names_in).unwrap_or_default())
    }
}

fn take_plaintext(tls: &mut rustls::Connection, inbound: &mut BytesMut) {
    let mut reader = tls.reader();
    loop {
        let taken = match reader.fill_buf() {
            Ok(bytes) => {
                inbound.extend_from_slice(bytes);
                bytes.len()
            }
            // Nothing there; or the stream was cut without a goodbye, which the socket tells as well.
            Err(error) => {
                debug_assert!(
                    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::UnexpectedEof),
                    "{error}"
                );
                0
            }
        };
        if taken == 0 {
            return;
        }
        reader.consume(taken);
    }
}
