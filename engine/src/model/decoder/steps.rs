//! Steps: which rows of a batch are wanted and by whom, launched as they are or as they were recorded, and collected.

use std::borrow::Cow;

use baton_kernels::{
    Backend, KernelError, KvCache, KvLayout, RaggedBatch, RaggedSequence, RecordingRun, RowLogprobs, RowSampler as _,
    RowSampling, SampledIds, SampledRow,
};
use baton_scheduler::layer_groups::LayerGroups;
use baton_scheduler::request::{SamplingParams, TokenLogprobs};

use super::{Decoder, DecoderLimits, MAX_FETCHED_ROWS};
use crate::forward::{ForwardPass, LogitsWanted, NewTokens, SampledToken, StepOutput, StepSequence, TokenWanted};

/// A step that was launched and not collected.
pub(super) struct Launched {
    /// Rows of logits for the host; where there are any, no step is launched behind this one.
    pub(super) n_host_rows: usize,
    pub(super) n_wanted_rows: usize,
    pub(super) has_hidden: bool,
}

impl<B: Backend> Decoder<B> {
    /// Has the device record the decode steps that it can, from few rows to many. The rows of those that it has recorded, and
    /// what kept it from the next, if anything did: steps of more rows are then queued operator by operator.
    pub(in crate::model) fn record_steps(&mut self) -> (Vec<usize>, Option<KernelError>) {
        let mut recorded = Vec::new();
        for n_rows in self.backend.recordable_rows() {
            match self.record_step(n_rows) {
                Ok(()) => recorded.push(n_rows),
                Err(error) => return (recorded, Some(error)),
            }
        }
        (recorded, None)
    }

    fn record_step(&mut self, n_rows: usize) -> Result<(), KernelError> {
        // One for each layer group, told apart by where they lie.
        let block_tables = vec![[0]; self.layer_groups.n_groups()];
        let of_group = |block_table| {
            let nobody = RaggedSequence {
                start_pos: 0,
                n_tokens: 1,
                block_table,
                rope_variant: 0,
            };
            vec![nobody; n_rows]
        };
        let ragged: Vec<Vec<RaggedSequence<'_>>> = block_tables.iter().map(|table| of_group(table)).collect();
        let batches: Vec<RaggedBatch<'_>> = ragged.iter().map(|sequences| RaggedBatch { sequences }).collect();
        self.token_ids = vec![0; n_rows];
        self.token_sources = vec![None; n_rows];
        self.wanted_rows = (0..n_rows).collect();
        self.hidden_rows.clear();
        for run in [RecordingRun::WarmUp, RecordingRun::Capture] {
            self.backend.begin_recording(&batches, run)?;
            self.all_rows(&batches, &mut |_, _| {});
            self.wanted_logits(0..n_rows);
            self.backend.end_recording(&self.activations.logits, run)?;
        }
        Ok(())
    }

