//! The receiving end of a transfer: what may be written, when the group joins, when everything is given back.

use crate::ids::Nanos;
use crate::request::Failure;
use crate::transfer::{EndsBy, KvRange, TransferId, TransferPlan};

/// What the destination learns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationFact {
    /// The source answered, and both agree on version, fingerprint and transport.
    Accepted {
        /// Who ends the transfer when it goes well, which the transport decides.
        ends_by: EndsBy,
    },
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
    /// A handoff's first tokens are here; `ends` when they already end the request, and then no KV is owed.
    Token {
        /// Whether the tokens end the request.
        ends: bool,
    },
    /// A migration's state is here, and with it how much KV is owed.
    State {
        /// Of each choice.
        owed: Vec<OwedBlocks>,
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

/// How much of a moved choice must be here before the group joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OwedBlocks {
    /// The choice goes on: all blocks of its context, and none came beyond them.
    All(u32),
    /// The choice has finished: only those of the prompt that other choices share with it, whatever else came.
    Shared(u32),
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
    /// Send the first tokens of a handoff up to the front door.
    Deliver,
    /// All KV and the tokens are in: the group enters the decode batch. After a migration the tokens that the front door
    /// may lack go up now, and not sooner: they settle the move.
    Join,
    /// The first tokens of a handoff ended the request: report it, give the blocks back.
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
    /// Of each choice, per layer, the next block owed.
    next_block: Vec<Vec<u32>>,
    /// One past the last block owed of each choice. A migration learns it from the state.
    ends: Option<Vec<u32>>,
    has_tokens: bool,
    ends_by: EndsBy,
    source_steps: u64,
    progress_at: Nanos,
    progress_deadline: Nanos,
}

impl Destination {
    /// A handoff whose stream is being opened at `now`. It fails when nothing moves for `progress_deadline`.
    pub fn handoff(transfer: TransferId, plan: TransferPlan, progress_deadline: Nanos, now: Nanos) -> Destination {
        let ends = plan.choices.iter().map(|choice| choice.n_blocks).collect();
        Destination::new(transfer, plan, Some(ends), progress_deadline, now)
    }

    /// A migration whose stream is being opened at `now`: how much is owed comes with the state.
    pub fn migration(transfer: TransferId, plan: TransferPlan, progress_deadline: Nanos, now: Nanos) -> Destination {
        Destination::new(transfer, plan, None, progress_deadline, now)
    }

