//! The terminal chat: a person at a prompt, or a script on a pipe, over the client of this package.
//!
//! One tokio runtime on the calling thread; a second thread reads lines, one at a time and only when asked, so that the
//! terminal is never left in raw mode. Invariant: nothing that another user chose reaches the terminal without
//! [`clean`], which leaves no control character in it.

mod account;
mod amend;
mod deletion;
mod groups;
mod mentions;
mod social;
mod typing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Editor, ExternalPrinter};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use deletion::Confirming;
use typing::{Keys, Pace};

use crate::{
    BodyKind, CallError, Client, ClientBuilder, CloseReason, ConnectError, DeviceId, DeviceKind, ErrorCode, Event,
    Events, HistoryRange, Message, MessageState, SendError, Sending, Standing, UserName,
};

/// Messages of `/history` without a number, and the most that it shows.
const HISTORY_DEFAULT: u16 = 20;
const HISTORY_MAX: u16 = 200;
/// Of the messages that came while away, so many are shown, the newest.
const MISSED_SHOWN_MAX: usize = 50;
/// Messages are shown as missed ones only so long after the start; then they are shown as they come.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(3);
/// At the end, unanswered sends get so long.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(5);
/// A first line longer than this is no password.
const PASSWORD_LINE_BYTES_MAX: usize = 4_096;
/// A longer line of a pipe is taken as several.
const LINE_BYTES_MAX: usize = 32 * 1024;
/// Sends without an answer; more lines wait.
const SENDS_OPEN_MAX: usize = 512;

const HELP: &str = "\
/msg NAME TEXT      send to NAME, and keep writing to NAME
/to NAME            plain lines go to NAME from now on; NAME may be a group
/who                who is online, and what they say beside their names
/watch NAME         how NAME is, and from now on every change; /unwatch NAME
/status TEXT        what others see beside your name; /visible on or off: whether they see you at all
/block NAME         takes nothing from NAME; /unblock NAME, /blocks
/privacy WHO        who may write to you: anyone, known (whom you wrote to), nobody
/typing             tells whom you write to that you are typing; at a terminal that is told as you type
/notice TEXT        for administrators: to everyone online; /delete-user NAME deletes that user
/history NAME [N]   the last N messages with NAME (20, at most 200); a NAME with spaces goes in \"quotes\"
/edit N TEXT        another text for your message N of this conversation; /recall N takes it back
/delete N           deletes message N for you, /delete N all for everyone
/seen NAME N        who has received and read message N of the conversation with NAME
/group              the commands of groups; in a message to one, @NAME and @all say whom it is meant for
/conversations      with whom, how many messages, how many you have not read
/pin NAME           /unpin NAME, /mute NAME HOURS: what you keep in sight, what may not disturb you
/devices            where you are or were logged in; /drop ID logs one out
/export FILE        all that is kept about you, as lines of JSON, into a new file
/delete-account     deletes you for ever, after a question; /delete-account recall takes your messages back as well
/help               this list
/quit               leave (or Ctrl-D)";

/// Where the password comes from, or the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProofSource {
    /// Asked at the terminal without echo; without a terminal, the first line of the standard input.
    Ask,
    /// The first line of the standard input.
    Stdin,
    /// The first line of a file.
    File(PathBuf),
    /// A token, the first line of a file, which is read anew for each connection.
    TokenFile(PathBuf),
}

/// What `ringline chat` was told.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// `host:port`.
    pub server: String,
    pub user: String,
    /// Register the user first.
    pub register: bool,
    pub proof: ProofSource,
    /// Where the device id is kept; `None`: a file of this user under `$XDG_STATE_HOME/ringline`.
    pub device_file: Option<PathBuf>,
}

