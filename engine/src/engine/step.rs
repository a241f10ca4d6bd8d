//! One step: the scheduler's batch launched, its KV made known layer by layer; and, once it is over, tokens sampled where the
//! device has not done it, committed and told.

use std::collections::{BTreeMap, BTreeSet};

use baton_kernels::{KernelError, KvCache};
use baton_scheduler::batch::{Batch, BatchItem, BatchScheduler, Continued, GroupId, Member, Samples};
use baton_scheduler::ids::{SequenceId, TokenId};
use baton_scheduler::request::{Failure, Finish, Token};

use super::hidden_sum::NotFinite;
use super::open_group::{OpenGroup, Outlet, ReadyBlocks, Told};
use super::step_loop::{StepLoop, is_pinned};
use super::step_masks::StepMasks;
use crate::constraint::ConstraintError;
use crate::forward::{ForwardPass, LogitsWanted, NewTokens, SampledToken, StepOutput, StepSequence, TokenWanted};
use crate::sampler::{self, History, SampleError, Sampler};

/// A step that was launched and not collected.
pub(super) struct Flight {
    batch: Batch,
    /// One for each item.
    comes_back: Vec<ComesBack>,
    /// Of the sequences for which the device samples, the places of their tokens in what the step gives.
    tokens: BTreeMap<SequenceId, usize>,
    /// Whether the next step may be launched before this one is collected.
    pub(super) can_run_ahead: bool,
    n_step_tokens: u64,
    n_context_tokens: u64,
}

/// What comes back for an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ComesBack {
    Nothing,
    /// The last row's logits.
    Logits,
    /// Those of every row: the prompt's log-probabilities are wanted too.
    PromptLogits {
        n_rows: usize,
    },
    Hidden {
        n_rows: usize,
    },
    /// The token that the device sampled.
    Token,
}

impl ComesBack {
    fn of(sequence: &StepSequence<'_>) -> ComesBack {
        let n_tokens = sequence.tokens.len();
        match sequence.logits {
            LogitsWanted::None => ComesBack::Nothing,
            LogitsWanted::Last => ComesBack::Logits,
            LogitsWanted::All => ComesBack::PromptLogits { n_rows: n_tokens },
            LogitsWanted::Hidden => ComesBack::Hidden { n_rows: n_tokens },
            LogitsWanted::Token(_) => ComesBack::Token,
        }
    }

    fn n_logit_rows(self) -> usize {
        match self {
            ComesBack::Logits => 1,
            ComesBack::PromptLogits { n_rows } => n_rows,
            ComesBack::Nothing | ComesBack::Hidden { .. } | ComesBack::Token => 0,
        }
    }

    fn n_hidden_rows(self) -> usize {
        match self {
            ComesBack::Hidden { n_rows } => n_rows,
            ComesBack::Nothing | ComesBack::Logits | ComesBack::PromptLogits { .. } | ComesBack::Token => 0,
        }
    }
}

impl Flight {
    /// Whether a sequence's next token will be on the device when the step is over.
    pub(super) fn carries(&self, id: SequenceId) -> bool {
        self.tokens.contains_key(&id)
    }
}

