// The next token of each row of logits: greedy, or one draw after min_p, top_k and top_p. Philox over (seed, choice, index) as
// on the CPU; with equal logits the same token as engine/src/sampler, bit for bit.
//
// Split: a CTA a row. Two passes for a draw from the whole vocabulary, three to six more to put candidates in order, all from
// L2; sums run in the CPU's order, part of them on one thread. Bound: latency; bytes, vocab * 4 a row, with many rows.
// A nucleus wider than 256 tokens is cut at a band of nearly equal logits, and only that band is put in order, as on the CPU;
// the bands' masses are sums of integers, so no order of threads shows in them (2^-45 of the largest weight is dropped a token).
// A band of more than 1,024 tokens, or a top_k beyond 256, is left to the host (status 3). Masks and penalties are applied
// to the logits before.
// Versions: one. Not measured yet, no card.
#include "sampling.cuh"

// 32 bytes, as `sampling.rs` has it.
struct Sampling {
    u64 seed;
    u32 index, choice;    // of the token, and which of a request's choices
    f32 temperature;      // 0: greedy
    f32 min_p;            // 0: off
    f32 top_p;            // 1 or more: off
    u32 top_k;            // 0: off
};

// Philox4x32-10 (Salmon et al., SC 2011): a uniform number in [0, 1) with 53 random bits.
__device__ __forceinline__ double uniform(u64 key, u32 counter_0, u32 counter_1) {
    u32 key_0 = static_cast<u32>(key), key_1 = static_cast<u32>(key >> 32);
    u32 word[4] = {counter_0, counter_1, 0, 0};
    for (u32 round = 0; round < 10; round++) {
        const u64 product_0 = static_cast<u64>(0xd2511f53u) * word[0], product_1 = static_cast<u64>(0xcd9e8d57u) * word[2];
        const u32 next[4] = {static_cast<u32>(product_1 >> 32) ^ word[1] ^ key_0, static_cast<u32>(product_1),
                             static_cast<u32>(product_0 >> 32) ^ word[3] ^ key_1, static_cast<u32>(product_0)};
        for (u32 i = 0; i < 4; i++) word[i] = next[i];
        key_0 += 0x9e3779b9u;
        key_1 += 0xbb67ae85u;
    }
    const u64 bits = (static_cast<u64>(word[0]) << 32 | word[1]) >> 11;
    return __dmul_rn(static_cast<double>(bits), 1.0 / 9007199254740992.0);
}

// The first token whose running sum exceeds `mark`, over the whole vocabulary in order of ids.
__device__ __forceinline__ u32 draw_from_all(const Row& row, RowScratch& scratch, const double* chunk_sums, double mark) {
    const u32 n_chunks = (row.vocab + CHUNK - 1) / CHUNK;
    if (threadIdx.x == 0) scratch.before = 0.0, scratch.chunk = 0, scratch.chosen = NONE;
    for (;;) {
        if (threadIdx.x == 0) {
            double before = scratch.before;
            u32 chunk = scratch.chunk;
            while (chunk < n_chunks && !(__dadd_rn(before, chunk_sums[chunk]) > mark)) before = __dadd_rn(before, chunk_sums[chunk++]);
            scratch.before = before;
            scratch.chunk = chunk;
        }
        __syncthreads();
        const u32 chunk = scratch.chunk;
        if (chunk == n_chunks) break;
        const u32 first = chunk * CHUNK, n = min(CHUNK, row.vocab - first);
        for (u32 i = threadIdx.x; i < n; i += N_THREADS) scratch.weights[i] = row.kept_weight(first + i);
        __syncthreads();
        if (threadIdx.x == 0) {
            double before = scratch.before;
            u32 last_positive = NONE, i = 0;
            for (; i < n; i++) {
                before = __dadd_rn(before, static_cast<double>(scratch.weights[i]));
                if (scratch.weights[i] > 0.0f) last_positive = i;
                if (before > mark) break;
            }
            // The chunk's sum may have been rounded up past the mark: its last token with any weight.
            if (i < n)
                scratch.chosen = first + i;
            else if (last_positive != NONE)
                scratch.chosen = first + last_positive;
            scratch.before = before;
            scratch.chunk = chunk + 1;
        }
        __syncthreads();
        if (scratch.chosen != NONE) return scratch.chosen;
    }
    // Only rounding leads here: the last token with any weight.
    if (threadIdx.x == 0) {
        u32 id = row.vocab;
        while (id > 1 && !(row.kept_weight(id - 1) > 0.0f)) id--;
        scratch.chosen = id - 1;
    }
    __syncthreads();
    return scratch.chosen;
}

