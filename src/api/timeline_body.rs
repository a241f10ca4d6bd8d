//! A request's timeline as its client sees it: named spans, one after the other, that together are the whole request.

use baton_scheduler::ids::Nanos;
use baton_scheduler::timeline::{Moment, Timeline};
use serde::Serialize;

/// Names of spans by the moment that ends them. The first KV frame ends none: transfers run beside the prefill.
const SPANS: [(Moment, &str); 10] = [
    (Moment::Tokenized, "tokenize"),
    (Moment::Admitted, "queue"),
    (Moment::Placed, "place"),
    (Moment::Reserved, "reserve"),
    (Moment::PrefillStarted, "prefill_wait"),
    (Moment::PrefillFinished, "prefill"),
    (Moment::FirstToken, "first_token"),
    (Moment::TransferFinished, "transfer"),
    (Moment::Joined, "join"),
    (Moment::Finished, "decode"),
];

/// `timeline` of a response. Times are seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TimelineBody {
    /// From reading the request to its end.
    e2e_seconds: f64,
    /// From reading the request to its first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    ttft_seconds: Option<f64>,
    /// In the order they came; they sum to `e2e_seconds`.
    spans: Vec<Span>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Span {
    name: &'static str,
    /// From reading the request.
    start_seconds: f64,
    seconds: f64,
}

impl TimelineBody {
    /// Of a request that has ended; `None` before.
    pub fn of(timeline: &Timeline) -> Option<TimelineBody> {
        let (received, finished) = (timeline.at(Moment::Received)?, timeline.at(Moment::Finished)?);
        let end = |(moment, name)| Some((timeline.at(moment)?.clamp(received, finished.max(received)), name));
        let mut ends: Vec<(Nanos, &'static str)> = SPANS.into_iter().filter_map(end).collect();
        // The first token may overtake the KV that is still on its way; equal moments keep the order above.
        ends.sort_by_key(|(at, _)| *at);
        let mut start = received;
        let mut spans = Vec::with_capacity(ends.len());
        for (at, name) in ends {
            spans.push(Span {
                name,
                start_seconds: start.saturating_sub(received).as_secs_f64(),
                seconds: at.saturating_sub(start).as_secs_f64(),
            });
            start = at;
        }
        let since_received = |moment| timeline.between(Moment::Received, moment).map(Nanos::as_secs_f64);
        Some(TimelineBody {
            e2e_seconds: since_received(Moment::Finished)?,
            ttft_seconds: since_received(Moment::FirstToken),
            spans,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(moments: &[(Moment, u64)]) -> Timeline {
        let mut timeline = Timeline::default();
        for (moment, ms) in moments {
            timeline.mark(*moment, Nanos(ms * 1_000_000));
        }
        timeline
    }

    fn names_and_ms(body: &TimelineBody) -> Vec<(&'static str, f64)> {
        let rounded = |seconds: f64| (seconds * 1e6).round() / 1e3;
        body.spans
            .iter()
            .map(|span| (span.name, rounded(span.seconds)))
            .collect()
    }

    #[test]
    fn spans_follow_the_moments_and_sum_to_the_whole() {
        let body = TimelineBody::of(&timeline(&[
            (Moment::Received, 1000),
            (Moment::Tokenized, 1002),
            (Moment::Admitted, 1005),
            (Moment::Placed, 1005),
            (Moment::Reserved, 1009),
            (Moment::PrefillStarted, 1010),
            (Moment::TransferStarted, 1030),
            (Moment::PrefillFinished, 1050),
            (Moment::FirstToken, 1051),
            (Moment::TransferFinished, 1053),
            (Moment::Joined, 1054),
            (Moment::Finished, 1100),
        ]))
        .unwrap();
        let expected = [
            ("tokenize", 2.0),
            ("queue", 3.0),
            ("place", 0.0),
            ("reserve", 4.0),
            ("prefill_wait", 1.0),
            ("prefill", 40.0),
            ("first_token", 1.0),
            ("transfer", 2.0),
            ("join", 1.0),
            ("decode", 46.0),
        ];
        assert_eq!(names_and_ms(&body), expected);
        assert!((body.e2e_seconds - 0.1).abs() < 1e-9);
        assert!((body.ttft_seconds.unwrap() - 0.051).abs() < 1e-9);
    }

    #[test]
    fn moments_out_of_order_still_sum_to_the_whole() {
        // A replay overwrites the prefill's moments with later ones, after the first token.
        let body = TimelineBody::of(&timeline(&[
            (Moment::Received, 10),
            (Moment::FirstToken, 20),
            (Moment::PrefillStarted, 30),
            (Moment::PrefillFinished, 60),
            (Moment::Finished, 50),
        ]))
        .unwrap();
        assert_eq!(
            names_and_ms(&body),
            [
                ("first_token", 10.0),
                ("prefill_wait", 10.0),
                ("prefill", 20.0),
                ("decode", 0.0)
            ]
        );
        let sum: f64 = body.spans.iter().map(|span| span.seconds).sum();
        assert!((sum - body.e2e_seconds).abs() < 1e-9);
        assert_eq!(
            TimelineBody::of(&timeline(&[(Moment::Received, 10)])),
            None,
            "not ended"
        );
    }
}
