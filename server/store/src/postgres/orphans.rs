//! Rows about messages that retention has let go of: what they became, and who has deleted them for himself. Used by the
//! [`super::retainer`] alone.
//!
//! A look through these rows goes some at a time, a part of it each pass, and begins again when floors have risen. A row
//! stays as long as anything that it changes is shown: an amendment is a message of its own and may be kept when its
//! original is gone. A row goes by the owner of its partition; whose conversation it is about does not matter.

use std::collections::HashMap;

use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::rows::{RowKey, RowValue};

use super::errors::WriteError;
use super::held::Held;
use super::retainer::{Session, Value};
use super::values::{Id, behind, number};

/// Rows that one pass looks at, and those of one statement.
const ROWS_MAX: usize = 65_536;
const PAGE: usize = 512;
/// The tables, in order of key.
const TABLES: [&[u8]; 2] = [b"a", b"h"];
/// Looks after a rise of floors: the one that is under way may be past some of them.
const LOOKS: u8 = 2;

/// See the module.
pub(super) struct Orphans {
    /// Looks that are still to be ended.
    looks: u8,
    /// The last row that this one has seen.
    after: Vec<u8>,
}

impl Default for Orphans {
    fn default() -> Self {
        // Floors may have risen before the start.
        Self { looks: 1, after: Vec::new() }
    }
}

/// A row that is seen.
struct Seen {
    key: RowKey,
    encoded: Vec<u8>,
    stamp: i64,
}

impl Orphans {
    /// Drops what is found in the next rows. `risen`: floors have risen since the last call. Returns how many went.
    pub async fn drop_some(&mut self, session: &Session, (risen, held): (bool, &Held)) -> Result<u64, WriteError> {
        if risen {
            self.looks = LOOKS;
        }
        let (mut left, mut dropped) = (ROWS_MAX, 0);
        if self.looks == 0 {
            return Ok(0);
        }
        for table in TABLES {
            if !self.after.is_empty() && self.after.as_slice() > table && !self.after.starts_with(table) {
                continue;
            }
            let (mut after, end) = (std::mem::take(&mut self.after).max(table.to_vec()), behind(table));
            while left > 0 {
                let page = rows(session, (&after, &end)).await?;
                left = left.saturating_sub(page.len());
                dropped += drop_of(session, &page, held).await?;
                let is_last = page.len() < PAGE;
                if let Some(last) = page.into_iter().next_back() {
                    after = last.encoded;
                }
                if is_last {
                    break;
                }
            }
            if left == 0 {
                self.after = after;
                return Ok(dropped);
            }
        }
        self.looks -= 1;
        Ok(dropped)
    }
}

async fn rows(session: &Session, (after, end): (&[u8], &[u8])) -> Result<Vec<Seen>, WriteError> {
    let values: [Value<'_>; 3] = [&after, &end, &(PAGE as i64)];
    let mut seen = Vec::with_capacity(PAGE);
    for row in session.connection.client.query(&session.retains.rows, &values).await? {
        let encoded: Vec<u8> = row.try_get(0)?;
        let key = RowKey::decode(&encoded).map_err(|_| WriteError::Damaged("a row key"))?;
        seen.push(Seen { key, encoded, stamp: row.try_get(1)? });
    }
    Ok(seen)
}

/// Drops those of a page that are ours and tell of nothing that is shown.
async fn drop_of(session: &Session, page: &[Seen], held: &Held) -> Result<u64, WriteError> {
    let epochs = held.epochs();
    let is_ours = |seen: &&Seen| epochs.contains_key(&(seen.key.partition().number() as i16));
    let ours: Vec<(&Seen, ConversationId, Seq)> = page
        .iter()
        .filter(is_ours)
        .filter_map(|seen| {
            let (RowKey::Amended(id, seq) | RowKey::Hidden(_, id, seq)) = seen.key else { return None };
            Some((seen, id, seq))
        })
        .collect();
    if ours.is_empty() {
        return Ok(0);
    }
    let firsts = firsts(session, ours.iter().map(|(_, id, _)| *id).collect()).await?;
    let first = |id: &ConversationId| firsts.get(id).copied().unwrap_or(Seq::ZERO);
    let below: Vec<_> = ours.into_iter().filter(|(_, id, seq)| *seq < first(id)).collect();
    if below.is_empty() {
        return Ok(0);
    }
    let amended = amended(session, &below).await?;
    // The amendment that it tells of, or hides, may be shown.
    let is_shown = |id: &ConversationId, seq: &Seq| amended.get(&(*id, *seq)).is_some_and(|by| *by >= first(id));
    let gone: Vec<&Seen> = below.iter().filter(|(_, id, seq)| !is_shown(id, seq)).map(|(seen, ..)| *seen).collect();
    let mut partitions: Vec<i16> = gone.iter().map(|seen| seen.key.partition().number() as i16).collect();
    partitions.sort_unstable();
    partitions.dedup();
    if gone.is_empty() || !session.open((&partitions, 0), held).await? {
        return Ok(0);
    }
    let keys: Vec<&[u8]> = gone.iter().map(|seen| seen.encoded.as_slice()).collect();
    let stamps: Vec<i64> = gone.iter().map(|seen| seen.stamp).collect();
    let client = &session.connection.client;
    let dropped = client.execute(&session.retains.drop_rows, &[&keys, &stamps]).await?;
    client.batch_execute("COMMIT").await?;
    Ok(dropped)
}

/// The first message of each conversation that is shown.
async fn firsts(
    session: &Session,
    mut conversations: Vec<ConversationId>,
) -> Result<HashMap<ConversationId, Seq>, WriteError> {
    conversations.sort_unstable();
    conversations.dedup();
    let ids: Vec<Id> = conversations.into_iter().map(Id::from).collect();
    let mut firsts = HashMap::with_capacity(ids.len());
    for row in session.connection.client.query(&session.retains.firsts, &[&ids]).await? {
        let first: Option<i64> = row.try_get(1)?;
        firsts.insert(ConversationId(row.try_get::<_, Id>(0)?.0), first.map_or(Seq::ZERO, |first| Seq(number(first))));
    }
    Ok(firsts)
}

/// Which messages these became, by which others.
async fn amended(
    session: &Session,
    below: &[(&Seen, ConversationId, Seq)],
) -> Result<HashMap<(ConversationId, Seq), Seq>, WriteError> {
    let keys: Vec<Vec<u8>> = below.iter().map(|(_, id, seq)| RowKey::Amended(*id, *seq).encode()).collect();
    let mut amended = HashMap::new();
    for row in session.connection.client.query(&session.retains.values, &[&keys]).await? {
        let damaged = |_| WriteError::Damaged("what a message has become");
        let key = RowKey::decode(row.try_get(0)?).map_err(damaged)?;
        let value = RowValue::decode(&key, row.try_get(1)?).map_err(damaged)?;
        if let (RowKey::Amended(id, seq), RowValue::Amended(row)) = (key, value) {
            amended.insert((id, seq), row.by);
        }
    }
    Ok(amended)
}
