// What sampling and log-probabilities share: one CTA on one row of logits. Weights, sums and orders are those of the CPU's
// sampler (engine/src/sampler), operation by operation, so equal logits give equal bits.
#pragma once
#include "prelude.cuh"

constexpr u32 N_THREADS = 512;
constexpr u32 CHUNK = 256;           // tokens whose weights are summed on their own
constexpr u32 MAX_CANDIDATES = 256;  // tokens that are put in order for top_k, and tried first for top_p
constexpr u32 N_BANDS = 1024;        // of nearly equal logits, for a wider nucleus; and tokens of one band that are put in order

// Shared memory of a row.
struct RowScratch {
    u64 candidates[N_BANDS];
    f32 weights[N_BANDS];
    u32 counts[256];
    u64 prefix;        // of the radix selection: digits settled so far
    u32 wanted;        // of the tokens with this prefix
    u32 is_settled;
    u32 n_candidates;
    u32 warp_u32[N_THREADS / WARP];
    f32 warp_f32[N_THREADS / WARP];
    double total;
    u32 chosen;
    u32 chunk;
    double before;
};

// e^x for x <= 0, 0 below -87: `exp` of engine/src/sampler/weights.rs. Each operation rounds by itself; none may be fused.
__device__ __forceinline__ f32 weight_exp(f32 x) {
    constexpr f32 ROUND = 12582912.0f;    // 1.5 * 2^23
    const f32 clamped = x > -87.0f ? x : -87.0f;
    const f32 shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504088896340736f), ROUND);
    const f32 n = __fsub_rn(shifted, ROUND);
    const f32 r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    f32 polynomial = 1.0f / 5040.0f;
    constexpr f32 COEFFICIENTS[7] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
#pragma unroll
    for (u32 i = 0; i < 7; i++) polynomial = __fadd_rn(__fmul_rn(polynomial, r), COEFFICIENTS[i]);
    const f32 scale = __uint_as_float((__float_as_uint(shifted) - __float_as_uint(ROUND) + 127u) << 23);
    return x > -87.0f ? __fmul_rn(polynomial, scale) : 0.0f;
}

// One row's distribution. `min_p` rules tokens out whose weight is below it.
struct Row {
    const f32* logits;    // [vocab]
    u32 vocab;
    f32 maximum, inverse_temperature, min_p;
    u32 n_bands;    // only tokens of the first so many bands have a weight; NONE: all

    __device__ __forceinline__ f32 weight_of(f32 logit) const {
        return weight_exp(__fmul_rn(__fsub_rn(logit, maximum), inverse_temperature));
    }
    __device__ __forceinline__ f32 kept_logit(u32 id) const {
        const f32 logit = logits[id];
        return min_p > 0.0f && weight_of(logit) < min_p ? -BATON_INFINITY : logit;
    }
    __device__ __forceinline__ f32 kept_weight(u32 id) const {
        const f32 weight = weight_of(logits[id]);
        return weight < min_p || (n_bands != NONE && band_of(logits[id]) >= n_bands) ? 0.0f : weight;
    }
    // Sixteen bands to the factor e; the last holds all that is further away.
    __device__ __forceinline__ u32 band_of(f32 logit) const {
        const f32 band = __fmul_rn(__fsub_rn(maximum, logit), __fmul_rn(inverse_temperature, 16.0f));
        return band < static_cast<f32>(N_BANDS) ? static_cast<u32>(band) : N_BANDS - 1;
    }
};

// The order of a distribution as one number: larger logit first, then smaller id. +0 counts as larger than -0.
__device__ __forceinline__ u64 order_of(f32 logit, u32 id) {
    const u32 bits = __float_as_uint(logit);
    const u32 key = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(key) << 32 | (NONE - id);
}
__device__ __forceinline__ u32 id_of(u64 order) { return NONE - static_cast<u32>(order); }

enum RowState : u32 { FINE = 0, NOT_FINITE = 1, NO_CANDIDATE = 2, LEFT_TO_HOST = 3 };

