// out[r] = sum over a row's experts, ascending, of weight * y: the end of a mixture of experts.
//
// Split: a CTA a row, 16 bytes a thread a turn. Bound: bytes, (top_k + 1) * cols * sizeof(T) a row.
// Bits: from 0, in ascending order of experts.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

template <typename T, u32 W>
__device__ __forceinline__ void combine_run(T* to, const T* y, const u32* slots, const f32* weights, u32 top_k, u32 cols, u32 i) {
    f32 sums[W] = {};
    for (u32 choice = 0; choice < top_k; choice++) {
        if (slots[choice] == NONE) continue;
        const T* from = y + static_cast<u64>(slots[choice]) * cols + i;
        if constexpr (W == 1) {
            sums[0] += weights[choice] * to_f32(from[0]);
        } else {
            const Vec<T> v = load_vec(from);
#pragma unroll
            for (u32 j = 0; j < W; j++) sums[j] += weights[choice] * to_f32(v.x[j]);
        }
    }
    if constexpr (W == 1) {
        to[i] = from_f32<T>(sums[0]);
    } else {
        Vec<T> v;
#pragma unroll
        for (u32 j = 0; j < W; j++) v.x[j] = from_f32<T>(sums[j]);
        store_vec(to + i, v);
    }
}

template <typename T>
__device__ __forceinline__ void moe_combine(
    T* out,                      // [rows, cols]
    const T* y,                  // [n_pairs, cols], by slot
    const u32* slot_of_pair,     // [rows, top_k], experts ascending, or NONE
    const f32* weights,          // [rows, top_k]
    u32 top_k, u32 cols) {
    const u64 row = blockIdx.x;
    const u32* slots = slot_of_pair + row * top_k;
    const f32* of_row = weights + row * top_k;
    T* to = out + row * cols;
    constexpr u32 N = Vec<T>::N;
    if (rows_are_vectors<T>(cols)) {
        for (u32 i = threadIdx.x * N; i < cols; i += blockDim.x * N) combine_run<T, N>(to, y, slots, of_row, top_k, cols, i);
    } else {
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) combine_run<T, 1>(to, y, slots, of_row, top_k, cols, i);
    }
}

#define MOE_COMBINE(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) moe_combine_##T(T* out, const T* y, const u32* slot_of_pair,             \
                                                                      const f32* weights, u32 top_k, u32 cols) {           \
        moe_combine<T>(out, y, slot_of_pair, weights, top_k, cols);                                                        \
    }                                                                                                                      \
    BATON_EXPORT(moe_combine_##T)

MOE_COMBINE(f32)
MOE_COMBINE(f16)
MOE_COMBINE(bf16)
