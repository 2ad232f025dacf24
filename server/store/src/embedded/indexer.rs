//! The index thread of a shard: follows its log behind the acknowledgements, answers questions, prepares segments.
//!
//! One plain thread a shard; everything that blocks happens here. Jobs are done in the order they were sent, so an answer
//! sees every record whose commit was announced before the question. The log itself is the queue: what is announced is
//! only how far it reaches, the records are read back from the page cache, the same way as at recovery. So memory here
//! does not grow with the backlog, and live and recovered records take one path. Rows are written by a thread of their
//! own ([`super::flusher`]); this one waits for it only when the next generation is full before the last is written.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvError, Sender, TryRecvError, at, never, select};
use ringline_schema::disk::{self, Indexed};
use ringline_schema::record::{Answer, Query};

use super::flusher::Flusher;
use super::format::{Framed, Kind, Place, Position};
use super::index::IndexError;
use super::query;
use super::rows::Watermark;
use super::scan::{Found, Scanner};
use super::segments::{FOREIGN, ReadError, Segment, is_full};
use super::space::Space;
use super::{EmbeddedOptions, Node};
use crate::LoadToken;

/// Records that are applied under one hold of the overlay's lock.
pub(super) const APPLY_RECORDS_MAX: usize = 256;

/// Work for an index thread.
#[derive(Debug)]
pub(super) enum Job {
    /// The log is durable up to here; `bytes` counts the log's bytes since the start.
    Committed {
        to: Position,
        bytes: u64,
    },
    Load(LoadToken, Query),
    /// Make this segment ready.
    Prepare(u32),
    /// Flush, mark the log as closed, end.
    Close,
}

/// What an index thread gives back.
#[derive(Debug)]
pub(super) enum Reply {
    Loaded(LoadToken, Answer),
    Prepared(Arc<Segment>),
    /// A segment could not be prepared or the index can't be written: the shard has to stop.
    Failed,
}

/// The state of an index thread.
pub(super) struct Indexer {
    pub node: Arc<Node>,
    pub log: u16,
    pub options: EmbeddedOptions,
    pub jobs: Receiver<Job>,
    pub replies: Sender<Reply>,
    pub wake: Arc<OwnedFd>,
    /// How many of the log's bytes the overlay has; read by the shard.
    pub applied_bytes: Arc<AtomicU64>,
    /// Set when the handle is gone: leave the backlog to the next start.
    pub stop: Arc<AtomicBool>,
    pub space: Space,
    /// How far the overlay knows the log.
    pub at: Position,
    /// What the log is read into: each commit is, so taking it anew every time would be the dearest part.
    pub scan: Vec<u8>,
    pub flush_due: Option<Instant>,
    pub flusher: Flusher,
    pub failed: bool,
}

/// Added to the nice value: about a quarter of a reactor's share where both must use one core.
pub(super) const NICENESS: i32 = 5;

impl Indexer {
    /// The thread's body. Ends at `Close`, or without flushing when the shard's handle is gone.
    pub fn run(mut self) {
        // On Linux the nice value is a thread's own.
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
        while let Some(job) = self.next_job() {
            match job {
                Some(Job::Close) => return self.close(),
                Some(job) => self.work(job),
                None => {}
            }
            self.look_for_room();
            if self.flush_due.is_some_and(|due| due <= Instant::now()) && !self.flusher.busy {
                self.flush(false);
            }
        }
    }

    /// The next job; `Some(None)`: it is time for something else. `None`: the shard's handle is gone.
    fn next_job(&mut self) -> Option<Option<Job>> {
        match self.jobs.try_recv() {
            Ok(job) => return Some(Some(job)),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => {}
        }
        // Without room a flush waits for it, and for the one before.
        let flush_due = self.flush_due.filter(|_| !self.space.is_full() && !self.flusher.busy);
        let due = flush_due.into_iter().chain(self.space.due()).min().map_or_else(never, at);
        // A thread that has ended leaves its line ready for ever: only who waits for it looks.
        let nothing = never();
        let done = if self.flusher.busy { &self.flusher.done } else { &nothing };
        select! {
            recv(self.jobs) -> job => job.ok().map(Some),
            recv(done) -> flushed => {
                self.flushed(flushed);
                Some(None)
            }
            recv(due) -> _ => Some(None),
        }
    }

