//! What subscribers are told of cached blocks, by real instances: prefixes, evictions, and the end of an instance.

use std::collections::{BTreeMap, BTreeSet};

use baton_proto::smg::grpc::common::kv_cache_event::Data;
use baton_proto::smg::grpc::common::{KvEventBatch, SubscribeKvEventsRequest};
use baton_proto::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use baton_scheduler::ids::Fingerprint;
use baton_scheduler::prefix_cache::PrefixHasher;
use rustix::process::Signal;
use serde_json::json;
use tonic::Streaming;

use super::cluster::{Cluster, PATIENCE, dummy_model, prompt, signal};

const BLOCK_SIZE: usize = 16;

/// What a gateway makes of the events.
#[derive(Default)]
struct Index {
    /// Tokens and parent of each block.
    blocks: BTreeMap<i64, (Vec<u32>, Option<i64>)>,
    n_batches: u64,
    n_removed: usize,
    ever: BTreeSet<u32>,
}

impl Index {
    fn apply(&mut self, batch: KvEventBatch) {
        self.n_batches += 1;
        assert_eq!(
            batch.sequence_number, self.n_batches,
            "batches are numbered without gaps"
        );
        for event in batch.events {
            match event.data.expect("an event says something") {
                Data::Stored(stored) => {
                    let mut parent = stored.parent_block_hash;
                    for block in stored.blocks {
                        assert_eq!(
                            (block.block_size, block.token_ids.len()),
                            (BLOCK_SIZE as i32, BLOCK_SIZE)
                        );
                        self.ever.extend(&block.token_ids);
                        let before = self.blocks.insert(block.block_hash, (block.token_ids, parent));
                        assert!(before.is_none(), "stored twice");
                        parent = Some(block.block_hash);
                    }
                }
                Data::Removed(removed) => {
                    for hash in removed.block_hashes {
                        assert!(self.blocks.remove(&hash).is_some(), "removed what was not stored");
                        self.n_removed += 1;
                    }
                }
                Data::Cleared(_) => self.blocks.clear(),
            }
        }
    }

