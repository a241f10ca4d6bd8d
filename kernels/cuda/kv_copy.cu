// Blocks of the KV cache to and from one staging buffer, so that a transfer over PCIe or a network is one long copy, and from
// cache to cache on one card. The staging buffer is laid out as a KV frame is on the wire.
//
// Split: blockIdx.x is a block of the list, .y a layer, .z K or V; 16 bytes a thread a turn. Bound: bytes, read and written once.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

// Copies n bytes; both sides are aligned to 16 where n is a multiple of 16.
__device__ __forceinline__ void copy_part(u8* to, const u8* from, u64 n) {
    if (n % 16 == 0) {
        for (u64 i = threadIdx.x * 16; i < n; i += blockDim.x * 16) store_vec(to + i, load_vec(from + i));
    } else {
        for (u64 i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
    }
}

// How far into the cache and into the staging buffer this CTA's part begins.
struct Part {
    u64 in_cache, in_staging;
};
__device__ __forceinline__ Part part_of(const u32* blocks, u32 first_layer, u32 n_listed, u32 n_blocks, u64 part_bytes) {
    const u64 block = blocks[blockIdx.x], layer = first_layer + blockIdx.y, value = blockIdx.z;
    return {((layer * 2 + value) * n_blocks + block) * part_bytes,
            ((blockIdx.y * 2 + value) * n_listed + blockIdx.x) * part_bytes};
}

extern "C" __global__ void __launch_bounds__(256) kv_gather(
    u8* staging,          // [n_layers, (K, V), n_listed, part_bytes]
    const u8* cache,      // [n_cache_layers, (K, V), n_blocks, part_bytes]
    const u32* blocks,    // [n_listed]
    u32 first_layer, u32 n_listed, u32 n_blocks, u64 part_bytes) {
    const Part part = part_of(blocks, first_layer, n_listed, n_blocks, part_bytes);
    copy_part(staging + part.in_staging, cache + part.in_cache, part_bytes);
}
BATON_EXPORT(kv_gather)

extern "C" __global__ void __launch_bounds__(256) kv_scatter(
    u8* cache,            // [n_cache_layers, (K, V), n_blocks, part_bytes]
    const u8* staging,    // [n_layers, (K, V), n_listed, part_bytes]
    const u32* blocks,    // [n_listed], all different
    u32 first_layer, u32 n_listed, u32 n_blocks, u64 part_bytes) {
    const Part part = part_of(blocks, first_layer, n_listed, n_blocks, part_bytes);
    copy_part(cache + part.in_cache, staging + part.in_staging, part_bytes);
}
BATON_EXPORT(kv_scatter)

extern "C" __global__ void __launch_bounds__(256) kv_move(
    u8* to,               // [n_cache_layers, (K, V), n_blocks_to, part_bytes]
    const u8* from,       // [n_cache_layers, (K, V), n_blocks_from, part_bytes]; the same cache, or another
    const u32* pairs,     // [n_listed, 2]: the block read and the block written; none is written that is also read
    u32 first_layer_to, u32 first_layer_from, u32 n_blocks_to, u32 n_blocks_from, u64 part_bytes) {
    const u64 block_from = pairs[2 * blockIdx.x], block_to = pairs[2 * blockIdx.x + 1], value = blockIdx.z;
    const u64 layer_from = first_layer_from + blockIdx.y, layer_to = first_layer_to + blockIdx.y;
    copy_part(to + ((layer_to * 2 + value) * n_blocks_to + block_to) * part_bytes,
              from + ((layer_from * 2 + value) * n_blocks_from + block_from) * part_bytes, part_bytes);
}
BATON_EXPORT(kv_move)
