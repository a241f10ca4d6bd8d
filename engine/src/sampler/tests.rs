//! The sampler against a naive model that sorts everything in f64.

use baton_scheduler::request::SamplingParams;
use proptest::prelude::*;

use super::*;

fn params(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> SamplingParams {
    SamplingParams {
        temperature,
        top_k,
        top_p,
        seed,
        ..SamplingParams::default()
    }
}

/// Kept ids with their probabilities, in the distribution's order.
fn naive(logits: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let max = f64::from(logits[order[0]]);
    let weight = |id: usize| ((f64::from(logits[id]) - max) / f64::from(params.temperature)).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut kept = Vec::new();
    let mut mass = 0.0;
    for id in order {
        if mass >= f64::from(params.top_p) && !kept.is_empty() {
            break;
        }
        mass += weight(id) / total;
        kept.push((id as u32, weight(id)));
    }
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    kept.into_iter().map(|(id, weight)| (id, weight / total)).collect()
}

fn logits_of(n_tokens: usize, seed: u64, spread: f32) -> Vec<f32> {
    (0..n_tokens)
        .map(|id| (uniform_f64(seed, [id as u32, 0, 0, 9]) as f32 - 0.5) * spread)
        .collect()
}

#[test]
fn greedy_takes_the_smaller_id_on_a_tie() {
    let mut sampler = Sampler::new();
    let logits = [0.5, 3.0, -1.0, 3.0, 3.0];
    let token = sampler.sample(&logits, &params(0.0, 0, 1.0, 1), 0, 5).unwrap();
    assert_eq!((token.id, token.index), (1, 5));
    let logprobs = sampler.logprobs(&logits, 3, 2).unwrap();
    assert_eq!(logprobs.rank, 2);
    assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn broken_logits_are_errors() {
    let mut sampler = Sampler::new();
    let greedy = params(0.0, 0, 1.0, 0);
    for n_tokens in [1, 15, 16, 17, 40] {
        let mut logits = vec![0.25; n_tokens];
        logits[n_tokens - 1] = f32::NAN;
        let error = sampler.sample(&logits, &greedy, 0, 0).unwrap_err();
        assert!(
            matches!(error, SampleError::NotFinite { id, .. } if id as usize == n_tokens - 1),
            "{error}"
        );
        logits[n_tokens - 1] = f32::INFINITY;
        assert!(sampler.sample(&logits, &greedy, 0, 0).is_err());
        logits[n_tokens - 1] = 1.0;
        assert_eq!(
            sampler.sample(&logits, &greedy, 0, 0).unwrap().id as usize,
            n_tokens - 1
        );
    }
    assert_eq!(
        sampler.sample(&[], &greedy, 0, 0),
        Err(SampleError::NoCandidate { n_tokens: 0 })
    );
    assert!(sampler.sample(&[f32::NEG_INFINITY; 3], &greedy, 0, 0).is_err());
    assert!(matches!(
        sampler.logprobs(&[0.0; 3], 3, 0),
        Err(SampleError::UnknownToken { id: 3, n_tokens: 3 })
    ));
}

#[test]
fn masked_tokens_are_never_drawn() {
    let mut sampler = Sampler::new();
    let mut logits = vec![f32::NEG_INFINITY; 1000];
    logits[77] = -3.0;
    logits[901] = -3.5;
    for (top_k, top_p) in [(0, 1.0), (50, 1.0), (0, 0.9999), (700, 0.99)] {
        for index in 0..200 {
            let id = sampler
                .sample(&logits, &params(1.0, top_k, top_p, 3), 0, index)
                .unwrap()
                .id;
            assert!(id == 77 || id == 901, "{id}");
        }
    }
}

#[test]
fn exp_is_accurate() {
    for step in 0..870_000 {
        let x = step as f32 * -1e-4;
        let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
        assert!(
            (got - want).abs() <= want * 2.5e-7 + 1e-38,
            "exp({x}) = {got}, expected {want}"
        );
    }
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-100.0), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
}

/// Chi-squared over many indices: the drawn frequencies are those of the naive distribution.
#[test]
fn frequencies_follow_the_distribution() {
    let mut sampler = Sampler::new();
    let logits = logits_of(37, 11, 6.0);
    for (temperature, top_k, top_p) in [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (1.5, 20, 0.8)] {
        let params = params(temperature, top_k, top_p, 42);
        let expected = naive(&logits, &params);
        let n_draws = 40_000;
        let mut counts = vec![0u32; logits.len()];
        for index in 0..n_draws {
            counts[sampler.sample(&logits, &params, 0, index).unwrap().id as usize] += 1;
        }
        let mut statistic = 0.0;
        for &(id, probability) in &expected {
            let mean = probability * f64::from(n_draws);
            statistic += (f64::from(counts[id as usize]) - mean).powi(2) / mean;
            counts[id as usize] = 0;
        }
        assert_eq!(
            counts.iter().sum::<u32>(),
            0,
            "drew a token outside the kept set: {params:?}"
        );
        // Mean of chi-squared is its degrees of freedom, its standard deviation sqrt(2 of them): five of those.
        let degrees = (expected.len() - 1) as f64;
        assert!(
            statistic < degrees + 5.0 * (2.0 * degrees).sqrt() + 1.0,
            "{statistic} with {degrees} degrees"
        );
    }
}

/// A flat distribution over thousands of tokens takes the path without sorting; its frequencies are right too.
#[test]
fn a_wide_nucleus_is_drawn_evenly() {
    let mut sampler = Sampler::new();
    let logits = logits_of(3000, 5, 2.0);
    let params = params(1.0, 0, 0.6, 17);
    let kept = naive(&logits, &params);
    assert!(kept.len() > FIRST_NUCLEUS);
    let n_draws = 20_000;
    let mut counts = vec![0u32; logits.len()];
    for index in 0..n_draws {
        counts[sampler.sample(&logits, &params, 0, index).unwrap().id as usize] += 1;
    }
    // Forty groups of the kept tokens, in order.
    let group = kept.len().div_ceil(40);
    let mut statistic = 0.0;
    for tokens in kept.chunks(group) {
        let mean = tokens.iter().map(|(_, probability)| probability).sum::<f64>() * f64::from(n_draws);
        let drawn: u32 = tokens
            .iter()
            .map(|(id, _)| std::mem::take(&mut counts[*id as usize]))
            .sum();
        statistic += (f64::from(drawn) - mean).powi(2) / mean;
    }
    assert!(counts.iter().sum::<u32>() <= 2, "drew tokens outside the nucleus");
    let degrees = kept.chunks(group).len() as f64 - 1.0;
    assert!(
        statistic < degrees + 5.0 * (2.0 * degrees).sqrt(),
        "{statistic} with {degrees} degrees"
    );
}

#[test]
fn randomness_depends_on_seed_choice_and_index_only() {
    let mut first = Sampler::new();
    let mut second = Sampler::new();
    let logits = logits_of(5000, 3, 4.0);
    // Another sampler that has done other work in between gives the same token.
    let early: Vec<u32> = (0..50)
        .map(|i| first.sample(&logits, &params(1.0, 0, 0.95, 8), 0, i).unwrap().id)
        .collect();
    second.sample(&logits[..7], &params(0.3, 3, 0.5, 99), 1, 0).unwrap();
    let late: Vec<u32> = (0..50)
        .rev()
        .map(|i| second.sample(&logits, &params(1.0, 0, 0.95, 8), 0, i).unwrap().id)
        .collect();
    assert!(early.iter().eq(late.iter().rev()));
    let other_choice: Vec<u32> = (0..50)
        .map(|i| first.sample(&logits, &params(1.0, 0, 0.95, 8), 1, i).unwrap().id)
        .collect();
    let other_seed: Vec<u32> = (0..50)
        .map(|i| first.sample(&logits, &params(1.0, 0, 0.95, 9), 0, i).unwrap().id)
        .collect();
    assert_ne!(early, other_choice);
    assert_ne!(early, other_seed);
}

proptest! {
    /// Ranks, top lists and log-probabilities equal a full sort's, with many ties.
    #[test]
    fn logprobs_match_a_full_sort(
        values in prop::collection::vec(-8i8..8, 1..600),
        pick in any::<prop::sample::Index>(),
        n_top in 0usize..25,
    ) {
        let logits: Vec<f32> = values.iter().map(|&value| f32::from(value) * 0.75).collect();
        let id = pick.index(logits.len()) as u32;
        let got = Sampler::new().logprobs(&logits, id, n_top).unwrap();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let log_sum = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        prop_assert_eq!(got.rank as usize, order.iter().position(|&other| other == id).unwrap() + 1);
        prop_assert!((f64::from(got.logprob) - (f64::from(logits[id as usize]) - log_sum)).abs() < 1e-5);
        prop_assert_eq!(got.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..n_top.min(order.len())].to_vec());
        for (id, logprob) in got.top {
            prop_assert!((f64::from(logprob) - (f64::from(logits[id as usize]) - log_sum)).abs() < 1e-5);
        }
    }

    /// A drawn token is in the naive kept set, whatever the cut; and the cut can be past the first nucleus.
    #[test]
    fn draws_stay_in_the_kept_set(
        n_tokens in 1usize..3000, seed in any::<u64>(), spread in 0.0f32..20.0,
        temperature in 0.05f32..3.0, top_k in 0u32..400, top_p in 0.01f32..1.0,
    ) {
        let logits = logits_of(n_tokens, seed, spread);
        let params = params(temperature, top_k, top_p, seed);
        let kept = naive(&logits, &params);
        let id = Sampler::new().sample(&logits, &params, 0, 0).unwrap().id;
        // One more than the naive set is tolerated: its sum and ours may cross top_p a token apart.
        let mut looser = params.clone();
        looser.top_p = (params.top_p + 1e-5).min(1.0);
        let tolerated = naive(&logits, &looser);
        prop_assert!(kept.iter().chain(&tolerated).any(|(other, _)| *other == id), "{} not in {:?}", id, kept);
    }
}

