//! Running groups that go to another instance or come from one: pause and resume, and reservations that join with all
//! their tokens. When to pause, and how the KV travels, is decided elsewhere.

use super::reservation::{Grant, LayerGroupGrant};
use super::{BatchScheduler, BlockCopy, GroupId, Member, Numerics, PrefixCaching, SequenceKind};
use crate::block_pool::{HeldBlock, IsPinned};
use crate::ids::{BlockId, SequenceId};
use crate::request::{ChoiceState, Failure, PortableState};

/// Room for a request that is moved here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MoveRoom {
    /// Tokens of each choice that its source has generated beyond those known here; choices that are not listed have none.
    pub n_ahead: Vec<usize>,
    /// Blocks of each choice for what it generates until it comes.
    pub n_slack_blocks: usize,
}

impl MoveRoom {
    /// Of a source that is where we know it to be.
    pub fn slack(n_slack_blocks: usize) -> MoveRoom {
        MoveRoom {
            n_ahead: Vec::new(),
            n_slack_blocks,
        }
    }
}

/// What came of a resumption.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// To be done in order, at once.
    pub copies: Vec<BlockCopy>,
    /// Choices whose last block is still read, and for whose own copy there was no room: they will recompute.
    pub preempted: Vec<Member>,
}

impl BatchScheduler {
    /// Whether every choice that goes on has a token and is in each step.
    ///
    /// # Errors
    /// `Busy`, saying what is in the way.
    pub fn check_movable(&self, group: GroupId) -> Result<(), Failure> {
        let busy = |message: &str| Err(Failure::Busy(message.to_owned()));
        let members = self.members(group);
        if members.is_empty() {
            return busy("the request has ended");
        }
        for id in members {
            if self.preempted.contains(&id) {
                return busy("preempted");
            }
            let is_running = self.running.contains(&id) || self.paused.contains(&id);
            if !is_running || !self.sequences[&id].is_decoding() {
                return busy("not every choice is decoding");
            }
        }
        Ok(())
    }

    /// Whether a group keeps the blocks that its queries see no more, because somebody fetches what it has. A choice that is
    /// preempted has given all of them up, and keeps none from then on.
    pub fn keep_unseen(&mut self, group: GroupId, keeps_unseen: bool) {
        for id in self.members(group) {
            let sequence = self.sequences.get_mut(&id).expect("a member exists");
            sequence.keeps_unseen = keeps_unseen;
        }
    }

    /// Takes a group out of the coming steps. It keeps blocks and places, and is no victim of a preemption: only running
    /// sequences are, so that a pool held by paused ones stalls for [`super::BatchConfig::max_stall`] at most before
    /// somebody in line is refused.
    ///
    /// # Errors
    /// As [`BatchScheduler::check_movable`]; nothing is paused then.
    ///
    /// # Panics
    /// If a batch in flight computes one of its choices: what stands still must know what it has.
    pub fn pause(&mut self, group: GroupId) -> Result<(), Failure> {
        self.check_movable(group)?;
        let is_in_flight = |id: &SequenceId| self.sequences[id].n_in_flight > 0;
        assert!(
            !self.members(group).iter().any(is_in_flight),
            "a group is paused while a batch computes it"
        );
        for id in self.members(group) {
            self.running.remove(&id);
            self.paused.insert(id);
        }
        Ok(())
    }

    /// Puts a paused group into the coming steps again. A last block that a transfer still reads cannot be appended to, so
    /// its choice gets a copy. Running groups stay as they are.
    pub fn resume(&mut self, group: GroupId, is_pinned: IsPinned<'_>) -> Resumed {
        let mut resumed = Resumed::default();
        for id in self.members(group) {
            if !self.paused.remove(&id) {
                continue;
            }
            self.running.insert(id);
            let member = self.member(id);
            let sequence = self.sequences.get_mut(&id).expect("a paused sequence exists");
            let block_idx = sequence.n_computed / self.config.block_size;
            let read: Vec<(usize, BlockId)> = (0..self.config.n_groups())
                .filter_map(|layer_group| Some((layer_group, sequence.tables.get(layer_group, block_idx)?.id())))
                .filter(|&(_, block)| is_pinned(block))
                .collect();
            let own: Vec<HeldBlock> = read
                .iter()
                .map_while(|_| self.cache.allocate(&mut self.pool, is_pinned))
                .collect();
            if own.len() < read.len() {
                own.into_iter().for_each(|block| self.pool.release(block, is_pinned));
                self.give_blocks_up(id, is_pinned);
                resumed.preempted.push(member);
                continue;
            }
            for ((layer_group, from), block) in read.into_iter().zip(own) {
                let to = block.id();
                let read = sequence.tables.replace(layer_group, block_idx, block);
                self.pool.release(read, is_pinned);
                resumed.copies.push(BlockCopy { member, from, to });
            }
        }
        resumed
    }