/// Why a chat did not begin, or ended otherwise than by the user.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Closed(CloseReason),
    #[error("no login with this name and password (to register a new user: --register)")]
    NoLogin,
    #[error("this user exists, and the password is wrong")]
    WrongPassword,
    #[error("the token is not good: it is for this user and server, and has not expired?")]
    BadToken,
    #[error("no password or token: {0}")]
    Proof(io::Error),
    #[error("device file {}: {error}", .path.display())]
    DeviceFile { path: PathBuf, error: io::Error },
    #[error("no place for the device file: neither XDG_STATE_HOME nor HOME is set")]
    NoHome,
    #[error("terminal: {0}")]
    Terminal(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Chats until the user leaves. Blocks; call it from a thread without a runtime.
pub fn run(options: ChatOptions) -> Result<(), ChatError> {
    let user = UserName::new(&options.user).map_err(|_| ConnectError::BadName)?;
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    let device_file = options.device_file.map_or_else(|| default_device_file(&user), Ok)?;
    let device = load_device(&device_file).map_err(|error| ChatError::DeviceFile { path: device_file, error })?;
    let proof = options.proof;
    let by_token = matches!(proof, ProofSource::TokenFile(_));
    let builder =
        proven(Client::builder(options.server).user(user.as_str()), proof, &user).map_err(ChatError::Proof)?;
    let builder = builder
        .device(device)
        .device_kind(DeviceKind::Desktop)
        .agent(concat!("ringline-chat/", env!("CARGO_PKG_VERSION")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (client, events) = match by_token {
            true => log_in_by_token(builder).await?,
            false => log_in(builder, options.register, |question| interactive && confirm(question)).await?,
        };
        let (lines, screen) = if interactive {
            terminal(format!("{user}> "))?
        } else {
            (read_lines(io::BufReader::new(io::stdin())), stream_screen(io::stdout()))
        };
        Chat::new(client, screen, interactive).converse(events, lines).await
    })
}

// --- who ---------------------------------------------------------------------------------------------------------

/// Logs in; offers to register where the server knows no such login.
async fn log_in(
    builder: ClientBuilder,
    register: bool,
    confirm: impl FnOnce(&str) -> bool,
) -> Result<(Client, Events), ChatError> {
    if register {
        match builder.register().await {
            // So that the same command line works the second time.
            Ok(()) | Err(ConnectError::Refused { code: ErrorCode::NameTaken, .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match builder.clone().connect().await {
        Err(ConnectError::AuthFailed) if register => return Err(ChatError::WrongPassword),
        Err(ConnectError::AuthFailed) => {}
        connected => return Ok(connected?),
    }
    let name = clean(builder.name());
    if !confirm(&format!("No login with this name and password. Register '{name}' as a new user? [y/N] ")) {
        return Err(ChatError::NoLogin);
    }
    match builder.register().await {
        Err(ConnectError::Refused { code: ErrorCode::NameTaken, .. }) => Err(ChatError::WrongPassword),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(builder.connect().await?),
    }
}

async fn log_in_by_token(builder: ClientBuilder) -> Result<(Client, Events), ChatError> {
    match builder.connect().await {
        Err(ConnectError::AuthFailed) => Err(ChatError::BadToken),
        connected => Ok(connected?),
    }
}

/// Asks at the terminal. Anything but yes is no.
fn confirm(question: &str) -> bool {
    let mut answer = String::new();
    let asked = write!(io::stdout(), "{question}").and_then(|()| io::stdout().flush());
    asked.is_ok()
        && io::stdin().read_line(&mut answer).is_ok()
        && matches!(answer.trim().to_lowercase().as_str(), "y" | "yes")
}

/// With what the user logs in by. Errors: those of reading it; a token is read once here to find them.
fn proven(builder: ClientBuilder, source: ProofSource, user: &UserName) -> io::Result<ClientBuilder> {
    let first_line_of = |path: &Path| first_line(io::BufReader::new(fs::File::open(path)?));
    let password = match source {
        ProofSource::Ask if io::stdin().is_terminal() => {
            rpassword::prompt_password(format!("password of {}: ", clean(user.as_str())))?
        }
        ProofSource::Ask | ProofSource::Stdin => first_line(io::stdin().lock())?,
        ProofSource::File(path) => first_line_of(&path)?,
        ProofSource::TokenFile(path) => {
            first_line_of(&path)?;
            return Ok(builder.token(move || {
                let token = first_line_of(&path).map(|line| line.trim().to_owned());
                Box::pin(std::future::ready(token.map_err(|error| error.to_string())))
            }));
        }
    };
    Ok(builder.password(&password))
}

fn first_line(mut input: impl BufRead) -> io::Result<String> {
    match read_line(&mut input, PASSWORD_LINE_BYTES_MAX)? {
        Some(line) => Ok(line),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "there is no line to read")),
    }
}

/// `ringline/device-NAME` in the user's state folder. The name is escaped, because it may hold any character.
fn default_device_file(user: &UserName) -> Result<PathBuf, ChatError> {
    let state = match std::env::var_os("XDG_STATE_HOME").filter(|path| Path::new(path).is_absolute()) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").ok_or(ChatError::NoHome)?).join(".local/state"),
    };
    let mut name = String::from("device-");
    for byte in user.as_str().bytes() {
        // Writing to a string does not fail.
        let _ = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => write!(name, "{}", char::from(byte)),
            other => write!(name, "%{other:02X}"),
        };
    }
    Ok(state.join("ringline").join(name))
}

/// The device id that the file holds; at the first time a new one, which it holds from then on.
fn load_device(path: &Path) -> io::Result<DeviceId> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let fresh = rand::random_range(1..=u64::MAX);
    match fs::File::create_new(path) {
        Ok(mut file) => {
            writeln!(file, "{fresh}")?;
            file.sync_all()?;
            Ok(DeviceId(fresh))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let number = fs::read_to_string(path)?.trim().parse().ok().filter(|&number| number != 0);
            let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it does not hold a device id");
            number.map(DeviceId).ok_or_else(damaged)
        }
        Err(error) => Err(error),
    }
}