/// The formula, one token at a time, by counting.
fn penalised_naively(logits: &[f32], params: &SamplingParams, prompt: &[u32], output: &[u32]) -> Vec<f32> {
    let one = |(id, &logit): (usize, &f32)| {
        let n_generated = output.iter().filter(|&&token| token as usize == id).count();
        let mut logit = logit;
        if n_generated > 0 || prompt.contains(&(id as u32)) {
            logit = if logit > 0.0 {
                logit / params.repetition_penalty
            } else {
                logit * params.repetition_penalty
            };
        }
        logit -= n_generated as f32 * params.frequency_penalty;
        logit -= if n_generated > 0 { params.presence_penalty } else { 0.0 };
        logit
    };
    logits.iter().enumerate().map(one).collect()
}

proptest! {
    /// Choosing after a history is choosing from the penalised row; what is reported is of the raw one. One sampler for all
    /// of them: nothing of one row may be left for the next.
    #[test]
    fn penalties_are_the_formula(
        seed in any::<u64>(),
        rows in prop::collection::vec(
            (prop::collection::vec(0..40u32, 1..30), prop::collection::vec(0..40u32, 0..30)),
            1..6,
        ),
        presence_penalty in prop_oneof![Just(0.0f32), -2.0..2.0f32],
        frequency_penalty in prop_oneof![Just(0.0f32), -2.0..2.0f32],
        repetition_penalty in prop_oneof![Just(1.0f32), 0.5..2.0f32],
        temperature in prop_oneof![Just(0.0f32), 0.3..2.0f32],
    ) {
        let params = SamplingParams {
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logprobs: Some(3),
            ..params(temperature, 0, 0.9, seed)
        };
        let mut sampler = Sampler::new();
        for (i, (prompt, output)) in rows.iter().enumerate() {
            let logits = logits_of(40, seed.wrapping_add(i as u64), 8.0);
            let token = sampler.sample_after(&logits, &params, 2, History { prompt, output }, None).unwrap();
            let row = penalised_naively(&logits, &params, prompt, output);
            let expected = Sampler::new().sample(&row, &params, 2, output.len() as u32).unwrap();
            prop_assert_eq!((token.id, token.index), (expected.id, output.len() as u32));
            let raw = Sampler::new().logprobs(&logits, token.id, 3).unwrap();
            prop_assert_eq!(token.logprobs, Some(raw));
        }
    }
}

