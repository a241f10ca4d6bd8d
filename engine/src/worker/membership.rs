//! A worker's membership: one stream to a scheduler process, with load and prefix-cache changes; reopened until shutdown,
//! so that workers survive the scheduler's restart.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use baton_proto::PROTOCOL_VERSION;
use baton_proto::cluster::{self, registry_client::RegistryClient, registry_command::Command};
use baton_proto::convert::role_from_wire;
use baton_proto::link::LinkError;
use baton_scheduler::ids::Role;
use baton_scheduler::prefix_cache::PrefixEvent;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::service::WorkerService;
use super::transport::TransportKind;
use crate::engine::{Health, LoadReport};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Reports that may wait for the connection; a stalled scheduler gets the newest state when it reads again.
const MAX_REPORTS_WAITING: usize = 4;

/// How this worker is presented to the cluster.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Where the scheduler process is.
    pub scheduler: String,
    /// Where others reach this worker.
    pub advertise: String,
    /// Name of the served model.
    pub model: String,
    /// What changes while the worker lives.
    pub standing: Arc<Standing>,
}

/// What a worker is used for, and whether it wants to go. Outlives a membership, so that a restarted scheduler hears it.
#[derive(Debug)]
pub struct Standing {
    role: Mutex<Role>,
    leaving: AtomicBool,
    is_member: AtomicBool,
    drained: CancellationToken,
}

impl Standing {
    /// A worker that is used for `role` and stays.
    pub fn new(role: Role) -> Standing {
        Standing {
            role: Mutex::new(role),
            leaving: AtomicBool::new(false),
            is_member: AtomicBool::new(false),
            drained: CancellationToken::new(),
        }
    }

    /// What the worker is used for now.
    pub fn role(&self) -> Role {
        *self.role.lock()
    }

    /// From the next report on the worker asks to be emptied.
    pub fn leave(&self) {
        self.leaving.store(true, Relaxed);
    }

    /// Whether a scheduler process has accepted the worker and still listens.
    pub fn is_member(&self) -> bool {
        self.is_member.load(Relaxed)
    }

    /// Ends when the scheduler process has said that the worker is empty.
    pub async fn drained(&self) {
        self.drained.cancelled().await;
    }
}

/// Keeps the membership until `shutdown`; `on_welcome` is called each time the registry accepts it.
///
/// # Errors
/// When the scheduler's address is malformed. Everything else is tried again.
pub async fn join_registry(
    service: &WorkerService,
    membership: &Membership,
    shutdown: CancellationToken,
    mut on_welcome: impl FnMut(),
) -> Result<(), LinkError> {
    let link = &service.options().link;
    let channel = link.channel(&membership.scheduler)?;
    let mut backoff = FIRST_BACKOFF;
    // A scheduler process of the version before refuses ours and takes its own, which we speak too.
    let mut version = PROTOCOL_VERSION;
    loop {
        let client = RegistryClient::with_interceptor(channel.clone(), link.present_secret());
        let began = Instant::now();
        let _member = Member(&membership.standing);
        tokio::select! {
            ended = stay(service, membership, version, client, &mut on_welcome) => match ended {
                Ok(()) => tracing::warn!(scheduler = membership.scheduler, "the scheduler closed the membership"),
                Err(status) => {
                    tracing::warn!(
                        scheduler = membership.scheduler,
                        code = %status.code(),
                        reason = status.message(),
                        "no membership; trying again"
                    );
                    if status.code() == tonic::Code::FailedPrecondition {
                        version = 2 * PROTOCOL_VERSION - 1 - version;
                    }
                }
            },
            () = shutdown.cancelled() => return Ok(()),
        }
        backoff = if began.elapsed() > MAX_BACKOFF {
            FIRST_BACKOFF
        } else {
            (backoff * 2).min(MAX_BACKOFF)
        };
        tokio::select! {
            () = sleep(backoff) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
    }
}

/// Ends the membership on drop.
struct Member<'a>(&'a Standing);

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.0.is_member.store(false, Relaxed);
    }
}

type Client = RegistryClient<
    tonic::service::interceptor::InterceptedService<tonic::transport::Channel, baton_proto::link::PresentSecret>,
>;

