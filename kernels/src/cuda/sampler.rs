//! Sampling where the logits lie: tokens by `sample`, their log-probabilities by `logprobs`. The ids stay on the device, where
//! the next step's embedding reads them, and go to the host behind the step, without anyone waiting for it. Masks, penalties
//! and biases are not known here.

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, result};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::During as _;
use super::function::{Args, Function};
use super::kernels::SamplingKernels;
use super::launch;
use super::opened::Cuda;
use super::sampling::{MAX_CANDIDATES, RowStatus, Sampling};
use super::tensor::{CudaMatrix, CudaTensor};
use crate::backend::{Backend as _, RowLogprobs, RowSampler, RowSampling, SampledRow};
use crate::error::KernelError;
use crate::layout::DType;

/// Most likely tokens that `logprobs` puts in order.
const MAX_TOP: usize = 32;
/// Words of a row on the device and on the host: id, status, log-probability, rank, and both of each likely token.
const ROW_WORDS: usize = 4 + 2 * MAX_TOP;
/// Steps whose tokens may be on their way: the one that runs and the one behind it.
const MAX_IN_FLIGHT: usize = 2;

/// Of one model on one device.
pub struct CudaSampler {
    device: Arc<Device>,
    kernels: SamplingKernels,
    vocab: usize,
    max_rows: usize,
    /// Section `s` is `[max_rows]` words from `s * max_rows` on, in the order of [`Section`]; the last two of rows of `n_top`.
    words: DeviceBuffer,
    /// `[max_rows]` u32: what the step's embedding reads.
    token_ids: DeviceBuffer,
    /// Rows of the step that is being queued.
    step: Step,
    in_flight: VecDeque<Step>,
    /// Memory for the steps to come.
    spare: Vec<(PinnedBuffer, CudaEvent)>,
    sampled: Vec<SampledRow>,
}

#[derive(Default)]
struct Step {
    /// Of each row, how many of the most likely tokens are wanted, if log-probabilities are.
    n_tops: Vec<Option<usize>>,
    /// Most of them, where any are wanted.
    n_top: Option<usize>,
    /// As the device's words; behind the copy.
    host: Option<(PinnedBuffer, CudaEvent)>,
}

/// Where a row's words are.
#[derive(Clone, Copy)]
enum Section {
    Ids,
    Status,
    Logprob,
    Rank,
    TopIds,
    TopLogprobs,
}

impl Section {
    /// In rows of one word.
    fn place(self) -> usize {
        match self {
            Section::Ids => 0,
            Section::Status => 1,
            Section::Logprob => 2,
            Section::Rank => 3,
            Section::TopIds => 4,
            Section::TopLogprobs => 4 + MAX_TOP,
        }
    }
}

impl CudaSampler {
    pub(super) fn new(cuda: &Cuda, max_rows: usize, vocab: usize) -> Result<CudaSampler, KernelError> {
        let device = Arc::clone(&cuda.device);
        let n_bytes = max_rows * ROW_WORDS * size_of::<u32>();
        let spare = |_| {
            let host = PinnedBuffer::new(&device.context, n_bytes)?;
            let event = device.context.new_event(None).during(|| "create an event".to_owned())?;
            Ok((host, event))
        };
        Ok(CudaSampler {
            kernels: cuda.kernels.sampling(vocab)?,
            vocab,
            max_rows,
            words: DeviceBuffer::new(&device, "sampled tokens", n_bytes)?,
            token_ids: DeviceBuffer::new(&device, "a step's token ids", max_rows * size_of::<u32>())?,
            step: Step::default(),
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
            spare: (0..MAX_IN_FLIGHT).map(spare).collect::<Result<_, KernelError>>()?,
            sampled: Vec::new(),
            device,
        })
    }

    /// Where `row` of a section is, whose rows have `width` words.
    fn offset(&self, section: Section, row: usize, width: usize) -> usize {
        (section.place() * self.max_rows + row * width) * size_of::<u32>()
    }

    fn address(&self, section: Section, row: usize, width: usize) -> u64 {
        self.words.address() + self.offset(section, row, width) as u64
    }

