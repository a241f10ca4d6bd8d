//! One step: the scheduler's batch computed, its KV made known layer by layer, tokens sampled, committed and told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use baton_kernels::{KernelError, KvCache};
use baton_scheduler::batch::{Batch, BatchItem, BatchScheduler, Continued, GroupId, Member, Samples};
use baton_scheduler::ids::{SequenceId, TokenId};
use baton_scheduler::request::{Failure, Finish, Token};

use super::hidden_sum::NotFinite;
use super::open_group::{OpenGroup, Outlet, ReadyBlocks, Told};
use super::step_loop::{StepLoop, is_pinned};
use super::step_masks::StepMasks;
use crate::constraint::ConstraintError;
use crate::forward::{ForwardPass, LogitsWanted, StepOutput, StepSequence};
use crate::sampler::{History, SampleError, Sampler};

impl<F: ForwardPass> StepLoop<F> {
    pub(super) fn step(&mut self, batch: &Batch) {
        let began = Instant::now();
        let mut masks = StepMasks::take(batch, &self.scheduler, &mut self.open);
        let sequences: Vec<StepSequence<'_>> = batch.items.iter().map(|item| view(&self.scheduler, item)).collect();
        let block_size = self.scheduler.config().block_size;
        let ready: Vec<ReadyBlocks<'_>> = batch
            .items
            .iter()
            .filter_map(|item| {
                let group = self.scheduler.member(item.sequence).group;
                let end = n_complete_blocks(item, block_size);
                let block_tables = self.scheduler.block_tables(item.sequence);
                ReadyBlocks::until(end, &self.open[&group].outlet, &self.layer_groups, block_tables)
            })
            .collect();
        let (vocab_size, hidden_size) = (self.forward.vocab_size(), self.forward.hidden_size());
        let mut n_layers_told = 0;
        let mut on_layer = |layer: usize, kv: &mut KvCache| {
            assert_eq!(
                layer, n_layers_told,
                "a forward pass tells of each layer once, in order"
            );
            n_layers_told += 1;
            ready.iter().for_each(|ready| ready.tell(layer, kv));
        };
        let computed = masks.beside(|| self.forward.step(&sequences, &mut on_layer));
        masks.put_back(&mut self.open);
        let StepOutput { logits, hidden } = match computed {
            Ok(output) => output,
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
        let n_hidden_rows: usize = sequences.iter().map(n_hidden_rows_of).sum();
        assert_eq!(
            hidden.len(),
            n_hidden_rows * hidden_size,
            "a forward pass returns {n_hidden_rows} hidden states of {hidden_size}"
        );

        let mut rows = logits.chunks_exact(vocab_size);
        let mut hidden = hidden;
        let mut outcomes = Vec::with_capacity(batch.items.len());
        for (item, sequence) in batch.items.iter().zip(&sequences) {
            let member = self.scheduler.member(item.sequence);
            let open = self.open.get_mut(&member.group).expect("a computed request is open");
            let own_rows = rows.by_ref().take(n_logit_rows(sequence));
            let sampled = Sampled {
                item,
                first_choice: member.choice,
                wanted: sequence.logits,
                context: self.scheduler.tokens(item.sequence),
            };
            let mut outcome = sampled.sample(&mut self.sampler, open, own_rows);
            if let Outlet::Embedding { sum, .. } = &mut open.outlet {
                let (own_hidden, others) = hidden.split_at(n_hidden_rows_of(sequence) * hidden_size);
                hidden = others;
                assert_eq!(sum.n_rows(), item.start_pos, "hidden states come once and in order");
                outcome = sum.add(own_hidden).map(|()| Vec::new()).map_err(NoToken::from);
            }
            outcomes.push((member, outcome));
        }
        self.finish_step(batch, outcomes);
    }

    fn finish_step(&mut self, batch: &Batch, outcomes: Vec<(Member, Result<Vec<Token>, NoToken>)>) {
        self.counters.n_replayed_steps = self.forward.n_replayed_steps();
        let block_size = self.scheduler.config().block_size;
        for (item, (member, _)) in batch.items.iter().zip(&outcomes) {
            let open = self.open.get_mut(&member.group).expect("a computed request is open");
            let end = n_complete_blocks(item, block_size);
            self.counters.n_layer_blocks_ready += open.outlet.note_ready(end, &self.layer_groups);
        }
        let mut tokens: BTreeMap<SequenceId, Token> = BTreeMap::new();
        let mut sampled: Vec<Vec<TokenId>> = Vec::with_capacity(outcomes.len());
        for (member, outcome) in outcomes {
            match outcome {
                Ok(own) => {
                    sampled.push(own.iter().map(|token| token.id).collect());
                    let choices = member.choice..;
                    tokens.extend(
                        choices
                            .zip(own)
                            .map(|(choice, token)| (member.group.sequence(choice), token)),
                    );
                }
                Err(error) => {
                    // Removed before the commit, so that nothing computed from it enters the prefix cache.
                    self.fail(member.group, error.into());
                    sampled.push(Vec::new());
                }
            }
        }
        let committed = self
            .scheduler
            .commit(batch, &sampled, &is_pinned(self.forward.kv_cache()));
        let mut handed_over: BTreeMap<GroupId, Vec<(Token, Option<Finish>)>> = BTreeMap::new();
        for &Continued { member, finish, .. } in &committed.continued {
            let Member { group, choice } = member;
            let token = tokens
                .remove(&group.sequence(choice))
                .expect("a committed token was sampled");
            let open = self.open.get_mut(&group).expect("a sampling request is open");
            if matches!(open.outlet, Outlet::Prefill { .. }) {
                handed_over.entry(group).or_default().push((token, finish));
            } else if open.tell_token(choice, token, finish) == Told::All {
                self.counters.n_finished += 1;
                self.open.remove(&group);
            }
        }
        for (group, first) in handed_over {
            let open = self.open.get_mut(&group).expect("a sampling request is open");
            open.tell_first_tokens(first);
            self.counters.n_finished += 1;
        }
        for group in &committed.embedded {
            let open = self.open.remove(group).expect("an embedded request is open");
            open.tell_embedding();
            self.counters.n_finished += 1;
        }
        self.make_forks(&committed);
    }

    fn fail_batch(&mut self, batch: &Batch, error: &KernelError) {
        let groups: BTreeSet<GroupId> = batch
            .items
            .iter()
            .map(|item| self.scheduler.member(item.sequence).group)
            .collect();
        tracing::error!(%error, n_requests = groups.len(), "a step failed");
        for group in groups {
            self.fail(group, Failure::Internal(format!("a step failed: {error}")));
        }
    }
}

fn view<'a>(scheduler: &'a BatchScheduler, item: &BatchItem) -> StepSequence<'a> {
    let logits = match item.samples {
        _ if scheduler.is_embedded(item.sequence) => LogitsWanted::Hidden,
        _ if scheduler.wants_prompt_logits(item.sequence) => LogitsWanted::All,
        Samples::Token | Samples::FirstTokens(_) => LogitsWanted::Last,
        Samples::Nothing => LogitsWanted::None,
    };
    StepSequence {
        tokens: &scheduler.tokens(item.sequence)[item.start_pos..item.start_pos + item.n_tokens],
        start_pos: item.start_pos,
        block_tables: scheduler.block_tables(item.sequence),
        rope_variant: scheduler.rope_variant(item.sequence),
        logits,
    }
}

