//! The front door's state of one request: which stream may speak, which token of which choice comes next, when to place
//! again, and who has the word while the request moves. It opens no stream and waits for nothing; facts in, actions out.

use crate::ids::{Epoch, InstanceId, Nanos};
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
        /// The epoch it was said in.
        epoch: Epoch,
        /// Its choice.
        choice: u32,
        /// Position among the generated tokens of its choice.
        index: u32,
    },
    /// A choice ended well.
    ChoiceFinished {
        /// The epoch it was said in.
        epoch: Epoch,
        /// Which.
        choice: u32,
    },
    /// The stream of `epoch` ended well: every choice has ended.
    Finished {
        /// The epoch it was said in.
        epoch: Epoch,
        /// Of the choice that ended last.
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
    /// Rebalancer, drain or operator want the request elsewhere, and the destination can be called.
    MoveWanted,
    /// The source is about to pause for the move under way.
    Moving {
        /// The epoch it was said in.
        epoch: Epoch,
    },
    /// The source goes on by itself.
    MoveCancelled {
        /// The epoch it was said in.
        epoch: Epoch,
    },
    /// The destination has all it needs and decodes.
    Joined {
        /// The epoch it was said in.
        epoch: Epoch,
    },
    /// The source could not be told to resume: nobody answered. An answer that there is nothing to resume is no failure: the
    /// request has ended there or was told before, and its stream, which is in order, says the rest or breaks.
    ResumeFailed {
        /// The epoch it should have spoken in.
        epoch: Epoch,
        /// Why.
        failure: Failure,
    },
    /// No instance had room within the bound of the wait.
    NoRoom,
    /// The client closed its stream or aborted.
    ClientGone,
    /// The request's deadline passed.
    DeadlinePassed,
    /// Time has passed.
    Tick,
}

/// What the front door does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ArbiterAction {
    /// Ask the policy again, avoiding [`Arbiter::avoided`] where there is a choice.
    Place,
    /// Open a stream to the placed instances in this epoch, with the tokens delivered so far.
    Open(Epoch),
    /// Drop the stream that speaks; everything held for it is freed there.
    Close,
    /// Open a stream to the destination of the move in this epoch, with the tokens delivered so far. The stream that
    /// speaks stays open.
    Attach(Epoch),
    /// Drop the move's stream; everything held for it is freed there.
    Detach,
    /// The destination speaks from here on: drop the source's stream and go on with the move's.
    Settle,
    /// The move wanted cannot be begun now, for this reason.
    RefuseMove(&'static str),
    /// Tell the source to go on in this epoch.
    Resume(Epoch),
    /// Hand the token, or the end of the choice, to the client.
    Deliver,
    /// The token or end was seen already or is of an older epoch.
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

/// A move under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Move {
    epoch: Epoch,
    /// When the destination is given up; set once the source pauses or is lost.
    deadline: Option<Nanos>,
    /// The source can no longer resume.
    source_lost: Option<(Failure, Option<InstanceId>)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Choice {
    next_index: u32,
    is_finished: bool,
}

/// One request's state at the front door. `Clone + Eq + Hash`, so that a model checker can walk it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Arbiter {
    /// The newest epoch given out.
    newest: Epoch,
    /// The epoch of the stream that speaks.
    speaking: Epoch,
    /// Epochs that the stream that speaks had before. A source told to resume may still speak in all of those that it has
    /// not been heard to leave behind: a word takes its time, and moves can fail quicker.
    spoken_before: Vec<Epoch>,
    stage: Stage,
    choices: Vec<Choice>,
    n_attempts: u32,
    /// Whether an instance ever did more, or worse, than say that it is full.
    was_taken: bool,
    /// Whether the last that was asked said so.
    was_refused: bool,
    n_moves: u32,
    moving: Option<Move>,
    move_deadline: Nanos,
    avoided: Vec<InstanceId>,
}