// --- lines in, lines out -------------------------------------------------------------------------------------------

/// Lines of the user, read by a thread of its own. Each is asked for, so that between them the terminal is ours.
struct Lines {
    ask: std::sync::mpsc::SyncSender<()>,
    /// `None`: the end.
    lines: mpsc::Receiver<Option<String>>,
    /// Keys of a line that is being written; a pipe has none.
    typed: Option<mpsc::Receiver<()>>,
}

impl Lines {
    /// `read` gives the next line, or `None` at the end.
    fn new(mut read: impl FnMut() -> Option<String> + Send + 'static) -> Self {
        let (ask, asked) = std::sync::mpsc::sync_channel(1);
        let (sender, lines) = mpsc::channel(1);
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let line = read();
                let last = line.is_none();
                if sender.blocking_send(line).is_err() || last {
                    return;
                }
            }
        });
        Self { ask, lines, typed: None }
    }

    /// Asks for the line that [`Self::next`] will give.
    fn ask(&self) {
        // Full: it is asked for already. Closed: `next` gives the end.
        let _ = self.ask.try_send(());
    }

    async fn next(&mut self) -> Option<String> {
        self.lines.recv().await.flatten()
    }
}

/// The next key, if there is somebody who types.
async fn key(typed: &mut Option<mpsc::Receiver<()>>) -> Option<()> {
    match typed {
        Some(typed) => typed.recv().await,
        None => None,
    }
}

/// Where the chat writes whole lines.
trait Screen {
    fn line(&mut self, text: &str);
}

struct StreamScreen<W>(W);

impl<W: Write> Screen for StreamScreen<W> {
    fn line(&mut self, text: &str) {
        // A reader that is gone stops the chat by the end of its input, not by its output.
        let _ = writeln!(self.0, "{text}").and_then(|()| self.0.flush());
    }
}

fn stream_screen(output: impl Write + 'static) -> Box<dyn Screen> {
    Box::new(StreamScreen(output))
}

/// Prints above the prompt.
struct TerminalScreen<P>(P);

impl<P: ExternalPrinter> Screen for TerminalScreen<P> {
    fn line(&mut self, text: &str) {
        let _ = self.0.print(format!("{text}\n"));
    }
}