fn n_logit_rows(sequence: &StepSequence<'_>) -> usize {
    match sequence.logits {
        LogitsWanted::None | LogitsWanted::Hidden => 0,
        LogitsWanted::Last => 1,
        LogitsWanted::All => sequence.tokens.len(),
    }
}

fn n_hidden_rows_of(sequence: &StepSequence<'_>) -> usize {
    match sequence.logits {
        LogitsWanted::Hidden => sequence.tokens.len(),
        LogitsWanted::None | LogitsWanted::Last | LogitsWanted::All => 0,
    }
}

/// Blocks complete after the item: full ones, and after the context's last token the last one as it is.
fn n_complete_blocks(item: &BatchItem, block_size: usize) -> usize {
    let end = item.start_pos + item.n_tokens;
    match item.samples {
        Samples::Token | Samples::FirstTokens(_) => end.div_ceil(block_size),
        Samples::Nothing => end / block_size,
    }
}

/// Why there is no next token.
#[derive(Debug, thiserror::Error)]
enum NoToken {
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    #[error(transparent)]
    Hidden(#[from] NotFinite),
}

impl From<NoToken> for Failure {
    fn from(error: NoToken) -> Failure {
        match error {
            NoToken::Constraint(error) => error.into(),
            NoToken::Sample(error @ SampleError::NothingAllowed { .. }) => Failure::Invalid(error.to_string()),
            NoToken::Sample(error) => Failure::Internal(error.to_string()),
            NoToken::Hidden(error) => Failure::Internal(error.to_string()),
        }
    }
}

/// What is sampled for one item of a batch.
struct Sampled<'a> {
    item: &'a BatchItem,
    first_choice: u32,
    wanted: LogitsWanted,
    /// Prompt and output.
    context: &'a [TokenId],
}

impl Sampled<'_> {
    /// Log-probabilities of the prompt from every row, if wanted, and the next tokens from the last row.
    fn sample<'a>(
        &self,
        sampler: &mut Sampler,
        open: &mut OpenGroup,
        rows: impl Iterator<Item = &'a [f32]>,
    ) -> Result<Vec<Token>, NoToken> {
        let mut last = None;
        for (row_idx, row) in rows.enumerate() {
            let next_pos = self.item.start_pos + row_idx + 1;
            if let (LogitsWanted::All, Some(n_top)) = (self.wanted, open.sampling.prompt_logprobs)
                && next_pos < open.n_prompt
            {
                let logprobs = sampler.logprobs(row, self.context[next_pos], usize::from(n_top))?;
                open.prompt_logprobs.push(logprobs);
            }
            last = Some(row);
        }
        let Some(row) = last else { return Ok(Vec::new()) };
        let (prompt, output) = self.context.split_at(open.n_prompt);
        let history = History { prompt, output };
        let choices = self.first_choice..self.first_choice + self.item.samples.n_tokens();
        let OpenGroup {
            sampling, constraint, ..
        } = open;
        choices
            .map(|choice| {
                let allowed = match constraint {
                    Some(constraint) => Some(constraint.allowed(choice, output)?),
                    None => None,
                };
                Ok(sampler.sample_after(row, sampling, choice, history, allowed)?)
            })
            .collect()
    }
}