#[test]
fn a_penalty_moves_the_choice() {
    let logits = [1.0, 3.0, -1.0, 2.9];
    let greedy = params(0.0, 0, 1.0, 1);
    let choose = |params: SamplingParams, prompt: &[u32], output: &[u32]| {
        let history = History { prompt, output };
        Sampler::new()
            .sample_after(&logits, &params, 0, history, None)
            .unwrap()
            .id
    };
    assert_eq!(choose(greedy.clone(), &[1, 1], &[1]), 1);
    let presence = SamplingParams {
        presence_penalty: 0.2,
        ..greedy.clone()
    };
    assert_eq!(
        (choose(presence.clone(), &[1], &[]), choose(presence, &[], &[1])),
        (1, 3)
    );
    let frequency = SamplingParams {
        frequency_penalty: 0.06,
        ..greedy.clone()
    };
    assert_eq!(
        (choose(frequency.clone(), &[], &[1]), choose(frequency, &[], &[1, 1])),
        (1, 3)
    );
    let repetition = SamplingParams {
        repetition_penalty: 1.1,
        ..greedy
    };
    assert_eq!(choose(repetition.clone(), &[1], &[]), 3);
    let history = History {
        prompt: &[4],
        output: &[],
    };
    let unknown = Sampler::new().sample_after(&logits, &repetition, 0, history, None);
    assert_eq!(unknown, Err(SampleError::UnknownToken { id: 4, n_tokens: 4 }));
}

