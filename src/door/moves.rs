//! The requests open at this front door, as operators and the rebalancer see them, and the way to ask one to move.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_scheduler::ids::{InstanceId, RequestId};
use baton_scheduler::placement::min_protocol_version;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

/// Orders that may wait for a request's driver.
const MAX_ORDERS: usize = 4;

/// Who wants a request elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MoveReason {
    /// An operator named it.
    Operator,
    /// Its instance is being emptied.
    Drain,
    /// Its instance does not generate any more.
    Role,
    /// The rebalancer.
    Rebalance,
}

impl MoveReason {
    /// As a label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            MoveReason::Operator => "operator",
            MoveReason::Drain => "drain",
            MoveReason::Role => "role",
            MoveReason::Rebalance => "rebalance",
        }
    }
}

/// A move that has settled.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// Where it ran.
    pub from: InstanceId,
    /// Where it runs.
    pub to: InstanceId,
    /// From the order to the settlement.
    pub took: Duration,
}

/// Why a request was not moved. It goes on where it was, or elsewhere by a replay.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MoveError {
    /// No such request is open here.
    #[error("no request {0} is open here")]
    UnknownRequest(String),
    /// No such instance.
    #[error("no instance {found}, expected one of {known}")]
    UnknownInstance {
        /// The name.
        found: String,
        /// Those that there are.
        known: String,
    },
    /// It cannot be moved now, or not there.
    #[error("request cannot be moved: {0}")]
    Refused(String),
    /// The move was begun and given up.
    #[error("the move to {to} failed: {reason}")]
    Failed {
        /// The destination.
        to: InstanceId,
        /// Why.
        reason: String,
    },
}

/// An order to a request's driver.
pub(super) struct MoveOrder {
    /// `None`: the driver chooses.
    pub(super) to: Option<InstanceId>,
    pub(super) reason: MoveReason,
    pub(super) reply: oneshot::Sender<Result<Moved, MoveError>>,
}

impl MoveOrder {
    pub(super) fn refuse(self, error: MoveError) {
        // Whoever asked may have gone.
        let _ = self.reply.send(Err(error));
    }
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RequestStage {
    /// It waits to be placed.
    #[default]
    Queued,
    /// Its prompt is being computed.
    Prefill,
    /// Its prompt is being computed, and nothing comes after.
    Embed,
    /// It generates.
    Decode,
    /// It generates and moves.
    Moving,
}

impl RequestStage {
    /// As operators see it.
    pub const fn as_str(self) -> &'static str {
        match self {
            RequestStage::Queued => "queued",
            RequestStage::Prefill => "prefill",
            RequestStage::Embed => "embed",
            RequestStage::Decode => "decode",
            RequestStage::Moving => "moving",
        }
    }
}

/// What changes of an open request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestProgress {
    /// Where it stands.
    pub stage: RequestStage,
    /// Where it generates.
    pub decode: Option<InstanceId>,
    /// Where its prompt is computed.
    pub prefill: Option<InstanceId>,
    /// Where it moves.
    pub destination: Option<InstanceId>,
    /// Tokens generated, over all choices.
    pub n_output_tokens: u32,
    /// The newest epoch.
    pub epoch: u32,
    /// Moves settled.
    pub n_moves: u32,
}

/// A request open at this front door.
pub struct OpenRequest {
    /// Its identity.
    pub id: RequestId,
    /// The client's name for it.
    pub label: Arc<str>,
    /// Tokens of its prompt.
    pub n_prompt_tokens: u32,
    /// Its choices.
    pub n_choices: u32,
    /// Most tokens of a choice.
    pub max_tokens: u32,
    /// The oldest protocol that can say all of it.
    pub needs_version: u32,
    /// Lower is more urgent.
    pub priority: i32,
    /// When it came.
    pub opened_at: Instant,
    progress: Mutex<RequestProgress>,
    orders: mpsc::Sender<MoveOrder>,
}

impl OpenRequest {
    /// Where it stands now.
    pub fn progress(&self) -> RequestProgress {
        self.progress.lock().clone()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut RequestProgress)) {
        change(&mut self.progress.lock());
    }

    /// Moves the request to `to`, or where the driver thinks best. Ends when the move has settled or is off.
    ///
    /// # Errors
    /// Why it was not moved.
    pub async fn move_to(&self, to: Option<InstanceId>, reason: MoveReason) -> Result<Moved, MoveError> {
        let (reply, answer) = oneshot::channel();
        let order = MoveOrder { to, reason, reply };
        self.orders.try_send(order).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => MoveError::Refused(format!("{MAX_ORDERS} moves of it are waiting")),
            mpsc::error::TrySendError::Closed(_) => MoveError::UnknownRequest(self.id.to_string()),
        })?;
        answer
            .await
            .unwrap_or_else(|_| Err(MoveError::Refused("the request has ended".to_owned())))
    }
}

/// All open requests of a front door.
#[derive(Clone, Default)]
pub struct OpenRequests(Arc<Mutex<BTreeMap<RequestId, Arc<OpenRequest>>>>);

/// A request is listed as long as this lives.
pub(super) struct Listed {
    requests: OpenRequests,
    pub(super) request: Arc<OpenRequest>,
    pub(super) orders: mpsc::Receiver<MoveOrder>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.requests.0.lock().remove(&self.request.id);
    }
}

impl OpenRequests {
    pub(super) fn list(&self, submission: &super::Submission) -> Listed {
        let (orders, receiver) = mpsc::channel(MAX_ORDERS);
        let request = &submission.request;
        let open = Arc::new(OpenRequest {
            id: request.id,
            label: Arc::clone(&submission.label),
            n_prompt_tokens: request.prompt_ids.len() as u32,
            n_choices: request.sampling.n,
            max_tokens: request.sampling.max_tokens,
            needs_version: min_protocol_version(&request.sampling),
            priority: submission.priority,
            opened_at: Instant::now(),
            progress: Mutex::default(),
            orders,
        });
        self.0.lock().insert(request.id, Arc::clone(&open));
        Listed {
            requests: self.clone(),
            request: open,
            orders: receiver,
        }
    }

    /// All of them, oldest identity first.
    pub fn all(&self) -> Vec<Arc<OpenRequest>> {
        self.0.lock().values().cloned().collect()
    }

    /// By identity or by the client's name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<Arc<OpenRequest>, MoveError> {
        let requests = self.0.lock();
        let found = requests
            .values()
            .find(|request| request.id.to_string() == name || &*request.label == name);
        found.cloned().ok_or_else(|| MoveError::UnknownRequest(name.to_owned()))
    }

    /// Those that generate on an instance now.
    pub fn generating_on(&self, instance: &InstanceId) -> Vec<Arc<OpenRequest>> {
        let is_there = |request: &Arc<OpenRequest>| {
            let progress = request.progress.lock();
            progress.stage == RequestStage::Decode && progress.decode.as_ref() == Some(instance)
        };
        self.0
            .lock()
            .values()
            .filter(|request| is_there(request))
            .cloned()
            .collect()
    }

    /// Those that are placed on an instance in any way.
    pub fn placed_on(&self, instance: &InstanceId) -> usize {
        let is_there = |request: &&Arc<OpenRequest>| {
            let progress = request.progress.lock();
            let places = [&progress.decode, &progress.prefill, &progress.destination];
            places.into_iter().any(|place| place.as_ref() == Some(instance))
        };
        self.0.lock().values().filter(is_there).count()
    }
}