// Weights of the first n candidates into scratch.weights.
__device__ __forceinline__ void weigh_candidates(const Row& row, RowScratch& scratch, u32 n) {
    for (u32 i = threadIdx.x; i < n; i += N_THREADS) {
        const u32 id = id_of(scratch.candidates[i]);
        scratch.weights[i] = row.weight_of(row.kept_logit(id));
    }
    __syncthreads();
}

// How many leading weights reach `target`, at least one, and their sum. By one thread.
__device__ __forceinline__ u32 nucleus(const f32* weights, u32 n, double target, double& mass) {
    mass = 0.0;
    for (u32 i = 0; i < n; i++) {
        if (mass >= target && i > 0) return i;
        mass = __dadd_rn(mass, static_cast<double>(weights[i]));
    }
    return n;
}

// The first of at most CHUNK weights whose running sum exceeds `mark`; the last with any weight if rounding leaves none. By one thread.
__device__ __forceinline__ u32 position_at(const f32* weights, u32 n, double mark) {
    double lanes[8] = {};
    for (u32 first = 0; first < n; first += 8)
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            if (first + i < n) lanes[i] = __dadd_rn(lanes[i], static_cast<double>(weights[first + i]));
    double mass = 0.0;
    for (u32 i = 0; i < 8; i++) mass = __dadd_rn(mass, lanes[i]);
    if (mass > mark) {
        double before = 0.0;
        for (u32 i = 0; i < n; i++) {
            before = __dadd_rn(before, static_cast<double>(weights[i]));
            if (before > mark) return i;
        }
    }
    u32 last = n;
    while (last > 1 && !(weights[last - 1] > 0.0f)) last--;
    return last - 1;
}

// The token of a nucleus of many tokens, or NONE: whole bands in order of ids, then the band in which the mass reaches `target`
// in the distribution's order.
__device__ __forceinline__ u32 draw_from_wide_nucleus(Row row, RowScratch& scratch, double* chunk_sums, double target, double u) {
    constexpr double UNIT = 1.0 / 35184372088832.0;    // 2^-45: the masses of 2^18 tokens stay below 2^63
    u64* bands = scratch.candidates;
    for (u32 i = threadIdx.x; i < N_BANDS; i += N_THREADS) bands[i] = 0;
    if (threadIdx.x == 0) scratch.n_candidates = 0, scratch.chosen = NONE;
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.vocab; i += N_THREADS) {
        const f32 logit = row.kept_logit(i);
        const u64 mass = static_cast<u64>(row.weight_of(logit) * 35184372088832.0f);
        if (mass != 0) atomicAdd(&bands[row.band_of(logit)], mass);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 whole = 0;
        u32 band = 0;
        while (band + 1 < N_BANDS && __dmul_rn(static_cast<double>(whole + bands[band]), UNIT) < target) whole += bands[band++];
        scratch.before = __dmul_rn(static_cast<double>(whole), UNIT);
        scratch.chunk = band;
    }
    __syncthreads();
    const u32 cut_band = scratch.chunk;
    const double whole_mass = scratch.before;
    for (u32 i = threadIdx.x; i < N_BANDS; i += N_THREADS) bands[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.vocab; i += N_THREADS) {
        const f32 logit = row.kept_logit(i);
        if (row.band_of(logit) != cut_band) continue;
        const u32 place = atomicAdd(&scratch.n_candidates, 1u);
        if (place < N_BANDS) scratch.candidates[place] = order_of(logit, i);
    }
    __syncthreads();
    const u32 n = scratch.n_candidates;
    if (n == 0 || n > N_BANDS) return NONE;
    sort_descending(scratch.candidates, N_BANDS);
    weigh_candidates(row, scratch, n);
    if (threadIdx.x == 0) {
        double cut_mass;
        const u32 n_kept = nucleus(scratch.weights, n, target - whole_mass, cut_mass);
        const double mark = __dmul_rn(u, __dadd_rn(whole_mass, cut_mass));
        scratch.total = mark;
        if (mark >= whole_mass) {
            double before = whole_mass;
            u32 place = 0, last = 0;
            for (; place < n_kept; place++) {
                before = __dadd_rn(before, static_cast<double>(scratch.weights[place]));
                if (scratch.weights[place] > 0.0f) last = place;
                if (before > mark) break;
            }
            scratch.chosen = id_of(scratch.candidates[place < n_kept ? place : last]);
        }
    }
    __syncthreads();
    if (scratch.chosen != NONE) return scratch.chosen;
    const double mark = scratch.total;
    __syncthreads();
    row.n_bands = cut_band;
    sum_weights(row, scratch, chunk_sums);
    return draw_from_all(row, scratch, chunk_sums, mark);
}

