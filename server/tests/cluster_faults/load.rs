//! SDK clients that write all the time, what each of them was told, and the judgement at the end. The clients live on one thread
//! of their own; the test's thread reads the board.
//!
//! A sender writes one durable message after the other, each tried for [`TRY`]. What it is told is entered in the ledger, and at
//! the end the logs of all conversations are read:
//! - what was accepted is there once, at the number that was told;
//! - what was refused is not there; of what ended unknown there is at most one;
//! - nothing else is there, and numbers are dense;
//! - every device has received what others wrote, in that order, without gap or repeat.
//!
//! An outage of a sender is the time from its first attempt after a message was accepted until the next is. It holds whatever the
//! SDK does meanwhile: waiting for answers, looking for the user's new node, pausing between attempts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringline_client::{Client, DeviceId, Event, Events, HistoryRange, Message, SendError, SendOptions, Seq};
use ringline_cluster::placement::{ClusterPlacement, CorePlacement};
use ringline_schema::ids::{ConversationId, UserName};

use super::world::{PATIENCE, World, name};

/// How long a message is tried before the next.
const TRY: Duration = Duration::from_secs(1);
/// Between two messages of a sender.
const PACE: Duration = Duration::from_millis(100);
/// One attempt to log in for the first time.
const LOG_IN: Duration = Duration::from_secs(10);

/// Who writes to whom, and which nodes that hangs on while all are there.
#[derive(Clone, Debug)]
struct Pair {
    from: usize,
    to: usize,
    /// Where the writer lives.
    home: usize,
    /// Where the other one lives. One of the two nodes owns what they say to each other.
    there: usize,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Accepted(Seq),
    Refused,
    Unknown,
}

/// What one sender has written and seen.
#[derive(Default)]
struct Sender {
    ledger: Vec<(String, Fate)>,
    /// When it began to try, unless the last was accepted.
    since: Option<Instant>,
    /// When the last began that was accepted.
    accepted: Option<Instant>,
    /// Since the last row.
    count: u64,
    longest: Duration,
    told: BTreeMap<String, u64>,
}

#[derive(Default)]
struct Board {
    senders: Vec<Sender>,
    /// Numbers and texts by receiver and writer.
    read: BTreeMap<(usize, usize), Vec<(Seq, String)>>,
    /// What must not happen to a stream.
    skipped: Vec<String>,
}

/// How far a sender is from what happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// Lives on the node.
    Its,
    /// Lives elsewhere, and writes to one of those: half of them into what the node owns, all about a user that it knows.
    Theirs,
    Other,
}

impl Distance {
    pub fn name(self) -> &'static str {
        match self {
            Self::Its => "its users",
            Self::Theirs => "who write to them",
            Self::Other => "all others",
        }
    }
}

/// See the module.
pub struct Load {
    cast: Arc<Cast>,
    board: Arc<Mutex<Board>>,
    going: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Who plays.
struct Cast {
    addresses: String,
    users: Vec<(String, String)>,
    pairs: Vec<Pair>,
}

impl Cast {
    /// Rings of users, one on each node: each writes to the next, where the next one's node owns what they say, and back.
    fn new(world: &World, rings: usize) -> Self {
        let nodes = world.size();
        let weights: Vec<_> = (0..nodes).map(|at| (name(at), 1)).collect();
        let placement = ClusterPlacement::new(&weights[0].0, CorePlacement::new(1).unwrap(), &weights).unwrap();
        let user = |text: &str| UserName::new(text).unwrap();
        let home = |text: &str| usize::from(placement.node_of(user(text).partition()).0);
        let owner = |one: &str, other: &str| {
            usize::from(placement.node_of(ConversationId::direct(&user(one), &user(other)).partition()).0)
        };
        let (mut names, mut pairs) = (Vec::<String>::new(), Vec::new());
        for ring in 0..rings {
            let first = names.len();
            for at in 0..nodes {
                let fits = |text: &String| {
                    let after = at == 0 || owner(&names[first + at - 1], text) == at;
                    home(text) == at && after && (at + 1 < nodes || owner(text, &names[first]) == 0)
                };
                let found = (0..).map(|number| format!("user{ring}x{number}")).find(fits).unwrap();
                names.push(found);
            }
            for at in 0..nodes {
                let (one, next) = (first + at, first + (at + 1) % nodes);
                let there = (at + 1) % nodes;
                pairs.push(Pair { from: one, to: next, home: at, there });
                pairs.push(Pair { from: next, to: one, home: there, there: at });
            }
        }
        let users = names.into_iter().map(|name| (name.clone(), world.token(&name))).collect();
        Self { addresses: world.addresses(), users, pairs }
    }

