//! Recorded arrivals: the CSV of the Azure LLM inference traces (2023 and 2024), and the JSON lines of Mooncake's traces.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::lengths::LENGTH_LIMIT;

/// Tokens that one hash id of a Mooncake trace stands for; the last one of a prompt may stand for fewer.
pub const TRACE_BLOCK_TOKENS: u32 = 512;

/// A trace of more requests than this is refused.
const TRACE_LIMIT: usize = 10_000_000;
/// So is one with a longer line.
const LINE_LIMIT_BYTES: u64 = 16 << 20;

const CSV_HEADER: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// One recorded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// From the first of the trace.
    pub at: Duration,
    /// Prompt tokens, at least 1.
    pub input_len: u32,
    /// Generated tokens, at least 1.
    pub output_len: u32,
    /// Whose equality says which prompts begin with the same [`TRACE_BLOCK_TOKENS`] tokens; empty if nothing is known.
    pub hash_ids: Vec<u64>,
}

/// A trace that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("trace {path}: {problem}")]
pub struct TraceError {
    path: PathBuf,
    problem: TraceProblem,
}

/// What is wrong with a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceProblem {
    /// It cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A line is not of the format.
    #[error("line {line}: {field}: found {found:?}, expected {expected}")]
    BadLine {
        /// From 1.
        line: usize,
        /// Which part of it.
        field: &'static str,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// It holds none.
    #[error("no requests")]
    Empty,
    /// It holds too many.
    #[error("more than {TRACE_LIMIT} requests")]
    TooLong,
}

/// Reads the trace at `path`; its first line says which format it has. Ascending in time.
///
/// # Errors
/// Names the line, the field and the value.
pub fn read(path: &Path) -> Result<Vec<TraceRequest>, TraceError> {
    let file = std::fs::File::open(path).map_err(TraceProblem::from);
    file.and_then(|file| parse(std::io::BufReader::new(file)))
        .map_err(|problem| TraceError {
            path: path.to_owned(),
            problem,
        })
}

fn parse(mut reader: impl BufRead) -> Result<Vec<TraceRequest>, TraceProblem> {
    let mut requests: Vec<(u128, TraceRequest)> = Vec::new();
    let mut is_csv = false;
    let mut buffer = Vec::new();
    for line in 1.. {
        buffer.clear();
        let n_bytes = std::io::Read::take(&mut reader, LINE_LIMIT_BYTES).read_until(b'\n', &mut buffer)?;
        if n_bytes == 0 {
            break;
        }
        let text = std::str::from_utf8(&buffer).map_err(|_| TraceProblem::BadLine {
            line,
            field: "text",
            found: String::from_utf8_lossy(&buffer).chars().take(40).collect(),
            expected: "UTF-8",
        })?;
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            continue;
        }
        if line == 1 && !text.starts_with('{') {
            header(text)?;
            is_csv = true;
            continue;
        }
        let request = if is_csv { csv_line(text) } else { json_line(text) };
        requests.push(request.map_err(|(field, found, expected)| TraceProblem::BadLine {
            line,
            field,
            found: found.chars().take(80).collect(),
            expected,
        })?);
        if requests.len() > TRACE_LIMIT {
            return Err(TraceProblem::TooLong);
        }
    }
    // Some traces are not quite in order; equal times keep theirs.
    requests.sort_by_key(|(at, _)| *at);
    let first = requests.first().ok_or(TraceProblem::Empty)?.0;
    let since = |at: u128| Duration::from_nanos(u64::try_from(at - first).unwrap_or(u64::MAX));
    Ok(requests
        .into_iter()
        .map(|(at, request)| TraceRequest {
            at: since(at),
            ..request
        })
        .collect())
}

fn header(text: &str) -> Result<(), TraceProblem> {
    match text.split(',').map(str::trim).eq(CSV_HEADER) {
        true => Ok(()),
        false => Err(TraceProblem::BadLine {
            line: 1,
            field: "header",
            found: text.chars().take(80).collect(),
            expected: "TIMESTAMP,ContextTokens,GeneratedTokens, or JSON with timestamp, input_length, output_length, hash_ids",
        }),
    }
}

/// Field, value, and what was expected.
type BadField = (&'static str, String, &'static str);

/// Nanoseconds from some origin, and the request.
type Timed = (u128, TraceRequest);

fn length(field: &'static str, text: &str) -> Result<u32, BadField> {
    let length = text
        .trim()
        .parse()
        .ok()
        .filter(|length| (1..=LENGTH_LIMIT).contains(length));
    length.ok_or_else(|| (field, text.to_owned(), "a number of tokens, at least 1"))
}

fn csv_line(text: &str) -> Result<Timed, BadField> {
    let fields: Vec<&str> = text.split(',').collect();
    let &[at, input, output] = fields.as_slice() else {
        return Err(("fields", text.to_owned(), "three of them"));
    };
    let nanos = nanos(at).ok_or_else(|| {
        (
            CSV_HEADER[0],
            at.to_owned(),
            "a time such as 2023-11-16 18:17:03.9799600",
        )
    })?;
    let request = TraceRequest {
        at: Duration::ZERO,
        input_len: length(CSV_HEADER[1], input)?,
        output_len: length(CSV_HEADER[2], output)?,
        hash_ids: Vec::new(),
    };
    Ok((nanos, request))
}

