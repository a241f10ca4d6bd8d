//! Moves that the front door asks for: rounds over instances that should be empty, and what the rebalancer proposes.

use super::{MAX_MOVES_OF_INSTANCE, ROUND};
use crate::arbiter::ArbiterFact;
use crate::ids::{InstanceId, Role};
use crate::placement::{MOVE_PROTOCOL_VERSION, ViewEvent, choose_destination, min_protocol_version};
use crate::rebalance::{MoveProposal, RunningRequest};
use crate::request::ChoiceState;
use crate::simulation::Simulation;
use crate::simulation::network::{AtDoor, Event};

impl Simulation<'_> {
    /// Asks a request to go to `to`, or where the view says. False when it is refused.
    pub(in crate::simulation) fn order_move(
        &mut self,
        request: usize,
        to: Option<InstanceId>,
        is_advice: bool,
    ) -> bool {
        let Some(driver) = self.door.drivers.get(&request) else {
            return false;
        };
        let Some(stream) = driver.speaking.filter(|_| driver.order.is_none()) else {
            return false;
        };
        let planned = &self.planned[request].request;
        let from = self.instances[self.streams[stream].to.instance].id.clone();
        let n_choices = driver.choices.iter().filter(|choice| choice.finish.is_none()).count() as u32;
        let longest = driver
            .choices
            .iter()
            .map(|choice| choice.output.len())
            .max()
            .unwrap_or(0);
        let n_tokens = planned.prompt_ids.len() + longest;
        let view = &self.door.view;
        let needs_version = min_protocol_version(&planned.sampling).max(MOVE_PROTOCOL_VERSION);
        let Some(source) = view.instances().get(&from) else {
            return false;
        };
        let to = match to {
            Some(to) => view
                .instances()
                .get(&to)
                .filter(|state| {
                    to != from
                        && state.info.role != Role::Prefill
                        && state.info.fingerprint == source.info.fingerprint
                        && !state.is_draining()
                })
                .map(|state| state.info.id.clone()),
            None => {
                let n_blocks = n_choices * (source.info.n_blocks_for(n_tokens as u32) + source.info.n_groups());
                choose_destination(view, &from, n_blocks, n_choices, needs_version)
            }
        };
        let Some(to) = to.filter(|to| self.door.members.contains_key(to)) else {
            return false;
        };
        self.door.view.apply(ViewEvent::MoveStarted(planned.id, to.clone()));
        self.door.drivers.get_mut(&request).expect("checked above").order = Some((to, is_advice));
        self.tell_arbiter(request, ArbiterFact::MoveWanted);
        self.aim(request);
        true
    }

    /// Requests that generate now, with where.
    pub(in crate::simulation) fn generating(&self) -> Vec<(usize, usize)> {
        let drivers = self.door.drivers.iter();
        let generating = drivers.filter_map(|(&request, driver)| {
            let has_begun = |choice: &ChoiceState| !choice.output.is_empty() || choice.finish.is_some();
            let is_free = driver.order.is_none() && driver.choices.iter().all(has_begun);
            let stream = driver.speaking.filter(|_| is_free)?;
            Some((request, self.streams[stream].to.instance))
        });
        generating.collect()
    }

    /// Empties instances that should be empty, and does what the rebalancer proposes.
    pub(super) fn door_round(&mut self) {
        if !self.is_over() {
            let round = Event::Door(self.door.life, AtDoor::Round);
            self.queue.push(self.now.saturating_add(ROUND), round);
        }
        let instances = self.door.view.instances().values();
        let emptied: Vec<InstanceId> = instances
            .filter(|state| state.is_draining() || state.info.role == Role::Prefill)
            .map(|state| state.info.id.clone())
            .collect();
        let generating = self.generating();
        for id in emptied {
            let n_under_way = self.door.view.moves().len();
            let here = generating.iter().filter(|&&(request, i)| {
                self.instances[i].id == id && self.door.pauses.get(&request).is_none_or(|until| self.now >= *until)
            });
            let room = MAX_MOVES_OF_INSTANCE.saturating_sub(n_under_way);
            for request in Vec::from_iter(here.map(|&(request, _)| request).take(room)) {
                self.order_move(request, None, false);
            }
        }
        self.rebalance(&generating);
    }

    fn rebalance(&mut self, generating: &[(usize, usize)]) {
        let running = generating.iter().map(|&(request, i)| {
            let planned = &self.planned[request];
            let request = &planned.request;
            let open = self.door.view.open_placements().get(&request.id);
            RunningRequest {
                priority: planned.priority,
                id: request.id,
                instance: self.instances[i].id.clone(),
                n_blocks: open.map_or(1, |open| open.n_blocks),
                n_choices: request.sampling.n,
                needs_version: min_protocol_version(&request.sampling),
            }
        });
        let running: Vec<RunningRequest> = running.collect();
        let Some(rebalancer) = &mut self.door.rebalancer else {
            return;
        };
        if let Some(MoveProposal { request, to, .. }) = rebalancer.propose(self.now, &self.door.view, &running, None) {
            let request = self.number_of(request);
            self.n_proposals += 1;
            self.order_move(request, Some(to), true);
        }
    }

    pub(in crate::simulation) fn first_round(&mut self) {
        let round = Event::Door(self.door.life, AtDoor::Round);
        self.queue.push(self.now.saturating_add(ROUND), round);
    }
}