    fn name(&self, user: usize) -> &str {
        &self.users[user].0
    }
}

impl Load {
    /// Logs all in and lets them write. Returns when each has had a message accepted.
    pub fn start(world: &mut World, rings: usize) -> Self {
        let cast = Arc::new(Cast::new(world, rings));
        let (board, going) = (Arc::new(Mutex::new(Board::default())), Arc::new(AtomicBool::new(true)));
        board.lock().unwrap().senders.resize_with(cast.pairs.len(), Sender::default);
        let thread = {
            let (cast, board, going) = (cast.clone(), board.clone(), going.clone());
            std::thread::spawn(move || super::common::sdk::run(play(cast, board, going)))
        };
        let mut load = Self { cast, board, going, thread: Some(thread) };
        load.until_served(world);
        load.board().senders.iter_mut().for_each(Sender::begin_row);
        load
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().expect("the clients have not failed")
    }

    /// Waits until every sender has a message accepted that it began to send after this was called. How long that took.
    pub fn until_served(&mut self, world: &mut World) -> Duration {
        let began = Instant::now();
        world.until("all clients to be served", |_| {
            assert!(!self.thread.as_ref().is_some_and(JoinHandle::is_finished), "the clients have failed");
            self.board().senders.iter().all(|sender| sender.accepted.is_some_and(|at| at >= began))
        })
    }

    /// Prints what was seen since the last row. `node`: the one that it happened to.
    pub fn row(&self, case: &str, node: Option<usize>, note: &str) -> BTreeMap<Distance, Vec<Duration>> {
        let now = Instant::now();
        let (mut outages, mut told, mut count) = (BTreeMap::<_, Vec<(Duration, bool)>>::new(), BTreeMap::new(), 0);
        let mut board = self.board();
        for (pair, sender) in self.cast.pairs.iter().zip(&mut board.senders) {
            let distance = match node {
                Some(node) if pair.home == node => Distance::Its,
                Some(node) if pair.there == node => Distance::Theirs,
                _ => Distance::Other,
            };
            // A wait that is as short as every message's is not yet one for a row.
            let waits = sender.since.map(|since| now - since).filter(|waits| *waits > sender.longest.max(TRY));
            outages.entry(distance).or_default().push((waits.unwrap_or(sender.longest), waits.is_some()));
            sender.told.iter().for_each(|(why, times)| *told.entry(why.clone()).or_insert(0) += times);
            count += sender.count;
            sender.begin_row();
        }
        drop(board);
        let told: Vec<_> = told.into_iter().map(|(why, times)| format!("{times} {why}")).collect();
        let told = if told.is_empty() { "nothing".to_owned() } else { told.join(", ") };
        let cell = |distance| outages.get(&distance).map_or("–".to_owned(), |seen| cell(seen));
        let [its, theirs, other] = [Distance::Its, Distance::Theirs, Distance::Other].map(cell);
        println!("| {case} | {count} | {its} | {theirs} | {other} | {told} | {note} |");
        let lengths = |seen: Vec<(Duration, bool)>| seen.into_iter().map(|(length, _)| length).collect();
        outages.into_iter().map(|(distance, seen)| (distance, lengths(seen))).collect()
    }

