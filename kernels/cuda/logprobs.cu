// Log-probability and rank of one token of each row of logits, and the row's most likely tokens: of the raw distribution, as
// engine/src/sampler has it.
//
// Split: a CTA a row; a pass for the largest, one for the sum, one for the rank, two to four for the most likely. Bound: latency;
// bytes, vocab * 4 a row, with many rows.
// Versions: one. Not measured yet, no card.
#include "sampling.cuh"

extern "C" __global__ void __launch_bounds__(N_THREADS, 2) logprobs(
    f32* logprob,         // [rows]; NaN where the row has no distribution
    u32* rank,            // [rows], 1 for the most likely
    u32* top_ids,         // [rows, n_top]
    f32* top_logprobs,    // [rows, n_top]
    const f32* logits,    // [rows, vocab]
    const u32* ids,       // [rows]; NONE, of a row that is left to the host, counts as the last
    u32 vocab, u32 n_top) {
    BATON_DYNAMIC_SHARED(double, chunk_sums);    // [vocab / CHUNK rounded up]
    __shared__ RowScratch scratch;
    Row row{logits + static_cast<u64>(blockIdx.x) * vocab, vocab, 0.0f, 1.0f, 0.0f, NONE};
    u32 largest;
    if (find_largest(row.logits, vocab, scratch, row.maximum, largest) != FINE) {
        if (threadIdx.x == 0) logprob[blockIdx.x] = __uint_as_float(0x7fc00000u), rank[blockIdx.x] = 0;
        return;
    }
    const double log_sum = __dadd_rn(static_cast<double>(row.maximum), log(sum_weights(row, scratch, chunk_sums)));
    const u32 id = min(ids[blockIdx.x], vocab - 1);
    const f32 logit = row.logits[id];
    if (threadIdx.x == 0) scratch.wanted = 0;
    __syncthreads();
    u32 n_before = 0;
    for (u32 i = threadIdx.x; i < vocab; i += N_THREADS) {
        const f32 other = row.logits[i];
        n_before += other > logit || (other == logit && i < id);
    }
    atomicAdd(&scratch.wanted, n_before);
    __syncthreads();
    if (threadIdx.x == 0) {
        logprob[blockIdx.x] = static_cast<f32>(static_cast<double>(logit) - log_sum);
        rank[blockIdx.x] = scratch.wanted + 1;
    }
    __syncthreads();
    if (n_top == 0) return;
    const u32 n = min(n_top, vocab);
    select_first(row, scratch, n);
    for (u32 i = threadIdx.x; i < n; i += N_THREADS) {
        const u32 top = id_of(scratch.candidates[i]);
        top_ids[static_cast<u64>(blockIdx.x) * n_top + i] = top;
        top_logprobs[static_cast<u64>(blockIdx.x) * n_top + i] =
            static_cast<f32>(static_cast<double>(row.logits[top]) - log_sum);
    }
}
BATON_EXPORT(logprobs)
