//! What a user has deleted for himself, laid over messages that another node keeps. Owned by the shard of the user.
//!
//! The store of a node shows its readers what they may see, by rows that are beside the messages; the rows of
//! [`crate::hide`] are not, because they belong to the user, and only the user's own node writes and has them. So what comes
//! from another node goes through here before anybody sees it: the rows of the conversation, from the first that this page could
//! need, are read page by page. Invariant: a page goes on once, as it should be shown, or as `Failed`.

use std::collections::BTreeSet;

use ringline_schema::ids::{ConversationId, Seq, UserName};
use ringline_schema::record::{Answer, Query, StoredMessage};
use ringline_schema::rows::{Row, RowKey, RowList};

use crate::event::Effects;
use crate::peer::Origin;
use crate::shard::{Question, Shard};

/// Rows of one question.
const ROWS_MAX: u16 = 256;

/// Where messages go from here.
#[derive(Debug)]
pub(crate) enum Then {
    /// The page of a FETCH, and whether what it asked for was let go.
    Fetched(Origin, ConversationId, bool),
    Answer(Question),
}

/// A page that waits for the rows of its reader.
#[derive(Debug)]
pub(crate) struct Veil {
    reader: UserName,
    conversation: ConversationId,
    /// The last message that a row may be about.
    last: Seq,
    hidden: BTreeSet<Seq>,
    answer: Answer,
    then: Then,
}

/// The message that a row of this reader would hide: itself, or what it amends.
fn shown_as(message: &StoredMessage) -> Seq {
    message.amends().map_or(message.seq, |(of, _)| of)
}

impl Shard {
    /// Passes messages of another node on as their reader is shown them; what is no messages, as it is.
    pub(crate) fn veil(&mut self, (reader, answer): (Option<UserName>, Answer), then: Then, fx: &mut Effects) {
        let Answer::Messages { messages, .. } = &answer else { return self.veiled(answer, then, fx) };
        let places = messages.iter().map(shown_as);
        let (Some(first), Some(last), Some(reader)) = (places.clone().min(), places.max(), reader) else {
            return self.veiled(answer, then, fx);
        };
        let Some(conversation) = messages.first().map(|message| message.conversation) else { return };
        let veil = Veil { reader, conversation, last, hidden: BTreeSet::new(), answer, then };
        self.veil_on(Box::new(veil), Seq(first.0.saturating_sub(1)), fx);
    }

    fn veil_on(&mut self, veil: Box<Veil>, after: Seq, fx: &mut Effects) {
        let (user, id) = (veil.reader.clone(), veil.conversation);
        let (list, after) = (RowList::Hidden(user.clone(), id), Some(RowKey::Hidden(user, id, after)));
        self.load(Question::Veil(veil), Query::Rows { list, after, limit: ROWS_MAX }, fx);
    }

    pub(crate) fn veil_loaded(&mut self, mut veil: Box<Veil>, answer: Answer, fx: &mut Effects) {
        let Answer::Rows(rows) = answer else { return self.veiled(Answer::Failed, veil.then, fx) };
        let of = |row: &Row| if let RowKey::Hidden(_, _, seq) = row.key { Some(seq) } else { None };
        veil.hidden.extend(rows.iter().filter_map(of));
        if let Some(end) = rows.last().and_then(of).filter(|end| *end < veil.last)
            && rows.len() >= usize::from(ROWS_MAX)
        {
            return self.veil_on(veil, end, fx);
        }
        let Veil { hidden, answer, then, .. } = *veil;
        let Answer::Messages { first, head, messages } = answer else { return };
        let shown = |message: StoredMessage| match message.amends() {
            Some((of, _)) if hidden.contains(&of) => message.without_news(),
            None if hidden.contains(&message.seq) => message.hidden(),
            Some(_) | None => message,
        };
        let messages = messages.into_iter().map(shown).collect();
        self.veiled(Answer::Messages { first, head, messages }, then, fx);
    }

    fn veiled(&mut self, answer: Answer, then: Then, fx: &mut Effects) {
        match then {
            Then::Fetched(origin, id, truncated) => self.page_fetched(origin, (id, truncated), answer, fx),
            Then::Answer(question) => self.answered(question, answer, fx),
        }
    }
}
