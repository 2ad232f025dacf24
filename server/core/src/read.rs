//! History and who is there: FETCH, ONLINE. A page is never larger than a frame, and one client has at most
//! an outbox of pages on their way.

use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, ConversationKind, Seq, UserName};
use ringline_schema::limits;
use ringline_schema::message::{ChatReply, Fetch, OnlineUser, Reply};
use ringline_schema::record::{Answer, Query, Range};

use crate::deletion::walk::DELETER;
use crate::event::{ConnId, Effects, ShardMessage};
use crate::nodes::veil::Then;
use crate::peer::Origin;
use crate::planted::Bug;
use crate::shard::{Question, Shard};

/// What one row of a page may take besides its body: two names and a table.
const ROW_OVERHEAD_BYTES: u32 = 256;

/// Whether what a FETCH asks for next was let go by retention. Who asks from the beginning or for the
/// newest is given what there is; and in a group `first` itself says where its reader goes on, because what is below was
/// perhaps never for him.
pub(crate) fn is_truncated(id: ConversationId, range: &Range, answer: &Answer) -> bool {
    let Answer::Messages { first, .. } = *answer else { return false };
    let begins_below = range.after != Seq::ZERO && range.after.next() < first;
    let ends_below = first > Seq(1) && range.before.is_some_and(|before| before <= first);
    let lost = if range.newest { ends_below } else { begins_below };
    lost && id.kind() == Some(ConversationKind::Direct)
}

impl Shard {
    /// Rows of a page, for what a client asked: never more than fit into half a frame without bodies.
    pub(crate) fn page_rows(&self, asked: u16) -> u16 {
        let fit = (self.config.frame_bytes_max / 2 / ROW_OVERHEAD_BYTES).clamp(1, u32::from(limits::PAGE_ROWS_MAX));
        let asked = if asked == 0 { limits::PAGE_ROWS_DEFAULT } else { asked };
        asked.min(fit as u16)
    }

    /// Whether a client may ask for a page now: its outbox has room and questions can be opened.
    pub(crate) fn may_page(&self, conn: ConnId) -> Result<(), ErrorCode> {
        if self.sessions.room_for_page(conn) && self.may_load() { Ok(()) } else { Err(ErrorCode::Busy) }
    }

    pub(crate) fn fetch(&mut self, conn: ConnId, request_id: u32, fetch: &Fetch<'_>, fx: &mut Effects) {
        let origin = Origin { shard: self.config.shard, conn, request_id };
        if let Err(code) = self.try_fetch(origin, fetch, fx) {
            self.sessions.fail(conn, request_id, code, fx);
        }
    }

    fn try_fetch(&mut self, origin: Origin, fetch: &Fetch<'_>, fx: &mut Effects) -> Result<(), ErrorCode> {
        self.may_page(origin.conn)?;
        let with = UserName::new(fetch.with)?;
        let login = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?;
        // The id is made from the session's own name, so nobody reads a conversation of others; what of a group its
        // reader may see, the store finds out from the memberships, and what the user has deleted for himself.
        let conversation = ConversationId::with(&login.user, &with);
        let unread = with.is_group() && self.planted.is(Bug::MembershipUnread);
        let reader = (!unread).then(|| login.user.clone());
        let range = Range {
            after: Seq(fetch.after.0.saturating_add(self.planted.is(Bug::PageSkipsOne).into())),
            before: fetch.before,
            limit: self.page_rows(fetch.limit),
            bytes_max: self.config.frame_bytes_max / 2,
            newest: fetch.newest,
        };
        let owner = self.owner(conversation.partition());
        if self.is_here(owner) || self.is_moving() {
            let query = Query::Messages { conversation, range, reader };
            self.load(Question::Fetch(origin, conversation, range), query, fx);
        } else if self.is_blocked(owner) {
            return Err(ErrorCode::Busy);
        } else {
            self.tell_shard(owner, ShardMessage::Fetch { origin, conversation, range, reader }, fx);
        }
        Ok(())
    }

    /// The page of a FETCH has come from the store, here or at the owner.
    pub(crate) fn fetched(
        &mut self,
        origin: Origin,
        (id, truncated): (ConversationId, bool),
        answer: Answer,
        fx: &mut Effects,
    ) {
        if !self.is_here(origin.shard) {
            let message = ShardMessage::Fetched { origin, conversation: id, truncated, answer };
            return self.tell_shard(origin.shard, message, fx);
        }
        if origin.conn == DELETER {
            return self.deletion_fetched(origin.request_id, answer, fx);
        }
        if self.stores_are_apart() && self.is_remote(self.owner(id.partition())) {
            let reader = self.sessions.get(origin.conn).and_then(|session| session.login());
            let reader = reader.map(|login| login.user.clone());
            return self.veil((reader, answer), Then::Fetched(origin, id, truncated), fx);
        }
        self.page_fetched(origin, (id, truncated), answer, fx);
    }

