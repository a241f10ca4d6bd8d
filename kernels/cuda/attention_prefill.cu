// Paged attention of chunks of a prompt, causal over what the cache holds: FlashAttention-2 (Dao, arXiv:2307.08691) over
// block tables. head_dim 64 to 256, window, soft cap, sinks. In deterministic mode it decodes as well.
//
// Split: an item is up to QUERIES packed queries (token * group + head of the group, so a tile is full whatever the group) of
// one sequence and KV head, over a range of tokens. Each of 4 warps has M_TILES times 16 of the queries. Tiles of KEYS tokens
// of K and V are copied by all (cp.async, 16 bytes a thread), one under way while one is computed. S = Q K^T and P V are
// mma.m16n8k16; the softmax stays in registers. Tiles that a warp's queries do not see are not computed.
// Bound: FLOPs, 4 * head_dim a query, head and visible token.
// Bits: a query's state runs over tiles in order, tiles begin at multiples of KEYS, and what a tile holds beyond what the
// query sees changes nothing; so neither the chunk nor the place in the tile shows, as long as cuts lie at fixed positions.
// Versions: two (docs/kernels.md). Not measured yet, no card. To try: 128 x 64 for heads of 128 where shared memory allows
// (sm_80, sm_90a), wgmma with TMA on sm_90a, results through shared memory to 16-byte stores.
#include "attention.cuh"

template <u32 D> struct Shape {
    static constexpr u32 M_TILES = D <= 128 ? 2 : 1;
    static constexpr u32 QUERIES = 64 * M_TILES;
    static constexpr u32 KEYS = D <= 96 ? 64 : 32;
    static constexpr u32 STRIDE = D + ROW_PADDING;
};
constexpr u32 N_THREADS = 128;

template <typename T, u32 D>
__device__ __forceinline__ void load_tile(T* key, T* value, const Attention<T>& op, const Item& item, u32 first) {
    constexpr u32 CHUNKS = D / 8;
#pragma unroll
    for (u32 i = threadIdx.x; i < Shape<D>::KEYS * CHUNKS; i += N_THREADS) {
        const u32 row = i / CHUNKS, column = i % CHUNKS * 8, token = first + row;
        const bool is_there = token < item.kv_end;
        u64 offset = 0;
        if (is_there) offset = op.kv_offset(item, op.block_tables[item.first_block + (token >> op.block_shift)], token) + column;
        copy_async(key + row * Shape<D>::STRIDE + column, op.key + offset, is_there);
        copy_async(value + row * Shape<D>::STRIDE + column, op.value + offset, is_there);
    }
}

