//! A session of one shard with the database: a connection that writes and one that reads, so that no question waits for
//! a commit. Both go when one is lost. Owned by the shard's task on the side thread.
//!
//! Invariant: before a session reads or writes anything, it has committed a new epoch of its writer, and both of its
//! connections are to the server that committed it. So what an older session left behind in the server is either
//! committed or will never be, and everything that is read has been committed by a primary that still commits.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::tls::TlsStream;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Socket, Statement};

use super::address::Address;
use super::errors::{OpenError, WriteError, told};
use super::held::Server;
use super::sql::{Reads, SERVER, TAKEN_BY, Writes};

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
        let connected = match &address.tls {
            None => address.config.connect(NoTls).await.map(|(client, connection)| (client, moved(connection))),
            Some(tls) => {
                address.config.connect(tls.clone()).await.map(|(client, connection)| (client, moved(connection)))
            }
        };
        let (client, (task, ended)) = connected.map_err(|error| {
            let reason = told(&error);
            // What the server itself says, but that it is starting or stopping.
            match error.code().map(|code| code.code()) {
                Some(code) if !code.starts_with("57") => OpenError::Refused { place: place(), reason },
                _ => OpenError::Unreachable { place: place(), reason },
            }
        })?;
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

    /// Commits a new epoch of a writer by the statement `begin_session`. `None`: there is no such writer any more.
    pub async fn begin(&self, statement: &Statement, writer: Writer) -> Result<Option<Begun>, WriteError> {
        self.client.batch_execute("BEGIN").await?;
        let row = self.client.query_opt(statement, &[&writer.owner, &writer.shard]).await?;
        self.client.batch_execute("COMMIT").await?;
        let Some(row) = row else { return Ok(None) };
        let (epoch, commits, server) = (row.try_get(0)?, row.try_get(1)?, Server(row.try_get(2)?));
        Ok(Some(Begun { epoch, commits, server }))
    }

    /// The error that says who took the place of a writer's owner.
    pub async fn replaced(&self, writer: Writer) -> WriteError {
        let found = self.client.query_opt(TAKEN_BY, &[&writer.owner]).await.ok().flatten();
        let by = found.and_then(|row| {
            let (node, start): (String, i64) = (row.try_get(0).ok()?, row.try_get(1).ok()?);
            Some(format!(" (node {node}, start {start})"))
        });
        WriteError::Fenced(format!("another node has taken over what this one owned{}", by.unwrap_or_default()))
    }

    /// The run of the server that this is a connection to.
    async fn server(&self) -> Result<Server, tokio_postgres::Error> {
        Ok(Server(self.client.query_one(SERVER, &[]).await?.try_get(0)?))
    }
}

/// The task that moves the bytes of a connection, and where its end is told.
fn moved<S>(connection: tokio_postgres::Connection<Socket, S>) -> (JoinHandle<()>, watch::Receiver<bool>)
where
    S: TlsStream + Unpin + Send + 'static,
{
    let (end, ended) = watch::channel(false);
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(reason = told(&error), "a connection to PostgreSQL ended");
        }
        let _ = end.send(true);
    });
    (task, ended)
}

/// What a session begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// Of the writer: what counts commits with another one writes nothing.
    pub epoch: i64,
    /// Commits of this writer that are in the database.
    pub commits: i64,
    pub server: Server,
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
    pub begun: Begun,
}

impl Session {
    /// Connects, checks the server, and begins a new epoch of the writer. `known`: commits that were acknowledged.
    ///
    /// Errors: `Fenced` when the writer is gone, `Lost` when the database has fewer commits than were acknowledged,
    /// `TwoServers`, `TimedOut`, and what the database says.
    pub async fn begin(address: &Address, writer: Writer, (known, limit): (i64, Duration)) -> Result<Self, WriteError> {
        let begun = timeout(limit, Self::connect(address, writer)).await;
        let session = begun.map_err(|_| WriteError::TimedOut(limit))??;
        if session.begun.commits < known {
            return Err(WriteError::Lost { found: session.begun.commits, known });
        }
        Ok(session)
    }

    async fn connect(address: &Address, writer: Writer) -> Result<Self, WriteError> {
        let write = Connection::open(address).await?;
        write.check(address).await?;
        let read = Connection::open(address).await?;
        let (writes, reads) = tokio::join!(Writes::prepare(&write.client), Reads::prepare(&read.client));
        let (writes, reads) = (writes?, reads?);
        match write.begin(&writes.begin_session, writer).await? {
            None => Err(write.replaced(writer).await),
            // What another one shows has been committed by nobody who commits.
            Some(begun) if read.server().await? != begun.server => Err(WriteError::TwoServers),
            Some(begun) => Ok(Self { write, writes, read, reads, writer, begun }),
        }
    }

    /// Waits until one of the connections is gone.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.write.ended() => {}
            () = self.read.ended() => {}
        }
    }

    /// The error that says who has what this writer was to write.
    pub async fn fenced(&self, partitions: &[i16]) -> WriteError {
        let values: [&(dyn ToSql + Sync); 2] = [&partitions, &self.writer.owner];
        let found = self.write.client.query_opt(&self.writes.lost_to, &values).await.ok().flatten();
        let lost = found.and_then(|row| {
            let (partition, owner): (i16, i64) = (row.try_get(0).ok()?, row.try_get(1).ok()?);
            let node = row.try_get::<_, Option<String>>(2).ok()?.unwrap_or_default();
            Some(match owner {
                0 => format!("nobody owns partition {partition}"),
                _ => format!("another node has taken over partition {partition} (node {node}, start {owner})"),
            })
        });
        match lost {
            Some(lost) => WriteError::Fenced(lost),
            None => self.write.replaced(self.writer).await,
        }
    }
}
