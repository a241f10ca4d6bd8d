//! Presence, frequency and repetition penalties: a pure function of logits and token ids, so that they move and replay
//! exactly. Nothing is kept between calls but scratch memory.

use baton_scheduler::request::SamplingParams;

use super::{History, SampleError};

/// Scratch of the penalties; grows to the vocabulary's size on first use.
#[derive(Debug, Default)]
pub(super) struct Penalties {
    /// `[vocab_size]`, zero between calls: of a token seen, one more than the times it was generated.
    marks: Vec<u32>,
}

/// Whether any penalty changes anything.
pub(super) fn are_on(params: &SamplingParams) -> bool {
    params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 || params.repetition_penalty != 1.0
}

impl Penalties {
    /// Penalises `row`, `[vocab_size]`, as vLLM defines and orders it: of a token in prompt or output the logit is divided by
    /// the repetition penalty where positive and multiplied where not; then, for the `n` times it was generated,
    /// `n * frequency_penalty` is subtracted, and `presence_penalty` once.
    ///
    /// # Errors
    /// A token of the history is past the vocabulary.
    pub(super) fn apply(
        &mut self,
        row: &mut [f32],
        params: &SamplingParams,
        history: History<'_>,
    ) -> Result<(), SampleError> {
        let n_tokens = row.len();
        let seen = || history.prompt.iter().chain(history.output).copied();
        if let Some(id) = seen().find(|&id| id as usize >= n_tokens) {
            return Err(SampleError::UnknownToken { id, n_tokens });
        }
        self.marks.resize(n_tokens, 0);
        history.prompt.iter().for_each(|&id| self.marks[id as usize] = 1);
        for &id in history.output {
            let mark = &mut self.marks[id as usize];
            *mark = (*mark).max(1) + 1;
        }
        for id in seen() {
            // Taken at the first sight, so that a token is penalised once and the marks end as they began.
            let Some(n_generated) = std::mem::take(&mut self.marks[id as usize]).checked_sub(1) else {
                continue;
            };
            row[id as usize] = penalised(row[id as usize], params, n_generated);
        }
        Ok(())
    }
}

fn penalised(logit: f32, params: &SamplingParams, n_generated: u32) -> f32 {
    let repeated = if logit > 0.0 {
        logit / params.repetition_penalty
    } else {
        logit * params.repetition_penalty
    };
    if n_generated == 0 {
        return repeated;
    }
    repeated - n_generated as f32 * params.frequency_penalty - params.presence_penalty
}
