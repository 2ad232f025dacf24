//! What a shard does when the lease of its node is over: it serves nothing, because another node may own by now what this one
//! believes to own. Owned by the shard; a node that owns for ever has none of it.
//!
//! Clients are told `UNAVAILABLE`, and so is who asks for something of a partition here; nothing is pushed. What has come to
//! its end meanwhile (commits, answers of the store, what other shards say) is held, in order, until the lease is pushed on, or
//! the process ends. Bound: [`HELD_MAX`] messages of other shards; one more is dropped, and the sessions are compared with the
//! store afterwards. Connections may come and go, and what can't be answered is told as ever.
//!
//! The lease is looked at once for all events of one moment: a turn of the shell has one. A turn takes milliseconds, which the
//! margin of whoever pushes the lease on allows for; what stops a process within a turn, it can't see before it has gone on.
//! What was written after the end of a lease does not count in any case: its commit compares epochs.

use std::collections::VecDeque;

use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::message::Request;
use ringline_schema::record::Answer;

use super::lost::meant_for;
use crate::config::Lease;
use crate::event::{Effects, Event, ShardMessage, Token, Verdict, WorkOutcome};
use crate::shard::Shard;

/// Messages of other shards that are held.
const HELD_MAX: usize = 65_536;
/// How often a lease that is over is looked at.
const LOOK_MS: u64 = 20;

/// What came to its end meanwhile.
#[derive(Debug)]
enum Held {
    Stored(u64),
    Loaded(Token, Answer),
    Worked(Token, WorkOutcome),
    Shard(ShardIndex, ShardMessage),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Leased {
    lease: Lease,
    looked_us: Option<u64>,
    over: bool,
    held: VecDeque<Held>,
    messages: usize,
    dropped: bool,
}

impl Leased {
    pub(crate) fn new(lease: Lease) -> Self {
        Self { lease, looked_us: None, over: false, held: VecDeque::new(), messages: 0, dropped: false }
    }

    fn hold(&mut self, held: Held) {
        if matches!(held, Held::Shard(..)) {
            if self.messages >= HELD_MAX {
                self.dropped = true;
                return;
            }
            self.messages += 1;
        }
        self.held.push_back(held);
    }
}

impl Shard {
    /// Looks at the lease, and goes on with what was held if it was pushed on.
    pub(crate) fn holds_lease(&mut self, fx: &mut Effects) -> bool {
        let now_us = self.now.mono_us;
        let Some(leased) = &mut self.lease else { return true };
        if leased.looked_us != Some(now_us) {
            leased.looked_us = Some(now_us);
            leased.over = now_us / 1_000 >= leased.lease.until_ms();
        }
        if leased.over {
            return false;
        }
        if leased.held.is_empty() && !leased.dropped {
            return true;
        }
        let dropped = std::mem::take(&mut leased.dropped);
        leased.messages = 0;
        for held in std::mem::take(&mut leased.held) {
            let event = match held {
                Held::Stored(upto) => Event::Stored { upto },
                Held::Loaded(token, answer) => Event::Loaded { token, answer },
                Held::Worked(token, outcome) => Event::Worked { token, outcome },
                Held::Shard(from, message) => Event::Shard { from, message },
            };
            self.background(event, fx);
            self.forget_ended(fx);
        }
        if dropped {
            self.want_all();
        }
        true
    }

    /// When a lease that is over is looked at again; nothing else is due until then.
    pub(crate) fn lease_look_us(&self) -> Option<u64> {
        let over = self.lease.as_ref().is_some_and(|leased| leased.over);
        over.then(|| self.now.mono_us + LOOK_MS * 1_000)
    }

    /// Takes an event while the lease is over.
    pub(crate) fn handle_without_lease(&mut self, event: Event<'_>, fx: &mut Effects) -> Verdict {
        let gone = ErrorCode::Unavailable;
        let mut verdict = Verdict::Continue;
        match event {
            Event::Request {
                conn,
                codec,
                flags,
                request_id,
                request: request @ (Request::Ping { .. } | Request::Logout),
            } => {
                verdict = self.request(conn, (codec, request_id, flags), request, fx);
            }
            Event::Request { conn, codec, request_id, .. } | Event::Send { conn, codec, request_id, .. } => {
                verdict = self.refused(conn, (codec, request_id), gone, fx);
            }
            Event::Refused { conn, codec, request_id, code } => {
                verdict = self.refused(conn, (codec, request_id), code, fx);
            }
            Event::Shard { from, message } if meant_for(&message).is_some() => self.not_served(from, message, fx),
            Event::Shard { from, message } => self.hold(Held::Shard(from, message)),
            Event::Stored { upto } => self.hold(Held::Stored(upto)),
            Event::Loaded { token, answer } => self.hold(Held::Loaded(token, answer)),
            Event::Worked { token, outcome } => self.hold(Held::Worked(token, outcome)),
            Event::Timer => {}
            other @ (Event::Opened { .. }
            | Event::Tunnelled { .. }
            | Event::Sent { .. }
            | Event::Closed { .. }
            | Event::StoreFailed
            | Event::DiskSpace { .. }
            | Event::StoreAway { .. }
            | Event::Node { .. }
            | Event::Placement(_)
            | Event::Unsent { .. }
            | Event::Drain) => self.background(other, fx),
        }
        self.forget_ended(fx);
        verdict
    }

    fn hold(&mut self, held: Held) {
        if let Some(leased) = &mut self.lease {
            leased.hold(held);
        }
    }
}