/// A line editor with a prompt, and a screen that does not disturb it.
fn terminal(prompt: String) -> Result<(Lines, Box<dyn Screen>), ChatError> {
    let broken = |error: ReadlineError| ChatError::Terminal(error.to_string());
    let mut editor: Editor<Keys, FileHistory> = Editor::new().map_err(broken)?;
    let (keys, typed) = Keys::new();
    editor.set_helper(Some(keys));
    let printer = editor.create_external_printer().map_err(broken)?;
    let lines = Lines::new(move || {
        // Ctrl-C, Ctrl-D and a lost terminal all mean to leave.
        let line = editor.readline(&prompt).ok()?;
        let _ = editor.add_history_entry(&line);
        Some(line)
    });
    Ok((Lines { typed: Some(typed), ..lines }, Box::new(TerminalScreen(printer))))
}

fn read_lines(mut input: impl BufRead + Send + 'static) -> Lines {
    Lines::new(move || read_line(&mut input, LINE_BYTES_MAX).ok().flatten())
}

/// A line without its end; one that is longer than `bytes_max` comes in pieces. `None` at the end of the input.
fn read_line(input: &mut impl BufRead, bytes_max: usize) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    input.by_ref().take(bytes_max as u64).read_until(b'\n', &mut line)?;
    let end = line.is_empty();
    let text = String::from_utf8_lossy(&line);
    Ok((!end).then(|| text.trim_end_matches(['\n', '\r']).to_owned()))
}

/// Text of others for a terminal: control characters would let it move the cursor, recolour or retitle, or type for the
/// user; marks of direction would let it show another order than the one it has.
fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => clean.push_str(" ⏎ "),
            '\t' => clean.push(' '),
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                clean.push(char::REPLACEMENT_CHARACTER);
            }
            control if control.is_control() => clean.push(char::REPLACEMENT_CHARACTER),
            other => clean.push(other),
        }
    }
    clean
}

// --- the conversation ----------------------------------------------------------------------------------------------

/// Messages that came before the chat had caught up.
#[derive(Default)]
struct Missed {
    count: u64,
    newest: VecDeque<Message>,
}

/// A chat under way.
struct Chat {
    client: Client,
    screen: Box<dyn Screen>,
    interactive: bool,
    zone: TimeZone,
    peer: Option<UserName>,
    /// Sends without an answer yet; each ends in a line for the screen.
    sends: JoinSet<String>,
    /// `None` once the messages that came while away are shown.
    missed: Option<Missed>,
    reconnecting: bool,
    closed: Option<CloseReason>,
    /// Whose changes are shown.
    watching: BTreeSet<UserName>,
    /// What the next line answers.
    confirming: Option<Confirming>,
    pace: Pace,
}

impl Chat {
    fn new(client: Client, screen: Box<dyn Screen>, interactive: bool) -> Self {
        Self {
            client,
            screen,
            interactive,
            zone: TimeZone::system(),
            peer: None,
            sends: JoinSet::new(),
            missed: Some(Missed::default()),
            reconnecting: false,
            closed: None,
            watching: BTreeSet::new(),
            confirming: None,
            pace: Pace::default(),
        }
    }

    /// Until the user leaves, or is made to.
    async fn converse(mut self, mut events: Events, mut lines: Lines) -> Result<(), ChatError> {
        let greeting = format!("logged in as {}; /help lists the commands", clean(self.client.user().as_str()));
        self.screen.line(&greeting);
        let patience = tokio::time::sleep(CATCH_UP_PATIENCE);
        tokio::pin!(patience);
        let mut leaving = false;
        let mut typed = lines.typed.take();
        lines.ask();
        while !(leaving && self.missed.is_none()) {
            tokio::select! {
                // In this order: asking for the next event is what acknowledges the one just shown.
                biased;
                Some(event) = events.next(), if self.closed.is_none() => {
                    self.event(event);
                    leaving |= self.closed.is_some() && !self.interactive;
                }
                Some(sent) = self.sends.join_next(), if !self.sends.is_empty() => self.sent(sent),
                Some(()) = key(&mut typed), if !leaving => self.key_pressed(),
                line = lines.next(), if !leaving => match line {
                    Some(line) if self.closed.is_none() && self.line(line.trim()).await => lines.ask(),
                    Some(_) | None => leaving = true,
                },
                () = &mut patience, if self.missed.is_some() => self.show_missed(),
            }
        }
        drop(events);
        self.client.close(GOODBYE_PATIENCE).await;
        while let Some(Ok(text)) = self.sends.join_next().await {
            self.screen.line(&text);
        }
        match self.closed {
            Some(CloseReason::ByClient) | None => Ok(()),
            Some(reason) => Err(ChatError::Closed(reason)),
        }
    }

