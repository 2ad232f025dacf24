//! People at the prompt: who is typing, who is there, who is kept out. Part of the chat, on its thread.
//!
//! Invariant as in the chat: what others chose passes [`clean`] on its way to the screen.

use std::collections::BTreeMap;
use std::time::Instant;

use ringline_schema::limits;

use super::{Chat, clean, onward, split_name};
use crate::{CallError, MessagesFrom, Notice, OnlineUser, Presence, Signal, UserName};

/// Pages of a list that are shown.
const PAGE_ROWS: u16 = 200;

impl Chat {
    /// A command of this module. False: it is none.
    pub(super) async fn social(&mut self, command: &str, rest: &str) -> bool {
        let (name, _) = split_name(rest);
        match command {
            "/block" | "/unblock" | "/watch" | "/unwatch" if name.is_empty() => {
                self.screen.line(&format!("{command} NAME"));
            }
            "/notice" if rest.is_empty() => self.screen.line("/notice TEXT"),
            "/typing" => self.typing(),
            "/block" => {
                let result = self.client.block(name).await;
                self.settled(result, "blocked");
            }
            "/unblock" => {
                let result = self.client.unblock(name).await;
                self.settled(result, "not blocked any more");
            }
            "/blocks" => self.blocks().await,
            "/privacy" => self.privacy(rest).await,
            "/watch" => self.watch(name).await,
            "/unwatch" => {
                self.watching.retain(|watched| watched.as_str() != name);
                let result = self.client.unwatch(&[name]).await;
                self.settled(result, "not watched any more");
            }
            "/status" => {
                let result = self.client.set_status(rest).await;
                self.settled(result, "status set");
            }
            "/visible" => match rest {
                "on" | "off" => {
                    let result = self.client.set_visible(rest == "on").await;
                    self.settled(result, if rest == "on" { "others see you" } else { "others do not see you" });
                }
                _ => self.screen.line("/visible on or /visible off"),
            },
            "/notice" => match self.client.broadcast(rest.to_owned(), 0).await {
                Ok(devices) => self.screen.line(&format!("told {devices} devices")),
                Err(error) => self.refused(&error),
            },
            _ => return false,
        }
        true
    }

    pub(super) fn settled(&mut self, result: Result<(), CallError>, done: &str) {
        match result {
            Ok(()) => self.screen.line(done),
            Err(error) => self.refused(&error),
        }
    }

    pub(super) fn refused(&mut self, error: &CallError) {
        match error {
            CallError::Refused { code, .. } => self.screen.line(code.text()),
            CallError::BadName | CallError::Timeout | CallError::QueueFull | CallError::Closed => {
                self.screen.line(&error.to_string());
            }
        }
    }

    /// Tells whom one is writing to. It may not get through, and nobody minds.
    pub(super) fn typing(&mut self) {
        if let Some(peer) = &self.peer {
            let _ = self.client.typing(peer.as_str());
        }
    }

    async fn blocks(&mut self) {
        let mut from: Option<String> = None;
        loop {
            let page = match self.client.blocks(from.as_deref(), PAGE_ROWS).await {
                Ok(page) => page,
                Err(error) => return self.refused(&error),
            };
            if from.is_none() {
                let who = match page.messages_from {
                    MessagesFrom::Anyone => "anyone",
                    MessagesFrom::Known => "who you have written to",
                    MessagesFrom::Nobody => "nobody",
                };
                self.screen.line(&format!("messages from {who}; blocked:"));
            }
            for user in page.users {
                self.screen.line(&format!("  {}", clean(user.as_str())));
            }
            from = onward(from, page.next);
            if from.is_none() {
                return;
            }
        }
    }

    async fn privacy(&mut self, who: &str) {
        let who = match who {
            "anyone" => MessagesFrom::Anyone,
            "known" => MessagesFrom::Known,
            "nobody" => MessagesFrom::Nobody,
            _ => return self.screen.line("/privacy anyone, /privacy known or /privacy nobody"),
        };
        let result = self.client.take_messages_from(who).await;
        self.settled(result, "settled");
    }

    async fn watch(&mut self, name: &str) {
        match self.client.watch(&[name]).await {
            Ok(rows) => {
                self.watching.extend(rows.iter().map(|row| row.user.clone()));
                self.presence(&rows);
            }
            Err(error) => self.refused(&error),
        }
    }

    /// What users say beside their names. Whom one does not watch is looked at only for a moment.
    pub(super) async fn statuses(&mut self, users: &[OnlineUser]) -> BTreeMap<UserName, String> {
        let mut statuses = BTreeMap::new();
        let names: Vec<&str> = users.iter().map(|row| row.user.as_str()).collect();
        for names in names.chunks(limits::USERS_PER_REQUEST_MAX) {
            // Without an answer there are the names.
            let Ok(rows) = self.client.watch(names).await else { continue };
            let unwatched = rows.iter().filter(|row| !self.watching.contains(&row.user));
            let unwatched: Vec<&str> = unwatched.map(|row| row.user.as_str()).collect();
            let _ = self.client.unwatch(&unwatched).await;
            let said = rows.iter().filter(|row| !row.status.is_empty());
            statuses.extend(said.map(|row| (row.user.clone(), format!(": {}", clean(&row.status)))));
        }
        statuses
    }

    /// News of those who are watched.
    pub(super) fn presence_changed(&mut self, rows: &[Presence]) {
        let watched: Vec<_> = rows.iter().filter(|row| self.watching.contains(&row.user)).cloned().collect();
        self.presence(&watched);
    }

    /// A key of a line was pressed.
    pub(super) fn key_pressed(&mut self) {
        if self.peer.is_some() && self.pace.is_due(Instant::now()) {
            self.typing();
        }
    }

    pub(super) fn presence(&mut self, rows: &[Presence]) {
        for row in rows {
            let text = self.describe(row);
            self.screen.line(&text);
        }
    }

    /// `bob is online: in a meeting`, `bob was here 12:03:04`.
    fn describe(&self, row: &Presence) -> String {
        let name = clean(row.user.as_str());
        let status = if row.status.is_empty() { String::new() } else { format!(": {}", clean(&row.status)) };
        match (row.online, row.last_seen_ms) {
            (true, _) => format!("{name} is online{status}"),
            (false, 0) => format!("{name} is away{status}"),
            (false, last_seen_ms) => format!("{name} was here {}{status}", self.time(last_seen_ms)),
        }
    }

    pub(super) fn signal(&mut self, signal: &Signal) {
        if signal.is_typing() {
            let place = if signal.to.is_group() { format!(" in {}", clean(signal.to.as_str())) } else { String::new() };
            self.screen.line(&format!("{} is typing{place} …", clean(signal.from.as_str())));
        }
    }

    pub(super) fn notice(&mut self, notice: &Notice) {
        let text = clean(&String::from_utf8_lossy(&notice.body));
        let time = self.time(notice.time_ms);
        self.screen.line(&format!("{time} notice of {}: {text}", clean(notice.from.as_str())));
    }
}
