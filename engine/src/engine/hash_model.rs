//! A model for tests: its logits are a hash of the context as read back from the KV memory, so that a wrong block, a wrong
//! position or a byte not moved gives another token. It computes nothing else, so thousands of requests take a second.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_kernels::{DType, KernelError, KvCache, KvLayout};
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{Finish, PortableState, SamplingParams, Token, TokenLogprobs};
use crossbeam::channel::Receiver;
use parking_lot::Mutex;

use crate::forward::{ForwardPass, LogitsWanted, NewTokens, SampledToken, StepOutput, StepSequence, TokenWanted};
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
    /// `None` where only the model knows it.
    pub(crate) first_token: Option<TokenId>,
    pub(crate) start_pos: usize,
    pub(crate) n_tokens: usize,
}

/// When it computes what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// At once, and the host samples.
    InTurn,
    /// It samples, and a token that only it knows is computed as late as can be: when it is collected, or the next step is launched.
    Ahead,
}

/// Of so many rows that it samples, the model in [`Pace::Ahead`] gives one back.
const GIVES_BACK_ONE_OF: u64 = 23;

/// A step in flight.
struct Launched {
    sequences: Vec<Copied>,
    output: Result<Output, KernelError>,
}

#[derive(Default)]
struct Output {
    tokens: Vec<Option<SampledToken>>,
    logits: Vec<f32>,
    hidden: Vec<f32>,
}

/// A sequence's share of a step that has not been computed yet.
struct Copied {
    tokens: Vec<TokenId>,
    /// In place of them.
    carried: Option<usize>,
    start_pos: usize,
    block_table: Vec<u32>,
    wanted: Wanted,
}

enum Wanted {
    Nothing,
    Last,
    All,
    Hidden,
    Token {
        params: SamplingParams,
        choice: u32,
        index: u32,
    },
}

pub(crate) struct HashModel {
    kv: KvCache,
    pace: Pace,
    in_flight: VecDeque<Launched>,
    /// Of the step that was computed last, the ids that it sampled.
    sampled: Vec<TokenId>,
    output: Output,
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
            pace: Pace::InTurn,
            in_flight: VecDeque::new(),
            sampled: Vec::new(),
            output: Output::default(),
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

    pub(crate) fn at(self, pace: Pace) -> HashModel {
        HashModel { pace, ..self }
    }

