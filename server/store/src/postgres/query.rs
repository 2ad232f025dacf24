//! Answers to the core's questions, from the tables. On the side thread of the node.
//!
//! A question is one statement or a few that do not depend on each other wherever that is possible. Where several are
//! needed, what is read first bounds what is read later, so a commit in between is seen whole or not at all.

use std::collections::HashMap;

use bytes::Bytes;
use ringline_schema::ids::{ConversationId, ConversationKind, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::limits::DUPLICATE_WINDOW;
use ringline_schema::message::{BodyKind, Standing};
use ringline_schema::record::{
    Accepted, Answer, ConversationRow, Head, Query, Range, StoredExtra, StoredMessage, User,
};
use ringline_schema::rows::{AmendedRow, GroupRow, MarkRow, MemberRow, ReceiptRow, Row, RowKey, RowList, RowValue};
use tokio_postgres::Row as Found;
use tokio_postgres::types::ToSql;

use super::errors::QueryError;
use super::session::Session;
use super::values::{Id, behind, bound, name, number, stored};
use crate::shown::{self, Reader};
use crate::{readable, span};

type Result<T> = std::result::Result<T, QueryError>;

/// Answers a question. Errors: the connection is lost, or what is stored does not read.
pub(super) async fn answer(session: &Session, query: &Query) -> Result<Answer> {
    Ok(match query {
        Query::User { name } => Answer::User(user(session, name).await?),
        Query::Head { conversation, device } => Answer::Head(head(session, *conversation, *device).await?),
        Query::Messages { conversation, range, reader } => match reader {
            Some(reader) if conversation.kind() == Some(ConversationKind::Group) => {
                messages_for(session, *conversation, (range, reader)).await?
            }
            reader => messages(session, *conversation, (range, reader.as_ref())).await?,
        },
        Query::Row { key } => Answer::Row(row(session, key).await?),
        Query::Rows { list, after, limit } => Answer::Rows(rows(session, list, (after.as_ref(), *limit)).await?),
        Query::GroupCount { user } => Answer::Count(group_count(session, user).await?),
        Query::Listed { user, device, rows } => Answer::Conversations(laid_over(session, user, (*device, rows)).await?),
        Query::Conversations { user, device, cursor, limit } => {
            Answer::Conversations(conversations(session, user, (*device, *cursor, *limit)).await?)
        }
    })
}

async fn user(session: &Session, wanted: &UserName) -> Result<Option<User>> {
    let found = session.read.client.query_opt(&session.reads.user, &[&wanted.as_str()]).await?;
    let Some(found) = found else { return Ok(None) };
    let (password_hash, created_ms) = (found.try_get(0)?, number(found.try_get(1)?));
    Ok(Some(User { name: wanted.clone(), password_hash, created_ms }))
}

/// The first and the last message, from the oldest and the newest that are kept and the floor below which nothing is.
fn ends(floor: Option<i64>, first: Option<i64>, last: Option<i64>) -> (Seq, Seq) {
    let floor = floor.map_or(0, number);
    let seq = |stored: Option<i64>, without: u64| Seq(stored.map_or(without, number));
    (seq(first, floor), seq(last, floor.saturating_sub(1)))
}

async fn head(session: &Session, conversation: ConversationId, device: DeviceKey) -> Result<Head> {
    let window = DUPLICATE_WINDOW as i64;
    let parameters: [&(dyn ToSql + Sync); 3] = [&Id::from(conversation), &Id::from(device), &window];
    let found = session.read.client.query(&session.reads.head, &parameters).await?;
    let Some(one) = found.first() else { return Ok(Head::default()) };
    let (first, last) = ends(one.try_get(1)?, one.try_get(2)?, one.try_get(3)?);
    let exists = one.try_get(0)? || last != Seq::ZERO;
    let mut filter = Vec::with_capacity(found.len());
    for row in found.iter().rev() {
        let Some(client_seq) = row.try_get::<_, Option<i64>>(4)? else { continue };
        let (seq, time_ms) = (Seq(number(row.try_get(5)?)), number(row.try_get(6)?));
        filter.push(Accepted { client_seq: number(client_seq), seq, time_ms, body_hash: number(row.try_get(7)?) });
    }
    Ok(Head { exists, first, head: last, filter })
}

/// First, last, and the value of the row that was asked for beside them.
async fn bounds(session: &Session, conversation: ConversationId, key: &[u8]) -> Result<(Seq, Seq, Option<Vec<u8>>)> {
    let found = session.read.client.query_one(&session.reads.bounds, &[&Id::from(conversation), &key]).await?;
    let (first, last) = ends(found.try_get(0)?, found.try_get(1)?, found.try_get(2)?);
    Ok((first, last, found.try_get(3)?))
}

async fn messages(
    session: &Session,
    conversation: ConversationId,
    (range, user): (&Range, Option<&UserName>),
) -> Result<Answer> {
    // Both at once: the bounds are read first, and what was committed in between is left to the next page.
    let (ends, page) = tokio::join!(biased; bounds(session, conversation, &[]), page(session, conversation, range));
    let ((first, head, _), mut page) = (ends?, page?);
    page.retain(|message| message.seq <= head);
    let messages = show(session, page, (range, Reader { user, member: None })).await?;
    Ok(Answer::Messages { first, head, messages })
}

async fn messages_for(
    session: &Session,
    conversation: ConversationId,
    (range, reader): (&Range, &UserName),
) -> Result<Answer> {
    let key = RowKey::Member(conversation, reader.clone());
    let (first, head, value) = bounds(session, conversation, &key.encode()).await?;
    let member = match value.map(|value| RowValue::decode(&key, &value)).transpose()? {
        Some(RowValue::Member(member)) if !member.ranges.is_empty() => member,
        Some(_) | None => return Ok(Answer::NotReadable),
    };
    let part = readable(&member, (first, head), range);
    let page = page(session, conversation, &part.range).await?;
    let reader = Reader { user: Some(reader), member: Some(&member) };
    let messages = show(session, page, (&part.range, reader)).await?;
    Ok(Answer::Messages { first: part.first, head: part.head, messages })
}

/// Messages of a range as they were sent, in rising order.
async fn page(session: &Session, conversation: ConversationId, range: &Range) -> Result<Vec<StoredMessage>> {
    if range.limit == 0 {
        return Ok(Vec::new());
    }
    let statement = if range.newest { &session.reads.newest } else { &session.reads.oldest };
    let before = range.before.map_or(i64::MAX, bound);
    let (after, limit, bytes_max) = (bound(range.after), i64::from(range.limit), i64::from(range.bytes_max));
    let parameters: [&(dyn ToSql + Sync); 5] = [&Id::from(conversation), &after, &before, &limit, &bytes_max];
    let found = session.read.client.query(statement, &parameters).await?;
    let mut messages = found.iter().map(|row| message(conversation, row)).collect::<Result<Vec<_>>>()?;
    if range.newest {
        messages.reverse();
    }
    Ok(messages)
}

fn message(conversation: ConversationId, row: &Found) -> Result<StoredMessage> {
    let kind = u8::try_from(row.try_get::<_, i16>(4)?).ok().and_then(BodyKind::from_number);
    let extra: Option<&[u8]> = row.try_get(8)?;
    Ok(StoredMessage {
        conversation,
        seq: Seq(number(row.try_get(0)?)),
        device: DeviceId(number(row.try_get(1)?)),
        client_seq: number(row.try_get(2)?),
        time_ms: number(row.try_get(3)?),
        kind: kind.ok_or(QueryError::Damaged("the kind of a message"))?,
        from: name(row.try_get(5)?)?,
        to: name(row.try_get(6)?)?,
        body: Bytes::copy_from_slice(row.try_get(7)?),
        extra: extra.map(StoredExtra::decode).transpose()?.map(Box::new),
    })
}

/// What the messages of a page have become for its reader.
#[derive(Default)]
struct Changed {
    amended: HashMap<Seq, AmendedRow>,
    hidden: std::collections::HashSet<Seq>,
    /// Bodies of the edits that stand in the place of originals, by their own seqs.
    edits: HashMap<Seq, Bytes>,
}

async fn show(
    session: &Session,
    page: Vec<StoredMessage>,
    (range, reader): (&Range, Reader<'_>),
) -> Result<Vec<StoredMessage>> {
    let Some(conversation) = page.first().map(|message| message.conversation) else { return Ok(page) };
    let changed = changed(session, (conversation, &page), reader).await?;
    let shown: Vec<_> = page.into_iter().map(|message| shown_as(message, &changed, reader)).collect();
    let mut bytes = 0;
    let mut fits = |message: &StoredMessage| {
        let is_first = bytes == 0;
        bytes += message.bytes().max(1);
        is_first || bytes <= range.bytes_max as usize
    };
    if range.newest {
        let mut kept: Vec<_> = shown.into_iter().rev().take_while(&mut fits).collect();
        kept.reverse();
        return Ok(kept);
    }
    Ok(shown.into_iter().take_while(&mut fits).collect())
}

async fn changed(
    session: &Session,
    (conversation, page): (ConversationId, &[StoredMessage]),
    reader: Reader<'_>,
) -> Result<Changed> {
    // Of an amendment it is its original that counts.
    let mut seqs: Vec<Seq> = page.iter().map(|message| message.amends().map_or(message.seq, |(of, _)| of)).collect();
    seqs.sort_unstable();
    seqs.dedup();
    let mut keys: Vec<Vec<u8>> = seqs.iter().map(|seq| RowKey::Amended(conversation, *seq).encode()).collect();
    if let Some(user) = reader.user {
        keys.extend(seqs.iter().map(|seq| RowKey::Hidden(user.clone(), conversation, *seq).encode()));
    }
    let mut changed = Changed::default();
    for row in session.read.client.query(&session.reads.values, &[&keys]).await? {
        let key = RowKey::decode(row.try_get(0)?)?;
        match (&key, RowValue::decode(&key, row.try_get(1)?)?) {
            (RowKey::Amended(_, seq), RowValue::Amended(row)) => drop(changed.amended.insert(*seq, row)),
            (RowKey::Hidden(_, _, seq), RowValue::Hidden) => drop(changed.hidden.insert(*seq)),
            _ => return Err(QueryError::Damaged("what a message has become")),
        }
    }
    let edits: Vec<i64> =
        changed.amended.values().filter_map(|row| reader.edit(row)).map(|seq| stored(seq.0)).collect();
    if !edits.is_empty() {
        let found = session.read.client.query(&session.reads.bodies, &[&Id::from(conversation), &edits]).await?;
        for row in found {
            let (seq, body) = (Seq(number(row.try_get(0)?)), Bytes::copy_from_slice(row.try_get(1)?));
            drop(changed.edits.insert(seq, body));
        }
    }
    Ok(changed)
}

/// One message as its reader is shown it.
fn shown_as(message: StoredMessage, changed: &Changed, reader: Reader<'_>) -> StoredMessage {
    let row = |seq: Seq| changed.amended.get(&seq);
    match (message.amends(), row(message.seq)) {
        (Some((of, _)), _) => shown::amendment(message, row(of).filter(|_| !changed.hidden.contains(&of))),
        (None, _) if changed.hidden.contains(&message.seq) => message.hidden(),
        (None, Some(row)) => {
            let body = reader.edit(row).and_then(|by| changed.edits.get(&by)).cloned();
            let edit = body.map(|body| StoredMessage { body, ..message.clone() });
            shown::original(message, row, edit)
        }
        (None, None) => message,
    }
}

async fn row(session: &Session, key: &RowKey) -> Result<Option<Row>> {
    let found = session.read.client.query_opt(&session.reads.row, &[&key.encode()]).await?;
    found.map(|row| keyed(&row)).transpose()
}

async fn rows(session: &Session, list: &RowList, (after, limit): (Option<&RowKey>, u16)) -> Result<Vec<Row>> {
    let prefix = list.prefix();
    let end = behind(&prefix);
    // Every key of the list is longer than its prefix.
    let after = after.map_or_else(|| prefix.clone(), RowKey::encode).max(prefix);
    let found = session.read.client.query(&session.reads.rows, &[&after, &end, &i64::from(limit)]).await?;
    found.iter().map(keyed).collect()
}

fn keyed(row: &Found) -> Result<Row> {
    let key = RowKey::decode(row.try_get(0)?)?;
    let value = RowValue::decode(&key, row.try_get(2)?)?;
    Ok(Row { key, stamp: number(row.try_get(1)?), value: Some(value) })
}

async fn group_count(session: &Session, user: &UserName) -> Result<u32> {
    let name = user.as_str();
    let found = session.read.client.query(&session.reads.groups, &[&name, &name.as_bytes()]).await?;
    let mut count = 0;
    for row in &found {
        let conversation = ConversationId(row.try_get::<_, Id>(0)?.0);
        let member: MemberRow = member(conversation, user, row.try_get(1)?)?;
        let group = group(conversation, row.try_get(2)?)?;
        count += u32::from(member.standing == Standing::Member && group.dissolved == Seq::ZERO);
    }
    Ok(count)
}

fn member(conversation: ConversationId, user: &UserName, value: &[u8]) -> Result<MemberRow> {
    let RowValue::Member(member) = RowValue::decode(&RowKey::Member(conversation, user.clone()), value)? else {
        return Err(QueryError::Damaged("a membership"));
    };
    Ok(member)
}

fn group(conversation: ConversationId, value: &[u8]) -> Result<GroupRow> {
    let RowValue::Group(group) = RowValue::decode(&RowKey::Group(conversation), value)? else {
        return Err(QueryError::Damaged("a group"));
    };
    Ok(group)
}

fn mark(user: &UserName, conversation: ConversationId, value: Option<&[u8]>) -> Result<MarkRow> {
    let key = || RowKey::Mark(user.clone(), conversation);
    match value.map(|value| RowValue::decode(&key(), value)).transpose()? {
        Some(RowValue::Mark(mark)) => Ok(mark),
        Some(_) => Err(QueryError::Damaged("a mark")),
        None => Ok(MarkRow::default()),
    }
}

fn receipt(user: &UserName, conversation: ConversationId, value: Option<&[u8]>) -> Result<ReceiptRow> {
    let key = || RowKey::Receipt(conversation, user.clone());
    match value.map(|value| RowValue::decode(&key(), value)).transpose()? {
        Some(RowValue::Receipt(receipt)) => Ok(receipt),
        Some(_) => Err(QueryError::Damaged("a receipt")),
        None => Ok(ReceiptRow::default()),
    }
}

/// Rows of another node with what is kept here of the user.
async fn laid_over(
    session: &Session,
    user: &UserName,
    (device, given): (DeviceKey, &[ConversationRow]),
) -> Result<Vec<ConversationRow>> {
    let ids: Vec<Id> = given.iter().map(|row| row.conversation.into()).collect();
    let keys: Vec<_> = given.iter().map(|row| RowKey::Mark(user.clone(), row.conversation).encode()).collect();
    let (client, reads) = (&session.read.client, &session.reads);
    let device = Id::from(device);
    let (cursors_in, values_in): ([&(dyn ToSql + Sync); 2], _) = ([&device, &ids], [&keys as _]);
    let (cursors, marks) =
        tokio::join!(client.query(&reads.cursors, &cursors_in), client.query(&reads.values, &values_in));
    let mut rows: HashMap<ConversationId, ConversationRow> =
        given.iter().map(|row| (row.conversation, row.clone())).collect();
    for found in cursors? {
        if let Some(row) = rows.get_mut(&ConversationId(found.try_get::<_, Id>(0)?.0)) {
            row.acked = row.acked.max(Seq(number(found.try_get(1)?)));
        }
    }
    for found in marks? {
        let RowKey::Mark(_, conversation) = RowKey::decode(found.try_get(0)?)? else { continue };
        let mark = mark(user, conversation, Some(found.try_get(1)?))?;
        if let Some(row) = rows.get_mut(&conversation) {
            (row.pinned, row.muted_until_ms) = (mark.pinned, mark.muted_until_ms);
        }
    }
    Ok(given.iter().filter_map(|row| rows.get(&row.conversation).cloned()).collect())
}

async fn conversations(
    session: &Session,
    user: &UserName,
    (device, cursor, limit): (DeviceKey, ConversationId, u16),
) -> Result<Vec<ConversationRow>> {
    let (name, limit) = (user.as_str(), usize::from(limit));
    let marks = RowList::Marks(user.clone()).prefix();
    let (mut rows, mut cursor) = (Vec::new(), cursor);
    // Conversations of which there is no row any more are on the list and no part of it: an empty page is its end.
    while rows.len() < limit {
        let wanted = (limit - rows.len()) as i64;
        let parameters: [&(dyn ToSql + Sync); 6] =
            [&name, &Id::from(cursor), &wanted, &Id::from(device), &name.as_bytes(), &marks];
        let found = session.read.client.query(&session.reads.conversations, &parameters).await?;
        let Some(last) = found.last() else { break };
        cursor = ConversationId(last.try_get::<_, Id>(0)?.0);
        for row in &found {
            rows.extend(listed(user, row)?);
        }
    }
    Ok(rows)
}

/// A row of a user's list; `None`: it is no part of it any more.
fn listed(user: &UserName, row: &Found) -> Result<Option<ConversationRow>> {
    let conversation = ConversationId(row.try_get::<_, Id>(0)?.0);
    let (first, head) = ends(row.try_get(4)?, row.try_get(6)?, row.try_get(7)?);
    let (created_ms, gone_ms): (Option<i64>, Option<i64>) = (row.try_get(3)?, row.try_get(5)?);
    let without = gone_ms.filter(|gone_ms| *gone_ms != 0).or(created_ms);
    let last_time_ms = row.try_get::<_, Option<i64>>(8)?.or(without).map_or(0, number);
    let mark = mark(user, conversation, row.try_get(13)?)?;
    let listed = ConversationRow {
        conversation,
        with: user.clone(),
        first,
        head,
        last_time_ms,
        acked: Seq(row.try_get::<_, Option<i64>>(9)?.map_or(0, number)),
        read: receipt(user, conversation, row.try_get(12)?)?.read,
        pinned: mark.pinned,
        muted_until_ms: mark.muted_until_ms,
        standing: None,
        title: String::new(),
    };
    if conversation.kind() == Some(ConversationKind::Group) {
        let (Some(group_value), Some(member_value)) = (row.try_get(10)?, row.try_get(11)?) else { return Ok(None) };
        let (group, member) = (group(conversation, group_value)?, member(conversation, user, member_value)?);
        let (first, head) = span(&member, (first, head));
        let is_member = member.standing == Standing::Member;
        let last_time_ms = if is_member { last_time_ms } else { member.since_ms };
        let (with, title, standing) = (group.name, group.title, Some(member.standing));
        return Ok(Some(ConversationRow { with, first, head, last_time_ms, title, standing, ..listed }));
    }
    let (Some(one), Some(other)) = (row.try_get::<_, Option<&str>>(1)?, row.try_get::<_, Option<&str>>(2)?) else {
        return Ok(None);
    };
    Ok(Some(ConversationRow { with: name(if one == user.as_str() { other } else { one })?, ..listed }))
}
