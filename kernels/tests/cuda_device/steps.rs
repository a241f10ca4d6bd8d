//! What steps are held to: the memory that was set aside for them, and what a captured stream takes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use baton_kernels::cuda::{CudaMode, StepLimits};
use baton_kernels::{Backend, DType};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, DriverError, result};

use crate::support::device;

fn limits() -> StepLimits {
    StepLimits {
        n_rows: 4,
        n_sequences: 2,
        n_recorded_sequences: 0,
        n_context: 32,
        block_size: 16,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 64,
        windows: vec![None],
        n_fetched: 16,
        experts: None,
    }
}

#[test]
fn a_step_beyond_its_limits_panics_with_both_numbers() {
    let Some(cuda) = device(DType::F32, CudaMode::Fast, 64) else {
        return;
    };
    cuda.reserve(&limits()).unwrap();
    let mut small = cuda.tensor(4, 4).unwrap();
    cuda.set(&mut small, &[1.0; 16]);
    assert_eq!(*cuda.to_host(&small), [1.0; 16]);

    let message = |beyond: &mut dyn FnMut()| -> String {
        let panic = catch_unwind(AssertUnwindSafe(beyond)).unwrap_err();
        *panic.downcast().unwrap()
    };
    let mut wide = cuda.tensor(4, 5).unwrap();
    cuda.set(&mut wide, &[1.0; 20]);
    let fetched = message(&mut || drop(cuda.to_host(&wide)));
    assert!(
        fetched.contains("needs 80 bytes") && fetched.contains("64 were set aside"),
        "{fetched}"
    );
    let mut large = cuda.tensor(1 << 20, 1).unwrap();
    let values = vec![0.0; 1 << 20];
    let uploaded = message(&mut || cuda.set(&mut large, &values));
    assert!(
        uploaded.contains("4194304 more") && uploaded.contains("were set aside"),
        "{uploaded}"
    );
}

/// Of a capture of one thread: its own allocations end it, those of others do not.
#[test]
fn a_capture_refuses_to_wait() {
    let Some(_cuda) = device(DType::F32, CudaMode::Fast, 64) else {
        return;
    };
    let context = CudaContext::new(0).unwrap();
    // SAFETY: nothing here relies on it.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let allocate = || {
        context.bind_to_thread()?;
        // SAFETY: not no bytes.
        let address = unsafe { result::malloc_sync(64) }?;
        // SAFETY: just allocated, and used by nobody.
        unsafe { result::free_sync(address) }
    };
    stream.begin_capture(mode).unwrap();
    std::thread::scope(|scope| scope.spawn(allocate).join().unwrap()).unwrap();
    assert!(stream.end_capture(CUgraphInstantiate_flags(0)).is_ok());

    stream.begin_capture(mode).unwrap();
    let refused = DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(allocate(), Err(refused));
    let ended = stream.end_capture(CUgraphInstantiate_flags(0)).err();
    assert_eq!(
        ended,
        Some(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED))
    );

    stream.begin_capture(mode).unwrap();
    assert_eq!(stream.synchronize(), Err(refused));
    assert!(stream.end_capture(CUgraphInstantiate_flags(0)).is_err());
    allocate().unwrap();
}
