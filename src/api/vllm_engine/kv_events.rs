//! Changes of the cluster's prefix caches as the engine service's events: numbered from 1, without gaps, in the order they come.

use std::time::{SystemTime, UNIX_EPOCH};

use baton_proto::smg::grpc::common as wire;
use baton_proto::smg::grpc::common::kv_cache_event::Data;
use baton_scheduler::block_events::{BlockEvent, StoredBlock};
use baton_scheduler::prefix_cache::PrefixKey;

/// Numbers batches and the events in them.
#[derive(Debug, Default)]
pub(super) struct Numbering {
    n_batches: u64,
    n_events: u64,
}

impl Numbering {
    pub(super) fn batch(&mut self, events: Vec<BlockEvent>) -> wire::KvEventBatch {
        self.n_batches += 1;
        let events = grouped(events).into_iter().map(|data| {
            self.n_events += 1;
            wire::KvCacheEvent {
                event_id: self.n_events,
                data: Some(data),
            }
        });
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        wire::KvEventBatch {
            events: events.collect(),
            sequence_number: self.n_batches,
            timestamp: since_1970.as_secs_f64(),
            // The whole cluster is one rank.
            dp_rank: None,
        }
    }
}

/// Blocks of which each follows the one before it are one event, and so are removals in a row.
fn grouped(events: Vec<BlockEvent>) -> Vec<Data> {
    let mut all: Vec<Data> = Vec::new();
    let mut last_stored = None;
    for event in events {
        let stored = match &event {
            BlockEvent::Stored(block) => Some(block.key),
            BlockEvent::Removed(_) | BlockEvent::Cleared => None,
        };
        match (event, all.last_mut()) {
            (BlockEvent::Stored(block), Some(Data::Stored(chain)))
                if block.parent.is_some() && block.parent == last_stored =>
            {
                chain.blocks.push(block_to_wire(&block));
            }
            (BlockEvent::Stored(block), _) => all.push(Data::Stored(wire::KvBlocksStored {
                parent_block_hash: block.parent.map(block_hash),
                blocks: vec![block_to_wire(&block)],
            })),
            (BlockEvent::Removed(key), Some(Data::Removed(removed))) => removed.block_hashes.push(block_hash(key)),
            (BlockEvent::Removed(key), _) => all.push(Data::Removed(wire::KvBlocksRemoved {
                block_hashes: vec![block_hash(key)],
                cache_level: None,
            })),
            (BlockEvent::Cleared, _) => all.push(Data::Cleared(wire::KvCacheCleared {})),
        }
        last_stored = stored;
    }
    all
}

fn block_to_wire(block: &StoredBlock) -> wire::KvBlock {
    wire::KvBlock {
        block_hash: block_hash(block.key),
        token_ids: block.tokens.to_vec(),
        block_size: block.tokens.len() as i32,
        lora_id: None,
        cache_level: None,
    }
}

/// The lower half of a key: a number of 64 bits is what the service has room for.
pub(super) fn block_hash(key: PrefixKey) -> i64 {
    key.0 as i64
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn stored(key: u128, parent: Option<u128>) -> BlockEvent {
        BlockEvent::Stored(StoredBlock {
            key: PrefixKey(key),
            parent: parent.map(PrefixKey),
            tokens: Arc::from([key as u32, 9]),
        })
    }

    #[test]
    fn chains_and_removals_are_grouped_and_numbers_have_no_gaps() {
        let removed = |key| BlockEvent::Removed(PrefixKey(key));
        let mut numbering = Numbering::default();
        let first = numbering.batch(vec![
            BlockEvent::Cleared,
            stored(1, None),
            stored(2, Some(1)),
            stored(3, Some(2)),
            stored(4, Some(2)),
            stored(5, None),
            removed(1),
            removed(u128::MAX - 1),
            stored(6, Some(5)),
        ]);
        let ids: Vec<u64> = first.events.iter().map(|event| event.event_id).collect();
        assert_eq!((first.sequence_number, ids), (1, (1..=6).collect()));
        let shapes: Vec<String> = first
            .events
            .into_iter()
            .map(|event| match event.data.unwrap() {
                Data::Stored(stored) => {
                    let hashes: Vec<i64> = stored.blocks.iter().map(|block| block.block_hash).collect();
                    assert!(
                        stored
                            .blocks
                            .iter()
                            .all(|block| block.block_size == 2 && block.token_ids[1] == 9)
                    );
                    format!("{:?} after {:?}", hashes, stored.parent_block_hash)
                }
                Data::Removed(removed) => format!("without {:?}", removed.block_hashes),
                Data::Cleared(_) => "cleared".to_owned(),
            })
            .collect();
        assert_eq!(
            shapes,
            [
                "cleared",
                "[1, 2, 3] after None",
                "[4] after Some(2)",
                "[5] after None",
                "without [1, -2]",
                "[6] after Some(5)",
            ]
        );
        let second = numbering.batch(vec![removed(2)]);
        assert_eq!((second.sequence_number, second.events[0].event_id), (2, 7));
    }
}
