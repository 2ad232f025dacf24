//! How our values stand in columns. Pure.
//!
//! Invariant: a number of 64 bits is stored bit by bit in a `bigint` and comes back as it was; only bounds of ranges are
//! cut to what a `bigint` can say.

use std::error::Error;

use bytes::BytesMut;
use ringline_schema::ids::{ConversationId, DeviceKey, Seq, UserName};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

use super::errors::QueryError;

/// A `uuid` column: sixteen bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Id(pub u128);

impl From<ConversationId> for Id {
    fn from(id: ConversationId) -> Self {
        Self(id.0)
    }
}

impl From<DeviceKey> for Id {
    fn from(key: DeviceKey) -> Self {
        Self(key.0)
    }
}

impl ToSql for Id {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.extend_from_slice(&self.0.to_be_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Id {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(u128::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }
}

/// A number as it is stored.
pub(super) fn stored(number: u64) -> i64 {
    number as i64
}

/// A number that was stored.
pub(super) fn number(stored: i64) -> u64 {
    stored as u64
}

/// A bound of a range of seqs: none is above `i64::MAX`.
pub(super) fn bound(seq: Seq) -> i64 {
    i64::try_from(seq.0).unwrap_or(i64::MAX)
}

/// A name that was stored.
pub(super) fn name(text: &str) -> Result<UserName, QueryError> {
    UserName::new(text).map_err(|_| QueryError::Damaged("a name"))
}

/// The first bytes behind everything that begins with `prefix`, which is not empty and does not begin with 0xff.
pub(super) fn behind(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            break;
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_behind_all_that_begins_with_it() {
        assert_eq!(behind(b"ma"), b"mb");
        assert_eq!(behind(&[b'm', 0xff, 0xff]), b"n");
        assert_eq!(behind(&[b'd', b'x', 0]), [b'd', b'x', 1]);
    }

    #[test]
    fn numbers_come_back() {
        for each in [0, 1, u64::MAX, 1 << 63, (1 << 63) - 1] {
            assert_eq!(number(stored(each)), each);
        }
        assert_eq!(bound(Seq(u64::MAX)), i64::MAX);
    }
}
