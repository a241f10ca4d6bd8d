//! A model for tests: its logits are a hash of the context as read back from the KV memory, so that a wrong block, a wrong
//! position or a byte not moved gives another token. It computes nothing else, so thousands of requests take a second.

use std::sync::Arc;

use baton_kernels::{DType, KernelError, KvCache, KvLayout};
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{Finish, PortableState, Token, TokenLogprobs};
use crossbeam::channel::Receiver;
use parking_lot::Mutex;

use crate::forward::{ForwardPass, LogitsWanted, StepOutput, StepSequence};
use crate::sampler::{History, Sampler, TokenSet};

pub(crate) const N_VOCAB: usize = 48;
pub(crate) const N_LAYERS: usize = 3;
pub(crate) const HIDDEN_SIZE: usize = 4;
/// Its logits are NaN for a context that ends with this token.
pub(crate) const POISON: TokenId = 45;
/// A step with this token fails.
pub(crate) const BROKEN: TokenId = 46;
/// A step with this token panics.
pub(crate) const PANIC: TokenId = 47;

/// Bytes of one token in the K or V part: two 32-bit words.
const TOKEN_BYTES: usize = 8;

/// One sequence's share of a step, as the model saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SeenItem {
    pub(crate) first_token: TokenId,
    pub(crate) start_pos: usize,
    pub(crate) n_tokens: usize,
}

pub(crate) struct HashModel {
    kv: KvCache,
    logits: Vec<f32>,
    hidden: Vec<f32>,
    /// Each step takes one permit; without a sender steps run freely.
    gate: Option<Receiver<()>>,
    pub(crate) seen: Arc<Mutex<Vec<Vec<SeenItem>>>>,
}

impl HashModel {
    pub(crate) fn new(n_blocks: usize, block_size: usize) -> HashModel {
        let layout = KvLayout {
            n_layers: N_LAYERS,
            n_kv_heads: 1,
            block_size,
            head_dim: 2,
            dtype: DType::F32,
        };
        HashModel {
            kv: KvCache::shared(layout, n_blocks).unwrap(),
            logits: Vec::new(),
            hidden: Vec::new(),
            gate: None,
            seen: Arc::new(Mutex::new(Vec::new())),
        }
    }

    pub(crate) fn kv_share(&self) -> Option<baton_kernels::KvShare> {
        self.kv.share()
    }

    pub(crate) fn gated(self, gate: Receiver<()>) -> HashModel {
        HashModel {
            gate: Some(gate),
            ..self
        }
    }

    fn append(&mut self, sequence: &StepSequence<'_>) -> Result<(), KernelError> {
        let block_size = self.kv.layout().block_size;
        let part_bytes = self.kv.layout().part_bytes();
        for (i, &token) in sequence.tokens.iter().enumerate() {
            let pos = sequence.start_pos + i;
            let block = sequence.block_tables[0][pos / block_size];
            let slot = pos % block_size * TOKEN_BYTES;
            for layer in 0..N_LAYERS {
                let mut bytes = vec![0; 2 * part_bytes];
                self.kv.pin(layer, block).copy_to(&mut bytes);
                let (key, value) = bytes.split_at_mut(part_bytes);
                key[slot..slot + 4].copy_from_slice(&token.to_le_bytes());
                key[slot + 4..slot + 8].copy_from_slice(&(pos as u32).to_le_bytes());
                value[slot..slot + 4].copy_from_slice(&(layer as u32).to_le_bytes());
                value[slot + 4..slot + 8].copy_from_slice(&(!token).to_le_bytes());
                self.kv.write_handle(block)?.write(layer, key, value)?;
            }
        }
        Ok(())
    }

    /// Hashes of the contexts that end at `positions`, from the KV memory.
    fn hash_from_memory(&mut self, block_table: &[u32], positions: std::ops::Range<usize>) -> Vec<u64> {
        let block_size = self.kv.layout().block_size;
        let mut hash = HASH_START;
        let mut hashes = Vec::new();
        let n_blocks = positions.end.div_ceil(block_size);
        for (block_idx, &block) in block_table[..n_blocks].iter().enumerate() {
            let reads: Vec<_> = (0..N_LAYERS).map(|layer| self.kv.pin(layer, block)).collect();
            for pos in block_idx * block_size..positions.end.min((block_idx + 1) * block_size) {
                let slot = pos % block_size * TOKEN_BYTES;
                for read in &reads {
                    for part in [read.key(), read.value()] {
                        hash = mix(
                            hash,
                            u64::from_le_bytes(part[slot..slot + TOKEN_BYTES].try_into().unwrap()),
                        );
                    }
                }
                if positions.contains(&pos) {
                    hashes.push(hash);
                }
            }
        }
        hashes
    }
}

impl ForwardPass for HashModel {
    fn vocab_size(&self) -> usize {
        N_VOCAB
    }

    fn hidden_size(&self) -> usize {
        HIDDEN_SIZE
    }

    fn numerics_class(&self) -> String {
        "hash".to_owned()
    }

    fn layout(&self) -> KvLayout {
        self.kv.layout()
    }

    fn kv_cache(&mut self) -> &mut KvCache {
        &mut self.kv
    }