    /// Queues `[n_rows]` ids to `to`: those at `ids_at`, which may be the same place, and what the step before sampled where a
    /// row has a source.
    pub(super) fn fill_in(&self, cuda: &Cuda, to: u64, ids_at: u64, n_rows: usize, sources: &[Option<usize>]) {
        if sources.iter().all(Option::is_none) {
            return;
        }
        let sources = sources.iter().map(|source| source.map_or(u32::MAX, |row| row as u32));
        let sources: Vec<u32> = sources.collect();
        assert!(
            sources
                .iter()
                .all(|row| *row == u32::MAX || (*row as usize) < self.max_rows),
            "token_ids: a row past those that are sampled"
        );
        let sources_at = cuda.uploads.borrow_mut().put(&sources);
        let args = Args::new()
            .address(to)
            .address(ids_at)
            .address(sources_at)
            .address(self.address(Section::Ids, 0, 1))
            .u32(n_rows as u32)
            .u32(self.vocab as u32);
        let grid = launch::token_ids(n_rows as u32);
        // SAFETY: `[n_rows]` of the first three, and each source is one of `max_rows` sampled ids.
        unsafe { self.kernels.token_ids.launch(&self.device.compute, grid, &args) };
    }

    fn launch(&self, function: &Function, n_rows: usize, args: &Args) {
        let launch = launch::sample(n_rows as u32, self.vocab as u32);
        // SAFETY: the callers' arguments are of `n_rows` rows of `vocab` logits and of as many of the sections'.
        unsafe { function.launch(&self.device.compute, launch, args) };
    }
}

impl RowSampler<Cuda> for CudaSampler {
    fn can_sample(&self, row: &RowSampling) -> bool {
        let has_order = row.top_k <= MAX_CANDIDATES || row.top_k as usize >= self.vocab;
        has_order && row.n_top.is_none_or(|n_top| n_top <= MAX_TOP)
    }

    fn embed(
        &mut self,
        cuda: &Cuda,
        out: &mut CudaTensor,
        table: &CudaMatrix,
        ids: &[u32],
        sources: &[Option<usize>],
        scale: f32,
    ) {
        let n_rows = ids.len();
        assert!(
            sources.len() == n_rows && n_rows <= self.max_rows && table.n_out == self.vocab,
            "embed: {n_rows} ids, {} sources, room for {}, a table of {} for a vocabulary of {}",
            sources.len(),
            self.max_rows,
            table.n_out,
            self.vocab
        );
        if sources.iter().all(Option::is_none) {
            return cuda.embed(out, table, ids, scale);
        }
        let ids_at = cuda.uploads.borrow_mut().put(ids);
        self.fill_in(cuda, self.token_ids.address(), ids_at, n_rows, sources);
        cuda.embed_from(out, table, self.token_ids.address(), n_rows, scale);
    }

    fn sample(&mut self, cuda: &Cuda, logits: &CudaTensor, first_row: usize, rows: &[RowSampling]) {
        let (n_rows, done) = (rows.len(), self.step.n_tops.len());
        assert!(
            logits.dtype == DType::F32 && logits.cols() == self.vocab && first_row + n_rows <= logits.rows(),
            "sample: rows {first_row}.. + {n_rows} of {} of {} columns",
            logits.rows(),
            logits.cols()
        );
        assert!(
            done + n_rows <= self.max_rows && rows.iter().all(|row| self.can_sample(row)),
            "sample: {done} rows and {n_rows} more, of {} at most, that the device can sample",
            self.max_rows
        );
        let params: Vec<Sampling> = rows.iter().map(Sampling::from).collect();
        let params_at = cuda.uploads.borrow_mut().put(&params);
        let logits_at = logits.address() + (first_row * self.vocab * size_of::<f32>()) as u64;
        let args = Args::new()
            .address(self.address(Section::Ids, done, 1))
            .address(self.address(Section::Status, done, 1))
            .address(logits_at)
            .address(params_at)
            .u32(self.vocab as u32);
        self.launch(&self.kernels.sample, n_rows, &args);
        if let Some(n_top) = rows.iter().filter_map(|row| row.n_top).max() {
            // All of a step's rows are as wide as the device allows, because a later slab may ask for more.
            let width = if n_top == 0 { 0 } else { MAX_TOP as u32 };
            let args = Args::new()
                .address(self.address(Section::Logprob, done, 1))
                .address(self.address(Section::Rank, done, 1))
                .address(self.address(Section::TopIds, done, MAX_TOP))
                .address(self.address(Section::TopLogprobs, done, MAX_TOP))
                .address(logits_at)
                .address(self.address(Section::Ids, done, 1))
                .u32(self.vocab as u32)
                .u32(width);
            self.launch(&self.kernels.logprobs, n_rows, &args);
            self.step.n_top = self.step.n_top.max(Some(n_top));
        }
        self.step.n_tops.extend(rows.iter().map(|row| row.n_top));
    }

