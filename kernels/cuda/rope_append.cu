// What happens to q, k and v between their projection and attention: RMS norm of q and k (each head, or the whole
// projection), rotation, and the append of k and v to the paged cache. All kinds of rope are a table of cos and sin.
//
// Split: one CTA a row. With a norm, a first pass puts each head's scale into shared memory; the second takes pairs of 16-byte
// runs (i and i + half_dim), thread after thread. Bound: bytes, 2 * (n_heads + 2 * n_kv_heads) * head_dim * sizeof(T) a row.
// Bits: a head's sum of squares adds in order within a lane, then as a butterfly; a whole projection's, heads in order after that.
// Values stay f32 from the load to the store.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

constexpr u64 NO_SLOT = ~static_cast<u64>(0);    // of a row that is no token and is left alone

template <typename T, u32 W> struct alignas(W * sizeof(T)) Run {
    T x[W];
};
template <typename T, u32 W> __device__ __forceinline__ Run<T, W> load_run(const T* from) {
    return *reinterpret_cast<const Run<T, W>*>(from);
}
template <typename T, u32 W> __device__ __forceinline__ void store_run(T* to, const Run<T, W>& run) {
    *reinterpret_cast<Run<T, W>*>(to) = run;
}

template <typename T> struct Operands {
    T* qkv;                       // [rows, (n_heads + 2 * n_kv_heads) * head_dim]
    T* key;                       // [n_blocks, n_kv_heads, 1 << block_shift, head_dim]
    T* value;                     // likewise
    const u32* positions;         // [rows], each below max_positions
    const u64* slots;             // [rows], block << block_shift | offset in the block, or NO_SLOT
    const u32* rope_variants;     // [rows]
    const f32* cos;               // [n_variants, max_positions, half_dim]
    const f32* sin;               // likewise
    const f32* query_norm;        // null, [head_dim] or [n_heads * head_dim]
    const f32* key_norm;          // null, [head_dim] or [n_kv_heads * head_dim]
    u32 norm_is_whole;            // bit 0: query_norm is of the whole projection; bit 1: key_norm is
    f32 eps;
    u32 n_heads, n_kv_heads, head_dim, half_dim, max_positions, block_shift;
};

// scales[head] = 1 / sqrt(mean square + eps), of the head or of its whole projection; q heads, then k heads.
template <typename T, u32 W> __device__ __forceinline__ void norm_scales(const Operands<T>& op, const T* row, f32* scales) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    for (u32 head = warp; head < op.n_heads + op.n_kv_heads; head += n_warps) {
        f32 squares = 0.0f;
        for (u32 i = lane * W; i < op.head_dim; i += WARP * W) {
            const Run<T, W> run = load_run<T, W>(row + head * op.head_dim + i);
#pragma unroll
            for (u32 j = 0; j < W; j++) squares += to_f32(run.x[j]) * to_f32(run.x[j]);
        }
        squares = warp_sum(squares);
        if (lane == 0) scales[head] = squares;
    }
    __syncthreads();
    f32 whole[2] = {0.0f, 0.0f};
    if (op.norm_is_whole) {
        for (u32 head = 0; head < op.n_heads; head++) whole[0] += scales[head];
        for (u32 head = 0; head < op.n_kv_heads; head++) whole[1] += scales[op.n_heads + head];
        __syncthreads();
    }
    for (u32 head = threadIdx.x; head < op.n_heads + op.n_kv_heads; head += blockDim.x) {
        const u32 is_key = head >= op.n_heads;
        const bool is_whole = op.norm_is_whole >> is_key & 1;
        const f32 n = static_cast<f32>(op.head_dim * (is_whole ? (is_key ? op.n_kv_heads : op.n_heads) : 1));
        scales[head] = 1.0f / sqrtf((is_whole ? whole[is_key] : scales[head]) / n + op.eps);
    }
    __syncthreads();
}

