//! Rows about messages that retention has let go of: what they became, and who has deleted them for himself. Owned by who
//! carries out retention.
//!
//! A look through these rows goes some at a time, a part of it each pass, and begins again when floors have risen. A row
//! stays as long as anything that it changes is shown: an amendment is a message of its own and may be kept when its
//! original is gone. What was missed because it lay in no index yet goes in a later look; nothing depends on it.

use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::rows::{RowKey, RowValue};

use super::Node;
use super::index::IndexError;
use super::retain::{EachStep, RetainError, Step};
use super::rows::{self, BadRow};

/// Rows that one pass looks at.
const ROWS_MAX: u64 = 65_536;
/// The tables, in order of key.
const TABLES: [&[u8]; 2] = [b"a", b"h"];
/// Looks after a rise of floors: the one that is under way may be past some of them.
const LOOKS: u8 = 2;

/// See the module.
pub(super) struct Orphans {
    /// Looks that are still to be ended.
    looks: u8,
    /// The last row that this one has seen.
    after: Vec<u8>,
    pub rows_max: u64,
    /// Rows seen and dropped so far.
    pub seen: u64,
    pub dropped: u64,
}

impl Default for Orphans {
    fn default() -> Self {
        // Floors may have risen before the start.
        Self { looks: 1, after: Vec::new(), rows_max: ROWS_MAX, seen: 0, dropped: 0 }
    }
}

impl Orphans {
    /// Drops what is found in the next rows. `risen`: floors have risen since the last call.
    pub fn drop_some(&mut self, node: &Node, risen: bool, step: EachStep<'_>) -> Result<(), RetainError> {
        if risen {
            self.looks = LOOKS;
        }
        if self.looks == 0 {
            return Ok(());
        }
        step(Step::Scan)?;
        let (mut left, mut gone, mut first) = (self.rows_max, Vec::new(), None);
        for table in TABLES {
            let prefix = rows::keyed_key(table);
            let after = std::mem::take(&mut self.after);
            if !after.is_empty() && after > prefix && !after.starts_with(&prefix) {
                self.after = after;
                continue;
            }
            node.index.walk_after((&prefix, &after), &mut |key, _| {
                left = left.saturating_sub(1);
                self.seen += 1;
                let own = RowKey::decode(key.get(1..).unwrap_or_default()).map_err(|_| BadRow("row key"))?;
                if is_orphan(node, &own, &mut first)? {
                    gone.push(key.to_vec());
                }
                if left == 0 {
                    self.after = key.to_vec();
                }
                Ok(left > 0)
            })?;
            if left == 0 {
                break;
            }
        }
        if left > 0 {
            self.looks -= 1;
        }
        if !gone.is_empty() {
            step(Step::Floors)?;
            node.index.remove(&gone)?;
            self.dropped += gone.len() as u64;
        }
        Ok(())
    }
}

/// Whether nothing that is shown depends on this row. `known`: the first message of the conversation that was asked last.
fn is_orphan(node: &Node, key: &RowKey, known: &mut Option<(ConversationId, Seq)>) -> Result<bool, IndexError> {
    let (RowKey::Amended(id, seq) | RowKey::Hidden(_, id, seq)) = *key else { return Ok(false) };
    let first = match *known {
        Some((of, first)) if of == id => first,
        Some(_) | None => node.index.head(id)?.unwrap_or_default().first(),
    };
    *known = Some((id, first));
    if seq >= first {
        return Ok(false);
    }
    // The amendment that it tells of, or hides, may be shown.
    let amended = node.value(&RowKey::Amended(id, seq))?;
    Ok(!matches!(amended, Some(RowValue::Amended(amended)) if amended.by >= first))
}
