//! The task that takes partitions and gives them back: see [`super::ownership`]. It has a connection of its own, on the
//! side thread, and carries out one request at a time.
//!
//! Its session is fenced like a shard's: it is the writer of the shard [`REGISTRAR`], counts each transaction in its row,
//! and begins a new epoch with every connection. So a take that a lost connection left behind in the server is either
//! committed before the next session reads anything, or never will be; and a start whose place was taken takes nothing.
//! Every request may be carried out twice, so one whose answer was lost is made again.

use std::sync::Arc;
use std::time::Duration;

use ringline_schema::ids::Partition;
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::address::Address;
use super::errors::{Fate, WriteError};
use super::held::{Epochs, Held};
use super::ownership::{Asked, Claim, Done, Epoch, Owned, OwnershipError, OwnershipTable, Request, Start, StartRow};
use super::session::{Begun, Connection, Writer};
use super::sql::Registers;

/// The number that the registrar has among the writers of its start; shards have theirs from 0 on.
pub(super) const REGISTRAR: i32 = -1;
/// Pause before a request is tried again.
const PAUSE: Duration = Duration::from_millis(100);

type Value<'a> = &'a (dyn ToSql + Sync);

/// See the module.
pub(super) struct Registrar {
    pub address: Arc<Address>,
    pub writer: Writer,
    pub held: Arc<Held>,
    pub requests: Receiver<Asked>,
    /// A request that takes longer is answered `Away`.
    pub limit: Duration,
    pub session: Option<Session>,
    /// The last request was not carried out at once: it was said so.
    pub is_away: bool,
}

/// A connection that has begun a new epoch of the writer.
pub(super) struct Session {
    connection: Connection,
    registers: Registers,
    writer: Writer,
    begun: Begun,
}

impl Registrar {
    /// The task's body. Ends with the last handle.
    pub async fn run(mut self) {
        while let Some((request, reply)) = self.requests.recv().await {
            let done = self.carry_out(&request).await;
            // Whoever asked may have stopped waiting.
            let _ = reply.send(done);
        }
    }

    async fn carry_out(&mut self, request: &Request) -> Result<Done, OwnershipError> {
        let deadline = Instant::now() + self.limit;
        loop {
            let tried = timeout_at(deadline, self.attempt(request)).await;
            let error = match tried.map_err(|_| WriteError::TimedOut(self.limit)) {
                Ok(Ok(done)) => {
                    self.is_away = false;
                    return Ok(done);
                }
                Ok(Err(error)) | Err(error) => error,
            };
            // In whatever state its transaction is: the next session begins behind it.
            self.session = None;
            match error {
                WriteError::Fenced(_) => return Err(OwnershipError::Replaced(error.to_string())),
                error if error.fate() == Fate::Stop => return Err(OwnershipError::Refused(error.to_string())),
                error if Instant::now() + PAUSE >= deadline => {
                    self.is_away = true;
                    return Err(OwnershipError::Away(error.to_string()));
                }
                error if self.is_away => tracing::debug!(%error, "PostgreSQL is still lost"),
                error => tracing::warn!(%error, "PostgreSQL is lost for who owns what: connecting anew"),
            }
            self.is_away = true;
            sleep(PAUSE).await;
        }
    }

    async fn attempt(&mut self, request: &Request) -> Result<Done, WriteError> {
        // What is to be released is not written any more from here on, whatever the database says.
        if let Request::Release(partitions) = request {
            self.held.remove(&numbers(partitions));
        }
        if self.session.is_none() {
            self.session = Some(Session::begin(&self.address, self.writer).await?);
        }
        let Some(session) = &self.session else { return Err(WriteError::Ended) };
        match request {
            Request::Version => Ok(Done::Version(session.version().await?)),
            Request::Table => {
                let table = session.table().await?;
                let start = Start(self.writer.owner);
                if !table.starts.iter().any(|row| row.start == start && row.may_write) {
                    return Err(session.replaced().await);
                }
                let own = table.partitions.iter().filter(|row| row.owner == Some(start));
                self.held.become_as(own.map(|row| stored(row.claim)).collect::<Epochs>(), session.begun.server);
                Ok(Done::Table(table))
            }
            Request::Take(wanted) => {
                let taken = session.take(wanted).await?;
                self.held.add(taken.iter().copied().map(stored), session.begun.server);
                Ok(Done::Taken(taken))
            }
            Request::Release(partitions) => {
                session.release(&numbers(partitions)).await?;
                Ok(Done::Released)
            }
        }
    }
}

impl Session {
    /// Connects, checks the server, and begins a new epoch of the writer.
    async fn begin(address: &Address, writer: Writer) -> Result<Self, WriteError> {
        let connection = Connection::open(address).await?;
        connection.check(address).await?;
        let registers = Registers::prepare(&connection.client).await?;
        match connection.begin(&registers.begin_session, writer).await? {
            Some(begun) => Ok(Self { connection, registers, writer, begun }),
            None => Err(connection.replaced(writer).await),
        }
    }

