//! "is typing …", told by itself while a person writes a line at the terminal.
//!
//! The thread that reads lines notes each key; the chat's thread tells whom the line is for, at most once in
//! [`TYPING_PAUSE`]. Commands tell nobody.

use std::time::{Duration, Instant};

use rustyline::completion::Completer;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::Validator;
use rustyline::{Context, Helper};
use tokio::sync::mpsc;

/// Whoever is written to is told at most once in this time.
const TYPING_PAUSE: Duration = Duration::from_secs(3);

/// Looks over the shoulder of the line editor. Offers no hints.
pub(super) struct Keys(mpsc::Sender<()>);

impl Keys {
    /// The receiver hears of keys; those that come before it has looked are one.
    pub(super) fn new() -> (Self, mpsc::Receiver<()>) {
        let (sender, receiver) = mpsc::channel(1);
        (Self(sender), receiver)
    }

    fn pressed(&self, line: &str) {
        if !line.trim().is_empty() && !line.starts_with('/') {
            // Full: it is noted already. Closed: the chat is over.
            let _ = self.0.try_send(());
        }
    }
}

impl Hinter for Keys {
    type Hint = String;

    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.pressed(line);
        None
    }
}

impl Completer for Keys {
    type Candidate = String;
}

impl Highlighter for Keys {}
impl Validator for Keys {}
impl Helper for Keys {}

/// When it was last told.
#[derive(Debug, Default)]
pub(super) struct Pace(Option<Instant>);

impl Pace {
    /// Whether it is to be told now; then it is noted.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.0.is_none_or(|last| now.duration_since(last) >= TYPING_PAUSE);
        if due {
            self.0 = Some(now);
        }
        due
    }

    /// A line went out: the next one is typed anew.
    pub(super) fn reset(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_message_are_told_once_in_a_while_and_those_of_commands_never() {
        let (keys, mut heard) = Keys::new();
        for line in ["", "  ", "/to bob"] {
            keys.pressed(line);
        }
        assert!(heard.try_recv().is_err());
        keys.pressed("h");
        keys.pressed("he");
        assert!(heard.try_recv().is_ok() && heard.try_recv().is_err());
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert!(pace.is_due(start) && !pace.is_due(start + TYPING_PAUSE / 2));
        assert!(pace.is_due(start + TYPING_PAUSE) && !pace.is_due(start + TYPING_PAUSE));
        pace.reset();
        assert!(pace.is_due(start + TYPING_PAUSE));
    }
}
