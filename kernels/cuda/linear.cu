// out = x w^T without splitting k: the product of deterministic mode, and of f32 tests. Elsewhere cuBLASLt is faster.
//
// Split: a CTA a tile of out; 128 x 128 with 8 warps, or for up to 16 rows 16 x 64 with 4 (`narrow`). Tiles down a column
// follow each other, so they read the same rows of w from L2. Stages of 32 or 64 of k by cp.async, mma.m16n8k16.
// Bound: FLOPs, 2 m n k; with few rows the bytes of w.
// Bits: an element is one chain over k, alike in both tilings; a row does not depend on the others.
// Versions: one. Not measured yet, no card.
#include "gemm.cuh"

typedef Tiling<128, 128, 32, 2, 4, 3> Wide;
typedef Tiling<16, 64, 64, 1, 4, 4> Narrow;

template <typename T, typename Out, typename Tile>
__device__ __forceinline__ void linear(
    Out* out,           // [m, n]
    const T* x,         // [m, k]
    const T* weight,    // [n, k]
    u32 m, u32 n, u32 k) {
    const u32 first_row = blockIdx.x * Tile::ROWS, first_col = blockIdx.y * Tile::COLS;
    auto row_of = [&](u32 row) { return first_row + row < m ? x + static_cast<u64>(first_row + row) * k : nullptr; };
    auto put = [&](u32 row, u32 col, f32 value) {
        if (first_row + row < m && col < n) out[static_cast<u64>(first_row + row) * n + col] = from_f32<Out>(value);
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

#define LINEAR(T, Out, suffix)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) linear_##suffix(Out* out, const T* x, const T* weight, u32 m, u32 n, u32 k) { \
        linear<T, Out, Wide>(out, x, weight, m, n, k);                                                                     \
    }                                                                                                                      \
    BATON_EXPORT(linear_##suffix)
#define LINEAR_NARROW(T, Out, suffix)                                                                                      \
    extern "C" __global__ void __launch_bounds__(128) linear_narrow_##suffix(Out* out, const T* x, const T* weight, u32 m, u32 n, \
                                                                             u32 k) {                                     \
        linear<T, Out, Narrow>(out, x, weight, m, n, k);                                                                   \
    }                                                                                                                      \
    BATON_EXPORT(linear_narrow_##suffix)

LINEAR(f32, f32, f32)
LINEAR(bf16, bf16, bf16)
LINEAR(f16, f16, f16)
LINEAR(bf16, f32, bf16_f32)
LINEAR(f16, f32, f16_f32)
LINEAR_NARROW(bf16, bf16, bf16)
LINEAR_NARROW(f16, f16, f16)
LINEAR_NARROW(bf16, f32, bf16_f32)
LINEAR_NARROW(f16, f32, f16_f32)
