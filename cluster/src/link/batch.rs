//! The messages of a batch: each from one shard to another, behind an 8-byte head (length, from, to; little-endian).
//!
//! Written by a core once a turn, read by the core at the other end of the link. Payloads are not looked into and have no
//! alignment: the project's archives need none.

use bytes::{Buf, Bytes};

use super::frame::BATCH_BYTES_MAX;

/// Length of the payload, sending and receiving shard.
pub const ITEM_HEAD_BYTES: usize = 8;
/// The largest payload: alone in its batch.
pub const PAYLOAD_BYTES_MAX: usize = BATCH_BYTES_MAX - ITEM_HEAD_BYTES;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub from_shard: u16,
    pub to_shard: u16,
    pub payload: Bytes,
}

/// The batch of a peer with a defect: its lengths do not add up. What came before is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message reaches beyond the end of its batch")]
pub struct BadBatch;

/// Bytes that a payload takes in a batch.
pub fn item_bytes(payload: &[u8]) -> usize {
    ITEM_HEAD_BYTES + payload.len()
}

/// Appends a message. The caller sees to it that payload and batch keep to their limits.
pub fn append(batch: &mut Vec<u8>, (from_shard, to_shard): (u16, u16), payload: &[u8]) {
    batch.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    batch.extend_from_slice(&from_shard.to_le_bytes());
    batch.extend_from_slice(&to_shard.to_le_bytes());
    batch.extend_from_slice(payload);
}

/// The messages of a batch, in order. Ends after an error.
#[derive(Clone, Debug)]
pub struct Items(pub Bytes);

impl Iterator for Items {
    type Item = Result<Item, BadBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let Some(&[l0, l1, l2, l3, f0, f1, t0, t1]) = self.0.first_chunk::<ITEM_HEAD_BYTES>() else {
            self.0.clear();
            return Some(Err(BadBatch));
        };
        self.0.advance(ITEM_HEAD_BYTES);
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > self.0.len() {
            self.0.clear();
            return Some(Err(BadBatch));
        }
        let payload = self.0.split_to(length);
        Some(Ok(Item { from_shard: u16::from_le_bytes([f0, f1]), to_shard: u16::from_le_bytes([t0, t1]), payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn messages_come_back_the_same_and_a_cut_batch_is_an_error(
            messages in prop::collection::vec((any::<(u16, u16)>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20),
            cut in 1usize..8,
        ) {
            let mut batch = Vec::new();
            for (shards, payload) in &messages {
                append(&mut batch, *shards, payload);
            }
            let whole: Vec<_> = Items(Bytes::from(batch.clone())).collect();
            let came = whole.iter().flatten().map(|item| ((item.from_shard, item.to_shard), item.payload.to_vec()));
            let came: Vec<_> = came.collect();
            prop_assert_eq!(came, messages.clone());
            if !batch.is_empty() {
                batch.truncate(batch.len() - cut);
                let cut: Vec<_> = Items(Bytes::from(batch)).collect();
                prop_assert_eq!(cut.last(), Some(&Err(BadBatch)));
                prop_assert_eq!(&cut[..cut.len() - 1], &whole[..cut.len() - 1]);
            }
        }

        #[test]
        fn garbage_ends(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Items(Bytes::from(bytes)).count() <= 13);
        }
    }
}
