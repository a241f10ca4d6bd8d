//! What a seed draws before it runs: the cluster, its limits, and what goes wrong. Small, so that things run short.

use super::FaultKind;
use super::door::Door;
use super::engine::Engine;
use super::instance::Instance;
use super::memory::Memory;
use super::random::{Random, mix};
use crate::batch::{BatchConfig, BatchScheduler, PrefixCaching};
use crate::ids::{Fingerprint, InstanceId, Nanos, Role};
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
    pub(super) max_model_len: usize,
    prefix_caching: PrefixCaching,
    pub(super) fingerprint: Fingerprint,
    policy: &'static str,
    disaggregation: Disaggregation,
    rebalances: bool,
    pub(super) n_requests: usize,
    pub(super) span: Nanos,
    pub(super) n_faults: usize,
    /// Kinds that this run has.
    pub(super) faults: Vec<FaultKind>,
    pub(super) between_moves: Nanos,
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
        let n_tokens = random.between(64, 400) as usize;
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
            .filter(|kind| random.percent(if *kind == FaultKind::DoorDies { 10 } else { 50 }))
            .collect();
        if faults.is_empty() {
            faults.push(random.pick(&injected));
        }
        Settings {
            seed: random.next(),
            roles,
            n_blocks,
            block_size,
            n_layers: random.between(1, 2) as usize,
            max_num_seqs,
            max_batch_tokens: random.between(max_num_seqs as u64, 64) as usize,
            max_model_len: 64.min(n_blocks * block_size),
            prefix_caching: if random.percent(80) {
                PrefixCaching::On
            } else {
                PrefixCaching::Off
            },
            fingerprint: Fingerprint([7; 32]),
            policy: random.pick(&POLICIES),
            disaggregation: random.pick(&[Disaggregation::Auto, Disaggregation::ALWAYS, Disaggregation::ALWAYS]),
            rebalances: random.percent(50),
            n_requests: random.between(100, 110) as usize,
            span: Nanos::from_secs(random.between(6, 12)),
            n_faults: random.between(5, 16) as usize,
            faults,
            between_moves: Nanos::from_millis(random.between(20, 300)),
        }
    }

    pub(super) fn new_door(&self, life: u64) -> Door {
        let policy = policy(self.policy, self.disaggregation).expect("a policy of the list");
        let rebalancer = self.rebalances.then(|| Rebalancer::new(RebalanceConfig::default()));
        Door::new(life, policy, rebalancer)
    }

    pub(super) fn new_instance(&self, i: usize) -> Instance {
        let random = mix(self.seed ^ i as u64);
        let mut config = BatchConfig::new(self.n_blocks, self.block_size, self.fingerprint);
        config.max_num_seqs = self.max_num_seqs;
        config.max_batch_tokens = self.max_batch_tokens;
        config.max_model_len = self.max_model_len;
        config.max_waiting = 8;
        config.max_deferred_reservations = 3;
        config.max_defer = Nanos::from_millis(500);
        config.max_stall = Nanos::from_secs(1);
        config.prefix_caching = self.prefix_caching;
        let scheduler = BatchScheduler::new(config).expect("limits that work together");
        let memory = Memory::new(self.n_layers, self.n_blocks, self.block_size);
        Instance {
            id: InstanceId::new(&format!("instance-{i}")),
            incarnation: 1,
            is_up: true,
            role: self.roles[i],
            numerics_class: if random % 8 == 0 { "other" } else { "usual" },
            ends_by: if random / 8 % 2 == 0 {
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
