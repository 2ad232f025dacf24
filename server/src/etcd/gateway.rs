//! Requests to etcd, over the JSON gateway that each of its servers has (3.4 and newer): plain HTTP POSTs, so building
//! needs no compiler of protocol files. Owned by one task of the side thread.
//!
//! Where etcd asks for a user, its token is sent with each request. It is asked for before the first one and whenever etcd does not
//! know it any more (tokens end with time and, but for signed ones, with their server): the request is then made once more.
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
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::access::{self, Access, Tls};
use super::wire::{self, Authenticated, path as paths};

/// How etcd says that it does not know the token of a request, in its versions.
const TOKEN_IS_OVER: [&str; 4] =
    ["invalid auth token", "user name is empty", "revision of auth store is old", "revision in header is old"];
/// How it says that nobody has to log in.
const NOBODY_LOGS_IN: &str = "authentication is not enabled";
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
    /// There is no password to log in with. Nothing was asked.
    #[error("{0}")]
    Password(String),
}

/// Where a server of etcd listens for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// HOST:PORT.
    place: String,
    tls: bool,
}

/// A text that names no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEndpoint {
    #[error("{0:?} is no endpoint of etcd, http://HOST:PORT or https://HOST:PORT")]
    NoEndpoint(String),
    #[error("an endpoint of etcd holds a user or a password: etcd.username and etcd.password_file are for them")]
    LogIn,
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEndpoint> {
        if text.contains('@') {
            return Err(BadEndpoint::LogIn);
        }
        let secure = text.strip_prefix("https://");
        let place = secure.or(text.strip_prefix("http://")).unwrap_or(text).trim_end_matches('/');
        let wrong = || BadEndpoint::NoEndpoint(text.to_owned());
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-_[]:".contains(&byte);
        let fits = !host.is_empty() && host.bytes().all(is_host) && port.parse::<u16>().is_ok_and(|port| port != 0);
        if fits { Ok(Self { place: place.to_owned(), tls: secure.is_some() }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.place)
    }
}

impl Endpoint {
    /// Whether the way there is encrypted.
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// As it has to be in its certificate.
    fn host(&self) -> &str {
        let host = self.place.rsplit_once(':').map_or("", |(host, _)| host);
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// Whether what is sent there can be read on the way.
    pub fn is_open(&self) -> bool {
        !self.tls && !access::is_loopback(self.host())
    }
}

/// An answer, and when the question was sent that got it.
#[derive(Debug)]
pub struct Answer<T> {
    pub body: T,
    pub asked_at: Instant,
}

/// Why one endpoint did not do.
enum Trouble {
    /// Another one may do better.
    Here(String),
    /// What all of them would say.
    Everywhere(EtcdError),
}

/// What is shown with each request.
#[derive(Debug)]
enum Pass {
    /// It is to be asked for.
    Wanted,
    /// Nobody asks for one.
    NotNeeded,
    Token(HeaderValue),
}

/// See the module.
#[derive(Debug)]
pub struct Gateway {
    /// Not empty.
    endpoints: Vec<Endpoint>,
    /// The one that answered last.
    at: usize,
    timeout: Duration,
    access: Access,
    pass: Pass,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Gateway {
    pub fn new(endpoints: &[Endpoint], timeout: Duration, access: &Access) -> Self {
        let pass = if access.login.is_some() { Pass::Wanted } else { Pass::NotNeeded };
        Self { endpoints: endpoints.to_vec(), at: 0, timeout, access: access.clone(), pass, sender: None }
    }

    /// Asks, and reads the whole answer. Errors: [`EtcdError`].
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        question: &Value,
    ) -> Result<Answer<T>, EtcdError> {
        let mut failed = None;
        for _ in 0..self.endpoints.len() {
            match tokio::time::timeout(self.timeout, self.ask_here(path, question)).await {
                Ok(Ok(Got { status, bytes, asked_at })) => match understand(path, status, &bytes) {
                    Ok(body) => return Ok(Answer { body, asked_at }),
                    Err(error @ EtcdError::Refused { .. }) if !status.is_server_error() => return Err(error),
                    // It is there, and has no leader or lags or is no etcd: another one may do better.
                    Err(error) => failed = Some(self.turn(&error)),
                },
                Ok(Err(Trouble::Everywhere(error))) => return Err(error),
                Ok(Err(Trouble::Here(why))) => failed = Some(self.turn(&why)),
                Err(_) => failed = Some(self.turn(&format!("no answer in {} ms", self.timeout.as_millis()))),
            }
        }
        Err(failed.unwrap_or_else(|| self.turn(&"there is no endpoint")))
    }

