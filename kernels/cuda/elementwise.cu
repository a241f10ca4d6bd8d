// What treats each element alone: residual + x, x + bias, soft caps, gated activations, conversions between types.
//
// Split: a CTA of 256 threads takes 2048 elements, a thread 8 that stand together, by 16-byte loads where rows allow them.
// Bound: bytes.
// Bits: each element by itself.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

constexpr u32 RUN = 8;
constexpr u32 CTA_ELEMENTS = 256 * RUN;

// 8 elements as f32, by 16-byte loads.
template <typename T> __device__ __forceinline__ void load_run(f32 (&to)[RUN], const T* from) {
#pragma unroll
    for (u32 i = 0; i < RUN; i += Vec<T>::N) {
        const Vec<T> v = load_vec(from + i);
#pragma unroll
        for (u32 j = 0; j < Vec<T>::N; j++) to[i + j] = to_f32(v.x[j]);
    }
}
template <typename T> __device__ __forceinline__ void store_run(T* to, const f32 (&from)[RUN]) {
#pragma unroll
    for (u32 i = 0; i < RUN; i += Vec<T>::N) {
        Vec<T> v;
#pragma unroll
        for (u32 j = 0; j < Vec<T>::N; j++) v.x[j] = from_f32<T>(from[i + j]);
        store_vec(to + i, v);
    }
}

// First of this thread's 8 elements that stand together.
__device__ __forceinline__ u64 run_start() { return static_cast<u64>(blockIdx.x) * CTA_ELEMENTS + threadIdx.x * RUN; }

// Row and column of an element. Nearly always in 32 bits: a division in 64 costs as much as the rest of a thread's work.
struct Place {
    u64 row;
    u32 col;
};
__device__ __forceinline__ Place place_of(u64 i, u32 cols) {
    if (i >> 32 == 0) return {static_cast<u32>(i) / cols, static_cast<u32>(i) % cols};
    return {i / cols, static_cast<u32>(i % cols)};
}

template <typename T> __device__ __forceinline__ void add(T* residual, const T* x, u64 n) {
    const u64 first = run_start();
    if (first + RUN <= n) {
        f32 a[RUN], b[RUN];
        load_run(a, residual + first);
        load_run(b, x + first);
#pragma unroll
        for (u32 i = 0; i < RUN; i++) a[i] += b[i];
        store_run(residual + first, a);
    } else {
        for (u64 i = first; i < n; i++) residual[i] = from_f32<T>(to_f32(residual[i]) + to_f32(x[i]));
    }
}

template <typename T> __device__ __forceinline__ void add_bias(T* x, const f32* bias, u64 n, u32 cols) {
    const u64 first = run_start();
    if (first + RUN <= n && cols % RUN == 0) {
        f32 a[RUN], b[RUN];
        load_run(a, x + first);
        load_run(b, bias + place_of(first, cols).col);
#pragma unroll
        for (u32 i = 0; i < RUN; i++) a[i] += b[i];
        store_run(x + first, a);
    } else {
        for (u64 i = first; i < n && i < first + RUN; i++) x[i] = from_f32<T>(to_f32(x[i]) + bias[place_of(i, cols).col]);
    }
}

template <typename T> __device__ __forceinline__ void soft_cap(T* x, u64 n, f32 cap) {
    const u64 first = run_start();
    if (first + RUN <= n) {
        f32 a[RUN];
        load_run(a, x + first);
#pragma unroll
        for (u32 i = 0; i < RUN; i++) a[i] = cap * tanhf(a[i] / cap);
        store_run(x + first, a);
    } else {
        for (u64 i = first; i < n; i++) x[i] = from_f32<T>(cap * tanhf(to_f32(x[i]) / cap));
    }
}

template <typename From, typename To> __device__ __forceinline__ void convert(To* out, const From* x, u64 n) {
    const u64 first = run_start();
    if (first + RUN <= n) {
        f32 a[RUN];
        load_run(a, x + first);
        store_run(out + first, a);
    } else {
        for (u64 i = first; i < n; i++) out[i] = from_f32<To>(to_f32(x[i]));
    }
}

constexpr u32 SILU = 0, GELU_TANH = 1;

// x sigmoid(y). expf overflows to infinity for y below -88, which gives 0. The division is the short one, two units of the last
// place off at most: an exact one branches for each element.
__device__ __forceinline__ f32 mul_sigmoid(f32 x, f32 y) { return __fdividef(x, 1.0f + expf(-y)); }

__device__ __forceinline__ f32 gate(f32 gate, f32 up, u32 activation, f32 alpha, f32 limit) {
    if (activation == SILU) return mul_sigmoid(gate, gate) * up;
    if (activation == GELU_TANH) {
        // x (1 + tanh y) / 2 = x sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x^3)
        const f32 twice = 1.595769122f * gate * (1.0f + 0.044715f * gate * gate);
        return mul_sigmoid(gate, twice) * up;
    }
    // Clamped swish.
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit);
    return mul_sigmoid(gate, alpha * gate) * (up + 1.0f);
}

template <typename T>
__device__ __forceinline__ void gated(
    T* out,              // [rows, ffn]
    const T* gate_up,    // [rows, 2 * ffn], gate first
    u64 n, u32 ffn, u32 activation, f32 alpha, f32 limit) {
    const u64 first = run_start();
    if (first + RUN <= n && ffn % RUN == 0) {
        const Place place = place_of(first, ffn);
        const T* from = gate_up + place.row * (2 * static_cast<u64>(ffn)) + place.col;
        f32 a[RUN], b[RUN];
        load_run(a, from);
        load_run(b, from + ffn);
#pragma unroll
        for (u32 i = 0; i < RUN; i++) a[i] = gate(a[i], b[i], activation, alpha, limit);
        store_run(out + first, a);
    } else {
        for (u64 i = first; i < n && i < first + RUN; i++) {
            const Place place = place_of(i, ffn);
            const T* from = gate_up + place.row * (2 * static_cast<u64>(ffn)) + place.col;
            out[i] = from_f32<T>(gate(to_f32(from[0]), to_f32(from[ffn]), activation, alpha, limit));
        }
    }
}

#define ELEMENTWISE(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) add_##T(T* residual, const T* x, u64 n) { add<T>(residual, x, n); }      \
    BATON_EXPORT(add_##T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) add_bias_##T(T* x, const f32* bias, u64 n, u32 cols) {                   \
        add_bias<T>(x, bias, n, cols);                                                                                     \
    }                                                                                                                      \
    BATON_EXPORT(add_bias_##T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) soft_cap_##T(T* x, u64 n, f32 cap) { soft_cap<T>(x, n, cap); }           \
    BATON_EXPORT(soft_cap_##T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        gated_##T(T* out, const T* gate_up, u64 n, u32 ffn, u32 activation, f32 alpha, f32 limit) {                           \
        gated<T>(out, gate_up, n, ffn, activation, alpha, limit);                                                          \
    }                                                                                                                      \
    BATON_EXPORT(gated_##T)

ELEMENTWISE(f32)
ELEMENTWISE(f16)
ELEMENTWISE(bf16)

#define CONVERT(From, To)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) convert_##From##_##To(To* out, const From* x, u64 n) {                  \
        convert<From, To>(out, x, n);                                                                                      \
    }                                                                                                                      \
    BATON_EXPORT(convert_##From##_##To)

CONVERT(f32, bf16)
CONVERT(f32, f16)
CONVERT(bf16, f32)
CONVERT(f16, f32)
