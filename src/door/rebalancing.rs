//! Asks the rebalancer what should move, and says it or has it done. It decides nothing itself.

use std::sync::Arc;
use std::time::Duration;

use baton_scheduler::ids::RequestId;
use baton_scheduler::placement::ClusterView;
use baton_scheduler::rebalance::{MoveProposal, RebalanceConfig, Rebalancer, RunningRequest};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::move_metrics::MoveMetrics;
use super::moves::{MoveReason, OpenRequest, OpenRequests, RequestStage};

/// How often the rebalancer is asked.
const ROUND: Duration = Duration::from_millis(250);

/// What is done with the rebalancer's proposals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rebalancing {
    /// They are logged.
    Advise,
    /// They are carried out.
    Act,
}

/// Until `shutdown`.
pub async fn keep_balanced(
    cluster: Arc<Cluster>,
    requests: OpenRequests,
    rebalancing: Rebalancing,
    metrics: MoveMetrics,
    shutdown: CancellationToken,
) {
    let mut rebalancer = Rebalancer::new(RebalanceConfig::default());
    let mut rounds = tokio::time::interval(ROUND);
    let mut moves: JoinSet<(RequestId, bool)> = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = rounds.tick() => {}
            Some(ended) = moves.join_next(), if !moves.is_empty() => {
                if let Ok((request, has_moved)) = ended {
                    rebalancer.ended(cluster.now(), request, has_moved);
                }
            }
        }
        let open = requests.all();
        let waiting = cluster.waiting();
        let now = cluster.now();
        let proposal = cluster.with_view(|view| {
            let running: Vec<RunningRequest> = open.iter().filter_map(|request| running(view, request)).collect();
            rebalancer.propose(now, view, &running, waiting.as_ref())
        });
        let Some(MoveProposal {
            request,
            from,
            to,
            reason,
        }) = proposal
        else {
            continue;
        };
        let Some(open) = open.into_iter().find(|open| open.id == request) else {
            continue;
        };
        tracing::info!(request_id = %request, label = %open.label, %from, %to, ?reason, ?rebalancing, "should move");
        let done = match rebalancing {
            Rebalancing::Advise => "advised",
            Rebalancing::Act => "ordered",
        };
        metrics.proposed(reason.as_str(), done);
        // So that it is not proposed again in the next round.
        rebalancer.ended(now, request, true);
        if rebalancing == Rebalancing::Act {
            moves.spawn(async move {
                let moved = open.move_to(Some(to), MoveReason::Rebalance).await;
                (request, moved.is_ok())
            });
        }
    }
}

/// As the rebalancer sees it, if it generates.
fn running(view: &ClusterView, request: &OpenRequest) -> Option<RunningRequest> {
    let progress = request.progress();
    let instance = progress.decode.filter(|_| progress.stage == RequestStage::Decode)?;
    let info = &view.instances().get(&instance)?.info;
    let n_tokens = request.n_prompt_tokens + progress.n_output_tokens / request.n_choices;
    Some(RunningRequest {
        id: request.id,
        n_blocks: info.n_blocks_for(n_tokens) * request.n_choices,
        instance,
        n_choices: request.n_choices,
        needs_version: request.needs_version,
        priority: request.priority,
    })
}
