//! One card as one process uses it: its context and its streams. No kernels and no models.
//!
//! Everything that computes is queued on the compute stream, in the order of the calls, by the step thread alone. The two
//! others carry KV out of the caches of this device and into them, for any thread, and wait for the compute stream by events
//! that the step thread recorded; the compute stream never waits for them.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::error::{CudaError, During as _};
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
}

impl Device {
    pub(super) fn open(ordinal: usize, folders: &[std::path::PathBuf]) -> Result<Arc<Device>, CudaError> {
        let card = probe::probe(ordinal, folders)?;
        let opening = || format!("open {}", card.name);
        let context = CudaContext::new(ordinal).during(opening)?;
        // SAFETY: we order streams by our own events. Those of cudarc would break graphs that are captured.
        unsafe { context.disable_event_tracking() };
        let (least, greatest) = cudarc::driver::result::stream::get_priority_range().during(opening)?;
        Ok(Arc::new(Device {
            compute: context.new_stream_with_priority(greatest).during(opening)?,
            outbound: context.new_stream_with_priority(least).during(opening)?,
            inbound: context.new_stream_with_priority(least).during(opening)?,
            context,
            card,
        }))
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