    /// Ends it, and judges. Returns when all has been read.
    pub fn finish(mut self, world: &mut World) {
        self.going.store(false, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        world.until("the judgement", |_| thread.is_finished());
        thread.join().unwrap_or_else(|why| std::panic::resume_unwind(why));
        let board = self.board();
        let (mut accepted, mut refused, mut unknown) = (0, 0, 0);
        for (_, fate) in board.senders.iter().flat_map(|sender| &sender.ledger) {
            match fate {
                Fate::Accepted(_) => accepted += 1,
                Fate::Refused => refused += 1,
                Fate::Unknown => unknown += 1,
            }
        }
        println!("judged: {accepted} accepted and there once, {refused} refused and not there, {unknown} unknown");
    }
}

/// Median and longest of outages; `>`: one that still goes on.
fn cell(seen: &[(Duration, bool)]) -> String {
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    let text =
        |(length, goes_on): (Duration, bool)| format!("{}{:.1}", if goes_on { ">" } else { "" }, length.as_secs_f64());
    let last = seen[seen.len() - 1];
    if last.0 < TRY && !last.1 {
        "none".to_owned()
    } else {
        format!("{} / {} s", text(seen[seen.len() / 2]), text(last))
    }
}

/// The head of the table that [`Load::row`] fills.
pub fn table(title: &str) {
    println!("\n{title}; outages: median / longest of the senders");
    println!("| case | accepted | its users | who write to them | all others | told | |");
    println!("|---|--:|--:|--:|--:|---|---|");
}

impl Sender {
    /// One that waits goes on waiting.
    fn begin_row(&mut self) {
        (self.count, self.longest) = (0, Duration::ZERO);
        self.told.clear();
    }

    fn note(&mut self, began: Instant, text: String, outcome: Result<Seq, SendError>) {
        let fate = match outcome {
            Ok(seq) => {
                let waited = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
                self.longest = self.longest.max(waited);
                self.accepted = Some(began);
                self.count += 1;
                Fate::Accepted(seq)
            }
            Err(error) => {
                let (why, fate) = match error {
                    SendError::Refused { code, .. } => (code.name().to_owned(), Fate::Refused),
                    SendError::NotSent => ("not sent".to_owned(), Fate::Refused),
                    SendError::Unknown => ("UNKNOWN".to_owned(), Fate::Unknown),
                    other => panic!("{text}: {other}"),
                };
                *self.told.entry(why).or_default() += 1;
                fate
            }
        };
        self.ledger.push((text, fate));
    }
}

/// The clients' thread.
async fn play(cast: Arc<Cast>, board: Arc<Mutex<Board>>, going: Arc<AtomicBool>) {
    let mut clients = Vec::new();
    for user in 0..cast.users.len() {
        let (client, events) = log_in(&cast, user).await;
        tokio::spawn(read((cast.clone(), user), events, board.clone()));
        clients.push(client);
    }
    let senders: Vec<_> = (0..cast.pairs.len())
        .map(|at| tokio::spawn(send((cast.clone(), at), clients.clone(), board.clone(), going.clone())))
        .collect();
    for sender in senders {
        sender.await.unwrap();
    }
    for at in (0..cast.pairs.len()).step_by(2) {
        judge(&cast, at, &clients, &board).await;
    }
    assert_eq!(board.lock().unwrap().skipped, Vec::<String>::new());
    for client in clients {
        client.close(TRY).await;
    }
}

async fn log_in(cast: &Cast, user: usize) -> (Client, Events) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (name, token) = cast.users[user].clone();
        let builder = Client::builder(&cast.addresses).user(&name).device(DeviceId(1));
        let builder = builder.token(move || Box::pin(std::future::ready(Ok(token.clone()))));
        match tokio::time::timeout(LOG_IN, builder.connect()).await {
            Ok(Ok(made)) => return made,
            other => assert!(Instant::now() < deadline, "{name} can't log in: {:?}", other.map(|done| done.err())),
        }
        tokio::time::sleep(PACE).await;
    }
}

