//! What can go wrong with a database, and what follows from it: [`Fate`]. Pure.

use std::error::Error as _;
use std::time::Duration;

use ringline_schema::pack::BadPack;
use tokio_postgres::error::SqlState;

use super::ownership::NODES_MAX;

/// Why a store did not open. Texts hold no password.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("postgres.url is not the address of a database: {0}")]
    BadAddress(String),
    #[error("the password file {path}: {reason}")]
    PasswordFile { path: String, reason: String },
    #[error("the connection to PostgreSQL can't be encrypted: {0}")]
    Tls(String),
    #[error("PostgreSQL at {place} cannot be reached: {reason}; correct postgres.url, or start it")]
    Unreachable { place: String, reason: String },
    #[error("PostgreSQL at {place} does not let us in: {reason}")]
    Refused { place: String, reason: String },
    #[error("PostgreSQL at {place} is version {found}: 15 or newer is needed")]
    TooOld { place: String, found: String },
    #[error("PostgreSQL at {place} has {setting} = {found}: {needed}, or what is accepted may be lost")]
    NotDurable { place: String, setting: &'static str, found: String, needed: &'static str },
    #[error("the database at {place} has the encoding {found}: it must be UTF8")]
    Encoding { place: String, found: String },
    #[error(
        "the tables of the database at {place} are of version {found}, this build knows {known}: start a newer build"
    )]
    NewerTables { place: String, found: i32, known: i32 },
    #[error("the tables in the database at {place} can't be made or changed: {reason}")]
    Tables { place: String, reason: String },
    #[error("the partitions in the database at {place} can't be taken over: {reason}")]
    TakeOver { place: String, reason: String },
    #[error(
        "all {NODES_MAX} numbers of nodes in the database at {place} are given, none is left for {node}: while no node \
         runs, delete those that never come back from ringline.nodes"
    )]
    TooManyNodes { place: String, node: String },
    #[error("this system can't run the store: {what} ({source})")]
    System { what: &'static str, source: std::io::Error },
    #[error("told to stop before the store was open")]
    Stopped,
}

/// Why a shard can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// Another start of a node has this shard's partitions.
    #[error("fenced: {0}; nothing was written")]
    Fenced(String),
    #[error("message {seq} of conversation {conversation} is there already with other content: nothing was written")]
    Conflict { conversation: String, seq: i64 },
    #[error("the database has lost commits that were acknowledged: it knows {found} of this shard, {known} were")]
    Lost { found: i64, known: i64 },
    #[error("partitions were taken on another server than the one of this session")]
    Moved,
    #[error("two connections were given two servers")]
    TwoServers,
    #[error("{0} that was stored does not read")]
    Damaged(&'static str),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the connection ended")]
    Ended,
    #[error("{}", told(.0))]
    Database(#[from] tokio_postgres::Error),
    #[error("{0}")]
    Unfit(#[from] OpenError),
}

/// Why a question was not answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueryError {
    #[error("{}", told(.0))]
    Database(#[from] tokio_postgres::Error),
    #[error("{0} that was stored does not read")]
    Damaged(&'static str),
}

impl From<BadPack> for QueryError {
    fn from(bad: BadPack) -> Self {
        Self::Damaged(bad.0)
    }
}

/// What is done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Connect anew, find out what became of the commit, go on.
    Again,
    /// Nothing more can be promised.
    Stop,
}

impl WriteError {
    pub(super) fn fate(&self) -> Fate {
        match self {
            Self::Fenced(_) | Self::Conflict { .. } | Self::Lost { .. } | Self::Damaged(_) => Fate::Stop,
            // A primary that came back with other settings may be mended by whoever set them.
            Self::Moved | Self::TwoServers | Self::TimedOut(_) | Self::Ended | Self::Unfit(_) => Fate::Again,
            Self::Database(error) => fate(error),
        }
    }
}

impl QueryError {
    /// Whether the connection is to be given up.
    pub(super) fn is_lost(error: &tokio_postgres::Error) -> bool {
        let Some(code) = error.code() else { return is_cut(error) };
        // Connection, operator intervention, a server that only reads, too few resources.
        matches!(code.code().get(..2), Some("08" | "25" | "53" | "57")) && *code != SqlState::QUERY_CANCELED
    }
}

/// Whether the way to the server is the reason, and not what was said on it.
fn is_cut(error: &tokio_postgres::Error) -> bool {
    error.is_closed() || error.source().is_some_and(|source| source.is::<std::io::Error>())
}

/// By the class of its code: data that can't be stored, broken rules and tables that are not ours will not pass the next
/// time either.
fn fate(error: &tokio_postgres::Error) -> Fate {
    let Some(code) = error.code() else { return if is_cut(error) { Fate::Again } else { Fate::Stop } };
    match code.code().get(..2) {
        Some("42") if *code == SqlState::INSUFFICIENT_PRIVILEGE => Fate::Again,
        Some("0A" | "22" | "23" | "42" | "XX") => Fate::Stop,
        _ => Fate::Again,
    }
}

/// An error with its cause: the library's own text leaves out what the server said.
pub(super) fn told(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), error.source()) {
        (Some(said), _) => format!("{} ({})", said.message(), said.code().code()),
        (None, Some(cause)) => format!("{error}: {cause}"),
        (None, None) => error.to_string(),
    }
}
