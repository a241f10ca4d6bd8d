//! The sending end of a migration: full blocks in stages while the group of choices decodes, the rest and the state while
//! it pauses. Who speaks afterwards is the front door's decision.

use std::collections::VecDeque;

use super::link::Link;
use crate::ids::{Epoch, Nanos};
use crate::request::Failure;
use crate::transfer::{KvRange, TransferPlan};

/// A stage of at most this many blocks for each choice is the last before the pause.
pub const FEW_BLOCKS: u32 = 1;
/// Stages after which the group pauses however much is left: a link slower than the decoding would never catch up.
pub const MAX_STAGES: u32 = 8;
/// Blocks a choice may complete between the answer to a look and the pause.
const PAUSE_MARGIN_BLOCKS: u32 = 2;

/// What the source of a migration learns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MigrationFact {
    /// The answer to [`MigrationAction::PinFull`]: of each choice, the blocks from the asked one up to `end` are full and
    /// pinned in every layer. A finished choice has none.
    Full {
        /// One past the last full block of each choice.
        end: Vec<u32>,
    },
    /// The answer to [`MigrationAction::Pause`]: the group stands still, and the blocks up to `end`, the partial last one
    /// included, are pinned.
    Paused {
        /// One past the last block of each choice's context.
        end: Vec<u32>,
    },
    /// The link took a message off our hands.
    Sent,
    /// The group ended, was preempted, or the engine gave up: it cannot be moved as it was.
    Interrupted(Failure),
    /// The destination closed the stream, or it broke.
    Dropped,
    /// The front door says: go on, in this epoch.
    Resume(Epoch),
    /// The front door closed its stream to us: somebody else speaks for the request, or nobody wants it.
    Gone,
    /// Time has passed.
    Tick,
}

/// Whether a frame waits for the rate limit of background moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pacing {
    /// It does: the group decodes meanwhile.
    Background,
    /// It does not: the client waits.
    Urgent,
}

/// What the source of a migration does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MigrationAction {
    /// Ask the engine which blocks from these on are full, and pin them.
    PinFull {
        /// Of each choice, in each layer group.
        from: Vec<Vec<u32>>,
    },
    /// Tell the front door that the group is about to pause.
    SayMoving,
    /// Ask the engine to pause the group between two steps, and to pin what is left.
    Pause {
        /// First block left, of each choice in each layer group.
        from: Vec<Vec<u32>>,
    },
    /// Send these blocks.
    SendKv(KvRange, Pacing),
    /// Send what the group has generated: the last frame, after which only the front door may let it go on.
    SendState,
    /// Say how many steps the engine has made.
    SendProgress,
    /// Send the typed end and close.
    SendEnd(Option<Failure>),
    /// The group goes on; in the given epoch when the front door named one, else in its own.
    ResumeDecoding(Option<Epoch>),
    /// Tell the front door that the group goes on by itself.
    SayCancelled(Failure),
    /// End the request here: nobody came for it.
    GiveUp(Failure),
    /// Unpin everything; the transfer is over.
    Release,
}

/// Bounds of a migration's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationLimits {
    /// Messages on the link at once.
    pub max_in_flight: u32,
    /// Blocks of a frame.
    pub max_blocks_per_frame: u32,
    /// How long a full link may take nothing.
    pub stall_deadline: Nanos,
    /// How long a paused group waits for a word of its front door.
    pub resume_deadline: Nanos,
    /// Stages before the pause, normally [`MAX_STAGES`]. With none everything is copied while the group stands still.
    pub max_stages: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// The engine looks for full blocks.
    Pinning,
    /// Full blocks are on their way.
    Streaming,
    /// The engine was asked to pause.
    Pausing,
    /// The group stands still; what is left is on its way.
    Paused,
    /// The state is on its way or there; since when.
    HandedOver(Nanos),
    Closed,
}

/// The sending end's state. `Clone + Eq + Hash`, so that a model checker can walk it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MigrationSource {
    plan: TransferPlan,
    limits: MigrationLimits,
    stage: Stage,
    /// Of each choice, in each layer group, the first block that was not pinned yet.
    next_block: Vec<Vec<u32>>,
    queue: VecDeque<KvRange>,
    link: Link,
    n_stages: u32,
    /// Whether the stage on its way is the last before the pause.
    is_last_stage: bool,
    has_sent_end: bool,
}