extern "C" __global__ void __launch_bounds__(N_THREADS, 2) sample(
    u32* ids,                  // [rows]; NONE where status is not 0
    u32* status,               // [rows]: RowState
    const f32* logits,         // [rows, vocab]
    const Sampling* params,    // [rows]
    u32 vocab) {
    BATON_DYNAMIC_SHARED(double, chunk_sums);    // [vocab / CHUNK rounded up]
    __shared__ RowScratch scratch;
    const Sampling mine = params[blockIdx.x];
    Row row{logits + static_cast<u64>(blockIdx.x) * vocab, vocab, 0.0f, 1.0f, mine.min_p, NONE};
    u32 id;
    const RowState state = find_largest(row.logits, vocab, scratch, row.maximum, id);
    const bool draws = state == FINE && mine.temperature > 0.0f;
    const u32 top_k = mine.top_k == 0 || mine.top_k > vocab ? vocab : mine.top_k;
    if (!draws || (top_k < vocab && top_k > MAX_CANDIDATES)) {
        if (threadIdx.x == 0) {
            ids[blockIdx.x] = state == FINE && !draws ? id : NONE;
            status[blockIdx.x] = state != FINE ? state : draws ? LEFT_TO_HOST : FINE;
        }
        return;
    }
    row.inverse_temperature = 1.0f / mine.temperature;
    const double u = uniform(mine.seed, mine.index, mine.choice);
    const bool has_top_p = mine.top_p < 1.0f;
    u32 chosen = NONE;
    if (top_k == vocab && !has_top_p) {
        const double total = sum_weights(row, scratch, chunk_sums);
        chosen = draw_from_all(row, scratch, chunk_sums, __dmul_rn(u, total));
    } else {
        const bool has_top_k = top_k < vocab;
        const u32 n = has_top_k ? top_k : min(MAX_CANDIDATES, vocab);
        const double total = has_top_k ? 0.0 : sum_weights(row, scratch, chunk_sums);
        select_first(row, scratch, n);
        weigh_candidates(row, scratch, n);
        const double target_of_all = __dmul_rn(static_cast<double>(mine.top_p), total);
        if (threadIdx.x == 0) {
            double of_candidates = 0.0, mass;
            for (u32 i = 0; i < n; i++) of_candidates = __dadd_rn(of_candidates, static_cast<double>(scratch.weights[i]));
            const double target = has_top_k ? __dmul_rn(static_cast<double>(mine.top_p), of_candidates) : target_of_all;
            const u32 n_kept = nucleus(scratch.weights, n, target, mass);
            scratch.chosen = NONE;
            if (has_top_k || mass >= target)
                scratch.chosen = id_of(scratch.candidates[position_at(scratch.weights, n_kept, __dmul_rn(u, mass))]);
        }
        __syncthreads();
        chosen = scratch.chosen;
        __syncthreads();
        if (chosen == NONE) chosen = draw_from_wide_nucleus(row, scratch, chunk_sums, target_of_all, u);
    }
    if (threadIdx.x == 0) {
        ids[blockIdx.x] = chosen;
        status[blockIdx.x] = chosen == NONE ? LEFT_TO_HOST : FINE;
    }
}
BATON_EXPORT(sample)