template <typename T, u32 D> __device__ __forceinline__ void attention_prefill(const Attention<T>& op) {
    using S = Shape<D>;
    const Item item = op.items[blockIdx.x];
    if (item.n_queries == 0) return;
    BATON_DYNAMIC_SHARED(T, shared);    // Q [QUERIES, STRIDE]; then two stages of K, V [KEYS, STRIDE]
    T* stages = shared + S::QUERIES * S::STRIDE;
    constexpr u32 PART = S::KEYS * S::STRIDE;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;

#pragma unroll
    for (u32 i = threadIdx.x; i < S::QUERIES * (D / 8); i += N_THREADS) {
        const u32 row = i / (D / 8), column = i % (D / 8) * 8;
        const bool is_there = row < item.n_queries;
        copy_async(shared + row * S::STRIDE + column, op.query(item, is_there ? row : 0) + column, is_there);
    }
    load_tile<T, D>(stages, stages + PART, op, item, item.kv_start);
    copy_async_commit();

    const u32 first_row = warp * (16 * S::M_TILES);
    const bool is_active = first_row < item.n_queries;
    // Rows past the last query are computed as if they were the last one, and not written.
    auto position_of = [&](u32 row) { return op.position(item, min(row, item.n_queries - 1)); };
    const u32 first_position = position_of(first_row), last_position = position_of(first_row + 16 * S::M_TILES - 1);
    u32 positions[S::M_TILES][2];
    f32 maximum[S::M_TILES][2], sum[S::M_TILES][2], values[S::M_TILES][D / 8][4];
#pragma unroll
    for (u32 m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            positions[m][r] = position_of(first_row + m * 16 + g + r * 8);
            maximum[m][r] = -BATON_INFINITY;
            sum[m][r] = 0.0f;
        }
#pragma unroll
        for (u32 n = 0; n < D / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) values[m][n][i] = 0.0f;
    }

    const u32 n_tiles = (item.kv_end - item.kv_start + S::KEYS - 1) / S::KEYS;
    for (u32 tile = 0; tile < n_tiles; tile++) {
        const u32 first = item.kv_start + tile * S::KEYS;
        if (tile + 1 < n_tiles) {
            T* next = stages + (tile + 1) % 2 * (2 * PART);
            load_tile<T, D>(next, next + PART, op, item, first + S::KEYS);
        }
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        const T* key = stages + tile % 2 * (2 * PART);
        const T* value = key + PART;
        const bool any_is_seen =
            is_active && first <= last_position && (op.window == 0 || first + S::KEYS - 1 + op.window > first_position);
        if (any_is_seen) {
            f32 score[S::M_TILES][S::KEYS / 8][4] = {};
#pragma unroll
            for (u32 k = 0; k < D / 16; k++) {
                u32 q[S::M_TILES][4];
#pragma unroll
                for (u32 m = 0; m < S::M_TILES; m++) load_a(q[m], shared, S::STRIDE, first_row + m * 16, k * 16);
#pragma unroll
                for (u32 n = 0; n < S::KEYS / 16; n++) {
                    u32 b[4];
                    load_b(b, key, S::STRIDE, n * 16, k * 16);
#pragma unroll
                    for (u32 m = 0; m < S::M_TILES; m++) {
                        mma<T>(score[m][2 * n], q[m], b[0], b[1]);
                        mma<T>(score[m][2 * n + 1], q[m], b[2], b[3]);
                    }
                }
            }
            const bool all_is_seen = first + S::KEYS <= item.kv_end && first + S::KEYS - 1 <= first_position &&
                                     (op.window == 0 || last_position - first < op.window);
#pragma unroll
            for (u32 m = 0; m < S::M_TILES; m++) {
                f32 rescale[2];
                softmax_step<S::KEYS>(score[m], maximum[m], sum[m], rescale, op, positions[m], first, item.kv_end, all_is_seen);
#pragma unroll
                for (u32 n = 0; n < D / 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) values[m][n][i] *= rescale[i / 2];
            }
#pragma unroll
            for (u32 k = 0; k < S::KEYS / 16; k++) {
                u32 weights[S::M_TILES][4];
#pragma unroll
                for (u32 m = 0; m < S::M_TILES; m++) pack_weights<T>(weights[m], score[m][2 * k], score[m][2 * k + 1]);
#pragma unroll
                for (u32 n = 0; n < D / 16; n++) {
                    u32 b[4];
                    load_b_transposed(b, value, S::STRIDE, k * 16, n * 16);
#pragma unroll
                    for (u32 m = 0; m < S::M_TILES; m++) {
                        mma<T>(values[m][2 * n], weights[m], b[0], b[1]);
                        mma<T>(values[m][2 * n + 1], weights[m], b[2], b[3]);
                    }
                }
            }
        }
        // The next turn copies over this stage.
        __syncthreads();
    }
    copy_async_wait<0>();

    const bool is_whole = item.partial == NONE;
#pragma unroll
    for (u32 m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            f32 total = sum[m][r];
            total += __shfl_xor_sync(ALL_LANES, total, 1);
            total += __shfl_xor_sync(ALL_LANES, total, 2);
            const u32 query = first_row + m * 16 + g + r * 8;
            if (query >= item.n_queries) continue;
            if (is_whole) {
                const f32 factor = finishing_factor(maximum[m][r], total, op.sinks, op.head(item, query));
                T* result = op.result(item, query) + 2 * t;
#pragma unroll
                for (u32 n = 0; n < D / 8; n++)
                    *reinterpret_cast<u32*>(result + n * 8) =
                        pack2<T>(values[m][n][2 * r] * factor, values[m][n][2 * r + 1] * factor);
            } else {
                const u64 partial_row = static_cast<u64>(item.partial) + query;
                f32* result = op.partial_out + partial_row * D + 2 * t;
#pragma unroll
                for (u32 n = 0; n < D / 8; n++) {
                    result[n * 8] = values[m][n][2 * r];
                    result[n * 8 + 1] = values[m][n][2 * r + 1];
                }
                if (t == 0) {
                    op.partial_stats[2 * partial_row] = maximum[m][r];
                    op.partial_stats[2 * partial_row + 1] = total;
                }
            }
        }
    }
}

#define INSTANCE_OF(T, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(N_THREADS) attention_prefill_##T##_d##D(ATTENTION_PARAMETERS(T)) {          \
        attention_prefill<T, D>(ATTENTION_OPERANDS);                                                                       \
    }                                                                                                                      \
    BATON_EXPORT(attention_prefill_##T##_d##D)
#define INSTANCE(D) INSTANCE_OF(bf16, D) INSTANCE_OF(f16, D)

FOR_HEAD_DIMS(INSTANCE)