impl<F: ForwardPass> StepLoop<F> {
    /// Launches a batch, perhaps behind one that is in flight. Says whether it is in flight now: not if there is nothing to
    /// compute, and not if the device refuses it, which ends its requests.
    pub(super) fn launch(&mut self, batch: Batch) -> bool {
        if batch.items.is_empty() {
            return false;
        }
        self.clock.launch();
        let before = self.in_flight.back();
        let mut masks = StepMasks::take(&batch, &self.scheduler, &mut self.open);
        let items = batch.items.iter();
        let sequences: Vec<StepSequence<'_>> = items
            .map(|item| view(item, &self.scheduler, &self.open, &self.forward, before))
            .collect();
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
        let mut n_layers_told = 0;
        let mut on_layer = |layer: usize, kv: &mut KvCache| {
            assert_eq!(
                layer, n_layers_told,
                "a forward pass tells of each layer once, in order"
            );
            n_layers_told += 1;
            ready.iter().for_each(|ready| ready.tell(layer, kv));
        };
        let can_run_ahead = self.runs_ahead && self.forward.can_run_ahead_of(&sequences);
        let launched = masks.beside(|| {
            self.forward.launch(&sequences, &mut on_layer)?;
            if !can_run_ahead {
                self.forward.wait();
            }
            Ok(())
        });
        let comes_back: Vec<ComesBack> = sequences.iter().map(ComesBack::of).collect();
        let n_step_tokens = sequences.iter().map(|sequence| sequence.tokens.len() as u64).sum();
        let n_context_tokens = sequences.iter().map(|sequence| {
            let n_new = sequence.tokens.len() as u64;
            n_new * sequence.start_pos as u64 + n_new * (n_new + 1) / 2
        });
        let n_context_tokens = n_context_tokens.sum();
        masks.put_back(&mut self.open);
        if let Err(error) = launched {
            self.clock.collect(self.in_flight.len());
            self.fail_batch(&batch, &error);
            return false;
        }
        for item in &batch.items {
            let group = self.scheduler.member(item.sequence).group;
            let open = self.open.get_mut(&group).expect("a computed request is open");
            let end = n_complete_blocks(item, block_size);
            self.counters.n_layer_blocks_ready += open.outlet.note_ready(end, &self.layer_groups);
        }
        self.counters.n_steps_ahead += u64::from(!self.in_flight.is_empty());
        let items = batch.items.iter().zip(&comes_back);
        let sampled = items.filter(|(_, comes_back)| **comes_back == ComesBack::Token);
        self.in_flight.push_back(Flight {
            tokens: sampled.map(|(item, _)| item.sequence).zip(0..).collect(),
            batch,
            comes_back,
            can_run_ahead,
            n_step_tokens,
            n_context_tokens,
        });
        true
    }

    /// Waits for the oldest step in flight, and takes what came of it.
    pub(super) fn finish_oldest(&mut self) {
        let Some(flight) = self.in_flight.pop_front() else {
            return;
        };
        let Flight { batch, comes_back, .. } = flight;
        let (vocab_size, hidden_size) = (self.forward.vocab_size(), self.forward.hidden_size());
        self.counters.n_replayed_steps = self.forward.n_replayed_steps();
        let collected = self.forward.collect();
        self.counters.forward_ns = self.clock.collect(self.in_flight.len());
        let StepOutput { tokens, logits, hidden } = match collected {
            Ok(output) => output,
            Err(error) => return self.fail_batch(&batch, &error),
        };
        self.counters.n_steps += 1;
        self.counters.n_step_tokens += flight.n_step_tokens;
        self.counters.n_context_tokens += flight.n_context_tokens;
        let n_rows: usize = comes_back.iter().map(|item| item.n_logit_rows()).sum();
        assert_eq!(
            logits.len(),
            n_rows * vocab_size,
            "a forward pass returns {n_rows} rows of {vocab_size} logits"
        );
        let n_hidden_rows: usize = comes_back.iter().map(|item| item.n_hidden_rows()).sum();
        assert_eq!(
            hidden.len(),
            n_hidden_rows * hidden_size,
            "a forward pass returns {n_hidden_rows} hidden states of {hidden_size}"
        );
        let n_tokens = flight.tokens.len();
        assert_eq!(tokens.len(), n_tokens, "a forward pass samples {n_tokens} tokens");

        let (mut tokens, mut logits, mut hidden) = (tokens.iter(), logits, hidden);
        let mut outcomes = Vec::with_capacity(batch.items.len());
        for (item, comes_back) in batch.items.iter().zip(comes_back) {
            let (own_logits, own_hidden);
            (own_logits, logits) = logits.split_at(comes_back.n_logit_rows() * vocab_size);
            (own_hidden, hidden) = hidden.split_at(comes_back.n_hidden_rows() * hidden_size);
            let own_token = match comes_back {
                ComesBack::Token => tokens.next(),
                _ => None,
            };
            // Its sequence ended, or gave the item up, while the step ran.
            if !self.scheduler.is_due(item.sequence) {
                outcomes.push(None);
                continue;
            }
            let member = self.scheduler.member(item.sequence);
            let open = self.open.get_mut(&member.group).expect("a computed request is open");
            let context = self.scheduler.tokens(item.sequence);
            let outcome: Outcome = match (own_token, &mut open.outlet) {
                (Some(Some(SampledToken { id, logprobs })), _) => Ok(vec![Token {
                    index: (context.len() - open.n_prompt) as u32,
                    id: *id,
                    logprobs: logprobs.clone(),
                }]),
                (Some(None), _) => {
                    // The row is computed again, and its logits come back.
                    open.is_left_to_host = true;
                    self.scheduler.take_back(item.sequence);
                    outcomes.push(None);
                    continue;
                }
                (None, Outlet::Embedding { sum, .. }) => {
                    assert_eq!(sum.n_rows(), item.start_pos, "hidden states come once and in order");
                    sum.add(own_hidden).map(|()| Vec::new()).map_err(NoToken::from)
                }
                (None, Outlet::Generation(_) | Outlet::Prefill { .. }) => {
                    let sampled = Sampled {
                        item,
                        first_choice: member.choice,
                        comes_back,
                        context,
                    };
                    sampled.sample(&mut self.sampler, open, own_logits.chunks_exact(vocab_size))
                }
            };
            outcomes.push(Some((member, outcome)));
        }
        self.commit(&batch, outcomes);
    }