    fn sent(&mut self, sent: Result<String, tokio::task::JoinError>) {
        // A task that was cut off belongs to a runtime that is ending.
        if let Ok(text) = sent {
            self.screen.line(&text);
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Connected { .. } => {
                if std::mem::take(&mut self.reconnecting) {
                    self.screen.line("connected again");
                }
            }
            Event::CaughtUp { .. } => self.show_missed(),
            Event::Message(message) => self.message(message),
            Event::Receipt(_) => {}
            Event::ReadUpto(upto) => self.read_upto(&upto),
            Event::Signal(signal) => self.signal(&signal),
            // Whoever is away or keeps this user out says so when a message is sent.
            Event::SignalRefused { .. } => {}
            Event::Presence(rows) => self.presence_changed(&rows),
            Event::Notice(notice) => self.notice(&notice),
            Event::GroupChanged(changed) => self.group_changed(&changed),
            // What is on the screen stays there.
            Event::Hidden { .. } => {}
            Event::Skipped { with, from, to, .. } => {
                let text = format!("messages {from} to {to} with {} are not kept any more", clean(with.as_str()));
                self.screen.line(&text);
            }
            Event::Missed { count } => self.screen.line(&format!("{count} messages that are not stored were missed")),
            Event::Goaway { .. } => self.screen.line("the server is going away"),
            Event::Reconnecting { attempt, delay, why } => {
                if !std::mem::replace(&mut self.reconnecting, true) {
                    self.screen.line(&format!("connection lost: {}", clean(&why.to_string())));
                }
                let seconds = delay.as_secs_f64();
                self.screen.line(&format!("reconnecting … (attempt {attempt}, next try in {seconds:.1} s)"));
            }
            Event::Closed { why } => {
                self.show_missed();
                let leave = if self.interactive { " (press Enter to leave)" } else { "" };
                self.screen.line(&format!("{why}{leave}"));
                self.closed = Some(why);
            }
        }
    }

    fn message(&mut self, message: Message) {
        // What was typed here is on the screen already; only who talks to himself wants it back.
        if message.device == self.client.device()
            && message.from == *self.client.user()
            && message.to != *self.client.user()
        {
            return;
        }
        // A later amendment has taken its place.
        let overtaken = message.amendment().is_some_and(|amendment| amendment.state == MessageState::AsSent);
        match &mut self.missed {
            _ if overtaken => {}
            Some(missed) => {
                missed.count += 1;
                missed.newest.push_back(message);
                if missed.newest.len() > MISSED_SHOWN_MAX {
                    missed.newest.pop_front();
                }
            }
            None => {
                let text = self.format(&message);
                self.screen.line(&text);
                self.seen(message.conversation, message.seq);
            }
        }
    }

    fn show_missed(&mut self) {
        let Some(missed) = self.missed.take() else { return };
        let earlier = missed.count.saturating_sub(missed.newest.len() as u64);
        match missed.count {
            0 => return,
            1 => self.screen.line("1 message while you were away"),
            count if earlier == 0 => self.screen.line(&format!("{count} messages while you were away")),
            count => {
                let shown = missed.newest.len();
                self.screen.line(&format!("{count} messages while you were away, the last {shown} are"));
            }
        }
        let mut shown = BTreeMap::new();
        for message in &missed.newest {
            let text = self.format(message);
            self.screen.line(&text);
            shown.insert(message.conversation, message.seq);
        }
        shown.into_iter().for_each(|(conversation, seq)| self.seen(conversation, seq));
    }

