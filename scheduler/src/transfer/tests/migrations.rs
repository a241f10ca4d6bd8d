//! Both ends of a migration against each other, over a bounded link that may be cut, while the group of choices decodes,
//! ends and is preempted. The front door is played in a few lines: it hears the destination, or tells the source to go on.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::ids::Epoch;

const TRANSFER: TransferId = TransferId(7);

/// The group of choices at the source, as far as a move sees it.
#[derive(Debug)]
struct Group {
    n_prompt: u32,
    block_size: u32,
    /// Tokens of each choice, and whether it has ended.
    outputs: Vec<(u32, bool)>,
    is_paused: bool,
    is_preempted: bool,
}

impl Group {
    fn n_prompt_blocks(&self) -> u32 {
        self.n_prompt / self.block_size
    }

    fn n_kv(&self, choice: usize) -> u32 {
        self.n_prompt + self.outputs[choice].0 - 1
    }

    fn is_movable(&self) -> bool {
        !self.is_preempted && self.outputs.iter().any(|(_, has_ended)| !has_ended)
    }

    fn ends(&self, from: &[Vec<u32>], whole: bool) -> Vec<u32> {
        let least = |choice: usize| *from[choice].iter().min().unwrap();
        (0..from.len())
            .map(|choice| match (self.outputs[choice].1, whole) {
                (true, _) => self.n_prompt_blocks().max(least(choice)),
                (false, false) => (self.n_kv(choice) / self.block_size).max(least(choice)),
                (false, true) => self.n_kv(choice).div_ceil(self.block_size),
            })
            .collect()
    }
}

/// What is on its way to the destination.
#[derive(Debug)]
enum Message {
    Kv(KvRange),
    State,
    Progress,
    End(Option<Failure>),
}

#[derive(Debug)]
struct World {
    group: Group,
    source: MigrationSource,
    destination: Destination,
    plan: TransferPlan,
    /// First choice that went on when the destination reserved: it receives the prompt for all.
    holder: usize,
    asked: Option<MigrationAction>,
    link: VecDeque<Message>,
    is_cut: bool,
    owed: Vec<OwedBlocks>,
    written: BTreeMap<(u32, u32, u32), u32>,
    n_joins: u32,
    n_fails: u32,
    n_releases: u32,
    n_moving: u32,
    n_cancelled: u32,
    n_resumed: u32,
    has_sent_state: bool,
    has_given_up: bool,
    now: Nanos,
}

impl World {
    fn new(group: Group, plan: TransferPlan, limits: MigrationLimits) -> World {
        let holder = group.outputs.iter().position(|(_, has_ended)| !has_ended).unwrap();
        let (source, first) = MigrationSource::new(plan.clone(), limits);
        let mut destination = Destination::migration(TRANSFER, plan.clone(), DEADLINE, Nanos::ZERO);
        let ends_by = EndsBy::Source;
        destination.apply(Nanos::ZERO, DestinationFact::Accepted { ends_by });
        let mut world = World {
            group,
            source,
            destination,
            plan,
            holder,
            asked: None,
            link: VecDeque::new(),
            is_cut: false,
            owed: Vec::new(),
            written: BTreeMap::new(),
            n_joins: 0,
            n_fails: 0,
            n_releases: 0,
            n_moving: 0,
            n_cancelled: 0,
            n_resumed: 0,
            has_sent_state: false,
            has_given_up: false,
            now: Nanos::ZERO,
        };
        world.obey_source(first);
        world
    }

    fn tell_source(&mut self, fact: MigrationFact) {
        let actions = self.source.apply(self.now, fact);
        self.obey_source(actions);
    }

