//! What the step loop does for requests that move away, between two steps: pin, pause, resume.

use std::sync::Weak;
use std::time::Instant;

use baton_kernels::KvRead;
use baton_scheduler::batch::{Committed, GroupId, Resumed};
use baton_scheduler::ids::RequestId;
use baton_scheduler::request::Failure;

use super::command::StartedMove;
use super::moving::{GroupBlocks, MoveStage, PausedMove, StageBlocks};
use super::open_group::{Hold, OpenGroup, Outlet};
use super::step_loop::{StepLoop, is_pinned};
use crate::forward::ForwardPass;

/// Which of a choice's blocks are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    Full,
    Whole,
}

impl<F: ForwardPass> StepLoop<F> {
    /// How many tokens each choice has. While the holder lives they generate at most `n_tokens` more, and give up nothing
    /// that they have; a mover that is there already knows better how far they may go.
    pub(super) fn hold(
        &mut self,
        request: RequestId,
        n_tokens: usize,
        holder: Weak<()>,
    ) -> Result<Vec<usize>, Failure> {
        let group = self.running(request)?;
        let open = &self.open[&group];
        let standing: Vec<usize> = open.choices.iter().map(|choice| choice.output.len()).collect();
        if !open.is_moving() && self.scheduler.check_movable(group).is_ok() {
            let n_most_tokens = standing.iter().map(|n| n.saturating_add(n_tokens)).collect();
            self.set_hold(group, Hold::new(holder, n_most_tokens));
        }
        Ok(standing)
    }

    fn set_hold(&mut self, group: GroupId, hold: Hold) {
        let open = self.open.get_mut(&group).expect("what is held is open");
        let before = open.hold.replace(hold);
        self.scheduler.keep_unseen(group, true);
        if before.is_some_and(|before| before.stopped_at.is_some()) {
            self.resume(group);
        }
    }

    /// Groups go no further than their holders have room for, and those go on whose holders have gone or take too long.
    pub(super) fn hold_back(&mut self) {
        for group in self.held_groups(|_, hold| hold.is_over()) {
            let open = self.open.get_mut(&group).expect("what is held is open");
            let hold = open.hold.take().expect("it is held");
            self.scheduler.keep_unseen(group, false);
            if hold.stopped_at.is_some() {
                self.resume(group);
            }
        }
        let is_at_its_end = |open: &OpenGroup, hold: &Hold| hold.stopped_at.is_none() && hold.is_reached(&open.choices);
        let mut at_their_end = self.held_groups(is_at_its_end);
        at_their_end.retain(|group| self.scheduler.check_movable(*group).is_ok());
        if at_their_end.is_empty() {
            return;
        }
        self.settle();
        for group in at_their_end {
            // Collecting the steps in flight may have ended or preempted it.
            if let Some(hold) = self.open.get_mut(&group).and_then(|open| open.hold.as_mut())
                && self.scheduler.pause(group).is_ok()
            {
                hold.stopped_at = Some(Instant::now());
                self.counters.n_held_back += 1;
            }
        }
    }

    fn held_groups(&self, is_meant: impl Fn(&OpenGroup, &Hold) -> bool) -> Vec<GroupId> {
        let held = self.open.iter();
        let held = held.filter(|(_, open)| open.hold.as_ref().is_some_and(|hold| is_meant(open, hold)));
        held.map(|(&group, _)| group).collect()
    }

    /// The group of a request that generates here. Of several attempts at one request the youngest is the one that is meant.
    fn running(&self, request: RequestId) -> Result<GroupId, Failure> {
        let is_meant = |open: &OpenGroup| open.request == request && matches!(open.outlet, Outlet::Generation(_));
        let found = self.open.iter().rev().find(|(_, open)| is_meant(open));
        found
            .map(|(&group, _)| group)
            .ok_or_else(|| Failure::Busy(format!("request {request} does not run here")))
    }

    pub(super) fn start_move(
        &mut self,
        request: RequestId,
        room: &[usize],
        mover: Weak<()>,
    ) -> Result<StartedMove, Failure> {
        let busy = |message: String| Err(Failure::Busy(message));
        // Or else a group that the mover before this one paused would stand still until this one has gone.
        self.resume_abandoned();
        let group = self.running(request)?;
        let open = self.open.get_mut(&group).expect("it was just found");
        if open.is_moving() {
            return busy(format!("a move of request {request} is under way"));
        }
        self.scheduler.check_movable(group)?;
        open.mover = Some(mover.clone());
        let n_choices = open.choices.len();
        // The last token needs no room, and a step in flight samples one more.
        let block_size = self.scheduler.config().block_size;
        let n_most = |n_blocks: &usize| (n_blocks * block_size).saturating_sub(open.n_prompt);
        let n_most_tokens = room.iter().map(n_most).collect();
        self.set_hold(group, Hold::new(mover, n_most_tokens));
        Ok(StartedMove { group, n_choices })
    }

    /// Whether this mover lives and is the one that moves the group.
    pub(super) fn is_moved_by(&self, group: GroupId, mover: &Weak<()>) -> bool {
        let open = self.open.get(&group);
        open.is_some_and(|open| open.is_moving() && open.mover.as_ref().is_some_and(|own| own.ptr_eq(mover)))
    }

