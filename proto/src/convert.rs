//! Wire types to domain types and back, with every field of a message from outside checked. No other file does this.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_scheduler::block_events::{BlockEvent, StoredBlock};
use baton_scheduler::cost::StepSample;
use baton_scheduler::ids::{Epoch, Fingerprint, Incarnation, InstanceId, Nanos, RequestId, Role};
use baton_scheduler::placement::{InstanceInfo, InstanceLoad};
use baton_scheduler::prefix_cache::{PrefixEvent, PrefixKey};
use baton_scheduler::request::{
    ChoiceState, Failure, Finish, PortableState, Request, SamplingParams, Token, TokenLogprobs,
};

use crate::cluster;

mod sampling;

pub use sampling::MAX_CHOICES;

/// A message that does not say what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is absent.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// A field has a value outside its range.
    #[error("field {field} is {found}, expected {expected}")]
    Bad {
        /// Path of the field.
        field: &'static str,
        /// What it holds.
        found: String,
        /// What it may hold.
        expected: &'static str,
    },
}

fn bad(field: &'static str, found: impl ToString, expected: &'static str) -> WireError {
    WireError::Bad {
        field,
        found: found.to_string(),
        expected,
    }
}

/// 32 bytes of a fingerprint.
pub fn fingerprint_from_wire(bytes: &[u8]) -> Result<Fingerprint, WireError> {
    let bytes = bytes
        .try_into()
        .map_err(|_| bad("fingerprint", format!("{} bytes", bytes.len()), "32 bytes"))?;
    Ok(Fingerprint(bytes))
}

/// A role by its name.
pub fn role_from_wire(name: &str) -> Result<Role, WireError> {
    [Role::Prefill, Role::Decode, Role::Mixed]
        .into_iter()
        .find(|role| role.as_str() == name)
        .ok_or_else(|| bad("role", name, "prefill, decode or mixed"))
}

impl From<&TokenLogprobs> for cluster::TokenLogprobs {
    fn from(logprobs: &TokenLogprobs) -> Self {
        cluster::TokenLogprobs {
            logprob: logprobs.logprob,
            rank: logprobs.rank,
            top: logprobs
                .top
                .iter()
                .map(|&(id, logprob)| cluster::TokenLogprob { id, logprob })
                .collect(),
        }
    }
}

impl From<cluster::TokenLogprobs> for TokenLogprobs {
    fn from(wire: cluster::TokenLogprobs) -> Self {
        TokenLogprobs {
            logprob: wire.logprob,
            rank: wire.rank,
            top: wire.top.into_iter().map(|entry| (entry.id, entry.logprob)).collect(),
        }
    }
}

/// A token as an event of `choice`.
pub fn token_to_wire(choice: u32, token: &Token) -> cluster::Token {
    cluster::Token {
        index: token.index,
        id: token.id,
        logprobs: token.logprobs.as_ref().map(Into::into),
        choice,
    }
}

/// A token and its choice.
pub fn token_from_wire(wire: cluster::Token) -> (u32, Token) {
    let token = Token {
        index: wire.index,
        id: wire.id,
        logprobs: wire.logprobs.map(Into::into),
    };
    (wire.choice, token)
}

impl From<Finish> for cluster::Finish {
    fn from(finish: Finish) -> Self {
        use cluster::finish::Reason;
        let reason = match finish {
            Finish::Stop(id) => Reason::StopTokenId(id),
            Finish::Length => Reason::Length(true),
        };
        cluster::Finish { reason: Some(reason) }
    }
}

impl TryFrom<cluster::Finish> for Finish {
    type Error = WireError;

    fn try_from(wire: cluster::Finish) -> Result<Self, WireError> {
        use cluster::finish::Reason;
        match wire.reason.ok_or(WireError::Missing("finish.reason"))? {
            Reason::StopTokenId(id) => Ok(Finish::Stop(id)),
            Reason::Length(_) => Ok(Finish::Length),
        }
    }
}

