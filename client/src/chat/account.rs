//! What the prompt says of one's own devices and conversations: read and delivered, who has seen a message, pins, mutes,
//! the device list. Part of the chat, on its thread.
//!
//! Invariant as in the chat: what others chose passes [`clean`] on its way to the screen.

use std::fs::File;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Chat, clean, onward, split_name};
use crate::{ConversationId, DeviceId, ReadUpto, Seq, UserName};

const MS_PER_HOUR: u64 = 3_600_000;

impl Chat {
    /// A command of this module. False: it is none.
    pub(super) async fn account(&mut self, command: &str, rest: &str) -> bool {
        let (name, more) = split_name(rest);
        match command {
            "/devices" => self.devices().await,
            "/drop" => match rest.parse() {
                Ok(device) => {
                    let result = self.client.drop_device(DeviceId(device)).await;
                    self.settled(result, "logged out");
                }
                Err(_) => self.screen.line("/drop ID, as /devices shows it"),
            },
            "/seen" => match (self.conversation_with(name), more.parse()) {
                (Some(id), Ok(seq @ 1..)) => self.receipts(id, Seq(seq)).await,
                (_, _) => self.screen.line("/seen NAME N; N is the number behind a message of /history"),
            },
            "/export" => self.export(rest.trim()).await,
            "/pin" | "/unpin" => match self.conversation_with(name) {
                Some(id) => {
                    let result = self.client.pin(id, command == "/pin").await;
                    self.settled(result, if command == "/pin" { "pinned" } else { "not pinned any more" });
                }
                None => self.screen.line("/pin NAME or /unpin NAME"),
            },
            "/mute" => match (self.conversation_with(name), more.parse::<u64>()) {
                (Some(id), Ok(hours)) => {
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
                    let until_ms =
                        if hours == 0 { 0 } else { now_ms.saturating_add(hours.saturating_mul(MS_PER_HOUR)) };
                    let result = self.client.mute(id, until_ms).await;
                    self.settled(result, if hours == 0 { "not muted any more" } else { "muted" });
                }
                (_, _) => self.screen.line("/mute NAME HOURS, 0 to end it"),
            },
            _ => return false,
        }
        true
    }

    fn conversation_with(&self, name: &str) -> Option<ConversationId> {
        UserName::new(name).ok().map(|name| ConversationId::with(self.client.user(), &name))
    }

    /// Writes what is kept about this user into a new file; what came before an error stays in it.
    async fn export(&mut self, file: &str) {
        if file.is_empty() {
            return self.screen.line("/export FILE");
        }
        let mut out = match File::create_new(file) {
            Ok(out) => out,
            Err(error) => return self.screen.line(&format!("{file}: {error}")),
        };
        let (mut cursor, mut lines) = (Some(String::new()), 0);
        while let Some(from) = cursor {
            let page = match self.client.export(&from).await {
                Ok(page) => page,
                Err(error) => return self.screen.line(&format!("{error}; {file} is not whole")),
            };
            if let Err(error) = out.write_all(&page.body) {
                return self.screen.line(&format!("{file}: {error}"));
            }
            lines += page.body.iter().filter(|byte| **byte == b'\n').count();
            cursor = page.next;
        }
        self.screen.line(&format!("{lines} lines in {file}"));
    }

    /// How many have a message, and how far each member has it.
    async fn receipts(&mut self, conversation: ConversationId, seq: Seq) {
        let mut from: Option<String> = None;
        loop {
            let page = match self.client.receipts(conversation, seq, from.as_deref(), 0).await {
                Ok(page) => page,
                Err(error) => return self.refused(&error),
            };
            if from.is_none() {
                let (members, delivered, read) = (page.members, page.delivered, page.read);
                self.screen.line(&format!("message {seq}: received by {delivered} of {members}, read by {read}"));
            }
            for row in page.rows {
                let state = if row.read >= seq {
                    "has read it"
                } else if row.delivered >= seq {
                    "has received it"
                } else {
                    "does not have it yet"
                };
                self.screen.line(&format!("  {} {state}", clean(row.user.as_str())));
            }
            from = onward(from, page.next);
            if from.is_none() {
                return;
            }
        }
    }

    async fn devices(&mut self) {
        let devices = match self.client.devices().await {
            Ok(devices) => devices,
            Err(error) => return self.screen.line(&error.to_string()),
        };
        for row in devices {
            let here = if row.device == self.client.device() { ", this one" } else { "" };
            let state = if row.online { "online" } else { "away" };
            let (id, agent, last) = (row.device.0, clean(&row.agent), self.time(row.last_ms));
            self.screen.line(&format!("  {id}: {:?} {agent}, {state}{here}, last login {last}", row.kind));
        }
    }

    /// `✓✓ bob has read up to 7`, `✓ bob has received up to 9`.
    pub(super) fn read_upto(&mut self, upto: &ReadUpto) {
        // What another device of this user has read is not news for the screen.
        if !self.interactive || upto.user.as_ref() == Some(self.client.user()) {
            return;
        }
        let user = match &upto.user {
            Some(user) => clean(user.as_str()),
            None => format!("somebody in {}", clean(upto.with.as_str())),
        };
        let text = if upto.read == upto.delivered {
            format!("  ✓✓ {user} has read up to {}", upto.read)
        } else {
            format!("  ✓ {user} has received up to {}", upto.delivered)
        };
        self.screen.line(&text);
    }

    /// What is on the screen is read. Told without waiting; if it is lost, the next one says more.
    pub(super) fn seen(&self, conversation: ConversationId, seq: Seq) {
        if self.interactive && seq != Seq::ZERO {
            let client = self.client.clone();
            tokio::spawn(async move { client.read(conversation, seq).await });
        }
    }
}
