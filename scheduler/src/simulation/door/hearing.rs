//! What reaches the front door, made into facts for the arbiters of its requests.

use crate::arbiter::{ArbiterAction, ArbiterFact};
use crate::ids::{Epoch, InstanceId};
use crate::placement::ViewEvent;
use crate::request::{Failure, Finish};
use crate::simulation::Simulation;
use crate::simulation::network::{AtDoor, EventStream, Report, Said};

impl Simulation<'_> {
    pub(in crate::simulation) fn at_door(&mut self, event: AtDoor) {
        match event {
            AtDoor::Answered { stream } => {
                let request = self.streams[stream].request;
                let Some(driver) = self.door.drivers.get_mut(&request) else {
                    return;
                };
                if driver.opening == Some(stream) {
                    driver.opening = None;
                    driver.speaking = Some(stream);
                } else if driver.attaching == Some(stream) {
                    driver.attaching = None;
                    driver.attached = Some(stream);
                }
            }
            AtDoor::NoAnswer { stream } => self.no_answer(stream),
            AtDoor::Word { stream, epoch, said } => {
                let EventStream {
                    is_cut,
                    is_open_at_door,
                    ..
                } = self.streams[stream];
                if is_open_at_door && !is_cut {
                    self.door_hears(stream, epoch, said);
                } else if !is_cut && self.random.percent(30) {
                    self.door_hears_late(stream, epoch, said);
                }
            }
            AtDoor::Broken { stream } => self.door_hears_break(stream),
            AtDoor::ResumeAnswered {
                request,
                epoch,
                is_told,
            } => {
                let Some(driver) = self.door.drivers.get_mut(&request) else {
                    return;
                };
                if driver.resuming == Some(epoch) {
                    driver.resuming = None;
                    if !is_told {
                        let failure = Failure::InstanceLost("no answer to the call".to_owned());
                        self.tell_arbiter(request, ArbiterFact::ResumeFailed { epoch, failure });
                    }
                }
            }
            AtDoor::Joined { life } => {
                let id = self.instances[life.instance].id.clone();
                let info = self.instance_info(life);
                self.door.members.insert(id, life);
                self.door.view.apply(ViewEvent::Joined(info));
                self.place_waiting();
            }
            AtDoor::Left { life } => {
                let id = self.instances[life.instance].id.clone();
                self.door
                    .view
                    .apply(ViewEvent::Left(id.clone(), crate::ids::Incarnation(life.incarnation)));
                if self.door.members.get(&id) == Some(&life) {
                    self.door.members.remove(&id);
                }
                self.place_waiting();
            }
            AtDoor::Report { life, report } => {
                let id = self.instances[life.instance].id.clone();
                let incarnation = crate::ids::Incarnation(life.incarnation);
                let Report { load, prefix } = *report;
                self.door.view.apply(ViewEvent::Prefix(id.clone(), incarnation, prefix));
                self.door.view.apply(ViewEvent::Load(id, incarnation, load));
                self.place_waiting();
            }
            AtDoor::ArbiterTick { request } => {
                let due = self
                    .door
                    .drivers
                    .get(&request)
                    .and_then(|driver| driver.arbiter.next_tick());
                if due.is_some_and(|due| due <= self.now) {
                    self.tell_arbiter(request, ArbiterFact::Tick);
                }
            }
            AtDoor::QueueWait { request, placing } => {
                if self.is_placing(request, placing) {
                    self.door.drivers.get_mut(&request).expect("checked").placing = None;
                    self.tell_arbiter(request, ArbiterFact::NoRoom);
                }
            }
            AtDoor::TryAgain { request, placing } => {
                if self.is_placing(request, placing) {
                    self.place_waiting();
                }
            }
            AtDoor::DeadlinePasses { request } => self.deadline_passes(request),
            AtDoor::Round => self.door_round(),
        }
    }

    fn is_placing(&self, request: usize, placing: u32) -> bool {
        let driver = self.door.drivers.get(&request);
        driver.is_some_and(|driver| driver.placing == Some(placing))
    }

    fn blamed(&self, i: usize) -> Option<InstanceId> {
        Some(self.instances[i].id.clone())
    }

    fn no_answer(&mut self, stream: usize) {
        let EventStream {
            request, to, ref state, ..
        } = self.streams[stream];
        let epoch = state.epoch;
        let Some(driver) = self.door.drivers.get_mut(&request) else {
            return;
        };
        if driver.opening == Some(stream) {
            driver.opening = None;
        } else if driver.attaching == Some(stream) {
            driver.attaching = None;
        } else {
            return;
        }
        self.hang_up(Some(stream));
        let failure = Failure::InstanceLost("no answer to the call".to_owned());
        let blamed = self.blamed(to.instance);
        self.tell_arbiter(request, ArbiterFact::Failed { epoch, failure, blamed });
    }

    fn door_hears_break(&mut self, stream: usize) {
        let EventStream { request, to, .. } = self.streams[stream];
        let blamed = self.blamed(to.instance);
        let Some(driver) = self.door.drivers.get_mut(&request) else {
            return;
        };
        let failure = Failure::InstanceLost("its stream broke".to_owned());
        if driver.speaking == Some(stream) {
            let epoch = driver.arbiter.epoch();
            self.tell_arbiter(request, ArbiterFact::Failed { epoch, failure, blamed });
        } else if driver.attached == Some(stream) {
            driver.attached = None;
            let epoch = driver.arbiter.newest_epoch();
            self.hang_up(Some(stream));
            self.tell_arbiter(request, ArbiterFact::Failed { epoch, failure, blamed });
        } else {
            self.no_answer(stream);
        }
    }

    fn door_hears(&mut self, stream: usize, epoch: Epoch, said: Said) {
        let EventStream { request, to, .. } = self.streams[stream];
        let Some(driver) = self.door.drivers.get(&request) else {
            return;
        };
        let is_speaking = driver.speaking == Some(stream);
        if !is_speaking && driver.attached != Some(stream) {
            return;
        }
        match said {
            Said::Token { choice, token } => {
                let fact = ArbiterFact::Token {
                    epoch,
                    choice,
                    index: token.index,
                };
                self.take(request, fact, |simulation| {
                    simulation.deliver_token(request, choice, &token)
                });
            }
            Said::ChoiceFinished { choice, finish } => self.take_choice_finished(request, epoch, choice, finish),
            Said::Moving => {
                self.tell_arbiter(request, ArbiterFact::Moving { epoch });
                self.aim(request);
            }
            Said::MoveCancelled => self.tell_arbiter(request, ArbiterFact::MoveCancelled { epoch }),
            Said::Joined if is_speaking => {}
            Said::Joined => self.tell_arbiter(request, ArbiterFact::Joined { epoch }),
            Said::Ended(Ok(finish)) => {
                for choice in 0..driver.choices.len() {
                    let choices = self.door.drivers.get(&request).map(|driver| &driver.choices);
                    if choices.is_some_and(|choices| choices[choice].finish.is_none()) {
                        self.take_choice_finished(request, epoch, choice as u32, finish);
                    }
                }
                self.tell_arbiter(request, ArbiterFact::Finished { epoch, finish });
            }
            Said::Ended(Err((failure, blamed))) => {
                let blamed = blamed.unwrap_or(to.instance);
                let id = self.instances[blamed].id.clone();
                if matches!(failure, Failure::Busy(_)) && is_speaking {
                    self.door.view.apply(ViewEvent::Busy(id));
                }
                // The instance says cancelled only when its stream was closed, and ours is open.
                let failure = match failure {
                    Failure::Cancelled => Failure::InstanceLost("cancelled by the instance".to_owned()),
                    other => other,
                };
                let blamed = self.blamed(blamed);
                self.tell_arbiter(request, ArbiterFact::Failed { epoch, failure, blamed });
            }
        }
    }

    /// A word that was taken off a stream before that was closed, and told after: it must change nothing.
    fn door_hears_late(&mut self, stream: usize, epoch: Epoch, said: Said) {
        let EventStream { request, to, .. } = self.streams[stream];
        let blamed = self.blamed(to.instance);
        let fact = match said {
            Said::Token { choice, token } => ArbiterFact::Token {
                epoch,
                choice,
                index: token.index,
            },
            Said::ChoiceFinished { choice, .. } => ArbiterFact::ChoiceFinished { epoch, choice },
            Said::Moving => ArbiterFact::Moving { epoch },
            Said::MoveCancelled => ArbiterFact::MoveCancelled { epoch },
            Said::Joined => ArbiterFact::Joined { epoch },
            Said::Ended(Ok(finish)) => ArbiterFact::Finished { epoch, finish },
            Said::Ended(Err((failure, _))) => ArbiterFact::Failed { epoch, failure, blamed },
        };
        if let Some(driver) = self.door.drivers.get_mut(&request) {
            let before = driver.arbiter.clone();
            let actions = driver.arbiter.apply(self.now, fact.clone());
            let is_nothing = actions.iter().all(|action| *action == ArbiterAction::Discard);
            assert!(
                is_nothing && driver.arbiter == before,
                "request {request}: a word of a closed stream was heard: {fact:?} gave {actions:?}"
            );
            self.n_discarded += 1;
        }
    }

    fn take_choice_finished(&mut self, request: usize, epoch: Epoch, choice: u32, finish: Finish) {
        let fact = ArbiterFact::ChoiceFinished { epoch, choice };
        self.take(request, fact, |simulation| {
            simulation.deliver_finish(request, choice, finish)
        });
    }

    /// Applies what may have to be delivered.
    fn take(&mut self, request: usize, fact: ArbiterFact, deliver: impl FnOnce(&mut Self)) {
        let mut deliver = Some(deliver);
        for action in self.apply_counted(request, fact) {
            match action {
                ArbiterAction::Deliver => {
                    if let Some(deliver) = deliver.take() {
                        deliver(self);
                    }
                }
                ArbiterAction::Discard => self.n_discarded += 1,
                action => self.obey(request, action),
            }
        }
        self.set_tick(request);
    }

    fn deliver_token(&mut self, request: usize, choice: u32, token: &crate::request::Token) {
        self.client_takes_token(request, choice, token);
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        driver.choices[choice as usize].output.push(token.clone());
        let epoch = driver.arbiter.epoch();
        if driver.prefilled_in.replace(epoch) != Some(epoch) {
            self.door
                .view
                .apply(ViewEvent::PrefillDone(self.planned[request].request.id));
        }
    }

    fn deliver_finish(&mut self, request: usize, choice: u32, finish: Finish) {
        self.client_takes_finish(request, choice, finish);
        let driver = self.door.drivers.get_mut(&request).expect("an open request");
        driver.choices[choice as usize].finish = Some(finish);
    }
}