    /// `12:03:04 bob: hello`, with the date if it is not today's.
    fn format(&self, message: &Message) -> String {
        let body = match message.kind {
            BodyKind::System | BodyKind::Amendment => String::new(),
            BodyKind::Text | BodyKind::Emoji | BodyKind::Link => clean(&message.text()),
            BodyKind::Image | BodyKind::Voice | BodyKind::Video | BodyKind::File | BodyKind::Custom => {
                format!("[{:?}, {} bytes]", message.kind, message.body.len())
            }
        };
        let body = match message.state() {
            MessageState::AsSent | MessageState::Edited => body + Self::what_became(message.state()),
            gone @ (MessageState::Recalled | MessageState::Deleted | MessageState::Hidden) => {
                Self::what_became(gone).to_owned()
            }
        };
        let time = self.time(message.time_ms);
        let from = clean(message.from.as_str());
        let body = body + mentions::of_reader(message, self.client.user());
        let change = message.extra.as_ref().and_then(|extra| extra.change.as_ref());
        if let Some(change) = change {
            format!("{time} {} * {from} {}", clean(message.to.as_str()), groups::what_happened(change, &message.from))
        } else if let Some(what) = Self::what_amended(message) {
            let place = if message.to.is_group() { clean(message.to.as_str()) + " " } else { String::new() };
            format!("{time} {place}* {from} {what}")
        } else if message.to.is_group() {
            format!("{time} {} {from}: {body}", clean(message.to.as_str()))
        } else if message.from == *self.client.user() && message.to != message.from {
            format!("{time} {from} → {}: {body}", clean(message.to.as_str()))
        } else {
            format!("{time} {from}: {body}")
        }
    }