    /// `outcomes` has what came of each item, `None` of those that do not count any more.
    fn commit(&mut self, batch: &Batch, outcomes: Vec<Option<(Member, Outcome)>>) {
        let mut tokens: BTreeMap<SequenceId, Token> = BTreeMap::new();
        let mut sampled: Vec<Vec<TokenId>> = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            match outcome {
                Some((member, Ok(own))) => {
                    sampled.push(own.iter().map(|token| token.id).collect());
                    let choices = member.choice..;
                    tokens.extend(
                        choices
                            .zip(own)
                            .map(|(choice, token)| (member.group.sequence(choice), token)),
                    );
                }
                Some((member, Err(error))) => {
                    // Removed before the commit, so that nothing computed from it enters the prefix cache.
                    self.fail(member.group, error.into());
                    sampled.push(Vec::new());
                }
                None => sampled.push(Vec::new()),
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
        let here = batch.items.iter().map(|item| item.sequence);
        let here = here.filter(|&id| self.scheduler.phase(id).is_some());
        let groups: BTreeSet<GroupId> = here.map(|id| self.scheduler.member(id).group).collect();
        tracing::error!(%error, n_requests = groups.len(), "a step failed");
        for group in groups {
            self.fail(group, Failure::Internal(format!("a step failed: {error}")));
        }
        self.scheduler.abandon(batch);
    }
}

/// An item as the device is given it; `before` is the step in flight.
fn view<'a>(
    item: &BatchItem,
    scheduler: &'a BatchScheduler,
    open: &'a BTreeMap<GroupId, OpenGroup>,
    forward: &impl ForwardPass,
    before: Option<&Flight>,
) -> StepSequence<'a> {
    let id = item.sequence;
    let tokens = match scheduler.tokens(id).get(item.start_pos..item.start_pos + item.n_tokens) {
        Some(tokens) => NewTokens::Known(tokens),
        None => {
            let place = before.and_then(|flight| flight.tokens.get(&id));
            NewTokens::Sampled(*place.expect("only what the step in flight samples is unknown"))
        }
    };
    let Member { group, choice } = scheduler.member(id);
    let open = &open[&group];
    let params = &open.sampling;
    let token_wanted = || {
        let index = item.start_pos + item.n_tokens - open.n_prompt;
        // What the device gives back is computed again, which blocks that are on their way to another instance cannot be.
        let is_the_devices = matches!(open.outlet, Outlet::Generation(_))
            && !open.is_left_to_host
            && params.constraint.is_none()
            && sampler::is_plain(params, index)
            && forward.can_sample(params);
        is_the_devices.then_some(TokenWanted {
            params,
            choice,
            index: index as u32,
        })
    };
    let logits = match item.samples {
        _ if scheduler.is_embedded(id) => LogitsWanted::Hidden,
        _ if scheduler.wants_prompt_logits(id) => LogitsWanted::All,
        Samples::Token => token_wanted().map_or(LogitsWanted::Last, LogitsWanted::Token),
        Samples::FirstTokens(_) => LogitsWanted::Last,
        Samples::Nothing => LogitsWanted::None,
    };
    StepSequence {
        tokens,
        start_pos: item.start_pos,
        block_tables: scheduler.block_tables(id),
        rope_variant: scheduler.rope_variant(id),
        logits,
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

/// The next tokens of an item's choices, as many as it samples.
type Outcome = Result<Vec<Token>, NoToken>;

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
    comes_back: ComesBack,
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
            if let (ComesBack::PromptLogits { .. }, Some(n_top)) = (self.comes_back, open.sampling.prompt_logprobs)
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
