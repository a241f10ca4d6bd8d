//! Constraints compiled for one vocabulary, each at most once while it is in use.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use baton_scheduler::ids::TokenId;
use baton_scheduler::request::Constraint;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use parking_lot::Mutex;
use serde_json::Value;

use super::{ConstraintError, one_line, vocabulary};
use crate::text::Tokenizer;

/// Longest source of a constraint, bytes.
pub const MAX_CONSTRAINT_BYTES: usize = 256 << 10;
/// Constraints kept compiled after their requests have ended: clients repeat them.
const N_KEPT: usize = 32;

/// A model's tokenizer and its ends of sequence, or why there is none.
pub type LoadedText = Result<(Tokenizer, Vec<TokenId>), String>;

/// Compiles constraints for one model. Clones share the vocabulary, which is built when the first constraint comes.
#[derive(Clone)]
pub struct ConstraintCompiler {
    inner: Arc<Inner>,
}

struct Inner {
    load_text: Box<dyn Fn() -> LoadedText + Send + Sync>,
    n_vocab: usize,
    factory: OnceLock<Result<ParserFactory, ConstraintError>>,
    /// The least recently used first.
    kept: Mutex<VecDeque<Arc<CompiledConstraint>>>,
}

/// A constraint ready to be matched, by any number of choices.
pub struct CompiledConstraint {
    constraint: Constraint,
    /// At the beginning of a text.
    fresh: Mutex<Matcher>,
}

impl std::fmt::Debug for ConstraintCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let n_vocab = self.inner.n_vocab;
        f.debug_struct("ConstraintCompiler")
            .field("n_vocab", &n_vocab)
            .finish_non_exhaustive()
    }
}

impl ConstraintCompiler {
    /// For a model with logits `[n_vocab]`. `load_text` is called once, with the first constraint.
    pub fn new(load_text: impl Fn() -> LoadedText + Send + Sync + 'static, n_vocab: usize) -> ConstraintCompiler {
        ConstraintCompiler {
            inner: Arc::new(Inner {
                load_text: Box::new(load_text),
                n_vocab,
                factory: OnceLock::new(),
                kept: Mutex::new(VecDeque::new()),
            }),
        }
    }

    /// Compiles, unless that has been done. Takes milliseconds, and the first time as long as the vocabulary takes to read:
    /// not for a thread that others wait for. The library bounds the size of a grammar and the work of compiling it.
    ///
    /// # Errors
    /// What is wrong with the constraint, or with the model.
    pub fn compile(&self, constraint: &Constraint) -> Result<Arc<CompiledConstraint>, ConstraintError> {
        if let Some(kept) = self.take_kept(constraint) {
            return Ok(kept);
        }
        let compiled = Arc::new(CompiledConstraint {
            constraint: constraint.clone(),
            fresh: Mutex::new(self.matcher(constraint)?),
        });
        let mut kept = self.inner.kept.lock();
        if kept.len() == N_KEPT {
            kept.pop_front();
        }
        kept.push_back(Arc::clone(&compiled));
        Ok(compiled)
    }

    fn take_kept(&self, constraint: &Constraint) -> Option<Arc<CompiledConstraint>> {
        let mut kept = self.inner.kept.lock();
        let found = kept.iter().position(|compiled| compiled.constraint == *constraint)?;
        let compiled = kept.remove(found)?;
        kept.push_back(Arc::clone(&compiled));
        Some(compiled)
    }

    fn matcher(&self, constraint: &Constraint) -> Result<Matcher, ConstraintError> {
        let n_bytes = constraint.text().len();
        if n_bytes > MAX_CONSTRAINT_BYTES {
            let message = format!("{n_bytes} bytes, expected at most {MAX_CONSTRAINT_BYTES}");
            return Err(ConstraintError::Invalid(message));
        }
        let grammar = match constraint {
            Constraint::JsonSchema(schema) => {
                let schema: Value = serde_json::from_str(schema)
                    .map_err(|error| ConstraintError::Invalid(format!("the schema is not valid JSON: {error}")))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Constraint::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Constraint::Grammar(grammar) => TopLevelGrammar::from_lark(grammar.to_string()),
        };
        let factory = self.inner.factory.get_or_init(|| self.build_factory());
        let factory = factory.as_ref().map_err(Clone::clone)?;
        let matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            None => Ok(matcher),
            Some(error) => Err(ConstraintError::Invalid(one_line(error))),
        }
    }

    fn build_factory(&self) -> Result<ParserFactory, ConstraintError> {
        let began = std::time::Instant::now();
        let (tokenizer, eos_token_ids) = (self.inner.load_text)().map_err(ConstraintError::Model)?;
        let env = vocabulary::token_env(&tokenizer, &eos_token_ids, self.inner.n_vocab)?;
        let factory = ParserFactory::new_simple(&env);
        let mut factory = factory.map_err(|error| ConstraintError::Model(one_line(error)))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(
            n_vocab = self.inner.n_vocab,
            seconds,
            "vocabulary ready for constraints"
        );
        Ok(factory)
    }
}

impl CompiledConstraint {
    /// A matcher at the beginning of a text, which shares nothing that changes: what one choice does is not felt by others.
    pub(super) fn fresh(&self) -> Matcher {
        self.fresh.lock().deep_clone()
    }
}
