//! Mixtures of experts, by the body that every device shares.

use baton_kernels::DType;

use crate::bodies::moe;
use crate::support::{MODES, device};

#[test]
fn rows_are_sums_of_their_experts_and_independent() {
    for (dtype, mode) in [DType::F32, DType::Bf16]
        .into_iter()
        .flat_map(|dtype| MODES.map(|mode| (dtype, mode)))
    {
        let Some(cuda) = device(dtype, mode, 64) else { return };
        for mixture in moe::ODD_SIZES {
            moe::rows_are_sums_of_their_experts(&cuda, mixture);
        }
    }
}
