//! Sends the sessions of a workload when they are due. Turning what came back into a report is [`super::samples`]'s business.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinSet;

use super::endpoint::{LoadClient, Prepared};
use super::samples::{Run, Sample};
use super::server::Target;
use super::workload::{Arrivals, PromptMaker, Session, Turn, WorkloadSpec};

/// Sessions whose requests are made before they are due. Making them is not what is measured, and a long trace of long
/// prompts would not fit the memory at once.
const PREPARED_SESSIONS: usize = 1024;

/// Arrivals later than this are a mistake in the rate.
const LAST_ARRIVAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// A turn that only needs to be sent.
struct PreparedTurn {
    index: usize,
    pause: Duration,
    input_len: u64,
    output_len: u32,
    request: Prepared,
}

struct PreparedSession {
    index: usize,
    at: Duration,
    turns: Vec<PreparedTurn>,
}

/// Warms `target` up, then sends the workload.
///
/// # Errors
/// A warm-up request that fails, or arrivals that no clock counts.
pub async fn run(target: &Target, spec: &WorkloadSpec, n_warmup: usize) -> anyhow::Result<Run> {
    let maker = PromptMaker {
        vocabulary: target.vocabulary.clone(),
        seed: spec.seed,
    };
    for index in 0..n_warmup as u64 {
        let request = target.client.prepare(&spec.warm_up(index), &maker);
        target
            .client
            .send(request, Instant::now())
            .await
            .with_context(|| format!("server {}: warm-up request", target.address))?;
    }
    let sessions = spec.sessions();
    let n_sessions = sessions.len();
    let last = sessions.last().map(|session| session.at).unwrap_or_default();
    anyhow::ensure!(
        last <= LAST_ARRIVAL,
        "the last request would be due only after {last:?}"
    );
    let progress = ProgressBar::new(spec.n_requests as u64).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {elapsed_precise}, {per_sec}")
            .context("progress bar")?,
    );
    let sender = Sender {
        client: target.client.clone(),
        progress: progress.clone(),
    };
    let (prepared, queue) = mpsc::channel(PREPARED_SESSIONS);
    let (ready, is_ready) = oneshot::channel();
    let client = target.client.clone();
    let preparing = tokio::task::spawn_blocking(move || prepare(sessions, &client, &maker, &prepared, ready));
    // An error only says that all were made at once.
    let _ = is_ready.await;
    let samples = match spec.arrivals {
        Arrivals::Closed { concurrency } => closed(sender, queue, concurrency.min(n_sessions)).await,
        Arrivals::Open { .. } | Arrivals::Recorded { .. } => open(sender, queue).await,
    };
    preparing.await.context("making requests panicked")?;
    progress.finish_and_clear();
    let mut samples = samples?;
    samples.sort_by_key(|sample| sample.index);
    Ok(Run { samples, n_sessions })
}

/// Makes the requests, in order, and says so when as many as fit are made. Ends early if nobody sends them any more.
fn prepare(
    sessions: Vec<Session>,
    client: &LoadClient,
    maker: &PromptMaker,
    prepared: &mpsc::Sender<PreparedSession>,
    ready: oneshot::Sender<()>,
) {
    let mut ready = Some(ready);
    for (index, session) in sessions.into_iter().enumerate() {
        let turns = session.turns.iter().map(|turn: &Turn| PreparedTurn {
            index: turn.index,
            pause: turn.pause,
            input_len: turn.input_len(),
            output_len: turn.output_len,
            request: client.prepare(turn, maker),
        });
        let session = PreparedSession {
            index,
            at: session.at,
            turns: turns.collect(),
        };
        if index == PREPARED_SESSIONS
            && let Some(ready) = ready.take()
        {
            let _ = ready.send(());
        }
        if prepared.blocking_send(session).is_err() {
            return;
        }
    }
}

/// What every session needs.
#[derive(Clone)]
struct Sender {
    client: LoadClient,
    progress: ProgressBar,
}

impl Sender {
    /// Sends the turns of a session, due `due` after `origin`. A turn follows one that failed as it follows any other, so
    /// that the load does not depend on the answers.
    async fn session(&self, session: PreparedSession, origin: Instant, mut due: Duration) -> Vec<Sample> {
        let mut samples = Vec::with_capacity(session.turns.len());
        for turn in session.turns {
            if !turn.pause.is_zero() {
                due += turn.pause;
                tokio::time::sleep_until((origin + due).into()).await;
            }
            let now = Instant::now();
            let outcome = self.client.send(turn.request, now).await;
            let (started, ended) = (now - origin, origin.elapsed());
            samples.push(Sample {
                index: turn.index,
                session: session.index,
                input_len: turn.input_len,
                output_len: turn.output_len,
                started,
                delay: started.saturating_sub(due),
                ended,
                outcome,
            });
            due = ended;
            self.progress.inc(1);
        }
        samples
    }
}

async fn closed(
    sender: Sender,
    queue: mpsc::Receiver<PreparedSession>,
    concurrency: usize,
) -> anyhow::Result<Vec<Sample>> {
    let queue = Arc::new(Mutex::new(queue));
    let origin = Instant::now();
    let mut lanes = JoinSet::new();
    for _ in 0..concurrency {
        let (sender, queue) = (sender.clone(), queue.clone());
        lanes.spawn(async move {
            let mut samples = Vec::new();
            loop {
                // In a closed loop a session is due when the one before it has ended.
                let due = origin.elapsed();
                let next = queue.lock().await.recv().await;
                let Some(session) = next else { return samples };
                samples.extend(sender.session(session, origin, due).await);
            }
        });
    }
    let mut samples = Vec::new();
    while let Some(lane) = lanes.join_next().await {
        samples.extend(lane.context("a lane of the load generator panicked")?);
    }
    Ok(samples)
}

async fn open(sender: Sender, mut queue: mpsc::Receiver<PreparedSession>) -> anyhow::Result<Vec<Sample>> {
    let origin = Instant::now();
    let mut sessions = JoinSet::new();
    while let Some(session) = queue.recv().await {
        let due = session.at;
        tokio::time::sleep_until((origin + due).into()).await;
        let sender = sender.clone();
        sessions.spawn(async move { sender.session(session, origin, due).await });
    }
    let mut samples = Vec::new();
    while let Some(session) = sessions.join_next().await {
        samples.extend(session.context("a session of the load generator panicked")?);
    }
    Ok(samples)
}