    async fn replaced(&self) -> WriteError {
        self.connection.replaced(self.writer).await
    }

    async fn version(&self) -> Result<u64, WriteError> {
        let row = self.connection.client.query_one(&self.registers.version, &[]).await?;
        Ok(super::values::number(row.try_get(0)?))
    }

    async fn table(&self) -> Result<OwnershipTable, WriteError> {
        let (client, registers) = (&self.connection.client, &self.registers);
        // In this order: what changes in between is seen again with the next version.
        let (version, partitions, starts) = tokio::join!(
            biased;
            self.version(),
            client.query(&registers.partitions, &[]),
            client.query(&registers.starts, &[]),
        );
        let partitions = partitions?.iter().filter_map(|row| owned(row).transpose()).collect::<Result<_, _>>()?;
        let starts = starts?.iter().map(start).collect::<Result<_, _>>()?;
        Ok(OwnershipTable { version: version?, partitions, starts })
    }

    async fn take(&self, wanted: &[Claim]) -> Result<Vec<Claim>, WriteError> {
        let (client, registers) = (&self.connection.client, &self.registers);
        let (partitions, epochs): (Vec<i16>, Vec<i64>) = wanted.iter().copied().map(stored).unzip();
        let owner = self.writer.owner;
        let (holding, before, taking): ([Value<'_>; 1], [Value<'_>; 2], [Value<'_>; 3]) =
            ([&partitions], [&partitions, &owner], [&partitions, &epochs, &owner]);
        // Polled in this order, so they are sent in this order.
        let (begun, counted, stopped, held, taken) = tokio::join!(
            biased;
            client.batch_execute("BEGIN"),
            self.count(),
            client.query(&registers.stop_writers, &before),
            client.query(&registers.hold, &holding),
            client.query(&registers.take, &taking),
        );
        begun?;
        counted?;
        stopped?;
        let (held, taken) = (held?, taken?);
        self.commit(!taken.is_empty()).await?;
        // What was this start's before was taken by a request whose answer was lost.
        let own = held.iter().filter(|row| row.try_get::<_, i64>(2).is_ok_and(|found| found == owner));
        let mut claims = own.chain(&taken).filter_map(|row| claim(row).transpose()).collect::<Result<Vec<_>, _>>()?;
        claims.sort_unstable();
        Ok(claims)
    }

    async fn release(&self, partitions: &[i16]) -> Result<(), WriteError> {
        let (client, registers) = (&self.connection.client, &self.registers);
        let (holding, releasing): ([Value<'_>; 1], [Value<'_>; 2]) = ([&partitions], [&partitions, &self.writer.owner]);
        let (begun, counted, held, released) = tokio::join!(
            biased;
            client.batch_execute("BEGIN"),
            self.count(),
            client.query(&registers.hold, &holding),
            client.execute(&registers.release, &releasing),
        );
        begun?;
        counted?;
        held?;
        self.commit(released? > 0).await
    }

    /// Counts the transaction; `Fenced` when this session is not the newest of its start, or the start's place was taken.
    async fn count(&self) -> Result<(), WriteError> {
        let Writer { owner, shard } = self.writer;
        let values: [Value<'_>; 3] = [&owner, &shard, &self.begun.epoch];
        match self.connection.client.execute(&self.registers.count, &values).await? {
            1 => Ok(()),
            _ => Err(self.replaced().await),
        }
    }

    /// Its count makes every transaction one that is written: what it has seen is committed as surely as it is itself.
    async fn commit(&self, is_change: bool) -> Result<(), WriteError> {
        const CHANGED: &str = "UPDATE ringline.ownership SET version = version + 1; COMMIT";
        let said = if is_change { CHANGED } else { "COMMIT" };
        Ok(self.connection.client.batch_execute(said).await?)
    }
}

fn numbers(partitions: &[Partition]) -> Vec<i16> {
    partitions.iter().map(|partition| partition.number() as i16).collect()
}

fn stored(claim: Claim) -> (i16, i64) {
    (claim.partition.number() as i16, claim.epoch.0)
}

/// `None`: a partition that this build does not know.
fn claim(row: &Row) -> Result<Option<Claim>, tokio_postgres::Error> {
    let (number, epoch): (i16, i64) = (row.try_get(0)?, row.try_get(1)?);
    let partition = u16::try_from(number).ok().and_then(Partition::new);
    Ok(partition.map(|partition| Claim { partition, epoch: Epoch(epoch) }))
}

fn owned(row: &Row) -> Result<Option<Owned>, tokio_postgres::Error> {
    let owner: i64 = row.try_get(2)?;
    Ok(claim(row)?.map(|claim| Owned { claim, owner: (owner != 0).then_some(Start(owner)) }))
}

fn start(row: &Row) -> Result<StartRow, tokio_postgres::Error> {
    let number: Option<i16> = row.try_get(2)?;
    Ok(StartRow {
        start: Start(row.try_get(0)?),
        node: row.try_get(1)?,
        number: number.and_then(|number| u8::try_from(number).ok()),
        may_write: row.try_get(3)?,
    })
}
