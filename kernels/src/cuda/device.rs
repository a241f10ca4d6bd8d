//! One card as one process uses it: its context and its two streams. No kernels and no models.
//!
//! Everything that computes is queued on the compute stream, in the order of the calls, by the step thread alone. The copy
//! stream carries KV to and from the host, for any thread, and waits for the compute stream by events that the step thread
//! recorded.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::error::{CudaError, During as _};
use super::probe::{self, CudaCard};

/// A card's context and streams.
pub(crate) struct Device {
    pub(super) card: CudaCard,
    pub(super) context: Arc<CudaContext>,
    pub(super) compute: Arc<CudaStream>,
    pub(super) copy: Arc<CudaStream>,
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
            copy: context.new_stream_with_priority(least).during(opening)?,
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
        let event = self.context.new_event(None).or_stop("create an event");
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
