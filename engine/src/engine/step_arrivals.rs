//! What the step loop does for requests that come from another instance, between two steps: reserve, grant, join.

use baton_kernels::KernelError;
use baton_scheduler::batch::{GroupId, LayerGroupGrant, Numerics, RELEASED_BLOCK, ReserveOutcome};
use baton_scheduler::ids::TokenId;
use baton_scheduler::request::{ChoiceState, Failure, Finish, PortableState, Token};

use super::command::{Arrived, Granted, Purpose};
use super::handoff::{ReservedBlocks, ReservedChoice};
use super::open_group::{OpenGroup, Told, Waiter};
use super::step_loop::{StepLoop, is_pinned};
use crate::forward::ForwardPass;

impl<F: ForwardPass> StepLoop<F> {
    pub(super) fn reserve(&mut self, state: &PortableState, purpose: &Purpose, mut open: OpenGroup) {
        let now = self.shared.now();
        let kv = self.forward.kv_cache();
        let outcome = match purpose {
            Purpose::Handoff => self.scheduler.reserve(now, state, &is_pinned(kv)),
            Purpose::Move(room) => self
                .scheduler
                .reserve_moved(state, room, &is_pinned(kv))
                .map(ReserveOutcome::Granted),
        };
        match outcome {
            Ok(ReserveOutcome::Granted(group)) => {
                self.open.insert(group, open);
                self.answer_reservation(group);
            }
            Ok(ReserveOutcome::Deferred(group)) => {
                self.open.insert(group, open);
            }
            Err(failure) => {
                self.counters.n_failed += 1;
                open.tell_failed(failure);
            }
        }
    }

    pub(super) fn answer_reservation(&mut self, group: GroupId) {
        self.publish_allocated();
        let waiter = self.open.get_mut(&group).and_then(|open| open.waiter.take());
        let Waiter { reply, purpose } = waiter.expect("a reservation is answered once");
        let n_choices = self.open[&group].choices.len() as u32;
        let grants = match purpose {
            Purpose::Handoff => vec![self.scheduler.grant(group)],
            Purpose::Move(_) => self.scheduler.grants_moved(group, n_choices),
        };
        let kv = self.forward.kv_cache();
        let mut reserve = |group: LayerGroupGrant| {
            let blocks: Vec<u32> = group.blocks.iter().map(|(block, _)| block.0).collect();
            Ok(ReservedBlocks {
                n_blocks_held: group.n_blocks_held,
                writers: kv.reserve_write(&blocks)?,
                grant: group.blocks,
            })
        };
        let choices = grants.into_iter().map(|grant| {
            let layer_groups = grant.layer_groups.into_iter().map(&mut reserve);
            Ok(ReservedChoice {
                n_blocks_total: grant.n_blocks_total,
                layer_groups: layer_groups.collect::<Result<_, KernelError>>()?,
            })
        });
        match choices.collect::<Result<Vec<_>, KernelError>>() {
            Ok(choices) => {
                // When the answer is not taken, its events channel is closed too, and it is reaped.
                let _ = reply.send(Ok(Granted { group, choices }));
            }
            Err(error) => {
                let failure = Failure::Internal(format!("writing reserved blocks: {error}"));
                let _ = reply.send(Err(failure.clone()));
                self.fail(group, failure);
            }
        }
    }

    pub(super) fn join(&mut self, group: GroupId, arrived: Arrived, numerics: Numerics) {
        let Some(open) = self.open.get_mut(&group) else { return };
        let n_vocab = self.forward.vocab_size();
        let members = self.scheduler.members(group);
        let is_move = self.scheduler.is_moved(group);
        let checked = match &arrived {
            Arrived::First(_) if is_move => Err("first tokens have come for a request that is moved".to_owned()),
            Arrived::Outputs(_) if !is_move => Err("outputs have come for a request that is handed over".to_owned()),
            Arrived::First(first) => open.check_first(first, n_vocab),
            Arrived::Outputs(outputs) => open.check_outputs(outputs, n_vocab),
        };
        open.note_arrival();
        if let Err(message) = checked {
            return self.fail(group, Failure::Internal(message));
        }
        let kv = self.forward.kv_cache();
        let mut blocks = members.iter().flat_map(|&id| self.scheduler.block_tables(id)).flatten();
        if let Some(block) = blocks.find(|&&block| block != RELEASED_BLOCK && kv.is_writing(block)) {
            let message = format!("block {block} is still being written at the join");
            return self.fail(group, Failure::Internal(message));
        }
        match arrived {
            Arrived::First(first) => self.join_handed_over(group, first, numerics),
            Arrived::Outputs(outputs) => self.join_moved(group, outputs, numerics),
        }
    }

    fn join_handed_over(&mut self, group: GroupId, first: Vec<Token>, numerics: Numerics) {
        self.counters.n_joined += 1;
        let ids: Vec<TokenId> = first.iter().map(|token| token.id).collect();
        let committed = self
            .scheduler
            .join(group, &ids, numerics, &is_pinned(self.forward.kv_cache()));
        if !self.make_forks(&committed) {
            return;
        }
        let open = self.open.get_mut(&group).expect("a joining request is open");
        for (choice, token) in open.choices.iter_mut().zip(first) {
            choice.output.push(token);
        }
        let ends = committed
            .continued
            .iter()
            .filter_map(|it| Some((it.member.choice, it.finish?)));
        self.tell_ends_of_arrived(group, ends.collect());
    }

    fn join_moved(&mut self, group: GroupId, outputs: Vec<ChoiceState>, numerics: Numerics) {
        let joined = self
            .scheduler
            .join_moved(group, &outputs, numerics, &is_pinned(self.forward.kv_cache()));
        if let Err(failure) = joined {
            return self.fail(group, failure);
        }
        self.counters.n_joined += 1;
        let open = self.open.get_mut(&group).expect("a joining request is open");
        let mut ends = Vec::new();
        for (number, (known, arrived)) in (0..).zip(open.choices.iter_mut().zip(outputs)) {
            if let (None, Some(finish)) = (known.finish, arrived.finish) {
                ends.push((number, finish));
            }
            known.output = arrived.output;
        }
        self.tell_ends_of_arrived(group, ends);
    }

    /// What came with a joining request has been told elsewhere, but not here that it was the last.
    fn tell_ends_of_arrived(&mut self, group: GroupId, ends: Vec<(u32, Finish)>) {
        let open = self.open.get_mut(&group).expect("a joining request is open");
        for (choice, finish) in ends {
            if open.tell_finished(choice, finish) == Told::All {
                self.counters.n_finished += 1;
                self.open.remove(&group);
                return;
            }
        }
    }
}
