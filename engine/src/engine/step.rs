//! One step: the scheduler's batch computed, its KV made known layer by layer, tokens sampled, committed and told.

use std::collections::BTreeMap;
use std::time::Instant;

use baton_kernels::{KernelError, KvCache};
use baton_scheduler::batch::{Batch, BatchItem, BatchScheduler, Samples};
use baton_scheduler::ids::{SequenceId, TokenId};
use baton_scheduler::request::{Failure, Token};

use super::open_sequence::{OpenSequence, Outlet, ReadyBlocks};
use super::step_loop::{StepLoop, is_pinned};
use crate::forward::{ForwardPass, LogitsWanted, StepSequence};
use crate::sampler::{SampleError, Sampler};

impl<F: ForwardPass> StepLoop<F> {
    pub(super) fn step(&mut self, batch: &Batch) {
        let began = Instant::now();
        let sequences: Vec<StepSequence<'_>> = batch.items.iter().map(|item| view(&self.scheduler, item)).collect();
        let block_size = self.scheduler.config().block_size;
        let ready: Vec<ReadyBlocks<'_>> = batch
            .items
            .iter()
            .filter_map(|item| {
                let Outlet::Prefill { events, n_ready } = &self.open[&item.sequence].outlet else {
                    return None;
                };
                let blocks = *n_ready..n_complete_blocks(item, block_size);
                let block_table = self.scheduler.block_table(item.sequence);
                (!blocks.is_empty()).then_some(ReadyBlocks {
                    events,
                    blocks,
                    block_table,
                })
            })
            .collect();
        let vocab_size = self.forward.vocab_size();
        let mut n_layers_told = 0;
        let mut on_layer = |layer: usize, kv: &mut KvCache| {
            assert_eq!(
                layer, n_layers_told,
                "a forward pass tells of each layer once, in order"
            );
            n_layers_told += 1;
            ready.iter().for_each(|ready| ready.tell(layer, kv));
        };
        let logits = match self.forward.step(&sequences, &mut on_layer) {
            Ok(logits) => logits,
            Err(error) => return self.fail_batch(batch, &error),
        };
        self.counters.forward_ns += began.elapsed().as_nanos() as u64;
        self.counters.n_steps += 1;
        self.counters.n_step_tokens += sequences
            .iter()
            .map(|sequence| sequence.tokens.len() as u64)
            .sum::<u64>();
        self.counters.n_context_tokens += sequences
            .iter()
            .map(|sequence| {
                let n_new = sequence.tokens.len() as u64;
                n_new * sequence.start_pos as u64 + n_new * (n_new + 1) / 2
            })
            .sum::<u64>();
        let n_rows: usize = sequences.iter().map(n_logit_rows).sum();
        assert_eq!(
            logits.len(),
            n_rows * vocab_size,
            "a forward pass returns {n_rows} rows of {vocab_size} logits"
        );

        let mut rows = logits.chunks_exact(vocab_size);
        let mut outcomes: Vec<Result<Option<Token>, SampleError>> = Vec::with_capacity(batch.items.len());
        for (item, sequence) in batch.items.iter().zip(&sequences) {
            let open = self.open.get_mut(&item.sequence).expect("a computed sequence is open");
            let own_rows = rows.by_ref().take(n_logit_rows(sequence));
            let context = self.scheduler.tokens(item.sequence);
            outcomes.push(sample(
                &mut self.sampler,
                open,
                item,
                sequence.logits,
                context,
                own_rows,
            ));
        }
        self.finish_step(batch, outcomes);
    }