template <typename T, u32 W> __device__ __forceinline__ void append_row(const Operands<T>& op) {
    BATON_DYNAMIC_SHARED(f32, scales);    // [n_heads + n_kv_heads]
    const u32 n_rotated = op.n_heads + op.n_kv_heads;
    T* row = op.qkv + static_cast<u64>(blockIdx.x) * (n_rotated + op.n_kv_heads) * op.head_dim;
    const u64 slot = op.slots[blockIdx.x];
    if (slot == NO_SLOT) return;
    const u64 block = slot >> op.block_shift, offset = slot & ((1u << op.block_shift) - 1);
    const u64 angles =
        (static_cast<u64>(op.rope_variants[blockIdx.x]) * op.max_positions + op.positions[blockIdx.x]) * op.half_dim;
    const bool has_norm = op.query_norm != nullptr || op.key_norm != nullptr;
    if (has_norm) norm_scales<T, W>(op, row, scales);

    auto cached = [&](T* part, u32 kv_head) {
        return part + (((block * op.n_kv_heads + kv_head) << op.block_shift) + offset) * op.head_dim;
    };
    // Loads W elements of a head of q or k, normed.
    auto normed = [&](f32(&to)[W], u32 head, u32 i) {
        const Run<T, W> run = load_run<T, W>(row + head * op.head_dim + i);
        const bool is_key = head >= op.n_heads;
        const f32* weight = is_key ? op.key_norm : op.query_norm;
        if (weight == nullptr) {
#pragma unroll
            for (u32 j = 0; j < W; j++) to[j] = to_f32(run.x[j]);
            return;
        }
        const u32 head_of_part = is_key ? head - op.n_heads : head;
        const f32* head_weight = weight + (op.norm_is_whole >> (is_key ? 1 : 0) & 1 ? head_of_part * op.head_dim : 0) + i;
#pragma unroll
        for (u32 j = 0; j < W; j++) to[j] = to_f32(run.x[j]) * scales[head] * head_weight[j];
    };
    auto store = [&](u32 head, u32 i, const f32(&from)[W]) {
        Run<T, W> run;
#pragma unroll
        for (u32 j = 0; j < W; j++) run.x[j] = from_f32<T>(from[j]);
        store_run<T, W>((head < op.n_heads ? row + head * op.head_dim : cached(op.key, head - op.n_heads)) + i, run);
    };

    const u32 n_pairs = op.half_dim / W;
    for (u32 unit = threadIdx.x; unit < n_rotated * n_pairs; unit += blockDim.x) {
        const u32 head = unit / n_pairs, i = unit % n_pairs * W;
        f32 low[W], high[W];
        normed(low, head, i);
        normed(high, head, op.half_dim + i);
#pragma unroll
        for (u32 j = 0; j < W; j++) {
            const f32 a = low[j], b = high[j], cos = op.cos[angles + i + j], sin = op.sin[angles + i + j];
            low[j] = a * cos - b * sin;
            high[j] = b * cos + a * sin;
        }
        store(head, i, low);
        store(head, op.half_dim + i, high);
    }
    const u32 n_unrotated = (op.head_dim - 2 * op.half_dim) / W;
    for (u32 unit = threadIdx.x; unit < n_rotated * n_unrotated; unit += blockDim.x) {
        const u32 head = unit / n_unrotated, i = 2 * op.half_dim + unit % n_unrotated * W;
        f32 x[W];
        normed(x, head, i);
        store(head, i, x);
    }
    const u32 n_runs = op.head_dim / W;
    for (u32 unit = threadIdx.x; unit < op.n_kv_heads * n_runs; unit += blockDim.x) {
        const u32 kv_head = unit / n_runs, i = unit % n_runs * W;
        const Run<T, W> run = load_run<T, W>(row + (n_rotated + kv_head) * op.head_dim + i);
        store_run<T, W>(cached(op.value, kv_head) + i, run);
    }
}

template <typename T> __device__ __forceinline__ void rope_append(const Operands<T>& op) {
    constexpr u32 N = Vec<T>::N;
    if (op.head_dim % N == 0 && op.half_dim % N == 0)
        append_row<T, N>(op);
    else
        append_row<T, 1>(op);
}

#define ROPE_APPEND(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rope_append_##T(                                                       \
        T* qkv, T* key, T* value, const u32* positions, const u64* slots, const u32* rope_variants, const f32* cos,          \
        const f32* sin, const f32* query_norm, const f32* key_norm, u32 norm_is_whole, f32 eps, u32 n_heads, u32 n_kv_heads, \
        u32 head_dim, u32 half_dim, u32 max_positions, u32 block_shift) {                                                  \
        rope_append<T>({qkv, key, value, positions, slots, rope_variants, cos, sin, query_norm, key_norm, norm_is_whole, eps, \
                        n_heads, n_kv_heads, head_dim, half_dim, max_positions, block_shift});                              \
    }                                                                                                                      \
    BATON_EXPORT(rope_append_##T)

ROPE_APPEND(f32)
ROPE_APPEND(f16)
ROPE_APPEND(bf16)
