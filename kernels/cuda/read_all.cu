// Reads a buffer once and keeps nothing: what the card's memory gives at most, beside which kernels are reported.
//
// Split: CTAs of 256 threads walk the buffer together, each thread by 16-byte loads, four of them under way. Bound: bytes.
// Bits: none come out, unless every word were the one that is asked for.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

// x: [n] of 16 bytes; out: [1], written if the words' exclusive or is `sought`, so that no read can be left out.
extern "C" __global__ void __launch_bounds__(256) read_all(u32* out, const u32* x, u64 n, u32 sought) {
    u32 mixed = 0;
    const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
    u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        Vec<u32> v[4];
#pragma unroll
        for (u32 k = 0; k < 4; k++) v[k] = load_vec(x + 4 * (i + k * step));
#pragma unroll
        for (u32 k = 0; k < 4; k++)
#pragma unroll
            for (u32 j = 0; j < Vec<u32>::N; j++) mixed ^= v[k].x[j];
    }
    for (; i < n; i += step) {
        const Vec<u32> v = load_vec(x + 4 * i);
#pragma unroll
        for (u32 j = 0; j < Vec<u32>::N; j++) mixed ^= v.x[j];
    }
    if (mixed == sought) *out = mixed;
}
BATON_EXPORT(read_all)