impl Arbiter {
    /// A request of `n` choices that waits for its first placement. A paused move is given up after `move_deadline`.
    pub fn new(n: u32, move_deadline: Nanos) -> Arbiter {
        assert!(n > 0, "a request has at least one choice");
        Arbiter {
            newest: Epoch(0),
            speaking: Epoch(0),
            spoken_before: Vec::new(),
            stage: Stage::Placing,
            choices: vec![Choice::default(); n as usize],
            n_attempts: 0,
            was_taken: false,
            was_refused: false,
            n_moves: 0,
            moving: None,
            move_deadline,
            avoided: Vec::new(),
        }
    }

    /// The epoch of the stream that speaks now.
    pub fn epoch(&self) -> Epoch {
        self.speaking
    }

    /// The newest epoch given out, a move's included.
    pub fn newest_epoch(&self) -> Epoch {
        self.newest
    }

    /// Tokens delivered so far, of each choice.
    pub fn n_delivered(&self) -> impl Iterator<Item = u32> {
        self.choices.iter().map(|choice| choice.next_index)
    }

    /// Placements in a row that brought no token and were not refused for want of room. Refusals are bounded by time, as the
    /// wait in the queue is: whoever places says [`ArbiterFact::NoRoom`] when it has lasted too long.
    pub fn n_attempts(&self) -> u32 {
        self.n_attempts
    }

    /// Whether the request is placed again because the last instance was full: it still waits for the same place.
    pub fn was_refused(&self) -> bool {
        self.was_refused
    }

    /// Moves that have settled.
    pub fn n_moves(&self) -> u32 {
        self.n_moves
    }

