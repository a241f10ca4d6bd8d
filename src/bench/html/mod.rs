//! A report as one page: plots as inline SVG, no script, no font, nothing that is loaded from elsewhere.

mod svg;

use self::svg::{COLOURS, Plot, escape, short};
use super::compare::CompareReport;
use super::endpoint::Completion;
use super::report::{BenchReport, RequestRate};
use super::samples::{Run, ms};
use super::sweep::SweepReport;
use super::table;

const STYLE: &str = "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1300px;padding:0 1em;color:#222}\
h1{font-size:20px}h2{font-size:16px;margin-top:2em}.p{display:grid;grid-template-columns:repeat(auto-fit,minmax(520px,1fr));gap:12px}\
svg{width:100%;font:11px system-ui,sans-serif;fill:#444}svg .t{font-size:13px;fill:#111}svg .g{stroke:#e4e4e4}\
pre{background:#f6f6f6;padding:1em;overflow-x:auto;font-size:12px}";

/// Points of one line; more cannot be told apart.
const CURVE_POINTS: usize = 400;
/// Requests of one timeline; of more, every so-manieth is drawn.
const TIMELINE_ROWS: usize = 1500;

/// A named value of a request, or several.
type Metric = (&'static str, fn(&Completion) -> Vec<f64>);

/// The measurements that one line of a plot stands for.
struct Series<'a> {
    name: String,
    colour: &'static str,
    runs: Vec<&'a Run>,
}

impl Series<'_> {
    fn values(&self, of: fn(&Completion) -> Vec<f64>) -> Vec<f64> {
        let completions = self.runs.iter().flat_map(|run| run.completions());
        let mut values: Vec<f64> = completions.flat_map(|(_, completion)| of(completion)).collect();
        values.sort_by(f64::total_cmp);
        values
    }
}

/// The page of one measurement.
pub fn single(report: &BenchReport, run: &Run) -> String {
    let series = [Series {
        name: String::new(),
        colour: COLOURS[0],
        runs: vec![run],
    }];
    let mut body = section("Latencies", &distributions(&series));
    body += &section(
        "Over time",
        &[timeline("Requests", run), tokens(&series), in_flight(&series)],
    );
    page("baton bench", &table::single(report), report, &body)
}

/// The page of a comparison; `runs` are those of A and of B, in order.
pub fn compare(report: &CompareReport, runs: &[Vec<Run>; 2]) -> String {
    let series: Vec<Series<'_>> = [("A", &runs[0]), ("B", &runs[1])]
        .into_iter()
        .zip(COLOURS)
        .map(|((name, runs), colour)| Series {
            name: name.into(),
            colour,
            runs: runs.iter().collect(),
        })
        .collect();
    let mut body = section("Latencies, all rounds together", &distributions(&series));
    for (index, (a, b)) in runs[0].iter().zip(&runs[1]).enumerate() {
        let plots = [timeline("Requests to A", a), timeline("Requests to B", b)];
        body += &section(&format!("Round {}", index + 1), &plots);
    }
    let Some(round) = report.rounds.first() else {
        return String::new();
    };
    page("baton bench: comparison", &table::compare(report), &round.a, &body)
}

/// The page of a search for the goodput; `runs` are those of the points.
pub fn sweep(report: &SweepReport, runs: &[Run]) -> String {
    let rates: Vec<f64> = report.points.iter().map(|point| rate(point).unwrap_or(0.0)).collect();
    let mut order: Vec<usize> = (0..rates.len()).collect();
    order.sort_by(|a, b| rates[*a].total_cmp(&rates[*b]));
    let highest = rates.iter().copied().fold(0.0, f64::max);
    let curve = |value: fn(&BenchReport) -> f64| -> Vec<(f64, f64)> {
        order
            .iter()
            .map(|&index| (rates[index], value(&report.points[index])))
            .collect()
    };
    let share = curve(|point| point.goodput_share.unwrap_or(0.0));
    let mut shares = Plot::new(
        "Share of requests within objectives",
        "arrivals per second",
        highest,
        "share",
        1.0,
    );
    shares.level(&format!("{} %", short(report.attainment * 100.0)), report.attainment);
    shares.line("", COLOURS[0], &share);
    shares.dots(COLOURS[0], &share);
    let goodput = curve(|point| point.request_goodput.unwrap_or(0.0));
    let throughput = curve(|point| point.request_throughput);
    let mut rates_plot = Plot::new(
        "Goodput against rate",
        "arrivals per second",
        highest,
        "requests per second",
        highest,
    );
    rates_plot.line("completed", COLOURS[1], &throughput);
    rates_plot.line("good", COLOURS[2], &goodput);
    rates_plot.dots(COLOURS[2], &goodput);
    let names: Vec<String> = rates.iter().map(|rate| format!("{}/s", short(*rate))).collect();
    // Of many rates, those spread over the range say enough.
    let step = order.len().div_ceil(COLOURS.len()).max(1);
    let series: Vec<Series<'_>> = order
        .iter()
        .step_by(step)
        .zip(COLOURS)
        .map(|(&index, colour)| Series {
            name: names[index].clone(),
            colour,
            runs: vec![&runs[index]],
        })
        .collect();
    let mut body = section("Goodput", &[rates_plot.finish(), shares.finish()]);
    body += &section("Latencies by rate", &distributions(&series));
    match report.points.first() {
        Some(point) => page("baton bench: rate sweep", &table::sweep(report), point, &body),
        None => String::new(),
    }
}