/// A row on which everything asked for was done one token at a time, in vLLM's order.
fn adjusted_naively(
    logits: &[f32],
    params: &SamplingParams,
    prompt: &[u32],
    output: &[u32],
    allowed: Option<&[u32]>,
) -> Vec<f32> {
    let mut row = logits.to_vec();
    for (id, logit) in row.iter_mut().enumerate() {
        let id = id as u32;
        let is_constrained_out = allowed.is_some_and(|allowed| !allowed.contains(&id));
        let is_unlisted = !params.allowed_token_ids.is_empty() && !params.allowed_token_ids.contains(&id);
        let ends_bad_word = params.bad_words.iter().any(|word| {
            let mut with_it = output.to_vec();
            with_it.push(id);
            with_it.ends_with(word)
        });
        if is_constrained_out || is_unlisted || ends_bad_word {
            *logit = f32::NEG_INFINITY;
        }
    }
    let is_stop = |id: usize| params.stop_token_ids.contains(&(id as u32));
    let goes_on = (0..row.len()).any(|id| row[id].is_finite() && !is_stop(id));
    for (id, logit) in row.iter_mut().enumerate() {
        if output.len() < params.min_tokens as usize && is_stop(id) && (allowed.is_none() || goes_on) {
            *logit = f32::NEG_INFINITY;
        }
        let biases = params.logit_bias.iter().filter(|(other, _)| *other == id as u32);
        *logit += biases.map(|(_, bias)| bias).sum::<f32>();
    }
    penalised_naively(&row, params, prompt, output)
}

prop_compose! {
    /// Few ids, so that rules meet.
    fn rules()(
        stop_token_ids in prop::collection::vec(0..24u32, 0..4),
        min_tokens in 0..6u32,
        bias in prop::collection::btree_map(0..24u32, -9.0..9.0f32, 0..5),
        allowed in prop::collection::btree_set(0..24u32, 0..20),
        bad_words in prop::collection::vec(prop::collection::vec(0..4u32, 1..4), 0..5),
        (presence_penalty, repetition_penalty) in (prop_oneof![Just(0.0f32), -2.0..2.0f32], prop_oneof![Just(1.0f32), 0.5..2.0f32]),
        (temperature, min_p, top_k, top_p) in (
            prop_oneof![Just(0.0f32), 0.3..2.0f32], prop_oneof![Just(0.0f32), 0.0..1.0f32], 0..9u32, prop_oneof![Just(1.0f32), 0.3..1.0f32],
        ),
    ) -> SamplingParams {
        SamplingParams {
            stop_token_ids, min_tokens, temperature, min_p, top_k, top_p, presence_penalty, repetition_penalty,
            max_tokens: 100,
            logprobs: Some(2),
            logit_bias: bias.into_iter().collect(),
            allowed_token_ids: allowed.into_iter().collect(),
            bad_words,
            ..SamplingParams::default()
        }
    }
}

proptest! {
    /// Whatever is asked for together: the token is chosen from the row of the naive model, within its `min_p`, `top_k` and
    /// `top_p`; what is reported is of the raw row; and where the model leaves nothing, the sampler says so.
    #[test]
    fn what_may_be_chosen_is_the_naive_models(
        params in rules(),
        seed in any::<u64>(),
        (prompt, output) in (prop::collection::vec(0..4u32, 1..5), prop::collection::vec(0..4u32, 0..9)),
        allowed in prop::option::of(prop::collection::vec(0..24u32, 0..24)),
    ) {
        let params = SamplingParams { seed, ..params };
        let logits = logits_of(24, seed, 8.0);
        let set: Option<TokenSet> = allowed.as_ref().map(|ids| ids.iter().copied().collect());
        let history = History { prompt: &prompt, output: &output };
        let got = Sampler::new().sample_after(&logits, &params, 1, history, set.as_ref());
        let row = adjusted_naively(&logits, &params, &prompt, &output, allowed.as_deref());
        let index = output.len() as u32;
        if row.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            prop_assert_eq!(got, Err(SampleError::NothingAllowed { choice: 1, index }));
            return Ok(());
        }
        let token = got.unwrap();
        prop_assert_eq!(token.index, index);
        prop_assert_eq!(token.logprobs, Some(Sampler::new().logprobs(&logits, token.id, 2).unwrap()));
        prop_assert!(row[token.id as usize].is_finite(), "{} is ruled out", token.id);
        if params.temperature == 0.0 {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(token.id as usize, row.iter().position(|logit| *logit == best).unwrap());
            return Ok(());
        }
        // Looser by rounding, as in `draws_stay_in_the_kept_set`.
        let looser = SamplingParams { min_p: params.min_p * 0.9999, top_p: (params.top_p + 1e-5).min(1.0), ..params.clone() };
        let kept = [naive_min_p(&row, &params), naive_min_p(&row, &looser)].concat();
        prop_assert!(kept.contains(&token.id), "{} not in {:?}", token.id, kept);
    }
}