    /// Queues a recorded step, if every sequence has one new token and something is made of its logits, in their order; they are
    /// then left in `activations.logits`.
    fn replay(&mut self, batches: &[RaggedBatch<'_>], on_layer: &mut dyn FnMut(usize, &mut KvCache)) -> bool {
        let n_rows = self.token_ids.len();
        let is_decode = batches.iter().all(|batch| batch.sequences.len() == n_rows);
        // Logits come in the order of rows.
        let wants_all = self.wanted_rows.iter().copied().eq(0..n_rows);
        if !is_decode || !wants_all {
            return false;
        }
        let sampled = self.sampler.as_ref().map(|sampler| SampledIds {
            sampler,
            sources: &self.token_sources,
        });
        let logits = &mut self.activations.logits;
        if !self
            .backend
            .replay(logits, &self.token_ids, sampled, batches, &mut self.kv)
        {
            return false;
        }
        self.n_replayed_steps += 1;
        (0..self.config.n_layers).for_each(|layer| on_layer(layer, &mut self.kv));
        true
    }

    /// A caller that breaks these has lost track of its blocks: going on would mix sequences.
    fn assert_valid(&self, sequences: &[StepSequence<'_>]) {
        let n_tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let DecoderLimits {
            max_batch_tokens,
            max_model_len,
        } = self.limits;
        assert!(
            n_tokens <= max_batch_tokens,
            "step of {n_tokens} tokens, expected at most {max_batch_tokens}"
        );
        for sequence in sequences {
            let end = sequence.start_pos + sequence.tokens.len();
            let n_blocks = self.kv.layout().blocks_for(end);
            assert!(sequence.tokens.len() > 0, "a sequence without new tokens");
            assert!(
                end <= max_model_len,
                "sequence of {end} tokens, expected at most {max_model_len}"
            );
            let (n_tables, n_groups) = (sequence.block_tables.len(), self.layer_groups.n_groups());
            assert!(n_tables == n_groups, "{n_tables} block tables, expected {n_groups}");
            for block_table in sequence.block_tables {
                let n_given = block_table.len();
                assert!(
                    n_given >= n_blocks,
                    "block table of {n_given} blocks, expected {n_blocks} for {end} tokens"
                );
            }
            if let Some(id) = sequence
                .tokens
                .known()
                .iter()
                .find(|&&id| id as usize >= self.config.vocab_size)
            {
                panic!(
                    "token id {id}, expected one below the vocabulary of {}",
                    self.config.vocab_size
                );
            }
        }
    }

    /// Fills `token_ids` and `token_sources`, and lists the rows of the step of which something comes back.
    fn list_rows(&mut self, sequences: &[StepSequence<'_>]) {
        self.token_ids.clear();
        self.token_sources.clear();
        self.wanted_rows.clear();
        self.sampled_rows.clear();
        self.hidden_rows.clear();
        let mut sampled_rows = Vec::new();
        let mut first = 0;
        for sequence in sequences {
            let end = first + sequence.tokens.len();
            match sequence.tokens {
                NewTokens::Known(tokens) => self.token_ids.extend_from_slice(tokens),
                NewTokens::Sampled(_) => self.token_ids.push(0),
            }
            self.token_sources.resize(end, None);
            if let NewTokens::Sampled(place) = sequence.tokens {
                self.token_sources[first] = Some(place);
            }
            match sequence.logits {
                LogitsWanted::None => {}
                LogitsWanted::Last => self.wanted_rows.push(end - 1),
                LogitsWanted::All => self.wanted_rows.extend(first..end),
                LogitsWanted::Hidden => self.hidden_rows.extend(first..end),
                LogitsWanted::Token(token) => {
                    sampled_rows.push(end - 1);
                    self.sampled_rows.push(row_sampling(token));
                }
            }
            first = end;
        }
        self.wanted_rows.extend(sampled_rows);
    }
}

fn row_sampling(TokenWanted { params, choice, index }: TokenWanted<'_>) -> RowSampling {
    RowSampling {
        seed: params.seed,
        index,
        choice,
        temperature: params.temperature,
        min_p: params.min_p,
        top_p: params.top_p,
        top_k: params.top_k,
        n_top: params.logprobs.map(usize::from),
    }
}

fn sampled_token(row: &SampledRow) -> Option<SampledToken> {
    let SampledRow::Chosen { id, logprobs } = row else {
        return None;
    };
    let logprobs = logprobs
        .as_ref()
        .map(|RowLogprobs { logprob, rank, top }| TokenLogprobs {
            logprob: *logprob,
            rank: *rank,
            top: top.clone(),
        });
    Some(SampledToken { id: *id, logprobs })
}

impl<B: Backend> ForwardPass for Decoder<B> {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    fn numerics_class(&self) -> String {
        self.backend.numerics_class()
    }

    fn layout(&self) -> KvLayout {
        self.kv.layout()
    }

    fn layer_groups(&self) -> LayerGroups {
        self.layer_groups.clone()
    }

    fn kv_cache(&mut self) -> &mut KvCache {
        &mut self.kv
    }

    fn n_replayed_steps(&self) -> u64 {
        self.n_replayed_steps
    }

    fn can_sample(&self, params: &SamplingParams) -> bool {
        let token = TokenWanted {
            params,
            choice: 0,
            index: 0,
        };
        let sampler = self.sampler.as_ref();
        sampler.is_some_and(|sampler| sampler.can_sample(&row_sampling(token)))
    }

    /// Of what comes back, only tokens have memory that the next step leaves alone.
    fn can_run_ahead_of(&self, sequences: &[StepSequence<'_>]) -> bool {
        let is_left_alone = |sequence: &StepSequence<'_>| match sequence.logits {
            LogitsWanted::None | LogitsWanted::Token(_) => true,
            LogitsWanted::Last | LogitsWanted::All | LogitsWanted::Hidden => false,
        };
        self.sampler.is_some() && sequences.iter().all(is_left_alone)
    }

    /// # Panics
    /// If the step is larger than the decoder's limits, a block table is too short, or a token id is past the vocabulary.
    fn launch(
        &mut self,
        sequences: &[StepSequence<'_>],
        on_layer: &mut dyn FnMut(usize, &mut KvCache),
    ) -> Result<(), KernelError> {
        self.assert_valid(sequences);
        self.list_rows(sequences);
        let n_wanted_rows = self.wanted_rows.len();
        let n_host_rows = n_wanted_rows - self.sampled_rows.len();
        let mut is_replayed = false;
        if !sequences.is_empty() {
            self.backend.begin_step();
            let of_group = |layer_group: usize| -> Vec<RaggedSequence<'_>> {
                let ragged = sequences.iter().map(|sequence| RaggedSequence {
                    start_pos: sequence.start_pos,
                    n_tokens: sequence.tokens.len(),
                    block_table: &sequence.block_tables[layer_group],
                    rope_variant: sequence.rope_variant,
                });
                ragged.collect()
            };
            let ragged: Vec<Vec<RaggedSequence<'_>>> = (0..self.layer_groups.n_groups()).map(of_group).collect();
            let batches: Vec<RaggedBatch<'_>> = ragged.iter().map(|sequences| RaggedBatch { sequences }).collect();
            is_replayed = self.replay(&batches, on_layer);
            if !is_replayed {
                self.all_rows(&batches, on_layer);
            }
            self.fetch_hidden();
        }
        self.host_logits.clear();
        for first in (0..n_wanted_rows).step_by(MAX_FETCHED_ROWS) {
            let end = n_wanted_rows.min(first + MAX_FETCHED_ROWS);
            // A step that was recorded has as many rows as one slab at most, and their logits are there.
            if !is_replayed {
                self.wanted_logits(first..end);
            }
            // What fits one slab stays where it is until it is collected.
            if n_wanted_rows > MAX_FETCHED_ROWS && first < n_host_rows {
                let logits = self.backend.to_host(&self.activations.logits);
                let n_values = (n_host_rows.min(end) - first) * self.config.vocab_size;
                self.host_logits.extend_from_slice(&logits[..n_values]);
            }
            if let Some(sampler) = &mut self.sampler
                && end > n_host_rows
            {
                let start = first.max(n_host_rows);
                let rows = &self.sampled_rows[start - n_host_rows..end - n_host_rows];
                sampler.sample(&self.backend, &self.activations.logits, start - first, rows);
            }
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.finish_step();
        }
        self.in_flight.push_back(Launched {
            n_host_rows,
            n_wanted_rows,
            has_hidden: !self.hidden_rows.is_empty(),
        });
        Ok(())
    }

    fn wait(&mut self) {
        if let Some(sampler) = &mut self.sampler {
            sampler.wait();
        }
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, KernelError> {
        let launched = self.in_flight.pop_front().expect("a step is in flight");
        self.sampled.clear();
        if let Some(sampler) = &mut self.sampler {
            self.sampled.extend(sampler.collect().iter().map(sampled_token));
        }
        let n_values = launched.n_host_rows * self.config.vocab_size;
        let logits = match launched.n_wanted_rows {
            _ if launched.n_host_rows == 0 => &[],
            ..=MAX_FETCHED_ROWS => match self.backend.to_host(&self.activations.logits) {
                Cow::Borrowed(logits) => &logits[..n_values],
                Cow::Owned(logits) => {
                    self.host_logits = logits;
                    &self.host_logits[..n_values]
                }
            },
            _ => &*self.host_logits,
        };
        Ok(StepOutput {
            tokens: &self.sampled,
            logits,
            hidden: if launched.has_hidden { &self.host_hidden } else { &[] },
        })
    }
}
