//! The sending end of a handoff: which frame goes next, how many are in flight, when the blocks are given back.

use std::collections::VecDeque;

use super::link::Link;
use crate::ids::Nanos;
use crate::request::Failure;
use crate::transfer::{KvRange, TransferPlan};

/// What the source learns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceFact {
    /// These blocks of this layer are computed and pinned.
    Ready(KvRange),
    /// The first tokens are sampled, one for each choice; `ends` when they already end the request.
    Token {
        /// Whether the tokens end the request.
        ends: bool,
    },
    /// The link took a message off our hands.
    Sent,
    /// The engine gave the computation up.
    ComputeFailed(Failure),
    /// The destination closed the stream, or it broke.
    Dropped,
    /// Time has passed.
    Tick,
}

/// What the source does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Send these blocks, then unpin them.
    SendKv(KvRange),
    /// Send the first tokens.
    SendToken,
    /// Say how many steps the engine has made.
    SendProgress,
    /// Send the typed end and close.
    SendEnd(Option<Failure>),
    /// Stop computing, unpin and free everything.
    Release,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum TokenStage {
    Owed,
    Ready { ends: bool },
    Sent { ends: bool },
}

/// The sending end's state. `Clone + Eq + Hash`, so that a model checker can walk it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    plan: TransferPlan,
    /// Per layer, the next block that may become ready.
    next_ready: Vec<u32>,
    queue: VecDeque<KvRange>,
    n_layer_blocks_owed: u64,
    token: TokenStage,
    link: Link,
    max_blocks_per_frame: u32,
    ends_by: EndsBy,
    /// All is sent, and the destination's close is awaited until then.
    awaits_close_until: Option<Nanos>,
    stall_deadline: Nanos,
    closed: bool,
}

/// Who ends a transfer that went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndsBy {
    /// The source, once the last frame is on the link: the frames hold all that is needed.
    Source,
    /// The destination, by closing the stream: until then it may still read the source's blocks.
    Destination,
}

impl Source {
    /// A handoff (one context) that may have `max_in_flight` messages on the link, frames of at most
    /// `max_blocks_per_frame` blocks, and that is given up when the link takes nothing for `stall_deadline` while
    /// something waits.
    pub fn new(
        plan: TransferPlan,
        max_in_flight: u32,
        max_blocks_per_frame: u32,
        ends_by: EndsBy,
        stall_deadline: Nanos,
    ) -> Source {
        plan.check();
        assert!(max_blocks_per_frame > 0, "frames of no blocks");
        assert_eq!(plan.choices.len(), 1, "a handoff has one context");
        let next_ready = plan.firsts_of_layers().remove(0);
        let n_blocks = plan.choices[0].n_blocks;
        Source {
            n_layer_blocks_owed: next_ready.iter().map(|&first| u64::from(n_blocks - first)).sum(),
            next_ready,
            queue: VecDeque::new(),
            token: TokenStage::Owed,
            link: Link::new(max_in_flight, stall_deadline),
            max_blocks_per_frame,
            ends_by,
            awaits_close_until: None,
            stall_deadline,
            closed: false,
            plan,
        }
    }

    /// The stage's name, for tables.
    pub fn stage(&self) -> &'static str {
        match self.token {
            _ if self.closed => "closed",
            _ if self.has_sent_all() => "awaiting close",
            TokenStage::Owed => "computing",
            TokenStage::Ready { .. } | TokenStage::Sent { .. } => "sending",
        }
    }

    /// Whether everything was released.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether all is sent, and only the destination's close is awaited or has come.
    pub fn has_sent_all(&self) -> bool {
        self.awaits_close_until.is_some()
    }

    /// Takes one fact, returns what to do, in order.
    pub fn apply(&mut self, now: Nanos, fact: SourceFact) -> Vec<SourceAction> {
        if self.closed {
            return Vec::new();
        }
        let mut actions = Vec::new();
        match fact {
            SourceFact::Ready(range) => self.enqueue(range),
            SourceFact::Token { ends } => {
                assert_eq!(self.token, TokenStage::Owed, "the first tokens were sampled twice");
                self.token = TokenStage::Ready { ends };
            }
            SourceFact::Sent => {
                self.link.taken();
            }
            SourceFact::ComputeFailed(failure) => {
                self.closed = true;
                return vec![SourceAction::SendEnd(Some(failure)), SourceAction::Release];
            }
            SourceFact::Dropped => {
                self.closed = true;
                return vec![SourceAction::Release];
            }
            SourceFact::Tick => {
                if self.link.is_overdue(now) || self.awaits_close_until.is_some_and(|until| now >= until) {
                    self.closed = true;
                    return vec![SourceAction::Release];
                }
                if self.link.is_empty() {
                    self.send(SourceAction::SendProgress, &mut actions);
                }
            }
        }
        self.fill_link(now, &mut actions);
        self.link.note_fullness(now);
        actions
    }

    fn enqueue(&mut self, range: KvRange) {
        let next = &mut self.next_ready[range.layer as usize];
        assert!(
            range.first_block == *next && range.n_blocks > 0 && range.end_block() <= self.plan.choices[0].n_blocks,
            "layer {} is ready at block {} for {} blocks, expected {next} of {:?}",
            range.layer,
            range.first_block,
            range.n_blocks,
            self.plan,
        );
        *next = range.end_block();
        let mut first_block = range.first_block;
        while first_block < range.end_block() {
            let n_blocks = (range.end_block() - first_block).min(self.max_blocks_per_frame);
            self.queue.push_back(KvRange {
                choice: range.choice,
                layer: range.layer,
                first_block,
                n_blocks,
            });
            first_block += n_blocks;
        }
    }

    fn fill_link(&mut self, now: Nanos, actions: &mut Vec<SourceAction>) {
        while self.link.has_room() {
            // The client waits for the token, so it overtakes the KV that is queued.
            if let TokenStage::Ready { ends } = self.token {
                self.token = TokenStage::Sent { ends };
                self.send(SourceAction::SendToken, actions);
            } else if self.owes_nothing() {
                match self.ends_by {
                    EndsBy::Source => {
                        self.closed = true;
                        actions.extend([SourceAction::SendEnd(None), SourceAction::Release]);
                    }
                    EndsBy::Destination => {
                        self.awaits_close_until
                            .get_or_insert(now.saturating_add(self.stall_deadline));
                    }
                }
                return;
            } else if let Some(range) = self.queue.pop_front() {
                self.n_layer_blocks_owed -= u64::from(range.n_blocks);
                self.send(SourceAction::SendKv(range), actions);
            } else {
                return;
            }
        }
    }

    fn send(&mut self, action: SourceAction, actions: &mut Vec<SourceAction>) {
        self.link.put();
        actions.push(action);
    }

    /// A token that ends the request voids the KV that was still owed.
    fn owes_nothing(&self) -> bool {
        match self.token {
            TokenStage::Sent { ends: true } => true,
            TokenStage::Sent { ends: false } => self.n_layer_blocks_owed == 0,
            TokenStage::Owed | TokenStage::Ready { .. } => false,
        }
    }
}
