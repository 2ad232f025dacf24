//! What the tests over real sockets share: a server process in a folder of its own, and a small blocking wire client.
//!
//! `TEST_NET_KIND=epoll` (or `ring`) runs them over that net instead of the one that `auto` picks.
//!
//! Every wait is bounded by [`PATIENCE`], which no healthy run comes near; nothing here measures time.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod etcd;
pub mod moving;
pub mod net;
pub mod nodes;
pub mod sdk;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use ringline_schema::codec::{Codec, Encoder, decode_reply};
use ringline_schema::frame::{FrameDecoder, Header};
use ringline_schema::ids::DeviceId;
use ringline_schema::limits::FRAME_BYTES_CEILING;
use ringline_schema::message::DeviceKind;
use ringline_schema::message::{Credential, Login, Reply, Request, Secret};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The binary under test, without the variables of the shell that runs the tests.
pub fn ringline() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringline"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("RINGLINE_")) {
        command.env_remove(name);
    }
    command
}

/// Runs a command of the binary to its end.
pub fn run(arguments: &[&str]) -> Output {
    ringline().args(arguments).output().unwrap()
}

/// The standard error of a run that must fail: its exit code and its lines.
pub fn complaint(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    (output.status.code().expect("an exit code"), String::from_utf8(output.stderr).unwrap())
}

/// Ports that nobody has now. They are let go before they are used: another process would have to take just these.
pub fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// Status, head and body of one HTTP request on a connection of its own.
pub fn http(address: &str, method: &str, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

/// The sum of a metric over all its label sets. `None`: it is not there.
pub fn sum(page: &str, name: &str) -> Option<u64> {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let labels_end = if rest.starts_with('{') { rest.find('}')? + 1 } else { 0 };
        rest.get(labels_end..)?.strip_prefix(' ')?.parse::<u64>().ok()
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0) + value))
}

/// A running server. Killed when dropped, together with its folder.
pub struct Server {
    child: Child,
    pub address: String,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    lines: Receiver<String>,
    /// Lines of the log that were read so far.
    pub log: Vec<String>,
}

impl Server {
    /// Starts a server on a free port with a data folder of its own and these further arguments of `serve`.
    pub fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let arguments: Vec<String> = arguments.iter().map(|text| text.to_string()).collect();
        let (child, lines) = spawn(&folder.path().join("data"), &arguments);
        let mut server = Self { child, address: String::new(), folder, arguments, lines, log: Vec::new() };
        server.wait_until_ready();
        server
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_until_ready(&mut self) {
        let line = self.wait_for_line("ready on ");
        let after = line.split("ready on ").nth(1).unwrap();
        self.address = after.split_whitespace().next().unwrap().to_owned();
    }

