//! `kill -9` under load, again and again, on one data folder and changing numbers of cores: every message that was
//! acknowledged is there afterwards, once, at the number it was given, and every sender's messages are in order.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Server, Wire};
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::Seq;
use ringline_schema::message::{BodyKind, ChatReply, Class, Fetch, Mentions, Reply, Request, Send};

const CLIENTS: usize = 8;
/// Sends without an answer per client.
const WINDOW: usize = 16;

/// What one client knows across all crashes.
struct Sender {
    me: String,
    to: String,
    next_client_seq: u64,
    /// Sent and not acknowledged, oldest first: sent again after every crash under the same number.
    unanswered: BTreeMap<u64, String>,
    /// Refused at least once, as a busy machine does: sent again, so others may have come before them.
    refused: BTreeSet<u64>,
    /// client_seq → seq.
    accepted: BTreeMap<u64, Seq>,
}

impl Sender {
    /// Sends as fast as it is answered until the connection breaks or the round is over.
    fn run(&mut self, mut wire: Wire, stop: &AtomicBool) {
        let mut requests = BTreeMap::new();
        let again: Vec<u64> = self.unanswered.keys().copied().collect();
        for client_seq in again {
            if !self.transmit(&mut wire, client_seq, &mut requests) {
                return;
            }
        }
        loop {
            while self.unanswered.len() < WINDOW && !stop.load(Ordering::Relaxed) {
                let client_seq = self.next_client_seq;
                self.next_client_seq += 1;
                self.unanswered.insert(client_seq, format!("{} says {client_seq}", self.me));
                if !self.transmit(&mut wire, client_seq, &mut requests) {
                    return;
                }
            }
            if self.unanswered.is_empty() {
                return;
            }
            let Some(frame) = wire.next() else { return };
            match frame.reply() {
                Reply::SendAck(ack) => {
                    let client_seq: u64 = requests[&frame.header.request_id];
                    self.unanswered.remove(&client_seq);
                    let seq = *self.accepted.entry(client_seq).or_insert(ack.seq);
                    assert_eq!(seq, ack.seq, "a repeat was given another number");
                }
                Reply::Failure { code: ErrorCode::Busy, retry_after_ms, .. } => {
                    let client_seq = requests[&frame.header.request_id];
                    self.refused.insert(client_seq);
                    std::thread::sleep(Duration::from_millis(retry_after_ms.into()));
                    if !self.transmit(&mut wire, client_seq, &mut requests) {
                        return;
                    }
                }
                Reply::Deliver(_) | Reply::Chat(ChatReply::ReceiptUpto { .. }) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    fn transmit(&self, wire: &mut Wire, client_seq: u64, requests: &mut BTreeMap<u32, u64>) -> bool {
        let body = self.unanswered[&client_seq].as_bytes();
        let (to, class, kind) = (self.to.as_str(), Class::Durable, BodyKind::Text);
        let send = Request::Send(Send {
            to,
            class,
            kind,
            client_seq,
            ack_timeout_ms: None,
            body,
            mentions: Mentions::default(),
        });
        let (id, bytes) = wire.encode(&send);
        requests.insert(id, client_seq);
        wire.stream().write_all(&bytes).is_ok()
    }

    /// Reads the whole conversation and holds it against what was acknowledged.
    fn check(&self, server: &Server) -> usize {
        let mut wire = server.login(&self.me, 9);
        let mut log = Vec::new();
        loop {
            let after = Seq(log.len() as u64);
            let fetch = Fetch { with: &self.to, after, before: None, limit: 0, newest: false };
            let page = wire.request(&Request::Fetch(fetch));
            let Reply::FetchOk { messages, head, .. } = page.reply() else { panic!("{:?}", page.reply()) };
            for message in &messages {
                assert_eq!(message.seq.0, log.len() as u64 + 1, "numbers are dense");
                log.push((message.from.to_owned(), String::from_utf8(message.body.to_vec()).unwrap()));
            }
            if messages.is_empty() {
                assert_eq!(head.0, log.len() as u64);
                break;
            }
        }
        let mine = log.iter().filter(|(from, _)| *from == self.me);
        let said = |body: &str| body.strip_prefix(&format!("{} says ", self.me)).unwrap().parse::<u64>().unwrap();
        let mut mine: Vec<u64> = mine.map(|(_, body)| said(body)).collect();
        let in_order = mine.iter().filter(|client_seq| !self.refused.contains(client_seq));
        assert!(in_order.is_sorted(), "{}: in order", self.me);
        mine.sort_unstable();
        assert!(mine.iter().copied().eq(1..self.next_client_seq), "{}: everything once: {mine:?}", self.me);
        for (client_seq, seq) in &self.accepted {
            assert_eq!(log[seq.0 as usize - 1].1, format!("{} says {client_seq}", self.me));
        }
        mine.len()
    }
}

/// One round of load; `end` breaks it off or lets it finish.
fn round(senders: Vec<Sender>, server: &mut Server, end: impl FnOnce(&mut Server)) -> Vec<Sender> {
    let stop = Arc::new(AtomicBool::new(false));
    let wires: Vec<Wire> = senders.iter().map(|sender| server.login(&sender.me, 1)).collect();
    let threads: Vec<_> = (senders.into_iter().zip(wires))
        .map(|(mut sender, wire)| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                sender.run(wire, &stop);
                sender
            })
        })
        .collect();
    end(server);
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().map(|thread| thread.join().expect("a sender failed")).collect()
}

fn pairs() -> Vec<Sender> {
    let sender = |at: usize| Sender {
        me: format!("client-{at}"),
        to: format!("client-{}", at ^ 1),
        next_client_seq: 1,
        unanswered: BTreeMap::new(),
        refused: BTreeSet::new(),
        accepted: BTreeMap::new(),
    };
    (0..CLIENTS).map(sender).collect()
}

#[test]
fn slow_twenty_kills_under_load_lose_and_double_nothing() {
    let mut server = Server::start(&["--cores", "1"]);
    let mut senders = pairs();
    for sender in &senders {
        server.login(&sender.me, 1);
    }
    for kill in 0..20u64 {
        senders = round(senders, &mut server, |server| {
            // Spread over start, group commits, index writes and whatever else is under way.
            std::thread::sleep(Duration::from_millis(20 + kill * 37 % 400));
            server.kill();
        });
        let cores = if kill % 3 == 0 { "2" } else { "1" };
        server.restart(Some(&["--cores", cores, "--set", "store.segment_bytes=4194304"]));
    }
    senders = round(senders, &mut server, |_| std::thread::sleep(Duration::from_millis(200)));
    let total: usize = senders.iter().map(|sender| sender.check(&server)).sum();
    println!("{total} messages over 20 kills");
    assert!(total > 20 * CLIENTS, "there was load: {total}");
    assert_eq!(server.stop(), Some(0));
    server.restart(None);
    assert_eq!(senders.iter().map(|sender| sender.check(&server)).sum::<usize>(), total, "after an orderly stop too");
}

#[test]
fn another_number_of_cores_reads_the_same_data() {
    let mut server = Server::start(&["--cores", "2"]);
    let mut senders = pairs();
    for cores in ["1", "2", "1"] {
        senders = round(senders, &mut server, |_| std::thread::sleep(Duration::from_millis(100)));
        assert_eq!(server.stop(), Some(0));
        server.restart(Some(&["--cores", cores]));
        let total: usize = senders.iter().map(|sender| sender.check(&server)).sum();
        assert!(total > 0);
    }
}
