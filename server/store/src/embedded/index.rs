//! The index of a node: one fjall database with one tree of rows, and the flush that moves an overlay into it.
//!
//! Used by index threads only; it blocks. Invariant: a log's watermark is written in the same atomic batch as the rows
//! that it stands for, and the batch is synced before any of it can reach a table file. So after a crash rows and
//! watermark agree, and what is missing is replayed from the log. Who reads a row to write it anew holds `writing`: index
//! threads flush, and retention raises floors in the same rows.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, OwnedWriteBatch, PersistMode, Readable};
use ringline_schema::ids::{ConversationId, DeviceKey, Seq, UserName};
use ringline_schema::record::{Accepted, User};
use ringline_schema::rows::{Row, RowKey};

use super::EmbeddedOptions;
use super::overlay::{Overlay, Recent};
use super::rows::{self, BadRow, Block, HeadRow, Kept, Watermark, Writer};
use super::segments::ReadError;
use crate::{newest, remember};

/// Threads of the library that flush and compact, for the whole node.
const WORKER_THREADS: usize = 1;
/// The library's smallest.
const JOURNAL_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Table files that the library keeps open.
const FILES_MAX: usize = 200;

/// Block rows that one rise of a floor removes at most; a conversation with more takes several.
const FLOOR_BLOCKS_MAX: u64 = 4096;

