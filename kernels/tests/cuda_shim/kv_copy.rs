//! Blocks of the cache to a staging buffer and back.

use baton_kernels::cuda::launch;

use crate::args;
use crate::harness::*;

#[test]
fn blocks_travel_through_staging_unchanged() {
    if !has_compiler() {
        return;
    }
    let (n_cache_layers, n_blocks, first_layer, n_layers) = (5_usize, 7_usize, 1_usize, 3_usize);
    let blocks = vec![6_u32, 0, 3];
    for part_bytes in [1_usize, 48, 50, 4096, 8208] {
        let cache: Vec<u8> = (0..n_cache_layers * 2 * n_blocks * part_bytes)
            .map(|i| (i * 7 + i / 251) as u8)
            .collect();
        let mut expected = Vec::new();
        for layer in first_layer..first_layer + n_layers {
            for part in 0..2 {
                for block in &blocks {
                    let start = ((layer * 2 + part) * n_blocks + *block as usize) * part_bytes;
                    expected.extend_from_slice(&cache[start..][..part_bytes]);
                }
            }
        }
        let grid = launch::kv_copy(blocks.len() as u32, n_layers as u32);
        let mut staging = vec![0_u8; expected.len()];
        let sizes = (
            first_layer as u32,
            blocks.len() as u32,
            n_blocks as u32,
            part_bytes as u64,
        );
        let args = args![&mut staging, &cache, &blocks, sizes.0, sizes.1, sizes.2, sizes.3];
        launch("kv_gather", grid, Order::Forward, args);
        assert!(staging == expected, "gather of parts of {part_bytes}");

        let mut emptied = cache.clone();
        for layer in first_layer..first_layer + n_layers {
            for (block, part) in blocks.iter().flat_map(|block| [(block, 0), (block, 1)]) {
                emptied[((layer * 2 + part) * n_blocks + *block as usize) * part_bytes..][..part_bytes].fill(0xee);
            }
        }
        let args = args![&mut emptied, &staging, &blocks, sizes.0, sizes.1, sizes.2, sizes.3];
        launch("kv_scatter", grid, Order::Forward, args);
        assert!(emptied == cache, "scatter of parts of {part_bytes}");
    }
}

#[test]
fn blocks_move_to_another_cache_and_nothing_else_changes() {
    if !has_compiler() {
        return;
    }
    let (n_layers, n_blocks_from, n_blocks_to) = (3_usize, 5_usize, 7_usize);
    let pairs = vec![4_u32, 0, 1, 6, 2, 2];
    let (layer_from, layer_to) = (1_usize, 2_usize);
    for part_bytes in [1_usize, 48, 50, 4096, 8208] {
        let bytes = |n: usize, seed: usize| -> Vec<u8> { (0..n).map(|i| (i * seed + i / 251) as u8).collect() };
        let from = bytes(n_layers * 2 * n_blocks_from * part_bytes, 7);
        let mut to = bytes(n_layers * 2 * n_blocks_to * part_bytes, 11);
        let mut expected = to.clone();
        for (pair, part) in pairs.chunks(2).flat_map(|pair| [(pair, 0), (pair, 1)]) {
            let source = ((layer_from * 2 + part) * n_blocks_from + pair[0] as usize) * part_bytes;
            let target = ((layer_to * 2 + part) * n_blocks_to + pair[1] as usize) * part_bytes;
            expected[target..][..part_bytes].copy_from_slice(&from[source..][..part_bytes]);
        }
        let (layers, blocks) = (
            (layer_to as u32, layer_from as u32),
            (n_blocks_to as u32, n_blocks_from as u32),
        );
        let args = args![
            &mut to,
            &from,
            &pairs,
            layers.0,
            layers.1,
            blocks.0,
            blocks.1,
            part_bytes as u64
        ];
        launch("kv_move", launch::kv_copy(3, 1), Order::Forward, args);
        assert!(to == expected, "parts of {part_bytes}");
    }
}
