//! Options of models on the card or on the stand-in for its driver.

use baton_engine::model::{CudaKvSize, CudaLoadOptions, LoadOptions};
use baton_kernels::cuda::{CudaMode, ImageFolders};

use super::stand_in;

/// Without recorded steps, in fast mode, for up to 8 sequences; `None` where there is nothing to compute on.
pub fn load_options(model: LoadOptions, kv: CudaKvSize) -> Option<CudaLoadOptions> {
    let driver = stand_in::driver()?;
    Some(CudaLoadOptions {
        model,
        ordinal: 0,
        max_num_seqs: 8,
        mode: CudaMode::Fast,
        libraries: driver.libraries(),
        images: ImageFolders {
            packaged: None,
            cache: Some(stand_in::image_cache()),
        },
        kv,
        max_graph_seqs: 0,
    })
}