    /// The stage's name, for tables.
    pub fn stage(&self) -> &'static str {
        match (self.stage, &self.moving) {
            (Stage::Placing, _) => "placing",
            (Stage::Ended, _) => "ended",
            (Stage::Streaming, None) if !self.spoken_before.is_empty() => "resumed",
            (Stage::Streaming, None) => "streaming",
            (Stage::Streaming, Some(moving)) if moving.source_lost.is_some() => "source lost",
            (Stage::Streaming, Some(moving)) if moving.deadline.is_some() => "pausing",
            (Stage::Streaming, Some(_)) => "moving",
        }
    }

    /// Whether a move is under way.
    pub fn is_moving(&self) -> bool {
        self.moving.is_some()
    }

    /// Instances that refused or lost this request since its last token.
    pub fn avoided(&self) -> &[InstanceId] {
        &self.avoided
    }

    /// Whether the terminal state was reached.
    pub fn is_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// When [`ArbiterFact::Tick`] is due; `None` while no move waits for anybody.
    pub fn next_tick(&self) -> Option<Nanos> {
        self.moving.as_ref().and_then(|moving| moving.deadline)
    }

    /// Takes one fact, returns what to do, in order.
    pub fn apply(&mut self, now: Nanos, fact: ArbiterFact) -> Vec<ArbiterAction> {
        match self.stage {
            Stage::Ended => match fact {
                ArbiterFact::Token { .. } | ArbiterFact::ChoiceFinished { .. } => vec![ArbiterAction::Discard],
                ArbiterFact::MoveWanted => vec![ArbiterAction::RefuseMove("the request has ended")],
                _ => Vec::new(),
            },
            Stage::Placing => self.apply_placing(fact),
            Stage::Streaming => self.apply_streaming(now, fact),
        }
    }

    fn apply_placing(&mut self, fact: ArbiterFact) -> Vec<ArbiterAction> {
        match fact {
            ArbiterFact::Placed => {
                self.stage = Stage::Streaming;
                self.speaking = self.new_epoch();
                self.spoken_before.clear();
                self.n_attempts += 1;
                vec![ArbiterAction::Open(self.speaking)]
            }
            ArbiterFact::NoRoom if !self.was_taken => self.end(ArbiterAction::Fail(Failure::Busy(
                "no instance had room in time".into(),
            ))),
            ArbiterFact::NoRoom => self.end(ArbiterAction::Fail(Failure::InstanceLost(
                "no instance could take the request over in time".into(),
            ))),
            ArbiterFact::ClientGone => self.end(ArbiterAction::Fail(Failure::Cancelled)),
            ArbiterFact::DeadlinePassed => self.end(ArbiterAction::Fail(Failure::DeadlineExceeded)),
            ArbiterFact::MoveWanted => vec![ArbiterAction::RefuseMove("the request is being placed")],
            ArbiterFact::Token { .. } | ArbiterFact::ChoiceFinished { .. } => vec![ArbiterAction::Discard],
            _ => Vec::new(),
        }
    }

    fn apply_streaming(&mut self, now: Nanos, fact: ArbiterFact) -> Vec<ArbiterAction> {
        match fact {
            ArbiterFact::Placed | ArbiterFact::NoRoom => unreachable!("placed while a stream is open"),
            ArbiterFact::ClientGone => self.end(ArbiterAction::Fail(Failure::Cancelled)),
            ArbiterFact::DeadlinePassed => self.end(ArbiterAction::Fail(Failure::DeadlineExceeded)),
            ArbiterFact::Token { epoch, choice, index } => {
                let Some(mut actions) = self.hear(epoch) else {
                    return vec![ArbiterAction::Discard];
                };
                actions.extend(self.take_token(choice, index));
                actions
            }
            ArbiterFact::ChoiceFinished { epoch, choice } => {
                let Some(mut actions) = self.hear(epoch) else {
                    return vec![ArbiterAction::Discard];
                };
                actions.extend(self.take_choice_finished(choice));
                actions
            }
            ArbiterFact::Finished { epoch, finish } => {
                let Some(mut actions) = self.hear(epoch) else {
                    return Vec::new();
                };
                actions.extend(self.end(ArbiterAction::Finish(finish)));
                actions
            }
            ArbiterFact::Joined { epoch } if self.is_of_move(epoch) => self.settle(),
            ArbiterFact::Joined { .. } => Vec::new(),
            ArbiterFact::Failed { epoch, failure, blamed } => self.take_failure(now, epoch, failure, blamed),
            ArbiterFact::MoveWanted => self.begin_move(),
            ArbiterFact::Moving { epoch } if self.is_speaking(epoch) => {
                let deadline = now.saturating_add(self.move_deadline);
                if let Some(moving) = &mut self.moving {
                    moving.deadline.get_or_insert(deadline);
                }
                Vec::new()
            }
            ArbiterFact::MoveCancelled { epoch } if self.is_speaking(epoch) && self.moving.is_some() => {
                // It may speak of an earlier move than the one under way, so the source is told to go on in any case.
                self.give_move_up()
            }
            ArbiterFact::Moving { .. } | ArbiterFact::MoveCancelled { .. } => Vec::new(),
            // Whoever has been heard in the epoch was told, though the answer was lost.
            ArbiterFact::ResumeFailed { epoch, failure }
                if epoch == self.speaking && !self.spoken_before.is_empty() =>
            {
                self.take_failure(now, epoch, failure, None)
            }
            ArbiterFact::ResumeFailed { .. } => Vec::new(),
            ArbiterFact::Tick => match self.next_tick() {
                Some(deadline) if now >= deadline => self.give_move_up(),
                _ => Vec::new(),
            },
        }
    }

    fn new_epoch(&mut self) -> Epoch {
        self.newest = self.newest.next();
        self.newest
    }

    /// Nobody speaks while only the destination of a move is awaited: the stream that spoke is closed.
    fn is_speaking(&self, epoch: Epoch) -> bool {
        if self.moving.as_ref().is_some_and(|moving| moving.source_lost.is_some()) {
            return false;
        }
        epoch == self.speaking || self.spoken_before.contains(&epoch)
    }

    fn is_of_move(&self, epoch: Epoch) -> bool {
        self.moving.as_ref().is_some_and(|moving| moving.epoch == epoch)
    }

    /// Whether a word of this epoch counts; one of the move's epoch settles the move first.
    fn hear(&mut self, epoch: Epoch) -> Option<Vec<ArbiterAction>> {
        if self.is_of_move(epoch) {
            Some(self.settle())
        } else if self.is_speaking(epoch) {
            // The stream is in order.
            self.spoken_before.retain(|&before| before >= epoch);
            Some(Vec::new())
        } else {
            None
        }
    }

    fn settle(&mut self) -> Vec<ArbiterAction> {
        let moving = self.moving.take().expect("a move settles once");
        self.speaking = moving.epoch;
        self.spoken_before.clear();
        self.n_moves += 1;
        vec![ArbiterAction::Settle]
    }

    fn begin_move(&mut self) -> Vec<ArbiterAction> {
        let refused = if self.moving.is_some() {
            Some("a move of it is under way")
        } else if self
            .choices
            .iter()
            .any(|choice| choice.next_index == 0 && !choice.is_finished)
        {
            Some("its prompt is being computed")
        } else {
            None
        };
        if let Some(reason) = refused {
            return vec![ArbiterAction::RefuseMove(reason)];
        }
        let epoch = self.new_epoch();
        self.moving = Some(Move {
            epoch,
            deadline: None,
            source_lost: None,
        });
        vec![ArbiterAction::Attach(epoch)]
    }

    /// The destination failed or said nothing in time: the source goes on, or, if it is lost, the request is replayed.
    fn give_move_up(&mut self) -> Vec<ArbiterAction> {
        let moving = self.moving.take().expect("a move is given up once");
        let mut actions = vec![ArbiterAction::Detach];
        match moving.source_lost {
            Some((failure, blamed)) => actions.extend(self.replay(failure, blamed)),
            None => {
                let epoch = self.new_epoch();
                self.spoken_before.push(self.speaking);
                self.speaking = epoch;
                actions.push(ArbiterAction::Resume(epoch));
            }
        }
        actions
    }

    fn take_token(&mut self, choice: u32, index: u32) -> Vec<ArbiterAction> {
        let Some(state) = self.choices.get_mut(choice as usize) else {
            let failure = Failure::Internal(format!("a token of choice {choice}, which was not asked for"));
            return self.end(ArbiterAction::Fail(failure));
        };
        if index < state.next_index {
            return vec![ArbiterAction::Discard];
        }
        if index > state.next_index || state.is_finished {
            let due = if state.is_finished {
                "none".to_owned()
            } else {
                state.next_index.to_string()
            };
            let failure = Failure::Internal(format!("token {index} of choice {choice} came where {due} was due"));
            return self.end(ArbiterAction::Fail(failure));
        }
        state.next_index += 1;
        self.n_attempts = 0;
        self.was_taken = true;
        self.avoided.clear();
        vec![ArbiterAction::Deliver]
    }

    fn take_choice_finished(&mut self, choice: u32) -> Vec<ArbiterAction> {
        match self.choices.get_mut(choice as usize) {
            Some(state) if !state.is_finished => {
                state.is_finished = true;
                vec![ArbiterAction::Deliver]
            }
            Some(_) => vec![ArbiterAction::Discard],
            None => {
                let failure = Failure::Internal(format!("an end of choice {choice}, which was not asked for"));
                self.end(ArbiterAction::Fail(failure))
            }
        }
    }

    fn take_failure(
        &mut self,
        now: Nanos,
        epoch: Epoch,
        failure: Failure,
        blamed: Option<InstanceId>,
    ) -> Vec<ArbiterAction> {
        if self.is_of_move(epoch) {
            return self.give_move_up();
        }
        if !self.is_speaking(epoch) {
            return Vec::new();
        }
        let deadline = now.saturating_add(self.move_deadline);
        match &mut self.moving {
            // The destination may be complete all the same: it is awaited.
            Some(moving) if is_retried(&failure) => {
                moving.source_lost = Some((failure, blamed));
                moving.deadline.get_or_insert(deadline);
                vec![ArbiterAction::Close]
            }
            _ => self.lose(failure, blamed),
        }
    }

    /// The stream that speaks is lost, and no move is under way that could save it.
    fn lose(&mut self, failure: Failure, blamed: Option<InstanceId>) -> Vec<ArbiterAction> {
        if !is_retried(&failure) || self.was_last_attempt(&failure) {
            return self.end(ArbiterAction::Fail(failure));
        }
        let mut actions = vec![ArbiterAction::Close];
        actions.extend(self.replay(failure, blamed));
        actions
    }

    /// Places the request again; its stream is closed already.
    fn replay(&mut self, failure: Failure, blamed: Option<InstanceId>) -> Vec<ArbiterAction> {
        if self.was_last_attempt(&failure) {
            self.stage = Stage::Ended;
            return vec![ArbiterAction::Fail(failure)];
        }
        self.was_refused = is_refusal(&failure);
        if self.was_refused {
            self.n_attempts = self.n_attempts.saturating_sub(1);
        } else {
            self.was_taken = true;
        }
        if let Some(instance) = blamed.filter(|instance| !self.avoided.contains(instance)) {
            self.avoided.push(instance);
        }
        self.stage = Stage::Placing;
        vec![ArbiterAction::Place]
    }

    fn was_last_attempt(&self, failure: &Failure) -> bool {
        self.n_attempts >= MAX_ATTEMPTS && !is_refusal(failure)
    }

    fn end(&mut self, terminal: ArbiterAction) -> Vec<ArbiterAction> {
        let mut actions = Vec::new();
        let moving = self.moving.take();
        if self.stage == Stage::Streaming && moving.as_ref().is_none_or(|moving| moving.source_lost.is_none()) {
            actions.push(ArbiterAction::Close);
        }
        if moving.is_some() {
            actions.push(ArbiterAction::Detach);
        }
        self.stage = Stage::Ended;
        actions.push(terminal);
        actions
    }
}

