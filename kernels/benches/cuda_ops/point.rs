//! One measured point: what was done, beside its limit, as a line of JSON and a line to read.

use std::cell::RefCell;
use std::io::Write as _;
use std::path::Path;

use baton_kernels::Backend as _;
use baton_kernels::cuda::{Cuda, CudaMatrix, CudaTensor, CudaTimer};
use serde_json::{Value, json};

use crate::device::{matrix, tensor};
use crate::{Scale, fail, or_fail};

/// Pairs of work and limit that a point is measured by, after one that does not count.
const N_RUNS: usize = 15;

/// What bounds a piece of work.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// A kernel that only reads so many bytes.
    Read(usize),
    /// A copy that moves so many bytes: reads half of them and writes half.
    Copy(usize),
    /// The rate of one large product, for so many FLOPs.
    Product(f64),
    /// The later of both.
    ReadOrProduct(usize, f64),
    /// Copies of so many bytes to pinned memory of the host in one piece.
    ToHost(usize),
    /// The other way.
    FromHost(usize),
}

/// A piece of work.
pub struct Point<'a> {
    /// What summaries join by, with the case.
    pub op: &'a str,
    pub case: String,
    pub limit: Limit,
    /// Share of the limit that is aimed at, where one is.
    pub aim: Option<f64>,
}

/// Where points go.
pub struct Report {
    lines: Option<std::fs::File>,
    n_runs: usize,
}

/// The product whose rate counts as the peak of the matrix units.
pub struct Peak<'a> {
    cuda: &'a Cuda,
    timer: CudaTimer<'a>,
    x: CudaTensor,
    w: CudaMatrix,
    out: RefCell<CudaTensor>,
    dim: usize,
}

impl<'a> Peak<'a> {
    pub fn new(cuda: &'a Cuda, scale: Scale) -> Peak<'a> {
        let (dim, n_read_bytes) = match scale {
            Scale::Full => (8192, 256 << 20),
            Scale::Smoke => (16, 1 << 10),
        };
        Peak {
            cuda,
            timer: or_fail(cuda.timer(n_read_bytes, 0)),
            x: tensor(cuda, dim, dim),
            w: matrix(cuda, dim, dim),
            out: or_fail(cuda.tensor(dim, dim)).into(),
            dim,
        }
    }

    /// Seconds that so many FLOPs would take.
    fn seconds(&self, flops: f64) -> f64 {
        let product = || self.cuda.linear(&mut self.out.borrow_mut(), &self.x, &self.w);
        or_fail(self.timer.seconds(product)) * flops / (2.0 * (self.dim as f64).powi(3))
    }
}

/// What work and its limit are timed with, on the device that does the work.
pub struct Limits<'a> {
    pub timer: CudaTimer<'a>,
    /// Needed by limits that count FLOPs; of any device of the card.
    peak: Option<&'a Peak<'a>>,
}

impl<'a> Limits<'a> {
    /// Of work that reads and copies up to so many bytes.
    pub fn new(cuda: &'a Cuda, n_read_bytes: usize, n_copied_bytes: usize, peak: Option<&'a Peak<'a>>) -> Limits<'a> {
        // The timer reads whole runs of 16 bytes.
        let [n_read_bytes, n_copied_bytes] = [n_read_bytes, n_copied_bytes].map(|n| n.next_multiple_of(16));
        let timer = or_fail(cuda.timer(n_read_bytes.max(16), n_copied_bytes));
        Limits { timer, peak }
    }

    fn seconds(&self, limit: Limit) -> f64 {
        let timed = match limit {
            Limit::Read(n_bytes) => self.timer.read_seconds(n_bytes),
            Limit::Copy(n_bytes) => self.timer.copy_seconds(n_bytes / 2),
            Limit::Product(flops) => return self.peak.expect("made where FLOPs are counted").seconds(flops),
            Limit::ReadOrProduct(n_bytes, flops) => {
                return self
                    .seconds(Limit::Read(n_bytes))
                    .max(self.seconds(Limit::Product(flops)));
            }
            Limit::ToHost(n_bytes) => self
                .timer
                .host_bytes(n_bytes)
                .and_then(|mut host| self.timer.to_host_seconds(&mut host)),
            Limit::FromHost(n_bytes) => self
                .timer
                .host_bytes(n_bytes)
                .and_then(|host| self.timer.from_host_seconds(&host)),
        };
        or_fail(timed)
    }
}

impl Report {
    pub fn create(path: Option<&Path>, scale: Scale) -> Report {
        let create = |path: &Path| {
            std::fs::File::create(path).unwrap_or_else(|error| fail(&format!("create {}: {error}", path.display())))
        };
        Report {
            lines: path.map(create),
            n_runs: match scale {
                Scale::Full => N_RUNS,
                Scale::Smoke => 1,
            },
        }
    }

    /// Measures what `queue` queues by the card's clock, in turn with its limit.
    pub fn measure(&mut self, limits: &Limits<'_>, point: Point<'_>, mut queue: impl FnMut()) {
        self.measure_by(limits, point, || or_fail(limits.timer.seconds(&mut queue)));
    }

    /// The same for work that knows its own seconds.
    pub fn measure_by(&mut self, limits: &Limits<'_>, point: Point<'_>, mut seconds: impl FnMut() -> f64) {
        seconds();
        limits.seconds(point.limit);
        let pairs: Vec<(f64, f64)> = (0..self.n_runs)
            .map(|_| (seconds(), limits.seconds(point.limit)))
            .collect();
        let took = median(pairs.iter().map(|(seconds, _)| *seconds));
        let share = median(pairs.iter().map(|(seconds, limit)| limit / seconds));
        let (bytes, flops, by) = match point.limit {
            Limit::Read(n_bytes) => (Some(n_bytes), None, "read"),
            Limit::Copy(n_bytes) => (Some(n_bytes), None, "copy"),
            Limit::Product(flops) => (None, Some(flops), "product"),
            Limit::ReadOrProduct(n_bytes, flops) => (Some(n_bytes), Some(flops), "read or product"),
            Limit::ToHost(n_bytes) => (Some(n_bytes), None, "one copy to the host"),
            Limit::FromHost(n_bytes) => (Some(n_bytes), None, "one copy from the host"),
        };
        println!(
            "{:<28} {:<36} {:>10.1} us  {:>5.1} % of {by}",
            point.op,
            point.case,
            took * 1e6,
            100.0 * share
        );
        self.write(&json!({
            "op": point.op,
            "case": point.case,
            "peer": "baton",
            "seconds": took,
            "of_limit": share,
            "limit": by,
            "aim": point.aim,
            "bytes": bytes,
            "flops": flops,
            "samples_s": pairs.iter().map(|(seconds, _)| seconds).collect::<Vec<_>>(),
            "limit_samples_s": pairs.iter().map(|(_, limit)| limit).collect::<Vec<_>>(),
        }));
    }

    fn write(&mut self, line: &Value) {
        let Some(file) = &mut self.lines else { return };
        writeln!(file, "{line}").unwrap_or_else(|error| fail(&format!("write the results: {error}")));
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}
