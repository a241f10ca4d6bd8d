// What the attention kernels share: their operands, work items, logits, and the state of a softmax that can be merged.
//
// The state of a query over some tokens is (maximum, sum, values): the largest logit, the sum of 2^(logit - maximum), and
// the sum of 2^(logit - maximum) * v, not yet divided. Logits are in base 2: the factor log2(e) goes into the scale.
#pragma once
#include "tiles.cuh"

constexpr f32 LOG2_E = 1.4426950408889634f;

// One CTA's work; 48 bytes, as `plan.rs` has it.
struct Item {
    u32 first_row;      // row of the batch of the sequence's first new token
    u32 start_pos;      // that token's position
    u32 first_block;    // where the sequence's table begins in block_tables
    u32 kv_head;
    u32 first_query;    // packed query: token * group + head of the group
    u32 n_queries;      // 0: nothing to do
    u32 kv_start;       // tokens kv_start..kv_end of the sequence
    u32 kv_end;
    u32 partial;        // first row of the partial state; NONE: the result goes to out
    u32 reserved[3];
};

// Queries whose partial states are joined; 32 bytes, as `plan.rs` has it.
struct Merge {
    u32 first_row;
    u32 first_query;
    u32 n_queries;    // 0: nothing to do
    u32 kv_head;
    u32 partial;      // first partial row of the first split; a split's rows are n_queries further
    u32 n_splits;
    u32 reserved[2];
};

template <typename T> struct Attention {
    T* out;                       // [rows, n_heads, head_dim]
    const T* qkv;                 // [rows, n_heads + 2 * n_kv_heads, head_dim]
    const T* key;                 // [n_blocks, n_kv_heads, 1 << block_shift, head_dim]
    const T* value;               // likewise
    const u32* block_tables;      // all sequences' tables
    const Item* items;            // [gridDim.x]
    f32* partial_out;             // [partial_rows, head_dim]
    f32* partial_stats;           // [partial_rows, (maximum, sum)]
    const f32* sinks;             // [n_heads] or null
    u32 n_heads, n_kv_heads, head_dim, block_shift;
    f32 scale, soft_cap;          // soft_cap 0: none
    u32 window;                   // 0: all

    __device__ __forceinline__ u32 group() const { return n_heads / n_kv_heads; }

    __device__ __forceinline__ u32 position(const Item& item, u32 query) const {
        return item.start_pos + (item.first_query + query) / group();
    }

    // A token's K and V are this far into the layer's parts.
    __device__ __forceinline__ u64 kv_offset(const Item& item, u32 block, u32 token) const {
        const u32 offset = token & ((1u << block_shift) - 1);
        return (((static_cast<u64>(block) * n_kv_heads + item.kv_head) << block_shift) + offset) * head_dim;
    }

    __device__ __forceinline__ const T* query(const Item& item, u32 i) const {
        const u32 packed = item.first_query + i, per_token = n_heads + 2 * n_kv_heads;
        const u64 row = item.first_row + packed / group();
        return qkv + (row * per_token + item.kv_head * group() + packed % group()) * head_dim;
    }

    __device__ __forceinline__ u32 head(const Item& item, u32 i) const {
        return item.kv_head * group() + (item.first_query + i) % group();
    }

    __device__ __forceinline__ T* result(const Item& item, u32 i) const {
        const u64 row = item.first_row + (item.first_query + i) / group();
        return out + (row * n_heads + head(item, i)) * head_dim;
    }

    // The logit, in base 2, of a product q k. Rounded by itself: where a compiler fuses it with the subtraction of the maximum in
    // one path and not in another, masked and unmasked tiles would give the same product different weights.
    __device__ __forceinline__ f32 logit(f32 dot) const {
        return soft_cap == 0.0f ? __fmul_rn(dot, scale * LOG2_E) : capped_logit(dot);
    }
    __device__ __forceinline__ f32 capped_logit(f32 dot) const {
        // tanh y = 1 - 2 / (1 + e^(2 y)); the exponential may become infinite, which gives 1.
        const f32 twice = dot * (scale / soft_cap * (2.0f * LOG2_E));
        return __fmul_rn(soft_cap * LOG2_E, 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(twice)));
    }

    // First token that a query sees.
    __device__ __forceinline__ u32 first_seen(u32 position) const {
        return window == 0 || position < window ? 0 : position + 1 - window;
    }
    __device__ __forceinline__ bool sees(u32 position, u32 token) const {
        return token <= position && token >= first_seen(position);
    }
};

