//! The constraint of one request: what each of its choices may generate next.

use std::sync::Arc;

use baton_scheduler::ids::TokenId;
use llguidance::Matcher;

use super::ConstraintError;
use super::compiler::CompiledConstraint;
use crate::sampler::TokenSet;

/// A request's constraint, with how far each choice's output has been read.
pub struct GroupConstraint {
    compiled: Arc<CompiledConstraint>,
    /// All choices begin alike.
    beginning: Option<ReadOutput>,
    /// `[n]`
    choices: Vec<Option<ReadOutput>>,
}

/// A matcher that has read an output, and what may follow it once that was asked.
struct ReadOutput {
    matcher: Matcher,
    read: Vec<TokenId>,
    allowed: Option<TokenSet>,
}

impl GroupConstraint {
    /// Of a request with `n_choices` choices. Nothing has been read.
    pub fn new(compiled: Arc<CompiledConstraint>, n_choices: usize) -> GroupConstraint {
        GroupConstraint {
            compiled,
            beginning: None,
            choices: (0..n_choices).map(|_| None).collect(),
        }
    }

    /// What may follow `output`, all that `choice` has generated. An end of sequence is in it exactly where the text is
    /// complete, and alone in it where nothing can follow. Takes the longer the more of the output has not been read.
    ///
    /// # Errors
    /// The output is not of the language, or matching it takes more than the library's limits.
    pub fn allowed(&mut self, choice: u32, output: &[TokenId]) -> Result<&TokenSet, ConstraintError> {
        let compiled = &self.compiled;
        let place = match output {
            [] => &mut self.beginning,
            _ => &mut self.choices[choice as usize],
        };
        // One that has read something else is of no use: matchers are not asked to go back.
        if place.as_ref().is_some_and(|state| !output.starts_with(&state.read)) {
            *place = None;
        }
        let state = place.get_or_insert_with(|| ReadOutput {
            matcher: compiled.fresh(),
            read: Vec::new(),
            allowed: None,
        });
        state.read_on(output).map_err(|message| ConstraintError::Step {
            choice,
            index: output.len(),
            message,
        })?;
        Ok(state.allowed.as_ref().expect("asked for above"))
    }
}

impl ReadOutput {
    fn read_on(&mut self, output: &[TokenId]) -> Result<(), String> {
        let unread = &output[self.read.len()..];
        if !unread.is_empty() {
            self.allowed = None;
            self.matcher.consume_tokens(unread).map_err(super::one_line)?;
            self.read.extend_from_slice(unread);
        }
        if self.allowed.is_none() {
            let set = self.matcher.compute_mask_or_eos().map_err(super::one_line)?;
            self.allowed = Some(TokenSet::from(Vec::<u32>::from(set)));
        }
        Ok(())
    }
}
