// out[i] = x[rows[i]]: the rows of a step whose logits are wanted.
//
// Split: one CTA a row, 16 bytes a thread a turn. Bound: bytes, 2 * cols * sizeof(T) a row.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

template <typename T>
__device__ __forceinline__ void gather_rows(
    T* out,            // [rows, cols]
    const T* x,        // [source rows, cols]
    const u32* rows,   // [rows], each a row of x
    u32 cols) {
    const T* from = x + static_cast<u64>(rows[blockIdx.x]) * cols;
    T* to = out + static_cast<u64>(blockIdx.x) * cols;
    u32 done = 0;
    if (rows_are_vectors<T>(cols)) {
        for (u32 i = threadIdx.x * Vec<T>::N; i < cols; i += blockDim.x * Vec<T>::N) store_vec(to + i, load_vec(from + i));
        done = cols;
    }
    for (u32 i = done + threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
}

#define GATHER_ROWS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) gather_rows_##T(T* out, const T* x, const u32* rows, u32 cols) {       \
        gather_rows<T>(out, x, rows, cols);                                                                                \
    }                                                                                                                      \
    BATON_EXPORT(gather_rows_##T)

GATHER_ROWS(f32)
GATHER_ROWS(f16)
GATHER_ROWS(bf16)
