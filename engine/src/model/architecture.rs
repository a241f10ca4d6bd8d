//! The supported model architectures, as data: what their tensors are called, and what each does differently. A further
//! architecture is another entry here, not another forward pass.
//!
//! The facts are those of the published implementations in Hugging Face's transformers; the papers are named where they say
//! more: Mistral 7B (arXiv:2310.06825), Mixtral (2401.04088), Qwen2 (2407.10671), Qwen3 (2505.09388), Gemma 2 (2408.00118),
//! Gemma 3 (2503.19786), Phi-3 (2404.14219), OLMo 2 (2501.00656), GPT-OSS (2508.10925).

use baton_kernels::Activation;

/// How a published architecture maps to our decoder.
#[derive(Debug, PartialEq)]
pub struct Architecture {
    /// The name in `architectures` of config.json.
    pub name: &'static str,
    /// Names of the tensors in the model files; `{}` stands for the layer's number.
    pub tensors: TensorNames,
    /// What a field of config.json means where it is absent.
    pub defaults: Defaults,
    /// Boolean fields of config.json that must be false or absent, because they would change the computation.
    pub must_be_false: &'static [&'static str],
    /// Which projections of attention have a bias.
    pub attention_bias: AttentionBias,
    /// Which layers have a sliding window.
    pub windows: Windows,
    /// Base of the rotary frequencies of windowed layers, where it has a field of its own: the field, and its default.
    pub window_rope_theta: Option<(&'static str, f64)>,
    /// The field whose inverse root is the factor on q k, in place of head_dim's.
    pub attention_scale_field: Option<&'static str>,
    /// Soft caps by `attn_logit_softcapping` and `final_logit_softcapping`.
    pub has_soft_caps: bool,
    /// Norms multiply with 1 + weight.
    pub norm_adds_one: bool,
    /// The embedding is multiplied by the root of the hidden size.
    pub scales_embedding: bool,
    /// `None` takes `hidden_act` or `hidden_activation`.
    pub activation: Option<Activation>,
    /// Layers of experts in place of the feed-forward part.
    pub experts: Option<ExpertLayers>,
}

/// What a field of config.json means where it is absent.
#[derive(Debug, PartialEq)]
pub struct Defaults {
    /// `tie_word_embeddings`
    pub tie_word_embeddings: bool,
    /// `rms_norm_eps`
    pub rms_norm_eps: f64,
    /// `rope_theta`
    pub rope_theta: f64,
    /// `head_dim`; `None` is the hidden size over the heads.
    pub head_dim: Option<usize>,
}

/// Names of the tensors in the model files; of those with `{}`, one per layer. Lists are concatenated along the output.
#[derive(Debug, PartialEq)]
pub struct TensorNames {
    /// `[vocab_size, hidden_size]`
    pub embed: &'static str,
    /// `[vocab_size, hidden_size]`; absent from the files where the embedding is tied.
    pub lm_head: &'static str,
    /// `[hidden_size]`
    pub final_norm: &'static str,
    /// `[hidden_size]`, before attention.
    pub attention_norm: Option<&'static str>,
    /// `[hidden_size]`, after attention and before its sum with the residual stream.
    pub post_attention_norm: Option<&'static str>,
    /// `[hidden_size]`, before the feed-forward part.
    pub ffn_norm: Option<&'static str>,
    /// `[hidden_size]`, after the feed-forward part and before its sum with the residual stream.
    pub post_ffn_norm: Option<&'static str>,
    /// Query, key and value, `[heads * head_dim, hidden_size]` each; or the three in one.
    pub qkv: &'static [&'static str],
    /// Norms of q and k, of one head each or of the whole projection.
    pub qk_norm: Option<QkNormNames>,
    /// `[n_heads]`: the logits of attention sinks.
    pub sinks: Option<&'static str>,
    /// `[hidden_size, n_heads * head_dim]`
    pub attention_out: &'static str,
    /// Gate and up, `[ffn_size, hidden_size]` each; or both in one.
    pub gate_up: &'static [&'static str],
    /// `[hidden_size, ffn_size]`
    pub down: &'static str,
}

