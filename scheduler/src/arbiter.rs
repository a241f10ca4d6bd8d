//! The front door's state of one request: which attempt may speak, which token comes next, when to place again.
//! It opens no stream and waits for nothing; facts in, actions out.

use crate::ids::{Epoch, InstanceId};
use crate::request::{Failure, Finish};

/// Placements without a new token before the request is given up.
pub const MAX_ATTEMPTS: u32 = 3;

/// What the front door learns about a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ArbiterFact {
    /// The policy named instances.
    Placed,
    /// A token came on the stream of `epoch`.
    Token {
        /// The stream's epoch.
        epoch: Epoch,
        /// Position among the generated tokens.
        index: u32,
    },
    /// The stream of `epoch` ended well.
    Finished {
        /// The stream's epoch.
        epoch: Epoch,
        /// Why.
        finish: Finish,
    },
    /// The stream of `epoch` ended badly, by its typed end or by breaking.
    Failed {
        /// The stream's epoch.
        epoch: Epoch,
        /// Why.
        failure: Failure,
        /// The instance that is to blame, if one is.
        blamed: Option<InstanceId>,
    },
    /// No instance had room within the bound of the wait.
    NoRoom,
    /// The client closed its stream or aborted.
    ClientGone,
    /// The request's deadline passed.
    DeadlinePassed,
}

/// What the front door does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ArbiterAction {
    /// Ask the policy again, avoiding [`Arbiter::avoided`] where there is a choice.
    Place,
    /// Open a stream to the placed instances in this epoch, with the tokens delivered so far.
    Open(Epoch),
    /// Drop the open stream; everything held for it is freed there.
    Close,
    /// Hand the token to the client.
    Deliver,
    /// The token was seen already or is of an older epoch.
    Discard,
    /// The terminal state: tell the client.
    Finish(Finish),
    /// The terminal state: tell the client.
    Fail(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Placing,
    Streaming,
    Ended,
}

/// One request's state at the front door. `Clone + Eq + Hash`, so that a model checker can walk it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Arbiter {
    epoch: Epoch,
    stage: Stage,
    next_index: u32,
    n_attempts: u32,
    avoided: Vec<InstanceId>,
}

impl Default for Arbiter {
    fn default() -> Self {
        Arbiter::new()
    }
}

impl Arbiter {
    /// A request that waits for its first placement.
    pub fn new() -> Arbiter {
        Arbiter {
            epoch: Epoch(0),
            stage: Stage::Placing,
            next_index: 0,
            n_attempts: 0,
            avoided: Vec::new(),
        }
    }

    /// The epoch that may speak now.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Tokens delivered so far.
    pub fn n_delivered(&self) -> u32 {
        self.next_index
    }

    /// Instances that refused or lost this request since its last token.
    pub fn avoided(&self) -> &[InstanceId] {
        &self.avoided
    }