impl From<&Failure> for cluster::Failure {
    fn from(failure: &Failure) -> Self {
        use cluster::FailureKind as Kind;
        let (kind, message) = match failure {
            Failure::Invalid(message) => (Kind::Invalid, message.as_str()),
            Failure::Busy(message) => (Kind::Busy, message.as_str()),
            Failure::InstanceLost(message) => (Kind::InstanceLost, message.as_str()),
            Failure::Incompatible(message) => (Kind::Incompatible, message.as_str()),
            Failure::DeadlineExceeded => (Kind::DeadlineExceeded, ""),
            Failure::Cancelled => (Kind::Cancelled, ""),
            Failure::Internal(message) => (Kind::Internal, message.as_str()),
        };
        cluster::Failure {
            kind: kind.into(),
            message: message.to_owned(),
            instance_id: String::new(),
        }
    }
}

impl From<cluster::Failure> for Failure {
    fn from(wire: cluster::Failure) -> Self {
        use cluster::FailureKind as Kind;
        let kind = wire.kind();
        let message = wire.message;
        match kind {
            Kind::Invalid => Failure::Invalid(message),
            Kind::Busy => Failure::Busy(message),
            Kind::InstanceLost => Failure::InstanceLost(message),
            Kind::Incompatible => Failure::Incompatible(message),
            Kind::DeadlineExceeded => Failure::DeadlineExceeded,
            Kind::Cancelled => Failure::Cancelled,
            // A kind of a newer protocol is never taken for success.
            Kind::Internal | Kind::Unspecified => Failure::Internal(message),
        }
    }
}

impl From<&PortableState> for cluster::PortableState {
    fn from(state: &PortableState) -> Self {
        cluster::PortableState {
            request_id: state.request.id.0.to_be_bytes().to_vec(),
            prompt_ids: state.request.prompt_ids.to_vec(),
            sampling: Some((&state.request.sampling).into()),
            cache_salt: state.request.cache_salt,
            choices: state
                .choices
                .iter()
                .zip(0..)
                .map(|(choice, number)| choice_to_wire(number, choice))
                .collect(),
            epoch: state.epoch.0,
        }
    }
}

impl TryFrom<cluster::PortableState> for PortableState {
    type Error = WireError;

    fn try_from(wire: cluster::PortableState) -> Result<Self, WireError> {
        let id = request_id_from_wire("state.request_id", &wire.request_id)?;
        if wire.prompt_ids.is_empty() {
            return Err(bad("state.prompt_ids", "empty", "at least one token"));
        }
        let sampling: SamplingParams = wire.sampling.ok_or(WireError::Missing("state.sampling"))?.try_into()?;
        if wire.choices.len() != sampling.n as usize {
            return Err(bad("state.choices", wire.choices.len(), "one for each of sampling.n"));
        }
        let choices = wire
            .choices
            .into_iter()
            .map(|choice| choice_from_wire(choice, 0))
            .collect::<Result<_, _>>()?;
        Ok(PortableState {
            request: Request {
                id,
                prompt_ids: Arc::from(wire.prompt_ids),
                sampling,
                cache_salt: wire.cache_salt,
            },
            choices,
            epoch: Epoch(wire.epoch),
        })
    }
}

impl TryFrom<cluster::EmbedRequest> for Request {
    type Error = WireError;

    fn try_from(wire: cluster::EmbedRequest) -> Result<Self, WireError> {
        let id = request_id_from_wire("request_id", &wire.request_id)?;
        if wire.prompt_ids.is_empty() {
            return Err(bad("prompt_ids", "empty", "at least one token"));
        }
        Ok(Request::to_embed(id, Arc::from(wire.prompt_ids), wire.cache_salt))
    }
}

/// What an instance answered to [`cluster::EmbedRequest`]; an answer that says nothing is a failure.
pub fn embedding_from_wire(wire: cluster::EmbedResponse) -> Result<Vec<f32>, Failure> {
    use cluster::embed_response::Answer;
    match wire.answer {
        Some(Answer::Embedding(embedding)) => Ok(embedding.values),
        Some(Answer::Failure(failure)) => Err(failure.into()),
        None => Err(Failure::Internal("an answer of an unknown kind".into())),
    }
}

