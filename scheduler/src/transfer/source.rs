//! The sending end of a handoff: which frame goes next, how many are in flight, when the blocks are given back.

use std::collections::VecDeque;

use crate::ids::Nanos;
use crate::request::Failure;
use crate::transfer::{KvRange, TransferPlan};

/// What the source learns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceFact {
    /// These blocks of this layer are computed and pinned.
    Ready(KvRange),
    /// The first token is sampled; `ends` when it already ends the request.
    Token {
        /// Whether the token ends the request.
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
    /// Send the first token.
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
    n_in_flight: u32,
    max_in_flight: u32,
    max_blocks_per_frame: u32,
    stalled_since: Option<Nanos>,
    stall_deadline: Nanos,
    closed: bool,
}

impl Source {
    /// A transfer that may have `max_in_flight` messages on the link, frames of at most `max_blocks_per_frame` blocks, and
    /// that is given up when the link takes nothing for `stall_deadline` while something waits.
    pub fn new(plan: TransferPlan, max_in_flight: u32, max_blocks_per_frame: u32, stall_deadline: Nanos) -> Source {
        assert!(
            plan.first_block <= plan.n_blocks,
            "more blocks held than there are: {plan:?}"
        );
        assert!(
            max_in_flight > 0 && max_blocks_per_frame > 0,
            "a link that takes nothing"
        );
        Source {
            plan,
            next_ready: vec![plan.first_block; plan.n_layers as usize],
            queue: VecDeque::new(),
            n_layer_blocks_owed: plan.n_layer_blocks(),
            token: TokenStage::Owed,
            n_in_flight: 0,
            max_in_flight,
            max_blocks_per_frame,
            stalled_since: None,
            stall_deadline,
            closed: false,
        }
    }

    /// Whether everything was released.
    pub fn is_closed(&self) -> bool {
        self.closed
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
                assert_eq!(self.token, TokenStage::Owed, "the first token was sampled twice");
                self.token = TokenStage::Ready { ends };
            }
            SourceFact::Sent => {
                assert!(self.n_in_flight > 0, "the link took a message that was never sent");
                self.n_in_flight -= 1;
                self.stalled_since = None;
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
                if self
                    .stalled_since
                    .is_some_and(|since| now >= since.saturating_add(self.stall_deadline))
                {
                    self.closed = true;
                    return vec![SourceAction::Release];
                }
                if self.n_in_flight == 0 {
                    self.send(SourceAction::SendProgress, &mut actions);
                }
            }
        }
        self.fill_link(&mut actions);
        if !self.closed && self.n_in_flight == self.max_in_flight && self.stalled_since.is_none() {
            self.stalled_since = Some(now);
        }
        actions
    }

    fn enqueue(&mut self, range: KvRange) {
        let next = &mut self.next_ready[range.layer as usize];
        assert!(
            range.first_block == *next && range.n_blocks > 0 && range.end_block() <= self.plan.n_blocks,
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
                layer: range.layer,
                first_block,
                n_blocks,
            });
            first_block += n_blocks;
        }
    }

    fn fill_link(&mut self, actions: &mut Vec<SourceAction>) {
        while self.n_in_flight < self.max_in_flight {
            // The client waits for the token, so it overtakes the KV that is queued.
            if let TokenStage::Ready { ends } = self.token {
                self.token = TokenStage::Sent { ends };
                self.send(SourceAction::SendToken, actions);
            } else if self.owes_nothing() {
                self.closed = true;
                actions.extend([SourceAction::SendEnd(None), SourceAction::Release]);
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
        self.n_in_flight += 1;
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