/// Another pair may agree where this one did not, so an incompatible peer is worth another placement.
pub fn is_retried(failure: &Failure) -> bool {
    failure.is_retryable() || matches!(failure, Failure::Incompatible(_))
}

/// An instance that was full when it was asked has begun nothing.
fn is_refusal(failure: &Failure) -> bool {
    matches!(failure, Failure::Busy(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MOVE_DEADLINE: Nanos = Nanos::from_secs(2);

    fn arbiter() -> Arbiter {
        Arbiter::new(1, MOVE_DEADLINE)
    }

    fn lost(epoch: Epoch) -> ArbiterFact {
        let failure = Failure::InstanceLost("reset".into());
        ArbiterFact::Failed {
            epoch,
            failure,
            blamed: Some(InstanceId::new("prefill-0")),
        }
    }

    fn token(epoch: u32, index: u32) -> ArbiterFact {
        ArbiterFact::Token {
            epoch: Epoch(epoch),
            choice: 0,
            index,
        }
    }

    /// A request that has delivered token 0 in epoch 1 and is moving in epoch 2.
    fn moving() -> Arbiter {
        let mut arbiter = arbiter();
        arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
        assert_eq!(
            arbiter.apply(Nanos::ZERO, ArbiterFact::MoveWanted),
            [ArbiterAction::RefuseMove("its prompt is being computed")]
        );
        arbiter.apply(Nanos::ZERO, token(1, 0));
        assert_eq!(
            arbiter.apply(Nanos::ZERO, ArbiterFact::MoveWanted),
            [ArbiterAction::Attach(Epoch(2))]
        );
        arbiter
    }

    #[test]
    fn a_lost_instance_costs_a_new_epoch_and_three_in_a_row_end_it() {
        let mut arbiter = arbiter();
        for attempt in 1..=MAX_ATTEMPTS {
            assert_eq!(
                arbiter.apply(Nanos::ZERO, ArbiterFact::Placed),
                [ArbiterAction::Open(Epoch(attempt))]
            );
            let actions = arbiter.apply(Nanos::ZERO, lost(Epoch(attempt)));
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
    fn refusals_are_not_counted_and_their_end_is_that_nobody_had_room() {
        let mut arbiter = arbiter();
        for epoch in 1..=10 * MAX_ATTEMPTS {
            arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
            let full = ArbiterFact::Failed {
                epoch: Epoch(epoch),
                failure: Failure::Busy("full".into()),
                blamed: Some(InstanceId::new("decode-0")),
            };
            let actions = arbiter.apply(Nanos::ZERO, full);
            assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Place]);
            assert_eq!(arbiter.n_attempts(), 0);
        }
        let actions = arbiter.apply(Nanos::ZERO, ArbiterFact::NoRoom);
        assert!(
            matches!(&actions[..], [ArbiterAction::Fail(Failure::Busy(_))]),
            "{actions:?}"
        );
    }

    #[test]
    fn a_new_token_restores_the_attempts() {
        let mut arbiter = arbiter();
        for index in 0..20 {
            let ArbiterAction::Open(epoch) = arbiter.apply(Nanos::ZERO, ArbiterFact::Placed)[0] else {
                panic!("no stream")
            };
            assert_eq!(
                arbiter.apply(Nanos::ZERO, token(epoch.0, index)),
                [ArbiterAction::Deliver]
            );
            assert_eq!(
                arbiter.apply(Nanos::ZERO, lost(epoch)),
                [ArbiterAction::Close, ArbiterAction::Place]
            );
        }
    }

    #[test]
    fn a_lost_source_is_not_heard_while_its_destination_is_awaited() {
        let mut arbiter = moving();
        assert_eq!(arbiter.apply(Nanos::ZERO, lost(Epoch(1))), [ArbiterAction::Close]);
        assert_eq!(arbiter.apply(Nanos::ZERO, token(1, 1)), [ArbiterAction::Discard]);
        assert!(arbiter.apply(Nanos::ZERO, lost(Epoch(1))).is_empty());
        assert!(
            arbiter
                .apply(Nanos::ZERO, ArbiterFact::MoveCancelled { epoch: Epoch(1) })
                .is_empty()
        );
        assert_eq!(
            arbiter.apply(Nanos::ZERO, token(2, 1)),
            [ArbiterAction::Settle, ArbiterAction::Deliver]
        );
    }

    /// Found by the simulation: the words of the first epoch were dropped after the second resume, and the next ones came
    /// with a gap.
    #[test]
    fn a_source_resumed_twice_is_heard_in_all_its_epochs() {
        let mut arbiter = moving();
        let busy = |epoch| ArbiterFact::Failed {
            epoch: Epoch(epoch),
            failure: Failure::Busy("full".into()),
            blamed: None,
        };
        let resumed = |epoch| [ArbiterAction::Detach, ArbiterAction::Resume(Epoch(epoch))];
        assert_eq!(arbiter.apply(Nanos::ZERO, busy(2)), resumed(3));
        arbiter.apply(Nanos::ZERO, ArbiterFact::MoveWanted);
        assert_eq!(arbiter.apply(Nanos::ZERO, busy(4)), resumed(5));
        let mut hear = |epoch, index| arbiter.apply(Nanos::ZERO, token(epoch, index));
        assert_eq!(hear(1, 1), [ArbiterAction::Deliver]);
        assert_eq!(hear(2, 2), [ArbiterAction::Discard], "of a move that failed");
        assert_eq!(hear(3, 2), [ArbiterAction::Deliver]);
        assert_eq!(hear(1, 3), [ArbiterAction::Discard], "it has been heard in a newer one");
        assert_eq!(hear(5, 3), [ArbiterAction::Deliver]);
    }

    #[test]
    fn what_cannot_succeed_is_not_tried_again() {
        for failure in [
            Failure::Invalid("too long".into()),
            Failure::Internal("bug".into()),
            Failure::Cancelled,
        ] {
            let mut arbiter = arbiter();
            arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
            let actions = arbiter.apply(
                Nanos::ZERO,
                ArbiterFact::Failed {
                    epoch: Epoch(1),
                    failure: failure.clone(),
                    blamed: None,
                },
            );
            assert_eq!(actions, [ArbiterAction::Close, ArbiterAction::Fail(failure)]);
        }
    }

    #[test]
    fn without_room_the_end_says_whether_it_had_begun() {
        let actions = arbiter().apply(Nanos::ZERO, ArbiterFact::NoRoom);
        assert!(
            matches!(&actions[..], [ArbiterAction::Fail(Failure::Busy(_))]),
            "{actions:?}"
        );
        let mut arbiter = arbiter();
        arbiter.apply(Nanos::ZERO, ArbiterFact::Placed);
        arbiter.apply(Nanos::ZERO, lost(Epoch(1)));
        let actions = arbiter.apply(Nanos::ZERO, ArbiterFact::NoRoom);
        assert!(
            matches!(&actions[..], [ArbiterAction::Fail(Failure::InstanceLost(_))]),
            "{actions:?}"
        );
    }

    #[test]
    fn the_first_word_of_the_destination_settles_and_the_source_is_not_heard_any_more() {
        for word in [
            token(2, 1),
            ArbiterFact::Joined { epoch: Epoch(2) },
            // Its number was seen already, and yet it settles.
            token(2, 0),
        ] {
            let mut arbiter = moving();
            assert_eq!(arbiter.apply(Nanos(1), word)[0], ArbiterAction::Settle);
            assert_eq!(arbiter.apply(Nanos(2), token(1, 2)), [ArbiterAction::Discard]);
            assert!(arbiter.apply(Nanos(2), lost(Epoch(1))).is_empty());
            assert_eq!((arbiter.epoch(), arbiter.n_moves()), (Epoch(2), 1));
        }
    }

    #[test]
    fn a_failed_destination_lets_the_source_go_on_in_a_newer_epoch() {
        let mut arbiter = moving();
        assert_eq!(
            arbiter.apply(Nanos(1), lost(Epoch(2))),
            [ArbiterAction::Detach, ArbiterAction::Resume(Epoch(3))]
        );
        // What it said before the word reached it counts, what the destination said does not.
        assert_eq!(arbiter.apply(Nanos(2), token(1, 1)), [ArbiterAction::Deliver]);
        assert_eq!(arbiter.apply(Nanos(2), token(2, 2)), [ArbiterAction::Discard]);
        let failure = Failure::InstanceLost("unknown here".into());
        let resume_failed = ArbiterFact::ResumeFailed {
            epoch: Epoch(3),
            failure,
        };
        let mut unheard = arbiter.clone();
        assert_eq!(
            unheard.apply(Nanos(3), resume_failed.clone()),
            [ArbiterAction::Close, ArbiterAction::Place]
        );
        // Once it is heard in the epoch it was told of it, whatever became of the answer.
        assert_eq!(arbiter.apply(Nanos(3), token(3, 2)), [ArbiterAction::Deliver]);
        assert!(arbiter.apply(Nanos(4), resume_failed).is_empty());
    }

    #[test]
    fn a_paused_move_has_a_deadline_and_a_lost_source_waits_for_the_destination() {
        let mut arbiter = moving();
        assert_eq!(arbiter.next_tick(), None);
        arbiter.apply(Nanos::from_secs(1), ArbiterFact::Moving { epoch: Epoch(1) });
        assert_eq!(arbiter.next_tick(), Some(Nanos::from_secs(3)));
        assert!(arbiter.apply(Nanos::from_secs(2), ArbiterFact::Tick).is_empty());
        assert_eq!(
            arbiter.apply(Nanos::from_secs(3), ArbiterFact::Tick),
            [ArbiterAction::Detach, ArbiterAction::Resume(Epoch(3))]
        );
        let mut arbiter = moving();
        assert_eq!(
            arbiter.apply(Nanos::from_secs(1), lost(Epoch(1))),
            [ArbiterAction::Close]
        );
        assert_eq!(
            arbiter.apply(Nanos::from_secs(3), ArbiterFact::Tick),
            [ArbiterAction::Detach, ArbiterAction::Place]
        );
    }

    proptest! {
        /// Under any facts from any epoch, the client sees indexes 0, 1, 2, ... of each choice and at most one terminal
        /// state, after which nothing is open; at most one stream speaks and at most one move is attached.
        #[test]
        fn tokens_come_once_in_order_and_one_end(
            facts in prop::collection::vec((0u8..14, 0u32..4, 0u32..2, 0u32..6), 0..80),
        ) {
            let mut arbiter = Arbiter::new(2, MOVE_DEADLINE);
            let (mut delivered, mut n_ends, mut is_open, mut is_attached) = ([0u32; 2], 0, false, false);
            for (at, (kind, epoch_back, choice, index)) in (0..).zip(facts) {
                let now = Nanos::from_millis(at * 300);
                let epoch = Epoch(arbiter.newest_epoch().0.saturating_sub(epoch_back));
                let failure = Failure::InstanceLost("gone".into());
                let fact = match kind {
                    0 if arbiter.stage == Stage::Placing => ArbiterFact::Placed,
                    0 | 1 => ArbiterFact::Token { epoch, choice, index: delivered[choice as usize] },
                    2 => ArbiterFact::Token { epoch, choice, index },
                    3 => lost(epoch),
                    4 => ArbiterFact::Failed { epoch, failure: Failure::Busy("full".into()), blamed: None },
                    5 if index == 0 => ArbiterFact::Finished { epoch, finish: Finish::Length },
                    6 if index == 0 => ArbiterFact::ClientGone,
                    7 if index == 0 => ArbiterFact::DeadlinePassed,
                    8 => ArbiterFact::MoveWanted,
                    9 => ArbiterFact::Moving { epoch },
                    10 => ArbiterFact::MoveCancelled { epoch },
                    11 => ArbiterFact::Joined { epoch },
                    12 => ArbiterFact::ResumeFailed { epoch, failure },
                    13 => ArbiterFact::Tick,
                    _ => continue,
                };
                let ended_before = arbiter.is_ended();
                let token = match &fact {
                    ArbiterFact::Token { choice, index, .. } => Some((*choice, *index)),
                    _ => None,
                };
                for action in arbiter.apply(now, fact) {
                    match action {
                        ArbiterAction::Deliver => {
                            let (choice, index) = token.expect("only tokens are delivered here");
                            prop_assert_eq!(index, delivered[choice as usize]);
                            delivered[choice as usize] += 1;
                        }
                        ArbiterAction::Open(_) => {
                            prop_assert!(!is_open && !is_attached && !ended_before);
                            is_open = true;
                        }
                        ArbiterAction::Close => {
                            prop_assert!(is_open);
                            is_open = false;
                        }
                        ArbiterAction::Attach(_) => {
                            prop_assert!(is_open && !is_attached);
                            is_attached = true;
                        }
                        ArbiterAction::Detach => {
                            prop_assert!(is_attached);
                            is_attached = false;
                        }
                        ArbiterAction::Settle => {
                            prop_assert!(is_attached);
                            (is_open, is_attached) = (true, false);
                        }
                        ArbiterAction::Resume(_) => prop_assert!(is_open && !is_attached),
                        ArbiterAction::Finish(_) | ArbiterAction::Fail(_) => {
                            prop_assert!(!ended_before);
                            n_ends += 1;
                        }
                        ArbiterAction::Place | ArbiterAction::Discard | ArbiterAction::RefuseMove(_) => {}
                    }
                }
                prop_assert_eq!(arbiter.n_delivered().collect::<Vec<_>>(), delivered);
                prop_assert!(n_ends <= 1);
                prop_assert_eq!(arbiter.is_ended(), n_ends == 1);
                prop_assert!(!(arbiter.is_ended() && (is_open || is_attached)));
                // Whoever is silent has somebody who owes a word: a stream that is open, or the placement.
                prop_assert!(arbiter.is_ended() || is_open || is_attached || arbiter.stage == Stage::Placing);
                prop_assert!(is_open || !is_attached || arbiter.next_tick().is_some(), "a lost source with no deadline");
            }
        }
    }
}
