//! A session of one shard with the database: a connection that writes and one that reads, so that no question waits for
//! a commit. Both go when one is lost. Owned by the shard's task on the side thread.
//!
//! Invariant: before a session reads or writes anything, it has committed a new epoch of its writer. So what an older
//! session left behind in the server is either committed or will never be, and everything that is read has been
//! committed by a primary that still commits.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

use super::address::Address;
use super::errors::{OpenError, WriteError, told};
use super::sql::{Reads, Writes};

/// The oldest server, as `server_version_num` says it.
const VERSION_MIN: u32 = 150_000;
/// What every session is set to. Statements are nested loops over indexes by design: a planner that has not yet seen how
/// many rows there are must not choose otherwise. A transaction that nobody ends holds its locks this long at most.
const SETTINGS: &str = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashjoin = off; \
     SET enable_mergejoin = off; SET jit = off; SET plan_cache_mode = force_generic_plan; \
     SET idle_in_transaction_session_timeout = '10s'; SET statement_timeout = '30s'; SET lock_timeout = '15s'; \
     SET default_transaction_isolation = 'read committed'; SET search_path = pg_catalog";

/// A connection and the task that moves its bytes.
pub(super) struct Connection {
    pub client: Client,
    task: JoinHandle<()>,
    ended: watch::Receiver<bool>,
}

impl Connection {
    /// Connects to the primary. Errors: `Unreachable`, `Refused`.
    pub async fn open(address: &Address) -> Result<Self, OpenError> {
        let place = || address.place.clone();
        let (client, connection) = address.config.connect(NoTls).await.map_err(|error| {
            let reason = told(&error);
            // What the server itself says, but that it is starting or stopping.
            match error.code().map(|code| code.code()) {
                Some(code) if !code.starts_with("57") => OpenError::Refused { place: place(), reason },
                _ => OpenError::Unreachable { place: place(), reason },
            }
        })?;
        let (end, ended) = watch::channel(false);
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(reason = told(&error), "a connection to PostgreSQL ended");
            }
            let _ = end.send(true);
        });
        let opened = Self { client, task, ended };
        opened
            .client
            .batch_execute(SETTINGS)
            .await
            .map_err(|error| OpenError::Unreachable { place: place(), reason: told(&error) })?;
        Ok(opened)
    }

    /// Waits until the connection is gone.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // Also gone when nobody is left to say so.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    async fn setting(&self, name: &str) -> Result<String, tokio_postgres::Error> {
        let row = self.client.query_one("SELECT current_setting($1)", &[&name]).await?;
        row.try_get(0)
    }

    /// Makes sure that this server keeps what it says it has committed. Returns its version, as people write it.
    pub async fn check(&self, address: &Address) -> Result<String, OpenError> {
        let place = || address.place.clone();
        let unreachable =
            |error: tokio_postgres::Error| OpenError::Unreachable { place: place(), reason: told(&error) };
        let version = self.setting("server_version").await.map_err(unreachable)?;
        let number = self.setting("server_version_num").await.map_err(unreachable)?;
        if !number.parse::<u32>().is_ok_and(|number| number >= VERSION_MIN) {
            return Err(OpenError::TooOld { place: place(), found: version });
        }
        let encoding = self.setting("server_encoding").await.map_err(unreachable)?;
        if encoding != "UTF8" {
            return Err(OpenError::Encoding { place: place(), found: encoding });
        }
        let found = self.setting("synchronous_commit").await.map_err(unreachable)?;
        if !matches!(found.as_str(), "on" | "remote_apply") {
            let (setting, needed) = ("synchronous_commit", "it must be on or remote_apply");
            return Err(OpenError::NotDurable { place: place(), setting, found, needed });
        }
        let found = self.setting("fsync").await.map_err(unreachable)?;
        if found != "on" {
            let (setting, needed) = ("fsync", "it must be on");
            return Err(OpenError::NotDurable { place: place(), setting, found, needed });
        }
        Ok(version)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Else it would stay for as long as its peer does not answer.
        self.task.abort();
    }
}

/// Which writer a session is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Writer {
    pub owner: i64,
    pub shard: i32,
}

/// See the module.
pub(super) struct Session {
    pub write: Connection,
    pub writes: Writes,
    pub read: Connection,
    pub reads: Reads,
    pub writer: Writer,
    /// Of the writer: what counts commits with another one writes nothing.
    pub epoch: i64,
    /// Commits of this writer that are in the database.
    pub commits: i64,
}

impl Session {
    /// Connects, checks the server, and begins a new epoch of the writer. `known`: commits that were acknowledged.
    ///
    /// Errors: `Fenced` when the writer is gone, `Lost` when the database has fewer commits than were acknowledged,
    /// `TimedOut`, and what the database says.
    pub async fn begin(address: &Address, writer: Writer, (known, limit): (i64, Duration)) -> Result<Self, WriteError> {
        let begun = timeout(limit, Self::connect(address, writer)).await;
        let session = begun.map_err(|_| WriteError::TimedOut(limit))??;
        if session.commits < known {
            return Err(WriteError::Lost { found: session.commits, known });
        }
        Ok(session)
    }

    async fn connect(address: &Address, writer: Writer) -> Result<Self, WriteError> {
        let write = Connection::open(address).await?;
        write.check(address).await?;
        let read = Connection::open(address).await?;
        let (writes, reads) = tokio::join!(Writes::prepare(&write.client), Reads::prepare(&read.client));
        let (writes, reads) = (writes?, reads?);
        write.client.batch_execute("BEGIN").await?;
        let row = write.client.query_opt(&writes.begin_session, &[&writer.owner, &writer.shard]).await?;
        write.client.batch_execute("COMMIT").await?;
        match row {
            None => Err(fenced(&write.client, &writes, writer).await),
            Some(row) => {
                let (epoch, commits) = (row.try_get(0)?, row.try_get(1)?);
                Ok(Self { write, writes, read, reads, writer, epoch, commits })
            }
        }
    }

    /// Waits until one of the connections is gone.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.write.ended() => {}
            () = self.read.ended() => {}
        }
    }

    /// The error that says who has what this writer owned.
    pub async fn fenced(&self) -> WriteError {
        fenced(&self.write.client, &self.writes, self.writer).await
    }
}

async fn fenced(client: &Client, writes: &Writes, writer: Writer) -> WriteError {
    let found = client.query_opt(&writes.taken_by, &[&writer.owner]).await.ok().flatten();
    let by = found.and_then(|row| {
        Some(format!("(node {}, start {})", row.try_get::<_, String>(0).ok()?, row.try_get::<_, i64>(1).ok()?))
    });
    WriteError::Fenced { by: by.map(|by| format!("{} {by}", "what this one owned")) }
}
