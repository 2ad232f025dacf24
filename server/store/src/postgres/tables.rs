//! The tables: made and brought up to date by whoever starts first, one transaction a version. And who comes in: a node
//! alone, which takes everything over, or one of a cluster, which takes nothing yet.
//!
//! Invariants: a version is made whole or not at all, by one node while the others wait at a lock; a version that this
//! build does not know is left alone. A node that takes over waits for commits that are under way, and none of an
//! earlier owner comes after it.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::address::Address;
use super::errors::{OpenError, told};
use super::held::Epochs;
use super::ownership::NODES_MAX;
use super::retainer::RETAINER;

/// What each version adds, from version 1 on.
pub(super) const VERSIONS: &[&str] = &[
    include_str!("schema_1.sql"),
    include_str!("schema_2.sql"),
    include_str!("schema_3.sql"),
    include_str!("schema_4.sql"),
];
/// How often the first statement is tried again: nodes that start together may all find nothing and make it.
const RACES_MAX: u32 = 20;

/// Makes what is missing. Errors: `NewerTables`, `Tables`.
pub(super) async fn migrate(client: &Client, address: &Address) -> Result<(), OpenError> {
    let place = || address.place.clone();
    let failed = |error: Error| OpenError::Tables { place: place(), reason: told(&error) };
    begin(client).await.map_err(failed)?;
    loop {
        // Whoever has the lock is alone with the tables; the version is read under it.
        let locked = "BEGIN; LOCK TABLE ringline.schema_version IN ACCESS EXCLUSIVE MODE";
        client.batch_execute(locked).await.map_err(failed)?;
        let row = client.query_one("SELECT max(version) FROM ringline.schema_version", &[]).await.map_err(failed)?;
        let found = row.try_get::<_, Option<i32>>(0).map_err(failed)?.unwrap_or(0);
        let known = VERSIONS.len() as i32;
        if found > known {
            client.batch_execute("ROLLBACK").await.map_err(failed)?;
            return Err(OpenError::NewerTables { place: place(), found, known });
        }
        let Some(sql) = usize::try_from(found).ok().and_then(|found| VERSIONS.get(found)) else {
            return client.batch_execute("ROLLBACK").await.map_err(failed);
        };
        let version = found + 1;
        let noted = format!("{sql}; INSERT INTO ringline.schema_version VALUES ({version}); COMMIT");
        client.batch_execute(&noted).await.map_err(failed)?;
        tracing::info!("the tables in the database at {} were brought to version {version}", place());
    }
}

/// Makes the schema and the table of its version, unless they are there.
async fn begin(client: &Client) -> Result<(), Error> {
    const MADE: &str = "SELECT to_regclass('ringline.schema_version') IS NOT NULL";
    const MAKE: &str = "BEGIN; CREATE SCHEMA IF NOT EXISTS ringline; CREATE TABLE IF NOT EXISTS ringline.schema_version \
         (version integer PRIMARY KEY, since timestamptz NOT NULL DEFAULT now()); COMMIT";
    for _ in 0..RACES_MAX {
        if client.query_one(MADE, &[]).await?.try_get(0)? {
            return Ok(());
        }
        let Err(error) = client.batch_execute(MAKE).await else { return Ok(()) };
        let _ = client.batch_execute("ROLLBACK").await;
        // Two that make the same at once: one of them is told so in one of these ways.
        let lost_the_race = [SqlState::UNIQUE_VIOLATION, SqlState::DUPLICATE_TABLE, SqlState::DUPLICATE_SCHEMA];
        if !error.code().is_some_and(|code| lost_the_race.contains(code)) {
            return Err(error);
        }
    }
    Ok(())
}

/// Makes this start of a node the owner of all partitions, with a writer for each shard. Returns the owner's number and
/// the epochs. Errors: `TakeOver`.
pub(super) async fn take_over(
    client: &Client,
    address: &Address,
    (node, shards): (&str, u16),
) -> Result<(i64, Epochs), OpenError> {
    let taken = take(client, (node, shards)).await;
    if taken.is_err() {
        let _ = client.batch_execute("ROLLBACK").await;
    }
    taken.map_err(|error| OpenError::TakeOver { place: address.place.clone(), reason: told(&error) })
}