/// Norms of q and k.
#[derive(Debug, PartialEq)]
pub struct QkNormNames {
    /// `[head_dim]`, or `[n_heads * head_dim]`
    pub query: &'static str,
    /// `[head_dim]`, or `[n_kv_heads * head_dim]`
    pub key: &'static str,
    /// Over the whole projection instead of each head.
    pub is_whole: bool,
}

/// Which projections of attention have a bias; its tensor is named `bias` where the projection's is named `weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// None.
    Never,
    /// Query, key and value.
    QueryKeyValue,
    /// All four, if `attention_bias` says so.
    ByField {
        /// What absence means.
        default: bool,
    },
}

/// Which layers have a window of `sliding_window` tokens. A `layer_types` in config.json decides where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// None has.
    Never,
    /// All, if there is a `sliding_window`.
    All,
    /// Those from `max_window_layers` on, if `use_sliding_window` is true.
    FromLayer,
    /// All but every n-th.
    AllButEvery {
        /// Where config.json says n.
        field: &'static str,
        /// What absence means.
        default: usize,
    },
}

/// Layers of experts.
#[derive(Debug, PartialEq)]
pub struct ExpertLayers {
    /// `[n_experts, hidden_size]`
    pub router: &'static str,
    /// `[n_experts]`
    pub router_bias: Option<&'static str>,
    /// Where the number of experts stands.
    pub n_experts_field: &'static str,
    /// Where the width of an expert stands.
    pub ffn_size_field: &'static str,
    /// The chosen experts' weights sum to one: always (`None`), or by this field.
    pub renormalize_field: Option<&'static str>,
    /// Layers named by `mlp_only_layers`, and those that `decoder_sparse_step` does not meet, are ordinary ones.
    pub has_dense_layers: bool,
    /// How the experts' tensors lie.
    pub tensors: ExpertTensors,
}

/// How experts' tensors lie in the model files.
#[derive(Debug, PartialEq)]
pub enum ExpertTensors {
    /// A tensor for each expert; the second `{}` is its number.
    Each {
        /// `[ffn_size, hidden_size]`
        gate: &'static str,
        /// `[ffn_size, hidden_size]`
        up: &'static str,
        /// `[hidden_size, ffn_size]`
        down: &'static str,
    },
    /// GPT-OSS: one tensor for all, the input outermost and gate and up alternating: `[n_experts, hidden_size, 2 * ffn_size]`
    /// and `[n_experts, ffn_size, hidden_size]`, with biases; or the same in MXFP4, the output outermost.
    Stacked {
        /// Prefix of `gate_up_proj`, `gate_up_proj_bias`, `down_proj`, `down_proj_bias`.
        prefix: &'static str,
    },
}

const LLAMA: Architecture = Architecture {
    name: "LlamaForCausalLM",
    tensors: TensorNames {
        embed: "model.embed_tokens.weight",
        lm_head: "lm_head.weight",
        final_norm: "model.norm.weight",
        attention_norm: Some("model.layers.{}.input_layernorm.weight"),
        post_attention_norm: None,
        ffn_norm: Some("model.layers.{}.post_attention_layernorm.weight"),
        post_ffn_norm: None,
        qkv: &[
            "model.layers.{}.self_attn.q_proj.weight",
            "model.layers.{}.self_attn.k_proj.weight",
            "model.layers.{}.self_attn.v_proj.weight",
        ],
        qk_norm: None,
        sinks: None,
        attention_out: "model.layers.{}.self_attn.o_proj.weight",
        gate_up: &[
            "model.layers.{}.mlp.gate_proj.weight",
            "model.layers.{}.mlp.up_proj.weight",
        ],
        down: "model.layers.{}.mlp.down_proj.weight",
    },
    defaults: Defaults {
        tie_word_embeddings: false,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        head_dim: None,
    },
    must_be_false: &["mlp_bias"],
    attention_bias: AttentionBias::ByField { default: false },
    windows: Windows::Never,
    window_rope_theta: None,
    attention_scale_field: None,
    has_soft_caps: false,
    norm_adds_one: false,
    scales_embedding: false,
    activation: None,
    experts: None,
};

