//! Requests to etcd, over the JSON gateway that each of its servers has (3.4 and newer): plain HTTP POSTs, so building
//! needs no compiler of protocol files. Owned by one task of the side thread.
//!
//! - A request that gets no answer goes to the next endpoint, each once; what etcd itself refuses is not asked again.
//! - Every wait ends after `timeout`, and no answer above [`ANSWER_BYTES_MAX`] is read.
//! - A write that was not answered may have been done: who writes compares first, so that doing it again is no harm.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// The longest answer: all nodes of the largest cluster take a tenth of it.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How much of what etcd says of an error is passed on.
const MESSAGE_BYTES_MAX: usize = 200;
/// A connection that a stream hangs on is asked whether it is alive after so long.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(5);

/// Why a request came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EtcdError {
    /// The last endpoint that was tried, and why. A write may have been done.
    #[error("no etcd answers; {endpoint} was the last one asked: {why}")]
    Unreachable { endpoint: String, why: String },
    /// etcd will not do it; nothing was done.
    #[error("etcd refuses {path}: {message}")]
    Refused { path: &'static str, message: String },
    #[error("the answer of etcd to {path} can't be read: {why}")]
    Garbage { path: &'static str, why: String },
}

/// Where a server of etcd listens for clients, HOST:PORT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(String);

/// A text that names no endpoint, or one that this build can't reach.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEndpoint {
    #[error("{0:?} is no endpoint of etcd, http://HOST:PORT")]
    NoEndpoint(String),
    #[error("{0:?}: TLS to etcd is not in this build, keep it in a net of your own and use http://")]
    Tls(String),
    #[error("an endpoint of etcd holds a user or a password: logging in to etcd is not in this build")]
    LogIn,
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEndpoint> {
        if text.contains('@') {
            return Err(BadEndpoint::LogIn);
        }
        if text.starts_with("https://") {
            return Err(BadEndpoint::Tls(text.to_owned()));
        }
        let place = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let wrong = || BadEndpoint::NoEndpoint(text.to_owned());
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-_[]:".contains(&byte);
        let fits = !host.is_empty() && host.bytes().all(is_host) && port.parse::<u16>().is_ok_and(|port| port != 0);
        if fits { Ok(Self(place.to_owned())) } else { Err(wrong()) }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.0)
    }
}

/// An answer, and when the question was sent that got it.
#[derive(Debug)]
pub struct Answer<T> {
    pub body: T,
    pub asked_at: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Gateway {
    /// Not empty.
    endpoints: Vec<Endpoint>,
    /// The one that answered last.
    at: usize,
    timeout: Duration,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Gateway {
    pub fn new(endpoints: &[Endpoint], timeout: Duration) -> Self {
        Self { endpoints: endpoints.to_vec(), at: 0, timeout, sender: None }
    }

    /// Asks, and reads the whole answer. Errors: [`EtcdError`].
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        question: &Value,
    ) -> Result<Answer<T>, EtcdError> {
        let mut failed = None;
        for _ in 0..self.endpoints.len() {
            let asked_at = Instant::now();
            match tokio::time::timeout(self.timeout, self.exchange(path, question)).await {
                Ok(Ok((status, bytes))) => match understand(path, status, &bytes) {
                    Ok(body) => return Ok(Answer { body, asked_at }),
                    Err(error @ EtcdError::Refused { .. }) if !status.is_server_error() => return Err(error),
                    // It is there, and has no leader or lags or is no etcd: another one may do better.
                    Err(error) => failed = Some(self.turn(&error)),
                },
                Ok(Err(why)) => failed = Some(self.turn(&why)),
                Err(_) => failed = Some(self.turn(&format!("no answer in {} ms", self.timeout.as_millis()))),
            }
        }
        Err(failed.unwrap_or_else(|| self.turn(&"there is no endpoint")))
    }

    /// Asks, and leaves the answer to be read as it comes. One endpoint is tried; the next time it is another.
    pub async fn open(&mut self, path: &'static str, question: &Value) -> Result<Incoming, EtcdError> {
        match tokio::time::timeout(self.timeout, self.request(path, question)).await {
            Ok(Ok(response)) if response.status().is_success() => {
                // The stream keeps the connection to itself.
                self.sender = None;
                Ok(response.into_body())
            }
            Ok(Ok(response)) => {
                let message = response.status().to_string();
                Err(self.turn(&message))
            }
            Ok(Err(why)) => Err(self.turn(&why)),
            Err(_) => Err(self.turn(&format!("no answer in {} ms", self.timeout.as_millis()))),
        }
    }

    /// Goes on to the next endpoint.
    fn turn(&mut self, why: &dyn fmt::Display) -> EtcdError {
        self.sender = None;
        let endpoint = self.endpoint().map_or(String::new(), ToString::to_string);
        self.at = (self.at + 1) % self.endpoints.len().max(1);
        EtcdError::Unreachable { endpoint, why: why.to_string() }
    }

    fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoints.get(self.at)
    }

