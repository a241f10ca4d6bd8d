//! One embedding as the APIs see it: run, aborted by name and measured like any request. How it is written belongs to the
//! endpoints.

use std::sync::Arc;

use baton_scheduler::ids::{Nanos, TokenId};
use baton_scheduler::placement::RequestObjectives;
use baton_scheduler::request::{Failure, SamplingParams};
use tokio::time::Instant;

use super::ApiState;
use super::error::ApiError;
use super::metrics::{Endpoint, Recorder};
use super::output::{Job, TextOptions, timeline_from};
use super::request_label::RequestLabel;

/// What is known of an embedding besides its prompt.
#[derive(Clone, Debug)]
pub struct EmbedOptions {
    /// Which endpoint it came from.
    pub endpoint: Endpoint,
    /// The client's name for it.
    pub label: RequestLabel,
    /// Separates prefix caches.
    pub cache_salt: u64,
    /// Lower is more urgent.
    pub priority: i32,
    /// When the client gives up.
    pub deadline: Option<Instant>,
    /// When it came.
    pub received: Nanos,
}

/// A job that generates nothing.
pub fn embed_job(state: &ApiState, options: EmbedOptions, prompt_ids: Arc<[TokenId]>) -> Result<Job, ApiError> {
    let limit = state.model().max_model_len;
    let n_tokens = prompt_ids.len();
    if n_tokens > limit as usize {
        let message =
            format!("input has {n_tokens} tokens, expected at most {limit}: this model's maximum context length");
        return Err(ApiError::field("input", message));
    }
    Ok(Job {
        endpoint: options.endpoint,
        label: options.label,
        prompt_ids,
        sampling: SamplingParams {
            max_tokens: 0,
            ..SamplingParams::default()
        },
        text: TextOptions::default(),
        cache_salt: options.cache_salt,
        priority: options.priority,
        deadline: options.deadline,
        objectives: RequestObjectives::default(),
        timeline: timeline_from(state, options.received),
    })
}

/// The mean of the prompt's last hidden states. Dropping the future cancels it everywhere.
pub async fn embed(state: &ApiState, job: Job) -> Result<Vec<f32>, ApiError> {
    let mut recorder = Recorder::new(state, &job);
    let running = state.running().enter(job.label.shared());
    let computed = async { Ok(state.generator().embed(job.submission(state)?).await?) };
    let embedded = tokio::select! {
        biased;
        () = running.aborted() => Err(Failure::Cancelled.into()),
        embedded = computed => embedded,
    };
    match &embedded {
        Ok(_) => recorder.embedded(),
        Err(error) => recorder.failed(error),
    }
    embedded
}

/// The same direction with length 1; nothing has no direction and stays as it is.
pub fn normalized(mut embedding: Vec<f32>) -> Vec<f32> {
    let length = embedding
        .iter()
        .map(|&value| f64::from(value).powi(2))
        .sum::<f64>()
        .sqrt();
    if length > 0.0 {
        embedding
            .iter_mut()
            .for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    embedding
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_become_1_whatever_their_size() {
        assert_eq!(normalized(vec![0.0, 0.0]), [0.0, 0.0]);
        // The squares of the largest and the smallest are not numbers of 32 bits.
        for scale in [1.0, 1e30, 1e-30] {
            let scaled = normalized(vec![3.0 * scale, -4.0 * scale]);
            assert!(
                (scaled[0] - 0.6).abs() < 1e-6 && (scaled[1] + 0.8).abs() < 1e-6,
                "{scaled:?}"
            );
        }
    }
}