// What the weights are relative to: the maximum, or 0 where no token was seen yet and all weights are 0.
__device__ __forceinline__ f32 reference_of(f32 maximum) { return maximum == -BATON_INFINITY ? 0.0f : maximum; }

// Factor on a state's values that makes them the result, its sink included: 1 / (sum of all weights).
__device__ __forceinline__ f32 finishing_factor(f32 maximum, f32 sum, const f32* sinks, u32 head) {
    if (sinks == nullptr) return 1.0f / sum;
    const f32 sink = sinks[head] * LOG2_E;
    const f32 top = fmaxf(maximum, sink), weight = exp2_approx(maximum - top);
    return weight / (sum * weight + exp2_approx(sink - top));
}

// One step of the online softmax (Milakov and Gimelshein, arXiv:1805.02867) for rows g and g + 8 of a tile of 16 queries and
// N tokens from `first` on: scores become weights, `rescale` is the factor on what was summed before. A tile that shows a
// query nothing leaves its state as it was, bit for bit.
template <u32 N, typename T>
__device__ __forceinline__ void softmax_step(
    f32 (&score)[N / 8][4], f32 (&maximum)[2], f32 (&sum)[2], f32 (&rescale)[2], const Attention<T>& op,
    const u32 (&positions)[2], u32 first, u32 kv_end, bool all_is_seen) {
    const u32 t = threadIdx.x % 4;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        // One branch a row, not one an element: those in between would keep elements from being computed together.
        if (op.soft_cap == 0.0f) {
            const f32 factor = op.scale * LOG2_E;
#pragma unroll
            for (u32 n = 0; n < N / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) score[n][2 * r + i] = __fmul_rn(score[n][2 * r + i], factor);
        } else {
#pragma unroll
            for (u32 n = 0; n < N / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) score[n][2 * r + i] = op.capped_logit(score[n][2 * r + i]);
        }
        if (!all_is_seen) {
            const u32 begin = op.first_seen(positions[r]), end = min(kv_end, positions[r] + 1);
#pragma unroll
            for (u32 n = 0; n < N / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    const u32 token = first + n * 8 + 2 * t + i;
                    f32& x = score[n][2 * r + i];
                    x = (token >= begin) & (token < end) ? x : -BATON_INFINITY;
                }
        }
        f32 top = maximum[r];
#pragma unroll
        for (u32 n = 0; n < N / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) top = fmaxf(top, score[n][2 * r + i]);
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
        const f32 reference = reference_of(top);
        rescale[r] = exp2_approx(maximum[r] - reference);
        maximum[r] = top;
        // This lane's tokens only; lanes are added when all is done.
        f32 added = 0.0f;
#pragma unroll
        for (u32 n = 0; n < N / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                f32& x = score[n][2 * r + i];
                x = exp2_approx(x - reference);
                added += x;
            }
        sum[r] = sum[r] * rescale[r] + added;
    }
}

// The weights of 16 tokens as an A fragment.
template <typename T> __device__ __forceinline__ void pack_weights(u32 (&a)[4], const f32 (&low)[4], const f32 (&high)[4]) {
    a[0] = pack2<T>(low[0], low[1]);
    a[1] = pack2<T>(low[2], low[3]);
    a[2] = pack2<T>(high[0], high[1]);
    a[3] = pack2<T>(high[2], high[3]);
}

#define ATTENTION_PARAMETERS(T)                                                                                            \
    T *out, const T *qkv, const T *key, const T *value, const u32 *block_tables, const Item *items, f32 *partial_out,         \
        f32 *partial_stats, const f32 *sinks, u32 n_heads, u32 n_kv_heads, u32 head_dim, u32 block_shift, f32 scale,         \
        f32 soft_cap, u32 window
#define ATTENTION_OPERANDS                                                                                                 \
    {                                                                                                                      \
        out, qkv, key, value, block_tables, items, partial_out, partial_stats, sinks, n_heads, n_kv_heads, head_dim,          \
            block_shift, scale, soft_cap, window                                                                           \
    }

// INSTANCE(head_dim) for the head sizes asked for.
#ifdef BATON_HEAD_DIM
#define BATON_EXPAND(INSTANCE, D) INSTANCE(D)
#define FOR_HEAD_DIMS(INSTANCE) BATON_EXPAND(INSTANCE, BATON_HEAD_DIM)
#else
#define FOR_HEAD_DIMS(INSTANCE) INSTANCE(64) INSTANCE(80) INSTANCE(96) INSTANCE(128) INSTANCE(192) INSTANCE(256)
#endif
