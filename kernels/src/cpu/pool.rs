//! Fork-join over a few threads for operators of tens of microseconds. Not a general executor: one job at a time.
//!
//! Each thread starts on its own contiguous share of the items and, when done, takes from the end of the others', so a
//! descheduled thread delays nobody. Idle threads spin for some microseconds, then sleep; a thread that does not wake in
//! time simply finds the job closed. The caller is thread 0 and works too.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

use crate::error::KernelError;

/// More threads than this is a mistake in the options.
pub(crate) const MAX_THREADS: usize = 1024;

/// Longer than the gap between two operators of a step, shorter than the gap between two steps.
const SPIN: Duration = Duration::from_micros(20);

/// The state word: epoch of the job in the high half, then one bit that closes it, then the threads inside.
const EPOCH_ONE: u64 = 1 << 32;
const CLOSED: u64 = 1 << 31;
const ACTIVE: u64 = CLOSED - 1;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Job {
    task: *const Task<'static>,
    caller: Option<Thread>,
}

struct Shared {
    state: CachePadded<AtomicU64>,
    job: UnsafeCell<Job>,
    /// Per thread, the items left of its share: `start << 32 | end`.
    shares: Box<[CachePadded<AtomicU64>]>,
    sleeping: Box<[AtomicBool]>,
    caller_sleeps: AtomicBool,
    panicked: AtomicBool,
    stop: AtomicBool,
    spin: Duration,
}

// SAFETY: `job` is written only by the caller while the state is closed with no thread inside, and read only by threads
// that entered while it was open; `task` is Sync and outlives the job, because `for_each` does not return before both.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is only followed as said there.
unsafe impl Send for Shared {}

/// The threads of one `Cpu`.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// `n_threads` includes the caller's, so one thread starts none.
    pub(crate) fn new(n_threads: usize) -> Result<Pool, KernelError> {
        if !(1..=MAX_THREADS).contains(&n_threads) {
            return Err(KernelError::Threads {
                n_threads,
                max: MAX_THREADS,
            });
        }
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let shared = Arc::new(Shared {
            state: CachePadded::new(AtomicU64::new(CLOSED)),
            job: UnsafeCell::new(Job {
                task: &(|_: usize| {}) as &Task<'static>,
                caller: None,
            }),
            shares: (0..n_threads).map(|_| CachePadded::new(AtomicU64::new(0))).collect(),
            sleeping: (0..n_threads).map(|_| AtomicBool::new(false)).collect(),
            caller_sleeps: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            spin: if n_threads <= cores { SPIN } else { Duration::ZERO },
        });
        let mut pool = Pool {
            shared,
            handles: Vec::with_capacity(n_threads - 1),
        };
        for worker_idx in 1..n_threads {
            let shared = Arc::clone(&pool.shared);
            let handle = std::thread::Builder::new()
                .name(format!("baton-cpu-{worker_idx}"))
                .spawn(move || work(&shared, worker_idx))
                .map_err(|error| KernelError::Spawn { worker_idx, error })?;
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(crate) fn n_threads(&self) -> usize {
        self.shared.shares.len()
    }

    /// Calls `task(item)` once for each item below `n_items`, on whatever threads; returns when all are done.
    /// Panics if a task panicked. Not reentrant: `&mut` is the proof that no job is running.
    pub(crate) fn for_each(&mut self, n_items: usize, task: &Task<'_>) {
        let n_threads = self.n_threads();
        if n_threads == 1 || n_items <= 1 {
            (0..n_items).for_each(task);
            return;
        }
        assert!(n_items < 1 << 31, "too many items in one job: {n_items}");
        let shared = &*self.shared;
        for (thread_idx, share) in shared.shares.iter().enumerate() {
            let start = (n_items * thread_idx / n_threads) as u64;
            let end = (n_items * (thread_idx + 1) / n_threads) as u64;
            share.store(start << 32 | end, Ordering::Relaxed);
        }
        // SAFETY: the last job is closed and empty (established before the last return, or at creation), so no thread
        // reads `job`. Only the lifetime is erased, and `Closing` below keeps this frame until no thread can use it.
        unsafe {
            *shared.job.get() = Job {
                task: std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task),
                caller: Some(std::thread::current()),
            };
        }
        let epoch = shared.state.load(Ordering::Relaxed) & !(EPOCH_ONE - 1);
        shared.state.store(epoch.wrapping_add(EPOCH_ONE), Ordering::SeqCst);
        for worker_idx in 1..n_threads {
            if shared.sleeping[worker_idx].load(Ordering::SeqCst) {
                self.handles[worker_idx - 1].thread().unpark();
            }
        }
        {
            let _closing = Closing(shared);
            shared.run_items(0, task);
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a worker thread of the CPU device panicked, see its message above");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // A worker catches its panics, so joining cannot fail.
            let _ = handle.join();
        }
    }
}