impl MigrationSource {
    /// The source of a migration to a destination with room as in `plan`, and its first action.
    pub fn new(plan: TransferPlan, limits: MigrationLimits) -> (MigrationSource, Vec<MigrationAction>) {
        plan.check();
        assert!(limits.max_blocks_per_frame > 0, "frames of no blocks");
        let from = plan.firsts();
        let first = if limits.max_stages == 0 {
            vec![
                MigrationAction::SayMoving,
                MigrationAction::Pause { from: from.clone() },
            ]
        } else {
            vec![MigrationAction::PinFull { from: from.clone() }]
        };
        let machine = MigrationSource {
            link: Link::new(limits.max_in_flight, limits.stall_deadline),
            plan,
            limits,
            stage: if limits.max_stages == 0 {
                Stage::Pausing
            } else {
                Stage::Pinning
            },
            next_block: from,
            queue: VecDeque::new(),
            n_stages: 0,
            is_last_stage: false,
            has_sent_end: false,
        };
        (machine, first)
    }

    /// The stage's name, for tables.
    pub fn stage(&self) -> &'static str {
        match self.stage {
            Stage::Pinning => "pinning",
            Stage::Streaming => "streaming",
            Stage::Pausing => "pausing",
            Stage::Paused => "paused",
            Stage::HandedOver(_) => "handed over",
            Stage::Closed => "closed",
        }
    }

    /// Whether nothing is held for the transfer any more.
    pub fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Whether the group stands still, or is about to.
    pub fn is_pausing(&self) -> bool {
        matches!(self.stage, Stage::Pausing | Stage::Paused | Stage::HandedOver(_))
    }

    /// When a tick is due that no heartbeat may miss: the end of a paused group's patience.
    pub fn next_deadline(&self) -> Option<Nanos> {
        match self.stage {
            Stage::HandedOver(since) => Some(since.saturating_add(self.limits.resume_deadline)),
            _ => None,
        }
    }

    /// Takes one fact, returns what to do, in order.
    pub fn apply(&mut self, now: Nanos, fact: MigrationFact) -> Vec<MigrationAction> {
        let mut actions = match (self.stage, fact) {
            (Stage::Closed, _) => return Vec::new(),
            (_, MigrationFact::Gone) => self.close([]),
            (Stage::Pinning, MigrationFact::Full { end }) => self.take_full(&end),
            (Stage::Pausing, MigrationFact::Paused { end }) => self.take_paused(&end),
            // An answer that came too late changes nothing: the stage it belonged to was given up.
            (_, MigrationFact::Full { .. } | MigrationFact::Paused { .. }) => Vec::new(),
            (_, MigrationFact::Sent) => {
                self.link.taken();
                Vec::new()
            }
            (Stage::HandedOver(_), MigrationFact::Dropped) => Vec::new(),
            (Stage::HandedOver(_), MigrationFact::Interrupted(_)) => self.close([]),
            (_, MigrationFact::Resume(epoch)) => self.resume(Some(epoch), None),
            (_, MigrationFact::Dropped) => {
                let failure = Failure::InstanceLost("the destination of the move has gone".into());
                self.resume(None, Some(failure))
            }
            (_, MigrationFact::Interrupted(failure)) => {
                let end = MigrationAction::SendEnd(Some(failure.clone()));
                self.close([end, MigrationAction::SayCancelled(failure)])
            }
            (Stage::HandedOver(since), MigrationFact::Tick) => {
                if now >= since.saturating_add(self.limits.resume_deadline) {
                    let failure = Failure::InstanceLost("a paused request heard nothing from its front door".into());
                    self.close([MigrationAction::GiveUp(failure)])
                } else {
                    Vec::new()
                }
            }
            (_, MigrationFact::Tick) if self.link.is_overdue(now) => {
                let failure = Failure::InstanceLost("the link to the destination takes nothing".into());
                self.resume(None, Some(failure))
            }
            (_, MigrationFact::Tick) => {
                if self.link.is_empty() {
                    self.link.put();
                    vec![MigrationAction::SendProgress]
                } else {
                    Vec::new()
                }
            }
        };
        self.fill_link(now, &mut actions);
        self.link.note_fullness(now);
        actions
    }

    fn take_full(&mut self, end: &[u32]) -> Vec<MigrationAction> {
        if self.has_outgrown(end) {
            return self.resume_outgrown();
        }
        let stage_blocks = self.enqueue(end);
        self.n_stages += 1;
        self.is_last_stage =
            stage_blocks <= FEW_BLOCKS || self.n_stages >= self.limits.max_stages || self.leaves_no_room(end);
        self.stage = Stage::Streaming;
        Vec::new()
    }

    fn take_paused(&mut self, end: &[u32]) -> Vec<MigrationAction> {
        if self.has_outgrown(end) {
            return self.resume_outgrown();
        }
        self.enqueue(end);
        self.stage = Stage::Paused;
        Vec::new()
    }

    /// The destination may have reserved for a state that was long outdated, so a stage can be too much already.
    fn has_outgrown(&self, end: &[u32]) -> bool {
        let mut choices = self.plan.choices.iter().zip(end);
        choices.any(|(choice, &end)| end > choice.n_blocks)
    }

    fn resume_outgrown(&mut self) -> Vec<MigrationAction> {
        let failure = Failure::Busy("the request has outgrown the room reserved for it".into());
        self.resume(None, Some(failure))
    }

    fn leaves_no_room(&self, end: &[u32]) -> bool {
        let mut choices = self.plan.choices.iter().zip(end);
        // One that had ended when the blocks were reserved has no room and needs none.
        choices.any(|(choice, &end)| {
            let has_room = choice.first_blocks.iter().any(|&first| first < choice.n_blocks);
            has_room && end + PAUSE_MARGIN_BLOCKS >= choice.n_blocks
        })
    }

    /// Queues the blocks up to `end`, layer by layer. Returns the most of one choice.
    fn enqueue(&mut self, end: &[u32]) -> u32 {
        assert_eq!(end.len(), self.next_block.len(), "one end for each choice");
        let mut most = 0;
        for (choice, &end) in (0..).zip(end) {
            let next = &mut self.next_block[choice as usize];
            let least = next.iter().copied().min().unwrap_or(0);
            assert!(
                end >= least,
                "choice {choice} has fewer blocks than before: {end} after {least}"
            );
            most = most.max(end - least);
            for (layer, &layer_group) in (0..).zip(&self.plan.layer_groups) {
                let mut first_block = next[layer_group as usize];
                while first_block < end {
                    let n_blocks = (end - first_block).min(self.limits.max_blocks_per_frame);
                    self.queue.push_back(KvRange {
                        choice,
                        layer,
                        first_block,
                        n_blocks,
                    });
                    first_block += n_blocks;
                }
            }
            // Where no query will see anything before `next`, the context has not come so far yet.
            next.iter_mut().for_each(|next| *next = end.max(*next));
        }
        most
    }

    fn fill_link(&mut self, now: Nanos, actions: &mut Vec<MigrationAction>) {
        let pacing = match self.stage {
            Stage::Streaming => Pacing::Background,
            Stage::Paused => Pacing::Urgent,
            Stage::HandedOver(_) if self.link.is_empty() && !self.has_sent_end => {
                self.has_sent_end = true;
                actions.push(MigrationAction::SendEnd(None));
                return;
            }
            Stage::Pinning | Stage::Pausing | Stage::HandedOver(_) | Stage::Closed => return,
        };
        while self.link.has_room() {
            let Some(range) = self.queue.pop_front() else { break };
            self.link.put();
            actions.push(MigrationAction::SendKv(range, pacing));
        }
        if !self.queue.is_empty() {
            return;
        }
        match self.stage {
            // The engine's answer takes up to a step, so it is asked while the last frames travel.
            Stage::Streaming if self.is_last_stage => {
                self.stage = Stage::Pausing;
                let from = self.next_block.clone();
                actions.extend([MigrationAction::SayMoving, MigrationAction::Pause { from }]);
            }
            Stage::Streaming if self.link.is_empty() => {
                self.stage = Stage::Pinning;
                let from = self.next_block.clone();
                actions.push(MigrationAction::PinFull { from });
            }
            Stage::Paused if self.link.has_room() => {
                self.stage = Stage::HandedOver(now);
                self.link.put();
                actions.push(MigrationAction::SendState);
            }
            _ => {}
        }
    }

    /// The group goes on here: by the front door's word, or by itself when `failure` says why the move is off.
    fn resume(&mut self, epoch: Option<Epoch>, failure: Option<Failure>) -> Vec<MigrationAction> {
        let mut actions = Vec::new();
        if !self.has_sent_end {
            let told = failure.clone().unwrap_or(Failure::Cancelled);
            actions.push(MigrationAction::SendEnd(Some(told)));
        }
        if self.is_pausing() || epoch.is_some() {
            actions.push(MigrationAction::ResumeDecoding(epoch));
        }
        actions.extend(failure.map(MigrationAction::SayCancelled));
        self.close(actions)
    }

    fn close(&mut self, first: impl IntoIterator<Item = MigrationAction>) -> Vec<MigrationAction> {
        self.stage = Stage::Closed;
        self.queue.clear();
        first.into_iter().chain([MigrationAction::Release]).collect()
    }
}
