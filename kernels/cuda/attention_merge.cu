// Joins the partial states of queries whose context was split: out = sum_s 2^(m_s - M) values_s / sum_s 2^(m_s - M) sum_s,
// the sink included.
//
// Split: blockIdx.x is a merge, blockIdx.y four of its queries, a warp each. Bound: bytes, n_splits * head_dim * 4 a query.
// Bits: splits in order. A state that saw nothing has weight 0, so how many such states there are changes nothing, and one
// state alone gives the bits that its item would have written itself.
// Versions: one. Not measured yet, no card.
#include "attention.cuh"

template <typename T>
__device__ __forceinline__ void attention_merge(
    T* out,                      // [rows, n_heads, head_dim]
    const f32* partial_out,      // [partial_rows, head_dim]
    const f32* partial_stats,    // [partial_rows, (maximum, sum)]
    const Merge* merges,         // [gridDim.x]
    const f32* sinks,            // [n_heads] or null
    u32 n_heads, u32 n_kv_heads, u32 head_dim) {
    const Merge merge = merges[blockIdx.x];
    const u32 lane = threadIdx.x % WARP, query = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (query >= merge.n_queries) return;
    const u64 first = static_cast<u64>(merge.partial) + query;
    f32 maximum = -BATON_INFINITY;
    for (u32 split = lane; split < merge.n_splits; split += WARP)
        maximum = fmaxf(maximum, partial_stats[2 * (first + static_cast<u64>(split) * merge.n_queries)]);
    maximum = warp_max(maximum);
    const f32 reference = reference_of(maximum);
    f32 sum = 0.0f;
    for (u32 split = 0; split < merge.n_splits; split++) {
        const u64 row = first + static_cast<u64>(split) * merge.n_queries;
        sum += exp2_approx(partial_stats[2 * row] - reference) * partial_stats[2 * row + 1];
    }
    const u32 group = n_heads / n_kv_heads, packed = merge.first_query + query;
    const u32 head = merge.kv_head * group + packed % group;
    const f32 factor = finishing_factor(maximum, sum, sinks, head);
    T* to = out + ((static_cast<u64>(merge.first_row) + packed / group) * n_heads + head) * head_dim;
    for (u32 dim = lane; dim < head_dim; dim += WARP) {
        f32 value = 0.0f;
        for (u32 split = 0; split < merge.n_splits; split++) {
            const u64 row = first + static_cast<u64>(split) * merge.n_queries;
            value += exp2_approx(partial_stats[2 * row] - reference) * partial_out[row * head_dim + dim];
        }
        to[dim] = from_f32<T>(value * factor);
    }
}

#define ATTENTION_MERGE(T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        attention_merge_##T(T* out, const f32* partial_out, const f32* partial_stats, const Merge* merges, const f32* sinks,  \
                            u32 n_heads, u32 n_kv_heads, u32 head_dim) {                                                   \
        attention_merge<T>(out, partial_out, partial_stats, merges, sinks, n_heads, n_kv_heads, head_dim);                   \
    }                                                                                                                      \
    BATON_EXPORT(attention_merge_##T)

ATTENTION_MERGE(f32)
ATTENTION_MERGE(f16)
ATTENTION_MERGE(bf16)
