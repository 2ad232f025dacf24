//! What the embedded store costs: a commit by batch size, messages a second with the index keeping up, and the index
//! library against another with the rows that are really written.
//!
//! `cargo bench -p ringline-store`. Data lies in the system's folder for temporary files: point `TMPDIR` at the disk that
//! is meant, and not at memory. Figures of a virtual machine's disk are noisy.

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use redb::ReadableDatabase;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::BodyKind;
use ringline_schema::record::{Record, StoredMessage};
use ringline_store::embedded::{EmbeddedOptions, EmbeddedShard, EmbeddedStore};
use ringline_store::{Lsn, Store, StoreError, StoreEvent};
use rustix::event::{PollFd, PollFlags, poll};

const BODY_BYTES: usize = 64;
/// About what such a message takes in the log.
const BARE_RECORD_BYTES: usize = 176;
/// Conversations that talk at the same time: few that say much, or many that say little.
const CONVERSATIONS_BUSY: usize = 1000;
const CONVERSATIONS_WIDE: usize = 20_000;
/// One flush of the index.
const FLUSH_MESSAGES: usize = 65_536;
/// The same for both libraries.
const CACHE_BYTES: usize = 32 * 1024 * 1024;
/// Flushes of new conversations before any is measured, so that both libraries hold more than their caches.
const GROWTH_FLUSHES: u64 = 20;
const SUSTAINED_MESSAGES: usize = 262_144;

/// Conversations that take messages by turns.
struct Traffic {
    messages: Vec<StoredMessage>,
    turn: usize,
}

impl Traffic {
    fn new(conversations: usize) -> Self {
        let messages = (0..conversations).map(|number| {
            let from = UserName::new(&format!("user {number}")).unwrap();
            let to = UserName::new(&format!("user {}", number + 1)).unwrap();
            StoredMessage {
                conversation: ConversationId::direct(&from, &to),
                seq: Seq(0),
                from,
                to,
                device: DeviceId(1),
                client_seq: 0,
                time_ms: 1_700_000_000_000,
                kind: BodyKind::Text,
                body: vec![b'x'; BODY_BYTES].into(),
                extra: None,
            }
        });
        Self { messages: messages.collect(), turn: 0 }
    }

    fn created(&self) -> impl Iterator<Item = Record> {
        self.messages.iter().map(|message| Record::Conversation {
            conversation: message.conversation,
            members: [message.from.clone(), message.to.clone()],
            created_ms: message.time_ms,
        })
    }

    fn next(&mut self) -> Record {
        self.turn = (self.turn + 1) % self.messages.len();
        let message = &mut self.messages[self.turn];
        message.seq = message.seq.next();
        message.client_seq += 1;
        message.time_ms += 10;
        Record::Message(message.clone().into())
    }
}

fn open(dir: &Path, options: EmbeddedOptions) -> EmbeddedShard {
    let (mut handles, _) = EmbeddedStore::open(dir, 1, options).unwrap();
    handles.remove(0)
}

/// Waits as a reactor does: for the descriptor, then polls.
fn committed(store: &mut EmbeddedShard, wanted: Lsn, events: &mut Vec<StoreEvent>) {
    loop {
        store.submit();
        store.poll(events);
        for event in events.drain(..) {
            match event {
                StoreEvent::Committed(lsn) if lsn >= wanted => return,
                StoreEvent::Committed(_) | StoreEvent::Loaded(..) => {}
                StoreEvent::Failed => panic!("the store failed"),
            }
        }
        let wake = store.wake_fd().unwrap();
        poll(&mut [PollFd::new(&wake, PollFlags::IN)], None).unwrap();
        let _ = rustix::io::read(wake, &mut [0u8; 8]);
    }
}

