//! The servers of one etcd, each at an address of its own, that are killed and started one by one or all. They end with the
//! thread that started them. Invariant: a server that is killed keeps its folder, so it comes back as the same member.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::common::etcd::post;
use super::world::{PATIENCE, Place};

/// A member whose leader has sent nothing for this long calls an election; long, as a machine under test stalls.
const ELECTION_MS: &str = "1000";
const HEARTBEAT_MS: &str = "100";

/// One server.
struct Member {
    place: Place,
    child: Option<Child>,
}

/// See the module.
pub struct Ensemble {
    members: Vec<Member>,
    folder: tempfile::TempDir,
}

impl Ensemble {
    /// Starts one at each place and waits until they answer.
    pub fn start(places: Vec<Place>) -> Self {
        let members = places.into_iter().map(|place| Member { place, child: None }).collect();
        let mut ensemble = Self { members, folder: tempfile::tempdir().unwrap() };
        ensemble.begin_all();
        ensemble
    }

    /// For `etcd.endpoints`.
    pub fn endpoints(&self) -> String {
        let all: Vec<_> = self.members.iter().map(|member| url(&member.place, CLIENT_PORT)).collect();
        all.join(",")
    }

    fn log(&self, at: usize) -> PathBuf {
        self.folder.path().join(format!("log{at}"))
    }

    /// Starts those that do not run, and waits until all answer.
    pub fn begin_all(&mut self) {
        let all = (0..self.members.len()).map(|at| format!("e{at}={}", url(&self.members[at].place, PEER_PORT)));
        let cluster = all.collect::<Vec<_>>().join(",");
        for at in 0..self.members.len() {
            if self.members[at].child.is_none() {
                self.begin(at, &cluster);
            }
        }
        let deadline = Instant::now() + PATIENCE;
        for at in 0..self.members.len() {
            while self.ask(at, "/v3/kv/range", r#"{"key":"YQ=="}"#).is_none() {
                let log = || std::fs::read_to_string(self.log(at)).unwrap_or_default();
                assert!(Instant::now() < deadline, "etcd {at} does not answer:\n{}", log());
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn begin(&mut self, at: usize, cluster: &str) {
        let log = File::options().create(true).append(true).open(self.log(at)).unwrap();
        let place = &self.members[at].place;
        let (client, peer) = (url(place, CLIENT_PORT), url(place, PEER_PORT));
        let mut server = Command::new("setpriv");
        server.args(["--pdeathsig", "KILL", "--", "etcd", "--name", &format!("e{at}"), "--data-dir"]);
        server.arg(self.folder.path().join(format!("data{at}")));
        server.args(["--heartbeat-interval", HEARTBEAT_MS, "--election-timeout", ELECTION_MS]);
        server.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        server.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        server.args(["--initial-cluster", cluster]);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = place.within(|| server.spawn().unwrap());
        self.members[at].child = Some(child);
    }

    /// `kill -9`.
    pub fn kill(&mut self, at: usize) {
        let mut child = self.members[at].child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn kill_all(&mut self) {
        (0..self.members.len()).for_each(|at| self.kill(at));
    }

    /// Who leads now; waits until somebody does.
    pub fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = (0..self.members.len()).find(|at| self.leads(*at)) {
                return at;
            }
            assert!(Instant::now() < deadline, "nobody leads etcd");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn leads(&self, at: usize) -> bool {
        let Some(status) = self.ask(at, "/v3/maintenance/status", "{}") else { return false };
        status["leader"].is_string() && status["leader"] == status["header"]["member_id"]
    }

    /// The JSON that a member answers; `None`: it does not, or it has no majority to ask.
    fn ask(&self, at: usize, path: &str, json: &str) -> Option<Value> {
        let answer = post(&format!("{}:{CLIENT_PORT}", self.members[at].place.host), path, json)?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        let body: Value = serde_json::from_str(body).ok()?;
        body["header"].is_object().then_some(body)
    }
}

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

fn url(place: &Place, port: u16) -> String {
    format!("http://{}:{port}", place.host)
}

impl Drop for Ensemble {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
