// Blocks of the KV cache to and from one staging buffer, so that a transfer over PCIe or a network is one long copy.
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
            ((static_cast<u64>(blockIdx.y) * n_listed + blockIdx.x) * 2 + value) * part_bytes};
}

extern "C" __global__ void __launch_bounds__(256) kv_gather(
    u8* staging,          // [n_layers, n_listed, (K, V), part_bytes]
    const u8* cache,      // [n_cache_layers, (K, V), n_blocks, part_bytes]
    const u32* blocks,    // [n_listed]
    u32 first_layer, u32 n_listed, u32 n_blocks, u64 part_bytes) {
    const Part part = part_of(blocks, first_layer, n_listed, n_blocks, part_bytes);
    copy_part(staging + part.in_staging, cache + part.in_cache, part_bytes);
}
BATON_EXPORT(kv_gather)

extern "C" __global__ void __launch_bounds__(256) kv_scatter(
    u8* cache,            // [n_cache_layers, (K, V), n_blocks, part_bytes]
    const u8* staging,    // [n_layers, n_listed, (K, V), part_bytes]
    const u32* blocks,    // [n_listed], all different
    u32 first_layer, u32 n_listed, u32 n_blocks, u64 part_bytes) {
    const Part part = part_of(blocks, first_layer, n_listed, n_blocks, part_bytes);
    copy_part(cache + part.in_cache, staging + part.in_staging, part_bytes);
}
BATON_EXPORT(kv_scatter)
