//! Groups that arrive or leave: reservations, joins, pinned stages, and what becomes of a move that was given up.

use super::{Arrived, OpenGroup, Owner, Stage};
use crate::batch::{Committed, Grant, GroupId, MoveRoom, Numerics, ReserveOutcome};
use crate::ids::{BlockId, TokenId};
use crate::request::{ChoiceState, Failure, Finish, PortableState};
use crate::simulation::Simulation;

impl Simulation<'_> {
    pub(super) fn reserve(&mut self, i: usize, task: u64, state: &PortableState, slack: Option<usize>) {
        let owner = Owner::Task(task);
        if !self.has_owner(i, owner) {
            return;
        }
        let open = self.open_group(owner, state, &[], slack);
        let engine = &mut self.instances[i].engine;
        let memory = &engine.memory;
        let is_pinned = |block: BlockId| memory.is_pinned(block);
        let outcome = match slack {
            None => engine.scheduler.reserve(self.now, state, &is_pinned),
            Some(slack) => {
                let granted = engine
                    .scheduler
                    .reserve_moved(state, &MoveRoom::slack(slack), &is_pinned);
                granted.map(ReserveOutcome::Granted)
            }
        };
        match outcome {
            Ok(ReserveOutcome::Granted(group)) => {
                engine.open.insert(group, open);
                self.answer_reservation(i, group);
            }
            Ok(ReserveOutcome::Deferred(group)) => {
                engine.open.insert(group, open);
                self.owner_runs_as(i, owner, group);
            }
            Err(failure) => {
                self.feel_no_room(i);
                self.owner_hears_failure(i, owner, failure);
            }
        }
    }

    pub(super) fn answer_reservation(&mut self, i: usize, group: GroupId) {
        self.publish_allocated(i);
        let engine = &mut self.instances[i].engine;
        let open = &engine.open[&group];
        let (owner, n_choices) = (open.owner, open.choices.len() as u32);
        let grants: Vec<Grant> = match open.slack {
            None => vec![engine.scheduler.grant(group)],
            Some(_) => engine.scheduler.grants_moved(group, n_choices),
        };
        for (block, generation) in grants.iter().flat_map(Grant::blocks) {
            assert_eq!(
                engine.memory.generation(block),
                generation,
                "a grant of an older generation"
            );
            engine.memory.begin_write(block);
        }
        let Owner::Task(task) = owner else {
            unreachable!("prefills reserve nothing")
        };
        if self.has_owner(i, owner) {
            self.owner_runs_as(i, owner, group);
            self.task_reserved(i, task, grants);
        } else {
            let engine = &mut self.instances[i].engine;
            for (block, _) in grants.iter().flat_map(Grant::blocks) {
                engine.memory.end_write(block);
            }
            engine.open.get_mut(&group).expect("just answered").is_abandoned = true;
        }
    }

    pub(super) fn engine_joins(&mut self, i: usize, group: GroupId, arrived: Arrived, numerics: Numerics) {
        let engine = &mut self.instances[i].engine;
        if engine.open.get(&group).is_none_or(|open| open.is_abandoned) {
            return;
        }
        let memory = &engine.memory;
        let is_pinned = |block: BlockId| memory.is_pinned(block);
        let mut ends: Vec<(u32, Finish)> = Vec::new();
        match arrived {
            Arrived::First(first) => {
                let ids: Vec<TokenId> = first.iter().map(|token| token.id).collect();
                let committed = engine.scheduler.join(group, &ids, numerics, &is_pinned);
                let open = engine.open.get_mut(&group).expect("checked above");
                for (choice, token) in open.choices.iter_mut().zip(first) {
                    choice.output.push(token);
                }
                let continued = committed.continued.iter();
                ends.extend(continued.filter_map(|it| Some((it.member.choice, it.finish?))));
                self.make_forks(i, &committed);
            }
            Arrived::Outputs(outputs) => {
                if let Err(failure) = engine.scheduler.join_moved(group, &outputs, numerics, &is_pinned) {
                    return self.fail_group(i, group, failure);
                }
                let open = engine.open.get_mut(&group).expect("checked above");
                for (number, (known, arrived)) in (0..).zip(open.choices.iter_mut().zip(outputs)) {
                    if let (None, Some(finish)) = (known.finish, arrived.finish) {
                        ends.push((number, finish));
                    }
                    known.output = arrived.output;
                }
            }
        }
        for (choice, finish) in ends {
            self.group_choice_finished(i, group, choice, finish);
        }
    }

    pub(super) fn resume_abandoned(&mut self, i: usize) {
        let instance = &self.instances[i];
        let gone = instance.engine.open.iter().filter_map(|(&group, open)| {
            let mover = open.mover.and_then(|mover| instance.movers.get(&mover));
            let has_gone = open.mover.is_some() && mover.is_none_or(|mover| !mover.has_right);
            has_gone.then_some(group)
        });
        for group in Vec::from_iter(gone) {
            self.resume_group(i, group);
        }
    }

    fn resume_group(&mut self, i: usize, group: GroupId) {
        let engine = &mut self.instances[i].engine;
        engine.open.get_mut(&group).expect("an open group").mover = None;
        let memory = &engine.memory;
        let resumed = engine.scheduler.resume(group, &|block| memory.is_pinned(block));
        self.make_forks(
            i,
            &Committed {
                copies: resumed.copies,
                preempted: resumed.preempted,
                ..Committed::default()
            },
        );
    }

    pub(super) fn start_move(&mut self, i: usize, transfer: usize) {
        let Some(mover) = self.instances[i].movers.get(&transfer) else {
            return;
        };
        let request = mover.request;
        self.resume_abandoned(i);
        let engine = &mut self.instances[i].engine;
        let is_meant = |open: &OpenGroup| open.request == request && matches!(open.owner, Owner::Task(_));
        let mut found = engine.open.iter_mut().rev().filter(|(_, open)| is_meant(open));
        let answer = match found.next() {
            None => Err(Failure::Busy("the request does not run here".to_owned())),
            Some((_, open)) if open.mover.is_some() => Err(Failure::Busy("a move of it is under way".to_owned())),
            Some((&group, open)) => engine.scheduler.check_movable(group).map(|()| {
                open.mover = Some(transfer);
                group
            }),
        };
        self.mover_started(i, transfer, answer);
    }

    pub(super) fn pin(
        &mut self,
        i: usize,
        transfer: usize,
        group: GroupId,
        from: &[Vec<u32>],
        pauses: bool,
    ) -> Result<(Stage, Vec<ChoiceState>), Failure> {
        let instance = &mut self.instances[i];
        let engine = &mut instance.engine;
        let busy = |message: &str| Err(Failure::Busy(message.to_owned()));
        let Some(open) = engine.open.get(&group) else {
            return busy("the request has ended");
        };
        let has_right = instance.movers.get(&transfer).is_some_and(|mover| mover.has_right);
        if open.mover != Some(transfer) || !has_right {
            return busy("another move is under way");
        }
        engine.scheduler.check_movable(group)?;
        let members = engine.scheduler.members(group);
        let n_prompt_blocks = engine.scheduler.n_prompt(members[0]) / engine.memory.block_size;
        let mut stage = Stage::default();
        for (choice, firsts) in (0..).zip(from) {
            let id = group.sequence(choice);
            let is_here = engine.scheduler.phase(id).is_some();
            let mut ends = Vec::new();
            let mut blocks = Vec::new();
            for (layer_group, &first) in firsts.iter().enumerate() {
                let first = first as usize;
                let table = if is_here { id } else { members[0] };
                let table = engine.scheduler.computed_blocks(table, layer_group);
                let end = match pauses {
                    _ if !is_here => n_prompt_blocks.max(first),
                    false => engine.scheduler.n_computed(id) / engine.memory.block_size,
                    true => table.end(),
                };
                if first > table.end().max(end) {
                    return Err(Failure::Invalid(format!(
                        "choice {choice} is asked for from block {first} on"
                    )));
                }
                let end = end.max(first);
                let Some(found) = table.get(first..end).map(<[_]>::to_vec) else {
                    return busy("blocks that are asked for were given up");
                };
                ends.push(end as u32);
                blocks.push(found);
            }
            stage.ends.push(ends.into_iter().min().expect("a layer group"));
            stage.blocks.push(blocks);
        }
        // Once it is known that nothing is refused.
        for (layer_group, blocks) in stage.blocks.iter().flat_map(|choice| choice.iter().enumerate()) {
            engine.memory.pin_in_layers(layer_group, blocks);
        }
        if pauses {
            engine.scheduler.pause(group).expect("checked to be movable");
        }
        Ok((stage, engine.open[&group].choices.clone()))
    }
}
