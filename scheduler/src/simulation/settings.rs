//! What a seed draws before it runs: the cluster, its limits, and what goes wrong. Small, so that things run short.

use super::FaultKind;
use super::door::Door;
use super::engine::Engine;
use super::instance::Instance;
use super::memory::Memory;
use super::random::{Random, mix};
use super::workload::Kind;
use crate::batch::{BatchConfig, BatchScheduler, PrefixCaching, SlidingWindow};
use crate::ids::{Fingerprint, InstanceId, Nanos, Role};
use crate::layer_groups::LayerGroups;
use crate::placement::{Disaggregation, POLICIES, policy};
use crate::rebalance::{RebalanceConfig, Rebalancer};
use crate::transfer::EndsBy;

#[derive(Clone, Debug)]
pub(super) struct Settings {
    seed: u64,
    pub(super) roles: Vec<Role>,
    pub(super) n_blocks: usize,
    pub(super) block_size: usize,
    n_layers: usize,
    pub(super) max_num_seqs: usize,
    max_batch_tokens: usize,
    prefix_caching: PrefixCaching,
    pub(super) fingerprint: Fingerprint,
    policy: &'static str,
    disaggregation: Disaggregation,
    rebalances: bool,
    pub(super) workload: Kind,
    /// At any time.
    pub(super) n_faults: usize,
    /// At a moment of a move or a join, and at one of the parties to it.
    pub(super) n_aimed_faults: usize,
    /// Of a hundred aimed faults, those of the request's own client.
    pub(super) client_percent: u64,
    /// Of a hundred things that happen seldom, those that a fault follows.
    pub(super) aim_percent: u64,
    /// Of a hundred moves given up, those that are soon tried again.
    pub(super) again_percent: u64,
    pub(super) progress_deadline: Nanos,
    pub(super) stall_deadline: Nanos,
    pub(super) resume_deadline: Nanos,
    pub(super) queue_wait: Nanos,
    pub(super) call_timeout: Nanos,
    /// Kinds that this run has.
    pub(super) faults: Vec<FaultKind>,
    pub(super) between_moves: Nanos,
    max_stall: Nanos,
    max_waiting: usize,
    pub(super) move_deadline: Nanos,
    /// Of a message on a quick link.
    pub(super) most_delay: Nanos,
    pub(super) heartbeat: Nanos,
    /// A link carries a block of a layer in four times this.
    pub(super) unit_time: Nanos,
}

impl Settings {
    pub(super) fn draw(random: &mut Random) -> Settings {
        let mut roles = vec![
            random.pick(&[Role::Decode, Role::Mixed]),
            random.pick(&[Role::Decode, Role::Mixed]),
        ];
        roles.extend((0..random.between(0, 2)).map(|_| Role::Prefill));
        roles.extend((0..random.between(0, 1)).map(|_| random.pick(&[Role::Decode, Role::Mixed])));
        let block_size = random.between(2, 5) as usize;
        let max_num_seqs = random.between(4, 12) as usize;
        // The longest request has 36 tokens of prompt and 24 of output; some pools have room for little more.
        let most = random.pick(&[90, 400]);
        let n_tokens = random.between(64, most) as usize;
        let n_blocks = n_tokens.div_ceil(block_size);
        let injected: Vec<FaultKind> = FaultKind::ALL
            .into_iter()
            .filter(|kind| {
                let is_planned = [FaultKind::NoRoom, FaultKind::ClientLeaves, FaultKind::DeadlinePasses];
                !is_planned.contains(kind)
            })
            .collect();
        let mut faults: Vec<FaultKind> = injected
            .iter()
            .copied()
            .filter(|kind| random.percent(if *kind == FaultKind::DoorDies { 30 } else { 50 }))
            .collect();
        if faults.is_empty() {
            faults.push(random.pick(&injected));
        }
        let mut settings = Settings {
            seed: random.next(),
            roles,
            n_blocks,
            block_size,
            n_layers: random.between(1, 2) as usize,
            max_num_seqs,
            max_batch_tokens: random.between(max_num_seqs as u64, 64) as usize,
            prefix_caching: if random.percent(80) {
                PrefixCaching::On
            } else {
                PrefixCaching::Off
            },
            fingerprint: Fingerprint([7; 32]),
            policy: random.pick(&POLICIES),
            disaggregation: random.pick(&[Disaggregation::Auto, Disaggregation::ALWAYS, Disaggregation::ALWAYS]),
            rebalances: random.percent(50),
            workload: Kind {
                n_requests: random.between(100, 110) as usize,
                span: Nanos::from_secs(random.between(5, 10)),
                max_model_len: 64.min(n_blocks * block_size),
                max_n: max_num_seqs.min(4) as u32,
                leaving_percent: random.pick(&[2, 5, 40]),
                hurried_percent: random.pick(&[2, 5, 40]),
                patience_ms: random.pick(&[50, 200, 1500]),
            },
            n_faults: random.between(6, 12) as usize,
            n_aimed_faults: random.between(0, 40) as usize,
            client_percent: random.pick(&[40, 90]),
            aim_percent: 15,
            again_percent: 0,
            progress_deadline: Nanos::from_millis(random.pick(&[30, 300, 3000])),
            stall_deadline: Nanos::from_millis(random.pick(&[100, 1000, 4000])),
            resume_deadline: Nanos::from_millis(random.pick(&[500, 5000])),
            queue_wait: Nanos::from_millis(random.pick(&[1000, 8000])),
            call_timeout: Nanos::from_millis(random.pick(&[200, 2000])),
            faults,
            between_moves: Nanos::from_millis(random.pick(&[3, 10, 30, 200])),
            heartbeat: Nanos::from_millis(random.pick(&[2, 20, 200])),
            max_stall: Nanos::from_millis(random.pick(&[20, 1000])),
            max_waiting: random.pick(&[1, 2, 8]),
            move_deadline: Nanos::from_millis(random.pick(&[30, 300, 2000])),
            most_delay: Nanos::from_millis(random.pick(&[1, 10, 60])),
            unit_time: Nanos(random.pick(&[20_000, 200_000, 1_000_000])),
        };
        if random.percent(50) {
            settings.become_stormy(random);
        }
        settings
    }

