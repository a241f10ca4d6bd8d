//! The list of settings: every flag, `BATON_*` variable and file key that exists. Values and defaults are read elsewhere.

/// One setting. `kv_memory` is the file's key, `BATON_KV_MEMORY` the variable and `--kv-memory` the flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The name, with underscores.
    pub name: &'static str,
    /// Whether its value must never be shown.
    pub is_secret: bool,
}

const fn open(name: &'static str) -> Key {
    Key { name, is_secret: false }
}

const fn secret(name: &'static str) -> Key {
    Key { name, is_secret: true }
}

/// Every setting of every command. One file may serve several commands: each reads the keys it knows.
pub const KEYS: &[Key] = &[
    open("model"),
    open("served_model_name"),
    open("prefill"),
    open("decode"),
    open("mixed"),
    open("colocate"),
    open("host"),
    open("port"),
    open("dtype"),
    open("load_format"),
    open("device"),
    open("deterministic"),
    open("cuda_graphs"),
    open("cuda_graph_max_seqs"),
    open("cuda_libraries"),
    open("cuda_kernels"),
    open("prefill_sm_share"),
    open("isa"),
    open("kv_memory"),
    open("kv_prefault"),
    open("max_model_len"),
    open("max_num_seqs"),
    open("max_batch_tokens"),
    open("block_size"),
    open("threads"),
    open("tool_call_parser"),
    open("reasoning_parser"),
    open("trust_request_chat_template"),
    open("policy"),
    open("disaggregation_threshold"),
    open("max_queue"),
    secret("api_key"),
    secret("cluster_secret"),
    open("keepalive"),
    open("progress_deadline"),
    open("prefix_caching"),
    open("async_scheduling"),
    open("kv_transport"),
    open("move_rate"),
    open("move_stages"),
    open("move_deadline"),
    open("rebalance"),
    open("metrics_aliases"),
    open("ttft_objective"),
    open("tpot_objective"),
    open("drain_timeout"),
    open("log_level"),
    open("log_format"),
    open("role"),
    open("id"),
    open("scheduler"),
    open("listen"),
    open("advertise"),
    open("server"),
];

impl Key {
    /// The key of this name.
    pub fn find(name: &str) -> Option<Key> {
        KEYS.iter().copied().find(|key| key.name == name)
    }

    /// The existing name most similar to `name`, if one is close enough to have been meant.
    pub fn nearest(name: &str) -> Option<&'static str> {
        let name = name.replace('-', "_").to_ascii_lowercase();
        let (distance, key) = KEYS
            .iter()
            .map(|key| (strsim::damerau_levenshtein(&name, key.name), key))
            .min_by_key(|(d, _)| *d)?;
        (distance <= 1 + key.name.len() / 4).then_some(key.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_find_the_meant_key() {
        for (typed, meant) in [
            ("prot", "port"),
            ("kv-memory", "kv_memory"),
            ("KV_MEM0RY", "kv_memory"),
            ("polcy", "policy"),
        ] {
            assert_eq!(Key::nearest(typed), Some(meant));
        }
        assert_eq!(Key::nearest("tensor_parallel_size"), None);
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = KEYS.iter().map(|key| key.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KEYS.len());
    }
}