    fn finish_step(&mut self, batch: &Batch, outcomes: Vec<Result<Option<Token>, SampleError>>) {
        let block_size = self.scheduler.config().block_size;
        let n_layers = self.forward.layout().n_layers;
        for item in &batch.items {
            let open = self.open.get_mut(&item.sequence).expect("a computed sequence is open");
            if let Outlet::Prefill { n_ready, .. } = &mut open.outlet {
                let n_complete = n_complete_blocks(item, block_size).max(*n_ready);
                self.counters.n_layer_blocks_ready += ((n_complete - *n_ready) * n_layers) as u64;
                *n_ready = n_complete;
            }
        }
        let mut tokens: BTreeMap<SequenceId, Token> = BTreeMap::new();
        let mut sampled: Vec<Option<TokenId>> = Vec::with_capacity(outcomes.len());
        for (item, outcome) in batch.items.iter().zip(outcomes) {
            match outcome {
                Ok(token) => {
                    sampled.push(token.as_ref().map(|token| token.id));
                    tokens.extend(token.map(|token| (item.sequence, token)));
                }
                Err(error) => {
                    // Removed before the commit, so that nothing computed from it enters the prefix cache.
                    self.fail(item.sequence, Failure::Internal(error.to_string()));
                    sampled.push(None);
                }
            }
        }
        let committed = self
            .scheduler
            .commit(batch, &sampled, &is_pinned(self.forward.kv_cache()));
        for (id, finish) in committed {
            let token = tokens.remove(&id).expect("a committed token was sampled");
            let open = self.open.get_mut(&id).expect("a sampling sequence is open");
            open.tell_token(token, finish);
            let is_handed_over = matches!(open.outlet, Outlet::Prefill { .. });
            if finish.is_some() || is_handed_over {
                self.counters.n_finished += 1;
            }
            if finish.is_some() && !is_handed_over {
                self.open.remove(&id);
            }
        }
    }

    fn fail_batch(&mut self, batch: &Batch, error: &KernelError) {
        tracing::error!(%error, n_sequences = batch.items.len(), "a step failed");
        for item in &batch.items {
            self.fail(item.sequence, Failure::Internal(format!("a step failed: {error}")));
        }
    }
}

fn view<'a>(scheduler: &'a BatchScheduler, item: &BatchItem) -> StepSequence<'a> {
    let logits = match item.samples {
        _ if scheduler.wants_prompt_logits(item.sequence) => LogitsWanted::All,
        Samples::Token => LogitsWanted::Last,
        Samples::Nothing => LogitsWanted::None,
    };
    StepSequence {
        tokens: &scheduler.tokens(item.sequence)[item.start_pos..item.start_pos + item.n_tokens],
        start_pos: item.start_pos,
        block_table: scheduler.block_table(item.sequence),
        logits,
    }
}

fn n_logit_rows(sequence: &StepSequence<'_>) -> usize {
    match sequence.logits {
        LogitsWanted::None => 0,
        LogitsWanted::Last => 1,
        LogitsWanted::All => sequence.tokens.len(),
    }
}

/// Blocks complete after the item: full ones, and after the context's last token the last one as it is.
fn n_complete_blocks(item: &BatchItem, block_size: usize) -> usize {
    let end = item.start_pos + item.n_tokens;
    match item.samples {
        Samples::Token => end.div_ceil(block_size),
        Samples::Nothing => end / block_size,
    }
}

/// Log-probabilities of the prompt from every row, if wanted, and the next token from the last row.
fn sample<'a>(
    sampler: &mut Sampler,
    open: &mut OpenSequence,
    item: &BatchItem,
    wanted: LogitsWanted,
    context: &[TokenId],
    rows: impl Iterator<Item = &'a [f32]>,
) -> Result<Option<Token>, SampleError> {
    let mut last = None;
    for (row_idx, row) in rows.enumerate() {
        let next_pos = item.start_pos + row_idx + 1;
        if let (LogitsWanted::All, Some(n_top)) = (wanted, open.sampling.prompt_logprobs)
            && next_pos < open.n_prompt
        {
            let logprobs = sampler.logprobs(row, context[next_pos], usize::from(n_top))?;
            open.prompt_logprobs.push(logprobs);
        }
        last = Some(row);
    }
    match (item.samples, last) {
        (Samples::Token, Some(row)) => sampler.sample(row, &open.sampling, 0, open.next_index).map(Some),
        _ => Ok(None),
    }
}
