// The products of all experts in one launch: each expert's rows, which stand together by slot, with its own weight, and a bias.
//
// Split: a CTA a tile of 64 slots of one expert (of moe_permute's list) by 128 columns; 8 warps, three stages of 32 of k by
// cp.async, mma.m16n8k16. The first product gathers rows of x by slot, so no permuted copy of x is made.
// Bound: bytes of the chosen experts' weights in decode, FLOPs in prefill.
// Bits: an element is one chain over k, then the bias; who else chose the expert does not show.
// Versions: one. Not measured yet, no card. To try: 16 slots a tile where experts have few rows.
#include "gemm.cuh"

typedef Tiling<64, 128, 32, 2, 4, 3> Tile;

template <typename T>
__device__ __forceinline__ void moe_linear(
    T* out,                       // [n_pairs, n], by slot
    const T* x,                   // [rows, k], or [n_pairs, k] by slot
    const T* const* weights,      // [n_experts] of [n, k]
    const f32* const* biases,     // [n_experts] of [n], or null; one of them may be null
    const u32* offsets,           // [n_experts + 1]
    const u32* pair_of_slot,      // [n_pairs], or null: row s of x is slot s
    const u32* tiles,             // [gridDim.x, (expert or NONE, first slot)]
    u32 top_k, u32 n, u32 k) {
    const u32 expert = tiles[2 * blockIdx.x];
    if (expert == NONE) return;
    const u32 first_slot = tiles[2 * blockIdx.x + 1], end = offsets[expert + 1], first_col = blockIdx.y * Tile::COLS;
    const T* weight = weights[expert];
    const f32* bias = biases == nullptr ? nullptr : biases[expert];
    auto row_of = [&](u32 row) -> const T* {
        const u32 slot = first_slot + row;
        if (slot >= end) return nullptr;
        return x + static_cast<u64>(pair_of_slot == nullptr ? slot : pair_of_slot[slot] / top_k) * k;
    };
    auto put = [&](u32 row, u32 col, f32 value) {
        const u32 slot = first_slot + row;
        if (slot < end && col < n) out[static_cast<u64>(slot) * n + col] = from_f32<T>(bias == nullptr ? value : value + bias[col]);
    };
    if constexpr (sizeof(T) == 2) {
        if (k % 8 == 0) {
            tensor_core_tile<T, Tile>(weight, first_col, n, k, row_of, [&](u32 row, u32 col, f32 first, f32 second) {
                put(row, col, first);
                put(row, col + 1, second);
            });
            return;
        }
    }
    scalar_tile<T, Tile::ROWS, Tile::COLS, Tile::N_THREADS>(weight, first_col, n, k, row_of, put);
}

#define MOE_LINEAR(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) moe_linear_##T(                                                        \
        T* out, const T* x, const T* const* weights, const f32* const* biases, const u32* offsets, const u32* pair_of_slot,   \
        const u32* tiles, u32 top_k, u32 n, u32 k) {                                                                       \
        moe_linear<T>(out, x, weights, biases, offsets, pair_of_slot, tiles, top_k, n, k);                                 \
    }                                                                                                                      \
    BATON_EXPORT(moe_linear_##T)

MOE_LINEAR(f32)
MOE_LINEAR(f16)
MOE_LINEAR(bf16)