// Largest logit and the smallest id that has it, the same in all threads.
__device__ __forceinline__ RowState find_largest(const f32* logits, u32 vocab, RowScratch& scratch, f32& maximum, u32& id) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    f32 best = -BATON_INFINITY;
    u32 best_id = NONE;
    int is_broken = 0;
    for (u32 i = threadIdx.x; i < vocab; i += N_THREADS) {
        const f32 x = logits[i];
        is_broken |= x != x || x == BATON_INFINITY;
        if (x > best) best = x, best_id = i;
    }
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) {
        const f32 other = __shfl_xor_sync(ALL_LANES, best, offset);
        const u32 other_id = __shfl_xor_sync(ALL_LANES, best_id, offset);
        if (other > best || (other == best && other_id < best_id)) best = other, best_id = other_id;
    }
    if (lane == 0) scratch.warp_f32[warp] = best, scratch.warp_u32[warp] = best_id;
    is_broken = __syncthreads_or(is_broken);
    for (u32 i = 0; i < N_THREADS / WARP; i++) {
        const f32 other = scratch.warp_f32[i];
        if (other > best || (other == best && scratch.warp_u32[i] < best_id)) best = other, best_id = scratch.warp_u32[i];
    }
    __syncthreads();
    maximum = best;
    id = best_id;
    return is_broken ? NOT_FINITE : best_id == NONE ? NO_CANDIDATE : FINE;
}

// Sums of the weights of each chunk, 8 threads a chunk, and their sum in order. chunk_sums: [vocab / CHUNK rounded up] in shared memory.
__device__ __forceinline__ double sum_weights(const Row& row, RowScratch& scratch, double* chunk_sums) {
    const u32 n_chunks = (row.vocab + CHUNK - 1) / CHUNK, lane = threadIdx.x % 8;
    for (u32 first = 0; first < n_chunks; first += N_THREADS / 8) {
        const u32 chunk = first + threadIdx.x / 8, end = min((chunk + 1) * CHUNK, row.vocab);
        double sum = 0.0;
        for (u32 i = chunk * CHUNK + lane; i < end; i += 8) sum = __dadd_rn(sum, static_cast<double>(row.kept_weight(i)));
        double total = 0.0;
        for (u32 i = 0; i < 8; i++) total = __dadd_rn(total, __shfl_sync(ALL_LANES, sum, threadIdx.x % WARP / 8 * 8 + i));
        if (lane == 0 && chunk < n_chunks) chunk_sums[chunk] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (u32 i = 0; i < n_chunks; i++) total = __dadd_rn(total, chunk_sums[i]);
        scratch.total = total;
    }
    __syncthreads();
    return scratch.total;
}

// A bitonic sort of n numbers, a power of two.
__device__ __forceinline__ void sort_descending(u64* x, u32 n) {
    for (u32 size = 2; size <= n; size *= 2) {
        for (u32 distance = size / 2; distance > 0; distance /= 2) {
            for (u32 i = threadIdx.x; i < n; i += N_THREADS) {
                const u32 other = i ^ distance;
                if (other < i) continue;
                const u64 a = x[i], b = x[other];
                if ((a < b) == ((i & size) == 0)) x[i] = b, x[other] = a;
            }
            __syncthreads();
        }
    }
}

// Leaves the `n` first tokens of the distribution (n at most MAX_CANDIDATES and the vocabulary) in scratch.candidates, in order.
// Radix selection of the n-th, 8 bits a pass over logit, then id; then a bitonic sort of those that are not behind it.
__device__ __forceinline__ void select_first(const Row& row, RowScratch& scratch, u32 n) {
    if (threadIdx.x == 0) scratch.prefix = 0, scratch.wanted = n, scratch.is_settled = 0, scratch.n_candidates = 0;
    u32 shift = 64;
    while (shift > 0) {
        shift -= 8;
        for (u32 i = threadIdx.x; i < 256; i += N_THREADS) scratch.counts[i] = 0;
        __syncthreads();
        const u64 prefix = scratch.prefix;
        for (u32 i = threadIdx.x; i < row.vocab; i += N_THREADS) {
            const u64 order = order_of(row.kept_logit(i), i);
            if (shift == 56 || order >> (shift + 8) == prefix) atomicAdd(&scratch.counts[order >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 digit = 255;
            while (scratch.counts[digit] < scratch.wanted) scratch.wanted -= scratch.counts[digit--];
            scratch.prefix = prefix << 8 | digit;
            scratch.is_settled = scratch.counts[digit] == scratch.wanted;
        }
        __syncthreads();
        if (scratch.is_settled) break;
    }
    const u64 prefix = scratch.prefix;
    for (u32 i = threadIdx.x; i < MAX_CANDIDATES; i += N_THREADS) scratch.candidates[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.vocab; i += N_THREADS) {
        const u64 order = order_of(row.kept_logit(i), i);
        if (order >> shift >= prefix) scratch.candidates[atomicAdd(&scratch.n_candidates, 1u)] = order;
    }
    __syncthreads();
    sort_descending(scratch.candidates, MAX_CANDIDATES);
}
