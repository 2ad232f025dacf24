//! Checkpoint files: every row that is not the place of a message, at one instant, so that segments of the log can go.
//!
//! Written by the retention thread, read at the start and by offline commands; blocks. One file: chunks of length `u32`,
//! crc32c `u32` (begun with the chunk's number) and payload; the first is the header, the last the footer, between them
//! rows. Invariants: a file named `*.checkpoint` is whole and synced, and its name is durable before anything that it
//! stands for goes; a crash while writing leaves at most a `*.new`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use ringline_schema::pack;

use super::index::Index;
use super::retain::{EachStep, RetainError, Step};
use super::rows::{self, Kept, Watermark};
use super::segments::{ReadError, sync_folder};

const FORMAT: &[u8] = b"ringline checkpoint 1";
/// Rows are gathered to about this much before a chunk is written.
const CHUNK_BYTES: usize = 256 * 1024;
/// A chunk that says to be larger is damage: room for one largest row.
const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;
const FRAME_BYTES: usize = 8;
const EXTENSION: &str = "checkpoint";

/// What a checkpoint says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Of the data folder.
    pub identity: u64,
    /// They are counted, the newest counts.
    pub number: u64,
    /// Where each log begins, once this checkpoint is there.
    pub kept: BTreeMap<u16, Kept>,
}

/// What stands behind the rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Footer {
    pub rows: u64,
    /// How far the rows know each log.
    pub watermarks: BTreeMap<u16, Watermark>,
}

/// A checkpoint that reads to its end.
pub(super) type Whole = (PathBuf, Header, Footer);

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = pack::Writer::default();
        out.bytes(FORMAT);
        out.number(self.identity);
        out.number(self.number);
        encode_map(&mut out, self.kept.iter().map(|(log, kept)| (*log, kept.encode())));
        out.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut reader = pack::Reader(bytes);
        let read = |reader: &mut pack::Reader<'_>| -> Result<Self, pack::BadPack> {
            let (identity, number) = (reader.number()?, reader.number()?);
            Ok(Self { identity, number, kept: decode_map(reader, Kept::decode)? })
        };
        match reader.bytes() {
            Ok(FORMAT) => read(&mut reader).map_err(|_| "the header of this checkpoint does not read"),
            Ok(_) | Err(_) => Err("not a checkpoint, or of a format that this version does not read"),
        }
    }
}

impl Footer {
    fn encode(&self) -> Vec<u8> {
        let mut out = pack::Writer::default();
        out.number(self.rows);
        encode_map(&mut out, self.watermarks.iter().map(|(log, watermark)| (*log, watermark.encode())));
        out.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, pack::BadPack> {
        let mut reader = pack::Reader(bytes);
        Ok(Self { rows: reader.number()?, watermarks: decode_map(&mut reader, Watermark::decode)? })
    }
}

fn encode_map(out: &mut pack::Writer, entries: impl ExactSizeIterator<Item = (u16, Vec<u8>)>) {
    out.number(entries.len() as u64);
    for (log, bytes) in entries {
        out.number(u64::from(log));
        out.bytes(&bytes);
    }
}

fn decode_map<T>(
    reader: &mut pack::Reader<'_>,
    decode: fn(&[u8]) -> Result<T, rows::BadRow>,
) -> Result<BTreeMap<u16, T>, pack::BadPack> {
    const BAD: pack::BadPack = pack::BadPack("log");
    let mut found = BTreeMap::new();
    for _ in 0..reader.number()? {
        let log = u16::try_from(reader.number()?).map_err(|_| BAD)?;
        found.insert(log, decode(reader.bytes()?).map_err(|_| BAD)?);
    }
    Ok(found)
}

/// The folder of the checkpoints.
#[derive(Clone, Debug)]
pub(super) struct Checkpoints {
    /// `dir/checkpoint`
    folder: PathBuf,
}

impl Checkpoints {
    pub fn new(dir: &Path) -> Self {
        Self { folder: dir.join("checkpoint") }
    }

