//! A client's socket: connected, logged in, asked one thing at a time while a scenario is prepared.
//!
//! Owned by the task of its client. Everything it waits for ends in an answer, a refusal by name, or an error that says what
//! was asked.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::errors::ErrorCode;
use ringline_schema::frame::FrameDecoder;
use ringline_schema::ids::DeviceId;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::{Credential, DeviceKind, Login, Reply, Request, Secret};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::Failure;
use crate::sources::Sources;

/// An answer that takes longer than this has not come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two tries of what was refused for a while.
const AGAIN: Duration = Duration::from_millis(20);
const READ_BYTES: usize = 64 * 1024;
/// Request id of what is asked while preparing: above those of seats.
const ASK_ID: u32 = 1 << 31;

/// What all lines of the one thread share.
pub struct Desk {
    pub encoder: Encoder,
    input: Vec<u8>,
}

pub type SharedDesk = Rc<RefCell<Desk>>;

pub fn desk() -> SharedDesk {
    Rc::new(RefCell::new(Desk { encoder: Encoder::new(), input: vec![0; READ_BYTES] }))
}

/// What a client logs in as.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    pub number: u32,
    pub name: &'a str,
    pub token: &'a str,
}

pub fn failed(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::Failed(format!("{what}: {error}"))
}

/// See the module.
pub struct Line {
    pub socket: TcpStream,
    decoder: FrameDecoder,
    desk: SharedDesk,
}

impl Line {
    /// Connects and logs in.
    pub async fn login(sources: &Sources, who: Who<'_>, desk: &SharedDesk) -> Result<Self, Failure> {
        let connecting = async {
            let socket = TcpStream::from_std(sources.connect(who.number, None)?)?;
            socket.writable().await?;
            socket.take_error()?.map_or(Ok(socket), Err)
        };
        let socket = timeout(PATIENCE, connecting).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()));
        let socket = socket.map_err(|error| failed("cannot connect", &error))?;
        let mut line = Self { socket, decoder: FrameDecoder::new(), desk: Rc::clone(desk) };
        let login = Login {
            user: who.name,
            credential: Credential::Token(Secret(who.token)),
            device: DeviceId(1),
            device_kind: DeviceKind::Bot,
            agent: concat!("ringline-bench/", env!("CARGO_PKG_VERSION")),
        };
        let is_ok = |reply: &Reply<'_>| matches!(reply, Reply::LoginOk(_)).then_some(());
        line.ask(&Request::Login(login), is_ok).await?.map_err(|code| failed("login", &code))?;
        Ok(line)
    }

    /// Asks until it is not refused for a while, and takes from the answer what is wanted. The refusal, or `BAD_BODY` for
    /// another answer, is inside.
    pub async fn ask<T>(
        &mut self,
        request: &Request<'_>,
        take: impl Fn(&Reply<'_>) -> Option<T>,
    ) -> Result<Result<T, ErrorCode>, Failure> {
        loop {
            let mut bytes = Vec::new();
            self.desk.borrow_mut().encoder.request(Codec::FlatBuffers, ASK_ID, request, &mut bytes);
            self.write(&bytes).await.map_err(|error| failed(request.command().name(), &error))?;
            let waiting = async {
                loop {
                    self.socket.readable().await?;
                    let mut answer = None;
                    self.receive(|id, reply| {
                        if id == ASK_ID {
                            answer = Some(match reply {
                                Reply::Failure { code, .. } => Err(*code),
                                other => take(other).ok_or(ErrorCode::BadBody),
                            });
                        }
                    })?;
                    if let Some(answer) = answer {
                        return Ok(answer);
                    }
                }
            };
            let answer = timeout(PATIENCE, waiting).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()));
            match answer.map_err(|error: io::Error| failed(request.command().name(), &error))? {
                Err(ErrorCode::Busy | ErrorCode::RateLimited) => sleep(AGAIN).await,
                answer => return Ok(answer),
            }
        }
    }

    /// Gives every frame that is there to `told`, without waiting. Errors: the connection is of no more use.
    pub fn receive(&mut self, mut told: impl FnMut(u32, &Reply<'_>)) -> io::Result<()> {
        let mut desk = self.desk.borrow_mut();
        loop {
            let count = match self.socket.try_read(&mut desk.input) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            let mut bytes = desk.input.get(..count).unwrap_or_default();
            loop {
                let frame = self.decoder.next(&mut bytes, FRAME_BYTES_CEILING);
                let frame = frame.map_err(|error| io::Error::other(error.code.name()))?;
                let Some(frame) = frame else { break };
                match decode_reply(&frame.header, frame.body) {
                    Ok(reply) => told(frame.header.request_id, &reply),
                    // A push of a newer server.
                    Err(ErrorCode::UnknownCommand) => {}
                    Err(code) => return Err(io::Error::other(code.name())),
                }
            }
        }
    }

    pub async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.socket.try_write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub fn desk(&self) -> SharedDesk {
        Rc::clone(&self.desk)
    }
}