/// The ids kept by `min_p`, then `top_k`, then `top_p`.
fn naive_min_p(row: &[f32], params: &SamplingParams) -> Vec<u32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let share = |logit: f32| (f64::from(logit - max) / f64::from(params.temperature)).exp();
    let probable = |&logit: &f32| match share(logit) < f64::from(params.min_p) {
        true => f32::NEG_INFINITY,
        false => logit,
    };
    let row: Vec<f32> = row.iter().map(probable).collect();
    let kept = naive(&row, params).into_iter();
    kept.map(|(id, _)| id)
        .filter(|&id| row[id as usize].is_finite())
        .collect()
}

#[test]
fn min_p_keeps_the_shape_of_what_it_keeps() {
    let mut sampler = Sampler::new();
    // Weights 1, 0.5, 0.2, 0.04 of the first one's.
    let logits: Vec<f32> = [1.0f32, 0.5, 0.2, 0.04].iter().map(|weight| weight.ln()).collect();
    let params = SamplingParams {
        min_p: 0.1,
        ..params(1.0, 0, 1.0, 5)
    };
    let n_draws = 30_000;
    let mut counts = [0u32; 4];
    for index in 0..n_draws {
        counts[sampler.sample(&logits, &params, 0, index).unwrap().id as usize] += 1;
    }
    assert_eq!(counts[3], 0);
    for (count, weight) in counts.iter().zip([1.0, 0.5, 0.2]) {
        let mean = f64::from(n_draws) * weight / 1.7;
        assert!((f64::from(*count) - mean).abs() < 5.0 * mean.sqrt(), "{counts:?}");
    }
    // Above the temperature's distribution, not the raw one: at 2 the last weight is 0.2 of the first.
    let warm = SamplingParams {
        temperature: 2.0,
        ..params
    };
    assert!((0..2000).any(|index| sampler.sample(&logits, &warm, 0, index).unwrap().id == 3));
}

#[test]
fn each_rule_moves_the_choice() {
    let logits = [1.0, 3.0, -1.0, 2.9];
    let choose = |params: SamplingParams, output: &[u32], allowed: Option<&[u32]>| {
        let history = History { prompt: &[0], output };
        let set: Option<TokenSet> = allowed.map(|ids| ids.iter().copied().collect());
        let token = Sampler::new().sample_after(&logits, &params, 0, history, set.as_ref());
        token.map(|token| token.id)
    };
    let greedy = || params(0.0, 0, 1.0, 1);
    assert_eq!(choose(greedy(), &[], Some(&[0, 2])), Ok(0));
    let biased = SamplingParams {
        logit_bias: vec![(2, 5.0)],
        ..greedy()
    };
    assert_eq!(choose(biased, &[], None), Ok(2));
    let listed = SamplingParams {
        allowed_token_ids: [2, 3].into(),
        ..greedy()
    };
    assert_eq!(choose(listed.clone(), &[], None), Ok(3));
    let nothing = SampleError::NothingAllowed { choice: 0, index: 0 };
    assert_eq!(choose(listed, &[], Some(&[0, 1])), Err(nothing));
    let early = SamplingParams {
        min_tokens: 2,
        stop_token_ids: vec![1],
        ..greedy()
    };
    assert_eq!(choose(early.clone(), &[0], None), Ok(3));
    assert_eq!(choose(early.clone(), &[0, 0], None), Ok(1));
    assert_eq!(choose(early, &[0], Some(&[1])), Ok(1), "a complete text ends");
    let bad = SamplingParams {
        bad_words: vec![vec![0, 1], vec![3]],
        ..greedy()
    };
    assert_eq!(choose(bad.clone(), &[2], None), Ok(1));
    assert_eq!(
        choose(bad, &[0], None),
        Ok(0),
        "neither the word of two ids nor that of one"
    );
    let far = SamplingParams {
        logit_bias: vec![(4, 1.0)],
        ..greedy()
    };
    assert_eq!(
        choose(far, &[], None),
        Err(SampleError::UnknownToken { id: 4, n_tokens: 4 })
    );
}
