//! The front door: the production arbiter, and the least of a driver around it.

use baton_scheduler::arbiter::{Arbiter, ArbiterAction, ArbiterFact};
use baton_scheduler::ids::{Epoch, Nanos};
use baton_scheduler::request::{Failure, Finish};

use crate::wire::{CallStage, EventStream, Kind, Life, Opening, Output, ResumeCall, Said};
use crate::world::World;

pub const MOVE_DEADLINE: Nanos = Nanos::from_secs(2);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Door {
    pub is_up: bool,
    pub arbiter: Arbiter,
    /// What the client has.
    pub client: Vec<Output>,
    /// Whether the request ended well, once it has.
    pub ended: Option<bool>,
    pub must_place: bool,
    pub speaking: Option<usize>,
    pub attached: Option<usize>,
    pub resuming: Option<Epoch>,
    /// Where to, for the `Open` or `Attach` that follows.
    chosen: Option<(usize, Option<usize>)>,
}

/// Which of a door's two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ear {
    Speaking,
    Attached,
}

impl Door {
    pub fn new(n_choices: u32) -> Door {
        Door {
            is_up: true,
            arbiter: Arbiter::new(n_choices, MOVE_DEADLINE),
            client: vec![Output::default(); n_choices as usize],
            ended: None,
            must_place: true,
            speaking: None,
            attached: None,
            resuming: None,
            chosen: None,
        }
    }

    pub fn stream(&self, ear: Ear) -> Option<usize> {
        match ear {
            Ear::Speaking => self.speaking,
            Ear::Attached => self.attached,
        }
    }
}

impl World {
    pub fn place(&mut self, decode: usize, prefill: Option<usize>) {
        self.door.must_place = false;
        self.door.chosen = Some((decode, prefill));
        self.tell_arbiter(Nanos::ZERO, ArbiterFact::Placed);
    }

    pub fn want_move(&mut self, to: usize) {
        self.door.chosen = Some((to, None));
        self.tell_arbiter(Nanos::ZERO, ArbiterFact::MoveWanted);
    }

    pub fn tell_arbiter(&mut self, now: Nanos, fact: ArbiterFact) {
        let subject = match &fact {
            ArbiterFact::Token { choice, index, .. } => Some((*choice, Some(*index))),
            ArbiterFact::ChoiceFinished { choice, .. } => Some((*choice, None)),
            _ => None,
        };
        let before = self.door.arbiter.is_ended();
        for action in self.door.arbiter.apply(now, fact) {
            self.obey(action, subject);
        }
        if before && self.door.ended.is_none() {
            self.violate("the arbiter ended without telling the client");
        }
    }

    fn obey(&mut self, action: ArbiterAction, subject: Option<(u32, Option<u32>)>) {
        match action {
            ArbiterAction::Place => self.door.must_place = true,
            ArbiterAction::Open(epoch) => {
                let (decode, prefill) = self.door.chosen.take().expect("it was placed");
                let kind = match prefill {
                    Some(prefill) => Kind::Handoff {
                        prefill: self.life(prefill),
                    },
                    None => Kind::Local,
                };
                if self.door.speaking.is_some() {
                    self.violate("a stream was opened beside the one that speaks");
                }
                self.door.speaking = Some(self.call(decode, epoch, kind));
            }
            ArbiterAction::Attach(epoch) => {
                let (to, _) = self.door.chosen.take().expect("a move was wanted");
                let source = self.door.speaking.and_then(|stream| self.streams[stream].to);
                let kind = Kind::Attach {
                    source: source.expect("a request moves from where it speaks"),
                };
                self.door.attached = Some(self.call(to, epoch, kind));
            }
            ArbiterAction::Close => {
                self.hang_up(Ear::Speaking);
                self.door.resuming = None;
            }
            ArbiterAction::Detach => self.hang_up(Ear::Attached),
            ArbiterAction::Settle => {
                self.hang_up(Ear::Speaking);
                self.door.resuming = None;
                self.door.speaking = self.door.attached.take();
                if self.door.speaking.is_none() {
                    self.violate("a move settled on no stream");
                }
            }
            ArbiterAction::Resume(epoch) => {
                let source = self.door.speaking.and_then(|stream| self.streams[stream].to);
                let to: Life = source.expect("a source that can resume has its stream");
                self.door.resuming = Some(epoch);
                self.calls.push(ResumeCall {
                    to,
                    epoch,
                    stage: CallStage::Asked,
                });
            }
            ArbiterAction::Deliver => {
                let (choice, index) = subject.expect("only tokens and ends are delivered");
                let output = &mut self.door.client[choice as usize];
                let fits = !output.has_ended
                    && match index {
                        Some(index) => index == output.n_tokens,
                        None => output.n_tokens == self.bounds.max_tokens[choice as usize],
                    };
                match index {
                    Some(_) => output.n_tokens += 1,
                    None => output.has_ended = true,
                }
                if !fits || self.door.ended.is_some() {
                    self.violate("a token or an end reached the client twice, too early or too late");
                }
            }
            ArbiterAction::Discard | ArbiterAction::RefuseMove(_) => {}
            ArbiterAction::Finish(_) => {
                if self.door.client.iter().any(|output| !output.has_ended) {
                    self.violate("the request ended well before all its choices");
                }
                self.end(true);
            }
            ArbiterAction::Fail(failure) => {
                if matches!(failure, Failure::Internal(_) | Failure::Invalid(_)) {
                    self.violate("a fault became an internal error");
                }
                self.end(false);
            }
        }
    }