    pub fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:010}.{EXTENSION}"))
    }

    /// The checkpoints that are there, in rising order. None: no such folder.
    pub fn numbers(&self) -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbers),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                numbers
                    .extend(path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok()));
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The newest one of this data folder whose header reads. `Err` within: why the newest does not, when none does.
    pub fn newest(&self, identity: u64) -> io::Result<Option<Result<Opened, ReadError>>> {
        let mut refused = None;
        for number in self.numbers()?.into_iter().rev() {
            match Opened::open(self.path(number), identity) {
                Ok(opened) => return Ok(Some(Ok(opened))),
                Err(error) => drop(refused.get_or_insert(error)),
            }
        }
        Ok(refused.map(Err))
    }

    /// The newest one that reads to its end; like [`Checkpoints::newest`] otherwise.
    pub fn newest_whole(&self, identity: u64) -> io::Result<Option<Result<Whole, ReadError>>> {
        let mut refused = None;
        for number in self.numbers()?.into_iter().rev() {
            let path = self.path(number);
            let read = Opened::open(path.clone(), identity).and_then(|opened| {
                let header = opened.header.clone();
                Ok((header, opened.read(&mut |_| Ok::<_, ReadError>(()))?))
            });
            match read {
                Ok((header, footer)) => return Ok(Some(Ok((path, header, footer)))),
                Err(error) => drop(refused.get_or_insert(error)),
            }
        }
        Ok(refused.map(Err))
    }

    /// Writes a checkpoint of all that the index holds now. It is durable, with its name, when this returns its bytes.
    pub fn write(&self, index: &Index, header: &Header, step: EachStep<'_>) -> Result<u64, RetainError> {
        let (path, new) = (self.path(header.number), self.path(header.number).with_extension("new"));
        let io_error = |source| RetainError::Io { path: new.clone(), source };
        if !self.folder.exists() {
            fs::create_dir_all(&self.folder).map_err(io_error)?;
            self.folder.parent().map_or(Ok(()), sync_folder).map_err(io_error)?;
        }
        step(Step::Begin)?;
        let written = fill(&new, index, header, step);
        if matches!(&written, Err(RetainError::Io { .. })) {
            // What a full disk let it have is given back at once.
            let _ = fs::remove_file(&new);
        }
        let bytes = written?;
        step(Step::Name)?;
        fs::rename(&new, &path).and_then(|()| sync_folder(&self.folder)).map_err(io_error)?;
        Ok(bytes)
    }

    /// Removes all that are older than `number`, and what was begun and not finished.
    pub fn remove_older(&self, number: u64) -> io::Result<()> {
        for older in self.numbers()?.into_iter().filter(|older| *older < number) {
            fs::remove_file(self.path(older))?;
        }
        self.remove_unfinished()
    }

    /// Removes what an interrupted writing left.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "new") {
                fs::remove_file(path)?;
            }
        }
        sync_folder(&self.folder)
    }
}

/// Everything but the name.
fn fill(new: &Path, index: &Index, header: &Header, step: EachStep<'_>) -> Result<u64, RetainError> {
    let io_error = |source| RetainError::Io { path: new.to_owned(), source };
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(new).map_err(io_error)?;
    let mut out = Chunks { file, number: 0, bytes: 0 };
    out.put(&header.encode()).map_err(io_error)?;
    let (mut footer, mut rows, mut refused) = (Footer::default(), pack::Writer::default(), None);
    index.snapshot(&mut |key, value| {
        if key.starts_with(rows::WATERMARK_PREFIX) {
            footer.watermarks.insert(rows::log_of_watermark_key(key)?, Watermark::decode(value)?);
            return Ok(true);
        }
        rows.bytes(key);
        rows.bytes(value);
        footer.rows += 1;
        if rows.0.len() >= CHUNK_BYTES {
            refused = step(Step::Rows).and_then(|()| out.put(&rows.0).map_err(io_error)).err();
            rows.0.clear();
        }
        Ok(refused.is_none())
    })?;
    if let Some(error) = refused {
        return Err(error);
    }
    if !rows.0.is_empty() {
        step(Step::Rows)?;
        out.put(&rows.0).map_err(io_error)?;
    }
    // An empty chunk ends the rows.
    out.put(&[]).and_then(|()| out.put(&footer.encode())).map_err(io_error)?;
    step(Step::Sync)?;
    out.file.sync_all().map_err(io_error)?;
    Ok(out.bytes)
}

/// A file as it is written.
struct Chunks {
    file: File,
    number: u32,
    bytes: u64,
}