const QWEN3: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    tensors: TensorNames {
        qk_norm: Some(QkNormNames {
            query: "model.layers.{}.self_attn.q_norm.weight",
            key: "model.layers.{}.self_attn.k_norm.weight",
            is_whole: false,
        }),
        ..LLAMA.tensors
    },
    windows: Windows::FromLayer,
    defaults: Defaults {
        head_dim: Some(128),
        ..LLAMA.defaults
    },
    must_be_false: &[],
    ..LLAMA
};

const GEMMA2: Architecture = Architecture {
    name: "Gemma2ForCausalLM",
    tensors: TensorNames {
        post_attention_norm: Some("model.layers.{}.post_attention_layernorm.weight"),
        ffn_norm: Some("model.layers.{}.pre_feedforward_layernorm.weight"),
        post_ffn_norm: Some("model.layers.{}.post_feedforward_layernorm.weight"),
        ..LLAMA.tensors
    },
    defaults: Defaults {
        tie_word_embeddings: true,
        head_dim: Some(256),
        ..LLAMA.defaults
    },
    must_be_false: &[],
    windows: Windows::AllButEvery {
        field: "sliding_window_pattern",
        default: 2,
    },
    attention_scale_field: Some("query_pre_attn_scalar"),
    has_soft_caps: true,
    norm_adds_one: true,
    scales_embedding: true,
    ..LLAMA
};

