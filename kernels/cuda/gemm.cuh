// A tile of out = x w^T, x [m, k] and w [n, k] row major: on tensor cores for bf16 and f16, by fused multiply-adds for f32 and
// for rows that are no whole 16-byte chunks. k is never split: an element of out is one chain of additions in ascending k,
// the same whatever the tile and the other rows.
#pragma once
#include "tiles.cuh"

// Rows and columns of a CTA's tile, elements of k a stage, and how warps divide the tile.
template <u32 ROWS_, u32 COLS_, u32 DEPTH_, u32 WARPS_M_, u32 WARPS_N_, u32 STAGES_> struct Tiling {
    static constexpr u32 ROWS = ROWS_, COLS = COLS_, DEPTH = DEPTH_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
    static constexpr u32 N_THREADS = WARP * WARPS_M * WARPS_N;
    static constexpr u32 STRIDE = DEPTH + ROW_PADDING;
    static constexpr u32 M_TILES = ROWS / WARPS_M / 16, N_TILES = COLS / WARPS_N / 16;
    static constexpr u32 CHUNKS = DEPTH / 8;
    static constexpr u32 X_COPIES = ROWS * CHUNKS / N_THREADS, W_COPIES = COLS * CHUNKS / N_THREADS;
    static_assert(X_COPIES * N_THREADS == ROWS * CHUNKS && W_COPIES * N_THREADS == COLS * CHUNKS, "copies divide evenly");
};

