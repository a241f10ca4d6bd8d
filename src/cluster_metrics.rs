//! What the instances count, exported by the scheduler process under the instance's name and role. It adds nothing up: a
//! token computed on one instance is counted there and nowhere else, so sums over instances are true of the cluster.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_scheduler::ids::InstanceId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::api::metrics::{MetricsRegistry, one_engine};
use crate::door::{Cluster, Member, MoveMetrics};
use crate::metric_names as names;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    instance: String,
    role: String,
}

impl Labels {
    fn of(member: &Member) -> Labels {
        Labels {
            instance: member.join.instance_id.clone(),
            role: member.join.role.clone(),
        }
    }
}

struct MemberCollector(Arc<Cluster>);

impl std::fmt::Debug for MemberCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemberCollector").finish_non_exhaustive()
    }
}

impl Collector for MemberCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let members = self.0.members();
        let counters: BTreeSet<&String> = members.iter().flat_map(|member| member.load.counters.keys()).collect();
        for name in counters {
            // The exposition adds `_total` to every counter.
            let full = format!("{}{}", names::INSTANCE_PREFIX, name.trim_end_matches("_total"));
            let mut family = encoder.encode_descriptor(&full, "Counted by the instance", None, MetricType::Counter)?;
            for member in &members {
                if let Some(&value) = member.load.counters.get(name) {
                    ConstCounter::new(value).encode(family.encode_family(&Labels::of(member))?)?;
                }
            }
        }
        let help = "1 while an instance is being emptied";
        let mut family = encoder.encode_descriptor(names::INSTANCE_DRAINING, help, None, MetricType::Gauge)?;
        for member in &members {
            let id = InstanceId::new(&member.join.instance_id);
            ConstGauge::new(i64::from(self.0.is_draining(&id))).encode(family.encode_family(&Labels::of(member))?)?;
        }
        let help = "1 while an instance's ledger of blocks adds up";
        let mut family = encoder.encode_descriptor(names::INSTANCE_LEDGER_WHOLE, help, None, MetricType::Gauge)?;
        for member in &members {
            let value = i64::from(member.load.ledger_whole);
            ConstGauge::new(value).encode(family.encode_family(&Labels::of(member))?)?;
        }
        Ok(())
    }
}

/// The sum of one counter of the instances, for those who know the cluster as one engine.
struct PreemptionsCollector(Arc<Cluster>);

impl std::fmt::Debug for PreemptionsCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreemptionsCollector").finish_non_exhaustive()
    }
}

impl Collector for PreemptionsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let members = self.0.members();
        let counters = members
            .iter()
            .map(|member| member.load.counters.get("preemptions_total"));
        let sum: u64 = counters.flatten().sum();
        let help = "Sequences that instances set back to make room";
        let counter = ConstCounter::new(sum);
        counter.encode(encoder.encode_descriptor(names::vllm::NUM_PREEMPTIONS, help, None, MetricType::Counter)?)
    }
}

/// Exports under vLLM's names what only the instances know, labelled as one engine.
pub fn register_aliases(registry: &MetricsRegistry, cluster: &Arc<Cluster>, model_name: &str) {
    let collector = Box::new(PreemptionsCollector(Arc::clone(cluster)));
    registry.with_labels(one_engine(model_name), |registry| {
        registry.register_collector(collector)
    });
}

/// Exports what the members of `cluster` report, and what moves come to.
pub fn register(registry: &MetricsRegistry, cluster: &Arc<Cluster>, moves: &MoveMetrics) {
    let moves = moves.clone();
    registry.register(names::MOVES, "Orders to move a request that ended", moves.moves);
    registry.register(
        names::MOVE_SECONDS,
        "Seconds from order to settlement of a move",
        moves.seconds,
    );
    registry.register(
        names::MOVE_PAUSE_SECONDS,
        "Seconds a moving request stood still, as the front door sees it",
        moves.pause_seconds,
    );
    registry.register(
        names::STALE_EVENTS,
        "Tokens and ends known already, or of an instance that no longer speaks",
        moves.stale,
    );
    registry.register(names::REPLAYS, "Placements after a request's first", moves.replays);
    registry.register(
        names::REBALANCE_PROPOSALS,
        "Moves the rebalancer proposed",
        moves.proposals,
    );
    registry.register_collector(Box::new(MemberCollector(Arc::clone(cluster))));
}