/// All that can be served, in the order errors list them.
pub static ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture {
        name: "MistralForCausalLM",
        attention_bias: AttentionBias::Never,
        windows: Windows::All,
        must_be_false: &[],
        ..LLAMA
    },
    Architecture {
        name: "MixtralForCausalLM",
        attention_bias: AttentionBias::Never,
        windows: Windows::All,
        must_be_false: &[],
        defaults: Defaults {
            rms_norm_eps: 1e-5,
            rope_theta: 1_000_000.0,
            ..LLAMA.defaults
        },
        experts: Some(ExpertLayers {
            router: "model.layers.{}.block_sparse_moe.gate.weight",
            router_bias: None,
            n_experts_field: "num_local_experts",
            ffn_size_field: "intermediate_size",
            renormalize_field: None,
            has_dense_layers: false,
            tensors: ExpertTensors::Each {
                gate: "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
                up: "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
                down: "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
            },
        }),
        ..LLAMA
    },
    Architecture {
        name: "Qwen2ForCausalLM",
        attention_bias: AttentionBias::QueryKeyValue,
        windows: Windows::FromLayer,
        must_be_false: &[],
        ..LLAMA
    },
    QWEN3,
    Architecture {
        name: "Qwen3MoeForCausalLM",
        defaults: LLAMA.defaults,
        experts: Some(ExpertLayers {
            router: "model.layers.{}.mlp.gate.weight",
            router_bias: None,
            n_experts_field: "num_experts",
            ffn_size_field: "moe_intermediate_size",
            renormalize_field: Some("norm_topk_prob"),
            has_dense_layers: true,
            tensors: ExpertTensors::Each {
                gate: "model.layers.{}.mlp.experts.{}.gate_proj.weight",
                up: "model.layers.{}.mlp.experts.{}.up_proj.weight",
                down: "model.layers.{}.mlp.experts.{}.down_proj.weight",
            },
        }),
        ..QWEN3
    },
    GEMMA2,
    Architecture {
        name: "Gemma3ForCausalLM",
        tensors: TensorNames {
            qk_norm: Some(QkNormNames {
                query: "model.layers.{}.self_attn.q_norm.weight",
                key: "model.layers.{}.self_attn.k_norm.weight",
                is_whole: false,
            }),
            ..GEMMA2.tensors
        },
        defaults: Defaults {
            rope_theta: 1_000_000.0,
            ..GEMMA2.defaults
        },
        must_be_false: &["use_bidirectional_attention"],
        windows: Windows::AllButEvery {
            field: "sliding_window_pattern",
            default: 6,
        },
        window_rope_theta: Some(("rope_local_base_freq", 10_000.0)),
        ..GEMMA2
    },
    Architecture {
        name: "Phi3ForCausalLM",
        tensors: TensorNames {
            qkv: &["model.layers.{}.self_attn.qkv_proj.weight"],
            gate_up: &["model.layers.{}.mlp.gate_up_proj.weight"],
            ..LLAMA.tensors
        },
        defaults: Defaults {
            rms_norm_eps: 1e-5,
            ..LLAMA.defaults
        },
        must_be_false: &["attention_bias"],
        attention_bias: AttentionBias::Never,
        windows: Windows::All,
        ..LLAMA
    },
    Architecture {
        name: "Olmo2ForCausalLM",
        tensors: TensorNames {
            attention_norm: None,
            post_attention_norm: Some("model.layers.{}.post_attention_layernorm.weight"),
            ffn_norm: None,
            post_ffn_norm: Some("model.layers.{}.post_feedforward_layernorm.weight"),
            qk_norm: Some(QkNormNames {
                query: "model.layers.{}.self_attn.q_norm.weight",
                key: "model.layers.{}.self_attn.k_norm.weight",
                is_whole: true,
            }),
            ..LLAMA.tensors
        },
        defaults: Defaults {
            rms_norm_eps: 1e-5,
            ..LLAMA.defaults
        },
        must_be_false: &[],
        ..LLAMA
    },
    Architecture {
        name: "GptOssForCausalLM",
        tensors: TensorNames {
            sinks: Some("model.layers.{}.self_attn.sinks"),
            ..LLAMA.tensors
        },
        defaults: Defaults {
            rms_norm_eps: 1e-5,
            rope_theta: 150_000.0,
            head_dim: Some(64),
            ..LLAMA.defaults
        },
        must_be_false: &[],
        attention_bias: AttentionBias::ByField { default: true },
        windows: Windows::AllButEvery {
            field: "sliding_window_pattern",
            default: 2,
        },
        activation: Some(Activation::ClampedSwish {
            alpha: 1.702,
            limit: 7.0,
        }),
        experts: Some(ExpertLayers {
            router: "model.layers.{}.mlp.router.weight",
            router_bias: Some("model.layers.{}.mlp.router.bias"),
            n_experts_field: "num_local_experts",
            ffn_size_field: "intermediate_size",
            renormalize_field: None,
            has_dense_layers: false,
            tensors: ExpertTensors::Stacked {
                prefix: "model.layers.{}.mlp.experts.",
            },
        }),
        ..LLAMA
    },
];

/// The names in [`ARCHITECTURES`], for messages.
pub fn supported_names() -> String {
    ARCHITECTURES
        .iter()
        .map(|architecture| architecture.name)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// The tests of the forward pass take what lies there.
    #[test]
    fn every_architecture_has_a_golden_model() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/models");
        let models = std::fs::read_dir(folder).unwrap();
        let covered: BTreeSet<String> = models
            .map(|model| {
                let config = std::fs::read(model.unwrap().path().join("config.json")).unwrap();
                let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
                config["architectures"][0].as_str().unwrap().to_owned()
            })
            .collect();
        let supported: BTreeSet<String> = ARCHITECTURES
            .iter()
            .map(|architecture| architecture.name.to_owned())
            .collect();
        assert_eq!(covered, supported);
    }
}