    fn time(&self, unix_ms: u64) -> String {
        let moment = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let Some(moment) = moment else { return String::from("--:--:--") };
        let local = moment.to_zoned(self.zone.clone());
        let today = Timestamp::now().to_zoned(self.zone.clone()).date();
        let form = if local.date() == today { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" };
        local.strftime(form).to_string()
    }

    /// A line of the user. False: leave.
    async fn line(&mut self, line: &str) -> bool {
        if let Some(question) = self.confirming.take() {
            self.confirm(question, line).await;
            return true;
        }
        let (command, rest) = match line.split_once(char::is_whitespace) {
            Some((command, rest)) if line.starts_with('/') => (command, rest.trim()),
            Some(_) | None if line.starts_with('/') => (line, ""),
            Some(_) | None => ("", line),
        };
        match command {
            "" if rest.is_empty() => {}
            "" => self.say(rest).await,
            "/msg" => {
                let (name, text) = split_name(rest);
                if self.set_peer(name) && !text.is_empty() {
                    self.say(text).await;
                }
            }
            "/to" => {
                let (name, _) = split_name(rest);
                if self.set_peer(name) {
                    self.screen.line(&format!("writing to {}", clean(name)));
                }
            }
            "/group" => self.group(rest).await,
            "/who" => self.who().await,
            "/history" => self.history(rest).await,
            "/conversations" => self.conversations().await,
            "/help" => self.screen.line(HELP),
            "/quit" => return false,
            other if self.social(other, rest).await || self.deletion(other, rest) => {}
            other if self.account(other, rest).await || self.amend(other, rest).await => {}
            unknown => self.screen.line(&format!("no command {}; /help lists them", clean(unknown))),
        }
        true
    }

    fn set_peer(&mut self, name: &str) -> bool {
        match UserName::new(name) {
            Ok(name) => {
                self.peer = Some(name);
                true
            }
            Err(_) if name.is_empty() => {
                self.screen.line("to whom? /msg NAME TEXT");
                false
            }
            Err(code) => {
                self.screen.line(code.text());
                false
            }
        }
    }

    async fn say(&mut self, text: &str) {
        let Some(peer) = self.peer.clone() else {
            self.screen.line("to whom? /to NAME sets it, or /msg NAME TEXT");
            return;
        };
        // A script may write faster than the server answers.
        while self.sends.len() >= SENDS_OPEN_MAX
            && let Some(sent) = self.sends.join_next().await
        {
            self.sent(sent);
        }
        self.pace.reset();
        let options = mentions::options(&peer, text);
        let sending = self.client.send_with(peer.as_str(), text.to_owned(), options);
        self.show_result(sending, peer.as_str());
    }

    /// The number that a message gets, or why it gets none, as soon as that is known.
    fn show_result(&mut self, sending: Sending, peer: &str) {
        let peer = clean(peer);
        self.sends.spawn(async move {
            match sending.await {
                Ok(accepted) => format!("✓ {}", accepted.seq),
                Err(SendError::Refused { code, .. }) => format!("✗ to {peer}: {}", code.text()),
                Err(error @ SendError::Unknown) => format!("? to {peer}: {error}"),
                Err(error) => format!("✗ to {peer}: {error}"),
            }
        });
    }

    async fn who(&mut self) {
        let mut from: Option<String> = None;
        loop {
            let page = match self.client.online(from.as_deref(), 0).await {
                Ok(page) => page,
                Err(error) => return self.screen.line(&error.to_string()),
            };
            let statuses = self.statuses(&page.users).await;
            for row in page.users {
                let status = statuses.get(&row.user).map_or("", String::as_str);
                let devices = if row.devices == 1 { String::new() } else { format!(" ({} devices)", row.devices) };
                self.screen.line(&format!("  {}{devices}{status}", clean(row.user.as_str())));
            }
            from = onward(from, page.next);
            if from.is_none() {
                return;
            }
        }
    }

    async fn history(&mut self, rest: &str) {
        let (name, count) = split_name(rest);
        let limit = match count.parse() {
            Ok(count @ 1..=HISTORY_MAX) => count,
            Err(_) if count.is_empty() => HISTORY_DEFAULT,
            Ok(_) | Err(_) => return self.screen.line("/history NAME [N], N from 1 to 200"),
        };
        match self.client.history(name, HistoryRange { limit, ..HistoryRange::default() }).await {
            Ok(history) if history.messages.is_empty() => self.screen.line("no messages"),
            Ok(history) => {
                // It shows what has become of each; how that came about is no part of it.
                let is_shown =
                    |message: &&Message| message.amendment().is_none() && message.state() != MessageState::Hidden;
                for message in history.messages.iter().filter(is_shown) {
                    let text = self.format(message);
                    self.screen.line(&format!("  {text}  [{}]", message.seq));
                }
            }
            Err(CallError::Refused { code, .. }) => self.screen.line(code.text()),
            Err(error) => self.screen.line(&error.to_string()),
        }
    }

    async fn conversations(&mut self) {
        let mut from = None;
        loop {
            let page = match self.client.conversations(from, 0).await {
                Ok(page) => page,
                Err(error) => return self.screen.line(&error.to_string()),
            };
            for row in page.conversations {
                let (with, time) = (clean(row.with.as_str()), self.time(row.last_time_ms));
                let unread = row.unread();
                let unread = if unread == 0 { String::new() } else { format!(", {unread} unread") };
                let standing = match row.standing {
                    Some(Standing::Invited) => ", you are invited",
                    Some(Standing::Asked) => ", you have asked to join",
                    Some(Standing::Member | Standing::Left | Standing::Kicked) | None => "",
                };
                self.screen.line(&format!("  {with}: {} messages{unread}{standing}, last {time}", row.head));
            }
            from = onward(from, page.next);
            if from.is_none() {
                return;
            }
        }
    }
}

/// Where the next page of a list begins. One that does not rise would never end.
fn onward<T: PartialOrd>(from: Option<T>, next: Option<T>) -> Option<T> {
    next.filter(|next| from.is_none_or(|from| *next > from))
}

/// A name and what follows it. A name with spaces is put in double quotes.
fn split_name(text: &str) -> (&str, &str) {
    let quoted = text.strip_prefix('"').and_then(|rest| rest.split_once('"'));
    let (name, rest) = quoted.or_else(|| text.split_once(char::is_whitespace)).unwrap_or((text, ""));
    (name, rest.trim())
}

#[cfg(test)]
mod tests;
