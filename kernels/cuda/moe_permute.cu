// Orders the (row, choice) pairs of a step by expert, rows ascending within one, and lists the tiles of the grouped product.
// Pairs of no expert have no slot.
//
// Split: a CTA an expert. Each counts all pairs by itself (they lie in L2), so no CTA waits for another; then it places its own
// in order. Bound: latency; n_experts * n_pairs * 4 bytes of L2.
// Bits: integers only, and every slot is settled by the pairs alone.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

constexpr u32 TILE_ROWS = 64;    // of moe_linear
constexpr u32 N_THREADS = 256;

extern "C" __global__ void __launch_bounds__(N_THREADS) moe_permute(
    u32* offsets,         // [n_experts + 1]: an expert's slots are offsets[e]..offsets[e + 1]
    u32* pair_of_slot,    // [n_pairs], as many as have a slot
    u32* slot_of_pair,    // [n_pairs], or NONE
    u32* tiles,           // [max_tiles, (expert or NONE, first slot)]
    const u32* experts,   // [n_pairs], or NONE
    u32 n_pairs, u32 n_experts, u32 max_tiles) {
    BATON_DYNAMIC_SHARED(u32, counts);    // [n_experts]
    __shared__ u32 before[2];             // pairs and tiles of the experts before this one
    __shared__ u32 warp_counts[N_THREADS / WARP];
    const u32 expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u32 i = threadIdx.x; i < n_experts; i += N_THREADS) counts[i] = 0;
    if (threadIdx.x < 2) before[threadIdx.x] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < n_pairs; i += N_THREADS)
        if (experts[i] != NONE) atomicAdd(&counts[experts[i]], 1u);
    __syncthreads();
    for (u32 i = threadIdx.x; i < expert; i += N_THREADS) {
        atomicAdd(&before[0], counts[i]);
        atomicAdd(&before[1], (counts[i] + TILE_ROWS - 1) / TILE_ROWS);
    }
    __syncthreads();
    const u32 first_slot = before[0], first_tile = before[1], n_mine = counts[expert];
    const u32 n_tiles = (n_mine + TILE_ROWS - 1) / TILE_ROWS;
    for (u32 i = threadIdx.x; i < n_tiles; i += N_THREADS) {
        tiles[2 * (first_tile + i)] = expert;
        tiles[2 * (first_tile + i) + 1] = first_slot + i * TILE_ROWS;
    }
    if (threadIdx.x == 0) offsets[expert] = first_slot;
    if (expert == n_experts - 1) {
        if (threadIdx.x == 0) offsets[n_experts] = first_slot + n_mine;
        for (u32 i = first_tile + n_tiles + threadIdx.x; i < max_tiles; i += N_THREADS) tiles[2 * i] = NONE;
    }

    u32 next = first_slot;
    for (u32 first = 0; first < n_pairs; first += N_THREADS) {
        const u32 pair = first + threadIdx.x;
        const bool is_mine = pair < n_pairs && experts[pair] == expert;
        if (expert == 0 && pair < n_pairs && experts[pair] == NONE) slot_of_pair[pair] = NONE;
        const u32 votes = __ballot_sync(ALL_LANES, is_mine);
        if (lane == 0) warp_counts[warp] = __popc(votes);
        __syncthreads();
        u32 slot = next + __popc(votes & ((1u << lane) - 1));
        for (u32 i = 0; i < N_THREADS / WARP; i++) {
            if (i < warp) slot += warp_counts[i];
            next += warp_counts[i];
        }
        if (is_mine) {
            pair_of_slot[slot] = pair;
            slot_of_pair[pair] = slot;
        }
        __syncthreads();
    }
}
BATON_EXPORT(moe_permute)
