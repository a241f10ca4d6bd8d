//! The supported model architectures, as data: what their tensors are called and what their configurations may not ask for.
//! A further architecture is another entry here, not another forward pass.

/// How a published architecture maps to our decoder.
#[derive(Debug, PartialEq, Eq)]
pub struct Architecture {
    /// The name in `architectures` of config.json.
    pub name: &'static str,
    /// Names of the tensors in the model files; `{}` stands for the layer's number.
    pub tensors: TensorNames,
    /// Boolean fields of config.json that must be false or absent, because they would change the computation.
    pub must_be_false: &'static [&'static str],
}

/// Names of the tensors in the model files; of those with `{}`, one per layer. Lists are concatenated along the output.
#[derive(Debug, PartialEq, Eq)]
pub struct TensorNames {
    /// `[vocab_size, hidden_size]`
    pub embed: &'static str,
    /// `[vocab_size, hidden_size]`; absent from the files where the embedding is tied.
    pub lm_head: &'static str,
    /// `[hidden_size]`
    pub final_norm: &'static str,
    /// `[hidden_size]`, before attention.
    pub attention_norm: &'static str,
    /// `[hidden_size]`, before the feed-forward part.
    pub ffn_norm: &'static str,
    /// `[n_heads * head_dim, hidden_size]`
    pub query: &'static str,
    /// `[n_kv_heads * head_dim, hidden_size]`
    pub key: &'static str,
    /// `[n_kv_heads * head_dim, hidden_size]`
    pub value: &'static str,
    /// `[hidden_size, n_heads * head_dim]`
    pub attention_out: &'static str,
    /// `[ffn_size, hidden_size]`
    pub gate: &'static str,
    /// `[ffn_size, hidden_size]`
    pub up: &'static str,
    /// `[hidden_size, ffn_size]`
    pub down: &'static str,
}

/// All that can be served, in the order errors list them.
pub static ARCHITECTURES: &[Architecture] = &[Architecture {
    name: "LlamaForCausalLM",
    tensors: TensorNames {
        embed: "model.embed_tokens.weight",
        lm_head: "lm_head.weight",
        final_norm: "model.norm.weight",
        attention_norm: "model.layers.{}.input_layernorm.weight",
        ffn_norm: "model.layers.{}.post_attention_layernorm.weight",
        query: "model.layers.{}.self_attn.q_proj.weight",
        key: "model.layers.{}.self_attn.k_proj.weight",
        value: "model.layers.{}.self_attn.v_proj.weight",
        attention_out: "model.layers.{}.self_attn.o_proj.weight",
        gate: "model.layers.{}.mlp.gate_proj.weight",
        up: "model.layers.{}.mlp.up_proj.weight",
        down: "model.layers.{}.mlp.down_proj.weight",
    },
    must_be_false: &["attention_bias", "mlp_bias"],
}];

/// The names in [`ARCHITECTURES`], for messages.
pub fn supported_names() -> String {
    ARCHITECTURES
        .iter()
        .map(|architecture| architecture.name)
        .collect::<Vec<_>>()
        .join(", ")
}
