// Which experts each token goes to and with what weight: the top_k of the router's logits, of equal ones the smaller number,
// weighted by the softmax over all experts or over those chosen. Written in ascending order of experts. A row that is no token
// goes to none, so that no expert is read for it.
//
// Split: a warp a row, 4 rows a CTA; a row's logits lie in shared memory. Bound: latency; top_k passes over n_experts / 32 a lane.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

constexpr u32 N_WARPS = 4;
constexpr u64 NO_SLOT = ~static_cast<u64>(0);    // as of rope_append

// Larger floats have larger keys; 0 is below every number's.
__device__ __forceinline__ u32 order_key(f32 x) {
    const u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

template <typename T>
__device__ __forceinline__ void moe_route(
    u32* experts,       // [rows, top_k]; NONE of a row that is no token
    f32* weights,       // [rows, top_k]
    const T* logits,    // [rows, n_experts]
    u32 n_rows, u32 n_experts, u32 top_k, u32 renormalize,
    const u64* slots) {    // [rows], of the cache, or null: every row is a token
    BATON_DYNAMIC_SHARED(u32, shared);    // [N_WARPS, n_experts]: keys, 0 once chosen
    const u32 lane = threadIdx.x % WARP, row = blockIdx.x * N_WARPS + threadIdx.x / WARP;
    if (row >= n_rows) return;
    if (slots != nullptr && slots[row] == NO_SLOT) {
        if (lane < top_k) {
            experts[static_cast<u64>(row) * top_k + lane] = NONE;
            weights[static_cast<u64>(row) * top_k + lane] = 0.0f;
        }
        return;
    }
    u32* keys = shared + threadIdx.x / WARP * n_experts;
    const T* of_row = logits + static_cast<u64>(row) * n_experts;
    f32 maximum = -BATON_INFINITY;
    for (u32 i = lane; i < n_experts; i += WARP) {
        const f32 x = to_f32(of_row[i]);
        keys[i] = order_key(x);
        maximum = fmaxf(maximum, x);
    }
    maximum = warp_max(maximum);
    f32 sum = 0.0f;
    if (!renormalize) {
        for (u32 i = lane; i < n_experts; i += WARP) sum += expf(to_f32(of_row[i]) - maximum);
        sum = warp_sum(sum);
    }
    __syncwarp();
    // Lane i keeps the i-th choice.
    u32 chosen = NONE;
    f32 weight = 0.0f;
    for (u32 choice = 0; choice < top_k; choice++) {
        u32 best_key = 0, best = NONE;
        for (u32 i = lane; i < n_experts; i += WARP)
            if (keys[i] > best_key) best_key = keys[i], best = i;
        for (u32 offset = WARP / 2; offset > 0; offset /= 2) {
            const u32 key = __shfl_xor_sync(ALL_LANES, best_key, offset), other = __shfl_xor_sync(ALL_LANES, best, offset);
            if (key > best_key || (key == best_key && other < best)) best_key = key, best = other;
        }
        if (best == NONE) best = choice;    // Only NaNs are left.
        const f32 exponential = expf(to_f32(of_row[best]) - maximum);
        if (renormalize) sum += exponential;
        if (lane == choice) chosen = best, weight = exponential;
        if (lane == best % WARP) keys[best] = 0;
        __syncwarp();
    }
    u32 place = 0;
    for (u32 choice = 0; choice < top_k; choice++) place += __shfl_sync(ALL_LANES, chosen, choice) < chosen;
    if (lane < top_k) {
        experts[static_cast<u64>(row) * top_k + place] = chosen;
        weights[static_cast<u64>(row) * top_k + place] = weight / sum;
    }
}

#define MOE_ROUTE(T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) moe_route_##T(u32* experts, f32* weights, const T* logits, u32 n_rows,   \
                                                                    u32 n_experts, u32 top_k, u32 renormalize,             \
                                                                    const u64* slots) {                                    \
        moe_route<T>(experts, weights, logits, n_rows, n_experts, top_k, renormalize, slots);                              \
    }                                                                                                                      \
    BATON_EXPORT(moe_route_##T)

MOE_ROUTE(f32)
MOE_ROUTE(f16)
MOE_ROUTE(bf16)