fn rate(report: &BenchReport) -> Option<f64> {
    match report.request_rate {
        RequestRate::PerSecond(rate) => Some(rate),
        RequestRate::Unlimited(_) => None,
    }
}

fn page(title: &str, table: &str, report: &BenchReport, body: &str) -> String {
    let machine = &report.machine;
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><h1>{title}{}</h1>\n<p>{} of {}, {}, {}; {}</p>\n<pre>{}</pre>\n{body}\n<h2>How it was measured</h2>\n\
         <pre>{}\ncommit {}, version {}, seed {}, {} UTC\n{}, {} cores, {} MiB, Linux {}</pre></body></html>\n",
        report
            .label
            .as_ref()
            .map(|label| format!(": {}", escape(label)))
            .unwrap_or_default(),
        escape(&report.model_id),
        escape(&report.server),
        escape(&report.backend),
        escape(&report.arrivals),
        escape(&report.lengths),
        escape(table),
        escape(&report.command),
        escape(report.commit.as_deref().unwrap_or("unknown")),
        escape(&report.baton_version),
        report.seed,
        escape(&report.date),
        escape(&machine.cpu),
        machine.n_cores,
        machine.memory_bytes >> 20,
        escape(&machine.kernel),
    )
}

fn section(title: &str, plots: &[String]) -> String {
    format!(
        "<h2>{}</h2>\n<div class=\"p\">{}</div>\n",
        escape(title),
        plots.join("\n")
    )
}