/// Closes the job and waits for the threads inside, even when the caller's own task panics.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        let mut state = shared.state.fetch_or(CLOSED, Ordering::SeqCst);
        let started = Instant::now();
        while state & ACTIVE != 0 {
            if started.elapsed() < shared.spin.max(Duration::from_micros(1)) {
                std::hint::spin_loop();
                state = shared.state.load(Ordering::Acquire);
                continue;
            }
            shared.caller_sleeps.store(true, Ordering::SeqCst);
            state = shared.state.load(Ordering::SeqCst);
            if state & ACTIVE != 0 {
                std::thread::park();
                state = shared.state.load(Ordering::SeqCst);
            }
            shared.caller_sleeps.store(false, Ordering::SeqCst);
        }
        // The last thread's fetch_sub was a release; this pairs with it for the results it wrote.
        std::sync::atomic::fence(Ordering::Acquire);
    }
}

impl Shared {
    fn run_items(&self, thread_idx: usize, task: &Task<'_>) {
        while let Some(item) = self.take_first(thread_idx) {
            task(item);
        }
        let n_threads = self.shares.len();
        for offset in 1..n_threads {
            while let Some(item) = self.take_last((thread_idx + offset) % n_threads) {
                task(item);
            }
        }
    }

    fn take_first(&self, thread_idx: usize) -> Option<usize> {
        self.take(thread_idx, |start, end| (start, (start + 1) << 32 | end))
    }

    fn take_last(&self, thread_idx: usize) -> Option<usize> {
        self.take(thread_idx, |start, end| (end - 1, start << 32 | (end - 1)))
    }

    /// Relaxed is enough: shares carry no data, and entering the job acquired everything they index.
    fn take(&self, thread_idx: usize, split: impl Fn(u64, u64) -> (u64, u64)) -> Option<usize> {
        let share = &self.shares[thread_idx];
        let mut current = share.load(Ordering::Relaxed);
        loop {
            let (start, end) = (current >> 32, current & 0xffff_ffff);
            if start >= end {
                return None;
            }
            let (item, rest) = split(start, end);
            match share.compare_exchange_weak(current, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(item as usize),
                Err(found) => current = found,
            }
        }
    }
}

/// A worker's life: wait for a job newer than the last, enter it if it is still open, work, leave.
fn work(shared: &Shared, worker_idx: usize) {
    let mut seen = 0;
    while let Some(state) = wait_for_job(shared, worker_idx, seen) {
        seen = state >> 32;
        if !enter(shared, state) {
            continue;
        }
        // SAFETY: entered while open, so `job` was written before (release of the state) and is kept until we leave.
        let (task, caller) = unsafe {
            let job = &*shared.job.get();
            (&*job.task, job.caller.clone())
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| shared.run_items(worker_idx, task)));
        if outcome.is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        let before = shared.state.fetch_sub(1, Ordering::SeqCst);
        if before & CLOSED != 0 && before & ACTIVE == 1 && shared.caller_sleeps.load(Ordering::SeqCst) {
            caller.inspect(Thread::unpark);
        }
    }
}

fn enter(shared: &Shared, mut state: u64) -> bool {
    let epoch = state >> 32;
    while state & CLOSED == 0 && state >> 32 == epoch {
        match shared
            .state
            .compare_exchange_weak(state, state + 1, Ordering::SeqCst, Ordering::Relaxed)
        {
            Ok(_) => return true,
            Err(found) => state = found,
        }
    }
    false
}

/// The state of a job whose epoch is not `seen`; None when the pool stops.
fn wait_for_job(shared: &Shared, worker_idx: usize, seen: u64) -> Option<u64> {
    let fresh = || {
        let state = shared.state.load(Ordering::SeqCst);
        (state >> 32 != seen).then_some(state)
    };
    let mut started = Instant::now();
    loop {
        for _ in 0..16 {
            if let Some(state) = fresh() {
                return Some(state);
            }
            std::hint::spin_loop();
        }
        if shared.stop.load(Ordering::SeqCst) {
            return None;
        }
        if started.elapsed() < shared.spin {
            continue;
        }
        shared.sleeping[worker_idx].store(true, Ordering::SeqCst);
        if fresh().is_none() && !shared.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        shared.sleeping[worker_idx].store(false, Ordering::SeqCst);
        started = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn each_item_runs_once_on_any_number_of_threads() {
        for n_threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(n_threads).unwrap();
            for n_items in [0, 1, 2, 3, 7, 64, 1000] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..n_items).map(|_| AtomicUsize::new(0)).collect();
                    pool.for_each(n_items, &|item| {
                        counts[item].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_and_results_are_visible() {
        let mut pool = Pool::new(3).unwrap();
        for round in 0..20 {
            // Long enough for the workers to fall asleep between jobs in some rounds.
            if round % 4 == 0 {
                std::thread::yield_now();
            }
            let mut out = vec![0_usize; 97];
            let base = out.as_mut_ptr() as usize;
            // SAFETY: each item writes its own element, and `out` outlives the call.
            pool.for_each(97, &|item| unsafe { *(base as *mut usize).add(item) = item * round });
            assert!(out.iter().enumerate().all(|(item, value)| *value == item * round));
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(2).unwrap();
        for bad_item in [0, 63] {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.for_each(64, &|item| assert!(item != bad_item, "item {item}"));
            }));
            assert!(outcome.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.for_each(100, &|item| {
            sum.fetch_add(item, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }

    #[test]
    fn thread_counts_out_of_range_are_refused() {
        assert!(matches!(Pool::new(0), Err(KernelError::Threads { n_threads: 0, .. })));
        assert!(matches!(Pool::new(MAX_THREADS + 1), Err(KernelError::Threads { .. })));
    }
}
