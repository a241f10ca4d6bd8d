//! The requests of a run, and what each must come to: a function of the request alone.

use std::sync::Arc;

use super::memory::after;
use super::random::{Random, mix};
use crate::ids::{Nanos, RequestId, TokenId};
use crate::request::{Finish, Request, SamplingParams};

const N_VOCAB: u64 = 97;
const STOP: TokenId = 5;

/// A request that will come, and what its client does.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) request: Request,
    /// As the rebalancer sees it.
    pub(super) priority: i32,
    pub(super) at: Nanos,
    /// The client goes away this long after it came.
    pub(super) leaves_after: Option<Nanos>,
    /// Its own deadline, from when it came.
    pub(super) deadline: Option<Nanos>,
    /// Of each choice.
    pub(super) expected: Vec<(Vec<TokenId>, Finish)>,
}

/// The token after a context, for a choice.
pub(super) fn next_token(context: u64, seed: u64, choice: u32) -> TokenId {
    (mix(context ^ mix(seed ^ u64::from(choice) << 56)) % N_VOCAB) as TokenId
}

fn undisturbed(request: &Request, choice: u32, max_model_len: usize) -> (Vec<TokenId>, Finish) {
    let sampling = &request.sampling;
    let mut context = request
        .prompt_ids
        .iter()
        .fold(0, |context, &token| after(context, token));
    let mut output = Vec::new();
    loop {
        let token = next_token(context, sampling.seed, choice);
        output.push(token);
        context = after(context, token);
        if sampling.stop_token_ids.contains(&token) {
            return (output, Finish::Stop(token));
        }
        let n_tokens = request.prompt_ids.len() + output.len();
        if output.len() >= sampling.max_tokens as usize || n_tokens >= max_model_len {
            return (output, Finish::Length);
        }
    }
}

/// What is drawn for all requests of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) n_requests: usize,
    /// They arrive within this time.
    pub(super) span: Nanos,
    pub(super) max_model_len: usize,
    pub(super) max_n: u32,
    /// Of a hundred clients, those that leave early, and those with a short deadline.
    pub(super) leaving_percent: u64,
    pub(super) hurried_percent: u64,
    /// Those end within this time.
    pub(super) patience_ms: u64,
}

/// Requests that share prompts' beginnings, in order of arrival.
pub(super) fn plan(random: &mut Random, kind: Kind) -> Vec<Planned> {
    let families: Vec<Vec<TokenId>> = (0..6)
        .map(|_| (0..24).map(|_| random.below(N_VOCAB) as TokenId).collect())
        .collect();
    let mut times: Vec<u64> = (0..kind.n_requests).map(|_| random.below(kind.span.0)).collect();
    times.sort_unstable();
    let planned = times.into_iter().enumerate().map(|(number, at)| {
        let family = &families[random.below(families.len() as u64) as usize];
        let mut prompt = family[..random.between(1, 24) as usize].to_vec();
        prompt.extend((0..random.below(12)).map(|_| random.below(N_VOCAB) as TokenId));
        let n = if random.percent(75) {
            1
        } else {
            random.between(2, u64::from(kind.max_n)) as u32
        };
        let sampling = SamplingParams {
            max_tokens: random.between(1, 24) as u32,
            seed: random.next(),
            stop_token_ids: if random.percent(50) { vec![STOP] } else { Vec::new() },
            n,
            ..SamplingParams::default()
        };
        let request = Request {
            id: RequestId(number as u128 + 1),
            prompt_ids: Arc::from(prompt),
            sampling,
            cache_salt: random.below(2),
        };
        let after = |random: &mut Random| Nanos::from_millis(random.between(1, kind.patience_ms));
        Planned {
            expected: (0..n)
                .map(|choice| undisturbed(&request, choice, kind.max_model_len))
                .collect(),
            priority: -i32::from(request.id.0.is_multiple_of(7)),
            request,
            at: Nanos(at),
            leaves_after: random.percent(kind.leaving_percent).then(|| after(random)),
            deadline: random.percent(kind.hurried_percent).then(|| after(random)),
        }
    });
    planned.collect()
}