    fn work(&mut self, job: Job) {
        match job {
            Job::Committed { to, bytes } => {
                if !self.failed
                    && let Err(error) = self.follow(to)
                {
                    self.fail(&error);
                }
                self.applied_bytes.store(bytes, Ordering::Relaxed);
            }
            Job::Load(token, query) => {
                let answer = if self.failed { Answer::Failed } else { query::answer(&self.node, &query) };
                self.reply(Reply::Loaded(token, answer));
            }
            Job::Prepare(number) => self.prepare(number),
            Job::Close => {}
        }
    }

    /// Makes a segment ready, or puts it off until the disk has room.
    fn prepare(&mut self, number: u32) {
        match self.node.segments.prepare(self.log, number, self.options.preparation()) {
            Ok(segment) => {
                self.space.put_off = None;
                self.reply(Reply::Prepared(segment));
            }
            Err(error) if is_full(&error) => {
                self.space.put_off = Some(number);
                self.say_full(true);
            }
            Err(source) => {
                let path = self.node.segments.path(self.log, number);
                self.fail(&ReadError::Io { path, source }.into());
            }
        }
    }

    /// Looks at the disk when it is time, and makes up for what was put off when there is room again.
    fn look_for_room(&mut self) {
        if self.failed || !self.space.is_due(Instant::now()) {
            return;
        }
        let room = self.space.has_room();
        if room && let Some(number) = self.space.put_off {
            self.prepare(number);
        }
        self.say_full(!room || self.space.put_off.is_some());
    }

