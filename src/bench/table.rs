//! Reports as text for a terminal.

use std::fmt::Write as _;

use super::compare::{CompareReport, Round};
use super::report::{BenchReport, E2elMs, ItlMs, RequestRate, TpotMs, TtftMs};
use super::sweep::SweepReport;

/// One measurement.
pub fn single(report: &BenchReport) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<34}{value:>14}");
    };
    line("completed requests", report.completed.to_string());
    line("failed requests", report.failed.to_string());
    for (kind, count) in &report.error_counts {
        line(&format!("  {kind}"), count.to_string());
    }
    if report.wrong_length > 0 {
        line("outputs of another length", report.wrong_length.to_string());
    }
    line("duration (s)", format!("{:.2}", report.duration));
    line("prompt tokens", report.total_input_tokens.to_string());
    line("  of them cached", report.total_cached_tokens.to_string());
    line("generated tokens", report.total_output_tokens.to_string());
    line("requests per second", format!("{:.3}", report.request_throughput));
    if let (Some(goodput), Some(share), Some(objectives)) =
        (report.request_goodput, report.goodput_share, &report.goodput_objectives)
    {
        line("  of them within objectives", format!("{goodput:.3}"));
        line(&format!("share within {objectives}"), format!("{:.1} %", share * 100.0));
    }
    line(
        "generated tokens per second",
        format!("{:.2}", report.output_throughput),
    );
    line("tokens per second", format!("{:.2}", report.total_token_throughput));
    line("most requests in flight", report.max_concurrent_requests.to_string());
    line("latest start (ms)", format!("{:.2}", report.max_start_delay_ms));
    let _ = writeln!(
        text,
        "\n{:<6}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}   {:<22}{:<22}",
        "ms", "mean", "std", "p50", "p90", "p95", "p99", "p50, 95 % interval", "p99, 95 % interval"
    );
    for (name, keys, values) in latencies(report) {
        let _ = write!(text, "{name:<6}");
        for value in values {
            let _ = write!(text, "{value:>10.2}");
        }
        let [_, _, p50, _, _, p99] = keys;
        let interval = |key: &str| match report.ci95.get(key) {
            Some([low, high]) => format!("{low:.2} to {high:.2}"),
            None => "-".to_owned(),
        };
        let _ = writeln!(text, "   {:<22}{}", interval(p50), interval(p99));
    }
    text.truncate(text.trim_end().len());
    text
}

/// Name, keys and values of the four latencies.
pub fn latencies(report: &BenchReport) -> [(&'static str, [&'static str; 6], [f64; 6]); 4] {
    [
        ("TTFT", TtftMs::KEYS, report.ttft.values()),
        ("TPOT", TpotMs::KEYS, report.tpot.values()),
        ("ITL", ItlMs::KEYS, report.itl.values()),
        ("E2E", E2elMs::KEYS, report.e2el.values()),
    ]
}

/// Two servers in turn.
pub fn compare(report: &CompareReport) -> String {
    let mut text = format!("A {}\nB {}\n\n", report.a, report.b);
    let _ = writeln!(
        text,
        "{:<20}{:>10}{:>10}{:>10}   each round",
        "B / A", "median", "min", "max"
    );
    for (key, ratio) in &report.ratios {
        let rounds: Vec<String> = ratio.rounds.iter().map(|ratio| format!("{ratio:.3}")).collect();
        let (median, min, max) = (ratio.median, ratio.min, ratio.max);
        let _ = writeln!(
            text,
            "{key:<20}{median:>10.3}{min:>10.3}{max:>10.3}   {}",
            rounds.join(" ")
        );
    }
    let failed =
        |side: fn(&Round) -> &BenchReport| -> usize { report.rounds.iter().map(|round| side(round).failed).sum() };
    let (a, b) = (failed(|round| &round.a), failed(|round| &round.b));
    let _ = write!(text, "\nfailed requests: A {a}, B {b}");
    text
}

/// A search for the goodput.
pub fn sweep(report: &SweepReport) -> String {
    let mut text = format!(
        "{:>10}{:>10}{:>10}{:>12}{:>12}{:>12}{:>14}\n",
        "rate", "share", "goodput", "TTFT p99", "TPOT p99", "failed", "latest start"
    );
    for point in &report.points {
        let rate = match &point.request_rate {
            RequestRate::PerSecond(rate) => format!("{rate:.3}"),
            RequestRate::Unlimited(name) => name.clone(),
        };
        let _ = writeln!(
            text,
            "{rate:>10}{:>8.1} %{:>10.3}{:>9.2} ms{:>9.2} ms{:>12}{:>11.2} ms",
            point.goodput_share.unwrap_or(0.0) * 100.0,
            point.request_goodput.unwrap_or(0.0),
            point.ttft.p99_ttft_ms,
            point.tpot.p99_tpot_ms,
            point.failed,
            point.max_start_delay_ms
        );
    }
    let percent = report.attainment * 100.0;
    let found = match (report.goodput_rate, report.lowest_rate_missed) {
        (Some(met), Some(missed)) => format!("{met:.3}/s (missed at {missed:.3}/s)"),
        (Some(met), None) => format!("at least {met:.3}/s: no rate tried was missed"),
        (None, Some(missed)) => format!("below {missed:.3}/s: no rate tried was met"),
        (None, None) => "nothing was tried".to_owned(),
    };
    let _ = write!(
        text,
        "\ngoodput, {percent} % within {}: {found}",
        report.goodput_objectives
    );
    text
}