async fn take(client: &Client, (node, shards): (&str, u16)) -> Result<(i64, Epochs), Error> {
    // Owners come one after the other: each sees the writers of the one before.
    client.batch_execute("BEGIN; LOCK TABLE ringline.owners IN SHARE ROW EXCLUSIVE MODE").await?;
    let row = client.query_one("INSERT INTO ringline.owners (node) VALUES ($1) RETURNING owner", &[&node]).await?;
    let owner: i64 = row.try_get(0)?;
    // Writers before partitions, each in order: as commits do.
    client
        .batch_execute(
            "SELECT 1 FROM ringline.writers ORDER BY owner, shard FOR UPDATE; \
             SELECT 1 FROM ringline.partitions ORDER BY partition FOR UPDATE",
        )
        .await?;
    let change = "UPDATE ringline.partitions SET owner = $1, epoch = epoch + 1 RETURNING partition, epoch";
    let mut epochs = Epochs::new();
    for row in client.query(change, &[&owner]).await? {
        epochs.insert(row.try_get(0)?, row.try_get(1)?);
    }
    // What they have written is still there.
    let gone = "WITH gone AS (DELETE FROM ringline.writers RETURNING bytes) UPDATE ringline.ownership \
         SET bytes = bytes + (SELECT coalesce(sum(bytes), 0) FROM gone)";
    client.execute(gone, &[]).await?;
    client.execute("DELETE FROM ringline.owners WHERE owner < $1::int8 - 1000", &[&owner]).await?;
    client.execute(WRITERS, &[&owner, &RETAINER, &i32::from(shards)]).await?;
    client.batch_execute(NOTED).await?;
    Ok((owner, epochs))
}

/// One for each shard, and those below 0: of the registrar and of the retainer, where there are any.
const WRITERS: &str =
    "INSERT INTO ringline.writers SELECT $1::int8, shard, 0, 0 FROM generate_series($2::int4, $3::int4 - 1) AS shard";

/// The last words of whoever changes owners.
const NOTED: &str = "UPDATE ringline.ownership SET version = version + 1; COMMIT";

/// Makes this start of a node an owner that owns nothing, with a writer for each shard and one for its registrar. Earlier
/// starts of the same node write and take nothing any more; what they own stays theirs until somebody takes it. Returns
/// the owner's number, and the number of the node. Errors: `TooManyNodes`, `TakeOver`.
pub(super) async fn join(
    client: &Client,
    address: &Address,
    (node, shards): (&str, u16),
) -> Result<(i64, u8), OpenError> {
    let joined = enter(client, (node, shards)).await;
    if !matches!(joined, Ok(Some(_))) {
        let _ = client.batch_execute("ROLLBACK").await;
    }
    let place = || address.place.clone();
    match joined {
        Ok(Some(joined)) => Ok(joined),
        Ok(None) => Err(OpenError::TooManyNodes { place: place(), node: node.to_owned() }),
        Err(error) => Err(OpenError::TakeOver { place: place(), reason: told(&error) }),
    }
}

/// `None`: there is no number left for this node.
async fn enter(client: &Client, (node, shards): (&str, u16)) -> Result<Option<(i64, u8)>, Error> {
    // Starts come one after the other: each sees the numbers and the writers of those before.
    client.batch_execute("BEGIN; LOCK TABLE ringline.owners IN SHARE ROW EXCLUSIVE MODE").await?;
    let Some(number) = number_of(client, node).await? else { return Ok(None) };
    let row = client.query_one("INSERT INTO ringline.owners (node) VALUES ($1) RETURNING owner", &[&node]).await?;
    let owner: i64 = row.try_get(0)?;
    // Waits for commits of an earlier start that are under way.
    let earlier = "SELECT FROM ringline.writers WHERE owner IN (SELECT owner FROM ringline.owners WHERE node = $1) \
         ORDER BY owner, shard FOR UPDATE";
    client.query(earlier, &[&node]).await?;
    let gone = "WITH gone AS (DELETE FROM ringline.writers WHERE owner IN \
         (SELECT owner FROM ringline.owners WHERE node = $1) RETURNING bytes) UPDATE ringline.ownership \
         SET bytes = bytes + (SELECT coalesce(sum(bytes), 0) FROM gone)";
    client.execute(gone, &[&node]).await?;
    let forgotten = "DELETE FROM ringline.owners WHERE owner < $1::int8 - 1000 AND owner NOT IN \
         (SELECT owner FROM ringline.writers UNION ALL SELECT owner FROM ringline.partitions)";
    client.execute(forgotten, &[&owner]).await?;
    client.execute(WRITERS, &[&owner, &RETAINER, &i32::from(shards)]).await?;
    client.batch_execute(NOTED).await?;
    Ok(Some((owner, number)))
}

/// The number of a node, the lowest that is free if it has none yet.
async fn number_of(client: &Client, node: &str) -> Result<Option<u8>, Error> {
    let known = client.query_opt("SELECT number FROM ringline.nodes WHERE name = $1", &[&node]).await?;
    let given = "INSERT INTO ringline.nodes (number, name) SELECT free::int2, $1::text FROM generate_series(0, $2::int4 - 1) \
         AS free WHERE NOT EXISTS (SELECT FROM ringline.nodes WHERE number = free) ORDER BY free LIMIT 1 RETURNING number";
    let row = match known {
        Some(row) => Some(row),
        None => client.query_opt(given, &[&node, &i32::from(NODES_MAX)]).await?,
    };
    Ok(row.map(|row| row.try_get::<_, i16>(0)).transpose()?.and_then(|number| u8::try_from(number).ok()))
}