    /// Asks, and leaves the answer to be read as it comes. One endpoint is tried; the next time it is another.
    pub async fn open(&mut self, path: &'static str, question: &Value) -> Result<Incoming, EtcdError> {
        match tokio::time::timeout(self.timeout, self.open_here(path, question)).await {
            Ok(Ok(response)) if response.status().is_success() => {
                // The stream keeps the connection to itself.
                self.sender = None;
                Ok(response.into_body())
            }
            Ok(Ok(response)) => {
                let message = response.status().to_string();
                self.forget_token();
                Err(self.turn(&message))
            }
            Ok(Err(Trouble::Everywhere(error))) => Err(error),
            Ok(Err(Trouble::Here(why))) => Err(self.turn(&why)),
            Err(_) => Err(self.turn(&format!("no answer in {} ms", self.timeout.as_millis()))),
        }
    }

    /// Another token is asked for before the next request: what was refused may have been refused for this one.
    pub fn forget_token(&mut self) {
        if self.access.login.is_some() {
            self.pass = Pass::Wanted;
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

    /// Asks this endpoint; once more with another token if it does not know the one that was sent.
    async fn ask_here(&mut self, path: &'static str, question: &Value) -> Result<Got, Trouble> {
        self.log_in().await?;
        let got = self.exchange(path, question).await.map_err(Trouble::Here)?;
        if self.access.login.is_none() || !is_over(got.status, &got.bytes) {
            return Ok(got);
        }
        self.forget_token();
        self.log_in().await?;
        self.exchange(path, question).await.map_err(Trouble::Here)
    }

    async fn open_here(&mut self, path: &'static str, question: &Value) -> Result<Response<Incoming>, Trouble> {
        self.log_in().await?;
        self.request(path, question).await.map_err(Trouble::Here)
    }

    /// Gets a token, if one is wanted.
    async fn log_in(&mut self) -> Result<(), Trouble> {
        let (Pass::Wanted, Some(login)) = (&self.pass, &self.access.login) else { return Ok(()) };
        let password = login.password().map_err(|why| Trouble::Everywhere(EtcdError::Password(why)))?;
        let question = wire::authenticate(&login.user, &password);
        let got = self.exchange(paths::AUTHENTICATE, &question).await.map_err(Trouble::Here)?;
        self.pass = match understand::<Authenticated>(paths::AUTHENTICATE, got.status, &got.bytes) {
            Ok(answer) => Pass::Token(token(&answer.token).map_err(Trouble::Everywhere)?),
            // It may be switched on later: then requests are refused, and a token is asked for.
            Err(EtcdError::Refused { message, .. }) if message.contains(NOBODY_LOGS_IN) => Pass::NotNeeded,
            Err(error @ EtcdError::Refused { .. }) if !got.status.is_server_error() => {
                return Err(Trouble::Everywhere(error));
            }
            Err(error) => return Err(Trouble::Here(error.to_string())),
        };
        Ok(())
    }

    async fn exchange(&mut self, path: &'static str, question: &Value) -> Result<Got, String> {
        let asked_at = Instant::now();
        let response = self.request(path, question).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(Got { status, bytes: body.map_err(|error| error.to_string())?.to_bytes(), asked_at })
    }

    async fn request(&mut self, path: &'static str, question: &Value) -> Result<Response<Incoming>, String> {
        let Some(endpoint) = self.endpoint().cloned() else { return Err("there is no endpoint".into()) };
        let question = Bytes::from(question.to_string());
        let pass = match &self.pass {
            Pass::Token(token) => Some(token.clone()),
            Pass::Wanted | Pass::NotNeeded => None,
        };
        // A connection that was kept may have been closed meanwhile: that is not the endpoint's failure.
        if let Some(mut sender) = self.sender.take()
            && let Ok(response) = send(&mut sender, (path, &endpoint, pass.clone()), question.clone()).await
        {
            self.sender = Some(sender);
            return Ok(response);
        }
        let mut sender = connect(&endpoint, self.access.tls.as_ref()).await?;
        let response = send(&mut sender, (path, &endpoint, pass), question).await?;
        self.sender = Some(sender);
        Ok(response)
    }
}

/// What an endpoint has said, and when it was asked.
struct Got {
    status: StatusCode,
    bytes: Bytes,
    asked_at: Instant,
}

/// As it is sent; never shown.
fn token(token: &str) -> Result<HeaderValue, EtcdError> {
    let why = || EtcdError::Garbage { path: paths::AUTHENTICATE, why: "it gives no token".into() };
    let mut token = HeaderValue::from_str(token).ok().filter(|token| !token.is_empty()).ok_or_else(why)?;
    token.set_sensitive(true);
    Ok(token)
}

/// Whether etcd does not know the token, or wants one.
fn is_over(status: StatusCode, bytes: &[u8]) -> bool {
    !status.is_success()
        && (status == StatusCode::UNAUTHORIZED
            || TOKEN_IS_OVER.iter().any(|text| message(status, bytes).contains(text)))
}

async fn send(
    sender: &mut SendRequest<Full<Bytes>>,
    (path, endpoint, pass): (&'static str, &Endpoint, Option<HeaderValue>),
    question: Bytes,
) -> Result<Response<Incoming>, String> {
    sender.ready().await.map_err(|error| error.to_string())?;
    let request = Request::builder().method(Method::POST).uri(path).header(HOST, &endpoint.place);
    let request = pass.into_iter().fold(request, |request, pass| request.header(AUTHORIZATION, pass));
    let request = request.header(CONTENT_TYPE, "application/json").body(Full::new(question));
    let request = request.map_err(|error| error.to_string())?;
    sender.send_request(request).await.map_err(|error| error.to_string())
}

async fn connect(endpoint: &Endpoint, tls: Option<&Tls>) -> Result<SendRequest<Full<Bytes>>, String> {
    let stream = TcpStream::connect(&endpoint.place).await.map_err(|error| error.to_string())?;
    let _ = stream.set_nodelay(true);
    // A stream that says nothing for hours must notice that the other side is gone.
    let alive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_AFTER);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&alive);
    match (endpoint.tls, tls) {
        (false, _) => speak(stream).await,
        (true, Some(tls)) => speak(tls.connect(endpoint.host(), stream).await?).await,
        (true, None) => Err("its certificate can't be judged without etcd.ca".to_owned()),
    }
}

async fn speak<S>(stream: S) -> Result<SendRequest<Full<Bytes>>, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // It ends with the connection, which ends when the sender and the body of its last answer are dropped.
    tokio::spawn(connection);
    Ok(sender)
}

fn understand<T: DeserializeOwned>(path: &'static str, status: StatusCode, bytes: &[u8]) -> Result<T, EtcdError> {
    if status.is_success() {
        return serde_json::from_slice(bytes).map_err(|error| EtcdError::Garbage { path, why: error.to_string() });
    }
    Err(EtcdError::Refused { path, message: message(status, bytes) })
}

/// What etcd says of an error.
fn message(status: StatusCode, bytes: &[u8]) -> String {
    // The gateway may put what belongs behind the answer into it: only the first value counts.
    let said = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>().next();
    let said = said.and_then(Result::ok).and_then(|said| said.get("error")?.as_str().map(str::to_owned));
    let plain = || {
        let line = String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().to_owned();
        let says_more = !line.is_empty() && !status.to_string().ends_with(&line);
        if says_more { format!("{status}: {line}") } else { status.to_string() }
    };
    let mut message = said.unwrap_or_else(plain);
    message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_and_a_port_and_nothing_else() {
        for (text, shown) in [
            ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
            ("etcd-1.example:2379", "http://etcd-1.example:2379"),
            ("http://[::1]:2379/", "http://[::1]:2379"),
            ("https://etcd-1.example:2379", "https://etcd-1.example:2379"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), shown);
        }
        for text in ["", "http://", "http://a", "http://a:0", "http://a:99999", "http://a b:1", "http://a:1/path", ":1"]
        {
            assert_eq!(text.parse::<Endpoint>(), Err(BadEndpoint::NoEndpoint(text.into())), "{text}");
        }
        let of = |text: &str| {
            let endpoint = text.parse::<Endpoint>().unwrap();
            (endpoint.host().to_owned(), endpoint.is_tls(), endpoint.is_open())
        };
        assert_eq!(of("https://[::1]:2379"), ("::1".into(), true, false));
        assert_eq!(of("http://[::1]:2379"), ("::1".into(), false, false));
        assert_eq!(of("http://10.0.0.1:2379"), ("10.0.0.1".into(), false, true));
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
        let message = "400 Bad Request: CommonName of client".to_owned();
        let bytes = b"CommonName of client\nand more";
        assert_eq!(refused(StatusCode::BAD_REQUEST, bytes), EtcdError::Refused { path: "/x", message });
        assert!(matches!(refused(StatusCode::OK, b"<html>"), EtcdError::Garbage { path: "/x", .. }));
        let over = |status, text: &str| is_over(status, format!(r#"{{"error":"{text}"}}"#).as_bytes());
        assert!(over(StatusCode::UNAUTHORIZED, "etcdserver: invalid auth token"));
        assert!(over(StatusCode::BAD_REQUEST, "etcdserver: user name is empty"));
        assert!(over(StatusCode::BAD_REQUEST, "etcdserver: revision of auth store is old"));
        assert!(!over(StatusCode::FORBIDDEN, "etcdserver: permission denied"));
        assert!(!over(StatusCode::OK, "etcdserver: invalid auth token"));
        assert!(token("abc.1").unwrap().is_sensitive() && token("").is_err() && token("a\nb").is_err());
        let long = format!(r#"{{"error":"{}"}}"#, "ü".repeat(MESSAGE_BYTES_MAX));
        assert!(refused(StatusCode::BAD_REQUEST, long.as_bytes()).to_string().len() < 300);
    }
}