    fn finish_step(&mut self) {
        let mut step = std::mem::take(&mut self.step);
        let n_rows = step.n_tops.len();
        let copying = "copy sampled tokens to the host";
        let (mut host, event) = self.spare.pop().expect("at most two steps are in flight");
        let mut copy = |section: Section, width: usize| {
            let offset = self.offset(section, 0, width);
            let to = &mut host.as_mut_slice()[offset..][..n_rows * width * size_of::<u32>()];
            if !to.is_empty() {
                self.device.context.bind_to_thread().or_stop(copying);
                let from = self.words.address() + offset as u64;
                // SAFETY: as many bytes at both; the host's are not touched before the event behind them is waited for.
                unsafe { result::memcpy_dtoh_async(to, from, self.device.compute.cu_stream()) }.or_stop(copying);
            }
        };
        copy(Section::Ids, 1);
        copy(Section::Status, 1);
        if step.n_top.is_some() {
            copy(Section::Logprob, 1);
            copy(Section::Rank, 1);
        }
        if step.n_top.is_some_and(|n_top| n_top > 0) {
            copy(Section::TopIds, MAX_TOP);
            copy(Section::TopLogprobs, MAX_TOP);
        }
        event.record(&self.device.compute).or_stop(copying);
        step.host = Some((host, event));
        self.in_flight.push_back(step);
    }

    fn wait(&mut self) {
        if let Some(Step {
            host: Some((_, event)), ..
        }) = self.in_flight.front()
        {
            event.synchronize().or_stop("wait for a step");
        }
    }

    fn collect(&mut self) -> &[SampledRow] {
        self.wait();
        let step = self.in_flight.pop_front().expect("a step is in flight");
        let (host, event) = step.host.expect("it was finished");
        let words: &[u32] = bytemuck::cast_slice(host.as_slice());
        let word =
            |section: Section, row: usize, width: usize| words[section.place() * self.max_rows + row * width..].iter();
        let one = |section: Section, row: usize| *word(section, row, 1).next().expect("a row has a word of it");
        self.sampled.clear();
        self.sampled.extend(step.n_tops.iter().enumerate().map(|(row, n_top)| {
            match RowStatus::from_device(one(Section::Status, row)) {
                Some(RowStatus::Chosen) => {}
                Some(RowStatus::NotFinite | RowStatus::NoCandidate | RowStatus::LeftToHost) => {
                    return SampledRow::LeftToHost;
                }
                None => panic!("CUDA: sample gave a row an unknown status"),
            }
            let logprobs = n_top.map(|n_top| {
                let top = word(Section::TopIds, row, MAX_TOP).zip(word(Section::TopLogprobs, row, MAX_TOP));
                let top = top.take(n_top.min(self.vocab));
                RowLogprobs {
                    logprob: f32::from_bits(one(Section::Logprob, row)),
                    rank: one(Section::Rank, row),
                    top: top.map(|(id, logprob)| (*id, f32::from_bits(*logprob))).collect(),
                }
            });
            SampledRow::Chosen {
                id: one(Section::Ids, row),
                logprobs,
            }
        }));
        self.spare.push((host, event));
        &self.sampled
    }
}

impl From<&RowSampling> for Sampling {
    fn from(row: &RowSampling) -> Sampling {
        Sampling {
            seed: row.seed,
            index: row.index,
            choice: row.choice,
            temperature: row.temperature,
            min_p: row.min_p,
            top_p: row.top_p,
            top_k: row.top_k,
        }
    }
}
