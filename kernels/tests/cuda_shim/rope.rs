//! Norms and rotation of q and k, and the append to the cache.

use baton_kernels::cuda::launch;
use baton_kernels::{DType, RopeParams, reference};

use crate::args;
use crate::harness::*;

const NO_SLOT: u64 = u64::MAX;

/// Norms of q and k: none, of each head, or of the whole projection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Norm {
    None,
    Head,
    Whole,
}

fn check(dtype: DType, head_dim: usize, half_dim: usize, norm: Norm, block_shift: u32) {
    let what = format!(
        "{dtype}, head_dim {head_dim}, half_dim {half_dim}, {norm:?}, blocks of {}",
        1 << block_shift
    );
    let (n_heads, n_kv_heads, n_blocks, max_positions) = (6_usize, 2_usize, 5_usize, 40_usize);
    let block_size = 1_usize << block_shift;
    let variants: Vec<RopeParams> = [0.7_f32, -0.4]
        .map(|base| RopeParams {
            inv_freq: (0..half_dim).map(|i| base * 0.9_f32.powi(i as i32)).collect(),
            attention_factor: 1.2,
        })
        .to_vec();
    let table = |function: fn(f64) -> f64| -> Vec<f32> {
        let of = |params: &RopeParams, position: usize| {
            let value =
                |f: &f32| (function(f64::from(position as f32 * f)) * f64::from(params.attention_factor)) as f32;
            params.inv_freq.iter().map(value).collect::<Vec<f32>>()
        };
        variants
            .iter()
            .flat_map(|params| (0..max_positions).flat_map(move |position| of(params, position)))
            .collect()
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    // Rows in no order of slots; the last slot of the last block among them, and one that is no token.
    let rows: [(u32, u64, u32); 5] = [
        (0, 0, 0),
        (39, (n_blocks * block_size - 1) as u64, 1),
        (3, NO_SLOT, 1),
        (7, (2 * block_size) as u64, 1),
        (8, (block_size + block_size / 2) as u64, 0),
    ];
    let positions: Vec<u32> = rows.iter().map(|row| row.0).collect();
    let slots: Vec<u64> = rows.iter().map(|row| row.1).collect();
    let rope_variants: Vec<u32> = rows.iter().map(|row| row.2).collect();
    let cols = (n_heads + 2 * n_kv_heads) * head_dim;
    let qkv = values(21, dtype, rows.len() * cols);
    let weight_of = |seed: u64, heads: usize| match norm {
        Norm::None => None,
        Norm::Head => Some(values(seed, DType::F32, head_dim)),
        Norm::Whole => Some(values(seed, DType::F32, heads * head_dim)),
    };
    let (query_norm, key_norm) = (weight_of(22, n_heads), weight_of(23, n_kv_heads));

    let cache_len = n_blocks * n_kv_heads * block_size * head_dim;
    let (found, key, value) = in_both_orders(&what, |order| {
        let mut device_qkv = Matrix::new(dtype, &qkv);
        let (mut key, mut value) = (Matrix::unwritten(dtype, cache_len), Matrix::unwritten(dtype, cache_len));
        let args = args![
            &mut device_qkv,
            &mut key,
            &mut value,
            &positions,
            &slots,
            &rope_variants,
            &cos,
            &sin,
            query_norm.as_ref().map_or(NULL, Arg::from),
            key_norm.as_ref().map_or(NULL, Arg::from),
            if norm == Norm::Whole { 3_u32 } else { 0 },
            1e-5_f32,
            n_heads as u32,
            n_kv_heads as u32,
            head_dim as u32,
            half_dim as u32,
            max_positions as u32,
            block_shift,
        ];
        let grid = launch::rope_append(rows.len() as u32, n_heads as u32, n_kv_heads as u32);
        launch(&format!("rope_append_{dtype}"), grid, order, args);
        (device_qkv, key, value)
    });

    let (found, key, value) = (found.values(), key.values(), value.values());
    let mut n_written = 0;
    for (row_idx, (position, slot, variant)) in rows.into_iter().enumerate() {
        if slot == NO_SLOT {
            let range = row_idx * cols..(row_idx + 1) * cols;
            assert_eq!(found[range.clone()], qkv[range], "{what}");
            continue;
        }
        let mut expected = qkv[row_idx * cols..][..cols].to_vec();
        let (q, kv) = expected.split_at_mut(n_heads * head_dim);
        let (k, v) = kv.split_at_mut(n_kv_heads * head_dim);
        if let (Some(query_norm), Some(key_norm)) = (&query_norm, &key_norm) {
            q.copy_from_slice(&reference::rms_norm(q, query_norm, 1e-5));
            k.copy_from_slice(&reference::rms_norm(k, key_norm, 1e-5));
        }
        for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
            reference::rope(head, &variants[variant as usize], position as usize);
        }
        assert_close(&what, dtype, &found[row_idx * cols..][..q.len()], q);
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        for kv_head in 0..n_kv_heads {
            let start = ((block * n_kv_heads + kv_head) * block_size + offset) * head_dim;
            assert_close(
                &what,
                dtype,
                &key[start..][..head_dim],
                &k[kv_head * head_dim..][..head_dim],
            );
            assert_eq!(
                &value[start..][..head_dim],
                &v[kv_head * head_dim..][..head_dim],
                "{what}"
            );
            n_written += head_dim;
        }
    }
    for part in [&key, &value] {
        assert_eq!(
            part.iter().filter(|x| !x.is_nan()).count(),
            n_written,
            "{what}: other slots were written"
        );
    }
}

#[test]
fn rope_and_append_are_the_references() {
    if !has_compiler() {
        return;
    }
    for dtype in DTYPES {
        for norm in [Norm::None, Norm::Head, Norm::Whole] {
            // Whole and partial rotation, none, and sizes that no vector divides.
            for (head_dim, half_dim) in [(64, 32), (128, 64), (80, 16), (256, 64), (96, 0), (6, 2), (34, 17)] {
                check(dtype, head_dim, half_dim, norm, 4);
            }
            check(dtype, 64, 32, norm, 0);
        }
    }
}
