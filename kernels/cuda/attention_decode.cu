// Paged attention of sequences with one new token: all query heads of a KV head are the rows of one tensor-core tile, so K
// and V are read once for the group. head_dim 64 to 256, window, soft cap, sinks.
//
// Split: an item is up to 16 packed queries over a range of tokens cut by the host's plan; its warps take tiles of 16 tokens
// in turn and join their states at the end. A warp copies its tiles for itself, STAGES of them under way (cp.async, 16 bytes
// a lane, whole rows), so the loop has no barrier wider than a warp. With 16 tokens a block, a tile's K is one run of
// 16 * head_dim * 2 bytes. S = Q K^T and P V are mma.m16n8k16.
// Bound: bytes, 4 * head_dim a token and KV head. Rows of the tile beyond the group are waste that the tensor cores have to spare.
// Bits: depend on where the plan cuts; deterministic mode uses attention_prefill instead.
// Versions: two (docs/kernels.md). Not measured yet, no card.
#include "attention.cuh"

constexpr u32 TILE = 16;    // tokens of a warp's tile, and packed queries of an item

template <u32 D> struct Shape {
    static constexpr u32 N_WARPS = D <= 128 ? 4 : 2;
    static constexpr u32 STAGES = D <= 64 ? 4 : D <= 96 ? 3 : 2;
    static constexpr u32 STRIDE = D + ROW_PADDING;
    static constexpr u32 STAGE_ELEMENTS = 2 * TILE * STRIDE;    // K, then V
};

// Copies a tile's K and V rows; tokens from `end` on become zeros.
template <typename T, u32 D>
__device__ __forceinline__ void load_tile(T* stage, const Attention<T>& op, const Item& item, u32 first, u32 block_of_first) {
    constexpr u32 CHUNKS = D / 8;
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = lane; i < TILE * CHUNKS; i += WARP) {
        const u32 row = i / CHUNKS, column = i % CHUNKS * 8, token = first + row;
        const bool is_there = token < item.kv_end;
        u32 block = block_of_first;
        if (op.block_shift < 4) block = is_there ? op.block_tables[item.first_block + (token >> op.block_shift)] : 0;
        const u64 offset = is_there ? op.kv_offset(item, block, token) + column : 0;
        T* to = stage + row * Shape<D>::STRIDE + column;
        copy_async(to, op.key + offset, is_there);
        copy_async(to + TILE * Shape<D>::STRIDE, op.value + offset, is_there);
    }
}

