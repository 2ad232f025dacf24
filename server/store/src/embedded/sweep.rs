//! A sweep over the whole index: does every row read, does every place hold its message, is none missing.
//!
//! Offline check and repair only. Reads; changes nothing.

use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::rows::RowKey;

use super::format::{Place, Position};
use super::index::{Index, IndexError};
use super::rows::{self, BadRow, Block, ConversationPart, HeadRow, Watermark};
use super::segments::{Reading, Segments};

/// Defects that are told one by one; more are only counted.
pub(super) const DEFECTS_MAX: usize = 1000;

/// What a sweep found.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    pub rows: u64,
    /// Messages that have a place, without those below a floor.
    pub messages: u64,
    /// Conversations of which retention has let something go.
    pub floors: u64,
    pub defects: Vec<String>,
    /// Defects beyond those.
    pub more_defects: u64,
    /// Messages between the first and the last of a conversation that have no place.
    pub holes: Vec<Hole>,
}

/// Messages that are missing within a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    pub conversation: ConversationId,
    pub first: Seq,
    pub last: Seq,
}

/// One sweep under way.
pub(super) struct Sweeper<'a> {
    segments: &'a Segments,
    /// Where each log ends.
    ends: &'a [(u16, Position)],
    /// Look at every message in the logs too, and not only at the rows.
    read_messages: bool,
    found: Sweep,
    /// The conversation whose blocks are being read.
    current: Option<Current>,
    reading: Reading,
}

/// A conversation on the way.
struct Current {
    id: ConversationId,
    head: HeadRow,
    /// The next seq that must have a place.
    next: Seq,
}

impl<'a> Sweeper<'a> {
    pub fn new(segments: &'a Segments, ends: &'a [(u16, Position)], read_messages: bool) -> Self {
        let (found, reading) = (Sweep::default(), Reading::default());
        Self { segments, ends, read_messages, found, current: None, reading }
    }

    /// Errors: only when the library can't read on; everything else is a defect.
    pub fn run(mut self, index: &Index, step: &mut dyn FnMut(u64)) -> Result<Sweep, IndexError> {
        index.walk(&[], &mut |key, value| {
            self.found.rows += 1;
            step(self.found.rows);
            if let Err(error) = self.row(key, value) {
                self.defect(error.to_string());
            }
            Ok(true)
        })?;
        self.finish_conversation();
        Ok(self.found)
    }

    fn row(&mut self, key: &[u8], value: &[u8]) -> Result<(), BadRow> {
        match key.first() {
            Some(b'c') => self.conversation_row(key, value)?,
            Some(b'u') => drop(rows::decode_user(&rows::name_of_user_key(key)?, value)?),
            Some(b'l') => drop(rows::conversation_of_list_key(key)?),
            Some(b'k') => drop(rows::decode_seq(value)?),
            Some(&rows::KEYED_PREFIX) => {
                let own = RowKey::decode(key.get(1..).unwrap_or(&[])).map_err(|_| BadRow("row key"))?;
                rows::decode_keyed(own, value)?;
            }
            Some(b'm') if key == rows::IDENTITY_KEY => {}
            Some(b'm') if key.starts_with(rows::KEPT_PREFIX) => {
                rows::log_of_kept_key(key)?;
                rows::Kept::decode(value)?;
            }
            Some(b'm') => {
                let (log, watermark) = (rows::log_of_watermark_key(key)?, Watermark::decode(value)?);
                let end = self.ends.iter().find(|(of, _)| *of == log).map(|(_, end)| *end);
                if end.is_none_or(|end| end < watermark.at) {
                    self.defect(format!("log {log} ends before what the index has seen of it"));
                }
            }
            _ => return Err(BadRow("a key of no known kind")),
        }
        Ok(())
    }

    fn conversation_row(&mut self, key: &[u8], value: &[u8]) -> Result<(), BadRow> {
        let (id, part) = rows::conversation_of_key(key)?;
        match part {
            ConversationPart::Filter => drop(rows::decode_filter(value)?),
            ConversationPart::Head => {
                self.finish_conversation();
                let head = HeadRow::decode(value)?;
                self.found.floors += u64::from(head.floor != Seq::ZERO);
                self.current = Some(Current { id, next: head.first(), head });
            }
            ConversationPart::Block(number) => self.block(id, number, &Block::decode(value)?),
        }
        Ok(())
    }

    fn block(&mut self, id: ConversationId, number: u64, block: &Block) {
        if self.current.as_ref().is_none_or(|current| current.id != id) {
            return self.defect(format!("conversation {id}: places without a head"));
        }
        for (slot, place) in block.0.iter().enumerate() {
            let Some(place) = place else { continue };
            let seq = Seq(number.saturating_mul(rows::BLOCK_PLACES).saturating_add(slot as u64 + 1));
            let Some(current) = self.current.as_mut().filter(|current| seq >= current.head.first()) else { continue };
            self.found.messages += 1;
            if seq > current.head.head {
                self.defect(format!("conversation {id}: message {seq} is above the head"));
                continue;
            }
            if seq > current.next {
                let hole = Hole { conversation: id, first: current.next, last: Seq(seq.0 - 1) };
                self.found.holes.push(hole);
            }
            current.next = seq.next();
            if self.read_messages
                && let Err(what) = self.message(id, seq, place)
            {
                self.defect(format!("conversation {id}: message {seq}: {what}"));
            }
        }
    }

    fn message(&mut self, id: ConversationId, seq: Seq, place: &Place) -> Result<(), String> {
        match self.reading.message(self.segments, *place, (id, seq)) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("another record lies at its place".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn finish_conversation(&mut self) {
        let Some(Current { id, head, next }) = self.current.take() else { return };
        if head.head != Seq::ZERO && next <= head.head {
            self.found.holes.push(Hole { conversation: id, first: next, last: head.head });
        }
    }

    fn defect(&mut self, what: String) {
        if self.found.defects.len() < DEFECTS_MAX {
            self.found.defects.push(what);
        } else {
            self.found.more_defects += 1;
        }
    }
}
