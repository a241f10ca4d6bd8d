//! A decoder's weights in its device's memory, by their names in the packed file.

use baton_kernels::{Activation, AttentionParams, Backend, KernelError, MoeParams, PackedWeights, QkNorm};

use crate::model::config::ModelConfig;
use crate::model::weights::LayerWeightNames;

pub(super) struct Weights<B: Backend> {
    /// `[vocab_size, hidden_size]`
    pub(super) embed: B::Matrix,
    pub(super) layers: Vec<LayerWeights<B>>,
    /// `[hidden_size]`
    pub(super) final_norm: B::Vector,
    /// `[vocab_size, hidden_size]`; the embedding serves where it is tied.
    pub(super) lm_head: Option<B::Matrix>,
}

pub(super) struct LayerWeights<B: Backend> {
    pub(super) attention_norm: Option<B::Vector>,
    /// `[(n_heads + 2 * n_kv_heads) * head_dim, hidden_size]`
    pub(super) qkv: B::Matrix,
    pub(super) qkv_bias: Option<B::Vector>,
    pub(super) qk_norm: Option<QkNorm<B::Vector>>,
    /// Index in [`Decoder::ropes`].
    pub(super) rope: usize,
    pub(super) attention: AttentionParams<B::Vector>,
    /// `[hidden_size, n_heads * head_dim]`
    pub(super) attention_out: B::Matrix,
    pub(super) attention_out_bias: Option<B::Vector>,
    pub(super) post_attention_norm: Option<B::Vector>,
    pub(super) ffn_norm: Option<B::Vector>,
    pub(super) ffn: Ffn<B>,
    pub(super) post_ffn_norm: Option<B::Vector>,
}

/// What a layer has behind its attention.
pub(super) enum Ffn<B: Backend> {
    Dense {
        /// `[2 * ffn_size, hidden_size]`
        gate_up: B::Matrix,
        /// `[hidden_size, ffn_size]`
        down: B::Matrix,
        activation: Activation,
    },
    Experts {
        /// `[n_experts, hidden_size]`
        router: B::Matrix,
        router_bias: Option<B::Vector>,
        experts: B::Experts,
        params: MoeParams,
    },
}

impl<B: Backend> LayerWeights<B> {
    pub(super) fn new(
        backend: &B,
        config: &ModelConfig,
        packed: &PackedWeights,
        layer: usize,
    ) -> Result<LayerWeights<B>, KernelError> {
        let of_layer = config.layers[layer];
        let tensors = &config.architecture.tensors;
        let names = LayerWeightNames::new(layer);
        let optional = |exists: bool, name: &str| exists.then(|| backend.vector(packed, name)).transpose();
        let [qkv_has_bias, out_has_bias] = config.attention_bias;
        let qk_norm = match &tensors.qk_norm {
            None => None,
            Some(_) => Some(QkNorm {
                query: backend.vector(packed, &names.query_norm)?,
                key: backend.vector(packed, &names.key_norm)?,
                eps: config.rms_norm_eps,
            }),
        };
        let ffn = match (&config.architecture.experts, &config.experts) {
            (Some(architecture), Some(experts)) if of_layer.has_experts => {
                let names_of_experts: Vec<_> = (0..experts.n_experts)
                    .map(|expert| names.expert(expert, architecture))
                    .collect();
                Ffn::Experts {
                    router: backend.matrix(packed, &names.router)?,
                    router_bias: optional(architecture.router_bias.is_some(), &names.router_bias)?,
                    experts: backend.experts(packed, &names_of_experts)?,
                    params: MoeParams {
                        top_k: experts.top_k,
                        renormalize: experts.renormalize,
                        activation: config.activation,
                    },
                }
            }
            _ => Ffn::Dense {
                gate_up: backend.matrix(packed, &names.gate_up)?,
                down: backend.matrix(packed, &names.down)?,
                activation: config.activation,
            },
        };
        Ok(LayerWeights {
            attention_norm: optional(tensors.attention_norm.is_some(), &names.attention_norm)?,
            qkv: backend.matrix(packed, &names.qkv)?,
            qkv_bias: optional(qkv_has_bias, &names.qkv_bias)?,
            qk_norm,
            rope: of_layer.rope,
            attention: AttentionParams {
                n_heads: config.n_heads,
                scale: config.attention_scale,
                window: of_layer.window,
                soft_cap: config.attention_soft_cap,
                sinks: optional(tensors.sinks.is_some(), &names.sinks)?,
            },
            attention_out: backend.matrix(packed, &names.attention_out)?,
            attention_out_bias: optional(out_has_bias, &names.attention_out_bias)?,
            post_attention_norm: optional(tensors.post_attention_norm.is_some(), &names.post_attention_norm)?,
            ffn_norm: optional(tensors.ffn_norm.is_some(), &names.ffn_norm)?,
            ffn,
            post_ffn_norm: optional(tensors.post_ffn_norm.is_some(), &names.post_ffn_norm)?,
        })
    }
}
