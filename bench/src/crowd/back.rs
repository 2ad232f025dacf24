//! Scenario sync: devices are away while others write to their users, then come back and ask for what they missed.
//!
//! Main thread. Each device is sent everything by one writer, so its messages are one conversation, rising without a hole.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use ringline_schema::codec::Codec;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::message::chat::Sync;
use ringline_schema::message::{
    Ack, BodyKind, ChatReply, ChatRequest, Class, Mentions, Place, Places, Reply, Request, Send,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::Crowd;
use super::line::{Line, SharedDesk, Who, desk, failed};
use super::party::IN_FLIGHT;
use super::report::{BackReport, CrowdReport};
use super::seat::{PAGE_ROWS, Sums};
use crate::Failure;
use crate::cli::RunArgs;
use crate::facts::Machine;
use crate::report::Latency;
use crate::run::{FILES_EXTRA, raise_file_limit};
use crate::server_process;
use crate::sources::Sources;
use crate::stamp::Stamp;
use crate::tally;
use crate::token::Issuer;

/// Unanswered sends of a writer.
const WINDOW: usize = 32;

/// What all clients of the run need.
struct Stage {
    sources: Sources,
    names: Vec<String>,
    tokens: Vec<String>,
    desk: SharedDesk,
    run: u64,
    payload_bytes: usize,
    missed: u32,
}

impl Stage {
    async fn login(&self, client: u32) -> Result<Line, Failure> {
        let text = |texts: &[String]| texts.get(client as usize).cloned().unwrap_or_default();
        let (name, token) = (text(&self.names), text(&self.tokens));
        Line::login(&self.sources, Who { number: client, name: &name, token: &token }, &self.desk).await
    }

    /// Sends each of these devices all that it is to miss.
    async fn fill(&self, writer: u32, to: Vec<u32>) -> Result<(), Failure> {
        let mut line = self.login(writer).await?;
        let items = to.into_iter().flat_map(|to| (0..self.missed).map(move |_| to));
        let mut todo: VecDeque<(u32, u32)> = (0..).zip(items).collect();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let base = u64::try_from(now.as_micros()).unwrap_or(1);
        let (mut open, mut refused) = (HashMap::new(), None);
        while !todo.is_empty() || !open.is_empty() {
            let (mut bytes, mut body) = (Vec::new(), Vec::new());
            while open.len() < WINDOW
                && let Some((number, to)) = todo.pop_front()
            {
                let stamp = Stamp { run: self.run, sender: writer, number, intended_ns: 0 };
                stamp.write(self.payload_bytes, &mut body);
                let send = Send {
                    to: self.names.get(to as usize).map_or("", String::as_str),
                    class: Class::Durable,
                    kind: BodyKind::Custom,
                    client_seq: base + u64::from(number),
                    ack_timeout_ms: None,
                    body: &body,
                    mentions: Mentions::default(),
                };
                let encoder = &mut self.desk.borrow_mut().encoder;
                encoder.request(Codec::FlatBuffers, number + 1, &Request::Send(send), &mut bytes);
                open.insert(number, to);
            }
            line.write(&bytes).await.map_err(|error| failed("a writer", &error))?;
            line.socket.readable().await.map_err(|error| failed("a writer", &error))?;
            let answered = line.receive(|id, reply| {
                let number = id.wrapping_sub(1);
                match reply {
                    Reply::SendAck(_) => drop(open.remove(&number)),
                    Reply::Failure { code: ErrorCode::Busy | ErrorCode::RateLimited, .. } => {
                        todo.extend(open.remove(&number).map(|to| (number, to)));
                    }
                    Reply::Failure { code, .. } => refused = Some(*code),
                    _ => {}
                }
            });
            answered.map_err(|error| failed("a writer", &error))?;
            if let Some(code) = refused {
                return Err(failed("a writer", &code));
            }
        }
        Ok(())
    }

    /// A device comes back and reads all it missed.
    async fn back(&self, client: u32) -> Result<Back, Failure> {
        let mut line = self.login(client).await?;
        let (began, mut from, mut back) = (Instant::now(), Place::default(), Back::default());
        loop {
            let asked = Instant::now();
            let sync = Sync { places: Places::default(), from, limit: PAGE_ROWS };
            let page = line.ask(&Request::Chat(ChatRequest::Sync(sync)), |reply| self.page(reply)).await?;
            let (messages, next) = page.map_err(|code| failed("SYNC", &code))?;
            back.pages_us.push(micros(asked));
            back.messages.extend(messages);
            from = next;
            if from == Place::default() {
                break;
            }
        }
        back.took_us = micros(began);
        if let Some(&(conversation, seq, _)) = back.messages.last() {
            let mut bytes = Vec::new();
            let ack = Request::Ack(Ack::Upto { conversation, seq });
            self.desk.borrow_mut().encoder.request(Codec::FlatBuffers, 0, &ack, &mut bytes);
            line.write(&bytes).await.map_err(|error| failed("ACK", &error))?;
        }
        Ok(back)
    }

    fn page(&self, reply: &Reply<'_>) -> Option<(Vec<Got>, Place)> {
        let Reply::Chat(ChatReply::SyncOk { messages, next }) = reply else { return None };
        let got = messages.iter().map(|message| {
            let ours = Stamp::read(message.body, self.run).is_ok();
            (message.conversation, message.seq, ours)
        });
        Some((got.collect(), *next))
    }
}

/// Where a message was, and whether it is of this run and whole.
type Got = (ConversationId, Seq, bool);

#[derive(Default)]
struct Back {
    messages: Vec<Got>,
    pages_us: Vec<u64>,
    took_us: u64,
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX).max(1)
}

