//! Weights in a card's memory, once for all instances of the process that compute with the same: the first uploads them, and
//! they go with the last. Nothing ever writes them, so nobody needs to know of the others.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::Mutex;

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::error::CudaError;
use crate::packed::PackedWeights;

/// By card, packed weights, and name of one of them.
type Name = (usize, String, String);

static LOADED: LazyLock<Mutex<HashMap<Name, Weak<DeviceBuffer>>>> = LazyLock::new(Mutex::default);

/// The device's copy of `bytes`, which are the weight `name` of `weights`.
pub(super) fn upload(
    device: &Device,
    weights: &PackedWeights,
    name: &str,
    bytes: &[u8],
) -> Result<Arc<DeviceBuffer>, CudaError> {
    let write = |mut buffer: DeviceBuffer| {
        buffer.write_now(0, bytes)?;
        Ok(Arc::new(buffer))
    };
    let Some(key) = weights.key() else {
        return write(DeviceBuffer::new(device, name, bytes.len())?);
    };
    // Held while the bytes are copied: who comes second waits for them, as there may be no room for both.
    let mut loaded = LOADED.lock();
    let at = (device.card.ordinal, key.to_owned(), name.to_owned());
    if let Some(buffer) = loaded.get(&at).and_then(Weak::upgrade) {
        assert_eq!(buffer.n_bytes(), bytes.len(), "{name} of {key}: same key, same bytes");
        return Ok(buffer);
    }
    let buffer = write(DeviceBuffer::common(device, name, bytes.len())?)?;
    loaded.insert(at, Arc::downgrade(&buffer));
    Ok(buffer)
}
