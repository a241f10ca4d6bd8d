//! The receiving end of a handoff: what may be written, when the sequence joins, when everything is given back.

use crate::ids::Nanos;
use crate::request::Failure;
use crate::transfer::{KvRange, TransferId, TransferPlan};

/// What the destination learns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationFact {
    /// The source answered, and both agree on version and fingerprint.
    Accepted,
    /// The source says how many steps it has made; only growth counts as progress.
    Progress {
        /// Steps of the source's engine.
        n_steps: u64,
    },
    /// A frame with this much KV is here.
    Kv {
        /// The transfer it names.
        transfer: TransferId,
        /// What it carries.
        range: KvRange,
    },
    /// The first token is here; `ends` when it already ends the request, and then no KV is owed.
    Token {
        /// Whether the token ends the request.
        ends: bool,
    },
    /// The source's typed end.
    Ended {
        /// Absent when all went well.
        failure: Option<Failure>,
    },
    /// The stream broke without a typed end.
    Dropped {
        /// What the transport said.
        reason: String,
    },
    /// The front door closed its stream: nobody wants the request any more.
    Cancelled,
    /// Time has passed.
    Tick,
}

/// Why a frame was refused. Refusals are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusedFrame {
    /// It names another transfer.
    OtherTransfer,
    /// It comes twice, out of order, or past the plan.
    OutOfOrder,
    /// It comes when nothing is owed any more.
    Late,
}

/// What the destination does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Write the frame's bytes into the reserved blocks.
    Write(KvRange),
    /// Drop the frame's bytes.
    Refuse(RefusedFrame),
    /// Send the first token up to the front door.
    Deliver,
    /// All KV and the token are in: the sequence enters the decode batch.
    Join,
    /// The first token ended the request: report it, give the blocks back.
    Finish,
    /// Give the blocks back and report the failure.
    Fail(Failure),
    /// Close the stream to the source.
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// The stream is open, the source has not answered.
    Opening,
    /// Blocks and token are owed.
    Receiving,
    /// The sequence decodes; only the source's typed end is owed.
    Settled,
    /// Nothing is owed by anyone.
    Closed,
}

/// The receiving end's state. `Clone + Eq + Hash`, so that a model checker can walk it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    transfer: TransferId,
    plan: TransferPlan,
    stage: Stage,
    /// Per layer, the next block owed.
    next_block: Vec<u32>,
    n_layer_blocks_owed: u64,
    has_token: bool,
    source_steps: u64,
    progress_at: Nanos,
    progress_deadline: Nanos,
}

impl Destination {
    /// A transfer whose stream is being opened at `now`. It fails when nothing moves for `progress_deadline`.
    pub fn new(transfer: TransferId, plan: TransferPlan, progress_deadline: Nanos, now: Nanos) -> Destination {
        assert!(
            plan.first_block <= plan.n_blocks,
            "more blocks held than there are: {plan:?}"
        );
        Destination {
            transfer,
            plan,
            stage: Stage::Opening,
            next_block: vec![plan.first_block; plan.n_layers as usize],
            n_layer_blocks_owed: plan.n_layer_blocks(),
            has_token: false,
            source_steps: 0,
            progress_at: now,
            progress_deadline,
        }
    }

    /// When [`DestinationFact::Tick`] is due at the latest; `None` once nothing is owed.
    pub fn next_tick(&self) -> Option<Nanos> {
        match self.stage {
            Stage::Opening | Stage::Receiving | Stage::Settled => {
                Some(self.progress_at.saturating_add(self.progress_deadline))
            }
            Stage::Closed => None,
        }
    }

    /// Whether nothing is owed by anyone.
    pub fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Takes one fact, returns what to do, in order.
    pub fn apply(&mut self, now: Nanos, fact: DestinationFact) -> Vec<DestinationAction> {
        match self.stage {
            Stage::Opening | Stage::Receiving => self.apply_receiving(now, fact),
            Stage::Settled => self.apply_settled(now, fact),
            Stage::Closed => match fact {
                DestinationFact::Kv { .. } => vec![DestinationAction::Refuse(RefusedFrame::Late)],
                _ => Vec::new(),
            },
        }
    }

