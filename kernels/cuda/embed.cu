// out[r] = scale * table[ids[r]]: the embedding of a step's tokens.
//
// Split: one CTA a row, 16 bytes a thread a turn. Bound: bytes, 2 * cols * sizeof(T) a row.
// Ids are read on the device, so those just sampled need not pass through the host.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

template <typename T>
__device__ __forceinline__ void embed(
    T* out,            // [rows, cols]
    const T* table,    // [vocab, cols]
    const u32* ids,    // [rows], each below vocab
    f32 scale, u32 cols) {
    const T* from = table + static_cast<u64>(ids[blockIdx.x]) * cols;
    T* to = out + static_cast<u64>(blockIdx.x) * cols;
    u32 done = 0;
    if (rows_are_vectors<T>(cols)) {
        for (u32 i = threadIdx.x * Vec<T>::N; i < cols; i += blockDim.x * Vec<T>::N) {
            Vec<T> v = load_vec(from + i);
#pragma unroll
            for (u32 j = 0; j < Vec<T>::N; j++) v.x[j] = from_f32<T>(scale * to_f32(v.x[j]));
            store_vec(to + i, v);
        }
        done = cols;
    }
    for (u32 i = done + threadIdx.x; i < cols; i += blockDim.x) to[i] = from_f32<T>(scale * to_f32(from[i]));
}

#define EMBED(T)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) embed_##T(T* out, const T* table, const u32* ids, f32 scale, u32 cols) { \
        embed<T>(out, table, ids, scale, cols);                                                                            \
    }                                                                                                                      \
    BATON_EXPORT(embed_##T)

EMBED(f32)
EMBED(f16)
EMBED(bf16)