/// Appends and commits one batch; waits where the index pushes back.
fn batch(store: &mut EmbeddedShard, records: &[Record], events: &mut Vec<StoreEvent>) {
    let mut last = Lsn::default();
    for record in records {
        last = loop {
            match store.append(record) {
                Ok(lsn) => break lsn,
                Err(StoreError::Full) => {
                    // What is queued has to be committed and what came in has to be taken before there is room again.
                    store.submit();
                    store.poll(events);
                    events.clear();
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(error) => panic!("{error}"),
            }
        };
    }
    committed(store, last, events);
}

fn log_commit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log_commit");
    for size in [1, 16, 256, 2048] {
        let dir = tempfile::tempdir().unwrap();
        // The index may lag as far as it likes: this is about the log.
        let options = EmbeddedOptions { index_lag_bytes_max: u64::MAX, ..EmbeddedOptions::default() };
        let mut store = open(dir.path(), options);
        let (mut traffic, mut events) = (Traffic::new(CONVERSATIONS_BUSY), Vec::new());
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("store", size), |bencher| {
            bencher.iter_batched(
                || (0..size).map(|_| traffic.next()).collect::<Vec<_>>(),
                |records| batch(&mut store, &records, &mut events),
                BatchSize::PerIteration,
            );
        });
        drop(store);
        bare_file(&mut group, size, dir.path());
    }
    group.finish();
}

/// The floor: as many bytes written to a plain file and synced, nothing else.
fn bare_file(group: &mut BenchmarkGroup<'_, WallTime>, size: usize, dir: &Path) {
    let file = std::fs::File::create(dir.join("bare")).unwrap();
    let bytes = vec![7; size * BARE_RECORD_BYTES];
    let mut offset = 0;
    group.bench_function(BenchmarkId::new("bare file", size), |bencher| {
        bencher.iter(|| {
            file.write_all_at(&bytes, offset).unwrap();
            file.sync_data().unwrap();
            offset += bytes.len() as u64;
        });
    });
}

/// Many messages with their index, flushes and close included.
fn sustained(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sustained");
    group.throughput(Throughput::Elements(SUSTAINED_MESSAGES as u64));
    group.bench_function("2048", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                let dir = tempfile::tempdir().unwrap();
                let mut store = open(dir.path(), EmbeddedOptions::default());
                let (mut traffic, mut events) = (Traffic::new(CONVERSATIONS_BUSY), Vec::new());
                let started = Instant::now();
                for _ in 0..SUSTAINED_MESSAGES / 2048 {
                    let records: Vec<_> = (0..2048).map(|_| traffic.next()).collect();
                    batch(&mut store, &records, &mut events);
                }
                store.close().unwrap();
                took += started.elapsed();
            }
            took
        });
    });
    group.finish();
}

type Row = (Vec<u8>, Vec<u8>);

/// The same rows for other conversations, users and devices.
fn moved(rows: &[Row], round: u64) -> Vec<Row> {
    let shift = round.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let mut moved = rows.to_vec();
    for (key, _) in &mut moved {
        key.iter_mut().skip(1).zip(shift).for_each(|(byte, shift)| *byte ^= shift);
    }
    moved
}

/// The rows that a store has written for one flush of messages, in the order of their keys.
fn real_rows(conversations: usize) -> Vec<Row> {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path(), EmbeddedOptions::default());
    let mut traffic = Traffic::new(conversations);
    let records: Vec<_> = traffic.created().collect();
    batch(&mut store, &records, &mut Vec::new());
    for _ in 0..FLUSH_MESSAGES / 1024 {
        let records: Vec<_> = (0..1024).map(|_| traffic.next()).collect();
        batch(&mut store, &records, &mut Vec::new());
    }
    store.close().unwrap();
    drop(store);
    let database = fjall::Database::builder(dir.path().join("index")).open().unwrap();
    let rows = database.keyspace("rows", fjall::KeyspaceCreateOptions::default).unwrap();
    rows.iter()
        .map(|row| {
            let (key, value) = row.into_inner().unwrap();
            (key.to_vec(), value.to_vec())
        })
        .collect()
}