    /// Everything together that makes words of one move come late into the next: moves all the time, long delays, little
    /// patience, and calls and links that fail.
    fn become_stormy(&mut self, random: &mut Random) {
        self.n_blocks = 400usize.div_ceil(self.block_size);
        self.workload.max_model_len = 64;
        (self.workload.leaving_percent, self.workload.hurried_percent) = (5, 5);
        self.workload.patience_ms = 1500;
        (self.aim_percent, self.again_percent) = (60, 90);
        self.n_aimed_faults = 60;
        self.between_moves = Nanos::from_millis(3);
        self.most_delay = Nanos::from_millis(60);
        self.call_timeout = Nanos::from_millis(200);
        self.move_deadline = Nanos::from_millis(random.pick(&[30, 100, 2000, 2000]));
        self.unit_time = Nanos(random.pick(&[200_000, 1_000_000]));
        for kind in [FaultKind::CallLost, FaultKind::LinkSlow] {
            if !self.faults.contains(&kind) {
                self.faults.push(kind);
            }
        }
    }

    pub(super) fn new_door(&self, life: u64) -> Door {
        let policy = policy(self.policy, self.disaggregation).expect("a policy of the list");
        let rebalancer = self.rebalances.then(|| Rebalancer::new(RebalanceConfig::default()));
        Door::new(life, policy, rebalancer)
    }

    /// A fifth of the clusters serve a model whose layers all have a window, two fifths one with windows beside full layers.
    fn layer_groups(&self) -> LayerGroups {
        let window = Some(6 + (self.seed / 5 % 24) as usize);
        let pattern = match self.seed % 5 {
            0 => vec![window],
            1 => vec![window, None],
            2 => vec![window, None, window],
            _ => vec![None],
        };
        LayerGroups::of_windows(&pattern.repeat(self.n_layers))
    }

    pub(super) fn new_instance(&self, i: usize) -> Instance {
        let random = mix(self.seed ^ i as u64);
        let mut config = BatchConfig::new(self.n_blocks, self.block_size, self.fingerprint);
        config.max_num_seqs = self.max_num_seqs;
        config.max_batch_tokens = self.max_batch_tokens;
        config.max_model_len = self.workload.max_model_len;
        config.max_waiting = self.max_waiting;
        config.max_deferred_reservations = 3;
        config.max_defer = Nanos::from_millis(500);
        config.max_stall = self.max_stall;
        config.prefix_caching = self.prefix_caching;
        let layer_groups = self.layer_groups();
        let window = |n_tokens| SlidingWindow {
            n_tokens,
            grain: 4,
            slack: 6,
        };
        config.windows = layer_groups.windows().iter().map(|kind| kind.map(window)).collect();
        // Some of those with windowed layers beside full ones have less room than if they gave nothing up.
        let n_sparing = config.n_blocks_to_run(config.max_model_len).max(2 * self.n_blocks);
        config.n_blocks = match (self.seed / 120).is_multiple_of(2) {
            true => self.n_blocks * config.n_groups(),
            false => n_sparing.min(self.n_blocks * config.n_groups()),
        };
        let memory = Memory::new(layer_groups, config.windows.clone(), config.n_blocks, self.block_size);
        let scheduler = BatchScheduler::new(config).expect("limits that work together");
        Instance {
            id: InstanceId::new(&format!("instance-{i}")),
            incarnation: 1,
            is_up: true,
            role: self.roles[i],
            numerics_class: if random.is_multiple_of(8) { "other" } else { "usual" },
            ends_by: if (random / 8).is_multiple_of(2) {
                EndsBy::Source
            } else {
                EndsBy::Destination
            },
            slowness: 100 + random / 16 % 200,
            engine: Engine::new(scheduler, memory),
            tasks: Default::default(),
            movers: Default::default(),
            prefills: Default::default(),
            registered: Default::default(),
            hung_until: None,
            backlog: Default::default(),
            is_member: false,
            report_arrival: Nanos::ZERO,
            has_to_tell_all: true,
        }
    }
}