fn distributions(series: &[Series<'_>]) -> Vec<String> {
    let metrics: [Metric; 4] = [
        ("Time to first token", |c| vec![ms(c.ttft())]),
        ("Inter-token latency", |c| c.gaps().map(ms).collect()),
        ("Time per output token", |c| c.tpot().map(ms).into_iter().collect()),
        ("End-to-end latency", |c| vec![ms(c.e2e())]),
    ];
    metrics.into_iter().map(|(title, of)| cdf(title, of, series)).collect()
}

/// The cumulative distribution of each series.
fn cdf(title: &str, of: fn(&Completion) -> Vec<f64>, series: &[Series<'_>]) -> String {
    let all: Vec<Vec<f64>> = series.iter().map(|series| series.values(of)).collect();
    // Below a microsecond there is nothing to see on a logarithmic axis.
    let ends =
        |pick: fn(f64, f64) -> f64, start| all.iter().flatten().copied().map(|ms| ms.max(1e-3)).fold(start, pick);
    let (low, high) = (ends(f64::min, f64::INFINITY), ends(f64::max, 1e-3));
    let low = if low.is_finite() { low } else { 1e-3 };
    let mut plot = Plot::with_log_x(title, "ms", [low, high], "share of values", 1.0);
    for (series, values) in series.iter().zip(&all) {
        let step = values.len().div_ceil(CURVE_POINTS).max(1);
        let last = values.len().saturating_sub(1);
        let kept = values
            .iter()
            .enumerate()
            .filter(|(index, _)| index % step == 0 || *index == last);
        let points: Vec<(f64, f64)> = kept
            .map(|(index, value)| (value.max(1e-3), (index + 1) as f64 / values.len() as f64))
            .collect();
        plot.line(&series.name, series.colour, &points);
    }
    plot.finish()
}

/// A row for each request: waiting for the first token, then generating; failed ones apart.
fn timeline(title: &str, run: &Run) -> String {
    let mut samples: Vec<_> = run.samples.iter().collect();
    samples.sort_by_key(|sample| sample.started);
    let step = samples.len().div_ceil(TIMELINE_ROWS).max(1);
    let (mut waiting, mut generating, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for (row, sample) in samples.iter().enumerate().step_by(step) {
        let (started, y) = (sample.started.as_secs_f64(), row as f64 + 0.5);
        match &sample.outcome {
            Ok(completion) => {
                let first = started + completion.ttft().as_secs_f64();
                waiting.push((started, first, y));
                generating.push((first, started + completion.e2e().as_secs_f64(), y));
            }
            Err(_) => failed.push((started, sample.ended.as_secs_f64(), y)),
        }
    }
    let end = samples
        .iter()
        .map(|sample| sample.ended.as_secs_f64())
        .fold(0.0, f64::max);
    let n_rows = samples.len() as f64;
    let width = (200.0 / (samples.len() / step).max(1) as f64).clamp(0.4, 8.0);
    let mut plot = Plot::new(title, "seconds", end, "request, by start", n_rows);
    plot.spans("waiting", COLOURS[4], width, &waiting);
    plot.spans("generating", COLOURS[0], width, &generating);
    if !failed.is_empty() {
        plot.spans("failed", COLOURS[1], width, &failed);
    }
    plot.finish()
}

fn tokens(series: &[Series<'_>]) -> String {
    let curves: Vec<Vec<(f64, f64)>> = series
        .iter()
        .flat_map(|series| &series.runs)
        .map(|run| {
            let per_second = run.tokens_per_second();
            let points = per_second
                .iter()
                .enumerate()
                .map(|(second, n_tokens)| (second as f64 + 0.5, *n_tokens as f64));
            points.collect()
        })
        .collect();
    over_time("Tokens per second", "tokens", &curves)
}

fn in_flight(series: &[Series<'_>]) -> String {
    let curves: Vec<Vec<(f64, f64)>> = series
        .iter()
        .flat_map(|series| &series.runs)
        .map(|run| {
            let mut edges: Vec<(f64, f64)> = run
                .samples
                .iter()
                .flat_map(|sample| [(sample.started.as_secs_f64(), 1.0), (sample.ended.as_secs_f64(), -1.0)])
                .collect();
            edges.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
            let mut n_open = 0.0;
            let steps = edges.into_iter().flat_map(|(at, change)| {
                let before = n_open;
                n_open += change;
                [(at, before), (at, n_open)]
            });
            steps.collect()
        })
        .collect();
    over_time("Requests in flight", "requests", &curves)
}

fn over_time(title: &str, y_name: &str, curves: &[Vec<(f64, f64)>]) -> String {
    let highest = |pick: fn(&(f64, f64)) -> f64| curves.iter().flatten().map(pick).fold(0.0, f64::max);
    let mut plot = Plot::new(
        title,
        "seconds",
        highest(|point| point.0),
        y_name,
        highest(|point| point.1) * 1.05,
    );
    for (curve, colour) in curves.iter().zip(COLOURS) {
        plot.line("", colour, curve);
    }
    plot.finish()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::endpoint::RequestFailure;
    use super::super::samples::Sample;
    use super::*;

    fn run() -> Run {
        let sample = |index: usize| Sample {
            index,
            session: index,
            input_len: 3,
            output_len: 2,
            started: Duration::from_millis(100 * index as u64),
            delay: Duration::ZERO,
            ended: Duration::from_millis(100 * index as u64 + 250),
            outcome: match index {
                3 => Err(RequestFailure::Incomplete("no usage")),
                _ => Ok(Completion {
                    token_times: vec![Duration::from_millis(50), Duration::from_millis(50 + 10 * index as u64)],
                    n_input_tokens: 3,
                    n_output_tokens: 2,
                    n_cached_tokens: 0,
                    text: String::new(),
                }),
            },
        };
        Run {
            samples: (0..5).map(sample).collect(),
            n_sessions: 5,
        }
    }

    #[test]
    fn a_distribution_ends_at_one_and_leaves_failures_out() {
        let run = run();
        let series = Series {
            name: "x".into(),
            colour: "red",
            runs: vec![&run],
        };
        assert_eq!(series.values(|c| c.gaps().map(ms).collect()), [0.0, 10.0, 20.0, 40.0]);
        let svg = cdf("Gaps", |c| c.gaps().map(ms).collect(), &[series]);
        // The last point: 40 ms between 0.001 and 50 on a logarithmic axis, at the top of the plot.
        let x = 64.0 + 540.0 * (40.0_f64 / 0.001).ln() / (50.0_f64 / 0.001).ln();
        assert!(svg.contains(&format!("L{x:.1} 34.0")), "{svg}");
    }

    #[test]
    fn the_timeline_tells_waiting_generating_and_failed_apart() {
        let svg = timeline("Requests", &run());
        for name in ["waiting", "generating", "failed"] {
            assert!(svg.contains(name), "{name}");
        }
        let n_rows = |colour: &str| {
            let path = svg
                .split("<path ")
                .find(|path| path.contains(&format!("stroke=\"{colour}\" stroke-width=\"8")));
            path.expect("drawn").matches('M').count()
        };
        assert_eq!((n_rows(COLOURS[4]), n_rows(COLOURS[1])), (4, 1));
    }
}