const TABLE: redb::TableDefinition<'_, &[u8], &[u8]> = redb::TableDefinition::new("rows");

fn open_fjall(dir: &Path) -> (fjall::Database, fjall::Keyspace) {
    let database =
        fjall::Database::builder(dir.join("fjall")).worker_threads(1).cache_size(CACHE_BYTES as u64).open().unwrap();
    let rows = database.keyspace("rows", fjall::KeyspaceCreateOptions::default).unwrap();
    (database, rows)
}

fn write_fjall((database, keyspace): &(fjall::Database, fjall::Keyspace), rows: &[Row]) {
    let mut batch = database.batch().durability(Some(fjall::PersistMode::SyncData));
    for (key, value) in rows {
        batch.insert(keyspace, &key[..], &value[..]);
    }
    batch.commit().unwrap();
}

fn write_redb(database: &redb::Database, rows: &[Row]) {
    let transaction = database.begin_write().unwrap();
    let mut table = transaction.open_table(TABLE).unwrap();
    for (key, value) in rows {
        table.insert(&key[..], &value[..]).unwrap();
    }
    drop(table);
    transaction.commit().unwrap();
}

/// Flushes, each an atomic, synced batch: the same busy conversations again and again, and ever new ones. Then reads from
/// what has come together.
fn index(criterion: &mut Criterion) {
    let (busy, rows) = (real_rows(CONVERSATIONS_BUSY), real_rows(CONVERSATIONS_WIDE));
    let mut group = criterion.benchmark_group("index_flush");
    group.throughput(Throughput::Elements(FLUSH_MESSAGES as u64));
    let dir = tempfile::tempdir().unwrap();
    let fjall = open_fjall(dir.path());
    let redb = redb::Builder::new().set_cache_size(CACHE_BYTES).create(dir.path().join("redb")).unwrap();
    group.bench_function("fjall, busy conversations", |bencher| bencher.iter(|| write_fjall(&fjall, &busy)));
    group.bench_function("redb, busy conversations", |bencher| bencher.iter(|| write_redb(&redb, &busy)));
    for round in 0..GROWTH_FLUSHES {
        let rows = moved(&rows, round);
        write_fjall(&fjall, &rows);
        write_redb(&redb, &rows);
    }
    let (mut one, mut other) = (GROWTH_FLUSHES, GROWTH_FLUSHES);
    let next = |round: &mut u64| {
        *round += 1;
        moved(&rows, *round)
    };
    group.bench_function("fjall, new conversations", |bencher| {
        bencher.iter_batched(|| next(&mut one), |rows| write_fjall(&fjall, &rows), BatchSize::PerIteration);
    });
    group.bench_function("redb, new conversations", |bencher| {
        bencher.iter_batched(|| next(&mut other), |rows| write_redb(&redb, &rows), BatchSize::PerIteration);
    });
    group.finish();

    let mut group = criterion.benchmark_group("index_read");
    let mut turn = 0;
    let mut key = || {
        turn = (turn + 7919) % rows.len();
        &rows[turn].0[..]
    };
    group.bench_function("fjall point", |bencher| bencher.iter(|| black_box(fjall.1.get(key()).unwrap().unwrap())));
    group.bench_function("fjall range of 20", |bencher| {
        bencher.iter(|| fjall.1.range(key()..).take(20).map(|row| row.into_inner().unwrap().1.len()).sum::<usize>());
    });
    let table = redb.begin_read().unwrap().open_table(TABLE).unwrap();
    group.bench_function("redb point", |bencher| bencher.iter(|| black_box(table.get(key()).unwrap().unwrap())));
    group.bench_function("redb range of 20", |bencher| {
        bencher.iter(|| {
            let range = table.range(key()..).unwrap();
            range.take(20).map(|row| row.unwrap().1.value().len()).sum::<usize>()
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = log_commit, sustained, index
}
criterion_main!(benches);
