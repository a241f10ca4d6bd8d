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
mod tests;
