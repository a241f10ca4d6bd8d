//! A request made ready for the step loop: its constraint compiled, and read as far as its outputs are known.

use baton_scheduler::request::{Failure, PortableState};

use crate::constraint::{ConstraintCompiler, ConstraintError, GroupConstraint};

/// A request, with its constraint once that is compiled. What takes one compiles it where that was not done before, on the
/// spot.
pub struct Prepared {
    pub(super) state: PortableState,
    pub(super) constraint: Option<Box<GroupConstraint>>,
}

impl From<PortableState> for Prepared {
    fn from(state: PortableState) -> Prepared {
        Prepared {
            state,
            constraint: None,
        }
    }
}

impl Prepared {
    /// Whether there is a constraint that is not compiled yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.constraint.is_none() && self.state.request.sampling.constraint.is_some()
    }

    /// Compiles what waits. Takes milliseconds, and more for long outputs.
    pub(super) fn compile(&mut self, compiler: Option<&ConstraintCompiler>) -> Result<(), Failure> {
        let sampling = &self.state.request.sampling;
        let Some(constraint) = sampling.constraint.as_ref().filter(|_| self.constraint.is_none()) else {
            return Ok(());
        };
        let compiler = compiler.ok_or_else(|| ConstraintError::Model("it has no tokenizer".to_owned()))?;
        let n_choices = self.state.choices.len();
        let mut group = GroupConstraint::new(compiler.compile(constraint)?, n_choices);
        for (choice, known) in (0..).zip(&self.state.choices) {
            if known.finish.is_none() {
                let output: Vec<_> = known.output.iter().map(|token| token.id).collect();
                // One whose last token ended it unheard has nothing to follow it.
                if !output.last().is_some_and(|last| sampling.stop_token_ids.contains(last)) {
                    group.allowed(choice, &output)?;
                }
            }
        }
        self.constraint = Some(Box::new(group));
        Ok(())
    }
}
