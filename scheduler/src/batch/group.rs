//! The choices of a request on one instance: one prefill for all of them, then a sequence for each, whose full blocks of
//! the prompt are shared and whose partial last block is copied. What they sample is not known here.

use super::{BatchScheduler, Sequence, SequenceKind};
use crate::block_pool::{HeldBlock, IsPinned};
use crate::ids::{BlockId, SequenceId, TokenId};
use crate::request::{Finish, PortableState};

/// Identity of a request's choices on their instance, never reused within one incarnation. Choice `c` has the sequence
/// id that is larger by `c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u64);

impl GroupId {
    /// The sequence of a choice, from its first token on.
    pub fn sequence(self, choice: u32) -> SequenceId {
        SequenceId(self.0 + u64::from(choice))
    }
}

/// Which choice of which request a sequence is; the first one stands for all until their first tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The request's choices here.
    pub group: GroupId,
    /// The choice's number.
    pub choice: u32,
}

/// A block to be copied, in all its layers, before anything else is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// The choice that owns the copy.
    pub member: Member,
    /// What to copy.
    pub from: BlockId,
    /// A block of its own, whose contents do not matter.
    pub to: BlockId,
}

/// How one choice goes on after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continued {
    /// The choice.
    pub member: Member,
    /// Its token.
    pub token: TokenId,
    /// Whether that was its last; it is then gone, unless it is handed over.
    pub finish: Option<Finish>,
}

/// What came of a step, or of a join.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// One entry for each token, in the batch's order; the first tokens of a request in the order of its choices.
    pub continued: Vec<Continued>,
    /// To be done in order, at once.
    pub copies: Vec<BlockCopy>,
    /// Choices for whose own block there was no room: they wait, and will recompute.
    pub preempted: Vec<Member>,
    /// Requests to be embedded whose last token was computed; they are gone.
    pub embedded: Vec<GroupId>,
}

impl BatchScheduler {
    /// Puts the choices that go on into `sequences`, one for all of them when none has begun.
    pub(super) fn insert(&mut self, state: &PortableState, kind: SequenceKind) -> GroupId {
        let group = GroupId(self.next_id);
        let n_choices = state.choices.len() as u32;
        self.next_id += u64::from(n_choices);
        if state.is_fresh() {
            let leader = Sequence::new(state, group, 0, n_choices, kind, &self.config);
            self.sequences.insert(group.sequence(0), leader);
            return group;
        }
        for choice in self.config.unfinished(state) {
            let sequence = Sequence::new(state, group, choice, 1, kind, &self.config);
            self.sequences.insert(group.sequence(choice), sequence);
        }
        group
    }

    /// The group's sequences that are still here, in the order of their choices.
    pub fn members(&self, group: GroupId) -> Vec<SequenceId> {
        self.sequences
            .range(group.sequence(0)..)
            .take_while(|(_, sequence)| sequence.group == group)
            .map(|(&id, _)| id)
            .collect()
    }

    /// Which choice a sequence is.
    pub fn member(&self, id: SequenceId) -> Member {
        let sequence = &self.sequences[&id];
        Member {
            group: sequence.group,
            choice: sequence.choice,
        }
    }

    /// Removes all choices of a group, as [`BatchScheduler::remove`].
    pub fn remove_group(&mut self, group: GroupId, is_pinned: IsPinned<'_>) {
        for id in self.members(group) {
            self.remove(id, is_pinned);
        }
    }

    /// Appends the tokens sampled from a sequence's last row: one, or one for each choice it stands for, which from then on
    /// are sequences of their own.
    pub(super) fn append(
        &mut self,
        id: SequenceId,
        tokens: &[TokenId],
        is_pinned: IsPinned<'_>,
        committed: &mut Committed,
    ) {
        let sequence = self.sequences.get_mut(&id).expect("a sampling sequence exists");
        assert_eq!(tokens.len(), sequence.n_choices as usize, "one token for each choice");
        let (group, first_choice, kind) = (sequence.group, sequence.choice, sequence.kind);
        let continued = (first_choice..).zip(tokens).map(|(choice, &token)| Continued {
            member: Member { group, choice },
            token,
            finish: sequence.finish_with(token),
        });
        let continued: Vec<Continued> = continued.collect();
        match kind {
            SequenceKind::PrefillForHandoff => {
                sequence.tokens.push(tokens[0]);
                self.abandon_claims(id);
                self.running.remove(&id);
                self.handing_over.insert(id);
            }
            SequenceKind::Local => {
                sequence.n_choices = 1;
                // The first choice may end here, so the others take their share of its blocks before.
                for other in continued.iter().skip(1).filter(|other| other.finish.is_none()) {
                    self.fork(id, *other, is_pinned, committed);
                }
                let sequence = self.sequences.get_mut(&id).expect("a sampling sequence exists");
                sequence.tokens.push(tokens[0]);
                sequence.release_spare(&mut self.pool, is_pinned);
                if continued[0].finish.is_some() {
                    self.remove(id, is_pinned);
                }
            }
            SequenceKind::Received | SequenceKind::Moved => unreachable!("it is local from its join on"),
            SequenceKind::Embedded => unreachable!("nothing is sampled from it"),
        }
        committed.continued.extend(continued);
    }

    /// Makes a sequence of another choice of the leader's, whose context has just been computed.
    fn fork(
        &mut self,
        leader_id: SequenceId,
        continued: Continued,
        is_pinned: IsPinned<'_>,
        committed: &mut Committed,
    ) {
        let member = continued.member;
        let id = member.group.sequence(member.choice);
        let leader = self.sequences.get_mut(&leader_id).expect("a forking sequence exists");
        let mut sequence = leader.fork(member.choice);
        sequence.tokens.push(continued.token);
        let n_full = leader.n_computed / self.config.block_size;
        let is_partial = !leader.n_computed.is_multiple_of(self.config.block_size);
        let n_groups = self.config.n_groups();
        let mut own: Vec<HeldBlock> = Vec::with_capacity(n_groups);
        while own.len() < n_groups {
            let spare = leader.spare.pop();
            let allocated = || self.cache.allocate(&mut self.pool, is_pinned);
            let Some(block) = spare.or_else(|| is_partial.then(allocated).flatten()) else {
                break;
            };
            own.push(block);
        }
        if is_partial && own.len() < n_groups {
            own.into_iter().for_each(|block| self.pool.release(block, is_pinned));
            sequence.forget_computed();
            self.counters.n_preemptions += 1;
            committed.preempted.push(member);
            self.preempted.insert(id);
        } else {
            for layer_group in 0..n_groups {
                let first = leader.tables.n_released(layer_group);
                sequence.tables.skip(layer_group, first);
                for block in leader.tables.range(layer_group, first..n_full) {
                    sequence.tables.push(layer_group, self.pool.hold(block.id()));
                }
            }
            for (layer_group, own) in own.into_iter().enumerate() {
                if is_partial {
                    let from = leader.tables.get(layer_group, n_full);
                    committed.copies.push(BlockCopy {
                        member,
                        from: from.expect("its last block is in use").id(),
                        to: own.id(),
                    });
                }
                sequence.tables.push(layer_group, own);
            }
            self.running.insert(id);
        }
        self.sequences.insert(id, sequence);
    }
}
