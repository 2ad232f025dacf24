//! Catching up by SYNC: at the beginning of a connection the server gives what was missed in all conversations, page by
//! page in order of id. Part of the streams, with their invariants.
//!
//! While it is under way nothing else is fetched: what is missing comes by itself. What does not come (a page was too much
//! at once, a deliver was dropped) is fetched when it is over. Pages are asked for only while the application takes
//! events. A gap between two messages of one conversation in it is what this user may not read. A server that does not
//! know SYNC is asked for the list of conversations instead.

use std::collections::{BTreeMap, BTreeSet};

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::limits;
use ringline_schema::message::chat::{ChatRequest, Sync};
use ringline_schema::message::{Class, Place, Places, Request};

use super::{CatchUp, Listing, Message, REPAIR_PAUSE_MS, Streams, next, previous};
use crate::pending::{Millis, Refusal, Waiting, Wire};

/// How far a SYNC is.
#[derive(Debug, Default)]
pub(super) struct Syncing {
    /// Where the next page begins.
    from: Place,
    /// What the server was told that this client has.
    told: BTreeMap<ConversationId, Seq>,
    /// The last message that it gave.
    given: Place,
    /// Conversations whose acknowledgement was refused because the server had not come to them yet.
    pub unsure: BTreeSet<ConversationId>,
}

impl Streams {
    pub(super) fn begin_sync(&mut self, now: Millis) {
        let place = |(&id, stream): (&ConversationId, &super::Stream)| Some((id, stream.handed?));
        let acked = |(_, stream): &(&ConversationId, &super::Stream)| stream.handed == Some(stream.acked);
        // What was acknowledged the server knows by itself: that is left out when there is too much.
        let unknown = self.by_id.iter().filter(|entry| !acked(entry));
        let all = unknown.chain(self.by_id.iter().filter(acked));
        let told = all.filter_map(place).take(limits::SYNC_PLACES_MAX).collect();
        self.sync = Syncing { told, ..Syncing::default() };
        self.listing = Listing::SyncLater(now);
    }

    pub(super) fn is_syncing(&self) -> bool {
        matches!(self.listing, Listing::SyncAsked | Listing::SyncLater(_))
    }

    /// Asks for the next page, unless it has to wait.
    pub(super) fn pump_sync(&mut self, now: Millis, wire: &mut Wire) {
        let Listing::SyncLater(at) = self.listing else { return };
        if at > now || self.full() {
            return;
        }
        self.listing = Listing::SyncAsked;
        let from = self.sync.from;
        let places: Vec<_> = self
            .sync
            .told
            .range(from.conversation..)
            .map(|(&conversation, &seq)| Place { conversation, seq })
            .collect();
        let sync = Sync { places: Places::from(&places[..]), from, limit: limits::PAGE_ROWS_MAX };
        wire.ask(now, Waiting::Sync, &Request::Chat(ChatRequest::Sync(sync)));
    }

    /// A page.
    pub(crate) fn synced(&mut self, now: Millis, messages: Vec<Message>, page_end: Place) {
        if self.listing != Listing::SyncAsked {
            return;
        }
        for message in messages {
            if message.class == Class::Durable && message.seq != Seq::ZERO {
                self.given(message);
            }
        }
        // A server whose pages do not rise must not keep us turning them.
        if place(page_end) > place(self.sync.from) {
            self.sync.from = page_end;
            self.listing = Listing::SyncLater(now);
        } else {
            self.sync_done(now);
        }
    }

    fn given(&mut self, message: Message) {
        let (id, seq) = (message.conversation, message.seq);
        let before = match self.sync.given {
            Place { conversation, seq } if conversation == id => Some(seq),
            _ => self.sync.told.get(&id).copied(),
        };
        self.sync.given = Place { conversation: id, seq };
        if !self.by_id.contains_key(&id) && !self.begin(id, message.peer(&self.me).clone(), Some(previous(seq))) {
            self.missed = self.missed.saturating_add(1);
            return;
        }
        let Some(stream) = self.by_id.get_mut(&id) else { return };
        if stream.handed.is_none() {
            let begin = previous(seq);
            (stream.handed, stream.taken, stream.acked, stream.row_wanted) = (Some(begin), begin, begin, false);
        }
        stream.head = stream.head.max(seq);
        let (handed, head) = (stream.handed, stream.head);
        if before.is_some_and(|before| handed == Some(before) && seq > next(before)) {
            self.skip(id, previous(seq), ErrorCode::Truncated);
        }
        if let Some(filling) = self.filling.as_mut().filter(|_| handed < Some(seq)) {
            filling.insert(id, head);
        }
        self.keep(id, message);
        self.settle(id);
    }

    /// What comes next in a conversation is not kept any more; `first` is the oldest that is.
    pub(crate) fn sync_truncated(&mut self, now: Millis, id: ConversationId, first: Seq) {
        if self.listing != Listing::SyncAsked {
            return;
        }
        let from = Place { conversation: id, seq: previous(first) };
        self.skip(id, from.seq, ErrorCode::Truncated);
        if place(from) > place(self.sync.from) {
            (self.sync.from, self.sync.given) = (from, from);
            self.listing = Listing::SyncLater(now);
        } else {
            self.sync_done(now);
        }
    }

    pub(crate) fn sync_refused(&mut self, now: Millis, refusal: Refusal<'_>) {
        if self.listing != Listing::SyncAsked {
            return;
        }
        if refusal.code.retryable() {
            let pause = refusal.pause_ms(0).max(REPAIR_PAUSE_MS);
            self.listing = Listing::SyncLater(now.saturating_add(pause));
        } else {
            self.sync_done(now);
            if self.catch_up == CatchUp::All {
                self.listing = Listing::Later(now, ConversationId(0));
            }
        }
    }

    /// From here on gaps are fetched.
    fn sync_done(&mut self, now: Millis) {
        self.listing = Listing::Done;
        self.settle_behind();
        for id in std::mem::take(&mut self.sync.unsure) {
            self.doubt_ack(id);
            self.ack_at = Some(now);
        }
        self.check_caught_up();
    }

    pub(super) fn settle_behind(&mut self) {
        let behind: Vec<ConversationId> =
            self.by_id.iter().filter(|(_, stream)| stream.behind()).map(|(&id, _)| id).collect();
        for id in behind {
            self.settle(id);
        }
    }
}

/// In the order of SYNC.
fn place(place: Place) -> (ConversationId, Seq) {
    (place.conversation, place.seq)
}