async fn stay(
    service: &WorkerService,
    membership: &Membership,
    version: u32,
    mut client: Client,
    on_welcome: &mut impl FnMut(),
) -> Result<(), Status> {
    let (reports, receiver) = mpsc::channel(MAX_REPORTS_WAITING);
    let snapshot = service.engine().prefix_snapshot().await.unwrap_or_default();
    let mut reporter = Reporter {
        service,
        standing: &membership.standing,
        previous: service.engine().load(),
        sent: None,
        sent_at: Instant::now(),
    };
    let first = cluster::WorkerReport {
        join: Some(worker_join(service, membership, version)),
        load: Some(reporter.load(service.engine().load())),
        prefix: Some(prefix_to_wire(&snapshot)),
    };
    reports.try_send(first).expect("an empty channel takes a report");
    let link = &service.options().link;
    // Keepalive tells a scheduler process that was cut off, not one that hangs.
    let joining = timeout(
        link.connect_timeout + link.keepalive,
        client.join(ReceiverStream::new(receiver)),
    );
    let unanswered = |_| Status::deadline_exceeded("no answer to the call");
    let mut commands = joining.await.map_err(unanswered)??.into_inner();
    let mut ticks = interval(service.options().report_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            command = commands.message() => match command?.map(|command| command.command) {
                Some(Some(Command::Welcome(_))) => {
                    tracing::info!(scheduler = membership.scheduler, "joined the cluster");
                    membership.standing.is_member.store(true, Relaxed);
                    on_welcome();
                }
                Some(Some(Command::Role(role))) => match role_from_wire(&role) {
                    Ok(role) => {
                        tracing::info!(role = role.as_str(), "the role was changed");
                        *membership.standing.role.lock() = role;
                    }
                    Err(error) => tracing::warn!(%error, "a role that this version does not know"),
                },
                Some(Some(Command::Drained(_))) => membership.standing.drained.cancel(),
                Some(None) => {}
                None => return Ok(()),
            },
            _ = ticks.tick() => {
                let Some(report) = reporter.report().await else { continue };
                if reports.send(report).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

fn worker_join(service: &WorkerService, membership: &Membership, version: u32) -> cluster::WorkerJoin {
    let engine = service.engine();
    let (layout, batch) = (engine.layout(), engine.batch_config());
    let token_bytes = layout.layer_block_bytes() / layout.block_size;
    let most_blocks = (0..batch.n_groups()).map(|group| batch.most_blocks(group).unwrap_or(0) as u32);
    cluster::WorkerJoin {
        instance_id: service.identity().instance.to_string(),
        incarnation: service.identity().incarnation.0,
        role: membership.standing.role().as_str().to_owned(),
        address: membership.advertise.clone(),
        protocol_version: version,
        fingerprint: service.identity().fingerprint.0.to_vec(),
        numerics_class: service.identity().numerics_class.clone(),
        block_size: batch.block_size as u32,
        n_blocks_total: batch.n_blocks as u32,
        max_num_seqs: batch.max_num_seqs as u32,
        max_model_len: batch.max_model_len as u32,
        short_context: batch.short_context.unwrap_or(0),
        kv_bytes_per_token: (engine.layer_groups().n_layers() * token_bytes) as u64,
        most_blocks: most_blocks.collect(),
        pid: std::process::id(),
        model: membership.model.clone(),
    }
}

struct Reporter<'a> {
    service: &'a WorkerService,
    standing: &'a Standing,
    /// The engine's report at the last message.
    previous: LoadReport,
    sent: Option<cluster::WorkerLoad>,
    sent_at: Instant,
}

impl Reporter<'_> {
    /// What has changed since the last message, or a heartbeat when one is due.
    async fn report(&mut self) -> Option<cluster::WorkerReport> {
        // A full command queue keeps the events for the next time.
        let events = self.service.engine().take_prefix_events().await.unwrap_or_default();
        let load = self.load(self.service.engine().load());
        let is_due = self.sent_at.elapsed() >= self.service.options().heartbeat;
        if !is_due && events.is_empty() && self.sent.as_ref() == Some(&load) {
            return None;
        }
        self.sent_at = Instant::now();
        self.sent = Some(cluster::WorkerLoad {
            step_times: Vec::new(),
            ..load.clone()
        });
        let prefix = (!events.is_empty()).then(|| prefix_to_wire(&events));
        Some(cluster::WorkerReport {
            join: None,
            load: Some(load),
            prefix,
        })
    }

    fn load(&mut self, report: LoadReport) -> cluster::WorkerLoad {
        let batch = report.batch;
        let ledger = batch.ledger;
        let is_idle = batch.n_running + batch.n_waiting + batch.n_reserved + batch.n_handing_over == 0;
        let step_times = mean_step(&self.previous, &report).into_iter().collect();
        self.previous = report;
        cluster::WorkerLoad {
            n_running: report.batch.n_running as u32,
            n_waiting: report.batch.n_waiting as u32,
            n_blocks_free: ledger.free as u32,
            n_blocks_cached: ledger.cached as u32,
            n_prefill_tokens_pending: report.batch.n_pending_prefill_tokens as u64,
            n_steps: report.engine.n_steps,
            healthy: matches!(self.service.engine().health(), Health::Well),
            counters: counters(&report, self.service),
            ledger_whole: if is_idle {
                ledger.is_whole()
            } else {
                ledger.is_balanced()
            },
            step_times,
            leaving: self.standing.leaving.load(Relaxed),
            n_open: self.service.n_open() as u32,
        }
    }
}

/// The mean step between two reports: what the cost model is fitted to.
fn mean_step(before: &LoadReport, after: &LoadReport) -> Option<cluster::StepTime> {
    let n_steps = after
        .engine
        .n_steps
        .checked_sub(before.engine.n_steps)
        .filter(|&n| n > 0)?;
    let mean = |after: u64, before: u64| (after - before) / n_steps;
    Some(cluster::StepTime {
        n_prefill_tokens: mean(after.scheduler.n_prefill_tokens, before.scheduler.n_prefill_tokens) as u32,
        n_decode_tokens: mean(after.scheduler.n_decode_tokens, before.scheduler.n_decode_tokens) as u32,
        n_context_tokens: mean(after.engine.n_context_tokens, before.engine.n_context_tokens),
        duration_ns: mean(after.engine.forward_ns, before.engine.forward_ns),
    })
}

fn counters(report: &LoadReport, service: &WorkerService) -> HashMap<String, u64> {
    let (scheduler, engine, transfer) = (report.scheduler, report.engine, service.totals());
    let transport = service.transport_totals();
    let by_transport = TransportKind::ALL.into_iter().flat_map(|kind| {
        let name = kind.as_str().replace('-', "_");
        let (sent, received) = (
            transport.bytes_sent[kind as usize],
            transport.bytes_received[kind as usize],
        );
        [
            (format!("kv_bytes_sent_by_{name}_total"), sent),
            (format!("kv_bytes_received_by_{name}_total"), received),
        ]
    });
    [
        ("steps_total", engine.n_steps),
        ("steps_replayed_total", engine.n_replayed_steps),
        ("steps_ahead_total", engine.n_steps_ahead),
        ("step_nanoseconds_total", engine.forward_ns),
        ("host_gap_nanoseconds_total", engine.overhead_ns),
        ("prefill_tokens_total", scheduler.n_prefill_tokens),
        ("decode_tokens_total", scheduler.n_decode_tokens),
        ("prefix_hit_tokens_total", scheduler.n_prefix_hit_tokens),
        ("preemptions_total", scheduler.n_preemptions),
        ("sequences_finished_total", engine.n_finished),
        ("sequences_failed_total", engine.n_failed),
        ("sequences_cancelled_total", engine.n_cancelled),
        ("sequences_joined_total", engine.n_joined),
        ("kv_bytes_received_total", transfer.bytes_received),
        ("kv_bytes_sent_total", transfer.bytes_sent),
        ("kv_frames_received_total", transfer.n_frames_received),
        ("kv_frames_sent_total", transfer.n_frames_sent),
        ("kv_frames_early_total", transfer.n_early_frames),
        ("kv_frames_refused_total", transfer.n_frames_refused),
        ("kv_blocks_not_sent_total", transfer.n_blocks_not_sent),
        ("handoffs_received_total", transfer.n_received),
        ("handoffs_sent_total", transfer.n_sent),
        ("handoffs_failed_total", transfer.n_failed),
        ("handoffs_other_numerics_total", transfer.n_other_numerics),
        ("moves_in_total", transfer.n_moved_in),
        ("moves_out_total", transfer.n_moved_out),
        ("moves_failed_total", transfer.n_moves_failed),
        ("moves_resumed_total", transfer.n_resumed),
        ("moves_held_back_total", engine.n_held_back),
        ("kv_checksum_failures_total", transport.n_bad_checksums),
        ("kv_stale_total", transport.n_stale),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .chain(by_transport)
    .collect()
}

fn prefix_to_wire(events: &[PrefixEvent]) -> cluster::PrefixEvents {
    baton_proto::convert::prefix_events_to_wire(events)
}