    async fn exchange(&mut self, path: &'static str, question: &Value) -> Result<(StatusCode, Bytes), String> {
        let response = self.request(path, question).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
    }

    async fn request(&mut self, path: &'static str, question: &Value) -> Result<Response<Incoming>, String> {
        let Some(endpoint) = self.endpoint().cloned() else { return Err("there is no endpoint".into()) };
        let question = Bytes::from(question.to_string());
        // A connection that was kept may have been closed meanwhile: that is not the endpoint's failure.
        if let Some(mut sender) = self.sender.take()
            && let Ok(response) = send(&mut sender, (path, &endpoint), question.clone()).await
        {
            self.sender = Some(sender);
            return Ok(response);
        }
        let mut sender = connect(&endpoint).await?;
        let response = send(&mut sender, (path, &endpoint), question).await?;
        self.sender = Some(sender);
        Ok(response)
    }
}

async fn send(
    sender: &mut SendRequest<Full<Bytes>>,
    (path, endpoint): (&'static str, &Endpoint),
    question: Bytes,
) -> Result<Response<Incoming>, String> {
    sender.ready().await.map_err(|error| error.to_string())?;
    let request = Request::builder().method(Method::POST).uri(path).header(HOST, &endpoint.0);
    let request = request.header(CONTENT_TYPE, "application/json").body(Full::new(question));
    let request = request.map_err(|error| error.to_string())?;
    sender.send_request(request).await.map_err(|error| error.to_string())
}

async fn connect(endpoint: &Endpoint) -> Result<SendRequest<Full<Bytes>>, String> {
    let stream = TcpStream::connect(&endpoint.0).await.map_err(|error| error.to_string())?;
    let _ = stream.set_nodelay(true);
    // A stream that says nothing for hours must notice that the other side is gone.
    let alive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_AFTER);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&alive);
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // It ends with the connection, which ends when the sender and the body of its last answer are dropped.
    tokio::spawn(connection);
    Ok(sender)
}

fn understand<T: DeserializeOwned>(path: &'static str, status: StatusCode, bytes: &[u8]) -> Result<T, EtcdError> {
    if status.is_success() {
        return serde_json::from_slice(bytes).map_err(|error| EtcdError::Garbage { path, why: error.to_string() });
    }
    // The gateway may put what belongs behind the answer into it: only the first value counts.
    let said = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>().next();
    let said = said.and_then(Result::ok).and_then(|said| said.get("error")?.as_str().map(str::to_owned));
    let mut message = said.unwrap_or_else(|| status.to_string());
    message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
    Err(EtcdError::Refused { path, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_plain_and_what_this_build_cannot_do_is_refused_by_name() {
        for (text, shown) in [
            ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
            ("etcd-1.example:2379", "http://etcd-1.example:2379"),
            ("http://[::1]:2379/", "http://[::1]:2379"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), shown);
        }
        for text in ["", "http://", "http://a", "http://a:0", "http://a:99999", "http://a b:1", "http://a:1/path", ":1"]
        {
            assert_eq!(text.parse::<Endpoint>(), Err(BadEndpoint::NoEndpoint(text.into())), "{text}");
        }
        assert_eq!("https://a:1".parse::<Endpoint>(), Err(BadEndpoint::Tls("https://a:1".into())));
        let told = "http://root:s3cret@a:1".parse::<Endpoint>().unwrap_err();
        assert!(told == BadEndpoint::LogIn && !told.to_string().contains("s3cret"));
    }

    #[test]
    fn what_etcd_refuses_is_named_and_an_unreadable_answer_too() {
        let refused = |status, bytes: &[u8]| understand::<Value>("/x", status, bytes).unwrap_err();
        let message = "etcdserver: requested lease not found".to_owned();
        let bytes = br#"{"error":"etcdserver: requested lease not found","code":5}Grpc-Trailer-Content-Type: a"#;
        assert_eq!(refused(StatusCode::NOT_FOUND, bytes), EtcdError::Refused { path: "/x", message });
        let message = "404 Not Found".to_owned();
        assert_eq!(refused(StatusCode::NOT_FOUND, b"Not Found"), EtcdError::Refused { path: "/x", message });
        assert!(matches!(refused(StatusCode::OK, b"<html>"), EtcdError::Garbage { path: "/x", .. }));
        let long = format!(r#"{{"error":"{}"}}"#, "ü".repeat(MESSAGE_BYTES_MAX));
        assert!(refused(StatusCode::BAD_REQUEST, long.as_bytes()).to_string().len() < 300);
    }
}