impl Chunks {
    fn put(&mut self, payload: &[u8]) -> io::Result<()> {
        let mut frame = [0; FRAME_BYTES];
        frame[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        frame[4..].copy_from_slice(&crc32c::crc32c_append(self.number, payload).to_le_bytes());
        self.file.write_all(&frame)?;
        self.file.write_all(payload)?;
        self.number = self.number.wrapping_add(1);
        self.bytes += (FRAME_BYTES + payload.len()) as u64;
        Ok(())
    }
}

/// A checkpoint whose header was read.
#[derive(Debug)]
pub(super) struct Opened {
    pub header: Header,
    pub path: PathBuf,
    file: BufReader<File>,
    number: u32,
    at: u64,
}

impl Opened {
    /// Errors: what the operating system refuses, and a header that does not read or is of another data folder.
    pub fn open(path: PathBuf, identity: u64) -> Result<Self, ReadError> {
        let file = File::open(&path).map_err(|source| ReadError::Io { path: path.clone(), source })?;
        let file = BufReader::with_capacity(CHUNK_BYTES, file);
        let mut opened = Self { header: Header::default(), path, file, number: 0, at: 0 };
        let header = opened.chunk()?;
        opened.header = Header::decode(&header).map_err(|what| opened.bad(what))?;
        if opened.header.identity != identity {
            return Err(opened.bad("this checkpoint belongs to another data folder"));
        }
        Ok(opened)
    }

    /// Gives all rows to `each`, a chunk at a time.
    pub fn read<E: From<ReadError>>(mut self, each: &mut dyn FnMut(Rows<'_>) -> Result<(), E>) -> Result<Footer, E> {
        let mut rows = 0;
        loop {
            let chunk = self.chunk()?;
            if chunk.is_empty() {
                break;
            }
            let count = count_rows(&chunk).ok_or_else(|| self.bad("rows that do not read"))?;
            rows += count;
            each(Rows(pack::Reader(&chunk)))?;
        }
        let footer = self.chunk()?;
        let footer = Footer::decode(&footer).map_err(|_| self.bad("the footer does not read"))?;
        if footer.rows != rows {
            return Err(self.bad("rows are missing").into());
        }
        Ok(footer)
    }

    fn chunk(&mut self) -> Result<Vec<u8>, ReadError> {
        let mut frame = [0; FRAME_BYTES];
        self.fill(&mut frame)?;
        let ([length, crc], _) = frame.as_chunks::<4>() else { return Err(self.bad("impossible length")) };
        let (length, crc) = (u32::from_le_bytes(*length) as usize, u32::from_le_bytes(*crc));
        if length > CHUNK_BYTES_MAX {
            return Err(self.bad("impossible length"));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload)?;
        if crc32c::crc32c_append(self.number, &payload) != crc {
            return Err(self.bad("checksum does not match"));
        }
        self.number = self.number.wrapping_add(1);
        self.at += (FRAME_BYTES + length) as u64;
        Ok(payload)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.file.read_exact(buffer).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.bad("the file ends early"),
            _ => ReadError::Io { path: self.path.clone(), source },
        })
    }

    fn bad(&self, what: &str) -> ReadError {
        let offset = u32::try_from(self.at).unwrap_or(u32::MAX);
        ReadError::Bad { path: self.path.clone(), offset, what: what.to_owned() }
    }
}

/// The rows of one chunk, which are known to read.
pub(super) struct Rows<'a>(pack::Reader<'a>);

impl<'a> Iterator for Rows<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        next_row(&mut self.0)
    }
}

fn next_row<'a>(reader: &mut pack::Reader<'a>) -> Option<(&'a [u8], &'a [u8])> {
    if reader.0.is_empty() {
        return None;
    }
    Some((reader.bytes().ok()?, reader.bytes().ok()?))
}

/// `None`: the bytes end within a row, or a row is not one that belongs here.
fn count_rows(chunk: &[u8]) -> Option<u64> {
    let (mut reader, mut count) = (pack::Reader(chunk), 0);
    while !reader.0.is_empty() {
        let (key, _) = next_row(&mut reader)?;
        if !rows::outlives_log(key) {
            return None;
        }
        count += 1;
    }
    Some(count)
}
