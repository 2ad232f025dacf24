//! The tables: made and brought up to date by whoever starts first, one transaction a version. And taking them over.
//!
//! Invariants: a version is made whole or not at all, by one node while the others wait at a lock; a version that this
//! build does not know is left alone. A node that takes over waits for commits that are under way, and none of an
//! earlier owner comes after it.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::address::Address;
use super::commit::Epochs;
use super::errors::{OpenError, told};

/// What each version adds, from version 1 on.
pub(super) const VERSIONS: &[&str] = &[include_str!("schema_1.sql"), include_str!("schema_2.sql")];
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
    client.execute("DELETE FROM ringline.writers", &[]).await?;
    client.execute("DELETE FROM ringline.owners WHERE owner < $1::int8 - 1000", &[&owner]).await?;
    let writers =
        "INSERT INTO ringline.writers SELECT $1::int8, shard, 0, 0 FROM generate_series(0, $2::int4 - 1) AS shard";
    client.execute(writers, &[&owner, &i32::from(shards)]).await?;
    client.batch_execute("COMMIT").await?;
    Ok((owner, epochs))
}