template <typename T, u32 D> __device__ __forceinline__ void attention_decode(const Attention<T>& op) {
    using S = Shape<D>;
    const Item item = op.items[blockIdx.x];
    if (item.n_queries == 0) return;
    BATON_DYNAMIC_SHARED(T, shared);    // [N_WARPS, STAGES, (K, V), TILE, STRIDE]; at the end f32 [N_WARPS, TILE, D + 2]
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    T* stages = shared + warp * S::STAGES * S::STAGE_ELEMENTS;

    const u32 n_tiles = (item.kv_end - item.kv_start + TILE - 1) / TILE;
    const u32 n_mine = n_tiles > warp ? (n_tiles - warp + S::N_WARPS - 1) / S::N_WARPS : 0;
    const u32 first_mine = item.kv_start + warp * TILE;
    auto block_of = [&](u32 tile) {
        const u32 token = first_mine + tile * (S::N_WARPS * TILE);
        return tile < n_mine ? op.block_tables[item.first_block + (token >> op.block_shift)] : 0;
    };
    // The id of the next tile's block is asked for one tile early: a copy must not wait for the table.
    u32 next_block = block_of(0);
    auto load = [&](u32 tile) {
        const u32 block = next_block;
        next_block = block_of(tile + 1);
        if (tile < n_mine)
            load_tile<T, D>(stages + tile % S::STAGES * S::STAGE_ELEMENTS, op, item, first_mine + tile * (S::N_WARPS * TILE), block);
        copy_async_commit();
    };
    for (u32 tile = 0; tile + 1 < S::STAGES; tile++) load(tile);

    // Q as A fragments, read from global once: rows g and g + 8.
    u32 q[D / 16][4];
    const u32 rows[2] = {g, g + 8};
    u32 positions[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const bool is_there = rows[r] < item.n_queries;
        const T* from = op.query(item, is_there ? rows[r] : 0);
        positions[r] = op.position(item, is_there ? rows[r] : 0);
#pragma unroll
        for (u32 k = 0; k < D / 16; k++) {
            q[k][r] = is_there ? *reinterpret_cast<const u32*>(from + k * 16 + 2 * t) : 0;
            q[k][r + 2] = is_there ? *reinterpret_cast<const u32*>(from + k * 16 + 8 + 2 * t) : 0;
        }
    }

    f32 maximum[2] = {-BATON_INFINITY, -BATON_INFINITY}, sum[2] = {0.0f, 0.0f}, values[D / 8][4];
#pragma unroll
    for (u32 n = 0; n < D / 8; n++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) values[n][i] = 0.0f;

    for (u32 tile = 0; tile < n_mine; tile++) {
        load(tile + S::STAGES - 1);
        copy_async_wait<S::STAGES - 1>();
        __syncwarp();
        const T* key = stages + tile % S::STAGES * S::STAGE_ELEMENTS;
        const T* value = key + TILE * S::STRIDE;

        f32 score[2][4] = {};
#pragma unroll
        for (u32 k = 0; k < D / 16; k++) {
            u32 b[4];
            load_b(b, key, S::STRIDE, 0, k * 16);
            mma<T>(score[0], q[k], b[0], b[1]);
            mma<T>(score[1], q[k], b[2], b[3]);
        }

        const u32 first = first_mine + tile * (S::N_WARPS * TILE);
        const bool all_is_seen = first + TILE <= item.kv_end && op.window == 0 && first + TILE <= item.start_pos + 1;
        f32 rescale[2];
        softmax_step<TILE>(score, maximum, sum, rescale, op, positions, first, item.kv_end, all_is_seen);
        u32 weights[4];
        pack_weights<T>(weights, score[0], score[1]);
#pragma unroll
        for (u32 n = 0; n < D / 16; n++) {
            u32 b[4];
            load_b_transposed(b, value, S::STRIDE, 0, n * 16);
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                f32(&c)[4] = values[2 * n + half];
                c[0] *= rescale[0];
                c[1] *= rescale[0];
                c[2] *= rescale[1];
                c[3] *= rescale[1];
                mma<T>(c, weights, b[2 * half], b[2 * half + 1]);
            }
        }
        // All lanes have read the stage before any of them copies over it.
        __syncwarp();
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 1);
        sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 2);
    }

    // The warps' states meet in shared memory, over the stages.
    f32* states = reinterpret_cast<f32*>(shared);
    constexpr u32 STATE = D + 2;
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        f32* state = states + (warp * TILE + rows[r]) * STATE;
        if (t == 0) {
            state[D] = maximum[r];
            state[D + 1] = sum[r];
        }
#pragma unroll
        for (u32 n = 0; n < D / 8; n++) {
            state[n * 8 + 2 * t] = values[n][2 * r];
            state[n * 8 + 2 * t + 1] = values[n][2 * r + 1];
        }
    }
    __syncthreads();
    for (u32 query = warp; query < item.n_queries; query += S::N_WARPS) {
        const f32* state = states + query * STATE;
        f32 top = -BATON_INFINITY;
#pragma unroll
        for (u32 w = 0; w < S::N_WARPS; w++) top = fmaxf(top, state[w * TILE * STATE + D]);
        const f32 reference = reference_of(top);
        f32 total = 0.0f, weight[S::N_WARPS];
#pragma unroll
        for (u32 w = 0; w < S::N_WARPS; w++) {
            weight[w] = exp2_approx(state[w * TILE * STATE + D] - reference);
            total += weight[w] * state[w * TILE * STATE + D + 1];
        }
        const bool is_whole = item.partial == NONE;
        const f32 factor = is_whole ? finishing_factor(top, total, op.sinks, op.head(item, query)) : 1.0f;
        const u64 partial_row = static_cast<u64>(item.partial) + query;
        T* result = op.result(item, query);
        for (u32 dim = lane; dim < D; dim += WARP) {
            f32 x = 0.0f;
#pragma unroll
            for (u32 w = 0; w < S::N_WARPS; w++) x += weight[w] * state[w * TILE * STATE + dim];
            if (is_whole)
                result[dim] = from_f32<T>(x * factor);
            else
                op.partial_out[partial_row * D + dim] = x;
        }
        if (!is_whole && lane == 0) {
            op.partial_stats[2 * partial_row] = top;
            op.partial_stats[2 * partial_row + 1] = total;
        }
    }
}

#define INSTANCE_OF(T, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * Shape<D>::N_WARPS) attention_decode_##T##_d##D(ATTENTION_PARAMETERS(T)) { \
        attention_decode<T, D>(ATTENTION_OPERANDS);                                                                        \
    }                                                                                                                      \
    BATON_EXPORT(attention_decode_##T##_d##D)
#define INSTANCE(D) INSTANCE_OF(bf16, D) INSTANCE_OF(f16, D)

FOR_HEAD_DIMS(INSTANCE)