    fn obey_source(&mut self, actions: Vec<MigrationAction>) {
        for action in actions {
            assert_eq!(self.n_releases, 0, "{action:?} after the release");
            match action {
                MigrationAction::PinFull { .. } | MigrationAction::Pause { .. } => {
                    assert!(self.asked.is_none(), "the engine is asked one thing at a time");
                    self.asked = Some(action);
                }
                MigrationAction::SayMoving => self.n_moving += 1,
                MigrationAction::SendKv(range, pacing) => {
                    assert_eq!(pacing == Pacing::Urgent, self.group.is_paused);
                    self.link.push_back(Message::Kv(range));
                }
                MigrationAction::SendState => {
                    assert!(self.group.is_paused && !self.has_sent_state);
                    self.has_sent_state = true;
                    self.owed = (0..self.group.outputs.len())
                        .map(|choice| match self.group.outputs[choice].1 {
                            false => OwedBlocks::All(self.group.n_kv(choice).div_ceil(self.group.block_size)),
                            true if choice == self.holder => OwedBlocks::Shared(self.group.n_prompt_blocks()),
                            true => OwedBlocks::Shared(0),
                        })
                        .collect();
                    self.link.push_back(Message::State);
                }
                MigrationAction::SendProgress => self.link.push_back(Message::Progress),
                MigrationAction::SendEnd(failure) => self.link.push_back(Message::End(failure)),
                MigrationAction::ResumeDecoding(_) => {
                    self.n_resumed += 1;
                    self.group.is_paused = false;
                    self.asked = None;
                }
                MigrationAction::SayCancelled(_) => self.n_cancelled += 1,
                MigrationAction::GiveUp(_) => self.has_given_up = true,
                MigrationAction::Release => {
                    self.n_releases += 1;
                    self.asked = None;
                }
            }
        }
    }

    fn answer(&mut self) {
        let Some(asked) = self.asked.take() else { return };
        let interrupted = MigrationFact::Interrupted(Failure::Busy("not running".into()));
        let fact = match asked {
            _ if !self.group.is_movable() => interrupted,
            MigrationAction::PinFull { from } => MigrationFact::Full {
                end: self.group.ends(&from, false),
            },
            MigrationAction::Pause { from } => {
                self.group.is_paused = true;
                MigrationFact::Paused {
                    end: self.group.ends(&from, true),
                }
            }
            other => panic!("{other:?} is no question"),
        };
        self.tell_source(fact);
    }

    /// One step of the engine: a token for each choice that goes on; `ends` says which of them ends with it.
    fn step(&mut self, ends: u32) {
        if self.group.is_paused || self.group.is_preempted {
            return;
        }
        for (choice, (n_tokens, has_ended)) in (0..).zip(&mut self.group.outputs) {
            if !*has_ended {
                *n_tokens += 1;
                *has_ended = ends & (1 << choice) != 0;
            }
        }
    }

    fn deliver(&mut self) {
        let Some(message) = self.link.pop_front() else { return };
        let is_end = matches!(message, Message::End(_));
        let fact = match message {
            Message::Kv(range) => DestinationFact::Kv {
                transfer: TRANSFER,
                range,
            },
            Message::State => DestinationFact::State {
                owed: self.owed.clone(),
            },
            Message::Progress => DestinationFact::Progress { n_steps: 1 },
            Message::End(failure) => DestinationFact::Ended { failure },
        };
        self.tell_destination(fact);
        if !is_end && self.n_releases == 0 {
            self.tell_source(MigrationFact::Sent);
        }
    }

    fn tell_destination(&mut self, fact: DestinationFact) {
        for action in self.destination.apply(self.now, fact) {
            match action {
                DestinationAction::Write(range) => {
                    for block in range.first_block..range.end_block() {
                        let key = (range.choice, range.layer, block);
                        *self.written.entry(key).or_default() += 1;
                    }
                }
                DestinationAction::Join => {
                    self.n_joins += 1;
                    assert!(self.group.is_paused, "the group decodes on both sides");
                    self.check_written();
                }
                DestinationAction::Fail(_) => self.n_fails += 1,
                DestinationAction::Refuse(why) => panic!("refused: {why:?}"),
                DestinationAction::Deliver | DestinationAction::Finish => panic!("{action:?} in a migration"),
                DestinationAction::Close => {}
            }
        }
    }

    /// Everything owed was written, and nothing twice.
    fn check_written(&self) {
        assert!(self.written.values().all(|&n| n == 1), "{:?}", self.written);
        for (choice, owed) in (0..).zip(&self.owed) {
            let (OwedBlocks::All(end) | OwedBlocks::Shared(end)) = *owed;
            for layer in 0..self.plan.layer_groups.len() as u32 {
                for block in self.plan.first_block(choice, layer)..end {
                    assert!(
                        self.written.contains_key(&(choice, layer, block)),
                        "block {block} of choice {choice}"
                    );
                }
            }
        }
    }