    /// Reserves blocks for a request that runs elsewhere and comes with its KV: of each choice that goes on those before
    /// the last token that its source has, as far as the prefix cache lacks them, and the room's slack for what it generates
    /// meanwhile.
    /// The prompt's full blocks are shared: the first choice that goes on receives them for the others.
    ///
    /// # Errors
    /// `Invalid` when it can never run or a choice has no token yet, `Busy` when there is no room now.
    pub fn reserve_moved(
        &mut self,
        state: &PortableState,
        room: &MoveRoom,
        is_pinned: IsPinned<'_>,
    ) -> Result<GroupId, Failure> {
        self.config.check(state)?;
        self.config.check_unfinished(state)?;
        let unfinished = Vec::from_iter(self.config.unfinished(state));
        let begins = |choice: &&u32| state.choices[**choice as usize].output.is_empty();
        if let Some(choice) = unfinished.iter().find(begins) {
            return Err(Failure::Invalid(format!(
                "choice {choice} has no token yet, expected at least 1 for a move"
            )));
        }
        self.check_places(unfinished.len())?;
        self.pool.sweep(is_pinned);
        let group = self.insert(state, SequenceKind::Moved);
        let members = self.members(group);
        let shortest = members.iter().map(|id| self.n_kv_tokens_at_source(*id, room)).min();
        let firsts: Vec<usize> = (0..self.config.n_groups())
            .map(|layer_group| self.config.n_unseen_blocks(layer_group, shortest.unwrap_or(0)))
            .collect();
        for &id in &members {
            if !self.allocate_moved(id, members[0], &firsts, room, is_pinned) {
                return Err(self.refuse_reservation(group, is_pinned));
            }
        }
        self.reserved.extend(members);
        Ok(group)
    }

    /// Whether a group is a reservation for a move.
    pub fn is_moved(&self, group: GroupId) -> bool {
        let mut members = self.sequences.range(group.sequence(0)..);
        members
            .next()
            .is_some_and(|(_, sequence)| sequence.group == group && sequence.kind == SequenceKind::Moved)
    }

    /// What each choice of a granted reservation for a move has, `[n]`. A choice that had ended counts as holding the
    /// prompt, so that nothing is owed of it.
    pub fn grants_moved(&self, group: GroupId, n: u32) -> Vec<Grant> {
        let n_prompt_blocks = self
            .members(group)
            .first()
            .map_or(0, |id| self.n_prompt(*id) / self.config.block_size);
        let grant = |choice: u32| match self.sequences.get(&group.sequence(choice)) {
            Some(sequence) => self.grant_of(sequence, sequence.tables.len(0)),
            None => Grant {
                n_blocks_total: n_prompt_blocks,
                layer_groups: vec![
                    LayerGroupGrant {
                        n_blocks_held: n_prompt_blocks,
                        blocks: Vec::new(),
                    };
                    self.config.n_groups()
                ],
            },
        };
        (0..n).map(grant).collect()
    }

    /// A moved request's KV and all that it has generated have come: its choices go on after their last tokens. Those that
    /// have ended meanwhile are freed.
    ///
    /// # Errors
    /// `InstanceLost` when the outputs cannot be what the KV was computed from. The reservation stays.
    ///
    /// # Panics
    /// If it is not a granted reservation for a move.
    pub fn join_moved(
        &mut self,
        group: GroupId,
        outputs: &[ChoiceState],
        numerics: Numerics,
        is_pinned: IsPinned<'_>,
    ) -> Result<(), Failure> {
        let members = self.members(group);
        for &id in &members {
            self.check_outputs(id, outputs).map_err(Failure::InstanceLost)?;
        }
        members.iter().for_each(|&id| self.receive(id));
        for &id in &members {
            let sequence = self.sequences.get_mut(&id).expect("a member exists");
            let choice = &outputs[sequence.choice as usize];
            if choice.finish.is_some() {
                self.remove(id, is_pinned);
                continue;
            }
            sequence.tokens.truncate(sequence.n_prompt);
            sequence.tokens.extend(choice.output.iter().map(|token| token.id));
            sequence.n_computed = sequence.tokens.len() - 1;
            sequence.numerics = numerics;
            self.register_full_blocks(id, is_pinned);
        }
        Ok(())
    }