/// The answer to [`cluster::EmbedRequest`].
pub fn embedding_to_wire(embedded: Result<Vec<f32>, Failure>) -> cluster::EmbedResponse {
    use cluster::embed_response::Answer;
    let answer = match embedded {
        Ok(values) => Answer::Embedding(cluster::Embedding { values }),
        Err(failure) => Answer::Failure((&failure).into()),
    };
    cluster::EmbedResponse { answer: Some(answer) }
}

/// What choice number `choice` has produced.
pub fn choice_to_wire(choice: u32, state: &ChoiceState) -> cluster::Choice {
    cluster::Choice {
        output: state.output.iter().map(|token| token_to_wire(choice, token)).collect(),
        finish: state.finish.map(Into::into),
    }
}

/// What a choice has produced from its token number `first_index` on.
pub fn choice_from_wire(wire: cluster::Choice, first_index: u32) -> Result<ChoiceState, WireError> {
    let output: Vec<Token> = wire.output.into_iter().map(|token| token_from_wire(token).1).collect();
    if let Some((expected, token)) = (first_index..)
        .zip(&output)
        .find(|(expected, token)| *expected != token.index)
    {
        return Err(bad(
            "choices.output.index",
            format!("{} where {expected} was due", token.index),
            "indexes in order, without gaps",
        ));
    }
    Ok(ChoiceState {
        output,
        finish: wire.finish.map(TryInto::try_into).transpose()?,
    })
}

/// A request's identity.
pub fn request_id_from_wire(field: &'static str, bytes: &[u8]) -> Result<RequestId, WireError> {
    let id: [u8; 16] = bytes
        .try_into()
        .map_err(|_| bad(field, format!("{} bytes", bytes.len()), "16 bytes"))?;
    Ok(RequestId(u128::from_be_bytes(id)))
}

/// Changes of a prefix cache, of which only the last `Cleared` and what follows it counts: removals of a key stored in the
/// same message cancel out, so order within a message is not needed.
pub fn prefix_events_to_wire(events: &[PrefixEvent]) -> cluster::PrefixEvents {
    let mut cleared = false;
    let mut present: BTreeMap<PrefixKey, bool> = BTreeMap::new();
    for event in events {
        match *event {
            PrefixEvent::Stored(key) => drop(present.insert(key, true)),
            PrefixEvent::Removed(key) => drop(present.insert(key, false)),
            PrefixEvent::Cleared => {
                cleared = true;
                present.clear();
            }
        }
    }
    let keys = |wanted: bool| {
        let of_kind = present.iter().filter(move |&(_, stored)| *stored == wanted);
        of_kind.map(|(key, _)| key_to_wire(*key)).collect()
    };
    cluster::PrefixEvents {
        cleared,
        stored: keys(true),
        removed: keys(false),
    }
}

fn key_to_wire(key: PrefixKey) -> Vec<u8> {
    key.0.to_be_bytes().to_vec()
}

fn key_from_wire(field: &'static str, bytes: &[u8]) -> Result<PrefixKey, WireError> {
    let bytes: [u8; 16] = bytes
        .try_into()
        .map_err(|_| bad(field, format!("{} bytes", bytes.len()), "16 bytes"))?;
    Ok(PrefixKey(u128::from_be_bytes(bytes)))
}

/// The events of a message, to be applied in order.
pub fn prefix_events_from_wire(wire: &cluster::PrefixEvents) -> Result<Vec<PrefixEvent>, WireError> {
    let key = |bytes: &Vec<u8>| key_from_wire("prefix.key", bytes);
    let mut events = Vec::with_capacity(1 + wire.stored.len() + wire.removed.len());
    events.extend(wire.cleared.then_some(PrefixEvent::Cleared));
    for bytes in &wire.removed {
        events.push(PrefixEvent::Removed(key(bytes)?));
    }
    for bytes in &wire.stored {
        events.push(PrefixEvent::Stored(key(bytes)?));
    }
    Ok(events)
}

/// The first block wanted of each layer group: where there is one, as all versions say it.
pub fn first_blocks_from_wire(first_block: u32, first_blocks: Vec<u32>) -> Vec<u32> {
    match first_blocks.is_empty() {
        true => vec![first_block],
        false => first_blocks,
    }
}