/// Why the index could not answer or take rows.
#[derive(Debug, thiserror::Error)]
pub(super) enum IndexError {
    #[error("index: {0}")]
    Library(#[from] fjall::Error),
    #[error("{0}")]
    Row(#[from] BadRow),
    #[error("log: {0}")]
    Log(#[from] ReadError),
    #[error("the thread that writes the index has ended")]
    FlushEnded,
    #[error("the index belongs to another data folder or version")]
    Foreign,
    /// A seq between the first and the head of a conversation has no place.
    #[error("conversation {0}: message {1} is missing from the index")]
    Missing(ConversationId, Seq),
    /// The place of a message holds another record.
    #[error("conversation {0}: the index names a wrong record for message {1}")]
    Wrong(ConversationId, Seq),
}

/// Takes key and value of a row; false: it wants no more.
pub(super) type EachRow<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<bool, IndexError>;

/// The database. Cheap to share by reference.
pub(super) struct Index {
    rows: Keyspace,
    database: Database,
    /// Held from the reading of rows to the commit of what was made of them.
    writing: Mutex<()>,
    /// The next flush fails with this error number; below 0 it panics.
    #[cfg(test)]
    pub fault: std::sync::atomic::AtomicI32,
}

impl Index {
    pub fn open(folder: &Path, options: &EmbeddedOptions) -> Result<Self, IndexError> {
        let database = Database::builder(folder)
            .cache_size(options.index_cache_bytes)
            .worker_threads(WORKER_THREADS)
            .max_journaling_size(JOURNAL_BYTES_MAX)
            .max_cached_files(Some(FILES_MAX))
            .open()?;
        let memtable_bytes = options.index_memtable_bytes;
        let rows = database.keyspace("rows", || KeyspaceCreateOptions::default().max_memtable_size(memtable_bytes))?;
        Ok(Self {
            rows,
            database,
            writing: Mutex::new(()),
            #[cfg(test)]
            fault: std::sync::atomic::AtomicI32::new(0),
        })
    }

    /// Whether this index was made of the logs of data folder `identity`, by this version of the rows.
    pub fn belongs_to(&self, identity: u64) -> Result<bool, IndexError> {
        Ok(self.rows.get(rows::IDENTITY_KEY)?.as_deref() == Some(&identity_row(identity)[..]))
    }

    pub fn set_identity(&self, identity: u64) -> Result<(), IndexError> {
        let mut batch = self.database.batch().durability(Some(PersistMode::SyncData));
        batch.insert(&self.rows, rows::IDENTITY_KEY, identity_row(identity));
        Ok(batch.commit()?)
    }

    pub fn watermarks(&self) -> Result<Vec<(u16, Watermark)>, IndexError> {
        let mut found = Vec::new();
        for row in self.rows.prefix(rows::WATERMARK_PREFIX) {
            let (key, value) = row.into_inner()?;
            found.push((rows::log_of_watermark_key(&key)?, Watermark::decode(&value)?));
        }
        Ok(found)
    }

    pub fn set_watermarks(&self, watermarks: &[(u16, Watermark)]) -> Result<(), IndexError> {
        let mut batch = self.database.batch().durability(Some(PersistMode::SyncData));
        for (log, watermark) in watermarks {
            batch.insert(&self.rows, rows::watermark_key(*log), watermark.encode());
        }
        Ok(batch.commit()?)
    }

    /// Where logs begin that don't begin with their first segment any more.
    pub fn kept(&self) -> Result<BTreeMap<u16, Kept>, IndexError> {
        let mut found = BTreeMap::new();
        for row in self.rows.prefix(rows::KEPT_PREFIX) {
            let (key, value) = row.into_inner()?;
            found.insert(rows::log_of_kept_key(&key)?, Kept::decode(&value)?);
        }
        Ok(found)
    }

    pub fn set_kept(&self, kept: &BTreeMap<u16, Kept>) -> Result<(), IndexError> {
        let mut batch = self.database.batch().durability(Some(PersistMode::SyncData));
        for (log, kept) in kept {
            batch.insert(&self.rows, rows::kept_key(*log), kept.encode());
        }
        Ok(batch.commit()?)
    }

    /// Lets go of the messages below these seqs and forgets their places; durable when it returns. A floor never falls,
    /// and what is not known to the index is left alone.
    pub fn raise_floors(&self, floors: &mut dyn Iterator<Item = (ConversationId, Seq)>) -> Result<u64, IndexError> {
        let mut raised = 0;
        for (id, floor) in floors {
            let mut counted = false;
            while self.raise_floor(id, floor)? {
                counted = true;
            }
            raised += u64::from(counted);
        }
        self.database.persist(PersistMode::SyncData)?;
        Ok(raised)
    }

    /// One step of it; false: the floor is there.
    fn raise_floor(&self, id: ConversationId, floor: Seq) -> Result<bool, IndexError> {
        let _writing = self.lock();
        let Some(mut row) = self.head(id)? else { return Ok(false) };
        let (first, floor) = (row.first(), floor.min(row.head.next()));
        if floor <= first {
            return Ok(false);
        }
        let from = rows::block_of(first).0;
        let step = Seq(from.saturating_add(FLOOR_BLOCKS_MAX).saturating_mul(rows::BLOCK_PLACES).saturating_add(1));
        row.floor = floor.min(step);
        let mut batch = self.database.batch();
        batch.insert(&self.rows, rows::head_key(id), row.encode());
        for block in from..rows::block_of(row.floor).0 {
            batch.remove(&self.rows, rows::block_key(id, block));
        }
        batch.commit()?;
        Ok(true)
    }

    /// Every row of one instant that outlives the log, in order of key; and the watermarks of that instant.
    pub fn snapshot(&self, each: EachRow<'_>) -> Result<(), IndexError> {
        let snapshot = self.database.snapshot();
        for row in snapshot.iter(&self.rows) {
            let (key, value) = row.into_inner()?;
            let wanted = rows::outlives_log(&key) || key.starts_with(rows::WATERMARK_PREFIX);
            if wanted && !each(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    /// Takes rows of a checkpoint into an empty index. Durable with the next synced write.
    pub fn restore(&self, rows: &mut dyn Iterator<Item = (&[u8], &[u8])>) -> Result<(), IndexError> {
        let mut batch = self.database.batch();
        for (key, value) in rows {
            batch.insert(&self.rows, key, value);
        }
        Ok(batch.commit()?)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        // It guards no data: whoever panicked has committed all or nothing.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A user, and the run that wrote it.
    pub fn user(&self, name: &UserName) -> Result<Option<(u64, User)>, IndexError> {
        self.get(&rows::user_key(name), |bytes| rows::decode_user(name, bytes))
    }

    pub fn head(&self, conversation: ConversationId) -> Result<Option<HeadRow>, IndexError> {
        self.get(&rows::head_key(conversation), HeadRow::decode)
    }

    pub fn filter(&self, conversation: ConversationId, device: DeviceKey) -> Result<Vec<Accepted>, IndexError> {
        Ok(self.get(&rows::filter_key(conversation, device), rows::decode_filter)?.unwrap_or_default())
    }

    pub fn block(&self, conversation: ConversationId, block: u64) -> Result<Block, IndexError> {
        Ok(self.get(&rows::block_key(conversation, block), Block::decode)?.unwrap_or_default())
    }

    pub fn cursor(&self, device: DeviceKey, conversation: ConversationId) -> Result<Seq, IndexError> {
        Ok(self.get(&rows::cursor_key(device, conversation), rows::decode_seq)?.unwrap_or_default())
    }

    /// Conversations of a user above `cursor`, rising, at most `limit`.
    pub fn conversations_of(
        &self,
        user: &UserName,
        cursor: ConversationId,
        limit: usize,
    ) -> Result<Vec<ConversationId>, IndexError> {
        let after = std::ops::Bound::Excluded(rows::list_key(user, cursor));
        let last = std::ops::Bound::Included(rows::list_key(user, ConversationId(u128::MAX)));
        let mut found = Vec::new();
        for row in self.rows.range((after, last)).take(limit) {
            found.push(rows::conversation_of_list_key(&row.key()?)?);
        }
        Ok(found)
    }

    /// Every row whose key begins with `prefix`, in order of key, until `each` says that it is enough.
    pub fn walk(&self, prefix: &[u8], each: EachRow<'_>) -> Result<(), IndexError> {
        for row in self.rows.prefix(prefix) {
            let (key, value) = row.into_inner()?;
            if !each(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    /// The same from behind a key on.
    pub fn walk_after(&self, (prefix, after): (&[u8], &[u8]), each: EachRow<'_>) -> Result<(), IndexError> {
        let after = std::ops::Bound::Excluded(after.max(prefix).to_vec());
        for row in self.rows.range((after, std::ops::Bound::Unbounded)) {
            let (key, value) = row.into_inner()?;
            if !key.starts_with(prefix) || !each(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    /// Removes rows. Durable with the next synced write.
    pub fn remove(&self, keys: &[Vec<u8>]) -> Result<(), IndexError> {
        let _writing = self.lock();
        let mut batch = self.database.batch();
        keys.iter().for_each(|key| batch.remove(&self.rows, key.as_slice()));
        Ok(batch.commit()?)
    }

    /// A keyed row, also one without a value.
    pub fn keyed(&self, key: &RowKey) -> Result<Option<Row>, IndexError> {
        self.get(&rows::keyed_key(&key.encode()), |bytes| rows::decode_keyed(key.clone(), bytes))
    }

    /// Keyed rows with a key above `after` that begins with `prefix`, rising, until `more` says that it is enough.
    pub fn keyed_above(
        &self,
        (prefix, after): (&[u8], &[u8]),
        more: &mut dyn FnMut(Vec<u8>, Row) -> bool,
    ) -> Result<(), IndexError> {
        let (prefix, after) = (rows::keyed_key(prefix), rows::keyed_key(after));
        for row in self.rows.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded)) {
            let (key, value) = row.into_inner()?;
            let Some(own) = key.get(1..).filter(|_| key.starts_with(&prefix)) else { break };
            let typed = RowKey::decode(own).map_err(|_| BadRow("row key"))?;
            if !more(own.to_vec(), rows::decode_keyed(typed, &value)?) {
                break;
            }
        }
        Ok(())
    }

    /// Moves an overlay's rows in, with the watermark of its log: one atomic, synced batch. The overlay is cleared by
    /// the caller, afterwards.
    pub fn flush(&self, overlay: &Overlay, log: u16, watermark: Watermark) -> Result<(), IndexError> {
        #[cfg(test)]
        match self.fault.swap(0, std::sync::atomic::Ordering::Relaxed) {
            0 => {}
            error @ 1.. => return Err(fjall::Error::Io(std::io::Error::from_raw_os_error(error)).into()),
            ..0 => panic!("as a defect of the library"),
        }
        let _writing = self.lock();
        let batch = self.database.batch().durability(Some(PersistMode::SyncData));
        let mut flush = Flush { index: self, replayed: overlay.replayed, batch, block: Writer::default() };
        for (&conversation, recent) in &overlay.conversations {
            flush.conversation(conversation, recent)?;
        }
        for (name, user) in &overlay.users {
            // Logs may be replayed in an order that is not the order of time.
            if self.user(name)?.is_none_or(|(run, _)| run <= user.0) {
                flush.put(&rows::user_key(name), &rows::encode_user(user));
            }
        }
        for (user, conversation) in &overlay.lists {
            flush.put(&rows::list_key(user, *conversation), &[]);
        }
        for (&(device, conversation), &seq) in &overlay.cursors {
            let new = !overlay.replayed && overlay.conversations.get(&conversation).is_some_and(Recent::is_new);
            if new || overlay.dropped.contains(&device) || seq > self.cursor(device, conversation)? {
                flush.put(&rows::cursor_key(device, conversation), &rows::encode_seq(seq));
            }
        }
        for row in overlay.rows.values() {
            if self.keyed(&row.key)?.is_none_or(|kept| kept.stamp <= row.stamp) {
                flush.put(&rows::keyed_key(&row.key.encode()), &rows::encode_keyed(row));
            }
        }
        flush.put(&rows::watermark_key(log), &watermark.encode());
        let mut batch = flush.batch;
        for device in &overlay.dropped {
            for row in self.rows.prefix(rows::cursor_prefix(*device)) {
                let key = row.key()?;
                let conversation = rows::conversation_of_cursor_key(&key)?;
                // The order of two changes of one key in a batch is nobody's promise.
                if !overlay.cursors.contains_key(&(*device, conversation)) {
                    batch.remove(&self.rows, key);
                }
            }
        }
        Ok(batch.commit()?)
    }

    fn get<T>(&self, key: &[u8], decode: impl FnOnce(&[u8]) -> Result<T, BadRow>) -> Result<Option<T>, IndexError> {
        match self.rows.get(key)? {
            Some(value) => Ok(Some(decode(&value)?)),
            None => Ok(None),
        }
    }
}

/// The rows of one flush, as they are gathered.
struct Flush<'a> {
    index: &'a Index,
    replayed: bool,
    batch: OwnedWriteBatch,
    /// For one block after the other: most rows are blocks, and what is gathered of them lives until the commit.
    block: Writer,
}

impl Flush<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.batch.insert(&self.index.rows, key, value);
    }

    fn conversation(&mut self, id: ConversationId, recent: &Recent) -> Result<(), IndexError> {
        // Most conversations that are new in many are new at all: nothing of them needs to be looked for.
        let known = self.replayed || !recent.is_new();
        let mut head = if known { self.index.head(id)?.unwrap_or_default() } else { HeadRow::default() };
        head.merge(&recent.head);
        self.put(&rows::head_key(id), &head.encode());

        let mut places = recent.places.from(head.floor).peekable();
        while let Some(&(first, _)) = places.peek() {
            let (number, _) = rows::block_of(first);
            let mut block = Block::default();
            while let Some((seq, place)) = places.next_if(|(seq, _)| rows::block_of(*seq).0 == number) {
                block.set(rows::block_of(seq).1, place);
            }
            if known && !block.is_full() {
                block.merge(&self.index.block(id, number)?);
            }
            self.block.0.clear();
            block.encode(&mut self.block);
            self.batch.insert(&self.index.rows, &rows::block_key(id, number)[..], &self.block.0[..]);
        }
        for sender in &recent.senders {
            let mut filter = if known { self.index.filter(id, sender.key)? } else { Vec::new() };
            for &accepted in newest(&sender.filter) {
                remember(&mut filter, accepted);
            }
            self.put(&rows::filter_key(id, sender.key), &rows::encode_filter(newest(&filter)));
        }
        Ok(())
    }
}

fn identity_row(identity: u64) -> [u8; 9] {
    let mut row = [0; 9];
    row[0] = rows::ROWS_VERSION;
    row[1..].copy_from_slice(&identity.to_le_bytes());
    row
}