    /// Whether the terminal state was reached.
    pub fn is_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Takes one fact, returns what to do, in order.
    pub fn apply(&mut self, fact: ArbiterFact) -> Vec<ArbiterAction> {
        match (self.stage, fact) {
            (Stage::Ended, ArbiterFact::Token { .. }) => vec![ArbiterAction::Discard],
            (Stage::Ended, _) => Vec::new(),
            (Stage::Placing, ArbiterFact::Placed) => {
                self.stage = Stage::Streaming;
                self.epoch = self.epoch.next();
                self.n_attempts += 1;
                vec![ArbiterAction::Open(self.epoch)]
            }
            (Stage::Streaming, ArbiterFact::Placed) => unreachable!("placed while a stream is open"),
            (Stage::Placing, ArbiterFact::NoRoom) if self.epoch == Epoch(0) => {
                let failure = Failure::Busy("no instance had room in time".into());
                self.end(Stage::Placing, ArbiterAction::Fail(failure))
            }
            (Stage::Placing, ArbiterFact::NoRoom) => {
                let failure = Failure::InstanceLost("no instance could take the request over in time".into());
                self.end(Stage::Placing, ArbiterAction::Fail(failure))
            }
            (Stage::Streaming, ArbiterFact::NoRoom) => unreachable!("placed while a stream is open"),
            (stage, ArbiterFact::ClientGone) => self.end(stage, ArbiterAction::Fail(Failure::Cancelled)),
            (stage, ArbiterFact::DeadlinePassed) => self.end(stage, ArbiterAction::Fail(Failure::DeadlineExceeded)),
            (Stage::Streaming, ArbiterFact::Token { epoch, index }) if epoch == self.epoch => self.take_token(index),
            (_, ArbiterFact::Token { .. }) => vec![ArbiterAction::Discard],
            (Stage::Streaming, ArbiterFact::Finished { epoch, finish }) if epoch == self.epoch => {
                self.end(Stage::Streaming, ArbiterAction::Finish(finish))
            }
            (Stage::Streaming, ArbiterFact::Failed { epoch, failure, blamed }) if epoch == self.epoch => {
                self.take_failure(failure, blamed)
            }
            (_, ArbiterFact::Finished { .. } | ArbiterFact::Failed { .. }) => Vec::new(),
        }
    }

    fn take_token(&mut self, index: u32) -> Vec<ArbiterAction> {
        if index < self.next_index {
            return vec![ArbiterAction::Discard];
        }
        if index > self.next_index {
            let failure = Failure::Internal(format!("token {index} came where {} was due", self.next_index));
            return self.end(Stage::Streaming, ArbiterAction::Fail(failure));
        }
        self.next_index += 1;
        self.n_attempts = 0;
        self.avoided.clear();
        vec![ArbiterAction::Deliver]
    }

    fn take_failure(&mut self, failure: Failure, blamed: Option<InstanceId>) -> Vec<ArbiterAction> {
        // Another pair may agree where this one did not, so an incompatible peer is worth another placement.
        let retry = failure.is_retryable() || matches!(failure, Failure::Incompatible(_));
        if !retry || self.n_attempts >= MAX_ATTEMPTS {
            return self.end(Stage::Streaming, ArbiterAction::Fail(failure));
        }
        if let Some(instance) = blamed.filter(|instance| !self.avoided.contains(instance)) {
            self.avoided.push(instance);
        }
        self.stage = Stage::Placing;
        vec![ArbiterAction::Close, ArbiterAction::Place]
    }

    fn end(&mut self, from: Stage, terminal: ArbiterAction) -> Vec<ArbiterAction> {
        self.stage = Stage::Ended;
        if from == Stage::Streaming {
            vec![ArbiterAction::Close, terminal]
        } else {
            vec![terminal]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lost(epoch: Epoch) -> ArbiterFact {
        let failure = Failure::InstanceLost("reset".into());
        ArbiterFact::Failed {
            epoch,
            failure,
            blamed: Some(InstanceId::new("prefill-0")),
        }
    }

    #[test]
    fn a_lost_instance_costs_a_new_epoch_and_three_in_a_row_end_it() {
        let mut arbiter = Arbiter::new();
        for attempt in 1..=MAX_ATTEMPTS {
            assert_eq!(
                arbiter.apply(ArbiterFact::Placed),
                [ArbiterAction::Open(Epoch(attempt))]
            );
            let actions = arbiter.apply(lost(Epoch(attempt)));
            if attempt < MAX_ATTEMPTS {
                assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Place]);
                assert_eq!(arbiter.avoided(), [InstanceId::new("prefill-0")]);
            } else {
                assert_eq!(actions[1], ArbiterAction::Fail(Failure::InstanceLost("reset".into())));
            }
        }
        assert!(arbiter.is_ended());
    }