    fn cut(&mut self) {
        if !std::mem::replace(&mut self.is_cut, true) {
            self.link.clear();
            self.tell_destination(DestinationFact::Dropped { reason: "cut".into() });
            self.tell_source(MigrationFact::Dropped);
        }
    }

    /// What the front door does once it has heard the destination's end, or its joining.
    fn front_door(&mut self) {
        if self.n_joins > 0 {
            self.tell_source(MigrationFact::Gone);
        } else if self.n_fails > 0 {
            self.tell_source(MigrationFact::Resume(Epoch(3)));
        }
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.asked.is_some() {
                self.answer();
            } else if !self.link.is_empty() && !self.is_cut {
                self.deliver();
            } else {
                break;
            }
        }
        self.front_door();
    }
}

fn limits() -> impl Strategy<Value = MigrationLimits> {
    (1u32..4, 1u32..4, 0u32..5).prop_map(|(max_in_flight, max_blocks_per_frame, max_stages)| MigrationLimits {
        max_in_flight,
        max_blocks_per_frame,
        stall_deadline: DEADLINE,
        resume_deadline: DEADLINE,
        max_stages,
    })
}

/// A group, and what a destination that knows a little less of it has reserved.
fn groups() -> impl Strategy<Value = (Group, TransferPlan)> {
    let choice = (1u32..12, 0u32..6, 0u32..4, prop::bool::weighted(0.2));
    let choices = prop::collection::vec(choice, 1..4);
    // Of the layers of the second group nobody sees the first blocks.
    let layers = prop_oneof![
        prop::collection::vec(Just(0u32), 1..4),
        Just(vec![0, 1]),
        Just(vec![1, 0, 1])
    ];
    let unseen = 0u32..6;
    (1u32..12, 1u32..5, layers, unseen, 0u32..5, choices).prop_map(
        |(n_prompt, block_size, layer_groups, n_unseen, n_slack, mut choices)| {
            let n_groups = *layer_groups.iter().max().unwrap() as usize + 1;
            let shortest = choices
                .iter()
                .filter(|choice| !choice.3)
                .map(|(n_tokens, n_unknown, ..)| n_tokens.saturating_sub(*n_unknown).max(1))
                .min();
            let n_unseen = n_unseen.min((n_prompt + shortest.unwrap_or(1) - 1) / block_size);
            choices[0].3 &= choices.len() > 1;
            if choices.iter().all(|choice| choice.3) {
                choices[0].3 = false;
            }
            let n_prompt_blocks = n_prompt / block_size;
            let mut outputs = Vec::new();
            let mut plans = Vec::new();
            let mut has_holder = false;
            for (n_tokens, n_unknown, n_hits, has_ended) in choices {
                outputs.push((n_tokens, has_ended));
                plans.push(if has_ended {
                    ChoicePlan {
                        first_blocks: vec![n_prompt_blocks; n_groups],
                        n_blocks: n_prompt_blocks,
                    }
                } else {
                    let n_known = n_tokens.saturating_sub(n_unknown).max(1);
                    let n_kv = n_prompt + n_known - 1;
                    let shared = if has_holder { n_prompt_blocks } else { 0 };
                    has_holder = true;
                    let first = shared.max(n_hits).min(n_kv / block_size);
                    ChoicePlan {
                        first_blocks: [first, first.max(n_unseen)][..n_groups].to_vec(),
                        n_blocks: n_kv.div_ceil(block_size) + n_slack,
                    }
                });
            }
            let group = Group {
                n_prompt,
                block_size,
                outputs,
                is_paused: false,
                is_preempted: false,
            };
            let plan = TransferPlan {
                layer_groups,
                choices: plans,
            };
            (group, plan)
        },
    )
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Step(u32),
    Answer,
    Deliver,
    Tick,
    Preempt,
    Cut,
    ClientGone,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => prop_oneof![9 => Just(0u32), 1 => 0u32..8].prop_map(Event::Step),
        4 => Just(Event::Answer),
        10 => Just(Event::Deliver),
        1 => Just(Event::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happens in whatever order: the group goes on in exactly one place, everything owed is written exactly
    /// once before the join, and the source lets go exactly once.
    #[test]
    fn a_group_goes_on_in_exactly_one_place(
        (group, plan) in groups(),
        limits in limits(),
        mut events in prop::collection::vec(event(), 0..60),
        blow in prop::option::of((0usize..60, prop_oneof![Just(Event::Cut), Just(Event::Preempt), Just(Event::ClientGone)])),
    ) {
        if let Some((at, blow)) = blow {
            events.insert(at.min(events.len()), blow);
        }
        let mut world = World::new(group, plan, limits);
        let mut is_gone = false;
        for event in events {
            match event {
                Event::Step(ends) => world.step(ends),
                Event::Answer => world.answer(),
                Event::Deliver => world.deliver(),
                Event::Tick => world.tell_source(MigrationFact::Tick),
                Event::Preempt => world.group.is_preempted |= !world.group.is_paused,
                Event::Cut => world.cut(),
                Event::ClientGone => {
                    is_gone = true;
                    world.link.clear();
                    world.tell_source(MigrationFact::Gone);
                    world.tell_destination(DestinationFact::Cancelled);
                }
            }
            prop_assert!(world.link.len() <= limits.max_in_flight as usize + 1);
        }
        world.settle();
        prop_assert_eq!(world.n_releases, 1);
        prop_assert!(world.source.is_closed());
        prop_assert!(world.n_joins <= 1 && world.n_fails <= 1 && world.n_moving <= 1 && world.n_resumed <= 1);
        if is_gone {
            return Ok(());
        }
        prop_assert_eq!(world.n_joins + world.n_fails, 1);
        prop_assert_eq!(world.n_joins == 1, world.group.is_paused, "it goes on in one place");
        prop_assert!(world.n_joins == 0 || world.n_resumed + world.n_cancelled == 0);
        // Until the state is sent, the source needs nobody's word, and says so.
        prop_assert_eq!(!world.has_sent_state, world.n_cancelled == 1);
        prop_assert!(!world.has_given_up);
    }
}

const PLAIN_LIMITS: MigrationLimits = MigrationLimits {
    max_in_flight: 2,
    max_blocks_per_frame: 2,
    stall_deadline: DEADLINE,
    resume_deadline: DEADLINE,
    max_stages: MAX_STAGES,
};

fn plain() -> World {
    let group = Group {
        n_prompt: 4,
        block_size: 2,
        outputs: vec![(3, false)],
        is_paused: false,
        is_preempted: false,
    };
    let plan = TransferPlan {
        layer_groups: vec![0],
        choices: vec![ChoicePlan {
            first_blocks: vec![0],
            n_blocks: 6,
        }],
    };
    World::new(group, plan, PLAIN_LIMITS)
}

#[test]
fn a_paused_group_that_hears_nothing_is_given_up_once() {
    let mut world = plain();
    while !world.has_sent_state {
        world.answer();
        world.deliver();
    }
    world.cut();
    assert!(world.group.is_paused, "after the state only the front door decides");
    world.now = DEADLINE;
    let deadline = world.source.next_deadline();
    assert_eq!(deadline, Some(DEADLINE));
    world.tell_source(MigrationFact::Tick);
    assert!(world.has_given_up && world.source.is_closed());
    assert_eq!((world.n_releases, world.n_resumed), (1, 0));
}

#[test]
fn a_stalled_link_before_the_state_lets_the_group_go_on() {
    let mut world = plain();
    world.answer();
    world.now = DEADLINE;
    world.tell_source(MigrationFact::Tick);
    assert_eq!((world.n_releases, world.n_cancelled), (1, 1));
    assert!(!world.group.is_paused);
}

#[test]
fn an_answer_that_comes_after_the_end_changes_nothing() {
    let mut world = plain();
    world.cut();
    let late = MigrationFact::Full { end: vec![2] };
    world.tell_source(late);
    world.tell_source(MigrationFact::Paused { end: vec![3] });
    assert_eq!((world.n_releases, world.n_cancelled, world.n_moving), (1, 1, 0));
}

#[test]
fn a_stage_that_has_outgrown_the_room_is_not_sent() {
    let mut world = plain();
    // Its three full blocks are one more than was reserved.
    world.plan.choices[0].n_blocks = 2;
    world.group.outputs[0].0 = 4;
    let mut outgrown = World::new(world.group, world.plan, PLAIN_LIMITS);
    outgrown.answer();
    assert!(
        matches!(&outgrown.link[0], Message::End(Some(Failure::Busy(_)))),
        "{:?}",
        outgrown.link
    );
    assert_eq!(
        (outgrown.link.len(), outgrown.n_cancelled, outgrown.n_releases),
        (1, 1, 1)
    );
}
