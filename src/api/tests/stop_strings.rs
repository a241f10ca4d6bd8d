//! Stop strings end to end: where the text ends, what is counted, and that generation ends too.

use proptest::prelude::*;

use super::super::metrics::Endpoint;
use super::super::output::{ChoiceEnd, FinishReason, Job, Output, OutputStream, StopReason, TextOptions};
use super::super::request_label::RequestLabel;
use super::*;

#[tokio::test]
async fn a_stop_text_cuts_the_answer_and_cancels_the_rest() {
    // More than the stream buffers, so that it cannot end by itself before the stop is seen.
    let generator = null(&format!("1, 2, 3, 4, {}", "x".repeat(500)));
    let server = start(generator.clone()).await;
    let mut body = ask("count");
    body["stop"] = json!([", 4", "nothing"]);
    let answer = server.ask(CHAT, body.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "1, 2, 3");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!(", 4"))
    );
    assert_eq!(answer["usage"]["completion_tokens"], 10);
    until(&generator, |counts| counts.n_cancelled == 1).await;

    let events = server.stream(CHAT, body.clone()).await;
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "1, 2, 3");
    assert_eq!(events.len(), 11, "an event for each token, and the reason");

    body["include_stop_str_in_output"] = json!(true);
    let answer = server.ask(CHAT, body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "1, 2, 3, 4");
    assert_eq!(
        server
            .metric(r#"baton_requests_total{endpoint="chat",outcome="stop"}"#)
            .await,
        Some(3.0)
    );
}

#[tokio::test]
async fn a_clients_stop_id_is_named_and_not_shown() {
    let server = start(null("ab!c")).await;
    let body = json!({"prompt": [1], "stop_token_ids": [33]});
    let answer = server.ask(COMPLETIONS, body.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("ab"), &json!(33)));
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(server.stream(COMPLETIONS, body).await.len(), 3);
}

fn job(stop: Vec<String>, include_stop: bool, max_tokens: u32) -> Job {
    Job {
        endpoint: Endpoint::Completions,
        label: RequestLabel::fresh(),
        prompt_ids: [1].into(),
        sampling: baton_scheduler::request::SamplingParams {
            max_tokens,
            stop_token_ids: vec![EOS],
            ..Default::default()
        },
        text: TextOptions {
            stop,
            include_stop_str_in_output: include_stop,
            ..TextOptions::default()
        },
        cache_salt: 0,
        priority: 0,
        deadline: None,
        objectives: Default::default(),
        timeline: Timeline::default(),
    }
}

/// The text and reason of `bytes`, token by token, with every event counted.
async fn run(bytes: &[u8], job: Job) -> (String, FinishReason, Option<StopReason>, u32) {
    let ids: Vec<TokenId> = bytes.iter().map(|&byte| byte.into()).chain([EOS]).collect();
    let generator = Arc::new(NullGenerator::new(NullOptions {
        token_ids: ids,
        ..NullOptions::default()
    }));
    let (options, registry) = (ApiOptions::default(), MetricsRegistry::default());
    let state = ApiState::new(generator, byte_model(), options, registry, CancellationToken::new());
    let mut output = OutputStream::start(&state, job).await.unwrap();
    let (mut text, mut n_tokens, mut was_last) = (String::new(), 0, false);
    let mut choice_end: Option<ChoiceEnd> = None;
    while let Some(next) = output.next().await {
        match next.unwrap() {
            Output::PromptLogprobs(_) => panic!("not asked for"),
            Output::Token { choice, token } => {
                assert!(choice == 0 && !was_last, "a token after the last");
                text.push_str(&token.text);
                n_tokens += 1;
                was_last = token.is_last;
            }
            Output::ChoiceEnded { choice, end } => {
                assert!(
                    choice == 0 && was_last && end.text.is_empty(),
                    "the end was announced and owes nothing"
                );
                assert!(choice_end.replace(end).is_none(), "a second end");
            }
            Output::Finished(usage) => {
                assert_eq!(usage.n_completion_tokens, n_tokens);
                let end = choice_end.expect("the choice ends before the request");
                return (text, end.reason, end.stop_reason, n_tokens);
            }
        }
    }
    panic!("no end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against a model that decodes ever longer beginnings of the whole output and looks for stop texts in them.
    #[test]
    fn the_text_is_that_of_the_naive_model(
        text in "[abé€]{0,12}",
        stops in prop::collection::vec("[abé€]{1,3}", 0..3),
        include in any::<bool>(),
        max_tokens in 1u32..40,
    ) {
        let bytes = text.as_bytes();
        let shown = &bytes[..bytes.len().min(max_tokens as usize)];
        let is_cut = bytes.len() >= max_tokens as usize;
        // Complete characters first; what is left over at the end of a cut text decodes to replacement characters.
        let mut expected = (String::from_utf8_lossy(shown).into_owned(), None);
        for end in 1..=shown.len() {
            let Ok(prefix) = std::str::from_utf8(&shown[..end]) else { continue };
            let found = stops.iter().filter(|stop| prefix.ends_with(stop.as_str())).max_by_key(|stop| stop.len());
            if let Some(stop) = found {
                let kept = if include { end } else { end - stop.len() };
                expected = (prefix[..kept].to_owned(), Some(stop.clone()));
                break;
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let got = runtime.block_on(run(bytes, job(stops, include, max_tokens)));
        prop_assert_eq!(&got.0, &expected.0);
        prop_assert_eq!(&got.2, &expected.1.clone().map(StopReason::Text));
        let reason = match (expected.1, is_cut) {
            (Some(_), _) | (None, false) => FinishReason::Stop,
            (None, true) => FinishReason::Length,
        };
        prop_assert_eq!(got.1, reason);
    }
}
