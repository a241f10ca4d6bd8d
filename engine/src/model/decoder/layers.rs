//! The layers, operator by operator: from token ids to the hidden states and logits of the rows that are wanted.

use baton_kernels::{Backend, DType, KvCache, RaggedBatch, RopeAppendParams, RowSampler as _};
use baton_scheduler::layer_groups::LayerPlace;

use super::activations::{Activations, BlockActivations};
use super::weights::{Ffn, LayerWeights, Weights};
use super::{Decoder, MAX_FETCHED_ROWS};
use crate::model::config::ModelConfig;

impl<B: Backend> Decoder<B> {
    /// From the embedding to the last layer's attention. What follows is needed only where something comes back.
    /// `batches` is the step with the block tables of each layer group.
    pub(super) fn all_rows(&mut self, batches: &[RaggedBatch<'_>], on_layer: &mut dyn FnMut(usize, &mut KvCache)) {
        let Decoder {
            backend,
            config,
            weights,
            ropes,
            layer_groups,
            kv,
            activations: a,
            sampler,
            token_ids,
            token_sources,
            wanted_rows,
            hidden_rows,
            ..
        } = self;
        let eps = config.rms_norm_eps;
        // Gemma's factor takes the model's own precision.
        let embedding_scale = match backend.compute_dtype() {
            DType::Bf16 => half::bf16::from_f32(config.embedding_scale).to_f32(),
            DType::F16 => half::f16::from_f32(config.embedding_scale).to_f32(),
            DType::F32 => config.embedding_scale,
        };
        let (residual, embed) = (&mut a.residual, &weights.embed);
        match sampler {
            Some(sampler) => sampler.embed(backend, residual, embed, token_ids, token_sources, embedding_scale),
            None => backend.embed(residual, embed, token_ids, embedding_scale),
        }
        for (layer_idx, layer) in weights.layers.iter().enumerate() {
            let LayerPlace { layer_group, slot } = layer_groups.place(layer_idx);
            let batch = batches[layer_group];
            let block = &mut a.block;
            let input = match &layer.attention_norm {
                Some(norm) if layer_idx == 0 => {
                    backend.rms_norm(&mut block.normed, &a.residual, norm, eps);
                    &block.normed
                }
                Some(norm) => {
                    backend.add_rms_norm(&mut block.normed, &mut a.residual, &block.delta, norm, eps);
                    &block.normed
                }
                None => {
                    if layer_idx > 0 {
                        backend.add(&mut a.residual, &block.delta);
                    }
                    &a.residual
                }
            };
            backend.linear(&mut a.qkv, input, &layer.qkv);
            if let Some(bias) = &layer.qkv_bias {
                backend.add_bias(&mut a.qkv, bias);
            }
            let params = RopeAppendParams {
                n_heads: config.n_heads,
                rope: &ropes[layer.rope],
                qk_norm: layer.qk_norm.as_ref(),
            };
            backend.rope_append(&mut a.qkv, batch, params, slot, kv);
            on_layer(layer_idx, kv);
            let is_last = layer_idx + 1 == config.n_layers;
            if is_last && wanted_rows.is_empty() && hidden_rows.is_empty() {
                return;
            }
            backend.attention(&mut a.attention, &a.qkv, batch, &layer.attention, slot, kv);
            if !is_last {
                finish_layer(backend, layer, eps, &mut a.residual, &a.attention, block);
            }
        }
    }

    /// Logits of `wanted_rows[range]`, left in `activations.logits`.
    pub(super) fn wanted_logits(&mut self, range: std::ops::Range<usize>) {
        let Decoder {
            backend,
            config,
            weights,
            activations: a,
            wanted_rows,
            ..
        } = self;
        final_norm(backend, config, weights, a, &wanted_rows[range]);
        let lm_head = weights.lm_head.as_ref().unwrap_or(&weights.embed);
        backend.linear(&mut a.logits, &a.block.normed, lm_head);
        if let Some(cap) = config.logit_soft_cap {
            backend.soft_cap(&mut a.logits, cap);
        }
    }

    /// Fills `host_hidden` with the hidden states of `hidden_rows`.
    pub(super) fn fetch_hidden(&mut self) {
        let Decoder {
            backend,
            config,
            weights,
            activations: a,
            hidden_rows,
            host_hidden,
            ..
        } = self;
        host_hidden.clear();
        for rows in hidden_rows.chunks(MAX_FETCHED_ROWS) {
            final_norm(backend, config, weights, a, rows);
            host_hidden.extend_from_slice(&backend.to_host(&a.block.normed));
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// Has the device choose beforehand how it computes the layers' products of many rows; how many choices that were.
    pub(in crate::model) fn prepare_products(&mut self) -> usize {
        let Decoder {
            backend,
            weights,
            activations: a,
            ..
        } = self;
        let block = &mut a.block;
        let mut n_chosen = 0;
        for layer in &weights.layers {
            n_chosen += backend.prepare_linear(&mut a.qkv, &a.residual, &layer.qkv);
            n_chosen += backend.prepare_linear(&mut block.delta, &a.attention, &layer.attention_out);
            n_chosen += match &layer.ffn {
                Ffn::Dense { gate_up, down, .. } => {
                    backend.prepare_linear(&mut block.gate_up, &a.residual, gate_up)
                        + backend.prepare_linear(&mut block.delta, &block.ffn, down)
                }
                Ffn::Experts { router, .. } => backend.prepare_linear(&mut block.router_logits, &a.residual, router),
            };
        }
        n_chosen
    }
}

/// The last layer's remainder and the final norm of some rows, left in `block.normed`.
fn final_norm<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    weights: &Weights<B>,
    a: &mut Activations<B>,
    rows: &[usize],
) {
    let Some(layer) = weights.layers.last() else { return };
    backend.gather_rows(&mut a.wanted_residual, &a.residual, rows);
    backend.gather_rows(&mut a.wanted_attention, &a.attention, rows);
    let (residual, block, eps) = (&mut a.wanted_residual, &mut a.block, config.rms_norm_eps);
    finish_layer(backend, layer, eps, residual, &a.wanted_attention, block);
    backend.add_rms_norm(&mut block.normed, residual, &block.delta, &weights.final_norm, eps);
}

/// A layer after its attention: output projection, then the feed-forward part or the experts, whose sum is left in `delta`.
fn finish_layer<B: Backend>(
    backend: &B,
    layer: &LayerWeights<B>,
    eps: f32,
    residual: &mut B::Tensor,
    attention: &B::Tensor,
    block: &mut BlockActivations<B>,
) {
    let BlockActivations {
        normed,
        delta,
        post,
        gate_up,
        ffn,
        router_logits,
    } = block;
    backend.linear(delta, attention, &layer.attention_out);
    if let Some(bias) = &layer.attention_out_bias {
        backend.add_bias(delta, bias);
    }
    if let Some(norm) = &layer.post_attention_norm {
        backend.rms_norm(post, delta, norm, eps);
        std::mem::swap(post, delta);
    }
    let input = match &layer.ffn_norm {
        Some(norm) => {
            backend.add_rms_norm(normed, residual, delta, norm, eps);
            &*normed
        }
        None => {
            backend.add(residual, delta);
            &*residual
        }
    };
    match &layer.ffn {
        Ffn::Dense {
            gate_up: gate_up_weight,
            down,
            activation,
        } => {
            backend.linear(gate_up, input, gate_up_weight);
            backend.gated(ffn, gate_up, *activation);
            backend.linear(delta, ffn, down);
        }
        Ffn::Experts {
            router,
            router_bias,
            experts,
            params,
        } => {
            backend.linear(router_logits, input, router);
            if let Some(bias) = router_bias {
                backend.add_bias(router_logits, bias);
            }
            backend.moe(delta, input, router_logits, experts, *params);
        }
    }
    if let Some(norm) = &layer.post_ffn_norm {
        backend.rms_norm(post, delta, norm, eps);
        std::mem::swap(post, delta);
    }
}
