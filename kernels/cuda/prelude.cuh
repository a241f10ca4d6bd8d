// What every kernel stands on: integer names, bf16 and f16 as bits, 16-byte vectors, reductions, the export of entry points.
// No header of the toolkit is included, so NVRTC needs no include path; g++ gets the same names from shim.h.
#pragma once

#ifdef BATON_SHIM
#include "shim.h"
#else
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long long uptr;
#define BATON_EXPORT(op)
// Dynamic shared memory, seen as T. One declaration a kernel; every kernel of a file sees the same bytes.
#define BATON_DYNAMIC_SHARED(T, name) \
    extern __shared__ __align__(128) unsigned char baton_dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(baton_dynamic_shared)
#endif

typedef float f32;

// Both are bits only: no arithmetic but through f32.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(bf16) == 2 && sizeof(f16) == 2, "sizes of the element types");

#define BATON_INFINITY __uint_as_float(0x7f800000u)
constexpr u32 NONE = 0xffffffffu;
constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// ---- conversions -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ f32 to_f32(f32 x) { return x; }
__device__ __forceinline__ f32 to_f32(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

#ifdef BATON_SHIM
__device__ __forceinline__ f32 to_f32(f16 x) { return baton_shim::f32_of_f16(x.bits); }
template <typename T> __device__ __forceinline__ T from_f32(f32 x);
template <> __device__ __forceinline__ f32 from_f32<f32>(f32 x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(f32 x) { return bf16{baton_shim::bf16_of_f32(x)}; }
template <> __device__ __forceinline__ f16 from_f32<f16>(f32 x) { return f16{baton_shim::f16_of_f32(x)}; }
// Two elements in one register, the first in the low half.
template <typename T> __device__ __forceinline__ u32 pack2(f32 low, f32 high) {
    return static_cast<u32>(from_f32<T>(low).bits) | static_cast<u32>(from_f32<T>(high).bits) << 16;
}
#else
__device__ __forceinline__ f32 to_f32(f16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
template <typename T> __device__ __forceinline__ u32 pack2(f32 low, f32 high);
template <> __device__ __forceinline__ u32 pack2<bf16>(f32 low, f32 high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <> __device__ __forceinline__ u32 pack2<f16>(f32 low, f32 high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <typename T> __device__ __forceinline__ T from_f32(f32 x);
template <> __device__ __forceinline__ f32 from_f32<f32>(f32 x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(f32 x) { return bf16{static_cast<u16>(pack2<bf16>(x, 0.0f))}; }
template <> __device__ __forceinline__ f16 from_f32<f16>(f32 x) { return f16{static_cast<u16>(pack2<f16>(x, 0.0f))}; }
#endif

// ---- 16-byte vectors -------------------------------------------------------------------------------------------------

// 16 bytes of elements: 4 of f32, 8 of the others.
template <typename T> struct alignas(16) Vec {
    static constexpr u32 N = 16 / sizeof(T);
    T x[N];
};

template <typename T> __device__ __forceinline__ Vec<T> load_vec(const T* from) {
    return *reinterpret_cast<const Vec<T>*>(from);
}
template <typename T> __device__ __forceinline__ void store_vec(T* to, const Vec<T>& v) { *reinterpret_cast<Vec<T>*>(to) = v; }

// Whether rows of `cols` elements all begin on 16 bytes, given that the matrix does.
template <typename T> __device__ __forceinline__ bool rows_are_vectors(u32 cols) { return cols % Vec<T>::N == 0; }

// ---- reductions, the same bits in every thread ---------------------------------------------------------------------------

// A butterfly: every lane adds the same pairs, so all hold the same bits. `width` is a power of two.
__device__ __forceinline__ f32 warp_sum(f32 x, u32 width = WARP) {
    for (u32 offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}
__device__ __forceinline__ f32 warp_max(f32 x, u32 width = WARP) {
    for (u32 offset = width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Sum over the CTA, warps in order. `scratch: [32]` in shared memory; the CTA is whole warps. Ends with no thread reading scratch.
__device__ __forceinline__ f32 cta_sum(f32 x, f32* scratch) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    f32 total = 0.0f;
    for (u32 i = 0; i < n_warps; i++) total += scratch[i];
    __syncthreads();
    return total;
}