    /// The next line of the log that holds `text`.
    pub fn wait_for_line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.log.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no line with {text:?}:\n{}\n{}", self.log.join("\n"), threads_of(self.pid()))
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the server ended without a line with {text:?}:\n{}", self.log.join("\n"))
                }
            }
        }
    }

    /// Sends a signal by name, like `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end. `None`: a signal killed it.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.log.extend(self.lines.iter());
                return status.code();
            }
            if Instant::now() >= deadline {
                panic!("the server does not end:\n{}\n{}", self.log.join("\n"), threads_of(self.pid()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks for an orderly stop and waits for it.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal("TERM");
        self.wait()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts anew on the same folder, on another free port, with other arguments if given.
    pub fn restart(&mut self, arguments: Option<&[&str]>) {
        if let Some(arguments) = arguments {
            self.arguments = arguments.iter().map(|text| text.to_string()).collect();
        }
        self.begin_again();
        self.wait_until_ready();
    }

    /// The same without the wait until it serves.
    pub fn begin_again(&mut self) {
        (self.child, self.lines) = spawn(&self.data_dir(), &self.arguments);
        self.log.clear();
    }

    pub fn connect(&self) -> Wire {
        Wire::connect(&self.address)
    }

    /// A token of the server's own issuer.
    pub fn token(&self, user: &str) -> String {
        let folder = self.data_dir();
        let output = run(&["token", "--user", user, "--data-dir", folder.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// A connection logged in by token.
    pub fn login(&self, user: &str, device: u64) -> Wire {
        let mut wire = self.connect();
        wire.login_by_token(user, &self.token(user), device);
        wire
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What each thread of a process is doing, for the message of a failure. The kernel's stack needs privileges.
pub fn threads_of(pid: u32) -> String {
    let mut text = String::new();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for task in tasks.map(|entry| entry.path()) {
        let read = |name: &str| {
            let content = std::fs::read_to_string(task.join(name));
            content.unwrap_or_else(|error| format!("({error})")).trim_end().to_owned()
        };
        let status = read("status");
        let wanted = ["State", "Cpus_allowed_list", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"];
        let status: Vec<_> =
            status.lines().filter(|line| wanted.iter().any(|key| line.split(':').next() == Some(key))).collect();
        let (comm, wchan, stack) = (read("comm"), read("wchan"), read("stack"));
        text += &format!("thread {comm}: {}; waits in {wchan}\n{stack}\n", status.join(", "));
    }
    text
}

fn spawn(data_dir: &Path, arguments: &[String]) -> (Child, Receiver<String>) {
    let mut child = ringline()
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir", data_dir.to_str().unwrap()])
        .args(std::env::var("TEST_NET_KIND").iter().flat_map(|kind| ["--set".to_owned(), format!("net.kind={kind}")]))
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            // A test that no longer listens must not stop the server at a full pipe.
            let _ = sender.send(line);
        }
    });
    (child, lines)
}

/// One frame from the server, kept whole so that its reply can borrow from it.
#[derive(Clone, Debug)]
pub struct Received {
    pub header: Header,
    body: Vec<u8>,
}

impl Received {
    pub fn reply(&self) -> Reply<'_> {
        decode_reply(&self.header, &self.body).expect("the server's frames decode")
    }
}

/// A blocking client: no keep-alive, no retries, exactly the bytes it is told.
pub struct Wire {
    stream: TcpStream,
    encoder: Encoder,
    decoder: FrameDecoder,
    unread: Vec<u8>,
    next_id: u32,
    /// Frames that came while another was waited for.
    waiting: Vec<Received>,
}

impl Wire {
    pub fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let (encoder, decoder) = (Encoder::new(), FrameDecoder::new());
        Self { stream, encoder, decoder, unread: Vec::new(), next_id: 0, waiting: Vec::new() }
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The bytes of a request and its id, not sent.
    pub fn encode(&mut self, request: &Request<'_>) -> (u32, Vec<u8>) {
        self.next_id += 1;
        let mut bytes = Vec::new();
        self.encoder.request(Codec::default(), self.next_id, request, &mut bytes);
        (self.next_id, bytes)
    }

    /// Sends a request without waiting. Returns its id.
    pub fn send(&mut self, request: &Request<'_>) -> u32 {
        let (id, bytes) = self.encode(request);
        self.send_raw(&bytes);
        id
    }

    /// Sends a request and waits for its answer; pushes that come before are kept.
    pub fn request(&mut self, request: &Request<'_>) -> Received {
        let id = self.send(request);
        self.answer(id)
    }

    /// The answer to a request that was sent.
    pub fn answer(&mut self, id: u32) -> Received {
        self.next_where(|frame| frame.header.request_id == id)
    }

    /// The next push, or a failure that answers no request.
    pub fn push(&mut self) -> Received {
        self.next_where(|frame| frame.header.request_id == 0)
    }

    pub fn login_by_token(&mut self, user: &str, token: &str, device: u64) {
        let login = Login {
            user,
            credential: Credential::Token(Secret(token)),
            device: DeviceId(device),
            device_kind: DeviceKind::Desktop,
            agent: "test",
        };
        let answer = self.request(&Request::Login(login));
        assert!(matches!(answer.reply(), Reply::LoginOk(_)), "{:?}", answer.reply());
    }

    fn next_where(&mut self, wanted: impl Fn(&Received) -> bool) -> Received {
        if let Some(at) = self.waiting.iter().position(&wanted) {
            return self.waiting.remove(at);
        }
        loop {
            let frame = self.read_frame().expect("the server ended the connection");
            if wanted(&frame) {
                return frame;
            }
            self.waiting.push(frame);
        }
    }

    /// The next frame in order of arrival. `None`: the stream has ended.
    pub fn next(&mut self) -> Option<Received> {
        if self.waiting.is_empty() { self.read_frame() } else { Some(self.waiting.remove(0)) }
    }

    fn read_frame(&mut self) -> Option<Received> {
        loop {
            let unread = std::mem::take(&mut self.unread);
            let mut input = &unread[..];
            let frame = self.decoder.next(&mut input, FRAME_BYTES_CEILING).expect("the server's stream decodes");
            if let Some(frame) = frame {
                let received = Received { header: frame.header, body: frame.body.to_vec() };
                self.unread = input.to_vec();
                return Some(received);
            }
            let mut buffer = vec![0; 64 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.unread = buffer[..count].to_vec(),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("reading from the server: {error}"),
            }
        }
    }

    /// Whether the stream ends without a further frame.
    pub fn is_ended(&mut self) -> bool {
        self.next().is_none()
    }

    /// Ends this side's stream and goes on reading.
    pub fn finish(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Write).unwrap();
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}