    async fn until(&mut self, stream: &mut Streaming<KvEventBatch>, what: &str, holds: impl Fn(&Index) -> bool) {
        let waiting = async {
            while !holds(self) {
                let batch = stream.message().await.expect("the stream lives");
                self.apply(batch.expect("the stream has no end"));
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never {what}");
    }
}

async fn subscribe(cluster: &Cluster) -> Streaming<KvEventBatch> {
    let mut client = VllmEngineClient::connect(cluster.door_url.clone())
        .await
        .expect("connected");
    let request = SubscribeKvEventsRequest {
        start_sequence_number: 0,
    };
    client
        .subscribe_kv_events(request)
        .await
        .expect("subscribed")
        .into_inner()
}

/// Hashes of the prompt's full blocks.
async fn hashes(cluster: &Cluster, ids: &[u32]) -> Vec<i64> {
    let join = cluster.instances().await[0].join.clone().expect("a join");
    let fingerprint = Fingerprint(join.fingerprint.try_into().expect("32 bytes"));
    let keys = PrefixHasher::new(fingerprint, BLOCK_SIZE).keys(0, ids);
    keys.into_iter().map(|key| key.0 as i64).collect()
}

/// Until it is back as another incarnation.
async fn kill(cluster: &Cluster, name: &str) {
    let victim = cluster.pid(name).await;
    signal(victim, Signal::KILL);
    cluster
        .until("it is back", |instances| {
            let mut joins = instances.iter().filter_map(|status| status.join.as_ref());
            joins.any(|join| join.instance_id == name && join.pid != victim)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefixes_are_told_once_with_their_chain_and_end_with_their_last_holder() {
    let model = dummy_model("kv-events", 2, 128);
    let base = ["--model", model.to_str().expect("UTF-8"), "--load-format", "dummy"];
    let pools = ["--disaggregation-threshold", "0", "--prefill", "1", "--decode", "1"];
    let cluster = Cluster::serve(&[&base[..], &pools].concat()).await;
    let (early, late) = (prompt(1, 70), prompt(2, 70));
    let options = json!({ "max_tokens": 2, "temperature": 0 });
    cluster.complete(&early, &options).await;
    let (early_hashes, late_hashes) = (hashes(&cluster, &early).await, hashes(&cluster, &late).await);
    assert_eq!(early_hashes.len(), 4);

    let mut stream = subscribe(&cluster).await;
    let mut index = Index::default();
    let has = |hashes: &[i64]| {
        let hashes = hashes.to_vec();
        move |index: &Index| hashes.iter().all(|hash| index.blocks.contains_key(hash))
    };
    index
        .until(&mut stream, "what was cached before", has(&early_hashes))
        .await;
    // Nobody else is told of these tokens.
    let salted: Vec<u32> = vec![2047; 40];
    let secret = json!({ "max_tokens": 2, "temperature": 0, "cache_salt": "secret" });
    cluster.complete(&salted, &secret).await;
    cluster.complete(&late, &options).await;
    index
        .until(&mut stream, "what is cached since", has(&late_hashes))
        .await;
    for (ids, hashes) in [(&early, &early_hashes), (&late, &late_hashes)] {
        for (i, hash) in hashes.iter().enumerate() {
            let (tokens, parent) = &index.blocks[hash];
            assert_eq!(tokens, &ids[i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE]);
            assert_eq!(*parent, i.checked_sub(1).map(|before| hashes[before]));
        }
    }
    assert!(!index.ever.contains(&2047), "a salted prefix was told");

    // Both instances hold them: they end with the second one.
    kill(&cluster, "prefill-0").await;
    let fresh = prompt(3, 40);
    cluster.complete(&fresh, &options).await;
    let fresh_hashes = hashes(&cluster, &fresh).await;
    index.until(&mut stream, "what came after it", has(&fresh_hashes)).await;
    assert_eq!(index.n_removed, 0, "the other instance holds what the first did");
    kill(&cluster, "decode-0").await;
    // The new prefill instance has computed the last one.
    let is_left = |index: &Index| index.blocks.len() == fresh_hashes.len();
    index.until(&mut stream, "what the other one has alone", is_left).await;
    assert!(has(&fresh_hashes)(&index));
    kill(&cluster, "prefill-0").await;
    index
        .until(&mut stream, "nothing", |index| index.blocks.is_empty())
        .await;
    // The new incarnations are listened to.
    cluster.complete(&early, &options).await;
    index.until(&mut stream, "it again", has(&early_hashes)).await;
    // A subscriber that leaves ends what was begun for it, and the cluster ends in time with one that does not.
    drop(subscribe(&cluster).await);
    cluster.until_idle_and_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_eviction_is_told() {
    let model = dummy_model("kv-events", 2, 128);
    // 40 blocks: 2 layers of keys and values, one head of 64, in 16 bits.
    let memory = format!("{}KiB", 40 * BLOCK_SIZE * 2 * 2 * 64 * 2 / 1024);
    let base = [
        "--model",
        model.to_str().expect("UTF-8"),
        "--load-format",
        "dummy",
        "--dtype",
        "bf16",
    ];
    let tight = ["--mixed", "1", "--kv-memory", &memory, "--max-model-len", "400"];
    let cluster = Cluster::serve(&[&base[..], &tight].concat()).await;
    let mut stream = subscribe(&cluster).await;
    let mut index = Index::default();
    let options = json!({ "max_tokens": 1, "temperature": 0 });
    let first = prompt(1, 330);
    cluster.complete(&first, &options).await;
    let first_hashes = hashes(&cluster, &first).await;
    index
        .until(&mut stream, "the first", |index| {
            first_hashes.iter().all(|hash| index.blocks.contains_key(hash))
        })
        .await;
    for seed in 2..4 {
        cluster.complete(&prompt(seed, 330), &options).await;
    }
    index.until(&mut stream, "evicted", |index| index.n_removed >= 20).await;
    assert!(!index.blocks.contains_key(&first_hashes[19]), "the oldest go first");
    assert!(index.blocks.len() <= 40);
}
