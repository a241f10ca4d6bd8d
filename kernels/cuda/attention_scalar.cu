// Paged attention without tensor cores: f32, and head sizes the others have no instance for. For tests and odd models.
//
// Split: an item is up to 4 packed queries of one sequence and KV head over a range of tokens, a warp each. A lane scores one
// token of 32 by itself; then each lane sums its elements of V over those tokens. Bound: L1, as K is read row by row.
// Bits: tokens in order within a chunk of 32 at fixed positions; chunks in order.
// Versions: one. Not measured yet, no card.
#include "attention.cuh"

constexpr u32 MAX_HEAD_DIM = 256;

template <typename T> __device__ __forceinline__ void attention_scalar(const Attention<T>& op) {
    const Item item = op.items[blockIdx.x];
    const u32 lane = threadIdx.x % WARP, query = threadIdx.x / WARP;
    if (query >= item.n_queries) return;
    const T* q = op.query(item, query);
    const u32 position = op.position(item, query);
    f32 maximum = -BATON_INFINITY, sum = 0.0f, values[MAX_HEAD_DIM / WARP];
#pragma unroll
    for (u32 i = 0; i < MAX_HEAD_DIM / WARP; i++) values[i] = 0.0f;

    for (u32 first = item.kv_start; first < item.kv_end; first += WARP) {
        const u32 token = first + lane;
        f32 score = -BATON_INFINITY;
        u64 offset = 0;
        if (token < item.kv_end && op.sees(position, token)) {
            offset = op.kv_offset(item, op.block_tables[item.first_block + (token >> op.block_shift)], token);
            f32 dot = 0.0f;
            for (u32 i = 0; i < op.head_dim; i++) dot += to_f32(q[i]) * to_f32(op.key[offset + i]);
            score = op.logit(dot);
        }
        const f32 new_maximum = fmaxf(maximum, warp_max(score));
        const f32 reference = reference_of(new_maximum);
        const f32 rescale = exp2_approx(maximum - reference), weight = exp2_approx(score - reference);
        maximum = new_maximum;
        sum = sum * rescale + warp_sum(weight);
#pragma unroll
        for (u32 i = 0; i < MAX_HEAD_DIM / WARP; i++) values[i] *= rescale;
        for (u32 source = 0; source < WARP; source++) {
            const f32 of_token = __shfl_sync(ALL_LANES, weight, source);
            const T* value = op.value + __shfl_sync(ALL_LANES, offset, source);
            if (of_token == 0.0f) continue;
#pragma unroll
            for (u32 i = 0; i < MAX_HEAD_DIM / WARP; i++)
                if (lane + i * WARP < op.head_dim) values[i] += of_token * to_f32(value[lane + i * WARP]);
        }
    }

    const bool is_whole = item.partial == NONE;
    const f32 factor = is_whole ? finishing_factor(maximum, sum, op.sinks, op.head(item, query)) : 1.0f;
    const u64 partial_row = static_cast<u64>(item.partial) + query;
#pragma unroll
    for (u32 i = 0; i < MAX_HEAD_DIM / WARP; i++) {
        const u32 dim = lane + i * WARP;
        if (dim >= op.head_dim) break;
        if (is_whole)
            op.result(item, query)[dim] = from_f32<T>(values[i] * factor);
        else
            op.partial_out[partial_row * op.head_dim + dim] = values[i];
    }
    if (!is_whole && lane == 0) {
        op.partial_stats[2 * partial_row] = maximum;
        op.partial_stats[2 * partial_row + 1] = sum;
    }
}

#define ATTENTION_SCALAR(T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(128) attention_scalar_##T(ATTENTION_PARAMETERS(T)) {                        \
        attention_scalar<T>(ATTENTION_OPERANDS);                                                                           \
    }                                                                                                                      \
    BATON_EXPORT(attention_scalar_##T)

ATTENTION_SCALAR(f32)
ATTENTION_SCALAR(f16)
ATTENTION_SCALAR(bf16)