/// Adds what one device got to what all got.
fn judge(back: &Back, missed: u32, sums: &mut Sums) -> u64 {
    let ours = back.messages.iter().filter(|(_, _, ours)| *ours).count() as u64;
    let line = sums.line(super::Op::Direct);
    line.expected_ever += u64::from(missed);
    line.delivered_ever += ours.min(u64::from(missed));
    for pair in back.messages.windows(2) {
        if let [(one, before, _), (other, after, _)] = pair
            && one == other
        {
            sums.repeated += u64::from(after <= before);
            sums.holes += u64::from(after.0 > before.0 + 1);
        }
    }
    ours
}

/// So many at once, on this thread. The first error ends it.
async fn each<T: 'static, F: Future<Output = Result<T, Failure>> + 'static>(
    tasks: impl Iterator<Item = F>,
    at_once: usize,
) -> Result<Vec<T>, Failure> {
    let (mut set, room) = (JoinSet::new(), Arc::new(Semaphore::new(at_once)));
    for task in tasks {
        let room = Arc::clone(&room);
        set.spawn_local(async move {
            let _room = room.acquire_owned().await.map_err(|error| failed("a client", &error))?;
            task.await
        });
    }
    let mut done = Vec::new();
    while let Some(joined) = set.join_next().await {
        done.push(joined.map_err(|error| failed("a client ended", &error))??);
    }
    Ok(done)
}

/// See the module.
pub async fn run(args: &RunArgs, machine: Machine) -> Result<CrowdReport, Failure> {
    let (devices, writers, missed) = (args.clients, args.crowd.senders, args.crowd.missed);
    let at_once = args.pace.window.map_or(IN_FLIGHT, |window| window as usize);
    raise_file_limit(u64::from(devices.min(at_once as u32)) + u64::from(writers) + FILES_EXTRA)?;
    let names = args.fleet.names(devices + writers)?;
    let tokens = Issuer::load(&args.fleet.issuer_key())?.tokens(&names)?;
    let (sources, payload_bytes) = (Sources::to(args.fleet.target()), args.payload as usize);
    let stage = Rc::new(Stage { sources, names, tokens, desk: desk(), run: rand::random(), payload_bytes, missed });
    let users = (0..devices).map(|client| {
        let stage = Rc::clone(&stage);
        async move { stage.login(client).await.map(|_| ()) }
    });
    each(users, IN_FLIGHT).await?;
    let filling = (0..writers).map(|writer| {
        let stage = Rc::clone(&stage);
        let to = (0..devices).filter(|device| device % writers == writer).collect();
        async move { stage.fill(devices + writer, to).await }
    });
    each(filling, IN_FLIGHT).await?;

    let server = args.fleet.server();
    let cpu_s = || server.and_then(server_process::sample).map(|sample| sample.cpu_s);
    let (before, began) = (cpu_s(), Instant::now());
    let coming = (0..devices).map(|client| {
        let stage = Rc::clone(&stage);
        async move { stage.back(client).await }
    });
    let backs = each(coming, at_once).await?;
    let (seconds, after) = (began.elapsed().as_secs_f64(), cpu_s());
    let (mut sums, mut device_us, mut page_us) = (Sums::default(), tally::histogram(), tally::histogram());
    let (mut messages, mut pages) = (0, 0);
    for back in &backs {
        messages += judge(back, missed, &mut sums);
        pages += back.pages_us.len() as u64;
        device_us.saturating_record(back.took_us);
        back.pages_us.iter().for_each(|us| page_us.saturating_record(*us));
    }
    let what =
        format!("{devices} devices come back to {missed} messages each, {at_once} at once, pages of {PAGE_ROWS}");
    let mut report = CrowdReport::new((Crowd::Sync.name(), what), &sums, seconds, machine);
    (report.ops, report.payload_bytes) = (Vec::new(), payload_bytes);
    report.server_cpu_s = before.zip(after).map(|(before, after)| after - before);
    report.back = Some(BackReport {
        devices,
        missed_each: missed,
        messages,
        pages,
        seconds,
        messages_per_s: messages as f64 / seconds.max(f64::MIN_POSITIVE),
        device_us: Latency::of(&device_us),
        page_us: Latency::of(&page_us),
    });
    Ok(report)
}