    /// A page as its reader is shown it.
    pub(crate) fn page_fetched(
        &mut self,
        origin: Origin,
        (id, truncated): (ConversationId, bool),
        answer: Answer,
        fx: &mut Effects,
    ) {
        if answer == Answer::NotReadable {
            return self.sessions.fail(origin.conn, origin.request_id, ErrorCode::NoSuchGroup, fx);
        }
        let Answer::Messages { first, head, messages } = answer else {
            return self.sessions.fail(origin.conn, origin.request_id, self.unread(), fx);
        };
        if truncated {
            self.kept_from(origin.conn, id, first, fx);
            let reply = Reply::Chat(ChatReply::Truncated { conversation: id, first });
            return self.sessions.answer(origin.conn, origin.request_id, &reply, fx);
        }
        if let Some(login) = self.sessions.login_mut(origin.conn)
            && let Some(last) = messages.last()
        {
            login.show(id, last.seq);
        }
        self.kept_from(origin.conn, id, first, fx);
        let first = Seq(first.0.saturating_add(self.planted.is(Bug::FirstOneHigh).into()));
        let messages = messages.iter().map(|message| message.as_wire()).collect();
        let reply = Reply::FetchOk { conversation: id, first, head, messages };
        self.sessions.answer(origin.conn, origin.request_id, &reply, fx);
    }

    /// The online list goes shard by shard: its cursor is `"<shard>/<last name>"`.
    pub(crate) fn online(&mut self, conn: ConnId, request_id: u32, (cursor, limit): (&str, u16), fx: &mut Effects) {
        let origin = Origin { shard: self.config.shard, conn, request_id };
        let limit = self.page_rows(limit);
        let started = self.may_page(conn).and_then(|()| self.online_place(cursor));
        match started {
            Err(code) => self.sessions.fail(conn, request_id, code, fx),
            Ok((shard, after)) if self.is_here(shard) => self.online_part(origin, (after, limit), fx),
            Ok((shard, _)) if self.is_blocked(shard) => self.sessions.fail(conn, request_id, ErrorCode::Busy, fx),
            Ok((shard, after)) => self.tell_shard(shard, ShardMessage::Online { origin, after, limit }, fx),
        }
    }

    fn online_place(&self, cursor: &str) -> Result<(ShardIndex, Option<UserName>), ErrorCode> {
        if cursor.is_empty() {
            return Ok((self.next_listed(None).unwrap_or(self.config.shard), None));
        }
        let (shard, name) = cursor.split_once('/').ok_or(ErrorCode::BadRequest)?;
        let shard: u16 = shard.parse().map_err(|_| ErrorCode::BadRequest)?;
        let shard = ShardIndex(shard);
        if !self.is_here(shard) && !self.other_shards().contains(&shard) {
            return Err(ErrorCode::BadRequest);
        }
        let after = if name.is_empty() { None } else { Some(UserName::new(name)?) };
        Ok((shard, after))
    }

    /// This shard's part of the online list.
    pub(crate) fn online_part(&mut self, origin: Origin, (after, limit): (Option<UserName>, u16), fx: &mut Effects) {
        let mut names = self.online.listed_after(after.as_ref());
        let users: Vec<_> = names
            .by_ref()
            .take(usize::from(limit))
            .map(|name| (name.clone(), self.online.get(name).map_or(0, |conns| conns.len() as u16)))
            .collect();
        let more = names.next().is_some();
        if self.is_here(origin.shard) {
            self.online_page(origin, self.config.shard, (users, more), fx);
        } else {
            self.tell_shard(origin.shard, ShardMessage::OnlinePage { origin, users, more }, fx);
        }
    }

    pub(crate) fn online_page(
        &mut self,
        origin: Origin,
        from: ShardIndex,
        (users, more): (Vec<(UserName, u16)>, bool),
        fx: &mut Effects,
    ) {
        let next = if more {
            let last = users.last().map_or("", |(name, _)| name.as_str());
            format!("{}/{last}", from.0)
        } else {
            self.next_listed(Some(from)).map_or(String::new(), |next| format!("{}/", next.0))
        };
        let users = users.iter().map(|(name, devices)| OnlineUser { user: name.as_str(), devices: *devices }).collect();
        self.sessions.answer(origin.conn, origin.request_id, &Reply::OnlineOk { users, next: &next }, fx);
    }
}