// The products of rows row_of(0..ROWS) (null: no such row) with rows first_col.. of the weight, given to put(row, column, product).
// k is a multiple of 8.
template <typename T, typename Tile, typename RowOf, typename Put>
__device__ __forceinline__ void tensor_core_tile(const T* weight, u32 first_col, u32 n, u32 k, RowOf row_of, Put put) {
    BATON_DYNAMIC_SHARED(T, shared);    // [STAGES, ROWS + COLS, STRIDE]
    constexpr u32 STAGE = (Tile::ROWS + Tile::COLS) * Tile::STRIDE;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 warp_row = warp / Tile::WARPS_N * (16 * Tile::M_TILES), warp_col = warp % Tile::WARPS_N * (16 * Tile::N_TILES);
    const u32 column = threadIdx.x % Tile::CHUNKS * 8, copy_row = threadIdx.x / Tile::CHUNKS;
    constexpr u32 ROWS_A_COPY = Tile::N_THREADS / Tile::CHUNKS;

    const T* x_rows[Tile::X_COPIES];
#pragma unroll
    for (u32 i = 0; i < Tile::X_COPIES; i++) x_rows[i] = row_of(copy_row + i * ROWS_A_COPY);

    const u32 n_steps = (k + Tile::DEPTH - 1) / Tile::DEPTH;
    auto load = [&](u32 step) {
        if (step < n_steps) {
            T* stage = shared + step % Tile::STAGES * STAGE;
            const u32 from = step * Tile::DEPTH + column;
#pragma unroll
            for (u32 i = 0; i < Tile::X_COPIES; i++) {
                const bool is_there = x_rows[i] != nullptr && from < k;
                copy_async(stage + (copy_row + i * ROWS_A_COPY) * Tile::STRIDE + column, is_there ? x_rows[i] + from : weight, is_there);
            }
#pragma unroll
            for (u32 i = 0; i < Tile::W_COPIES; i++) {
                const u32 row = copy_row + i * ROWS_A_COPY;
                const bool is_there = first_col + row < n && from < k;
                const T* w = is_there ? weight + static_cast<u64>(first_col + row) * k + from : weight;
                copy_async(stage + (Tile::ROWS + row) * Tile::STRIDE + column, w, is_there);
            }
        }
        copy_async_commit();
    };

    f32 sums[Tile::M_TILES][2 * Tile::N_TILES][4] = {};
    for (u32 step = 0; step + 1 < Tile::STAGES; step++) load(step);
    for (u32 step = 0; step < n_steps; step++) {
        copy_async_wait<Tile::STAGES - 2>();
        // Everyone's copies for this step are in, and everyone has left the stage that is copied over next.
        __syncthreads();
        load(step + Tile::STAGES - 1);
        const T* x = shared + step % Tile::STAGES * STAGE;
        const T* w = x + Tile::ROWS * Tile::STRIDE;
#pragma unroll
        for (u32 i = 0; i < Tile::DEPTH / 16; i++) {
            u32 a[Tile::M_TILES][4];
#pragma unroll
            for (u32 m = 0; m < Tile::M_TILES; m++) load_a(a[m], x, Tile::STRIDE, warp_row + m * 16, i * 16);
#pragma unroll
            for (u32 c = 0; c < Tile::N_TILES; c++) {
                u32 b[4];
                load_b(b, w, Tile::STRIDE, warp_col + c * 16, i * 16);
#pragma unroll
                for (u32 m = 0; m < Tile::M_TILES; m++) {
                    mma<T>(sums[m][2 * c], a[m], b[0], b[1]);
                    mma<T>(sums[m][2 * c + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 m = 0; m < Tile::M_TILES; m++)
#pragma unroll
        for (u32 c = 0; c < 2 * Tile::N_TILES; c++)
#pragma unroll
            for (u32 i = 0; i < 4; i += 2)
                put(warp_row + m * 16 + lane / 4 + i / 2 * 8, first_col + warp_col + c * 8 + lane % 4 * 2, sums[m][c][i], sums[m][c][i + 1]);
}

// The same without tensor cores: 64 columns a turn, each of 256 threads 4 x 4 elements that stand 16 apart (of 128, 8 x 4).
constexpr u32 SCALAR_TILE = 64, SCALAR_DEPTH = 16;

template <typename T, u32 ROWS, u32 COLS, u32 N_THREADS, typename RowOf, typename Put>
__device__ __forceinline__ void scalar_tile(const T* weight, u32 first_col, u32 n, u32 k, RowOf row_of, Put put) {
    BATON_DYNAMIC_SHARED(f32, shared);    // x, then w: [SCALAR_DEPTH, SCALAR_TILE + 1]
    constexpr u32 SCALAR_STRIDE = SCALAR_TILE + 1;
    f32 *x_tile = shared, *w_tile = shared + SCALAR_DEPTH * SCALAR_STRIDE;
    constexpr u32 STEP = N_THREADS / 16, PER_THREAD = SCALAR_TILE / STEP;
    const u32 down = threadIdx.x / 16, across = threadIdx.x % 16;
    for (u32 top = 0; top < ROWS; top += SCALAR_TILE) {
        for (u32 left = 0; left < COLS; left += SCALAR_TILE) {
            f32 sums[PER_THREAD][4] = {};
            for (u32 from = 0; from < k; from += SCALAR_DEPTH) {
                __syncthreads();
                for (u32 i = threadIdx.x; i < SCALAR_TILE * SCALAR_DEPTH; i += blockDim.x) {
                    const u32 row = i / SCALAR_DEPTH, column = i % SCALAR_DEPTH;
                    const T* x = top + row < ROWS ? row_of(top + row) : nullptr;
                    const bool has_weight = left + row < COLS && first_col + left + row < n && from + column < k;
                    x_tile[column * SCALAR_STRIDE + row] = x != nullptr && from + column < k ? to_f32(x[from + column]) : 0.0f;
                    w_tile[column * SCALAR_STRIDE + row] =
                        has_weight ? to_f32(weight[static_cast<u64>(first_col + left + row) * k + from + column]) : 0.0f;
                }
                __syncthreads();
                // Zeros beyond k add nothing: x + 0 * 0 is x.
                for (u32 i = 0; i < SCALAR_DEPTH; i++)
#pragma unroll
                    for (u32 a = 0; a < PER_THREAD; a++)
#pragma unroll
                        for (u32 b = 0; b < 4; b++) sums[a][b] += x_tile[i * SCALAR_STRIDE + down + STEP * a] * w_tile[i * SCALAR_STRIDE + across + 16 * b];
            }
#pragma unroll
            for (u32 a = 0; a < PER_THREAD; a++)
#pragma unroll
                for (u32 b = 0; b < 4; b++)
                    if (top + down + STEP * a < ROWS && left + across + 16 * b < COLS)
                        put(top + down + STEP * a, first_col + left + across + 16 * b, sums[a][b]);
        }
    }
}
