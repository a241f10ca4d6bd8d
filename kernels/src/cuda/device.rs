//! One card as one process uses it: its context and its streams. No kernels and no models.
//!
//! Everything that computes is queued on the compute stream, in the order of the calls, by the step thread alone. The two
//! others carry KV out of the caches of this device and into them, for any thread, and wait for the compute stream by events
//! that the step thread recorded; the compute stream never waits for them.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream};
use parking_lot::Mutex;

use super::error::{CudaError, During as _};
use super::green::GreenContext;
use super::place::{CudaPlace, CudaTurn};
use super::probe::{self, CudaCard};

/// A card's context and streams.
pub(crate) struct Device {
    pub(super) card: CudaCard,
    pub(super) context: Arc<CudaContext>,
    pub(super) compute: Arc<CudaStream>,
    /// Of KV that leaves. What arrives does not stand behind it, as it may wait for a layer that is being computed.
    pub(super) outbound: Arc<CudaStream>,
    /// Of KV that arrives.
    pub(super) inbound: Arc<CudaStream>,
    /// On which the streams' work runs.
    pub(super) n_multiprocessors: u32,
    /// Where that is not all of the card; after the streams, which are in it.
    _share: Option<GreenContext>,
    /// The first that was refused in the capture that is under way.
    capture_failure: Mutex<Option<String>>,
    /// Bytes of device memory taken so far for what no other instance has: not for weights that are shared, nor for caches.
    pub(super) own_bytes: AtomicUsize,
}

impl Device {
    pub(super) fn open(
        ordinal: usize,
        folders: &[std::path::PathBuf],
        place: &CudaPlace,
    ) -> Result<Arc<Device>, CudaError> {
        let card = probe::probe(ordinal, folders)?;
        let opening = || format!("open {}", card.name);
        let context = CudaContext::new(ordinal).during(opening)?;
        // SAFETY: we order streams by our own events. Those of cudarc would break graphs that are captured.
        unsafe { context.disable_event_tracking() };
        // The smaller number goes first.
        let (last, first) = cudarc::driver::result::stream::get_priority_range().during(opening)?;
        let compute = match place.turn {
            CudaTurn::First => first,
            CudaTurn::Last => last,
        };
        // Copies are short, and somebody waits for them: before a prompt's kernels, after a step that generates.
        let copies = first + (last - first) / 2;
        let percent = place.multiprocessor_percent.filter(|percent| *percent < 100);
        let share = percent.map(|percent| GreenContext::new(&context, &card, percent));
        let mut share = share.transpose()?;
        let mut stream = |priority| match &mut share {
            Some(share) => share.stream(priority).during(opening),
            None => context.new_stream_with_priority(priority).during(opening),
        };
        let [compute, outbound, inbound] = [stream(compute)?, stream(copies)?, stream(copies)?];
        let n_multiprocessors = share
            .as_ref()
            .map_or(card.n_multiprocessors, |share| share.n_multiprocessors);
        Ok(Arc::new(Device {
            compute,
            outbound,
            inbound,
            n_multiprocessors,
            _share: share,
            context,
            card,
            capture_failure: Mutex::default(),
            own_bytes: AtomicUsize::new(0),
        }))
    }

    /// Something that could not be queued: the end of everything, or where the stream is captured, of the capture.
    pub(super) fn stop(&self, stream: &CudaStream, failure: String) {
        if let Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE) | Err(_) = stream.capture_status() {
            panic!("CUDA: {failure}");
        }
        self.capture_failure.lock().get_or_insert(failure);
    }

    /// Has what the compute stream is given from now on captured instead. Other threads may call the driver meanwhile.
    pub(super) fn begin_capture(&self) -> Result<(), CudaError> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.compute.begin_capture(mode).during(|| "begin a capture".to_owned())
    }

    /// What was captured, ready to be launched.
    pub(super) fn end_capture(&self) -> Result<CudaGraph, CudaError> {
        let refused = |reason: String| CudaError::Call {
            action: "capture work".to_owned(),
            reason,
        };
        let graph = self.compute.end_capture(CUgraphInstantiate_flags(0));
        if let Some(failure) = self.capture_failure.lock().take() {
            return Err(refused(failure));
        }
        let graph = graph.during(|| "end a capture".to_owned())?;
        let graph = graph.ok_or_else(|| refused("there was none".to_owned()))?;
        graph.upload().during(|| "put a graph onto the device".to_owned())?;
        Ok(graph)
    }

    /// Bytes of the card's memory that nobody has.
    pub(super) fn free_bytes(&self) -> Result<usize, CudaError> {
        let (free, _) = self
            .context
            .mem_get_info()
            .during(|| "ask for free device memory".to_owned())?;
        Ok(free)
    }

    /// What the compute stream has been given so far; step thread only.
    pub(super) fn fence(&self) -> Arc<CudaEvent> {
        // Whoever waits for it on the host sleeps.
        let event = self.context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC));
        let event = event.or_stop("create an event");
        event.record(&self.compute).or_stop("record an event");
        Arc::new(event)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Nothing of ours may run on when its memory goes; a device that has failed says so again, to nobody.
        let _ = self.context.synchronize();
    }
}