    fn step(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<StepOutput<'_>, KernelError> {
        if let Some(gate) = &self.gate {
            // A dropped sender opens the gate for good.
            let _ = gate.recv();
        }
        let seen = |sequence: &StepSequence<'_>| SeenItem {
            first_token: sequence.tokens[0],
            start_pos: sequence.start_pos,
            n_tokens: sequence.tokens.len(),
        };
        self.seen.lock().push(sequences.iter().map(seen).collect());
        for sequence in sequences {
            assert!(!sequence.tokens.contains(&PANIC), "asked to panic");
            if sequence.tokens.contains(&BROKEN) {
                let n_blocks = self.kv.n_blocks();
                return Err(KernelError::BlockOutOfRange {
                    block: u32::MAX,
                    n_blocks,
                });
            }
            self.append(sequence)?;
        }
        for layer in 0..N_LAYERS {
            on_layer(layer, &mut self.kv);
        }
        self.logits.clear();
        self.hidden.clear();
        for sequence in sequences {
            let end = sequence.start_pos + sequence.tokens.len();
            let positions = match sequence.logits {
                LogitsWanted::None => continue,
                LogitsWanted::Last => end - 1..end,
                LogitsWanted::All | LogitsWanted::Hidden => sequence.start_pos..end,
            };
            for (i, hash) in self
                .hash_from_memory(&sequence.block_tables[0], positions.clone())
                .into_iter()
                .enumerate()
            {
                let token = sequence.tokens[positions.start + i - sequence.start_pos];
                match sequence.logits {
                    LogitsWanted::Hidden => self.hidden.extend(hidden(hash, token)),
                    _ => self.logits.extend(logits(hash, token)),
                }
            }
        }
        Ok(StepOutput {
            logits: &self.logits,
            hidden: &self.hidden,
        })
    }
}

const HASH_START: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
}

fn logits(hash: u64, last: TokenId) -> impl Iterator<Item = f32> {
    (0..N_VOCAB as u64).map(move |id| match last {
        POISON => f32::NAN,
        // The tokens with an effect are never sampled by themselves.
        _ if id >= u64::from(POISON) => -100.0,
        _ => (mix(mix(hash, id), id) >> 40) as f32 / (1 << 22) as f32,
    })
}

fn hidden(hash: u64, last: TokenId) -> impl Iterator<Item = f32> {
    logits(hash, last).take(HIDDEN_SIZE)
}

/// The mean hidden state of a prompt, computed alone.
pub(crate) fn embedding_alone(prompt: &[TokenId]) -> Vec<f32> {
    let mut sum = [0.0f64; HIDDEN_SIZE];
    for end in 1..=prompt.len() {
        let row = hidden(hash_of(&prompt[..end]), prompt[end - 1]);
        sum.iter_mut()
            .zip(row)
            .for_each(|(sum, value)| *sum += f64::from(value));
    }
    sum.map(|sum| (sum / prompt.len() as f64) as f32).to_vec()
}

fn hash_of(context: &[TokenId]) -> u64 {
    context.iter().enumerate().fold(HASH_START, |hash, (pos, &token)| {
        (0..N_LAYERS as u64).fold(hash, |hash, layer| {
            let hash = mix(hash, u64::from(token) | (pos as u64) << 32);
            mix(hash, layer | u64::from(!token) << 32)
        })
    })
}

/// What the first choice of a request gives when computed alone, without memory, blocks or batches.
pub(crate) fn alone(state: &PortableState, max_model_len: usize) -> (Vec<Token>, Finish) {
    alone_choice(state, 0, max_model_len)
}

/// What any choice of it gives.
pub(crate) fn alone_choice(state: &PortableState, choice: u32, max_model_len: usize) -> (Vec<Token>, Finish) {
    alone_within(state, choice, max_model_len, &mut |_| None)
}

/// The same, where only some tokens may follow an output.
pub(crate) fn alone_within(
    state: &PortableState,
    choice: u32,
    max_model_len: usize,
    allowed: &mut dyn FnMut(&[TokenId]) -> Option<TokenSet>,
) -> (Vec<Token>, Finish) {
    let sampling = &state.request.sampling;
    let mut context = state.request.prompt_ids.to_vec();
    let mut tokens: Vec<Token> = Vec::new();
    loop {
        let row: Vec<f32> = logits(hash_of(&context), *context.last().unwrap()).collect();
        let (prompt, output) = context.split_at(state.request.prompt_ids.len());
        let history = History { prompt, output };
        let allowed = allowed(output);
        let token = Sampler::new().sample_after(&row, sampling, choice, history, allowed.as_ref());
        let token = token.unwrap();
        context.push(token.id);
        tokens.push(token.clone());
        if sampling.stop_token_ids.contains(&token.id) {
            return (tokens, Finish::Stop(token.id));
        }
        if tokens.len() == sampling.max_tokens as usize || context.len() == max_model_len {
            return (tokens, Finish::Length);
        }
    }
}

/// The prompt's log-probabilities, computed alone.
pub(crate) fn prompt_logprobs_alone(prompt: &[TokenId], n_top: usize) -> Vec<TokenLogprobs> {
    let row = |end: usize| logits(hash_of(&prompt[..end]), prompt[end - 1]).collect::<Vec<f32>>();
    (1..prompt.len())
        .map(|end| Sampler::new().logprobs(&row(end), prompt[end], n_top).unwrap())
        .collect()
}