/// Nanoseconds since the year 0 of `2023-11-16 18:17:03.9799600`, whose fraction and whose `+00:00` may be absent.
fn nanos(text: &str) -> Option<u128> {
    let text = text.trim().trim_end_matches("+00:00").trim_end_matches('Z');
    let (date, time) = text.split_once([' ', 'T'])?;
    let number = |text: Option<&str>, digits: usize, range: std::ops::RangeInclusive<u32>| {
        let text = text.filter(|text| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit()))?;
        text.parse().ok().filter(|number| range.contains(number))
    };
    let mut date = date.splitn(3, '-');
    let year = number(date.next(), 4, 1..=9999)?;
    let month = number(date.next(), 2, 1..=12)?;
    let day = number(date.next(), 2, 1..=31)?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, ""));
    let mut clock = clock.splitn(3, ':');
    let hour = number(clock.next(), 2, 0..=23)?;
    let minute = number(clock.next(), 2, 0..=59)?;
    let second = number(clock.next(), 2, 0..=60)?;
    let digits = fraction.bytes().all(|byte| byte.is_ascii_digit()) && fraction.len() <= 9;
    let fraction: u128 = digits.then(|| format!("{fraction:0<9}").parse().ok()).flatten()?;
    // Years begin in March, so that the leap day is the last of its year.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let seconds = u128::from(days) * 86_400 + u128::from(hour * 3600 + minute * 60 + second);
    Some(seconds * 1_000_000_000 + fraction)
}

#[derive(Deserialize)]
struct MooncakeLine {
    /// Milliseconds.
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

fn json_line(text: &str) -> Result<Timed, BadField> {
    let line: MooncakeLine = serde_json::from_str(text).map_err(|_| {
        (
            "line",
            text.to_owned(),
            "JSON with timestamp, input_length, output_length, hash_ids",
        )
    })?;
    if !(0.0..=1e15).contains(&line.timestamp) {
        return Err(("timestamp", line.timestamp.to_string(), "milliseconds, at least 0"));
    }
    let input_len = length("input_length", &line.input_length.to_string())?;
    let n_blocks = input_len.div_ceil(TRACE_BLOCK_TOKENS) as usize;
    if line.hash_ids.len() > n_blocks {
        let found = format!("{} for {input_len} tokens", line.hash_ids.len());
        return Err(("hash_ids", found, "at most one for each 512 tokens"));
    }
    let request = TraceRequest {
        at: Duration::ZERO,
        input_len,
        output_len: length("output_length", &line.output_length.to_string())?,
        hash_ids: line.hash_ids,
    };
    Ok(((line.timestamp * 1e6).round() as u128, request))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<TraceRequest>, String> {
        parse(text.as_bytes()).map_err(|problem| problem.to_string())
    }

    #[test]
    fn the_csv_of_azure_is_read_with_its_fractions_and_over_midnight() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-12-31 23:59:59.9799600,4808,10\r\n\
                    2024-01-01 00:00:01.0000000,3180,8\r\n2024-05-10 00:00:00.009930+00:00,7,1";
        let requests = parsed(text).expect("valid");
        assert_eq!(requests.len(), 3);
        assert_eq!(requests[0].at, Duration::ZERO);
        assert_eq!(requests[1].at, Duration::from_nanos(1_020_040_000));
        // 130 days of a leap year lie between the first of January and the tenth of May.
        let days = requests[2].at - Duration::from_nanos(20_040_000);
        assert_eq!(
            days,
            Duration::from_secs(130 * 86_400) + Duration::from_nanos(9_930_000)
        );
        assert_eq!((requests[1].input_len, requests[1].output_len), (3180, 8));
    }

    #[test]
    fn the_json_lines_of_mooncake_are_read_and_sorted_by_time() {
        let text = "{\"timestamp\": 3000, \"input_length\": 979, \"output_length\": 140, \"hash_ids\": [0, 7813]}\n\
                    {\"timestamp\": 2500.5, \"input_length\": 512, \"output_length\": 1, \"hash_ids\": [4]}\n\n";
        let requests = parsed(text).expect("valid");
        assert_eq!(requests[0].hash_ids, [4]);
        assert_eq!(requests[1].at, Duration::from_micros(499_500));
        assert_eq!(requests[1].hash_ids, [0, 7813]);
    }

    #[test]
    fn bad_lines_are_named_with_field_and_value() {
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        for (text, expected) in [
            (
                format!("{csv}2023-11-16 18:17:03,12,0"),
                "line 2: GeneratedTokens: found \"0\"",
            ),
            (format!("{csv}2023-11-16 18:17:03,12"), "line 2: fields"),
            (
                format!("{csv}2023-13-16 18:17:03,12,5"),
                "TIMESTAMP: found \"2023-13-16",
            ),
            (format!("{csv}yesterday,12,5"), "TIMESTAMP: found \"yesterday\""),
            (csv.to_owned(), "no requests"),
            (String::new(), "no requests"),
            ("time,in,out\n1,2,3".to_owned(), "line 1: header: found \"time,in,out\""),
            (
                "{\"timestamp\":1,\"input_length\":512,\"output_length\":1,\"hash_ids\":[1,2]}".to_owned(),
                "hash_ids: found \"2 for 512 tokens\"",
            ),
            (
                "{\"timestamp\":-1,\"input_length\":5,\"output_length\":1}".to_owned(),
                "timestamp: found \"-1\"",
            ),
            ("{\"timestamp\":1}".to_owned(), "line 1: line"),
        ] {
            let error = parsed(&text).expect_err(&text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_published_traces_are_read_whole() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/workloads");
        // Counts as their authors publish them.
        for (name, n_requests) in [
            ("azure/AzureLLMInferenceTrace_code.csv", 8819),
            ("azure/AzureLLMInferenceTrace_conv.csv", 19_366),
            ("mooncake/conversation_trace.jsonl", 12_031),
            ("mooncake/synthetic_trace.jsonl", 3993),
        ] {
            let path = root.join(name);
            if !path.exists() {
                println!("SKIPPED: no workload data ({name})");
                continue;
            }
            assert_eq!(read(&path).expect(name).len(), n_requests, "{name}");
        }
    }
}