    fn say_full(&mut self, full: bool) {
        if self.space.set_full(full) {
            // The shard may be asleep; see `reply`.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Reads the log up to `to` into the overlay, flushing on the way when the overlay is full.
    fn follow(&mut self, to: Position) -> Result<(), IndexError> {
        while self.at < to && !self.stop.load(Ordering::Relaxed) {
            let segment = self.node.segments.get(self.log, self.at.segment)?;
            let io_error = |source| ReadError::Io { path: segment.path.clone(), source };
            let mut scanner = if self.at.segment == to.segment {
                Scanner::of_own(Arc::clone(&segment), self.at.offset, u64::from(to.offset))
            } else {
                Scanner::to_end(Arc::clone(&segment), self.at.offset).map_err(io_error)?
            };
            scanner.lend(&mut self.scan);
            while self.at < to && self.at.segment == segment.header.number && !self.stop.load(Ordering::Relaxed) {
                scanner.read_ahead().map_err(io_error)?;
                if self.take_in(&mut scanner, &segment, to)? {
                    self.flush(false);
                }
            }
            scanner.take_back(&mut self.scan);
        }
        Ok(())
    }

    /// Takes a bounded number of records of a segment into the overlay, straight from where they were read to. True: it
    /// is full. What is read meanwhile was just written, so it comes from memory.
    fn take_in(&mut self, scanner: &mut Scanner, segment: &Segment, to: Position) -> Result<bool, IndexError> {
        let Some(overlay) = self.node.overlays.get(usize::from(self.log)) else { return Ok(false) };
        let mut overlay = overlay.young_mut();
        let mut records = 0;
        while records < APPLY_RECORDS_MAX {
            if self.at >= to || self.at.segment != segment.header.number {
                break;
            }
            let (kind, indexed, place) = next_record(scanner, segment)?;
            records += indexed.as_ref().map_or(1, Indexed::records);
            if let Some(indexed) = indexed {
                overlay.apply(indexed, place).map_err(|error| bad_record(segment, place.offset, &error))?;
            }
            self.at.offset = scanner.offset();
            if kind == Kind::Seal {
                // The slack is not needed any more. If it can't be given back, it is only room.
                let _ = segment.file.set_len(u64::from(self.at.offset));
                self.at = Position::start_of(segment.header.number.saturating_add(1));
            }
        }
        let (any, full) = (overlay.records > 0, overlay.is_full(&self.options));
        drop(overlay);
        if any && self.flush_due.is_none() {
            self.flush_due = Some(Instant::now() + Duration::from_millis(self.options.flush_interval_ms));
        }
        Ok(full)
    }

    /// Begins to move what is in memory into the index, when what was begun before is done.
    fn flush(&mut self, closed: bool) {
        // The index must not meet a full disk: its library would take nothing more. The log has it all, and while the
        // disk is full little is added.
        if !self.space.has_room() {
            self.say_full(true);
            return;
        }
        self.await_flush();
        self.flush_due = None;
        let Some(overlay) = self.node.overlays.get(usize::from(self.log)).filter(|_| !self.failed) else { return };
        let overlay = overlay.age();
        let watermark = Watermark { at: self.at, run: overlay.run, closed };
        self.flusher.begin(overlay, watermark);
    }

    fn await_flush(&mut self) {
        if self.flusher.busy {
            let flushed = self.flusher.done.recv();
            self.flushed(flushed);
        }
    }

    fn flushed(&mut self, flushed: Result<Result<(), IndexError>, RecvError>) {
        self.flusher.busy = false;
        match flushed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.fail(&error),
            Err(RecvError) => self.fail(&IndexError::FlushEnded),
        }
    }

    fn close(mut self) {
        self.flush(true);
        self.await_flush();
    }

    fn fail(&mut self, error: &IndexError) {
        tracing::error!(log = self.log, %error, "the store of this shard stops: its index thread failed");
        self.node.note_damage(error);
        self.failed = true;
        self.reply(Reply::Failed);
    }

    fn reply(&self, reply: Reply) {
        // There is room for an answer to every open question; without a handle nobody waits for one.
        if self.replies.send(reply).is_ok() {
            // The counter can't overflow in practice, and a full one is readable anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// What is wrong with a record of a log.
fn bad_record(segment: &Segment, offset: u32, what: &dyn std::fmt::Display) -> IndexError {
    ReadError::Bad { path: segment.path.clone(), offset, what: what.to_string() }.into()
}

/// The next record of a log that is known to go on, as the index wants it.
pub(super) fn next_record<'a>(
    scanner: &'a mut Scanner,
    segment: &Segment,
) -> Result<(Kind, Option<Indexed<'a>>, Place), IndexError> {
    next_framed(scanner, segment, &mut |_| ())
}

/// Like [`next_record`]; `each` sees its frame.
pub(super) fn next_framed<'a>(
    scanner: &'a mut Scanner,
    segment: &Segment,
    each: &mut dyn FnMut(&Framed<'_>),
) -> Result<(Kind, Option<Indexed<'a>>, Place), IndexError> {
    match scanner.next().map_err(|source| ReadError::Io { path: segment.path.clone(), source })? {
        Found::Record { offset, framed } => {
            each(&framed);
            let header = segment.header;
            let place = Place { log: header.log, segment: header.number, offset, bytes: framed.bytes as u32 };
            match framed.kind {
                Kind::Seal | Kind::Run => Ok((framed.kind, None, place)),
                Kind::Record(record_type) => match disk::decode_for_index(record_type, framed.payload) {
                    Ok(record) => Ok((framed.kind, Some(record), place)),
                    Err(error) => Err(bad_record(segment, offset, &error)),
                },
            }
        }
        Found::End { offset } => Err(bad_record(segment, offset, &"nothing where a record was committed")),
        Found::Bad { offset, what } => Err(bad_record(segment, offset, &what)),
        Found::Foreign { offset } => Err(bad_record(segment, offset, &FOREIGN)),
    }
}