/// `first_block` and `first_blocks`, of which the second is empty where there is one layer group.
pub fn first_blocks_to_wire(first_blocks: &[u32]) -> (u32, Vec<u32>) {
    match first_blocks {
        [only] => (*only, Vec::new()),
        groups => (groups[0], groups.to_vec()),
    }
}

/// Changes of cached blocks, in order.
pub fn kv_changes_to_wire(events: &[BlockEvent]) -> cluster::KvChanges {
    use cluster::kv_change::Change;
    let change = |event: &BlockEvent| match event {
        BlockEvent::Stored(block) => Change::Stored(cluster::StoredBlock {
            key: key_to_wire(block.key),
            parent: block.parent.map(key_to_wire).unwrap_or_default(),
            token_ids: block.tokens.to_vec(),
        }),
        BlockEvent::Removed(key) => Change::Removed(key_to_wire(*key)),
        BlockEvent::Cleared => Change::Cleared(true),
    };
    let changes = events.iter().map(|event| cluster::KvChange {
        change: Some(change(event)),
    });
    cluster::KvChanges {
        changes: changes.collect(),
    }
}

/// The same back; a change of an unknown kind is left out.
pub fn kv_changes_from_wire(wire: cluster::KvChanges) -> Result<Vec<BlockEvent>, WireError> {
    use cluster::kv_change::Change;
    let known = wire.changes.into_iter().filter_map(|change| change.change);
    known
        .map(|change| match change {
            Change::Stored(block) => Ok(BlockEvent::Stored(StoredBlock {
                key: key_from_wire("stored.key", &block.key)?,
                parent: match &*block.parent {
                    [] => None,
                    parent => Some(key_from_wire("stored.parent", parent)?),
                },
                tokens: Arc::from(block.token_ids),
            })),
            Change::Removed(key) => Ok(BlockEvent::Removed(key_from_wire("removed", &key)?)),
            Change::Cleared(_) => Ok(BlockEvent::Cleared),
        })
        .collect()
}

/// What a worker says of itself when it joins.
pub fn instance_info_from_wire(wire: &cluster::WorkerJoin) -> Result<InstanceInfo, WireError> {
    if wire.instance_id.is_empty() {
        return Err(WireError::Missing("join.instance_id"));
    }
    if wire.block_size == 0 {
        return Err(bad("join.block_size", 0, "at least 1"));
    }
    Ok(InstanceInfo {
        id: InstanceId::new(&wire.instance_id),
        incarnation: Incarnation(wire.incarnation),
        protocol_version: wire.protocol_version,
        role: role_from_wire(&wire.role)?,
        fingerprint: fingerprint_from_wire(&wire.fingerprint)?,
        numerics_class: wire.numerics_class.clone(),
        block_size: wire.block_size,
        n_blocks_total: wire.n_blocks_total,
        max_num_seqs: wire.max_num_seqs,
        max_model_len: wire.max_model_len,
        short_context: (wire.short_context > 0).then_some(wire.short_context),
        kv_bytes_per_token: wire.kv_bytes_per_token,
        most_blocks: match wire.most_blocks.as_slice() {
            [] => vec![None],
            groups => groups.iter().map(|&most| (most > 0).then_some(most)).collect(),
        },
    })
}

impl From<&cluster::WorkerLoad> for InstanceLoad {
    fn from(wire: &cluster::WorkerLoad) -> Self {
        InstanceLoad {
            n_running: wire.n_running,
            n_waiting: wire.n_waiting,
            n_blocks_free: wire.n_blocks_free,
            n_blocks_cached: wire.n_blocks_cached,
            n_prefill_tokens_pending: wire.n_prefill_tokens_pending,
            healthy: wire.healthy,
            step_samples: wire
                .step_times
                .iter()
                .map(|step| StepSample {
                    n_prefill_tokens: step.n_prefill_tokens,
                    n_decode_tokens: step.n_decode_tokens,
                    n_context_tokens: step.n_context_tokens,
                    duration: Nanos(step.duration_ns),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests;