    fn append(&mut self, sequence: &Copied) -> Result<(), KernelError> {
        let block_size = self.kv.layout().block_size;
        let part_bytes = self.kv.layout().part_bytes();
        for (i, &token) in sequence.tokens.iter().enumerate() {
            let pos = sequence.start_pos + i;
            let block = sequence.block_table[pos / block_size];
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

    fn can_sample(&self, params: &SamplingParams) -> bool {
        // As a device may have a limit.
        self.pace == Pace::Ahead && params.top_k != 5
    }

    fn can_run_ahead_of(&self, _: &[StepSequence<'_>]) -> bool {
        self.pace == Pace::Ahead
    }

    fn launch(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<(), KernelError> {
        if self.pace == Pace::InTurn {
            self.wait_at_gate();
        }
        let seen = |sequence: &StepSequence<'_>| SeenItem {
            first_token: sequence.tokens.known().first().copied(),
            start_pos: sequence.start_pos,
            n_tokens: sequence.tokens.len(),
        };
        self.seen.lock().push(sequences.iter().map(seen).collect());
        self.compute_what_is_carried();
        let mut launched = Launched {
            sequences: sequences.iter().map(Copied::of).collect(),
            output: Ok(Output::default()),
        };
        for sequence in &launched.sequences {
            assert!(!sequence.tokens.contains(&PANIC), "asked to panic");
            if sequence.tokens.contains(&BROKEN) {
                let n_blocks = self.kv.n_blocks();
                let error = KernelError::BlockOutOfRange {
                    block: u32::MAX,
                    n_blocks,
                };
                match self.pace {
                    Pace::InTurn => return Err(error),
                    Pace::Ahead => launched.output = Err(error),
                }
                break;
            }
            self.append(sequence)?;
        }
        for layer in 0..N_LAYERS {
            on_layer(layer, &mut self.kv);
        }
        let is_all_known = launched.sequences.iter().all(|sequence| sequence.carried.is_none());
        self.in_flight.push_back(launched);
        if is_all_known {
            self.compute_what_is_carried();
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, KernelError> {
        if self.pace == Pace::Ahead {
            self.wait_at_gate();
        }
        self.compute_what_is_carried();
        let launched = self.in_flight.pop_front().expect("a step is in flight");
        self.output = launched.output?;
        Ok(StepOutput {
            tokens: &self.output.tokens,
            logits: &self.output.logits,
            hidden: &self.output.hidden,
        })
    }
}

impl HashModel {
    fn wait_at_gate(&self) {
        if let Some(gate) = &self.gate {
            // A dropped sender opens the gate for good.
            let _ = gate.recv();
        }
    }

    /// Computes the rest of the step launched last, which began with what was known.
    fn compute_what_is_carried(&mut self) {
        let Some(mut launched) = self.in_flight.pop_back() else {
            return;
        };
        let sequences = std::mem::take(&mut launched.sequences);
        if let Ok(output) = &mut launched.output
            && !sequences.is_empty()
        {
            *output = self.compute(sequences);
        }
        self.in_flight.push_back(launched);
    }

    fn compute(&mut self, mut sequences: Vec<Copied>) -> Output {
        for sequence in &mut sequences {
            if let Some(place) = sequence.carried {
                // After a step that failed there is nothing.
                sequence.tokens = vec![self.sampled.get(place).copied().unwrap_or(0)];
                self.append(sequence).expect("the block is nobody else's");
            }
        }
        let mut output = Output::default();
        self.sampled.clear();
        for sequence in &sequences {
            let end = sequence.start_pos + sequence.tokens.len();
            let positions = match sequence.wanted {
                Wanted::Nothing => continue,
                Wanted::Last | Wanted::Token { .. } => end - 1..end,
                Wanted::All | Wanted::Hidden => sequence.start_pos..end,
            };
            let hashes = self.hash_from_memory(&sequence.block_table, positions.clone());
            for (position, hash) in positions.zip(hashes) {
                let token = sequence.tokens[position - sequence.start_pos];
                match &sequence.wanted {
                    Wanted::Hidden => output.hidden.extend(hidden(hash, token)),
                    Wanted::Token { params, choice, index } => {
                        let row: Vec<f32> = logits(hash, token).collect();
                        let sampled = Sampler::new().sample(&row, params, *choice, *index).ok();
                        let sampled = sampled.filter(|_| !(hash >> 20).is_multiple_of(GIVES_BACK_ONE_OF));
                        self.sampled.push(sampled.as_ref().map_or(0, |token| token.id));
                        output
                            .tokens
                            .push(sampled.map(|Token { id, logprobs, .. }| SampledToken { id, logprobs }));
                    }
                    Wanted::Nothing | Wanted::Last | Wanted::All => output.logits.extend(logits(hash, token)),
                }
            }
        }
        output
    }
}

impl Copied {
    fn of(sequence: &StepSequence<'_>) -> Copied {
        Copied {
            tokens: sequence.tokens.known().to_vec(),
            carried: match sequence.tokens {
                NewTokens::Known(_) => None,
                NewTokens::Sampled(place) => Some(place),
            },
            start_pos: sequence.start_pos,
            block_table: sequence.block_tables[0].clone(),
            wanted: match sequence.logits {
                LogitsWanted::None => Wanted::Nothing,
                LogitsWanted::Last => Wanted::Last,
                LogitsWanted::All => Wanted::All,
                LogitsWanted::Hidden => Wanted::Hidden,
                LogitsWanted::Token(TokenWanted { params, choice, index }) => Wanted::Token {
                    params: params.clone(),
                    choice,
                    index,
                },
            },
        }
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
