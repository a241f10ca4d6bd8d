//! The kernels' sources, embedded, and the entry points of each. Compiles and loads nothing.

/// One `.cu` file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// File name without `.cu`.
    pub name: &'static str,
    /// The text.
    pub text: &'static str,
    /// Its `extern "C"` kernels. Where [`Source::by_head_dim`], each stands for one instance a head size, `<entry>_d128`.
    pub entries: &'static [&'static str],
    /// Whether the entries exist for each of [`HEAD_DIMS`], of which `-DBATON_HEAD_DIM=128` compiles one.
    pub by_head_dim: bool,
}

/// Head sizes that the tensor-core attention kernels are built for.
pub const HEAD_DIMS: [u32; 6] = [64, 80, 96, 128, 192, 256];

/// What sources include, by the name they include it by. `shim.h`, which only g++ sees, is not among them.
pub const HEADERS: [(&str, &str); 5] = [
    ("attention.cuh", include_str!("../../cuda/attention.cuh")),
    ("gemm.cuh", include_str!("../../cuda/gemm.cuh")),
    ("prelude.cuh", include_str!("../../cuda/prelude.cuh")),
    ("sampling.cuh", include_str!("../../cuda/sampling.cuh")),
    ("tiles.cuh", include_str!("../../cuda/tiles.cuh")),
];

const fn source(name: &'static str, text: &'static str, entries: &'static [&'static str]) -> Source {
    Source {
        name,
        text,
        entries,
        by_head_dim: false,
    }
}

const fn source_by_head_dim(name: &'static str, text: &'static str, entries: &'static [&'static str]) -> Source {
    Source {
        name,
        text,
        entries,
        by_head_dim: true,
    }
}

/// Every source.
pub const SOURCES: &[Source] = &[
    source_by_head_dim(
        "attention_decode",
        include_str!("../../cuda/attention_decode.cu"),
        &["attention_decode_f16", "attention_decode_bf16"],
    ),
    source(
        "attention_merge",
        include_str!("../../cuda/attention_merge.cu"),
        &["attention_merge_f32", "attention_merge_f16", "attention_merge_bf16"],
    ),
    source_by_head_dim(
        "attention_prefill",
        include_str!("../../cuda/attention_prefill.cu"),
        &["attention_prefill_f16", "attention_prefill_bf16"],
    ),
    source(
        "attention_scalar",
        include_str!("../../cuda/attention_scalar.cu"),
        &["attention_scalar_f32", "attention_scalar_f16", "attention_scalar_bf16"],
    ),
    source(
        "elementwise",
        include_str!("../../cuda/elementwise.cu"),
        &[
            "add_f32",
            "add_f16",
            "add_bf16",
            "add_bias_f32",
            "add_bias_f16",
            "add_bias_bf16",
            "soft_cap_f32",
            "soft_cap_f16",
            "soft_cap_bf16",
            "gated_f32",
            "gated_f16",
            "gated_bf16",
            "convert_f32_bf16",
            "convert_f32_f16",
            "convert_bf16_f32",
            "convert_f16_f32",
        ],
    ),
    source(
        "embed",
        include_str!("../../cuda/embed.cu"),
        &["embed_f32", "embed_f16", "embed_bf16"],
    ),
    source(
        "gather_rows",
        include_str!("../../cuda/gather_rows.cu"),
        &["gather_rows_f32", "gather_rows_f16", "gather_rows_bf16"],
    ),
    source(
        "kv_copy",
        include_str!("../../cuda/kv_copy.cu"),
        &["kv_gather", "kv_scatter", "kv_move"],
    ),
    source(
        "linear",
        include_str!("../../cuda/linear.cu"),
        &[
            "linear_f32",
            "linear_f16",
            "linear_bf16",
            "linear_f16_f32",
            "linear_bf16_f32",
            "linear_narrow_f16",
            "linear_narrow_bf16",
            "linear_narrow_f16_f32",
            "linear_narrow_bf16_f32",
        ],
    ),
    source("logprobs", include_str!("../../cuda/logprobs.cu"), &["logprobs"]),
    source(
        "moe_combine",
        include_str!("../../cuda/moe_combine.cu"),
        &["moe_combine_f32", "moe_combine_f16", "moe_combine_bf16"],
    ),
    source(
        "moe_linear",
        include_str!("../../cuda/moe_linear.cu"),
        &["moe_linear_f32", "moe_linear_f16", "moe_linear_bf16"],
    ),
    source(
        "moe_permute",
        include_str!("../../cuda/moe_permute.cu"),
        &["moe_permute"],
    ),
    source(
        "moe_route",
        include_str!("../../cuda/moe_route.cu"),
        &["moe_route_f32", "moe_route_f16", "moe_route_bf16"],
    ),
    source("read_all", include_str!("../../cuda/read_all.cu"), &["read_all"]),
    source(
        "rms_norm",
        include_str!("../../cuda/rms_norm.cu"),
        &[
            "rms_norm_f32",
            "rms_norm_f16",
            "rms_norm_bf16",
            "add_rms_norm_f32",
            "add_rms_norm_f16",
            "add_rms_norm_bf16",
        ],
    ),
    source(
        "rope_append",
        include_str!("../../cuda/rope_append.cu"),
        &["rope_append_f32", "rope_append_f16", "rope_append_bf16"],
    ),
    source("sample", include_str!("../../cuda/sample.cu"), &["sample"]),
    source("token_ids", include_str!("../../cuda/token_ids.cu"), &["token_ids"]),
];

/// The source that has an entry point, given without `_d128`.
pub fn source_of(entry: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|source| source.entries.contains(&entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name that stands twice would load the wrong kernel; one that its text does not export would not load.
    #[test]
    fn entries_are_unique_and_exported() {
        let mut seen = std::collections::BTreeSet::new();
        for source in SOURCES {
            assert!(source.text.contains("BATON_EXPORT("), "{}", source.name);
            for entry in source.entries {
                assert!(seen.insert(entry), "{entry} stands twice");
            }
            for line in source.text.lines().filter(|line| line.starts_with("#include")) {
                let header = line.split('"').nth(1).unwrap();
                assert!(
                    HEADERS.iter().any(|(name, _)| *name == header),
                    "{}: {line}",
                    source.name
                );
            }
        }
        assert_eq!(source_of("add_f32").unwrap().name, "elementwise");
        assert_eq!(source_of("add"), None);
    }
}