    fn end(&mut self, well: bool) {
        if self.door.ended.replace(well).is_some() {
            self.violate("the request ended twice");
        }
        if self.door.speaking.is_some() || self.door.attached.is_some() {
            self.violate("the request ended with a stream open");
        }
    }

    fn call(&mut self, instance: usize, epoch: Epoch, kind: Kind) -> usize {
        self.streams.push(EventStream {
            to: Some(self.life(instance)),
            opening: Some(Opening {
                epoch,
                known: self.door.client.clone(),
                kind,
            }),
            is_open_at_door: true,
            ..EventStream::default()
        });
        self.streams.len() - 1
    }

    pub fn hang_up(&mut self, ear: Ear) {
        let stream = match ear {
            Ear::Speaking => self.door.speaking.take(),
            Ear::Attached => self.door.attached.take(),
        };
        if let Some(stream) = stream {
            let stream = &mut self.streams[stream];
            stream.is_open_at_door = false;
            stream.words.clear();
            // A call that nobody answered yet is never served.
            stream.opening = None;
        }
    }

    /// The next word of a stream.
    pub fn door_hears(&mut self, ear: Ear) {
        let stream = self.door.stream(ear).expect("an open stream is heard");
        let to = self.streams[stream].to;
        let Some((epoch, said)) = self.streams[stream].words.pop_front() else {
            return;
        };
        let failed = |failure| ArbiterFact::Failed {
            epoch,
            failure,
            blamed: to.map(|life| crate::world::name(life.instance)),
        };
        let fact = match said {
            Said::Token { choice, index } => ArbiterFact::Token { epoch, choice, index },
            Said::ChoiceFinished { choice } => ArbiterFact::ChoiceFinished { epoch, choice },
            Said::Finished => ArbiterFact::Finished {
                epoch,
                finish: Finish::Length,
            },
            // The instance says cancelled only when its stream was closed, and ours is open.
            Said::Failed(Failure::Cancelled) => failed(Failure::InstanceLost("cancelled".into())),
            Said::Failed(failure) => failed(failure),
            Said::Moving => ArbiterFact::Moving { epoch },
            Said::MoveCancelled => ArbiterFact::MoveCancelled { epoch },
            Said::Joined => ArbiterFact::Joined { epoch },
        };
        self.tell_arbiter(Nanos::ZERO, fact);
    }

    /// A stream broke, or ended without a typed end.
    pub fn door_hears_break(&mut self, ear: Ear) {
        let stream = self.door.stream(ear).expect("an open stream breaks");
        let blamed = self.streams[stream].to.map(|life| crate::world::name(life.instance));
        let epoch = match ear {
            Ear::Speaking => self.door.arbiter.epoch(),
            Ear::Attached => {
                self.hang_up(Ear::Attached);
                self.door.arbiter.newest_epoch()
            }
        };
        let failure = Failure::InstanceLost("broken".into());
        self.tell_arbiter(Nanos::ZERO, ArbiterFact::Failed { epoch, failure, blamed });
    }

    /// The answer to a word that let a source go on, or that there is none.
    pub fn door_hears_answer(&mut self, epoch: Epoch, is_told: bool) {
        if self.door.resuming == Some(epoch) {
            self.door.resuming = None;
            if !is_told {
                let failure = Failure::InstanceLost("could not be told".into());
                self.tell_arbiter(Nanos::ZERO, ArbiterFact::ResumeFailed { epoch, failure });
            }
        }
    }

    /// The front door's process dies: all its streams close, and so does the client's.
    pub fn door_dies(&mut self) {
        self.hang_up(Ear::Speaking);
        self.hang_up(Ear::Attached);
        self.door.is_up = false;
        self.door.must_place = false;
        self.door.resuming = None;
        self.calls.clear();
    }
}
