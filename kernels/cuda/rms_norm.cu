// RMS norm of rows, alone or after adding to the residual: out = x / sqrt(mean(x^2) + eps) * weight.
//
// Split: one CTA a row, 16 bytes a thread a turn. The row is read twice, the second time from L1 or L2.
// Bound: bytes; 2 * cols * sizeof(T) a row, 4 * cols * sizeof(T) with the residual.
// Bits: a thread adds its squares in order, then lanes as a butterfly, then warps in order; nothing of it knows other rows.
// Versions: one. Not measured yet, no card.
#include "prelude.cuh"

// The norm of one row that is already rounded to T.
template <typename T> __device__ __forceinline__ void normalise(T* out, const T* x, const f32* weight, f32 squares, f32 eps, u32 cols) {
    __shared__ f32 scratch[WARP];
    const f32 scale = 1.0f / sqrtf(cta_sum(squares, scratch) / static_cast<f32>(cols) + eps);
    u32 done = 0;
    if (rows_are_vectors<T>(cols)) {
        for (u32 i = threadIdx.x * Vec<T>::N; i < cols; i += blockDim.x * Vec<T>::N) {
            Vec<T> v = load_vec(x + i);
#pragma unroll
            for (u32 j = 0; j < Vec<T>::N; j++) v.x[j] = from_f32<T>(to_f32(v.x[j]) * scale * weight[i + j]);
            store_vec(out + i, v);
        }
        done = cols;
    }
    for (u32 i = done + threadIdx.x; i < cols; i += blockDim.x) out[i] = from_f32<T>(to_f32(x[i]) * scale * weight[i]);
}

template <typename T>
__device__ __forceinline__ void rms_norm(
    T* out,               // [rows, cols]
    const T* x,           // [rows, cols]
    const f32* weight,    // [cols]
    f32 eps, u32 cols) {
    const u64 row = static_cast<u64>(blockIdx.x) * cols;
    f32 squares = 0.0f;
    u32 done = 0;
    if (rows_are_vectors<T>(cols)) {
        for (u32 i = threadIdx.x * Vec<T>::N; i < cols; i += blockDim.x * Vec<T>::N) {
            const Vec<T> v = load_vec(x + row + i);
#pragma unroll
            for (u32 j = 0; j < Vec<T>::N; j++) squares += to_f32(v.x[j]) * to_f32(v.x[j]);
        }
        done = cols;
    }
    for (u32 i = done + threadIdx.x; i < cols; i += blockDim.x) squares += to_f32(x[row + i]) * to_f32(x[row + i]);
    normalise(out + row, x + row, weight, squares, eps, cols);
}

// The norm is of the rounded sum, so it equals an add followed by a norm. Each thread reads again only what it wrote itself.
template <typename T>
__device__ __forceinline__ void add_rms_norm(
    T* out,               // [rows, cols]
    T* residual,          // [rows, cols], becomes residual + x
    const T* x,           // [rows, cols]
    const f32* weight,    // [cols]
    f32 eps, u32 cols) {
    const u64 row = static_cast<u64>(blockIdx.x) * cols;
    f32 squares = 0.0f;
    u32 done = 0;
    if (rows_are_vectors<T>(cols)) {
        for (u32 i = threadIdx.x * Vec<T>::N; i < cols; i += blockDim.x * Vec<T>::N) {
            Vec<T> sum = load_vec(residual + row + i);
            const Vec<T> v = load_vec(x + row + i);
#pragma unroll
            for (u32 j = 0; j < Vec<T>::N; j++) {
                sum.x[j] = from_f32<T>(to_f32(sum.x[j]) + to_f32(v.x[j]));
                squares += to_f32(sum.x[j]) * to_f32(sum.x[j]);
            }
            store_vec(residual + row + i, sum);
        }
        done = cols;
    }
    for (u32 i = done + threadIdx.x; i < cols; i += blockDim.x) {
        const T sum = from_f32<T>(to_f32(residual[row + i]) + to_f32(x[row + i]));
        residual[row + i] = sum;
        squares += to_f32(sum) * to_f32(sum);
    }
    normalise<T>(out + row, residual + row, weight, squares, eps, cols);
}

#define RMS_NORM(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_##T(T* out, const T* x, const f32* weight, f32 eps, u32 cols) { \
        rms_norm<T>(out, x, weight, eps, cols);                                                                            \
    }                                                                                                                      \
    BATON_EXPORT(rms_norm_##T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        add_rms_norm_##T(T* out, T* residual, const T* x, const f32* weight, f32 eps, u32 cols) {                           \
        add_rms_norm<T>(out, residual, x, weight, eps, cols);                                                              \
    }                                                                                                                      \
    BATON_EXPORT(add_rms_norm_##T)

RMS_NORM(f32)
RMS_NORM(f16)
RMS_NORM(bf16)
