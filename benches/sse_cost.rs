//! Server-sent events per second of the front door's own CPU time, over a generator without a model (`baton null`): at once,
//! where a connection is always ready to be written, and paced, where every token is a wake-up and a write of its own. The
//! clients' time is not counted: it is another process's.
//!
//! `cargo bench --bench sse_cost -- [--seconds N] [--output FILE]`. `BATON` names another build of the program.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const N_TOKENS: usize = 128;

/// How the null model speaks, and to how many streams.
struct Case {
    name: &'static str,
    /// At once, where absent.
    token_every: Option<&'static str>,
    n_streams: usize,
}

const CASES: [Case; 4] = [
    Case {
        name: "at once, 1 stream",
        token_every: None,
        n_streams: 1,
    },
    Case {
        name: "at once, 64 streams",
        token_every: None,
        n_streams: 64,
    },
    Case {
        name: "every 20 ms, 64 streams",
        token_every: Some("20ms"),
        n_streams: 64,
    },
    Case {
        name: "every 20 ms, 512 streams",
        token_every: Some("20ms"),
        n_streams: 512,
    },
];

/// `baton null`, ended on drop.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(token_every: Option<&str>) -> anyhow::Result<Server> {
        let program = std::env::var_os("BATON").unwrap_or_else(|| env!("CARGO_BIN_EXE_baton").into());
        let mut process = Command::new(program)
            .args(["null", "--log-level", "error"])
            .args(token_every.iter().flat_map(|every| ["--token-every", every]))
            .stdout(Stdio::piped())
            .spawn()
            .context("starting baton null")?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = lines.find_map(|line| line.ok().filter(|line| line.contains("ready: ")));
        let line = line.context("baton null ended before it was ready")?;
        let url = line.rsplit(' ').next().unwrap_or_default();
        let address = url.trim_start_matches("http://").to_owned();
        Ok(Server { process, address })
    }

    /// User and system time of all its threads so far, as getrusage would say it there.
    fn cpu_time(&self) -> anyhow::Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // The name may hold anything; behind its bracket come the state and so on: utime is the 12th, stime the 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(Duration::from_millis(
            ticks * 1000 / rustix::param::clock_ticks_per_second(),
        ))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Streams until `end`, one after the other; events with a token, which must be as many as were asked for.
async fn stream_until(address: &str, end: Instant) -> anyhow::Result<usize> {
    let mut connection = TcpStream::connect(address).await?;
    connection.set_nodelay(true)?;
    let body = format!(r#"{{"prompt":"a","stream":true,"ignore_eos":true,"max_tokens":{N_TOKENS}}}"#);
    let head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: ";
    let request = format!("{head}{}\r\n\r\n{body}", body.len());
    let mut buffer = vec![0; 64 << 10];
    let mut n_events = 0;
    while Instant::now() < end {
        connection.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n0\r\n\r\n") {
            let n = connection.read(&mut buffer).await?;
            ensure!(n > 0, "the server closed the connection");
            answer.extend_from_slice(&buffer[..n]);
        }
        let n = answer
            .windows(12)
            .filter(|bytes| bytes.starts_with(b"data: {\"id\""))
            .count();
        ensure!(n == N_TOKENS, "{n} events for {N_TOKENS} tokens");
        n_events += n;
    }
    Ok(n_events)
}

async fn measure(case: &Case, seconds: u64) -> anyhow::Result<Value> {
    let server = Server::start(case.token_every)?;
    // Connections, threads and caches are warm before the clock runs.
    stream_until(&server.address, Instant::now() + Duration::from_millis(200)).await?;
    let (before, began) = (server.cpu_time()?, Instant::now());
    let end = began + Duration::from_secs(seconds);
    let streams = (0..case.n_streams).map(|_| stream_until(&server.address, end));
    let n_events: usize = futures::future::try_join_all(streams).await?.into_iter().sum();
    let (cpu, wall) = (server.cpu_time()? - before, began.elapsed());
    let per_cpu_second = n_events as f64 / cpu.as_secs_f64();
    println!(
        "{:26} {n_events:>9} events, {:.2} s of CPU: {per_cpu_second:.0} a CPU-second",
        case.name,
        cpu.as_secs_f64()
    );
    Ok(json!({
        "case": case.name, "events": n_events, "cpu_seconds": cpu.as_secs_f64(), "wall_seconds": wall.as_secs_f64(),
        "events_per_cpu_second": per_cpu_second,
    }))
}

fn main() -> anyhow::Result<()> {
    let (mut seconds, mut output) = (10, None::<PathBuf>);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => seconds = value()?.parse().context("--seconds")?,
            "--output" => output = Some(value()?.into()),
            other => bail!("unknown argument {other:?}, expected --seconds or --output"),
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for case in &CASES {
        rows.push(runtime.block_on(measure(case, seconds))?);
    }
    if let Some(path) = output {
        let report = json!({ "bench": "sse_cost", "rows": rows });
        std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(())
}
