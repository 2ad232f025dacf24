//! Messages as they are after their amendments, from overlays, index and logs. On the index thread of the shard that
//! asks; the rule is [`crate::shown`].

use std::collections::{BTreeMap, BTreeSet};

use ringline_schema::ids::{ConversationId, Seq};
use ringline_schema::record::StoredMessage;
use ringline_schema::rows::{AmendedRow, Row, RowKey, RowList, RowValue};

use super::Node;
use super::index::IndexError;
use super::segments::Reading;
use crate::shown::{self, Reader};

/// What has become of the messages of one page.
#[derive(Debug, Default)]
pub(super) struct Changed {
    amended: BTreeMap<Seq, AmendedRow>,
    hidden: BTreeSet<Seq>,
}

impl Node {
    /// Of the wanted messages, which are in rising order without a gap.
    pub(super) fn changed(
        &self,
        id: ConversationId,
        wanted: &[Seq],
        reader: Reader<'_>,
    ) -> Result<Changed, IndexError> {
        let Some(first) = wanted.first() else { return Ok(Changed::default()) };
        let before = Seq(first.0.saturating_sub(1));
        let rows = self.rows(&RowList::Amended(id), Some(&RowKey::Amended(id, before)), wanted.len())?;
        let amended = |row: Row| match (row.key, row.value) {
            (RowKey::Amended(_, seq), Some(RowValue::Amended(row))) => Some((seq, row)),
            (_, _) => None,
        };
        let amended = rows.into_iter().filter_map(amended).collect();
        let Some(user) = reader.user else { return Ok(Changed { amended, hidden: BTreeSet::new() }) };
        let (list, before) = (RowList::Hidden(user.clone(), id), RowKey::Hidden(user.clone(), id, before));
        let hidden = |row: Row| if let RowKey::Hidden(_, _, seq) = row.key { Some(seq) } else { None };
        let rows = self.rows(&list, Some(&before), wanted.len())?;
        Ok(Changed { amended, hidden: rows.into_iter().filter_map(hidden).collect() })
    }

    /// A message of that page as its reader is shown it.
    pub(super) fn shown(
        &self,
        message: StoredMessage,
        changed: &Changed,
        reader: Reader<'_>,
    ) -> Result<StoredMessage, IndexError> {
        let id = message.conversation;
        if let Some((of, _)) = message.amends() {
            let key = reader.user.map(|user| RowKey::Hidden(user.clone(), id, of));
            let hidden = key.map(|key| self.row(&key)).transpose()?.flatten().is_some();
            let row = match self.value(&RowKey::Amended(id, of))? {
                Some(RowValue::Amended(row)) if !hidden => Some(row),
                Some(_) | None => None,
            };
            return Ok(shown::amendment(message, row.as_ref()));
        }
        if changed.hidden.contains(&message.seq) {
            return Ok(message.hidden());
        }
        let Some(row) = changed.amended.get(&message.seq) else { return Ok(message) };
        let edit = match reader.edit(row) {
            Some(by) => {
                let place = self.places(id, &[by])?.get(&by).copied();
                Some(self.message((id, by), place.ok_or(IndexError::Missing(id, by))?, &mut Reading::default())?)
            }
            None => None,
        };
        Ok(shown::original(message, row, edit))
    }
}
