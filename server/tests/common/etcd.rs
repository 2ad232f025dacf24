//! An etcd of one's own for tests: one server on loopback in a temporary folder, gone with its handle. It ends with the
//! thread that started it.
//!
//! Needs the Debian package `etcd-server`.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::PATIENCE;

/// A server that runs, or was stopped and can be started again.
pub struct Etcd {
    folder: tempfile::TempDir,
    child: Option<Child>,
    client_port: u16,
    peer_port: u16,
    /// The port with TLS, and what the server is told of its certificates.
    secure: Option<(u16, Vec<String>)>,
}

impl Etcd {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// With a second port for clients, with TLS; `files`: what the server is told of its certificates.
    pub fn start_secure(files: &[&str]) -> Self {
        Self::start_with(Some((free_port(), files.iter().map(|text| text.to_string()).collect())))
    }

    fn start_with(secure: Option<(u16, Vec<String>)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut etcd = Self { folder, child: None, client_port: free_port(), peer_port: free_port(), secure };
        etcd.begin();
        etcd
    }

    /// Where clients connect with TLS.
    pub fn secure_endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.secure.as_ref().expect("a port with TLS").0)
    }

    /// Where clients connect.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Starts the server again after [`Etcd::stop`] or [`Etcd::kill`], and waits until it answers.
    pub fn begin(&mut self) {
        let (client, peer) = (self.endpoint(), format!("http://127.0.0.1:{}", self.peer_port));
        let log = File::options().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let mut server = Command::new("setpriv");
        server.args(["--pdeathsig", "KILL", "--", "etcd", "--name", "test", "--data-dir"]);
        server.arg(self.folder.path().join("data"));
        // Elections as fast as they may be: nobody else votes.
        server.args(["--heartbeat-interval", "10", "--election-timeout", "100"]);
        let urls = match &self.secure {
            Some((_, files)) => {
                server.args(files);
                format!("{client},{}", self.secure_endpoint())
            }
            None => client.clone(),
        };
        server.args(["--listen-client-urls", &urls, "--advertise-client-urls", &client]);
        server.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        server.args(["--initial-cluster", &format!("test={peer}")]);
        self.child = Some(server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        // One that has users says first that nobody is logged in.
        let answers = |answer: String| answer.contains("revision") || answer.contains("user name is empty");
        while !self.ask("/v3/kv/range", r#"{"key":"YQ=="}"#).is_some_and(answers) {
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap();
            assert!(Instant::now() < deadline, "{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn stop(&mut self) {
        self.signal("TERM");
        self.child.take().unwrap().wait().unwrap();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends a signal by name, like `STOP`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Posts this, and gives all that comes back; `None`: nobody answers.
    pub fn ask(&self, path: &str, json: &str) -> Option<String> {
        post(&format!("127.0.0.1:{}", self.client_port), path, json)
    }
}

/// Posts this to a server, and gives all that comes back; `None`: nobody answers.
pub fn post(address: &str, path: &str, json: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = json.len();
    write!(stream, "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Length: {length}\r\n\r\n{json}").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One that nobody has now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