    fn check_outputs(&self, id: SequenceId, outputs: &[ChoiceState]) -> Result<(), String> {
        let sequence = &self.sequences[&id];
        let choice = sequence.choice;
        let Some(ChoiceState { output, finish }) = outputs.get(choice as usize) else {
            return Err(format!(
                "{} choices have come, expected more than {choice}",
                outputs.len()
            ));
        };
        let known = &sequence.tokens[sequence.n_prompt..];
        let is_continued = output.len() >= known.len() && output.iter().zip(known).all(|(token, &id)| token.id == id);
        if !is_continued {
            let n_known = known.len();
            return Err(format!("choice {choice} does not continue the {n_known} tokens known"));
        }
        if finish.is_some() {
            return Ok(());
        }
        let n_tokens = sequence.n_prompt + output.len();
        let lacks_seen = |layer_group: usize| {
            sequence.tables.n_released(layer_group) > self.config.n_unseen_blocks(layer_group, n_tokens - 1)
        };
        if (0..self.config.n_groups()).any(lacks_seen) {
            return Err(format!("choice {choice} is not as far as its source said"));
        }
        let n_room = sequence.tables.len(0);
        if self.config.blocks_for(n_tokens - 1) > n_room {
            return Err(format!("choice {choice} has outgrown its {n_room} blocks"));
        }
        if n_tokens > sequence.max_kv_tokens() {
            return Err(format!("choice {choice} goes on after {} tokens", output.len()));
        }
        Ok(())
    }

    /// Tokens of a choice whose KV its source has; it may have no more of them than of any request.
    fn n_kv_tokens_at_source(&self, id: SequenceId, room: &MoveRoom) -> usize {
        let sequence = &self.sequences[&id];
        let n_ahead = room.n_ahead.get(sequence.choice as usize).copied().unwrap_or(0);
        let n_known = sequence.tokens.len() - 1;
        n_known
            .saturating_add(n_ahead)
            .min(sequence.max_kv_tokens())
            .max(n_known)
    }

    /// Gives a choice its blocks, from the prefix cache or from the first choice as far as they go, but for those that none of
    /// the group's queries will see: `firsts` has the first seen block of each layer group. False when there is no room.
    fn allocate_moved(
        &mut self,
        id: SequenceId,
        first: SequenceId,
        firsts: &[usize],
        room: &MoveRoom,
        is_pinned: IsPinned<'_>,
    ) -> bool {
        let n_at_source = self.n_kv_tokens_at_source(id, room);
        let n_headroom = self.n_headroom();
        let block_size = self.config.block_size;
        // Blocks of the prompt that are there without being sent, because the first choice receives them.
        let n_shared = match id == first {
            true => 0,
            false => self.sequences[&id].n_prompt / block_size,
        };
        let sequence = self.sequences.get_mut(&id).expect("a member exists");
        let n_kv_tokens = sequence.tokens.len() - 1;
        let mut n_hit = 0;
        if self.config.prefix_caching == PrefixCaching::On {
            self.hasher.extend(sequence.salt, &sequence.tokens, &mut sequence.keys);
            let keys = &sequence.keys[..n_kv_tokens / block_size];
            n_hit = self
                .cache
                .lookup(keys, &sequence.tokens, block_size, |layer_group, _| firsts[layer_group]);
            let n_found = n_hit.saturating_sub(*firsts.iter().min().expect("a layer group"));
            self.counters.n_prefix_query_tokens += n_kv_tokens as u64;
            self.counters.n_prefix_hit_tokens += (n_found * block_size) as u64;
        }
        // The shared ones are hits too as far as there are any, so the longer beginning contains the other.
        if n_hit >= n_shared {
            self.hold_hits(id, firsts, n_hit);
        } else {
            n_hit = 0;
            self.hold_shared(id, first, firsts, n_shared);
        }
        let sequence = self.sequences.get_mut(&id).expect("a member exists");
        sequence.n_registered = n_hit;
        sequence.n_held_blocks = firsts.iter().map(|&first| first.max(n_hit).max(n_shared)).collect();
        let n_context = self.config.blocks_for(n_at_source);
        let n_most = self.config.blocks_for(sequence.max_kv_tokens());
        let n_total = (n_context + room.n_slack_blocks).min(n_most).max(n_context);
        let ends = vec![n_total; firsts.len()];
        let has_room = self.pool.n_available() >= sequence.n_missing(&ends) + n_headroom;
        has_room && self.fill_tables(id, &ends, 0, is_pinned)
    }

    /// Begins the tables of a choice with the first choice's blocks before `n_shared`.
    fn hold_shared(&mut self, id: SequenceId, first: SequenceId, firsts: &[usize], n_shared: usize) {
        for (layer_group, &first_block) in firsts.iter().enumerate() {
            let end = n_shared.max(first_block);
            let shared = self.sequences[&first]
                .tables
                .range(layer_group, first_block..end)
                .iter();
            let shared: Vec<HeldBlock> = shared.map(|block| self.pool.hold(block.id())).collect();
            let tables = &mut self.sequences.get_mut(&id).expect("a member exists").tables;
            tables.skip(layer_group, first_block);
            shared.into_iter().for_each(|block| tables.push(layer_group, block));
        }
    }
}