    fn apply_receiving(&mut self, now: Nanos, fact: DestinationFact) -> Vec<DestinationAction> {
        match fact {
            DestinationFact::Accepted => {
                self.stage = Stage::Receiving;
                self.progress_at = now;
                Vec::new()
            }
            DestinationFact::Progress { n_steps } => {
                if n_steps > self.source_steps {
                    self.source_steps = n_steps;
                    self.progress_at = now;
                }
                Vec::new()
            }
            DestinationFact::Kv { transfer, range } => self.take_kv(now, transfer, range),
            DestinationFact::Token { ends } => self.take_token(now, ends),
            DestinationFact::Ended { failure: Some(failure) } => self.fail(failure),
            DestinationFact::Ended { failure: None } => {
                let owed = self.n_layer_blocks_owed;
                self.fail(Failure::InstanceLost(format!(
                    "the prefill instance ended the transfer with {owed} layer blocks owed, token {}",
                    if self.has_token { "received" } else { "owed" }
                )))
            }
            DestinationFact::Dropped { reason } => {
                self.fail(Failure::InstanceLost(format!("the prefill stream broke: {reason}")))
            }
            DestinationFact::Cancelled => self.fail(Failure::Cancelled),
            DestinationFact::Tick if self.is_overdue(now) => self.fail(Failure::InstanceLost(format!(
                "no progress from the prefill instance for {:.1} s",
                self.progress_deadline.as_secs_f64()
            ))),
            DestinationFact::Tick => Vec::new(),
        }
    }

    fn apply_settled(&mut self, now: Nanos, fact: DestinationFact) -> Vec<DestinationAction> {
        match fact {
            DestinationFact::Kv { .. } => vec![DestinationAction::Refuse(RefusedFrame::Late)],
            DestinationFact::Ended { .. } | DestinationFact::Dropped { .. } | DestinationFact::Cancelled => {
                self.close()
            }
            DestinationFact::Tick if self.is_overdue(now) => self.close(),
            DestinationFact::Tick
            | DestinationFact::Accepted
            | DestinationFact::Progress { .. }
            | DestinationFact::Token { .. } => Vec::new(),
        }
    }

    fn take_kv(&mut self, now: Nanos, transfer: TransferId, range: KvRange) -> Vec<DestinationAction> {
        if transfer != self.transfer {
            return vec![DestinationAction::Refuse(RefusedFrame::OtherTransfer)];
        }
        let expected = self.next_block.get(range.layer as usize).copied();
        let fits = range.n_blocks > 0
            && range
                .first_block
                .checked_add(range.n_blocks)
                .is_some_and(|end| end <= self.plan.n_blocks);
        if self.stage == Stage::Opening || expected != Some(range.first_block) || !fits {
            let mut actions = vec![DestinationAction::Refuse(RefusedFrame::OutOfOrder)];
            actions.extend(self.fail(Failure::InstanceLost(format!(
                "KV frame out of order: layer {}, blocks {}..{}, expected {expected:?}",
                range.layer,
                range.first_block,
                u64::from(range.first_block) + u64::from(range.n_blocks),
            ))));
            return actions;
        }
        self.next_block[range.layer as usize] = range.end_block();
        self.n_layer_blocks_owed -= u64::from(range.n_blocks);
        self.progress_at = now;
        let mut actions = vec![DestinationAction::Write(range)];
        self.join_if_complete(&mut actions);
        actions
    }

    fn take_token(&mut self, now: Nanos, ends: bool) -> Vec<DestinationAction> {
        if self.has_token || self.stage == Stage::Opening {
            return self.fail(Failure::InstanceLost(
                "a first token came twice or before the answer".into(),
            ));
        }
        self.has_token = true;
        self.progress_at = now;
        let mut actions = vec![DestinationAction::Deliver];
        if ends {
            self.stage = Stage::Settled;
            actions.push(DestinationAction::Finish);
        } else {
            self.join_if_complete(&mut actions);
        }
        actions
    }

    fn join_if_complete(&mut self, actions: &mut Vec<DestinationAction>) {
        if self.has_token && self.n_layer_blocks_owed == 0 {
            self.stage = Stage::Settled;
            actions.push(DestinationAction::Join);
        }
    }

    fn is_overdue(&self, now: Nanos) -> bool {
        now >= self.progress_at.saturating_add(self.progress_deadline)
    }

    fn close(&mut self) -> Vec<DestinationAction> {
        self.stage = Stage::Closed;
        vec![DestinationAction::Close]
    }

    fn fail(&mut self, failure: Failure) -> Vec<DestinationAction> {
        self.stage = Stage::Closed;
        vec![DestinationAction::Fail(failure), DestinationAction::Close]
    }
}
