//! What constrained requests may generate next, worked out beside the forward pass: it depends on what was generated before,
//! not on the logits. Where that fails, sampling asks again and hears why.

use std::collections::BTreeMap;
use std::thread;

use baton_scheduler::batch::{Batch, BatchScheduler, GroupId, Samples};
use baton_scheduler::ids::TokenId;

use super::open_group::OpenGroup;
use crate::constraint::GroupConstraint;

/// Choices for one thread: a mask takes tens of microseconds, a few hundred for a large vocabulary.
const CHOICES_PER_THREAD: usize = 8;
const MAX_THREADS: usize = 4;

/// A group's constraint, and what is asked of it in one step.
struct Asked<'a> {
    group: GroupId,
    constraint: Box<GroupConstraint>,
    outputs: Vec<(u32, &'a [TokenId])>,
}

/// The constraints of a step's groups, away from their groups until they are put back.
pub(super) struct StepMasks<'a> {
    asked: Vec<Asked<'a>>,
}

impl<'a> StepMasks<'a> {
    /// Takes the constraints of all that samples in `batch`.
    pub(super) fn take(
        batch: &Batch,
        scheduler: &'a BatchScheduler,
        open: &mut BTreeMap<GroupId, OpenGroup>,
    ) -> StepMasks<'a> {
        let mut asked: Vec<Asked<'a>> = Vec::new();
        let sampling = batch.items.iter().filter(|item| item.samples != Samples::Nothing);
        for item in sampling {
            let member = scheduler.member(item.sequence);
            let open = open.get_mut(&member.group).expect("a computed request is open");
            let output = (member.choice, &scheduler.tokens(item.sequence)[open.n_prompt..]);
            if let Some(constraint) = open.constraint.take() {
                asked.push(Asked {
                    group: member.group,
                    constraint,
                    outputs: vec![output],
                });
            } else if let Some(asked) = asked.iter_mut().find(|asked| asked.group == member.group) {
                asked.outputs.push(output);
            }
        }
        StepMasks { asked }
    }

    /// Runs `forward` while other threads work the masks out. Without constraints it only runs `forward`.
    pub(super) fn beside<T>(&mut self, forward: impl FnOnce() -> T) -> T {
        if self.asked.is_empty() {
            return forward();
        }
        let n_choices: usize = self.asked.iter().map(|asked| asked.outputs.len()).sum();
        let n_threads = n_choices.div_ceil(CHOICES_PER_THREAD).min(MAX_THREADS);
        let n_groups = self.asked.len().div_ceil(n_threads);
        thread::scope(|scope| {
            let workers: Vec<_> = self
                .asked
                .chunks_mut(n_groups)
                .filter_map(|asked| {
                    let named = thread::Builder::new().name("baton-masks".to_owned());
                    named.spawn_scoped(scope, || work_out(asked)).ok()
                })
                .collect();
            let result = forward();
            for worker in workers {
                // Sampling meets the same trouble, where it has a name.
                let _ = worker.join();
            }
            result
        })
    }

    /// Gives every group its constraint back.
    pub(super) fn put_back(self, open: &mut BTreeMap<GroupId, OpenGroup>) {
        for asked in self.asked {
            if let Some(open) = open.get_mut(&asked.group) {
                open.constraint = Some(asked.constraint);
            }
        }
    }
}

fn work_out(asked: &mut [Asked<'_>]) {
    for Asked {
        constraint, outputs, ..
    } in asked
    {
        for &(choice, output) in outputs.iter() {
            let _ = constraint.allowed(choice, output);
        }
    }
}