    fn new(
        transfer: TransferId,
        plan: TransferPlan,
        ends: Option<Vec<u32>>,
        progress_deadline: Nanos,
        now: Nanos,
    ) -> Destination {
        plan.check();
        Destination {
            transfer,
            next_block: plan.firsts_of_layers(),
            plan,
            stage: Stage::Opening,
            ends,
            has_tokens: false,
            ends_by: EndsBy::Source,
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

    /// The stage's name, for tables.
    pub fn stage(&self) -> &'static str {
        match self.stage {
            Stage::Opening => "opening",
            Stage::Receiving => "receiving",
            Stage::Settled => "settled",
            Stage::Closed => "closed",
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
            DestinationFact::Accepted { ends_by } => {
                self.ends_by = ends_by;
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
            DestinationFact::State { owed } => self.take_state(now, &owed),
            DestinationFact::Ended { failure: Some(failure) } => self.fail(failure),
            DestinationFact::Ended { failure: None } => {
                let tokens = if self.has_tokens { "received" } else { "owed" };
                let owed = self.n_layer_blocks_owed();
                let owed = owed.map_or_else(|| "an unknown number of".to_owned(), |owed| owed.to_string());
                self.fail(Failure::InstanceLost(format!(
                    "the source ended the transfer with {owed} layer blocks owed, token {tokens}"
                )))
            }
            DestinationFact::Dropped { reason } => {
                self.fail(Failure::InstanceLost(format!("the transfer's stream broke: {reason}")))
            }
            DestinationFact::Cancelled => self.fail(Failure::Cancelled),
            DestinationFact::Tick if self.is_overdue(now) => self.fail(Failure::InstanceLost(format!(
                "no progress from the source for {:.1} s",
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
            | DestinationFact::Accepted { .. }
            | DestinationFact::Progress { .. }
            | DestinationFact::Token { .. }
            | DestinationFact::State { .. } => Vec::new(),
        }
    }

    fn take_kv(&mut self, now: Nanos, transfer: TransferId, range: KvRange) -> Vec<DestinationAction> {
        if transfer != self.transfer {
            return vec![DestinationAction::Refuse(RefusedFrame::OtherTransfer)];
        }
        let choice = self.plan.choices.get(range.choice as usize);
        let next = self
            .next_block
            .get_mut(range.choice as usize)
            .and_then(|layers| layers.get_mut(range.layer as usize));
        let (expected, end) = match (choice, &next, &self.ends) {
            (Some(choice), Some(next), ends) => {
                let end = ends
                    .as_ref()
                    .map_or(choice.n_blocks, |ends| ends[range.choice as usize]);
                (Some(**next), end)
            }
            _ => (None, 0),
        };
        let fits = range.n_blocks > 0
            && range
                .first_block
                .checked_add(range.n_blocks)
                .is_some_and(|range_end| range_end <= end);
        if self.stage == Stage::Opening || expected != Some(range.first_block) || !fits {
            let mut actions = vec![DestinationAction::Refuse(RefusedFrame::OutOfOrder)];
            actions.extend(self.fail(Failure::InstanceLost(format!(
                "KV frame out of order: choice {}, layer {}, blocks {}..{}, expected {expected:?}",
                range.choice,
                range.layer,
                range.first_block,
                u64::from(range.first_block) + u64::from(range.n_blocks),
            ))));
            return actions;
        }
        *next.expect("an expected block has its place") = range.end_block();
        self.progress_at = now;
        let mut actions = vec![DestinationAction::Write(range)];
        self.join_if_complete(&mut actions);
        actions
    }

    fn take_token(&mut self, now: Nanos, ends: bool) -> Vec<DestinationAction> {
        if self.has_tokens || self.ends.is_none() || self.stage == Stage::Opening {
            return self.fail(Failure::InstanceLost(
                "first tokens came twice, before the answer, or in a migration".into(),
            ));
        }
        self.has_tokens = true;
        self.progress_at = now;
        let mut actions = vec![DestinationAction::Deliver];
        if ends {
            self.settle(DestinationAction::Finish, &mut actions);
        } else {
            self.join_if_complete(&mut actions);
        }
        actions
    }

    fn take_state(&mut self, now: Nanos, owed: &[OwedBlocks]) -> Vec<DestinationAction> {
        if self.has_tokens || self.ends.is_some() || self.stage == Stage::Opening {
            return self.fail(Failure::InstanceLost(
                "a state came twice, before the answer, or in a handoff".into(),
            ));
        }
        let mut choices = owed.iter().zip(&self.plan.choices).zip(&self.next_block);
        let fits = choices.all(|((owed, plan), next)| match *owed {
            OwedBlocks::All(end) => end <= plan.n_blocks && next.iter().all(|&next| next <= end),
            OwedBlocks::Shared(end) => end <= plan.n_blocks,
        });
        if !fits || owed.len() != self.plan.choices.len() {
            return self.fail(Failure::InstanceLost(format!(
                "the state owes {owed:?}, which is not what was reserved or sent"
            )));
        }
        let ends = owed.iter().map(|owed| match *owed {
            OwedBlocks::All(end) | OwedBlocks::Shared(end) => end,
        });
        self.ends = Some(ends.collect());
        self.has_tokens = true;
        self.progress_at = now;
        let mut actions = Vec::new();
        self.join_if_complete(&mut actions);
        actions
    }

    /// `None` in a migration whose state has not come.
    fn n_layer_blocks_owed(&self) -> Option<u64> {
        let choices = self.next_block.iter().zip(self.ends.as_ref()?);
        let owed = choices.flat_map(|(next, &end)| next.iter().map(move |&next| u64::from(end.saturating_sub(next))));
        Some(owed.sum())
    }

    fn join_if_complete(&mut self, actions: &mut Vec<DestinationAction>) {
        if self.has_tokens && self.n_layer_blocks_owed() == Some(0) {
            self.settle(DestinationAction::Join, actions);
        }
    }

    fn settle(&mut self, action: DestinationAction, actions: &mut Vec<DestinationAction>) {
        actions.push(action);
        match self.ends_by {
            EndsBy::Source => self.stage = Stage::Settled,
            EndsBy::Destination => actions.extend(self.close()),
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