/// One sender, until it is stopped.
async fn send((cast, at): (Arc<Cast>, usize), clients: Vec<Client>, board: Arc<Mutex<Board>>, going: Arc<AtomicBool>) {
    let pair = &cast.pairs[at];
    let mut number = 0;
    while going.load(Ordering::Relaxed) {
        let text = format!("{at}: {number}");
        let began = Instant::now();
        board.lock().unwrap().senders[at].since.get_or_insert(began);
        let options = SendOptions { give_up_after: Some(TRY), ..SendOptions::default() };
        let sent = clients[pair.from].send_with(cast.name(pair.to), text.clone(), options).await;
        board.lock().unwrap().senders[at].note(began, text, sent.map(|accepted| accepted.seq));
        number += 1;
        tokio::time::sleep(PACE).await;
    }
}

/// What one device receives of others.
async fn read((cast, own): (Arc<Cast>, usize), mut events: Events, board: Arc<Mutex<Board>>) {
    let users: HashMap<_, _> = cast.users.iter().enumerate().map(|(at, (name, _))| (name.as_str(), at)).collect();
    while let Some(event) = events.next().await {
        if let Event::Skipped { .. } = &event {
            board.lock().unwrap().skipped.push(format!("{}: {event:?}", cast.name(own)));
        }
        if let Event::Message(message) = event
            && users[message.from.as_str()] != own
        {
            let key = (own, users[message.from.as_str()]);
            let got = (message.seq, message.text().into_owned());
            board.lock().unwrap().read.entry(key).or_default().push(got);
        }
    }
}

/// The whole log of a conversation.
async fn history(client: &Client, with: &str) -> Vec<Message> {
    let deadline = Instant::now() + PATIENCE;
    let mut log = Vec::new();
    loop {
        let range = HistoryRange { after: Seq(log.len() as u64), newest: false, ..HistoryRange::default() };
        match client.history(with, range).await {
            Ok(page) if page.messages.is_empty() => return log,
            Ok(page) => {
                for message in page.messages {
                    assert_eq!(message.seq.0, log.len() as u64 + 1, "numbers are dense");
                    log.push(message);
                }
            }
            Err(error) => {
                assert!(Instant::now() < deadline, "{with}: {error}");
                tokio::time::sleep(PACE).await;
            }
        }
    }
}

/// What two have written to each other: see the module. `at`: the first of their two pairs.
async fn judge(cast: &Cast, at: usize, clients: &[Client], board: &Mutex<Board>) {
    let Pair { from: one, to: other, .. } = cast.pairs[at];
    let log = history(&clients[one], cast.name(other)).await;
    {
        let board = board.lock().unwrap();
        let ledgers = [&board.senders[at].ledger, &board.senders[at + 1].ledger];
        let known: HashMap<&str, Fate> = ledgers.into_iter().flatten().map(|(text, fate)| (&text[..], *fate)).collect();
        let mut there = HashSet::new();
        for message in &log {
            let text = message.text().into_owned();
            match known.get(text.as_str()) {
                Some(Fate::Accepted(seq)) => assert_eq!(*seq, message.seq, "{text} was given another number"),
                Some(Fate::Unknown) => {}
                Some(Fate::Refused) => panic!("{text} was refused, and is there at {:?}", message.seq),
                None => panic!("{text} at {:?} was never sent", message.seq),
            }
            assert!(there.insert(text.clone()), "{text} is there twice");
        }
        for (text, fate) in &known {
            assert!(!matches!(fate, Fate::Accepted(_)) || there.contains(*text), "{text} was accepted and is lost");
        }
    }
    for (reader, writer) in [(one, other), (other, one)] {
        let written = log.iter().filter(|message| message.from.as_str() == cast.name(writer));
        let written: Vec<_> = written.map(|message| (message.seq, message.text().into_owned())).collect();
        let deadline = Instant::now() + PATIENCE;
        let got = || board.lock().unwrap().read.get(&(reader, writer)).cloned().unwrap_or_default();
        while got().len() < written.len() {
            assert!(Instant::now() < deadline, "{} has not all of {}", cast.name(reader), cast.name(writer));
            tokio::time::sleep(PACE).await;
        }
        assert_eq!(got(), written, "what {} has received of {}", cast.name(reader), cast.name(writer));
    }
}
