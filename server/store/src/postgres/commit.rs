//! One commit: a transaction of a few statements for all that a shard has queued. On the side thread.
//!
//! In two flights. The first has everything but the end: it counts the commit, holds the partitions, writes the rows. The
//! second, `COMMIT`, is sent only when every answer of the first is as it must be. So nobody but this session can end the
//! transaction, and a later session that finds the count knows what became of it.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, Row, Statement};

use super::batch::{Columns, Messages};
use super::errors::WriteError;
use super::held::Epochs;
use super::session::Session;

/// A parameter of a statement.
type Value<'a> = &'a (dyn ToSql + Sync);

/// Writes `columns` as commit `number` of the session's writer, all or nothing.
///
/// Errors: `Fenced` and `Conflict` when nothing was written; after one of the database, whether it was is unknown.
pub(super) async fn write(
    session: &Session,
    columns: &Columns<'_>,
    (number, epochs): (i64, &Epochs),
) -> Result<(), WriteError> {
    let (client, writes) = (&session.write.client, &session.writes);
    let writer = session.writer;
    let count: [Value<'_>; 5] = [&writer.owner, &writer.shard, &session.begun.epoch, &number, &columns.messages.bytes];
    let hold: [Value<'_>; 2] = [&columns.partitions, &writer.owner];
    // Polled in this order, and each is on its way with its first poll: so they are sent in this order.
    let (begun, counted, held, written) = tokio::join!(
        biased;
        client.batch_execute("BEGIN"),
        client.execute(&writes.count, &count),
        client.query(&writes.hold, &hold),
        rows(session, columns),
    );
    begun?;
    if counted? != 1 || !are_held(&held?, &columns.partitions, epochs)? {
        client.batch_execute("ROLLBACK").await?;
        return Err(session.fenced(&columns.partitions).await);
    }
    if written? < columns.messages.seq.len() as u64 {
        compare(session, &columns.messages).await?;
    }
    Ok(client.batch_execute("COMMIT").await?)
}

/// Whether all partitions are ours, at the epochs at which they were taken over.
pub(super) fn are_held(held: &[Row], wanted: &[i16], epochs: &Epochs) -> Result<bool, Error> {
    for row in held {
        let (partition, epoch): (i16, i64) = (row.try_get(0)?, row.try_get(1)?);
        if epochs.get(&partition) != Some(&epoch) {
            return Ok(false);
        }
    }
    Ok(held.len() == wanted.len())
}

/// Sends the rows of all tables at once. Returns how many messages were not there before.
async fn rows(session: &Session, columns: &Columns<'_>) -> Result<u64, Error> {
    let writes = &session.writes;
    let Columns { partitions: _, users, conversations, lists, messages, dropped, cursors, keyed } = columns;
    let users_in: [Value<'_>; 3] = [&users.name, &users.password_hash, &users.created_ms];
    let conversations_in: [Value<'_>; 4] =
        [&conversations.conversation, &conversations.one, &conversations.other, &conversations.created_ms];
    let lists_in: [Value<'_>; 2] = [&lists.name, &lists.conversation];
    let dropped_in: [Value<'_>; 3] = [&dropped.device_key, &dropped.key, &dropped.stamp];
    let cursors_in: [Value<'_>; 3] = [&cursors.device_key, &cursors.conversation, &cursors.seq];
    let keyed_in: [Value<'_>; 3] = [&keyed.key, &keyed.stamp, &keyed.value];
    let messages_in = parameters(messages);
    let (users, conversations, lists, messages, dropped, cursors, keyed) = tokio::join!(
        biased;
        insert(session, &writes.users, (users.name.len(), &users_in)),
        insert(session, &writes.conversations, (conversations.conversation.len(), &conversations_in)),
        insert(session, &writes.lists, (lists.name.len(), &lists_in)),
        insert(session, &writes.messages, (messages.seq.len(), &messages_in)),
        insert(session, &writes.dropped, (dropped.key.len(), &dropped_in)),
        insert(session, &writes.cursors, (cursors.seq.len(), &cursors_in)),
        insert(session, &writes.keyed, (keyed.key.len(), &keyed_in)),
    );
    // The first that failed says why; those behind it only that the transaction is over.
    users?;
    conversations?;
    lists?;
    let messages = messages?;
    dropped?;
    cursors?;
    keyed?;
    Ok(messages)
}

/// Nothing is sent for no rows.
async fn insert(
    session: &Session,
    statement: &Statement,
    (rows, parameters): (usize, &[Value<'_>]),
) -> Result<u64, Error> {
    if rows == 0 {
        return Ok(0);
    }
    session.write.client.execute(statement, parameters).await
}

/// A message that is there already is no error if it is the same.
async fn compare(session: &Session, messages: &Messages<'_>) -> Result<(), WriteError> {
    let client = &session.write.client;
    let Some(row) = client.query_opt(&session.writes.differing, &parameters(messages)).await? else { return Ok(()) };
    let (conversation, seq) = (row.try_get(0)?, row.try_get(1)?);
    client.batch_execute("ROLLBACK").await?;
    Err(WriteError::Conflict { conversation, seq })
}

fn parameters<'a>(messages: &'a Messages<'_>) -> [Value<'a>; 12] {
    [
        &messages.conversation,
        &messages.seq,
        &messages.device,
        &messages.client_seq,
        &messages.time_ms,
        &messages.body_hash,
        &messages.device_key,
        &messages.kind,
        &messages.sender,
        &messages.receiver,
        &messages.body,
        &messages.extra,
    ]
}
