// out[r] = the id of a step's r-th token: given, or the one that the step before sampled at a place that is given instead.
//
// Split: one thread a row. Bound: latency. What was sampled need not pass through the host for the next step to begin.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

extern "C" __global__ void __launch_bounds__(256) token_ids(
    u32* out,              // [rows]
    const u32* ids,        // [rows], each below vocab
    const u32* sources,    // [rows]: a place in sampled; NONE: the id that is given
    const u32* sampled,    // where a row has no token, NONE; its next token is then nobody's, and taken as 0
    u32 rows, u32 vocab) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const u32 source = sources[row];
    const u32 id = source == NONE ? ids[row] : sampled[source];
    out[row] = id < vocab ? id : 0;
}
BATON_EXPORT(token_ids)
