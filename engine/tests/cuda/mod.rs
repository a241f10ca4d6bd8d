//! The same models on the CUDA device: on a card (REQUIRE_GPU=1), else through the stand-in for its driver.

use baton_engine::model::{CudaKvSize, CudaLoadOptions, Decoder, ModelFolder, load_cuda};
use baton_kernels::DType;
use baton_kernels::cuda::{Cuda, CudaMode, ImageFolders};

use super::{MODELS, check_f32, options, stand_in};
use crate::golden_model::{Golden, models_folder};

fn load(model: &str, dtype: DType, mode: CudaMode) -> Option<Decoder<Cuda>> {
    let driver = stand_in::driver()?;
    let folder = ModelFolder::open(models_folder().join(model)).unwrap();
    let options = CudaLoadOptions {
        model: options(dtype, None).model,
        ordinal: 0,
        mode,
        libraries: driver.libraries(),
        images: ImageFolders {
            packaged: None,
            cache: Some(stand_in::image_cache()),
        },
        kv: CudaKvSize::Blocks(64),
    };
    Some(load_cuda(&folder, &options, &mut |_, _| {}).unwrap())
}

#[test]
fn f32_equals_the_goldens() {
    for model in MODELS {
        let golden = Golden::load(model);
        let Some(mut decoder) = load(model, DType::F32, CudaMode::Fast) else {
            return;
        };
        for prompt in &golden.prompts {
            let started = std::time::Instant::now();
            check_f32(&mut decoder, &golden, prompt, &format!("{model} cuda {}", prompt.name));
            eprintln!("{model} {} {:.1}", prompt.name, started.elapsed().as_secs_f32());
        }
    }
}