    #[test]
    fn a_new_token_restores_the_attempts() {
        let mut arbiter = Arbiter::new();
        for index in 0..20 {
            let ArbiterAction::Open(epoch) = arbiter.apply(ArbiterFact::Placed)[0] else {
                panic!("no stream")
            };
            assert_eq!(
                arbiter.apply(ArbiterFact::Token { epoch, index }),
                [ArbiterAction::Deliver]
            );
            assert_eq!(arbiter.apply(lost(epoch)), [ArbiterAction::Close, ArbiterAction::Place]);
        }
    }

    #[test]
    fn what_cannot_succeed_is_not_tried_again() {
        for failure in [
            Failure::Invalid("too long".into()),
            Failure::Internal("bug".into()),
            Failure::Cancelled,
        ] {
            let mut arbiter = Arbiter::new();
            arbiter.apply(ArbiterFact::Placed);
            let actions = arbiter.apply(ArbiterFact::Failed {
                epoch: Epoch(1),
                failure: failure.clone(),
                blamed: None,
            });
            assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Fail(failure)]);
        }
    }

    #[test]
    fn without_room_the_end_says_whether_it_had_begun() {
        let mut arbiter = Arbiter::new();
        let actions = arbiter.apply(ArbiterFact::NoRoom);
        assert!(
            matches!(&actions[..], [ArbiterAction::Fail(Failure::Busy(_))]),
            "{actions:?}"
        );
        let mut arbiter = Arbiter::new();
        arbiter.apply(ArbiterFact::Placed);
        arbiter.apply(lost(Epoch(1)));
        let actions = arbiter.apply(ArbiterFact::NoRoom);
        assert!(
            matches!(&actions[..], [ArbiterAction::Fail(Failure::InstanceLost(_))]),
            "{actions:?}"
        );
    }

    proptest! {
        /// Under any facts from any epoch, the client sees indexes 0, 1, 2, ... and at most one terminal state, after which
        /// nothing is opened, and a stream is never opened while another is.
        #[test]
        fn tokens_come_once_in_order_and_one_end(
            facts in prop::collection::vec((0u8..8, 0u32..5, 0u32..6), 0..60),
        ) {
            let mut arbiter = Arbiter::new();
            let (mut delivered, mut n_ends, mut is_open) = (0u32, 0, false);
            for (kind, epoch_back, index) in facts {
                let epoch = Epoch(arbiter.epoch().0.saturating_sub(epoch_back / 3));
                let fact = match kind {
                    0 if !is_open => ArbiterFact::Placed,
                    1 | 0 => ArbiterFact::Token { epoch, index: delivered },
                    2 => ArbiterFact::Token { epoch, index },
                    3 => lost(epoch),
                    4 => ArbiterFact::Failed { epoch, failure: Failure::Busy("full".into()), blamed: None },
                    5 if index == 0 => ArbiterFact::Finished { epoch, finish: Finish::Length },
                    6 if index == 0 => ArbiterFact::ClientGone,
                    7 if index == 0 => ArbiterFact::DeadlinePassed,
                    _ => continue,
                };
                let ended_before = arbiter.is_ended();
                let token = match &fact { ArbiterFact::Token { index, .. } => Some(*index), _ => None };
                for action in arbiter.apply(fact) {
                    match action {
                        ArbiterAction::Deliver => {
                            prop_assert_eq!(token, Some(delivered));
                            delivered += 1;
                        }
                        ArbiterAction::Open(_) => {
                            prop_assert!(!is_open && !ended_before);
                            is_open = true;
                        }
                        ArbiterAction::Close => {
                            prop_assert!(is_open);
                            is_open = false;
                        }
                        ArbiterAction::Finish(_) | ArbiterAction::Fail(_) => {
                            prop_assert!(!ended_before);
                            n_ends += 1;
                        }
                        ArbiterAction::Place | ArbiterAction::Discard => {}
                    }
                }
                prop_assert_eq!(arbiter.n_delivered(), delivered);
                prop_assert!(n_ends <= 1);
                prop_assert_eq!(arbiter.is_ended(), n_ends == 1);
                prop_assert!(!(arbiter.is_ended() && is_open));
            }
        }
    }
}