    pub(super) fn pin_full(
        &mut self,
        group: GroupId,
        mover: &Weak<()>,
        from: &[Vec<u32>],
    ) -> Result<MoveStage, Failure> {
        self.check_move(group, mover, from)?;
        self.pin(group, from, Extent::Full)
    }

    pub(super) fn pause(&mut self, group: GroupId, mover: &Weak<()>, from: &[Vec<u32>]) -> Result<PausedMove, Failure> {
        self.check_move(group, mover, from)?;
        let stage = self.pin(group, from, Extent::Whole)?;
        self.scheduler.pause(group)?;
        self.counters.n_paused += 1;
        self.scheduler.keep_unseen(group, false);
        let open = self.open.get_mut(&group).expect("a group that is moved is open");
        // When it goes on is the mover's decision from now on.
        open.hold = None;
        Ok(PausedMove {
            stage,
            outputs: open.choices.clone(),
        })
    }

    pub(super) fn resume(&mut self, group: GroupId) {
        if let Some(hold) = self.open.get_mut(&group).and_then(|open| open.hold.as_mut()) {
            hold.stopped_at = None;
        }
        let Resumed { copies, preempted } = self.scheduler.resume(group, &is_pinned(self.forward.kv_cache()));
        self.make_forks(&Committed {
            copies,
            preempted,
            ..Committed::default()
        });
    }

    /// A paused group whose mover has gone goes on.
    pub(super) fn resume_abandoned(&mut self) {
        let has_gone = |group: &GroupId, open: &mut OpenGroup| {
            let has_gone = open.mover.is_some() && !open.is_moving();
            if has_gone {
                open.mover = None;
            }
            has_gone.then_some(*group)
        };
        let gone: Vec<GroupId> = self
            .open
            .iter_mut()
            .filter_map(|(group, open)| has_gone(group, open))
            .collect();
        for group in gone {
            self.resume(group);
        }
    }

    fn check_move(&self, group: GroupId, mover: &Weak<()>, from: &[Vec<u32>]) -> Result<(), Failure> {
        let Some(open) = self.open.get(&group) else {
            return Err(Failure::Busy("the request has ended".to_owned()));
        };
        if !self.is_moved_by(group, mover) {
            return Err(Failure::Busy("another move is under way".to_owned()));
        }
        if from.len() != open.choices.len() {
            let n_choices = open.choices.len();
            return Err(Failure::Invalid(format!(
                "{} first blocks, expected {n_choices}",
                from.len()
            )));
        }
        let n_groups = self.layer_groups.n_groups();
        if let Some(firsts) = from.iter().find(|firsts| firsts.len() != n_groups) {
            let n_firsts = firsts.len();
            return Err(Failure::Invalid(format!(
                "first blocks of {n_firsts} layer groups, expected {n_groups}"
            )));
        }
        self.scheduler.check_movable(group)
    }

    /// Pins of each choice its blocks from `from` on, in every layer.
    fn pin(&mut self, group: GroupId, from: &[Vec<u32>], extent: Extent) -> Result<MoveStage, Failure> {
        let block_size = self.scheduler.config().block_size;
        let members = self.scheduler.members(group);
        let any = *members.first().expect("a movable group has a member");
        let n_prompt_blocks = self.scheduler.n_prompt(any) / block_size;
        let mut choices = Vec::with_capacity(from.len());
        for (choice, firsts) in (0..).zip(from) {
            let id = group.sequence(choice);
            let is_here = self.scheduler.phase(id).is_some();
            let mut layer_groups = Vec::with_capacity(firsts.len());
            for (layer_group, &first) in firsts.iter().enumerate() {
                let first = first as usize;
                // Of a choice that has ended, another one's copy of the prompt: they are the same tokens.
                let table = if is_here { id } else { any };
                let table = self.scheduler.computed_blocks(table, layer_group);
                let end = match extent {
                    _ if !is_here => n_prompt_blocks.max(first),
                    Extent::Full => self.scheduler.n_computed(id) / block_size,
                    Extent::Whole => table.end(),
                };
                if first > table.end().max(end) {
                    return Err(Failure::Invalid(format!(
                        "choice {choice} is asked for from block {first} on, expected at most {end}"
                    )));
                }
                let end = end.max(first);
                let Some(ids) = table.get(first..end).map(<[_]>::to_vec) else {
                    return Err(Failure::Busy(format!(
                        "choice {choice} is asked for from block {first} on, and has given up those before {}",
                        table.first
                    )));
                };
                layer_groups.push(GroupBlocks {
                    blocks: first..end,
                    ids,
                });
            }
            let ends = layer_groups.iter().map(|group| group.blocks.end);
            choices.push(StageBlocks {
                end: ends.min().expect("a model has a layer group"),
                reads: self.pin_blocks(&layer_groups),
                layer_groups,
            });
        }
        Ok(MoveStage { choices })
    }

    fn pin_blocks(&mut self, layer_groups: &[GroupBlocks]) -> Vec<Vec<KvRead>> {
        let kv = self.forward.kv_cache();
        let places = self.layer_groups.places().iter();
        places
            .map(|place| {
                let ids = &layer_groups[place.layer_group].ids;
                ids.iter().map(|(block, _)| kv.pin(place.slot, block.0)).collect()
            })
            .collect()
    }
}
